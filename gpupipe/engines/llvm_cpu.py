"""The `llvm` engine: the network on the CPU, in kernels of our own."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.models.fold import folded
from gpupipe.models.hoisted import SKIPS, TEMPLATE_FEATURES, SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import INPUT_SIZE, UNet328

if TYPE_CHECKING:
    from gpupipe.kernels.levels_llvm import Level


@dataclass(frozen=True)
class _Room:
    """What a frame needs while it is computed.

    Attributes:
        scratch: for one kernel after the other.
        maps: what the levels of the decoder make for the next.
    """

    scratch: Tensor
    maps: list[Tensor]


class LlvmEngine:
    """Maps of 40² and more are made a row at a time (:mod:`gpupipe.kernels.levels_llvm`), most smaller ones whole
    (:mod:`gpupipe.kernels.maps_llvm`).

    It runs frame by frame, each on the thread that asks for it. Features are (L, H, W, channels).

    Args:
        dtype: float32, float16, in which sums are accumulated, too, or bfloat16.
    """

    name: EngineName = "llvm"

    def __init__(self, network: UNet328, *, dtype: torch.dtype = torch.float32) -> None:
        # LLVM may be missing.
        from gpupipe.kernels.common_llvm import this_processor  # noqa: PLC0415
        from gpupipe.kernels.levels_llvm import down_level, first_level, up_level  # noqa: PLC0415
        from gpupipe.kernels.maps_llvm import speech_depths, template_depths  # noqa: PLC0415

        self.device = torch.device("cpu")
        self._processor = processor = this_processor(dtype)
        self.dtype = processor.sums
        network = folded(network)
        template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
        self._encoder = [
            first_level(template.hidden, template.down1, INPUT_SIZE // 2, processor=processor),
            down_level(template.down2, 80, processor=processor),
            down_level(template.down3, 40, processor=processor),
            down_level(template.down4, 20, processor=processor),
            template_depths(template, processor=processor),
        ]
        self._depths = speech_depths(speech, processor=processor)
        self._decoder = [
            up_level(speech.up1, 20, processor=processor),
            up_level(speech.up2, 40, processor=processor),
            up_level(speech.up3, 80, processor=processor),
            up_level(speech.up4, 160, processor=processor),
            up_level(speech.up5, INPUT_SIZE, skip_padded=False, head=speech.outc.conv, processor=processor),
        ]
        self._rooms: deque[_Room] = deque()

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        image = image.to("cpu", self.dtype).contiguous()
        shapes = [shape for level in self._encoder for shape in level.shapes]
        made = [torch.empty(len(image), *shape, dtype=self._processor.dtype, device="cpu") for shape in shapes]
        with self._room() as room:
            for x, hidden, *later in zip(image, *made, strict=True):
                first, *others = self._encoder
                first.kernel([x, hidden, later[0]], room.scratch)
                for level, read, written in zip(others, later, later[1:], strict=False):
                    level.kernel([read, written], room.scratch)
        return dict(zip(TEMPLATE_FEATURES, made, strict=True))

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`; mouths are float32."""
        windows = self._channels_last(audio)
        mouth = torch.empty(len(audio), *self._decoder[-1].shapes[0], dtype=torch.float32, device="cpu")
        skips = [features[name] for name in SKIPS]
        with self._room() as room:
            for window, out, frame in zip(windows, mouth, index.tolist(), strict=True):
                maps = [*room.maps, out]
                self._depths.kernel([window, features["bottleneck"][frame], maps[0]], room.scratch)
                for level, skip, low, made in zip(self._decoder, skips, maps, maps[1:], strict=False):
                    level.kernel([low, skip[frame], made], room.scratch)
        return mouth

    def _channels_last(self, audio: Tensor) -> Tensor:
        """(B, C, H, W) as kernels take it, (B, H, W, channels): those beyond C are not read."""
        batch, channels, height, width = audio.shape
        shape = batch, height, width, channels + -channels % self._processor.lanes
        windows = torch.empty(shape, dtype=self._processor.dtype, device="cpu")
        windows[..., :channels] = audio.permute(0, 2, 3, 1)
        return windows

    @contextlib.contextmanager
    def _room(self) -> Iterator[_Room]:
        """Memory that no other thread uses meanwhile."""
        try:
            room = self._rooms.pop()
        except IndexError:
            levels: Sequence[Level] = (*self._encoder, self._depths, *self._decoder)
            scratch = torch.empty(max(level.kernel.scratch_bytes for level in levels), dtype=torch.uint8, device="cpu")
            made = [self._depths.shapes[0], *(level.shapes[0] for level in self._decoder[:-1])]
            room = _Room(scratch, [torch.empty(shape, dtype=self._processor.dtype, device="cpu") for shape in made])
        yield room
        self._rooms.append(room)


DECLARATION = Declaration(
    "llvm",
    lambda network, dtype, **_: LlvmEngine(network, dtype=dtype),
    devices=("cpu",),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    obstacle=lambda device, dtype: llvm_obstacle(dtype),
)
