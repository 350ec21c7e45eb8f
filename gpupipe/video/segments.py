"""Encoding in segments: each is encoded on its own, and the muxer joins them without encoding again.

A segment is a closed group of pictures: it begins with an IDR frame, and nothing in it refers to another segment. All
segments but the last have the same number of frames, so that the cuts depend on frame numbers alone: a segment comes
out the same whichever worker encodes it, at any time and beside any number of others.

    frames 0 …  L−1 ─▶ encoder 0 ─┐
    frames L … 2L−1 ─▶ encoder 1 ─┼─▶ packets in the frames' order ─▶ muxer
    frames 2L …     ─▶ encoder 0 ─┘
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import av
import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.handover import Inbox
from gpupipe.lanes import available_cores
from gpupipe.memory import default_budget
from gpupipe.stages import ENCODE_THREAD, UNTIMED, Stages
from gpupipe.video.codecs import PictureFormat, configure, host_frame

MAX_WORKERS = 16
POOL_BYTES = 2_000_000_000
"""Bytes that frames waiting for encoders may take on a small machine: see :func:`room_for_frames`."""

Picture = TypeVar("Picture")
Picture_contra = TypeVar("Picture_contra", contravariant=True)


class Encoder(Protocol[Picture_contra]):
    """Encodes one segment after another."""

    def encode(self, number: int, picture: Picture_contra) -> list[av.Packet]:
        """Encode the clip's frame ``number``; return the packets that are ready, not always its own."""

    def finish(self) -> list[av.Packet]:
        """End the segment and return the packets that are left of it. The next frame begins another segment."""


class HostEncoder:
    """Encodes frames that lie in memory, NV12 uint8 (H·3/2, W), each segment with a new FFmpeg encoder.

    Args:
        picture: what all frames share.
        model: a set-up encoder of the stream that the packets go into. Its name and flags are taken, and its header
            must be that of every segment.
        use_model: encode the first segment with ``model`` itself.
    """

    def __init__(self, picture: PictureFormat, model: av.VideoCodecContext, *, use_model: bool) -> None:
        self._picture = picture
        self._model = model
        self._context = model if use_model else None

    def encode(self, number: int, picture: NDArray[np.uint8]) -> list[av.Packet]:
        """See :class:`Encoder`."""
        if self._context is None:
            self._context = self._open()
        assert self._context.pix_fmt is not None
        frame = host_frame(picture, self._context.pix_fmt)
        frame.pts, frame.time_base = number, 1 / self._picture.rate
        return self._context.encode(frame)

    def finish(self) -> list[av.Packet]:
        """See :class:`Encoder`."""
        context, self._context = self._context, None
        return context.encode(None) if context is not None else []

    def _open(self) -> av.VideoCodecContext:
        context = av.CodecContext.create(self._model.name, "w")
        assert isinstance(context, av.VideoCodecContext)
        configure(context, self._picture)
        context.flags = self._model.flags  # the container decides where headers go
        context.open()
        if context.extradata != self._model.extradata:
            raise RuntimeError(f"{context.name} gave a segment another header than the first's: they cannot be joined")
        return context


def room_for_frames() -> int:
    """Return how many bytes frames that wait for encoders may take: a sixteenth of the memory that is free, so that 4K
    frames have more than three encoders on a large machine."""
    return max(POOL_BYTES, default_budget(torch.device("cpu")) // 4)


def pool_size(picture: PictureFormat) -> int:
    """Return how many encoders a CPU has: one to a core, as long as there is room for a segment of frames for each."""
    segment = picture.segment_length * picture.frame_bytes
    return max(1, min(available_cores(), MAX_WORKERS, room_for_frames() // segment))


_MAX_DELAY = 16
"""Frames that H.264 and H.265 may hold back at most."""


class DecodeTimes:
    """Gives a clip's packets, which come in decoding order, their decoding times: packet n's is n − delay, in frames.

    The delay is the first packet's ``pts − dts``: how many frames after it is decoded a frame may be shown. The
    encoders' own times do not continue from segment to segment: each encoder begins that much before its segment's
    first frame, and leaves out some times of a segment that is shorter than the delay.

    Attributes:
        packets: how many have been given a time.
    """

    def __init__(self) -> None:
        self.packets = 0
        self._delay = 0

    def set(self, packet: av.Packet) -> None:
        """Give the next packet its decoding time; its ``pts`` is a frame's number in the clip."""
        if self.packets == 0 and packet.pts is not None and packet.dts is not None:
            self._delay = packet.pts - packet.dts
            if not 0 <= self._delay <= _MAX_DELAY:  # x265 leaves it to chance in clips of one and two frames
                self._delay = 1
        packet.dts = self.packets - self._delay
        self.packets += 1


class _Segment:
    """What has come out of one segment so far."""

    def __init__(self) -> None:
        self.packets: deque[av.Packet] = deque()
        self.done = False


class SegmentPool(Generic[Picture]):
    """Encoders that work side by side on the segments of one clip.

    Each has a thread and a queue of a segment's length: while one is busy with its segment, the next one begins as soon
    as its own frames come. Memory is bounded by ``workers`` segments. If frames come slowly, one encoder works at a
    time, as they come.

    Args:
        make: makes the encoder of worker k, 0 ≤ k < ``workers``.
        workers: number of encoders.
        length: frames of a segment; None for one segment without end, which is for one worker.
        name: part of the threads' names.
        stages: measures the time, as ``encode``.
    """

    def __init__(
        self,
        make: Callable[[int], Encoder[Picture]],
        *,
        workers: int,
        length: int | None,
        name: str = "",
        stages: Stages = UNTIMED,
    ) -> None:
        self._length = sys.maxsize if length is None else length
        self._frames = 0
        self._stages = stages
        self._error: BaseException | None = None
        self._segments: deque[_Segment] = deque()
        size = 2 if length is None else length + 1
        self._inboxes: list[Inbox[Any]] = [Inbox(size) for _ in range(workers)]
        self._inbox = self._inboxes[0]  # of the last segment's encoder
        # Kept as long as the pool: NVENC's surfaces must outlive the first session, which is the stream's.
        self._encoders: dict[int, Encoder[Picture]] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(make, k), name=f"{ENCODE_THREAD} {name} {k}", daemon=True)
            for k in range(workers)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # there may be no more threads; or Ctrl-C came, and one is only just starting
            self.close()
            raise

    def encode(self, picture: Picture) -> list[av.Packet]:
        """Take the clip's next frame; return the packets that are next in order, as far as they are ready.

        Waits while the frame's encoder is a segment behind. Raises the error of an encoder that failed.
        """
        segment, place = divmod(self._frames, self._length)
        if place == 0:
            self._segments.append(_Segment())
            self._inbox = self._inboxes[segment % len(self._inboxes)]
        self._give(picture)
        self._frames += 1
        if place + 1 == self._length:
            self._give(None)
        return self._ready()

    def finish(self) -> list[av.Packet]:
        """End the clip and the workers; return all packets that are left, in order."""
        if self._frames % self._length:
            self._give(None)
        self._join()
        return self._ready()

    def close(self) -> None:
        """End the workers, whatever work is left."""
        self._error = RuntimeError("the encoders were closed")  # another's traceback would hold this pool
        self._join()

    def _give(self, picture: Picture | None) -> None:
        """Hand the next frame, or None for the segment's end, to the encoder of the last segment."""
        self._inbox.put((self._segments[-1], self._frames, picture), lambda: self._error)

    def _join(self) -> None:
        for inbox in self._inboxes:
            inbox.end()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _ready(self) -> list[av.Packet]:
        if self._error is not None:
            raise self._error
        packets: list[av.Packet] = []
        while self._segments:
            head = self._segments[0]
            done = head.done  # read before the packets are taken, so that none is missed
            while head.packets:
                packets.append(head.packets.popleft())
            if not done:
                break
            self._segments.popleft()
        return packets

    def _work(self, make: Callable[[int], Encoder[Picture]], k: int) -> None:
        """Encode what comes; after an error only empty the queue, so that no thread waits for room in it."""
        while (item := self._inboxes[k].get()) is not None:
            if self._error is not None:
                continue
            segment, number, picture = item
            try:
                with self._stages.time("encode"):
                    if k not in self._encoders:
                        self._encoders[k] = make(k)
                    encoder = self._encoders[k]
                    segment.packets += encoder.encode(number, picture) if picture is not None else encoder.finish()
            except BaseException as error:
                self._error = error
            if picture is None:
                segment.done = True
