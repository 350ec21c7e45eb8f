"""Float32 that is float32: neither a program's autocast nor TF32, in which PyTorch convolves on CUDA, makes it less."""

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
"""How many are in the context, and what sets the switches as they stood before the first of them."""


@contextlib.contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Within this context tensors are computed in their own precision: a program's autocast is off, and neither
    convolutions nor products of matrices on a CUDA device use TF32.

    PyTorch's switches for TF32 are the whole process's. Threads may be in this context at once: the first one's finds
    them as the program had set them, and the last one's leaves them so. On other devices they are not touched.
    """
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
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
    """Turn TF32 off by both names that PyTorch has for each switch; returns what sets all of them back."""
    cudnn: Any = torch.backends.cudnn
    product: Any = torch.backends.cuda.matmul
    newer = {switch: switch.fp32_precision for switch in (cudnn.conv, cudnn.rnn, product)}
    convolution = _told(lambda: cudnn.allow_tf32)
    level = _told(torch.get_float32_matmul_precision)

    def set_back() -> None:
        if convolution is not None:
            cudnn.allow_tf32 = convolution
        if level == "high":
            product.allow_tf32 = True
        elif level == "medium":  # which is oneDNN's too
            torch.set_float32_matmul_precision(level)
        for switch, precision in newer.items():
            switch.fp32_precision = precision

    cudnn.allow_tf32 = product.allow_tf32 = False
    for switch in newer:
        switch.fp32_precision = "ieee"
    return set_back


def _told(setting: Callable[[], Setting]) -> Setting | None:
    """A setting by its older name; None where PyTorch refuses to tell it, because a newer one was set otherwise."""
    try:
        return setting()
    except RuntimeError:
        return None
