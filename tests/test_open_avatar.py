"""An avatar that is opened once renders clip after clip as the template's folder would."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from gpupipe import Avatar, FrameGenerationPipeline, InputError, OutputError, SpeechFeatures
from gpupipe.kernels.nv12 import from_nv12
from gpupipe.stages import UNTIMED
from gpupipe.video.encode import VideoWriter
from gpupipe.video.segments import HostEncoder

Clip = dict[str, Path]
MakeTemplate = Callable[..., Path]
Render = Callable[..., Path]


@pytest.fixture
def avatar(pipeline: FrameGenerationPipeline, clip: Clip) -> Avatar:
    return pipeline.open_avatar(clip["template"])


@pytest.fixture
def other_features(clip: Clip, tmp_path: Path) -> Path:
    np.save(tmp_path / "other.npy", np.load(clip["features"])[::-1])
    return tmp_path / "other.npy"


def test_videos_have_the_same_bytes(render: Render, avatar: Avatar, other_features: Path) -> None:
    for number, changed in enumerate([{}, {"audio_features_path": other_features, "start_frame": 1}, {"fps": 30}]):
        kept = render(f"kept{number}.mp4", template_dir=avatar, **changed)
        assert kept.read_bytes() == render(f"opened{number}.mp4", **changed).read_bytes()
    assert kept.read_bytes() != render("plain.mp4").read_bytes()


def test_second_clip_computes_nothing_of_the_template(
    render: Render, avatar: Avatar, pipeline: FrameGenerationPipeline
) -> None:
    busy = []
    for name in ("first.mp4", "second.mp4"):
        render(name, template_dir=avatar)
        assert pipeline.last_render is not None
        busy.append(set(pipeline.last_render.busy))
    assert busy[0] - busy[1] == {"template half"}
    assert {"speech half", "paste", "encode"} <= busy[1]
    assert avatar.template.stages is UNTIMED, "what is measured afterwards is not the clip's"


def images(pipeline: FrameGenerationPipeline, clip: Clip, template: Path | Avatar, folder: Path) -> np.ndarray:
    """The clip's frames as images without loss."""
    paths = pipeline.generate_frames_only(clip["features"], template, folder, image_format="png")
    return np.stack([cv2.imread(path) for path in paths])


def test_frames_are_converted_where_the_other_format_is_needed(
    pipeline: FrameGenerationPipeline, clip: Clip, avatar: Avatar, tmp_path: Path
) -> None:
    """An avatar in BGR gives the folder's images to the bit; one for video, what its NV12 says of them."""
    expected = images(pipeline, clip, clip["template"], tmp_path / "opened")
    in_bgr = pipeline.open_avatar(clip["template"], pixel_format="bgr")
    assert np.array_equal(images(pipeline, clip, in_bgr, tmp_path / "bgr"), expected)
    assert avatar.pixel_format == "nv12"
    batches = pipeline.generator.stream(avatar, SpeechFeatures(clip["features"]), pixel_format="nv12")
    converted = torch.cat([from_nv12(batch) for batch in batches]).numpy()
    assert np.array_equal(images(pipeline, clip, avatar, tmp_path / "nv12"), converted)
    assert not np.array_equal(converted, expected)


def test_video_of_an_avatar_in_bgr(render: Render, pipeline: FrameGenerationPipeline, clip: Clip) -> None:
    """Converting whole frames gives what converting the box alone gives."""
    in_bgr = pipeline.open_avatar(clip["template"], pixel_format="bgr")
    assert render("bgr.mp4", template_dir=in_bgr).read_bytes() == render("opened.mp4").read_bytes()


def test_parsing_is_chosen_when_the_avatar_is_opened(
    render: Render, pipeline: FrameGenerationPipeline, clip: Clip, avatar: Avatar
) -> None:
    parsed = pipeline.open_avatar(clip["template"], use_parsing=True)
    expected = render("opened.mp4", use_parsing=True).read_bytes()
    assert render("parsed.mp4", template_dir=parsed).read_bytes() == expected
    assert render("plain.mp4", template_dir=avatar).read_bytes() != expected
    with pytest.raises(InputError, match=r"full_body_img: was opened without parsing; expected open_avatar"):
        render("refused.mp4", template_dir=avatar, use_parsing=True)


def test_odd_sizes(
    render: Render, pipeline: FrameGenerationPipeline, make_template: MakeTemplate, tmp_path: Path
) -> None:
    template = make_template(tmp_path / "odd", frames=2, size=(191, 127))
    odd = pipeline.open_avatar(template)
    assert odd.pixel_format == "bgr"
    opened = render("opened.mp4", template_dir=template)
    assert render("kept.mp4", template_dir=odd).read_bytes() == opened.read_bytes()
    with pytest.raises(InputError, match=r"frames are 191×127; expected pixel format 'bgr'"):
        pipeline.open_avatar(template, pixel_format="nv12")


def test_avatar_of_another_network_is_refused(
    render: Render, avatar: Avatar, tiny_checkpoint: Callable[..., Path], clip: Clip, tmp_path: Path
) -> None:
    other = FrameGenerationPipeline(tiny_checkpoint(seed=1), "ave", "cpu")
    with pytest.raises(InputError, match="was opened for another network"):
        other.generate_video(clip["features"], avatar, None, tmp_path / "other.mp4")
    assert not (tmp_path / "other.mp4").exists()


def test_memory_is_freed_with_the_avatar(pipeline: FrameGenerationPipeline, clip: Clip, render: Render) -> None:
    avatar = pipeline.open_avatar(clip["template"])
    render(template_dir=avatar)
    gone = weakref.ref(avatar), weakref.ref(avatar.template)
    gc.disable()
    try:
        del avatar
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def stopped_by_the_caller(pipeline: FrameGenerationPipeline, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    return {"progress": stop}


def an_engine_that_fails(pipeline: FrameGenerationPipeline, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def fail(*_: object) -> None:
        raise RuntimeError("engine")

    patch.setattr(pipeline.unet_model.engine, "decode", fail)
    return {}


def an_encoder_that_fails(pipeline: FrameGenerationPipeline, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def fail(*_: object) -> None:
        raise MemoryError("encoder")

    patch.setattr(HostEncoder, "encode", fail)
    return {}


def a_full_disk(pipeline: FrameGenerationPipeline, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(VideoWriter, "_mux", fail)
    return {}


def an_interrupt_at_the_end(pipeline: FrameGenerationPipeline, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    stop = VideoWriter._stop

    def interrupted(writer: VideoWriter, error: BaseException | None) -> None:
        if error is None:
            raise KeyboardInterrupt
        stop(writer, error)

    patch.setattr(VideoWriter, "_stop", interrupted)
    return {}


@pytest.mark.parametrize(
    "spoil",
    [stopped_by_the_caller, an_engine_that_fails, an_encoder_that_fails, a_full_disk, an_interrupt_at_the_end],
)
def test_memory_is_freed_after_a_failure(
    spoil: Callable[..., dict[str, Any]], pipeline: FrameGenerationPipeline, clip: Clip,
    render: Render, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An avatar takes gigabytes, and Python's search for cycles does not see them."""
    arguments = spoil(pipeline, monkeypatch)
    avatar = pipeline.open_avatar(clip["template"])
    gone = weakref.ref(avatar), weakref.ref(avatar.template)
    gc.disable()
    try:
        try:
            render(template_dir=avatar, **arguments)
        except (KeyboardInterrupt, RuntimeError, MemoryError, OutputError):
            pass
        else:
            pytest.fail("nothing failed")
        del avatar
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
