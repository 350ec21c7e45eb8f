"""Ways to encode video: chosen once by codec, device and what opens here; a fallback is logged."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from gpupipe.errors import DeviceError
from gpupipe.fallbacks import note_fallback
from gpupipe.video.codecs import CODECS, PictureFormat, encoder_obstacle
from gpupipe.video.cuda import can_encode_jpeg, nvenc_sessions
from gpupipe.video.segments import pool_size


class Way(NamedTuple):
    """How a video is encoded.

    ``where``: on the ``host`` FFmpeg encodes frames from memory; ``nvenc`` and ``nvjpeg`` encode them on the device
    that they are on. ``workers``: how many encoders work side by side; several work on segments.
    """

    encoder: str
    where: Literal["host", "nvenc", "nvjpeg"]
    workers: int = 1

    @property
    def name(self) -> str:
        """The encoder's name in the record of a render."""
        return "nvjpeg" if self.where == "nvjpeg" else self.encoder


def choose_way(codec: str, picture: PictureFormat, device: torch.device | str = "cpu") -> Way:
    """Return the first way behind ``codec`` that opens on this machine, for frames of this kind on ``device``.

    On CUDA, NVENC takes frames from the device, in as many sessions as the GPU has engines, and nvJPEG encodes
    ``mjpeg``; all other encoders get frames that are copied to the host.

    Raises:
        DeviceError: none opens; the message gives each one's reason.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if on_gpu and codec == "mjpeg" and can_encode_jpeg(device):
        return Way("mjpeg", "nvjpeg")
    reasons: list[str] = []
    reason: str | None
    for encoder in CODECS.get(codec, (codec,)):
        if on_gpu and encoder.endswith("_nvenc"):
            sessions, reason = nvenc_sessions(encoder, picture, device)
            if sessions and reason:
                note_fallback(
                    f"{encoder}: {sessions + 1} sessions do not open at once ({reason}; drivers of GeForce cards cap"
                    f" them): {sessions} encode"
                )
            if sessions:
                return Way(encoder, "nvenc", sessions)
        elif (reason := encoder_obstacle(encoder, picture.width, picture.height)) is None:
            if reasons and on_gpu:
                note_fallback(
                    f"{'; '.join(reasons)}: frames are copied to the host and {encoder} encodes them; --codec mjpeg"
                    " would encode them on the GPU, to a larger file"
                )
            elif reasons and torch.cuda.is_available():
                note_fallback(f"{'; '.join(reasons)}: {encoder} encodes instead")
            return Way(encoder, "host", pool_size(picture) if picture.segmented_by(encoder) else 1)
        reasons.append(f"{encoder}: {reason}")
    raise DeviceError(
        f"codec {codec!r} does not open here ({'; '.join(reasons)}); expected one of {', '.join(CODECS)} or the name of"
        " an encoder of this FFmpeg"
    )
