"""The closed forms of the back-and-forth walk and of resampling, against doing both step by step."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from gpupipe import InputError
from gpupipe.benchmarks.reference_loop import ping_pong
from gpupipe.schedule import WINDOW_ROWS, Resampling, frame_rate, template_indices, times_shown, window_rows


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 150])
def test_closed_form_equals_the_walk_step_by_step(length: int) -> None:
    for start_frame in range(length):
        walked = list(islice(ping_pong(length, start_frame), 4 * length + 5))
        assert template_indices(0, len(walked), length, start_frame).tolist() == walked, f"start frame {start_frame}"


@pytest.mark.parametrize(
    ("length", "start_frame", "order"),
    [
        (1, 0, [0, 0, 0]),
        (2, 0, [1, 0, 1, 0]),
        (4, 0, [1, 2, 3, 2, 1, 0, 1, 2]),
        (5, 2, [3, 4, 3, 2, 3, 4]),
        (5, 4, [4, 4, 4]),
    ],
)
def test_order_is_the_contract_s(length: int, start_frame: int, order: list[int]) -> None:
    """Written by hand, so that it cannot share a mistake with the walk above."""
    indices = template_indices(0, len(order), length, start_frame)
    assert indices.dtype == np.int64
    assert indices.tolist() == order


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 3), (5, 17), (149, 300), (10**12, 10**12 + 9)])
def test_any_part_can_be_asked_for_alone(start: int, stop: int) -> None:
    period = 2 * (9 - 1)
    whole = template_indices(0, 2 * period, 9)
    assert template_indices(start, stop, 9).tolist() == [whole[i % period] for i in range(start, stop)]


def test_start_between_two_frames_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^start frame is 1\.5; expected 0 to 3: the template has 4 frames$"):
        template_indices(0, 1, 4, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "start_frame"), [(4, 4), (4, -1), (4, 100), (1, 1)])
def test_start_outside_the_template_is_an_error(length: int, start_frame: int) -> None:
    with pytest.raises(InputError, match=f"^start frame is {start_frame}; expected 0 to {length - 1}: .* {length} "):
        template_indices(0, 1, length, start_frame)


@pytest.mark.parametrize(("length", "start_frame"), [(1, 0), (2, 0), (2, 1), (9, 0), (9, 3), (9, 8)])
def test_times_shown_counts_the_walk(length: int, start_frame: int) -> None:
    for stop in range(40):
        shown = template_indices(0, stop, length, start_frame).tolist()
        assert times_shown(stop, length, start_frame).tolist() == [shown.count(frame) for frame in range(length)]


def test_window_is_eight_rows_before_and_eight_from_the_frame_on() -> None:
    assert WINDOW_ROWS == 16
    assert window_rows(0, 1) == (-8, 8)
    assert window_rows(100, 101) == (92, 108)
    assert window_rows(20, 24) == (12, 31)


# ── another rate than the features' ───────────────────────────────────────────────────────────────────────────────────

RATES = [
    Fraction(25),
    Fraction(20),
    Fraction(50),
    Fraction(30000, 1001),
    Fraction(24000, 1001),
    Fraction(1),
    Fraction(7),
]


@pytest.mark.parametrize("fps", [*RATES, Fraction(200)])
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(20)])
@pytest.mark.parametrize("length", [1, 2, 3, 11])
def test_resampled_frames_show_the_row_on_screen_at_their_time(length: int, rate: Fraction, fps: Fraction) -> None:
    """Against a clock: the row on screen at j / fps is the last one that began by then."""
    timing = Resampling(length, rate, fps)
    begins = [i / rate for i in range(length)]
    shown = [sum(begin <= j / fps for begin in begins) - 1 for j in range(timing.frames)]
    assert timing.rows(0, timing.frames).tolist() == shown
    assert abs(timing.frames / fps - length / rate) <= 1 / (2 * fps) or timing.frames == 1


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("step", [1, 3, 64])
def test_batches_of_rows_make_all_frames_once(fps: Fraction, step: int) -> None:
    """Each goes on where the one before it ended, and shows no more rows than it may."""
    timing = Resampling(100, Fraction(25), fps)
    start = 0
    while start < timing.frames:
        stop = timing.reach(start, step)
        assert start < stop and len(set(timing.rows(start, stop).tolist())) <= step
        start = stop
    assert start == timing.frames


def test_without_resampling_a_frame_is_one_row() -> None:
    timing = Resampling(10**9, Fraction(25), Fraction(25))
    assert timing.frames == 10**9
    assert timing.rows(10**9 - 3, 10**9).tolist() == list(range(10**9 - 3, 10**9))


@pytest.mark.parametrize(
    ("length", "rate", "fps", "frames"),
    [(11, 25, 20, 9), (11, 25, 30, 13), (10, 20, 25, 13), (1, 25, 1, 1), (250, 25, 30, 300), (13, 25, 50, 26)],
)
def test_number_of_frames(length: int, rate: int, fps: int, frames: int) -> None:
    """By hand: 10 rows at 20 a second last half a second, which is 12.5 frames at 25, rounded up."""
    assert Resampling(length, Fraction(rate), Fraction(fps)).frames == frames


def test_frame_rate_is_exact() -> None:
    assert frame_rate(29.97) == Fraction(2997, 100)
    assert frame_rate(30000 / 1001) == Fraction(30000, 1001)
    assert frame_rate(1000) == 1000
    for wrong in (0, -25, 1001, float("nan"), 1e-300):
        with pytest.raises(InputError, match=f"^fps is {wrong}; expected more than 0 and at most 1000"):
            frame_rate(wrong)
