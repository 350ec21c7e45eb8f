"""The `eager` engine: PyTorch, layer by layer, batch norms folded. It runs anywhere, and checks the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.unet328 import UNet328
from gpupipe.tf32 import own_precision


class EagerEngine:
    """Eager PyTorch with batch norms folded; channels-last on CUDA.

    Features are (L, channels, H, W), but on CUDA (L, H, W, channels): what ``index_select`` gives is always contiguous,
    and so keeps the layout that the layers want.

    Args:
        dtype: of weights and activations. float32 is run without TF32.
    """

    name: EngineName = "eager"

    def __init__(self, network: UNet328, *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        folded = fold_batch_norms(network).to(device, dtype).to(memory_format=self._layout)
        self._encode: Callable[[Tensor], tuple[Tensor, ...]] = folded.encode
        self._decode: Callable[..., Tensor] = folded.decode

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        with own_precision(self.device, self.dtype):
            features = self._encode(self._given(image))
        if self._layout == torch.channels_last:
            features = tuple(value.permute(0, 2, 3, 1) for value in features)
        return {f"x{i}": value for i, value in enumerate(features, start=1)}

    @torch.inference_mode()
    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        gathered = tuple(features[f"x{i}"].index_select(0, index) for i in range(1, 7))
        if self._layout == torch.channels_last:
            gathered = tuple(value.permute(0, 3, 1, 2) for value in gathered)
        with own_precision(self.device, self.dtype):
            return self._decode(gathered, self._given(audio))

    def _given(self, values: Tensor) -> Tensor:
        """``values`` as the layers take them."""
        return values.to(self.device, self.dtype).contiguous(memory_format=self._layout)


DECLARATION = Declaration("eager", EagerEngine)
