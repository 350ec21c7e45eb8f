"""Sweeps of `gpupipe bench`, and the scenario that they and the others are given."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from bench_files import BenchFiles, write_bench_files
from clips import write_wav
from conftest import MakeCheckpoint, MakeTemplate

from gpupipe.benchmarks import bench, contestants, sweeps
from gpupipe.benchmarks import scenario as scenarios
from gpupipe.benchmarks.scenario import Scenario, given, resized_template
from gpupipe.errors import InputError
from gpupipe.landmarks import read_landmarks
from gpupipe.video.decode import read_image


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, make_template: MakeTemplate) -> BenchFiles:
    return write_bench_files(tmp_path_factory.mktemp("bench"), make_template)


@pytest.fixture(scope="module")
def scenario(files: BenchFiles, tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return given(*files.values(), tmp_path_factory.mktemp("scenario"), checkpoint=tiny_checkpoint())


def test_a_long_clip_of_the_stub_has_its_length(scenario: Scenario, tmp_path: Path) -> None:
    how: dict[str, Any] = {"device": "cpu", "crf": 30, "rounds": 1, "say": print}
    [rows] = sweeps.length_rows(scenario, tmp_path, values=[2], **how)
    told = {row.metric: row for row in rows}
    assert told["throughput"].value == 2 and told["throughput"].config["network"] == "stub"
    assert told["time"].p50 == pytest.approx(1000 / told["throughput"].p50)


def test_a_sweep_that_is_cut_off_leaves_the_sizes_before_it(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn, taken = contestants.take_turn, itertools.count(1)

    def cut_off(*given: Any, **how: Any) -> None:
        if next(taken) == 2:
            raise KeyboardInterrupt
        take_turn(*given, **how)

    monkeypatch.setattr(contestants, "take_turn", cut_off)
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    how: dict[str, Any] = {"device": "cpu", "crf": 30, "frames": 2, "rounds": 1, "say": print, "reference": False}
    rows = sweeps.resolution_rows(scenario, tmp_path, values=[360, 720], **how)
    assert {row.value for row in next(rows)} == {"640×360"}
    with pytest.raises(KeyboardInterrupt):
        next(rows)


def test_a_template_is_resized_with_its_landmarks(files: dict[str, Path], tmp_path: Path) -> None:
    from gpupipe.template import Template

    before = Template.from_directory(files["template"])
    folder = resized_template(files["template"], tmp_path / "large", (384, 256), 2)
    after = Template.from_directory(folder)
    assert (after.width, after.height, after.length) == (384, 256, 2)
    assert torch.equal(after.boxes, 2 * before.boxes[:2])


def test_the_bundled_avatar_is_written_at_another_size(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its colours, landmarks on the same places of the picture."""

    def bundled(folder: Path) -> Scenario:
        return replace(scenario, features=Path(shutil.copy(scenario.features, folder / "sample.npy")))

    monkeypatch.setattr(scenarios, "bundled", bundled)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["scenario", str(out), "--size", "576x256"])
    scenarios.main()
    assert sorted(path.name for path in out.iterdir()) == ["features.npy", "speech.flac", "template"]
    made = given(out / "template", out / "features.npy", out / "speech.flac", tmp_path, checkpoint=scenario.checkpoint)
    assert (made.size, made.name) == ((576, 256), "template")
    before, after = (read_image(one / "full_body_img" / "0.jpg").float() for one in (scenario.template, made.template))
    smaller = torch.nn.functional.interpolate(after.permute(2, 0, 1)[None], (128, 192), mode="area")[0].permute(1, 2, 0)
    assert (smaller - before).abs().mean() < 4 < (smaller.flip(-1) - before).abs().mean()
    points, moved = (read_landmarks(one / "landmarks" / "0.lms") for one in (scenario.template, made.template))
    assert np.allclose(moved, points * [3, 2], atol=1e-3)


# ── what they are given ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sweep", ["batch", "resolution"])
def test_a_sweep_takes_the_engine_that_is_asked_for(
    sweep: bench.Sweep, files: BenchFiles, tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contestants, "WARMUP_FRAMES", 1)
    monkeypatch.setattr(sweeps, "RESOLUTIONS", ((256, 144),))
    options = bench.Options(**files, checkpoint=tiny_checkpoint(), frames=2, rounds=1, engine="eager", sweep=sweep)
    options.values = [1 if sweep == "batch" else 144]
    rows = bench.run(options, print).rows
    assert {row.config["asked"] for row in rows if row.provider == "gpupipe"} == {"eager"}


def test_a_height_that_no_size_has_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    how: dict[str, Any] = {"device": "cpu", "crf": 30, "frames": 2, "rounds": 1, "say": print, "reference": False}
    with pytest.raises(InputError, match="heights are 360, 700; expected some of 360, 720, 1080, 2160"):
        next(sweeps.resolution_rows(scenario, tmp_path, values=[360, 700], **how))


def test_a_template_that_is_a_video_is_refused(files: BenchFiles, tmp_path: Path) -> None:
    (tmp_path / "template.mp4").touch()
    with pytest.raises(InputError, match=f"^{tmp_path}: holds template.mp4; expected full_body_img/"):
        given(tmp_path, files["audio_features"], files["audio"], tmp_path)


@pytest.mark.parametrize("width", [0.3, 0, float("nan")])
def test_a_width_that_no_network_has_is_refused(width: float, files: BenchFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"width is {width}; expected a positive multiple of 1/8"):
        given(*files.values(), tmp_path, width=width)


def test_sound_may_have_a_colon_in_its_name_and_any_number_of_channels(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sound = write_wav(Path("12:30.wav"), np.full((16000, 9), 1000))
    _, clip = replace(scenario, audio=sound).clip(25, tmp_path)
    assert np.array_equal(np.frombuffer(clip.read_bytes()[44:], "<i2"), np.full(16000, 1000))


def test_sound_is_looked_for_before_anything_is_measured(files: BenchFiles, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "silent.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        video.mux([*stream.encode(av.VideoFrame(64, 64, "yuv420p")), *stream.encode(None)])
    with pytest.raises(InputError, match=r"silent\.mp4: has no sound track"):
        given(files["template"], files["audio_features"], tmp_path / "silent.mp4", tmp_path)
