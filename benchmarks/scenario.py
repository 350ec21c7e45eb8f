"""What is rendered in a benchmark: a template, a network, features and a sound, cut to the length asked for.

    python -m gpupipe.benchmarks.scenario OUT [--size 1280x720]

writes the bundled avatar at another size to ``OUT``: ``template/``, ``features.npy`` and ``speech.flac``. With it real
shapes are measured where no other template is at hand.
"""

from __future__ import annotations

import argparse
import shutil
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.io import write_jpeg

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.demo import BUNDLE
from gpupipe.errors import InputError
from gpupipe.features import FRAME_RATES, SpeechFeatures, save_features
from gpupipe.landmarks import read_landmarks
from gpupipe.models import MODES, Mode, load_unet
from gpupipe.speech import SpeechEncoder
from gpupipe.template import Template, numbered_files, template_parts
from gpupipe.video.decode import read_image
from gpupipe.video.sound import mono_pieces, open_sound, to_int16


@dataclass(frozen=True)
class Scenario:
    """One template, one network and one sound.

    Attributes:
        name: of the template, as rows have it.
        features: ``.npy``, one row for each frame; a longer clip starts again at the first row, and so does the sound.
        size: width and height of the template's frames, in pixels.
        width: of the network; the published one's is 1.
    """

    name: str
    template: Path
    features: Path
    audio: Path
    checkpoint: Path
    mode: Mode
    size: tuple[int, int]
    width: float

    @property
    def fps(self) -> int:
        """Frames a second."""
        return FRAME_RATES[self.mode]

    def facts(self) -> dict[str, Any]:
        """The entries of a row's ``config`` that describe it."""
        facts = {"template": self.name, "size": list(self.size), "mode": self.mode, "width": self.width}
        return facts | {"fps": self.fps}

    def clip(self, frames: int, folder: Path) -> tuple[Path, Path]:
        """Write ``frames`` rows of features as ``.npy`` and the sound of as many frames as ``.wav`` into ``folder``."""
        features, sound = folder / f"{frames}.npy", folder / f"{frames}.wav"
        np.save(features, np.take(np.load(self.features), range(frames), axis=0, mode="wrap"))
        with open_sound(self.audio) as container:
            rate = container.streams.audio[0].rate
            samples = to_int16(np.concatenate(list(mono_pieces(self.audio, container, rate))))
        with wave.open(str(sound), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.resize(samples, round(frames * rate / self.fps)).tobytes())
        return features, sound


def bundled(folder: Path) -> Scenario:
    """The bundled avatar and its sample; the features are made in ``folder``."""
    encoder = SpeechEncoder(BUNDLE / "encoder.safetensors", "cpu")
    rows = torch.cat(list(encoder.covering_features(BUNDLE / "sample.flac")))
    [features] = save_features(rows, folder / "sample.npy")
    return _scenario(
        "bundled", BUNDLE / "template", features, BUNDLE / "sample.flac", BUNDLE / "unet.safetensors", "ave"
    )


def given(
    template: Path,
    features: Path,
    audio: Path,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    mode: Mode = "ave",
    width: float = 1.0,
) -> Scenario:
    """A template of one's own; without a checkpoint, ``folder`` gets a network of random weights, which is as fast.

    Raises:
        InputError: one of the files cannot be used, or no network has that width. Frames have to be images: the
            reference loop and the stages read no video.
    """
    source, _, _ = template_parts(template)
    if source.name != "full_body_img":
        raise InputError(f"{template}: holds {source.name}; expected full_body_img/, which all that is measured reads")
    SpeechFeatures(features, mode)  # raises now if they cannot be used
    open_sound(audio).close()  # so does this
    if checkpoint is None:
        checkpoint = folder / f"seeded-{mode}-{width:g}.pth"
        try:
            network = seeded_network(mode, width=width)
        except ValueError as error:
            raise InputError(str(error)) from error
        torch.save(network.state_dict(), checkpoint)
    return _scenario(template.resolve().name, template, features, audio, checkpoint, mode)


def chosen(template: Path | None, features: Path | None, audio: Path | None, folder: Path, **how: Any) -> Scenario:
    """A template of one's own, see :func:`given`, or the bundled avatar where no file is named.

    Raises:
        InputError: one or two of the three files are missing.
    """
    if template and features and audio:
        return given(template, features, audio, folder, **how)
    if template or features or audio:
        raise InputError("expected --template, --audio-features and --audio together, or none of them")
    return bundled(folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is rendered, for :func:`from_options`."""
    parser.add_argument("--template", type=Path, help="template directory; the bundled avatar by default")
    parser.add_argument("--audio-features", type=Path, help=".npy, with --template")
    parser.add_argument("--audio", type=Path, help="sound, with --template")
    parser.add_argument("--mode", choices=MODES, default="ave", help="of the features")
    parser.add_argument("--width", type=float, default=1.0, help="of the seeded network, with --template")


def from_options(options: argparse.Namespace, folder: Path) -> Scenario:
    """What the options name; see :func:`chosen`."""
    files = options.template, options.audio_features, options.audio, folder
    return chosen(*files, mode=options.mode, width=options.width)


def _scenario(name: str, template: Path, features: Path, audio: Path, checkpoint: Path, mode: Mode) -> Scenario:
    width = load_unet(checkpoint, mode).width
    opened = Template.from_directory(template, memory_budget=0)
    return Scenario(name, template, features, audio, checkpoint, mode, (opened.width, opened.height), width)


def resized_template(template: Path, folder: Path, size: tuple[int, int], frames: int | None = None) -> Path:
    """Write a template, or its first ``frames`` frames, at another size to ``folder``, with landmarks to match."""
    paths = numbered_files(template / "full_body_img", ".jpg", "template frame")[:frames]
    for name in ("full_body_img", "landmarks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in paths:
        bgr = read_image(path).permute(2, 0, 1)[None].float()
        resized = nn.functional.interpolate(bgr, size[::-1], mode="bilinear", antialias=True)[0]
        write_jpeg(resized.round().to(torch.uint8).flip(0).contiguous(), str(folder / "full_body_img" / path.name), 92)
        scale = np.array([size[0] / bgr.shape[3], size[1] / bgr.shape[2]])
        points = read_landmarks(template / "landmarks" / f"{path.stem}.lms") * scale
        lines = "".join(f"{x:.3f} {y:.3f}\n" for x, y in points)
        (folder / "landmarks" / f"{path.stem}.lms").write_text(lines)
    return folder


def silent_clip(
    folder: Path, *, frames: int, fps: int, row_shape: tuple[int, ...], rate: int = 16000
) -> tuple[Path, Path]:
    """Write ``frames`` rows of zeros as ``.npy`` (a sparse file) and as much silence as ``.wav`` into ``folder``.

    Args:
        row_shape: of the features of one frame.
        rate: samples of the sound a second, mono and 16 bit.
    """
    features, sound = folder / f"silent-{frames}.npy", folder / f"silent-{frames}.wav"
    np.lib.format.open_memmap(features, mode="w+", dtype=np.float32, shape=(frames, *row_shape)).flush()
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        second = bytes(2 * rate)
        for _ in range(frames // fps):
            file.writeframesraw(second)
        file.writeframesraw(second[: 2 * round(rate * (frames % fps) / fps)])
    return features, sound


def main() -> None:
    parser = argparse.ArgumentParser(description="The bundled avatar at another size.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT, even")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    options.out.mkdir(parents=True, exist_ok=True)
    made = bundled(options.out)
    made.features.replace(options.out / "features.npy")
    shutil.copy(made.audio, options.out / "speech.flac")
    resized_template(made.template, options.out / "template", (width, height))


if __name__ == "__main__":
    main()
