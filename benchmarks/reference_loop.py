"""The loop that gpupipe replaces, on OpenCV and PyTorch: one frame at a time, through the disk, encoded twice.

    {i}.jpg ─ imread ─ crop ─ 328² ─ inner 320² ─ [inner, masked] ─ U-Net, batch 1 ─ 328² canvas ─ crop's size ─ paste
    {i}.lms ─────────────┘            sound: rows [i-8, i+8) ────────┘                                            │
                                                     .mp4 ─ H.264 + AAC ─ decode ─ temporary MJPEG .avi ──────────┘

It is both the oracle of the parity tests (:func:`reference_frame` and :func:`reference_frames`) and the baseline of the
benchmark (:func:`render`). It shares nothing with the pipeline but the network's definition, so that a mistake in one
cannot hide in the other, and it is written to be checked by eye, not to be fast.

Images are uint8 HWC BGR, boxes half-open ``(xmin, ymin, xmax, ymax)`` in pixels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np
import numpy.typing as npt
import torch

from gpupipe.models import AUDIO_SHAPES, Mode

Image = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

CROP = 328
RING = 4
INNER = slice(RING, CROP - RING)
MASK_ROWS = slice(5, 310)
MASK_COLUMNS = slice(5, 315)
KEEP_COLOURS = ((0, 0, 255), (255, 255, 255))
"""Where the parsing image has one of these colours, BGR, the template's pixel stays."""


class Network(Protocol):
    """What the loop runs for each frame: :class:`~gpupipe.models.UNet328`, or anything that is called alike."""

    mode: Mode

    def parameters(self) -> Iterator[torch.Tensor]:
        """The inputs go to the first one's device."""
        ...

    def __call__(self, image: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """image (1, 6, 320, 320) in [0, 1], audio (1, *audio_shape) → (1, 3, 320, 320) in (0, 1)."""
        ...


STAGES = ("decode", "crop", "network", "paste", "mjpeg", "encode")


@dataclass
class StageTimes:
    """Seconds spent in each stage, summed over frames. Reading the clock takes about a microsecond a frame."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


# ── what frame i is made of ───────────────────────────────────────────────────────────────────────────────────────────


def ping_pong(length: int, start: int = 0) -> Iterator[int]:
    """Endless template indices: start+1, start+2 … length-1, length-2 … start, start+1 …

    Raises:
        ValueError: ``start`` is outside ``[0, length)``.
    """
    if not 0 <= start < length:
        raise ValueError(f"start frame is {start}; expected 0 … {length - 1}")
    index, step = start, 1
    while True:
        if length - start > 1:
            if index == length - 1:
                step = -1
            elif index == start:
                step = 1
            index += step
        yield index


def audio_window(features: npt.NDArray[np.float32], i: int, mode: Mode = "ave") -> npt.NDArray[np.float32]:
    """Frame i's window: rows ``[i-8, i+8)`` of ``features`` (N, …), zeros outside, in the shape ``AUDIO_SHAPES[mode]``.

    Of features that are windowed already, (N, *AUDIO_SHAPES[mode]), it is row i.
    """
    if features.shape[1:] == AUDIO_SHAPES[mode]:
        return features[i]
    rows = [features[j] if 0 <= j < len(features) else np.zeros_like(features[0]) for j in range(i - 8, i + 8)]
    return np.stack(rows).reshape(AUDIO_SHAPES[mode])


def read_image(path: Path) -> Image:
    """(H, W, 3) uint8 BGR.

    Raises:
        ValueError: the file is missing or no image.
    """
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path}: cannot be read as an image")
    return image.astype(np.uint8, copy=False)


def read_landmarks(path: Path) -> npt.NDArray[np.int32]:
    """One ``x y`` a line → (N, 2), float32 truncated to int32."""
    points = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return np.array(points, dtype=np.float32).astype(np.int32)


def box_from_landmarks(landmarks: npt.NDArray[np.int32], height: int, width: int) -> Box:
    """The square given by points 1, 31 and 52, clamped to the frame, after which it may no longer be square.

    Raises:
        ValueError: the box is empty, inverted or entirely outside the frame.
    """
    xmin, xmax, ymin = int(landmarks[1][0]), int(landmarks[31][0]), int(landmarks[52][1])
    ymax = ymin + (xmax - xmin)
    box = max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"box is ({xmin}, {ymin}, {xmax}, {ymax}); expected one that meets the frame of {width}×{height}"
        )
    return box


# ── one frame ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def crop_face(frame: Image, box: Box) -> tuple[Image, Image]:
    """The crop at 328×328, and the network's input (6, 320, 320): inner BGR, then inner with the mouth masked."""
    xmin, ymin, xmax, ymax = box
    crop = _resize(frame[ymin:ymax, xmin:xmax], CROP, CROP)
    inner = crop[INNER, INNER]
    masked = inner.copy()
    masked[MASK_ROWS, MASK_COLUMNS] = 0
    return crop, np.concatenate([inner, masked], axis=2).transpose(2, 0, 1)


@torch.no_grad()
def run_network(network: Network, stacked: Image, audio: npt.NDArray[np.float32]) -> Image:
    """(6, 320, 320) uint8 and one window → the mouth (320, 320, 3) uint8 BGR; ×255 is truncated, not rounded."""
    device = next(network.parameters()).device
    image = torch.from_numpy(stacked.astype(np.float32) / 255).unsqueeze(0).to(device)
    sound = torch.from_numpy(np.ascontiguousarray(audio)).unsqueeze(0).to(device)
    mouth = network(image, sound)[0].cpu().numpy().transpose(1, 2, 0)
    return (mouth * 255).astype(np.uint8)


def paste_face(frame: Image, box: Box, crop: Image, mouth: Image, parsing: Image | None = None) -> Image:
    """A copy of ``frame`` with the face pasted into the box: the crop with the mouth inside its ring of 4 pixels."""
    xmin, ymin, xmax, ymax = box
    canvas = crop.copy()
    canvas[INNER, INNER] = mouth
    face = _resize(canvas, xmax - xmin, ymax - ymin)
    if parsing is not None:
        inside = parsing[ymin:ymax, xmin:xmax]
        keep = np.zeros(inside.shape[:2], dtype=bool)
        for colour in KEEP_COLOURS:
            keep |= (inside == np.array(colour, dtype=np.uint8)).all(axis=2)
        face[keep] = frame[ymin:ymax, xmin:xmax][keep]
    result = frame.copy()
    result[ymin:ymax, xmin:xmax] = face
    return result


def reference_frame(
    frame: Image,
    landmarks: npt.NDArray[np.int32],
    audio: npt.NDArray[np.float32],
    network: Network,
    parsing: Image | None = None,
    *,
    times: StageTimes | None = None,
) -> Image:
    """One finished frame.

    Args:
        frame: (H, W, 3) uint8 BGR; not changed.
        landmarks: (N, 2) int32, see :func:`read_landmarks`.
        audio: one window, ``AUDIO_SHAPES[network.mode]`` float32, see :func:`audio_window`.
        network: in ``eval`` mode, float32.
        parsing: (H, W, 3) uint8 BGR; see ``KEEP_COLOURS``.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    times = times or StageTimes()
    box = box_from_landmarks(landmarks, *frame.shape[:2])
    with times.stage("crop"):
        crop, stacked = crop_face(frame, box)
    with times.stage("network"):
        mouth = run_network(network, stacked, audio)
    with times.stage("paste"):
        return paste_face(frame, box, crop, mouth, parsing)


# ── a clip ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def reference_frames(
    template: Path,
    features: npt.NDArray[np.float32],
    network: Network,
    *,
    start_frame: int = 0,
    use_parsing: bool = False,
    times: StageTimes | None = None,
) -> Iterator[Image]:
    """The frames of a clip in order, one for each row of ``features``; template frames are read from disk in turn."""
    times = times or StageTimes()
    length = len(list((template / "full_body_img").glob("*.jpg")))
    for i, index in enumerate(islice(ping_pong(length, start_frame), len(features))):
        with times.stage("decode"):
            frame = read_image(template / "full_body_img" / f"{index}.jpg")
            landmarks = read_landmarks(template / "landmarks" / f"{index}.lms")
            parsing = read_image(template / "parsing" / f"{index}.png") if use_parsing else None
        window = audio_window(features, i, network.mode)
        yield reference_frame(frame, landmarks, window, network, parsing, times=times)


def render(
    template: Path,
    features: npt.NDArray[np.float32],
    network: Network,
    audio_path: Path,
    output_path: Path,
    *,
    fps: int = 25,
    crf: int = 20,
    preset: str = "medium",
) -> StageTimes:
    """Write the clip as an .mp4 with sound, by way of a temporary MJPEG file, and return where the time went.

    ``preset`` is the second encode's; the default is that of the ffmpeg command.
    """
    times = StageTimes()
    with tempfile.TemporaryDirectory() as folder:
        silent = Path(folder) / "silent.avi"
        writer: cv2.VideoWriter | None = None
        for frame in reference_frames(template, features, network, times=times):
            with times.stage("mjpeg"):
                if writer is None:
                    size = frame.shape[1], frame.shape[0]
                    writer = cv2.VideoWriter(str(silent), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
                writer.write(frame)
        if writer is None:
            raise ValueError("features have no rows; expected one a frame")
        with times.stage("mjpeg"):
            writer.release()
        with times.stage("encode"):
            _encode_again(silent, audio_path, output_path, fps=fps, crf=crf, preset=preset)
    return times


def _resize(image: Image, width: int, height: int) -> Image:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def _encode_again(silent: Path, audio_path: Path, output_path: Path, *, fps: int, crf: int, preset: str) -> None:
    """MJPEG + sound → H.264 + AAC, as ``ffmpeg -i silent -i audio -c:v libx264 -crf N -c:a aac output`` does."""
    with av.open(str(silent)) as pictures, av.open(str(audio_path)) as sounds, av.open(str(output_path), "w") as output:
        source = pictures.streams.video[0]
        source.thread_type = "AUTO"
        video = output.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": preset})
        video.width, video.height, video.pix_fmt = source.width, source.height, "yuv420p"
        # PyAV's default asks x264 for sliced threads, which the ffmpeg command does not.
        video.thread_type = "AUTO"
        # A plain WAV has a number of channels but no layout; the encoder needs one by name.
        layout = "mono" if sounds.streams.audio[0].channels == 1 else "stereo"
        audio = output.add_stream("aac", rate=sounds.streams.audio[0].rate, layout=layout)
        resampler = av.AudioResampler(format=audio.format, layout=layout, rate=audio.rate)
        for picture in pictures.decode(source):
            picture.pict_type = av.video.frame.PictureType.NONE  # else every picture stays an I-frame, as in MJPEG
            output.mux(video.encode(picture))
        output.mux(video.encode(None))
        for sound in sounds.decode(audio=0):
            for named in resampler.resample(sound):
                output.mux(audio.encode(named))
        output.mux(audio.encode(None))
