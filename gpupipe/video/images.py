"""Frames → numbered image files."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gpupipe.errors import InputError
from gpupipe.files import make_folder, replacing
from gpupipe.transfer import as_array

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
"""Quality of saved frames: the default of OpenCV's ``imwrite``."""


ImageFormat = Literal["jpeg", "png"]
_SUFFIXES: dict[ImageFormat, str] = {"jpeg": ".jpg", "png": ".png"}


def frame_path(folder: Path, number: int, prefix: str = "frame", *, image_format: ImageFormat = "jpeg") -> Path:
    """Return where frame ``number`` is saved: ``<prefix>_00000.jpg`` or ``.png``."""
    return folder / f"{prefix}_{number:05d}{_SUFFIXES[image_format]}"


def write_frames(
    frames: Iterable[NDArray[np.uint8] | Tensor],
    output_dir: str | Path,
    prefix: str = "frame",
    *,
    image_format: ImageFormat = "jpeg",
) -> list[str]:
    """Write BGR frames as ``<prefix>_00000.jpg`` …, or without loss as ``.png``, each as it comes.

    A warning names images left in the folder from an earlier, longer clip (:func:`warn_of_others`).

    Returns:
        their paths.

    Raises:
        InputError: an unknown ``image_format``, before the first frame is asked for.
        OutputError: the folder cannot be made or written.
    """
    if image_format not in _SUFFIXES:
        raise InputError(f"image format is {image_format!r}; expected jpeg or png")
    folder = make_folder(output_dir)
    paths = [
        str(save_image(frame, frame_path(folder, number, prefix, image_format=image_format)))
        for number, frame in enumerate(frames)
    ]
    warn_of_others(folder, len(paths), prefix, image_format=image_format)
    return paths


def warn_of_others(folder: Path, count: int, prefix: str = "frame", *, image_format: ImageFormat = "jpeg") -> None:
    """Warn of images that follow the ``count`` just written: a reader of the folder would take them for the clip's."""
    found = (path.stem.rpartition("_") for path in folder.glob(f"*_*{_SUFFIXES[image_format]}"))
    numbers = (int(end) for start, _, end in found if start == prefix and end.isdecimal() and len(end) >= 5)
    others = sorted(number for number in numbers if number >= count)
    if others:
        first = frame_path(folder, others[0], prefix, image_format=image_format)
        logger.warning(
            "%s: is the first of %d left from an earlier, longer clip; this one has %d", first, len(others), count
        )


def save_image(frame: NDArray[np.uint8] | Tensor, path: Path) -> Path:
    """Write one uint8 (H, W, 3) BGR frame as JPEG or, for ``.png``, without loss; return ``path``.

    Raises:
        InputError: a frame of another dtype or shape.
        OutputError: ``path`` cannot be written.
    """
    pixels = np.ascontiguousarray(as_array(frame))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise InputError(f"{path.name}: frame is {pixels.dtype} {pixels.shape}; expected uint8 (H, W, 3), BGR")
    image = Image.frombuffer("RGB", pixels.shape[1::-1], pixels, "raw", "BGR", 0, 1)
    with replacing(path) as temporary:
        image.save(temporary, "PNG" if path.suffix == ".png" else "JPEG", quality=JPEG_QUALITY)
    return path
