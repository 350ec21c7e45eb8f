"""Container limits: in both versions of control groups, in enclosing groups, and absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpupipe import cgroups, lanes, memory
from gpupipe.cgroups import cpu_quota, memory_left

MiB = 1 << 20

V2 = {"own": "0::/a/b\n", "a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}
V2 |= {"a/b/memory.max": f"{512 * MiB}\n", "a/b/memory.current": f"{300 * MiB}\n", "a/memory.max": "max\n"}
V2 |= {"a/memory.current": f"{400 * MiB}\n", "a/b/memory.stat": f"anon 5\ninactive_file {100 * MiB}\nactive_file 7\n"}

BOTH = V2 | {"a/b/cpu.max": "300000 100000\n", "a/memory.max": f"{450 * MiB}\n"}  # the enclosing group has less left

V1 = {"own": "6:cpuset:/y\n5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/docker/x\n"}  # the host's: here "/"
V1 |= {"cpu/y/cpu.cfs_quota_us": "50000\n", "cpu/y/cpu.cfs_period_us": "100000\n"}  # another process's group
V1 |= {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}
V1 |= {"memory/memory.limit_in_bytes": f"{256 * MiB}\n", "memory/memory.usage_in_bytes": f"{200 * MiB}\n"}
V1 |= {"memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {8 * MiB}\n"}

FREE = {"own": "2:cpu:/\n1:memory:/\n", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
FREE |= {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1000\n"}

FULL = {"own": "0::/\n", "memory.max": "1000\n", "memory.current": "1200\n"}


@pytest.fixture
def groups(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in request.param.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(cgroups, "_GROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")


@pytest.mark.parametrize(
    ("groups", "quota", "left"),
    [
        (V2, 2.5, 312 * MiB),
        (BOTH, 2.5, 50 * MiB),
        (V1, 1.5, 64 * MiB),
        (FREE, None, 2**63 - 4096 - 1000),
        (FULL, None, 0),
        ({}, None, None),
    ],
    indirect=["groups"],
)
@pytest.mark.usefixtures("groups")
def test_limits_of_each_version_of_cgroups_are_read(quota: float | None, left: int | None) -> None:
    assert cpu_quota() == quota
    assert memory_left() == left


@pytest.mark.parametrize(("groups", "cores"), [(V2, 3), (V1, 2), (FREE, 8), ({}, 8)], indirect=["groups"])
@pytest.mark.usefixtures("groups")
def test_cores_and_memory_keep_to_the_container_s_limits(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUPIPE_CORES", raising=False)
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert lanes.available_cores() == cores
    left, host = memory_left(), 1 << 40
    monkeypatch.setattr(memory, "_available", lambda: host)
    assert memory.default_budget(torch.device("cpu")) == (host if left is None else min(left, host)) // 4
    monkeypatch.setenv("GPUPIPE_CORES", "1")
    assert lanes.available_cores() == 1


def test_this_process_s_own_limits_are_read() -> None:
    """None only if the outermost group, which is the container's, has no limit."""
    for found, names in (
        (cpu_quota(), ("cpu.max", "cpu/cpu.cfs_quota_us")),
        (memory_left(), ("memory.max", "memory/memory.limit_in_bytes")),
    ):
        limits = [path.read_text().split()[0] for path in map(cgroups._GROUPS.joinpath, names) if path.exists()]
        assert found is not None or not any(map(str.isdecimal, limits)), limits
        assert found is None or found > 0
