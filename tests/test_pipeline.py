"""From files to a file: what is in the video, and what lies beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from clips import FRAMES, RATE, write_click

from gpupipe import FrameGenerationPipeline, FrameGenerator, InputError

MakeTemplate = Callable[..., Path]
Image = np.ndarray


def frames_of(pipeline: FrameGenerationPipeline, clip: dict[str, Path], **options: Any) -> list[Image]:
    """The clip's frames before encoding."""
    template = clip["template"]
    return pipeline.generator.generate_frames_from_template_sequence(
        template / "full_body_img", template / "landmarks", clip["features"], **options
    )


@pytest.fixture(scope="module")
def frames(pipeline: FrameGenerationPipeline, clip: dict[str, Path]) -> list[Image]:
    return frames_of(pipeline, clip)


def pictures_of(path: Path) -> list[Image]:
    with av.open(str(path)) as container:
        return [
            frame.reformat(format="bgr24", src_colorspace=Colorspace.ITU709).to_ndarray()
            for frame in container.decode(video=0)
        ]


def top_level_boxes(path: Path) -> list[str]:
    """The names of an MP4's boxes, in order."""
    content, names, at = path.read_bytes(), [], 0
    while at < len(content):
        size, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8].decode()
        if size == 1:
            size = int.from_bytes(content[at + 8 : at + 16], "big")
        names.append(name)
        at += size
    return names


# ── what is in the video ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["clip.MP4", "clip.Mov"])
def test_suffixes_in_capitals_are_suffixes(name: str, render: Callable[..., Path]) -> None:
    boxes = top_level_boxes(render(name))
    assert boxes.index("moov") < boxes.index("mdat"), "faststart"


def test_video_as_the_contract_wants_it(render: Callable[..., Path]) -> None:
    path = render()
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        context = video.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 192, 128)
        tags = (context.colorspace, context.color_range, context.color_primaries, context.color_trc)
        assert [int(tag) for tag in tags] == [1, 1, 1, 1], "BT.709, limited range"
        assert video.average_rate == 25
        assert sound.codec_context.name == "aac"
        assert sound.rate == RATE
        assert video.start_time == 0
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / 25 for i in range(FRAMES)])
    boxes = top_level_boxes(path)
    assert boxes.index("moov") < boxes.index("mdat"), "faststart"
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_pictures_are_the_frames_in_their_order(render: Callable[..., Path], frames: list[Image]) -> None:
    """Colours too: read as BT.601, the same file is farther from what went in."""
    path = render(crf=10)
    pictures = pictures_of(path)
    assert len(pictures) == len(frames) == FRAMES
    match = [max(range(FRAMES), key=lambda k: cv2.PSNR(picture, frames[k])) for picture in pictures]
    assert match == list(range(FRAMES))
    assert min(map(cv2.PSNR, pictures, frames)) > 33
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
        other = first.reformat(format="bgr24", src_colorspace=Colorspace.ITU601, dst_colorspace=Colorspace.ITU601)
    assert cv2.PSNR(other.to_ndarray(), frames[0]) < cv2.PSNR(pictures[0], frames[0]) - 3


def test_sound_and_picture_start_together(render: Callable[..., Path]) -> None:
    """The click is where it was, though AAC begins with priming samples."""
    with av.open(str(render())) as container:
        loudest, when = 0.0, 0.0
        for frame in container.decode(audio=0):
            samples = np.abs(frame.to_ndarray()).max(axis=0)
            if samples.max() > loudest:
                loudest, when = samples.max(), frame.time + int(samples.argmax()) / frame.sample_rate
    assert loudest > 0.1
    assert when == pytest.approx(0.2 + 20 / RATE, abs=0.004)


def test_all_of_the_sound_is_there(render: Callable[..., Path]) -> None:
    with av.open(str(render())) as container:
        seconds = sum(frame.samples for frame in container.decode(audio=0)) / RATE
    assert FRAMES / 25 <= seconds <= FRAMES / 25 + 3 * 1024 / RATE


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8])
def test_frame_count_is_exact(count: int, render: Callable[..., Path], clip: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.load(clip["features"])[:count])
    assert len(pictures_of(render(audio_features_path=tmp_path / "short.npy"))) == count


@pytest.mark.parametrize(
    ("fps", "count"), [(20, 9), (30, 13), (50, 22), (10, 4), (29.97, 13), (Fraction(30000, 1001), 13)]
)
def test_frame_rate(
    fps: Any, count: int, render: Callable[..., Path], pipeline: FrameGenerationPipeline, frames: list[Image],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As many frames as the features last; each shows what 25 frames a second show at its time, beside the sound."""
    path = render(fps=fps, crf=10)
    assert not [record for record in caplog.records if "sound lasts" in record.getMessage()]
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == pytest.approx(float(fps), rel=1e-4)
    assert times == pytest.approx([j / float(fps) for j in range(count)], abs=1e-3)
    assert pipeline.last_render is not None
    assert pipeline.last_render.frames == count
    match = [max(range(FRAMES), key=lambda k: cv2.PSNR(picture, frames[k])) for picture in pictures_of(path)]
    assert match == [int(j * 25 / float(fps) + 1e-9) for j in range(count)]
    assert match != list(range(count)), "not one row a frame"


@pytest.mark.parametrize("suffix", ["mkv", "mov"])
def test_other_containers(suffix: str, render: Callable[..., Path]) -> None:
    path = render(f"clip.{suffix}")
    assert len(pictures_of(path)) == FRAMES
    with av.open(str(path)) as container:
        assert {stream.codec_context.name for stream in container.streams} == {"h264", "aac"}


def test_silent_video(render: Callable[..., Path]) -> None:
    path = render(audio_path=None)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
    assert len(pictures_of(path)) == FRAMES


@pytest.mark.parametrize(("codec", "layout", "rate"), [("flac", "stereo", 44100), ("libmp3lame", "stereo", 22050)])
def test_sound_of_other_kinds(codec: str, layout: str, rate: int, render: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / ("sound.flac" if codec == "flac" else "sound.mp3")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=1152)
        noise = np.random.default_rng(0).integers(-8000, 8000, (1, 2 * rate), dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout=layout)
        frame.rate = rate
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    with av.open(str(render(audio_path=path))) as container:
        sound = container.streams.audio[0]
        assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", rate, 2)


def test_crf_changes_the_quality(render: Callable[..., Path]) -> None:
    assert render("fine.mp4", crf=5).stat().st_size > 1.5 * render("coarse.mp4", crf=40).stat().st_size


def test_start_frame_and_parsing_reach_the_frames(
    render: Callable[..., Path], pipeline: FrameGenerationPipeline, clip: dict[str, Path]
) -> None:
    expected = frames_of(pipeline, clip, start_frame=1, parsing_dir=clip["template"] / "parsing")
    pictures = pictures_of(render(start_frame=1, use_parsing=True, crf=5))
    plain = frames_of(pipeline, clip, start_frame=1)
    for picture, frame, other in zip(pictures, expected, plain, strict=True):
        assert cv2.PSNR(picture, frame) > max(35, cv2.PSNR(picture, other) + 3)


# ── while it renders, and after ───────────────────────────────────────────────────────────────────────────────────────


def test_file_appears_when_it_is_whole(render: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[list[str]] = []
    path = render(progress=lambda done, total: seen.append([file.name for file in (tmp_path / "out").iterdir()]))
    assert len(seen) == 3
    for names in seen:
        assert len(names) == 1
        assert names[0].startswith(".clip-")
        assert names[0].endswith(".part.mp4")
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    assert path.stat().st_mode & 0o444 == 0o444, "as readable as any file of the user's"


def test_progress_and_record(render: Callable[..., Path], pipeline: FrameGenerationPipeline) -> None:
    calls: list[tuple[int, int]] = []
    render(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, FRAMES), (8, FRAMES), (FRAMES, FRAMES)]
    record = pipeline.last_render
    assert record is not None
    assert (record.frames, record.device, record.engine) == (FRAMES, "cpu", "llvm")
    assert record.codec in ("libx264", "h264_nvenc")
    assert set(record.phases) == {"open", "render", "finish"}
    assert all(seconds > 0 for seconds in record.phases.values())
    assert record.frames_per_second == pytest.approx(FRAMES / sum(record.phases.values()))


def test_debug_tells_of_each_batch(render: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gpupipe"):
        render()
    told = [record.getMessage() for record in caplog.records if record.name == "gpupipe.frame_generator"]
    assert told == ["rendered frames 0 to 3", "rendered frames 4 to 7", "rendered frames 8 to 10"]


@pytest.mark.parametrize(("seconds", "aloud"), [(FRAMES / 25, False), (FRAMES / 25 + 1, True), (0.25, True)])
def test_lengths_that_differ_are_said_aloud(
    seconds: float, aloud: bool, render: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = render(audio_path=write_click(tmp_path / "other.wav", seconds))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [f"sound lasts {seconds:.2f} s and the picture 0.44 s" in warning for warning in warnings] == [True] * aloud
    assert len(pictures_of(path)) == FRAMES


def test_an_older_file_is_replaced(render: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out" / "clip.mp4").write_text("old")
    assert len(pictures_of(render())) == FRAMES


# ── frames ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_only(pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path) -> None:
    arguments = (clip["features"], clip["template"], tmp_path / "frames", 2, 25, True)
    paths = pipeline.generate_frames_only(*arguments)
    assert paths == [str(tmp_path / "frames" / f"frame_{i:05d}.jpg") for i in range(FRAMES)]
    expected = frames_of(pipeline, clip, start_frame=2, parsing_dir=clip["template"] / "parsing")
    saved = pipeline.generator.save_frames(expected, tmp_path / "expected")
    assert [Path(path).read_bytes() for path in paths] == [Path(path).read_bytes() for path in saved]


def test_saved_frames_lie_beside_the_video(
    render: Callable[..., Path], pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path
) -> None:
    path = render(save_frames=True)
    folder = path.parent / "clip_frames"
    alone = pipeline.generate_frames_only(clip["features"], clip["template"], tmp_path / "alone")
    assert sorted(file.name for file in folder.iterdir()) == [Path(name).name for name in alone]
    for name in alone:
        assert (folder / Path(name).name).read_bytes() == Path(name).read_bytes()
    render("other.mp4", save_frames=True, frames_dir=tmp_path / "elsewhere" / "frames")
    assert len(list((tmp_path / "elsewhere" / "frames").iterdir())) == FRAMES
    assert {file.name for file in path.parent.iterdir()} == {"clip.mp4", "clip_frames", "other.mp4"}


def test_images_left_from_a_longer_clip_are_warned_of(
    render: Callable[..., Path], pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.WARNING, "gpupipe")
    folder = tmp_path / "frames"
    frames = [np.zeros((32, 48, 3), np.uint8)] * (FRAMES + 2)
    pipeline.generator.save_frames(frames, folder)
    pipeline.generator.save_frames(frames[:1], folder, "other")
    (folder / "frame_99.jpg").touch()
    pipeline.generator.save_frames(frames, folder)
    assert not caplog.records, "whose numbers have five digits"
    told = f"frame_{FRAMES:05d}.jpg: is the first of 2 left from an earlier, longer clip; this one has {FRAMES}"
    for again in (
        lambda: pipeline.generate_frames_only(clip["features"], clip["template"], folder),
        lambda: pipeline.generator.save_frames(frames[:FRAMES], folder),
        lambda: render(save_frames=True, frames_dir=folder),
    ):
        caplog.clear()
        again()
        assert [record.levelname for record in caplog.records if told in record.getMessage()] == ["WARNING"]
    caplog.clear()
    pipeline.generate_frames_only(clip["features"], clip["template"], folder, image_format="png")
    assert not caplog.records


def test_images_have_no_rate_unless_it_is_asked_for(
    pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path
) -> None:
    once = pipeline.generate_frames_only(clip["features"], clip["template"], tmp_path / "a", 0, 50)
    twice = pipeline.generate_frames_only(clip["features"], clip["template"], tmp_path / "b", 0, 50, resample=True)
    assert [Path(path).read_bytes() for path in twice] == [Path(path).read_bytes() for path in once for _ in range(2)]


def test_saving_frames_does_not_change_the_video(render: Callable[..., Path]) -> None:
    """With it frames are converted whole, without it only where the box is."""
    plain, saved = pictures_of(render("plain.mp4")), pictures_of(render("saved.mp4", save_frames=True))
    assert all(np.array_equal(a, b) for a, b in zip(plain, saved, strict=True))


# ── reference outputs ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "indices"), [(1, [0]), (2, [0, 10]), (5, [0, 2, 5, 8, 10]), (50, list(range(11)))])
def test_reference_outputs(
    count: int, indices: list[int], pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path
) -> None:
    facts = pipeline.generate_reference_outputs(clip["features"], clip["template"], tmp_path / "reference", count)
    paths = [str(tmp_path / "reference" / f"reference_{i:05d}.png") for i in indices]
    assert facts == {
        "num_total_frames": FRAMES,
        "sample_indices": indices,
        "reference_frames": paths,
        "audio_features_shape": [FRAMES, 512],
        "mode": "ave",
        "frame_size": [192, 128],
    }
    assert json.loads((tmp_path / "reference" / "metadata.json").read_text()) == facts
    features = np.fromfile(tmp_path / "reference" / "audio_features.bin", "<f4").reshape(FRAMES, 512)
    assert np.array_equal(features, np.load(clip["features"]))
    hard = FrameGenerator(pipeline.unet_model, blend="none")
    folders = (clip["template"] / "full_body_img", clip["template"] / "landmarks")
    frames = hard.generate_frames_from_template_sequence(*folders, clip["features"])
    for i, path in zip(indices, paths, strict=True):
        assert np.array_equal(cv2.imread(path), frames[i])


@pytest.mark.parametrize("count", [0, 2.5, "3"])
def test_no_whole_number_of_reference_frames_is_an_error(
    count: Any, pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^number of sample frames is {count!r}; expected 1 or more"):
        pipeline.generate_reference_outputs(clip["features"], clip["template"], tmp_path / "reference", count)
    assert not (tmp_path / "reference").exists()


def test_model_is_exported(pipeline: FrameGenerationPipeline, tmp_path: Path) -> None:
    path = pipeline.export_model_to_onnx(tmp_path / "unet.onnx")
    assert path == str(tmp_path / "unet.onnx")
    assert Path(path).stat().st_size > 10_000
