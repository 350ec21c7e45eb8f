"""Sound to train on: made-up sentences spoken by espeak-ng, roughened, and sounds that no one spoke.

Everything follows from a seed. Speech synthesis is the only thing taken from outside: ``espeak-ng`` must be installed
(Debian: ``apt-get install espeak-ng``); it is needed for training only.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from gpupipe.errors import GpupipeError
from gpupipe.models.audio_encoder import SAMPLE_RATE
from gpupipe.video.sound import load_audio

LANGUAGES = ("en-us", "en-gb", "en-gb-scotland", "de", "fr-fr", "es", "it", "nl", "sv", "pl", "pt-br")
VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+f1", "+f2", "+f3", "+f4", "+croak")

HELD_OUT_VOICE = "en-gb-x-rp+f5"
"""Speaks the bundled sample; trains nothing."""

HELD_OUT_TEXT = "Good morning! I have never heard this sound before, and yet my lips move with every word of it."


def _listed(text: str) -> list[str]:
    """Words between upright strokes, on one line or several."""
    return [words for line in text.strip().splitlines() for words in line.strip().split("|")]


_WHO = """
    the old gardener|my cousin|a tired pilot|our neighbour's daughter|the orchestra|nobody|every second student
    the baker from Oslo|a small grey owl|the committee|one brave sailor|the clockmaker|you|a choir of frogs
    the youngest judge|his aunt Ursula|the weather|a huge machine|Theodore|the shy violinist
"""
_DOES = """
    whispers about|paints|has forgotten|would rather eat|always argues with|is looking for|carried away
    never understood|sings to|throws|measures|bought|should fix|dreams of|polishes|hid|wants to show you
    calls|pulls up|chews
"""
_WHAT = """
    a wooden boat|the blue teapot|eleven apples|those noisy engines|a bowl of hot soup|the moon|her favourite shoe
    all the papers|a thousand feathers|the big red door|some honey|a puzzle of five pieces|the wrong map|two fat geese
    a very thin thread|the view from the roof|a loaf of bread|an orange umbrella|this question|the fish
"""
_WHERE = """
    near the harbour|at half past four|before anyone wakes|under the stairs|without a word|in the cool of the evening
    for the third time this week|while it rains|on the way to school|over and over|beyond the hills|as if it were gold
    behind the theatre|with both hands|just in time|far too loudly|on a Thursday in June|by the fire
"""
_PARTS = [_listed(part) for part in (_WHO, _DOES, _WHAT, _WHERE)]
_ASIDES = _listed("Oh!|Ah, well.|Hmm.|Wow, look at that.|Yes, yes.|No.|Please.|Good.|Who knows?|Aha!")
_ONSETS = _listed("|b|d|f|g|h|k|l|m|n|p|r|s|sh|t|tr|v|w|z|bl|st|ch")
_VOWELS = _listed("a|ee|i|o|oo|u|ai|ow|ay|er|aw|e")


def sentences(rng: np.random.Generator, count: int) -> str:
    """``count`` made-up sentences in a row, with asides, numbers and nonsense words."""
    said = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.12:
            said.append(str(rng.choice(_ASIDES)))
        elif kind < 0.22:
            said.append(f"{rng.integers(2, 1000)} and {rng.integers(2, 100)}.")
        elif kind < 0.4:
            words = ["".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.integers(1, 4)))
                     for _ in range(rng.integers(3, 8))]  # fmt: skip
            said.append(" ".join(words) + ".")
        else:
            said.append(" ".join(str(rng.choice(part)) for part in _PARTS) + ".")
    return " ".join(said)


def speak(text: str, voice: str, path: Path, *, words_per_minute: int = 170, pitch: int = 50) -> None:
    """Have espeak-ng say ``text`` into the wave file ``path``.

    Raises:
        GpupipeError: espeak-ng is not installed, or refuses.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise GpupipeError("espeak-ng: not installed; training needs it to make speech (apt-get install espeak-ng)")
    command = [program, "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "-w", str(path), "--", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        raise GpupipeError(f"espeak-ng: failed with voice {voice} ({done.stderr.strip() or done.returncode})")


def utterances(count: int, *, seed: int) -> Iterator[np.ndarray]:
    """``count`` sounds of about 5–25 s, float32 ``(n,)``, 16 kHz: nine in ten spoken and roughened, the rest tones.

    Utterance k depends on ``seed`` and k alone.
    """
    with TemporaryDirectory(prefix="gpupipe-speech-") as folder:
        for k in range(count):
            rng = np.random.default_rng((seed, k))
            if rng.random() < 0.1:
                yield roughen(babble(rng, seconds=10), rng)
                continue
            voice = str(rng.choice(LANGUAGES)) + str(rng.choice(VARIANTS))
            path = Path(folder) / f"{k}.wav"
            speak(
                sentences(rng, int(rng.integers(2, 6))),
                voice,
                path,
                words_per_minute=int(rng.integers(110, 230)),
                pitch=int(rng.integers(10, 90)),
            )
            yield roughen(load_audio(path), rng)
            path.unlink()


def babble(rng: np.random.Generator, *, seconds: float) -> np.ndarray:
    """Speech-like sound from no speaker: gated harmonics through two wandering resonances, hisses, pauses."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE

    def wander(low: float, high: float, rate: float) -> np.ndarray:
        knots = rng.uniform(low, high, int(seconds * rate) + 2)
        return np.interp(t * rate, np.arange(len(knots)), knots)

    pitch = wander(80, 280, 1.5)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    formants = [
        (wander(280, 850, 4), 90.0, 1.0),
        (wander(800, 2300, 4), 130.0, 0.6),
        (wander(2400, 3200, 2), 220.0, 0.25),
    ]
    voice = np.zeros(n)
    for k in range(1, 25):
        hz = k * pitch
        gain = sum(level / (1 + ((hz - at) / wide) ** 2) for at, wide, level in formants)
        voice += np.where(hz < 4000, gain, 0) * np.sin(k * phase)
    hiss = np.diff(rng.standard_normal(n + 1))
    gate = np.clip(wander(-0.5, 1, 7), 0, 1) ** 0.5
    sound = voice * gate + 0.3 * hiss * np.clip(wander(-2, 1, 6), 0, 1)
    return (0.5 * sound / (np.abs(sound).max() + 1e-9)).astype(np.float32)


def roughen(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another microphone, room and level: gain −14 … +3 dB of a full peak, tilted spectrum, echo, noise."""
    n = len(wave)
    if rng.random() < 0.6:
        spectrum = np.fft.rfft(wave)
        octaves = np.log2(np.maximum(np.linspace(0, SAMPLE_RATE / 2, len(spectrum)), 60) / 1000)
        decibels = rng.uniform(-2.5, 2.5) * octaves + rng.uniform(0, 4) * np.sin(octaves * 2 + rng.uniform(0, 6))
        wave = np.fft.irfft(spectrum * 10 ** (decibels / 20), n)
    if rng.random() < 0.3:
        tail = int(rng.uniform(0.05, 0.25) * SAMPLE_RATE)
        room = rng.standard_normal(tail) * np.exp(-5 * np.arange(tail) / tail)
        room[0] = rng.uniform(4, 12) * np.sqrt((room**2).mean() * tail / 20)
        size = 1 << (n + tail).bit_length()
        wave = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)[:n]
    wave = wave / (np.abs(wave).max() + 1e-9) * 10 ** (rng.uniform(-14, 3) / 20)
    if rng.random() < 0.5:
        wave = wave + 10 ** (rng.uniform(-75, -38) / 20) * rng.standard_normal(n)
    return np.clip(wave, -1, 1).astype(np.float32)
