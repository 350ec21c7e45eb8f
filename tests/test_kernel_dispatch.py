"""Which implementation of the kernels runs where, and that the CPU's needs no Triton."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpupipe.fallbacks import fallbacks
from gpupipe.kernels import dispatch


@pytest.mark.parametrize(("missing", "backend"), [(None, "llvm"), ("llvmlite is not installed", "torch")])
def test_the_cpu_s_kernels_are_no_fallback(missing: str | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "llvm_obstacle", lambda: missing)
    assert dispatch.backend("cpu") == backend
    assert dispatch.obstacle(torch.device("cpu")) == "device is cpu; the Triton kernels need cuda"
    assert not any("Triton" in message for message in fallbacks())


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The warnings for a GPU of compute capability 9.0."""
    said: list[str] = []
    monkeypatch.setattr(dispatch, "note_fallback", said.append)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    dispatch._cuda_obstacle.cache_clear()
    yield said
    dispatch._cuda_obstacle.cache_clear()


@pytest.mark.parametrize(
    ("capability", "triton", "backend", "said"),
    [
        ((9, 0), True, "triton", None),
        ((8, 0), True, "triton", None),
        ((7, 5), True, "torch", "7.5"),
        ((9, 0), False, "torch", "not installed"),
    ],
)
def test_cuda_runs_triton_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
    noted: list[str],
    capability: tuple[int, int],
    triton: bool,
    backend: str,
    said: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(dispatch, "_launch_obstacle", lambda: None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object() if triton else None)
    assert dispatch.backend("cuda") == backend
    assert len(noted) == (said is not None)
    assert said is None or said in noted[0]


def test_each_gpu_is_asked_for_itself(noted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An old card may stand beside a new one; none of a ROCm build is asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(dispatch, "_launch_obstacle", lambda: None)
    assert [dispatch.backend(f"cuda:{index}") for index in (0, 1)] == ["triton", "torch"]
    assert len(noted) == 1 and "capability is 7.5" in noted[0]
    dispatch._cuda_obstacle.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch.backend("cuda:0") == "torch"
    assert "ROCm" in noted[1]


@pytest.mark.parametrize(
    ("compiler", "folder", "said"),
    [
        (None, "new", "Failed to find C compiler"),
        ("#!/bin/sh\necho no Python.h >&2\nexit 1\n", "new", r"the C compiler fails.*python3-dev"),
        ("#!/bin/sh\nexit 1\n", "compiler/gcc", "Not a directory"),
    ],
    ids=["no compiler", "no headers", "no cache"],
)
def test_plain_torch_runs_where_triton_cannot_launch(
    compiler: str | None,
    folder: str,
    said: str,
    noted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Run through Triton's own code, up to the compiler."""
    triton = pytest.importorskip("triton")
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if hasattr(build, "_find_compiler"):  # in newer releases, which remember what it found
        monkeypatch.setattr(build, "_find_compiler", build._find_compiler.__wrapped__)
    (tmp_path / "compiler").mkdir()
    if compiler is not None:
        (tmp_path / "compiler" / "gcc").write_text(compiler)
        (tmp_path / "compiler" / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "compiler"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    monkeypatch.setattr(driver.CudaDriver, "is_active", staticmethod(lambda: True))
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    assert dispatch.backend("cuda") == "torch"
    assert re.search(said, noted[0])


def test_the_cpu_s_kernels_do_without_triton() -> None:
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Refuse())
import torch
import gpupipe.kernels
from gpupipe.kernels import crop_resize, dispatch, nv12, paste_blend
frames, index, boxes = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.tensor([0]), torch.tensor([[1, 1, 6, 6]])
crops, image = crop_resize.crop_and_input(frames, index, boxes)
given = (image[:, :3], crops, index, frames, index, boxes, nv12.to_nv12(frames))
done = paste_blend.paste_blend(*given, nv12=True)
print(tuple(done.shape), "triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 12, 8) False"
