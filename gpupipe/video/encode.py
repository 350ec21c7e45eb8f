"""NV12 tensors → a video file with sound, in one pass, on a thread of its own beside the network."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import av
import av.error
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.errors import InputError, OutputError
from gpupipe.files import replacing
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.schedule import frame_rate
from gpupipe.stages import UNTIMED, Stages
from gpupipe.video.codecs import PictureFormat, choose_encoder, configure, host_frame
from gpupipe.video.sound import SoundTrack

logger = logging.getLogger(__name__)

PixelFormat = Literal["bgr", "nv12"]

_QUEUE = 2  # batches that may wait for the encoder


class VideoWriter:
    """Writes frames and sound to ``path``, which appears only when it is whole.

    Use it as a context: leaving it without an error finishes the file, leaving it with one deletes what was written.

    Args:
        path: of the video; its suffix chooses the container (``.mp4``, ``.mkv``, ``.mov``).
        width, height: of the frames in pixels. 4:2:0 video has even sizes and its cropping goes in steps of two pixels:
            an odd size is made even by repeating the last column or row, and said aloud.
        fps: frames a second.
        codec: a key of :data:`~gpupipe.video.codecs.CODECS`, or the name of an FFmpeg encoder.
        crf: quality, 0 (best) to 51; for NVENC its ``cq``, for Motion-JPEG see
            :func:`~gpupipe.video.codecs.jpeg_quantiser`.
        sound: any file that FFmpeg reads with a sound track; None writes a silent video.
        stages: what measures where the time goes.

    Attributes:
        encoder: the FFmpeg encoder that was chosen.
        picture: size, rate and quality of what is written.
        pixel_format: in which frames are best written.
        frames: how many have been encoded.

    Raises:
        InputError: quality out of range; a container that is unknown or cannot hold the codec; sound that cannot be
            read.
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
        stages: Stages = UNTIMED,
    ) -> None:
        self.path = Path(path)
        self._stages = stages
        if not 0 <= crf <= 51:
            raise InputError(f"crf is {crf}; expected 0 (best) to 51")
        even = (width + width % 2, height + height % 2)
        if even != (width, height):
            logger.warning(
                "%s: frames are %d×%d and 4:2:0 video needs even sizes: the video is %d×%d, with the last column or row"
                " repeated", path, width, height, *even,
            )  # fmt: skip
        self.picture = PictureFormat(*even, frame_rate(fps), crf)
        self.frames = 0
        self.encoder = choose_encoder(codec, *even)
        self.pixel_format: PixelFormat = "nv12" if even == (width, height) else "bgr"
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
        """Queue a batch, which then belongs to the writer. Waits while the encoder is more than two batches behind.

        Args:
            frames: uint8, NV12 (B, H·3/2, W) of an even size, or BGR (B, H, W, 3).

        Raises:
            OutputError: an earlier batch could not be written.
        """
        if frames.dim() == 4:
            frames = to_nv12(pad_to_even(frames))
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
        try:
            stream = self._output.add_stream(self.encoder, rate=self.picture.rate)
        except ValueError as error:
            raise InputError(f"{self.path}: {self.path.suffix} cannot hold {self.encoder}; expected .mkv") from error
        assert isinstance(stream, av.VideoStream)
        configure(stream.codec_context, self.picture)
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
                with self._stages.time("encode"):
                    for frame in batch.cpu().numpy():
                        self._encode(frame)
            if self._error is None:
                with self._stages.time("encode"):
                    packets = self._video.encode(None)
                with self._stages.time("mux"):
                    self._output.mux(packets)
                    if self._sound is not None:
                        self._sound.finish()
                    self._output.close()
        except OSError as error:  # FFmpeg's errors of the file system are OSErrors too
            self._error = OutputError(f"{self.path}: cannot be written: {error.strerror or error}")
        except BaseException as error:
            self._error = error

    def _encode(self, nv12: NDArray[np.uint8]) -> None:
        context = self._video.codec_context
        assert context.pix_fmt is not None
        frame = host_frame(nv12, context.pix_fmt)
        frame.pts, frame.time_base = self.frames, 1 / self.picture.rate
        packets = self._video.encode(frame)
        self.frames += 1
        with self._stages.time("mux"):
            self._output.mux(packets)
            if self._sound is not None:
                self._sound.advance(self.frames / self.picture.rate)

    def _close_output(self) -> None:
        with contextlib.suppress(av.error.FFmpegError):
            self._output.close()


def pad_to_even(frames: Tensor) -> Tensor:
    """Repeat the last column or row of (B, H, W, C) frames of an odd size."""
    width, height = frames.shape[2] % 2, frames.shape[1] % 2
    if width:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return torch.cat([frames, frames[:, -1:]], dim=1) if height else frames
