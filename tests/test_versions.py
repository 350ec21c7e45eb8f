"""What tells one machine from another."""

from __future__ import annotations

import pytest

from gpupipe import versions


@pytest.mark.parametrize(
    ("model", "family", "flags", "name"),
    [
        ("Xeon", "6", "avx512_bf16 amx_tile amx_bf16", "Xeon with AMX"),
        ("Xeon", "6", "avx512_bf16 avx512_fp16", "Xeon"),
        ("Xeon", "", "", "Xeon"),
        ("AMD EPYC", "26", "avx512_bf16", "AMD EPYC family 26"),
        ("AMD EPYC", "", "", "AMD EPYC"),
        ("AMD EPYC 9B45", "26", "avx512_bf16", "AMD EPYC 9B45"),
    ],
)
def test_processors_of_one_name_are_told_apart(
    model: str, family: str, flags: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"model name": model, "cpu family": family, "flags": flags}
    monkeypatch.setattr(versions, "_processor_fact", facts.__getitem__)
    monkeypatch.setattr(versions, "available_cores", lambda: 2)
    assert versions.device_name("cpu") == f"{name}, 2 cores"


def test_a_processor_without_a_model_s_name_has_llvm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_processor_fact", lambda name: "")
    monkeypatch.setattr(versions.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "neoverse-v1")
    assert versions.processor_name() == "aarch64 neoverse-v1"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert versions.processor_name() == "aarch64"


def test_versions_are_compared_by_their_numbers() -> None:
    assert versions.numbers("3.7.1+git0af") == (3, 7, 1)
    assert versions.numbers("3.10") > versions.numbers("3.8.0")
