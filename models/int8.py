"""The hoisted halves in 8-bit integers: the inputs of convolutions and their weights are rounded, sums are exact.

Between two convolutions a channel holds codes: value = step · code + offset, with a step and an offset of its own, both
folded into the weights around it (:func:`coded`). So rounding a tensor is nothing but rounding and clamping
(:func:`signed`, :func:`unsigned`), and an integer convolution reads it as it is.

Where steps and offsets come from: each input channel's range on sample frames (:func:`measure_inputs`), cut off where
that lowers the squared error. Rounding weights shifts a convolution's mean output by what the lost parts of its weights
make of the mean input; the bias takes that back.

Not rounded: the image, the first convolution, the maps that residual blocks add to, and what the last convolution reads
of the last block's input.

This module simulates integers in float32, and exports as quantised ONNX: both round the same values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gpupipe.models.fold import folded
from gpupipe.models.hoisted import HoistedUp, TemplateFeatures, compose, conv1x1
from gpupipe.models.unet328 import Channels, InvertedResidual, UNet328, Up

_PULL, _PULL_INNER = 0.25, 0.6
"""How far a channel's step is moved from the finest for its own range towards the largest channel's: of what blocks
read, and of what their projections read. A 1×1 convolution's weights share a scale for each output channel, and are
rounded the more coarsely the more the steps of its inputs differ. A few pairs were tried on the bundled network."""

Inputs = dict[nn.Module, Channels]
"""What convolutions read."""


class Codes(NamedTuple):
    """How each channel of a tensor is coded, (C,): value = step · code + offset. ``mean`` is of the codes."""

    step: Tensor
    offset: Tensor
    mean: Tensor


class Int8TemplateHalf(nn.Module):
    """image (B, 6, 320, 320) in [0, 1] → codes of the template's features: whole numbers from −128 to 127, as floats.

    They are those of :data:`~gpupipe.models.hoisted.TEMPLATE_FEATURES`, with x6 itself as the bottleneck.

    Args:
        network: in ``eval`` mode, with ``input_channels``.
    """

    zero: Tensor

    def __init__(self, network: UNet328) -> None:
        super().__init__()
        network = folded(network)
        inputs = _by_layer(network)
        codes = _feature_codes(network, inputs)
        expand, depthwise, projection = _convolutions(network.inc.inconv[0])
        self.hidden = nn.Sequential(expand, nn.ReLU(), coded(depthwise, None, codes[0]))
        self.register_buffer("zero", -(codes[0].offset / codes[0].step)[:, None, None])
        doubles = [down.maxpool_conv[0] for down in _downs(network)]
        entry = compose(projection, _entry(doubles[0]))
        self.downs = nn.ModuleList(
            Int8Double(double, inputs, reads, writes, entry=entry if double is doubles[0] else None)
            for double, (reads, writes) in zip(doubles, pairwise(codes), strict=True)
        )

    def forward(self, image: Tensor) -> TemplateFeatures:
        """(B, 6, 320, 320) → six tensors."""
        x = signed(torch.maximum(self.hidden(image), self.zero))
        features = [x]
        for down in self.downs:
            x = signed(down(x))
            features.append(x)
        hidden, x2, x3, x4, x5, x6 = features
        return hidden, x2, x3, x4, x5, x6


class Int8SpeechHalf(nn.Module):
    """Codes of the template's features and a window of speech features → mouth (B, 3, 320, 320) in (0, 1).

    Args:
        network: as for :class:`Int8TemplateHalf`.
    """

    def __init__(self, network: UNet328) -> None:
        super().__init__()
        network = folded(network)
        inputs = _by_layer(network)
        hidden, x2, x3, x4, x5, x6 = _feature_codes(network, inputs)
        first, second = network.fuse_conv
        self.audio_model = Int8AudioBranch(network.audio_model, inputs, reader=_entry(first))
        ups = [network.up1, network.up2, network.up3, network.up4, network.up5]
        between = _signed(inputs[_entry(second)], inputs[_entry(first, 1)])
        low = _signed(_part(inputs[_entry(ups[0].conv)], 0), inputs[_entry(second, 1)])
        self.fuse = nn.Sequential(
            Int8Double(first, inputs, _beside(x6, self.audio_model.codes), between),
            Int8Double(second, inputs, between, low),
        )
        self.ups = nn.ModuleList()
        for up, following, skip in zip(ups, ups[1:], (x5, x4, x3, x2), strict=False):
            read = _part(inputs[_entry(following.conv)], 0), inputs[_entry(up.conv, 1)]
            writes = _signed(*read, pull=0 if following is network.up5 else _PULL)
            self.ups.append(Int8Up(up, inputs, _beside(low, skip), writes))
            low = writes
        self.last = Int8LastUp(network, inputs, low, hidden)

    def forward(
        self, hidden: Tensor, x2: Tensor, x3: Tensor, x4: Tensor, x5: Tensor, bottleneck: Tensor, audio: Tensor
    ) -> Tensor:
        """The six tensors and audio (B, *audio_shape) → (B, 3, 320, 320)."""
        x = self.fuse(torch.cat([bottleneck, self.audio_model(audio)], dim=1))
        for up, skip in zip(self.ups, (x5, x4, x3, x2), strict=True):
            x = up(x, skip)
        return torch.sigmoid(self.last(x, hidden))


class Int8AudioBranch(nn.Module):
    """:class:`~gpupipe.models.unet328.AudioBranch`. No code has an offset: its 3×3 convolutions pad with 0.

    Args:
        inputs: what each convolution reads.
        reader: the convolution that reads what this makes, as the second half of its channels.

    Attributes:
        codes: of what this makes.
    """

    step: Tensor

    def __init__(self, branch: Any, inputs: Inputs, reader: nn.Module) -> None:
        super().__init__()

        def read_by(*layers: Any) -> Codes:
            read = [layer.conv[0] if isinstance(layer, InvertedResidual) else layer for layer in layers]
            return _signed(*(inputs[one] for one in read), centred=False)

        # A block that adds to its input writes in the codes that it reads.
        codes = [read_by(branch.conv3, *(block for block in (branch.conv1, branch.conv2) if block.residual))]
        for block in (branch.conv2, branch.conv1):
            codes.insert(0, codes[0] if block.residual else read_by(block))
        middle = read_by(branch.conv4, branch.conv5)
        inner = (inputs[branch.conv6.conv[0]], inputs[branch.conv7.conv[0]])
        self.codes = _signed(*inner, _part(inputs[reader], 1), centred=False)
        self.register_buffer("step", codes[0].step[:, None, None])
        self.conv1 = Int8Block(branch.conv1, inputs, codes[0], codes[1])
        self.conv2 = Int8Block(branch.conv2, inputs, codes[1], codes[2])
        self.conv3 = Int8Conv(branch.conv3, codes[2], middle)
        self.conv4 = Int8Block(branch.conv4, inputs, middle, middle)
        self.conv5 = Int8Conv(branch.conv5, middle, self.codes)
        self.conv6 = Int8Block(branch.conv6, inputs, self.codes, self.codes)
        self.conv7 = Int8Block(branch.conv7, inputs, self.codes, self.codes)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, *audio_shape) → (B, C, 10, 10)."""
        x = self.conv2(self.conv1(audio / self.step))
        x = self.conv4(torch.relu(self.conv3(signed(x))))
        x = torch.relu(self.conv5(signed(x)))
        return self.conv7(self.conv6(x))


class Int8Up(nn.Module):
    """:class:`~gpupipe.models.unet328.Up`: the concatenation is rounded, so that low is not before it is upsampled."""

    def __init__(self, up: Up, inputs: Inputs, reads: Codes, writes: Codes) -> None:
        super().__init__()
        self.up, self.conv = up.up, Int8Double(up.conv, inputs, reads, writes)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """low (B, C1, H/2, W/2), skip (B, C2, H, W) → (B, out, H, W)."""
        return self.conv(torch.cat([self.up(low), skip], dim=1))


class Int8LastUp(nn.Module):
    """up5 and the head, O: with P the last projection, O (x + P h) = O x + (O P) h, so that the sum is not rounded.

    The largest maps' expansion would cost the most. It reads its input twice, low once shifted by half a step, and the
    weights of the two are rounded apart: low and weights have twice as many steps.
    """

    def __init__(self, network: UNet328, inputs: Inputs, low: Codes, skip: Codes) -> None:
        super().__init__()
        first, second = network.up5.conv.double_conv
        project, head = _convolutions(second)[2], network.outc.conv
        up = HoistedUp(network.up5, _convolutions(network.inc.inconv[0])[2])
        shifted = low._replace(offset=low.offset - low.step / 2)
        twice = _beside(_beside(low, skip), _beside(shifted, skip))
        writes = _signed(inputs[_entry(network.up5.conv, 1)], pull=0)
        self.up = up.up
        self.first = Int8Block(first, inputs, twice, writes, entry=up.joined(), twice=True)
        self.second = Int8Block(second, inputs, writes, writes)
        self.second.project = Int8Conv(
            compose(project, conv1x1(head.weight, None)), _unsigned(inputs[project], _PULL_INNER), None
        )
        self.head = coded(head, writes, None)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """low (B, C1, 160, 160), skip (B, C2, 320, 320) → (B, 3, 320, 320), before the sigmoid."""
        low = self.up(low)
        x = self.first(torch.cat([low, skip, low + 0.5, skip], dim=1))
        return self.head(x) + self.second.inner(x)


class Int8Double(nn.Module):
    """:class:`~gpupipe.models.unet328.DoubleConv` from codes to codes, which are not rounded yet.

    Args:
        entry: takes the place of the first expansion.
    """

    def __init__(
        self, double: Any, inputs: Inputs, reads: Codes, writes: Codes, *, entry: nn.Conv2d | None = None
    ) -> None:
        super().__init__()
        first, second = double.double_conv
        self.first = Int8Block(first, inputs, reads, writes, entry=entry)
        self.second = Int8Block(second, inputs, writes, writes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/stride, W/stride)."""
        return self.second(self.first(x))


class Int8Block(nn.Module):
    """:class:`~gpupipe.models.unet328.InvertedResidual` from codes to codes, which are not rounded yet.

    Args:
        entry: takes the place of the expansion.
        twice: the input comes twice, as for :class:`Int8Conv`.
    """

    def __init__(
        self,
        block: Any,
        inputs: Inputs,
        reads: Codes,
        writes: Codes,
        *,
        entry: nn.Conv2d | None = None,
        twice: bool = False,
    ) -> None:
        super().__init__()
        expand, depthwise, project = _convolutions(block)
        self.residual = block.residual
        wide, thin = _unsigned(inputs[depthwise]), _unsigned(inputs[project], _PULL_INNER)
        if self.residual:  # an offset is in the input already
            writes = writes._replace(offset=torch.zeros_like(writes.offset))
        self.expand = Int8Conv(expand if entry is None else entry, reads, wide, twice=twice)
        self.depthwise = Int8Conv(depthwise, wide, thin)
        self.project = Int8Conv(project, thin, writes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/stride, W/stride)."""
        return x + self.inner(x) if self.residual else self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        """The three convolutions."""
        return self.project(unsigned(self.depthwise(unsigned(self.expand(signed(x))))))


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
        scale = layer.weight.abs().amax((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny) / 127
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
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution; ``x`` is rounded."""
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -128, 127)
        return conv2d(x, weight, self.bias, **self.how)


def coded(layer: nn.Conv2d, reads: Codes | None, writes: Codes | None) -> nn.Conv2d:
    """``layer`` from codes to codes; None stands for the values themselves.

    A layer that pads must read codes without an offset.
    """
    weight = layer.weight.detach().double()
    bias = torch.zeros(layer.out_channels).double() if layer.bias is None else layer.bias.detach().double()
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
    made = copy.copy(layer)
    made._parameters = {"weight": nn.Parameter(weight.float(), False), "bias": nn.Parameter(bias.float(), False)}
    return made


def signed(codes: Tensor) -> Tensor:
    """Codes, rounded: −128 … 127."""
    return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, -128, 127)


def unsigned(codes: Tensor) -> Tensor:
    """Codes, rounded: 0 … 255, which takes the place of a ReLU."""
    return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, 0, 255)


# ── what convolutions read ────────────────────────────────────────────────────────────────────────────────────────────


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


def _by_layer(network: UNet328) -> Inputs:
    """``input_channels`` of a folded network by convolution.

    Raises:
        ValueError: it has none.
    """
    if network.input_channels is None:
        raise ValueError("the network's inputs were not measured; expected input_channels, of measure_inputs")
    layers = dict(network.named_modules())
    return {layers[name]: channels for name, channels in network.input_channels.items()}


# ── codes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _feature_codes(network: UNet328, inputs: Inputs) -> list[Codes]:
    """Codes of hidden, x2 … x6: of all that reads them."""
    doubles = [down.maxpool_conv[0] for down in _downs(network)]
    ups = [network.up4, network.up3, network.up2, network.up1]
    codes = [_signed(inputs[_convolutions(network.inc.inconv[0])[2]], pull=0)]
    for double, following, up in zip(doubles, doubles[1:], ups, strict=False):
        read = inputs[_entry(double, 1)], inputs[_entry(following)], _part(inputs[_entry(up.conv)], 1)
        codes.append(_signed(*read))
    return [*codes, _signed(inputs[_entry(doubles[-1], 1)], _part(inputs[_entry(network.fuse_conv[0])], 0))]


def _signed(*channels: Channels, centred: bool = True, pull: float = _PULL) -> Codes:
    """Codes from −127 to 127 for what all these hold.

    Args:
        centred: the middle of the range becomes 0.
    """
    least = torch.stack([one.least for one in channels]).amin(dim=0)
    greatest = torch.stack([one.greatest for one in channels]).amax(dim=0)
    offset = (least + greatest) / 2 if centred else torch.zeros_like(least)
    step = _pulled(torch.maximum(greatest - offset, offset - least) / 127, pull)
    return Codes(step, offset, (channels[0].mean - offset) / step)


def _unsigned(channels: Channels, pull: float = 0.0) -> Codes:
    """Codes from 0 to 255 for what comes out of a ReLU."""
    step = _pulled(channels.greatest / 255, pull)
    return Codes(step, torch.zeros_like(step), channels.mean / step)


def _pulled(step: Tensor, pull: float) -> Tensor:
    """Steps moved towards the largest by a share of the way, as factors go. Channels that are always 0 get one, too."""
    largest = step.max() if step.any() else torch.ones(())
    return step.clamp_min(1e-6 * float(largest)) ** (1 - pull) * largest**pull


def _beside(first: Codes, second: Codes) -> Codes:
    """Codes of a concatenation."""
    return Codes(*(torch.cat(both) for both in zip(first, second, strict=True)))


def _part(channels: Channels, half: int) -> Channels:
    """The first (0) or second (1) half of a concatenation."""
    return Channels(*(values.chunk(2)[half] for values in channels))


def _convolutions(block: Any) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
    """An inverted residual's expansion, depthwise convolution and projection."""
    return block.conv[0], block.conv[3], block.conv[6]


def _entry(double: Any, block: int = 0) -> nn.Conv2d:
    """The expansion of the first or second block of a double convolution."""
    return _convolutions(double.double_conv[block])[0]


def _downs(network: UNet328) -> list[Any]:
    return [network.down1, network.down2, network.down3, network.down4, network.down5]
