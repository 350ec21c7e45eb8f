"""Moving data between the host and a device, and reading what users pass in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gpupipe.errors import InputError


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without waiting for work that is queued there.

    To copy from pageable memory, the host waits until the GPU reaches the copy; a batch could then be prepared only
    after the one before it was done. A copy from pinned memory is queued on the current stream, and the host goes on.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """What a user passed, as a tensor without gradient on its own device. It shares an array's memory if possible.

    Raises:
        InputError: an array of a type that tensors do not have.
    """
    if isinstance(values, Tensor):
        return values.detach()
    array = np.ascontiguousarray(values)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())  # PyTorch warns about read-only ones
    except TypeError:
        raise InputError(f"values are of type {array.dtype}; expected numbers of at most 64 bits") from None


def as_array(values: ArrayLike | Tensor) -> NDArray[Any]:
    """What a user passed, as an array. A tensor may be on any device, in bfloat16, or have a gradient.

    bfloat16, which NumPy lacks, becomes float32; no other type is changed.
    """
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
