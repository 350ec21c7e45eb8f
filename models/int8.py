"""The hoisted halves in 8-bit integers: weights and the inputs of convolutions are rounded, sums are exact.

What stands between two convolutions is in codes (:mod:`gpupipe.models.codes`). Not rounded are the image and the first
block, the maps that residual blocks add to, and the last block's input where the head reads it.

These modules simulate integers in float32, and export as quantised ONNX that rounds the same values.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gpupipe.models.codes import (
    PULL,
    PULL_INNER,
    Channels,
    Codes,
    Int8Conv,
    beside,
    coded,
    part,
    round_signed,
    round_unsigned,
    signed_codes,
    unsigned_codes,
)
from gpupipe.models.fold import folded
from gpupipe.models.hoisted import HoistedUp, TemplateFeatures, compose, conv1x1
from gpupipe.models.unet328 import InvertedResidual, UNet328, Up

Inputs = dict[nn.Module, Channels]
"""What convolutions read."""


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
        x = round_signed(torch.maximum(self.hidden(image), self.zero))
        features = [x]
        for down in self.downs:
            x = round_signed(down(x))
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
        between = signed_codes(inputs[_entry(second)], inputs[_entry(first, 1)])
        low = signed_codes(part(inputs[_entry(ups[0].conv)], 0), inputs[_entry(second, 1)])
        self.fuse = nn.Sequential(
            Int8Double(first, inputs, beside(x6, self.audio_model.codes), between),
            Int8Double(second, inputs, between, low),
        )
        self.ups = nn.ModuleList()
        for up, following, skip in zip(ups, ups[1:], (x5, x4, x3, x2), strict=False):
            read = part(inputs[_entry(following.conv)], 0), inputs[_entry(up.conv, 1)]
            writes = signed_codes(*read, pull=0 if following is network.up5 else PULL)
            self.ups.append(Int8Up(up, inputs, beside(low, skip), writes))
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
            return signed_codes(*(inputs[one] for one in read), centred=False)

        # A block that adds to its input writes in the codes that it reads.
        codes = [read_by(branch.conv3, *(block for block in (branch.conv1, branch.conv2) if block.residual))]
        for block in (branch.conv2, branch.conv1):
            codes.insert(0, codes[0] if block.residual else read_by(block))
        middle = read_by(branch.conv4, branch.conv5)
        inner = (inputs[branch.conv6.conv[0]], inputs[branch.conv7.conv[0]])
        self.codes = signed_codes(*inner, part(inputs[reader], 1), centred=False)
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
        x = self.conv4(torch.relu(self.conv3(round_signed(x))))
        x = torch.relu(self.conv5(round_signed(x)))
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
        shifted = Codes(low.step, low.offset - low.step / 2, low.mean + 0.5)
        twice = beside(beside(low, skip), beside(shifted, skip))
        writes = signed_codes(inputs[_entry(network.up5.conv, 1)], pull=0)
        self.up = up.up
        self.first = Int8Block(first, inputs, twice, writes, entry=up.joined(), twice=True)
        self.second = Int8Block(second, inputs, writes, writes)
        self.second.project = Int8Conv(
            compose(project, conv1x1(head.weight, None)), unsigned_codes(inputs[project], PULL_INNER), None
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
        wide, thin = unsigned_codes(inputs[depthwise]), unsigned_codes(inputs[project], PULL_INNER)
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
        return self.project(round_unsigned(self.depthwise(round_unsigned(self.expand(round_signed(x))))))


def _by_layer(network: UNet328) -> Inputs:
    """``input_channels`` of a folded network by convolution.

    Raises:
        ValueError: it has none.
    """
    if network.input_channels is None:
        raise ValueError("the network's inputs were not measured; expected input_channels, of measure_inputs")
    layers = dict(network.named_modules())
    return {layers[name]: channels for name, channels in network.input_channels.items()}


def _feature_codes(network: UNet328, inputs: Inputs) -> list[Codes]:
    """Codes of hidden, x2 … x6: of all that reads them."""
    doubles = [down.maxpool_conv[0] for down in _downs(network)]
    ups = [network.up4, network.up3, network.up2, network.up1]
    codes = [signed_codes(inputs[_convolutions(network.inc.inconv[0])[2]], pull=0)]
    for double, following, up in zip(doubles, doubles[1:], ups, strict=False):
        read = inputs[_entry(double, 1)], inputs[_entry(following)], part(inputs[_entry(up.conv)], 1)
        codes.append(signed_codes(*read))
    return [*codes, signed_codes(inputs[_entry(doubles[-1], 1)], part(inputs[_entry(network.fuse_conv[0])], 0))]


def _convolutions(block: Any) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
    """An inverted residual's expansion, depthwise convolution and projection."""
    return block.conv[0], block.conv[3], block.conv[6]


def _entry(double: Any, block: int = 0) -> nn.Conv2d:
    """The expansion of the first or second block of a double convolution."""
    return _convolutions(double.double_conv[block])[0]


def _downs(network: UNet328) -> list[Any]:
    return [network.down1, network.down2, network.down3, network.down4, network.down5]
