"""Which engine to use: the one asked for, or the fastest here, found by a short measurement and remembered."""

from __future__ import annotations

import logging
import math
from typing import get_args

import torch

from gpupipe.device import require_alive
from gpupipe.engines.base import ENGINES, Engine, EngineName, Precision
from gpupipe.engines.declared import DECLARED, candidates, contenders
from gpupipe.engines.measure import fastest, measure
from gpupipe.engines.remembered import cache_file, recall, remember
from gpupipe.errors import DeviceError
from gpupipe.fallbacks import note_fallback
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.models.unet328 import UNet328

logger = logging.getLogger(__name__)

LOWER_ON_CPU: tuple[Precision, ...] = ("float16", "bfloat16")
"""Precisions for which a CPU may have instructions, which `llvm` uses; the better first."""


def make_engine(
    network: UNet328,
    *,
    device: torch.device,
    engine: EngineName = "auto",
    exact: bool = True,
    precision: Precision | None = None,
) -> Engine:
    """Choose and build an engine.

    Args:
        engine: one of :data:`~gpupipe.engines.base.ENGINES`; ``"auto"`` measures once for each device, network shape,
            precision and set of versions, and remembers; it measures again after an engine found no memory, or did not
            paint what the plainest one paints. If only one engine is eligible, it is used without measuring.
        exact: float32 arithmetic with TF32 off.
        precision: of weights and activations; None means float32 on a CPU or with ``exact``, else float16. Less than
            float32 needs a CPU with instructions for it.

    Raises:
        DeviceError: the engine does not run on ``device`` or at ``precision``, or its name is unknown.
        DeviceLostError: an engine being measured crashed, and this process has lost the GPU. That is remembered, so the
            next process does not measure it again.
    """
    if engine not in ENGINES:
        raise DeviceError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "torch":
        engine = "eager"
    dtype = find_dtype(device, exact=exact, precision=precision)
    if engine != "auto":
        return DECLARED[engine].build(network, device, dtype)
    built: dict[str, Engine] = {}
    figures, engines = recall(network, device, dtype) or {}, contenders(device, dtype)
    if not figures and len(engines) > 1:
        names = " and ".join(one.name for one in engines)
        logger.info("engine: measuring %s on %s, once for this kind of network", names, device)
        measured = measure(network, device, dtype, engines)
        figures, built = measured.figures, measured.engines
        remember(network, device, dtype, measured.lasting)
        require_alive(device, f"run it again: what did it is remembered, and {fastest(figures)} runs instead")
    name = fastest(figures) if figures else engines[0].name
    for one in candidates(device, dtype):
        if not one.slow_to_build and (reason := one.obstacle(device, dtype)):
            note_fallback(f"engine {one.name} does not run here ({reason}): {name} runs instead")
    for failed, ms in figures.items():
        if math.isinf(ms) and not built:  # a measurement just made has noted it itself
            note_fallback(f"engine {failed} failed when it was measured ({cache_file()} tells): {name} runs instead")
    chosen = built.get(name) or DECLARED[name].build(network, device, dtype)
    told = ", ".join(f"{each} {ms:.1f} ms a frame" for each, ms in figures.items()) or "itself"
    logger.debug("engine %s on %s, %s: fastest of %s", chosen.name, device, dtype, told)
    return chosen


def find_dtype(device: torch.device, *, exact: bool, precision: Precision | None) -> torch.dtype:
    """The type that an engine computes in.

    Raises:
        DeviceError: less than float32 with ``exact`` or on a device that does not compute in it, or an unknown
            precision.
    """
    if precision is None:
        precision = "float32" if exact or device.type == "cpu" else "float16"
    if precision not in get_args(Precision):
        raise DeviceError(f"precision is {precision!r}; expected float32, float16 or bfloat16")
    if precision != "float32" and exact:
        raise DeviceError(f"precision is {precision!r}; expected float32 with exact")
    dtype: torch.dtype = getattr(torch, precision)
    if device.type == "cpu" and precision in LOWER_ON_CPU and (reason := llvm_obstacle(dtype)):
        raise DeviceError(f"precision is {precision!r}; expected float32 on this CPU: {reason}")
    return dtype
