"""Crop and resize: template frames and boxes → the network's input, a batch at a time.

    frame (H, W, 3) ── box ──> crop (h, w, 3) ── cubic ──> crop328 (3, 328, 328) uint8
                                                             │ inner 320×320, ÷ 255
                       image (6, 320, 320) = [ inner , inner with the mouth painted over ]

Convention: frames are uint8 HWC BGR; boxes are half-open ``(xmin, ymin, xmax, ymax)`` inside the frame; taps are
clamped to the crop's edge, not the frame's; no antialiasing; results are rounded half to even to uint8, then scaled.

:func:`crop_resize` and :func:`network_input` are plain torch; :func:`crop_and_input` is both, and on CUDA one Triton
kernel (:mod:`gpupipe.kernels.crop_resize_triton`), on a CPU one in LLVM (:mod:`gpupipe.kernels.crop_resize_llvm`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpupipe.kernels.cubic import cubic_resize
from gpupipe.kernels.dispatch import backend

CROP_SIZE = 328
"""Height and width of the resized crop."""

RING = 4
"""Width of the crop's ring that the network neither sees nor paints."""

INNER_SIZE = CROP_SIZE - 2 * RING
"""Height and width of what the network sees."""

MASK_ROWS = slice(5, 310)
MASK_COLUMNS = slice(5, 315)
"""The part of the inner 320×320 that is hidden from the network: a 310×305 rectangle at (5, 5)."""


def crop_resize(frames: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
    """Cut each sample's box out of its frame and resize it to 328×328, sample by sample: boxes differ in size.

    Args:
        frames: uint8 (L, H, W, 3).
        index: int64 (B,), which frame each sample takes.
        boxes: int32 or int64 (B, 4), half-open, inside the frame and not empty.

    Returns:
        uint8 (B, 3, 328, 328), the frames' colour order.
    """
    crops = [
        frames[frame, ymin:ymax, xmin:xmax].permute(2, 0, 1)
        for frame, (xmin, ymin, xmax, ymax) in zip(index.tolist(), boxes.tolist(), strict=True)
    ]
    return torch.stack([cubic_resize(crop, CROP_SIZE, CROP_SIZE) for crop in crops])


def crop_and_input(
    frames: Tensor,
    index: Tensor,
    boxes: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`crop_resize` and :func:`network_input` in one pass over the frames.

    Args:
        dtype: of the network's input.
        channels_last: layout of the network's input; on CUDA for 16-bit types only.

    Returns:
        uint8 (B, 3, 328, 328) and ``dtype`` (B, 6, 320, 320).
    """
    by = backend(frames.device)
    if by == "triton":
        from gpupipe.kernels.crop_resize_triton import crop_resize_triton

        return crop_resize_triton(frames, index, boxes, dtype=dtype, channels_last=channels_last)
    if by == "llvm" and not channels_last:
        from gpupipe.kernels import crop_resize_llvm

        if crop_resize_llvm.takes(frames, boxes, dtype):
            return crop_resize_llvm.crop_resize_llvm(frames, index, boxes, dtype=dtype)
    crops = crop_resize(frames, index, boxes)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return crops, network_input(crops, dtype=dtype).contiguous(memory_format=layout)


def bytes_moved(box: tuple[int, int], dtype: torch.dtype = torch.float16) -> int:
    """The fewest bytes that :func:`crop_and_input` can move for one frame.

    The box is read once, and crop328 and the six channels are written once.

    Args:
        box: width and height in pixels.
    """
    return 3 * box[0] * box[1] + 3 * CROP_SIZE**2 + 6 * INNER_SIZE**2 * dtype.itemsize


def network_input(crops: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The network's image: the crop's inner 320×320 beside itself with the mouth masked, scaled to [0, 1].

    Args:
        crops: uint8 (B, 3, 328, 328), from :func:`crop_resize`.

    Returns:
        ``dtype`` (B, 6, 320, 320).
    """
    image = crops.new_empty(len(crops), 6, INNER_SIZE, INNER_SIZE, dtype=torch.float32)
    inner, masked = image.chunk(2, dim=1)
    inner.copy_(inner_region(crops)).div_(255)
    masked.copy_(inner)
    _hide_mouth(masked)
    return image.to(dtype)


def inner_region(crops: Tensor) -> Tensor:
    """The 320×320 that the network sees of (…, 328, 328)."""
    return crops[..., RING:-RING, RING:-RING]


def mask_mouth(inner: Tensor) -> Tensor:
    """A copy of (…, 320, 320) with rows 5…309 and columns 5…314 set to 0."""
    return _hide_mouth(inner.clone())


def _hide_mouth(inner: Tensor) -> Tensor:
    inner[..., MASK_ROWS, MASK_COLUMNS] = 0
    return inner
