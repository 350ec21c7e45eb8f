"""Folding batch norms into the convolutions before them: the same function, a third of the layers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from gpupipe.models.unet328 import UNet328


def fold_batch_norms(network: UNet328) -> UNet328:
    """A copy of ``network`` for inference whose batch norms are part of its convolutions, identities in their place.

    Args:
        network: in ``eval`` mode; it is left as it is.

    Raises:
        ValueError: it is in training mode.
    """
    if network.training:
        raise ValueError("the network is in training mode; expected eval mode, whose statistics are fixed")
    network = copy.deepcopy(network)
    for sequence in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for i, (conv, norm) in enumerate(itertools.pairwise(sequence), start=1):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[i] = _fold(conv, norm)
    audio: Any = network.audio_model
    audio.bn3, audio.bn5 = _fold(audio.conv3, audio.bn3), _fold(audio.conv5, audio.bn5)
    return network.requires_grad_(False)


def folded(network: UNet328) -> UNet328:
    """``network`` itself if its batch norms are folded already, else :func:`fold_batch_norms` of it."""
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    return fold_batch_norms(network) if has_norms else network


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Identity:
    """Fold ``norm`` into ``conv``; returns what stands in its place."""
    assert norm.running_mean is not None and norm.running_var is not None
    statistics = norm.running_mean, norm.running_var, norm.eps
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    return nn.Identity()
