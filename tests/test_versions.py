"""What tells one machine from another."""

from __future__ import annotations

import pytest

from gpupipe import versions


@pytest.mark.parametrize(
    ("flags", "name"),
    [("avx512_bf16 amx_tile amx_bf16", "Xeon with AMX"), ("avx512_bf16 avx512_fp16", "Xeon"), ("", "Xeon")],
)
def test_processors_with_and_without_amx_have_different_names(
    flags: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_processor_fact", {"model name": "Xeon", "flags": flags}.__getitem__)
    monkeypatch.setattr(versions, "available_cores", lambda: 2)
    assert versions.device_name("cpu") == f"{name}, 2 cores"


def test_versions_are_compared_by_their_numbers() -> None:
    assert versions.numbers("3.7.1+git0af") == (3, 7, 1)
    assert versions.numbers("3.10") > versions.numbers("3.8.0")
