"""The precision ledger: how it compares, and that it simulates rounding and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.benchmarks import precision
from gpupipe.benchmarks.precision import simulated, simulated_int8, steps
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.calibration import compare
from gpupipe.features import SpeechFeatures
from gpupipe.models.codes import measure_inputs
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
    # float16 has 3 more digits of mantissa than bfloat16, 6 dB each.
    assert psnr[1] - psnr[2] == pytest.approx(18, abs=5)
    assert torch.equal(steps(network, image, audio), exact), "the network itself is left as it is"


@torch.inference_mode()
def test_int8_is_coarser_than_float16(network: UNet328) -> None:
    image, audio = random_inputs(network, 1)
    network.input_channels = measure_inputs(network, [(image, audio)])
    exact = steps(network, image, audio)
    coarse = compare(steps(simulated_int8(network), image, audio), exact)[0]
    assert 20 < coarse < compare(steps(simulated(network, torch.float16), image, audio), exact)[0]


def test_ranges_are_of_other_speech_than_what_is_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's first half, and its second, from end to end."""
    heard: list[list[int]] = []
    lengths = set[int]()

    def note(template: object, speech: SpeechFeatures, shown: object, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        heard.append(rows.tolist())
        lengths.add(len(speech))
        return random_inputs(UNet328("ave", width=1 / 8), 1)

    monkeypatch.setattr(precision, "network_inputs", note)
    monkeypatch.setattr(precision, "measure_inputs", lambda *_: {})
    monkeypatch.setattr(precision, "contestants", lambda *_: [])
    assert precision.measure(5, torch.device("cpu")) == []
    (measured, painted), (length,) = heard, lengths
    assert measured[0] == 0 and painted[-1] == length - 1
    assert len(painted) == 5 and len(measured) == precision.FRAMES
    assert measured[-1] < painted[0] <= length - length // 2
