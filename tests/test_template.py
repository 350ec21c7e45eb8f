"""The template directory: decoded as by OpenCV, checked whole before the first frame, the same under any budget."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import cached

from gpupipe import DeviceError, InputError, Template
from gpupipe.seam import keep_mask
from gpupipe.video.decode import read_images

MakeTemplate = Callable[..., Path]

WIDTH, HEIGHT = 192, 128


@pytest.fixture
def template(make_template: MakeTemplate, tmp_path: Path) -> Path:
    """Five frames of 192×128 with parsing images, for each test its own copy to spoil."""
    return make_template(tmp_path / "avatar", frames=5, size=(WIDTH, HEIGHT), parsing=True)


def frame_file(template: Path, i: int) -> Path:
    return template / "full_body_img" / f"{i}.jpg"


def landmark_file(template: Path, i: int) -> Path:
    return template / "landmarks" / f"{i}.lms"


def refusal(template: Path, named: Path, *, use_parsing: bool = False) -> str:
    """The error message on opening a template, checked to be one line that begins with the file's name.

    It is the same for a clip that shows frame 1 alone, except for the file that a size is compared with.
    """
    messages = []
    for clip in (None, (0, 1)):
        with pytest.raises(InputError) as caught:
            Template.from_directory(template, use_parsing=use_parsing, clip=clip)
        messages.append(str(caught.value))
    assert messages[0].startswith(f"{named}: ")
    assert "\n" not in messages[0]
    assert messages[1].split(" as ")[0] == messages[0].split(" as ")[0]
    return messages[0]


# ── what is read ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_boxes_and_masks(make_template: MakeTemplate, tmp_path: Path) -> None:
    boxes = [(10, 20, 60), (-10, 5, 50), (150, 100, 61), (0, 0, 400), (40, -30, 99)]
    folder = make_template(tmp_path, frames=5, size=(WIDTH, HEIGHT), box=boxes, parsing=True)
    template = Template.from_directory(str(folder), use_parsing=True)
    assert (template.length, template.width, template.height) == (5, WIDTH, HEIGHT)
    assert template.boxes.tolist() == [
        [10, 20, 70, 80],
        [0, 5, 40, 55],
        [150, 100, 192, 128],
        [0, 0, 192, 128],
        [40, 0, 139, 69],
    ]
    found = cached(template.frames, range(5))
    for i in range(5):
        assert np.array_equal(found["frame"][i].numpy(), cv2.imread(str(frame_file(folder, i))))
        parsing = cv2.imread(str(folder / "parsing" / f"{i}.png"))
        keep = (parsing == (0, 0, 255)).all(axis=2) | (parsing == (255, 255, 255)).all(axis=2)
        assert 0 < keep.sum() < keep.size
        assert np.array_equal(found["keep"][i].numpy(), keep)


def test_the_largest_box_is_the_widest_by_the_tallest(make_template: MakeTemplate, tmp_path: Path) -> None:
    """As they were cut at the frame's edge."""
    boxes = [(10, 20, 60), (-10, 5, 50), (150, 100, 61), (0, -40, 99)]
    folder = make_template(tmp_path, frames=4, size=(WIDTH, HEIGHT), box=boxes)
    assert Template.from_directory(folder).max_box == (99, 60)


@pytest.mark.parametrize("exact", [True, False])
def test_frames_may_be_decoded_fast_and_parsing_images_never(
    exact: bool, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, bool] = {}

    def noted(paths: list[Path], **options: Any) -> torch.Tensor:
        asked[paths[0].suffix] = options["exact"]
        return read_images(paths, **options)

    monkeypatch.setattr("gpupipe.template.read_images", noted)
    Template.from_directory(template, use_parsing=True, exact=exact)
    assert asked == {".jpg": exact, ".png": True}


def test_without_parsing_there_is_no_mask(template: Path) -> None:
    assert cached(Template.from_directory(template).frames, [0]).keys() == {"frame"}


@pytest.mark.parametrize(("clip", "shown"), [((0, 2), [1, 2]), ((2, 1), [3]), ((0, 9), [0, 1, 2, 3, 4])])
def test_for_a_clip_only_what_it_shows_is_decoded(
    clip: tuple[int, int], shown: list[int], template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Template.from_directory(template, use_parsing=True)
    decoded = []

    def remembered(paths: list[Path], **options: object) -> torch.Tensor:
        decoded.extend(int(path.stem) for path in paths if path.suffix == ".jpg")
        return read_images(paths, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("gpupipe.template.read_images", remembered)
    opened = Template.from_directory(template, use_parsing=True, clip=clip)
    assert decoded == shown
    assert opened.frames.capacity == len(shown)
    assert torch.equal(opened.boxes, whole.boxes) and opened.max_box == whole.max_box
    found, expected = cached(opened.frames, range(5)), cached(whole.frames, range(5))
    assert all(torch.equal(found[name], expected[name]) for name in expected), "the others are there when asked for"


def test_clip_that_starts_outside_the_template(template: Path) -> None:
    with pytest.raises(InputError, match="start frame is 5; expected 0 to 4"):
        Template.from_directory(template, clip=(5, 1))


def test_other_files_are_left_alone(template: Path) -> None:
    for name in ("notes.txt", "cover.jpg", "0.jpg.bak", "-1.jpg"):
        (template / "full_body_img" / name).write_text("not a frame\n")
    (template / "landmarks" / "5.lms").write_text("")
    assert Template.from_directory(template).length == 5


def test_more_frames_than_one_loading_batch_in_order(make_template: MakeTemplate, tmp_path: Path) -> None:
    folder = make_template(tmp_path, frames=37, size=(64, 48))
    template = Template.from_directory(folder)
    assert template.length == 37
    for i in (0, 9, 10, 15, 16, 36):
        assert np.array_equal(cached(template.frames, [i])["frame"][0].numpy(), cv2.imread(str(frame_file(folder, i))))


@pytest.mark.parametrize("fit", [0, 1, 3, 5])
def test_a_template_larger_than_the_budget_gives_the_same_frames(fit: int, template: Path) -> None:
    size = WIDTH * HEIGHT * 3
    whole = Template.from_directory(template)
    tight = Template.from_directory(template, memory_budget=fit * size + 10)
    assert tight.frames.capacity == fit
    assert tight.memory_left == 10
    order = [1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert torch.equal(cached(tight.frames, order)["frame"], cached(whole.frames, order)["frame"])


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_directories(template: Path, tmp_path: Path) -> None:
    assert "no such template directory" in refusal(tmp_path / "absent", tmp_path / "absent")
    (template / "full_body_img").rename(template / "frames")
    expected = "holds no frames; expected full_body_img or one of template.mp4, template.mov"
    assert expected in refusal(template, template)
    with pytest.raises(InputError, match="full_body_img: no such directory of template frames"):
        Template(template / "full_body_img", template / "landmarks")
    (template / "full_body_img").touch()
    assert "is not a folder; expected a directory of template frames" in refusal(template, template / "full_body_img")
    with pytest.raises(InputError, match=r"0\.lms: no such landmark file"):
        Template(template / "frames", template / "absent")


@pytest.mark.parametrize("name", ["{}.jpeg", "{}.JPG", "{:05d}.jpg", "frame_{}.png"])
def test_frames_that_are_all_misnamed_are_pointed_out(name: str, template: Path) -> None:
    for path in (template / "full_body_img").iterdir():
        path.rename(path.with_name(name.format(int(path.stem))))
    (template / "full_body_img" / ".DS_Store").touch()
    message = refusal(template, template / "full_body_img")
    assert message.endswith(f"holds no template frame; expected 0.jpg, 1.jpg, …; there is {name.format(0)}")


def test_no_frames_at_all(template: Path) -> None:
    for path in (template / "full_body_img").iterdir():
        path.unlink()
    assert refusal(template, template / "full_body_img").endswith("expected 0.jpg, 1.jpg, …")


@pytest.mark.parametrize("name", ["02.jpg", "2.JPG"])
def test_a_misnamed_frame_is_pointed_out(name: str, template: Path) -> None:
    frame_file(template, 2).rename(template / "full_body_img" / name)
    assert refusal(template, frame_file(template, 2)).endswith(f"expected 0 to 4 without gaps; there is {name}")


@pytest.mark.parametrize("i", [0, 2])
def test_a_missing_frame_is_refused(i: int, template: Path) -> None:
    frame_file(template, i).unlink()
    assert "no such template frame; expected 0 to 4 without gaps" in refusal(template, frame_file(template, i))


@pytest.mark.parametrize("i", [0, 3, 4])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"\xff\xd8", "cannot be decoded"),
        (b"this is text, not a picture\n", "(not a JPEG)"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "(not a JPEG)"),
        (cv2.imencode(".png", np.zeros((128, 192, 3), np.uint8))[1].tobytes(), "(not a JPEG)"),
    ],
    ids=["empty", "two_bytes", "text", "pdf", "png"],
)
def test_frame_that_is_no_jpeg(i: int, content: bytes, reason: str, template: Path) -> None:
    frame_file(template, i).write_bytes(content)
    assert reason in refusal(template, frame_file(template, i))


@pytest.mark.parametrize("lost", [1, 2, 30, 0.5, 0.9])
@pytest.mark.parametrize("progressive", [0, 1])
def test_truncated_frame(progressive: int, lost: float, template: Path) -> None:
    """OpenCV would return a picture whose end is grey, without an error."""
    path = frame_file(template, 3)
    cv2.imwrite(str(path), cv2.imread(str(path)), [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])
    content = path.read_bytes()
    kept = len(content) - lost if isinstance(lost, int) else int(len(content) * (1 - lost))
    path.write_bytes(content[:kept])
    assert "truncated" in refusal(template, path)


def test_frame_that_is_a_directory(template: Path) -> None:
    frame_file(template, 3).unlink()
    frame_file(template, 3).mkdir()
    assert "is a folder; expected an ordinary file" in refusal(template, frame_file(template, 3))


@pytest.mark.parametrize("i", [1, 4])
@pytest.mark.parametrize("size", [(WIDTH, HEIGHT + 2), (WIDTH - 2, HEIGHT), (HEIGHT, WIDTH)])
def test_sizes_that_differ(size: tuple[int, int], i: int, template: Path) -> None:
    path = frame_file(template, i)
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), size))
    assert f"is {size[0]}×{size[1]}; expected {WIDTH}×{HEIGHT} as" in refusal(template, path)


def test_the_first_frame_shown_is_of_another_size(template: Path) -> None:
    """It is not what the others are compared with."""
    cv2.imwrite(str(frame_file(template, 1)), np.zeros((50, 64, 3), np.uint8))
    with pytest.raises(InputError, match=rf"1\.jpg: is 64×50; expected {WIDTH}×{HEIGHT} as .*0\.jpg"):
        Template.from_directory(template, clip=(0, 2))


def test_size_that_differs_in_another_loading_batch(make_template: MakeTemplate, tmp_path: Path) -> None:
    folder = make_template(tmp_path, frames=18, size=(64, 48))
    for i in (16, 17):
        cv2.imwrite(str(frame_file(folder, i)), np.zeros((50, 64, 3), np.uint8))
    assert "is 64×50; expected 64×48 as" in refusal(folder, frame_file(folder, 16))


@pytest.mark.parametrize("i", [0, 2, 4])
def test_missing_landmarks(i: int, template: Path) -> None:
    landmark_file(template, i).unlink()
    assert refusal(template, landmark_file(template, i)).endswith("no such landmark file")
    (template / "landmarks" / f"00{i}.LMS").touch()
    assert refusal(template, landmark_file(template, i)).endswith(f"no such landmark file; there is 00{i}.LMS")


def spoil_line(template: Path, i: int, number: int, line: str) -> None:
    lines = landmark_file(template, i).read_text().splitlines()
    lines[number] = line
    landmark_file(template, i).write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("line", "met"),
    [
        ("12.0 twelve", "line 32 is '12.0 twelve'; expected two numbers"),
        ("12.0", "line 32 is '12.0'; expected two numbers"),
        ("nan 12.0", "line 32 is 'nan 12.0'; expected finite"),
    ],
)
def test_bad_landmark(line: str, met: str, template: Path) -> None:
    spoil_line(template, 4, 31, line)
    assert met in refusal(template, landmark_file(template, 4))


def test_landmarks_without_a_frame_are_reported(template: Path, caplog: pytest.LogCaptureFixture) -> None:
    length = Template.from_directory(template).length
    assert not caplog.text
    landmark_file(template, length).write_text(landmark_file(template, 0).read_text())
    assert Template.from_directory(template).length == length
    assert f"{landmark_file(template, length)}: has no frame; " in caplog.text


def test_short_landmarks(template: Path) -> None:
    landmark_file(template, 4).write_text("1 2\n" * 52)
    assert "has 52 points; expected at least 53" in refusal(template, landmark_file(template, 4))


@pytest.mark.parametrize(
    ("line", "met"),
    [
        ("0.5 50", "expected point 1 left of point 31"),
        ("-40 50", "expected point 1 left of point 31"),
    ],
)
def test_empty_and_inverted_box(line: str, met: str, template: Path) -> None:
    spoil_line(template, 2, 1, "0.9 50")
    spoil_line(template, 2, 31, line)
    assert met in refusal(template, landmark_file(template, 2))


@pytest.mark.parametrize("box", [(WIDTH, 0, 30), (-30, 0, 30), (0, HEIGHT, 30), (0, -30, 30)])
def test_box_outside_the_frame(box: tuple[int, int, int], make_template: MakeTemplate, tmp_path: Path) -> None:
    folder = make_template(tmp_path, frames=2, size=(WIDTH, HEIGHT), box=[(10, 10, 60), box])
    message = refusal(folder, landmark_file(folder, 1))
    assert "lies wholly outside the frame; expected it to overlap 192×128" in message


@pytest.mark.parametrize("box", [(WIDTH - 1, 0, 30), (-29, 0, 30), (0, HEIGHT - 1, 30), (0, -29, 30)])
def test_box_that_overlaps_by_a_pixel_is_legal(
    box: tuple[int, int, int], make_template: MakeTemplate, tmp_path: Path
) -> None:
    folder = make_template(tmp_path, frames=1, size=(WIDTH, HEIGHT), box=box)
    xmin, ymin, xmax, ymax = Template.from_directory(folder).boxes[0].tolist()
    assert 1 in (xmax - xmin, ymax - ymin)


def test_unknown_devices_are_refused(make_template: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^device is 'tpu'; expected cpu, cuda or cuda:N"):
        Template.from_directory(make_template(tmp_path, frames=1), device="tpu")


# ── parsing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("colour", "kept"),
    [
        ((0, 0, 255), True),
        ((255, 255, 255), True),
        ((255, 0, 0), False),
        ((0, 0, 254), False),
        ((1, 0, 255), False),
        ((0, 255, 255), False),
        ((255, 0, 255), False),
        ((254, 255, 255), False),
        ((128, 128, 255), False),
        ((0, 0, 0), False),
    ],
)
def test_colours_that_keep_the_template_s_pixel(colour: tuple[int, int, int], kept: bool) -> None:
    image = torch.tensor(colour, dtype=torch.uint8).expand(2, 3, 4, 3)
    assert keep_mask(image).shape == (2, 3, 4)
    assert bool(keep_mask(image).all()) == bool(keep_mask(image).any()) == kept


def test_bad_parsing(template: Path) -> None:
    path = template / "parsing" / "3.png"
    good = path.read_bytes()
    for content, met in ((good[:-60], "cannot be decoded"), (b"", "cannot be decoded"), (b"text", "not an image")):
        path.write_bytes(content)
        assert met in refusal(template, path, use_parsing=True)
    cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH + 2, 3), np.uint8))
    assert "is 194×128; expected 192×128" in refusal(template, path, use_parsing=True)
    path.unlink()
    assert "no such image file" in refusal(template, path, use_parsing=True)
    assert Template.from_directory(template).length == 5, "it is not needed without parsing"


def test_parsing_images_that_agree_only_with_each_other(template: Path) -> None:
    for i in range(5):
        cv2.imwrite(str(template / "parsing" / f"{i}.png"), np.zeros((HEIGHT // 2, WIDTH // 2, 3), np.uint8))
    with pytest.raises(InputError, match=r"0\.png: is 96×64; expected 192×128"):
        Template.from_directory(template, use_parsing=True)


def test_missing_parsing_directory(template: Path) -> None:
    (template / "parsing").rename(template / "masks")
    assert "no such" in refusal(template, template / "parsing" / "0.png", use_parsing=True)


def test_memory_is_free_when_the_template_is_let_go(make_template: Callable[..., Path], tmp_path: Path) -> None:
    """Without the garbage collector, which may run late, and does not count a GPU's memory."""
    template = Template.from_directory(make_template(tmp_path))
    gone = weakref.ref(template)
    kept, _ = template.frames.lookup([0])
    bank = weakref.ref(kept["frame"])
    gc.disable()
    try:
        del template, kept
        assert gone() is None
        assert bank() is None
    finally:
        gc.enable()
