"""Versions of what does the work."""

from __future__ import annotations

import importlib.metadata
import platform

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
