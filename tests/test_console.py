"""What commands say while they work and how they end: messages, progress, signals, streams that take nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import typer
from commands import FRAMES, QUICK, render_words, run, write_clip
from farming import write_jobs

from gpupipe import cli
from gpupipe.console import progress_bar, reporting


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, make_template: Any, tiny_checkpoint: Any) -> dict[str, Path]:
    return write_clip(tmp_path_factory.mktemp("clip"), make_template, tiny_checkpoint)


def test_anything_else_exits_1_and_debug_shows_where(
    clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("gpupipe.avatar.Avatar.render", broken)
    result = run(*render_words(clip, tmp_path / "out.mp4", *QUICK))
    assert result.exit_code == 1
    assert "RuntimeError: a bug of ours" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" in run(*render_words(clip, tmp_path / "out.mp4", *QUICK, "--debug")).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_half_written(number: int, clip: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros((20_000, 512), np.float32))
    (tmp_path / "out").mkdir()
    words = render_words({**clip, "features": tmp_path / "long.npy"}, tmp_path / "out" / "clip.mp4", *QUICK)
    command = [Path(sys.executable).with_name("gpupipe"), *words, "--save-frames"]
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background jobs may ignore it
    try:
        running = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, before)
    with running:
        kept = tmp_path / "out" / "clip_frames"
        deadline = time.monotonic() + 60
        while not (kept.is_dir() and any(kept.glob("frame_*.jpg"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list((tmp_path / "out").glob(".clip-*.part.mp4")), "it is being written"
        running.send_signal(number)
        time.sleep(0.05)
        running.send_signal(number)  # as `timeout` does, terminals that close, and people who press Ctrl-C twice
        try:
            _, told = running.communicate(timeout=60)
        finally:
            running.kill()  # or this test would wait for one that hangs
    assert running.returncode == 1
    assert "gpupipe: interrupted; every file under its own name is whole" in told and "Traceback" not in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip_frames"]
    assert all(cv2.imread(str(path)) is not None for path in kept.iterdir()), "and nothing but images"


@pytest.mark.parametrize("command", ["render", "frames", "farm"])
def test_an_interrupt_while_a_thread_starts_leaves_no_thread(
    command: str, clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end Python would wait for it, for ever."""
    files = {"checkpoint": clip["checkpoint"], "template": clip["template"], "audio_features": clip["features"]}
    words: list[object] = []
    for name, path in files.items():
        words += f"--{name.replace('_', '-')}", path
    if command == "render":
        words = render_words(clip, tmp_path / "clip.mp4", "--save-frames", *QUICK)
    elif command == "frames":
        words = ["frames", *words, "--output-dir", tmp_path / "frames", *QUICK]
    else:
        line = {name: str(path) for name, path in files.items()}
        line |= {"audio": str(clip["sound"]), "output": "clip.mp4", "engine": "eager"}
        words = ["farm", write_jobs(tmp_path / "jobs.jsonl", [line]), "--output-dir", tmp_path / "out"]
    start, there, left = threading.Thread.start, set(threading.enumerate()), 0

    def start_one(thread: threading.Thread) -> None:
        nonlocal left
        start(thread)
        if threading.current_thread() is threading.main_thread():
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_one)
    for number in itertools.count(1):
        left = number
        if (code := run(*words).exit_code) == 0:
            break
        assert code == 1
    assert number > 5
    for thread in set(threading.enumerate()) - there:
        thread.join(10)
        assert not thread.is_alive(), thread.name


@pytest.mark.parametrize("words", ["--version", "doctor --json", "doctor", "--help"])
@pytest.mark.parametrize("where", ["/dev/full", "pipe"])
def test_standard_output_that_takes_nothing_is_one_line(where: str, words: str) -> None:
    name = Path(sys.executable).with_name("gpupipe")
    redirect = "> /dev/full" if where == "/dev/full" else "| true"
    for buffered in ("", "1"):
        line = f"sleep 0.2; PYTHONUNBUFFERED={buffered} {name} {words} {redirect}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 or (not lines and where == "pipe"), "Rich ends in silence where nobody reads"
        assert all(line.startswith("gpupipe: standard output ") for line in lines)


def test_signal_handlers_are_restored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with reporting(False):
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGHUP)  # ignored, as under nohup
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_before_a_command_has_begun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def app(**_: object) -> None:
        raise KeyboardInterrupt  # while typer looks at the options

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(cli.atexit, "register", lambda function: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == ""


@pytest.fixture
def usual_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("again", ["a signal", "progress"])
def test_a_swallowed_interrupt_does_not_make_a_command_deaf(again: str) -> None:
    """A library may swallow one; perhaps nobody presses Ctrl-C again."""
    with pytest.raises(typer.Exit), reporting(False), progress_bar() as progress:
        progress(1, 9)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        if again == "progress":
            progress(2, 9)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "the process is about to end"
    with reporting(False), progress_bar() as progress:
        progress(1, 9)


@pytest.mark.usefixtures("usual_signals")
def test_cleaning_up_is_not_interrupted_again() -> None:
    done: list[str] = []

    def frames() -> Iterator[int]:
        try:
            yield 1
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while the interrupt leaves the loop
            done.append("threads")

    def files() -> None:
        try:
            for _ in frames():
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with contextlib.suppress(OSError):
                raise OSError
            try:
                raise OSError
            except OSError:
                os.kill(os.getpid(), signal.SIGINT)
            done.append("files")

    with pytest.raises(typer.Exit), reporting(False):
        files()
    assert done == ["threads", "files"]


@pytest.mark.parametrize("messages", ["/dev/full", "pipe", "closed"])
def test_work_goes_on_where_messages_cannot_be_written(messages: str, clip: dict[str, Path], tmp_path: Path) -> None:
    """A log on a full disk or a closed pipe is no reason to lose a render, or to exit with another code."""
    name = Path(sys.executable).with_name("gpupipe")
    reader, writer = os.pipe()
    os.close(reader)
    redirect = {"/dev/full": "2>/dev/full", "pipe": f"2>&{writer}", "closed": "2>&-"}[messages]
    for words, code in ((render_words(clip, tmp_path / "a.mp4", *QUICK), 0), (["features", "no.wav"], 2)):
        line = shlex.join(map(str, [name, *words]))
        done = subprocess.run(["bash", "-c", f"{line} {redirect}"], pass_fds=(writer,), check=False)
        assert done.returncode == code
    os.close(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_warning_is_one_line_where_there_is_no_terminal(clip: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros((4 * FRAMES, 512), np.float32))
    output = tmp_path / f"{80 * 'x'}.mp4"
    words = render_words({**clip, "features": tmp_path / "long.npy"}, output, *QUICK)
    command = [str(word) for word in (Path(sys.executable).with_name("gpupipe"), *words)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    [line] = [line for line in told.splitlines() if "sound lasts" in line]
    assert line == f"WARNING  {output}: sound lasts 0.20 s and the picture 0.80 s (-0.60 s)"


def test_progress_counts_from_the_first_frames_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opening a checkpoint may take longer than a short clip: included in the rate, it would falsify the time left."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress_bar() as progress:
        for done, then in ((10, 1060.0), (20, 1061.0), (70, 1066.0), (100, 1069.0)):
            now = then
            progress(done, 100)
    with progress_bar() as progress:
        progress(5, 5)
    assert capsys.readouterr().err.splitlines() == [
        "70/100 frames, 10.0 frames/s, 3 s left",
        "100/100 frames, 10.0 frames/s, 0 s left",
        "5/5 frames",
    ]
