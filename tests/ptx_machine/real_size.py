"""The Gluon kernels as ``gpupipe.benchmarks.gluon_cubins`` builds and launches them, on maps of the network's own size.

``python -m ptx_machine.real_size ARCH [BLOCK …]``, with ``tests`` on ``PYTHONPATH``; all blocks take an hour.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"  # before triton is first imported

import torch

from gpupipe.benchmarks.gluon_cubins import case_of, check, grid_of, packed_arguments
from gpupipe.kernels.report import compiled_kernel
from gpupipe.kernels.report_gluon import BLOCKS, variant_of
from gpupipe.kernels.whole_block_gluon import TILE
from ptx_machine.launch import buffers_of
from ptx_machine.machine import WARP, launch


def execute(name: str, arch: int, *, wgmma: bool) -> None:
    """One sample through a block's kernel.

    Raises:
        AssertionError: the result is not the reference's.
        PtxError: the kernel does what PTX leaves undefined.
    """
    variant, block = variant_of(name, wgmma=wgmma), BLOCKS[name]
    kernel = compiled_kernel(variant, arch)
    entry = {"block": dataclasses.asdict(block), "tile": TILE}
    case = case_of(entry, 1, torch.device("cpu"))
    out = case.empty().fill_(77 if case.head is not None else math.nan)
    tensors = case.tensors(out)
    given = [tensors[one] for one in variant.kernel.arg_names if one not in variant.constants]
    values, _ = packed_arguments([one.data_ptr() for one in given])
    launch(
        kernel.asm["ptx"],
        (*grid_of(entry, 1), 1),
        values.tolist(),
        buffers_of(given),
        threads=variant.num_warps * WARP,
        shared_bytes=kernel.metadata.shared,
    )
    check(out, case.expected())
    print(f"{variant.config}, sm_{arch}: equal")


def main() -> None:
    """Execute those that were named, or all."""
    arch, *names = sys.argv[1:]
    for name in names or BLOCKS:
        for wgmma in (False, True):
            variant = variant_of(name, wgmma=wgmma)
            if variant.architectures is None or int(arch) in variant.architectures:
                execute(name, int(arch), wgmma=wgmma)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
