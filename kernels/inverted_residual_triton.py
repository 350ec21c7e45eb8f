"""Triton kernels of :mod:`gpupipe.kernels.inverted_residual`.

Two ways of running a block, neither writing the depthwise result to memory:

* in two kernels: the expanded map is written once (:mod:`gpupipe.kernels.pointwise_triton`), and the second kernel sums
  the nine taps and feeds the sums to the projection's tensor cores;
* whole: the expansion is computed anew for each of the nine taps, on tensor cores, and never written. That is nine
  times (with stride 2, 2¼ times) the arithmetic for a fraction of the bytes, which pays where few channels come in.

Products are accumulated in float32; the nine taps of float16 in float16, two channels an instruction
(:mod:`gpupipe.kernels.packed_triton`).

Where the expanded map is read, a program makes four rows of output in a strip of columns, which are counted on through
the samples: it reads each of six rows of input (with stride 2, nine) once, at three shifts, and finds out once for all
rows and channels whether a column has neighbours. Of a whole block it makes a tile of pixels: 8×16 or 4×16 of them on
large maps, so that taps are shared in L1; on maps narrower than 64, whatever comes next in (sample, row, column) order,
so that no lane idles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.cubic_triton import INTERPRETED
from gpupipe.kernels.dispatch import on_its_device
from gpupipe.kernels.inverted_residual import Block, Projection
from gpupipe.kernels.packed_triton import multiply_add, multiply_add_relu, relu_to, summed_in


@triton.jit
def _output_pixels(tile, samples, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Pixels of a tile: the first one's sample, and each one's sample after that, row, column and whether it exists.

    Args:
        TILE: columns of a two-dimensional tile; 0 takes pixels as they come.
    """
    lane = tl.arange(0, BLOCK)
    if TILE == 0:
        pixel = tile * BLOCK + lane
        first = tile * BLOCK // (HEIGHT * WIDTH)
        sample = pixel // (HEIGHT * WIDTH) - first
        y = pixel % (HEIGHT * WIDTH) // WIDTH
        x = pixel % WIDTH
        inside = pixel < samples * (HEIGHT * WIDTH)
    else:
        columns = (WIDTH + TILE - 1) // TILE
        tiles = (HEIGHT + BLOCK // TILE - 1) // (BLOCK // TILE) * columns
        first = tile // tiles
        sample = tl.zeros_like(lane)
        y = tile % tiles // columns * (BLOCK // TILE) + lane // TILE
        x = tile % columns * TILE + lane % TILE
        inside = (y < HEIGHT) & (x < WIDTH)
    return first.to(tl.int64), sample, y, x, inside


@triton.jit
def _tap(sample, y, x, inside, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """A tap's pixel in the input, counted from the first sample's, and whether it is on the map."""
    at_y = y * STRIDE + (row - 1)
    at_x = x * STRIDE + (column - 1)
    exists = inside & (at_y >= 0) & (at_y < HEIGHT) & (at_x >= 0) & (at_x < WIDTH)
    return (sample * HEIGHT + at_y) * WIDTH + at_x, exists


@triton.jit
def _strip(samples, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a strip: the first one's sample, and each one's sample after that, column and whether it exists."""
    strip = tl.program_id(0)
    column = strip * COLUMNS + tl.arange(0, COLUMNS)
    first = strip * COLUMNS // WIDTH
    return first.to(tl.int64), column // WIDTH - first, column % WIDTH, column < samples * WIDTH


@triton.jit
def _three_taps(sums, left, middle, right, taps, row: tl.constexpr, HIDDEN: tl.constexpr):
    """``sums`` and the three products of a row of the window; after the last row ReLU, in the maps' type."""
    taps += row * 3 * HIDDEN
    sums = multiply_add(left, tl.load(taps)[None, :], sums)
    sums = multiply_add(middle, tl.load(taps + HIDDEN)[None, :], sums)
    last = tl.load(taps + 2 * HIDDEN)[None, :]
    if row == 2:
        return multiply_add_relu(right, last, sums, right.dtype)
    else:
        return multiply_add(right, last, sums)


@triton.jit
def _depthwise_rows(
    x,
    taps,
    bias,
    sample,
    y0,
    column,
    exists,
    channel,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """ReLU of the nine taps' sums of four rows of output from y0 on, each (columns, channels), in x's type.

    A row of input is read once, at its three shifts, and used for all rows of output that it is a tap of.
    """
    SUM: tl.constexpr = summed_in(x.dtype.element_ty)
    place = (sample * HEIGHT + y0 * STRIDE - 1) * WIDTH + column * STRIDE
    source = x + (place * HIDDEN)[:, None] + channel[None, :]
    left_exists = exists & (column > 0)
    right_exists = exists & (column * STRIDE + 1 < WIDTH)
    start = tl.zeros((column.shape[0], channel.shape[0]), SUM) + tl.load(bias + channel).to(SUM)[None, :]
    # Sums of the rows of output that a row of input is the bottom, the middle and the top of.
    ending = start
    going_on = start
    first = start
    second = start
    third = start
    fourth = start
    for row in tl.static_range(3 * STRIDE + 3):
        y = y0 * STRIDE - 1 + row
        on_map = (y >= 0) & (y < HEIGHT)
        at = source + row * WIDTH * HIDDEN
        left = tl.load(at - HIDDEN, mask=(left_exists & on_map)[:, None], other=0.0)
        middle = tl.load(at, mask=(exists & on_map)[:, None], other=0.0)
        right = tl.load(at + HIDDEN, mask=(right_exists & on_map)[:, None], other=0.0)
        if row >= 2 and row % STRIDE == 0:
            done = _three_taps(ending, left, middle, right, taps + channel, 2, HIDDEN)
            if row == 2:
                first = done
            elif row == STRIDE + 2:
                second = done
            elif row == 2 * STRIDE + 2:
                third = done
            else:
                fourth = done
        if STRIDE == 1 or row % 2 == 1:
            ending = _three_taps(going_on, left, middle, right, taps + channel, 1, HIDDEN)
        if row % STRIDE == 0:
            going_on = _three_taps(start, left, middle, right, taps + channel, 0, HIDDEN)
    return first, second, third, fourth


# A last batch is shorter: it must not be compiled for.
@triton.jit(do_not_specialize=["samples"])
def _depthwise_kernel(
    x,
    taps,
    bias,
    out,
    samples,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (strip, four rows, chunk)."""
    y0 = tl.program_id(1) * 4
    channel = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    first, sample, column, exists = _strip(samples, OUT_WIDTH, COLUMNS)
    source = x + first * (HEIGHT * WIDTH * HIDDEN)
    rows = _depthwise_rows(source, taps, bias, sample, y0, column, exists, channel, HEIGHT, WIDTH, HIDDEN, STRIDE)
    pixel = (sample * OUT_HEIGHT + y0) * OUT_WIDTH + column
    to = out + first * (OUT_HEIGHT * OUT_WIDTH * HIDDEN) + (pixel * HIDDEN)[:, None] + channel[None, :]
    for row in tl.static_range(4):
        inside = exists & (y0 + row < OUT_HEIGHT)
        tl.store(to + row * OUT_WIDTH * HIDDEN, rows[row], mask=inside[:, None])


@triton.jit(do_not_specialize=["samples"])
def _depthwise_project_kernel(
    x,
    taps,
    bias,
    project,
    project_bias,
    residual,
    out,
    samples,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (strip, four rows)."""
    y0 = tl.program_id(1) * 4
    first, sample, column, exists = _strip(samples, OUT_WIDTH, COLUMNS)
    source = x + first * (HEIGHT * WIDTH * HIDDEN)
    output = tl.arange(0, OUT)
    t0 = tl.zeros((COLUMNS, OUT), tl.float32) + tl.load(project_bias + output)[None, :]
    t1 = t0
    t2 = t0
    t3 = t0
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        r0, r1, r2, r3 = _depthwise_rows(
            source, taps, bias, sample, y0, column, exists, channel, HEIGHT, WIDTH, HIDDEN, STRIDE
        )
        matrix = tl.load(project + channel[:, None] * OUT + output[None, :])
        t0 = tl.dot(r0, matrix, t0)
        t1 = tl.dot(r1, matrix, t1)
        t2 = tl.dot(r2, matrix, t2)
        t3 = tl.dot(r3, matrix, t3)
    totals = (t0, t1, t2, t3)
    pixel = (sample * OUT_HEIGHT + y0) * OUT_WIDTH + column
    to = first * (OUT_HEIGHT * OUT_WIDTH * OUT) + (pixel * OUT)[:, None] + output[None, :]
    for row in tl.static_range(4):
        inside = (exists & (y0 + row < OUT_HEIGHT))[:, None]
        at = to + row * OUT_WIDTH * OUT
        total = totals[row]
        if residual is not None:
            total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples"])
def _whole_block_kernel(
    x,
    expand,
    expand_bias,
    weight,
    bias,
    project,
    project_bias,
    head,
    head_bias,
    out,
    samples,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    STORED: tl.constexpr,
    IN: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    first, sample, row, column, inside = _output_pixels(tl.program_id(0), samples, OUT_HEIGHT, OUT_WIDTH, BLOCK, TILE)
    source = x + first * (HEIGHT * WIDTH * STORED)
    k = tl.arange(0, IN)
    output = tl.arange(0, OUT)
    total = tl.zeros((BLOCK, OUT), tl.float32) + tl.load(project_bias + output)[None, :]
    half: tl.constexpr = x.dtype.element_ty
    SUM: tl.constexpr = summed_in(half)
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        matrix = tl.load(expand + k[:, None] * HIDDEN + channel[None, :])
        offset = tl.zeros((BLOCK, CHUNK), tl.float32) + tl.load(expand_bias + channel)[None, :]
        sums = tl.zeros((BLOCK, CHUNK), SUM) + tl.load(bias + channel).to(SUM)[None, :]
        for tap_row in range(3):
            for tap_column in tl.static_range(3):
                pixel, exists = _tap(sample, row, column, inside, tap_row, tap_column, HEIGHT, WIDTH, STRIDE)
                mask = exists[:, None]
                if STORED != IN:
                    mask = mask & (k < STORED)[None, :]
                values = tl.load(source + (pixel * STORED)[:, None] + k[None, :], mask=mask, other=0.0)
                # Beyond the map's edge the expanded map is 0, not ReLU of the bias.
                hidden = relu_to(tl.dot(values, matrix, offset), half)
                hidden = multiply_add(hidden, exists.to(half)[:, None], tl.zeros((BLOCK, CHUNK), SUM)).to(half)
                scale = tl.load(weight + (tap_row * 3 + tap_column) * HIDDEN + channel)
                sums = multiply_add(hidden, scale[None, :], sums)
        sums = tl.maximum(sums, 0.0).to(half)
        total = tl.dot(sums, tl.load(project + channel[:, None] * OUT + output[None, :]), total)
    pixel = (sample * OUT_HEIGHT + row) * OUT_WIDTH + column
    if RESIDUAL:
        to = (pixel * OUT)[:, None] + output[None, :]
        total += tl.load(source + to, mask=inside[:, None], other=0.0).to(tl.float32)
    if head is None:
        to = first * (OUT_HEIGHT * OUT_WIDTH * OUT) + (pixel * OUT)[:, None] + output[None, :]
        tl.store(out + to, total.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        colour = tl.arange(0, 16)
        matrix = tl.load(head + output[:, None] * 16 + colour[None, :])
        painted = tl.dot(total.to(x.dtype.element_ty), matrix) + tl.load(head_bias + colour)[None, :]
        painted = tl.sigmoid(painted)
        if out.dtype.element_ty == tl.uint8:
            painted = painted * 255.0
        area: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
        plane = sample * (3 * area) + row * OUT_WIDTH + column
        to = first * (3 * area) + plane[:, None] + (colour * area)[None, :]
        tl.store(out + to, painted.to(out.dtype.element_ty), mask=inside[:, None] & (colour < 3)[None, :])


class Tile(NamedTuple):
    """Output pixels (of a strip, columns) and hidden channels that a program has in its registers at a time; its warps.

    Those below are what compiles without spilling everywhere (:mod:`gpupipe.kernels.report`), by Triton 3.6 and 3.8.
    """

    block: int
    chunk: int
    warps: int = 4


def depthwise_tile(hidden: int) -> Tile:
    """Tile of the depthwise convolution alone."""
    return Tile(256, hidden) if INTERPRETED else Tile(32, min(hidden, 32))


def projection_tile(hidden: int, out: int) -> Tile:
    """Tile of depthwise and projection."""
    if INTERPRETED:  # its cost is by the program
        return Tile(min(1024, tl.TRITON_MAX_TENSOR_NUMEL // 4 // max(hidden, out)), hidden)
    if out > 64 and hidden <= 128:  # unrolled, the narrower strip spills
        return Tile(32, min(hidden, 64), 8)
    if out > 32:
        return Tile(16, min(hidden, 64))
    return Tile(32 if out > 16 else 64, min(hidden, 32))


def whole_tile(channels: int, hidden: int) -> Tile:
    """Tile of a whole block."""
    if INTERPRETED:
        return Tile(4096, hidden)
    if channels > 32:
        return Tile(64, 16, 8)
    if channels > 16:
        return Tile(64, min(hidden, 32))
    return {16: Tile(128, 16), 32: Tile(64, 32, 2)}.get(hidden, Tile(128, 32, 8))


def tile_width(width: int) -> int:
    """Columns of a two-dimensional tile on a map of ``width`` columns; 0: pixels as they come."""
    return 16 if width >= 64 else 0


def _launch_shape(shape: tuple[int, int, int], block: int) -> tuple[int, int]:
    """Tiles that cover (samples, height, width) of output, and the columns of one."""
    samples, height, width = shape
    columns = tile_width(width)
    if columns == 0:
        return triton.cdiv(samples * height * width, block), 0
    return samples * triton.cdiv(height, block // columns) * triton.cdiv(width, columns), columns


@on_its_device
def depthwise_triton(hidden: Tensor, taps: Tensor, bias: Tensor, *, stride: int = 1) -> Tensor:
    """Depthwise 3×3 convolution and ReLU alone: (B, H, W, C) → (B, ⌈H / stride⌉, ⌈W / stride⌉, C)."""
    samples, height, width, channels = hidden.shape
    shape = (samples, -(-height // stride), -(-width // stride))
    tile = depthwise_tile(channels)
    strips = triton.cdiv(samples * shape[2], tile.block)
    out = hidden.new_empty(*shape, channels)
    if samples:
        _depthwise_kernel[(strips, triton.cdiv(shape[1], 4), channels // tile.chunk)](
            hidden,
            taps,
            bias,
            out,
            samples,
            HEIGHT=height,
            WIDTH=width,
            OUT_HEIGHT=shape[1],
            OUT_WIDTH=shape[2],
            HIDDEN=channels,
            STRIDE=stride,
            COLUMNS=tile.block,
            CHUNK=tile.chunk,
            num_warps=tile.warps,
            num_stages=1,
        )
    return out


@on_its_device
def depthwise_project_triton(
    hidden: Tensor, projection: Projection, *, stride: int = 1, residual: Tensor | None = None
) -> Tensor:
    """As :func:`~gpupipe.kernels.inverted_residual.depthwise_project`, on the GPU, in half precision."""
    samples, height, width, channels = hidden.shape
    outputs = projection.project.shape[1]
    shape = (samples, -(-height // stride), -(-width // stride))
    tile = projection_tile(channels, outputs)
    strips = triton.cdiv(samples * shape[2], tile.block)
    out = hidden.new_empty(*shape, outputs)
    if samples:
        _depthwise_project_kernel[(strips, triton.cdiv(shape[1], 4))](
            hidden,
            *projection,
            residual,
            out,
            samples,
            HEIGHT=height,
            WIDTH=width,
            OUT_HEIGHT=shape[1],
            OUT_WIDTH=shape[2],
            HIDDEN=channels,
            OUT=outputs,
            STRIDE=stride,
            COLUMNS=tile.block,
            CHUNK=tile.chunk,
            num_warps=tile.warps,
            num_stages=1,
        )
    return out


@on_its_device
def whole_block_triton(
    x: Tensor,
    block: Block,
    *,
    stride: int = 1,
    residual: bool = False,
    head: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """As ``inverted_residual``, or with ``head`` as ``inverted_residual_head``, on the GPU, in half precision."""
    samples, height, width, stored = x.shape
    channels, hidden = block.expand.shape
    outputs = block.projection.project.shape[1]
    shape = (samples, -(-height // stride), -(-width // stride))
    tile = whole_tile(channels, hidden)
    tiles, columns = _launch_shape(shape, tile.block)
    out = x.new_empty(*shape, outputs) if head is None else x.new_empty(samples, 3, *shape[1:], dtype=dtype)
    if samples:
        _whole_block_kernel[(tiles,)](
            x,
            block.expand,
            block.expand_bias,
            *block.projection,
            *(head or (None, None)),
            out,
            samples,
            HEIGHT=height,
            WIDTH=width,
            OUT_HEIGHT=shape[1],
            OUT_WIDTH=shape[2],
            STORED=stored,
            IN=channels,
            HIDDEN=hidden,
            OUT=outputs,
            STRIDE=stride,
            RESIDUAL=residual,
            BLOCK=tile.block,
            CHUNK=tile.chunk,
            TILE=columns,
            num_warps=tile.warps,
            num_stages=1,
        )
    return out
