"""A sound file as the AAC track of a video, encoded piece by piece beside the picture."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.error

from gpupipe.errors import InputError

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
        self._path = Path(path)
        self._output = output
        self._input = open_sound(self._path)
        source = self._input.streams.audio[0]
        rate = source.rate if source.rate in _AAC_RATES else 48000
        layout = "mono" if source.channels == 1 else "stereo"
        stream = output.add_stream("aac", rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        self._rate = rate
        self._samples = 0
        self._frames = self._decode(layout)

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
        """Close the file that is read."""
        self._input.close()

    def _decode(self, layout: str) -> Iterator[av.AudioFrame]:
        self._stream.codec_context.open(strict=False)
        resampler = av.AudioResampler(
            format="fltp", layout=layout, rate=self._rate, frame_size=self._stream.codec_context.frame_size
        )
        try:
            for frame in self._input.decode(audio=0):
                frame.pts = None  # a gap in the source's times is not a reason to stop
                yield from resampler.resample(frame)
        except av.error.FFmpegError as error:
            raise InputError(f"{self._path}: sound cannot be decoded ({error})") from error
        yield from resampler.resample(None)


def open_sound(path: str | Path) -> av.container.InputContainer:
    """Open a file that has a sound track.

    Raises:
        InputError: the file is missing, unreadable or has no sound.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such sound file")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: not a media file that FFmpeg reads ({error})") from error
    if not container.streams.audio:
        container.close()
        raise InputError(f"{path}: has no sound track")
    return container


def sound_seconds(path: str | Path) -> float | None:
    """Length of a file's sound as its header tells; None if it does not."""
    with open_sound(path) as container:
        stream = container.streams.audio[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return None if container.duration is None else container.duration / av.time_base
