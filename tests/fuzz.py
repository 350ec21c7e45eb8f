"""Bad input at scale: spoils real input files in thousands of ways and checks how the command line meets them.

    python tests/fuzz.py --cases 10000 --seed 1
    python tests/fuzz.py --kind features --seed 1 --only 37 --keep kept     # one case again, its files kept

Each case takes a small clip that renders, spoils one of its files and runs `gpupipe render`, `frames`, `reference`,
`features`, `export` or `farm` on it. It must end within 10 seconds either

- with exit code 0 and a whole output, which is decoded to see that, or
- with exit code 2 and one line on stderr, ``gpupipe: <file>: what was met; expected what``, that names the spoiled
  file, and with no file left where the output was to be, nor any temporary one.

Anything else fails: a traceback, another exit code, death by a signal, a hang, memory allocated because a header
claimed a size, code in a file that was run.

A process that has everything imported forks a child for each case (Linux only): the child spoils the file, calls the
command's own entry point, and decodes what it wrote. Everything random comes from the seed, the kind and the number
of the case, so that each can be run again by itself. A library such as Hypothesis shrinks what it has found by running
it again and again in one process; here a case may end that process, and is one file whose spoiling has a name, so there
is little to shrink: a seeded generator is all that is needed.

What is spoiled, and how, is in `fuzz_cases.py` and the other `fuzz_….py`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# A fork takes along only the thread that forks: in the parent, libraries must not start any.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

LIMIT_SECONDS = 10.0
LIMIT_MEMORY = 1 << 30
"""Bytes of real memory that a case may use beyond what it begins with."""
LIMIT_ADDRESSES = 6 << 30
"""Bytes of address space that it may ask for beyond that: a header that claims terabytes must not stop the machine."""

RAN_CODE = "code-was-run"
"""The file that code inside a spoiled file creates in the case's folder, when it is run."""


@dataclass(frozen=True)
class Plan:
    """What a child is about to do: a command line, the names one of which an error must give, and what was spoiled how.

    ``unprivileged``: run as a user who owns nothing, since root can read forbidden files. ``allows``: the message with
    which exit code 1 is right.
    """

    words: list[str]
    names: list[str]
    how: str
    unprivileged: bool = False
    allows: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a child ended. ``code`` is its exit code, or minus the signal that ended it; None if it hung and was killed.
    ``memory`` is the most that it held, in bytes, beyond what it began with."""

    plan: Plan
    code: int | None
    stderr: str
    left: list[str]
    verdict: str | None
    seconds: float
    memory: int = 0


# ── the child ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(folder: Path, prepare: Callable[[Path], Plan], act: Callable[[Plan], str | None]) -> int:
    """Fork a child that prepares a case in ``folder``, which is new, and acts on it; return its process id.

    Args:
        prepare: spoils what is needed and returns the plan. An error in it counts as the harness's own.
        act: runs the command, which ends by ``SystemExit`` or an error; or returns what is wrong with its output, or
            None.
    """
    folder.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    gc.disable()
    try:
        plan = prepare(folder)
        (folder / "plan.json").write_text(json.dumps(plan.__dict__))
        _confine(folder)
        _run(folder, plan, act)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def _confine(folder: Path) -> None:
    """Send all messages and leftover files to the case's own folder, and limit memory."""
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o666), descriptor)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
    pages = [int(count) * resource.getpagesize() for count in Path("/proc/self/statm").read_text().split()]
    (folder / "held").write_text(str(pages[1]))
    resource.setrlimit(resource.RLIMIT_AS, (pages[0] + LIMIT_ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # which would report a crash at length, on pytest's own terminal


def _run(folder: Path, plan: Plan, act: Callable[[Plan], str | None]) -> NoReturn:
    """Act, and end as an interpreter does: print the error, wait for threads, flush the streams."""
    code, verdict = 0, None
    try:
        verdict = act(plan)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    if verdict is not None:
        (folder / "verdict").write_text(verdict)
    threading._shutdown()  # type: ignore[attr-defined]  # which is what a command's end waits for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ── the parent ────────────────────────────────────────────────────────────────────────────────────────────────────────


def await_child(child: int, folder: Path, limit: float = LIMIT_SECONDS) -> Outcome:
    """Wait for a child of :func:`start`, and kill it when it hangs."""
    began = time.monotonic()
    handle = os.pidfd_open(child)
    with contextlib.closing(os.fdopen(handle)):
        ended, _, _ = select.select([handle], [], [], limit)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    return _outcome(folder, status if ended else None, usage, time.monotonic() - began)


def _outcome(folder: Path, status: int | None, usage: resource.struct_rusage, seconds: float) -> Outcome:
    def text(name: str) -> str | None:
        path = folder / name
        return path.read_text(errors="replace") if path.exists() else None

    plan = Plan(**json.loads(text("plan.json") or '{"words": [], "names": [], "how": "not spoiled"}'))
    kept = {"plan.json", "held", "stdout", "stderr", "verdict"}
    left = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and path.relative_to(folder).parts[0] != "in" and path.name not in kept
    ]
    memory = max(0, usage.ru_maxrss * 1024 - int(text("held") or 0))
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return Outcome(plan, code, text("stderr") or "", left, text("verdict"), seconds, memory)


_NOISE = re.compile(r"\d+/\d+ frames|WARNING |INFO |  ")
"""How lines begin that are not errors: progress, and log messages, which continue on indented lines."""


def judge(outcome: Outcome) -> str | None:
    """What is wrong with a case's outcome; None if nothing is."""
    code, left = outcome.code, outcome.left
    allowed = code == 1 and bool(outcome.plan.allows) and outcome.plan.allows in outcome.stderr
    last = (outcome.stderr.strip().splitlines() or ["nothing was said"])[-1]
    wrong = {
        f"hang: {outcome.seconds:.1f} s": code is None,
        f"crash: signal {-(code or 0)}": code is not None and code < 0,
        f"harness: {last}": code == 99,
        "code in the file was run": any(RAN_CODE in name for name in left),
        f"traceback: {last}": "Traceback" in outcome.stderr,
        f"memory: {outcome.memory >> 20} MB": outcome.memory > LIMIT_MEMORY,
        f"exit {code}: {last}": code not in (0, 2) and not allowed,
        f"left over: {', '.join(left)}": any(".part" in name or name.startswith("tmp/") for name in left),
        f"output: {outcome.verdict}": outcome.verdict is not None,
    }
    return next((problem for problem, is_so in wrong.items() if is_so), None) or (
        _misspoken(outcome) if code == 2 else None
    )


def _misspoken(outcome: Outcome) -> str | None:
    """What is wrong with an error message."""
    lines = [line for line in outcome.stderr.splitlines() if line and not _NOISE.match(line)]
    told = " / ".join(lines)
    wrong = {
        f"left over: {', '.join(outcome.left)}": bool(outcome.left),
        f"not one line: {told}": len(lines) != 1 or not told.startswith("gpupipe: "),
        f"asked for memory that a header promised: {told}": bool(re.search(r"allocate|MemoryError", told)),
        f"names none of {', '.join(outcome.plan.names)}: {told}": not any(n in told for n in outcome.plan.names),
    }
    return next((problem for problem, is_so in wrong.items() if is_so), None)


# ── all cases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cases(kinds: list[str], count: int) -> Iterator[tuple[str, int]]:
    """Kinds in turn, each with its own running numbers."""
    for number in range(count):
        yield kinds[number % len(kinds)], number // len(kinds)


def main(words: list[str] | None = None) -> int:
    """Run cases, print a table, and return 1 if any failed."""
    from fuzz_cases import KINDS, Ground, act, prepare

    parser = argparse.ArgumentParser(description="Spoil input files and hold the command line to its word.")
    parser.add_argument("--cases", type=int, default=1000, help="how many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this; may be given again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--only", type=int, help="only the case of this number of each kind")
    parser.add_argument("--keep", type=Path, help="where the folders of failed cases go (with --only: of every case)")
    options = parser.parse_args(words)
    kinds = options.kind or list(KINDS)
    chosen = [(k, options.only) for k in kinds] if options.only is not None else list(cases(kinds, options.cases))

    counts: Counter[tuple[str, str]] = Counter()
    problems: list[str] = []
    slowest = (0.0, "")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpupipe-fuzz-") as scratch:
        ground = Ground(Path(scratch) / "ground")
        for kind, number in itertools.takewhile(lambda _: time.monotonic() - began < options.seconds, chosen):
            name = f"{kind}-{options.seed}-{number}"
            folder = Path(scratch) / name

            def once(folder: Path = folder, kind: str = kind, number: int = number) -> Outcome:
                plan = lambda folder: prepare(ground, folder, kind, f"{options.seed}/{kind}/{number}")  # noqa: E731
                return await_child(start(folder, plan, act), folder)

            outcome = once()
            problem = judge(outcome)
            if problem is not None and problem.startswith("hang"):  # the machine may only have been busy
                shutil.rmtree(folder)
                outcome = once()
                problem = judge(outcome)
            counts[kind, "cases"] += 1
            counts[kind, "failures" if problem else "refused" if outcome.code else "succeeded"] += 1
            slowest = max(slowest, (outcome.seconds, f"{name} ({outcome.plan.how})"))
            if problem:
                problems.append(f"{name} ({outcome.plan.how}): {problem}")
                print(problems[-1], flush=True)
            if options.only is not None:
                print(f"{name}: {outcome.plan.how}; exit {outcome.code}; {' '.join(outcome.plan.words)}")
                print(outcome.stderr.strip())
            if options.keep and (problem or options.only is not None):
                shutil.rmtree(options.keep / name, ignore_errors=True)
                shutil.copytree(folder, options.keep / name, ignore=_special, symlinks=True)
            shutil.rmtree(folder)
    print(table(kinds, counts))
    seconds = time.monotonic() - began
    print(f"{counts.total() // 2} cases in {seconds:.0f} s; the slowest took {slowest[0]:.1f} s: {slowest[1]}")
    return int(bool(problems))


def table(kinds: list[str], counts: Counter[tuple[str, str]]) -> str:
    """The counts of each kind, and of all."""
    columns = ("cases", "succeeded", "refused", "failures")
    rows: list[tuple[Any, ...]] = [("kind", *columns)]
    rows += [(kind, *(counts[kind, column] for column in columns)) for kind in kinds]
    rows.append(("all", *(sum(counts[kind, column] for kind in kinds) for column in columns)))
    return "\n".join(f"{row[0]:<12}" + "".join(f"{value:>11}" for value in row[1:]) for row in rows)


def _special(folder: str, names: list[str]) -> list[str]:
    """The names of pipes, which cannot be copied."""
    return [name for name in names if (Path(folder) / name).is_fifo()]


if __name__ == "__main__":
    sys.exit(main())
