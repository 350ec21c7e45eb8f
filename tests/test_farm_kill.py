"""A farm that is killed at any moment goes on where it stopped, and ends with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_farm.py")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, which Windows does not")


def test_twenty_kills() -> None:
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "20"], capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "20 kills, and the same bytes" in finished.stdout


def test_a_farm_that_writes_under_the_final_name_is_caught(tmp_path: Path) -> None:
    """The control: kills do meet a farm while it writes."""
    sabotage = tmp_path / "sabotage.py"
    sabotage.write_text(
        "import sys, time, runpy\n"
        "from pathlib import Path\n"
        "from gpupipe.farm.ledger import Ledger\n"
        "def publish(self, job, video, checksum):\n"
        "    content = video.read_bytes()\n"
        "    with self.output(job).open('wb') as file:\n"
        "        for start in range(0, len(content), 1000):\n"
        "            file.write(content[start:start + 1000])\n"
        "            file.flush()\n"
        "            time.sleep(0.05)\n"
        "    real(self, job, video, checksum)\n"
        "real, Ledger.publish = Ledger.publish, publish\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--kills', '30']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, str(sabotage)], capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "is not whole" in finished.stdout
