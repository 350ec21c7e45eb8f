"""How well computing and encoding share a machine, and what a render costs besides its network.

    python -m gpupipe.benchmarks.bench_overlap [--template DIR --audio-features NPY --audio SOUND]
        [--device cuda] [--codec mjpeg] [--record]

Four kinds of work take turns within a round, on the same clip:

* ``compute``: template and features opened, every frame rendered to NV12 and thrown away;
* ``encode``: the finished frames, kept in memory, through the encoder and the muxer, with sound;
* ``render``: both at once, as ``gpupipe render`` does it, from files to a file;
* ``network``: the network's halves alone, in the same lanes: the template half once for each template frame that is
  shown, the speech half once for each frame.

``ratio`` is the time of ``render`` over that of the slower of ``compute`` and ``encode``: it would be 1 if the other
were free. On a CPU both need the same cores, so their CPU seconds add up: their sum divided by the number of cores is a
time that no scheduling can beat, and ``least`` is that time over the slower of the two. ``share`` is the part of a
render's CPU seconds that is not spent in the network, over all threads, the encoder's included. It is an upper bound:
alone, the network sees the same frame again and again, and a short clip opens a whole template.

``of_encoder`` is the render's speed as a share of the encoder's alone. On a GPU, whose encoder takes no core from the
network, ``network``, ``least`` and ``share`` are left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gpupipe import FrameGenerationPipeline, SpeechFeatures
from gpupipe.benchmarks.common import Row, Spread, add_record_options, append_rows, device_name, row
from gpupipe.benchmarks.scenario import Scenario, add_options, from_options
from gpupipe.device import find_device
from gpupipe.kernels.nv12 import PixelFormat
from gpupipe.lanes import available_cores, map_in_lanes
from gpupipe.models import AUDIO_SHAPES
from gpupipe.models.unet328 import INPUT_SIZE
from gpupipe.schedule import template_indices
from gpupipe.template import template_size
from gpupipe.video.encode import VideoWriter


class Cost(NamedTuple):
    """Seconds by the clock, and of all cores together."""

    seconds: float
    cpu: float


@torch.no_grad()
def main() -> None:
    """Measure, print, and with ``--record`` append to the recorded results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--frames", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--codec", default="auto")
    add_record_options(parser)
    options = parser.parse_args()
    device = find_device(options.device)
    print(f"{device_name(device)}; {options.frames} frames, {options.rounds} turns")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenario = from_options(options, folder)
        pipeline = FrameGenerationPipeline(scenario.checkpoint, scenario.mode, device)
        costs = _measure(pipeline, scenario, options, folder)
    model = pipeline.unet_model
    config = scenario.facts() | {"engine": model.engine.name, "exact": model.exact, "cores": available_cores()}
    assert pipeline.last_render is not None
    config["codec"] = pipeline.last_render.codec
    rows = _rows(costs, config, options, device)
    for one in rows:
        print(f"{one.provider} {one.metric}: {one.p50:.3f} ({one.p20:.3f} to {one.p80:.3f}) {one.unit}")
    if options.record:
        for path in append_rows(rows, options.results):
            print(f"recorded in {path}")


def _measure(
    pipeline: FrameGenerationPipeline, scenario: Scenario, options: argparse.Namespace, folder: Path
) -> dict[str, list[Cost]]:
    features, sound = scenario.clip(options.frames, folder)
    device, on_gpu = pipeline.unet_model.device, pipeline.unet_model.device.type == "cuda"
    width, height = scenario.size
    how: dict[str, Any] = {"width": width, "height": height, "fps": scenario.fps, "sound": sound}
    how |= {"codec": options.codec, "device": device, "segmented": on_gpu}
    finished: list[torch.Tensor] = []

    def compute() -> None:
        template = pipeline.generator.open_template_directory(scenario.template)
        finished.clear()
        speech = SpeechFeatures(features, scenario.mode)
        nvjpeg = pipeline.last_render is not None and pipeline.last_render.codec == "nvjpeg"
        pixel_format: PixelFormat = "bgr" if nvjpeg else "nv12"  # as in a render
        finished.extend(pipeline.generator.stream(template, speech, pixel_format=pixel_format))
        if on_gpu:
            torch.cuda.synchronize(device)

    def encode() -> None:
        with VideoWriter(folder / "encode.mp4", **how) as writer:
            for batch in finished:
                # A copy, which then belongs to the writer; by NumPy, as PyTorch's threads would spin after it.
                writer.write(batch.clone() if on_gpu else torch.from_numpy(batch.numpy().copy()))

    def render() -> None:
        pipeline.generate_video(
            features, scenario.template, sound, folder / "render.mp4", fps=scenario.fps, codec=options.codec
        )

    works: dict[str, Callable[[], None]] = {"compute": compute, "encode": encode, "render": render}
    if on_gpu:
        for work in (render, compute):  # does not count: batches of their size are tuned and captured
            work()
    else:
        shape, length = AUDIO_SHAPES[scenario.mode], template_size(scenario.template).length
        shown = len(np.unique(template_indices(0, options.frames, length)))
        image, window = torch.rand(1, 6, INPUT_SIZE, INPUT_SIZE), torch.rand(1, *shape)
        engine, place = pipeline.unet_model.engine, torch.zeros(1, dtype=torch.int64)
        kept = engine.encode(image)

        def network(frames: int = options.frames) -> None:
            def one(frame: int) -> torch.Tensor:
                return engine.decode(engine.encode(image) if frame < shown else kept, place, window)

            for _ in map_in_lanes(one, range(frames)):
                pass

        works["network"] = network
        network(2 * available_cores())  # does not count
    costs: dict[str, list[Cost]] = defaultdict(list)
    for turn in range(options.rounds):
        for name in works if turn % 2 == 0 else reversed(works):
            costs[name].append(_cost(works[name]))
            print(
                f"turn {turn + 1}: {name} {costs[name][-1].seconds:.2f} s, {costs[name][-1].cpu:.2f} s of CPU",
                flush=True,
            )
    return costs


def _cost(work: Callable[[], None]) -> Cost:
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - start, time.process_time() - cpu)


def _rows(
    costs: dict[str, list[Cost]],
    config: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """The ratios are taken within each turn."""
    ratios, least, of_encoder = [], [], []
    for compute, encode, render in zip(*(costs[name] for name in ("compute", "encode", "render")), strict=True):
        slower = max(compute.seconds, encode.seconds)
        ratios.append(render.seconds / slower)
        least.append((compute.cpu + encode.cpu) / available_cores() / slower)
        of_encoder.append(100 * encode.seconds / render.seconds)
    figures: list[tuple[str, str, str, list[float]]] = [
        (name, "throughput", "frames/s", [options.frames / cost.seconds for cost in found])
        for name, found in costs.items()
    ]
    figures += [
        (name, "cpu", "ms/frame", [1000 * cost.cpu / options.frames for cost in found]) for name, found in costs.items()
    ]
    figures += [("render", "ratio", "×", ratios), ("render", "of_encoder", "% of its speed", of_encoder)]
    if "network" in costs:
        pairs = zip(costs["network"], costs["render"], strict=True)
        shares = [100 * (1 - network.cpu / render.cpu) for network, render in pairs]
        figures += [("render", "least", "×", least), ("render", "share", "%", shares)]
    return [
        row(
            Spread.of(values),
            what="overlap",
            provider=provider,
            metric=metric,
            unit=unit,
            axis="frames",
            value=options.frames,
            config=config,
            device=device,
        )
        for provider, metric, unit, values in figures
    ]


if __name__ == "__main__":
    main()
