"""The paste_blend kernel, interpreted or on the GPU, against the plain-torch reference, OpenCV and converted frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clips import mouths
from parity import EXACT_RESIZE, Bound, check_frame, inside, opencv_resize, resize_bound
from torch import Tensor

pytest.importorskip("triton")

from gpupipe.kernels.common_triton import INTERPRETED
from gpupipe.kernels.crop_resize import crop_resize
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.kernels.paste_blend import paste_blend
from gpupipe.kernels.paste_blend_triton import paste_blend_triton
from gpupipe.landmarks import Box

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SAME = Bound(1, 0.9999) if INTERPRETED else Bound(0, 1.0)
"""Bound against the reference: the same arithmetic, but that the interpreter rounds a multiply-add twice."""

WIDTH, HEIGHT = 230, 150
WHOLE = (0, 0, WIDTH, HEIGHT)
BOXES: list[Box] = [
    (20, 9, 81, 70),
    (21, 10, 82, 71),
    (0, 0, 97, 97),
    (132, 52, 230, 150),
    WHOLE,
    (3, 0, 223, 33),
    (101, 7, 102, 140),
    (7, 9, 8, 10),
    (229, 149, 230, 150),
]
SMALL: list[Box] = [(20, 9, 44, 33), (21, 10, 46, 35), (6, 4, 27, 25), (10, 141, 180, 150)]
"""Boxes less than 30 pixels high: a program takes more rows of the canvas than these need."""

FEW = Bound(1, 0.995)
"""Bound for them, against OpenCV: so few values that four, summed to a half in another order, are two in a thousand."""


def noise(count: int = 1, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randint(
        256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def mask(frames: Tensor) -> Tensor:
    return torch.rand(frames.shape[:3], generator=torch.Generator().manual_seed(3)) < 0.3


def paste(
    mouth: Tensor,
    frames: Tensor,
    index: list[int],
    boxes: list[Box],
    *,
    nv12: bool = False,
    keep: Tensor | None = None,
    feather: float = 0.0,
    max_box: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run the kernel; its result on the CPU. The crops are stored in another order than the samples."""
    places, corners = torch.tensor(index), torch.tensor(boxes)
    order = torch.arange(len(index)).flip(0)
    crops = crop_resize(frames, places, corners)[order]
    if out is None:
        out = frames.index_select(0, places)
        out = to_nv12(out) if nv12 else out
    layout = torch.channels_last if mouth.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    found = paste_blend_triton(
        mouth.to(DEVICE, memory_format=layout),
        crops.to(DEVICE),
        order.to(DEVICE),
        frames.to(DEVICE),
        places.to(DEVICE),
        corners.to(DEVICE),
        out.to(DEVICE, copy=True),
        nv12=nv12,
        max_box=max_box or tuple((corners[:, 2:] - corners[:, :2]).amax(0).tolist()),
        feather=feather,
        keep=None if keep is None else keep.to(DEVICE),
    )
    return found.cpu()


def expected_bgr(
    mouth: Tensor,
    frames: Tensor,
    index: list[int],
    boxes: list[Box],
    *,
    keep: Tensor | None = None,
    feather: float = 0.0,
) -> Tensor:
    places, corners = torch.tensor(index), torch.tensor(boxes)
    where = (torch.arange(len(index)), frames, places, corners, frames[places])
    return paste_blend(mouth, crop_resize(frames, places, corners), *where, nv12=False, feather=feather, keep=keep)


def by_opencv(frame: Tensor, box: Box, mouth: Tensor) -> np.ndarray:
    """The paste without feathering, by cv2.resize."""
    finished = frame.numpy().copy()
    xmin, ymin, xmax, ymax = box
    canvas = opencv_resize(finished[ymin:ymax, xmin:xmax], (328, 328))
    canvas[4:324, 4:324] = (mouth.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    finished[ymin:ymax, xmin:xmax] = opencv_resize(canvas, (xmax - xmin, ymax - ymin))
    return finished


# ── BGR ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("box", BOXES)
def test_hard_paste_matches_reference_and_opencv(box: Box) -> None:
    frames, mouth = noise(), mouths(1)
    found = paste(mouth, frames, [0], [box])[0].numpy()
    check_frame(found, expected_bgr(mouth, frames, [0], [box])[0].numpy(), box, SAME)
    check_frame(found, by_opencv(frames[0], box, mouth[0]), box, resize_bound(box))


@pytest.mark.parametrize("box", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_small_boxes_match_opencv(box: Box, dtype: torch.dtype) -> None:
    frames, mouth = noise(), mouths(1)
    given = mouth if dtype == torch.float32 else (255 * mouth).to(dtype)
    check_frame(paste(given, frames, [0], [box])[0].numpy(), by_opencv(frames[0], box, mouth[0]), box, FEW)


@pytest.mark.parametrize("box", SMALL)
def test_what_lies_after_the_mouth_is_not_seen(box: Box) -> None:
    frames, index, corners = noise().to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([box])
    room = torch.full((2, 3, 320, 320), torch.nan, device=DEVICE)
    room[:1] = mouths(1)
    where = (crop_resize(frames, index, corners.to(DEVICE)), index, frames, index, corners.to(DEVICE))
    size = box[2] - box[0], box[3] - box[1]
    found, alone = (
        paste_blend_triton(mouth, *where, frames.clone(), nv12=False, max_box=size)
        for mouth in (room[:1], room[:1].clone())
    )
    assert torch.equal(found, alone)


@pytest.mark.parametrize("side", [328, 719])
def test_large_boxes_match_reference_and_opencv(side: int) -> None:
    frames, mouth, box = noise(height=720, width=760), mouths(1), (37, 1, 37 + side, 1 + side)
    found = paste(mouth, frames, [0], [box])[0].numpy()
    check_frame(found, expected_bgr(mouth, frames, [0], [box])[0].numpy(), box, SAME)
    check_frame(found, by_opencv(frames[0], box, mouth[0]), box, EXACT_RESIZE)


@pytest.mark.parametrize(("feather", "parsing"), [(0.5, False), (8.0, True), (1000.0, False), (0.0, True)])
def test_feather_and_parsing(feather: float, parsing: bool) -> None:
    frames, mouth, box = noise(2), mouths(1), BOXES[0]
    keep = mask(frames) if parsing else None
    found = paste(mouth, frames, [1], [box], feather=feather, keep=keep)[0].numpy()
    expected = expected_bgr(mouth, frames, [1], [box], feather=feather, keep=keep)[0].numpy()
    check_frame(found, expected, box, SAME)
    if keep is not None:
        assert np.array_equal(found[keep[1].numpy()], frames[1].numpy()[keep[1].numpy()])


def test_a_sample_does_not_see_its_batch() -> None:
    frames, index, mouth = noise(3), [2, 0], mouths(2)
    boxes = [BOXES[0], BOXES[6]]
    together = paste(mouth, frames, index, boxes, feather=4.0)
    for k in range(2):
        alone = paste(mouth[k : k + 1], frames, [index[k]], [boxes[k]], feather=4.0)
        assert torch.equal(together[k], alone[0]), boxes[k]


@pytest.mark.parametrize(("level", "value"), [(0.5, 127), (254.9 / 255, 254)])
def test_output_is_truncated_not_rounded(level: float, value: int) -> None:
    box = (3, 4, 103, 104)
    found = paste(torch.full((1, 3, 320, 320), level), noise(), [0], [box])[0]
    assert (found[14:94, 13:93] == value).all()


def test_every_layout_and_type_of_the_mouth() -> None:
    """Half precision has rounded before the kernel, uint8 is truncated already, and layouts change nothing."""
    frames, mouth, box = noise(), mouths(1).half(), BOXES[1]
    found = paste(mouth, frames, [0], [box])
    assert torch.equal(found, paste(mouth.float(), frames, [0], [box]))
    assert torch.equal(found, paste((mouth.float() * 255).to(torch.uint8), frames, [0], [box]))
    assert torch.equal(found, paste(mouth.to(memory_format=torch.channels_last), frames, [0], [box]))


def test_the_launch_need_not_know_the_boxes() -> None:
    frames, mouth, box = noise(), mouths(1), BOXES[1]
    found = paste(mouth, frames, [0], [box], max_box=(WIDTH, HEIGHT))
    SAME.check(found.numpy(), expected_bgr(mouth, frames, [0], [box]).numpy())


# ── NV12 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("box", "feather", "parsing"),
    [*((box, 8.0, True) for box in (*(BOXES[k] for k in (1, 3, 5, 6, 8)), *SMALL)), (BOXES[1], 0.0, False)],
)
def test_nv12_is_the_finished_frame_converted(box: Box, feather: float, parsing: bool) -> None:
    """To the last bit, also for boxes at odd pixels, which cut chroma cells."""
    frames, mouth = noise(), mouths(1)
    keep = mask(frames) if parsing else None
    found = paste(mouth, frames, [0], [box], nv12=True, feather=feather, keep=keep)
    finished = paste(mouth, frames, [0], [box], feather=feather, keep=keep)
    assert torch.equal(found, to_nv12(finished))
    assert not torch.equal(found, to_nv12(frames))


def test_nv12_of_a_batch_in_half_precision_and_channels_last() -> None:
    frames, index, boxes = noise(2), [1, 0], [BOXES[1], BOXES[0]]
    mouth = mouths(2).half().to(memory_format=torch.channels_last)
    found = paste(mouth, frames, index, boxes, nv12=True, feather=8.0)
    expected = to_nv12(expected_bgr(mouth, frames, index, boxes, feather=8.0))
    SAME.check(found.numpy(), expected.numpy())


def test_nv12_writes_only_the_cells_that_the_box_touches() -> None:
    frames, mouth, box = noise(), mouths(1), BOXES[1]
    blank = torch.full((1, HEIGHT * 3 // 2, WIDTH), 7, dtype=torch.uint8)
    found = paste(mouth, frames, [0], [box], nv12=True, out=blank)[0]
    touched = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    touched[box[1] // 2 * 2 : -(-box[3] // 2) * 2, box[0] // 2 * 2 : -(-box[2] // 2) * 2] = True
    touched = torch.cat([touched, touched[::2]])
    assert (found[~touched] == 7).all()
    assert torch.equal(found[touched], paste(mouth, frames, [0], [box], nv12=True)[0][touched])


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_that_the_kernel_cannot_address_is_an_error() -> None:
    frames, index, boxes = noise().to(DEVICE), torch.zeros(1, dtype=torch.int64), torch.tensor(BOXES[:1])
    crops = crop_resize(frames.cpu(), index, boxes).to(DEVICE)
    index, boxes, mouth = index.to(DEVICE), boxes.to(DEVICE), mouths(1).to(DEVICE)
    for wrong in ({"frames": frames.flip(3).transpose(1, 2)}, {"out": frames.transpose(1, 2)}, {"crops": crops.mT}):
        given = {"frames": frames, "out": frames.clone(), "crops": crops} | wrong
        with pytest.raises(ValueError, match="strides"):
            paste_blend_triton(mouth, given["crops"], index, given["frames"], index, boxes, given["out"], nv12=False)


# ── negative controls ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_bound_fails_without_the_template_s_ring() -> None:
    frames, mouth, box = noise(), mouths(1), BOXES[0]
    found = paste(mouth, frames, [0], [box])[0].numpy()
    black = frames.clone()
    black[0][inside(box)] = 0
    assert not EXACT_RESIZE.holds(found[inside(box)], by_opencv(black[0], box, mouth[0])[inside(box)])


def test_bound_fails_when_the_mouth_is_rounded() -> None:
    frames, mouth, box = noise(), mouths(1), BOXES[0]
    found = paste(mouth, frames, [0], [box])[0].numpy()
    rounded = by_opencv(frames[0], box, (mouth[0] * 255).round() / 255 + 1e-4)
    assert not EXACT_RESIZE.holds(found[inside(box)], rounded[inside(box)])


def test_bound_fails_for_another_feather() -> None:
    frames, mouth, box = noise(), mouths(1), BOXES[0]
    found = paste(mouth, frames, [0], [box], feather=8.0)[0].numpy()
    for feather in (0.0, 7.0, 8.0, 9.0):
        expected = expected_bgr(mouth, frames, [0], [box], feather=feather)[0].numpy()
        assert SAME.holds(found, expected) == (feather == 8.0), feather


# ── at the size it is made for ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize("parsing", [False, True])
@pytest.mark.parametrize("feather", [0.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_batches_on_the_gpu(dtype: torch.dtype, feather: float, parsing: bool) -> None:
    frames = noise(8, 720, 1280)
    sides = torch.tensor([61, 182, 182, 183, 327, 329, 500, 719]).repeat(4)
    corner = torch.stack([torch.arange(32) * 8 % (1281 - sides), torch.arange(32) % (721 - sides)], dim=1)
    boxes = torch.cat([corner, corner + sides[:, None]], dim=1)
    index = torch.arange(32) % 8
    mouth = mouths(32).to(dtype)
    keep = mask(frames) if parsing else None
    crops = crop_resize(frames, index, boxes)
    where = (mouth, crops, torch.arange(32), frames, index, boxes)
    expected = paste_blend(*where, frames[index], nv12=False, feather=feather, keep=keep)

    layout = torch.channels_last if dtype == torch.float16 else torch.contiguous_format
    given = (mouth.cuda().contiguous(memory_format=layout), *(tensor.cuda() for tensor in where[1:]))
    kept = None if keep is None else keep.cuda()
    background = frames[index].cuda()
    found = paste_blend(*given, background.clone(), nv12=False, max_box=(719, 719), feather=feather, keep=kept)
    SAME.check(found.cpu().numpy(), expected.numpy())
    nv12 = paste_blend(*given, to_nv12(background), nv12=True, max_box=(719, 719), feather=feather, keep=kept)
    assert torch.equal(nv12, to_nv12(found))
