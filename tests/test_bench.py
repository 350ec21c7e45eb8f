"""`gpupipe bench`: what is measured is what it says, on networks so small that it takes seconds."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_files import BenchFiles, write_bench_files
from conftest import MakeCheckpoint, MakeTemplate
from typer.testing import CliRunner

from gpupipe.benchmarks import bench, bench_stages, common, contestants
from gpupipe.benchmarks.common import read_rows
from gpupipe.benchmarks.keeping_memory import can_keep_memory, process_keeping_memory
from gpupipe.benchmarks.scenario import Scenario, add_options, from_options, given
from gpupipe.benchmarks.tables import TABLES
from gpupipe.cli import app
from gpupipe.errors import InputError

CPU = torch.device("cpu")
LOOPS = {"reference_loop", "reference_loop_keeping_memory", "reference_loop_onnxruntime"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, make_template: MakeTemplate) -> BenchFiles:
    return write_bench_files(tmp_path_factory.mktemp("bench"), make_template)


@pytest.fixture(scope="module")
def scenario(files: BenchFiles, tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return given(*files.values(), tmp_path_factory.mktemp("scenario"), checkpoint=tiny_checkpoint())


# ── what is compared ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(files: BenchFiles, tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of the command, as a user starts it."""
    results = tmp_path_factory.mktemp("results")
    options = {name.replace("_", "-"): str(path) for name, path in files.items()}
    options |= {"checkpoint": str(tiny_checkpoint()), "frames": "3", "rounds": "1", "results": str(results)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_stages.FRAMES, "cpu", 2)
        patch.setattr(contestants, "WARMUP_FRAMES", 1)
        done = CliRunner().invoke(app, ["bench", *words, "--engine", "eager", "--record", "--json"])
    assert done.exit_code == 0, done.output
    return done, results


def test_the_command_measures_everybody_and_every_stage(run: Any) -> None:
    done, _ = run
    rows = json.loads(done.stdout.splitlines()[-1])
    assert all(row["error"] is None and row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    providers = {row["provider"] for row in rows if row["metric"] == "throughput"}
    assert providers == LOOPS | {"gpupipe"}
    assert {row["provider"] for row in rows if row["metric"] == "ratio"} == providers - {"reference_loop"}
    stages = [row["value"] for row in rows if row["what"] == "stage" and row["metric"] == "time"]
    halves = ["network, template half", "network, speech half"]
    assert stages == ["decode", "crop", *halves, "paste", "convert", "encode"]
    for row in rows:
        if row["metric"] == "floor_share":
            assert row["config"]["bytes"] > 0
            assert (row["config"]["operations"] > 0) == row["value"].startswith("network")


def test_recorded_rows_are_those_printed(run: Any) -> None:
    done, results = run
    printed = json.loads(done.stdout.splitlines()[-1])
    assert sorted(map(json.dumps, read_rows(results))) == sorted(map(json.dumps, printed))


def test_tables_take_the_rows_that_the_command_records(run: Any) -> None:
    _, results = run
    rows = read_rows(results)
    for row in rows:
        row["commit"] = "committed"
        row["config"]["width"] = 1  # the test's network is smaller, and some tables are for the full one
    for table in ("headline", "end_to_end", "side_by_side", "stages"):
        said = TABLES[table](rows)
        for row in rows:
            if (row["metric"], row["provider"]) == ("ratio", "gpupipe"):
                assert table == "stages" or f"**{row['p50']:.1f}×" in said, table
    recorded = {row["provider"]: row for row in read_rows() if row["what"] == "end_to_end" and row["axis"] == "frames"}
    for row in rows:
        if row["what"] == "end_to_end" and row["axis"] == "frames":
            assert row["config"].keys() - {"asked"} == recorded[row["provider"]]["config"].keys(), (
                "--compare would set nothing beside it"
            )


def test_the_commit_is_told_where_files_came_without_their_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "IN_REPOSITORY", True)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("GPUPIPE_COMMIT", raising=False)
    assert common.commit.__wrapped__() == "unknown"
    (tmp_path / "inside").mkdir()
    for words in (
        ["init", "--quiet"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert len(common.commit.__wrapped__()) == 12
    monkeypatch.setattr(common, "ROOT", tmp_path / "inside")
    assert common.commit.__wrapped__() == "unknown", "that is somebody else's repository"
    monkeypatch.setenv("GPUPIPE_COMMIT", "0123456789ab")
    assert common.commit.__wrapped__() == "0123456789ab"


def test_a_run_that_is_cut_off_leaves_what_it_has_found(
    files: BenchFiles, tiny_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_stages.Step, "_paste", cut_off)
    monkeypatch.setitem(bench_stages.FRAMES, "cpu", 2)
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    options = bench.Options(**files, checkpoint=tiny_checkpoint(), frames=2, rounds=1, engine="eager", record=True)
    options.results = tmp_path
    with pytest.raises(KeyboardInterrupt):
        bench.run(options, print)
    assert {"reference_loop", "gpupipe"} <= {one["provider"] for one in read_rows(tmp_path)}
    assert {one["value"] for one in read_rows(tmp_path) if one["what"] == "stage"} >= {"decode", "crop"}


def test_a_run_that_is_cut_off_in_a_turn_leaves_those_before_it(
    files: BenchFiles, tiny_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn, taken = contestants.take_turn, itertools.count(1)

    def cut_off(*given: Any, **how: Any) -> None:
        if next(taken) == 6:  # the second of four in the second turn
            raise KeyboardInterrupt
        take_turn(*given, **how)

    monkeypatch.setattr(contestants, "take_turn", cut_off)
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    options = bench.Options(**files, checkpoint=tiny_checkpoint(), frames=2, rounds=3, engine="eager", record=True)
    options.results = tmp_path
    with pytest.raises(KeyboardInterrupt):
        bench.run(options, print)
    turns = {one["provider"]: one["n"] for one in read_rows(tmp_path) if one["metric"] == "throughput"}
    assert turns == dict.fromkeys(LOOPS | {"gpupipe"}, 1)
    assert sum(one["metric"] == "ratio" for one in read_rows(tmp_path)) == 3


def faults() -> int:
    """Pages that the system gives a process for tensors that it frees at once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not can_keep_memory(), reason="it is glibc that keeps memory")
def test_memory_is_kept_in_another_process() -> None:
    with process_keeping_memory() as process:
        first, second = process.submit(faults).result(), process.submit(faults).result()
    assert 20 * second < first < faults(), "a process that keeps its memory asks for it once"
    assert "MALLOC_MMAP_MAX_" not in os.environ


def test_on_a_gpu_batches_of_the_clip_s_size_warm_up(scenario: Scenario, tmp_path: Path) -> None:
    lengths: dict[str, list[int]] = {"whole": [], "short": []}

    def contestant(name: str) -> contestants.Contestant:
        def render(features: Path, sound: Path, output: Path) -> dict[str, float]:
            lengths[name].append(len(np.load(features)))
            return loop.render(features, sound, output)

        return contestants.Contestant(name, 0, render, warm_up_whole=name == "whole")

    loop = contestants.gpupipe(scenario, device="cpu", crf=20, engine="eager")
    made = [contestant("whole"), contestant("short")]
    how: dict[str, Any] = {"frames": 6, "rounds": 1, "device": "cpu", "say": lambda told: None}
    list(contestants.rows_of_turns(made, list, scenario, tmp_path, **how))
    assert lengths == {"whole": [6, 6], "short": [contestants.WARMUP_FRAMES, 6]}


def test_ratios_are_taken_within_a_turn() -> None:
    slow = contestants.Contestant("reference_loop", 0, lambda *_: {}, seconds=[10, 40], stages=[{}, {}])
    fast = contestants.Contestant("gpupipe", 0, lambda *_: {}, seconds=[5, 10], stages=[{}, {}])
    rows = contestants.clip_rows([slow, fast], frames=10, config={}, device="cpu")
    [ratio] = [row for row in rows if row.metric == "ratio"]
    assert (ratio.p20, ratio.p50, ratio.p80) == pytest.approx((2.4, 3, 3.6))  # of 2 and 4


@pytest.mark.parametrize(
    ("features", "sound", "told"),
    [
        (3, 10, r"3 frames, 1 sound tracks of 0\.\d\d s; expected 10 and 1 of 0\.40 s"),
        (10, 1, r"10 frames, 1 sound tracks of 0\.1\d s; expected 10 and 1 of 0\.40 s"),
    ],
    ids=["frames", "sound"],
)
def test_a_file_that_lacks_frames_or_sound_is_no_result(
    features: int, sound: int, told: str, scenario: Scenario, tmp_path: Path
) -> None:
    one = contestants.gpupipe(scenario, device="cpu", crf=30, engine="eager")
    honest = one.render
    short = scenario.clip(features, tmp_path)[0], scenario.clip(sound, tmp_path)[1]
    one.render = lambda features, sound, output: honest(*short, output)
    with pytest.raises(RuntimeError, match=f"^gpupipe wrote {told}"):
        next(contestants.rows_of_turns([one], list, scenario, tmp_path, frames=10, rounds=1, device="cpu", say=print))


def test_features_and_sound_come_round_again(scenario: Scenario, tmp_path: Path) -> None:
    features, sound = scenario.clip(15, tmp_path)
    rows = np.load(features)
    assert len(rows) == 15
    assert np.array_equal(rows[6:12], np.load(scenario.features))
    assert sound.stat().st_size == 44 + 2 * 16000 * 15 // 25


@pytest.mark.parametrize(
    "options",
    [{"template": Path("x")}, {"audio": Path("x")}, {"width": 0.5}, {"frames": 0}, {"rounds": 0}, {"values": [1]}],
    ids=["template alone", "sound alone", "width without template", "no frames", "no rounds", "values of no sweep"],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        bench.run(bench.Options(**options), print)


def test_one_file_of_a_template_is_not_taken_for_the_bundled_avatar(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(InputError, match="expected --template, --audio-features and --audio together"):
        from_options(parser.parse_args(["--audio", "speech.wav"]), tmp_path)


@pytest.mark.parametrize("text", ["a", "0", "1,-2", "1.5"])
def test_values_are_whole_numbers(text: str) -> None:
    assert bench.whole_numbers("1, 8,64") == [1, 8, 64]
    with pytest.raises(InputError, match="whole numbers"):
        bench.whole_numbers(text)


def test_without_opencv_the_loop_is_left_out_with_a_message(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "stage_rows", lambda *_, **__: [])
    said: list[str] = []
    options = bench.Options(frames=2, rounds=1, engine="eager")
    rows = list(itertools.chain.from_iterable(bench._side_by_side(scenario, options, tmp_path, "cpu", said.append)))
    assert bench.NO_OPENCV in said
    assert [row.error for row in rows if row.provider == "reference_loop"] == [bench.NO_OPENCV]
    assert not bench.Report(rows).failed, "what is not installed is no failure"
    assert any(row.provider == "gpupipe" and row.metric == "throughput" for row in rows)
    assert all(row.metric != "ratio" for row in rows), "there is nothing to compare with"
