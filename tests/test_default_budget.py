"""How much memory what is kept of template frames may take, by default."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpupipe import memory
from gpupipe.memory import default_budget

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("left", "budget"), [(None, 1000 * 1024), (400, 100), (1 << 40, 1000 * 1024)])
def test_a_quarter_of_what_a_host_has_available(left: int | None, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or of what is left of a container's limit."""
    told = "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n"
    monkeypatch.setattr(memory, "Path", {"/proc/meminfo": SimpleNamespace(read_text=lambda **_: told)}.__getitem__)
    monkeypatch.setattr(memory, "memory_left", lambda: left)
    assert default_budget(CPU) == budget


def test_a_host_that_does_not_tell_is_taken_for_a_small_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "Path", {"/proc/meminfo": tmp_path / "absent"}.__getitem__)
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert default_budget(CPU) == 1 << 30


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_quarter_of_what_a_process_may_still_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``ulimit -v`` and batch systems limit it."""
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + (400 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda what: {resource.RLIMIT_AS: (limit, limit)}[what])
    assert 90 << 20 < default_budget(CPU) < 110 << 20
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1, 1))
    assert default_budget(CPU) == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="memory is read from /proc")
def test_a_part_of_the_memory_there_is() -> None:
    assert 1 << 20 < default_budget(CPU) < 1 << 44


def test_half_of_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For others, or held by PyTorch and not in use."""
    for name, told in (("mem_get_info", (1000, 8000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    assert default_budget(CUDA) == 700


@pytest.mark.cuda
def test_what_was_used_before_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As engines that were measured before the first render."""
    total = 16 << 30  # other processes' memory, which comes and goes, left out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (total - torch.cuda.memory_reserved(gpu), total))
    before = default_budget(CUDA)
    torch.ones(1 << 30, dtype=torch.uint8, device=CUDA)
    assert abs(default_budget(CUDA) - before) < 1 << 26
