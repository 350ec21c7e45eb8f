"""Memory does not grow with the length of the sound: 20,000 frames peak at what 500 do."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clips import write_wav

SHORT, MIDDLE, LONG = 500, 3000, 20_000
ALLOWED_MB = {MIDDLE: 45, LONG: 100}
"""How far the peak may exceed that of SHORT. For MIDDLE: half the size of its additional frames (92 MB); two runs of
the same length can differ by 25 MB."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")

PROGRAM = """
import sys
from pathlib import Path

import torch

from gpupipe import FrameGenerationPipeline

torch.set_num_threads(1)
checkpoint, template, features, sound, output, variant = sys.argv[1:]


class Stub:
    '''A network that takes no time: what is looked at is all that is around it.'''

    name, device, dtype = "stub", torch.device("cpu"), torch.float32

    def encode(self, image):
        return {"seen": image.mean(dim=(2, 3))}

    def decode(self, features, index, audio):
        level = (audio.mean(dim=(1, 2, 3)) * 255).to(torch.uint8)
        return level[:, None, None, None].expand(-1, 3, 320, 320)


pipeline = FrameGenerationPipeline(checkpoint, "ave", "cpu", engine="torch", batch_size=16)
pipeline.unet_model.engine = Stub()
if variant == "hoards":  # keeps every frame, as the loop must not
    stream, kept = pipeline.generator.stream, []

    def hoarding(*arguments, **options):
        for batch in stream(*arguments, **options):
            kept.append(batch.clone())
            yield batch

    pipeline.generator.stream = hoarding
pipeline.generate_video(features, template, sound, output)
# Not ru_maxrss: a process inherits that from the one that started it.
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def peak(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., float]:
    """``peak(frames, variant)`` → megabytes that a separate process takes to render that many small frames."""
    folder = tmp_path_factory.mktemp("memory")
    template = make_template(folder / "template", frames=8, size=(192, 128), box=(60, 40, 64))

    @functools.cache
    def measure(frames: int, variant: str = "streams") -> float:
        features, sound, output = (folder / f"{frames}{suffix}" for suffix in (".npy", ".wav", ".mp4"))
        rows = np.lib.format.open_memmap(features, "w+", np.float32, (frames, 512))
        rows[:] = np.linspace(0, 0.9, frames)[:, None]
        rows.flush()
        write_wav(sound, np.random.default_rng(0).integers(-5000, 5000, frames * 640))
        arguments = [str(path) for path in (tiny_checkpoint(), template, features, sound, output)]
        command = [sys.executable, "-c", PROGRAM, *arguments, variant]
        # One heap for all threads: with one each, how much lies unused in them depends on the threads' timing.
        env = os.environ | {"MALLOC_ARENA_MAX": "1"}
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
        assert finished.returncode == 0, finished.stderr
        assert output.is_file()
        return int(finished.stdout) / 1024

    return measure


def test_memory_does_not_grow(peak: Callable[..., float]) -> None:
    assert peak(MIDDLE) - peak(SHORT) <= ALLOWED_MB[MIDDLE]


def test_bound_fails_on_a_loop_that_keeps_its_frames(peak: Callable[..., float]) -> None:
    assert peak(MIDDLE, "hoards") - peak(SHORT) > ALLOWED_MB[MIDDLE]


@pytest.mark.slow
def test_20000_frames_take_no_more_than_500(peak: Callable[..., float]) -> None:
    assert peak(LONG) - peak(SHORT) <= ALLOWED_MB[LONG]
