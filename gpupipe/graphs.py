"""CUDA graphs: a step's hundreds of launches recorded once and replayed as one; and branches beside each other."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gpupipe.errors import first_line

logger = logging.getLogger(__name__)

Output = TypeVar("Output")

_turn = threading.Lock()
"""Held by the thread that records, for none may wait for the device meanwhile, as another one's recording begins with;
and by the one that replays, until it has copied the output."""


class _Memory:
    """Memory that all recordings of a device have in common, for as long as there are any.

    It is used by one replay after the other, on whichever streams. Nothing is kept in it between them: an output is
    copied before the next one, which may write over it.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Replay ``graph`` on the current stream, behind what was queued where the last one was replayed."""
        current = torch.cuda.current_stream()
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current
        graph.replay()


_memories: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
"""By the device's number."""


@dataclass(frozen=True)
class _Captured:
    """A captured step: each call replays it on the current stream. It keeps ``step`` alive, and what that reads."""

    memory: _Memory
    graph: torch.cuda.CUDAGraph
    step: Callable[[], object]

    def __call__(self) -> None:
        self.memory.replay(self.graph)


def capture(step: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
    """Record ``step`` on the current CUDA device.

    Args:
        step: must read and write the same memory each time, and neither wait for the device nor copy from the host.

    Returns:
        what replays the recording on the current stream, and the output that each replay writes: to be copied before
        another recording of this device is replayed. The first keeps ``step`` alive, and what it reads.

    Raises:
        RuntimeError: ``step`` did something that cannot be recorded.
        torch.OutOfMemoryError: recordings have memory of their own, and there is not enough.
    """
    device = torch.cuda.current_device()
    side = own_stream(torch.device("cuda", device), "capture")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # in which Triton compiles, and libraries make what they need for a stream
    graph = torch.cuda.CUDAGraph()
    with _turn, torch.cuda.stream(side):
        torch.cuda.synchronize()
        # As torch.cuda.graph does, which would give pinned memory back too, for the next copies to ask for it again.
        torch.cuda.empty_cache()
        memory = _memories.get(device) or _memories.setdefault(device, _Memory())
        # The encoder's thread may wait for the device meanwhile: that is no fault of this thread's recording.
        graph.capture_begin(memory.pool, capture_error_mode="thread_local")
        try:
            output = step()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it says again that the recording failed
                _end(graph, memory.pool)
            raise
        _end(graph, memory.pool)
    return _Captured(memory, graph, step), output


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """``function`` on the current CUDA device as a recording of it, to be timed: Python takes longer to launch a kernel
    than many run. One that cannot be recorded, as the plain references that ask the host, is left as it is, aloud."""
    try:
        return capture(function)[0]
    except RuntimeError as error:
        logger.warning("cannot be recorded as a CUDA graph, and is launched piece by piece (%s)", first_line(error))
        return function


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a recording on the current stream whose memory comes from ``pool``.

    Raises:
        RuntimeError: it has failed. To the allocators of PyTorch 2.11 it would still go on: the pool is never free
            again, nor is what two streams have used; and nothing else can be recorded into that pool.
    """
    device = torch.cuda.current_device()
    try:
        graph.capture_end()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # newer ones know
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        _memories.pop(device, None)  # the next recording begins another
        raise


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[Callable[[Tensor | None], None]]:
    """Queue what is inside on a stream of its own, beside what comes after it; in a recording, as a branch.

    Gives a function to call with the result before it is used on the current stream: that waits for it, and its memory
    is not given away before what is queued there. On a CPU it is done at once.
    """
    if device.type != "cuda":
        yield lambda result: None
        return
    current, branch = torch.cuda.current_stream(device), own_stream(device, "branch")
    branch.wait_stream(current)

    def join(result: Tensor | None) -> None:
        current.wait_stream(branch)
        if result is not None:
            result.record_stream(current)

    with torch.cuda.stream(branch):
        yield join


def own_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """This thread's stream for one use, the same each time: of the 32 in torch's pool a thread takes few.

    The pool deals them out in turn, again and again. Two uses that share one wait for each other; and what another
    thread queues on a stream that is being captured becomes part of the graph.
    """
    return _stream(device, use, threading.get_ident())


@functools.cache
def _stream(device: torch.device, use: str, thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class GraphedStep:
    """A step with inputs of its own, replayed for each batch.

    Args:
        step: tensors with the batch along their first axis → such a tensor; see :func:`capture`.
        inputs: a first batch. Its size is the recording's; smaller batches are padded with their last sample.
    """

    def __init__(self, step: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.batch_size = len(inputs[0])
        self._inputs = [value.clone() for value in inputs]
        with torch.cuda.device_of(inputs[0]):
            # Not a lambda: by `self` that would keep this object alive, and the GPU's memory with it.
            self._replay, self._output = capture(functools.partial(step, *self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run a batch of at most :attr:`batch_size`. The result is a copy, which the next replay leaves alone."""
        count = len(inputs[0])
        with _turn, torch.cuda.device_of(self._output):
            for kept, given in zip(self._inputs, inputs, strict=True):
                kept[:count].copy_(given)
                if count < self.batch_size:
                    kept[count:].copy_(given[-1:].expand(self.batch_size - count, *given.shape[1:]))
            self._replay()
            return self._output[:count].clone()
