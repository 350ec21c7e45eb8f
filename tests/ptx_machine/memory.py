"""Global and shared memory, and what their users must not do.

Errors, beside access outside of what there is and at addresses that the access' width does not divide:

* a race: threads touch the same bytes of shared memory, one of them writing, with no barrier in between; or two
  threads write different values to the same place of global memory, or one reads what another block wrote;
* shared memory is read before anything was written to it, or before a copy that goes on beside the thread
  (``cp.async``) was waited for;
* tensor cores read shared memory that was written by ordinary stores without a proxy fence since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_machine.program import PtxError

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = np.ndarray[Any, np.dtype[Any]]

GRANULE = 4
"""Bytes of shared memory that are looked after together."""

NOBODY, SEVERAL = -1, -2


@dataclass
class Buffer:
    """Memory that a kernel may touch.

    Attributes:
        start: its address.
        data: its bytes.
        written_by: thread of the launch that wrote each byte, or ``NOBODY``; made when something is written.
    """

    start: int
    data: Array
    written_by: Array | None = field(default=None, repr=False)


class Global:
    """The buffers of a launch."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers = list(buffers)

    def load(self, machine: Machine, addresses: Array, lanes: Array, dtype: np.dtype[Any], count: int) -> Array:
        """``count`` values a thread, shape (lanes, count)."""
        found = np.empty((len(addresses), count), dtype)
        for buffer, some in self._parts(addresses, dtype.itemsize * count):
            places = addresses[some] - buffer.start
            if buffer.written_by is not None:
                writers = buffer.written_by[places[:, None] + np.arange(dtype.itemsize * count)]
                blocks = np.where(writers < 0, -1, writers // machine.threads)
                own = machine.thread_of_launch[lanes[some]] // machine.threads
                if ((blocks >= 0) & (blocks != own[:, None])).any():
                    raise PtxError("reads what another block of the same launch wrote")
            view, first = _typed(buffer.data, dtype, places)
            found[some] = view[first[:, None] + np.arange(count)]
        return found

    def store(self, machine: Machine, addresses: Array, lanes: Array, values: Array) -> None:
        """The opposite; ``values`` has shape (lanes, count)."""
        count = values.shape[1]
        width = values.itemsize * count
        for buffer, some in self._parts(addresses, width):
            places = addresses[some] - buffer.start
            if buffer.written_by is None:
                buffer.written_by = np.full(len(buffer.data), NOBODY, np.int32)
            view, first = _typed(buffer.data, values.dtype, places)
            index, given = first[:, None] + np.arange(count), values[some]
            touched = places[:, None] + np.arange(width)
            writers = machine.thread_of_launch[lanes[some]][:, None]
            others = ((buffer.written_by[touched] != NOBODY) & (buffer.written_by[touched] != writers)).any(axis=1)
            if others.any() and (view[index[others]] != given[others]).any():
                raise PtxError("writes another value to where another thread of the launch wrote")
            view[index] = given
            if (view[index] != given).any() and not np.isnan(given.astype(np.float64)).any():
                raise PtxError("threads write different values to the same place")
            buffer.written_by[touched] = writers

    def _parts(self, addresses: Array, width: int) -> list[tuple[Buffer, Any]]:
        """The buffers that accesses fall into, each with which of them do."""
        if (addresses % width).any():
            raise PtxError(f"address {int(addresses[addresses % width != 0][0]):#x} is no multiple of {width} bytes")
        lowest, highest = int(addresses.min()), int(addresses.max()) + width
        parts: list[tuple[Buffer, Any]] = []
        left = len(addresses)
        for buffer in self._buffers:
            end = buffer.start + len(buffer.data)
            if buffer.start <= lowest and highest <= end:
                return [(buffer, slice(None))]
            some = (addresses >= buffer.start) & (addresses + width <= end)
            if some.any():
                parts.append((buffer, some))
                left -= int(some.sum())
        if left:
            raise PtxError(f"{left} of {len(addresses)} addresses, from {lowest:#x} to {highest:#x}, are in no tensor")
        return parts


def _typed(data: Array, dtype: np.dtype[Any], places: Array) -> tuple[Array, Array]:
    """Bytes as an array of ``dtype``, and the places in it."""
    offset = int(places[0]) % dtype.itemsize if len(places) else 0
    usable = (len(data) - offset) // dtype.itemsize * dtype.itemsize
    return data[offset : offset + usable].view(dtype), ((places - offset) // dtype.itemsize).astype(np.int64)


class Shared:
    """The shared memory of a number of blocks.

    Places are bytes from the beginning of the first block's, a granule's record says who touched it last. Order is
    told by counters: a block's goes up at each barrier, a warp's at these and at its own.
    """

    def __init__(self, blocks: int, threads: int, size: int) -> None:
        self.size = -(-max(size, 1) // 16) * 16
        self._threads, self._warps = threads, threads // 32
        self.data = np.full(blocks * self.size, 0xFF, np.uint8)
        granules = len(self.data) // GRANULE
        self._block_time = np.zeros(blocks, np.int32)
        self._warp_time = np.zeros(blocks * self._warps, np.int32)
        self._writer = np.full(granules, NOBODY, np.int32)
        self._written_block, self._written_warp = np.zeros((2, granules), np.int32)
        self._reader, self._reader_warp = np.full((2, granules), NOBODY, np.int32)
        self._read_block, self._read_warp = np.zeros((2, granules), np.int32)
        self._copied = np.zeros(granules, bool)  # by a copy that was not waited for
        self._unfenced = np.zeros(granules, bool)  # written by ordinary stores, not yet for tensor cores to see

    def places(self, lanes: Array, addresses: Array, width: int) -> Array:
        """Where threads' addresses are.

        Raises:
            PtxError: outside of the block's memory, or at no multiple of ``width``.
        """
        if (addresses % width).any():
            raise PtxError(f"shared address {int(addresses[addresses % width != 0][0])} is no multiple of {width}")
        if len(addresses) and int(addresses.max()) + width > self.size:
            raise PtxError(f"shared address {int(addresses.max())} in a memory of {self.size} bytes")
        return (lanes // self._threads).astype(np.int64) * self.size + addresses

    def read(self, lanes: Array, places: Array, width: int) -> Array:
        """``width`` bytes a thread, shape (lanes, width)."""
        self.note_reads(lanes, places, width)
        return self.data[places[:, None] + np.arange(width)]

    def write(self, lanes: Array, places: Array, values: Array) -> None:
        """The opposite; ``values`` are bytes."""
        self.note_writes(lanes, places, values.shape[1])
        index = places[:, None] + np.arange(values.shape[1])
        self.data[index] = values
        if (self.data[index] != values).any():
            raise PtxError("threads write different values to the same place")

    def note_reads(self, lanes: Array, places: Array, width: int) -> None:
        """Raise if what is read is not there, or not surely; else remember who read it."""
        granules, lanes = _granules(lanes, places, width)
        if self._copied[granules].any():
            raise PtxError("reads what a copy that was not waited for is writing")
        if (self._writer[granules] == NOBODY).any():
            raise PtxError("reads shared memory that nothing was written to")
        self._must_be_ordered(granules, lanes, "reads what another thread has written without a barrier in between")
        block, warp = lanes // self._threads, lanes // 32
        fresh = self._read_block[granules] != self._block_time[block]
        fresh |= self._reader[granules] == NOBODY
        for record, value in ((self._reader, lanes), (self._reader_warp, warp)):
            record[granules[fresh]] = value[fresh]
        self._read_block[granules] = self._block_time[block]
        self._read_warp[granules] = self._warp_time[warp]
        for record, value in ((self._reader, lanes), (self._reader_warp, warp)):
            record[granules[record[granules] != value]] = SEVERAL

    def note_writes(self, lanes: Array, places: Array, width: int) -> None:
        """Raise if others may still read or write there; else remember who wrote."""
        granules, lanes = _granules(lanes, places, width)
        if width >= GRANULE:
            self._must_be_ordered(granules, lanes, "writes where another thread wrote without a barrier in between")
        block, warp = lanes // self._threads, lanes // 32
        reader = self._reader[granules]
        others = (reader != NOBODY) & (reader != lanes) & (self._read_block[granules] == self._block_time[block])
        same_warp = self._reader_warp[granules] == warp
        if (others & (~same_warp | (self._read_warp[granules] == self._warp_time[warp]))).any():
            raise PtxError("writes what another thread reads without a barrier in between")
        self._writer[granules] = lanes
        self._written_block[granules] = self._block_time[block]
        self._written_warp[granules] = self._warp_time[warp]
        self._unfenced[granules] = True

    def _must_be_ordered(self, granules: Array, lanes: Array, otherwise: str) -> None:
        writer, block, warp = self._writer[granules], lanes // self._threads, lanes // 32
        others = (writer != NOBODY) & (writer != lanes)
        same_warp = writer // 32 == warp
        now = np.where(same_warp, self._written_warp[granules] == self._warp_time[warp],
                       self._written_block[granules] == self._block_time[block])  # fmt: skip
        if (others & now).any():
            raise PtxError(otherwise)

    # ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pass_barrier(self) -> None:
        """All threads of every block have met."""
        self._block_time += 1
        self._warp_time += 1

    def pass_warp_barrier(self, warps: Array) -> None:
        """All threads of these warps have."""
        self._warp_time[warps] += 1

    def fence(self, lanes: Array) -> None:
        """What these threads wrote, or what was written before the last barrier, is there for tensor cores too."""
        own = np.zeros(len(self._block_time) * self._threads, bool)
        own[lanes] = True
        block = np.arange(len(self._writer)) // (self.size // GRANULE)
        fenced = np.isin(block, np.unique(lanes // self._threads)) & (self._written_block != self._block_time[block])
        self._unfenced[(self._writer != NOBODY) & (own[self._writer] | fenced)] = False

    def start_copy(self, lanes: Array, places: Array, values: Array) -> None:
        """Begin to write bytes beside the threads."""
        self.write(lanes, places, values)
        self._copied[_granules(lanes, places, values.shape[1])[0]] = True

    def finish_copy(self, lanes: Array, places: Array, width: int) -> None:
        """These threads have waited for it: what they copied is now as if they had stored it."""
        self._copied[_granules(lanes, places, width)[0]] = False
        self.note_writes(lanes, places, width)

    def read_by_tensor_cores(self, warps: Array, places: Array) -> Array:
        """Pairs of bytes that whole warpgroups read; ``places`` has a row for each warpgroup's first warp."""
        granules = places // GRANULE
        if self._unfenced[granules].any():
            raise PtxError("tensor cores read what ordinary stores wrote, with no proxy fence since")
        self.note_reads(np.repeat(warps * 32, places.shape[1]), places.ravel() // GRANULE * GRANULE, GRANULE)
        self._reader[granules] = self._reader_warp[granules] = SEVERAL
        return self.data[places[..., None] + np.arange(2)].view(np.float16)[..., 0]


def _granules(lanes: Array, places: Array, width: int) -> tuple[Array, Array]:
    """The granules of accesses, and whose they are."""
    if width <= GRANULE:
        return places // GRANULE, lanes
    steps = np.arange(0, width, GRANULE)
    return ((places[:, None] + steps) // GRANULE).ravel(), np.repeat(lanes, len(steps))
