"""Crop and resize: template frames and boxes → the network's input, a batch at a time.

    frame (H, W, 3) ── box ──> crop (h, w, 3) ── cubic ──> crop328 (3, 328, 328) uint8
                                                             │ inner 320×320, ÷ 255
                       image (6, 320, 320) = [ inner , inner with the mouth painted over ]

Convention: frames are uint8 HWC BGR; boxes are half-open ``(xmin, ymin, xmax, ymax)`` inside the frame; taps are
clamped to the crop's edge, not the frame's; no antialiasing; results are rounded half to even to uint8, then scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpupipe.kernels.cubic import cubic_weights, round_to_uint8

CROP_SIZE = 328
"""Height and width of the resized crop."""

RING = 4
"""Width of the crop's ring that the network neither sees nor paints."""

MASK_ROWS = slice(5, 310)
MASK_COLUMNS = slice(5, 315)
"""The part of the inner 320×320 that is hidden from the network: a 310×305 rectangle at (5, 5)."""


def crop_resize(frames: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
    """Cut each sample's box out of its frame and resize it to 328×328.

    Args:
        frames: uint8 (L, H, W, 3).
        index: int64 (B,), which frame each sample takes.
        boxes: int32 or int64 (B, 4), half-open, inside the frame and not empty.

    Returns:
        uint8 (B, 3, 328, 328), the frames' colour order.
    """
    xmin, ymin, xmax, ymax = boxes.long().unbind(1)
    w, h = xmax - xmin, ymax - ymin
    # One host read: the widest box sets the size of the padded crops. CUDA uses the fused kernel, which needs none.
    max_w, max_h = int(w.max()), int(h.max())
    device = frames.device
    columns = xmin[:, None] + torch.minimum(torch.arange(max_w, device=device)[None], w[:, None] - 1)
    rows = ymin[:, None] + torch.minimum(torch.arange(max_h, device=device)[None], h[:, None] - 1)
    crops = frames[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    position = torch.arange(CROP_SIZE, device=device).expand(len(boxes), -1)
    size = torch.full_like(w, CROP_SIZE)
    row_weights = cubic_weights(position, h, size, max_h)
    column_weights = cubic_weights(position, w, size, max_w)
    resized = row_weights[:, None] @ crops.permute(0, 3, 1, 2).float() @ column_weights[:, None].mT
    return round_to_uint8(resized)


def network_input(crops: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The network's image: the crop's inner 320×320 beside itself with the mouth masked, scaled to [0, 1].

    Args:
        crops: uint8 (B, 3, 328, 328), from :func:`crop_resize`.

    Returns:
        ``dtype`` (B, 6, 320, 320).
    """
    inner = inner_region(crops).to(torch.float32) / 255
    return torch.cat([inner, mask_mouth(inner)], dim=1).to(dtype)


def inner_region(crops: Tensor) -> Tensor:
    """The 320×320 that the network sees of (…, 328, 328)."""
    return crops[..., RING:-RING, RING:-RING]


def mask_mouth(inner: Tensor) -> Tensor:
    """A copy of (…, 320, 320) with rows 5…309 and columns 5…314 set to 0."""
    masked = inner.clone()
    masked[..., MASK_ROWS, MASK_COLUMNS] = 0
    return masked
