"""Which implementation of a kernel runs on a device: Triton on CUDA, plain torch everywhere else.

Triton is imported only when a CUDA device asks for it: a CPU build of torch comes without it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch

from gpupipe.fallbacks import note_fallback

Backend = Literal["triton", "torch"]

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which the kernels are compiled and checked (see :mod:`gpupipe.kernels.report`)."""


def backend(device: torch.device | str) -> Backend:
    """Which implementation the kernels run on ``device``."""
    return "triton" if obstacle(device) is None else "torch"


def obstacle(device: torch.device | str) -> str | None:
    """Why Triton kernels do not run on ``device``; None if they do."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"device is {device.type}; the Triton kernels need cuda"
    return _cuda_obstacle(device.index)


@functools.cache
def _cuda_obstacle(index: int | None) -> str | None:
    reason = None
    if torch.version.hip is not None:
        reason = "this is a ROCm build of torch; the Triton kernels are checked on CUDA only"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif (capability := torch.cuda.get_device_capability(index)) < OLDEST_CAPABILITY:
        least = ".".join(map(str, OLDEST_CAPABILITY))
        reason = f"compute capability is {'.'.join(map(str, capability))}; the Triton kernels need {least} or newer"
    if reason is not None:
        note_fallback(f"plain torch in place of the Triton kernels: {reason}")
    return reason
