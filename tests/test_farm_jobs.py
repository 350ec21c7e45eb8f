"""What a file of jobs may hold, and what is said of one that holds something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpupipe import InputError
from gpupipe.farm import run_farm
from gpupipe.farm.jobs import Job, read_jobs
from gpupipe.farm.ledger import Fingerprints
from gpupipe.template import template_files

GOOD: dict[str, Any] = {"checkpoint": "a.pth", "template": "face", "audio_features": "a.npy", "output": "a.mp4"}
HEARD = GOOD | {"audio_features": None, "encoder": "e.pth", "audio": "a.wav"}


def write(folder: Path, *lines: str | dict[str, Any]) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_options_are_those_of_render(tmp_path: Path) -> None:
    first, second = read_jobs(write(tmp_path, GOOD, "", GOOD | {"output": "deep/b.mkv", "mode": "wenet", "crf": 0}))
    assert (first.frame_rate, first.crf, first.blend, first.start_frame) == (25, 20, "feather", 0)
    assert (second.frame_rate, second.crf, second.output) == (20, 0, "deep/b.mkv")
    assert first.id != second.id


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_those_of_any_editor(end: str, mark: str, tmp_path: Path) -> None:
    """With the mark that Windows puts first, and with letters in names that only Python takes for ends of lines."""
    names = ["a\u2028b.mp4", "c\u0085d.mp4"]
    lines = (json.dumps(GOOD | {"output": name}, ensure_ascii=False) for name in names)
    (tmp_path / "jobs.jsonl").write_bytes((mark + end.join(["", *lines, " ", ""])).encode())
    assert [job.output for job in read_jobs(tmp_path / "jobs.jsonl")] == names


def test_every_option_of_render_is_known(tmp_path: Path) -> None:
    import inspect

    from gpupipe import cli

    options = set(inspect.signature(cli.render).parameters)
    others = {"save_frames", "frames_dir", "profile", "as_json", "debug", "device", "batch_size", "memory_budget"}
    assert options - others == set(Job.model_fields)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[]", "is list; expected a JSON object"),
        (GOOD | {"speed": 2}, "speed is no key of a job"),
        (GOOD | {"device": "cuda"}, "device is an option of the whole farm"),
        (GOOD | {"save_frames": True}, "save_frames is an option of render"),
        ({"template": "t", "audio_features": "a", "output": "a.mp4"}, "checkpoint is missing"),
        (GOOD | {"crf": 52}, "crf is 52"),
        (GOOD | {"crf": "20"}, "crf is '20'"),
        (GOOD | {"fps": 0}, "fps is 0"),
        (GOOD | {"mode": "mp3"}, "mode is 'mp3'"),
        (GOOD | {"start_frame": -1}, "start_frame is -1"),
        (GOOD | {"feather": float("nan")}, "feather is nan"),
        (GOOD | {"audio": "\ud800"}, "expected the name of a file"),
        (GOOD | {"output": "a\0.mp4"}, "expected the name of a file"),
        (GOOD | {"output": "/a.mp4"}, "expected a file inside the output folder"),
        (GOOD | {"output": "../a.mp4"}, "expected a file inside the output folder"),
        (GOOD | {"output": "a/../../b.mp4"}, "expected a file inside the output folder"),
        (GOOD | {"output": "a.avi"}, "expected a file inside the output folder"),
        (GOOD | {"output": ".gpupipe-farm/a.mp4"}, "the farm's own"),
        (GOOD | {"encoder": "e.pth"}, "either audio_features or encoder"),
        ({key: value for key, value in GOOD.items() if key != "audio_features"}, "either audio_features or encoder"),
        (HEARD | {"audio": None}, "expected audio with it"),
        (HEARD | {"mode": "hubert"}, "and mode ave"),
    ],
)
def test_a_wrong_line_is_told_by_its_number(tmp_path: Path, line: str | dict[str, Any], told: str) -> None:
    path = write(tmp_path, GOOD | {"output": "first.mp4"}, line)
    with pytest.raises(InputError) as error:
        read_jobs(path)
    assert str(error.value).startswith(f"{path}:2: ") and told in str(error.value)
    assert "\n" not in str(error.value)


def test_two_jobs_cannot_have_one_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r":2: output \S*a.mp4 is also that of line 1 \(and 1 more"):
        read_jobs(write(tmp_path, GOOD, GOOD | {"output": "./a.mp4"}, "nothing"))


@pytest.mark.parametrize("way", ["itself", "a link of another name", "a link to its folder", "a second name"])
def test_a_file_of_jobs_is_not_written_over_by_results(way: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = write(out, GOOD).rename(out / "results.jsonl")
    content = path.read_text()
    folder = out
    if way == "a link of another name":
        (tmp_path / "link.jsonl").symlink_to(path)
        path = tmp_path / "link.jsonl"
    elif way == "a link to its folder":
        folder = tmp_path / "link"
        folder.symlink_to(out)
    elif way == "a second name":
        (tmp_path / "other.jsonl").hardlink_to(path)
        path = tmp_path / "other.jsonl"
    with pytest.raises(InputError, match=f"^{path}: is where results are written; expected another name or output"):
        run_farm(path, folder, device="cpu")
    assert path.read_text() == content and [entry.name for entry in out.iterdir()] == ["results.jsonl"]


def test_outputs_that_links_make_one_file_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "x").mkdir(parents=True)
    (out / "y").symlink_to("x")
    path = write(tmp_path, *(GOOD | {"output": name} for name in ("1.mp4", "x/1.mp4", "y/2.mp4", "y/1.mp4")))
    with pytest.raises(InputError, match=r"outputs x/1.mp4 and y/1.mp4 are one file; expected one for each job"):
        run_farm(path, out, device="cpu")
    assert sorted(entry.name for entry in out.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("audio", ["out/2.mp4", "link/2.mp4", "3.mp4"])
def test_an_output_that_a_job_reads_is_refused(audio: str, tmp_path: Path) -> None:
    """It would be lost, or heard before or after it is written, as it happens."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "out" / "2.mp4").touch()
    (tmp_path / "3.mp4").symlink_to("out/2.mp4")
    jobs = GOOD, GOOD | {"output": "2.mp4"}, GOOD | {"output": "3.mp4", "audio": str(tmp_path / audio)}
    told = r"output 2\.mp4 is .*/out/2\.mp4, which a job reads; expected another name"
    with pytest.raises(InputError, match=told):
        run_farm(write(tmp_path, *jobs), tmp_path / "out", device="cpu")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["2.mp4"]


def test_an_output_that_is_a_template_s_video_is_refused(tmp_path: Path) -> None:
    job = GOOD | {"template": str(tmp_path / "anna"), "output": "anna/template.mp4"}
    with pytest.raises(InputError, match=r"output anna/template\.mp4 is .*/anna/template\.mp4, which a job reads"):
        run_farm(write(tmp_path, job), tmp_path, device="cpu")


def test_a_file_without_jobs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no jobs"):
        read_jobs(write(tmp_path, "", ""))
    with pytest.raises(InputError, match="no such file of jobs"):
        read_jobs(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="is a folder; expected an ordinary file"):
        read_jobs(tmp_path)


def test_a_fingerprint_is_of_content_and_options(tmp_path: Path) -> None:
    face = tmp_path / "face"
    (face / "landmarks").mkdir(parents=True)
    (face / "landmarks" / "0.lms").write_text("1 2")
    (tmp_path / "a.pth").write_text("weights")
    (tmp_path / "a.npy").write_text("rows")
    paths = {"checkpoint": str(tmp_path / "a.pth"), "template": str(face), "audio_features": str(tmp_path / "a.npy")}
    job = Job(**GOOD | paths)
    first = Fingerprints().of(job)
    assert first == Fingerprints().of(job.model_copy(update={"output": "b.mp4"}))
    others = [Fingerprints().of(job.model_copy(update={"crf": 21}))]
    others.append(Fingerprints().of(job.model_copy(update={"output": "a.mkv"})))
    (face / "landmarks" / "0.lms").write_text("1 3")
    others.append(Fingerprints().of(job))
    (tmp_path / "a.pth").unlink()
    others.append(Fingerprints().of(job))
    assert len({first, *others}) == 5


@pytest.mark.parametrize("use_parsing", [True, False])
def test_a_fingerprint_sees_every_file_of_a_template(tmp_path: Path, use_parsing: bool) -> None:
    face = tmp_path / "face"
    files = ["full_body_img/0.jpg", "full_body_img/1.jpg", "landmarks/0.lms", "parsing/0.png", "template.mp4"]
    for name in (*files, "features.npy"):
        (face / name).parent.mkdir(parents=True, exist_ok=True)
        (face / name).write_text("one")
    expected = [name for name in files if use_parsing or "parsing" not in name]
    # Recorded fingerprints have them in this order.
    assert template_files(face, use_parsing=use_parsing) == [face / name for name in expected]
    job = Job(**GOOD | {"template": str(face), "use_parsing": use_parsing})
    prints = [Fingerprints().of(job)]
    for name in (*files, "features.npy"):
        (face / name).write_text("other")
        prints.append(Fingerprints().of(job))
    assert len(set(prints)) == 1 + len(expected)


@pytest.mark.parametrize("key", ["checkpoint", "encoder", "audio"])
def test_a_fingerprint_sees_a_file_that_changes(tmp_path: Path, key: str) -> None:
    """In the next run: in this one, workers keep what they have read of it."""
    (tmp_path / key).write_text("one")
    job = Job(**HEARD | {key: str(tmp_path / key)})
    this_run = Fingerprints()
    first = this_run.of(job)
    (tmp_path / key).write_text("other")
    assert this_run.of(job) == first
    assert Fingerprints().of(job) != first
