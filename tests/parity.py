"""The bounds of the parity tests, and what they compare with, in one place: tests and negative controls share them."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Bound:
    """Images agree when no value differs by more than ``steps`` and at least the share ``equal`` of values is equal."""

    steps: int
    equal: float

    def holds(self, found: np.ndarray, expected: np.ndarray) -> bool:
        return self.fault(found, expected) is None

    def check(self, found: np.ndarray, expected: np.ndarray, what: object = "images") -> None:
        fault = self.fault(found, expected)
        assert fault is None, f"{what}: {fault}"

    def fault(self, found: np.ndarray, expected: np.ndarray) -> str | None:
        found, expected = np.asarray(found), np.asarray(expected)
        assert found.dtype == expected.dtype == np.uint8
        assert found.shape == expected.shape
        difference = np.abs(found.astype(np.int16) - expected)
        worst, equal = int(difference.max()), float((difference == 0).mean())
        if worst <= self.steps and equal >= self.equal:
            return None
        return f"differ by up to {worst} steps, {equal:.4%} are equal; expected ≤ {self.steps}, ≥ {self.equal:.1%}"


EXACT_RESIZE = Bound(1, 0.999 if cv2.ipp.useIPP() else 0.997)
"""crop328 and paste-back alone, against OpenCV; see :func:`opencv_resize`."""

THIN_CROP = Bound(1, 0.95)
"""As above for a crop of one to three pixels: OpenCV resizes those, and no others, with weights of 11 bits."""

EXACT_FRAME = Bound(2, 0.99)
"""Inside the box of a whole frame, against OpenCV and PyTorch in float32; outside it frames are bit-equal."""


def opencv_resize(image: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_CUBIC) -> np.ndarray:
    """cv2.resize, of bytes (H, W, 3) to (width, height), as the IPP in its wheels for x86 does it: in float32.

    For ARM there is no IPP. Weights have 11 bits there, and one value in twenty is a step off. So floats are resized,
    from places rounded to float32: IPP's values were equal to 99.8 % of these at the least.
    """
    if cv2.ipp.useIPP():
        return cv2.resize(image, size, interpolation=interpolation)
    floats = cv2.resize(image.astype(np.float32), size, interpolation=interpolation)
    return np.rint(floats.clip(0, 255)).astype(np.uint8)


def resize_bound(box: tuple[int, int, int, int]) -> Bound:
    """The bound for resizing this box."""
    return THIN_CROP if min(box[2] - box[0], box[3] - box[1]) < 4 else EXACT_RESIZE


def inside(box: tuple[int, int, int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box."""
    xmin, ymin, xmax, ymax = box
    return slice(ymin, ymax), slice(xmin, xmax)


def check_frame(
    found: np.ndarray,
    expected: np.ndarray,
    box: tuple[int, int, int, int],
    bound: Bound = EXACT_FRAME,
    *,
    what: object = "frames",
) -> None:
    """``bound`` inside ``box``, bit-equal outside."""
    bound.check(found[inside(box)], expected[inside(box)], f"{what}, box {box}")
    found, expected = found.copy(), expected.copy()
    found[inside(box)] = expected[inside(box)] = 0
    assert np.array_equal(found, expected), f"{what}, box {box}: differ outside the box"
