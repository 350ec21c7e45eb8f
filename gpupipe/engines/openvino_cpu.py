"""The `openvino` engine: the network's two halves on the CPU, in bfloat16 or in 8-bit integers.

It is for processors with instructions for them. In bfloat16 it takes little more than half the time that float32 takes
with AMX, and with AVX512-BF16 only, on the Xeon where that was measured, a third more than float32. In int8 it takes
half of float32's time there. OpenVINO is an extra: ``pip install 'gpupipe[openvino]'``.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpupipe.engines.base import Declaration, EngineName, Features, joined
from gpupipe.lanes import available_cores
from gpupipe.models.hoisted import TEMPLATE_FEATURES
from gpupipe.models.unet328 import UNet328
from gpupipe.onnx_export import export_halves
from gpupipe.versions import processor_flags

_INT8_FLAGS = {"avx512_vnni", "avx_vnni"}
"""Linux's names of the instructions that multiply 8-bit integers and add in 32 bits."""


class OpenVinoEngine:
    """OpenVINO, frame by frame, each on one thread, with as many frames at once as there are lanes.

    In bfloat16 it runs :mod:`gpupipe.models.blocked`: sums are accumulated in float32, and what follows the last layer
    is computed in it. In int8 it runs :mod:`gpupipe.models.int8`. Features are of that type, (L, H, W, channels),
    contiguous, and are read where they lie.

    Args:
        dtype: bfloat16 or int8.
    """

    name: EngineName = "openvino"

    def __init__(self, network: UNet328, *, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = torch.device("cpu")
        int8 = dtype == torch.int8
        self.dtype = torch.float32 if int8 else dtype
        template, speech = export_halves(network, int8=int8)
        features = dict.fromkeys(TEMPLATE_FEATURES, dtype)
        build = functools.partial(_Half, floats=self.dtype)
        self._template = build(template, channels_last_in={"image": self.dtype}, channels_last_out=features)
        self._speech = build(speech, channels_last_in=features)

    def encode(self, image: Tensor) -> Features:
        """As :meth:`Engine.encode`."""
        image = image.to("cpu", self.dtype).permute(0, 2, 3, 1).contiguous()
        rows = [self._template({"image": sample[None]}) for sample in image]
        return dict(zip(TEMPLATE_FEATURES, map(joined, zip(*rows, strict=True)), strict=True))

    def decode(self, features: Features, index: Tensor, audio: Tensor) -> Tensor:
        """As :meth:`Engine.decode`; mouths are float32."""
        audio = audio.to("cpu", torch.float32).contiguous()
        mouths = [
            self._speech({name: features[name][i : i + 1] for name in TEMPLATE_FEATURES} | {"audio": window[None]})[0]
            for i, window in zip(index.tolist(), audio, strict=True)
        ]
        return joined(mouths)


class _Half:
    """One graph, compiled. Any thread may call it.

    Args:
        floats: what it computes in where the graph says nothing else.
        channels_last_in, channels_last_out: types of the tensors that are (1, H, W, channels) outside the graph, by
            name; all others are float32, in the graph's own layout.
    """

    def __init__(
        self,
        graph: bytes,
        *,
        floats: torch.dtype,
        channels_last_in: Mapping[str, torch.dtype],
        channels_last_out: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        import openvino  # noqa: PLC0415 - an extra
        from openvino.preprocess import PrePostProcessor  # noqa: PLC0415

        core = openvino.Core()
        types = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16, torch.int8: openvino.Type.i8}
        steps = PrePostProcessor(core.read_model(graph))
        for find, tensors in ((steps.input, channels_last_in), (steps.output, channels_last_out or {})):
            for name, dtype in tensors.items():
                tensor = find(name)
                tensor.tensor().set_element_type(types[dtype]).set_layout(openvino.Layout("NHWC"))
                tensor.model().set_layout(openvino.Layout("NCHW"))
        self._compiled = core.compile_model(
            steps.build(),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": types[floats],
                "NUM_STREAMS": available_cores(),
                "INFERENCE_NUM_THREADS": available_cores(),
                "ENABLE_CPU_PINNING": False,  # the same cores decode and encode video
            },
        )
        self._outputs = len(self._compiled.outputs)
        self._idle: deque[Any] = deque()  # requests not in use; each holds the memory that a running network takes

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Run on contiguous tensors, by name; returns the outputs in the graph's order."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        given = {name: _shared(value) for name, value in inputs.items()}
        for name, value in given.items():
            request.set_tensor(name, value)
        request.infer()
        outputs = [_copied(request.get_output_tensor(place)) for place in range(self._outputs)]
        self._idle.append(request)
        return outputs


def _shared(value: Tensor) -> Any:
    """OpenVINO's view of a tensor's memory. NumPy cannot pass it on: it has no bfloat16."""
    import openvino  # noqa: PLC0415 - an extra

    if value.dtype != torch.bfloat16:
        return openvino.Tensor(value.numpy(), shared_memory=True)
    return openvino.Tensor(value.view(torch.uint16).numpy(), list(value.shape), openvino.Type.bf16)


def _copied(value: Any) -> Tensor:
    """A copy of an output, which the request will overwrite."""
    import openvino  # noqa: PLC0415 - an extra

    if value.element_type != openvino.Type.bf16:
        return torch.from_numpy(np.array(value.data))
    return torch.from_numpy(np.array(value.data).view(np.uint16)).view(torch.bfloat16).view(tuple(value.shape))


@functools.cache
def obstacle(dtype: torch.dtype) -> str | None:
    """Why the engine does not run here in bfloat16 or int8; None if it does."""
    try:
        import openvino  # noqa: PLC0415 - an extra
    except ImportError:
        return "OpenVINO is not installed (pip install 'gpupipe[openvino]')"
    if dtype == torch.int8:
        # Without them 16-bit sums of two products may overflow.
        return None if _INT8_FLAGS & set(processor_flags()) else "this processor lacks VNNI, instructions for int8"
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this processor does not multiply bfloat16"
    return None


DECLARATION = Declaration(
    "openvino",
    lambda network, dtype, **_: OpenVinoEngine(network, dtype=dtype),
    devices=("cpu",),
    dtypes=(torch.bfloat16, torch.int8),
    obstacle=lambda device, dtype: obstacle(dtype),
)
