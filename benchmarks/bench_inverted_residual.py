"""The network's blocks: µs a frame, and GB/s on each block's byte budget beside the device's own copy.

``python -m gpupipe.benchmarks.bench_inverted_residual [--record]``. On CUDA each block, at full width and its own size,
runs on the Triton kernels and, as the baseline, layer by layer in PyTorch: channels last, batch norms folded, half
precision. The fused engine's two halves come last; their byte budget is what they must at least read and write: image,
features, mouth. On a CPU a few small blocks run on the plain reference, only to show that the script works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from gpupipe.benchmarks.common import Row, tuned
from gpupipe.benchmarks.kernel_bench import main, rows_of
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.fused import FusedEngine
from gpupipe.kernels.dispatch import backend
from gpupipe.kernels.inverted_residual import (
    Block,
    bytes_moved,
    depthwise_project,
    expansion_is_recomputed,
    inverted_residual,
    inverted_residual_head,
    pack_block,
    pack_pointwise,
)
from gpupipe.kernels.pointwise import upsample_expand
from gpupipe.models.unet328 import INPUT_SIZE

BLOCKS = (
    # name, side, channels in and out, stride, residual
    ("down1.0", 320, 16, 32, 2, False),
    ("down1.1, up4.1", 160, 32, 32, 1, True),
    ("down2.0", 160, 32, 64, 2, False),
    ("down2.1", 80, 64, 64, 1, True),
    ("down3.0", 80, 64, 128, 2, False),
    ("down3.1", 40, 128, 128, 1, True),
    ("down4.1", 20, 256, 256, 1, True),
    ("down5.1", 10, 512, 512, 1, True),
)

UPS = (
    # name, side, channels of low and of the skip, hidden and out
    ("up1.0", 20, 256, 256, 1024, 128),
    ("up2.0", 40, 128, 128, 512, 64),
    ("up3.0", 80, 64, 64, 256, 32),
    ("up4.0", 160, 32, 32, 128, 32),
    ("up5.0", 320, 32, 16, 128, 16),
)


def cases(device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32

    def measured(case: str, functions: dict[str, Callable[[], object]], bytes_a_frame: int) -> Iterator[list[Row]]:
        for provider, function in functions.items():
            yield rows_of(
                "inverted_residual",
                provider,
                tuned(function) if provider == "layers" else function,
                frames=batch,
                bytes_a_frame=bytes_a_frame,
                config={"case": case},
                device=device,
                rounds=rounds,
            )

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype)

    for name, side, channels, outputs, stride, residual in BLOCKS if cuda else BLOCKS[-2:]:
        layers = _layers(channels, 2 * channels, outputs, stride)
        block, x = pack_block(_convolutions(layers), device=device, dtype=dtype), noise(side, side, channels)
        fused = partial(inverted_residual, x, block, stride=stride, residual=residual)
        layered = partial(_layered, _on(layers, device, dtype), x.permute(0, 3, 1, 2), residual=residual)
        how = "whole" if expansion_is_recomputed(block, stride) else "in two"
        moved = bytes_moved(side, block, stride=stride, residual=residual)
        yield from measured(f"{name}, {how}", {backend(device): fused, "layers": layered}, moved)

    index = torch.arange(batch, device=device)
    for name, side, low_channels, skip_channels, hidden, outputs in UPS if cuda else UPS[:1]:
        layers = _layers(low_channels + skip_channels, hidden, outputs, 1)
        convolutions = _convolutions(layers)
        block = pack_block(convolutions, device=device, dtype=dtype)
        matrices = [matrix.to(device, dtype).contiguous() for matrix in _split(convolutions[0], low_channels)]
        low, skip = noise(side // 2, side // 2, low_channels), noise(side, side, skip_channels)
        up = partial(_up, block, low, skip, index, *matrices)
        up_layered = partial(_up_layered, _on(layers, device, dtype), low.permute(0, 3, 1, 2), skip.permute(0, 3, 1, 2))
        area = side * side
        moved = dtype.itemsize * area * (low_channels // 4 + skip_channels + 2 * hidden + outputs)
        yield from measured(f"{name}, upsampled and concatenated", {backend(device): up, "layers": up_layered}, moved)

    if cuda:
        layers, head = _layers(16, 32, 16, 1), nn.Conv2d(16, 3, 1)
        block, x = pack_block(_convolutions(layers), device=device, dtype=dtype), noise(320, 320, 16)
        packed = pack_pointwise(head, device=device, dtype=dtype)
        plain, planes, last = _on(layers, device, dtype), x.permute(0, 3, 1, 2), head.to(device, dtype)
        functions: dict[str, Callable[[], object]] = {
            backend(device): lambda: inverted_residual_head(x, block, *packed, residual=True),
            "layers": lambda: (last(planes + plain(planes)).sigmoid() * 255).to(torch.uint8),
        }
        yield from measured("up5.1, head, uint8", functions, 320 * 320 * (2 * 16 + 3))
        engine = FusedEngine(seeded_network(width=1), device=device)
        image, audio = torch.rand(batch, 6, INPUT_SIZE, INPUT_SIZE, device=device), noise(32, 16, 16)
        image = image.to(dtype).contiguous(memory_format=torch.channels_last)
        features = engine.encode(image)
        kept = sum(value[0].nbytes for value in features.values())
        yield from measured("template half", {"fused": lambda: engine.encode(image)}, image[0].nbytes + kept)
        yield from measured(
            "speech half", {"fused": lambda: engine.decode(features, index, audio)}, kept + 3 * INPUT_SIZE**2
        )


def _layered(plain: nn.Module, planes: Tensor, *, residual: bool) -> Tensor:
    return planes + plain(planes) if residual else plain(planes)


def _up(block: Block, low: Tensor, skip: Tensor, index: Tensor, low_matrix: Tensor, skip_matrix: Tensor) -> Tensor:
    wide = upsample_expand(low, skip, index, low_matrix, skip_matrix, block.expand_bias)
    return depthwise_project(wide, block.projection)


def _up_layered(plain: nn.Module, low: Tensor, skip: Tensor) -> Tensor:
    upsampled = nn.functional.interpolate(low, scale_factor=2, mode="bilinear", align_corners=True)
    return plain(torch.cat([upsampled, skip], dim=1))


def _layers(channels: int, hidden: int, outputs: int, stride: int) -> nn.Sequential:
    """A block as PyTorch runs it once batch norms are folded."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 1),
    )


def _convolutions(layers: nn.Sequential) -> list[nn.Conv2d]:
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def _on(layers: nn.Sequential, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return layers.to(device, dtype).to(memory_format=torch.channels_last)


def _split(expand: nn.Conv2d, low: int) -> tuple[Tensor, Tensor]:
    """An expansion's matrix in two: the rows for the upsampled map's channels, and those for the skip's."""
    matrix = expand.weight.detach()[:, :, 0, 0].T
    return matrix[:low], matrix[low:]


if __name__ == "__main__":
    main((__doc__ or "").split("\n")[0], cases)
