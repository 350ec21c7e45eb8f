"""Parts of test clips, inputs for the network, and frames rendered without a file."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe import FrameGenerator
from gpupipe.frame_cache import FrameCache, Tensors
from gpupipe.models import AUDIO_SHAPES, Mode

Image = np.ndarray

FRAMES = 11
"""Frames of the clip that `conftest.py` renders to files."""

RATE = 16000
"""Samples a second of its sound."""

ROWS: dict[Mode, tuple[int, ...]] = {"ave": (512,), "hubert": (2, 1024), "wenet": (16, 512)}
"""Shape of a row of features."""


def features(count: int, mode: Mode = "ave", seed: int = 0) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal((count, *ROWS[mode]))).astype(np.float32)


def network_inputs(mode: Mode, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Noise: images (B, 6, 320, 320) in [0, 1], and windows of features that have both signs."""
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(batch, 6, 320, 320, generator=generator)
    return image, torch.randn(batch, *AUDIO_SHAPES[mode], generator=generator)


def mouths(count: int, seed: int = 0) -> Tensor:
    """Possible outputs of the network (B, 3, 320, 320): noise over all of [0, 1], both ends included."""
    values = torch.rand(count, 3, 320, 320, generator=torch.Generator().manual_seed(seed))
    return (1.2 * values - 0.1).clamp(0, 1)


def landmarks(xmin: int, ymin: int, side: int) -> np.ndarray:
    """110 points; the three that the box depends on give this box."""
    points = np.full((110, 2), -7, dtype=np.int32)
    points[1, 0], points[31, 0], points[52, 1] = xmin, xmin + side, ymin
    return points


def rendered(
    generator: FrameGenerator, template: Path, sound: Any, *, parsing: bool = False, **options: Any
) -> list[Image]:
    directories = (template / "full_body_img", template / "landmarks")
    if parsing:
        options["parsing_dir"] = template / "parsing"
    return generator.generate_frames_from_template_sequence(*directories, sound, **options)


def cached(cache: FrameCache, frames: Sequence[int] | NDArray[np.int64]) -> Tensors:
    """What a cache gives for these frames: each tensor has a row for each frame."""
    tensors, index = cache.lookup(frames)
    return {name: value.index_select(0, index) for name, value in tensors.items()}


def write_click(path: Path, seconds: float) -> Path:
    """Silence with a click at 0.2 s."""
    samples = np.zeros(round(seconds * RATE))
    samples[RATE // 5 :][:40] = 20000 * np.sign(np.sin(np.arange(40)))
    return write_wav(path, samples)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """16-bit sound of ``samples``, (n,) or (n, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path
