"""Paste and blend: the network's mouth back into its template frame, a batch at a time, as BGR or as NV12.

    mouth (3, 320, 320) in [0, 1] ── ×255, truncate ──> inner of crop328 (its 4-pixel ring stays the template's)
                                                          │ cubic, 328 → box
    frame (H, W, 3) ─────────── blend inside the box ─────┴──> finished frame

Convention: as in crop_resize. Outside the box a finished frame is the template's, bit for bit. Blending weighs the
painted pixel by ``min(1, (distance to the nearest edge of the box + ½) / feather)``, distances in whole pixels of the
frame from 0 at the box's outermost pixels; ``feather=0`` pastes hard. Where ``keep`` is set the template's pixel stays.

NV12: the background is converted once, when the template is loaded; here only the 2×2 cells that the box touches are
computed, from the finished RGB pixels, so that the result equals converting the finished frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpupipe.kernels.crop_resize import CROP_SIZE, RING
from gpupipe.kernels.cubic import cubic_weights, round_to_uint8
from gpupipe.kernels.nv12 import luma_chroma


def paste_blend(
    mouth: Tensor,
    crops: Tensor,
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    *,
    feather: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Finish frames as BGR (or whatever order ``frames`` has).

    Args:
        mouth: floating (B, 3, 320, 320) in [0, 1], the network's output; or uint8, already scaled and truncated.
        crops: uint8 (B, 3, 328, 328), the samples' :func:`~gpupipe.kernels.crop_resize.crop_resize`.
        frames: uint8 (L, H, W, 3).
        index: int64 (B,), which frame each sample takes.
        boxes: integers (B, 4), half-open, inside the frame and not empty.
        feather: width of the fade at the box's edge, in pixels of the frame, ≥ 0.
        keep: bool (L, H, W), pixels of the template that are not painted over.

    Returns:
        uint8 (B, H, W, 3).
    """
    pixels, rows, columns = _finish_region(mouth, crops, frames, index, boxes, feather, keep, align=1)
    finished = frames.index_select(0, index)
    finished[_batch_index(index), rows[:, :, None], columns[:, None, :]] = pixels
    return finished


def paste_blend_nv12(
    mouth: Tensor,
    crops: Tensor,
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    background: Tensor,
    *,
    feather: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Finish frames as NV12: equal to :func:`paste_blend` on BGR frames followed by ``to_nv12``.

    Args:
        background: uint8 (B, H·3/2, W), each sample's frame as ``to_nv12`` converts it; **written in place**.

    Returns:
        ``background``, finished.
    """
    pixels, rows, columns = _finish_region(mouth, crops, frames, index, boxes, feather, keep, align=2)
    luma, chroma = luma_chroma(pixels, order="bgr")
    batch = _batch_index(index)
    background[batch, rows[:, :, None], columns[:, None, :]] = luma
    chroma_rows = frames.shape[1] + rows[:, ::2] // 2
    # Cb stands at the cell's even column and Cr at its odd one: the pair fills the same columns as the luma above it.
    background[batch, chroma_rows[:, :, None], columns[:, None, :]] = chroma.flatten(2)
    return background


def _finish_region(
    mouth: Tensor,
    crops: Tensor,
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    feather: float,
    keep: Tensor | None,
    align: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The finished pixels of each box, grown to multiples of ``align``.

    Samples of a batch have boxes of different sizes: each axis has the length of the longest, and a smaller sample's
    last cell is repeated, so that writing the region writes equal values more than once and nothing has to be masked.

    Returns:
        pixels uint8 (B, R, C, 3), and the frame rows (B, R) and columns (B, C) that they belong to.
    """
    xmin, ymin, xmax, ymax = boxes.long().unbind(1)
    rows = _aligned_span(ymin, ymax, align)
    columns = _aligned_span(xmin, xmax, align)

    canvas = crops.float()
    canvas[..., RING:-RING, RING:-RING] = mouth if mouth.dtype == torch.uint8 else (mouth.float() * 255).trunc()
    size = torch.full_like(xmin, CROP_SIZE)
    row_in_box = torch.minimum((rows - ymin[:, None]).clamp_min(0), (ymax - ymin)[:, None] - 1)
    column_in_box = torch.minimum((columns - xmin[:, None]).clamp_min(0), (xmax - xmin)[:, None] - 1)
    row_weights = cubic_weights(row_in_box, size, ymax - ymin, CROP_SIZE)
    column_weights = cubic_weights(column_in_box, size, xmax - xmin, CROP_SIZE)
    painted = round_to_uint8(row_weights[:, None] @ canvas @ column_weights[:, None].mT).permute(0, 2, 3, 1)

    batch_index = index[:, None, None]
    template = frames[batch_index, rows[:, :, None], columns[:, None, :]]
    row_distance = torch.minimum(rows - ymin[:, None], ymax[:, None] - 1 - rows)
    column_distance = torch.minimum(columns - xmin[:, None], xmax[:, None] - 1 - columns)
    distance = torch.minimum(row_distance[:, :, None], column_distance[:, None, :])
    inside = distance >= 0
    if keep is not None:
        inside &= ~keep[batch_index, rows[:, :, None], columns[:, None, :]]
    if feather > 0:
        alpha = ((distance + 0.5) / feather).clamp(0, 1)[..., None]
        painted = round_to_uint8(template + alpha * (painted.float() - template))
    return torch.where(inside[..., None], painted, template), rows, columns


def _aligned_span(low: Tensor, high: Tensor, align: int) -> Tensor:
    """Pixels (B, D) of ``[low, high)`` grown to whole cells of ``align`` pixels; short spans repeat their last cell."""
    first = torch.div(low, align, rounding_mode="floor")
    cells = torch.div(high + align - 1, align, rounding_mode="floor") - first
    # One host read, as in crop_resize.
    offset = torch.arange(int(cells.max()), device=low.device)[None]
    cell = first[:, None] + torch.minimum(offset, cells[:, None] - 1)
    within = torch.arange(align, device=low.device)
    return (cell[..., None] * align + within).flatten(1)


def _batch_index(index: Tensor) -> Tensor:
    return torch.arange(len(index), device=index.device)[:, None, None]
