"""Small jobs for farms: what several test files and the script that kills farms make them from."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np


def write_speech(folder: Path, name: str, frames: int, seed: int = 0) -> tuple[str, str]:
    """Features of so many frames and as much noise to hear: the names of both files."""
    rng = np.random.default_rng(seed)
    features, sound = folder / f"{name}.npy", folder / f"{name}.wav"
    np.save(features, rng.standard_normal((frames, 512)).astype(np.float32))
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(rng.integers(-5000, 5000, frames * 640).astype("<i2").tobytes())
    return str(features), str(sound)


def write_jobs(path: Path, jobs: list[dict[str, Any]]) -> Path:
    """A file of jobs."""
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return path


def videos(folder: Path) -> dict[str, bytes]:
    """The finished videos of an output folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("[!.]*.mp4")) if _own(path)
    }


def left_over(folder: Path) -> list[str]:
    """Files of an output folder that are neither videos nor what a farm keeps."""
    kept = ("results.jsonl", "state.json", "lock")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if path.name not in kept and not (path.suffix == ".mp4" and _own(path))]


def _own(path: Path) -> bool:
    return ".gpupipe-farm" not in path.parts and not path.name.startswith(".")
