"""Lanes: a CPU's cores, each of which renders a batch of its own.

Cores that work on one frame wait for each other at every layer, and for all that runs on one core. A core with a frame
of its own waits for no other.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from gpupipe.cgroups import cpu_quota
from gpupipe.handover import Answer, Workers
from gpupipe.locks import forkable_lock
from gpupipe.stages import LANE_THREAD

Item = TypeVar("Item")
Result = TypeVar("Result")

_lock = forkable_lock()


def available_cores() -> int:
    """Return how many cores this process may use: those that it is bound to, but at most ``$GPUPIPE_CORES``.

    The variable is for processes that divide a machine's cores among them. A container's CPU quota is a limit too,
    rounded up to whole cores.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS has none; a sandbox may forbid it
        cores = os.cpu_count() or 1
    if (quota := cpu_quota()) is not None:
        cores = min(cores, math.ceil(quota))
    wanted = os.environ.get("GPUPIPE_CORES", "")
    return max(1, min(cores, int(wanted))) if wanted.isdecimal() else cores


def map_in_lanes(
    function: Callable[[Item], Result], items: Iterable[Item], lanes: int | None = None
) -> Iterator[Result]:
    """``map`` with one call at a time in each lane; results come in the order of the items.

    Within a lane PyTorch runs on one thread. Closing the iterator waits for calls that have begun.

    Args:
        lanes: None means as many as there are :func:`available_cores`.
    """
    lanes = lanes or available_cores()
    pending: deque[Answer[Result]] = deque()
    with Workers(lanes, LANE_THREAD, _run_torch_alone) as workers:
        for item in items:
            pending.append(workers.submit(function, item))
            if len(pending) > lanes:  # one item is queued, so that no lane waits
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _run_torch_alone() -> None:
    """Keep PyTorch to this new thread.

    ``set_num_threads`` also changes the default of later threads, so another thread restores it. A thread of the
    program that uses PyTorch for the first time in between keeps to one, too; so the other thread is started before.
    """
    with _lock, Workers(1, "another") as another:
        before = another.submit(torch.get_num_threads).result()
        torch.get_num_threads()  # a thread's first query has it take over whatever was set last
        torch.set_num_threads(1)
        another.submit(torch.set_num_threads, before).result()


if hasattr(os, "register_at_fork"):
    # A forked child has none of the threads that PyTorch's OpenMP waits for, and one thread waits for none.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
