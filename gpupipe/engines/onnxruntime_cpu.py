"""The `onnxruntime` engine: the network in two halves on the CPU, in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features, joined
from gpupipe.lanes import cpu_lanes
from gpupipe.models.hoisted import TEMPLATE_FEATURES
from gpupipe.models.unet328 import UNet328
from gpupipe.onnx_export import export_halves
from gpupipe.quiet_onnxruntime import onnxruntime


class OnnxRuntimeEngine:
    """ONNX Runtime on :mod:`gpupipe.models.blocked`.

    It runs frame by frame: a batch gains nothing on CPU cores, a frame's features are read where they lie, and with all
    shapes fixed ONNX Runtime fuses the halves' sums into their convolutions.

    Args:
        threads: of one inference; None takes those of a lane (:mod:`gpupipe.lanes`).
    """

    name: EngineName = "onnxruntime"

    def __init__(self, network: UNet328, *, threads: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._template, self._speech = (_session(graph, threads) for graph in export_halves(network))

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        rows = [self._template.run(None, {"image": sample}) for sample in _samples(image)]
        columns = (joined([torch.from_numpy(value) for value in column]) for column in zip(*rows, strict=True))
        return dict(zip(TEMPLATE_FEATURES, columns, strict=True))

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`."""
        arrays = {name: features[name].numpy() for name in TEMPLATE_FEATURES}
        mouths = [
            self._speech.run(None, {"audio": window, **{name: value[i : i + 1] for name, value in arrays.items()}})[0]
            for i, window in zip(index.tolist(), _samples(audio), strict=True)
        ]
        return joined([torch.from_numpy(mouth) for mouth in mouths])


def _session(graph: bytes, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cpu_lanes().threads
    # Idle workers would spin on the cores that decode and encode video beside the network.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _samples(batch: Tensor) -> list[np.ndarray]:
    """The samples of a batch as float32 batches of one."""
    return [sample[None] for sample in batch.to("cpu", torch.float32).contiguous().numpy()]


DECLARATION = Declaration(
    "onnxruntime", lambda network, **_: OnnxRuntimeEngine(network), devices=("cpu",), dtypes=(torch.float32,)
)
