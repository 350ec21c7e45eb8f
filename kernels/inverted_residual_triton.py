"""Triton kernel of :mod:`gpupipe.kernels.inverted_residual`: a whole block, with or without the network's head.

It goes over the map as the kernels of :mod:`gpupipe.kernels.depthwise_triton` do, but the expanded map is never
written: each row of it is computed on tensor cores where it is used, at its three shifts. For four rows of output that
is 4½ times (with stride 2, 1.7 times) the arithmetic for a fraction of the bytes, which pays where few channels come
in. Other blocks run on :mod:`gpupipe.kernels.pointwise_triton` and :mod:`gpupipe.kernels.depthwise_triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.kernels.depthwise_triton import Tile, chunk_of, depthwise_rows, strip_columns
from gpupipe.kernels.inverted_residual import Block
from gpupipe.kernels.launch_triton import launch
from gpupipe.kernels.packed_triton import sigmoid


# The last batch may be shorter: that must not compile the kernel again.
@triton.jit(do_not_specialize=["samples"])
def _inverted_residual_kernel(
    x,
    expand,
    expand_bias,
    taps,
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
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (four rows, strip)."""
    first, place = strip_columns(samples, OUT_WIDTH, COLUMNS)
    source = x + first * (HEIGHT * WIDTH * STORED)
    k = tl.arange(0, IN)
    output = tl.arange(0, OUT)
    total = tl.zeros((COLUMNS, OUT), tl.float32) + tl.load(project_bias + output)[None, :]
    totals = (total, total, total, total)
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        matrix = tl.load(expand + k[:, None] * HIDDEN + channel[None, :])
        expansion = (matrix, tl.load(expand_bias + channel))
        projection = tl.load(project + channel[:, None] * OUT + output[None, :])
        totals = depthwise_rows(
            source, expansion, taps, bias, place, channel, projection, totals, HEIGHT, WIDTH, STORED, HIDDEN, STRIDE
        )
    sample, column, exists, y0 = place
    pixel = (sample * OUT_HEIGHT + y0) * OUT_WIDTH + column
    half: tl.constexpr = x.dtype.element_ty
    area: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    for row in tl.static_range(4):
        inside = (exists & (y0 + row < OUT_HEIGHT))[:, None]
        total = totals[row]
        to = ((pixel + row * OUT_WIDTH) * OUT)[:, None] + output[None, :]
        if RESIDUAL:
            total += tl.load(source + to, mask=inside, other=0.0).to(tl.float32)
        if head is None:
            tl.store(out + first * (area * OUT) + to, total.to(out.dtype.element_ty), mask=inside)
        else:
            colour = tl.arange(0, 8)  # of the 16 columns: three colours, and no more than the narrowest product needs
            matrix = tl.load(head + output[:, None] * 16 + colour[None, :])
            painted = sigmoid(tl.dot(total.to(half), matrix) + tl.load(head_bias + colour)[None, :])
            if out.dtype.element_ty == tl.uint8:
                painted = painted * 255.0
            plane = sample * (3 * area) + (y0 + row) * OUT_WIDTH + column
            to = first * (3 * area) + plane[:, None] + (colour * area)[None, :]
            tl.store(out + to, painted.to(out.dtype.element_ty), mask=inside & (colour < 3)[None, :])


def block_tile(channels: int, hidden: int, outputs: int) -> Tile:
    """Tile of :func:`inverted_residual_triton`."""
    if INTERPRETED:
        return Tile(1024, hidden)
    if channels > 32:
        return Tile(16, 32, 4)
    if channels > 16:
        return Tile(32, 32, 4) if outputs > 32 else Tile(16, 32, 2)
    return Tile(32, hidden if hidden <= 32 else 16, 2)


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
    tile = block_tile(channels, hidden, outputs)
    strips = triton.cdiv(samples * shape[2], tile.columns)
    out = x.new_empty(*shape, outputs) if head is None else x.new_empty(samples, 3, *shape[1:], dtype=dtype)
    if samples:
        launch(
            _inverted_residual_kernel,
            (triton.cdiv(shape[1], 4), strips),
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
            COLUMNS=tile.columns,
            CHUNK=chunk_of(tile, x.dtype),
            num_warps=tile.warps,
            num_stages=1,
        )
    return out
