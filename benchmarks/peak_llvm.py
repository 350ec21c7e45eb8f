"""A kernel that does nothing but multiply and add, in registers: what a core's arithmetic comes to at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpupipe.kernels.common_llvm import LINE, Processor, Writer, this_processor
from gpupipe.kernels.kernel_llvm import Kernel


class MultiplyAdds:
    """Callable from several threads at once.

    Args:
        dtype: float32, float16 or bfloat16, of what is multiplied.

    Attributes:
        operations: of a call; a multiply-add counts as two.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        processor = this_processor(dtype)
        plan = _Plan(processor.registers - 4)
        self._kernel = Kernel(plan, None, processor)
        self._vectors = (plan.chains + 2) * LINE  # of no more bytes
        products = processor.lanes * (2 if processor.dtype != processor.sums else 1)
        self.operations = 2 * products * plan.chains * plan.rounds

    def __call__(self) -> None:
        """Multiply and add."""
        self._kernel([torch.zeros(self._vectors, dtype=torch.uint8, device="cpu")])


@dataclass(frozen=True)
class _Plan:
    """The code. Sums of different chains do not wait for each other."""

    chains: int
    rounds: int = 1_000_000
    maps: int = 1

    def write(self, processor: Processor) -> Writer:
        """Write the kernel."""
        w = Writer(processor, self.maps)
        vectors = w.maps[0].to(w.sums)
        places = [w.at(vectors, chain * w.lanes) for chain in range(self.chains + 2)]
        if w.adds_pairs:
            load, multiply_add = w.load_pairs, w.multiply_add_pairs
        else:
            load, multiply_add = w.load, w.multiply_add
        a, b = (load(place) for place in places[self.chains :])
        sums = w.variables([w.load(place) for place in places[: self.chains]])
        with w.loop(0, self.rounds):
            for one in sums:
                w.set(one, multiply_add(a, b, w.get(one)))
        for one, place in zip(sums, places, strict=False):
            w.store(w.get(one), place)
        return w
