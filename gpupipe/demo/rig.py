"""The drawn character's rig: where its head is in each frame, what of the frame a mouth can change, its landmarks.

The head moves a little (:func:`pose`) and the eyes blink; :mod:`gpupipe.demo.drawing` draws what is said here.

Conventions: frames are 432×768, pixels x to the right and y down. Head coordinates (u, v) have their origin between the
eyes' line and the mouth, u to the right, v down, in pixels of an unmoved head. A mouth is (openness, width, rounding),
each in [0, 1], as :func:`gpupipe.demo.mouth.mouth_track` gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAMES = 96
HEIGHT, WIDTH = 432, 768
NEUTRAL = (0.0, 0.35, 0.0)
"""The mouth of the template frames: shut, at rest."""

CENTRE = (392.0, 194.0)  # of the head, x and y, in the frame
MOUTH_V = 62.0
_PATCH = (-62, 62, 30, 122)  # u from, to, v from, to: what a mouth can change


@dataclass(frozen=True)
class Pose:
    """Where the head is in a frame: offset in pixels, roll in radians, turn (sideways parallax) in pixels, eyelids."""

    dx: float
    dy: float
    roll: float
    turn: float
    blink: float


def pose(index: int) -> Pose:
    """The pose of frame ``index`` of :data:`FRAMES`."""
    if not 0 <= index < FRAMES:
        raise ValueError(f"frame is {index}; expected 0 … {FRAMES - 1}")
    t = 2 * np.pi * index / FRAMES
    blink = sum(float(np.exp(-0.5 * ((index - at) / 1.5) ** 2)) for at in (20, 63))
    return Pose(
        dx=5.0 * np.sin(t) + 2.0 * np.sin(2 * t + 1.0),
        dy=2.5 * np.sin(2 * t + 0.4) + 1.0 * np.sin(3 * t),
        roll=float(np.deg2rad(1.8 * np.sin(t + 0.9) + 0.6 * np.sin(3 * t + 2.0))),
        turn=3.0 * np.sin(t - 0.5),
        blink=min(1.0, blink),
    )


def head_coordinates(x: np.ndarray, y: np.ndarray, at: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Frame → head: the inverse of :func:`to_frame`."""
    dx, dy = x - CENTRE[0] - at.dx, y - CENTRE[1] - at.dy
    cos, sin = np.cos(at.roll), np.sin(at.roll)
    return cos * dx + sin * dy, cos * dy - sin * dx


def to_frame(u: np.ndarray, v: np.ndarray, at: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Head → frame: x and y of head coordinates."""
    cos, sin = np.cos(at.roll), np.sin(at.roll)
    return cos * u - sin * v + CENTRE[0] + at.dx, sin * u + cos * v + CENTRE[1] + at.dy


def lip_gap(openness: float) -> float:
    """Pixels between the lips, at the middle of the mouth."""
    return 1.2 + 40.0 * openness


def mouth_patch(index: int) -> tuple[int, int, int, int]:
    """Rows and columns ``(y0, y1, x0, x1)`` of frame ``index`` that a mouth can change, half-open."""
    at = pose(index)
    u0, u1, v0, v1 = _PATCH
    x, y = to_frame(np.array([u0, u1, u0, u1]) + at.turn, np.array([v0, v0, v1, v1]), at)
    return int(y.min()) - 1, int(y.max()) + 2, int(x.min()) - 1, int(x.max()) + 2


def landmarks(index: int) -> np.ndarray:
    """The 110 points of frame ``index`` in the family's order, float32 (110, 2), x and y in pixels.

    0–32 jaw, ear to ear; 33–50 brows; 51–54 nose bridge, tip first; 55–65 nostrils; 66–89 eyes; 90–101 outer and
    102–109 inner lips. The pipeline uses 1 and 31 (the sides of its box) and 52 (its top).
    """
    at = pose(index)
    angle = np.linspace(0, np.pi, 33)
    jaw_v = -14 + 138 * np.sin(angle)
    jaw_u = -112 * np.cos(angle) * (1 - 0.30 * np.clip(jaw_v / 128, 0, 1.1) ** 2 * 0.6)
    along = np.linspace(-1, 1, 9)
    brows = [(s * 46 + 23 * along, -46 - 4 * np.cos(23 * along / 16)) for s in (-1, 1)]
    bridge = (np.zeros(4), np.array([22.0, 8, -6, -20]))
    side = np.linspace(-1, 1, 11)
    nose = (15 * side, 34 - 12 * side**2)
    ring = 2 * np.pi * np.arange(12) / 12
    eyes = [(s * 46 - 21 * np.cos(ring), -18 - 15 * (1 - 0.93 * at.blink) * np.sin(ring)) for s in (-1, 1)]
    half = 30 * (0.76 + 0.5 * NEUTRAL[1])
    outer = (-(half + 6) * np.cos(ring), MOUTH_V - 9 * np.sin(ring) - 3.5 * np.cos(ring) ** 2)
    eighth = 2 * np.pi * np.arange(8) / 8
    inner = (-half * np.cos(eighth), MOUTH_V - 0.6 * np.sin(eighth) - 3.5 * np.cos(eighth) ** 2)
    parts = [(jaw_u, jaw_v), *((u + at.turn, v) for u, v in (*brows, bridge, nose, *eyes, outer, inner))]
    x, y = to_frame(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), at)
    return np.stack([x, y], axis=1).astype(np.float32)
