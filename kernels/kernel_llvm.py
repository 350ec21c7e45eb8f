"""Kernels that run: functions written with LLVM, compiled for this CPU, and kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import llvmlite
import llvmlite.binding as llvm
import torch
from torch import Tensor

from gpupipe.errors import OutputError
from gpupipe.files import cache_folder, make_folder, replacing
from gpupipe.kernels.common_llvm import NAME, Processor, Writer

logger = logging.getLogger(__name__)

_DIGEST_BYTES, _COUNT_BYTES = 32, 8
"""A kept object file begins with the digest of the rest, and with its need of scratch memory."""

_PASSES = ("sroa", "instruction_combine", "new_gvn", "dead_code_elimination")
"""What LLVM is to improve: variables become registers, addresses are computed once. The code is unrolled and vectorised
as it is written, and the other passes only take time."""


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
        constants: uint8 (N,); None if it has none.
        processor: that runs it.

    Attributes:
        scratch_bytes: how much memory a call needs for itself, from a multiple of :data:`LINE` on.
    """

    def __init__(self, plan: Plan, constants: Tensor | None, processor: Processor) -> None:
        self._constants = constants
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(processor.name, processor.features, jit=True)
        self.scratch_bytes, code = _object_file(plan, processor, machine)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        arguments = [ctypes.c_void_p] * (plan.maps + 2)
        self._function = ctypes.CFUNCTYPE(None, *arguments)(self._engine.get_function_address(NAME))
        self._spare: deque[Tensor] = deque()

    def __call__(self, maps: Sequence[Tensor | None], scratch: Tensor | None = None) -> None:
        """Run it on tensors, in the plan's order, of which it takes where they begin; without scratch memory from the
        caller it keeps its own."""
        room = scratch
        if room is None:
            try:
                room = self._spare.pop()
            except IndexError:
                room = torch.empty(self.scratch_bytes, dtype=torch.uint8, device="cpu")
        self._function(*(None if one is None else one.data_ptr() for one in (*maps, self._constants, room)))
        if scratch is None:
            self._spare.append(room)


def _object_file(plan: Plan, processor: Processor, machine: Any) -> tuple[int, bytes]:
    """A kernel's need of scratch memory and its object file, which the user's cache folder keeps: compiling takes a
    third of a second."""
    made_of = repr([llvmlite.__version__, _sources(type(plan)), processor, plan])
    path = cache_folder() / "llvm" / f"{hashlib.sha256(made_of.encode()).hexdigest()}.o"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[_DIGEST_BYTES:]).digest() == kept[:_DIGEST_BYTES]:
            kept = kept[_DIGEST_BYTES:]
            return int.from_bytes(kept[:_COUNT_BYTES], "little"), kept[_COUNT_BYTES:]
    writer = plan.write(processor)
    code = writer.scratch_bytes.to_bytes(_COUNT_BYTES, "little") + _compiled(writer.finish(), machine)
    try:
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
    except OutputError as error:
        _warn_once(path.parent, str(error))
    return writer.scratch_bytes, code[_COUNT_BYTES:]


_warned: set[Path] = set()


def _warn_once(folder: Path, reason: str) -> None:
    """Warn of the first kernel that a folder does not take."""
    if folder not in _warned:
        _warned.add(folder)
        logger.warning("%s; kernels are compiled again next time", reason)


@functools.cache
def _sources(plan: type[Plan]) -> str:
    """A digest of the code that writes kernels: this folder, which has their constants too, and the plan's module."""
    sources = sorted({*Path(__file__).parent.glob("*.py*"), Path(inspect.getfile(plan))})
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
