"""Renders one clip: files in, a video or images out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpupipe.avatar import Avatar
from gpupipe.engines import EngineName, Precision
from gpupipe.errors import InputError, whole_number
from gpupipe.fallbacks import fallbacks
from gpupipe.features import FeatureSource, SpeechFeatures, save_features_bin
from gpupipe.files import check_not_read, make_folder, replacing
from gpupipe.frame_generator import FrameGenerator
from gpupipe.kernels.dispatch import backend
from gpupipe.kernels.nv12 import PixelFormat, from_nv12
from gpupipe.lanes import available_cores
from gpupipe.models import Mode
from gpupipe.onnx_export import OPSET_VERSION
from gpupipe.schedule import template_indices
from gpupipe.seam import FEATHER, Blend
from gpupipe.stages import UNTIMED, Stages, measuring
from gpupipe.template import Template
from gpupipe.unet_model import UNetModel
from gpupipe.versions import versions
from gpupipe.video.encode import VideoWriter, check_suffix
from gpupipe.video.images import ImageFormat, ImageWriter, save_image, write_frames
from gpupipe.video.sound import compare_lengths, open_sound

Progress = Callable[[int, int], Any]
"""Called after each batch with the frames done and the frames in all."""


@dataclass
class RenderRecord:
    """Facts of the last finished render.

    ``phases`` holds the seconds of consecutive phases: ``open`` (template and features), ``render`` (compute, and
    waiting for the encoder), ``finish`` (the encoder's last frames and the muxer). ``busy`` holds the seconds in which
    each of :data:`gpupipe.stages.STAGES` was at work: stages overlap, so these may add up to more than ``seconds``.
    ``bound`` says in words what bounded the run.
    """

    frames: int
    seconds: float
    phases: dict[str, float]
    busy: dict[str, float]
    bound: str
    device: str
    engine: str
    kernels: str
    codec: str | None

    @property
    def frames_per_second(self) -> float:
        """Frames a second over the whole render."""
        return self.frames / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints: these facts, phases as ``stages``, the rate, ``versions``, ``fallbacks``."""
        facts = dataclasses.asdict(self)
        facts |= {"stages": facts.pop("phases"), "frames_per_second": self.frames_per_second}
        return facts | {"versions": versions(), "fallbacks": fallbacks()}


class _Phases:
    """Seconds of a render's phases; each begins where the one before it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    def end(self, phase: str) -> None:
        """End a phase here."""
        begin, self._begin = self._begin, time.perf_counter()
        self.seconds[phase] = self._begin - begin


class FrameGenerationPipeline:
    """Renders clips with a checkpoint.

    A thread that renders must be waited for before a program's main thread ends: Python then lets pools of threads
    start nothing more, and the render fails.

    Args:
        checkpoint_path, mode, device, engine, exact, precision: as :class:`~gpupipe.unet_model.UNetModel` takes them.
        blend, feather, batch_size, memory_budget: as :class:`~gpupipe.frame_generator.FrameGenerator` takes them.

    Attributes:
        last_render: a :class:`RenderRecord` of the last finished call, or None.

    Raises:
        InputError: a checkpoint, device or option that cannot be used.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        mode: Mode = "ave",
        device: str | torch.device | None = None,
        *,
        engine: EngineName = "auto",
        exact: bool | None = None,
        precision: Precision | None = None,
        blend: Blend = "feather",
        feather: float = FEATHER,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.unet_model = UNetModel(checkpoint_path, mode, device, engine=engine, exact=exact, precision=precision)
        self.mode: Mode = mode
        self.generator = FrameGenerator(
            self.unet_model, mode, blend=blend, feather=feather, batch_size=batch_size, memory_budget=memory_budget
        )
        self.last_render: RenderRecord | None = None

    def open_avatar(
        self, template_dir: str | Path, *, use_parsing: bool = False, pixel_format: PixelFormat | None = None
    ) -> Avatar:
        """Open a template for many clips: what is made of its frames alone is then made once, and not for each clip.

        Give it to :meth:`generate_video` and :meth:`generate_frames_only` in place of ``template_dir``, to one at a
        time. It holds its memory (``memory_budget``) as long as it is referred to, and sees no file that changes.

        Args:
            template_dir: as :meth:`gpupipe.Template.from_directory` takes it.
            use_parsing: for all clips.
            pixel_format: of the frames that it renders; where a method needs the other format, they are converted.
                None takes ``"nv12"``, as video has it, if width and height are even.

        Raises:
            InputError: a template that cannot be used, or ``"nv12"`` for an odd size.
        """
        template = self.generator.open_template_directory(template_dir, use_parsing=use_parsing)
        even = template.width % 2 == template.height % 2 == 0
        if pixel_format == "nv12" and not even:
            raise InputError(
                f"{template.name}: frames are {template.width}×{template.height}; expected pixel format 'bgr', since"
                " 'nv12' needs even sizes"
            )
        return self.generator.avatar(template, pixel_format or ("nv12" if even else "bgr"))

    def generate_video(
        self,
        audio_features_path: FeatureSource,
        template_dir: str | Path | Avatar,
        audio_path: str | Path | None,
        output_path: str | Path,
        start_frame: int = 0,
        fps: float = 25,
        use_parsing: bool = False,
        crf: int = 20,
        save_frames: bool = False,
        frames_dir: str | Path | None = None,
        *,
        codec: str = "auto",
        preset: str | None = None,
        progress: Progress | None = None,
        profile: str | Path | None = None,
    ) -> str:
        """Render a clip to a video with sound, in one pass.

        Args:
            audio_features_path: ``.npy``, or the features themselves.
            template_dir: as :meth:`gpupipe.Template.from_directory` takes it, or from :meth:`open_avatar`.
            audio_path: any file that FFmpeg reads with a sound track; None renders a silent video.
            output_path: ``.mp4``, ``.mkv`` or ``.mov``; appears only when it is whole.
            start_frame: the template is walked from this frame to its end and back; the clip begins with the frame
                after it (:func:`~gpupipe.schedule.template_indices`).
            fps: frames a second of the video. Features come at the mode's rate, 25 rows a second and 20 for wenet; at
                another rate the picture is resampled to keep pace with the sound
                (:class:`~gpupipe.schedule.Resampling`), and the sound stays as it is.
            crf: quality, 0 (best) to 51.
            save_frames: keep the frames as JPEGs too, in ``frames_dir`` or beside the video in ``<name>_frames``.
                Without it ``frames_dir`` is ignored. A warning names images left from an earlier, longer clip.
            codec: see :data:`gpupipe.video.codecs.CODECS`.
            preset: the encoder's preset, such as ``p1`` to ``p7`` for NVENC; None takes ours
                (:class:`~gpupipe.video.encode.VideoWriter`).
            progress: called after each batch.
            profile: where to write a trace of every stage's work, ``.json`` for ``chrome://tracing`` or Perfetto.

        Returns:
            ``output_path``.

        Raises:
            InputError: input that cannot be used; raised before the first frame is rendered where possible.
            OutputError: a file that cannot be written; no part of it is left behind.
        """
        phases = _Phases()
        output_path = Path(output_path)
        check_suffix(output_path)
        if audio_path is not None:
            open_sound(audio_path).close()
        with (
            measuring(profile) as stages,
            self._opened(audio_features_path, template_dir, start_frame, use_parsing, stages) as (face, speech),
        ):
            template = face.template if isinstance(face, Avatar) else face
            check_not_read(output_path, audio_path, audio_features_path, template.name)
            folder = frames_dir or output_path.with_name(f"{output_path.stem}_frames")
            with (
                VideoWriter(
                    output_path,
                    width=template.width,
                    height=template.height,
                    fps=fps,
                    codec=codec,
                    crf=crf,
                    sound=audio_path,
                    segmented=self.unet_model.device.type == "cuda",
                    preset=preset,
                    device=self.unet_model.device,
                    stages=stages,
                ) as writer,
                ImageWriter(folder) if save_frames else contextlib.nullcontext() as images,
            ):
                phases.end("open")
                pixel_format = writer.pixel_format
                if images is not None:
                    pixel_format = "nv12" if template.is_video else "bgr"  # as the template keeps its pixels
                batches = self.generator.stream(
                    face, speech, start_frame=start_frame, pixel_format=pixel_format, fps=fps
                )
                if images is not None:
                    batches = _saving(batches, images)
                for batch in _counting(batches, speech.timing(fps).frames, progress):
                    writer.write(batch)
                phases.end("render")
            phases.end("finish")
            self.last_render = self._record(writer.frames, phases, stages, writer.encoder)
        compare_lengths(output_path, writer.frames / fps, writer.sound_seconds, fps)
        return str(output_path)

    def generate_frames_only(
        self,
        audio_features_path: FeatureSource,
        template_dir: str | Path | Avatar,
        output_dir: str | Path,
        start_frame: int = 0,
        fps: float = 25,
        use_parsing: bool = False,
        *,
        image_format: ImageFormat = "jpeg",
        resample: bool = False,
        progress: Progress | None = None,
    ) -> list[str]:
        """Render a clip to ``frame_00000.jpg`` … in ``output_dir`` and return their paths.

        ``image_format="png"`` writes ``frame_00000.png`` … without loss. A warning names images left in the folder
        from an earlier, longer clip. There is one image for each row of features, whatever ``fps``; with ``resample``
        there are those of :meth:`generate_video`'s video of ``fps`` frames a second. Other arguments are as there.

        Raises:
            InputError: input that cannot be used, or an unknown ``image_format``.
            OutputError: the folder cannot be made or written.
        """
        phases, stages = _Phases(), Stages()
        with self._opened(audio_features_path, template_dir, start_frame, use_parsing, stages) as (face, speech):
            phases.end("open")
            rate = fps if resample else None
            batches = self.generator.stream(face, speech, start_frame=start_frame, fps=rate)
            batches = _counting(batches, speech.timing(rate).frames, progress)
            frames = (frame for batch in batches for frame in batch.cpu().numpy())
            paths = write_frames(frames, output_dir, image_format=image_format)
            phases.end("render")
        self.last_render = self._record(len(paths), phases, stages)
        return paths

    def export_model_to_onnx(self, output_path: str | Path, opset_version: int = OPSET_VERSION) -> str:
        """Write the network as ONNX: see :meth:`gpupipe.UNetModel.export_to_onnx`."""
        return self.unet_model.export_to_onnx(output_path, opset_version)

    def generate_reference_outputs(
        self,
        audio_features_path: FeatureSource,
        template_dir: str | Path,
        output_dir: str | Path,
        num_sample_frames: int = 5,
    ) -> dict[str, Any]:
        """Write sample frames, pasted with a hard edge, for programs in other languages to compare with.

        They are only as precise as the model: on CUDA, give the pipeline ``exact=True``, as the command does.

        ``num_sample_frames`` frames spread evenly over the clip, its first and last included, go to
        ``reference_<i>.png`` (lossless; ``i`` is the frame's number), the features to ``audio_features.bin`` (see
        :func:`~gpupipe.features.save_features_bin`), and the facts to ``metadata.json``.

        Returns:
            the facts: ``num_total_frames``, ``sample_indices``, ``reference_frames`` (paths),
            ``audio_features_shape``, ``mode``, ``frame_size`` ([width, height]).

        Raises:
            InputError: input that cannot be used, or less than one sample frame.
            OutputError: the folder or a file in it cannot be written.
        """
        if whole_number(num_sample_frames, "number of sample frames", "1 or more") < 1:
            raise InputError(f"number of sample frames is {num_sample_frames}; expected 1 or more")
        speech = SpeechFeatures(audio_features_path, self.mode)
        template = self.generator.open_template_directory(template_dir, clip=(0, len(speech)))
        folder = make_folder(output_dir)
        indices = sorted(set(np.linspace(0, len(speech) - 1, num_sample_frames).round().astype(int).tolist()))
        avatar = Avatar(template, self.unet_model.engine, feather=0)
        paths = []
        for i in indices:
            template_frame = template_indices(i, i + 1, template.length)
            frame = avatar.render(template_frame, speech.windows(i, i + 1))[0].cpu().numpy()
            paths.append(str(save_image(frame, folder / f"reference_{i:05d}.png")))
        save_features_bin(speech.rows(0, len(speech)).reshape(speech.shape), folder / "audio_features.bin")
        facts = {
            "num_total_frames": len(speech),
            "sample_indices": indices,
            "reference_frames": paths,
            "audio_features_shape": list(speech.shape),
            "mode": self.mode,
            "frame_size": [template.width, template.height],
        }
        with replacing(folder / "metadata.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")
        return facts

    @contextlib.contextmanager
    def _opened(
        self,
        features_path: FeatureSource,
        face: str | Path | Avatar,
        start_frame: int,
        use_parsing: bool,
        stages: Stages,
    ) -> Iterator[tuple[Template | Avatar, SpeechFeatures]]:
        """Open and check what a clip is made from; inside, ``stages`` measures what it costs."""
        speech = SpeechFeatures(features_path, self.mode)
        if not isinstance(face, Avatar):
            template = self.generator.open_template_directory(
                face, use_parsing=use_parsing, clip=(start_frame, len(speech)), stages=stages
            )
            yield template, speech
            return
        if use_parsing and not face.template.uses_parsing:
            name = face.template.name
            raise InputError(f"{name}: was opened without parsing; expected open_avatar(…, use_parsing=True)")
        face.template.stages = stages
        try:
            yield face, speech
        finally:
            face.template.stages = UNTIMED

    def _record(self, frames: int, phases: _Phases, stages: Stages, codec: str | None = None) -> RenderRecord:
        model = self.unet_model
        return RenderRecord(
            frames=frames,
            seconds=sum(phases.seconds.values()),
            phases=phases.seconds,
            busy=stages.busy(),
            bound=stages.bound(cores=available_cores()),
            device=str(model.device),
            engine=model.engine.name,
            kernels=backend(model.device),
            codec=codec,
        )


def _counting(batches: Iterator[Tensor], total: int, progress: Progress | None) -> Iterator[Tensor]:
    """Pass batches on; report each to ``progress`` when the next one is asked for."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        if progress is not None:
            progress(done, total)


def _saving(batches: Iterator[Tensor], images: ImageWriter) -> Iterator[Tensor]:
    """Pass batches on, writing their frames as images too."""
    for batch in batches:
        for frame in (batch if batch.dim() == 4 else from_nv12(batch)).cpu().numpy():
            images.write(frame)
        yield batch
