"""What ``doctor`` reports of a machine, and whether a render then does the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run

from gpupipe.engines import remembered
from gpupipe.models import UNet328


@pytest.mark.usefixtures("compiler")
def test_doctor_reports_which_engines_would_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path))
    facts = json.loads(run("doctor", "--json", "--device", "cpu").stdout.splitlines()[-1])
    told = "auto: the fastest of llvm, onnxruntime, eager, measured at the first render; --engines measures compile too"
    assert facts["render"]["engine"] == told
    assert not any("Errno" in line or "{" in line for line in facts["can"].values())
    if not torch.cuda.is_available():
        assert facts["can"]["h264_nvenc"] == "no: no CUDA GPU is available"


@pytest.mark.parametrize(
    ("missing", "told"), [(None, "yes"), ("llvmlite is not installed", "no: llvmlite is not installed")]
)
def test_doctor_reports_llvm(missing: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpupipe.doctor.llvm_obstacle", lambda dtype=torch.float32: missing)
    monkeypatch.setattr("gpupipe.kernels.dispatch.llvm_obstacle", lambda dtype=torch.float32: missing)
    facts = json.loads(run("doctor", "--json", "--device", "cpu").stdout.splitlines()[-1])
    assert facts["can"]["LLVM kernels, on the CPU"] == told
    around = f"torch: {missing}" if missing else "llvm: fused kernels around the network"
    assert facts["render"]["kernels"] == around


def test_doctor_does_not_query_a_broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpupipe.doctor.find_device", lambda device=None: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = json.loads(run("doctor", "--json").stdout.splitlines()[-1])
    assert {facts["can"][name] for name in ("Triton kernels", "nvJPEG", "NVDEC", "h264_nvenc")} == {
        "no: no CUDA GPU is available"
    }


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ([], "float32; float16; bfloat16"),
        ([torch.float16], "float32; float16: no, wood; bfloat16"),
        ([torch.float16, torch.bfloat16], "float32; float16: no, wood; bfloat16: no, wood"),
    ],
)
def test_doctor_reports_which_precisions_run(
    without: list[torch.dtype], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gpupipe.doctor.llvm_obstacle", lambda dtype=torch.float32: "wood" if dtype in without else None
    )
    facts = json.loads(run("doctor", "--json", "--device", "cpu").stdout.splitlines()[-1])
    assert facts["render"]["precision"] == told


@pytest.mark.usefixtures("compiler")
def test_doctor_reports_what_a_render_then_uses(
    clip: dict[str, Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    network, cpu = UNet328("ave"), torch.device("cpu")
    figures = {"llvm": 50.0, "onnxruntime": 100.0, "eager": 400.0, "compile": math.inf}
    remembered.remember(network, cpu, torch.float32, figures)
    result = run("doctor", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout.splitlines()[-1])
    assert "llvm 50.0, onnxruntime 100.0, eager 400.0, fails: compile" in facts["render"]["engine"]
    given = ("--template", clip["template"], "--audio-features", clip["features"], "--audio", clip["sound"])
    more = ("--output", tmp_path / "out.mp4", "--json", "--device", "cpu")
    rendered = run("render", "--checkpoint", tiny_checkpoint(), *given, *more)
    record = json.loads(rendered.stdout.splitlines()[-1])
    assert facts["render"]["engine"].startswith(record["engine"])
    assert facts["render"]["codec"].startswith(record["codec"])
    assert facts["render"]["kernels"].startswith(record["kernels"])
    assert facts["versions"] == record["versions"]
    told = run("doctor", "--device", "cpu")
    assert told.exit_code == 0
    assert " 1 frame " in told.stdout
    assert told.stdout.split()[-2:] == ["fallbacks", "none"]


def test_what_stands_in_brackets_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "no, Ray is not installed (pip install 'gpupipe[farm]')"
    monkeypatch.setattr("gpupipe.cli.examine", lambda device: {"can": {"farm": told}, "next": [told]})
    assert run("doctor").output.count(told) == 2
