"""Sound → mel spectrogram, in pieces, on the device, and the windows of it that the speech encoder sees.

    16 kHz mono ──pre-emphasis, STFT, mel──► (80, T) ──windows──► (N − 2, 1, 80, 16)

A mel column is 200 samples (12.5 ms) and a window 16 columns (0.2 s); windows follow each other as video frames do, 25
a second. Memory does not grow with the length of the sound, except for what :func:`mel_spectrogram` returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gpupipe.models.audio_encoder import MEL_BANDS, MEL_COLUMNS, SAMPLE_RATE
from gpupipe.tf32 import own_precision

N_FFT = 800
HOP = 200
PRE_EMPHASIS = 0.97
MEL_RANGE_HZ = (55.0, 7600.0)
COLUMNS_PER_SECOND = SAMPLE_RATE // HOP
FEATURE_FPS = 25

_PIECE_COLUMNS = 4096  # about 51 s of sound to a piece: some 50 MB in the STFT
_BATCH_WINDOWS = 256  # windows to a batch of the encoder


@lru_cache(maxsize=4)
def mel_filters(device: torch.device) -> Tensor:
    """Return the filter bank, float32 ``(80, 401)``: triangles of unit area, evenly spaced on Slaney's mel scale.

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
    return torch.from_numpy(bank.astype(np.float32)).to(device)


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
    return torch.hann_window(N_FFT, dtype=torch.float32, device=device)


def _mel_columns(emphasised: Tensor) -> Tensor:
    """Pre-emphasised sound ``(800 + 200·(n − 1),)`` → n columns ``(80, n)``, without padding."""
    device = emphasised.device
    with own_precision(device):
        spectrum = torch.stft(emphasised, N_FFT, HOP, window=_hann(device), center=False, return_complex=True).abs()
        level = 20 * torch.log10((mel_filters(device) @ spectrum).clamp_min(1e-5)) - 20
        return (8 * (level + 100) / 100 - 4).clamp_(-4, 4)


def mel_pieces(chunks: Iterable[np.ndarray | Tensor], *, device: str | torch.device = "cpu") -> Iterator[Tensor]:
    """Yield the mel spectrogram of a sound that comes in chunks, in pieces ``(80, n)`` that join to the whole.

    The chunks' lengths do not matter: column t covers samples [200·t − 400, 200·t + 400) of the pre-emphasised sound,
    zeros outside it, and there are ``1 + samples // 200`` of them. A sound that is shorter than one window of the
    encoder is padded with silence to that length.

    Args:
        chunks: float32 ``(n,)`` in [−1, 1], 16 kHz, mono.
        device: where the columns are computed and stay.

    Raises:
        ValueError: a chunk that is not of one channel.
    """
    device = torch.device(device)
    total, last = 0, torch.zeros(1, dtype=torch.float32, device=device)
    buffer = last.new_zeros(N_FFT // 2)  # centred: half a window of zeros before the first sample

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
        emphasise(last.new_zeros(missing))
    buffer = torch.cat([buffer, last.new_zeros(N_FFT // 2)])
    yield from columns(1)


def mel_spectrogram(wave: np.ndarray | Tensor) -> Tensor:
    """Sound ``(n,)`` in [−1, 1] at 16 kHz → mel spectrogram ``(80, max(16, 1 + n // 200))`` in [−4, 4], float32.

    Pre-emphasis 0.97; STFT of 800 samples, hop 200, periodic Hann, centred on zeros; magnitude; 80 Slaney bands
    55–7600 Hz; decibels − 20, floored at −120; scaled from [−100, 0] to [−4, 4].
    """
    return torch.cat(list(mel_pieces([wave])), dim=1)


def window_count(columns: int) -> int:
    """Return how many windows the encoder sees in ``columns`` (≥ 16) mel columns; features have two rows more."""
    return int((columns - MEL_COLUMNS) / COLUMNS_PER_SECOND * FEATURE_FPS) + 2


def window_starts(first: int, last: int) -> Tensor:
    """Return the first mel column of windows ``first`` … ``last − 1``, int64, none pulled back from the end yet."""
    return torch.arange(first, last) * COLUMNS_PER_SECOND // FEATURE_FPS


def mel_windows(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Mel pieces ``(80, n)`` → batches of windows ``(B, 1, 80, 16)``, :func:`window_count` in all.

    Window i starts at column ``int(80·i / 25)``; those that would pass the end are pulled back to it.

    Raises:
        ValueError: fewer columns than one window has.
    """
    held = torch.empty(MEL_BANDS, 0, dtype=torch.float32)
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
