"""Everything in ``bundle/`` again, from one command: ``python -m gpupipe.demo.train --out DIR``.

    rig ─► template frames ──────────────┐
    espeak-ng ─► sounds ─► mel           ▼
                    └► true mouths ─► painter (stage 2) ─┐
                    └► encoder, audio branch (stage 1) ──┴► joined (stage 3) ─► float16 ─► held-out check ─► bundle

Every stage leaves a checkpoint in ``DIR`` and goes on from it when the command is run again, so that it may be stopped
at any time. With two CPU cores it takes about an hour and a half; on a GPU it has not been tried.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torchvision.io import encode_jpeg

from gpupipe.demo import corpus, drawing, rig
from gpupipe.demo.evaluate import agreement
from gpupipe.demo.fitting import save
from gpupipe.demo.mouth import mouth_track
from gpupipe.demo.pictures import Pictures
from gpupipe.demo.train_encoder import BRANCH_BATCH, Listener, make_sounds, rows_of, train_branch, train_encoder
from gpupipe.demo.train_unet import BATCH, join, train_joined, train_painter
from gpupipe.errors import InputError
from gpupipe.frame_generator import FrameGenerator
from gpupipe.image_processor import ImageProcessor
from gpupipe.models.unet328 import UNet328
from gpupipe.schedule import template_indices
from gpupipe.speech import SpeechEncoder
from gpupipe.unet_model import UNetModel
from gpupipe.video.sound import load_audio

logger = logging.getLogger("gpupipe.demo.train")

JPEG_QUALITY = 92
UTTERANCES = 600
KEPT = 48  # utterances whose features are kept for the stages after the encoder's
WIDTH = 0.25


# ── the avatar's files ───────────────────────────────────────────────────────────────────────────────────────────────


def write_template(folder: Path) -> None:
    """Draw the character's frames at rest and its landmarks into ``full_body_img/`` and ``landmarks/``."""
    for name in ("full_body_img", "landmarks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(rig.FRAMES):
        rgb = torch.from_numpy(drawing.draw_frame(index)[:, :, ::-1].copy()).permute(2, 0, 1)
        jpeg = encode_jpeg(rgb, quality=JPEG_QUALITY)
        (folder / "full_body_img" / f"{index}.jpg").write_bytes(jpeg.numpy().tobytes())
        lines = "".join(f"{x:.2f} {y:.2f}\n" for x, y in rig.landmarks(index))
        (folder / "landmarks" / f"{index}.lms").write_text(lines)


def read_template(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (96, 432, 768, 3), BGR, as decoded from the JPEGs, and landmarks float32 (96, 110, 2)."""
    processor = ImageProcessor()
    frames = [processor.load_image(folder / "full_body_img" / f"{i}.jpg") for i in range(rig.FRAMES)]
    points = [np.loadtxt(folder / "landmarks" / f"{i}.lms", dtype=np.float32) for i in range(rig.FRAMES)]
    return np.stack(frames), np.stack(points)


def write_sample(path: Path) -> None:
    """Have the held-out voice say the held-out text, as FLAC."""
    spoken = path.with_suffix(".wav")
    corpus.speak(corpus.HELD_OUT_TEXT, corpus.HELD_OUT_VOICE, spoken, words_per_minute=150)
    with av.open(str(spoken)) as source, av.open(str(path), "w") as target:
        track = source.streams.audio[0]
        out = target.add_stream("flac", rate=track.rate, layout="mono", format="s16")
        out.time_base = Fraction(1, track.rate)
        for frame in source.decode(track):
            target.mux(out.encode(frame))
        target.mux(out.encode(None))
    spoken.unlink()


def parameters(network: torch.nn.Module) -> int:
    """How many numbers were learned."""
    return sum(p.numel() for p in network.parameters())


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """A state dict as safetensors in half precision (counters as they are)."""
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous().clone()
        for name, value in state.items()
    }
    safetensors.torch.save_file(half, path, metadata={"format": "pt"})


# ── the held-out check ───────────────────────────────────────────────────────────────────────────────────────────────


def render_sample(bundle: Path, count: int) -> tuple[list[np.ndarray], list[int]]:
    """The first ``count`` frames of the bundled sample, with a hard seam, and the template frames they were made from.

    Returns:
        frames uint8 (432, 768, 3), BGR, fewer than ``count`` if the sample is shorter; their template frames.
    """
    features = SpeechEncoder(bundle / "encoder.safetensors", "cpu").features(bundle / "sample.flac")
    generator = FrameGenerator(UNetModel(bundle / "unet.safetensors", "ave", "cpu"), blend="none")
    template = bundle / "template"
    frames = generator.generate_frames_from_template_sequence(
        template / "full_body_img", template / "landmarks", features[: count + 8]
    )[:count]  # the last window hears up to 8 rows more
    return frames, template_indices(0, len(frames), rig.FRAMES).tolist()


def held_out_check(bundle: Path) -> dict[str, Any]:
    """Render the bundled sample, which trained nothing, and compare: as it is, and with the truth shifted 5 frames."""
    rendered, indices = render_sample(bundle, 125)
    template, _ = read_template(bundle / "template")
    mouths = mouth_track(load_audio(bundle / "sample.flac"), frames=len(rendered) + 5)
    return {
        "sound": f"sample.flac: voice {corpus.HELD_OUT_VOICE}, not used in training",
        "result": agreement(rendered, template, indices, mouths[: len(rendered)]).as_dict(),
        "truth_shifted_by_5_frames": agreement(rendered, template, indices, mouths[5:]).as_dict(),
    }


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(
    out: Path,
    *,
    encoder_steps: int,
    painter_steps: int,
    branch_steps: int,
    joined_steps: int,
    utterances: int = UTTERANCES,
    width: float = WIDTH,
    device: torch.device,
) -> Path:
    """Run, or go on with, every stage; leaves ``DIR/bundle`` and returns it. Painter and joined network may go on to
    more steps; what they are made from is finished.

    Raises:
        InputError: ``out`` was begun with other sounds, another width, or other steps of encoder or branch.
    """
    out.mkdir(parents=True, exist_ok=True)
    made_from = {"utterances": utterances, "width": width, "encoder_steps": encoder_steps, "branch_steps": branch_steps}
    begun = out / "begun.json"
    if begun.is_file() and (met := json.loads(begun.read_text())) != made_from:
        raise InputError(f"{out}: was begun with {met}; expected {made_from}, or another folder")
    begun.write_text(json.dumps(made_from))
    bundle = out / "bundle"
    template = bundle / "template"
    if not (template / "landmarks" / f"{rig.FRAMES - 1}.lms").is_file():
        write_template(template)
    pictures = Pictures(*read_template(template), device=device)
    sounds = make_sounds(out / "sounds.npz", utterances, seed=1)
    held_out = make_sounds(out / "sounds-held-out.npz", 24, seed=2)
    heard = train_encoder(out, sounds, held_out, steps=encoder_steps, width=width, device=device)
    network, pairs, drawn = train_painter(out, pictures, sounds.mouth, width=width, steps=painter_steps)
    listener = Listener(width)
    listener.load_state_dict(heard["listener"])
    listener = listener.to(device).eval()
    kept = out / "rows.pt"
    if not kept.is_file():
        chosen = np.random.default_rng(7).permutation(utterances)[:KEPT]
        rows = {
            "known": rows_of(listener.encoder, sounds, chosen),
            "unknown": rows_of(listener.encoder, held_out, np.arange(10)),
        }
        save(rows, kept)
    known, unknown = torch.load(kept, weights_only=True).values()
    read = train_branch(out, listener, known, unknown, steps=branch_steps)
    pairs = join(network, pairs, listener)
    state, together = train_joined(out, network, pairs, pictures, known, unknown, steps=joined_steps)
    save_half(state, bundle / "unet.safetensors")
    save_half(listener.encoder.state_dict(), bundle / "encoder.safetensors")
    if not (bundle / "sample.flac").is_file():
        write_sample(bundle / "sample.flac")
    record = {
        "network": {
            "unet": f"mode ave, width {width}, {parameters(UNet328('ave', width=width))} parameters",
            "encoder": f"AVE, {parameters(listener.encoder)} parameters",
            "stored_as": "float16 safetensors",
        },
        "data": {
            "pictures": f"{rig.FRAMES} template frames, with the mouth of a random moment of the sounds",
            "sounds": f"{utterances} utterances, {sounds.hours:.2f} h: espeak-ng in {len(corpus.LANGUAGES)} languages, "
            f"{len(corpus.VARIANTS)} voices each; one in ten babble of filtered harmonics; gain, tilt, echo, noise",
        },
        "encoder": heard["record"],
        "branch": {"steps": read["step"], "batch": BRANCH_BATCH, "loss": "smooth L1", "history": read["history"]},
        "painter": {"steps": drawn["step"], "batch": BATCH, "loss": "L1, mouth × 4", "history": drawn["history"]},
        "joined": {"steps": together["step"], "batch": BATCH, "loss": "L1, mouth × 4", "history": together["history"]},
        "held_out": held_out_check(bundle),
    }
    (bundle / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    notice = Path(__file__).parent / "bundle" / "README.md"
    if notice.is_file() and notice.parent.resolve() != bundle.resolve():
        shutil.copy(notice, bundle / "README.md")
    logger.info("held out: %s", json.dumps(record["held_out"]))
    return bundle


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m gpupipe.demo.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="work folder; the result is its folder bundle/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--encoder-steps", type=int, default=320)
    parser.add_argument("--painter-steps", type=int, default=850)
    parser.add_argument("--branch-steps", type=int, default=300)
    parser.add_argument("--joined-steps", type=int, default=540)
    parser.add_argument("--utterances", type=int, default=UTTERANCES, help="sounds to train on, about 10 s each")
    parser.add_argument("--width", type=float, default=WIDTH, help="of the network; 1 is as published")
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's choice")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    bundle = train(
        options.out,
        encoder_steps=options.encoder_steps,
        painter_steps=options.painter_steps,
        branch_steps=options.branch_steps,
        joined_steps=options.joined_steps,
        utterances=options.utterances,
        width=options.width,
        device=torch.device(options.device),
    )
    logger.info("done: %s", bundle)


if __name__ == "__main__":
    main()
