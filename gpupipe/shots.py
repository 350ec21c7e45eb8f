"""Batches of frames of one clip or of many: what is rendered together, and which clip each frame belongs to.

    shot A ████████████████▌      batch 0 │ AAAAAAAA
    shot B ▐█████                 batch 1 │ AAAAAAAA
    shot C ▐█████████             batch 2 │ ABBBBBCC   the same network: no batch is left half empty

A shot is a run of frames of one clip; a piece is what one batch takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.avatar import Avatar, render_together
from gpupipe.features import SpeechFeatures
from gpupipe.lanes import map_in_lanes
from gpupipe.schedule import Resampling, template_indices
from gpupipe.transfer import to_device

Result = TypeVar("Result")


@dataclass(eq=False)
class Shot:
    """Consecutive frames of one clip, to be rendered.

    Args:
        avatar: what renders them.
        speech: the features of the whole clip.
        timing: which row of the features each video frame shows.
        start_frame: first template frame of the clip's walk there and back.
        frames: the video frames, by their numbers in the clip.

    Attributes:
        cancelled: set it when the remaining frames are not wanted any more.

    Raises:
        InputError: ``start_frame`` outside the template.
    """

    avatar: Avatar
    speech: SpeechFeatures
    timing: Resampling
    start_frame: int
    frames: range
    cancelled: bool = False

    def __post_init__(self) -> None:
        template_indices(0, 1, self.avatar.template.length, self.start_frame)  # raises now, not at the first frame

    def piece(self, start: int, limit: int) -> Piece:
        """Return the piece from frame ``start`` on that shows at most ``limit`` rows."""
        return self.piece_of(range(start, min(self.timing.reach(start, limit), self.frames.stop)))

    def piece_of(self, frames: range) -> Piece:
        """Return the piece of these frames."""
        rows, row_of_frame = np.unique(self.timing.rows(frames.start, frames.stop), return_inverse=True)
        return Piece(self, frames, rows, row_of_frame)


@dataclass(eq=False)
class Piece:
    """Frames of a shot in one batch: each row that they show is rendered once.

    Attributes:
        shot: the shot that they belong to.
        frames: their numbers in the clip.
        rows: int64, the distinct rows of features, ascending.
        row_of_frame: int64, for each frame the index in ``rows`` of the row that it shows.
    """

    shot: Shot
    frames: range
    rows: NDArray[np.int64]
    row_of_frame: NDArray[np.int64]

    def template_frames(self) -> NDArray[np.int64]:
        """The template frame of each row, int64."""
        first, last = int(self.rows[0]), int(self.rows[-1]) + 1
        walk = template_indices(first, last, self.shot.avatar.template.length, self.shot.start_frame)
        return walk[self.rows - first]

    def windows(self) -> Tensor:
        """The window of each row: float32 (rows, *audio_shape), on the avatar's device."""
        first, last, speech = int(self.rows[0]), int(self.rows[-1]) + 1, self.shot.speech
        device = self.shot.avatar.template.device
        if last - first == len(self.rows):
            return speech.windows(first, last, device=device)
        return torch.cat([speech.windows(row, row + 1, device=device) for row in self.rows.tolist()])

    def halves(self) -> list[Piece]:
        """Split the piece in two; one that shows a single row is returned as it is."""
        if len(self.rows) == 1:
            return [self]
        first = self.shot.piece(self.frames.start, len(self.rows) // 2)
        return [first, self.shot.piece_of(range(first.frames.stop, self.frames.stop))]

    def frames_from_rows(self, rendered: Tensor, limit: int) -> Iterator[Tensor]:
        """Yield the frames of the piece, at most ``limit`` at a time, from its rendered rows."""
        if len(self.frames) == len(rendered):
            yield rendered
            return
        for index in to_device(torch.from_numpy(self.row_of_frame), rendered.device).split(limit):
            yield rendered.index_select(0, index)


def fill_batches(shots: Iterable[Shot], size: Callable[[], int]) -> Iterator[list[Piece]]:
    """Yield batches of ``size()`` rows each, across the boundaries of shots whose avatars share an engine.

    A batch is smaller only where the engine changes, and at the end. Shots are taken one at a time, when there is room
    for them.
    """
    batch: list[Piece] = []
    room = size()
    for shot in shots:
        if batch and shot.avatar.engine is not batch[-1].shot.avatar.engine:
            yield batch
            batch, room = [], size()
        start = shot.frames.start
        while start < shot.frames.stop and not shot.cancelled:
            batch.append(shot.piece(start, room))
            start = batch[-1].frames.stop
            room -= len(batch[-1].rows)
            if room == 0:
                yield batch
                batch, room = [], size()
    if batch:
        yield batch


def render_batch(pieces: list[Piece]) -> list[Tensor]:
    """Return the rendered rows of each piece, as :meth:`gpupipe.avatar.Avatar.render` returns them."""
    by_avatar: dict[Avatar, list[Piece]] = {}
    for piece in pieces:
        by_avatar.setdefault(piece.shot.avatar, []).append(piece)
    requests = [
        (avatar, np.concatenate([p.template_frames() for p in its]), torch.cat([p.windows() for p in its]))
        for avatar, its in by_avatar.items()
    ]
    rendered: dict[Piece, Tensor] = {}
    for its, frames in zip(by_avatar.values(), render_together(requests), strict=True):
        rendered |= zip(its, frames.split([len(piece.rows) for piece in its]), strict=True)
    return [rendered[piece] for piece in pieces]


def map_batches(
    function: Callable[[list[Piece]], Result], batches: Iterable[list[Piece]], device: torch.device
) -> Iterator[Result]:
    """``map``, which renders batches side by side on a CPU. A GPU's work is queued anyway: more threads would only get
    in each other's way."""
    return map_in_lanes(function, batches) if device.type == "cpu" else map(function, batches)
