"""How computing and encoding share a machine: what is measured, and what is made of it."""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bench_files import write_bench_files
from conftest import MakeTemplate

from gpupipe import FrameGenerationPipeline, pipeline
from gpupipe.benchmarks import bench_overlap
from gpupipe.benchmarks.bench_overlap import Cost
from gpupipe.benchmarks.common import read_rows
from gpupipe.engines.eager import EagerEngine
from gpupipe.video.encode import VideoWriter


def test_a_measurement_is_recorded_where_it_is_told(
    make_template: MakeTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = functools.partial(FrameGenerationPipeline, engine="eager")  # the others are not to be measured first
    monkeypatch.setattr(bench_overlap, "FrameGenerationPipeline", eager)
    files, results = write_bench_files(tmp_path, make_template), tmp_path / "results"
    words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    words += ["--width", "0.125", "--frames", "4", "--rounds", "1", "--record", "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["bench_overlap", *words, "--device", "cpu"])
    bench_overlap.main()
    rows = read_rows(results)
    works = ("compute", "encode", "render", "network")
    expected = {(work, metric) for work in works for metric in ("throughput", "cpu")}
    assert {(row["provider"], row["metric"]) for row in rows} == expected | {
        ("render", metric) for metric in ("ratio", "of_encoder", "least", "share")
    }
    assert all(row["value"] == 4 and row["n"] == 1 and row["p50"] > 0 for row in rows if row["metric"] != "share")
    assert {(row["config"]["template"], row["config"]["engine"]) for row in rows} == {("speaker", "eager")}
    printed = capsys.readouterr().out
    assert all(f"turn 1: {work} " in printed for work in works) and f"recorded in {results}" in printed


def test_each_work_is_all_of_it_and_no_more(
    make_template: MakeTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every turn encodes the clip's frames once, by the codec that is asked for, and the network alone runs the
    template's half only for the three frames that are shown. Every other turn is the other way round."""
    written: list[tuple[int, str]] = []
    halves: Counter[str] = Counter()
    lanes = bench_overlap.map_in_lanes

    class Writer(VideoWriter):
        """Tells how many frames it was given, and its codec."""

        def __init__(self, *given: Any, **how: Any) -> None:
            super().__init__(*given, **how)
            self._asked = how["codec"]

        def __exit__(self, *told: Any) -> None:
            super().__exit__(*told)
            written.append((self.frames, self._asked))

    def counted(function: Any, items: range) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for half in ("encode", "decode"):
                run = getattr(EagerEngine, half)
                patch.setattr(
                    EagerEngine, half, lambda *given, run=run, half=half: (halves.update([half]), run(*given))[1]
                )
            halves.clear()
            yield from lanes(function, items)

    monkeypatch.setattr(bench_overlap, "VideoWriter", Writer)
    monkeypatch.setattr(pipeline, "VideoWriter", Writer)
    monkeypatch.setattr(bench_overlap, "map_in_lanes", counted)
    monkeypatch.setattr(
        bench_overlap, "FrameGenerationPipeline", functools.partial(FrameGenerationPipeline, engine="eager")
    )
    files, results = write_bench_files(tmp_path, make_template), tmp_path / "results"
    words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    words += ["--width", "0.125", "--frames", "6", "--rounds", "3", "--codec", "mjpeg"]
    words += ["--record", "--results", str(results), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench_overlap", *words])
    bench_overlap.main()
    assert written == [(6, "mjpeg")] * 6
    assert halves == {"encode": 3, "decode": 6}
    assert {(row["config"]["codec"], row["config"]["width"]) for row in read_rows(results)} == {("mjpeg", 0.125)}
    turns = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("turn ")]
    works = ["compute", "encode", "render", "network"]
    assert turns == works + works[::-1] + works


@pytest.mark.cuda
@pytest.mark.parametrize("codec", ["auto", "mjpeg"])
def test_a_gpu_s_encoder_is_measured_alone(
    codec: str, make_template: MakeTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = functools.partial(FrameGenerationPipeline, engine="eager")
    monkeypatch.setattr(bench_overlap, "FrameGenerationPipeline", eager)
    files, results = write_bench_files(tmp_path, make_template), tmp_path / "results"
    words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    words += ["--width", "0.125", "--frames", "4", "--rounds", "1", "--record", "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["bench_overlap", *words, "--device", "cuda", "--codec", codec])
    bench_overlap.main()
    rows = read_rows(results)
    assert {(row["provider"], row["metric"]) for row in rows if row["provider"] == "render"} == {
        ("render", metric) for metric in ("throughput", "cpu", "ratio", "of_encoder")
    }
    assert all(row["config"]["codec"] for row in rows)


def test_the_ratios_are_those_of_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a turn's slower half alone."""
    monkeypatch.setattr(bench_overlap, "available_cores", lambda: 2)
    costs = {
        "compute": [Cost(4, 6), Cost(1, 2)],
        "encode": [Cost(2, 2), Cost(5, 4)],
        "render": [Cost(6, 8), Cost(10, 8)],
        "network": [Cost(3, 4), Cost(3, 2)],
    }
    rows = {(row.provider, row.metric): row for row in bench_overlap._rows(costs, {}, argparse.Namespace(frames=20))}
    metrics = ("ratio", "least", "share", "of_encoder")
    told = {metric: (rows["render", metric].p20, rows["render", metric].p80) for metric in metrics}
    low, high = 0.2, 0.8  # of the way between the two turns
    expected = {"ratio": (1.5, 2.0), "least": (0.6, 1.0), "share": (50, 75), "of_encoder": (100 / 3, 50)}
    for metric, (least, most) in expected.items():
        assert told[metric] == pytest.approx([least + part * (most - least) for part in (low, high)]), metric
    assert rows["encode", "throughput"].p50 == pytest.approx((10 + 4) / 2)
    assert rows["compute", "cpu"].p50 == pytest.approx(1000 * 4 / 20)
