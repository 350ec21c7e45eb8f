"""What the kernels' benchmarks share: the device's own copy bandwidth, rows of time and bandwidth, and the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from gpupipe.benchmarks.common import Row, Spread, add_record_options, append_rows, measure, row
from gpupipe.engines.base import BATCH_SIZES
from gpupipe.graphs import replayed
from gpupipe.kernels import dispatch

SIZE = (1280, 720)
BOX = 182
"""As in a real template: width and height of the frames, and the side of the boxes."""

_LONGEST = 0.05
"""On CUDA calls are timed in a row: up to 20, as many as take about this many seconds together."""


def seconds_of(function: Callable[[], object], device: torch.device, *, rounds: int) -> Spread:
    """Seconds of one call. On CUDA by events around many calls in a row, see :func:`~gpupipe.graphs.replayed`."""
    if device.type != "cuda":
        return measure(function, rounds=rounds, device=device)
    alone = measure(function, rounds=1, warmup=3, device=device)
    calls = max(1, min(20, int(_LONGEST / alone.p50)))

    def several() -> None:
        for _ in range(calls):
            function()

    run = replayed(several)
    run()  # the first replay also uploads the graph
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return Spread.of(times)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for caches: the ceiling that kernels are compared with."""
    size = 1 << (30 if device.type == "cuda" else 29)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, rounds=5).p50


def rows_of(
    what: str,
    provider: str,
    function: Callable[[], object],
    *,
    frames: int,
    bytes_a_frame: int,
    config: dict[str, Any],
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Time a frame, the bandwidth that the kernel's byte budget makes of it, and its share of the copy bandwidth."""
    common: dict[str, Any] = {"what": what, "provider": provider, "axis": "batch", "value": frames, "device": device}
    try:
        seconds = seconds_of(function, device, rounds=rounds)
    except Exception as error:  # a kernel that fails is a row of the table, and the next one still runs
        reason = f"{type(error).__name__}: {error}"
        return [row(None, metric="latency", unit="µs/frame", config=config, error=reason, **common)]
    ceiling, moved = copy_bandwidth(device), bytes_a_frame * frames
    common["config"] = config | {"bytes_a_frame": bytes_a_frame, "copy_gb_s": round(ceiling / 1e9, 1)}
    share = seconds.map(lambda s: 100 * moved / s / ceiling)
    return [
        row(seconds.map(lambda s: s * 1e6 / frames), metric="latency", unit="µs/frame", **common),
        row(seconds.map(lambda s: moved / s / 1e9), metric="bandwidth", unit="GB/s", **common),
        row(share, metric="ratio", unit="% of copy bandwidth", **common),
    ]


def beside_torch(
    what: str, module: ModuleType, function: Callable[[], object], *, device: torch.device, **how: Any
) -> Iterator[list[Row]]:
    """:func:`rows_of` a kernel, then of its plain-torch reference: ``module`` chooses, by its ``backend``."""

    def plainly() -> object:
        with mock.patch.object(module, "backend", lambda device: "torch"):
            return function()

    for provider, one in {dispatch.backend(device): function, "torch": plainly}.items():
        yield rows_of(what, provider, one, device=device, **how)


def table(rows: Iterable[Row]) -> str:
    """One line for each measurement: what, who, µs a frame, GB/s, share of the copy bandwidth."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for one in rows:
        key = (one.what, one.provider, str(one.config["case"]))
        said = f"{one.p50:.4g} {one.unit}" if one.p50 is not None else f"failed: {one.error}"
        lines.setdefault(key, []).append(said)
    return "\n".join(f"{what:12} {who:7} {case:44} {', '.join(said)}" for (what, who, case), said in lines.items())


def tell(measurements: Iterable[list[Row]], results: Path | None) -> bool:
    """Print each measurement and append its rows as soon as it is made. Returns whether one failed."""
    failed = False
    for rows in measurements:
        print(table(rows), flush=True)
        failed |= any(one.error for one in rows)
        if results is not None:
            append_rows(rows, results)
    return failed


def main(description: str, cases: Callable[[torch.device, int, int], Iterable[list[Row]]]) -> None:
    """The command of a kernel's benchmark. On a CPU it uses one core, as a frame of a render does."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="frames; 64 on CUDA, 1 on the CPU")
    parser.add_argument("--rounds", type=int, default=10)
    add_record_options(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    with torch.inference_mode():
        made = cases(device, options.batch or BATCH_SIZES[device.type], options.rounds)
        if tell(made, options.results if options.record else None):
            raise SystemExit(1)


def boxes_of(batch: int, device: torch.device) -> torch.Tensor:
    """Boxes of the real size, each in another place, at odd and even pixels."""
    corner = torch.stack([300 + 3 * torch.arange(batch) % 97, 100 + 5 * torch.arange(batch) % 89], dim=1)
    return torch.cat([corner, corner + BOX], dim=1).to(device)


def frames_of(batch: int, device: torch.device) -> torch.Tensor:
    """Noise, uint8 (batch, H, W, 3)."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(256, (batch, SIZE[1], SIZE[0], 3), dtype=torch.uint8, device=device, generator=generator)
