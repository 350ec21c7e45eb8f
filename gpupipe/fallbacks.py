"""Fallbacks of this process: each is logged once, and `--json` and `doctor` list them."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_noted: dict[str, None] = {}


def note_fallback(message: str) -> None:
    """Record that a slower way is taken; ``message`` names what was wanted, why it failed, and what is used instead."""
    if message not in _noted:
        _noted[message] = None
        logger.warning("%s", message)


def fallbacks() -> list[str]:
    """Every fallback of this process so far, in order."""
    return list(_noted)
