"""The `onnxruntime` engine: the network's two halves on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features
from gpupipe.models.hoisted import TEMPLATE_FEATURES
from gpupipe.models.unet328 import UNet328
from gpupipe.onnx_export import export_halves
from gpupipe.quiet_onnxruntime import onnxruntime


class OnnxRuntimeEngine:
    """ONNX Runtime on :mod:`gpupipe.models.hoisted`.

    It runs frame by frame: a batch gains nothing on CPU cores, a frame's features are read where they lie, and with all
    shapes fixed ONNX Runtime fuses the halves' additions into their convolutions. Each frame is computed on one thread,
    as many at once as there are callers.
    """

    name: EngineName = "onnxruntime"

    def __init__(self, network: UNet328) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._template, self._speech = map(_session, export_halves(network))

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        return _run_frames(self._template, [{"image": sample} for sample in _samples_of(image)])

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        arrays = {name: features[name].numpy() for name in TEMPLATE_FEATURES}
        inputs = [
            {"audio": window} | {name: value[i : i + 1] for name, value in arrays.items()}
            for i, window in zip(index.tolist(), _samples_of(audio), strict=True)
        ]
        return _run_frames(self._speech, inputs)["mouth"]


def _session(graph: bytes) -> onnxruntime.InferenceSession:
    """A graph of fixed shapes, ready to run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _run_frames(
    session: onnxruntime.InferenceSession, samples: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Tensor]:
    """The outputs of all samples by name, written where they are to stay.

    ONNX Runtime would return copies in NumPy's memory, whose 2 MB pages a virtual machine may have to ask its host for.
    """
    outputs = {
        one.name: torch.empty(len(samples), *one.shape[1:], dtype=torch.float32, device="cpu")
        for one in session.get_outputs()
    }
    for row, inputs in enumerate(samples):
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name, values in outputs.items():
            binding.bind_output(name, "cpu", 0, np.float32, (1, *values.shape[1:]), values[row].data_ptr())
        session.run_with_iobinding(binding)
    return outputs


def _samples_of(batch: Tensor) -> list[np.ndarray]:
    """The samples of a batch as float32 batches of one."""
    return [sample[None] for sample in batch.to("cpu", torch.float32).contiguous().numpy()]


DECLARATION = Declaration(
    "onnxruntime", lambda network, **_: OnnxRuntimeEngine(network), devices=("cpu",), dtypes=(torch.float32,)
)
