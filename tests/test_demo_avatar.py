"""The bundled avatar follows sound that it was not trained on, and the drawn character is as its rig describes it."""

from __future__ import annotations

import errno
import re
import wave
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import write_wav
from fuzz_media import wav
from PIL import Image

from gpupipe import FrameGenerationPipeline
from gpupipe.demo import BUNDLE, cut_sound, drawing, render_demo, rig
from gpupipe.demo.evaluate import Agreement, agreement, measure_gap
from gpupipe.demo.mouth import mouth_track
from gpupipe.demo.sheet import GAP, TILE, TILES, WAVE, write_contact_sheet
from gpupipe.demo.train import read_template, render_sample
from gpupipe.errors import DiskFullError, InputError, OutputError
from gpupipe.landmarks import face_box
from gpupipe.models.checkpoint import load_state_dict
from gpupipe.video.sound import load_audio

FRAMES = 75  # of the sample, 3 s
SHIFT = 5
MEBIBYTE = 1 << 20


# ── held out ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Rendered:
    """The sample, which is not in the training data, rendered by the pipeline's own frame generator."""

    frames: list[np.ndarray]
    template: np.ndarray
    indices: list[int]
    mouths: np.ndarray

    def against(self, mouths: np.ndarray) -> Agreement:
        return agreement(self.frames, self.template, self.indices, mouths)

    @cached_property
    def result(self) -> Agreement:
        return self.against(self.mouths[:FRAMES])


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    frames, indices = render_sample(BUNDLE, FRAMES)
    mouths = mouth_track(load_audio(BUNDLE / "sample.flac"), frames=FRAMES + SHIFT)
    return Rendered(frames, read_template(BUNDLE / "template")[0], indices, mouths)


def test_the_mouth_follows_unheard_sound(rendered: Rendered) -> None:
    assert rendered.result.good, rendered.result


def test_the_check_fails_five_frames_late(rendered: Rendered) -> None:
    late = rendered.against(rendered.mouths[SHIFT:])
    assert late.correlation < 0.9
    assert late.mouth_psnr < 28
    assert not late.good


def test_the_check_fails_for_a_mouth_at_rest(rendered: Rendered) -> None:
    still = agreement(
        [rendered.template[i] for i in rendered.indices], rendered.template, rendered.indices, rendered.mouths[:FRAMES]
    )
    assert not still.good
    assert still.mouth_psnr < rendered.result.mouth_psnr - 3


def test_nothing_but_the_box_changes(rendered: Rendered) -> None:
    landmarks = read_template(BUNDLE / "template")[1]
    for frame, index in zip(rendered.frames[::15], rendered.indices[::15], strict=True):
        xmin, ymin, xmax, ymax = face_box(landmarks[index])
        changed = (frame != rendered.template[index]).any(axis=2)
        assert changed[ymin:ymax, xmin:xmax].any()
        changed[ymin:ymax, xmin:xmax] = False
        assert not changed.any()


# ── the bundle ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bundle_is_small_and_half_precision() -> None:
    sizes = {path: path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 12 * MEBIBYTE
    for name in ("unet.safetensors", "encoder.safetensors"):
        state = load_state_dict(BUNDLE / name)
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    for name in ("README.md", "training.json", "sample.flac"):
        assert BUNDLE / name in sizes


def test_the_bundled_template_is_what_the_rig_draws() -> None:
    frames, landmarks = read_template(BUNDLE / "template")
    assert frames.shape == (rig.FRAMES, rig.HEIGHT, rig.WIDTH, 3)
    for index in (0, 20, 71):
        drawn = drawing.draw_frame(index)
        assert np.abs(frames[index].astype(int) - drawn).mean() < 1.2  # by JPEG's compression
        assert np.abs(frames[(index + 5) % rig.FRAMES].astype(int) - drawn).mean() > 1.2
        np.testing.assert_allclose(landmarks[index], rig.landmarks(index), atol=0.006)


# ── the rig ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_boxes_are_inside_the_frame_and_hold_every_mouth() -> None:
    for index in range(rig.FRAMES):
        xmin, ymin, xmax, ymax = face_box(rig.landmarks(index))
        assert 0 <= xmin < xmax <= rig.WIDTH
        assert 0 <= ymin < ymax <= rig.HEIGHT
        y0, y1, x0, x1 = rig.mouth_patch(index)
        assert ymin < y0 < y1 < ymax
        assert xmin < x0 < x1 < xmax


def test_a_mouth_changes_its_patch_only() -> None:
    shut, wide = (drawing.draw_frame(7, mouth) for mouth in ((0.0, 0.35, 0.0), (1.0, 0.8, 0.0)))
    y0, y1, x0, x1 = rig.mouth_patch(7)
    differs = (shut != wide).any(axis=2)
    assert differs[y0:y1, x0:x1].mean() > 0.2
    edge = np.ones_like(differs)
    edge[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
    cut = np.abs(shut.astype(int) - wide)[edge]
    assert cut.max() <= 1, "the patch cuts the mouth off"


@pytest.mark.parametrize(
    "mouth", [(0.0, 0.35, 0.0), (0.1, 0.3, 0.0), (0.3, 0.6, 0.0), (0.4, 0.2, 0.45), (0.55, 0.5, 0.2)]
)
def test_measured_lip_gap_is_the_drawn_one(mouth: tuple[float, float, float]) -> None:
    for index in (0, 30, 64):
        measured = measure_gap(drawing.draw_frame(index, mouth), index)
        assert abs(measured - rig.lip_gap(mouth[0])) < 3
        assert abs(measured - rig.lip_gap(mouth[0] + 0.2)) > 3


def test_frames_outside_the_rig_are_refused() -> None:
    with pytest.raises(ValueError, match="frame is 96"):
        rig.pose(rig.FRAMES)


# ── the true mouth ────────────────────────────────────────────────────────────────────────────────────────────────────


def vowel(first_hz: float, second_hz: float, seconds: float = 0.4) -> np.ndarray:
    """Harmonics of 120 Hz under two resonances."""
    t = np.arange(int(16000 * seconds)) / 16000
    hz = 120 * np.arange(1, 30)[:, None]
    gain = 1 / (1 + ((hz - first_hz) / 90) ** 2) + 0.7 / (1 + ((hz - second_hz) / 120) ** 2)
    sound = (gain * np.sin(2 * np.pi * hz * t)).sum(axis=0)
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def middle(wave: np.ndarray) -> np.ndarray:
    track = mouth_track(wave)
    return track[len(track) // 2]


def test_vowels_have_their_shapes() -> None:
    ah, ee, oo = middle(vowel(750, 1250)), middle(vowel(280, 2300)), middle(vowel(300, 750))
    assert ah[0] > ee[0] + 0.1
    assert ee[1] > oo[1] + 0.1
    assert oo[2] > max(ah[2], ee[2]) + 0.1
    assert middle(np.zeros(8000, np.float32))[0] == 0


def test_the_mouth_is_local_in_time() -> None:
    first, second = vowel(750, 1250, 2.0), vowel(750, 1250, 2.0)
    second[16000:] *= 0.1
    a, b = mouth_track(first), mouth_track(second)
    assert np.abs(a - b)[:20].max() < 1e-6
    assert np.abs(a - b)[27:].max() > 0.05


def test_louder_opens_wider() -> None:
    gaps = [middle(gain * vowel(750, 1250))[0] for gain in (0.02, 0.1, 0.3, 1.0)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > gaps[0] + 0.2


# ── the demo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_render_demo(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    demo = render_demo(None, tmp_path / "out.mp4", 0.6, lambda done, total: seen.append((done, total)), device="cpu")
    assert seen[-1] == (15, 15)
    assert demo.record.frames == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png"]
    with av.open(str(demo.video)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 15
        assert abs(float(video.streams.audio[0].duration * video.streams.audio[0].time_base) - 0.6) < 0.06
    sheet = np.asarray(Image.open(demo.sheet))
    assert sheet.shape == (TILE + GAP + WAVE, TILES * TILE + (TILES - 1) * GAP, 3)
    tiles = [sheet[:TILE, k * (TILE + GAP) :][:, :TILE].astype(int) for k in range(TILES)]
    assert all(tile.std() > 20 for tile in tiles)
    assert np.abs(tiles[0] - tiles[-1]).mean() > 0.2, "the same moment eight times"


@pytest.mark.parametrize(("seconds", "rows"), [(0.05, 1), (None, 13)])
def test_the_features_of_a_long_sound_are_not_held(
    seconds: float | None, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in a file, as a day's take gigabytes."""
    given: list[np.ndarray] = []

    def generate_video(pipeline: object, features: np.ndarray, *rest: object, **options: object) -> None:
        given.append(features)
        raise KeyboardInterrupt

    monkeypatch.setattr(FrameGenerationPipeline, "generate_video", generate_video)
    sound = write_wav(tmp_path / "sound.wav", np.random.default_rng(0).integers(-5000, 5000, 8400))
    with pytest.raises(KeyboardInterrupt):
        render_demo(sound, tmp_path / "out.mp4", seconds, device="cpu")
    assert isinstance(given[0], np.memmap) and given[0].shape == (rows, 512)


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_the_sheet_is_of_the_video_in_any_container(suffix: str, tmp_path: Path) -> None:
    """Matroska's streams do not state their length."""
    demo = render_demo(None, tmp_path / "out.mp4", 0.6, device="cpu")
    sound = cut_sound(BUNDLE / "sample.flac", tmp_path / "sound.wav", 0.6)
    with av.open(str(demo.video)) as source, av.open(str(tmp_path / f"out{suffix}"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    sheet = write_contact_sheet(tmp_path / f"out{suffix}", sound, tmp_path / "again.png")
    again, first = (np.asarray(Image.open(path)).astype(int) for path in (sheet, demo.sheet))
    assert np.abs(again[:TILE] - first[:TILE]).max() == 0, "the same moments"
    assert np.abs(again[TILE:] - first[TILE:]).mean() < 5, "the same waveform, but for what the lengths differ by"


def test_cut_sound_is_the_beginning_of_the_whole(tmp_path: Path) -> None:
    whole = load_audio(BUNDLE / "sample.flac")
    cut = load_audio(cut_sound(BUNDLE / "sample.flac", tmp_path / "cut.wav", 1.25))
    assert abs(len(cut) - 20000) <= 32
    n = len(cut) - 200
    assert np.corrcoef(cut[:n], whole[:n])[0, 1] > 0.999
    assert np.corrcoef(cut[:n], whole[100 : n + 100])[0, 1] < 0.9
    assert len(load_audio(cut_sound(BUNDLE / "sample.flac", tmp_path / "long.wav", 99))) == len(whole)


def test_empty_sound_is_reported_by_its_own_file_name(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(wav(b""))
    with pytest.raises(InputError, match=r"empty\.wav: its sound track is empty"):
        render_demo(tmp_path / "empty.wav", tmp_path / "out.mp4", 1.0)


def test_sound_that_changes_format_midway_is_named(tmp_path: Path) -> None:
    """Two broadcasts in one file."""
    for name, rate in (("a", 44100), ("b", 48000)):
        with av.open(str(tmp_path / f"{name}.aac"), "w") as out:
            stream = out.add_stream("aac", rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.rate = rate
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    (tmp_path / "ab.aac").write_bytes((tmp_path / "a.aac").read_bytes() + (tmp_path / "b.aac").read_bytes())
    with pytest.raises(InputError, match=r"ab\.aac: sound cannot be decoded"):
        cut_sound(tmp_path / "ab.aac", tmp_path / "cut.wav", 5)


def test_sound_that_is_rendered_whole_can_also_be_cut(tmp_path: Path) -> None:
    """FFmpeg mixes no 9 channels, and an MP3 may be followed by a note."""
    (tmp_path / "nine.wav").write_bytes(wav(bytes(2 * 9 * 16000), channels=9))
    with av.open(str(tmp_path / "it.mp3"), "w") as out:
        stream = out.add_stream("mp3", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "it.mp3").write_bytes((tmp_path / "it.mp3").read_bytes() + b"a note, and no sound. " * 200)
    for name in ("nine.wav", "it.mp3"):
        whole = load_audio(tmp_path / name)
        assert len(load_audio(cut_sound(tmp_path / name, tmp_path / "cut.wav", 5))) == len(whole)
        assert len(load_audio(cut_sound(tmp_path / name, tmp_path / "cut.wav", 0.5))) == 8000


def test_sound_that_is_cut_too_short_is_reported_by_its_own_file_name(tmp_path: Path) -> None:
    (tmp_path / "it.wav").write_bytes(wav(bytes(96000), rate=48000))
    with pytest.raises(InputError, match=r"it\.wav: 2\.08e-05 s of it are too short; expected a few milli"):
        render_demo(tmp_path / "it.wav", tmp_path / "out.mp4", 1e-9)


def test_a_sheet_that_cannot_be_written_is_told_before_anything_is_rendered(tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OutputError, match=r"out\.png: is a folder"):
        render_demo(None, tmp_path / "out.mp4", 0.2, device="cpu")
    assert not (tmp_path / "out.mp4").exists()


def test_no_room_for_the_cut_sound_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = av.open

    def full(path: Any, *mode: str, **options: Any) -> Any:
        if mode == ("w",):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *mode, **options)

    monkeypatch.setattr(av, "open", full)
    (tmp_path / "it.wav").write_bytes(wav(bytes(96000), rate=48000))
    with pytest.raises(DiskFullError, match=r"^[^:]*cut\.wav: cannot be written: No space left on device$"):
        cut_sound(tmp_path / "it.wav", tmp_path / "cut.wav", 1)


def test_cut_sound_keeps_both_channels_up_to_the_end(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-9000, 9000, (20_000, 2), np.int16)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes(values.tobytes())
    with wave.open(str(cut_sound(tmp_path / "stereo.wav", tmp_path / "cut.wav", 0.3))) as file:
        found = np.frombuffer(file.readframes(-1), np.int16).reshape(-1, file.getnchannels())
    assert np.array_equal(found, values[:4800])


@pytest.mark.parametrize("seconds", [None, 0.5])
def test_a_film_is_not_written_over_by_what_speaks_its_sound(seconds: float | None, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(b"not looked into yet")
    with pytest.raises(InputError, match=r"film\.mp4: is what it would be made of"):
        render_demo(film, film, seconds)
    assert film.read_bytes() == b"not looked into yet"


def test_bad_input_is_named(tmp_path: Path) -> None:
    for seconds in (0, -1, float("inf"), float("nan"), 1e300):
        with pytest.raises(InputError, match=rf"seconds is {re.escape(str(seconds))}; expected more than 0"):
            render_demo(None, tmp_path / "out.mp4", seconds)
    with pytest.raises(InputError, match=r"nothing\.wav"):
        render_demo(tmp_path / "nothing.wav", tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())
