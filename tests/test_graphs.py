"""CUDA graphs: what is around the capture is tested anywhere, the capture itself on a GPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from gpupipe import FrameGenerator, SpeechFeatures, Template, UNetModel, graphs
from gpupipe import avatar as avatar_module
from gpupipe.avatar import Avatar
from gpupipe.engines import make_engine
from gpupipe.fallbacks import fallbacks
from gpupipe.graphs import GraphedStep
from gpupipe.kernels.crop_resize import crop_and_input
from gpupipe.kernels.dispatch import backend
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.kernels.paste_blend import paste_blend

pytestmark = pytest.mark.usefixtures("captured_at_once")

CUDA = torch.device("cuda")
FRAMES_ONLY = 4 * 192 * 128 * 3
"""Memory for a template's four frames, and for nothing that is derived from them."""


def rerun(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As :func:`graphs.capture`: runs the step again, into the same output as a graph would."""
    output = step()

    def replay() -> None:
        output.copy_(step())

    return replay, output


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", rerun)


@pytest.mark.usefixtures("without_gpu")
def test_replays_do_not_overwrite_earlier_batches() -> None:
    graphed = GraphedStep(lambda x, y: x * 10 + y, torch.zeros(4), torch.zeros(4))
    first = graphed(torch.arange(4.0), torch.ones(4))
    second = graphed(torch.arange(2.0), torch.full((2,), 5.0))
    assert first.tolist() == [1, 11, 21, 31], "the second replay must not reach into the first batch"
    assert second.tolist() == [5, 15], "a smaller batch is padded, and what was padded is cut off"


@pytest.mark.usefixtures("without_gpu")
def test_padding_repeats_the_last_sample() -> None:
    seen = []

    def step(x: Tensor) -> Tensor:
        seen.append(x.tolist())
        return x + 0

    GraphedStep(step, torch.tensor([7.0, 8.0, 9.0]))(torch.tensor([1.0, 2.0]))
    assert seen[-1] == [1, 2, 2]


def test_a_replay_waits_for_the_one_before_it_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because both replays use the same memory."""
    said: list[str] = []
    streams = [SimpleNamespace(wait_stream=lambda other, k=k: said.append(f"{k} waits")) for k in range(2)]
    graph: Any = SimpleNamespace(replay=lambda: said.append("replay"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    memory = graphs._Memory()
    for k in (0, 0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda k=k: streams[k])
        memory.replay(graph)
    assert said == ["replay", "replay", "1 waits", "replay", "0 waits", "replay"]


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


@pytest.fixture
def without_gc() -> Iterator[None]:
    """What keeps itself alive stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gpu", "without_gc")
def test_a_step_goes_with_its_last_user(painted: Callable[[str], tuple[Avatar, list[Tensor]]]) -> None:
    """The memory of a GPU is free as soon as nobody wants it any more."""
    one, _ = painted("cpu")
    one._capture_below = math.inf
    replayed(one, *batches(one.template)[0])
    there = weakref.ref(one), weakref.ref(one._graphed)
    assert there[1]() is not None
    del one
    assert [gone() for gone in there] == [None, None]


def batches(template: Template) -> list[tuple[np.ndarray, Tensor]]:
    """Full batches, and a smaller one that ends the clip."""
    generator = torch.Generator().manual_seed(0)
    order = [[0, 1, 2], [3, 4, 3], [2, 1]]
    return [(np.array(frames), torch.rand(len(frames), 32, 16, 16, generator=generator)) for frames in order]


def avatar(template: Template, checkpoint: Path, device: str = "cpu") -> Avatar:
    model = UNetModel(checkpoint, "ave", device, engine="eager", exact=True)
    return Avatar(template, model.engine, pixel_format="nv12")


@pytest.fixture
def painted(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path: Path
) -> Callable[[str], tuple[Avatar, list[Tensor]]]:
    """``painted(device)`` → an avatar all of whose frames are cached, and the batches painted without a graph."""
    folder = make_template(tmp_path / "template")

    def make(device: str) -> tuple[Avatar, list[Tensor]]:
        template = Template.from_directory(folder, device=device)
        one = avatar(template, tiny_checkpoint(), device)
        one._capture_below = 0
        one.render(np.arange(template.length), torch.zeros(template.length, 32, 16, 16))
        return one, [one.render(*batch).clone() for batch in batches(template)]

    return make


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("step", [1, -1], ids=["smaller", "larger"])
@torch.inference_mode()
def test_replayed_batches_equal_unrecorded_ones(
    step: int, painted: Callable[[str], tuple[Avatar, list[Tensor]]]
) -> None:
    """A smaller batch fits into the graph of the first; for a larger one another is captured."""
    one, expected = painted("cpu")
    one._capture_below = math.inf
    found = [replayed(one, *batch) for batch in batches(one.template)[::step]]
    assert all(map(torch.equal, found, expected[::step]))
    assert not torch.equal(found[0], found[1])
    assert one._graphed is not None
    assert one._graphed.batch_size == 3


@pytest.mark.usefixtures("without_gpu")
@torch.inference_mode()
def test_short_clips_are_not_captured(
    painted: Callable[[str], tuple[Avatar, list[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, expected = painted("cpu")
    one._capture_below, one._painted = math.inf, 0
    monkeypatch.setattr(avatar_module, "CAPTURE_AFTER", 2)
    captured, found = [], []
    for batch in batches(one.template):
        found.append(replayed(one, *batch))
        captured.append(one._graphed is not None)
    assert captured == [False, False, True]
    assert all(map(torch.equal, found, expected))


@torch.inference_mode()
def test_smaller_batches_are_recorded_where_memory_is_short(
    painted: Callable[[str], tuple[Avatar, list[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, output = rerun(step)
        if len(output) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replay, output

    one, expected = painted("cpu")
    one._capture_below = math.inf
    monkeypatch.setattr(graphs, "capture", capture)
    found, captured = [], []
    for batch in batches(one.template):
        found.append(replayed(one, *batch))
        captured.append(one._graphed is not None)
    assert captured == [False, False, True], "three samples, three, two"
    assert all(map(torch.equal, found, expected))
    assert any("(CUDA out of memory)" in line for line in fallbacks())


@torch.inference_mode()
def test_a_step_that_cannot_be_captured_is_painted(
    painted: Callable[[str], tuple[Avatar, list[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Callable[[], Tensor]] = []

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    one, expected = painted("cpu")
    one._capture_below = math.inf
    monkeypatch.setattr(graphs, "capture", capture)
    found = [replayed(one, *batch) for batch in batches(one.template)]
    assert all(map(torch.equal, found, expected))
    assert len(tried) == 1, "nor will another be"
    assert any("(operation not permitted when stream is capturing)" in line for line in fallbacks())


def replayed(one: Avatar, frames: np.ndarray, audio: Tensor) -> Tensor:
    """What :meth:`Avatar.render` does on CUDA with cached frames."""
    sources = one.look_up(frames)
    assert one._derived.owns(sources.derived)
    assert one.template.frames.owns(sources.kept)
    return one._replay(sources, torch.from_numpy(frames), audio)


@pytest.mark.parametrize(
    ("options", "frames", "way"),
    [
        ({}, [0, 1], "replayed"),
        ({"memory_budget": FRAMES_ONLY}, [0, 1], "painted"),
        ({"memory_budget": 0}, [0, 1], "painted"),
        ({"clip": (0, 2)}, [1, 2], "replayed"),
        ({"clip": (0, 2)}, [1, 3], "painted"),
    ],
)
def test_only_what_both_caches_keep_is_replayed(
    options: dict[str, Any],
    frames: list[int],
    way: str,
    tiny_checkpoint: Callable[..., Path],
    make_template: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph reads the caches where they lie."""
    ways: list[str] = []
    monkeypatch.setattr(Avatar, "_replay", lambda *given: ways.append("replayed"))
    monkeypatch.setattr(Avatar, "_paint", lambda *given: ways.append("painted"))
    monkeypatch.setattr(avatar_module, "to_device", lambda values, device: values)
    one = avatar(Template.from_directory(make_template(tmp_path / "template", 4), **options), tiny_checkpoint())
    one.look_up(np.arange(4))  # on the CPU: only then is the template said to be on a GPU
    sources = one.look_up(np.array(frames))
    monkeypatch.setattr(one, "look_up", lambda frames: sources)
    monkeypatch.setattr(one.template, "device", CUDA)
    one.render(np.array(frames), torch.zeros(len(frames), 32, 16, 16))
    assert ways == [way]


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


@pytest.fixture
def triton_kernels() -> None:
    if backend(CUDA) != "triton":
        pytest.skip("the plain kernels, which run in place of Triton's here, ask the host")


@pytest.mark.cuda
@pytest.mark.usefixtures("triton_kernels")
def test_recorded_batches_on_a_gpu(painted: Callable[[str], tuple[Avatar, list[Tensor]]]) -> None:
    one, expected = painted("cuda")
    one._capture_below = math.inf
    found = [one.render(*batch) for batch in batches(one.template)]
    assert one._graphed is not None, fallbacks()
    assert all(map(torch.equal, found, expected))


@pytest.mark.cuda
@pytest.mark.usefixtures("triton_kernels")
@torch.inference_mode()
def test_recorded_batches_on_a_second_gpu(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path: Path
) -> None:
    """Although it is not the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    folder = make_template(tmp_path / "template", 2)
    found = []
    for device in ("cuda:0", "cuda:1"):
        one = avatar(Template.from_directory(folder, device=device), tiny_checkpoint(), device)
        audio = torch.rand(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))
        found.append([one.render(np.array([0, 1]), audio).cpu() for _ in range(2)])
        assert one._graphed is not None, fallbacks()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.cuda
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("stage", ["crop", "encode", "decode", "paste", "nv12"])
@torch.inference_mode()
def test_each_stage_can_be_captured(
    stage: str, tiny_model: Callable[..., UNetModel], make_template: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing in a stage waits for the device or reads from the host: capturing would fail."""
    template = Template.from_directory(make_template(tmp_path / "template", 2), device=CUDA)
    engine = make_engine(tiny_model().network, device=CUDA, engine="eager", exact=True)
    kept, index = template.frames.lookup(range(template.length))
    frames, boxes = kept["frame"], template.boxes
    crop, image = crop_and_input(frames, index, boxes)
    features = engine.encode(image)
    audio = torch.rand(template.length, 32, 16, 16, device=CUDA)
    mouth = engine.decode(features, index, audio)
    background, order = to_nv12(frames), torch.arange(template.length, device=CUDA)
    largest = template.max_box
    steps: dict[str, Callable[[], Tensor]] = {
        "crop": lambda: crop_and_input(frames, index, boxes)[1],
        "encode": lambda: engine.encode(image)["x6"],
        "decode": lambda: engine.decode(features, index, audio),
        "paste": lambda: paste_blend(
            mouth, crop, order, frames, index, boxes, background.clone(), nv12=True, max_box=largest, feather=8.0
        ),
        "nv12": lambda: to_nv12(frames),
    }
    expected = steps[stage]().clone()
    replay, output = graphs.capture(steps[stage])
    output.zero_()
    replay()
    assert torch.equal(output, expected)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """A function: once it is called, torch raises whenever the host would wait for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("fps", [None, 10.0])
def test_batches_are_queued_without_waiting(
    fps: float | None,
    no_waiting: Callable[[], None],
    tiny_checkpoint: Callable[..., Path],
    make_template: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Once a template is cached, the host prepares a batch while the one before it is rendered."""
    generator = FrameGenerator(UNetModel(tiny_checkpoint(), device=CUDA, engine="eager", exact=True), batch_size=2)
    template = Template.from_directory(make_template(tmp_path / "template", 2), device=CUDA)
    speech = SpeechFeatures(np.random.default_rng(0).standard_normal((20, 512)).astype(np.float32))
    batches = generator.stream(template, speech, fps=fps, pixel_format="nv12")
    for _ in range(2):  # caches are filled, the step is captured
        next(batches)
    no_waiting()
    assert len(next(batches)) == 2
    assert len(next(batches)) == 2


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_check_for_waiting_sees_a_wait(no_waiting: Callable[[], None]) -> None:
    values = torch.ones(3, device=CUDA)
    no_waiting()
    with pytest.raises(RuntimeError, match="synchronizing"):
        values.cpu()
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3).to(CUDA)


@pytest.mark.cuda
def test_waiting_for_the_device_cannot_be_captured() -> None:
    values = torch.ones(3, device=CUDA)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: values * values.sum().item())
    assert torch.cuda.current_stream() == stream, "what is launched next must not go to the capture's stream"


@pytest.mark.cuda
@pytest.mark.parametrize("joined", [True, False], ids=["waited", "branch left open"])
def test_a_recording_that_failed_keeps_no_memory(joined: bool) -> None:
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


def test_what_cannot_be_recorded_is_timed_unrecorded_with_a_warning(
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
def test_two_threads_may_record_at_once() -> None:
    """One after the other, though both would begin at once."""
    both = threading.Barrier(2)

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
