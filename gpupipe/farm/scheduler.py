"""What there is to do: jobs → parts → videos, with every state kept on disk.

The scheduler renders nothing itself. Workers ask it for tasks and report how they went; it serves the worker of this
process (:mod:`gpupipe.farm.local`) as well as those of a cluster (:mod:`gpupipe.farm.cluster`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpupipe.errors import InputError
from gpupipe.farm.attempt import Failed, attempt
from gpupipe.farm.jobs import Job
from gpupipe.farm.ledger import Fingerprints, JobState, Ledger, Record, read_record, text_hash
from gpupipe.farm.residents import AvatarKey
from gpupipe.farm.worker import FeaturesTask, Joined, JoinTask, Outcome, Part, RenderTask, Task
from gpupipe.features import SpeechFeatures
from gpupipe.files import check_writable, make_folder
from gpupipe.schedule import frame_rate
from gpupipe.versions import versions
from gpupipe.video.codecs import segment_length
from gpupipe.video.sound import compare_lengths, open_sound

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A job is parked after this many failures in a run: the run leaves it."""

MAX_WORKER_DEATHS = 5
"""A job is also parked after this many workers died on it in a run."""

PART_SECONDS = 20.0
"""Length of a part: a killed worker loses no more than this of what it was rendering."""

_TELL_SECONDS = 10.0
"""Seconds between progress lines; a single clip may take hours."""

OnJobEnd = Callable[[JobState], Any]
"""Called with the state of a job that is done or parked."""


@dataclass
class _Plan:
    """One try of a job: its parts, those to be handed out, the facts of those that are recorded, and its first failure.

    ``earlier`` has the numbers of the parts that earlier runs recorded. ``rendering`` counts the parts that workers
    have. A job that failed is tried again when all of them are back: what comes back is always of the present try, and
    no part is rendered by two workers.
    """

    job: Job
    frames: int
    parts: list[Part]
    missing: deque[Part] = field(default_factory=deque)
    earlier: set[int] = field(default_factory=set)
    rendering: int = 0
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: Failed | None = None


class Scheduler:
    """The jobs of one run.

    Failures and deaths of workers are counted within one run: a job that an earlier run parked is tried again. The
    cause may be gone although no input has changed (a folder that could not be written, memory that another program
    held), and whoever runs the command again wants the job tried. That costs at most :data:`MAX_ATTEMPTS` tries of the
    parts that are not recorded yet. Deaths counted over all runs would sooner or later park any long job on machines
    that are taken away at times. A run that was itself killed counts as neither, since nobody knows whether a job was
    the reason.

    Args:
        jobs: checked, outputs distinct.
        ledger: of the output folder, locked.
        device: the kind of device that renders, ``cpu`` or ``cuda``: parts of one clip come from one kind.
        part_seconds: length of a part, more than 0 and finite, rounded to whole segments of the encoder.
        force: render what is done, too.
        on_job_end: see :data:`OnJobEnd`.

    Attributes:
        skipped: outputs that earlier runs had finished.
        frames: number of frames rendered so far, over all jobs.
        done: number of videos that this run has finished.
    """

    def __init__(
        self,
        jobs: list[Job],
        ledger: Ledger,
        *,
        device: str,
        part_seconds: float = PART_SECONDS,
        force: bool = False,
        on_job_end: OnJobEnd = lambda state: None,
    ) -> None:
        self.ledger = ledger
        self.skipped: list[str] = []
        self.frames = 0
        self.done = 0
        self._told = time.monotonic()
        self._on_job_end = on_job_end
        self._part_seconds = part_seconds
        self._runtime = json.dumps([versions(), device], sort_keys=True)
        self._fingerprints = Fingerprints()
        self._queue = deque(_grouped(jobs))
        self._plans: dict[str, _Plan] = {}
        self._featuring: set[str] = set()
        self._begun: set[str] = set()
        self._made: set[Path] = set()
        self._ready: deque[FeaturesTask | JoinTask] = deque()
        if force:
            for job in jobs:
                ledger.reset(job)
                ledger.clean(job)

    # ── what there is to do ───────────────────────────────────────────────────────────────────────────────────────────

    def next_task(self, *, frames: int = 1, last_avatar: AvatarKey | None = None) -> Task | None:
        """The next task, or None if there is none now; more may come when those under way are done.

        Args:
            frames: how many a :class:`RenderTask` is to have, rounded up to whole parts; fewer if there are no more.
            last_avatar: the one that the worker rendered last, and has at hand.
        """
        while True:
            if self._ready:
                return self._ready.popleft()
            plan = self._choose(last_avatar)
            if plan is not None:
                return RenderTask(self._bundle(AvatarKey.of(plan.job), frames))
            if not self._queue:
                return None
            self._begin(self._queue.popleft())

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, now or later."""
        return not (self._queue or self._plans or self._featuring)

    def upcoming(self) -> list[AvatarKey]:
        """The avatars that will be needed, next first."""
        jobs = [plan.job for plan in self._plans.values() if plan.missing]
        return list(dict.fromkeys(AvatarKey.of(job) for job in (*jobs, *self._queue)))

    # ── how it went ───────────────────────────────────────────────────────────────────────────────────────────────────

    def rendered(self, outcome: Outcome) -> None:
        """Record that a part was rendered, or failed."""
        part, result = outcome.part, outcome.result
        plan = self._plans.get(part.job.output)
        if plan is None:
            return  # parked meanwhile; if the part is whole, it is on disk for the next run
        plan.rendering -= 1
        if isinstance(result, Failed):
            plan.failed = plan.failed or result
            plan.missing.clear()
        else:
            plan.facts[part.number] = result
            self._made.add(part.path)
            self.frames += len(part.frames)
            self._tell(plan)
        self._end_if_due(plan)

    def settle(self, task: Task, result: Any) -> None:
        """Record that a task is done, or failed.

        Args:
            result: the outcomes of a :class:`RenderTask`, what :func:`~gpupipe.farm.worker.join_parts` returned for a
                :class:`JoinTask`, None for a :class:`FeaturesTask`; or why the task :class:`Failed`.

        Raises:
            DiskFullError: there is no room.
        """
        if isinstance(task, RenderTask):
            if isinstance(result, Failed):  # outside of any one part
                result = [Outcome(part, result) for part in task.parts]
            for outcome in result:
                self.rendered(outcome)
            return
        if isinstance(result, Failed):
            self._failed(task.job, result)
        elif isinstance(task, FeaturesTask):
            if read_record(task.path, task.inputs) is None:  # it would be made for ever
                told = "was made by a worker, but is not here; expected all machines to see the same folder"
                self._failed(task.job, Failed(f"{task.path}: {told}"))
                return
            self._featuring.discard(task.job.output)
            self._queue.appendleft(task.job)
        else:
            self._joined(task, result)

    def lost(self, task: Task, *, blamed: bool = True) -> None:
        """Record that a task's worker died: the task goes to others.

        It may have died on any job of the task that has a part without a record. From then on each of them is given out
        by itself, which tells the one at fault from the others.

        Args:
            blamed: whether the worker died on this task, and not on one ahead of it.
        """
        parts = task.parts if isinstance(task, RenderTask) else []
        records = [(part, read_record(part.path, part.inputs)) for part in parts]
        left = [part.job for part, record in records if record is None]
        jobs = left if isinstance(task, RenderTask) else [task.job]
        for job in {job.output: job for job in jobs}.values():
            if not blamed or not self._is_under_way(job):  # not: parked meanwhile
                continue
            state = self.ledger.states[job.output]
            state.worker_deaths += 1
            if state.worker_deaths >= MAX_WORKER_DEATHS:
                state.error = f"{state.worker_deaths} workers died over it"
                self._give_up(job, parked=True)
        if isinstance(task, RenderTask):
            for part, record in reversed(records):
                self._lost_part(part, record)
        elif self._is_under_way(task.job):
            self._ready.append(task)

    def _lost_part(self, part: Part, record: Record | None) -> None:
        plan = self._plans.get(part.job.output)
        if plan is None:
            return  # parked meanwhile
        if record is not None:  # the part was whole before its worker died
            self.rendered(Outcome(part, record.facts))
            return
        plan.rendering -= 1
        if plan.failed is None:
            plan.missing.appendleft(part)
        self._end_if_due(plan)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, avatar: AvatarKey | None) -> _Plan | None:
        """A job under way that has parts to hand out: one for that avatar, if there is one."""
        ready = [plan for plan in self._plans.values() if plan.missing]
        return next((plan for plan in ready if AvatarKey.of(plan.job) == avatar), ready[0] if ready else None)

    def _bundle(self, avatar: AvatarKey, frames: int) -> list[Part]:
        """Parts for one avatar, from the jobs under way and those that come next; of one job if a worker died on it."""
        parts: list[Part] = []
        while frames > 0:
            plan = self._choose(avatar)
            if plan is not None and AvatarKey.of(plan.job) == avatar:
                jobs = {part.job.output for part in parts} | {plan.job.output}
                if len(jobs) > 1 and any(self.ledger.states[output].worker_deaths for output in jobs):
                    break
                parts.append(plan.missing.popleft())
                plan.rendering += 1
                frames -= len(parts[-1].frames)
            elif self._queue and AvatarKey.of(self._queue[0]) == avatar and not self._ready:
                self._begin(self._queue.popleft())
            else:
                break
        return parts

    def _begin(self, job: Job) -> None:
        """See how much of a job is there, and plan the rest."""
        state = self.ledger.states[job.output]
        fingerprint = self._fingerprints.of(job)
        if self.ledger.is_done(job, fingerprint):
            self.ledger.clean(job)  # the run that finished it may have been killed before it could
            self.skipped.append(job.output)
            return
        if job.output not in self._begun or state.fingerprint != fingerprint:
            self._begun.add(job.output)
            state = self.ledger.reset(job, fingerprint)  # what is known is about other inputs, or from an earlier run
        state.status = "waiting"
        planned = attempt(self._plan, job, fingerprint)
        if isinstance(planned, Failed):
            self._failed(job, planned)

    def _plan(self, job: Job, fingerprint: str) -> None:
        """Cut a job into parts, or have its features made first."""
        output = self.ledger.output(job)
        make_folder(output.parent)
        check_writable(output)
        if job.audio is not None:
            open_sound(job.audio).close()  # before anything is rendered for it
        features = Path(job.audio_features or self.ledger.folder(job) / "features.npy")
        if job.encoder is not None:
            inputs = text_hash(json.dumps([fingerprint, self._runtime, "features"]))
            made = read_record(features, inputs)
            if made is None:
                self._featuring.add(job.output)
                self._ready.append(FeaturesTask(job, features, inputs))
                return
            self.ledger.states[job.output].timings["features"] = made.facts["seconds"]
        plan = self._plans[job.output] = self._cut(job, features, fingerprint)
        self.ledger.save(job)
        self._end_if_due(plan)

    def _cut(self, job: Job, features: Path, fingerprint: str) -> _Plan:
        """Cut a job into parts, and look which of them are recorded."""
        frames = SpeechFeatures(features, job.mode).timing(job.frame_rate).frames
        rate = frame_rate(job.frame_rate)
        unit = segment_length(rate)
        length = max(1, round(Fraction(self._part_seconds) * rate / unit)) * unit
        folder, suffix = self.ledger.folder(job), Path(job.output).suffix
        parts = [
            Part(
                job,
                number,
                range(start, min(start + length, frames)),
                features,
                folder / f"{number:05d}{suffix}",
                text_hash(json.dumps([fingerprint, self._runtime, start, length])),
            )
            for number, start in enumerate(range(0, frames, length))
        ]
        plan = _Plan(job, frames, parts)
        for part in parts:
            record = read_record(part.path, part.inputs)
            if record is None:
                plan.missing.append(part)
            else:
                plan.facts[part.number] = record.facts
                if part.path not in self._made:
                    plan.earlier.add(part.number)
        return plan

    def _put_back(self, plan: _Plan) -> bool:
        """Have those parts made again that were there before and are of another engine or encoder than those since.

        Each run chooses engines anew, and a clip would show where it was interrupted. What was rendered since is joined
        as it is: where the machines of one run differ, there would be no end of it. Returns whether there are such.
        """
        fresh = {_kind(facts) for number, facts in plan.facts.items() if number not in plan.earlier}
        kinds = fresh or {_kind(plan.facts[len(plan.parts) - 1])}
        if len(kinds) > 1:
            told = " and ".join(sorted("/".join(kind) for kind in kinds))
            logger.warning("%s: is of %s; expected one: name an engine and a codec in the job", plan.job.output, told)
        for number in sorted(plan.earlier):
            if len(kinds) == 1 and _kind(plan.facts[number]) not in kinds:
                part = plan.parts[number]
                with contextlib.suppress(OSError):
                    part.path.unlink()  # or it would count when a worker dies over it
                plan.earlier.discard(number)
                del plan.facts[number]
                plan.missing.append(part)
        return bool(plan.missing)

    def _is_under_way(self, job: Job) -> bool:
        return job.output in self._plans or job.output in self._featuring

    def _tell(self, plan: _Plan) -> None:
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            logger.info("%s: %d of %d parts", plan.job.output, len(plan.facts), len(plan.parts))

    def _end_if_due(self, plan: _Plan) -> None:
        """Give up a try that failed, when its parts are back; join the parts, when all are whole."""
        if plan.failed is not None:
            if plan.rendering == 0:
                self._failed(plan.job, plan.failed)
        elif len(plan.facts) == len(plan.parts) and not self._put_back(plan):
            path = self.ledger.folder(plan.job) / f"joined{Path(plan.job.output).suffix}"
            self._ready.append(JoinTask(plan.job, plan.parts, path))

    def _joined(self, task: JoinTask, video: Joined) -> None:
        """Give a whole video its name."""
        plan = self._plans[task.job.output]
        published = attempt(self._publish, plan, task.path, video)
        if isinstance(published, Failed):
            self._failed(plan.job, published)
        else:
            self.done += 1
            self._on_job_end(self.ledger.states[plan.job.output])

    def _publish(self, plan: _Plan, path: Path, video: Joined) -> None:
        job, state = plan.job, self.ledger.states[plan.job.output]
        if video.frames != plan.frames:
            raise InputError(f"{path}: has {video.frames} frames; expected {plan.frames}")
        output, rate = self.ledger.output(job), job.frame_rate
        state.frames, state.parts = video.frames, len(plan.parts)
        state.sound_minus_picture = compare_lengths(output, video.frames / rate, video.sound_seconds, rate)
        state.timings["render"] = round(sum(facts["seconds"] for facts in plan.facts.values()), 3)
        state.timings["join"] = video.seconds
        for name in ("device", "engine", "codec"):
            setattr(state, name, ", ".join(sorted({facts[name] for facts in plan.facts.values()})))
        self._forget(job)
        self.ledger.publish(job, path, video.checksum)

    def _failed(self, job: Job, failed: Failed) -> None:
        """Try a job again after the others, or park it."""
        state = self.ledger.states[job.output]
        state.attempts += 1
        state.error = failed.error
        self._give_up(job, parked=state.attempts >= MAX_ATTEMPTS)

    def _give_up(self, job: Job, *, parked: bool) -> None:
        state = self.ledger.states[job.output]
        state.status = "parked" if parked else "failed"
        self._forget(job)
        self.ledger.save(job)
        if parked:
            self._on_job_end(state)
        else:
            self._queue.append(job)
        logger.debug("%s: failed (%s)", job.output, state.error)

    def _forget(self, job: Job) -> None:
        self._plans.pop(job.output, None)
        self._featuring.discard(job.output)


def _kind(facts: dict[str, Any]) -> tuple[str, str]:
    """What the bytes of a part depend on besides its hash."""
    return facts["engine"], facts["codec"]


def _grouped(jobs: list[Job]) -> list[Job]:
    """The jobs, grouped by network and within that by avatar; groups stand in the order of their first jobs."""
    networks: dict[Any, dict[AvatarKey, list[Job]]] = {}
    for job in jobs:
        key = AvatarKey.of(job)
        networks.setdefault(key.network, {}).setdefault(key, []).append(job)
    return [job for avatars in networks.values() for some in avatars.values() for job in some]
