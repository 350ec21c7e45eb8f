"""The engines there are."""

from __future__ import annotations

import torch

from gpupipe.engines import compiled, eager, fused, gluon, onnxruntime_cpu, openvino_cpu
from gpupipe.engines.base import Declaration

DECLARED: dict[str, Declaration] = {
    module.DECLARATION.name: module.DECLARATION
    for module in (gluon, fused, openvino_cpu, onnxruntime_cpu, compiled, eager)
}
"""By name, in the expected order of speed; the last is the plainest, to which the others are held."""


def candidates(device: torch.device, dtype: torch.dtype) -> list[Declaration]:
    """Engines that may run on a device in a type, in the expected order of speed."""
    return [one for one in DECLARED.values() if device.type in one.devices and dtype in one.dtypes]


def runnable(device: torch.device, dtype: torch.dtype) -> list[Declaration]:
    """The :func:`candidates` that nothing here keeps from running."""
    return [one for one in candidates(device, dtype) if one.obstacle(device) is None]


def contenders(device: torch.device, dtype: torch.dtype) -> list[Declaration]:
    """Those of them that ``auto`` measures."""
    return [one for one in runnable(device, dtype) if not one.slow_to_build]
