"""A checkpoint, ready to paint mouths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.device import find_device
from gpupipe.engines import EngineName, Precision, make_engine
from gpupipe.errors import InputError
from gpupipe.models import AUDIO_SHAPES, MODES, Mode, load_unet
from gpupipe.models.unet328 import INPUT_SIZE
from gpupipe.onnx_export import OPSET_VERSION, export_unet
from gpupipe.transfer import as_tensor

Float32 = NDArray[np.float32]


class UNetModel:
    """The 328 U-Net of a checkpoint, on one device.

    Args:
        checkpoint_path: ``.pth`` or ``.safetensors`` state dict, of any width; only tensors are read.
        mode: the kind of speech features it was trained on: ``"ave"``, ``"hubert"`` or ``"wenet"``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …; None takes a CUDA GPU if there is one.
        engine: how the network is run: see :mod:`gpupipe.engines`.
        exact: float32 with TF32 off, and JPEGs decoded on the CPU; None means exact on the CPU, half precision on CUDA.
        precision: what the network computes in: ``"float32"``, and without ``exact`` ``"float16"`` or ``"bfloat16"``,
            for which a CPU needs instructions. None means float32 on the CPU and float16 on CUDA. Asking for less than
            float32 makes ``exact`` default to False on the CPU too.

    Attributes:
        engine: what runs the network.

    Raises:
        CheckpointError: a checkpoint that cannot be used, or one of another mode.
        DeviceError: a device or engine that is not available.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        mode: Mode = "ave",
        device: str | torch.device | None = None,
        *,
        engine: EngineName = "auto",
        exact: bool | None = None,
        precision: Precision | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        self.mode: Mode = mode
        self.device = find_device(device)
        on_cpu = self.device.type == "cpu"
        self.exact = (on_cpu and precision in (None, "float32")) if exact is None else exact
        self.network = load_unet(checkpoint_path, mode)
        self.engine = make_engine(
            self.network, device=self.device, engine=engine, exact=self.exact, precision=precision
        )

    def predict(self, image_tensor: Tensor | Float32, audio_features: Tensor | Float32) -> NDArray[np.uint8]:
        """Paint mouths.

        Args:
            image_tensor: (B, 6, 320, 320) or (6, 320, 320) in [0, 1], BGR: the inner crop, and the same with its mouth
                masked; see :meth:`ImageProcessor.prepare_input_tensors`.
            audio_features: (B, *audio_shape) or audio_shape: the window of each frame.

        Returns:
            uint8 (320, 320, 3) for a batch of one, (B, 320, 320, 3) for more; BGR.

        Raises:
            InputError: wrong shapes, batches of different sizes, integers (such as an image that is not divided by 255
                yet), or values that are NaN or infinite.
        """
        image = self._batch(image_tensor, (6, INPUT_SIZE, INPUT_SIZE), "image_tensor")
        audio = self._batch(audio_features, AUDIO_SHAPES[self.mode], "audio_features")
        if len(image) != len(audio):
            raise InputError(f"image_tensor has {len(image)} samples and audio_features {len(audio)}; expected as many")
        features = self.engine.encode(image.to(self.device, self.engine.dtype))
        index = torch.arange(len(image), device=self.device)
        mouth = self.engine.decode(features, index, audio.to(self.device, self.engine.dtype))
        if mouth.dtype != torch.uint8:
            mouth = (mouth.float() * 255).to(torch.uint8)
        pixels = mouth.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return pixels[0] if len(pixels) == 1 else pixels

    def export_to_onnx(self, output_path: str | Path, opset_version: int = OPSET_VERSION) -> str:
        """Write the network as ONNX (inputs ``image``, ``audio``; output ``output``; dynamic batch), checked on export.

        Returns:
            the path.

        Raises:
            InputError, OutputError, GpupipeError: as :func:`~gpupipe.onnx_export.export_unet`.
        """
        return str(export_unet(self.network, output_path, opset_version=opset_version))

    def get_input_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of image and audio for a batch of one: (1, 6, 320, 320) and (1, *audio_shape)."""
        return (1, 6, INPUT_SIZE, INPUT_SIZE), (1, *AUDIO_SHAPES[self.mode])

    @staticmethod
    def _batch(value: Tensor | np.ndarray, shape: tuple[int, ...], name: str) -> Tensor:
        tensor = as_tensor(value)
        if tuple(tensor.shape) == shape:
            tensor = tensor[None]
        if tensor.dim() != len(shape) + 1 or tuple(tensor.shape[1:]) != shape or not len(tensor):
            wanted = ", ".join(map(str, shape))
            raise InputError(f"{name}: shape is {tuple(tensor.shape)}; expected (B, {wanted})")
        if not tensor.is_floating_point():
            raise InputError(f"{name}: dtype is {str(tensor.dtype).removeprefix('torch.')}; expected float32")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise InputError(f"{name}: holds NaN or infinite values; expected finite ones")
        return tensor
