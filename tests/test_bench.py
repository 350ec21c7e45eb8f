"""`gpupipe bench`: what is measured is what it says, on networks so small that it takes seconds."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import write_wav
from conftest import MakeCheckpoint, MakeTemplate
from typer.testing import CliRunner

from gpupipe.benchmarks import bench, bench_stages, common, contestants, floors, kernel_bench, sweeps, tracing
from gpupipe.benchmarks.common import Row, Spread, read_rows
from gpupipe.benchmarks.keeping_memory import can_keep_memory, process_keeping_memory
from gpupipe.benchmarks.meters import PeakMemory, resident_bytes
from gpupipe.benchmarks.scenario import Scenario, add_options, from_options, given, resized_template
from gpupipe.benchmarks.tables import TABLES
from gpupipe.cli import app
from gpupipe.errors import InputError, OutputError
from gpupipe.kernels.dispatch import backend, llvm_obstacle
from gpupipe.models import UNet328
from gpupipe.models.hoisted import SpeechHalf
from gpupipe.unet_model import UNetModel

CPU = torch.device("cpu")
LOOPS = {"reference_loop", "reference_loop_keeping_memory", "reference_loop_onnxruntime"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, make_template: MakeTemplate) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    template = make_template(folder / "speaker", 3)
    np.save(folder / "features.npy", np.random.default_rng(0).random((6, 512), dtype=np.float32))
    sound = write_wav(folder / "speech.wav", np.sin(np.arange(16000) / 20) * 9000)
    return {"template": template, "audio_features": folder / "features.npy", "audio": sound}


@pytest.fixture(scope="module")
def scenario(
    files: dict[str, Path], tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Scenario:
    folder = tmp_path_factory.mktemp("scenario")
    return given(*files.values(), folder, checkpoint=tiny_checkpoint())


# ── what is compared ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(files: dict[str, Path], tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of the command, as a user starts it."""
    results = tmp_path_factory.mktemp("results")
    options = {name.replace("_", "-"): str(path) for name, path in files.items()}
    options |= {"checkpoint": str(tiny_checkpoint()), "frames": "3", "rounds": "1", "results": str(results)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_stages.FRAMES, "cpu", 2)
        patch.setattr(contestants, "WARMUP_FRAMES", 1)
        done = CliRunner().invoke(app, ["bench", *words, "--engine", "eager", "--record", "--json"])
    assert done.exit_code == 0, done.output
    return done, results


def test_the_command_measures_everybody_and_every_stage(run: Any) -> None:
    done, _ = run
    rows = json.loads(done.stdout.splitlines()[-1])
    assert all(row["error"] is None and row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    providers = {row["provider"] for row in rows if row["metric"] == "throughput"}
    assert providers == LOOPS | {"gpupipe"}
    assert {row["provider"] for row in rows if row["metric"] == "ratio"} == providers - {"reference_loop"}
    stages = [row["value"] for row in rows if row["what"] == "stage" and row["metric"] == "time"]
    halves = ["network, template half", "network, speech half"]
    assert stages == ["decode", "crop", *halves, "paste", "convert", "encode"]
    for row in rows:
        if row["metric"] == "floor_share":
            assert row["config"]["bytes"] > 0
            assert (row["config"]["operations"] > 0) == row["value"].startswith("network")


def test_recorded_rows_are_those_printed(run: Any) -> None:
    done, results = run
    printed = json.loads(done.stdout.splitlines()[-1])
    assert sorted(map(json.dumps, read_rows(results))) == sorted(map(json.dumps, printed))


def test_tables_take_the_rows_that_the_command_records(run: Any) -> None:
    _, results = run
    rows = read_rows(results)
    for row in rows:
        row["commit"] = "committed"
        row["config"]["width"] = 1  # the test's network is smaller, and some tables are for the full one
    for table in ("headline", "end_to_end", "side_by_side", "stages"):
        said = TABLES[table](rows)
        for row in rows:
            if (row["metric"], row["provider"]) == ("ratio", "gpupipe"):
                assert table == "stages" or f"**{row['p50']:.1f}×" in said, table
    recorded = {row["provider"]: row for row in read_rows() if row["what"] == "end_to_end" and row["axis"] == "frames"}
    for row in rows:
        if row["what"] == "end_to_end" and row["axis"] == "frames":
            assert row["config"].keys() - {"asked"} == recorded[row["provider"]]["config"].keys(), (
                "--compare would set nothing beside it"
            )


def test_the_commit_is_told_where_files_came_without_their_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "IN_REPOSITORY", True)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("GPUPIPE_COMMIT", raising=False)
    assert common.commit.__wrapped__() == "unknown"
    monkeypatch.setenv("GPUPIPE_COMMIT", "0123456789ab")
    assert common.commit.__wrapped__() == "0123456789ab"


def test_a_run_that_is_cut_off_leaves_what_it_has_found(
    files: dict[str, Path], tiny_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_stages.Step, "_paste", cut_off)
    monkeypatch.setitem(bench_stages.FRAMES, "cpu", 2)
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    options = bench.Options(**files, checkpoint=tiny_checkpoint(), frames=2, rounds=1, engine="eager", record=True)
    options.results = tmp_path
    with pytest.raises(KeyboardInterrupt):
        bench.run(options, print)
    assert {"reference_loop", "gpupipe"} <= {one["provider"] for one in read_rows(tmp_path)}
    assert {one["value"] for one in read_rows(tmp_path) if one["what"] == "stage"} >= {"decode", "crop"}


def test_a_run_that_is_cut_off_in_a_turn_leaves_those_before_it(
    files: dict[str, Path], tiny_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn, taken = contestants.take_turn, itertools.count(1)

    def cut_off(*given: Any, **how: Any) -> None:
        if next(taken) == 6:  # the second of four in the second turn
            raise KeyboardInterrupt
        take_turn(*given, **how)

    monkeypatch.setattr(contestants, "take_turn", cut_off)
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    options = bench.Options(**files, checkpoint=tiny_checkpoint(), frames=2, rounds=3, engine="eager", record=True)
    options.results = tmp_path
    with pytest.raises(KeyboardInterrupt):
        bench.run(options, print)
    turns = {one["provider"]: one["n"] for one in read_rows(tmp_path) if one["metric"] == "throughput"}
    assert turns == dict.fromkeys(LOOPS | {"gpupipe"}, 1)
    assert sum(one["metric"] == "ratio" for one in read_rows(tmp_path)) == 3


def faults() -> int:
    """Pages that the system gives a process for tensors that it frees at once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not can_keep_memory(), reason="it is glibc that keeps memory")
def test_memory_is_kept_in_another_process() -> None:
    with process_keeping_memory() as process:
        first, second = process.submit(faults).result(), process.submit(faults).result()
    assert 20 * second < first < faults(), "a process that keeps its memory asks for it once"
    assert "MALLOC_MMAP_MAX_" not in os.environ


def test_on_a_gpu_batches_of_the_clip_s_size_warm_up(scenario: Scenario, tmp_path: Path) -> None:
    lengths: dict[str, list[int]] = {"whole": [], "short": []}

    def contestant(name: str) -> contestants.Contestant:
        def render(features: Path, sound: Path, output: Path) -> dict[str, float]:
            lengths[name].append(len(np.load(features)))
            return loop.render(features, sound, output)

        return contestants.Contestant(name, 0, render, warm_up_whole=name == "whole")

    loop = contestants.gpupipe(scenario, device="cpu", crf=20, engine="eager")
    made = [contestant("whole"), contestant("short")]
    how: dict[str, Any] = {"frames": 6, "rounds": 1, "device": "cpu", "say": lambda told: None}
    list(contestants.rows_of_turns(made, list, scenario, tmp_path, **how))
    assert lengths == {"whole": [6, 6], "short": [contestants.WARMUP_FRAMES, 6]}


def test_ratios_are_taken_within_a_turn() -> None:
    slow = contestants.Contestant("reference_loop", 0, lambda *_: {}, seconds=[10, 40], stages=[{}, {}])
    fast = contestants.Contestant("gpupipe", 0, lambda *_: {}, seconds=[5, 10], stages=[{}, {}])
    rows = contestants.clip_rows([slow, fast], frames=10, config={}, device="cpu")
    [ratio] = [row for row in rows if row.metric == "ratio"]
    assert (ratio.p20, ratio.p50, ratio.p80) == pytest.approx((2.4, 3, 3.6))  # of 2 and 4


@pytest.mark.parametrize(
    ("features", "sound", "told"),
    [
        (3, 10, r"3 frames, 1 sound tracks of 0\.\d\d s; expected 10 and 1 of 0\.40 s"),
        (10, 1, r"10 frames, 1 sound tracks of 0\.1\d s; expected 10 and 1 of 0\.40 s"),
    ],
    ids=["frames", "sound"],
)
def test_a_file_that_lacks_frames_or_sound_is_no_result(
    features: int, sound: int, told: str, scenario: Scenario, tmp_path: Path
) -> None:
    one = contestants.gpupipe(scenario, device="cpu", crf=30, engine="eager")
    honest = one.render
    short = scenario.clip(features, tmp_path)[0], scenario.clip(sound, tmp_path)[1]
    one.render = lambda features, sound, output: honest(*short, output)
    with pytest.raises(RuntimeError, match=f"^gpupipe wrote {told}"):
        next(contestants.rows_of_turns([one], list, scenario, tmp_path, frames=10, rounds=1, device="cpu", say=print))


def test_features_and_sound_come_round_again(scenario: Scenario, tmp_path: Path) -> None:
    features, sound = scenario.clip(15, tmp_path)
    rows = np.load(features)
    assert len(rows) == 15
    assert np.array_equal(rows[6:12], np.load(scenario.features))
    assert sound.stat().st_size == 44 + 2 * 16000 * 15 // 25


@pytest.mark.parametrize(
    "options",
    [{"template": Path("x")}, {"audio": Path("x")}, {"width": 0.5}, {"frames": 0}, {"rounds": 0}, {"values": [1]}],
    ids=["template alone", "sound alone", "width without template", "no frames", "no rounds", "values of no sweep"],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        bench.run(bench.Options(**options), print)


def test_one_file_of_a_template_is_not_taken_for_the_bundled_avatar(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(InputError, match="expected --template, --audio-features and --audio together"):
        from_options(parser.parse_args(["--audio", "speech.wav"]), tmp_path)


@pytest.mark.parametrize("text", ["a", "0", "1,-2", "1.5"])
def test_values_are_whole_numbers(text: str) -> None:
    assert bench.whole_numbers("1, 8,64") == [1, 8, 64]
    with pytest.raises(InputError, match="whole numbers"):
        bench.whole_numbers(text)


def test_without_opencv_the_loop_is_left_out_with_a_message(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "stage_rows", lambda *_, **__: [])
    said: list[str] = []
    options = bench.Options(frames=2, rounds=1, engine="eager")
    rows = list(itertools.chain.from_iterable(bench._side_by_side(scenario, options, tmp_path, "cpu", said.append)))
    assert bench.NO_OPENCV in said
    assert [row.error for row in rows if row.provider == "reference_loop"] == [bench.NO_OPENCV]
    assert not bench.Report(rows).failed, "what is not installed is no failure"
    assert any(row.provider == "gpupipe" and row.metric == "throughput" for row in rows)
    assert all(row.metric != "ratio" for row in rows), "there is nothing to compare with"


# ── floors and meters ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_operations_are_twice_the_multiply_adds() -> None:
    layer = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert floors.operations_of(layer, torch.zeros(1, 3, 10, 20)) == 2 * 8 * 3 * 9 * 10 * 20


def test_the_speech_half_has_the_operations_it_is_said_to_have() -> None:
    network = UNet328(width=1.0).eval()
    (_, template), (moved, speech) = bench_stages.network_costs(network, torch.float32)
    assert speech / 2 == pytest.approx(2.68e9, rel=0.01)  # models/hoisted.py
    assert (speech + template) / 2 == pytest.approx(3.82e9, rel=0.01)
    weights = sum(one.numel() for one in SpeechHalf(network).parameters())
    assert moved > 4 * weights


def test_a_floor_is_the_larger_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(floors, "arithmetic_rate", lambda device, dtype: 1e12)
    assert floors.Floor.of(2_000_000, 10**9, CPU, torch.float32) == floors.Floor(0.002, "bytes")
    assert floors.Floor.of(2_000_000, 4 * 10**9, CPU, torch.float32) == floors.Floor(0.004, "operations")
    assert floors.Floor.of(2_000_000, 0, CPU, torch.float32) == floors.Floor(0.002, "bytes")


@pytest.mark.skipif(resident_bytes() is None, reason="resident memory is read from /proc")
def test_peak_memory_sees_what_is_gone_at_the_end() -> None:
    before = resident_bytes()
    assert before is not None
    with PeakMemory() as memory:
        block = np.ones(200_000_000, dtype=np.uint8)
        time.sleep(0.1)
        del block
        time.sleep(0.1)
    assert memory.bytes is not None
    assert memory.bytes - before > 150_000_000


@pytest.mark.skipif(resident_bytes() is None, reason="resident memory is read from /proc")
def test_resident_memory_is_linux_s() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    [told] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")]
    assert resident_bytes() == pytest.approx(told, rel=0.05)


@pytest.fixture
def a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run."""
    for module in (floors, kernel_bench):
        monkeypatch.setattr(module, "seconds_of", lambda *_, **__: Spread.of([1.0]))


@pytest.mark.usefixtures("a_second_each")
def test_rates_are_bytes_read_and_written_and_twice_the_multiply_adds() -> None:
    assert kernel_bench.copy_bandwidth.__wrapped__(CPU) == 2 * 2**29
    assert floors.arithmetic_rate.__wrapped__(CPU, torch.float64) == 2 * 1024**3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_multiply_adds_are_all_done_and_counted(dtype: torch.dtype) -> None:
    if reason := llvm_obstacle(dtype):
        pytest.skip(f"LLVM kernels do not run here in {dtype}: {reason}")
    from gpupipe.benchmarks import peak_llvm
    from gpupipe.kernels.common_llvm import this_processor
    from gpupipe.kernels.kernel_llvm import Kernel

    processor, chains, rounds = this_processor(dtype), 3, 5
    products = 2 if dtype == torch.bfloat16 else 1  # of a sum, in one instruction
    sums = torch.arange(1.0, 1 + chains).repeat_interleave(processor.lanes).to(processor.sums)
    factors = torch.cat([torch.full((processor.lanes * products,), value).to(dtype) for value in (2.0, 3.0)])
    memory = torch.cat([sums.view(torch.uint8), factors.view(torch.uint8)])
    Kernel(peak_llvm._Plan(chains, rounds), None, processor)([memory])
    assert torch.equal(memory.view(processor.sums)[: len(sums)], sums + 6 * products * rounds)
    many = peak_llvm._Plan(processor.registers - 4)
    assert peak_llvm.MultiplyAdds(dtype).operations == 2 * products * processor.lanes * many.chains * many.rounds


def test_the_machine_s_rows_are_told_in_thousands_of_millions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "copy_bandwidth", lambda device: 2e9)
    monkeypatch.setattr(floors, "arithmetic_rate", lambda device, dtype: 3e9)
    rows = floors.machine_rows(CPU, torch.float32)
    assert [(row.p50, row.unit) for row in rows] == [(2, "GB/s"), (3, "Gop/s")]


# ── what is timed on a GPU ────────────────────────────────────────────────────────────────────────────────────────────

GPU = torch.device("cuda")


@pytest.mark.cuda
def test_calls_are_replayed_and_not_launched_one_by_one() -> None:
    calls, values = [], torch.ones(3, device=GPU)

    def double() -> torch.Tensor:
        calls.append(1)
        return values * 2

    assert kernel_bench.seconds_of(double, GPU, rounds=100).n == 100
    assert len(calls) < 100


@pytest.mark.cuda
def test_what_asks_the_host_is_timed_as_it_is() -> None:
    calls, values = [], torch.ones(3, device=GPU)

    def total() -> float:
        calls.append(1)
        return float(values.sum())

    assert kernel_bench.seconds_of(total, GPU, rounds=100).n == 100
    assert len(calls) > 100


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_stages_do_not_wait_for_the_gpu(scenario: Scenario, tmp_path: Path) -> None:
    with torch.inference_mode():
        step = bench_stages.Step(scenario, UNetModel(scenario.checkpoint, device=GPU, engine="eager"), tmp_path, 2)
        plain = {"crop", "paste", "convert"} if backend(GPU) == "torch" else set()  # which ask the host
        every = torch.arange(2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for stage in step.stages:
                if stage.where == "lanes" and stage.name not in plain:
                    stage.run(every)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ── sweeps and traces ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_clip_of_the_stub_has_its_length(scenario: Scenario, tmp_path: Path) -> None:
    how: dict[str, Any] = {"device": "cpu", "crf": 30, "rounds": 1, "say": print}
    [rows] = sweeps.length_rows(scenario, tmp_path, values=[2], **how)
    told = {row.metric: row for row in rows}
    assert told["throughput"].value == 2 and told["throughput"].config["network"] == "stub"
    assert told["time"].p50 == pytest.approx(1000 / told["throughput"].p50)


def test_a_sweep_that_is_cut_off_leaves_the_sizes_before_it(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn, taken = contestants.take_turn, itertools.count(1)

    def cut_off(*given: Any, **how: Any) -> None:
        if next(taken) == 2:
            raise KeyboardInterrupt
        take_turn(*given, **how)

    monkeypatch.setattr(contestants, "take_turn", cut_off)
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    how: dict[str, Any] = {"device": "cpu", "crf": 30, "frames": 2, "rounds": 1, "say": print, "reference": False}
    rows = sweeps.resolution_rows(scenario, tmp_path, values=[360, 720], **how)
    assert {row.value for row in next(rows)} == {"640×360"}
    with pytest.raises(KeyboardInterrupt):
        next(rows)


def test_a_template_is_resized_with_its_landmarks(files: dict[str, Path], tmp_path: Path) -> None:
    from gpupipe.template import Template

    before = Template.from_directory(files["template"])
    folder = resized_template(files["template"], tmp_path / "large", (384, 256), 2)
    after = Template.from_directory(folder)
    assert (after.width, after.height, after.length) == (384, 256, 2)
    assert torch.equal(after.boxes, 2 * before.boxes[:2])


def test_a_stage_of_many_laps_is_timed_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    stage = bench_stages.Stage("encode", "frame", lambda index: seen.append(len(index)), "host", 0, laps=3)
    monkeypatch.setattr(bench_stages, "measure", lambda run, **_: (run(), Spread.of([6.0]))[1])
    assert bench_stages.seconds_a_frame(stage, 4, torch.device("cpu"), rounds=1).p50 == 0.5
    assert seen == [12]


def test_a_trace_may_be_compressed(tmp_path: Path) -> None:
    step: Any = SimpleNamespace(device=torch.device("cpu"), frames=range(2), stages=[])
    tracing.write_trace(step, tmp_path / "trace.json.gz")
    assert "traceEvents" in json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))


def test_a_trace_names_every_stage(scenario: Scenario, tmp_path: Path) -> None:
    model = UNetModel(scenario.checkpoint, device="cpu", engine="eager")
    with torch.inference_mode():
        step = bench_stages.Step(scenario, model, tmp_path, frames=2)
        table = tracing.write_trace(step, tmp_path / "trace.json")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    stages = {stage.name for stage in step.stages}
    assert stages <= names
    assert "step 2" in names
    assert "decode" in table


@pytest.mark.parametrize("written", ["", '{"traceEvents": [\n  {"ph": "X"},\n'])
def test_a_trace_that_is_not_whole_replaces_none(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's profiler only logs that there was no room, and leaves a file of its own."""

    def export(self: Any, path: str) -> None:
        Path(path).write_text(written)
        Path(f"{path}.tmp").write_text("{")

    monkeypatch.setattr(tracing.profile, "export_chrome_trace", export)
    step: Any = SimpleNamespace(device=torch.device("cpu"), frames=range(2), stages=[])
    trace = tmp_path / "trace.json"
    trace.write_text("{}")
    with pytest.raises(OutputError, match=f"^{trace}: cannot be written: .* expected room on the disk"):
        tracing.write_trace(step, trace)
    assert trace.read_text() == "{}" and list(tmp_path.iterdir()) == [trace]


def test_a_stage_that_fails_is_a_row_and_the_next_still_runs(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(bench_stages.FRAMES, "cpu", 2)
    monkeypatch.setattr(bench_stages.Step, "_paste", fail)
    made = bench_stages.stage_rows(scenario, tmp_path, device="cpu", engine="eager", rounds=1)
    rows: list[Row] = list(itertools.chain.from_iterable(made))
    errors = {row.value: row.error for row in rows if row.error}
    assert errors == {"paste": "RuntimeError: no such kernel"}
    assert any(row.value == "encode" and row.p50 for row in rows)


# ── what a sweep and a scenario are given ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sweep", ["batch", "resolution"])
def test_a_sweep_takes_the_engine_that_is_asked_for(
    sweep: bench.Sweep, files: dict[str, Path], tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    monkeypatch.setattr(sweeps, "RESOLUTIONS", ((256, 144),))
    options = bench.Options(**files, checkpoint=tiny_checkpoint(), frames=2, rounds=1, engine="eager", sweep=sweep)
    options.values = [1 if sweep == "batch" else 144]
    rows = bench.run(options, print).rows
    assert {row.config["asked"] for row in rows if row.provider == "gpupipe"} == {"eager"}


def test_a_height_that_no_size_has_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    how: dict[str, Any] = {"device": "cpu", "crf": 30, "frames": 2, "rounds": 1, "say": print, "reference": False}
    with pytest.raises(InputError, match="heights are 360, 700; expected some of 360, 720, 1080, 2160"):
        next(sweeps.resolution_rows(scenario, tmp_path, values=[360, 700], **how))


def test_a_template_that_is_a_video_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "template.mp4").touch()
    with pytest.raises(InputError, match=f"^{tmp_path}: holds template.mp4; expected full_body_img/"):
        given(tmp_path, files["audio_features"], files["audio"], tmp_path)


@pytest.mark.parametrize("width", [0.3, 0, float("nan")])
def test_a_width_that_no_network_has_is_refused(width: float, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"width is {width}; expected a positive multiple of 1/8"):
        given(*files.values(), tmp_path, width=width)


def test_sound_may_have_a_colon_in_its_name_and_any_number_of_channels(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sound = write_wav(Path("12:30.wav"), np.full((16000, 9), 1000))
    _, clip = replace(scenario, audio=sound).clip(25, tmp_path)
    assert np.array_equal(np.frombuffer(clip.read_bytes()[44:], "<i2"), np.full(16000, 1000))


def test_sound_is_looked_for_before_anything_is_measured(files: dict[str, Path], tmp_path: Path) -> None:
    with av.open(str(tmp_path / "silent.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        video.mux([*stream.encode(av.VideoFrame(64, 64, "yuv420p")), *stream.encode(None)])
    with pytest.raises(InputError, match=r"silent\.mp4: has no sound track"):
        given(files["template"], files["audio_features"], tmp_path / "silent.mp4", tmp_path)
