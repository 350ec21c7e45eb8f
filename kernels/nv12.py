"""RGB ↔ NV12 for whole frames and for regions of them: one definition of matrix, range and chroma siting.

NV12 of an H×W frame is one uint8 plane of H·3/2 rows: H rows of luma, then H/2 rows of chroma, Cb and Cr interleaved.

    Y  Y  Y  Y      rows 0 … H−1
    Y  Y  Y  Y
    Cb Cr Cb Cr     rows H … 3H/2−1: one pair for each 2×2 pixels

Convention: BT.709 matrix, limited range (Y 16…235, C 16…240; ITU-R BT.709-6 §3), chroma in the middle of its 2×2
pixels (the mean of the four, computed before rounding), results rounded half up. H and W are even.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

ColorOrder = Literal["bgr", "rgb"]

KR, KB = 0.2126, 0.0722
"""BT.709's luma coefficients of red and blue; green's is 1 − KR − KB."""


def _matrix() -> Tensor:
    """(3, 3) float64: RGB in 0 … 255 → Y − 16, Cb − 128, Cr − 128 in limited range."""
    kg = 1 - KR - KB
    y = torch.tensor([KR, kg, KB], dtype=torch.float64)
    cb = (torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - y) / (2 * (1 - KB))
    cr = (torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - y) / (2 * (1 - KR))
    return torch.stack([y * 219 / 255, cb * 224 / 255, cr * 224 / 255])


@functools.cache
def yuv_matrix(order: ColorOrder) -> tuple[tuple[float, float, float], ...]:
    """Rows Y, Cb, Cr; columns in the frame's colour order; offsets 16, 128, 128 are added apart."""
    matrix = _matrix() if order == "rgb" else _matrix().flip(1)
    return tuple(tuple(row) for row in matrix.tolist())


def luma_chroma(pixels: Tensor, *, order: ColorOrder = "bgr") -> tuple[Tensor, Tensor]:
    """Convert a region of whole 2×2 cells.

    Args:
        pixels: uint8 (B, H, W, 3), H and W even.
        order: colour order of the last axis.

    Returns:
        luma uint8 (B, H, W) and chroma uint8 (B, H/2, W/2, 2), Cb then Cr.
    """
    b, h, w, _ = pixels.shape
    y_row, cb_row, cr_row = yuv_matrix(order)
    values = pixels.float()
    c0, c1, c2 = values.unbind(-1)
    luma = (c0 * y_row[0] + c1 * y_row[1] + c2 * y_row[2] + 16.5).to(torch.uint8)
    m0, m1, m2 = values.view(b, h // 2, 2, w // 2, 2, 3).sum(dim=(2, 4)).unbind(-1)
    chroma = [((m0 * row[0] + m1 * row[1] + m2 * row[2]) / 4 + 128.5).to(torch.uint8) for row in (cb_row, cr_row)]
    return luma, torch.stack(chroma, dim=-1)


def to_nv12(frames: Tensor, *, order: ColorOrder = "bgr") -> Tensor:
    """uint8 (B, H, W, 3) → NV12 uint8 (B, H·3/2, W); H and W must be even.

    Raises:
        ValueError: an odd height or width.
    """
    b, h, w, _ = frames.shape
    if h % 2 or w % 2:
        raise ValueError(f"frames are {w}×{h}; NV12 needs an even width and height")
    luma, chroma = luma_chroma(frames, order=order)
    return torch.cat([luma, chroma.reshape(b, h // 2, w)], dim=1)


def from_nv12(frames: Tensor, *, order: ColorOrder = "bgr") -> Tensor:
    """NV12 uint8 (B, H·3/2, W) → uint8 (B, H, W, 3); chroma is repeated over its 2×2 pixels, results are rounded."""
    height = frames.shape[1] * 2 // 3
    b, w = frames.shape[0], frames.shape[2]
    luma = frames[:, :height].double() - 16
    chroma = frames[:, height:].double().view(b, height // 2, w // 2, 2) - 128
    chroma = chroma.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    yuv = torch.cat([luma[..., None], chroma], dim=-1)
    rgb = yuv @ torch.linalg.inv(_matrix()).T.to(frames.device)
    if order == "bgr":
        rgb = rgb.flip(-1)
    return rgb.round().clamp(0, 255).to(torch.uint8)
