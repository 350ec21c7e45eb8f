"""A farm's work on a Ray cluster: one worker to a GPU, or to a group of cores, on one machine or many.

All machines see the inputs and the output folder under the same paths. A worker that dies is replaced, and its work
goes to whoever is next; the parts that it had finished are recorded and count.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpupipe.errors import DeviceLostError, DiskFullError, GpupipeError, InputError
from gpupipe.fallbacks import fallbacks, note_fallback
from gpupipe.farm.attempt import attempt
from gpupipe.farm.residents import AvatarKey, Residents
from gpupipe.farm.scheduler import Scheduler
from gpupipe.farm.worker import FeaturesTask, JoinTask, RenderTask, Task, Worker, join_parts
from gpupipe.lanes import available_cores

logger = logging.getLogger(__name__)

BUNDLE_FRAMES = 1500
"""Frames of one task: enough to fill batches across short clips, few enough to share the end of a run evenly."""

_QUEUED = 2
"""Tasks that a worker has: the one it is doing, and the next."""


def work_on_ray(scheduler: Scheduler, *, workers: int | None, address: str | None, options: dict[str, Any]) -> int:
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
    interrupt = signal.getsignal(signal.SIGTERM)
    address = address or "local"  # None would take what $RAY_ADDRESS names
    cores = available_cores() if address == "local" else None
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address, num_cpus=cores, **quiet)
    except SystemExit as stopped:  # SIGTERM while it starts: its own handlers leave so
        ray.shutdown()
        raise KeyboardInterrupt from stopped
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"Ray at {address!r} cannot be reached ({' '.join(str(error).split())})") from error
    finally:
        if interrupt is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, interrupt)  # Ray's would end the process at once
    try:
        return _RayWorkers(ray, scheduler, workers, options).work()
    finally:
        ray.shutdown()


class _RayActor:
    """What runs in an actor: a worker."""

    def __init__(self, options: dict[str, Any]) -> None:
        residents = Residents(options["device"], budget=options["memory_budget"])
        self._worker = Worker(residents, batch_size=options["batch_size"])

    def do(self, task: RenderTask | FeaturesTask) -> tuple[Any, list[str]]:
        """What a task comes to, see :func:`_returned`, and the fallbacks of this process so far."""
        return self._done(task), fallbacks()

    def _done(self, task: RenderTask | FeaturesTask) -> Any:
        if isinstance(task, FeaturesTask):
            return _returned(self._worker.features, task.job, task.path, task.inputs)
        try:
            return _returned(lambda: list(self._worker.render(task.parts)))
        except DeviceLostError:
            os._exit(1)  # another process has a GPU again, and this one would fail every part there is


def _join(task: JoinTask) -> Any:
    return _returned(join_parts, task.job, task.parts, task.path)


def _returned(function: Callable[..., Any], *arguments: Any) -> Any:
    """What :func:`attempt` returns, or its DiskFullError: Ray would wrap one that is raised in an error of its own."""
    try:
        return attempt(function, *arguments)
    except DiskFullError as error:
        return error


@dataclass(eq=False)
class _RayWorker:
    """An actor, how many tasks it has, the avatar of the last one, and what stands for the one that it died on."""

    actor: Any
    tasks: int = 0
    last_avatar: AvatarKey | None = None
    died_on: Any = None


def places(machines: Sequence[dict[str, float]], cores: int, on_gpus: bool) -> int:
    """How many workers with so many cores (and, ``on_gpus``, a GPU each) fit on machines with these Ray resources."""
    found = 0
    for there in machines:
        fit = int(there.get("CPU", 0)) // cores
        found += min(fit, int(there.get("GPU", 0))) if on_gpus else fit
    return found


def cores_of_each(count: int, machines: Sequence[dict[str, float]], on_gpus: bool) -> int:
    """The most cores that each of ``count`` workers can have such that all fit: one that does not would never start."""
    most = max(int(there.get("CPU", 0)) for there in machines)
    return next(cores for cores in range(most, 0, -1) if places(machines, cores, on_gpus) >= count)


class _RayWorkers:
    """The workers of a cluster, and the tasks under way."""

    def __init__(self, ray: Any, scheduler: Scheduler, count: int | None, options: dict[str, Any]) -> None:
        self._ray, self._scheduler, self._options = ray, scheduler, options
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        on_gpus = options["device"] == "cuda"
        most = places(machines, 1, on_gpus)
        if on_gpus and not most:
            raise InputError("device is 'cuda', but the cluster has no GPU; expected cpu")
        count = count or (most if on_gpus else len(machines))
        if not 1 <= count <= most:
            have = f"{most} GPUs" if on_gpus else f"{most} cores"
            raise InputError(f"workers is {count}; expected 1 to as many as the cluster has: {have}")
        share = cores_of_each(count, machines, on_gpus)
        environment = {"env_vars": {"GPUPIPE_CORES": str(share)}}
        self._actor = ray.remote(num_cpus=share, num_gpus=int(on_gpus), runtime_env=environment)(_RayActor)
        self._join = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_join)
        self.workers = [self._start_worker() for _ in range(count)]
        self._running: dict[Any, tuple[Task, _RayWorker | None]] = {}
        self._joins: deque[JoinTask] = deque()

    def work(self) -> int:
        """Work until nothing is left; returns the number of workers."""
        from ray import exceptions  # noqa: PLC0415

        # Ray has names of its own for what its memory monitor kills, and for what dies with a machine.
        died = (
            exceptions.RayActorError,
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        )
        while True:
            self._assign()
            if not self._running:
                return len(self.workers)
            (ref,), _ = self._ray.wait(list(self._running), num_returns=1)
            task, worker = self._running[ref]
            given = [one for one, (_, whose) in self._running.items() if whose is worker]
            del self._running[ref]
            if worker is not None:
                worker.tasks -= 1
            try:
                result = self._ray.get(ref)
            except died as error:
                if getattr(error, "actor_init_failed", False):  # the next one would fail as well
                    raise GpupipeError(f"a worker cannot start ({str(error).splitlines()[-1]})") from error
                logger.warning("a worker died (%s): others take its work", type(error).__name__)
                # Ray tells of a worker's tasks in any order. It died on the first: the other waited behind it.
                if worker is not None and worker in self.workers:
                    worker.died_on = given[0]
                    self.workers[self.workers.index(worker)] = self._start_worker()
                self._scheduler.lost(task, blamed=worker is None or worker.died_on == ref)
                continue
            if worker is not None:
                result, told = result
                for fallback in told:
                    note_fallback(fallback)
            if isinstance(result, DiskFullError):
                raise result
            self._scheduler.settle(task, result)

    def _start_worker(self) -> _RayWorker:
        return _RayWorker(self._actor.remote(self._options))

    def _assign(self) -> None:
        """Give every worker as much as it is to have, and to any machine videos to be joined: as many at once as there
        are workers, for each takes a process of its own."""
        self._give_to_workers()
        joining = sum(worker is None for _, worker in self._running.values())
        for _ in range(min(len(self._joins), len(self.workers) - joining)):
            task = self._joins.popleft()
            self._running[self._join.remote(task)] = task, None

    def _give_to_workers(self) -> None:
        while (worker := min(self.workers, key=lambda one: one.tasks)).tasks < _QUEUED:
            task = self._scheduler.next_task(frames=BUNDLE_FRAMES, last_avatar=worker.last_avatar)
            if task is None:
                return
            if isinstance(task, JoinTask):
                self._joins.append(task)
                continue
            if isinstance(task, RenderTask):
                worker.last_avatar = AvatarKey.of(task.parts[-1].job)
            worker.tasks += 1
            self._running[worker.actor.do.remote(task)] = task, worker
