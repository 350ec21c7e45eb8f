"""CUDA graphs: a step's hundreds of launches, captured once and replayed as one; and streams for work side by side."""

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
"""Held during a capture, because a second capture would begin with a device synchronisation, which is illegal then; and
during a replay until its output has been copied."""


class _Memory:
    """Memory that all captured graphs of a device share, for as long as there are any.

    It serves one replay after the other, on whichever streams. Nothing is kept in it between replays: an output is
    copied before the next replay, which may overwrite it.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None

    def take(self) -> None:
        """Have the current stream wait for everything queued on the stream of the last replay, whose memory and inputs
        the next replay overwrites."""
        current = torch.cuda.current_stream()
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current


_memories: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
"""By the device's number."""


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: PyTorch 2.11's allocator of pinned memory goes on asking them, so they must stay."""


@dataclass(frozen=True)
class _Captured:
    """A captured step: a call replays it on the current stream. It keeps ``step`` alive, and what it reads."""

    memory: _Memory
    graph: torch.cuda.CUDAGraph
    step: Callable[[], object]

    def __call__(self) -> None:
        self.memory.take()
        self.graph.replay()


def capture(step: Callable[[], Output]) -> tuple[_Captured, Output]:
    """Capture ``step`` as a CUDA graph on the current device.

    Args:
        step: must read and write the same memory each time, and neither wait for the device nor copy from the host.

    Returns:
        a function that replays the graph on the current stream and keeps ``step`` alive, and what it reads; and the
        output, which each replay overwrites: copy it before another graph of this device is replayed.

    Raises:
        RuntimeError: ``step`` did something that cannot be captured.
        torch.OutOfMemoryError: captured graphs have memory of their own, and there is not enough.
    """
    device = torch.cuda.current_device()
    side = own_stream(torch.device("cuda", device), "capture")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # lets Triton compile, and libraries set themselves up for the stream
    graph = torch.cuda.CUDAGraph()
    with _turn, torch.cuda.stream(side):
        torch.cuda.synchronize()
        # As torch.cuda.graph does. But that frees unused pinned memory too, which the next copies would ask for again.
        torch.cuda.empty_cache()
        memory = _memories.get(device) or _memories.setdefault(device, _Memory())
        # "thread_local": the encoder's thread may wait for the device meanwhile without breaking this capture.
        graph.capture_begin(memory.pool, capture_error_mode="thread_local")
        try:
            output = step()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # says once more that the capture failed
                _end(graph, memory.pool)
            raise
        _end(graph, memory.pool)
    return _Captured(memory, graph, step), output


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """Capture ``function`` on the current CUDA device, to time it: many kernels run for less time than Python takes to
    launch them.

    A function that cannot be captured (the plain references synchronise with the host) is returned unchanged, with a
    warning.
    """
    try:
        return capture(function)[0]
    except RuntimeError as error:
        logger.warning("cannot be captured as a CUDA graph, and is launched kernel by kernel (%s)", first_line(error))
        return function


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End the capture on the current stream, whose memory comes from ``pool``.

    Raises:
        RuntimeError: the capture failed. PyTorch 2.11 would believe that it still goes on: its allocator would never
            free the pool, nor memory used on two streams, nothing else could be captured into that pool, and its
            generator would refuse random numbers outside of a capture.
    """
    device = torch.cuda.current_device()
    try:
        graph.capture_end()
    except RuntimeError:
        _failed.append(graph)
        with contextlib.suppress(RuntimeError):
            graph.reset()
        with contextlib.suppress(RuntimeError):  # newer versions have ended it themselves
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        with contextlib.suppress(RuntimeError):  # a capture that succeeds sets the generator right
            other, value = torch.cuda.CUDAGraph(), torch.empty(1, device="cuda")  # before it: there may be no memory
            other.capture_begin(capture_error_mode="thread_local")
            value.zero_()
            other.capture_end()
        _memories.pop(device, None)  # the next capture starts another
        raise


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[Callable[[Tensor | None], None]]:
    """Queue what is inside on a second stream, so that it runs alongside what follows; during a capture, as a branch.

    Yields a function to be called with the result before the current stream uses it. It makes that stream wait for the
    result, and keeps the result's memory until all that is queued on that stream is done. On a CPU everything runs at
    once.
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
    """This thread's stream for one use: cached so that a thread uses few of torch's 32 pool streams.

    The pool hands them out in turn, over and over. Two uses that are given the same stream wait for each other, and
    what another thread queues on a stream that is being captured becomes part of the graph.
    """
    return _stream(device, use, threading.get_ident())


@functools.cache
def _stream(device: torch.device, use: str, thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class GraphedStep:
    """A step captured with inputs of its own, to be replayed for each batch.

    Args:
        step: tensors with the batch along their first axis → such a tensor; see :func:`capture`.
        inputs: a first batch, whose size is the graph's; smaller batches are padded with their last sample.
    """

    def __init__(self, step: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.batch_size = len(inputs[0])
        self._inputs = [value.clone() for value in inputs]
        with torch.cuda.device_of(inputs[0]):
            # Not a lambda with `self`: that would keep this object alive, and the GPU's memory with it.
            self._replay, self._output = capture(functools.partial(step, *self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run a batch of at most :attr:`batch_size`. The result is a copy, which the next replay leaves alone."""
        count = len(inputs[0])
        with _turn, torch.cuda.device_of(self._output):
            self._replay.memory.take()
            for kept, given in zip(self._inputs, inputs, strict=True):
                kept[:count].copy_(given)
                if count < self.batch_size:
                    kept[count:].copy_(given[-1:].expand(self.batch_size - count, *given.shape[1:]))
            self._replay()
            return self._output[:count].clone()
