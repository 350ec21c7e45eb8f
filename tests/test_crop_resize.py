"""Crop and resize against OpenCV, and proof that the bound catches antialiasing, a wrong edge and wrong rounding."""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import parity
import pytest
import torch
from parity import EXACT_RESIZE, THIN_CROP, Bound, inside, ipp_resize, opencv_resize, resize_bound
from torch import Tensor

from gpupipe.benchmarks import reference_loop as reference
from gpupipe.kernels.crop_resize import (
    bytes_moved,
    crop_and_input,
    crop_resize,
    inner_region,
    mask_mouth,
    network_input,
)
from gpupipe.kernels.cubic import cubic_resize, cubic_taps
from gpupipe.landmarks import Box

Image = np.ndarray

WIDTH, HEIGHT = 1280, 720
SIDES = [61, 62, 97, 128, 163, 164, 165, 200, 255, 327, 328, 329, 400, 512, 655, 656, 657, 719]
EDGE_BOXES: list[Box] = [
    (0, 10, 80, 210),
    (1180, 500, 1280, 720),
    (0, 0, 1280, 720),
    (3, 0, 722, 33),
    (1279, 100, 1280, 400),
    (200, 719, 900, 720),
    (7, 9, 8, 10),
    (640, 5, 642, 8),
]
"""What is left of boxes that reached over the frame's edge, down to a row, a column and a pixel."""


@functools.cache
def noise(seed: int = 0) -> Image:
    """The picture that shows arithmetic errors best: neighbouring pixels are unrelated."""
    return np.random.default_rng(seed).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)


def bars() -> Image:
    """The picture that shows wrong saturation best: full steps, which the cubic overshoots."""
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[::3] = 255
    picture[:, ::4, 1] = 255
    picture[:, ::5, 2] = 0
    return picture


def square(side: int) -> Box:
    return 150, 0, 150 + side, side


def cropped(frame: Image, *boxes: Box) -> Image:
    """crop_resize of boxes of one frame, as images (B, 328, 328, 3)."""
    index = torch.zeros(len(boxes), dtype=torch.int64)
    return crop_resize(torch.from_numpy(frame)[None], index, torch.tensor(boxes)).permute(0, 2, 3, 1).numpy()


def by_opencv(frame: Image, box: Box, interpolation: int = cv2.INTER_CUBIC) -> Image:
    xmin, ymin, xmax, ymax = box
    return opencv_resize(frame[ymin:ymax, xmin:xmax], (328, 328), interpolation)


# ── the same as OpenCV ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("picture", "side"),
    [
        *((noise, side) for side in SIDES),
        *((lambda: noise(1), side) for side in (61, 200, 719)),
        *((bars, side) for side in (61, 200, 500, 719)),
    ],
)
def test_square_boxes(picture: Callable[[], Image], side: int) -> None:
    frame = picture()
    EXACT_RESIZE.check(cropped(frame, square(side))[0], by_opencv(frame, square(side)))


@pytest.mark.parametrize("side", [61, 200, 328, 500, 719])
def test_real_frames(side: int, speaker: Path) -> None:
    for i in (0, 75, 149):
        frame = reference.read_image(speaker / "full_body_img" / f"{i}.jpg")
        box = (400, 1, 400 + side, 1 + side)
        EXACT_RESIZE.check(cropped(frame, box)[0], by_opencv(frame, box), f"frame {i}")


@pytest.mark.parametrize("box", EDGE_BOXES)
def test_boxes_that_were_clamped_to_the_frame(box: Box) -> None:
    resize_bound(box).check(cropped(noise(), box)[0], by_opencv(noise(), box))


@pytest.mark.parametrize("seed", range(3))
def test_random_boxes_of_all_shapes_in_one_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frame = noise(seed)
    low = rng.integers([0, 0], [WIDTH - 1, HEIGHT - 1], size=(6, 2))
    high = rng.integers(low + 1, [WIDTH + 1, HEIGHT + 1])
    boxes = [(*a, *b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    for box, found in zip(boxes, cropped(frame, *boxes), strict=True):
        resize_bound(box).check(found, by_opencv(frame, box), box)


@pytest.mark.skipif(not cv2.ipp.useIPP(), reason="this OpenCV has no IPP to compare with")
@pytest.mark.parametrize("side", [61, 200, 719])
def test_floats_are_resized_as_with_ipp_where_there_is_none(side: int) -> None:
    """What ARM's tests compare with; bytes would not do."""
    box = square(side)
    with_ipp, crop = by_opencv(noise(), box), noise()[inside(box)]
    cv2.ipp.setUseIPP(False)
    try:
        floats, bytes_ = by_opencv(noise(), box), cv2.resize(crop, (328, 328), interpolation=cv2.INTER_CUBIC)
    finally:
        cv2.ipp.setUseIPP(True)
    bound = Bound(1, 0.997)
    bound.check(floats, with_ipp)
    assert not bound.holds(bytes_, with_ipp)


def test_a_sample_does_not_see_its_batch() -> None:
    """Bit for bit: frames must not depend on the batch size."""
    frame = noise()[:360, :480]
    boxes = [(0, 0, 61, 61), (100, 0, 428, 328), (1, 0, 361, 360), (0, 10, 80, 210), (479, 3, 480, 203), (7, 9, 8, 10)]
    together = cropped(frame, *boxes)
    for box, found in zip(boxes, together, strict=True):
        assert np.array_equal(found, cropped(frame, box)[0]), box


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_chooses_the_frame_of_each_box(dtype: torch.dtype) -> None:
    frames = np.stack([noise(seed)[:200, :300] for seed in range(3)])
    boxes = torch.tensor([(10, 20, 90, 100), (0, 0, 150, 150), (100, 30, 200, 130)], dtype=dtype)
    index = torch.tensor([2, 0, 2])
    found = crop_resize(torch.from_numpy(frames), index, boxes)
    assert found.shape == (3, 3, 328, 328)
    assert found.dtype == torch.uint8
    for k, i in enumerate(index):
        expected = by_opencv(frames[i], tuple(boxes[k].tolist()))
        EXACT_RESIZE.check(found[k].permute(1, 2, 0).numpy(), expected, f"sample {k}")
    wrong = by_opencv(frames[1], tuple(boxes[0].tolist()))
    assert not EXACT_RESIZE.holds(found[0].permute(1, 2, 0).numpy(), wrong)


def test_side_of_328_is_the_frame_itself() -> None:
    assert np.array_equal(cropped(noise(), square(328))[0], noise()[0:328, 150:478])


@pytest.mark.parametrize("size", [(328, 328), (61, 61), (200, 77), (1, 1), (640, 480)])
@pytest.mark.parametrize("source", [(328, 328), (90, 200), (4, 5), (3, 5)])
def test_cubic_resize_between_any_sizes(source: tuple[int, int], size: tuple[int, int]) -> None:
    picture = np.random.default_rng(2).integers(256, size=(*source, 3), dtype=np.uint8)
    found = cubic_resize(torch.from_numpy(picture).permute(2, 0, 1)[None], *size)
    expected = opencv_resize(picture, size)
    bound = THIN_CROP if min(source) < 4 else EXACT_RESIZE
    bound.check(found[0].permute(1, 2, 0).numpy(), expected)


SIZES = [((side, side), (328, 328)) for side in (61, 117, 176, 223, 327, 400, 719)] + [
    ((328, 328), (width, height)) for width, height in ((61, 61), (176, 180), (223, 223), (400, 390), (719, 719))
]
"""Of crops on their way in, and of mouths on their way back: width and height."""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="PyTorch's sums were looked at on x86 only")
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_a_resize_has_the_bits_that_its_description_gives(source: tuple[int, int], target: tuple[int, int]) -> None:
    for seed in range(2):
        picture = noise(seed)[: source[1], : source[0]]
        found = cubic_resize(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None], *target)
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), ipp_resize(picture, target))


@pytest.mark.skipif(not cv2.ipp.useIPP(), reason="OpenCV has no IPP here")
def test_a_resize_has_the_bits_of_ipp_but_for_the_order_of_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is another one on other processors. Where it is the same, no value differs."""

    def differing(resize: Callable[[Image, tuple[int, int]], Image]) -> float:
        values = wrong = 0
        for (source, target), seed in itertools.product(SIZES, range(3)):
            picture = np.ascontiguousarray(noise(seed)[: source[1], : source[0]])
            expected = cv2.resize(picture, target, interpolation=cv2.INTER_CUBIC)
            difference = np.abs(resize(picture, target).astype(int) - expected)
            assert difference.max() <= 1
            values, wrong = values + difference.size, wrong + np.count_nonzero(difference)
        return wrong / values

    def ours(picture: Image, size: tuple[int, int]) -> Image:
        return cubic_resize(torch.from_numpy(picture).permute(2, 0, 1)[None], *size)[0].permute(1, 2, 0).numpy()

    assert differing(ours) <= 1e-5
    # A negative control.
    keys = parity._keys
    monkeypatch.setattr(parity, "_keys", lambda x: keys(x.astype(np.float32)))
    assert differing(ipp_resize) > 1e-5, "with weights that are rounded at each step"


def test_a_crop_is_resized_alike_however_it_lies_in_memory() -> None:
    """A row as wide as its frame becomes a view in which colours alternate."""
    for seed in range(12):
        row = torch.randint(256, (1, 32, 3), generator=torch.Generator().manual_seed(seed)).byte().permute(2, 0, 1)
        assert torch.equal(cubic_resize(row, 328, 328), cubic_resize(row.contiguous(), 328, 328)), seed


@pytest.mark.parametrize("source", [1, 2, 61, 328, 719])
def test_weights_of_each_pixel_sum_to_one(source: int) -> None:
    taps, weights = cubic_taps(source, 328)
    assert taps.min() >= 0 and taps.max() < source
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(328), atol=1e-6, rtol=0)


# ── negative controls: the bound sees what it is meant to see ─────────────────────────────────────────────────────────


def by_torch(frame: Image, box: Box, *, antialias: bool) -> Image:
    xmin, ymin, xmax, ymax = box
    crop = torch.from_numpy(frame[ymin:ymax, xmin:xmax]).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(crop, (328, 328), mode="bicubic", antialias=antialias)
    return resized.round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("side", [400, 656])
def test_bound_fails_with_antialiasing(side: int) -> None:
    box = square(side)
    EXACT_RESIZE.check(by_torch(noise(), box, antialias=False), by_opencv(noise(), box))
    for bound in (EXACT_RESIZE, THIN_CROP):
        assert not bound.holds(by_torch(noise(), box, antialias=True), by_opencv(noise(), box))


@pytest.mark.parametrize("side", [164, 656])
def test_bound_fails_with_taps_beyond_the_crop(side: int) -> None:
    """At an integer ratio a larger crop, resized and trimmed, differs only in the pixels near the edge."""
    box, border = (150, 10, 150 + side, 10 + side), 4
    trim = border * 328 // side
    larger = noise()[10 - border : 10 + side + border, 150 - border : 150 + side + border]
    frame_edge = opencv_resize(larger, (328 + 2 * trim,) * 2)[trim:-trim, trim:-trim]
    found = cropped(noise(), box)[0]
    EXACT_RESIZE.check(found[8:-8, 8:-8], frame_edge[8:-8, 8:-8])
    assert not EXACT_RESIZE.holds(found, frame_edge)


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_LANCZOS4, cv2.INTER_NEAREST])
def test_bound_fails_with_another_filter(interpolation: int) -> None:
    found = cropped(noise(), square(200))[0]
    assert not EXACT_RESIZE.holds(found, by_opencv(noise(), square(200), interpolation))


def test_bound_fails_when_truncated_instead_of_rounded() -> None:
    box = square(200)
    xmin, ymin, xmax, ymax = box
    crop = noise()[ymin:ymax, xmin:xmax].astype(np.float32)
    values = cv2.resize(crop, (328, 328), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    EXACT_RESIZE.check(values.round().astype(np.uint8), by_opencv(noise(), box))
    assert not EXACT_RESIZE.holds(values.astype(np.uint8), by_opencv(noise(), box))


@pytest.mark.parametrize("shift", [(1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1)])
def test_bound_fails_one_pixel_off(shift: Box) -> None:
    box = square(200)
    moved = tuple(a + b for a, b in zip(box, shift, strict=True))
    smooth = cv2.GaussianBlur(noise(), (0, 0), 8)
    assert not EXACT_RESIZE.holds(cropped(smooth, moved)[0], by_opencv(smooth, box))


# ── the network's image ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def crops() -> Tensor:
    """Two crops without a black pixel, so that what is masked can be seen."""
    return torch.from_numpy(np.random.default_rng(5).integers(1, 256, size=(2, 3, 328, 328), dtype=np.uint8))


def test_network_input_is_the_inner_crop_beside_the_same_masked(crops: Tensor) -> None:
    image = network_input(crops)
    assert image.shape == (2, 6, 320, 320)
    assert image.dtype == torch.float32
    for sample, crop in zip(image, crops, strict=True):
        _, stacked = reference.crop_face(crop.permute(1, 2, 0).numpy(), (0, 0, 328, 328))
        assert np.array_equal(sample.numpy(), stacked.astype(np.float32) / 255)


def test_mask_covers_310_by_305_pixels(crops: Tensor) -> None:
    inner = inner_region(crops)
    masked = mask_mouth(inner)
    black = (masked == 0).all(dim=1)
    assert torch.equal(black.sum(dim=(1, 2)), torch.tensor([305 * 310] * 2))
    assert black[:, 5:310, 5:315].all()
    assert torch.equal(masked[:, :, 310:], inner[:, :, 310:])
    assert (inner > 0).all(), "the original is left as it is"


def test_network_input_in_half_precision(crops: Tensor) -> None:
    half = network_input(crops, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, network_input(crops).half())


@pytest.mark.parametrize("channels_last", [True, False])
def test_layout_of_the_network_input_is_the_engine_s(channels_last: bool) -> None:
    frame, box = torch.from_numpy(noise()[None, :40, :60]), torch.tensor([[3, 2, 43, 40]])
    crop, image = crop_and_input(frame, torch.tensor([0]), box, dtype=torch.float16, channels_last=channels_last)
    assert image.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert torch.equal(image, network_input(crop, dtype=torch.float16))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)])
def test_bytes_moved_are_frame_crop_and_input(dtype: torch.dtype, size: int) -> None:
    assert bytes_moved((20, 10), dtype) == 20 * 10 * 3 + 328**2 * 3 + 320**2 * 6 * size
