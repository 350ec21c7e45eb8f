"""Frames of a video file by their number, as NV12 tensors: decoded by FFmpeg's threads, or by NVDEC where there is one.

BT.709 in limited range, which nearly all video of today is, is kept bit for bit. Other colours are converted once, from
YCbCr to YCbCr, so that all later code knows one convention: that of :mod:`gpupipe.kernels.nv12`.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import av
import av.error
import numpy as np
import torch
from av.codec.hwaccel import HWAccel
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.errors import InputError, first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.files import input_file, media_url
from gpupipe.kernels.nv12 import ycbcr_matrix
from gpupipe.video.codecs import media_errors
from gpupipe.video.cuda import current_context

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")

VideoDecoder = Literal["threads", "nvdec"]
Matrix = Literal["bt709", "bt601"]

_RECENT, _RECENT_BYTES = 32, 64 << 20
"""How many decoded frames are kept, and in how many bytes: a walk backwards needs next the frames that were decoded on
the way to the one asked for."""

_HD = (1280, 576)
"""Video that names no matrix is taken as BT.709 from this width on, or above this height, as mpv and others do."""


class Colours(NamedTuple):
    """How a video's Y, Cb and Cr are to be interpreted."""

    matrix: Matrix
    full_range: bool


BT709 = Colours("bt709", full_range=False)
_KR_KB = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114)}
_MATRICES: dict[int, Matrix] = {1: "bt709", 5: "bt601", 6: "bt601"}
"""Matrices by the numbers that videos carry for them: ITU-T H.273, table 4."""
_UNSPECIFIED, _LIMITED_RANGE, _FULL_RANGE = 2, 1, 2


class VideoFrames:
    """Random access to the frames of a video file. Any thread may ask; one decodes at a time.

    Frames are identified by their times, so that a seek finds the same frames as decoding from the start. Walking
    forwards decodes each frame once; walking backwards decodes from the keyframe before, and keeps the last frames.

    Args:
        path: the file; its first video stream counts.
        device: where frames go. On a CUDA device NVDEC decodes them if it takes the stream.

    Attributes:
        length: number of frames.
        width, height: in pixels, even.
        rate: frames a second, on average; None for a single frame.
        colours: how the file's pixels are to be interpreted; :meth:`read` always gives BT.709 in limited range.
        names_colours: whether the file names their matrix. If not, it is taken for its size.
        decoder: ``"nvdec"`` or ``"threads"``.

    Raises:
        InputError: the file is missing, is not a video, or has odd sizes, a rotation or unknown colours.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        input_file(path, "video file")
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, Tensor] = OrderedDict()
        self._times, keys = self._scan()
        self.decoder: VideoDecoder = "threads"
        self._container = self._open()
        # PyAV's containers refer to themselves: file and threads would stay until Python looks for cycles.
        self._close = weakref.finalize(self, _close, self._container)
        self._close.atexit = False  # then another thread may still decode
        first, start = self._first()
        self.width, self.height = first.width, first.height
        # No player shows frames before the first decoded one: they refer to pictures that were cut away.
        self._times = self._times[bisect.bisect_left(self._times, start) :]
        self.length = len(self._times)
        seconds = (self._times[-1] - self._times[0]) * (self._container.streams.video[0].time_base or 0)
        self.rate = float((self.length - 1) / seconds) if seconds else None
        # The first frame can be sought too: if an edit list begins between keyframes, that frame's keyframe is earlier.
        self._keys = [start, *(key for key in keys if key > start)]
        self.names_colours = True
        self.colours = self._colours_of(first)
        self._recent_count = max(2, min(_RECENT, _RECENT_BYTES // (self.width * self.height * 3 // 2)))
        self._next = 0  # the number of the frame that the decoder gives next
        self._seek(0)

    def read(self, numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Decode frames.

        Returns:
            NV12 uint8 (n, H·3/2, W) on ``device``, BT.709 in limited range.

        Raises:
            InputError: a frame that cannot be decoded, or is of another size; or the file is closed.
        """
        with self._lock:
            if not self._close.alive:  # PyAV would decode from freed memory
                raise InputError(f"{self.path}: is closed; expected an open video file")
            found = {number: self._frame(number) for number in sorted(set(map(int, numbers)))}
        return torch.stack([found[int(number)] for number in numbers]).to(self.device)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close()

    # ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _scan(self) -> tuple[list[int], list[int]]:
        """Return the times of all frames, in order, and those of the keyframes, without decoding any."""
        with self._reporting(), av.open(media_url(self.path)) as container:
            if not container.streams.video:
                raise InputError(f"{self.path}: has no picture; expected a video file")
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in container.demux(video=0)
                if packet.pts is not None and not packet.is_discard and _is_shown(packet)
            ]
        times = sorted({pts for pts, _ in packets})
        keys = sorted({pts for pts, key in packets if key})
        if not times or len(times) < len(packets):
            raise InputError(
                f"{self.path}: has {len(packets)} frames at {len(times)} times; expected a whole video file"
            )
        return times, keys

    def _open(self) -> av.container.InputContainer:
        with self._reporting():
            if self.device.type == "cuda":
                container, reason = self._open_nvdec()
                if container is not None:
                    self.decoder = "nvdec"
                    return container
                note_fallback(f"NVDEC does not take {self.path.name} ({reason}): the CPU decodes it")
            container = av.open(media_url(self.path))
            container.streams.video[0].thread_type = "AUTO"
            return container

    def _open_nvdec(self) -> tuple[av.container.InputContainer | None, str]:
        """Open the file to be decoded on the GPU, into surfaces of PyTorch's context; or return None, and why not."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        container = None
        try:
            # FFmpeg is to take the thread's current context, not the device's primary one.
            current: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
            wanted = HWAccel("cuda", device=index, allow_software_fallback=False, options=current, is_hw_owned=True)
            with current_context(self.device):
                container = av.open(media_url(self.path), hwaccel=wanted)
            first, stream = next(container.decode(video=0)), container.streams.video[0]
            luma = torch.from_dlpack(first.planes[0].__dlpack__())
            if not luma.is_cuda or luma.dtype != torch.uint8:
                raise ValueError(f"gives {'frames of the host' if not luma.is_cuda else luma.dtype}, not nv12")
            if (first.width, first.height) != (stream.width, stream.height):
                raise ValueError("does not crop the left and the top")
            container.seek(self._times[0], stream=stream)
            return container, ""
        except (av.error.FFmpegError, RuntimeError, ValueError, StopIteration) as error:
            if container is not None:
                _close(container)
            return None, first_line(error)

    def _first(self) -> tuple[av.VideoFrame, int]:
        """Return the first frame and its time."""
        with self._reporting():
            first = next(self._container.decode(video=0), None)
        if first is None or first.pts is None:
            raise InputError(f"{self.path}: holds no frame that can be decoded; expected a whole video file")
        if first.width % 2 or first.height % 2:
            raise InputError(
                f"{self.path}: frames are {first.width}×{first.height}; expected even sizes, as 4:2:0 video needs"
            )
        if first.rotation:
            raise InputError(
                f"{self.path}: is to be turned by {first.rotation}° when shown; expected upright frames, as landmarks"
                " are found in them: encode it again"
            )
        aspect = self._container.streams.video[0].sample_aspect_ratio
        if aspect not in (None, 0, 1):
            raise InputError(f"{self.path}: its pixels are {aspect} wide; expected square ones: encode it again")
        return first, first.pts

    def _colours_of(self, frame: av.VideoFrame) -> Colours:
        if _is_rgb(frame.format):
            return BT709  # the conversion to NV12 makes it so
        if _is_grey(frame.format):  # without a tag it is full, as FFmpeg takes it
            return Colours("bt709", full_range=int(frame.color_range) != _LIMITED_RANGE)
        full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
        number = int(frame.colorspace)
        if number == _UNSPECIFIED:
            self.names_colours = False
            return Colours("bt709" if self.width >= _HD[0] or self.height > _HD[1] else "bt601", full)
        if number not in _MATRICES:
            raise InputError(f"{self.path}: its colour matrix has number {number} (H.273); expected BT.709 or BT.601")
        return Colours(_MATRICES[number], full)

    # ── the way to a frame ────────────────────────────────────────────────────────────────────────────────────────────

    def _frame(self, number: int) -> Tensor:
        if number not in self._recent:
            key = bisect.bisect_left(self._times, self._key_before(number))
            if number < self._next or key > self._next:
                self._seek(key)
            while self._next <= number:
                self._step(keep=number - self._next < self._recent_count)
        self._recent.move_to_end(number)
        return self._recent[number]

    def _key_before(self, number: int) -> int:
        """Return the time of the last keyframe that is not later than a frame."""
        return self._keys[bisect.bisect_right(self._keys, self._times[number]) - 1]

    def _seek(self, number: int) -> None:
        """Make the decoder begin at a keyframe, or at an earlier one if the decoder does not give that frame.

        A stream that is refreshed gradually marks as keyframes the frames at which a decoder begins to recover: the
        decoder gives no frame until it has.
        """
        with self._reporting():
            self._container.seek(self._times[number], stream=self._container.streams.video[0])
            frames = self._container.decode(video=0)
            first = next((one for one in frames if one.pts is None or one.pts >= self._times[number]), None)
        if number and (first is None or first.pts != self._times[number]):
            self._keys.remove(self._times[number])
            self._seek(bisect.bisect_left(self._times, self._key_before(number)))
            return
        self._frames: Iterator[av.VideoFrame] = frames if first is None else itertools.chain([first], frames)
        self._next = number

    def _step(self, *, keep: bool) -> None:
        """Take the next frame from the decoder; frames before it, which a seek may give, are skipped."""
        with self._reporting():
            frame = next((one for one in self._frames if one.pts is None or one.pts >= self._times[self._next]), None)
        if frame is None or frame.pts != self._times[self._next] or frame.is_corrupt:
            raise InputError(f"{self.path}: frame {self._next} cannot be decoded; expected a whole video file")
        if (frame.width, frame.height) != (self.width, self.height):
            raise InputError(
                f"{self.path}: frame {self._next} is {frame.width}×{frame.height}; expected {self.width}×{self.height}"
                " as the first"
            )
        if keep:
            self._recent[self._next] = to_bt709(self._pixels(frame), self.colours)
            while len(self._recent) > self._recent_count:
                self._recent.popitem(last=False)
        self._next += 1

    def _pixels(self, frame: av.VideoFrame) -> Tensor:
        if self.decoder == "threads":
            return torch.from_numpy(host_nv12(frame, self.colours))
        # Handed over as capsules: PyAV refuses the stream that torch would ask it to wait for, so this waits instead.
        torch.cuda.synchronize(self.device)
        luma, chroma = (torch.from_dlpack(plane.__dlpack__()) for plane in frame.planes)
        pixels = torch.cat([luma, chroma.flatten(1)])  # a copy: the decoder will reuse the surface
        torch.cuda.synchronize(self.device)
        return pixels

    def _reporting(self) -> contextlib.AbstractContextManager[None]:
        return media_errors(self.path, "not a video that FFmpeg decodes")


def _is_shown(packet: av.Packet) -> bool:
    """Return whether a packet's picture is shown: VP8 has some that others only refer to (RFC 6386, 9.1)."""
    return packet.stream.codec_context.name != "vp8" or not packet.size or bool(bytes(packet)[0] & 0x10)


def _is_rgb(form: av.VideoFormat) -> bool:
    return form.is_rgb or form.has_palette


def _is_grey(form: av.VideoFormat) -> bool:
    """Return whether pixels are luma, with or without opacity. A GPU's format tells of no component."""
    return len(form.components) in {1, 2} and not _is_rgb(form)


def host_nv12(frame: av.VideoFrame, colours: Colours) -> NDArray[np.uint8]:
    """Return a decoded frame as NV12 (H·3/2, W): 8-bit 4:2:0 is only rearranged, other formats are converted to it.

    Grey keeps its range: the conversion to NV12 would take all of it for full.
    """
    height, width = frame.height, frame.width
    if _is_grey(frame.format):
        grey = np.full((height * 3 // 2, width), 128, dtype=np.uint8)
        grey[:height] = frame.reformat(format="gray").to_ndarray()
        return grey
    if frame.format.name not in ("yuv420p", "yuvj420p", "nv12"):
        space = Colorspace.ITU709 if colours.matrix == "bt709" else Colorspace.ITU601
        extent = ColorRange.JPEG if colours.full_range else ColorRange.MPEG
        source = {} if _is_rgb(frame.format) else {"src_colorspace": space, "src_color_range": extent}
        frame = frame.reformat(format="nv12", dst_colorspace=space, dst_color_range=extent, **source)
    planes: NDArray[np.uint8] = np.asarray(frame.to_ndarray(), dtype=np.uint8)
    if frame.format.name == "nv12":
        return planes
    out = np.empty_like(planes)
    out[:height] = planes[:height]
    pairs = out[height:].reshape(height // 2, width // 2, 2)
    for channel, plane in enumerate(planes[height:].reshape(2, height // 2, width // 2)):
        pairs[..., channel] = plane
    return out


def to_bt709(frame: Tensor, colours: Colours) -> Tensor:
    """NV12 (H·3/2, W) of any :class:`Colours` → BT.709 in limited range, rounded half up; unchanged if it is that.

    The conversion is linear: YCbCr → RGB → YCbCr, not clipped in between. Chroma depends on chroma alone, because grey
    has none in either, and each luma uses the chroma of its 2×2 pixels.
    """
    if colours == BT709:
        return frame
    height, width = frame.shape[0] // 3 * 2, frame.shape[1]
    source = ycbcr_matrix(*_KR_KB[colours.matrix], full_range=colours.full_range)
    matrix = (ycbcr_matrix() @ torch.linalg.inv(source)).float().tolist()
    luma = frame[:height].float() - (0 if colours.full_range else 16)
    cb, cr = (frame[height:].float() - 128).view(height // 2, width // 2, 2).unbind(-1)
    shift = (cb * matrix[0][1] + cr * matrix[0][2]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    chroma = [cb * row[1] + cr * row[2] + 128 for row in matrix[1:]]
    out = torch.cat([luma * matrix[0][0] + shift + 16, torch.stack(chroma, dim=-1).view(height // 2, width)])
    return out.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)


def _close(container: av.container.InputContainer) -> None:
    """Close a file whose frames were decoded.

    When PyAV frees a decoder, it keeps Python's lock and waits for the decoder's threads. With PyAV's log on, which
    torchvision up to 0.25 switches on, one that has an error to tell waits for that lock: so let them finish before.
    """
    container.streams.video[0].codec_context.flush_buffers()
    container.close()
