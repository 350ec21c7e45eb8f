"""How much of a machine's memory what is kept of template frames may take."""

from __future__ import annotations

from pathlib import Path

import torch

from gpupipe.cgroups import memory_left


def default_budget(device: torch.device) -> int:
    """Bytes that the caches may take on a device.

    Half of what is free on a GPU, counting what PyTorch holds there and does not use; a quarter of what is available
    on the host or, in a container, of what is left of its limit if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) // 2
    left = memory_left()
    return (_available() if left is None else min(left, _available())) // 4


def _available() -> int:
    """Bytes that the host can give without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # no such file outside Linux: assume a small machine
