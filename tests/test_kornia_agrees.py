"""An independent check of the crop: kornia's resize, which does not use our weights."""

import kornia
import pytest
import torch
from torch import Tensor

from gpupipe.kernels.crop_resize import CROP_SIZE, crop_resize

BOXES = torch.tensor([[10, 20, 71, 81], [0, 0, 182, 182], [100, 3, 428, 331], [1, 0, 720, 719]])


def _crops(frames: Tensor, *, antialias: bool) -> Tensor:
    resized = []
    for frame, (xmin, ymin, xmax, ymax) in zip(frames, BOXES.tolist(), strict=True):
        crop = frame[ymin:ymax, xmin:xmax].permute(2, 0, 1)[None].float()
        size = (CROP_SIZE, CROP_SIZE)
        resized.append(kornia.geometry.resize(crop, size, "bicubic", align_corners=False, antialias=antialias))
    return torch.cat(resized).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("antialias", [False, True])
def test_crop_is_kornias_resize_without_antialiasing(antialias: bool) -> None:
    frames = torch.randint(0, 256, (len(BOXES), 720, 720, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    ours = crop_resize(frames, torch.arange(len(BOXES)), BOXES)
    difference = (ours.int() - _crops(frames, antialias=antialias).int()).abs()
    agrees = difference.max() <= 1 and (difference == 0).float().mean() >= 0.999
    assert agrees != antialias  # an antialiased resize of the larger boxes must fail the same bound
