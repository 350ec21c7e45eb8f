"""The fuzzer: a few of its cases in every run, and proof that it notices each kind of failure."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from fuzz import RAN_CODE, Plan, await_child, judge, start

SCRIPT = Path(fuzz.__file__)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)


def test_spoiled_files_are_refused_or_render() -> None:
    done = run("--cases", 45)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(count) for count in done.stdout.split("\nall")[1].split("\n")[0].split()]
    assert counts[0] == 45
    assert counts[1] >= 4 and counts[2] >= 15, "both outcomes occur"
    assert counts[3] == 0


@pytest.mark.slow
def test_many_spoiled_files_are_refused_or_render() -> None:
    done = run("--cases", 1000, "--seed", 7)
    assert done.returncode == 0, done.stdout + done.stderr


# ── what is noticed ───────────────────────────────────────────────────────────────────────────────────────────────────


def out(plan: Plan) -> Path:
    return Path(plan.words[0])


def refuse(plan: Plan, line: str = "gpupipe: /in/0.lms: has 3 points; expected at least 53", code: int = 2) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)


def succeed(plan: Plan) -> None:
    (out(plan) / "clip.mp4").write_bytes(b"whole")


def raise_error(plan: Plan) -> None:
    raise KeyError("a bug of ours")


def thread_that_stays(plan: Plan) -> None:
    threading.Thread(target=time.sleep, args=(60,)).start()


def leave(name: str) -> Callable[[Plan], None]:
    def act(plan: Plan) -> None:
        (out(plan) / name).write_bytes(b"half")
        refuse(plan)

    return act


def leave_temporary(plan: Plan) -> None:
    tempfile.mkstemp()
    succeed(plan)


def run_code(plan: Plan) -> None:
    (out(plan).parent / RAN_CODE).touch()
    refuse(plan)


def hoard(plan: Plan) -> None:
    bytearray(b"x" * (150 << 20))


def judged(act: Callable[[Plan], Any], folder: Path, *, allows: str = "", limit: float = 10) -> str | None:
    def prepare(folder: Path) -> Plan:
        (folder / "out").mkdir()
        return Plan([str(folder / "out")], ["0.lms"], "spoiled", allows=allows)

    child = start(folder / "case", prepare, act)
    return judge(await_child(child, folder / "case", limit=limit))


@pytest.mark.parametrize("act", [succeed, refuse])
def test_correct_outcomes_pass(act: Callable[[Plan], Any], tmp_path: Path) -> None:
    assert judged(act, tmp_path) is None


def test_parked_jobs_pass(tmp_path: Path) -> None:
    line = "a.mp4: parked after 1 attempts: /in/0.npy: no such file"
    assert judged(lambda plan: refuse(plan, line, 1), tmp_path / "farm", allows="parked after") is None
    assert judged(lambda plan: refuse(plan, line, 1), tmp_path / "render") is not None


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (raise_error, "traceback: KeyError"),
        (lambda plan: time.sleep(60), "hang: "),
        (thread_that_stays, "hang: "),
        (lambda plan: ctypes.string_at(0), "crash: signal 11"),
        (lambda plan: os.abort(), "crash: signal 6"),
        (lambda plan: refuse(plan, code=1), "exit 1: gpupipe: /in/0.lms"),
        (leave("clip.mp4"), "left over: out/clip.mp4"),
        (leave(".clip-x7.part.mp4"), "left over: out/.clip-x7.part.mp4"),
        (leave_temporary, "left over: .*tmp/"),
        (run_code, "code in the file was run"),
        (hoard, "memory: [1-9]"),
        (lambda plan: "2 frames of 3 were decoded", "output: 2 frames of 3"),
        (lambda plan: refuse(plan, "gpupipe: /in/1.lms: has 3 points; expected at least 53"), "names none of 0.lms"),
        (lambda plan: refuse(plan, "libpng error\ngpupipe: /in/0.lms: no"), "not one line: libpng error"),
        (lambda plan: refuse(plan, "/in/0.lms: no"), "not one line: /in/0.lms"),
        (lambda plan: refuse(plan, ""), "not one line: "),
        (lambda plan: refuse(plan, "gpupipe: 0.lms: can't allocate memory"), "asked for memory that a header promised"),
    ],
)
def test_wrong_outcomes_are_reported(
    act: Callable[[Plan], Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "LIMIT_MEMORY", 100 << 20)
    found = judged(act, tmp_path, limit=0.7 if problem.startswith("hang") else 10)
    assert found is not None
    assert re.match(problem, found), found


def test_an_error_of_the_harness_is_reported_as_such(tmp_path: Path) -> None:
    def prepare(folder: Path) -> Plan:
        raise RuntimeError("cannot spoil")

    child = start(tmp_path / "case", prepare, succeed)
    assert str(judge(await_child(child, tmp_path / "case"))).startswith("harness: ")


def test_cases_are_reproducible() -> None:
    """The same seed, kind and number spoil the same file in the same way."""
    from fuzz_media import spoil_sound

    once, again = ([spoil_sound(b"", random.Random(f"1/sound/{i}")) for i in range(20)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 10
