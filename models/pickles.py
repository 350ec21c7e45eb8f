"""How deep a pickle nests, read from its opcodes without running it.

A tuple that nests a hundred thousand times is a few bytes to a pickle, and hashing it as a key overflows the C stack:
the process ends with a signal, which no reader that is otherwise safe can catch.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

MAX_NESTING = 100
"""The deepest that is accepted; a state dict's pickle nests some five times."""

_MARK = -1
_FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
"""Opcodes that move the values above a container on the stack into it."""


def nests_too_deep(path: Path) -> bool:
    """Whether a pickle in a ``.pth`` file, a zip or the older format, nests more than :data:`MAX_NESTING` times."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _nests_too_deep(file)
    with zipfile.ZipFile(path) as members:
        for name in members.namelist():
            if name.endswith(".pkl"):
                with members.open(name) as file:
                    if _nests_too_deep(file):
                        return True
    return False


def _nests_too_deep(file: IO[bytes]) -> bool:
    """As :func:`nests_too_deep`, for pickles one after the other, up to the first bytes that are none."""
    try:
        while True:
            machine = _Depths()
            if any(machine.step(opcode, argument) > MAX_NESTING for opcode, argument, _ in pickletools.genops(file)):
                return True
    except Exception:  # the end, or no pickle, which the reader judges for itself
        return False


class _Depths:
    """The pickle machine, with the depth of each value in place of the value."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.memo: dict[int, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> int:
        """Take one opcode; returns the depth of what it makes."""
        stack, name = self.stack, opcode.name
        if name == "MARK":
            stack.append(_MARK)
            return 0
        if name.endswith("PUT") or name == "MEMOIZE":
            self.memo[argument if isinstance(argument, int) else len(self.memo)] = stack[-1]
            return 0
        if name.endswith("GET"):
            stack.append(self.memo[int(str(argument))])
            return 0
        taken: list[int] = []
        fixed = opcode.stack_before
        if pickletools.markobject in fixed:
            while (top := stack.pop()) != _MARK:
                taken.append(top)
            fixed = fixed[: fixed.index(pickletools.markobject)]
        taken += [stack.pop() for _ in fixed]
        if name == "DUP":
            made = taken[0]
        elif name in _FILLING:
            made = max([taken[-1], *(1 + depth for depth in taken[:-1])])
        else:
            made = 1 + max(taken) if taken else 0
        stack.extend([made] * len(opcode.stack_after))
        return made
