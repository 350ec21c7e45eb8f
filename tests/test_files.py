"""What is read is an ordinary file; what is written never stands in place of something that is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpupipe import InputError
from gpupipe.errors import OutputError
from gpupipe.farm.jobs import read_jobs
from gpupipe.features import SpeechFeatures
from gpupipe.files import cache_folder, check_writable, input_file, input_folder, replacing, similar
from gpupipe.landmarks import read_landmarks
from gpupipe.models import load_state_dict
from gpupipe.video.decode import read_image
from gpupipe.video.frames import VideoFrames
from gpupipe.video.sound import open_sound

READERS: list[Callable[[Path], Any]] = [
    *(read_landmarks, SpeechFeatures, load_state_dict, read_image, VideoFrames, open_sound, read_jobs),
    lambda path: input_file(path, "file"),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nothing"])
def test_what_is_no_file_is_not_opened(kind: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    """A pipe would be waited for until somebody writes to it, and /dev/zero never ends."""
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": "it", "nothing": "absent"}[kind])
    told = {"loop": "cannot be read as|Symlink loop", "nothing": "no such"}.get(
        kind, f"is a {kind}; expected an ordinary"
    )
    with pytest.raises(InputError, match=rf"^{path}: .*({told})"):
        read(path)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert input_file(tmp_path / "link", "file") == tmp_path / "link"
    assert input_folder(str(tmp_path), "folder") == tmp_path
    with pytest.raises(InputError, match="file: is not a folder; expected a template directory"):
        input_folder(tmp_path / "file", "template directory")
    with pytest.raises(InputError, match=r"null (byte|character)"):
        input_file("a\0b", "file")


def test_a_broken_link_is_not_pointed_to_in_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "02.jpg").symlink_to(tmp_path / "nowhere")
    assert similar(tmp_path / "2.jpg") == "; there is 02.jpg"
    assert similar(tmp_path / "02.jpg") == ""


def test_an_interrupt_leaves_nothing_however_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the moment in which the temporary file is made."""
    touch = Path.touch

    def interrupted(path: Path, *given: Any, **options: Any) -> None:
        touch(path, *given, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "image.jpg"):
        pytest.fail("it was never made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_files_are_replaced(kind: str, tmp_path: Path) -> None:
    """To root /dev/null is a name like any other."""
    path = tmp_path / "out.npy"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(OutputError, match=f"is a {kind}; expected the name of a file"), replacing(path) as temporary:
        np.save(temporary, np.zeros(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npy"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_are_as_readable_as_the_user_s(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody changes the umask meanwhile, which is the process's: other threads make files, too."""
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
            with replacing(tmp_path / "out.npy") as temporary:
                np.save(temporary, np.zeros(3))
    finally:
        os.umask(before)
    assert (tmp_path / "out.npy").stat().st_mode & 0o777 == 0o666 & ~umask


def test_another_file_s_error_is_not_blamed_on_the_one_that_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"features\.npy"), replacing(tmp_path / "out.mp4"):
        (tmp_path / "features.npy").open()
    for url in (tmp_path / "out.mp4", f"file:{tmp_path}/out.mp4", None):
        with (
            pytest.raises(OutputError, match=r"out\.mp4: cannot be written: disk on fire"),
            replacing(tmp_path / "out.mp4"),
        ):
            raise OSError(5, "disk on fire", url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), BrokenPipeError(32, "pipe"), TimeoutError("late")]
)
def test_a_caller_s_connection_is_not_the_file(error: OSError, tmp_path: Path) -> None:
    """As a progress callback may lose one."""
    with pytest.raises(type(error)), replacing(tmp_path / "out.mp4"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["x" * 251, "夢" * 83])
def test_names_as_long_as_the_file_system_takes(stem: str, tmp_path: Path) -> None:
    with replacing(tmp_path / f"{stem}.mp4") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [f"{stem}.mp4"]


def test_a_folder_s_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.mp4: cannot be written: File name too long"):
        check_writable(tmp_path / ("x" * 300) / "out.mp4")


def test_two_that_write_one_file_at_once(tmp_path: Path) -> None:
    with replacing(tmp_path / "out.txt") as first, replacing(tmp_path / "out.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "out.txt").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_is_named_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("GPUPIPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gpupipe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == cache_folder() and cache_folder().stat().st_mode & 0o777 == 0o700, "for this process alone"
