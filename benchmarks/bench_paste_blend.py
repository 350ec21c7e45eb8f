"""paste_blend: µs a frame, and GB/s on its byte budget beside the device's own copy.

``python -m gpupipe.benchmarks.bench_paste_blend [--record]``. NV12's bytes include the batch loop's copy of the
background.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.kernel_bench import BOX, SIZE, beside_torch, boxes_of, frames_of, main
from gpupipe.kernels import paste_blend as module
from gpupipe.kernels.crop_resize import crop_resize
from gpupipe.kernels.nv12 import to_nv12
from gpupipe.kernels.paste_blend import bytes_moved, paste_blend


def cases(device: torch.device, batch: int, rounds: int) -> Iterator[list[Row]]:
    frames, boxes, index = frames_of(batch, device), boxes_of(batch, device), torch.arange(batch, device=device)
    crops, backgrounds = crop_resize(frames, index, boxes), to_nv12(frames)
    half = device.type == "cuda"
    mouth = torch.rand(batch, 3, 320, 320, device=device)
    if half:
        mouth = mouth.half().contiguous(memory_format=torch.channels_last)
    for nv12, feather in ((True, 0.0), (True, 8.0), (False, 8.0)):

        def finish(nv12: bool = nv12, feather: float = feather) -> torch.Tensor:
            background = (backgrounds if nv12 else frames).index_select(0, index)
            given = (mouth, crops, index, frames, index, boxes, background)
            return paste_blend(*given, nv12=nv12, max_box=(BOX, BOX), feather=feather)

        yield from beside_torch(
            "paste_blend",
            module,
            finish,
            frames=batch,
            bytes_a_frame=bytes_moved(SIZE, (BOX, BOX), mouth.dtype, nv12=nv12),
            config={"case": f"{'NV12' if nv12 else 'BGR'}, feather {feather:g}", "box": BOX, "size": list(SIZE)},
            device=device,
            rounds=rounds,
        )


if __name__ == "__main__":
    main((__doc__ or "").split("\n")[0], cases)
