"""How the figures change with the batch size, the resolution and the length of the clip."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpupipe.benchmarks import contestants
from gpupipe.benchmarks.common import Row, Spread, row
from gpupipe.benchmarks.contestants import Say
from gpupipe.benchmarks.scenario import Scenario, resized_template, silent_clip
from gpupipe.engines import EngineName
from gpupipe.errors import InputError

BATCHES = {"cuda": (1, 4, 16, 32, 64, 128, 256), "cpu": (1, 2, 4, 8)}
RESOLUTIONS = ((640, 360), (1280, 720), (1920, 1080), (3840, 2160))
LENGTHS = (1, 10, 60, 600, 3600)
"""Seconds."""

STUB_SIZE = (256, 144)
_TEMPLATE_FRAMES = 24
_LONG = 60
"""Clips of more seconds than this are rendered once."""


def batch_rows(
    scenario: Scenario,
    folder: Path,
    *,
    device: str,
    crf: int,
    frames: int,
    rounds: int,
    values: list[int],
    say: Say,
    engine: EngineName = "auto",
) -> Iterator[list[Row]]:
    """gpupipe end to end at several batch sizes, in turns."""
    values = values or list(BATCHES[torch.device(device).type])
    how: dict[str, Any] = {"device": device, "crf": crf, "engine": engine}
    made = [contestants.gpupipe(scenario, batch_size=size, **how) for size in values]
    for one, size in zip(made, values, strict=True):
        one.name = f"gpupipe, batch {size}"  # for progress messages

    def rows() -> list[Row]:
        found = []
        for one, size in zip(made, values, strict=True):
            one.name = "gpupipe"
            config = scenario.facts() | {"crf": crf, "frames": frames}
            told: dict[str, Any] = {"frames": frames, "config": config, "device": device}
            found += contestants.clip_rows([one], axis="batch", value=size, **told)
        return found

    yield from contestants.rows_of_turns(
        made, rows, scenario, folder, frames=frames, rounds=rounds, device=device, say=say
    )


def resolution_rows(
    scenario: Scenario,
    folder: Path,
    *,
    device: str,
    crf: int,
    frames: int,
    rounds: int,
    values: list[int],
    say: Say,
    reference: bool,
    engine: EngineName = "auto",
) -> Iterator[list[Row]]:
    """The template at several sizes: at each, the reference loop and gpupipe take turns.

    Args:
        values: heights of the sizes to take; an empty list takes all.
        reference: let the loop take part, which needs OpenCV.
        engine: gpupipe's.

    Raises:
        InputError: a height that none of the sizes has.
    """
    heights = [height for _, height in RESOLUTIONS]
    if not set(values) <= set(heights):
        raise InputError(f"heights are {', '.join(map(str, values))}; expected some of {', '.join(map(str, heights))}")
    for size in RESOLUTIONS:
        if values and size[1] not in values:
            continue
        name = f"{size[0]}×{size[1]}"
        template = resized_template(scenario.template, folder / name, size, min(frames, _TEMPLATE_FRAMES))
        resized = replace(scenario, template=template, size=size)
        made = [contestants.reference_loop(resized, device=device, crf=crf)] if reference else []
        made.append(contestants.gpupipe(resized, device=device, crf=crf, engine=engine))
        say(f"{name}:")
        config = scenario.facts() | {"crf": crf, "frames": frames, "size": list(size), "resized": True}
        told: dict[str, Any] = {"frames": frames, "config": config, "device": device, "axis": "size", "value": name}
        rows = functools.partial(contestants.clip_rows, made, **told)
        yield from contestants.rows_of_turns(
            made, rows, resized, folder, frames=frames, rounds=rounds, device=device, say=say
        )


def length_rows(
    scenario: Scenario, folder: Path, *, device: str, crf: int, rounds: int, values: list[int], say: Say
) -> Iterator[list[Row]]:
    """Everything but the network, at several lengths: a stub paints grey, the sound is silence, frames are small.

    Neither the time a frame takes nor the memory may grow with the length; an hour shows whether they do.
    """
    template = resized_template(scenario.template, folder / "small", STUB_SIZE, _TEMPLATE_FRAMES)
    small = replace(scenario, template=template, size=STUB_SIZE)
    silence: dict[str, Any] = {"fps": small.fps, "row_shape": np.load(small.features, mmap_mode="r").shape[1:]}
    for seconds in values or LENGTHS:
        frames = seconds * small.fps
        clip = silent_clip(folder, frames=frames, **silence)
        one = contestants.gpupipe(small, device=device, crf=crf, engine="eager", stub=_StubEngine)
        one.render(*silent_clip(folder, frames=contestants.WARMUP_FRAMES, **silence), folder / "clip.mp4")
        for _ in range(rounds if seconds <= _LONG else 1):
            contestants.take_turn(one, clip, folder / "clip.mp4", frames=frames, device=device)
        config = small.facts() | {"crf": crf, "network": "stub", "resized": True}
        told: dict[str, Any] = {"frames": frames, "config": config, "device": device}
        rows = contestants.clip_rows([one], axis="seconds", value=seconds, **told)
        milliseconds = Spread.of([1000 * spent / frames for spent in one.seconds])
        place: dict[str, Any] = {"what": "end_to_end", "axis": "seconds", "value": seconds, "device": device}
        facts: dict[str, Any] = {"provider": "gpupipe", "config": config | one.facts}
        rows.append(row(milliseconds, metric="time", unit="ms/frame", **place, **facts))
        say(f"{seconds} s: {milliseconds.p50:.3f} ms a frame")
        yield rows


class _StubEngine:
    """Paints grey at once: whatever is left of a render's cost is not the network's."""

    name: EngineName = "eager"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._mouth = torch.full((1, 3, 320, 320), 0.5, device=device, dtype=dtype)

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {"nothing": torch.zeros(len(image), 1, device=self.device)}

    def decode(self, features: dict[str, Tensor], index: Tensor, audio: Tensor) -> Tensor:
        """Grey."""
        return self._mouth.expand(len(index), -1, -1, -1)
