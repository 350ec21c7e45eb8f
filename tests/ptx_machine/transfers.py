"""Instructions that move values between registers and memory, and those that order such moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx_machine.machine import WARP, Array, Machine, Mask, executes
from ptx_machine.program import TYPES, Address, Instruction, PtxError, Symbol, Vector


def lanes_of(machine: Machine, mask: Mask) -> Array:
    """The threads that take part."""
    return machine.lane if mask is None else np.flatnonzero(mask).astype(np.int32)


def addresses_of(machine: Machine, operand: Address, lanes: Array, dtype: np.dtype[Any]) -> Array:
    """The addresses of these threads, in 64 bits, so that they do not wrap around."""
    base = np.broadcast_to(machine.read(operand.base, dtype), machine.lanes)
    return base[lanes].astype(np.int64) + operand.offset


def _places(machine: Machine, instruction: Instruction, lanes: Array, operand: Address, width: int) -> Array:
    """The places in shared memory."""
    addresses = addresses_of(machine, operand, lanes, TYPES["u32"])
    if machine.counts is not None:
        machine.counts.count_shared(".".join(instruction.opcode), lanes, addresses, width)
    return machine.shared.places(lanes, addresses, width)


def _count_sectors(machine: Machine, instruction: Instruction, lanes: Array, addresses: Array, width: int) -> None:
    if machine.counts is not None:
        machine.counts.count_sectors(".".join(instruction.opcode), lanes, addresses, width)


def _registers(operand: Any) -> tuple[Any, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


@executes("ld")
def _load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    space, dtype, lanes = instruction.opcode[1], instruction.dtype, lanes_of(machine, mask)
    if space == "param":
        if not isinstance(source.base, Symbol) or source.offset:
            raise PtxError("a part of a parameter")
        machine.write(to, machine.arguments[source.base.name].view(dtype), mask)
        return
    registers = _registers(to)
    if space == "global":
        addresses = addresses_of(machine, source, lanes, TYPES["u64"])
        _count_sectors(machine, instruction, lanes, addresses, dtype.itemsize * len(registers))
        values = machine.memory.load(machine, addresses, lanes, dtype, len(registers))
    elif space.startswith("shared"):
        width = dtype.itemsize * len(registers)
        places = _places(machine, instruction, lanes, source, width)
        values = machine.shared.read(lanes, places, width).view(dtype)
    else:
        raise PtxError(f"memory of kind {space}")
    for i, register in enumerate(registers):
        loaded = np.zeros(machine.lanes, dtype)
        loaded[lanes] = values[:, i]
        machine.write(register, loaded, mask)


@executes("st")
def _store(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    space, dtype, lanes = instruction.opcode[1], instruction.dtype, lanes_of(machine, mask)
    columns = [np.broadcast_to(machine.read(one, dtype), machine.lanes)[lanes] for one in _registers(source)]
    values = np.stack(columns, axis=1)
    if space == "global":
        addresses = addresses_of(machine, to, lanes, TYPES["u64"])
        _count_sectors(machine, instruction, lanes, addresses, dtype.itemsize * values.shape[1])
        machine.memory.store(machine, addresses, lanes, values)
    elif space.startswith("shared"):
        width = dtype.itemsize * values.shape[1]
        places = _places(machine, instruction, lanes, to, width)
        machine.shared.write(lanes, places, values.view(np.uint8))
    else:
        raise PtxError(f"memory of kind {space}")


@executes("cp")
def _copy(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """``cp.async``: asynchronous copies from global to shared memory; groups of them are waited for in order."""
    what = instruction.opcode[2]
    if what == "commit_group":
        machine.copies.append(machine.copies_begun)
        machine.copies_begun = []
        return
    if what == "wait_group":
        kept = max(len(machine.copies) - int(instruction.operands[0].value(TYPES["s32"])), 0)
        done, machine.copies = machine.copies[:kept], machine.copies[kept:]
        for lanes, places, width in (copy for group in done for copy in group):
            machine.shared.finish_copy(lanes, places, width)
        return
    to, source, size, *given = instruction.operands
    lanes, width = lanes_of(machine, mask), int(size.value(TYPES["s32"]))
    wanted = machine.read(given[0], TYPES["u32"]) if given else np.uint32(width)
    wanted = np.broadcast_to(wanted, machine.lanes)[lanes]
    values = np.zeros((len(lanes), width), np.uint8)
    if not np.isin(wanted, (0, width)).all():
        raise PtxError("a copy of a part of its width")
    some = wanted > 0
    if some.any():
        addresses = addresses_of(machine, source, lanes[some], TYPES["u64"])
        _count_sectors(machine, instruction, lanes[some], addresses, width)
        loaded = machine.memory.load(machine, addresses, lanes[some], np.dtype("u4"), width // 4)
        values[some] = np.ascontiguousarray(loaded).view(np.uint8)
    places = _places(machine, instruction, lanes, to, width)
    machine.shared.start_copy(lanes, places, values)
    machine.copies_begun.append((lanes, places, width))


@executes("bar")
def _warp_barrier(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """``bar.warp.sync``; the block's barrier is handled by :meth:`Machine.run`."""
    machine.shared.pass_warp_barrier(machine.whole_warps(mask))


@executes("fence")
def _fence(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    if instruction.opcode[1:3] != ("proxy", "async"):
        raise PtxError("a fence that is none of the asynchronous proxy")
    machine.shared.fence(lanes_of(machine, mask))


# ── matrices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(machine: Machine, instruction: Instruction, address: Address, count: int, mask: Mask) -> tuple[Array, Array]:
    """The threads that give the row addresses of ``count`` 8×8 matrices, 8 each, and the rows' places."""
    warps = machine.whole_warps(mask)
    lanes = (warps[:, None] * WARP + np.arange(8 * count)).ravel().astype(np.int32)
    return lanes, _places(machine, instruction, lanes, address, 16)


@executes("ldmatrix")
def _load_matrices(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """A lane (g, d) gets columns 2d and 2d + 1 of row g; transposed, rows 2d and 2d + 1 of column g."""
    to, source = instruction.operands
    count = len(to.parts)
    lanes, places = _rows(machine, instruction, source, count, mask)
    rows = machine.shared.read(lanes, places, 16).view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in instruction.opcode:
        rows = rows.swapaxes(2, 3)
    pairs = np.ascontiguousarray(rows).view(np.uint32)  # (warps, count, g, d)
    warps = machine.whole_warps(mask)
    for i, register in enumerate(to.parts):
        loaded = np.zeros((machine.lanes // WARP, WARP), np.uint32)
        loaded[warps] = pairs[:, i].reshape(-1, WARP)
        machine.write(register, loaded.ravel(), mask)


@executes("stmatrix")
def _store_matrices(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """The opposite of ``ldmatrix``."""
    to, source = instruction.operands
    count = len(source.parts)
    warps = machine.whole_warps(mask)
    held = [np.broadcast_to(machine.read(one, TYPES["b32"]), machine.lanes) for one in source.parts]
    pairs = np.stack([one.reshape(-1, 8, 4)[warps] for one in held], axis=1)  # (warps, count, g, d)
    rows = np.ascontiguousarray(pairs).view(np.uint16)
    if "trans" in instruction.opcode:
        rows = np.ascontiguousarray(rows.swapaxes(2, 3))
    lanes, places = _rows(machine, instruction, to, count, mask)
    machine.shared.write(lanes, places, rows.reshape(len(lanes), 8).view(np.uint8))
