"""Paste and blend on a CPU, written with LLVM: :func:`gpupipe.kernels.paste_blend.paste_blend`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir
from torch import Tensor

from gpupipe.kernels import nv12_llvm
from gpupipe.kernels.common_llvm import Pointer, Processor, Value, Writer, this_processor
from gpupipe.kernels.crop_resize import CROP_SIZE, INNER_SIZE, RING
from gpupipe.kernels.cubic_llvm import (
    CHANNELS,
    PIXEL,
    Rows,
    Source,
    Taps,
    load_pixel,
    store_pixel,
    tables,
    wide_enough,
)
from gpupipe.kernels.kernel_llvm import Kernel


def takes(mouth: Tensor, crops: Tensor, frames: Tensor, boxes: Tensor, out: Tensor, keep: Tensor | None) -> bool:
    """Whether the kernel finishes these."""
    contiguous = all(one.is_contiguous() for one in (mouth, crops, frames, out, keep) if one is not None)
    return contiguous and mouth.dtype == torch.float32 and wide_enough(boxes)


def finish(
    mouth: Tensor,
    crop: Tensor,
    frame: Tensor,
    box: Sequence[int],
    out: Tensor,
    *,
    nv12: bool,
    alpha: Tensor | None,
    keep: Tensor | None,
) -> None:
    """:func:`~gpupipe.kernels.paste_blend.paste_blend` of one sample that it :func:`takes`.

    Args:
        alpha: how much of the painted pixel shows, float32 (height, width) of the box; None is 1.
    """
    xmin, ymin, xmax, ymax = box
    kernel = _kernel(*frame.shape[:2], nv12, alpha is not None, keep is not None)
    down, across = tables(CROP_SIZE, ymax - ymin), tables(CROP_SIZE, xmax - xmin)
    corners = torch.tensor(box, dtype=torch.int32, device="cpu")
    kernel([mouth, crop, frame, corners, *down, *across, alpha, keep, out])


@functools.lru_cache(maxsize=32)
def _kernel(height: int, width: int, nv12: bool, faded: bool, kept: bool) -> Kernel:
    return Kernel(_Plan(height, width, nv12, faded, kept), None, this_processor())


@dataclass(frozen=True)
class _Plan:
    """The code, for frames of a size.

    Attributes:
        faded: the box fades at its edge.
        kept: some of the template's pixels stay.
    """

    height: int
    width: int
    nv12: bool
    faded: bool
    kept: bool
    maps: int = 11

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        w = Writer(processor, self.maps)
        mouth, crop, frame, box, down_places, down_weights, across_places, across_weights, alpha, keep, out = w.maps
        canvas = _canvas(w, mouth, crop.to(torch.uint8))
        corners, line = [w.load_index(box, i) for i in range(4)], CHANNELS * CROP_SIZE
        down, across = Taps(down_places, down_weights), Taps(across_places, across_weights)
        source = Source(lambda y: w.at(canvas, w.times(y, line)), line, line, CHANNELS)
        painter = _Painter(
            Rows(w, source, down, across, w.minus(corners[2], corners[0]), self.width),
            w.scratch(CHANNELS * self.width),
            frame.to(torch.uint8),
            self.width,
            corners,
            alpha if self.faded else None,
            keep.to(torch.uint8) if self.kept else None,
        )
        if self.nv12:
            self._write_nv12(w, painter, out.to(torch.uint8))
        else:
            _, ymin, _, ymax = painter.box
            with w.loop(ymin, ymax) as row:
                painter.paint(w, row, w.at(out.to(torch.uint8), w.times(row, 3 * self.width)), 3)
        return w

    def _write_nv12(self, w: Writer, painter: _Painter, out: Pointer) -> None:
        """Whole 2×2 cells, a row of them at a time."""
        xmin, ymin, xmax, ymax = painter.box
        left, right = w.times(w.divided(xmin, 2)[0], 2), w.times(w.divided(w.plus(xmax, 1), 2)[0], 2)
        line = CHANNELS * self.width
        rows = [w.scratch(line, torch.uint8) for _ in range(2)]
        with w.loop(w.divided(ymin, 2)[0], w.divided(w.plus(ymax, 1), 2)[0]) as cell:
            for below, finished in enumerate(rows):
                row = w.plus(w.times(cell, 2), below)
                with w.if_within_else(w.minus(row, ymin), w.minus(ymax, ymin)) as (inside, outside):
                    with inside:
                        painter.copy(w, row, left, xmin, finished)
                        painter.paint(w, row, finished, CHANNELS)
                        painter.copy(w, row, xmax, right, finished)
                    with outside:
                        painter.copy(w, row, left, right, finished)
            nv12_llvm.write_cells(w, rows, CHANNELS, (self.width, self.height), cell, left, right, out)


@dataclass(frozen=True)
class _Painter:
    """Finishes rows of a frame.

    Attributes:
        rows: of the box, resized.
        line: of floats, for one of them at a time.
        box: xmin, ymin, xmax and ymax.
    """

    rows: Rows
    line: Pointer
    frame: Pointer
    width: int
    box: list[Value]
    alpha: Pointer | None
    keep: Pointer | None

    def copy(self, w: Writer, row: Value, start: Value, stop: Value, target: Pointer) -> None:
        """Some of the template's pixels, if any, in four bytes each."""
        with w.if_within(start, stop), w.loop(start, stop) as x:
            store_pixel(w, load_pixel(w, self._template(w, row, x)), w.at(target, w.times(x, CHANNELS)))

    def paint(self, w: Writer, row: Value, target: Pointer, channels: int) -> None:
        """The pixels of the box, in so many bytes each; ``target`` is where the frame's row begins."""
        xmin, ymin, xmax, _ = self.box
        y, width = w.minus(row, ymin), w.minus(xmax, xmin)
        self.rows.make(w, y, lambda value, i: w.store(value, w.at(self.line, i)))
        with w.loop(0, width) as column:
            x = w.plus(xmin, column)
            painted = w.ir.load(w.at(self.line, w.times(column, CHANNELS)).place, align=4, typ=PIXEL)
            if self.alpha is not None or self.keep is not None:
                template = load_pixel(w, self._template(w, row, x))
            if self.alpha is not None:
                share = w.broadcast(w.at(self.alpha, w.times(y, width), column), CHANNELS)
                part = w.ir.fmul(w.ir.fsub(painted, template), share)
                painted = w.rounded(w.ir.fadd(part, template))
            if self.keep is not None:
                kept = w.ir.load(w.at(self.keep, w.times(row, self.width), x).place, align=1, typ=ir.IntType(8))
                painted = w.ir.select(w.ir.icmp_unsigned("!=", kept, ir.IntType(8)(0)), template, painted)
            store_pixel(w, painted, w.at(target, w.times(x, channels)), channels=channels)

    def _template(self, w: Writer, row: Value, x: Value) -> Pointer:
        return w.at(self.frame, w.times(row, 3 * self.width), w.times(x, 3))


def _canvas(w: Writer, mouth: Pointer, crop: Pointer) -> Pointer:
    """The mouth in whole numbers within the crop's ring: bytes (328, 328, 4)."""
    canvas = w.scratch(CHANNELS * CROP_SIZE**2, torch.uint8)
    integers = ir.VectorType(ir.IntType(32), w.lanes)

    def store(planes: list[Value], row: Value, x: Value) -> None:
        pixels = planes[0]
        for channel, plane in enumerate(planes[1:], start=1):
            pixels = w.ir.or_(pixels, w.ir.shl(plane, w.splat(8 * channel, integers)))
        at = w.at(canvas, w.times(w.plus(w.times(row, CROP_SIZE), x), CHANNELS))
        w.ir.store(pixels, at.place, align=1)

    with w.loop(0, CROP_SIZE) as row, w.loop(0, CROP_SIZE, w.lanes) as start:
        x = w.at_most(start, CROP_SIZE - w.lanes)
        places = [w.at(crop, w.times(row, CROP_SIZE), x, channel * CROP_SIZE**2) for channel in range(3)]
        store([w.ir.fptoui(w.load_bytes(place), integers) for place in places], row, x)
    scale = w.splat(255.0)
    with w.loop(0, INNER_SIZE) as row, w.loop(0, INNER_SIZE, w.lanes) as x:
        places = [w.at(mouth, w.times(row, INNER_SIZE), x, channel * INNER_SIZE**2) for channel in range(3)]
        values = [w.ir.fptoui(w.ir.fmul(w.load(place), scale), integers) for place in places]
        store(values, w.plus(row, RING), w.plus(x, RING))
    return canvas
