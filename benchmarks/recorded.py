"""Which recorded rows tables and plots show: the newest of each kind, in groups that belong side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpupipe.benchmarks.common import Record

NAMES = {
    "reference_loop": "reference loop",
    "reference_loop_keeping_memory": "the same, glibc keeping its memory",
    "reference_loop_onnxruntime": "reference loop on ONNX Runtime",
    "gpupipe_exact": "gpupipe, exact",
    "gpupipe": "gpupipe",
    "gpupipe_float16": "gpupipe, float16",
    "gpupipe_bfloat16": "gpupipe, bfloat16",
}
"""Contestants as readers see them, in this order."""


class Group(NamedTuple):
    """Rows that belong side by side have the same device, template and width of the network."""

    device: str
    template: str
    width: float

    def __str__(self) -> str:
        network = "full-width network" if self.width == 1 else f"network of width {self.width:g}"
        return f"{self.device}; template {self.template}, {network}"


def group_of(record: Record) -> Group:
    """The group of a row."""
    config = record["config"]
    return Group(record["device"], str(config.get("template", "?")), float(config.get("width", 1)))


def clips(records: list[Record]) -> dict[Group, dict[float, dict[tuple[str, str], Record]]]:
    """Newest rows of end-to-end runs: group → frames of the clip → (provider, metric) → row."""
    found: dict[Group, dict[float, dict[tuple[str, str], Record]]] = {}
    for record in records:
        if record["what"] == "end_to_end" and record["axis"] == "frames" and record["error"] is None:
            by_length = found.setdefault(group_of(record), {})
            by_length.setdefault(record["value"], {})[record["provider"], record["metric"]] = record
    return dict(sorted(found.items()))


def longest(by_length: dict[float, dict[tuple[str, str], Record]]) -> dict[tuple[str, str], Record]:
    """The rows of the longest clip."""
    return by_length[max(by_length)]


def stages(records: list[Record]) -> dict[Group, dict[str, dict[str, Record]]]:
    """Newest rows of stages: group → stage → metric → row."""
    found: dict[Group, dict[str, dict[str, Record]]] = {}
    for record in records:
        if record["what"] == "stage" and record["error"] is None:
            found.setdefault(group_of(record), {}).setdefault(record["value"], {})[record["metric"]] = record
    return dict(sorted(found.items()))


def loop_stages(records: list[Record], group: Group) -> dict[str, float]:
    """The reference loop's newest milliseconds a frame, by stage."""
    return {
        record["value"]: record["p50"]
        for record in records
        if record["what"] == "end_to_end"
        and record["axis"] == "stage"
        and record["provider"] == "reference_loop"
        and group_of(record) == group
    }


def widest(found: dict[Group, Any]) -> list[Group]:
    """For each device the group with its widest network, for a plot that has no room for all."""
    by_device: dict[str, Group] = {}
    for group in found:
        kept = by_device.get(group.device)
        if kept is None or group.width > kept.width:
            by_device[group.device] = group
    return list(by_device.values())
