"""Avatars kept in memory: shared by jobs, within a budget; the one whose next use is latest is dropped first."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpupipe.errors import DeviceError
from gpupipe.farm.jobs import Job
from gpupipe.farm.residents import AvatarKey, Residents
from gpupipe.template import template_size


@pytest.fixture(scope="module")
def jobs(
    tiny_checkpoint: Callable[..., Path], make_template: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Job]:
    """Three faces."""
    folder = tmp_path_factory.mktemp("faces")
    return [
        Job(
            checkpoint=str(tiny_checkpoint()),
            template=str(make_template(folder / str(n), frames=3, size=(96, 64), seed=n)),
            audio_features="a.npy",
            output=f"{n}.mp4",
            engine="eager",
        )
        for n in range(3)
    ]


def test_jobs_share_avatars_and_networks(jobs: list[Job]) -> None:
    residents = Residents("cpu")
    generator, avatar = residents.get(jobs[0], "nv12")
    assert residents.get(jobs[0].model_copy(update={"crf": 3, "output": "x.mp4"}), "nv12") == (generator, avatar)
    other, another = residents.get(jobs[1], "nv12")
    assert another is not avatar and other.unet_model is generator.unet_model
    soft, _ = residents.get(jobs[0].model_copy(update={"feather": 3.0}), "nv12")
    assert soft.feather == 3.0
    assert len(residents) == 3


def test_a_network_is_as_exact_as_its_job_asks(jobs: list[Job]) -> None:
    """The two contradict each other, on any machine."""
    wrong = jobs[0].model_copy(update={"exact": True, "precision": "bfloat16"})
    with pytest.raises(DeviceError, match="expected float32 with exact"):
        Residents("cpu").get(wrong, "nv12")


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("checkpoint", "other.pth", False),
        ("mode", "hubert", False),
        ("engine", "onnxruntime", False),
        ("exact", True, False),
        ("precision", "bfloat16", False),
        ("template", "other", False),
        ("use_parsing", True, False),
        ("blend", "none", False),
        ("feather", 3.0, False),
        ("crf", 5, True),
        ("output", "other.mp4", True),
    ],
)
def test_what_two_jobs_of_an_avatar_must_share(key: str, value: Any, same: bool, jobs: list[Job]) -> None:
    assert (AvatarKey.of(jobs[0].model_copy(update={key: value})) == AvatarKey.of(jobs[0])) is same


def needed(job: Job) -> int:
    """Memory of an avatar of the fixture, as counted without a limit."""
    residents = Residents("cpu", budget=1 << 40)
    residents.get(job, "nv12")
    return residents.used


@pytest.mark.parametrize(("soon", "leaves"), [((0, 2, 1), 1), ((1, 2, 0), 0), ((1,), 0), ((0,), 1), ((), 0)])
def test_the_avatar_needed_last_makes_room(jobs: list[Job], soon: tuple[int, ...], leaves: int) -> None:
    keys = [AvatarKey.of(job) for job in jobs]
    residents = Residents("cpu", budget=int(2.5 * needed(jobs[0])))
    residents.upcoming = lambda: [keys[n] for n in soon]
    avatars = [residents.get(job, "nv12")[1] for job in jobs[:2]]
    residents.get(jobs[2], "nv12")
    assert len(residents) == 2
    stays = 1 - leaves
    assert residents.get(jobs[stays], "nv12")[1] is avatars[stays]
    assert residents.used <= residents.budget


def test_a_network_leaves_with_the_last_of_its_avatars(jobs: list[Job], tiny_checkpoint: Callable[..., Path]) -> None:
    residents = Residents("cpu", budget=int(1.5 * needed(jobs[0])))
    network = weakref.ref(residents.get(jobs[0], "nv12")[0].unet_model)
    residents.get(jobs[1], "nv12")
    assert network() is not None, "now with another face"
    residents.get(jobs[1].model_copy(update={"checkpoint": str(tiny_checkpoint(seed=1))}), "nv12")
    assert network() is None


def test_an_avatar_is_given_the_room_that_the_others_leave(jobs: list[Job]) -> None:
    residents = Residents("cpu", budget=2 * needed(jobs[0]))
    residents.get(jobs[0], "nv12")
    generator, _ = residents.get(jobs[1], "nv12")
    assert generator.memory_budget == needed(jobs[1])


def test_an_avatar_beyond_the_budget_still_renders(jobs: list[Job]) -> None:
    residents = Residents("cpu", budget=1000)
    _, avatar = residents.get(jobs[0], "nv12")
    assert avatar.template.frames.capacity == 0
    assert residents.used == residents.budget
    assert len(avatar.render(torch.tensor([0, 1]).numpy(), torch.zeros(2, 32, 16, 16))) == 2


def test_an_avatar_s_memory_is_predicted(jobs: list[Job]) -> None:
    residents = Residents("cpu", budget=1 << 40)
    _, avatar = residents.get(jobs[0], "nv12")
    avatar.look_up(torch.arange(avatar.template.length).numpy())
    assert residents.used == avatar.template.frames.bytes_used + avatar._derived.bytes_used


def test_template_size_is_frames_width_and_height(jobs: list[Job]) -> None:
    assert template_size(jobs[0].template) == (3, 96, 64)
