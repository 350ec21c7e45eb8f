"""BGR ↔ NV12 on a CPU, written with LLVM: what :mod:`gpupipe.kernels.nv12` does in plain torch, to the same bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir
from torch import Tensor

from gpupipe.kernels.common_llvm import Pointer, Processor, Value, Writer, this_processor
from gpupipe.kernels.kernel_llvm import Kernel
from gpupipe.kernels.nv12 import FRACTION_BITS, INVERSE_BITS, bgr_weights, yuv_weights

_PIXELS = 32
"""Of a row, converted at a time, with those below them."""


def takes(frames: Tensor) -> bool:
    """Whether the kernels convert these frames, BGR or NV12."""
    return frames.is_contiguous() and frames.shape[2] >= _PIXELS


def to_nv12_llvm(frames: Tensor, nv12: Tensor) -> Tensor:
    """Convert frames that it :func:`takes` into uint8 (B, H·3/2, W), contiguous, which is returned."""
    return _converted(_ToNv12(frames.shape[2], frames.shape[1]), frames, nv12)


def from_nv12_llvm(frames: Tensor, bgr: Tensor) -> Tensor:
    """Convert frames that it :func:`takes` into uint8 (B, H, W, 3), contiguous, which is returned."""
    return _converted(_FromNv12(bgr.shape[2], bgr.shape[1]), frames, bgr)


def _converted(plan: _ToNv12 | _FromNv12, frames: Tensor, made: Tensor) -> Tensor:
    kernel = _kernel(plan)
    for frame, out in zip(frames, made, strict=True):
        kernel([frame, out])
    return made


@functools.lru_cache(maxsize=16)
def _kernel(plan: _ToNv12 | _FromNv12) -> Kernel:
    return Kernel(plan, None, this_processor())


@dataclass(frozen=True)
class _ToNv12:
    """The code of :func:`to_nv12_llvm`."""

    width: int
    height: int
    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        w = Writer(processor, self.maps)
        frame, out = (one.to(torch.uint8) for one in w.maps)
        with w.loop(0, self.height // 2) as row:
            rows = [w.at(frame, w.times(row, 6 * self.width), below * 3 * self.width) for below in range(2)]
            write_cells(w, rows, 3, (self.width, self.height), row, w.index(0), w.index(self.width), out)
        return w


@dataclass(frozen=True)
class _FromNv12:
    """The code of :func:`from_nv12_llvm`."""

    width: int
    height: int
    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        w = Writer(processor, self.maps)
        frame, out = (one.to(torch.uint8) for one in w.maps)
        pairs = [i // 2 * 2 for i in range(_PIXELS)]
        with w.loop(0, self.height // 2) as row, w.loop(0, self.width, _PIXELS) as start:
            x = w.at_most(start, self.width - _PIXELS)
            chroma = _load(w, w.at(frame, w.times(w.plus(row, self.height), self.width), x))
            cb, cr = (w.shuffled(chroma, chroma, [first + i for i in pairs]) for first in range(2))
            cb, cr = _plus(w, cb, -128), _plus(w, cr, -128)
            for below in range(2):
                first = w.plus(w.times(w.plus(w.times(row, 2), below), self.width), x)
                luma = _plus(w, _load(w, w.at(frame, first)), -16)
                sums = (_weighted(w, [luma, cb, cr], weights, 0, INVERSE_BITS) for weights in bgr_weights())
                blue, green, red = (_clamped(w, one) for one in sums)
                blue_green = w.shuffled(blue, green, range(2 * _PIXELS))
                red = w.shuffled(red, red, [*range(_PIXELS)] * 2)
                places = [channel * _PIXELS + pixel for pixel in range(_PIXELS) for channel in range(3)]
                _store(w, w.shuffled(blue_green, red, places), w.at(out, w.times(first, 3)))
        return w


def write_cells(
    w: Writer,
    rows: Sequence[Pointer],
    channels: int,
    size: tuple[int, int],
    row: Value,
    left: Value,
    right: Value,
    out: Pointer,
) -> None:
    """A row of 2×2 cells, from column ``left`` to ``right``, both even and at least 32 apart.

    Args:
        rows: where two rows of pixels begin, of so many bytes each, blue, green and red first.
        size: width and height of the frame.
        row: the number of the row of cells.
        out: the frame in NV12.
    """
    width, height = size
    luma_weights, *chroma_weights = yuv_weights()
    with w.loop(left, right, _PIXELS) as start:
        x = w.at_most(start, w.plus(right, -_PIXELS))  # the last ones once more, if it is no multiple
        sums = None
        for below, source in enumerate(rows):
            planes = _planes(w, w.at(source, w.times(x, channels)), channels)
            luma = w.at(out, w.times(w.plus(w.times(row, 2), below), width), x)
            _store(w, _weighted(w, planes, luma_weights, 16, FRACTION_BITS), luma)
            sums = planes if sums is None else [w.ir.add(a, b) for a, b in zip(sums, planes, strict=True)]
        assert sums is not None
        even, odd = (_every(w, sums, 2, first) for first in range(2))
        cells = [w.ir.add(a, b) for a, b in zip(even, odd, strict=True)]
        cb, cr = (_weighted(w, cells, weights, 128, FRACTION_BITS) for weights in chroma_weights)
        chroma = w.shuffled(cb, cr, [i // 2 + i % 2 * (_PIXELS // 2) for i in range(_PIXELS)])
        _store(w, chroma, w.at(out, w.times(w.plus(row, height), width), x))


def _integers(bits: int, number: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), number)


def _planes(w: Writer, pointer: Pointer, channels: int) -> list[Value]:
    """Blue, green and red of a row's pixels, as 32-bit integers."""
    pixels = w.ir.load(pointer.place, align=1, typ=_integers(8, channels * _PIXELS))
    planes = (_every(w, [pixels], channels, channel) for channel in range(3))
    return [w.ir.zext(plane, _integers(32, _PIXELS)) for (plane,) in planes]


def _every(w: Writer, values: list[Value], step: int, first: int) -> list[Value]:
    """Of each vector every second or third element."""
    return [w.shuffled(value, value, range(first, value.type.count, step)) for value in values]


def _weighted(w: Writer, planes: list[Value], weights: tuple[int, int, int], offset: int, bits: int) -> Value:
    """``offset`` + the weighted sum of three planes, rounded half up; weights have so many bits after the point."""
    kind = planes[0].type
    total = w.splat((2 * offset + 1) << (bits - 1), kind)
    for plane, weight in zip(planes, weights, strict=True):
        total = w.ir.add(total, w.ir.mul(plane, w.splat(weight, kind)))
    return w.ir.ashr(total, w.splat(bits, kind))


def _load(w: Writer, pointer: Pointer) -> Value:
    """Bytes, as 32-bit integers."""
    return w.ir.zext(w.ir.load(pointer.place, align=1, typ=_integers(8, _PIXELS)), _integers(32, _PIXELS))


def _plus(w: Writer, values: Value, constant: int) -> Value:
    return w.ir.add(values, w.splat(constant, values.type))


def _clamped(w: Writer, values: Value) -> Value:
    """From 0 to 255."""
    for bound, beyond in ((0, "<"), (255, ">")):
        limit = w.splat(bound, values.type)
        values = w.ir.select(w.ir.icmp_signed(beyond, values, limit), limit, values)
    return values


def _store(w: Writer, values: Value, pointer: Pointer) -> None:
    """As bytes."""
    w.ir.store(w.ir.trunc(values, _integers(8, values.type.count)), pointer.place, align=1)
