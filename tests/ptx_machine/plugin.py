"""A pytest plugin: Triton's kernels are compiled and executed by the machine, not by Triton's interpreter.

``PTX_MACHINE=90 python -m pytest -p ptx_machine.plugin tests/test_….py``, with ``tests`` on ``PYTHONPATH``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # before triton is first imported


@pytest.fixture(scope="session", autouse=True)
def ptx_machine() -> Iterator[None]:
    from ptx_machine.launch import machine

    with machine(int(os.environ["PTX_MACHINE"])):
        yield
