"""What does a farm's work: renders parts of clips, makes features from sound, joins parts to videos.

The same worker runs in the process of the command and in each of Ray's actors. It knows nothing of states and retries:
it takes tasks and reports how they went.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpupipe.device import require_alive
from gpupipe.engines.base import BATCH_SIZES
from gpupipe.errors import one_line
from gpupipe.fallbacks import note_fallback
from gpupipe.farm.attempt import Failed, attempt
from gpupipe.farm.jobs import Job
from gpupipe.farm.ledger import file_hash, write_record
from gpupipe.farm.residents import Residents
from gpupipe.features import SpeechFeatures, write_features
from gpupipe.files import make_folder, replacing
from gpupipe.handover import Answer, Workers
from gpupipe.shots import Piece, Shot, fill_batches, map_batches, render_batch
from gpupipe.speech import SpeechEncoder
from gpupipe.video.encode import VideoWriter
from gpupipe.video.join import join_videos
from gpupipe.video.segments import room_for_frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A range of a clip's frames, rendered to a video of its own.

    Args:
        job: its files are named by absolute paths.
        number: of the part, from 0 on.
        frames: of the clip; all parts but the last have the same number.
        features: of the whole clip, ``.npy``.
        path: of the video that it becomes.
        inputs: hash of all that the video is made of.
    """

    job: Job
    number: int
    frames: range
    features: Path
    path: Path
    inputs: str


@dataclass(frozen=True)
class Outcome:
    """How a part went: the facts of its video, which is now recorded, or why it failed."""

    part: Part
    result: dict[str, Any] | Failed


@dataclass(frozen=True)
class FeaturesTask:
    """Make the features of a job's sound."""

    job: Job
    path: Path
    inputs: str


@dataclass(frozen=True)
class RenderTask:
    """Render parts, all with one avatar."""

    parts: list[Part]


@dataclass(frozen=True)
class JoinTask:
    """Join a job's parts."""

    job: Job
    parts: list[Part]
    path: Path


Task = FeaturesTask | RenderTask | JoinTask


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

    def render(self, parts: Iterable[Part]) -> Iterator[Outcome]:
        """Render parts, in batches that are filled across them.

        Parts are asked for as there is room, and outcomes come as their videos are whole. A part that fails stops no
        other one.

        Raises:
            DiskFullError: no room for a part; what is whole is recorded.
            DeviceLostError: a part failed with the GPU, on which every other would fail as well.
        """
        with _OpenParts(self.residents) as open_parts:
            batches = fill_batches(open_parts.shots(parts), lambda: self.batch_size)
            for pieces, rendered in map_batches(self._try_batch, batches, self.device):
                self._write(pieces, rendered, open_parts)
                yield from map(self._told, open_parts.outcomes())
            yield from map(self._told, open_parts.outcomes(wait=True))

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

    def _told(self, outcome: Outcome) -> Outcome:
        """The outcome, unless the GPU is lost: then the failure is not the part's own."""
        if isinstance(outcome.result, Failed):
            require_alive(self.device, "run it again: what is whole is recorded")
        return outcome

    def _try_batch(self, pieces: list[Piece]) -> tuple[list[Piece], list[Tensor] | Exception]:
        """Render a batch; an error is returned, for the caller to deal with."""
        try:
            return pieces, render_batch(pieces)
        except Exception as error:
            return pieces, error.with_traceback(None)  # which keeps the batch's tensors

    def _write(self, pieces: list[Piece], rendered: list[Tensor] | Exception, open_parts: _OpenParts) -> None:
        if isinstance(rendered, Exception):
            self._retry(pieces, rendered, open_parts)
        else:
            open_parts.write(pieces, rendered)

    def _retry(self, pieces: list[Piece], error: Exception, open_parts: _OpenParts) -> None:
        """Render a failed batch again: in halves if memory ran out, else clip by clip, to find whose fault it is."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            rows = sum(len(piece.rows) for piece in pieces)
            if rows > 1 and self.batch_size > 1:
                self.batch_size = min(self.batch_size, rows // 2)
                note_fallback(f"{self.device} is out of memory: batches of {self.batch_size} from here on")
            smaller = _halves(pieces)
        else:
            smaller = [[piece] for piece in pieces]
        if len(smaller) == 1:
            open_parts.fail(pieces[0].shot, Failed(one_line(error)))
            return
        for some in smaller:
            wanted = [piece for piece in some if not piece.shot.cancelled]
            if wanted:
                self._write(*self._try_batch(wanted), open_parts)


class _OpenParts:
    """The parts that are being written: those that still take frames, and those that a thread finishes."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._writers: dict[Shot, _PartWriter] = {}
        self._ending: deque[tuple[_PartWriter, Answer[dict[str, Any] | Failed]]] = deque()
        self._failed: deque[Outcome] = deque()
        self._finisher = Workers(1, "finish")

    def __enter__(self) -> _OpenParts:
        return self

    def __exit__(self, *error: object) -> None:
        dropped = self._finisher.end()
        unfinished = [writer for writer, answer in self._ending if answer in dropped]
        for writer in {*unfinished, *self._writers.values()}:
            writer.abandon()

    def shots(self, parts: Iterable[Part]) -> Iterator[Shot]:
        """Each part as a shot, as its turn comes."""
        for part in parts:
            writer = attempt(_PartWriter, part, self._residents)
            if isinstance(writer, Failed):
                self._failed.append(Outcome(part, writer))
            else:
                self._writers[writer.shot] = writer
                yield writer.shot

    def write(self, pieces: list[Piece], rendered: list[Tensor]) -> None:
        """Write the frames of a batch."""
        for piece, rows in zip(pieces, rendered, strict=True):
            writer = self._writers.get(piece.shot)
            if writer is None:
                continue  # failed meanwhile
            written = attempt(writer.write, piece, rows)
            if isinstance(written, Failed):
                self.fail(piece.shot, written)
            elif piece.frames.stop == piece.shot.frames.stop:
                self._ending.append((writer, self._finisher.submit(attempt, writer.finish)))
                del self._writers[piece.shot]  # not before: Ctrl-C may come, and it is to be abandoned
                self._wait_for_the_encoders()

    def _wait_for_the_encoders(self) -> None:
        """Wait until memory has room for the frames of the next part: they may come faster than they are encoded. With
        NVENC, whose sessions drivers cap, until no more than one part is being finished."""
        while True:
            ending = [(writer, answer) for writer, answer in self._ending if not answer.done]
            if len(ending) <= 1:
                return
            if not ending[-1][0].on_nvenc and sum(writer.bytes for writer, _ in ending) <= room_for_frames():
                return
            ending[0][1].wait()

    def fail(self, shot: Shot, failed: Failed) -> None:
        """Give up a shot."""
        shot.cancelled = True
        writer = self._writers.pop(shot, None)
        if writer is not None:
            writer.abandon()
            self._failed.append(Outcome(writer.part, failed))

    def outcomes(self, *, wait: bool = False) -> Iterator[Outcome]:
        """The parts that are finished or failed by now; with ``wait``, all that are being finished."""
        while self._failed:
            yield self._failed.popleft()
        while self._ending and (wait or self._ending[0][1].done):
            writer, answer = self._ending.popleft()
            yield Outcome(writer.part, answer.result())


class _PartWriter:
    """A part on its way into its file.

    Attributes:
        bytes: size of all its frames together.
        on_nvenc: whether NVENC encodes them.
    """

    def __init__(self, part: Part, residents: Residents) -> None:
        job = part.job
        self.part = part
        self._began = time.perf_counter()
        speech = SpeechFeatures(part.features, job.mode, check=False)  # whoever cut the clip has checked them
        size = residents.size(job.template)
        make_folder(part.path.parent)
        self._video = VideoWriter(
            part.path,
            width=size.width,
            height=size.height,
            fps=job.frame_rate,
            codec=job.codec,
            crf=job.crf,
            segmented=True,
            preset=job.preset,
            device=residents.device,
        )
        try:
            self.bytes = len(part.frames) * self._video.picture.frame_bytes
            self.on_nvenc = self._video.encoder.endswith("_nvenc")
            generator, avatar = residents.get(job, self._video.pixel_format)
            self._engine = generator.unet_model.engine.name
            self.shot = generator.shot(
                avatar, speech, start_frame=job.start_frame, fps=job.frame_rate, frames=part.frames
            )
            self._device = str(residents.device)
        except BaseException:
            self.abandon()
            raise

    def write(self, piece: Piece, rows: Tensor) -> None:
        """Write the frames of a piece from its rendered rows."""
        for frames in piece.frames_from_rows(rows, len(rows)):
            self._video.write(frames)

    def finish(self) -> dict[str, Any]:
        """Finish the file and record it; returns its facts."""
        with self._video:
            pass  # leaving it finishes the file
        facts = {
            "frames": self._video.frames,
            "seconds": round(time.perf_counter() - self._began, 3),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "device": self._device,
            "engine": self._engine,
            "codec": self._video.encoder,
        }
        write_record(self.part.path, self.part.inputs, facts)
        return facts

    def abandon(self) -> None:
        """Delete what was written."""
        with contextlib.suppress(_Abandoned), self._video:
            raise _Abandoned


class _Abandoned(Exception):
    """Raised to leave a video without finishing it."""


class Joined(NamedTuple):
    """A whole video: its frames, the seconds of its sound, its checksum, and the seconds that it took."""

    frames: int
    sound_seconds: float | None
    checksum: str
    seconds: float


def join_parts(job: Job, parts: list[Part], path: Path, stop: threading.Event | None = None) -> Joined:
    """Join a job's parts, with its sound; ``stop`` as :func:`~gpupipe.video.join.join_videos` takes it."""
    start = time.perf_counter()
    video = join_videos([part.path for part in parts], path, sound=job.audio, stop=stop)
    return Joined(*video, file_hash(path), round(time.perf_counter() - start, 3))


def _halves(pieces: list[Piece]) -> list[list[Piece]]:
    """A batch in two, or as it is if it has one row."""
    if len(pieces) == 1:
        return [[half] for half in pieces[0].halves()]
    middle = len(pieces) // 2
    return [pieces[:middle], pieces[middle:]]
