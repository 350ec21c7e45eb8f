"""CUDA graphs: a step's hundreds of launches recorded once and replayed as one; and branches beside each other."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_recording = threading.Lock()
"""Held by the thread that records: none may wait for the device meanwhile, as another one's recording begins with."""


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``step`` on the current CUDA device.

    Args:
        step: must read and write the same memory each time, and neither wait for the device nor copy from the host.

    Returns:
        what replays the recording on the current stream, and the output that each replay writes.

    Raises:
        RuntimeError: ``step`` did something that cannot be recorded.
        torch.OutOfMemoryError: a recording has memory of its own, and there is not enough.
    """
    side = _stream(torch.device("cuda", torch.cuda.current_device()), "recording", threading.get_ident())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # in which Triton compiles, and libraries make what they need for a stream
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with _recording, torch.cuda.stream(side):
        torch.cuda.synchronize()
        # As torch.cuda.graph does, which would give pinned memory back too, for the next copies to ask for it again.
        torch.cuda.empty_cache()
        # The encoder's thread may wait for the device meanwhile: that is no fault of this thread's recording.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            output = step()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it says again that the recording failed
                _end(graph, pool)
            raise
        _end(graph, pool)
    return graph.replay, output


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a recording on the current stream whose memory comes from ``pool``.

    Raises:
        RuntimeError: it has failed. To the allocators of PyTorch 2.11 it would still go on: the pool is never free
            again, nor is what two streams have used.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # newer ones know
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
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
    current, branch = torch.cuda.current_stream(device), _stream(device, "branch", threading.get_ident())
    branch.wait_stream(current)

    def join(result: Tensor | None) -> None:
        current.wait_stream(branch)
        if result is not None:
            result.record_stream(current)

    with torch.cuda.stream(branch):
        yield join


@functools.cache
def _stream(device: torch.device, use: str, thread: int) -> torch.cuda.Stream:
    """A thread's stream for one use: torch deals out the same 32 again and again, to other threads as well.

    What another thread queued on a stream that is being recorded would become part of the recording.
    """
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
            self._replay, self._output = capture(lambda: step(*self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run a batch of at most :attr:`batch_size`. The result is a copy, which the next replay leaves alone."""
        count = len(inputs[0])
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept[:count].copy_(given)
            if count < self.batch_size:
                kept[count:].copy_(given[-1:].expand(self.batch_size - count, *given.shape[1:]))
        with torch.cuda.device_of(self._output):
            self._replay()
        return self._output[:count].clone()
