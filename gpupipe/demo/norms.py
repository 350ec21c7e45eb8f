"""Batch norms folded into their convolutions for training, and written back into a checkpoint.

A norm costs more than half of a training step on a CPU. One that has seen a calibrating batch is folded into its
convolution, and when the checkpoint is saved it comes back as a norm that changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
