"""Paste and blend against OpenCV, feathering against its formula, NV12 against converting the finished frame."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import mouths
from parity import EXACT_RESIZE, check_frame, inside, opencv_resize, resize_bound
from torch import Tensor

from gpupipe.benchmarks import reference_loop as reference
from gpupipe.kernels.crop_resize import crop_resize
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.kernels.paste_blend import bytes_moved, paste_blend
from gpupipe.landmarks import Box
from gpupipe.seam import feather_width, keep_mask

Image = np.ndarray

WIDTH, HEIGHT = 1280, 720
SIDES = [61, 62, 97, 163, 164, 200, 327, 328, 329, 500, 656, 719]
EDGE_BOXES: list[Box] = [
    (0, 10, 80, 210),
    (1180, 500, 1280, 720),
    (0, 0, 1280, 720),
    (3, 0, 722, 33),
    (1279, 100, 1280, 400),
    (7, 9, 8, 10),
]


@functools.cache
def noise(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def square(side: int) -> Box:
    return 150, 0, 150 + side, side


def finished(
    mouth: Tensor, crops: Tensor, frames: Tensor, index: Tensor, boxes: Tensor, *, feather: float, keep: Tensor | None
) -> Tensor:
    """paste_blend of BGR frames, the k-th crop for sample k."""
    places = (torch.arange(len(index)), frames, index, boxes, frames[index])
    return paste_blend(mouth, crops, *places, nv12=False, feather=feather, keep=keep)


def pasted(frame: Image, box: Box, mouth: Tensor, *, feather: float = 0.0, parsing: Image | None = None) -> Image:
    """The same of one sample."""
    frames, index, boxes = torch.from_numpy(frame)[None], torch.tensor([0]), torch.tensor([box])
    crops = crop_resize(frames, index, boxes)
    keep = None if parsing is None else keep_mask(torch.from_numpy(parsing))[None]
    return finished(mouth, crops, frames, index, boxes, feather=feather, keep=keep)[0].numpy()


def by_opencv(
    frame: Image,
    box: Box,
    mouth: Tensor,
    parsing: Image | None = None,
    *,
    alter: Callable[[Image], object] | None = None,
) -> Image:
    """The reference's paste; ``alter`` changes the crop from which the ring comes."""
    crop, _ = reference.crop_face(frame, box)
    if alter is not None:
        alter(crop)
    painted = (mouth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return reference.paste_face(frame, box, crop, painted, parsing)


def check(found: Image, expected: Image, box: Box) -> None:
    check_frame(found, expected, box, resize_bound(box))


# ── the hard edge: the same as OpenCV ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("seed", "side"), [*((0, side) for side in SIDES), (1, 61), (1, 200), (1, 719)])
def test_square_boxes(seed: int, side: int) -> None:
    frame, mouth = noise(seed), mouths(1, seed)
    check(pasted(frame, square(side), mouth), by_opencv(frame, square(side), mouth), square(side))


@pytest.mark.parametrize("box", EDGE_BOXES)
def test_boxes_that_were_clamped_to_the_frame(box: Box) -> None:
    check(pasted(noise(), box, mouths(1)), by_opencv(noise(), box, mouths(1)), box)


@pytest.mark.parametrize("side", [61, 200, 500, 719])
def test_real_frames(side: int, speaker: Path) -> None:
    for i in (0, 149):
        frame = reference.read_image(speaker / "full_body_img" / f"{i}.jpg")
        box = (400, 1, 400 + side, 1 + side)
        smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (320, 320), mode="bilinear")
        check(pasted(frame, box, smooth), by_opencv(frame, box, smooth), box)


@pytest.mark.parametrize("feather", [0.0, 8.0])
def test_a_sample_does_not_see_its_batch(feather: float) -> None:
    """Boxes of all sizes and several frames in one batch: each bit-equal to itself alone; the template is unchanged."""
    frames = torch.from_numpy(np.stack([noise(seed, 360, 480) for seed in range(2)]))
    before = frames.clone()
    boxes = torch.tensor([(0, 0, 61, 61), (1, 0, 361, 360), (0, 10, 80, 210), (479, 3, 480, 203), (7, 9, 8, 10)])
    index = torch.arange(len(boxes)) % 2
    mouth = mouths(len(boxes))
    crops = crop_resize(frames, index, boxes)
    together = finished(mouth, crops, frames, index, boxes, feather=feather, keep=None)
    for k in range(len(boxes)):
        one = slice(k, k + 1)
        alone = finished(mouth[one], crops[one], frames, index[one], boxes[one], feather=feather, keep=None)
        assert torch.equal(together[k], alone[0]), boxes[k].tolist()
    assert torch.equal(frames, before)


@pytest.mark.parametrize(("level", "value"), [(0.0, 0), (0.5, 127), (254.9 / 255, 254), (1.0, 255)])
def test_output_is_truncated_not_rounded(level: float, value: int) -> None:
    found = pasted(noise(), square(328), torch.full((1, 3, 320, 320), level))
    assert (found[4:324, 154:474] == value).all()


def test_uint8_mouth_is_taken_as_it_is() -> None:
    mouth = mouths(1)
    scaled = (mouth * 255).to(torch.uint8)
    assert np.array_equal(pasted(noise(), square(200), scaled), pasted(noise(), square(200), mouth))


def test_colours_stay_in_order() -> None:
    mouth = torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 320, 320)
    assert pasted(noise(), square(328), mouth)[160, 300].tolist() == [255, 127, 0]


@pytest.mark.parametrize("box", [square(200), square(61), EDGE_BOXES[0]])
def test_parsing_keeps_the_template_s_pixels(box: Box) -> None:
    colours = np.array([(0, 0, 255), (255, 255, 255), (0, 0, 254), (255, 0, 0)], dtype=np.uint8)
    parsing = colours[np.random.default_rng(0).integers(4, size=(HEIGHT, WIDTH))]
    mouth = mouths(1)
    found = pasted(noise(), box, mouth, parsing=parsing)
    check(found, by_opencv(noise(), box, mouth, parsing), box)
    keep = (parsing == colours[0]).all(axis=2) | (parsing == colours[1]).all(axis=2)
    assert np.array_equal(found[keep], noise()[keep])
    assert not EXACT_RESIZE.holds(found[inside(box)], by_opencv(noise(), box, mouth)[inside(box)])


# ── negative controls ─────────────────────────────────────────────────────────────────────────────────────────────────


def blacken(crop: Image) -> None:
    crop[:] = 0


def test_bound_fails_with_a_black_ring() -> None:
    """The black rim that one of the seed's programs drew."""
    for side in (61, 300):
        box, mouth = square(side), mouths(1)
        wrong = by_opencv(noise(), box, mouth, alter=blacken)
        assert not EXACT_RESIZE.holds(pasted(noise(), box, mouth)[inside(box)], wrong[inside(box)])


def test_bound_fails_without_the_ring() -> None:
    """With the mouth stretched over the whole box."""
    box, mouth = square(200), mouths(1)
    wrong = noise().copy()
    painted = (mouth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    wrong[inside(box)] = opencv_resize(painted, (200, 200))
    assert not EXACT_RESIZE.holds(pasted(noise(), box, mouth)[inside(box)], wrong[inside(box)])


@pytest.mark.parametrize("side", [61, 200])
def test_bound_fails_with_antialiasing(side: int) -> None:
    box, mouth = square(side), mouths(1)
    crop, _ = reference.crop_face(noise(), box)
    crop[4:324, 4:324] = (mouth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    canvas = torch.from_numpy(crop).permute(2, 0, 1)[None].float()
    found = pasted(noise(), box, mouth)[inside(box)]
    for antialias in (False, True):
        face = torch.nn.functional.interpolate(canvas, (side, side), mode="bicubic", antialias=antialias)
        face = face.round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        assert EXACT_RESIZE.holds(found, face) != antialias


def test_bound_fails_when_the_mouth_is_rounded() -> None:
    box, mouth = square(200), mouths(1)
    rounded = by_opencv(noise(), box, (mouth * 255).round() / 255 + 1e-4)
    assert not EXACT_RESIZE.holds(pasted(noise(), box, mouth)[inside(box)], rounded[inside(box)])


# ── the feathered seam ────────────────────────────────────────────────────────────────────────────────────────────────


def feathered(frame: Image, painted: Image, box: Box, feather: float) -> Image:
    """Feathering by its formula, pixel by pixel: min(1, (distance to the box's nearest edge + ½) / feather)."""
    xmin, ymin, xmax, ymax = box
    y, x = np.mgrid[ymin:ymax, xmin:xmax]
    distance = np.minimum.reduce([x - xmin, xmax - 1 - x, y - ymin, ymax - 1 - y])
    alpha = np.minimum(1, (distance + 0.5) / feather)[..., None]
    expected = frame.copy()
    mixed = (1 - alpha) * frame[inside(box)] + alpha * painted[inside(box)]
    expected[inside(box)] = np.rint(mixed).astype(np.uint8)
    return expected


@pytest.mark.parametrize("feather", [1.0, 3.7, 8.0, 40.0, 1000.0])
@pytest.mark.parametrize("box", [square(61), square(300), EDGE_BOXES[0], (3, 0, 322, 33), (7, 9, 8, 10)])
def test_feather_follows_its_formula(box: Box, feather: float) -> None:
    mouth = mouths(1)
    hard = pasted(noise(), box, mouth)
    check(pasted(noise(), box, mouth, feather=feather), feathered(noise(), hard, box, feather), box)


@pytest.mark.parametrize("feather", [0.0, 0.25, 0.5])
def test_a_seam_of_half_a_pixel_is_hard(feather: float) -> None:
    box, mouth = square(200), mouths(1)
    assert np.array_equal(pasted(noise(), box, mouth, feather=feather), pasted(noise(), box, mouth))


def test_a_seam_may_be_left_out() -> None:
    assert feather_width("feather", 3.5) == 3.5
    assert feather_width("feather", 0) == feather_width("none", 5.0) == 0


def test_bound_fails_on_another_width() -> None:
    box, mouth = square(200), mouths(1)
    hard = pasted(noise(), box, mouth)
    found = pasted(noise(), box, mouth, feather=8.0)[inside(box)]
    for other in (7.0, 9.0):
        assert not EXACT_RESIZE.holds(found, feathered(noise(), hard, box, other)[inside(box)])
    assert not EXACT_RESIZE.holds(found, hard[inside(box)])


def test_feather_fades_from_the_template_to_the_mouth() -> None:
    frame = np.full((200, 200, 3), 200, dtype=np.uint8)
    found = pasted(frame, (50, 50, 150, 150), torch.zeros(1, 3, 320, 320), feather=20.0)
    profile = found[100, 50:100, 0].astype(int)
    assert (np.diff(profile) <= 0).all()
    assert profile[0] == 200
    assert (profile[25:] == 0).all()
    assert len(set(profile[2:20].tolist())) == 18, "a step in every pixel of the seam"


def test_kept_pixels_are_kept_in_the_seam_too() -> None:
    parsing = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    parsing[:, 200:260] = 255
    found = pasted(noise(), square(200), mouths(1), feather=40.0, parsing=parsing)
    assert np.array_equal(found[:, 200:260], noise()[:, 200:260])
    without = pasted(noise(), square(200), mouths(1), feather=40.0)
    assert np.array_equal(found[:, 260:], without[:, 260:])
    assert not np.array_equal(found, without)


# ── NV12 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def both_ways(frames: Tensor, boxes: list[Box], *, feather: float, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finished as NV12, and as BGR followed by to_nv12, of one batch."""
    index = torch.arange(len(boxes)) % len(frames)
    mouth, places = mouths(len(boxes)), torch.tensor(boxes)
    crops = crop_resize(frames, index, places)
    background = to_nv12(frames)[index]
    where = (torch.arange(len(boxes)), frames, index, places, background.clone())
    direct = paste_blend(mouth, crops, *where, nv12=True, feather=feather, keep=keep)
    assert not torch.equal(direct, background)
    return direct, to_nv12(finished(mouth, crops, frames, index, places, feather=feather, keep=keep))


@pytest.mark.parametrize(("with_keep", "feather"), [(False, 0.0), (True, 8.0)])
def test_nv12_is_the_converted_frame_for_every_parity_of_the_box(with_keep: bool, feather: float) -> None:
    """2×2 cells that the box's edge cuts through get part of their colour from outside the box."""
    frames = torch.from_numpy(np.stack([noise(seed, 128, 192) for seed in range(2)]))
    keep = torch.rand(2, 128, 192, generator=torch.Generator().manual_seed(0)) < 0.3 if with_keep else None
    boxes = [(40 + a, 20 + b, 100 + c, 80 + d) for a, b, c, d in product((0, 1), repeat=4)]
    direct, converted = both_ways(frames, boxes, feather=feather, keep=keep)
    assert torch.equal(direct, converted)


@pytest.mark.parametrize(
    "boxes",
    [
        [(0, 0, 192, 128), (191, 0, 192, 128), (0, 127, 192, 128)],
        [(5, 5, 6, 6), (0, 0, 1, 1), (191, 127, 192, 128)],
        [(1, 1, 62, 62), (17, 3, 140, 126), (9, 0, 190, 128), (0, 31, 191, 97)],
    ],
)
def test_nv12_at_the_edges_and_of_mixed_sizes(boxes: list[Box]) -> None:
    direct, converted = both_ways(torch.from_numpy(noise(0, 128, 192))[None], boxes, feather=3.0)
    assert torch.equal(direct, converted)


def test_nv12_of_real_frames(speaker: Path) -> None:
    names = [speaker / "full_body_img" / f"{i}.jpg" for i in (3, 77)]
    frames = torch.from_numpy(np.stack([reference.read_image(name) for name in names]))
    direct, converted = both_ways(frames, [(401, 33, 602, 234), (501, 1, 901, 401)], feather=8.0)
    assert torch.equal(direct, converted)


def test_nv12_is_written_into_the_background() -> None:
    frames = torch.from_numpy(noise(0, 128, 192))[None]
    index, boxes = torch.tensor([0]), torch.tensor([(10, 10, 90, 90)])
    background = to_nv12(frames)
    crops = crop_resize(frames, index, boxes)
    found = paste_blend(mouths(1), crops, index, frames, index, boxes, background, nv12=True)
    assert found.data_ptr() == background.data_ptr()
    assert torch.equal(found, background)


@pytest.mark.parametrize(
    ("nv12", "frame_and_box"), [(False, 2 * 20 * 10 * 3), (True, 2 * 20 * 10 * 3 // 2 + 6 * 4 * 3)]
)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)])
def test_bytes_moved_are_counted(dtype: torch.dtype, size: int, nv12: bool, frame_and_box: int) -> None:
    ring = 3 * (328**2 - 320**2)
    assert bytes_moved((20, 10), (6, 4), dtype, nv12=nv12) == frame_and_box + 3 * 320**2 * size + ring
