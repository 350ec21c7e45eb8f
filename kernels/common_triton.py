"""What the Triton kernels share: whether loops may be pipelined, rounding, and stores of four values side by side.

Plain Triton only: no libdevice and no inline assembly, so that Triton's interpreter can run the kernels on a CPU.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from gpupipe.versions import numbers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels. It was decided when they were defined."""

_FENCES_COPIES = numbers(triton.__version__) >= (3, 7, 1)
"""Whether Triton puts a fence between asynchronous copies to shared memory and tensor cores that read it through the
asynchronous proxy (triton-lang/triton, pull requests 9610 and 10537)."""


def can_pipeline(device: torch.device) -> bool:
    """Whether loops on a device may copy the next products' factors to shared memory while tensor cores multiply."""
    if _FENCES_COPIES:
        return True
    return device.type == "cuda" and not reads_by_proxy(torch.cuda.get_device_capability(device))


def reads_by_proxy(capability: tuple[int, int]) -> bool:
    """Whether Triton's products read shared memory through the asynchronous proxy: with wgmma on Hopper, with tcgen05
    on Blackwell's servers. Older GPUs, and Blackwell's for workstations (12.x), have mma.sync, which needs no fence."""
    return (9, 0) <= capability < (12, 0)


_INTEGER = tl.constexpr(8388608.0)  # 2²³: from here on float32 has no fractions
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: the same, for negative numbers too


@triton.jit
def round_saturate(values):
    """Round half to even and saturate to 0 … 255; still float32.

    Two adds at full rate; a conversion instruction runs at a quarter of it.
    """
    return tl.minimum(tl.maximum((values + _ROUND) - _ROUND, 0.0), 255.0)


@triton.jit
def truncate(b, g, r):
    """The whole parts of three float32 in [0, 2²³)."""
    whole_b, whole_g, whole_r = (b + _INTEGER) - _INTEGER, (g + _INTEGER) - _INTEGER, (r + _INTEGER) - _INTEGER
    return (
        tl.where(whole_b > b, whole_b - 1.0, whole_b),
        tl.where(whole_g > g, whole_g - 1.0, whole_g),
        tl.where(whole_r > r, whole_r - 1.0, whole_r),
    )


@triton.jit
def join4(a, b, c, d):
    """Four (N,) → (N, 4), with each thread's four values side by side, so that one wide instruction stores them."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4)
