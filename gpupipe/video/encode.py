"""NV12 tensors → a video file with sound, in one pass, on a thread of its own beside the network."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from torch import Tensor

from gpupipe.errors import DeviceError, InputError, OutputError
from gpupipe.fallbacks import note_fallback
from gpupipe.files import replacing
from gpupipe.video.sound import SoundTrack

logger = logging.getLogger(__name__)

os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings unless the environment says: errors only

CODECS: dict[str, tuple[str, ...]] = {
    "auto": ("h264_nvenc", "libx264"),
    "h264": ("h264_nvenc", "libx264"),
    "hevc": ("hevc_nvenc", "libx265"),
    "av1": ("av1_nvenc", "libsvtav1"),
}
"""FFmpeg encoders behind a codec's name, in the order they are tried; any encoder's own name is taken too."""

_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "{crf}", "x264-params": "chromaloc=1"},
    "libx265": {"preset": "fast", "crf": "{crf}", "x265-params": "log-level=none:chromaloc=1"},
    "libsvtav1": {"preset": "9", "crf": "{crf}"},
    "h264_nvenc": {"preset": "p4", "rc": "vbr", "cq": "{crf}", "b": "0"},
    "hevc_nvenc": {"preset": "p4", "rc": "vbr", "cq": "{crf}", "b": "0"},
    "av1_nvenc": {"preset": "p4", "rc": "vbr", "cq": "{crf}", "b": "0"},
}
"""Encoder options; chroma stands in the middle of its 2×2 pixels, as kernels/nv12.py puts it."""

_QUEUE = 2  # batches that may wait for the encoder


class VideoWriter:
    """Writes frames and sound to ``path``, which appears only when it is whole.

    Use it as a context: leaving it without an error finishes the file, leaving it with one deletes what was written.

    Args:
        path: of the video; its suffix chooses the container (``.mp4``, ``.mkv``, ``.mov``).
        width, height: of the frames in pixels, even.
        fps: frames a second.
        codec: a key of :data:`CODECS`, or the name of an FFmpeg encoder.
        crf: quality, 0 (best) to 51; for NVENC its ``cq``.
        sound: any file that FFmpeg reads with a sound track; None writes a silent video.

    Attributes:
        encoder: the FFmpeg encoder that was chosen.
        frames: how many have been encoded.

    Raises:
        InputError: odd sizes, quality out of range, unknown container; sound that cannot be read.
        DeviceError: a codec that does not open here.
        OutputError: ``path`` cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: float | Fraction = 25,
        codec: str = "auto",
        crf: int = 20,
        sound: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        if width % 2 or height % 2:
            raise InputError(f"{path}: frames are {width}×{height}; 4:2:0 video needs an even width and height")
        if not 0 <= crf <= 51:
            raise InputError(f"crf is {crf}; expected 0 (best) to 51")
        if not 0 < fps <= 1000:
            raise InputError(f"fps is {fps}; expected more than 0 and at most 1000")
        self.size = (width, height)
        self.rate = Fraction(fps).limit_denominator(1001)
        self.frames = 0
        self.encoder = choose_encoder(codec, width, height)
        self._crf = crf
        self._error: BaseException | None = None
        self._batches: queue.Queue[Tensor | None] = queue.Queue(_QUEUE)
        self._resources = contextlib.ExitStack()
        with self._resources:
            temporary = self._resources.enter_context(replacing(self.path))
            self._output = self._open(temporary)
            self._resources.callback(self._close_output)
            self._video = self._add_video_stream()
            self._sound = SoundTrack(sound, self._output) if sound is not None else None
            if self._sound is not None:
                self._resources.callback(self._sound.close)
            self._resources = self._resources.pop_all()
        self._thread = threading.Thread(target=self._run, name=f"encode {self.path.name}", daemon=True)
        self._thread.start()

    def write(self, frames: Tensor) -> None:
        """Queue a batch: NV12 uint8 (B, H·3/2, W). Waits while the encoder is more than two batches behind.

        Raises:
            OutputError: an earlier batch could not be written.
        """
        self._put(frames)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            try:
                self._stop(error)
            except KeyboardInterrupt as interrupt:  # while the last frames are encoded
                self._stop(interrupt)
                raise
            failure = error or self._error
            if failure is not None:
                raise failure

    @property
    def sound_seconds(self) -> float | None:
        """Length of the sound written so far; None without sound."""
        return None if self._sound is None else self._sound.seconds

    def _open(self, temporary: Path) -> av.container.OutputContainer:
        options = {"movflags": "+faststart"} if self.path.suffix in {".mp4", ".mov", ".m4v"} else {}
        try:
            return av.open(str(temporary), "w", options=options)
        except (ValueError, av.error.FFmpegError) as error:
            raise InputError(f"{self.path}: suffix is {self.path.suffix!r}; expected .mp4, .mkv or .mov") from error

    def _add_video_stream(self) -> av.VideoStream:
        width, height = self.size
        stream = self._output.add_stream(self.encoder, rate=self.rate, options=_options(self.encoder, self._crf))
        assert isinstance(stream, av.VideoStream)
        context = stream.codec_context
        context.width, context.height = width, height
        context.pix_fmt = pixel_format(self.encoder)
        context.time_base = 1 / self.rate
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.thread_count, context.thread_type = 0, "AUTO"  # all cores, frames beside each other
        return stream

    def _put(self, item: Tensor | None) -> None:
        """Hand something to the thread; raise its error if it has stopped."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._batches.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def _stop(self, error: BaseException | None) -> None:
        """Wait for the thread: until all is written or, after an error, until it has seen that."""
        self._error = self._error or error
        while self._error is None:
            with contextlib.suppress(queue.Full):
                self._batches.put(None, timeout=0.5)
                break
        with contextlib.suppress(queue.Full):  # after an error the thread may be waiting for a batch
            self._batches.put_nowait(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._error is None and (batch := self._batches.get()) is not None:
                for frame in batch.cpu().numpy():
                    self._encode(frame)
            if self._error is None:
                self._output.mux(self._video.encode(None))
                if self._sound is not None:
                    self._sound.finish()
                self._output.close()
        except OSError as error:  # FFmpeg's errors of the file system are OSErrors too
            self._error = OutputError(f"{self.path}: cannot be written: {error.strerror or error}")
        except BaseException as error:
            self._error = error

    def _encode(self, nv12: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(nv12, format="nv12")
        frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
        if self._video.codec_context.pix_fmt != "nv12":
            frame = frame.reformat(format=self._video.codec_context.pix_fmt)
        frame.pts, frame.time_base = self.frames, 1 / self.rate
        self._output.mux(self._video.encode(frame))
        self.frames += 1
        if self._sound is not None:
            self._sound.advance(self.frames / self.rate)

    def _close_output(self) -> None:
        with contextlib.suppress(av.error.FFmpegError):
            self._output.close()


def pixel_format(encoder: str) -> str:
    """What an encoder is fed: NV12 where it takes it, else planar 4:2:0, else its first format."""
    formats = [format.name for format in av.Codec(encoder, "w").video_formats or ()]
    return next((name for name in ("nv12", "yuv420p") if name in formats), formats[0] if formats else "yuv420p")


def _options(encoder: str, crf: int) -> dict[str, str]:
    return {key: value.format(crf=crf) for key, value in _OPTIONS.get(encoder, {}).items()}


def choose_encoder(codec: str = "auto", width: int = 1280, height: int = 720) -> str:
    """The first encoder behind ``codec`` that opens on this machine at this size.

    Raises:
        DeviceError: none does; the message gives each one's reason.
    """
    reasons: list[str] = []
    for encoder in CODECS.get(codec, (codec,)):
        try:
            with _probe(encoder, width, height):
                if reasons and torch.cuda.is_available():
                    note_fallback(f"{'; '.join(reasons)}: {encoder} encodes instead")
                return encoder
        except (av.error.FFmpegError, ValueError) as error:
            reasons.append(f"{encoder}: {error}")
            logger.debug("encoder %s does not open: %s", encoder, error)
    raise DeviceError(
        f"codec {codec!r} does not open here ({'; '.join(reasons)}); expected one of {', '.join(CODECS)} or the name of"
        " an encoder of this FFmpeg"
    )


@contextlib.contextmanager
def _probe(encoder: str, width: int, height: int) -> Iterator[None]:
    codec = av.Codec(encoder, "w")
    if codec.type != "video":
        raise ValueError("not a video encoder")
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height = width, height
    context.pix_fmt = pixel_format(encoder)
    context.time_base = Fraction(1, 25)
    context.framerate = Fraction(25)
    context.options = _options(encoder, crf=20)
    context.open()
    yield
