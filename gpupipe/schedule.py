"""Which template frame and which rows of speech features belong to video frame i: pure functions of i."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpupipe.errors import InputError

WINDOW_ROWS = 16
"""Rows of speech features in a frame's window."""


def template_indices(start: int, stop: int, length: int, start_frame: int = 0) -> NDArray[np.int64]:
    """The template frames of video frames ``[start, stop)``: there and back over ``[start_frame, length)``.

    With n = length − start_frame, frame i stands at step i + 1 of a walk 0, 1 … n−1, n−2 … 1, 0, 1 … of period
    2(n − 1): the first frame shown is ``start_frame + 1``. Any i can be asked for without the ones before it.

    Args:
        start, stop: video frames, 0 ≤ start ≤ stop.
        length: number of template frames, ≥ 1.
        start_frame: first template frame of the walk, in ``[0, length)``.

    Returns:
        int64 (stop − start,).

    Raises:
        InputError: ``start_frame`` outside ``[0, length)``.
    """
    if not 0 <= start_frame < length:
        raise InputError(f"start frame is {start_frame}; expected 0 to {length - 1}: the template has {length} frames")
    last = length - start_frame - 1
    step = np.arange(start + 1, stop + 1, dtype=np.int64)
    if last == 0:
        return np.full_like(step, start_frame)
    phase = step % (2 * last)
    return start_frame + np.where(phase <= last, phase, 2 * last - phase)


def window_rows(start: int, stop: int) -> tuple[int, int]:
    """The feature rows that frames ``[start, stop)`` see: frame i sees ``[i − 8, i + 8)``; rows may lie outside."""
    return start - WINDOW_ROWS // 2, stop - 1 + WINDOW_ROWS // 2
