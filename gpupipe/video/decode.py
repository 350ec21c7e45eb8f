"""Image files → uint8 tensors, HWC BGR, decoded on the CPU or by the GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from gpupipe.errors import InputError, first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.files import input_file
from gpupipe.handover import Workers
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
"""How to turn a picture of each EXIF orientation upright: Exif 2.32, section 4.6.4. From 5 on it lies on its side."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xae\x42\x60\x82"}
"""Last bytes of a whole file, not counting zeros: ISO/IEC 10918-1, B.1.1.3 (EOI), and PNG, section 11.2.5 (IEND)."""

_FULL_SAMPLING = 0
"""Pillow's number for 4:4:4. Chroma of others is interpolated by nvJPEG only if it is asked to
(``NVJPEG_FLAGS_UPSAMPLING_WITH_INTERPOLATION``), and torchvision does not ask. Repeated, as emulated on a CPU, it gives
42 dB in the bundled avatar's boxes."""

_LAST_BYTES = 64

MAX_PIXELS = 1 << 26
"""The most pixels of an image that is decoded; a frame of the largest video, 8192×4320, has half as many."""

JpegDecoder = Literal["cpu", "nvjpeg"]

Result = TypeVar("Result")


def read_image(path: str | Path) -> Tensor:
    """Decode one JPEG, PNG, WebP or GIF file on the CPU.

    As OpenCV's ``imread`` with ``IMREAD_COLOR``: EXIF orientation is applied, grey images become BGR, and so does CMYK
    (within a step of OpenCV's rounding); transparency is dropped. A file named ``.jpg`` or ``.jpeg`` must be a JPEG.

    Pillow decodes. It has the same libjpeg-turbo, and so gives the same bits, as torchvision, whose own decoders do not
    survive every damaged file: some end the process.

    Returns:
        uint8 (H, W, 3), BGR.

    Raises:
        InputError: the file is missing, empty, cut short, not an image, or larger than :data:`MAX_PIXELS`.
    """
    with _opened(path) as image:
        return _turned_bgr(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the height and width of an image as :func:`read_image` would give it, without decoding it.

    A JPEG or PNG that does not end like a whole file is decoded after all, and so is an image of another format.

    Raises:
        InputError: as :func:`read_image`, except for damage between the header and the end.
    """
    with _opened(path) as image:
        if not _ends_whole(path, image):
            height, width, _ = _turned_bgr(image).shape
            return height, width
        on_its_side = exif_orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if on_its_side else (image.height, image.width)


def _ends_whole(path: str | Path, image: Image.Image) -> bool:
    """Return whether a file ends like a whole file of its format; False for formats whose end is not known here."""
    end = _ENDS.get(image.format or "")
    with Path(path).open("rb") as file:
        file.seek(-min(_LAST_BYTES, Path(path).stat().st_size), os.SEEK_END)
        return end is not None and file.read().rstrip(b"\0").endswith(end)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong with it within this context becomes an InputError."""
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
    """Refuse an animation, and a size beyond reason, by the header alone: before memory is taken for the pixels."""
    pictures = getattr(image, "n_frames", 1) if image.format == "GIF" else 1
    if pictures > 1:
        raise InputError(f"{path}: is an animation of {pictures} pictures; expected a whole JPEG or PNG image")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{path}: is {image.width}×{image.height}; expected at most {MAX_PIXELS >> 20} megapixels")


def _turned_bgr(image: Image.Image) -> Tensor:
    """Decode an image and turn it as its EXIF block asks: uint8 (H, W, 3), BGR."""
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
        device: where the tensor goes.
        exact: decode on the CPU, whose bits are the reference's. ``False`` lets a CUDA device decode 4:4:4 JPEGs with
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
    images = _on_threads(read_image, paths)
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{path}: is {image.shape[1]}×{image.shape[0]}; expected {images[0].shape[1]}×{images[0].shape[0]} as"
                f" {paths[0].name}"
            )
    return torch.stack(images).to(device)


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Return :func:`image_size` of each file, found on several threads."""
    return _on_threads(image_size, paths)


def jpeg_decoder(device: torch.device | str, *, exact: bool) -> JpegDecoder:
    """Return which decoder :func:`read_images` tries first for JPEGs on this device."""
    return "nvjpeg" if torch.device(device).type == "cuda" and not exact else "cpu"


def _nvjpeg(paths: Sequence[Path], device: torch.device) -> Tensor | None:
    """Decode a batch on the GPU; None if nvJPEG refuses it or must not be given it: the CPU decodes it then.

    Raises:
        InputError: as :func:`read_image`, for what a file's header shows.
    """
    reason = next(filter(None, _on_threads(_not_for_nvjpeg, paths)), None)
    if reason is not None:
        note_fallback(f"nvJPEG {reason}: the CPU decodes such files")
        return None
    try:
        # Takes a second. May fail one day: torchvision plans to leave decoding to torchcodec.
        from torchvision.io import ImageReadMode, decode_jpeg, read_file  # noqa: PLC0415

        data = [read_file(str(path)) for path in paths]
        # nvJPEG has been seen to write wrong pixels into memory that another stream still used: wait for all streams.
        torch.cuda.synchronize(device)
        images = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
        torch.cuda.synchronize(device)
        return torch.stack(images).flip(1).permute(0, 2, 3, 1).contiguous()
    except (ImportError, AttributeError, RuntimeError) as error:  # AttributeError: an operator it was built without
        note_fallback(f"nvJPEG refused a batch ({first_line(error)}): the CPU decodes what it refuses")
        return None


def _not_for_nvjpeg(path: Path) -> str | None:
    """Return why nvJPEG must not decode a JPEG: it would give another picture than the CPU, and no error. Or None."""
    with _opened(path) as image:
        if exif_orientation(image) != 1:
            return "ignores the orientation in a picture's EXIF block"
        if image.mode not in {"RGB", "L"} or image.info.get("adobe_transform") == 0:
            return "takes every picture for grey or YCbCr"
        if image.mode == "RGB" and JpegImagePlugin.get_sampling(image) != _FULL_SAMPLING:
            return "repeats chroma where the CPU interpolates it, unless a picture is 4:4:4"
        return None if _ends_whole(path, image) else "does not report that a file is cut short"


def exif_orientation(image: Image.Image) -> int:
    """Return the orientation that an image's EXIF block asks for, 1 (upright) to 8; 1 without one.

    It is entry 0x0112 of a TIFF file's first directory (Exif 2.32, section 4.6; TIFF 6.0, section 2). Pillow's own
    reader fails on damaged blocks.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")  # WebP's block has no such prefix
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


def _on_threads(function: Callable[[Path], Result], paths: Sequence[Path]) -> list[Result]:
    """Call a function for each file; for one, which is what a CPU's batch has, on this thread."""
    if len(paths) == 1:
        return [function(paths[0])]
    with Workers(available_cores(), "decode") as threads:
        answers = [threads.submit(function, path) for path in paths]
        return [answer.result() for answer in answers]
