"""Changing a file's bytes without regard for their meaning, for `fuzz_cases.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

Rng = random.Random


def spoil_bytes(content: bytes, samples: list[Path], rng: Rng) -> tuple[bytes, str]:
    """Change bytes in one to four places, half of the time near the beginning, where headers are."""
    done = []
    spoiled = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        reach = min(len(spoiled), rng.choice([256, len(spoiled)]))
        at = rng.randrange(reach) if reach else 0
        length = min(rng.choice([1, 2, 4, 16, 200, 5000]), len(spoiled) - at)
        way = rng.choice(list(_BYTES))
        spoiled = bytearray(_BYTES[way](spoiled, at, length, samples, rng))
        done.append(way)
    return bytes(spoiled), "bytes: " + ", ".join(done)


def _put(content: bytearray, at: int, new: bytes, replaced: int) -> bytes:
    return bytes(content[:at]) + new + bytes(content[at + replaced :])


def _huge(content: bytearray, at: int, length: int, samples: list[Path], rng: Rng) -> bytes:
    """Overwrite a possible integer field with an extreme value of its type, or one beyond what is sensible."""
    size = rng.choice([2, 4, 8])
    number = rng.choice([0, 1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1), (1 << 8 * size) - 1, 1 << (6 * size)])
    at -= at % size
    return _put(content, at, number.to_bytes(size, rng.choice(["little", "big"])), size)


def _flip(content: bytearray, at: int, length: int, samples: list[Path], rng: Rng) -> bytes:
    return _put(content, at, bytes([content[at] ^ 1 << rng.randrange(8)]), 1) if content else b""


def _splice(content: bytearray, at: int, length: int, samples: list[Path], rng: Rng) -> bytes:
    other = rng.choice(samples).read_bytes()
    start = rng.randrange(len(other))
    return _put(content, at, other[start : start + length], length)


_BYTES: dict[str, Callable[[bytearray, int, int, list[Path], Rng], bytes]] = {
    "flip": _flip,
    "huge": _huge,
    "splice": _splice,
    "random": lambda content, at, length, samples, rng: _put(content, at, rng.randbytes(length), length),
    "insert": lambda content, at, length, samples, rng: _put(content, at, rng.randbytes(rng.choice([1, 3, 400])), 0),
    "zeros": lambda content, at, length, samples, rng: _put(content, at, bytes(length), length),
    "ones": lambda content, at, length, samples, rng: _put(content, at, b"\xff" * length, length),
    "delete": lambda content, at, length, samples, rng: _put(content, at, b"", length),
    "repeat": lambda content, at, length, samples, rng: _put(content, at, bytes(content[at : at + length]) * 2, length),
    "truncate": lambda content, at, length, samples, rng: bytes(content[: rng.randrange(len(content) + 1)]),
    "append": lambda content, at, length, samples, rng: bytes(content) + rng.randbytes(length + 1),
    "another file": lambda content, at, length, samples, rng: rng.choice(samples).read_bytes(),
}
