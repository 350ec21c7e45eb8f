"""True float32: neither a program's autocast nor TF32, PyTorch's default for convolutions on CUDA, may lower it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

Setting = TypeVar("Setting")

_lock = threading.Lock()
_state = SimpleNamespace(users=0, set_back=lambda: None)
"""How many threads are in the context, and what restores the switches to their state before the first of them."""


@contextlib.contextmanager
def own_precision(device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Compute in the tensors' own precision within this context: autocast is off, and neither convolutions nor matrix
    products of float32 on a CUDA device use TF32.

    PyTorch's switches for TF32 belong to the whole process. Several threads may be in this context at once: the first
    to enter saves the program's settings, and the last to leave restores them. On other devices, and for other types,
    they are not touched. A switch that the program had left alone has its value set after that, and follows
    ``torch.backends.fp32_precision`` no more: PyTorch has no way back.
    """
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda" and dtype == torch.float32:
            inside.enter_context(_tf32_off())
        yield


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    with _lock:
        if not _state.users:
            _state.set_back = _turn_off()
        _state.users += 1
    try:
        yield
    finally:
        with _lock:
            _state.users -= 1
            if not _state.users:
                _state.set_back()


def _turn_off() -> Callable[[], None]:
    """Turn TF32 off by both of PyTorch's names for each switch; return a function that restores all of them."""
    cudnn: Any = torch.backends.cudnn
    product: Any = torch.backends.cuda.matmul
    on_cpu: Any = torch.backends.mkldnn
    switches = (cudnn.conv, cudnn.rnn, product)
    newer = {switch: switch.fp32_precision for switch in (*switches, on_cpu.matmul)}
    convolution = _setting(lambda: cudnn.allow_tf32)
    level = _setting(torch.get_float32_matmul_precision)

    def set_back() -> None:
        if convolution is not None:
            cudnn.allow_tf32 = convolution
        if level == "high":
            product.allow_tf32 = True
        elif level == "medium":  # applies to oneDNN too
            torch.set_float32_matmul_precision(level)
        for switch, precision in newer.items():
            switch.fp32_precision = "none"  # as the switch above it
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision

    cudnn.allow_tf32 = product.allow_tf32 = False
    for switch in switches:
        switch.fp32_precision = "ieee"
    return set_back


def _setting(read: Callable[[], Setting]) -> Setting | None:
    """Read a setting by its older name; None where PyTorch refuses because a newer one was set differently."""
    try:
        return read()
    except RuntimeError:
        return None
