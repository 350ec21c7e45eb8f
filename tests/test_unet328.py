"""The U-Net against the original network's outputs, and proof that the bound catches any change of its design."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from clips import network_inputs
from torch import Tensor, nn

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.models import MODES, Mode, UNet328
from gpupipe.models.unet328 import InvertedResidual, Up

BOUND = 1e-5


def golden_network(golden_weights: ModuleType, mode: Mode) -> UNet328:
    network = UNet328(mode)
    state = golden_weights.state_dict(f"unet328-{mode}")
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return network.eval()


@torch.no_grad()
def golden_error(network: UNet328, golden_weights: ModuleType, shared: Path) -> float:
    """The largest difference from the original network's output for the first image, on every 4th pixel."""
    image, audio = golden_weights.unet_inputs(network.mode)
    output = network(torch.from_numpy(image[:1]), torch.from_numpy(audio[:1])).numpy()
    golden = np.load(shared / "golden" / f"unet328-{network.mode}.npz")
    return float(np.abs(output[..., ::4, ::4] - golden["output"][:1]).max())


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_matches_the_original_network(mode: Mode, golden_weights: ModuleType, shared: Path) -> None:
    """The golden file has every 4th pixel, and means and spreads over all, so that the pixels between count too."""
    image, audio = golden_weights.unet_inputs(mode)
    output = golden_network(golden_weights, mode)(torch.from_numpy(image), torch.from_numpy(audio)).numpy()
    golden = np.load(shared / "golden" / f"unet328-{mode}.npz")
    np.testing.assert_allclose(output[..., ::4, ::4], golden["output"], atol=BOUND, rtol=0)
    np.testing.assert_allclose(output.mean(axis=(2, 3)), golden["mean"], atol=BOUND, rtol=0)
    np.testing.assert_allclose(output.std(axis=(2, 3)), golden["std"], atol=BOUND, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_has_the_published_names_and_shapes(mode: Mode, golden_weights: ModuleType) -> None:
    published = {name: value.shape for name, value in golden_weights.state_dict(f"unet328-{mode}").items()}
    assert {name: tuple(value.shape) for name, value in UNet328(mode).state_dict().items()} == published


# ── negative controls: near misses that fit every shape ───────────────────────────────────────────────────────────────


def without_align_corners(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    for up in network.modules():
        if isinstance(up, nn.Upsample):
            up.align_corners = False


def with_the_skip_first(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Up, low: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(low)], dim=1))

    patch.setattr(Up, "forward", forward)


def with_the_audio_first(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    cat = torch.cat

    def swapped(tensors: list[Tensor], dim: int = 0) -> Tensor:
        return cat(tensors[::-1] if tensors[0].shape[-1] == 10 else tensors, dim=dim)

    patch.setattr(torch, "cat", swapped)


def with_nearest_upsampling(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    for up in network.modules():
        if isinstance(up, nn.Upsample):
            up.mode, up.align_corners = "nearest", None


def with_other_audio_strides(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    """conv3 has twice the stride and conv5 none: also 10×10 at the bottleneck, with the same weights."""
    branch = network.audio_model
    branch.conv3.stride = (2 * branch.conv3.stride[0], 2 * branch.conv3.stride[1])
    branch.conv5.stride, branch.conv5.padding = (1, 1), (2, 2)


def with_other_audio_padding(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    """conv5's 3 pixels of padding, all but one on one side: the same 10×10, shifted."""
    conv5 = network.audio_model.conv5
    conv5.padding = (0, 0)
    network.audio_model.conv5 = nn.Sequential(nn.ZeroPad2d((1, 5, 1, 5)), conv5)


def with_the_stride_in_the_expansion(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    """Each down block has its stride in the 1×1 expansion, not in the depthwise convolution."""
    for block in network.modules():
        if isinstance(block, InvertedResidual) and block.conv[3].stride == (2, 2):
            block.conv[0].stride, block.conv[3].stride = (2, 2), (1, 1)


def with_relu6(network: UNet328, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.ReLU, "forward", lambda self, x: nn.functional.relu6(x))


NEAR_MISSES: list[Callable[[UNet328, pytest.MonkeyPatch], None]] = [
    without_align_corners,
    with_the_skip_first,
    with_the_audio_first,
    with_nearest_upsampling,
    with_the_stride_in_the_expansion,
    with_relu6,
]


@pytest.mark.parametrize("alter", NEAR_MISSES)
def test_bound_fails_on_a_near_miss(
    alter: Callable[[UNet328, pytest.MonkeyPatch], None],
    golden_weights: ModuleType,
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = golden_network(golden_weights, "ave")
    alter(network, monkeypatch)
    assert golden_error(network, golden_weights, shared) > 10 * BOUND


@pytest.mark.parametrize("alter", [with_other_audio_strides, with_other_audio_padding])
@pytest.mark.parametrize("mode", MODES)
def test_bound_fails_on_a_near_miss_of_the_audio_branch(
    mode: Mode,
    alter: Callable[[UNet328, pytest.MonkeyPatch], None],
    golden_weights: ModuleType,
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = golden_network(golden_weights, mode)
    alter(network, monkeypatch)
    assert golden_error(network, golden_weights, shared) > 10 * BOUND


# ── without the golden files ──────────────────────────────────────────────────────────────────────────────────────────


@cache
def tiny_network(mode: Mode = "ave") -> UNet328:
    """A network that tests do not change, made once."""
    return seeded_network(mode, width=1 / 8)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_encode_then_decode_is_forward(mode: Mode) -> None:
    network = tiny_network(mode)
    image, audio = network_inputs(mode, 1)
    assert torch.equal(network.decode(network.encode(image), audio), network(image, audio))


@torch.no_grad()
def test_features_of_a_template_frame_serve_every_sound() -> None:
    network = tiny_network()
    image, audio = network_inputs("ave", 2)
    features = network.encode(image[:1])
    first, second = (network.decode(features, audio[i : i + 1]) for i in range(2))
    assert (first - second).abs().max() > 0.01
    assert torch.equal(second, network(image[:1], audio[1:]))


@torch.no_grad()
def test_frames_of_a_batch_do_not_see_each_other() -> None:
    network = tiny_network()
    image, audio = network_inputs("ave", 2)
    batch = network(image, audio)
    alone = torch.cat([network(image[i : i + 1], audio[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(batch, alone, atol=1e-4, rtol=0)
    assert (batch[0] - batch[1]).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "channels"), [(0.125, 4), (0.5, 16), (1, 32)])
def test_width_scales_the_channels(mode: Mode, width: float, channels: int) -> None:
    network = UNet328(mode, width=width)
    assert network.inc.inconv[0].conv[6].out_channels == channels
    assert network.down5.maxpool_conv[0].double_conv[0].conv[6].out_channels == 16 * channels
    assert network.outc.conv.in_channels == channels // 2


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_features_and_output_have_their_shapes(mode: Mode) -> None:
    network = tiny_network(mode)
    image, audio = network_inputs(mode, 1)
    features = network.encode(image)
    sizes = ((4, 320), (4, 160), (8, 80), (16, 40), (32, 20), (64, 10))
    assert [tuple(x.shape) for x in features] == [(1, channels, side, side) for channels, side in sizes]
    assert tuple(network.audio_model(audio).shape) == (1, 64, 10, 10)
    output = network.decode(features, audio)
    assert tuple(output.shape) == (1, 3, 320, 320)
    assert 0 <= output.min() < output.max() - 0.1
    assert output.max() <= 1


@pytest.mark.parametrize("arguments", [{"mode": "mel"}, {"width": 0}, {"width": -0.5}, {"width": 0.3}])
def test_refuses_what_it_cannot_build(arguments: dict[str, Any]) -> None:
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; expected"):
        UNet328(**arguments)
