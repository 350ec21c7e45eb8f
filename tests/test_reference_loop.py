"""The oracle itself, against facts that can be checked by hand: it must not be wrong in the way the pipeline is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from clips import landmarks
from torch import Tensor

from gpupipe.benchmarks import reference_loop as reference
from gpupipe.models import UNet328

MakeTemplate = Callable[..., Path]


class Grey(UNet328):
    """A network that paints every pixel the same, whatever it sees; it keeps what it was given."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__(width=1 / 8)
        self.level = level
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        self.seen.append((image, audio))
        return torch.full((len(image), 3, 320, 320), self.level)


class Mixed(Grey):
    """What it paints depends on every pixel it sees, and on every row of the sound and its place."""

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        place = torch.linspace(0, 1, audio.numel())
        return (0.5 * image[:, :3] + 0.2 * image[:, 3:] + 0.3 * (audio.flatten() * place).mean()).clamp(0, 1)


@pytest.fixture
def frame() -> reference.Image:
    """Smooth, so that a wrong place or a wrong scale shows, and without a black pixel."""
    y, x = np.mgrid[:480, :640].astype(np.float32)
    colours = np.stack([40 + x / 4, 60 + y / 4, 250 - (x + y) / 6], axis=2)
    return colours.astype(np.uint8)


SILENCE = np.zeros((32, 16, 16), dtype=np.float32)


# ── what frame i is made of ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("length", "start", "order"),
    [
        (1, 0, [0, 0, 0]),
        (2, 0, [1, 0, 1, 0]),
        (4, 0, [1, 2, 3, 2, 1, 0, 1, 2, 3, 2]),
        (5, 2, [3, 4, 3, 2, 3, 4]),
        (5, 3, [4, 3, 4, 3]),
        (5, 4, [4, 4, 4]),
    ],
)
def test_ping_pong_begins_after_the_start(length: int, start: int, order: list[int]) -> None:
    assert list(islice(reference.ping_pong(length, start), len(order))) == order


@pytest.mark.parametrize(("length", "start"), [(4, 4), (4, -1), (0, 0)])
def test_start_outside_the_template_is_an_error(length: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"^start frame is {start};"):
        next(reference.ping_pong(length, start))


def test_audio_window_is_eight_rows_before_and_eight_from_i_on() -> None:
    features = np.repeat(np.arange(1, 31, dtype=np.float32)[:, None], 512, axis=1)
    rows = [reference.audio_window(features, i).reshape(16, 512)[:, 0].tolist() for i in (0, 10, 29)]
    assert rows[0] == [0] * 8 + [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows[1] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert rows[2] == [22, 23, 24, 25, 26, 27, 28, 29, 30] + [0] * 7


def test_audio_window_has_its_mode_s_shape_and_windowed_features_pass() -> None:
    assert reference.audio_window(np.zeros((3, 2, 1024), np.float32), 1, "hubert").shape == (32, 32, 32)
    assert reference.audio_window(np.zeros((3, 16, 512), np.float32), 1, "wenet").shape == (256, 16, 32)
    windowed = np.random.default_rng(0).random((3, 32, 16, 16), dtype=np.float32)
    assert np.array_equal(reference.audio_window(windowed, 2), windowed[2])


def test_landmarks_are_truncated_towards_zero(tmp_path: Path) -> None:
    (tmp_path / "0.lms").write_text("1.9 2.1\n-3.9 4\n\n")
    points = reference.read_landmarks(tmp_path / "0.lms")
    assert points.dtype == np.int32
    assert points.tolist() == [[1, 2], [-3, 4]]


def test_box_is_the_square_of_points_1_31_and_52() -> None:
    assert reference.box_from_landmarks(landmarks(100, 200, 61), 480, 640) == (100, 200, 161, 261)


@pytest.mark.parametrize(
    ("place", "box"),
    [
        ((-20, 10, 100), (0, 10, 80, 110)),
        ((600, 10, 100), (600, 10, 640, 110)),
        ((10, -30, 100), (10, 0, 110, 70)),
        ((10, 400, 100), (10, 400, 110, 480)),
        ((-10, -10, 700), (0, 0, 640, 480)),
    ],
)
def test_box_over_the_edge_is_clamped(place: tuple[int, int, int], box: reference.Box) -> None:
    assert reference.box_from_landmarks(landmarks(*place), 480, 640) == box


@pytest.mark.parametrize(
    "place", [(100, 100, 0), (100, 100, -5), (640, 0, 50), (-50, 0, 50), (0, 480, 50), (0, -50, 50)]
)
def test_box_that_misses_the_frame_is_an_error(place: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"^box is \("):
        reference.box_from_landmarks(landmarks(*place), 480, 640)


# ── one frame ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_network_sees_the_inner_crop_and_the_same_with_the_mouth_masked(frame: reference.Image) -> None:
    """With a box of 328 the crop is the frame's own pixels, so that every place can be named in the frame."""
    network = Grey()
    sound = np.random.default_rng(0).random((32, 16, 16), dtype=np.float32)
    reference.reference_frame(frame, landmarks(100, 50, 328), sound, network)
    image, audio = network.seen[0]
    assert image.shape == (1, 6, 320, 320)
    assert image.dtype == torch.float32
    assert np.array_equal(audio[0], sound)
    pixels = (image[0] * 255).round().numpy().astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(pixels[..., :3], frame[54:374, 104:424])
    black = (pixels[..., 3:] == 0).all(axis=2)
    assert black[5:310, 5:315].all()
    assert black.sum() == 305 * 310
    assert np.array_equal(pixels[..., 3:][~black], frame[54:374, 104:424][~black])


@pytest.mark.parametrize(("level", "value"), [(0.0, 0), (0.5, 127), (254.9 / 255, 254), (1.0, 255)])
def test_output_is_truncated_not_rounded(level: float, value: int, frame: reference.Image) -> None:
    result = reference.reference_frame(frame, landmarks(100, 50, 328), SILENCE, Grey(level))
    assert (result[54:374, 104:424] == value).all()


def test_ring_of_four_pixels_and_all_outside_stay_the_template_s(frame: reference.Image) -> None:
    result = reference.reference_frame(frame, landmarks(100, 50, 328), SILENCE, Grey())
    painted = np.zeros(frame.shape[:2], dtype=bool)
    painted[54:374, 104:424] = True
    assert np.array_equal(result[~painted], frame[~painted])
    assert (result[painted] == 127).all()


@pytest.mark.parametrize("place", [(100, 50, 61), (-20, 60, 200), (500, 300, 250), (-40, -60, 719)])
def test_outside_the_box_is_bit_equal_and_the_input_unchanged(
    place: tuple[int, int, int], frame: reference.Image
) -> None:
    before = frame.copy()
    points = landmarks(*place)
    result = reference.reference_frame(frame, points, SILENCE, Grey())
    xmin, ymin, xmax, ymax = reference.box_from_landmarks(points, 480, 640)
    outside = np.ones(frame.shape[:2], dtype=bool)
    outside[ymin:ymax, xmin:xmax] = False
    assert np.array_equal(result[outside], frame[outside])
    assert not np.array_equal(result[~outside], frame[~outside])
    assert np.array_equal(frame, before)


def test_clamped_box_is_stretched_to_the_square_and_back(frame: reference.Image) -> None:
    """A box of 80×200 goes through as it is: the ring is 4 of 328 pixels in each direction, 1 wide and 2.4 high."""
    result = reference.reference_frame(frame, landmarks(-120, 60, 200), SILENCE, Grey())
    face = result[60:260, 0:80].astype(int)
    grey = (abs(face - 127) <= 1).all(axis=2)
    assert grey[6:-6, 4:-4].all()
    assert not grey[0].any()
    assert not grey[:, 0].any()


def test_colours_stay_in_order(frame: reference.Image) -> None:
    """BGR in, BGR to the network, BGR out."""

    class Blue(Grey):
        def forward(self, image: Tensor, audio: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 320, 320)

    result = reference.reference_frame(frame, landmarks(100, 50, 328), SILENCE, Blue())
    assert result[200, 250].tolist() == [255, 127, 0]


def test_parsing_keeps_two_colours_only(frame: reference.Image) -> None:
    parsing = np.zeros_like(frame)
    parsing[:, 200:220] = (0, 0, 255)
    parsing[:, 220:240] = (255, 255, 255)
    parsing[:, 240:260] = (255, 0, 0)
    parsing[:, 260:280] = (0, 0, 254)
    result = reference.reference_frame(frame, landmarks(100, 50, 328), SILENCE, Grey(), parsing)
    inside = slice(54, 374)
    assert np.array_equal(result[inside, 200:240], frame[inside, 200:240])
    assert (result[inside, 240:424] == 127).all()
    assert (result[inside, 104:200] == 127).all()


# ── a clip ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_follow_the_schedule_and_the_sound(make_template: MakeTemplate, tmp_path: Path) -> None:
    boxes = [(10 + 8 * i, 20, 48) for i in range(4)]
    template = make_template(tmp_path, frames=4, box=boxes)
    features = np.random.default_rng(1).random((8, 512), dtype=np.float32)
    network = Mixed()
    frames = list(reference.reference_frames(template, features, network, start_frame=1))
    order = [2, 3, 2, 1, 2, 3, 2, 1]
    assert len(frames) == len(order)
    for i, (index, frame) in enumerate(zip(order, frames, strict=True)):
        source = reference.read_image(template / "full_body_img" / f"{index}.jpg")
        window = reference.audio_window(features, i)
        assert np.array_equal(frame, reference.reference_frame(source, landmarks(*boxes[index]), window, network))
    assert not np.array_equal(frames[0], frames[2]), "frame 2 shows the same template frame with another sound"


def test_parsing_is_read_for_its_frame(make_template: MakeTemplate, tmp_path: Path) -> None:
    template = make_template(tmp_path, frames=3, parsing=True)
    features = np.zeros((2, 512), dtype=np.float32)
    network = Grey()
    plain = list(reference.reference_frames(template, features, network))
    parsed = list(reference.reference_frames(template, features, network, use_parsing=True))
    for index, without, kept in zip([1, 2], plain, parsed, strict=True):
        parsing = reference.read_image(template / "parsing" / f"{index}.png")
        source = reference.read_image(template / "full_body_img" / f"{index}.jpg")
        keep = (parsing == (0, 0, 255)).all(axis=2) | (parsing == (255, 255, 255)).all(axis=2)
        assert 0 < keep.sum() < keep.size
        assert np.array_equal(kept, np.where(keep[..., None], source, without))


def test_render_writes_every_frame_with_sound(make_template: MakeTemplate, tmp_path: Path) -> None:
    template = make_template(tmp_path / "template", frames=3)
    sound, output = tmp_path / "tone.wav", tmp_path / "clip.mp4"
    samples = (8000 * np.sin(np.arange(16000 * 12 // 25) / 8)).astype(np.int16)
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        tone = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        tone.rate = 16000
        container.mux(stream.encode(tone))
    features = np.zeros((12, 512), dtype=np.float32)
    times = reference.render(template, features, Grey(), sound, output)
    with av.open(str(output)) as container:
        codecs = [stream.codec_context.name for stream in container.streams]
        assert codecs == ["h264", "aac"]
        pictures = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    assert len(pictures) == 12
    expected = list(reference.reference_frames(template, features, Grey()))
    for picture, wanted in zip(pictures, expected, strict=True):
        assert cv2.PSNR(picture, wanted) > 25
    assert cv2.PSNR(pictures[0], expected[1]) < 25, "another frame must not pass for this one"
    assert set(times.seconds) == set(reference.STAGES)
    assert all(seconds > 0 for seconds in times.seconds.values())
