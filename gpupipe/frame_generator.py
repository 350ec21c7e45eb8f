"""The batch loop: template frames and speech in, finished frames out, on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gpupipe.avatar import Avatar
from gpupipe.engines.base import BATCH_SIZES
from gpupipe.errors import InputError, whole_number
from gpupipe.fallbacks import note_fallback
from gpupipe.features import SpeechFeatures, video_rate
from gpupipe.image_processor import Image, ImageProcessor
from gpupipe.kernels.nv12 import PixelFormat, from_nv12, to_nv12
from gpupipe.models import AUDIO_SHAPES, Mode
from gpupipe.schedule import WINDOW_ROWS, times_shown
from gpupipe.seam import FEATHER, Blend, feather_width
from gpupipe.shots import Piece, Shot, fill_batches, map_batches, render_batch
from gpupipe.stages import UNTIMED, Stages
from gpupipe.template import Template, template_parts
from gpupipe.transfer import as_array
from gpupipe.unet_model import UNetModel
from gpupipe.video.images import write_frames

logger = logging.getLogger(__name__)

_SAME_RATE = 0.01
"""Rates that differ by less are one: 25 and 24.975."""


class FrameGenerator:
    """Renders frames with a network.

    Args:
        unet_model: the network.
        mode: the kind of speech features; must be the model's.
        blend: ``"feather"`` fades the seam, ``"none"`` pastes hard as the reference does.
        feather: width of the seam in pixels of the frame.
        batch_size: frames rendered at once; None takes the device's default.
        memory_budget: bytes for what is kept per template frame; None lets the device decide.

    Raises:
        InputError: a mode that is not the model's, or an option out of range.
    """

    def __init__(
        self,
        unet_model: UNetModel,
        mode: Mode = "ave",
        *,
        blend: Blend = "feather",
        feather: float = FEATHER,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if mode != unet_model.mode:
            raise InputError(f"mode is {mode!r}; expected the model's, {unet_model.mode!r}")
        check_limits(batch_size, memory_budget)
        self.unet_model = unet_model
        self.mode: Mode = mode
        self.blend: Blend = blend
        self.feather = feather
        self.batch_size = batch_size or BATCH_SIZES[unet_model.device.type]
        self.memory_budget = memory_budget
        feather_width(blend, feather)  # raises now, not at the first frame
        self._processor = ImageProcessor()

    def generate_frame(
        self,
        template_image: Image | Tensor,
        landmarks: ArrayLike | Tensor,
        audio_features: ArrayLike | Tensor,
        parsing_image: Image | Tensor | None = None,
    ) -> Image:
        """Render one frame.

        Args:
            template_image: uint8 (H, W, 3), BGR.
            landmarks: (n, 2) points in pixels, n ≥ 53.
            audio_features: the frame's window: (1, *audio_shape), audio_shape, or its 16 raw rows.
            parsing_image: (H, W, 3), BGR; where it is (0, 0, 255) or (255, 255, 255) the template's pixel stays.

        Returns:
            uint8 (H, W, 3), BGR.

        Raises:
            InputError: a box outside the image, audio that holds NaN or infinite values, or audio that is not one
                window (:func:`gpupipe.audio_windows` makes all windows of a clip).
        """
        crop, box = self._processor.crop_face_region(template_image, landmarks)
        size = (box[2] - box[0], box[3] - box[1])
        image, _ = self._processor.prepare_input_tensors(self._processor.resize_image(crop, (328, 328)))
        mouth = self.unet_model.predict(image, self._window(audio_features))
        return self._processor.process_frame_with_parsing(
            template_image, mouth, box, size, parsing_image, blend=self.blend, feather=self.feather
        )

    def generate_frames_from_template_sequence(
        self,
        img_dir: str | Path,
        lms_dir: str | Path,
        audio_features: str | Path | ArrayLike | Tensor,
        start_frame: int = 0,
        parsing_dir: str | Path | None = None,
        fps: float = 25,
    ) -> list[Image]:
        """Render a clip into memory: one frame for each row of features.

        Args:
            img_dir, lms_dir, parsing_dir: ``0.jpg`` …, ``0.lms`` … and, if given, ``0.png`` ….
            audio_features: (N, …), as :class:`~gpupipe.features.SpeechFeatures` takes it.
            start_frame: first frame of the stretch of the template that is walked to its end and back; the clip begins
                with the one after it (:func:`~gpupipe.schedule.template_indices`).
            fps: accepted for callers of the original, and ignored: there is one frame for each row of features.

        Returns:
            N frames uint8 (H, W, 3), BGR. For long clips use :meth:`stream`, whose memory does not grow.

        Raises:
            InputError: features or a template that cannot be used, or ``start_frame`` outside the template.
        """
        speech = SpeechFeatures(audio_features, self.mode)
        template = self.open_template(img_dir, lms_dir, parsing_dir, clip=(start_frame, len(speech)))
        batches = self.stream(template, speech, start_frame=start_frame)
        return [frame for batch in batches for frame in batch.cpu().numpy()]

    def save_frames(self, frames: Iterable[Image | Tensor], output_dir: str | Path, prefix: str = "frame") -> list[str]:
        """Write frames as ``<prefix>_00000.jpg`` … and return their paths.

        Images of an earlier, longer clip stay in the folder, with a warning.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        return write_frames(frames, output_dir, prefix)

    def open_template(
        self,
        img_dir: str | Path,
        lms_dir: str | Path,
        parsing_dir: str | Path | None = None,
        *,
        clip: tuple[int, int] | None = None,
        stages: Stages = UNTIMED,
    ) -> Template:
        """Open and check a template for this generator's device, precision and memory budget.

        There is a template frame to each row of features. A warning tells of a video at another rate than theirs.

        Args:
            img_dir, lms_dir, parsing_dir, clip, stages: as :class:`~gpupipe.Template` takes them.

        Raises:
            InputError: as :class:`~gpupipe.Template`.
        """
        model = self.unet_model
        template = Template(
            img_dir,
            lms_dir,
            parsing_dir,
            clip=clip,
            device=model.device,
            exact=model.exact,
            memory_budget=self.memory_budget,
            stages=stages,
        )
        shown = video_rate(self.mode, None)
        if template.video_rate is not None and abs(shown / template.video_rate - 1) > _SAME_RATE:
            logger.warning(
                "%s: has %.4g frames a second, of which mode %s shows %g: it moves at %.0f %% of its speed; expected a"
                " video of that rate, with its landmarks",
                *(template.name, template.video_rate, self.mode, shown, 100 * shown / template.video_rate),
            )
        return template

    def open_template_directory(
        self,
        directory: str | Path,
        *,
        use_parsing: bool = False,
        clip: tuple[int, int] | None = None,
        stages: Stages = UNTIMED,
    ) -> Template:
        """:meth:`open_template` of a directory as :meth:`gpupipe.Template.from_directory` takes it."""
        return self.open_template(*template_parts(directory, use_parsing=use_parsing), clip=clip, stages=stages)

    def stream(
        self,
        template: Template | Avatar,
        speech: SpeechFeatures,
        *,
        start_frame: int = 0,
        pixel_format: PixelFormat = "bgr",
        fps: float | Fraction | None = None,
    ) -> Iterator[Tensor]:
        """Render a clip batch by batch.

        Args:
            template: an avatar, whose seam stays its own, keeps what it makes of template frames for its next clip.
            start_frame: first frame of the stretch of the template that is walked to its end and back; the clip begins
                with the one after it (:func:`~gpupipe.schedule.template_indices`).
            pixel_format: of the finished frames.
            fps: frames a second; another rate than the features' own resamples the clip
                (:class:`~gpupipe.schedule.Resampling`). None renders one frame for each row.

        Yields:
            uint8 (b, H, W, 3) BGR or (b, H·3/2, W) NV12 on the device; b is the batch size but for the last, and at a
            higher rate than the features' own at most that. Made in inference mode: outside it, write to a clone.

        Raises:
            InputError: ``start_frame`` outside the template, ``fps`` out of range or another network's avatar, before
                anything is rendered.
        """
        if isinstance(template, Avatar):
            avatar = template
            if avatar.engine is not self.unet_model.engine:
                raise InputError(f"{avatar.template.name}: was opened for another network; expected this one's avatar")
        else:
            # On a CPU a frame shown once is not worth caching; on CUDA the captured graph reads only from the cache, so
            # everything is.
            shown = times_shown(len(speech), template.length, start_frame)
            cacheable = shown >= (2 if template.device.type == "cpu" else 1)
            avatar = self.avatar(template, pixel_format, cacheable=cacheable)
        batches = self._batches(self.shot(avatar, speech, start_frame=start_frame, fps=fps))
        if avatar.pixel_format == pixel_format:
            return batches
        convert = from_nv12 if pixel_format == "bgr" else to_nv12
        return (convert(batch) for batch in batches)  # like the others, it can be closed

    def avatar(
        self, template: Template, pixel_format: PixelFormat = "bgr", *, cacheable: NDArray[np.bool_] | None = None
    ) -> Avatar:
        """A template, prepared for this generator's network and seam; ``cacheable`` as :class:`Avatar` takes it."""
        engine, feather = self.unet_model.engine, feather_width(self.blend, self.feather)
        return Avatar(template, engine, pixel_format=pixel_format, feather=feather, cacheable=cacheable)

    def shot(
        self,
        avatar: Avatar,
        speech: SpeechFeatures,
        *,
        start_frame: int = 0,
        fps: float | Fraction | None = None,
        frames: range | None = None,
    ) -> Shot:
        """A clip, or some of its frames, to be rendered: see :meth:`stream` for the arguments."""
        timing = speech.timing(fps)
        return Shot(avatar, speech, timing, start_frame, range(timing.frames) if frames is None else frames)

    def _batches(self, shot: Shot) -> Iterator[Tensor]:
        device, size = self.unet_model.device, self.batch_size

        def render(pieces: list[Piece]) -> list[tuple[Piece, Tensor]]:
            """A piece and its rows; in halves, from then on, if the GPU has no memory for the whole."""
            nonlocal size
            (piece,) = pieces
            try:
                return [(piece, render_batch(pieces)[0])]
            except torch.OutOfMemoryError:
                if len(piece.rows) == 1:
                    raise
            # Outside the handler, whose error keeps the batch's tensors alive.
            torch.cuda.empty_cache()
            if len(piece.rows) <= size:
                size = len(piece.rows) // 2
                note_fallback(f"{device} is out of memory: batches of {size} from here on")
            return [rendered for half in piece.halves() for rendered in render([half])]

        for rendered in map_batches(render, fill_batches([shot], lambda: size), device):
            for piece, rows in rendered:
                logger.debug("rendered frames %d to %d", piece.frames.start, piece.frames.stop - 1)
                yield from piece.frames_from_rows(rows, self.batch_size)

    def _window(self, audio: ArrayLike | Tensor) -> Tensor:
        """One frame's audio, as (1, *audio_shape)."""
        shape = AUDIO_SHAPES[self.mode]
        given = as_array(audio)
        if given.dtype.kind != "f":
            raise InputError(f"audio_features: dtype is {given.dtype}; expected float32")
        values = np.array(given, dtype=np.float32)
        size = int(np.prod(shape))
        if values.size == size and (values.shape[-3:] == shape or len(values) == WINDOW_ROWS):
            return torch.from_numpy(values).reshape(1, *shape)
        raise InputError(
            f"audio_features: shape is {values.shape}; expected one window, {(1, *shape)}, {shape} or its"
            f" {WINDOW_ROWS} rows ({WINDOW_ROWS}, {size // WINDOW_ROWS});"
            f" gpupipe.audio_windows(features, {self.mode!r}) makes all windows of a clip"
        )


def check_limits(batch_size: int | None, memory_budget: int | None) -> None:
    """Refuse a batch of no frames and a budget below 0 bytes; None stands for the device's default.

    Raises:
        InputError: names the option and what is expected.
    """
    if batch_size is not None and whole_number(batch_size, "batch size", "1 or more") < 1:
        raise InputError(f"batch size is {batch_size}; expected 1 or more")
    if memory_budget is not None and memory_budget < 0:
        raise InputError(f"memory budget is {memory_budget}; expected 0 or more bytes")
