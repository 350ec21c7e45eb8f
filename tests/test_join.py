"""Parts of a clip, joined without a seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import av.error
import numpy as np
import pytest
import torch
from encoded_clips import HEIGHT, WIDTH, luma, moving_clip, packets_of, write, write_silence

from gpupipe import InputError
from gpupipe.versions import numbers
from gpupipe.video import join
from gpupipe.video.codecs import PictureFormat
from gpupipe.video.encode import VideoWriter
from gpupipe.video.join import _fraction, _packets, join_videos


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return moving_clip()


@pytest.mark.parametrize(
    ("codec", "suffix", "fps"),
    [
        ("h264", "mp4", 25),
        ("h264", "mkv", 25),
        ("h264", "mp4", Fraction(30000, 1001)),
        ("h264", "mkv", Fraction(30000, 1001)),
        ("hevc", "mp4", 25),
        ("av1", "mp4", 25),
        ("mjpeg", "mp4", 5),  # so long that FFmpeg does not wait for the sound
        ("ffv1", "mkv", 25),
    ],
)
def test_joined_parts_are_the_clip(codec: str, suffix: str, fps: Any, clip: torch.Tensor, tmp_path: Path) -> None:
    length = PictureFormat(WIDTH, HEIGHT, Fraction(fps), 20).segment_length
    starts = [0, length, len(clip) - 1] if length * 2 > len(clip) else [0, length, 2 * length]
    parts = [
        write(tmp_path / f"{first}.{suffix}", clip[first:last], codec=codec, fps=fps)
        for first, last in zip(starts, [*starts[1:], len(clip)], strict=True)
    ]
    sound = write_silence(tmp_path / "silence.wav", len(clip) / fps)
    joined, whole = tmp_path / f"joined.{suffix}", tmp_path / f"whole.{suffix}"
    video = join_videos(parts, joined, sound=sound)
    assert video == (len(clip), pytest.approx(len(clip) / fps, abs=1e-3))
    write(whole, clip, codec=codec, fps=fps, sound=sound)
    times, pictures = luma(joined)
    assert times == pytest.approx([i / float(fps) for i in range(len(clip))], abs=1e-3)
    _, alone = zip(*map(luma, parts), strict=True)
    assert np.array_equal(pictures, np.concatenate(alone))
    if suffix == "mp4" and codec != "av1" and starts[2] % length == 0:
        assert packets_of(joined) == packets_of(whole), "no trace of the joint"
    with av.open(str(joined)) as container, av.open(str(whole)) as other:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.streams.video[0].start_time == 0
        for name in ("codec_tag", "colorspace", "color_range", "color_primaries", "color_trc", "pix_fmt"):
            found, expected = (getattr(c.streams.video[0].codec_context, name) for c in (container, other))
            assert found == expected, name
        order, control = (sorted((p.pos, p.stream.type) for p in c.demux() if p.size) for c in (container, other))
        assert "audio" in [kind for _, kind in order[:10]], "sound beside the picture"
        assert sorted(kind for _, kind in order) == sorted(kind for _, kind in control), "to its end"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_a_join_closes_its_sound(clip: torch.Tensor, tmp_path: Path) -> None:
    part, sound = write(tmp_path / "part.mp4", clip[:9]), write_silence(tmp_path / "silence.wav", 1)
    join_videos([part], tmp_path / "joined.mp4", sound=sound)
    assert all(link.resolve() != sound for link in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(numbers(av.__version__) < (18,), reason=f"PyAV {av.__version__} writes no rate for a copied stream")
@pytest.mark.parametrize("codec", ["ffv1", "mpeg4"])
def test_joined_parts_keep_their_rate(codec: str, clip: torch.Tensor, tmp_path: Path) -> None:
    """In Matroska times are in milliseconds, and these codecs tell no rate, or another."""
    fps = Fraction(30000, 1001)
    parts = [write(tmp_path / f"{first}.mkv", clip[first : first + 2], codec=codec, fps=fps) for first in (0, 2)]
    join_videos(parts, tmp_path / "joined.mkv")
    with av.open(str(tmp_path / "joined.mkv")) as container:
        assert _fraction(container.streams.video[0].average_rate) == fps


def other_size(folder: Path, clip: torch.Tensor) -> Path:
    with VideoWriter(folder / "part.mp4", width=64, height=64, segmented=True) as writer:
        writer.write(clip[:2, :, :64].contiguous())
    return folder / "part.mp4"


def not_a_video(folder: Path, clip: torch.Tensor) -> Path:
    (folder / "part.mp4").write_bytes(b"nothing" * 99)
    return folder / "part.mp4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_size, r"part\.mp4: has another size than .*first\.mp4 \(64×64, not 96×64\)"),
        (lambda folder, clip: write(folder / "part.mp4", clip[:2], codec="hevc"), "another codec .*hevc, not h264"),
        (lambda folder, clip: write(folder / "part.mp4", clip[:9], fps=20), "another frames a second .*20, not 25"),
        (lambda folder, clip: write(folder / "part.mp4", clip[:2], crf=30), "another header than"),
        (lambda folder, clip: folder / "part.mp4", r"part\.mp4: no such video"),
        (lambda folder, clip: write_silence(folder / "part.wav", 1), r"part\.wav: has no picture"),
        (not_a_video, r"part\.mp4: cannot be read as a video"),
    ],
)
def test_parts_that_do_not_belong_together(
    make: Callable[[Path, torch.Tensor], Path], message: str, clip: torch.Tensor, tmp_path: Path
) -> None:
    first = write(tmp_path / "first.mp4", clip[:9])
    other = make(tmp_path, clip)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        join_videos([first, other], tmp_path / "out" / "joined.mp4")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"joined\.mp4: there are no parts to join"):
        join_videos([], tmp_path / "joined.mp4")


def test_a_part_without_a_frame_rate(clip: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write(tmp_path / "part.mp4", clip[:2])
    monkeypatch.setattr(join, "_fraction", lambda value: Fraction(0))
    with pytest.raises(InputError, match=r"part\.mp4: has no frame rate"):
        join_videos([part], tmp_path / "joined.mp4")


def test_a_part_that_ends_in_an_error() -> None:
    def demux(stream: Any) -> Iterator[av.Packet]:
        yield av.Packet(b"x")
        raise av.error.InvalidDataError(1, "damaged")

    part: Any = SimpleNamespace(streams=SimpleNamespace(video=[None]), demux=demux)
    with pytest.raises(InputError, match=r"part\.mp4: cannot be read to its end"):
        list(_packets(Path("part.mp4"), part))
