"""The `compile` engine: PyTorch's compiler on the folded network, one graph for each half, shapes fixed."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.unet328 import UNet328
from gpupipe.tf32 import own_precision

MODE = "max-autotune-no-cudagraphs"
"""CUDA graphs are taken over the whole step (:mod:`gpupipe.graphs`), not over the network alone."""


class CompiledEngine:
    """``torch.compile`` with ``fullgraph`` and max-autotune; channels-last on CUDA.

    A graph serves one batch size. The first batch sets it; smaller ones are padded by repeating their last sample, and
    a larger one is compiled anew. Compiling takes minutes, once a process and batch size.

    Args:
        dtype: of weights and activations. float32 is compiled and run without TF32.
    """

    name: EngineName = "compile"

    def __init__(self, network: UNet328, *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        folded = fold_batch_norms(network).to(device, dtype).to(memory_format=self._layout)
        compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=MODE)
        self._encode: Callable[[Tensor], tuple[Tensor, ...]] = compiler(folded.encode)
        self._decode: Callable[..., Tensor] = compiler(folded.decode)
        self._sizes: dict[str, int] = {}

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        count = len(image)
        image = _padded(image.to(self.device, self.dtype, memory_format=self._layout), self._size("encode", count))
        with own_precision(self.device):
            features = self._encode(image.contiguous(memory_format=self._layout))
        return {f"x{i}": value[:count] for i, value in enumerate(features, start=1)}

    @torch.inference_mode()
    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        count = len(index)
        size = self._size("decode", count)
        index = _padded(index, size)
        gathered = tuple(
            features[f"x{i}"].index_select(0, index).contiguous(memory_format=self._layout) for i in range(1, 7)
        )
        window = _padded(audio.to(self.device, self.dtype), size).contiguous(memory_format=self._layout)
        with own_precision(self.device):
            return self._decode(gathered, window)[:count]

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


DECLARATION = Declaration("compile", CompiledEngine, slow_to_build=True, obstacle=obstacle)
