"""A file of jobs: one JSON object a line, with `gpupipe render`'s long options as keys.

    {"checkpoint": "a.pth", "template": "anna", "audio": "1.wav", "audio_features": "1.npy", "output": "1.mp4"}
    {"checkpoint": "a.pth", "template": "anna", "audio": "2.wav", "encoder": "ave.pth", "output": "de/2.mp4", "crf": 23}

Files are named relative to the folder that the command is run in, and ``output`` relative to the output folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gpupipe.engines import EngineName, Precision
from gpupipe.errors import InputError
from gpupipe.features import video_rate
from gpupipe.files import input_file
from gpupipe.models import Mode
from gpupipe.seam import FEATHER, Blend
from gpupipe.video.encode import SUFFIXES

INPUTS = ("checkpoint", "template", "audio_features", "encoder", "audio")
"""Keys of a job that name files which the clip is made of."""

_OF_THE_FARM = ("device", "batch_size", "memory_budget", "json", "debug")
_OF_ONE_RENDER = ("save_frames", "frames_dir", "profile")


class Job(BaseModel):
    """One clip to render. Unknown keys, other types and values out of range are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoint: Annotated[str, Field(min_length=1, description="U-Net checkpoint, .pth or .safetensors.")]
    template: Annotated[str, Field(min_length=1, description="Template directory.")]
    output: Annotated[str, Field(min_length=1, description="The video, relative to the output folder.")]
    audio_features: Annotated[str | None, Field(description="Speech features, .npy, one row a frame.")] = None
    encoder: Annotated[str | None, Field(description="AVE encoder checkpoint: makes the features from audio.")] = None
    audio: Annotated[str | None, Field(description="Sound: any file that FFmpeg reads.")] = None
    mode: Mode = "ave"
    start_frame: Annotated[int, Field(ge=0)] = 0
    fps: Annotated[float | None, Field(gt=0, le=1000, description="By default the features' rate.")] = None
    crf: Annotated[int, Field(ge=0, le=51)] = 20
    codec: str = "auto"
    preset: str | None = None
    blend: Blend = "feather"
    feather: Annotated[float, Field(ge=0, allow_inf_nan=False)] = FEATHER
    use_parsing: bool = False
    engine: EngineName = "auto"
    exact: bool = False
    precision: Precision | None = None

    @field_validator(*INPUTS, "output")
    @classmethod
    def _can_be_a_name(cls, name: str | None) -> str | None:
        """JSON spells what no file system does: a null byte, half of a surrogate pair."""
        if name is not None and ("\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name)):
            raise ValueError("expected the name of a file")
        return name

    @field_validator("output")
    @classmethod
    def _inside(cls, output: str) -> str:
        path = Path(output)
        if path.is_absolute() or ".." in path.parts or path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"expected a file inside the output folder that ends in {', '.join(SUFFIXES)}")
        if path.parts[0].startswith(".gpupipe"):
            raise ValueError("names that begin with .gpupipe are the farm's own")
        return str(path)

    @model_validator(mode="after")
    def _speech(self) -> Job:
        if (self.audio_features is None) == (self.encoder is None):
            raise ValueError("expected either audio_features or encoder (with audio), not both or neither")
        if self.encoder is not None and (self.audio is None or self.mode != "ave"):
            raise ValueError("encoder makes ave features from sound; expected audio with it, and mode ave")
        return self

    @property
    def frame_rate(self) -> float:
        """Frames a second of the video."""
        return video_rate(self.mode, self.fps)

    @property
    def id(self) -> str:
        """A name for the job's own files: the output names the job."""
        return hashlib.sha256(self.output.encode()).hexdigest()[:16]

    def inputs(self) -> list[Path]:
        """The files and directories that the clip is made of."""
        paths = (getattr(self, name) for name in INPUTS)
        return [Path(path) for path in paths if path is not None]

    def absolute(self) -> Job:
        """A job that means the same files in whatever folder a worker runs."""
        given = {name: getattr(self, name) for name in INPUTS}
        return self.model_copy(update={name: str(Path(path).absolute()) for name, path in given.items() if path})


def read_jobs(path: str | Path) -> list[Job]:
    """Read and check a file of jobs; empty lines are skipped.

    Raises:
        InputError: the file is missing or empty, or a line is no job, or two name one output. The message names the
            first wrong line, and says how many more there are.
    """
    path = input_file(path, "file of jobs")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a string of JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a file of jobs ({error})") from error
    jobs: list[Job] = []
    wrong: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = Job(**_object(line))
            if job.output in seen:
                raise ValueError(f"output {job.output} is also that of line {seen[job.output]}")
            seen[job.output] = number
            jobs.append(job)
        except ValidationError as error:
            wrong.append(f"{path}:{number}: {_first_error(error)}")
        except (ValueError, TypeError, RecursionError) as error:
            wrong.append(f"{path}:{number}: {error}")
    if wrong:
        raise InputError(wrong[0] + (f" (and {len(wrong) - 1} more lines are wrong)" if len(wrong) > 1 else ""))
    if not jobs:
        raise InputError(f"{path}: holds no jobs; expected one JSON object a line")
    return jobs


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"is {type(value).__name__}; expected a JSON object")
    return value


def _first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a job, in one line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if key in _OF_THE_FARM:
        return f"{key} is an option of the whole farm, not of a job"
    if key in _OF_ONE_RENDER:
        return f"{key} is an option of render that a farm does not have"
    if first["type"] == "extra_forbidden":
        return f"{key} is no key of a job; expected some of {', '.join(Job.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} is {first['input']!r}: {message}" if key else message
