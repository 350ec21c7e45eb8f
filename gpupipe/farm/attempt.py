"""Errors as values: what is wrong with one job stops no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from gpupipe.errors import DeviceLostError, DiskFullError, one_line

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failed:
    """Why something failed, in one line."""

    error: str


def attempt(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | Failed:
    """What a call returns, or why it failed.

    Raises:
        DiskFullError: there is no room, for this job or any other.
        DeviceLostError: the GPU does nothing more, for this job or any other.
    """
    try:
        return function(*args, **kwargs)
    except (DiskFullError, DeviceLostError):
        raise
    except Exception as error:
        return Failed(one_line(error))
