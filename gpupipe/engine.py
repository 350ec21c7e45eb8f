"""Ways of running the network: each turns the trained U-Net into something fast, on one device, at one precision.

| engine        | runs                                          | where     |
| ------------- | --------------------------------------------- | --------- |
| `torch`       | eager PyTorch, batch norms folded             | anywhere  |
| `onnxruntime` | ONNX Runtime, the network in hoisted halves   | CPU       |

Every engine runs the network in two halves, so that the half that sees only the template can be cached.
"""

from __future__ import annotations

import io
import logging
from typing import Literal, Protocol, get_args

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from gpupipe.errors import DeviceError
from gpupipe.lanes import cpu_lanes
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.hoisted import TEMPLATE_FEATURES, SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import INPUT_SIZE, UNet328
from gpupipe.onnx_export import export_onnx

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "onnxruntime"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

Features = dict[str, Tensor]
"""What the network makes of template frames, before it hears anything: tensors by name, frames along the first axis."""


class Engine(Protocol):
    """The network, ready to run."""

    name: str
    device: torch.device
    dtype: torch.dtype

    def encode(self, image: Tensor) -> Features:
        """Template's half: image (B, 6, 320, 320) in [0, 1] on ``device`` → features of each frame, by name."""
        ...

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """Speech's half.

        Args:
            features: what :meth:`encode` made of L frames.
            index: int64 (B,), which of them each sample takes.
            audio: (B, *audio_shape).

        Returns:
            mouth (B, 3, 320, 320) in (0, 1), floating.
        """
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
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._network = fold_batch_norms(network).to(device, self.dtype).to(memory_format=self._layout)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        with torch.backends.cudnn.flags(allow_tf32=not self.exact):
            features = self._network.encode(image.to(self.device, self.dtype, memory_format=self._layout))
        return {f"x{i}": value for i, value in enumerate(features, start=1)}

    @torch.inference_mode()
    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        x1, x2, x3, x4, x5, x6 = (features[f"x{i}"].index_select(0, index) for i in range(1, 7))
        with torch.backends.cudnn.flags(allow_tf32=not self.exact):
            return self._network.decode((x1, x2, x3, x4, x5, x6), audio.to(self.device, self.dtype))


class OnnxRuntimeEngine:
    """ONNX Runtime on the CPU, float32, on the network in its two hoisted halves.

    It runs frame by frame: a batch gains nothing on CPU cores, a frame's features are read where they lie, and with all
    shapes fixed ONNX Runtime fuses the halves' sums into their convolutions.

    Args:
        threads: of one inference; None takes those of a lane (:mod:`gpupipe.lanes`).
    """

    name = "onnxruntime"

    def __init__(self, network: UNet328, *, threads: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
        image = torch.zeros(1, 6, INPUT_SIZE, INPUT_SIZE)
        features = template(image)
        audio = torch.zeros(1, *network.audio_shape)
        names = list(TEMPLATE_FEATURES)
        self._template = _session(template, (image,), ["image"], names, threads)
        self._speech = _session(speech, (*features, audio), [*names, "audio"], ["mouth"], threads)

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        rows = [self._template.run(None, {"image": sample}) for sample in _samples(image)]
        columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*rows, strict=True))
        return dict(zip(TEMPLATE_FEATURES, columns, strict=True))

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        arrays = {name: features[name].numpy() for name in TEMPLATE_FEATURES}
        mouths = [
            self._speech.run(None, {"audio": window, **{name: value[i : i + 1] for name, value in arrays.items()}})[0]
            for i, window in zip(index.tolist(), _samples(audio), strict=True)
        ]
        return torch.from_numpy(np.concatenate(mouths))


def _session(
    module: nn.Module, arguments: tuple[Tensor, ...], inputs: list[str], outputs: list[str], threads: int | None
) -> onnxruntime.InferenceSession:
    graph = io.BytesIO()
    export_onnx(module, arguments, graph, inputs=inputs, outputs=outputs, dynamic_batch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cpu_lanes().threads
    # Idle workers would spin on the cores that decode and encode video beside the network.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])


def _samples(batch: Tensor) -> list[np.ndarray]:
    """The samples of a batch as float32 batches of one."""
    return [sample[None] for sample in batch.to("cpu", torch.float32).contiguous().numpy()]


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
