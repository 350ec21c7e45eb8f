"""Cubic resizing as OpenCV does it, as weights: the arithmetic that crop_resize and paste_blend share.

``cv2.resize(…, interpolation=cv2.INTER_CUBIC)`` samples destination pixel ``d`` of ``D`` at source coordinate
``(d + ½)·S/D − ½`` (half-pixel centres) with Keys' cubic, a = −0.75, over four taps that are clamped to the image's
edge; it never antialiases. Source: R. G. Keys, "Cubic convolution interpolation for digital image processing", 1981;
a and the coordinates as in OpenCV's imgproc module.

The resize is separable: along each axis a destination row is a weighted sum of four source rows. Samples of a batch may
each have another size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CUBIC_A = -0.75


Taps = tuple[Tensor, Tensor]
"""Of each destination pixel: its four source pixels, int64 (B, D, 4), and their weights, float32 (B, D, 4)."""


def cubic_taps(position: Tensor, source: Tensor, target: Tensor) -> Taps:
    """What a cubic resize from ``source`` to ``target`` pixels sums up along one axis.

    Args:
        position: destination pixels, integers in ``[0, target)``, shape (B, D).
        source: size of each sample's source, integers, shape (B,).
        target: size of each sample's destination, integers, shape (B,).

    Returns:
        taps in ``[0, source)``, and weights that sum to 1 over the last axis.
    """
    source, target = source.long()[:, None], target.long()[:, None]
    # The coordinate times 2·target is an integer: the split into tap and fraction is exact.
    scaled = (2 * position.long() + 1) * source - target
    tap = torch.div(scaled, 2 * target, rounding_mode="floor")
    x = (scaled - tap * 2 * target).float() / (2 * target).float()
    a = CUBIC_A
    u, y = x + 1, 1 - x
    c0 = ((a * u - 5 * a) * u + 8 * a) * u - 4 * a
    c1 = ((a + 2) * x - (a + 3)) * x * x + 1
    c2 = ((a + 2) * y - (a + 3)) * y * y + 1
    c3 = 1 - c0 - c1 - c2
    taps = tap[..., None] + torch.arange(-1, 3, device=tap.device)
    return torch.minimum(taps.clamp_min(0), source[..., None] - 1), torch.stack([c0, c1, c2, c3], dim=-1)


def resize_by_taps(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Apply taps along both axes: float32 (B, C, H, W) → contiguous (B, C, D rows, D columns)."""
    return _resize_rows(_resize_rows(images, rows).mT, columns).mT.contiguous()


def _resize_rows(images: Tensor, taps: Taps) -> Tensor:
    """(B, C, H, W) → (B, C, D, W)."""
    b, c, h, w = images.shape
    first = h * torch.arange(b * c, device=images.device).view(b, c, 1, 1)  # of each image's rows
    row = (taps[0][:, None] + first).view(-1, 4)
    weight = taps[1][:, None].expand(-1, c, -1, -1).reshape(-1, 4)
    # An embedding bag is a weighted sum of a table's rows: the sparse matrix product that a resize is.
    summed = embedding_bag(row, images.reshape(-1, w), mode="sum", per_sample_weights=weight)
    return summed.view(b, c, -1, w)


def round_to_uint8(values: Tensor) -> Tensor:
    """Round half to even and saturate to 0 … 255, as OpenCV's resize does."""
    return values.round().clamp_(0, 255).to(torch.uint8)


def cubic_resize(images: Tensor, width: int, height: int) -> Tensor:
    """Resize images as ``cv2.resize(…, (width, height), interpolation=cv2.INTER_CUBIC)`` does.

    uint8 (B, C, H, W) → uint8 (B, C, height, width).
    """

    def taps(source: int, target: int) -> Taps:
        position = torch.arange(target, device=images.device).expand(len(images), -1)
        sizes = (torch.full((len(images),), size, device=images.device) for size in (source, target))
        return cubic_taps(position, *sizes)

    rows, columns = taps(images.shape[2], height), taps(images.shape[3], width)
    return round_to_uint8(resize_by_taps(images.float(), rows, columns))
