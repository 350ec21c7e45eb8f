"""Which work there is: jobs → segments → parts → videos, with every state kept on disk.

A farm renders nothing itself. Workers ask it for tasks and tell it how they went; the same farm serves the worker of
this process (:mod:`gpupipe.farm.local`) and those of a cluster (:mod:`gpupipe.farm.cluster`).
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpupipe.errors import DiskFullError, one_line
from gpupipe.farm.jobs import Job
from gpupipe.farm.ledger import Fingerprints, JobState, Ledger, read_record, text_hash
from gpupipe.farm.residents import AvatarKey
from gpupipe.farm.worker import Joined, Outcome, Segment
from gpupipe.features import SpeechFeatures
from gpupipe.schedule import frame_rate
from gpupipe.versions import versions
from gpupipe.video.codecs import segment_length
from gpupipe.video.sound import compare_lengths, open_sound

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A job that fails so many times in a run is parked: the run leaves it."""

MAX_LOSSES = 5
"""So is one with which so many workers died."""

PART_SECONDS = 20.0
"""Length of a part: what a killed worker loses at most."""

Told = Callable[[JobState], Any]
"""Called when a job comes to its end, well or not."""


@dataclass(frozen=True)
class FeaturesTask:
    """Make the features of a job's sound."""

    job: Job
    path: Path
    inputs: str


@dataclass(frozen=True)
class RenderTask:
    """Render segments, all of one network."""

    segments: list[Segment]


@dataclass(frozen=True)
class JoinTask:
    """Join a job's parts."""

    job: Job
    parts: list[Path]
    path: Path


Task = FeaturesTask | RenderTask | JoinTask


@dataclass
class _Plan:
    """A job under way."""

    job: Job
    frames: int
    segments: list[Segment]
    missing: deque[Segment]
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)


class Farm:
    """The jobs of one run.

    Failures and lost workers count within a run: what an earlier one parked is tried anew. What was in the way may be
    gone without an input having changed (a folder that could not be written, memory that another program held), and who
    runs the command again wants it tried. That costs no more than :data:`MAX_ATTEMPTS` tries of parts that are not
    recorded yet. Deaths of workers summed up over runs would in the end park any long job on machines that are taken
    away at times; and a run that was itself killed counts for nothing, since nobody knows whether a job was the reason.

    Args:
        jobs: checked, outputs distinct.
        ledger: of the output folder, locked.
        device: the kind of device that renders, ``cpu`` or ``cuda``: parts of one clip come from one kind.
        part_seconds: length of a part, more than 0 and finite, rounded to whole segments of the encoder.
        force: do again what is done.
        told: see :data:`Told`.

    Attributes:
        skipped: outputs that were there already.
        frames: rendered so far, over all jobs.
        done: jobs that this run brought to their end.
    """

    def __init__(
        self,
        jobs: list[Job],
        ledger: Ledger,
        *,
        device: str,
        part_seconds: float = PART_SECONDS,
        force: bool = False,
        told: Told = lambda state: None,
    ) -> None:
        self.ledger = ledger
        self.skipped: list[str] = []
        self.frames = 0
        self.done = 0
        self._told = told
        self._part_seconds = part_seconds
        self._runtime = json.dumps([versions(), device], sort_keys=True)
        self._fingerprints = Fingerprints()
        self._queue = deque(_grouped(jobs))
        self._plans: dict[str, _Plan] = {}
        self._featuring: set[str] = set()
        self._begun: set[str] = set()
        self._ready: deque[FeaturesTask | JoinTask] = deque()
        if force:
            for job in jobs:
                ledger.reset(job)
                ledger.clean(job)

    # ── what there is to do ───────────────────────────────────────────────────────────────────────────────────────────

    def next_task(self, *, frames: int = 1, near: AvatarKey | None = None) -> Task | None:
        """The next task, or None if there is none now; more may come when those under way are done.

        Args:
            frames: how many a :class:`RenderTask` is to have, rounded up to whole segments.
            near: the avatar that the worker has at hand.
        """
        while True:
            if self._ready:
                return self._ready.popleft()
            plan = self._choose(near)
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
        """The avatars that will be asked for, next first."""
        jobs = [plan.job for plan in self._plans.values() if plan.missing]
        return list(dict.fromkeys(AvatarKey.of(job) for job in (*jobs, *self._queue)))

    # ── how it went ───────────────────────────────────────────────────────────────────────────────────────────────────

    def rendered(self, outcome: Outcome) -> None:
        """Take note of a segment that has been rendered, or has failed."""
        segment = outcome.segment
        plan = self._plans.get(segment.job.output)
        if plan is None or plan.segments[segment.number] != segment:
            return  # the job has failed meanwhile; the part is on disk if it is whole
        if outcome.error is not None:
            self.failed(segment.job, outcome.error)
            return
        assert outcome.facts is not None
        plan.facts[segment.number] = outcome.facts
        self.frames += len(segment.frames)
        self._join_if_whole(plan)

    def featured(self, task: FeaturesTask) -> None:
        """Take note of features that have been made: the job comes next."""
        self._featuring.discard(task.job.output)
        self._queue.appendleft(task.job)

    def joined(self, task: JoinTask, video: Joined) -> None:
        """Take note of a video that is whole: it gets its name."""
        plan = self._plans.get(task.job.output)
        if plan is None:
            return  # parked meanwhile
        if video.frames != plan.frames:
            self.failed(task.job, f"{task.path}: has {video.frames} frames; expected {plan.frames}")
            return
        state = self.ledger.states[task.job.output]
        state.frames, state.parts = video.frames, len(plan.segments)
        path, rate = self.ledger.output(task.job), task.job.frame_rate
        state.sound_minus_picture = compare_lengths(path, video.frames / rate, video.sound_seconds, rate)
        state.timings["render"] = round(sum(facts["seconds"] for facts in plan.facts.values()), 3)
        state.timings["join"] = video.seconds
        facts = plan.facts[0]
        state.device, state.engine, state.codec = facts["device"], facts["engine"], facts["codec"]
        self._forget(task.job)
        self.ledger.publish(task.job, task.path, video.checksum)
        self.done += 1
        self._told(state)

    def failed(self, job: Job, error: str) -> None:
        """Take note of a job that failed: it is tried again after the others, or parked."""
        state = self.ledger.states[job.output]
        state.attempts += 1
        state.error = error
        self._give_up(job, parked=state.attempts >= MAX_ATTEMPTS)

    def lost(self, task: Task) -> None:
        """Take note of a worker that died over a task: others do it."""
        jobs = [segment.job for segment in task.segments] if isinstance(task, RenderTask) else [task.job]
        for job in {job.output: job for job in jobs}.values():
            state = self.ledger.states[job.output]
            state.losses += 1
            if state.losses >= MAX_LOSSES:
                state.error = f"{state.losses} workers died over it"
                self._give_up(job, parked=True)
        if not isinstance(task, RenderTask):
            if task.job.output in self._featuring or task.job.output in self._plans:
                self._ready.append(task)
            return
        for segment in reversed(task.segments):
            plan = self._plans.get(segment.job.output)
            if plan is not None and segment in plan.segments and segment.number not in plan.facts:
                plan.missing.appendleft(segment)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, near: AvatarKey | None) -> _Plan | None:
        """A job under way that has segments left, with the avatar at hand if there is one."""
        ready = [plan for plan in self._plans.values() if plan.missing]
        return next((plan for plan in ready if AvatarKey.of(plan.job) == near), ready[0] if ready else None)

    def _bundle(self, key: AvatarKey, frames: int) -> list[Segment]:
        """Segments for one avatar, of the jobs under way and of those that come next."""
        segments: list[Segment] = []
        while frames > 0:
            plan = self._choose(key)
            if plan is not None and AvatarKey.of(plan.job) == key:
                segments.append(plan.missing.popleft())
                frames -= len(segments[-1].frames)
            elif self._queue and AvatarKey.of(self._queue[0]) == key and not self._ready:
                self._begin(self._queue.popleft())
            else:
                break
        return segments

    def _begin(self, job: Job) -> None:
        """Look at what there is of a job, and plan the rest."""
        state = self.ledger.states[job.output]
        fingerprint = self._fingerprints.of(job)
        if self.ledger.is_done(job, fingerprint):
            self.ledger.clean(job)  # of what a run left that was killed before it could
            self.skipped.append(job.output)
            return
        if job.output not in self._begun or state.fingerprint != fingerprint:
            self._begun.add(job.output)
            state = self.ledger.reset(job, fingerprint)  # what is known is of other inputs, or of an earlier run
        state.status = "waiting"
        folder = self.ledger.folder(job)
        try:
            if job.audio is not None:
                open_sound(job.audio).close()  # before anything is rendered for it
            features = Path(job.audio_features or folder / "features.npy")
            inputs = text_hash(json.dumps([fingerprint, self._runtime, "features"]))
            made = read_record(features, inputs) if job.encoder is not None else None
            if job.encoder is not None and made is None:
                self._featuring.add(job.output)
                self._ready.append(FeaturesTask(job, features, inputs))
                return
            if made is not None:
                state.timings["features"] = made.facts["seconds"]
            self._plan(job, features, fingerprint)
        except DiskFullError:
            raise
        except Exception as error:
            self.failed(job, one_line(error))

    def _plan(self, job: Job, features: Path, fingerprint: str) -> None:
        speech = SpeechFeatures(features, job.mode)
        frames = speech.timing(job.frame_rate).frames
        rate = frame_rate(job.frame_rate)
        unit = segment_length(rate)
        length = max(1, round(Fraction(self._part_seconds) * rate / unit)) * unit
        folder, suffix = self.ledger.folder(job), Path(job.output).suffix
        segments = [
            Segment(
                job,
                number,
                range(start, min(start + length, frames)),
                features,
                folder / f"{number:05d}{suffix}",
                text_hash(json.dumps([fingerprint, self._runtime, start, length])),
            )
            for number, start in enumerate(range(0, frames, length))
        ]
        plan = _Plan(job, frames, segments, deque())
        for segment in segments:
            record = read_record(segment.path, segment.inputs)
            if record is None:
                plan.missing.append(segment)
            else:
                plan.facts[segment.number] = record.facts
        self._plans[job.output] = plan
        self.ledger.save(job)
        self._join_if_whole(plan)

    def _join_if_whole(self, plan: _Plan) -> None:
        if len(plan.facts) == len(plan.segments):
            job = plan.job
            path = self.ledger.folder(job) / f"joined{Path(job.output).suffix}"
            self._ready.append(JoinTask(job, [segment.path for segment in plan.segments], path))

    def _give_up(self, job: Job, *, parked: bool) -> None:
        state = self.ledger.states[job.output]
        state.status = "parked" if parked else "failed"
        self._forget(job)
        self.ledger.save(job)
        if parked:
            self._told(state)
        else:
            self._queue.append(job)
        logger.debug("%s: failed (%s)", job.output, state.error)

    def _forget(self, job: Job) -> None:
        self._plans.pop(job.output, None)
        self._featuring.discard(job.output)


def _grouped(jobs: list[Job]) -> list[Job]:
    """Jobs of one avatar beside each other, those of one network too, in the order in which each first comes."""
    networks: dict[Any, dict[AvatarKey, list[Job]]] = {}
    for job in jobs:
        key = AvatarKey.of(job)
        networks.setdefault(key.network, {}).setdefault(key, []).append(job)
    return [job for avatars in networks.values() for some in avatars.values() for job in some]
