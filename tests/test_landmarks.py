"""Landmark files and the box that they give: against the reference's own reader, by hand, and with bad files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpupipe import InputError
from gpupipe.benchmarks import reference_loop as reference
from gpupipe.landmarks import Box, crop_box, face_box, read_landmarks


def points(xmin: float = 100, ymin: float = 50, side: float = 60, count: int = 110) -> np.ndarray:
    found = np.full((count, 2), -7.0)
    found[1, 0], found[31, 0], found[52, 1] = xmin, xmin + side, ymin
    return found


def written(lines: list[str], folder: Path) -> Path:
    (folder / "0.lms").write_text("\n".join(lines))
    return folder / "0.lms"


def good_lines() -> list[str]:
    return [f"{x} {y}" for x, y in points()]


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_floats_are_truncated_towards_zero(tmp_path: Path) -> None:
    lines = ["1.9 2.1", "-3.9 4", "1e2 -0.5", "  7\t8  ", "", *["0 0"] * 50]
    found = read_landmarks(written(lines, tmp_path))
    assert found.dtype == np.int32
    assert found[:4].tolist() == [[1, 2], [-3, 4], [100, 0], [7, 8]]
    assert len(found) == 54


def test_values_pass_through_float32(tmp_path: Path) -> None:
    """0.99999999 is 1 in float32, so the reference reads it as 1."""
    path = written(["0.99999999 16777217"] * 53, tmp_path)
    assert read_landmarks(path)[0].tolist() == [1, 16777216]
    assert np.array_equal(read_landmarks(path), reference.read_landmarks(path))


@pytest.mark.parametrize("box", [(10, 20, 61), (-40, -3, 719)])
def test_reads_as_the_reference_does(
    box: tuple[int, int, int], make_template: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_template(tmp_path, frames=1, box=box) / "landmarks" / "0.lms"
    found = read_landmarks(path)
    assert np.array_equal(found, reference.read_landmarks(path))
    xmin, ymin, side = box
    assert face_box(found) == (xmin, ymin, xmin + side, ymin + side)


def test_real_landmarks(speaker: Path) -> None:
    for i in range(150):
        path = speaker / "landmarks" / f"{i}.lms"
        found = read_landmarks(str(path))
        assert found.shape == (110, 2)
        assert crop_box(found, 1280, 720) == reference.box_from_landmarks(reference.read_landmarks(path), 720, 1280)


def test_53_points_are_enough_and_52_are_not(tmp_path: Path) -> None:
    assert len(read_landmarks(written(good_lines()[:53], tmp_path))) == 53
    with pytest.raises(InputError, match=r"0\.lms: has 52 points; expected at least 53, usually 110"):
        read_landmarks(written(good_lines()[:52], tmp_path))


@pytest.mark.parametrize(
    ("line", "met"),
    [
        ("1.0 two", "expected two numbers, 'x y'"),
        ("1.0", "expected two numbers, 'x y'"),
        ("1.0 2.0 3.0", "expected two numbers, 'x y'"),
        ("1.0,2.0", "expected two numbers, 'x y'"),
        ("nan 2.0", "expected finite coordinates"),
        ("1.0 NaN", "expected finite coordinates"),
        ("inf 2.0", "expected finite coordinates"),
        ("1.0 -inf", "expected finite coordinates"),
        ("1.0 1e300", "expected finite coordinates"),
        ("2147483647 1", "expected finite coordinates"),
    ],
)
@pytest.mark.parametrize("number", [1, 32, 110])
def test_bad_line_is_named(number: int, line: str, met: str, tmp_path: Path) -> None:
    lines = good_lines()
    lines[number - 1] = line
    path = written(lines, tmp_path)
    with pytest.raises(InputError) as caught:
        read_landmarks(path)
    assert str(caught.value).startswith(f"{path}: line {number} is {line!r}; {met}")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xd8\xff\xe0\x00\x10JFIF", "1 2\n".encode("utf-16")])
def test_file_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "0.lms"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_landmarks(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.lms: no such landmark file"):
        read_landmarks(tmp_path / "0.lms")
    with pytest.raises(InputError, match="is a folder; expected an ordinary file"):
        read_landmarks(tmp_path)


# ── the box ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_box_is_the_square_of_points_1_31_and_52() -> None:
    assert face_box(points(100, 200, 61)) == (100, 200, 161, 261)
    assert face_box(torch.tensor(points(100, 200, 61))) == (100, 200, 161, 261)
    assert face_box(points(100, 200, 61, count=53)) == (100, 200, 161, 261)
    assert face_box(points(100.9, 200.9, 61).tolist()) == (100, 200, 161, 261)
    assert face_box(points(-30.9, -5.5, 61)) == (-30, -5, 30, 55), "towards zero at both ends: one pixel shorter"


@pytest.mark.parametrize(
    ("place", "box"),
    [
        ((100, 50, 60), (100, 50, 160, 110)),
        ((-20, 10, 100), (0, 10, 80, 110)),
        ((600, 10, 100), (600, 10, 640, 110)),
        ((10, -30, 100), (10, 0, 110, 70)),
        ((10, 400, 100), (10, 400, 110, 480)),
        ((-10, -10, 700), (0, 0, 640, 480)),
        ((639, 479, 10), (639, 479, 640, 480)),
        ((-9, 0, 10), (0, 0, 1, 10)),
    ],
)
def test_box_over_the_edge_is_clamped(place: tuple[int, int, int], box: Box) -> None:
    assert crop_box(points(*place), 640, 480) == box
    assert reference.box_from_landmarks(points(*place).astype(np.int32), 480, 640) == box


@pytest.mark.parametrize("side", [0, -1, -300])
def test_empty_and_inverted_box(side: int) -> None:
    for make in (face_box, lambda landmarks, name: crop_box(landmarks, 640, 480, name=name)):
        with pytest.raises(InputError, match=rf"^7\.lms: box runs from x = 100 to {100 + side}; expected point 1 left"):
            make(points(100, 50, side), name="7.lms")


@pytest.mark.parametrize("place", [(640, 0, 50), (-50, 0, 50), (0, 480, 50), (0, -50, 50), (-900, 900, 50)])
def test_box_that_misses_the_frame(place: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"^7\.lms: box \(.*\) lies wholly outside the frame; expected .* 640×480"):
        crop_box(points(*place), 640, 480, name="7.lms")
    face_box(points(*place))


@pytest.mark.parametrize("shape", [(110,), (110, 3), (52, 2), (0, 2), (1, 110, 2)])
def test_landmarks_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^landmarks: shape is \(.*\); expected \(n, 2\) with n ≥ 53"):
        face_box(np.zeros(shape))


@pytest.mark.parametrize("point", [1, 31, 52])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_landmarks_that_are_not_finite(value: float, point: int) -> None:
    landmarks = points()
    landmarks[point] = value
    with pytest.raises(InputError, match=r"^landmarks: points 1, 31, 52 hold NaN or infinite values"):
        face_box(landmarks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_tensors_are_landmarks(dtype: torch.dtype) -> None:
    given = torch.from_numpy(points()).to(dtype)
    box = face_box(given.float().numpy())
    assert face_box(given.requires_grad_(dtype.is_floating_point)) == box


@pytest.mark.cuda
def test_landmarks_may_be_on_a_gpu() -> None:
    assert face_box(torch.from_numpy(points()).cuda()) == face_box(points())


def test_other_points_do_not_matter() -> None:
    landmarks = points()
    others = np.ones(len(landmarks), dtype=bool)
    others[[1, 31, 52]] = False
    landmarks[others] = np.nan
    assert face_box(landmarks) == (100, 50, 160, 110)
