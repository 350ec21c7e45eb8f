"""The list of engines."""

from __future__ import annotations

import torch

from gpupipe.engines import compiled, eager, fused, gluon, llvm_cpu, onnxruntime_cpu
from gpupipe.engines.base import Declaration

DECLARED: dict[str, Declaration] = {
    module.DECLARATION.name: module.DECLARATION for module in (gluon, fused, llvm_cpu, onnxruntime_cpu, compiled, eager)
}
"""By name, in the expected order of speed; the last is the plainest, with which the others are compared."""


def candidates(device: torch.device, dtype: torch.dtype) -> list[Declaration]:
    """Engines made for a kind of device and a type, in the expected order of speed."""
    return [one for one in DECLARED.values() if device.type in one.devices and dtype in one.dtypes]


def runnable(device: torch.device, dtype: torch.dtype) -> list[Declaration]:
    """The :func:`candidates` that nothing on this machine keeps from running."""
    return [one for one in candidates(device, dtype) if one.obstacle(device, dtype) is None]


def contenders(device: torch.device, dtype: torch.dtype) -> list[Declaration]:
    """The :func:`runnable` engines that ``auto`` measures."""
    return [one for one in runnable(device, dtype) if not one.slow_to_build]
