"""The Gluon kernels of whole blocks, compiled and executed without a GPU or on one, against the plain reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", minversion="3.8", reason="the Gluon kernels need Triton 3.8 (shared-memory gather)")

from ptx_machine.launch import compiled, machine
from ptx_machine.machine import Counts

from gpupipe.kernels.whole_block import PackedBlock, PackedHead, pack_head, pack_whole_block, pad_channels, whole_block

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

EXPANDS = [False, True]
"""By mma.sync, and by wgmma."""

FIRST = torch.tensor([0])
"""For one sample, which takes the first skip."""


@pytest.fixture(scope="module")
def kernels() -> Any:
    if CUDA:
        from gpupipe.kernels import whole_block_gluon

        return whole_block_gluon
    return compiled("gpupipe.kernels.whole_block_parts", "gpupipe.kernels.whole_block_gluon")


def layer(inputs: int, outputs: int, kernel: int = 1, *, groups: int = 1) -> nn.Conv2d:
    made = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    nn.init.normal_(made.weight, std=(inputs // groups * kernel**2) ** -0.5)
    nn.init.normal_(made.bias, std=0.3)
    return made.requires_grad_(False)


def block_of(low: int, skip: int, hidden: int, out: int, *, residual: bool = False) -> PackedBlock:
    torch.manual_seed(low + skip + hidden + out)
    layers = layer(low + skip, hidden), layer(hidden, hidden, 3, groups=hidden), layer(hidden, out)
    return pack_whole_block(*layers, low_channels=low, residual=residual)


def noise(*shape: int) -> Tensor:
    """A random map of ``shape`` (B, H, W, C), padded."""
    return pad_channels(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).half()


def run(kernels: Any, skip: Tensor, block: PackedBlock, *, wgmma: bool = False, **options: Any) -> Tensor:
    """Run the kernel; its result on the CPU."""
    if wgmma and CUDA and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor | PackedHead) else value for name, value in options.items()
    }
    with nullcontext() if CUDA else machine(90 if wgmma else 80):
        return kernels.whole_block_gluon(skip.to(DEVICE), block.to(DEVICE), wgmma=wgmma, **moved).cpu()


def check(found: Tensor, expected: Tensor) -> None:
    """Float16 rounding of sums of nine taps and of the hidden tensor, on values of 0 to 6; a mouth within one step."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).abs()
    if found.dtype == torch.uint8:
        assert error.max() <= 1 and (error == 0).double().mean() > 0.97
    else:
        assert error.max() < 6e-3 and error.mean() < 4e-4, f"{error.max()}, {error.mean()} on average"


@pytest.mark.parametrize("wgmma", EXPANDS)
def test_plain_block_with_residual(kernels: Any, wgmma: bool) -> None:
    """Tiles that reach over the map's right and lower edge; 6 channels of 16 and 12 hidden ones of 32 are used."""
    skip, block = noise(1, 7, 31, 6), block_of(0, 6, 12, 6, residual=True)
    check(run(kernels, skip, block, wgmma=wgmma), whole_block(skip, block))


@pytest.mark.parametrize("wgmma", EXPANDS)
def test_upsampled_and_concatenated(kernels: Any, wgmma: bool) -> None:
    """A skip with fewer channels than the upsampled map, two chunks of hidden channels, and negative controls."""
    low, skip, block = noise(1, 4, 15, 20), noise(1, 8, 30, 12), block_of(20, 12, 40, 8)
    found = run(kernels, skip, block, low=low, index=FIRST, wgmma=wgmma)
    check(found, whole_block(skip, block, low=low, index=FIRST))
    if wgmma:
        return
    for wrong in (not_aligned(skip, block, low), swapped(skip, block, low), unbiased(skip, block, low)):
        with pytest.raises(AssertionError):
            check(found, wrong)
    with pytest.raises(AssertionError):
        check(found, padded_after_expanding(skip, block, low))


def not_aligned(skip: Tensor, block: PackedBlock, low: Tensor) -> Tensor:
    """Upsampling with align_corners=False."""
    planes = low.permute(0, 3, 1, 2).float()
    up = nn.functional.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)
    return on_concatenated(torch.cat([up.permute(0, 2, 3, 1), skip.float()], dim=-1), block)


def swapped(skip: Tensor, block: PackedBlock, low: Tensor) -> Tensor:
    """The skip before the upsampled map."""
    order = torch.arange(block.expand.shape[1]).roll(block.low_channels)
    return whole_block(skip, replaced(block, expand=block.expand[:, order]), low=low, index=FIRST)


def unbiased(skip: Tensor, block: PackedBlock, low: Tensor) -> Tensor:
    without = replaced(block, expand_bias=torch.zeros_like(block.expand_bias))
    return whole_block(skip, without, low=low, index=FIRST)


def padded_after_expanding(skip: Tensor, block: PackedBlock, low: Tensor) -> Tensor:
    """Zeros around the *input*: the hidden tensor is ReLU(bias) outside the map, where it should be 0."""
    up = nn.functional.interpolate(low.permute(0, 3, 1, 2).float(), scale_factor=2, mode="bilinear", align_corners=True)
    entry = torch.cat([up.permute(0, 2, 3, 1), skip.float()], dim=-1)
    around = nn.functional.pad(entry, (0, 0, 1, 1, 1, 1))
    return on_concatenated(around, block)[:, 1:-1, 1:-1]


def on_concatenated(entry: Tensor, block: PackedBlock) -> Tensor:
    wide = pad_channels(entry.half())
    columns = nn.functional.pad(block.expand, (0, wide.shape[-1] - block.expand.shape[1]))
    return whole_block(wide.contiguous(), replaced(block, expand=columns, low_channels=0))


def replaced(block: PackedBlock, **fields: Any) -> PackedBlock:
    return PackedBlock(**(vars(block) | fields))


def test_head(kernels: Any) -> None:
    torch.manual_seed(0)
    skip, block, head = noise(1, 6, 31, 16), block_of(0, 16, 32, 16, residual=True), pack_head(layer(16, 3))
    found = run(kernels, skip, block, head=head)
    expected = whole_block(skip, block, head=head)
    check(found, expected)
    with pytest.raises(AssertionError):
        check(found, (expected.int() + 2).to(torch.uint8))


def test_samples_of_a_batch_and_of_a_bank(kernels: Any) -> None:
    low, bank, index = noise(2, 2, 4, 16), noise(3, 4, 8, 16), torch.tensor([2, 0])
    block = block_of(16, 16, 32, 16)
    found = run(kernels, bank, block, low=low, index=index)
    check(found, whole_block(bank[index], block, low=low, index=torch.arange(2)))


@pytest.mark.skipif(CUDA, reason="counts what the machine without a GPU executes")
@pytest.mark.parametrize("wgmma", EXPANDS)
def test_no_bank_conflicts_and_no_wasted_sectors(kernels: Any, wgmma: bool) -> None:
    """And a warp's loads and stores of 16 bytes a thread touch no more memory than they move."""
    counts, block, low = Counts(), block_of(32, 32, 64, 32), noise(1, 12, 60, 32)
    with machine(90 if wgmma else 80, counts=counts):
        kernels.whole_block_gluon(noise(1, 24, 120, 32), block, wgmma=wgmma, low=low, index=FIRST)
    assert counts.shared == counts.fewest_shared
    wide = [opcode for opcode in counts.sectors if opcode.endswith("v4.b32")]
    assert len(wide) == 2, "loads and stores"
    assert all(counts.sectors[opcode] == counts.fewest_sectors[opcode] for opcode in wide)


def test_an_empty_batch_launches_nothing(kernels: Any) -> None:
    assert run(kernels, noise(0, 4, 8, 16), block_of(0, 16, 32, 16)).shape == (0, 4, 8, 16)


def test_maps_that_do_not_fit_are_refused(kernels: Any) -> None:
    for channels, residual in ((20, False), (12, False), (12, True)):
        with pytest.raises(ValueError, match="skip has shape"):
            run(kernels, torch.zeros(1, 4, 8, channels).half(), block_of(0, 16, 32, 16, residual=residual))


@pytest.mark.slow
@pytest.mark.parametrize("wgmma", EXPANDS)
@pytest.mark.parametrize(
    ("low", "skip", "hidden", "out", "residual"),
    [
        (32, 32, 128, 16, False),
        (32, 16, 128, 16, False),
        (0, 16, 32, 16, True),
        (32, 32, 128, 32, False),
        (0, 32, 64, 32, True),
        (64, 64, 256, 32, False),
        (0, 64, 128, 64, True),
    ],
)
def test_every_block_at_full_width(
    kernels: Any, low: int, skip: int, hidden: int, out: int, residual: bool, wgmma: bool
) -> None:
    block = block_of(low, skip, hidden, out, residual=residual)
    x, below = noise(2, 14, 62, skip), {"low": noise(2, 7, 31, low), "index": torch.tensor([1, 0])} if low else {}
    check(run(kernels, x, block, wgmma=wgmma, **below), whole_block(x, block, **below))
