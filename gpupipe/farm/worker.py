"""What does a farm's work: renders segments of clips to parts, makes features from sound, joins parts to videos.

The same worker runs in the process of the command and in each of Ray's actors. It knows nothing of states and retries:
it takes tasks and tells how they went.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpupipe.engines.base import BATCH_SIZES
from gpupipe.errors import DiskFullError, one_line
from gpupipe.fallbacks import note_fallback
from gpupipe.farm.jobs import Job
from gpupipe.farm.ledger import file_hash, write_record
from gpupipe.farm.residents import Residents
from gpupipe.features import SpeechFeatures
from gpupipe.files import make_folder, replacing
from gpupipe.shots import Piece, Shot, fill_batches, map_batches, render_batch
from gpupipe.speech import SpeechEncoder, write_features
from gpupipe.template import template_size
from gpupipe.video.encode import VideoWriter
from gpupipe.video.join import join_segments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """Frames of a job's clip that are rendered to a video of their own.

    Args:
        job: its files are named by absolute paths.
        number: of the segment, from 0 on.
        frames: of the clip; all segments but the last have the same number.
        features: of the whole clip, ``.npy``.
        path: of the part that it becomes.
        inputs: hash of all that the part is made of.
    """

    job: Job
    number: int
    frames: range
    features: Path
    path: Path
    inputs: str


@dataclass(frozen=True)
class Outcome:
    """How a segment went: ``facts`` of the part that is now recorded, or an ``error``."""

    segment: Segment
    facts: dict[str, Any] | None = None
    error: str | None = None


class Worker:
    """Renders on one device.

    Args:
        residents: where avatars are kept, and the device.
        batch_size: frames rendered at once; None takes the device's default.
    """

    def __init__(self, residents: Residents, *, batch_size: int | None = None) -> None:
        self.residents = residents
        self.device = residents.device
        self.batch_size = batch_size or BATCH_SIZES[self.device.type]
        self._encoder: tuple[str, SpeechEncoder] | None = None

    def render(self, segments: Iterable[Segment]) -> Iterator[Outcome]:
        """Render segments to parts, in batches that are filled across them.

        Segments are asked for as there is room, and outcomes come as parts are whole. A segment that fails stops no
        other one.

        Raises:
            DiskFullError: no room for a part; what is whole is recorded.
        """
        with _Studio(self.residents) as studio:
            batches = fill_batches(studio.shots(segments), lambda: self.batch_size)
            for pieces, rendered in map_batches(self._attempt, batches, self.device):
                if isinstance(rendered, BaseException):
                    self._again(pieces, rendered, studio)
                else:
                    studio.take(pieces, rendered)
                yield from studio.outcomes()
            yield from studio.finish()

    def features(self, job: Job, path: Path, inputs: str) -> None:
        """Make and record the features of a job's sound."""
        assert job.encoder is not None and job.audio is not None
        start = time.perf_counter()
        make_folder(path.parent)
        if self._encoder is None or self._encoder[0] != job.encoder:
            self._encoder = job.encoder, SpeechEncoder(job.encoder, self.device)
        with replacing(path) as temporary:
            write_features(self._encoder[1].covering_features(job.audio), temporary)
        write_record(path, inputs, {"seconds": round(time.perf_counter() - start, 3)})

    def _attempt(self, pieces: list[Piece]) -> tuple[list[Piece], list[Tensor] | BaseException]:
        """Render a batch; an error is kept for who knows what to do about it."""
        try:
            return pieces, render_batch(pieces)
        except Exception as error:
            return pieces, error.with_traceback(None)  # which keeps the batch's tensors

    def _again(self, pieces: list[Piece], error: BaseException, studio: _Studio) -> None:
        """Render a failed batch again: in halves if memory ran out, else clip by clip, to find whose fault it is."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            rows = sum(len(piece.rows) for piece in pieces)
            if rows > 1:
                if self.batch_size > 1:
                    self.batch_size = min(self.batch_size, max(1, rows // 2))
                    note_fallback(f"{self.device} is out of memory: batches of {self.batch_size} from here on")
                halves = [[half] for half in pieces[0].halves()] if len(pieces) == 1 else _split(pieces)
            else:
                halves = []
        else:
            halves = [[piece] for piece in pieces] if len(pieces) > 1 else []
        if not halves:
            studio.fail(pieces[0].shot, error)
        for half in halves:
            if half[0].shot.cancelled:
                continue
            some, rendered = self._attempt(half)
            if isinstance(rendered, BaseException):
                self._again(some, rendered, studio)
            else:
                studio.take(some, rendered)


class _Studio:
    """The parts that are being written: one that takes frames, and those before it, which come to their end."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._parts: dict[Shot, _Part] = {}
        self._done: deque[Outcome] = deque()
        self._ending: deque[tuple[Future[Outcome], _Part]] = deque()
        self._hand = ThreadPoolExecutor(1, "finish")

    def __enter__(self) -> _Studio:
        return self

    def __exit__(self, *error: object) -> None:
        unfinished = [part for future, part in self._ending if future.cancel()]
        self._hand.shutdown()
        for part in (*unfinished, *self._parts.values()):
            part.abandon()

    def shots(self, segments: Iterable[Segment]) -> Iterator[Shot]:
        """Each segment as a shot, as its turn comes."""
        for segment in segments:
            try:
                part = _Part(segment, self._residents)
            except DiskFullError:
                raise
            except Exception as error:
                self._done.append(Outcome(segment, error=one_line(error)))
                continue
            self._parts[part.shot] = part
            yield part.shot

    def take(self, pieces: list[Piece], rendered: list[Tensor]) -> None:
        """Write the frames of a batch."""
        for piece, rows in zip(pieces, rendered, strict=True):
            part = self._parts.get(piece.shot)
            if part is None:
                continue  # failed meanwhile
            try:
                for frames in piece.frames_from_rows(rows, max(1, len(rows))):
                    part.writer.write(frames)
            except DiskFullError:
                raise
            except Exception as error:
                self.fail(piece.shot, error)
                continue
            if piece.frames.stop == piece.shot.frames.stop:
                del self._parts[piece.shot]
                self._ending.append((self._hand.submit(part.finish), part))

    def fail(self, shot: Shot, error: BaseException) -> None:
        """Give up a shot."""
        shot.cancelled = True
        part = self._parts.pop(shot, None)
        if part is not None:
            part.abandon()
            self._done.append(Outcome(part.segment, error=one_line(error)))

    def outcomes(self) -> Iterator[Outcome]:
        """What has come to its end by now."""
        while self._ending and self._ending[0][0].done():
            self._done.append(self._ending.popleft()[0].result())
        while self._done:
            yield self._done.popleft()

    def finish(self) -> Iterator[Outcome]:
        """Wait for the rest."""
        while self._ending:
            self._done.append(self._ending.popleft()[0].result())
        yield from self.outcomes()


class _Part:
    """A segment on its way into its file."""

    def __init__(self, segment: Segment, residents: Residents) -> None:
        job = segment.job
        self.segment = segment
        self._began = time.perf_counter()
        speech = SpeechFeatures(segment.features, job.mode, check=False)  # whoever cut the clip has checked them
        size = template_size(job.template)
        make_folder(segment.path.parent)
        self._resources = contextlib.ExitStack()
        with self._resources:
            self.writer = self._resources.enter_context(
                VideoWriter(
                    segment.path,
                    width=size.width,
                    height=size.height,
                    fps=job.frame_rate,
                    codec=job.codec,
                    crf=job.crf,
                    segmented=True,
                    preset=job.preset,
                    device=residents.device,
                )
            )
            generator, avatar = residents.get(job, self.writer.pixel_format)
            self._engine = generator.unet_model.engine.name
            self.shot = generator.shot(
                avatar, speech, start_frame=job.start_frame, fps=job.frame_rate, frames=segment.frames
            )
            self._device = str(residents.device)
            self._resources = self._resources.pop_all()

    def finish(self) -> Outcome:
        """Bring the file to its end, and record it."""
        segment = self.segment
        try:
            self._resources.close()
            facts = {
                "frames": self.writer.frames,
                "seconds": round(time.perf_counter() - self._began, 3),
                "worker": f"{socket.gethostname()}:{os.getpid()}",
                "device": self._device,
                "engine": self._engine,
                "codec": self.writer.encoder,
            }
            write_record(segment.path, segment.inputs, facts)
            return Outcome(segment, facts)
        except DiskFullError:
            raise
        except Exception as error:
            return Outcome(segment, error=one_line(error))

    def abandon(self) -> None:
        """Leave nothing of the file."""
        with contextlib.suppress(_Abandoned), self._resources:
            raise _Abandoned


class _Abandoned(Exception):
    """Ends a part that nobody wants."""


class Joined(NamedTuple):
    """A whole video: its frames, the seconds of its sound, its checksum, and the seconds that it took."""

    frames: int
    sound_seconds: float | None
    checksum: str
    seconds: float


def join_parts(job: Job, parts: list[Path], path: Path) -> Joined:
    """Join a job's parts, with its sound."""
    start = time.perf_counter()
    video = join_segments(parts, path, sound=job.audio)
    return Joined(*video, file_hash(path), round(time.perf_counter() - start, 3))


def _split(pieces: list[Piece]) -> list[list[Piece]]:
    middle = len(pieces) // 2
    return [pieces[:middle], pieces[middle:]]
