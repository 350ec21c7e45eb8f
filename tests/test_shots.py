"""Batches across clips: they are full, and each clip's frames are the same as rendered alone."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpupipe import FrameGenerator, InputError, SpeechFeatures, Template, UNetModel
from gpupipe.avatar import Avatar
from gpupipe.schedule import Resampling
from gpupipe.shots import Piece, Shot, fill_batches, render_batch

MakeModel = Callable[..., UNetModel]


@pytest.fixture(scope="module")
def faces(make_template: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Template]:
    """Two templates of different sizes and lengths."""
    folder = tmp_path_factory.mktemp("faces")
    sizes = ((96, 64), (128, 96))
    return [
        Template.from_directory(make_template(folder / str(n), frames=4 + n, size=size, seed=n))
        for n, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def generator(tiny_model: MakeModel) -> FrameGenerator:
    return FrameGenerator(tiny_model(engine="eager"), batch_size=4)


def speech(frames: int, seed: int = 0) -> SpeechFeatures:
    return SpeechFeatures(np.random.default_rng(seed).standard_normal((frames, 512)).astype(np.float32))


def shots_of(generator: FrameGenerator, avatars: list[Avatar], fps: float | None = None) -> list[Shot]:
    """Short clips of both faces, one of them starting in its middle."""
    return [
        generator.shot(avatars[0], speech(5, 1), fps=fps),
        generator.shot(avatars[1], speech(4, 2), fps=fps, start_frame=1),
        generator.shot(avatars[0], speech(9, 3), fps=fps, frames=range(4, 9)),
    ]


def test_batches_are_filled_across_clips(generator: FrameGenerator, faces: list[Template]) -> None:
    shots = shots_of(generator, [generator.avatar(face) for face in faces])
    batches = list(fill_batches(shots, lambda: 4))
    assert [sum(len(piece.rows) for piece in batch) for batch in batches] == [4, 4, 4, 2]
    assert [len(batch) for batch in batches] == [1, 2, 2, 1]
    for shot in shots:
        numbers = [n for batch in batches for piece in batch if piece.shot is shot for n in piece.frames]
        assert numbers == list(shot.frames)


@pytest.mark.parametrize("fps", [None, 10.0, 60.0], ids=["rows", "slower", "faster"])
@pytest.mark.parametrize("pixel_format", ["bgr", "nv12"])
def test_mixed_batches_render_what_each_clip_alone_does(
    generator: FrameGenerator, faces: list[Template], fps: float | None, pixel_format: str
) -> None:
    avatars = [generator.avatar(face, pixel_format) for face in faces]  # type: ignore[arg-type]
    shots = shots_of(generator, avatars, fps) if fps is None else [
        generator.shot(avatars[0], speech(5, 1), fps=fps), generator.shot(avatars[1], speech(7, 2), fps=fps)
    ]  # fmt: skip
    together: dict[Shot, list[torch.Tensor]] = {shot: [] for shot in shots}
    mixed = 0
    for pieces in fill_batches(shots, lambda: 4):
        mixed += len({piece.shot.avatar for piece in pieces}) > 1
        for piece, rows in zip(pieces, render_batch(pieces), strict=True):
            together[piece.shot] += list(piece.frames_from_rows(rows, 2))
    assert mixed
    for shot, frames in together.items():
        alone = list(
            generator.stream(
                shot.avatar.template, shot.speech, start_frame=shot.start_frame, pixel_format=pixel_format, fps=fps
            )  # type: ignore[arg-type]
        )
        expected = torch.cat(alone)[shot.frames.start : shot.frames.stop]
        # In batches of another size the network sums in another order: at most a step of 255.
        torch.testing.assert_close(torch.cat(frames).int(), expected.int(), atol=1, rtol=0)


def test_mixed_up_features_within_a_batch_are_noticed(
    generator: FrameGenerator, faces: list[Template], monkeypatch: pytest.MonkeyPatch
) -> None:
    avatars = [generator.avatar(face) for face in faces]
    pieces = [
        generator.shot(avatars[0], speech(2, 1)).piece(0, 2),
        generator.shot(avatars[1], speech(2, 2)).piece(0, 2),
    ]
    right = render_batch(pieces)
    decode = generator.unet_model.engine.decode
    monkeypatch.setattr(
        generator.unet_model.engine, "decode", lambda features, index, audio: decode(features, index.flip(0), audio)
    )
    assert not all(torch.equal(a, b) for a, b in zip(right, render_batch(pieces), strict=True))


@pytest.mark.cuda
def test_mixed_batches_on_the_gpu(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path: Path
) -> None:
    generator = FrameGenerator(UNetModel(tiny_checkpoint(), device="cuda"), batch_size=4)
    there = [
        Template.from_directory(make_template(tmp_path / str(n), frames=4 + n, size=size, seed=n), device="cuda")
        for n, size in enumerate(((96, 64), (128, 96)))
    ]
    shots = shots_of(generator, [generator.avatar(face, "nv12") for face in there])
    together: dict[Shot, list[torch.Tensor]] = {shot: [] for shot in shots}
    for pieces in fill_batches(shots, lambda: 4):
        for piece, rows in zip(pieces, render_batch(pieces), strict=True):
            together[piece.shot].append(rows)
    for shot, frames in together.items():
        alone = list(
            generator.stream(shot.avatar.template, shot.speech, start_frame=shot.start_frame, pixel_format="nv12")
        )
        expected = torch.cat(alone)[shot.frames.start : shot.frames.stop]
        torch.testing.assert_close(torch.cat(frames).int(), expected.int(), atol=3, rtol=0)


def test_another_network_begins_another_batch(
    generator: FrameGenerator, faces: list[Template], tiny_model: MakeModel
) -> None:
    other = FrameGenerator(tiny_model(seed=1, engine="eager"), batch_size=4)
    shots = [generator.shot(generator.avatar(faces[0]), speech(3)), other.shot(other.avatar(faces[0]), speech(3))]
    assert [[len(piece.rows) for piece in batch] for batch in fill_batches(shots, lambda: 4)] == [[3], [3]]


def test_the_rest_of_a_cancelled_shot_is_skipped(generator: FrameGenerator, faces: list[Template]) -> None:
    avatar = generator.avatar(faces[0])
    shots = [generator.shot(avatar, speech(40)), generator.shot(avatar, speech(3))]
    batches = fill_batches(shots, lambda: 4)
    next(batches)
    shots[0].cancelled = True
    assert [piece.shot for batch in batches for piece in batch] == [shots[1]]


@pytest.mark.parametrize("fps", [1, 7, 24, 25, 30, Fraction(30000, 1001), 60, 240])
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_pieces_show_every_frame_once(fps: float, limit: int) -> None:
    class Face:
        length = 3

    class Someone:
        template = Face()

    sound = speech(37)
    shot = Shot(Someone(), sound, sound.timing(fps), 0, range(sound.timing(fps).frames))  # type: ignore[arg-type]
    start, seen = 0, []
    while start < shot.frames.stop:
        piece = shot.piece(start, limit)
        assert 0 < len(piece.rows) <= limit
        for part in (piece, *piece.halves()):
            assert part.frames
            expected = shot.timing.rows(part.frames.start, part.frames.stop)
            np.testing.assert_array_equal(part.rows[part.row_of_frame], expected)
        assert [n for half in piece.halves() for n in half.frames] == list(piece.frames)
        seen += list(piece.frames)
        start = piece.frames.stop
    assert seen == list(shot.frames)


def test_a_piece_ends_with_its_shot(generator: FrameGenerator, faces: list[Template]) -> None:
    """Though the clip goes on."""
    avatar = generator.avatar(faces[0])
    for fps in (10, 25, 60):
        assert generator.shot(avatar, speech(9), fps=fps, frames=range(1, 3)).piece(1, 64).frames == range(1, 3)


def test_no_more_frames_at_once_than_asked_for() -> None:
    piece = Piece(Shot.__new__(Shot), range(7), np.arange(3), np.array([0, 0, 0, 1, 1, 2, 2]))
    parts = list(piece.frames_from_rows(torch.tensor([10, 20, 30]), 3))
    assert [part.tolist() for part in parts] == [[10, 10, 10], [20, 20, 30], [30]]


def test_a_shot_that_starts_outside_its_template(generator: FrameGenerator, faces: list[Template]) -> None:
    sound = speech(3)
    with pytest.raises(InputError, match=r"^start frame is 4; expected 0 to 3"):
        Shot(generator.avatar(faces[0]), sound, sound.timing(25), 4, range(3))


def test_reach_is_the_most_frames_that_so_many_rows_show() -> None:
    for fps in (10, 25, 60):
        timing = Resampling(50, Fraction(25), Fraction(fps))
        for start in range(timing.frames):
            stop = timing.reach(start, 4)
            assert len(np.unique(timing.rows(start, stop))) <= 4
            assert stop == timing.frames or len(np.unique(timing.rows(start, stop + 1))) == 5


def test_pieces_have_windows_of_their_rows() -> None:
    sound = speech(20)
    avatar: Any = SimpleNamespace(template=SimpleNamespace(device=torch.device("cpu")))
    shot = Shot.__new__(Shot)
    shot.avatar, shot.speech = avatar, sound
    piece = Piece(shot, range(3), np.array([2, 5, 9]), np.arange(3))
    torch.testing.assert_close(piece.windows(), sound.windows(0, 20)[[2, 5, 9]])
