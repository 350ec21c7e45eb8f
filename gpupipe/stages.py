"""Where the time of a render goes: busy seconds of each stage, what bounded the run, and a trace to look at.

    template decode ─ template half ─ speech half ─ paste ─ encode ─ mux

Stages overlap: each is timed where it runs (on lanes, on the encoders' threads, on the GPU), so that their busy seconds
may add up to more than the run took. The time of a stage inside another one (a template frame that is decoded when the
network asks for it) counts for the inner stage alone.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpupipe.files import replacing

STAGES = ("template decode", "template half", "speech half", "paste", "encode", "mux")
"""In a frame's order. A captured CUDA graph runs the speech half and the paste as one: ``speech half + paste``."""

LANE_THREAD, ENCODE_THREAD = "lane", "encode"
"""How the names of threads begin that are summed as one group: the lanes (lanes.py) and the encoders (video/)."""

_SATURATED = 0.9
"""Share of the cores' time from which on the cores count as the bound, whichever thread is the busiest."""


class _Moment(NamedTuple):
    """One piece of work, for the trace: seconds since the start."""

    stage: str
    row: str
    start: float
    end: float


class _Nested(threading.local):
    """The stages that a thread is in, outermost first, each with the GPU whose time it counts; None for the host."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, torch.device | None]] = []


class Stages:
    """Measures one render. Any thread may time its work, at the cost of reading a clock twice and taking a lock.

    On a CPU a stage is timed by the wall clock while a thread is in it; a thread that feeds an encoder waits in it for
    the encoder's own threads. On CUDA a stage that is given its device is timed by events on the current stream, which
    are read when the run is over.

    Args:
        trace: keep every piece of work, for :meth:`write_trace`.
    """

    def __init__(self, *, trace: bool = False) -> None:
        self._trace: list[_Moment] | None = [] if trace else None
        self._lock = threading.Lock()
        self._nested = _Nested()
        self._busy: dict[str, float] = defaultdict(float)
        self._rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._queued: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._origin: tuple[torch.cuda.Event, float] | None = None
        self._cpu_start = time.process_time()
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def time(self, stage: str, device: torch.device | None = None) -> Iterator[None]:
        """Count the time inside as ``stage``'s; on a CUDA ``device``, count the GPU's time."""
        gpu = device if device is not None and device.type == "cuda" else None
        nested = self._nested.stages
        parent, parent_gpu = nested[-1] if nested else (None, gpu)
        if (parent_gpu is None) != (gpu is None):
            parent = None  # the GPU's time is not subtracted from a stage of the host, nor the other way round
        begin = None if gpu is None else self._event(gpu)
        nested.append((stage, gpu))
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            nested.pop()
            if gpu is None or begin is None:
                self._add(stage, parent, threading.current_thread().name, start, end)
            else:
                queued = (stage, parent, begin, self._event(gpu))
                with self._lock:
                    self._queued.append(queued)

    def busy(self) -> dict[str, float]:
        """Wait for the GPU; return the busy seconds by stage, in a frame's order. Call it when the run is over."""
        self._read_events()
        with self._lock:
            names = sorted(self._busy, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
            return {name: max(0.0, self._busy[name]) for name in names}

    def bound(self, *, cores: int) -> str:
        """Say what bounded the run until now: the GPU, the cores, or the thread that was busy for most of the time.

        Args:
            cores: how many this process may use.

        Returns:
            one line: what it was, how busy it was, and which stage took most of that.
        """
        self._read_events()
        seconds = time.perf_counter() - self._start
        used = (time.process_time() - self._cpu_start) / (seconds * cores)
        with self._lock:
            rows = {row: dict(stages) for row, stages in self._rows.items()}
        groups: dict[str, list[dict[str, float]]] = defaultdict(list)
        for row, stages in rows.items():
            groups[_group(row)].append(stages)
        shares = {
            name: sum(sum(stages.values()) for stages in members) / (seconds * len(members))
            for name, members in groups.items()
        }
        if not shares:
            return "nothing: no stage was timed"
        if used >= _SATURATED and shares.get("the GPU", 0) < _SATURATED:
            return f"the cores ({used:.0%} busy), {_most(list(rows.values()))} most of all"
        name = max(shares, key=lambda group: shares[group])
        return f"{name} ({shares[name]:.0%} busy), {_most(groups[name])} most of all; the cores {used:.0%} busy"

    def write_trace(self, path: Path) -> None:
        """Write what was timed as a trace for ``chrome://tracing`` or Perfetto, a row for each thread and the GPU.

        The format is the Trace Event Format's JSON object with complete events (``"ph": "X"``), in microseconds.
        """
        self._read_events()
        moments = self._trace or []
        rows = {row: number for number, row in enumerate(sorted({moment.row for moment in moments}))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}}
            for row, number in rows.items()
        ]
        for stage, row, start, end in moments:
            duration = (end - start) * 1e6
            events.append({"ph": "X", "name": stage, "pid": 0, "tid": rows[row], "ts": start * 1e6, "dur": duration})
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")

    def _add(self, stage: str, parent: str | None, row: str, start: float, end: float) -> None:
        """Count a piece of work for its stage, and subtract it from the enclosing one."""
        with self._lock:
            for name, sign in ((stage, 1), (parent, -1)):
                if name is not None:
                    self._busy[name] += sign * (end - start)
                    self._rows[row][name] += sign * (end - start)
            if self._trace is not None:
                self._trace.append(_Moment(stage, row, start - self._start, end - self._start))

    def _read_events(self) -> None:
        with self._lock:
            queued, self._queued = self._queued, []
        if not queued:
            return
        assert self._origin is not None
        first, moment = self._origin
        for stage, parent, begin, end in queued:
            end.synchronize()
            start = moment + first.elapsed_time(begin) / 1000
            self._add(stage, parent, "GPU", start, start + begin.elapsed_time(end) / 1000)

    def _event(self, device: torch.device) -> torch.cuda.Event:
        """An event at this point of the device's current stream."""
        stream = torch.cuda.current_stream(device)
        if self._origin is None:
            origin = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)  # once, to align the GPU's clock with the host's
            origin.record(stream)
            self._origin = (origin, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


@contextlib.contextmanager
def measuring(trace: str | Path | None) -> Iterator[Stages]:
    """Measure a render; when it is done without an error, write its trace to the file ``trace``, if one is named.

    Raises:
        OutputError: ``trace`` cannot be written; raised before anything is rendered.
    """
    with contextlib.ExitStack() as outputs:
        temporary = outputs.enter_context(replacing(trace)) if trace is not None else None
        stages = Stages(trace=trace is not None)
        yield stages
        if temporary is not None:
            stages.write_trace(temporary)


class _Untimed(Stages):
    """Measures nothing, and keeps nothing."""

    @contextlib.contextmanager
    def time(self, stage: str, device: torch.device | None = None) -> Iterator[None]:
        """Count nothing."""
        yield


UNTIMED: Stages = _Untimed()
"""The default: measures nothing."""


def _group(row: str) -> str:
    """The group that a trace row is summed under: all lanes, all encoders, or itself."""
    if row.startswith(LANE_THREAD):
        return "the lanes"
    if row.startswith(ENCODE_THREAD):
        return "the encoders"
    return {"GPU": "the GPU", "MainThread": "the main thread"}.get(row, row)


def _most(rows: list[dict[str, float]]) -> str:
    """Return the stage that took most of the rows' time."""
    total: dict[str, float] = defaultdict(float)
    for stages in rows:
        for stage, seconds in stages.items():
            total[stage] += seconds
    return max(total, key=lambda stage: total[stage])
