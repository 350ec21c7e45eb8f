"""A cache of what is computed from each template frame, on the device and within a budget of memory."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpupipe.transfer import to_device

Tensors = dict[str, Tensor]

_ABSENT, _BEING_WRITTEN = -1, -2
"""These stand in place of a frame's slot in the bank."""


class FrameCache:
    """Tensors for each template frame, computed when first asked for, and kept as far as the budget allows.

    Several threads may ask at once. Two that ask for the same new frame may both compute it; no thread waits while
    another computes or stores a frame.

    Nothing is ever evicted. The template is walked there and back, so each frame comes round twice a period: which C
    of the L frames are kept makes no difference to the number of hits, and keeping the first C costs no copies.

    Args:
        length: number of template frames, L.
        compute: distinct frame numbers → tensors, each with the frames along its first axis.
        budget: bytes that the kept tensors may take.
        device: where ``compute`` leaves its tensors.
        cacheable: bool (L,), the frames that may be kept; None allows all.
    """

    def __init__(
        self,
        length: int,
        compute: Callable[[NDArray[np.int64]], Tensors],
        *,
        budget: int,
        device: torch.device,
        cacheable: NDArray[np.bool_] | None = None,
    ) -> None:
        self.budget = budget
        self.device = device
        self.capacity: int | None = None  # how many frames will be kept; known once one has been computed
        self.bytes_used = 0
        # A method of the cache's owner must not keep the owner alive: memory is to be freed with its last user.
        self._compute = weakref.WeakMethod(compute) if inspect.ismethod(compute) else lambda: compute
        self._bank: Tensors = {}
        self._slot = np.full(length, _ABSENT, dtype=np.int64)
        self._cacheable = np.ones(length, dtype=np.bool_) if cacheable is None else cacheable
        self._taken = 0  # how many slots, from the first on
        self._lock = threading.Lock()

    def lookup(self, frames: Sequence[int] | NDArray[np.int64]) -> tuple[Tensors, Tensor]:
        """Tensors, and an index into them: ``tensors[name][index[k]]`` belongs to ``frames[k]``.

        If all these frames are kept, the tensors are the whole bank; if none is, they are what was just computed.
        Nothing is copied in either case.

        Returns:
            the tensors, and the index: int64 (len(frames),), on the device.
        """
        frames = np.asarray(frames, dtype=np.int64)
        slot = self._slot[frames]
        if (slot >= 0).all():
            return self._bank, self._index(slot)
        wanted, inverse = np.unique(frames, return_inverse=True)
        missing = wanted[self._slot[wanted] < 0]
        computed: Tensors = {}
        if len(missing):
            computed = self._computed(missing)
            self._store(missing, computed)
        slot = self._slot[wanted]
        kept = slot >= 0
        if kept.all():
            return self._bank, self._index(slot[inverse])
        if not kept.any():
            return computed, self._index(inverse)
        # Some are kept and some are not: put this batch's rows together.
        position = np.empty(len(wanted), dtype=np.int64)
        position[kept] = np.arange(kept.sum())
        position[~kept] = kept.sum() + np.arange((~kept).sum())
        slots, rows = self._index(slot[kept]), self._index(np.searchsorted(missing, wanted[~kept]))
        together = {
            name: torch.cat([self._bank[name].index_select(0, slots), value.index_select(0, rows)])
            for name, value in computed.items()
        }
        return together, self._index(position[inverse])

    def owns(self, tensors: Tensors) -> bool:
        """Whether these tensors, from :meth:`lookup`, are the bank itself, which stays where it is."""
        return tensors is self._bank

    def _computed(self, frames: NDArray[np.int64]) -> Tensors:
        compute = self._compute()
        assert compute is not None, "the cache's owner is gone"
        return compute(frames)

    def _store(self, frames: NDArray[np.int64], computed: Tensors) -> None:
        """Keep as many of the computed frames as fit, except those that another thread is keeping."""
        with self._lock:
            rows, first = self._take_slots(frames, computed)
        if not len(rows):
            return
        index = self._index(rows)
        for name, value in computed.items():
            torch.index_select(value, 0, index, out=self._bank[name][first : first + len(rows)])
        self._slot[frames[rows]] = np.arange(first, first + len(rows))

    def _take_slots(self, frames: NDArray[np.int64], computed: Tensors) -> tuple[NDArray[np.int64], int]:
        """Which of the computed rows to keep, and the first of their slots, which are consecutive."""
        if self.capacity is None:
            size = sum(value[0].nbytes for value in computed.values())
            capacity = min(int(self._cacheable.sum()), max(0, self.budget) // max(1, size))
            self._bank = {name: value.new_empty(capacity, *value.shape[1:]) for name, value in computed.items()}
            self.capacity, self.bytes_used = capacity, capacity * size  # last: allocating may fail
        first = self._taken
        rows = np.flatnonzero((self._slot[frames] == _ABSENT) & self._cacheable[frames])[: self.capacity - first]
        self._slot[frames[rows]] = _BEING_WRITTEN
        self._taken += len(rows)
        return rows, first

    def _index(self, values: NDArray[np.int64]) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)
