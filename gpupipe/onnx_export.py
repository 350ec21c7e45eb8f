"""The network as ONNX: whole, with a dynamic batch, for other programs; in halves, for our own engines."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gpupipe.errors import GpupipeError, InputError
from gpupipe.files import replacing
from gpupipe.models.fold import fold_batch_norms
from gpupipe.models.hoisted import TEMPLATE_FEATURES, SpeechHalf, TemplateHalf
from gpupipe.models.unet328 import UNet328, random_inputs
from gpupipe.quiet import no_warnings
from gpupipe.quiet_onnxruntime import onnxruntime

OPSET_VERSION = 17
"""Default ONNX operator set."""

_OPSETS = range(11, 21)
"""Operator sets that can express the network: resizing with aligned corners begins with 11, the tracing exporter ends
with 20."""

TOLERANCE = 1e-4
"""How far the exported network's outputs, in (0, 1), may be from PyTorch's."""


def export_onnx(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    destination: Path | io.BytesIO,
    *,
    inputs: list[str],
    outputs: list[str],
    opset_version: int = OPSET_VERSION,
    dynamic_batch: bool = True,
) -> None:
    """Write ``module`` as ONNX.

    Args:
        dynamic_batch: make the first axis of every input and output the dynamic ``batch``; otherwise shapes are fixed.
    """
    # The tracing exporter is deprecated, but the new one takes 5 times as long for the same graph. It cannot run twice
    # at once: no_warnings holds a lock. Tensors it creates take the program's default device and dtype: both are set.
    with no_warnings(), torch.device("cpu"), contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        torch.onnx.export(
            module,
            arguments,
            destination,  # type: ignore[arg-type]  # the tracing exporter writes to a BytesIO as well
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in inputs + outputs} if dynamic_batch else None,
            opset_version=opset_version,
            dynamo=False,
        )


@torch.autocast("cpu", enabled=False)
def export_halves(network: UNet328) -> tuple[bytes, bytes]:
    """Return the network's halves, template's and speech's, for one frame: all shapes are fixed.

    The template half turns ``image`` into :data:`~gpupipe.models.hoisted.TEMPLATE_FEATURES`, by their names; the speech
    half turns those and ``audio`` into ``mouth``. All are float32.
    """
    network = fold_batch_norms(network)
    template, speech = TemplateHalf(network).eval(), SpeechHalf(network).eval()
    image, audio = random_inputs(network, 1)
    names = list(TEMPLATE_FEATURES)
    first, second = io.BytesIO(), io.BytesIO()
    export_onnx(template, (image,), first, inputs=["image"], outputs=names, dynamic_batch=False)
    features = template(image)
    export_onnx(speech, (*features, audio), second, inputs=[*names, "audio"], outputs=["mouth"], dynamic_batch=False)
    return first.getvalue(), second.getvalue()


@torch.autocast("cpu", enabled=False)
def export_unet(network: UNet328, path: str | Path, *, opset_version: int = OPSET_VERSION) -> Path:
    """Write the whole network to ``path`` and check it against PyTorch with ONNX Runtime.

    Inputs ``image`` (batch, 6, 320, 320) in [0, 1] and ``audio`` (batch, *audio_shape), output ``output``
    (batch, 3, 320, 320) in (0, 1); all float32, BGR.

    Raises:
        InputError: an operator set that cannot express the network.
        OutputError: ``path`` cannot be written.
        GpupipeError: ONNX Runtime and PyTorch differ by more than :data:`TOLERANCE` on random inputs of batch 1 and 3.
    """
    if opset_version not in _OPSETS:
        raise InputError(f"opset version is {opset_version!r}; expected {_OPSETS[0]} to {_OPSETS[-1]}")
    path = Path(path)
    network = fold_batch_norms(network).float().cpu()
    with replacing(path) as temporary:
        export_onnx(
            network,
            random_inputs(network, 1),
            temporary,
            inputs=["image", "audio"],
            outputs=["output"],
            opset_version=opset_version,
        )
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            image, audio = random_inputs(network, batch)
            (found,) = session.run(None, {"image": image.numpy(), "audio": audio.numpy()})
            difference = float(np.abs(found - network(image, audio).numpy()).max())
            if not difference <= TOLERANCE:
                raise GpupipeError(
                    f"{path}: ONNX Runtime differs from PyTorch by {difference:.2g} at batch {batch}; expected at most"
                    f" {TOLERANCE:g}"
                )
    return path
