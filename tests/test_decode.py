"""Image files of every kind as OpenCV reads them, those that are damaged, and those that nvJPEG must not be given."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image, encode_jpeg

from gpupipe import InputError
from gpupipe.doctor import _nvjpeg_obstacle
from gpupipe.video import decode
from gpupipe.video.cuda import can_encode_jpeg
from gpupipe.video.decode import exif_orientation, image_size, image_sizes, read_image, read_images


@pytest.fixture
def picture() -> np.ndarray:
    """Smooth, without symmetry, 64×48, BGR."""
    coarse = np.random.default_rng(3).integers(256, size=(4, 5, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (64, 48), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def with_exif(jpeg: bytes, orientation: int, *, order: str = "big", entries: int = 0) -> bytes:
    """A JPEG with an EXIF block: the orientation, after so many other entries."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)  # type: ignore[arg-type]

    others = b"".join(number(0x0100 + i, 2) + number(3, 2) + number(1, 4) + number(7, 4) for i in range(entries))
    value = number(orientation, 2) + bytes(2)
    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + value
    tiff = (b"MM" if order == "big" else b"II") + number(42, 2) + number(8, 4)
    tiff += number(entries + 1, 2) + others + entry + bytes(4)
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def orientation_in(path: Path) -> int:
    with Image.open(path) as image:
        return exif_orientation(image)


# ── pictures that are whole ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        [cv2.IMWRITE_JPEG_QUALITY, 30],
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422],
        [cv2.IMWRITE_JPEG_RST_INTERVAL, 2],
    ],
    ids=["progressive", "coarse", "4:4:4", "4:2:2", "restart"],
)
def test_every_kind_of_jpeg(options: list[int], picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "frame.jpg"
    cv2.imwrite(str(path), picture, options)
    assert np.array_equal(read_image(path).numpy(), cv2.imread(str(path)))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (63, 47)])
def test_odd_sizes(size: tuple[int, int], picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "frame.jpg"
    cv2.imwrite(str(path), cv2.resize(picture, size))
    assert np.array_equal(read_image(str(path)).numpy(), cv2.imread(str(path)))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [3, 4])
def test_every_kind_of_png(channels: int, depth: type, picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "parsing.png"
    alpha = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64, 1)
    pixels = np.concatenate([picture, alpha], axis=2)[..., :channels].astype(depth) * (257 if depth == np.uint16 else 1)
    cv2.imwrite(str(path), pixels)
    assert np.array_equal(read_image(path).numpy(), cv2.imread(str(path)))


def test_colours_are_bgr(tmp_path: Path) -> None:
    blue = torch.zeros(3, 16, 16, dtype=torch.uint8)
    blue[2] = 250
    (tmp_path / "blue.jpg").write_bytes(encode_jpeg(blue, quality=100).numpy().tobytes())
    b, g, r = read_image(tmp_path / "blue.jpg")[8, 8].tolist()
    assert b > 240
    assert max(g, r) < 10
    assert not np.array_equal(
        decode_image(str(tmp_path / "blue.jpg")).permute(1, 2, 0), read_image(tmp_path / "blue.jpg")
    )


def test_real_frames(speaker: Path) -> None:
    paths = [speaker / "full_body_img" / f"{i}.jpg" for i in (0, 70, 149)]
    for path, frame in zip(paths, read_images(paths), strict=True):
        assert np.array_equal(frame.numpy(), cv2.imread(str(path)))


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_orientation_is_the_one_that_opencv_heeds(
    orientation: int, order: str, picture: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(with_exif(cv2.imencode(".jpg", picture)[1].tobytes(), orientation, order=order, entries=3))
    read, plain = cv2.imread(str(path)), cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert np.array_equal(read_image(path).numpy(), read)
    assert image_size(path) == read.shape[:2]
    found = orientation_in(path)
    assert found == (orientation if 1 <= orientation <= 8 else 1)
    assert np.array_equal(read, plain) == (found == 1)


@pytest.mark.parametrize(
    ("suffix", "behind"), [("jpg", b""), ("jpg", bytes(9)), ("jpg", b"x"), ("png", b""), ("webp", b"")]
)
def test_size_is_found_without_decoding(
    suffix: str, behind: bytes, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the file's end does not tell that it is whole."""
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(cv2.imencode(f".{suffix}", picture)[1].tobytes() + behind)
    decoded = []
    turned = decode._turned_bgr
    monkeypatch.setattr(decode, "_turned_bgr", lambda image: decoded.append(image) or turned(image))
    assert image_size(str(path)) == (48, 64)
    assert bool(decoded) == (behind == b"x" or suffix == "webp")


def test_size_of_a_file_that_is_shorter_than_the_end_that_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "0.gif"
    Image.new("P", (3, 2)).save(path)
    assert path.stat().st_size < decode._LAST_BYTES
    assert image_size(path) == (2, 3)


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0XX" + bytes(40)])
def test_a_block_that_is_none_asks_for_nothing(block: bytes) -> None:
    image = Image.new("RGB", (2, 2))
    assert exif_orientation(image) == 1
    image.info["exif"] = block
    assert exif_orientation(image) == 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_block_of_another_program(suffix: str, picture: np.ndarray, tmp_path: Path) -> None:
    exif, path = Image.Exif(), tmp_path / f"turned.{suffix}"
    exif[0x010F], exif[0x0112], exif[0x0132] = "a camera", 6, "2024:01:01 00:00:00"
    Image.fromarray(picture[..., ::-1]).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert orientation_in(path) == 6
    assert np.array_equal(read_image(path).numpy(), cv2.imread(str(path)))
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_and_progressive(progressive: bool, picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "frame.jpg"
    Image.fromarray(picture[..., ::-1]).convert("L").save(path, quality=90, progressive=progressive)
    assert (b"\xff\xc2" in path.read_bytes()) == progressive, "the marker of a progressive JPEG"
    assert np.array_equal(read_image(path).numpy(), cv2.imread(str(path)))


def test_cmyk_is_within_a_step(picture: np.ndarray, tmp_path: Path) -> None:
    """OpenCV cuts a product's fraction off where libjpeg's other users round it."""
    path = tmp_path / "frame.jpg"
    Image.fromarray(picture[..., ::-1]).convert("CMYK").save(path, quality=95)
    ours, theirs = read_image(path).numpy().astype(int), cv2.imread(str(path)).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - picture).mean() < 1
    assert np.abs(255 - ours - theirs).mean() > 20, "negative control: inks the other way round"


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "LA", "1"])
def test_kinds_of_png(mode: str, picture: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(picture[..., ::-1])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image.putalpha(77)
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "0.png")
    assert np.array_equal(read_image(tmp_path / "0.png").numpy(), cv2.imread(str(tmp_path / "0.png")))


def test_palette_with_transparency(picture: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(picture[..., ::-1]).convert("P")
    image.save(tmp_path / "0.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's
        read_image(tmp_path / "0.png")
    assert np.array_equal(read_image(tmp_path / "0.png").numpy(), cv2.imread(str(tmp_path / "0.png")))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_decodes_on_threads_of_its_own(picture: np.ndarray, tmp_path: Path) -> None:
    """Those of its parent are not there."""
    path = tmp_path / "frame.jpg"
    cv2.imwrite(str(path), picture)
    assert image_sizes([path] * 9) == [(48, 64)] * 9
    child = multiprocessing.get_context("fork").Process(target=image_sizes, args=([path] * 9,))
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0


# ── damaged files ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [b"", b"text\n", b"%PDF-1.7\n", b"GIF89a\x01\x00", b"GIF89a" + bytes(7) + b";", b"\x89PNG\r\n\x1a\n" + bytes(40)],
)
def test_file_that_is_no_picture(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "parsing.png").write_bytes(content)
    with pytest.raises(InputError, match=r"parsing\.png: cannot be decoded .*expected a whole JPEG or PNG image"):
        read_image(tmp_path / "parsing.png")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_png_does_not_end_the_process(
    seed: int, picture: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found by fuzzing: torchvision's decoder crashes on some of these, and libpng speaks on stderr of others."""
    content = bytearray(cv2.imencode(".png", picture)[1].tobytes())
    rng = np.random.default_rng(seed)
    at, length = int(rng.integers(8, len(content) // 2)), int(rng.choice([1, 16, 200]))
    content[at : at + length] = rng.integers(256, size=rng.choice([0, length]), dtype=np.uint8).tobytes()
    path = tmp_path / "0.png"
    path.write_bytes(content)
    try:
        assert read_image(path).shape[2] == 3
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
    assert capfd.readouterr().err == ""


def test_pixels_that_a_header_promises_are_not_made(picture: np.ndarray, tmp_path: Path) -> None:
    """65535×65535 are 13 GB, and a damaged scan would be filled up with grey."""
    jpeg = bytearray(cv2.imencode(".jpg", picture)[1].tobytes())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff" * 4
    (tmp_path / "0.jpg").write_bytes(jpeg)
    with pytest.raises(InputError, match=r"0\.jpg: .*(65535×65535; expected at most 64 megapixels|decompression bomb)"):
        read_image(tmp_path / "0.jpg")
    jpeg[at : at + 4] = (9000).to_bytes(2, "big") * 2
    (tmp_path / "0.jpg").write_bytes(jpeg)
    with pytest.raises(InputError, match=r"0\.jpg: is 9000×9000; expected at most 64 megapixels"):
        read_image(tmp_path / "0.jpg")


def test_animation(picture: np.ndarray, tmp_path: Path) -> None:
    first = Image.fromarray(picture)
    first.save(tmp_path / "0.gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    with pytest.raises(InputError, match=r"0\.gif: is an animation of 3 pictures"):
        read_image(tmp_path / "0.gif")


FULL_CHROMA = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


# ── nvJPEG ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_given_to_nvjpeg(picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave turned pictures as they lie, mistake colours, and may pass over a cut: another picture than on
    another machine."""
    given: list[int] = []
    noted: list[str] = []
    monkeypatch.setattr(decode, "note_fallback", noted.append)
    rgb = picture[..., ::-1].copy()
    upright = torch.from_numpy(rgb).permute(2, 0, 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(
        "torchvision.io.decode_jpeg", lambda data, **_: given.append(len(data)) or [upright] * len(data)
    )
    jpeg = cv2.imencode(".jpg", picture, FULL_CHROMA)[1].tobytes()
    files = {
        "plain": jpeg,
        "upright": with_exif(jpeg, 1),
        "padded": jpeg + bytes(9),
        "turned": with_exif(jpeg, 8),
        "cut": jpeg[: len(jpeg) // 2],
        "usual": cv2.imencode(".jpg", picture)[1].tobytes(),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    Image.fromarray(rgb).save(tmp_path / "rgb.jpg", keep_rgb=True)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    plain, *whole = (tmp_path / f"{name}.jpg" for name in ("plain", "upright", "padded"))
    decoded = decode._nvjpeg([plain, *whole], torch.device("cuda"))
    assert decoded is not None
    assert np.array_equal(decoded[1].numpy(), picture), "BGR"
    refused = {"turned": "EXIF", "cut": "cut short", "rgb": "YCbCr", "cmyk": "YCbCr", "usual": "4:4:4"}
    for name, told in refused.items():
        noted.clear()
        assert decode._nvjpeg([plain, tmp_path / f"{name}.jpg"], torch.device("cuda")) is None
        assert len(noted) == 1
        assert told in noted[0]
    with pytest.raises(InputError, match=r"none\.jpg: no such image file"):
        decode._nvjpeg([plain, tmp_path / "none.jpg"], torch.device("cuda"))
    assert given == [3]


def test_a_torchvision_without_jpegs(picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it announces to become: the CPU decodes and encodes them."""
    noted: list[str] = []
    monkeypatch.setattr(decode, "note_fallback", noted.append)
    monkeypatch.setattr("gpupipe.video.cuda.note_fallback", noted.append)
    for name in ("decode_jpeg", "encode_jpeg"):
        monkeypatch.delattr(f"torchvision.io.{name}")
    cv2.imwrite(str(tmp_path / "0.jpg"), picture, FULL_CHROMA)
    assert decode._nvjpeg([tmp_path / "0.jpg"], torch.device("cuda")) is None
    assert not can_encode_jpeg(torch.device("cpu"))
    assert "cannot import name 'decode_jpeg'" in str(_nvjpeg_obstacle(torch.device("cuda")))
    assert [told.partition(" (")[0] for told in noted] == ["nvJPEG refused a batch", "nvJPEG does not encode here"]


@pytest.mark.cuda
@pytest.mark.hardware
def test_nvjpeg_gives_the_same_pixels_every_time(
    make_template: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been seen to give wrong pixels when it decoded into memory that another stream still used.

    So memory is made to change hands: a second stream writes large tensors that are freed while it still works on them.
    Each round must have the checksum of the first, and be near what the CPU decodes.
    """
    folder = make_template(tmp_path, frames=32, size=(1280, 720)) / "full_body_img"
    paths = [folder / f"{i}.jpg" for i in range(32)]
    for path in paths:
        cv2.imwrite(str(path), cv2.imread(str(path)), FULL_CHROMA)
    monkeypatch.setattr(decode, "note_fallback", pytest.fail)
    on_cpu = read_images(paths)
    other = torch.cuda.Stream()
    checksums = set()
    for round_ in range(12):
        with torch.cuda.stream(other):
            for _ in range(8):
                torch.randn(32, 3, 720, 1280, device="cuda").mul_(round_).sum()
        decoded = read_images(paths, device="cuda", exact=False)
        checksums.add(hashlib.sha256(decoded.cpu().numpy().tobytes()).hexdigest())
    assert len(checksums) == 1
    difference = (decoded.cpu().int() - on_cpu.int()).abs()
    assert difference.max() <= 4, "steps: another IDCT and another rounding of colours"
    wrong = (on_cpu.roll(1, 0).int() - on_cpu.int()).abs()
    assert wrong.float().mean() > 10, "negative control: another frame"
