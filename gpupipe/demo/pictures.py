"""What the U-Net is trained on: the template's pictures, the true ones, and how far a painted one is from its truth."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpupipe.demo import drawing, rig
from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, RING, inner_region, mask_mouth
from gpupipe.landmarks import Box, face_box


class Pictures:
    """Template frames as the pipeline prepares them, and the true picture for any mouth.

    Args:
        frames: the decoded template, uint8 (L, 432, 768, 3), BGR.
        points: its landmarks, float32 (L, 110, 2).
        device: where the tensors that it hands out are.
    """

    def __init__(self, frames: np.ndarray, points: np.ndarray, *, device: torch.device | None = None) -> None:
        self.frames = frames
        self.device = device or torch.device("cpu")
        self.boxes = [face_box(p) for p in points]
        inner = torch.cat([self._inner(frame, box) for frame, box in zip(frames, self.boxes, strict=True)])
        self.inputs = torch.cat([inner, mask_mouth(inner)], dim=1)  # uint8 (L, 6, 320, 320)
        patches = []
        for index, (xmin, ymin, xmax, _) in enumerate(self.boxes):
            y0, y1, x0, x1 = rig.mouth_patch(index)
            scale = CROP_SIZE / (xmax - xmin)
            at = [edge * scale - RING for edge in (y0 - ymin, y1 - ymin, x0 - xmin, x1 - xmin)]
            patches.append([min(INNER_SIZE, max(0, round(a))) for a in at])
        self.patches = np.array(patches)  # rows and columns of the mouth in the 320×320 picture

    @staticmethod
    def _inner(frame: np.ndarray, box: Box) -> Tensor:
        xmin, ymin, xmax, ymax = box
        crop = torch.from_numpy(frame[ymin:ymax, xmin:xmax].transpose(2, 0, 1).astype(np.float32))[None]
        big = F.interpolate(crop, (CROP_SIZE, CROP_SIZE), mode="bicubic", align_corners=False)
        return inner_region(big.round().clamp(0, 255).to(torch.uint8))

    def image(self, indices: np.ndarray) -> Tensor:
        """The network's images for these template frames: float32 (B, 6, 320, 320) in [0, 1]."""
        chosen = self.inputs[torch.from_numpy(indices)].to(self.device).float().div_(255)
        return chosen.contiguous(memory_format=torch.channels_last)

    def truth(self, indices: np.ndarray, mouths: np.ndarray) -> Tensor:
        """What should come out for these mouths (B, 3): float32 (B, 3, 320, 320) in [0, 1]."""
        drawn = [
            self._inner(drawing.true_frame(self.frames[i], int(i), mouth), self.boxes[i])
            for i, mouth in zip(indices, mouths, strict=True)
        ]
        return torch.cat(drawn).to(self.device).float().div_(255)

    def weights(self, indices: np.ndarray) -> Tensor:
        """How much a pixel counts: (B, 1, 320, 320), 1, and 4 where the mouth can be."""
        out = torch.ones(len(indices), 1, INNER_SIZE, INNER_SIZE)
        for k, i in enumerate(indices):
            y0, y1, x0, x1 = self.patches[i]
            out[k, :, y0:y1, x0:x1] = 4
        return out.to(self.device)


def weighted_l1(painted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of (B, 3, H, W) under (B, 1, H, W)."""
    return ((painted - truth).abs() * weight).sum() / weight.sum() / 3


def figures(pictures: Pictures, indices: np.ndarray, painted: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR in decibels, over the pixels where a mouth can be and over all."""
    errors = []
    for k, i in enumerate(indices):
        y0, y1, x0, x1 = pictures.patches[i]
        errors.append((painted[k, :, y0:y1, x0:x1] - truth[k, :, y0:y1, x0:x1]).square().mean())

    def decibels(error: Tensor) -> float:
        return round(float(-10 * torch.log10(error)), 2)

    return {"mouth_psnr": decibels(torch.stack(errors).mean()), "psnr": decibels((painted - truth).square().mean())}
