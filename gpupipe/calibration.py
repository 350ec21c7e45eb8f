"""Measuring what a checkpoint's convolutions read on frames of a clip: 8-bit integers need these ranges."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.errors import InputError
from gpupipe.features import SpeechFeatures
from gpupipe.files import check_writable, replacing
from gpupipe.kernels.crop_resize import crop_and_input
from gpupipe.models import Mode, UNet328, load_unet
from gpupipe.models.checkpoint import with_input_channels
from gpupipe.models.codes import measure_inputs
from gpupipe.models.int8 import Int8SpeechHalf, Int8TemplateHalf
from gpupipe.template import Template

logger = logging.getLogger(__name__)

FRAMES = 64
"""Frames whose ranges are taken, unless told otherwise."""

_BATCH = 4
_CHECKED = 8


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` wrote, and how good it is.

    Attributes:
        path: of the new checkpoint.
        frames: how many frames were measured.
        psnr: of mouths in 8-bit integers against float32, in dB (peak 255), on frames that were not measured.
        largest: difference among them, in steps of 255.
    """

    path: Path
    frames: int
    psnr: float
    largest: float


@torch.autocast("cpu", enabled=False)
def calibrate(
    checkpoint_path: str | Path,
    template: str | Path,
    audio_features: str | Path | NDArray[np.float32] | Tensor,
    output_path: str | Path,
    mode: Mode = "ave",
    *,
    frames: int = FRAMES,
) -> Calibration:
    """Write a checkpoint that can be rendered with ``precision="int8"``: the same weights, and ranges in its metadata.

    The ranges are those of ``frames`` mouths, for template frames and windows of speech that are spread evenly over the
    whole template and all of the features. Give it speech with all of its sounds: a mouth that opens wider than ever
    there may be painted wrong. Up to 8 mouths between them are painted in 8-bit integers, simulated, and compared.

    Args:
        audio_features: speech features, as :meth:`gpupipe.FrameGenerationPipeline.generate_video` takes them.
        output_path: a ``.safetensors`` file; it may be ``checkpoint_path`` itself.

    Raises:
        CheckpointError: as :class:`gpupipe.UNetModel`.
        InputError: the template or the features cannot be used, there is one template frame and one row of features, or
            ``frames`` is less than 1.
        OutputError: ``output_path`` cannot be written.
    """
    path = Path(output_path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: has the suffix {path.suffix!r}; expected '.safetensors', which holds metadata")
    if frames < 1:
        raise InputError(f"frames is {frames}; expected at least 1")
    check_writable(path)
    network = load_unet(checkpoint_path, mode)
    speech = SpeechFeatures(audio_features, mode)
    opened = Template.from_directory(template)
    count = min(2 * frames, max(opened.length, len(speech)))
    if count < 2:
        raise InputError(f"{speech.name}: has 1 row, and {template} 1 frame; expected more of either, to check with")
    pairs = np.stack([spread(opened.length, count), spread(len(speech), count)], axis=1)
    measured, others = pairs[::2], pairs[1::2]
    logger.info("%s: measuring the network on %d mouths", path, len(measured))
    parts = np.array_split(measured, -(-len(measured) // _BATCH))
    network.input_channels = measure_inputs(network, (network_inputs(opened, speech, *part.T) for part in parts))
    checked = others[:: -(-len(others) // _CHECKED)]
    psnr, largest = _agreement(network, *network_inputs(opened, speech, *checked.T))
    with replacing(path) as temporary:
        with_input_channels(checkpoint_path, network.input_channels, temporary)
    return Calibration(path, len(measured), psnr, largest)


def network_inputs(
    template: Template, speech: SpeechFeatures, shown: NDArray[np.int64], heard: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """What the network reads for template frames (B,) and windows (B,): image (B, 6, 320, 320), (B, *audio_shape)."""
    kept, index = template.frames.lookup(shown)
    _, image = crop_and_input(kept["frame"], index, template.boxes[torch.from_numpy(shown)])
    return image, torch.cat([speech.windows(i, i + 1) for i in heard.tolist()])


def spread(length: int, count: int) -> NDArray[np.int64]:
    """``count`` of the numbers from 0 to ``length`` - 1, from first to last at equal distances."""
    return np.linspace(0, length - 1, count).round().astype(np.int64)


def compare(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """PSNR in dB over all values, peak 255, and the largest difference."""
    difference = found.double() - exact.double()
    error = float(difference.square().mean())
    return (10 * math.log10(255**2 / error) if error else math.inf), float(difference.abs().max())


@torch.inference_mode()
def _agreement(network: UNet328, image: Tensor, audio: Tensor) -> tuple[float, float]:
    """PSNR and largest difference of mouths in simulated 8-bit integers against float32, in steps of 255."""
    template, speech = Int8TemplateHalf(network).eval(), Int8SpeechHalf(network).eval()
    batches = list(zip(image.split(_BATCH), audio.split(_BATCH), strict=True))
    found = torch.cat([255 * speech(*template(image), audio) for image, audio in batches])
    return compare(found, torch.cat([255 * network(image, audio) for image, audio in batches]))
