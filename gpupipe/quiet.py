"""Warnings of other libraries that are nothing to a user, kept from them."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

_lock = threading.Lock()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Within this context Python warns of nothing.

    Its filters are the whole process's: one thread at a time changes them, so that they are always set back to the
    program's own, and not to what another thread had set.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
