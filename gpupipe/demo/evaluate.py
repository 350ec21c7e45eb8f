"""How well a rendered avatar follows its sound, measured against the character's own rig."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from gpupipe.demo import rig
from gpupipe.demo.drawing import INSIDE, LIP, SHINE, SKIN, SKIN_DARK, TEETH, TONGUE, true_frame

CORRELATION_AT_LEAST = 0.9
MOUTH_PSNR_AT_LEAST = 28.0


@dataclass(frozen=True)
class Agreement:
    """What the check looks at.

    ``correlation``: of the gap between the lips, measured in the pictures, with the rig's. ``mouth_psnr``: decibels,
    over the pixels where a mouth can be, all frames together. ``gap_error``: mean absolute, in pixels.
    """

    frames: int
    correlation: float
    mouth_psnr: float
    gap_error: float

    @property
    def good(self) -> bool:
        """Both bounds are met."""
        return self.correlation >= CORRELATION_AT_LEAST and self.mouth_psnr >= MOUTH_PSNR_AT_LEAST

    def as_dict(self) -> dict[str, float]:
        """For the record."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def agreement(
    rendered: Iterable[np.ndarray], template: np.ndarray, indices: Iterable[int], mouths: np.ndarray
) -> Agreement:
    """Compare rendered frames with the truth.

    Args:
        rendered: uint8 (432, 768, 3), BGR, one a frame of the video.
        template: the template as decoded, uint8 (96, 432, 768, 3), BGR.
        indices: which template frame each was made from.
        mouths: the true mouth of each, float32 (N, 3), from :func:`gpupipe.demo.mouth.mouth_track`.
    """
    squared, gaps = [], []
    for frame, index, mouth in zip(rendered, indices, mouths, strict=True):
        y0, y1, x0, x1 = rig.mouth_patch(index)
        truth = true_frame(template[index], index, mouth)[y0:y1, x0:x1]
        squared.append(np.mean((frame[y0:y1, x0:x1].astype(np.float64) - truth) ** 2))
        gaps.append((measure_gap(frame, index), rig.lip_gap(float(mouth[0]))))
    measured, true = np.array(gaps).T
    varied = measured.std() > 0 and true.std() > 0
    return Agreement(
        frames=len(gaps),
        correlation=float(np.corrcoef(measured, true)[0, 1]) if varied else 0.0,
        mouth_psnr=float(10 * np.log10(255**2 / max(1e-9, np.mean(squared)))),
        gap_error=float(np.abs(measured - true).mean()),
    )


def measure_gap(frame: np.ndarray, index: int) -> float:
    """How far the lips are apart in a picture of frame ``index``, rendered by anyone: pixels, at the mouth's middle.

    The mouth's height less the lips' own 18 pixels: along seven columns of the head through its middle, the extent of
    what looks more like lip, teeth, tongue or dark than like skin; the median of the seven. The outer edges are what a
    slightly soft picture shows best.

    Args:
        frame: uint8 (432, 768, 3), BGR.
    """
    at = rig.pose(index)
    v = np.arange(rig.MOUTH_V - 22, rig.MOUTH_V + 54, 0.5)
    skin = (SKIN, 0.5 * (SKIN + SKIN_DARK))
    mouth = (LIP, 0.82 * LIP, LIP + 0.15 * (SHINE - LIP), LIP + 0.3 * (SHINE - LIP), INSIDE, TEETH, TONGUE)
    extents = []
    for u in np.arange(-6, 7, 2.0):
        x, y = rig.to_frame(np.full_like(v, u + at.turn), v, at)
        colours = frame[np.rint(y).astype(int), np.rint(x).astype(int)].astype(np.float64)
        outside = np.min([_distance(colours, colour) for colour in skin], axis=0)
        within = np.min([_distance(colours, colour) for colour in mouth], axis=0)
        found = np.flatnonzero(within < outside)
        extents.append(0.5 * (found[-1] - found[0] + 1) if len(found) else 0.0)
    return max(0.0, float(np.median(extents)) - 18)


def _distance(colours: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.linalg.norm(colours - colour, axis=-1)
