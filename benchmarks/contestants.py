"""Ways to render a clip to a file: contestants take turns at the same clip, and what each took is measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import torch
from torch import Tensor

from gpupipe import FrameGenerationPipeline
from gpupipe.benchmarks.common import Row, Spread, row, tuned
from gpupipe.benchmarks.keeping_memory import process_keeping_memory
from gpupipe.benchmarks.meters import PeakMemory, energy_counter
from gpupipe.benchmarks.scenario import Scenario
from gpupipe.engines import Engine, EngineName, Precision
from gpupipe.engines.choice import LOWER_ON_CPU
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.models import Mode, UNet328, load_unet
from gpupipe.onnx_export import export_unet
from gpupipe.quiet_onnxruntime import onnxruntime
from gpupipe.video.codecs import X264_PRESET

if TYPE_CHECKING:  # it needs OpenCV, which is an extra
    from gpupipe.benchmarks.reference_loop import Network

WARMUP_FRAMES = 4


Render = Callable[[Path, Path, Path], dict[str, float]]
"""(features, sound, output) → seconds by stage."""

Say = Callable[[str], object]


@dataclass
class Contestant:
    """One way to render, and what was measured of it: one value for each turn.

    Attributes:
        name: the ``provider`` of its rows.
        warm_up_whole: it warms up with the whole clip, as batches of its size compile and tune for their shapes.
        load_seconds: loading the checkpoint and building the engine; not part of a render.
        facts: entries of a row's ``config`` that are about this contestant alone.
        joules: one value for each turn, where the GPU counts them.
        takes_memory_here: it renders in this process, whose memory is measured.
    """

    name: str
    load_seconds: float
    render: Render
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    warm_up_whole: bool = False
    takes_memory_here: bool = True


# ── who takes part ────────────────────────────────────────────────────────────────────────────────────────────────────


def reference_loop(scenario: Scenario, *, device: str, crf: int) -> Contestant:
    """Frame by frame on OpenCV and eager PyTorch; cuDNN tries its algorithms before anything is measured.

    Raises:
        ImportError: OpenCV is not installed.
    """
    start = time.perf_counter()
    network = load_unet(scenario.checkpoint, scenario.mode).to(device)
    made = _loop("reference_loop", scenario, network, time.perf_counter() - start, crf)
    made.render = tuned(made.render)
    return made


def reference_loop_keeping_memory(scenario: Scenario, *, crf: int) -> Contestant:
    """The same on a CPU, in a process in which glibc keeps freed memory; what it takes of that is not measured."""
    process = process_keeping_memory()
    load_seconds = process.submit(_load_seconds, scenario.checkpoint, scenario.mode).result()

    def render(*files: Path) -> dict[str, float]:
        return process.submit(_render_by_loop, scenario, crf, *files).result()

    return Contestant("reference_loop_keeping_memory", load_seconds, render, takes_memory_here=False)


@torch.inference_mode()
def _render_by_loop(scenario: Scenario, crf: int, *files: Path) -> dict[str, float]:
    return _loop("", scenario, _loaded(scenario.checkpoint, scenario.mode), 0, crf).render(*files)


def _load_seconds(checkpoint: Path, mode: Mode) -> float:
    start = time.perf_counter()
    _loaded(checkpoint, mode)
    return time.perf_counter() - start


@cache
def _loaded(checkpoint: Path, mode: Mode) -> UNet328:
    return load_unet(checkpoint, mode)


def reference_loop_onnxruntime(scenario: Scenario, folder: Path, *, device: str, crf: int) -> Contestant:
    """The same loop with the whole network in ONNX Runtime on all cores, or on CUDA where ONNX Runtime can.

    It encodes at gpupipe's preset: this is the loop as somebody who cares about speed would run it.

    Raises:
        ImportError: OpenCV is not installed.
    """
    start = time.perf_counter()
    path = export_unet(load_unet(scenario.checkpoint, scenario.mode), folder / "whole.onnx")
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()] + ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=providers)
    network = _OnnxNetwork(session, scenario.mode)
    took = time.perf_counter() - start
    made = _loop("reference_loop_onnxruntime", scenario, network, took, crf, preset=X264_PRESET)
    made.facts |= {"onnxruntime_provider": session.get_providers()[0], "preset": X264_PRESET}
    return made


class _OnnxNetwork:
    """An ONNX Runtime session in the network's place."""

    def __init__(self, session: onnxruntime.InferenceSession, mode: Mode) -> None:
        self.mode: Mode = mode
        self._session = session

    def parameters(self) -> Iterator[Tensor]:
        """An empty tensor, which only says where the inputs go."""
        yield torch.empty(0)

    def __call__(self, image: Tensor, audio: Tensor) -> Tensor:
        """As :class:`~gpupipe.models.UNet328`."""
        [mouth] = self._session.run(None, {"image": image.numpy(), "audio": audio.numpy()})
        return torch.from_numpy(mouth)


def _loop(
    name: str, scenario: Scenario, network: Network, load_seconds: float, crf: int, *, preset: str = "medium"
) -> Contestant:
    from gpupipe.benchmarks import reference_loop as loop  # noqa: PLC0415 - needs OpenCV

    def render(features: Path, sound: Path, output: Path) -> dict[str, float]:
        rows = np.load(features)
        times = loop.render(scenario.template, rows, network, sound, output, fps=scenario.fps, crf=crf, preset=preset)
        return times.seconds

    return Contestant(name, load_seconds, render)


def gpupipe(
    scenario: Scenario,
    *,
    device: str,
    crf: int,
    name: str = "gpupipe",
    exact: bool | None = None,
    engine: EngineName = "auto",
    precision: Precision | None = None,
    batch_size: int | None = None,
    stub: Callable[[torch.device, torch.dtype], Engine] | None = None,
) -> Contestant:
    """gpupipe with these options; ``exact=None`` is the device's default.

    Args:
        stub: makes an engine that stands in for the network.
    """
    start = time.perf_counter()
    pipeline = FrameGenerationPipeline(
        scenario.checkpoint,
        scenario.mode,
        device,
        exact=exact,
        engine=engine,
        precision=precision,
        batch_size=batch_size,
    )
    if stub is not None:
        model = pipeline.unet_model
        model.engine = stub(model.device, model.engine.dtype)
    facts: dict[str, Any] = {"exact": pipeline.unet_model.exact} | ({"precision": precision} if precision else {})
    if engine != "auto":
        facts["asked"] = engine
    took = time.perf_counter() - start

    def render(features: Path, sound: Path, output: Path) -> dict[str, float]:
        pipeline.generate_video(features, scenario.template, sound, output, fps=scenario.fps, crf=crf)
        record = pipeline.last_render
        assert record is not None
        facts.update(engine=record.engine, codec=record.codec, kernels=record.kernels)
        return record.phases

    return Contestant(name, took, render, facts, warm_up_whole=pipeline.unet_model.device.type == "cuda")


def lower_precisions_on_cpu(scenario: Scenario, *, device: str, crf: int) -> list[Contestant]:
    """gpupipe in less than float32, where ``device`` is a CPU with instructions for it; else nobody."""
    made = []
    for precision in LOWER_ON_CPU:
        if device != "cpu" or llvm_obstacle(getattr(torch, precision)):
            continue
        made.append(gpupipe(scenario, name=f"gpupipe_{precision}", precision=precision, device=device, crf=crf))
    return made


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of_turns(
    contestants: list[Contestant],
    rows: Callable[[], list[Row]],
    scenario: Scenario,
    folder: Path,
    *,
    frames: int,
    rounds: int,
    device: str,
    say: Say,
) -> Iterator[list[Row]]:
    """Let all render a clip that does not count, then ``rounds`` turns, each begun by another; then ``rows()``.

    An interrupt is raised again once the rows of the turns that everybody has finished are out.

    Raises:
        RuntimeError: a file lacks frames or sound: it was not rendered faster, but less.
    """
    warm, full = scenario.clip(WARMUP_FRAMES, folder), scenario.clip(frames, folder)
    output = folder / "clip.mp4"
    joules = energy_counter(device)
    try:
        for one in contestants:
            one.render(*(full if one.warm_up_whole else warm), output)
        for turn in range(rounds):
            first = turn % len(contestants)
            for one in contestants[first:] + contestants[:first]:
                take_turn(one, full, output, frames=frames, device=device, joules=joules)
                say(f"turn {turn + 1}: {one.name} {frames / one.seconds[-1]:.2f} frames/s")
    except KeyboardInterrupt:
        turns = min(len(one.stages) for one in contestants)
        for one in contestants:
            for measured in (one.seconds, one.stages, one.peak_bytes, one.joules):
                del measured[turns:]
        if turns:
            yield rows()
        raise
    yield rows()


def take_turn(
    one: Contestant,
    clip: tuple[Path, Path],
    output: Path,
    *,
    frames: int,
    device: str,
    joules: Callable[[], float] | None = None,
) -> None:
    """Measure one render; garbage of an earlier one is collected first."""
    gc.collect()
    before = joules() if joules else 0.0
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        stages = one.render(*clip, output)
        one.seconds.append(time.perf_counter() - start)
    one.stages.append(stages)
    if joules:
        one.joules.append(joules() - before)
    if memory.bytes is not None and one.takes_memory_here:
        one.peak_bytes.append(memory.bytes)
    check_clip(output, frames, one.name)


def check_clip(output: Path, frames: int, name: str) -> None:
    """Raise RuntimeError unless the file holds ``frames`` frames and one sound track that lasts about as long.

    AAC rounds the sound up to whole blocks of 1024 samples and puts another in front.
    """
    with av.open(str(output)) as container:
        written, sound = 0, 0.0
        for packet in container.demux():
            if packet.stream.type == "video":
                written += packet.size > 0
            elif packet.duration and packet.time_base:
                sound += float(packet.duration * packet.time_base)
        tracks = container.streams.audio
        frame = 1 / float(container.streams.video[0].average_rate or 25)
        allowed = frame + 2 * 1024 / tracks[0].rate if tracks else 0.0
        if written != frames or len(tracks) != 1 or abs(sound - frames * frame) > allowed:
            raise RuntimeError(
                f"{name} wrote {written} frames, {len(tracks)} sound tracks of {sound:.2f} s; "
                f"expected {frames} and 1 of {frames * frame:.2f} s"
            )


def clip_rows(
    contestants: list[Contestant],
    *,
    frames: int,
    config: dict[str, Any],
    device: str,
    axis: str = "frames",
    value: float | str | None = None,
) -> list[Row]:
    """Rows of all that was measured. Ratios are to the reference loop, if it comes first, and taken within each turn.

    Stages have rows only on the axis ``frames``: a sweep records whole renders alone.

    Args:
        axis, value: of the rows; by default the clip's length.
    """
    first = contestants[0]
    place: dict[str, Any] = {"axis": axis, "value": frames if value is None else value}
    rows = []
    for one in contestants:
        common: dict[str, Any] = {"what": "end_to_end", "provider": one.name, "device": device}
        common["config"] = config | one.facts

        def made(metric: str, unit: str, values: list[float], common: dict[str, Any] = common) -> Row:
            return row(Spread.of(values), metric=metric, unit=unit, **place, **common)

        if first.name == "reference_loop" and one is not first:
            ratios = [theirs / ours for theirs, ours in zip(first.seconds, one.seconds, strict=True)]
            rows.append(made("ratio", "×", ratios))
        rows.append(made("throughput", "frames/s", [frames / seconds for seconds in one.seconds]))
        rows.append(made("load", "s", [one.load_seconds]))
        if one.peak_bytes:
            rows.append(made("memory", "MB", [size / 1e6 for size in one.peak_bytes]))
        if one.joules:
            rows.append(made("energy", "J/frame", [joules / frames for joules in one.joules]))
        for stage in one.stages[0] if axis == "frames" else ():
            spread = Spread.of([1000 * stages[stage] / frames for stages in one.stages])
            rows.append(row(spread, metric="time", unit="ms/frame", axis="stage", value=stage, **common))
    return rows
