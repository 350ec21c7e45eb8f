"""What others have published."""

from __future__ import annotations

from typing import NamedTuple

LIVETALKING = "LiveTalking's README", "https://github.com/lipku/LiveTalking"
ULTRALIGHT = "its authors", "https://github.com/anliyuan/Ultralight-Digital-Human"
PREDECESSOR = "its authors", None


class Claim(NamedTuple):
    """A figure that somebody published; nobody here has measured it.

    Attributes:
        url: where it is published; None where that page is not public.
    """

    who: str
    frames_per_second: float
    hardware: str
    what: str
    source: str
    url: str | None


CLAIMS = (
    Claim("predecessor, Go", 8.9, "Apple M1 Pro", "1280×720", *PREDECESSOR),
    Claim("predecessor, Python and ONNX", 12.6, "Apple M1 Pro", "1280×720", *PREDECESSOR),
    Claim("predecessor, Go, pooled", 21.7, "Apple M1 Pro", "1280×720", *PREDECESSOR),
    Claim("predecessor, Swift on macOS", 47, "Apple M1 Pro", "1280×720", *PREDECESSOR),
    Claim("predecessor, Swift on iOS", 48, "iPhone", "1280×720", *PREDECESSOR),
    Claim("LiveTalking, wav2lip256", 60, "RTX 3060", "inference only", *LIVETALKING),
    Claim("LiveTalking, MuseTalk", 72, "RTX 4090", "inference only", *LIVETALKING),
    Claim("Ultralight-Digital-Human", 100, "RTX 2080", "loop at 160², about", *ULTRALIGHT),
    Claim("LiveTalking, wav2lip256", 120, "RTX 3080 Ti", "inference only", *LIVETALKING),
)
"""By frames a second."""
