"""The Triton kernel of :mod:`gpupipe.kernels.paste_blend`: the network's output to finished pixels of the box.

A thread finishes one 2×2 cell, which is what a pair of chroma needs. It walks down the rows of the 328×328 canvas that
the cell needs (328/h + 5 of them), weighs each row's taps once, and adds the sums to the cell's two rows. The canvas is
never stored: its inner 320×320 is read from the network's output, its ring from crop328, and only programs whose
cells reach the ring look there.

For BGR, cells start at the box's corner; for NV12, at the even pixel at or before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED, round_saturate, truncate
from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, RING
from gpupipe.kernels.cubic_triton import add_pair, clamped, cubic_axis, cubic_tap, pair_at, sum_across
from gpupipe.kernels.launch_triton import launch
from gpupipe.kernels.nv12_triton import store_cell

_SIZE = tl.constexpr(CROP_SIZE)
_INNER = tl.constexpr(INNER_SIZE)
_RING = tl.constexpr(RING)

TILE = (8, 16)
"""Rows and columns of cells a program."""


@triton.jit(do_not_specialize=["tiles"])
def _paste_blend_kernel(
    mouth,
    crops,
    crop_index,
    frames,
    index,
    boxes,
    keep,
    out,
    mouth_stride,
    channel_stride,
    mouth_row_stride,
    mouth_column_stride,
    frame_stride,
    row_stride,
    keep_stride,
    keep_row_stride,
    out_stride,
    frame_height,
    frame_width,
    tiles,
    feather: tl.float32,
    NV12: tl.constexpr,
    FEATHER: tl.constexpr,
    KEEP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    sample = tl.program_id(1)
    xmin = tl.load(boxes + sample * 4).to(tl.int32)
    ymin = tl.load(boxes + sample * 4 + 1).to(tl.int32)
    xmax = tl.load(boxes + sample * 4 + 2).to(tl.int32)
    ymax = tl.load(boxes + sample * 4 + 3).to(tl.int32)
    width = xmax - xmin
    height = ymax - ymin
    left = xmin
    top = ymin
    if NV12:
        left = xmin // 2 * 2
        top = ymin // 2 * 2

    tile_y = top + tl.program_id(0) // tiles * (2 * TILE_ROWS)
    tile_x = left + tl.program_id(0) % tiles * (2 * TILE_COLUMNS)
    if (tile_y >= ymax) | (tile_x >= xmax):
        return
    cell = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    y = tile_y + cell // TILE_COLUMNS * 2
    x = tile_x + cell % TILE_COLUMNS * 2
    active = (y < ymax) & (x < xmax)

    # A pixel outside the box ends up as the template's: until then it may repeat the nearest one inside.
    rows = (
        cubic_axis(clamped(y - ymin, height), _SIZE, height),
        cubic_axis(clamped(y + 1 - ymin, height), _SIZE, height),
    )
    columns = (
        _columns(clamped(x - xmin, width), width),
        _columns(clamped(x + 1 - xmin, width), width),
    )
    low = tl.minimum(_tap(tile_y - ymin, height), _tap(tile_x - xmin, width)) - 1
    high = tl.maximum(_tap(tile_y - ymin + 2 * TILE_ROWS, height), _tap(tile_x - xmin + 2 * TILE_COLUMNS, width)) + 2
    inner = mouth + sample.to(tl.int64) * mouth_stride
    ring = crops + tl.load(crop_index + sample).to(tl.int64) * (3 * _SIZE * _SIZE)
    # Canvas rows from the upper pixel's first tap to the lower pixel's last.
    count = tl.where(height == 1, 4, _SIZE // height + 5)
    strides = (channel_stride, mouth_row_stride, mouth_column_stride)
    if (low < _RING) | (high >= _RING + _INNER):
        pixels = _resize(inner, ring, strides, rows, columns, count, True)
    else:
        pixels = _resize(inner, ring, strides, rows, columns, count, False)

    frame = frames + tl.load(index + sample).to(tl.int64) * frame_stride
    kept = frame
    if KEEP:
        kept = keep + tl.load(index + sample).to(tl.int64) * keep_stride
    box = (xmin, ymin, xmax, ymax)
    steps = (row_stride, keep_row_stride)
    p = pixels
    p0 = _finish((p[0], p[1], p[2]), frame, kept, box, y, x, active, steps, feather, NV12, FEATHER, KEEP)
    p1 = _finish((p[3], p[4], p[5]), frame, kept, box, y, x + 1, active, steps, feather, NV12, FEATHER, KEEP)
    p2 = _finish((p[6], p[7], p[8]), frame, kept, box, y + 1, x, active, steps, feather, NV12, FEATHER, KEEP)
    p3 = _finish((p[9], p[10], p[11]), frame, kept, box, y + 1, x + 1, active, steps, feather, NV12, FEATHER, KEEP)
    to = out + sample.to(tl.int64) * out_stride
    if NV12:
        store_cell(to, frame_height, frame_width, y, x, p0, p1, p2, p3, active)
    else:
        right = active & (x + 1 < xmax)
        below = y + 1 < ymax
        to += (y * frame_width + x) * 3
        _store_pixel(to, p0, active)
        _store_pixel(to + 3, p1, right)
        to += frame_width * 3
        _store_pixel(to, p2, active & below)
        _store_pixel(to + 3, p3, right & below)


@triton.jit
def _tap(position, size):
    """The second tap, in the canvas, of the box's pixel nearest to ``position``."""
    return cubic_tap(clamped(position, size), _SIZE, size)


@triton.jit
def _resize(inner, ring, strides, rows, columns, count, REACHES_RING: tl.constexpr):
    """The cell's four pixels from the canvas, row by row: blue, green, red of each, float32."""
    zero = tl.zeros_like(rows[0][1])
    pixels = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    above = (zero, zero, zero, zero, zero, zero)
    first = rows[0][0]
    for k in range(count):
        # There are more rows than some cells need. Those weigh nothing, but must not lie beyond what can be read.
        y = clamped(first + k, _SIZE if REACHES_RING else _RING + _INNER)
        upper = pair_at(first + k - rows[0][0], rows[0][1], rows[0][2], rows[0][3], rows[0][4])
        lower = pair_at(first + k - rows[1][0], rows[1][1], rows[1][2], rows[1][3], rows[1][4])
        b0, g0, r0 = _tap_sums(inner, ring, strides, y, columns[0], REACHES_RING)
        b1, g1, r1 = _tap_sums(inner, ring, strides, y, columns[1], REACHES_RING)
        pixels = (
            add_pair(pixels[0], above[0], b0, upper),
            add_pair(pixels[1], above[1], g0, upper),
            add_pair(pixels[2], above[2], r0, upper),
            add_pair(pixels[3], above[3], b1, upper),
            add_pair(pixels[4], above[4], g1, upper),
            add_pair(pixels[5], above[5], r1, upper),
            add_pair(pixels[6], above[0], b0, lower),
            add_pair(pixels[7], above[1], g0, lower),
            add_pair(pixels[8], above[2], r0, lower),
            add_pair(pixels[9], above[3], b1, lower),
            add_pair(pixels[10], above[4], g1, lower),
            add_pair(pixels[11], above[5], r1, lower),
        )
        above = (b0, g0, r0, b1, g1, r1)
    return pixels


@triton.jit
def _columns(position, width):
    """Columns of the canvas that a column of the box takes, and their weights."""
    tap, w0, w1, w2, w3 = cubic_axis(position, _SIZE, width)
    x0, x1, x2, x3 = clamped(tap, _SIZE), clamped(tap + 1, _SIZE), clamped(tap + 2, _SIZE), clamped(tap + 3, _SIZE)
    return x0, x1, x2, x3, w0, w1, w2, w3


@triton.jit
def _tap_sums(inner, ring, strides, y, column, REACHES_RING: tl.constexpr):
    """The weighted taps of one canvas row."""
    x0, x1, x2, x3, w0, w1, w2, w3 = column
    b0, g0, r0 = _canvas(inner, ring, strides, y, x0, REACHES_RING)
    b1, g1, r1 = _canvas(inner, ring, strides, y, x1, REACHES_RING)
    b2, g2, r2 = _canvas(inner, ring, strides, y, x2, REACHES_RING)
    b3, g3, r3 = _canvas(inner, ring, strides, y, x3, REACHES_RING)
    return (
        sum_across(b0, b1, b2, b3, w0, w1, w2, w3),
        sum_across(g0, g1, g2, g3, w0, w1, w2, w3),
        sum_across(r0, r1, r2, r3, w0, w1, w2, w3),
    )


@triton.jit
def _canvas(inner, ring, strides, y, x, REACHES_RING: tl.constexpr):
    """One pixel of the canvas: the network's, truncated to a whole number, or the ring's."""
    channel_stride, row_stride, column_stride = strides
    p = inner + (y - _RING) * row_stride + (x - _RING) * column_stride
    if REACHES_RING:
        painted = (y >= _RING) & (y < _RING + _INNER) & (x >= _RING) & (x < _RING + _INNER)
        b = tl.load(p, mask=painted, other=0).to(tl.float32)
        g = tl.load(p + channel_stride, mask=painted, other=0).to(tl.float32)
        r = tl.load(p + 2 * channel_stride, mask=painted, other=0).to(tl.float32)
    else:
        b = tl.load(p).to(tl.float32)
        g = tl.load(p + channel_stride).to(tl.float32)
        r = tl.load(p + 2 * channel_stride).to(tl.float32)
    if inner.dtype.element_ty != tl.uint8:  # which is truncated already
        b, g, r = truncate(b * 255.0, g * 255.0, r * 255.0)
    if REACHES_RING:
        q = ring + y * _SIZE + x
        b += tl.load(q, mask=~painted, other=0).to(tl.float32)
        g += tl.load(q + _SIZE * _SIZE, mask=~painted, other=0).to(tl.float32)
        r += tl.load(q + 2 * _SIZE * _SIZE, mask=~painted, other=0).to(tl.float32)
    return b, g, r


@triton.jit
def _finish(
    painted,
    frame,
    keep,
    box,
    y,
    x,
    active,
    steps,
    feather,
    NV12: tl.constexpr,
    FEATHER: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Round a painted pixel, blend it with the template's, or leave the template's. int32 in 0 … 255."""
    b, g, r = round_saturate(painted[0]), round_saturate(painted[1]), round_saturate(painted[2])
    if NV12 | FEATHER | KEEP:
        xmin, ymin, xmax, ymax = box
        distance = tl.minimum(tl.minimum(x - xmin, xmax - 1 - x), tl.minimum(y - ymin, ymax - 1 - y))
        inside = distance >= 0
        # NV12 needs the pixels of a cut cell that are outside the box; for BGR they may be outside the frame.
        readable = active
        if not NV12:
            readable = active & inside
        p = frame + y * steps[0] + x * 3
        tb = tl.load(p, mask=readable, other=0).to(tl.float32)
        tg = tl.load(p + 1, mask=readable, other=0).to(tl.float32)
        tr = tl.load(p + 2, mask=readable, other=0).to(tl.float32)
        if KEEP:
            inside &= tl.load(keep + y * steps[1] + x, mask=readable, other=0) == 0
        if FEATHER:
            alpha = tl.minimum(tl.div_rn(distance.to(tl.float32) + 0.5, feather), 1.0)
            b = round_saturate(tb + alpha * (b - tb))
            g = round_saturate(tg + alpha * (g - tg))
            r = round_saturate(tr + alpha * (r - tr))
        b = tl.where(inside, b, tb)
        g = tl.where(inside, g, tg)
        r = tl.where(inside, r, tr)
    return b.to(tl.int32), g.to(tl.int32), r.to(tl.int32)


@triton.jit
def _store_pixel(to, pixel, mask):
    tl.store(to, pixel[0].to(tl.uint8), mask=mask)
    tl.store(to + 1, pixel[1].to(tl.uint8), mask=mask)
    tl.store(to + 2, pixel[2].to(tl.uint8), mask=mask)


def paste_blend_triton(
    mouth: Tensor,
    crops: Tensor,
    crop_index: Tensor,
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    out: Tensor,
    *,
    nv12: bool,
    max_box: tuple[int, int] | None = None,
    feather: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """As :func:`~gpupipe.kernels.paste_blend.paste_blend`, by a kernel; nothing is read back and nothing waits.

    ``mouth`` is float16, bfloat16, float32 or uint8, in any layout; ``crops`` and ``out`` are contiguous; rows of
    ``frames`` and of ``keep`` have no gaps.

    Raises:
        ValueError: memory that the kernel cannot address.
    """
    _, frame_height, frame_width, _ = frames.shape
    if frames.stride()[2:] != (3, 1):
        raise ValueError(f"frames have strides {frames.stride()}; expected the last two to be 3 and 1")
    if keep is not None and keep.stride(2) != 1:
        raise ValueError(f"keep has strides {keep.stride()}; expected the last to be 1")
    if not (crops.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"crops and out have strides {crops.stride()} and {out.stride()}; expected contiguous ones")
    samples = len(index)
    width, height = max_box or (frame_width, frame_height)
    tile_rows, tile_columns = TILE
    if INTERPRETED:  # its cost is per program
        tile_rows, tile_columns = triton.next_power_of_2(height // 2 + 1), triton.next_power_of_2(width // 2 + 1)
    extra = 1 if nv12 else 0  # a box that starts at an odd pixel touches a cell more
    tiles = triton.cdiv(width + extra, 2 * tile_columns)
    grid = (tiles * triton.cdiv(height + extra, 2 * tile_rows), samples)
    if samples:
        launch(
            _paste_blend_kernel,
            grid,
            mouth,
            crops,
            crop_index.contiguous(),
            frames,
            index.contiguous(),
            boxes.contiguous(),
            keep.view(torch.uint8) if keep is not None else None,
            out,
            *mouth.stride(),
            frames.stride(0),
            frames.stride(1),
            keep.stride(0) if keep is not None else 0,
            keep.stride(1) if keep is not None else 0,
            out.stride(0),
            frame_height,
            frame_width,
            tiles,
            float(feather),
            NV12=nv12,
            FEATHER=feather > 0,
            KEEP=keep is not None,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
        )
    return out
