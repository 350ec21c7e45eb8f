"""CUDA graphs: a step's hundreds of launches recorded once and replayed as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARMUP = 3
"""Runs before recording, in which libraries choose their algorithms and Triton compiles."""


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``step`` on the current CUDA device.

    Args:
        step: must read and write the same memory each time, and neither wait for the device nor copy from the host.

    Returns:
        what replays the recording on the current stream, and the output that each replay writes.

    Raises:
        RuntimeError: ``step`` did something that cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The encoder's thread may wait for the device meanwhile: that is no fault of this thread's recording. And when one
    # fails, torch leaves its stream the current one: the outer context does not.
    with torch.cuda.stream(torch.cuda.current_stream()):
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step()
    return graph.replay, output


class GraphedStep:
    """A step with inputs of its own, replayed for each batch.

    Args:
        step: tensors with the batch along their first axis → such a tensor; see :func:`capture`.
        inputs: a first batch. Its size is the recording's; smaller batches are padded with their last sample.
    """

    def __init__(self, step: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.batch_size = len(inputs[0])
        self._inputs = [value.clone() for value in inputs]
        self._replay, self._output = capture(lambda: step(*self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run a batch of at most :attr:`batch_size`. The result is a copy, which the next replay leaves alone."""
        count = len(inputs[0])
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept[:count].copy_(given)
            if count < self.batch_size:
                kept[count:].copy_(given[-1:].expand(self.batch_size - count, *given.shape[1:]))
        self._replay()
        return self._output[:count].clone()
