"""Paste and blend: the network's mouth back into its template frame, a batch at a time, as BGR or as NV12.

    mouth (3, 320, 320) in [0, 1] ── ×255, truncate ──> inner of crop328 (its 4-pixel ring stays the template's)
                                                          │ cubic, 328 → box
    frame (H, W, 3) ─────────── blend inside the box ─────┴──> finished frame

Convention: as in crop_resize. Outside the box a finished frame is the template's, bit for bit. Blending weighs the
painted pixel by ``min(1, (distance to the nearest edge of the box + ½) / feather)``, distances in whole pixels of the
frame from 0 at the box's outermost pixels; ``feather=0`` pastes hard. Where ``keep`` is set the template's pixel stays.

NV12: the background is converted once, when the template is loaded; here only the 2×2 cells that the box touches are
computed, from the finished RGB pixels, so that the result equals converting the finished frame.

Here are the public functions and their plain-torch reference; on CUDA one Triton kernel finishes the boxes
(:mod:`gpupipe.kernels.paste_blend_triton`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, RING
from gpupipe.kernels.cubic import cubic_taps, resize_by_taps, round_to_uint8
from gpupipe.kernels.dispatch import backend
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
    crop_index: Tensor | None = None,
    max_box: tuple[int, int] | None = None,
) -> Tensor:
    """Finish frames as BGR (or whatever order ``frames`` has).

    Args:
        mouth: floating (B, 3, 320, 320) in [0, 1], the network's output; or uint8, already scaled and truncated.
        crops: uint8 (N, 3, 328, 328) of :func:`~gpupipe.kernels.crop_resize.crop_resize`; only their ring is used.
        frames: uint8 (L, H, W, 3).
        index: int64 (B,), which frame each sample takes.
        boxes: integers (B, 4), half-open, inside the frame and not empty.
        feather: width of the fade at the box's edge, in pixels of the frame, ≥ 0.
        keep: bool (L, H, W), pixels of the template that are not painted over.
        crop_index: int64 (B,), which of ``crops`` each sample takes; None takes the b-th for sample b.
        max_box: at least the width and height of every box, where the caller knows them: on CUDA, what is beyond is
            not painted. None takes the frame's size and costs a launch with more programs that have nothing to do.

    Returns:
        uint8 (B, H, W, 3).
    """
    out = frames.index_select(0, index)
    return _paste_blend(mouth, crops, frames, index, boxes, out, feather, keep, crop_index, max_box, nv12=False)


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
    crop_index: Tensor | None = None,
    max_box: tuple[int, int] | None = None,
) -> Tensor:
    """Finish frames as NV12: equal to :func:`paste_blend` on BGR frames followed by ``to_nv12``.

    Args:
        mouth, crops, frames, index, boxes, feather, keep, crop_index, max_box: as for :func:`paste_blend`; H and W
            are even.
        background: uint8 (B, H·3/2, W), each sample's frame as ``to_nv12`` converts it; **written in place**.

    Returns:
        ``background``, finished.
    """
    return _paste_blend(mouth, crops, frames, index, boxes, background, feather, keep, crop_index, max_box, nv12=True)


def _paste_blend(
    mouth: Tensor,
    crops: Tensor,
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    out: Tensor,
    feather: float,
    keep: Tensor | None,
    crop_index: Tensor | None,
    max_box: tuple[int, int] | None,
    *,
    nv12: bool,
) -> Tensor:
    """Write each box into ``out``, which holds the background."""
    if backend(frames.device) == "triton":
        from gpupipe.kernels.paste_blend_triton import paste_blend_triton

        if crop_index is None:
            crop_index = torch.arange(len(index), device=index.device)
        places = (crop_index, frames, index, boxes, out)
        return paste_blend_triton(mouth, crops, *places, nv12=nv12, max_box=max_box, feather=feather, keep=keep)
    if crop_index is not None:
        crops = crops.index_select(0, crop_index)
    pixels, rows, columns = _finish_region(mouth, crops, frames, index, boxes, feather, keep, align=2 if nv12 else 1)
    batch = _batch_index(index)
    if not nv12:
        out[batch, rows[:, :, None], columns[:, None, :]] = pixels
        return out
    luma, chroma = luma_chroma(pixels, order="bgr")
    out[batch, rows[:, :, None], columns[:, None, :]] = luma
    chroma_rows = frames.shape[1] + rows[:, ::2] // 2
    # Cb stands at the cell's even column and Cr at its odd one: the pair fills the same columns as the luma above it.
    out[batch, chroma_rows[:, :, None], columns[:, None, :]] = chroma.flatten(2)
    return out


def bytes_moved(
    size: tuple[int, int], box: tuple[int, int], dtype: torch.dtype = torch.float16, *, nv12: bool = True
) -> int:
    """The fewest bytes that finishing one frame can move.

    The template's frame is copied (read and written once), the network's output, the ring and the box's template pixels
    are read once; what is written in the box is part of the copy.

    Args:
        size: width and height of the frame.
        box: width and height of the box.
        dtype: of the network's output.
        nv12: the frame is NV12, 3/2 bytes a pixel; otherwise 3.
    """
    frame = size[0] * size[1] * 3 // (2 if nv12 else 1)
    box_pixels = 3 * box[0] * box[1] if nv12 else 0  # of a BGR frame they come with the copy
    return 2 * frame + 3 * INNER_SIZE**2 * dtype.itemsize + 3 * (CROP_SIZE**2 - INNER_SIZE**2) + box_pixels


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
    row_taps, column_taps = cubic_taps(row_in_box, size, ymax - ymin), cubic_taps(column_in_box, size, xmax - xmin)
    painted = round_to_uint8(resize_by_taps(canvas, row_taps, column_taps))

    # Channel by channel: each step below then runs over neighbouring numbers.
    batch_index = index[:, None, None]
    template = frames[batch_index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    row_distance = torch.minimum(rows - ymin[:, None], ymax[:, None] - 1 - rows)
    column_distance = torch.minimum(columns - xmin[:, None], xmax[:, None] - 1 - columns)
    distance = torch.minimum(row_distance[:, :, None], column_distance[:, None, :])
    inside = distance >= 0
    if keep is not None:
        inside &= ~keep[batch_index, rows[:, :, None], columns[:, None, :]]
    if feather > 0:
        alpha = ((distance + 0.5) / feather).clamp(0, 1)[:, None]
        painted = round_to_uint8(template + alpha * (painted.float() - template))
    return torch.where(inside[:, None], painted, template).permute(0, 2, 3, 1), rows, columns


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
