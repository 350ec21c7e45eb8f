"""Float32 that is float32: on CUDA, PyTorch's convolutions are rounded to TF32's 10 bits unless told otherwise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import torch

_lock = threading.Lock()
_state = SimpleNamespace(users=0, before=(True, False))
"""How many are in the context, and how the switches stood before the first of them."""


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Within this context neither convolutions nor products of matrices on a CUDA device use TF32.

    PyTorch's switches are the whole process's. Threads may be in this context at once: the first one's finds them as
    the program had set them, and the last one's leaves them so. On other devices they are not touched.
    """
    if device.type != "cuda":
        yield
        return
    convolution, product = torch.backends.cudnn, torch.backends.cuda.matmul
    with _lock:
        if not _state.users:
            _state.before = convolution.allow_tf32, product.allow_tf32
            convolution.allow_tf32 = product.allow_tf32 = False
        _state.users += 1
    try:
        yield
    finally:
        with _lock:
            _state.users -= 1
            if not _state.users:
                convolution.allow_tf32, product.allow_tf32 = _state.before
