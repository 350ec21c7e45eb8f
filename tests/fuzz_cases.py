"""The cases of `fuzz.py`: a small clip that renders, one of its files spoiled, and the command line that reads it.

Any file may be put in a wrong place (a directory, a pipe, a loop of links, something that may not be read …) or have
its bytes changed without regard for their meaning (`fuzz_bytes.py`); `fuzz_formats.py`, `fuzz_media.py` and
`fuzz_checkpoints.py` change what they mean.
"""

from __future__ import annotations

import contextlib
import encodings.ascii  # noqa: F401 - an unprivileged child may not be able to
import gc
import io
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import onnx
import safetensors.torch
import torch
import typer
from conftest import write_template
from fuzz import RAN_CODE, Plan
from fuzz_bytes import spoil_bytes
from fuzz_checkpoints import spoil_checkpoint
from fuzz_formats import spoil_jobs, spoil_jpeg, spoil_landmarks, spoil_npy, spoil_png
from fuzz_media import spoil_sound, spoil_video

from gpupipe import UNetModel, cli, speech, unet_model
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import Engine
from gpupipe.models import Mode, UNet328
from gpupipe.models.audio_encoder import AudioEncoder, load_audio_encoder

with contextlib.suppress(ImportError):  # llvmlite may be missing
    import gpupipe.kernels.nv12_llvm  # noqa: F401 - an unprivileged child may not be able to

SIZE = (64, 48)
FRAMES = 2
NOBODY = 65534

Rng = random.Random
Clip = dict[str, Path]


class Ground:
    """Valid input files, written once: what every case starts from.

    Attributes:
        clip: paths by the option that takes them.
        samples: files of all kinds, to splice from and to be put under another file's name.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        folder.mkdir(parents=True)
        for path in (folder.parent, folder):
            path.chmod(0o755)  # some cases are run by a user who owns nothing here
        os.environ["GPUPIPE_CACHE"] = str(folder / "cache")
        rng = np.random.default_rng(0)
        self.unet = dict(seeded_network(width=1 / 8).state_dict())
        self.encoder = _encoder_state()
        features, tone = folder / "features.npy", folder / "tone.wav"
        self.rows = folder / "rows.npy"
        for path, count in ((features, 1), (self.rows, 2)):  # one frame is enough where features are not spoiled
            np.save(path, np.abs(rng.standard_normal((count, 512))).astype(np.float32))
        torch.save(self.unet, folder / "unet.pth")
        torch.save(self.encoder, folder / "encoder.pth")
        template = write_template(folder / "template", FRAMES, size=SIZE, box=(16, 12, 24), parsing=True)
        self.sounds = [_write_sound(folder / name, codec) for name, codec in SOUNDS.items()]
        self.clip: Clip = {
            "checkpoint": folder / "unet.pth",
            "encoder": folder / "encoder.pth",
            "features": features,
            "template": template,
            "sound": tone,
        }
        self.moving = folder / "moving"
        shutil.copytree(template / "landmarks", self.moving / "landmarks")
        write_video(self.moving / "template.mp4")
        torch.save(self.unet, folder / "old.pth", _use_new_zipfile_serialization=False)
        safetensors.torch.save_file(self.unet, folder / "unet.safetensors")
        self.checkpoints = [folder / name for name in ("unet.pth", "old.pth", "unet.safetensors")]
        self.samples = [
            *(features, *self.sounds, *self.checkpoints, self.moving / "template.mp4"),
            *(template / name for name in ("full_body_img/0.jpg", "landmarks/0.lms", "parsing/0.png")),
        ]
        _keep_networks(self.clip)
        _warm_up(command_words("frames", self.clip | {"checkpoint": folder / "none"}, folder))
        gc.collect()
        gc.freeze()  # so that children need not copy the pages that they read
        threads = len(list(Path("/proc/self/task").iterdir()))
        assert threads <= 2, f"{threads} threads; expected the one that forks, and the one that ONNX Runtime starts"


def _keep_networks(clip: Clip) -> None:
    """Read the valid checkpoints once, for all cases that spoil something else: that would take most of the time."""
    model = UNetModel(clip["checkpoint"], "ave", "cpu", engine="eager")
    encoder = load_audio_encoder(clip["encoder"])
    with torch.inference_mode():  # once here, so that what PyTorch prepares for their layers is prepared for all
        halves = model.engine.encode(torch.zeros(1, 6, 320, 320))
        model.engine.decode(halves, torch.zeros(1, dtype=torch.int64), torch.zeros(1, *model.network.audio_shape))
        encoder(torch.zeros(7, 1, 80, 16))
    real_load, real_engine, real_encoder = unet_model.load_unet, unet_model.make_engine, speech.load_audio_encoder

    def is_whole(path: str | Path, whole: Path) -> bool:
        return os.fspath(path) == os.fspath(whole)

    def load_unet(path: str | Path, mode: Mode = "ave") -> UNet328:
        return model.network if is_whole(path, clip["checkpoint"]) else real_load(path, mode)

    def make_engine(network: UNet328, **options: Any) -> Engine:
        return model.engine if network is model.network else real_engine(network, **options)

    unet_model.load_unet, unet_model.make_engine = load_unet, make_engine
    speech.load_audio_encoder = lambda path: encoder if is_whole(path, clip["encoder"]) else real_encoder(path)


def _warm_up(words: list[str]) -> None:
    """Run a command that is refused at once, so that what the command line imports and builds late is there."""
    cli.app = typer.main.get_command(cli.app)
    sys.argv = ["gpupipe", *words]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()


SOUNDS = {"tone.wav": "pcm_s16le", "float.wav": "pcm_f32le", "tone.flac": "flac", "tone.mp3": "mp3", "tone.m4a": "aac"}


def _write_sound(path: Path, codec: str) -> Path:
    """0.1 s of a tone at 16 kHz, a little longer than the picture."""
    wave = 0.3 * np.sin(np.arange(1600) / 8, dtype=np.float32)[None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.rate = 16000
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=16000, frame_size=stream.frame_size)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def write_video(path: Path, *, size: tuple[int, int] = SIZE, frames: int = FRAMES, pixels: str = "yuv420p") -> None:
    """A video of smooth pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for number in range(frames):
            slope = np.add.outer(np.arange(size[1]), np.arange(size[0]) * (1 + number))
            picture = np.repeat(slope.astype(np.uint8)[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _encoder_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = dict(AudioEncoder().state_dict())
    for name, value in state.items():
        if value.dim() == 4:
            value.copy_(torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5)
        elif name.endswith("running_var"):
            value.fill_(1)
    return {name: value.clone() for name, value in state.items()}


# ── what a child does ─────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(ground: Ground, folder: Path, kind: str, seed: str) -> Plan:
    """Lay out a case in ``folder``: its inputs in ``in``, its outputs to be in ``out``."""
    rng = Rng(seed)
    for name in ("in", "out"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    return KINDS[kind](ground, folder, rng)


def act(plan: Plan) -> str | None:
    """Run the command; if it succeeds, decode what it wrote and return what is wrong with it."""
    if plan.unprivileged and os.geteuid() == 0:
        os.seteuid(NOBODY)
    sys.argv = ["gpupipe", *plan.words]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    if code == 0 or (code == 1 and plan.words[0] == "farm"):  # which does the other jobs nevertheless
        verdict = check_output(plan.words)
        if verdict is not None:
            return verdict
    return sys.exit(code)


def check_output(words: list[str]) -> str | None:
    """What is wrong with a command's output; None if it is whole."""
    output = Path(words[1 + max(words.index(o) for o in ("--output", "--output-dir") if o in words)])
    try:
        return CHECKS[words[0]](output)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _check_frames(output: Path) -> str | None:
    names = sorted(path.name for path in output.iterdir())
    if not names or names != [f"frame_{i:05d}.jpg" for i in range(len(names))]:
        return f"frames are {names}"
    return None if all(cv2.imread(str(output / name)) is not None for name in names) else "a frame is no image"


def _check_reference(output: Path) -> str | None:
    paths = json.loads((output / "metadata.json").read_text())["reference_frames"]
    return None if paths and all(cv2.imread(path) is not None for path in paths) else "a frame is no image"


def _check_features(output: Path) -> str | None:
    rows = np.load(output, allow_pickle=False)
    whole = rows.dtype == np.float32 and rows.ndim == 2 and rows.shape[1] == 512 and np.isfinite(rows).all()
    return None if whole else f"features are {rows.dtype} {rows.shape}, or not finite"


def _check_farm(output: Path) -> str | None:
    told = {job["output"]: job["status"] for job in map(json.loads, (output / "results.jsonl").open(encoding="utf-8"))}
    for name, status in told.items():
        if os.path.exists(output / name) != (status == "done"):  # noqa: PTH110 - of a name that is too long: no
            return f"{name} is {status}"
        if status == "done":
            with av.open(str(output / name)) as container:
                next(container.decode(video=0))
    return None


def _check_network(output: Path) -> None:
    onnx.checker.check_model(onnx.load(output))


def _check_video(output: Path) -> str | None:
    told = json.loads((output.parent.parent / "stdout").read_text().splitlines()[-1])["frames"]
    with av.open(str(output)) as container:
        found = sum(1 for _ in container.decode(video=0))
    with av.open(str(output)) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0))
    return None if found == told and heard else f"{found} frames of {told} and {heard} samples were decoded"


CHECKS: dict[str, Callable[[Path], str | None]] = {
    "render": _check_video,
    "frames": _check_frames,
    "reference": _check_reference,
    "features": _check_features,
    "export": _check_network,
    "farm": _check_farm,
}


def command_words(command: str, clip: Clip, folder: Path, *more: str) -> list[str]:
    """A whole command line."""
    speech = ("--encoder", clip["encoder"]) if command == "render --encoder" else ("--audio-features", clip["features"])
    net = ["--checkpoint", clip["checkpoint"], "--template", clip["template"], "--engine", "eager", "--device", "cpu"]
    out = folder / "out"
    words = {
        "frames": ["frames", *net, *speech, "--output-dir", out / "frames"],
        "reference": ["reference", *net, *speech, "--output-dir", out / "reference", "--num-sample-frames", "1"],
        "render": ["render", *net, *speech, "--audio", clip["sound"], "--output", out / "clip.mp4", "--json"],
        "features": ["features", clip["sound"], "--encoder", clip["encoder"], "--output", out / "rows.npy", "--bin"],
        "export": ["export", "--checkpoint", clip["checkpoint"], "--output", out / "unet.onnx"],
    }
    return [str(word) for word in (*words[command.split(maxsplit=1)[0]], *more)]


# ── kinds ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

Spoil = Callable[[bytes, Rng], tuple[bytes, str]]


def spoil_file(path: Path, ground: Ground, rng: Rng, meaning: Spoil) -> tuple[str, bool]:
    """Spoil a file: its place, bytes or meaning. Returns how, and whether only an ordinary user would notice."""
    way = rng.random()
    if way < 0.12:
        how = rng.choice(list(PLACES))
        PLACES[how](path)
        return how, how.startswith("forbidden")
    if way < 0.45:
        content, how = spoil_bytes(path.read_bytes(), ground.samples, rng)
    else:
        content, how = meaning(path.read_bytes(), rng)
    path.write_bytes(content)
    return how, False


def in_template(part: str, suffix: str, meaning: Spoil) -> Callable[[Ground, Path, Rng], Plan]:
    """A kind that spoils one numbered file of a template."""

    def kind(ground: Ground, folder: Path, rng: Rng) -> Plan:
        template = folder / "in" / "template"
        shutil.copytree(ground.clip["template"], template)
        path = template / part / f"{rng.randrange(FRAMES)}{suffix}"
        names = [path.name]
        way = rng.random()
        if way < 0.04:
            names, how, unprivileged = _spoil_folder(path.parent, suffix, rng), "folder", True
        else:
            how, unprivileged = spoil_file(path, ground, rng, meaning)
            names += [f"{path.stem}.lms"] if suffix == ".jpg" else []  # a box may be outside of a frame too small
            names += [f"{part}/"] if how == "forbidden folder" else []
        command = rng.choice(["frames", "frames", "render", "reference"])
        more = ["--use-parsing"] if part == "parsing" else []
        if more and command == "reference":
            command = "frames"  # which takes none
        words = command_words(command, ground.clip | {"template": template}, folder, *more)
        return Plan(words, names, how, unprivileged)

    return kind


def _spoil_folder(folder: Path, suffix: str, rng: Rng) -> list[str]:
    """Spoil the folder of numbered files; returns what an error may name."""
    what = rng.choice(["gone", "file", "empty", "forbidden", "more", "names", "digits", "loop"])
    if what in ("gone", "file", "loop"):
        shutil.rmtree(folder)
    if what == "file":
        folder.write_bytes(b"not a folder")
    elif what == "loop":
        folder.symlink_to(folder.name)
    elif what == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif what == "forbidden":
        folder.chmod(0)
    elif what == "more":
        shutil.copy(folder / f"1{suffix}", folder / f"{rng.choice([2, 7, 10**18])}{suffix}")
        return [folder.name, "2."]
    elif what == "names":
        (folder / f"1{suffix}").rename(folder / rng.choice([f"01{suffix}", f"one{suffix}", f"-1{suffix}", "1"]))
        return [folder.name, "1."]
    elif what == "digits":
        shutil.copy(folder / f"1{suffix}", folder / f"{rng.choice(['٢', '²', '２', '1.5', '1e3'])}{suffix}")
        return [folder.name, "2."]
    return [folder.name]


def features(ground: Ground, folder: Path, rng: Rng) -> Plan:
    """A file of speech features."""
    path = folder / "in" / rng.choice(["features.npy", "features.npy", "[b]öd[x].npy", "a b\n.npy", "features"])
    shutil.copy(ground.rows, path)
    how, unprivileged = spoil_file(path, ground, rng, spoil_npy)
    command = rng.choice(["frames", "render", "reference"])
    words = command_words(command, ground.clip | {"features": path}, folder)
    return Plan(words, [" ".join(path.name.split())], how, unprivileged)


def sound(ground: Ground, folder: Path, rng: Rng) -> Plan:
    """A sound file, as a video's track or as the source of features."""
    source = rng.choice(ground.sounds)
    path = folder / "in" / source.name
    shutil.copy(source, path)
    how, unprivileged = spoil_file(path, ground, rng, spoil_sound)
    command = rng.choice(["render", "render", "features", "features", "render --encoder"])
    return Plan(command_words(command, ground.clip | {"sound": path}, folder), [path.name], how, unprivileged)


def checkpoint(ground: Ground, folder: Path, rng: Rng) -> Plan:
    """A checkpoint of the U-Net."""
    path, how, unprivileged = _checkpoint(ground, ground.unet, ground.checkpoints, folder, rng)
    command = "export" if rng.random() < 0.06 else rng.choice(["frames", "frames", "render", "reference"])
    words = command_words(command, ground.clip | {"checkpoint": path}, folder)
    # Weights that are finite and too large make any two ways of adding differ.
    return Plan(words, [path.name], how, unprivileged, allows="ONNX Runtime differs" if command == "export" else "")


def encoder(ground: Ground, folder: Path, rng: Rng) -> Plan:
    """A checkpoint of the audio encoder."""
    path, how, unprivileged = _checkpoint(ground, ground.encoder, [ground.clip["encoder"]], folder, rng)
    command = rng.choice(["features", "features", "render --encoder"])
    return Plan(command_words(command, ground.clip | {"encoder": path}, folder), [path.name], how, unprivileged)


def _checkpoint(
    ground: Ground, state: dict[str, torch.Tensor], sources: list[Path], folder: Path, rng: Rng
) -> tuple[Path, str, bool]:
    if rng.random() < 0.35:
        source = rng.choice(sources)
        path = folder / "in" / source.name
        shutil.copy(source, path)
        return path, *spoil_file(path, ground, rng, lambda content, rng: spoil_bytes(content, ground.samples, rng))
    path, how = spoil_checkpoint(dict(state), folder / "in", rng, folder / RAN_CODE)
    return path, how, False


def video(ground: Ground, folder: Path, rng: Rng) -> Plan:
    """A video in place of a template's images."""
    template = folder / "in" / "moving"
    shutil.copytree(ground.moving, template)
    path = template / "template.mp4"
    names = [path.name]
    if rng.random() < 0.1:
        other = rng.choice(["mkv", "webm", "full_body_img", "frames", "size"])
        if other in ("mkv", "webm"):
            path = path.rename(template / f"template.{other}")
        elif other == "full_body_img":
            (template / other).mkdir()
        else:
            size = (64, 47) if other == "size" else SIZE
            write_video(path, size=size, frames=rng.randrange(1, 5), pixels="yuv444p")
        how, unprivileged = other, False
        names = ["template."]
    else:
        how, unprivileged = spoil_file(path, ground, rng, spoil_video)
        names += ["/moving"] if how in ("forbidden folder", "missing") else []
    command = rng.choice(["frames", "frames", "render", "reference"])
    return Plan(command_words(command, ground.clip | {"template": template}, folder), names, how, unprivileged)


def jobs(ground: Ground, folder: Path, rng: Rng) -> Plan:
    """A farm's file of jobs. A job whose files are bad is parked, and stops no other."""
    path = folder / "in" / "jobs.jsonl"
    clip = ground.clip
    job = {"checkpoint": clip["checkpoint"], "template": clip["template"], "audio_features": clip["features"]}
    whole = [
        {**job, "output": f"{i}.mp4", "audio": clip["sound"], "engine": "eager"} for i in range(rng.choice([1, 2]))
    ]
    path.write_text("".join(json.dumps(one, default=str) + "\n" for one in whole))
    how, unprivileged = spoil_file(path, ground, rng, spoil_jobs)
    words = ["farm", str(path), "--output-dir", str(folder / "out" / "farm"), "--device", "cpu"]
    return Plan(words, [path.name], how, unprivileged, allows="parked after")


KINDS: dict[str, Callable[[Ground, Path, Rng], Plan]] = {
    "landmarks": in_template("landmarks", ".lms", spoil_landmarks),
    "images": in_template("full_body_img", ".jpg", spoil_jpeg),
    "parsing": in_template("parsing", ".png", spoil_png),
    "features": features,
    "sound": sound,
    "checkpoint": checkpoint,
    "encoder": encoder,
    "video": video,
    "jobs": jobs,
}


# ── places ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _socket(path: Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:  # a long path cannot be one
        one.bind(str(path))


PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "socket": lambda path: (path.unlink(), _socket(path)),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "link to /dev/zero": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "link to /dev/null": lambda path: (path.unlink(), path.symlink_to("/dev/null")),
    "link to a directory": lambda path: (path.unlink(), path.symlink_to("..")),
    "forbidden file": lambda path: path.chmod(0),
    "forbidden folder": lambda path: path.parent.chmod(0),
}
