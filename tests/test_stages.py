"""Where a render's time goes: counted once, under the right stage, whichever thread does the work."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpupipe import FrameGenerationPipeline, InputError, OutputError
from gpupipe.stages import STAGES, UNTIMED, Stages, measuring


class Clock:
    """In place of the module ``time`` in stages.py: time passes only as a test says, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cpu_time = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu_time

    def work(self, seconds: float) -> None:
        self.now += seconds

    def work_in(self, stages: Stages, stage: str, seconds: float) -> None:
        with stages.time(stage):
            self.work(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gpupipe.stages.time", clock)
    return clock


def in_thread(name: str, work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join()


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_inside_another_counts_as_itself_alone(clock: Clock) -> None:
    stages = Stages()
    with stages.time("template half"):
        clock.work_in(stages, "template decode", 6)
        clock.work(2)
    clock.work_in(stages, "paste", 1)
    busy = stages.busy()
    assert list(busy) == ["template decode", "template half", "paste"], "in a frame's order"
    assert busy == {"template decode": 6, "template half": 2, "paste": 1}, "the half without the decoding in it"


def test_threads_add_up(clock: Clock) -> None:
    stages = Stages()
    all_at_work = threading.Barrier(4, action=lambda: clock.work(5))

    def work() -> None:
        with stages.time("speech half"):
            all_at_work.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stages.busy() == {"speech half": 20}
    assert clock.now == 5


def test_a_stage_that_raises_is_counted() -> None:
    stages = Stages()
    with pytest.raises(RuntimeError), stages.time("encode"), stages.time("mux"):
        raise RuntimeError
    with stages.time("encode"):
        pass
    assert set(stages.busy()) == {"encode", "mux"}
    assert all(seconds >= 0 for seconds in stages.busy().values())


def test_untimed_keeps_nothing() -> None:
    with UNTIMED.time("encode"):
        pass
    assert UNTIMED.busy() == {}
    assert UNTIMED.bound(cores=2) == "nothing: no stage was timed"


def test_timing_costs_little() -> None:
    """A batch is timed in about six places; a frame takes a millisecond where it is fastest."""
    stages = Stages()
    start = time.thread_time()
    for _ in range(1000):
        with stages.time("mux"):
            pass
    assert time.thread_time() - start < 0.1, "100 µs each would be far too much; about 4 µs are usual"


# ── what bounded the run ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_thread_with_the_most_to_do_bounds(clock: Clock) -> None:
    stages = Stages()
    in_thread("lane_0", lambda: clock.work_in(stages, "speech half", 2))
    in_thread("encode clip.mp4", lambda: clock.work_in(stages, "encode", 6))
    clock.cpu_time = 4
    assert stages.bound(cores=5) == "the encoders (75% busy), encode most of all; the cores 10% busy"
    in_thread("lane_0", lambda: clock.work_in(stages, "speech half", 8))
    assert stages.bound(cores=5).startswith("the lanes (62% busy)")


def test_lanes_are_busy_as_one(clock: Clock) -> None:
    """Two that are half busy are not one that is busy all the time."""
    stages = Stages()
    in_thread("lane_0", lambda: clock.work_in(stages, "speech half", 4))
    in_thread("lane_1", lambda: clock.work_in(stages, "speech half", 2))
    in_thread("encode clip.mp4", lambda: clock.work_in(stages, "encode", 4))
    assert stages.bound(cores=4).startswith("the encoders (40% busy)")


def test_busy_cores_bound(clock: Clock) -> None:
    stages = Stages()
    clock.work_in(stages, "speech half", 10)
    clock.cpu_time = 18
    assert stages.bound(cores=2) == "the cores (90% busy), speech half most of all"
    clock.cpu_time = 17.5
    assert stages.bound(cores=2).startswith("the main thread (100% busy)")


# ── the trace ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trace_as_chrome_reads_it(clock: Clock, tmp_path: Path) -> None:
    with measuring(tmp_path / "trace.json") as stages:
        with stages.time("template half"):
            clock.work_in(stages, "template decode", 2)
            clock.work(1)
        in_thread("lane_0", lambda: clock.work_in(stages, "paste", 4))
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"], "a temporary name"
        assert not (tmp_path / "trace.json").exists()
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    work = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert {name: names[event["tid"]] for name, event in work.items()} == {
        "template half": "MainThread",
        "template decode": "MainThread",
        "paste": "lane_0",
    }
    microseconds = {name: (event["ts"], event["dur"]) for name, event in work.items()}
    assert microseconds == {"template half": (0, 3e6), "template decode": (0, 2e6), "paste": (3e6, 4e6)}


def test_no_trace_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), measuring(tmp_path / "trace.json"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match=r"trace\.json: cannot be written"), measuring(tmp_path / "no" / "trace.json"):
        pytest.fail("something was rendered")


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeEvent:
    """A CUDA event on a GPU whose clock starts at a thousand seconds and runs ten times as fast as the host's."""

    def __init__(self, clock: Clock, enable_timing: bool) -> None:
        assert enable_timing
        self.clock = clock

    def record(self, stream: object) -> None:
        self.moment = 1000 + 10 * self.clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.moment - self.moment) * 1000


def test_gpu_stages_are_timed_by_events(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "Event", functools.partial(FakeEvent, clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    gpu = torch.device("cuda", 0)
    stages = Stages(trace=True)
    with stages.time("template half", gpu):
        clock.work_in(stages, "template decode", 2)  # on the host, meanwhile
        with stages.time("paste", gpu):
            clock.work(1)
    half_of_the_gpu = 10 * 2  # seconds: without the paste in it, with what the host did meanwhile
    assert stages.busy() == {"template decode": 2, "template half": half_of_the_gpu, "paste": 10 * 1}
    assert stages.bound(cores=64).startswith("the GPU (")
    clock.cpu_time = 64 * clock.now
    assert stages.bound(cores=64).startswith("the GPU ("), "busy cores do not hide a busy GPU"
    stages.write_trace(tmp_path / "trace.json")
    assert '"GPU"' in (tmp_path / "trace.json").read_text()


@pytest.mark.cuda
@pytest.mark.hardware
def test_events_of_a_real_gpu() -> None:
    gpu = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=gpu)
    stages = Stages()
    with stages.time("speech half", gpu):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    launched = time.perf_counter()
    busy = stages.busy()["speech half"]
    assert 0 < busy <= time.perf_counter() - stages._start
    assert time.perf_counter() - launched < 60


# ── in a render ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Callable[..., Path]) -> FrameGenerationPipeline:
    return FrameGenerationPipeline(tiny_checkpoint(), "ave", "cpu", engine="eager", batch_size=2)


@pytest.fixture
def arguments(make_template: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "features.npy", np.zeros((9, 512), np.float32))
    template = make_template(tmp_path / "template", frames=3)
    return {"audio_features_path": tmp_path / "features.npy", "template_dir": template, "audio_path": None}


def test_a_render_tells_where_its_time_went(
    pipeline: FrameGenerationPipeline, arguments: dict[str, Any], tmp_path: Path
) -> None:
    pipeline.generate_video(**arguments, output_path=tmp_path / "clip.mp4", profile=tmp_path / "trace.json")
    record = pipeline.last_render
    assert record is not None
    assert tuple(record.busy) == STAGES
    assert all(0 < seconds < record.seconds * (torch.get_num_threads() + 1) for seconds in record.busy.values())
    assert record.bound.startswith("the ")
    assert json.loads(json.dumps(record.as_dict()))["busy"] == record.busy
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    count = {stage: sum(event["name"] == stage for event in events) for stage in STAGES}
    assert count["speech half"] == count["paste"] == 5, "batches"
    assert count["mux"] >= 2, "packets, and the end"


def test_frames_alone_are_not_encoded(
    pipeline: FrameGenerationPipeline, arguments: dict[str, Any], tmp_path: Path
) -> None:
    del arguments["audio_path"]
    pipeline.generate_frames_only(**arguments, output_dir=tmp_path / "frames")
    assert pipeline.last_render is not None
    assert set(pipeline.last_render.busy) == {"template decode", "template half", "speech half", "paste"}


def test_unwritable_trace(
    pipeline: FrameGenerationPipeline, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.unet_model.engine, "decode", lambda *_: pytest.fail("a frame was rendered"))
    with pytest.raises(InputError, match=r"trace\.json: cannot be written"):
        pipeline.generate_video(
            **arguments, output_path=tmp_path / "clip.mp4", profile=tmp_path / "absent" / "trace.json"
        )
    assert not (tmp_path / "clip.mp4").exists()
