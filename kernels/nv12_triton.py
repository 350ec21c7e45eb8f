"""The Triton kernels of :mod:`gpupipe.kernels.nv12`, and the arithmetic that paste_blend shares with them.

A thread converts 16×2 pixels, either way. A row of 16 is 48 bytes, 12 words, read or written with three instructions;
its luma, and the chroma of both rows, are 16 bytes each. Frames whose width is not a multiple of 16, or that are not
contiguous and aligned to 16 bytes, take one 2×2 cell a thread, byte by byte.

    word    0        1        2       …
    byte  b g r b  g r b g  r b g r  …        pixel p's channel c is byte 3·p + c
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED, join4
from gpupipe.kernels.launch_triton import launch
from gpupipe.kernels.nv12 import FRACTION_BITS, INVERSE_BITS, bgr_weights, yuv_weights

_SHIFT = tl.constexpr(FRACTION_BITS)
_LUMA, _CB, _CR = (tl.constexpr(row) for row in yuv_weights())
_LUMA_OFFSET = tl.constexpr((2 * 16 + 1) << (FRACTION_BITS - 1))  # and ½, to round
_CHROMA_OFFSET = tl.constexpr((2 * 128 + 1) << (FRACTION_BITS - 1))
_INVERSE_SHIFT = tl.constexpr(INVERSE_BITS)
_INVERSE_HALF = tl.constexpr(1 << (INVERSE_BITS - 1))
_INVERSE = tl.constexpr(bgr_weights())

BLOCK = 256 if INTERPRETED else 128
"""Threads' worth of work a program; the interpreter's cost is per program."""


@triton.jit
def _luma(b, g, r):
    """int32 0 … 255 → int32 16 … 235."""
    return (b * _LUMA[0] + g * _LUMA[1] + r * _LUMA[2] + _LUMA_OFFSET) >> _SHIFT


@triton.jit
def _chroma_pair(b, g, r):
    """Sums over the four pixels of a cell, int32 → Cb and Cr, int32 16 … 240."""
    cb = b * _CB[0] + g * _CB[1] + r * _CB[2] + _CHROMA_OFFSET
    cr = b * _CR[0] + g * _CR[1] + r * _CR[2] + _CHROMA_OFFSET
    return cb >> _SHIFT, cr >> _SHIFT


@triton.jit
def store_cell(to, height, width, y, x, upper_left, upper_right, lower_left, lower_right, active):
    """Write cells of the NV12 frame at ``to`` from their four pixels, each blue, green, red, int32 0 … 255."""
    b0, g0, r0 = upper_left
    b1, g1, r1 = upper_right
    b2, g2, r2 = lower_left
    b3, g3, r3 = lower_right
    two = tl.arange(0, 2)[None, :]
    mask = active[:, None]
    line = to + (y * width + x)[:, None] + two
    tl.store(line, tl.join(_luma(b0, g0, r0), _luma(b1, g1, r1)).to(tl.uint8), mask=mask)
    tl.store(line + width, tl.join(_luma(b2, g2, r2), _luma(b3, g3, r3)).to(tl.uint8), mask=mask)
    cb, cr = _chroma_pair(b0 + b1 + b2 + b3, g0 + g1 + g2 + g3, r0 + r1 + r2 + r3)
    tl.store(to + ((height + y // 2) * width + x)[:, None] + two, tl.join(cb, cr).to(tl.uint8), mask=mask)


@triton.jit
def _color(y, cb, cr, CHANNEL: tl.constexpr):
    """Blue, green or red of Y, Cb and Cr as they are stored; int32, rounded half up and saturated."""
    total = (y - 16) * _INVERSE[CHANNEL][0] + (cb - 128) * _INVERSE[CHANNEL][1] + (cr - 128) * _INVERSE[CHANNEL][2]
    return tl.minimum(tl.maximum((total + _INVERSE_HALF) >> _INVERSE_SHIFT, 0), 255)


# ── 16×2 pixels a thread ──────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _load4(words):
    """16 bytes at each pointer, as four words."""
    four = tl.load(words[:, None] + tl.arange(0, 4)[None, :])
    even, odd = tl.split(four.reshape(words.shape[0], 2, 2))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _store4(words, a, b, c, d, mask):
    tl.store(words[:, None] + tl.arange(0, 4)[None, :], join4(a, b, c, d), mask=mask[:, None])


@triton.jit
def _byte(words, N: tl.constexpr):
    """Byte ``N`` of a tuple of words, int32."""
    return ((words[N // 4] >> (N % 4 * 8)) & 255).to(tl.int32)


@triton.jit
def _word(a, b, c, d):
    """Four int32 in 0 … 255 as a word."""
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def _luma_word(words, P: tl.constexpr):
    """Luma of pixels P … P+3 of a row of 16."""
    return _word(
        _luma(_byte(words, 3 * P), _byte(words, 3 * P + 1), _byte(words, 3 * P + 2)),
        _luma(_byte(words, 3 * P + 3), _byte(words, 3 * P + 4), _byte(words, 3 * P + 5)),
        _luma(_byte(words, 3 * P + 6), _byte(words, 3 * P + 7), _byte(words, 3 * P + 8)),
        _luma(_byte(words, 3 * P + 9), _byte(words, 3 * P + 10), _byte(words, 3 * P + 11)),
    )


@triton.jit
def _cell_sum(upper, lower, N: tl.constexpr):
    """Byte ``N`` and its neighbours to the right, below, and below to the right."""
    return _byte(upper, N) + _byte(upper, N + 3) + _byte(lower, N) + _byte(lower, N + 3)


@triton.jit
def _chroma_word(upper, lower, P: tl.constexpr):
    """Cb, Cr, Cb, Cr of the cells at pixels P and P + 2."""
    cb0, cr0 = _chroma_pair(
        _cell_sum(upper, lower, 3 * P),
        _cell_sum(upper, lower, 3 * P + 1),
        _cell_sum(upper, lower, 3 * P + 2),
    )
    cb1, cr1 = _chroma_pair(
        _cell_sum(upper, lower, 3 * P + 6),
        _cell_sum(upper, lower, 3 * P + 7),
        _cell_sum(upper, lower, 3 * P + 8),
    )
    return _word(cb0, cr0, cb1, cr1)


@triton.jit
def _piece(height, across, BLOCK: tl.constexpr):
    """A thread's pair of rows, its 16 columns, and whether they exist; if not, it reads the last ones again."""
    wanted = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = wanted < height // 2 * across
    piece = tl.minimum(wanted, height // 2 * across - 1)
    return piece // across, piece % across, active


@triton.jit
def _to_nv12_wide_kernel(frames, out, height, width, BLOCK: tl.constexpr):
    """``frames`` and ``out`` are words."""
    frame = tl.program_id(1).to(tl.int64)
    across = width // 16
    row, column, active = _piece(height, across, BLOCK)
    pixels = frames + frame * (height * across * 12)
    above = pixels + (row * 2 * across + column) * 12
    below = above + across * 12
    upper = _load4(above) + _load4(above + 4) + _load4(above + 8)
    lower = _load4(below) + _load4(below + 4) + _load4(below + 8)
    to = out + frame * (height * across * 6)
    line = to + (row * 2 * across + column) * 4
    _store4(line, _luma_word(upper, 0), _luma_word(upper, 4), _luma_word(upper, 8), _luma_word(upper, 12), active)
    _store4(
        line + across * 4,
        _luma_word(lower, 0),
        _luma_word(lower, 4),
        _luma_word(lower, 8),
        _luma_word(lower, 12),
        active,
    )
    _store4(
        to + ((height + row) * across + column) * 4,
        _chroma_word(upper, lower, 0),
        _chroma_word(upper, lower, 4),
        _chroma_word(upper, lower, 8),
        _chroma_word(upper, lower, 12),
        active,
    )


@triton.jit
def _pixel_byte(line, pairs, N: tl.constexpr):
    """Byte ``N`` of a row of 16 pixels, from the words of its luma and its chroma."""
    P: tl.constexpr = N // 3
    return _color(_byte(line, P), _byte(pairs, P // 2 * 2), _byte(pairs, P // 2 * 2 + 1), N % 3)


@triton.jit
def _pixel_word(line, pairs, N: tl.constexpr):
    return _word(
        _pixel_byte(line, pairs, N),
        _pixel_byte(line, pairs, N + 1),
        _pixel_byte(line, pairs, N + 2),
        _pixel_byte(line, pairs, N + 3),
    )


@triton.jit
def _from_nv12_wide_kernel(frames, out, height, width, BLOCK: tl.constexpr):
    """The reverse of :func:`_to_nv12_wide_kernel`."""
    frame = tl.program_id(1).to(tl.int64)
    across = width // 16
    row, column, active = _piece(height, across, BLOCK)
    planes = frames + frame * (height * across * 6)
    pairs = _load4(planes + ((height + row) * across + column) * 4)
    for i in tl.static_range(2):
        line = _load4(planes + ((row * 2 + i) * across + column) * 4)
        to = out + frame * (height * across * 12) + ((row * 2 + i) * across + column) * 12
        for third in tl.static_range(3):
            _store4(
                to + third * 4,
                _pixel_word(line, pairs, third * 16),
                _pixel_word(line, pairs, third * 16 + 4),
                _pixel_word(line, pairs, third * 16 + 8),
                _pixel_word(line, pairs, third * 16 + 12),
                active,
            )


# ── one 2×2 cell a thread ─────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _cell(height, width, BLOCK: tl.constexpr):
    """The upper left pixel of a thread's cell, and whether there is one."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = cell < height // 2 * (width // 2)
    return cell // (width // 2) * 2, cell % (width // 2) * 2, active


@triton.jit
def _load_pixel(p, mask):
    b = tl.load(p, mask=mask, other=0).to(tl.int32)
    g = tl.load(p + 1, mask=mask, other=0).to(tl.int32)
    r = tl.load(p + 2, mask=mask, other=0).to(tl.int32)
    return b, g, r


@triton.jit
def _to_nv12_cell_kernel(frames, out, frame_stride, row_stride, height, width, BLOCK: tl.constexpr):
    frame = tl.program_id(1).to(tl.int64)
    y, x, active = _cell(height, width, BLOCK)
    p = frames + frame * frame_stride + y * row_stride + x * 3
    upper_left = _load_pixel(p, active)
    upper_right = _load_pixel(p + 3, active)
    lower_left = _load_pixel(p + row_stride, active)
    lower_right = _load_pixel(p + row_stride + 3, active)
    to = out + frame * (height // 2 * 3 * width)
    store_cell(to, height, width, y, x, upper_left, upper_right, lower_left, lower_right, active)


@triton.jit
def _from_nv12_cell_kernel(frames, out, frame_stride, row_stride, height, width, BLOCK: tl.constexpr):
    frame = tl.program_id(1).to(tl.int64)
    y, x, active = _cell(height, width, BLOCK)
    planes = frames + frame * frame_stride
    pair = planes + (height + y // 2) * row_stride + x
    cb = tl.load(pair, mask=active, other=0).to(tl.int32)
    cr = tl.load(pair + 1, mask=active, other=0).to(tl.int32)
    for i in tl.static_range(4):
        py = y + i // 2
        px = x + i % 2
        value = tl.load(planes + py * row_stride + px, mask=active, other=0).to(tl.int32)
        to = out + frame * (height * width * 3) + (py * width + px) * 3
        for channel in tl.static_range(3):
            tl.store(to + channel, _color(value, cb, cr, channel).to(tl.uint8), mask=active)


# ── launchers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def to_nv12_triton(frames: Tensor) -> Tensor:
    """As :func:`gpupipe.kernels.nv12.to_nv12`, by a kernel; nothing is read back and nothing waits."""
    samples, height, width, _ = frames.shape
    out = frames.new_empty(samples, height // 2 * 3, width)
    _launch(_to_nv12_wide_kernel, _to_nv12_cell_kernel, frames, out, height)
    return out


def from_nv12_triton(frames: Tensor) -> Tensor:
    """As :func:`gpupipe.kernels.nv12.from_nv12`, by a kernel; nothing is read back and nothing waits."""
    samples, rows, width = frames.shape
    height = rows // 3 * 2
    out = frames.new_empty(samples, height, width, 3)
    _launch(_from_nv12_wide_kernel, _from_nv12_cell_kernel, frames, out, height)
    return out


def _launch(wide_kernel: Any, cell_kernel: Any, frames: Tensor, out: Tensor, height: int) -> None:
    """Convert by ``wide_kernel`` where frames can be read 16 bytes at a time, else by ``cell_kernel``."""
    if not out.numel():
        return
    samples, _, width = frames.shape[:3]
    if vectorizable(frames):
        grid = (triton.cdiv(height // 2 * (width // 16), BLOCK), samples)
        launch(wide_kernel, grid, _as_words(frames), _as_words(out), height, width, BLOCK=BLOCK)
        return
    if not frames[0, 0].is_contiguous():
        frames = frames.contiguous()
    grid = (triton.cdiv(height // 2 * (width // 2), BLOCK), samples)
    launch(cell_kernel, grid, frames, out, frames.stride(0), frames.stride(1), height, width, BLOCK=BLOCK)


def vectorizable(frames: Tensor) -> bool:
    """Whether frames can be read 16 bytes at a time."""
    return frames.shape[2] % 16 == 0 and frames.is_contiguous() and frames.data_ptr() % 16 == 0


def _as_words(bytes_: Tensor) -> Tensor:
    return bytes_.view(-1).view(torch.int32)
