"""How compiling is timed: in turns, and recorded with what was compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gpupipe.benchmarks import bench_compilation
from gpupipe.kernels.report_network import NAMES


def test_the_ways_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, int]] = []
    monkeypatch.setattr(bench_compilation, "available_cores", lambda: 8)
    monkeypatch.setattr(
        bench_compilation, "_in_a_new_process", lambda *given: turns.append(given) or 24 / given[1] + len(turns)
    )
    words = ["--arch", "86", "--rounds", "3", "--record", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench_compilation", *words])
    bench_compilation.main()
    assert turns == [(86, 1), (86, 8), (86, 8), (86, 1), (86, 1), (86, 8)]
    (path,) = tmp_path.iterdir()
    rows = {row["value"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert {threads: (row["p50"], row["unit"], row["n"]) for threads, row in rows.items()} == {
        1: (28, "s", 3),
        8: (6, "s", 3),
    }
    assert rows[8]["config"] == {"arch": 86, "kernels": len(bench_compilation._kernels()), "mode": "ave"}


def test_it_compiles_what_the_engine_launches() -> None:
    kernels = bench_compilation._kernels()
    assert {kernel.name for kernel in kernels} == set(NAMES.values())
    assert len(kernels) > 30
