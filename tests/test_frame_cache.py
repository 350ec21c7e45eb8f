"""The cache of what is computed from template frames: the same results under any budget, and no work done twice."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from clips import cached
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.frame_cache import FrameCache
from gpupipe.schedule import template_indices

CPU = torch.device("cpu")
LENGTH = 9
FRAME_BYTES = 4 * 6 + 5
"""Size of what :class:`Recorder` makes of one frame."""


class Recorder:
    """Computes two tensors of different shapes and dtypes for each frame, and records which frames it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, frames: NDArray[np.int64]) -> dict[str, Tensor]:
        self.calls.append(frames.tolist())
        assert len(set(self.calls[-1])) == len(frames) > 0
        numbers = torch.from_numpy(frames)
        return {
            "features": (100 * numbers[:, None] + torch.arange(6)).float().view(-1, 2, 3),
            "keep": numbers[:, None].to(torch.uint8) + torch.arange(5, dtype=torch.uint8),
        }

    @property
    def computed(self) -> list[int]:
        return [frame for call in self.calls for frame in call]


def cache(budget: int) -> tuple[FrameCache, Recorder]:
    recorder = Recorder()
    return FrameCache(LENGTH, recorder, budget=budget, device=CPU), recorder


def assert_right(cache: FrameCache, frames: Sequence[int] | NDArray[np.int64]) -> None:
    expected = Recorder()
    found = cached(cache, frames)
    assert found.keys() == {"features", "keep"}
    for row, frame in enumerate(frames):
        for name, value in expected(np.array([frame])).items():
            assert torch.equal(found[name][row], value[0]), f"{name} of frame {frame}"


def test_lookups_work_after_a_failed_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fails is tried again with half its frames, once something else has freed memory."""
    new_empty, tried = Tensor.new_empty, []

    def refuse_once(value: Tensor, *size: int) -> Tensor:
        tried.append(size)
        if len(tried) == 2:  # of the second tensor
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_empty(value, *size)

    some, recorder = cache(LENGTH * FRAME_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", refuse_once)
        with pytest.raises(torch.OutOfMemoryError):
            some.lookup([1, 2, 3, 4])
        assert_right(some, [1, 2])
    assert_right(some, [2, 1, 2])
    assert recorder.computed == [1, 2, 3, 4, 1, 2]


BUDGETS = [0, FRAME_BYTES - 1, FRAME_BYTES, 4 * FRAME_BYTES + 3, LENGTH * FRAME_BYTES, 10**9]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("batch", [1, 4, 7, 20])
def test_walk_gives_the_same_under_any_budget(budget: int, batch: int) -> None:
    frames, _ = cache(budget)
    for start in range(0, 60, batch):
        assert_right(frames, template_indices(start, start + batch, LENGTH))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_repeats(budget: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames, _ = cache(budget)
    for _ in range(20):
        assert_right(frames, rng.integers(LENGTH, size=rng.integers(1, 12)))


def test_nothing_is_computed_twice_when_all_fit() -> None:
    frames, recorder = cache(LENGTH * FRAME_BYTES)
    for start in range(0, 80, 3):
        frames.lookup(template_indices(start, start + 3, LENGTH))
    assert sorted(recorder.computed) == list(range(LENGTH))


def test_frames_that_fit_are_computed_once_and_the_others_each_time() -> None:
    frames, recorder = cache(4 * FRAME_BYTES)
    for _ in range(3):
        frames.lookup(range(LENGTH))
    counts = [recorder.computed.count(frame) for frame in range(LENGTH)]
    assert counts == [1] * 4 + [3] * 5


def test_a_frame_asked_for_twice_in_a_batch_is_computed_once() -> None:
    frames, recorder = cache(0)
    frames.lookup([5, 5, 2, 5])
    assert recorder.calls == [[2, 5]]


def test_bank_is_not_copied_when_all_fit() -> None:
    frames, _ = cache(10**9)
    bank, _ = frames.lookup(range(LENGTH))
    again, index = frames.lookup([3, 1, 3])
    assert all(again[name].data_ptr() == bank[name].data_ptr() for name in bank)
    assert index.tolist() == [3, 1, 3]
    assert index.dtype == torch.int64


@pytest.mark.parametrize(
    ("budget", "capacity"),
    [(-5, 0), (0, 0), (FRAME_BYTES - 1, 0), (2 * FRAME_BYTES, 2), (3 * FRAME_BYTES - 1, 2), (10**9, LENGTH)],
)
def test_memory_stays_within_the_budget(budget: int, capacity: int) -> None:
    frames, _ = cache(budget)
    frames.lookup([8, 0])
    assert frames.capacity == capacity
    assert frames.bytes_used == capacity * FRAME_BYTES <= max(0, budget)
    for frame in range(LENGTH):
        frames.lookup([frame])
    assert frames.bytes_used == capacity * FRAME_BYTES


def test_results_stay_when_others_are_computed() -> None:
    """What a lookup returned is not overwritten by the next one."""
    for budget in (0, 3 * FRAME_BYTES, 10**9):
        frames, _ = cache(budget)
        first, index = frames.lookup([1, 2])
        before = {name: value.index_select(0, index).clone() for name, value in first.items()}
        frames.lookup(range(LENGTH))
        assert all(torch.equal(first[name].index_select(0, index), before[name]) for name in before)


def test_failed_computation_leaves_the_cache_as_it_was() -> None:
    recorder = Recorder()
    broken = True

    def compute(frames: NDArray[np.int64]) -> dict[str, Tensor]:
        if broken:
            raise RuntimeError("decoder")
        return recorder(frames)

    frames = FrameCache(LENGTH, compute, budget=10**9, device=CPU)
    with pytest.raises(RuntimeError, match="decoder"):
        frames.lookup([0, 1])
    broken = False
    assert_right(frames, [1, 0])


@pytest.mark.parametrize("batch", [1, 4, 20])
@pytest.mark.parametrize("budget", [0, 2 * FRAME_BYTES, 10**9])
def test_only_what_is_cacheable_is_kept(budget: int, batch: int) -> None:
    recorder = Recorder()
    cacheable = np.arange(LENGTH) % 3 == 1  # 1, 4 and 7
    frames = FrameCache(LENGTH, recorder, budget=budget, device=CPU, cacheable=cacheable)
    for start in range(0, 40, batch):
        assert_right(frames, template_indices(start, start + batch, LENGTH))
    kept = np.flatnonzero(frames._slot >= 0).tolist()
    assert set(kept) <= {1, 4, 7}
    assert len(kept) == frames.capacity == min(3, budget // FRAME_BYTES)
    assert all(recorder.computed.count(frame) == 1 for frame in kept)
    for asked in (kept, [*kept, 2]):
        assert frames.owns(frames.lookup(asked)[0]) == (asked == kept)


def test_what_is_not_kept_is_not_copied() -> None:
    made = torch.arange(3.0)[:, None]
    frames = FrameCache(LENGTH, lambda frames: {"made": made}, budget=0, device=CPU)
    found, index = frames.lookup([4, 2, 3, 2])
    assert found["made"] is made
    assert index.tolist() == [2, 0, 1, 0]


# ── several threads ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", [0, 4 * FRAME_BYTES + 3, LENGTH * FRAME_BYTES])
def test_threads_may_ask_at_once(budget: int) -> None:
    """Both compute the same frames at the same time: each must get right results, and no frame may be kept twice."""
    meet = threading.Barrier(2, timeout=10)

    def compute(frames: NDArray[np.int64]) -> dict[str, Tensor]:
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(0.05)
        return Recorder()(frames)

    shared = FrameCache(LENGTH, compute, budget=budget, device=CPU)
    orders = [[0, 1, 2], [2, 1, 3], [4, 5, 6], [6, 4, 7], [8, 0, 3], [8, 8, 5]] * 2
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(functools.partial(assert_right, shared), orders))
    slots = shared._slot[shared._slot >= 0]
    assert len(set(slots)) == len(slots) == min(LENGTH, budget // FRAME_BYTES)


def test_threads_may_ask_first_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's memory is allocated once: what one thread has kept must not be lost to the other's allocation."""
    make_room, meet = Tensor.new_empty, threading.Barrier(2, timeout=10)

    def slow(like: Tensor, *shape: int) -> Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(0.05)
        return make_room(like, *shape)

    monkeypatch.setattr(Tensor, "new_empty", slow)
    shared, _ = cache(10**9)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(shared.lookup, [[0], [1]]))
    assert_right(shared, [0, 1])


def test_nobody_waits_while_another_keeps_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread is stopped copying frame 1 into the bank, another gets any frame, that one included."""
    shared, recorder = cache(10**9)
    shared.lookup([0])
    copying, go_on = threading.Event(), threading.Event()
    index_select = torch.index_select

    def slow(*args: Any, **options: Any) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            copying.set()
            assert go_on.wait(10)
        return index_select(*args, **options)

    monkeypatch.setattr(torch, "index_select", slow)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(shared.lookup, [1])
        assert copying.wait(10)
        for frame in (0, 2, 1):
            found, row = shared.lookup([frame])
            assert found["features"][row].flatten().tolist() == [100 * frame + i for i in range(6)]
        go_on.set()
        first.result()
    assert_right(shared, [2, 0, 1])
    assert recorder.computed.count(1) == 2
    assert sorted(shared._slot[:3].tolist()) == [0, 1, 2]
    shared.lookup(range(LENGTH))
    assert sorted(shared._slot.tolist()) == list(range(LENGTH)), "no place was lost"
