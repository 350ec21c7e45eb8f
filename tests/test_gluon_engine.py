"""The gluon engine: which blocks it gives to the whole-block kernel, and that its results match the network's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clips import network_inputs
from torch import Tensor

from gpupipe.benchmarks.seeded import seeded_network
from gpupipe.engines import gluon, make_engine
from gpupipe.engines.gluon import GluonEngine
from gpupipe.errors import DeviceError
from gpupipe.kernels.whole_block import PackedBlock, PackedHead, gluon_obstacle, whole_block
from gpupipe.models import MODES, Mode, UNet328
from gpupipe.models.hoisted import HoistedUp

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUND = 1.5
"""Allowed root mean square error in steps of 255: half precision and truncation, with seeded weights."""


def error(engine: GluonEngine, network: UNet328, batch: int = 2) -> tuple[float, float]:
    """Root mean square errors in steps of 255: against the network, and against it with the samples' images swapped."""
    image, audio = network_inputs(network.mode, batch)
    index = torch.arange(batch, device=engine.device).flip(0)
    levels = engine.decode(engine.encode(image.to(engine.device)), index, audio.to(engine.device)).cpu()
    assert (levels.dtype, levels.shape) == (torch.uint8, (batch, 3, 320, 320))

    def off(image: Tensor) -> float:
        return float((levels.float() + 0.5 - 255 * network(image, audio)).square().mean().sqrt())

    return off(image.flip(0)), off(image)


@pytest.mark.parametrize(("mode", "width"), [("hubert", 3 / 8), ("ave", 1 / 8), ("wenet", 1 / 8)])
@torch.no_grad()
def test_rearranged_network_matches_the_original(mode: Mode, width: float) -> None:
    """On reference kernels; also at a width whose channels are not powers of two."""
    network = seeded_network(mode, width=width)
    right, exchanged = error(GluonEngine(network, device=CPU), network)
    assert right <= BOUND
    assert exchanged > 3 * BOUND


@torch.no_grad()
def test_wrong_order_of_low_and_skip_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: concatenated the other way round, which fits every shape at this width."""
    network = seeded_network(width=1 / 8)
    joined = HoistedUp.joined
    monkeypatch.setattr(HoistedUp, "joined", lambda up: _exchanged(joined(up), up.low.in_channels))
    assert error(GluonEngine(network, device=CPU), network)[0] > 3 * BOUND


def _exchanged(both: Any, low: int) -> Any:
    both.weight.copy_(torch.cat([both.weight[:, low:], both.weight[:, :low]], dim=1))
    return both


@pytest.mark.parametrize(("after_hopper", "left_out"), [(False, set()), (True, {"up3.0"})])
@torch.no_grad()
def test_blocks_at_full_width_are_those_of_the_report(
    after_hopper: bool, left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has each of them and no others; a block that spills on an architecture is not used there."""
    pytest.importorskip("triton")
    from gpupipe.kernels.report_gluon import BLOCKS as COMPILED

    ran: set[str] = set()

    def record(
        skip: Tensor,
        block: PackedBlock,
        *,
        low: Tensor | None = None,
        index: Tensor | None = None,
        head: PackedHead | None = None,
    ) -> Tensor:
        facts = (skip.shape[1], block.low_channels, block.skip_channels, block.hidden_channels, block.out_channels)
        ends = (block.residual, head is not None)
        named = [
            name
            for name, shape in COMPILED.items()
            if (shape.size, shape.low, shape.skip, shape.hidden, shape.out) == facts
            and (shape.residual, shape.head) == ends
        ]
        assert named, f"{facts}, {ends}: not compiled ahead of time"
        ran.update(named)
        return whole_block(skip, block, low=low, index=index, head=head)

    monkeypatch.setattr(gluon, "whole_block", record)
    monkeypatch.setattr(gluon, "_after_hopper", lambda device: after_hopper)
    meta = torch.device("meta")
    engine = GluonEngine(UNet328("ave").eval(), device=meta)
    features = engine.encode(torch.empty(2, 6, 320, 320, device=meta))
    engine.decode(features, torch.empty(2, dtype=torch.int64, device=meta), torch.empty(2, 32, 16, 16, device=meta))
    assert ran == set(COMPILED) - left_out


def test_an_older_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "triton is 3.6.0; the Gluon kernels need 3.8"
    monkeypatch.setattr(gluon, "gluon_obstacle", lambda: told)
    with pytest.raises(DeviceError, match=f"^engine is 'gluon': {told}"):
        make_engine(seeded_network(width=1 / 8), device=torch.device("cuda"), engine="gluon", exact=False)


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.skipif(gluon_obstacle() is not None, reason=str(gluon_obstacle()))
@pytest.mark.parametrize("width", [1 / 2, 1])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_kernels_match_the_network_on_the_gpu(mode: Mode, width: float) -> None:
    network = seeded_network(mode, width=width)
    right, exchanged = error(GluonEngine(network, device=DEVICE), network, batch=3)
    assert right <= BOUND
    assert exchanged > 3 * BOUND
