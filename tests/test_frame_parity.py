"""Whole frames equal those of the OpenCV and PyTorch loop, and the bound refuses wrong variants."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import features, rendered
from parity import EXACT_FRAME, Bound, check_frame, inside, ipp_resize

from gpupipe import FrameGenerator, SpeechEncoder, UNetModel
from gpupipe.benchmarks import reference_loop as reference
from gpupipe.demo import BUNDLE
from gpupipe.models import MODES, Mode, UNet328

MakeModel = Callable[..., UNetModel]
MakeTemplate = Callable[..., Path]
Image = np.ndarray


def boxes_of(template: Path, order: list[int]) -> list[reference.Box]:
    found = []
    for i in order:
        height, width = reference.read_image(template / "full_body_img" / f"{i}.jpg").shape[:2]
        points = reference.read_landmarks(template / "landmarks" / f"{i}.lms")
        found.append(reference.box_from_landmarks(points, height, width))
    return found


def check_parity(
    model: UNetModel,
    template: Path,
    sound: np.ndarray,
    *,
    start_frame: int = 0,
    parsing: bool = False,
    bound: Bound = EXACT_FRAME,
) -> None:
    """Check the contract's bound on every frame of a clip, pasted without feathering."""
    generator = FrameGenerator(model, model.mode, blend="none")
    found = rendered(generator, template, sound, start_frame=start_frame, parsing=parsing)
    options = {"start_frame": start_frame, "use_parsing": parsing}
    expected = list(reference.reference_frames(template, sound, model.network, **options))
    assert len(found) == len(expected) == len(sound)
    length = len(list((template / "full_body_img").iterdir()))
    order = list(islice(reference.ping_pong(length, start_frame), len(sound)))
    for i, box in enumerate(boxes_of(template, order)):
        check_frame(found[i], expected[i], box, bound, what=f"frame {i}")
        assert not np.array_equal(found[i], reference.read_image(template / "full_body_img" / f"{order[i]}.jpg"))


# ── parity with the reference loop ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def speaker_part(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 25th frame of the real template, as links: decoding all 150 takes longer than rendering a few."""
    folder = tmp_path_factory.mktemp("speaker_part")
    for name, suffix in (("full_body_img", ".jpg"), ("landmarks", ".lms")):
        (folder / name).mkdir()
        for i in range(6):
            (folder / name / f"{i}{suffix}").symlink_to((speaker / name / f"{25 * i}{suffix}").resolve())
    return folder


def test_whole_real_template(tiny_model: MakeModel, speaker: Path) -> None:
    check_parity(tiny_model(), speaker, np.load(speaker / "features_ave.npy")[:12], start_frame=143)


@pytest.mark.parametrize(("mode", "seed"), list(zip(MODES, (2, 1, 0), strict=True)))
def test_real_frames_at_full_width(
    mode: Mode, seed: int, golden_checkpoint: Callable[..., Path], speaker: Path, speaker_part: Path
) -> None:
    """Each mode with its own weights; ave with features of real speech."""
    sound = np.load(speaker / "features_ave.npy")[40:43] if mode == "ave" else features(3, mode)
    check_parity(UNetModel(golden_checkpoint(mode, seed), mode, "cpu"), speaker_part, sound, start_frame=2 * seed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_frame_of_the_real_template(mode: Mode, golden_checkpoint: Callable[..., Path], speaker: Path) -> None:
    model = UNetModel(golden_checkpoint(mode, 3), mode, "cpu")
    length = len(list((speaker / "full_body_img").iterdir()))
    sound = np.load(speaker / "features_ave.npy")[:length] if mode == "ave" else features(length, mode)
    check_parity(model, speaker, sound)


def test_bundled_avatar() -> None:
    """A trained network, which can make seven steps of a mouth's values of one step in its crop's.

    The clip is short, but its windows are of speech: features that the network was not trained on make it wilder.
    """
    template, sound = BUNDLE / "template", BUNDLE / "sample.flac"
    order = list(islice(reference.ping_pong(96, 80), 20))
    for i, box in zip(order, boxes_of(template, order), strict=True):
        crop = reference.read_image(template / "full_body_img" / f"{i}.jpg")[inside(box)]
        expected = cv2.resize(crop, (328, 328), interpolation=cv2.INTER_CUBIC)
        if not np.array_equal(ipp_resize(crop, (328, 328)), expected):
            pytest.skip("OpenCV adds up in another order on this processor")
    encoder = SpeechEncoder(BUNDLE / "encoder.safetensors", "cpu")
    model = UNetModel(BUNDLE / "unet.safetensors", device="cpu")
    check_parity(model, template, encoder.features(sound)[60:80], start_frame=80, bound=Bound(1, 0.999))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
def test_synthetic_template(
    seed: int, mode: Mode, tiny_model: MakeModel, make_template: MakeTemplate, tmp_path: Path
) -> None:
    template = make_template(tmp_path, frames=4, parsing=True, seed=seed)
    check_parity(tiny_model(mode, seed), template, features(7, mode, seed), parsing=True)


def test_box_sizes_from_61_to_719(tiny_model: MakeModel, make_template: MakeTemplate, tmp_path: Path) -> None:
    sides = [61, 90, 163, 164, 200, 255, 327, 328, 329, 500, 656, 719]
    boxes = [(17 + i, 0, side) for i, side in enumerate(sides)]
    template = make_template(tmp_path, frames=len(sides), size=(800, 720), box=boxes)
    check_parity(tiny_model(), template, features(len(sides)))


def test_boxes_over_the_frame_s_edge(tiny_model: MakeModel, make_template: MakeTemplate, tmp_path: Path) -> None:
    boxes = [
        (40, 30, 61),
        (-30, 20, 100),
        (150, 20, 100),
        (40, -25, 90),
        (40, 90, 90),
        (-20, -20, 260),
        (-40, 100, 90),
        (120, 41, 87),
    ]
    template = make_template(tmp_path, frames=len(boxes), size=(192, 128), box=boxes)
    check_parity(tiny_model(), template, features(len(boxes)))


@pytest.mark.parametrize("start_frame", [0, 2, 4])
def test_start_frame(start_frame: int, tiny_model: MakeModel, make_template: MakeTemplate, tmp_path: Path) -> None:
    check_parity(tiny_model(), make_template(tmp_path, frames=5), features(9), start_frame=start_frame)


# ── negative controls: a wrong variant of the reference fails the same bound ──────────────────────────────────────────


def without_ring(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "INNER", slice(4, 324))
    paste = reference.paste_face

    def black(frame: Image, box: Any, crop: Image, *rest: Any) -> Image:
        return paste(frame, box, np.zeros_like(crop), *rest)

    patch.setattr(reference, "paste_face", black)


def with_linear_resize(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "_resize", lambda image, width, height: cv2.resize(image, (width, height)))


def with_rounding(patch: pytest.MonkeyPatch) -> None:
    run = reference.run_network

    class Louder(UNet328):
        """Adds half a step before truncation, so that values are rounded."""

        def forward(self, image: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
            return super().forward(image, audio) + 0.5 / 255

    def rounded(network: UNet328, *rest: Any) -> Image:
        other = Louder(network.mode, width=network.width)
        other.load_state_dict(network.state_dict())
        return run(other.eval(), *rest)

    patch.setattr(reference, "run_network", rounded)


def with_the_mask_shifted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "MASK_ROWS", slice(9, 314))


def with_the_sound_one_frame_late(patch: pytest.MonkeyPatch) -> None:
    window = reference.audio_window
    patch.setattr(reference, "audio_window", lambda rows, i, mode: window(rows, i - 1, mode))


def with_the_walk_begun_at_its_start(patch: pytest.MonkeyPatch) -> None:
    walk = reference.ping_pong

    def early(length: int, start: int = 0) -> Any:
        yield start
        yield from walk(length, start)

    patch.setattr(reference, "ping_pong", early)


def with_rgb(patch: pytest.MonkeyPatch) -> None:
    run = reference.run_network
    patch.setattr(
        reference, "run_network", lambda network, stacked, audio: run(network, stacked[[2, 1, 0, 5, 4, 3]], audio)
    )


@pytest.mark.parametrize(
    "alter",
    [
        without_ring,
        with_linear_resize,
        with_rounding,
        with_the_mask_shifted,
        with_the_sound_one_frame_late,
        with_the_walk_begun_at_its_start,
        with_rgb,
    ],
)
def test_bound_fails_on_a_wrong_variant(
    alter: Callable[[pytest.MonkeyPatch], None],
    tiny_model: MakeModel,
    make_template: MakeTemplate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = (30, 10, 100)
    template = make_template(tmp_path, frames=3, box=box)
    found = rendered(FrameGenerator(tiny_model(), blend="none"), template, features(2))
    inside = np.s_[10:110, 30:130]

    def holds() -> bool:
        wanted = reference.reference_frames(template, features(2), tiny_model().network)
        return all(EXACT_FRAME.holds(a[inside], b[inside]) for a, b in zip(found, wanted, strict=True))

    assert holds()
    alter(monkeypatch)
    assert not holds()


def test_feathered_frames_are_not_the_reference_s(
    tiny_model: MakeModel, make_template: MakeTemplate, tmp_path: Path
) -> None:
    template = make_template(tmp_path, frames=3, box=(30, 10, 100))
    hard = rendered(FrameGenerator(tiny_model(), blend="none"), template, features(2))
    soft = rendered(FrameGenerator(tiny_model()), template, features(2))
    for a, b in zip(hard, soft, strict=True):
        assert not EXACT_FRAME.holds(a[10:110, 30:130], b[10:110, 30:130])
        assert np.array_equal(a[18:102, 38:122], b[18:102, 38:122]), "8 pixels in they are the same"
        b[10:110, 30:130] = a[10:110, 30:130]
        assert np.array_equal(a, b)
