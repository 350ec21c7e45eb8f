"""Levels of the U-Net on a CPU, a row at a time, written with LLVM.

Layer by layer, the largest maps go through memory several times: 128 channels of 320×320 are 52 MB, far more than a
core's caches. Here a row of a map is made when a row of the next map asks for it, and only as many are kept as a
depthwise convolution reads:

    low ── expand ── 2 rows ─ bilinear ─┐
                                        ├─ expand ── 3 rows ── depthwise, project ── 2 rows ─┐
    skip ───────────────────────────────┘                                                    │
                   ┌──────────────────────────────────────────────────────────────────────────┤
                   └ expand ── 3 rows ── depthwise, project ──────────────────────────────── + ── out, or head and mouth

They take half a megabyte at most, and stay in a core's second cache.

The plain references are the modules of :mod:`gpupipe.models.hoisted` that the levels are made from. Maps are of one
frame: (size, size, channels) of the processor's type; or (channels, size, size), the image, of its sums' type, and the
mouth, float32. What levels make for each other has its channels padded with zeros to whole vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gpupipe.kernels.common_llvm import Pointer, Processor, Value
from gpupipe.kernels.kernel_llvm import Kernel
from gpupipe.kernels.rows_llvm import (
    Constants,
    Depthwise,
    Expanded,
    Pixels,
    Pointwise,
    RowWriter,
    matrix_of,
)
from gpupipe.models.hoisted import HoistedUp, convolutions


@dataclass(frozen=True)
class Level:
    """A level, compiled. Its kernel takes the maps that it reads and then those that it makes, each contiguous.

    Attributes:
        shapes: of the maps that it makes.
    """

    kernel: Kernel
    shapes: tuple[tuple[int, int, int], ...]


def up_level(
    level: HoistedUp,
    size: int,
    *,
    processor: Processor,
    skip_padded: bool = True,
    head: nn.Conv2d | None = None,
) -> Level:
    """A level of the decoder. Its maps are low (size / 2), skip, and what it makes.

    Args:
        level: its batch norms are folded.
        processor: that runs it.
        skip_padded: the skip's channels are padded. The image's hidden ones are not.
        head: a 1×1 convolution of what the last level makes; its sigmoid, the mouth, is made in place of that.
    """
    constants = Constants(processor)
    places, shares = _upsampling(size)
    plan = _UpPlan(
        size,
        constants.pointwise(matrix_of(level.low), level.skip.bias),
        constants.pointwise(matrix_of(level.skip), None),
        constants.add(places),
        constants.add(shares),
        _tail(constants, convolutions(level.rest), head),
        skip_padded,
    )
    kernel = Kernel(plan, constants.joined(), processor)
    return Level(kernel, (plan.tail.shape(size, processor),))


def first_level(first_block: nn.Module, down: nn.Module, size: int, *, processor: Processor) -> Level:
    """The first block and the encoder's first level. Its maps are the image (2 · size), what the block makes of it, and
    what the level makes of that.

    Args:
        first_block: its expansion and depthwise convolution; the projection is folded into ``down``.
        down: two inverted residuals, the first with stride 2. All batch norms are folded.
        processor: that runs it.
    """
    constants = Constants(processor)
    expand_image, depthwise = convolutions(first_block)
    expand, *rest = convolutions(down)
    plan = _FirstPlan(
        size,
        constants.pointwise(matrix_of(expand_image), expand_image.bias, planar=True),
        constants.depthwise(depthwise),
        constants.pointwise(matrix_of(expand), expand.bias),
        _tail(constants, rest),
    )
    kernel = Kernel(plan, constants.joined(), processor)
    return Level(kernel, ((2 * size, 2 * size, depthwise.out_channels), plan.tail.shape(size, processor)))


def down_level(down: nn.Module, size: int, *, processor: Processor) -> Level:
    """A later level of the encoder. Its maps are what the level before makes (2 · size) and what it makes.

    Args:
        down: two inverted residuals, the first with stride 2. All batch norms are folded.
        processor: that runs it.
    """
    constants = Constants(processor)
    expand, *rest = convolutions(down)
    plan = _DownPlan(size, constants.pointwise(matrix_of(expand), expand.bias), _tail(constants, rest))
    return Level(Kernel(plan, constants.joined(), processor), (plan.tail.shape(size, processor),))


@dataclass(frozen=True)
class _Tail:
    """What follows a level's first expansion: x, and the second inverted residual, which adds x.

    Attributes:
        head: of a head H. In place of x + P d it makes H x + (H P) d: ``project_again`` is H P, its bias is in H's.
        head_channels: 0 without a head.
    """

    depthwise: Depthwise
    project: Pointwise
    expand: Pointwise
    depthwise_again: Depthwise
    project_again: Pointwise
    head: Pointwise | None
    head_channels: int

    def shape(self, size: int, processor: Processor) -> tuple[int, int, int]:
        """Of the map that the level makes, or of the mouth."""
        if self.head is not None:
            return self.head_channels, size, size
        return size, size, self.project.vectors * processor.lanes

    def write(self, w: RowWriter, expanded: Expanded, size: int, out: Pointer) -> None:
        """Write the rows of a level's map."""
        pixel = self.project.vectors * w.lanes
        row_at = w.kept(2, size * pixel, w.processor.dtype)
        need = w.on_demand(
            0, lambda row: w.convolve_and_project(expanded, row, self.depthwise, self.project, size, row_at(row))
        )
        x = Pixels(row_at, pixel, need=need)
        again = w.expanded(x, self.expand, size)
        sums = w.scratch(size * w.lanes) if self.head else None
        with w.loop(0, size) as row:
            begin = functools.partial(self._begin, w, x, row)
            target = w.at(out, w.times(row, size * pixel)) if sums is None else sums
            w.convolve_and_project(again, row, self.depthwise_again, self.project_again, size, target, begin)
            if sums is not None:
                self._write_mouth(w, sums, row, size, out)

    def _begin(self, w: RowWriter, x: Pixels, row: Value, first: Value, pixels: int) -> list[Value]:
        """x and the bias, or the head of both."""
        if self.head is not None:
            bias = w.load(w.constant(self.head.bias))
            return w.product(lambda: [bias] * pixels, pixels, self.head, w.reader(x.row(row), first, x.pixel))
        here, vectors = w.at(x.row(row), w.times(first, x.pixel)), self.project_again.vectors
        bias = w.loaded(w.constant(self.project_again.bias), vectors)
        return [w.add(value, bias[i % vectors]) for i, value in enumerate(w.loaded(here, pixels * vectors))]

    def _write_mouth(self, w: RowWriter, sums: Pointer, row: Value, size: int, out: Pointer) -> None:
        """The sigmoid of (size, lanes), of which the first few are channels, to (channels, size, size)."""
        with w.loop(0, size, w.lanes) as x:
            for channel in range(self.head_channels):
                values = w.gather(w.at(sums, w.times(x, w.lanes), channel), w.lanes)
                w.store(w.sigmoid(values), w.at(out.to(torch.float32), w.times(row, size), x, channel * size * size))


@dataclass(frozen=True)
class _UpPlan:
    """The code of :func:`up_level`.

    Attributes:
        places, shares: offsets of what :func:`_upsampling` returns.
    """

    size: int
    low: Pointwise
    skip: Pointwise
    places: int
    shares: int
    tail: _Tail
    skip_padded: bool
    maps: int = 3

    def write(self, processor: Processor) -> RowWriter:
        """Write the kernel."""
        w = RowWriter(processor, self.maps)
        low_map, skip_map, out = w.maps
        low = _map(w, low_map, self.size // 2, w.whole(self.low.inputs))
        skip = _map(w, skip_map, self.size, w.whole(self.skip.inputs) if self.skip_padded else self.skip.inputs)
        expanded = w.padded(self.skip.vectors, self.size, self._expansion(w, low, skip))
        self.tail.write(w, expanded, self.size, out)
        return w

    def _expansion(self, w: RowWriter, low: Pixels, skip: Pixels) -> Callable[[Value, Pointer, int], None]:
        """Writes how a row of the expanded map is made: the skip's share and the upsampled low's."""
        half, together = self.size // 2, self.skip.together
        plane = half * w.lanes
        low_row = w.kept(2, self.low.vectors * plane)
        mixed = w.scratch(together * plane)
        need = w.on_demand(0, lambda row: w.expand(low, row, self.low, half, low_row(row), plane, relu=False))

        def make(row: Value, target: Pointer, out_plane: int) -> None:
            above = self._place(w, row)
            below = w.plus(above, 1)
            need(below)
            share = w.broadcast(w.at(w.constant(self.shares), row))

            def mix_rows(group: Value) -> None:
                offset = w.times(group, together * plane)
                with w.loop(0, together * plane, w.lanes) as i:
                    a, b = (w.load(w.at(low_row(one), offset, i)) for one in (above, below))
                    w.store(w.mix(a, b, share), w.at(mixed, i))

            def mix_columns(x: Value, pixels: int) -> list[Value]:
                sums = []
                for column in (w.plus(x, p) for p in range(pixels)):
                    left = w.at(mixed, w.times(self._place(w, column), w.lanes))
                    column_share = w.broadcast(w.at(w.constant(self.shares), column))
                    for v in range(together):
                        here = w.at(left, v * plane)
                        sums.append(w.mix(w.load(here), w.load(w.at(here, w.lanes)), column_share))
                return sums

            w.expand(skip, row, self.skip, self.size, target, out_plane, begin_group=mix_rows, begin_tile=mix_columns)

        return make

    def _place(self, w: RowWriter, row_or_column: Value) -> Value:
        return w.load_index(w.constant(self.places), row_or_column)


@dataclass(frozen=True)
class _FirstPlan:
    """The code of :func:`first_level`."""

    size: int
    expand_image: Pointwise
    depthwise: Depthwise
    expand: Pointwise
    tail: _Tail
    maps: int = 3

    def write(self, processor: Processor) -> RowWriter:
        """Write the kernel."""
        w = RowWriter(processor, self.maps)
        image_map, hidden_map, out = w.maps
        size = 2 * self.size
        image = Pixels(lambda row: w.at(image_map.to(w.sums), w.times(row, size)), 1, size * size)
        hidden = self._hidden(w, image, hidden_map, size)
        self.tail.write(w, w.expanded(hidden, self.expand, size), self.size, out)
        return w

    def _hidden(self, w: RowWriter, image: Pixels, out: Pointer, size: int) -> Pixels:
        """What the first block makes."""
        expanded = w.expanded(image, self.expand_image, size)
        channels, pixels = self.depthwise.channels, w.convolved(size)
        hidden = _map(w, out, size, channels)

        def make(row: Value) -> None:
            expanded.need(w.plus(row, 1))
            for vector in range(self.depthwise.vectors):
                with w.loop(0, size, pixels) as x:
                    for p, value in enumerate(w.convolve(expanded, row, self.depthwise, vector, x, pixels)):
                        at = w.at(hidden.row(row), w.times(x, channels), p * channels + vector * w.lanes)
                        w.store(value, at, channels - vector * w.lanes)

        return replace(hidden, need=w.on_demand(0, make))


@dataclass(frozen=True)
class _DownPlan:
    """The code of :func:`down_level`."""

    size: int
    expand: Pointwise
    tail: _Tail
    maps: int = 2

    def write(self, processor: Processor) -> RowWriter:
        """Write the kernel."""
        w = RowWriter(processor, self.maps)
        source, out = w.maps
        size = 2 * self.size
        x = _map(w, source, size, w.whole(self.expand.inputs))
        self.tail.write(w, w.expanded(x, self.expand, size), self.size, out)
        return w


def _tail(constants: Constants, layers: Sequence[nn.Conv2d], head: nn.Conv2d | None = None) -> _Tail:
    depthwise, project, expand, depthwise_again, project_again = layers
    matrix, bias, of_x = matrix_of(project_again), project_again.bias, None
    if head is not None:
        assert bias is not None and head.bias is not None
        outer = matrix_of(head)
        of_x = constants.pointwise(outer, outer @ bias + head.bias)
        matrix, bias = outer @ matrix, None
    return _Tail(
        constants.depthwise(depthwise),
        constants.projection(matrix_of(project), project.bias),
        constants.pointwise(matrix_of(expand), expand.bias),
        constants.depthwise(depthwise_again),
        constants.projection(matrix, bias),
        of_x,
        0 if head is None else head.out_channels,
    )


def _map(w: RowWriter, base: Pointer, size: int, pixel: int) -> Pixels:
    """A map in memory, (size, size, pixel)."""
    return Pixels(lambda row: w.at(base, w.times(row, size * pixel)), pixel)


def _upsampling(size: int) -> tuple[Tensor, Tensor]:
    """Bilinear ×2 with aligned corners to ``size`` pixels: the first of the two between which each lies, and the share
    of the second; int32 and float32 (size,)."""
    half = size // 2
    source = np.float32((half - 1) / (size - 1)) * np.arange(size, dtype=np.float32)
    place = np.minimum(source.astype(np.int32), half - 2)
    return torch.from_numpy(place), torch.from_numpy(source - place.astype(np.float32))
