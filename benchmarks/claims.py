"""What others have published."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """A figure that somebody published; nobody here has measured it."""

    who: str
    frames_per_second: float
    hardware: str
    what: str
    source: str


CLAIMS = (
    Claim("seed, Go", 8.9, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Python and ONNX", 12.6, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Go, pooled", 21.7, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Swift on macOS", 47, "Apple M1 Pro", "1280×720", "its authors"),
    Claim("seed, Swift on iOS", 48, "iPhone", "1280×720", "its authors"),
    Claim("LiveTalking, wav2lip256", 60, "RTX 3060", "inference only", "LiveTalking's README"),
    Claim("LiveTalking, MuseTalk", 72, "RTX 4090", "inference only", "LiveTalking's README"),
    Claim("Ultralight-Digital-Human", 100, "RTX 2080", "model loop, about", "its authors"),
    Claim("LiveTalking, wav2lip256", 120, "RTX 3080 Ti", "inference only", "LiveTalking's README"),
)
