"""Calibrating a checkpoint for 8-bit integers: the same weights, and ranges that are read back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from clips import features, network_inputs
from torch import Tensor
from typer.testing import CliRunner

from gpupipe import (
    Calibration,
    CheckpointError,
    DeviceError,
    InputError,
    SpeechFeatures,
    Template,
    UNetModel,
    calibrate,
    calibration,
)
from gpupipe.calibration import compare, spread
from gpupipe.cli import app
from gpupipe.models import UNet328, load_state_dict, load_unet
from gpupipe.models.checkpoint import with_input_channels
from gpupipe.models.codes import measure_inputs

KEY = "gpupipe.input_channels"


@pytest.fixture(scope="module")
def made(
    tiny_checkpoint: Callable[..., Path], clip: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Calibration:
    target = tmp_path_factory.mktemp("calibrated") / "int8.safetensors"
    return calibrate(tiny_checkpoint(), clip["template"], clip["features"], target, frames=3)


def test_the_weights_are_the_same_and_the_ranges_are_read_back(
    made: Calibration, tiny_checkpoint: Callable[..., Path]
) -> None:
    before, after = load_state_dict(tiny_checkpoint()), load_state_dict(made.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert load_unet(tiny_checkpoint()).input_channels is None
    channels = load_unet(made.path).input_channels
    assert channels is not None
    image = channels["inc.inconv.0.conv.0"]
    assert image.least.shape == (6,) and (image.least >= 0).all() and (image.greatest <= 1).all()
    assert (image.mean > image.least).any() and (image.mean <= image.greatest).all()
    assert made.frames == 3
    assert 20 < made.psnr < 80 and 0 < made.largest < 100, "of random weights; rounded, and the same picture"


def test_a_checkpoint_may_be_calibrated_in_place_and_again(
    made: Calibration, clip: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "again.safetensors"
    path.write_bytes(made.path.read_bytes())
    calibrate(path, clip["template"], np.load(clip["features"]), path, frames=3)
    again, before = load_unet(path).input_channels, load_unet(made.path).input_channels
    assert again is not None and before is not None
    for name, one in again.items():
        for found, expected in zip(one, before[name], strict=True):
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), name
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"output_path": "out.pth"}, r"^out\.pth: has the suffix '\.pth'; expected '\.safetensors'"),
        ({"frames": 0}, r"^frames is 0; expected at least 1$"),
        ({"mode": "wenet"}, r"is a checkpoint of mode ave or hubert; expected mode wenet$"),
        ({"template": "nowhere"}, r"^nowhere"),
    ],
)
def test_what_cannot_be_calibrated_is_told(
    changed: dict[str, Any],
    told: str,
    tiny_checkpoint: Callable[..., Path],
    clip: dict[str, Path],
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"checkpoint_path": tiny_checkpoint(), "template": clip["template"]}
    given |= {"audio_features": clip["features"], "output_path": tmp_path / "out.safetensors"}
    with pytest.raises(InputError, match=told):
        calibrate(**given | changed)
    assert list(tmp_path.iterdir()) == []


def test_a_single_frame_leaves_none_to_check_with(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path: Path
) -> None:
    single, target = make_template(tmp_path / "single", frames=1), tmp_path / "out.safetensors"
    with pytest.raises(InputError, match=r"^audio features: has 1 row, and .*single 1 frame; expected more of either"):
        calibrate(tiny_checkpoint(), single, features(1), target)
    assert not target.exists()
    assert calibrate(tiny_checkpoint(), single, features(2), target).frames == 1


Pairs = list[tuple[int, int]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Pairs:
    """The template frames that are measured or checked, each with its row of features."""
    seen: Pairs = []
    inputs = calibration.network_inputs

    def note(template: Template, speech: SpeechFeatures, shown: Any, heard: Any) -> Any:
        seen.extend(zip(shown.tolist(), heard.tolist(), strict=True))
        return inputs(template, speech, shown, heard)

    monkeypatch.setattr(calibration, "network_inputs", note)
    return seen


def test_the_whole_template_and_all_of_the_speech_are_measured(
    tiny_checkpoint: Callable[..., Path], clip: dict[str, Path], tmp_path: Path, noted: Pairs
) -> None:
    made = calibrate(tiny_checkpoint(), clip["template"], clip["features"], tmp_path / "all.safetensors")
    assert {frame for frame, _ in noted} == set(range(4))
    assert {row for _, row in noted} == set(range(len(np.load(clip["features"]))))
    assert made.frames == 6
    assert len(set(noted)) == len(noted), "none is checked that was measured"


def test_a_template_longer_than_the_speech_is_measured_whole(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path: Path, noted: Pairs
) -> None:
    template = make_template(tmp_path / "long", frames=6)
    made = calibrate(tiny_checkpoint(), template, features(2), tmp_path / "out.safetensors")
    assert made.frames == 3 and {frame for frame, _ in noted} == set(range(6))


def test_a_few_frames_are_enough_to_check_with(
    tiny_checkpoint: Callable[..., Path], clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def agreement(network: UNet328, image: Tensor, audio: Tensor) -> tuple[float, float]:
        compared.append(len(image))
        return 60.0, 1.0

    monkeypatch.setattr(calibration, "_CHECKED", 2)
    monkeypatch.setattr(calibration, "_agreement", agreement)
    made = calibrate(tiny_checkpoint(), clip["template"], clip["features"], tmp_path / "few.safetensors")
    assert (made.frames, compared) == (6, [2])


def test_places_are_spread_from_the_first_to_the_last() -> None:
    assert spread(11, 4).tolist() == [0, 3, 7, 10]
    assert spread(1, 3).tolist() == [0, 0, 0]


def test_agreement_is_in_decibels_and_in_steps() -> None:
    psnr, largest = compare(torch.tensor([0.0, 250.0]), torch.tensor([5.0, 249.0]))
    assert largest == 5 and psnr == pytest.approx(10 * math.log10(255**2 / 13))
    assert compare(torch.ones(3), torch.ones(3)) == (math.inf, 0)


def test_int8_needs_a_calibrated_checkpoint(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"\.pth: lacks the ranges that precision 'int8' needs; expected a"):
        UNetModel(tiny_checkpoint(), device="cpu", precision="int8")


def test_int8_is_for_cpus(made: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpupipe.unet_model.find_device", lambda device: torch.device("cuda:0"))
    with pytest.raises(DeviceError, match=r"^precision is 'int8'; expected float32, float16 or bfloat16 on cuda:0$"):
        UNetModel(made.path, precision="int8")


def _ranges(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        ranges = json.loads(text)
        return json.dumps(change(ranges) or ranges)

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: "7",
        lambda text: "[" * 100_000,
        _ranges(lambda ranges: ranges.pop("outc.conv")[:0]),
        _ranges(lambda ranges: ranges.update({"outc.conv": ranges["outc.conv"][:2]})),
        _ranges(lambda ranges: ranges["outc.conv"][0].pop() and None),
        _ranges(lambda ranges: ranges["outc.conv"][1].__setitem__(0, math.nan)),
        _ranges(lambda ranges: ranges["outc.conv"][1].__setitem__(0, "x")),
        _ranges(lambda ranges: ranges["outc.conv"].__setitem__(0, [9e9] * len(ranges["outc.conv"][0]))),
        _ranges(lambda ranges: ranges["outc.conv"].__setitem__(0, [[0.0]] * len(ranges["outc.conv"][0]))),
    ],
)
def test_damaged_ranges_are_told(damage: Callable[[str], str], made: Calibration, tmp_path: Path) -> None:
    with safetensors.safe_open(made.path, framework="pt") as file:
        metadata = file.metadata()
    damaged = tmp_path / "damaged.safetensors"
    state = safetensors.torch.load_file(made.path)
    safetensors.torch.save_file(state, damaged, metadata=metadata | {KEY: damage(metadata[KEY])})
    with pytest.raises(CheckpointError) as caught:
        load_unet(damaged)
    assert str(caught.value).startswith(f"{damaged}: its metadata {KEY} is damaged (")
    assert "\n" not in str(caught.value)


def test_a_pth_becomes_safetensors_with_views_and_wrappers_resolved(
    made: Calibration, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    state = load_state_dict(tiny_checkpoint())
    wrapped = tmp_path / "wrapped.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, wrapped)
    channels = load_unet(made.path).input_channels
    assert channels is not None
    with_input_channels(wrapped, channels, tmp_path / "out.safetensors")
    assert load_state_dict(tmp_path / "out.safetensors").keys() == state.keys()


def test_ranges_are_kept_to_six_digits(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    channels = measure_inputs(load_unet(tiny_checkpoint()), [network_inputs("ave")])
    with_input_channels(tiny_checkpoint(), channels, tmp_path / "int8.safetensors")
    found = load_unet(tmp_path / "int8.safetensors").input_channels
    assert found is not None
    for name, one in channels.items():
        for expected, read in zip(one, found[name], strict=True):
            torch.testing.assert_close(read, expected, rtol=1e-5, atol=0)


def test_other_metadata_is_kept(made: Calibration, clip: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "told.safetensors"
    safetensors.torch.save_file(load_state_dict(made.path), path, metadata={"trained": "by hand"})
    calibrate(path, clip["template"], clip["features"], path, frames=2)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["trained"] == "by hand"
        assert KEY in file.metadata()


def test_the_command(tiny_checkpoint: Callable[..., Path], clip: dict[str, Path], tmp_path: Path) -> None:
    words = ["calibrate", "--checkpoint", tiny_checkpoint(), "--template", clip["template"], "--frames", "2"]
    words += ["--audio-features", clip["features"], "--output", tmp_path / "int8.safetensors"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "int8.safetensors: written; 2 frames were measured, and on others mouths in int8 are at" in result.output
    assert load_unet(tmp_path / "int8.safetensors").input_channels is not None
