"""Cubic resizing on a CPU, written with LLVM: the arithmetic of :mod:`gpupipe.kernels.cubic`, in the same order.

A row of the source is resized across, each pixel from four of it; then a row of the result is made from four such rows.
A pixel is a vector of four floats, blue, green, red and anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


@dataclass(frozen=True)
class Source:
    """What is resized, in bytes.

    Attributes:
        row: the pointer to a row.
        length: bytes of a row, at least a vector's lanes.
        most: the largest that the length can be.
        stride: bytes of a pixel.
    """

    row: Callable[[Value], Pointer]
    length: Value | int
    most: int
    stride: int


class Rows:
    """The result's rows, made from the top down. Each of the source's is resized across once, when it is needed first,
    and the last four are kept.

    Args:
        down, across: the taps along either axis.
        width: of the result, in pixels.
        most: the largest that the width can be.
    """

    def __init__(self, w: Writer, source: Source, down: Taps, across: Taps, width: Value | int, most: int) -> None:
        self._source, self._down, self._across, self._width = source, down, across, width
        self._line = w.scratch(source.most + CHANNELS)
        self._floats = CHANNELS * most  # of a row that is kept
        self._kept = w.scratch(4 * self._floats)
        [self._next] = w.variables([w.index(0)])  # the source's row that has not been resized yet

    def make(self, w: Writer, row: Value, store: Callable[[Value, Value], None]) -> None:
        """Make the next row; ``store`` takes vectors of whole numbers from 0 to 255, and their place in floats."""
        chosen = self._down.of(w, row)
        start, stop = w.at_least(chosen[0][0], w.get(self._next)), w.plus(chosen[3][0], 1)
        with w.if_within(start, stop):
            with w.loop(start, stop) as y:
                self._resize_across(w, y)
            w.set(self._next, stop)
        rows, weights = [self._row(w, place) for place, _ in chosen], [w.broadcast(weight) for _, weight in chosen]
        length = w.times(self._width, CHANNELS)
        with w.loop(0, length, w.lanes) as start:
            i = w.at_most(start, w.plus(length, -w.lanes))
            values = [w.load(w.at(one, i)) for one in rows]
            upper, lower = (
                w.multiply_add(values[k], weights[k], w.ir.fmul(values[k + 1], weights[k + 1])) for k in (0, 2)
            )
            store(w.clamped(w.rounded(w.add(upper, lower)), 0, 255), i)

    def _row(self, w: Writer, y: Value) -> Pointer:
        """Where a row of the source is kept."""
        return w.at(self._kept, w.times(w.modulo(y, 4), self._floats))

    def _resize_across(self, w: Writer, y: Value) -> None:
        row, kept = self._source.row(y), self._row(w, y)
        with w.loop(0, self._source.length, w.lanes) as start:
            i = w.at_most(start, w.plus(self._source.length, -w.lanes))
            w.store(w.load_bytes(w.at(row, i)), w.at(self._line, i))
        with w.loop(0, self._width) as column:
            total = None
            for place, weight in self._across.of(w, column):
                at = w.at(self._line, w.times(place, self._source.stride))
                pixel, share = w.ir.load(at.place, align=4, typ=PIXEL), w.broadcast(weight, CHANNELS)
                total = w.ir.fmul(pixel, share) if total is None else w.multiply_add(pixel, share, total)
            w.ir.store(total, w.at(kept, w.times(column, CHANNELS)).place, align=4)


def store_bytes(w: Writer, value: Value, pointer: Pointer) -> None:
    """A vector of whole numbers, as bytes."""
    integers, bytes_ = (ir.VectorType(ir.IntType(bits), w.lanes) for bits in (32, 8))
    w.ir.store(w.ir.trunc(w.ir.fptosi(value, integers), bytes_), pointer.place, align=1)


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
