"""One avatar's template: its frames, where the mouth is in each, and which pixels must not be painted over."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.device import find_device
from gpupipe.errors import InputError
from gpupipe.files import input_folder, similar
from gpupipe.frame_cache import FrameCache, Tensors
from gpupipe.kernels.nv12 import from_nv12, nv12_window
from gpupipe.landmarks import Box, crop_box, read_landmarks
from gpupipe.memory import default_budget
from gpupipe.schedule import times_shown
from gpupipe.seam import keep_mask
from gpupipe.stages import UNTIMED, Stages
from gpupipe.video.decode import image_size, image_sizes, read_images
from gpupipe.video.frames import VIDEO_SUFFIXES, VideoFrames

logger = logging.getLogger(__name__)

_LOAD_BATCH = 16


class Template:
    """Template frames on a device, every file checked before the first frame is rendered.

    ``image_dir`` holds ``0.jpg``, ``1.jpg`` … without gaps, ``landmark_dir`` a ``.lms`` and ``parsing_dir`` (if given)
    a ``.png`` of the same number for each. ``image_dir`` may also be a video file with as many frames as there are
    landmark files. Images are kept as uint8 BGR. Of a video the decoded NV12 is kept, and BGR only where the boxes are.
    Frames that do not fit in the budget are decoded again each time they are needed.

    Args:
        clip: (start frame, number of frames) of the only clip to be rendered. Frames it does not show are checked
            (present, whole, right size) but decoded only if asked for. None decodes every frame.
        device: where frames, boxes and masks are kept.
        exact: decode JPEGs on the CPU even for a CUDA device.
        memory_budget: bytes for all that is kept per template frame; None lets the device decide
            (:func:`~gpupipe.memory.default_budget`).
        stages: measures where the time of this template's clip goes; set it anew for each further clip.

    Attributes:
        length: number of frames L.
        width, height: of every frame, in pixels.
        frames: cache of ``frame``, uint8 (h, w, 3) BGR, the pixels in ``window``; with parsing, ``keep``, bool (h, w);
            of a video, ``nv12``, uint8 (H·3/2, W).
        window: half-open (xmin, ymin, xmax, ymax): the whole image; for a video, the even rectangle around all boxes.
        boxes: int64 (L, 4) on ``device``: half-open (xmin, ymin, xmax, ymax) in the window, clamped to the frame.
        max_box: the greatest width and the greatest height of any box, known without asking the device.
        memory_left: bytes of the budget that the frames leave for what is derived from them.

    Raises:
        InputError: anything missing, unreadable or inconsistent; the message names the file.
        DeviceError: an unknown device, or one that is missing.
    """

    def __init__(
        self,
        image_dir: str | Path,
        landmark_dir: str | Path,
        parsing_dir: str | Path | None = None,
        *,
        clip: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        exact: bool = True,
        memory_budget: int | None = None,
        stages: Stages = UNTIMED,
    ) -> None:
        self.device = find_device(device)
        self.stages = stages
        self.name = str(image_dir)
        self._exact = exact
        self._images: list[Path] = []
        self._video: VideoFrames | None = None
        if Path(image_dir).suffix.lower() in VIDEO_SUFFIXES:
            self._video = VideoFrames(image_dir, device=self.device)
            self.length, self.width, self.height = self._video.length, self._video.width, self._video.height
            if not self._video.names_colours:
                taken = self._video.colours.matrix
                logger.warning("%s: does not name its colour matrix; taken as %s for its size", image_dir, taken)
            count = len(numbered_files(Path(landmark_dir), ".lms", "landmark file"))
            if count != self.length:
                raise InputError(
                    f"{image_dir}: has {self.length} frames; expected {count}, one for each landmark file in"
                    f" {landmark_dir}"
                )
        else:
            self._images = numbered_files(Path(image_dir), ".jpg", "template frame")
            self.length = len(self._images)
            self.height, self.width = image_size(self._images[0])
        self._parsing: list[Path] = []
        if parsing_dir is not None:
            self._parsing = [Path(parsing_dir) / f"{i}.png" for i in range(self.length)]
        landmarks = [Path(landmark_dir) / f"{i}.lms" for i in range(self.length)]
        beyond = Path(landmark_dir) / f"{self.length}.lms"
        if os.path.lexists(beyond):  # the last images are lost, or it is from another template
            logger.warning("%s: has no frame; %s ends with frame %d", beyond, self.name, self.length - 1)
        boxes = [crop_box(read_landmarks(path), self.width, self.height, name=str(path)) for path in landmarks]
        self.boxes = torch.tensor(boxes, dtype=torch.int64, device=self.device)
        self.window = (0, 0, self.width, self.height)
        if self._video is not None:
            self.window = _even_window(boxes)
            self.boxes -= torch.tensor(self.window[:2] * 2, device=self.device)
        self.max_box = (max(x1 - x0 for x0, _, x1, _ in boxes), max(y1 - y0 for _, y0, _, y1 in boxes))
        budget = default_budget(self.device) if memory_budget is None else memory_budget
        shown = np.ones(self.length, dtype=np.bool_)
        if clip is not None:
            start_frame, count = clip
            shown = times_shown(count, self.length, start_frame) > 0
        for files in filter(None, (self._images, self._parsing)):
            self._check_files(np.flatnonzero(~shown), files)
        self.frames = FrameCache(self.length, self._decode, budget=budget, device=self.device, cacheable=shown)
        wanted = np.flatnonzero(shown)
        for start in range(0, len(wanted), _LOAD_BATCH):  # decoding checks them
            self.frames.lookup(wanted[start : start + _LOAD_BATCH])
        self.memory_left = budget - self.frames.bytes_used
        logger.debug(
            "%s: %d frames of %d×%d, %d kept", self.name, self.length, self.width, self.height, self.frames.capacity
        )

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        *,
        use_parsing: bool = False,
        clip: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        exact: bool = True,
        memory_budget: int | None = None,
        stages: Stages = UNTIMED,
    ) -> Template:
        """Open a template directory: ``full_body_img/``, ``landmarks/`` and, if ``use_parsing``, ``parsing/``.

        A video ``template.mp4`` (``.mov``, ``.mkv``, ``.webm``) may stand in place of ``full_body_img/``.
        """
        return cls(
            *template_parts(directory, use_parsing=use_parsing),
            clip=clip,
            device=device,
            exact=exact,
            memory_budget=memory_budget,
            stages=stages,
        )

    @property
    def is_video(self) -> bool:
        """Whether the frames come from a video file and are kept as NV12."""
        return self._video is not None

    @property
    def video_rate(self) -> float | None:
        """Frames a second of its video, on average; None of images, or of a single frame."""
        return None if self._video is None else self._video.rate

    @property
    def uses_parsing(self) -> bool:
        """Whether its images of the parsing say where the template's pixels stay."""
        return bool(self._parsing)

    def _decode(self, frames: NDArray[np.int64]) -> Tensors:
        """Decode frames, and their masks if there are any."""
        with self.stages.time("template decode"):
            if self._video is not None:
                nv12 = self._video.read(frames)
                tensors = {"nv12": nv12, "frame": from_nv12(torch.cat(nv12_window(nv12, self.window), dim=1))}
            else:
                tensors = {"frame": self._read_images(self._images, frames, exact=self._exact)}
            if self._parsing:
                parsing = self._read_images(self._parsing, frames)
                xmin, ymin, xmax, ymax = self.window
                tensors["keep"] = keep_mask(parsing[:, ymin:ymax, xmin:xmax])
            return tensors

    def _read_images(self, files: list[Path], frames: NDArray[np.int64], *, exact: bool = True) -> Tensor:
        paths = [files[i] for i in frames]
        try:
            pixels = read_images(paths, device=self.device, exact=exact)
        except InputError:
            self._check_files(frames, files)  # the one of another size may be the first, with which it compares
            raise
        self._check_size(paths[0], *pixels.shape[1:3])
        return pixels

    def _check_files(self, frames: NDArray[np.int64], files: list[Path]) -> None:
        """Check the files of frames without decoding them."""
        paths = [files[i] for i in frames]
        for path, size in zip(paths, image_sizes(paths), strict=True):
            self._check_size(path, *size)

    def _check_size(self, path: Path, height: int, width: int) -> None:
        if (height, width) != (self.height, self.width):
            raise InputError(
                f"{path}: is {width}×{height}; expected {self.width}×{self.height} as"
                f" {self._images[0] if self._images else self.name}"
            )


def template_parts(directory: str | Path, *, use_parsing: bool = False) -> tuple[Path, Path, Path | None]:
    """Return where a template directory holds its frames (images or a video), its landmarks and, if used, its masks.

    Raises:
        InputError: no such directory, or one that holds neither images nor a video, both, or several videos.
    """
    directory = input_folder(directory, "template directory")
    found = [path for path in _sources(directory) if os.path.lexists(path)]  # reports a broken link as such
    if len(found) != 1:
        names = " and ".join(path.name for path in found)
        expected = "one of them" if found else f"full_body_img or one of template{', template'.join(VIDEO_SUFFIXES)}"
        raise InputError(f"{directory}: holds {names or 'no frames'}; expected {expected}")
    return found[0], directory / "landmarks", directory / "parsing" if use_parsing else None


def template_files(directory: str | Path, *, use_parsing: bool) -> list[Path]:
    """Return the files that a template is made of, usable or not, always in the same order."""
    directory = Path(directory)
    places = [*_sources(directory), directory / "landmarks", *([directory / "parsing"] if use_parsing else [])]
    inside = [path for place in places for path in sorted(place.glob("*"))]
    return inside + [place for place in places if place.exists() and not place.is_dir()]


def _sources(directory: Path) -> list[Path]:
    """Return where the frames of a template directory may be: a folder of images, or a video."""
    videos = (path for path in directory.glob("template.*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return [directory / "full_body_img", *sorted(videos)]


class TemplateSize(NamedTuple):
    """Number of frames, and their size in pixels."""

    length: int
    width: int
    height: int


def template_size(directory: str | Path) -> TemplateSize:
    """Return how large a template is, from its landmark files and its first frame: nothing else is read.

    Raises:
        InputError: one of them is missing or unreadable.
    """
    source, landmarks, _ = template_parts(directory)
    if source.suffix.lower() in VIDEO_SUFFIXES:
        video = VideoFrames(source)
        video.close()
        width, height = video.width, video.height
    else:
        height, width = image_size(source / "0.jpg")
    return TemplateSize(len(numbered_files(landmarks, ".lms", "landmark file")), width, height)


def _even_window(boxes: list[Box]) -> Box:
    """Return the smallest rectangle of whole 2×2 blocks of pixels around all boxes."""
    xmin, ymin, xmax, ymax = zip(*boxes, strict=True)
    return min(xmin) // 2 * 2, min(ymin) // 2 * 2, (max(xmax) + 1) // 2 * 2, (max(ymax) + 1) // 2 * 2


def numbered_files(directory: Path, suffix: str, what: str) -> list[Path]:
    """List ``0<suffix>``, ``1<suffix>`` … of a directory.

    Raises:
        InputError: no such directory, no such file in it, or a gap in the numbers.
    """
    input_folder(directory, f"directory of {what}s")
    stems = (path.stem for path in directory.glob(f"*{suffix}"))
    numbers = {int(stem) for stem in stems if stem.isdecimal() and stem == str(int(stem))}  # 007 is not 7
    if not numbers:
        there = "".join(f"; there is {first.name}" for first in sorted(directory.glob("[!.]*"))[:1])
        raise InputError(f"{directory}: holds no {what}; expected 0{suffix}, 1{suffix}, …{there}")
    last = max(numbers)
    for number in range(last):
        if number not in numbers:
            path = directory / f"{number}{suffix}"
            raise InputError(f"{path}: no such {what}; expected 0 to {last} without gaps{similar(path)}")
    return [directory / f"{number}{suffix}" for number in range(len(numbers))]
