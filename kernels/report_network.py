"""The network's kernels as the fused engine launches them at width 1, for :mod:`gpupipe.kernels.report`.

The launchers themselves say what they launch: they are called on meta tensors, and each launch is recorded instead of
made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpupipe.kernels import depthwise_triton, inverted_residual, inverted_residual_triton, pointwise, pointwise_triton
from gpupipe.kernels.inverted_residual import Block, Projection
from gpupipe.kernels.launch_triton import launches_taken
from gpupipe.kernels.report import Variant

NAMES = {
    pointwise_triton._pointwise_kernel: "pointwise",
    pointwise_triton._upsample_expand_kernel: "upsample_expand",
    depthwise_triton._depthwise_kernel: "depthwise",
    depthwise_triton._depthwise_project_kernel: "depthwise_project",
    inverted_residual_triton._inverted_residual_kernel: "inverted_residual",
}
"""Each kernel's noun."""

BATCH = 64

BLOCKS = (
    # name, height and width, channels stored, in and out, stride, residual
    ("inc", 320, 320, 6, 16, 16, 1, False),
    ("down1.0", 320, 320, 16, 16, 32, 2, False),
    ("down1.1, up4.1", 160, 160, 32, 32, 32, 1, True),
    ("down2.0", 160, 160, 32, 32, 64, 2, False),
    ("down2.1", 80, 80, 64, 64, 64, 1, True),
    ("down3.0", 80, 80, 64, 64, 128, 2, False),
    ("down3.1", 40, 40, 128, 128, 128, 1, True),
    ("down4.0", 40, 40, 128, 128, 256, 2, False),
    ("down4.1", 20, 20, 256, 256, 256, 1, True),
    ("down5.0", 20, 20, 256, 256, 512, 2, False),
    ("down5.1, fuse0.1, conv6, conv7", 10, 10, 512, 512, 512, 1, True),
    ("fuse1.0", 10, 10, 512, 512, 256, 1, False),
    ("fuse1.1", 10, 10, 256, 256, 256, 1, True),
    ("up1.1", 20, 20, 128, 128, 128, 1, True),
    ("up2.1", 40, 40, 64, 64, 64, 1, True),
    ("up3.1", 80, 80, 32, 32, 32, 1, True),
    ("conv1, ave", 16, 16, 32, 32, 64, 1, False),
    ("conv2, ave", 16, 16, 64, 64, 128, 1, False),
    ("conv1, hubert", 32, 32, 32, 32, 64, 1, False),
    ("conv2, hubert", 32, 32, 64, 64, 128, 1, False),
    ("conv1, conv2, wenet", 16, 32, 256, 256, 256, 1, True),
    ("conv4", 16, 16, 256, 256, 256, 1, True),
)

HIDDEN = {"inc": 16, "down1.0": 64}
"""Expanded channels that are not twice the input's as given: inc's are padded from 12, and down1.0 reads inc's expanded
map in place of its 32 channels."""

UPS = (
    # name, height and width, channels of low, of the skip, hidden, and out
    ("up1.0", 20, 256, 256, 1024, 128),
    ("up2.0", 40, 128, 128, 512, 64),
    ("up3.0", 80, 64, 64, 256, 32),
    ("up4.0", 160, 32, 32, 128, 32),
    ("up5.0", 320, 32, 16, 128, 16),
)


def network_variants() -> list[Variant]:
    """Every kernel in every configuration that the fused engine launches, at width 1, in float16, batch 64.

    In bfloat16, whose taps are added up in float32, only the two that then need the most registers.
    """
    with recording() as launches:
        for config, *shape, stored, channels, outputs, stride, residual in BLOCKS:
            hidden = HIDDEN.get(config, 2 * channels)
            launches.config = config
            x = _half(BATCH, *shape, stored)
            inverted_residual.inverted_residual(x, _block(channels, hidden, outputs), stride=stride, residual=residual)
        index = torch.empty(BATCH, dtype=torch.int64, device="meta")
        for config, size, low, skip, hidden, outputs in UPS:
            launches.config = config
            given = (_half(BATCH, size // 2, size // 2, low), _half(BATCH, size, size, skip), index)
            wide = pointwise.upsample_expand(*given, _half(low, hidden), _half(skip, hidden), _single(hidden))
            inverted_residual.depthwise_project(wide, _projection(hidden, outputs))
        for dtype, suffix in ((torch.float16, ""), (torch.bfloat16, ", bfloat16")):
            launches.config = f"up5.1 and head{suffix}"
            x, head = _half(BATCH, 320, 320, 16, dtype=dtype), _half(16, 16, dtype=dtype)
            block = _block(16, 32, 16, dtype=dtype)
            inverted_residual.inverted_residual_head(x, block, head, _single(16), residual=True)
        launches.config = "up5.0, bfloat16"
        wide = _half(BATCH, 320, 320, 128, dtype=torch.bfloat16)
        inverted_residual.depthwise_project(wide, _projection(128, 16, dtype=torch.bfloat16))
        launches.config = "bottleneck"
        wide = pointwise.pointwise(_half(BATCH, 10, 10, 512), _half(512, 2048), _single(2048))
        launches.config = "fuse0.0"
        x = _half(BATCH, 10, 10, 512)
        pointwise.pointwise(x, _half(512, 2048), _single(2048), relu=True, residual=wide, index=index)
        inverted_residual.depthwise_project(wide, _projection(2048, 512))
    return launches.variants


class Launches:
    """Recorded launches, each configuration once.

    Attributes:
        config: the name of those that follow.
        variants: what was launched.
    """

    def __init__(self) -> None:
        self.config = ""
        self.variants: list[Variant] = []

    def record(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """One launch, as :func:`~gpupipe.kernels.launch_triton.launch` takes it; its grid does not matter here."""
        name, warps, stages = NAMES[kernel], options.pop("num_warps", 4), options.pop("num_stages", None)
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        types = {key: _type_name(value) for key, value in given.items() if value is not None}
        constants = options | {key: None for key, value in given.items() if value is None}
        variant = Variant(kernel, name, self.config, types, constants, num_warps=warps, num_stages=stages)
        same = (name, types, constants, warps, stages)
        if all(same != (v.name, v.types, v.constants, v.num_warps, v.num_stages) for v in self.variants):
            self.variants.append(variant)


@contextlib.contextmanager
def recording() -> Iterator[Launches]:
    """Within this context launches of the network's kernels are recorded instead of made, on any device."""
    launches = Launches()
    with (
        mock.patch.object(pointwise, "backend", return_value="triton"),
        mock.patch.object(inverted_residual, "backend", return_value="triton"),
        launches_taken(launches.record),
    ):
        yield launches


def _type_name(value: Tensor | int) -> str:
    names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    names |= {torch.uint8: "*u8", torch.int64: "*i64"}
    return names[value.dtype] if isinstance(value, Tensor) else "i32"


def _half(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _single(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device="meta")


def _projection(hidden: int, outputs: int, dtype: torch.dtype = torch.float16) -> Projection:
    matrices = (_half(9, hidden, dtype=dtype), _single(hidden), _half(hidden, outputs, dtype=dtype))
    return Projection(*matrices, _single(outputs))


def _block(channels: int, hidden: int, outputs: int, dtype: torch.dtype = torch.float16) -> Block:
    return Block(_half(channels, hidden, dtype=dtype), _single(hidden), _projection(hidden, outputs, dtype))
