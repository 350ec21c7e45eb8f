"""What a number format costs in picture quality: a trained network in fewer bits, compared with itself in float32.

    python -m gpupipe.benchmarks.precision [--frames 24] [--bundle DIR] [--device cuda] [--record]

The bundled avatar's network paints frames of the second half of the bundled sample in float32, and again in each
format. The painted mouths are compared before they are rounded, scaled to 0 … 255: PSNR over all frames, and the
largest difference.

The bundled network has a quarter of the published width. ``--bundle WORK/bundle`` takes one of full width that paints
the same avatar, from

    python -m gpupipe.demo.train --out WORK --width 1 --painter-steps 450 --branch-steps 150 --joined-steps 150

That took 70 minutes on two cores that did other work too. The network whose rows are recorded was on its way to 850
steps of painting when it was stopped after 250 and went on to 450.

On CUDA every engine that is built in seconds runs in its own precisions. On a CPU `llvm` runs in float16 and bfloat16
where it can, and all formats are *simulated*: weights and every layer's output are rounded to the format, and sums are
float32, as on tensor cores with float32 accumulators when each layer writes its output to memory. This says nothing
about speed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.common import Row, Spread, add_record_options, append_rows, device_name, row
from gpupipe.demo import BUNDLE
from gpupipe.engines import EngineName, Precision, make_engine
from gpupipe.engines.choice import LOWER_ON_CPU, find_dtype
from gpupipe.engines.declared import candidates
from gpupipe.errors import GpupipeError, first_line
from gpupipe.features import SpeechFeatures
from gpupipe.kernels.crop_resize import crop_and_input
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.models import UNet328, load_unet
from gpupipe.models.fold import fold_batch_norms
from gpupipe.schedule import template_indices
from gpupipe.speech import SpeechEncoder
from gpupipe.template import Template

FORMATS: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""Simulated formats. The 8-bit float has a single scale for all values, so that fp8 can do better than this."""

Paint = Callable[[Tensor, Tensor], Tensor]
"""Image (B, 6, 320, 320) and audio (B, *audio_shape) → mouth (B, 3, 320, 320) in (0, 1)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24, help="spread evenly over the sample's second half")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="folder of another avatar, from gpupipe.demo.train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_record_options(parser)
    options = parser.parse_args()
    rows = measure(options.frames, torch.device(options.device), options.bundle)
    print(f"{device_name(options.device)}: {options.frames} frames against float32, {options.bundle}")
    for one in rows:
        print(f"{one.provider:10} {one.value:14} {one.metric:18} {one.error or f'{one.p50:.2f} {one.unit}'}")
    if options.record:
        append_rows(rows, options.results)


@torch.inference_mode()
def measure(frames: int, device: torch.device, bundle: Path = BUNDLE) -> list[Row]:
    """Rows ``psnr`` and ``largest_difference`` of each format and provider."""
    network = load_unet(bundle / "unet.safetensors", "ave")
    image, audio = sample(frames, bundle)
    exact = steps(network, image, audio)
    rows = []
    for provider, name, paint in contestants(network, device):
        what: dict[str, Any] = {
            "what": "precision",
            "provider": provider,
            "axis": "format",
            "value": name,
            "device": device,
        }
        config = {"frames": frames, "width": network.width}
        try:
            found = steps(paint, image.to(device), audio.to(device)).cpu()
        except (RuntimeError, GpupipeError) as error:
            rows.append(row(None, metric="psnr", unit="dB", error=first_line(error), config=config, **what))
            continue
        psnr, largest = compare(found, exact)
        rows.append(row(Spread.of([psnr]), metric="psnr", unit="dB", config=config, **what))
        rows.append(row(Spread.of([largest]), metric="largest_difference", unit="steps of 255", config=config, **what))
    return rows


def sample(frames: int, bundle: Path = BUNDLE) -> tuple[Tensor, Tensor]:
    """Images (B, 6, 320, 320) and audio windows (B, *audio_shape) of ``frames`` frames, spread evenly over the second
    half of the sample."""
    encoder = SpeechEncoder(bundle / "encoder.safetensors")
    speech = SpeechFeatures(torch.cat(list(encoder.covering_features(bundle / "sample.flac"))), "ave")
    template, middle = Template.from_directory(bundle / "template"), len(speech) // 2
    heard = np.linspace(0, middle - 1, frames).round().astype(np.int64) + len(speech) - middle
    shown = np.concatenate([template_indices(i, i + 1, template.length) for i in heard.tolist()])
    kept, index = template.frames.lookup(shown)
    _, image = crop_and_input(kept["frame"], index, template.boxes[torch.from_numpy(shown)])
    return image, torch.cat([speech.windows(i, i + 1) for i in heard.tolist()])


def compare(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """PSNR in dB over all values, peak 255, and the largest difference."""
    difference = found.double() - exact.double()
    error = float(difference.square().mean())
    return (10 * math.log10(255**2 / error) if error else math.inf), float(difference.abs().max())


def contestants(network: UNet328, device: torch.device) -> list[tuple[str, str, Paint]]:
    """(provider, format, what paints in it): on CUDA all engines, on a CPU the simulations and what it can run."""
    if device.type == "cpu":
        made: list[tuple[str, str, Paint]] = []
        made += [("simulated", name, simulated(network, dtype)) for name, dtype in FORMATS.items()]
        for name in LOWER_ON_CPU:
            if llvm_obstacle(getattr(torch, name)) is None:
                made.append(("llvm", name, _by_engine(network, device, "llvm", name)))
        return made
    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
    return [
        (engine.name, precision, _by_engine(network, device, engine.name, precision))
        for precision in precisions
        for engine in candidates(device, find_dtype(device, exact=False, precision=precision))
        if not engine.slow_to_build
    ]


def _by_engine(network: UNet328, device: torch.device, name: EngineName, precision: Precision) -> Paint:
    made = cache(lambda: make_engine(network, device=device, engine=name, exact=False, precision=precision))

    def paint(image: Tensor, audio: Tensor) -> Tensor:
        engine = made()
        return engine.decode(engine.encode(image.to(engine.dtype)), torch.arange(len(image), device=device), audio)

    return paint


def simulated(network: UNet328, dtype: torch.dtype) -> UNet328:
    """``network``, batch norms folded, with weights and every layer's output rounded to ``dtype``; sums are float32."""
    rounded = fold_batch_norms(network)
    largest = torch.finfo(dtype).max

    def round_to(value: Tensor) -> Tensor:
        return value.clamp(-largest, largest).to(dtype).float()

    for weight in rounded.parameters():
        weight.copy_(round_to(weight))
    for module in rounded.modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(lambda module, inputs, output: round_to(output))
    return rounded


def steps(paint: Paint, image: Tensor, audio: Tensor) -> Tensor:
    """Painted mouths in steps of 255, a few frames at a time."""
    painted = [paint(*pair) for pair in zip(image.split(4), audio.split(4), strict=True)]
    return torch.cat([one if one.dtype == torch.uint8 else one.float() * 255 for one in painted]).float()


if __name__ == "__main__":
    main()
