"""A frame's stages one by one: decode, crop, network, paste, convert, encode; each beside its floor.

Each stage runs by itself on the template's own frames, as the pipeline runs it: on a CPU side by side in lanes, on CUDA
in batches; decoding and encoding use all their threads. In a render the stages overlap, and four of them (decode, crop,
template half, convert) run once for each frame of the template, however long the clip is.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpupipe.benchmarks.common import Row, Spread, measure, row
from gpupipe.benchmarks.floors import Floor, machine_rows, operations_of
from gpupipe.benchmarks.kernel_bench import seconds_of
from gpupipe.benchmarks.scenario import Scenario
from gpupipe.engines import EngineName
from gpupipe.engines.base import BATCH_SIZES
from gpupipe.features import SpeechFeatures
from gpupipe.kernels import crop_resize, nv12, paste_blend
from gpupipe.lanes import available_cores, map_in_lanes
from gpupipe.models.hoisted import SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import INPUT_SIZE, UNet328
from gpupipe.schedule import frame_rate
from gpupipe.seam import FEATHER
from gpupipe.template import Template, numbered_files
from gpupipe.unet_model import UNetModel
from gpupipe.video.codecs import segment_length
from gpupipe.video.decode import read_images
from gpupipe.video.encode import VideoWriter

FRAMES = {"cuda": 64, "cpu": 24}
"""How many frames a stage is timed on."""

Once = Literal["frame", "template frame"]


@dataclass(frozen=True)
class Stage:
    """One stage of a frame.

    Attributes:
        once: it runs once for each of these.
        run: does it for the frames of an index: consecutive numbers, int64 on the CPU; they may come several times.
        where: ``lanes`` runs frames side by side on CPU cores or as a batch on the GPU; ``host`` has its own threads.
        moved: the fewest bytes that a frame's stage can read and write.
        operations: the fewest that are known to give a frame the same result.
        laps: how often it goes through the frames when it is timed.
    """

    name: str
    once: Once
    run: Callable[[Tensor], object]
    where: Literal["lanes", "host"]
    moved: int
    operations: int = 0
    laps: int = 1


class Step:
    """A batch, with everything that each stage needs from the ones before it, made once."""

    def __init__(self, scenario: Scenario, model: UNetModel, folder: Path, frames: int | None = None) -> None:
        self.model = model
        self.device = model.device
        self._scenario = scenario
        self._folder = folder
        self._paths = numbered_files(scenario.template / "full_body_img", ".jpg", "template frame")
        count = FRAMES[self.device.type] if frames is None else frames
        # It starts again where the template is shorter.
        self.frames = torch.from_numpy(np.resize(np.arange(len(self._paths)), count))
        self._template = Template.from_directory(scenario.template, device=self.device, exact=model.exact)
        kept, index = self._template.frames.lookup(self.frames.numpy())
        self._pixels = kept["frame"].index_select(0, index)
        self._boxes = self._template.boxes[self.frames.to(self.device)]
        rows = SpeechFeatures(scenario.features, scenario.mode)
        at = np.resize(np.arange(len(rows)), count)
        self._audio = torch.cat([rows.windows(int(i), int(i) + 1) for i in at]).to(self.device)
        every = torch.arange(count)
        self._places = every.to(self.device)  # a copy from the host in a stage would be waited for
        self._crops, self._images = self._crop(every)
        chunks = [model.engine.encode(self._images[i : i + 8]) for i in range(0, count, 8)]
        self._features = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        self._mouths = self._speech_half(every)
        self._backgrounds = nv12.to_nv12(self._pixels)

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """In a frame's order."""
        (width, height), dtype = self._scenario.size, self.model.engine.dtype
        box = self._template.max_box
        frame = 3 * width * height
        jpeg = sum(self._paths[i].stat().st_size for i in self.frames.tolist()) // len(self.frames)
        template_half, speech_half = network_costs(self.model.network, dtype, BATCH_SIZES[self.device.type])
        crop = crop_resize.bytes_moved(box, dtype)
        paste = paste_blend.bytes_moved(self._scenario.size, box, self._mouths.dtype)
        convert = nv12.bytes_moved(self._scenario.size)
        return [
            Stage("decode", "template frame", self._decode, "host", jpeg + frame),
            Stage("crop", "template frame", self._crop, "lanes", crop),
            Stage("network, template half", "template frame", self._template_half, "lanes", *template_half),
            Stage("network, speech half", "frame", self._speech_half, "lanes", *speech_half),
            Stage("paste", "frame", self._paste, "lanes", paste),
            Stage("convert", "template frame", self._convert, "lanes", convert),
            Stage("encode", "frame", self._encode, "host", frame // 2, laps=self._laps),
        ]

    @property
    def _laps(self) -> int:
        """How often the frames are encoded: on a GPU's machine so often that each of its cores gets a segment."""
        if self.device.type != "cuda":
            return 1
        return -(-available_cores() * segment_length(frame_rate(self._scenario.fps)) // len(self.frames))

    def _decode(self, index: Tensor) -> Tensor:
        paths = [self._paths[i] for i in self.frames[index].tolist()]
        return read_images(paths, device=self.device, exact=self.model.exact)

    def _crop(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = self._places[_slice(index)]
        half = self.model.engine.dtype.itemsize == 2
        return crop_resize.crop_and_input(
            self._pixels, index, self._boxes[index], dtype=self.model.engine.dtype, channels_last=half
        )

    def _template_half(self, index: Tensor) -> object:
        return self.model.engine.encode(self._images[_slice(index)])

    def _speech_half(self, index: Tensor) -> Tensor:
        return self.model.engine.decode(self._features, self._places[_slice(index)], self._audio[_slice(index)])

    def _paste(self, index: Tensor) -> Tensor:
        mouths = self._mouths[_slice(index)]
        index = self._places[_slice(index)]
        return paste_blend.paste_blend(
            mouths,
            self._crops,
            index,
            self._pixels,
            index,
            self._boxes[index],
            self._backgrounds.index_select(0, index),
            nv12=True,
            max_box=self._template.max_box,
            feather=FEATHER,
        )

    def _convert(self, index: Tensor) -> Tensor:
        return nv12.to_nv12(self._pixels[_slice(index)])

    def _encode(self, index: Tensor) -> None:
        width, height = self._scenario.size
        path = self._folder / "stage.mp4"
        how: dict[str, Any] = {"fps": self._scenario.fps, "device": self.device}
        frames = self._backgrounds[_slice(index)]
        with VideoWriter(path, width=width, height=height, segmented=self.device.type == "cuda", **how) as writer:
            for batch in frames.split(8) * (len(index) // len(frames)):
                writer.write(batch)


def _slice(index: Tensor) -> slice:
    """The frames of an index as a slice, which copies nothing: in a render a stage's input is not copied either."""
    return slice(int(index[0]), int(index[-1]) + 1)


def network_costs(network: UNet328, dtype: torch.dtype, batch: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bytes, operations) a frame, of the template half and of the speech half.

    The operations are those of the halves as :mod:`gpupipe.models.hoisted` rearranges them. The bytes are inputs,
    outputs and, once for each batch, weights; what passes between layers is not counted.
    """
    with torch.device("meta"), torch.inference_mode():  # shapes are enough to count
        empty = UNet328(network.mode, width=network.width).eval()
        template, speech = TemplateHalf(empty), SpeechHalf(empty)
        image, audio = torch.zeros(1, 6, INPUT_SIZE, INPUT_SIZE), torch.zeros(1, *network.audio_shape)
        features = template(image)
    kept = sum(one.numel() for one in features)

    def moved(values: int, half: torch.nn.Module) -> int:
        weights = sum(one.numel() for one in half.parameters())
        return (values + weights // batch) * dtype.itemsize

    mouth = 3 * INPUT_SIZE**2
    return (
        (moved(image.numel() + kept, template), operations_of(template, image)),
        (moved(kept + audio.numel() + mouth, speech), operations_of(speech, *features, audio)),
    )


def seconds_a_frame(stage: Stage, count: int, device: torch.device, *, rounds: int) -> Spread:
    """Seconds of a stage for one frame, measured over ``count`` frames, or more laps of them; a first pass does not
    count."""
    every = torch.arange(count).repeat(stage.laps)
    if stage.where == "host":
        spread = measure(lambda: stage.run(every), rounds=rounds, device=device)
    elif device.type == "cuda":
        spread = seconds_of(lambda: stage.run(every), device, rounds=rounds)
    else:
        spread = measure(lambda: deque(map_in_lanes(stage.run, every.split(1)), maxlen=0), rounds=rounds)
    return spread.map(lambda seconds: seconds / len(every))


@torch.inference_mode()
def stage_rows(
    scenario: Scenario,
    folder: Path,
    *,
    device: str,
    engine: EngineName = "auto",
    rounds: int = 3,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[list[Row]]:
    """The machine's rows, then each stage's as soon as it is measured; a stage that fails is a row with its error."""
    model = UNetModel(scenario.checkpoint, scenario.mode, device, engine=engine)
    step = Step(scenario, model, folder)
    dtype = model.engine.dtype
    config = scenario.facts() | {"engine": model.engine.name, "precision": str(dtype).removeprefix("torch.")}
    yield machine_rows(model.device, dtype)
    for stage in step.stages:
        rows = _rows_of_stage(stage, step, config, rounds)
        if rows[0].p50 is not None:
            say(f"stage {stage.name}: {rows[0].p50:.2f} ms a {stage.once}")
        yield rows


def _rows_of_stage(stage: Stage, step: Step, config: dict[str, Any], rounds: int) -> list[Row]:
    """A stage's time and its share of the floor's speed; where it fails, its error."""
    floor = Floor.of(stage.moved, stage.operations, step.device, step.model.engine.dtype)
    facts = config | {"once": stage.once, "bytes": stage.moved, "operations": stage.operations}
    facts |= {"floor_ms": floor.seconds * 1000, "floor_by": floor.by}
    common: dict[str, Any] = {"what": "stage", "provider": "gpupipe", "axis": "stage", "value": stage.name}
    common |= {"config": facts, "device": step.device}
    try:
        seconds = seconds_a_frame(stage, len(step.frames), step.device, rounds=rounds)
    except Exception as error:  # the next stage still runs
        return [row(None, metric="time", unit="ms/frame", error=f"{type(error).__name__}: {error}", **common)]
    return [
        row(seconds.map(lambda s: 1000 * s), metric="time", unit="ms/frame", **common),
        row(seconds.map(lambda s: 100 * floor.seconds / s), metric="floor_share", unit="% of floor", **common),
    ]
