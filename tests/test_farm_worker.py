"""Parts that come to their end beside the rendering, and batches that fail."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpupipe.farm.worker import Worker, _OpenParts, join_parts
from gpupipe.video.encode import VideoWriter
from gpupipe.video.join import Stopped


class Shot:
    frames = range(3)


class Writer:
    """In place of a part's: its end takes longer than its frames."""

    def __init__(self, part: Any, residents: Any) -> None:
        self.part, self.bytes, self.on_nvenc = part, part.bytes, part.on_nvenc
        self.shot = Shot()

    def write(self, piece: Any, rows: Any) -> None:
        pass

    def finish(self) -> dict[str, Any]:
        time.sleep(0.02)
        return {}


@pytest.mark.parametrize(
    ("size", "on_nvenc", "most"),
    [(10, False, 10), (30, False, 3), (1000, False, 1), (10, True, 1)],
    ids=["all fit", "three fit", "not one fits", "sessions of NVENC"],
)
def test_frames_that_wait_for_encoders_are_bounded(
    size: int, on_nvenc: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts there are: a GPU without NVENC may render faster than its machine encodes."""
    monkeypatch.setattr("gpupipe.farm.worker._PartWriter", Writer)
    monkeypatch.setattr("gpupipe.farm.worker.room_for_frames", lambda: 100)
    parts: list[Any] = [SimpleNamespace(bytes=size, on_nvenc=on_nvenc) for _ in range(12)]
    waiting = []
    with _OpenParts(SimpleNamespace()) as open_parts:  # type: ignore[arg-type]
        for shot in open_parts.shots(parts):
            piece: Any = SimpleNamespace(shot=shot, frames=shot.frames)
            open_parts.write([piece], [None])  # type: ignore[list-item]
            waiting.append(sum(not answer.done for _, answer in open_parts._ending))
        assert [outcome.part for outcome in open_parts.outcomes(wait=True)] == parts
    assert most // 2 < max(waiting) <= most


def test_parts_that_are_not_finished_are_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose turn to be finished has not come, too; the one under way is finished."""
    begun, ends = threading.Event(), threading.Event()
    left: list[str] = []

    class Waiting(Writer):
        def finish(self) -> dict[str, Any]:
            begun.set()
            assert ends.wait(10)
            left.append(f"{self.part.name} whole")
            return {}

        def abandon(self) -> None:
            left.append(f"{self.part.name} abandoned")

    monkeypatch.setattr("gpupipe.farm.worker._PartWriter", Waiting)
    monkeypatch.setattr("gpupipe.farm.worker.room_for_frames", lambda: 100)
    parts: list[Any] = [SimpleNamespace(name=name, bytes=1, on_nvenc=False) for name in "abcd"]
    with pytest.raises(KeyboardInterrupt), _OpenParts(SimpleNamespace()) as open_parts:  # type: ignore[arg-type]
        *shots, _ = open_parts.shots(parts)
        for shot in shots:
            piece: Any = SimpleNamespace(shot=shot, frames=shot.frames)
            open_parts.write([piece], [None])  # type: ignore[list-item]
        assert begun.wait(10)
        join = threading.Thread.join  # which comes when the others have been dropped
        monkeypatch.setattr(threading.Thread, "join", lambda thread: (ends.set(), join(thread)))
        raise KeyboardInterrupt
    assert sorted(left) == ["a whole", "b abandoned", "c abandoned", "d abandoned"]


@pytest.fixture
def worker() -> Worker:
    return Worker(SimpleNamespace(device=torch.device("cpu")), batch_size=2)  # type: ignore[arg-type]


def test_a_batch_from_before_the_last_halving_does_not_undo_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another lane had begun it."""
    written: list[Any] = []
    monkeypatch.setattr(worker, "_try_batch", lambda some: (some, []))
    pieces: list[Any] = [SimpleNamespace(rows=range(8), shot=SimpleNamespace(cancelled=False)) for _ in range(2)]
    opened: Any = SimpleNamespace(write=lambda some, rendered: written.append(some))
    worker._retry(pieces, torch.OutOfMemoryError("out of memory"), opened)
    assert worker.batch_size == 2
    assert written == [pieces[:1], pieces[1:]]


def test_a_failed_batch_is_tried_again_without_what_is_cancelled(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(worker, "_try_batch", lambda some: (tried.append(some), (some, []))[1])
    pieces: list[Any] = [SimpleNamespace(rows=range(2), shot=SimpleNamespace(cancelled=gone)) for gone in (True, False)]
    opened: Any = SimpleNamespace(write=lambda some, rendered: None)
    worker._retry(pieces, RuntimeError("once"), opened)
    assert tried == [pieces[1:]]


def test_a_join_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    """It may have hours of video before it."""
    part: Any = SimpleNamespace(path=tmp_path / "0.mp4")
    with VideoWriter(part.path, width=64, height=48, fps=25, codec="libx264", segmented=True) as video:
        video.write(torch.zeros(3, 48, 64, 3, dtype=torch.uint8))
    job: Any = SimpleNamespace(audio=None)
    stop = threading.Event()
    assert join_parts(job, [part], tmp_path / "whole.mp4", stop).frames == 3
    stop.set()
    with pytest.raises(Stopped):
        join_parts(job, [part], tmp_path / "stopped.mp4", stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.mp4", "whole.mp4"]
