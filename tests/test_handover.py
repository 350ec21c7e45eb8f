"""What threads hand to each other: in order, no more than there is room for, and whenever Ctrl-C comes."""

from __future__ import annotations

import contextlib
import gc
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from gpupipe.handover import Inbox, Workers


def read_all(inbox: Any, into: list[int]) -> threading.Thread:
    """Start a thread that takes what is put in, up to None."""

    def read() -> None:
        while (item := inbox.get()) is not None:
            into.append(item)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def interrupted(step: Callable[[], object], at: int, files: set[str]) -> bool:
    """Run a step with Ctrl-C at one of the instructions that it executes in these files, the first being 1.

    Returns:
        Whether there are so many.
    """
    left = at

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        left -= event == "opcode"
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one that wants them when tracing is switched on
    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class Ordinary:
    """An inbox made of an ordinary queue."""

    def __init__(self, room: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(room)
        self.get = self._queue.get

    def put(self, item: int, error: Callable[[], BaseException | None]) -> None:
        self._queue.put(item)

    def end(self) -> None:
        with contextlib.suppress(queue.Full):  # then the reader is not waiting
            self._queue.put_nowait(None)


def survives(inbox: Any, at: int, seconds: float) -> bool | None:
    """Whether an inbox's reader ends although its writer is interrupted; None if the writer does not come so far."""
    taken: list[int] = []
    reader = read_all(inbox, taken)
    came: list[bool] = []

    def write() -> None:
        step = lambda: [inbox.put(item, lambda: None) for item in range(3)]  # noqa: E731
        came.append(interrupted(step, at, {"handover.py", "queue.py", "threading.py"}))
        inbox.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(seconds)
    reader.join(seconds)
    if writer.is_alive() or reader.is_alive():
        return False
    assert taken == list(range(len(taken)))
    return True if came[0] else None


def test_a_reader_ends_whenever_its_writer_is_interrupted() -> None:
    at = 1
    while (ended := survives(Inbox(1), at, 20)) is not None:
        assert ended, f"at instruction {at}"
        at += 1
    assert at > 50


def test_an_ordinary_queue_s_reader_does_not() -> None:
    """A negative control."""
    at = 1
    while survives(Ordinary(1), at, 0.5):
        at += 1
    assert survives(Ordinary(1), at, 0.5) is False


def test_workers_end_whenever_they_are_interrupted() -> None:
    at, came = 1, True
    while came:
        workers, found = Workers(2, "interrupted"), []

        def use(workers: Workers = workers, found: list[int] = found) -> None:
            with workers:
                answers = [workers.submit(abs, -number) for number in range(3)]
                found += [answer.result() for answer in answers]

        came = interrupted(use, at, {"handover.py"})
        workers.end()  # as when a program ends
        for thread in threading.enumerate():
            if thread.name.startswith("interrupted"):
                thread.join(20)
                assert not thread.is_alive(), f"at instruction {at}"
        at += 1
    assert found == [0, 1, 2]
    assert at > 200


def test_a_writer_waits_for_room_and_learns_that_its_reader_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpupipe.handover._PATIENCE", 0.01)
    inbox: Inbox[int] = Inbox(2)
    looked: list[int] = []

    def error() -> BaseException | None:
        looked.append(1)
        return ValueError("broken") if len(looked) > 4 else None

    inbox.put(1, error)
    inbox.put(2, error)
    with pytest.raises(ValueError, match="broken"):
        inbox.put(3, error)
    assert len(looked) == 5
    inbox.end()
    assert [inbox.get(), inbox.get(), inbox.get()] == [1, 2, None]


def test_each_thread_prepares_before_its_first_call() -> None:
    prepared: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def call(item: int) -> tuple[int, str]:
        if item < 2:
            both.wait()
        return item, threading.current_thread().name

    with Workers(2, "prepared", lambda: prepared.append(threading.current_thread().name)) as workers:
        answers = [workers.submit(call, item) for item in range(9)]
        results = [answer.result() for answer in answers]
    assert [item for item, _ in results] == list(range(9))
    assert sorted(prepared) == sorted({name for _, name in results}) == ["prepared_0", "prepared_1"]


def test_a_thread_that_cannot_prepare_tells_who_waits() -> None:
    """It tries again before its next call."""
    tries: list[int] = []

    def prepare() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no more threads")

    with Workers(1, "fails", prepare) as workers:
        first, second, third = (workers.submit(abs, -7) for _ in range(3))
        with pytest.raises(RuntimeError, match="no more threads"):
            first.result()
        assert (second.result(), third.result(), len(tries)) == (7, 7, 2)


def test_what_has_begun_is_waited_for_and_the_rest_is_dropped() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def call(item: int) -> None:
        begun.set()
        assert go_on.wait(20)
        done.append(item)

    workers = Workers(1, "ends")
    answers = [workers.submit(call, item) for item in range(3)]
    assert begun.wait(20)
    threading.Timer(0.1, go_on.set).start()
    assert workers.end() == set(answers[1:])
    assert done == [0] and answers[0].result() is None
    with pytest.raises(RuntimeError, match="has ended before"):
        answers[1].result()
    assert workers.end() == set()


def test_an_answer_lets_go_of_what_made_it() -> None:
    """A batch of frames is large, and an error's traceback holds those of its call."""

    class Batch:
        pass

    def fail(batch: Batch) -> None:
        raise ValueError("broken")

    gc.disable()
    try:
        with Workers(1, "lets go") as workers:
            batch = Batch()
            alive = [weakref.ref(batch)]
            answer = workers.submit(lambda batch: Batch(), batch)
            alive.append(weakref.ref(answer.result()))
            del batch, answer
            batch = Batch()
            alive.append(weakref.ref(batch))
            with contextlib.suppress(ValueError):
                workers.submit(fail, batch).result()
            del batch
            workers.submit(abs, 0).wait()  # the thread has left what it was at before
            assert [reference() for reference in alive] == [None, None, None]
    finally:
        gc.enable()


def test_a_program_that_ends_ends_its_lanes() -> None:
    """One that worked on in an interpreter half gone would end it by a signal, now and then."""
    program = """
import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # what is registered last runs first
from gpupipe.lanes import map_in_lanes
results = map_in_lanes(abs, range(10**6), 2)
print(next(results), threading.active_count() > 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 True\n['MainThread']\n", "")
