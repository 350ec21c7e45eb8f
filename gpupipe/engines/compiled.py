"""The `compile` engine: PyTorch's compiler on the folded network, one graph for each half, with fixed shapes."""

from __future__ import annotations

import functools
import shutil

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.engines.eager import EagerEngine
from gpupipe.models.unet328 import UNet328

MODE = "max-autotune-no-cudagraphs"
"""Without CUDA graphs, because :mod:`gpupipe.graphs` captures the whole step, not the network alone."""


class CompiledEngine(EagerEngine):
    """``torch.compile`` with ``fullgraph`` and max-autotune; channels-last on CUDA.

    A compiled graph serves one batch size. The first batch sets it; smaller ones are padded by repeating their last
    sample, and a larger one is compiled anew. Compiling takes minutes, once per process and batch size.

    Args:
        dtype: of weights and activations. float32 is compiled and run without TF32.
    """

    name: EngineName = "compile"

    def __init__(self, network: UNet328, *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(network, device=device, dtype=dtype)
        compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=MODE)
        self._encode, self._decode = compiler(self._encode), compiler(self._decode)
        self._sizes: dict[str, int] = {}

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        features = super().encode(_padded(image, self._size("encode", len(image))))
        return {name: value[: len(image)] for name, value in features.items()}

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        size = self._size("decode", len(index))
        return super().decode(features, _padded(index, size), _padded(audio, size))[: len(index)]

    def _size(self, half: str, count: int) -> int:
        """The batch size that a half runs at."""
        self._sizes[half] = max(count, self._sizes.get(half, 0))
        return self._sizes[half]


def _padded(batch: Tensor, size: int) -> Tensor:
    """``batch`` with its last sample repeated up to ``size``."""
    return batch if len(batch) == size else torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, or None."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU, and none is installed"
    return None


DECLARATION = Declaration(
    "compile", CompiledEngine, slow_to_build=True, obstacle=lambda device, dtype: obstacle(device)
)
