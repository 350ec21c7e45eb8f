"""Frames → numbered image files."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gpupipe.errors import InputError
from gpupipe.files import make_folder, replacing
from gpupipe.handover import Answer, Workers
from gpupipe.lanes import available_cores
from gpupipe.transfer import as_array

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
"""Quality of saved frames: the default of OpenCV's ``imwrite``."""

_MOST_THREADS = 16
"""They hold a frame each, and file systems take no more than they write."""

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
    """Write BGR frames as :class:`ImageWriter` does, each as it comes, and return their paths."""
    with ImageWriter(output_dir, prefix, image_format=image_format) as images:
        for frame in frames:
            images.write(frame)
    return images.paths


class ImageWriter:
    """Writes BGR frames as ``<prefix>_00000.jpg`` …, or without loss as ``.png``: a context, in which several threads
    encode them.

    A warning names images left in the folder from an earlier, longer clip.

    Attributes:
        paths: of the images, written or about to be.

    Raises:
        InputError: an unknown ``image_format``.
        OutputError: the folder cannot be made.
    """

    def __init__(self, output_dir: str | Path, prefix: str = "frame", *, image_format: ImageFormat = "jpeg") -> None:
        if image_format not in _SUFFIXES:
            raise InputError(f"image format is {image_format!r}; expected jpeg or png")
        self.paths: list[str] = []
        self._folder = make_folder(output_dir)
        self._prefix = prefix
        self._image_format = image_format
        self._threads = min(available_cores(), _MOST_THREADS)
        self._workers = Workers(self._threads, "gpupipe images")
        self._pending: deque[Answer[Path]] = deque()

    def write(self, frame: NDArray[np.uint8] | Tensor) -> None:
        """Write the next frame, uint8 (H, W, 3); its memory may be used again at once.

        Raises:
            InputError: this frame or an earlier one is of another dtype or shape.
            OutputError: it, or an earlier one, cannot be written.
        """
        path = frame_path(self._folder, len(self.paths), self._prefix, image_format=self._image_format)
        self._pending.append(self._workers.submit(save_image, np.array(as_array(frame), order="C"), path))
        self.paths.append(str(path))
        if len(self._pending) > self._threads:  # one waits, so that no thread has to
            self._pending.popleft().result()

    def __enter__(self) -> ImageWriter:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is being written; after an error, write no more."""
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._workers.end()
        if kind is None:
            _warn_of_others(self._folder, len(self.paths), self._prefix, self._image_format)


def _warn_of_others(folder: Path, count: int, prefix: str, image_format: ImageFormat) -> None:
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
