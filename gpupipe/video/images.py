"""Frames → numbered image files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import encode_jpeg, encode_png

from gpupipe.errors import InputError
from gpupipe.files import make_folder, replacing
from gpupipe.transfer import as_array

JPEG_QUALITY = 95
"""Of saved frames: what OpenCV's ``imwrite`` takes by default."""


ImageFormat = Literal["jpeg", "png"]
_SUFFIXES: dict[ImageFormat, str] = {"jpeg": ".jpg", "png": ".png"}


def frame_path(folder: Path, number: int, prefix: str = "frame", *, image_format: ImageFormat = "jpeg") -> Path:
    """Where frame ``number`` is saved: ``<prefix>_00000.jpg`` or ``.png``."""
    return folder / f"{prefix}_{number:05d}{_SUFFIXES[image_format]}"


def write_frames(
    frames: Iterable[NDArray[np.uint8] | Tensor],
    output_dir: str | Path,
    prefix: str = "frame",
    *,
    image_format: ImageFormat = "jpeg",
) -> list[str]:
    """Write BGR frames as ``<prefix>_00000.jpg`` …, or without loss as ``.png``, each as it comes.

    Returns:
        their paths.

    Raises:
        InputError: an unknown ``image_format``, before the first frame is asked for.
        OutputError: the folder cannot be made or written.
    """
    if image_format not in _SUFFIXES:
        raise InputError(f"image format is {image_format!r}; expected jpeg or png")
    folder = make_folder(output_dir)
    return [
        str(save_image(frame, frame_path(folder, number, prefix, image_format=image_format)))
        for number, frame in enumerate(frames)
    ]


def save_image(frame: NDArray[np.uint8] | Tensor, path: Path) -> Path:
    """Write one uint8 (H, W, 3) BGR frame as JPEG or, for ``.png``, without loss; return ``path``.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    rgb = torch.from_numpy(np.ascontiguousarray(as_array(frame)[..., ::-1].transpose(2, 0, 1)))
    data = encode_png(rgb) if path.suffix == ".png" else encode_jpeg(rgb, quality=JPEG_QUALITY)
    with replacing(path) as temporary:
        data.numpy().tofile(temporary)
    return path
