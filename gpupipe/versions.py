"""Which machine and which versions do the work."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import av

_PACKAGES = ("gpupipe", "torch", "torchvision", "triton", "kornia", "onnxruntime", "av", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that do the work; "missing" for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    found["ffmpeg"] = ".".join(map(str, av.library_versions["libavcodec"])) + " (libavcodec)"
    return found


def processor_name() -> str:
    """The CPU's model name."""
    facts = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.MULTILINE) if facts.is_file() else None
    return named.group(1).strip() if named else platform.processor() or platform.machine()
