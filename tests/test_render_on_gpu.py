"""Whole clips on a GPU against the same clips on the CPU: caches, streams, graphs, copies and encoders together."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from farming import results, write_jobs, write_speech

from gpupipe import FrameGenerationPipeline
from gpupipe.doctor import examine
from gpupipe.engines import EngineName
from gpupipe.farm import run_farm
from gpupipe.graphs import GraphedStep
from gpupipe.kernels.whole_block import gluon_obstacle
from gpupipe.video.decode import read_images

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("captured_at_once")]

FRAMES = 8
BOXES = [(60, 24, 71), (58, 20, 73), (130, 30, 80), (62, 22, 70)]  # the third reaches over the frame's edge
SIZE = (192, 128)


@pytest.fixture(scope="module")
def template(make_template: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("face") / "images", 4, size=SIZE, box=BOXES, parsing=True)


@pytest.fixture(scope="module")
def video_template(template: Path, make_template: Callable[..., Path]) -> Path:
    """The same face, as a video."""
    folder = make_template(template.parent / "video", 4, size=SIZE, box=BOXES)
    with av.open(str(folder / "template.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for path in sorted((folder / "full_body_img").iterdir()):
            with av.open(str(path)) as image:
                frame = next(image.decode(video=0)).reformat(format="yuv420p")
            frame.pts = None
            container.mux(stream.encode(frame))
            path.unlink()
        container.mux(stream.encode())
    (folder / "full_body_img").rmdir()
    return folder


@pytest.fixture
def rendered(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., np.ndarray]:
    """``rendered(device, template, use_parsing=…, frames=8, **options)`` → planes of the decoded video."""

    def render(
        device: str,
        template: Path,
        *,
        use_parsing: bool = False,
        frames: int = FRAMES,
        **options: Any,
    ) -> np.ndarray:
        features, sound = write_speech(tmp_path, "speech", frames)
        how: dict[str, Any] = {"engine": "eager", "batch_size": 3} | options
        pipeline = FrameGenerationPipeline(tiny_checkpoint(), device=device, **how)
        path = tmp_path / (device.replace(":", "-") + ".mkv")
        pipeline.generate_video(features, template, sound, path, codec="ffv1", use_parsing=use_parsing)
        return planes(path)

    return render


def planes(path: Path) -> np.ndarray:
    """uint8 (N, H·3/2, W)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])


def nearly_equal(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the order of float32 additions."""
    difference = np.abs(found.astype(int) - expected)
    return found.shape == expected.shape and difference.max() <= 2 and (difference == 0).mean() >= 0.999


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_parsing": True},
        {"blend": "none"},
        {"memory_budget": 0},
        {"memory_budget": 2_000_000},  # for the template, and the features of one frame
    ],
    ids=["plain", "parsing", "hard seam", "nothing kept", "some kept"],
)
def test_exact_render_matches_the_cpu(
    options: dict[str, Any], rendered: Callable[..., np.ndarray], template: Path
) -> None:
    found, expected = (rendered(device, template, exact=True, **options) for device in ("cuda", "cpu"))
    assert len(found) == FRAMES
    assert nearly_equal(found, expected)
    assert not nearly_equal(found[1:], expected[:-1]), "a frame later is another picture"


def test_video_template_matches_the_cpu(rendered: Callable[..., np.ndarray], video_template: Path) -> None:
    found, expected = (rendered(device, video_template, exact=True) for device in ("cuda", "cpu"))
    assert nearly_equal(found, expected)


def test_half_precision_is_near(rendered: Callable[..., np.ndarray], template: Path) -> None:
    """As a GPU renders by default."""
    found, expected = rendered("cuda", template, exact=False), rendered("cpu", template)
    assert psnr(found, expected) > 40
    assert psnr(found[1:], expected[:-1]) < 40, "a frame later is another picture"
    assert np.abs(found.astype(int) - expected).max() > 0, "it was computed in float32"


@pytest.mark.hardware
@pytest.mark.parametrize("engine", ["fused", "gluon"])
def test_engines_of_our_own_kernels(
    engine: EngineName, rendered: Callable[..., np.ndarray], template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the template's crop to the pasted NV12, in batches of template frames 1 2, 3 2 and 1: all are replayed, the
    second with a frame that is cached after the capture, and the third padded."""
    if engine == "gluon" and (reason := gluon_obstacle()) is not None:
        pytest.skip(reason)
    replay, replayed = GraphedStep.__call__, []
    monkeypatch.setattr(GraphedStep, "__call__", lambda *given: replayed.append(1) or replay(*given))
    found = rendered("cuda", template, frames=5, engine=engine, batch_size=2)
    assert len(replayed) == 3
    expected = rendered("cpu", template, frames=5)
    assert min(map(psnr, found, expected)) > 45, "each frame by itself"
    assert psnr(found[1:], expected[:-1]) < 40, "a frame later is another picture"
    untouched = (found[:, : SIZE[1]] == expected[:, : SIZE[1]]).all(axis=0)
    assert untouched[:16].all() and untouched[:, :48].all(), "outside of the boxes nothing may change"


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - expected).mean()))


def test_saved_images_match_the_cpu(tiny_checkpoint: Callable[..., Path], template: Path, tmp_path: Path) -> None:
    features, _ = write_speech(tmp_path, "speech", 4)
    read = {}
    for device in ("cuda", "cpu"):
        pipeline = FrameGenerationPipeline(tiny_checkpoint(), device=device, engine="eager", exact=True, batch_size=3)
        paths = pipeline.generate_frames_only(features, template, tmp_path / device)
        read[device] = np.stack([cv2.imread(str(path)) for path in paths])
    assert len(read["cuda"]) == 4
    np.testing.assert_allclose(read["cuda"].astype(int), read["cpu"], atol=6)  # a step before JPEG, a few after


def test_farm_matches_the_cpu(
    tiny_checkpoint: Callable[..., Path], template: Path, video_template: Path, tmp_path: Path
) -> None:
    """Batches across clips of two faces, one clip in two parts: each clip is rendered as on the CPU."""
    jobs: list[dict[str, Any]] = []
    for number, (face, frames) in enumerate([(template, 60), (video_template, 7), (template, 5)]):
        features, sound = write_speech(tmp_path, str(number), frames, seed=number)
        job = {"checkpoint": tiny_checkpoint(), "template": face, "audio": sound, "audio_features": features}
        jobs.append({key: str(value) for key, value in job.items()} | {"output": f"{number}.mkv"})
        jobs[-1] |= {"engine": "eager", "exact": True, "codec": "ffv1"}
    jobs[0]["fps"] = 5.0
    path = write_jobs(tmp_path / "jobs.jsonl", jobs)
    for device in ("cuda", "cpu"):
        record = run_farm(path, tmp_path / device, device=device, batch_size=4, part_seconds=1)
        assert (record.done, record.frames) == (3, 24)
        assert results(tmp_path / device)["0.mkv"]["parts"] == 2
    for job in jobs:
        assert nearly_equal(*(planes(tmp_path / device / str(job["output"])) for device in ("cuda", "cpu")))


def test_nothing_is_left_on_the_gpu(rendered: Callable[..., np.ndarray], template: Path) -> None:
    rendered("cuda", template, exact=True, frames=4)
    before = torch.cuda.memory_allocated()
    rendered("cuda", template, exact=True, frames=4)
    assert torch.cuda.memory_allocated() <= before


def test_farm_halves_batches_that_do_not_fit(
    tiny_checkpoint: Callable[..., Path], template: Path, tmp_path: Path
) -> None:
    """A farm whose batches do not fit goes on with smaller ones, and records it."""
    features, sound = write_speech(tmp_path, "speech", 20)
    job = {"checkpoint": str(tiny_checkpoint()), "template": str(template), "audio": sound, "audio_features": features}
    jobs = write_jobs(tmp_path / "jobs.jsonl", [job | {"output": "clip.mkv", "engine": "eager", "codec": "ffv1"}])
    total = torch.cuda.get_device_properties(0).total_memory

    def farm(name: str, batch_size: int) -> Any:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return run_farm(jobs, tmp_path / name, device="cuda", batch_size=batch_size, memory_budget=10_000_000)

    assert farm("enough", 2).done == 1
    torch.cuda.set_per_process_memory_fraction(2 * torch.cuda.max_memory_reserved() / total)
    try:
        record = farm("little", 16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (record.done, record.frames) == (1, 20)
    assert any("out of memory" in told.lower() for told in record.as_dict()["fallbacks"])
    assert len(planes(tmp_path / "little" / "clip.mkv")) == 20


def test_second_gpu_matches_the_cpu(rendered: Callable[..., np.ndarray], template: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    found, expected = (rendered(device, template, exact=True) for device in ("cuda:1", "cpu"))
    assert nearly_equal(found, expected)


def test_doctor_has_tried_what_it_says(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    monkeypatch.setattr("gpupipe.video.decode.note_fallback", noted.append)
    full_chroma = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # it is not asked for others
    cv2.imwrite(str(tmp_path / "0.jpg"), cv2.imread(str(template / "full_body_img" / "0.jpg")), full_chroma)
    read_images([tmp_path / "0.jpg"], device="cuda", exact=False)
    found = examine("cuda")
    assert found["render"]["device"].startswith("cuda")
    assert (found["can"]["nvJPEG"] == "yes") == (not noted), noted
