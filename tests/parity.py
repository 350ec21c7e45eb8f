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


def ipp_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As :mod:`gpupipe.kernels.cubic` describes IPP's arithmetic, in NumPy: (H, W, 3) to (width, height).

    A float64 holds the product of two float32: rounded to float32, its sum is that of one multiply-add.
    """
    across, weights = _taps(image.shape[1], size[0])
    values = image.astype(np.float32)
    total = values[:, across[:, 0]] * weights[:, 0, None]
    for k in (1, 2, 3):
        total = _multiply_add(values[:, across[:, k]], weights[:, k, None], total)
    down, weights = _taps(image.shape[0], size[1])
    upper, lower = (
        _multiply_add(
            total[down[:, k]], weights[:, k, None, None], total[down[:, k + 1]] * weights[:, k + 1, None, None]
        )
        for k in (0, 2)
    )
    return np.rint(upper + lower).clip(0, 255).astype(np.uint8)


def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    scaled = (2 * np.arange(target) + 1) * source - target
    tap = scaled // (2 * target)
    x = (scaled - tap * 2 * target).astype(np.float32) / np.float32(2 * target)
    x = ((x + np.float32(1)) - np.float32(1)).astype(np.float64)
    keys = [_keys(x + 1), _keys(x), _keys(1 - x), _keys(2 - x)]
    return (tap[:, None] + np.arange(-1, 3)).clip(0, source - 1), np.stack(keys, axis=1).astype(np.float32)


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys' cubic at a distance of 0 to 2."""
    a = -0.75
    return np.where(x <= 1, ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4))


def _multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


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
