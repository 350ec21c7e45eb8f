"""What was wanted and could not be had in this process: said once in the log, and named by `--json` and `doctor`."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_noted: dict[str, None] = {}


def note_fallback(message: str) -> None:
    """Record that a slower way is taken; ``message`` names what was wanted, why not, and what is taken instead."""
    if message not in _noted:
        _noted[message] = None
        logger.warning("%s", message)


def fallbacks() -> list[str]:
    """Every fallback of this process so far, in order."""
    return list(_noted)
