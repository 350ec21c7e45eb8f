"""Ways of running the network: each turns the trained U-Net into something fast, on one device, at one precision.

| engine        | runs                                          | where     |
| ------------- | --------------------------------------------- | --------- |
| `torch`       | eager PyTorch, batch norms folded             | anywhere  |
| `onnxruntime` | two ONNX graphs (template side, speech side)  | CPU       |

Every engine runs the network in two halves, so that the half that sees only the template can be cached.
"""

from __future__ import annotations

import io
import logging
import os
from typing import Literal, Protocol, get_args

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from gpupipe.errors import DeviceError
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.unet328 import INPUT_SIZE, Features, UNet328
from gpupipe.onnx_export import export_onnx

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "onnxruntime"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


class Engine(Protocol):
    """The network, ready to run."""

    name: str
    device: torch.device
    dtype: torch.dtype

    def encode(self, image: Tensor) -> Features:
        """Template side: image (B, 6, 320, 320) in [0, 1] of ``dtype`` on ``device`` → x1 … x6."""
        ...

    def decode(self, features: Features, audio: Tensor) -> Tensor:
        """Speech side: x1 … x6 and audio (B, *audio_shape) → mouth (B, 3, 320, 320) in (0, 1)."""
        ...


class TorchEngine:
    """Eager PyTorch with batch norms folded; channels-last on CUDA.

    Args:
        exact: float32 with TF32 off. Otherwise float16 on CUDA, float32 elsewhere.
    """

    name = "torch"

    def __init__(self, network: UNet328, *, device: torch.device, exact: bool) -> None:
        self.device = device
        self.exact = exact
        self.dtype = torch.float16 if device.type == "cuda" and not exact else torch.float32
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._layout = layout
        self._network = fold_batch_norms(network).to(device, self.dtype).to(memory_format=layout)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        with torch.backends.cudnn.flags(allow_tf32=not self.exact):
            return self._network.encode(image.to(self.device, self.dtype, memory_format=self._layout))

    @torch.inference_mode()
    def decode(self, features: Features, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        with torch.backends.cudnn.flags(allow_tf32=not self.exact):
            return self._network.decode(features, audio.to(self.device, self.dtype))


class OnnxRuntimeEngine:
    """ONNX Runtime on the CPU, float32: five times eager PyTorch's speed there.

    Args:
        threads: of one inference; None takes all cores.
    """

    name = "onnxruntime"

    def __init__(self, network: UNet328, *, threads: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        network = fold_batch_norms(network)
        image = torch.zeros(1, 6, INPUT_SIZE, INPUT_SIZE)
        features = network.encode(image)
        audio = torch.zeros(1, *network.audio_shape)
        self._names = [f"x{i}" for i in range(1, len(features) + 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        # Idle workers would spin on the cores that decode and encode video beside the network.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._encode = _session(_Encode(network), (image,), ["image"], self._names, options)
        self._decode = _session(_Decode(network), (*features, audio), [*self._names, "audio"], ["output"], options)

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        outputs = self._encode.run(None, {"image": _array(image)})
        x1, x2, x3, x4, x5, x6 = (torch.from_numpy(value) for value in outputs)
        return x1, x2, x3, x4, x5, x6

    def decode(self, features: Features, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        inputs = {name: _array(value) for name, value in zip(self._names, features, strict=True)}
        return torch.from_numpy(self._decode.run(None, {**inputs, "audio": _array(audio)})[0])


class _Encode(nn.Module):
    def __init__(self, network: UNet328) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Features:
        return self.network.encode(image)


class _Decode(nn.Module):
    def __init__(self, network: UNet328) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        x1, x2, x3, x4, x5, x6, audio = inputs
        return self.network.decode((x1, x2, x3, x4, x5, x6), audio)


def _session(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    options: onnxruntime.SessionOptions,
) -> onnxruntime.InferenceSession:
    graph = io.BytesIO()
    export_onnx(module, arguments, graph, inputs=inputs, outputs=outputs)
    return onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])


def _array(value: Tensor) -> np.ndarray:
    return value.to("cpu", torch.float32).contiguous().numpy()


def make_engine(network: UNet328, *, device: torch.device, engine: EngineName = "auto", exact: bool = True) -> Engine:
    """Choose and build an engine.

    Args:
        engine: ``"auto"`` takes ONNX Runtime on the CPU and PyTorch elsewhere.
        exact: float32 arithmetic with TF32 off (what the CPU always does).

    Raises:
        DeviceError: an engine that does not run on ``device``, or an unknown name.
    """
    if engine not in ENGINES:
        raise DeviceError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "auto":
        engine = "onnxruntime" if device.type == "cpu" else "torch"
    if engine == "onnxruntime" and device.type != "cpu":
        raise DeviceError(f"engine is 'onnxruntime' and device {str(device)!r}; expected device 'cpu' with this engine")
    built: Engine
    built = OnnxRuntimeEngine(network) if engine == "onnxruntime" else TorchEngine(network, device=device, exact=exact)
    logger.debug("engine %s on %s, %s", built.name, device, built.dtype)
    return built
