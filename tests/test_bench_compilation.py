"""How compiling is timed: in turns, and recorded with what was compiled."""

from __future__ import annotations

import json
import os
import threading
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


def test_each_turn_compiles_all_kernels_into_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many threads at once as it says."""
    both, caches = threading.Barrier(2), []

    def compiled(kernel: str, arch: int) -> None:
        both.wait(20)
        folder = os.environ["TRITON_CACHE_DIR"]
        caches.append((kernel, arch, folder, *Path(folder).iterdir()))

    monkeypatch.setenv("TRITON_CACHE_DIR", "the user's")
    monkeypatch.setattr(bench_compilation, "_kernels", lambda: ["a", "b"])
    monkeypatch.setattr(bench_compilation, "compiled_kernel", compiled)
    assert 0 < bench_compilation._seconds(86, 2) < 60
    assert {(kernel, arch, *held) for kernel, arch, _, *held in caches} == {("a", 86), ("b", 86)}
    first = caches[0][2]
    bench_compilation._seconds(86, 2)
    assert len({first, caches[-1][2], "the user's"}) == 3

    def fail(kernel: str, arch: int) -> None:
        raise RuntimeError("ptxas failed")

    monkeypatch.setattr(bench_compilation, "compiled_kernel", fail)
    with pytest.raises(RuntimeError, match="ptxas failed"):
        bench_compilation._seconds(86, 1)


def test_it_compiles_what_the_engine_launches() -> None:
    kernels = bench_compilation._kernels()
    assert {kernel.name for kernel in kernels} == set(NAMES.values())
    assert len(kernels) > 30
