"""The seed's per-image steps, each against OpenCV and the contract."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import landmarks
from parity import EXACT_RESIZE, opencv_resize

from gpupipe import ImageProcessor, InputError, transfer
from gpupipe.benchmarks import reference_loop as reference
from gpupipe.landmarks import Box

Image = np.ndarray

processor = ImageProcessor()


def noise(height: int = 240, width: int = 320, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_image_and_landmarks(make_template: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_template(tmp_path, frames=1)
    image, points = folder / "full_body_img" / "0.jpg", folder / "landmarks" / "0.lms"
    assert np.array_equal(processor.load_image(str(image)), cv2.imread(str(image)))
    found = processor.load_landmarks(str(points))
    assert found.dtype == np.int32
    assert np.array_equal(found, reference.read_landmarks(points))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.jpg: no such image file"):
        processor.load_image(tmp_path / "0.jpg")
    with pytest.raises(InputError, match=r"0\.lms: no such landmark file"):
        processor.load_landmarks(tmp_path / "0.lms")


# ── crop and resize ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_crop_region_may_reach_over_the_edge_and_the_crop_does_not() -> None:
    points = landmarks(-20, 10, 100)
    assert processor.get_crop_region(points) == (-20, 10, 80, 110)
    crop, box = processor.crop_face_region(noise(), points)
    assert box == (0, 10, 80, 110)
    assert np.array_equal(crop, noise()[10:110, 0:80])


def test_crop_is_a_copy() -> None:
    image = noise()
    crop, _ = processor.crop_face_region(image, landmarks(50, 60, 61))
    crop[:] = 0
    assert np.array_equal(image, noise())


def test_crop_outside_the_image() -> None:
    with pytest.raises(InputError, match="lies wholly outside the frame; expected it to overlap 320×240"):
        processor.crop_face_region(noise(), landmarks(320, 0, 50))


@pytest.mark.parametrize("size", [(328, 328), (61, 61), (200, 150), (321, 100)])
def test_resize_is_opencv_s(size: tuple[int, int]) -> None:
    expected = opencv_resize(noise(), size)
    assert expected.shape == (size[1], size[0], 3)
    EXACT_RESIZE.check(processor.resize_image(noise(), size), expected)
    assert not EXACT_RESIZE.holds(processor.resize_image(noise(), size), cv2.resize(noise(), size))


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (328.0, 328.0), (1, 2, 3)])
def test_resize_to_what_is_no_size(size: Any) -> None:
    with pytest.raises(InputError, match=r"^size is \(.*\); expected \(width, height\), each 1 or more and whole$"):
        processor.resize_image(noise(), size)


def test_a_size_of_numpy_s_integers_leaves_later_ones_alone() -> None:
    """Weights are kept by size, and NumPy's smallest integers overflow in them."""
    size = (200, 177)
    found = [processor.resize_image(noise(), one) for one in (np.array(size, np.uint8), size)]  # type: ignore[arg-type]
    EXACT_RESIZE.check(found[0], opencv_resize(noise(), size))
    assert np.array_equal(*found)


# ── the network's image ───────────────────────────────────────────────────────────────────────────────────────────────


def test_masked_region() -> None:
    inner = np.maximum(noise(320, 320), 1)
    masked = processor.create_masked_region(inner)
    expected = inner.copy()
    expected[5:310, 5:315] = 0
    assert np.array_equal(masked, expected)
    assert inner.all(), "the image is left as it is"


@pytest.mark.parametrize("normalize", [True, False])
def test_prepared_tensors(normalize: bool) -> None:
    crop = noise(328, 328)
    image, inner = processor.prepare_input_tensors(crop, normalize)
    assert image.shape == (1, 6, 320, 320)
    assert inner.shape == (3, 320, 320)
    assert image.dtype == inner.dtype == torch.float32
    _, stacked = reference.crop_face(crop, (0, 0, 328, 328))
    expected = stacked.astype(np.float32) / (255 if normalize else 1)
    assert np.array_equal(image[0].numpy(), expected)
    assert np.array_equal(inner.numpy(), expected[:3])


def test_prepared_tensors_of_an_inner_crop() -> None:
    crop = noise(328, 328)
    image, inner = processor.prepare_input_tensors(crop[4:324, 4:324])
    whole, whole_inner = processor.prepare_input_tensors(crop)
    assert torch.equal(image, whole)
    assert torch.equal(inner, whole_inner)


# ── paste ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("box", [(50, 60, 111, 121), (0, 10, 80, 210), (1, 1, 240, 240), (300, 0, 320, 240)])
def test_paste_is_the_reference_s(box: Box) -> None:
    frame, mouth = noise(), noise(320, 320, seed=1)
    size = (box[2] - box[0], box[3] - box[1])
    found = processor.paste_generated_region(frame, mouth, box, size)
    crop, _ = reference.crop_face(frame, box)
    expected = reference.paste_face(frame, box, crop, mouth)
    inside = np.s_[box[1] : box[3], box[0] : box[2]]
    EXACT_RESIZE.check(found[inside], expected[inside])
    found[inside] = expected[inside]
    assert np.array_equal(found, expected)
    assert np.array_equal(frame, noise()), "the frame is left as it is"


def test_paste_of_a_whole_canvas() -> None:
    """328×328 brings its own ring."""
    canvas = noise(328, 328, seed=1)
    found = processor.paste_generated_region(noise(), canvas, (20, 30, 120, 130), (100, 100))
    EXACT_RESIZE.check(found[30:130, 20:120], opencv_resize(canvas, (100, 100)))


def test_paste_with_parsing() -> None:
    frame, mouth, box = noise(), noise(320, 320, seed=1), (20, 30, 120, 130)
    parsing = np.zeros_like(frame)
    parsing[:, 60:80] = (0, 0, 255)
    parsing[:, 80:90] = 255
    found = processor.process_frame_with_parsing(frame, mouth, box, (100, 100), parsing)
    crop, _ = reference.crop_face(frame, box)
    expected = reference.paste_face(frame, box, crop, mouth, parsing)
    EXACT_RESIZE.check(found[30:130, 20:120], expected[30:130, 20:120])
    assert np.array_equal(found[:, 60:90], frame[:, 60:90])
    without = processor.process_frame_with_parsing(frame, mouth, box, (100, 100))
    assert np.array_equal(without, processor.paste_generated_region(frame, mouth, box, (100, 100)))
    assert not np.array_equal(without, found)


def test_paste_is_hard_unless_it_is_asked_to_blend() -> None:
    arguments = (noise(), noise(320, 320, seed=1), (20, 30, 120, 130), (100, 100))
    hard = processor.paste_generated_region(*arguments)
    assert np.array_equal(hard, processor.paste_generated_region(*arguments, blend="none", feather=30))
    soft = processor.paste_generated_region(*arguments, blend="feather")
    softer = processor.paste_generated_region(*arguments, blend="feather", feather=30)
    template = noise()[30:130, 20:120].astype(int)
    away = [np.abs(image[30:130, 20:120] - template).mean() for image in (hard, soft, softer)]
    assert away[0] > away[1] > away[2] > 0
    assert np.array_equal(soft[60:100, 50:90], hard[60:100, 50:90])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"crop_coords": (-1, 30, 99, 130)}, "crop_coords is"),
        ({"crop_coords": (221, 30, 321, 130)}, "crop_coords is"),
        ({"crop_coords": (120, 30, 20, 130)}, "crop_coords is"),
        ({"crop_coords": (20, 141, 120, 241)}, "crop_coords is"),
        ({"original_crop_size": (100, 99)}, "original_crop_size is"),
        ({"generated_region": noise(319, 320)}, "generated_region: shape is"),
        ({"generated_region": noise(320, 328)}, "generated_region: shape is"),
        ({"parsing_image": noise(240, 322)}, "parsing_image has shape"),
        ({"full_frame": noise()[..., 0]}, "full_frame: is"),
        ({"full_frame": noise().astype(np.float32)}, "full_frame: is"),
        ({"full_frame": noise()[:0]}, "full_frame: is"),
        ({"full_frame": None}, "full_frame: is object (); expected uint8"),
        ({"blend": "poisson"}, "blend is 'poisson'; expected feather or none"),
        ({"feather": -1.0}, "feather is -1.0; expected a width"),
        ({"feather": float("nan")}, "feather is nan; expected a width"),
        ({"feather": float("inf")}, "feather is inf; expected a width"),
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], named: str) -> None:
    good: dict[str, Any] = {
        "full_frame": noise(),
        "generated_region": noise(320, 320),
        "crop_coords": (20, 30, 120, 130),
        "original_crop_size": (100, 100),
    }
    processor.process_frame_with_parsing(**good)
    with pytest.raises(InputError) as caught:
        processor.process_frame_with_parsing(**(good | changed))
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("method", ["create_masked_region", "prepare_input_tensors"])
def test_images_of_another_size(method: str) -> None:
    with pytest.raises(InputError, match=r"^image: shape is \(300, 300, 3\); expected \(320, 320, 3\)"):
        getattr(processor, method)(noise(300, 300))


def test_tensors_and_views_are_taken_wherever_arrays_are() -> None:
    frame, mouth, box = noise(), noise(320, 320, seed=1), (20, 30, 120, 130)
    points = landmarks(20, 30, 100)
    as_tensor = torch.from_numpy

    assert processor.get_crop_region(as_tensor(points)) == processor.get_crop_region(points)
    for given in (as_tensor(frame), frame[::-1][::-1], frame[..., ::-1].copy()[..., ::-1]):
        crop, found = processor.crop_face_region(given, points)
        assert found == box
        assert np.array_equal(crop, frame[30:130, 20:120])
    fixed = noise()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's warning about read-only arrays
        assert np.array_equal(processor.crop_face_region(fixed, points)[0], frame[30:130, 20:120])
    resized = processor.resize_image(as_tensor(frame), (328, 328))
    assert np.array_equal(resized, processor.resize_image(frame, (328, 328)))
    image, _ = processor.prepare_input_tensors(as_tensor(resized))
    assert torch.equal(image, processor.prepare_input_tensors(resized)[0])
    assert np.array_equal(processor.create_masked_region(as_tensor(mouth)), processor.create_masked_region(mouth))
    found = processor.process_frame_with_parsing(
        as_tensor(frame), as_tensor(mouth), box, (100, 100), as_tensor(np.zeros_like(frame))
    )
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, processor.paste_generated_region(frame, mouth, box, (100, 100)))


def test_an_array_of_the_other_byte_order_is_taken() -> None:
    assert torch.equal(transfer.as_tensor(np.arange(3, dtype=">f4")), torch.arange(3.0))


def test_a_tensor_with_a_gradient_is_taken_without_it() -> None:
    learnt = torch.ones(3, requires_grad=True)
    taken = transfer.as_tensor(learnt)
    assert not taken.requires_grad and taken.data_ptr() == learnt.data_ptr()
