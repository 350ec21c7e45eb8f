"""The bundled avatar: a drawn character, its networks and a spoken sample, ready to render.

from gpupipe.demo import render_demo

render_demo("speech.wav", "speech.mp4")
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from gpupipe.demo.sheet import write_contact_sheet
from gpupipe.errors import InputError, output_error
from gpupipe.features import write_features
from gpupipe.files import check_not_read, check_writable, media_url, replacing
from gpupipe.mel import FEATURE_FPS
from gpupipe.pipeline import FrameGenerationPipeline, Progress, RenderRecord
from gpupipe.speech import SpeechEncoder
from gpupipe.video.encode import check_suffix
from gpupipe.video.sound import audio_chunks, decode_mixed, mixed_layout, open_sound, to_int16

logger = logging.getLogger(__name__)

BUNDLE = Path(__file__).parent / "bundle"
"""``unet.safetensors``, ``encoder.safetensors``, ``template/``, ``sample.flac``, ``training.json``, ``README.md``."""

LONGEST = 86_400
"""Seconds that may be asked for: a day."""


@dataclass
class Demo:
    """What :func:`render_demo` made: the video, a contact sheet of it, and the pipeline's record of the render."""

    video: Path
    sheet: Path
    record: RenderRecord


def render_demo(
    audio: str | Path | None = None,
    output: str | Path = "demo.mp4",
    seconds: float | None = None,
    progress: Progress | None = None,
    *,
    device: str | torch.device | None = None,
) -> Demo:
    """Have the bundled avatar speak a sound.

    Args:
        audio: any file with sound that FFmpeg reads; None takes the bundled sample (about 6 s).
        output: the video; the contact sheet is left beside it as ``<name>.png``.
        seconds: stop after so much of the sound; None takes it whole.
        progress: called after each batch with the frames done and the frames in all.
        device: as :class:`gpupipe.FrameGenerationPipeline` takes it.

    Raises:
        InputError: the sound cannot be used, or ``seconds`` is not in (0, :data:`LONGEST`].
        OutputError: the video or the sheet cannot be written.
    """
    if seconds is not None and not 0 < seconds <= LONGEST:
        raise InputError(f"seconds is {seconds}; expected more than 0 and at most {LONGEST}")
    output = Path(output)
    check_suffix(output)
    for path in (output, output.with_suffix(".png")):
        check_not_read(path, audio)
        check_writable(path)
    sound = Path(audio) if audio is not None else BUNDLE / "sample.flac"
    with tempfile.TemporaryDirectory(prefix="gpupipe-demo-") as folder:
        if seconds is not None:
            sound = cut_sound(sound, Path(folder) / "cut.wav", seconds)
        pipeline = FrameGenerationPipeline(BUNDLE / "unet.safetensors", "ave", device)
        encoder = SpeechEncoder(BUNDLE / "encoder.safetensors", pipeline.unet_model.device)
        with replacing(Path(folder) / "features.npy") as temporary:
            write_features(encoder.covering_features(sound), temporary)
        features = np.load(Path(folder) / "features.npy", mmap_mode="r")
        if seconds is not None:  # of a very short sound the encoder makes more rows than it lasts
            features = features[: max(1, round(seconds * FEATURE_FPS))]
        pipeline.generate_video(features, BUNDLE / "template", sound, output, progress=progress)
        record = pipeline.last_render
        assert record is not None
        sheet = write_contact_sheet(output, sound, output.with_suffix(".png"))
    logger.debug("demo: %s and %s", output, sheet)
    return Demo(output, sheet, record)


def cut_sound(source: str | Path, target: str | Path, seconds: float) -> Path:
    """The first ``seconds`` of a sound, at its own rate, as 16-bit ``.wav``.

    Raises:
        InputError: ``source`` is missing, unreadable or has no sound, or its beginning is too short to be heard.
        OutputError: ``target`` cannot be written.
    """
    source, target = Path(source), Path(target)
    try:
        written = _write_cut(source, target, seconds)
    except OSError as error:
        raise output_error(target, error) from error
    try:
        next(audio_chunks(target))
    except InputError as error:  # it would name a file that the user does not know
        raise InputError(f"{source}: {written:.3g} s of it are too short; expected a few milliseconds") from error
    return target


def _write_cut(source: Path, target: Path, seconds: float) -> float:
    """Write the first ``seconds`` of a sound; return how many there were."""
    with open_sound(source) as sound, av.open(media_url(target), "w") as out:
        track = sound.streams.audio[0]
        layout = mixed_layout(track)
        stream = out.add_stream("pcm_s16le", rate=track.rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        resampler = av.AudioResampler(format="flt", layout=layout, rate=track.rate)
        left = max(1, round(seconds * track.rate))
        at = 0
        for piece in decode_mixed(source, sound, resampler):
            values = to_int16(piece.to_ndarray()[:, : left * len(stream.layout.channels)])
            frame = av.AudioFrame.from_ndarray(values, format="s16", layout=layout)
            frame.rate, frame.pts, frame.time_base = track.rate, at, Fraction(1, track.rate)
            out.mux(stream.encode(frame))
            at, left = at + frame.samples, left - frame.samples
            if left <= 0:
                break
        out.mux(stream.encode(None))
    return float(at / track.rate)
