"""Whole frames to NV12 and back: µs a frame, and GB/s on the byte budget beside the device's own copy.

``python -m gpupipe.benchmarks.bench_nv12 [--record]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.kernel_bench import SIZE, beside_torch, frames_of, main
from gpupipe.kernels import nv12


def cases(device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    frames = frames_of(batch, device)
    converted = nv12.to_nv12(frames)
    for name, function in (("to_nv12", lambda: nv12.to_nv12(frames)), ("from_nv12", lambda: nv12.from_nv12(converted))):
        yield from beside_torch(
            name,
            nv12,
            function,
            frames=batch,
            bytes_a_frame=nv12.bytes_moved(SIZE),
            config={"case": f"{SIZE[0]}×{SIZE[1]}", "size": list(SIZE)},
            device=device,
            rounds=rounds,
        )


if __name__ == "__main__":
    main((__doc__ or "").split("\n")[0], cases)
