"""The engines that run the network: they agree with PyTorch and each other, and a cached half changes nothing."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from clips import network_inputs

import gpupipe.engines
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import (
    ENGINES,
    Engine,
    EngineName,
    Precision,
    choice,
    compiled,
    llvm_cpu,
    make_engine,
)
from gpupipe.engines.choice import LOWER_ON_CPU
from gpupipe.engines.declared import DECLARED, candidates
from gpupipe.engines.eager import EagerEngine
from gpupipe.engines.llvm_cpu import LlvmEngine
from gpupipe.engines.onnxruntime_cpu import OnnxRuntimeEngine
from gpupipe.errors import DeviceError, InputError
from gpupipe.frame_cache import FrameCache
from gpupipe.lanes import map_in_lanes
from gpupipe.models import MODES, Mode, UNet328

CPU = torch.device("cpu")
BOUND = 2e-5
"""Allowed difference of outputs in (0, 1): float32 rounding, a two-hundredth of a step of 255."""

ON_CPU: list[EngineName] = ["eager", "onnxruntime", "llvm"]


@pytest.fixture(scope="module")
def network() -> UNet328:
    return seeded_network(width=1 / 8)


@pytest.fixture(scope="module", params=ON_CPU)
def engine(request: pytest.FixtureRequest, network: UNet328) -> Engine:
    return make_engine(network, device=CPU, engine=request.param)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_engine_matches_the_network(mode: Mode, name: EngineName) -> None:
    network = seeded_network(mode, width=1 / 8)
    engine = make_engine(network, device=CPU, engine=name)
    image, audio = network_inputs(mode, 2)
    mouth = engine.decode(engine.encode(image), torch.arange(2), audio)
    assert mouth.shape == (2, 3, 320, 320)
    assert (mouth - network(image, audio)).abs().max() <= BOUND
    assert (mouth - network(image, audio.flip(0))).abs().max() > 100 * BOUND, "it must hear the sound"
    assert (mouth - network(image.flip(0), audio)).abs().max() > 100 * BOUND, "it must see the frame"


@torch.no_grad()
def test_engines_agree_at_full_width() -> None:
    network = seeded_network(width=1)
    image, audio = network_inputs("ave", 1)
    plain, *others = (
        engine.decode(engine.encode(image), torch.tensor([0]), audio)
        for engine in (make_engine(network, device=CPU, engine=name) for name in ON_CPU)
    )
    assert all((other - plain).abs().max() <= BOUND for other in others)
    assert plain.std() > 100 * BOUND


def test_features_of_a_frame_serve_every_sound(engine: Engine) -> None:
    """Bit for bit: a frame must not depend on whether its template's half was cached."""
    image, audio = network_inputs("ave", 3)
    features = engine.encode(image)
    index = torch.tensor([2, 0, 2])
    cached = engine.decode(features, index, audio)
    fresh = engine.decode(engine.encode(image[index]), torch.arange(3), audio)
    assert torch.equal(cached, fresh)
    assert not torch.equal(cached[0], cached[2]), "the same frame with another sound"


def test_features_have_the_frames_along_their_first_axis(engine: Engine) -> None:
    image, _ = network_inputs("ave", 2)
    together, alone = engine.encode(image), engine.encode(image[1:])
    assert together.keys() == alone.keys()
    for name, value in together.items():
        assert value.shape[0] == 2
        assert value.device.type == "cpu"
        torch.testing.assert_close(value[1:], alone[name], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_what_is_cached_channels_last_stays_so(network: UNet328) -> None:
    """As on CUDA, whose layers would turn it round each time."""
    engine = EagerEngine(network, device=CPU)
    engine._layout = torch.channels_last
    decode, given = engine._decode, []
    engine._decode = lambda features, audio: given.extend(features) or decode(features, audio)
    image, audio = network_inputs("ave", 3)
    frames = FrameCache(3, lambda frames: engine.encode(image[frames]), budget=10**9, device=CPU)
    for order in ([0, 1], [0, 2, 1]):
        mouth = engine.decode(*frames.lookup(order), audio[: len(order)])
        assert (mouth - network(image[order], audio[: len(order)])).abs().max() <= BOUND
    assert len(given) == 12
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in given)


def test_onnxruntime_does_not_depend_on_the_batch(network: UNet328) -> None:
    engine = OnnxRuntimeEngine(network)
    image, audio = network_inputs("ave", 3)
    together = engine.decode(engine.encode(image), torch.arange(3), audio)
    for i in range(3):
        alone = engine.decode(engine.encode(image[i : i + 1]), torch.tensor([0]), audio[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_frames_side_by_side_do_not_share_memory(network: UNet328) -> None:
    image, audio = network_inputs("ave", 4)
    engine = LlvmEngine(network)

    def paint(sample: int) -> torch.Tensor:
        features = engine.encode(image[sample : sample + 1])
        return engine.decode(features, torch.tensor([0]), audio[sample : sample + 1])[0]

    one_by_one = [paint(sample) for sample in range(4)]
    for mouths in (list(map_in_lanes(paint, range(4), 4)) for _ in range(3)):
        assert all(torch.equal(found, expected) for found, expected in zip(mouths, one_by_one, strict=True))


def test_llvm_needs_vectors(network: UNet328, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm_cpu, "llvm_obstacle", lambda dtype: "this processor is made of wood")
    with pytest.raises(DeviceError, match=r"^engine is 'llvm': this processor is made of wood"):
        make_engine(network, device=CPU, engine="llvm")


def test_inputs_may_be_strided_or_of_another_precision(engine: Engine) -> None:
    image, audio = network_inputs("ave", 2)
    expected = engine.decode(engine.encode(image), torch.arange(2), audio)
    strided = image.contiguous(memory_format=torch.channels_last).double()
    found = engine.decode(engine.encode(strided), torch.arange(2), audio.double().mT.contiguous().mT)
    assert (found - expected).abs().max() <= BOUND


def test_declared_engines_are_those_of_the_type_and_the_documentation() -> None:
    assert {*DECLARED, "auto", "torch"} == set(get_args(EngineName))
    assert set(re.findall(r"^\| `(\w+)`", gpupipe.engines.__doc__ or "", re.MULTILINE)) == set(DECLARED)


def test_engines_are_made_by_name(network: UNet328) -> None:
    assert isinstance(make_engine(network, device=CPU, engine="onnxruntime"), OnnxRuntimeEngine)
    assert isinstance(make_engine(network, device=CPU, engine="eager"), EagerEngine)
    assert isinstance(make_engine(network, device=CPU, engine="torch"), EagerEngine), "another word for eager"


def test_the_cpu_is_always_float32(network: UNet328) -> None:
    for name in ON_CPU:
        engine = make_engine(network, device=CPU, engine=name, exact=False)
        assert engine.dtype == torch.float32
        assert engine.device == CPU


def test_engines_that_cannot_run_are_refused(network: UNet328) -> None:
    with pytest.raises(DeviceError, match=f"^engine is 'tensorrt'; expected one of {', '.join(ENGINES)}"):
        make_engine(network, device=CPU, engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"^engine is 'onnxruntime' and device 'cuda:0'; expected device 'cpu'"):
        make_engine(network, device=torch.device("cuda:0"), engine="onnxruntime")
    assert issubclass(DeviceError, InputError)
    with pytest.raises(DeviceError, match=r"^engine is 'fused' and device 'cpu'; expected device 'cuda'"):
        make_engine(network, device=CPU, engine="fused")


@pytest.mark.parametrize("precision", LOWER_ON_CPU)
def test_lower_precisions_on_a_cpu_without_them_are_refused(
    precision: Precision, network: UNet328, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "llvm_obstacle", lambda dtype: "it is made of wood")
    told = rf"^precision is '{precision}'; expected float32 on this CPU: it is made of"
    with pytest.raises(DeviceError, match=told):
        make_engine(network, device=CPU, exact=False, precision=precision)
    monkeypatch.setattr(llvm_cpu, "llvm_obstacle", lambda dtype: "it is made of wood")
    with pytest.raises(DeviceError, match=r"^engine is 'llvm': it is made of wood"):
        make_engine(network, device=CPU, engine="llvm")


def test_unsupported_precisions_are_refused(network: UNet328) -> None:
    with pytest.raises(DeviceError, match=r"^precision is 'float16'; expected float32 with exact"):
        make_engine(network, device=CPU, precision="float16", exact=True)
    with pytest.raises(DeviceError, match=r"^precision is 'bfloat16'; expected float32 with exact"):
        make_engine(network, device=torch.device("cuda"), precision="bfloat16", exact=True)
    with pytest.raises(DeviceError, match=r"^precision is 'int4'; expected float32, float16 or bfloat16"):
        make_engine(network, device=CPU, precision="int4")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(compiled.obstacle(CPU) is not None, reason="torch.compile needs a C++ compiler on a CPU")
@torch.no_grad()
def test_compiled_engine_matches_the_network(network: UNet328) -> None:
    """Batches smaller than the first are padded; for larger ones it compiles again."""
    engine = make_engine(network, device=CPU, engine="compile")
    for batch in (2, 1, 3):
        image, audio = network_inputs("ave", batch)
        mouth = engine.decode(engine.encode(image), torch.arange(batch), audio)
        assert mouth.shape == (batch, 3, 320, 320)
        assert (mouth - network(image, audio)).abs().max() <= BOUND


def test_engines_on_cuda_by_precision(network: UNet328) -> None:
    cuda = torch.device("cuda")
    in_half, in_bfloat16, in_single = (
        [one.name for one in candidates(cuda, dtype)] for dtype in (torch.float16, torch.bfloat16, torch.float32)
    )
    assert in_half == ["gluon", "fused", "compile", "eager"]
    assert in_bfloat16 == ["fused", "compile", "eager"], "Gluon: float16 alone"
    assert in_single == ["compile", "eager"], "the fused kernels are for half precision"
    with pytest.raises(DeviceError, match=r"^engine is 'fused' and precision 'float32'; expected float16 or bfloat16"):
        make_engine(network, device=cuda, engine="fused", exact=True)
