"""Limits of Linux control groups, version 1 and 2: how much of its machine a container may use.

A group's limits also bind the groups inside it: the lowest one, from the process's own group up to the root, counts. In
a container the group's path may be the one on the host, while the group itself is mounted as the root: folders that do
not exist are skipped.
"""

from __future__ import annotations

from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """Return the CPU time that this process may use, in cores (``--cpus``); None without a limit."""
    quotas: list[float] = []
    for group in _groups("cpu"):
        quota = _words(group / "cpu.max")
        quota = quota or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdecimal():  # otherwise "max", or -1
            quotas.append(int(quota[0]) / int(quota[1]))
    return min(quotas, default=None)


def memory_left() -> int | None:
    """Return how many bytes this process may still take (``--memory``); None without a limit.

    Cached files that have not been read lately count as free: the kernel gives them up first.
    """
    left: list[int] = []
    for group in _groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdecimal():  # otherwise "max"
            words = _words(group / "memory.stat")
            facts = dict(zip(words[::2], words[1::2], strict=False))
            files = int(facts.get("total_inactive_file") or facts.get("inactive_file") or 0)
            left.append(max(0, int(limit[0]) - int(used[0]) + files))
    return min(left, default=None)


def _groups(controller: str) -> list[Path]:
    """Return the folders of the groups that may limit a resource, from this process's own up to the root."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # no such file outside Linux
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controller if controllers else _GROUPS  # version 2 has one tree for all
        own = root / path.lstrip("/")
        groups += [group for group in (own, *own.parents) if group.is_relative_to(root)]
    return groups


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
