"""A clip of drifting colours, ways to encode it, and what lies in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import av.error
import cv2
import numpy as np
import torch
from clips import write_wav

from gpupipe.kernels.nv12 import to_nv12
from gpupipe.video.encode import VideoWriter

WIDTH, HEIGHT = 96, 64
LENGTH = 50
"""Frames of a segment at 25 frames a second."""


def moving_clip() -> torch.Tensor:
    """Two whole segments and 11 frames of drifting colours, all different: NV12."""
    count = 2 * LENGTH + 11
    colours = np.random.default_rng(0).integers(256, size=(6, 30, 3)).astype(np.uint8)
    wide = cv2.resize(colours, (WIDTH + 2 * count, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return to_nv12(torch.from_numpy(np.stack([wide[:, 2 * i : 2 * i + WIDTH] for i in range(count)])))


def write(path: Path, frames: torch.Tensor, **options: Any) -> Path:
    with VideoWriter(path, width=WIDTH, height=HEIGHT, **{"segmented": True, **options}) as writer:
        for batch in frames.split(7):
            writer.write(batch)
    return path


def packets_of(path: Path) -> list[tuple[int, int, bool, bytes]]:
    """pts and dts in frames, whether a decoder can begin there, and the bytes."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        step = 1 / (stream.average_rate * stream.time_base)
        packets = [packet for packet in container.demux(stream) if packet.size]
        return [(round(p.pts / step), round(p.dts / step), p.is_keyframe, bytes(p)) for p in packets]


def luma(path: Path) -> tuple[list[float], np.ndarray]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.time for frame in frames], np.stack([f.reformat(format="gray").to_ndarray() for f in frames])


def write_silence(path: Path, seconds: float) -> Path:
    return write_wav(path, np.zeros(round(16000 * seconds)))
