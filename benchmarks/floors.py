"""What this machine could do at best: bytes over its own copy bandwidth, operations over its own arithmetic rate.

A floor is a lower bound, not a promise: nothing that reads and writes these bytes, or performs these operations, can
finish sooner. The ceilings are measured in the same run, so that a slow or busy machine moves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpupipe.benchmarks.common import Row, Spread, row
from gpupipe.benchmarks.kernel_bench import copy_bandwidth, seconds_of
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.lanes import available_cores, map_in_lanes

_MATRIX = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Floor:
    """The shortest time that a stage can take for a frame.

    Attributes:
        seconds: the larger of the two bounds.
        by: which of them it is, ``"bytes"`` or ``"operations"``.
    """

    seconds: float
    by: str

    @classmethod
    def of(cls, moved: int, operations: int, device: torch.device, dtype: torch.dtype) -> Floor:
        """The floor of a stage that moves ``moved`` bytes and does ``operations`` (a multiply-add counts as two)."""
        by_bytes = moved / copy_bandwidth(device)
        by_operations = operations / arithmetic_rate(device, dtype) if operations else 0.0
        return cls(by_bytes, "bytes") if by_bytes >= by_operations else cls(by_operations, "operations")


@cache
def arithmetic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second, the ceiling for the network's arithmetic.

    On a CPU of multiply-adds in the registers of all cores; on a GPU, and where LLVM's kernels do not run, of a square
    matrix product, TF32 off.
    """
    if device.type == "cpu" and llvm_obstacle(dtype) is None:
        from gpupipe.benchmarks.peak_llvm import MultiplyAdds  # noqa: PLC0415 - llvmlite may be missing

        run, calls = MultiplyAdds(dtype), 64 * available_cores()
        seconds = seconds_of(lambda: list(map_in_lanes(lambda _: run(), range(calls))), device, rounds=5)
        return calls * run.operations / seconds.p50
    n = _MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, rounds=5).p50


@torch.inference_mode()
def operations_of(module: nn.Module, *inputs: Tensor) -> int:
    """Operations of the convolutions and matrix products in one call; activations and sums are not counted."""
    counter = FlopCounterMode(display=False)
    with counter:
        module(*inputs)
    return int(counter.get_total_flops())


def machine_rows(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """The ceilings as rows."""
    kind = str(dtype).removeprefix("torch.")
    what: dict[str, Any] = {"what": "machine", "provider": "torch", "axis": "dtype", "device": device, "config": {}}
    copy, rate = copy_bandwidth(device) / 1e9, arithmetic_rate(device, dtype) / 1e9
    return [
        row(Spread.of([copy]), metric="copy_bandwidth", unit="GB/s", value="uint8", **what),
        row(Spread.of([rate]), metric="arithmetic_rate", unit="Gop/s", value=kind, **what),
    ]
