"""The search for faster tiles: where it goes, and what it takes for a launch of the network's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from gpupipe.benchmarks import bench_tiles
from gpupipe.benchmarks.bench_tiles import Sizes, descend, neighbours
from gpupipe.benchmarks.common import read_rows
from gpupipe.kernels import depthwise_triton, inverted_residual_triton, pointwise_triton
from gpupipe.kernels.inverted_residual import pack_block
from gpupipe.kernels.launch_triton import launches_taken

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEVER = math.inf
TILE = {"columns": 32, "chunk": 32, "warps": 4}


def test_neighbours_differ_by_one_size_and_stay_within_the_channels() -> None:
    tiles = [tuple(tile.values()) for tile in neighbours(TILE, {"chunk": 32})]
    assert tiles == [(16, 32, 4), (64, 32, 4), (32, 16, 4), (32, 32, 2), (32, 32, 8)]
    assert [tile["num_stages"] for tile in neighbours({"num_stages": 3}, {})] == [2, 4]
    assert list(neighbours({"BLOCK_M": 16, "num_warps": 8}, {})) == [
        {"BLOCK_M": 32, "num_warps": 8},
        {"BLOCK_M": 16, "num_warps": 4},
    ]


def test_the_search_goes_downhill_to_the_fastest_tile() -> None:
    tried: list[Sizes] = []
    prepared = [TILE]

    def seconds(tile: Sizes) -> float:
        assert tile in prepared
        tried.append(tile)
        return abs(math.log2(tile["columns"] / 128)) + abs(math.log2(tile["warps"] / 2)) + 1

    fastest, least = descend(TILE, {"chunk": 32}, seconds, deadline=NEVER, prepare=prepared.extend)
    assert (fastest, least) == ({"columns": 128, "chunk": 32, "warps": 2}, 1)
    assert len(tried) == len({tuple(tile.values()) for tile in tried}), "a tile was compiled twice"
    assert tried == prepared


def test_a_tile_that_fails_or_gains_next_to_nothing_is_not_taken() -> None:
    assert descend(TILE, {}, lambda tile: 1.0 if tile == TILE else math.inf, deadline=NEVER) == (TILE, 1.0)
    assert descend(TILE, {}, lambda tile: 1.0 if tile == TILE else 0.99, deadline=NEVER) == (TILE, 1.0)
    assert descend(TILE, {}, lambda tile: 1.0 if tile == TILE else 0.9, deadline=NEVER)[1] == 0.9
    assert descend(TILE, {}, lambda tile: math.inf, deadline=NEVER) == (TILE, math.inf)
    wide = {**TILE, "columns": 64}
    speeds = {(32, 32, 4): 1.0, (64, 32, 4): 0.5}
    assert descend(TILE, {}, lambda tile: speeds.get(tuple(tile.values()), 0.9), deadline=NEVER) == (wide, 0.5)


def test_the_search_ends_with_its_time() -> None:
    tried: list[Sizes] = []

    def seconds(tile: Sizes) -> float:
        tried.append(tile)
        return 1 / len(tried)

    assert descend(TILE, {}, seconds, deadline=time.monotonic(), prepare=tried.extend) == (TILE, 1.0)
    assert tried == [TILE], "nothing more is compiled, either"


def test_the_slowest_launch_is_first_and_each_counts_as_often_as_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Made:
        """Stands in for a launch: the fewer columns, the faster, down to 16."""

        most: ClassVar = {"columns": 32}

        def __init__(self, name: str, times: int, microseconds: float) -> None:
            self.name, self.times, self.tile, self._each = name, times, {"columns": 32}, microseconds

        def __str__(self) -> str:
            return self.name

        def compile(self, tiles: list[Sizes]) -> None:
            pass

        def seconds(self, tile: Sizes) -> float:
            return self._each * 1e-6 * tile["columns"] / 32

    made = [Made("short", 1, 100), Made("often", 4, 60), Made("long", 2, 80)]
    monkeypatch.setattr(bench_tiles, "_network", lambda device, batch: None)
    monkeypatch.setattr(bench_tiles, "recorded", lambda run: made)
    words = ["--device", "cpu", "--batch", "10", "--record", "--results"]
    for seconds, fastest in ((60, 16), (0, 32)):
        results = tmp_path / str(seconds)
        monkeypatch.setattr("sys.argv", ["bench_tiles", *words, str(results), "--seconds", str(seconds)])
        bench_tiles.main()
        found = [(row["config"]["case"], row["provider"], row["p50"], row["unit"]) for row in read_rows(results)]
        expected = []
        for name, each in (("often", 60), ("long", 80), ("short", 100)):
            expected += [(name, "in use", pytest.approx(each), "µs/launch")]
            expected += [(name, "fastest", pytest.approx(each / 2), "µs/launch")] if fastest == 16 else []
        assert found == expected
        total = "50.00 → 25.00" if fastest == 16 else "50.00 → 50.00"
        assert f"all launches: {total} µs a frame" in capsys.readouterr().out


@torch.inference_mode()
def test_launches_are_made_again_with_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 8, 16).to(DEVICE, torch.float16)
    convolutions = [nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 16, 1)]
    block = pack_block(convolutions, device=DEVICE, dtype=torch.float16)

    def run() -> torch.Tensor:
        hidden = pointwise_triton.pointwise_triton(x, block.expand, block.expand_bias, relu=True)
        pointwise_triton.pointwise_triton(hidden, block.projection.project, block.projection.project_bias)
        depthwise_triton.depthwise_project_triton(hidden, block.projection)
        pointwise_triton.pointwise_triton(x, block.expand, block.expand_bias, relu=True)
        return inverted_residual_triton.inverted_residual_triton(x, block)

    monkeypatch.setattr(pointwise_triton, "can_pipeline", lambda device: True)
    launches = bench_tiles.recorded(run)
    assert {str(launch): launch.times for launch in launches} == {
        "pointwise 2×8×8×16 → 2×8×8×32": 2,
        "pointwise 2×8×8×32 → 2×8×8×16": 1,
        "depthwise_project 2×8×8×32 → 2×8×8×16": 1,
        "inverted_residual 2×8×8×16 → 2×8×8×16": 1,
    }
    assert [launch.most for launch in launches] == [
        {"BLOCK_K": 16, "BLOCK_N": 32, "num_stages": 5},
        {"BLOCK_K": 32, "BLOCK_N": 16, "num_stages": 5},
        {"chunk": 32},
        {"chunk": 32},
    ]
    for launch in launches:
        other = next(neighbours(launch.tile, launch.most))
        assert 0 < launch.seconds(other) < math.inf, (str(launch), other)
    # What cannot be compiled, or gives something else, takes for ever.
    assert launch.seconds({**launch.tile, "chunk": 12}) == math.inf
    monkeypatch.setattr(launch, "_expected", 1.1 * run())
    assert launch.seconds(launch.tile) == math.inf
    monkeypatch.setattr(launch, "_expected", math.nan * run())
    assert launch.seconds(launch.tile) == math.inf, "NaN"

    taken: list[int] = []

    def compile_one_by_one(step: Callable[[], object], threads: int) -> None:
        with launches_taken(lambda kernel, grid, *arguments, **options: taken.append(options["CHUNK"])):
            step()

    monkeypatch.setattr(bench_tiles, "compile_together", compile_one_by_one)
    launch.compile([{**launch.tile, "chunk": chunk} for chunk in (16, 32)])
    assert taken == [16, 32]
