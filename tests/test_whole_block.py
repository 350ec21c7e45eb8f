"""The plain reference of a whole block, from packed weights, against the network's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.kernels.pointwise import padded
from gpupipe.kernels.whole_block import (
    PackedBlock,
    bytes_moved,
    pack_head,
    pack_whole_block,
    pad_channels,
    whole_block,
)
from gpupipe.models.fold import fold_batch_norms


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A folded network; at this width its blocks have 4, 8, 12 … channels, and none is a multiple of 16."""
    return fold_batch_norms(seeded_network(width=1 / 8).eval())


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(block: Any, low_channels: int = 0) -> PackedBlock:
    layers = block.conv[0], block.conv[3], block.conv[6]
    return pack_whole_block(*layers, low_channels=low_channels, residual=block.residual)


def channels_last(x: Tensor) -> Tensor:
    return pad_channels(x.permute(0, 2, 3, 1)).half().contiguous()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the expected values' spread; ``found`` has padding after its channels."""
    channels = expected.shape[1]
    assert not found[..., channels:].any(), "what pads channels is not 0"
    return float((found[..., :channels].permute(0, 3, 1, 2).float() - expected).abs().max() / expected.std())


@torch.inference_mode()
def test_blocks_are_the_network_s(network: Any) -> None:
    for down, channels in ((network.down1, 4), (network.down3, 8)):
        halving, block = down.maxpool_conv[0].double_conv
        x = halving(noise(2, channels, 13, 10))
        assert difference(whole_block(channels_last(x), packed(block)), block(x)) < 0.01


@torch.inference_mode()
def test_upsampling_concatenation_and_head_are_the_network_s(network: Any) -> None:
    low, skip = noise(2, 4, 5, 7), noise(2, 4, 10, 14)
    first, second = network.up5.conv.double_conv
    block, below = packed(first, low_channels=4), {"low": channels_last(low), "index": torch.arange(2)}
    half = whole_block(channels_last(skip), block, **below)
    expected = first(torch.cat([network.up5.up(low), skip], dim=1))
    assert difference(half, expected) < 0.01
    swapped = first(torch.cat([skip, network.up5.up(low)], dim=1))
    assert difference(half, swapped) > 0.1
    mouth = (torch.sigmoid(network.outc(second(expected))) * 255).to(torch.uint8)
    found = whole_block(half, packed(second), head=pack_head(network.outc.conv))
    steps = (found.int() - mouth.int()).abs()
    assert steps.max() <= 1 and (steps == 0).float().mean() > 0.95


@torch.inference_mode()
def test_a_skip_is_taken_by_index(network: Any) -> None:
    block = packed(network.up5.conv.double_conv[0], low_channels=4)
    low, bank, index = channels_last(noise(2, 4, 4, 4)), channels_last(noise(3, 4, 8, 8)), torch.tensor([2, 0])
    found = whole_block(bank, block, low=low, index=index)
    assert torch.equal(found, whole_block(bank[index], block, low=low, index=torch.arange(2)))
    assert not torch.equal(found, whole_block(bank, block, low=low, index=torch.arange(2)))


def test_channels_are_padded_to_powers_of_two() -> None:
    assert [padded(channels) for channels in (1, 12, 16, 17, 32, 48)] == [16, 16, 16, 32, 32, 64]


def test_bytes_of_the_largest_block() -> None:
    """up5.0 at width 1: 32 channels at 160², 32 at 320² in, 16 at 320² out."""
    layers = nn.Conv2d(64, 128, 1), nn.Conv2d(128, 128, 3, padding=1, groups=128), nn.Conv2d(128, 16, 1)
    block = pack_whole_block(*layers, low_channels=32)
    assert bytes_moved(block, (320, 320)) == 160**2 * 64 + 320**2 * 64 + 320**2 * 32
    assert bytes_moved(block, (320, 320), head=True) == 160**2 * 64 + 320**2 * 64 + 320**2 * 3


def test_arguments_that_do_not_fit_are_errors() -> None:
    layers = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)
    block = pack_whole_block(*layers)
    for channels, weights in ((24, block), (8, pack_whole_block(*layers, residual=True))):
        told = rf"skip has shape \(1, 4, 4, {channels}\); expected \(1, 4, 4, 16\)"
        with pytest.raises(ValueError, match=told):
            whole_block(torch.zeros(1, 4, 4, channels).half(), weights)
    with pytest.raises(ValueError, match="float32"):
        whole_block(torch.zeros(1, 4, 4, 16), block)
    with pytest.raises(ValueError, match="low is given; the weights have 0"):
        whole_block(torch.zeros(1, 4, 4, 16).half(), block, low=torch.zeros(1, 2, 2, 16).half())
    with pytest.raises(ValueError, match="low is missing"):
        whole_block(torch.zeros(1, 4, 4, 16).half(), pack_whole_block(*layers, low_channels=4))
    with pytest.raises(ValueError, match="5×4"):
        odd = pack_whole_block(*layers, low_channels=4)
        whole_block(torch.zeros(1, 5, 4, 16).half(), odd, low=torch.zeros(1, 2, 2, 16).half(), index=torch.tensor([0]))
    with pytest.raises(ValueError, match="index is given alone"):
        whole_block(torch.zeros(1, 4, 4, 16).half(), block, index=torch.tensor([0]))
    with pytest.raises(ValueError, match="low is given alone"):
        whole_block(torch.zeros(1, 4, 4, 16).half(), odd, low=torch.zeros(1, 2, 2, 16).half())
    with pytest.raises(ValueError, match="a residual keeps their number"):
        pack_whole_block(layers[0], layers[1], nn.Conv2d(16, 12, 1), residual=True)
    with pytest.raises(ValueError, match="stride 2; expected"):
        pack_whole_block(layers[0], nn.Conv2d(16, 16, 3, 2, padding=1, groups=16), layers[2])
    with pytest.raises(ValueError, match="expected \\(3, in, 1, 1\\)"):
        pack_head(nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match="expected as many"):
        whole_block(torch.zeros(1, 4, 4, 16).half(), block, head=pack_head(nn.Conv2d(32, 3, 1)))
