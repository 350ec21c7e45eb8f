"""Stage 2: a narrow 328 U-Net that paints the character's mouth; stage 3: joined with the encoder of stage 1.

Two things make it cheap. First, drawing and hearing are learned apart: in stage 2 the audio branch is replaced by a map
that says the three mouth parameters outright, and since stage 1 reads those parameters from the branch's map by one
linear layer, that layer folds exactly into the first convolution that sees the map (:func:`join`). Second, batch norm
costs more than half of a step on a CPU: each norm is folded into its convolution after one calibrating pass
(:mod:`gpupipe.demo.norms`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpupipe.demo.fitting import fit
from gpupipe.demo.mouth import PARAMETERS
from gpupipe.demo.norms import fold_norms, norm_pairs, unfolded_state
from gpupipe.demo.pictures import Pictures, figures, weighted_l1
from gpupipe.demo.train_encoder import Listener, Rows, draw_windows
from gpupipe.models.unet328 import UNet328

CODE = len(PARAMETERS)  # channels of the audio map that stage 2 uses; the rest are zero
BATCH = 4  # pictures to a step


def fresh_painter(width: float, images: Tensor, code: Tensor) -> tuple[UNet328, list[tuple[str, str]]]:
    """A U-Net whose layers each put out unit variance on these inputs, its norms folded."""
    network = UNet328("ave", width=width).to(images.device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    for name, module in network.named_modules():
        if name.endswith("double_conv.1.conv.7") and isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.3)  # residual branches start small
    with torch.no_grad():
        paint(network.train(), images, code)
    pairs = [pair for pair in norm_pairs(network) if not pair[0].startswith("audio_model.")]
    fold_norms(network, pairs)
    return network.to(memory_format=torch.channels_last), pairs


def paint(network: UNet328, images: Tensor, code: Tensor) -> Tensor:
    """The U-Net with ``code`` (B, 3) spread over its audio map in place of the audio branch → (B, 3, 320, 320)."""
    x1, x2, x3, x4, x5, x6 = network.encode(images)
    sound = F.pad(code[:, :, None, None].expand(-1, -1, *x6.shape[2:]), (0, 0, 0, 0, 0, x6.shape[1] - CODE))
    x = network.fuse_conv(torch.cat([x6, sound], dim=1))
    for up, skip in zip(
        (network.up1, network.up2, network.up3, network.up4, network.up5), (x5, x4, x3, x2, x1), strict=True
    ):
        x = up(x, skip)
    return torch.sigmoid(network.outc(x))


def as_code(mouths: Tensor) -> Tensor:
    """Mouth parameters in [0, 1] → the values that stand in the map."""
    return 2 * mouths - 1


# ── stage 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_painter(
    out: Path, pictures: Pictures, mouths: np.ndarray, *, width: float, steps: int
) -> tuple[UNet328, list[tuple[str, str]], dict[str, Any]]:
    """Draw the mouth that the map says. ``mouths`` (M, 3): what mouths there are, to draw from.

    Returns:
        The network (folded, averaged), its folded pairs, and what :func:`fit` returns, saved as ``out/painter.pt``.
    """
    torch.manual_seed(0)
    count = len(pictures.frames)

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        wanted = mouths[rng.integers(0, len(mouths), n)]
        anything = rng.random((n, CODE)).astype(np.float32)
        return rng.integers(0, count, n), np.where(rng.random((n, 1)) < 0.3, anything, wanted).astype(np.float32)

    def painted_for(network: UNet328, indices: np.ndarray, wanted: np.ndarray) -> Tensor:
        return paint(network, pictures.image(indices), as_code(torch.from_numpy(wanted).to(pictures.device)))

    indices, wanted = draw(np.random.default_rng(4), 8)
    network, pairs = fresh_painter(
        width, pictures.image(indices), as_code(torch.from_numpy(wanted).to(pictures.device))
    )
    network.audio_model.requires_grad_(False)

    def loss_of(step: int) -> Tensor:
        indices, wanted = draw(np.random.default_rng((5, step)), BATCH)
        return weighted_l1(
            painted_for(network, indices, wanted), pictures.truth(indices, wanted), pictures.weights(indices)
        )

    @torch.no_grad()
    def measure() -> dict[str, float]:
        rng = np.random.default_rng(6)
        indices, wanted = rng.integers(0, count, 12), mouths[rng.integers(0, len(mouths), 12)]
        return figures(pictures, indices, painted_for(network, indices, wanted), pictures.truth(indices, wanted))

    state = fit(out / "painter.pt", network, loss_of, name="painter", steps=steps, rate=3e-3, measure=measure)
    network.load_state_dict(state["average"])
    return network, pairs, state


# ── stage 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def join(painter: UNet328, pairs: list[tuple[str, str]], listener: Listener) -> list[tuple[str, str]]:
    """Give the painter, in place, the listener's audio branch; nothing is lost but the listener's own error.

    The first convolution after the bottleneck saw the code in three channels of the map: W·code + b. The listener
    reads that code from its branch's map by its 1×1 head, code = 2·(H·map + h) − 1. So the convolution that does both
    is (W·2H)·map + (b + W·(2h − 1)).

    Returns:
        The folded pairs of the whole network, the branch's among them.
    """
    branch = nn.Module()
    branch.audio_model = listener.branch
    branch_pairs = norm_pairs(branch)
    fold_norms(branch, branch_pairs)
    device = next(painter.parameters()).device
    painter.audio_model = listener.branch.to(device).to(memory_format=torch.channels_last).requires_grad_(True)
    first = painter.get_submodule("fuse_conv.0.double_conv.0.conv.0")
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    with torch.no_grad():
        half = first.in_channels // 2
        from_code = first.weight[:, half : half + CODE, 0, 0].clone()
        head, offset = listener.map_head.weight[:, :, 0, 0].to(device), listener.map_head.bias
        assert offset is not None
        first.weight[:, half:] = (from_code @ (2 * head))[:, :, None, None]
        first.bias += from_code @ (2 * offset.to(device) - 1)
    return pairs + branch_pairs


def train_joined(
    out: Path,
    network: UNet328,
    pairs: list[tuple[str, str]],
    pictures: Pictures,
    known: Rows,
    unknown: Rows,
    *,
    steps: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the whole U-Net a little on real features; ``known`` to train on, ``unknown`` to measure with.

    Returns:
        The state dict of an ordinary :class:`UNet328`, and what :func:`fit` returns; leaves ``joined.pt`` in ``out``.
    """

    def draw(rng: np.random.Generator, rows: Rows, n: int) -> tuple[np.ndarray, Tensor, np.ndarray]:
        windows, mouths = draw_windows(rng, rows, n)
        return rng.integers(0, len(pictures.frames), n), windows.to(pictures.device), mouths.numpy()

    def loss_of(step: int) -> Tensor:
        indices, audio, mouths = draw(np.random.default_rng((8, step)), known, BATCH)
        return weighted_l1(
            network(pictures.image(indices), audio), pictures.truth(indices, mouths), pictures.weights(indices)
        )

    @torch.no_grad()
    def measure() -> dict[str, float]:
        indices, audio, mouths = draw(np.random.default_rng(9), unknown, 16)
        return figures(pictures, indices, network(pictures.image(indices), audio), pictures.truth(indices, mouths))

    state = fit(
        out / "joined.pt", network, loss_of, name="joined", steps=steps, rate=1.2e-3, measure=measure, measure_every=50
    )
    return unfolded_state(state["average"], UNet328("ave", width=network.width), pairs), state
