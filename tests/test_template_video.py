"""A video as the template: the right frame whatever the way to it, its pixels kept, its colours understood."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from clips import cached
from conftest import write_landmarks
from torch import Tensor

from gpupipe import FrameGenerationPipeline, InputError, Template
from gpupipe.avatar import Avatar
from gpupipe.doctor import _nvdec_obstacle
from gpupipe.fallbacks import fallbacks
from gpupipe.kernels.nv12 import from_nv12, to_nv12
from gpupipe.schedule import template_indices
from gpupipe.video.frames import BT709, Colours, VideoFrames, to_bt709

WIDTH, HEIGHT, FRAMES = 192, 128, 40
BOXES = [(40 + i % 7, 30 + i % 5, 61 + i % 3) for i in range(FRAMES)]
"""Odd and even, so that some cut through 2×2 cells."""


def pictures(count: int = FRAMES, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[np.ndarray]:
    """Smooth colours that move, BGR, no two alike."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(256, size=(6, 9, 3)).astype(np.float32)
    wide = cv2.resize(coarse, (size[0] + 3 * count, size[1]), interpolation=cv2.INTER_CUBIC)
    return [np.clip(wide[:, 3 * i :][:, : size[0]] * 0.9 + i, 0, 255).astype(np.uint8) for i in range(count)]


def write_video(
    path: Path,
    images: list[np.ndarray],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    space: Colorspace | int = Colorspace.ITU709,
    extent: ColorRange = ColorRange.MPEG,
    tagged: bool = True,
    rotation: int = 0,
    **options: str,
) -> Path:
    """Encode BGR images; ``space`` and ``extent`` are what FFmpeg converts them to, and the tags if there are any."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "12", "g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], images[0].shape[0], pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        if tagged:
            context = stream.codec_context
            context.colorspace, context.color_range = space, extent
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame = frame.reformat(format=pixel_format, dst_colorspace=space, dst_color_range=extent)
            if not tagged:
                frame = av.VideoFrame.from_ndarray(frame.to_ndarray(), format=pixel_format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> Tensor:
    """All frames by FFmpeg alone, in one go, as NV12."""
    with av.open(str(path)) as container:
        planes = [frame.to_ndarray() for frame in container.decode(video=0)]
    nv12 = []
    for plane in planes:
        height = plane.shape[0] * 2 // 3
        u, v = plane[height:].reshape(2, -1)
        nv12.append(np.concatenate([plane[:height], np.stack([u, v], axis=1).reshape(height // 2, -1)]))
    return torch.from_numpy(np.stack(nv12))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty frames with B-frames, keyframes twelve apart, and groups of pictures that refer across them."""
    path = tmp_path_factory.mktemp("video") / "template.mp4"
    return write_video(path, pictures(), **{"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12:min-keyint=12"})


@pytest.fixture
def folder(video: Path, tmp_path: Path) -> Path:
    """A template directory; each test spoils its own."""
    return write_template(tmp_path / "avatar", video)


def write_template(folder: Path, video: Path) -> Path:
    (folder / "landmarks").mkdir(parents=True)
    (folder / f"template{video.suffix}").write_bytes(video.read_bytes())
    for i, box in enumerate(BOXES):
        write_landmarks(folder / "landmarks" / f"{i}.lms", box)
    return folder


# ── which frame ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clip_is_what_the_tests_need(video: Path) -> None:
    with av.open(str(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    assert sum(packet.is_keyframe for packet in packets) >= 3
    assert [packet.pts for packet in packets] != sorted(packet.pts for packet in packets), "there are B-frames"
    frames = decoded(video)
    assert len(frames) == FRAMES
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(frames))


ORDERS: dict[str, list[int]] = {
    "forwards": list(range(FRAMES)),
    "backwards": list(range(FRAMES - 1, -1, -1)),
    "there and back": template_indices(0, 100, FRAMES).tolist(),
    "anyhow": np.random.default_rng(0).integers(FRAMES, size=30).tolist(),
    "ends": [FRAMES - 1, 0, FRAMES - 1, 1, FRAMES - 2, 12, 11, 24],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("batch", "recent"), [(1, 32), (1, 2), (5, 2)])
def test_every_way_leads_to_the_same_frames(
    batch: int, recent: int, order: str, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpupipe.video.frames._RECENT", recent)
    expected, frames = decoded(video), VideoFrames(video)
    assert (frames.length, frames.width, frames.height, frames.decoder) == (FRAMES, WIDTH, HEIGHT, "threads")
    for start in range(0, len(ORDERS[order]), batch):
        numbers = ORDERS[order][start : start + batch]
        assert torch.equal(frames.read(numbers), expected[numbers]), numbers


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("mov", "mjpeg"), ("webm", "libvpx"), ("mp4", "libx265")]
)
def test_other_containers_and_codecs(suffix: str, codec: str, tmp_path: Path) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    form = {"pixel_format": "yuvj420p", "extent": ColorRange.JPEG} if codec == "mjpeg" else {}
    path = write_video(tmp_path / f"clip.{suffix}", pictures(20), codec=codec, **form, **options)
    expected, frames = decoded(path), VideoFrames(path)
    for number in (19, 3, 4, 0, 12):
        assert torch.equal(frames.read([number])[0], to_bt709(expected[number], frames.colours))


def begun_later(path: Path, target: Path, frames: int) -> Path:
    """A copy whose edit list leaves out the first frames, as phones and ``ffmpeg -ss … -c copy`` cut a clip."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12  # version and flags, count, then duration in ms, media time, rate
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "big") - 40 * frames).to_bytes(4, "big")
    content[at + 4 : at + 8] = (int.from_bytes(content[at + 4 : at + 8], "big") + 512 * frames).to_bytes(4, "big")
    target.write_bytes(content)
    return target


def without_packets(path: Path, target: Path, left_out: int) -> Path:
    """A copy without the first packets: others refer to what was in them."""
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.pts is not None][left_out:]:
            packet.stream = stream
            container.mux(packet)
    return target


@pytest.mark.parametrize(
    ("cut", "suffix", "amount"),
    [
        (begun_later, "mp4", 5),
        (begun_later, "mp4", 13),
        (begun_later, "mp4", 30),  # no keyframe is left
        (without_packets, "mkv", 9),  # between keyframes
        (without_packets, "mp4", 12),  # at one, which frames before it and after it refer to
    ],
)
def test_clips_that_are_cut_anywhere(
    cut: Callable[[Path, Path, int], Path], suffix: str, amount: int, tmp_path: Path
) -> None:
    """The frames are those that a player shows."""
    keys = {"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12:min-keyint=12"}
    if amount == 30:
        keys = {"g": "250"}
    path = cut(write_video(tmp_path / "whole.mp4", pictures(), **keys), tmp_path / f"cut.{suffix}", amount)
    expected, frames = decoded(path), VideoFrames(path)
    assert 0 < frames.length == len(expected) < FRAMES
    for number in (*range(frames.length), *reversed(range(frames.length)), frames.length // 2, 0):
        assert torch.equal(frames.read([number])[0], expected[number]), number


def test_keyframes_from_which_a_decoder_has_yet_to_recover(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", pictures(), **{"x264-params": "intra-refresh=1:bframes=2:keyint=12"})
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) >= 3
    expected, frames = decoded(path), VideoFrames(path)
    for number in (39, 20, 36, 37, 0, *reversed(range(FRAMES)), 12, 30):
        assert torch.equal(frames.read([number])[0], expected[number]), number


@pytest.mark.parametrize("budget", [0, 5 * WIDTH * HEIGHT * 3, None])
def test_template_keeps_what_fits(budget: int | None, folder: Path, video: Path) -> None:
    template, expected = Template.from_directory(folder, memory_budget=budget), decoded(video)
    assert (template.length, template.width, template.height) == (FRAMES, WIDTH, HEIGHT)
    assert template.frames.capacity == {0: 0, None: FRAMES}.get(budget, template.frames.capacity)
    xmin, ymin, xmax, ymax = template.window
    assert (xmin, ymin, xmax, ymax) == (40, 30, 110, 98)
    for start in range(0, 60, 4):
        numbers = template_indices(start, start + 4, FRAMES)
        found = cached(template.frames, numbers)
        assert torch.equal(found["nv12"], expected[numbers])
        assert torch.equal(found["frame"], from_nv12(expected[numbers])[:, ymin:ymax, xmin:xmax])
    assert torch.equal(
        template.boxes + torch.tensor([xmin, ymin, xmin, ymin]),
        torch.tensor([(x, y, x + side, y + side) for x, y, side in BOXES]),
    )


# ── which pixels ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Painter:
    """An engine that paints noise: the same for the same image and window."""

    name, device, dtype = "noise", torch.device("cpu"), torch.float32

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        return {"mean": image.mean(dim=(2, 3))}

    def decode(self, features: dict[str, Tensor], index: Tensor, audio: Tensor) -> Tensor:
        tone = features["mean"][index, :3] + audio.mean(dim=(1, 2, 3))[:, None]
        noise = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
        return (tone[..., None, None] + noise) % 1


@pytest.mark.parametrize(("feather", "use_parsing"), [(0.0, False), (8.0, False), (8.0, True)])
def test_rendered_frames(
    use_parsing: bool, feather: float, folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch,
    make_template: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    """In the box as from images of the same pixels; outside it the decoded source, bit for bit."""
    source = decoded(video)
    images = make_template(tmp_path / "images", FRAMES, size=(WIDTH, HEIGHT), box=BOXES, parsing=True)
    (images / "parsing").rename(folder / "parsing")
    monkeypatch.setattr(  # images that no JPEG could hold
        "gpupipe.template.read_images",
        lambda paths, *, device, exact=True: (
            from_nv12(source[[int(path.stem) for path in paths]])
            if paths[0].suffix == ".jpg"
            else torch.stack([torch.from_numpy(cv2.imread(str(path))) for path in paths])
        ),
    )
    parsing = folder / "parsing" if use_parsing else None
    templates = (
        Template(folder / "template.mp4", folder / "landmarks", parsing),
        Template(images / "full_body_img", images / "landmarks", parsing),
    )
    frames, audio = np.array([3, 8, 8, 21]), torch.rand(4, 32, 16, 16)
    ours, theirs = (Avatar(template, Painter(), feather=feather).render(frames, audio) for template in templates)
    assert torch.equal(ours, theirs), "BGR: equal everywhere"

    ours, theirs = (
        Avatar(template, Painter(), pixel_format="nv12", feather=feather).render(frames, audio)
        for template in templates
    )
    assert torch.equal(source, decoded(video)), "the cache is not painted into"
    for k, i in enumerate(frames):
        x, y, side = BOXES[i]
        box = np.s_[y : y + side, x : x + side]
        assert torch.equal(ours[k][:HEIGHT][box], theirs[k][:HEIGHT][box])
        luma, chroma = (ours[k] != source[i]).split((HEIGHT, HEIGHT // 2))
        assert luma[box].float().mean() > 0.2, "painted"
        luma[box] = False
        assert not luma.any(), "outside the box"
        chroma[y // 2 : (y + side + 1) // 2, x // 2 * 2 : (x + side + 1) // 2 * 2] = False
        assert not chroma.any(), "outside the cells that the box touches"
        outside = theirs[k] != source[i]
        outside[y // 2 * 2 : y + side + 1, x // 2 * 2 : x + side + 1] = False
        assert outside[:HEIGHT].any(), "negative control: through BGR and back is not bit for bit"


@pytest.mark.parametrize("kind", ["video", "images"])
def test_a_frame_by_itself_is_painted_into_no_cache(
    kind: str, folder: Path, make_template: Callable[..., Path], tmp_path: Path
) -> None:
    if kind == "images":
        folder = make_template(tmp_path / "images", 4)
    template = Template.from_directory(folder)
    one, frame, audio = Avatar(template, Painter(), pixel_format="nv12"), np.array([2]), torch.rand(1, 32, 16, 16)
    first = one.render(frame, audio).clone()
    assert not torch.equal(one.render(frame, audio * 0), first)
    assert torch.equal(one.render(frame, audio), first)
    kept, fresh = cached(template.frames, frame), cached(Template.from_directory(folder).frames, frame)
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh)
    again = one.render(frame, audio)
    one.render(frame, audio * 0)
    assert torch.equal(again, first), "nor into what was given away"


def test_video_of_a_video(folder: Path, video: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """To a file without loss and back: outside the boxes it is the source; saving frames beside it changes nothing."""
    pipeline = FrameGenerationPipeline(tiny_checkpoint(), "ave", "cpu", engine="eager", batch_size=3)
    pipeline.unet_model.engine = Painter()
    features, start = np.abs(np.random.default_rng(1).standard_normal((8, 512))).astype(np.float32), FRAMES - 5
    outputs = [tmp_path / "plain.mkv", tmp_path / "saved.mkv"]
    for output in outputs:
        pipeline.generate_video(features, folder, None, output, start, codec="ffv1", save_frames="saved" in output.name)
    source, (plain, saved) = decoded(video), map(decoded, outputs)
    assert torch.equal(plain, saved)
    assert len(plain) == 8
    for frame, i in zip(plain, template_indices(0, 8, FRAMES, start), strict=True):
        x, y, side = BOXES[i]
        outside = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        outside[y : y + side, x : x + side] = False
        assert torch.equal(frame[:HEIGHT][outside], source[i][:HEIGHT][outside])
    last = cv2.imread(str(tmp_path / "saved_frames" / "frame_00007.jpg"))
    before, same = from_nv12(plain[6:]).numpy()
    assert cv2.PSNR(last, same) > max(30, cv2.PSNR(last, before) + 3), "a JPEG of noise, but of this frame"


# ── which colours ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (1280, 96)])
@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("extent", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("space", [Colorspace.ITU709, Colorspace.ITU601])
def test_colours_by_their_tags(
    space: Colorspace, extent: ColorRange, tagged: bool, size: tuple[int, int], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if not tagged:  # what stands there for video of that size
        space, extent = (Colorspace.ITU709 if size[0] == 1280 else Colorspace.ITU601), ColorRange.MPEG
    images = pictures(2, size)
    path = write_video(tmp_path / "clip.mp4", images, space=space, extent=extent, tagged=tagged, crf="1")
    frames = VideoFrames(path)
    matrix = "bt709" if space == Colorspace.ITU709 else "bt601"
    assert frames.colours == Colours(matrix, full_range=extent == ColorRange.JPEG)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (not tagged)
    found = cv2.PSNR(from_nv12(frames.read([1]))[0].numpy(), images[1])
    assert found > 36
    if frames.colours != BT709:
        untouched = cv2.PSNR(from_nv12(decoded(path)[1:])[0].numpy(), images[1])
        assert untouched < found - 6, "negative control: taken for BT.709 in limited range"


@pytest.mark.parametrize("colours", [Colours("bt601", False), Colours("bt709", True), Colours("bt601", True)])
def test_conversion_of_colours_agrees_with_ffmpeg(colours: Colours) -> None:
    """Within a step and a half of what swscale makes of the same samples on the way through RGB."""
    image = np.full((64, 64, 3), (30, 200, 120), np.uint8)
    space = Colorspace.ITU709 if colours.matrix == "bt709" else Colorspace.ITU601
    extent = ColorRange.JPEG if colours.full_range else ColorRange.MPEG
    frame = av.VideoFrame.from_ndarray(image, format="bgr24")
    source = frame.reformat(format="nv12", dst_colorspace=space, dst_color_range=extent).to_ndarray()
    expected = to_nv12(torch.from_numpy(image)[None])[0]
    assert (to_bt709(torch.from_numpy(source), colours).int() - expected).abs().max() <= 2
    assert (torch.from_numpy(source).int() - expected).abs().max() > 4, "negative control"


@pytest.mark.parametrize(("pixel_format", "bound"), [("yuv444p", 36), ("yuv422p", 36), ("yuv420p10le", 36)])
def test_other_pixel_formats(pixel_format: str, bound: float, tmp_path: Path) -> None:
    images = pictures(2)
    for space in (Colorspace.ITU709, Colorspace.ITU601):
        path = write_video(tmp_path / "clip.mp4", images, pixel_format=pixel_format, space=space, crf="1")
        frame = from_nv12(VideoFrames(path).read([1]))[0].numpy()
        assert cv2.PSNR(frame, images[1]) > bound


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(folder: Path) -> None:
    (folder / "template.mp4").write_text("this is no video\n")


def cut(folder: Path) -> None:
    """A whole index, and pictures that end before it says so."""
    path = folder / "template.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def spoiled(folder: Path) -> None:
    """Noise where a picture was."""
    path = folder / "template.mp4"
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + 4 + (content.index(b"moov") - content.index(b"mdat")) // 2
    content[middle : middle + 4000] = np.random.default_rng(0).integers(256, size=4000, dtype=np.uint8).tobytes()
    path.write_bytes(content)


def few(folder: Path) -> None:
    (folder / "landmarks" / f"{FRAMES - 1}.lms").unlink()


def odd(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(FRAMES, (191, 127)), pixel_format="yuv444p")


def turned(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(), rotation=90)


def wide_gamut(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(2), space=9)  # BT.2020; the enum has a name for it from PyAV 18 on


def sound_only(folder: Path) -> None:
    with av.open(str(folder / "template.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def also_images(folder: Path) -> None:
    (folder / "full_body_img").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (text, r"template\.mp4: not a video that FFmpeg decodes"),
        (cut, r"template\.mp4: has \d+ frames; expected 40, one for each landmark file"),
        (spoiled, r"template\.mp4: frame \d+ cannot be decoded|template\.mp4: not a video that FFmpeg decodes"),
        (few, r"template\.mp4: has 40 frames; expected 39, one for each landmark file in .*landmarks"),
        (odd, r"template\.mp4: frames are 191×127; expected even sizes"),
        (turned, r"template\.mp4: is to be turned by 90° when shown"),
        (wide_gamut, r"template\.mp4: its colour matrix has number 9 .*expected BT\.709 or BT\.601"),
        (sound_only, r"template\.mp4: has no picture"),
        (also_images, r"holds full_body_img and template\.mp4; expected one of them"),
    ],
)
def test_bad_video(spoil: Callable[[Path], Any], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        Template.from_directory(folder)
    assert "\n" not in str(caught.value)


def test_broken_link_is_told_as_one(folder: Path) -> None:
    (folder / "template.mp4").unlink(missing_ok=True)
    (folder / "template.mp4").symlink_to("moved-away.mp4")
    with pytest.raises(InputError, match=r"template\.mp4: no such video file"):
        Template.from_directory(folder)


def test_no_template_at_all(folder: Path) -> None:
    (folder / "template.mp4").rename(folder / "template.avi")
    with pytest.raises(InputError, match=r"full_body_img: no such directory"):
        Template.from_directory(folder)
    with pytest.raises(InputError, match=r"template\.mp4: no such video file"):
        Template(folder / "template.mp4", folder / "landmarks")


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_nvdec_threads_decode(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What FFmpeg does where it finds no GPU; why is said once."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    refused = RuntimeError("no stream is compatible")
    monkeypatch.setattr("gpupipe.video.frames.HWAccel", lambda *_, **__: (_ for _ in ()).throw(refused))
    noted: list[str] = []
    monkeypatch.setattr("gpupipe.video.frames.note_fallback", noted.append)
    frames = VideoFrames(video, device="cuda")
    assert frames.decoder == "threads"
    assert noted == ["NVDEC does not take template.mp4 (no stream is compatible): the CPU decodes it"]


def test_surfaces_are_copied_out(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVDEC's are, of frames in the host's memory: planes with padding, handed over by DLPack."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    frames = VideoFrames(video)
    frames.decoder = "nvdec"
    with av.open(str(video)) as container:
        surface = next(container.decode(video=0)).reformat(width=150, height=90, format="nv12")
    assert surface.planes[0].line_size > 150
    pixels, expected = frames._pixels(surface), surface.to_ndarray()
    del surface
    assert np.array_equal(pixels.numpy(), expected)


@pytest.mark.cuda
@pytest.mark.hardware
def test_nvdec_decodes_the_same_bits(tmp_path: Path) -> None:
    """H.264 leaves no freedom to a decoder; not every GPU decodes frames as small as the other tests'."""
    path = write_video(tmp_path / "clip.mp4", pictures(FRAMES, (640, 352)))
    on_gpu, on_cpu = VideoFrames(path, device="cuda"), VideoFrames(path)
    if (reason := _nvdec_obstacle()) is not None:
        pytest.skip(f"no NVDEC here: {reason}")
    assert on_gpu.decoder == "nvdec", fallbacks()
    for numbers in ([0, 1, 2], [FRAMES - 1], [20, 19, 18], list(range(FRAMES))):
        assert torch.equal(on_gpu.read(numbers).cpu(), on_cpu.read(numbers))
