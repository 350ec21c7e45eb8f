"""The hoisted halves for libraries that run them layer by layer on a CPU, with channels in blocks.

Blocks are of 8 channels with AVX2 and of 16 with AVX-512. ONNX Runtime has them.

The same function, up to float32 rounding, with more multiply-adds that take less time:

* The first block's hidden tensor h has 12 channels, which fill no block. It is computed with four more, all 0; what is
  kept of a template frame is still h.
* The largest maps are bound by memory: W (↑low ‖ h) is one pass over the wide tensor, where ↑(Wl low) + Ws h is three.
  So low and h are joined there after all, if low fills blocks: it has 32 channels at width 1, but 8 at width ¼.

Multiply-adds of the speech half at width 1, mode ave: 3.07 G, and 2.68 G hoisted. Measured with ONNX Runtime on a Xeon,
a frame on one core, against the hoisted halves: with AVX-512 the speech half takes 85 % of the time and the template's
83 %; with only AVX2 102 % and 104 %.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gpupipe.models.hoisted import HoistedUp, SpeechHalf, TemplateFeatures, TemplateHalf, conv1x1
from gpupipe.models.unet328 import UNet328, Up

BLOCK = 16
"""Channels of the largest block, a multiple of the other sizes."""


class BlockedTemplateHalf(TemplateHalf):
    """:class:`~gpupipe.models.hoisted.TemplateHalf`, in which h fills blocks until it is kept."""

    def __init__(self, network: UNet328) -> None:
        super().__init__(network)
        expand, depthwise = (layer for layer in self.hidden if isinstance(layer, nn.Conv2d))
        (reader, *others) = self.down1
        assert isinstance(reader, nn.Conv2d)
        self.channels = reader.in_channels
        zeros = -self.channels % BLOCK
        expand, depthwise = _wider(expand, outputs=zeros), _wider(depthwise, outputs=zeros)
        self.hidden = nn.Sequential(expand, nn.ReLU(), depthwise, nn.ReLU())
        self.down1 = nn.Sequential(_wider(reader, inputs=zeros), *others)

    def forward(self, image: Tensor) -> TemplateFeatures:
        """(B, 6, 320, 320) → six tensors."""
        hidden, x2, x3, x4, x5, bottleneck = super().forward(image)
        return hidden[:, : self.channels], x2, x3, x4, x5, bottleneck


class BlockedSpeechHalf(SpeechHalf):
    """:class:`~gpupipe.models.hoisted.SpeechHalf`, with low and h joined if low fills blocks."""

    def _largest(self, up: Up, projection: nn.Conv2d) -> HoistedUp:
        hoisted = super()._largest(up, projection)
        return hoisted if hoisted.low.in_channels % BLOCK else JoinedUp(up, projection)


class JoinedUp(HoistedUp):
    """:class:`~gpupipe.models.hoisted.HoistedUp` that expands the upsampled low and the skip in one convolution.

    The skip first goes through an identity that pads it to whole blocks.
    """

    def __init__(self, up: Up, projection: nn.Conv2d) -> None:
        super().__init__(up, projection)
        channels = self.skip.in_channels
        zeros = -channels % BLOCK
        self.blocks = conv1x1(torch.eye(channels + zeros, channels).to(self.skip.weight)[:, :, None, None], None)
        self.expand = _wider(self.joined(), inputs=zeros)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """low (B, C1, H/2, W/2), skip (B, C2, H, W) → (B, out, H, W)."""
        return self.rest(self.expand(torch.cat([self.up(low), self.blocks(skip)], dim=1)))


def _wider(layer: nn.Conv2d, *, inputs: int = 0, outputs: int = 0) -> nn.Conv2d:
    """A convolution with so many more channels, all 0; a depthwise one gets as many inputs as outputs."""
    depthwise = layer.groups > 1
    wider = nn.Conv2d(
        layer.in_channels + (outputs if depthwise else inputs),
        layer.out_channels + outputs,
        (layer.kernel_size[0], layer.kernel_size[1]),
        padding=(int(layer.padding[0]), int(layer.padding[1])),
        groups=layer.groups + outputs if depthwise else 1,
        device="meta",  # draws no weights
    )
    assert layer.bias is not None
    weight, bias = pad(layer.weight, (0, 0, 0, 0, 0, inputs, 0, outputs)), pad(layer.bias, (0, outputs))
    wider.weight, wider.bias = nn.Parameter(weight.detach(), False), nn.Parameter(bias.detach(), False)
    return wider
