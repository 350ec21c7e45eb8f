"""Tiles of the network's Triton kernels: which would be fastest on this GPU, and by how much.

``python -m gpupipe.benchmarks.bench_tiles [--seconds 200] [--record]``, on CUDA. The tiles in use (``pointwise_tiles``,
``projection_tile`` and the like in ``kernels/``) were chosen because they compile without spilling on every
architecture; a compiler cannot say whether they are fast. Here the fused engine's two halves run once, and each launch
is noted with its arguments. Then, the slowest launch first, the search moves from its tile to the fastest neighbour, in
which one size is halved or doubled, until no neighbour is faster or the time is up.

This changes nothing: to use a tile that wins, write it into those functions, provided that ``python -m
gpupipe.kernels.report`` finds no spill with it on other architectures.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpupipe.benchmarks.common import Row, Spread, add_record_options, append_rows, row
from gpupipe.benchmarks.kernel_bench import seconds_of
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.fused import FusedEngine, with_kernels_compiled
from gpupipe.kernels import depthwise_triton, inverted_residual_triton, pointwise_triton
from gpupipe.kernels.launch_triton import compile_together
from gpupipe.lanes import available_cores
from gpupipe.models.unet328 import INPUT_SIZE

Sizes = dict[str, int]
"""A tile and how it is launched, by name: pixels, channels, warps, stages."""

WORTH = 0.98
"""The search moves to a neighbour that takes at most this share of the time: a smaller gain is noise."""

AGREE = 0.02
"""How far a tile's result may be from that of the tile in use, as a share of the latter's largest value."""


_STAGES = 5
"""The most stages of a loop that may be pipelined. One that computes the left side of its products, as upsampling does,
is not: compiled code has been seen to overwrite what Hopper's products still read (triton-lang/triton, issue 9433)."""


@dataclass(frozen=True)
class Launcher:
    """A function that launches a kernel.

    Attributes:
        module: where it is.
        name: of the function.
        tiles: name of the function that it asks for a tile.
        most: takes the arguments of that function; returns the largest sizes that the tile's channels can have.
    """

    module: ModuleType
    name: str
    tiles: str
    most: Callable[..., Sizes]


LAUNCHERS = (
    Launcher(
        pointwise_triton,
        "pointwise_triton",
        "pointwise_tiles",
        lambda k, n, *, pipelined, **_: {"BLOCK_K": k, "BLOCK_N": n, "num_stages": _STAGES if pipelined else 1},
    ),
    Launcher(
        pointwise_triton,
        "upsample_expand_triton",
        "upsample_tiles",
        lambda low, skip, n: {"BLOCK_LOW": low, "BLOCK_SKIP": skip, "BLOCK_N": n, "num_stages": 1},
    ),
    Launcher(depthwise_triton, "depthwise_triton", "depthwise_tile", lambda hidden: {"chunk": hidden}),
    Launcher(depthwise_triton, "depthwise_project_triton", "projection_tile", lambda hidden, out: {"chunk": hidden}),
    Launcher(
        inverted_residual_triton,
        "inverted_residual_triton",
        "block_tile",
        lambda channels, hidden, outputs: {"chunk": hidden},
    ),
)


class Launch:
    """One of the network's launches, which can be repeated with another tile.

    Attributes:
        times: how often the network makes it, or one of the same shapes.
        tile: the one in use.
        most: the largest sizes that the tile's channels can have, by name.
    """

    def __init__(self, launcher: Launcher, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.times = 0
        self._launcher, self._arguments, self._options = launcher, arguments, options
        asked: list[tuple[Sizes, Sizes]] = []
        in_use = getattr(launcher.module, launcher.tiles)

        def asking(*question: int, **more: Any) -> Any:
            tile = in_use(*question, **more)
            sizes = tile if isinstance(tile, dict) else tile._asdict()
            asked.append((sizes, launcher.most(*question, **more)))
            return tile

        with mock.patch.object(launcher.module, launcher.tiles, asking):
            self._expected = self()
        [(self.tile, self.most)] = asked
        self._scale = float(self._expected.abs().max())

    def __call__(self) -> Tensor:
        """Launch with the tile that the kernel's own function gives."""
        result: Tensor = getattr(self._launcher.module, self._launcher.name)(*self._arguments, **self._options)
        return result

    def __str__(self) -> str:
        given, made = ("×".join(map(str, tensor.shape)) for tensor in (self._arguments[0], self._expected))
        return f"{self._launcher.name.removesuffix('_triton')} {given} → {made}"

    def compile(self, tiles: Sequence[Sizes]) -> None:
        """Compile the kernel with each tile, on all cores. :meth:`seconds` tells of those that do not compile."""

        def launch_each() -> None:
            for tile in tiles:
                with contextlib.suppress(Exception), self._given(tile):
                    self()

        compile_together(launch_each, available_cores())

    def _given(self, tile: Sizes) -> AbstractContextManager[object]:
        """Within this context ``tile`` is in use."""
        given = self._launcher.module.Tile(**tile) if "chunk" in tile else tile
        return mock.patch.object(self._launcher.module, self._launcher.tiles, lambda *_, **__: given)

    def seconds(self, tile: Sizes) -> float:
        """Seconds with ``tile``; infinity where it does not compile, does not fit or gives a wrong result."""
        with self._given(tile):
            try:
                result = self()
                error = float((result.float() - self._expected.float()).abs().max())
                if not error <= AGREE * self._scale:
                    return math.inf
                return seconds_of(self, result.device, rounds=3).p50
            except Exception:  # compilers and drivers raise what they like: the next tile is tried
                return math.inf


def recorded(run: Callable[[], object]) -> list[Launch]:
    """The launches that ``run`` makes; those of equal shapes stand for one another."""
    launches: dict[tuple[Any, ...], Launch] = {}
    with contextlib.ExitStack() as stack:
        for launcher in LAUNCHERS:
            original = getattr(launcher.module, launcher.name)

            def noting(
                *arguments: Any, _launcher: Launcher = launcher, _original: Any = original, **options: Any
            ) -> Tensor:
                key = (_launcher.name, _shapes(arguments), _shapes(sorted(options.items())))
                if key not in launches:
                    with mock.patch.object(_launcher.module, _launcher.name, _original):
                        launches[key] = Launch(_launcher, arguments, options)
                launches[key].times += 1
                result: Tensor = _original(*arguments, **options)
                return result

            stack.enter_context(mock.patch.object(launcher.module, launcher.name, noting))
        run()
    return list(launches.values())


def neighbours(tile: Sizes, most: Sizes) -> Iterator[Sizes]:
    """Tiles with one size halved or doubled (stages: one less or more), no smaller than tensor cores need.

    Args:
        most: the largest sizes, by name.
    """
    for name, size in tile.items():
        lower, upper = {"num_stages": (1, _STAGES), "num_warps": (1, 8), "warps": (1, 8)}.get(name, (16, 256))
        for other in (size - 1, size + 1) if name == "num_stages" else (size // 2, size * 2):
            if lower <= other <= min(upper, most.get(name, upper)):
                yield {**tile, name: other}


def descend(
    tile: Sizes,
    most: Sizes,
    seconds: Callable[[Sizes], float],
    *,
    deadline: float,
    prepare: Callable[[list[Sizes]], object] = lambda tiles: None,
) -> tuple[Sizes, float]:
    """Go downhill from ``tile`` to one that no neighbour beats; returns that tile and its seconds.

    Args:
        most: see :func:`neighbours`.
        seconds: what a tile takes.
        deadline: by ``time.monotonic``; from then on no other tile is tried.
        prepare: given the tiles that are tried next.
    """
    best, least = tile, seconds(tile)
    tried = [tile]
    while True:
        here, start = best, least
        others = [other for other in neighbours(here, most) if other not in tried]
        if time.monotonic() < deadline:
            prepare(others)
        for other in others:
            if time.monotonic() >= deadline:
                return best, least
            tried.append(other)
            if (took := seconds(other)) < least:
                best, least = other, took
        if best == here or least > WORTH * start:
            return here, start


def _shapes(values: Any) -> Any:
    """``values``, in which each tensor is replaced by its shape."""
    if isinstance(values, Tensor):
        return tuple(values.shape)
    return tuple(map(_shapes, values)) if isinstance(values, (tuple, list)) else values


def _network(device: torch.device, batch: int) -> Callable[[], object]:
    """The fused engine's two halves at full width."""
    network = seeded_network(width=1)
    engine = with_kernels_compiled(FusedEngine(network, device=device), network)
    image = torch.rand(batch, 6, INPUT_SIZE, INPUT_SIZE, device=device).half()
    image = image.contiguous(memory_format=torch.channels_last)
    index, audio = torch.arange(batch, device=device), torch.randn(batch, 32, 16, 16, device=device)
    return lambda: engine.decode(engine.encode(image), index, audio)


def rows_of(launch: Launch, batch: int, device: torch.device, *, deadline: float) -> list[Row]:
    """A launch's time with the tile in use and, where a faster one was found, with that."""
    fastest, _ = descend(launch.tile, launch.most, launch.seconds, deadline=deadline, prepare=launch.compile)
    found = {"in use": (launch.tile, launch.seconds(launch.tile))}
    if fastest != launch.tile:  # measured again: of many measurements the least is too low
        found["fastest"] = (fastest, launch.seconds(fastest))
    return [
        row(
            Spread.of([took * 1e6]),
            what="tiles",
            provider=which,
            metric="latency",
            unit="µs/launch",
            axis="batch",
            value=batch,
            config={"case": str(launch), "times": launch.times, "tile": tile},
            device=device,
        )
        for which, (tile, took) in found.items()
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=200, help="time limit of the search")
    add_record_options(parser)
    options = parser.parse_args()
    device, deadline = torch.device(options.device), time.monotonic() + options.seconds
    in_use = fastest = 0.0
    with torch.inference_mode():
        launches = recorded(_network(device, options.batch))
        for launch in sorted(launches, key=lambda one: -one.times * one.seconds(one.tile)):
            rows = rows_of(launch, options.batch, device, deadline=deadline)
            before, after = rows[0].p50 or 0.0, rows[-1].p50 or 0.0
            in_use, fastest = in_use + launch.times * before, fastest + launch.times * after
            tiles = " → ".join(" ".join(f"{name} {size}" for name, size in one.config["tile"].items()) for one in rows)
            print(f"{launch!s:58} {launch.times}× {before:8.1f} → {after:8.1f} µs  {tiles}", flush=True)
            if options.record:
                append_rows(rows, options.results)
    each = options.batch
    print(f"all launches: {in_use / each:.2f} → {fastest / each:.2f} µs a frame, template half included")


if __name__ == "__main__":
    main()
