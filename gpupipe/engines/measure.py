"""How fast engines are here, and whether they all paint the same."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from gpupipe.engines.base import BATCH_SIZES, Declaration, Engine
from gpupipe.errors import DeviceError, first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.graphs import replayed
from gpupipe.lanes import map_in_lanes
from gpupipe.memory import out_of_memory
from gpupipe.models.unet328 import UNet328, random_inputs

_RUNS = 3
_SECONDS = 0.5

_LARGEST_ERROR = {torch.float32: 0.01, torch.float16: 0.08, torch.bfloat16: 0.15}
"""By precision: the root mean square by which an engine may differ from the plainest, as a share of the picture's
standard deviation.

For scale: rounding layers' outputs to float16 costs at most 0.7 % of it, and to bfloat16 10 % (simulated on a CPU, with
seeded and trained weights). float16 is allowed more because kernels also add a depthwise convolution's nine taps in
float16, which that leaves out. A wrong network (align_corners=False) differs by at least 22 %."""

_LEAST_ERROR = 1.5
"""In steps of 255. This much is always allowed, however little the picture varies: uint8 alone costs 0.3."""

_WINDOW = 20
"""Pixels a side. In each such window twice that error is allowed, and no more: in the mean over a batch, one tile that
a kernel gets wrong is lost. In the worst window rounding to bfloat16 costs 15 % of the deviation."""

Figures = dict[str, float]
"""Milliseconds per frame of the speech half, by engine; infinite for an engine that failed."""


class Measured(NamedTuple):
    """What a measurement found.

    Attributes:
        figures: of all engines.
        engines: those that work.
        passing: names of those that failed, but need not fail next time: there was no memory, or they did not paint
            what the plainest one paints from these weights.
    """

    figures: Figures
    engines: dict[str, Engine]
    passing: set[str]

    @property
    def lasting(self) -> Figures:
        """The figures to be remembered."""
        return {name: ms for name, ms in self.figures.items() if name not in self.passing}


def measure(network: UNet328, device: torch.device, dtype: torch.dtype, engines: Sequence[Declaration]) -> Measured:
    """Time each engine's speech half with the template's half cached, which is how most frames of a clip are rendered.

    An engine that fails, or does not paint what the plainest one paints, is noted as a fallback and counts as
    infinitely slow.

    Args:
        engines: in the expected order of speed. They are built in reverse: the plainest comes first, and the others
            are compared with it.

    Raises:
        DeviceError: no engine works; the message gives the reason for each.
    """
    figures: Figures = {}
    built: dict[str, Engine] = {}
    passing: set[str] = set()
    reasons: list[str] = []
    plain: Tensor | None = None

    def measure_one(declared: Declaration) -> None:
        nonlocal plain
        name = declared.name
        try:
            engine = declared.build(network, device, dtype)
            levels = _levels(engine, network)
            if plain is not None:
                if not _agree(levels, plain, dtype):
                    raise _PaintsOtherwise("paints something else than the network")
                if not torch.equal(_levels(engine, network), levels):  # engines are deterministic, so threads race
                    raise DeviceError("does not paint the same twice")
            figures[name] = 1000 * _seconds(engine, network)
        except Exception as error:  # compilers raise what they like
            reasons.append(f"{name}: {first_line(error)}")
            figures[name] = math.inf
            if out_of_memory(error) or isinstance(error, OSError | _PaintsOtherwise):
                passing.add(name)
            return
        built[name] = engine
        plain = levels if plain is None else plain

    ordered = reversed(engines)
    # On a CPU as by a render, in which PyTorch keeps to one core.
    deque(map_in_lanes(measure_one, ordered, 1) if device.type == "cpu" else map(measure_one, ordered), maxlen=0)
    if not built:
        raise DeviceError(f"no engine works on {device}: {'; '.join(reasons)}")
    for reason in reasons:
        note_fallback(f"engine {reason}: {fastest(figures)} runs instead")
    return Measured(figures, built, passing)


class _PaintsOtherwise(DeviceError):
    """An engine's mouths differ from the plainest one's."""


def fastest(figures: Figures) -> str:
    """The engine that took the least time."""
    return min(figures, key=lambda name: figures[name])


@torch.inference_mode()
def _seconds(engine: Engine, network: UNet328) -> float:
    """Seconds per frame, in the best of a few runs."""
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
    """Mouths for a random batch that is the same for all engines: float32, in steps of 255."""
    image, index, audio = _batch(engine, network)
    mouth = engine.decode(engine.encode(image), index, audio)
    # Truncation to uint8 takes off half a step on average.
    return mouth.float() + 0.5 if mouth.dtype == torch.uint8 else 255 * mouth.float()


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether mouths (B, 3, H, W) differ no more than rounding to ``dtype`` explains, overall and in each window."""
    allowed = max(_LARGEST_ERROR[dtype] * float(expected.std()), _LEAST_ERROR)
    error = (found - expected).square().mean(dim=1)
    worst = avg_pool2d(error, _WINDOW, stride=_WINDOW // 2).max()
    return bool(error.mean().sqrt() <= allowed) and bool(worst.sqrt() <= 2 * allowed)


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
