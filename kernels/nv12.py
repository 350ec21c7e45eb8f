"""BGR ↔ NV12 for whole frames and for regions of them: one definition of matrix, range and chroma siting.

NV12 of an H×W frame is one uint8 plane of H·3/2 rows: H rows of luma, then H/2 rows of chroma, Cb and Cr interleaved.

    Y  Y  Y  Y      rows 0 … H−1
    Y  Y  Y  Y
    Cb Cr Cb Cr     rows H … 3H/2−1: one pair for each 2×2 pixels

Convention: BT.709 matrix, limited range (Y 16…235, C 16…240; ITU-R BT.709-6 §3), chroma in the middle of its 2×2
pixels (the mean of the four, computed before rounding), results rounded half up. H and W are even. For RGB, flip the
colours, the last axis: ``to_nv12(rgb.flip(-1))``, ``from_nv12(nv12).flip(-1)``.

On CUDA whole frames are converted by Triton kernels (:mod:`gpupipe.kernels.nv12_triton`), and on a CPU by others in
LLVM (:mod:`gpupipe.kernels.nv12_llvm`), to the same bits.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from gpupipe.kernels.dispatch import backend

PixelFormat = Literal["bgr", "nv12"]
"""What finished frames are: BGR (H, W, 3), or NV12 (H·3/2, W), which has a chroma pair for each 2×2 pixels."""

KR, KB = 0.2126, 0.0722
"""BT.709's luma coefficients of red and blue; green's is 1 − KR − KB."""


def ycbcr_matrix(kr: float = KR, kb: float = KB, *, full_range: bool = False) -> Tensor:
    """(3, 3) float64: RGB in 0 … 255 → Y, Cb − 128, Cr − 128; in limited range Y − 16 instead of Y."""
    kg = 1 - kr - kb
    y = torch.tensor([kr, kg, kb], dtype=torch.float64)
    cb = (torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - y) / (2 * (1 - kb))
    cr = (torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - y) / (2 * (1 - kr))
    luma, chroma = (1.0, 1.0) if full_range else (219 / 255, 224 / 255)
    return torch.stack([y * luma, cb * chroma, cr * chroma])


FRACTION_BITS = 23
"""Binary digits after the point of :func:`yuv_weights`: as many as int32 has room for."""

_CHUNK = 1 << 16
"""Pixels converted at a time on the CPU, so that intermediate values stay in the cache."""


@functools.cache
def yuv_weights() -> tuple[tuple[int, int, int], ...]:
    """BT.709 in whole numbers: rows Y, Cb, Cr; columns blue, green, red.

    Y is in units of 2⁻²³ of a pixel's value; Cb and Cr too, of the *sum* of a cell's four pixels. Whole numbers are as
    exact here as float32 is, and add up to the same bits in whatever order and on whatever device. The chroma rows sum
    to 0, so that grey is exactly 128.
    """
    matrix = ycbcr_matrix().flip(1) * (1 << FRACTION_BITS)
    y = [round(v) for v in matrix[0].tolist()]
    cb, cr = ([round(v / 4) for v in row] for row in matrix[1:].tolist())
    return (y[0], y[1], y[2]), (cb[0], -cb[0] - cb[2], cb[2]), (cr[0], -cr[0] - cr[2], cr[2])


def write_luma_chroma(planes: Tensor, luma: Tensor, chroma: Tensor) -> None:
    """Convert BGR planes, int32 (3, H, W), into uint8 luma (H, W) and chroma (H/2, W/2, 2); H and W are even."""
    y_weights, *chroma_weights = yuv_weights()
    luma.copy_(_weighted_sum(planes, y_weights, offset=16))
    cells = planes[:, 0::2] + planes[:, 1::2]
    cells = cells[..., 0::2] + cells[..., 1::2]
    for channel, weights in zip(chroma.unbind(-1), chroma_weights, strict=True):
        channel.copy_(_weighted_sum(cells, weights, offset=128))


def _weighted_sum(planes: Tensor, weights: tuple[int, int, int], offset: int) -> Tensor:
    """``offset`` + the weighted sum of three int32 planes, rounded half up; int32 in 0 … 255."""
    total = planes[0] * weights[0]
    total.add_(planes[1], alpha=weights[1]).add_(planes[2], alpha=weights[2])
    return total.add_((2 * offset + 1) << (FRACTION_BITS - 1)).bitwise_right_shift_(FRACTION_BITS)


def to_nv12(frames: Tensor) -> Tensor:
    """BGR uint8 (B, H, W, 3) → NV12 uint8 (B, H·3/2, W); H and W must be even.

    Raises:
        ValueError: an odd height or width.
    """
    b, h, w, _ = frames.shape
    if h % 2 or w % 2:
        raise ValueError(f"frames are {w}×{h}; NV12 needs an even width and height")
    by = backend(frames.device)
    if by == "triton":
        from gpupipe.kernels.nv12_triton import to_nv12_triton

        return to_nv12_triton(frames)
    nv12 = frames.new_empty(b, h * 3 // 2, w)
    if by == "llvm":
        from gpupipe.kernels import nv12_llvm

        if nv12_llvm.takes(frames):
            return nv12_llvm.to_nv12_llvm(frames, nv12)
    return to_nv12_torch(frames, nv12)


def to_nv12_torch(frames: Tensor, nv12: Tensor) -> Tensor:
    """:func:`to_nv12` in plain torch, into ``nv12``, which is returned."""
    h, w = frames.shape[1:3]
    step = max(2, _CHUNK // w // 2 * 2) if frames.device.type == "cpu" else h
    for frame, luma, chroma in zip(frames, nv12[:, :h], nv12[:, h:].unflatten(2, (w // 2, 2)), strict=True):
        for first in range(0, h, step):
            # Plane by plane: each step then runs over neighbouring numbers.
            rows = frame[first : first + step].permute(2, 0, 1)
            planes = rows.to(torch.int32, memory_format=torch.contiguous_format)
            some_chroma = chroma[first // 2 : (first + step) // 2]
            write_luma_chroma(planes, luma[first : first + step], some_chroma)
    return nv12


INVERSE_BITS = 21
"""Binary digits after the point of :func:`bgr_weights`."""


@functools.cache
def bgr_weights() -> tuple[tuple[int, int, int], ...]:
    """The inverse of BT.709 in units of 2⁻²¹: rows blue, green, red; columns Y − 16, Cb − 128, Cr − 128."""
    inverse = torch.linalg.inv(ycbcr_matrix()) * (1 << INVERSE_BITS)
    return tuple((round(y), round(u), round(v)) for y, u, v in inverse.flip(0).tolist())


def from_nv12(frames: Tensor) -> Tensor:
    """NV12 uint8 (B, H·3/2, W) → BGR uint8 (B, H, W, 3); chroma is repeated over its 2×2 pixels; rounded half up."""
    by = backend(frames.device)
    if by == "triton":
        from gpupipe.kernels.nv12_triton import from_nv12_triton

        return from_nv12_triton(frames)
    height = frames.shape[1] * 2 // 3
    b, w = frames.shape[0], frames.shape[2]
    if by == "llvm":
        from gpupipe.kernels import nv12_llvm

        if nv12_llvm.takes(frames):
            return nv12_llvm.from_nv12_llvm(frames, frames.new_empty(b, height, w, 3))
    luma = frames[:, :height].to(torch.int32) - 16
    chroma = frames[:, height:].to(torch.int32).view(b, height // 2, w // 2, 2) - 128
    cb, cr = chroma.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).unbind(-1)
    half = 1 << (INVERSE_BITS - 1)
    channels = [(luma * y + cb * u + cr * v + half) >> INVERSE_BITS for y, u, v in bgr_weights()]
    return torch.stack(channels, dim=-1).clamp_(0, 255).to(torch.uint8)


def nv12_window(frames: Tensor, window: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Views of a part of NV12 frames.

    Args:
        frames: uint8 (B, H·3/2, W).
        window: half-open (xmin, ymin, xmax, ymax), all even.

    Returns:
        luma (B, h, w) and chroma (B, h/2, w), Cb and Cr interleaved; one below the other they are NV12 again.
    """
    xmin, ymin, xmax, ymax = window
    height = frames.shape[1] // 3 * 2
    return frames[:, ymin:ymax, xmin:xmax], frames[:, height + ymin // 2 : height + ymax // 2, xmin:xmax]


def bytes_moved(size: tuple[int, int]) -> int:
    """The fewest bytes that converting one frame of ``size`` (width, height) can move, either way: both forms once."""
    return size[0] * size[1] * 9 // 2
