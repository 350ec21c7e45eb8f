"""Stage 2: a narrow 328 U-Net that paints the character's mouth; stage 3: joined with the encoder of stage 1.

Two things make it cheap. First, drawing and hearing are learned apart: in stage 2 the audio branch is replaced by a map
that says the three mouth parameters outright, and since stage 1 reads those parameters from the branch's map by one
linear layer, that layer folds exactly into the first convolution that sees the map (:func:`join`). Second, batch norm
costs more than half of a step on a CPU: each norm is folded into its convolution after one calibrating pass, and
written back as a norm that changes nothing when the checkpoint is saved (:func:`fold_norms`, :func:`unfolded_state`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpupipe.demo import rig
from gpupipe.demo.mouth import PARAMETERS
from gpupipe.demo.train_encoder import Listener, Rows, draw_windows, rate_share
from gpupipe.models.unet328 import UNet328

logger = logging.getLogger("gpupipe.demo.train")

CODE = len(PARAMETERS)  # channels of the audio map that stage 2 uses; the rest are zero


# ── networks without norms ───────────────────────────────────────────────────────────────────────────────────────────


def norm_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of every convolution and the batch norm that was made after it, which is the one that follows it."""
    pairs, last = [], None
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name
        elif isinstance(module, nn.BatchNorm2d) and last is not None:
            pairs.append((last, name))
    return pairs


def fold_norms(network: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold each batch norm (its running statistics) into its convolution, in place; the norm becomes an identity."""
    for conv_name, norm_name in pairs:
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            offset = conv.bias if conv.bias is not None else torch.zeros_like(norm.bias)
            conv.weight.mul_(gain[:, None, None, None])
            conv.bias = nn.Parameter((offset - norm.running_mean) * gain + norm.bias)
        parent, _, leaf = norm_name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Identity())


def unfolded_state(state: dict[str, Tensor], like: nn.Module, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """The state of a folded network as one of ``like``, which has its norms: each norm adds the bias, nothing else."""
    own = like.state_dict()
    out = {name: value for name, value in state.items() if name in own}
    for conv_name, norm_name in pairs:
        bias = state[f"{conv_name}.bias"]
        if f"{conv_name}.bias" in own:
            out[f"{conv_name}.bias"] = torch.zeros_like(bias)
        norm = like.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm2d)
        out[f"{conv_name}.weight"] = state[f"{conv_name}.weight"] * (1 + norm.eps) ** 0.5  # the norm divides by it
        out[f"{norm_name}.weight"] = torch.ones_like(bias)
        out[f"{norm_name}.bias"] = bias
        out[f"{norm_name}.running_mean"] = torch.zeros_like(bias)
        out[f"{norm_name}.running_var"] = torch.ones_like(bias)
        out[f"{norm_name}.num_batches_tracked"] = torch.tensor(0)
    if out.keys() != own.keys():
        raise ValueError(f"states differ in {sorted(out.keys() ^ own.keys())[:4]}")
    return {name: out[name] for name in own}


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


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pictures:
    """Template frames as the pipeline prepares them, and the true picture for any mouth.

    Args:
        frames: the decoded template, uint8 (L, 432, 768, 3), BGR.
        points: its landmarks, float32 (L, 110, 2).
        device: where the tensors that it hands out are.
    """

    def __init__(self, frames: np.ndarray, points: np.ndarray, *, device: torch.device | None = None) -> None:
        self.frames = frames
        self.device = device or torch.device("cpu")
        self.boxes = [rig.crop_box(p) for p in points]
        inner = torch.cat([self._inner(frame, box) for frame, box in zip(frames, self.boxes, strict=True)])
        masked = inner.clone()
        masked[:, :, 5:310, 5:315] = 0
        self.inputs = torch.cat([inner, masked], dim=1)  # uint8 (L, 6, 320, 320)
        patches = []
        for index, (xmin, ymin, xmax, _) in enumerate(self.boxes):
            y0, y1, x0, x1 = rig.mouth_patch(index)
            scale = 328 / (xmax - xmin)
            at = [(y0 - ymin) * scale - 4, (y1 - ymin) * scale - 4, (x0 - xmin) * scale - 4, (x1 - xmin) * scale - 4]
            patches.append([min(320, max(0, round(a))) for a in at])
        self.patches = np.array(patches)  # rows and columns of the mouth in the 320×320 picture

    @staticmethod
    def _inner(frame: np.ndarray, box: tuple[int, int, int, int]) -> Tensor:
        xmin, ymin, xmax, ymax = box
        crop = torch.from_numpy(frame[ymin:ymax, xmin:xmax].transpose(2, 0, 1).astype(np.float32))[None]
        big = F.interpolate(crop, (328, 328), mode="bicubic", align_corners=False)
        return big.round().clamp(0, 255).to(torch.uint8)[:, :, 4:324, 4:324]

    def image(self, indices: np.ndarray) -> Tensor:
        """The network's images for these template frames: float32 (B, 6, 320, 320) in [0, 1]."""
        chosen = self.inputs[torch.from_numpy(indices)].to(self.device).float().div_(255)
        return chosen.contiguous(memory_format=torch.channels_last)

    def truth(self, indices: np.ndarray, mouths: np.ndarray) -> Tensor:
        """What should come out for these mouths (B, 3): float32 (B, 3, 320, 320) in [0, 1]."""
        drawn = [
            self._inner(rig.true_frame(self.frames[i], int(i), mouth), self.boxes[i])
            for i, mouth in zip(indices, mouths, strict=True)
        ]
        return torch.cat(drawn).to(self.device).float().div_(255)

    def weights(self, indices: np.ndarray) -> Tensor:
        """How much a pixel counts: (B, 1, 320, 320), 1, and 4 where the mouth can be."""
        out = torch.ones(len(indices), 1, 320, 320)
        for k, i in enumerate(indices):
            y0, y1, x0, x1 = self.patches[i]
            out[k, :, y0:y1, x0:x1] = 4
        return out.to(self.device)


# ── the loop that both stages share ──────────────────────────────────────────────────────────────────────────────────


def fit(
    path: Path,
    network: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    name: str,
    steps: int,
    rate: float,
    save_every: int = 50,
    measure: Callable[[], dict[str, float]] | None = None,
    measure_every: int = 200,
) -> dict[str, Any]:
    """Train, or go on training from ``path``; a running average of the weights is what counts.

    Args:
        loss_of: step → loss; draws its batch from the step's number, so that a stop changes nothing.
        measure: held-out figures of the averaged network, for the record.

    Returns:
        ``{"step", "average" (state dict), "history", …}``, as saved in ``path``.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=1e-4, betas=(0.9, 0.98))
    average = {key: value.clone() for key, value in network.state_dict().items()}
    step, history, recent = 0, [], 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location=parameters[0].device)
        step, history, average = state["step"], state["history"], state["average"]
        network.load_state_dict(state["network"])
        if step >= steps:
            return state
        optimiser.load_state_dict(state["optimiser"])
    began, first = time.monotonic(), step
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = rate * rate_share(step / steps)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        step += 1
        value = loss.item()
        recent = recent + 0.05 * (value - recent) if recent else value
        keep = min(0.99, step / (step + 9))
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                average[key].lerp_(tensor, 1 - keep)
        if step % 10 == 0:
            pace = (time.monotonic() - began) / (step - first)
            left = pace * (steps - step) / 60
            logger.info(
                "%s: step %d of %d, loss %.5f, %.2f s a step, %.0f min left", name, step, steps, recent, pace, left
            )
        if step % save_every == 0 or step == steps:
            if step % measure_every == 0 or step == steps:
                entry: dict[str, float] = {"step": step, "train_loss": round(recent, 5)}
                if measure is not None:
                    now = {key: value.clone() for key, value in network.state_dict().items()}
                    network.load_state_dict(average)
                    entry |= measure()
                    network.load_state_dict(now)
                history.append(entry)
                logger.info("%s held out: %s", name, entry)
            state = {
                "step": step,
                "network": network.state_dict(),
                "average": average,
                "optimiser": optimiser.state_dict(),
                "history": history,
            }
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    return state


def weighted_l1(painted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of (B, 3, H, W) under (B, 1, H, W)."""
    return ((painted - truth).abs() * weight).sum() / weight.sum() / 3


def figures(pictures: Pictures, indices: np.ndarray, painted: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR in decibels, over the pixels where a mouth can be and over all."""
    errors = []
    for k, i in enumerate(indices):
        y0, y1, x0, x1 = pictures.patches[i]
        errors.append((painted[k, :, y0:y1, x0:x1] - truth[k, :, y0:y1, x0:x1]).square().mean())

    def decibels(error: Tensor) -> float:
        return round(float(-10 * torch.log10(error)), 2)

    return {"mouth_psnr": decibels(torch.stack(errors).mean()), "psnr": decibels((painted - truth).square().mean())}


# ── stage 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_painter(
    out: Path, pictures: Pictures, mouths: np.ndarray, *, width: float, steps: int, batch: int = 4, rate: float = 3e-3
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
        indices, wanted = draw(np.random.default_rng((5, step)), batch)
        return weighted_l1(
            painted_for(network, indices, wanted), pictures.truth(indices, wanted), pictures.weights(indices)
        )

    @torch.no_grad()
    def measure() -> dict[str, float]:
        rng = np.random.default_rng(6)
        indices, wanted = rng.integers(0, count, 12), mouths[rng.integers(0, len(mouths), 12)]
        return figures(pictures, indices, painted_for(network, indices, wanted), pictures.truth(indices, wanted))

    state = fit(out / "painter.pt", network, loss_of, name="painter", steps=steps, rate=rate, measure=measure)
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
    batch: int = 4,
    rate: float = 1.2e-3,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the whole U-Net a little on real features; ``known`` to train on, ``unknown`` to measure with.

    Returns:
        The state dict of an ordinary :class:`UNet328`, and what :func:`fit` returns; leaves ``joined.pt`` in ``out``.
    """

    def draw(rng: np.random.Generator, rows: Rows, n: int) -> tuple[np.ndarray, Tensor, np.ndarray]:
        windows, mouths = draw_windows(rng, rows, n)
        return rng.integers(0, len(pictures.frames), n), windows.to(pictures.device), mouths.numpy()

    def loss_of(step: int) -> Tensor:
        indices, audio, mouths = draw(np.random.default_rng((8, step)), known, batch)
        return weighted_l1(
            network(pictures.image(indices), audio), pictures.truth(indices, mouths), pictures.weights(indices)
        )

    @torch.no_grad()
    def measure() -> dict[str, float]:
        indices, audio, mouths = draw(np.random.default_rng(9), unknown, 16)
        return figures(pictures, indices, network(pictures.image(indices), audio), pictures.truth(indices, mouths))

    state = fit(
        out / "joined.pt", network, loss_of, name="joined", steps=steps, rate=rate, measure=measure, measure_every=50
    )
    return unfolded_state(state["average"], UNet328("ave", width=network.width), pairs), state


def paste(frame: np.ndarray, box: tuple[int, int, int, int], painted: Tensor) -> np.ndarray:
    """The painted picture (3, 320, 320) in [0, 1] put back into its frame as the pipeline's reference does it.

    Args:
        frame: uint8 (H, W, 3), BGR; left as it is.
        box: ``(xmin, ymin, xmax, ymax)``, inside the frame.
    """
    xmin, ymin, xmax, ymax = box
    crop = torch.from_numpy(frame[ymin:ymax, xmin:xmax].transpose(2, 0, 1).astype(np.float32))[None]
    canvas = F.interpolate(crop, (328, 328), mode="bicubic", align_corners=False).round().clamp(0, 255)
    canvas[0, :, 4:324, 4:324] = (painted.float().cpu() * 255).floor()
    small = F.interpolate(canvas, (ymax - ymin, xmax - xmin), mode="bicubic", align_corners=False)
    out = frame.copy()
    out[ymin:ymax, xmin:xmax] = small.round().clamp(0, 255)[0].permute(1, 2, 0).to(torch.uint8).numpy()
    return out
