"""UNetModel: what the seed's class did, in batches; its devices, its errors and its ONNX file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from clips import network_inputs

import gpupipe.onnx_export
from gpupipe import CheckpointError, DeviceError, GpupipeError, InputError, OutputError, UNetModel
from gpupipe.device import find_device
from gpupipe.engines import EngineName
from gpupipe.fallbacks import fallbacks
from gpupipe.models import AUDIO_SHAPES, MODES, Mode
from gpupipe.models.audio_encoder import AudioEncoder
from gpupipe.speech import SpeechEncoder

MakeModel = Callable[..., UNetModel]
MakeCheckpoint = Callable[..., Path]

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")


# ── predict ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_predict_gives_the_network_s_mouth_truncated(mode: Mode, tiny_model: MakeModel) -> None:
    model = tiny_model(mode)
    image, audio = network_inputs(mode)
    found = model.predict(image, audio)
    assert found.shape == (320, 320, 3)
    assert found.dtype == np.uint8
    values = model.network(image, audio)[0].permute(1, 2, 0).numpy() * 255
    difference = values - found
    assert difference.min() >= -1e-2
    assert difference.max() <= 1 + 1e-2, "truncated, but for what lies on a whole number"
    assert 0.4 < difference.mean() < 0.6, "rounded values would lie around 0"
    assert not np.array_equal(found, found[..., ::-1])


@pytest.mark.parametrize("batch", [2, 3])
def test_batch_gives_one_mouth_a_sample(batch: int, tiny_model: MakeModel) -> None:
    image, audio = network_inputs("ave", batch)
    together = tiny_model().predict(image, audio)
    assert together.shape == (batch, 320, 320, 3)
    for i in range(batch):
        assert np.array_equal(together[i], tiny_model().predict(image[i : i + 1], audio[i : i + 1]))


def test_arrays_and_single_samples_are_taken(tiny_model: MakeModel) -> None:
    image, audio = network_inputs("ave")
    expected = tiny_model().predict(image, audio)
    assert np.array_equal(tiny_model().predict(image.numpy(), audio.numpy()), expected)
    assert np.array_equal(tiny_model().predict(image[0], audio[0]), expected)
    learnt = image.clone().requires_grad_(), audio.clone().requires_grad_()
    assert np.array_equal(tiny_model().predict(*learnt), expected)
    assert np.array_equal(tiny_model().predict(image.double(), audio.numpy().astype(np.float64)), expected)


def test_read_only_and_reversed_arrays_are_taken(tiny_model: MakeModel) -> None:
    """Read-only arrays, of which PyTorch warns, and reversed views."""
    image, audio = network_inputs("ave")
    expected = tiny_model().predict(image, audio)
    fixed, backwards = image.numpy(), audio.numpy()[..., ::-1].copy()[..., ::-1]
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(tiny_model().predict(fixed, backwards), expected)
        swapped = image.numpy().astype(">f4"), audio.numpy().astype(">f8")
        assert np.array_equal(tiny_model().predict(*swapped), expected), "the other byte order"


@pytest.mark.parametrize("dtype", [np.longdouble, object])
def test_types_that_tensors_do_not_have_are_refused(dtype: Any, tiny_model: MakeModel) -> None:
    image, audio = network_inputs("ave")
    with pytest.raises(InputError, match=r"^values are of type \w+; expected numbers of at most 64 bits$"):
        tiny_model().predict(image, audio.numpy().astype(dtype))


def test_engines_agree(tiny_model: MakeModel) -> None:
    image, audio = network_inputs("ave")
    first = tiny_model(engine="onnxruntime").predict(image, audio).astype(int)
    second = tiny_model(engine="torch").predict(image, audio)
    assert np.abs(first - second).max() <= 1
    assert (first == second).mean() > 0.99


@pytest.mark.parametrize(
    ("image", "audio", "named"),
    [
        ((1, 3, 320, 320), (1, 32, 16, 16), r"image_tensor: shape is \(1, 3, 320, 320\); expected \(B, 6, 320, 320\)"),
        ((1, 6, 328, 328), (1, 32, 16, 16), r"image_tensor: shape is"),
        ((0, 6, 320, 320), (0, 32, 16, 16), r"image_tensor: shape is"),
        ((320, 320), (1, 32, 16, 16), r"image_tensor: shape is"),
        ((1, 6, 320, 320), (1, 32, 32, 32), r"audio_features: shape is .* expected \(B, 32, 16, 16\)"),
        ((1, 6, 320, 320), (16, 512), r"audio_features: shape is"),
        ((2, 6, 320, 320), (3, 32, 16, 16), r"image_tensor has 2 samples and audio_features 3; expected as many"),
        ((2, 6, 320, 320), (32, 16, 16), r"image_tensor has 2 samples and audio_features 1; expected as many"),
    ],
)
def test_shapes_that_do_not_fit(image: Any, audio: Any, named: str, tiny_model: MakeModel) -> None:
    with pytest.raises(InputError, match=f"^{named}"):
        tiny_model().predict(torch.zeros(image), torch.zeros(audio))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_of_integers_are_refused(dtype: torch.dtype, tiny_model: MakeModel) -> None:
    """They would range from 0 to 255, not from 0 to 1, and give a meaningless picture."""
    image, audio = network_inputs("ave")
    with pytest.raises(InputError, match=f"^image_tensor: dtype is {str(dtype)[6:]}; expected float32"):
        tiny_model().predict((255 * image).to(dtype), audio)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39])
@pytest.mark.parametrize("name", ["image_tensor", "audio_features"])
def test_nan_and_infinite_values_are_refused(name: str, value: float, tiny_model: MakeModel) -> None:
    """NaN or infinite in float32, for which the last value is too large."""
    given = dict(zip(("image_tensor", "audio_features"), network_inputs("ave", 2), strict=True))
    given[name] = given[name].double()
    given[name][1, 2, 3, 4] = value
    with pytest.raises(InputError, match=f"^{name}: holds NaN or infinite values; expected finite ones"):
        tiny_model().predict(**given)


@pytest.mark.parametrize("mode", MODES)
def test_input_shapes(mode: Mode, tiny_model: MakeModel) -> None:
    assert tiny_model(mode).get_input_shapes() == ((1, 6, 320, 320), (1, *AUDIO_SHAPES[mode]))


# ── what it is made of ────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_three_arguments_are_positional(tiny_checkpoint: MakeCheckpoint) -> None:
    model = UNetModel(str(tiny_checkpoint("wenet")), "wenet", "cpu", engine="torch")
    assert (model.mode, model.device, model.exact) == ("wenet", torch.device("cpu"), True)
    with pytest.raises(TypeError):
        UNetModel(tiny_checkpoint(), "ave", "cpu", "torch")  # type: ignore[misc]


@pytest.mark.parametrize("engine", ["onnxruntime", "llvm"])
def test_networks_may_be_loaded_by_several_threads(engine: EngineName, tiny_checkpoint: MakeCheckpoint) -> None:
    """PyTorch's ONNX exporter, which these engines need, does not itself allow that."""
    with ThreadPoolExecutor(3) as threads:
        models = list(threads.map(lambda _: UNetModel(tiny_checkpoint(), device="cpu", engine=engine), range(3)))
    first, *others = [model.predict(*network_inputs("ave")) for model in models]
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "llvm"])
def test_a_program_s_random_numbers_are_left_alone(
    engine: EngineName, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    torch.save(AudioEncoder().state_dict(), tmp_path / "encoder.pth")
    checkpoint = tiny_checkpoint()
    before = torch.get_rng_state()
    UNetModel(checkpoint, device="cpu", engine=engine)
    SpeechEncoder(tmp_path / "encoder.pth", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_mode_and_another_mode_s_checkpoint(tiny_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(InputError, match=r"^mode is 'mel'; expected one of ave, hubert, wenet"):
        UNetModel(tiny_checkpoint(), "mel")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is a checkpoint of mode ave or hubert; expected mode wenet"):
        UNetModel(tiny_checkpoint(), "wenet")


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth: no such checkpoint file"):
        UNetModel(tmp_path / "absent.pth")


@pytest.mark.parametrize("device", [None, "auto"])
@without_cuda
def test_without_a_gpu_the_device_is_the_cpu(device: str | None) -> None:
    assert find_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
@without_cuda
def test_a_gpu_that_is_not_there(device: str | torch.device, tiny_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(DeviceError, match=r"^device is 'cuda(:0)?', but no CUDA GPU is available here; expected cpu"):
        UNetModel(tiny_checkpoint(), device=device)


@pytest.mark.cuda
def test_a_second_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match=r"^device is 'cuda:99'; expected cuda:0 to cuda:"):
        find_device("cuda:99")


@pytest.mark.cuda
@pytest.mark.parametrize("device", [None, "auto", "cuda", torch.device("cuda")])
def test_the_current_gpu_is_meant_by_its_number(device: str | torch.device | None) -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        assert find_device(device) == torch.device("cuda", last)


def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one for which PyTorch has no kernels. The CPU takes its place, unless the GPU was asked for."""

    def ones(size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    for name, value in (("is_available", True), ("device_count", 1), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch, "ones", ones)
    told = "no kernel image is available for execution on the device)"
    assert find_device() == torch.device("cpu")
    assert fallbacks() == [f"cuda:0 does not work (CUDA error: {told}: the CPU runs instead"]
    with pytest.raises(DeviceError, match=f"^device is 'cuda', which does not work .*{re.escape(told)}; expected cpu"):
        find_device("cuda")
    assert find_device("cuda", here=False) == torch.device("cuda"), "that of another machine"


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", "", "cuda:x", "cpu0"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=f"^device is '{device}'; expected cpu, cuda or cuda:N"):
        find_device(device)


# ── the ONNX file ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_onnx_file_matches_the_network_at_any_batch_size(mode: Mode, tiny_model: MakeModel, tmp_path: Path) -> None:
    path = tiny_model(mode).export_to_onnx(tmp_path / "unet.onnx")
    assert path == str(tmp_path / "unet.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["unet.onnx"]
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert graph.opset_import[0].version == 17
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    described = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    assert described == {
        "image": ["batch", 6, 320, 320],
        "audio": ["batch", *AUDIO_SHAPES[mode]],
        "output": ["batch", 3, 320, 320],
    }
    for batch in (1, 2):
        image, audio = network_inputs(mode, batch)
        (found,) = session.run(None, {"image": image.numpy(), "audio": audio.numpy()})
        expected = tiny_model(mode).network(image, audio).numpy()
        assert np.abs(found - expected).max() < 1e-4
    (deaf,) = session.run(None, {"image": image.numpy(), "audio": np.zeros_like(audio)})
    assert np.abs(deaf - expected).max() > 1e-2


def test_onnx_file_does_not_depend_on_a_program_s_defaults(tiny_model: MakeModel, tmp_path: Path) -> None:
    plain, other = (tmp_path / name for name in ("plain.onnx", "other.onnx"))
    tiny_model().export_to_onnx(plain)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            tiny_model().export_to_onnx(other)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(usual)
    assert other.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("opset", [14, 18])
def test_operator_set_can_be_chosen(opset: int, tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model().export_to_onnx(str(tmp_path / "unet.onnx"), opset_version=opset)
    assert onnx.load(tmp_path / "unet.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [0, 10, 21, "17"])
def test_unknown_operator_set_is_refused(opset: Any, tiny_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"opset version is .*; expected 11 to 20"):
        tiny_model().export_to_onnx(str(tmp_path / "unet.onnx"), opset_version=opset)
    assert list(tmp_path.iterdir()) == []


def test_onnx_file_that_differs_from_the_network_is_removed(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fold = tiny_model(), gpupipe.onnx_export.fold_batch_norms

    def spoilt(network: Any) -> Any:
        """Changes the network after its export: the check must not compare the file with itself."""
        network = fold(network)
        export = gpupipe.onnx_export.export_onnx

        def export_and_spoil(module: Any, *args: Any, **kwargs: Any) -> None:
            export(module, *args, **kwargs)
            module.outc.conv.bias.add_(0.01)

        monkeypatch.setattr(gpupipe.onnx_export, "export_onnx", export_and_spoil)
        return network

    monkeypatch.setattr(gpupipe.onnx_export, "fold_batch_norms", spoilt)
    with pytest.raises(
        GpupipeError, match=r"ONNX Runtime differs from PyTorch by 0\.00\d+ at batch 1; expected at most"
    ):
        model.export_to_onnx(tmp_path / "unet.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_file_that_is_right_for_one_sample_only_is_removed(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export sees a batch of one, whose size a layer may take for a constant."""
    fold = gpupipe.onnx_export.fold_batch_norms

    def folded(network: Any) -> Any:
        network = fold(network)
        network.outc.register_forward_hook(lambda layer, given, out: out + torch.arange(len(out))[:, None, None, None])
        return network

    monkeypatch.setattr(gpupipe.onnx_export, "fold_batch_norms", folded)
    with pytest.raises(GpupipeError, match=r"differs from PyTorch by .* at batch 3; expected at most"):
        tiny_model().export_to_onnx(tmp_path / "unet.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_file_that_cannot_be_written(tiny_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"unet\.onnx: cannot be written"):
        tiny_model().export_to_onnx(tmp_path / "absent" / "unet.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        tiny_model().export_to_onnx(tmp_path)
    assert list(tmp_path.iterdir()) == []
