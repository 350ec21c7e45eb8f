"""Whole frames: the same for any batch size, memory budget and form of the arguments."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from clips import features, rendered

from gpupipe import FrameGenerator, InputError, OutputError, SpeechFeatures, Template, UNetModel, audio_windows, shots
from gpupipe.avatar import Avatar
from gpupipe.benchmarks import reference_loop as reference
from gpupipe.engines import EngineName
from gpupipe.fallbacks import fallbacks
from gpupipe.models import MODES, Mode
from gpupipe.shots import Piece
from gpupipe.video.decode import read_images
from gpupipe.video.images import ImageWriter

MakeModel = Callable[..., UNetModel]
MakeTemplate = Callable[..., Path]
Image = np.ndarray

# ── the same frames, however they are made ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def template(make_template: MakeTemplate, tmp_path: Path) -> Path:
    """Five frames with boxes of different sizes, two of them over the edge, and parsing."""
    boxes = [(40, 30, 61), (-30, 20, 100), (30, 10, 97), (40, 60, 90), (10, 10, 110)]
    return make_template(tmp_path / "avatar", frames=5, box=boxes, parsing=True)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 7}, {"memory_budget": 0}])
@pytest.mark.parametrize("parsing", [False, True])
def test_batch_size_and_memory_change_nothing(
    parsing: bool, options: dict[str, int], tiny_model: MakeModel, template: Path
) -> None:
    """Bit for bit, with a partial last batch: 10 = 3·3 + 1 = 7 + 3."""
    sound = features(10)
    expected = rendered(FrameGenerator(tiny_model()), template, sound, parsing=parsing)
    found = rendered(FrameGenerator(tiny_model(), **options), template, sound, parsing=parsing)
    assert len(found) == 10
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not np.array_equal(found[0], found[2]), "the walk has moved on"


def test_half_the_memory_changes_nothing(tiny_model: MakeModel, template: Path) -> None:
    """Memory for all frames, and for the features of two."""
    expected = rendered(FrameGenerator(tiny_model()), template, features(10))
    sizes = [value.nbytes for value in tiny_model().engine.encode(torch.zeros(1, 6, 320, 320)).values()]
    budget = 5 * 192 * 128 * 3 + 2 * (sum(sizes) + 3 * 328 * 328) + 100
    found = rendered(FrameGenerator(tiny_model(), memory_budget=budget), template, features(10))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fps", [None, 20.0, 60.0])
def test_batches_that_do_not_fit_in_a_gpu_s_memory_are_halved(
    fps: float | None, tiny_model: MakeModel, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on, with a warning."""
    monkeypatch.setattr("gpupipe.frame_generator.map_batches", lambda function, batches, device: map(function, batches))
    tried: list[int] = []

    def render_batch(pieces: list[Piece]) -> list[torch.Tensor]:
        (piece,) = pieces
        tried.append(len(piece.rows))
        if len(piece.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return shots.render_batch(pieces)

    def frames() -> np.ndarray:
        generator = FrameGenerator(tiny_model(), batch_size=5)
        opened = generator.open_template_directory(template)
        return torch.cat(list(generator.stream(opened, SpeechFeatures(features(10)), fps=fps))).numpy()

    expected = frames()
    monkeypatch.setattr("gpupipe.frame_generator.render_batch", render_batch)
    assert np.array_equal(frames(), expected)
    assert tried[:5] == [5, 2, 3, 1, 2]
    assert max(tried[5:], default=0) <= 2
    assert fallbacks() == ["cpu is out of memory: batches of 2 from here on"]

    def never(pieces: list[Piece]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gpupipe.frame_generator.render_batch", never)
    with pytest.raises(torch.OutOfMemoryError):
        frames()


@pytest.mark.parametrize("fit", [1, 3, 5])
def test_template_frames_and_what_is_made_of_them_share_the_budget(
    fit: int, tiny_model: MakeModel, template: Path
) -> None:
    def used(budget: int | None) -> tuple[int, int]:
        opened = Template.from_directory(template, memory_budget=budget)
        avatar = Avatar(opened, tiny_model().engine)
        avatar.render(np.arange(5), torch.zeros(5, 32, 16, 16))
        return opened.frames.bytes_used, avatar._derived.bytes_used

    frames, derived = used(None)
    assert used(frames + derived // 5 * fit) == (frames, derived // 5 * fit)
    assert used(frames + derived // 5 * fit - 1) == (frames, derived // 5 * (fit - 1))


def test_template_s_half_runs_once_a_template_frame(
    tiny_model: MakeModel, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one lane: two lanes that reach a frame at the same time both compute it, which is wasteful but right."""
    monkeypatch.setattr("gpupipe.lanes.available_cores", lambda: 1)
    engine = tiny_model().engine
    encode, seen = engine.encode, []

    def counted(image: torch.Tensor) -> Any:
        seen.append(len(image))
        return encode(image)

    monkeypatch.setattr(engine, "encode", counted)
    rendered(FrameGenerator(tiny_model()), template, features(20))
    assert sum(seen) == 5
    seen.clear()
    rendered(FrameGenerator(tiny_model(), memory_budget=0, batch_size=4), template, features(20))
    assert sum(seen) > 5


def test_only_what_is_shown_from_the_start_frame_on_is_decoded(
    tiny_model: MakeModel, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk stands at frame 2 before its first step."""
    decoded: set[int] = set()

    def remembered(paths: list[Path], **options: Any) -> torch.Tensor:
        decoded.update(int(path.stem) for path in paths)
        return read_images(paths, **options)

    monkeypatch.setattr("gpupipe.template.read_images", remembered)
    rendered(FrameGenerator(tiny_model()), template, features(2), start_frame=2)
    assert decoded == {3, 4}


@pytest.mark.parametrize(("rows", "kept"), [(4, 0), (6, 2), (20, 5)])
def test_only_what_is_shown_again_is_kept(
    rows: int, kept: int, tiny_model: MakeModel, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk over 5 frames is 1 2 3 4 3 2 1 0 1 …"""
    generator = FrameGenerator(tiny_model())
    avatars, make = [], generator.avatar

    def remembered(*args: Any, **options: Any) -> Any:
        avatars.append(make(*args, **options))
        return avatars[-1]

    monkeypatch.setattr(generator, "avatar", remembered)
    rendered(generator, template, features(rows))
    assert avatars[0]._derived.capacity == kept


def test_all_that_is_shown_may_be_kept_on_a_gpu(tiny_model: MakeModel, template: Path) -> None:
    """Where a captured step reads from the cache alone."""
    generator = FrameGenerator(tiny_model())
    opened = generator.open_template_directory(template)
    opened.device = torch.device("cuda")
    with (
        mock.patch.object(generator, "avatar", side_effect=KeyboardInterrupt) as made,
        pytest.raises(KeyboardInterrupt),
    ):
        generator.stream(opened, SpeechFeatures(features(3)))
    assert made.call_args.kwargs["cacheable"].tolist() == [False, True, True, True, False]


def test_stream_gives_the_same_frames_in_batches(tiny_model: MakeModel, template: Path) -> None:
    generator = FrameGenerator(tiny_model(), batch_size=4)
    opened = generator.open_template(template / "full_body_img", template / "landmarks")
    batches = list(generator.stream(opened, SpeechFeatures(features(10)), start_frame=1))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    found = torch.cat(batches).numpy()
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.stack(rendered(generator, template, features(10), start_frame=1)))


@pytest.mark.parametrize("fps", [10, 20, 60])
def test_resampled_frames_are_the_rows_they_show(fps: int, tiny_model: MakeModel, template: Path) -> None:
    """For any batch size, each equals the frame of its row without resampling."""
    sound = SpeechFeatures(features(10))
    alone = np.stack(rendered(FrameGenerator(tiny_model()), template, features(10)))
    for batch_size in (1, 4):
        generator = FrameGenerator(tiny_model(), batch_size=batch_size)
        opened = generator.open_template(template / "full_body_img", template / "landmarks")
        batches = list(generator.stream(opened, sound, fps=fps))
        assert max(len(batch) for batch in batches) <= batch_size
        assert min(len(batch) for batch in batches) > 0
        found = torch.cat(batches).numpy()
        assert len(found) == round(10 / 25 * fps)
        assert np.array_equal(found, alone[[j * 25 // fps for j in range(len(found))]])


def test_a_clip_ends_where_its_sound_does_and_begins_alike(tiny_model: MakeModel, template: Path) -> None:
    """A frame sees 8 rows ahead: the first frames of a clip cut after 12 rows are the whole clip's."""
    sound = features(20)
    whole, cut = (rendered(FrameGenerator(tiny_model()), template, rows) for rows in (sound, sound[:12]))
    equal = [np.array_equal(a, b) for a, b in zip(whole, cut, strict=False)]
    assert equal == [True] * 5 + [False] * 7


def test_features_from_file_array_tensor_and_windows(tiny_model: MakeModel, template: Path, tmp_path: Path) -> None:
    sound = features(3)
    np.save(tmp_path / "sound.npy", sound)
    forms = [tmp_path / "sound.npy", str(tmp_path / "sound.npy"), torch.from_numpy(sound), audio_windows(sound)]
    expected = rendered(FrameGenerator(tiny_model()), template, sound)
    for form in forms:
        assert all(
            np.array_equal(a, b)
            for a, b in zip(rendered(FrameGenerator(tiny_model()), template, form), expected, strict=True)
        )


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [
        partial(default_dtype, torch.float64),
        partial(default_dtype, torch.float16),
        partial(torch.device, "meta"),
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        torch.inference_mode,
    ],
    ids=["float64", "float16", "device", "autocast", "inference"],
)
@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "llvm"])
def test_a_program_s_settings_of_pytorch_change_nothing(
    engine: EngineName, setting: Callable[[], Any], tiny_checkpoint: Callable[..., Path], template: Path
) -> None:
    """Neither when the network is built nor when it runs; ``meta`` stands for a GPU as the default device."""

    def frames() -> list[Image]:
        generator = FrameGenerator(UNetModel(tiny_checkpoint(), device="cpu", engine=engine))
        single = generator.generate_frame(*one_frame(template), audio_windows(features(1)))
        return [single, *rendered(generator, template, features(3))]

    with setting():
        found = frames()
    assert torch.get_default_dtype() == torch.float32
    assert all(np.array_equal(a, b) for a, b in zip(found, frames(), strict=True))


# ── one frame ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def one_frame(template: Path, i: int = 2) -> tuple[Image, np.ndarray]:
    points = reference.read_landmarks(template / "landmarks" / f"{i}.lms")
    return reference.read_image(template / "full_body_img" / f"{i}.jpg"), points


@pytest.mark.parametrize("blend", ["none", "feather"])
@pytest.mark.parametrize("parsing", [False, True])
def test_single_frames_equal_those_of_the_clip(
    parsing: bool, blend: Any, tiny_model: MakeModel, template: Path
) -> None:
    generator = FrameGenerator(tiny_model(), blend=blend, feather=12)
    sound = features(4)
    clip = rendered(generator, template, sound, parsing=parsing)
    for i, index in enumerate([1, 2, 3, 4]):
        image, points = one_frame(template, index)
        colours = reference.read_image(template / "parsing" / f"{index}.png") if parsing else None
        found = generator.generate_frame(image, points, audio_windows(sound)[i], colours)
        assert np.array_equal(found, clip[i])


def test_a_seam_that_is_changed_is_changed_for_clips_too(tiny_model: MakeModel, template: Path) -> None:
    generator, sound = FrameGenerator(tiny_model()), features(1)
    generator.blend = "none"
    (found,) = rendered(generator, template, sound)
    image, points = one_frame(template, 1)
    assert np.array_equal(found, generator.generate_frame(image, points, audio_windows(sound)[0]))
    assert not np.array_equal(found, rendered(FrameGenerator(tiny_model()), template, sound)[0])


@pytest.mark.parametrize("mode", MODES)
def test_audio_may_be_windows_or_rows_arrays_or_tensors(mode: Mode, tiny_model: MakeModel, template: Path) -> None:
    generator = FrameGenerator(tiny_model(mode), mode)
    image, points = one_frame(template)
    rows = features(16, mode)
    window = audio_windows(rows, mode)[8]
    expected = generator.generate_frame(image, points, window)
    for form in (window[None], window.numpy(), rows, rows.reshape(16, -1), torch.from_numpy(rows), rows.tolist()):
        assert np.array_equal(generator.generate_frame(image, points, form), expected)
    other = generator.generate_frame(image, points, rows[::-1].copy())
    assert not np.array_equal(other, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_row_is_an_error_that_says_what_to_do(mode: Mode, tiny_model: MakeModel, template: Path) -> None:
    generator = FrameGenerator(tiny_model(mode), mode)
    row = features(1, mode)
    turned = features(16, mode).reshape(16, -1).T  # has as many values as a window
    for form in (row, row[0], row.reshape(-1), np.float32(0), features(15, mode), features(17, mode), turned):
        with pytest.raises(
            InputError, match=rf"^audio_features: shape is .* gpupipe\.audio_windows\(features, '{mode}'\)"
        ):
            generator.generate_frame(*one_frame(template), form)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_audio_that_is_not_finite(value: float, tiny_model: MakeModel, template: Path) -> None:
    window = audio_windows(features(1))
    window[0, 3, 5, 7] = value
    for form in (window, window.numpy(), window[0].reshape(16, -1)):
        with pytest.raises(InputError, match=r"^audio_features: holds NaN or infinite values"):
            FrameGenerator(tiny_model()).generate_frame(*one_frame(template), form)


def test_image_landmarks_and_audio_may_be_tensors(tiny_model: MakeModel, template: Path) -> None:
    generator = FrameGenerator(tiny_model())
    image, points = one_frame(template)
    window = audio_windows(features(1))
    expected = generator.generate_frame(image, points, window)
    found = generator.generate_frame(torch.from_numpy(image), torch.from_numpy(points), window)
    assert np.array_equal(found, expected)
    learnt = torch.from_numpy(points.astype(np.float32)).requires_grad_()
    assert np.array_equal(generator.generate_frame(image, learnt, window.clone().requires_grad_()), expected)
    half = window.bfloat16()
    assert np.array_equal(
        generator.generate_frame(image, points, half), generator.generate_frame(image, points, half.float())
    )
    assert isinstance(found, np.ndarray)


def test_a_box_outside_the_image(tiny_model: MakeModel, template: Path) -> None:
    image, points = one_frame(template)
    with pytest.raises(InputError, match="lies wholly outside the frame"):
        FrameGenerator(tiny_model()).generate_frame(image, points + 1000, audio_windows(features(1)))


# ── files and errors ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_saved_frames(tiny_model: MakeModel, tmp_path: Path) -> None:
    frames = [np.full((32, 48, 3), (10 * i, 100, 200), dtype=np.uint8) for i in range(3)]
    generator = FrameGenerator(tiny_model())
    paths = generator.save_frames(frames, tmp_path / "new" / "folder")
    assert paths == [str(tmp_path / "new" / "folder" / f"frame_{i:05d}.jpg") for i in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        assert np.abs(cv2.imread(path).astype(int) - frame).max() <= 2
    assert Path(generator.save_frames(frames[:1], tmp_path, "mouth")[0]).name == "mouth_00000.jpg"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot be made"):
        generator.save_frames(frames, tmp_path / "file")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((8, 8, 3), "float32"), ((8, 8, 4), "uint8"), ((3, 8, 8), "uint8"), ((0, 8, 3), "uint8")]
)
def test_arrays_that_are_not_frames_are_not_saved(
    shape: tuple[int, ...], dtype: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    """Otherwise its bytes, taken in another order, would be saved as a picture."""
    with pytest.raises(InputError, match=r"frame_00000\.jpg: frame is .*expected uint8 \(H, W, 3\)"):
        FrameGenerator(tiny_model()).save_frames([np.zeros(shape, dtype)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saved_frames_may_be_tensors(tiny_model: MakeModel, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(256, size=(2, 32, 48, 3), dtype=np.uint8)
    generator = FrameGenerator(tiny_model())
    expected = generator.save_frames(list(frames), tmp_path / "arrays")
    for given in (list(torch.from_numpy(frames)), torch.from_numpy(frames)):
        found = generator.save_frames(given, tmp_path / "tensors")
        assert [Path(path).read_bytes() for path in found] == [Path(path).read_bytes() for path in expected]


def test_saved_frames_may_lie_in_the_same_memory(tiny_model: MakeModel, tmp_path: Path) -> None:
    """As a reader's that decodes each frame into one buffer; several threads are still writing the ones before."""
    frames = np.random.default_rng(0).integers(256, size=(8, 320, 480, 3), dtype=np.uint8)
    generator = FrameGenerator(tiny_model())
    expected = generator.save_frames(list(frames), tmp_path / "apart")
    buffer = np.empty_like(frames[0])
    found = generator.save_frames((np.copyto(buffer, frame) or buffer for frame in frames), tmp_path / "buffer")
    assert [Path(path).read_bytes() for path in found] == [Path(path).read_bytes() for path in expected]


@pytest.mark.usefixtures("no_thread_left")
def test_frames_that_stop_coming_leave_the_ones_before(tiny_model: MakeModel, tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        for _ in range(40):
            yield np.zeros((32, 48, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FrameGenerator(tiny_model()).save_frames(broken(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "frame_00000.jpg" and not [name for name in names if name.startswith(".")]


def test_several_threads_save_frames_and_few_wait_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise memory would grow with the clip wherever frames come faster than they are written."""
    together, saved, waiting = threading.Barrier(2, timeout=10), [], []

    def save(frame: Image, path: Path) -> Path:
        together.wait()
        time.sleep(0.01)
        saved.append(path)
        return path

    monkeypatch.setattr("gpupipe.video.images.available_cores", lambda: 2)
    monkeypatch.setattr("gpupipe.video.images.save_image", save)
    with ImageWriter(tmp_path) as writer:
        for count in range(1, 13):
            writer.write(np.zeros((8, 8, 3), np.uint8))
            waiting.append(count - len(saved))
    assert len(saved) == 12
    assert max(waiting) <= 2


def test_an_error_between_frames_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that of a frame before it, nor a warning of what is missing; and nothing is written after it."""
    begun, ended = threading.Event(), threading.Event()

    def save(frame: Image, path: Path) -> Path:
        begun.set()
        time.sleep(0.1)
        ended.set()
        raise OutputError("no room")

    (tmp_path / "frame_00009.jpg").touch()
    monkeypatch.setattr("gpupipe.video.images.save_image", save)
    with pytest.raises(KeyboardInterrupt), ImageWriter(tmp_path) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8))
        assert begun.wait(10)
        raise KeyboardInterrupt
    assert ended.is_set()
    assert not caplog.records


def test_saved_frames_are_opencv_s_jpegs(tiny_model: MakeModel, template: Path, tmp_path: Path) -> None:
    frames = rendered(FrameGenerator(tiny_model()), template, features(1))
    (path,) = FrameGenerator(tiny_model()).save_frames(frames, tmp_path)
    cv2.imwrite(str(tmp_path / "opencv.jpg"), frames[0])
    difference = np.abs(cv2.imread(path).astype(int) - cv2.imread(str(tmp_path / "opencv.jpg")))
    assert difference.mean() < 0.1
    cv2.imwrite(str(tmp_path / "other.jpg"), frames[0], [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert np.abs(cv2.imread(path).astype(int) - cv2.imread(str(tmp_path / "other.jpg"))).mean() > 0.1


@pytest.mark.parametrize("start_frame", [-1, 5])
def test_start_outside_the_template_fails_before_a_frame_is_rendered(
    start_frame: int, tiny_model: MakeModel, template: Path
) -> None:
    generator = FrameGenerator(tiny_model())
    opened = generator.open_template(template / "full_body_img", template / "landmarks")
    with pytest.raises(InputError, match=f"^start frame is {start_frame}; expected 0 to 4"):
        generator.stream(opened, SpeechFeatures(features(3)), start_frame=start_frame)
    with pytest.raises(InputError, match=f"^start frame is {start_frame}; expected 0 to 4"):
        generator.shot(generator.avatar(opened), SpeechFeatures(features(3)), start_frame=start_frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "wenet"}, r"mode is 'wenet'; expected the model's, 'ave'"),
        ({"batch_size": 0}, r"batch size is 0; expected 1 or more"),
        ({"batch_size": 2.5}, r"batch size is 2\.5; expected 1 or more"),
        ({"blend": "soft"}, r"blend is 'soft'; expected feather or none"),
        ({"feather": -2.0}, r"feather is -2.0; expected a width"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tiny_model: MakeModel) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        FrameGenerator(tiny_model(), **options)


def test_negative_memory_budget_is_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(InputError, match="memory budget is -1; expected 0 or more bytes"):
        FrameGenerator(tiny_model(), memory_budget=-1)


def test_options_are_keyword_only(tiny_model: MakeModel) -> None:
    with pytest.raises(TypeError):
        FrameGenerator(tiny_model(), "ave", "none")  # type: ignore[misc]
