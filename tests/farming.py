"""Small farm jobs, for several test files and for the script that kills farms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from clips import write_wav

from gpupipe.farm import FarmRecord, run_farm

Jobs = list[dict[str, Any]]


def write_speech(folder: Path, name: str, frames: int, seed: int = 0) -> tuple[str, str]:
    """Write features for so many frames, and noise of that length as sound; returns the names of both files."""
    rng = np.random.default_rng(seed)
    features = folder / f"{name}.npy"
    np.save(features, rng.standard_normal((frames, 512)).astype(np.float32))
    sound = write_wav(folder / f"{name}.wav", rng.integers(-5000, 5000, frames * 640))
    return str(features), str(sound)


def write_jobs(path: Path, jobs: Jobs) -> Path:
    """Write a file of jobs."""
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return path


def three_jobs(folder: Path, checkpoint: Path, make_template: Callable[..., Path]) -> Jobs:
    """Three jobs for two faces: one of three parts of two seconds each, at a low frame rate, and two short ones."""
    faces = [str(make_template(folder / f"face{n}", frames=4, size=(96, 64), seed=n)) for n in range(2)]
    jobs = []
    for number, (frames, face) in enumerate([(120, 0), (11, 1), (7, 0)]):
        features, sound = write_speech(folder, str(number), frames, number)
        files = {"checkpoint": str(checkpoint), "template": faces[face], "audio_features": features, "audio": sound}
        jobs.append(files | {"output": f"{number}.mp4", "engine": "eager"})
    jobs[0] |= {"fps": 5.0}
    jobs[2] |= {"output": "deep/er/2.mp4", "crf": 30}
    return jobs


def farm(jobs: Jobs, folder: Path, **options: Any) -> FarmRecord:
    """Run a farm in parts of two seconds."""
    return run_farm(write_jobs(folder.with_suffix(".jsonl"), jobs), folder, part_seconds=2, **options)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of an output folder's ``results.jsonl``, by output."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {row["output"]: row for row in rows}


def frames_of(path: Path) -> list[bytes]:
    """The pixels of each frame of a video."""
    with av.open(str(path)) as video:
        return [frame.to_ndarray().tobytes() for frame in video.decode(video=0)]


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
