"""A farm's work in this process: one worker, whose batches run on from clip to clip."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from gpupipe.farm.attempt import Failed, attempt
from gpupipe.farm.scheduler import Scheduler
from gpupipe.farm.worker import FeaturesTask, Joined, JoinTask, Part, RenderTask, Worker, join_parts
from gpupipe.handover import Answer, Workers


def work_here(scheduler: Scheduler, worker: Worker) -> None:
    """Do all of a farm's work with one worker. Videos are joined beside the rendering.

    Raises:
        DiskFullError: there is no room; what is whole is recorded.
    """
    worker.residents.upcoming = scheduler.upcoming
    joiner = Workers(1, "join")
    joins = _Joins(scheduler, joiner)
    try:
        while not scheduler.finished:
            for outcome in worker.render(_parts(scheduler, worker, joins)):
                scheduler.rendered(outcome)
            joins.settle(wait=True)
    finally:  # after an error nobody takes what would be joined yet
        joins.stop.set()
        joiner.end()


class _Joins:
    """Videos that are being joined in a thread, in the order in which they will be whole; until ``stop`` is set."""

    def __init__(self, scheduler: Scheduler, joiner: Workers) -> None:
        self._scheduler, self._joiner = scheduler, joiner
        self.stop = threading.Event()
        self._running: deque[tuple[JoinTask, Answer[Joined | Failed]]] = deque()

    def start(self, task: JoinTask) -> None:
        """Join a video as soon as those before it are whole."""
        joined = self._joiner.submit(attempt, join_parts, task.job, task.parts, task.path, self.stop)
        self._running.append((task, joined))

    def settle(self, *, wait: bool) -> None:
        """Report the videos that are whole by now; with ``wait``, all of them."""
        while self._running and (wait or self._running[0][1].done):
            task, joined = self._running.popleft()
            self._scheduler.settle(task, joined.result())


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
