"""BT.709 limited-range NV12: against the standard's colours, its formula in double precision, and FFmpeg's swscale."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from parity import Bound

from gpupipe.benchmarks.reference_loop import read_image
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.kernels.nv12 import bytes_moved, from_nv12, nv12_window, to_nv12, to_nv12_torch

Image = np.ndarray

EXACT = Bound(1, 0.999)
"""Bound against the formula in double precision: float32 may round a half the other way."""

SWSCALE = Bound(1, 0.98)
"""Bound against swscale, which works in 15-bit integers."""


def noise(seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(256, size=(96, 128, 3), dtype=np.uint8)


def smooth(seed: int = 0) -> Image:
    coarse = np.random.default_rng(seed).integers(256, size=(5, 6, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (128, 96), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


PICTURES = [noise(), smooth(), smooth(1)]


def converted(bgr: Image) -> Image:
    return to_nv12(torch.from_numpy(bgr)[None])[0].numpy()


def by_formula(bgr: Image, kr: float = 0.2126, kb: float = 0.0722, *, limited: bool = True) -> Image:
    """NV12 by ITU-R BT.709-6 §3, with each cell's chroma from the mean of its four pixels, rounded half up."""
    b, g, r = np.moveaxis(bgr.astype(np.float64) / 255, 2, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    if limited:
        y, cb, cr = 219 * y + 16, 224 * cb + 128, 224 * cr + 128
    else:
        y, cb, cr = 255 * y, 255 * cb + 128, 255 * cr + 128
    height, width = y.shape
    cells = np.stack([c.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)) for c in (cb, cr)], axis=-1)
    planes = np.concatenate([y, cells.reshape(height // 2, width)])
    return np.floor(planes + 0.5).clip(0, 255).astype(np.uint8)


# ── RGB to NV12 ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("bgr", "ycbcr"),
    [
        ((0, 0, 0), (16, 128, 128)),
        ((255, 255, 255), (235, 128, 128)),
        ((128, 128, 128), (126, 128, 128)),
        ((0, 0, 255), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((255, 0, 0), (32, 240, 118)),
    ],
)
def test_standard_colours(bgr: tuple[int, int, int], ycbcr: tuple[int, int, int]) -> None:
    found = converted(np.full((4, 6, 3), bgr, dtype=np.uint8))
    assert found.shape == (6, 6)
    y, cb, cr = ycbcr
    assert (found[:4] == y).all()
    assert (found[4:, 0::2] == cb).all()
    assert (found[4:, 1::2] == cr).all()


@pytest.mark.parametrize("picture", range(len(PICTURES)))
def test_agrees_with_the_formula(picture: int) -> None:
    EXACT.check(converted(PICTURES[picture]), by_formula(PICTURES[picture]))


def test_real_frame(speaker: Path) -> None:
    frame = read_image(speaker / "full_body_img" / "5.jpg")
    EXACT.check(converted(frame), by_formula(frame))


def test_grey_has_no_colour() -> None:
    grey = np.repeat(noise()[..., :1], 3, axis=2)
    assert (converted(grey)[96:] == 128).all()


@pytest.mark.parametrize(("wrong", "bound"), [("bt601", EXACT), ("full_range", EXACT), ("rgb_order", EXACT)])
def test_bound_fails_on_another_convention(wrong: str, bound: Bound) -> None:
    for bgr in PICTURES:
        other = {
            "bt601": lambda bgr: by_formula(bgr, 0.299, 0.114),
            "full_range": lambda bgr: by_formula(bgr, limited=False),
            "rgb_order": lambda bgr: by_formula(np.ascontiguousarray(bgr[..., ::-1])),
        }[wrong](bgr)
        assert not bound.holds(converted(bgr), other)


def test_bound_fails_with_chroma_of_the_left_pixels() -> None:
    """Chroma belongs in the middle of its four pixels, not beside the left ones, where MPEG-2 puts it."""
    left = noise()
    left[:, 1::2] = left[:, 0::2]
    assert EXACT.holds(converted(noise())[:96, 0::2], converted(left)[:96, 0::2])
    assert not EXACT.holds(converted(noise())[96:], converted(left)[96:])


def by_swscale(bgr: Image, colorspace: Colorspace) -> Image:
    """NV12 by swscale, with INTER_AREA, which averages a cell's four pixels."""
    frame = av.VideoFrame.from_ndarray(bgr, format="bgr24")
    return frame.reformat(
        format="nv12",
        src_colorspace=colorspace,
        dst_colorspace=colorspace,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.AREA,
    ).to_ndarray()


@pytest.mark.parametrize("picture", range(len(PICTURES)))
def test_agrees_with_swscale(picture: int) -> None:
    found = converted(PICTURES[picture])
    SWSCALE.check(found, by_swscale(PICTURES[picture], Colorspace.ITU709))
    assert not SWSCALE.holds(found, by_swscale(PICTURES[picture], Colorspace.ITU601))


def test_region_of_whole_cells_is_a_part_of_the_frame() -> None:
    frame = torch.from_numpy(noise())[None]
    luma, chroma = nv12_window(to_nv12(frame), (20, 10, 90, 50))
    assert luma.shape == (1, 40, 70) and chroma.shape == (1, 20, 70)
    assert torch.equal(to_nv12(frame[:, 10:50, 20:90]), torch.cat([luma, chroma], dim=1))


def test_frames_of_a_batch_do_not_see_each_other() -> None:
    batch = torch.from_numpy(np.stack(PICTURES))
    assert torch.equal(to_nv12(batch), torch.stack([to_nv12(frame[None])[0] for frame in batch]))


@pytest.mark.parametrize(("width", "height"), [(40_000, 4), (1280, 104)])  # less than two rows at once, and 51
def test_a_frame_larger_than_what_is_converted_at_once(width: int, height: int) -> None:
    frame = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    found = to_nv12_torch(frame, torch.zeros(1, height * 3 // 2, width, dtype=torch.uint8))
    assert torch.equal(found[:, :, :100], to_nv12(frame[:, :, :100]))


@pytest.mark.skipif(llvm_obstacle() is not None, reason=f"LLVM kernels do not run here: {llvm_obstacle()}")
@pytest.mark.parametrize(("width", "height"), [(32, 2), (34, 6), (62, 4), (320, 10), (1918, 4)])
def test_the_llvm_kernel_makes_the_same_bits(width: int, height: int) -> None:
    from gpupipe.kernels import nv12_llvm

    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    frames[1] = frames[1] // 128 * 255
    assert nv12_llvm.takes(frames) and not nv12_llvm.takes(frames.flip(2).transpose(1, 2))
    found, expected = (
        convert(frames, torch.zeros(2, height * 3 // 2, width, dtype=torch.uint8))
        for convert in (nv12_llvm.to_nv12_llvm, to_nv12_torch)
    )
    assert torch.equal(found, expected)
    assert not torch.equal(nv12_llvm.to_nv12_llvm(frames.flip(-1), found.clone()), expected), "colours the other way"


@pytest.mark.skipif(llvm_obstacle() is not None, reason=f"LLVM kernels do not run here: {llvm_obstacle()}")
@pytest.mark.parametrize(("width", "height"), [(32, 2), (34, 6), (62, 4), (320, 10), (1918, 4)])
def test_the_llvm_kernel_makes_the_same_bits_on_the_way_back(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpupipe.kernels import nv12, nv12_llvm

    frames = torch.randint(0, 256, (2, height * 3 // 2, width), dtype=torch.uint8)
    frames[1] = frames[1] // 128 * 255  # values that saturate
    assert nv12_llvm.takes(frames)
    found = from_nv12(frames)
    monkeypatch.setattr(nv12_llvm, "from_nv12_llvm", pytest.fail)
    monkeypatch.setattr(nv12, "backend", lambda device: "torch")
    assert torch.equal(found, from_nv12(frames))
    assert not torch.equal(found, from_nv12(frames.flip(2))), "Cb and Cr exchanged"


def test_what_the_llvm_kernel_does_not_take_is_converted_too() -> None:
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(to_nv12(frames)[:, :64, :30], to_nv12(frames[:, :, :30])[:, :64]), "too narrow"
    assert torch.equal(to_nv12(frames.transpose(1, 2)), to_nv12(frames.transpose(1, 2).contiguous())), "not contiguous"


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5, 5)])
def test_odd_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"^frames are {shape[1]}×{shape[0]}; NV12 needs an even width and height"):
        to_nv12(torch.zeros(1, *shape, 3, dtype=torch.uint8))


def test_bytes_moved_are_picture_and_nv12() -> None:
    assert bytes_moved((4, 2)) == 4 * 2 * 3 + 4 * 2 * 3 // 2


# ── and back ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ROUND_TRIP = Bound(3, 0.2)
"""8-bit limited range has fewer colours than 8-bit RGB: one step of chroma is two steps of blue."""


def cells() -> Image:
    """A picture of one colour in each 2×2 cell, which 4:2:0 can hold."""
    return np.repeat(np.repeat(noise()[::2, ::2], 2, axis=0), 2, axis=1)


def test_round_trip() -> None:
    picture = torch.from_numpy(cells())[None]
    back = from_nv12(to_nv12(picture))
    assert back.shape == picture.shape
    ROUND_TRIP.check(back.numpy(), picture.numpy())
    assert not ROUND_TRIP.holds(back.flip(-1).numpy(), picture.numpy())


@pytest.mark.parametrize(
    ("ycbcr", "bgr"),
    [
        ((16, 128, 128), (0, 0, 0)),
        ((235, 128, 128), (255, 255, 255)),
        ((63, 102, 240), (0, 0, 255)),
        ((173, 42, 26), (0, 255, 0)),
        ((32, 240, 118), (255, 0, 0)),
        ((0, 128, 128), (0, 0, 0)),
        ((255, 128, 128), (255, 255, 255)),
    ],
)
def test_standard_colours_come_back(ycbcr: tuple[int, int, int], bgr: tuple[int, int, int]) -> None:
    """Within the one step of their rounding to 8 bits; values outside the limited range saturate."""
    y, cb, cr = ycbcr
    planes = torch.tensor([[y, y], [y, y], [cb, cr]], dtype=torch.uint8)[None]
    found = from_nv12(planes)
    assert found.shape == (1, 2, 2, 3)
    assert (found.int() - torch.tensor(bgr)).abs().max() <= 1
