"""Cubic resizing as OpenCV does it, as weights: the arithmetic that crop_resize and paste_blend share.

``cv2.resize(…, interpolation=cv2.INTER_CUBIC)`` samples destination pixel ``d`` of ``D`` at source coordinate
``(d + ½)·S/D − ½`` (half-pixel centres) with Keys' cubic, a = −0.75, over four taps that are clamped to the image's
edge; it never antialiases. Source: R. G. Keys, "Cubic convolution interpolation for digital image processing", 1981;
a and the coordinates as in OpenCV's imgproc module.

The resize is linear and separable, so that a batch whose samples all have other sizes is two batched matrix products
with dense weights, ``rows @ image @ columns^T``; a zero weight adds exactly nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUBIC_A = -0.75


def cubic_weights(position: Tensor, source: Tensor, target: Tensor, width: int) -> Tensor:
    """Dense weights of a cubic resize from ``source`` to ``target`` pixels along one axis.

    Args:
        position: destination pixels, integers in ``[0, target)``, shape (B, D).
        source: size of each sample's source, integers, shape (B,), at most ``width``.
        target: size of each sample's destination, integers, shape (B,).
        width: columns of the result; the taps of a sample lie in its first ``source`` columns.

    Returns:
        float32, shape (B, D, width); each row sums to 1.
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
    weights = torch.zeros(*position.shape, width, dtype=torch.float32, device=position.device)
    for offset, c in enumerate((c0, c1, c2, c3), start=-1):
        column = torch.minimum((tap + offset).clamp_min(0), source - 1)
        weights.scatter_add_(2, column[..., None], c[..., None])
    return weights


def round_to_uint8(values: Tensor) -> Tensor:
    """Round half to even and saturate to 0 … 255, as OpenCV's resize does."""
    return values.round().clamp_(0, 255).to(torch.uint8)


def cubic_resize(images: Tensor, width: int, height: int) -> Tensor:
    """Resize images as ``cv2.resize(…, (width, height), interpolation=cv2.INTER_CUBIC)`` does.

    uint8 (B, C, H, W) → uint8 (B, C, height, width).
    """

    def weights(source: int, target: int) -> Tensor:
        position = torch.arange(target, device=images.device)[None]
        size = position.new_tensor([source]), position.new_tensor([target])
        return cubic_weights(position, *size, source)

    resized = weights(images.shape[2], height) @ images.float() @ weights(images.shape[3], width).mT
    return round_to_uint8(resized)
