"""A CPU's cores, shared out among frames that are rendered side by side.

All cores on one frame wait for each other at every layer, and for what runs on one core. A frame to each core, and none
waits. So the CPU is divided into lanes, each with a core or a few, and each renders another batch.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from gpupipe.cgroups import cpu_quota
from gpupipe.stages import LANE_THREAD

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_LANES = 8
"""More cores go into the lanes, not beside them: each lane takes the memory of a network at work."""

_lock = threading.Lock()


class Lanes(NamedTuple):
    """How many batches run side by side, and on how many threads each."""

    number: int
    threads: int


def available_cores() -> int:
    """Cores that this process may use: those that it is bound to, and of them at most ``$GPUPIPE_CORES``.

    That is for processes that share a machine, and so share out its cores. In a container there are as many as its
    share of time keeps busy, a part of a core counted as one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (quota := cpu_quota()) is not None:
        cores = min(cores, math.ceil(quota))
    wanted = os.environ.get("GPUPIPE_CORES", "")
    return max(1, min(cores, int(wanted))) if wanted.isdecimal() else cores


def cpu_lanes(cores: int | None = None) -> Lanes:
    """Lanes for a CPU of so many cores; None takes those that this process may use."""
    cores = available_cores() if cores is None else cores
    number = min(cores, MAX_LANES)
    return Lanes(number, cores // number)


def map_in_lanes(function: Callable[[Item], Result], items: Iterable[Item], lanes: Lanes) -> Iterator[Result]:
    """``map``, with as many calls under way as there are lanes; results come in the order of the items.

    Within a lane PyTorch runs on the lane's threads. Closing the iterator waits for the calls under way.
    """
    workers = ThreadPoolExecutor(lanes.number, LANE_THREAD, _run_torch_on, (lanes.threads,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(workers.submit(function, item))
            if len(pending) > lanes.number:  # one waits, so that no lane does
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        workers.shutdown(cancel_futures=True)


def _run_torch_on(threads: int) -> None:
    """This new thread runs PyTorch on so many threads. That holds for threads to come too: there it is set back."""
    with _lock, ThreadPoolExecutor(1) as another:
        before = torch.get_num_threads()  # asked first: who has not asked is given what was set last
        torch.set_num_threads(threads)
        another.submit(torch.set_num_threads, before).result()
