"""Sound files, decoded piece by piece: to samples for speech, or to the AAC track of a video beside its picture."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np

from gpupipe.errors import InputError
from gpupipe.files import input_file, media_url
from gpupipe.models.audio_encoder import SAMPLE_RATE
from gpupipe.video.codecs import media_errors

logger = logging.getLogger(__name__)

MIN_RATE, MAX_RATE = 1000, 768_000
"""Sample rates that are accepted: a few samples at a rate of 1 would be hours of silence."""

MAX_CHANNELS = 64
"""The most that FFmpeg's resampler takes."""

_LOUDEST = 2.0**16
"""Above any real sample, even 16-bit integers that were not scaled to [−1, 1]. FFmpeg's AAC encoder was seen to search
for ever when samples are a million."""

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


class SoundTrack:
    """The first sound track of a file, muxed as AAC.

    The encoder's priming samples get negative times, which the muxer turns into an edit list: sound and picture start
    together.

    Args:
        path: any file that FFmpeg reads.
        output: the open container that the track is added to, before its first packet.

    Raises:
        InputError: the file is missing, unreadable or has no sound.
    """

    def __init__(self, path: str | Path, output: av.container.OutputContainer) -> None:
        self._output = output
        self._input = open_sound(path)
        source = self._input.streams.audio[0]
        rate = source.rate if source.rate in _AAC_RATES else 48000
        layout = mixed_layout(source)
        stream = output.add_stream("aac", rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.open(strict=False)  # now, as only then it tells its frames' size
        size = stream.codec_context.frame_size
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=size)
        self._frames = decode_mixed(Path(path), self._input, resampler)
        self._stream = stream
        self._rate = rate
        self._samples = 0

    @property
    def seconds(self) -> float:
        """Length of the sound encoded so far."""
        return self._samples / self._rate

    def advance(self, seconds: Fraction | float) -> None:
        """Encode sound up to a time, or to its end."""
        while self.seconds < seconds:
            frame = next(self._frames, None)
            if frame is None:
                return
            frame.pts, frame.time_base = self._samples, Fraction(1, self._rate)
            self._output.mux(self._stream.encode(frame))
            self._samples += frame.samples

    def finish(self) -> None:
        """Encode what is left of the sound, and flush."""
        self.advance(float("inf"))
        self._output.mux(self._stream.encode(None))

    def close(self) -> None:
        """Close the sound file."""
        self._input.close()


def open_sound(path: str | Path) -> av.container.InputContainer:
    """Open a file that has a sound track.

    Raises:
        InputError: the file is missing or unreadable, has no sound, or has sound of a kind that cannot be decoded.
    """
    path = input_file(path, "sound file")
    with media_errors(path, "not a media file that FFmpeg reads"):
        container = av.open(media_url(path))
    if problem := _problem(container):
        container.close()
        raise InputError(f"{path}: {problem}")
    return container


def _problem(container: av.container.InputContainer) -> str | None:
    """Return what is wrong with a file's sound track, judging by its header; None if nothing is."""
    if not container.streams.audio:
        return "has no sound track"
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        return "its sound is of a codec that this FFmpeg does not have"
    if not MIN_RATE <= stream.rate <= MAX_RATE:
        return f"its sound has {stream.rate} samples a second; expected {MIN_RATE} to {MAX_RATE}"
    if not 1 <= stream.channels <= MAX_CHANNELS:
        return f"its sound has {stream.channels} channels; expected 1 to {MAX_CHANNELS}"
    return None


def decode_sound(
    path: Path, container: av.container.InputContainer, resampler: av.AudioResampler
) -> Iterator[av.AudioFrame]:
    """Yield the first sound track of an open file, resampled to floats; ``path`` is only for messages.

    Raises:
        InputError: it is undecodable, changes rate or layout midway, is empty, or holds NaN, infinite or boundless
            samples.
    """
    samples = 0
    with media_errors(path, "sound cannot be decoded"):  # among others: another rate or layout than before
        for frame in itertools.chain(_frames(path, container), [None]):  # None drains the resampler
            if frame is not None:
                frame.pts = None  # a gap in the source's times is not a reason to stop
            for piece in resampler.resample(frame):
                if not (np.abs(piece.to_ndarray()) < _LOUDEST).all():  # false for NaN too
                    raise InputError(
                        f"{path}: sound holds NaN, infinite or boundless samples near {samples / piece.rate:.2f} s;"
                        " expected samples in [−1, 1]"
                    )
                samples += piece.samples
                yield piece
    if not samples:  # the resampler keeps the last of them to itself
        raise InputError(f"{path}: its sound track is empty; expected a few milliseconds of sound")


def mixed_layout(source: av.AudioStream) -> str:
    """Return the layout for :func:`decode_mixed`: stereo, or mono for sound that is mono or can only be averaged."""
    return "stereo" if source.channels > 1 and _mixes(source) else "mono"


def decode_mixed(
    path: Path, container: av.container.InputContainer, resampler: av.AudioResampler
) -> Iterator[av.AudioFrame]:
    """Yield like :func:`decode_sound`; ``resampler`` has :func:`mixed_layout` and a rate."""
    if _mixes(container.streams.audio[0]):
        return decode_sound(path, container, resampler)
    return _resampled_mono(mono_pieces(path, container, resampler.rate), resampler.rate, resampler)


def _mixes(source: av.AudioStream) -> bool:
    """Return whether FFmpeg knows how to mix a sound's channels to two: it does not for 9 without a layout's name."""
    try:
        silence = av.AudioFrame("flt", source.layout.name, 1)
        silence.sample_rate = source.rate
        av.AudioResampler(format="fltp", layout="stereo", rate=source.rate).resample(silence)
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def mono_pieces(path: Path, container: av.container.InputContainer, rate: int) -> Iterator[np.ndarray]:
    """Yield the first sound track of an open file like :func:`decode_sound`, channels averaged: float32 ``(n,)``."""
    # FFmpeg's own mix to mono is 3 dB louder for a voice that is in both channels. Channels are taken interleaved: if
    # each has a plane of its own, PyAV reads past the last of 8 or more, and may crash.
    for piece in decode_sound(path, container, av.AudioResampler(format="flt", rate=rate)):
        channels = piece.to_ndarray().reshape(-1, piece.layout.nb_channels)
        yield channels.mean(axis=1, dtype=np.float32)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Samples in [−1, 1] → 16-bit integers; what is louder is clipped."""
    return np.rint(samples * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)


def _resampled_mono(pieces: Iterator[np.ndarray], rate: int, resampler: av.AudioResampler) -> Iterator[av.AudioFrame]:
    for piece in pieces:
        frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        yield from resampler.resample(frame)
    yield from resampler.resample(None)


def _frames(path: Path, container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
    """Yield the first sound track's frames. Bytes after the end of an MP3, such as zeros or a note, are skipped with a
    warning: the format does not mark its end, and players skip them too. Before the end they are damage."""
    is_mp3 = container.streams.audio[0].codec_context.codec.canonical_name == "mp3"
    began, refused = False, None
    for packet in container.demux(audio=0):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if not (is_mp3 and began):
                raise
            refused = refused or error
            continue
        if frames and refused is not None:
            raise refused
        began = began or bool(frames)
        yield from frames
    if refused is not None:
        logger.warning("%s: ends with bytes that are not sound; they are skipped", path)


def audio_chunks(path: str | Path, *, samples: int = 1 << 18) -> Iterator[np.ndarray]:
    """Decode the first sound track of any file that FFmpeg reads, piece by piece.

    Args:
        path: a sound file, or a video file with sound.
        samples: approximate length of a piece (the last is shorter).

    Yields:
        float32 ``(n,)`` in [−1, 1], 16 kHz, mono (channels are averaged).

    Raises:
        InputError: the file is missing or unreadable, or has no sound track, or one without a sample.
    """
    path = Path(path)
    held, pending = 0, []
    with open_sound(path) as container:
        for piece in mono_pieces(path, container, SAMPLE_RATE):
            pending.append(piece)
            held += len(piece)
            if held >= samples:
                yield np.concatenate(pending)
                held, pending = 0, []
    if held:
        yield np.concatenate(pending)


def load_audio(path: str | Path) -> np.ndarray:
    """Return the sound track as one array: float32 ``(n,)`` in [−1, 1], 16 kHz, mono. Errors: :func:`audio_chunks`."""
    return np.concatenate(list(audio_chunks(path)))


def compare_lengths(path: str | Path, picture: float, sound: float | None, fps: float) -> float | None:
    """Warn if sound and picture of a video differ by more than one frame.

    Args:
        path: the video.
        picture, sound: their seconds; None for a silent video.
        fps: frames a second.

    Returns:
        the seconds by which the sound is longer, negative if it is shorter; None without a warning.
    """
    if sound is None or abs(sound - picture) <= 1 / fps + 1e-6:
        return None
    logger.warning("%s: sound lasts %.2f s and the picture %.2f s (%+.2f s)", path, sound, picture, sound - picture)
    return sound - picture
