"""Whole block: an inverted residual of the U-Net as one kernel, its expanded tensor never in memory.

    low (H/2, W/2, L) ── bilinear ×2 ─┐
    skip (H, W, S) ───────────────────┴ concatenate ─ expand 1×1 ─ ReLU ─ depthwise 3×3 ─ ReLU ─ project 1×1 ─(+ skip)─┐
                                                                                                                      │
                                          out (H, W, C) <─────────────────────────────────────────────────────────────┤
                            mouth uint8 (3, H, W) <── truncate ── ×255 ── sigmoid ── 1×1 head ────────────────────────┘

Convention: maps are float16 (B, H, W, C), contiguous (channels last); the upsampling is ``align_corners=True``;
the depthwise convolution is padded by 1; batch norms are folded. Weights are packed once, by :func:`pack_whole_block`
and :func:`pack_head`, with every channel count padded with zeros to a power of two of at least 16. A map has as many
channels as its weights say, the spare ones 0 (:func:`pad_channels`); what a block writes is padded in the same way.

Here are the packing and the plain-torch reference, in float32 throughout; the kernel with the same signature is
:func:`gpupipe.kernels.whole_block_gluon.whole_block_gluon`.

There are two families of block kernels: this one, in Gluon and float16 alone, is for blocks of stride 1 on large maps,
whose bytes it saves; :mod:`gpupipe.kernels.inverted_residual`, in plain Triton, runs every block in either half
precision.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpupipe.kernels.pointwise import padded
from gpupipe.versions import numbers

OLDEST_TRITON = (3, 8)
"""The first whose Gluon reads shared memory by index (``shared_memory_descriptor.gather``)."""

HIDDEN_CHUNK = 32
"""Hidden channels are made this many at a time; their number is padded to a multiple of it."""


@dataclass(frozen=True)
class PackedBlock:
    """Weights of an inverted residual, folded, padded and laid out as the kernels read them.

    Attributes:
        expand: float16 (hidden, low + skip), the upsampled map's channels before the skip's.
        expand_bias: float16 (hidden, 2), whose sum is the bias: its rounded value and the remainder.
        depthwise: float16 (10, hidden): nine taps, row by row, and the bias.
        project: float16 (out, hidden).
        project_bias: float32 (out,).
        low_channels: of the map that is upsampled, padded; 0 without one.
        residual: the skip is added to the result.
    """

    expand: Tensor
    expand_bias: Tensor
    depthwise: Tensor
    project: Tensor
    project_bias: Tensor
    low_channels: int = 0
    residual: bool = False

    @property
    def skip_channels(self) -> int:
        """Channels of the map that is read as it is, padded."""
        return self.expand.shape[1] - self.low_channels

    @property
    def hidden_channels(self) -> int:
        """Channels of the expanded tensor, padded."""
        return self.expand.shape[0]

    @property
    def out_channels(self) -> int:
        """Channels of the result, padded."""
        return self.project.shape[0]

    def to(self, device: torch.device | str) -> PackedBlock:
        """The same weights on ``device``."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class PackedHead:
    """Weights of the network's last 1×1 convolution.

    Attributes:
        weight: float16 (8, out): three rows, the rest 0.
        bias: float32 (8,).
    """

    weight: Tensor
    bias: Tensor

    def to(self, device: torch.device | str) -> PackedHead:
        """The same weights on ``device``."""
        return PackedHead(self.weight.to(device), self.bias.to(device))


def gluon_obstacle() -> str | None:
    """Why this Triton cannot compile the Gluon kernels; None if it can. The device is not asked about."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if numbers(version) < OLDEST_TRITON:
        return f"triton is {version}; the Gluon kernels need {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def pad_channels(x: Tensor) -> Tensor:
    """A map (…, C) with zeros appended to its last axis up to :func:`padded` channels."""
    return F.pad(x, (0, padded(x.shape[-1]) - x.shape[-1]))


def pack_whole_block(
    expand: nn.Conv2d, depthwise: nn.Conv2d, project: nn.Conv2d, *, low_channels: int = 0, residual: bool = False
) -> PackedBlock:
    """Pack the three convolutions of an inverted residual.

    Args:
        expand, depthwise, project: with their batch norms folded in (:func:`gpupipe.models.fold.fold_batch_norms`).
        low_channels: how many of ``expand``'s first input channels come from the map that is upsampled.
        residual: the skip is added to the result.

    Raises:
        ValueError: shapes that belong to no such block.
    """
    hidden, inputs = expand.weight.shape[:2]
    stride, outputs = depthwise.stride[0], project.weight.shape[0]
    if depthwise.weight.shape != (hidden, 1, 3, 3) or project.weight.shape[1] != hidden or stride != 1:
        raise ValueError(
            f"weights have shapes {tuple(expand.weight.shape)}, {tuple(depthwise.weight.shape)} and "
            f"{tuple(project.weight.shape)}, stride {stride}; expected (hidden, in, 1, 1), (hidden, 1, 3, 3) and "
            "(out, hidden, 1, 1), stride 1"
        )
    if residual and inputs - low_channels != outputs:
        raise ValueError(f"{inputs - low_channels} → {outputs} channels; a residual keeps their number")
    padded_hidden, padded_outputs = max(HIDDEN_CHUNK, padded(hidden)), padded(outputs)
    halves = (expand.weight[:, :low_channels, 0, 0], expand.weight[:, low_channels:, 0, 0])
    matrix = torch.cat([pad_channels(half) for half in halves if half.shape[1]], dim=1)
    bias = _fill(_bias(expand), padded_hidden)
    taps = torch.cat([depthwise.weight.reshape(hidden, 9).t(), _bias(depthwise)[None]])
    return PackedBlock(
        expand=_fill(matrix, padded_hidden, matrix.shape[1]).half(),
        expand_bias=torch.stack([bias.half(), (bias - bias.half().float()).half()], dim=1),
        depthwise=_fill(taps, 10, padded_hidden).half(),
        project=_fill(project.weight[:, :, 0, 0], padded_outputs, padded_hidden).half(),
        project_bias=_fill(_bias(project), padded_outputs),
        low_channels=padded(low_channels) if low_channels else 0,
        residual=residual,
    )


def pack_head(head: nn.Conv2d) -> PackedHead:
    """Pack a 1×1 convolution to three channels."""
    if head.weight.shape[0] != 3 or head.weight.shape[2:] != (1, 1):
        raise ValueError(f"the head's weight has shape {tuple(head.weight.shape)}; expected (3, in, 1, 1)")
    weight = _fill(head.weight[:, :, 0, 0], 8, padded(head.weight.shape[1]))
    return PackedHead(weight.half(), _fill(_bias(head), 8))


def whole_block(
    skip: Tensor,
    block: PackedBlock,
    *,
    low: Tensor | None = None,
    index: Tensor | None = None,
    head: PackedHead | None = None,
) -> Tensor:
    """The plain reference, float32 inside.

    Args:
        skip: float16 (B, H, W, S), contiguous; with ``low`` and ``index`` (L, H, W, S).
        block: the weights.
        low: float16 (B, H/2, W/2, block.low_channels), contiguous: upsampled and put before the skip.
        index: integers (B,), which of ``skip`` each sample takes; given with ``low``, and not without.
        head: with it the result is the mouth: 1×1 convolution, sigmoid, × 255, truncated.

    Returns:
        float16 (B, H, W, block.out_channels); with a head uint8 (B, 3, H, W).

    Raises:
        ValueError: types, shapes or strides that do not fit.
    """
    check_maps(skip, block, low, index, head)
    x = (skip if index is None else skip.index_select(0, index)).permute(0, 3, 1, 2).float()
    entry = x
    if low is not None:
        planes = low.permute(0, 3, 1, 2).float()
        entry = torch.cat([F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=True), x], dim=1)
    hidden = block.hidden_channels
    y = F.conv2d(entry, block.expand.float()[:, :, None, None], block.expand_bias.float().sum(1)).relu_()
    taps, bias = block.depthwise[:9].float().t().reshape(hidden, 1, 3, 3), block.depthwise[9].float()
    y = F.conv2d(y, taps, bias, padding=1, groups=hidden).relu_()
    y = F.conv2d(y, block.project.float()[:, :, None, None], block.project_bias)
    if block.residual:
        y = y + x
    if head is None:
        return y.permute(0, 2, 3, 1).half().contiguous()
    mouth = F.conv2d(y, head.weight[:3].float()[:, :, None, None], head.bias[:3])
    return (torch.sigmoid(mouth) * 255).to(torch.uint8).contiguous()


def check_maps(
    skip: Tensor, block: PackedBlock, low: Tensor | None, index: Tensor | None, head: PackedHead | None
) -> None:
    """Raise ``ValueError`` for maps that do not fit the weights; see :func:`whole_block`."""
    _, height, width, _ = skip.shape if skip.ndim == 4 else (-1, -1, -1, -1)
    expected = {"skip": (len(skip), height, width, block.skip_channels)}
    if (low is None) != (block.low_channels == 0):
        raise ValueError(
            f"low is {'missing' if low is None else 'given'}; the weights have {block.low_channels} for it"
        )
    if (low is None) != (index is None):
        raise ValueError(f"{'index' if low is None else 'low'} is given alone; expected low and index together")
    if low is not None and index is not None:
        expected["low"] = (len(index), height // 2, width // 2, block.low_channels)
        if height % 2 or width % 2:
            raise ValueError(f"skip is {height}×{width}; an upsampled map has even sizes")
    for name, tensor in (("skip", skip), ("low", low)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected[name]}")
        if tensor.dtype != torch.float16 or not tensor.is_contiguous():
            kind = f"{tensor.dtype} with strides {tensor.stride()}"
            raise ValueError(f"{name} is {kind}; expected float16, contiguous")
    if head is not None and head.weight.shape[1] != block.out_channels:
        raise ValueError(
            f"a head for {head.weight.shape[1]} channels after a block with {block.out_channels}; expected as many"
        )


def bytes_moved(block: PackedBlock, size: tuple[int, int], *, head: bool = False) -> int:
    """The fewest bytes that a block can move for one sample: every map read or written once; weights stay in caches.

    Args:
        size: height and width of the skip.
        head: the result is the mouth.
    """
    pixels = size[0] * size[1]
    read = pixels * block.skip_channels * 2 + pixels // 4 * block.low_channels * 2
    return read + pixels * (3 if head else 2 * block.out_channels)


def _bias(layer: nn.Conv2d) -> Tensor:
    return layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach()


def _fill(values: Tensor, *shape: int) -> Tensor:
    """``values`` in the corner of float32 zeros of ``shape``."""
    filled = torch.zeros(shape, dtype=torch.float32, device=values.device)
    filled[tuple(slice(n) for n in values.shape)] = values.detach().float()
    return filled
