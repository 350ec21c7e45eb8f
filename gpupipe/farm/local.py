"""A farm's work in this process: one worker, whose batches run on from clip to clip."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from gpupipe.errors import DiskFullError, one_line
from gpupipe.farm.farm import Farm, FeaturesTask, JoinTask, RenderTask
from gpupipe.farm.worker import Joined, Segment, Worker, join_parts


def work_here(farm: Farm, worker: Worker) -> None:
    """Do all of a farm's work with one worker. Videos are joined beside the rendering.

    Raises:
        DiskFullError: there is no room; what is whole is recorded.
    """
    worker.residents.upcoming = farm.upcoming
    with ThreadPoolExecutor(1, "join") as hand:
        joins: deque[tuple[JoinTask, Future[Joined]]] = deque()

        def segments() -> Iterator[Segment]:
            """Segments as there is room for them; what else comes up is done on the way."""
            while (task := farm.next_task()) is not None:
                settle(wait=False)
                if isinstance(task, RenderTask):
                    yield from task.segments
                elif isinstance(task, FeaturesTask):
                    make_features(task)
                else:
                    joins.append((task, hand.submit(join_parts, task.job, task.parts, task.path)))

        def make_features(task: FeaturesTask) -> None:
            try:
                worker.features(task.job, task.path, task.inputs)
            except DiskFullError:
                raise
            except Exception as error:
                farm.failed(task.job, one_line(error))
            else:
                farm.featured(task)

        def settle(*, wait: bool) -> None:
            """Take note of joins that are done."""
            while joins and (wait or joins[0][1].done()):
                task, future = joins.popleft()
                try:
                    farm.joined(task, future.result())
                except DiskFullError:
                    raise
                except Exception as error:
                    farm.failed(task.job, one_line(error))

        while not farm.finished:
            for outcome in worker.render(segments()):
                farm.rendered(outcome)
            settle(wait=True)
