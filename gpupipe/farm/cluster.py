"""A farm's work on a Ray cluster: one worker to a GPU, or to a group of cores, on one machine or many.

All machines see the inputs and the output folder under the same paths. A worker that dies is replaced, and what it was
at goes to whoever is next; parts that it had finished are recorded and count.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from gpupipe.errors import DiskFullError, GpupipeError, InputError, one_line
from gpupipe.farm.farm import Farm, FeaturesTask, JoinTask, RenderTask, Task
from gpupipe.farm.residents import AvatarKey, Residents
from gpupipe.farm.worker import Outcome, Worker, join_parts

logger = logging.getLogger(__name__)

BUNDLE_FRAMES = 1500
"""Frames of one task: enough to fill batches over many short clips, little enough to share out the end of a run."""

_QUEUED = 2
"""Tasks that a worker has: one to do, and one for when it is done."""


def work_on_ray(farm: Farm, *, workers: int | None, address: str | None, options: dict[str, Any]) -> int:
    """Do all of a farm's work with Ray; returns the number of workers.

    Args:
        workers: None takes one to a GPU, or one to each of the cluster's CPU machines.
        address: of a running cluster; None starts one on this machine, and ends it.
        options: ``device``, ``batch_size`` and ``memory_budget`` of each worker.

    Raises:
        DiskFullError: there is no room; what is whole is recorded.
        GpupipeError: a worker cannot start, which is the fault of no job.
        InputError: Ray is not installed, cannot be reached, or has too few GPUs or cores.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InputError("workers need Ray, which is not installed; expected pip install 'gpupipe[farm]'") from error

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without a GPU sees what there is
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"Ray at {address!r} cannot be reached ({' '.join(str(error).split())})") from error
    try:
        return _Crew(ray, farm, workers, options).work()
    finally:
        ray.shutdown()


class _Hand:
    """What runs in an actor: a worker, and a word about how each task went."""

    def __init__(self, options: dict[str, Any]) -> None:
        residents = Residents(options["device"], budget=options["memory_budget"], upcoming=lambda: self._upcoming)
        self._worker = Worker(residents, batch_size=options["batch_size"])
        self._upcoming: Sequence[AvatarKey] = ()

    def do(self, task: RenderTask | FeaturesTask) -> tuple[str, Any]:
        """``done`` and what came of it, ``full`` if there is no room on the disk, or ``failed`` and why."""
        try:
            if isinstance(task, RenderTask):
                self._upcoming = [AvatarKey.of(segment.job) for segment in task.segments]
                return "done", list(self._worker.render(task.segments))
            self._worker.features(task.job, task.path, task.inputs)
            return "done", None
        except DiskFullError as error:
            return "full", str(error)
        except Exception as error:
            return "failed", one_line(error)


def _join(task: JoinTask) -> tuple[str, Any]:
    try:
        return "done", join_parts(task.job, task.parts, task.path)
    except DiskFullError as error:
        return "full", str(error)
    except Exception as error:
        return "failed", one_line(error)


class _Crew:
    """The actors, and the tasks that each has."""

    def __init__(self, ray: Any, farm: Farm, workers: int | None, options: dict[str, Any]) -> None:
        self._ray, self._farm = ray, farm
        there = ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
        on_gpus = options["device"] == "cuda"
        self.workers = workers or (gpus if on_gpus else max(1, len(ray.nodes())))
        if self.workers > (gpus if on_gpus else cores) or self.workers < 1:
            have = f"{gpus} GPUs" if on_gpus else f"{cores} cores"
            raise InputError(f"workers is {self.workers}; expected 1 to as many as the cluster has: {have}")
        share = max(1, cores // self.workers)
        environment = {"env_vars": {"GPUPIPE_CORES": str(share)}}
        actor = ray.remote(num_cpus=share, num_gpus=int(on_gpus), runtime_env=environment)(_Hand)
        self._hire: Callable[[], Any] = lambda: actor.remote(options)
        self._join = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_join)
        self._hands = [self._hire() for _ in range(self.workers)]
        self._near: list[AvatarKey | None] = [None] * self.workers
        self._flying: dict[Any, tuple[int | None, Any, Task]] = {}

    def work(self) -> int:
        """Until nothing is left."""
        from ray.exceptions import RayActorError, WorkerCrashedError  # noqa: PLC0415

        while True:
            self._hand_out()
            if not self._flying:
                return self.workers
            (ref,), _ = self._ray.wait(list(self._flying), num_returns=1)
            place, hand, task = self._flying.pop(ref)
            try:
                how, result = self._ray.get(ref)
            except (RayActorError, WorkerCrashedError) as error:
                if getattr(error, "actor_init_failed", False):  # the next one would fail as well
                    raise GpupipeError(f"a worker cannot start ({str(error).splitlines()[-1]})") from error
                logger.warning("a worker died (%s): others take its work", type(error).__name__)
                if place is not None and self._hands[place] is hand:
                    self._hands[place], self._near[place] = self._hire(), None
                self._farm.lost(task)
                continue
            if how == "full":
                raise DiskFullError(result)
            self._settle(task, how, result)

    def _hand_out(self) -> None:
        """Give every worker as much as it is to have."""
        for _ in range(_QUEUED):
            for place, hand in enumerate(self._hands):
                count = sum(other is hand for _, other, _ in self._flying.values())
                while count < _QUEUED:
                    task = self._farm.next_task(frames=BUNDLE_FRAMES, near=self._near[place])
                    if task is None:
                        return
                    if isinstance(task, JoinTask):
                        self._flying[self._join.remote(task)] = (None, None, task)
                        continue
                    if isinstance(task, RenderTask):
                        self._near[place] = AvatarKey.of(task.segments[-1].job)
                    self._flying[hand.do.remote(task)] = (place, hand, task)
                    break

    def _settle(self, task: Task, how: str, result: Any) -> None:
        if isinstance(task, RenderTask):
            if how == "failed":  # outside of any one segment
                result = [Outcome(segment, error=result) for segment in task.segments]
            for outcome in result:
                self._farm.rendered(outcome)
        elif how == "failed":
            self._farm.failed(task.job, result)
        elif isinstance(task, FeaturesTask):
            self._farm.featured(task)
        else:
            try:
                self._farm.joined(task, result)
            except DiskFullError:
                raise
            except GpupipeError as error:
                self._farm.failed(task.job, one_line(error))
