"""The U-Net in two halves, rearranged so that the half that runs for every frame does a quarter less work.

The same function as :class:`~gpupipe.models.unet328.UNet328`, up to float32 rounding, from four rearrangements of its
linear layers (W a 1×1 convolution, ↑ the bilinear upsampling, ‖ concatenation):

* W (↑low ‖ skip) = ↑(Wl low) + Ws skip: the upsampled half of each expansion runs at a quarter of the pixels, and
  neither the upsampled tensor nor the concatenation is made.
* W (x6 ‖ audio) = W6 x6 + Wa audio: W6 x6 belongs to the template's half. So could the products Ws skip; they are
  four times as large as the skips, and take as long to read as to compute.
* x1 = P h, with h the 12-channel hidden tensor of the first block. Both readers of x1 begin with a 1×1 convolution, so
  that P is folded into them: h (12 channels) is kept in place of x1 (32).
* Batch norms are folded.

Multiply-adds of a frame at width 1, mode ave: 4.89 G in all, 3.68 G without the image path as it is trained; here
3.82 G in all, 2.68 G in the speech half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpupipe.models.fold import folded
from gpupipe.models.unet328 import UNet328, Up

TEMPLATE_FEATURES = ("hidden", "x2", "x3", "x4", "x5", "bottleneck")
"""What :class:`TemplateHalf` makes of a frame, by name, from 320×320 down to 10×10.

``bottleneck`` is x6's share of the expansion that reads it."""

SKIPS = ("x5", "x4", "x3", "x2", "hidden")
"""The features that up1 … up5 read, in this order."""

TemplateFeatures = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class TemplateHalf(nn.Module):
    """image (B, 6, 320, 320) in [0, 1] → the tensors of :data:`TEMPLATE_FEATURES`.

    Args:
        network: in ``eval`` mode. If its batch norms are folded, its own layers are taken, else a copy's; no layer is
            in both halves.
    """

    def __init__(self, network: UNet328) -> None:
        super().__init__()
        network = folded(network)
        inc = _layers(network.inc.inconv[0])
        self.hidden = nn.Sequential(*inc[:6])
        (down,) = network.down1.maxpool_conv
        first, second = _blocks(down)
        expand, *rest = _layers(first)
        self.down1 = nn.Sequential(compose(inc[6], expand), *rest, second)
        self.down2, self.down3 = network.down2, network.down3
        self.down4, self.down5 = network.down4, network.down5
        expand = _layers(_blocks(network.fuse_conv[0])[0])[0]
        half = expand.in_channels // 2
        self.bottleneck = conv1x1(expand.weight[:, :half], expand.bias)

    def forward(self, image: Tensor) -> TemplateFeatures:
        """(B, 6, 320, 320) → six tensors."""
        hidden = self.hidden(image)
        x2 = self.down1(hidden)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        return hidden, x2, x3, x4, x5, self.bottleneck(self.down5(x5))


class SpeechHalf(nn.Module):
    """The template's features and a window of speech features → mouth (B, 3, 320, 320) in (0, 1).

    Args:
        network: as for :class:`TemplateHalf`.
    """

    def __init__(self, network: UNet328) -> None:
        super().__init__()
        network = folded(network)
        self.audio_shape = network.audio_shape
        self.audio_model = network.audio_model
        first, second = _blocks(network.fuse_conv[0])
        expand, _, *rest = _layers(first)
        half = expand.in_channels // 2
        self.audio_expand = conv1x1(expand.weight[:, half:], None)
        self.fuse = nn.Sequential(*rest, second, network.fuse_conv[1])
        projection = _layers(network.inc.inconv[0])[6]
        self.up1, self.up2 = HoistedUp(network.up1), HoistedUp(network.up2)
        self.up3, self.up4 = HoistedUp(network.up3), HoistedUp(network.up4)
        self.up5 = HoistedUp(network.up5, projection)
        self.outc = network.outc

    def forward(
        self, hidden: Tensor, x2: Tensor, x3: Tensor, x4: Tensor, x5: Tensor, bottleneck: Tensor, audio: Tensor
    ) -> Tensor:
        """The six tensors and audio (B, *audio_shape) → (B, 3, 320, 320)."""
        x = self.deepest(bottleneck, audio)
        x = self.up1(x, x5)
        x = self.up2(x, x4)
        x = self.up3(x, x3)
        x = self.up4(x, x2)
        x = self.up5(x, hidden)
        return torch.sigmoid(self.outc(x))

    def deepest(self, bottleneck: Tensor, audio: Tensor) -> Tensor:
        """What up1 reads: bottleneck (B, C, 10, 10) and audio (B, *audio_shape) → (B, c, 10, 10)."""
        return self.fuse(self.audio_expand(self.audio_model(audio)) + bottleneck)


class HoistedUp(nn.Module):
    """:class:`~gpupipe.models.unet328.Up` with its first expansion split into low and skip.

    Args:
        projection: a 1×1 convolution that the skip has not been through yet; it is folded in.
    """

    def __init__(self, up: Up, projection: nn.Conv2d | None = None) -> None:
        super().__init__()
        first, second = _blocks(up.conv)
        expand, _, *rest = _layers(first)
        half = expand.in_channels // 2
        self.up = up.up
        self.low = conv1x1(expand.weight[:, :half], None)
        skip = conv1x1(expand.weight[:, half:], expand.bias)
        self.skip = skip if projection is None else compose(projection, skip)
        self.rest = nn.Sequential(*rest, second)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """low (B, C1, H/2, W/2), skip (B, C2, H, W) → (B, out, H, W)."""
        return self.rest(self.skip(skip) + self.up(self.low(low)))

    def joined(self) -> nn.Conv2d:
        """The expansion as one convolution again, of the upsampled low and the skip, concatenated in this order."""
        return conv1x1(torch.cat([self.low.weight, self.skip.weight], dim=1), self.skip.bias)


def _blocks(double: Any) -> tuple[Any, Any]:
    """The two inverted residuals of a double convolution."""
    first, second = double.double_conv
    return first, second


def _layers(block: Any) -> list[Any]:
    """Layers of an inverted residual: expand, identity, ReLU, depthwise, identity, ReLU, project, identity."""
    return list(block.conv)


def compose(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """One 1×1 convolution for ``second`` after ``first``."""
    matrix, outer = first.weight[:, :, 0, 0].double(), second.weight[:, :, 0, 0].double()
    bias = outer.new_zeros(len(outer))
    if first.bias is not None:
        bias = bias + outer @ first.bias.double()
    if second.bias is not None:
        bias = bias + second.bias.double()
    return conv1x1((outer @ matrix)[:, :, None, None].float(), bias.float())


def conv1x1(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1×1 convolution of weight (out, in, 1, 1) and, if given, bias (out,), copied."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")  # draws no weights
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """A module's convolutions, in the order they run."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
