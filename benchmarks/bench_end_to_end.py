"""A whole clip, from files to an .mp4 with sound: gpupipe beside the reference loop, in one run on one machine.

    python benchmarks/bench_end_to_end.py --frames 100 --rounds 3 [--record]

What is timed, for both: reading the template and the features, every frame, the encoder and the muxer, until the file
is whole. What is not: importing, and loading the checkpoint, which who renders many clips pays once; the latter is
reported by itself. Each first renders a short clip that does not count. Then the two take turns, and swap who begins,
so that a noisy neighbour or a warm core favours neither; the ratio is taken within each turn.

Both use the same checkpoint, float32 on the CPU, and libx264 at the same CRF; each with its own preset (the loop's is
"medium", that of the ffmpeg command) and its own default paste-back. A clip no longer than the template shows gpupipe
no frame twice: what it caches for each template frame pays off in longer ones (``--frames``).
"""

from __future__ import annotations

import argparse
import tempfile
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from gpupipe import FrameGenerationPipeline
from gpupipe.benchmarks import reference_loop
from gpupipe.benchmarks.common import ROOT, Row, Spread, append_rows, commit, device_name, row, versions
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.models import MODES, load_unet

WARMUP_FRAMES = 4


@dataclass
class Contestant:
    """One way to render, and what was measured of it."""

    name: str
    load_seconds: float
    render: Callable[[Path, Path, Path], dict[str, float]]
    """(features, sound, output) → seconds by stage."""
    seconds: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    """Measure, print, and with ``--record`` append to the recorded results."""
    options = _options()
    torch.set_grad_enabled(False)
    config = {
        "template": options.template.name,
        "mode": options.mode,
        "width": options.width,
        "exact": options.exact,
        "crf": options.crf,
        "fps": options.fps,
        "rounds": options.rounds,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = folder / "seeded.pth"
            torch.save(seeded_network(options.mode, width=options.width).state_dict(), checkpoint)
        contestants = _reference(checkpoint, options), _gpupipe(checkpoint, options, config)
        _take_turns(contestants, options, folder)
    rows = _rows(*contestants, options, config)
    _report(*contestants, options, config)
    if options.record:
        for path in append_rows(rows):
            print(f"recorded in {path.relative_to(ROOT)}")


def _take_turns(contestants: tuple[Contestant, Contestant], options: argparse.Namespace, folder: Path) -> None:
    warm = _inputs(WARMUP_FRAMES, options, folder)
    full = _inputs(options.frames, options, folder)
    output = folder / "clip.mp4"
    for one in contestants:
        one.render(*warm, output)
    for turn in range(options.rounds):
        for one in contestants if turn % 2 == 0 else contestants[::-1]:
            start = time.perf_counter()
            stages = one.render(*full, output)
            one.seconds.append(time.perf_counter() - start)
            one.stages.append(stages)
            _check(output, options.frames, one.name)
            print(f"turn {turn + 1}: {one.name} {options.frames / one.seconds[-1]:.2f} frames/s", flush=True)


def _reference(checkpoint: Path, options: argparse.Namespace) -> Contestant:
    start = time.perf_counter()
    network = load_unet(checkpoint, options.mode).to(options.device)
    load = time.perf_counter() - start

    def render(features: Path, sound: Path, output: Path) -> dict[str, float]:
        rows = np.load(features)
        arguments = {"fps": options.fps, "crf": options.crf}
        return reference_loop.render(options.template, rows, network, sound, output, **arguments).seconds

    return Contestant("reference loop", load, render)


def _gpupipe(checkpoint: Path, options: argparse.Namespace, config: dict[str, Any]) -> Contestant:
    start = time.perf_counter()
    pipeline = FrameGenerationPipeline(checkpoint, options.mode, options.device, exact=options.exact)
    load = time.perf_counter() - start

    def render(features: Path, sound: Path, output: Path) -> dict[str, float]:
        pipeline.generate_video(features, options.template, sound, output, fps=options.fps, crf=options.crf)
        record = pipeline.last_render
        assert record is not None
        config.update(engine=record.engine, codec=record.codec)
        return record.stages

    return Contestant("gpupipe", load, render)


# ── inputs of the asked length, and a look at the output ──────────────────────────────────────────────────────────────


def _inputs(frames: int, options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The first ``frames`` rows of the features and as much of the sound; both come round again if they end before."""
    features, sound = folder / f"{frames}.npy", folder / f"{frames}.wav"
    rows = np.load(options.features)
    np.save(features, np.take(rows, range(frames), axis=0, mode="wrap"))
    with av.open(str(options.audio)) as container:
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
        pieces = [piece.to_ndarray() for frame in container.decode(audio=0) for piece in resampler.resample(frame)]
    samples = np.concatenate(pieces, axis=1)[0]
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.resize(samples, round(frames * rate / options.fps)).tobytes())
    return features, sound


def _check(output: Path, frames: int, name: str) -> None:
    """A file that lacks frames or sound was not rendered faster, but less."""
    with av.open(str(output)) as container:
        written = sum(1 for packet in container.demux(video=0) if packet.size)
        if written != frames or not container.streams.audio:
            raise RuntimeError(
                f"{name} wrote {written} frames, {len(container.streams.audio)} sound tracks; expected {frames} and 1"
            )


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────────


def _ratio(reference: Contestant, ours: Contestant) -> Spread:
    return Spread.of([slow / fast for slow, fast in zip(reference.seconds, ours.seconds, strict=True)])


def _rows(reference: Contestant, ours: Contestant, options: argparse.Namespace, config: dict[str, Any]) -> list[Row]:
    what: dict[str, Any] = {"what": "end_to_end", "config": config, "device": options.device}
    by_frames = {**what, "axis": "frames", "value": options.frames}
    rows = [row(_ratio(reference, ours), provider="gpupipe", metric="ratio", unit="×", **by_frames)]
    for one in (reference, ours):
        provider = one.name.replace(" ", "_")
        speed = Spread.of([options.frames / seconds for seconds in one.seconds])
        rows.append(row(speed, provider=provider, metric="throughput", unit="frames/s", **by_frames))
        load = Spread.of([one.load_seconds])
        rows.append(row(load, provider=provider, metric="load", unit="s", **by_frames))
        for stage in one.stages[0]:
            spread = Spread.of([1000 * stages[stage] / options.frames for stages in one.stages])
            rows.append(
                row(spread, provider=provider, metric="time", unit="ms/frame", axis="stage", value=stage, **what)
            )
    return rows


def _report(reference: Contestant, ours: Contestant, options: argparse.Namespace, config: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\n{device_name(options.device)}; commit {commit()}; {packages}")
    print(f"{options.frames} frames; " + ", ".join(f"{name} {value}" for name, value in config.items()))
    print("\n| | frames/s, median (p20–p80) | load, s |\n| --- | --- | --- |")
    for one in (reference, ours):
        speed = Spread.of([options.frames / seconds for seconds in one.seconds])
        print(f"| {one.name} | {speed.p50:.2f} ({speed.p20:.2f}–{speed.p80:.2f}) | {one.load_seconds:.2f} |")
    ratio = _ratio(reference, ours)
    print(f"| ratio | **{ratio.p50:.2f}×** ({ratio.p20:.2f}–{ratio.p80:.2f}) | |\n")
    for one in (reference, ours):
        parts = [
            f"{stage} {np.median([1000 * stages[stage] / options.frames for stages in one.stages]):.1f}"
            for stage in one.stages[0]
        ]
        print(f"{one.name}, ms a frame: " + ", ".join(parts))


def _options() -> argparse.Namespace:
    shared = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, default=shared / "speaker", help="template directory")
    parser.add_argument("--features", type=Path, help=".npy; default: features_<mode>.npy in the template directory")
    parser.add_argument("--audio", type=Path, default=shared / "speech.wav", help="sound of the clip")
    parser.add_argument("--checkpoint", type=Path, help="default: seeded random weights, which cost the same")
    parser.add_argument("--mode", choices=MODES, default="ave")
    parser.add_argument("--width", type=float, default=1.0, help="of the seeded network")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crf", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="half precision, on CUDA")
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results")
    options = parser.parse_args()
    options.exact = not options.fast
    options.fps = 20 if options.mode == "wenet" else 25
    options.features = options.features or options.template / f"features_{options.mode}.npy"
    for name in ("template", "features", "audio"):
        if not getattr(options, name).exists():
            parser.error(f"--{name}: {getattr(options, name)} does not exist")
    if options.frames < 1 or options.rounds < 1:
        parser.error(f"--frames {options.frames} --rounds {options.rounds}: expected 1 or more of each")
    return options


if __name__ == "__main__":
    main()
