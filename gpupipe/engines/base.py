"""What every engine does: run the network in two halves, so that the half that sees only the template can be cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from gpupipe.errors import DeviceError
from gpupipe.models.unet328 import UNet328

EngineName = Literal["auto", "eager", "compile", "fused", "gluon", "llvm", "onnxruntime", "torch"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
"""What ``engine=`` accepts. ``auto`` chooses one; ``torch`` is another name for ``eager``."""

Precision = Literal["float32", "float16", "bfloat16"]

BATCH_SIZES = {"cuda": 64, "cpu": 1}
"""Default number of frames in a batch, by kind of device. A CPU renders several batches side by side."""

Features = dict[str, Tensor]
"""What the network computes from template frames alone: tensors by name, with the frames along the first axis."""


class Engine(Protocol):
    """The network, ready to run.

    Attributes:
        dtype: of the images and windows that it takes.
    """

    name: EngineName
    device: torch.device
    dtype: torch.dtype

    def encode(self, image: Tensor) -> Features:
        """The template's half: image (B, 6, 320, 320) in [0, 1] on ``device`` → features of each frame, by name."""
        ...

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """The speech's half.

        Args:
            features: what :meth:`encode` made of L frames.
            index: int64 (B,), which of these frames each sample uses.
            audio: (B, *audio_shape).

        Returns:
            mouth (B, 3, 320, 320): floating in (0, 1); or uint8, already scaled by 255 and truncated.
        """
        ...


@dataclass(frozen=True)
class Declaration:
    """What is known of an engine before it is built.

    Attributes:
        make: builds it, given the network, ``device=`` and ``dtype=``.
        devices: the kinds of device that it runs on.
        dtypes: the types that it runs in.
        slow_to_build: ``auto`` does not build it just to measure it, but uses it if an earlier measurement found it the
            fastest.
        obstacle: why it does not run on a device of this machine at a type; None if it does.
    """

    name: EngineName
    make: Callable[..., Engine]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    slow_to_build: bool = False
    obstacle: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None

    def build(self, network: UNet328, device: torch.device, dtype: torch.dtype) -> Engine:
        """Build the engine.

        Raises:
            DeviceError: it does not run on ``device``, at ``dtype``, or here.
        """
        told = f"engine is {self.name!r}"
        if device.type not in self.devices:
            wanted = " or ".join(map(repr, self.devices))
            raise DeviceError(f"{told} and device {str(device)!r}; expected device {wanted} with this engine")
        if dtype not in self.dtypes:
            met, *others = (str(one).removeprefix("torch.") for one in (dtype, *self.dtypes))
            raise DeviceError(f"{told} and precision {met!r}; expected {' or '.join(others)} with this engine")
        if reason := self.obstacle(device, dtype):
            raise DeviceError(f"{told}: {reason}")
        with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):  # weights are multiplied
            return self.make(network, device=device, dtype=dtype)
