"""Suppresses warnings of other libraries that do not concern a user."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from gpupipe.locks import forkable_lock

_lock = forkable_lock()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Suppress Python's warnings within this context.

    The filters belong to the whole process. Only one thread at a time changes them, so that they are always restored to
    the program's own, never to what another thread had set.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
