"""Kill a farm at random moments, and check that it ends with the same bytes as one that was left alone.

    python tests/kill_farm.py --kills 100 [--seed 0] [--folder somewhere]

Farms run in forks of this process, which has imported everything and computed nothing: a farm of small clips takes a
second or two, and is killed (SIGKILL) at a random moment within that time. When one finishes first, its videos are
compared, its folder is deleted, and another begins. After every kill, any file under a video's name must be complete.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import conftest
from farming import left_over, videos, write_jobs, write_speech

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.farm import run_farm


def main() -> None:
    """Kill so many times; exit 1 with the first thing that was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork does not take its parent's threads along, and would wait for them
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wrong = kill_farms(folder, options.kills, random.Random(options.seed))
    print(wrong or f"{options.kills} kills, and the same bytes")
    sys.exit(1 if wrong else 0)


def kill_farms(folder: Path, kills: int, chance: random.Random) -> str | None:
    """What went wrong; None if nothing did."""
    jobs = make_jobs(folder)
    start = time.monotonic()
    if not finishes(start_farm(jobs, folder / "alone")):
        return "a farm that was left alone failed"
    whole = time.monotonic() - start
    expected = videos(folder / "alone")
    killed = finished = 0
    out = folder / "killed"
    while True:
        farm = start_farm(jobs, out)
        if killed < kills:
            time.sleep(chance.uniform(0, whole))
            done, _ = os.waitpid(farm, os.WNOHANG)
            if not done:
                os.kill(farm, signal.SIGKILL)
                os.waitpid(farm, 0)
                killed += 1
                for name, content in videos(out).items() if out.exists() else ():
                    if content != expected[name]:
                        return f"after {killed} kills {name} is not whole"
                continue
        elif not finishes(farm):
            return f"the farm failed after {killed} kills"
        finished += 1
        if videos(out) != expected:
            return f"after {killed} kills the videos have other bytes"
        if left_over(out):
            return f"after {killed} kills there are left: {left_over(out)}"
        if killed >= kills:
            print(f"{finished} farms came to their end between {killed} kills, one alone takes {whole:.1f} s")
            return None
        shutil.rmtree(out)


def make_jobs(folder: Path) -> Path:
    """Three clips of two faces; the first has three parts."""
    checkpoint = folder / "unet.pth"
    torch.save(seeded_network("ave", width=1 / 8, seed=0).state_dict(), checkpoint)
    jobs = []
    for number, frames in enumerate((120, 30, 60)):
        features, sound = write_speech(folder, str(number), frames, number)
        face = conftest.write_template(folder / f"face{number % 2}", 3, size=(96, 64), seed=number % 2)
        files = {"checkpoint": str(checkpoint), "template": str(face), "audio_features": features, "audio": sound}
        jobs.append(files | {"output": f"{number}.mp4", "engine": "eager", "fps": 5.0})
    return write_jobs(folder / "jobs.jsonl", jobs)


def start_farm(jobs: Path, out: Path) -> int:
    """Run a farm in a fork; returns its process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        run_farm(jobs, out, device="cpu", part_seconds=2)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finishes(farm: int) -> bool:
    """Whether the farm finishes without an error."""
    return os.waitstatus_to_exitcode(os.waitpid(farm, 0)[1]) == 0


if __name__ == "__main__":
    main()
