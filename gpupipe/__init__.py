"""gpupipe: lip-synced talking-head video, rendered in batches on the GPU, and as fast as it can on a CPU."""

from pathlib import Path

# In the repository kernels/, models/ and benchmarks/ lie beside this folder. (Not again for gpupipe.gpupipe.)
if __name__ == "gpupipe" and not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from gpupipe.avatar import Avatar
from gpupipe.errors import CheckpointError, DeviceError, GpupipeError, InputError, OutputError
from gpupipe.features import SpeechFeatures, audio_windows
from gpupipe.frame_generator import FrameGenerator
from gpupipe.image_processor import ImageProcessor
from gpupipe.models import Mode
from gpupipe.pipeline import FrameGenerationPipeline, RenderRecord
from gpupipe.speech import SpeechEncoder
from gpupipe.template import Template
from gpupipe.unet_model import UNetModel
from gpupipe.versions import __version__ as __version__

__all__ = [
    "Avatar",
    "CheckpointError",
    "DeviceError",
    "FrameGenerationPipeline",
    "FrameGenerator",
    "GpupipeError",
    "ImageProcessor",
    "InputError",
    "Mode",
    "OutputError",
    "RenderRecord",
    "SpeechEncoder",
    "SpeechFeatures",
    "Template",
    "UNetModel",
    "audio_windows",
]
