"""Paste and blend: the network's mouth back into its template frame, a batch at a time, as BGR or as NV12.

    mouth (3, 320, 320) in [0, 1] ── ×255, truncate ──> inner of crop328 (its 4-pixel ring stays the template's)
                                                          │ cubic, 328 → box
    frame (H, W, 3) ─────────── blend inside the box ─────┴──> finished frame

Convention: as in crop_resize. Outside the box a finished frame is the template's, bit for bit. Blending weighs the
painted pixel by ``min(1, (distance to the nearest edge of the box + ½) / feather)``, distances in whole pixels of the
frame from 0 at the box's outermost pixels; ``feather=0`` pastes hard. Where ``keep`` is set the template's pixel stays.

NV12: the background is converted once, when the template is loaded; here only the 2×2 cells that the box touches are
computed, from the finished RGB pixels, so that the result equals converting the finished frame.

Here are the public function and its plain-torch reference; on CUDA one Triton kernel finishes the boxes
(:mod:`gpupipe.kernels.paste_blend_triton`), on a CPU one in LLVM (:mod:`gpupipe.kernels.paste_blend_llvm`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, inner_region
from gpupipe.kernels.cubic import cubic_values
from gpupipe.kernels.dispatch import backend
from gpupipe.kernels.nv12 import nv12_window, write_luma_chroma

Box = tuple[int, int, int, int]


def paste_blend(
    mouth: Tensor,
    crops: Tensor,
    crop_index: Tensor,
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    out: Tensor,
    *,
    nv12: bool,
    max_box: tuple[int, int] | None = None,
    feather: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Finish frames: write each sample's box, painted, into a copy of its template frame.

    Args:
        mouth: floating (B, 3, 320, 320) in [0, 1], the network's output; or uint8, already scaled and truncated.
        crops: uint8 (N, 3, 328, 328) of :func:`~gpupipe.kernels.crop_resize.crop_resize`; only their ring is used.
        crop_index: int64 (B,), which of ``crops`` each sample takes.
        frames: uint8 BGR (L, H, W, 3); H and W even for NV12.
        index: int64 (B,), which frame each sample takes.
        boxes: integers (B, 4), half-open, inside the frame and not empty.
        out: each sample's template frame, **written in place**: uint8 (B, H, W, 3), ``frames.index_select(0, index)``;
            or with ``nv12`` (B, H·3/2, W), the same as ``to_nv12`` converts it.
        nv12: what ``out`` is. The result is then the finished BGR frame's, converted, bit for bit.
        max_box: at least the width and height of every box, where the caller knows them: on CUDA, what is beyond is
            not painted. None takes the frame's size and costs a launch with more programs that have nothing to do.
        feather: width of the fade at the box's edge, in pixels of the frame, ≥ 0.
        keep: bool (L, H, W), pixels of the template that are not painted over.

    Returns:
        ``out``, finished.
    """
    by = backend(frames.device)
    if by == "triton":
        from gpupipe.kernels.paste_blend_triton import paste_blend_triton

        places = (crop_index, frames, index, boxes, out)
        return paste_blend_triton(mouth, crops, *places, nv12=nv12, max_box=max_box, feather=feather, keep=keep)
    finish = _finish
    if by == "llvm":
        from gpupipe.kernels import paste_blend_llvm

        if paste_blend_llvm.takes(mouth, crops, frames, boxes, out, keep):
            finish = paste_blend_llvm.finish
    samples = zip(crop_index.tolist(), index.tolist(), boxes.tolist(), strict=True)
    for sample, (ring, frame, box) in enumerate(samples):
        kept = None if keep is None else keep[frame]
        alpha = _seam(box[2] - box[0], box[3] - box[1], feather, frames.device) if feather > 0 else None
        finish(mouth[sample], crops[ring], frames[frame], box, out[sample], nv12=nv12, alpha=alpha, keep=kept)
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


def _finish(
    mouth: Tensor,
    crop: Tensor,
    frame: Tensor,
    box: Box,
    out: Tensor,
    *,
    nv12: bool,
    alpha: Tensor | None,
    keep: Tensor | None,
) -> None:
    """:func:`paste_blend` of one sample, in plain torch.

    Args:
        alpha: how much of the painted pixel shows, float32 (height, width) of the box; None is 1.
    """
    planes, window = _finish_region(mouth, crop, frame, box, alpha, keep, align=2 if nv12 else 1)
    if nv12:
        luma, chroma = nv12_window(out[None], window)
        write_luma_chroma(planes, luma[0], chroma[0].unflatten(1, (-1, 2)))
    else:
        xmin, ymin, xmax, ymax = window
        out[ymin:ymax, xmin:xmax] = planes.permute(1, 2, 0)


def _finish_region(
    mouth: Tensor, crop: Tensor, frame: Tensor, box: Box, alpha: Tensor | None, keep: Tensor | None, align: int
) -> tuple[Tensor, Box]:
    """The finished pixels of one box, grown to multiples of ``align``: int32 (3, h, w), and where they belong."""
    xmin, ymin, xmax, ymax = box
    left, top = xmin // align * align, ymin // align * align
    right, bottom = -(-xmax // align) * align, -(-ymax // align) * align
    # Channel by channel: each step below then runs over neighbouring numbers.
    region = frame[top:bottom, left:right].permute(2, 0, 1).to(torch.int32, memory_format=torch.contiguous_format)
    template = region[:, ymin - top : ymax - top, xmin - left : xmax - left]
    painted = cubic_values(_canvas(mouth, crop), xmax - xmin, ymax - ymin)
    if alpha is not None:
        below = template.float()
        painted.sub_(below).mul_(alpha).add_(below).round_()
    if keep is not None:
        painted = torch.where(keep[ymin:ymax, xmin:xmax], template, painted)
    template.copy_(painted)
    return region, (left, top, right, bottom)


def _canvas(mouth: Tensor, crop: Tensor) -> Tensor:
    """The mouth in 0 … 255 and in whole numbers within the crop's ring: float32 (3, 328, 328)."""
    canvas = crop.float()
    if mouth.dtype == torch.uint8:
        inner_region(canvas).copy_(mouth)
    else:
        torch.mul(mouth.float(), 255, out=inner_region(canvas)).trunc_()
    return canvas


@functools.lru_cache(maxsize=64)
def _seam(width: int, height: int, feather: float, device: torch.device) -> Tensor:
    """How much of the painted pixel shows: float32 (height, width)."""
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    from_rows, from_columns = torch.minimum(row, height - 1 - row), torch.minimum(column, width - 1 - column)
    return ((torch.minimum(from_rows[:, None], from_columns).float() + 0.5) / feather).clamp_(0, 1)
