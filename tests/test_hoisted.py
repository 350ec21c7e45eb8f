"""The network's two halves, hoisted, against the whole network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clips import network_inputs
from torch import nn

from gpupipe.benchmarks.floors import operations_of
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.models import MODES, Mode, UNet328
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.hoisted import TEMPLATE_FEATURES, SpeechHalf, TemplateHalf

BOUND = 2e-5
"""A difference of outputs in (0, 1): float32 rounding, a two-hundredth of a step of 255."""


def error(template: TemplateHalf, speech: SpeechHalf, network: UNet328, batch: int = 1) -> float:
    image, audio = network_inputs(network.mode, batch)
    return float((speech(*template(image), audio) - network(image, audio)).abs().max())


@pytest.mark.parametrize("width", [1 / 8, 1])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_halves_match_the_network(mode: Mode, width: float) -> None:
    network = seeded_network(mode, width=width)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
    assert error(template, speech, network) <= BOUND
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "it is left as it is"


@torch.no_grad()
def test_features_have_their_shapes_and_batches_work() -> None:
    network = seeded_network(width=1 / 4)
    template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
    features = template(network_inputs("ave", 2)[0])
    assert len(features) == len(TEMPLATE_FEATURES)
    sizes = ((12, 320), (8, 160), (16, 80), (32, 40), (64, 20), (512, 10))
    assert [tuple(value.shape) for value in features] == [(2, channels, side, side) for channels, side in sizes]
    assert error(template, speech, network, batch=2) <= BOUND


@torch.no_grad()
def test_template_half_does_not_hear_and_speech_half_does() -> None:
    network = seeded_network(width=1 / 8)
    features = TemplateHalf(network).eval()(network_inputs("ave")[0])
    speech = SpeechHalf(network).eval()
    audio = network_inputs("ave", 2)[1]
    first, second = (speech(*features, audio[i : i + 1]) for i in range(2))
    assert (first - second).abs().max() > 100 * BOUND


def test_training_mode_is_refused() -> None:
    network = seeded_network(width=1 / 8).train()
    for make in (TemplateHalf, SpeechHalf, fold_batch_norms):
        with pytest.raises(ValueError, match="training mode; expected eval"):
            make(network)


@torch.no_grad()
def test_folding_leaves_no_batch_norm_and_the_same_function() -> None:
    network = seeded_network(width=1 / 8)
    folded = fold_batch_norms(network)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    image, audio = network_inputs("ave")
    assert (folded(image, audio) - network(image, audio)).abs().max() <= BOUND


# ── negative controls: near misses that fit every shape ───────────────────────────────────────────────────────────────


def without_align_corners(template: TemplateHalf, speech: SpeechHalf) -> None:
    for module in speech.modules():
        if isinstance(module, nn.Upsample):
            module.align_corners = False


def without_the_projection_s_bias(template: TemplateHalf, speech: SpeechHalf) -> None:
    speech.up5.skip.bias.zero_()


def without_the_bottleneck_s_bias(template: TemplateHalf, speech: SpeechHalf) -> None:
    template.bottleneck.bias.zero_()


def with_the_bias_twice(template: TemplateHalf, speech: SpeechHalf) -> None:
    speech.up3.skip.bias.mul_(2)


def with_audio_and_template_weights_exchanged(template: TemplateHalf, speech: SpeechHalf) -> None:
    first, second = template.bottleneck.weight, speech.audio_expand.weight
    first.data, second.data = second.data, first.data


def with_low_and_skip_weights_exchanged(template: TemplateHalf, speech: SpeechHalf) -> None:
    low, skip = speech.up3.low.weight, speech.up3.skip.weight
    low.data, skip.data = skip.data, low.data


def without_the_first_block_s_batch_norm(template: TemplateHalf, speech: SpeechHalf) -> None:
    template.down1[0].bias.zero_()


@pytest.mark.parametrize(
    "alter",
    [
        without_align_corners,
        without_the_projection_s_bias,
        without_the_bottleneck_s_bias,
        with_the_bias_twice,
        with_audio_and_template_weights_exchanged,
        with_low_and_skip_weights_exchanged,
        without_the_first_block_s_batch_norm,
    ],
)
@torch.no_grad()
def test_bound_fails_on_a_near_miss(alter: Callable[[TemplateHalf, SpeechHalf], None]) -> None:
    network = seeded_network(width=1 / 8)
    template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
    alter(template, speech)
    assert error(template, speech, network) > 10 * BOUND


@torch.no_grad()
def test_the_document_tells_the_multiply_adds() -> None:
    """The columns of the table in docs/performance.md, and their sums."""
    document = Path(__file__).parent.parent / "docs" / "performance.md"
    rows = [line.replace(",", "").split("|")[2:] for line in document.read_text(encoding="utf-8").splitlines()]
    begin = rows.index([" as trained ", " hoisted ", " when its template frame is known ", ""])
    parts, sums = rows[begin + 2 : begin + 7], " ".join(rows[begin + 7])
    columns = [sum(int(row[i]) for row in parts) for i in range(2)]
    network = seeded_network(width=1)
    image, audio = network_inputs("ave")
    template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
    kept = operations_of(speech, *template(image), audio) / 2e6
    counted = [operations_of(network, image, audio) / 2e6, operations_of(template, image) / 2e6 + kept]
    assert columns == pytest.approx(counted, abs=3), "rounded by line"
    assert list(map(int, re.findall(r"\d+", sums))) == pytest.approx([*counted, kept], abs=1)
