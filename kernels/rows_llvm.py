"""What levels are made of in LLVM: constants in the kernels' layouts, and stages that make one row of a map.

A row is made when the next stage asks for it, and only as many are kept as that one reads. Within a row, one or two
vectors of channels are made at a time, in tiles of pixels whose sums fill the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gpupipe.kernels.common_llvm import LINE, Value, Writer

_TAPS = 9

_CHUNK = 40
"""Pixels of a row that go through a depthwise convolution before they are projected: they stay in the first cache."""

_UNROLLED = 4
"""Channels that a product's loop takes at a time."""

Need = Callable[[Value], None]
"""Sees to it that a row, given by its number, and all before it are made."""

RowAt = Callable[[Value], Value]
"""The pointer to a row, given by its number."""

BeginTile = Callable[[Value, int], list[Value]]
"""What the sums of a tile begin with, given its first pixel and their number: of each pixel, all vectors."""


@dataclass(frozen=True)
class Pointwise:
    """Where the constants of a 1×1 convolution lie.

    Attributes:
        inputs: channels.
        vectors: of what it makes.
        together: vectors that are made at once.
        matrix: (vectors / together, inputs, together, lanes).
        bias: (vectors, lanes).
    """

    inputs: int
    vectors: int
    together: int
    matrix: int
    bias: int


@dataclass(frozen=True)
class Depthwise:
    """Where the constants of a 3×3 depthwise convolution lie.

    Attributes:
        taps: (vectors, 10, lanes), row by row, and the bias.
    """

    channels: int
    vectors: int
    stride: int
    taps: int


class Constants:
    """Packs a kernel's constants, with channels padded with zeros to whole vectors.

    Args:
        lanes: of a vector.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._tensors: list[Tensor] = []
        self._size = 0

    def joined(self) -> Tensor:
        """All of them: float32 (N,)."""
        return torch.cat(self._tensors)

    def add(self, values: Tensor) -> int:
        """Add floats, as float32, or integers, as int32; return their offset in floats."""
        offset = self._size
        values = values.detach().to("cpu", torch.float32 if values.is_floating_point() else torch.int32)
        flat = values.contiguous().reshape(-1).view(torch.float32)
        self._tensors.append(pad(flat, (0, -len(flat) % LINE)))
        self._size += len(self._tensors[-1])
        return offset

    def vectors(self, channels: int) -> int:
        """How many vectors hold so many channels."""
        return -(-channels // self.lanes)

    def pointwise(self, matrix: Tensor, bias: Tensor | None) -> Pointwise:
        """Weights (out, in) and bias (out,) of a 1×1 convolution; None is a bias of 0."""
        inputs, vectors = matrix.shape[1], self.vectors(len(matrix))
        together = _together(vectors)
        bias = matrix.new_zeros(len(matrix)) if bias is None else bias
        grouped = self._padded(matrix).view(vectors // together, together * self.lanes, inputs).transpose(1, 2)
        return Pointwise(inputs, vectors, together, self.add(grouped), self.add(self._padded(bias)))

    def projection(self, matrix: Tensor, bias: Tensor | None) -> Pointwise:
        """As :meth:`pointwise`, of whole vectors of inputs."""
        return self.pointwise(self._padded(matrix.T).T, bias)

    def depthwise(self, layer: nn.Conv2d) -> Depthwise:
        """A 3×3 depthwise convolution, with stride 1 or 2."""
        assert layer.bias is not None
        taps = self._padded(torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1))
        offset = self.add(taps.view(-1, self.lanes, _TAPS + 1).transpose(1, 2))
        return Depthwise(layer.in_channels, self.vectors(layer.in_channels), int(layer.stride[0]), offset)

    def _padded(self, values: Tensor) -> Tensor:
        zeros = -len(values) % self.lanes
        return torch.cat([values, values.new_zeros(zeros, *values.shape[1:])])


@dataclass(frozen=True)
class Pixels:
    """A map that is read one channel of a pixel at a time.

    Attributes:
        row: where a row lies.
        pixel, channel: how far apart neighbours are, in floats.
        need: has its rows made.
    """

    row: RowAt
    pixel: int
    channel: int = 1
    need: Need = lambda row: None


@dataclass(frozen=True)
class Expanded:
    """The rows of an expanded map that a depthwise convolution reads: (vectors, plane), with a pixel of zeros before
    and after those of each vector.

    Attributes:
        row: where a row's first pixel lies.
        plane: floats of a vector.
        need: has its rows made; those outside the map are zero.
    """

    row: RowAt
    plane: int
    need: Need


class RowWriter(Writer):
    """Writes stages. Maps are square; ``size`` is the number of rows and columns of what a stage makes."""

    def whole(self, channels: int) -> int:
        """So many channels, padded to whole vectors."""
        return channels + -channels % self.lanes

    def on_demand(self, first: Value, make: Callable[[Value], None]) -> Need:
        """Has ``make`` write how a row is made; the rows are made in order, from ``first`` on. For one place of use."""
        (following,) = self.variables([first])

        def need(row: Value) -> None:
            with self.if_not_above(self.get(following), row):
                with self.loop(self.get(following), self.plus(row, 1)) as made:
                    make(made)
                self.set(following, self.plus(row, 1))

        return need

    def kept(self, slots: int, floats: int) -> RowAt:
        """Scratch memory for the newest rows, numbered from −1 on."""
        base = self.scratch(slots * floats)
        return lambda row: self.at(base, self.times(self.modulo(self.plus(row, slots), slots), floats))

    def expanded(self, source: Pixels, weights: Pointwise, size: int, first: Value) -> Expanded:
        """A 1×1 convolution and ReLU of a map, its rows from ``first`` on."""
        return self.padded(
            weights.vectors,
            size,
            first,
            lambda row, target, plane: self.expand(source, row, weights, size, target, plane),
        )

    def padded(self, vectors: int, size: int, first: Value, make: Callable[[Value, Value, int], None]) -> Expanded:
        """The three newest rows of an expanded map, from ``first`` on.

        Args:
            make: writes how a row is made, given its number, where it lies, and the floats of a plane.
        """
        plane = (size + 2) * self.lanes
        row_at, zero = self.kept(3, vectors * plane), self.splat(0.0)

        def fill(row: Value) -> None:
            with self.if_within(row, size) as (inside, outside):
                with inside:
                    for border in range(0, vectors * plane, plane):
                        self.store(zero, self.at(row_at(row), border))
                        self.store(zero, self.at(row_at(row), border + plane - self.lanes))
                    make(row, self.at(row_at(row), self.lanes), plane)
                with outside, self.loop(0, vectors * plane, self.lanes) as i:
                    self.store(zero, self.at(row_at(row), i))

        return Expanded(lambda row: self.at(row_at(row), self.lanes), plane, self.on_demand(first, fill))

    def expand(
        self,
        source: Pixels,
        row: Value,
        weights: Pointwise,
        size: int,
        target: Value,
        plane: int,
        *,
        relu: bool = True,
        begin_group: Callable[[Value], None] = lambda group: None,
        begin_tile: BeginTile | None = None,
    ) -> None:
        """A row of a 1×1 convolution, to (vectors, plane).

        Args:
            begin_group: writes what comes before each group of vectors.
            begin_tile: None means the bias.
        """
        source.need(row)
        together, pixels = weights.together, self._tile(size, weights.together)
        origin = source.row(row)
        with self.loop(0, weights.vectors // together) as group:
            begin_group(group)
            matrix = self.at(self.constant(weights.matrix), self.times(group, weights.inputs * together * self.lanes))
            bias = self.at(self.constant(weights.bias), self.times(group, together * self.lanes))
            out = self.at(target, self.times(group, together * plane))
            with self.loop(0, size, pixels) as x:
                sums = begin_tile(x, pixels) if begin_tile else self.loaded(bias, together) * pixels
                sums = self.product(sums, weights.inputs, self.reader(source, origin, x), matrix, together)
                for i, value in enumerate(sums):
                    p, v = divmod(i, together)
                    at = self.at(out, self.times(x, self.lanes), v * plane + p * self.lanes)
                    self.store(self.relu(value) if relu else value, at)

    def convolve(
        self, source: Expanded, row: Value, depthwise: Depthwise, vector: Value | int, first: Value, pixels: int
    ) -> list[Value]:
        """Depthwise convolution and ReLU of a vector of channels: so many pixels of a row, from ``first`` on."""
        taps = self.at(self.constant(depthwise.taps), self.times(vector, (_TAPS + 1) * self.lanes))
        stride = depthwise.stride
        sums = [self.load(self.at(taps, _TAPS * self.lanes))] * pixels
        for dy in range(3):
            origin = self.at(
                source.row(self.plus(self.times(row, stride), dy - 1)),
                self.times(vector, source.plane),
                self.times(first, stride * self.lanes),
            )
            values = [self.load(self.at(origin, (i - 1) * self.lanes)) for i in range((pixels - 1) * stride + 3)]
            for p in range(pixels):
                for dx in range(3):
                    tap = self.load(self.at(taps, (3 * dy + dx) * self.lanes))
                    sums[p] = self.multiply_add(values[p * stride + dx], tap, sums[p])
        return [self.relu(value) for value in sums]

    def convolve_and_project(
        self,
        source: Expanded,
        row: Value,
        depthwise: Depthwise,
        weights: Pointwise,
        size: int,
        target: Value,
        begin_tile: BeginTile | None = None,
    ) -> None:
        """A row of a depthwise convolution, ReLU and a projection, to (size, vectors, lanes).

        Args:
            begin_tile: None means the bias.
        """
        source.need(self.plus(self.times(row, depthwise.stride), 1))
        together, chunk = _together(depthwise.vectors), _largest_divisor(size, _CHUNK)
        depth, outputs = together * self.lanes, weights.vectors
        buffer = self.scratch(chunk * depth)
        with self.loop(0, size, chunk) as first:
            here = self.at(target, self.times(first, outputs * self.lanes))
            pixels = self._tile(chunk, outputs)
            with self.loop(0, chunk, pixels) as x:
                if begin_tile is None:
                    sums = self.loaded(self.constant(weights.bias), outputs) * pixels
                else:
                    sums = begin_tile(self.plus(first, x), pixels)
                for i, value in enumerate(sums):
                    self.store(value, self.at(here, self.times(x, outputs * self.lanes), i * self.lanes))
            with self.loop(0, depthwise.vectors // together) as group:
                pixels = self.convolved(chunk)
                for v in range(together):
                    vector = self.plus(self.times(group, together), v)
                    with self.loop(0, chunk, pixels) as x:
                        values = self.convolve(source, row, depthwise, vector, self.plus(first, x), pixels)
                        for p, value in enumerate(values):
                            self.store(value, self.at(buffer, self.times(x, depth), p * depth + v * self.lanes))
                self._project(Pixels(lambda row: buffer, depth), buffer, group, weights, depth, chunk, here)

    def _project(
        self, source: Pixels, buffer: Value, group: Value, weights: Pointwise, depth: int, chunk: int, target: Value
    ) -> None:
        """Add the product of a group of ``depth`` channels to a chunk of pixels."""
        together, pixels = weights.together, self._tile(chunk, weights.together)
        width = together * self.lanes
        with self.loop(0, weights.vectors // together) as part, self.loop(0, chunk, pixels) as x:
            matrix = self.at(
                self.constant(weights.matrix),
                self.times(part, weights.inputs * width),
                self.times(group, depth * width),
            )
            here = self.at(target, self.times(x, weights.vectors * self.lanes), self.times(part, width))
            places = [
                self.at(here, (p * weights.vectors + v) * self.lanes) for p in range(pixels) for v in range(together)
            ]
            sums = [self.load(place) for place in places]
            sums = self.product(sums, depth, self.reader(source, buffer, x), matrix, together)
            for place, value in zip(places, sums, strict=True):
                self.store(value, place)

    def product(
        self, sums: list[Value], depth: int, source: Callable[[Value, int], Value], matrix: Value, vectors: int
    ) -> list[Value]:
        """sums[p · vectors + v] + Σ_k source(k, p) · matrix[k, v], for a tile of pixels p and some vectors v.

        Args:
            source: the pointer to a pixel's channel.
            matrix: (depth, vectors, lanes).
        """
        variables = self.variables(sums)
        unrolled = _largest_divisor(depth, _UNROLLED)
        with self.loop(0, depth, unrolled) as first:
            sums = [self.get(variable) for variable in variables]
            for one in range(unrolled):
                k = self.plus(first, one)
                factors = self.loaded(self.at(matrix, self.times(k, vectors * self.lanes)), vectors)
                for p in range(len(sums) // vectors):
                    value = self.broadcast(source(k, p))
                    for v, factor in enumerate(factors):
                        sums[p * vectors + v] = self.multiply_add(value, factor, sums[p * vectors + v])
            for variable, value in zip(variables, sums, strict=True):
                self.set(variable, value)
        return [self.get(variable) for variable in variables]

    def reader(self, source: Pixels, row: Value, x: Value) -> Callable[[Value, int], Value]:
        """The pointer to channel k of the pixel p columns to the right of x."""
        here = self.at(row, self.times(x, source.pixel))
        return lambda k, p: self.at(here, self.times(k, source.channel), p * source.pixel)

    def convolved(self, size: int) -> int:
        """Pixels that are convolved at once: their sums, and the pixels that they share, lie in registers."""
        return _largest_divisor(size, 6 if self.processor.registers > 16 else 3)

    def _tile(self, size: int, vectors: int) -> int:
        """Pixels whose sums, of so many vectors each, fill the registers; some are left for factors."""
        return _largest_divisor(size, max(1, (self.processor.registers - 4) // vectors))

    def loaded(self, pointer: Value, vectors: int) -> list[Value]:
        """So many vectors, one after another."""
        return [self.load(self.at(pointer, v * self.lanes)) for v in range(vectors)]


def _together(vectors: int) -> int:
    """Vectors that are made at once: two, if there are as many."""
    return 1 if vectors % 2 else 2


def _largest_divisor(of: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if of % n == 0)
