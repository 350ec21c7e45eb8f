"""How an engine is measured: its time on one core or one GPU, and whether it paints what the plainest one paints."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import Engine, make_engine, measure
from gpupipe.models import UNet328

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> UNet328:
    return seeded_network(width=1 / 8)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [([0.9, 0.3, 0.1, 0.2], 0.1), ([0.01, 0.3, 0.2, 0.25], 0.2)],
    ids=["of the best run", "not of the first, which allocates and tunes"],
)
def test_best_run_counts_but_not_the_first(seconds: list[float], best: float) -> None:
    assert measure._best(iter(seconds).__next__) == best


@pytest.fixture
def small_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image, index and audio that no engine looks at."""
    monkeypatch.setattr(measure, "_batch", lambda *_: (torch.zeros(1), torch.zeros(2), torch.zeros(1)))


@pytest.mark.usefixtures("small_batch")
@pytest.mark.parametrize("how", ["replayed", "launched"])
def test_each_run_on_a_gpu_is_waited_for(how: str, network: UNet328, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a graph's, as a render's are, where the engine can be captured."""
    said: list[str] = []

    def capture(step: object) -> tuple[Callable[[], None], None]:
        if how == "launched":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: said.append("replayed"), None

    monkeypatch.setattr("gpupipe.graphs.capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("waited"))
    monkeypatch.setattr(measure, "_SECONDS", 0)
    engine: Any = SimpleNamespace(
        device=torch.device("cuda"), encode=lambda image: {}, decode=lambda *_: said.append("launched")
    )
    measure._seconds(engine, network)
    assert said == [how, "waited"] * (1 + measure._RUNS)


@pytest.mark.usefixtures("small_batch")
def test_seconds_are_those_of_a_frame(network: UNet328, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_best", lambda once: (once(), 3.0)[1])
    engine: Any = SimpleNamespace(device=CPU, encode=lambda image: {}, decode=lambda *_: torch.zeros(2))
    assert measure._seconds(engine, network) == 1.5, "of a batch of two"


@pytest.mark.usefixtures("small_batch")
def test_mouths_are_compared_in_steps_of_255_whatever_their_type(network: UNet328) -> None:
    """uint8 is truncated: on the average, half a step is missing."""
    in_steps, of_one = (
        measure._levels(cast(Engine, SimpleNamespace(encode=lambda image: {}, decode=lambda *_, m=mouth: m)), network)
        for mouth in (torch.tensor([51, 102], dtype=torch.uint8), torch.tensor([51.5 / 255, 102.5 / 255]))
    )
    torch.testing.assert_close(in_steps, of_one)


def pictures() -> tuple[Tensor, Tensor]:
    """Mouths as two precise engines paint them, and noise of the same standard deviation, 50 steps."""
    generator = torch.Generator().manual_seed(0)
    noise, coarse = (torch.randn(4, 3, size, size, generator=generator) for size in (320, 20))
    return 50 * nn.functional.interpolate(coarse, scale_factor=16), 50 * noise


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"),
    [(torch.float32, 0.005, 0.04), (torch.float16, 0.06, 0.12), (torch.bfloat16, 0.1, 0.2)],
    ids=str,
)
def test_an_error_of_a_precision_s_size_still_agrees(dtype: torch.dtype, right: float, wrong: float) -> None:
    """As a share of the picture's standard deviation."""
    picture, noise = pictures()
    assert measure._agree(picture + right * noise, picture, dtype)
    assert not measure._agree(picture + wrong * noise, picture, dtype)


@pytest.mark.parametrize("dtype", measure._LARGEST_ERROR, ids=str)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (157, 143), (314, 290)])
@pytest.mark.parametrize("wrong", [0.0, torch.nan, "another place's"])
def test_one_wrong_tile_of_a_batch_is_seen(wrong: float | str, row: int, column: int, dtype: torch.dtype) -> None:
    picture, _ = pictures()
    painted = picture.clone()
    tile = painted[2, :, row : row + 6, column : column + 30]
    tile.copy_(picture[0, :, 100:106, 60:90] if isinstance(wrong, str) else torch.full_like(tile, wrong))
    assert not measure._agree(painted, picture, dtype)


def test_a_wrong_tile_between_two_windows_is_seen() -> None:
    picture = torch.zeros(1, 3, 320, 320)
    painted = picture.clone()
    painted[..., 15:25, 15:25] = 9
    assert not measure._agree(painted, picture, torch.float32)


def test_the_measurement_runs_the_engine(network: UNet328) -> None:
    engine = make_engine(network, device=CPU, engine="onnxruntime")
    assert 0 < measure._seconds(engine, network) < 10
