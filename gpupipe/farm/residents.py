"""Networks and avatars that stay on the device from clip to clip, within a budget of memory."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from gpupipe.avatar import Avatar, bytes_per_frame
from gpupipe.device import find_device
from gpupipe.engines import EngineName, Precision
from gpupipe.farm.jobs import Job
from gpupipe.frame_generator import FrameGenerator
from gpupipe.kernels.nv12 import PixelFormat
from gpupipe.memory import default_budget
from gpupipe.models import Mode
from gpupipe.models.unet328 import INPUT_SIZE
from gpupipe.seam import Blend
from gpupipe.template import TemplateSize, template_size
from gpupipe.unet_model import UNetModel

logger = logging.getLogger(__name__)


class NetworkKey(NamedTuple):
    """What two jobs must share to be rendered by one network."""

    checkpoint: str
    mode: Mode
    engine: EngineName
    exact: bool
    precision: Precision | None

    @classmethod
    def of(cls, job: Job) -> NetworkKey:
        """The key of a job."""
        return cls(job.checkpoint, job.mode, job.engine, job.exact, job.precision)


class AvatarKey(NamedTuple):
    """What two jobs must share to be rendered by one avatar, but for the format of its frames."""

    network: NetworkKey
    template: str
    use_parsing: bool
    blend: Blend
    feather: float

    @classmethod
    def of(cls, job: Job) -> AvatarKey:
        """The key of a job."""
        return cls(NetworkKey.of(job), job.template, job.use_parsing, job.blend, job.feather)


class Network:
    """A checkpoint, ready, and what it makes of a template frame.

    Attributes:
        model: the network.
        feature_bytes: size of what its template half makes of one frame.
    """

    def __init__(self, key: NetworkKey, device: torch.device) -> None:
        self.model = UNetModel(
            key.checkpoint, key.mode, device, engine=key.engine, exact=key.exact or None, precision=key.precision
        )
        engine = self.model.engine
        with torch.inference_mode():
            features = engine.encode(torch.zeros(1, 6, INPUT_SIZE, INPUT_SIZE, device=device, dtype=engine.dtype))
        self.feature_bytes = sum(value.nbytes for value in features.values())


@dataclass
class _Resident:
    network: Network
    generator: FrameGenerator
    avatar: Avatar
    bytes: int


class Residents:
    """Avatars by what they are made of; the one that is needed again last makes room for a new one.

    A network stays as long as one of its avatars does. An avatar that makes room while it is still at work keeps its
    memory until it is done, and is no longer counted.

    Args:
        device: where they are.
        budget: bytes for all; None lets the device decide (:func:`~gpupipe.memory.default_budget`).

    Attributes:
        upcoming: to be set to what tells the avatars that will be asked for, each once, next first.
    """

    def __init__(self, device: str | torch.device | None, *, budget: int | None = None) -> None:
        self.device = find_device(device)
        self.budget = default_budget(self.device) if budget is None else budget
        self.upcoming: Callable[[], Sequence[AvatarKey]] = tuple
        self._networks: weakref.WeakValueDictionary[NetworkKey, Network] = weakref.WeakValueDictionary()
        self._residents: dict[tuple[AvatarKey, PixelFormat], _Resident] = {}

    def get(self, job: Job, pixel_format: PixelFormat) -> tuple[FrameGenerator, Avatar]:
        """The avatar of a job and the generator that makes its shots.

        Raises:
            InputError: a checkpoint or template that cannot be used.
        """
        key = AvatarKey.of(job)
        resident = self._residents.get((key, pixel_format))
        if resident is None:
            resident = self._residents[key, pixel_format] = self._open(key, pixel_format)
        return resident.generator, resident.avatar

    def size(self, template: str) -> TemplateSize:
        """The size of a template: an avatar's, if one is here, since to measure a video is to read all of it.

        Raises:
            InputError: a template that cannot be read.
        """
        for (key, _), resident in self._residents.items():
            if key.template == template:
                known = resident.avatar.template
                return TemplateSize(known.length, known.width, known.height)
        return template_size(template)

    def __len__(self) -> int:
        return len(self._residents)

    def _open(self, key: AvatarKey, pixel_format: PixelFormat) -> _Resident:
        network = self._networks.get(key.network)
        if network is None:
            network = self._networks[key.network] = Network(key.network, self.device)
        size = self.size(key.template)
        need = size.length * bytes_per_frame(size.width, size.height, network.feature_bytes)
        self._make_room(need)
        room = max(0, self.budget - self.used)
        generator = FrameGenerator(
            network.model, key.network.mode, blend=key.blend, feather=key.feather, memory_budget=room
        )
        template = generator.open_template_directory(key.template, use_parsing=key.use_parsing)
        return _Resident(network, generator, generator.avatar(template, pixel_format), min(need, self.budget))

    def _make_room(self, need: int) -> None:
        """Let go of the avatars that are needed last, until there is room."""
        while self._residents and self.used + need > self.budget:
            soon = {key: number for number, key in enumerate(self.upcoming())}
            # Of those that nobody asks for, the one that came first.
            _, _, victim = max((soon.get(key[0], len(soon)), -age, key) for age, key in enumerate(self._residents))
            logger.debug("%s makes room", Path(victim[0].template).name)
            del self._residents[victim]

    @property
    def used(self) -> int:
        """Bytes reserved for the avatars here."""
        return sum(resident.bytes for resident in self._residents.values())
