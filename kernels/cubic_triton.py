"""Device functions that the Triton kernels share: cubic taps as in :mod:`gpupipe.kernels.cubic`, and rounding.

Only plain Triton: no libdevice and no inline assembly, so that Triton's interpreter runs the kernels on the CPU.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels; it was decided when they were defined."""

_A = tl.constexpr(-0.75)
_INTEGER = tl.constexpr(8388608.0)  # 2²³: float32 has no fractions from here on
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: the same for negative numbers too


@triton.jit
def cubic_tap(position, source, target):
    """The tap at or below a destination pixel's source coordinate, exactly: one integer division."""
    scaled = (2 * position + 1) * source - target
    return (scaled + 2 * target) // (2 * target) - 1  # scaled > −2·target; "//" rounds towards zero here


@triton.jit
def _keys(x):
    """Keys' cubic at ``x`` in [0, 1) after the second tap; the same steps as in the reference."""
    u = x + 1.0
    y = 1.0 - x
    w0 = ((_A * u - 5.0 * _A) * u + 8.0 * _A) * u - 4.0 * _A
    w1 = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    w2 = ((_A + 2.0) * y - (_A + 3.0)) * y * y + 1.0
    return w0, w1, w2, 1.0 - w0 - w1 - w2


@triton.jit
def cubic_axis(position, source, target):
    """The first of the four taps, not clamped, and the weights."""
    tap = cubic_tap(position, source, target)
    remainder = (2 * position + 1) * source - target - tap * (2 * target)
    w0, w1, w2, w3 = _keys(tl.div_rn(remainder.to(tl.float32), 2.0 * target))
    return tap - 1, w0, w1, w2, w3


@triton.jit
def clamped(tap, source):
    """A tap at the nearest pixel of the image."""
    return tl.minimum(tl.maximum(tap, 0), source - 1)


@triton.jit
def weight_at(distance, w0, w1, w2, w3):
    """The weight ``distance`` taps after the first; 0 outside the four."""
    outer = tl.where(distance == 0, w0, tl.where(distance == 3, w3, 0.0))
    return tl.where(distance == 1, w1, tl.where(distance == 2, w2, outer))


@triton.jit
def round_saturate(values):
    """Round half to even and saturate to 0 … 255; still float32. Full rate, where a conversion is a quarter's."""
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
    """Four (N,) → (N, 4), each thread's four side by side: stored with one wide instruction."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4)
