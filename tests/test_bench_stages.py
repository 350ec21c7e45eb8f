"""Stage by stage: what is timed, the floors beside it, and the trace."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_files import BenchFiles, write_bench_files
from conftest import MakeCheckpoint, MakeTemplate

from gpupipe.benchmarks import bench_stages, floors, kernel_bench, tracing
from gpupipe.benchmarks.common import Row, Spread
from gpupipe.benchmarks.meters import PeakMemory, resident_bytes
from gpupipe.benchmarks.scenario import Scenario, given
from gpupipe.errors import OutputError
from gpupipe.kernels.dispatch import backend, llvm_obstacle
from gpupipe.models import UNet328
from gpupipe.models.hoisted import SpeechHalf
from gpupipe.unet_model import UNetModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, make_template: MakeTemplate) -> BenchFiles:
    return write_bench_files(tmp_path_factory.mktemp("bench"), make_template)


@pytest.fixture(scope="module")
def scenario(files: BenchFiles, tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return given(*files.values(), tmp_path_factory.mktemp("scenario"), checkpoint=tiny_checkpoint())


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


def test_a_spread_in_a_unit_that_falls_as_the_other_rises() -> None:
    assert Spread(1, 2, 4, 5).map(lambda seconds: 8 / seconds) == Spread(2, 4, 8, 5)


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


# ── stages and traces ─────────────────────────────────────────────────────────────────────────────────────────────────


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
