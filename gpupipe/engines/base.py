"""What every engine does: run the network in two halves, so that the half that sees only the template can be cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

EngineName = Literal["auto", "eager", "compile", "fused", "gluon", "onnxruntime", "openvino", "torch"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
"""What ``engine=`` takes: ``auto`` chooses, ``torch`` is another word for ``eager``."""

Precision = Literal["float32", "float16", "bfloat16"]

BATCH_SIZES = {"cuda": 64, "cpu": 1}
"""Default frames in a batch, by kind of device; a CPU renders several batches side by side."""

Features = dict[str, Tensor]
"""What the network makes of template frames, before it hears anything: tensors by name, frames along the first axis."""


class Engine(Protocol):
    """The network, ready to run."""

    name: EngineName
    device: torch.device
    dtype: torch.dtype

    def encode(self, image: Tensor) -> Features:
        """Template's half: image (B, 6, 320, 320) in [0, 1] on ``device`` → features of each frame, by name."""
        ...

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """Speech's half.

        Args:
            features: what :meth:`encode` made of L frames.
            index: int64 (B,), which of them each sample takes.
            audio: (B, *audio_shape).

        Returns:
            mouth (B, 3, 320, 320): floating in (0, 1); or uint8, already scaled by 255 and truncated.
        """
        ...


def joined(samples: Sequence[Tensor]) -> Tensor:
    """Batches of one as one batch; a single one is not copied."""
    return samples[0] if len(samples) == 1 else torch.cat(list(samples))
