"""The network's two halves, hoisted and blocked, against the whole network."""

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
from gpupipe.models.blocked import BLOCK, BlockedSpeechHalf, BlockedTemplateHalf, JoinedUp
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.hoisted import TEMPLATE_FEATURES, SpeechHalf, TemplateHalf

BOUND = 2e-5
"""A difference of outputs in (0, 1): float32 rounding, a two-hundredth of a step of 255."""

HOISTED, BLOCKED = (TemplateHalf, SpeechHalf), (BlockedTemplateHalf, BlockedSpeechHalf)
Halves = tuple[type[TemplateHalf], type[SpeechHalf]]


def error(template: TemplateHalf, speech: SpeechHalf, network: UNet328, batch: int = 1) -> float:
    image, audio = network_inputs(network.mode, batch)
    return float((speech(*template(image), audio) - network(image, audio)).abs().max())


@pytest.mark.parametrize("halves", [HOISTED, BLOCKED])
@pytest.mark.parametrize("width", [1 / 8, 1])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_halves_match_the_network(mode: Mode, width: float, halves: Halves) -> None:
    network = seeded_network(mode, width=width)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    template, speech = halves[0](network).eval(), halves[1](network).eval()
    assert error(template, speech, network) <= BOUND
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "it is left as it is"


@pytest.mark.parametrize("halves", [HOISTED, BLOCKED])
@torch.no_grad()
def test_features_have_their_shapes_and_batches_work(halves: Halves) -> None:
    network = seeded_network(width=1 / 4)
    template, speech = halves[0](network).eval(), halves[1](network).eval()
    features = template(network_inputs("ave", 2)[0])
    assert len(features) == len(TEMPLATE_FEATURES)
    sizes = ((12, 320), (8, 160), (16, 80), (32, 40), (64, 20), (512, 10))
    assert [tuple(value.shape) for value in features] == [(2, channels, side, side) for channels, side in sizes]
    assert error(template, speech, network, batch=2) <= BOUND


@pytest.mark.parametrize(("width", "joined"), [(1, True), (1 / 2, True), (1 / 4, False)])
def test_channels_fill_blocks_and_up5_is_joined_at_large_widths(width: float, joined: bool) -> None:
    network = seeded_network(width=width)
    template, speech = BlockedTemplateHalf(network), BlockedSpeechHalf(network)
    assert {layer.out_channels for layer in template.hidden if isinstance(layer, nn.Conv2d)} == {BLOCK}
    assert isinstance(speech.up5, JoinedUp) == joined
    assert not any(isinstance(up, JoinedUp) for up in (speech.up1, speech.up2, speech.up3, speech.up4))


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
    for make in (*HOISTED, *BLOCKED, fold_batch_norms):
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


def with_the_parts_exchanged(speech: BlockedSpeechHalf) -> None:
    assert isinstance(speech.up5, JoinedUp)
    speech.up5.expand.weight.data = speech.up5.expand.weight.roll(BLOCK, 1)


def with_the_skip_s_channels_displaced(speech: BlockedSpeechHalf) -> None:
    assert isinstance(speech.up5, JoinedUp)
    speech.up5.blocks.weight.data = speech.up5.blocks.weight.roll(1, 0)


@pytest.mark.parametrize("alter", [with_the_parts_exchanged, with_the_skip_s_channels_displaced])
@torch.no_grad()
def test_bound_fails_on_a_near_miss_of_the_joined_level(alter: Callable[[BlockedSpeechHalf], None]) -> None:
    network = seeded_network(width=1 / 2)
    template, speech = BlockedTemplateHalf(network).eval(), BlockedSpeechHalf(network).eval()
    alter(speech)
    assert error(template, speech, network) > 10 * BOUND


@torch.no_grad()
def test_the_document_tells_the_multiply_adds() -> None:
    """The columns of the table in docs/performance.md, and their sums."""
    document = Path(__file__).parent.parent / "docs" / "performance.md"
    rows = [line.replace(",", "").split("|")[2:] for line in document.read_text(encoding="utf-8").splitlines()]
    begin = rows.index([" as trained ", " hoisted ", " for ONNX Runtime ", " when its template frame is known ", ""])
    parts, sums = rows[begin + 2 : begin + 7], " ".join(rows[begin + 7])
    columns = [sum(int(row[i]) for row in parts) for i in range(3)]
    network = seeded_network(width=1)
    image, audio = network_inputs("ave")
    counted, kept = [operations_of(network, image, audio) / 2e6], []
    for template, speech in HOISTED, BLOCKED:
        features = template(network).eval()(image)
        kept.append(operations_of(speech(network).eval(), *features, audio) / 2e6)
        counted.append(operations_of(template(network).eval(), image) / 2e6 + kept[-1])
    assert columns == pytest.approx(counted, abs=3), "rounded by line"
    assert list(map(int, re.findall(r"\d+", sums))) == pytest.approx([*counted, *kept], abs=1)
