"""How much of a machine's memory what is kept of template frames may take, and whether there was too little."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

from gpupipe.cgroups import memory_left
from gpupipe.errors import GpupipeError


def default_budget(device: torch.device) -> int:
    """Bytes that the caches may take on a device.

    Half of what is free on a GPU, counting what PyTorch holds there and does not use; a quarter of what is available
    on the host or, if that is less, of what is left of a container's limit or of the process's (``ulimit -v``).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) // 2
    limits = (_available(), memory_left(), _address_space_left())
    return min(left for left in limits if left is not None) // 4


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, ONNX Runtime or Python says that there was no memory: not all have a type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = "(can't|failed to) allocate memory|not enough memory|out of memory|alloc_failed|bad_alloc"
    return not isinstance(error, GpupipeError | OSError) and re.search(told, str(error), re.IGNORECASE) is not None


def _available() -> int:
    """Bytes that the host can give without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # no such file outside Linux: assume a small machine


def _address_space_left() -> int | None:
    """Bytes that this process may still map; None without a limit, and where none is known."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - Windows has none

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            return max(0, limit - pages * resource.getpagesize())
    return None
