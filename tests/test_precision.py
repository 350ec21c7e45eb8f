"""The precision ledger: how it compares, and that it simulates rounding and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpupipe.benchmarks import precision
from gpupipe.benchmarks.precision import compare, simulated, steps
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.features import SpeechFeatures
from gpupipe.models.unet328 import UNet328, random_inputs


def test_compare_gives_psnr_and_the_largest_difference() -> None:
    exact = torch.full((1, 3, 4, 4), 100.0)
    assert compare(exact, exact) == (math.inf, 0.0)
    psnr, largest = compare(exact + 1, exact)
    assert psnr == pytest.approx(48.13, abs=0.01)  # 20·log10(255)
    assert largest == 1
    one = exact.clone()
    one[0, 0, 0, 0] += 12
    psnr, largest = compare(one, exact)
    assert (psnr, largest) == (pytest.approx(48.13 - 20 * math.log10(12) + 10 * math.log10(48), abs=0.01), 12)


@pytest.fixture(scope="module")
def network() -> UNet328:
    return seeded_network(width=1 / 8)


@torch.inference_mode()
def test_formats_rank_by_their_mantissas(network: UNet328) -> None:
    image, audio = random_inputs(network, 1)
    exact = steps(network, image, audio)
    formats = (torch.float32, torch.float16, torch.bfloat16)
    psnr = [compare(steps(simulated(network, dtype), image, audio), exact)[0] for dtype in formats]
    assert psnr[0] > 100, "rounding to float32 changes nothing but the folding's last digits"
    # float16 has 3 more digits of mantissa than bfloat16, 6 dB each; a rounded weight shifts all pixels alike.
    assert psnr[1] - psnr[2] == pytest.approx(18, abs=8)
    assert torch.equal(steps(network, image, audio), exact), "the network itself is left as it is"


def test_painted_frames_are_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    windows = SpeechFeatures.windows

    def note(speech: SpeechFeatures, first: int, stop: int) -> Tensor:
        heard.append(first)
        return windows(speech, first, stop)

    monkeypatch.setattr(SpeechFeatures, "windows", note)
    image, audio = precision.sample(3)
    assert image.shape == (3, 6, 320, 320) and len(audio) == 3
    length = heard[-1] + 1
    assert heard == [length - length // 2, pytest.approx(0.75 * length, abs=1), length - 1]
    assert not torch.equal(image[0], image[1])
