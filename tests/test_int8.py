"""The network's halves in 8-bit integers: the same function but for rounding, and what is rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from clips import network_inputs
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gpupipe.benchmarks.precision import sample, steps
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.calibration import compare
from gpupipe.demo import BUNDLE
from gpupipe.models import MODES, Mode, UNet328, load_unet
from gpupipe.models import int8 as integers
from gpupipe.models.codes import Channels, Codes, Int8Conv, coded, measure_inputs, signed_codes, unsigned_codes
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.hoisted import TEMPLATE_FEATURES, conv1x1
from gpupipe.models.int8 import Int8SpeechHalf, Int8TemplateHalf
from gpupipe.onnx_export import export_halves
from gpupipe.quiet_onnxruntime import onnxruntime

TRAINED = 47.5
"""Smallest PSNR in dB of the bundled network's mouths against float32."""


def measured(mode: Mode = "ave", width: float = 1 / 8) -> UNet328:
    network = seeded_network(mode, width=width)
    network.input_channels = measure_inputs(network, [network_inputs(mode, 2)])
    return network


def halves(network: UNet328) -> tuple[Int8TemplateHalf, Int8SpeechHalf]:
    return Int8TemplateHalf(network).eval(), Int8SpeechHalf(network).eval()


def paint(network: UNet328, image: Tensor, audio: Tensor) -> Tensor:
    template, speech = halves(network)
    return steps(lambda image, audio: speech(*template(image), audio), image, audio)


class Unrounded(Int8Conv):
    """The convolution with its weights as they were."""

    def __init__(self, layer: nn.Conv2d, *codes: Any, twice: bool = False) -> None:
        super().__init__(layer, *codes, twice=twice)
        if twice:
            layer = conv1x1(torch.cat([layer.weight, layer.weight], dim=1) / 2, layer.bias)
        self.exact = coded(layer, *codes)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.exact.weight, self.exact.bias, **self.how)


@pytest.mark.parametrize(("mode", "width"), [*((mode, 1 / 8) for mode in MODES), ("wenet", 1)])
@torch.no_grad()
def test_without_rounding_it_is_the_network(mode: Mode, width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At width 1 the first block of WeNet's audio branch adds its input, too."""
    network = measured(mode, width)
    monkeypatch.setattr(integers, "Int8Conv", Unrounded)
    monkeypatch.setattr(integers, "round_signed", lambda codes: codes)
    monkeypatch.setattr(integers, "round_unsigned", torch.relu)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    image, audio = network_inputs(mode, 2)
    error = (paint(network, image, audio) - steps(network, image, audio)).abs().max()
    assert error < 0.01, "in steps of 255: float32 rounding"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "it is left as it is"
    monkeypatch.setattr(integers, "round_unsigned", lambda codes: codes)
    assert (paint(network, image, audio) - steps(network, image, audio)).abs().max() > 0.1, "without ReLU"


@torch.no_grad()
def test_trained_mouths_are_near_those_of_float32() -> None:
    network = load_unet(BUNDLE / "unet.safetensors", "ave")
    image, audio = sample(6)
    exact = steps(network, image, audio)
    found = compare(paint(network, image, audio), exact)[0]
    assert found >= TRAINED
    assert compare(paint(network, image, audio), exact.roll(1, dims=0))[0] < TRAINED, "another frame's mouth"
    assert network.input_channels is not None
    ranges = network.input_channels
    network.input_channels = {name: Channels(2 * one[0], 2 * one[1], one[2]) for name, one in ranges.items()}
    assert compare(paint(network, image, audio), exact)[0] < found - 4, "steps twice as large: 6 dB, less the weights'"
    network.input_channels = {name: Channels(one[0] / 2, one[1] / 2, one[2]) for name, one in ranges.items()}
    assert compare(paint(network, image, audio), exact)[0] < 40, "half of the ranges is cut off"


@torch.no_grad()
def test_the_bias_takes_back_what_rounding_weights_shifts() -> None:
    network = load_unet(BUNDLE / "unet.safetensors", "ave")
    image, audio = sample(4)
    exact = steps(network, image, audio)
    found = compare(paint(network, image, audio), exact)[0]
    assert network.input_channels is not None
    # Codes whose mean is 0 shift nothing: those of signed tensors have it in the middle of the range.
    without = {
        name: one._replace(mean=(one.least + one.greatest) / 2 if (one.least < 0).any() else 0 * one.mean)
        for name, one in network.input_channels.items()
    }
    network.input_channels = without
    assert compare(paint(network, image, audio), exact)[0] < found - 0.5


@torch.no_grad()
def test_features_and_weights_are_whole_numbers_of_8_bits() -> None:
    network = measured()
    template, speech = halves(network)
    features = template(network_inputs("ave")[0])
    assert len(features) == len(TEMPLATE_FEATURES)
    for value in features:
        assert torch.equal(value, value.round())
        assert value.min() >= -128 and value.max() <= 127
    layers = [layer for half in (template, speech) for layer in half.modules() if isinstance(layer, Int8Conv)]
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in fold_batch_norms(network).modules())
    assert len(layers) == convolutions - 4, "but the first block's three, of which one is folded away, and the head"
    for layer in layers:
        weights = layer.weight / layer.scale[:, None, None, None]
        assert (weights - weights.round()).abs().max() < 1e-3
        assert weights.abs().max() < 127.01
        assert (weights.abs().amax((1, 2, 3)) > 126).all(), "each output channel uses all of its steps"


@torch.no_grad()
def test_an_input_that_comes_twice_halves_the_weights_steps() -> None:
    torch.manual_seed(0)
    layer = conv1x1(torch.randn(8, 12, 1, 1), torch.zeros(8))
    codes = Codes(torch.ones(12), torch.zeros(12), torch.zeros(12))
    both = Codes(*(torch.cat([part, part]) for part in codes))
    once, twice = Int8Conv(layer, codes, None), Int8Conv(layer, both, None, twice=True)
    sums = twice.weight.chunk(2, dim=1)[0] + twice.weight.chunk(2, dim=1)[1]
    exact = layer.weight
    assert (sums - exact).square().mean() < 0.35 * (once.weight - exact).square().mean()


@torch.no_grad()
def test_both_halves_of_an_input_that_comes_twice_have_the_same_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand for the same values; their codes do not."""
    seen: list[Codes] = []

    class Noted(Int8Conv):
        def __init__(self, layer: nn.Conv2d, reads: Codes, writes: Codes | None, *, twice: bool = False) -> None:
            seen.extend([reads] if twice else [])
            super().__init__(layer, reads, writes, twice=twice)

    monkeypatch.setattr(integers, "Int8Conv", Noted)
    halves(measured())
    [codes] = seen
    first, second = (codes.step * codes.mean + codes.offset).chunk(2)
    torch.testing.assert_close(first, second)


def test_channels_that_are_always_0_have_steps_too() -> None:
    silent = Channels(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    for codes in (signed_codes(silent), unsigned_codes(silent)):
        assert (codes.step > 0).all() and codes.mean.tolist() == [0, 0, 0]


@torch.no_grad()
def test_measured_inputs_are_those_of_all_batches() -> None:
    network = seeded_network(width=1 / 8)
    image, audio = network_inputs("ave", 3)
    whole = measure_inputs(network, [(image, audio)])
    parts = measure_inputs(network, zip(image.split([2, 1]), audio.split([2, 1]), strict=True))
    layers = {name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    assert whole.keys() == parts.keys() == layers
    for name, one in whole.items():
        for found, expected in zip(parts[name], one, strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), name
    first = whole["inc.inconv.0.conv.0"]
    assert torch.equal(first.greatest, image.amax((0, 2, 3)))
    assert torch.allclose(first.mean, image.mean((0, 2, 3)), atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in network.modules()), "nothing is left behind"


def test_it_needs_what_was_measured() -> None:
    with pytest.raises(ValueError, match="the network's inputs were not measured"):
        Int8TemplateHalf(seeded_network(width=1 / 8))
    with pytest.raises(ValueError, match="the network's inputs were not measured"):
        export_halves(seeded_network(width=1 / 8), int8=True)


@torch.no_grad()
def test_the_exported_graphs_round_what_this_rounds() -> None:
    """ONNX Runtime runs their quantise and dequantise nodes one by one, in float32."""
    network = measured()
    template, speech = halves(network)
    image, audio = network_inputs("ave")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    first, second = (
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for graph in export_halves(network, int8=True)
    )
    features = template(image)
    for depth, (found, expected) in enumerate(zip(first.run(None, {"image": image.numpy()}), features, strict=True)):
        differs = np.abs(found - expected.numpy())
        assert np.array_equal(found, found.round())
        # Sums in another order are now and then rounded to the next step, from layer to layer more often.
        assert (differs > 0.5).mean() < (0.2 if depth else 1e-4)
        assert differs.max() <= 4
    named = {name: value.numpy() for name, value in zip(TEMPLATE_FEATURES, features, strict=True)}
    [mouth] = second.run(None, named | {"audio": audio.numpy()})

    def same(other: Tensor) -> float:
        return float((np.abs(mouth - other.numpy()) < 1e-4).mean())

    assert same(speech(*features, audio)) > 0.15
    assert same(network(image, audio)) < 0.05, "it is rounded"
