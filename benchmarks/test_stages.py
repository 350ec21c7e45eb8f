"""The stages under pytest-benchmark, for work on one of them:

pytest benchmarks/test_stages.py --benchmark-compare --benchmark-autosave -k paste
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gpupipe.benchmarks.bench_stages import Step
from gpupipe.benchmarks.scenario import bundled
from gpupipe.unet_model import UNetModel

STAGES = ("decode", "crop", "network, template half", "network, speech half", "paste", "convert", "encode")
FRAMES = 8


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    """The bundled avatar, on the GPU if there is one."""
    folder: Path = tmp_path_factory.mktemp("stages")
    scenario = bundled(folder)
    with torch.inference_mode():
        return Step(scenario, UNetModel(scenario.checkpoint), folder, FRAMES)


@pytest.mark.parametrize("name", STAGES)
def test_stage(name: str, step: Step, benchmark: BenchmarkFixture) -> None:
    """Eight frames at once, on one lane; a GPU is waited for."""
    [stage] = [stage for stage in step.stages if stage.name == name]
    every = torch.arange(FRAMES)

    @torch.inference_mode()
    def once() -> None:
        stage.run(every)
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)

    benchmark(once)
