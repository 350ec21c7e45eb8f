"""How Triton kernels are launched, and that they are compiled together: for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from ptx_machine.launch import compiled, machine

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import EngineName, fused
from gpupipe.engines.declared import DECLARED
from gpupipe.kernels import launch_triton, nv12
from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.kernels.launch_triton import CAN_COMPILE_TOGETHER, FUSION, compile_together, launches_taken
from gpupipe.kernels.whole_block import gluon_obstacle
from gpupipe.models.unet328 import random_inputs

SECONDS = 60

together = pytest.mark.skipif(not CAN_COMPILE_TOGETHER, reason="Triton 3.5 compiles kernels one by one")

FRAMES = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).view(2, 4, 6, 3)
"""Too narrow for the kernels that read 16 bytes at a time."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels to and from NV12, to be compiled instead of interpreted."""
    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    return compiled("gpupipe.kernels.common_triton", "gpupipe.kernels.nv12_triton")


def watched(monkeypatch: pytest.MonkeyPatch, watch: Callable[[], object]) -> None:
    """Have ``watch`` called whenever a kernel is compiled, on the thread that does so."""
    original = triton.compiler.compile

    def compile_(*arguments: Any, **options: Any) -> Any:
        watch()
        return original(*arguments, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile_)


@together
def test_kernels_are_compiled_together_without_being_launched(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, threads, launched = threading.Barrier(2), [], []

    def watch() -> None:
        threads.append(threading.current_thread())
        both.wait(SECONDS)  # the first waits for the second to begin

    watched(monkeypatch, watch)
    expected = nv12.to_nv12(FRAMES)
    with machine(90, launcher=lambda execute, tensors: (launched.append(1), execute())):
        compile_together(lambda: kernels.from_nv12_triton(kernels.to_nv12_triton(FRAMES)), threads=2)
        assert len(set(threads)) == 2
        assert threading.current_thread() not in threads
        assert not launched

        found = kernels.to_nv12_triton(FRAMES)
        assert torch.equal(found, expected)
        assert torch.equal(kernels.from_nv12_triton(found), nv12.from_nv12(expected))
    assert len(launched) == 2
    assert len(threads) == 2, "compiled again"


def test_without_it_kernels_are_compiled_one_by_one(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control for the test above."""
    threads: list[threading.Thread] = []
    watched(monkeypatch, lambda: threads.append(threading.current_thread()))
    with machine(90):
        kernels.from_nv12_triton(kernels.to_nv12_triton(FRAMES))
    assert threads == [threading.current_thread()] * 2


@together
def test_a_kernel_that_cannot_be_compiled_fails_where_it_is_launched(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no such instruction")

    watched(monkeypatch, fail)
    with machine(90):
        compile_together(lambda: kernels.to_nv12_triton(FRAMES), threads=2)
        with pytest.raises(RuntimeError, match="no such instruction"):
            kernels.to_nv12_triton(FRAMES)


@together
def test_a_step_that_fails_leaves_launches_as_they_were(kernels: ModuleType) -> None:
    def step() -> None:
        kernels.to_nv12_triton(FRAMES)
        raise MemoryError("too little")

    with machine(90):
        with pytest.raises(MemoryError, match="too little"):
            compile_together(step, threads=2)
        assert torch.equal(kernels.to_nv12_triton(FRAMES), nv12.to_nv12(FRAMES))


@together
def test_other_threads_launch_meanwhile(kernels: ModuleType) -> None:
    """While one engine's kernels are compiled, another thread may render."""
    found: list[torch.Tensor] = []

    def step() -> None:
        other = threading.Thread(target=lambda: found.append(kernels.to_nv12_triton(FRAMES)))
        other.start()
        other.join(SECONDS)

    with machine(90):
        compile_together(step, threads=2)
    assert torch.equal(found[0], nv12.to_nv12(FRAMES))


def test_a_kernel_is_launched_and_compiled_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one."""
    happened: list[object] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        happened.append(tensor.shape)
        yield
        happened.append("left")

    def run(*arguments: object, **options: object) -> None:
        happened.append(options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch_triton.launch({(2,): run}, (2,), FRAMES, BLOCK=4)
    with launches_taken(lambda kernel, grid, *arguments, **options: happened.append((kernel, grid))):
        launch_triton.launch("kernel", (3,), FRAMES, BLOCK=4)
    assert happened == [FRAMES.shape, {"BLOCK": 4, **FUSION}, "left", FRAMES.shape, ("kernel", (3,)), "left"]


SCRIPT = """
import torch, triton
from unittest import mock
from gpupipe.engines.fused import FusedEngine
from gpupipe.engines.gluon import GluonEngine
from gpupipe.kernels import inverted_residual, pointwise
from gpupipe.kernels.launch_triton import FUSION, launches_taken
from gpupipe.kernels.whole_block import gluon_obstacle
from gpupipe.models.unet328 import UNet328, random_inputs
from ptx_machine.launch import machine

compiled = set()

def note(*, key, fn, **rest):
    compiled.add((fn.name, key))
    return True  # do not compile

def kernels(engine, network, batch):
    compiled.clear()
    image, audio = random_inputs(network, batch)
    index = torch.empty(batch, dtype=torch.int64, device="meta")
    engine.decode(engine.encode(image), index, audio)
    return set(compiled)

def warm_up(kernel, grid, *arguments, **options):
    kernel.warmup(*arguments, grid=grid, **options, **FUSION)

triton.knobs.runtime.jit_cache_hook = note
with (
    machine(90),
    mock.patch.object(pointwise, "backend", return_value="triton"),
    mock.patch.object(inverted_residual, "backend", return_value="triton"),
    launches_taken(warm_up),
):
    for mode in ("ave", "hubert", "wenet"):
        network = UNet328(mode).eval()
        engines = [FusedEngine(network, device=torch.device("meta"))]
        if gluon_obstacle() is None:
            from gpupipe.kernels.whole_block_gluon import whole_block_gluon

            engines.append(GluonEngine(network, device=torch.device("meta"), run=whole_block_gluon))
        for engine in engines:
            one = kernels(engine, network, 1)
            assert len(one) > 20, len(one)
            for batch in (2, 3, 16, 64):
                assert kernels(engine, network, batch) == one, (engine.name, mode, batch)
            print(engine.name, mode, len(one))
"""


def test_an_engine_s_kernels_do_not_depend_on_the_batch() -> None:
    """So a batch of one has all of them compiled. Nothing is compiled here, or run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == (6 if gluon_obstacle() is None else 3)


@pytest.mark.parametrize("name", [name for name in ("fused", "gluon") if name in DECLARED])
def test_engines_are_built_with_their_kernels_compiled_on_all_cores(
    name: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first batch would have them compiled one by one."""
    asked: list[int] = []

    def compile_all(step: Callable[[], object], threads: int) -> None:
        asked.append(threads)

    monkeypatch.setattr(launch_triton, "compile_together", compile_all)
    monkeypatch.setattr(fused, "available_cores", lambda: 5)
    for kind, threads in (("triton", [5]), ("torch", [])):
        asked.clear()
        monkeypatch.setattr(fused, "backend", lambda device, kind=kind: kind)
        engine = DECLARED[name].make(seeded_network(width=1 / 8), device=torch.device("cpu"), dtype=torch.float32)
        assert (engine.name, asked) == (name, threads)


@together
@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
def test_a_built_engine_has_its_kernels_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    name, device = "gluon" if gluon_obstacle() is None else "fused", torch.device("cuda", torch.cuda.current_device())
    compiled_now: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **rest: compiled_now.append(fn.name))
    network = seeded_network(width=3 / 8)  # no other test's: none of its kernels is compiled yet
    engine = DECLARED[name].build(network, device, torch.float16)
    assert len(compiled_now) > 20

    def warm_up(kernel: Any, grid: object, *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options, **FUSION)

    compiled_now.clear()
    image, audio = random_inputs(network, 3)
    with launches_taken(warm_up):
        engine.decode(engine.encode(image), torch.arange(3, device=device), audio)
    assert not compiled_now
