"""Levels of the U-Net on a CPU, a row at a time, written with LLVM.

Layer by layer, the largest maps go through memory several times: 128 channels of 320×320 are 52 MB, far more than a
core's caches. Here a row of a map is made when a row of the next map asks for it, and only as many are kept as a
depthwise convolution reads:

    low ── expand ── 2 rows ─ bilinear ─┐
                                        ├─ expand ── 3 rows ── depthwise, project ── 2 rows ─┐
    skip ───────────────────────────────┘                                                    │
                   ┌──────────────────────────────────────────────────────────────────────────┤
                   └ expand ── 3 rows ── depthwise, project ──────────────────────────────── + ── out, or head and mouth

They take half a megabyte at most, and stay in a core's second cache. Within a row, one or two vectors of channels are
made at a time, in tiles of pixels whose sums fill the registers.

The plain references are the modules of :mod:`gpupipe.models.hoisted` that the levels are made from. Maps are float32, of
one frame: *planar* ones (channels, height, width), the others (height, width, channels), with the channels padded with
zeros to whole vectors if that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gpupipe.kernels.common_llvm import Kernel, Processor, Value, Writer, this_processor
from gpupipe.models.hoisted import HoistedUp

_TAPS = 9

_CHUNK = 40
"""Pixels of a row that go through a depthwise convolution before they are projected: they stay in the first cache."""

_UNROLLED = 4
"""Channels that a product's loop takes at a time."""


@dataclass(frozen=True)
class Pixels:
    """A map that is read one channel of a pixel at a time.

    Attributes:
        row: the pointer to a row, by its number.
        channels: how many there are.
        pixel, channel: how far apart neighbours are, in floats.
        need: sees to it that a row is there.
    """

    row: Callable[[Value], Value]
    channels: int
    pixel: int
    channel: int
    need: Callable[[Value], None] = lambda row: None


@dataclass(frozen=True)
class Vectors:
    """A map whose rows are (vectors, plane, lanes): what a 1×1 convolution writes.

    Attributes:
        row: the pointer to a row's first pixel, by its number.
        plane: floats of a vector's pixels.
        need: sees to it that a row is there.
    """

    row: Callable[[Value], Value]
    plane: int
    need: Callable[[Value], None]


@dataclass(frozen=True)
class Weights:
    """A 1×1 convolution's.

    Attributes:
        matrix: (vectors / together, inputs, together, lanes).
        bias: (vectors, lanes).
        together: vectors that are made at once.
    """

    matrix: Value
    bias: Value
    vectors: int
    together: int


@dataclass(frozen=True)
class Level:
    """A level, compiled. Its kernel takes the maps that it reads and then those that it makes, each contiguous.

    Attributes:
        size: rows of the last map that it makes, for the kernel to make some or all of.
        shapes: of the maps that it makes.
    """

    kernel: Kernel
    size: int
    shapes: tuple[tuple[int, int, int], ...]


class LevelWriter(Writer):
    """Writes the stages of a level. Maps are square."""

    # Constants

    def vectors(self, channels: int) -> int:
        """How many vectors hold so many channels."""
        return -(-channels // self.lanes)

    def pointwise(self, matrix: Tensor, bias: Tensor | None) -> Weights:
        """Weights (out, in) and bias (out,) of a 1×1 convolution; None is a bias of 0."""
        vectors = self.vectors(len(matrix))
        together = 1 if vectors % 2 else 2
        matrix = _padded(matrix, vectors * self.lanes)
        bias = _padded(matrix.new_zeros(len(matrix)) if bias is None else bias, vectors * self.lanes)
        grouped = matrix.view(vectors // together, together * self.lanes, -1).transpose(1, 2)
        return Weights(self.constant(grouped), self.constant(bias), vectors, together)

    def depthwise(self, layer: nn.Conv2d) -> Value:
        """Taps and bias of a depthwise convolution: (vectors, 10, lanes)."""
        assert layer.bias is not None
        taps = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1)
        taps = _padded(taps, self.vectors(len(taps)) * self.lanes)
        return self.constant(taps.view(-1, self.lanes, _TAPS + 1).transpose(1, 2))

    # Rows that are made when they are asked for

    def on_demand(self, first: Value, make: Callable[[Value], None]) -> Callable[[Value], None]:
        """Returns what has ``make`` make the rows up to a given one, in order, from ``first`` on."""
        (following,) = self.variables([first])

        def need(row: Value) -> None:
            with self.if_not_above(self.get(following), row):
                with self.loop(self.get(following), self.plus(row, 1)) as made:
                    make(made)
                self.set(following, self.plus(row, 1))

        return need

    def kept(self, slots: int, floats: int) -> Callable[[Value], Value]:
        """Scratch memory for the newest rows; returns what tells where a row lies, from −1 on."""
        base = self.scratch(slots * floats)
        return lambda row: self.at(base, self.times(self.modulo(self.plus(row, slots), slots), floats))

    def padded_rows(
        self, vectors: int, size: int, first: Value, make: Callable[[Value, Value, int], None]
    ) -> Vectors:
        """The three rows of an expanded map that a depthwise convolution reads: zero outside the map, on all sides.

        Args:
            make: makes a row, at a pointer to its first pixel, in planes of so many floats.
        """
        plane = (size + 2) * self.lanes
        row_at = self.kept(3, vectors * plane)

        def fill(row: Value) -> None:
            with self.if_within(row, size) as (inside, outside):
                with inside:
                    for vector in range(vectors):
                        for border in (0, size + 1):
                            self.store(self.splat(0.0), self.at(row_at(row), vector * plane + border * self.lanes))
                    make(row, self.at(row_at(row), self.lanes), plane)
                with outside, self.loop(0, vectors * plane, self.lanes) as i:
                    self.store(self.splat(0.0), self.at(row_at(row), i))

        return Vectors(lambda row: self.at(row_at(row), self.lanes), plane, self.on_demand(first, fill))

    # Stages

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
                factors = self.at(matrix, self.times(k, vectors * self.lanes))
                loaded = [self.load(self.at(factors, v * self.lanes)) for v in range(vectors)]
                for p in range(len(sums) // vectors):
                    value = self.broadcast(source(k, p))
                    for v in range(vectors):
                        sums[p * vectors + v] = self.multiply_add(value, loaded[v], sums[p * vectors + v])
            for variable, value in zip(variables, sums, strict=True):
                self.set(variable, value)
        return [self.get(variable) for variable in variables]

    def tile(self, width: int, vectors: int) -> int:
        """Pixels whose sums, of so many vectors each, fill the registers; some are left for factors."""
        return _largest_divisor(width, max(1, (self.processor.registers - 4) // vectors))

    def convolved(self, width: int) -> int:
        """Pixels that are convolved at once: their sums and the pixels that they share lie in registers."""
        return _largest_divisor(width, 6 if self.processor.registers > 16 else 3)

    def expand(
        self,
        source: Pixels,
        row: Value,
        weights: Weights,
        size: int,
        target: Value,
        plane: int,
        *,
        relu: bool = True,
        begin_group: Callable[[Value], None] = lambda group: None,
        begin_tile: Callable[[Value, int], list[Value]] | None = None,
    ) -> None:
        """A row of a 1×1 convolution, to (vectors, plane).

        Args:
            begin_group: writes what comes before a group of vectors.
            begin_tile: what a tile's sums begin with, by its first pixel; None means the bias.
        """
        source.need(row)
        together, pixels = weights.together, self.tile(size, weights.together)
        origin = source.row(row)
        with self.loop(0, weights.vectors // together) as group:
            begin_group(group)
            matrix = self.at(weights.matrix, self.times(group, source.channels * together * self.lanes))
            bias = self.at(weights.bias, self.times(group, together * self.lanes))
            out = self.at(target, self.times(group, together * plane))
            with self.loop(0, size, pixels) as x:
                if begin_tile is None:
                    sums = [self.load(self.at(bias, v * self.lanes)) for v in range(together)] * pixels
                else:
                    sums = begin_tile(x, pixels)
                sums = self.product(sums, source.channels, self.reader(source, origin, x), matrix, together)
                for i, value in enumerate(sums):
                    p, v = divmod(i, together)
                    at = self.at(out, self.times(x, self.lanes), v * plane + p * self.lanes)
                    self.store(self.relu(value) if relu else value, at)

    def convolve(
        self, source: Vectors, row: Value, taps: Value, vector: Value, stride: int, first: Value, pixels: int
    ) -> list[Value]:
        """ReLU of a depthwise convolution of a vector of channels: so many pixels of a row, from ``first`` on."""
        taps = self.at(taps, self.times(vector, (_TAPS + 1) * self.lanes))
        sums = [self.load(self.at(taps, _TAPS * self.lanes))] * pixels
        for dy in range(3):
            above = source.row(self.plus(self.times(row, stride), dy - 1))
            offset = self.plus(self.times(vector, source.plane), self.times(first, stride * self.lanes))
            origin = self.at(above, offset)
            values = [self.load(self.at(origin, (i - 1) * self.lanes)) for i in range((pixels - 1) * stride + 3)]
            for p in range(pixels):
                for dx in range(3):
                    tap = self.load(self.at(taps, (3 * dy + dx) * self.lanes))
                    sums[p] = self.multiply_add(values[p * stride + dx], tap, sums[p])
        return [self.relu(value) for value in sums]

    def convolve_and_project(
        self,
        source: Vectors,
        row: Value,
        taps: Value,
        weights: Weights,
        vectors: int,
        size: int,
        target: Value,
        *,
        stride: int = 1,
        begin_tile: Callable[[Value, int], list[Value]] | None = None,
    ) -> None:
        """A row of a depthwise convolution, ReLU and a projection, to (width, vectors, lanes).

        Args:
            vectors: of ``source``.
            begin_tile: what a tile's sums begin with, by its first pixel; None means the bias.
        """
        source.need(self.plus(self.times(row, stride), 1))
        chunk, together = _largest_divisor(size, _CHUNK), 1 if vectors % 2 else 2
        convolved = self.convolved(chunk)
        outputs, depth = weights.vectors, together * self.lanes
        buffer = self.scratch(chunk * depth)
        convolved_row = Pixels(lambda row: buffer, depth, depth, 1)
        with self.loop(0, size, chunk) as first:
            pixels = self.tile(chunk, outputs)
            with self.loop(0, chunk, pixels) as x:
                if begin_tile is None:
                    sums = [self.load(self.at(weights.bias, v * self.lanes)) for v in range(outputs)] * pixels
                else:
                    sums = begin_tile(self.plus(first, x), pixels)
                for i, value in enumerate(sums):
                    self.store(value, self.at(target, self.times(self.plus(first, x), outputs * self.lanes), i * self.lanes))
            with self.loop(0, vectors // together) as group:
                for v in range(together):
                    vector = self.plus(self.times(group, together), v)
                    with self.loop(0, chunk, convolved) as x:
                        values = self.convolve(source, row, taps, vector, stride, self.plus(first, x), convolved)
                        for p, value in enumerate(values):
                            self.store(value, self.at(buffer, self.times(x, depth), p * depth + v * self.lanes))
                pixels = self.tile(chunk, weights.together)
                with self.loop(0, outputs // weights.together) as part, self.loop(0, chunk, pixels) as x:
                    width = weights.together * self.lanes
                    matrix = self.at(weights.matrix, self.times(part, vectors * self.lanes * width), self.times(group, depth * width))
                    here = self.at(target, self.times(self.plus(first, x), outputs * self.lanes), self.times(part, width))
                    places = [
                        self.at(here, (p * outputs + v) * self.lanes) for p in range(pixels) for v in range(weights.together)
                    ]
                    sums = [self.load(place) for place in places]
                    sums = self.product(sums, depth, self.reader(convolved_row, buffer, x), matrix, weights.together)
                    for place, value in zip(places, sums, strict=True):
                        self.store(value, place)

    def reader(self, source: Pixels, row: Value, x: Value) -> Callable[[Value, int], Value]:
        """The pointer to channel k of the pixel p columns to the right of x."""
        here = self.at(row, self.times(x, source.pixel))
        return lambda k, p: self.at(here, self.times(k, source.channel), p * source.pixel)


def up_level(
    level: HoistedUp, size: int, *, head: nn.Conv2d | None = None, processor: Processor | None = None
) -> Level:
    """A level of the decoder, ``size`` pixels a side, on the maps low (size / 2 a side), skip, and what it makes.

    Args:
        head: a 1×1 convolution of what the last level makes. With it, the skip's channels are not padded, as the first
            block leaves them, and the level makes the head's sigmoid, planar.
        processor: that runs it; None means this one.
    """
    w = LevelWriter(processor or this_processor(), 3)
    low_map, skip_map, out_map = w.maps
    half = size // 2
    first_x = w.at_least(w.plus(w.begin, -1), 0)
    first_expanded = w.plus(first_x, -1)

    expand_low = w.pointwise(_matrix(level.low), level.skip.bias)
    expand_skip = w.pointwise(_matrix(level.skip), None)
    places, shares = _upsampling(size)
    places, shares = w.constant(places), w.constant(shares)
    lows = _pixels(w, low_map, level.low.in_channels, half, padded=True)
    skips = _pixels(w, skip_map, level.skip.in_channels, size, padded=head is None)

    plane = half * w.lanes
    low_row = w.kept(2, expand_low.vectors * plane)
    need_low = w.on_demand(
        w.load_index(w.at(places, w.at_least(first_expanded, 0))),
        lambda row: w.expand(lows, row, expand_low, half, low_row(row), plane, relu=False),
    )
    mixed = w.scratch(expand_low.together * plane)

    def expand(row: Value, target: Value, out_plane: int) -> None:
        above = w.load_index(w.at(places, row))
        below = w.plus(above, 1)
        need_low(below)
        share = w.broadcast(w.at(shares, row))

        def mix_rows(group: Value) -> None:
            offset = w.times(group, expand_low.together * plane)
            with w.loop(0, expand_low.together * plane, w.lanes) as i:
                a, b = (w.load(w.at(low_row(one), offset, i)) for one in (above, below))
                w.store(w.mix(a, b, share), w.at(mixed, i))

        def mix_columns(x: Value, pixels: int) -> list[Value]:
            sums = []
            for p in range(pixels):
                column = w.plus(x, p)
                left = w.at(mixed, w.times(w.load_index(w.at(places, column)), w.lanes))
                column_share = w.broadcast(w.at(shares, column))
                for v in range(expand_low.together):
                    here = w.at(left, v * plane)
                    sums.append(w.mix(w.load(here), w.load(w.at(here, w.lanes)), column_share))
            return sums

        w.expand(
            skips, row, expand_skip, size, target, out_plane, begin_group=mix_rows, begin_tile=mix_columns
        )

    depthwise, project, *second = _convolutions(level.rest)
    expanded = w.padded_rows(expand_skip.vectors, size, first_expanded, expand)
    x = _projected(w, expanded, depthwise, project, size, first_x)
    shape = _second(w, x, second, size, out_map, head)
    return Level(Kernel(w), size, (shape,))


def down_level(
    layers: nn.Module, size: int, *, first: nn.Module | None = None, processor: Processor | None = None
) -> Level:
    """A level of the encoder, on the map that it reads (2 · size pixels a side) and the one that it makes (size).

    Both have padded channels.

    Args:
        layers: two inverted residuals, the first with stride 2.
        first: the first block's expansion and depthwise convolution. With it, the maps are the image, planar, what the
            first block makes of it, its channels not padded, and what the level makes of that.
        processor: that runs it; None means this one.
    """
    w = LevelWriter(processor or this_processor(), 2 if first is None else 3)
    *read, out_map = w.maps
    expand, depthwise, project, *second = _convolutions(layers)
    first_x = w.at_least(w.plus(w.begin, -1), 0)
    first_expanded = w.plus(w.times(first_x, 2), -1)
    if first is None:
        source = _pixels(w, read[0], expand.in_channels, 2 * size, padded=True)
    else:
        source = _first_block(w, first, read[0], read[1], 2 * size, w.at_least(first_expanded, 0))
    expanded = _expanded(w, source, expand, 2 * size, first_expanded)
    x = _projected(w, expanded, depthwise, project, size, first_x)
    shape = _second(w, x, second, size, out_map, None)
    if first is None:
        return Level(Kernel(w), size, (shape,))
    return Level(Kernel(w), size, ((2 * size, 2 * size, source.channels), shape))


def _first_block(
    w: LevelWriter, layers: nn.Module, image_map: Value, out_map: Value, size: int, first: Value
) -> Pixels:
    """What the first block makes of an image, from a row on: without its projection."""
    expand, depthwise = _convolutions(layers)
    image = _pixels(w, image_map, expand.in_channels, size, planar=True)
    expanded = _expanded(w, image, expand, size, w.plus(first, -1))
    taps, channels = w.depthwise(depthwise), depthwise.out_channels
    out = _pixels(w, out_map, channels, size)

    def make(row: Value) -> None:
        expanded.need(w.plus(row, 1))
        pixels = w.convolved(size)
        for vector in range(w.vectors(channels)):
            with w.loop(0, size, pixels) as x:
                for p, value in enumerate(w.convolve(expanded, row, taps, w.plus(vector, 0), 1, x, pixels)):
                    at = w.at(out.row(row), w.times(x, channels), p * channels + vector * w.lanes)
                    w.store(value, at, channels - vector * w.lanes)

    return Pixels(out.row, channels, channels, 1, w.on_demand(first, make))


def _expanded(w: LevelWriter, source: Pixels, layer: nn.Conv2d, size: int, first: Value) -> Vectors:
    """The expanded map's rows, from ``first`` on."""
    weights = w.pointwise(_matrix(layer), layer.bias)
    return w.padded_rows(
        weights.vectors,
        size,
        first,
        lambda row, target, plane: w.expand(source, row, weights, size, target, plane),
    )


def _projected(
    w: LevelWriter, expanded: Vectors, depthwise: nn.Conv2d, project: nn.Conv2d, size: int, first: Value
) -> Pixels:
    """What the first inverted residual makes: the two rows that the second one needs, from ``first`` on."""
    vectors = w.vectors(depthwise.in_channels)
    taps, weights = w.depthwise(depthwise), _projection(w, _matrix(project), project.bias)
    pixel = weights.vectors * w.lanes
    row_at = w.kept(2, size * pixel)
    stride = int(depthwise.stride[0])
    need = w.on_demand(
        first,
        lambda row: w.convolve_and_project(
            expanded, row, taps, weights, vectors, size, row_at(row), stride=stride
        ),
    )
    return Pixels(row_at, project.out_channels, pixel, 1, need)


def _second(
    w: LevelWriter, x: Pixels, layers: list[nn.Conv2d], size: int, out_map: Value, head: nn.Conv2d | None
) -> tuple[int, int, int]:
    """The second inverted residual and the rows of what a level makes; returns its shape."""
    expand, depthwise, project = layers
    expanded, taps = _expanded(w, x, expand, size, w.plus(w.begin, -1)), w.depthwise(depthwise)
    vectors = w.vectors(expand.out_channels)
    if head is None:
        projection = _projection(w, _matrix(project), project.bias)
        with w.loop(w.begin, w.end) as row:

            def add(first: Value, pixels: int) -> list[Value]:
                here = w.at(x.row(row), w.times(first, x.pixel))
                bias = [w.load(w.at(projection.bias, v * w.lanes)) for v in range(projection.vectors)]
                values = (w.load(w.at(here, i * w.lanes)) for i in range(pixels * projection.vectors))
                return [w.add(value, bias[i % projection.vectors]) for i, value in enumerate(values)]

            target = w.at(out_map, w.times(row, size * x.pixel))
            w.convolve_and_project(expanded, row, taps, projection, vectors, size, target, begin_tile=add)
        return size, size, x.pixel
    # H (x + P d) = H x + (H P) d
    assert head.bias is not None and project.bias is not None
    outer = _matrix(head)
    of_x = w.pointwise(outer, outer @ project.bias + head.bias)
    projection = _projection(w, outer @ _matrix(project), None)
    sums_row = w.scratch(size * w.lanes)
    with w.loop(w.begin, w.end) as row:

        def begin(first: Value, pixels: int) -> list[Value]:
            bias = [w.load(of_x.bias)] * pixels
            return w.product(bias, x.channels, w.reader(x, x.row(row), first), of_x.matrix, 1)

        w.convolve_and_project(expanded, row, taps, projection, vectors, size, sums_row, begin_tile=begin)
        with w.loop(0, size, w.lanes) as first:
            for channel in range(len(outer)):
                sums = w.gather(w.at(sums_row, w.times(first, w.lanes), channel), w.lanes)
                w.store(w.sigmoid(sums), w.at(out_map, w.times(row, size), first, channel * size * size))
    return len(outer), size, size


def _pixels(w: LevelWriter, base: Value, channels: int, size: int, *, planar: bool = False, padded: bool = False) -> Pixels:
    """A map in memory."""
    if planar:
        return Pixels(lambda row: w.at(base, w.times(row, size)), channels, 1, size * size)
    pixel = w.vectors(channels) * w.lanes if padded else channels
    return Pixels(lambda row: w.at(base, w.times(row, size * pixel)), channels, pixel, 1)


def _projection(w: LevelWriter, matrix: Tensor, bias: Tensor | None) -> Weights:
    """A projection (out, in), for whole vectors of inputs."""
    inputs = matrix.shape[1]
    matrix = pad(matrix, (0, w.vectors(inputs) * w.lanes - inputs))
    return w.pointwise(matrix, bias)


def _upsampling(size: int) -> tuple[Tensor, Tensor]:
    """Bilinear ×2 with aligned corners to ``size`` pixels: the first of the two that each lies between, and the share of
    the second; int32 and float32 (size,)."""
    half = size // 2
    source = np.float32((half - 1) / (size - 1)) * np.arange(size, dtype=np.float32)
    place = np.minimum(source.astype(np.int32), half - 2)
    return torch.from_numpy(place), torch.from_numpy(source - place.astype(np.float32))


def _convolutions(layers: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]


def _matrix(layer: nn.Conv2d) -> Tensor:
    return layer.weight[:, :, 0, 0]


def _padded(values: Tensor, length: int) -> Tensor:
    """``values`` with zeros, so that the first axis has this length."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def _largest_divisor(of: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if of % n == 0)
