"""Cubins of the Gluon kernels: they are built, and run as PTX with a launch's arguments, without a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.8", reason="the Gluon kernels need Triton 3.8 (shared-memory gather)")

from gpupipe.benchmarks import gluon_cubins
from gpupipe.benchmarks.common import Row
from gpupipe.benchmarks.gluon_cubins import case_of, check, eager, grid_of, packed_arguments
from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.kernels.report_gluon import BLOCKS
from gpupipe.kernels.whole_block import whole_block

TESTS = str(Path(__file__).resolve().parent)

SHAPE = {"size": 8, "low": 16, "skip": 16, "hidden": 32, "out": 16}
FLAGS = {"residual": False, "head": False}
ENTRY = {"block": SHAPE | FLAGS, "tile": [6, 30]}


def build(folder: Path, *arguments: str) -> dict:
    """Build in a separate process: in this one Triton's interpreter may be on, with which nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gpupipe.benchmarks.gluon_cubins", "build", str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / gluon_cubins.MANIFEST).read_text())


def test_a_block_compiles_to_a_cubin_that_its_launch_fits(tmp_path: Path) -> None:
    manifest = build(tmp_path, "--arch", "80", "--block", "up5.1, head")
    (entry,) = manifest["kernels"]
    assert manifest["arch"] == 80
    assert (tmp_path / entry["file"]).read_bytes().startswith(b"\x7fELF")
    assert entry["shared_bytes"] == 256 * (16 + 32) * 2, "the halo's 16 channels and 32 hidden ones"
    small = entry | {"block": entry["block"] | {"size": 8}}
    case = case_of(small, 2, torch.device("cpu"))
    assert set(entry["arguments"]) == set(case.tensors(case.empty()))
    assert entry["arguments"][0] == "skip" and entry["arguments"][-1] == "out"
    assert grid_of(entry, 64) == (54 * 11, 64)


@pytest.mark.slow
def test_every_block_compiles_for_every_architecture(tmp_path: Path) -> None:
    for arch, kernels in ((80, 9), (86, 9), (89, 9), (90, 18), (100, 8)):
        entries = build(tmp_path / str(arch), "--arch", str(arch))["kernels"]
        assert len(entries) == kernels
        most = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228}[arch] * 1024 - 1024
        assert all(entry["shared_bytes"] <= most for entry in entries)


@pytest.mark.parametrize(
    "blocks", [pytest.param(["up3.1", "up4.1, down1.1"], id="some"), pytest.param([], id="all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_match_the_reference_at_full_size(arch: int, blocks: list[str]) -> None:
    """Run with the grid and parameters of a launch."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "ptx_machine.real_size", str(arch), *blocks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    executed = {80: (2, 9), 90: (4, 18)}[arch]
    assert done.stdout.count("equal") == executed[not blocks]


def test_arguments_are_where_the_driver_looks() -> None:
    values, addresses = packed_arguments([11, 1 << 47, 33])
    read = [ctypes.c_uint64.from_address(int(address)).value for address in addresses]
    assert read == [11, 1 << 47, 33, 0, 0] == values.tolist()


def test_check_and_baseline_match_the_reference() -> None:
    case = case_of(ENTRY, 2, torch.device("cpu"))
    expected = case.expected()
    check(expected, expected)
    with pytest.raises(AssertionError, match=r"expected 0\.01"):
        check(expected + 0.02, expected)
    with pytest.raises(AssertionError, match="on average"):
        check(torch.full_like(expected, torch.nan), expected)
    baseline = eager(case).permute(0, 2, 3, 1)
    assert (baseline.float() - expected.float()).abs().max() < 0.02
    headed = case_of(ENTRY | {"block": SHAPE | FLAGS | {"head": True}}, 2, torch.device("cpu"))
    mouth = headed.expected()
    assert mouth.shape == headed.empty().shape and mouth.dtype == torch.uint8
    check(mouth, mouth)
    with pytest.raises(AssertionError, match="97% equal"):
        check((mouth.int() + 2).to(torch.uint8), mouth)


def halves(folder: Path) -> list[Row]:
    """What the network's halves give, three samples at once, on the CPU."""
    kernels = [
        {"config": f"{name}, {how}", "tile": [6, 30], "block": dataclasses.asdict(block)}
        for name, block in BLOCKS.items()
        for how in ("mma.sync", "wgmma")
    ]
    manifest = {"triton": "3.8.0", "commit": "0" * 12, "kernels": kernels}
    (folder / gluon_cubins.MANIFEST).write_text(json.dumps(manifest))
    with torch.inference_mode():
        return [row for rows in gluon_cubins.run_halves(folder, torch.device("cpu"), 3, 1) for row in rows]


def test_the_engine_finds_a_kernel_for_each_of_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Blank:
        def __init__(self, folder: Path, entry: dict) -> None:
            self.entry = entry

        def launch(self, grid: tuple[int, int], tensors: dict[str, torch.Tensor]) -> None:
            launched.append(self.entry["config"])
            assert grid[1] == len(tensors["out"]) == 3
            tensors["out"].zero_()

    monkeypatch.setattr(gluon_cubins, "Cubin", Blank)
    (row,) = halves(tmp_path)
    assert set(launched) == {f"{name}, wgmma" for name in BLOCKS}
    assert row.error is not None and "steps of 255 off; expected 1.5" in row.error, "as nothing was painted"


def test_the_network_s_halves_are_checked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_cubins, "Cubins", lambda folder, entries: whole_block)
    monkeypatch.setattr(gluon_cubins, "seeded_network", lambda width: seeded_network(width=width / 8))
    rows = halves(tmp_path)
    assert [row.error for row in rows] == [None] * 6
    assert {(row.config["case"], row.metric) for row in rows if row.unit == "µs/frame"} == {
        ("template half", "latency"),
        ("speech half", "latency"),
    }
