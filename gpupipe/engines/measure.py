"""How fast engines are here, and whether they paint the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpupipe.engines.base import BATCH_SIZES, Declaration, Engine
from gpupipe.errors import DeviceError, first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.graphs import replayed
from gpupipe.models.unet328 import UNet328, random_inputs

_RUNS = 3
_SECONDS = 0.5

_LARGEST_ERROR, _LEAST_ERROR = 0.15, 2.0
"""Root mean square that two engines may differ by: a share of the picture's standard deviation, or steps of 255.

Of that deviation float16 took 0.7 % at most and bfloat16 10 % (both simulated in float32, on seeded and trained
networks), upsampling without aligned corners 22 % at the least."""

Figures = dict[str, float]
"""Milliseconds a frame of the speech half, by engine; infinite for one that failed."""


def measure(
    network: UNet328, device: torch.device, dtype: torch.dtype, engines: Sequence[Declaration]
) -> tuple[Figures, dict[str, Engine]]:
    """Time the speech half of each engine with the template's half cached, as it runs when frames come round again.

    An engine that fails, or paints something else than the plainest one, is noted as a fallback and counts as
    infinitely slow.

    Args:
        engines: the expected order of speed. They are built the other way round: the plainest first, to which the
            others are held.

    Returns:
        the figures, and the engines that work.

    Raises:
        DeviceError: no engine works; the message gives each one's reason.
    """
    figures: Figures = {}
    built: dict[str, Engine] = {}
    reasons: list[str] = []
    plain: Tensor | None = None
    for declared in reversed(engines):
        name = declared.name
        try:
            engine = declared.build(network, device, dtype)
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
        note_fallback(f"engine {reason}: {fastest(figures)} runs instead")
    return figures, built


def fastest(figures: Figures) -> str:
    """The engine that took least."""
    return min(figures, key=lambda name: figures[name])


@torch.inference_mode()
def _seconds(engine: Engine, network: UNet328) -> float:
    """Seconds a frame, the best of a few runs."""
    image, index, audio = _batch(engine, network)
    features = engine.encode(image)

    def decode() -> Tensor:
        return engine.decode(features, index, audio)

    run: Callable[[], object] = decode
    if engine.device.type == "cuda":
        with torch.cuda.device_of(index):
            run = replayed(decode)  # as by a render

    def once() -> float:
        start = time.perf_counter()
        run()
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
    batch, place = BATCH_SIZES[engine.device.type], (engine.device, engine.dtype)
    image, audio = random_inputs(network, batch)
    return image.to(*place), torch.arange(batch, device=engine.device), audio.to(*place)


def _best(once: Callable[[], float]) -> float:
    once()  # the first call allocates and tunes
    times: list[float] = []
    while len(times) < _RUNS or (sum(times) < _SECONDS and len(times) < 10 * _RUNS):
        times.append(once())
    return min(times)
