"""Arithmetic of the network's Triton kernels on maps in half precision: float16 two at a time, bfloat16 in float32.

A GPU multiplies and adds two float16 in one instruction, where float32 takes two, and two more to convert. Left to
itself the compiler takes float16 one by one, so pairs are written in assembly. bfloat16 has too few bits for sums.
Triton's interpreter runs no assembly: there the plain operations stand in, which round once more.

Inline assembly marked impure (``is_pure=False``) keeps its operands' layout. Otherwise the compiler propagates the dot
operand's layout back to the first load, and every lane that holds a copy of an element recomputes it. So the ReLU
before a dot is marked impure.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpupipe.kernels.common_triton import INTERPRETED

_ASSEMBLY = tl.constexpr(not INTERPRETED)

MULTIPLY_ADD = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")
MULTIPLY_ADD_RELU = tl.constexpr("fma.rn.relu.f16x2 $0, $1, $2, $3;")
RELU_TO_HALF = tl.constexpr("cvt.rn.relu.f16x2.f32 $0, $2, $1;")
"""Two float16 an instruction; the last converts from float32."""

POWER_OF_TWO = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
"""Of float32, the GPU's approximations."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def accumulator_dtype(dtype):
    """The type in which values of ``dtype`` are added up."""
    return tl.float16 if dtype == tl.float16 else tl.float32


@triton.jit
def multiply_add(a, b, c):
    """a · b + c in c's type, the :func:`accumulator_dtype` of the maps."""
    if c.dtype == tl.float16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(MULTIPLY_ADD, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return a.to(c.dtype) * b.to(c.dtype) + c


@triton.jit
def multiply_add_relu(a, b, c, dtype: tl.constexpr):
    """ReLU(a · b + c) in ``dtype``, whose :func:`accumulator_dtype` is c's type; marked impure."""
    if c.dtype == tl.float16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(
            MULTIPLY_ADD_RELU, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=False, pack=2
        )
    else:
        return relu_to(multiply_add(a, b, c), dtype)


@triton.jit
def relu_to(a, dtype: tl.constexpr):
    """ReLU of float32, rounded to ``dtype``, in one instruction for two values; marked impure."""
    if dtype == tl.float16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(RELU_TO_HALF, "=r,r,r", [a], dtype=tl.float16, is_pure=False, pack=2)
    elif dtype == tl.bfloat16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    else:
        return tl.maximum(a, 0.0).to(dtype)


@triton.jit
def sigmoid(a):
    """1 / (1 + e⁻ᵃ) of float32, by the GPU's approximations of a power of two and of a reciprocal."""
    if _ASSEMBLY:
        power = tl.inline_asm_elementwise(POWER_OF_TWO, "=r,r", [a * -LOG2_E], dtype=tl.float32, is_pure=True, pack=1)
        return tl.inline_asm_elementwise(RECIPROCAL, "=r,r", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sigmoid(a)
