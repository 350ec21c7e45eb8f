"""Images in files → uint8 tensors, HWC BGR, on the CPU or decoded by the GPU."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gpupipe.errors import InputError, first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.files import input_file
from gpupipe.lanes import available_cores

_JPEG_SUFFIXES = {".jpg", ".jpeg"}
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of an EXIF orientation upright: Exif 2.32, section 4.6.4."""

_ON_THE_SIDE = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
"""Those that exchange height and width."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xae\x42\x60\x82"}
"""What a whole file ends with, but for zeros: ISO/IEC 10918-1, B.1.1.3 (EOI), and PNG, section 11.2.5 (IEND)."""

_LAST_BYTES = 64

MAX_PIXELS = 1 << 26
"""Of an image that is decoded; of frames of 8192×4320 the largest video has half as many."""

JpegDecoder = Literal["cpu", "nvjpeg"]


def read_image(path: str | Path) -> Tensor:
    """Decode one JPEG, PNG, WebP or GIF file on the CPU.

    As OpenCV's ``imread`` with ``IMREAD_COLOR``: EXIF orientation is applied, grey images become BGR, and so does CMYK
    (within a step of OpenCV's rounding); transparency is left out. A file named ``.jpg`` or ``.jpeg`` must be one.

    Pillow decodes, with the same libjpeg-turbo and so the same bits as torchvision, whose own decoders do not survive
    every damaged file: some end the process.

    Returns:
        uint8 (H, W, 3), BGR.

    Raises:
        InputError: the file is missing, empty, cut short, not an image, or larger than :data:`MAX_PIXELS`.
    """
    with _opened(path) as image:
        return _turned_bgr(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as :func:`read_image` would give it, found without decoding it.

    A JPEG or PNG that does not end as one is decoded after all, and so is what is neither.

    Raises:
        InputError: as :func:`read_image`, but for damage between the header and the end.
    """
    with _opened(path) as image:
        if not _ends_as_one(path, image):
            height, width, _ = _turned_bgr(image).shape
            return height, width
        turn = _TURNS.get(exif_orientation(image))
        return (image.width, image.height) if turn in _ON_THE_SIDE else (image.height, image.width)


def _ends_as_one(path: str | Path, image: Image.Image) -> bool:
    """Whether a file's last bytes are what a whole file of its format ends with, where that is known."""
    end = _ENDS.get(image.format or "")
    with Path(path).open("rb") as file:
        file.seek(-min(_LAST_BYTES, Path(path).stat().st_size), os.SEEK_END)
        return end is not None and file.read().rstrip(b"\0").endswith(end)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file; what goes wrong with it is an InputError."""
    path = input_file(path, "image file")
    is_jpeg = path.suffix.lower() in _JPEG_SUFFIXES
    try:
        with Image.open(path, formats=("JPEG",) if is_jpeg else _FORMATS) as image:
            _check_header(path, image)
            yield image
    except UnidentifiedImageError as error:
        reason, kind = ("not a JPEG", "JPEG") if is_jpeg else ("not an image", "JPEG or PNG")
        raise InputError(f"{path}: cannot be decoded ({reason}); expected a whole {kind} image") from error
    except InputError:
        raise
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be decoded ({reason}); expected a whole JPEG or PNG image") from error


def _check_header(path: Path, image: Image.Image) -> None:
    """Refuse what a few bytes of header promise beyond reason, before memory is taken for it."""
    pictures = getattr(image, "n_frames", 1) if image.format == "GIF" else 1
    if pictures > 1:
        raise InputError(f"{path}: is an animation of {pictures} pictures; expected a whole JPEG or PNG image")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{path}: is {image.width}×{image.height}; expected at most {MAX_PIXELS >> 20} megapixels")


def _turned_bgr(image: Image.Image) -> Tensor:
    """Decode, and turn as EXIF asks: uint8 (H, W, 3), BGR."""
    image.load()
    turn = _TURNS.get(exif_orientation(image))
    if image.mode.startswith("I"):  # 16 bits: the upper 8 are kept
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    upright = rgb if turn is None else rgb.transpose(turn)
    pixels = bytearray(upright.tobytes("raw", "BGR"))  # several times faster than a flip of the array
    return torch.frombuffer(pixels, dtype=torch.uint8).view(upright.height, upright.width, 3)


def read_images(paths: Sequence[Path], *, device: torch.device | str = "cpu", exact: bool = True) -> Tensor:
    """Decode images of one size, on several threads, or JPEGs on the GPU.

    Args:
        paths: at least one file.
        device: where the tensor is to be.
        exact: decode on the CPU, whose bits are the reference's. ``False`` lets a CUDA device decode JPEGs with
            nvJPEG, which may differ by a few steps.

    Returns:
        uint8 (n, H, W, 3) on ``device``, BGR.

    Raises:
        InputError: as :func:`read_image`; also when sizes differ.
    """
    device = torch.device(device)
    if jpeg_decoder(device, exact=exact) == "nvjpeg" and all(path.suffix.lower() in _JPEG_SUFFIXES for path in paths):
        decoded = _nvjpeg(paths, device)
        if decoded is not None:
            return decoded
    images = list(_threads().map(read_image, paths))
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{path}: is {image.shape[1]}×{image.shape[0]}; expected {images[0].shape[1]}×{images[0].shape[0]} as"
                f" {paths[0].name}"
            )
    return torch.stack(images).to(device)


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """:func:`image_size` of each, on several threads."""
    return list(_threads().map(image_size, paths))


def jpeg_decoder(device: torch.device | str, *, exact: bool) -> JpegDecoder:
    """Which decoder :func:`read_images` tries first for JPEGs on this device."""
    return "nvjpeg" if torch.device(device).type == "cuda" and not exact else "cpu"


def _nvjpeg(paths: Sequence[Path], device: torch.device) -> Tensor | None:
    """Decode a batch on the GPU; None if nvJPEG refuses it, or must not be given it, so that the CPU decodes it.

    Raises:
        InputError: as :func:`read_image`, for what a file's header tells.
    """
    reason = next(filter(None, _threads().map(_not_for_nvjpeg, paths)), None)
    if reason is not None:
        note_fallback(f"nvJPEG {reason}: the CPU decodes such files")
        return None
    try:
        # A second: only where it is used. torchvision is to leave it to torchcodec one day.
        from torchvision.io import ImageReadMode, decode_jpeg, read_file  # noqa: PLC0415

        data = [read_file(str(path)) for path in paths]
        # nvJPEG has been seen to write wrong pixels into memory that another stream still used: wait for all streams.
        torch.cuda.synchronize(device)
        images = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
        torch.cuda.synchronize(device)
        return torch.stack(images).flip(1).permute(0, 2, 3, 1).contiguous()
    except (ImportError, RuntimeError) as error:
        note_fallback(f"nvJPEG refused a batch ({first_line(error)}): the CPU decodes what it refuses")
        return None


def _not_for_nvjpeg(path: Path) -> str | None:
    """Why a JPEG is not to be decoded by nvJPEG: it would be another picture than the CPU's, without an error."""
    with _opened(path) as image:
        if exif_orientation(image) != 1:
            return "does not turn pictures as their EXIF block asks"
        if image.mode not in {"RGB", "L"} or image.info.get("adobe_transform") == 0:
            return "takes all pictures for grey or of Y, Cb and Cr"
        return None if _ends_as_one(path, image) else "does not tell of a file that is cut short"


def exif_orientation(image: Image.Image) -> int:
    """The orientation that an image's EXIF block asks for, 1 (upright) to 8; 1 without one.

    It is entry 0x0112 of a TIFF file's first directory (Exif 2.32, section 4.6; TIFF 6.0, section 2). Pillow's own
    reader fails on damaged blocks.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")  # WebP's block comes without
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_cores(), thread_name_prefix="decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has the executor, but none of its threads
