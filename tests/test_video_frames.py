"""A video's frames: the right frame however it is reached, with the right colours."""

from __future__ import annotations

import contextlib
import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from template_videos import FRAMES, HEIGHT, WIDTH, decoded, pictures, write_video

from gpupipe import InputError
from gpupipe.doctor import _nvdec_obstacle
from gpupipe.fallbacks import fallbacks
from gpupipe.kernels.nv12 import from_nv12, to_nv12
from gpupipe.schedule import template_indices
from gpupipe.video.frames import BT709, Colours, VideoFrames, to_bt709

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


def test_one_thread_decodes_at_a_time(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that two threads ask at once ends the process."""
    met: list[bool] = []
    meet = threading.Barrier(2, action=lambda: met.append(True))
    frames = VideoFrames(video)

    def decode(number: int) -> torch.Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(0.2)
        return torch.zeros(3)

    monkeypatch.setattr(frames, "_frame", decode)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(frames.read, [[30], [5]]))
    assert met == []


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


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"is_corrupt": True}, "frame 0 cannot be decoded; expected a whole video file"),
        ({"width": 64}, "frame 0 is 64×128; expected 192×128 as the first"),
        ({"height": 64}, "frame 0 is 192×64; expected 192×128 as the first"),
    ],
)
def test_a_frame_that_is_not_as_it_should_be_is_refused(fault: dict[str, Any], told: str, video: Path) -> None:
    """One that the decoder calls corrupt, or of another size, as a stream may change it."""
    frames = VideoFrames(video)
    given: Any = Mock(**{"pts": frames._times[0], "is_corrupt": False, "width": WIDTH, "height": HEIGHT} | fault)
    frames._frames = iter([given])
    with pytest.raises(InputError, match=rf"template\.mp4: {told}"):
        frames.read([0])


def begun_later(path: Path, target: Path, frames: int) -> Path:
    """A copy whose edit list skips the first frames, as when phones or ``ffmpeg -ss … -c copy`` cut a clip."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12  # version and flags, count, then duration in ms, media time, rate
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "big") - 40 * frames).to_bytes(4, "big")
    content[at + 4 : at + 8] = (int.from_bytes(content[at + 4 : at + 8], "big") + 512 * frames).to_bytes(4, "big")
    target.write_bytes(content)
    return target


def without_packets(path: Path, target: Path, left_out: int) -> Path:
    """A copy without the first packets, to which later ones refer."""
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
        (without_packets, "mp4", 12),  # at one to which frames before and after it refer
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


def with_hidden_packets(path: Path, target: Path, every: int) -> Path:
    """A copy of a VP8 video in which now and then a packet comes twice, first as one that is not shown."""
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.pts is not None):
            if number % every == 1:
                first, *rest = bytes(packet)
                hidden = av.Packet(bytes([first & ~0x10, *rest]))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.stream = stream
                container.mux(hidden)
            packet.stream = stream
            container.mux(packet)
    return target


def test_packets_that_are_not_shown(tmp_path: Path) -> None:
    """libvpx makes some in two passes, for later frames to refer to; PyAV has no second pass."""
    whole = write_video(tmp_path / "whole.webm", pictures(20), codec="libvpx")
    path = with_hidden_packets(whole, tmp_path / "clip.webm", 8)
    expected, frames = decoded(path), VideoFrames(path)
    assert frames.length == len(expected) == 20
    assert not torch.equal(expected, decoded(whole)), "they are referred to"
    for number in (19, 3, 4, 0, 1, 17):
        assert torch.equal(frames.read([number])[0], to_bt709(expected[number], frames.colours)), number


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files and threads in /proc")
def test_a_file_is_closed_after_its_last_user(video: Path, tmp_path: Path) -> None:
    """At once, not when Python looks for cycles; also a file that is refused when it is open."""
    turned = write_video(tmp_path / "turned.mp4", pictures(2), rotation=90)

    def held(kind: str) -> int:
        return len(list(Path("/proc/self", kind).iterdir()))

    gc.disable()
    try:
        files, frames = held("fd"), VideoFrames(video)
        threads = held("task")  # with one decoder's
        del frames
        for _ in range(4):
            VideoFrames(video).read([1])
            with pytest.raises(InputError, match="upright"):
                VideoFrames(turned)
        assert (held("fd"), held("task") <= threads) == (files, True)
    finally:
        gc.enable()


def test_a_closed_file_is_not_read(video: Path) -> None:
    frames = VideoFrames(video)
    frames.read([0])
    frames.close()
    frames.close()
    for number in (0, FRAMES - 1):
        with pytest.raises(InputError, match="is closed; expected an open video file"):
            frames.read([number])


CLOSE = """
import av.logging, contextlib, gc, logging, sys
from gpupipe import InputError
from gpupipe.video.frames import VideoFrames

av.logging.set_level(av.logging.ERROR)
logging.disable()
for _ in range(20):
    frames = None
    with contextlib.suppress(InputError):
        frames = VideoFrames(sys.argv[1])
        frames.read([0])
    frames = None
    gc.collect()
"""


def test_a_broken_file_is_closed_while_pyav_logs(tmp_path: Path) -> None:
    """As it does where the program imports torchvision up to 0.25: the decoder's threads then need Python's lock to end
    what they are at."""
    noise = np.random.default_rng(0).integers(256, size=(360, 640, 3), dtype=np.uint8)
    path = tmp_path / "broken.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for shift in range(40):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 7 * shift, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = np.fromfile(path, np.uint8)
    data[len(data) // 10 : len(data) * 9 // 10 : 997] ^= 0x55
    data.tofile(path)
    subprocess.run([sys.executable, "-c", CLOSE, str(path)], check=True, timeout=100)


# ── which colours ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (1280, 96), (WIDTH, 578)])
@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("extent", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("space", [Colorspace.ITU709, Colorspace.ITU601])
def test_colours_by_their_tags(
    space: Colorspace, extent: ColorRange, tagged: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    if not tagged:  # the default for video of that size
        space, extent = (Colorspace.ITU601 if size == (WIDTH, HEIGHT) else Colorspace.ITU709), ColorRange.MPEG
    images = pictures(2, size)
    path = write_video(tmp_path / "clip.mp4", images, space=space, extent=extent, tagged=tagged, crf="1")
    frames = VideoFrames(path)
    matrix = "bt709" if space == Colorspace.ITU709 else "bt601"
    assert frames.colours == Colours(matrix, full_range=extent == ColorRange.JPEG)
    assert frames.names_colours == tagged
    ntsc: Any = Mock(colorspace=6, color_range=1, format=av.VideoFormat("yuv420p"))
    assert frames._colours_of(ntsc) == Colours("bt601", full_range=False), "by its other number"
    found = cv2.PSNR(from_nv12(frames.read([1]))[0].numpy(), images[1])
    assert found > 36
    if frames.colours != BT709:
        untouched = cv2.PSNR(from_nv12(decoded(path)[1:])[0].numpy(), images[1])
        assert untouched < found - 6, "negative control: taken for BT.709 in limited range"


def test_few_large_frames_are_kept(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 of 8K would take 1.6 GB."""
    monkeypatch.setattr("gpupipe.video.frames._RECENT_BYTES", 4 * WIDTH * HEIGHT * 3 // 2)
    frames = VideoFrames(video)
    for number in range(FRAMES):
        frames.read([number])
    assert list(frames._recent) == [FRAMES - 4, FRAMES - 3, FRAMES - 2, FRAMES - 1]


@pytest.mark.parametrize("colours", [Colours("bt601", False), Colours("bt709", True), Colours("bt601", True)])
def test_conversion_of_colours_agrees_with_ffmpeg(colours: Colours) -> None:
    """Within a step and a half of swscale's conversion of the same samples by way of RGB."""
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


@pytest.mark.parametrize(
    ("codec", "pixel_format", "extent"),
    [
        ("ffv1", "gray", ColorRange.MPEG),
        ("ffv1", "gray10le", ColorRange.MPEG),
        ("ffv1", "gray", ColorRange.JPEG),
        ("ffv1", "gray", ColorRange.UNSPECIFIED),  # FFmpeg takes it for full
        ("png", "gray", ColorRange.JPEG),
        ("png", "ya8", ColorRange.JPEG),
    ],
)
def test_grey(codec: str, pixel_format: str, extent: ColorRange, tmp_path: Path) -> None:
    """Luma of limited range stays as it is. Grey needs no matrix: PNG tags it as RGB."""
    levels = np.arange(16, 236, dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(np.tile(levels, (48, 1)), format="gray").reformat(format=pixel_format)
    frame.color_range = extent
    luma = levels if extent == ColorRange.MPEG else np.floor(levels * (219 / 255) + 16.5)
    found = VideoFrames(write_frame(tmp_path / "clip.mov", frame, codec)).read([0])[0].numpy()
    assert np.abs(found[:48].astype(int) - luma).max() <= (pixel_format == "gray10le")
    assert (found[48:] == 128).all()


def write_frame(path: Path, frame: av.VideoFrame, codec: str) -> Path:
    """Encode a frame as it is."""
    with av.open(str(path), "w", format="matroska" if codec == "ffv1" else None) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        stream.codec_context.color_range = frame.color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_palette(tmp_path: Path) -> None:
    palette = np.zeros((256, 4), np.uint8)
    palette[7] = (255, 200, 60, 30)  # alpha, red, green, blue
    frame = av.VideoFrame.from_ndarray((np.full((48, 64), 7, np.uint8), palette), format="pal8")
    found = from_nv12(VideoFrames(write_frame(tmp_path / "clip.mov", frame, "png")).read([0]))
    assert (found[0].int() - torch.tensor([30, 60, 200])).abs().max() <= 2


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_nvdec_threads_decode(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FFmpeg does without a GPU; the reason is logged once."""
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
    """As NVDEC's surfaces are, here with frames in host memory: planes with padding, handed over by DLPack."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    frames = VideoFrames(video)
    frames.decoder = "nvdec"
    with av.open(str(video)) as container:
        surface = next(container.decode(video=0)).reformat(width=150, height=90, format="nv12")
    assert surface.planes[0].line_size > 150
    pixels, expected = frames._pixels(surface), surface.to_ndarray()
    del surface
    assert np.array_equal(pixels.numpy(), expected)


class Surface:
    """In place of NVDEC's frame: planes with padding on the device, everything else as in a host frame. As in PyAV 17,
    only DLPack tells its pixel format. ``left`` columns are not cropped off."""

    def __init__(self, frame: av.VideoFrame, left: int = 0) -> None:
        self._frame, self.width = frame, frame.width + left
        pixels = torch.from_numpy(frame.reformat(format="nv12").to_ndarray())
        memory = torch.zeros(len(pixels), frame.width + 64, dtype=torch.uint8, device="cuda")
        memory[:, : frame.width] = pixels.cuda()
        luma, chroma = memory[: frame.height, : frame.width], memory[frame.height :, : frame.width]
        self.planes = [Mock(__dlpack__=plane.__dlpack__) for plane in (luma, chroma.unflatten(1, (-1, 2)))]

    def __getattr__(self, name: str) -> Any:
        if name == "sw_format":
            raise AttributeError(name)
        return getattr(self._frame, name)


@pytest.mark.cuda
@pytest.mark.parametrize(("left", "decoder"), [(0, "nvdec"), (8, "threads")])
def test_surfaces_become_frames(left: int, decoder: str, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything except the driver's part."""
    opened = av.open

    def open_file(path: str, **options: Any) -> Any:
        container = opened(path)
        if not options:
            return container
        return Mock(
            wraps=container,
            streams=container.streams,
            decode=lambda video: (Surface(frame, left) for frame in container.decode(video=video)),
        )

    monkeypatch.setattr(av, "open", open_file)
    monkeypatch.setattr("gpupipe.video.frames.HWAccel", Mock())
    found = VideoFrames(video, device="cuda")
    assert found.decoder == decoder, fallbacks()
    for numbers in ([0, 1, 2], [FRAMES - 1], [20, 19, 18]):
        assert torch.equal(found.read(numbers).cpu(), decoded(video)[numbers])


@pytest.mark.cuda
@pytest.mark.hardware
def test_nvdec_decodes_the_same_bits(tmp_path: Path) -> None:
    """H.264 leaves a decoder no freedom. Frames are larger than in other tests: not every GPU decodes small ones."""
    path = write_video(tmp_path / "clip.mp4", pictures(FRAMES, (640, 352)))
    on_gpu, on_cpu = VideoFrames(path, device="cuda"), VideoFrames(path)
    if (reason := _nvdec_obstacle()) is not None:
        pytest.skip(f"no NVDEC here: {reason}")
    assert on_gpu.decoder == "nvdec", fallbacks()
    for numbers in ([0, 1, 2], [FRAMES - 1], [20, 19, 18], list(range(FRAMES))):
        assert torch.equal(on_gpu.read(numbers).cpu(), on_cpu.read(numbers))
