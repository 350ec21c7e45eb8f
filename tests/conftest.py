"""What tests share: markers, golden files, seeded checkpoints, synthetic templates, a clip to render, and a farm."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

# Before torch is loaded: OpenMP's threads wait for work by spinning, which beside another load, or on fewer cores than
# there are threads, makes small networks twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cv2
import numpy as np
import pytest
import torch

# Triton's interpreter runs the kernels where no GPU does; it has to be chosen before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
from clips import FRAMES, write_click
from farming import Jobs, farm, three_jobs
from parity import opencv_resize
from template_videos import pictures, write_video

from gpupipe import FrameGenerationPipeline, UNetModel, avatar, fallbacks
from gpupipe.benchmarks import reference_loop
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import EngineName
from gpupipe.engines.remembered import remember
from gpupipe.models import MODES, Mode, UNet328
from gpupipe.stages import ENCODE_THREAD

interpreter.mend()

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

MakeCheckpoint = Callable[..., Path]
MakeModel = Callable[..., UNetModel]
MakeTemplate = Callable[..., Path]


# ── markers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow (minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The slowest file first: begun last, it would keep one worker busy after the others are done.
    items.sort(key=lambda item: item.path.name != "test_simulated_gpu.py")
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--run-slow"):
        pytest.skip("takes minutes; run with --run-slow")
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        if os.environ.get("GPUPIPE_FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("needs a CUDA GPU, and GPUPIPE_FAIL_WITHOUT_CUDA=1 forbids to skip", pytrace=False)
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("shared") and not (SHARED / "golden").is_dir():
        pytest.skip(f"needs {SHARED}: the golden files and the real template are kept beside the project")


# ── what a machine may lack ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch.compile had its C++ compiler, whether it does or not."""
    monkeypatch.setattr("gpupipe.engines.compiled.obstacle", lambda device: None)


# ── the golden files and the real template ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files and real data beside the repository."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs {SHARED}: the golden files and the real template are kept beside the project")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def the_reference_s_resize() -> Iterator[None]:
    """On a processor whose OpenCV has no IPP, the reference loop resizes in float32, as with IPP."""
    if cv2.ipp.useIPP():
        yield
        return
    with mock.patch.object(reference_loop, "_resize", lambda image, *size: opencv_resize(image, size)):
        yield


@pytest.fixture(scope="session")
def golden_weights(shared: Path) -> ModuleType:
    """The module that makes the golden weights and inputs: ``state_dict``, ``unet_inputs``, ``wave``."""
    spec = importlib.util.spec_from_file_location("golden_weights", shared / "golden" / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def speaker(shared: Path) -> Path:
    """The real template directory: 150 frames of 1280×720, with landmarks and ``features_ave.npy``."""
    return shared / "data" / "speaker"


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def golden_checkpoint(golden_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``golden_checkpoint(mode="ave", seed=0)`` → .pth of the full-width golden weights, written once a session."""
    folder = tmp_path_factory.mktemp("golden_checkpoints")

    def make(mode: Mode = "ave", seed: int = 0) -> Path:
        path = folder / f"{mode}-{seed}.pth"
        if not path.exists():
            state = golden_weights.state_dict(f"unet328-{mode}", seed)
            torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``tiny_checkpoint(mode="ave", seed=0, width=1/8)`` → .pth of a small seeded U-Net, written once a session."""
    folder = tmp_path_factory.mktemp("tiny_checkpoints")

    def make(mode: Mode = "ave", seed: int = 0, width: float = 1 / 8) -> Path:
        path = folder / f"{mode}-{seed}-{width:g}.pth"
        if not path.exists():
            torch.save(seeded_network(mode, width=width, seed=seed).state_dict(), path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: MakeCheckpoint) -> MakeModel:
    """``tiny_model(mode="ave", seed=0, engine="auto")`` → UNetModel of a tiny checkpoint on the CPU, made once."""

    @functools.cache
    def make(mode: Mode = "ave", seed: int = 0, engine: EngineName = "auto") -> UNetModel:
        return UNetModel(tiny_checkpoint(mode, seed), mode, "cpu", engine=engine)

    return make


@pytest.fixture(autouse=True)
def own_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own record of fallbacks: the next one's does not list them."""
    monkeypatch.setattr(fallbacks, "_noted", {})


@pytest.fixture(scope="session", autouse=True)
def engine_figures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep engine measurements apart from the user's; for tiny networks they are preset to those of an idle CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for mode in MODES:
            figures = {"llvm": 1.0, "onnxruntime": 2.0, "eager": 9.0}
            remember(UNet328(mode, width=1 / 8), torch.device("cpu"), torch.float32, figures)
        yield


# ── synthetic templates ───────────────────────────────────────────────────────────────────────────────────────────────

BoxSpec = tuple[int, int, int]
"""xmin, ymin and the side, in pixels; may stand over the frame's edge."""

PARSING_COLOURS = ((0, 0, 255), (255, 255, 255), (0, 0, 254), (255, 0, 0), (0, 0, 0))
"""BGR. The first two keep the template's pixels; the third is one step off such a colour, and must not."""


@pytest.fixture(scope="session")
def make_template() -> MakeTemplate:
    """``make_template(folder, frames=5, *, size=(W, H), box=(xmin, ymin, side), parsing=False, seed=0)`` → folder.

    ``box`` is one box for all frames or a list with one for each; None puts a square of half the height in the middle.
    """
    return write_template


def write_template(
    folder: Path,
    frames: int = 5,
    *,
    size: tuple[int, int] = (192, 128),
    box: BoxSpec | list[BoxSpec] | None = None,
    parsing: bool = False,
    seed: int = 0,
) -> Path:
    """Write JPEG frames that all differ, landmark files of 110 lines, and parsing images on request."""
    width, height = size
    if box is None:
        box = ((width - height // 2) // 2, height // 4, height // 2)
    boxes: list[BoxSpec] = [box] * frames if isinstance(box, tuple) else list(box)
    assert len(boxes) == frames, f"{len(boxes)} boxes; expected one a frame, {frames}"
    rng = np.random.default_rng(seed)
    names = ("full_body_img", "landmarks", "parsing") if parsing else ("full_body_img", "landmarks")
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, place in enumerate(boxes):
        cv2.imwrite(str(folder / "full_body_img" / f"{i}.jpg"), _texture(rng, width, height))
        write_landmarks(folder / "landmarks" / f"{i}.lms", place, rng)
        if parsing:
            cells = rng.integers(len(PARSING_COLOURS), size=(8, 12))
            colours = np.array(PARSING_COLOURS, dtype=np.uint8)[cells]
            image = cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)
            cv2.imwrite(str(folder / "parsing" / f"{i}.png"), image)
    return folder


def write_landmarks(path: Path, box: BoxSpec, rng: np.random.Generator | None = None) -> None:
    """Write 110 fractional points: 1, 31 and 52 give ``box`` once truncated; the others would give another."""
    xmin, ymin, side = box
    rng = rng or np.random.default_rng(0)
    points = np.array([xmin, ymin]) + rng.integers(-20, side + 20, size=(110, 2))
    points[1, 0], points[31, 0], points[52, 1] = xmin, xmin + side, ymin
    fractions = np.where(points < 0, -0.75, 0.75)  # truncation is towards zero, rounding would be away from it
    path.write_text("".join(f"{x} {y}\n" for x, y in points + fractions))


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Coarse random colours, smoothed, with a little fine noise: not flat, and not too noisy for a JPEG."""
    coarse = rng.integers(256, size=(6, 9, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(scale=6, size=smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template's video: forty frames with B-frames, keyframes twelve apart, and open groups of pictures."""
    path = tmp_path_factory.mktemp("video") / "template.mp4"
    return write_video(path, pictures(), **{"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12:min-keyint=12"})


# ── a clip and its render ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Callable[..., Path]) -> FrameGenerationPipeline:
    return FrameGenerationPipeline(tiny_checkpoint(), "ave", "cpu", batch_size=4)


@pytest.fixture(scope="module")
def clip(make_template: MakeTemplate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A template of four frames, features for eleven, and sound of that length: silence with a click at 0.2 s."""
    folder = tmp_path_factory.mktemp("clip")
    make_template(folder / "template", frames=4, parsing=True)
    np.save(folder / "features.npy", np.abs(np.random.default_rng(0).standard_normal((FRAMES, 512))).astype(np.float32))
    write_click(folder / "click.wav", FRAMES / 25)
    return {"template": folder / "template", "features": folder / "features.npy", "sound": folder / "click.wav"}


@pytest.fixture
def render(pipeline: FrameGenerationPipeline, clip: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Render the clip to a name in ``out/``, with any argument changed."""
    (tmp_path / "out").mkdir()

    def call(name: str = "clip.mp4", **changed: Any) -> Path:
        arguments: dict[str, Any] = {
            "audio_features_path": clip["features"],
            "template_dir": clip["template"],
            "audio_path": clip["sound"],
            "output_path": tmp_path / "out" / name,
        }
        arguments |= changed
        path = pipeline.generate_video(**arguments)
        assert path == str(arguments["output_path"])
        return Path(path)

    return call


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Encoders' threads end, whatever happens."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(ENCODE_THREAD)]


@pytest.fixture
def captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured as CUDA graphs from the first batch on: clips of tests are short."""
    monkeypatch.setattr(avatar, "CAPTURE_AFTER", 0)


# ── jobs and the farm that did them ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def farm_jobs(
    tiny_checkpoint: MakeCheckpoint, make_template: MakeTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Jobs:
    return three_jobs(tmp_path_factory.mktemp("jobs"), tiny_checkpoint(), make_template)


@pytest.fixture(scope="session")
def farmed(farm_jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of all three; a test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp("farm") / "out"
    record = farm(farm_jobs, folder)
    assert (record.done, record.skipped, record.parked, record.frames) == (3, 0, 0, 42)
    return folder
