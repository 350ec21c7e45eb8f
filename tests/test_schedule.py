"""The closed form of the walk there and back, against walking it step by step."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from gpupipe import InputError
from gpupipe.benchmarks.reference_loop import ping_pong
from gpupipe.schedule import WINDOW_ROWS, template_indices, window_rows


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 150])
def test_closed_form_is_the_walk(length: int) -> None:
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
def test_order_as_the_contract_spells_it(length: int, start_frame: int, order: list[int]) -> None:
    """By hand, so that the walk above cannot be wrong in the same way."""
    indices = template_indices(0, len(order), length, start_frame)
    assert indices.dtype == np.int64
    assert indices.tolist() == order


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 3), (5, 17), (149, 300), (10**12, 10**12 + 9)])
def test_any_part_can_be_asked_for_alone(start: int, stop: int) -> None:
    period = 2 * (9 - 1)
    whole = template_indices(0, 2 * period, 9)
    assert template_indices(start, stop, 9).tolist() == [whole[i % period] for i in range(start, stop)]


@pytest.mark.parametrize(("length", "start_frame"), [(4, 4), (4, -1), (4, 100), (1, 1)])
def test_start_outside_the_template_is_an_error(length: int, start_frame: int) -> None:
    with pytest.raises(InputError, match=f"^start frame is {start_frame}; expected 0 to {length - 1}: .* {length} "):
        template_indices(0, 1, length, start_frame)


def test_window_is_eight_rows_before_and_eight_from_the_frame_on() -> None:
    assert WINDOW_ROWS == 16
    assert window_rows(0, 1) == (-8, 8)
    assert window_rows(100, 101) == (92, 108)
    assert window_rows(20, 24) == (12, 31)
