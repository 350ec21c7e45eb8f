"""The AVE encoder: the published names and shapes, the golden features, checkpoints that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from gpupipe.errors import CheckpointError
from gpupipe.mel import window_count, window_starts
from gpupipe.models.audio_encoder import FEATURES, AudioEncoder, load_audio_encoder

RELATIVE = 1e-3  # of the largest golden feature


@pytest.fixture(scope="module")
def state(golden_weights: ModuleType) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden_weights.state_dict("ave-encoder").items()}


@pytest.fixture(scope="module")
def checkpoint(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ave") / "encoder.pth"
    torch.save(state, path)
    return path


def seeded_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return AudioEncoder().state_dict()


def test_names_and_shapes_are_the_published_ones(shared: Path) -> None:
    manifest = json.loads((shared / "golden" / "ave-encoder.keys.json").read_text())
    own = [[name, list(value.shape)] for name, value in AudioEncoder().state_dict().items()]
    assert own == manifest


def golden_windows(shared: Path) -> tuple[torch.Tensor, np.ndarray]:
    golden = np.load(shared / "golden" / "ave-encoder.npz")
    mel = torch.from_numpy(golden["mel"])
    count = window_count(mel.shape[1])
    starts = window_starts(0, count).clamp_max(mel.shape[1] - 16)
    windows = torch.stack([mel[None, :, start : start + 16] for start in starts])
    return windows, golden["features"][1:-1]


@torch.inference_mode()
def error(encoder: AudioEncoder, shared: Path) -> float:
    windows, golden = golden_windows(shared)
    return float(np.abs(encoder(windows)[:, ::4].numpy() - golden).max() / np.abs(golden).max())


def test_golden_features(checkpoint: Path, shared: Path) -> None:
    assert error(load_audio_encoder(checkpoint), shared) <= RELATIVE


@pytest.mark.parametrize("wrong", ["a residual dropped", "a stride turned", "batch statistics"])
def test_the_bound_catches_wrong_networks(wrong: str, checkpoint: Path, shared: Path) -> None:
    encoder = load_audio_encoder(checkpoint)
    if wrong == "a residual dropped":
        encoder[10].residual = False
    elif wrong == "a stride turned":  # (9, 6) → (5, 2) → 3×… would not fit; the sums agree if padding moves with it
        encoder[9].conv_block[0].stride = (3, 3)
        encoder[9].conv_block[0].padding = (1, 2)
    else:
        encoder.train()
    assert error(encoder, shared) > RELATIVE


def test_features_are_not_negative_and_rows_are_independent() -> None:
    encoder = AudioEncoder().eval()
    mel = torch.randn(5, 1, 80, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        rows = encoder(mel)
        alone = encoder(mel[3:4])
    assert rows.shape == (5, FEATURES)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows[3:4], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 80, 16), (1, 1, 80, 15), (1, 1, 16, 80), (1, 2, 80, 16)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, 80, 16\)"):
        AudioEncoder()(torch.zeros(shape))


def test_a_common_prefix_is_dropped(tmp_path: Path) -> None:
    state = seeded_state()
    torch.save({f"audio_encoder.{name}": value for name, value in state.items()}, tmp_path / "e.pth")
    loaded = load_audio_encoder(tmp_path / "e.pth")
    assert not loaded.training
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "not finite"])
def test_damaged_checkpoints_are_named(damage: str, tmp_path: Path) -> None:
    state = seeded_state()
    name = "11.conv_block.0.weight"
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        name = "13.conv_block.0.weight"
        state[name] = torch.zeros(1)
    elif damage == "misshapen":
        state[name] = state[name][:, :, :2]
    else:
        state[name][0, 0, 0, 0] = float("nan")
    path = tmp_path / "encoder.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as raised:
        load_audio_encoder(path)
    assert str(path) in str(raised.value)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)
