"""A whole clip, from files to an .mp4 with sound: gpupipe beside the reference loop, in one run on one machine.

    python benchmarks/bench_end_to_end.py --frames 100 --rounds 3 [--record]

What is timed, for all: reading the template and the features, every frame, the encoder and the muxer, until the file
is whole. What is not: importing, and loading the checkpoint, which who renders many clips pays once; the latter is
reported by itself. Each first renders a short clip that does not count. Then they take turns, and swap who begins,
so that a noisy neighbour or a warm core favours neither; the ratio is taken within each turn.

The loop runs twice: as it is, on eager PyTorch, and with the network in ONNX Runtime. On a CPU that multiplies
bfloat16 gpupipe does, too: with ``--precision bfloat16``.

All use the same checkpoint, float32 on the CPU but for that one, and libx264 at the same CRF: the loop at "medium", the
preset of the ffmpeg command, the others at gpupipe's; each has its own default paste-back. A clip no longer than the
template shows gpupipe no frame twice: what it caches for each template frame pays off in longer ones (``--frames``).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpupipe.benchmarks import contestants
from gpupipe.benchmarks.common import ROOT, Row, append_rows, commit, device_name, versions
from gpupipe.benchmarks.scenario import given
from gpupipe.models import MODES


def main() -> None:
    """Measure, print, and with ``--record`` append to the recorded results."""
    options = _options()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = (options.template, options.features, options.audio, folder)
        scenario = given(*files, checkpoint=options.checkpoint, mode=options.mode, width=options.width)
        how: dict[str, Any] = {"device": options.device, "crf": options.crf}
        everybody = [
            contestants.reference_loop(scenario, **how),
            contestants.reference_loop_onnxruntime(scenario, folder, **how),
            contestants.gpupipe(scenario, exact=options.exact, **how),
            *contestants.half_precision_on_cpu(scenario, **how),
        ]
        size = {"frames": options.frames, "rounds": options.rounds, "device": options.device}
        contestants.take_turns(everybody, scenario, folder, say=lambda line: print(line, flush=True), **size)
    config = scenario.facts() | {"crf": options.crf, "rounds": options.rounds}
    rows = contestants.clip_rows(everybody, frames=options.frames, config=config, device=options.device)
    _report(everybody, rows, options)
    if options.record:
        for path in append_rows(rows):
            print(f"recorded in {path}")


def _report(everybody: list[contestants.Contestant], rows: list[Row], options: argparse.Namespace) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\n{device_name(options.device)}; commit {commit()}; {packages}")
    print(f"{options.frames} frames; " + ", ".join(f"{name} {value}" for name, value in rows[-1].config.items()))
    print("\n| | frames/s, median (p20–p80) | load, s |\n| --- | --- | --- |")
    for one in everybody:
        speed = next(row for row in rows if (row.provider, row.metric) == (one.name, "throughput"))
        print(f"| {one.name} | {speed.p50:.2f} ({speed.p20:.2f}–{speed.p80:.2f}) | {one.load_seconds:.2f} |")
    for ratio in (row for row in rows if row.metric == "ratio"):
        print(f"| ratio of {ratio.provider} | **{ratio.p50:.2f}×** ({ratio.p20:.2f}–{ratio.p80:.2f}) | |")
    print()
    for one in everybody:
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
    options.features = options.features or options.template / f"features_{options.mode}.npy"
    for name in ("template", "features", "audio"):
        if not getattr(options, name).exists():
            parser.error(f"--{name}: {getattr(options, name)} does not exist")
    if options.frames < 1 or options.rounds < 1:
        parser.error(f"--frames {options.frames} --rounds {options.rounds}: expected 1 or more of each")
    return options


if __name__ == "__main__":
    main()
