"""A pytest plugin that sets up the simulated GPU before any test module or conftest.py is imported.

With ``PTX_MACHINE=90`` Triton's kernels are compiled for compute capability 9.0 and executed, not interpreted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0" if "PTX_MACHINE" in os.environ else "1"
os.environ["GPUPIPE_FAIL_WITHOUT_CUDA"] = "1"

import torch

import operators  # isort: skip

operators.install(os.environ.get("PTX_MACHINE"))
torch.Tensor.__repr__ = operators.without_modes(torch.Tensor.__repr__)  # type: ignore[method-assign]


def pytest_collection_finish() -> None:
    """Make ``auto`` choose a plain engine and small batches: measuring interpreted engines takes minutes.

    Tests' clips are short, so steps are captured from the first batch on."""
    from gpupipe import avatar
    from gpupipe.engines import base
    from gpupipe.engines.declared import DECLARED

    avatar.CAPTURE_AFTER = 0
    for name in ("fused", "gluon"):
        DECLARED[name] = dataclasses.replace(DECLARED[name], slow_to_build=True)
    base.BATCH_SIZES["cuda"] = 4


@pytest.fixture(autouse=True)
def all_work_succeeds() -> Iterator[None]:
    with operators.no_failures():
        yield
