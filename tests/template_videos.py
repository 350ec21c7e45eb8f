"""Videos used as templates, and how FFmpeg alone decodes them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from torch import Tensor

WIDTH, HEIGHT, FRAMES = 192, 128, 40
BOXES = [(40 + i % 7, 30 + i % 5, 61 + i % 3) for i in range(FRAMES)]
"""Odd and even, so that some cut through 2×2 cells."""


def pictures(count: int = FRAMES, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[np.ndarray]:
    """Pictures of smooth moving colours, BGR, no two alike."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(256, size=(6, 9, 3)).astype(np.float32)
    wide = cv2.resize(coarse, (size[0] + 3 * count, size[1]), interpolation=cv2.INTER_CUBIC)
    return [np.clip(wide[:, 3 * i :][:, : size[0]] * 0.9 + i, 0, 255).astype(np.uint8) for i in range(count)]


def write_video(
    path: Path,
    images: list[np.ndarray],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    space: Colorspace | int = Colorspace.ITU709,
    extent: ColorRange = ColorRange.MPEG,
    tagged: bool = True,
    rotation: int = 0,
    pixel_aspect: str = "1",
    rate: int | Fraction = 25,
    **options: str,
) -> Path:
    """Encode BGR images, converted by FFmpeg to ``space`` and ``extent``, which are also the tags, if any."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "12", "g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], images[0].shape[0], pixel_format
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        if rotation:
            stream.set_display_rotation(rotation)
        if tagged:
            context = stream.codec_context
            context.colorspace, context.color_range = space, extent
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame = frame.reformat(format=pixel_format, dst_colorspace=space, dst_color_range=extent)
            if not tagged:
                frame = av.VideoFrame.from_ndarray(frame.to_ndarray(), format=pixel_format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> Tensor:
    """All frames, decoded by FFmpeg alone, in one go, as NV12."""
    with av.open(str(path)) as container:
        planes = [frame.to_ndarray() for frame in container.decode(video=0)]
    nv12 = []
    for plane in planes:
        height = plane.shape[0] * 2 // 3
        u, v = plane[height:].reshape(2, -1)
        nv12.append(np.concatenate([plane[:height], np.stack([u, v], axis=1).reshape(height // 2, -1)]))
    return torch.from_numpy(np.stack(nv12))
