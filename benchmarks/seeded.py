"""A network to measure and test with where there is no checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from gpupipe.models import AUDIO_SHAPES, Mode, UNet328
from gpupipe.models.unet328 import INPUT_SIZE

LOGIT_SPREAD = 0.5
"""Standard deviation of the made-up frame's values before the sigmoid; after it that is about 30 steps of 255."""


@torch.no_grad()
def seeded_network(mode: Mode = "ave", *, width: float = 1.0, seed: int = 0) -> UNet328:
    """A U-Net with fixed random weights, in ``eval`` mode, whose outputs vary visibly with the image and the sound.

    PyTorch's own initialisation would give a flat grey, in which an error of a whole stage could hide. Here the head is
    scaled by its output for a made-up frame, so that pixels use the middle of their range. Batch norms have fixed
    statistics of about 1. Fitted to the frame, they would amplify small values so much that one step in one input pixel
    would change the output by tens of steps, which no trained network does.
    """
    generator = torch.Generator().manual_seed(seed)
    network = UNet328(mode, width=width)
    for name, value in network.state_dict().items():
        if value.dim() == 4:
            value.copy_(torch.randn(value.shape, generator=generator) * (1.3 / value[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "weight")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    network.eval().requires_grad_(False)

    painted: list[torch.Tensor] = []
    hook = network.outc.register_forward_hook(lambda module, inputs, output: painted.append(output))
    network(*_made_up_frame(mode, generator))
    hook.remove()
    logits = painted[0]
    gain = LOGIT_SPREAD / logits.std(dim=(0, 2, 3))
    head = network.outc.conv
    assert head.bias is not None
    head.bias.copy_((head.bias - logits.mean(dim=(0, 2, 3))) * gain)
    head.weight.mul_(gain[:, None, None, None])
    return network


def _made_up_frame(mode: Mode, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth, slightly noisy image stacked on its copy with a black middle, and a window of features."""
    coarse = torch.rand(1, 3, 10, 10, generator=generator)
    inner = nn.functional.interpolate(coarse, (INPUT_SIZE, INPUT_SIZE), mode="bilinear")
    inner = 0.8 * inner + 0.2 * torch.rand(inner.shape, generator=generator)
    masked = inner.clone()
    masked[:, :, 5:-10, 5:-5] = 0
    return torch.cat([inner, masked], dim=1), torch.randn(1, *AUDIO_SHAPES[mode], generator=generator).abs()
