"""The crop_resize kernel, interpreted or on the GPU, against the plain-torch reference and OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import EXACT_RESIZE, Bound, opencv_resize, resize_bound
from torch import Tensor

pytest.importorskip("triton")

from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.kernels.crop_resize import crop_and_input, crop_resize, mask_mouth, network_input
from gpupipe.kernels.crop_resize_triton import crop_resize_triton
from gpupipe.landmarks import Box

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SAME = Bound(1, 0.9999) if INTERPRETED else Bound(0, 1.0)
"""Bound against the reference: the same arithmetic, but that the interpreter rounds a multiply-add twice."""

WIDTH, HEIGHT = 230, 210
BOXES: list[Box] = [
    (20, 9, 81, 70),
    (0, 0, 97, 97),
    (48, 28, 230, 210),
    (0, 0, 230, 210),
    (229, 3, 230, 203),
    (5, 209, 170, 210),
    (7, 9, 8, 10),
    (3, 0, 223, 33),
]


def noise(count: int = 1, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randint(
        256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def planes(crop: np.ndarray) -> np.ndarray:
    """cv2.resize to 328×328, as (3, 328, 328)."""
    return opencv_resize(crop, (328, 328)).transpose(2, 0, 1)


def cut(
    frames: Tensor,
    index: list[int],
    boxes: list[Box],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """The kernel, its results on the CPU."""
    places = torch.tensor(index, device=DEVICE), torch.tensor(boxes, device=DEVICE)
    crops, image = crop_resize_triton(frames.to(DEVICE), *places, dtype=dtype, channels_last=channels_last)
    return crops.cpu(), image.cpu()


def crop328(frame: Tensor, box: Box) -> np.ndarray:
    return cut(frame[None], [0], [box])[0][0].numpy()


def check(frame: Tensor, box: Box) -> None:
    found = crop328(frame, box)
    SAME.check(found, crop_resize(frame[None], torch.tensor([0]), torch.tensor([box]))[0].numpy(), box)
    xmin, ymin, xmax, ymax = box
    resize_bound(box).check(found, planes(frame[ymin:ymax, xmin:xmax].numpy()), box)


# ── crop328 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("box", BOXES)
def test_crop_matches_reference_and_opencv(box: Box) -> None:
    check(noise()[0], box)


@pytest.mark.parametrize("side", [327, 328, 329, 500, 719])
def test_large_crop_matches_reference_and_opencv(side: int) -> None:
    check(noise(height=720, width=900)[0], (150, 1, 150 + side, 1 + side))


def test_samples_of_a_batch_take_their_own_frames_and_boxes() -> None:
    frames, index = noise(3), [2, 0, 2]
    together, _ = cut(frames, index, BOXES[:3])
    for k, i in enumerate(index):
        assert np.array_equal(together[k].numpy(), crop328(frames[i], BOXES[k])), BOXES[k]


def test_frames_may_be_a_window_of_larger_ones() -> None:
    frames = noise(2)
    window = frames[:, 11:151, 7:187]
    crops, _ = cut(window if DEVICE == "cpu" else frames.to(DEVICE)[:, 11:151, 7:187], [1], [(3, 5, 100, 102)])
    assert np.array_equal(crops[0].numpy(), crop328(window[1].contiguous(), (3, 5, 100, 102)))


def test_frames_beyond_two_gibibytes_are_found() -> None:
    """Frame 2 begins at byte 2³¹. Most of the bank is never written: untouched pages cost no memory."""
    frame = noise()[0]
    bank = torch.empty((1 << 31) + frame.numel(), dtype=torch.uint8, device=DEVICE)
    frames = bank.as_strided((3, HEIGHT, WIDTH, 3), (1 << 30, WIDTH * 3, 3, 1))
    frames[2] = frame.to(DEVICE)
    places = torch.tensor([2], device=DEVICE), torch.tensor([BOXES[0]], device=DEVICE)
    crops, _ = crop_resize_triton(frames, *places, dtype=torch.float32)
    assert np.array_equal(crops[0].cpu().numpy(), crop328(frame, BOXES[0]))


def test_an_empty_batch_is_empty() -> None:
    frames = noise().to(DEVICE)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    crops, image = crop_resize_triton(frames, nothing, nothing.view(0, 4), dtype=torch.float32)
    assert crops.shape == (0, 3, 328, 328) and image.shape == (0, 6, 320, 320)


def test_gaps_between_pixels_are_an_error() -> None:
    with pytest.raises(ValueError, match="strides"):
        cut(noise().flip(3).permute(0, 2, 1, 3), [0], BOXES[:1])


# ── the network's input ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)]
)
def test_network_input_is_bit_equal_to_the_crop(dtype: torch.dtype, channels_last: bool) -> None:
    frames = noise(2)
    crops, image = cut(frames, [1], BOXES[:1], dtype=dtype, channels_last=channels_last)
    assert np.array_equal(crops[0].numpy(), crop328(frames[1], BOXES[0]))
    assert image.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert image.is_contiguous(memory_format=layout)
    assert torch.equal(image, network_input(crops, dtype=dtype))


def test_all_256_values_are_divided_exactly() -> None:
    """A 328×328 box is copied pixel for pixel, and its values ÷ 255 are correctly rounded."""
    frame = (torch.arange(328 * 328 * 3) % 256).to(torch.uint8).view(328, 328, 3)
    _, image = cut(frame[None], [0], [(0, 0, 328, 328)])
    inner = frame[4:324, 4:324].permute(2, 0, 1)
    assert len(inner.unique()) == 256
    assert torch.equal(image[0, :3], inner.float() / 255)
    assert torch.equal(image[0, 3:], mask_mouth(inner.float() / 255))


def test_float32_is_not_written_channels_last() -> None:
    with pytest.raises(ValueError, match="float32"):
        cut(noise(), [0], BOXES[:1], channels_last=True)


# ── negative controls ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_bound_fails_with_taps_beyond_the_crop() -> None:
    """As if the crop were resized with its surroundings: only the outermost pixels differ."""
    frame, (x0, y0, x1, y1) = noise()[0], BOXES[0]
    side, margin = x1 - x0, 4
    around = frame[y0 - margin : y1 + margin, x0 - margin : x1 + margin].permute(2, 0, 1)[None].float()
    place = (torch.arange(328) + 0.5) * side / 328 - 0.5 + margin
    grid = (place + 0.5) * 2 / (side + 2 * margin) - 1
    mesh = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)[None]
    wrong = torch.nn.functional.grid_sample(around, mesh, mode="bicubic", align_corners=False)
    wrong = wrong.round().clamp(0, 255).byte()[0].numpy()
    found = crop328(frame, BOXES[0])
    middle = np.s_[:, 20:-20, 20:-20]
    assert Bound(1, 0.99).holds(found[middle], wrong[middle])
    assert not EXACT_RESIZE.holds(found, wrong)


@pytest.mark.parametrize("antialias", [False, True])
def test_bound_fails_with_antialiasing(antialias: bool) -> None:
    frame = noise(height=500, width=500)
    wrong = torch.nn.functional.interpolate(
        frame.permute(0, 3, 1, 2).float(), (328, 328), mode="bicubic", antialias=antialias
    )
    found = crop328(frame[0], (0, 0, 500, 500))
    assert EXACT_RESIZE.holds(found, wrong.round().clamp(0, 255).byte()[0].numpy()) != antialias


def test_bound_fails_for_the_neighbouring_box() -> None:
    frame = noise()[0]
    assert not EXACT_RESIZE.holds(crop328(frame, (20, 9, 81, 70)), crop328(frame, (21, 9, 82, 70)))


# ── at the size it is made for ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)]
)
def test_whole_batches_on_the_gpu(dtype: torch.dtype, channels_last: bool) -> None:
    frames = noise(16, 720, 1280)
    sides = torch.tensor([61, 182, 182, 183, 327, 329, 500, 719]).repeat(8)
    corner = torch.stack([torch.arange(64) * 8 % (1281 - sides), torch.arange(64) % (721 - sides)], dim=1)
    boxes = torch.cat([corner, corner + sides[:, None]], dim=1)
    index = torch.arange(64) % 16
    places = frames.cuda(), index.cuda(), boxes.cuda()
    crops, image = crop_and_input(*places, dtype=dtype, channels_last=channels_last)
    SAME.check(crops.cpu().numpy(), crop_resize(frames, index, boxes).numpy())
    assert torch.equal(image.cpu(), network_input(crops.cpu(), dtype=dtype))
