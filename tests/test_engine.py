"""The ways of running the network: they agree with PyTorch and with each other, and a cached half changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.seeded import seeded_network
from gpupipe.engine import ENGINES, Engine, EngineName, OnnxRuntimeEngine, TorchEngine, make_engine
from gpupipe.errors import DeviceError, InputError
from gpupipe.models import AUDIO_SHAPES, MODES, Mode

CPU = torch.device("cpu")
BOUND = 2e-5
"""Of outputs in (0, 1): float32 rounding, a two-hundredth of a step of 255."""

ON_CPU: list[EngineName] = ["torch", "onnxruntime"]


@pytest.fixture(scope="module", params=ON_CPU)
def engine(request: pytest.FixtureRequest) -> Engine:
    return make_engine(seeded_network(width=1 / 8), device=CPU, engine=request.param)


def inputs(mode: Mode, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(batch, 6, 320, 320, generator=generator)
    return image, torch.randn(batch, *AUDIO_SHAPES[mode], generator=generator)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_engine_is_the_network(mode: Mode, name: EngineName) -> None:
    network = seeded_network(mode, width=1 / 8)
    engine = make_engine(network, device=CPU, engine=name)
    image, audio = inputs(mode, 2)
    mouth = engine.decode(engine.encode(image), torch.arange(2), audio)
    assert mouth.shape == (2, 3, 320, 320)
    assert (mouth - network(image, audio)).abs().max() <= BOUND
    assert (mouth - network(image, audio.flip(0))).abs().max() > 100 * BOUND, "it must hear the sound"
    assert (mouth - network(image.flip(0), audio)).abs().max() > 100 * BOUND, "it must see the frame"


@torch.no_grad()
def test_engines_agree_at_full_width() -> None:
    network = seeded_network(width=1)
    image, audio = inputs("ave", 1)
    first, second = (
        engine.decode(engine.encode(image), torch.tensor([0]), audio)
        for engine in (make_engine(network, device=CPU, engine=name) for name in ON_CPU)
    )
    assert (first - second).abs().max() <= BOUND
    assert first.std() > 100 * BOUND


def test_features_of_a_frame_serve_every_sound(engine: Engine) -> None:
    """Bit for bit: a frame must not depend on whether its template's half was cached."""
    image, audio = inputs("ave", 3)
    features = engine.encode(image)
    index = torch.tensor([2, 0, 2])
    cached = engine.decode(features, index, audio)
    fresh = engine.decode(engine.encode(image[index]), torch.arange(3), audio)
    assert torch.equal(cached, fresh)
    assert not torch.equal(cached[0], cached[2]), "the same frame with another sound"


def test_features_have_the_frames_along_their_first_axis(engine: Engine) -> None:
    image, _ = inputs("ave", 2)
    together, alone = engine.encode(image), engine.encode(image[1:])
    assert together.keys() == alone.keys()
    for name, value in together.items():
        assert value.shape[0] == 2
        assert value.device.type == "cpu"
        torch.testing.assert_close(value[1:], alone[name], atol=1e-5, rtol=1e-4)


def test_onnxruntime_does_not_depend_on_the_batch() -> None:
    engine = OnnxRuntimeEngine(seeded_network(width=1 / 8), threads=1)
    image, audio = inputs("ave", 3)
    together = engine.decode(engine.encode(image), torch.arange(3), audio)
    for i in range(3):
        alone = engine.decode(engine.encode(image[i : i + 1]), torch.tensor([0]), audio[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_inputs_may_be_strided_or_of_another_precision(engine: Engine) -> None:
    image, audio = inputs("ave", 2)
    expected = engine.decode(engine.encode(image), torch.arange(2), audio)
    strided = image.contiguous(memory_format=torch.channels_last).double()
    found = engine.decode(engine.encode(strided), torch.arange(2), audio.double().mT.contiguous().mT)
    assert (found - expected).abs().max() <= BOUND


def test_auto_takes_onnx_runtime_on_the_cpu() -> None:
    network = seeded_network(width=1 / 8)
    chosen = make_engine(network, device=CPU)
    assert isinstance(chosen, OnnxRuntimeEngine)
    assert chosen.name == "onnxruntime"
    assert isinstance(make_engine(network, device=CPU, engine="torch"), TorchEngine)


def test_the_cpu_is_always_float32() -> None:
    for name in ON_CPU:
        engine = make_engine(seeded_network(width=1 / 8), device=CPU, engine=name, exact=False)
        assert engine.dtype == torch.float32
        assert engine.device == CPU


def test_engines_that_cannot_be() -> None:
    network = seeded_network(width=1 / 8)
    with pytest.raises(DeviceError, match=f"^engine is 'tensorrt'; expected one of {', '.join(ENGINES)}"):
        make_engine(network, device=CPU, engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"^engine is 'onnxruntime' and device 'cuda:0'; expected device 'cpu'"):
        make_engine(network, device=torch.device("cuda:0"), engine="onnxruntime")
    assert issubclass(DeviceError, InputError)
