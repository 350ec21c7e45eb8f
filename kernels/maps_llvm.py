"""The deepest layers of the U-Net on a CPU, a whole map at a time, written with LLVM.

Where maps are small and channels many, it is the weights that fit no cache. So each layer goes through its map once for
every group of channels that it makes: their weights stay in the second cache meanwhile, and are read from memory once.

The plain references are the modules of :mod:`gpupipe.models.hoisted` that they are made from. Maps are of one frame:
(height, width, channels), with channels padded with zeros to whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gpupipe.kernels.common_llvm import Pointer, Processor, Value
from gpupipe.kernels.kernel_llvm import Kernel
from gpupipe.kernels.levels_llvm import Level
from gpupipe.kernels.rows_llvm import (
    Constants,
    Depthwise,
    Expanded,
    Pointwise,
    RowWriter,
    largest_divisor,
    matrix_of,
)
from gpupipe.models.hoisted import SpeechHalf, TemplateHalf, convolutions
from gpupipe.models.unet328 import InvertedResidual

_BLOCK = 128
"""Channels whose products are summed in registers before they are added to what lies in memory. In float16 longer sums
are less exact, and shorter ones take more time."""


def template_depths(template: TemplateHalf, *, processor: Processor) -> Level:
    """down5 and x6's share of the bottleneck. Its maps are x5 and ``bottleneck``.

    Args:
        template: its batch norms are folded.
        processor: that runs it.
    """
    constants = Constants(processor)
    share = template.bottleneck
    layers: list[Layer] = [
        *_residuals(constants, template.down5),
        Convolution(constants.pointwise(matrix_of(share), share.bias)),
    ]
    return _level(layers, (20, 20), convolutions(template.down5)[0].in_channels, constants, processor)


def speech_depths(speech: SpeechHalf, *, processor: Processor) -> Level:
    """The audio branch and the bottleneck. Its maps are the window of speech features, ``bottleneck``, and what up1
    reads.

    Args:
        speech: its batch norms are folded.
        processor: that runs it.
    """
    constants = Constants(processor)
    audio = speech.audio_model
    layers: list[Layer] = [
        *_residuals(constants, audio.conv1, audio.conv2),
        _convolution(constants, audio.conv3),
        *_residuals(constants, audio.conv4),
        _convolution(constants, audio.conv5),
        *_residuals(constants, audio.conv6, audio.conv7),
        _residual(constants, [speech.audio_expand, *convolutions(speech.fuse[:-2])], given=True),
        *_residuals(constants, speech.fuse[-2:]),
    ]
    channels, height, width = speech.audio_shape
    return _level(layers, (height, width), channels, constants, processor)


@dataclass(frozen=True)
class Convolution:
    """A convolution, taps × taps, of a map with a border of ``padding`` zeros. The matrix's inputs are (taps, taps,
    channels)."""

    weights: Pointwise
    taps: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: int = 0
    relu: bool = False

    @property
    def vectors(self) -> int:
        """Of a pixel that it makes."""
        return self.weights.vectors

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What it makes of a map so large."""
        height, width = (one + 2 * self.padding - self.taps for one in (height, width))
        return height // self.stride[0] + 1, width // self.stride[1] + 1


@dataclass(frozen=True)
class Residual:
    """An inverted residual.

    Attributes:
        add: what it makes is added to its input.
        given: its expansion is added to a map that the kernel takes.
    """

    expand: Pointwise
    depthwise: Depthwise
    project: Pointwise
    add: bool = False
    given: bool = False

    @property
    def vectors(self) -> int:
        """Of a pixel that it makes."""
        return self.project.vectors

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What it makes of a map so large."""
        return height // self.depthwise.stride, width // self.depthwise.stride


Layer = Convolution | Residual


@dataclass(frozen=True)
class Grid:
    """A map in memory: (height, width, pixel), within a border.

    Attributes:
        base: its first pixel, or the border's.
        pixel: floats of a pixel.
        border: how many pixels of zeros there are on each side.
    """

    base: Pointer
    height: int
    width: int
    pixel: int
    border: int = 0


@dataclass(frozen=True)
class Places:
    """Where a product is stored.

    Attributes:
        at: the pointer to a group of vectors of a pixel, given the group, the row and the column.
        pixel, vector: how far apart neighbours are, in floats.
        dtype: of these.
    """

    at: Callable[[Value, Value, Value], Pointer]
    pixel: int
    vector: int
    dtype: torch.dtype


class MapWriter(RowWriter):
    """Writes stages that make a whole map."""

    def grid(self, height: int, width: int, vectors: int, border: int = 0) -> Grid:
        """A map in scratch memory, with nothing in it yet but its border."""
        pixel = vectors * self.lanes
        floats = (height + 2 * border) * (width + 2 * border) * pixel
        base, zero = self.scratch(floats, self.processor.dtype), self.splat(0.0)
        if border:
            with self.loop(0, floats, self.lanes) as i:
                self.store(zero, self.at(base, i))
        return Grid(base, height, width, pixel, border)

    def pixel_at(self, grid: Grid, row: Value | int, x: Value | int) -> Pointer:
        """The pointer to a pixel. Those of the border have numbers below 0, or not below the size."""
        line = (grid.width + 2 * grid.border) * grid.pixel
        return self.at(grid.base, grid.border * (line + grid.pixel), self.times(row, line), self.times(x, grid.pixel))

    def places(self, grid: Grid, together: int) -> Places:
        """Where a product is stored in a map, so many vectors at once."""
        return Places(
            lambda group, row, x: self.at(self.pixel_at(grid, row, x), self.times(group, together * self.lanes)),
            grid.pixel,
            self.lanes,
            grid.base.dtype,
        )

    def convolution(self, source: Grid, layer: Convolution, target: Grid) -> None:
        """A convolution."""
        places = self.places(target, layer.weights.together)
        self._convolve(source, layer, target.height, target.width, places)

    def residual(self, source: Grid, layer: Residual, target: Grid, given: Pointer | None) -> None:
        """An inverted residual."""
        height, width, added = source.height, source.width, None
        if layer.given:
            assert given is not None
            added = Grid(given, height, width, layer.expand.vectors * self.lanes)
        with self.reused_scratch():
            expanded, places = self._planes(height, width, layer.expand)
            self._convolve(source, Convolution(layer.expand, relu=True), height, width, places, added)
            deep = self.grid(target.height, target.width, layer.depthwise.vectors)
            pixels = self.convolved(deep.width)
            with (
                self.loop(0, layer.depthwise.vectors) as vector,
                self.loop(0, deep.height) as row,
                self.loop(0, deep.width, pixels) as x,
            ):
                here = self.at(self.pixel_at(deep, row, x), self.times(vector, self.lanes))
                for p, value in enumerate(self.convolve(expanded, row, layer.depthwise, vector, x, pixels)):
                    self.store(value, self.at(here, p * deep.pixel))
            places = self.places(target, layer.project.together)
            added = source if layer.add else None
            self._convolve(deep, Convolution(layer.project), deep.height, deep.width, places, added)

    def _planes(self, height: int, width: int, weights: Pointwise) -> tuple[Expanded, Places]:
        """An expanded map in scratch memory, with nothing in it yet but its border; and where it is stored."""
        line = (width + 2) * self.lanes
        plane = (height + 2) * line
        base, zero = self.scratch(weights.vectors * plane), self.splat(0.0)
        with self.loop(0, weights.vectors * plane, plane) as vector:
            with self.loop(0, line, self.lanes) as x:
                for border in (0, plane - line):
                    self.store(zero, self.at(base, vector, x, border))
            with self.loop(line, plane - line, line) as y:
                for border in (0, line - self.lanes):
                    self.store(zero, self.at(base, vector, y, border))

        def row_at(row: Value) -> Pointer:
            return self.at(base, line + self.lanes, self.times(row, line))

        def place(group: Value, row: Value, x: Value) -> Pointer:
            return self.at(row_at(row), self.times(group, weights.together * plane), self.times(x, self.lanes))

        return Expanded(row_at, plane, need=lambda row: None), Places(place, self.lanes, plane, base.dtype)

    def _unrounded(self, height: int, width: int, together: int) -> Places:
        """Scratch memory for sums of one group of vectors at a time."""
        pixel = together * self.lanes
        base = self.scratch(height * width * pixel)

        def place(group: Value, row: Value, x: Value) -> Pointer:
            return self.at(base, self.times(self.plus(self.times(row, width), x), pixel))

        return Places(place, pixel, self.lanes, base.dtype)

    def _convolve(
        self, source: Grid, layer: Convolution, height: int, width: int, target: Places, added: Grid | None = None
    ) -> None:
        """A convolution, to (height, width), and what is added to it."""
        weights = layer.weights
        together, channels = weights.together, weights.inputs // layer.taps**2
        depth = channels if channels <= _BLOCK else 2 * largest_divisor(channels // 2, _BLOCK // 2)
        blocks, pixels = weights.inputs // depth, self.tile(width, weights.sums)
        unfinished = target
        if blocks > 1 and target.dtype != self.sums:
            unfinished = self._unrounded(height, width, together)

        def tile(places: Places, group: Value, row: Value, x: Value) -> list[Pointer]:
            here = places.at(group, row, x)
            return [self.at(here, p * places.pixel + v * places.vector) for p in range(pixels) for v in range(together)]

        def begin(group: Value, row: Value, x: Value) -> list[Value]:
            offset = self.times(group, together * self.lanes)
            bias = self.loaded(self.at(self.constant(weights.bias), offset), together) * pixels
            if added is None:
                return bias
            before = tile(self.places(added, together), group, row, x)
            return [self.add(one, self.load(place)) for one, place in zip(bias, before, strict=True)]

        def write_block(group: Value, block: Value, *, first: bool, last: bool) -> None:
            tap, part = self.divided(block, channels // depth)
            dy, dx = (self.plus(one, -layer.padding) for one in self.divided(tap, layer.taps))
            with self.loop(0, height) as row, self.loop(0, width, pixels) as x:
                y_read = self.plus(self.times(row, layer.stride[0]), dy)
                x_read = self.plus(self.times(x, layer.stride[1]), dx)
                here = self.at(self.pixel_at(source, y_read, x_read), self.times(part, depth))
                before, after = tile(unfinished, group, row, x), tile(target if last else unfinished, group, row, x)
                sums = self.product(
                    lambda: begin(group, row, x) if first else [self.load(place) for place in before],
                    pixels,
                    weights,
                    lambda k, p: self.at(here, k, p * layer.stride[1] * source.pixel),
                    group,
                    self.times(block, depth),
                    depth,
                    self.plus(self.times(row, width // pixels), self.divided(x, pixels)[0]),
                )
                for value, place in zip(sums, after, strict=True):
                    self.store(self.relu(value) if layer.relu and last else value, place)

        with self.loop(0, weights.vectors // together) as group:
            write_block(group, self.index(0), first=True, last=blocks == 1)
            if blocks > 2:
                with self.loop(1, blocks - 1) as block:
                    write_block(group, block, first=False, last=False)
            if blocks > 1:
                write_block(group, self.index(blocks - 1), first=False, last=True)


@dataclass(frozen=True)
class _Plan:
    """The code: layers, one after another, the first of a map of (height, width)."""

    layers: tuple[Layer, ...]
    height: int
    width: int
    channels: int

    @property
    def maps(self) -> int:
        """Two, or three if a layer's expansion is added to one."""
        return 2 + any(isinstance(layer, Residual) and layer.given for layer in self.layers)

    def write(self, processor: Processor) -> MapWriter:
        """Write the kernel."""
        w = MapWriter(processor, self.maps)
        source, *others, out = w.maps
        x = Grid(source, self.height, self.width, w.whole(self.channels))
        for layer, following in zip(self.layers, (*self.layers[1:], None), strict=True):
            size = layer.size(x.height, x.width)
            if following is None:
                target = Grid(out, *size, layer.vectors * w.lanes)
            else:
                target = w.grid(*size, layer.vectors, following.padding if isinstance(following, Convolution) else 0)
            if isinstance(layer, Convolution):
                w.convolution(x, layer, target)
            else:
                w.residual(x, layer, target, others[0] if others else None)
            x = target
        return w


def _level(
    layers: Sequence[Layer], size: tuple[int, int], channels: int, constants: Constants, processor: Processor
) -> Level:
    plan = _Plan(tuple(layers), *size, channels)
    for layer in layers:
        size = layer.size(*size)
    return Level(Kernel(plan, constants.joined(), processor), ((*size, layers[-1].vectors * processor.lanes),))


def _convolution(constants: Constants, layer: nn.Conv2d) -> Convolution:
    """A convolution and ReLU."""
    weights = constants.pointwise(layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)
    (down, across), padding = layer.stride, layer.padding[0]
    return Convolution(weights, layer.kernel_size[0], (down, across), int(padding), relu=True)


def _residuals(constants: Constants, *layers: nn.Module) -> list[Residual]:
    """All inverted residuals of some modules."""
    blocks = [one for layer in layers for one in layer.modules() if isinstance(one, InvertedResidual)]
    return [_residual(constants, convolutions(block), add=block.residual) for block in blocks]


def _residual(constants: Constants, layers: Sequence[nn.Conv2d], *, add: bool = False, given: bool = False) -> Residual:
    expand, depthwise, project = layers
    return Residual(
        constants.pointwise(matrix_of(expand), expand.bias),
        constants.depthwise(depthwise),
        constants.projection(matrix_of(project), project.bias),
        add,
        given,
    )
