"""The fused engine: its arrangement of the network on reference kernels, and on its own."""

from __future__ import annotations

import pytest
import torch
from clips import network_inputs
from torch import Tensor

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.fused import FusedEngine
from gpupipe.kernels import inverted_residual, pointwise
from gpupipe.models import AUDIO_SHAPES, MODES, Mode, UNet328

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUND = 2e-5
"""Allowed difference of outputs in (0, 1): float32 rounding."""

HALF_BOUND = 0.01
"""As above in half precision: two and a half steps of 255, with seeded weights."""


class Floating(FusedEngine):
    """Whose mouths are float32, where nothing hides in truncation."""

    _mouth = torch.float32


def rearranged(network: UNet328, kind: type[FusedEngine] = Floating) -> FusedEngine:
    """On the reference in float32, where nothing hides in rounding."""
    return kind(network, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(("mode", "width"), [("hubert", 3 / 8), ("wenet", 1 / 8)])
@torch.no_grad()
def test_rearranged_network_matches_the_original(mode: Mode, width: float) -> None:
    """Also at widths whose channels are not powers of two, and are padded."""
    network = seeded_network(mode, width=width)
    engine = rearranged(network)
    image, audio = network_inputs(mode, 1)
    mouth = engine.decode(engine.encode(image), torch.tensor([0]), audio)
    assert mouth.shape == (1, 3, 320, 320)
    assert (mouth - network(image, audio)).abs().max() <= BOUND


@torch.no_grad()
def test_each_sample_reads_the_features_at_its_index() -> None:
    network = seeded_network(width=1 / 8)
    image, audio = network_inputs("ave", 2)
    features = rearranged(network).encode(image)
    assert all(value.is_contiguous() and len(value) == 2 for value in features.values())
    mouth = rearranged(network).decode(features, torch.tensor([1, 0]), audio)
    assert (mouth - network(image.flip(0), audio)).abs().max() <= BOUND
    assert (mouth - network(image, audio)).abs().max() > 100 * BOUND
    levels = rearranged(network, FusedEngine).decode(features, torch.tensor([1, 0]), audio)
    assert torch.equal(levels, (mouth * 255).to(torch.uint8)), "truncated"


@pytest.mark.parametrize("mode", MODES)
def test_report_has_what_the_engine_launches(mode: Mode) -> None:
    """Every launch at full width is among those that are compiled ahead of time. Nothing is run."""
    pytest.importorskip("triton")
    from gpupipe.kernels.report import Variant
    from gpupipe.kernels.report_network import BATCH, network_variants, recording

    def facts(variant: Variant) -> tuple[object, ...]:
        return variant.name, variant.types, variant.constants, variant.num_warps, variant.num_stages

    meta = torch.device("meta")
    engine = FusedEngine(UNet328(mode).eval(), device=meta)
    with recording() as launches:
        features = engine.encode(torch.empty(BATCH, 6, 320, 320, device=meta))
        index = torch.empty(BATCH, dtype=torch.int64, device=meta)
        mouth = engine.decode(features, index, torch.empty(BATCH, *AUDIO_SHAPES[mode], device=meta))
    assert mouth.shape == (BATCH, 3, 320, 320)
    assert len(launches.variants) > 30
    compiled = [facts(variant) for variant in network_variants()]
    missing = [facts(variant) for variant in launches.variants if facts(variant) not in compiled]
    assert not missing


def on_kernels(network: UNet328, image: Tensor, audio: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    for module in (inverted_residual, pointwise):
        monkeypatch.setattr(module, "backend", lambda device: "triton")
    engine = Floating(network, device=DEVICE, dtype=torch.float16)
    index = torch.arange(len(image), device=DEVICE).flip(0)
    return engine.decode(engine.encode(image.to(DEVICE)), index, audio.to(DEVICE)).cpu()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_kernels_match_the_network(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network at its own size on interpreted kernels."""
    pytest.importorskip("triton")
    network = seeded_network(mode, width=1 / 8)
    image, audio = network_inputs(mode, 2)
    mouth = on_kernels(network, image, audio, monkeypatch)
    assert (mouth - network(image.flip(0), audio)).abs().max() <= HALF_BOUND
    assert (mouth - network(image, audio)).abs().max() > 5 * HALF_BOUND


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize("width", [1 / 2, 1])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_kernels_match_the_network_on_the_gpu(mode: Mode, width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = seeded_network(mode, width=width)
    image, audio = network_inputs(mode, 3)
    mouth = on_kernels(network, image, audio, monkeypatch)
    expected = network(image.flip(0), audio)
    assert (mouth - expected).square().mean().sqrt() <= HALF_BOUND / 2
    assert (mouth - network(image, audio)).square().mean().sqrt() > HALF_BOUND
