"""Batches of frames → a video file with sound, in one pass, on threads of its own beside the network.

A batch on a CPU goes to the encoders as it is, and so does one on a GPU that encodes it itself, by NVENC or nvJPEG.
Otherwise it is copied from the GPU through pinned memory, on a stream of its own, while the next one is rendered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import av
import av.error
import torch
from torch import Tensor

from gpupipe.errors import InputError, OutputError, output_error
from gpupipe.files import media_url, replacing
from gpupipe.graphs import own_stream
from gpupipe.handover import Inbox
from gpupipe.kernels.nv12 import PixelFormat, from_nv12, to_nv12
from gpupipe.schedule import frame_rate
from gpupipe.stages import ENCODE_THREAD, UNTIMED, Stages
from gpupipe.video.codecs import PictureFormat, check_preset, configure, takes_quality, why
from gpupipe.video.cuda import JpegEncoder, NvencEncoder, configure_nvenc, rgb_planes
from gpupipe.video.segments import DecodeTimes, Encoder, HostEncoder, SegmentPool
from gpupipe.video.sound import SoundTrack
from gpupipe.video.ways import choose_way

logger = logging.getLogger(__name__)


SUFFIXES = (".mp4", ".mkv", ".mov")
"""Containers that can be written; case is ignored."""

_QUEUE = 2  # batches that may wait for the encoder


class _Batch(NamedTuple):
    """Frames on their way to the encoders, and the event after which they may be read."""

    frames: Tensor
    ready: torch.cuda.Event | None


def _mark(frames: Tensor) -> torch.cuda.Event:
    """Record an event on the current stream of the frames' device; a thread waits for it asleep, taking no core."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(frames.device))
    return event


class VideoWriter:
    """Writes frames and sound to ``path``, which appears only when it is whole.

    Use it as a context: leaving it without an error finishes the file, leaving it with one deletes what was written.

    Args:
        path: the video; its suffix, one of :data:`SUFFIXES`, chooses the container.
        width, height: of the frames in pixels. 4:2:0 video has even sizes and is cropped in steps of two pixels: an odd
            size is made even by repeating the last column or row, with a warning.
        fps: frames a second.
        codec: a key of :data:`~gpupipe.video.codecs.CODECS`, or the name of an FFmpeg encoder.
        crf: quality, 0 (best) to 51; for NVENC its ``cq``, for Motion-JPEG see
            :func:`~gpupipe.video.codecs.jpeg_quantiser`.
        sound: any file that FFmpeg reads with a sound track; None writes a silent video.
        segmented: let libx264 and libx265 encode segments of two seconds side by side, one to a core
            (:mod:`~gpupipe.video.segments`), instead of one encoder on all cores. This is for frames that come faster
            than one encoder takes them, as from a GPU, and for parts to be joined. Files are some 5 % larger, as every
            segment begins with a whole picture. Beside a network on two cores it was not seen to be faster.
        preset: the encoder's own name for how hard it tries: ``p1`` (fastest) to ``p7`` for NVENC, ``ultrafast`` … for
            libx264 and libx265, a number for SVT-AV1; None takes ours.
        device: where frames come from; a GPU may encode them itself (:func:`~gpupipe.video.ways.choose_way`).
        stages: measures where the time goes.

    Attributes:
        encoder: the encoder that was chosen, by FFmpeg's name or ``nvjpeg``.
        picture: size, rate and quality of what is written.
        pixel_format: the format in which frames are best written.
        frames: how many have been encoded.

    Raises:
        InputError: an unknown suffix; quality out of range; a preset that the encoder does not have; a container that
            cannot hold the codec; sound that cannot be read.
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
        segmented: bool = False,
        preset: str | None = None,
        device: torch.device | str = "cpu",
        stages: Stages = UNTIMED,
    ) -> None:
        self.path = Path(path)
        check_suffix(self.path)
        self._stages = stages
        if not 0 <= crf <= 51:
            raise InputError(f"crf is {crf}; expected 0 (best) to 51")
        even = (width + width % 2, height + height % 2)
        if even != (width, height):
            logger.warning(
                "%s: frames are %d×%d and 4:2:0 video needs even sizes: the video is %d×%d, with the last column or row"
                " repeated", path, width, height, *even,
            )  # fmt: skip
        self.picture = PictureFormat(*even, frame_rate(fps), crf, segmented, preset)
        self.frames = 0
        self._way = choose_way(codec, self.picture, device)
        self.encoder = self._way.name
        if preset is not None:
            check_preset(self.encoder, preset)
        if not takes_quality(self._way.encoder):
            logger.warning("%s: %s is not told crf %d; it has a quality of its own", path, self.encoder, crf)
        self._device = torch.device(device)
        whole = even == (width, height) and self._way.where != "nvjpeg"
        self.pixel_format: PixelFormat = "nv12" if whole else "bgr"
        self._decode_times = DecodeTimes()
        self._error: BaseException | None = None
        self._batches: Inbox[_Batch] = Inbox(_QUEUE)
        self._resources = contextlib.ExitStack()
        with self._resources:
            temporary = self._resources.enter_context(replacing(self.path))
            self._output = self._resources.enter_context(open_output(self.path, temporary))
            self._video = self._add_video_stream()
            self._sound = SoundTrack(sound, self._output) if sound is not None else None
            if self._sound is not None:
                self._resources.callback(self._sound.close)
            self._pool = self._start_encoders()
            self._resources.callback(self._pool.close)
            if self._way.where != "nvenc":  # NVENC opens with its first frame: see _mux
                self._write_header()
            self._thread = threading.Thread(target=self._run, name=f"{ENCODE_THREAD} {self.path.name}", daemon=True)
            try:
                self._thread.start()
            except BaseException:  # there may be no more threads; or Ctrl-C came while it starts
                self._error = RuntimeError("the video was not begun")
                self._batches.end()
                raise
            self._resources = self._resources.pop_all()

    def write(self, frames: Tensor) -> None:
        """Queue a batch, which then belongs to the writer. Waits while the encoder is more than two batches behind.

        Args:
            frames: uint8, NV12 (B, H·3/2, W) of an even size, or BGR (B, H, W, 3).

        Raises:
            OutputError: an earlier batch could not be written.
        """
        if self._way.where == "nvjpeg":
            frames = rgb_planes(pad_to_even(frames if frames.dim() == 4 else from_nv12(frames)))
        elif frames.dim() == 4:
            frames = to_nv12(pad_to_even(frames))
        batch = self._to_host(frames) if self._way.where == "host" else _Batch(frames, _mark(frames))
        self._batches.put(batch, lambda: self._error)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure: BaseException | None = None
        try:
            with self._resources:
                try:
                    self._stop(error)
                except KeyboardInterrupt as interrupt:  # while the last frames are encoded
                    self._stop(interrupt)
                    raise
                failure = error or self._error
                if failure is not None:
                    raise failure
        finally:  # an error's traceback holds this frame, and its callers' hold this writer: both let go of the error
            self._error = self._error and RuntimeError("the video was not finished")
            error = failure = None

    @property
    def sound_seconds(self) -> float | None:
        """Length of the sound written so far; None without sound."""
        return None if self._sound is None else self._sound.seconds

    def _add_video_stream(self) -> av.VideoStream:
        try:
            stream = self._output.add_stream(self._way.encoder, rate=self.picture.rate)
        except ValueError as error:
            raise self._cannot_hold() from error
        assert isinstance(stream, av.VideoStream)
        if self._way.encoder in {"libx265", "hevc_nvenc"} and self.path.suffix.lower() != ".mkv":
            stream.codec_context.codec_tag = "hvc1"  # Apple's players know no other
        if self._way.where == "nvenc":
            configure_nvenc(stream.codec_context, self.picture)
        else:
            configure(stream.codec_context, self.picture)
        return stream

    def _write_header(self) -> None:
        """Write the container's header, which fails if the container cannot hold the codec."""
        try:
            self._output.start_encoding()
        except OSError as error:  # FFmpeg's errors of the file system are OSErrors too
            raise output_error(self.path, error) from error
        except (av.error.FFmpegError, ValueError) as error:
            raise self._cannot_hold() from error

    def _cannot_hold(self) -> InputError:
        wanted = "another codec" if self.path.suffix.lower() == ".mkv" else ".mkv"
        return InputError(f"{self.path}: {self.path.suffix} cannot hold {self.encoder}; expected {wanted}")

    def _start_encoders(self) -> SegmentPool[Any]:
        """Start the encoders; the first is the stream's own, from which the container takes its header."""
        model, way = self._video.codec_context, self._way
        if way.where != "nvenc":  # NVENC opens with its first frame
            try:
                model.open()
            except (av.error.FFmpegError, ValueError) as error:
                preset = f" with preset {self.picture.preset!r}" if self.picture.preset else ""
                raise InputError(f"{self.path}: {self.encoder} does not open{preset} ({why(error)})") from error

        def make(k: int) -> Encoder[Any]:
            if way.where == "nvenc":
                return NvencEncoder(self.picture, model, use_model=k == 0, device=self._device)
            if way.where == "nvjpeg":
                return JpegEncoder(self.picture)
            return HostEncoder(self.picture, model, use_model=k == 0)

        cut = way.where == "nvenc" or self.picture.segmented_by(way.encoder)
        length = self.picture.segment_length if cut else None
        return SegmentPool(make, workers=way.workers, length=length, name=self.path.name, stages=self._stages)

    def _to_host(self, frames: Tensor) -> _Batch:
        """Copy a batch to the host; from CUDA, after the current stream's work so far and while its later work runs."""
        if not frames.is_cuda:
            return _Batch(frames, None)
        stream = own_stream(frames.device, "copies to the host")
        stream.wait_stream(torch.cuda.current_stream(frames.device))
        with torch.cuda.stream(stream):
            host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
            host.copy_(frames, non_blocking=True)
            frames.record_stream(stream)  # its memory is not reused before it is copied
            return _Batch(host, _mark(frames))

    def _stop(self, error: BaseException | None) -> None:
        """Wait for the thread: until all is written or, after an error, until it has seen the error."""
        self._error = self._error or error
        self._batches.end()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._error is None and (batch := self._batches.get()) is not None:
                if batch.ready is not None:
                    batch.ready.synchronize()
                for frame in batch.frames.numpy() if self._way.where == "host" else batch.frames:
                    with self._encoding():
                        packets = self._pool.encode(frame)
                    self._mux(packets)
                    self.frames += 1
            if self._error is None:
                with self._encoding():
                    packets = self._pool.finish()
                self._mux(packets)
                with self._stages.time("mux"):
                    if self._sound is not None:
                        self._sound.finish()
                    self._output.close()
        except OSError as error:  # FFmpeg's errors of the file system are OSErrors too
            self._error = output_error(self.path, error)
        except BaseException as error:
            self._error = error

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[None]:
        """Report the error of an encoder that has opened, but does not take the frames."""
        try:
            yield
        except (OSError, MemoryError):  # FFmpeg's among them: it is not the frames
            raise
        except av.error.FFmpegError as error:
            raise InputError(
                f"{self.path}: {self.encoder} does not encode these frames ({why(error)}); expected another codec"
            ) from error

    def _mux(self, packets: list[av.Packet]) -> None:
        """Write packets in the frames' order, and the sound up to them."""
        if not packets:
            return
        with self._stages.time("mux"):
            if self._decode_times.packets == 0:
                self._write_header()
            for packet in packets:
                packet.stream = self._video
                self._decode_times.set(packet)
                self._output.mux_one(packet)
            if self._sound is not None:
                self._sound.advance(self._decode_times.packets / self.picture.rate)


def check_suffix(path: str | Path) -> None:
    """Check the name of a video that is to be written.

    Raises:
        InputError: its suffix is none of :data:`SUFFIXES`.
        OutputError: ``path`` is a folder.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises an error for a name that is too long
        raise OutputError(f"{path}: is a folder; expected the name of a file")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: suffix is {path.suffix!r}; expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


@contextlib.contextmanager
def open_output(path: Path, temporary: Path) -> Iterator[av.container.OutputContainer]:
    """Open the file that is to become ``path`` once it is whole; close it at the end if its writer has not."""
    options = {"fflags": "+bitexact"}  # nothing in the file depends on chance, the clock or FFmpeg's version
    if path.suffix.lower() in {".mp4", ".mov"}:
        options["movflags"] = "+faststart"
    output = av.open(media_url(temporary), "w", options=options)
    try:
        yield output
    finally:
        with contextlib.suppress(av.error.FFmpegError):
            output.close()


def pad_to_even(frames: Tensor) -> Tensor:
    """Repeat the last column or row of (B, H, W, C) frames of an odd size."""
    width, height = frames.shape[2] % 2, frames.shape[1] % 2
    if width:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return torch.cat([frames, frames[:, -1:]], dim=1) if height else frames
