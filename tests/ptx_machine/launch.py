"""Triton's kernels, compiled for a GPU and executed by the machine, on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ptx_machine.machine import WARP, Counts, launch
from ptx_machine.memory import Buffer


def compiled(*names: str) -> ModuleType:
    """Import the kernels' modules ``names`` anew, with their functions to be compiled; returns the last one.

    They are given in the order in which they import each other. The modules already imported, whose kernels may be for
    Triton's interpreter, are left as they are.
    """
    for name in names:
        importlib.import_module(name)  # and what it imports, which is kept
    real = {name: sys.modules[name] for name in names}
    try:
        with mock.patch.dict("os.environ", TRITON_INTERPRET="0"):
            for name in names:
                spec = importlib.util.find_spec(name)
                assert spec is not None and spec.loader is not None, name
                module = sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
    finally:
        sys.modules.update(real)
    return module


@contextlib.contextmanager
def machine(
    arch: int,
    launcher: Callable[[Callable[[], None], list[Tensor]], None] | None = None,
    counts: Counts | None = None,
) -> Iterator[None]:
    """Within this context, launches compile for compute capability ``arch`` / 10 and execute here.

    Everything that Triton does before a launch is done, also its specialisation for arguments that are 1 or multiples
    of 16.

    Args:
        launcher: called with a function that executes the launch, and its tensors; by default it is executed at once.
        counts: to add what is executed to.
    """
    driver = SimpleNamespace(
        get_current_device=lambda: arch,  # the key of Triton's cache of compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, WARP),
    )
    compile_only = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert "enable_fp_fusion" in options, (
            f"{self.fn.__name__}: the launch leaves it to Triton's version what is fused"
        )
        kernel = compile_only(self, *arguments, grid=grid, warmup=True, **options)
        if warmup:
            return kernel
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        passed = [given[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        scratch = (kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size)
        assert not any(scratch), f"scratch memory of {scratch} bytes is not provided for"
        tensors = [one for one in passed if isinstance(one, Tensor)]
        execute = functools.partial(
            launch,
            kernel.asm["ptx"],
            (*grid, 1, 1)[:3],
            [one.data_ptr() if isinstance(one, Tensor) else one for one in passed] + [0, 0],
            buffers_of(tensors),
            threads=kernel.metadata.num_warps * WARP,
            shared_bytes=kernel.metadata.shared,
            counts=counts,
        )
        if launcher is None:
            execute()
        else:
            launcher(execute, tensors)
        return kernel

    with mock.patch.object(triton.runtime.driver, "_active", driver), mock.patch.object(JITFunction, "run", run):
        yield


def buffers_of(tensors: list[Tensor]) -> list[Buffer]:
    """The tensors' memory, each storage once. It is not kept alive."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one.numel()}
    return [
        Buffer(start, np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8))
        for start, size in storages.items()
    ]
