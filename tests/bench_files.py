"""A template of three frames, features and sound, small enough that benchmarks take seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from clips import write_wav
from conftest import MakeTemplate

BenchFiles = dict[str, Path]
"""``template``, ``audio_features`` and ``audio``, in the order in which a scenario takes them."""


def write_bench_files(folder: Path, make_template: MakeTemplate) -> BenchFiles:
    template = make_template(folder / "speaker", 3)
    np.save(folder / "features.npy", np.random.default_rng(0).random((6, 512), dtype=np.float32))
    sound = write_wav(folder / "speech.wav", np.sin(np.arange(16000) / 20) * 9000)
    return {"template": template, "audio_features": folder / "features.npy", "audio": sound}
