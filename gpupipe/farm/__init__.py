"""Many clips: a file of jobs → an output folder, on one machine or many, with nothing lost on the way."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpupipe.device import find_device
from gpupipe.errors import DiskFullError, InputError
from gpupipe.fallbacks import fallbacks
from gpupipe.farm.cluster import work_on_ray
from gpupipe.farm.jobs import Job, read_jobs
from gpupipe.farm.ledger import RESULTS, JobState, Ledger
from gpupipe.farm.local import work_here
from gpupipe.farm.residents import Residents
from gpupipe.farm.scheduler import PART_SECONDS, OnJobEnd, Scheduler
from gpupipe.farm.worker import Worker
from gpupipe.frame_generator import check_limits
from gpupipe.versions import versions
from gpupipe.video.frames import VIDEO_SUFFIXES

__all__ = ["FarmRecord", "Job", "JobState", "farm_status", "read_jobs", "run_farm"]


@dataclass
class FarmRecord:
    """Facts of a run: how many jobs there were, were skipped as done, were done, and are parked; frames rendered."""

    jobs: int
    skipped: int
    done: int
    parked: int
    frames: int
    seconds: float
    device: str
    workers: int

    def as_dict(self) -> dict[str, Any]:
        """The record that `--json` prints: these facts, the rate, ``versions`` and ``fallbacks``."""
        rate = self.frames / self.seconds
        return asdict(self) | {"frames_per_second": rate, "versions": versions(), "fallbacks": fallbacks()}


def run_farm(
    jobs_path: str | Path,
    output_dir: str | Path,
    *,
    device: str | None = None,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    part_seconds: float = PART_SECONDS,
    workers: int | None = None,
    address: str | None = None,
    force: bool = False,
    on_job_end: OnJobEnd = lambda state: None,
) -> FarmRecord:
    """Render all jobs of a file that are not done yet.

    Args:
        jobs_path: see :mod:`gpupipe.farm.jobs`; checked as a whole before anything starts.
        output_dir: where videos go, ``results.jsonl``, and what a later run needs to go on after this one.
        device, batch_size, memory_budget: as :class:`~gpupipe.FrameGenerationPipeline` takes them, for each worker;
            the budget is for all avatars of a worker together.
        part_seconds: clips are rendered in parts of this length, finite; a worker that dies loses one.
        workers: None renders in this process; else so many workers of Ray, each with a GPU or its share of the cores.
        address: of a running Ray cluster, ``"auto"`` for this machine's; None starts one here for this run.
        force: render what is done, too.
        on_job_end: called with the state of each job that comes to its end.

    Raises:
        InputError: a file of jobs or an option that cannot be used, before anything starts. What is wrong with one
            job's files is that job's error, in its :class:`JobState`, and stops no other.
        DiskFullError: there is no room; run it again when there is.
        GpupipeError: a worker of Ray cannot start; no job is blamed for that.
    """
    start = time.perf_counter()
    jobs = [job.absolute() for job in read_jobs(jobs_path)]
    _check_options(batch_size, memory_budget, part_seconds, workers)
    _check_files(Path(jobs_path), jobs, Path(output_dir))
    on_ray = workers is not None or address is not None
    kind = find_device(device, here=not on_ray).type  # a cluster's devices need not be this machine's
    ledger = Ledger(Path(output_dir).absolute(), jobs)  # workers are started in other folders
    with ledger.locked():
        scheduler = Scheduler(jobs, ledger, device=kind, part_seconds=part_seconds, force=force, on_job_end=on_job_end)
        try:
            if on_ray:
                options = {"device": kind, "batch_size": batch_size, "memory_budget": memory_budget}
                workers = work_on_ray(scheduler, workers=workers, address=address, options=options)
            else:
                work_here(scheduler, Worker(Residents(device, budget=memory_budget), batch_size=batch_size))
        except DiskFullError as error:
            raise DiskFullError(f"{error}; what is whole is kept: run it again when there is room") from error
        finally:
            with contextlib.suppress(DiskFullError):
                ledger.write_results()
    return FarmRecord(
        jobs=len(jobs),
        skipped=len(scheduler.skipped),
        done=scheduler.done,
        parked=sum(state.status == "parked" for state in ledger.states.values()),
        frames=scheduler.frames,
        seconds=time.perf_counter() - start,
        device=kind,
        workers=workers or 1,
    )


def farm_status(jobs_path: str | Path, output_dir: str | Path) -> list[JobState]:
    """What is known of each job, in the order of the file; a farm may be at work meanwhile.

    Raises:
        InputError: see :func:`read_jobs`.
    """
    jobs = read_jobs(jobs_path)
    states = Ledger(output_dir, jobs).states
    return [states[job.output] for job in jobs]


def _check_options(batch_size: int | None, memory_budget: int | None, part_seconds: float, workers: int | None) -> None:
    """Refuse what no job could be rendered with: it would be told as the fault of each."""
    check_limits(batch_size, memory_budget)
    if not 0 < part_seconds < math.inf:  # NaN is not
        raise InputError(f"part seconds is {part_seconds}; expected more than 0, and a finite number")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected 1 or more")


def _check_files(jobs_path: Path, jobs: list[Job], output_dir: Path) -> None:
    """Refuse what would be written over: the file of jobs by the results, and by a video another or a job's input."""
    results = output_dir / RESULTS
    with contextlib.suppress(OSError):  # mostly because it is not there
        if results.samefile(jobs_path):
            raise InputError(f"{jobs_path}: is where results are written; expected another name or output folder")
    folders = {folder: os.path.realpath(output_dir / folder) for folder in {Path(job.output).parent for job in jobs}}
    seen: dict[tuple[str, str], str] = {}
    for job in jobs:
        path = Path(job.output)
        other = seen.setdefault((folders[path.parent], path.name), job.output)
        if other != job.output:
            raise InputError(f"{jobs_path}: outputs {other} and {job.output} are one file; expected one for each job")
    videos = (Path(job.template) / f"template{suffix}" for job in jobs for suffix in VIDEO_SUFFIXES)
    for given in {*videos, *(path for job in jobs for path in job.inputs())}:
        real = os.path.realpath(given)
        if output := seen.get(os.path.split(real)):
            raise InputError(f"{jobs_path}: output {output} is {real}, which a job reads; expected another name")
