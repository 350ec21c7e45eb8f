"""Tensors in 8-bit codes: how their channels are coded, and convolutions that read and write codes.

value = step · code + offset, with a step and an offset for each channel. Both are folded into the weights around a
tensor (:func:`coded`), so that rounding it is nothing but rounding and clamping (:func:`round_signed`,
:func:`round_unsigned`), and an integer convolution reads it as it is.

Steps and offsets come from each input channel's range on sample frames (:func:`measure_inputs`). Rounding weights
shifts a convolution's mean output by what the lost parts of its weights make of the mean input; the bias takes that
back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gpupipe.models.fold import folded
from gpupipe.models.hoisted import conv1x1
from gpupipe.models.unet328 import UNet328

PULL, PULL_INNER = 0.25, 0.6
"""How far a channel's step is moved from the finest for its own range towards the largest channel's: of what blocks
read, and of what their projections read. A 1×1 convolution's weights share a scale for each output channel, and are
rounded the more coarsely the more the steps of its inputs differ. A few pairs were tried on the bundled network."""


class Channels(NamedTuple):
    """What each input channel of a convolution holds: float32 (C,)."""

    least: Tensor
    greatest: Tensor
    mean: Tensor


class Codes(NamedTuple):
    """How each channel of a tensor is coded, (C,): value = step · code + offset. ``mean`` is of the codes."""

    step: Tensor
    offset: Tensor
    mean: Tensor


def signed_codes(*channels: Channels, centred: bool = True, pull: float = PULL) -> Codes:
    """Codes from −127 to 127 for what all these hold.

    Args:
        centred: the middle of the range becomes 0.
    """
    least = torch.stack([one.least for one in channels]).amin(dim=0)
    greatest = torch.stack([one.greatest for one in channels]).amax(dim=0)
    offset = (least + greatest) / 2 if centred else torch.zeros_like(least)
    step = _pulled(torch.maximum(greatest - offset, offset - least) / 127, pull)
    return Codes(step, offset, (channels[0].mean - offset) / step)


def unsigned_codes(channels: Channels, pull: float = 0.0) -> Codes:
    """Codes from 0 to 255 for what comes out of a ReLU."""
    step = _pulled(channels.greatest / 255, pull)
    return Codes(step, torch.zeros_like(step), channels.mean / step)


def _pulled(step: Tensor, pull: float) -> Tensor:
    """Steps moved towards the largest by a share of the way, as factors go. Channels that are always 0 get one, too."""
    largest = float(step.max()) or 1.0
    return step.clamp_min(1e-6 * largest) ** (1 - pull) * largest**pull


def beside(first: Codes, second: Codes) -> Codes:
    """Codes of a concatenation."""
    return Codes(*(torch.cat(both) for both in zip(first, second, strict=True)))


def part(channels: Channels, half: int) -> Channels:
    """The first (0) or second (1) half of a concatenation."""
    return Channels(*(values.chunk(2)[half] for values in channels))


class Int8Conv(nn.Module):
    """A convolution of codes with weights in 255 steps for each output channel.

    Args:
        reads, writes: as for :func:`coded`.
        twice: the input comes twice, one after the other along the channels, each with about half the weight.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: nn.Conv2d, reads: Codes, writes: Codes | None, *, twice: bool = False) -> None:
        super().__init__()
        if twice:
            layer = conv1x1(torch.cat([layer.weight, layer.weight], dim=1) / 2, layer.bias)
        layer = coded(layer, reads, writes)
        assert layer.bias is not None
        self.how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        scale = layer.weight.abs().amax((1, 2, 3)).clamp_min(1e-20) / 127
        exact = layer.weight / scale[:, None, None, None]
        steps = exact.round()
        if twice:
            whole = exact.chunk(2, dim=1)[0].mul(2).round()
            steps = torch.cat([(whole / 2).floor(), (whole / 2).ceil()], dim=1)
        lost = ((exact - steps) * scale[:, None, None, None]).sum((2, 3))
        shift = lost[:, 0] * reads.mean if layer.groups > 1 else lost @ reads.mean
        self.register_buffer("weight", steps * scale[:, None, None, None])
        self.register_buffer("bias", layer.bias + shift)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution; ``x`` is rounded."""
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -128, 127)
        return conv2d(x, weight, self.bias, **self.how)


def coded(layer: nn.Conv2d, reads: Codes | None, writes: Codes | None) -> nn.Conv2d:
    """``layer`` from codes to codes; None stands for the values themselves.

    A layer that pads must read codes without an offset.
    """
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach().double()
    if reads is not None:
        step, offset = reads.step.double(), reads.offset.double()
        if layer.groups > 1:
            weight = weight * step[:, None, None, None]
        else:
            bias = bias + weight.sum((2, 3)) @ offset
            weight = weight * step[:, None, None]
    if writes is not None:
        step = writes.step.double()
        weight, bias = weight / step[:, None, None, None], (bias - writes.offset) / step
    made = copy.deepcopy(layer)
    made.weight, made.bias = nn.Parameter(weight.float(), False), nn.Parameter(bias.float(), False)
    return made


def round_signed(codes: Tensor) -> Tensor:
    """Codes, rounded: −128 … 127."""
    return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, -128, 127)


def round_unsigned(codes: Tensor) -> Tensor:
    """Codes, rounded: 0 … 255, which takes the place of a ReLU."""
    return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, 0, 255)


@torch.inference_mode()
def measure_inputs(network: UNet328, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Channels]:
    """What the input channels of each convolution hold, by its name, while ``network`` paints these frames.

    Args:
        network: in ``eval`` mode; its batch norms are folded first.
        batches: image (B, 6, 320, 320) and audio (B, *audio_shape) of each; at least one.
    """
    network = folded(network)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    found: dict[nn.Module, Channels] = {}
    frames = 0

    def watch(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (read,) = inputs
        values = read.transpose(0, 1).flatten(1)
        least, greatest = torch.aminmax(values, dim=1)
        mean = values.mean(dim=1)
        if (before := found.get(module)) is not None:
            least, greatest = torch.minimum(before.least, least), torch.maximum(before.greatest, greatest)
            mean = before.mean + (mean - before.mean) * (len(read) / (frames + len(read)))
        found[module] = Channels(least, greatest, mean)

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers.values()]
    try:
        for image, audio in batches:
            network(image, audio)
            frames += len(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[module] for name, module in layers.items()}
