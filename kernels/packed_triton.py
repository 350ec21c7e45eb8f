"""Arithmetic of the network's Triton kernels on maps in half precision: float16 two at a time, bfloat16 in float32.

A GPU multiplies and adds two float16 in one instruction, where float32 takes two, and two more to convert. Left to
itself the compiler takes float16 one by one, so that pairs are said in assembly. bfloat16 has too few bits for sums.
Triton's interpreter knows no assembly and takes the plain operations, which round once more.

Assembly that is said to have effects (``is_pure=False``, as of ReLU, the last step before a product) is computed where
it stands, in the layout that its operands have. What a product on tensor cores takes from registers, the compiler else
makes in the product's layout from the first load on: as many times over as lanes hold a copy of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpupipe.kernels.common_triton import INTERPRETED

_ASSEMBLY = tl.constexpr(not INTERPRETED)

MULTIPLY_ADD = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")
MULTIPLY_ADD_RELU = tl.constexpr("fma.rn.relu.f16x2 $0, $1, $2, $3;")
RELU_TO_HALF = tl.constexpr("cvt.rn.relu.f16x2.f32 $0, $2, $1;")
"""Two values an instruction, float16; the last from float32."""


@triton.constexpr_function
def accumulator_dtype(dtype):
    """The type in which values of ``dtype`` are added up."""
    return tl.float16 if dtype == tl.float16 else tl.float32


@triton.jit
def multiply_add(a, b, c):
    """a · b + c in c's type, which is :func:`accumulator_dtype`'s."""
    if c.dtype == tl.float16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(MULTIPLY_ADD, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return a.to(c.dtype) * b.to(c.dtype) + c


@triton.jit
def multiply_add_relu(a, b, c, dtype: tl.constexpr):
    """ReLU(a · b + c) in ``dtype``, whose :func:`accumulator_dtype` is c's type; computed where it stands."""
    if c.dtype == tl.float16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(
            MULTIPLY_ADD_RELU, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=False, pack=2
        )
    else:
        return relu_to(multiply_add(a, b, c), dtype)


@triton.jit
def relu_to(a, dtype: tl.constexpr):
    """ReLU of float32, rounded to ``dtype``, in one instruction for two values; computed where it stands."""
    if dtype == tl.float16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(RELU_TO_HALF, "=r,r,r", [a], dtype=tl.float16, is_pure=False, pack=2)
    elif dtype == tl.bfloat16 and _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    else:
        return tl.maximum(a, 0.0).to(dtype)
