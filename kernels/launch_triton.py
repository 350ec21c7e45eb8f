"""How Triton kernels are launched: on their tensors' device, all with the same option; or not at all, to compile them
together or to record them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton

from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.versions import numbers

FUSION = {"enable_fp_fusion": True}
"""An option of every launch: a product and a sum become one instruction. Triton up to 3.9 does so where nothing is
said; 3.9 warns that 3.10 will not."""

CAN_COMPILE_TOGETHER = numbers(triton.__version__) >= (3, 6)
"""Triton 3.5 stays in that mode for good if a kernel cannot be compiled."""

_taker: ContextVar[Callable[..., object] | None] = ContextVar("taker", default=None)
"""What launches are handed to in place of the GPU."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument: Triton takes the current device, wherever tensors lie.

    Args:
        kernel: a function that ``triton.jit`` or ``gluon.jit`` made.
        arguments: the kernel's first parameters, of which the first is a tensor.
        options: the rest, by name, and Triton's own options.
    """
    with torch.cuda.device_of(arguments[0]):
        if (taker := _taker.get()) is not None:
            taker(kernel, grid, *arguments, **options)
        else:
            kernel[grid](*arguments, **options, **FUSION)


@contextmanager
def launches_taken(taker: Callable[..., object]) -> Iterator[None]:
    """Within this context this thread's launches are handed to ``taker``, which takes what :func:`launch` takes."""
    token = _taker.set(taker)
    try:
        yield
    finally:
        _taker.reset(token)


def compile_together(step: Callable[[], object], threads: int) -> None:
    """Compile all kernels that ``step`` launches, on several threads; launched for the first time, each would be
    compiled when the one before it is done.

    ``step`` is run with its launches left out, so whatever it makes is meaningless. A kernel that cannot be compiled
    raises its error when it is launched. Triton 3.5 compiles one by one.
    """
    if INTERPRETED or not CAN_COMPILE_TOGETHER:
        return

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options, **FUSION)

    with (
        ThreadPoolExecutor(threads, "compile") as workers,
        triton.AsyncCompileMode(workers, ignore_errors=True),
        launches_taken(compile_only),
    ):
        step()
