"""A long clip on a farm: is memory constant, and does every hour cost what the first one did?

    python benchmarks/long_haul.py [--hours 24]

The network and the pasting are stubs, frames are small, the sound is silence and the features are zeros. All else is
real: fingerprints, schedule, windows, batches, segments, encoder, records, joining and muxing.
At the end it prints what each hour took and what memory the process held after it; it exits with 1 if memory at its
highest is more than 100 MB over what was held after the first hour, or if the video has a frame too few or too many.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.benchmarks.meters import resident_bytes
from gpupipe.benchmarks.scenario import silent_clip
from gpupipe.farm.jobs import Job
from gpupipe.farm.ledger import Ledger
from gpupipe.farm.local import work_here
from gpupipe.farm.residents import Residents
from gpupipe.farm.scheduler import Scheduler
from gpupipe.farm.worker import Worker
from gpupipe.features import SpeechFeatures
from gpupipe.shots import Shot
from gpupipe.video.images import save_image

WIDTH, HEIGHT = 64, 48
FPS = 25
TEMPLATE_FRAMES = 50
ALLOWED_MB = 100


class Moment(NamedTuple):
    """How things stand after so many frames: seconds since the start, and megabytes held."""

    frames: int
    seconds: float
    megabytes: float


class Haul(NamedTuple):
    """A rendered clip: its number of frames, and a moment after each part."""

    frames: int
    moments: list[Moment]


class StubAvatar:
    """Shows its template frames, brightened by the features."""

    engine = SimpleNamespace(name="stub")

    def __init__(self) -> None:
        self.template = SimpleNamespace(length=TEMPLATE_FRAMES, device=torch.device("cpu"))
        self._frames = torch.randint(100, (TEMPLATE_FRAMES, HEIGHT * 3 // 2, WIDTH), dtype=torch.uint8)

    def render(self, frames: NDArray[np.int64], audio: Tensor) -> Tensor:
        """As :meth:`gpupipe.avatar.Avatar.render`."""
        return self._frames[torch.from_numpy(frames)] + audio.flatten(1)[:, :1, None].to(torch.uint8)


class _StubGenerator:
    """Makes the stub's shots."""

    unet_model = SimpleNamespace(engine=SimpleNamespace(name="stub"))

    def shot(self, avatar: Any, speech: SpeechFeatures, *, start_frame: int, fps: float, frames: range) -> Shot:
        """As :meth:`gpupipe.FrameGenerator.shot`."""
        return Shot(avatar, speech, speech.timing(fps), start_frame, frames)


class _StubResidents(Residents):
    """Has one avatar, whatever is asked for."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self._stubs = _StubGenerator(), StubAvatar()

    def get(self, job: Job, pixel_format: str) -> Any:
        """The stubs."""
        return self._stubs


def haul(seconds: int, folder: Path) -> Haul:
    """Render ``seconds`` of silence in ``folder``."""
    job = _job(seconds, folder)
    start = time.perf_counter()
    moments: list[Moment] = []
    ledger = Ledger(folder / "out", [job])
    with ledger.locked():
        scheduler = Scheduler([job], ledger, device="cpu")
        noted, rendered = threading.Lock(), scheduler.rendered

        def note(outcome: Any) -> None:
            rendered(outcome)
            with noted:
                moments.append(Moment(scheduler.frames, time.perf_counter() - start, _held()))

        scheduler.rendered = note  # type: ignore[method-assign]
        work_here(scheduler, Worker(_StubResidents(), batch_size=64))
    state = ledger.states[job.output]
    if state.status != "done":
        raise RuntimeError(f"{job.output}: {state.status}: {state.error}")
    moments.append(Moment(scheduler.frames, time.perf_counter() - start, _held()))  # joined
    with av.open(str(ledger.output(job))) as video:
        return Haul(video.streams.video[0].frames, moments)


def _job(seconds: int, folder: Path) -> Job:
    """A template of grey frames, zeros for features and silence for sound."""
    template = folder / "face"
    for name in ("full_body_img", "landmarks"):
        (template / name).mkdir(parents=True, exist_ok=True)
    for number in range(TEMPLATE_FRAMES):
        save_image(np.full((HEIGHT, WIDTH, 3), 128, np.uint8), template / "full_body_img" / f"{number}.jpg")
        (template / "landmarks" / f"{number}.lms").write_text("1 1\n" * 110)
    checkpoint = folder / "none.pth"
    checkpoint.touch()
    # At 8 kHz 24 hours of sound stay below the 4 GB that a .wav can be.
    features, sound = silent_clip(folder, frames=seconds * FPS, fps=FPS, row_shape=(512,), rate=8000)
    return Job(
        checkpoint=str(checkpoint),
        template=str(template),
        audio_features=str(features),
        audio=str(sound),
        output="long.mp4",
    )


def _held() -> float:
    """Megabytes of this process that are in RAM.

    Raises:
        RuntimeError: the system does not say; Linux does.
    """
    held = resident_bytes()
    if held is None:
        raise RuntimeError("how much memory this process holds is not known; expected Linux")
    return held / 1e6


def main() -> None:
    """Haul, and print each hour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0, help="length of the clip")
    parser.add_argument("--folder", type=Path, help="for its files; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = round(3600 * options.hours)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        done = haul(seconds, Path(name))
    print("hours of video | frames | took, s | frames/s | memory held, MB\n--- | --- | --- | --- | ---")
    hour, before = 3600 * FPS, Moment(0, 0.0, 0.0)
    hours = [moment for moment in done.moments[:-1] if moment.frames % hour == 0] or [done.moments[-2]]
    for moment in hours:
        rate = (moment.frames - before.frames) / (moment.seconds - before.seconds)
        taken = moment.seconds - before.seconds
        print(f"{moment.frames / hour:g} | {moment.frames} | {taken:.1f} | {rate:.0f} | {moment.megabytes:.0f}")
        before = moment
    last = done.moments[-1]
    print(f"joined | {done.frames} | {last.seconds - done.moments[-2].seconds:.1f} | | {last.megabytes:.0f}")
    grown = max(moment.megabytes for moment in done.moments) - hours[0].megabytes
    print(f"memory at its highest: {grown:+.0f} MB from the first hour's end")
    sys.exit(grown > ALLOWED_MB or done.frames != seconds * FPS)


if __name__ == "__main__":
    main()
