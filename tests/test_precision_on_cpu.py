"""Less than float32 on CPUs: near the network, and unaffected by what runs beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import network_inputs
from torch import Tensor

from gpupipe import FrameGenerator, UNetModel
from gpupipe.benchmarks.precision import compare, sample, steps
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.demo import BUNDLE
from gpupipe.engines import Engine, Precision, make_engine
from gpupipe.engines.choice import LOWER_ON_CPU
from gpupipe.engines.declared import candidates
from gpupipe.engines.llvm_cpu import LlvmEngine
from gpupipe.errors import DeviceError
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.landmarks import crop_box, read_landmarks
from gpupipe.lanes import map_in_lanes
from gpupipe.models import MODES, Mode, UNet328, load_unet
from gpupipe.speech import SpeechEncoder

CPU = torch.device("cpu")
TRAINED = {"float16": 68, "bfloat16": 55}
"""Smallest PSNR in dB against float32, on trained weights."""
LEVELS = 58
"""So much at most is asked of whole levels of 255: where half of them are rounded the other way, it is 51 dB."""


@pytest.fixture(scope="module", params=LOWER_ON_CPU, autouse=True)
def precision(request: pytest.FixtureRequest) -> Precision:
    if reason := llvm_obstacle(getattr(torch, request.param)):
        pytest.skip(f"{request.param} does not run here: {reason}")
    return request.param


def seeded(mode: Mode = "ave") -> UNet328:
    return seeded_network(mode, width=1 / 8)


@pytest.fixture(scope="module")
def engine(precision: Precision) -> Engine:
    return LlvmEngine(seeded(), dtype=getattr(torch, precision))


@torch.inference_mode()
def test_trained_mouths_are_near_those_of_float32(precision: Precision) -> None:
    network = load_unet(BUNDLE / "unet.safetensors", "ave")
    image, audio = sample(4)
    engine = make_engine(network, device=CPU, exact=False, precision=precision, engine="llvm")
    found = engine.decode(engine.encode(image), torch.arange(4), audio) * 255
    exact = steps(network, image, audio)
    assert compare(found, exact)[0] >= TRAINED[precision]
    assert compare(found, exact.roll(1, dims=0))[0] < TRAINED[precision], "another frame's mouth"
    assert compare(found, exact)[0] < (80 if precision == "float16" else 70), "it is rounded"


@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_engine_matches_the_network(mode: Mode, precision: Precision) -> None:
    network = seeded(mode)
    engine = make_engine(network, device=CPU, exact=False, precision=precision, engine="llvm")
    assert engine.name == "llvm"
    assert engine.dtype == (torch.float32 if precision == "bfloat16" else getattr(torch, precision))
    image, audio = network_inputs(mode, 2)
    mouth = engine.decode(engine.encode(image), torch.arange(2), audio)
    expected = network(image, audio)
    assert mouth.shape == expected.shape

    def error(other: Tensor) -> float:
        return float((mouth - other).square().mean().sqrt() / expected.std())

    assert error(expected) < 0.1
    assert error(network(image, audio.flip(0))) > 0.2, "it must hear the sound"
    assert error(network(image.flip(0), audio)) > 0.2, "it must see the frame"


@torch.inference_mode()
def test_features_of_a_frame_serve_every_sound_in_every_lane(engine: Engine, precision: Precision) -> None:
    """Bit for bit, whatever is cached, in the same batch, or running in another lane."""
    image, audio = network_inputs("ave", 3)
    features = engine.encode(image)
    assert all(len(value) == 3 and value.dtype == getattr(torch, precision) for value in features.values())
    alone = [engine.decode(engine.encode(image[i : i + 1]), torch.tensor([0]), audio[i : i + 1])[0] for i in range(3)]
    order = [2, 0, 1, 0] * 4
    batches = map_in_lanes(lambda i: engine.decode(features, torch.tensor([i, 0]), audio[[i, 0]]), order, 2)
    for i, batch in zip(order, batches, strict=True):
        assert torch.equal(batch, torch.stack([alone[i], alone[0]]))
    assert not torch.equal(alone[0], alone[1])


def test_frames_of_the_bundled_avatar(precision: Precision) -> None:
    """Whole frames: within the bound inside the box, bit-equal to the template outside."""
    encoder = SpeechEncoder(BUNDLE / "encoder.safetensors")
    features = torch.cat(list(encoder.covering_features(BUNDLE / "sample.flac")))[:4]
    template, unet = BUNDLE / "template", BUNDLE / "unet.safetensors"
    found, exact = (
        FrameGenerator(model, blend="none").generate_frames_from_template_sequence(
            template / "full_body_img", template / "landmarks", features
        )
        for model in (UNetModel(unet, device="cpu", precision=precision), UNetModel(unet, device="cpu"))
    )
    for i, (one, other) in enumerate(zip(found, exact, strict=True), start=1):  # the walk begins at frame 1
        height, width = one.shape[:2]
        xmin, ymin, xmax, ymax = crop_box(read_landmarks(template / "landmarks" / f"{i}.lms"), width, height)
        inside = np.zeros((height, width), dtype=bool)
        inside[ymin:ymax, xmin:xmax] = True
        assert np.array_equal(one[~inside], other[~inside])
        psnr = compare(torch.from_numpy(one[inside]), torch.from_numpy(other[inside]))[0]
        assert min(TRAINED[precision], LEVELS) <= psnr < float("inf")


def test_auto_takes_the_engine_that_is_made_for_it(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path))
    assert candidates(CPU, torch.float32)[0].name == "llvm"
    assert candidates(CPU, getattr(torch, precision))[0].name == "llvm"
    model = UNetModel(BUNDLE / "unet.safetensors", device="cpu", precision=precision)
    assert (model.engine.name, model.exact) == ("llvm", False)


def test_another_engine_does_not_take_its_precision(precision: Precision) -> None:
    told = rf"^engine is 'onnxruntime' and precision '{precision}'; expected float32 with"
    with pytest.raises(DeviceError, match=told):
        make_engine(seeded(), device=CPU, engine="onnxruntime", exact=False, precision=precision)
