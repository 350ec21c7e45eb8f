"""Triton kernels of :mod:`gpupipe.kernels.inverted_residual`.

Two ways of running a block, both accumulating in float32 and neither writing the depthwise result to memory:

* in two kernels: the expanded map is written once (:mod:`gpupipe.kernels.pointwise_triton`), and the second kernel
  reads its nine taps through L1, sums them, and feeds the sums to the projection's tensor cores;
* whole: the expansion is computed anew for each of the nine taps, on tensor cores, and never written. That is nine
  times (with stride 2, 2¼ times) the arithmetic for a fraction of the bytes, which pays where few channels come in.

A program makes a tile of output pixels: 8×16 or 4×16 of them on large maps, so that taps are shared in L1; on maps
narrower than 64, whatever comes next in (sample, row, column) order, so that no lane idles.
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
def _depthwise_sums(
    x,
    weight,
    bias,
    channel,
    place,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ReLU of the nine taps' sum, float32 (BLOCK, CHUNK)."""
    total = tl.zeros((BLOCK, CHUNK), tl.float32) + tl.load(bias + channel)[None, :]
    # A real loop over the rows: unrolled ninefold, the loads of all taps would be hoisted, and registers run out.
    for row in range(3):
        for column in tl.static_range(3):
            pixel, exists = _tap(place[0], place[1], place[2], place[3], row, column, HEIGHT, WIDTH, STRIDE)
            values = tl.load(x + (pixel * HIDDEN)[:, None] + channel[None, :], mask=exists[:, None], other=0.0)
            scale = tl.load(weight + (row * 3 + column) * HIDDEN + channel)
            total += values.to(tl.float32) * scale.to(tl.float32)[None, :]
    return tl.maximum(total, 0.0)


# A last batch is shorter: it must not be compiled for.
@triton.jit(do_not_specialize=["samples"])
def _depthwise_kernel(
    x,
    weight,
    bias,
    out,
    samples,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    chunks: tl.constexpr = HIDDEN // CHUNK
    channel = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    first, sample, row, column, inside = _output_pixels(
        tl.program_id(0) // chunks, samples, OUT_HEIGHT, OUT_WIDTH, BLOCK, TILE
    )
    source = x + first * (HEIGHT * WIDTH * HIDDEN)
    place = (sample, row, column, inside)
    total = _depthwise_sums(source, weight, bias, channel, place, HEIGHT, WIDTH, HIDDEN, STRIDE, BLOCK, CHUNK)
    pixel = (sample * OUT_HEIGHT + row) * OUT_WIDTH + column
    to = out + first * (OUT_HEIGHT * OUT_WIDTH * HIDDEN) + (pixel * HIDDEN)[:, None] + channel[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["samples"])
def _depthwise_project_kernel(
    x,
    weight,
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
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    first, sample, row, column, inside = _output_pixels(tl.program_id(0), samples, OUT_HEIGHT, OUT_WIDTH, BLOCK, TILE)
    source = x + first * (HEIGHT * WIDTH * HIDDEN)
    place = (sample, row, column, inside)
    output = tl.arange(0, OUT)
    total = tl.zeros((BLOCK, OUT), tl.float32) + tl.load(project_bias + output)[None, :]
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        sums = _depthwise_sums(source, weight, bias, channel, place, HEIGHT, WIDTH, HIDDEN, STRIDE, BLOCK, CHUNK)
        matrix = tl.load(project + channel[:, None] * OUT + output[None, :])
        total = tl.dot(sums.to(x.dtype.element_ty), matrix, total)
    pixel = (sample * OUT_HEIGHT + row) * OUT_WIDTH + column
    to = first * (OUT_HEIGHT * OUT_WIDTH * OUT) + (pixel * OUT)[:, None] + output[None, :]
    if residual is not None:
        total += tl.load(residual + to, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside[:, None])


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
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        matrix = tl.load(expand + k[:, None] * HIDDEN + channel[None, :])
        offset = tl.load(expand_bias + channel)[None, :]
        sums = tl.zeros((BLOCK, CHUNK), tl.float32) + tl.load(bias + channel)[None, :]
        for tap_row in range(3):
            for tap_column in tl.static_range(3):
                pixel, exists = _tap(sample, row, column, inside, tap_row, tap_column, HEIGHT, WIDTH, STRIDE)
                mask = exists[:, None]
                if STORED != IN:
                    mask = mask & (k < STORED)[None, :]
                values = tl.load(source + (pixel * STORED)[:, None] + k[None, :], mask=mask, other=0.0)
                # Beyond the map's edge the expanded map is 0, not ReLU of the bias.
                hidden = tl.dot(values, matrix, tl.where(exists[:, None], offset, 0.0))
                scale = tl.load(weight + (tap_row * 3 + tap_column) * HIDDEN + channel)
                sums += tl.maximum(hidden, 0.0) * scale.to(tl.float32)[None, :]
        sums = tl.maximum(sums, 0.0).to(x.dtype.element_ty)
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
    """Output pixels and hidden channels that a program has in its registers at a time, and its warps.

    Those below are what compiles without spilling everywhere (:mod:`gpupipe.kernels.report`), by Triton 3.6 and 3.8.
    """

    block: int
    chunk: int
    warps: int = 4


def depthwise_tile(hidden: int) -> Tile:
    """Tile of the depthwise convolution alone."""
    return Tile(256, hidden) if INTERPRETED else Tile(64, min(hidden, 64))


def projection_tile(hidden: int, out: int) -> Tile:
    """Tile of depthwise and projection."""
    if INTERPRETED:  # its cost is by the program
        return Tile(min(4096, tl.TRITON_MAX_TENSOR_NUMEL // max(hidden, out)), hidden)
    if out <= 32:
        return Tile(128, min(hidden, 64), 8)
    return Tile(64, min(hidden, 32), 8 if out > 64 else 4)


def whole_tile(channels: int, hidden: int) -> Tile:
    """Tile of a whole block."""
    if INTERPRETED:
        return Tile(4096, hidden)
    if channels > 32:
        return Tile(64, 16, 8)
    return Tile(128 if channels <= 16 else 64, min(hidden, 32))


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
    tiles, columns = _launch_shape(shape, tile.block)
    out = hidden.new_empty(*shape, channels)
    if samples:
        _depthwise_kernel[(tiles * (channels // tile.chunk),)](
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
            BLOCK=tile.block,
            CHUNK=tile.chunk,
            TILE=columns,
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
    tiles, columns = _launch_shape(shape, tile.block)
    out = hidden.new_empty(*shape, outputs)
    if samples:
        _depthwise_project_kernel[(tiles,)](
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
            BLOCK=tile.block,
            CHUNK=tile.chunk,
            TILE=columns,
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
