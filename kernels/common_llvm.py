"""What the LLVM kernels share: a writer of functions on vectors of float32, and their compilation for this CPU.

A kernel is a Python function that writes an LLVM function, with all sizes as constants. LLVM allocates registers and
picks instructions; loops, tiles and what lies where are the kernel's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir
from torch import Tensor

from gpupipe.errors import OutputError
from gpupipe.files import cache_folder, make_folder, replacing

logger = logging.getLogger(__name__)

Value = Any
"""A value of the function being written: an index, a float, a vector or a pointer."""

_FLOAT, _INT32, _INDEX, _POINTER = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.PointerType()
_BYTES = 4
LINE = 16
"""Floats of a cache line, on which constants and scratch memory begin."""

_NAME = "kernel"
"""The function's, in each module."""

_DIGEST_BYTES, _COUNT_BYTES = 32, 8
"""A kept object file begins with the digest of the rest, and with its need of scratch memory."""

_PASSES = ("sroa", "instruction_combine", "new_gvn", "dead_code_elimination")
"""What LLVM is to improve: variables become registers, addresses are computed once. The code is unrolled and vectorised
as it is written, and the other passes only take time."""


@dataclass(frozen=True)
class Processor:
    """What kernels are compiled for.

    Attributes:
        name: LLVM's name of it, such as ``"sapphirerapids"`` or ``"znver4"``.
        features: its instruction sets, in LLVM's words.
        lanes: float32 in one of its vector registers; 0 if it has none that the kernels are written for.
        registers: how many of these it has.
    """

    name: str
    features: str
    lanes: int
    registers: int


@functools.cache
def this_processor() -> Processor:
    """The one that this process runs on."""
    features = llvm.get_host_cpu_features()
    lanes, registers = 0, 0
    if features.get("avx512f"):
        lanes, registers = 16, 32
    elif features.get("avx2") and features.get("fma"):
        lanes, registers = 8, 16
    elif features.get("neon"):
        lanes, registers = 4, 32
    return Processor(llvm.get_host_cpu_name(), features.flatten(), lanes, registers)


class Writer:
    """Writes one function. It takes pointers to maps, of which those that it writes overlap no others, to its constants
    and to scratch memory, and two indices, ``begin`` and ``end``.

    Attributes:
        maps, begin, end: these parameters.
        ir: what else LLVM has.
        scratch_floats: how much scratch memory it needs.
    """

    def __init__(self, processor: Processor, maps: int) -> None:
        self.processor = processor
        self.lanes = processor.lanes
        self.vector = ir.VectorType(_FLOAT, self.lanes)
        self._module = ir.Module()
        parameters = [_POINTER] * (maps + 2) + [_INDEX] * 2
        self._function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), parameters), _NAME)
        *self.maps, self._constants, self._scratch, self.begin, self.end = self._function.args
        for pointer in self._function.args[:-2]:
            pointer.add_attribute("noalias")
        self._locals = ir.IRBuilder(self._function.append_basic_block("locals"))
        self.ir = ir.IRBuilder(self._function.append_basic_block("body"))
        self._body = self.ir.block
        self._fma = self._intrinsic("llvm.fma", [self.vector] * 3)
        self.scratch_floats = 0

    def finish(self) -> str:
        """End the function; return it in LLVM's language."""
        self.ir.ret_void()
        self._locals.branch(self._body)
        return str(self._module)

    # Memory. Offsets and strides are in floats.

    def constant(self, offset: Value | int) -> Value:
        """A pointer to the constants, from an offset on."""
        return self.at(self._constants, offset)

    def scratch(self, floats: int) -> Value:
        """A pointer to memory of the function's own, with anything in it."""
        offset = self.scratch_floats
        self.scratch_floats += floats + -floats % LINE
        return self.at(self._scratch, offset)

    def at(self, pointer: Value, *offsets: Value | int) -> Value:
        """The pointer, so much further on."""
        for offset in offsets:
            pointer = self.ir.gep(pointer, [_index(offset)], inbounds=True, source_etype=_FLOAT)
        return pointer

    def byte_at(self, pointer: Value, offset: Value | int) -> Value:
        """The pointer, so many bytes further on."""
        return self.ir.gep(pointer, [_index(offset)], inbounds=True, source_etype=ir.IntType(8))

    def load(self, pointer: Value) -> Value:
        """A vector."""
        return self.ir.load(pointer, align=_BYTES, typ=self.vector)

    def store(self, value: Value, pointer: Value, lanes: int | None = None) -> None:
        """A vector, or its first ``lanes``."""
        if lanes is None or lanes >= self.lanes:
            self.ir.store(value, pointer, align=_BYTES)
            return
        bits = ir.VectorType(ir.IntType(1), self.lanes)
        masked = self._intrinsic("llvm.masked.store", [self.vector, _POINTER, _INT32, bits], ".p0", ir.VoidType())
        mask = ir.Constant(bits, [lane < lanes for lane in range(self.lanes)])
        self.ir.call(masked, [value, pointer, _INT32(_BYTES), mask])

    def broadcast(self, pointer: Value) -> Value:
        """One float in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.ir.insert_element(undefined, self.ir.load(pointer, align=_BYTES, typ=_FLOAT), _INT32(0))
        return self.ir.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, self.lanes), None))

    def gather(self, pointer: Value, stride: int) -> Value:
        """One float in each lane, from places so far apart."""
        value = ir.Constant(self.vector, ir.Undefined)
        for lane in range(self.lanes):
            one = self.ir.load(self.at(pointer, lane * stride), align=_BYTES, typ=_FLOAT)
            value = self.ir.insert_element(value, one, _INT32(lane))
        return value

    def load_index(self, pointer: Value) -> Value:
        """An index, from an int32."""
        return self.ir.sext(self.ir.load(pointer, align=_BYTES, typ=_INT32), _INDEX)

    # Arithmetic

    def plus(self, a: Value | int, b: Value | int) -> Value:
        """a + b, of indices."""
        return self.ir.add(_index(a), _index(b), flags=("nsw",))

    def times(self, a: Value | int, b: int) -> Value:
        """a · b, of indices."""
        return self.ir.mul(_index(a), _index(b), flags=("nsw",))

    def modulo(self, a: Value, b: int) -> Value:
        """a mod b, of indices not below 0."""
        return self.ir.urem(a, _index(b))

    def at_least(self, a: Value, bound: int) -> Value:
        """max(a, bound), of indices."""
        return self.ir.select(self.ir.icmp_signed("<", a, _index(bound)), _index(bound), a)

    def at_most(self, a: Value, bound: int) -> Value:
        """min(a, bound), of indices."""
        return self.ir.select(self.ir.icmp_signed(">", a, _index(bound)), _index(bound), a)

    def splat(self, value: float) -> Value:
        """A vector of a constant."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def add(self, a: Value, b: Value) -> Value:
        """a + b, of vectors."""
        return self.ir.fadd(a, b)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, of vectors, rounded once."""
        return self.ir.call(self._fma, [a, b, c])

    def mix(self, a: Value, b: Value, share: Value) -> Value:
        """a + share · (b − a), of vectors."""
        return self.multiply_add(share, self.ir.fsub(b, a), a)

    def relu(self, value: Value) -> Value:
        """max(value, 0); NaN stays NaN."""
        zero = self.splat(0.0)
        return self.ir.select(self.ir.fcmp_ordered(">", zero, value), zero, value)

    def sigmoid(self, value: Value) -> Value:
        """1 / (1 + e⁻ˣ), with e⁻ˣ as 2ⁿ · eʳ and a series for eʳ, as Cephes' expf has it; NaN stays NaN."""
        minus = self.ir.fneg(value)
        for bound, beyond in ((87.0, ">"), (-87.0, "<")):
            limit = self.splat(bound)
            minus = self.ir.select(self.ir.fcmp_ordered(beyond, minus, limit), limit, minus)
        rounder = self.splat(12582912.0)  # 1.5 · 2²³: sums with it have no fractions
        n = self.ir.fsub(self.multiply_add(minus, self.splat(1.44269504088896341), rounder), rounder)
        rest = self.multiply_add(n, self.splat(-0.693359375), minus)  # ln 2 in two parts
        rest = self.multiply_add(n, self.splat(2.12194440e-4), rest)
        series = self.splat(1.9875691500e-4)
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            series = self.multiply_add(series, rest, self.splat(factor))
        one = self.splat(1.0)
        series = self.ir.fadd(self.multiply_add(series, self.ir.fmul(rest, rest), rest), one)
        integers = ir.VectorType(_INT32, self.lanes)
        exponent = self.ir.add(self.ir.fptosi(n, integers), ir.Constant(integers, [127] * self.lanes))
        power = self.ir.bitcast(self.ir.shl(exponent, ir.Constant(integers, [23] * self.lanes)), self.vector)
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
    def if_within(self, index: Value, stop: int) -> Iterator[tuple[Any, Any]]:
        """``if 0 <= index < stop``: contexts of the branch that is taken then, and of the other."""
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

    def _intrinsic(self, name: str, parameters: Sequence[Any], suffix: str = "", result: Any = None) -> Value:
        name = f"{name}.v{self.lanes}f32{suffix}"
        if name in self._module.globals:
            return self._module.globals[name]
        return ir.Function(self._module, ir.FunctionType(result or self.vector, parameters), name)


def _index(value: Value | int) -> Value:
    return _INDEX(value) if isinstance(value, int) else value


class Plan(Protocol):
    """All that a kernel's code depends on, but for the processor. Its ``repr`` says it."""

    @property
    def maps(self) -> int:
        """How many maps the kernel takes."""
        ...

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        ...


class Kernel:
    """A plan as machine code. Calls do not hold Python's lock.

    Args:
        constants: float32 (N,); None if it has none.
        processor: that runs it.

    Attributes:
        scratch_floats: how much memory a call needs for itself.
    """

    def __init__(self, plan: Plan, constants: Tensor | None, processor: Processor) -> None:
        self._constants = constants
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(processor.name, processor.features, jit=True)
        self.scratch_floats, code = _object_file(plan, processor, machine)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        arguments = [ctypes.c_void_p] * (plan.maps + 2) + [ctypes.c_int64] * 2
        self._function = ctypes.CFUNCTYPE(None, *arguments)(self._engine.get_function_address(_NAME))

    def __call__(self, maps: Sequence[Tensor], scratch: Tensor | None, begin: int, end: int) -> None:
        """Run it on contiguous tensors, in the plan's order, from ``begin`` to ``end``; None if it needs no scratch."""
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*maps, self._constants, scratch)]
        self._function(*pointers, begin, end)


def _object_file(plan: Plan, processor: Processor, machine: Any) -> tuple[int, bytes]:
    """A kernel's need of scratch memory and its object file, which the user's cache folder keeps: compiling takes a
    third of a second."""
    made_of = [llvmlite.__version__, _sources(), processor.name, processor.features, repr(plan)]
    path = cache_folder() / "llvm" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()}.o"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[_DIGEST_BYTES:]).digest() == kept[:_DIGEST_BYTES]:
            kept = kept[_DIGEST_BYTES:]
            return int.from_bytes(kept[:_COUNT_BYTES], "little"), kept[_COUNT_BYTES:]
    writer = plan.write(processor)
    code = writer.scratch_floats.to_bytes(_COUNT_BYTES, "little") + _compiled(writer.finish(), machine)
    try:
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
    except OutputError as error:
        logger.warning("%s; kernels are compiled again next time", error)
    return writer.scratch_floats, code[_COUNT_BYTES:]


@functools.cache
def _sources() -> str:
    """A digest of the code that writes kernels."""
    sources = sorted(Path(__file__).parent.glob("*_llvm.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _compiled(source: str, machine: Any) -> bytes:
    return machine.emit_object(_improved(source, machine))


def _improved(source: str, machine: Any) -> Any:
    """A module in LLVM's language, after its passes."""
    module = llvm.parse_assembly(source)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    passes = llvm.create_new_module_pass_manager()
    for name in _PASSES:
        getattr(passes, f"add_{name}_pass")()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return module
