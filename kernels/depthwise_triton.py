"""Triton kernels of :mod:`gpupipe.kernels.inverted_residual`: a block from its expanded map on, where that is written.

One is the depthwise convolution alone. The other projects too: it feeds the sums of the nine taps to the tensor cores
and never writes them.

A program makes four rows of output in a strip of columns; columns are numbered through all samples. It reads each of
six rows of input (with stride 2, nine) once, at three shifts, and tests once for all rows and channels whether a column
has neighbours. Programs of a strip follow each other, top down, so that a row which two of them read comes from caches
the second time. Products are accumulated in float32; the nine taps of float16 in float16, two channels an instruction
(:mod:`gpupipe.kernels.packed_triton`).

:mod:`gpupipe.kernels.inverted_residual_triton` goes over its maps in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.kernels.inverted_residual import Projection
from gpupipe.kernels.launch_triton import launch
from gpupipe.kernels.packed_triton import accumulator_dtype, multiply_add, multiply_add_relu, relu_to


@triton.jit
def strip_columns(samples, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's first sample, and its place: each column's sample counted from that, column in the map, and whether
    it exists; the first of its four rows."""
    strip = tl.program_id(1)
    column = strip * COLUMNS + tl.arange(0, COLUMNS)
    first = strip * COLUMNS // WIDTH
    place = (column // WIDTH - first, column % WIDTH, column < samples * WIDTH, tl.program_id(0) * 4)
    return first.to(tl.int64), place


@triton.jit
def _three_taps(sums, left, middle, right, taps, row: tl.constexpr, HIDDEN: tl.constexpr):
    """``sums`` plus the three products of a row of the window; after the last row ReLU, in the maps' type."""
    taps += row * 3 * HIDDEN
    sums = multiply_add(left, tl.load(taps)[None, :], sums)
    sums = multiply_add(middle, tl.load(taps + HIDDEN)[None, :], sums)
    last = tl.load(taps + 2 * HIDDEN)[None, :]
    if row == 2:
        return multiply_add_relu(right, last, sums, right.dtype)
    else:
        return multiply_add(right, last, sums)


@triton.jit
def _expanded(at, exists, on_map, expansion, STORED: tl.constexpr, EDGE: tl.constexpr):
    """A row of the expanded map, (columns, channels), 0 beyond the map: read, or computed from the block's input.

    Args:
        at: pointers (columns, channels that are read).
        exists, on_map: whether the column, and the row, is on the map.
        expansion: matrix (C, channels) and bias of the expansion, or None.
        EDGE: columns of the output may lack this one.
    """
    mask = (exists & on_map)[:, None]
    if expansion is None:
        return tl.load(at, mask=mask, other=0.0)
    else:
        matrix, offset = expansion
        if matrix.shape[0] != STORED:
            mask = mask & (tl.arange(0, matrix.shape[0]) < STORED)[None, :]
        values = tl.load(at, mask=mask, other=0.0)
        # Beyond the map there is 0, not ReLU of the bias: a row lacks the bias, and columns are multiplied by 0.
        start = tl.zeros((at.shape[0], matrix.shape[1]), tl.float32) + tl.where(on_map, offset, 0.0)[None, :]
        hidden = relu_to(tl.dot(values, matrix, start), values.dtype)
        if EDGE:
            nothing = tl.zeros(hidden.shape, accumulator_dtype(values.dtype))
            hidden = multiply_add(hidden, exists.to(values.dtype)[:, None], nothing).to(values.dtype)
        return hidden


@triton.jit
def _projected(row, project, total):
    """``total`` plus the projection of ``row``; without one, the row."""
    if project is None:
        return row
    else:
        return tl.dot(row, project, total)


@triton.jit
def depthwise_rows(
    x,
    expansion,
    taps,
    bias,
    place,
    channel,
    project,
    totals,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """ReLU of the nine taps' sums, for four rows of output, each (columns, channels), in x's type.

    A row of the expanded map is read, or computed, once at its three shifts, and used for every row of output whose
    window it is in.

    Args:
        x: the expanded map, or with ``expansion`` what it is computed from.
        expansion: matrix (C, channels) and bias of the expansion, or None.
        place: as :func:`strip_columns` gives it.
        project, totals: the projection (channels, N) and four rows (columns, N), float32, to which the products are
            added; then these are returned. None returns the rows themselves.
    """
    sample, column, exists, y0 = place
    SUM: tl.constexpr = accumulator_dtype(x.dtype.element_ty)
    first_pixel = (sample * HEIGHT + y0 * STRIDE - 1) * WIDTH + column * STRIDE
    read = channel if expansion is None else tl.arange(0, expansion[0].shape[0])
    source = x + (first_pixel * STORED)[:, None] + read[None, :]
    left_exists = exists & (column > 0)
    right_exists = exists & (column * STRIDE + 1 < WIDTH)
    start = tl.zeros((column.shape[0], channel.shape[0]), SUM) + tl.load(bias + channel).to(SUM)[None, :]
    # Sums of a window's upper two rows, and of its upper one, as far as the input has been read.
    two_rows = start
    one_row = start
    first = start if project is None else totals[0]
    second = start if project is None else totals[1]
    third = start if project is None else totals[2]
    fourth = start if project is None else totals[3]
    for row in tl.static_range(3 * STRIDE + 3):
        y = y0 * STRIDE - 1 + row
        on_map = (y >= 0) & (y < HEIGHT)
        at = source + row * WIDTH * STORED
        left = _expanded(at - STORED, left_exists, on_map, expansion, STORED, True)
        middle = _expanded(at, exists, on_map, expansion, STORED, False)
        right = _expanded(at + STORED, right_exists, on_map, expansion, STORED, True)
        if row >= 2 and row % STRIDE == 0:
            done = _three_taps(two_rows, left, middle, right, taps + channel, 2, HIDDEN)
            if row == 2:
                first = _projected(done, project, first)
            elif row == STRIDE + 2:
                second = _projected(done, project, second)
            elif row == 2 * STRIDE + 2:
                third = _projected(done, project, third)
            else:
                fourth = _projected(done, project, fourth)
        if STRIDE == 1 or row % 2 == 1:
            two_rows = _three_taps(one_row, left, middle, right, taps + channel, 1, HIDDEN)
        if row % STRIDE == 0:
            one_row = _three_taps(start, left, middle, right, taps + channel, 0, HIDDEN)
    return first, second, third, fourth


# The last batch may be shorter: that must not compile the kernel again.
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
    """Program (four rows, strip, chunk)."""
    channel = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    first, place = strip_columns(samples, OUT_WIDTH, COLUMNS)
    source = x + first * (HEIGHT * WIDTH * HIDDEN)
    rows = depthwise_rows(source, None, taps, bias, place, channel, None, None, HEIGHT, WIDTH, HIDDEN, HIDDEN, STRIDE)
    sample, column, exists, y0 = place
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
    """Program (four rows, strip)."""
    first, place = strip_columns(samples, OUT_WIDTH, COLUMNS)
    source = x + first * (HEIGHT * WIDTH * HIDDEN)
    output = tl.arange(0, OUT)
    total = tl.zeros((COLUMNS, OUT), tl.float32) + tl.load(project_bias + output)[None, :]
    totals = (total, total, total, total)
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        matrix = tl.load(project + channel[:, None] * OUT + output[None, :])
        totals = depthwise_rows(
            source, None, taps, bias, place, channel, matrix, totals, HEIGHT, WIDTH, HIDDEN, HIDDEN, STRIDE
        )
    sample, column, exists, y0 = place
    pixel = (sample * OUT_HEIGHT + y0) * OUT_WIDTH + column
    to = first * (OUT_HEIGHT * OUT_WIDTH * OUT) + (pixel * OUT)[:, None] + output[None, :]
    for row in tl.static_range(4):
        inside = (exists & (y0 + row < OUT_HEIGHT))[:, None]
        at = to + row * OUT_WIDTH * OUT
        total = totals[row]
        if residual is not None:
            total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    """Columns of a strip and hidden channels that a program has in its registers at a time; its warps.

    Those below compile without spills for every architecture (:mod:`gpupipe.kernels.report`) by Triton 3.8 and by 3.6.
    """

    columns: int
    chunk: int
    warps: int = 4


def depthwise_tile(hidden: int) -> Tile:
    """Tile of :func:`depthwise_triton`."""
    return Tile(256, hidden) if INTERPRETED else Tile(32, min(hidden, 32))


def projection_tile(hidden: int, out: int) -> Tile:
    """Tile of :func:`depthwise_project_triton`."""
    if INTERPRETED:  # its cost is per program
        return Tile(min(1024, tl.TRITON_MAX_TENSOR_NUMEL // 4 // max(hidden, out)), hidden)
    if out > 64 and hidden <= 128:  # with the narrower strip the unrolled loop spills
        return Tile(32, min(hidden, 64), 8)
    if out > 32:
        return Tile(16, min(hidden, 64))
    return Tile(32 if out > 16 else 64, min(hidden, 32))


def chunk_of(tile: Tile, dtype: torch.dtype) -> int:
    """Hidden channels at a time: half of the tile's where nine taps are added up in float32, in twice the registers."""
    return tile.chunk if dtype == torch.float16 or INTERPRETED else max(16, tile.chunk // 2)


def depthwise_triton(hidden: Tensor, taps: Tensor, bias: Tensor, *, stride: int = 1) -> Tensor:
    """Depthwise 3×3 convolution and ReLU alone: (B, H, W, C) → (B, ⌈H / stride⌉, ⌈W / stride⌉, C)."""
    samples, height, width, channels = hidden.shape
    shape = (samples, -(-height // stride), -(-width // stride))
    tile = depthwise_tile(channels)
    strips = triton.cdiv(samples * shape[2], tile.columns)
    out = hidden.new_empty(*shape, channels)
    if samples:
        launch(
            _depthwise_kernel,
            (triton.cdiv(shape[1], 4), strips, channels // tile.chunk),
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
            COLUMNS=tile.columns,
            CHUNK=tile.chunk,
            num_warps=tile.warps,
            num_stages=1,
        )
    return out


def depthwise_project_triton(
    hidden: Tensor, projection: Projection, *, stride: int = 1, residual: Tensor | None = None
) -> Tensor:
    """As :func:`~gpupipe.kernels.inverted_residual.depthwise_project`, on the GPU, in half precision."""
    samples, height, width, channels = hidden.shape
    outputs = projection.project.shape[1]
    shape = (samples, -(-height // stride), -(-width // stride))
    tile = projection_tile(channels, outputs)
    strips = triton.cdiv(samples * shape[2], tile.columns)
    out = hidden.new_empty(*shape, outputs)
    if samples:
        launch(
            _depthwise_project_kernel,
            (triton.cdiv(shape[1], 4), strips),
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
            COLUMNS=tile.columns,
            CHUNK=chunk_of(tile, hidden.dtype),
            num_warps=tile.warps,
            num_stages=1,
        )
    return out
