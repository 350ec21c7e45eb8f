"""Many clips: what is checked, rendered, skipped, tried again and left, on this machine in this process."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from farming import left_over, videos, write_jobs, write_speech
from typer.testing import CliRunner

from gpupipe import FrameGenerationPipeline, InputError
from gpupipe.cli import app
from gpupipe.errors import DeviceError, DiskFullError, OutputError
from gpupipe.farm import farm_status, ledger, read_jobs, run_farm, worker
from gpupipe.farm.farm import MAX_LOSSES, Farm, RenderTask
from gpupipe.farm.ledger import Ledger
from gpupipe.farm.residents import AvatarKey
from gpupipe.models.audio_encoder import AudioEncoder
from gpupipe.video.codecs import segment_length

Jobs = list[dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Jobs:
    """Three jobs for two faces: one of three parts of two seconds, at few frames a second, and two short ones."""
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint = str(tiny_checkpoint())
    faces = [str(make_template(folder / f"face{n}", frames=4, size=(96, 64), seed=n)) for n in range(2)]
    jobs = []
    for number, (frames, face) in enumerate([(120, 0), (11, 1), (7, 0)]):
        features, sound = write_speech(folder, str(number), frames, number)
        files = {"checkpoint": checkpoint, "template": faces[face], "audio_features": features, "audio": sound}
        jobs.append(files | {"output": f"{number}.mp4", "engine": "eager"})
    jobs[0] |= {"fps": 5.0}
    jobs[2] |= {"output": "deep/er/2.mp4", "crf": 30}
    return jobs


@pytest.fixture(scope="module")
def encoder_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "ave.pth"
    torch.manual_seed(0)
    torch.save(AudioEncoder().state_dict(), path)
    return path


def farm(jobs: Jobs, folder: Path, **options: Any) -> Any:
    return run_farm(write_jobs(folder.with_suffix(".jsonl"), jobs), folder, part_seconds=2, **options)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {row["output"]: row for row in rows}


@pytest.fixture(scope="module")
def done(inputs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of all three."""
    folder = tmp_path_factory.mktemp("farm") / "out"
    record = farm(inputs, folder)
    assert (record.done, record.skipped, record.parked, record.frames) == (3, 0, 0, 42)
    return folder


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_job_becomes_a_whole_video(done: Path, inputs: Jobs) -> None:
    assert sorted(videos(done)) == ["0.mp4", "1.mp4", "deep/er/2.mp4"]
    assert left_over(done) == []
    for job, frames in zip(inputs, (24, 11, 7), strict=True):
        with av.open(str(done / job["output"])) as video:
            assert sum(1 for _ in video.decode(video=0)) == frames
            assert video.streams.audio
        row = results(done)[job["output"]]
        assert (row["status"], row["frames"], row["error"]) == ("done", frames, None)
        assert row["checksum"] == ledger.file_hash(done / job["output"])
        assert row["timings"]["render"] > 0 and row["timings"]["join"] > 0
        assert row["device"] == "cpu" and row["engine"] == "eager" and row["codec"] == "libx264"
    assert results(done)["0.mp4"]["parts"] == 3


def test_pictures_are_those_of_single_renders(inputs: Jobs, tmp_path: Path) -> None:
    jobs = [job | {"codec": "ffv1", "output": f"{n}.mkv"} for n, job in enumerate(inputs[:2])]
    farm(jobs, tmp_path / "out")
    for job in jobs:
        pipeline = FrameGenerationPipeline(job["checkpoint"], engine="eager")
        alone = tmp_path / f"alone-{job['output']}"
        fps = job.get("fps", 25)
        pipeline.generate_video(job["audio_features"], job["template"], job["audio"], alone, fps=fps, codec="ffv1")
        assert [*frames_of(tmp_path / "out" / job["output"])] == [*frames_of(alone)]


def frames_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray().tobytes() for frame in video.decode(video=0)]


def test_bytes_do_not_depend_on_the_run(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    farm(inputs[::-1], tmp_path / "out", batch_size=1)
    assert videos(tmp_path / "out") == videos(done)


def test_features_are_made_from_sound(done: Path, inputs: Jobs, encoder_checkpoint: Path, tmp_path: Path) -> None:
    job = {key: value for key, value in inputs[1].items() if key != "audio_features"} | {
        "encoder": str(encoder_checkpoint)
    }
    record = farm([job, inputs[1] | {"output": "other.mp4"}], tmp_path / "out")
    assert record.done == 2
    alone = tmp_path / "alone.mp4"
    arguments = ["--checkpoint", job["checkpoint"], "--template", job["template"], "--encoder", job["encoder"]]
    ran = CliRunner().invoke(app, ["render", *arguments, "--audio", job["audio"], "--output", str(alone)])
    assert ran.exit_code == 0, ran.output
    assert len(frames_of(alone)) == results(tmp_path / "out")["1.mp4"]["frames"]


def test_lengths_that_differ_are_said_aloud(inputs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second and third input have 11 and 7 frames, 25 a second, and sounds of that length."""
    jobs = [
        inputs[1],
        inputs[2] | {"output": "longer.mp4", "audio": inputs[1]["audio"]},
        inputs[1] | {"output": "shorter.mp4", "audio": inputs[2]["audio"]},
        {key: value for key, value in inputs[1].items() if key != "audio"} | {"output": "silent.mp4"},
    ]
    out = tmp_path / "out"
    assert farm(jobs, out).done == 4
    assert {name: row["sound_minus_picture"] for name, row in results(out).items()} == {
        "1.mp4": None,
        "longer.mp4": pytest.approx(4 / 25),
        "shorter.mp4": pytest.approx(-4 / 25),
        "silent.mp4": None,
    }
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(warnings) == [
        f"{out / 'longer.mp4'}: sound lasts 0.44 s and the picture 0.28 s (+0.16 s)",
        f"{out / 'shorter.mp4'}: sound lasts 0.28 s and the picture 0.44 s (-0.16 s)",
    ]


# ── again ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_done_is_skipped(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    record = farm(inputs, out)
    assert (record.done, record.skipped) == (0, 3)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert {row["status"] for row in results(out).values()} == {"done"}


def test_what_a_killed_run_could_not_remove_is_removed(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    """A run that was killed when a video had its name and its parts were still there."""
    out = Path(shutil.copytree(done, tmp_path / "out"))
    state = next(out.glob(".gpupipe-farm/*/state.json"))
    for name in ("00000.mp4", "00000.mp4.json", ".joined-1.part.mp4"):
        (state.parent / name).write_bytes(b"left")
    assert len(left_over(out)) == 3
    assert farm(inputs, out).skipped == 3
    assert left_over(out) == []


def test_results_of_another_file_of_jobs_stay(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    before = results(out)
    for number, damaged in enumerate(("{", "[1]", '{"output": []}')):
        (out / f".gpupipe-farm/{number}").mkdir()
        (out / f".gpupipe-farm/{number}/state.json").write_text(damaged)
    record = farm([inputs[2] | {"output": "new.mp4"}, inputs[1]], out)
    assert (record.jobs, record.done, record.skipped) == (2, 1, 1)
    after = results(out)
    assert list(after) == ["new.mp4", "1.mp4", "0.mp4", "deep/er/2.mp4"]
    assert {name: row for name, row in after.items() if name != "new.mp4"} == before
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    assert videos(out).keys() == {*videos(done), "new.mp4"}


def test_what_changed_is_done_again(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    features = tmp_path / "other.npy"
    np.save(features, np.load(inputs[1]["audio_features"]) + 1)
    (out / "deep/er/2.mp4").unlink()
    record = farm([inputs[0], inputs[1] | {"audio_features": str(features)}, inputs[2]], out)
    assert (record.done, record.skipped) == (2, 1)
    assert videos(out)["1.mp4"] != videos(done)["1.mp4"]
    assert videos(out)["deep/er/2.mp4"] == videos(done)["deep/er/2.mp4"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "a folder"])
def test_a_video_that_is_not_as_recorded_is_made_again(done: Path, inputs: Jobs, tmp_path: Path, damage: str) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    video = out / "1.mp4"
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "a folder":
        video.unlink()
        video.mkdir()
    else:
        video.write_bytes(content if damage == "flipped" else content[:-100])
    record = farm(inputs, out)
    if damage == "a folder":
        assert (record.skipped, record.parked) == (2, 1)
        assert "1.mp4: cannot be written" in results(out)["1.mp4"]["error"]
    else:
        assert (record.done, record.skipped) == (1, 2)
        assert videos(out) == videos(done)


def test_force_does_all_again(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    assert farm(inputs, out, force=True).done == 3
    assert videos(out) == videos(done)


@pytest.fixture
def interrupted(inputs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder of a run that met a full disk when two of the first job's three parts were recorded."""
    real, count = worker.write_record, 0

    def full(path: Path, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 2:
            raise DiskFullError(f"{path}: cannot be written: No space left on device")
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "write_record", full)
        with pytest.raises(DiskFullError, match="No space left"):
            farm(inputs, tmp_path / "out")
    return tmp_path / "out"


def parts(folder: Path) -> list[Path]:
    return sorted((folder / ".gpupipe-farm").glob("*/0*.mp4"))


def test_a_run_goes_on_where_it_stopped(
    interrupted: Path, inputs: Jobs, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert videos(interrupted) == {} and len(parts(interrupted)) >= 2
    assert results(interrupted)["0.mp4"]["status"] == "waiting"
    made: list[int] = []
    real = worker.write_record
    monkeypatch.setattr(worker, "write_record", lambda path, *rest: (made.append(path), real(path, *rest))[1])
    farm(inputs, interrupted)
    assert len(made) == 3  # the last part of the first job, and the two others
    assert videos(interrupted) == videos(done)
    assert left_over(interrupted) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "unrecorded", "other inputs"])
def test_a_part_that_is_not_as_recorded_is_made_again(interrupted: Path, inputs: Jobs, done: Path, damage: str) -> None:
    part = parts(interrupted)[0]
    record = part.with_name(part.name + ".json")
    if damage == "flipped":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "unrecorded":
        record.write_text(record.read_text()[:-20])
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"inputs": "others"}))
    farm(inputs, interrupted)
    assert videos(interrupted) == videos(done)


def test_a_part_that_is_not_looked_at_spoils_the_video(
    interrupted: Path, inputs: Jobs, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: the damage does reach the video if checksums are not compared."""
    part = parts(interrupted)[0]
    content = bytearray(part.read_bytes())
    content[content.index(b"mdat") + 1000] ^= 255
    part.write_bytes(content)
    real = ledger.file_hash

    def believing(path: Path) -> str:
        record = Path(f"{path}.json")
        return json.loads(record.read_text())["checksum"] if record.exists() else real(path)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "file_hash", believing)
        farm(inputs[:1], interrupted)
    assert videos(interrupted)["0.mp4"] != videos(done)["0.mp4"]


def test_a_real_full_disk(inputs: Jobs, done: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(len(content) for content in videos(done).values()) // 1024
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(DiskFullError, match="No space left"):
            farm(inputs, disk / "out")
        assert not [path for path in disk.rglob("*") if ".part" in path.name]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        farm(inputs, disk / "out")
        assert videos(disk / "out") == videos(done)
    finally:
        gc.collect()  # a file that could not be ended stays open as long as its container lives
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# ── bad jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bad_job_stops_no_other_and_is_parked(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(inputs[1]["template"], tmp_path / "face"))
    (damaged / "full_body_img" / "2.jpg").write_bytes(b"no JPEG")
    jobs = [inputs[1] | {"template": str(damaged), "output": "bad.mp4"}, *inputs]
    told: list[str] = []
    out = tmp_path / "out"
    record = farm(jobs, out, on_job_end=lambda state: told.append(f"{state.output} {state.status}"))
    assert (record.done, record.parked) == (3, 1)
    assert videos(out) == videos(done)
    row = results(out)["bad.mp4"]
    assert (row["status"], row["attempts"]) == ("parked", 3)
    assert "2.jpg" in row["error"]
    assert sorted(told) == ["0.mp4 done", "1.mp4 done", "bad.mp4 parked", "deep/er/2.mp4 done"]
    # Another run tries it as often.
    assert farm(jobs, out).skipped == 3
    assert (results(out)["bad.mp4"]["status"], results(out)["bad.mp4"]["attempts"]) == ("parked", 3)
    shutil.copy(damaged / "full_body_img" / "1.jpg", damaged / "full_body_img" / "2.jpg")
    assert farm(jobs, out).done == 1
    assert results(out)["bad.mp4"]["error"] is None


def test_a_parked_job_is_done_by_the_next_run_when_its_cause_is_gone(
    done: Path, inputs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No input of the job changes: a file stands where the folder of its video should be."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("in the way")
    record = farm(inputs, out)
    assert (record.done, record.parked) == (2, 1)
    assert "deep/er: cannot be made" in results(out)["deep/er/2.mp4"]["error"]
    (out / "deep").unlink()
    monkeypatch.setattr(worker, "render_batch", None)  # its part is there: nothing is rendered again
    record = farm(inputs, out)
    assert (record.done, record.skipped, record.parked) == (1, 2, 0)
    assert (results(out)["deep/er/2.mp4"]["attempts"], results(out)["deep/er/2.mp4"]["error"]) == (0, None)
    assert videos(out) == videos(done)


def test_sound_that_is_missing_is_told_before_anything_is_rendered(inputs: Jobs, tmp_path: Path) -> None:
    record = farm([inputs[1] | {"audio": "gone.wav"}], tmp_path / "out")
    assert (record.parked, record.frames) == (1, 0)
    assert "gone.wav: no such" in results(tmp_path / "out")["1.mp4"]["error"]


def test_a_job_that_fails_while_it_is_rendered_is_the_only_one(
    done: Path, inputs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpupipe.avatar import Avatar

    real = Avatar.look_up

    def fails(self: Avatar, frames: np.ndarray) -> Any:
        if "face1" in self.template.name:
            raise RuntimeError("the second face cannot be looked up")
        return real(self, frames)

    monkeypatch.setattr(Avatar, "look_up", fails)
    out = tmp_path / "out"
    record = farm(inputs, out, batch_size=8)
    assert (record.done, record.parked) == (2, 1)
    assert results(out)["1.mp4"]["error"] == "RuntimeError: the second face cannot be looked up"
    expected = {name: content for name, content in videos(done).items() if name != "1.mp4"}
    assert videos(out).keys() == expected.keys()


def test_memory_that_runs_out_halves_the_batch(inputs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = worker.render_batch, []

    def small(pieces: Any) -> Any:
        rows = sum(len(piece.rows) for piece in pieces)
        sizes.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(pieces)

    monkeypatch.setattr(worker, "render_batch", small)
    out = tmp_path / "out"
    record = farm(inputs, out, batch_size=16)
    assert record.done == 3
    assert max(sizes) == 16 and sizes[-1] <= 3
    assert [len(frames_of(out / job["output"])) for job in inputs] == [24, 11, 7]
    assert any("out of memory" in told for told in record.as_dict()["fallbacks"])


def test_memory_that_is_never_enough_fails_the_job(
    inputs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(pieces: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(worker, "render_batch", never)
    assert farm(inputs[1:2], tmp_path / "out", batch_size=4).parked == 1


def test_a_job_over_which_workers_die_is_parked_at_last(inputs: Jobs, tmp_path: Path) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", inputs[:1]))
    queue = Farm(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    for _ in range(MAX_LOSSES):
        task = queue.next_task(frames=1000)
        assert isinstance(task, RenderTask) and len(task.parts) == 3
        assert not queue.finished
        queue.lost(task)
    assert queue.next_task() is None and queue.finished
    state = farm_status(tmp_path / "jobs.jsonl", tmp_path / "out")[0]
    assert (state.status, state.error) == ("parked", "5 workers died over it")
    again = Farm(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    for _ in range(MAX_LOSSES - 1):  # what an earlier run lost does not count
        again.lost(again.next_task(frames=1000) or pytest.fail("parked"))
    assert not again.finished


def test_a_worker_is_given_more_of_what_it_has_at_hand(inputs: Jobs, tmp_path: Path) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", inputs))
    queue = Farm(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    faces = [AvatarKey.of(job) for job in jobs]
    assert queue.upcoming() == faces[:2]
    first, other = queue.next_task(frames=1), queue.next_task(frames=1000, last_avatar=faces[1])
    assert isinstance(first, RenderTask) and [part.number for part in first.parts] == [0]
    # Both faces' jobs are not under way yet: the worker helps with the first face, of both of its jobs.
    assert isinstance(other, RenderTask)
    assert [part.job.output for part in other.parts] == ["0.mp4", "0.mp4", "deep/er/2.mp4"]


def test_two_farms_in_one_folder_are_one_too_many(inputs: Jobs, tmp_path: Path) -> None:
    with Ledger(tmp_path / "out", []).locked(), pytest.raises(OutputError, match="another farm is at work"):
        farm(inputs, tmp_path / "out")


@pytest.mark.parametrize("seconds", [1e-300, 1e308])
def test_any_part_seconds_are_rounded_to_segments(inputs: Jobs, tmp_path: Path, seconds: float) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", inputs[:1]))
    task = Farm(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=seconds).next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == (3 if seconds < 1 else 1)
    assert segment_length(25) == 50  # type: ignore[arg-type]


def test_a_device_of_no_such_name_is_told_before_a_cluster_starts(
    inputs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match="device is 'foo'; expected cpu, cuda or cuda:N"):
        farm(inputs, tmp_path / "out", workers=1, device="foo")
    with pytest.raises(InputError, match="workers need Ray"):  # the control: what comes next
        farm(inputs, tmp_path / "out", workers=1, device="cuda")


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_tells_each_job_and_the_sum(done: Path, inputs: Jobs, tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", [*inputs, inputs[0] | {"output": "gone.mp4", "template": "nowhere"}])
    out = Path(shutil.copytree(done, tmp_path / "out"))
    ran = CliRunner().invoke(app, ["farm", str(jobs), "--output-dir", str(out), "--part-seconds", "2", "--json"])
    assert ran.exit_code == 1
    assert "gone.mp4: parked after 3 attempts, the next run tries it again: " in ran.stderr and "nowhere" in ran.stderr
    assert "4 jobs: 0 done" in ran.stderr and "3 done before, 1 parked" in ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["parked"] == 1
    ran = CliRunner().invoke(app, ["farm", str(jobs), "--output-dir", str(out), "--status"])
    assert ran.exit_code == 0 and "3 done, 1 parked" in ran.stderr
    assert [state.status for state in farm_status(jobs, out)] == ["done", "done", "done", "parked"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--part-seconds nan", "part seconds is nan; expected more than 0, and a finite number"),
        ("--part-seconds inf", "part seconds is inf"),
        ("--part-seconds 0", "part seconds is 0.0"),
        ("--part-seconds=-1", "part seconds is -1.0"),
        ("--workers 0", "workers is 0; expected 1 or more"),
        ("--workers=-1", "workers is -1"),
        ("--batch-size 0", "batch size is 0; expected 1 or more"),
        ("--memory-budget=-1", "memory budget is -1000000; expected 0 or more bytes"),
        ("--workers 1 --device foo", "device is 'foo'; expected cpu, cuda or cuda:N"),
    ],
)
def test_an_option_that_cannot_be_used_starts_nothing(inputs: Jobs, tmp_path: Path, words: str, told: str) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", inputs)
    ran = CliRunner().invoke(app, ["farm", str(jobs), "--output-dir", str(tmp_path / "out"), *words.split()])
    assert ran.exit_code == 2, ran.output
    assert told in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_file_of_jobs_starts_nothing(inputs: Jobs, tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", [inputs[0], inputs[1] | {"crf": 52}])
    ran = CliRunner().invoke(app, ["farm", str(jobs), "--output-dir", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "jobs.jsonl:2: crf is 52" in ran.stderr
    assert not (tmp_path / "out").exists()
