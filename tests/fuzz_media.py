"""Spoiling the headers of media files, for `fuzz_cases.py`: sound and video."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import numpy as np

Rng = random.Random
Spoiled = tuple[bytes, str]

RATES = (
    0, 1, 2, 100, 999, 1000, 5512, 8000, 11025, 16000, 22050, 44100, 96000, 192000, 768000, 2**31 - 1, 4_000_000_000,
    2**32 - 1,
)  # fmt: skip
CHANNELS = (0, 1, 2, 3, 6, 8, 9, 24, 63, 64, 65, 255, 256, 300, 65535)
SAMPLES = (math.nan, math.inf, -math.inf, 1e30, 1e38, -1e38, 1e9, 1.5, 1e-40)
PLAYLISTS = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\ntone.ts\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/dev/zero\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n",
    "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://192.0.2.1/a.m3u8\n",
    "ffconcat version 1.0\nfile 'nothing.wav'\n",
    "ffconcat version 1.0\nfile '/dev/zero'\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic"></MPD>\n',
    "[playlist]\nFile1=http://127.0.0.1:9/a.mp3\n",
)  # fmt: skip


BOXES = b"tkhd mvhd mdhd stts ctts stss stsz stsc stco avc1 avcC elst hdlr stsd mdat moov trak ftyp colr".split()


def spoil_sound(content: bytes, rng: Rng) -> Spoiled:
    """Spoil fields of a WAV header, write NaN or boundless samples, or put a playlist in its place."""
    way = rng.choice(["header", "header", "header", "header", "samples", "samples", "playlist", "short", "other"])
    if way == "playlist":
        text = rng.choice(PLAYLISTS)
        return text.encode(), f"playlist {text[:30]!r}"
    if way == "samples":
        wave = (0.3 * np.sin(np.arange(1600) / 8)).astype(np.float32)
        value = rng.choice(SAMPLES)
        wave[rng.choice([slice(None), slice(7, 8), slice(0, 1), slice(1599, None), slice(100, 900)])] = value
        return wav(wave.tobytes(), tag=3, bits=32), f"samples of {value}"
    if way == "short":
        count = rng.choice([0, 1, 2, 3, 200, 1023])
        return wav(bytes(2 * count)), f"{count} samples"
    if way == "other":
        return rng.choice(
            [b"RIFF" + bytes(4000), b"ID3\x04\0\0\x7f\x7f\x7f\x7f", b"fLaC" + bytes(100), b"OggS" * 400, b"text\n" * 99]
        ), way
    fields: dict[str, Any] = {
        "rate": lambda: rng.choice(RATES),
        "channels": lambda: rng.choice(CHANNELS),
        "bits": lambda: rng.choice([0, 1, 4, 7, 8, 12, 24, 32, 64, 65535]),
        "tag": lambda: rng.choice([0, 2, 3, 6, 7, 0x11, 0x31, 0x50, 0x55, 0x161, 0xFF, 0xFFFE, 0xFFFF]),
        "align": lambda: rng.choice([0, 1, 3, 600, 65535]),
        "byte_rate": lambda: rng.choice([0, 1, 2**32 - 1]),
        "length": lambda: rng.choice([0, 1, 3, 5000, 2**31, 2**32 - 1]),
        "form": lambda: rng.choice([b"RIFX", b"RF64", b"RIFF"]),
        "chunk": lambda: rng.choice([0, 1, 14, 18, 40, 2**32 - 1]),
    }
    chosen = {name: fields[name]() for name in rng.sample(sorted(fields), rng.choice([1, 1, 2, 3]))}
    return wav((8000 * np.sin(np.arange(1600) / 8)).astype("<i2").tobytes(), **chosen), f"WAV {chosen}"


def wav(
    data: bytes,
    *,
    rate: int = 16000,
    channels: int = 1,
    bits: int = 16,
    tag: int = 1,
    align: int | None = None,
    byte_rate: int | None = None,
    length: int | None = None,
    form: bytes = b"RIFF",
    chunk: int = 16,
) -> bytes:
    """A WAV file with the given values in its header."""
    align = min(channels * bits // 8, 65535) if align is None else align
    byte_rate = min(rate * align, 2**32 - 1) if byte_rate is None else byte_rate
    length = len(data) if length is None else length
    order = ">" if form == b"RIFX" else "<"
    described = struct.pack(f"{order}HHIIHH", tag, channels, rate, byte_rate, align, bits)
    body = b"WAVEfmt " + struct.pack(f"{order}I", chunk) + described + b"data" + struct.pack(f"{order}I", length) + data
    return form + struct.pack(f"{order}I", len(body)) + body


def spoil_video(content: bytes, rng: Rng) -> Spoiled:
    """Spoil fields of an MP4's boxes, or put a playlist in its place."""
    if rng.random() < 0.15:
        text = rng.choice(PLAYLISTS)
        return text.encode(), f"playlist {text[:30]!r}"
    name = rng.choice(BOXES)
    at = content.find(name)
    if at < 4:
        return content[: len(content) // 2], "cut"
    if rng.random() < 0.3:
        size = rng.choice([0, 1, 7, 8, 9, 2**31 - 1, 2**32 - 1])
        return content[: at - 4] + struct.pack(">I", size) + content[at:], f"{name.decode()} of {size} bytes"
    if rng.random() < 0.2:
        return content[:at] + b"free" + content[at + 4 :], f"no {name.decode()}"
    where = at + 4 + 2 * rng.randrange(40)
    field = struct.pack(">I", rng.choice([0, 1, 3, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)]))
    field = field[: rng.choice([1, 2, 4])]
    return content[:where] + field + content[where + len(field) :], f"a field of {name.decode()}"
