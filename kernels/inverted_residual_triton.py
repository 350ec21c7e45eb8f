"""Triton kernel of :mod:`gpupipe.kernels.inverted_residual`: a whole block, with or without the network's head.

The expansion is computed anew for each of the nine taps, on tensor cores, and never written. That is nine times (with
stride 2, 2¼ times) the arithmetic for a fraction of the bytes, which pays where few channels come in. Other blocks
run on :mod:`gpupipe.kernels.pointwise_triton` and :mod:`gpupipe.kernels.depthwise_triton`.

Products are accumulated in float32; the nine taps of float16 in float16, two channels an instruction
(:mod:`gpupipe.kernels.packed_triton`).

A program makes a tile of pixels: 8×16 or 4×16 of them on large maps, so that taps are shared in L1; on maps narrower
than 64, consecutive ones in (sample, row, column) order, so that no lane idles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.kernels.dispatch import on_its_device
from gpupipe.kernels.inverted_residual import Block
from gpupipe.kernels.packed_triton import accumulator_dtype, multiply_add, relu_to, sigmoid


@triton.jit
def _output_pixels(tile, samples, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The first pixel's sample; each pixel's sample counted from that, row, column, and whether it exists.

    Args:
        TILE: columns of a two-dimensional tile; 0 takes consecutive pixels.
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


@triton.jit(do_not_specialize=["samples"])
def _inverted_residual_kernel(
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
    SUM: tl.constexpr = accumulator_dtype(half)
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
        colour = tl.arange(0, 8)  # of the 16 columns: three colours, and no more than the narrowest product needs
        matrix = tl.load(head + output[:, None] * 16 + colour[None, :])
        painted = tl.dot(total.to(x.dtype.element_ty), matrix) + tl.load(head_bias + colour)[None, :]
        painted = sigmoid(painted)
        if out.dtype.element_ty == tl.uint8:
            painted = painted * 255.0
        area: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
        plane = sample * (3 * area) + row * OUT_WIDTH + column
        to = first * (3 * area) + plane[:, None] + (colour * area)[None, :]
        tl.store(out + to, painted.to(out.dtype.element_ty), mask=inside[:, None] & (colour < 3)[None, :])


class Tile(NamedTuple):
    """Pixels and hidden channels that a program has in its registers at a time; its warps.

    As in :mod:`gpupipe.kernels.depthwise_triton`, what compiles without spills for every architecture.
    """

    pixels: int
    chunk: int
    warps: int = 4


def block_tile(channels: int, hidden: int) -> Tile:
    """Tile of :func:`inverted_residual_triton`."""
    if INTERPRETED:
        return Tile(4096, hidden)
    if channels > 32:
        return Tile(64, 16, 8)
    if channels > 16:
        return Tile(64, min(hidden, 32))
    return {16: Tile(128, 16), 32: Tile(64, 32, 2)}.get(hidden, Tile(128, 32, 8))


def _launch_shape(shape: tuple[int, int, int], block: int) -> tuple[int, int]:
    """Tiles that cover (samples, height, width) of output, and the columns of one; 0 takes consecutive pixels."""
    samples, height, width = shape
    if width < 64:
        return triton.cdiv(samples * height * width, block), 0
    columns = 16
    return samples * triton.cdiv(height, block // columns) * triton.cdiv(width, columns), columns


@on_its_device
def inverted_residual_triton(
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
    tile = block_tile(channels, hidden)
    tiles, columns = _launch_shape(shape, tile.pixels)
    out = x.new_empty(*shape, outputs) if head is None else x.new_empty(samples, 3, *shape[1:], dtype=dtype)
    if samples:
        _inverted_residual_kernel[(tiles,)](
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
            BLOCK=tile.pixels,
            CHUNK=tile.chunk,
            TILE=columns,
            num_warps=tile.warps,
            num_stages=1,
        )
    return out
