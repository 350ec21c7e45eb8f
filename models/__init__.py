"""The networks: as they are trained, rearranged for inference, and read from checkpoints.

    unet328, audio_encoder   the networks as they are trained
    checkpoint, pickles      how their checkpoints are read
    fold, hoisted            the U-Net with batch norms folded, and in two halves

Nothing here knows of clips or commands.
"""

from gpupipe.models.checkpoint import load_state_dict, load_unet
from gpupipe.models.unet328 import AUDIO_SHAPES, MODES, Mode, UNet328

__all__ = ["AUDIO_SHAPES", "MODES", "Mode", "UNet328", "load_state_dict", "load_unet"]
