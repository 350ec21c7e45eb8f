"""Segments: encoded in parallel or alone, joined without a seam."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest
import torch
from encoded_clips import HEIGHT, LENGTH, WIDTH, luma, moving_clip, packets_of, write

from gpupipe.video import ways
from gpupipe.video.codecs import PictureFormat, configure, segment_length
from gpupipe.video.encode import VideoWriter
from gpupipe.video.segments import MAX_WORKERS, POOL_BYTES, DecodeTimes, HostEncoder, SegmentPool, pool_size


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return moving_clip()


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


# ── the pool ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize("started", [0, 1, 2])
def test_a_video_without_a_thread_to_write_it_leaves_nothing(
    started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may have so many processes and no more: two encoders and the one that feeds them."""
    start, before, count = threading.Thread.start, set(threading.enumerate()), itertools.count()

    def limited(thread: threading.Thread) -> None:
        if next(count) == started:
            raise RuntimeError("can't start new thread")
        start(thread)

    use_workers(monkeypatch, 2)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        VideoWriter(tmp_path / "clip.mp4", width=WIDTH, height=HEIGHT, segmented=True)
    assert list(tmp_path.iterdir()) == [] and set(threading.enumerate()) <= before
