"""The tests that need a GPU, on a simulated one, in a separate process: see ``simulated_gpu/__init__.py``."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from simulated_gpu.run import CannotSimulateError, build, command

from gpupipe.kernels.whole_block import gluon_obstacle

TESTS = Path(__file__).resolve().parent
NEWER_TRITON = [TESTS / f"test_{name}.py" for name in ("gluon_cubins", "ptx_machine", "whole_block_gluon")]
"""Files that are skipped where Triton has no Gluon."""
COMPILED = [TESTS / f"test_{name}.py" for name in ("graphs", "captured_steps", "kernel_launch")]
"""Files whose tests need compiled kernels, not their references."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU here")
    try:
        return build(tmp_path_factory.mktemp("simulated_gpu"))
    except CannotSimulateError as missing:
        pytest.skip(str(missing))


def run(libraries: list[Path], *arguments: str | Path, arch: int | None = None) -> None:
    """Run tests; fails unless all of them pass, none is skipped, and there is at least one."""
    # A test that hangs says where before this one counts as hanging.
    words, environment = command(libraries, ["-q", "-o", "faulthandler_timeout=400", *map(str, arguments)])
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    if arch is not None:
        environment |= {"SIMULATED_GPU_MAJOR": str(arch // 10), "PTX_MACHINE": str(arch)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout


def test_simulated_gpu_detects_mistakes(libraries: list[Path]) -> None:
    run(libraries, TESTS / "simulated_gpu" / "controls.py")


def test_gpu_tests_with_reference_kernels(libraries: list[Path]) -> None:
    """All but the kernels: their plain references run in their place."""
    marked = "cuda and not hardware"
    ignored = [*COMPILED, *(NEWER_TRITON if gluon_obstacle() is not None else [])]
    run(libraries, TESTS, "-m", marked, *(f"--ignore={file}" for file in ignored))


@pytest.mark.skipif(gluon_obstacle() is not None, reason=str(gluon_obstacle()))
def test_what_needs_compiled_kernels(libraries: list[Path]) -> None:
    """On a simulated GPU as new as the kernels need, which executes them as Triton compiles them."""
    run(libraries, *COMPILED, "-m", "cuda", arch=90)


@pytest.mark.skipif(gluon_obstacle() is not None, reason=str(gluon_obstacle()))
@pytest.mark.parametrize("engine", [pytest.param("fused", marks=pytest.mark.slow), "gluon"])
def test_a_clip_with_compiled_kernels(libraries: list[Path], engine: str) -> None:
    """From input files to a video file."""
    name = f"test_engines_of_our_own_kernels[{engine}]"
    run(libraries, f"{TESTS / 'test_render_on_gpu.py'}::{name}", arch=90)


@pytest.mark.slow
@pytest.mark.skipif(gluon_obstacle() is not None, reason=str(gluon_obstacle()))
@pytest.mark.parametrize("engine", ["fused", "gluon"])
def test_engines_with_compiled_kernels(libraries: list[Path], engine: str) -> None:
    """The whole network, at half and at full width, on three samples: an hour."""
    tests = TESTS / f"test_{engine}_engine.py"
    run(libraries, tests, "-m", "cuda and hardware", arch=90)
