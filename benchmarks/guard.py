"""The regression guard: is this run slower than what was recorded at an earlier commit on the same device?

A row is compared with the newest recorded one that measured the same thing at an ancestor of the current commit. The
same thing means the same device, what, provider, metric, unit, place on the axis, and entries of ``config`` but
:data:`FOUND`.

**The bound.** A figure may be worse than the earlier one by 5 %, or by three times the noise of the two, whichever is
more. A row's noise is half the distance between its 20th and 80th percentiles, divided by its median; the noise of two
rows is the square root of the sum of their squares. The noise of fewer than three measurements is not known; 10 % is
assumed.

**Noisy machines.** Absolute figures are compared only where the noise of both rows is known and at most 5 %. Elsewhere
only ratios are compared, whose two sides were measured in turns.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from gpupipe.benchmarks.common import IN_REPOSITORY, ROOT, Record, Row, commit

ALLOWED = 0.05
NOISES = 3
UNKNOWN_NOISE = 0.10
QUIET = 0.05

BETTER = {"throughput": 1, "ratio": 1, "latency": -1, "time": -1}
"""Guarded metrics, with 1 where more is better and −1 where less is; floors and memory are only shown."""

FOUND = (
    *("bytes", "operations", "floor_ms", "floor_by", "rounds", "bytes_a_frame", "copy_gb_s"),
    *("engine", "kernels", "codec", "onnxruntime_provider"),
)
"""Entries of ``config`` that are results, or do not change what is measured: rows are compared whatever they say."""


@dataclass(frozen=True)
class Verdict:
    """One comparison.

    Attributes:
        change: of the median, as a fraction; positive is better.
        bound: how much worse it may be, as a fraction.
    """

    name: str
    now: float
    then: float
    unit: str
    commit: str
    change: float
    bound: float

    @property
    def worse(self) -> bool:
        """Worse by more than the bound."""
        return self.change < -self.bound

    def __str__(self) -> str:
        word = "WORSE" if self.worse else "ok"
        return (
            f"{word:5} {self.name}: {self.then:.4g} → {self.now:.4g} {self.unit}"
            f" ({self.change:+.1%}, allowed −{self.bound:.1%}, against {self.commit})"
        )


def compare(rows: Iterable[Row], recorded: Iterable[Record], is_ancestor: Callable[[str], bool]) -> list[Verdict]:
    """Verdicts on the rows that can be compared."""
    newest: dict[str, Record] = {}
    for record in sorted(recorded, key=lambda record: str(record["time"])):
        if record["p50"] is not None and is_ancestor(record["commit"]):
            newest[_key(record)] = record
    verdicts = []
    for row in rows:
        now = row.as_dict()
        then = newest.get(_key(now))
        if row.metric not in BETTER or row.p50 is None or then is None or then["time"] >= row.time:
            continue
        noises = [_noise(one) for one in (now, then)]
        if row.metric != "ratio" and any(noise is None or noise > QUIET for noise in noises):
            continue
        noise = math.hypot(*(UNKNOWN_NOISE if one is None else one for one in noises))
        gain = row.p50 / then["p50"] if BETTER[row.metric] > 0 else then["p50"] / row.p50
        place = f"{row.what} {row.provider} {row.metric}, {row.axis} {row.value}"
        bound = max(ALLOWED, NOISES * noise)
        verdicts.append(Verdict(place, row.p50, then["p50"], row.unit, then["commit"], gain - 1, bound))
    return verdicts


@cache
def is_ancestor(recorded: str) -> bool:
    """Whether a recorded commit is the current one or an ancestor of it. Outside a repository, or without git, each is.

    A row that was recorded in a changed tree of the current commit (``-dirty``), where this one is changed too, is not
    from an earlier commit and does not count.
    """
    if not IN_REPOSITORY:
        return True
    earlier = recorded.removesuffix("-dirty")
    if recorded.endswith("-dirty") and recorded == commit():
        return False
    command = ["git", "merge-base", "--is-ancestor", earlier, "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    except OSError:  # there is no git
        return True


def _noise(record: Record) -> float | None:
    """As a fraction of the median; None with fewer than three measurements."""
    if record["n"] < 3:
        return None
    return float((record["p80"] - record["p20"]) / 2 / record["p50"])


def _key(record: Record) -> str:
    """Equal for rows that measure the same thing."""
    config = {name: value for name, value in record["config"].items() if name not in FOUND}
    place = [record[name] for name in ("device", "what", "provider", "metric", "unit", "axis", "value")]
    return json.dumps([*place, config], sort_keys=True)
