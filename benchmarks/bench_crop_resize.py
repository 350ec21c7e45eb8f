"""crop_resize: µs a frame, and GB/s on its byte budget beside the device's own copy.

``python -m gpupipe.benchmarks.bench_crop_resize [--record]``. On CUDA the plain-torch reference is timed as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.kernel_bench import BOX, boxes_of, frames_of, main, rows_of
from gpupipe.kernels.crop_resize import bytes_moved, crop_and_input, crop_resize, network_input
from gpupipe.kernels.dispatch import backend


def cases(device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    frames, boxes, index = frames_of(batch, device), boxes_of(batch, device), torch.arange(batch, device=device)
    for dtype, channels_last in ((torch.float32, False), (torch.float16, True)):
        if device.type == "cpu" and channels_last:
            continue  # no engine on a CPU takes it
        name = f"{str(dtype).removeprefix('torch.')}, {'channels last' if channels_last else 'planar'}"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        functions = {
            backend(device): lambda d=dtype, c=channels_last: crop_and_input(
                frames, index, boxes, dtype=d, channels_last=c
            ),
            "torch": lambda d=dtype, f=layout: network_input(crop_resize(frames, index, boxes), dtype=d).contiguous(
                memory_format=f
            ),
        }
        for provider, function in functions.items():
            yield rows_of(
                "crop_resize",
                provider,
                function,
                frames=batch,
                bytes_a_frame=bytes_moved((BOX, BOX), dtype),
                config={"case": name, "box": BOX},
                device=device,
                rounds=rounds,
            )


if __name__ == "__main__":
    main((__doc__ or "").split("\n")[0], cases)
