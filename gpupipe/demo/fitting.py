"""The training loop that the stages share, and its checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpupipe.files import replacing

logger = logging.getLogger(__name__)


def rate_share(done: float) -> float:
    """The learning rate's share of its peak: up over 4 %, level to 55 %, then down as a half cosine.

    It depends on nothing but how far the training is, so that one that is stopped may go on with another length.
    """
    if done < 0.04:
        return (done + 0.001) / 0.041
    return 0.5 + 0.5 * float(np.cos(np.pi * max(0.0, done - 0.55) / 0.45))


def save(state: Any, path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def descend(
    optimiser: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    *,
    name: str,
    first: int = 0,
    steps: int,
    rate: float,
    clip: float,
) -> Iterator[tuple[int, float]]:
    """Take the steps ``first`` … ``steps`` − 1 of a training.

    Args:
        loss_of: step → loss.
        rate: the learning rate at its peak; see :func:`rate_share`.
        clip: the greatest norm of the gradients.

    Yields:
        after each step how many are done, and the loss, smoothed over some twenty steps.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    began, recent = time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * rate_share(step / steps)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        value, done = loss.item(), step + 1
        recent = recent + 0.05 * (value - recent) if recent else value
        if done % 10 == 0:
            pace = (time.monotonic() - began) / (done - first)
            left = pace * (steps - done) / 60
            logger.info(
                "%s: step %d of %d, loss %.5f, %.2f s a step, %.0f min left", name, done, steps, recent, pace, left
            )
        yield done, recent


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
    first, history = 0, []
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location=parameters[0].device)
        first, history, average = state["step"], state["history"], state["average"]
        network.load_state_dict(state["network"])
        if first >= steps:
            return state
        optimiser.load_state_dict(state["optimiser"])
    for step, recent in descend(optimiser, loss_of, name=name, first=first, steps=steps, rate=rate, clip=0.5):
        keep = min(0.99, step / (step + 9))
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                average[key].lerp_(tensor, 1 - keep)
        if step % save_every and step != steps:
            continue
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
        save(state, path)
    return state
