"""Inverted residuals, the block that the U-Net is made of, with batch norms folded.

    x (B, H, W, C) ── 1×1 expand, ReLU ── 3×3 depthwise, stride 1 or 2, ReLU ── 1×1 project ──(+ x)── out (B, H', W', N)
                                                                                       └── optionally the 1×1 head,
                                                                                  sigmoid, × 255: mouth (B, 3, H, W)

The expanded map has twice as many channels as x, and is the largest tensor of the network by far. It is handled in
three ways:

* where few channels come in, the block is one kernel that computes each row of it, three times, where it is used;
* elsewhere the map is written once, and read once by a kernel that also projects;
* where many channels come out (the lowest maps, which are small), the depthwise sums are written too.

:func:`expansion_is_recomputed` draws the first line, :data:`WIDEST_PROJECTION` the second.

Convention: as in :mod:`gpupipe.kernels.pointwise`; the depthwise taps are (9, channels), row by row. Beyond the map's
edge the *expanded* map is 0. Sums are accumulated in float32, except for nine taps of float16 on CUDA: in float16.
The reference rounds the expanded map and the depthwise sums to the inputs' precision; a kernel that does not write one
of them need not round it.

Here are the public functions and their plain-torch reference; on CUDA, in half precision, they run on
:mod:`gpupipe.kernels.inverted_residual_triton` and :mod:`gpupipe.kernels.depthwise_triton`.

There are two families of block kernels: this one, in plain Triton, runs every block in either half precision;
:mod:`gpupipe.kernels.whole_block`, in Gluon and float16 alone, keeps the expanded map of large ones on chip instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from gpupipe.kernels.dispatch import backend
from gpupipe.kernels.pointwise import accumulating, padded, pointwise, require_contiguous

WIDEST_PROJECTION = 128
"""Output channels up to which depthwise sums go straight into the projection: its accumulators fill the registers."""


class Projection(NamedTuple):
    """The depthwise convolution and the projection: the part of a block after its expansion.

    Attributes:
        depthwise: (9, H), taps row by row.
        depthwise_bias: float32 (H,).
        project: (H, N).
        project_bias: float32 (N,).
    """

    depthwise: Tensor
    depthwise_bias: Tensor
    project: Tensor
    project_bias: Tensor


class Block(NamedTuple):
    """An inverted residual, packed.

    Attributes:
        expand: (C, H).
        expand_bias: float32 (H,).
        projection: what follows.
    """

    expand: Tensor
    expand_bias: Tensor
    projection: Projection


def pack_pointwise(layer: nn.Conv2d, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A 1×1 convolution's matrix (C, N) and bias, padded with zeros to :func:`padded` channels."""
    matrix = layer.weight.detach()[:, :, 0, 0].T
    rows, columns = padded(matrix.shape[0]) - matrix.shape[0], padded(matrix.shape[1]) - matrix.shape[1]
    bias = matrix.new_zeros(matrix.shape[1]) if layer.bias is None else layer.bias.detach()
    matrix = pad(matrix, (0, columns, 0, rows)).to(device, dtype).contiguous()
    return matrix, pad(bias, (0, columns)).to(device, torch.float32)


def pack_depthwise(layer: nn.Conv2d, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A depthwise 3×3 convolution's taps (9, H) and bias, padded with zeros to :func:`padded` channels."""
    if layer.kernel_size != (3, 3) or layer.groups != layer.out_channels or layer.bias is None:
        raise ValueError(f"got {layer}; expected a depthwise 3×3 convolution with a bias")
    taps, columns = layer.weight.detach().flatten(1).T, padded(layer.out_channels) - layer.out_channels
    taps = pad(taps, (0, columns)).to(device, dtype).contiguous()
    return taps, pad(layer.bias.detach(), (0, columns)).to(device, torch.float32)


def pack_projection(layers: Sequence[nn.Conv2d], *, device: torch.device, dtype: torch.dtype) -> Projection:
    """Pack a folded depthwise convolution and the projection after it."""
    depthwise, project = layers
    packed = pack_depthwise(depthwise, device=device, dtype=dtype)
    return Projection(*packed, *pack_pointwise(project, device=device, dtype=dtype))


def pack_block(layers: Sequence[nn.Conv2d], *, device: torch.device, dtype: torch.dtype) -> Block:
    """Pack the three folded convolutions of an inverted residual."""
    expand, *rest = layers
    packed = pack_pointwise(expand, device=device, dtype=dtype)
    return Block(*packed, pack_projection(rest, device=device, dtype=dtype))


def inverted_residual(x: Tensor, block: Block, *, stride: int = 1, residual: bool = False) -> Tensor:
    """An inverted residual.

    Args:
        x: (B, H, W, C'), C' ≤ the block's C.
        block: from :func:`pack_block`.
        stride: of the depthwise convolution, 1 or 2.
        residual: add x; the stride is 1 and the shapes agree.

    Returns:
        (B, ⌈H / stride⌉, ⌈W / stride⌉, N).

    Raises:
        ValueError: shapes that do not fit each other, or a map that is not contiguous.
    """
    _check(x, block, stride, residual)
    if backend(x.device) == "triton" and expansion_is_recomputed(block, stride):
        from gpupipe.kernels.inverted_residual_triton import inverted_residual_triton

        return inverted_residual_triton(x, block, stride=stride, residual=residual)
    hidden = pointwise(x, block.expand, block.expand_bias, relu=True)
    return depthwise_project(hidden, block.projection, stride=stride, residual=x if residual else None)


def inverted_residual_head(
    x: Tensor,
    block: Block,
    head: Tensor,
    head_bias: Tensor,
    *,
    residual: bool = False,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """An inverted residual of stride 1, the network's 1×1 head and its sigmoid.

    Args:
        x: (B, H, W, C).
        block: from :func:`pack_block`.
        head: (N, 16); the first three columns are the colours.
        head_bias: float32 (16,).
        residual: add x before the head.
        dtype: of the result. uint8 scales by 255 and truncates.

    Returns:
        (B, 3, H, W): in [0, 1], or uint8.

    Raises:
        ValueError: shapes that do not fit each other, or a map that is not contiguous.
    """
    _check(x, block, 1, residual)
    if backend(x.device) == "triton" and expansion_is_recomputed(block, 1):
        from gpupipe.kernels.inverted_residual_triton import inverted_residual_triton

        return inverted_residual_triton(x, block, residual=residual, head=(head, head_bias), dtype=dtype)
    out = inverted_residual(x, block, residual=residual)
    painted = (accumulating(out) @ accumulating(head[:, :3]) + head_bias[:3]).sigmoid().permute(0, 3, 1, 2)
    return (painted * 255).to(dtype) if dtype == torch.uint8 else painted.to(dtype)


def depthwise_project(
    hidden: Tensor, projection: Projection, *, stride: int = 1, residual: Tensor | None = None
) -> Tensor:
    """The rest of a block after its expansion: depthwise convolution, ReLU, projection.

    Args:
        hidden: (B, H, W, channels), after its ReLU.
        projection: from :func:`pack_projection`.
        stride: of the depthwise convolution, 1 or 2.
        residual: of the result's shape, added to it.

    Returns:
        (B, ⌈H / stride⌉, ⌈W / stride⌉, N).

    Raises:
        ValueError: shapes that do not fit each other, or a map that is not contiguous.
    """
    taps, bias, project, project_bias = projection
    if hidden.ndim != 4 or hidden.shape[3] != taps.shape[1]:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (B, H, W, {taps.shape[1]})")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}; expected 1 or 2")
    shape = (len(hidden), *(-(-side // stride) for side in hidden.shape[1:3]), project.shape[1])
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {shape}")
    require_contiguous(hidden=hidden, residual=residual)
    if backend(hidden.device) == "triton":
        from gpupipe.kernels.depthwise_triton import depthwise_project_triton, depthwise_triton

        if project.shape[1] <= WIDEST_PROJECTION:
            return depthwise_project_triton(hidden, projection, stride=stride, residual=residual)
        return pointwise(depthwise_triton(hidden, taps, bias, stride=stride), project, project_bias, residual=residual)
    kernels = accumulating(taps).T.reshape(-1, 1, 3, 3)
    planes = accumulating(hidden).permute(0, 3, 1, 2)
    sums = conv2d(planes, kernels, bias.to(planes.dtype), stride=stride, padding=1, groups=len(kernels)).relu()
    sums = sums.permute(0, 2, 3, 1).to(hidden.dtype).contiguous()
    return pointwise(sums, project, project_bias, residual=residual)


def expansion_is_recomputed(block: Block, stride: int) -> bool:
    """Whether the block is one kernel.

    The expansion then takes 4½ times its arithmetic, with stride 2, 1.7 times. With so few channels that takes less
    time than writing and reading the expanded map, as far as bytes and instructions can tell.
    """
    channels, outputs = len(block.expand), block.projection.project.shape[1]
    return channels <= (32 if stride == 1 else 64) and outputs <= WIDEST_PROJECTION


def bytes_moved(size: int, block: Block, *, stride: int = 1, residual: bool = False) -> int:
    """Bytes that a block moves for one square map of ``size`` pixels a side in half precision: read once, written once.

    Weights are shared by a batch and left out.
    """
    pixels, outputs = size**2, (-(-size // stride)) ** 2
    channels, hidden = block.expand.shape
    moved = pixels * channels + outputs * block.projection.project.shape[1]
    if not expansion_is_recomputed(block, stride):
        moved += 2 * pixels * hidden + (outputs * block.projection.project.shape[1] if residual else 0)
    return 2 * moved


def _check(x: Tensor, block: Block, stride: int, residual: bool) -> None:
    channels, outputs = len(block.expand), block.projection.project.shape[1]
    if x.ndim != 4 or x.shape[3] > channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, H, W, at most {channels})")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}; expected 1 or 2")
    if residual and (stride != 1 or x.shape[3] != outputs):
        raise ValueError(
            f"residual with stride {stride}, {x.shape[3]} channels in and {outputs} out; expected stride 1 and as many"
        )
    require_contiguous(x=x)
