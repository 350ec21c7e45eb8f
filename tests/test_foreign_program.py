"""A program without PyTorch or gpupipe makes the same frames from the exported files alone, as one in another language
would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from parity import EXACT_FRAME, check_frame

from gpupipe import FrameGenerationPipeline
from gpupipe.benchmarks import reference_loop as reference
from gpupipe.models import Mode

PROGRAM = """
import json, pathlib, sys

import cv2
import numpy as np
import onnxruntime

exported, template, output = map(pathlib.Path, sys.argv[1:4])
variant = sys.argv[4:]

metadata = json.loads((exported / "metadata.json").read_text())
layout = json.loads((exported / "audio_features.bin.json").read_text())
shape = {"ave": (32, 16, 16), "hubert": (32, 32, 32), "wenet": (256, 16, 32)}[metadata["mode"]]
rows = np.fromfile(exported / "audio_features.bin", dtype="<f4").reshape(layout["num_frames"], layout["feature_size"])
assert rows.shape[0] == metadata["num_total_frames"] and list(layout["shape"]) == metadata["audio_features_shape"]
padded = np.concatenate([np.zeros((8, rows.shape[1]), np.float32), rows, np.zeros((8, rows.shape[1]), np.float32)])
session = onnxruntime.InferenceSession(str(exported / "unet.onnx"), providers=["CPUExecutionProvider"])
length = len(list((template / "full_body_img").glob("*.jpg")))

for i in metadata["sample_indices"]:
    step = (i + ("late" not in variant)) % max(1, 2 * (length - 1))
    index = step if step < length else 2 * (length - 1) - step
    frame = cv2.imread(str(template / "full_body_img" / f"{index}.jpg"))
    assert [frame.shape[1], frame.shape[0]] == metadata["frame_size"]
    points = np.loadtxt(template / "landmarks" / f"{index}.lms", dtype=np.float32).astype(np.int32)
    xmin, ymin, side = points[1, 0], points[52, 1], points[31, 0] - points[1, 0]
    box = np.s_[max(ymin, 0) : ymin + side, max(xmin, 0) : xmin + side]
    crop = frame[box]
    canvas = cv2.resize(crop, (328, 328), interpolation=cv2.INTER_CUBIC)
    inner = canvas[4:324, 4:324]
    masked = inner.copy()
    masked[5:310, 5:315] = 0
    image = np.concatenate([inner, masked], axis=2).transpose(2, 0, 1)[None].astype(np.float32) / 255
    window = padded[i : i + 16].reshape(1, *shape)
    if "deaf" in variant:
        window = np.zeros_like(window)
    (mouth,) = session.run(["output"], {"image": image, "audio": window})
    canvas[4:324, 4:324] = (mouth[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    frame[box] = cv2.resize(canvas, crop.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(output / f"reference_{i:05d}.png"), frame)

assert not {"torch", "gpupipe"} & set(sys.modules)
"""


def run_program(exported: Path, template: Path, output: Path, *variant: str) -> None:
    output.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(exported), str(template), str(output), *variant]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=output)
    assert finished.returncode == 0, finished.stderr


def check_program(
    checkpoint: Path, mode: Mode, features: Path, template: Path, folder: Path, *, wrong: tuple[str, ...] = ()
) -> None:
    """Export, run the program, and compare every frame; ``wrong`` variants of it must fail the same comparison."""
    pipeline = FrameGenerationPipeline(checkpoint, mode, "cpu", engine="torch")
    exported = folder / "exported"
    facts = pipeline.generate_reference_outputs(features, template, exported, 3)
    pipeline.export_model_to_onnx(exported / "unet.onnx")
    length = len(list((template / "full_body_img").glob("*.jpg")))
    walk = reference.ping_pong(length)
    order = [next(walk) for _ in range(facts["num_total_frames"])]

    run_program(exported, template, folder / "output")
    for i, path in zip(facts["sample_indices"], facts["reference_frames"], strict=True):
        points = reference.read_landmarks(template / "landmarks" / f"{order[i]}.lms")
        expected = cv2.imread(path)
        box = reference.box_from_landmarks(points, *expected.shape[:2])
        check_frame(cv2.imread(str(folder / "output" / Path(path).name)), expected, box, what=f"frame {i}")
        assert not np.array_equal(expected, cv2.imread(str(template / "full_body_img" / f"{order[i]}.jpg")))

    for variant in wrong:
        run_program(exported, template, folder / variant, variant)
        found = [cv2.imread(str(folder / variant / Path(path).name)) for path in facts["reference_frames"]]
        inside = np.s_[box[1] : box[3], box[0] : box[2]]
        assert not EXACT_FRAME.holds(found[-1][inside], expected[inside]), variant


@pytest.mark.parametrize(("mode", "row"), [("ave", (512,)), ("hubert", (2, 1024)), ("wenet", (16, 512))])
def test_synthetic_template(
    mode: Mode,
    row: tuple[int, ...],
    tiny_checkpoint: Callable[..., Path],
    make_template: Callable[..., Path],
    tmp_path: Path,
) -> None:
    template = make_template(
        tmp_path / "template", frames=4, box=[(40, 30, 61), (30, 10, 97), (-20, 20, 90), (60, 60, 90)]
    )
    features = np.abs(np.random.default_rng(0).standard_normal((12, *row))).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    wrong = ("late", "deaf")
    check_program(tiny_checkpoint(mode), mode, tmp_path / "features.npy", template, tmp_path, wrong=wrong)


def test_real_template_at_full_width(golden_checkpoint: Callable[..., Path], speaker: Path, tmp_path: Path) -> None:
    check_program(golden_checkpoint(), "ave", speaker / "features_ave.npy", speaker, tmp_path)
