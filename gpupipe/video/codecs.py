"""Codecs: which FFmpeg encoder stands behind a name, what it is fed, and whether it opens on this machine.

Pictures are BT.709 in limited range, tagged so, with chroma in the middle of its 2×2 pixels, as in kernels/nv12.py.
Motion-JPEG is the exception: a JPEG is BT.601 in full range by its standard (JFIF), whatever tags say, and is converted
to that.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import numpy as np
import torch
from av.codec.codec import UnknownCodecError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray

from gpupipe.errors import InputError

logger = logging.getLogger(__name__)

CODECS: dict[str, tuple[str, ...]] = {
    "auto": ("h264_nvenc", "libx264"),
    "h264": ("h264_nvenc", "libx264"),
    "hevc": ("hevc_nvenc", "libx265"),
    "av1": ("av1_nvenc", "libsvtav1"),
    "mjpeg": ("mjpeg",),
    "ffv1": ("ffv1",),
}
"""FFmpeg encoders behind a codec's name, in the order they are tried; any encoder's own name is taken too.

``mjpeg`` encodes each frame on its own, for editing; ``ffv1`` keeps the NV12 that it is given without loss, for parity.
"""

X264_PRESET = "veryfast"
"""libx264's preset, unless another is asked for."""

_NVENC = {"preset": "p4", "rc": "vbr", "cq": "{crf}", "b": "0"}
_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": X264_PRESET, "crf": "{crf}", "x264-params": "chromaloc=1"},
    "libx265": {
        "preset": "fast",
        "crf": "{crf}",
        "x265-params": "log-level=none:chromaloc=1:open-gop=0",
    },
    "libsvtav1": {"preset": "9", "crf": "{crf}"},
    "libvpx-vp9": {"crf": "{crf}", "b": "0", "row-mt": "1", "cpu-used": "4"},
    "h264_nvenc": _NVENC,
    "hevc_nvenc": _NVENC,
    "av1_nvenc": _NVENC,
    "ffv1": {"level": "3", "slicecrc": "1", "g": "1"},
}

_X26X_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"),
    *"0123456789",
)

_WITHOUT_AVX512 = "AVX2,FMA3,BMI2,LZCNT"
"""What x264 may use of a processor with AVX-512: all but that. With it, macroblock tree and B-frames now and then give
other bytes for the same frames (seen with small pictures, libx264.so.165), and it is no faster."""

SEGMENTED = frozenset({"libx264", "libx265"})
"""Encoders that can run on one thread each, side by side on the segments of a clip (video/segments.py)."""

FULL_RANGE_601 = frozenset({"mjpeg"})
"""Encoders whose pictures are BT.601 in full range."""

_NO_MATRIX = 0
"""The number of RGB among the colour matrices, H.273, table 4; PyAV has no name for it."""

_BEST_IS_ONE = frozenset({"libx264", "libsvtav1", "h264_nvenc", "hevc_nvenc", "av1_nvenc"})
"""Encoders that take a quality of 0 for something else: x264 for lossless, in a profile that few players know, the
others as unset, to choose their own (35 of 63, or a bit rate)."""


class PictureFormat(NamedTuple):
    """What all frames of a video share.

    Width and height in pixels, even; frames a second; quality 0 to 51; whether it is encoded in segments
    (video/segments.py), by encoders that can do so; the encoder's preset, None for ours.
    """

    width: int
    height: int
    rate: Fraction
    crf: int
    segmented: bool = False
    preset: str | None = None

    @property
    def frame_bytes(self) -> int:
        """Bytes of one NV12 frame."""
        return self.width * self.height * 3 // 2

    @property
    def segment_length(self) -> int:
        """Number of frames in a segment."""
        return segment_length(self.rate)

    def segmented_by(self, encoder: str) -> bool:
        """Return whether an encoder that is fed from memory encodes these frames in segments."""
        return self.segmented and encoder in SEGMENTED


def segment_length(rate: Fraction) -> int:
    """Return the number of frames in a segment (video/segments.py) at ``rate`` frames a second: two seconds."""
    return max(2, round(2 * rate))


def configure(context: av.VideoCodecContext, picture: PictureFormat) -> None:
    """Set up an encoder that is not open yet."""
    encoder = context.name
    context.width, context.height = picture.width, picture.height
    context.pix_fmt = pixel_format(encoder)
    context.framerate = picture.rate
    context.time_base = 1 / picture.rate
    jpeg, rgb = encoder in FULL_RANGE_601, av.VideoFormat(context.pix_fmt).is_rgb
    context.colorspace = _NO_MATRIX if rgb else Colorspace.ITU601 if jpeg else Colorspace.ITU709
    context.color_range = ColorRange.JPEG if jpeg or rgb else ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.thread_count, context.thread_type = 0, "AUTO"  # all cores, frames side by side
    quality = max(picture.crf, 1) if encoder in _BEST_IS_ONE else picture.crf
    context.options = {key: value.format(crf=quality) for key, value in _OPTIONS.get(encoder, {}).items()}
    if picture.preset is not None:
        context.options |= {"preset": picture.preset}
    if encoder == "libx264" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        context.options["x264-params"] += f":asm={_WITHOUT_AVX512}"
    if encoder == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # errors only; by default it prints its settings
    if picture.segmented_by(encoder):
        # One IDR frame, the segment's first: a cut gets a plain I frame, so that no two IDR frames meet at a joint
        # (their idr_pic_id would have to differ, H.264 7.4.3).
        context.thread_count = 1
        context.options |= {"g": str(4 * picture.segment_length), "keyint_min": str(2 * picture.segment_length)}
        if encoder == "libx265":
            context.options["x265-params"] += ":pools=none:frame-threads=1"
    if encoder == "mjpeg":
        context.qmin = context.qmax = jpeg_quantiser(picture.crf)  # no rate control


def takes_quality(encoder: str) -> bool:
    """Return whether an encoder is told the quality that is asked for, or needs none."""
    return encoder in {"mjpeg", "ffv1"} or "{crf}" in _OPTIONS.get(encoder, {}).values()


def check_preset(encoder: str, preset: str) -> None:
    """Check that an encoder has a preset, as far as its presets are known here.

    libx264 and libx265 report an unknown preset on standard error only.

    Raises:
        InputError: the encoder has no presets, or none of that name.
    """
    if "preset" not in _OPTIONS.get(encoder, {}):
        raise InputError(f"preset is {preset!r} and {encoder} has none; expected no preset")
    if encoder in {"libx264", "libx265"} and preset not in _X26X_PRESETS:
        raise InputError(f"{encoder} does not open with preset {preset!r}; expected one of {', '.join(_X26X_PRESETS)}")


def jpeg_quantiser(crf: int) -> int:
    """Return a JPEG's quantiser scale, 1 to 31, for a quality 0 to 51: 3 at 20; doubled every 6 steps, like H.264's."""
    return min(max(round(3 * 2 ** ((crf - 20) / 6)), 1), 31)


def pixel_format(encoder: str) -> str:
    """Return the pixel format that an encoder is fed: NV12 if it takes that, else planar 4:2:0, else its first."""
    if encoder in FULL_RANGE_601:
        return "yuvj420p"
    formats = [format.name for format in av.Codec(encoder, "w").video_formats or ()]
    return next((name for name in ("nv12", "yuv420p") if name in formats), formats[0] if formats else "yuv420p")


def host_frame(nv12: NDArray[np.uint8], format: str) -> av.VideoFrame:
    """Make a frame in an encoder's pixel format ``format`` from NV12 uint8 (H·3/2, W) in memory.

    An NV12 encoder may read ``nv12`` itself, without a copy: do not write to it afterwards.
    """
    in_place = format == "nv12" and nv12.shape[0] % 6 == 0  # PyAV mistakes other heights for smaller ones
    make = av.VideoFrame.from_numpy_buffer if in_place else av.VideoFrame.from_ndarray
    frame = make(nv12, format="nv12")
    frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    if format == "yuvj420p":
        return frame.reformat(
            format=format,
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
        )
    return frame if format == "nv12" else frame.reformat(format=format)


def encoder_obstacle(encoder: str, width: int = 1280, height: int = 720) -> str | None:
    """Return why an encoder does not open on this machine at this size; None if it does.

    It is tried at 25 frames a second with our own preset. Another preset that it does not have is the caller's mistake,
    which is reported when the encoder is opened for good.
    """
    try:
        codec = av.Codec(encoder, "w")
        if codec.type != "video":
            return "not a video encoder"
        context = av.CodecContext.create(codec, "w")
        assert isinstance(context, av.VideoCodecContext)
        configure(context, PictureFormat(width, height, Fraction(25), 20))
        context.open()
    except UnknownCodecError:
        return "there is no such encoder"
    except (av.error.FFmpegError, ValueError) as error:
        logger.debug("encoder %s does not open: %s", encoder, error)
        without_gpu = encoder.endswith("_nvenc") and not torch.cuda.is_available()
        return "no CUDA GPU is available" if without_gpu else why(error)
    return None


def why(error: Exception) -> str:
    """Return what an error of FFmpeg's says, without the call that met it."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def media_errors(path: str | Path, what: str) -> Iterator[None]:
    """Raise FFmpeg's errors about a file, and PyAV's, as InputError: ``<path>: <what> (<why>)``."""
    try:
        yield
    except InputError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: {what} ({why(error)})") from error
