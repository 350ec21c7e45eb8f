"""The drawn character: every frame from a formula, nothing from a photograph.

All shapes are smooth functions of the head's own coordinates whose edges are softened over one pixel, so that there is
no drawing library to depend on and every machine draws the same.

Conventions: those of :mod:`gpupipe.demo.rig`; pictures are BGR, 0 … 255.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gpupipe.demo.rig import (
    CENTRE,
    FRAMES,
    HEIGHT,
    MOUTH_V,
    NEUTRAL,
    WIDTH,
    Pose,
    head_coordinates,
    lip_gap,
    mouth_patch,
    pose,
)

SKIN = np.array([152.0, 186, 232])
SKIN_DARK = np.array([104.0, 138, 198])
LIP = np.array([84.0, 78, 172])
SHINE = np.array([190.0, 190, 240])
INSIDE = np.array([34.0, 18, 66])
TEETH = np.array([232.0, 240, 246])
TONGUE = np.array([130.0, 96, 226])
HAIR = np.array([46.0, 40, 58])
SHIRT = np.array([128.0, 98, 44])


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
    u, v = head_coordinates(x, y, at)
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
    bx, by = x - CENTRE[0] - at.dx / 3, y - CENTRE[1] - at.dy / 3
    neck = np.clip(50 + 0.0025 * (by - 120) ** 2 - np.abs(bx) + 0.5, 0, 1) * np.clip(by - 60, 0, 1)
    shoulders = np.clip(by - 150 - 34 * (np.abs(bx) / 150) ** 2 - 26 * np.exp(-((bx / 60) ** 2)), 0, 1)
    shoulders *= np.clip(240 - np.abs(bx) + 0.2 * (by - 150), 0, 1)
    _paint(image, neck, SKIN_DARK + 0.25 * (SKIN - SKIN_DARK))
    _paint(image, 0.35 * neck * np.clip(1 - (by - 118) / 60, 0, 1), SKIN_DARK * 0.6)
    rib = 0.94 + 0.06 * np.sin(bx / 3.5)[..., None]
    shade = (1.1 - 0.25 * np.clip(np.abs(bx) / 240, 0, 1))[..., None]
    _paint(image, shoulders, SHIRT * rib * shade)
    edge = by - 150 - 34 * (np.abs(bx) / 150) ** 2 - 26 * np.exp(-((bx / 60) ** 2))
    _paint(image, 0.8 * np.clip(1 - np.abs(edge - 6) / 6, 0, 1) * np.clip((95 - np.abs(bx)) / 8, 0, 1), SHIRT * 0.6)


def _head(image: np.ndarray, u: np.ndarray, v: np.ndarray, at: Pose) -> None:
    """Hair behind, ears, the face with its shading, fringe, nose, cheeks."""
    _paint(image, _ellipse(u, v, 0, -38, 128, 132), HAIR)
    for side in (-1, 1):
        ear_u = side * 113 + 0.4 * at.turn
        _paint(image, _ellipse(u, v, ear_u, -2, 17, 27), SKIN_DARK + 0.55 * (SKIN - SKIN_DARK))
        _paint(image, 0.6 * _ellipse(u, v, ear_u + 2 * side, -1, 8, 16), SKIN_DARK)
    half = 112 * (1 - 0.30 * np.clip(v / 128, 0, 1.1) ** 2)
    reach = np.where(v < 0, 150.0, 128.0)
    radial = np.sqrt((u / half) ** 2 + (v / reach) ** 2)
    face = np.clip((1 - radial) * 105 + 0.5, 0, 1)
    _paint(image, face, SKIN)
    shade = np.clip((radial - 0.62) / 0.38, 0, 1) ** 2 * (0.65 + 0.35 * np.clip((u + v) / 160, -1, 1))
    _paint(image, 0.75 * face * shade, SKIN_DARK)
    _paint(image, 0.22 * face * np.exp(-(((u + 34) / 60) ** 2) - ((v + 70) / 46) ** 2), np.array([225.0, 238, 255]))
    fringe = np.clip((-62 - 16 * np.cos((u - 30) / 46) - v) / 1.4 + 0.5, 0, 1) * np.clip((1 - radial) * 105 + 3, 0, 1)
    _paint(image, fringe, HAIR + 10)
    strands = 0.5 + 0.5 * np.sin((u + 0.35 * v) / 4.5)
    _paint(image, 0.25 * fringe * strands, HAIR * 1.9)
    p = u - at.turn
    for side in (-1, 1):
        blush = np.exp(-(((p - side * 66) / 25) ** 2) - ((v - 34) / 17) ** 2)
        _paint(image, 0.34 * face * blush, np.array([118.0, 118, 236]))
        for k, (fu, fv) in enumerate(((58, 22), (70, 26), (64, 35))):
            _paint(image, 0.4 * _ellipse(p, v, side * fu, fv + k, 2.2, 2.0), SKIN_DARK * 0.8)
    n = u - 1.6 * at.turn
    _paint(image, 0.45 * np.exp(-(((n - 9) / 8) ** 2) - ((v - 2) / 26) ** 2), SKIN_DARK)
    _paint(image, 0.55 * np.exp(-((n / 17) ** 2) - ((v - 29) / 7) ** 2), SKIN_DARK)
    _paint(image, 0.45 * np.exp(-(((n + 3) / 7) ** 2) - ((v - 16) / 9) ** 2), np.array([220.0, 234, 252]))
    for side in (-1, 1):
        _paint(image, 0.75 * _ellipse(n, v, side * 7.5, 30, 4.2, 2.4), SKIN_DARK * 0.55)


def _eyes(image: np.ndarray, p: np.ndarray, v: np.ndarray, at: Pose) -> None:
    """Eyes that blink, under brows."""
    for side in (-1, 1):
        cu, cv = side * 46.0, -18.0
        opened = 15.0 * (1 - 0.93 * at.blink)
        _paint(image, 0.3 * _ellipse(p, v, cu, cv - 1, 25, 19), SKIN_DARK)
        white = _ellipse(p, v, cu, cv + 4 * at.blink, 21, max(1.2, opened))
        _paint(image, white, np.array([246.0, 246, 244]))
        _paint(image, white * _ellipse(p, v, cu + 0.5 * at.turn, cv + 1, 11, 11.5), np.array([132.0, 112, 40]))
        _paint(image, white * _ellipse(p, v, cu + 0.5 * at.turn, cv + 1, 5.5, 6), np.array([26.0, 20, 24]))
        _paint(image, white * _ellipse(p, v, cu - 3 + 0.5 * at.turn, cv - 4, 2.8, 2.8), np.array([255.0, 255, 255]))
        lid = cv + 4 * at.blink - opened * np.sqrt(np.clip(1 - ((p - cu) / 22) ** 2, 0, 1))
        lash = np.clip(2.2 - np.abs(v - lid), 0, 1) * np.clip(22.5 - np.abs(p - cu), 0, 1)
        _paint(image, lash, HAIR * 0.8)
        brow = cv - 28 - 4 * np.cos((p - cu) / 16) + 2 * at.blink
        _paint(image, np.clip(3.6 - np.abs(v - brow), 0, 1) * np.clip((24 - np.abs(p - cu)) / 2, 0, 1), HAIR * 0.9)


# ── the mouth ────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_mouth(index: int, mouth: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """The patch of :func:`mouth_patch` with this mouth: float32 (h, w, 3), BGR, 0 … 255."""
    openness, width, rounding = (float(np.clip(value, 0, 1)) for value in mouth)
    y0, y1, x0, x1 = mouth_patch(index)
    image = _bare_patch(index).copy()
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    at = pose(index)
    u, v = head_coordinates(x, y, at)
    m, n = u - at.turn, v - MOUTH_V

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

    _paint(image, 0.5 * np.exp(-((m / (0.7 * full)) ** 2) - ((n - 0.7 * gap - 19) / 5) ** 2), SKIN_DARK)  # its shadow
    lips = _between(n, top, bottom) * np.clip(full - np.abs(m) + 0.5, 0, 1)
    _paint(image, lips, LIP)
    _paint(image, 0.45 * lips * _between(n, top, upper), LIP * 0.72)
    shine = np.exp(-(((m + 4) / (0.4 * half)) ** 2) - ((n - lower - 4.5) / 2) ** 2)
    _paint(image, 0.5 * lips * shine, SHINE)

    inside = _between(n, upper, lower) * np.clip(half - np.abs(m) + 0.5, 0, 1)
    _paint(image, inside, INSIDE)
    rise = 0.7 * gap - smile - 0.34 * gap
    tongue = np.clip((1 - np.hypot(m / (0.66 * half), (n - rise - 0.42 * gap) / (0.42 * gap + 1))) * 8 + 0.5, 0, 1)
    _paint(image, inside * tongue * np.clip((gap - 8) / 6, 0, 1), TONGUE)
    row = np.clip((0.84 * half - np.abs(m)) / 3, 0, 1) * np.clip((gap - 2) / 2, 0, 1)
    _paint(image, inside * row * np.clip(upper + min(10.0, 0.42 * gap) - n + 0.5, 0, 1), TEETH)
    spread = np.clip((width - 0.45) / 0.25, 0, 1)
    _paint(image, spread * inside * row * np.clip(n - lower + min(6.0, 0.25 * gap) + 0.5, 0, 1), TEETH * 0.94)
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


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


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
