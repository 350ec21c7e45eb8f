"""The `eager` engine: PyTorch, layer by layer, batch norms folded. It runs anywhere; the others are held to it."""

from __future__ import annotations

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.unet328 import UNet328
from gpupipe.tf32 import own_precision


class EagerEngine:
    """Eager PyTorch with batch norms folded; channels-last on CUDA.

    Args:
        dtype: of weights and activations. float32 is run without TF32.
    """

    name: EngineName = "eager"

    def __init__(self, network: UNet328, *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._network = fold_batch_norms(network).to(device, dtype).to(memory_format=self._layout)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        with own_precision(self.device):
            features = self._network.encode(image.to(self.device, self.dtype, memory_format=self._layout))
        return {f"x{i}": value for i, value in enumerate(features, start=1)}

    @torch.inference_mode()
    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        x1, x2, x3, x4, x5, x6 = (features[f"x{i}"].index_select(0, index) for i in range(1, 7))
        audio = audio.to(self.device, self.dtype)
        with own_precision(self.device):
            return self._network.decode((x1, x2, x3, x4, x5, x6), audio)


DECLARATION = Declaration("eager", EagerEngine)
