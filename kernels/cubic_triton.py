"""Cubic taps as in :mod:`gpupipe.kernels.cubic`, for the Triton kernels that resize."""

from __future__ import annotations

import triton
import triton.language as tl

from gpupipe.kernels.cubic import CUBIC_A

_A = tl.constexpr(CUBIC_A)


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
