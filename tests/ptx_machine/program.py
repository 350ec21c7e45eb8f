"""The text of a compiled kernel, in NVIDIA's PTX, as instructions that a machine can execute.

The language is that of the PTX ISA manual (docs.nvidia.com/cuda/parallel-thread-execution), as far as Triton writes it:
one entry function, no calls, no nested scopes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

TYPES: dict[str, np.dtype[Any]] = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
TYPES |= {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)} | {"pred": np.dtype(bool)}
TYPES["bf16"] = np.dtype(ml_dtypes.bfloat16)
TYPES |= {f"{name}x2": TYPES[name] for name in ("f16", "bf16", "s16", "u16")}
"""By PTX's name; for a pair that is packed into 32 bits, the type of one element."""


FLOATS = {TYPES[name] for name in ("f16", "bf16", "f32", "f64")}


class PtxError(Exception):
    """A kernel does what PTX leaves undefined, or what this machine does not know."""


@dataclass(frozen=True)
class Register:
    """A register, or one of the read-only ones (``%tid.x``)."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number in the text."""

    text: str

    def value(self, dtype: np.dtype[Any]) -> Any:
        """The number as ``dtype``, or the bits if the text gives bits."""
        if self.text.startswith(("0f", "0F", "0d", "0D")):
            return np.array(int(self.text[2:], 16), f"u{dtype.itemsize}").view(dtype)[()]
        number = int(self.text.rstrip("U"), 0)
        if dtype.kind == "b":
            return np.bool_(number)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.array(number % (1 << 8 * dtype.itemsize), unsigned).view(dtype)[()]


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter, of shared memory or of a label; ``_`` discards a result."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, …}``."""

    parts: tuple[Any, ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: split at its dots: ``("ld", "global", "v4", "b32")``.
        predicate: the register that says which threads take part, and whether it is negated.
        line: where it stands in the text, from 1.
    """

    opcode: tuple[str, ...]
    operands: tuple[Any, ...]
    predicate: tuple[Register, bool] | None
    line: int
    text: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that the last part of the opcode names."""
        return TYPES[self.opcode[-1]]

    def __str__(self) -> str:
        return f"line {self.line}, {self.text}"


@dataclass(frozen=True)
class Program:
    """An entry function.

    Attributes:
        name: its own.
        parameters: name → type, in order.
        registers: prefix of a register's name → its type.
        labels: → index of the instruction that follows.
    """

    name: str
    parameters: dict[str, np.dtype[Any]]
    registers: dict[str, np.dtype[Any]]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@functools.cache
def parse(text: str) -> Program:
    """The one entry function in ``text``; each text is parsed once, and nobody changes what comes out.

    Raises:
        PtxError: it holds what this reader does not know.
    """
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*\{", text)
    if entry is None:
        raise PtxError("no .entry in the text")
    parameters = {
        name: TYPES[kind]
        for kind, name in re.findall(r"\.param\s+\.(\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+(\w+)", entry.group(2))
    }
    registers: dict[str, np.dtype[Any]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, statement in _statements(text, entry.end()):
        if label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label.group(1)] = len(instructions)
        elif declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+?)<\d+>", statement):
            registers[declared.group(2)] = TYPES[declared.group(1)]
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, line))
    return Program(entry.group(1), parameters, registers, tuple(instructions), labels)


def _statements(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Line and text of each statement of the function whose body begins at ``start``: Triton writes one per line."""
    for line, statement in enumerate(text[start:].splitlines(), 1 + text.count("\n", 0, start)):
        if statement.strip() == "}":
            return
        for one in statement.split(";"):
            if one.strip():
                yield line, one.strip()
    raise PtxError("the function does not end")


def _instruction(statement: str, line: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if found is None:
        raise PtxError(f"line {line}: {statement!r} is no instruction")
    negated, predicate, opcode, operands = found.groups()
    return Instruction(
        tuple(opcode.replace("::", "_").split(".")),
        tuple(_operand(one) for one in _split(operands)),
        (Register(predicate), bool(negated)) if predicate else None,
        line,
        statement,
    )


def _split(operands: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    return [one.strip() for one in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands) if one.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(one) for one in _split(text[1:-1])))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(Register(base) if base.startswith("%") else Symbol(base), int(offset or "0", 0))
    if text.startswith("%"):
        return Register(text)
    return Immediate(text) if re.match(r"-?\d", text) else Symbol(text)
