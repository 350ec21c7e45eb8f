"""Codecs, containers and sizes that a video can be written in, decoded again and compared with the input."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import av.logging
import cv2
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorRange, Colorspace
from clips import write_click

from gpupipe import FrameGenerationPipeline, InputError
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.video.codecs import host_frame, jpeg_quantiser
from gpupipe.video.encode import VideoWriter, pad_to_even

COUNT = 7


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Callable[..., Path]) -> FrameGenerationPipeline:
    return FrameGenerationPipeline(tiny_checkpoint(), "ave", "cpu")


def moving_picture(width: int, height: int, count: int = COUNT) -> torch.Tensor:
    """Coarse colours that drift to the right: uint8 (count, height, width, 3), BGR."""
    colours = np.random.default_rng(0).integers(256, size=(5, 8, 3)).astype(np.uint8)
    wide = cv2.resize(colours, (width + 4 * count, height), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(np.stack([wide[:, 4 * i : 4 * i + width] for i in range(count)]))


def write(path: Path, frames: torch.Tensor, **options: Any) -> VideoWriter:
    with VideoWriter(path, width=frames.shape[2], height=frames.shape[1], **options) as writer:
        for batch in frames.split(3):
            writer.write(batch if writer.pixel_format == "bgr" else to_nv12(batch))
    return writer


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def pictures(path: Path) -> list[np.ndarray]:
    """The pictures as a player shows them, by the stream's tags."""
    return [frame.reformat(format="bgr24", dst_colorspace=Colorspace.DEFAULT).to_ndarray() for frame in decode(path)]


@pytest.mark.parametrize(
    ("codec", "suffix", "name", "bound"),
    [
        ("mjpeg", "mp4", "mjpeg", 33),
        ("mjpeg", "mkv", "mjpeg", 33),
        ("mjpeg", "mov", "mjpeg", 33),
        ("ffv1", "mkv", "ffv1", 38),
        ("ffv1", "mp4", "ffv1", 38),
        ("h264", "mp4", "h264", 33),
        ("hevc", "mp4", "hevc", 33),
        ("av1", "mp4", "libdav1d", 33),
        ("av1", "mkv", "libdav1d", 33),
    ],
)
def test_codec_in_container(codec: str, suffix: str, name: str, bound: float, tmp_path: Path) -> None:
    frames, path = moving_picture(192, 128), tmp_path / f"clip.{suffix}"
    write(path, frames, codec=codec)
    shown = decode(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == (name, 25)
        context = stream.codec_context
        tags = (int(context.colorspace), int(context.color_range))
    if codec == "mjpeg":
        assert (int(shown[0].colorspace), int(shown[0].color_range)) == (Colorspace.ITU601, ColorRange.JPEG)
    else:
        assert tags == (1, 1), "BT.709, limited range"
    assert [frame.time for frame in shown] == pytest.approx([i / 25 for i in range(COUNT)], abs=1e-3)
    quality = [cv2.PSNR(picture, frame.numpy()) for picture, frame in zip(pictures(path), frames, strict=True)]
    assert min(quality) > bound, quality
    wrong = frames.roll(1, dims=0)
    assert max(cv2.PSNR(p, f.numpy()) for p, f in zip(pictures(path), wrong, strict=True)) < bound


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_file_depends_on_nothing_but_what_is_written(suffix: str, tmp_path: Path) -> None:
    """Neither on chance, nor on FFmpeg's version."""
    contents = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.{suffix}"
        write(path, moving_picture(64, 48, count=3), codec="libx264")
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert f"Lavf{av.library_versions['libavformat'][0]}".encode() not in contents[0]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_a_writer_closes_its_sound(tmp_path: Path) -> None:
    sound = write_click(tmp_path / "click.wav", 0.5)

    def is_open() -> bool:
        return any(link.resolve() == sound for link in Path("/proc/self/fd").iterdir())

    with VideoWriter(tmp_path / "clip.mp4", width=64, height=48, sound=sound) as writer:
        assert is_open()
        writer.write(torch.zeros(12, 72, 64, dtype=torch.uint8))
    assert not is_open() and writer.frames == 12


def test_sound_stands_beside_its_picture(tmp_path: Path) -> None:
    """A player that reads a file as it comes would wait for sound at its end."""
    sound = write_click(tmp_path / "click.wav", 30)
    write(tmp_path / "clip.mp4", moving_picture(64, 48, count=30), fps=1, sound=sound)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        order = sorted((packet.pos, packet.stream.type) for packet in container.demux() if packet.size)
    assert "audio" in [kind for _, kind in order[:10]]


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_chroma_is_tagged_as_centred(codec: str, tmp_path: Path) -> None:
    """Only the parameter sets say so, and only FFmpeg's log shows them: a container has no such tag."""
    with VideoWriter(tmp_path / "clip.mp4", width=64, height=48, codec=codec) as writer:
        writer.write(torch.zeros(3, 72, 64, dtype=torch.uint8))
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        with av.open(str(tmp_path / "clip.mp4")) as container, av.logging.Capture() as log:
            stream = container.streams.video[0]
            trace = BitStreamFilterContext("trace_headers", stream)
            for packet in container.demux(stream):
                if packet.size:
                    trace.filter(packet)
    finally:
        av.logging.set_level(level)
    told = {text.split("= ")[1].strip() for _, _, text in log if "chroma_sample_loc_type_" in text}
    assert told == {"1"}


@pytest.mark.parametrize("format", ["nv12", "yuv420p"])
@pytest.mark.parametrize("height", [2, 62, 64])
def test_frames_are_fed_as_they_are(height: int, format: str) -> None:
    """Frames of any even height, also where they are not copied."""
    nv12 = np.random.default_rng(0).integers(256, size=(height * 3 // 2, 34), dtype=np.uint8)
    frame = host_frame(nv12, format)
    assert (frame.width, frame.height, frame.format.name) == (34, height, format)
    assert np.array_equal(frame.reformat(format="nv12").to_ndarray(), nv12)


def test_ffv1_keeps_every_bit(tmp_path: Path) -> None:
    nv12 = torch.randint(0, 256, (COUNT, 72, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with VideoWriter(tmp_path / "noise.mkv", width=64, height=48, codec="ffv1") as writer:
        writer.write(nv12)
    kept = np.stack([frame.reformat(format="nv12").to_ndarray() for frame in decode(tmp_path / "noise.mkv")])
    assert np.array_equal(kept, nv12.numpy())
    with VideoWriter(tmp_path / "noise.mp4", width=64, height=48, codec="h264", crf=0) as writer:
        writer.write(nv12)
    lossy = np.stack([frame.reformat(format="nv12").to_ndarray() for frame in decode(tmp_path / "noise.mp4")])
    assert not np.array_equal(lossy, kept)


@pytest.mark.parametrize(("crf", "scale"), [(0, 1), (14, 2), (20, 3), (26, 6), (32, 12), (51, 31)])
def test_jpeg_quantiser_doubles_every_six_steps(crf: int, scale: int) -> None:
    assert jpeg_quantiser(crf) == scale


@pytest.mark.parametrize("codec", ["mjpeg", "hevc", "av1", "libvpx-vp9"])
def test_quality_follows_crf(codec: str, tmp_path: Path) -> None:
    frames = moving_picture(192, 128)
    frames = (frames + torch.randint(0, 40, frames.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    sizes = []
    for crf in (0, 5, 20, 40):
        write(tmp_path / "clip.mp4", frames.to(torch.uint8), codec=codec, crf=crf)
        sizes.append((tmp_path / "clip.mp4").stat().st_size)
    assert sizes[0] >= sizes[1] > 1.3 * sizes[2] > 1.3**2 * sizes[3]


def test_quality_is_from_0_to_51(tmp_path: Path) -> None:
    for crf in (0, 51):
        write(tmp_path / "clip.mp4", moving_picture(64, 48, count=2), crf=crf)
    for crf in (-1, 52):
        with pytest.raises(InputError, match=f"^crf is {crf}; expected 0"):
            VideoWriter(tmp_path / "clip.mp4", width=64, height=48, crf=crf)


def test_best_quality_plays_everywhere(tmp_path: Path) -> None:
    """x264's own 0 is lossless, in a profile that few players know."""
    profiles = []
    for crf in (0, 20):
        write(tmp_path / "clip.mp4", moving_picture(64, 48, count=2), codec="libx264", crf=crf)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            profiles.append(container.streams.video[0].codec_context.profile)
    assert profiles == ["High", "High"]


def test_an_encoder_with_a_quality_of_its_own_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for codec, warnings in (("mpeg4", 1), ("libx264", 0), ("mjpeg", 0), ("ffv1", 0)):
        caplog.clear()
        write(tmp_path / "clip.mkv", moving_picture(64, 48, count=2), codec=codec, crf=30)
        told = [record.getMessage() for record in caplog.records if "is not told crf 30" in record.getMessage()]
        assert len(told) == warnings, codec


@pytest.mark.parametrize(("codec", "suffix"), [("libx264rgb", "mp4"), ("png", "mov")])
def test_encoders_of_rgb(codec: str, suffix: str, tmp_path: Path) -> None:
    """Tagged with a matrix, RGB would be taken for YCbCr."""
    frames = torch.tensor([200, 60, 30], dtype=torch.uint8).expand(2, 48, 64, 3).contiguous()
    write(tmp_path / f"clip.{suffix}", frames, codec=codec)
    shown = np.stack([frame.to_ndarray(format="bgr24") for frame in decode(tmp_path / f"clip.{suffix}")])
    with av.open(str(tmp_path / f"clip.{suffix}")) as container:
        assert container.streams.video[0].codec_context.color_range == ColorRange.JPEG
    assert np.abs(shown.astype(int) - frames.numpy()).max() <= 4


@pytest.mark.parametrize(
    ("codec", "suffix", "told"),
    [
        ("ffv1", ".mov", "ffv1; expected .mkv"),
        ("libsvtav1", ".mov", "libsvtav1; expected .mkv"),  # which shows only when the header is written
        ("png", ".mkv", "png; expected another codec"),
    ],
)
def test_container_that_cannot_hold_the_codec(codec: str, suffix: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"clip{suffix}: {suffix} cannot hold {told}")):
        VideoWriter(tmp_path / f"clip{suffix}", width=64, height=48, codec=codec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "tag"), [(".mp4", "hvc1"), (".mov", "hvc1"), (".mkv", "\0\0\0\0")])
def test_hevc_is_named_as_every_player_knows_it(suffix: str, tag: str, tmp_path: Path) -> None:
    """Matroska names codecs in its own way."""
    write(tmp_path / f"clip{suffix}", moving_picture(64, 48, count=2), codec="libx265")
    with av.open(str(tmp_path / f"clip{suffix}")) as container:
        assert container.streams.video[0].codec_context.codec_tag == tag


@pytest.mark.parametrize("size", [(720, 1280), (3840, 2160)])
def test_portrait_and_4k(size: tuple[int, int], tmp_path: Path) -> None:
    frames = moving_picture(*size, count=2)
    write(tmp_path / "clip.mp4", frames)
    shown = pictures(tmp_path / "clip.mp4")
    assert [picture.shape for picture in shown] == [(size[1], size[0], 3)] * 2
    assert min(cv2.PSNR(p, f.numpy()) for p, f in zip(shown, frames, strict=True)) > 33


def test_preset_trades_size_for_time(tmp_path: Path) -> None:
    frames, sizes = moving_picture(192, 128, count=20), []
    for preset in ("ultrafast", "medium"):
        write(tmp_path / "clip.mp4", frames, codec="libx264", preset=preset)
        sizes.append((tmp_path / "clip.mp4").stat().st_size)
    assert sizes[0] > 1.1 * sizes[1]


@pytest.mark.parametrize(
    ("codec", "preset", "message"),
    [
        ("libx264", "p4", r"^libx264 does not open with preset 'p4'"),
        ("libx265", "p4", r"^libx265 does not open with preset 'p4'"),
        ("mjpeg", "fast", "preset is 'fast' and mjpeg has none"),
    ],
)
def test_preset_that_is_not_there(codec: str, preset: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        VideoWriter(tmp_path / "clip.mp4", width=64, height=48, codec=codec, preset=preset)
    assert list(tmp_path.iterdir()) == []


# ── odd sizes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "even"), [((191, 128), (192, 128)), ((192, 127), (192, 128)), ((191, 127), (192, 128))]
)
@pytest.mark.parametrize("codec", ["h264", "hevc", "ffv1"])
def test_odd_size_repeats_the_edge(
    codec: str, size: tuple[int, int], even: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = moving_picture(*size, count=2)
    writer = write(tmp_path / "clip.mkv", frames, codec=codec)
    assert writer.pixel_format == "bgr"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert f"frames are {size[0]}×{size[1]}" in said[0]
    assert f"the video is {even[0]}×{even[1]}" in said[0]
    shown = pictures(tmp_path / "clip.mkv")
    assert {picture.shape for picture in shown} == {(even[1], even[0], 3)}
    for picture, frame in zip(shown, frames.numpy(), strict=True):
        assert cv2.PSNR(np.ascontiguousarray(picture[: size[1], : size[0]]), frame) > 33
        expected = np.pad(frame, ((0, even[1] - size[1]), (0, even[0] - size[0]), (0, 0)), mode="edge")
        assert cv2.PSNR(picture, expected) > 33, "no black or shifted edge"


def test_padding_repeats_the_last_column_and_row() -> None:
    frames = torch.arange(2 * 3 * 5 * 3, dtype=torch.uint8).reshape(2, 3, 5, 3)
    padded = pad_to_even(frames)
    assert padded.shape == (2, 4, 6, 3)
    assert torch.equal(padded[:, :3, :5], frames)
    assert torch.equal(padded[:, :3, 5], frames[:, :, 4])
    assert torch.equal(padded[:, 3], padded[:, 2])
    assert pad_to_even(padded) is padded


def test_odd_template_renders(
    pipeline: FrameGenerationPipeline, make_template: Callable[..., Path], tmp_path: Path
) -> None:
    template = make_template(tmp_path / "template", frames=2, size=(191, 127))
    features = np.zeros((3, 512), np.float32)
    pipeline.generate_video(features, template, None, tmp_path / "clip.mp4", crf=10)
    paths = pipeline.generate_frames_only(features, template, tmp_path / "frames", image_format="png")
    assert [Path(path).name for path in paths] == [f"frame_{i:05d}.png" for i in range(3)]
    for picture, path in zip(pictures(tmp_path / "clip.mp4"), paths, strict=True):
        assert cv2.PSNR(np.ascontiguousarray(picture[:127, :191]), cv2.imread(path)) > 33


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_png_frames_are_the_frames(
    pipeline: FrameGenerationPipeline, make_template: Callable[..., Path], tmp_path: Path
) -> None:
    template = make_template(tmp_path / "template", frames=3)
    features = np.ones((4, 512), np.float32)
    paths = pipeline.generate_frames_only(features, template, tmp_path / "frames", image_format="png")
    frames = pipeline.generator.generate_frames_from_template_sequence(
        template / "full_body_img", template / "landmarks", features
    )
    assert len(paths) == len(frames) == 4
    assert all(np.array_equal(cv2.imread(path), frame) for path, frame in zip(paths, frames, strict=True))


def test_unknown_image_format(
    pipeline: FrameGenerationPipeline, make_template: Callable[..., Path], tmp_path: Path
) -> None:
    template = make_template(tmp_path / "template", frames=2)
    with pytest.raises(InputError, match="image format is 'bmp'; expected jpeg or png"):
        pipeline.generate_frames_only(
            np.ones((2, 512), np.float32), template, tmp_path / "frames", image_format="bmp"  # type: ignore[arg-type]
        )  # fmt: skip
    assert not (tmp_path / "frames").exists()
