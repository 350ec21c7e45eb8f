"""What a run takes besides time: peak memory and, where the GPU counts it, energy."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from gpupipe.benchmarks.common import package_version

_INTERVAL = 0.02  # seconds between two samples of the resident memory


class PeakMemory:
    """Peak memory while a block runs: PyTorch's on a CUDA device, the whole process's resident memory on a CPU.

    Resident memory is sampled every 20 ms, so that a shorter peak can be missed; everything that the process holds
    counts.

    Attributes:
        bytes: the peak; None outside Linux.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        self.bytes = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            now = resident_bytes()
            if now is not None and self.bytes is not None:
                self.bytes = max(self.bytes, now)


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None outside Linux."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def energy_counter(device: str | torch.device) -> Callable[[], float] | None:
    """A function that returns the joules a GPU has used since its driver was loaded; None where they are not counted.

    NVML counts them on Volta and newer GPUs; ``nvidia-ml-py`` must be installed to read it.
    """
    device = torch.device(device)
    if device.type != "cuda" or package_version("nvidia-ml-py") is None:
        return None
    import pynvml  # noqa: PLC0415 - optional

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)

        def joules() -> float:
            torch.cuda.synchronize(device)
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

        return joules
    return None
