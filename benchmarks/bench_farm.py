"""What a farm costs over single renders, how it scales over workers, and how it grows with the frames.

    python -m gpupipe.benchmarks.bench_farm [--template DIR --audio-features NPY --audio SOUND] [--record]

* ``overhead``: a :class:`~gpupipe.FrameGenerationPipeline` renders clips one after the other; another opens their
  avatar once and renders the same; then a farm in this process does. All load the network, and each turn is begun by
  another. ``ratio`` is the time over the single renders', for one long clip and for many short ones of the same face.
* ``frames``: milliseconds a frame of one clip on a farm, by the clip's length.
* ``workers``: frames a second of a farm with 1, 2 … Ray workers on this machine, which share its cores. Starting and
  ending the cluster is timed by a run with nothing to do; that time is the row ``start``, and is subtracted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpupipe import FrameGenerationPipeline
from gpupipe.benchmarks.common import Row, Spread, add_record_options, append_rows, device_name, row
from gpupipe.benchmarks.scenario import Scenario, add_options, from_options
from gpupipe.farm import FarmRecord, run_farm
from gpupipe.lanes import available_cores

SHAPES = {"one long clip": (1, 600), "many short clips": (20, 30)}
"""Clips, and frames of each."""

LENGTHS = (75, 150, 300, 600)
CLIPS_OF_A_WORKER, FRAMES_OF_A_CLIP = 2, 300


@torch.no_grad()
def main() -> None:
    """Measure, print, and with ``--record`` append to the recorded results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=("overhead", "frames", "workers"), default=["overhead", "frames"])
    add_record_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenario = from_options(options, folder)
        bench = _Bench(scenario, folder, options)
        print(f"{device_name(options.device)}: " + ", ".join(f"{k} {v}" for k, v in scenario.facts().items()))
        for part in options.parts:
            rows = getattr(bench, part)()
            for made in rows:
                spread = f"{made.p50:.3f} ({made.p20:.3f}–{made.p80:.3f})"
                print(f"{made.axis} {made.value}: {made.metric} {spread} {made.unit}", flush=True)
            if options.record:
                append_rows(rows, options.results)


class _Bench:
    """The parts of the benchmark, each a list of rows."""

    def __init__(self, scenario: Scenario, folder: Path, options: argparse.Namespace) -> None:
        self.scenario, self.folder, self.options = scenario, folder, options

    def overhead(self) -> list[Row]:
        """A farm, and an avatar that is opened once, beside single renders."""
        ways: dict[str, Callable[[int, tuple[Path, Path]], float]] = {
            "single": self._single,
            "avatar": partial(self._single, opened_once=True),
            "overhead": lambda clips, files: self._farm([files] * clips).seconds,
        }
        rows = []
        for shape, (clips, frames) in SHAPES.items():
            files = self.scenario.clip(frames, self.folder)
            ratios: dict[str, list[float]] = {"avatar": [], "overhead": []}
            for turn in range(self.options.rounds + 1):  # the first does not count
                first = turn % len(ways)
                took = {who: ways[who](clips, files) for who in (*list(ways)[first:], *list(ways)[:first])}
                print(f"{shape}: " + ", ".join(f"{who} {seconds:.2f} s" for who, seconds in took.items()), flush=True)
                for who, measured in ratios.items():
                    measured.append(took[who] / took["single"])
            config = {"clips": clips, "frames": frames}
            for who, measured in ratios.items():
                rows.append(self._row(Spread.of(measured[1:]), who, shape, metric="ratio", unit="×", config=config))
        return rows

    def frames(self) -> list[Row]:
        """Milliseconds a frame, by the length of the clip."""
        rows = []
        for frames in LENGTHS:
            files = self.scenario.clip(frames, self.folder)
            spent = [1000 * self._farm([files]).seconds / frames for _ in range(self.options.rounds)]
            rows.append(self._row(Spread.of(spent), "frames", frames, metric="time", unit="ms/frame", config={}))
            print(f"{frames} frames: {rows[-1].p50:.2f} ms a frame", flush=True)
        return rows

    def workers(self) -> list[Row]:
        """Frames a second by the number of workers."""
        rows = []
        files = self.scenario.clip(FRAMES_OF_A_CLIP, self.folder)
        most = torch.cuda.device_count() if self.options.device == "cuda" else available_cores()
        clips = [files] * (CLIPS_OF_A_WORKER * most)
        config = {"clips": len(clips), "frames": FRAMES_OF_A_CLIP}
        for workers in range(1, most + 1):
            rates, starts = [], []
            for _ in range(self.options.rounds):
                whole = self._farm(clips, workers=workers, keep=True).seconds
                starts.append(self._farm(clips, workers=workers, again=True).seconds)
                rates.append(len(clips) * FRAMES_OF_A_CLIP / (whole - starts[-1]))
                print(f"{workers} workers: {rates[-1]:.2f} frames/s, {starts[-1]:.1f} s to start", flush=True)
            rate = Spread.of(rates)
            rows.append(self._row(rate, "workers", workers, metric="throughput", unit="frames/s", config=config))
            rows.append(self._row(Spread.of(starts), "workers", workers, metric="start", unit="s", config=config))
        return rows

    def _single(self, clips: int, files: tuple[Path, Path], *, opened_once: bool = False) -> float:
        start = time.perf_counter()
        pipeline = FrameGenerationPipeline(self.scenario.checkpoint, self.scenario.mode, self.options.device)
        template = pipeline.open_avatar(self.scenario.template) if opened_once else self.scenario.template
        for _ in range(clips):
            pipeline.generate_video(files[0], template, files[1], self.folder / "single.mp4")
        return time.perf_counter() - start

    def _farm(
        self, clips: list[tuple[Path, Path]], *, again: bool = False, keep: bool = False, **how: Any
    ) -> FarmRecord:
        """Run in a new folder; with ``again`` in the one that an earlier run kept, where everything is done already."""
        out, jobs = self.folder / "out", self.folder / "jobs.jsonl"
        if not again:
            shutil.rmtree(out, ignore_errors=True)
        scenario = self.scenario
        common = {"checkpoint": str(scenario.checkpoint), "template": str(scenario.template), "mode": scenario.mode}
        lines = [
            common | {"audio_features": str(features), "audio": str(sound), "output": f"{number}.mp4"}
            for number, (features, sound) in enumerate(clips)
        ]
        jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        record = run_farm(jobs, out, device=self.options.device, **how)
        if record.done + record.skipped != len(clips) or bool(record.skipped) != again:
            raise RuntimeError(f"{out}: {record}; expected {len(clips)} clips to be {'there' if again else 'done'}")
        if not keep:
            shutil.rmtree(out)
        return record

    def _row(
        self, spread: Spread, axis: str, value: float | str, *, metric: str, unit: str, config: dict[str, Any]
    ) -> Row:
        place: dict[str, Any] = {"what": "farm", "provider": "gpupipe", "axis": axis, "value": value}
        facts = self.scenario.facts() | config
        return row(spread, **place, metric=metric, unit=unit, config=facts, device=self.options.device)


if __name__ == "__main__":
    main()
