"""Lanes: results in order, as many calls at once as there are lanes and no more, nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gpupipe.lanes import available_cores, map_in_lanes


@pytest.mark.parametrize(
    ("wanted", "cores"), [("3", 3), ("8", 8), ("12", 8), ("0", 1), ("", 8), ("many", 8), ("-1", 8), ("2.5", 8)]
)
def test_a_user_s_number_of_cores(wanted: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to those there are; what is no number is left aside."""
    monkeypatch.setattr("gpupipe.lanes.cpu_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("GPUPIPE_CORES", wanted)
    assert available_cores() == cores


def test_a_sandbox_may_forbid_to_ask_for_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(process: int) -> set[int]:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("gpupipe.lanes.cpu_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", forbidden, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.delenv("GPUPIPE_CORES", raising=False)
    assert available_cores() == 5


def test_each_core_has_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpupipe.lanes.available_cores", lambda: 5)
    barrier = threading.Barrier(5, timeout=10)
    assert list(map_in_lanes(lambda item: (barrier.wait(), item)[1], range(10))) == list(range(10))


def test_results_come_in_order_whoever_is_first() -> None:
    def slow_when_even(item: int) -> int:
        time.sleep(0.02 if item % 2 == 0 else 0)
        return item * item

    assert list(map_in_lanes(slow_when_even, range(7), 3)) == [i * i for i in range(7)]
    assert list(map_in_lanes(slow_when_even, [], 3)) == []


def test_as_many_at_once_as_there_are_lanes() -> None:
    """A barrier that two calls must reach together: with one lane the first would wait for ever."""
    barrier = threading.Barrier(2, timeout=10)
    assert list(map_in_lanes(lambda item: (barrier.wait(), item)[1], range(4), 2)) == [0, 1, 2, 3]
    alone = threading.Barrier(2, timeout=0.05)
    with pytest.raises(threading.BrokenBarrierError):
        list(map_in_lanes(lambda item: alone.wait(), range(2), 1))


def test_items_are_taken_only_as_they_are_needed() -> None:
    """Otherwise memory would grow with the clip."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = map_in_lanes(lambda item: item, items(), 2)
    for _ in range(5):
        next(results)
    assert len(taken) == 5 + 2, "those given out, and one for each lane"
    results.close()  # type: ignore[attr-defined]


def test_an_error_comes_in_its_turn_and_stops_the_rest() -> None:
    seen: list[int] = []

    def fail_at_three(item: int) -> int:
        seen.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    results = map_in_lanes(fail_at_three, range(50), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(seen) < 8


def test_closing_waits_for_what_is_under_way() -> None:
    running = threading.Event()
    ended: list[int] = []

    def slow(item: int) -> int:
        if item:
            running.set()
            time.sleep(0.1)
            ended.append(item)
        return item

    before = set(threading.enumerate())  # some test may have left a clip half rendered
    results = map_in_lanes(slow, range(9), 1)
    next(results)
    assert running.wait(5)
    results.close()  # type: ignore[attr-defined]
    assert ended == [1]
    assert set(threading.enumerate()) <= before


def test_pytorch_s_thread_count_changes_within_lanes_alone() -> None:
    before = torch.get_num_threads()
    assert set(map_in_lanes(lambda item: torch.get_num_threads(), range(4), 2)) == {1}
    assert torch.get_num_threads() == before
    assert _threads_to_come() == before, "new threads are not changed either"


def test_new_threads_keep_pytorch_s_thread_count_during_lanes_and_after_overlapping_ones() -> None:
    before = _threads_to_come()
    first = map_in_lanes(lambda item: item, range(9), 1)
    next(first)
    assert _threads_to_come() == before
    with ThreadPoolExecutor(1) as another:
        second = another.submit(lambda: map_in_lanes(lambda item: item, range(9), 1)).result()
        another.submit(next, second).result()
        first.close()  # type: ignore[attr-defined]
        another.submit(list, second).result()
    assert _threads_to_come() == before


def _threads_to_come() -> int:
    """PyTorch's number of threads in a new thread."""
    with ThreadPoolExecutor(1) as new:
        return new.submit(torch.get_num_threads).result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no forking here")
def test_a_forked_child_does_not_wait_for_its_parent_s_threads() -> None:
    """In a process of its own, which has several threads of OpenMP at work before it forks."""
    program = """
import os, torch
import gpupipe.lanes
torch.set_num_threads(4)
values = torch.ones(1 << 22)
values.add(1).sum()
child = os.fork()
if not child:
    values.add(1).sum()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["7"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no forking here")
def test_a_child_forked_while_lanes_start_can_start_its_own() -> None:
    """Another thread holds the lock just then: the child would have it for ever, and not that thread."""
    program = """
import os, signal, threading, time
from gpupipe.lanes import _lock, map_in_lanes
held = threading.Event()
def hold():
    with _lock:
        held.set()
        time.sleep(0.5)
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(sum(map_in_lanes(abs, [-3, -4])))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["7"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no forking here")
def test_a_lock_s_holder_may_fork_and_all_can_take_it_afterwards() -> None:
    """Its other threads and its children, which would wait for ever otherwise."""
    program = """
import os, signal
from concurrent.futures import ThreadPoolExecutor
from gpupipe.locks import forkable_lock
lock = forkable_lock()
def taken():
    with lock:
        return 7
signal.alarm(20)
with lock:
    child = os.fork()
    if not child:
        signal.alarm(20)
        lock.release()
        os._exit(ThreadPoolExecutor(1).submit(taken).result())
with ThreadPoolExecutor(1) as another:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), another.submit(taken).result())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["7", "7"]
