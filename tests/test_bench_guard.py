"""The regression guard: what it compares, and how much worse it lets a figure be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpupipe.benchmarks import guard
from gpupipe.benchmarks.common import Row, Spread, append_rows, read_rows, row
from gpupipe.errors import InputError

QUIET = Spread(99, 100, 101, 5)
OLDER = "2020-01-01T00:00:00+00:00"


def made(spread: Spread, metric: str = "throughput", **more: Any) -> Row:
    place: dict[str, Any] = {"what": "end_to_end", "provider": "gpupipe", "axis": "frames", "value": 100}
    return row(spread, metric=metric, unit="x", config={"width": 1.0, "rounds": 5} | more, **place)


def verdicts(now: Row, then: Row, *, time: str = OLDER, ancestor: bool = True) -> list[guard.Verdict]:
    return guard.compare([now], [replace(then, time=time).as_dict()], lambda commit: ancestor)


def scaled(spread: Spread, factor: float) -> Spread:
    return Spread(spread.p20 * factor, spread.p50 * factor, spread.p80 * factor, spread.n)


@pytest.mark.parametrize(("factor", "worse"), [(1.2, False), (0.96, False), (0.94, True)])
def test_a_quiet_figure_may_be_five_percent_worse(factor: float, worse: bool) -> None:
    [verdict] = verdicts(made(scaled(QUIET, factor)), made(QUIET))
    assert verdict.bound == pytest.approx(0.05)
    assert verdict.worse == worse


@pytest.mark.parametrize("metric", ["time", "latency"])
def test_of_times_less_is_better(metric: str) -> None:
    [slower] = verdicts(made(scaled(QUIET, 1.1), metric), made(QUIET, metric))
    [faster] = verdicts(made(scaled(QUIET, 0.9), metric), made(QUIET, metric))
    assert slower.worse and not faster.worse


def test_the_bound_grows_with_the_noise_of_both() -> None:
    noisy = Spread(97, 100, 105, 5)  # 4 % each, if more to one side: 3·√(4² + 4²) = 17 %
    [verdict] = verdicts(made(scaled(noisy, 0.85)), made(noisy))
    assert verdict.bound == pytest.approx(3 * 2**0.5 * 0.04)
    assert not verdict.worse
    [verdict] = verdicts(made(scaled(noisy, 0.8)), made(noisy))
    assert verdict.worse


@pytest.mark.parametrize(
    "then",
    [Spread(90, 100, 110, 5), Spread(94, 100, 106, 5), Spread(100, 100, 100, 1), Spread(99, 100, 101, 2)],
    ids=["noisy", "less noisy", "once", "twice"],
)
def test_on_a_noisy_machine_only_ratios_are_compared(then: Spread) -> None:
    assert verdicts(made(scaled(QUIET, 0.1)), made(then)) == []
    [verdict] = verdicts(made(scaled(QUIET, 0.1), "ratio"), made(then, "ratio"))
    assert verdict.worse


def test_a_spread_in_another_unit_keeps_its_order() -> None:
    assert Spread(1, 2, 4, 3).map(lambda seconds: 1 / seconds) == Spread(0.25, 0.5, 1, 3)


@pytest.mark.parametrize("then", [Spread(100, 100, 100, 1), Spread(99, 100, 101, 2)], ids=["once", "twice"])
def test_the_noise_of_too_few_measurements_is_taken_for_ten_percent(then: Spread) -> None:
    [verdict] = verdicts(made(QUIET, "ratio"), made(then, "ratio"))
    assert verdict.bound == pytest.approx(3 * math.hypot(0.1, 0.01))


def test_only_the_same_thing_at_an_earlier_ancestor_is_compared() -> None:
    slow = made(scaled(QUIET, 0.5))
    assert verdicts(slow, made(QUIET))[0].worse
    found = {"rounds": 3, "engine": "fused", "codec": "libx264", "kernels": "torch", "onnxruntime_provider": "CPU"}
    found |= {"bytes": 1, "operations": 2, "floor_ms": 3, "floor_by": "bytes", "bytes_a_frame": 4, "copy_gb_s": 5}
    for name, value in found.items():
        assert verdicts(slow, made(QUIET, **{name: value})), f"{name} is found out by a run, not chosen"
    assert verdicts(slow, made(QUIET, width=0.25)) == []
    for other in ({"device": "x"}, {"provider": "x"}, {"unit": "y"}, {"axis": "size"}, {"value": 200}, {"what": "z"}):
        assert verdicts(slow, replace(made(QUIET), **other)) == [], other  # type: ignore[arg-type]
    assert verdicts(slow, made(QUIET), ancestor=False) == []
    assert verdicts(slow, made(QUIET), time="2999-01-01T00:00:00+00:00") == []
    assert verdicts(slow, made(QUIET), time=slow.time) == [], "a row of the same run"


@pytest.mark.skipif(guard.commit().startswith(("gpupipe ", "unknown")), reason="needs the repository")
def test_which_commits_are_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    is_ancestor = guard.is_ancestor.__wrapped__
    here = guard.commit().removesuffix("-dirty")
    monkeypatch.setattr(guard, "commit", lambda: here)
    assert is_ancestor(here) and is_ancestor(f"{here}-dirty") and not is_ancestor("0" * 12)
    monkeypatch.setattr(guard, "commit", lambda: f"{here}-dirty")
    assert is_ancestor(here) and not is_ancestor(f"{here}-dirty")
    monkeypatch.setattr(guard, "IN_REPOSITORY", False)
    assert is_ancestor("0" * 12)


def test_without_git_every_commit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert guard.is_ancestor("some other commit")


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    for line in ('{"trunc', "[]", '{"time": "2026"}'):
        path.write_text(f"{json.dumps(made(QUIET).as_dict())}\n{line}")
        with pytest.raises(InputError, match=r"gpu\.jsonl: line 2 is no recorded row; expected JSON with what, "):
            read_rows(tmp_path)


def test_a_row_does_not_follow_one_that_was_cut_on_its_line(tmp_path: Path) -> None:
    (path,) = append_rows([made(QUIET)], tmp_path)
    path.write_text(path.read_text()[:-9])
    append_rows([made(QUIET)] * 2, tmp_path)
    cut, *whole = path.read_text().splitlines()
    assert [json.loads(line)["p50"] for line in whole] == [100, 100] and cut.startswith("{")


def test_the_newest_row_counts() -> None:
    older = replace(made(scaled(QUIET, 0.5)), time=OLDER).as_dict()
    newer = replace(made(QUIET), time="2021-01-01T00:00:00+00:00").as_dict()
    failed = replace(made(QUIET), time="2022-01-01T00:00:00+00:00", p20=None, p50=None, p80=None, n=0, error="no")
    [verdict] = guard.compare([made(scaled(QUIET, 0.7))], [newer, failed.as_dict(), older], lambda commit: True)
    assert verdict.then == 100 and verdict.worse


def test_facts_of_the_machine_are_not_guarded() -> None:
    assert verdicts(made(scaled(QUIET, 0.1), "memory"), made(QUIET, "memory")) == []
    assert verdicts(made(scaled(QUIET, 0.1), "copy_bandwidth"), made(QUIET, "copy_bandwidth")) == []
