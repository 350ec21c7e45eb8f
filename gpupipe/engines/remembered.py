"""The results of measurements, kept in the user's cache folder from one process to the next."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch

from gpupipe.engines.base import BATCH_SIZES
from gpupipe.engines.declared import contenders, runnable
from gpupipe.engines.measure import Figures
from gpupipe.errors import OutputError
from gpupipe.files import cache_folder, make_folder, replacing
from gpupipe.models.unet328 import UNet328
from gpupipe.versions import device_name, versions

logger = logging.getLogger(__name__)


def cache_file() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "engines.json"


def recall(network: UNet328, device: torch.device, dtype: torch.dtype) -> Figures | None:
    """What an earlier measurement of the same kind found for the engines that run here.

    None if there was none, or if it lacks an engine that could not run then, as without a compiler, and can run now.
    """
    figures = _read().get(_key(network, device, dtype))
    if not isinstance(figures, dict):
        return None
    names = {one.name for one in runnable(device, dtype)}
    known = {name: math.inf if ms is None else ms for name, ms in figures.items() if name in names}
    whole = known.keys() >= {one.name for one in contenders(device, dtype)}
    return known if whole and all(isinstance(ms, int | float) for ms in known.values()) else None


def remember(network: UNet328, device: torch.device, dtype: torch.dtype, figures: Figures) -> None:
    """Add to the file. If it cannot be written, that is logged, and engines are measured again next time."""
    path = cache_file()
    kept = _read()
    kept[_key(network, device, dtype)] = {
        name: None if math.isinf(ms) else round(ms, 4) for name, ms in figures.items()
    }
    try:
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n")
    except OutputError as error:
        logger.warning("%s; engines are measured again next time", error)


def _read() -> dict[str, object]:
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _key(network: UNet328, device: torch.device, dtype: torch.dtype) -> str:
    """Everything that a measurement depends on."""
    packages = versions()
    batch = f", batch {BATCH_SIZES[device.type]}"
    names = ("gpupipe", "torch", *(("llvmlite", "onnxruntime") if device.type == "cpu" else ("triton",)))
    parts = [device_name(device) + batch, f"{network.mode}, width {network.width:g}", str(dtype).removeprefix("torch.")]
    return " | ".join(parts + [f"{name} {packages[name]}" for name in names])
