"""A farm's work in this process: one worker, whose batches run on from clip to clip."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from gpupipe.farm.attempt import Failed, attempt
from gpupipe.farm.scheduler import Scheduler
from gpupipe.farm.worker import FeaturesTask, Joined, JoinTask, Part, RenderTask, Worker, join_parts


def work_here(scheduler: Scheduler, worker: Worker) -> None:
    """Do all of a farm's work with one worker. Videos are joined beside the rendering.

    Raises:
        DiskFullError: there is no room; what is whole is recorded.
    """
    worker.residents.upcoming = scheduler.upcoming
    executor = ThreadPoolExecutor(1, "join")
    joins = _Joins(scheduler, executor)
    try:
        while not scheduler.finished:
            for outcome in worker.render(_parts(scheduler, worker, joins)):
                scheduler.rendered(outcome)
            joins.settle(wait=True)
    finally:  # after an error nobody takes what would be joined yet
        joins.stop.set()
        executor.shutdown(cancel_futures=True)


class _Joins:
    """Videos that are being joined in a thread, in the order in which they will be whole; until ``stop`` is set."""

    def __init__(self, scheduler: Scheduler, executor: ThreadPoolExecutor) -> None:
        self._scheduler, self._executor = scheduler, executor
        self.stop = threading.Event()
        self._running: deque[tuple[JoinTask, Future[Joined | Failed]]] = deque()

    def start(self, task: JoinTask) -> None:
        """Join a video as soon as those before it are whole."""
        joined = self._executor.submit(attempt, join_parts, task.job, task.parts, task.path, self.stop)
        self._running.append((task, joined))

    def settle(self, *, wait: bool) -> None:
        """Report the videos that are whole by now; with ``wait``, all of them."""
        while self._running and (wait or self._running[0][1].done()):
            task, future = self._running.popleft()
            self._scheduler.settle(task, future.result())


def _parts(scheduler: Scheduler, worker: Worker, joins: _Joins) -> Iterator[Part]:
    """Parts to render, as there is room for them; other tasks are done or started on the way."""
    while (task := scheduler.next_task()) is not None:
        joins.settle(wait=False)
        if isinstance(task, RenderTask):
            yield from task.parts
        elif isinstance(task, FeaturesTask):
            scheduler.settle(task, attempt(worker.features, task.job, task.path, task.inputs))
        else:
            joins.start(task)
