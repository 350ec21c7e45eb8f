"""A farm renders a long clip in constant memory, and in time proportional to its frames."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gpupipe.benchmarks.long_haul import ALLOWED_MB, FPS, StubAvatar, haul


def test_two_minutes_are_whole(tmp_path: Path) -> None:
    done = haul(120, tmp_path)
    assert done.frames == 120 * FPS
    assert [moment.frames for moment in done.moments] == [500, 1000, 1500, 2000, 2500, 3000, 3000]


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_its_beginning(tmp_path: Path) -> None:
    done = haul(3600, tmp_path)
    assert done.frames == 3600 * FPS
    begin, *rest = done.moments[10:]  # after 200 seconds of video
    assert max(moment.megabytes for moment in rest) - begin.megabytes <= ALLOWED_MB
    # A frame is 4.6 kB: if all were kept, an hour would take 400 MB. And every ten minutes cost the same.
    steps = [done.moments[10 + 30 * n] for n in range(6)]
    times = [later.seconds - earlier.seconds for earlier, later in pairwise(steps)]
    assert times[-1] < 1.5 * min(times)


@pytest.mark.slow
def test_bound_fails_on_a_render_that_keeps_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    real = StubAvatar.render

    def hoarding(self: StubAvatar, *arguments: Any) -> Any:
        kept.append(real(self, *arguments))
        return kept[-1].clone()

    monkeypatch.setattr(StubAvatar, "render", hoarding)
    begin, *rest = haul(1500, tmp_path).moments[10:]
    assert max(moment.megabytes for moment in rest) - begin.megabytes > ALLOWED_MB
