"""Runs Gluon kernels in Triton's CPU interpreter, which knows plain Triton only.

:func:`interpreted` loads kernels' modules with a stand-in for ``triton.experimental.gluon``: layouts mean nothing,
shared memory is a numpy array that begins as NaN, tensor-core steps are ``tl.dot``, and the few lines of inline
assembly that the kernels use are evaluated by their text, operand order included.

What it cannot show: which lane holds what, races (barriers do nothing), and anything of speed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

GLUON = "triton.experimental.gluon"
NUMPY_TYPES = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "uint8": np.uint8}


def interpreted(*names: str) -> ModuleType:
    """The last of the kernels' modules ``names``, each imported anew with its Gluon functions interpreted.

    They are given in the order in which they import each other; the real ones are left as they are.
    """
    stand_in = _stand_in()
    with (
        mock.patch.dict(sys.modules, stand_in),
        mock.patch.object(triton.experimental, "gluon", stand_in[GLUON], create=True),
    ):
        for name in names:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.loader is not None, name
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            vars(module)["tl"] = tl  # the interpreter patches the language that it finds among a function's globals
    return module


class _Function(InterpretedFunction):
    """A device function. The interpreter knows which arguments are constants by ``tl.constexpr`` alone."""

    def rewrite(self) -> Callable[..., Any]:
        function = super().rewrite()
        for name, kind in function.__annotations__.items():
            function.__annotations__[name] = str(kind).replace("gl.constexpr", "tl.constexpr")
        return function


class _Layout:
    """Stands for every layout."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @staticmethod
    def with_identity_for(*_: Any) -> _Layout:
        return _Layout()


class _SharedMemory:
    """A descriptor of shared memory."""

    def __init__(self, dtype: Any, values: np.ndarray) -> None:
        self.dtype = dtype
        self.values = values

    def store(self, value: Any) -> None:
        assert self.values.shape == value.handle.data.shape
        self.values[...] = value.handle.data

    def load(self, layout: Any = None) -> Any:
        return _tensor(self.values.copy(), self.dtype)

    def index(self, first: Any) -> _SharedMemory:
        return _SharedMemory(self.dtype, self.values[_int(first)])

    def gather(self, places: Any, axis: int) -> Any:
        assert axis == 0
        rows = places.handle.data
        assert rows.min() >= 0 and rows.max() < len(self.values), "read outside the shared memory"
        return _tensor(np.take_along_axis(self.values, rows.astype(np.int64), 0), self.dtype)


def _tensor(values: np.ndarray, dtype: Any) -> Any:
    return tl.tensor(TensorHandle(values, dtype), tl.block_type(dtype, list(values.shape)))


def _int(value: Any) -> int:
    return int(getattr(value, "value", value))


def _ints(values: Any) -> list[int]:
    return [_int(value) for value in values]


def _constexpr_function(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*(getattr(one, "value", one) for one in arguments))


def _allocate(dtype: Any, shape: Any, layout: Any, value: Any = None) -> _SharedMemory:
    memory = _SharedMemory(dtype, np.full(_ints(shape), np.nan, NUMPY_TYPES[str(dtype)]))
    if value is not None:
        memory.store(value)
    return memory


def _fused(a: Any, b: Any, c: Any) -> Any:
    return a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)


def _relu(a: Any) -> Any:
    return tl.maximum(a, 0.0)


ASSEMBLY: dict[str, Callable[..., Any]] = {
    "fma.rn.f16x2 $0, $1, $2, $3;": lambda a, b, c: _fused(a, b, c).to(tl.float16),
    "fma.rn.relu.f16x2 $0, $1, $2, $3;": lambda a, b, c: _relu(_fused(a, b, c)).to(tl.float16),
    # PTX puts the first operand into the upper half: $2 before $1 keeps a pair in its order.
    "cvt.rn.relu.f16x2.f32 $0, $2, $1;": lambda a: _relu(a).to(tl.float16),
}


def _inline_assembly(text: str, constraints: str, operands: list[Any], *, dtype: Any, is_pure: bool, pack: int) -> Any:
    assert dtype is tl.float16 and pack == 2, f"{text}: {dtype}, {pack} together"
    return ASSEMBLY[text](*operands)


def _mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True) -> Any:
    a, b = (one.load() if isinstance(one, _SharedMemory) else one for one in (a, b))
    return tl.dot(a, b, acc) if use_acc else tl.dot(a, b)


def _stand_in() -> dict[str, ModuleType]:
    """The modules that kernels import from, by name. ``tl`` is looked up late: the interpreter patches it."""
    language = ModuleType(f"{GLUON}.language")
    plain = ("load", "store", "where", "maximum", "minimum", "join", "permute", "exp", "program_id")
    vars(language).update({name: _late(name) for name in plain})
    layouts = ("Blocked", "Slice", "DistributedLinear", "DotOperand", "NVMMADistributed")
    layouts += ("NVMMAShared", "SwizzledShared", "PaddedShared")
    vars(language).update({f"{name}Layout": _Layout for name in layouts})
    vars(language).update({name: getattr(tl, name) for name in ("float16", "float32", "int32", "int64", "uint8")})
    vars(language).update(
        constexpr=tl.constexpr,
        static_range=lambda *bounds: range(*_ints(bounds)),
        arange=lambda start, end, layout=None: tl.arange(tl.constexpr(_int(start)), tl.constexpr(_int(end))),
        zeros=lambda shape, dtype, layout=None: tl.zeros(_ints(shape), dtype),
        reshape=lambda value, shape: tl.reshape(value, _ints(shape)),
        convert_layout=lambda value, layout, assert_trivial=False: value,
        allocate_shared_memory=_allocate,
        inline_asm_elementwise=_inline_assembly,
        barrier=lambda: None,
    )
    gluon = ModuleType(GLUON)
    vars(gluon).update(jit=_Function, constexpr_function=_constexpr_function, language=language)
    nvidia, ampere, hopper = (ModuleType(f"{GLUON}.language.nvidia{name}") for name in ("", ".ampere", ".hopper"))
    vars(ampere).update(mma_v2=_mma)
    vars(hopper).update(warpgroup_mma=_mma, fence_async_shared=lambda: None)
    return {module.__name__: module for module in (gluon, language, nvidia, ampere, hopper)}


def _late(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(tl, name)(*arguments, **options)

    return call
