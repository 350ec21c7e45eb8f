"""Negative controls of the simulated GPU: mistakes in using a GPU, each of which it must detect.

Run by ``tests/test_simulated_gpu.py``. On a real GPU such mistakes show only now and then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import operators
import pytest
import torch
from test_video_ways import luma_of, read_late

from gpupipe.graphs import capture
from gpupipe.video.encode import VideoWriter

SIZE = (256, 128)


def written(path: Path) -> np.ndarray:
    """Luma of a clip whose frames are computed, written and overwritten on the device, a batch at a time."""
    with VideoWriter(path, width=SIZE[0], height=SIZE[1], codec="ffv1", device="cuda") as writer:
        for batch in range(16):
            levels = torch.arange(3 * batch, 3 * batch + 3, device="cuda") * 4 + 20
            frames = levels.to(torch.uint8)[:, None, None].expand(3, SIZE[1] * 3 // 2, SIZE[0]) * 1
            writer.write(frames)
            del frames
            torch.full((3, SIZE[1] * 3 // 2, SIZE[0]), 255, dtype=torch.uint8, device="cuda")
    return luma_of(path)


def test_nothing_forgotten(tmp_path: Path) -> None:
    assert written(tmp_path / "clip.mkv").tolist() == list(range(20, 212, 4))


@pytest.mark.parametrize(
    ("forgotten", "instead"),
    [
        ("torch.cuda.Stream.wait_stream", lambda self, other: None),
        ("torch.cuda.Event.synchronize", lambda self: None),
        ("torch.Tensor.record_stream", lambda self, stream: None),
    ],
    ids=["the copy waits for the frames", "the encoder waits for the copy", "memory is kept for the copy"],
)
def test_a_forgotten_wait_is_seen(
    forgotten: str, instead: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten, instead)
    assert written(tmp_path / "clip.mkv").tolist() != list(range(20, 212, 4))


def test_nvenc_reads_no_surface_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait runs other streams first or not, by chance: a clip may come out right all the same, but not ten."""
    monkeypatch.setattr("torch.cuda.Stream.synchronize", lambda self: None)
    assert not all(read_late(tmp_path / f"{number}.mp4", monkeypatch) for number in range(10))


def test_pinned_memory_that_is_written_too_early() -> None:
    host = torch.ones(4).pin_memory()
    there = host.to("cuda", non_blocking=True)
    host.zero_()
    assert there.tolist() == [0, 0, 0, 0]


def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_a_kernel_of_torch_s_own_is_refused() -> None:
    with torch.utils._python_dispatch._disable_current_modes(), pytest.raises(RuntimeError, match="torch's own"):
        torch.ones(3, device="cuda")


# ── graphs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_graph_runs_when_it_is_replayed() -> None:
    given = torch.ones(3, device="cuda")
    replay, output = capture(lambda: given * 2)
    given.fill_(5)
    output.zero_()
    assert output.tolist() == [0, 0, 0]
    replay()
    assert output.tolist() == [10, 10, 10]


def test_a_replay_of_what_nobody_keeps_is_an_illegal_access() -> None:
    # Large enough for the allocator to give it memory of its own, which can be given back.
    given, graph = torch.ones(16 << 20, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given[:3] * 2
    del given
    with pytest.raises(AssertionError, match="illegal memory access"), operators.no_failures():
        graph.replay()
    operators.failures.clear()


def test_a_branch_must_join() -> None:
    given, side = torch.ones(3, device="cuda"), torch.cuda.Stream()

    def step(*, joined: bool) -> torch.Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            doubled = given * 2
        if joined:
            torch.cuda.current_stream().wait_stream(side)
        return doubled

    replay, output = capture(lambda: step(joined=True))
    replay()
    assert output.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="unjoined"):
        capture(lambda: step(joined=False))


def test_a_capture_does_not_wait_for_what_is_outside() -> None:
    given, other = torch.ones(3, device="cuda"), torch.cuda.Stream()

    def step() -> torch.Tensor:
        torch.cuda.current_stream().wait_event(other.record_event())
        return given * 2

    with pytest.raises(RuntimeError):
        capture(step)


@pytest.mark.parametrize("how", ["copied from the host", "a mask", "a value"])
def test_what_cannot_be_captured(how: str) -> None:
    given = torch.arange(3.0, device="cuda")
    steps = {
        "copied from the host": lambda: given + torch.ones(3).to("cuda"),
        "a mask": lambda: given[given > 1],
        "a value": lambda: given * given.sum().item(),
    }
    with pytest.raises(RuntimeError):
        capture(steps[how])
