"""Which implementation of a kernel runs on a device: Triton on CUDA, LLVM on a CPU, or plain torch.

Triton is imported only for a CUDA device: a CPU build of torch comes without it.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import subprocess
from typing import Literal

import torch

from gpupipe.errors import first_line
from gpupipe.fallbacks import note_fallback

Backend = Literal["triton", "llvm", "torch"]

OLDEST_CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels are compiled and checked for (see :mod:`gpupipe.kernels.report`)."""


def backend(device: torch.device | str) -> Backend:
    """Which implementation kernels use on ``device``. A kernel that has none of this kind, or whose own does not take
    what it is given (``takes`` in the LLVM modules), runs in plain torch."""
    if torch.device(device).type == "cpu":
        return "llvm" if llvm_obstacle() is None else "torch"
    return "triton" if obstacle(device) is None else "torch"


@functools.cache
def llvm_obstacle(dtype: torch.dtype = torch.float32) -> str | None:
    """Why the LLVM kernels do not run on this CPU in float32, float16 or bfloat16; None if they do."""
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed"
    from gpupipe.kernels.common_llvm import this_processor

    if this_processor(dtype).lanes:
        return None
    if dtype == torch.float16:
        if platform.machine() in ("aarch64", "arm64") and not hasattr(torch.cpu, "get_capabilities"):
            return "PyTorch tells from 2.11 on whether an ARM processor multiplies in float16"
        return "this processor does not multiply in float16, as with AVX512-FP16 or NEON"
    if dtype == torch.bfloat16:
        return "this processor does not multiply in bfloat16, as with AVX512-BF16"
    return "this processor has none of AVX-512, AVX2 with FMA, and NEON"


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
    else:
        reason = _launch_obstacle()
    if reason is not None:
        note_fallback(f"plain torch in place of the Triton kernels: {reason}")
    return reason


def _launch_obstacle() -> str | None:
    """Why Triton cannot launch kernels here; None if it can.

    Triton compiles its launcher with the system's C compiler on first use and caches it.
    """
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except subprocess.CalledProcessError:  # the compiler has printed its own error
        return "triton cannot launch them: the C compiler fails, which also needs Python's headers (python3-dev)"
    except Exception as error:  # no compiler, no cache folder that can be written …
        return f"triton cannot launch them: {first_line(error)}"
    return None
