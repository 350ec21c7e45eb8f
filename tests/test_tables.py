"""The README's figures are the recorded ones."""

import copy

import pytest

from gpupipe.benchmarks.tables import README, fill, read_rows


def test_readme_shows_the_recorded_figures() -> None:
    text = README.read_text("utf-8")
    assert "<!-- table: end_to_end -->" in text
    assert fill(text, read_rows()) == text, "run python benchmarks/tables.py"


def test_another_figure_would_be_noticed() -> None:
    rows = copy.deepcopy(read_rows())
    if not rows:
        pytest.fail("benchmarks/results holds no row")
    for row in rows:
        if row["p50"] is not None:
            row["p50"] += 1
    text = README.read_text("utf-8")
    assert fill(text, rows) != text
