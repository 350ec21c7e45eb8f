"""CUDA graphs and streams: what is around a capture is tested anywhere, the capture itself on a GPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from gpupipe import graphs
from gpupipe.graphs import GraphedStep

CUDA = torch.device("cuda")


def test_a_replay_waits_for_the_one_before_it_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because both replays use the same memory."""
    said: list[str] = []
    streams = [SimpleNamespace(wait_stream=lambda other, k=k: said.append(f"{k} waits")) for k in range(2)]
    graph: Any = SimpleNamespace(replay=lambda: said.append("replay"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    replay = graphs._Captured(graphs._Memory(), graph, step=object)
    for k in (0, 0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda k=k: streams[k])
        replay()
    assert said == ["replay", "replay", "1 waits", "replay", "0 waits", "replay"]


def test_inputs_are_overwritten_after_the_replay_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another stream than that replay's."""
    said: list[str] = []
    streams = [SimpleNamespace(wait_stream=lambda other, k=k: said.append(f"{k} waits")) for k in range(2)]
    graph: Any = SimpleNamespace(replay=lambda: said.append("replay"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
    memory = graphs._Memory()
    monkeypatch.setattr(graphs, "capture", lambda step: (graphs._Captured(memory, graph, step), torch.zeros(2)))
    step = GraphedStep(lambda values: values, torch.zeros(2))
    copy = MagicMock(side_effect=lambda given: said.append("copy"))
    step._inputs = [MagicMock(**{"__getitem__.return_value.copy_": copy})]
    for k in range(2):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda k=k: streams[k])
        step(torch.ones(2))
    assert said == ["copy", "replay", "1 waits", "copy", "replay"]


def test_a_capture_begins_after_what_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs were copied on the current stream: an index that is not there yet may be any number."""
    cuda, said = MagicMock(**{"current_device.return_value": 0}), []
    monkeypatch.setattr(torch, "cuda", cuda)
    side = MagicMock(**{"wait_stream.side_effect": said.append})
    monkeypatch.setattr(graphs, "own_stream", lambda device, use: side)
    graphs.capture(lambda: said.append("step"))
    assert said == [cuda.current_stream.return_value, "step", "step"]


def test_what_a_branch_made_is_kept_until_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch's next work would be given its memory."""
    cuda, result = MagicMock(), MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(graphs, "own_stream", MagicMock())
    with graphs.on_side_stream(CUDA) as join:
        pass
    join(result)
    result.record_stream.assert_called_once_with(cuda.current_stream.return_value)


def test_a_replay_keeps_what_the_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory would be given away, and is still read."""
    monkeypatch.setattr(torch, "cuda", MagicMock(**{"current_device.return_value": 0}))
    monkeypatch.setattr(graphs, "own_stream", MagicMock())
    values = torch.ones(3)
    there = weakref.ref(values)
    run = graphs.replayed(lambda values=values: values * 2)
    del values
    assert there() is not None
    del run
    assert there() is None


def test_a_thread_takes_a_stream_for_each_use_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch deals out the same 32 again and again: the render thread's would come to another use's turn."""
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    graphs._stream.cache_clear()
    first, second, other = (torch.device("cuda", 7), torch.device("cuda", 7), torch.device("cuda", 8))
    mine = [graphs.own_stream(device, use) for device in (first, second, other) for use in ("copy", "branch") * 20]
    with ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(graphs.own_stream, first, "copy").result()
    graphs._stream.cache_clear()
    assert len(set(mine)) == 4
    assert theirs not in mine
    assert len(made) == 5


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.cuda
def test_waiting_for_the_device_cannot_be_captured() -> None:
    values = torch.ones(3, device=CUDA)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: values * values.sum().item())
    assert torch.cuda.current_stream() == stream, "what is launched next must not go to the capture's stream"
    drawn = torch.empty(64, device=CUDA).uniform_()
    assert 0.1 < drawn.mean().item() < 0.9, "random numbers are drawn as before"


@pytest.mark.cuda
def test_a_graph_whose_capture_failed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 asks it at each later request for pinned memory, which is not to read freed memory then."""
    new, made = torch.cuda.CUDAGraph, []

    def recorded() -> torch.cuda.CUDAGraph:
        graph = new()
        made.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", recorded)
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: torch.ones(3, device=CUDA).sum().item())
    gc.collect()
    assert made[0]() is not None


@pytest.mark.cuda
@pytest.mark.parametrize("joined", [True, False], ids=["waited", "branch left open"])
def test_a_capture_that_failed_keeps_no_memory(joined: bool) -> None:
    """Nor does what is used on two streams after it, as the background is."""
    megabyte = 1 << 20

    def on_two_streams() -> Tensor:
        with graphs.on_side_stream(CUDA) as join:
            made = torch.ones(16 * megabyte, dtype=torch.uint8, device=CUDA)
            if not joined and torch.cuda.is_current_stream_capturing():
                raise torch.OutOfMemoryError("no memory for the rest")
        join(made)
        return made

    def step() -> Tensor:
        made = on_two_streams()
        return made * made.sum().item()

    def held() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = held()
    with pytest.raises(RuntimeError) as failed:
        graphs.capture(step)
    del failed  # the error's traceback keeps the step's tensors alive
    for _ in range(3):
        on_two_streams()
    assert held() - before < 16 * megabyte


@pytest.mark.cuda
def test_a_replay_reads_what_nobody_else_keeps() -> None:
    def capture() -> tuple[Callable[[], None], Tensor]:
        values = torch.full((32 << 20,), 3.0, device=CUDA)
        return graphs.capture(lambda: values[:3] * 2)

    replay, output = capture()
    torch.cuda.empty_cache()
    others = torch.zeros(32 << 20, device=CUDA)
    replay()
    assert output.tolist() == [6, 6, 6]
    assert not others.any()


def branched(values: Tensor) -> Tensor:
    with graphs.on_side_stream(values.device) as join:
        more = values + 1
    join(more)
    return more * 2


@pytest.mark.cuda
def test_what_another_thread_does_is_not_captured() -> None:
    mine, other = torch.ones(3, device=CUDA), torch.full((3,), 5.0, device=CUDA)
    found = []
    with ThreadPoolExecutor(1) as thread:

        def step() -> Tensor:
            done = branched(mine)
            found.append(thread.submit(branched, other).result())
            return done

        replay, output = graphs.capture(step)
        other.fill_(7.0)
        replay()
    assert output.tolist() == [4, 4, 4]
    assert [one.tolist() for one in found] == [[12, 12, 12]] * 2


@pytest.mark.cuda
def test_graphs_share_their_memory() -> None:
    """A farm captures a step for each face."""
    size = 16 << 20

    def step(values: Tensor, level: int) -> Tensor:
        with graphs.on_side_stream(CUDA) as join:
            background = torch.zeros(size, device=CUDA)
        wide = values.sum() * torch.ones(4 * size, device=CUDA)
        join(background)
        return values * level + wide[:3] + background[:3]

    values, made, held = torch.ones(3, device=CUDA), [], []
    for level in range(3):
        made.append(GraphedStep(functools.partial(step, level=level), values))
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[2] - held[0] < size
    assert [made[level](values).tolist() for level in (2, 0, 1, 2)] == [[level + 3.0] * 3 for level in (2, 0, 1, 2)]
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: values * values.sum().item())
    assert made[1](values).tolist() == [4, 4, 4], "one that fails takes nothing from the others"
    made.append(GraphedStep(functools.partial(step, level=3), values))
    assert [one(values)[0].item() for one in made] == [3, 4, 5, 6]
    del made[:]
    assert GraphedStep(functools.partial(step, level=4), values)(values).tolist() == [7, 7, 7]


def test_what_cannot_be_captured_is_timed_launched_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(step: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    def step() -> int:
        return 7

    monkeypatch.setattr(graphs, "capture", refuse)
    assert graphs.replayed(step) is step
    assert caplog.messages[0].endswith("kernel by kernel (operation not permitted when stream is capturing)")
    monkeypatch.setattr(graphs, "capture", lambda step: (lambda: 2 * step(), None))
    assert graphs.replayed(step)() == 14
    assert len(caplog.messages) == 1


@pytest.mark.cuda
def test_two_threads_may_capture_at_once() -> None:
    """One after the other, though both would begin at once."""
    both = threading.Barrier(2, timeout=60)

    def captured(level: float) -> list[float]:
        values, runs = torch.full((3,), level, device=CUDA), []

        def step() -> Tensor:
            runs.append(1)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(None if len(runs) == 1 else 0.5)
            return branched(values)

        replay, output = graphs.capture(step)
        replay()
        return output.tolist()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(captured, (1.0, 2.0))) == [[4, 4, 4], [6, 6, 6]]
