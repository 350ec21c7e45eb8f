"""Sound → mel spectrogram → AVE features, in pieces, on the device.

    any audio file ──PyAV──► 16 kHz mono ──pre-emphasis, STFT, mel──► (80, T) ──windows──► (N − 2, 1, 80, 16)
                                                                                                │ AVE encoder
                                                       (N, 512), first and last row twice ◄─────┘

Times: a mel column is 200 samples (12.5 ms); a row of features is 40 ms of video (25 a second) and sees 16 columns
(0.2 s). Nothing here grows with the length of the sound but the result of the functions that return it whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from gpupipe.device import find_device
from gpupipe.errors import CheckpointError
from gpupipe.features import save_features_bin
from gpupipe.files import replacing
from gpupipe.models.audio_encoder import FEATURES, MEL_BANDS, MEL_COLUMNS, AudioEncoder, load_audio_encoder
from gpupipe.tf32 import without_tf32
from gpupipe.transfer import as_array
from gpupipe.video.sound import decode_sound, open_sound

logger = logging.getLogger("gpupipe.speech")

SAMPLE_RATE = 16_000
N_FFT = 800
HOP = 200
PRE_EMPHASIS = 0.97
MEL_RANGE_HZ = (55.0, 7600.0)
COLUMNS_PER_SECOND = SAMPLE_RATE // HOP
FEATURE_FPS = 25

_PIECE_COLUMNS = 4096  # about 51 s of sound to a piece: some 50 MB in the STFT
_BATCH_WINDOWS = 256  # windows to a batch of the encoder


# ── sound ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def audio_chunks(path: str | Path, *, samples: int = 1 << 18) -> Iterator[np.ndarray]:
    """Decode the first sound track of any file that FFmpeg reads, piece by piece.

    Args:
        path: a sound file, or a video file with sound.
        samples: about how long a piece is (the last is shorter).

    Yields:
        float32 ``(n,)`` in [−1, 1], 16 kHz, mono (channels are averaged).

    Raises:
        InputError: the file is missing, unreadable, has no sound track, or a sound track without a sample.
    """
    path = Path(path)
    held, pending = 0, []
    with open_sound(path) as container:
        # Channels are averaged here: FFmpeg's own mix to mono is 3 dB louder for a voice that is in both. They come
        # interleaved: where each has a plane of its own, PyAV looks past the last of 8 or more, and may crash.
        for piece in decode_sound(path, container, av.AudioResampler(format="flt", rate=SAMPLE_RATE)):
            channels = piece.to_ndarray().reshape(-1, piece.layout.nb_channels)
            pending.append(channels.mean(axis=1, dtype=np.float32))
            held += len(pending[-1])
            if held >= samples:
                yield np.concatenate(pending)
                held, pending = 0, []
    if held:
        yield np.concatenate(pending)


def load_audio(path: str | Path) -> np.ndarray:
    """The whole sound track as one array: float32 ``(n,)`` in [−1, 1], 16 kHz, mono. Errors: :func:`audio_chunks`."""
    return np.concatenate(list(audio_chunks(path)))


# ── mel spectrogram ──────────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=4)
def mel_filters(device: torch.device | None = None) -> Tensor:
    """The filter bank, float32 ``(80, 401)``: triangles of unit area, evenly spaced on Slaney's mel scale.

    The scale is linear below 1 kHz (3 mels to 200 Hz) and logarithmic above (27 mels to a factor 6.4): M. Slaney,
    "Auditory Toolbox", 1998; it is the default of librosa's ``filters.mel``, on which the encoder was trained.
    """
    low, high = (_hz_to_mel(hz) for hz in MEL_RANGE_HZ)
    edges = _mel_to_hz(np.linspace(low, high, MEL_BANDS + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    width = np.diff(edges)
    ramps = edges[:, None] - bins
    rising, falling = -ramps[:-2] / width[:-1, None], ramps[2:] / width[1:, None]
    bank = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(bank.astype(np.float32)).to(device or "cpu")


_LINEAR_HZ, _LOG_FROM_HZ, _LOG_STEP = 200 / 3, 1000.0, np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_FROM_HZ:
        return hz / _LINEAR_HZ
    return _LOG_FROM_HZ / _LINEAR_HZ + float(np.log(hz / _LOG_FROM_HZ)) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    knee = _LOG_FROM_HZ / _LINEAR_HZ
    return np.where(mel < knee, mel * _LINEAR_HZ, _LOG_FROM_HZ * np.exp(_LOG_STEP * (np.maximum(mel, knee) - knee)))


@lru_cache(maxsize=4)
def _hann(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, device=device)


def _mel_columns(emphasised: Tensor) -> Tensor:
    """Pre-emphasised sound ``(800 + 200·(n − 1),)`` → n columns ``(80, n)``, without padding."""
    spectrum = torch.stft(
        emphasised, N_FFT, HOP, window=_hann(emphasised.device), center=False, return_complex=True
    ).abs()
    level = 20 * torch.log10((mel_filters(emphasised.device) @ spectrum).clamp_min(1e-5)) - 20
    return (8 * (level + 100) / 100 - 4).clamp_(-4, 4)


def mel_pieces(chunks: Iterable[np.ndarray | Tensor], *, device: str | torch.device = "cpu") -> Iterator[Tensor]:
    """The mel spectrogram of a sound that comes in chunks, in pieces ``(80, n)`` that join to the whole.

    The chunks' lengths do not matter: column t covers samples [200·t − 400, 200·t + 400) of the pre-emphasised sound,
    zeros outside it, and there are ``1 + samples // 200`` of them. A sound too short for one window of the encoder
    is followed by silence up to it.

    Args:
        chunks: float32 ``(n,)`` in [−1, 1], 16 kHz, mono.
        device: where the columns are computed and stay.
    """
    device = torch.device(device)
    total, last = 0, torch.zeros(1, device=device)
    buffer = torch.zeros(N_FFT // 2, device=device)  # centred: half a window of zeros before the first sample

    def columns(limit: int) -> Iterator[Tensor]:
        nonlocal buffer
        while (ready := 1 + (len(buffer) - N_FFT) // HOP) >= limit and ready > 0:
            n = min(ready, _PIECE_COLUMNS)
            yield _mel_columns(buffer[: N_FFT + HOP * (n - 1)])
            buffer = buffer[HOP * n :]

    def emphasise(chunk: Tensor) -> None:
        nonlocal buffer, last
        before = torch.cat([last, chunk[:-1]])
        buffer, last = torch.cat([buffer, chunk - PRE_EMPHASIS * before]), chunk[-1:]

    for chunk in chunks:
        sound = torch.as_tensor(chunk, dtype=torch.float32).to(device)
        if sound.dim() != 1:
            raise ValueError(f"sound has shape {tuple(sound.shape)}; expected one channel, (samples,)")
        if len(sound):
            total += len(sound)
            emphasise(sound)
            yield from columns(_PIECE_COLUMNS)
    missing = max(0, (MEL_COLUMNS - 1) * HOP - total)
    if missing:
        emphasise(torch.zeros(missing, device=device))
    buffer = torch.cat([buffer, torch.zeros(N_FFT // 2, device=device)])
    yield from columns(1)


def mel_spectrogram(wave: np.ndarray | Tensor, *, device: str | torch.device = "cpu") -> Tensor:
    """Sound ``(n,)`` in [−1, 1] at 16 kHz → mel spectrogram ``(80, max(16, 1 + n // 200))`` in [−4, 4], float32.

    Pre-emphasis 0.97; STFT of 800 samples, hop 200, periodic Hann, centred on zeros; magnitude; 80 Slaney bands
    55–7600 Hz; decibels − 20, floored at −120; scaled from [−100, 0] to [−4, 4].
    """
    return torch.cat(list(mel_pieces([wave], device=device)), dim=1)


def window_count(columns: int) -> int:
    """How many windows the encoder sees in ``columns`` (≥ 16) mel columns; there are two more rows of features."""
    return int((columns - MEL_COLUMNS) / COLUMNS_PER_SECOND * FEATURE_FPS) + 2


def window_starts(first: int, last: int) -> Tensor:
    """First mel column of windows ``first`` … ``last − 1``, int64, before any is pulled back from the end."""
    return torch.arange(first, last) * COLUMNS_PER_SECOND // FEATURE_FPS


def mel_windows(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Mel pieces ``(80, n)`` → batches of windows ``(B, 1, 80, 16)``, :func:`window_count` in all.

    Window i starts at column ``int(80·i / 25)``; those that would pass the end are pulled back to it.
    """
    held = torch.empty(MEL_BANDS, 0)
    dropped = done = 0

    def gather(starts: Tensor) -> Iterator[Tensor]:
        for part in (starts - dropped).split(_BATCH_WINDOWS):
            at = (part[:, None] + torch.arange(MEL_COLUMNS)).to(held.device)
            yield held[:, at].movedim(1, 0)[:, None]

    for piece in pieces:
        held = torch.cat([held.to(piece.device), piece], dim=1)
        end = dropped + held.shape[1]
        # A window that ends before the newest column is certain to exist, and not to be pulled back.
        ready = max(done, window_count(end) - 2) if end >= MEL_COLUMNS else 0
        if ready > done:
            yield from gather(window_starts(done, ready))
            done = ready
            drop = max(0, min(int(window_starts(done, done + 1)), end - MEL_COLUMNS) - dropped)
            held, dropped = held[:, drop:], dropped + drop
    end = dropped + held.shape[1]
    if end < MEL_COLUMNS:
        raise ValueError(f"the mel spectrogram has {end} columns; expected at least {MEL_COLUMNS}")
    yield from gather(window_starts(done, window_count(end)).clamp_max(end - MEL_COLUMNS))


# ── features ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class SpeechEncoder:
    """Sound files → AVE features.

    Args:
        checkpoint_path: the AVE encoder, ``.pth`` or ``.safetensors``.
        device: where mel and encoder run; by default CUDA where there is one.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DeviceError: an unknown device, or one that is not there.
    """

    def __init__(self, checkpoint_path: str | Path, device: str | torch.device | None = None) -> None:
        self.device = find_device(device)
        self._path = Path(checkpoint_path)
        self.encoder: AudioEncoder = load_audio_encoder(checkpoint_path).to(self.device)

    @torch.inference_mode()
    def feature_rows(self, chunks: Iterable[np.ndarray | Tensor]) -> Iterator[Tensor]:
        """Sound in chunks (float32, 16 kHz, mono) → rows of features in pieces ``(n, 512)`` on the device.

        Holds seconds of sound at a time, however long it is. The first and the last row come twice.
        """
        last: Tensor | None = None
        for windows in mel_windows(mel_pieces(chunks, device=self.device)):
            with without_tf32(self.device):
                rows = self.encoder(windows)
            if not torch.isfinite(rows).all():
                raise CheckpointError(f"{self._path}: gives NaN or infinite features; expected a trained encoder")
            if last is None:
                yield rows[:1]
            last = rows[-1:]
            yield rows
        if last is not None:
            yield last

    def iter_features(self, audio_path: str | Path) -> Iterator[Tensor]:
        """As :meth:`features`, in pieces ``(n, 512)`` on the device, without holding the whole."""
        return self.feature_rows(audio_chunks(audio_path))

    @torch.inference_mode()
    def covering_features(self, audio_path: str | Path) -> Iterator[Tensor]:
        """As :meth:`iter_features`, the last row repeated until the rows last as long as the sound, to a frame.

        The family's count of rows ends up to 70 ms before the sound does: a video would be that much shorter.
        """
        samples, count, last = 0, 0, torch.empty(0, FEATURES)

        def counted() -> Iterator[np.ndarray]:
            nonlocal samples
            for chunk in audio_chunks(audio_path):
                samples += len(chunk)
                yield chunk

        for rows in self.feature_rows(counted()):
            count, last = count + len(rows), rows[-1:]
            yield rows
        missing = samples * FEATURE_FPS // SAMPLE_RATE - count
        if missing > 0:
            yield last.expand(missing, -1)

    def features(self, audio_path: str | Path) -> np.ndarray:
        """Any sound file → float32 ``(N, 512)``, one row a frame of video at 25 frames a second.

        N is ``int((T − 16) / 80 · 25) + 4`` for T mel columns.

        Raises:
            InputError: see :func:`audio_chunks`.
        """
        rows = torch.cat([piece.cpu() for piece in self.iter_features(audio_path)]).numpy()
        logger.debug("%s: %d rows of features on %s", audio_path, len(rows), self.device)
        return rows


def save_features(features: np.ndarray | Tensor, path: str | Path, *, bin: bool = False) -> list[Path]:
    """Write features as ``.npy``; with ``bin`` also as the pair for programs in other languages.

    The pair is ``NAME.bin`` and ``NAME.bin.json`` beside ``NAME.npy``: see :func:`gpupipe.features.save_features_bin`.
    Each file appears under its name only when it is whole.

    Args:
        features: ``(N, …)``, written as float32.
        path: of the ``.npy`` (the suffix is added if it is not there); its folder must exist.
        bin: write the pair too.

    Returns:
        The paths written, the ``.npy`` first.

    Raises:
        OutputError: a file cannot be written.
    """
    array = np.ascontiguousarray(as_array(features), dtype="<f4")
    path = Path(path)
    if path.suffix != ".npy":
        path = path.with_name(path.name + ".npy")
    with replacing(path) as temporary:
        np.save(temporary, array)
    if not bin:
        return [path]
    raw = save_features_bin(array, path.with_suffix(".bin"))
    return [path, raw, raw.with_name(raw.name + ".json")]


def write_features(pieces: Iterable[Tensor], path: str | Path) -> int:
    """Write features to a ``.npy`` as they come, without holding the whole; returns how many rows there were.

    Args:
        pieces: (n, 512) each.
        path: an existing temporary file, or one to be made.
    """
    count = 0

    def header() -> int:
        facts = {"descr": "<f4", "fortran_order": False, "shape": (count, FEATURES)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, facts)  # has room for any count
        return file.tell()

    with Path(path).open("wb") as file:
        begin = header()
        for piece in pieces:
            count += len(piece)
            file.write(np.ascontiguousarray(piece.cpu().numpy(), dtype="<f4").tobytes())
        assert header() == begin
    return count


__all__ = [
    "SpeechEncoder",
    "audio_chunks",
    "load_audio",
    "mel_spectrogram",
    "save_features",
    "write_features",
]
