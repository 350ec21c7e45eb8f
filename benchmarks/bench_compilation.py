"""How long the fused engine's kernels take to compile where none is cached, one by one and on all cores.

    python -m gpupipe.benchmarks.bench_compilation [--arch 90] [--rounds 3] [--record]

No GPU is needed. The kernels are those that the engine launches at full width; each turn is a process of its own with
an empty cache. What a process does before it compiles (Python, imports) is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch

from gpupipe.benchmarks.common import Spread, add_record_options, append_rows, device_name, row
from gpupipe.engines.fused import FusedEngine
from gpupipe.kernels.report import Variant, compiled_kernel
from gpupipe.kernels.report_network import recording
from gpupipe.lanes import available_cores
from gpupipe.models.unet328 import UNet328, random_inputs


def main() -> None:
    """Measure, print, and with ``--record`` append to the recorded results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--rounds", type=int, default=3)
    add_record_options(parser)
    options = parser.parse_args()
    ways = sorted({1, available_cores()})
    seconds: dict[int, list[float]] = defaultdict(list)
    print(f"{device_name()}; {len(_kernels())} kernels for sm_{options.arch}, {options.rounds} turns")
    for turn in range(options.rounds):
        for threads in ways if turn % 2 == 0 else reversed(ways):
            seconds[threads].append(_in_a_new_process(options.arch, threads))
            print(f"turn {turn + 1}: {threads} threads {seconds[threads][-1]:.1f} s", flush=True)
    rows = [
        row(
            Spread.of(seconds[threads]),
            what="compilation",
            provider="fused",
            metric="latency",
            unit="s",
            axis="threads",
            value=threads,
            config={"arch": options.arch, "kernels": len(_kernels()), "mode": "ave"},
        )
        for threads in ways
    ]
    for one in rows:
        print(f"{one.value} threads: {one.p50:.1f} ({one.p20:.1f} to {one.p80:.1f}) s")
    if options.record:
        for path in append_rows(rows, options.results):
            print(f"recorded in {path}")


def _kernels() -> list[Variant]:
    """What the engine launches for a batch of one."""
    meta, network = torch.device("meta"), UNet328("ave").eval()
    image, audio = random_inputs(network, 1)
    with recording() as launches:
        engine = FusedEngine(network, device=meta)
        engine.decode(engine.encode(image), torch.empty(1, dtype=torch.int64, device=meta), audio)
    return launches.variants


def _in_a_new_process(arch: int, threads: int) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_seconds, arch, threads).result()


def _seconds(arch: int, threads: int) -> float:
    kernels = _kernels()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as workers:
        os.environ["TRITON_CACHE_DIR"] = folder
        start = time.perf_counter()
        list(workers.map(lambda kernel: compiled_kernel(kernel, arch), kernels))
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
