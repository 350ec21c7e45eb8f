"""Every Triton kernel compiles without a GPU, with no spill and no stack frame, and the report checks that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

COLUMNS = {"kernel", "config", "arch", "registers", "stack", "spills", "shared_bytes", "load_bits", "store_bits"}

AROUND = {"crop_resize", "paste_blend", "to_nv12", "from_nv12"}
"""The kernels around the network."""

NETWORK = {"pointwise", "upsample_expand", "depthwise", "depthwise_project", "inverted_residual"}
"""The network's kernels in plain Triton, in the configurations of the fused engine."""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run in a separate process: in this one Triton's interpreter may be on, with which nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "gpupipe.kernels.report", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check(target: Path, kernels: set[str], *architectures: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Compile; returns the widths of each configuration's loads and stores."""
    names = [str(arch) for arch in architectures]
    done = run("--json", str(target), "--arch", *names, "--kernel", *kernels)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(target.read_text())
    assert all(set(row) >= COLUMNS for row in rows)
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in architectures}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert row["error"] is None and row["stack"] == 0 and row["spills"] == 0, row
        assert 0 < row["registers"] <= 255, row
    return {(row["kernel"], row["config"]): (row["load_bits"], row["store_bits"]) for row in rows}


def check_around(target: Path, *architectures: int) -> None:
    widths = check(target, AROUND, *architectures)
    assert widths["to_nv12", "16×2 pixels"] == (128, 128)
    assert widths["from_nv12", "16×2 pixels"] == (128, 128)
    assert widths["crop_resize", "crop328 + channels-last float16"] == (8, 128)


@pytest.mark.slow  # CI runs `make report`
def test_kernels_compile_for_every_architecture(tmp_path: Path) -> None:
    check_around(tmp_path / "around.json", 80, 86, 89, 90, 100, 120)
    widths = check(tmp_path / "network.json", NETWORK, 80, 86, 89, 90, 100, 120)
    assert all(stores == 128 for _, stores in widths.values())
    assert all(loads == 128 for (kernel, _), (loads, _) in widths.items() if kernel.startswith("depthwise"))


def test_kernels_compile_for_the_oldest_and_the_newest(tmp_path: Path) -> None:
    check_around(tmp_path / "rows.json", 80, 120)


@pytest.mark.parametrize(("arch", "clean"), [(80, True), (89, False), (90, True), (120, False)])
def test_more_shared_memory_than_there_is_fails_the_report(
    arch: int, clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpupipe.kernels import report

    large = SimpleNamespace(asm={"ptx": ""}, metadata=SimpleNamespace(shared=100 * 1024))
    monkeypatch.setattr(report, "compiled_kernel", lambda variant, arch: large)
    monkeypatch.setattr(report, "_resources", lambda ptx, arch: (32, 0, 0))
    row = report.compile_variant(report.Variant(None, "large", "", {}, {}), arch)
    assert row.clean == clean
    assert not any(replace(row, **fault).clean for fault in ({"stack": 8}, {"spills": 4}))
    assert row.shared_bytes == 100 * 1024
    assert clean or row.error == "102400 bytes of shared memory; expected 101376 at most"


def test_a_kernel_is_compiled_as_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report on other warps, or without fused multiply-adds, would be one on other kernels."""
    from gpupipe.kernels import report
    from gpupipe.kernels.launch_triton import FUSION
    from gpupipe.kernels.report_network import Launches, pointwise_triton

    given: list[tuple[Any, Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        report.triton, "compile", lambda source, target, options: given.append((source, target, options))
    )
    monkeypatch.setattr(report, "ASTSource", SimpleNamespace)
    launches = Launches()
    for _ in range(2):
        x = torch.empty(1, dtype=torch.float16)
        launches.record(pointwise_triton._pointwise_kernel, (1,), x, None, num_warps=8, num_stages=2, BLOCK_M=16)
    (recorded,) = launches.variants
    first, second, *_ = pointwise_triton._pointwise_kernel.arg_names
    assert (recorded.num_warps, recorded.num_stages, recorded.types) == (8, 2, {first: "*fp16"})
    assert recorded.constants == {second: None, "BLOCK_M": 16}

    kernel: Any = SimpleNamespace(arg_names=("frames", "height", "width", "BLOCK"), is_gluon=lambda: False)
    types = {"frames": "*u8", "height": "i32", "width": "i32"}
    report.compiled_kernel(report.Variant(kernel, "", "", types, {"BLOCK": 64, "OTHER": 1}, ("width",), 8, None, 2), 90)
    ((source, target, options),) = given
    assert options == {"num_warps": 8, "num_stages": 2, **FUSION}
    assert (target.backend, target.arch) == ("cuda", 90)
    assert (source.signature, source.constexprs) == (types | {"BLOCK": "constexpr"}, {"BLOCK": 64})
    assert {source.fn.arg_names[place] for (place,) in source.attrs} == {"frames", "width"}, "of 16 bytes"


@pytest.mark.parametrize("fences", [True, False], ids=["as it is now", "before Triton 3.7.1"])
def test_nothing_is_pipelined_where_triton_forgets_the_fence(fences: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise tensor cores may read shared memory before the copy to it is visible."""
    from gpupipe.kernels import common_triton, pointwise_triton
    from gpupipe.kernels.report_network import network_variants

    monkeypatch.setattr(pointwise_triton, "INTERPRETED", False)  # as on a GPU
    monkeypatch.setattr(common_triton, "_FENCES_COPIES", fences)
    pipelined = {variant.name for variant in network_variants() if variant.num_stages != 1}
    assert pipelined == ({"pointwise"} if fences else set())


def test_the_fence_is_missed_only_where_tensor_cores_read_by_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100, L4 or RTX card is pipelined with an older Triton, too."""
    from gpupipe.kernels import common_triton

    capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    gpus = [torch.device("cuda", place) for place in range(len(capabilities))]
    monkeypatch.setattr(common_triton, "_FENCES_COPIES", False)
    safe = [capability for capability, gpu in zip(capabilities, gpus, strict=True) if common_triton.can_pipeline(gpu)]
    assert safe == [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)]
    monkeypatch.setattr(common_triton, "_FENCES_COPIES", True)
    assert all(map(common_triton.can_pipeline, gpus))


def test_architectures_whose_tensor_cores_read_by_the_proxy() -> None:
    """As Triton compiles a product, and where it puts the fence."""
    from gpupipe.kernels.common_triton import reads_by_proxy

    script = """
from gpupipe.kernels import report
from gpupipe.kernels.report_network import network_variants
variant, *_ = [one for one in network_variants() if (one.name, one.config) == ("pointwise", "fuse0.0")]
for arch in (80, 86, 89, 90, 100, 120):
    ptx = report.compiled_kernel(variant, arch).asm["ptx"]
    print(arch, *(word for word in ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "fence.proxy.async") if word in ptx))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {int(arch): words for arch, *words in map(str.split, done.stdout.splitlines())}
    assert found.keys() == {80, 86, 89, 90, 100, 120}
    for arch, words in found.items():
        by_proxy = reads_by_proxy((arch // 10, arch % 10))
        assert ("mma.sync" in words) != by_proxy, (arch, words)
        assert ("fence.proxy.async" in words) == by_proxy, (arch, words)


def test_a_spill_fails_the_report(tmp_path: Path) -> None:
    """The same command on a kernel that needs more registers than there are."""
    script = """
import sys, pathlib
source = '''
import triton, triton.language as tl
@triton.jit
def greedy(p, N: tl.constexpr):
    i = tl.arange(0, N)
    q = tl.load(p + i)
    for _ in range(3):
        q = tl.load(p + q)
        tl.debug_barrier()
    tl.store(p + i, q)
'''
folder = pathlib.Path(sys.argv[2])
(folder / "greedy.py").write_text(source)
sys.path.insert(0, str(folder))
import greedy
from gpupipe.kernels import report
wanted = report.Variant(greedy.greedy, "greedy", "", {"p": "*i32"}, {"N": 1 << 16}, num_warps=4)
broken = report.Variant(greedy.greedy, "broken", "", {"p": "*i32"}, {"N": 3}, num_warps=4)
report.variants = lambda: [wanted] if sys.argv[1] == "greedy" else [broken]
sys.exit(report.main(["--arch", "80"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for name, told in (("greedy", "greedy"), ("broken", "CompilationError")):
        command = [sys.executable, "-c", script, name, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        assert told in done.stdout


def test_the_interpreter_cannot_be_reported_on() -> None:
    done = run("--arch", "90", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr


def test_the_assembler_is_asked_for_as_this_triton_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpupipe.kernels import report

    monkeypatch.setattr(report, "get_ptxas", lambda arch: SimpleNamespace(path=f"ptxas for {arch}"))
    assert report._assembler(90) == "ptxas for 90"
    monkeypatch.setattr(report, "get_ptxas", lambda: SimpleNamespace(path="the only ptxas"))
    assert report._assembler(90) == "the only ptxas"
