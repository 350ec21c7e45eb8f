"""Videos of a clip's parts → one video with sound, without encoding a frame again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

import av

from gpupipe.errors import InputError
from gpupipe.files import media_url, replacing
from gpupipe.video.codecs import media_errors
from gpupipe.video.encode import check_suffix, open_output
from gpupipe.video.segments import DecodeTimes
from gpupipe.video.sound import SoundTrack


class JoinedVideo(NamedTuple):
    """What was joined: the number of frames, and the seconds of the sound, None if there is none."""

    frames: int
    sound_seconds: float | None


class Stopped(Exception):
    """Raised by a join that was told to stop."""


def join_videos(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    sound: str | Path | None = None,
    stop: threading.Event | None = None,
) -> JoinedVideo:
    """Join videos that :class:`~gpupipe.video.encode.VideoWriter` wrote, silent and with the same options, in order.

    Each part begins with a frame that needs no other, so that parts may have been written anywhere and at any time. The
    first has at least three frames, or is the longest: shorter ones do not show how long an encoder holds frames back.
    When all but the last have a whole number of segments (:attr:`~gpupipe.video.codecs.PictureFormat.segment_length`),
    the packets are those of the clip written in one go.

    Args:
        paths: the parts, at least one.
        output: the video; its suffix chooses the container. It appears only when it is whole.
        sound: any file that FFmpeg reads with a sound track; None for a silent video.
        stop: set by another thread when nobody waits for the video any longer.

    Returns:
        how many frames there are, and how long the sound is.

    Raises:
        InputError: a part that is missing, is not a video, or differs from the first in codec, size, rate or header.
        OutputError: ``output`` cannot be written.
        Stopped: ``stop`` was set.
    """
    if not paths:
        raise InputError(f"{output}: there are no parts to join; expected at least one video")
    output = Path(output)
    check_suffix(output)
    with replacing(output) as temporary, contextlib.ExitStack() as stack:
        target = stack.enter_context(open_output(output, temporary))
        with _open(Path(paths[0])) as first:
            expected = _traits(first)
            rate = _fraction(first.streams.video[0].average_rate)
            if not rate:
                raise InputError(f"{paths[0]}: has no frame rate; expected a part of the clip")
            stream = target.add_stream_from_template(first.streams.video[0], opaque=True)
            stream.codec_context.codec_tag = first.streams.video[0].codec_context.codec_tag
            stream.codec_context.framerate = rate  # not every codec tells it; written from PyAV 18 on
        track = SoundTrack(sound, target) if sound is not None else None
        if track is not None:
            stack.callback(track.close)
        times = DecodeTimes()
        for packet in stack.enter_context(contextlib.closing(_retimed(paths, expected, rate))):
            if stop is not None and stop.is_set():
                raise Stopped
            times.set(packet)
            packet.stream = stream
            target.mux_one(packet)
            if track is not None:
                track.advance(times.packets / rate)
        if track is not None:
            track.finish()
        target.close()
    return JoinedVideo(times.packets, None if track is None else track.seconds)


def _retimed(
    paths: Sequence[str | Path], expected: dict[str, object], rate: Fraction
) -> Generator[av.Packet, None, None]:
    """Yield the packets of all parts, which must have the ``expected`` traits, with times in frames of the clip."""
    frames = 0
    for path in map(Path, paths):
        with _open(path) as part:
            _compare(path, _traits(part), Path(paths[0]), expected)
            source, begin = part.streams.video[0], frames
            ratio = _fraction(source.time_base) * rate  # frames in a unit of the part's time base
            for packet in _packets(path, part):
                assert packet.pts is not None
                delay = source.codec_context.reorder_depth  # Matroska does not keep decoding times
                if packet.dts is not None:
                    delay = _scaled(packet.pts - packet.dts, ratio)
                packet.pts = begin + _scaled(packet.pts, ratio)
                packet.dts = packet.pts - delay
                packet.time_base = 1 / rate
                packet.duration = 1
                frames += 1
                yield packet


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
    if not path.is_file():
        raise InputError(f"{path}: no such video; expected a part of the clip")
    with media_errors(path, "cannot be read as a video"):
        container = av.open(media_url(path))
    with container:
        if not container.streams.video:
            raise InputError(f"{path}: has no picture; expected a part of the clip")
        yield container


def _packets(path: Path, part: av.container.InputContainer) -> Iterator[av.Packet]:
    """Yield a part's packets, without the empty one that ends the demuxer's."""
    with media_errors(path, "cannot be read to its end"):
        for packet in part.demux(part.streams.video[0]):
            if packet.size:
                yield packet


class _Rational(Protocol):
    """PyAV's rationals: fractions, and from version 19 on a type of its own."""

    @property
    def numerator(self) -> int: ...

    @property
    def denominator(self) -> int: ...


def _fraction(value: _Rational | None) -> Fraction:
    """Convert one; 0 if the file has none."""
    return Fraction(value.numerator, value.denominator) if value else Fraction(0)


def _scaled(value: int, ratio: Fraction) -> int:
    """Return ``value * ratio``, rounded half up."""
    n, d = ratio.numerator, ratio.denominator
    return (2 * value * n + d) // (2 * d)


def _traits(part: av.container.InputContainer) -> dict[str, object]:
    """Return what all parts must have in common."""
    stream = part.streams.video[0]
    context = stream.codec_context
    return {
        "codec": context.name,
        "size": f"{context.width}×{context.height}",
        "frames a second": _fraction(stream.average_rate),
        "header": context.extradata,
    }


def _compare(path: Path, found: dict[str, object], first: Path, expected: dict[str, object]) -> None:
    for name, value in expected.items():
        if found[name] != value:
            known = "" if name == "header" else f" ({found[name]}, not {value})"
            raise InputError(f"{path}: has another {name} than {first}{known}; expected parts of one clip")
