"""The `fused` engine: the hoisted halves of the network on kernels that keep the wide tensors out of memory.

It runs what :mod:`gpupipe.models.hoisted` says, channels last in half precision, with these kernels:

    inverted residual     whole, or expansion + (depthwise, projection), see gpupipe.kernels.inverted_residual
    decoder's entry       upsampling, concatenation and expansion in one, see gpupipe.kernels.pointwise
    last block            with head, sigmoid and the scaling to uint8
    audio's 3×3 layers    cuDNN

But for the hoisting of the decoder's upsampled halves (upsampling while loading moves fewer bytes, see there) and of
its skips' products (larger than the skips).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from gpupipe.engines.base import EngineName, Features
from gpupipe.kernels.inverted_residual import (
    Block,
    Projection,
    depthwise_project,
    inverted_residual,
    inverted_residual_head,
    pack_block,
    pack_pointwise,
    pack_projection,
)
from gpupipe.kernels.pointwise import padded, pointwise, upsample_expand
from gpupipe.models.hoisted import HoistedUp, SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import UNet328


class _Up(NamedTuple):
    """A decoder level: its entry's matrices, the rest of its first block, and its second block."""

    low: Tensor
    skip: Tensor
    bias: Tensor
    projection: Projection
    second: Block


class _Dense(NamedTuple):
    """A 3×3 convolution over all channels, followed by ReLU."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: int


class FusedEngine:
    """Triton kernels on CUDA; elsewhere their plain-torch reference, which is there to be compared with.

    Features are (L, H, W, channels), contiguous, and are read where they lie: a batch is not gathered.

    Args:
        dtype: of weights and activations. The kernels are for half precision; sums are accumulated in float32.
        mouth: type of what :meth:`decode` returns.

    Raises:
        ValueError: ``dtype`` is no half precision, on CUDA.
    """

    name: EngineName = "fused"

    def __init__(
        self,
        network: UNet328,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        mouth: torch.dtype = torch.uint8,
    ) -> None:
        if device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"engine is 'fused' and precision {dtype}; expected float16 or bfloat16 with this engine")
        self.device = device
        self.dtype = dtype
        self._mouth = mouth
        template, speech = TemplateHalf(network), SpeechHalf(network)

        expand, depthwise = _convolutions(template.hidden)
        self._first = self._block([expand, depthwise, _identity(expand.out_channels)])
        downs = (template.down1, template.down2, template.down3, template.down4, template.down5)
        self._downs = [self._double(down) for down in downs]
        self._bottleneck = self._pointwise(template.bottleneck)

        audio = speech.audio_model
        self._audio_blocks = {
            name: (self._block(_convolutions(block)), bool(block.residual))
            for name, block in audio.named_children()
            if name in ("conv1", "conv2", "conv4", "conv6", "conv7")
        }
        self._audio_dense = {"conv3": self._dense(audio.conv3), "conv5": self._dense(audio.conv5)}
        self._audio_expand = self._pointwise(speech.audio_expand)
        convolutions = _convolutions(speech.fuse)
        self._fuse_first = self._projection(convolutions[:2])
        self._fuse = [self._block(convolutions[i : i + 3]) for i in (2, 5, 8)]
        skips = (template.skip5, template.skip4, speech.up3.skip, speech.up4.skip, speech.up5.skip)
        ups = (speech.up1, speech.up2, speech.up3, speech.up4, speech.up5)
        self._ups = [self._up(up, skip) for up, skip in zip(ups, skips, strict=True)]
        self._head = self._pointwise(speech.outc.conv)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`; fastest with a channels-last image of the engine's type."""
        x = image.to(self.device, self.dtype).permute(0, 2, 3, 1).contiguous()
        features = {"hidden": inverted_residual(x, self._first)}
        x = features["hidden"]
        for name, (first, second) in zip(("x2", "x3", "x4", "x5", "x6"), self._downs, strict=True):
            x = inverted_residual(inverted_residual(x, first, stride=2), second, residual=True)
            features[name] = x
        features["bottleneck"] = pointwise(features.pop("x6"), *self._bottleneck)
        return features

    @torch.inference_mode()
    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        heard = self._hear(audio.to(self.device, self.dtype).permute(0, 2, 3, 1).contiguous())
        x = pointwise(heard, *self._audio_expand, relu=True, residual=features["bottleneck"], index=index)
        x = depthwise_project(x, self._fuse_first)
        for block, residual in zip(self._fuse, (True, False, True), strict=True):
            x = inverted_residual(x, block, residual=residual)
        for up, skip in zip(self._ups, ("x5", "x4", "x3", "x2", "hidden"), strict=True):
            x = upsample_expand(x, features[skip], index, up.low, up.skip, up.bias)
            x = depthwise_project(x, up.projection)
            if skip != "hidden":
                x = inverted_residual(x, up.second, residual=True)
        return inverted_residual_head(x, self._ups[-1].second, *self._head, residual=True, dtype=self._mouth)

    def _hear(self, x: Tensor) -> Tensor:
        """The audio branch: (B, H, W, channels) → (B, 10, 10, channels)."""
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "conv7"):
            if name in self._audio_dense:
                layer = self._audio_dense[name]
                planes = x.permute(0, 3, 1, 2)  # channels last, as cuDNN wants it
                out = conv2d(planes, layer.weight, layer.bias, stride=layer.stride, padding=layer.padding)
                x = out.relu_().permute(0, 2, 3, 1).contiguous()
            else:
                block, residual = self._audio_blocks[name]
                x = inverted_residual(x, block, residual=residual)
        return x

    def _pointwise(self, layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
        return pack_pointwise(layer, device=self.device, dtype=self.dtype)

    def _block(self, layers: Sequence[nn.Conv2d]) -> Block:
        return pack_block(layers, device=self.device, dtype=self.dtype)

    def _projection(self, layers: Sequence[nn.Conv2d]) -> Projection:
        return pack_projection(layers, device=self.device, dtype=self.dtype)

    def _double(self, module: nn.Module) -> tuple[Block, Block]:
        layers = _convolutions(module)
        return self._block(layers[:3]), self._block(layers[3:])

    def _up(self, up: HoistedUp, skip: nn.Module) -> _Up:
        low, product, *rest = _convolutions(nn.Sequential(up.low, skip, up.rest))
        return _Up(
            self._pointwise(low)[0], *self._pointwise(product), self._projection(rest[:2]), self._block(rest[2:])
        )

    def _dense(self, layer: nn.Conv2d) -> _Dense:
        outputs, inputs = (padded(size) - size for size in layer.weight.shape[:2])
        assert layer.bias is not None
        weight = pad(layer.weight.detach(), (0, 0, 0, 0, 0, inputs, 0, outputs)).to(self.device, self.dtype)
        bias = pad(layer.bias.detach(), (0, outputs)).to(self.device, self.dtype)
        strides = (layer.stride[0], layer.stride[1])
        return _Dense(weight.contiguous(memory_format=torch.channels_last), bias, strides, int(layer.padding[0]))


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """A module's convolutions, in the order they run."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def _identity(channels: int) -> nn.Conv2d:
    """The projection that changes nothing: what the first block's readers fold in, it need not do."""
    layer = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(layer.weight)
    return layer
