"""Instructions on registers alone."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ptx_machine.machine import WARP, Machine, Mask, executes
from ptx_machine.program import FLOATS, TYPES, Instruction, PtxError, Vector

WIDER = {np.dtype(f"{kind}{size}"): np.dtype(f"{kind}{2 * size}") for kind in "iu" for size in (1, 2, 4)}

BITS = {"b": "u", "u": "u", "s": "i"}

COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge, "equ": operator.eq, "neu": operator.ne,
    "ltu": operator.lt, "leu": operator.le, "gtu": operator.gt, "geu": operator.ge,
}  # fmt: skip
"""With floats, those that end in u also hold if an operand is NaN."""

UNORDERED = {"equ", "neu", "ltu", "leu", "gtu", "geu"}


def _inputs(machine: Machine, instruction: Instruction, dtype: np.dtype[Any] | None = None) -> list[Any]:
    """The values of all operands but the first; pairs as shape (threads, 2)."""
    read = machine.read_pair if instruction.opcode[-1].endswith("x2") else machine.read
    return [read(one, dtype or instruction.dtype) for one in instruction.operands[1:]]


def _put(machine: Machine, instruction: Instruction, values: Any, mask: Mask) -> None:
    machine.write(instruction.operands[0], values, mask)


# ── moves ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@executes("mov")
def _move(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    if isinstance(to, Vector):
        whole = np.broadcast_to(machine.read(source, instruction.dtype), machine.lanes)
        parts = np.ascontiguousarray(whole).view(f"u{whole.itemsize // len(to.parts)}").reshape(machine.lanes, -1)
        for i, one in enumerate(to.parts):
            machine.write(one, parts[:, i].copy(), mask)
    elif isinstance(source, Vector):
        narrow = np.dtype(f"u{instruction.dtype.itemsize // len(source.parts)}")
        parts = [np.broadcast_to(machine.read(one, narrow), machine.lanes) for one in source.parts]
        machine.write(to, np.stack(parts, axis=1), mask)
    else:
        machine.write(to, machine.read(source, instruction.dtype), mask)


@executes("selp")
def _select(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    _, yes, no, condition = instruction.operands
    held = machine.read(condition, TYPES["pred"])
    _put(machine, instruction, np.where(held, *(machine.read(one, instruction.dtype) for one in (yes, no))), mask)


@executes("setp")
def _compare(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    if len(instruction.opcode) != 3 or len(instruction.operands) != 3:
        raise PtxError("a comparison that is combined with another")
    comparison = instruction.opcode[1]
    a, b = _inputs(machine, instruction)
    holds = COMPARISONS[comparison](a, b)
    if instruction.dtype.kind == "f":  # with NaN, numpy's comparisons are all false but ne
        neither = np.isnan(a) | np.isnan(b)
        holds = (holds | neither) if comparison in UNORDERED else (holds & ~neither)
    _put(machine, instruction, holds, mask)


@executes("shfl")
def _shuffle(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    _, source, place, clamp, members = instruction.operands
    if instruction.opcode[2] != "idx" or clamp.text != "31" or members.text != "-1":
        raise PtxError("a shuffle that is none of whole warps by index")
    machine.whole_warps(mask)
    values = np.broadcast_to(machine.read(source, TYPES["b32"]), machine.lanes)
    lane = np.broadcast_to(machine.read(place, TYPES["u32"]), machine.lanes)
    _put(machine, instruction, values[machine.lane // WARP * WARP + lane % WARP], mask)


@executes("prmt")
def _permute_bytes(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    a, b, selection = (
        np.broadcast_to(machine.read(one, TYPES["b32"]), machine.lanes) for one in instruction.operands[1:]
    )
    choices = np.stack([a, b], axis=1).view(np.uint8).reshape(machine.lanes, 8)
    result = np.empty((machine.lanes, 4), np.uint8)
    for i in range(4):
        chosen = selection >> np.uint32(4 * i) & np.uint32(15)
        byte = np.take_along_axis(choices, (chosen & np.uint32(7)).astype(np.int64)[:, None], axis=1)[:, 0]
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)
        result[:, i] = np.where(chosen & np.uint32(8), sign, byte)
    _put(machine, instruction, result.view(np.uint32)[:, 0], mask)


# ── integers and floats ───────────────────────────────────────────────────────────────────────────────────────────────


@executes("add", "sub", "min", "max")
def _two(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    function = {"add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax}[instruction.opcode[0]]
    _put(machine, instruction, function(*_inputs(machine, instruction)), mask)


@executes("neg", "abs", "not")
def _one(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    function = {"neg": np.negative, "abs": np.abs, "not": np.invert}[instruction.opcode[0]]
    _put(machine, instruction, function(*_inputs(machine, instruction)), mask)


@executes("and", "or", "xor")
def _bitwise(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instruction.opcode[0]]
    _put(machine, instruction, function(*_inputs(machine, instruction)), mask)


@executes("shl", "shr")
def _shift(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """A shift by more than the number of bits leaves none of them."""
    value = machine.read(instruction.operands[1], instruction.dtype)
    bits = value.itemsize * 8
    by = machine.read(instruction.operands[2], TYPES["u32"])
    most = np.minimum(by, bits - 1).astype(value.dtype)
    if instruction.opcode[0] == "shl":
        result = np.where(by < bits, np.left_shift(value, most), np.zeros((), value.dtype))
    else:
        result = np.right_shift(value, most)
        if value.dtype.kind == "u":
            result = np.where(by < bits, result, np.zeros((), value.dtype))
    _put(machine, instruction, result, mask)


@executes("shf")
def _funnel_shift(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """32 of the 64 bits ``b:a``: the upper ones after a shift to the left, the lower ones after one to the right."""
    if instruction.opcode[2] != "wrap":
        raise PtxError("a funnel shift that does not wrap its amount")
    low, high = (np.asarray(machine.read(one, TYPES["u32"]), np.uint64) for one in instruction.operands[1:3])
    by = np.asarray(machine.read(instruction.operands[3], TYPES["u32"]), np.uint64) % np.uint64(32)
    both = high << np.uint64(32) | low
    shifted = (both << by) >> np.uint64(32) if instruction.opcode[1] == "l" else both >> by
    _put(machine, instruction, (shifted & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)


def _product(machine: Machine, instruction: Instruction) -> Any:
    """The part that the opcode names of the second and third operand's product; all of it for ``wide``."""
    a, b = (machine.read(one, instruction.dtype) for one in instruction.operands[1:3])
    part = instruction.opcode[1]
    if part == "lo":
        return np.multiply(a, b)
    wide = WIDER.get(instruction.dtype)
    if wide is None:
        raise PtxError("the upper half of a product of 64 bits")
    product = np.multiply(a.astype(wide), b.astype(wide))
    return product if part == "wide" else (product >> wide.type(8 * instruction.dtype.itemsize)).astype(a.dtype)


@executes("mul")
def _multiply(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    if instruction.dtype.kind == "f":
        _put(machine, instruction, np.multiply(*_inputs(machine, instruction)), mask)
    else:
        _put(machine, instruction, _product(machine, instruction), mask)


@executes("mad")
def _multiply_add(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    product = _product(machine, instruction)
    _put(machine, instruction, np.add(product, machine.read(instruction.operands[3], product.dtype)), mask)


@executes("fma")
def _fused_multiply_add(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Computed in double precision, which holds products exactly, and then rounded."""
    a, b, c = (np.asarray(one).astype(np.float64) for one in _inputs(machine, instruction))
    result = a * b + c
    if "relu" in instruction.opcode:
        result = np.fmax(result, 0.0)
    _put(machine, instruction, result.astype(instruction.dtype), mask)


@executes("div", "rem")
def _divide(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    a, b = _inputs(machine, instruction)
    if instruction.dtype.kind == "f":
        _put(machine, instruction, np.divide(a, b), mask)
        return
    if instruction.dtype.kind != "i" or instruction.opcode[0] == "rem" or (np.asarray(b) == 0).any():
        raise PtxError("a division by zero, or one that is not of signed integers")
    quotient = np.abs(a.astype(np.int64)) // np.abs(np.asarray(b).astype(np.int64))
    _put(machine, instruction, (np.sign(a) * np.sign(b) * quotient).astype(a.dtype), mask)  # towards zero


@executes("rcp")
def _reciprocal(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    _put(machine, instruction, np.reciprocal(*_inputs(machine, instruction)), mask)


@executes("ex2")
def _power_of_two(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    _put(machine, instruction, np.exp2(*_inputs(machine, instruction)), mask)


# ── bit fields ────────────────────────────────────────────────────────────────────────────────────────────────────────


@executes("bfe")
def _extract_bits(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    _, source, start, length = instruction.operands
    first, count = int(start.value(TYPES["s32"])), int(length.value(TYPES["s32"]))
    if not 0 < count <= 32 - first:
        raise PtxError("bits outside of the register")
    value = machine.read(source, instruction.dtype)
    shifted = np.left_shift(value, value.dtype.type(32 - first - count))
    _put(machine, instruction, np.right_shift(shifted, value.dtype.type(32 - count)), mask)


@executes("bfi")
def _insert_bits(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    _, source, into, start, length = instruction.operands
    first, count = int(start.value(TYPES["s32"])), int(length.value(TYPES["s32"]))
    field = np.uint32((1 << count) - 1 << first & 0xFFFFFFFF)
    a, b = (machine.read(one, TYPES["b32"]) for one in (source, into))
    _put(machine, instruction, (np.left_shift(a, np.uint32(first)) & field) | (b & ~field), mask)


# ── conversions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@executes("cvt")
def _convert(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    *how, to, source = instruction.opcode[1:]
    if unknown := set(how) - {"rn", "rzi", "relu"}:
        raise PtxError(f"a conversion by {unknown}")
    if to in ("f16x2", "bf16x2"):  # the first operand becomes the upper half
        upper, lower = (machine.read(one, TYPES[source]) for one in instruction.operands[1:])
        values: Any = np.stack(np.broadcast_arrays(lower, upper), axis=1)
    else:
        values = machine.read(instruction.operands[1], TYPES[source])
    if "relu" in how:
        values = np.fmax(values, 0.0)
    wanted = TYPES[to]
    if wanted not in FLOATS and np.asarray(values).dtype in FLOATS:
        if "rzi" not in how:
            raise PtxError("a float becomes an integer by no rounding that is known here")
        limits = np.iinfo(wanted)
        whole = np.trunc(np.nan_to_num(np.asarray(values, np.float64), nan=0.0))
        values = np.clip(whole, limits.min, limits.max)
    _put(machine, instruction, np.asarray(values).astype(wanted), mask)
