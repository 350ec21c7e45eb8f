"""BGR → NV12 on a CPU, written with LLVM: what :func:`gpupipe.kernels.nv12.to_nv12` does, to the same bits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llvmlite import ir
from torch import Tensor

from gpupipe.kernels.common_llvm import Kernel, Processor, Value, Writer, this_processor
from gpupipe.kernels.nv12 import FRACTION_BITS, yuv_weights

_PIXELS = 32
"""Of a row, converted at a time, with those below them."""


def takes(frames: Tensor) -> bool:
    """Whether the kernel converts these frames."""
    return frames.is_contiguous() and frames.shape[2] >= _PIXELS


def to_nv12_llvm(frames: Tensor, nv12: Tensor) -> Tensor:
    """Convert frames that it :func:`takes` into uint8 (B, H·3/2, W), contiguous, which is returned."""
    height, width = frames.shape[1:3]
    kernel = _kernel(width, height)
    for frame, out in zip(frames, nv12, strict=True):
        kernel([frame, out])
    return nv12


@functools.lru_cache(maxsize=16)
def _kernel(width: int, height: int) -> Kernel:
    return Kernel(_Plan(width, height), None, this_processor())


@dataclass(frozen=True)
class _Plan:
    """The code."""

    width: int
    height: int
    maps: int = 2

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        w = Writer(processor, self.maps)
        frame, out = w.maps
        luma_weights, *chroma_weights = yuv_weights()
        with w.loop(0, self.height // 2) as row, w.loop(0, self.width, _PIXELS) as start:
            x = w.at_most(start, self.width - _PIXELS)  # the last ones once more, if the width is no multiple
            sums = None
            for below in range(2):
                first = w.plus(w.times(w.plus(w.times(row, 2), below), self.width), x)
                planes = _planes(w, w.byte_at(frame.place, w.times(first, 3)))
                _store(w, _weighted(w, planes, luma_weights, 16), w.byte_at(out.place, first))
                sums = planes if sums is None else [w.ir.add(a, b) for a, b in zip(sums, planes, strict=True)]
            assert sums is not None
            even, odd = (_every(w, sums, 2, first) for first in range(2))
            cells = [w.ir.add(a, b) for a, b in zip(even, odd, strict=True)]
            cb, cr = (_weighted(w, cells, weights, 128) for weights in chroma_weights)
            chroma = _shuffled(w, cb, cr, [i // 2 + i % 2 * (_PIXELS // 2) for i in range(_PIXELS)])
            _store(w, chroma, w.byte_at(out.place, w.plus(w.times(w.plus(row, self.height), self.width), x)))
        return w


def _integers(bits: int, number: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), number)


def _planes(w: Writer, pointer: Value) -> list[Value]:
    """Blue, green and red of a row's pixels, as 32-bit integers."""
    pixels = w.ir.load(pointer, align=1, typ=_integers(8, 3 * _PIXELS))
    return [w.ir.zext(plane, _integers(32, _PIXELS)) for (plane,) in (_every(w, [pixels], 3, c) for c in range(3))]


def _every(w: Writer, values: list[Value], step: int, first: int) -> list[Value]:
    """Of each vector every second or third element."""
    return [_shuffled(w, value, value, [*range(first, value.type.count, step)]) for value in values]


def _shuffled(w: Writer, a: Value, b: Value, places: list[int]) -> Value:
    """These elements of a and b, one after the other."""
    return w.ir.shuffle_vector(a, b, ir.Constant(_integers(32, len(places)), places))


def _weighted(w: Writer, planes: list[Value], weights: tuple[int, int, int], offset: int) -> Value:
    """``offset`` + the weighted sum of three planes, rounded half up."""
    kind = planes[0].type
    total = ir.Constant(kind, [(2 * offset + 1) << (FRACTION_BITS - 1)] * kind.count)
    for plane, weight in zip(planes, weights, strict=True):
        total = w.ir.add(total, w.ir.mul(plane, ir.Constant(kind, [weight] * kind.count)))
    return w.ir.ashr(total, ir.Constant(kind, [FRACTION_BITS] * kind.count))


def _store(w: Writer, values: Value, pointer: Value) -> None:
    """As bytes."""
    w.ir.store(w.ir.trunc(values, _integers(8, values.type.count)), pointer, align=1)
