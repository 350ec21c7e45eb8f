"""A render that is interrupted at any moment ends, and leaves nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interrupt_renders.py")

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfd_open, by which it waits, is Linux's")


def test_eight_interrupts() -> None:
    command = [sys.executable, str(SCRIPT), "--renders", "8"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "8 interrupts, and nothing left" in finished.stdout


def test_renders_that_do_not_clean_up_are_caught(tmp_path: Path) -> None:
    """The control: interrupts do meet a render while it writes."""
    sabotage = tmp_path / "sabotage.py"
    sabotage.write_text(
        "import sys, runpy\n"
        "from pathlib import Path\n"
        "Path.unlink = lambda *_, **__: None\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--renders', '8']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, str(sabotage)], capture_output=True, text=True, timeout=580, check=False)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "ends with 1 and leaves ['.clip-" in finished.stdout
