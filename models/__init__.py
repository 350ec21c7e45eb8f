"""The networks as they are trained, and how their checkpoints are read; nothing of clips or commands."""

from gpupipe.models.checkpoint import load_state_dict, load_unet
from gpupipe.models.unet328 import AUDIO_SHAPES, MODES, Mode, UNet328

__all__ = ["AUDIO_SHAPES", "MODES", "Mode", "UNet328", "load_state_dict", "load_unet"]
