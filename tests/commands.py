"""Commands for several test files: a small clip, and ways to run a command on it in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from clips import write_wav
from typer.testing import CliRunner, Result

from gpupipe.cli import app

FRAMES = 5
QUICK = ("--engine", "eager")  # is built at once; for what comes before and after the network


def write_clip(folder: Path, make_template: Any, tiny_checkpoint: Any) -> dict[str, Path]:
    """Paths of a small clip's inputs: checkpoint, template, features and sound."""
    rng = np.random.default_rng(0)
    np.save(folder / "features.npy", np.abs(rng.standard_normal((FRAMES, 512))).astype(np.float32))
    return {
        "checkpoint": tiny_checkpoint(),
        "template": make_template(folder / "template", 3),
        "features": folder / "features.npy",
        "sound": write_wav(folder / "tone.wav", 8000 * np.sin(np.arange(3200 * FRAMES // 5) / 8)),
    }


def run(*words: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(app, [str(word) for word in words])


def render_words(clip: dict[str, Path], output: Path, *more: object) -> list[object]:
    """The words that render a clip."""
    return [
        *("render", "--checkpoint", clip["checkpoint"], "--template", clip["template"], "--output", output),
        *("--audio-features", clip["features"], "--audio", clip["sound"], *more),
    ]
