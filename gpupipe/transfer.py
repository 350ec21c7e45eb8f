"""From the host to a device without waiting for what the device still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``.

    A copy from pageable memory makes the host wait until the GPU has come to it, and a batch would be prepared only
    when the one before it is done. From pinned memory it takes its place on the current stream, and the host goes on.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
