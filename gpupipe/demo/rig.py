"""The drawn character: every frame from a formula, nothing from a photograph.

The head moves a little (:func:`pose`), the eyes blink, and the mouth has the shape it is told
(:func:`mouth_difference`). All shapes are smooth functions of the head's own coordinates whose edges are softened over
one pixel, so that there is no drawing library to depend on and every machine draws the same.

Conventions: frames are 432×768, BGR, 0 … 255. Head coordinates (u, v) have their origin between the eyes' line and the
mouth, u to the right, v down, in pixels of an unmoved head. A mouth is (openness, width, rounding), each in [0, 1], as
:func:`gpupipe.demo.mouth.mouth_track` gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FRAMES = 96
HEIGHT, WIDTH = 432, 768
NEUTRAL = (0.0, 0.35, 0.0)
"""The mouth of the template frames: shut, at rest."""

_CENTRE = (392.0, 194.0)  # of the head, x and y, in the frame
_MOUTH_V = 62.0
_PATCH = (-62, 62, 30, 122)  # u from, to, v from, to: what a mouth can change

# BGR
_SKIN = np.array([152.0, 186, 232])
_SKIN_DARK = np.array([104.0, 138, 198])
_LIP = np.array([84.0, 78, 172])
_SHINE = np.array([190.0, 190, 240])
_INSIDE = np.array([34.0, 18, 66])
_TEETH = np.array([232.0, 240, 246])
_TONGUE = np.array([130.0, 96, 226])
_HAIR = np.array([46.0, 40, 58])
_SHIRT = np.array([128.0, 98, 44])


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
    _check(index)
    t = 2 * np.pi * index / FRAMES
    blink = sum(float(np.exp(-0.5 * ((index - at) / 1.5) ** 2)) for at in (20, 63))
    return Pose(
        dx=5.0 * np.sin(t) + 2.0 * np.sin(2 * t + 1.0),
        dy=2.5 * np.sin(2 * t + 0.4) + 1.0 * np.sin(3 * t),
        roll=float(np.deg2rad(1.8 * np.sin(t + 0.9) + 0.6 * np.sin(3 * t + 2.0))),
        turn=3.0 * np.sin(t - 0.5),
        blink=min(1.0, blink),
    )


# ── the frame without its mouth ──────────────────────────────────────────────────────────────────────────────────────


def bare_face(index: int, y0: int = 0, y1: int = HEIGHT, x0: int = 0, x1: int = WIDTH) -> np.ndarray:
    """Rows y0 … y1 and columns x0 … x1 of frame ``index`` with a face that has no mouth.

    Returns:
        float32 (y1 − y0, x1 − x0, 3), BGR, 0 … 255.
    """
    at = pose(index)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    image = _background(x, y).astype(np.float32)
    _body(image, x, y, at)
    u, v = _head_coordinates(x, y, at)
    _head(image, u, v, at)
    _eyes(image, u - at.turn, v, at)
    return image


def _background(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A wall in evening light, soft lamps out of focus, a shelf with books."""
    across, down = x / WIDTH, y / HEIGHT
    image = np.stack([96 + 50 * down + 20 * across, 92 + 26 * down - 12 * across, 64 + 30 * across], axis=-1)
    lamps = [(90, 80, 44, 0.5), (190, 150, 26, 0.35), (640, 70, 52, 0.5), (716, 190, 30, 0.4), (560, 130, 20, 0.35)]
    for cx, cy, radius, strength in lamps:
        distance = np.hypot(x - cx, y - cy)
        cover = strength * np.clip((radius - distance) / 6 + 0.5, 0, 1) + 0.25 * strength * np.exp(-distance / radius)
        _paint(image, cover, np.array([120.0, 190, 245]))
    _paint(image, _box(x, y, -10, 300, 250, 308), np.array([52.0, 68, 92]))
    for k in range(9):
        left = 14 + 25 * k
        tall = 46 + 14 * np.sin(2.4 * k)
        colour = np.array([90 + 50 * np.sin(k), 90 + 50 * np.sin(1.7 * k + 1), 110 + 60 * np.sin(2.3 * k + 2)])
        _paint(image, 0.85 * _box(x, y, left, 300 - tall, left + 20, 300), colour)
    return image


def _body(image: np.ndarray, x: np.ndarray, y: np.ndarray, at: Pose) -> None:
    """Shoulders in a ribbed jumper, and a neck; they follow the head by a third."""
    bx, by = x - _CENTRE[0] - at.dx / 3, y - _CENTRE[1] - at.dy / 3
    neck = np.clip(50 + 0.0025 * (by - 120) ** 2 - np.abs(bx) + 0.5, 0, 1) * np.clip(by - 60, 0, 1)
    shoulders = np.clip(by - 150 - 34 * (np.abs(bx) / 150) ** 2 - 26 * np.exp(-((bx / 60) ** 2)), 0, 1)
    shoulders *= np.clip(240 - np.abs(bx) + 0.2 * (by - 150), 0, 1)
    _paint(image, neck, _SKIN_DARK + 0.25 * (_SKIN - _SKIN_DARK))
    _paint(image, 0.35 * neck * np.clip(1 - (by - 118) / 60, 0, 1), _SKIN_DARK * 0.6)
    rib = 0.94 + 0.06 * np.sin(bx / 3.5)[..., None]
    shade = (1.1 - 0.25 * np.clip(np.abs(bx) / 240, 0, 1))[..., None]
    _paint(image, shoulders, _SHIRT * rib * shade)
    edge = by - 150 - 34 * (np.abs(bx) / 150) ** 2 - 26 * np.exp(-((bx / 60) ** 2))
    _paint(image, 0.8 * np.clip(1 - np.abs(edge - 6) / 6, 0, 1) * np.clip((95 - np.abs(bx)) / 8, 0, 1), _SHIRT * 0.6)


def _head(image: np.ndarray, u: np.ndarray, v: np.ndarray, at: Pose) -> None:
    """Hair behind, ears, the face with its shading, fringe, nose, cheeks."""
    _paint(image, _ellipse(u, v, 0, -38, 128, 132), _HAIR)
    for side in (-1, 1):
        ear_u = side * 113 + 0.4 * at.turn
        _paint(image, _ellipse(u, v, ear_u, -2, 17, 27), _SKIN_DARK + 0.55 * (_SKIN - _SKIN_DARK))
        _paint(image, 0.6 * _ellipse(u, v, ear_u + 2 * side, -1, 8, 16), _SKIN_DARK)
    half = 112 * (1 - 0.30 * np.clip(v / 128, 0, 1.1) ** 2)
    reach = np.where(v < 0, 150.0, 128.0)
    radial = np.sqrt((u / half) ** 2 + (v / reach) ** 2)
    face = np.clip((1 - radial) * 105 + 0.5, 0, 1)
    _paint(image, face, _SKIN)
    shade = np.clip((radial - 0.62) / 0.38, 0, 1) ** 2 * (0.65 + 0.35 * np.clip((u + v) / 160, -1, 1))
    _paint(image, 0.75 * face * shade, _SKIN_DARK)
    _paint(image, 0.22 * face * np.exp(-(((u + 34) / 60) ** 2) - ((v + 70) / 46) ** 2), np.array([225.0, 238, 255]))
    fringe = np.clip((-62 - 16 * np.cos((u - 30) / 46) - v) / 1.4 + 0.5, 0, 1) * np.clip((1 - radial) * 105 + 3, 0, 1)
    _paint(image, fringe, _HAIR + 10)
    strands = 0.5 + 0.5 * np.sin((u + 0.35 * v) / 4.5)
    _paint(image, 0.25 * fringe * strands, _HAIR * 1.9)
    p = u - at.turn
    for side in (-1, 1):
        blush = np.exp(-(((p - side * 66) / 25) ** 2) - ((v - 34) / 17) ** 2)
        _paint(image, 0.34 * face * blush, np.array([118.0, 118, 236]))
        for k, (fu, fv) in enumerate(((58, 22), (70, 26), (64, 35))):
            _paint(image, 0.4 * _ellipse(p, v, side * fu, fv + k, 2.2, 2.0), _SKIN_DARK * 0.8)
    n = u - 1.6 * at.turn
    _paint(image, 0.45 * np.exp(-(((n - 9) / 8) ** 2) - ((v - 2) / 26) ** 2), _SKIN_DARK)
    _paint(image, 0.55 * np.exp(-((n / 17) ** 2) - ((v - 29) / 7) ** 2), _SKIN_DARK)
    _paint(image, 0.45 * np.exp(-(((n + 3) / 7) ** 2) - ((v - 16) / 9) ** 2), np.array([220.0, 234, 252]))
    for side in (-1, 1):
        _paint(image, 0.75 * _ellipse(n, v, side * 7.5, 30, 4.2, 2.4), _SKIN_DARK * 0.55)


def _eyes(image: np.ndarray, p: np.ndarray, v: np.ndarray, at: Pose) -> None:
    """Eyes that blink, under brows."""
    for side in (-1, 1):
        cu, cv = side * 46.0, -18.0
        opened = 15.0 * (1 - 0.93 * at.blink)
        _paint(image, 0.3 * _ellipse(p, v, cu, cv - 1, 25, 19), _SKIN_DARK)
        white = _ellipse(p, v, cu, cv + 4 * at.blink, 21, max(1.2, opened))
        _paint(image, white, np.array([246.0, 246, 244]))
        _paint(image, white * _ellipse(p, v, cu + 0.5 * at.turn, cv + 1, 11, 11.5), np.array([132.0, 112, 40]))
        _paint(image, white * _ellipse(p, v, cu + 0.5 * at.turn, cv + 1, 5.5, 6), np.array([26.0, 20, 24]))
        _paint(image, white * _ellipse(p, v, cu - 3 + 0.5 * at.turn, cv - 4, 2.8, 2.8), np.array([255.0, 255, 255]))
        lid = cv + 4 * at.blink - opened * np.sqrt(np.clip(1 - ((p - cu) / 22) ** 2, 0, 1))
        lash = np.clip(2.2 - np.abs(v - lid), 0, 1) * np.clip(22.5 - np.abs(p - cu), 0, 1)
        _paint(image, lash, _HAIR * 0.8)
        brow = cv - 28 - 4 * np.cos((p - cu) / 16) + 2 * at.blink
        _paint(image, np.clip(3.6 - np.abs(v - brow), 0, 1) * np.clip((24 - np.abs(p - cu)) / 2, 0, 1), _HAIR * 0.9)


# ── the mouth ────────────────────────────────────────────────────────────────────────────────────────────────────────


def lip_gap(openness: float) -> float:
    """Pixels between the lips, at the middle of the mouth."""
    return 1.2 + 40.0 * openness


def mouth_patch(index: int) -> tuple[int, int, int, int]:
    """Rows and columns ``(y0, y1, x0, x1)`` of frame ``index`` that a mouth can change, half-open."""
    at = pose(index)
    u0, u1, v0, v1 = _PATCH
    x, y = _to_frame(np.array([u0, u1, u0, u1]) + at.turn, np.array([v0, v0, v1, v1]), at)
    return int(y.min()) - 1, int(y.max()) + 2, int(x.min()) - 1, int(x.max()) + 2


def draw_mouth(index: int, mouth: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """The patch of :func:`mouth_patch` with this mouth: float32 (h, w, 3), BGR, 0 … 255."""
    openness, width, rounding = (float(np.clip(value, 0, 1)) for value in mouth)
    y0, y1, x0, x1 = mouth_patch(index)
    image = _bare_patch(index).copy()
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    at = pose(index)
    u, v = _head_coordinates(x, y, at)
    m, n = u - at.turn, v - _MOUTH_V

    half = 30.0 * (0.76 + 0.5 * width) * (1 - 0.42 * rounding)
    gap = lip_gap(openness)
    smile = 3.5 * (1 - rounding) * np.clip((m / half) ** 2, 0, 1.6)
    power = 0.8 - 0.3 * rounding

    def bow(reach: float) -> np.ndarray:
        return np.clip(1 - (m / reach) ** 2, 0, 1) ** power

    upper, lower = -0.3 * gap * bow(half) - smile, 0.7 * gap * bow(half) - smile
    full = half + 6 + 2 * rounding
    cupid = 1 - 0.22 * np.exp(-((m / 5) ** 2))
    top = -(0.3 * gap + (8 + 3 * rounding) * cupid) * bow(full) - smile
    bottom = (0.7 * gap + 10 + 3 * rounding) * bow(full) - smile

    _paint(image, 0.5 * np.exp(-((m / (0.7 * full)) ** 2) - ((n - 0.7 * gap - 19) / 5) ** 2), _SKIN_DARK)  # its shadow
    lips = _between(n, top, bottom) * np.clip(full - np.abs(m) + 0.5, 0, 1)
    _paint(image, lips, _LIP)
    _paint(image, 0.45 * lips * _between(n, top, upper), _LIP * 0.72)
    shine = np.exp(-(((m + 4) / (0.4 * half)) ** 2) - ((n - lower - 4.5) / 2) ** 2)
    _paint(image, 0.5 * lips * shine, _SHINE)

    inside = _between(n, upper, lower) * np.clip(half - np.abs(m) + 0.5, 0, 1)
    _paint(image, inside, _INSIDE)
    rise = 0.7 * gap - smile - 0.34 * gap
    tongue = np.clip((1 - np.hypot(m / (0.66 * half), (n - rise - 0.42 * gap) / (0.42 * gap + 1))) * 8 + 0.5, 0, 1)
    _paint(image, inside * tongue * np.clip((gap - 8) / 6, 0, 1), _TONGUE)
    row = np.clip((0.84 * half - np.abs(m)) / 3, 0, 1) * np.clip((gap - 2) / 2, 0, 1)
    _paint(image, inside * row * np.clip(upper + min(10.0, 0.42 * gap) - n + 0.5, 0, 1), _TEETH)
    spread = np.clip((width - 0.45) / 0.25, 0, 1)
    _paint(image, spread * inside * row * np.clip(n - lower + min(6.0, 0.25 * gap) + 0.5, 0, 1), _TEETH * 0.94)
    return image


def draw_frame(index: int, mouth: np.ndarray | tuple[float, float, float] = NEUTRAL) -> np.ndarray:
    """Frame ``index`` with this mouth: uint8 (432, 768, 3), BGR."""
    image = bare_face(index)
    y0, y1, x0, x1 = mouth_patch(index)
    image[y0:y1, x0:x1] = draw_mouth(index, mouth)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


@lru_cache(maxsize=FRAMES)
def _bare_patch(index: int) -> np.ndarray:
    return bare_face(index, *mouth_patch(index))


@lru_cache(maxsize=FRAMES)
def _neutral_patch(index: int) -> np.ndarray:
    return draw_mouth(index, NEUTRAL)


def true_frame(template: np.ndarray, index: int, mouth: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """A template frame as decoded (uint8 (432, 768, 3), BGR), its mouth at rest replaced by this one.

    Only :func:`mouth_patch` changes, by the difference of the two drawings, so that the noise of the template's JPEG
    stays as it is.
    """
    y0, y1, x0, x1 = mouth_patch(index)
    out = template.copy()
    patch = out[y0:y1, x0:x1] + (draw_mouth(index, mouth) - _neutral_patch(index))
    out[y0:y1, x0:x1] = np.clip(np.rint(patch), 0, 255).astype(np.uint8)
    return out


def measure_gap(frame: np.ndarray, index: int) -> float:
    """How far the lips are apart in a picture of frame ``index``, rendered by anyone: pixels, at the mouth's middle.

    The mouth's height less the lips' own 18 pixels: along seven columns of the head through its middle, the extent of
    what looks more like lip, teeth, tongue or dark than like skin; the median of the seven. The outer edges are what a
    slightly soft picture shows best.

    Args:
        frame: uint8 (432, 768, 3), BGR.
    """
    at = pose(index)
    v = np.arange(_MOUTH_V - 22, _MOUTH_V + 54, 0.5)
    skin = (_SKIN, 0.5 * (_SKIN + _SKIN_DARK))
    mouth = (_LIP, 0.82 * _LIP, _LIP + 0.15 * (_SHINE - _LIP), _LIP + 0.3 * (_SHINE - _LIP), _INSIDE, _TEETH, _TONGUE)
    extents = []
    for u in np.arange(-6, 7, 2.0):
        x, y = _to_frame(np.full_like(v, u + at.turn), v, at)
        colours = frame[np.rint(y).astype(int), np.rint(x).astype(int)].astype(np.float64)
        outside = np.min([_distance(colours, colour) for colour in skin], axis=0)
        within = np.min([_distance(colours, colour) for colour in mouth], axis=0)
        found = np.flatnonzero(within < outside)
        extents.append(0.5 * (found[-1] - found[0] + 1) if len(found) else 0.0)
    return max(0.0, float(np.median(extents)) - 18)


# ── landmarks ────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    outer = (-(half + 6) * np.cos(ring), _MOUTH_V - 9 * np.sin(ring) - 3.5 * np.cos(ring) ** 2)
    eighth = 2 * np.pi * np.arange(8) / 8
    inner = (-half * np.cos(eighth), _MOUTH_V - 0.6 * np.sin(eighth) - 3.5 * np.cos(eighth) ** 2)
    parts = [(jaw_u, jaw_v), *((u + at.turn, v) for u, v in (*brows, bridge, nose, *eyes, outer, inner))]
    x, y = _to_frame(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), at)
    return np.stack([x, y], axis=1).astype(np.float32)


def crop_box(points: np.ndarray) -> tuple[int, int, int, int]:
    """The pipeline's box ``(xmin, ymin, xmax, ymax)`` for landmarks, half-open."""
    whole = points.astype(np.int32)
    xmin, xmax, ymin = int(whole[1, 0]), int(whole[31, 0]), int(whole[52, 1])
    return xmin, ymin, xmax, ymin + (xmax - xmin)


# ── small tools ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(index: int) -> None:
    if not 0 <= index < FRAMES:
        raise ValueError(f"frame is {index}; expected 0 … {FRAMES - 1}")


def _head_coordinates(x: np.ndarray, y: np.ndarray, at: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Frame → head: the inverse of :func:`_to_frame`."""
    dx, dy = x - _CENTRE[0] - at.dx, y - _CENTRE[1] - at.dy
    cos, sin = np.cos(at.roll), np.sin(at.roll)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _to_frame(u: np.ndarray, v: np.ndarray, at: Pose) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(at.roll), np.sin(at.roll)
    return cos * u - sin * v + _CENTRE[0] + at.dx, sin * u + cos * v + _CENTRE[1] + at.dy


def _paint(image: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    """Lay ``colour`` over ``image`` in place where ``cover`` (0 … 1) says."""
    image += cover.astype(np.float32)[..., None] * (colour.astype(np.float32) - image)


def _ellipse(u: np.ndarray, v: np.ndarray, cu: float, cv: float, a: float, b: float) -> np.ndarray:
    radial = np.hypot((u - cu) / a, (v - cv) / b)
    return np.clip((1 - radial) * min(a, b) + 0.5, 0, 1)


def _box(x: np.ndarray, y: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.clip(np.minimum(np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y)) + 0.5, 0, 1)


def _between(n: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.clip(n - above + 0.5, 0, 1) * np.clip(below - n + 0.5, 0, 1)


def _distance(colours: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.linalg.norm(colours - colour, axis=-1)
