"""Frames → numbered image files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import encode_jpeg, encode_png

from gpupipe.files import make_folder, replacing

JPEG_QUALITY = 95
"""Of saved frames: what OpenCV's ``imwrite`` takes by default."""


def frame_path(folder: Path, number: int, prefix: str = "frame") -> Path:
    """Where frame ``number`` is saved: ``<prefix>_00000.jpg``."""
    return folder / f"{prefix}_{number:05d}.jpg"


def write_frames(frames: Iterable[NDArray[np.uint8]], output_dir: str | Path, prefix: str = "frame") -> list[str]:
    """Write BGR frames as ``<prefix>_00000.jpg`` …, each as it comes.

    Returns:
        their paths.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    folder = make_folder(output_dir)
    return [str(save_image(frame, frame_path(folder, number, prefix))) for number, frame in enumerate(frames)]


def save_image(frame: NDArray[np.uint8], path: Path) -> Path:
    """Write one uint8 (H, W, 3) BGR frame as JPEG or, for ``.png``, without loss; return ``path``.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    rgb = torch.from_numpy(np.ascontiguousarray(frame[..., ::-1].transpose(2, 0, 1)))
    data = encode_png(rgb) if path.suffix == ".png" else encode_jpeg(rgb, quality=JPEG_QUALITY)
    with replacing(path) as temporary:
        data.numpy().tofile(temporary)
    return path
