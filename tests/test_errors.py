"""Error messages are one line, whatever another library raised."""

from __future__ import annotations

import pytest

from gpupipe.errors import InputError, first_line, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no such format\nCall stack:\n …"), "no such format"),
        (RuntimeError(" \n"), "RuntimeError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_first_line_of_an_error_or_its_type(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a.npy: is empty;\n expected rows"), "a.npy: is empty; expected rows"),
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_errors_in_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
