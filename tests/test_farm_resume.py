"""A farm's later runs: what is done is skipped, what was begun goes on, what is not as recorded is made again."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from farming import Jobs, farm, left_over, results, videos, write_jobs
from PIL import Image

from gpupipe.errors import DiskFullError
from gpupipe.farm import ledger, read_jobs, worker


def test_what_is_done_is_skipped(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    record = farm(farm_jobs, out)
    assert (record.done, record.skipped) == (0, 3)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert {row["status"] for row in results(out).values()} == {"done"}


def test_what_another_run_has_just_done_is_skipped(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends while this one waits for the folder."""
    locked = ledger.Ledger.locked

    def late(self: ledger.Ledger) -> Any:
        monkeypatch.setattr(ledger.Ledger, "locked", locked)
        assert farm(farm_jobs[2:], tmp_path / "out").done == 1
        return locked(self)

    monkeypatch.setattr(ledger.Ledger, "locked", late)
    record = farm(farm_jobs[2:], tmp_path / "out")
    assert (record.done, record.skipped, record.frames) == (0, 1, 0)


def test_what_a_killed_run_could_not_remove_is_removed(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    """A run that was killed when a video had its name and its parts were still there."""
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    state = next(out.glob(".gpupipe-farm/*/state.json"))
    for name in ("00000.mp4", "00000.mp4.json", ".joined-1.part.mp4"):
        (state.parent / name).write_bytes(b"left")
    assert len(left_over(out)) == 3
    assert farm(farm_jobs, out).skipped == 3
    assert left_over(out) == []


def test_results_that_a_killed_run_had_not_finished_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".results-1.part.jsonl").write_text("left")
    (tmp_path / ".results-1.part.mp4").write_text("a user's")
    with ledger.Ledger(tmp_path, []).locked():
        assert sorted(path.name for path in tmp_path.iterdir()) == [".gpupipe-farm", ".results-1.part.mp4"]


def test_what_a_killed_worker_had_begun_goes_when_its_job_is_tried_again(farm_jobs: Jobs, tmp_path: Path) -> None:
    """Also if the job is parked again."""
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[:2]))
    some = ledger.Ledger(tmp_path / "out", jobs)
    for job in jobs:
        some.folder(job).mkdir(parents=True)
        for name in (".00000-5eed.part.mp4", ".00001.mp4-5eed.part.json", "00000.mp4", "00000.mp4.json"):
            (some.folder(job) / name).touch()
    some.reset(jobs[0])
    assert sorted(path.name for path in some.folder(jobs[0]).iterdir()) == ["00000.mp4", "00000.mp4.json"]
    assert len(list(some.folder(jobs[1]).iterdir())) == 4


def test_a_state_that_names_another_output_is_not_taken(farm_jobs: Jobs, tmp_path: Path) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[1:2]))
    some = ledger.Ledger(tmp_path, jobs)
    some.states["1.mp4"].status = "done"
    some.save(jobs[0])
    kept = some.folder(jobs[0]) / "state.json"
    assert ledger.Ledger(tmp_path, jobs).states["1.mp4"].status == "done"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"output": "other.mp4"}))
    state = ledger.Ledger(tmp_path, jobs).states["1.mp4"]
    assert (state.output, state.status) == ("1.mp4", "waiting")


def test_results_of_another_file_of_jobs_stay(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    before = results(out)
    for number, damaged in enumerate(("{", "[1]", '{"output": []}')):
        (out / f".gpupipe-farm/{number}").mkdir()
        (out / f".gpupipe-farm/{number}/state.json").write_text(damaged)
    record = farm([farm_jobs[2] | {"output": "new.mp4"}, farm_jobs[1]], out)
    assert (record.jobs, record.done, record.skipped) == (2, 1, 1)
    after = results(out)
    assert list(after) == ["new.mp4", "1.mp4", "0.mp4", "deep/er/2.mp4"]
    assert {name: row for name, row in after.items() if name != "new.mp4"} == before
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    assert videos(out).keys() == {*videos(farmed), "new.mp4"}


def test_what_changed_is_done_again(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    features = tmp_path / "other.npy"
    np.save(features, np.load(farm_jobs[1]["audio_features"]) + 1)
    (out / "deep/er/2.mp4").unlink()
    record = farm([farm_jobs[0], farm_jobs[1] | {"audio_features": str(features)}, farm_jobs[2]], out)
    assert (record.done, record.skipped) == (2, 1)
    assert videos(out)["1.mp4"] != videos(farmed)["1.mp4"]
    assert videos(out)["deep/er/2.mp4"] == videos(farmed)["deep/er/2.mp4"]


def test_what_another_version_made_is_done_again(
    farmed: Path, farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    monkeypatch.setattr(ledger, "__version__", "0")
    record = farm(farm_jobs[2:], out)
    assert (record.done, record.skipped) == (1, 0)


def test_a_device_is_not_read_for_its_hash(farm_jobs: Jobs, tmp_path: Path) -> None:
    """Another than /dev/null might never end, and a pipe would block: whoever opens it says so."""
    (tmp_path / "empty.wav").touch()
    sounds = {"empty.mp4": tmp_path / "empty.wav", "device.mp4": "/dev/null"}
    jobs = [farm_jobs[1] | {"audio": str(sound), "output": name} for name, sound in sounds.items()]
    empty, device = map(ledger.Fingerprints().of, read_jobs(write_jobs(tmp_path / "jobs.jsonl", jobs)))
    assert device != empty


def test_what_changed_during_a_run_is_done_again(farm_jobs: Jobs, tmp_path: Path) -> None:
    """A face is kept from clip to clip: the second of these shows it as it was."""
    face = Path(shutil.copytree(farm_jobs[2]["template"], tmp_path / "face"))
    jobs = [farm_jobs[2] | {"template": str(face), "output": f"{number}.mp4", "crf": 30 + number} for number in (0, 1)]

    def change(state: Any) -> None:
        for image in face.glob("full_body_img/*.jpg"):
            Image.fromarray(255 - np.asarray(Image.open(image))).save(image)

    assert farm(jobs, tmp_path / "out", on_job_end=lambda state: state.output == "0.mp4" and change(state)).done == 2
    assert farm(jobs, tmp_path / "out").done == 2
    farm(jobs, tmp_path / "new")
    assert videos(tmp_path / "out") == videos(tmp_path / "new")


@pytest.mark.parametrize("damage", ["flipped", "cut", "a folder"])
def test_a_video_that_is_not_as_recorded_is_made_again(
    farmed: Path, farm_jobs: Jobs, tmp_path: Path, damage: str
) -> None:
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    video = out / "1.mp4"
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "a folder":
        video.unlink()
        video.mkdir()
    else:
        video.write_bytes(content if damage == "flipped" else content[:-100])
    record = farm(farm_jobs, out)
    if damage == "a folder":
        assert (record.skipped, record.parked) == (2, 1)
        assert "1.mp4: is a folder; expected the name of a file to write" in results(out)["1.mp4"]["error"]
    else:
        assert (record.done, record.skipped) == (1, 2)
        assert videos(out) == videos(farmed)


def test_force_does_all_again(farmed: Path, farm_jobs: Jobs, tmp_path: Path) -> None:
    out = Path(shutil.copytree(farmed, tmp_path / "out"))
    assert farm(farm_jobs, out, force=True).done == 3
    assert videos(out) == videos(farmed)


@pytest.fixture
def interrupted(farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
            farm(farm_jobs, tmp_path / "out")
    return tmp_path / "out"


def parts(folder: Path) -> list[Path]:
    return sorted((folder / ".gpupipe-farm").glob("*/0*.mp4"))


def test_a_run_goes_on_where_it_stopped(
    interrupted: Path, farm_jobs: Jobs, farmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert videos(interrupted) == {} and len(parts(interrupted)) >= 2
    assert results(interrupted)["0.mp4"]["status"] == "waiting"
    made: list[int] = []
    real = worker.write_record
    monkeypatch.setattr(worker, "write_record", lambda path, *rest: (made.append(path), real(path, *rest))[1])
    farm(farm_jobs, interrupted)
    assert len(made) == 3  # the last part of the first job, and the two others
    assert videos(interrupted) == videos(farmed)
    assert left_over(interrupted) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "unrecorded", "other inputs"])
def test_a_part_that_is_not_as_recorded_is_made_again(
    interrupted: Path, farm_jobs: Jobs, farmed: Path, damage: str
) -> None:
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
    farm(farm_jobs, interrupted)
    assert videos(interrupted) == videos(farmed)


def test_a_part_that_is_not_looked_at_spoils_the_video(
    interrupted: Path, farm_jobs: Jobs, farmed: Path, monkeypatch: pytest.MonkeyPatch
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
        farm(farm_jobs[:1], interrupted)
    assert videos(interrupted)["0.mp4"] != videos(farmed)["0.mp4"]


def test_a_real_full_disk(farm_jobs: Jobs, farmed: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(len(content) for content in videos(farmed).values()) // 1024
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(DiskFullError, match="No space left"):
            farm(farm_jobs, disk / "out")
        assert not [path for path in disk.rglob("*") if ".part" in path.name]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        farm(farm_jobs, disk / "out")
        assert videos(disk / "out") == videos(farmed)
    finally:
        gc.collect()  # a file that could not be ended stays open as long as its container lives
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
