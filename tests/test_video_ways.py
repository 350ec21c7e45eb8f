"""Which way a video is encoded, and the ways with NVENC and nvJPEG, as far as they can be tested without a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch

from gpupipe import DeviceError, InputError
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.video import ways
from gpupipe.video.codecs import PictureFormat, configure
from gpupipe.video.cuda import JpegEncoder, NvencEncoder, configure_nvenc, jpeg_quality, nvenc_engines, nvenc_sessions
from gpupipe.video.encode import VideoWriter
from gpupipe.video.segments import HostEncoder, SegmentPool
from gpupipe.video.ways import Way, choose_way

PICTURE = PictureFormat(96, 64, Fraction(25), 20, segmented=True)
GPU = torch.device("cuda", 0)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(ways, "note_fallback", messages.append)
    return messages


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``sessions(count, reason)``: from then on so many NVENC sessions open, and no more for that reason."""

    def give(count: int, reason: str = "") -> None:
        monkeypatch.setattr(ways, "nvenc_sessions", lambda encoder, picture, device: (count, reason))

    return give


def test_cpu_takes_one_encoder_or_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "pool_size", lambda picture: 3)
    assert choose_way("libx264", PICTURE) == Way("libx264", "host", 3)
    assert choose_way("libx264", PICTURE._replace(segmented=False)) == Way("libx264", "host", 1)
    assert choose_way("mjpeg", PICTURE) == Way("mjpeg", "host", 1)


@pytest.mark.parametrize("codec", ["auto", "h264", "hevc", "av1"])
def test_nvenc_takes_a_session_to_an_engine(codec: str, sessions: Callable[..., None], noted: list[str]) -> None:
    sessions(3)
    encoder = {"hevc": "hevc_nvenc", "av1": "av1_nvenc"}.get(codec, "h264_nvenc")
    assert choose_way(codec, PICTURE, GPU) == Way(encoder, "nvenc", 3)
    assert noted == []


def test_fewer_sessions_than_engines_are_logged(sessions: Callable[..., None], noted: list[str]) -> None:
    sessions(1, "incompatible client key")
    assert choose_way("auto", PICTURE, GPU) == Way("h264_nvenc", "nvenc", 1)
    assert len(noted) == 1
    assert "2 sessions do not open at once (incompatible client key;" in noted[0]


def test_gpu_without_nvenc_copies_to_the_cores(
    sessions: Callable[..., None], noted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "pool_size", lambda picture: 8)
    sessions(0, "NVIDIA H100 has no NVENC engine")
    assert choose_way("auto", PICTURE, GPU) == Way("libx264", "host", 8)
    assert len(noted) == 1
    assert noted[0].startswith("h264_nvenc: NVIDIA H100 has no NVENC engine: frames are copied to the host and libx264")
    assert "--codec mjpeg" in noted[0]
    with pytest.raises(DeviceError, match=r"'av1_nvenc' does not open here .*has no NVENC engine"):
        choose_way("av1_nvenc", PICTURE, GPU)


def test_nvenc_without_a_gpu_is_refused_for_that() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match=r"'av1_nvenc' does not open here \(av1_nvenc: no CUDA GPU is available\)"):
        choose_way("av1_nvenc", PICTURE)


@pytest.mark.parametrize(("can", "way"), [(True, Way("mjpeg", "nvjpeg")), (False, Way("mjpeg", "host"))])
def test_jpeg_on_the_gpu(can: bool, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "can_encode_jpeg", lambda device: can)
    assert choose_way("mjpeg", PICTURE, GPU) == way
    assert way.name == ("nvjpeg" if can else "mjpeg")


@pytest.mark.parametrize(
    ("gpu", "engines"),
    [
        ("NVIDIA H100 80GB HBM3", 0), ("NVIDIA A100-SXM4-40GB", 0), ("NVIDIA B200", 0), ("Tesla T4", 1),
        ("NVIDIA A10", 1), ("NVIDIA A10G", 1), ("NVIDIA L4", 2), ("NVIDIA L40S", 3), ("NVIDIA GeForce RTX 4090", 2),
        ("NVIDIA GeForce RTX 3060", 1), ("NVIDIA L40", 3), ("NVIDIA RTX 6000 Ada Generation", 3), ("NVIDIA B300", 0),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 4), ("NVIDIA RTX A6000", 1),
    ],
)  # fmt: skip
def test_nvenc_engines_by_gpu_name(gpu: str, engines: int) -> None:
    assert nvenc_engines(gpu) == engines


def test_why_nvenc_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    nvenc_sessions.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert nvenc_sessions("h264_nvenc", PICTURE, GPU) == (0, "NVIDIA H100 80GB HBM3 has no NVENC engine")

    def missing(name: str) -> None:
        raise OSError(name)

    nvenc_sessions.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(av, "__version__", "17.1.0")
    count, reason = nvenc_sessions("h264_nvenc", PICTURE, GPU)
    assert (count, reason.partition(";")[0]) == (0, "PyAV 17.1.0 does not encode in PyTorch's context")

    nvenc_sessions.cache_clear()
    monkeypatch.setattr(av, "__version__", "18.1rc1")
    monkeypatch.setattr("ctypes.CDLL", missing)
    count, reason = nvenc_sessions("h264_nvenc", PICTURE, GPU)
    assert count == 0
    assert "libnvidia-encode.so.1 is missing" in reason
    nvenc_sessions.cache_clear()


@pytest.mark.parametrize("encoder", ["h264_nvenc", "hevc_nvenc", "av1_nvenc"])
def test_nvenc_knows_every_option_it_is_given(encoder: str) -> None:
    """An option that the encoder does not know would be ignored silently."""
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    configure_nvenc(context, PICTURE)
    assert context.pix_fmt == "cuda"
    assert context.options["cq"] == "20"
    best = av.CodecContext.create(encoder, "w")
    assert isinstance(best, av.VideoCodecContext)
    configure_nvenc(best, PICTURE._replace(crf=0))
    assert best.options["cq"] == "1", "0 would leave the quality to NVENC"
    known = getattr(context, "supported_options", None)
    if known is None:
        pytest.skip(f"PyAV {av.__version__} does not tell an encoder's options")
    names = {option.name for option in (*known.generic, *known.private)}
    assert set(context.options) <= names


# ── sessions that are used again ──────────────────────────────────────────────────────────────────────────────────────


class Session:
    """In place of NVENC's session: packets come out some frames late, and only then are the frames' pixels read from
    their memory; once drained, it takes no frames until it is flushed."""

    name, flags = "h264_nvenc", 0

    def __init__(self, late: int) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self._late = late
        self._held: list[av.VideoFrame] = []
        self._drained = False

    def encode(self, frame: av.VideoFrame | None) -> list[av.Packet]:
        assert not self._drained, "avcodec_send_frame() returned end of file"
        if frame is None:
            self._drained = True
            return [self._packet() for _ in range(len(self._held))]
        assert (frame.format.name, frame.width, frame.height, frame.time_base) == ("nv12", 96, 64, Fraction(1, 20))
        self._held.append(frame)
        return [self._packet()] if len(self._held) > self._late else []

    def _packet(self) -> av.Packet:
        frame = self._held.pop(0)
        self.seen.append((frame.pts or 0, int(frame.to_ndarray()[0, 0]), frame.pict_type == 1))
        packet = av.Packet(b"x")
        packet.pts = frame.pts
        return packet

    def flush_buffers(self) -> None:
        assert self._drained, "packets are lost that were not asked for"
        self._drained = False


@pytest.mark.parametrize("late", [3, 30], ids=["as it was asked to", "looking ahead"])
def test_a_session_encodes_segment_after_segment(late: int) -> None:
    picture = PictureFormat(96, 64, Fraction(20), 20)
    frames = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 96, 96).contiguous()
    made: list[Any] = []

    def make(k: int) -> NvencEncoder:
        made.append(Session(late))
        return NvencEncoder(picture, made[-1], use_model=True, device=torch.device("cpu"))

    pool = SegmentPool(make, workers=2, length=picture.segment_length)
    packets = [packet for frame in frames for packet in pool.encode(frame)] + pool.finish()
    assert [packet.pts for packet in packets] == list(range(100))
    assert len(made) == 2, "three segments, two sessions"
    seen = sorted(entry for session in made for entry in session.seen)
    assert seen == [(i, i, i % 40 == 0) for i in range(100)], "each frame's own pixels; an IDR frame begins a segment"


def test_a_codec_the_container_cannot_hold_is_reported_at_the_first_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVENC's encoder, which a CPU's replaces here, is not opened earlier."""

    class OnTheHost(HostEncoder):
        def __init__(self, *given: Any, device: Any, **how: Any) -> None:
            super().__init__(*given, **how)

        def encode(self, number: int, picture: Any) -> list[av.Packet]:
            return super().encode(number, picture.numpy())

    monkeypatch.setattr("gpupipe.video.encode.choose_way", lambda *_: Way("libsvtav1", "nvenc"))
    monkeypatch.setattr("gpupipe.video.encode.configure_nvenc", configure)
    monkeypatch.setattr("gpupipe.video.encode._mark", lambda frames: None)
    monkeypatch.setattr("gpupipe.video.encode.NvencEncoder", OnTheHost)
    with (
        pytest.raises(InputError, match=r"clip\.mov: \.mov cannot hold libsvtav1; expected \.mkv"),
        VideoWriter(tmp_path / "clip.mov", width=64, height=64, codec="av1") as writer,
    ):
        writer.write(torch.full((60, 96, 64), 128, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_a_session_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames are handed over in threads whose current device is the first GPU; FFmpeg's part is left out."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    handed: list[int] = []

    class Frame:
        @staticmethod
        def from_dlpack(planes: tuple[torch.Tensor, ...], **_: Any) -> Any:
            assert all(plane.__dlpack__() for plane in planes)
            return Mock()

    device = torch.device("cuda", 1)
    monkeypatch.setattr(av, "VideoFrame", Frame)
    monkeypatch.setattr("gpupipe.video.cuda._cuda_context", lambda device: (None, torch.cuda.Stream(device)))
    session: Any = Mock()
    session.encode = lambda frame: handed.append(frame.pts) or []
    NvencEncoder(PICTURE, session, use_model=True, device=device).encode(7, torch.ones(96, 96).to(device, torch.uint8))
    assert handed == [7]


class Surface:
    """In place of PyAV's frame on the device."""

    def __init__(self, planes: tuple[torch.Tensor, ...]) -> None:
        self.planes, self.pts = planes, -1

    @classmethod
    def from_dlpack(cls, planes: tuple[torch.Tensor, ...], **_: Any) -> Surface:
        return cls(planes)


class Reader(NvencEncoder):
    """In place of NVENC's encoder, a CPU's, which reads surfaces some frames later, on its own stream."""

    def __init__(self, picture: PictureFormat, model: Any, *, use_model: bool, device: torch.device) -> None:
        super().__init__(picture, model, use_model=True, device=device)
        if not use_model:  # its header is compared with the model's, which the other session may not have opened yet
            model, flags = av.CodecContext.create(model.name, "w"), model.flags
            tune(model, picture)
            model.flags = flags
            model.open()
        self._encoder, self._waiting = HostEncoder(picture, model, use_model=use_model), deque[Surface]()
        self._context, self._reads = Mock(encode=self._send), torch.cuda.Stream(device)

    def _send(self, frame: Surface | None) -> list[av.Packet]:
        if frame is None:
            return [packet for _ in range(len(self._waiting)) for packet in self._read()] + self._encoder.finish()
        self._waiting.append(frame)
        return self._read() if len(self._waiting) > 5 else []

    def _read(self) -> list[av.Packet]:
        frame = self._waiting.popleft()
        with torch.cuda.stream(self._reads):
            pixels = torch.cat(frame.planes).cpu().numpy()
        return self._encoder.encode(frame.pts, pixels)


def read_late(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether frames survive on their way through surfaces to a file, in segments of two sessions, from batches whose
    memory is overwritten at once."""
    monkeypatch.setattr("gpupipe.video.encode.choose_way", lambda *_: Way("libx264", "nvenc", 2))
    monkeypatch.setattr("gpupipe.video.encode.NvencEncoder", Reader)
    monkeypatch.setattr("gpupipe.video.encode.configure_nvenc", tune)
    monkeypatch.setattr("gpupipe.video.segments.configure", tune)
    monkeypatch.setattr("gpupipe.video.cuda._cuda_context", lambda device: (None, torch.cuda.Stream(device)))
    monkeypatch.setattr("gpupipe.video.cuda.av", Mock(wraps=av, VideoFrame=Surface))
    levels = 20 + 37 * torch.arange(130) % 200
    with VideoWriter(path, width=320, height=192, device="cuda", segmented=True) as writer:
        for some in levels.to("cuda", torch.uint8).split(16):
            batch = some[:, None, None].expand(-1, 288, 320).contiguous()
            batch[:, 192:] = 128
            writer.write(batch)
            del batch
            torch.full((16, 288, 320), 255, dtype=torch.uint8, device="cuda")
    return bool(np.abs(luma_of(path) - levels.numpy()).max() < 3)


@pytest.mark.cuda
def test_surfaces_keep_frames_whose_memory_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_late(tmp_path / "clip.mp4", monkeypatch)


def tune(context: av.VideoCodecContext, picture: PictureFormat) -> None:
    """Like NVENC's settings, but without B-frames and lookahead: a packet for each frame."""
    configure(context, picture)
    context.options |= {"tune": "zerolatency"}


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize(
    ("size", "preset"), [((640, 352), None), ((854, 480), None), ((960, 540), "p1"), ((640, 352), "p7")]
)
def test_nvenc_encodes_frames_of_the_device(size: tuple[int, int], preset: str | None, tmp_path: Path) -> None:
    """More frames than a session has surfaces, with lookahead, and of widths that NVENC takes only with padding."""
    picture = PictureFormat(*size, Fraction(25), 12, segmented=True)
    wanted = nvenc_engines(torch.cuda.get_device_name())
    if wanted == 0:
        pytest.skip("this GPU has no NVENC engine")
    found, reason = nvenc_sessions("h264_nvenc", picture, torch.device("cuda", 0))
    assert found >= 1, reason
    luma = torch.arange(60, device="cuda", dtype=torch.uint8)[:, None, None] * 3 + 32
    frames = luma.expand(60, size[1] * 3 // 2, size[0]).contiguous()
    frames[:, size[1] :] = 128
    path = tmp_path / "clip.mp4"
    options: dict[str, Any] = {"codec": "h264", "crf": 12, "preset": preset, "device": "cuda"}
    with VideoWriter(path, width=size[0], height=size[1], **options) as writer:
        assert writer.encoder == "h264_nvenc"
        for start in range(0, 60, 20):
            writer.write(frames[start : start + 20])
    with av.open(str(path)) as container:
        means = [frame.to_ndarray()[: size[1]].mean() for frame in container.decode(video=0)]
    assert np.abs(np.array(means) - frames[:, 0, 0].cpu().numpy()).max() < 2, "each frame's own pixels, in order"


# ── JPEGs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("crf", "quality"), [(0, 99), (20, 92), (26, 84), (32, 68), (38, 39), (51, 9)])
def test_jpeg_quality_follows_crf(crf: int, quality: int) -> None:
    assert jpeg_quality(crf) == quality


def test_jpegs_become_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's JPEGs are made on the CPU here; the container and its pictures are the same."""
    monkeypatch.setattr("gpupipe.video.encode.choose_way", lambda *_: Way("mjpeg", "nvjpeg"))
    monkeypatch.setattr("gpupipe.video.encode._mark", lambda frames: None)
    ramp = np.linspace(0, 255, 95, dtype=np.uint8)
    frames = np.stack([np.stack([np.roll(ramp, 9 * i)] * 63) for i in range(4)])[..., None] * np.array([1, 0, 1], "u1")
    frames[..., 1] = 255 - frames[..., 0]
    with VideoWriter(tmp_path / "clip.mp4", width=95, height=63, codec="mjpeg", crf=5) as writer:
        assert (writer.encoder, writer.pixel_format) == ("nvjpeg", "bgr")
        writer.write(torch.from_numpy(frames))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
        shown = list(container.decode(video=0))
    assert [frame.time for frame in shown] == pytest.approx([i / 25 for i in range(4)])
    pictures = np.stack([frame.to_ndarray(format="bgr24") for frame in shown])
    assert pictures.shape == (4, 64, 96, 3)
    inside = np.abs(pictures[:, :63, :95].astype(int) - frames)
    assert np.median(inside) <= 2


def test_jpegs_of_nv12(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a template that is a video, saved as images too, come as NV12."""
    monkeypatch.setattr("gpupipe.video.encode.choose_way", lambda *_: Way("mjpeg", "nvjpeg"))
    monkeypatch.setattr("gpupipe.video.encode._mark", lambda frames: None)
    frames = torch.randint(0, 256, (2, 1, 1, 3), dtype=torch.uint8).expand(2, 64, 96, 3).contiguous()
    with VideoWriter(tmp_path / "clip.mp4", width=96, height=64, codec="mjpeg", crf=5) as writer:
        writer.write(to_nv12(frames))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        pictures = np.stack([frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)])
    assert np.abs(pictures.astype(int) - frames.numpy()).max() <= 6


def test_each_jpeg_stands_alone() -> None:
    encoder = JpegEncoder(PICTURE)
    (packet,) = encoder.encode(7, torch.full((3, 64, 96), 77, dtype=torch.uint8))
    assert (packet.pts, packet.dts, packet.is_keyframe) == (7, 7, True)
    assert bytes(packet)[:2] == b"\xff\xd8"
    assert encoder.finish() == []


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def luma_of(path: Path) -> np.ndarray:
    """Each frame's luma in the middle, (N,), as it is coded: 16 to 235, or 0 to 255 in JPEGs."""
    with av.open(str(path)) as container:
        planes = [
            np.asarray(frame.planes[0]).reshape(-1, frame.planes[0].line_size) for frame in container.decode(video=0)
        ]
    return np.array([plane[80:112, 80:240].mean() for plane in planes])


@pytest.mark.cuda
def test_waiting_for_a_batch_takes_no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be one core less for the encoders: waiting for a CUDA event keeps a core busy, unless told otherwise."""
    made: list[dict[str, bool]] = []
    event = torch.cuda.Event
    monkeypatch.setattr(torch.cuda, "Event", lambda **how: made.append(how) or event(**how))
    with VideoWriter(tmp_path / "clip.mkv", width=64, height=48, codec="ffv1", device="cuda") as writer:
        writer.write(torch.full((3, 72, 64), 128, dtype=torch.uint8, device="cuda"))
    assert made == [{"blocking": True}]


@pytest.mark.cuda
def test_clips_are_copied_on_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 32 for all: a farm's clips would soon copy on the one that renders."""
    keep, streams = torch.Tensor.record_stream, []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *given: streams.append(given[1]) or keep(*given))
    for clip in range(2):
        with VideoWriter(tmp_path / f"{clip}.mkv", width=64, height=48, codec="ffv1", device="cuda") as writer:
            writer.write(torch.full((3, 72, 64), 128, dtype=torch.uint8, device="cuda"))
    assert len(streams) == 2
    assert streams[0] == streams[1] != torch.cuda.current_stream()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("codec", ["auto", "hevc", "av1", "libx264", "mjpeg"])
def test_frames_survive_when_their_memory_is_reused(codec: str, device: str, tmp_path: Path) -> None:
    """By every way the frames come out in order, although on a GPU their memory is overwritten at once."""
    count, (width, height) = 130, (320, 192)
    levels = 20 + 37 * torch.arange(count) % 200
    options: dict[str, Any] = {"width": width, "height": height, "codec": codec, "segmented": True}
    with VideoWriter(tmp_path / "clip.mp4", device=device, **options) as writer:
        nv12 = writer.pixel_format == "nv12"
        for some in levels.to(device, torch.uint8).split(16):
            shape = (len(some), height * 3 // 2, width) if nv12 else (len(some), height, width, 3)
            batch = torch.empty(shape, dtype=torch.uint8, device=device)
            batch.copy_(some.reshape(-1, *[1] * (len(shape) - 1)).expand(shape))
            if nv12:
                batch[:, height:] = 128
            writer.write(batch)
            del batch
            torch.full(shape, 255, dtype=torch.uint8, device=device)
    expected = levels.numpy()
    if nv12 and codec == "mjpeg":  # which use the full range
        expected = (expected - 16) * 255 / 219
    np.testing.assert_allclose(luma_of(tmp_path / "clip.mp4"), expected, atol=3)
