"""Folding batch norms into the convolutions before them: the same function, a third of the layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gpupipe.models.unet328 import UNet328


def fold_batch_norms(network: UNet328) -> UNet328:
    """A copy of ``network`` for inference whose batch norms are part of its convolutions, identities in their place.

    Args:
        network: in ``eval`` mode; it is left as it is.
    """
    if network.training:
        raise ValueError("the network is in training mode; expected eval mode, whose statistics are fixed")
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                conv, norm = module[i], module[i + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[i], module[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    audio: Any = network.audio_model
    audio.conv3, audio.bn3 = fuse_conv_bn_eval(audio.conv3, audio.bn3), nn.Identity()
    audio.conv5, audio.bn5 = fuse_conv_bn_eval(audio.conv5, audio.bn5), nn.Identity()
    return network.requires_grad_(False)
