"""Files in and out: what is read is an ordinary file; what is written appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpupipe.errors import InputError, OutputError, output_error

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


_LONGEST_STEM = 150
"""Bytes of a file's name that its temporary one repeats: file systems take 255."""


def input_file(path: str | Path, what: str, error: type[InputError] = InputError) -> Path:
    """Return the path of an ordinary file, or of a link to one: reading a pipe would block, and a device never ends.

    Args:
        what: what errors call the file, as in "no such image file".
        error: the class of those errors.

    Raises:
        InputError: it is missing, not accessible, or not an ordinary file.
    """
    mode = _mode(Path(path), what, error)
    if not stat.S_ISREG(mode):
        raise error(f"{path}: is {_kind(mode)}; expected an ordinary file")
    return Path(path)


def input_folder(path: str | Path, what: str) -> Path:
    """Return the path of a folder, or of a link to one; errors call it ``what``.

    Raises:
        InputError: it is missing, not accessible, or not a folder.
    """
    if not stat.S_ISDIR(_mode(Path(path), what, InputError)):
        raise InputError(f"{path}: is not a folder; expected a {what}")
    return Path(path)


def media_url(path: str | Path) -> str:
    """Return a file's name for FFmpeg, which takes what stands before a colon for a protocol."""
    return f"file:{path}"


def _mode(path: Path, what: str, error: type[InputError]) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as missing:
        raise error(f"{path}: no such {what}{similar(path)}") from missing
    except (OSError, ValueError) as reason:  # ValueError: a name with a null byte
        raise error(f"{path}: cannot be read as a {what} ({getattr(reason, 'strerror', reason)})") from reason


def similar(path: Path) -> str:
    """Return a hint about a missing file: a name beside it that differs only in case, suffix or leading zeros."""

    def bare(path: Path) -> str:
        return path.stem.casefold().lstrip("0")

    try:
        names = [other.name for other in path.parent.iterdir() if bare(other) == bare(path) and other.name != path.name]
    except OSError:
        return ""
    return f"; there is {min(names)}" if names else ""


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "no file")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, with the same suffix; rename it on success, delete it on any failure.

    A link of that name is replaced, not followed.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full. Errors about other files pass through.
    """
    path = Path(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(mode := path.stat().st_mode):  # /dev/null would be replaced
                raise OutputError(f"{path}: is {_kind(mode)}; expected the name of a file to write")
    except OSError as error:
        raise output_error(path, error) from error
    short = os.fsencode(path.stem)[:_LONGEST_STEM].decode(errors="ignore")
    temporary = path.with_name(f".{short}-{secrets.token_hex(6)}.part{path.suffix}")
    try:  # before the file exists: an interrupt may come as soon as it does
        temporary.touch(exist_ok=False)  # with the user's default permissions, unlike mkstemp
        yield temporary
        temporary.replace(path)
    except OSError as error:
        other = error.filename and Path(str(error.filename)).name not in {path.name, temporary.name}
        if other or isinstance(error, ConnectionError | TimeoutError):  # no file's: a caller's own
            raise
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it may never have been made
            temporary.unlink(missing_ok=True)


class _NothingToWrite(Exception):
    """Raised to leave :func:`replacing` without a file."""


def check_writable(path: str | Path) -> None:
    """Raise now, before any work, what :func:`replacing` would raise about ``path``."""
    with contextlib.suppress(_NothingToWrite), replacing(path):
        raise _NothingToWrite


def check_not_read(path: str | Path, *inputs: object) -> None:
    """Raise InputError if a file that is to be written is one of those it is made of, or a link to one.

    Args:
        inputs: what is read; only names and paths are compared.
    """
    for given in inputs:
        same = False
        with contextlib.suppress(OSError, ValueError):  # mostly because there is none yet
            same = isinstance(given, str | Path) and Path(path).samefile(given)
        if same:
            raise InputError(f"{path}: is what it would be made of; expected another name")


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents if they do not exist.

    Raises:
        OutputError: it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error, "made") from error
    return folder


def cache_folder() -> Path:
    """Where what can be made again is kept from one process to the next: ``$GPUPIPE_CACHE``, or ``gpupipe`` in the
    user's cache folder. A user without a home, as in a container, has one for this process alone."""
    if given := os.environ.get("GPUPIPE_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpupipe"
    except RuntimeError:
        return Path(_process_folder().name)


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, to which nobody else can write."""
    return tempfile.TemporaryDirectory(prefix="gpupipe-")
