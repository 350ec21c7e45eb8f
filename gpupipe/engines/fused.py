"""The `fused` engine: the hoisted halves of the network on kernels that keep the wide tensors out of memory.

It runs the layers of :mod:`gpupipe.models.hoisted`, channels last in half precision, on these kernels:

    inverted residual     whole, or expansion + (depthwise, projection), see gpupipe.kernels.inverted_residual
    decoder's entry       upsampling, concatenation and expansion in one, see gpupipe.kernels.pointwise
    last block            with head, sigmoid and the scaling to uint8
    audio's 3×3 layers    cuDNN

One thing is not hoisted: the decoder's expansions upsample their low maps while loading them, which moves fewer bytes
(see gpupipe.kernels.pointwise_triton).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.kernels.dispatch import backend, obstacle
from gpupipe.kernels.inverted_residual import (
    Projection,
    depthwise_project,
    inverted_residual,
    inverted_residual_head,
    pack_block,
    pack_pointwise,
    pack_projection,
)
from gpupipe.kernels.pointwise import padded, pointwise, upsample_expand
from gpupipe.lanes import available_cores
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.hoisted import SKIPS, HoistedUp, SpeechHalf, TemplateHalf, conv1x1, convolutions
from gpupipe.models.unet328 import INPUT_SIZE, UNet328, random_inputs

Step = Callable[[Tensor], Tensor]
"""A block on (B, H, W, channels)."""

Entry = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A decoder level's first block: takes the map from below, the template's maps, and which of them each sample uses."""


class FusedEngine:
    """Triton kernels on CUDA; on other devices their plain-torch reference, for comparison.

    Features are (L, H, W, channels), contiguous, and are read where they lie: no batch is gathered.

    Args:
        dtype: of weights and activations: half precision on CUDA. Sums are accumulated in float32.
    """

    name: EngineName = "fused"
    _mouth = torch.uint8

    def __init__(self, network: UNet328, *, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        self.device = device
        self.dtype = dtype
        network = fold_batch_norms(network)
        template, speech = TemplateHalf(network), SpeechHalf(network)

        expand, depthwise = convolutions(template.hidden)
        # The first block's own projection is folded into the layers that read it: this one changes nothing.
        identity = conv1x1(torch.eye(expand.out_channels)[:, :, None, None], None)
        self._first = self._block([expand, depthwise, identity], INPUT_SIZE)
        downs = (template.down1, template.down2, template.down3, template.down4, template.down5)
        self._downs = [self._down(down, INPUT_SIZE >> level) for level, down in enumerate(downs)]
        self._bottleneck = self._pack(template.bottleneck)

        audio = speech.audio_model
        layers = (audio.conv1, audio.conv2, audio.conv3, audio.conv4, audio.conv5, audio.conv6, audio.conv7)
        self._audio = list(map(self._audio_step, layers))
        self._audio_expand = self._pack(speech.audio_expand)
        fuse = convolutions(speech.fuse)
        self._fuse_first = self._projection(fuse[:2])
        self._fuse = [
            self._block(fuse[i : i + 3], 0, residual=residual) for i, residual in ((2, True), (5, False), (8, True))
        ]
        ups = (speech.up1, speech.up2, speech.up3, speech.up4, speech.up5)
        sizes = [INPUT_SIZE >> level for level in (4, 3, 2, 1, 0)]
        self._entries = [self._entry(up, size) for up, size in zip(ups, sizes, strict=True)]
        self._second_blocks = [
            self._block(convolutions(up.rest)[2:], size, residual=True)
            for up, size in zip(ups[:-1], sizes[:-1], strict=True)
        ]
        self._last = self._mouth_block(convolutions(speech.up5.rest)[2:], speech.outc.conv)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`; fastest with a channels-last image of the engine's type."""
        x = image.to(self.device, self.dtype).permute(0, 2, 3, 1).contiguous()
        features = {"hidden": self._first(x)}
        x = features["hidden"]
        for name, (first, second) in zip(("x2", "x3", "x4", "x5", "x6"), self._downs, strict=True):
            x = second(first(x))
            features[name] = x
        features["bottleneck"] = pointwise(features.pop("x6"), *self._bottleneck)
        return features

    @torch.inference_mode()
    @torch.autocast("cuda", enabled=False)  # for cuDNN's layers
    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        x = audio.to(self.device, self.dtype).permute(0, 2, 3, 1).contiguous()
        for step in self._audio:
            x = step(x)
        x = pointwise(x, *self._audio_expand, relu=True, residual=features["bottleneck"], index=index)
        x = depthwise_project(x, self._fuse_first)
        for block in self._fuse:
            x = block(x)
        rest = (*self._second_blocks, self._last)
        for entry, second, skip in zip(self._entries, rest, SKIPS, strict=True):
            x = second(entry(x, features[skip], index))
        return x

    # ── what runs a block ─────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, layers: Sequence[nn.Conv2d], size: int, *, stride: int = 1, residual: bool = False) -> Step:
        """An inverted residual on maps of ``size`` pixels a side, 0 for small maps; only `gluon` looks at the size."""
        block = pack_block(layers, device=self.device, dtype=self.dtype)
        return functools.partial(inverted_residual, block=block, stride=stride, residual=residual)

    def _entry(self, up: HoistedUp, size: int) -> Entry:
        """Upsampling, concatenation and the first block of a decoder level, giving maps of ``size`` pixels a side."""
        low_weight, _ = self._pack(up.low)
        weights = (low_weight, *self._pack(up.skip))
        projection = self._projection(convolutions(up.rest)[:2])

        def enter(low: Tensor, skip: Tensor, index: Tensor) -> Tensor:
            return depthwise_project(upsample_expand(low, skip, index, *weights), projection)

        return enter

    def _mouth_block(self, layers: Sequence[nn.Conv2d], head: nn.Conv2d) -> Step:
        """The last block, with head, sigmoid and scaling: (B, 320, 320, channels) → mouth (B, 3, 320, 320)."""
        block = pack_block(layers, device=self.device, dtype=self.dtype)
        weight, bias = self._pack(head)
        return functools.partial(
            inverted_residual_head, block=block, head=weight, head_bias=bias, residual=True, dtype=self._mouth
        )

    def _down(self, module: nn.Module, size: int) -> tuple[Step, Step]:
        """The two blocks of an encoder level on maps of ``size`` pixels a side. The level halves them."""
        layers = convolutions(module)
        return self._block(layers[:3], size, stride=2), self._block(layers[3:], size // 2, residual=True)

    def _pack(self, layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
        return pack_pointwise(layer, device=self.device, dtype=self.dtype)

    def _projection(self, layers: Sequence[nn.Conv2d]) -> Projection:
        return pack_projection(layers, device=self.device, dtype=self.dtype)

    def _audio_step(self, layer: nn.Module) -> Step:
        """An inverted residual of the audio branch, or one of its 3×3 convolutions with ReLU."""
        if not isinstance(layer, nn.Conv2d):
            return self._block(convolutions(layer), 0, residual=bool(layer.residual))
        outputs, inputs = (padded(size) - size for size in layer.weight.shape[:2])
        assert layer.bias is not None
        filled = pad(layer.weight.detach(), (0, 0, 0, 0, 0, inputs, 0, outputs)).to(self.device, self.dtype)
        weight = filled.contiguous(memory_format=torch.channels_last)
        bias = pad(layer.bias.detach(), (0, outputs)).to(self.device, self.dtype)
        how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}

        def convolve(x: Tensor) -> Tensor:
            planes = conv2d(x.permute(0, 3, 1, 2), weight, bias, **how)  # channels last, as cuDNN wants it
            return planes.relu_().permute(0, 2, 3, 1).contiguous()

        return convolve


def with_kernels_compiled(engine: FusedEngine, network: UNet328) -> FusedEngine:
    """``engine``, its kernels compiled on all cores. Otherwise its first batch has them compiled one by one.

    They do not depend on the size of the batch.
    """
    if backend(engine.device) == "triton":
        from gpupipe.kernels.launch_triton import compile_together  # noqa: PLC0415 - loads Triton

        image, audio = random_inputs(network, 1)
        index = torch.zeros(1, dtype=torch.int64, device=engine.device)
        compile_together(lambda: engine.decode(engine.encode(image), index, audio), available_cores())
    return engine


def _build(network: UNet328, *, device: torch.device, dtype: torch.dtype) -> FusedEngine:
    return with_kernels_compiled(FusedEngine(network, device=device, dtype=dtype), network)


DECLARATION = Declaration(
    "fused",
    _build,
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16),
    obstacle=lambda device, dtype: obstacle(device),
)
