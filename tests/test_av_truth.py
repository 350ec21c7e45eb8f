"""Sound and picture stay in step in a finished video: a clip that flashes and beeps, decoded again."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import write_wav

from gpupipe.video.encode import VideoWriter
from gpupipe.video.sound import compare_lengths

WIDTH, HEIGHT = 64, 48
NTSC = Fraction(30000, 1001)
BEEP = 0.05
"""Seconds."""
PRIMING = 1024
"""Samples that FFmpeg's AAC encoder puts before the sound."""


def write_beeps(path: Path, seconds: float, beeps: Iterable[float], *, rate: int, channels: int) -> Path:
    """Silence, with a tone at each of the given seconds that is at full strength from its first sample on."""
    samples = np.zeros((round(seconds * rate), channels))
    tone = 20000 * np.cos(2 * np.pi * 1000 * np.arange(round(BEEP * rate)) / rate)
    for beep in beeps:
        place = samples[round(beep * rate) :][: len(tone)]
        place[:] = tone[: len(place), None]
    return write_wav(path, samples, rate)


def write_clip(path: Path, frames: int, flashes: Iterable[int], fps: Fraction, sound: Path) -> Path:
    """Black frames, and white ones for flashes, written by the writer of every render."""
    white = np.zeros(frames, dtype=bool)
    white[list(flashes)] = True
    with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=fps, sound=sound) as writer:
        for start in range(0, frames, 16):
            batch = torch.full((min(16, frames - start), HEIGHT * 3 // 2, WIDTH), 128, dtype=torch.uint8)
            batch[:, :HEIGHT] = torch.from_numpy(np.where(white[start : start + 16], 235, 16))[:, None, None]
            writer.write(batch)
    return path


class Seen:
    """What a player shows and plays: the times of flashes and beeps, and of the first picture and sample."""

    def __init__(self, path: Path, **options: str) -> None:
        self.flashes: list[float] = []
        self.beeps: list[float] = []
        self.times: list[float] = []
        self.sound_start: float | None = None
        quiet_since = -1.0
        with av.open(str(path), options=options) as container:
            for frame in container.decode(video=0, audio=0):
                assert frame.time is not None
                if isinstance(frame, av.VideoFrame):
                    self.times.append(frame.time)
                    if np.frombuffer(frame.planes[0], np.uint8)[0] > 128:  # luma of the first pixel
                        self.flashes.append(frame.time)
                    continue
                assert isinstance(frame, av.AudioFrame)
                if self.sound_start is None:
                    self.sound_start = frame.time
                for loud in np.flatnonzero(np.abs(frame.to_ndarray()).max(axis=0) > 0.3):
                    time = frame.time + int(loud) / frame.sample_rate
                    if time - quiet_since > BEEP:
                        self.beeps.append(time)
                    quiet_since = time

    def lags(self) -> np.ndarray:
        """How many seconds each beep comes after its flash."""
        assert len(self.beeps) == len(self.flashes), "a beep to each flash"
        return np.subtract(self.beeps, self.flashes)


def render(
    folder: Path,
    *,
    suffix: str = "mp4",
    fps: Fraction = Fraction(25),
    rate: int = 16000,
    channels: int = 1,
    frames: int = 100,
    flashes: Iterable[int] = (0, 7, 50, 97),
    late: float = 0.0,
) -> Path:
    """A clip whose beeps are ``late`` by so many frames."""
    flashes = list(flashes)
    beeps = [float((flash + Fraction(late)) / fps) for flash in flashes]
    sound = write_beeps(folder / "beeps.wav", float(frames / fps), beeps, rate=rate, channels=channels)
    return write_clip(folder / f"clip.{suffix}", frames, flashes, fps, sound)


@pytest.mark.parametrize(
    ("suffix", "fps", "rate", "channels"),
    [
        ("mp4", Fraction(25), 16000, 1),
        ("mp4", Fraction(25), 44100, 2),
        ("mp4", NTSC, 48000, 1),
        ("mov", Fraction(20), 16000, 2),
        ("mkv", NTSC, 44100, 1),
        ("mkv", Fraction(25), 48000, 2),
        ("mp4", Fraction(25), 37800, 1),  # a rate that AAC does not have
    ],
)
def test_flash_and_beep_come_together(suffix: str, fps: Fraction, rate: int, channels: int, tmp_path: Path) -> None:
    seen = Seen(render(tmp_path, suffix=suffix, fps=fps, rate=rate, channels=channels))
    rounding = 0.0006 if suffix == "mkv" else 1e-6  # Matroska's times are milliseconds
    assert seen.times == pytest.approx([float(i / fps) for i in range(100)], abs=rounding), "every frame, from 0 on"
    assert seen.sound_start == 0
    assert seen.flashes == pytest.approx([float(i / fps) for i in (0, 7, 50, 97)], abs=rounding)
    assert np.abs(seen.lags()).max() < 0.002, "a tenth of half a frame, at the beginning as at the end"


def test_sound_between_two_frames_stays_there(tmp_path: Path) -> None:
    """Beeps a third of a frame after their flashes are not moved to a frame's time, nor to a sound packet's."""
    seen = Seen(render(tmp_path, fps=NTSC, rate=44100, late=1 / 3))
    assert seen.lags() == pytest.approx(float(1 / NTSC) / 3, abs=0.001)


@pytest.mark.parametrize("late", [-2, 2])
def test_a_shift_of_two_frames_is_seen(late: int, tmp_path: Path) -> None:
    """Negative control of the tests above, in both directions."""
    seen = Seen(render(tmp_path, late=late, flashes=(7, 50, 90)))
    assert seen.lags() == pytest.approx(late / 25, abs=0.002)


def test_priming_is_told_to_players(tmp_path: Path) -> None:
    """An edit list skips what AAC puts before the sound; a player that ignores it plays everything late."""
    path = render(tmp_path)
    tracks = path.read_bytes().split(b"trak")[1:]
    (sound,) = [track for track in tracks if b"soun" in track]
    at = sound.index(b"elst") + 4  # version and flags, count, then duration, media time, rate
    count = int.from_bytes(sound[at + 4 : at + 8], "big")
    assert (sound[at], count, int.from_bytes(sound[at + 12 : at + 16], "big")) == (0, 1, PRIMING)
    late = np.subtract(Seen(path, ignore_editlist="1").beeps, Seen(path).beeps)
    assert late == pytest.approx(PRIMING / 16000, abs=1e-6)
    assert late.min() > 0.5 / 25, "more than half a frame: the list is needed, and was heeded above"


def test_five_minutes_do_not_drift(tmp_path: Path) -> None:
    assert_no_drift(tmp_path, minutes=5, fps=Fraction(10), rate=16000)


@pytest.mark.slow
@pytest.mark.parametrize(("fps", "rate"), [(Fraction(25), 16000), (NTSC, 44100)])
def test_an_hour_does_not_drift(fps: Fraction, rate: int, tmp_path: Path) -> None:
    assert_no_drift(tmp_path, minutes=60, fps=fps, rate=rate)


def assert_no_drift(folder: Path, *, minutes: int, fps: Fraction, rate: int) -> None:
    frames = int(minutes * 60 * fps)
    flashes = [*range(0, frames, frames // 20), frames - 5]
    seen = Seen(render(folder, fps=fps, rate=rate, frames=frames, flashes=flashes))
    assert len(seen.times) == frames
    assert seen.times[-1] == pytest.approx(float((frames - 1) / fps), abs=1e-4)
    lags = seen.lags()
    assert np.abs(lags).max() < 0.002
    assert abs(lags[-1] - lags[0]) < 0.001


def test_one_frame_more_or_less_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever floats make of it."""
    for frames in range(1, 300):
        for sound in (frames - 1, frames + 1):
            assert compare_lengths("clip.mp4", frames / 25, sound / 25, 25) is None
    assert compare_lengths("clip.mp4", 4.0, None, 25) is None, "a silent video"
    assert not caplog.records
    assert compare_lengths("clip.mp4", 4.0, 4.05, 25) == pytest.approx(0.05)
    assert compare_lengths("clip.mp4", 4.0, 3.95, 25) == pytest.approx(-0.05)
