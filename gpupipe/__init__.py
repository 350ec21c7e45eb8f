"""gpupipe: lip-synced talking-head video, rendered in batches on the GPU, and as fast as it can on a CPU."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from gpupipe.errors import CheckpointError, DeviceError, GpupipeError, InputError, OutputError
from gpupipe.features import SpeechFeatures, audio_windows
from gpupipe.frame_generator import FrameGenerator
from gpupipe.image_processor import ImageProcessor
from gpupipe.pipeline import FrameGenerationPipeline
from gpupipe.template import Template
from gpupipe.unet_model import UNetModel

try:
    __version__ = _version("gpupipe")
except _NotInstalled:  # imported from a source tree by its path
    __version__ = "0+unknown"

__all__ = [
    "CheckpointError",
    "DeviceError",
    "FrameGenerationPipeline",
    "FrameGenerator",
    "GpupipeError",
    "ImageProcessor",
    "InputError",
    "OutputError",
    "SpeechFeatures",
    "Template",
    "UNetModel",
    "audio_windows",
]
