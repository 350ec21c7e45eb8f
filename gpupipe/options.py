"""Options that several commands share: their types and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from gpupipe import engines, models, seam

Checkpoint = Annotated[Path, Option(help="U-Net checkpoint, .pth or .safetensors.")]
TemplateFolder = Annotated[
    Path, Option(help="Template directory: full_body_img/ or template.mp4, landmarks/, optional parsing/.")
]
Features = Annotated[Path, Option(help="Speech features, .npy, one row a video frame.")]
OptionalFeatures = Annotated[Path | None, Option(help="Speech features, .npy, one row a frame.")]
Encoder = Annotated[Path | None, Option(help="AVE encoder checkpoint: makes the features from --audio.")]
Mode = Annotated[models.Mode, Option(help="Kind of speech features.")]
Fps = Annotated[float | None, Option(help="Frames a second; by default the features' rate: 25, or 20 for wenet.")]
StartFrame = Annotated[
    int, Option(help="Walk the template from this frame to its end and back; the clip begins with the one after it.")
]
UseParsing = Annotated[
    bool, Option("--use-parsing", help="Keep the template where the images in parsing/ are red or white.")
]

Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")]
Engine = Annotated[
    engines.EngineName, Option(help="How the network is run; auto takes the fastest here; torch is eager.")
]
Precision = Annotated[
    engines.Precision | None,
    Option(
        help="Network precision: by default float32 on a CPU and float16 on CUDA; some CPUs take float16 or bfloat16."
    ),
]
Exact = Annotated[
    bool,
    Option(
        "--exact",
        help="Compute as the reference does (on a CPU the default): float32, TF32 off, JPEGs decoded on the CPU.",
    ),
]
BatchSize = Annotated[int | None, Option(help="Frames rendered at once; by default what suits the device.")]
MemoryBudget = Annotated[
    int | None, Option(help="MB for data kept of template frames; by default a share of free memory.")
]

Blend = Annotated[
    seam.Blend,
    Option(help="How the mouth is pasted: with a feathered seam, or with a hard edge as the reference does."),
]
Feather = Annotated[float, Option(help="Width of the feathered seam, in pixels of the frame.")]
Crf = Annotated[int, Option(help="Quality, 0 (best) to 51.")]
Codec = Annotated[str, Option(help="auto, h264, hevc, av1, mjpeg, ffv1 (lossless) or an FFmpeg encoder.")]
Preset = Annotated[str | None, Option(help="Encoder preset: p1 (fastest) to p7 for NVENC, ultrafast … for libx264.")]
OutputFolder = Annotated[Path, Option(help="Folder that the files are written to.")]

Json = Annotated[bool, Option("--json", help="Print one machine-readable record as the last line.")]
Debug = Annotated[bool, Option("--debug", help="Log every batch; show tracebacks.")]
