"""The `gluon` engine: `fused`, but on large maps each inverted residual is one kernel, upsampling and head included.

    stride 1 on maps of 80² and more: most of the bytes   gpupipe.kernels.whole_block_gluon: no wide tensor in memory
    smaller maps, the narrowest and the widest blocks     as in gpupipe.engines.fused

It runs in float16 only, and needs a Triton whose Gluon is new enough (:func:`gluon_obstacle`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gpupipe.engines.base import Declaration, EngineName
from gpupipe.engines.fused import Entry, FusedEngine, Step, with_kernels_compiled
from gpupipe.kernels.dispatch import obstacle
from gpupipe.kernels.pointwise import padded
from gpupipe.kernels.whole_block import (
    HIDDEN_CHUNK,
    PackedBlock,
    gluon_obstacle,
    pack_head,
    pack_whole_block,
    whole_block,
)
from gpupipe.models.hoisted import HoistedUp, convolutions
from gpupipe.models.unet328 import UNet328

SMALLEST_MAP = 80
"""Pixels a side. On maps this large and larger, a block's time is that of moving its wide tensor."""

WIDEST_RESULT = 32
"""Most output channels whose sums fit in registers along with the rest of the block."""

WIDEST_ENTRY_BY_WARPS = 64
"""Most input channels (upsampled + skip) with which an upsampling block compiles without spilling where there is no
wgmma (after Hopper)."""


class GluonEngine(FusedEngine):
    """Gluon kernels for the large maps on CUDA; on other devices their plain-torch reference, for comparison.

    It runs in float16; mouths are uint8.

    Args:
        run: an implementation of :func:`~gpupipe.kernels.whole_block.whole_block`; None takes the Gluon kernels on CUDA
            and the reference elsewhere.
    """

    name: EngineName = "gluon"

    def __init__(self, network: UNet328, *, device: torch.device, run: Callable[..., Tensor] | None = None) -> None:
        self._widest_entry = WIDEST_ENTRY_BY_WARPS if _after_hopper(device) else None
        self._run = run or whole_block
        if run is None and device.type == "cuda":
            from gpupipe.kernels.whole_block_gluon import whole_block_gluon  # noqa: PLC0415 - loads Gluon

            self._run = whole_block_gluon
        super().__init__(network, device=device, dtype=torch.float16)

    def _block(self, layers: Sequence[nn.Conv2d], size: int, *, stride: int = 1, residual: bool = False) -> Step:
        if stride != 1 or not _fits(layers, size):
            return super()._block(layers, size, stride=stride, residual=residual)
        return functools.partial(self._run, block=self._whole(layers, residual=residual))

    def _entry(self, up: HoistedUp, size: int) -> Entry:
        expand, layers = up.joined(), convolutions(up.rest)[:2]
        too_wide = self._widest_entry is not None and expand.in_channels > self._widest_entry
        if not _fits((expand, *layers), size) or too_wide:
            return super()._entry(up, size)
        block = self._whole((expand, *layers), low_channels=up.low.in_channels)

        def enter(low: Tensor, skip: Tensor, index: Tensor) -> Tensor:
            return self._run(skip, block, low=low, index=index)

        return enter

    def _mouth_block(self, layers: Sequence[nn.Conv2d], head: nn.Conv2d) -> Step:
        block, packed = self._whole(layers, residual=True), pack_head(head).to(self.device)
        return functools.partial(self._run, block=block, head=packed)

    def _whole(self, layers: Sequence[nn.Conv2d], *, low_channels: int = 0, residual: bool = False) -> PackedBlock:
        return pack_whole_block(*layers, low_channels=low_channels, residual=residual).to(self.device)


def _after_hopper(device: torch.device) -> bool:
    """Whether a GPU is newer than Hopper, and so lacks wgmma, which these kernels use."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) > (9, 0)


def _fits(layers: Sequence[nn.Conv2d], size: int) -> bool:
    """Whether a block can be one kernel, and gains by it: its expanded map fills a chunk of channels."""
    expand, *_, project = layers
    return (
        size >= SMALLEST_MAP and project.out_channels <= WIDEST_RESULT and padded(expand.out_channels) >= HIDDEN_CHUNK
    )


DECLARATION = Declaration(
    "gluon",
    lambda network, device, dtype: with_kernels_compiled(GluonEngine(network, device=device), network),
    devices=("cuda",),
    dtypes=(torch.float16,),
    obstacle=lambda device, dtype: gluon_obstacle() or obstacle(device),
)
