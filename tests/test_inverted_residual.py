"""The plain-torch reference of the network's blocks, packed from folded weights, against the modules as trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.kernels.inverted_residual import (
    Block,
    bytes_moved,
    depthwise_project,
    expansion_is_recomputed,
    inverted_residual,
    inverted_residual_head,
    pack_block,
    pack_depthwise,
    pack_pointwise,
)
from gpupipe.kernels.pointwise import padded, pointwise, upsample_expand
from gpupipe.models.unet328 import InvertedResidual, OutConv, Up

CPU = torch.device("cpu")
BOUND = 2e-5
"""Allowed difference: float32 rounding, of values of about 1."""


def module_of(channels: int, outputs: int, *, stride: int = 1, residual: bool = False) -> InvertedResidual:
    """A block as after training: batch norms with statistics that matter."""
    torch.manual_seed(channels + outputs)
    module = InvertedResidual(channels, outputs, stride=stride, residual=residual)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.1, 0.5)  # type: ignore[arg-type]
    return module.eval().requires_grad_(False)


def packed(module: InvertedResidual, dtype: torch.dtype = torch.float32) -> Block:
    layers = list(module.conv)
    folded = [fuse_conv_bn_eval(layers[i], layers[i + 1]) for i in (0, 3, 6)]  # type: ignore[type-var]
    return pack_block(folded, device=CPU, dtype=dtype)


def pixels_of(planes: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, channels), padded with zeros."""
    return nn.functional.pad(planes.permute(0, 2, 3, 1), (0, padded(planes.shape[1]) - planes.shape[1])).contiguous()


def error(found: Tensor, planes: Tensor) -> float:
    """The largest difference; channels beyond the module's must be 0."""
    channels = planes.shape[1]
    assert not found[..., channels:].any()
    return float((found[..., :channels].permute(0, 3, 1, 2) - planes).abs().max())


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "stride", "residual"),
    [
        (16, 32, (8, 10), 1, False),
        (32, 32, (7, 9), 1, True),
        (6, 20, (9, 13), 1, False),  # neither is a multiple of 16
        (24, 17, (11, 8), 2, False),
        (16, 16, (1, 1), 2, False),
        (5, 5, (1, 6), 1, True),
    ],
)
def test_block_matches_the_module(
    channels: int, outputs: int, size: tuple[int, int], stride: int, residual: bool
) -> None:
    module = module_of(channels, outputs, stride=stride, residual=residual)
    planes = torch.randn(2, channels, *size)
    found = inverted_residual(pixels_of(planes), packed(module), stride=stride, residual=residual)
    assert error(found, module(planes)) <= BOUND
    assert module(planes).std() > 0.1


def test_an_image_needs_no_channel_padding() -> None:
    module, planes = module_of(6, 16), torch.rand(1, 6, 5, 4)
    found = inverted_residual(planes.permute(0, 2, 3, 1).contiguous(), packed(module))
    assert error(found, module(planes)) <= BOUND


def test_half_precision_differs_by_rounding_alone() -> None:
    module, planes = module_of(16, 16, residual=True), torch.randn(2, 16, 9, 9)
    found = inverted_residual(pixels_of(planes).half(), packed(module, torch.float16), residual=True)
    assert found.dtype == torch.float16
    assert 1e-5 < error(found.float(), module(planes)) < 1e-2


def test_head_matches_the_network() -> None:
    module, head, planes = module_of(16, 16, residual=True), OutConv(16, 3), torch.randn(2, 16, 7, 6)
    expected = head(module(planes)).sigmoid().detach()
    given = pixels_of(planes), packed(module), *pack_pointwise(head.conv, device=CPU, dtype=torch.float32)
    found = inverted_residual_head(*given, residual=True, dtype=torch.float32)
    assert found.shape == (2, 3, 7, 6)
    assert (found - expected).abs().max() <= BOUND
    levels = inverted_residual_head(*given, residual=True)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, (found * 255).to(torch.uint8)), "truncated"


@pytest.mark.parametrize(("low", "skip"), [(16, 16), (8, 24), (32, 12)])
def test_decoder_s_entry_matches_the_module(low: int, skip: int) -> None:
    up = Up(low + skip, 16)
    module = module_of(low + skip, 16)
    up.conv.double_conv = nn.Sequential(module)
    small, large = torch.randn(2, low, 4, 3), torch.randn(3, skip, 8, 6)
    index = torch.tensor([2, 0])
    block = packed(module)
    matrices = block.expand[:low], block.expand[low : low + skip]
    low_matrix, skip_matrix = (nn.functional.pad(m, (0, 0, 0, padded(len(m)) - len(m))) for m in matrices)

    def run(low_matrix: Tensor, skip_matrix: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        wide = upsample_expand(pixels_of(small), pixels_of(large), index, low_matrix, skip_matrix, bias)
        return depthwise_project(wide, block.projection)

    expected = up(small, large[index])
    assert error(run(low_matrix, skip_matrix, index, block.expand_bias), expected) <= BOUND
    assert error(run(low_matrix, skip_matrix, index.flip(0), block.expand_bias), expected) > 100 * BOUND
    assert error(run(low_matrix, skip_matrix, index, 0 * block.expand_bias), expected) > 100 * BOUND
    if low == skip:
        assert error(run(skip_matrix, low_matrix, index, block.expand_bias), expected) > 100 * BOUND


def test_pointwise_adds_before_the_relu() -> None:
    x, weight, bias = torch.randn(2, 3, 4, 16), torch.randn(16, 16), torch.randn(16)
    residual, index = torch.randn(3, 3, 4, 16), torch.tensor([2, 2])
    expected = (x @ weight + bias + residual[index]).relu()
    torch.testing.assert_close(pointwise(x, weight, bias, relu=True, residual=residual, index=index), expected)


def test_bound_fails_on_near_misses() -> None:
    module, planes = module_of(16, 16, residual=True), torch.randn(2, 16, 8, 9)
    x, block, expected = pixels_of(planes), packed(module), module(planes)
    projection = block.projection
    turned = projection.depthwise.reshape(3, 3, -1).transpose(0, 1).reshape(9, -1).contiguous()
    wrong = {
        "without the expansion's bias": block._replace(expand_bias=0 * block.expand_bias),
        "taps turned": block._replace(projection=projection._replace(depthwise=turned)),
        "without the depthwise bias": block._replace(projection=projection._replace(depthwise_bias=torch.zeros(32))),
        "without the projection's": block._replace(projection=projection._replace(project_bias=torch.zeros(16))),
    }
    for name, other in wrong.items():
        assert error(inverted_residual(x, other, residual=True), expected) > 100 * BOUND, name
    assert error(inverted_residual(x, block), expected) > 100 * BOUND


@pytest.mark.parametrize(("channels", "wanted"), [(1, 16), (12, 16), (16, 16), (17, 32), (48, 64), (512, 512)])
def test_channels_are_padded_to_powers_of_two(channels: int, wanted: int) -> None:
    assert padded(channels) == wanted


def test_bytes_moved_by_one_kernel_and_by_two() -> None:
    """up4.1 is one kernel: read and written once. down4.0's expansion is written and read besides."""
    one = packed(module_of(32, 32))
    assert expansion_is_recomputed(one, 1)
    assert bytes_moved(160, one, residual=True) == 2 * 160**2 * (32 + 32)
    two = packed(module_of(128, 256, stride=2))
    assert not expansion_is_recomputed(two, 2)
    assert bytes_moved(40, two, stride=2) == 2 * (40**2 * 128 + 20**2 * 256 + 2 * 40**2 * 256)


def test_arguments_that_do_not_fit_are_errors() -> None:
    block, x = packed(module_of(16, 32)), torch.zeros(1, 4, 4, 16)
    cases = [
        (
            lambda: inverted_residual(torch.zeros(1, 4, 4, 17), block),
            r"x has shape \(1, 4, 4, 17\); expected .*at most 16",
        ),
        (lambda: inverted_residual(x, block, stride=3), "stride is 3; expected 1 or 2"),
        (lambda: inverted_residual(x, block, residual=True), "residual with stride 1, 16 channels in and 32 out"),
        (lambda: inverted_residual(x.transpose(1, 3), block), r"at most 16|contiguous"),
        (lambda: inverted_residual(torch.zeros(1, 4, 5, 16).transpose(1, 2), block), "x has strides .*contiguous"),
        (lambda: depthwise_project(x, block.projection), r"hidden has shape \(1, 4, 4, 16\); expected .*32\)"),
        (lambda: pointwise(x, block.expand, block.expand_bias, residual=x), r"residual has shape .*\(1, 4, 4, 32\)"),
        (
            lambda: upsample_expand(x, x, torch.tensor([0]), block.expand, block.expand, block.expand_bias),
            "expected skip twice as high and wide",
        ),
        (lambda: pack_depthwise(nn.Conv2d(4, 4, 3), device=CPU, dtype=torch.float32), "expected a depthwise 3×3"),
    ]
    for call, told in cases:
        with pytest.raises(ValueError, match=told):
            call()


def test_the_network_s_blocks_have_biases_once_folded() -> None:
    """Packing needs folded layers: depthwise layers have a bias only after folding."""
    layer = seeded_network(width=1 / 8).down1.maxpool_conv[0].double_conv[0].conv[3]  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="with a bias"):
        pack_depthwise(layer, device=CPU, dtype=torch.float32)
