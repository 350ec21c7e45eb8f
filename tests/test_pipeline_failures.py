"""Renders that fail: told before a frame is rendered where that can be known, and nothing is left of them."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import FRAMES

from gpupipe import FrameGenerationPipeline, InputError, OutputError
from gpupipe.video.encode import VideoWriter
from gpupipe.video.segments import SegmentPool

MakeTemplate = Callable[..., Path]


def text_file(folder: Path) -> Path:
    (folder / "notes.wav").write_text("this is no sound\n")
    return folder / "notes.wav"


def picture_only(folder: Path) -> Path:
    with VideoWriter(folder / "silent.mp4", width=64, height=48) as writer:
        writer.write(torch.zeros(2, 72, 64, dtype=torch.uint8))
    return folder / "silent.mp4"


def nan_features(folder: Path) -> Path:
    values = np.zeros((5, 512), np.float32)
    values[3, 7] = np.nan
    np.save(folder / "nan.npy", values)
    return folder / "nan.npy"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "clip.mp4"


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("audio_features_path", lambda folder: folder / "absent.npy", r"absent\.npy: no such file of audio features"),
    ("audio_features_path", nan_features, r"nan\.npy: row 3 holds NaN"),
    ("template_dir", lambda folder: folder / "absent", r"absent: no such template directory"),
    ("audio_path", lambda folder: folder / "absent.wav", r"absent\.wav: no such sound file"),
    ("audio_path", text_file, r"notes\.wav: not a media file that FFmpeg reads"),
    ("audio_path", picture_only, r"silent\.mp4: has no sound track"),
    (
        "output_path",
        lambda folder: folder / "absent" / "clip.mp4",
        r"clip\.mp4: cannot be written: there is no folder .*absent$",
    ),
    ("output_path", a_file, r"clip\.mp4: cannot be written: Not a directory"),
    ("output_path", lambda folder: folder / "out" / ("a" * 300 + ".mp4"), r"a\.mp4: cannot be written: File name too"),
    ("output_path", lambda folder: folder, r"is a folder; expected the name of a file"),
    ("output_path", lambda folder: folder / "out" / "clip.xyz", r"clip\.xyz: suffix is '\.xyz'; expected \.mp4"),
    ("output_path", lambda folder: folder / "out" / "clip", r"clip: suffix is ''; expected \.mp4"),
    ("output_path", lambda folder: folder / "out" / "clip.yuv", r"clip\.yuv: suffix is '\.yuv'; expected \.mp4"),
    ("output_path", lambda folder: folder / "out" / "clip.h264", r"clip\.h264: suffix is '\.h264'; expected \.mp4"),
    ("output_path", lambda folder: folder / "out" / "clip.OGG", r"clip\.OGG: suffix is '\.OGG'; expected \.mp4"),
    ("start_frame", lambda folder: 4, r"start frame is 4; expected 0 to 3"),
    ("start_frame", lambda folder: -1, r"start frame is -1; expected 0 to 3"),
    ("crf", lambda folder: 52, r"crf is 52; expected 0"),
    ("crf", lambda folder: -1, r"crf is -1; expected 0"),
    ("fps", lambda folder: 0, r"fps is 0; expected more than 0"),
    ("fps", lambda folder: float("nan"), r"fps is nan; expected more than 0"),
    ("codec", lambda folder: "betamax", r"codec 'betamax' does not open here \(betamax: there is no such encoder\)"),
    ("codec", lambda folder: "aac", r"codec 'aac' does not open here \(aac: not a video encoder\)"),
]


@pytest.mark.parametrize(("argument", "spoil", "message"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_input(
    argument: str, spoil: Callable[[Path], Any], message: str, render: Callable[..., Path], tmp_path: Path,
    pipeline: FrameGenerationPipeline, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    value = spoil(tmp_path)
    monkeypatch.setattr(pipeline.unet_model.engine, "decode", lambda *_: pytest.fail("a frame was rendered"))
    with pytest.raises(InputError, match=message) as caught:
        render(**{argument: value})
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("way", ["its own name", "a link"])
def test_a_video_is_not_written_over_what_it_is_made_of(
    way: str, render: Callable[..., Path], clip: dict[str, Path], make_template: MakeTemplate, tmp_path: Path
) -> None:
    """Such as a film whose sound is to be spoken by another face."""
    film = Path(render())
    before = film.read_bytes()
    output = film
    if way == "a link":
        output = tmp_path / "out" / "link.mp4"
        output.symlink_to(film)
    with pytest.raises(InputError, match=rf"^{output}: is what it would be made of"):
        render(audio_path=film, output_path=output)
    assert film.read_bytes() == before
    face = make_template(tmp_path / "face", frames=FRAMES)
    shutil.rmtree(face / "full_body_img")
    template = shutil.move(film, face / "template.mp4")
    with pytest.raises(InputError, match=rf"^{template}: is what it would be made of"):
        render(template_dir=face, output_path=template)
    assert template.read_bytes() == before


def test_bad_template_file(render: Callable[..., Path], make_template: MakeTemplate, tmp_path: Path) -> None:
    template = make_template(tmp_path / "template", frames=20)
    image = template / "full_body_img" / "19.jpg"
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"19\.jpg: cannot be decoded"):
        render(template_dir=template)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("GPU is on fire"), InputError("bad"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("save_frames", [False, True])
@pytest.mark.usefixtures("no_thread_left")
def test_failure_while_rendering(
    save_frames: bool, batch: int, error: BaseException, render: Callable[..., Path], tmp_path: Path,
    pipeline: FrameGenerationPipeline, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The error is the one that is seen, what was there before stays, and the encoder's thread ends."""
    (tmp_path / "out" / "clip.mp4").write_text("old")
    engine, calls = pipeline.unet_model.engine, []
    decode = engine.decode

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > batch:
            raise error
        return decode(*arguments)

    monkeypatch.setattr(engine, "decode", failing)
    with pytest.raises(type(error)) as caught:
        render(save_frames=save_frames, frames_dir=tmp_path / "frames")
    assert caught.value is error
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["clip.mp4"]
    assert (tmp_path / "out" / "clip.mp4").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, r"clip\.mp4: cannot be written: No space"),
        (RuntimeError("encoder"), RuntimeError, "encoder"),
        (
            av.error.ArgumentError(errno.EINVAL, "Invalid argument", "avcodec_send_frame()"),
            InputError,
            r"clip\.mp4: (libx264|h264_nvenc) does not encode these frames \(Invalid argument\); expected another",
        ),
    ],
)
@pytest.mark.parametrize("frame", [0, 5, FRAMES - 1])
@pytest.mark.usefixtures("no_thread_left")
def test_failure_while_encoding(
    frame: int, error: Exception, expected: type[Exception], message: str, render: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    encode = SegmentPool.encode

    def failing(self: SegmentPool[np.ndarray], nv12: np.ndarray) -> list[av.Packet]:
        if self._frames == frame:
            raise error
        return encode(self, nv12)

    monkeypatch.setattr(SegmentPool, "encode", failing)
    with pytest.raises(expected, match=message):
        render()
    assert list((tmp_path / "out").iterdir()) == []


FULL_DISK = """
import resource, sys
import torch
from gpupipe import OutputError
from gpupipe.video.encode import VideoWriter

resource.setrlimit(resource.RLIMIT_FSIZE, [int(sys.argv[2])] * 2)  # a write beyond it fails as one on a full disk does
try:
    with VideoWriter(sys.argv[1], width=320, height=240, crf=0) as writer:
        for _ in range(40):
            writer.write(torch.randint(0, 256, (4, 360, 320), dtype=torch.uint8))
except OutputError as error:
    print(error)
else:
    sys.exit("nothing was raised")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the file size as Linux does")
@pytest.mark.parametrize("room", [100_000, 20], ids=["for some frames", "not for the header"])
def test_full_disk(room: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "clip.mp4"), str(room)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{tmp_path / 'clip.mp4'}: cannot be written: ")
    assert list(tmp_path.iterdir()) == []


def test_frames_that_cannot_be_written(
    pipeline: FrameGenerationPipeline, clip: dict[str, Path], render: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot be made"):
        pipeline.generate_frames_only(clip["features"], clip["template"], tmp_path / "file")
    with pytest.raises(OutputError, match="file: cannot be made"):
        pipeline.generate_reference_outputs(clip["features"], clip["template"], tmp_path / "file")
    with pytest.raises(OutputError, match="file: cannot be made"):
        render(save_frames=True, frames_dir=tmp_path / "file")
    assert list((tmp_path / "out").iterdir()) == []


def test_pipeline_refuses_what_its_parts_refuse(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint file"):
        FrameGenerationPipeline(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="blend is 'soft'"):
        FrameGenerationPipeline(tiny_checkpoint(), device="cpu", engine="torch", blend="soft")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        FrameGenerationPipeline(tiny_checkpoint(), "ave", "cpu", "torch")  # type: ignore[misc]
