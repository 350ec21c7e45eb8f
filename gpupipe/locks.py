"""Locks that are free in a forked child."""

from __future__ import annotations

import os
import threading


def forkable_lock() -> threading.RLock:
    """A lock that a process is not forked under, so that no child waits for a thread that it does not have.

    It may be taken again by the thread that holds it, and that thread may fork.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
