"""crop_resize: µs a frame, and GB/s on its byte budget beside the device's own copy.

``python -m gpupipe.benchmarks.bench_crop_resize [--record]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.kernel_bench import BOX, beside_torch, boxes_of, frames_of, main
from gpupipe.kernels import crop_resize


def cases(device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    frames, boxes, index = frames_of(batch, device), boxes_of(batch, device), torch.arange(batch, device=device)
    for dtype, channels_last in ((torch.float32, False), (torch.float16, True)):
        if device.type == "cpu" and channels_last:
            continue  # no engine on a CPU takes it
        name = f"{str(dtype).removeprefix('torch.')}, {'channels last' if channels_last else 'planar'}"
        yield from beside_torch(
            "crop_resize",
            crop_resize,
            partial(crop_resize.crop_and_input, frames, index, boxes, dtype=dtype, channels_last=channels_last),
            frames=batch,
            bytes_a_frame=crop_resize.bytes_moved((BOX, BOX), dtype),
            config={"case": name, "box": BOX},
            device=device,
            rounds=rounds,
        )


if __name__ == "__main__":
    main((__doc__ or "").split("\n")[0], cases)
