"""Interrupt renders at random moments. Each must end soon and leave nothing half-written, whatever its threads are at:

python tests/interrupt_renders.py --renders 200 --seed 1

Beside other work on the same cores more is found: threads then wait at more places.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NoReturn

import conftest
import numpy as np
import torch
from commands import QUICK, render_words, write_clip

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.cli import main as gpupipe

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FRAMES = 20_000
"""More than are rendered before the signal comes."""
LATEST = 2.5
"""Seconds after which it comes at the latest."""
LIMIT = 60
"""Seconds in which a render must end."""


def main() -> None:
    """Run the command line: exit 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork does not take its parent's threads along, and would wait for them
    with tempfile.TemporaryDirectory() as folder:
        wrong = interrupt_renders(Path(folder), options.renders, random.Random(options.seed))
    print("\n".join(wrong) or f"{options.renders} interrupts, and nothing left")
    sys.exit(1 if wrong else 0)


def interrupt_renders(folder: Path, renders: int, chance: random.Random) -> list[str]:
    """What went wrong."""
    checkpoint, out = folder / "unet.pth", folder / "out"
    torch.save(seeded_network("ave", width=1 / 8).state_dict(), checkpoint)
    clip = write_clip(folder, conftest.write_template, lambda: checkpoint)
    clip["features"] = folder / "long.npy"
    np.save(clip["features"], np.zeros((FRAMES, 512), np.float32))
    wrong, ends = [], Counter[int | None]()
    for _ in range(renders):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        more = chance.choice(((), ("--save-frames",)))
        render = start(render_words(clip, out / "clip.mp4", *QUICK, *more), folder / "told")
        number, after = chance.choice(SIGNALS), chance.uniform(0.05, LATEST)
        time.sleep(after)
        code = interrupt(render, number, chance.choice((0, 0.001, 0.05)))
        ends[code] += 1
        # Before a command listens, signals end it as they end any program.
        left = sorted(path.name for path in out.iterdir() if path.name != "clip_frames")
        if code not in {1, 130, *(-number for number in SIGNALS)} or left:
            how = "does not end" if code is None else f"ends with {code}"
            told = (folder / "told").read_text(errors="replace")[-1000:]
            wrong.append(f"{signal.Signals(number).name} after {after:.3f} s {how} and leaves {left}: {told}")
    print(f"exit codes: {dict(ends)}")
    return wrong


def start(words: list[object], told: Path) -> int:
    """Run the command in a fork; returns its process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        _run([str(word) for word in words], told)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def _run(words: list[str], told: Path) -> NoReturn:
    """As a process of its own would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["gpupipe", *words]
    code = 0
    try:
        gpupipe()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    threading._shutdown()  # type: ignore[attr-defined]  # where a thread that does not end is waited for
    sys.stderr.flush()
    os._exit(code)


def interrupt(render: int, number: int, pause: float) -> int | None:
    """Send a signal twice, as ``timeout`` and terminals do; return the exit code, or None for a render that goes on."""
    os.kill(render, number)
    time.sleep(pause)
    os.kill(render, number)  # until it is waited for, it may be sent signals
    handle = os.pidfd_open(render)
    ended, _, _ = select.select([handle], [], [], LIMIT)
    os.close(handle)
    if not ended:
        os.kill(render, signal.SIGKILL)
    _, status = os.waitpid(render, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    main()
