"""Crop, resize and mask on a CPU, written with LLVM: :func:`gpupipe.kernels.crop_resize.crop_and_input`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from llvmlite import ir
from torch import Tensor

from gpupipe.kernels.common_llvm import Pointer, Processor, Value, Writer, this_processor
from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, MASK_COLUMNS, MASK_ROWS, RING
from gpupipe.kernels.cubic_llvm import CHANNELS, Rows, Source, Taps, store_bytes, tables, wide_enough
from gpupipe.kernels.kernel_llvm import Kernel

_BLOCK = 16
"""Pixels of a row that are sorted into planes at a time."""


def takes(frames: Tensor, boxes: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel crops these."""
    return frames.is_contiguous() and dtype in (torch.float32, torch.float16) and wide_enough(boxes)


def crop_resize_llvm(frames: Tensor, index: Tensor, boxes: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Crop what it :func:`takes`: uint8 (B, 3, 328, 328) and ``dtype`` (B, 6, 320, 320), contiguous."""
    crops = frames.new_empty(len(boxes), 3, CROP_SIZE, CROP_SIZE)
    images = frames.new_empty(len(boxes), 6, INNER_SIZE, INNER_SIZE, dtype=dtype)
    kernel = _kernel(frames.shape[2], dtype)
    for frame, box, crop, image in zip(index.tolist(), boxes.tolist(), crops, images, strict=True):
        xmin, ymin, xmax, ymax = box
        corner = frames[frame, ymin:ymax, xmin:xmax]
        length = torch.tensor([3 * (xmax - xmin)], dtype=torch.int32, device="cpu")
        axes = tables(ymax - ymin, CROP_SIZE), tables(xmax - xmin, CROP_SIZE)
        kernel([corner, length, *axes[0], *axes[1], crop, image])
    return crops, images


@functools.lru_cache(maxsize=16)
def _kernel(width: int, dtype: torch.dtype) -> Kernel:
    return Kernel(_Plan(width, dtype), None, this_processor())


@dataclass(frozen=True)
class _Plan:
    """The code, for frames of a width."""

    width: int
    dtype: torch.dtype
    maps: int = 8

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        w = Writer(processor, self.maps)
        corner, length, down_places, down_weights, across_places, across_weights, crop, image = w.maps
        down, across = Taps(down_places, down_weights), Taps(across_places, across_weights)
        frame, crop, image = corner.to(torch.uint8), crop.to(torch.uint8), image.to(self.dtype)
        stride = 3 * self.width
        source = Source(lambda y: w.at(frame, w.times(y, stride)), w.load_index(length, 0), stride, 3)
        rows = Rows(w, source, down, across, CROP_SIZE, CROP_SIZE)
        pixels = w.scratch(CHANNELS * CROP_SIZE, torch.uint8)
        with w.loop(0, CROP_SIZE) as row:
            rows.make(w, row, lambda value, i: store_bytes(w, value, w.at(pixels, i)))
            with w.loop(0, CROP_SIZE, _BLOCK) as start:
                x = w.at_most(start, CROP_SIZE - _BLOCK)
                for channel, plane in enumerate(_planes(w, w.at(pixels, w.times(x, CHANNELS)))):
                    at = w.at(crop, w.times(row, CROP_SIZE), x, channel * CROP_SIZE**2)
                    w.ir.store(plane, at.place, align=1)
            with w.if_within(w.plus(row, -RING), INNER_SIZE):
                self._write_input(w, crop, image, w.plus(row, -RING))
        return w

    def _write_input(self, w: Writer, crop: Pointer, image: Pointer, row: Value) -> None:
        """A row of the network's six channels."""
        full, zero = w.splat(255.0), w.splat(0.0)
        with w.loop(0, INNER_SIZE, w.lanes) as x:
            for channel in range(3):
                source = w.at(crop, w.times(w.plus(row, RING), CROP_SIZE), x, channel * CROP_SIZE**2 + RING)
                value = w.ir.fdiv(w.load_bytes(source), full)
                for half in range(2):
                    plane = (3 * half + channel) * INNER_SIZE**2
                    w.store(value, w.at(image, w.times(row, INNER_SIZE), x, plane))
        first, stop = MASK_COLUMNS.start, MASK_COLUMNS.stop
        with (
            w.if_within(w.plus(row, -MASK_ROWS.start), MASK_ROWS.stop - MASK_ROWS.start),
            w.loop(first, stop, w.lanes) as start,
        ):
            x = w.at_most(start, stop - w.lanes)
            for channel in range(3, 6):
                w.store(zero, w.at(image, w.times(row, INNER_SIZE), x, channel * INNER_SIZE**2))


def _planes(w: Writer, pixels: Pointer) -> list[Value]:
    """Blue, green and red of a block of pixels."""
    loaded = w.ir.load(pixels.place, align=1, typ=ir.VectorType(ir.IntType(8), CHANNELS * _BLOCK))
    return [w.shuffled(loaded, loaded, range(channel, CHANNELS * _BLOCK, CHANNELS)) for channel in range(3)]
