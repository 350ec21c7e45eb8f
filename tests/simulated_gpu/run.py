"""Run pytest on the simulated GPU: ``python tests/simulated_gpu/run.py [pytest's arguments]``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


class CannotSimulateError(Exception):
    """The simulated GPU cannot be built; the message says what is missing."""


def build(target: Path) -> list[Path]:
    """Compile the libraries that replace CUDA's for torch, into the folder ``target``; returns their paths.

    Raises:
        CannotSimulateError: torch is built without CUDA 13, or there is no compiler.
    """
    import torch

    site = Path(torch.__file__).resolve().parents[1]
    if not (torch.version.cuda or "").startswith("13."):
        raise CannotSimulateError(f"it stands in for CUDA 13, and this torch is built with {torch.version.cuda}")
    headers = next(site.glob("nvidia/*/include/cuda_runtime_api.h"), None)
    if headers is None or not all(map(shutil.which, ("g++", "nm"))):
        raise CannotSimulateError("it takes g++, nm and the headers of CUDA's runtime, which torch's wheel brings")
    libraries = [*site.glob("torch/lib/*.so"), *site.glob("torchvision/*.so")]
    wanted = {name for library in libraries for name in _symbols(library, "--dynamic", "--undefined-only")}
    compiled = target / "runtime.o"
    _compile("-c", FOLDER / "runtime.cpp", "-o", compiled, f"-I{FOLDER}", f"-I{headers.parent}")
    there = {name.partition("@")[0] for name in _symbols(compiled, "--defined-only")}
    built = []
    for library, prefix, parts in (("libcudart", r"(__)?cuda[A-Z]", [compiled]), ("libcuda", r"cu[A-Z]", [])):
        names = {name for name in wanted if re.match(prefix, name)}
        version = next((name.partition("@")[2] for name in names if "@" in name), f"{library}.so.1")
        missing = sorted({name.partition("@")[0] for name in names} - there - {"cuInit", "cuDevicePrimaryCtxGetState"})
        source, export, output = target / f"{library}.cpp", target / f"{library}.map", target / version
        lines = [
            'extern "C" {',
            *([_DRIVER] if library == "libcuda" else []),
            *map(_NOT_SIMULATED.format, missing),
            "}",
        ]
        source.write_text("\n".join(lines), encoding="ascii")
        export.write_text(f"{version} {{ global: *; }};", encoding="ascii")
        linked = f"-Wl,-soname,{version},--version-script,{export}"
        _compile("-shared", source, *parts, "-o", output, linked, "-ldl", "-lpthread")
        built.append(output)
    return built


_DRIVER = """\
int cuInit(unsigned) { return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
"""

_NOT_SIMULATED = "int {}() {{ return 801; }}"
"""Returns CUDA's error "not supported"."""


def _symbols(library: Path, *options: str) -> set[str]:
    listed = subprocess.run(["nm", *options, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def _compile(*arguments: str | Path) -> None:
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-fPIC", *arguments], check=True)


def command(libraries: list[Path], arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command that runs pytest on the simulated GPU, and its environment."""
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"LD_PRELOAD": " ".join(map(str, libraries)), "PYTHONPATH": path}
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # as in conftest.py, before which the plugin loads torch
    return [sys.executable, "-m", "pytest", "-p", "plugin", *arguments], environment


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        words, environment = command(build(Path(folder)), sys.argv[1:])
        sys.exit(subprocess.run(words, env=environment, check=False).returncode)
