"""Cubic resizing as OpenCV does it, by taps and weights: the arithmetic that crop_resize and paste_blend share.

``cv2.resize(…, interpolation=cv2.INTER_CUBIC)`` samples destination pixel ``d`` of ``D`` at source coordinate
``(d + ½)·S/D − ½`` (half-pixel centres) with Keys' cubic, a = −0.75, over four taps that are clamped to the image's
edge; it never antialiases. Source: R. G. Keys, "Cubic convolution interpolation for digital image processing", 1981;
a and the coordinates as in OpenCV's imgproc module.

The resize is separable: along each axis a destination row is a weighted sum of four source rows.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CUBIC_A = -0.75


@functools.lru_cache(maxsize=1024)
def cubic_taps(source: int, target: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The taps of a cubic resize from ``source`` to ``target`` pixels along one axis; cached, so do not write to them.

    Returns:
        each destination pixel's four source pixels in ``[0, source)``, int64 (target, 4), and their weights, float32
        (target, 4), which sum to 1.
    """
    position = torch.arange(target, device=device)
    # The coordinate times 2·target is an integer: the split into tap and fraction is exact.
    scaled = (2 * position + 1) * source - target
    tap = torch.div(scaled, 2 * target, rounding_mode="floor")
    x = (scaled - tap * 2 * target).float() / (2 * target)
    a = CUBIC_A
    u, y = x + 1, 1 - x
    c0 = ((a * u - 5 * a) * u + 8 * a) * u - 4 * a
    c1 = ((a + 2) * x - (a + 3)) * x * x + 1
    c2 = ((a + 2) * y - (a + 3)) * y * y + 1
    c3 = 1 - c0 - c1 - c2
    taps = (tap[:, None] + torch.arange(-1, 3, device=device)).clamp_(0, source - 1)
    return taps, torch.stack([c0, c1, c2, c3], dim=-1)


def cubic_resize(images: Tensor, width: int, height: int) -> Tensor:
    """Resize images as ``cv2.resize(…, (width, height), interpolation=cv2.INTER_CUBIC)`` does.

    Floating or uint8 (…, H, W) with values in 0 … 255 → uint8 (…, height, width).
    """
    return cubic_values(images, width, height).to(torch.uint8)


def cubic_values(images: Tensor, width: int, height: int) -> Tensor:
    """:func:`cubic_resize`, its whole numbers left as float32, contiguous."""
    rows = _resize_rows(images.float(), height)
    # Rounded half to even and saturated, as OpenCV's resize does.
    return _resize_rows(rows.mT, width).mT.contiguous().round_().clamp_(0, 255)


def _resize_rows(images: Tensor, height: int) -> Tensor:
    """(…, H, W) → (…, height, W)."""
    *many, h, w = images.shape
    count = math.prod(many)
    taps, weights = _taps_of_many(count, h, height, images.device)
    # An embedding bag is a weighted sum of a table's rows: the sparse matrix product that a resize is.
    # Its table is contiguous, since it sums another one in another order.
    summed = embedding_bag(taps, images.reshape(-1, w).contiguous(), mode="sum", per_sample_weights=weights)
    return summed.view(*many, height, w)


@functools.lru_cache(maxsize=1024)
def _taps_of_many(count: int, source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`cubic_taps` of ``count`` images that lie one below the other: (count·target, 4) each."""
    taps, weights = cubic_taps(source, target, device)
    first = source * torch.arange(count, device=device)[:, None, None]
    return (taps + first).view(-1, 4), weights.repeat(count, 1)
