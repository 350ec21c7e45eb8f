"""Segments: encoded in parallel or alone, joined without a seam."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import av.error
import cv2
import numpy as np
import pytest
import torch
from clips import write_wav

from gpupipe import InputError
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.versions import numbers
from gpupipe.video import join, ways
from gpupipe.video.codecs import PictureFormat, configure, segment_length
from gpupipe.video.encode import VideoWriter
from gpupipe.video.join import _fraction, _packets, join_videos
from gpupipe.video.segments import MAX_WORKERS, POOL_BYTES, DecodeTimes, HostEncoder, SegmentPool, pool_size

WIDTH, HEIGHT = 96, 64
LENGTH = 50
"""Frames of a segment at 25 frames a second."""


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """Two whole segments and 11 frames of drifting colours, all different: NV12."""
    count = 2 * LENGTH + 11
    colours = np.random.default_rng(0).integers(256, size=(6, 30, 3)).astype(np.uint8)
    wide = cv2.resize(colours, (WIDTH + 2 * count, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return to_nv12(torch.from_numpy(np.stack([wide[:, 2 * i : 2 * i + WIDTH] for i in range(count)])))


def write(path: Path, frames: torch.Tensor, **options: Any) -> Path:
    with VideoWriter(path, width=WIDTH, height=HEIGHT, **{"segmented": True, **options}) as writer:
        for batch in frames.split(7):
            writer.write(batch)
    return path


def packets_of(path: Path) -> list[tuple[int, int, bool, bytes]]:
    """pts and dts in frames, whether a decoder can begin there, and the bytes."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        step = 1 / (stream.average_rate * stream.time_base)
        packets = [packet for packet in container.demux(stream) if packet.size]
        return [(round(p.pts / step), round(p.dts / step), p.is_keyframe, bytes(p)) for p in packets]


def luma(path: Path) -> tuple[list[float], np.ndarray]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.time for frame in frames], np.stack([f.reformat(format="gray").to_ndarray() for f in frames])


def write_silence(path: Path, seconds: float) -> Path:
    return write_wav(path, np.zeros(round(16000 * seconds)))


def use_workers(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(ways, "pool_size", lambda picture: workers)


# ── one file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_frames_come_in_order_whoever_encodes_them(
    codec: str, clip: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for workers in (1, 2, 3):
        use_workers(monkeypatch, workers)
        written.append(packets_of(write(tmp_path / f"{workers}.mp4", clip, codec=codec, crf=10)))
    assert written[0] == written[1] == written[2], "the same bytes, whatever the number of workers"
    packets = written[0]
    assert [n for n, packet in enumerate(packets) if packet[2]] == [0, LENGTH, 2 * LENGTH], "one IDR frame a segment"
    assert sorted(pts for pts, *_ in packets) == list(range(len(clip)))
    assert all(dts <= pts for pts, dts, *_ in packets)
    assert [dts - packets[0][1] for _, dts, *_ in packets] == list(range(len(clip)))
    times, pictures = luma(tmp_path / "3.mp4")
    assert times == pytest.approx([i / 25 for i in range(len(clip))])
    distance = np.abs(pictures[:, None, ::4, ::4].astype(int) - clip.numpy()[None, :, :HEIGHT:4, ::4]).mean(axis=(2, 3))
    assert distance.argmin(axis=1).tolist() == list(range(len(clip)))


def model_of(picture: PictureFormat, codec: str = "libx264") -> av.VideoCodecContext:
    """A stream's own encoder, not open yet."""
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    configure(context, picture)
    return context


PICTURE = PictureFormat(WIDTH, HEIGHT, Fraction(25), 20)


@pytest.mark.parametrize("processor", ["AVX512", "AVX2"])
def test_x264_keeps_off_avx_512(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    options = model_of(PICTURE).options
    assert (":asm=AVX2," in options["x264-params"]) is (processor == "AVX512")


@pytest.mark.parametrize("segmented", [True, False])
def test_x265_keeps_to_one_thread_a_segment_and_to_closed_groups(segmented: bool) -> None:
    """Its groups of pictures are open unless it is told otherwise."""
    context = model_of(PICTURE._replace(segmented=segmented), "libx265")
    assert (":pools=none:frame-threads=1" in context.options["x265-params"]) is segmented
    assert context.thread_count == (1 if segmented else 0)
    assert ":open-gop=0" in context.options["x265-params"]


def test_the_same_frames_give_the_same_bytes_every_time(clip: torch.Tensor) -> None:
    """On a processor with AVX-512 one encode in ten differed, when x264 was allowed to use it."""
    picture = PICTURE._replace(segmented=True)
    model = model_of(picture)
    model.open()
    encoder, found = HostEncoder(picture, model, use_model=False), set()
    for _ in range(60):
        packets = [packet for n in range(LENGTH) for packet in encoder.encode(n, clip[n].numpy())]
        found.add(b"".join(map(bytes, packets + encoder.finish())))
    assert len(found) == 1


def test_an_encoder_with_another_header_than_the_first_s_is_an_error(clip: torch.Tensor) -> None:
    picture = PICTURE._replace(segmented=True)
    model = model_of(picture)
    model.flags |= av.codec.context.Flags.global_header
    model.open()
    assert HostEncoder(picture, model, use_model=False).encode(0, clip[0].numpy()) == []
    other = HostEncoder(picture._replace(crf=30), model, use_model=False)
    with pytest.raises(RuntimeError, match="another header than the first's"):
        other.encode(0, clip[0].numpy())


def test_one_encoder_makes_no_segments(clip: torch.Tensor, tmp_path: Path) -> None:
    packets = packets_of(write(tmp_path / "clip.mp4", clip, segmented=False))
    assert [n for n, packet in enumerate(packets) if packet[2]] == [0]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_cut_within_a_segment_begins_no_other(codec: str, clip: torch.Tensor, tmp_path: Path) -> None:
    cut = clip[: 2 * LENGTH].clone()
    cut[35:, :HEIGHT] = 251 - cut[35:, :HEIGHT]
    cut[35:, HEIGHT:] = cut[35:, HEIGHT:].flip(2)
    packets = packets_of(write(tmp_path / "cut.mp4", cut, codec=codec))
    assert [n for n, packet in enumerate(packets) if packet[2]] == [0, LENGTH]


@pytest.mark.parametrize("codec", ["ffv1", "mjpeg"])
def test_each_picture_of_an_editor_s_codec_stands_alone(codec: str, clip: torch.Tensor, tmp_path: Path) -> None:
    packets = packets_of(write(tmp_path / "clip.mkv", clip[:30], codec=codec))
    assert all(keyframe for _, _, keyframe, _ in packets)


@pytest.mark.parametrize(
    ("rate", "frames"),
    [
        (Fraction(25), 50),
        (Fraction(30000, 1001), 60),
        (Fraction(1), 2),
        (Fraction(1, 5), 2),
        (Fraction(1, 1000), 2),
    ],
)
def test_a_segment_is_of_two_seconds_and_two_frames_at_least(rate: Fraction, frames: int) -> None:
    assert segment_length(rate) == frames


def test_a_segment_needs_no_other(clip: torch.Tensor, tmp_path: Path) -> None:
    """Decoded alone, the second segment gives the clip's frames; without its IDR frame it does not."""
    path = write(tmp_path / "clip.mp4", clip)
    _, pictures = luma(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        for first, last, alike in ((LENGTH, 2 * LENGTH, True), (LENGTH + 1, 2 * LENGTH, False)):
            decoder = av.CodecContext.create("h264", "r")
            decoder.extradata = stream.codec_context.extradata
            frames = [f for packet in [*packets[first:last], None] for f in decoder.decode(packet)]
            found = [frame.reformat(format="gray").to_ndarray() for frame in frames]
            assert np.array_equal(np.array(found), pictures[LENGTH : 2 * LENGTH]) is alike


@pytest.mark.parametrize(
    ("codec", "count"),
    [("h264", count) for count in (1, 2, 3, LENGTH - 1, LENGTH, LENGTH + 1)]
    + [("hevc", count) for count in (1, 2, LENGTH, LENGTH + 1)],
)
def test_clips_that_end_anywhere(codec: str, count: int, clip: torch.Tensor, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", clip[:count], codec=codec)
    times, _ = luma(path)
    assert times == pytest.approx([i / 25 for i in range(count)])


# ── parts of a clip ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("codec", "suffix", "fps"),
    [
        ("h264", "mp4", 25),
        ("h264", "mkv", 25),
        ("h264", "mp4", Fraction(30000, 1001)),
        ("h264", "mkv", Fraction(30000, 1001)),
        ("hevc", "mp4", 25),
        ("av1", "mp4", 25),
        ("mjpeg", "mp4", 5),  # so long that FFmpeg does not wait for the sound
        ("ffv1", "mkv", 25),
    ],
)
def test_joined_parts_are_the_clip(codec: str, suffix: str, fps: Any, clip: torch.Tensor, tmp_path: Path) -> None:
    length = PictureFormat(WIDTH, HEIGHT, Fraction(fps), 20).segment_length
    starts = [0, length, len(clip) - 1] if length * 2 > len(clip) else [0, length, 2 * length]
    parts = [
        write(tmp_path / f"{first}.{suffix}", clip[first:last], codec=codec, fps=fps)
        for first, last in zip(starts, [*starts[1:], len(clip)], strict=True)
    ]
    sound = write_silence(tmp_path / "silence.wav", len(clip) / fps)
    joined, whole = tmp_path / f"joined.{suffix}", tmp_path / f"whole.{suffix}"
    video = join_videos(parts, joined, sound=sound)
    assert video == (len(clip), pytest.approx(len(clip) / fps, abs=1e-3))
    write(whole, clip, codec=codec, fps=fps, sound=sound)
    times, pictures = luma(joined)
    assert times == pytest.approx([i / float(fps) for i in range(len(clip))], abs=1e-3)
    _, alone = zip(*map(luma, parts), strict=True)
    assert np.array_equal(pictures, np.concatenate(alone))
    if suffix == "mp4" and codec != "av1" and starts[2] % length == 0:
        assert packets_of(joined) == packets_of(whole), "no trace of the joint"
    with av.open(str(joined)) as container, av.open(str(whole)) as other:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.streams.video[0].start_time == 0
        for name in ("codec_tag", "colorspace", "color_range", "color_primaries", "color_trc", "pix_fmt"):
            found, expected = (getattr(c.streams.video[0].codec_context, name) for c in (container, other))
            assert found == expected, name
        order, control = (sorted((p.pos, p.stream.type) for p in c.demux() if p.size) for c in (container, other))
        assert "audio" in [kind for _, kind in order[:10]], "sound beside the picture"
        assert sorted(kind for _, kind in order) == sorted(kind for _, kind in control), "to its end"


@pytest.mark.skipif(numbers(av.__version__) < (18,), reason=f"PyAV {av.__version__} writes no rate for a copied stream")
@pytest.mark.parametrize("codec", ["ffv1", "mpeg4"])
def test_joined_parts_keep_their_rate(codec: str, clip: torch.Tensor, tmp_path: Path) -> None:
    """In Matroska times are in milliseconds, and these codecs tell no rate, or another."""
    fps = Fraction(30000, 1001)
    parts = [write(tmp_path / f"{first}.mkv", clip[first : first + 2], codec=codec, fps=fps) for first in (0, 2)]
    join_videos(parts, tmp_path / "joined.mkv")
    with av.open(str(tmp_path / "joined.mkv")) as container:
        assert _fraction(container.streams.video[0].average_rate) == fps


def other_size(folder: Path, clip: torch.Tensor) -> Path:
    with VideoWriter(folder / "part.mp4", width=64, height=64, segmented=True) as writer:
        writer.write(clip[:2, :, :64].contiguous())
    return folder / "part.mp4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_size, r"part\.mp4: has another size than .*first\.mp4 \(64×64, not 96×64\)"),
        (lambda folder, clip: write(folder / "part.mp4", clip[:2], codec="hevc"), "another codec .*hevc, not h264"),
        (lambda folder, clip: write(folder / "part.mp4", clip[:9], fps=20), "another frames a second .*20, not 25"),
        (lambda folder, clip: write(folder / "part.mp4", clip[:2], crf=30), "another header than"),
        (lambda folder, clip: folder / "part.mp4", r"part\.mp4: no such video"),
        (lambda folder, clip: write_silence(folder / "part.wav", 1), r"part\.wav: has no picture"),
    ],
)
def test_parts_that_do_not_belong_together(
    make: Callable[[Path, torch.Tensor], Path], message: str, clip: torch.Tensor, tmp_path: Path
) -> None:
    first = write(tmp_path / "first.mp4", clip[:9])
    other = make(tmp_path, clip)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        join_videos([first, other], tmp_path / "out" / "joined.mp4")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"joined\.mp4: there are no parts to join"):
        join_videos([], tmp_path / "joined.mp4")


def test_a_part_without_a_frame_rate(clip: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write(tmp_path / "part.mp4", clip[:2])
    monkeypatch.setattr(join, "_fraction", lambda value: Fraction(0))
    with pytest.raises(InputError, match=r"part\.mp4: has no frame rate"):
        join_videos([part], tmp_path / "joined.mp4")


def test_a_part_that_ends_in_an_error() -> None:
    def demux(stream: Any) -> Iterator[av.Packet]:
        yield av.Packet(b"x")
        raise av.error.InvalidDataError(1, "damaged")

    part: Any = SimpleNamespace(streams=SimpleNamespace(video=[None]), demux=demux)
    with pytest.raises(InputError, match=r"part\.mp4: cannot be read to its end"):
        list(_packets(Path("part.mp4"), part))


@pytest.mark.parametrize(("first", "delay"), [(0, 0), (-2, 2), (-16, 16), (-55834575973, 1), (7, 1)])
def test_decode_times_run_on(first: int, delay: int) -> None:
    """Even if the first packet's decode time is arbitrary."""
    times, found = DecodeTimes(), []
    for pts, dts in ((0, first), (1, 5), (2, 5), (3, None)):
        packet = av.Packet(b"x")
        packet.pts, packet.dts = pts, dts
        times.set(packet)
        found.append(packet.dts)
    assert found == [n - delay for n in range(4)]


# ── the pool ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Recorder:
    """In place of an encoder: a packet for each frame, with its number, two frames late.

    Args:
        seconds: that a frame takes.
        fails_at: the number of a frame that raises ValueError.
        may_work: what every frame waits for.
    """

    def __init__(
        self,
        worker: int,
        seen: list[tuple[int, int]],
        seconds: float = 0,
        fails_at: int = -1,
        may_work: threading.Event | None = None,
    ) -> None:
        self._worker, self._seen, self._seconds, self._fails_at = worker, seen, seconds, fails_at
        self._may_work = may_work
        self._late: list[av.Packet] = []

    def encode(self, number: int, picture: str) -> list[av.Packet]:
        assert picture == f"frame {number}"
        if number == self._fails_at:
            raise ValueError(f"no frame {number}")
        if self._may_work is not None:
            self._may_work.wait()
        time.sleep(self._seconds)
        self._seen.append((self._worker, number))
        packet = av.Packet(bytes([number]))
        packet.pts = number
        self._late.append(packet)
        return [self._late.pop(0)] if len(self._late) > 2 else []

    def finish(self) -> list[av.Packet]:
        late, self._late = self._late, []
        return late


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 23])
@pytest.mark.parametrize(("workers", "length"), [(1, 4), (2, 4), (3, 4), (4, 1), (5, None)])
@pytest.mark.usefixtures("no_thread_left")
def test_packets_come_in_order(count: int, workers: int, length: int | None) -> None:
    seen: list[tuple[int, int]] = []
    delays = [0.003, 0, 0.001, 0, 0]  # the first is the slowest: what the others have done must wait
    pool = SegmentPool(lambda k: Recorder(k, seen, delays[k]), workers=workers, length=length)
    packets = [packet for i in range(count) for packet in pool.encode(f"frame {i}")]
    packets += pool.finish()
    assert [packet.pts for packet in packets] == list(range(count))
    assert sorted(seen, key=lambda entry: entry[1]) == [
        ((i // length) % workers if length else 0, i) for i in range(count)
    ], "each segment by one worker"


class LateSegment:
    """Its last packet and its end come just after a reader has found no packets."""

    def __init__(self) -> None:
        self._packets: deque[av.Packet] = deque()
        self.done = False

    @property
    def packets(self) -> deque[av.Packet]:
        if self.done:
            return self._packets
        self.done = True
        self._packets.append(av.Packet(b"x"))
        return deque()


@pytest.mark.usefixtures("no_thread_left")
def test_no_packet_is_lost_at_the_end_of_a_segment() -> None:
    pool: SegmentPool[str] = SegmentPool(lambda k: Recorder(k, []), workers=1, length=4)
    late: Any = LateSegment()
    pool._segments.append(late)
    packets = pool._ready() + pool._ready()
    pool.close()
    assert len(packets) == 1


@pytest.mark.parametrize(("workers", "length", "least", "most"), [(2, 4, 2 * 4, 2 * (4 + 2)), (1, None, 2, 3)])
@pytest.mark.usefixtures("no_thread_left")
def test_memory_of_the_pool_is_bounded(workers: int, length: int | None, least: int, most: int) -> None:
    """No encoder is fed more than a segment ahead of what it has encoded, or two frames where there are no segments."""
    seen: list[tuple[int, int]] = []
    may_work = threading.Event()
    gave_up = threading.Timer(10, may_work.set)
    gave_up.start()
    pool = SegmentPool(lambda k: Recorder(k, seen, 0.002, may_work=may_work), workers=workers, length=length)
    for i in range(least):
        pool.encode(f"frame {i}")
    assert seen == [], "so many frames must be taken before any is encoded, for all workers to have one"
    gave_up.cancel()
    gave_up.join()
    may_work.set()
    waiting = []
    for i in range(least, 40):
        pool.encode(f"frame {i}")
        waiting.append(i + 1 - len(seen))
    pool.finish()
    assert max(waiting) <= most


def test_a_render_waits_for_its_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch is encoded and two wait: memory does not grow with the clip."""
    may_encode, encode = threading.Event(), SegmentPool.encode
    monkeypatch.setattr(SegmentPool, "encode", lambda pool, frame: (may_encode.wait(10), encode(pool, frame))[1])
    written: list[int] = []

    def fill(writer: VideoWriter) -> None:
        for number in range(8):
            writer.write(torch.zeros(1, 72, 64, dtype=torch.uint8))
            written.append(number)

    some = VideoWriter(tmp_path / "clip.mp4", width=64, height=48, codec="libx264")
    with some as writer, ThreadPoolExecutor(1) as threads:
        filling = threads.submit(fill, writer)
        time.sleep(0.3)
        waiting = len(written)
        may_encode.set()
        filling.result()
    assert waiting <= 3 and writer.frames == 8


@pytest.mark.parametrize("frame", [0, 5, 11])
@pytest.mark.usefixtures("no_thread_left")
def test_error_of_an_encoder_is_raised(frame: int) -> None:
    pool = SegmentPool(lambda k: Recorder(k, [], fails_at=frame), workers=2, length=4)
    with pytest.raises(ValueError, match=f"no frame {frame}"):
        for i in range(12):
            pool.encode(f"frame {i}")
        pool.finish()
    pool.close()


def test_encoders_live_as_long_as_their_pool() -> None:
    """What they share with the stream's own encoder, such as NVENC's surfaces, must outlive it."""
    made: list[weakref.ref[Recorder]] = []

    def make(k: int) -> Recorder:
        encoder = Recorder(k, [])
        made.append(weakref.ref(encoder))
        return encoder

    pool = SegmentPool(make, workers=2, length=4)
    for i in range(10):
        pool.encode(f"frame {i}")
    pool.finish()
    assert len(made) == 2
    assert all(encoder() is not None for encoder in made)
    del pool
    assert all(encoder() is None for encoder in made)


@pytest.mark.usefixtures("no_thread_left")
def test_a_pool_that_is_closed_encodes_nothing_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    closing = threading.Event()
    pool = SegmentPool(lambda k: Recorder(k, seen, may_work=closing), workers=2, length=4)
    for i in range(6):
        pool.encode(f"frame {i}")
    join = pool._join
    monkeypatch.setattr(pool, "_join", lambda: (closing.set(), join()))
    pool.close()
    assert {number for _, number in seen} <= {0, 4}, "at most what each worker had begun"


def test_pool_size_follows_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small, huge = PictureFormat(1280, 720, Fraction(25), 20), PictureFormat(3840, 2160, Fraction(60), 20)
    assert (small.segment_length, huge.segment_length) == (50, 120)
    monkeypatch.setattr("gpupipe.video.segments.available_cores", lambda: 4)
    monkeypatch.setattr("gpupipe.video.segments.default_budget", lambda device: 10**9)
    assert pool_size(small) == 4
    monkeypatch.setattr("gpupipe.video.segments.available_cores", lambda: 64)
    assert pool_size(small) == MAX_WORKERS
    assert pool_size(huge) == POOL_BYTES // (120 * 3840 * 2160 * 3 // 2) == 1
    monkeypatch.setattr("gpupipe.video.segments.default_budget", lambda device: 32 * 10**9)
    assert pool_size(huge) == 8 * 10**9 // (120 * 3840 * 2160 * 3 // 2) == 5
