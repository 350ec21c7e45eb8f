"""The steps of a frame on single images, as NumPy arrays: each is the batch's code on a batch of one."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gpupipe.errors import InputError
from gpupipe.kernels.crop_resize import CROP_SIZE, crop_resize, inner_region, mask_mouth
from gpupipe.kernels.cubic import cubic_resize
from gpupipe.kernels.paste_blend import paste_blend
from gpupipe.landmarks import Box, crop_box, face_box, read_landmarks
from gpupipe.models.unet328 import INPUT_SIZE
from gpupipe.seam import FEATHER, Blend, feather_width, keep_mask
from gpupipe.transfer import as_array, as_tensor
from gpupipe.video.decode import read_image

Image = NDArray[np.uint8]
"""uint8 (H, W, 3), BGR. Tensors of that shape are accepted wherever images are."""


class ImageProcessor:
    """Crop, resize, mask and paste one image at a time."""

    def load_image(self, path: str | Path) -> Image:
        """Read an image file as uint8 (H, W, 3), BGR.

        Raises:
            InputError: missing, empty, cut short or not an image.
        """
        return read_image(path).numpy()

    def load_landmarks(self, path: str | Path) -> NDArray[np.int32]:
        """Read a ``.lms`` file as int32 (n, 2), floats truncated.

        Raises:
            InputError: missing or short, or a line is not two finite numbers.
        """
        return read_landmarks(path)

    def get_crop_region(self, landmarks: ArrayLike | Tensor) -> Box:
        """The square (xmin, ymin, xmax, ymax) of landmarks (n, 2), half-open; it may reach over the frame's edge.

        Raises:
            InputError: too few points, not finite, or an empty box.
        """
        return face_box(landmarks)

    def crop_face_region(self, image: Image | Tensor, landmarks: ArrayLike | Tensor) -> tuple[Image, Box]:
        """The box's part of an image, and the box, clamped to the image.

        Raises:
            InputError: as :meth:`get_crop_region`; also for a box wholly outside the image.
        """
        pixels = _image(image, "image")
        box = crop_box(landmarks, pixels.shape[1], pixels.shape[0])
        xmin, ymin, xmax, ymax = box
        return pixels[ymin:ymax, xmin:xmax].numpy().copy(), box

    def resize_image(self, image: Image | Tensor, size: tuple[int, int]) -> Image:
        """Cubic resize to ``size`` = (width, height), as OpenCV's ``INTER_CUBIC``.

        Raises:
            InputError: a size that is not of whole numbers, each 1 or more.
        """
        try:
            width, height = map(operator.index, size)
        except (TypeError, ValueError):
            width = height = 0
        if width < 1 or height < 1:
            raise InputError(f"size is {size}; expected (width, height), each 1 or more and whole")
        return _hwc(cubic_resize(_chw(_image(image, "image")), width, height))

    def create_masked_region(self, image: Image | Tensor) -> Image:
        """A copy of the inner crop (320, 320, 3) with rows 5…309 and columns 5…314 set to 0.

        Raises:
            InputError: an image that is not uint8 (320, 320, 3).
        """
        return _hwc(mask_mouth(_chw(_image(image, "image", INPUT_SIZE))))

    def prepare_input_tensors(self, image: Image | Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
        """Return the network's input image of one crop.

        Args:
            image: the crop at (328, 328, 3), or its inner (320, 320, 3).
            normalize: scale to [0, 1]; otherwise values are 0 … 255.

        Returns:
            float32 (1, 6, 320, 320), the inner crop and its masked copy; and float32 (3, 320, 320), the inner crop.

        Raises:
            InputError: an image that is not uint8, or of another size.
        """
        inner = _chw(_image(image, "image", INPUT_SIZE, CROP_SIZE)).float()
        if inner.shape[2] == CROP_SIZE:
            inner = inner_region(inner)
        if normalize:
            inner = inner / 255
        return torch.cat([inner, mask_mouth(inner)], dim=1), inner[0].clone()

    def paste_generated_region(
        self,
        full_frame: Image | Tensor,
        generated_region: Image | Tensor,
        crop_coords: Box,
        original_crop_size: tuple[int, int],
        *,
        blend: Blend = "none",
        feather: float = FEATHER,
    ) -> Image:
        """A copy of ``full_frame`` with the generated mouth in its box.

        Args:
            full_frame: (H, W, 3).
            generated_region: the network's (320, 320, 3), which gets the frame's own 4-pixel ring; or a whole canvas of
                (328, 328, 3).
            crop_coords: (xmin, ymin, xmax, ymax), as :meth:`crop_face_region` returns it.
            original_crop_size: (width, height) of the box.
            blend: ``"none"`` pastes hard, ``"feather"`` fades the seam over ``feather`` pixels of the frame.

        Raises:
            InputError: a box that is empty, not inside the frame, or not of ``original_crop_size``.
        """
        return self.process_frame_with_parsing(
            full_frame, generated_region, crop_coords, original_crop_size, blend=blend, feather=feather
        )

    def process_frame_with_parsing(
        self,
        full_frame: Image | Tensor,
        generated_region: Image | Tensor,
        crop_coords: Box,
        original_crop_size: tuple[int, int],
        parsing_image: Image | Tensor | None = None,
        *,
        blend: Blend = "none",
        feather: float = FEATHER,
    ) -> Image:
        """Paste as :meth:`paste_generated_region`, but leave the frame as it is where the parsing colour is BGR
        (0, 0, 255) or (255, 255, 255).

        Args:
            parsing_image: (H, W, 3), BGR; None pastes everywhere in the box.
        """
        frame = _image(full_frame, "full_frame")
        region = _chw(_image(generated_region, "generated_region", INPUT_SIZE, CROP_SIZE))
        height, width = frame.shape[:2]
        xmin, ymin, xmax, ymax = (int(value) for value in crop_coords)
        if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):
            raise InputError(f"crop_coords is {tuple(crop_coords)}; expected a box inside the {width}×{height} frame")
        if tuple(original_crop_size) != (xmax - xmin, ymax - ymin):
            raise InputError(
                f"original_crop_size is {tuple(original_crop_size)}; expected the box's (width, height),"
                f" {(xmax - xmin, ymax - ymin)}"
            )
        keep = None
        if parsing_image is not None:
            parsing = _image(parsing_image, "parsing_image")
            if parsing.shape != frame.shape:
                raise InputError(f"parsing_image has shape {tuple(parsing.shape)}; expected {tuple(frame.shape)}")
            keep = keep_mask(parsing)[None]
        index = torch.tensor([0], device="cpu")
        boxes = torch.tensor([[xmin, ymin, xmax, ymax]], device="cpu")
        if region.shape[2] == CROP_SIZE:
            crop, region = region, inner_region(region)
        else:
            crop = crop_resize(frame[None], index, boxes)
        width_of_seam = feather_width(blend, feather)
        where = (region, crop, index, frame[None], index, boxes, frame[None].clone())
        return paste_blend(*where, nv12=False, feather=width_of_seam, keep=keep)[0].numpy()


def _image(image: Image | Tensor, name: str, *sizes: int) -> Tensor:
    """An image as a tensor, checked to be uint8 (H, W, 3) and, if ``sizes`` are given, square of one of them."""
    array = as_array(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise InputError(f"{name}: is {array.dtype} {array.shape}; expected uint8 (H, W, 3), BGR")
    pixels = as_tensor(array)
    if sizes and (pixels.shape[0] != pixels.shape[1] or pixels.shape[0] not in sizes):
        wanted = " or ".join(f"({size}, {size}, 3)" for size in sizes)
        raise InputError(f"{name}: shape is {tuple(pixels.shape)}; expected {wanted}")
    return pixels


def _chw(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1)[None]


def _hwc(images: Tensor) -> Image:
    return images[0].permute(1, 2, 0).contiguous().numpy()
