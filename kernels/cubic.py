"""Cubic resizing as OpenCV does it, by taps and weights: the arithmetic that crop_resize and paste_blend share.

``cv2.resize(…, interpolation=cv2.INTER_CUBIC)`` samples destination pixel ``d`` of ``D`` at source coordinate
``(d + ½)·S/D − ½`` (half-pixel centres) with Keys' cubic, a = −0.75, over four taps that are clamped to the image's
edge; it never antialiases. Source: R. G. Keys, "Cubic convolution interpolation for digital image processing", 1981;
a and the coordinates as in OpenCV's imgproc module.

The resize is separable: along each axis a destination row is a weighted sum of four source rows. On x86 Intel's IPP
computes it for OpenCV, in float32. Here are the same bits as IPP's on an AMD EPYC with AVX-512, found out by trying: a
coordinate's fraction is a multiple of 2⁻²³, weights are rounded once, rows are resized across first, and sums are added
up in the order of :func:`cubic_values`. IPP's code for other processors adds up in other orders: some five of a million
values are then a step off.
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
        (target, 4), which sum to 1 but for rounding.
    """
    position = torch.arange(target, device=device)
    # The coordinate times 2·target is an integer: the split into tap and fraction is exact.
    scaled = (2 * position + 1) * source - target
    tap = torch.div(scaled, 2 * target, rounding_mode="floor")
    x = (((scaled - tap * 2 * target).float() / (2 * target) + 1) - 1).double()
    a, y = CUBIC_A, 1 - x
    c0, c3 = a * x * y * y, a * x * x * y
    c1, c2 = y * (1 + x - (a + 2) * x * x), x * (1 + y - (a + 2) * y * y)
    taps = (tap[:, None] + torch.arange(-1, 3, device=device)).clamp_(0, source - 1)
    return taps, torch.stack([c0, c1, c2, c3], dim=-1).float()


def cubic_resize(images: Tensor, width: int, height: int) -> Tensor:
    """Resize images as ``cv2.resize(…, (width, height), interpolation=cv2.INTER_CUBIC)`` does.

    Floating or uint8 (…, H, W) with values in 0 … 255 → uint8 (…, height, width).
    """
    return cubic_values(images, width, height).to(torch.uint8)


def cubic_values(images: Tensor, width: int, height: int) -> Tensor:
    """:func:`cubic_resize`, its whole numbers left as float32, contiguous."""
    rows = _resize_rows(images.float().mT, width, (0, 1, 2, 3)).mT
    upper, lower = (_resize_rows(rows, height, pair) for pair in ((1, 0), (3, 2)))
    return upper.add_(lower).round_().clamp_(0, 255)  # half to even


def _resize_rows(images: Tensor, height: int, order: tuple[int, ...]) -> Tensor:
    """(…, H, W) → (…, height, W): the sum over these taps, in their order; each but the first is one multiply-add."""
    *many, h, w = images.shape
    count = math.prod(many)
    taps, weights = _taps_of_many(count, h, height, order, images.device)
    # An embedding bag is a weighted sum of a table's rows: the sparse matrix product that a resize is.
    # Its table is contiguous, since it sums another one in another order.
    summed = embedding_bag(taps, images.reshape(-1, w).contiguous(), mode="sum", per_sample_weights=weights)
    return summed.view(*many, height, w)


@functools.lru_cache(maxsize=1024)
def _taps_of_many(
    count: int, source: int, target: int, order: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """These of :func:`cubic_taps`, for ``count`` images that lie one below the other: (count·target, taps) each."""
    taps, weights = cubic_taps(source, target, device)
    first = source * torch.arange(count, device=device)[:, None, None]
    return (taps[:, order] + first).view(-1, len(order)), weights[:, order].repeat(count, 1)
