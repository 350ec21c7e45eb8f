"""A farm on a real Ray cluster of this machine: two workers, one of which is killed on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farming import left_over, results, videos, write_jobs, write_speech

from gpupipe import InputError
from gpupipe.engines.remembered import remember
from gpupipe.errors import DeviceLostError, DiskFullError, GpupipeError
from gpupipe.farm import cluster, read_jobs, run_farm
from gpupipe.farm.residents import AvatarKey
from gpupipe.farm.worker import FeaturesTask, JoinTask, RenderTask
from gpupipe.models import load_unet

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(autouse=True)
def beside_other_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's workers leave the cores to other work, of which there is as long as tests run. And it has a signal handler
    of its own where a test starts it by itself."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def jobs(tiny_checkpoint: Any, make_template: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of two faces, two parts each."""
    folder = tmp_path_factory.mktemp("inputs")
    faces = [str(make_template(folder / f"face{n}", frames=4, size=(96, 64), seed=n)) for n in range(2)]
    lines = []
    for number in range(4):
        features, sound = write_speech(folder, str(number), 80, number)
        files = {"checkpoint": str(tiny_checkpoint()), "template": faces[number % 2]}
        speech = {"audio_features": features, "audio": sound}
        lines.append(files | speech | {"output": f"{number}.mp4", "engine": "eager", "fps": 5.0})
    return write_jobs(folder / "jobs.jsonl", lines)


def test_a_killed_worker_costs_nothing(
    jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_farm(jobs, tmp_path / "alone", part_seconds=2)
    monkeypatch.setattr(cluster, "BUNDLE_FRAMES", 10)
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_one() -> None:
        """The worker that records the first part."""
        while not killed:
            for record in out.glob(".gpupipe-farm/*/0*.mp4.json"):
                killed.append(int(json.loads(record.read_text())["facts"]["worker"].rpartition(":")[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    monkeypatch.delenv("GPUPIPE_CORES", raising=False)
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        record = run_farm(jobs, out, part_seconds=2, workers=2, device="cpu")
    except InputError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip(f"no cluster starts here: {error}")
    killer.join(1)
    assert killed and killed[0] != os.getpid()
    assert any("a worker died" in message for message in caplog.messages)
    assert (record.done, record.parked, record.workers) == (4, 0, 2)
    assert videos(out) == videos(tmp_path / "alone")
    assert left_over(out) == []
    rows = results(out).values()
    assert all(row["attempts"] == 0 for row in rows)
    again = run_farm(jobs, out, part_seconds=2, workers=2, device="cpu")
    assert (again.done, again.skipped) == (0, 4)


def test_what_a_cluster_must_not_change(
    jobs: Path, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends the command as before, workers' fallbacks are told, and joins, each a process, are not begun all at
    once."""
    monkeypatch.setenv("GPUPIPE_CACHE", str(tmp_path / "cache"))
    figures = {"llvm": 2.0, "onnxruntime": math.inf, "eager": 1.0}
    remember(load_unet(tiny_checkpoint(), "ave"), torch.device("cpu"), torch.float32, figures)
    lines = [json.loads(line) | {"engine": "auto"} for line in jobs.read_text().splitlines()]
    assign, joining, handlers = cluster._RayWorkers._assign, [], []

    def noting(self: cluster._RayWorkers) -> None:
        assign(self)
        handlers.append(signal.getsignal(signal.SIGTERM))
        joining.append(sum(worker is None for _, worker in self._running.values()))

    monkeypatch.setattr(cluster._RayWorkers, "_assign", noting)
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    record = run_farm(write_jobs(tmp_path / "auto.jsonl", lines), out, part_seconds=2, workers=1, device="cpu")
    assert record.done == 4
    assert set(handlers) == {before}
    assert max(joining) == 1
    assert any("engine onnxruntime failed when it was measured" in told for told in record.as_dict()["fallbacks"])


@pytest.mark.parametrize(
    ("machines", "count", "on_gpus", "cores"),
    [
        ([(8, 0)], 3, False, 2),
        ([(8, 0), (8, 0)], 2, False, 8),
        ([(8, 0), (8, 0)], 3, False, 4),
        ([(64, 0), (8, 0)], 2, False, 32),
        ([(64, 0), (16, 1), (16, 1)], 2, True, 16),
        ([(64, 1), (16, 4)], 5, True, 4),
        ([(64, 1), (16, 4)], 1, True, 64),
    ],
)
def test_workers_have_as_many_cores_as_let_all_start(
    machines: list[tuple[int, int]], count: int, on_gpus: bool, cores: int
) -> None:
    """A worker's cores are of one machine, and a machine without a GPU has room for none that needs one."""
    resources = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    assert cluster.cores_of_each(count, resources, on_gpus) == cores


def test_every_gpu_has_a_worker_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs that Ray is only told of: no network runs on them."""
    import ray

    class Seer:
        """Stands in for a worker, and tells which GPUs it is shown."""

        def __init__(self, options: dict[str, Any]) -> None:
            assert options["device"] == "cuda"

        def sees(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setattr(cluster, "_RayActor", Seer)
    try:
        ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        pytest.skip(f"no cluster starts here: {error}")
    try:
        workers = cluster._RayWorkers(ray, None, None, {"device": "cuda"}).workers  # type: ignore[arg-type]
        assert sorted(ray.get([worker.actor.sees.remote() for worker in workers])) == ["0", "1"]
        with pytest.raises(InputError, match="workers is 3; expected 1 to as many as the cluster has: 2 GPUs"):
            cluster._RayWorkers(ray, None, 3, {"device": "cuda"})  # type: ignore[arg-type]
    finally:
        ray.shutdown()


@pytest.mark.parametrize("workers", [None, 2])
def test_a_cluster_without_gpus_is_told_as_one(workers: int | None) -> None:
    """Not as a number of workers, which may not have been given."""
    ray: Any = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    with pytest.raises(InputError, match="device is 'cuda', but the cluster has no GPU; expected cpu"):
        cluster._RayWorkers(ray, None, workers, {"device": "cuda"})  # type: ignore[arg-type]


def test_workers_are_where_cores_are() -> None:
    """Not on a machine that has left, nor on a cluster's head without any. Each uses no more than it was given."""
    asked: list[dict[str, Any]] = []
    ray: Any = SimpleNamespace(
        nodes=lambda: [
            {"Alive": True, "Resources": {"memory": 1e9}},
            {"Alive": True, "Resources": {"CPU": 8.0}},
            {"Alive": False, "Resources": {"CPU": 64.0}},
        ],
        remote=lambda **options: asked.append(options) or (lambda _: SimpleNamespace(remote=lambda *_: None)),
    )
    for count, cores in ((None, 8), (2, 4)):
        workers = cluster._RayWorkers(ray, None, count, {"device": "cpu"}).workers  # type: ignore[arg-type]
        assert len(workers) == (count or 1)
        environment = {"env_vars": {"GPUPIPE_CORES": str(cores)}}
        assert asked[-2] == {"num_cpus": cores, "num_gpus": 0, "runtime_env": environment}
        assert asked[-1]["num_cpus"] == 0, "a join waits for no worker's cores"


def test_a_join_whose_process_dies_is_blamed_and_a_worker_is_given_more_of_its_face(
    jobs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A video that ends each process that joins it would otherwise be begun for ever."""
    from ray.exceptions import WorkerCrashedError

    joins: list[object] = []

    def get(ref: object) -> Any:
        if ref in joins:
            raise WorkerCrashedError
        return None, ["torch in place of Triton"]  # all that the worker has told so far, with each task

    def join(task: JoinTask) -> object:
        joins.append(object())
        return joins[-1]

    part: Any = SimpleNamespace(job=read_jobs(jobs)[1])
    tasks = [RenderTask([part]), RenderTask([part]), JoinTask(part.job, [], Path("1.mp4"))]
    actor = SimpleNamespace(do=SimpleNamespace(remote=lambda task: object()))
    ray: Any = SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}],
        remote=lambda **how: (
            lambda _: SimpleNamespace(
                remote=join if how.get("scheduling_strategy") == "SPREAD" else lambda options: actor
            )
        ),
        wait=lambda refs, num_returns: (refs[-1:], None),
        get=get,
    )
    lost, asked = [], []
    scheduler: Any = SimpleNamespace(
        next_task=lambda *, frames, last_avatar: (asked.append(last_avatar), tasks.pop(0) if tasks else None)[1],
        lost=lambda task, blamed: lost.append((type(task), blamed)),
        settle=lambda task, result: None,
    )
    assert cluster._RayWorkers(ray, scheduler, 1, {"device": "cpu"}).work() == 1
    assert lost == [(JoinTask, True)]
    assert asked[0] is None and set(asked[1:]) == {AvatarKey.of(part.job)}
    assert caplog.messages.count("torch in place of Triton") == 1


def test_a_worker_that_cannot_start_is_no_fault_of_the_jobs(
    jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        """Stands in for a worker on a machine where none can be."""

        def __init__(self, options: dict[str, Any]) -> None:
            raise RuntimeError("no driver here")

        def do(self, task: Any) -> Any:
            raise AssertionError("nothing has started")

    monkeypatch.setattr(cluster, "_RayActor", Broken)
    with pytest.raises(GpupipeError) as error:
        run_farm(jobs, tmp_path / "out", workers=1, device="cpu")
    if "cannot be reached" in str(error.value):
        pytest.skip(f"no cluster starts here: {error.value}")
    assert str(error.value) == "a worker cannot start (RuntimeError: no driver here)"
    rows = results(tmp_path / "out").values()
    assert {(row["status"], row["worker_deaths"]) for row in rows} == {("waiting", 0)}


def test_workers_killed_for_memory_are_replaced(jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's memory monitor, told that any use is too much. Each had two tasks of the job, and died on one."""

    class Idle:
        """Stands in for a worker that is at its work until it is killed."""

        def __init__(self, options: dict[str, Any]) -> None:
            pass

        def do(self, task: Any) -> Any:
            time.sleep(60)

    monkeypatch.setattr(cluster, "_RayActor", Idle)
    monkeypatch.setattr("gpupipe.farm.scheduler.MAX_WORKER_DEATHS", 3)
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.0001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setattr(cluster, "BUNDLE_FRAMES", 1)
    real, started = cluster._RayWorkers._start_worker, []
    monkeypatch.setattr(cluster._RayWorkers, "_start_worker", lambda self: (started.append(self), real(self))[1])
    one = tmp_path / "jobs.jsonl"
    one.write_text(jobs.read_text().splitlines()[0])
    try:
        record = run_farm(one, tmp_path / "out", part_seconds=2, workers=1, device="cpu")
    except InputError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip(f"no cluster starts here: {error}")
    assert record.parked == 1 and len(started) >= 4  # one may be killed before it has a task
    (row,) = results(tmp_path / "out").values()
    assert (row["attempts"], row["error"]) == (0, "3 workers died over it")


@pytest.mark.parametrize("told_first", [0, -1], ids=["the first", "the last"])
def test_a_worker_died_on_the_first_of_its_tasks(told_first: int) -> None:
    """Whichever of them Ray tells of first."""
    from ray.exceptions import RayActorError

    def get(ref: Any) -> Any:
        if ref in given[:2]:
            raise RayActorError
        return None, []

    given: list[object] = []
    actor = SimpleNamespace(do=SimpleNamespace(remote=lambda task: given.append(object()) or given[-1]))
    remote = SimpleNamespace(remote=lambda *_: actor)
    ray: Any = SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}],
        remote=lambda **_: lambda _: remote,
        wait=lambda refs, num_returns: ([refs[told_first]], None),
        get=get,
    )
    tasks = [FeaturesTask(None, Path(name), "") for name in "ab"]  # type: ignore[arg-type]
    lost: dict[str, bool] = {}
    scheduler: Any = SimpleNamespace(
        next_task=lambda **_: tasks.pop(0) if tasks else None,
        lost=lambda task, blamed: lost.update({task.path.name: blamed}),
    )
    assert cluster._RayWorkers(ray, scheduler, 1, {"device": "cpu"}).work() == 1
    assert lost == {"a": True, "b": False}


def test_a_worker_whose_gpu_is_lost_ends_for_another_to_begin(jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail whatever it is given."""

    def lost(parts: Any) -> Any:
        raise DeviceLostError("cuda:0 is lost to this process")

    ended: list[int] = []
    actor = cluster._RayActor({"device": "cpu", "memory_budget": 5_000_000, "batch_size": 3})
    assert (actor._worker.residents.budget, actor._worker.batch_size) == (5_000_000, 3)
    monkeypatch.setattr(actor._worker, "render", lost)
    monkeypatch.setattr(os, "_exit", ended.append)
    part: Any = SimpleNamespace(job=read_jobs(jobs)[0])
    actor.do(RenderTask([part]))
    assert ended == [1]


def test_a_full_disk_ends_the_run(jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(task: Any) -> Any:
        raise DiskFullError("1.mp4: cannot be written: No space left on device")

    class Full:
        """Stands in for a worker that has no room."""

        def __init__(self, options: dict[str, Any]) -> None:
            pass

        def do(self, task: Any) -> Any:
            return cluster._returned(full, task), []

    monkeypatch.setattr(cluster, "_RayActor", Full)
    with pytest.raises(GpupipeError) as error:
        run_farm(jobs, tmp_path / "out", workers=1, device="cpu")
    if "cannot be reached" in str(error.value):
        pytest.skip(f"no cluster starts here: {error.value}")
    assert isinstance(error.value, DiskFullError)
    assert str(error.value).startswith("1.mp4: cannot be written: No space left on device; what is whole is kept")
    rows = results(tmp_path / "out").values()
    assert {(row["status"], row["attempts"]) for row in rows} == {("waiting", 0)}


def test_more_workers_than_cores_are_refused(jobs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        run_farm(jobs, tmp_path / "out", workers=10000, device="cpu")
    if "cannot be reached" in str(error.value):
        pytest.skip(f"no cluster starts here: {error.value}")
    assert "workers is 10000; expected 1 to as many as the cluster has" in str(error.value)


@pytest.mark.parametrize(
    ("address", "given"),
    [(None, {"address": "local", "num_cpus": 1}), ("10.0.0.1:6379", {"address": "10.0.0.1:6379", "num_cpus": None})],
)
def test_a_cluster_is_started_here_unless_one_is_named(
    address: str | None, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment names, and with no more cores than it allows."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    monkeypatch.setenv("GPUPIPE_CORES", "1")
    asked: dict[str, Any] = {}
    ray = SimpleNamespace(init=lambda **options: asked.update(options), shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr(cluster, "_RayWorkers", lambda *_: SimpleNamespace(work=lambda: 1))
    scheduler: Any = None
    assert cluster.work_on_ray(scheduler, workers=None, address=address, options={}) == 1
    assert {name: asked[name] for name in given} == given


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (SystemExit(15), KeyboardInterrupt, "^$"),  # Ray's way to end on SIGTERM
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), InputError, "Ray at 'local' cannot be reached .*107"),
    ],
    ids=["stopped", "no socket"],
)
def test_ray_that_does_not_start_is_ended(
    error: BaseException, raised: type[BaseException], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise error

    ended: list[bool] = []
    ray = SimpleNamespace(init=init, shutdown=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    scheduler: Any = None
    with pytest.raises(raised, match=told):
        cluster.work_on_ray(scheduler, workers=1, address=None, options={})
    assert ended == ([True] if raised is KeyboardInterrupt else [])


@pytest.mark.parametrize("error", [None, DiskFullError("no room")])
def test_a_run_s_cluster_ends_with_it(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a program's second run finds one that is no longer there. Ray's makers are told of neither."""

    def work() -> int:
        if error is not None:
            raise error
        return 1

    seen: list[str] = []
    ray = SimpleNamespace(
        init=lambda **_: seen.append(os.environ["RAY_USAGE_STATS_ENABLED"]), shutdown=lambda: seen.append("ended")
    )
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr(cluster, "_RayWorkers", lambda *_: SimpleNamespace(work=work))
    monkeypatch.setattr(os, "environ", {"GPUPIPE_CORES": "1"})
    scheduler: Any = None
    with contextlib.nullcontext() if error is None else pytest.raises(DiskFullError):
        cluster.work_on_ray(scheduler, workers=1, address=None, options={})
    assert seen == ["0", "ended"]


def test_a_cluster_that_is_not_there(jobs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        run_farm(jobs, tmp_path / "out", address="auto", device="cpu")


def test_without_ray_the_extra_is_named(jobs: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from gpupipe.farm import run_farm\n"
        f"run_farm({str(jobs)!r}, {str(tmp_path / 'out')!r}, workers=2, device='cpu')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install 'gpupipe[farm]'" in ran.stderr
