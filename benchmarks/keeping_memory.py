"""A process in which glibc keeps freed memory: eager PyTorch on a CPU spends much of its time on asking for it anew."""

from __future__ import annotations

import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""See mallopt(3). It counts when a process starts: one that has begun to keep memory does not go back."""


def can_keep_memory() -> bool:
    """Whether programs here allocate by glibc."""
    return platform.libc_ver()[0] == "glibc"


def process_keeping_memory() -> ProcessPoolExecutor:
    """Start the process; it ends with this one at the latest."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, ENVIRONMENT):
        executor.submit(os.getpid).result()
    return executor
