"""The regression guard: is this run slower than what was recorded of an earlier commit on the same device?

A row is compared with the newest recorded one that measured the same thing (what, provider, metric, place on its axis,
and every choice in ``config`` that was made rather than found) at an ancestor of the commit at hand.

**The bound.** A figure may be worse than the earlier one by 5 %, or by three times the noise of the two, whichever is
more. A row's noise is half the distance of its 20th and 80th percentile over its median; that of two rows is the root
of the sum of their squares. With fewer than three measurements a row does not know its noise: 10 % is taken.

**Noisy machines.** Absolute figures are compared only where both rows know their noise and it is 5 % or less; elsewhere
only ratios are, whose two sides were measured in turns.
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
"""Metrics that are guarded, and the sign of better; floors and memory are facts to look at."""

FOUND = ("bytes", "operations", "floor_ms", "floor_by", "rounds", "bytes_a_frame", "copy_gb_s")
"""Entries of ``config`` that a run finds out; they do not make a measurement another one."""


@dataclass(frozen=True)
class Verdict:
    """One comparison.

    Attributes:
        change: of the median, as a share; positive is better.
        bound: how much worse it may be, as a share.
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
        """Beyond the bound."""
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
    """Whether a row's commit is the one at hand or one that led to it; outside a repository any is.

    A row of the very same changed tree (``-dirty``) says nothing of an earlier one and does not count.
    """
    if not IN_REPOSITORY:
        return True
    earlier = recorded.removesuffix("-dirty")
    if recorded.endswith("-dirty") and recorded == commit():
        return False
    command = ["git", "merge-base", "--is-ancestor", earlier, "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def _noise(record: Record) -> float | None:
    """As a share of the median; None where too little was measured to tell."""
    if record["n"] < 3:
        return None
    return float((record["p80"] - record["p20"]) / 2 / record["p50"])


def _key(record: Record) -> str:
    """All that makes two rows measurements of the same thing."""
    config = {name: value for name, value in record["config"].items() if name not in FOUND}
    place = [record[name] for name in ("device", "what", "provider", "metric", "unit", "axis", "value")]
    return json.dumps([*place, config], sort_keys=True)
