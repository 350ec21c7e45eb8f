"""The Triton kernel of :mod:`gpupipe.kernels.crop_resize`: crop328 and the network's input in one pass.

A thread makes a square of 4×4 pixels of crop328. It walks down the source rows that the square needs (3·h/328 + 5 of
them), weighs each row's taps once, and adds the sums to those of the four output rows that they belong to. Every store
is of 4 (uint8), 8 or 16 bytes:

    crop328  82 × 82 squares      squares 1 … 80 of either axis are the inner 320×320's
    image    planar: 6 planes, 4 numbers a store
             channels last, 16 bits: 4 pixels × 6 channels = 3 stores of 16 bytes
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED, join4, round_saturate
from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, MASK_COLUMNS, MASK_ROWS, RING
from gpupipe.kernels.cubic_triton import add_pair, clamped, cubic_axis, pair_at, sum_across
from gpupipe.kernels.launch_triton import launch

_SIZE = tl.constexpr(CROP_SIZE)
_INNER = tl.constexpr(INNER_SIZE)
_RING = tl.constexpr(RING)
_TOP, _BOTTOM = tl.constexpr(MASK_ROWS.start), tl.constexpr(MASK_ROWS.stop)
_LEFT, _RIGHT = tl.constexpr(MASK_COLUMNS.start), tl.constexpr(MASK_COLUMNS.stop)
_SQUARES = tl.constexpr(CROP_SIZE // 4)  # along an axis
_UNIT = tl.constexpr(32897 / (1 << 23))
_UNIT_REST = tl.constexpr(1 / 255 - 32897 / (1 << 23))

BLOCK = 1 << 13 if INTERPRETED else 128
"""Squares a program; the interpreter's cost is per program."""


@triton.jit
def _crop_resize_kernel(
    frames,
    index,
    boxes,
    crops,
    image,
    frame_stride,
    row_stride,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1)
    square = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = square < _SQUARES * _SQUARES
    # Idle threads repeat the last square rather than mask their loads.
    square = tl.minimum(square, _SQUARES * _SQUARES - 1)
    row = square // _SQUARES * 4
    column = square % _SQUARES * 4

    xmin = tl.load(boxes + sample * 4).to(tl.int32)
    ymin = tl.load(boxes + sample * 4 + 1).to(tl.int32)
    width = tl.load(boxes + sample * 4 + 2).to(tl.int32) - xmin
    height = tl.load(boxes + sample * 4 + 3).to(tl.int32) - ymin
    corner = frames + tl.load(index + sample).to(tl.int64) * frame_stride + (ymin * row_stride + xmin * 3)

    rows = (
        cubic_axis(row, height, _SIZE),
        cubic_axis(row + 1, height, _SIZE),
        cubic_axis(row + 2, height, _SIZE),
        cubic_axis(row + 3, height, _SIZE),
    )
    column0 = _columns(column, width)
    column1 = _columns(column + 1, width)
    column2 = _columns(column + 2, width)
    column3 = _columns(column + 3, width)
    zero = tl.zeros((BLOCK,), tl.float32)
    # A tuple for each column: its pixels from the top down, each blue, green, red.
    pixels0 = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    pixels1 = pixels0
    pixels2 = pixels0
    pixels3 = pixels0
    above0 = (zero, zero, zero)
    above1 = above0
    above2 = above0
    above3 = above0
    first = rows[0][0]
    for k in range(3 * height // _SIZE + 5):
        at = corner + clamped(first + k, height) * row_stride
        weights = (
            pair_at(first + k - rows[0][0], rows[0][1], rows[0][2], rows[0][3], rows[0][4]),
            pair_at(first + k - rows[1][0], rows[1][1], rows[1][2], rows[1][3], rows[1][4]),
            pair_at(first + k - rows[2][0], rows[2][1], rows[2][2], rows[2][3], rows[2][4]),
            pair_at(first + k - rows[3][0], rows[3][1], rows[3][2], rows[3][3], rows[3][4]),
        )
        pixels0, above0 = _add_row(pixels0, above0, at, column0, weights)
        pixels1, above1 = _add_row(pixels1, above1, at, column1, weights)
        pixels2, above2 = _add_row(pixels2, above2, at, column2, weights)
        pixels3, above3 = _add_row(pixels3, above3, at, column3, weights)

    for i in tl.static_range(4):
        y = row + i
        b0, g0, r0 = _rounded(pixels0[3 * i], pixels0[3 * i + 1], pixels0[3 * i + 2])
        b1, g1, r1 = _rounded(pixels1[3 * i], pixels1[3 * i + 1], pixels1[3 * i + 2])
        b2, g2, r2 = _rounded(pixels2[3 * i], pixels2[3 * i + 1], pixels2[3 * i + 2])
        b3, g3, r3 = _rounded(pixels3[3 * i], pixels3[3 * i + 1], pixels3[3 * i + 2])
        blue, green, red = (b0, b1, b2, b3), (g0, g1, g2, g3), (r0, r1, r2, r3)
        _store_crop(crops, sample, y, column, blue, green, red, active)
        _store_image(image, sample, y - _RING, column - _RING, blue, green, red, active, CHANNELS_LAST)


@triton.jit
def _store_crop(crops, sample, y, x, blue, green, red, active):
    """Four pixels of a row of crop328."""
    to = crops + sample.to(tl.int64) * (3 * _SIZE * _SIZE) + (y * _SIZE + x)[:, None] + tl.arange(0, 4)[None, :]
    mask = active[:, None]
    tl.store(to, join4(blue[0], blue[1], blue[2], blue[3]).to(tl.uint8), mask=mask)
    tl.store(to + _SIZE * _SIZE, join4(green[0], green[1], green[2], green[3]).to(tl.uint8), mask=mask)
    tl.store(to + 2 * _SIZE * _SIZE, join4(red[0], red[1], red[2], red[3]).to(tl.uint8), mask=mask)


@triton.jit
def _store_image(image, sample, y, x, blue, green, red, active, CHANNELS_LAST: tl.constexpr):
    """Four pixels of a row of the network's input, if the row and the square are the inner 320×320's."""
    kind: tl.constexpr = image.dtype.element_ty
    plane: tl.constexpr = _INNER * _INNER
    inner = (active & (y >= 0) & (y < _INNER) & (x >= 0) & (x < _INNER))[:, None]
    # The hidden rectangle's columns begin and end inside a square.
    seen = (y < _TOP) | (y >= _BOTTOM)
    s0 = seen | (x < _LEFT) | (x >= _RIGHT)
    s1 = seen | (x < _LEFT - 1) | (x >= _RIGHT - 1)
    s2 = seen | (x < _LEFT - 2) | (x >= _RIGHT - 2)
    s3 = seen | (x < _LEFT - 3) | (x >= _RIGHT - 3)
    b0, b1, b2, b3 = _scaled(blue)
    g0, g1, g2, g3 = _scaled(green)
    r0, r1, r2, r3 = _scaled(red)
    four = tl.arange(0, 4)[None, :]
    to = image + sample.to(tl.int64) * (6 * plane)
    pixel = y * _INNER + x
    if CHANNELS_LAST:
        # Two 16-bit numbers a word, three words a pixel, twelve words for the four.
        p0, q0, t0 = _words(b0, g0, r0, s0, kind)
        p1, q1, t1 = _words(b1, g1, r1, s1, kind)
        p2, q2, t2 = _words(b2, g2, r2, s2, kind)
        p3, q3, t3 = _words(b3, g3, r3, s3, kind)
        words = to.to(tl.pointer_type(tl.uint32)) + (pixel * 3)[:, None] + four
        tl.store(words, join4(p0, q0, t0, p1), mask=inner)
        tl.store(words + 4, join4(q1, t1, p2, q2), mask=inner)
        tl.store(words + 8, join4(t2, p3, q3, t3), mask=inner)
    else:
        to += pixel[:, None] + four
        b, g, r = join4(b0, b1, b2, b3), join4(g0, g1, g2, g3), join4(r0, r1, r2, r3)
        tl.store(to, b.to(kind), mask=inner)
        tl.store(to + plane, g.to(kind), mask=inner)
        tl.store(to + 2 * plane, r.to(kind), mask=inner)
        visible = join4(s0, s1, s2, s3)
        tl.store(to + 3 * plane, tl.where(visible, b, 0.0).to(kind), mask=inner)
        tl.store(to + 4 * plane, tl.where(visible, g, 0.0).to(kind), mask=inner)
        tl.store(to + 5 * plane, tl.where(visible, r, 0.0).to(kind), mask=inner)


@triton.jit
def _columns(column, width):
    """Offsets of the four taps of a column of crop328, in bytes, and their weights."""
    tap, w0, w1, w2, w3 = cubic_axis(column, width, _SIZE)
    x0 = clamped(tap, width) * 3
    x1 = clamped(tap + 1, width) * 3
    x2 = clamped(tap + 2, width) * 3
    x3 = clamped(tap + 3, width) * 3
    return x0, x1, x2, x3, w0, w1, w2, w3


@triton.jit
def _add_row(pixels, above, row, column, weights):
    """Add one source row, seen through a column's taps, to the column's four pixels.

    Returns those, and the row's three values, to be given as ``above`` with the next row.
    """
    b = _tap_sum(row, column)
    g = _tap_sum(row + 1, column)
    r = _tap_sum(row + 2, column)
    w0, w1, w2, w3 = weights
    return (
        add_pair(pixels[0], above[0], b, w0),
        add_pair(pixels[1], above[1], g, w0),
        add_pair(pixels[2], above[2], r, w0),
        add_pair(pixels[3], above[0], b, w1),
        add_pair(pixels[4], above[1], g, w1),
        add_pair(pixels[5], above[2], r, w1),
        add_pair(pixels[6], above[0], b, w2),
        add_pair(pixels[7], above[1], g, w2),
        add_pair(pixels[8], above[2], r, w2),
        add_pair(pixels[9], above[0], b, w3),
        add_pair(pixels[10], above[1], g, w3),
        add_pair(pixels[11], above[2], r, w3),
    ), (b, g, r)


@triton.jit
def _tap_sum(row, column):
    x0, x1, x2, x3, w0, w1, w2, w3 = column
    v0, v1 = tl.load(row + x0).to(tl.float32), tl.load(row + x1).to(tl.float32)
    v2, v3 = tl.load(row + x2).to(tl.float32), tl.load(row + x3).to(tl.float32)
    return sum_across(v0, v1, v2, v3, w0, w1, w2, w3)


@triton.jit
def _rounded(blue, green, red):
    return round_saturate(blue), round_saturate(green), round_saturate(red)


@triton.jit
def _scaled(values):
    """Four whole numbers in 0 … 255, ÷ 255 and correctly rounded, without a division.

    1/255 = 32897 · 2⁻²³ + the rest: the first product is exact, and the sum rounds once. (All 256 are tested.)
    """
    return (
        values[0] * _UNIT + values[0] * _UNIT_REST,
        values[1] * _UNIT + values[1] * _UNIT_REST,
        values[2] * _UNIT + values[2] * _UNIT_REST,
        values[3] * _UNIT + values[3] * _UNIT_REST,
    )


@triton.jit
def _words(blue, green, red, seen, kind: tl.constexpr):
    """Six channels of a pixel as three words: the pixel, then the pixel masked."""
    b = blue.to(kind).to(tl.uint16, bitcast=True).to(tl.uint32)
    g = green.to(kind).to(tl.uint16, bitcast=True).to(tl.uint32)
    r = red.to(kind).to(tl.uint16, bitcast=True).to(tl.uint32)
    masked = tl.where(seen, b, 0)
    return b | (g << 16), r | (masked << 16), tl.where(seen, g | (r << 16), 0)


def crop_resize_triton(
    frames: Tensor, index: Tensor, boxes: Tensor, *, dtype: torch.dtype, channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """As :func:`~gpupipe.kernels.crop_resize.crop_and_input`, by a kernel; nothing is read back and nothing waits.

    Raises:
        ValueError: rows of ``frames`` that have gaps, or channels last in float32.
    """
    if frames.stride()[2:] != (3, 1):
        raise ValueError(f"frames have strides {frames.stride()}; expected the last two to be 3 and 1")
    if channels_last and dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, channels last; expected float16 or bfloat16 with this layout")
    samples = len(index)
    crops = frames.new_empty(samples, 3, CROP_SIZE, CROP_SIZE)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (samples, 6, INNER_SIZE, INNER_SIZE)
    image = torch.empty(shape, dtype=dtype, device=frames.device, memory_format=layout)
    if samples:
        grid = (triton.cdiv(_SQUARES.value**2, BLOCK), samples)
        launch(
            _crop_resize_kernel,
            grid,
            frames,
            index.contiguous(),
            boxes.contiguous(),
            crops,
            image,
            frames.stride(0),
            frames.stride(1),
            CHANNELS_LAST=channels_last,
            BLOCK=BLOCK,
        )
    return crops, image
