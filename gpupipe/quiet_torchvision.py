"""torchvision's functions for JPEGs, with PyAV's log left as it was."""

from __future__ import annotations

from types import ModuleType

import av.logging


def torchvision_io() -> ModuleType:
    """Import ``torchvision.io``, which takes a second.

    Up to 0.25 it has PyAV hand FFmpeg's errors to Python's log. A decoder's thread that has one then waits for Python,
    which may be waiting, in ``close``, for that thread: both for ever (seen with torchvision 0.24 and PyAV 18.1).
    """
    level = av.logging.get_level()
    import torchvision.io  # noqa: PLC0415

    if av.logging.get_level() != level:
        av.logging.set_level(level)
    return torchvision.io
