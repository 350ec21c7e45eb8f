"""Which engine: the one asked for, or the fastest that works here, by a short measurement that is remembered."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpupipe.engines import compiled, openvino_cpu
from gpupipe.engines.base import BATCH_SIZES, ENGINES, Engine, EngineName, Precision
from gpupipe.engines.compiled import CompiledEngine
from gpupipe.engines.eager import EagerEngine
from gpupipe.engines.onnxruntime_cpu import OnnxRuntimeEngine
from gpupipe.engines.openvino_cpu import OpenVinoEngine
from gpupipe.errors import DeviceError, OutputError, first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.files import replacing
from gpupipe.kernels.whole_block import gluon_obstacle
from gpupipe.lanes import cpu_lanes
from gpupipe.models.unet328 import INPUT_SIZE, UNet328
from gpupipe.versions import device_name, versions

logger = logging.getLogger(__name__)

CANDIDATES: dict[str, tuple[EngineName, ...]] = {
    "cpu": ("openvino", "onnxruntime", "eager", "compile"),
    "cuda": ("gluon", "fused", "compile", "eager"),
}
"""Engines of each kind of device, the expected order of speed."""

SLOW_TO_BUILD: frozenset[EngineName] = frozenset({"compile"})
"""Not built only to be measured: ``auto`` takes one if an earlier measurement found it the fastest."""

PRECISIONS: dict[str, tuple[torch.dtype, ...]] = {
    "fused": (torch.float16, torch.bfloat16),
    "gluon": (torch.float16,),
    "onnxruntime": (torch.float32,),
    "openvino": (torch.bfloat16,),
}
"""Of the engines that do not run at every one."""

_RUNS = 3
_SECONDS = 0.5

_LARGEST_ERROR, _LEAST_ERROR = 0.15, 2.0
"""Root mean square that two engines may differ by: a share of the picture's standard deviation, or steps of 255.

Of that deviation float16 took 0.7 % at most and bfloat16 10 % (both simulated in float32, on seeded and trained
networks), upsampling without aligned corners 22 % at the least."""

Figures = dict[str, float]
"""Milliseconds a frame of the speech half, by engine; infinite for one that failed."""


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
            precision and set of versions, and remembers.
        exact: float32 arithmetic with TF32 off.
        precision: of weights and activations; None means float32 on the CPU and where ``exact``, else float16. A CPU
            takes bfloat16, too, if it multiplies that and OpenVINO is installed.

    Raises:
        DeviceError: an engine that does not run on ``device`` or at ``precision``, or an unknown name.
    """
    if engine not in ENGINES:
        raise DeviceError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "torch":
        engine = "eager"
    dtype = find_dtype(device, exact=exact, precision=precision)
    if engine != "auto":
        return _build(engine, network, device, dtype)
    figures = measured(network, device, dtype)
    if figures is None:
        names = [name for name in candidates(device, dtype) if name not in SLOW_TO_BUILD]
        logger.info("engine: measuring %s on %s, once for this kind of network", " and ".join(names), device)
        figures, built = measure(network, device, dtype, names)
        remember(network, device, dtype, figures)
    else:
        built = {}
    name = min(figures, key=lambda one: figures[one])
    for failed in (failed for failed, ms in figures.items() if math.isinf(ms) and not built):
        note_fallback(f"engine {failed} failed when it was measured: {name} runs instead")
    chosen = built.get(name) or _build(name, network, device, dtype)
    told = ", ".join(f"{name} {ms:.1f}" for name, ms in figures.items())
    logger.debug("engine %s on %s, %s: fastest of %s ms a frame", chosen.name, device, dtype, told)
    return chosen


def candidates(device: torch.device, dtype: torch.dtype) -> list[EngineName]:
    """Engines that may run on a device in a type, the expected order of speed."""
    return [name for name in CANDIDATES[device.type] if dtype in PRECISIONS.get(name, (dtype,))]


def find_dtype(device: torch.device, *, exact: bool, precision: Precision | None) -> torch.dtype:
    """The type an engine computes in.

    Raises:
        DeviceError: half precision with ``exact`` or on a CPU that is not made for it, or an unknown precision.
    """
    if precision is None:
        precision = "float32" if exact or device.type == "cpu" else "float16"
    if precision not in ("float32", "float16", "bfloat16"):
        raise DeviceError(f"precision is {precision!r}; expected float32, float16 or bfloat16")
    if precision != "float32" and exact:
        raise DeviceError(f"precision is {precision!r}; expected float32 with exact")
    if precision == "float16" and device.type == "cpu":
        raise DeviceError(f"precision is {precision!r}; expected float32 or bfloat16 on a CPU")
    if precision == "bfloat16" and device.type == "cpu" and (reason := openvino_cpu.obstacle()):
        raise DeviceError(f"precision is {precision!r}; expected float32 on this CPU: {reason}")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision]


def _build(name: str, network: UNet328, device: torch.device, dtype: torch.dtype) -> Engine:
    if name not in CANDIDATES[device.type]:
        wanted = "cpu" if device.type == "cuda" else "cuda"
        raise DeviceError(f"engine is {name!r} and device {str(device)!r}; expected device {wanted!r} with this engine")
    precisions = PRECISIONS.get(name, (dtype,))
    if dtype not in precisions:
        names = [str(one).removeprefix("torch.") for one in (dtype, *precisions)]
        raise DeviceError(
            f"engine is {name!r} and precision {names[0]!r}; expected {' or '.join(names[1:])} with this engine"
        )
    if name == "onnxruntime":
        return OnnxRuntimeEngine(network)
    if name == "openvino":
        return OpenVinoEngine(network)
    if name == "eager":
        return EagerEngine(network, device=device, dtype=dtype)
    if name == "fused":
        from gpupipe.engines.fused import FusedEngine  # noqa: PLC0415 - loads Triton

        return FusedEngine(network, device=device, dtype=dtype)
    if name == "gluon":
        if reason := gluon_obstacle():
            raise DeviceError(f"engine is 'gluon': {reason}")
        from gpupipe.engines.gluon import GluonEngine  # noqa: PLC0415 - loads Triton

        return GluonEngine(network, device=device, dtype=dtype)
    if reason := compiled.obstacle(device):
        raise DeviceError(f"engine is 'compile': {reason}")
    return CompiledEngine(network, device=device, dtype=dtype)


# ── the measurement ───────────────────────────────────────────────────────────────────────────────────────────────────


def measure(
    network: UNet328, device: torch.device, dtype: torch.dtype, names: list[EngineName]
) -> tuple[Figures, dict[str, Engine]]:
    """Time the speech half of each engine with the template's half cached, as it runs when frames come round again.

    An engine that fails, or paints something else than the plainest one, is noted as a fallback and counts as
    infinitely slow.

    Args:
        names: the expected order of speed. They are built the other way round: the plainest first, to which the others
            are held.

    Returns:
        the figures, and the engines that work.

    Raises:
        DeviceError: no engine works; the message gives each one's reason.
    """
    figures: Figures = {}
    built: dict[str, Engine] = {}
    reasons: list[str] = []
    plain: Tensor | None = None
    for name in reversed(names):
        try:
            engine = _build(name, network, device, dtype)
            levels = _levels(engine, network)
            if plain is not None and not _agree(levels, plain):
                raise DeviceError("paints something else than the network")
            figures[name] = 1000 * _seconds(engine, network)
        except Exception as error:  # compilers raise what they like
            reasons.append(f"{name}: {first_line(error)}")
            figures[name] = math.inf
            continue
        built[name] = engine
        plain = levels if plain is None else plain
    if not built:
        raise DeviceError(f"no engine works on {device}: {'; '.join(reasons)}")
    for reason in reasons:
        note_fallback(f"engine {reason}: {min(figures, key=lambda name: figures[name])} runs instead")
    return figures, built


@torch.inference_mode()
def _seconds(engine: Engine, network: UNet328) -> float:
    """Seconds a frame, the best of a few runs."""
    image, index, audio = _batch(engine, network)
    features = engine.encode(image)

    def once() -> float:
        start = time.perf_counter()
        engine.decode(features, index, audio)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return time.perf_counter() - start

    return _best(once) / len(index)


@torch.inference_mode()
def _levels(engine: Engine, network: UNet328) -> Tensor:
    """Mouths for the same random batch whichever the engine, float32 in steps of 255, on the CPU."""
    image, index, audio = _batch(engine, network)
    mouth = engine.decode(engine.encode(image), index, audio).cpu()
    return mouth.float() * (1 if mouth.dtype == torch.uint8 else 255)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two mouths differ as little as half precision explains: by far less than the picture varies."""
    error, variation = (found - expected).square().mean().sqrt(), expected.std()
    return bool(error <= max(_LARGEST_ERROR * float(variation), _LEAST_ERROR))


def _batch(engine: Engine, network: UNet328) -> tuple[Tensor, Tensor, Tensor]:
    """Image, index and audio of a batch of the device's size."""
    batch, generator = BATCH_SIZES[engine.device.type], torch.Generator().manual_seed(0)
    image = torch.rand(batch, 6, INPUT_SIZE, INPUT_SIZE, generator=generator).to(engine.device, engine.dtype)
    audio = torch.rand(batch, *network.audio_shape, generator=generator).to(engine.device, engine.dtype)
    return image, torch.arange(batch, device=engine.device), audio


def _best(once: Callable[[], float]) -> float:
    once()  # the first call allocates and tunes
    times: list[float] = []
    while len(times) < _RUNS or (sum(times) < _SECONDS and len(times) < 10 * _RUNS):
        times.append(once())
    return min(times)


# ── what is remembered ────────────────────────────────────────────────────────────────────────────────────────────────


def cache_file() -> Path:
    """Where measurements are kept: ``$GPUPIPE_CACHE``, or ``gpupipe`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpupipe"
    return Path(os.environ.get("GPUPIPE_CACHE") or default) / "engines.json"


def measured(network: UNet328, device: torch.device, dtype: torch.dtype) -> Figures | None:
    """What an earlier measurement of the same kind found, or None."""
    figures = _read().get(_key(network, device, dtype))
    if not isinstance(figures, dict) or not figures:
        return None
    known = {
        name: float("inf") if ms is None else ms for name, ms in figures.items() if name in CANDIDATES[device.type]
    }
    return known if all(isinstance(ms, int | float) for ms in known.values()) and known else None


def remember(network: UNet328, device: torch.device, dtype: torch.dtype, figures: Figures) -> None:
    """Add to the file; a folder that cannot be written only means measuring again."""
    path = cache_file()
    kept = _read()
    kept[_key(network, device, dtype)] = {
        name: None if math.isinf(ms) else round(ms, 4) for name, ms in figures.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n")
    except (OSError, OutputError) as error:
        logger.debug("%s: not written: %s", path, error)


def _read() -> dict[str, object]:
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _key(network: UNet328, device: torch.device, dtype: torch.dtype) -> str:
    """All that a measurement depends on."""
    packages = versions()
    lanes = f", {cpu_lanes().threads} threads" if device.type == "cpu" else f", batch {BATCH_SIZES['cuda']}"
    names = ("gpupipe", "torch", "onnxruntime", "openvino") if device.type == "cpu" else ("gpupipe", "torch", "triton")
    parts = [device_name(device) + lanes, f"{network.mode}, width {network.width:g}", str(dtype).removeprefix("torch.")]
    return " | ".join(parts + [f"{name} {packages[name]}" for name in names])
