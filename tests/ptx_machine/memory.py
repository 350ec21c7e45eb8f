"""Global and shared memory, and which accesses are errors.

Errors, besides addresses out of bounds or not aligned to the access' width:

* a race: threads touch the same bytes of shared memory, one of them writing, with no barrier in between; or two
  threads write different values to the same place of global memory, or one reads what another block wrote;
* shared memory is read before anything was written to it, or before an asynchronous copy (``cp.async``) was waited
  for;
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
"""Bytes of shared memory that share a record."""

NOBODY, SEVERAL = -1, -2


@dataclass
class Buffer:
    """Memory that a kernel may touch.

    Attributes:
        start: its address.
        data: its bytes.
        written_by: the launch's thread that wrote each byte, or ``NOBODY``; None until something is written.
    """

    start: int
    data: Array
    written_by: Array | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the alignment, which all allocators give: aligned accesses are then rows of the data."""
        if self.start % 16:
            raise ValueError(f"a buffer at {self.start:#x}; expected a multiple of 16")


class Global:
    """The buffers of a launch."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers = list(buffers)

    def load(self, machine: Machine, addresses: Array, lanes: Array, dtype: np.dtype[Any], count: int) -> Array:
        """Load ``count`` values for each thread, shape (lanes, count)."""
        found = np.empty((len(addresses), count), dtype)
        for buffer, some in self._parts(addresses, dtype.itemsize * count):
            width, row = dtype.itemsize * count, (addresses[some] - buffer.start) // (dtype.itemsize * count)
            if buffer.written_by is not None:
                writers = _byte_rows(buffer.written_by, width)[row]
                own = machine.thread_of_launch[lanes[some]][:, None] // machine.threads
                if ((writers != NOBODY) & (writers // machine.threads != own)).any():
                    raise PtxError("reads what another block of the same launch wrote")
            found[some] = _byte_rows(buffer.data, width)[row].view(dtype)
        return found

    def store(self, machine: Machine, addresses: Array, lanes: Array, values: Array) -> None:
        """Store ``values`` of shape (lanes, count)."""
        given = np.ascontiguousarray(values).view(np.uint8)
        width = given.shape[1]
        for buffer, some in self._parts(addresses, width):
            row, writer = (addresses[some] - buffer.start) // width, machine.thread_of_launch[lanes[some]]
            if buffer.written_by is None:
                buffer.written_by = np.full(len(buffer.data), NOBODY, np.int32)
            rows, written_by = _byte_rows(buffer.data, width), _byte_rows(buffer.written_by, width)
            others = ((written_by[row] != NOBODY) & (written_by[row] != writer[:, None])).any(axis=1)
            if others.any() and (rows[row[others]] != given[some][others]).any():
                raise PtxError("writes another value to where another thread of the launch wrote")
            rows[row], written_by[row] = given[some], writer[:, None]
            if (rows[row] != given[some]).any():
                raise PtxError("threads write different values to the same place")

    def _parts(self, addresses: Array, width: int) -> list[tuple[Buffer, Any]]:
        """The buffers that are accessed, each with the accesses that fall into it."""
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


def _byte_rows(record: Array, width: int) -> Array:
    """A buffer's record as rows, one for each possible access of ``width`` bytes."""
    return record[: len(record) // width * width].reshape(-1, width)


class Shared:
    """The shared memory of several blocks.

    Places are counted in bytes from the start of the first block's memory. A granule's records say who touched it last,
    and what has happened since the last barrier, which all blocks pass together. A warp's time goes up at each barrier
    and at each of its own.
    """

    def __init__(self, blocks: int, threads: int, size: int) -> None:
        self.size = -(-max(size, 1) // 16) * 16
        self._threads, self._warps = threads, threads // 32
        self.data = np.full(blocks * self.size, 0xFF, np.uint8)
        granules = len(self.data) // GRANULE
        self._warp_time = np.zeros(blocks * self._warps, np.int32)
        self._writer = np.full(granules, NOBODY, np.int32)
        self._written_since = np.zeros(granules, bool)  # since the last barrier
        self._written_warp = np.zeros(granules, np.int32)
        self._reader, self._reader_warp = np.full((2, granules), NOBODY, np.int32)  # since the last barrier
        self._read_warp = np.zeros(granules, np.int32)
        self._copied = np.zeros(granules, bool)  # by a copy that was not waited for
        self._unfenced = np.zeros(granules, bool)  # written by ordinary stores, not yet for tensor cores to see

    def places(self, lanes: Array, addresses: Array, width: int) -> Array:
        """The places of threads' addresses.

        Raises:
            PtxError: outside of the block's memory, or not at a multiple of ``width``.
        """
        if (addresses % width).any():
            raise PtxError(f"shared address {int(addresses[addresses % width != 0][0])} is no multiple of {width}")
        if len(addresses) and int(addresses.max()) + width > self.size:
            raise PtxError(f"shared address {int(addresses.max())} in a memory of {self.size} bytes")
        return (lanes // self._threads).astype(np.int64) * self.size + addresses

    def read(self, lanes: Array, places: Array, width: int) -> Array:
        """Read ``width`` bytes for each thread, shape (lanes, width)."""
        self.note_reads(lanes, places, width)
        return self.data.reshape(-1, width).take(places // width, axis=0)

    def write(self, lanes: Array, places: Array, values: Array) -> None:
        """Write ``values``: bytes, shape (lanes, width)."""
        width = values.shape[1]
        self.note_writes(lanes, places, width)
        rows, which = self.data.reshape(-1, width), places // width
        rows[which] = values
        if (rows[which] != values).any():
            raise PtxError("threads write different values to the same place")

    def note_reads(self, lanes: Array, places: Array, width: int) -> None:
        """Raise if what is read was not written, or may not be there yet; otherwise record who read it."""
        row, lane = _row(places, width), lanes[:, None]
        writer = _at(self._writer, row, width)
        if _at(self._copied, row, width).any():
            raise PtxError("reads what a copy that was not waited for is writing")
        if (writer == NOBODY).any():
            raise PtxError("reads shared memory that nothing was written to")
        self._must_be_ordered(
            row, lane, width, writer, "reads what another thread has written without a barrier in between"
        )
        warp = lane // 32
        for record, value in ((self._reader, lane), (self._reader_warp, warp)):
            before = _at(record, row, width)
            _rows(record, width)[row] = np.where(before == NOBODY, value, before)
            # Of several that read there at once, one wrote its number last.
            others, granule = np.nonzero(_at(record, row, width) != value)
            _rows(record, width)[row[others], granule] = SEVERAL
        _rows(self._read_warp, width)[row] = self._warp_time[warp]

    def note_writes(self, lanes: Array, places: Array, width: int) -> None:
        """Raise if others may still read or write there; otherwise record who wrote."""
        row, lane = _row(places, width), lanes[:, None]
        if width >= GRANULE:
            writer = _at(self._writer, row, width)
            self._must_be_ordered(
                row, lane, width, writer, "writes where another thread wrote without a barrier in between"
            )
        warp = lane // 32
        reader = _at(self._reader, row, width)
        others = (reader != NOBODY) & (reader != lane)
        if others.any():
            same_warp = _at(self._reader_warp, row, width) == warp
            if (others & (~same_warp | (_at(self._read_warp, row, width) == self._warp_time[warp]))).any():
                raise PtxError("writes what another thread reads without a barrier in between")
        _rows(self._writer, width)[row] = lane
        _rows(self._written_since, width)[row] = True
        _rows(self._written_warp, width)[row] = self._warp_time[warp]
        _rows(self._unfenced, width)[row] = True

    def _must_be_ordered(self, row: Array, lane: Array, width: int, writer: Array, otherwise: str) -> None:
        others = _at(self._written_since, row, width) & (writer != lane)
        if not others.any():
            return
        warp = lane // 32
        in_warp = _at(self._written_warp, row, width) == self._warp_time[warp]
        if (others & ((writer // 32 != warp) | in_warp)).any():
            raise PtxError(otherwise)

    # ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pass_barrier(self) -> None:
        """All threads of every block have reached a barrier."""
        self._warp_time += 1
        self._written_since[:] = False
        self._reader[:] = self._reader_warp[:] = NOBODY

    def pass_warp_barrier(self, warps: Array) -> None:
        """All threads of these warps have reached the warp's barrier."""
        self._warp_time[warps] += 1

    def fence(self, lanes: Array) -> None:
        """Make what these threads wrote, and what was written before the last barrier, visible to tensor cores."""
        blocks = len(self.data) // self.size
        own, of_block = np.zeros(blocks * self._threads, bool), np.zeros((blocks, 1), bool)
        own[lanes] = of_block[lanes // self._threads] = True
        fenced = of_block & ~self._written_since.reshape(blocks, -1)
        self._unfenced[(self._writer != NOBODY) & (own[self._writer] | fenced.ravel())] = False

    def start_copy(self, lanes: Array, places: Array, values: Array) -> None:
        """Begin an asynchronous copy of bytes."""
        width = values.shape[1]
        self.write(lanes, places, values)
        _rows(self._copied, width)[_row(places, width)] = True

    def finish_copy(self, lanes: Array, places: Array, width: int) -> None:
        """These threads have waited for their copy, which now counts as stored by them."""
        _rows(self._copied, width)[_row(places, width)] = False
        self.note_writes(lanes, places, width)

    def read_by_tensor_cores(self, warps: Array, places: Array, dtype: np.dtype[Any]) -> Array:
        """Read 16-bit values for whole warpgroups; ``places`` has a row for each warpgroup's first warp."""
        lanes = np.repeat(warps.astype(np.int32) * 32, places.shape[1])
        chunks, first = np.unique(places.ravel() // _CHUNK, return_index=True)
        row = _row(chunks * _CHUNK, _CHUNK)
        if _at(self._unfenced, row, _CHUNK).any():
            raise PtxError("tensor cores read what ordinary stores wrote, with no proxy fence since")
        self.note_reads(lanes[first], chunks * _CHUNK, _CHUNK)
        _rows(self._reader, _CHUNK)[row] = _rows(self._reader_warp, _CHUNK)[row] = SEVERAL
        return self.data.view(dtype)[places // 2]


_CHUNK = 16
"""Bytes that are contiguous in every matrix that tensor cores read from shared memory."""


def _rows(record: Array, width: int) -> Array:
    """A record as rows, one for each possible access of ``width`` bytes."""
    return record.reshape(-1, max(width // GRANULE, 1))


def _row(places: Array, width: int) -> Array:
    return places // max(width, GRANULE)


def _at(record: Array, row: Array, width: int) -> Array:
    """A record's rows."""
    return _rows(record, width).take(row, axis=0)  # faster than an index
