"""Cubic resizing as in :mod:`gpupipe.kernels.cubic`, with the same steps, for the Triton kernels that resize."""

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
    """Keys' cubic at ``x`` in [0, 1) after the second tap.

    GPUs for graphics compute in float64 at a 64th of the rate; a crop's few weights cost about what its bytes do there.
    """
    x = ((x + 1.0) - 1.0).to(tl.float64)
    y = 1.0 - x
    both = _A * x * y  # exactly: x has 23 bits
    w1 = y * (1.0 + x - (_A + 2.0) * x * x)
    w2 = x * (1.0 + y - (_A + 2.0) * y * y)
    return (both * y).to(tl.float32), w1.to(tl.float32), w2.to(tl.float32), (both * x).to(tl.float32)


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
def sum_across(v0, v1, v2, v3, w0, w1, w2, w3):
    """The weighted sum of a row's taps."""
    return tl.fma(v3, w3, tl.fma(v2, w2, tl.fma(v1, w1, v0 * w0)))


@triton.jit
def pair_at(distance, w0, w1, w2, w3):
    """The weights of the row ``distance`` taps after the first, and of the one above it; 0 but for the pairs' second.

    Rows are walked from the top down, and the taps are added up in two pairs.
    """
    above = tl.where(distance == 1, w0, tl.where(distance == 3, w2, 0.0))
    return above, tl.where(distance == 1, w1, tl.where(distance == 3, w3, 0.0))


@triton.jit
def add_pair(total, above, value, weights):
    """Add a row and the one above it, with :func:`pair_at`'s weights."""
    return total + tl.fma(above, weights[0], value * weights[1])
