"""Instructions that the network's kernels execute per frame: each launch of an engine, compiled, executed and counted.

``python -m ptx_machine.ledger fused | gluon [--arch 90] [--batch 64] [--width 1] [--record]``, with ``tests`` on
``PYTHONPATH``; about three minutes.

Of each launch a few blocks from the middle of its grid are executed, and stand for the others, so the output is not a
picture. What is counted is PTX, of which the assembler drops most moves. The audio branch's two dense layers, which run
in cuDNN, are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is first imported

import torch

import ptx_machine.launch as launching
from gpupipe.benchmarks.common import Spread, append_rows, row
from gpupipe.engines.fused import FusedEngine
from gpupipe.kernels import inverted_residual, pointwise
from gpupipe.models import AUDIO_SHAPES
from gpupipe.models.unet328 import INPUT_SIZE, UNet328
from ptx_machine.machine import Counts, launch
from ptx_machine.program import parse


@dataclass(frozen=True)
class Entry:
    """A launch; numbers are per frame of its batch.

    Attributes:
        half: of the network, ``template`` or ``speech``.
        kernel: its name.
        grid: blocks of the batch.
        instructions, moves: warp instructions; the first include the second.
        passes: through shared memory's banks.
        sectors: of 32 bytes that loads and stores touch, caches included.
    """

    half: str
    kernel: str
    grid: tuple[int, int, int]
    instructions: float
    moves: float
    passes: float
    sectors: float


def count(engine: FusedEngine, network: UNet328, arch: int, batch: int, most: int) -> list[Entry]:
    """Every launch of both halves, in order, for an engine whose device is the CPU; ``most`` blocks are executed."""
    half, entries = "", list[Entry]()

    def sample(ptx: str, grid: tuple[int, int, int], *given: Any, **options: Any) -> None:
        counts, blocks = Counts(), grid[0] * grid[1] * grid[2]
        launch(ptx, grid, *given, **options | {"counts": counts, "most": most})
        share = blocks / min(most, blocks) / batch
        moves = sum(n for opcode, n in counts.instructions.items() if opcode.startswith("mov."))
        totals = (counts.instructions.total(), moves, counts.shared.total(), counts.sectors.total())
        entries.append(Entry(half, parse(ptx).name, grid, *(total * share for total in totals)))

    with _on_the_machine(arch, sample), torch.inference_mode():
        half = "template"
        features = engine.encode(torch.zeros(batch, 6, INPUT_SIZE, INPUT_SIZE))
        half = "speech"
        engine.decode(features, torch.arange(batch), torch.zeros(batch, *AUDIO_SHAPES[network.mode]))
    return entries


@contextlib.contextmanager
def _on_the_machine(arch: int, execute: Any) -> Iterator[None]:
    """Launch kernels whatever their tensors' device; the launches go to ``execute``."""
    with contextlib.ExitStack() as stack:
        for module in (inverted_residual, pointwise):
            stack.enter_context(mock.patch.object(module, "backend", return_value="triton"))
        stack.enter_context(mock.patch.object(launching, "launch", execute))
        stack.enter_context(launching.machine(arch))
        yield


def engine_of(name: str, network: UNet328, arch: int) -> FusedEngine:
    """``fused`` or ``gluon``, on the CPU, with a GPU's kernels."""
    cpu = torch.device("cpu")
    if name == "fused":
        return FusedEngine(network, device=cpu)
    from gpupipe.engines import gluon
    from gpupipe.kernels.whole_block_gluon import whole_block_gluon

    with mock.patch.object(gluon, "whole_block", functools.partial(whole_block_gluon, wgmma=arch == 90)):
        return gluon.GluonEngine(network, device=cpu)


def main() -> None:
    """Print a line for each launch, and the sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("engine", choices=("fused", "gluon"))
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=1.0, help="of the network")
    parser.add_argument("--blocks", type=int, default=32, help="of each launch that are executed")
    parser.add_argument("--record", action="store_true", help="append the sums to the results")
    options = parser.parse_args()
    network = UNet328("ave", width=options.width).eval()
    engine = engine_of(options.engine, network, options.arch)
    entries = count(engine, network, options.arch, options.batch, options.blocks)
    print(f"{'a frame':26}{'instructions':>12}{'moves':>12}{'passes':>12}{'MB':>8}  grid")
    for one in entries:
        print(
            f"{one.kernel.strip('_'):26}{one.instructions:12,.0f}{one.moves:12,.0f}{one.passes:12,.0f}"
            f"{one.sectors * 32 / 1e6:8.2f}  {'×'.join(map(str, one.grid))}"
        )
    rows = []
    for half in ("template", "speech"):
        of_half = [one for one in entries if one.half == half]
        instructions, moves = sum(one.instructions for one in of_half), sum(one.moves for one in of_half)
        print(f"{half}: {instructions / 1e6:.2f} million, without moves {(instructions - moves) / 1e6:.2f}")
        for metric, value in (("instructions", instructions), ("instructions without moves", instructions - moves)):
            rows.append(
                row(
                    Spread.of([value / 1e6]),
                    what="instructions",
                    provider=options.engine,
                    metric=metric,
                    unit="million/frame",
                    axis="half",
                    value=half,
                    config={"arch": options.arch, "batch": options.batch, "mode": "ave", "width": options.width},
                )
            )
    if options.record:
        append_rows(rows)


if __name__ == "__main__":
    main()
