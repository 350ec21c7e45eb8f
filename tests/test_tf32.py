"""Where TF32 is kept off, and that the program's own switches are restored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines.compiled import CompiledEngine
from gpupipe.engines.eager import EagerEngine
from gpupipe.models.audio_encoder import AudioEncoder
from gpupipe.speech import SpeechEncoder
from gpupipe.tf32 import own_precision

CUDA = torch.device("cuda")


def switches() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def switched_on() -> Iterator[None]:
    """The switches turned on, as a program may have set them."""
    before = switches()[1:]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_is_off_within_and_cudnn_stays_on() -> None:
    enabled = torch.backends.cudnn.enabled
    with own_precision(CUDA):
        assert switches() == (enabled, False, False)
        with own_precision(torch.device("cpu")), own_precision(CUDA):
            pass
        assert switches() == (enabled, False, False)
    assert switches() == (enabled, True, True)
    with own_precision(torch.device("cpu")):
        assert switches() == (enabled, True, True)


def test_overlapping_threads_leave_the_switches_as_they_were() -> None:
    """The second thread enters before the first one leaves, and leaves after it."""
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with own_precision(CUDA):
            entered.set()
            assert left.wait(10)

    thread = threading.Thread(target=second)
    with own_precision(CUDA):
        thread.start()
        assert entered.wait(10)
    assert switches()[1:] == (False, False)
    left.set()
    thread.join()
    assert switches()[1:] == (True, True)


@pytest.mark.parametrize(("older", "newer"), [(True, "ieee"), (False, "tf32")])
def test_tf32_switches_under_their_newer_names(older: bool, newer: str) -> None:
    """Where settings differ, PyTorch can no longer read them under the older names."""
    cudnn: Any = torch.backends.cudnn
    product: Any = torch.backends.cuda.matmul
    cudnn.allow_tf32 = product.allow_tf32 = older
    renamed = (cudnn.conv, cudnn.rnn, product)
    for switch in renamed:
        switch.fp32_precision = newer
    with own_precision(CUDA):
        assert {switch.fp32_precision for switch in renamed} == {"ieee"}
    assert {switch.fp32_precision for switch in renamed} == {newer}


@pytest.mark.parametrize("level", ["highest", "high", "medium"])
def test_matmul_precision_is_left_as_it_was(level: str) -> None:
    torch.set_float32_matmul_precision(level)
    with own_precision(CUDA):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == level
    torch.set_float32_matmul_precision("highest")


def test_autocast_is_off_within() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with own_precision(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_the_speech_encoder_runs_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(AudioEncoder().state_dict(), tmp_path / "encoder.pth")
    encoder = SpeechEncoder(tmp_path / "encoder.pth", "cpu")
    monkeypatch.setattr("gpupipe.speech.own_precision", lambda device: own_precision(CUDA))
    found = []

    def look(windows: torch.Tensor) -> torch.Tensor:
        found.append(switches()[1:])
        return torch.zeros(len(windows), 512)

    monkeypatch.setattr(encoder.encoder, "forward", look)
    assert len(list(encoder.feature_rows([np.zeros(16000, np.float32)]))) > 2
    assert found and set(found) == {(False, False)}
    assert switches()[1:] == (True, True)


@pytest.mark.parametrize("kind", [EagerEngine, CompiledEngine])
def test_engines_run_without_it(kind: type[EagerEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, although the network itself runs on the CPU here."""
    monkeypatch.setattr("gpupipe.engines.eager.own_precision", lambda *_: own_precision(CUDA))
    found = []

    def look(*_: object) -> tuple[torch.Tensor, ...]:
        found.append(switches()[1:])
        return (torch.zeros(1, 1, 1, 1),) * 6

    engine = kind(seeded_network(width=1 / 8), device=torch.device("cpu"))
    engine._encode = engine._decode = look  # type: ignore[assignment]
    engine.decode(engine.encode(torch.zeros(1, 6, 320, 320)), torch.tensor([0]), torch.zeros(1, 32, 16, 16))
    assert found == [(False, False)] * 2
    assert switches()[1:] == (True, True)


def test_switches_that_follow_others_still_do() -> None:
    """So that a program may go on with one setting for all."""
    backends: Any = torch.backends
    renamed = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [switch.fp32_precision for switch in renamed]
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = True
    try:
        for switch in renamed:
            switch.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        with own_precision(CUDA):
            pass
        backends.fp32_precision = "ieee"
        assert [switch.fp32_precision for switch in renamed] == ["ieee"] * 3
    finally:
        backends.fp32_precision = "none"
        for switch, precision in zip(renamed, before, strict=True):
            switch.fp32_precision = precision


def test_a_cpu_s_products_are_left_as_they_were() -> None:
    products: Any = torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision("medium")
    products.fp32_precision = "ieee"
    try:
        with own_precision(CUDA):
            pass
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_half_precision_needs_no_switch() -> None:
    with own_precision(CUDA, torch.float16):
        assert switches()[1:] == (True, True)
