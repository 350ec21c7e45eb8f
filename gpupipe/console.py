"""Output of the commands: lines, bars and tables on standard error, records on standard output, errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gpupipe.errors import GpupipeError, InputError, one_line
from gpupipe.memory import out_of_memory
from gpupipe.pipeline import RenderRecord

if TYPE_CHECKING:
    from gpupipe.farm import JobState


class _Messages(Console):
    """Standard error. If writing fails (its reader is gone, or a log's disk is full), the work goes on silently."""

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Print nothing from here on."""
        sys.stderr = None


class _Tables(Console):
    """Standard output."""

    def __exit__(self, *error: object) -> None:
        with _writing_output():
            super().__exit__(*error)


console = _Messages(stderr=True, markup=False, highlight=False)  # a path may hold what looks like markup


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn on logging; turn errors, Ctrl-C and termination signals into one line and an exit code."""
    form = "%(message)s"
    handler: logging.Handler = RichHandler(console=console, show_time=debug, show_path=debug, show_level=True)
    if not console.is_terminal:  # a log is searched for messages: one line each
        form, handler = ("%(asctime)s " if debug else "") + "%(levelname)-8s %(message)s", _PlainHandler()
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format=form, handlers=[handler])
    logging.getLogger("gpupipe").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        with _signals_interrupt():
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        console.print("gpupipe: interrupted; every file under its own name is whole", soft_wrap=True)
        raise typer.Exit(1) from None
    except BrokenPipeError:  # what was made is whole: it is told afterwards
        console.print("gpupipe: standard output was closed; every file under its own name is whole", soft_wrap=True)
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        told = one_line(error)
        if out_of_memory(error):
            told = f"not enough memory ({told}); --memory-budget of render, frames and farm limits what is kept"
        console.print(f"gpupipe: {told}", soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None


_UsageError: Any = typer.BadParameter.__base__
"""Raised for unknown commands and options: typer's class, click's in older versions."""


@contextlib.contextmanager
def wrong_usage() -> Iterator[None]:
    """Turn usage errors into one line and exit code 2."""
    try:
        yield
    except typer.Abort:
        sys.exit(1)
    except _UsageError as error:
        message = " ".join(error.format_message().split()).replace(": Value error, ", ": ")  # pydantic's
        if message:  # empty where help was shown instead
            path = error.ctx.command_path if error.ctx else "gpupipe"
            console.print(f"gpupipe: {message.rstrip('.')}; see '{path} --help'", soft_wrap=True)
        sys.exit(2)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: unfinished files are deleted on the way out.

    A signal that is ignored, as under ``nohup``, stays ignored. While the first is acted upon, until the process has
    ended, the others are ignored: ``timeout`` and closing terminals send two, people press Ctrl-C twice, and the second
    would interrupt the cleanup.
    """
    usual = {"SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL, "SIGINT": signal.default_int_handler}
    taken: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        here = {getattr(signal, name): handler for name, handler in usual.items() if hasattr(signal, name)}
        taken = {number: handler for number, handler in here.items() if signal.getsignal(number) == handler}

    def interrupt(number: int, _: object) -> None:
        first = not _came
        _came.append(number)
        if first or not _is_on_its_way_out():
            raise KeyboardInterrupt

    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        while _came and taken:
            signal.signal(taken.popitem()[0], signal.SIG_IGN)
        raise
    finally:
        while taken:
            signal.signal(*taken.popitem())
        _came.clear()


_came: list[int] = []
"""Signals that came to end the command."""


def _is_on_its_way_out() -> bool:
    """Whether this thread is cleaning up: after an interrupt, or closing the generators that it leaves behind. It need
    not be: a library may swallow an interrupt, and PyAV does, if it comes during a call that fails."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        error = error.__context__
    return error is not None


class _PlainHandler(logging.Handler):
    """Prints each message as one line, however long."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        console.print(self.format(record), soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} frames/s" if task.speed else "")


class _ProgressLines:
    """Prints a line every few seconds. The rate leaves the first frames out: their time includes opening the files."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._said = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._said = (done, now), now
        if done < total and now - self._said < 5:
            return
        self._said = now
        line = f"{done}/{total} frames"
        first, began = self._first
        if done > first:
            rate = (done - first) / max(now - began, 1e-9)
            line += f", {rate:.1f} frames/s, {(total - done) / rate:.0f} s left"
        console.print(line, soft_wrap=True)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (frames done, frames in all) that updates a bar on a terminal, or prints lines otherwise. It
    raises the KeyboardInterrupt of a signal that has come without ending the command."""

    def unless_interrupted(show: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if _came:
                raise KeyboardInterrupt
            show(done, total)

        return progress

    if not console.is_terminal:
        yield unless_interrupted(_ProgressLines())
        return
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        yield unless_interrupted(lambda done, total: bar.update(task, completed=done, total=total))


def state_line(state: JobState) -> str:
    """Describe a farm's job: its output and status."""
    if state.status == "done":
        return f"{state.output}: {state.frames} frames, done"
    way_out = ", the next run tries it again" if state.status == "parked" else ""
    return f"{state.output}: {state.status} after {state.attempts} attempts{way_out}: {state.error}"


def print_states(states: list[JobState], as_json: bool) -> None:
    """Print what is wrong with the jobs that failed, and how many jobs have each status."""
    for state in states:
        if state.error is not None:
            console.print(state_line(state), soft_wrap=True)
    counts = Counter(state.status for state in states)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if as_json:
        print_json([dataclasses.asdict(state) for state in states])


def print_waterfall(record: RenderRecord | None) -> None:
    """Print each stage's busy seconds and their share of the run."""
    assert record is not None
    table = Table("stage", "busy, s", "ms a frame", "of the run", "", box=None, title_justify="left")
    for stage, seconds in record.busy.items():
        share = seconds / record.seconds
        bar = "█" * max(1, round(20 * min(share, 4)))  # a stage on several cores is busy for longer than the run
        table.add_row(stage, f"{seconds:.2f}", f"{1000 * seconds / record.frames:.2f}", f"{share:.0%}", bar)
    console.print(table)
    console.print(f"bounded by {record.bound}", soft_wrap=True)


def discard_output() -> None:
    """Let what standard output still holds go nowhere: Python would try to write it once more at its end, and fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _writing_output() -> Iterator[None]:
    """Say what cannot be written, where the system's error names no file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise GpupipeError(f"standard output cannot be written: {error.strerror}") from error


def print_json(value: object) -> None:
    """Print a record on standard output, as one line."""
    with _writing_output():
        print(json.dumps(value))


def standard_output() -> Console:
    """Return the console for tables; if it is not a terminal, each row is one line, however long."""
    output = _Tables()
    if not output.is_terminal:
        output.width = 10_000
    return output


def print_record(record: RenderRecord | None, output: Path, as_json: bool) -> None:
    """Print what was made; with ``--json`` the record is the last line of standard output."""
    assert record is not None
    ways = [record.device, record.engine, f"kernels in {record.kernels}", *([record.codec] if record.codec else [])]
    console.print(
        f"{output}: {record.frames} frames in {record.seconds:.1f} s, {record.frames_per_second:.1f} frames/s"
        f" ({', '.join(ways)})",
        soft_wrap=True,
    )
    if as_json:
        print_json(record.as_dict())
