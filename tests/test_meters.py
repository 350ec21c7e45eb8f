"""What a render takes besides time: energy."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from gpupipe.benchmarks import meters
from gpupipe.benchmarks.contestants import Contestant, clip_rows


def test_energy_is_told_in_joules_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts millijoules."""
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-1-2": 5_600_000}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(meters, "package_version", lambda name: "13.580")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    joules = meters.energy_counter("cuda")
    assert joules is not None
    assert joules() == 5600
    one = Contestant("gpupipe", 0, lambda *_: {}, seconds=[1.0], stages=[{}], joules=[600.0])
    [energy] = [row for row in clip_rows([one], frames=100, config={}, device="cpu") if row.metric == "energy"]
    assert (energy.p50, energy.unit) == (6, "J/frame")
