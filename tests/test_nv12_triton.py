"""The NV12 kernels, interpreted or on the GPU: in integers, so that they are bit-equal to the plain reference."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from parity import Bound
from torch import Tensor

pytest.importorskip("triton")

from gpupipe.kernels.nv12 import from_nv12, to_nv12
from gpupipe.kernels.nv12_triton import from_nv12_triton, to_nv12_triton, vectorizable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = [(1, 2, 2), (2, 6, 10), (1, 64, 2), (3, 14, 30), (1, 2, 16), (1, 34, 112), (1, 6, 48)]
"""Frames, height, width. Multiples of 16 pixels go the wide way."""


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def planes(count: int, height: int, width: int) -> Tensor:
    """NV12 of random bytes, also outside the limited range."""
    return noise(count, height // 2, width)[..., 0].new_tensor(
        np.random.default_rng(0).integers(256, size=(count, height // 2 * 3, width))
    )


@pytest.mark.parametrize("size", SIZES)
def test_to_nv12_is_bit_equal_to_the_reference(size: tuple[int, int, int]) -> None:
    frames = noise(*size)
    assert vectorizable(frames) == (size[2] % 16 == 0)
    assert torch.equal(to_nv12_triton(frames.to(DEVICE)).cpu(), to_nv12(frames))


@pytest.mark.parametrize("size", SIZES)
def test_from_nv12_is_bit_equal_to_the_reference(size: tuple[int, int, int]) -> None:
    frames = planes(*size)
    assert torch.equal(from_nv12_triton(frames.to(DEVICE)).cpu(), from_nv12(frames))


@pytest.mark.parametrize("width", [6, 16])
def test_extreme_colours(width: int) -> None:
    """Here the sums come closest to overflowing 32 bits."""
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    rows = torch.tensor(colours, dtype=torch.uint8).repeat_interleave(2, dim=0)
    frames = rows[None, :, None].expand(1, -1, width, 3).contiguous()
    converted = to_nv12_triton(frames.to(DEVICE))
    assert torch.equal(converted.cpu(), to_nv12(frames))
    back = from_nv12_triton(converted).cpu()
    assert (back.int() - frames.int()).abs().max() <= 3


@pytest.mark.parametrize("offset", [0, 1])
def test_frames_that_are_not_aligned_in_memory(offset: int) -> None:
    """A window of larger frames, and a batch that begins at an odd byte."""
    large = noise(2, 12, 40).to(DEVICE)
    window = large[:, 2:10, offset : offset + 16]
    assert not vectorizable(window)
    assert torch.equal(to_nv12_triton(window).cpu(), to_nv12(window.cpu().contiguous()))
    count = 2 * 3 * 4 * 16
    shifted = torch.zeros(count + 16, dtype=torch.uint8, device=DEVICE)[offset : offset + count].view(2, 12, 16)
    shifted.copy_(planes(2, 8, 16))
    assert vectorizable(shifted) == (offset == 0)
    assert torch.equal(from_nv12_triton(shifted).cpu(), from_nv12(shifted.cpu()))


def test_frames_beyond_two_gibibytes_are_found() -> None:
    """Frame 1 begins at byte 2³¹; untouched pages cost no memory."""
    frame = noise(1, 4, 6)
    bank = torch.empty((1 << 31) + frame.numel(), dtype=torch.uint8, device=DEVICE)
    frames = bank.as_strided((2, 4, 6, 3), (1 << 31, 18, 3, 1))
    frames[0] = frames[1] = frame[0].to(DEVICE)
    assert torch.equal(to_nv12_triton(frames).cpu(), to_nv12(frame.expand(2, -1, -1, -1)))


def test_an_empty_batch_is_empty() -> None:
    assert to_nv12_triton(noise(0, 4, 16).to(DEVICE)).shape == (0, 6, 16)
    assert from_nv12_triton(planes(0, 4, 16).to(DEVICE)).shape == (0, 4, 16, 3)


# ── against OpenCV, and negative controls ─────────────────────────────────────────────────────────────────────────────


def by_opencv(bgr: np.ndarray) -> np.ndarray:
    """OpenCV's I420 is BT.601 in limited range: only the layout of its luma plane is the same."""
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420)


def test_grey_equals_opencv_s_and_colour_does_not() -> None:
    """Grey is the same in BT.601 and BT.709; a wrong matrix shows in colours."""
    grey = np.repeat(np.random.default_rng(0).integers(256, size=(4, 32, 1), dtype=np.uint8), 3, axis=2)
    colour = noise(1, 4, 32)[0].numpy()
    bound = Bound(1, 0.9)
    for frame, same in ((grey, True), (colour, False)):
        found = to_nv12_triton(torch.from_numpy(frame)[None].to(DEVICE))[0, :4].cpu().numpy()
        assert bound.holds(found, by_opencv(frame)[:4]) == same


@pytest.mark.parametrize("width", [30, 32])
def test_the_orders_of_colours_and_of_chroma_matter(width: int) -> None:
    frames = noise(1, 4, width)
    found = to_nv12_triton(frames.to(DEVICE)).cpu()
    assert not torch.equal(found, to_nv12(frames.flip(-1)))
    swapped = to_nv12(frames)
    swapped[:, 4:] = swapped[:, 4:].view(1, 2, -1, 2).flip(3).flatten(2)
    assert not torch.equal(found, swapped)


# ── at the size it is made for ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize("size", [(64, 720, 1280), (16, 1080, 1920), (3, 722, 1282)])
def test_whole_batches_on_the_gpu(size: tuple[int, int, int]) -> None:
    frames = noise(*size)
    converted = to_nv12(frames.cuda())
    assert torch.equal(converted.cpu(), to_nv12(frames))
    assert torch.equal(from_nv12(converted).cpu(), from_nv12(converted.cpu()))
