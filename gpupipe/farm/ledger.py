"""What a farm keeps on disk, so that a run that was killed at any moment goes on where it stopped.

    output/
        results.jsonl                   one line a job, for people and programs: always a whole file; first those of
                                        the last run, then those of other files of jobs, as they were left
        anna/1.mp4                      an output, renamed to its name when it is whole
        .gpupipe-farm/
            lock                        held by the farm that is at work here
            <job>/state.json            what is known of a job
            <job>/features.npy (.json)  features that were made from its sound
            <job>/00003.mp4   (.json)   a part of it, and its record, written the moment that the part is whole

A record, and the state of a job that is done, holds the hash of all that its file was made of and the file's checksum:
a file counts as done if both are right. So a run reads each video that is done, once. A record that is wrong or missing
only means that its file is made again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TextIO

from gpupipe.errors import OutputError, output_error
from gpupipe.farm.jobs import INPUTS, Job
from gpupipe.files import make_folder, replacing
from gpupipe.template import template_files
from gpupipe.versions import __version__

FOLDER = ".gpupipe-farm"
RESULTS = "results.jsonl"
_RESULTS_SECONDS, _RESULTS_SHARE = 1.0, 0.02
"""Seconds between writes of the results, and the most that writing may take of the whole time: the file may be long."""

Status = Literal["waiting", "done", "failed", "parked"]
"""A ``failed`` job is tried again in this run, a ``parked`` one only in the next."""


@dataclass
class JobState:
    """What is known of a job.

    Attributes:
        fingerprint: of the inputs that the rest belongs to.
        attempts, worker_deaths: failures, and workers that died on it, in the run that was last at it. A worker that
            died over several jobs at once counts for each.
        sound_minus_picture: difference in length in seconds, if it is more than a frame.
        device, engine, codec: what its parts were made with; more than one where the machines of a run differ.
        timings: seconds of work: ``features`` if they were made, ``render``, the sum over parts, and ``join``.
        checksum: SHA-256 of the video.
    """

    output: str
    status: Status = "waiting"
    fingerprint: str = ""
    attempts: int = 0
    worker_deaths: int = 0
    error: str | None = None
    frames: int | None = None
    parts: int | None = None
    sound_minus_picture: float | None = None
    timings: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    engine: str | None = None
    codec: str | None = None
    bytes: int | None = None
    checksum: str | None = None
    finished: str | None = None


@dataclass(frozen=True)
class Record:
    """What is known of a finished file that the farm will need: see the module's text."""

    inputs: str
    checksum: str
    facts: dict[str, Any]


def write_record(path: Path, inputs: str, facts: dict[str, Any]) -> None:
    """Record that ``path`` is whole. ``inputs`` is the hash of what it was made of."""
    record = Record(inputs, file_hash(path), facts)
    with replacing(_record_path(path)) as temporary:
        temporary.write_text(json.dumps(vars(record)) + "\n", encoding="utf-8")


def read_record(path: Path, inputs: str) -> Record | None:
    """The record of a file, if it is whole and made of those inputs."""
    try:
        record = Record(**json.loads(_record_path(path).read_text(encoding="utf-8")))
        return record if record.inputs == inputs and record.checksum == file_hash(path) else None
    except (OSError, ValueError, TypeError):
        return None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


class Ledger:
    """The states of jobs and the files of an output folder.

    Args:
        output_dir: made if it is not there.
        jobs: of this run, in their order.
    """

    def __init__(self, output_dir: str | Path, jobs: list[Job]) -> None:
        self.output_dir = Path(output_dir)
        self._jobs = jobs
        self._next_results = 0.0

    @functools.cached_property
    def states(self) -> dict[str, JobState]:
        """The state of each job, by its output: read when first asked for. A run asks when it holds the folder: one
        that was at work there before may have changed them until then."""
        return {job.output: self._read(job) for job in self._jobs}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output folder: two farms in one would undo each other's work.

        Raises:
            OutputError: another farm is at work there, or the folder cannot be written.
        """
        path = make_folder(self.output_dir / FOLDER) / "lock"
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("w"))
                _lock(file)
            except BlockingIOError:
                raise OutputError(f"{self.output_dir}: another farm is at work in this folder") from None
            except OSError as error:
                raise output_error(path, error) from error
            for left in self.output_dir.glob(f".{Path(RESULTS).stem}-*.part.jsonl"):  # by one that was killed
                left.unlink(missing_ok=True)
            yield

    def folder(self, job: Job) -> Path:
        """Where a job's own files are."""
        return self.output_dir / FOLDER / job.id

    def output(self, job: Job) -> Path:
        """Where a job's video appears."""
        return self.output_dir / job.output

    def is_done(self, job: Job, fingerprint: str) -> bool:
        """Whether a job's video is there, made of those inputs, with the recorded checksum."""
        state, output = self.states[job.output], self.output(job)
        if state.status != "done" or state.fingerprint != fingerprint:
            return False
        try:
            # The size shows most damage without reading the file.
            return output.stat().st_size == state.bytes and file_hash(output) == state.checksum
        except OSError:
            return False

    def reset(self, job: Job, fingerprint: str = "") -> JobState:
        """Forget what is known of a job: other inputs make another clip, and another run tries anew.

        What a worker that was killed had begun to write is removed.
        """
        for left in self.folder(job).glob(".*.part*"):
            left.unlink(missing_ok=True)
        state = self.states[job.output] = JobState(job.output, fingerprint=fingerprint)
        return state

    def save(self, job: Job) -> None:
        """Keep a job's state, and bring the results up to date if they have not just been."""
        folder = make_folder(self.folder(job))
        state = self.states[job.output]
        with replacing(folder / "state.json") as temporary:
            temporary.write_text(json.dumps(vars(state), indent=1) + "\n", encoding="utf-8")
        if time.monotonic() > self._next_results:
            self.write_results()

    def write_results(self) -> None:
        """Write one line a job to ``results.jsonl``, those of other files of jobs included."""
        start = time.monotonic()
        lines = [json.dumps(vars(state)) for state in self.states.values()] + self._others
        with replacing(self.output_dir / RESULTS) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        now = time.monotonic()
        self._next_results = now + max(_RESULTS_SECONDS, (now - start) / _RESULTS_SHARE)

    def publish(self, job: Job, video: Path, checksum: str) -> None:
        """Give a whole video its name, and forget its parts."""
        state, output = self.states[job.output], self.output(job)
        state.checksum, state.bytes = checksum, video.stat().st_size
        make_folder(output.parent)
        try:
            video.replace(output)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise output_error(output, error) from error
            with replacing(output) as temporary:  # on another file system, by a link
                shutil.copyfile(video, temporary)
        state.status, state.error = "done", None
        state.finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.save(job)
        self.clean(job)

    def clean(self, job: Job) -> None:
        """Remove all of a job's own files but its state."""
        folder = self.folder(job)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name != "state.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _read(self, job: Job) -> JobState:
        state = _read_state(self.folder(job) / "state.json")
        return state if state is not None and state.output == job.output else JobState(job.output)

    @functools.cached_property
    def _others(self) -> list[str]:
        """Lines of the jobs that have a state here and are not of this run; a run changes none of these."""
        paths = (self.output_dir / FOLDER).glob("*/state.json")
        states = [state for path in paths if (state := _read_state(path)) and state.output not in self.states]
        return [json.dumps(vars(state)) for state in sorted(states, key=lambda state: state.output)]


def _read_state(path: Path) -> JobState | None:
    """A state that was kept, if it can be read."""
    try:
        state = JobState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return state if isinstance(state.output, str) else None


class Fingerprints:
    """Hashes of what clips are made of, as one run sees it.

    A file is read once, though it may change meanwhile: workers keep networks and faces too. What they made of it then
    is made again in the next run, which sees another hash.
    """

    def __init__(self) -> None:
        self._hashes: dict[Path, str] = {}

    def of(self, job: Job) -> str:
        """The hash of a job: its options, the content of its inputs, and gpupipe's version."""
        options = job.model_dump(exclude={*INPUTS, "output"})
        suffix = Path(job.output).suffix
        contents = [self._content(path, job) for path in job.inputs()]
        return text_hash(json.dumps([__version__, options, suffix, contents], sort_keys=True))

    def _content(self, path: Path, job: Job) -> list[list[str]]:
        try:
            files = template_files(path, use_parsing=job.use_parsing) if path.is_dir() else None
        except OSError:  # who opens it says what is wrong
            files = None
        if files is None:
            return [["", self._file(path)]]
        return [[str(file.relative_to(path)), self._file(file)] for file in files]

    def _file(self, path: Path) -> str:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return "is no file"
            key = path.resolve()
            if key not in self._hashes:
                self._hashes[key] = file_hash(path)
            return self._hashes[key]
        except OSError as error:
            return f"cannot be read: {error.strerror}"  # who opens it says so better


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _lock(file: TextIO) -> None:
    try:
        import fcntl  # noqa: PLC0415 - not on Windows, where two farms in one folder are the user's to avoid
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
