"""An avatar's captured steps: replayed batches are those that are launched kernel by kernel, and nothing waits."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

    replay.memory = SimpleNamespace(take=lambda: None)  # type: ignore[attr-defined]
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
def test_replayed_batches_equal_launched_ones(step: int, painted: Callable[[str], tuple[Avatar, list[Tensor]]]) -> None:
    """A smaller batch fits into the graph of the first; for a larger one another is captured."""
    one, expected = painted("cpu")
    one._capture_below, before = math.inf, one._painted
    found = [replayed(one, *batch) for batch in batches(one.template)[::step]]
    assert one._painted - before == (1 if step == 1 else 2), "one capture serves all that it has room for"
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
def test_smaller_batches_are_captured_where_memory_is_short(
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


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def triton_kernels() -> None:
    if backend(CUDA) != "triton":
        pytest.skip("the plain kernels, which run in place of Triton's here, ask the host")


@pytest.mark.cuda
@pytest.mark.usefixtures("triton_kernels")
def test_captured_batches_on_a_gpu(painted: Callable[[str], tuple[Avatar, list[Tensor]]]) -> None:
    one, expected = painted("cuda")
    one._capture_below = math.inf
    found = [one.render(*batch) for batch in batches(one.template)]
    assert one._graphed is not None, fallbacks()
    assert all(map(torch.equal, found[:2], expected[:2]))
    # The last is painted as a batch of two, but replayed padded to three: cuDNN may take another algorithm.
    difference = (found[2].int() - expected[2].int()).abs()
    assert difference.max() <= 2 and (difference == 0).float().mean() >= 0.999
    other = (found[2].int() - expected[1][: len(found[2])].int()).abs()
    assert (other == 0).float().mean() < 0.999, "another batch passes, too"


@pytest.mark.cuda
@pytest.mark.usefixtures("triton_kernels")
@torch.inference_mode()
def test_captured_batches_on_a_second_gpu(
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
@pytest.mark.usefixtures("triton_kernels")
def test_next_clip_of_an_avatar_replays_the_graph(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path: Path
) -> None:
    generator = FrameGenerator(UNetModel(tiny_checkpoint(), device=CUDA, engine="eager", exact=True), batch_size=2)
    template = Template.from_directory(make_template(tmp_path / "template", 2), device=CUDA)
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    kept, graphs_met, clips = generator.avatar(template, "nv12"), [], []
    for avatar in (kept, kept, template):
        batches = generator.stream(avatar, SpeechFeatures(rows), pixel_format="nv12")
        clips.append(torch.cat([batch.clone() for batch in batches]))
        graphs_met.append(kept._graphed)
    assert graphs_met[0] is not None
    assert graphs_met[1] is graphs_met[0]
    assert torch.equal(clips[1], clips[0])
    assert torch.equal(clips[2], clips[0])


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_check_for_waiting_sees_a_wait(no_waiting: Callable[[], None]) -> None:
    values = torch.ones(3, device=CUDA)
    no_waiting()
    with pytest.raises(RuntimeError, match="synchronizing"):
        values.cpu()
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3).to(CUDA)
