"""A picture that shows colours surviving the way into a video file: ``benchmarks/results/colours.png``.

    python -m gpupipe.benchmarks.colours [--frame 40] [--crf 20] [--output benchmarks/results/colours.png]

The bundled avatar is rendered twice: to pictures, and to an .mp4 that FFmpeg decodes again by the file's own tags.

    the template's frame, as it was drawn │ the rendered frame, decoded from the .mp4
    ──────────────────────────────────────┼──────────────────────────────────────────
    decoded − rendered, × 8, grey is none  │ the same, decoded as BT.601: what wrong tags would do

The upper two should differ in the mouth alone. The lower left shows what the encoder lost, in which no colour should
stand out; the lower right is the negative control. Needs PyAV 18 or newer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from numpy.typing import NDArray

from gpupipe import FrameGenerationPipeline, SpeechFeatures, Template
from gpupipe.benchmarks.common import RESULTS
from gpupipe.benchmarks.scenario import bundled
from gpupipe.schedule import template_indices
from gpupipe.video.images import save_image

GAIN = 8
GAP = 4

_CAREFUL = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""Without these flags FFmpeg's conversion is a step too dark, for any file."""


def main() -> None:
    """Render, decode, and lay the four pictures beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frame", type=int, default=40, help="number of the frame that is shown")
    parser.add_argument("--crf", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "colours.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scenario = bundled(Path(name))
        pipeline = FrameGenerationPipeline(scenario.checkpoint, scenario.mode)
        rows = np.load(scenario.features)[: options.frame + 1]
        template = Template.from_directory(scenario.template)
        *_, last = pipeline.generator.stream(template, SpeechFeatures(rows, scenario.mode))
        rendered = last[-1].cpu().numpy()
        video = Path(name) / "clip.mp4"
        pipeline.generate_video(rows, scenario.template, None, video, crf=options.crf)
        decoded, wrong = _decode(video, options.frame)
    [number] = template_indices(options.frame, options.frame + 1, template.length)
    kept, index = template.frames.lookup([number])
    source = kept["frame"][index][0].cpu().numpy()
    print(f"frame {options.frame} of {template.width}×{template.height}, H.264 at CRF {options.crf}")
    for told, picture in (("by its tags", decoded), ("as BT.601", wrong)):
        print(f"decoded {told}: {_psnr(picture, rendered):.1f} dB, mean difference {_means(picture, rendered)}")
    sheet = _beside([[source, decoded], [_difference(decoded, rendered), _difference(wrong, rendered)]])
    print(save_image(sheet, options.output))


def _decode(video: Path, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A frame as BGR, decoded twice: by the file's tags, and as if it were BT.601."""
    with av.open(str(video)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i == number:
                right = frame.reformat(format="bgr24", interpolation=_CAREFUL)
                wrong = frame.reformat(format="bgr24", interpolation=_CAREFUL, src_colorspace=Colorspace.ITU601)
                return right.to_ndarray(), wrong.to_ndarray()
    raise ValueError(f"the video ends before frame {number}")


def _difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.clip(128 + GAIN * (a.astype(int) - b), 0, 255).astype(np.uint8)


def _psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def _means(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> str:
    blue, green, red = (a.astype(float) - b).mean(axis=(0, 1))
    return f"R {red:+.2f} G {green:+.2f} B {blue:+.2f}"


def _beside(rows: list[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Pictures of one size in rows, with white between them."""
    height, width = rows[0][0].shape[:2]
    across, down = len(rows[0]), len(rows)
    sheet = np.full((down * (height + GAP) - GAP, across * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * (height + GAP) :, x * (width + GAP) :][:height, :width] = picture
    return sheet


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
