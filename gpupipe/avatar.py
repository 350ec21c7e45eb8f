"""A template prepared for a network: all that depends on the template frame alone is computed once per frame."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.engines import Engine
from gpupipe.errors import first_line
from gpupipe.fallbacks import note_fallback
from gpupipe.frame_cache import FrameCache, Tensors
from gpupipe.graphs import GraphedStep, on_side_stream
from gpupipe.kernels.crop_resize import CROP_SIZE, crop_and_input
from gpupipe.kernels.nv12 import PixelFormat, from_nv12, nv12_window, to_nv12
from gpupipe.kernels.paste_blend import paste_blend
from gpupipe.seam import FEATHER
from gpupipe.stages import UNTIMED
from gpupipe.template import Template
from gpupipe.transfer import to_device

CAPTURE_AFTER = 8
"""Batches launched kernel by kernel before capturing. A capture costs an extra run, a sync and the allocator's cache;
short clips would not earn it back."""

_NOT_FEATURES = frozenset({"crop", "nv12"})
"""Names of what is derived from a template frame without the network."""


class Sources(NamedTuple):
    """What a batch is made from.

    Attributes:
        derived, kept: tensors derived from template frames, and the frames themselves, by name.
        derived_index, kept_index: int64 (B,), each sample's place in them.
    """

    derived: Tensors
    kept: Tensors
    derived_index: Tensor
    kept_index: Tensor


class Avatar:
    """Renders frames of one template with one network.

    Within the template's memory budget it keeps for each template frame: the 328-pixel crop, the features that the
    network's template half makes of it, and for ``"nv12"`` the converted background.

    Args:
        template: on the engine's device.
        pixel_format: of the finished frames.
        feather: width of the seam in pixels; 0 pastes hard.
        cacheable: bool (L,), the template frames for which this may be kept; None allows all.
    """

    def __init__(
        self,
        template: Template,
        engine: Engine,
        *,
        pixel_format: PixelFormat = "bgr",
        feather: float = FEATHER,
        cacheable: NDArray[np.bool_] | None = None,
    ) -> None:
        self.template = template
        self.engine = engine
        self.pixel_format = pixel_format
        self.feather = feather
        self._derived = FrameCache(
            template.length, self._derive, budget=template.memory_left, device=template.device, cacheable=cacheable
        )
        self._graphed: GraphedStep | None = None
        self._painted = 0
        self._capture_below = math.inf

    def look_up(self, frames: NDArray[np.int64]) -> Sources:
        """What a batch of template frames (B,) is made from."""
        derived, derived_index = self._derived.lookup(frames)
        kept, kept_index = self.template.frames.lookup(frames)
        return Sources(derived, kept, derived_index, kept_index)

    @torch.inference_mode()
    def render(self, frames: NDArray[np.int64], audio: Tensor) -> Tensor:
        """Render a batch.

        Args:
            frames: (B,), the template frame of each sample.
            audio: (B, *audio_shape), the window of each sample, on any device.

        Returns:
            uint8 (B, H, W, 3) BGR, or (B, H·3/2, W) NV12.
        """
        device = self.template.device
        sources = self.look_up(frames)
        numbers, audio = to_device(torch.from_numpy(frames), device), to_device(audio, device)
        # A captured graph reads the caches where they lie: they must hold all of the batch's frames.
        cached = self._derived.owns(sources.derived) and self.template.frames.owns(sources.kept)
        if device.type != "cuda" or not cached:
            return self._paint(sources, numbers, audio)
        return self._replay(sources, numbers, audio)

    def _replay(self, sources: Sources, frames: Tensor, audio: Tensor) -> Tensor:
        """:meth:`_paint` as a CUDA graph: captured after a few batches, and again for each larger batch after that."""
        derived, kept, *index = sources
        if self._graphed is None or self._graphed.batch_size < len(frames):
            self._painted += 1
            if self._painted <= CAPTURE_AFTER or len(frames) >= self._capture_below:
                return self._paint(sources, frames, audio)
            avatar = weakref.proxy(self)  # this object keeps the step, which must not keep it in turn

            def step(derived_index: Tensor, kept_index: Tensor, frames: Tensor, audio: Tensor) -> Tensor:
                return avatar._paint(Sources(derived, kept, derived_index, kept_index), frames, audio)

            try:
                self._graphed = GraphedStep(step, *index, frames, audio)
            except RuntimeError as error:
                self._graphed = None
                self._capture_below = len(frames) if isinstance(error, torch.OutOfMemoryError) else 0
                note_fallback(
                    f"the step cannot be captured as a CUDA graph ({first_line(error)}): it is launched kernel by"
                    " kernel"
                )
            if self._graphed is None:  # outside the handler, whose error keeps the capture's tensors alive
                return self._paint(sources, frames, audio)
        with self.template.stages.time("speech half + paste", self.template.device):
            return self._graphed(*index, frames, audio)

    def _paint(self, sources: Sources, frames: Tensor, audio: Tensor) -> Tensor:
        """From the caches to finished frames, without synchronising with the host."""
        stages, device = self.template.stages, self.template.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            stages = UNTIMED  # a graph is timed when it is replayed
        # The speech branch's small maps leave most of a GPU's bandwidth idle: meanwhile the background is copied.
        with on_side_stream(device) as join:
            background = self.background(sources)
        with stages.time("speech half", device):
            mouth = self.engine.decode(sources.derived, sources.derived_index, audio)
        with stages.time("paste", device):
            join(background)
            return self.paste(mouth, background, sources, frames)

    def background(self, sources: Sources) -> Tensor | None:
        """Copies of the template frames as they are kept in NV12, (B, H·3/2, W); None if they are not kept in NV12."""
        derived, kept, derived_index, kept_index = sources
        if "nv12" in kept:
            return kept["nv12"].index_select(0, kept_index)
        return derived["nv12"].index_select(0, derived_index) if "nv12" in derived else None

    def paste(self, mouth: Tensor, background: Tensor | None, sources: Sources, frames: Tensor) -> Tensor:
        """Paste mouths (B, 3, 320, 320) into their frames; ``frames`` are their numbers, on the device.

        ``background`` comes from :meth:`background`, and is overwritten.
        """
        derived, kept, crop_index, kept_index = sources
        boxes = self.template.boxes.index_select(0, frames)
        where = (mouth, derived["crop"], crop_index, kept["frame"], kept_index, boxes)
        how: dict[str, Any] = {
            "nv12": self.pixel_format == "nv12",
            "max_box": self.template.max_box,
            "feather": self.feather,
            "keep": kept.get("keep"),
        }
        if self.pixel_format == "bgr":
            pasted = paste_blend(*where, kept["frame"].index_select(0, kept_index), **how)
            if background is None:
                return pasted
            finished = from_nv12(background)
            xmin, ymin, xmax, ymax = self.template.window
            finished[:, ymin:ymax, xmin:xmax] = pasted
            return finished
        assert background is not None
        if "nv12" not in kept:
            return paste_blend(*where, background, **how)
        luma, chroma = nv12_window(background, self.template.window)
        part = torch.cat([luma, chroma], dim=1)
        pasted = paste_blend(*where, part, **how)
        # A 2×2 cell that a box cuts through was computed as a whole; its luma outside the box must stay the source's.
        luma.copy_(torch.where(_inside(boxes, luma), pasted[:, : luma.shape[1]], luma))
        chroma.copy_(pasted[:, luma.shape[1] :])
        return background

    def _derive(self, frames: NDArray[np.int64]) -> Tensors:
        """Prepare template frames for the network."""
        device = self.template.device
        with self.template.stages.time("template half", device):
            kept, index = self.template.frames.lookup(frames)
            boxes = self.template.boxes.index_select(0, to_device(torch.from_numpy(frames), device))
            dtype = self.engine.dtype
            last = device.type == "cuda" and dtype != torch.float32  # as those engines take it
            crop, image = crop_and_input(kept["frame"], index, boxes, dtype=dtype, channels_last=last)
            derived = self.engine.encode(image)
            derived["crop"] = crop
            if self.pixel_format == "nv12" and "nv12" not in kept:
                derived["nv12"] = to_nv12(_rows(kept["frame"], index))
            return derived


def bytes_per_frame(width: int, height: int, feature_bytes: int) -> int:
    """Bytes that an :class:`Avatar` for NV12 and its template keep per frame: BGR, NV12, the crop and the features.

    Parsing adds a byte per pixel. If the template is a video, less BGR is kept.
    """
    pixels = width * height
    return 3 * pixels + pixels * 3 // 2 + 3 * CROP_SIZE**2 + feature_bytes


@torch.inference_mode()
def render_together(requests: Sequence[tuple[Avatar, NDArray[np.int64], Tensor]]) -> list[Tensor]:
    """:meth:`Avatar.render` for several avatars of one engine, in one run of the network's speech half.

    Each avatar's features are in a bank of their own, so they are gathered first.
    """
    if len(requests) == 1:
        ((avatar, frames, audio),) = requests
        return [avatar.render(frames, audio)]
    engine, device = requests[0][0].engine, requests[0][0].template.device
    found = [avatar.look_up(frames) for avatar, frames, _ in requests]
    features = {
        name: torch.cat([sources.derived[name].index_select(0, sources.derived_index) for sources in found])
        for name in found[0].derived
        if name not in _NOT_FEATURES
    }
    windows = torch.cat([to_device(audio, device) for _, _, audio in requests])
    mouths = engine.decode(features, torch.arange(len(windows), device=device), windows)
    return [
        avatar.paste(mouth, avatar.background(sources), sources, to_device(torch.from_numpy(frames), device))
        for (avatar, frames, _), sources, mouth in zip(
            requests, found, mouths.split([len(frames) for _, frames, _ in requests]), strict=True
        )
    ]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """``values.index_select(0, index)``; on a CPU a single row is not copied."""
    if values.device.type == "cpu" and len(index) == 1:
        return values.narrow(0, int(index), 1)
    return values.index_select(0, index)


def _inside(boxes: Tensor, pixels: Tensor) -> Tensor:
    """Which of the pixels (B, H, W) lie inside their sample's box (B, 4): bool."""
    rows = torch.arange(pixels.shape[1], device=pixels.device)[:, None]
    columns = torch.arange(pixels.shape[2], device=pixels.device)
    xmin, ymin, xmax, ymax = boxes[:, :, None, None].unbind(1)
    return (columns >= xmin) & (columns < xmax) & (rows >= ymin) & (rows < ymax)
