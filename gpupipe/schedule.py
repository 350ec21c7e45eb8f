"""Which rows of speech features and which template frame belong to a video frame: pure functions of its number.

    video frame j ── at fps ──▶ row i of the features, at the mode's rate ──▶ template frame t(i), rows [i − 8, i + 8)

At the mode's own rate i = j. At another rate the picture is resampled, so that it keeps pace with the sound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from gpupipe.errors import InputError, whole_number

WINDOW_ROWS = 16
"""Rows of speech features in a frame's window."""


def frame_rate(fps: float | Fraction) -> Fraction:
    """Return frames a second as a fraction whose denominator is at most 1001, as NTSC's rates need.

    Raises:
        InputError: ``fps`` is not more than 0 and at most 1000.
    """
    rate = Fraction(fps).limit_denominator(1001) if 0 < fps <= 1000 else None
    if not rate:  # far below one frame a second the fraction is 0
        raise InputError(f"fps is {fps}; expected more than 0 and at most 1000")
    return rate


@dataclass(frozen=True)
class Resampling:
    """Which row of features each video frame shows, whatever the rates of rows and frames.

    Frame j is on the screen from j / fps on and shows what a video at the rows' own rate shows at that time: row
    ⌊j·rate / fps⌋. N rows last N / rate seconds and make N·fps / rate frames, rounded half up, at least one.

    Args:
        length: number of rows N, ≥ 1.
        rate: rows a second.
        fps: video frames a second.
    """

    length: int
    rate: Fraction
    fps: Fraction

    @property
    def frames(self) -> int:
        """Number of video frames."""
        return max(1, math.floor(self.length * self.fps / self.rate + Fraction(1, 2)))

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the row that each of the video frames ``[start, stop)`` shows: int64 (stop − start,), ascending."""
        ratio = self.rate / self.fps
        return np.arange(start, stop, dtype=np.int64) * ratio.numerator // ratio.denominator

    def reach(self, start: int, most: int) -> int:
        """Return the end of the longest run of video frames from ``start`` on that shows at most ``most`` rows."""
        if self.fps <= self.rate:
            return min(start + most, self.frames)
        beyond = int(self.rows(start, start + 1)[0]) + most  # the first row that is one too many
        return min(math.ceil(beyond * self.fps / self.rate), self.frames)


def template_indices(start: int, stop: int, length: int, start_frame: int = 0) -> NDArray[np.int64]:
    """Return the template frames of video frames ``[start, stop)``: there and back over ``[start_frame, length)``.

    With n = length − start_frame, frame i stands at step i + 1 of a walk 0, 1 … n−1, n−2 … 1, 0, 1 … of period
    2(n − 1): the first frame shown is ``start_frame + 1``. Any i can be computed without the ones before it.

    Args:
        start, stop: video frames, 0 ≤ start ≤ stop.
        length: number of template frames, ≥ 1.
        start_frame: first template frame of the walk, in ``[0, length)``.

    Returns:
        int64 (stop − start,).

    Raises:
        InputError: ``start_frame`` is no whole number, or outside ``[0, length)``.
    """
    expected = f"0 to {length - 1}: the template has {length} frames"
    start_frame = whole_number(start_frame, "start frame", expected)
    if not 0 <= start_frame < length:
        raise InputError(f"start frame is {start_frame}; expected {expected}")
    last = length - start_frame - 1
    step = np.arange(start + 1, stop + 1, dtype=np.int64)
    if last == 0:
        return np.full_like(step, start_frame)
    phase = step % (2 * last)
    return start_frame + np.where(phase <= last, phase, 2 * last - phase)


def times_shown(stop: int, length: int, start_frame: int) -> NDArray[np.int64]:
    """Count how often the video frames ``[0, stop)`` show each template frame: int64 (length,).

    Raises:
        InputError: ``start_frame`` outside ``[0, length)``.
    """
    return np.bincount(template_indices(0, stop, length, start_frame), minlength=length)


def window_rows(start: int, stop: int) -> tuple[int, int]:
    """Return the rows that frames ``[start, stop)`` see, ``[i − 8, i + 8)`` for frame i; some may lie outside."""
    return start - WINDOW_ROWS // 2, stop - 1 + WINDOW_ROWS // 2
