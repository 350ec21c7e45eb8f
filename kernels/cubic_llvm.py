"""Cubic resizing on a CPU, written with LLVM: the arithmetic of :mod:`gpupipe.kernels.cubic`, in the same order.

A row of the result is made from four rows of the source, and then each of its pixels from four pixels of that. A pixel
is a vector of four floats, blue, green, red and anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir
from torch import Tensor

from gpupipe.kernels.common_llvm import Pointer, Value, Writer
from gpupipe.kernels.cubic import cubic_taps

CHANNELS = 4
"""Floats or bytes of a pixel, with the one that may be anything."""

PIXEL = ir.VectorType(ir.FloatType(), CHANNELS)
_BYTES, _INTEGERS = (ir.VectorType(ir.IntType(bits), CHANNELS) for bits in (8, 32))
_STORED = 3
"""Bytes of a pixel in memory."""


NARROWEST = 32
"""Width of the narrowest box that kernels take: they go over its rows in whole vectors."""


def wide_enough(boxes: Tensor) -> bool:
    """Whether kernels take all of these, (B, 4)."""
    return bool((boxes[:, 2] - boxes[:, 0] >= NARROWEST).all())


@functools.lru_cache(maxsize=1024)
def tables(source: int, target: int) -> tuple[Tensor, Tensor]:
    """:func:`~gpupipe.kernels.cubic.cubic_taps` as the kernels read them: int32 and float32 (target, 4)."""
    taps, weights = cubic_taps(source, target, torch.device("cpu"))
    return taps.to(torch.int32), weights


@dataclass(frozen=True)
class Taps:
    """Where :func:`tables` of one axis lie."""

    places: Pointer
    weights: Pointer

    def of(self, w: Writer, position: Value) -> list[tuple[Value, Pointer]]:
        """The source's places, and the weights, of a place of the result."""
        first = w.times(position, 4)
        return [(w.load_index(self.places, w.plus(first, k)), w.at(self.weights, first, k)) for k in range(4)]


def resize_row(
    w: Writer, taps: Taps, row: Value, source: Callable[[Value], Pointer], length: Value | int, target: Pointer
) -> None:
    """A row of the result, before its pixels are resized.

    Args:
        source: the pointer to a row of bytes.
        length: of such a row, at least a vector's lanes.
        target: of as many floats.
    """
    chosen = taps.of(w, row)
    rows, weights = [source(place) for place, _ in chosen], [w.broadcast(weight) for _, weight in chosen]
    with w.loop(0, length, w.lanes) as start:
        i = w.at_most(start, w.plus(length, -w.lanes))
        w.store(_weighted(w, [w.load_bytes(w.at(one, i)) for one in rows], weights), w.at(target, i))


def resized_pixel(w: Writer, taps: Taps, column: Value, row: Pointer, stride: int) -> Value:
    """A pixel of the result, in whole numbers from 0 to 255.

    Args:
        row: of :func:`resize_row`.
        stride: floats of a pixel there.
    """
    chosen = taps.of(w, column)
    pixels = [w.ir.load(w.at(row, w.times(place, stride)).place, align=4, typ=PIXEL) for place, _ in chosen]
    value = w.rounded(_weighted(w, pixels, [w.broadcast(weight, CHANNELS) for _, weight in chosen]))
    return w.clamped(value, 0, 255)


def load_pixel(w: Writer, pointer: Pointer) -> Value:
    """A pixel of three bytes."""
    kind = ir.VectorType(ir.IntType(8), _STORED)
    loaded = w.ir.load(pointer.place, align=1, typ=kind)
    return w.ir.uitofp(w.ir.zext(w.shuffled(loaded, loaded, [0, 1, 2, 2]), _INTEGERS), PIXEL)


def store_pixel(w: Writer, pixel: Value, pointer: Pointer, *, channels: int = CHANNELS) -> None:
    """A pixel in whole numbers, as four bytes or three."""
    stored = w.ir.trunc(w.ir.fptosi(pixel, _INTEGERS), _BYTES)
    if channels < CHANNELS:
        stored = w.shuffled(stored, stored, range(channels))
    w.ir.store(stored, pointer.place, align=1)


def _weighted(w: Writer, values: Sequence[Value], weights: Sequence[Value]) -> Value:
    total = w.ir.fmul(values[0], weights[0])
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = w.multiply_add(value, weight, total)
    return total
