"""Encoding frames where they are, on a CUDA device: NVENC without a copy to the host, and JPEG by nvJPEG.

None of this has run on a GPU yet. It follows PyAV's and torchvision's sources, and is tested with frames in memory as
far as possible.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import av
import av.error
import av.video.frame
import torch
from torch import Tensor

from gpupipe.errors import first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.versions import numbers
from gpupipe.video.codecs import PictureFormat, configure

_ENGINES = {
    **dict.fromkeys(("L4", "RTX 4080", "RTX 4090", "RTX 5080"), 2),
    **dict.fromkeys(("L40", "L40S", "RTX 6000 Ada", "RTX 5090"), 3),
    "RTX PRO 6000": 4,
}
"""NVENC engines by GPU: https://developer.nvidia.com/video-encode-decode-support-matrix; a GPU that is not named is
taken to have one."""

_WITHOUT_NVENC = (
    *("A100", "A800", "A30", "H100", "H200", "H800", "H20", "GH200"),
    *("B100", "B200", "GB200", "B300", "GB300"),
)


def nvenc_engines(gpu: str) -> int:
    """Return the number of NVENC engines of a GPU by its name, such as ``NVIDIA L4``; it may be 0."""
    words = f" {gpu} ".replace("-", " ")
    if any(f" {name} " in words for name in _WITHOUT_NVENC):
        return 0
    return next((count for name, count in _ENGINES.items() if f" {name} " in words), 1)


_IN_FLIGHT = 8
"""Frames that an NVENC session holds at a time; with a preset that looks ahead (``p6``, ``p7``) it takes more."""

_TAKES_OUR_CONTEXT = (18, 1)
"""The first version of PyAV whose frames may be in a CUDA context that exists already, such as PyTorch's."""

_PITCH = 256
"""Alignment in bytes of the rows of NVENC's surfaces: that of FFmpeg's own; NVENC asks for 4."""


class NvencEncoder:
    """Encodes NV12 tensors uint8 (H·3/2, W) on a CUDA device; nothing is copied to the host.

    A worker has one session for all its segments, in PyTorch's context. Each frame is copied into a surface of the
    session, which NVENC reads: surfaces are aligned whatever the width, and registered once. A surface is reused when
    the packet of its frame has come out. The caller must have waited until a frame is computed.

    Args:
        picture: what all frames share.
        model: a set-up encoder of the stream that the packets go into; see :func:`configure_nvenc`.
        use_model: this worker's session is ``model`` itself.
        device: where the tensors are.
    """

    def __init__(
        self, picture: PictureFormat, model: av.VideoCodecContext, *, use_model: bool, device: torch.device
    ) -> None:
        self._picture = picture
        self._context = model if use_model else _session(model.name, picture, device)
        self._context.flags = model.flags  # the container decides where headers go
        self._cuda: Any = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._cuda, self._stream = _cuda_context(device)
        self._device = device
        self._free: deque[Tensor] = deque()
        self._held: deque[Tensor] = deque()  # surfaces that NVENC holds, in the frames' order
        self._begins = True

    def encode(self, number: int, picture: Tensor) -> list[av.Packet]:
        """See :class:`~gpupipe.video.segments.Encoder`."""
        height = self._picture.height
        with torch.cuda.stream(self._stream):
            surface = self._free.popleft() if self._free else self._surface()
            surface.copy_(picture)
            if self._stream is not None:
                self._stream.synchronize()
            # Inside this context, because torch hands over only tensors on the thread's current device.
            planes = (surface[:height], surface[height:])
            frame = av.VideoFrame.from_dlpack(planes, format="nv12", cuda_context=self._cuda)
        frame.pts, frame.time_base = number, 1 / self._picture.rate
        if self._begins:
            frame.pict_type = av.video.frame.PictureType.I  # with forced-idr: an IDR frame
            self._begins = False
        self._held.append(surface)
        packets = self._context.encode(frame)
        for _ in packets:  # without B-frames they come in the frames' order
            self._free.append(self._held.popleft())
        return packets

    def finish(self) -> list[av.Packet]:
        """See :class:`~gpupipe.video.segments.Encoder`."""
        packets = self._context.encode(None)
        self._context.flush_buffers()  # the session stays open, for the next segment
        self._free.extend(self._held)
        self._held.clear()
        self._begins = True
        return packets

    def _surface(self) -> Tensor:
        """Allocate an NV12 frame, uint8 (H·3/2, W), whose rows begin at multiples of :data:`_PITCH` bytes."""
        rows, pitch = self._picture.height * 3 // 2, -(-self._picture.width // _PITCH) * _PITCH
        return torch.empty(rows, pitch, dtype=torch.uint8, device=self._device)[:, : self._picture.width]


class JpegEncoder:
    """Encodes RGB tensors uint8 (3, H, W) on a CUDA device as JPEGs, 4:4:4, by nvJPEG; only the JPEGs reach the host.

    The caller must have waited until a frame is computed.

    Args:
        picture: what all frames share.
    """

    def __init__(self, picture: PictureFormat) -> None:
        self._picture = picture

    def encode(self, number: int, picture: Tensor) -> list[av.Packet]:
        """See :class:`~gpupipe.video.segments.Encoder`."""
        packet = av.Packet(_jpeg(picture, jpeg_quality(self._picture.crf)))
        packet.pts = packet.dts = number
        packet.time_base = 1 / self._picture.rate
        packet.duration = 1
        packet.is_keyframe = True
        return [packet]

    def finish(self) -> list[av.Packet]:
        """See :class:`~gpupipe.video.segments.Encoder`."""
        return []


def jpeg_quality(crf: int) -> int:
    """Return JPEG's quality, 1 to 100, for a quality 0 to 51: 92 at 20. Like H.264, 6 steps double the quantiser.

    libjpeg scales its tables by 2 − q/50 for q ≥ 50 and by 50/q below.
    """
    scale = 0.16 * 2 ** ((crf - 20) / 6)
    return round(100 - 50 * scale if scale <= 1 else 50 / scale)


def configure_nvenc(context: av.VideoCodecContext, picture: PictureFormat, *, on_device: bool = True) -> None:
    """Set up an NVENC session that is fed from the device: closed groups of pictures of a segment's length."""
    configure(context, picture)
    if on_device:
        context.pix_fmt = "cuda"  # the format's details come with the first frame
        context.options["surfaces"] = str(_IN_FLIGHT)
    # Without B-frames, frames are decoded in the order they are shown: a segment ends with its last frame's packet.
    context.options |= {"g": str(picture.segment_length), "bf": "0", "forced-idr": "1"}


@functools.cache
def nvenc_sessions(encoder: str, picture: PictureFormat, device: torch.device) -> tuple[int, str]:
    """Open a session for each engine at once, encode black frames, and return (how many opened, why not more).

    More sessions than engines would be of no use. 0 opened means that NVENC cannot be used at all. The answer is kept
    for the process.
    """
    gpu = torch.cuda.get_device_name(device)
    wanted = nvenc_engines(gpu)
    if wanted == 0:
        return 0, f"{gpu} has no NVENC engine"
    if numbers(av.__version__) < _TAKES_OUR_CONTEXT:
        return 0, f"PyAV {av.__version__} does not encode in PyTorch's context; 18.1 does, on Python 3.11 and newer"
    try:
        ctypes.CDLL("libnvidia-encode.so.1")
    except OSError:
        return 0, (
            "the driver's libnvidia-encode.so.1 is missing; a container needs NVIDIA_DRIVER_CAPABILITIES to name video"
        )
    black = torch.zeros(picture.height * 3 // 2, picture.width, dtype=torch.uint8, device=device)
    black[picture.height :] = 128
    torch.cuda.synchronize(device)
    sessions: list[NvencEncoder] = []
    try:
        for _ in range(wanted):
            session = NvencEncoder(picture, _session(encoder, picture, device), use_model=True, device=device)
            for number in range(2):
                session.encode(number, black)
            sessions.append(session)
    except (av.error.FFmpegError, RuntimeError, TypeError, ValueError) as error:
        return len(sessions), first_line(error)
    finally:
        for session in sessions:
            with contextlib.suppress(av.error.FFmpegError):
                session.finish()
    return wanted, ""


def rgb_planes(frames: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) BGR → (B, 3, H, W) RGB, as :class:`JpegEncoder` takes each."""
    return frames.flip(-1).permute(0, 3, 1, 2).contiguous()


def _jpeg(rgb: Tensor, quality: int) -> bytes:
    """Encode uint8 (3, H, W), which must be computed already, as a JPEG.

    torchvision waits for the stream that was current when it first encoded: if that were the stream of rendering, each
    frame would wait for all that is queued there. Where a program has encoded JPEGs on this GPU before, it is another
    one's, and nothing orders our copy of the JPEG after its encoding: such a program should not have gpupipe encode
    them.
    """
    from torchvision.io import encode_jpeg  # noqa: PLC0415 - takes a second

    with torch.cuda.stream(_jpeg_stream(rgb.device) if rgb.is_cuda else None):
        jpeg: Tensor = encode_jpeg(rgb, quality=quality).cpu()
    return jpeg.numpy().tobytes()


@functools.cache
def _jpeg_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def can_encode_jpeg(device: torch.device) -> bool:
    """Return whether nvJPEG encodes on this device; a refusal is noted as a fallback."""
    try:
        _jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8, device=device), 75)
    except (ImportError, AttributeError, RuntimeError) as error:  # torchvision plans to leave it to torchcodec
        note_fallback(f"nvJPEG does not encode here ({first_line(error)}): the CPU encodes JPEGs")
        return False
    return True


def _session(encoder: str, picture: PictureFormat, device: torch.device) -> av.VideoCodecContext:
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    configure_nvenc(context, picture, on_device=device.type == "cuda")
    return context


@functools.cache
def _cuda_context(device: torch.device) -> tuple[Any, torch.cuda.Stream]:
    """Return PyTorch's context on a device, as FFmpeg knows it, and NVENC's stream; all sessions share both.

    By default FFmpeg takes the stream that PyTorch renders on, where NVENC and rendering would wait for each other.
    PyAV accepts another stream on the first device only.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.Stream(index)
    with current_context(device):
        own = {"cuda_stream": stream.cuda_stream} if index == 0 else {}
        context = av.video.frame.CudaContext(device_id=index, primary_ctx=False, current_ctx=True, **own)
        planes = (torch.zeros(rows, 64, dtype=torch.uint8, device=device) for rows in (64, 32))
        av.VideoFrame.from_dlpack(tuple(planes), format="nv12", cuda_context=context)  # looks for its context now
    return context, stream


@contextlib.contextmanager
def current_context(device: torch.device) -> Iterator[None]:
    """Make PyTorch's context on a device this thread's current one, for FFmpeg to take.

    FFmpeg can ask for a device's primary context too, but refuses one that exists already with other flags than its
    own, such as PyTorch's.
    """
    with torch.cuda.device(device):
        torch.zeros(1, device=device)
        yield
