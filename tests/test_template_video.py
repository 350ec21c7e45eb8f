"""A video as the template: what is kept of it, that its pixels survive in rendered frames, and bad videos."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from clips import cached
from commands import QUICK, run
from conftest import write_landmarks
from template_videos import BOXES, FRAMES, HEIGHT, WIDTH, decoded, pictures, write_video
from torch import Tensor

from gpupipe import FrameGenerationPipeline, FrameGenerator, InputError, Template, UNetModel
from gpupipe.avatar import Avatar
from gpupipe.kernels.nv12 import from_nv12
from gpupipe.models import Mode
from gpupipe.schedule import template_indices
from gpupipe.template import _even_window, template_size


@pytest.fixture
def folder(video: Path, tmp_path: Path) -> Path:
    """A template directory, for each test its own to spoil."""
    folder = tmp_path / "avatar"
    (folder / "landmarks").mkdir(parents=True)
    (folder / f"template{video.suffix}").write_bytes(video.read_bytes())
    for i, box in enumerate(BOXES):
        write_landmarks(folder / "landmarks" / f"{i}.lms", box)
    return folder


@pytest.mark.parametrize("budget", [0, 5 * WIDTH * HEIGHT * 3, None])
def test_template_keeps_what_fits(budget: int | None, folder: Path, video: Path) -> None:
    template, expected = Template.from_directory(folder, memory_budget=budget), decoded(video)
    assert (template.length, template.width, template.height) == (FRAMES, WIDTH, HEIGHT)
    assert template.frames.capacity == {0: 0, None: FRAMES}.get(budget, template.frames.capacity)
    xmin, ymin, xmax, ymax = template.window
    assert (xmin, ymin, xmax, ymax) == (40, 30, 110, 98)
    for start in range(0, 60, 4):
        numbers = template_indices(start, start + 4, FRAMES)
        found = cached(template.frames, numbers)
        assert torch.equal(found["nv12"], expected[numbers])
        assert torch.equal(found["frame"], from_nv12(expected[numbers])[:, ymin:ymax, xmin:xmax])
    assert torch.equal(
        template.boxes + torch.tensor([xmin, ymin, xmin, ymin]),
        torch.tensor([(x, y, x + side, y + side) for x, y, side in BOXES]),
    )


def test_window_is_the_least_even_rectangle_around_the_boxes() -> None:
    assert _even_window([(41, 31, 102, 93), (44, 33, 100, 95)]) == (40, 30, 102, 96)
    assert _even_window([(40, 30, 102, 94)]) == (40, 30, 102, 94)


def test_suffix_in_capitals(folder: Path) -> None:
    (folder / "template.mp4").rename(folder / "template.MP4")
    assert Template.from_directory(folder).length == FRAMES
    assert template_size(folder) == (FRAMES, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("rate", "mode", "told"),
    [
        (25, "ave", None),
        (Fraction(24975, 1000), "ave", None),
        (Fraction(49, 2), "ave", "24.5 frames a second, of which mode ave shows 25: it moves at 102 % of its speed"),
        (24, "ave", "24 frames a second, of which mode ave shows 25: it moves at 104 % of its speed"),
        (30, "ave", "30 frames a second, of which mode ave shows 25: it moves at 83 % of its speed"),
        (25, "wenet", "25 frames a second, of which mode wenet shows 20: it moves at 80 % of its speed"),
        (20, "wenet", None),
    ],
)
def test_a_video_at_another_rate_than_the_features_is_told(
    rate: int | Fraction, mode: Mode, told: str | None, folder: Path, tiny_model: Callable[..., UNetModel],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its frames are shown one by one, however long they lasted."""
    write_video(folder / "template.mp4", pictures(), rate=rate)
    FrameGenerator(tiny_model(mode), mode).open_template_directory(folder)
    found = [record.getMessage() for record in caplog.records]
    assert [told in message for message in found] == [True] if told is not None else found == []


def test_colours_taken_for_the_size_are_told_once(
    folder: Path, tiny_checkpoint: Callable[..., Path], clip: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Although a command opens the video twice."""
    write_video(folder / "template.mp4", pictures(), tagged=False)
    words = ["--checkpoint", tiny_checkpoint(), "--template", folder, "--audio-features", clip["features"], *QUICK]
    assert run("frames", *words, "--output-dir", tmp_path / "out").exit_code == 0
    told = f"{folder / 'template.mp4'}: does not name its colour matrix; taken as bt601 for its size"
    assert [record.getMessage() for record in caplog.records if "matrix" in record.getMessage()] == [told]


# ── which pixels ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Painter:
    """An engine that paints noise: the same for the same image and window."""

    name, device, dtype = "noise", torch.device("cpu"), torch.float32

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        return {"mean": image.mean(dim=(2, 3))}

    def decode(self, features: dict[str, Tensor], index: Tensor, audio: Tensor) -> Tensor:
        tone = features["mean"][index, :3] + audio.mean(dim=(1, 2, 3))[:, None]
        noise = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
        return (tone[..., None, None] + noise) % 1


@pytest.mark.parametrize(("feather", "use_parsing"), [(0.0, False), (8.0, False), (8.0, True)])
def test_rendered_frames_match_those_from_images(
    use_parsing: bool, feather: float, folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch,
    make_template: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    """Inside the box as from images of the same pixels; outside it bit-equal to the decoded source."""
    source = decoded(video)
    images = make_template(tmp_path / "images", FRAMES, size=(WIDTH, HEIGHT), box=BOXES, parsing=True)
    (images / "parsing").rename(folder / "parsing")
    monkeypatch.setattr(  # images that no JPEG could hold
        "gpupipe.template.read_images",
        lambda paths, *, device, exact=True: (
            from_nv12(source[[int(path.stem) for path in paths]])
            if paths[0].suffix == ".jpg"
            else torch.stack([torch.from_numpy(cv2.imread(str(path))) for path in paths])
        ),
    )
    parsing = folder / "parsing" if use_parsing else None
    templates = (
        Template(folder / "template.mp4", folder / "landmarks", parsing),
        Template(images / "full_body_img", images / "landmarks", parsing),
    )
    frames, audio = np.array([3, 8, 8, 21]), torch.rand(4, 32, 16, 16)
    ours, theirs = (Avatar(template, Painter(), feather=feather).render(frames, audio) for template in templates)
    assert torch.equal(ours, theirs), "BGR: equal everywhere"

    ours, theirs = (
        Avatar(template, Painter(), pixel_format="nv12", feather=feather).render(frames, audio)
        for template in templates
    )
    assert torch.equal(source, decoded(video)), "the cache is not painted into"
    for k, i in enumerate(frames):
        x, y, side = BOXES[i]
        box = np.s_[y : y + side, x : x + side]
        assert torch.equal(ours[k][:HEIGHT][box], theirs[k][:HEIGHT][box])
        cells = np.s_[(y + 1) // 2 : (y + side) // 2, (x + 1) // 2 * 2 : (x + side) // 2 * 2]
        assert torch.equal(ours[k][HEIGHT:][cells], theirs[k][HEIGHT:][cells])
        luma, chroma = (ours[k] != source[i]).split((HEIGHT, HEIGHT // 2))
        assert min(luma[box].float().mean(), chroma[cells].float().mean()) > 0.2, "painted"
        luma[box] = False
        assert not luma.any(), "outside the box"
        chroma[y // 2 : (y + side + 1) // 2, x // 2 * 2 : (x + side + 1) // 2 * 2] = False
        assert not chroma.any(), "outside the cells that the box touches"
        outside = theirs[k] != source[i]
        outside[y // 2 * 2 : y + side + 1, x // 2 * 2 : x + side + 1] = False
        assert outside[:HEIGHT].any(), "negative control: through BGR and back is not bit for bit"


@pytest.mark.parametrize("kind", ["video", "images"])
def test_a_single_frame_is_not_painted_into_the_cache(
    kind: str, folder: Path, make_template: Callable[..., Path], tmp_path: Path
) -> None:
    if kind == "images":
        folder = make_template(tmp_path / "images", 4)
    template = Template.from_directory(folder)
    one, frame, audio = Avatar(template, Painter(), pixel_format="nv12"), np.array([2]), torch.rand(1, 32, 16, 16)
    first = one.render(frame, audio).clone()
    assert not torch.equal(one.render(frame, audio * 0), first)
    assert torch.equal(one.render(frame, audio), first)
    kept, fresh = cached(template.frames, frame), cached(Template.from_directory(folder).frames, frame)
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh)
    again = one.render(frame, audio)
    one.render(frame, audio * 0)
    assert torch.equal(again, first), "nor into what a lookup returned"


def test_video_of_a_video(folder: Path, video: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Written losslessly and decoded: outside the boxes it equals the source; saving frames as well changes nothing."""
    pipeline = FrameGenerationPipeline(tiny_checkpoint(), "ave", "cpu", engine="eager", batch_size=3)
    pipeline.unet_model.engine = Painter()
    features, start = np.abs(np.random.default_rng(1).standard_normal((8, 512))).astype(np.float32), FRAMES - 5
    outputs = [tmp_path / "plain.mkv", tmp_path / "saved.mkv"]
    for output in outputs:
        pipeline.generate_video(features, folder, None, output, start, codec="ffv1", save_frames="saved" in output.name)
    source, (plain, saved) = decoded(video), map(decoded, outputs)
    assert torch.equal(plain, saved)
    assert len(plain) == 8
    for frame, i in zip(plain, template_indices(0, 8, FRAMES, start), strict=True):
        x, y, side = BOXES[i]
        outside = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        outside[y : y + side, x : x + side] = False
        assert torch.equal(frame[:HEIGHT][outside], source[i][:HEIGHT][outside])
    last = cv2.imread(str(tmp_path / "saved_frames" / "frame_00007.jpg"))
    before, same = from_nv12(plain[6:]).numpy()
    assert cv2.PSNR(last, same) > max(30, cv2.PSNR(last, before) + 3), "a JPEG of noise, but of this frame"


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(folder: Path) -> None:
    (folder / "template.mp4").write_text("this is no video\n")


def cut(folder: Path) -> None:
    """Truncate the pictures, but keep the whole index."""
    path = folder / "template.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def spoiled(folder: Path) -> None:
    """Overwrite a picture with noise."""
    path = folder / "template.mp4"
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + 4 + (content.index(b"moov") - content.index(b"mdat")) // 2
    content[middle : middle + 4000] = np.random.default_rng(0).integers(256, size=4000, dtype=np.uint8).tobytes()
    path.write_bytes(content)


def few(folder: Path) -> None:
    (folder / "landmarks" / f"{FRAMES - 1}.lms").unlink()


def odd(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(FRAMES, (191, 127)), pixel_format="yuv444p")


def turned(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(), rotation=90)


def squeezed(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(), pixel_aspect="4/3")


def wide_gamut(folder: Path) -> None:
    write_video(folder / "template.mp4", pictures(2), space=9)  # BT.2020; the enum has a name for it from PyAV 18 on


def sound_only(folder: Path) -> None:
    with av.open(str(folder / "template.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def also_images(folder: Path) -> None:
    (folder / "full_body_img").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (text, r"template\.mp4: not a video that FFmpeg decodes"),
        (cut, r"template\.mp4: has \d+ frames; expected 40, one for each landmark file"),
        (spoiled, r"template\.mp4: frame \d+ cannot be decoded|template\.mp4: not a video that FFmpeg decodes"),
        (few, r"template\.mp4: has 40 frames; expected 39, one for each landmark file in .*landmarks"),
        (odd, r"template\.mp4: frames are 191×127; expected even sizes"),
        (turned, r"template\.mp4: is to be turned by 90° when shown"),
        (squeezed, r"template\.mp4: its pixels are 4/3 wide; expected square ones"),
        (wide_gamut, r"template\.mp4: its colour matrix has number 9 .*expected BT\.709 or BT\.601"),
        (sound_only, r"template\.mp4: has no picture"),
        (also_images, r"holds full_body_img and template\.mp4; expected one of them"),
    ],
)
def test_bad_video(spoil: Callable[[Path], Any], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        Template.from_directory(folder)
    assert "\n" not in str(caught.value)


def test_broken_link_is_reported_as_a_missing_file(folder: Path) -> None:
    (folder / "template.mp4").unlink(missing_ok=True)
    (folder / "template.mp4").symlink_to("moved-away.mp4")
    with pytest.raises(InputError, match=r"template\.mp4: no such video file"):
        Template.from_directory(folder)


def test_no_template_at_all(folder: Path) -> None:
    (folder / "template.mp4").rename(folder / "template.avi")
    with pytest.raises(InputError, match=r"avatar: holds no frames; expected full_body_img or one of template\.mp4,"):
        Template.from_directory(folder)
    with pytest.raises(InputError, match=r"template\.mp4: no such video file"):
        Template(folder / "template.mp4", folder / "landmarks")
