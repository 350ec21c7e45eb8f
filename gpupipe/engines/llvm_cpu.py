"""The `llvm` engine: the network on the CPU in float32, its levels a row at a time in kernels of our own."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.engines.onnxruntime_cpu import run_frames, samples_of, session
from gpupipe.kernels.common_llvm import obstacle
from gpupipe.kernels.levels_llvm import Level, down_level, up_level
from gpupipe.lanes import Lanes, cpu_lanes
from gpupipe.models.hoisted import TEMPLATE_FEATURES, SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import INPUT_SIZE, UNet328
from gpupipe.onnx_export import export_deepest

_SMALLEST_BAND = 10
"""Rows of a map that are worth a thread of their own: each band also makes up to four rows of its neighbours."""


@dataclass(frozen=True)
class _Room:
    """What a frame needs while it is computed.

    Attributes:
        scratch: (threads, floats), for one kernel after the other.
        maps: what the levels of the decoder make for the next.
    """

    scratch: Tensor
    maps: list[Tensor]


class LlvmEngine:
    """:mod:`gpupipe.kernels.levels_llvm` for the encoder and the decoder; what lies between, on maps of 10×10 and
    16×16, is ONNX Runtime's, which is as fast as the processor there.

    It runs frame by frame. Features are (L, height, width, channels); the levels' channels are padded to whole vectors.

    Args:
        lanes: how many frames at once, and on how many threads each; None takes a render's (:mod:`gpupipe.lanes`).
    """

    name: EngineName = "llvm"

    def __init__(self, network: UNet328, *, lanes: Lanes | None = None) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        lanes = lanes or cpu_lanes()
        self._threads = lanes.threads
        self._helpers = ThreadPoolExecutor(max(1, lanes.number * (lanes.threads - 1)), "gpupipe-band")
        template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
        bottleneck, deepest = export_deepest(template, speech)
        self._bottleneck, self._deepest = session(bottleneck, lanes.threads), session(deepest, lanes.threads)
        downs = [template.down1, template.down2, template.down3, template.down4, template.down5]
        self._down = [
            down_level(down, INPUT_SIZE >> place, first=None if place > 1 else template.hidden)
            for place, down in enumerate(downs, 1)
        ]
        ups = [speech.up1, speech.up2, speech.up3, speech.up4, speech.up5]
        self._up = [
            up_level(up, INPUT_SIZE >> 5 - place, head=None if place < 5 else speech.outc.conv)
            for place, up in enumerate(ups, 1)
        ]
        self._rooms: deque[_Room] = deque()

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        image = image.to("cpu", torch.float32).contiguous()
        shapes = [shape for level in self._down for shape in level.shapes]
        maps = [torch.empty(len(image), *shape, dtype=torch.float32, device="cpu") for shape in shapes]
        with self._room() as room:
            for row, sample in enumerate(image):
                made = iter(maps)
                read = sample
                for level in self._down:
                    outputs = [next(made)[row] for _ in level.shapes]
                    self._run(level, [read, *outputs], room)
                    read = outputs[-1]
        *kept, x6 = maps
        bottleneck = run_frames(self._bottleneck, [{"x6": sample} for sample in samples_of(x6)])
        return dict(zip(TEMPLATE_FEATURES[:-1], kept, strict=True)) | bottleneck

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        bottleneck = features["bottleneck"].numpy()
        frames = index.tolist()
        inputs = [
            {"bottleneck": bottleneck[frame : frame + 1], "audio": window}
            for frame, window in zip(frames, samples_of(audio), strict=True)
        ]
        x = run_frames(self._deepest, inputs)["x"]
        mouth = torch.empty(len(frames), *self._up[-1].shapes[0], dtype=torch.float32, device="cpu")
        skips = [features[name] for name in reversed(TEMPLATE_FEATURES[:-1])]
        with self._room() as room:
            for row, frame in enumerate(frames):
                maps = [x[row], *room.maps, mouth[row]]
                for place, (level, skip) in enumerate(zip(self._up, skips, strict=True)):
                    self._run(level, [maps[place], skip[frame], maps[place + 1]], room)
        return mouth

    def _run(self, level: Level, maps: Sequence[Tensor], room: _Room) -> None:
        """Make all rows of a level, in as many bands as a lane has threads."""
        bands = max(1, min(self._threads, level.size // _SMALLEST_BAND))
        edges = [level.size * band // bands for band in range(bands + 1)]
        others = [
            self._helpers.submit(level.kernel, maps, room.scratch[band], edges[band], edges[band + 1])
            for band in range(1, bands)
        ]
        level.kernel(maps, room.scratch[0], edges[0], edges[1])
        for other in others:
            other.result()

    @contextlib.contextmanager
    def _room(self) -> Iterator[_Room]:
        """Memory that no other thread uses meanwhile."""
        try:
            room = self._rooms.pop()
        except IndexError:
            floats = max(level.kernel.scratch_floats for level in (*self._down, *self._up))
            maps = [torch.empty(level.shapes[0], dtype=torch.float32, device="cpu") for level in self._up[:-1]]
            room = _Room(torch.empty(self._threads, floats, dtype=torch.float32, device="cpu"), maps)
        yield room
        self._rooms.append(room)


DECLARATION = Declaration(
    "llvm",
    lambda network, **_: LlvmEngine(network),
    devices=("cpu",),
    dtypes=(torch.float32,),
    obstacle=lambda device, dtype: obstacle(),
)
