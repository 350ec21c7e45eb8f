"""A look into a step: a profiler's trace with the stages named, or one bare step for a kernel profiler."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpupipe.benchmarks.bench_stages import Step
from gpupipe.errors import OutputError
from gpupipe.files import replacing

STEPS = 3


@contextlib.contextmanager
def named(name: str, device: torch.device) -> Iterator[None]:
    """A range of this name for PyTorch's profiler and, on a CUDA device, by NVTX for NVIDIA's profilers."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(record_function(name))
        if device.type == "cuda":
            torch.cuda.nvtx.range_push(name)
            stack.callback(torch.cuda.nvtx.range_pop)
        yield


@torch.inference_mode()
def run_step(step: Step) -> None:
    """Run every stage once, in a frame's order, each in its own range; waits for a CUDA device."""
    every = torch.arange(len(step.frames))
    for stage in step.stages:
        with named(stage.name, step.device):
            stage.run(every)
    if step.device.type == "cuda":
        torch.cuda.synchronize(step.device)


def write_trace(step: Step, path: Path) -> str:
    """Profile a few steps, after one to warm up, and write a trace for Perfetto or chrome://tracing.

    Here stages run one after another, so that each can be seen by itself; ``gpupipe render --profile`` shows how they
    overlap in a render.

    Returns:
        The profiler's table of the most expensive operations.

    Raises:
        OutputError: the trace cannot be written.
    """
    cuda = step.device.type == "cuda"
    run_step(step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for number in range(STEPS):
            with named(f"step {number}", step.device):
                run_step(step)
    with replacing(path) as temporary:
        _export(profiler, temporary, path)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def _export(profiler: profile, temporary: Path, path: Path) -> None:
    """Write a trace into the temporary file; without room PyTorch only logs that it failed."""
    try:
        profiler.export_chrome_trace(str(temporary))
    finally:
        temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)  # renamed to its name if all went well
    content = b""
    with contextlib.suppress(OSError, EOFError):  # as of a compressed file that is cut short
        content = gzip.decompress(temporary.read_bytes()) if path.suffix == ".gz" else temporary.read_bytes()
    if not content.rstrip().endswith(b"}"):
        raise OutputError(f"{path}: cannot be written: the profiler wrote no whole trace; expected room on the disk")


def run_bare_step(step: Step) -> None:
    """One step to warm up, then one between ``cudaProfilerStart`` and ``cudaProfilerStop``: nothing is timed or tuned.

    For ``ncu --profile-from-start off`` and ``nsys profile --capture-range=cudaProfilerApi``.
    """
    run_step(step)
    if step.device.type != "cuda":
        run_step(step)
        return
    torch.cuda.profiler.start()
    try:
        run_step(step)
    finally:
        torch.cuda.profiler.stop()
