"""Executes a compiled kernel's PTX on the CPU, all threads of several blocks abreast.

A register is an array with an element for each thread, an instruction a few numpy operations. Threads that diverge
continue in groups, the one that is furthest behind first, until they meet again.

It is strict: what PTX leaves undefined, so that a GPU may do it differently each time, is an error that names the
instruction (see :mod:`ptx_machine.memory` and :mod:`ptx_machine.tensor_cores`). It cannot show what the assembler does
to the PTX afterwards, nor a kernel's speed.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_machine.memory import Buffer, Global, Shared
from ptx_machine.program import FLOATS, Immediate, Instruction, Program, PtxError, Register, Symbol, parse

WARP = 32

BLOCKS_ABREAST = 32
"""Blocks that are executed together: enough to make numpy's overhead small, few enough to hold their shared memory."""

Array = np.ndarray[Any, np.dtype[Any]]
Mask = Array | None
"""Which threads take part in an instruction; None is all."""

Handler = Callable[["Machine", Instruction, Mask], None]

HANDLERS: dict[str, Handler] = {}
"""Handlers by the first part of the opcode; the modules of instructions add theirs."""


def executes(*opcodes: str) -> Callable[[Handler], Handler]:
    """Declares what executes instructions that begin with ``opcodes``."""

    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return add


@dataclass(eq=False)
class Group:
    """Threads that stand at the same instruction.

    Attributes:
        place: the instruction's index.
        waits: whether they are at a barrier, waiting for the rest of the block.
    """

    place: int
    mask: Mask
    waits: bool = False


@dataclass
class Counts:
    """What a launch executed, by opcode.

    Attributes:
        instructions: warp instructions.
        shared, fewest_shared: passes through shared memory's banks, and the fewest possible for as many words.
        sectors, fewest_sectors: 32-byte sectors of global memory that warp instructions touched, and the fewest
            possible for as many bytes.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    shared: Counter[str] = field(default_factory=Counter)
    fewest_shared: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    fewest_sectors: Counter[str] = field(default_factory=Counter)

    def count_shared(self, opcode: str, lanes: Array, addresses: Array, width: int) -> None:
        """32 banks of 4 bytes; of 8 and 16 bytes a thread, half and a quarter of a warp are served at a time."""
        words = max(width // 4, 1)
        together = lanes // (WARP // words)
        word = addresses[:, None] // 4 + np.arange(words)
        pairs = np.stack(np.broadcast_arrays(together[:, None], word), axis=-1).reshape(-1, 2)
        touched = np.unique(pairs, axis=0)
        _, group = np.unique(touched[:, 0], return_inverse=True)
        banks = np.bincount(group * 32 + touched[:, 1] % 32, minlength=32 * (group.max() + 1)).reshape(-1, 32)
        self.shared[opcode] += int(banks.max(axis=1).sum())
        self.fewest_shared[opcode] += int((-(-banks.sum(axis=1) // 32)).sum())

    def count_sectors(self, opcode: str, lanes: Array, addresses: Array, width: int) -> None:
        """Each thread's aligned access of up to 16 bytes lies in one sector."""
        warp = lanes // WARP
        self.sectors[opcode] += len(np.unique(np.stack([warp, addresses // 32], axis=1), axis=0))
        distinct = np.unique(np.stack([warp, addresses], axis=1), axis=0)[:, 0]
        self.fewest_sectors[opcode] += int((-(-np.bincount(distinct) * width // 32)).sum())


class Machine:
    """Blocks of a launch, side by side.

    Args:
        program: what they execute.
        grid: the launch's blocks.
        blocks: which of them these are.
        threads: of a block.
        shared_bytes: of a block.
        memory: what pointers may point to.
        arguments: values of the program's parameters.
        counts: to which executed instructions are added.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        blocks: range,
        *,
        threads: int,
        shared_bytes: int,
        memory: Global,
        arguments: Sequence[int | float],
        counts: Counts | None = None,
    ) -> None:
        if threads % WARP:
            raise PtxError(f"{threads} threads a block; expected whole warps")
        if len(arguments) != len(program.parameters):
            raise PtxError(f"{len(arguments)} arguments; {program.name} takes {len(program.parameters)}")
        self.program, self.memory, self.counts = program, memory, counts
        self.threads, self.lanes = threads, threads * len(blocks)
        self.lane = np.arange(self.lanes, dtype=np.int32)
        self.warp, self.block = self.lane // WARP, self.lane // threads
        self.thread_of_launch = self.lane + blocks.start * threads
        self.shared = Shared(len(blocks), threads, shared_bytes)
        numbers = np.arange(blocks.start, blocks.stop)[self.block]
        self.special = {
            "%tid.x": self.lane % threads,
            "%ctaid.x": numbers % grid[0],
            "%ctaid.y": numbers // grid[0] % grid[1],
            "%ctaid.z": numbers // (grid[0] * grid[1]),
        }
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.arguments = {
            name: np.array(value, dtype)
            for (name, dtype), value in zip(program.parameters.items(), arguments, strict=True)
        }
        self.registers: dict[str, Array] = {}
        self.in_flight: dict[str, Instruction] = {}  # registers that an asynchronous product is writing
        self.copies_begun: list[Any] = []  # asynchronous work: not yet committed, and in committed groups
        self.copies: list[list[Any]] = []
        self.products_begun: list[Any] = []
        self.products: list[list[Any]] = []
        self._groups = [Group(0, None)]

    # ── registers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, operand: Any, dtype: np.dtype[Any]) -> Any:
        """An operand's values as ``dtype``, one for each thread or one for all; of a wider register the lower bits."""
        if isinstance(operand, Immediate):
            return operand.value(dtype)
        if isinstance(operand, Symbol):
            return np.zeros((), dtype)[()]  # the beginning of shared memory
        held = self.special.get(operand.name)
        if held is None:
            if operand.name in self.in_flight:
                raise PtxError(f"{operand.name} is read before it is waited for: {self.in_flight[operand.name]}")
            held = self.registers.get(operand.name)
            if held is None:  # legal: the compiler fills words with unused bytes
                held = self._poison(operand)
        if held.itemsize > dtype.itemsize:
            held = held.astype(f"u{dtype.itemsize}")
        return held if held.dtype == dtype else held.view(dtype)

    def read_pair(self, operand: Any, dtype: np.dtype[Any]) -> Any:
        """The two values that 32 bits hold, the lower one first: shape (threads, 2)."""
        values = np.broadcast_to(self.read(operand, np.dtype("u4")), self.lanes)
        return np.ascontiguousarray(values).view(dtype).reshape(self.lanes, 2)

    def write(self, operand: Any, values: Any, mask: Mask) -> None:
        """Write a register: a value for each thread or one for all, extended by its own sign if narrower."""
        if isinstance(operand, Symbol):
            return
        dtype = self._dtype(operand)
        if operand.name in self.in_flight:
            raise PtxError(f"{operand.name} is written before it is waited for: {self.in_flight[operand.name]}")
        values = np.asarray(values)
        if values.ndim == 2:
            values = np.ascontiguousarray(values).view(dtype)[:, 0]
        if values.itemsize < dtype.itemsize:
            if values.dtype in FLOATS:
                values = values.view(f"u{values.itemsize}")
            values = values.astype(f"{values.dtype.kind}{dtype.itemsize}")
        if values.ndim == 0:
            values = np.full(self.lanes, values)
        values = values.view(dtype)
        if mask is not None:
            held = self.registers.get(operand.name)
            if held is None:
                held = self._poison(operand)
            values = np.where(mask, values, held)
        self.registers[operand.name] = values

    def _dtype(self, register: Register) -> np.dtype[Any]:
        return self.program.registers[register.name.rstrip("0123456789")]

    def _poison(self, register: Register) -> Array:
        """What an unwritten register holds: all bits set, which is NaN as a float and an invalid address."""
        return np.full(self.lanes, -1).astype(self._dtype(register))

    def whole_warps(self, mask: Mask) -> Array:
        """Indices of the warps that take part in an instruction that a warp must execute together."""
        if mask is None:
            return np.arange(self.lanes // WARP)
        warps = mask.reshape(-1, WARP)
        some = warps.any(axis=1)
        if (some != warps.all(axis=1)).any():
            raise PtxError("only some threads of a warp take part in what it has to do as one")
        return np.flatnonzero(some)

    # ── execution ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Execute to the end.

        Raises:
            PtxError: an instruction does what PTX leaves undefined, or is not known here.
        """
        while self._groups:
            ready = [group for group in self._groups if not group.waits]
            if not ready:
                self._pass_barrier()
                continue
            place = min(group.place for group in ready)
            group = self._merged([one for one in ready if one.place == place])
            others = [one.place for one in ready if one.place != place]
            self._advance(group, min(others, default=len(self.program.instructions)))

    def _merged(self, groups: list[Group]) -> Group:
        first, *others = groups
        for other in others:
            assert first.mask is not None and other.mask is not None
            both = first.mask | other.mask
            first.mask = None if both.all() else both
            self._groups.remove(other)
        return first

    def _advance(self, group: Group, until: int) -> None:
        """Execute for a group until it meets others at ``until``, diverges, waits or ends."""
        instructions = self.program.instructions
        while group.place < until:
            instruction = instructions[group.place]
            mask = group.mask
            if instruction.predicate is not None:
                register, negated = instruction.predicate
                holds = self.read(register, np.dtype(bool))
                holds = ~holds if negated else holds
                mask = holds if mask is None else holds & mask
                mask = None if mask.all() else mask
            opcode = instruction.opcode[0]
            if opcode == "bra":
                self._branch(group, mask, instruction)
                return
            if opcode == "ret":
                if instruction.predicate is not None:
                    raise PtxError(f"{instruction}: a return under a condition")
                self._groups.remove(group)
                return
            if opcode == "bar" and instruction.opcode[1] == "sync":
                group.place, group.waits = group.place + 1, True
                return
            if mask is None or mask.any():
                if self.counts is not None:
                    name = ".".join(instruction.opcode)
                    self.counts.instructions[name] += self._warps(mask)
                self._execute(instruction, mask)
            group.place += 1

    def _execute(self, instruction: Instruction, mask: Mask) -> None:
        handler = HANDLERS.get(instruction.opcode[0])
        if handler is None:
            raise PtxError(f"{instruction}: not known to this machine")
        try:
            handler(self, instruction, mask)
        except PtxError as error:
            raise PtxError(f"{instruction}: {error}") from None
        except Exception as error:
            raise PtxError(f"{instruction}: {type(error).__name__}: {error}") from error

    def _warps(self, mask: Mask) -> int:
        return self.lanes // WARP if mask is None else int(mask.reshape(-1, WARP).any(axis=1).sum())

    def _branch(self, group: Group, taken: Mask, instruction: Instruction) -> None:
        target = self.program.labels[instruction.operands[0].name]
        group.place += 1
        if taken is None or (group.mask is not None and (taken == group.mask).all()):
            group.place = target
        elif taken.any():
            everyone = np.ones(self.lanes, bool) if group.mask is None else group.mask
            group.mask = everyone & ~taken
            self._groups.append(Group(target, taken))

    def _pass_barrier(self) -> None:
        """Let threads pass when all that are left wait at a barrier, each block's at the same one."""
        places = np.full(self.lanes, -1)
        for group in self._groups:
            places[slice(None) if group.mask is None else group.mask] = group.place
            group.waits = False
        of_block = places.reshape(-1, self.threads)
        if (of_block != of_block[:, :1]).any():
            raise PtxError("threads of a block wait at different barriers, or have ended before one")
        self.shared.pass_barrier()


def launch(
    ptx: str,
    grid: tuple[int, int, int],
    arguments: Sequence[int | float],
    buffers: Sequence[Buffer],
    *,
    threads: int,
    shared_bytes: int,
    counts: Counts | None = None,
    most: int | None = None,
) -> None:
    """Execute a kernel for every block of ``grid``.

    Args:
        ptx: its text.
        arguments: of its parameters, in order; pointers as addresses in ``buffers``.
        buffers: the memory that it may touch.
        threads, shared_bytes: of a block.
        counts: to which executed instructions are added.
        most: execute only so many blocks, from the middle of the grid; None executes all.

    Raises:
        PtxError: it does what PTX leaves undefined.
    """
    for name in ("arithmetic", "tensor_cores", "transfers"):
        importlib.import_module(f"ptx_machine.{name}")  # importing it adds its instructions
    program = parse(ptx)
    memory = Global([Buffer(one.start, one.data) for one in buffers])  # new ones: a graph launches these again
    blocks = grid[0] * grid[1] * grid[2]
    executed = blocks if most is None else min(most, blocks)
    begin = (blocks - executed) // 2
    end = begin + executed
    with np.errstate(all="ignore"):
        for first in range(begin, end, BLOCKS_ABREAST):
            Machine(
                program,
                grid,
                range(first, min(first + BLOCKS_ABREAST, end)),
                threads=threads,
                shared_bytes=shared_bytes,
                memory=memory,
                arguments=arguments,
                counts=counts,
            ).run()
