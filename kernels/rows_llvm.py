"""What levels are made of in LLVM: constants in the kernels' layouts, and stages that make one row of a map.

A row is made when the next stage asks for it, and only as many are kept as that one reads. Within a row, one or two
vectors of channels are made at a time, in tiles of pixels whose sums fill the registers.

A product goes over a pixel's inputs x[k] one by one or, of 16-bit floats, in pairs. For each it multiplies registers of
the matrix, w[k, c] for the channels c that are made, by x[k] or by the pair, repeated in all lanes:

                      register of the matrix                          repeated                a lane adds up
    float32           w[k, c]    w[k, c+1]   …                        x[k]   x[k]    …        all products of its c
    bfloat16, pairs   w[k, c]    w[k+1, c]   w[k, c+1]  w[k+1, c+1] … x[k]   x[k+1]  …        the same, in float32
    float16, pairs    as bfloat16                                     as bfloat16             a c's even k, or odd k

In float16 a vector's sums so take two registers, whose neighbouring lanes are added in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gpupipe.kernels.common_llvm import LINE, Pointer, Processor, Value, Writer

_TAPS = 9

_CHUNK = 40
"""Pixels of a row that go through a depthwise convolution before they are projected: they stay in the first cache."""

_UNROLLED = 4
"""Channels that a product's loop takes at a time."""

Need = Callable[[Value], None]
"""Sees to it that a row, given by its number, and all before it are made."""

RowAt = Callable[[Value], Pointer]
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
        pairs: two inputs are multiplied at once. In float16 the sums over even and over odd ones lie side by side, and
            are added in the end.
        sums: vectors that a group is summed in: its own, and in pairs of float16 twice as many, without a second one of
            padding.
        floats: of the matrix, for one input and one group.
        matrix: (vectors / together, inputs, together, lanes), or in pairs (…, inputs / 2, sums, a register's pairs, 2).
        bias: (vectors, lanes).
    """

    inputs: int
    vectors: int
    together: int
    pairs: bool
    sums: int
    floats: int
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
    """Packs a kernel's constants, with channels padded with zeros to whole vectors."""

    def __init__(self, processor: Processor) -> None:
        self.lanes = processor.lanes
        self._processor = processor
        self._tensors: list[Tensor] = []
        self._size = 0

    def joined(self) -> Tensor:
        """All of them: uint8 (N,)."""
        return torch.cat(self._tensors)

    def add(self, values: Tensor, dtype: torch.dtype | None = None) -> int:
        """Add floats, of the type that is computed in if nothing else is said, or integers, as int32; return their
        offset in bytes."""
        offset = self._size
        dtype = dtype or (self._processor.sums if values.is_floating_point() else torch.int32)
        flat = values.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
        self._tensors.append(pad(flat, (0, -len(flat) % LINE)))
        self._size += len(self._tensors[-1])
        return offset

    def vectors(self, channels: int) -> int:
        """How many vectors hold so many channels."""
        return -(-channels // self.lanes)

    def pointwise(self, matrix: Tensor, bias: Tensor | None, *, planar: bool = False) -> Pointwise:
        """Weights (out, in) and bias (out,) of a 1×1 convolution; None is a bias of 0.

        Args:
            planar: the channels that it reads are not neighbours.
        """
        channels, inputs = matrix.shape
        vectors, here = self.vectors(channels), self._processor
        together = _together(vectors)
        pairs = here.dtype.itemsize == 2 and inputs % 2 == 0 and not planar
        bias = matrix.new_zeros(channels) if bias is None else bias
        grouped = self._padded(matrix).view(vectors // together, together * self.lanes, inputs)
        sums, floats = together, together * self.lanes
        if pairs:
            if here.dtype == torch.float16:
                sums = 1 if channels <= here.pairs else 2 * together
            floats = sums * here.pairs
            grouped = grouped[:, :floats].unflatten(2, (-1, 2))
        at = self.add(grouped.transpose(1, 2), here.dtype if pairs else None)
        return Pointwise(inputs, vectors, together, pairs, sums, floats, at, self.add(self._padded(bias)))

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

    def on_demand(self, first: int, make: Callable[[Value], None]) -> Need:
        """Has ``make`` write how a row is made; the rows are made in order, from ``first`` on. For one place of use."""
        (following,) = self.variables([self.index(first)])

        def need(row: Value) -> None:
            with self.if_not_above(self.get(following), row):
                with self.loop(self.get(following), self.plus(row, 1)) as made:
                    make(made)
                self.set(following, self.plus(row, 1))

        return need

    def kept(self, slots: int, floats: int, dtype: torch.dtype | None = None) -> RowAt:
        """Scratch memory for the newest rows, numbered from −1 on."""
        base = self.scratch(slots * floats, dtype)
        return lambda row: self.at(base, self.times(self.modulo(self.plus(row, slots), slots), floats))

    def expanded(self, source: Pixels, weights: Pointwise, size: int) -> Expanded:
        """A 1×1 convolution and ReLU of a map."""
        return self.padded(
            weights.vectors,
            size,
            lambda row, target, plane: self.expand(source, row, weights, size, target, plane),
        )

    def padded(self, vectors: int, size: int, make: Callable[[Value, Pointer, int], None]) -> Expanded:
        """The three newest rows of an expanded map, and one of zeros before and after it.

        Args:
            make: writes how a row is made, given its number, where it lies, and the floats of a plane.
        """
        plane = (size + 2) * self.lanes
        row_at, zero = self.kept(3, vectors * plane), self.splat(0.0)

        def fill(row: Value) -> None:
            with self.if_within_else(row, size) as (inside, outside):
                with inside:
                    for border in range(0, vectors * plane, plane):
                        self.store(zero, self.at(row_at(row), border))
                        self.store(zero, self.at(row_at(row), border + plane - self.lanes))
                    make(row, self.at(row_at(row), self.lanes), plane)
                with outside, self.loop(0, vectors * plane, self.lanes) as i:
                    self.store(zero, self.at(row_at(row), i))

        return Expanded(lambda row: self.at(row_at(row), self.lanes), plane, self.on_demand(-1, fill))

    def expand(
        self,
        source: Pixels,
        row: Value,
        weights: Pointwise,
        size: int,
        target: Pointer,
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
        together, pixels = weights.together, self.tile(size, weights.sums)
        origin = source.row(row)
        with self.loop(0, weights.vectors // together) as group:
            begin_group(group)
            bias = self.at(self.constant(weights.bias), self.times(group, together * self.lanes))
            out = self.at(target, self.times(group, together * plane))
            with self.loop(0, size, pixels) as x:
                sums = self.product(
                    lambda: begin_tile(x, pixels) if begin_tile else self.loaded(bias, together) * pixels,
                    pixels,
                    weights,
                    self.reader(origin, x, source.pixel, source.channel),
                    group,
                )
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
        target: Pointer,
        begin_tile: BeginTile | None = None,
    ) -> None:
        """A row of a depthwise convolution, ReLU and a projection, to (size, vectors, lanes).

        Args:
            begin_tile: None means the bias.
        """
        source.need(self.plus(self.times(row, depthwise.stride), 1))
        together, chunk = _together(depthwise.vectors), largest_divisor(size, _CHUNK)
        depth, outputs = together * self.lanes, weights.vectors
        buffer = self.scratch(chunk * depth, self.processor.dtype)
        rounded = target.dtype != self.sums
        unrounded = self.scratch(chunk * outputs * self.lanes) if rounded else target
        with self.loop(0, size, chunk) as first:
            finished = self.at(target, self.times(first, outputs * self.lanes))
            here = unrounded if rounded else finished
            pixels = self.tile(chunk, outputs)
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
                self._project(buffer, group, weights, depth, chunk, here)
            if rounded:
                with self.loop(0, chunk * outputs * self.lanes, self.lanes) as i:
                    self.store(self.load(self.at(here, i)), self.at(finished, i))

    def _project(
        self, buffer: Pointer, group: Value, weights: Pointwise, depth: int, chunk: int, target: Pointer
    ) -> None:
        """Add the product of a group of ``depth`` channels, (chunk, depth), to a chunk of pixels."""
        together, pixels = weights.together, self.tile(chunk, weights.sums)
        with self.loop(0, weights.vectors // together) as part, self.loop(0, chunk, pixels) as x:
            here = self.at(target, self.times(x, weights.vectors * self.lanes), self.times(part, together * self.lanes))
            places = [
                self.at(here, (p * weights.vectors + v) * self.lanes) for p in range(pixels) for v in range(together)
            ]
            sums = self.product(
                lambda: [self.load(place) for place in places],
                pixels,
                weights,
                self.reader(buffer, x, depth),
                part,
                self.times(group, depth),
                depth,
            )
            for place, value in zip(places, sums, strict=True):
                self.store(value, place)

    def product(
        self,
        begin: Callable[[], list[Value]],
        pixels: int,
        weights: Pointwise,
        source: Callable[[Value, int], Pointer],
        group: Value | int = 0,
        first: Value | int = 0,
        depth: int | None = None,
        tile: Value | None = None,
    ) -> list[Value]:
        """sums[p, v] + Σ_k source(k, p) · matrix[first + k, v], for a tile of pixels p and the vectors v of a group.

        Args:
            begin: loads the sums that it begins with.
            source: the pointer to a pixel's channel.
            first, depth: which of the matrix's inputs are read; by default all.
            tile: its number among all that read this part of the matrix. While they do, the processor fetches what
                comes after it from memory.
        """
        depth = depth or weights.inputs
        if weights.pairs:
            step, dtype, width = 2, self.processor.dtype, 2 * self.processor.pairs
            broadcast, load, multiply_add = self.broadcast_pair, self.load_pairs, self.multiply_add_pairs
        else:
            step, dtype, width = 1, self.sums, self.lanes
            broadcast, load, multiply_add = self.broadcast, self.load, self.multiply_add
        side_by_side = weights.pairs and not self.adds_pairs
        offset = self.plus(self.times(group, weights.inputs), first)
        matrix = self.at(self.constant(weights.matrix, dtype), self.times(offset, weights.floats))
        unrolled = step * largest_divisor(depth // step, _UNROLLED)
        variables = self.variables([self.splat(0.0)] * (pixels * weights.sums) if side_by_side else begin())
        with self.loop(0, depth, unrolled) as start:
            sums = [self.get(variable) for variable in variables]
            if tile is not None:
                lines = self.plus(self.times(tile, depth // unrolled), self.divided(start, unrolled)[0])
                ahead = self.times(lines, LINE // dtype.itemsize)
                self.prefetch(matrix, self.plus(ahead, depth * weights.floats))
            for one in range(0, unrolled, step):
                k = self.plus(start, one)
                here = self.at(matrix, self.times(k, weights.floats))
                factors = [load(self.at(here, v * width)) for v in range(weights.sums)]
                for p in range(pixels):
                    value = broadcast(source(k, p))
                    for place, factor in enumerate(factors, start=p * weights.sums):
                        sums[place] = multiply_add(value, factor, sums[place])
            for variable, value in zip(variables, sums, strict=True):
                self.set(variable, value)
        sums = [self.get(variable) for variable in variables]
        if not side_by_side:
            return sums
        others = sums[1::2] if weights.sums > 1 else [self.splat(0.0)] * pixels
        added = map(self.sums_of_pairs, sums[:: min(2, weights.sums)], others)
        return [self.add(before, one) for before, one in zip(begin(), added, strict=True)]

    def reader(self, row: Pointer, x: Value, pixel: int, channel: int = 1) -> Callable[[Value, int], Pointer]:
        """The pointer to channel k of the pixel p columns to the right of x; neighbours are so many floats apart."""
        here = self.at(row, self.times(x, pixel))
        return lambda k, p: self.at(here, self.times(k, channel), p * pixel)

    def convolved(self, size: int) -> int:
        """Pixels that are convolved at once: their sums, and the pixels that they share, lie in registers."""
        return largest_divisor(size, 6 if self.processor.registers > 16 else 3)

    def tile(self, size: int, vectors: int) -> int:
        """Pixels whose sums, of so many vectors each, fill the registers; some are left for factors."""
        return largest_divisor(size, max(1, (self.processor.registers - 4) // vectors))

    def loaded(self, pointer: Pointer, vectors: int) -> list[Value]:
        """So many vectors, one after another."""
        return [self.load(self.at(pointer, v * self.lanes)) for v in range(vectors)]


def _together(vectors: int) -> int:
    """Vectors that are made at once: two, if there are as many."""
    return 1 if vectors % 2 else 2


def largest_divisor(of: int, most: int) -> int:
    """The largest one of a number that is not above ``most``."""
    return max(n for n in range(1, most + 1) if of % n == 0)


def matrix_of(layer: nn.Conv2d) -> Tensor:
    """Of a 1×1 convolution: (out, in)."""
    return layer.weight[:, :, 0, 0]
