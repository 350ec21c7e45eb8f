"""`gpupipe bench`: this machine's figures, end to end and stage by stage, beside the reference loop and the limits.

A run has two parts. First the reference loop, the same loop on ONNX Runtime and gpupipe take turns at rendering the
same clip to a file (:mod:`gpupipe.benchmarks.contestants`). Then each of gpupipe's stages runs by itself, beside its
floor (:mod:`gpupipe.benchmarks.bench_stages`). ``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpupipe.benchmarks import contestants, guard, sweeps, tracing
from gpupipe.benchmarks.bench_stages import Step, stage_rows
from gpupipe.benchmarks.common import RESULTS, Row, append_rows, commit, device_name, read_rows, row, versions
from gpupipe.benchmarks.contestants import Contestant, Say
from gpupipe.benchmarks.keeping_memory import can_keep_memory
from gpupipe.benchmarks.scenario import Scenario, chosen
from gpupipe.device import find_device
from gpupipe.engines import EngineName
from gpupipe.errors import InputError
from gpupipe.files import check_writable, make_folder
from gpupipe.kernels.dispatch import backend
from gpupipe.models import Mode
from gpupipe.unet_model import UNetModel

Sweep = Literal["batch", "resolution", "length"]

NO_OPENCV = "OpenCV is missing (pip install 'gpupipe[reference]'): the reference loop is left out"


@dataclass
class Options:
    """What the command was asked for; see ``gpupipe bench --help``."""

    template: Path | None = None
    audio_features: Path | None = None
    audio: Path | None = None
    checkpoint: Path | None = None
    mode: Mode = "ave"
    width: float = 1.0
    device: str | None = None
    engine: EngineName = "auto"
    frames: int = 100
    rounds: int = 3
    crf: int = 20
    sweep: Sweep | None = None
    values: list[int] = field(default_factory=list)
    results: Path = RESULTS
    record: bool = False
    compare: bool = False
    profile: Path | None = None
    ncu_friendly: bool = False


@dataclass
class Report:
    """What a run found.

    Attributes:
        verdicts: one for each row that could be compared; none without ``compare``.
    """

    rows: list[Row]
    verdicts: list[guard.Verdict] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Something could not be measured, though all that it takes is there, or became slower."""
        return any(one.error not in (None, NO_OPENCV) for one in self.rows) or any(one.worse for one in self.verdicts)


def run(options: Options, say: Say) -> Report:
    """Measure what is asked for, and record it if asked to: part by part, so that an interrupted run keeps what it has.

    Raises:
        InputError: input or options that cannot be used.
        DeviceError: a device or engine that is not there.
    """
    _check(options)
    if options.record:
        check_writable(make_folder(options.results) / "rows.jsonl")
    device = str(find_device(options.device))
    with tempfile.TemporaryDirectory(prefix="gpupipe-bench-") as name, torch.inference_mode():
        folder = Path(name)
        files = options.template, options.audio_features, options.audio, folder
        scenario = chosen(*files, checkpoint=options.checkpoint, mode=options.mode, width=options.width)
        say(f"{device_name(device)}, commit {commit()}")
        say(", ".join(f"{name} {value}" for name, value in scenario.facts().items()))
        if options.profile or options.ncu_friendly:
            _look_into(scenario, options, folder, device, say)
            return Report([])
        earlier = read_rows(options.results) if options.compare else []
        report = Report([])
        paths: set[Path] = set()
        for rows in (_sweep if options.sweep else _side_by_side)(scenario, options, folder, device, say):
            report.rows += rows
            if options.record:
                paths.update(append_rows(rows, options.results))
    if options.compare:
        report.verdicts = guard.compare(report.rows, earlier, guard.is_ancestor)
        if not report.verdicts:
            say("nothing recorded of an earlier commit on this device can be compared with this run")
    for path in sorted(paths):
        say(f"recorded in {path}")
    return report


def whole_numbers(text: str) -> list[int]:
    """``"1,8,64"`` → [1, 8, 64].

    Raises:
        InputError: anything else than whole numbers from 1 on.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"values are {text!r}; expected whole numbers from 1 on, as 1,8,64")
    return [int(word) for word in words]


def _check(options: Options) -> None:
    if options.template is None and (options.checkpoint or options.width != 1 or options.mode != "ave"):
        raise InputError("--checkpoint, --width and --mode go with a template of your own; expected --template too")
    if options.frames < 1 or options.rounds < 1:
        raise InputError(f"--frames {options.frames} --rounds {options.rounds}: expected 1 or more of each")
    if options.values and options.sweep is None:
        raise InputError("--values are those of a sweep; expected --sweep batch, resolution or length too")


def _side_by_side(scenario: Scenario, options: Options, folder: Path, device: str, say: Say) -> Iterator[list[Row]]:
    how: dict[str, Any] = {"device": device, "crf": options.crf}
    config = scenario.facts() | {"crf": options.crf, "rounds": options.rounds}
    made: list[Contestant] = []
    rows: list[Row] = []
    if importlib.util.find_spec("cv2") is not None:
        made.append(contestants.reference_loop(scenario, **how))
        if device == "cpu" and can_keep_memory():
            made.append(contestants.reference_loop_keeping_memory(scenario, crf=options.crf))
        made.append(contestants.reference_loop_onnxruntime(scenario, folder, **how))
    else:
        say(NO_OPENCV)
        place: dict[str, Any] = {"what": "end_to_end", "axis": "frames", "value": options.frames}
        place |= {"provider": "reference_loop", "metric": "throughput", "unit": "frames/s"}
        rows.append(row(None, config=config, device=device, error=NO_OPENCV, **place))
    if device.startswith("cuda"):
        made.append(contestants.gpupipe(scenario, name="gpupipe_exact", exact=True, engine="eager", **how))
    made.append(contestants.gpupipe(scenario, engine=options.engine, **how))
    if options.engine == "auto":
        made += contestants.lower_precisions_on_cpu(scenario, **how)
    size: dict[str, Any] = {"frames": options.frames, "rounds": options.rounds, "device": device}
    told: dict[str, Any] = {"frames": options.frames, "config": config, "device": device}

    def clips() -> list[Row]:
        return rows + contestants.clip_rows(made, **told)

    yield from contestants.rows_of_turns(made, clips, scenario, folder, say=say, **size)
    yield from stage_rows(scenario, folder, device=device, engine=options.engine, rounds=options.rounds, say=say)


def _sweep(scenario: Scenario, options: Options, folder: Path, device: str, say: Say) -> Iterator[list[Row]]:
    how: dict[str, Any] = {"device": device, "crf": options.crf, "rounds": options.rounds, "values": options.values}
    how["say"] = say
    if options.sweep == "batch":
        yield from sweeps.batch_rows(scenario, folder, frames=options.frames, engine=options.engine, **how)
    elif options.sweep == "length":
        yield from sweeps.length_rows(scenario, folder, **how)
    else:
        reference = importlib.util.find_spec("cv2") is not None
        if not reference:
            say(NO_OPENCV)
        how |= {"frames": options.frames, "engine": options.engine, "reference": reference}
        yield from sweeps.resolution_rows(scenario, folder, **how)


def _look_into(scenario: Scenario, options: Options, folder: Path, device: str, say: Say) -> None:
    # A kernel profiler should see the step, not the search for an engine before it.
    engine = options.engine
    if options.ncu_friendly and engine == "auto":
        engine = "fused" if backend(device) == "triton" else "eager"
    model = UNetModel(scenario.checkpoint, scenario.mode, device, engine=engine)
    step = Step(scenario, model, folder)
    if options.ncu_friendly:
        tracing.run_bare_step(step)
        say(f"one step of {len(step.frames)} frames in engine {model.engine.name} is done")
    if options.profile:
        say(tracing.write_trace(step, options.profile))
        say(f"{options.profile}: trace of {tracing.STEPS} steps of {len(step.frames)} frames")


# ── printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(report: Report, console: Console) -> None:
    """Print the tables of a run."""
    clips = [one for one in report.rows if one.what == "end_to_end" and one.axis != "stage"]
    if clips:
        console.print(_clip_table(clips))
    stages = [one for one in report.rows if one.what == "stage"]
    if stages:
        console.print(_stage_table(stages))
        ceilings = [f"{one.p50:.4g} {one.unit} ({one.value})" for one in report.rows if one.what == "machine"]
        console.print(f"floors: bytes over {ceilings[0]}, operations over {ceilings[1]}, both measured here just now")
    for verdict in report.verdicts:
        console.print(str(verdict), highlight=False, soft_wrap=True)
    if report.rows:
        packages = ", ".join(f"{name} {version}" for name, version in versions().items())
        console.print(packages, style="dim", highlight=False, soft_wrap=True)


def _clip_table(rows: list[Row]) -> Table:
    """A line for each contestant and place on the axis."""
    table = Table(title=f"end to end to a file, by {rows[0].axis}; median (p20–p80)", title_justify="left")
    metrics = ("throughput", "ratio", "time", "memory", "energy", "load")
    units = {one.metric: one.unit for one in rows}
    shown = [metric for metric in metrics if metric in units]
    for name in (rows[0].axis, "who", *(f"{metric}, {units[metric]}" for metric in shown)):
        table.add_column(name)
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for one in rows:
        lines.setdefault((str(one.value), one.provider), {})[one.metric] = one
    for (value, provider), found in lines.items():
        table.add_row(value, provider, *(_cell(found.get(metric)) for metric in shown))
    return table


def _stage_table(rows: list[Row]) -> Table:
    table = Table(title="stage by stage", title_justify="left")
    for name in ("stage", "once a", "ms", "floor, ms", "set by", "% of floor"):
        table.add_column(name)
    lines: dict[str, dict[str, Row]] = {}
    for one in rows:
        lines.setdefault(str(one.value), {})[one.metric] = one
    for stage, found in lines.items():
        config = found["time"].config
        floor = f"{config['floor_ms']:.3f}"
        cells = _cell(found["time"]), floor, config["floor_by"], _cell(found.get("floor_share"))
        table.add_row(stage, config["once"], *cells)
    return table


def _cell(one: Row | None) -> str:
    if one is None:
        return ""
    if one.p50 is None:
        return escape(f"failed: {one.error}")
    spread = f" ({one.p20:.3g}–{one.p80:.3g})" if one.n > 1 else ""
    return f"{one.p50:.4g}{spread}"
