"""The networks: as they are trained, rearranged for inference, and read from checkpoints.

    unet328, audio_encoder   the trained networks
    checkpoint, pickles      reading their weights
    fold, hoisted, blocked   the U-Net rearranged: batch norms folded; in two halves; those with channels in blocks
"""

from gpupipe.models.checkpoint import load_state_dict, load_unet
from gpupipe.models.unet328 import AUDIO_SHAPES, MODES, Mode, UNet328

__all__ = ["AUDIO_SHAPES", "MODES", "Mode", "UNet328", "load_state_dict", "load_unet"]
