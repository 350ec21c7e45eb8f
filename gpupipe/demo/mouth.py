"""What the drawn character's mouth does for a sound: deterministic signal processing, no learning.

This is the truth that the bundled networks are trained to follow, and that the held-out check compares with. Three
numbers a frame, each in [0, 1]:

    openness   how far the jaw drops: loudness of the voice, more for a high first formant (a) than a low one (i, u)
    width      how far the corners are drawn out: a high second formant (i, e) and hissing sounds (s, f)
    rounding   how far the lips are pursed: a low second formant (o, u)

Formants are not tracked; the balance of energy between bands stands for them, and everything is smooth in it, so that
every sound has a well-behaved answer.
"""

from __future__ import annotations

import numpy as np

from gpupipe.models.audio_encoder import SAMPLE_RATE

MOUTH_FPS = 25
PARAMETERS = ("openness", "width", "rounding")

_HOP = SAMPLE_RATE // 100  # analysis every 10 ms
_WINDOW = 512
_BATCH = 8192
_BANDS_HZ = {"low": (120, 450), "f1": (450, 1000), "f2": (1000, 1500), "f3": (1500, 3000), "hiss": (3500, 7500)}
_SILENT_DB, _LOUD_DB = -48.0, -16.0
_REST = (0.0, 0.35, 0.0)
_SPEAKING = (0.55, 0.5, 0.45)
"""How far from rest speech takes each of the three: nobody gapes and pouts as far as they can in order to talk."""


def mouth_track(wave: np.ndarray, *, frames: int | None = None) -> np.ndarray:
    """True mouth of a sound.

    Args:
        wave: float32 ``(n,)`` in [−1, 1], 16 kHz, mono.
        frames: how many frames to answer for; by default as many as the sound lasts at 25 a second, rounded up.

    Returns:
        float32 ``(frames, 3)``: openness, width, rounding in [0, 1]. Row i answers for the time (i + ½) / 25 s and
        depends on the sound within 0.15 s of it.
    """
    wave = np.asarray(wave, dtype=np.float32)
    if wave.ndim != 1:
        raise ValueError(f"sound has shape {wave.shape}; expected one channel, (samples,)")
    if frames is None:
        frames = -(-len(wave) * MOUTH_FPS // SAMPLE_RATE)
    power = {name: _smooth(band, 3.0) for name, band in _band_powers(wave).items()}
    voice = power["low"] + power["f1"] + power["f2"] + power["f3"]
    loud = _ramp(_decibels(voice + 0.25 * power["hiss"]), _SILENT_DB, _LOUD_DB)
    first = _ratio(power["f1"], power["low"])
    second = _ratio(power["f3"] + power["f2"], power["f1"] + 0.3 * power["low"])
    hiss = _ratio(power["hiss"], 2 * voice)
    openness = loud**1.4 * (0.45 + 0.55 * _ramp(first, -9, 6)) * (1 - 0.7 * _ramp(hiss, -4, 8))
    front = _ramp(second, -16, 2)
    present = _ramp(loud, 0.02, 0.3)
    width = 0.35 + present * (0.65 * np.maximum(front, _ramp(hiss, -4, 8)) - 0.25)
    rounding = present * _ramp(-second, 6, 18) * (1 - _ramp(hiss, -6, 4))
    track = np.stack([_smooth(value, 2.5) for value in (openness, width, rounding)], axis=1)
    times = (np.arange(frames) + 0.5) / MOUTH_FPS * SAMPLE_RATE / _HOP
    grid = np.arange(len(track))
    columns = [np.interp(times, grid, column) for column in track.T]
    full = np.clip(np.stack(columns, axis=1), 0, 1)
    return (_REST + (full - _REST) * _SPEAKING).astype(np.float32)


def _band_powers(wave: np.ndarray) -> dict[str, np.ndarray]:
    """Mean square of the sound in each band, every 10 ms; 0.2 s of silence is put behind it."""
    padded = np.pad(wave, (_WINDOW // 2, _WINDOW + SAMPLE_RATE // 5))
    steps = (len(padded) - _WINDOW) // _HOP
    window = np.hanning(_WINDOW).astype(np.float32)
    scale = 2 / (_WINDOW * float((window**2).sum()))
    bin_hz = SAMPLE_RATE / _WINDOW
    edges = {name: (round(low / bin_hz), round(high / bin_hz)) for name, (low, high) in _BANDS_HZ.items()}
    out = {name: np.empty(steps) for name in _BANDS_HZ}
    views = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    for at in range(0, steps, _BATCH):
        spectrum = np.abs(np.fft.rfft(views[at : min(at + _BATCH, steps)] * window, axis=1)) ** 2 * scale
        for name, (low, high) in edges.items():
            out[name][at : at + len(spectrum)] = spectrum[:, low:high].sum(axis=1)
    return out


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of ``sigma`` steps, cut at three sigma; the ends are held."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def _decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(power + 1e-9)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Ratio in decibels; near 0 dB when both are next to silence."""
    return _decibels((above + 1e-7) / (below + 1e-7))


def _ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at and below ``low``, 1 at and above ``high``, smooth between (3t² − 2t³)."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
