"""Sound to mel spectrogram: the golden spectrogram, and the windows that the encoder sees."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from gpupipe import mel
from gpupipe.mel import mel_spectrogram, mel_windows

ERROR = 1e-3


def mel_error(found: torch.Tensor, shared: Path) -> float:
    golden = np.load(shared / "golden" / "ave-encoder.npz")["mel"]
    return float(np.abs(found.numpy() - golden).max()) if found.shape == golden.shape else np.inf


def test_golden_mel(shared: Path, golden_weights: ModuleType) -> None:
    found = mel_spectrogram(golden_weights.wave(0))
    assert found.dtype == torch.float32
    assert mel_error(found, shared) <= ERROR


@pytest.mark.parametrize("wrong", ["pre-emphasis", "window", "highest band", "gain"])
def test_bound_fails_on_a_near_miss(
    wrong: str, shared: Path, golden_weights: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wave = golden_weights.wave(0)
    if wrong == "pre-emphasis":
        monkeypatch.setattr(mel, "PRE_EMPHASIS", 0.95)
    elif wrong == "window":
        monkeypatch.setattr(mel, "_hann", lambda device: torch.hann_window(800, periodic=False, device=device))
    elif wrong == "highest band":
        monkeypatch.setattr(mel, "MEL_RANGE_HZ", (55.0, 8000.0))
        monkeypatch.setattr(mel, "mel_filters", mel.mel_filters.__wrapped__)
    else:
        wave = wave * 1.01
    assert mel_error(mel_spectrogram(wave), shared) > ERROR


def test_a_program_s_default_type_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.sin(np.arange(8000, dtype=np.float32))
    monkeypatch.setattr(mel, "_hann", mel._hann.__wrapped__)
    torch.set_default_dtype(torch.float64)
    try:
        found = list(mel_windows([mel_spectrogram(wave)]))
    finally:
        torch.set_default_dtype(torch.float32)
    expected = list(mel_windows([mel_spectrogram(wave)]))
    assert {piece.dtype for piece in found} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_program_s_autocast_changes_nothing() -> None:
    wave = np.sin(np.arange(8000, dtype=np.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mel_spectrogram(wave)
    assert torch.equal(found, mel_spectrogram(wave))


@pytest.mark.parametrize("columns", [400, 384])
def test_windows_follow_the_formula(columns: int) -> None:
    """In floats, as the family's programs have it: at 384 columns they make a window less than whole numbers would."""
    numbered = torch.arange(columns, dtype=torch.float32).expand(80, columns)
    windows = torch.cat(list(mel_windows([numbered[:, :100], numbered[:, 100:101], numbered[:, 101:]])))
    expected = [min(int(80.0 * i / 25), columns - 16) for i in range(int((columns - 16) / 80 * 25) + 2)]
    assert windows[:, 0, 0, 0].tolist() == expected
    assert torch.equal(windows[:, 0, 5, 15] - windows[:, 0, 5, 0], torch.full((len(windows),), 15.0))


def test_more_than_one_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one channel"):
        mel_spectrogram(np.zeros((2, 16000), np.float32))
