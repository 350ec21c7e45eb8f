"""Products of matrices: by a warp, and asynchronously by a warpgroup.

Layouts are those of the PTX ISA manual, "Matrix Fragments for mma.m16n8k16", "Register Fragments and Shared Memory
Matrix Layouts" and "Matrix Descriptor" of wgmma.

Errors, besides those of shared memory:

* registers of an asynchronous product are touched before it is waited for;
* shared memory changes while it runs.

A missing ``wgmma.fence`` after operands in registers are written is not checked: the assembler inserts it with a
warning (C7519).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_machine.machine import WARP, Array, Machine, Mask, executes
from ptx_machine.program import TYPES, Immediate, Instruction, PtxError, Vector

WARPS = 4
"""Warps of a warpgroup."""

_FACTORS = ("f16", "bf16")

SWIZZLES = {1: 128, 2: 64, 3: 32}
"""A descriptor's swizzle mode → bytes that are permuted together."""


def _held(machine: Machine, operand: Vector, dtype: np.dtype[Any]) -> Array:
    """Registers' values, shape (registers, threads), of pairs (registers, threads, 2)."""
    if dtype.itemsize == 2:
        return np.stack([machine.read_pair(one, dtype) for one in operand.parts])
    return np.stack([np.broadcast_to(machine.read(one, dtype), machine.lanes) for one in operand.parts])


def _left(machine: Machine, operand: Vector, dtype: np.dtype[Any]) -> Array:
    """A 16×16 left operand of each warp: lane (g, d) holds rows g, g + 8 and columns 2d, 2d + 1, and these + 8."""
    held = _held(machine, operand, dtype).reshape(2, 2, -1, 8, 4, 2)  # half of columns, of rows; warp, g, d, c
    return held.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16).astype(np.float32)


@executes("mma")
def _warp_product(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    *shape, sum_type, kind, other, _ = instruction.opcode[3:]
    if shape != ["m16n8k16", "row", "col"] or sum_type != "f32" or kind not in _FACTORS or other != kind:
        raise PtxError("a product of other shapes or types")
    warps = machine.whole_warps(mask)
    to, a, b, c = instruction.operands
    left = _left(machine, a, TYPES[kind])[warps]
    right = _held(machine, b, TYPES[kind]).reshape(2, -1, 8, 4, 2)  # half of depths; warp, g, d, c
    right = right.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)[warps].astype(np.float32)
    sums = _held(machine, c, TYPES["f32"]).reshape(2, 2, -1, 8, 4)  # half of rows, c; warp, g, d
    sums = sums.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)[warps] + left @ right
    parts = sums.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, len(warps), WARP)
    for register, values in zip(to.parts, parts, strict=True):
        whole = np.zeros((machine.lanes // WARP, WARP), np.float32)
        whole[warps] = values
        machine.write(register, whole.ravel(), mask)


# ── warpgroups ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Product:
    """An asynchronous product that is not yet waited for: what it writes, and what must not change meanwhile."""

    registers: tuple[str, ...]
    places: list[Array]
    seen: list[Array]


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory, as PTX describes it in 64 bits: arrays with an element for each warpgroup."""

    start: Array
    leading: Array
    stride: Array
    swizzle: int

    @classmethod
    def of(cls, bits: Array) -> Descriptor:
        """Decode the 64 bits."""
        modes = np.unique(bits >> np.uint64(62))
        if len(modes) != 1 or (bits >> np.uint64(49) & np.uint64(7)).any():
            raise PtxError("descriptors of several kinds, or with a base offset")

        def field(first: int) -> Array:
            return (bits >> np.uint64(first) & np.uint64(0x3FFF)).astype(np.int64) << 4

        return cls(field(0), field(16), field(32), int(modes[0]))

    def addresses(self, rows: int, depth: int, *, transposed: bool) -> Array:
        """Addresses of a matrix' 16-bit values, shape (warpgroups, rows, depth); rows lie along M or N."""
        row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        leading, stride = self.leading[:, None, None], self.stride[:, None, None]
        width = SWIZZLES.get(self.swizzle)
        if width is None:
            if transposed:
                raise PtxError("a matrix with neither swizzling nor depth along its rows")
            places = row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
        elif transposed:
            across = width // 2
            places = row // across * leading + k // 8 * stride + k % 8 * width + row % across * 2
        else:
            places = row // 8 * stride + row % 8 * width + k * 2
        places = self.start[:, None, None] + places
        return places if width is None else places ^ (places >> 3 & width - 16)


@executes("wgmma")
def _warpgroup(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    warps = machine.whole_warps(mask).reshape(-1, WARPS)
    if (warps[:, 0] % WARPS).any() or (np.diff(warps, axis=1) != 1).any():
        raise PtxError("some warps of a warpgroup take part, and some do not")
    what = instruction.opcode[1]
    if what == "fence":
        return
    if what == "commit_group":
        machine.products.append(machine.products_begun)
        machine.products_begun = []
    elif what == "wait_group":
        kept = max(len(machine.products) - int(instruction.operands[0].value(TYPES["s32"])), 0)
        done, machine.products = machine.products[:kept], machine.products[kept:]
        for product in (one for group in done for one in group):
            _finish(machine, product)
    elif what == "mma_async":
        _begin(machine, instruction, warps[:, 0])
    else:
        raise PtxError("not known to this machine")


def _begin(machine: Machine, instruction: Instruction, first_warps: Array) -> None:
    shape = re.fullmatch(r"m64n(\d+)k16", instruction.opcode[4])
    sum_type, kind, other = instruction.opcode[5:]
    if shape is None or sum_type != "f32" or kind not in _FACTORS or other != kind:
        raise PtxError("a product of other shapes or types")
    if 4 * WARP * len(first_warps) != machine.lanes:
        raise PtxError("not all warpgroups take part")
    to, a, b, add, *immediates = instruction.operands
    scale_a, scale_b, *transposed = (int(one.value(TYPES["s32"])) for one in immediates)
    if (scale_a, scale_b) != (1, 1):
        raise PtxError("a product of negated operands")
    columns = int(shape.group(1))
    names = tuple(one.name for one in to.parts)
    places: list[Array] = []

    def matrix(operand: Any, rows: int, is_transposed: bool) -> Array:
        bits = np.broadcast_to(machine.read(operand, TYPES["b64"]), machine.lanes).reshape(-1, WARPS * WARP)
        if (bits != bits[:, :1]).any():
            raise PtxError("descriptors that differ between threads of a warpgroup")
        addresses = Descriptor.of(bits[:, 0]).addresses(rows, 16, transposed=is_transposed)
        first = (first_warps * WARP).astype(np.int32)
        flat = machine.shared.places(np.repeat(first, rows * 16), addresses.ravel(), 2).reshape(len(first), -1)
        places.append(flat)
        return machine.shared.read_by_tensor_cores(first_warps, flat, TYPES[kind]).reshape(-1, rows, 16)

    if isinstance(a, Vector):
        left = _left(machine, a, TYPES[kind]).reshape(-1, 64, 16)
    else:
        left = matrix(a, 64, bool(transposed[0])).astype(np.float32)
    right = matrix(b, columns, bool(transposed[-1])).astype(np.float32)
    product = left @ right.swapaxes(1, 2)
    if isinstance(add, Immediate):
        adds = np.full(len(product), bool(add.value(TYPES["s32"])))
    else:
        adds = machine.read(add, TYPES["pred"]).reshape(-1, WARPS * WARP)[:, 0]
    if adds.any():
        held = [machine.registers[name].view(np.float32) for name in names]
        sums = np.stack(held).reshape(columns // 8, 2, 2, -1, WARPS, 8, 4)  # 8 columns, half of rows, c; group, w, g, d
        sums = sums.transpose(3, 4, 1, 5, 0, 6, 2).reshape(-1, 64, columns)
        product = np.where(adds[:, None, None], sums + product, product)
    parts = product.reshape(-1, WARPS, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    for name, values in zip(names, parts.reshape(len(names), machine.lanes), strict=True):
        machine.registers[name] = np.ascontiguousarray(values, np.float32).view(np.uint32)
        machine.in_flight[name] = instruction
    seen = [machine.shared.data[one] for one in places]
    machine.products_begun.append(Product(names, places, seen))


def _finish(machine: Machine, product: Product) -> None:
    for places, seen in zip(product.places, product.seen, strict=True):
        if (machine.shared.data[places] != seen).any():
            raise PtxError("shared memory changed under a product that read it")
    for name in product.registers:
        machine.in_flight.pop(name, None)
