"""The script for a GPU that is there for minutes: it begins only where its results can be kept."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_session.sh"


def session(tmp_path: Path, *words: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script on its own, with a Python that fails."""
    (tmp_path / "benchmarks").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "benchmarks")
    given = {"PATH": "/usr/bin:/bin", "PYTHON": "false", **environment}
    return subprocess.run(["bash", script, *words], env=given, capture_output=True, text=True, check=False)


def test_results_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = session(tmp_path, tmp_path / "file")
    assert (done.returncode, done.stdout) == (2, ""), "nothing has begun"


def test_a_session_needs_room_for_its_logs(tmp_path: Path) -> None:
    done = session(tmp_path, tmp_path / "out", TMPDIR=str(tmp_path / "missing"))
    assert (done.returncode, done.stdout) == (2, "")


def test_parts_that_fail_are_named_and_the_others_run(tmp_path: Path) -> None:
    done = session(tmp_path, tmp_path / "out", PARTS="machine scene")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for part in ("machine", "scene"):
        assert f"FAILED: {part} (exit status 1, see {part}.log)" in summary
    assert (tmp_path / "out" / "logs.tar.gz").is_file()
