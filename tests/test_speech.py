"""Sound to features: the golden features, sound in pieces, files of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from fuzz_media import wav
from torch import Tensor

from gpupipe.errors import CheckpointError, DeviceError, InputError
from gpupipe.mel import mel_pieces, mel_spectrogram
from gpupipe.models.audio_encoder import AudioEncoder
from gpupipe.speech import SpeechEncoder
from gpupipe.video.sound import SoundTrack, audio_chunks, load_audio, open_sound

FEATURE_ERROR = 1e-3  # of the largest golden feature


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SpeechEncoder:
    """An encoder with seeded initial weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save(AudioEncoder().state_dict(), path)
    return SpeechEncoder(path, "cpu")


def tone(seconds: float, rate: int = 16000, hz: float = 300.0) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def babble(seconds: float) -> np.ndarray:
    """Noise of changing loudness and colour, so that every column of its mel spectrogram differs."""
    rng = np.random.default_rng(0)
    n = round(seconds * 16000)
    noise = np.cumsum(rng.standard_normal(n)) * 0.02 + rng.standard_normal(n)
    gate = np.interp(np.arange(n), np.linspace(0, n, int(seconds * 6) + 2), rng.random(int(seconds * 6) + 2))
    return (0.1 * noise * gate).astype(np.float32)


def rows(encoder: SpeechEncoder, chunks: list[np.ndarray]) -> np.ndarray:
    return torch.cat(list(encoder.feature_rows(chunks))).numpy()


# ── against the golden files ──────────────────────────────────────────────────────────────────────────────────────────


def test_golden_features(shared: Path, golden_weights: ModuleType, tmp_path: Path) -> None:
    state = {name: torch.from_numpy(value) for name, value in golden_weights.state_dict("ave-encoder").items()}
    torch.save(state, tmp_path / "encoder.pth")
    encoder = SpeechEncoder(tmp_path / "encoder.pth", "cpu")
    golden = np.load(shared / "golden" / "ave-encoder.npz")["features"]
    wave = golden_weights.wave(0)
    bound = FEATURE_ERROR * np.abs(golden).max()
    features = rows(encoder, [wave])
    assert features.shape == (len(golden), 512)
    assert np.abs(features[:, ::4] - golden).max() <= bound
    late = rows(encoder, [np.concatenate([np.zeros(40, np.float32), wave[:-40]])])  # 2.5 ms
    assert np.abs(late[:, ::4] - golden).max() > bound


# ── in pieces ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("samples", [16000 * 4, 16000 * 4 + 137, 16000 * 3 + 199])
@pytest.mark.parametrize("chunk", [1000, 7777, 10**6])
def test_pieces_join_to_the_whole(
    encoder: SpeechEncoder, monkeypatch: pytest.MonkeyPatch, samples: int, chunk: int
) -> None:
    wave = babble(4.1)[:samples]
    mel = mel_spectrogram(wave)
    whole = rows(encoder, [wave])
    monkeypatch.setattr("gpupipe.mel._PIECE_COLUMNS", 37)
    monkeypatch.setattr("gpupipe.mel._BATCH_WINDOWS", 11)
    chunks = [wave[at : at + chunk] for at in range(0, len(wave), chunk)]
    chunks.insert(1, wave[:0])
    pieces = list(mel_pieces(chunks))
    assert max(piece.shape[1] for piece in pieces) <= 37
    torch.testing.assert_close(torch.cat(pieces, dim=1), mel, atol=1e-5, rtol=0)
    np.testing.assert_allclose(rows(encoder, chunks), whole, atol=1e-5)
    assert np.abs(whole[1:-1] - whole[:-2]).max() > 1e-3, "rows that hardly differ would join in any order"


def test_rows_come_out_while_sound_goes_in(encoder: SpeechEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpupipe.mel._PIECE_COLUMNS", 80)
    taken, most = 0, 0

    def sound() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield babble(0.5)

    seen = 0
    for piece in encoder.feature_rows(sound()):
        seen += len(piece)
        most = max(most, taken * 12.5 - seen)
    assert taken == 40
    assert most < 75, f"{most:.0f} rows' worth of sound was held; expected less than three seconds' worth"


# ── sounds of every kind ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("samples", [1, 200, 2999, 3000, 3001, 3200])
def test_short_sound_makes_rows(encoder: SpeechEncoder, samples: int) -> None:
    mel = mel_spectrogram(tone(1)[:samples])
    assert mel.shape[1] == max(16, 1 + samples // 200)
    features = rows(encoder, [tone(1)[:samples]])
    assert features.shape == (int((mel.shape[1] - 16) / 80 * 25) + 4, 512)
    assert np.isfinite(features).all()


def test_first_and_last_row_come_twice(encoder: SpeechEncoder) -> None:
    features = rows(encoder, [babble(2.0)])
    assert (features[0] == features[1]).all()
    assert (features[-1] == features[-2]).all()
    assert (features[1] != features[2]).any()


def test_silence_is_the_lowest_level(encoder: SpeechEncoder) -> None:
    mel = mel_spectrogram(np.zeros(16000, np.float32))
    assert (mel == -4).all()
    assert np.isfinite(rows(encoder, [np.zeros(16000, np.float32)])).all()


def write_sound(path: Path, channels: np.ndarray, rate: int) -> Path:
    """Channels (c, n) in [−1, 1] → a sound file."""
    layout = {1: "mono", 2: "stereo"}[len(channels)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=rate, layout=layout)
        values = (channels.T.reshape(1, -1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(values, format="s16", layout=layout)
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def loudest_hz(wave: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(np.argmax(spectrum) * 16000 / len(wave))


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_rates_and_channels(tmp_path: Path, encoder: SpeechEncoder, rate: int, channels: int) -> None:
    path = write_sound(tmp_path / "tone.wav", np.stack([tone(1.5, rate, 440.0)] * channels), rate)
    wave = load_audio(path)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 24000) <= 32
    assert abs(loudest_hz(wave) - 440) < 2
    assert abs(np.abs(wave[2000:-2000]).max() - 0.5) < 0.02
    assert len(encoder.features(path)) == len(rows(encoder, [wave]))


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = tone(0.5)
    both = load_audio(write_sound(tmp_path / "both.wav", np.stack([left, left / 2]), 16000))
    np.testing.assert_allclose(both, left * 0.75, atol=1e-3)
    against = load_audio(write_sound(tmp_path / "against.wav", np.stack([left, -left]), 16000))
    assert np.abs(against).max() < 1e-3, "one channel alone would be heard"


def test_features_of_a_file_are_those_of_its_samples(tmp_path: Path, encoder: SpeechEncoder) -> None:
    path = write_sound(tmp_path / "b.wav", babble(2.0).clip(-1, 1)[None], 16000)
    features = encoder.features(path)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, rows(encoder, [load_audio(path)]), atol=1e-6)


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.0, 1.619, 3.2])
def test_covering_features_last_as_long_as_the_sound(seconds: float, tmp_path: Path, encoder: SpeechEncoder) -> None:
    path = write_sound(tmp_path / "b.wav", tone(seconds)[None], 16000)
    features = encoder.features(path)
    covering = np.concatenate([piece.numpy() for piece in encoder.covering_features(path)])
    lasting = len(load_audio(path)) * 25 // 16000
    assert len(covering) == max(len(features), lasting)
    np.testing.assert_array_equal(covering[: len(features)], features)
    assert (covering[len(features) :] == features[-1]).all()


def test_chunks_are_pieces_of_the_file(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "b.wav", babble(3.0).clip(-1, 1)[None], 16000)
    chunks = list(audio_chunks(path, samples=4000))
    assert len(chunks) > 5
    assert max(map(len, chunks)) < 12000
    np.testing.assert_array_equal(np.concatenate(chunks), load_audio(path))


def test_a_gap_in_the_times_is_no_silence(tmp_path: Path) -> None:
    """A second of sound, a gap of a second, and another second of sound."""
    with av.open(str(tmp_path / "gap.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for start in (*range(0, 16000, 1600), *range(32000, 48000, 1600)):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 1000, np.int16), format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert len(load_audio(tmp_path / "gap.mkv")) == 32000


def write_video(path: Path, *, sound: bool) -> Path:
    """One second of grey, with or without a 440 Hz tone."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=44100, layout="stereo") if sound else None
        for i in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            values = np.stack([tone(1.0, 44100, 440.0)] * 2)
            frame = av.AudioFrame.from_ndarray(values, format="fltp", layout="stereo")
            frame.rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
            out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    return path


def test_the_sound_track_of_a_video(tmp_path: Path, encoder: SpeechEncoder) -> None:
    path = write_video(tmp_path / "v.mp4", sound=True)
    wave = load_audio(path)
    assert abs(loudest_hz(wave) - 440) < 4
    assert 0.95 * 16000 < len(wave) < 1.1 * 16000
    assert len(encoder.features(path)) >= 24


# ── files that cannot be used ─────────────────────────────────────────────────────────────────────────────────────────


def missing(folder: Path) -> Path:
    return folder / "nothing.wav"


def silent_video(folder: Path) -> Path:
    return write_video(folder / "mute.mp4", sound=False)


def text(folder: Path) -> Path:
    path = folder / "words.wav"
    path.write_text("not a sound\n" * 50)
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.wav"
    path.touch()
    return path


def no_samples(folder: Path) -> Path:
    path = folder / "none.wav"
    path.write_bytes(wav(b""))
    return path


def no_frames(folder: Path) -> Path:
    path = folder / "none.flac"
    with av.open(str(path), "w") as out:
        out.add_stream("flac", rate=16000, layout="mono")
        out.start_encoding()
    return path


def test_unknown_devices_are_refused(tmp_path: Path) -> None:
    torch.save(AudioEncoder().state_dict(), tmp_path / "encoder.pth")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert SpeechEncoder(tmp_path / "encoder.pth", "auto").device.type == expected
    for device in ("foo", "cuda:99"):
        with pytest.raises(DeviceError, match=f"^device is '{device}'"):
            SpeechEncoder(tmp_path / "encoder.pth", device)


def test_encoder_whose_features_are_not_finite_is_named(tmp_path: Path) -> None:
    """Weights that are finite but too large, as after a flipped bit."""
    state = AudioEncoder().state_dict()
    state["0.conv_block.0.weight"][:] = state["1.conv_block.0.weight"][:] = 3e38
    torch.save(state, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match=r"encoder\.pth: gives NaN or infinite features"):
        list(SpeechEncoder(tmp_path / "encoder.pth", "cpu").feature_rows([babble(0.2)]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_infinite_or_nan_feature_is_an_error(value: float, tmp_path: Path) -> None:
    torch.save(AudioEncoder().state_dict(), tmp_path / "encoder.pth")
    encoder = SpeechEncoder(tmp_path / "encoder.pth", "cpu")

    def overflow(windows: Tensor) -> Tensor:
        rows = torch.zeros(len(windows), 512)
        rows[-1, 3] = value
        return rows

    encoder.encoder = overflow  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"encoder\.pth: gives NaN or infinite features"):
        list(encoder.feature_rows([babble(0.5)]))


EMPTY_TRACK = "its sound track is empty; expected a few milliseconds of sound"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (missing, "no such sound file"),
        (silent_video, "has no sound track"),
        (text, "not a media file that FFmpeg reads"),
        (empty, "not a media file that FFmpeg reads"),
        (no_samples, EMPTY_TRACK),
        (no_frames, EMPTY_TRACK),
    ],
)
def test_files_without_sound_are_named(
    make: Callable[[Path], Path], told: str, tmp_path: Path, encoder: SpeechEncoder
) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError) as raised:
        encoder.features(path)
    assert str(raised.value).startswith(f"{path}: {told}")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_a_file_without_sound_is_closed(tmp_path: Path) -> None:
    path = silent_video(tmp_path)
    with pytest.raises(InputError) as raised:  # which keeps what it met alive
        open_sound(path)
    assert path not in [link.resolve() for link in Path("/proc/self/fd").iterdir()], raised


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"rate": 0}, "expected 1000 to 768000|not a media file"),
        ({"rate": 1}, "has 1 samples a second; expected 1000 to 768000"),
        ({"rate": 4_000_000_000}, "expected 1000 to 768000|not a media file"),
        ({"channels": 0}, "channels; expected 1 to 64|not a media file"),
        ({"channels": 300}, "channels; expected 1 to 64|not a media file"),
        ({"tag": 0x7777}, "codec that this FFmpeg does not have|has no sound|cannot be decoded"),
    ],
)
def test_impossible_wav_headers_are_refused(
    header: dict[str, int], told: str, tmp_path: Path, encoder: SpeechEncoder
) -> None:
    (tmp_path / "it.wav").write_bytes(wav(bytes(3200), **header))
    with pytest.raises(InputError, match=rf"it\.wav: .*({told})"):
        encoder.features(tmp_path / "it.wav")


@pytest.mark.parametrize("channels", [2, 7, 8, 9, 16, 25, 64])
def test_all_channels_are_averaged(channels: int, tmp_path: Path) -> None:
    """With 8 channels or more PyAV crashes on planar sound."""
    sound = np.arange(1600 * channels, dtype="<i2").reshape(1600, channels) % 1000
    (tmp_path / "it.wav").write_bytes(wav(sound.tobytes(), channels=channels))
    assert np.abs(load_audio(tmp_path / "it.wav") - sound.mean(axis=1) / 2**15).max() < 1e-6


@pytest.mark.parametrize("channels", [1, 2, 8, 9, 13, 16, 64])
def test_every_number_of_channels_becomes_a_track(channels: int, tmp_path: Path) -> None:
    """FFmpeg cannot mix 9 channels of unknown layout; those are averaged, as for the features."""
    sound = np.zeros((16000, channels), "<i2")
    sound[:, -1] = 8000 * np.sin(np.arange(16000) / 5)
    (tmp_path / "it.wav").write_bytes(wav(sound.tobytes(), channels=channels))
    with av.open(str(tmp_path / "out.mp4"), "w") as container:
        track = SoundTrack(tmp_path / "it.wav", container)
        track.finish()
        assert track.seconds == 1
        track.close()
    heard = load_audio(tmp_path / "out.mp4")
    assert len(heard) == pytest.approx(16000, abs=1024)
    if channels in {1, 9, 13, 64}:  # others are mixed with FFmpeg's weights
        assert heard.std() == pytest.approx(8000 / 2**15 / 2**0.5 / channels, rel=0.05)


def write_mp3(path: Path) -> bytes:
    """Two seconds of a tone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp3", rate=44100, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(tone(2.0, 44100, 440.0)[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path.read_bytes()


@pytest.mark.parametrize(
    ("junk", "told"),
    [(bytes(3000), 1), (b"a note, and no sound. " * 200, 1), (b"\xff" * 1000, 1), (b"TAG".ljust(128), 0)],
)
def test_an_mp3_ends_with_its_last_frame(
    junk: bytes, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As players read it, whatever bytes follow."""
    (tmp_path / "it.mp3").write_bytes(write_mp3(tmp_path / "whole.mp3") + junk)
    heard, whole = load_audio(tmp_path / "it.mp3"), load_audio(tmp_path / "whole.mp3")
    assert len(heard) == pytest.approx(len(whole), abs=1152)
    assert np.abs(heard[:31000] - whole[:31000]).max() < 1e-6
    assert sum(one.name.startswith("gpupipe") for one in caplog.records) == told, "FFmpeg may say more"


def test_damage_in_the_middle_of_an_mp3(tmp_path: Path) -> None:
    whole = write_mp3(tmp_path / "it.mp3")
    (tmp_path / "it.mp3").write_bytes(whole[:5000] + bytes(2000) + whole[7000:])
    with pytest.raises(InputError, match=r"it\.mp3: sound cannot be decoded"):
        load_audio(tmp_path / "it.mp3")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e9, -1e6])
@pytest.mark.parametrize("at", [0, 7, 1599])
def test_nan_infinite_and_boundless_samples_are_refused(value: float, at: int, tmp_path: Path) -> None:
    """NaN would pass into the features; on samples of a million FFmpeg's AAC encoder was seen to hang."""
    sound = np.zeros(1600, np.float32)
    sound[at] = value
    (tmp_path / "it.wav").write_bytes(wav(sound.tobytes(), tag=3, bits=32))
    with pytest.raises(InputError, match=r"it\.wav: sound holds NaN, infinite or boundless samples near 0\.\d\d s"):
        load_audio(tmp_path / "it.wav")
    with av.open(str(tmp_path / "out.mp4"), "w") as container:
        track = SoundTrack(tmp_path / "it.wav", container)
        with pytest.raises(InputError, match=r"it\.wav: sound holds NaN, infinite or boundless samples"):
            track.finish()
        track.close()


def test_samples_beyond_full_scale_are_kept(tmp_path: Path) -> None:
    sound = np.full(1600, 1.5, np.float32)
    (tmp_path / "it.wav").write_bytes(wav(sound.tobytes(), tag=3, bits=32))
    assert np.array_equal(load_audio(tmp_path / "it.wav"), sound)


@pytest.mark.cuda
def test_features_on_the_gpu_match_the_cpu(encoder: SpeechEncoder, tmp_path: Path) -> None:
    torch.save(encoder.encoder.state_dict(), tmp_path / "e.pth")
    wave = babble(3.0)
    gpu = torch.cat(list(SpeechEncoder(tmp_path / "e.pth", "cuda").feature_rows([wave])))
    assert gpu.device.type == "cuda"
    cpu = rows(encoder, [wave])
    np.testing.assert_allclose(gpu.cpu().numpy(), cpu, atol=2e-3 * np.abs(cpu).max())
