"""The errors that a user can cause: each says which file, what was met and what was expected."""

from __future__ import annotations

import errno
import operator
from pathlib import Path
from typing import SupportsIndex


class GpupipeError(Exception):
    """Something that is not the user's input went wrong in a way gpupipe understands (exit code 1)."""


class InputError(GpupipeError, ValueError):
    """A file, option or array that the user gave cannot be used as it is (exit code 2).

    The message is one line. It names the file or argument, what was met and what was expected.
    """


class CheckpointError(InputError):
    """A checkpoint that is unreadable, unsafe, incomplete or of another network."""


class DeviceError(InputError):
    """A device, engine or codec that was asked for by name and is not available."""


class DeviceLostError(GpupipeError):
    """A GPU that no longer works in this process."""


class OutputError(InputError):
    """An output that cannot be written."""


class DiskFullError(OutputError):
    """An output that cannot be written because there is no room for it."""


def output_error(path: Path, error: OSError, what: str = "written") -> OutputError:
    """Return what to raise for an error of the file system while ``path`` was written or made."""
    kind = DiskFullError if error.errno in {errno.ENOSPC, errno.EDQUOT} else OutputError
    reason = error.strerror or error
    if error.errno == errno.ENOENT and not path.parent.exists():
        reason = f"there is no folder {path.parent}"
    return kind(f"{path}: cannot be {what}: {reason}")


def whole_number(value: SupportsIndex, what: str, expected: str) -> int:
    """Return a number that counts something.

    Raises:
        InputError: it is not of an integer type: ``what`` it is, and what was ``expected``.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} is {value!r}; expected {expected}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its type if it has no message."""
    return next(iter(str(error).splitlines()), "").strip() or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return an error as one line, which begins with its type unless its messages are written for users."""
    kind, line = type(error).__name__, " ".join(str(error).split())
    for_users = isinstance(error, (GpupipeError, OSError, MemoryError))
    return (line or kind) if for_users else f"{kind}: {line}".removesuffix(": ")
