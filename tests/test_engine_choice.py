"""How `auto` chooses an engine: what is measured, what is remembered, and which engines are not taken."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import (
    Engine,
    EngineName,
    choice,
    gluon,
    make_engine,
    measure,
    remembered,
)
from gpupipe.engines.base import Declaration
from gpupipe.engines.declared import DECLARED
from gpupipe.engines.eager import EagerEngine
from gpupipe.errors import DeviceError, DeviceLostError
from gpupipe.fallbacks import fallbacks
from gpupipe.kernels import dispatch
from gpupipe.models import UNet328
from gpupipe.quiet_onnxruntime import onnxruntime
from gpupipe.versions import versions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> UNet328:
    return seeded_network(width=1 / 8)


@pytest.fixture(autouse=True)
def two_engines() -> Iterator[None]:
    """As on a CPU without what `llvm` needs: two to choose from are enough. The order of all is restored."""
    declared = DECLARED.copy()
    del DECLARED["llvm"]
    yield
    DECLARED.clear()
    DECLARED.update(declared)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """Engines "take" the seconds that a test enters here; others fail. Nothing is built, no figures are remembered."""
    seconds: dict[str, float] = {}

    def take(engine: Engine, network: object) -> float:
        if engine.name not in seconds:
            raise RuntimeError(f"{engine.name} is out of order\nand says more")
        return seconds[engine.name]

    def build(one: Declaration, network: object, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(name=one.name, device=device, dtype=dtype)

    monkeypatch.setattr(measure, "_seconds", take)
    monkeypatch.setattr(measure, "_levels", lambda engine, network: torch.zeros(1, 3, 20, 20))
    monkeypatch.setattr(Declaration, "build", build)
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path / "cache"))
    return seconds


def test_auto_takes_the_fastest(network: UNet328, timed: dict[str, float]) -> None:
    timed.update(onnxruntime=0.2, eager=0.1)
    assert make_engine(network, device=CPU).name == "eager"


def test_auto_says_that_it_measures(
    network: UNet328, timed: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    timed.update(onnxruntime=0.2, eager=0.1)
    with caplog.at_level("INFO", "gpupipe"):
        for _ in range(2):
            make_engine(network, device=CPU)
    said = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert said == ["engine: measuring onnxruntime and eager on cpu, once for this kind of network"]


def test_auto_remembers_for_the_same_kind_of_network(network: UNet328, timed: dict[str, float]) -> None:
    timed.update(onnxruntime=0.2, eager=0.1)
    make_engine(network, device=CPU)
    timed.update(onnxruntime=0.05)
    assert make_engine(network, device=CPU).name == "eager", "by the remembered figures"
    assert make_engine(seeded_network(width=1 / 4), device=CPU).name == "onnxruntime", "another shape is measured"
    assert make_engine(seeded_network("wenet", width=1 / 8), device=CPU).name == "onnxruntime"
    assert make_engine(network, device=CPU).name == "eager", "nor was it forgotten for the others"


@pytest.mark.usefixtures("timed")
def test_figures_of_one_precision_leave_another_s_alone(network: UNet328) -> None:
    figures = {"onnxruntime": 50.0, "eager": 100.0}
    remembered.remember(network, CPU, torch.float32, figures)
    remembered.remember(network, CPU, torch.bfloat16, {"eager": 50.0, "llvm": 10.0})
    assert remembered.recall(network, CPU, torch.float32) == figures


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("device_name", lambda device: "another CPU"),
        ("versions", lambda: versions() | {"gpupipe": "0"}),
        ("versions", lambda: versions() | {"torch": "0"}),
        ("versions", lambda: versions() | {"llvmlite": "0"}),
        ("versions", lambda: versions() | {"onnxruntime": "0"}),
        ("BATCH_SIZES", {"cpu": 2}),
    ],
    ids=["device", "gpupipe", "torch", "llvmlite", "onnxruntime", "batch"],
)
def test_auto_measures_again_on_another_machine(
    network: UNet328, name: str, other: object, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed.update(onnxruntime=0.2, eager=0.1)
    make_engine(network, device=CPU)
    timed.update(onnxruntime=0.05)
    monkeypatch.setattr(remembered, name, other)
    assert make_engine(network, device=CPU).name == "onnxruntime"


@pytest.mark.usefixtures("timed")
def test_figures_of_a_gpu_are_those_of_its_triton(network: UNet328, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(remembered, "device_name", lambda device: "a GPU")
    remembered.remember(network, gpu, torch.float32, {"eager": 3.0})
    assert remembered.recall(network, gpu, torch.float32) == {"eager": 3.0}
    monkeypatch.setattr(remembered, "versions", lambda: versions() | {"onnxruntime": "0"})
    assert remembered.recall(network, gpu, torch.float32) == {"eager": 3.0}, "which has no part in it"
    monkeypatch.setattr(remembered, "versions", lambda: versions() | {"triton": "0"})
    assert remembered.recall(network, gpu, torch.float32) is None


@pytest.mark.usefixtures("timed")
def test_figures_that_hardly_differ_are_told_apart(network: UNet328) -> None:
    """A tiny network takes microseconds on a GPU."""
    figures = {"onnxruntime": 0.0123, "eager": 0.0122}
    remembered.remember(network, CPU, torch.float32, figures)
    assert remembered.recall(network, CPU, torch.float32) == figures


def test_auto_measures_again_what_it_cannot_read(network: UNet328, timed: dict[str, float]) -> None:
    timed.update(onnxruntime=0.1, eager=0.2)
    odd = ({"eager": "fast", "onnxruntime": 1.0}, ["eager", "onnxruntime"], "eager onnxruntime", None)
    key = remembered._key(network, CPU, torch.float32)
    for damage in ("", "[]", '{"x": ', *(json.dumps({key: figures}) for figures in odd)):
        remembered.cache_file().parent.mkdir(exist_ok=True)
        remembered.cache_file().write_text(damage)
        assert make_engine(network, device=CPU).name == "onnxruntime"
        assert remembered.recall(network, CPU, torch.float32) == {"onnxruntime": 100.0, "eager": 200.0}


def test_auto_measures_again_where_an_engine_s_figure_is_missing(network: UNet328, timed: dict[str, float]) -> None:
    remembered.remember(network, CPU, torch.float32, {"eager": 200.0})
    timed.update(onnxruntime=0.1, eager=0.2)
    assert make_engine(network, device=CPU).name == "onnxruntime"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "home/.cache/gpupipe"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/gpupipe"),
        ({"GPUPIPE_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"GPUPIPE_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/gpupipe"),
    ],
)
def test_figures_are_kept_where_caches_are(
    given: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name in ("GPUPIPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in given.items():
        monkeypatch.setenv(name, folder and str(tmp_path / folder))
    assert remembered.cache_file() == tmp_path / expected / "engines.json"


@pytest.mark.parametrize("in_the_way", ["a file for the folder", "a folder for the file"])
def test_auto_works_where_nothing_can_be_remembered(
    network: UNet328, in_the_way: str, timed: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if in_the_way == "a file for the folder":
        (tmp_path / "cache").write_text("")
    else:
        remembered.cache_file().mkdir(parents=True)
    timed.update(onnxruntime=0.1, eager=0.2)
    assert make_engine(network, device=CPU).name == "onnxruntime"
    assert f"{tmp_path / 'cache'}" in caplog.text
    assert "; engines are measured again next time" in caplog.text


def test_a_failing_engine_is_logged_and_not_taken(
    network: UNet328, timed: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    timed.update(eager=0.3)
    assert make_engine(network, device=CPU).name == "eager"
    assert "engine onnxruntime: onnxruntime is out of order: eager runs instead" in caplog.text
    assert fallbacks() == ["engine onnxruntime: onnxruntime is out of order: eager runs instead"]
    assert make_engine(network, device=CPU).name == "eager", "and so it is remembered"
    told = f"engine onnxruntime failed when it was measured ({remembered.cache_file()} tells): eager runs instead"
    assert told in fallbacks(), "and logged again"


def no_memory_on_a_cpu() -> Exception:
    """PyTorch has no type for it."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "reason",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        no_memory_on_a_cpu(),
        onnxruntime.capi.onnxruntime_pybind11_state.Fail("Failed to allocate memory for requested buffer of size 8"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(24, "Too many open files"),
    ],
    ids=["CUDA", "Python", "CPU", "ONNX Runtime", "CUDA's library", "cuBLAS", "C++", "files"],
)
def test_an_engine_that_found_no_memory_is_measured_again(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch, reason: Exception
) -> None:
    """Another program may have held it."""
    timed.update(onnxruntime=0.1, eager=0.2)
    take = measure._seconds

    def fail(engine: Engine, network: UNet328) -> float:
        if engine.name == "onnxruntime":
            raise reason
        return take(engine, network)

    monkeypatch.setattr(measure, "_seconds", fail)
    assert make_engine(network, device=CPU).name == "eager"
    monkeypatch.setattr(measure, "_seconds", take)
    assert make_engine(network, device=CPU).name == "onnxruntime"


def test_an_engine_that_paints_something_else_is_asked_again(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be this checkpoint's weights, which are not measured with the next."""
    timed.update(onnxruntime=0.1, eager=0.2)
    same = measure._levels
    monkeypatch.setattr(
        measure, "_levels", lambda engine, _: torch.full((1, 3, 20, 20), {"onnxruntime": 9.0}.get(engine.name, 0.0))
    )
    assert make_engine(network, device=CPU).name == "eager"
    monkeypatch.setattr(measure, "_levels", same)
    assert make_engine(network, device=CPU).name == "onnxruntime"


def test_a_cpu_s_engines_are_measured_on_one_core_as_they_render(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed.update(onnxruntime=0.1, eager=0.2)
    build, take, threads = Declaration.build, measure._seconds, []

    def count(*given: Any) -> Any:
        threads.append(torch.get_num_threads())
        return build(*given) if len(given) > 2 else take(*given)

    monkeypatch.setattr(Declaration, "build", count)
    monkeypatch.setattr(measure, "_seconds", count)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_engine(network, device=CPU)
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1] * 2


def test_one_engine_alone_is_not_measured(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU in float32, whose memory may be too small for the batch that engines are measured with."""
    monkeypatch.setattr(remembered, "device_name", lambda device: "a GPU")
    assert make_engine(network, device=torch.device("cuda"), exact=True).name == "eager"
    assert not remembered.cache_file().exists()
    remembered.remember(network, torch.device("cuda"), torch.float32, {"eager": 3.0, "compile": 2.0})
    assert make_engine(network, device=torch.device("cuda"), exact=True).name == "compile", "asked for by doctor"


def test_an_obstacle_is_logged_and_checked_again_each_time(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a compiler that is missing, then installed, then removed."""
    timed.update(onnxruntime=0.1, eager=0.2)
    as_it_is = DECLARED["onnxruntime"]
    for reason, taken in (("it rains", "eager"), (None, "onnxruntime"), ("it rains again", "eager")):
        monkeypatch.setitem(
            DECLARED, "onnxruntime", replace(as_it_is, obstacle=lambda device, dtype, told=reason: told)
        )
        assert make_engine(network, device=CPU).name == taken
    assert fallbacks() == [
        f"engine onnxruntime does not run here (it {rains}): eager runs instead" for rains in ("rains", "rains again")
    ]


@pytest.mark.parametrize("name", ["fused", "gluon"])
def test_engines_of_our_own_kernels_need_what_the_kernels_need(
    name: EngineName, network: UNet328, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_cuda_obstacle", lambda index: "it is too old")
    monkeypatch.setattr(gluon, "gluon_obstacle", lambda: None)
    with pytest.raises(DeviceError, match=f"^engine is '{name}': it is too old"):
        make_engine(network, device=torch.device("cuda"), engine=name, exact=False)


def test_an_engine_that_crashes_the_gpu_is_tried_only_once(network: UNet328, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like an illegal memory access: after it nothing on CUDA works in this process, not even the chosen engine."""
    cuda, figures = torch.device("cuda"), {"gluon": math.inf, "fused": math.inf, "eager": 1.0}
    eager = cast(Engine, SimpleNamespace(name="eager"))
    kept: list[dict[str, float]] = []

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    for name, value in (
        ("contenders", lambda *_: [DECLARED["fused"], DECLARED["eager"]]),
        ("measure", lambda *_: measure.Measured(figures, {"eager": eager}, set())),
        ("recall", lambda *_: kept[-1] if kept else None),
        ("remember", lambda *given: kept.append(given[-1])),
    ):
        monkeypatch.setattr(choice, name, value)
    monkeypatch.setattr(dispatch, "_cuda_obstacle", lambda index: None)
    monkeypatch.setattr(Declaration, "build", lambda one, *_: SimpleNamespace(name=one.name))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    told = r"CUDA error: an illegal memory access was encountered\); run it again: .* eager runs instead"
    with pytest.raises(DeviceLostError, match=told):
        make_engine(network, device=cuda, exact=False)
    assert make_engine(network, device=cuda, exact=False).name == "eager"


def test_no_working_engine_is_an_error(network: UNet328, timed: dict[str, float]) -> None:
    with pytest.raises(DeviceError, match=r"^no engine works on cpu: eager: eager is out of order; onnxruntime: "):
        make_engine(network, device=CPU)


def without_aligned_corners(network: UNet328) -> UNet328:
    altered = copy.deepcopy(network)
    for module in altered.modules():
        if isinstance(module, nn.Upsample):
            module.align_corners = False
    return altered


@pytest.mark.parametrize("alter", [copy.deepcopy, without_aligned_corners])
def test_an_engine_with_other_results_is_not_taken(
    network: UNet328,
    alter: Callable[[UNet328], UNet328],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However fast it is; with the right results the same engine is taken."""
    made: dict[str, Engine] = {
        "onnxruntime": EagerEngine(alter(network), device=CPU, dtype=torch.float32),
        "eager": EagerEngine(network, device=CPU, dtype=torch.float32),
    }
    made["onnxruntime"].name = "onnxruntime"
    monkeypatch.setattr(Declaration, "build", lambda one, *_: made[one.name])
    monkeypatch.setattr(measure, "_seconds", lambda engine, _: {"onnxruntime": 0.1, "eager": 0.2}[engine.name])
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path / "cache"))
    wrong = alter is without_aligned_corners
    assert make_engine(network, device=CPU).name == ("eager" if wrong else "onnxruntime")
    told = "engine onnxruntime: paints something else than the network: eager runs instead"
    assert (told in caplog.text) == wrong


def test_an_engine_is_built_in_its_own_precision(network: UNet328) -> None:
    """Its weights are multiplied on the CPU, or on its device, whatever the program's own autocast."""
    seen: list[tuple[bool, ...]] = []

    def make(network: UNet328, *, device: torch.device, dtype: torch.dtype) -> EagerEngine:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")))
        return EagerEngine(network, device=CPU, dtype=dtype)

    declared = Declaration("eager", make)
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            declared.build(network, torch.device("cuda"), torch.float32)
            assert torch.is_autocast_enabled("cpu") and torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [(False, False)]


@pytest.mark.usefixtures("compiler")
def test_compile_is_taken_only_where_a_measurement_found_it_fastest(network: UNet328, timed: dict[str, float]) -> None:
    timed.update(onnxruntime=0.2, eager=0.1, compile=0.01)
    assert make_engine(network, device=CPU).name == "eager", "compiling takes minutes: not measured unasked"
    remembered.remember(network, CPU, torch.float32, {"onnxruntime": 200.0, "eager": 100.0, "compile": 10.0})
    assert make_engine(network, device=CPU).name == "compile"


def test_an_obstacle_of_an_engine_that_is_not_measured_is_not_told(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed.update(onnxruntime=0.1, eager=0.2)
    without = replace(DECLARED["compile"], obstacle=lambda device, dtype: "there is no compiler")
    monkeypatch.setitem(DECLARED, "compile", without)
    make_engine(network, device=CPU)
    assert fallbacks() == []


def test_engines_are_compared_with_the_plainest(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the one before, from which each may differ a little more."""
    paints = {"fused": 2.8, "onnxruntime": 1.4, "eager": 0.0}
    timed.update(dict.fromkeys(paints, 0.1))
    monkeypatch.setattr(measure, "_levels", lambda engine, network: torch.full((1, 3, 20, 20), paints[engine.name]))
    engines = [DECLARED["fused"], DECLARED["onnxruntime"], DECLARED["eager"]]
    figures, built, passing = measure.measure(network, CPU, torch.float32, engines)
    assert figures["fused"] == math.inf and built.keys() == {"onnxruntime", "eager"} and passing == {"fused"}


def test_an_engine_that_does_not_paint_the_same_twice_is_not_taken(
    network: UNet328, timed: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its threads race: next time they may do more harm."""
    levels = torch.zeros(1, 3, 20, 20)

    def painted(engine: Engine, network: UNet328) -> Tensor:
        if engine.name == "onnxruntime":
            levels[0, 0, 3, 7] += 1
        return levels.clone()

    timed.update(onnxruntime=0.1, eager=0.2)
    monkeypatch.setattr(measure, "_levels", painted)
    assert make_engine(network, device=CPU).name == "eager"
    assert "engine onnxruntime: does not paint the same twice: eager runs instead" in caplog.text
