"""Which task a farm gives next, and what it does about those that fail or are lost; nothing is rendered."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from farming import Jobs, write_jobs

from gpupipe.farm import farm_status, read_jobs
from gpupipe.farm.attempt import Failed
from gpupipe.farm.ledger import Ledger, write_record
from gpupipe.farm.residents import AvatarKey
from gpupipe.farm.scheduler import MAX_ATTEMPTS, MAX_WORKER_DEATHS, Scheduler
from gpupipe.farm.worker import FeaturesTask, Joined, JoinTask, Outcome, Part, RenderTask
from gpupipe.versions import versions
from gpupipe.video.codecs import segment_length


def scheduler_of(jobs: Jobs, folder: Path, **options: Any) -> Scheduler:
    """For an output folder ``out``, in parts of two seconds."""
    read = read_jobs(write_jobs(folder / "jobs.jsonl", jobs))
    options = {"device": "cpu", "part_seconds": 2} | options
    return Scheduler(read, Ledger(folder / "out", read), **options)


FACTS: dict[str, Any] = {"seconds": 1.0, "device": "cpu", "engine": "eager", "codec": "libx264"}


def render(part: Part, engine: str = "eager") -> Outcome:
    """A part's file and record, as a worker leaves them."""
    part.path.parent.mkdir(parents=True, exist_ok=True)
    part.path.write_text("rendered")
    facts = FACTS | {"engine": engine}
    write_record(part.path, part.inputs, facts)
    return Outcome(part, facts)


def join(scheduler: Scheduler, task: JoinTask) -> None:
    """Have a video joined, as a worker does it."""
    task.path.write_text("joined")
    scheduler.settle(task, Joined(sum(len(part.frames) for part in task.parts), None, "checksum", 1.0))


def test_a_job_over_which_workers_die_is_parked_at_last(farm_jobs: Jobs, tmp_path: Path) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[:1]))
    scheduler = Scheduler(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    for _ in range(MAX_WORKER_DEATHS):
        task = scheduler.next_task(frames=1000)
        assert isinstance(task, RenderTask) and len(task.parts) == 3
        assert not scheduler.finished
        scheduler.lost(task)
    assert scheduler.next_task() is None and scheduler.finished
    state = farm_status(tmp_path / "jobs.jsonl", tmp_path / "out")[0]
    assert (state.status, state.error) == ("parked", "5 workers died over it")
    again = Scheduler(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    for _ in range(MAX_WORKER_DEATHS - 1):  # what an earlier run lost does not count
        again.lost(again.next_task(frames=1000) or pytest.fail("parked"))
    assert not again.finished


@pytest.mark.parametrize("poison", [0, 2, 4], ids=["first", "in the middle", "last"])
def test_the_job_over_which_workers_die_is_told_from_those_beside_it(
    poison: int, farm_jobs: Jobs, tmp_path: Path
) -> None:
    """Short clips of one face are of one task."""
    scheduler = scheduler_of([farm_jobs[2] | {"output": f"{number}.mp4"} for number in range(5)], tmp_path)
    sizes, deaths = [], 0
    while (task := scheduler.next_task(frames=1000)) is not None:
        if isinstance(task, JoinTask):
            join(scheduler, task)
            continue
        assert isinstance(task, RenderTask)
        sizes.append(len(task.parts))
        if f"{poison}.mp4" in [part.job.output for part in task.parts]:
            scheduler.lost(task)
            deaths += 1
        else:
            scheduler.settle(task, [render(part) for part in task.parts])
    assert sizes[0] == 5 and set(sizes[1:]) == {1}
    assert scheduler.finished and deaths == MAX_WORKER_DEATHS
    states = scheduler.ledger.states.values()
    assert [state.output for state in states if state.status != "done"] == [f"{poison}.mp4"]


def test_a_job_whose_parts_are_recorded_is_not_what_a_worker_died_on(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of([farm_jobs[2] | {"output": f"{number}.mp4"} for number in range(2)], tmp_path)
    task = scheduler.next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == 2
    render(task.parts[0])
    scheduler.lost(task)
    assert [state.worker_deaths for state in scheduler.ledger.states.values()] == [0, 1]


def test_a_task_that_fails_as_a_whole_is_one_failure_of_each_of_its_jobs(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of([farm_jobs[0], farm_jobs[2]], tmp_path)
    for attempts in range(1, MAX_ATTEMPTS + 1):
        task = scheduler.next_task(frames=1000)
        assert isinstance(task, RenderTask) and len(task.parts) == 4
        scheduler.settle(task, Failed("no driver here"))
        states = farm_status(tmp_path / "jobs.jsonl", tmp_path / "out")
        assert [(state.attempts, state.error) for state in states] == [(attempts, "no driver here")] * 2
    assert scheduler.finished and {state.status for state in states} == {"parked"}


def test_a_job_that_failed_is_tried_again_when_its_parts_are_back(farm_jobs: Jobs, tmp_path: Path) -> None:
    """What other workers have of it is not rendered twice, and fails it no second time."""
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[:1]))
    ledger = Ledger(tmp_path / "out", jobs)
    scheduler = Scheduler(jobs, ledger, device="cpu", part_seconds=2)
    first, second, third = (scheduler.next_task() for _ in range(3))
    assert isinstance(first, RenderTask) and isinstance(second, RenderTask) and isinstance(third, RenderTask)
    scheduler.settle(first, [Outcome(first.parts[0], Failed("once"))])
    assert scheduler.next_task() is None and not scheduler.finished
    scheduler.settle(second, [render(second.parts[0])])
    scheduler.settle(third, [Outcome(third.parts[0], Failed("the same again"))])
    state = ledger.states["0.mp4"]
    assert (state.status, state.attempts, state.error) == ("failed", 1, "once")
    again = scheduler.next_task(frames=1000)
    assert isinstance(again, RenderTask) and [part.number for part in again.parts] == [0, 2]
    scheduler.settle(again, [render(part) for part in again.parts])
    joined = scheduler.next_task()
    assert isinstance(joined, JoinTask) and scheduler.next_task() is None
    joined.path.write_text("joined")
    scheduler.settle(joined, Joined(24, None, "checksum", 1.0))
    assert scheduler.finished and (scheduler.done, scheduler.frames) == (1, 24)
    assert (state.status, state.attempts, state.error) == ("done", 1, None)


@pytest.mark.parametrize("others", [[1000], [1, 1], [1]], ids=["one other", "two others", "a part left"])
def test_a_job_whose_try_ends_with_a_lost_worker_is_tried_again(
    others: list[int], farm_jobs: Jobs, tmp_path: Path
) -> None:
    """When all of its parts that workers have are back, and from the first one on."""
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    first, *rest = (scheduler.next_task(frames=frames) for frames in (1, *others))
    assert isinstance(first, RenderTask)
    scheduler.settle(first, [Outcome(first.parts[0], Failed("once"))])
    for task in rest:
        assert isinstance(task, RenderTask)
        assert scheduler.next_task() is None and not scheduler.finished
        scheduler.lost(task)
    again = scheduler.next_task(frames=1000)
    assert isinstance(again, RenderTask) and len(again.parts) == 3


def test_parts_that_a_lost_worker_had_finished_count(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    task = scheduler.next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == 3
    render(task.parts[0])
    scheduler.lost(task)
    again = scheduler.next_task(frames=1000)
    assert isinstance(again, RenderTask) and again.parts == task.parts[1:]
    for part in again.parts:
        render(part)
    scheduler.lost(again)
    assert isinstance(scheduler.next_task(), JoinTask) and scheduler.frames == 24


def test_a_worker_that_died_over_another_task_is_not_held_against_a_job(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    for blamed in (False, True):
        scheduler.lost(scheduler.next_task(frames=1000) or pytest.fail("nothing to do"), blamed=blamed)
        assert scheduler.ledger.states["0.mp4"].worker_deaths == blamed


@pytest.mark.parametrize(
    ("options", "other_versions", "parts"),
    [({"device": "cuda"}, {}, 3), ({"part_seconds": 4}, {}, 2), ({"force": True}, {}, 3), ({}, {"torch": "0"}, 3)],
    ids=["another device", "another length", "forced", "another version"],
)
def test_parts_of_another_run_are_rendered_again_where_they_would_differ(
    options: dict[str, Any],
    other_versions: dict[str, str],
    parts: int,
    farm_jobs: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = scheduler_of(farm_jobs[:1], tmp_path).next_task(frames=1000)
    assert isinstance(first, RenderTask)
    for part in first.parts:
        render(part)
    assert isinstance(scheduler_of(farm_jobs[:1], tmp_path).next_task(), JoinTask), "as they are"
    monkeypatch.setattr("gpupipe.farm.scheduler.versions", lambda: versions() | other_versions)
    again = scheduler_of(farm_jobs[:1], tmp_path, **options).next_task(frames=1000)
    assert isinstance(again, RenderTask) and len(again.parts) == parts


def interrupted(jobs: Jobs, folder: Path, *engines: str) -> list[Part]:
    """The parts of a job, the first of which an earlier run made with these engines."""
    task = scheduler_of(jobs, folder).next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == 3
    for part, engine in zip(task.parts, engines, strict=False):
        render(part, engine)
    return task.parts


@pytest.mark.parametrize(
    ("earlier", "now", "again"),
    [
        (["llvm", "llvm"], ["onnxruntime"], [0, 1]),
        (["onnxruntime", "llvm"], ["onnxruntime"], [1]),
        (["llvm"], ["llvm", "llvm"], []),
    ],
)
def test_parts_of_another_engine_are_not_mixed_in(
    earlier: list[str], now: list[str], again: list[int], farm_jobs: Jobs, tmp_path: Path
) -> None:
    """The engine of this run wins: those of an earlier one may not be there."""
    interrupted(farm_jobs[:1], tmp_path, *earlier)
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    task = scheduler.next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == len(now)
    scheduler.settle(task, [render(part, engine) for part, engine in zip(task.parts, now, strict=True)])
    following = scheduler.next_task(frames=1000)
    if again:
        assert isinstance(following, RenderTask) and [part.number for part in following.parts] == again
        scheduler.lost(following)  # and what was there counts no more
        following = scheduler.next_task(frames=1000)
        assert isinstance(following, RenderTask) and [part.number for part in following.parts] == again
        scheduler.settle(following, [render(part, now[0]) for part in following.parts])
        following = scheduler.next_task(frames=1000)
    assert isinstance(following, JoinTask)
    join(scheduler, following)
    assert scheduler.finished and scheduler.ledger.states["0.mp4"].engine == now[0]


def test_parts_that_several_engines_left_are_made_with_one(farm_jobs: Jobs, tmp_path: Path) -> None:
    """By a run that was killed before it could join them: whichever engine this run has, it paints all."""
    interrupted(farm_jobs[:1], tmp_path, "onnxruntime", "llvm", "llvm")
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    for numbers in ([0], [1, 2]):
        task = scheduler.next_task(frames=1000)
        assert isinstance(task, RenderTask) and [part.number for part in task.parts] == numbers
        scheduler.settle(task, [render(part, "eager") for part in task.parts])
    assert isinstance(scheduler.next_task(), JoinTask)


def test_machines_that_differ_do_not_make_parts_for_ever(
    farm_jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(farm_jobs[:1], tmp_path, "eager")
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    task = scheduler.next_task(frames=1000)
    assert isinstance(task, RenderTask)
    scheduler.settle(task, [render(part, engine) for part, engine in zip(task.parts, ("b", "a"), strict=True)])
    joined = scheduler.next_task()
    assert isinstance(joined, JoinTask)
    join(scheduler, joined)
    assert scheduler.ledger.states["0.mp4"].engine == "a, b, eager"
    told = "0.mp4: is of a/libx264 and b/libx264; expected one: name an engine and a codec in the job"
    assert told in caplog.messages


def test_parts_of_this_run_s_earlier_try_are_kept(farm_jobs: Jobs, tmp_path: Path) -> None:
    """A run's own parts are joined as they are, also after one of them has failed."""
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    first = scheduler.next_task(frames=1000)
    assert isinstance(first, RenderTask)
    *whole, last = first.parts
    outcomes = [render(part, engine) for part, engine in zip(whole, ("a", "b"), strict=True)]
    scheduler.settle(first, [*outcomes, Outcome(last, Failed("it rains"))])
    again = scheduler.next_task(frames=1000)
    assert isinstance(again, RenderTask) and again.parts == [last]
    scheduler.settle(again, [render(last, "a")])
    assert isinstance(scheduler.next_task(), JoinTask)


def with_encoder(jobs: Jobs) -> Jobs:
    """Jobs whose features are to be made first."""
    made = ({key: value for key, value in job.items() if key != "audio_features"} for job in jobs)
    return [job | {"encoder": "e.pth"} for job in made]


def test_a_job_whose_features_are_made_comes_next(farm_jobs: Jobs, tmp_path: Path) -> None:
    """And not after all others."""
    scheduler = scheduler_of(with_encoder(farm_jobs[:2]), tmp_path)
    task = scheduler.next_task()
    assert isinstance(task, FeaturesTask) and task.job.output == "0.mp4"
    task.path.parent.mkdir(parents=True)
    task.path.write_bytes(Path(farm_jobs[0]["audio_features"]).read_bytes())
    write_record(task.path, task.inputs, {"seconds": 1.5})
    scheduler.settle(task, None)
    following = scheduler.next_task()
    assert isinstance(following, RenderTask) and following.parts[0].job.output == "0.mp4"
    assert scheduler.ledger.states["0.mp4"].timings == {"features": 1.5}


def test_features_that_are_made_where_nobody_sees_them_are_not_made_for_ever(farm_jobs: Jobs, tmp_path: Path) -> None:
    """By a worker on another machine, whose folder of that name is another one."""
    scheduler = scheduler_of(with_encoder(farm_jobs[:1]), tmp_path)
    for _ in range(MAX_ATTEMPTS):
        task = scheduler.next_task()
        assert isinstance(task, FeaturesTask)
        scheduler.settle(task, None)
    assert scheduler.next_task() is None and scheduler.finished
    state = scheduler.ledger.states["0.mp4"]
    told = "was made by a worker, but is not here; expected all machines to see the same folder"
    assert (state.status, state.error) == ("parked", f"{task.path}: {told}")


def test_a_run_is_not_at_its_end_while_features_are_made(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of(with_encoder(farm_jobs[:1]), tmp_path)
    assert isinstance(scheduler.next_task(), FeaturesTask)
    assert scheduler.next_task() is None and not scheduler.finished


def test_a_job_is_parked_once(farm_jobs: Jobs, tmp_path: Path) -> None:
    """However many workers die with what they had of it."""
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[:1]))
    ended: list[str] = []
    ledger = Ledger(tmp_path / "out", jobs)
    scheduler = Scheduler(
        jobs, ledger, device="cpu", part_seconds=2, on_job_end=lambda state: ended.append(state.status)
    )
    late = scheduler.next_task() or pytest.fail("nothing to do")
    for _ in range(MAX_WORKER_DEATHS):
        scheduler.lost(scheduler.next_task() or pytest.fail("parked"))
    scheduler.lost(late)
    assert scheduler.finished and ended == ["parked"]
    assert ledger.states["0.mp4"].error == "5 workers died over it"


def test_a_long_clip_is_heard_of_before_it_ends(
    farm_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every so often, not for each of its parts."""
    caplog.set_level(logging.INFO, logger="gpupipe")
    now = 1000.0
    monkeypatch.setattr("gpupipe.farm.scheduler.time.monotonic", lambda: now)
    scheduler = scheduler_of(farm_jobs[:1], tmp_path)
    task = scheduler.next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == 3
    for part, then in zip(task.parts, (1004.0, 1011.0, 1012.0), strict=True):
        now = then
        scheduler.rendered(Outcome(part, FACTS))
    assert caplog.messages == ["0.mp4: 2 of 3 parts"]


def test_a_video_of_too_few_frames_gets_no_name(farm_jobs: Jobs, tmp_path: Path) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[2:]))
    scheduler = Scheduler(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    rendered = scheduler.next_task()
    assert isinstance(rendered, RenderTask)
    scheduler.settle(rendered, [Outcome(part, FACTS) for part in rendered.parts])
    joined = scheduler.next_task()
    assert isinstance(joined, JoinTask)
    scheduler.settle(joined, Joined(6, None, "checksum", 1.0))
    state = scheduler.ledger.states[jobs[0].output]
    assert (state.status, state.error) == ("failed", f"{joined.path}: has 6 frames; expected 7")


def test_a_worker_is_given_more_of_what_it_has_at_hand(farm_jobs: Jobs, tmp_path: Path) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs))
    scheduler = Scheduler(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=2)
    faces = [AvatarKey.of(job) for job in jobs]
    assert scheduler.upcoming() == faces[:2]
    first, other = scheduler.next_task(frames=1), scheduler.next_task(frames=1000, last_avatar=faces[1])
    assert isinstance(first, RenderTask) and [part.number for part in first.parts] == [0]
    # Both faces' jobs are not under way yet: the worker helps with the first face, of both of its jobs.
    assert isinstance(other, RenderTask)
    assert [part.job.output for part in other.parts] == ["0.mp4", "0.mp4", "deep/er/2.mp4"]


def test_of_jobs_under_way_the_one_at_hand_goes_on(farm_jobs: Jobs, tmp_path: Path) -> None:
    """A worker that has nothing at hand yet takes the first."""
    other = farm_jobs[0] | {"template": farm_jobs[1]["template"], "output": "other.mp4"}
    scheduler = scheduler_of([farm_jobs[0], other], tmp_path)
    first, second = scheduler.next_task(frames=1000), scheduler.next_task(frames=1)
    assert isinstance(first, RenderTask) and isinstance(second, RenderTask)
    jobs = [first.parts[0].job, second.parts[0].job]
    assert [job.output for job in jobs] == ["0.mp4", "other.mp4"]
    scheduler.lost(first)
    for at_hand, job in ((jobs[1], jobs[1]), (jobs[0], jobs[0]), (None, jobs[0])):
        task = scheduler.next_task(last_avatar=None if at_hand is None else AvatarKey.of(at_hand))
        assert isinstance(task, RenderTask) and [part.job for part in task.parts] == [job]


def test_a_face_whose_parts_are_all_handed_out_is_not_to_come(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of(farm_jobs, tmp_path)
    before = scheduler.upcoming()
    task = scheduler.next_task(frames=1000)
    assert isinstance(task, RenderTask) and {part.job.output for part in task.parts} == {"0.mp4", "deep/er/2.mp4"}
    assert scheduler.upcoming() == before[1:]


def test_a_face_under_way_is_needed_before_those_to_come(farm_jobs: Jobs, tmp_path: Path) -> None:
    scheduler = scheduler_of(farm_jobs[:2], tmp_path)
    before = scheduler.upcoming()
    scheduler.next_task()
    assert len(before) == 2 and scheduler.upcoming() == before


@pytest.mark.parametrize(("seconds", "parts"), [(1e-300, 3), (2.9, 3), (3.1, 2), (1e308, 1)])
def test_any_part_seconds_are_rounded_to_segments(farm_jobs: Jobs, tmp_path: Path, seconds: float, parts: int) -> None:
    jobs = read_jobs(write_jobs(tmp_path / "jobs.jsonl", farm_jobs[:1]))
    task = Scheduler(jobs, Ledger(tmp_path / "out", jobs), device="cpu", part_seconds=seconds).next_task(frames=1000)
    assert isinstance(task, RenderTask) and len(task.parts) == parts
    assert segment_length(25) == 50  # type: ignore[arg-type]
