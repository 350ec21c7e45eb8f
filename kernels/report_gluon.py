"""The Gluon kernels as the gluon engine launches them at width 1, for :mod:`gpupipe.kernels.report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpupipe.kernels.report import Variant

WGMMA_ARCHITECTURES = (90,)
"""Those with wgmma."""

MMA_SYNC_ARCHITECTURES = {"up3.0": (80, 86, 89, 90)}
"""Blocks by mma.sync that are not for every architecture: compiled for 10.0, this one spills 84 bytes."""


@dataclass(frozen=True)
class BlockShape:
    """A block of the network at full width; channels padded, ``size`` the maps' height and width."""

    size: int
    low: int
    skip: int
    hidden: int
    out: int
    residual: bool = False
    head: bool = False


BLOCKS = {
    "up5.0": BlockShape(320, 32, 16, 128, 16),  # the skip is the first block's hidden tensor
    "up5.1, head": BlockShape(320, 0, 16, 32, 16, residual=True, head=True),
    "up4.0": BlockShape(160, 32, 32, 128, 32),
    "up4.1, down1.1": BlockShape(160, 0, 32, 64, 32, residual=True),
    "up3.0": BlockShape(80, 64, 64, 256, 32),
    "up3.1": BlockShape(80, 0, 32, 64, 32, residual=True),
}
"""The blocks that the engine leaves to Gluon."""


def gluon_variants() -> list[Variant]:
    """Each block by mma.sync and by wgmma."""
    return [variant_of(name, wgmma=wgmma) for name in BLOCKS for wgmma in (False, True)]


def variant_of(name: str, *, wgmma: bool) -> Variant:
    """The kernel that makes the block ``name`` of :data:`BLOCKS`."""
    from gpupipe.kernels import whole_block_gluon

    block = BLOCKS[name]
    halves = ("skip", "low", "expand", "expand_bias", "depthwise", "project", "head")
    types = dict.fromkeys(halves, "*fp16") | dict.fromkeys(("project_bias", "head_bias"), "*fp32")
    types |= {"index": "*i64", "out": "*u8" if block.head else "*fp16"}
    constants: dict[str, Any] = {"H": block.size, "W": block.size, "LOW": block.low, "SKIP": block.skip}
    constants |= {"HIDDEN": block.hidden, "OUT": block.out, "RESIDUAL": block.residual, "HEAD": block.head}
    constants |= {"WGMMA": wgmma}
    given = {"index": block.low > 0, "low": block.low > 0, "head": block.head, "head_bias": block.head}
    constants |= {argument: None for argument, is_given in given.items() if not is_given}
    return Variant(
        whole_block_gluon._whole_block_kernel,
        "whole_block",
        f"{name}, {'wgmma' if wgmma else 'mma.sync'}",
        types,
        constants,
        num_warps=whole_block_gluon.NUM_WARPS,
        architectures=WGMMA_ARCHITECTURES if wgmma else MMA_SYNC_ARCHITECTURES.get(name),
    )
