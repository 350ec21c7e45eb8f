"""Many clips: what is checked, rendered, tried again and left, on this machine in this process."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from farming import Jobs, farm, frames_of, left_over, results, videos, write_jobs
from typer.testing import CliRunner

from gpupipe import FrameGenerationPipeline, InputError, template
from gpupipe.cli import app
from gpupipe.errors import DeviceError, DeviceLostError, DiskFullError, OutputError
from gpupipe.farm import farm_status, ledger, local, worker
from gpupipe.farm.ledger import Ledger
from gpupipe.models.audio_encoder import AudioEncoder
from gpupipe.video.encode import VideoWriter


@pytest.fixture(scope="module")
def encoder_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "ave.pth"
    torch.manual_seed(0)
    torch.save(AudioEncoder().state_dict(), path)
    return path


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_job_becomes_a_whole_video(farmed: Path, farm_jobs: Jobs) -> None:
    assert sorted(videos(farmed)) == ["0.mp4", "1.mp4", "deep/er/2.mp4"]
    assert left_over(farmed) == []
    for job, frames in zip(farm_jobs, (24, 11, 7), strict=True):
        with av.open(str(farmed / job["output"])) as video:
            assert sum(1 for _ in video.decode(video=0)) == frames
            assert video.streams.audio
        row = results(farmed)[job["output"]]
        assert (row["status"], row["frames"], row["error"]) == ("done", frames, None)
        assert row["checksum"] == ledger.file_hash(farmed / job["output"])
        assert row["timings"]["render"] > 0 and row["timings"]["join"] > 0
        assert row["device"] == "cpu" and row["engine"] == "eager" and row["codec"] == "libx264"
    assert results(farmed)["0.mp4"]["parts"] == 3


def test_pictures_are_those_of_single_renders(farm_jobs: Jobs, tmp_path: Path) -> None:
    """At fewer frames a second than the network's, as many, and more: some rendered rows are shown twice."""
    options: Jobs = [{}, {}, {"start_frame": 2}, {"fps": 50.0}]
    jobs = [job | more for job, more in zip([*farm_jobs[:2], farm_jobs[2], farm_jobs[2]], options, strict=True)]
    jobs = [job | {"codec": "ffv1", "output": f"{n}.mkv"} for n, job in enumerate(jobs)]
    farm(jobs, tmp_path / "out")
    pipeline = FrameGenerationPipeline(farm_jobs[0]["checkpoint"], engine="eager")
    for job, count in zip(jobs, (24, 11, 7, 14), strict=True):
        alone = tmp_path / f"alone-{job['output']}"
        how = {"fps": job.get("fps", 25), "start_frame": job.get("start_frame", 0)}
        pipeline.generate_video(job["audio_features"], job["template"], job["audio"], alone, codec="ffv1", **how)
        pictures = frames_of(tmp_path / "out" / job["output"])
        assert len(pictures) == count and pictures == frames_of(alone)


def test_each_job_is_encoded_as_it_asks(farm_jobs: Jobs, tmp_path: Path) -> None:
    options: Jobs = [{"crf": 5}, {"crf": 40}, {"preset": "ultrafast"}, {"preset": "slow"}]
    jobs = [farm_jobs[2] | {"codec": "libx264", "output": f"{n}.mp4"} | more for n, more in enumerate(options)]
    farm(jobs, tmp_path / "out")
    fine, coarse, fast, slow = map(len, videos(tmp_path / "out").values())
    assert fine > 1.3 * coarse and fast > 1.1 * slow


def test_bytes_do_not_depend_on_the_run(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    farm(farm_jobs[::-1], tmp_path / "out", batch_size=1)
    assert videos(tmp_path / "out") == videos(farmed)


def test_features_are_made_from_sound(farmed: Path, farm_jobs: Jobs, encoder_checkpoint: Path, tmp_path: Path) -> None:
    job = {key: value for key, value in farm_jobs[1].items() if key != "audio_features"} | {
        "encoder": str(encoder_checkpoint)
    }
    record = farm([job, farm_jobs[1] | {"output": "other.mp4"}], tmp_path / "out")
    assert record.done == 2
    alone = tmp_path / "alone.mp4"
    arguments = ["--checkpoint", job["checkpoint"], "--template", job["template"], "--encoder", job["encoder"]]
    ran = CliRunner().invoke(app, ["render", *arguments, "--audio", job["audio"], "--output", str(alone)])
    assert ran.exit_code == 0, ran.output
    assert len(frames_of(alone)) == results(tmp_path / "out")["1.mp4"]["frames"]


def test_each_job_has_the_features_of_its_encoder(farm_jobs: Jobs, encoder_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(AudioEncoder().state_dict(), tmp_path / "other.pth")
    heard = {key: value for key, value in farm_jobs[2].items() if key != "audio_features"}
    encoders = (encoder_checkpoint, tmp_path / "other.pth")
    farm([heard | {"encoder": str(path), "output": f"{n}.mp4"} for n, path in enumerate(encoders)], tmp_path / "out")
    first, second = (frames_of(tmp_path / "out" / f"{n}.mp4") for n in range(2))
    assert len(first) == len(second) and first != second


def test_lengths_that_differ_are_said_aloud(farm_jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second and third input have 11 and 7 frames, 25 a second, and sounds of that length."""
    jobs = [
        farm_jobs[1],
        farm_jobs[2] | {"output": "longer.mp4", "audio": farm_jobs[1]["audio"]},
        farm_jobs[1] | {"output": "shorter.mp4", "audio": farm_jobs[2]["audio"]},
        {key: value for key, value in farm_jobs[1].items() if key != "audio"} | {"output": "silent.mp4"},
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


# ── bad jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bad_job_stops_no_other_and_is_parked(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(farm_jobs[1]["template"], tmp_path / "face"))
    (damaged / "full_body_img" / "2.jpg").write_bytes(b"no JPEG")
    jobs = [farm_jobs[1] | {"template": str(damaged), "output": "bad.mp4"}, *farm_jobs]
    told: list[str] = []
    out = tmp_path / "out"
    record = farm(jobs, out, on_job_end=lambda state: told.append(f"{state.output} {state.status}"))
    assert (record.done, record.parked) == (3, 1)
    assert videos(out) == videos(farmed)
    row = results(out)["bad.mp4"]
    assert (row["status"], row["attempts"]) == ("parked", 3)
    assert "2.jpg" in row["error"]
    assert sorted(told) == ["0.mp4 done", "1.mp4 done", "bad.mp4 parked", "deep/er/2.mp4 done"]
    assert not [name for name in left_over(out) if ".part" in name]
    # Another run tries it as often.
    assert farm(jobs, out).skipped == 3
    assert (results(out)["bad.mp4"]["status"], results(out)["bad.mp4"]["attempts"]) == ("parked", 3)
    shutil.copy(damaged / "full_body_img" / "1.jpg", damaged / "full_body_img" / "2.jpg")
    assert farm(jobs, out).done == 1
    assert results(out)["bad.mp4"]["error"] is None


def test_a_parked_job_is_done_by_the_next_run_when_its_cause_is_gone(
    farmed: Path, farm_jobs: Jobs, tmp_path: Path
) -> None:
    """No input of the job changes: a file stands where the folder of its video should be, which is seen at once."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("in the way")
    record = farm(farm_jobs, out)
    assert (record.done, record.parked, record.frames) == (2, 1, 24 + 11)
    assert "deep/er: cannot be made" in results(out)["deep/er/2.mp4"]["error"]
    (out / "deep").unlink()
    record = farm(farm_jobs, out)
    assert (record.done, record.skipped, record.parked) == (1, 2, 0)
    assert (results(out)["deep/er/2.mp4"]["attempts"], results(out)["deep/er/2.mp4"]["error"]) == (0, None)
    assert videos(out) == videos(farmed)


@pytest.mark.parametrize("what", ["a folder of that name", "a name too long"])
def test_an_output_that_cannot_be_is_told_before_anything_is_rendered(
    what: str, farm_jobs: Jobs, tmp_path: Path
) -> None:
    output = "x" * 252 + ".mp4" if what == "a name too long" else "taken.mp4"
    if what == "a folder of that name":
        (tmp_path / "out" / output).mkdir(parents=True)
    record = farm([farm_jobs[1] | {"output": output}], tmp_path / "out")
    assert (record.parked, record.frames) == (1, 0)
    assert {"a name too long": "File name too long"}.get(what, "is a folder; expected the name of a file") in str(
        results(tmp_path / "out")[output]["error"]
    )


def test_a_folder_on_another_file_system(
    farmed: Path, farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a link in the output folder may lead to one: there is no renaming into it."""
    replace = Path.replace

    def within_one(self: Path, target: Path) -> Path:
        if (".gpupipe-farm" in self.parts) != (".gpupipe-farm" in Path(target).parts):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(self), None, str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", within_one)
    assert farm(farm_jobs, tmp_path / "out").done == 3
    assert videos(tmp_path / "out") == videos(farmed)
    assert left_over(tmp_path / "out") == []


def test_workers_are_given_whole_paths(farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a cluster are in other folders."""
    seen: list[Path] = []
    render = worker.Worker.render

    def noting(self: worker.Worker, parts: Any) -> Any:
        return render(self, (seen.append(part.path) or part for part in parts))

    monkeypatch.setattr(worker.Worker, "render", noting)
    monkeypatch.chdir(tmp_path)
    assert farm(farm_jobs[1:2], Path("out")).done == 1
    assert seen and all(path.is_absolute() for path in seen)


def test_an_error_leaves_what_would_be_joined(farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of hours takes minutes to be joined, and nobody would take it."""
    began: list[str] = []
    one_began = threading.Event()
    stopped: list[bool] = []

    def join(job: Any, parts: Any, path: Any, stop: threading.Event) -> Any:
        began.append(job.output)
        one_began.set()
        stopped.append(stop.wait(20))
        raise InputError("not joined")

    def stop(self: Any, *, wait: bool) -> None:
        if len(self._running) == 2:
            assert one_began.wait(20)
            raise KeyboardInterrupt

    monkeypatch.setattr(local, "join_parts", join)
    monkeypatch.setattr(local._Joins, "settle", stop)
    with pytest.raises(KeyboardInterrupt):
        farm([farm_jobs[1], farm_jobs[2]], tmp_path / "out")
    assert len(began) == 1 and stopped == [True]


def test_a_template_of_an_impossible_name_stops_no_other_job(farm_jobs: Jobs, tmp_path: Path) -> None:
    """Where it cannot even be asked whether it is a folder."""
    record = farm([farm_jobs[1] | {"template": "t" * 300, "output": "bad.mp4"}, farm_jobs[2]], tmp_path / "out")
    assert (record.done, record.parked) == (1, 1)
    assert "(File name too long)" in results(tmp_path / "out")["bad.mp4"]["error"]


def test_sound_that_is_missing_is_told_before_anything_is_rendered(farm_jobs: Jobs, tmp_path: Path) -> None:
    record = farm([farm_jobs[1] | {"audio": "gone.wav"}], tmp_path / "out")
    assert (record.parked, record.frames) == (1, 0)
    assert "gone.wav: no such" in results(tmp_path / "out")["1.mp4"]["error"]


def test_a_job_that_fails_while_it_is_rendered_is_the_only_one(
    farmed: Path, farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpupipe.avatar import Avatar

    real = Avatar.look_up

    def fails(self: Avatar, frames: np.ndarray) -> Any:
        if "face1" in self.template.name:
            raise RuntimeError("the second face cannot be looked up")
        return real(self, frames)

    monkeypatch.setattr(Avatar, "look_up", fails)
    out = tmp_path / "out"
    record = farm(farm_jobs, out, batch_size=8)
    assert (record.done, record.parked) == (2, 1)
    assert results(out)["1.mp4"]["error"] == "RuntimeError: the second face cannot be looked up"
    expected = {name: content for name, content in videos(farmed).items() if name != "1.mp4"}
    assert videos(out).keys() == expected.keys()
    assert not [name for name in left_over(out) if ".part" in name]


def test_a_template_is_measured_for_its_avatar_not_for_each_part(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = template.image_size, []
    monkeypatch.setattr(template, "image_size", lambda path: (measured.append(path), real(path))[1])
    counts = []
    for jobs in (farm_jobs[2:], [farm_jobs[0], farm_jobs[2]]):  # one part, and four
        measured.clear()
        farm(jobs, tmp_path / f"{len(jobs)}")
        counts.append(len(measured))
    assert counts[0] == counts[1] > 0


def test_memory_that_runs_out_halves_the_batch(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = worker.render_batch, []

    def small(pieces: Any) -> Any:
        rows = sum(len(piece.rows) for piece in pieces)
        sizes.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(pieces)

    monkeypatch.setattr(worker, "render_batch", small)
    out = tmp_path / "out"
    record = farm(farm_jobs, out, batch_size=16)
    assert record.done == 3
    assert max(sizes) == 16 and sizes[-1] <= 3
    assert [len(frames_of(out / job["output"])) for job in farm_jobs] == [24, 11, 7]
    assert any("out of memory" in told for told in record.as_dict()["fallbacks"])


def test_memory_that_is_never_enough_fails_the_job(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(pieces: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(worker, "render_batch", never)
    assert farm(farm_jobs[1:2], tmp_path / "out", batch_size=4).parked == 1


def test_a_gpu_that_is_lost_stops_the_farm_and_fails_no_job(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch after the first fails; of the second part nobody knows more."""
    real, batches = worker.render_batch, []

    def lost(pieces: Any) -> Any:
        batches.append(pieces)
        if len(batches) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(pieces)

    def alive(device: torch.device, otherwise: str) -> None:
        if len(batches) > 1:
            raise DeviceLostError(f"{device} is lost to this process; {otherwise}")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(worker, "render_batch", lost)
        patch.setattr(worker, "require_alive", alive)
        with pytest.raises(DeviceLostError, match="is lost to this process; run it again: what is whole is recorded"):
            farm(farm_jobs, out, batch_size=10)
    assert {(row["status"], row["attempts"]) for row in results(out).values()} <= {("waiting", 0)}
    assert not [name for name in left_over(out) if name.endswith(".part.mp4")]
    assert farm(farm_jobs, out, batch_size=10).done == 3


def test_a_disk_that_fills_up_while_frames_are_written_stops_the_farm(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: VideoWriter, frames: torch.Tensor) -> None:
        raise DiskFullError("no space left")

    monkeypatch.setattr(VideoWriter, "write", full)
    with pytest.raises(DiskFullError):
        farm(farm_jobs[1:2], tmp_path / "out")


def test_two_farms_in_one_folder_are_one_too_many(farm_jobs: Jobs, tmp_path: Path) -> None:
    with Ledger(tmp_path / "out", []).locked(), pytest.raises(OutputError, match="another farm is at work"):
        farm(farm_jobs, tmp_path / "out")


def test_a_device_of_no_such_name_is_told_before_a_cluster_starts(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match="device is 'foo'; expected cpu, cuda or cuda:N"):
        farm(farm_jobs, tmp_path / "out", workers=1, device="foo")
    with pytest.raises(InputError, match="workers need Ray"):  # the control: what comes next
        farm(farm_jobs, tmp_path / "out", workers=1, device="cuda")


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_tells_each_job_and_the_sum(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    jobs = write_jobs(
        tmp_path / "jobs.jsonl", [*farm_jobs, farm_jobs[0] | {"output": "gone.mp4", "template": "nowhere"}]
    )
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
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
        ("--part-seconds inf", "part seconds is inf; expected more than 0, and a finite number"),
        ("--part-seconds 0", "part seconds is 0.0; expected more than 0, and a finite number"),
        ("--part-seconds=-1", "part seconds is -1.0; expected more than 0, and a finite number"),
        ("--workers 0", "workers is 0; expected 1 or more"),
        ("--workers=-1", "workers is -1; expected 1 or more"),
        ("--batch-size 0", "batch size is 0; expected 1 or more"),
        ("--memory-budget=-1", "memory budget is -1 MB; expected 0 or more"),
        ("--workers 1 --device foo", "device is 'foo'; expected cpu, cuda or cuda:N"),
    ],
)
def test_an_option_that_cannot_be_used_starts_nothing(farm_jobs: Jobs, tmp_path: Path, words: str, told: str) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", farm_jobs)
    ran = CliRunner().invoke(app, ["farm", str(jobs), "--output-dir", str(tmp_path / "out"), *words.split()])
    assert ran.exit_code == 2, ran.output
    assert ran.stderr == f"gpupipe: {told}\n"
    assert not (tmp_path / "out").exists()


def test_a_wrong_file_of_jobs_starts_nothing(farm_jobs: Jobs, tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", [farm_jobs[0], farm_jobs[1] | {"crf": 52}])
    ran = CliRunner().invoke(app, ["farm", str(jobs), "--output-dir", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "jobs.jsonl:2: crf is 52" in ran.stderr
    assert not (tmp_path / "out").exists()
