"""Face landmarks from ``.lms`` files, and the square that the mouth is painted in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gpupipe.errors import InputError
from gpupipe.files import input_file
from gpupipe.transfer import as_array

MIN_POINTS = 53
LEFT, RIGHT, TOP = 1, 31, 52
"""The points that fix the box: its left and right edge, and its top."""

Box = tuple[int, int, int, int]
"""Half-open (xmin, ymin, xmax, ymax), in pixels of the frame."""


def read_landmarks(path: str | Path) -> NDArray[np.int32]:
    """Read a ``.lms`` file: one ``x y`` a line, floats, truncated to integers.

    Returns:
        int32 (n, 2), n ≥ 53.

    Raises:
        InputError: the file is missing or short, or a line is not two finite numbers.
    """
    path = input_file(path, "landmark file")
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a landmark file ({error}); expected lines of 'x y'") from error
    points = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            x, y = (float(word) for word in line.split())
        except ValueError as error:
            raise InputError(f"{path}: line {number} is {line[:40]!r}; expected two numbers, 'x y'") from error
        if not (abs(x) < 2**30 and abs(y) < 2**30):  # false for NaN too; fits int32 with room to spare
            raise InputError(f"{path}: line {number} is {line[:40]!r}; expected finite coordinates in pixels")
        points.append((x, y))
    if len(points) < MIN_POINTS:
        raise InputError(f"{path}: has {len(points)} points; expected at least {MIN_POINTS}, usually 110")
    # float32 first, as the reference holds them: 0.99999999 is 1 there.
    return np.array(points, dtype=np.float32).astype(np.int32)


def face_box(landmarks: ArrayLike | Tensor, *, name: str = "landmarks") -> Box:
    """Return the square that spans points 1 to 31 and has its top at point 52; it may reach over the frame's edge.

    Args:
        landmarks: (n, 2) points in pixels, n ≥ 53; floats are truncated.
        name: what an error calls the landmarks.

    Raises:
        InputError: too few points or not finite; an empty or inverted box.
    """
    points = as_array(landmarks)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < MIN_POINTS:
        raise InputError(f"{name}: shape is {points.shape}; expected (n, 2) with n ≥ {MIN_POINTS}")
    used = points[[LEFT, RIGHT, TOP]]
    if not np.isfinite(used).all():
        raise InputError(f"{name}: points {LEFT}, {RIGHT}, {TOP} hold NaN or infinite values")
    (xmin, _), (xmax, _), (_, ymin) = used.astype(np.int64).tolist()
    if xmax <= xmin:
        raise InputError(f"{name}: box runs from x = {xmin} to {xmax}; expected point {LEFT} left of point {RIGHT}")
    return xmin, ymin, xmax, ymin + (xmax - xmin)


def crop_box(landmarks: ArrayLike | Tensor, width: int, height: int, *, name: str = "landmarks") -> Box:
    """Return :func:`face_box` clamped to a frame; a clamped box need not be square.

    Raises:
        InputError: as :func:`face_box`; also for a box wholly outside the frame.
    """
    xmin, ymin, xmax, ymax = face_box(landmarks, name=name)
    box = (max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise InputError(
            f"{name}: box ({xmin}, {ymin}, {xmax}, {ymax}) lies wholly outside the frame; expected it to overlap"
            f" {width}×{height}"
        )
    return box
