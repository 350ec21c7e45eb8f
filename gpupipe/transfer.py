"""Between the host and a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without waiting for what the device still has to do.

    A copy from pageable memory makes the host wait until the GPU has come to it, and a batch would be prepared only
    when the one before it is done. From pinned memory it takes its place on the current stream, and the host goes on.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """What a user gave as a tensor without a gradient, on its own device. An array's shares its memory where it can."""
    if isinstance(values, Tensor):
        return values.detach()
    array = np.ascontiguousarray(values)
    return torch.from_numpy(array if array.flags.writeable else array.copy())  # PyTorch warns of what is read-only


def as_array(values: ArrayLike | Tensor) -> NDArray[Any]:
    """What a user gave as an array: a tensor may be on any device, of bfloat16, or have a gradient.

    bfloat16, which NumPy does not know, becomes float32; no other type is changed.
    """
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
