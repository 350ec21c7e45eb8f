"""The network alone: gpupipe's engines, with nothing cached and with the template's half cached, beside their peers.

    python benchmarks/bench_unet.py [--width 1] [--mode ave] [--rounds 20] [--record]

Peers, each at its best on a CPU: eager PyTorch as the network is trained, the same with batch norms folded, and ONNX
Runtime on the whole network as ``gpupipe export`` writes it. All in float32, batch 1 (a batch gains nothing there), on
fixed random weights and inputs. Providers take turns within a round, so that a noisy neighbour favours none.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from gpupipe.benchmarks.common import Row, Spread, append_rows, device_name, row
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.onnxruntime_cpu import OnnxRuntimeEngine
from gpupipe.models import AUDIO_SHAPES, MODES, Mode
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.unet328 import INPUT_SIZE
from gpupipe.onnx_export import export_unet

WARMUP = 2


def contestants(mode: Mode, width: float) -> dict[str, Callable[[], object]]:
    """Name → one frame's network."""
    network = seeded_network(mode, width=width)
    folded = fold_batch_norms(network)
    image = torch.rand(1, 6, INPUT_SIZE, INPUT_SIZE)
    audio = torch.rand(1, *AUDIO_SHAPES[mode])
    with tempfile.TemporaryDirectory() as folder:
        path = export_unet(network, Path(folder) / "unet.onnx")
        whole = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    engine = OnnxRuntimeEngine(network)
    features = engine.encode(image)
    index = torch.tensor([0])
    inputs = {"image": image.numpy(), "audio": audio.numpy()}
    return {
        "torch, as trained": lambda: network(image, audio),
        "torch, batch norms folded": lambda: folded(image, audio),
        "ONNX Runtime, whole network": lambda: whole.run(None, inputs),
        "gpupipe, nothing cached": lambda: engine.decode(engine.encode(image), index, audio),
        "gpupipe, template's half cached": lambda: engine.decode(features, index, audio),
    }


@torch.inference_mode()
def run(mode: Mode, width: float, rounds: int) -> list[Row]:
    """Measure all in turns."""
    named = contestants(mode, width)
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(WARMUP + rounds):
        for name, function in named.items():
            started = time.perf_counter()
            function()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - started)
    what: dict[str, Any] = {
        "what": "unet",
        "axis": "batch",
        "value": 1,
        "config": {"mode": mode, "width": width, "precision": "float32"},
    }
    rows = []
    for name, times in seconds.items():
        spread = Spread.of([1000 * one for one in times])
        rows.append(row(spread, provider=name, metric="latency", unit="ms/frame", **what))
        print(f"{name:32s} {spread.p50:7.1f} ms/frame ({spread.p20:.1f}–{spread.p80:.1f})")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="ave")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results")
    options = parser.parse_args()
    print(device_name())
    rows = run(options.mode, options.width, options.rounds)
    if options.record:
        append_rows(rows)


if __name__ == "__main__":
    main()
