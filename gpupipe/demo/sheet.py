"""A contact sheet: moments of a video in a row, over the waveform of its sound."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F

from gpupipe.files import media_url
from gpupipe.models.audio_encoder import SAMPLE_RATE
from gpupipe.video.images import save_image
from gpupipe.video.sound import audio_chunks

TILES = 8
TILE = 180  # pixels, width and height
WAVE = 96  # pixels, height
GAP = 4
ZOOM = 1.2  # of the frame's height a tile shows the middle 1 / ZOOM

_PAPER, _INK, _SPEECH = (250, 250, 248), (210, 214, 220), (44, 98, 160)  # RGB


def write_contact_sheet(video: str | Path, sound: str | Path, path: str | Path) -> Path:
    """Eight moments of ``video``, each over its own eighth of the waveform of ``sound``, as a PNG.

    Args:
        video: any video that FFmpeg reads.
        sound: what it says.
        path: of the PNG.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    width = TILES * TILE + (TILES - 1) * GAP
    sheet = np.empty((TILE + GAP + WAVE, width, 3), dtype=np.uint8)
    sheet[:] = _PAPER
    with av.open(media_url(video)) as container:
        seconds = _seconds(container)
        for k in range(TILES):
            left = k * (TILE + GAP)
            sheet[:TILE, left : left + TILE] = _tile(_frame_at(container, (k + 0.5) / TILES * seconds))
    _draw_wave(sheet[TILE + GAP :], _peaks(sound, seconds, width))
    for k in range(TILES):
        middle = k * (TILE + GAP) + TILE // 2
        sheet[TILE : TILE + GAP + 8, middle - 1 : middle + 1] = _SPEECH
    return save_image(sheet[..., ::-1], Path(path))


def _seconds(container: av.container.InputContainer) -> float:
    """Length of the picture; of the whole file where, as in Matroska, a stream does not tell its own."""
    stream = container.streams.video[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _frame_at(container: av.container.InputContainer, seconds: float) -> np.ndarray:
    """The frame shown at a time: uint8 (H, W, 3), RGB."""
    container.seek(int(seconds * av.time_base))
    shown = None
    for frame in container.decode(video=0):
        if shown is not None and frame.time is not None and frame.time > seconds:
            break
        shown = frame
    if shown is None:
        raise ValueError(f"{container.name}: no frame at {seconds:.2f} s")
    return shown.to_ndarray(format="rgb24")


def _tile(frame: np.ndarray) -> np.ndarray:
    """The square around the middle, as (TILE, TILE, 3)."""
    height, width = frame.shape[:2]
    side = min(width, round(height / ZOOM))
    top, left = min(height - side, round(0.5 * height - side / 2)), (width - side) // 2
    square = torch.from_numpy(frame[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
    small = F.interpolate(square, (TILE, TILE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255)[0].permute(1, 2, 0).to(torch.uint8).numpy()


def _peaks(sound: str | Path, seconds: float, columns: int) -> np.ndarray:
    """Greatest absolute value of the sound under each column of the sheet."""
    peaks = np.zeros(columns, dtype=np.float32)
    at = 0
    for chunk in audio_chunks(sound):
        column = ((at + np.arange(len(chunk))) * (columns / max(1.0, seconds * SAMPLE_RATE))).astype(np.int64)
        inside = column < columns
        np.maximum.at(peaks, column[inside], np.abs(chunk[inside]))
        at += len(chunk)
    return peaks


def _draw_wave(area: np.ndarray, peaks: np.ndarray) -> None:
    """Mirrored bars around a middle line, scaled to the loudest."""
    height = area.shape[0]
    middle = height // 2
    area[middle] = _INK
    reach = (peaks / max(1e-6, float(peaks.max())) * (middle - 10)).round().astype(int)
    rows = np.abs(np.arange(height) - middle)[:, None]
    area[(rows <= reach) & (reach > 0)] = _SPEECH
