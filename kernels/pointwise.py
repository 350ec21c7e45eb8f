"""Pointwise (1×1) convolutions of channels-last maps: matrix products over pixels, with what surrounds them fused in.

    pointwise         out = x · W + b (+ residual) (→ ReLU)
    upsample_expand   out = ReLU(↑low · Wl + skip[index] · Ws + b)

where ↑ doubles height and width bilinearly, corners aligned: the decoder's upsampling, concatenation and first
convolution in one, of which only the result is written.

Convention: maps are (samples, height, width, channels), contiguous; matrices are (channels in, channels out); biases
are float32. The Triton kernels take channel counts that are powers of two from 16 up: weights are packed with zeros up
to :func:`padded` channels, so that the spare channels are 0 throughout. The input of :func:`pointwise` may have fewer
channels than its matrix has rows; the missing ones count as 0.

Sums are accumulated in float32; results are rounded once, to the inputs' precision. Here are the public functions and
their plain-torch reference; on CUDA :mod:`gpupipe.kernels.pointwise_triton` runs them in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gpupipe.kernels.dispatch import backend


def padded(channels: int) -> int:
    """``channels`` rounded up to a power of two, 16 or more."""
    return max(16, 1 << (channels - 1).bit_length())


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """A 1×1 convolution.

    Args:
        x: (B, H, W, K'), K' ≤ K.
        weight: (K, N).
        bias: float32 (N,).
        relu: apply it last.
        residual: (B, H, W, N), added before the ReLU; with ``index`` (L, H, W, N).
        index: int64 (B,), which sample of ``residual`` each sample takes.

    Returns:
        (B, H, W, N).

    Raises:
        ValueError: shapes that do not fit each other, or a map that is not contiguous.
    """
    if x.ndim != 4 or x.shape[3] > weight.shape[0]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, H, W, at most {weight.shape[0]})")
    if residual is not None:
        expected = (len(x) if index is None else len(residual), *x.shape[1:3], weight.shape[1])
        if residual.shape != expected:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {expected}")
    require_contiguous(x=x, weight=weight, residual=residual)
    if backend(x.device) == "triton":
        from gpupipe.kernels.pointwise_triton import pointwise_triton

        return pointwise_triton(x, weight, bias, relu=relu, residual=residual, index=index)
    out = accumulating(x) @ accumulating(weight[: x.shape[3]]) + bias
    if residual is not None:
        out += residual if index is None else residual.index_select(0, index)
    return (out.relu() if relu else out).to(x.dtype)


def upsample_expand(
    low: Tensor, skip: Tensor, index: Tensor, low_weight: Tensor, skip_weight: Tensor, bias: Tensor
) -> Tensor:
    """Upsample, concatenate with the skip, convolve 1×1, ReLU.

    Args:
        low: (B, H/2, W/2, K), upsampled to twice its size, bilinearly, corners aligned.
        skip: (L, H, W, S).
        index: int64 (B,), which sample of ``skip`` each sample takes.
        low_weight, skip_weight: (K, N) and (S, N).
        bias: float32 (N,).

    Returns:
        (B, H, W, N).

    Raises:
        ValueError: shapes that do not fit each other, or a map that is not contiguous.
    """
    height, width = skip.shape[1:3]
    if low.shape[1:] != (height // 2, width // 2, len(low_weight)) or height % 2 or width % 2:
        raise ValueError(
            f"low has shape {tuple(low.shape)} and skip {tuple(skip.shape)}; expected skip twice as high and wide, and"
            f" {len(low_weight)} channels of low"
        )
    if skip.shape[3] != len(skip_weight):
        raise ValueError(f"skip has {skip.shape[3]} channels; expected {len(skip_weight)}")
    require_contiguous(low=low, skip=skip, low_weight=low_weight, skip_weight=skip_weight)
    if backend(low.device) == "triton":
        from gpupipe.kernels.pointwise_triton import upsample_expand_triton

        return upsample_expand_triton(low, skip, index, low_weight, skip_weight, bias)
    planes = accumulating(low).permute(0, 3, 1, 2)
    upsampled = interpolate(planes, scale_factor=2, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    # Rounded as the tensor cores' operand is.
    out = accumulating(upsampled.to(low.dtype)) @ accumulating(low_weight) + bias
    out += accumulating(skip).index_select(0, index) @ accumulating(skip_weight)
    return out.relu().to(low.dtype)


def accumulating(values: Tensor) -> Tensor:
    """``values`` in the precision that sums are accumulated in: float32, or float64 where that is what came in."""
    return values if values.dtype == torch.float64 else values.float()


def require_contiguous(**tensors: Tensor | None) -> None:
    """Refuse memory that the kernels cannot address.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected contiguous memory")
