"""How well a rendered avatar follows its sound, measured against the character's own rig."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from gpupipe.demo import rig

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
        truth = rig.true_frame(template[index], index, mouth)[y0:y1, x0:x1]
        squared.append(np.mean((frame[y0:y1, x0:x1].astype(np.float64) - truth) ** 2))
        gaps.append((rig.measure_gap(frame, index), rig.lip_gap(float(mouth[0]))))
    measured, true = np.array(gaps).T
    varied = measured.std() > 0 and true.std() > 0
    return Agreement(
        frames=len(gaps),
        correlation=float(np.corrcoef(measured, true)[0, 1]) if varied else 0.0,
        mouth_psnr=float(10 * np.log10(255**2 / max(1e-9, np.mean(squared)))),
        gap_error=float(np.abs(measured - true).mean()),
    )
