"""The `gluon` engine: `fused`, but on large maps each inverted residual is one kernel, upsampling and head included.

    maps of 80² and more, where the bytes are     gpupipe.kernels.whole_block_gluon: no wide tensor in memory
    the others, and blocks with wider results     as in gpupipe.engines.fused

For half precision in float16 alone, and for a Triton whose Gluon can do it (:func:`gluon_obstacle`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gpupipe.engines.base import Declaration, EngineName
from gpupipe.engines.fused import Entry, FusedEngine, Step, convolutions
from gpupipe.kernels.dispatch import obstacle
from gpupipe.kernels.whole_block import PackedBlock, gluon_obstacle, pack_head, pack_whole_block, whole_block
from gpupipe.models.hoisted import HoistedUp
from gpupipe.models.unet328 import UNet328

SMALLEST_MAP = 80
"""Pixels a side from which a block is bound by the bytes of its wide tensor."""

WIDEST_RESULT = {1: 32, 2: 64}
"""Channels out, by stride, whose sums fit in registers beside the rest of the block."""

WIDEST_ENTRY_BY_WARPS = 64
"""Channels in, of a block with upsampling, that do without a stack frame on architectures after Hopper."""


class GluonEngine(FusedEngine):
    """Gluon kernels on CUDA for the large maps; elsewhere their plain-torch reference, to be compared with.

    It runs in float16; mouths are uint8.

    Args:
        run: :func:`~gpupipe.kernels.whole_block.whole_block`, as it is to be computed; None takes the Gluon kernels on
            CUDA.
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
        if not _fits(layers, size, stride):
            return super()._block(layers, size, stride=stride, residual=residual)
        return functools.partial(self._run, block=self._whole(layers, residual=residual))

    def _entry(self, up: HoistedUp, size: int) -> Entry:
        expand, layers = up.joined(), convolutions(up.rest)[:2]
        too_wide = self._widest_entry is not None and expand.in_channels > self._widest_entry
        if not _fits((expand, *layers), size, 1) or too_wide:
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
    """Whether a GPU is of an architecture after Hopper, which has no warpgroup instructions for these kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) > (9, 0)


def _fits(layers: Sequence[nn.Conv2d], size: int, stride: int) -> bool:
    """Whether a block is worth, and can be, one kernel."""
    return size >= SMALLEST_MAP and layers[-1].out_channels <= WIDEST_RESULT[stride]


DECLARATION = Declaration(
    "gluon",
    lambda network, device, dtype: GluonEngine(network, device=device),
    devices=("cuda",),
    dtypes=(torch.float16,),
    obstacle=lambda device: gluon_obstacle() or obstacle(device),
)
