"""What the LLVM kernels share: processors, and a writer of functions on vectors of floats for one of them.

A kernel is a Python function that writes an LLVM function, with all sizes as constants. LLVM allocates registers and
picks instructions; loops, tiles and what lies where are the kernel's own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

Value = Any
"""A value of the function being written: an index, a float, a vector, or LLVM's pointer."""


class _BFloat16Type(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


_FLOAT, _HALF, _BFLOAT = ir.FloatType(), ir.HalfType(), _BFloat16Type()
_BYTE = ir.IntType(8)
_TYPES = {torch.float32: _FLOAT, torch.float16: _HALF, torch.bfloat16: _BFLOAT, torch.uint8: _BYTE}
_INT32, _INDEX, _POINTER = ir.IntType(32), ir.IntType(64), ir.PointerType()
LINE = 64
"""Bytes of a cache line, on which constants and scratch memory begin."""

NAME = "kernel"
"""Of the function that is written, in each module."""

_SUMS = {torch.bfloat16: torch.float32}
"""What sums are of, where that is another type than what is multiplied."""

_TOLD_BY_TORCH = {"neon": "neon", "fp16_arith": "fullfp16"}
"""ARM's instruction sets that LLVM does not find by itself, neither of them on macOS, and float16's not on Linux: in
the words of PyTorch, which tells from 2.11 on, and of LLVM."""


@dataclass(frozen=True)
class Processor:
    """What kernels are compiled for.

    Attributes:
        name: LLVM's name of it, such as ``"sapphirerapids"`` or ``"znver4"``.
        features: its instruction sets, in LLVM's words.
        lanes: sums in one of its vector registers; 0 if it has no instructions that the kernels are written for.
        registers: how many of these it has.
        dtype: of what is multiplied, and of maps: float32, float16 or bfloat16.
    """

    name: str
    features: str
    lanes: int
    registers: int
    dtype: torch.dtype = torch.float32

    @property
    def sums(self) -> torch.dtype:
        """The type of sums, and of all else that is computed: that of what is multiplied, but for bfloat16 float32."""
        return _SUMS.get(self.dtype, self.dtype)

    @property
    def pairs(self) -> int:
        """Pairs of 16-bit floats in one of its vector registers."""
        return self.lanes * self.sums.itemsize // 4


@functools.cache
def this_processor(dtype: torch.dtype = torch.float32) -> Processor:
    """The one that this process runs on, multiplying in float32, float16 or bfloat16."""
    features = _instruction_sets()
    bits, registers, lower = 0, 0, {}
    if features.get("avx512f"):
        bits, registers, lower = 512, 32, {torch.float16: "avx512fp16", torch.bfloat16: "avx512bf16"}
    elif features.get("avx2") and features.get("fma"):
        bits, registers = 256, 16
    elif features.get("neon"):
        bits, registers, lower = 128, 32, {torch.float16: "fullfp16"}
    if dtype != torch.float32 and not features.get(lower.get(dtype, "")):
        bits = 0
    lanes = bits // (8 * _SUMS.get(dtype, dtype).itemsize)
    return Processor(llvm.get_host_cpu_name(), features.flatten(), lanes, registers, dtype)


def _instruction_sets() -> llvm.FeatureMap:
    """Those of this processor, in LLVM's words."""
    found = llvm.get_host_cpu_features()
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found.update({name: True for theirs, name in _TOLD_BY_TORCH.items() if told.get(theirs)})
    return found


@dataclass(frozen=True)
class Pointer:
    """Where floats lie, or bytes.

    Attributes:
        place: LLVM's pointer.
        dtype: of what lies there.
    """

    place: Value
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> Pointer:
        """The same place, where another type lies."""
        return replace(self, dtype=dtype)


class Writer:
    """Writes one function. It takes pointers to maps, of which those that it writes overlap no others, to its constants
    and to scratch memory.

    Attributes:
        maps: the first of these parameters, of the processor's type.
        sums: the type that is computed in.
        lanes: how many of these a register holds.
        vector: LLVM's type of that many.
        ir: what else LLVM has.
        scratch_bytes: how much scratch memory it needs.
    """

    def __init__(self, processor: Processor, maps: int) -> None:
        self.processor = processor
        self.lanes, self.sums = processor.lanes, processor.sums
        self.vector = ir.VectorType(_TYPES[self.sums], self.lanes)
        self._paired = ir.VectorType(_TYPES[processor.dtype], 2 * processor.pairs)
        self._module = ir.Module()
        self._function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), [_POINTER] * (maps + 2)), NAME)
        for pointer in self._function.args:
            pointer.add_attribute("noalias")
        *maps_, self._constants, self._scratch = self._function.args
        self.maps = [Pointer(place, processor.dtype) for place in maps_]
        self._locals = ir.IRBuilder(self._function.append_basic_block("locals"))
        self.ir = ir.IRBuilder(self._function.append_basic_block("body"))
        self._body = self.ir.block
        self.scratch_bytes = self._scratch_used = 0

    def finish(self) -> str:
        """End the function; return it in LLVM's language."""
        self.ir.ret_void()
        self._locals.branch(self._body)
        return str(self._module)

    # Memory. Offsets and strides are in floats where nothing else is said.

    def constant(self, offset: int, dtype: torch.dtype | None = None) -> Pointer:
        """A pointer to the constants, from a byte on; None means the type that is computed in."""
        return Pointer(self.byte_at(self._constants, offset), dtype or self.sums)

    def scratch(self, floats: int, dtype: torch.dtype | None = None) -> Pointer:
        """A pointer to memory of the function's own, with anything in it; None means the type that is computed in."""
        dtype = dtype or self.sums
        place = self.byte_at(self._scratch, self._scratch_used)
        size = floats * dtype.itemsize
        self._scratch_used += size + -size % LINE
        self.scratch_bytes = max(self.scratch_bytes, self._scratch_used)
        return Pointer(place, dtype)

    @contextlib.contextmanager
    def reused_scratch(self) -> Iterator[None]:
        """What is asked for within this context may be given away again after it."""
        used = self._scratch_used
        yield
        self._scratch_used = used

    def at(self, pointer: Pointer, *offsets: Value | int) -> Pointer:
        """The pointer, so much further on."""
        place = pointer.place
        for offset in offsets:
            place = self.ir.gep(place, [_index(offset)], inbounds=True, source_etype=_TYPES[pointer.dtype])
        return Pointer(place, pointer.dtype)

    def byte_at(self, place: Value, offset: Value | int) -> Value:
        """LLVM's pointer, so many bytes further on."""
        return self.ir.gep(place, [_index(offset)], inbounds=True, source_etype=_BYTE)

    def load(self, pointer: Pointer) -> Value:
        """A vector, in the type that is computed in."""
        kind = ir.VectorType(_TYPES[pointer.dtype], self.lanes)
        loaded = self.ir.load(pointer.place, align=pointer.dtype.itemsize, typ=kind)
        return loaded if kind == self.vector else self.ir.fpext(loaded, self.vector)

    def store(self, value: Value, pointer: Pointer, lanes: int | None = None) -> None:
        """A vector, or its first ``lanes``, rounded to the type that lies there."""
        kind = ir.VectorType(_TYPES[pointer.dtype], self.lanes)
        value = value if value.type == kind else self.ir.fptrunc(value, kind)
        if lanes is None or lanes >= self.lanes:
            self.ir.store(value, pointer.place, align=pointer.dtype.itemsize)
            return
        bits = ir.VectorType(ir.IntType(1), self.lanes)
        masked = self._intrinsic("llvm.masked.store", kind, [_POINTER, _INT32, bits], ".p0", ir.VoidType())
        mask = ir.Constant(bits, [lane < lanes for lane in range(self.lanes)])
        self.ir.call(masked, [value, pointer.place, _INT32(pointer.dtype.itemsize), mask])

    def prefetch(self, pointer: Pointer, offset: Value) -> None:
        """Have the processor fetch a cache line that will be read, so far on; it may lie outside all memory."""
        place = self.ir.gep(pointer.place, [offset], source_etype=_TYPES[pointer.dtype])
        name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [_POINTER, _INT32, _INT32, _INT32])
        function = self._module.globals.get(name) or ir.Function(self._module, kind, name)
        reading, all_caches, data = _INT32(0), _INT32(3), _INT32(1)
        self.ir.call(function, [place, reading, all_caches, data])

    def broadcast(self, pointer: Pointer, lanes: int | None = None) -> Value:
        """One float in every lane of a vector; None means as many as are computed at once."""
        kind = _TYPES[pointer.dtype]
        loaded = self.ir.load(pointer.place, align=pointer.dtype.itemsize, typ=kind)
        if kind != self.vector.element:
            loaded = self.ir.fpext(loaded, self.vector.element)
        return self._repeated(loaded, lanes or self.lanes)

    def broadcast_pair(self, pointer: Pointer) -> Value:
        """Two 16-bit floats, repeated. With AVX-512 32 bits are repeated as they are loaded, but not 16."""
        pair = self.ir.load(pointer.place, align=pointer.dtype.itemsize, typ=_INT32)
        return self.ir.bitcast(self._repeated(pair, self.processor.pairs), self._paired)

    def load_bytes(self, pointer: Pointer) -> Value:
        """A vector of bytes, as floats of the type that is computed in."""
        loaded = self.ir.load(pointer.place, align=1, typ=ir.VectorType(_BYTE, self.lanes))
        return self.ir.uitofp(self.ir.zext(loaded, ir.VectorType(_INT32, self.lanes)), self.vector)

    def load_pairs(self, pointer: Pointer) -> Value:
        """As many 16-bit floats as a register holds."""
        return self.ir.load(pointer.place, align=pointer.dtype.itemsize, typ=self._paired)

    def sums_of_pairs(self, a: Value, b: Value) -> Value:
        """The sums of a's pairs of lanes, and then of b's."""
        first, second = (self.shuffled(a, b, range(one, 2 * self.lanes, 2)) for one in range(2))
        return self.add(first, second)

    def shuffled(self, a: Value, b: Value, places: Sequence[int]) -> Value:
        """These elements of a and b, which are numbered one after the other."""
        return self.ir.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(places)), [*places]))

    def gather(self, pointer: Pointer, stride: int) -> Value:
        """One float in each lane, of the type that is computed in, from places so far apart."""
        value = ir.Constant(self.vector, ir.Undefined)
        for lane in range(self.lanes):
            place = self.at(pointer, lane * stride).place
            one = self.ir.load(place, align=pointer.dtype.itemsize, typ=self.vector.element)
            value = self.ir.insert_element(value, one, _INT32(lane))
        return value

    def load_index(self, table: Pointer, place: Value | int) -> Value:
        """An index, from a table of int32."""
        pointer = self.ir.gep(table.place, [_index(place)], inbounds=True, source_etype=_INT32)
        return self.ir.sext(self.ir.load(pointer, align=4, typ=_INT32), _INDEX)

    # Arithmetic

    def index(self, value: int) -> Value:
        """A constant index."""
        return _INDEX(value)

    def plus(self, a: Value | int, b: Value | int) -> Value:
        """a + b, of indices."""
        return self.ir.add(_index(a), _index(b), flags=("nsw",))

    def minus(self, a: Value | int, b: Value | int) -> Value:
        """a − b, of indices."""
        return self.ir.sub(_index(a), _index(b), flags=("nsw",))

    def times(self, a: Value | int, b: Value | int) -> Value:
        """a · b, of indices."""
        return self.ir.mul(_index(a), _index(b), flags=("nsw",))

    def modulo(self, a: Value, b: int) -> Value:
        """a mod b, of indices not below 0."""
        return self.ir.urem(a, _index(b))

    def divided(self, a: Value | int, b: int) -> tuple[Value, Value]:
        """a div b and a mod b, of indices not below 0."""
        return self.ir.udiv(_index(a), _index(b)), self.ir.urem(_index(a), _index(b))

    def at_most(self, a: Value, bound: Value | int) -> Value:
        """min(a, bound), of indices."""
        return self.ir.select(self.ir.icmp_signed(">", a, _index(bound)), _index(bound), a)

    def at_least(self, a: Value, bound: Value) -> Value:
        """max(a, bound), of indices."""
        return self.ir.select(self.ir.icmp_signed("<", a, bound), bound, a)

    def splat(self, value: float, kind: Any = None) -> Value:
        """A vector of a constant, of the function's kind or another."""
        kind = kind or self.vector
        return ir.Constant(kind, [value] * kind.count)

    def add(self, a: Value, b: Value) -> Value:
        """a + b, of vectors."""
        return self.ir.fadd(a, b)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, of vectors, rounded once."""
        return self.ir.call(self._intrinsic("llvm.fma", a.type, [a.type] * 2), [a, b, c])

    def multiply_add_pairs(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, of 16-bit floats. In bfloat16 each lane of c gets the products of a pair."""
        if not self.adds_pairs:
            return self.multiply_add(a, b, c)
        name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(c.type, [c.type, b.type, a.type])
        function = self._module.globals.get(name) or ir.Function(self._module, kind, name)
        return self.ir.call(function, [c, b, a])

    @property
    def adds_pairs(self) -> bool:
        """Whether :meth:`multiply_add_pairs` adds a pair's products to each other."""
        return self.processor.dtype == torch.bfloat16

    def mix(self, a: Value, b: Value, share: Value) -> Value:
        """a + share · (b − a), of vectors."""
        return self.multiply_add(share, self.ir.fsub(b, a), a)

    def rounded(self, value: Value) -> Value:
        """A vector in whole numbers, halves to even ones."""
        return self.ir.call(self._intrinsic("llvm.rint", value.type, []), [value])

    def clamped(self, value: Value, least: float, greatest: float) -> Value:
        """A vector between two constants; NaN stays NaN."""
        for bound, beyond in ((least, "<"), (greatest, ">")):
            limit = self.splat(bound, value.type)
            value = self.ir.select(self.ir.fcmp_ordered(beyond, value, limit), limit, value)
        return value

    def relu(self, value: Value) -> Value:
        """max(value, 0); NaN stays NaN."""
        zero = self.splat(0.0)
        return self.ir.select(self.ir.fcmp_ordered(">", zero, value), zero, value)

    def sigmoid(self, value: Value) -> Value:
        """1 / (1 + e⁻ˣ) in float32, with e⁻ˣ as 2ⁿ · eʳ and a series for eʳ, as Cephes' expf has it; NaN stays NaN."""
        floats, integers = ir.VectorType(_FLOAT, self.lanes), ir.VectorType(_INT32, self.lanes)
        splat = functools.partial(self.splat, kind=floats)
        minus = self.clamped(self.ir.fneg(value if value.type == floats else self.ir.fpext(value, floats)), -87, 87)
        rounder = splat(12582912.0)  # 1.5 · 2²³: sums with it have no fractions
        n = self.ir.fsub(self.multiply_add(minus, splat(1.44269504088896341), rounder), rounder)
        rest = self.multiply_add(n, splat(-0.693359375), minus)  # ln 2 in two parts
        rest = self.multiply_add(n, splat(2.12194440e-4), rest)
        series = splat(1.9875691500e-4)
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            series = self.multiply_add(series, rest, splat(factor))
        one = splat(1.0)
        series = self.ir.fadd(self.multiply_add(series, self.ir.fmul(rest, rest), rest), one)
        exponent = self.ir.add(self.ir.fptosi(n, integers), self.splat(127, integers))
        power = self.ir.bitcast(self.ir.shl(exponent, self.splat(23, integers)), floats)
        return self.ir.fdiv(one, self.multiply_add(series, power, one))

    # Control

    @contextlib.contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1) -> Iterator[Value]:
        """``for index in range(start, stop, step)``, with at least one round."""
        before, body = self.ir.block, self._function.append_basic_block("loop")
        self.ir.branch(body)
        self.ir.position_at_end(body)
        index = self.ir.phi(_INDEX)
        index.add_incoming(_index(start), before)
        yield index
        following = self.plus(index, step)
        index.add_incoming(following, self.ir.block)
        after = self._function.append_basic_block("after")
        self.ir.cbranch(self.ir.icmp_signed("<", following, _index(stop)), body, after)
        self.ir.position_at_end(after)

    @contextlib.contextmanager
    def if_not_above(self, a: Value, b: Value) -> Iterator[None]:
        """``if a <= b``, of indices."""
        with self.ir.if_then(self.ir.icmp_signed("<=", a, b)):
            yield

    @contextlib.contextmanager
    def if_within(self, index: Value, stop: Value | int) -> Iterator[None]:
        """``if 0 <= index < stop``."""
        with self.ir.if_then(self.ir.icmp_unsigned("<", index, _index(stop))):
            yield

    @contextlib.contextmanager
    def if_within_else(self, index: Value, stop: Value | int) -> Iterator[tuple[Any, Any]]:
        """As :meth:`if_within`: contexts of the branch that is taken then, and of the other; both are to be used."""
        with self.ir.if_else(self.ir.icmp_unsigned("<", index, _index(stop))) as branches:
            yield branches

    def variables(self, values: Sequence[Value]) -> list[Value]:
        """Variables with these values, for :meth:`get` and :meth:`set`."""
        places = [self._locals.alloca(value.type) for value in values]
        for place, value in zip(places, values, strict=True):
            self.set(place, value)
        return places

    def get(self, variable: Value) -> Value:
        """A variable's value."""
        return self.ir.load(variable, typ=variable.allocated_type)

    def set(self, variable: Value, value: Value) -> None:
        """Give a variable another value."""
        self.ir.store(value, variable)

    def _repeated(self, value: Value, count: int) -> Value:
        vector = ir.VectorType(value.type, count)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.ir.insert_element(undefined, value, _INT32(0))
        return self.ir.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, count), None))

    def _intrinsic(self, name: str, vector: Any, others: Sequence[Any], suffix: str = "", result: Any = None) -> Value:
        """A function of a vector and others, which returns such a vector if nothing else."""
        element = {_FLOAT: "f32", _HALF: "f16", _BFLOAT: "bf16"}[vector.element]
        name = f"{name}.v{vector.count}{element}{suffix}"
        kind = ir.FunctionType(result or vector, [vector, *others])
        return self._module.globals.get(name) or ir.Function(self._module, kind, name)


def _index(value: Value | int) -> Value:
    return _INDEX(value) if isinstance(value, int) else value
