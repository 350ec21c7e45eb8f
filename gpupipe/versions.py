"""Names of the machine's processors, and versions of the packages that do the work."""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import torch

from gpupipe.lanes import available_cores

_PACKAGES = ("gpupipe", "torch", "torchvision", "triton", "llvmlite", "onnxruntime", "av", "numpy")


def _installed(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


__version__ = _installed("gpupipe", "0+unknown")  # unknown: imported from a source tree by its path


def numbers(version: str) -> tuple[int, ...]:
    """A version's first three numbers, to compare: ``"3.7.1+git"`` → (3, 7, 1)."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that do the work; "missing" for one that is not installed."""
    found = {"python": platform.python_version()}
    found |= {package: _installed(package, "missing") for package in _PACKAGES}
    found["ffmpeg"] = ".".join(map(str, av.library_versions["libavcodec"])) + " (libavcodec)"
    return found


def device_name(device: torch.device | str = "cpu") -> str:
    """Return the GPU's name, or the CPU's with the number of cores that this process may use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {available_cores()} cores"


def processor_name() -> str:
    """Return the CPU's model name, and what sets it apart from others to which a virtual machine gives the same name:
    AMX, and of AMD's the family, a number. One that tells no model, as ARM's, has LLVM's name, such as
    ``"aarch64 neoverse-v1"``."""
    name = _processor_fact("model name") or f"{platform.machine()} {_name_in_llvm()}".strip()
    if name.startswith("AMD") and not re.search(r"\d", name) and (family := _processor_fact("cpu family")):
        name += f" family {family}"
    return f"{name} with AMX" if "amx_bf16" in _processor_fact("flags").split() else name


def _name_in_llvm() -> str:
    if importlib.util.find_spec("llvmlite") is None:
        return ""
    import llvmlite.binding as llvm  # noqa: PLC0415 - it is not there for every Python

    return str(llvm.get_host_cpu_name())


def _processor_fact(name: str) -> str:
    facts = Path("/proc/cpuinfo")
    found = re.search(rf"^{name}\s*:\s*(.+)$", facts.read_text(), re.MULTILINE) if facts.is_file() else None
    return found.group(1).strip() if found else ""
