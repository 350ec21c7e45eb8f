"""The `llvm` engine: the network on the CPU in float32, its levels a row at a time in kernels of our own."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.engines.onnxruntime_cpu import run_frames, samples_of, session
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.lanes import Lanes, cpu_lanes
from gpupipe.models.hoisted import SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import INPUT_SIZE, UNet328
from gpupipe.onnx_export import export_depths

if TYPE_CHECKING:
    from gpupipe.kernels.levels_llvm import Level

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
    """:mod:`gpupipe.kernels.levels_llvm` for the largest maps: the first block and down1, and up2 to up5. What lies
    between is ONNX Runtime's: small maps fit the caches, and where channels are many it is the weights that fit none;
    layer by layer, each is read once.

    It runs frame by frame.

    Args:
        lanes: how many frames at once, and on how many threads each; None takes a render's (:mod:`gpupipe.lanes`).
    """

    name: EngineName = "llvm"

    def __init__(self, network: UNet328, *, lanes: Lanes | None = None) -> None:
        from gpupipe.kernels.levels_llvm import first_level, up_level  # noqa: PLC0415 - LLVM may be missing

        self.device = torch.device("cpu")
        self.dtype = torch.float32
        lanes = lanes or cpu_lanes()
        self._threads = lanes.threads
        self._helpers = ThreadPoolExecutor(max(1, lanes.number * (lanes.threads - 1)), "gpupipe-band")
        template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
        self._first = first_level(template.hidden, template.down1, 160)
        self._up = [
            up_level(speech.up2, 40),
            up_level(speech.up3, 80),
            up_level(speech.up4, 160, skip_padded=True),
            up_level(speech.up5, INPUT_SIZE, head=speech.outc.conv),
        ]
        graphs = export_depths(template, speech, x2_channels=self._first.shapes[-1][-1])
        self._template, self._speech = (session(graph, lanes.threads) for graph in graphs)
        self._rooms: deque[_Room] = deque()

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        image = image.to("cpu", torch.float32).contiguous()
        made = {
            name: torch.empty(len(image), *shape, dtype=torch.float32, device="cpu")
            for name, shape in zip(("hidden", "x2"), self._first.shapes, strict=True)
        }
        with self._room() as room:
            for maps in zip(image, *made.values(), strict=True):
                self._run(self._first, maps, room)
        return made | run_frames(self._template, [{"x2": sample} for sample in samples_of(made["x2"])])

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        frames = index.tolist()
        given = {name: features[name].numpy() for name in ("x5", "bottleneck")}
        inputs = [
            {"audio": window} | {name: value[frame : frame + 1] for name, value in given.items()}
            for frame, window in zip(frames, samples_of(audio), strict=True)
        ]
        x = run_frames(self._speech, inputs)["x"]
        mouth = torch.empty(len(frames), *self._up[-1].shapes[0], dtype=torch.float32, device="cpu")
        skips = [features[name] for name in ("x4", "x3", "x2", "hidden")]
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
            floats = max(level.kernel.scratch_floats for level in (self._first, *self._up))
            maps = [torch.empty(level.shapes[0], dtype=torch.float32, device="cpu") for level in self._up[:-1]]
            room = _Room(torch.empty(self._threads, floats, dtype=torch.float32, device="cpu"), maps)
        yield room
        self._rooms.append(room)


DECLARATION = Declaration(
    "llvm",
    lambda network, **_: LlvmEngine(network),
    devices=("cpu",),
    dtypes=(torch.float32,),
    obstacle=lambda device, dtype: llvm_obstacle(),
)
