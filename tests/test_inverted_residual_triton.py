"""The kernels of the network's blocks, interpreted or on the GPU, against the plain-torch reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from gpupipe.kernels import depthwise_triton as depthwise_kernels
from gpupipe.kernels import inverted_residual as blocks
from gpupipe.kernels import inverted_residual_triton as block_kernels
from gpupipe.kernels import pointwise as pointwise_module
from gpupipe.kernels import pointwise_triton as pointwise_kernels
from gpupipe.kernels.inverted_residual import Block, depthwise_project, inverted_residual, inverted_residual_head
from gpupipe.kernels.pointwise import pointwise, upsample_expand

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16

BOUND = 4e-3
"""As a share of the largest value: four roundings to half precision, in another order than the reference's."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, HALF)


def block_of(channels: int, outputs: int) -> Block:
    """Seeded weights that keep values near 1, with biases that matter."""
    torch.manual_seed(0)
    hidden = 2 * channels
    layers = (
        nn.Conv2d(channels, hidden, 1),
        nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
        nn.Conv2d(hidden, outputs, 1),
    )
    for layer, scale in zip(layers, (channels**-0.5, 1 / 2, hidden**-0.5), strict=True):
        nn.init.normal_(layer.weight, std=scale)
        nn.init.normal_(layer.bias, std=0.5)  # type: ignore[arg-type]
    return blocks.pack_block(layers, device=DEVICE, dtype=HALF)


def by_kernel(function: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
    """A public function of the kernels' modules, run by Triton on any device."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, pointwise_module):
            patch.setattr(module, "backend", lambda device: "triton")
        return function(*given, **options).cpu()


def by_reference(function: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, pointwise_module):
            patch.setattr(module, "backend", lambda device: "torch")
        return function(*given, **options).cpu()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def check(function: Callable[..., Tensor], *given: Any, **options: Any) -> None:
    assert error(by_kernel(function, *given, **options), by_reference(function, *given, **options)) <= BOUND


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's tiles, in the interpreter too: several programs, chunks and blocks of channels."""
    for module in (block_kernels, depthwise_kernels, pointwise_kernels):
        monkeypatch.setattr(module, "INTERPRETED", False)


# ── pointwise ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "k", "n", "relu"),
    [((2, 9, 16, 16), 16, 32, True), ((1, 13, 11, 6), 16, 16, True), ((3, 10, 10, 128), 128, 256, False)],
)
def test_pointwise_matches_the_reference(shape: tuple[int, ...], k: int, n: int, relu: bool, small_tiles: None) -> None:
    """K in several blocks, N in several programs, a partly filled tile, and fewer channels stored than K."""
    weight, bias = noise(k, n, seed=1) / k**0.5, noise(n, seed=2).float()
    check(pointwise, noise(*shape), weight, bias, relu=relu)


@pytest.mark.parametrize("index", [None, [4, 0, 4]])
def test_pointwise_with_a_residual(index: list[int] | None) -> None:
    weight, bias = noise(16, 32, seed=1) / 4, noise(32, seed=2).float()
    residual = noise(5 if index else 3, 10, 7, 32, seed=3)
    x, places = noise(3, 10, 7, 16), None if index is None else torch.tensor(index, device=DEVICE)
    check(pointwise, x, weight, bias, relu=True, residual=residual, index=places)
    expected = by_reference(pointwise, x, weight, bias, relu=True, residual=residual, index=places)
    assert error(by_kernel(pointwise, x, weight, bias, relu=True), expected) > 10 * BOUND
    if places is not None:
        others = by_kernel(pointwise, x, weight, bias, relu=True, residual=residual, index=places - places.clamp_max(1))
        assert error(others, expected) > 10 * BOUND


# ── the decoder's entry ───────────────────────────────────────────────────────────────────────────────────────────────


def entry(low: tuple[int, ...], skip: tuple[int, ...], n: int) -> tuple[Tensor, ...]:
    index = torch.tensor([2, 0], device=DEVICE)[: low[0]]
    weights = noise(low[3], n, seed=1) / low[3] ** 0.5, noise(skip[3], n, seed=2) / skip[3] ** 0.5
    return noise(*low, seed=3), noise(*skip, seed=4), index, *weights, noise(n, seed=5).float()


@pytest.mark.parametrize(
    ("low", "skip", "n"),
    [((2, 5, 5, 16), (3, 10, 10, 16), 32), ((1, 3, 7, 64), (3, 6, 14, 128), 256), ((2, 1, 1, 16), (3, 2, 2, 32), 16)],
)
def test_upsample_expand_matches_the_reference(
    low: tuple[int, ...], skip: tuple[int, ...], n: int, small_tiles: None
) -> None:
    """Skips with more channels than low, taken in another order; channels in several blocks; a map of one pixel."""
    check(upsample_expand, *entry(low, skip, n))


def test_bound_fails_on_near_misses_of_the_entry() -> None:
    low, skip, index, low_weight, skip_weight, bias = given = entry((2, 5, 5, 16), (3, 10, 10, 16), 32)
    expected = by_reference(upsample_expand, *given)
    wrong = {
        "exchanged": (low, skip, index, skip_weight, low_weight, bias),
        "without bias": (low, skip, index, low_weight, skip_weight, 0 * bias),
        "another frame": (low, skip, index.flip(0), low_weight, skip_weight, bias),
    }
    for name, others in wrong.items():
        assert error(by_kernel(upsample_expand, *others), expected) > 10 * BOUND, name
    planes = nn.functional.interpolate(low.float().permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
    unaligned = planes.permute(0, 2, 3, 1) @ low_weight.float() + bias + skip[index].float() @ skip_weight.float()
    assert error(unaligned.relu().half().cpu(), expected) > 10 * BOUND


# ── depthwise and projection ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "outputs", "stride", "residual"),
    [
        ((1, 9, 70, 32), 16, 1, True),  # two-dimensional tiles
        ((1, 9, 129, 16), 16, 2, False),  # and out of an odd map
        ((3, 7, 5, 128), 32, 1, False),  # pixels as they come, over samples; channels in chunks
        ((2, 7, 5, 64), 64, 2, False),
        ((1, 5, 4, 32), 256, 1, True),  # too wide a projection: depthwise sums are written
        ((2, 5, 5, 128), 256, 2, False),
    ],
)
def test_depthwise_project_matches_the_reference(
    shape: tuple[int, ...], outputs: int, stride: int, residual: bool, small_tiles: None
) -> None:
    projection = block_of(shape[3] // 2, outputs).projection
    hidden = noise(*shape).relu()
    size = (shape[0], -(-shape[1] // stride), -(-shape[2] // stride), outputs)
    check(depthwise_project, hidden, projection, stride=stride, residual=noise(*size, seed=1) if residual else None)


@pytest.mark.skipif(
    block_kernels.INTERPRETED or DEVICE.type == "cuda", reason="counts what the machine without a GPU executes"
)
@pytest.mark.parametrize("stride", [1, 2])
def test_taps_are_summed_once_two_float16_at_a_time(stride: int) -> None:
    """Two float16 an instruction, in the layout they were loaded in: not again for each lane that multiplies them."""
    from ptx_machine.launch import machine
    from ptx_machine.machine import Counts

    height, width, hidden, counts = 8, 32, 64, Counts()
    with machine(int(os.environ["PTX_MACHINE"]), counts=counts):
        by_kernel(
            depthwise_project,
            noise(1, height * stride, width * stride, hidden),
            block_of(32, 32).projection,
            stride=stride,
        )
    summed = sum(n for opcode, n in counts.instructions.items() if opcode.startswith("fma.rn") and "f16x2" in opcode)
    assert summed == 9 * height * width * hidden // 2 // 32
    assert not any(opcode.startswith(("fma.rn.f32", "fma.rn.f16.")) for opcode in counts.instructions)


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "channels", "outputs", "stride"),
    [
        ((1, 9, 70, 16), 16, 16, 1),
        ((2, 7, 5, 32), 32, 32, 1),
        ((1, 9, 11, 64), 64, 128, 2),
        ((1, 5, 131, 16), 16, 32, 2),
        ((2, 8, 6, 6), 16, 16, 1),  # the image: fewer channels than the matrix has rows
        ((1, 6, 6, 64), 64, 64, 1),  # more channels than are worth recomputing: two kernels
    ],
)
def test_block_matches_the_reference(
    shape: tuple[int, ...], channels: int, outputs: int, stride: int, small_tiles: None
) -> None:
    block = block_of(channels, outputs)
    residual = stride == 1 and shape[3] == outputs
    check(inverted_residual, noise(*shape), block, stride=stride, residual=residual)


@pytest.mark.parametrize("dtype", [torch.uint8, HALF])
def test_block_with_head(dtype: torch.dtype, small_tiles: None) -> None:
    block, x = block_of(16, 16), noise(2, 9, 8, 16)
    head, bias = noise(16, 16, seed=1) / 4, noise(16, seed=2).float()
    found, expected = (
        by(inverted_residual_head, x, block, head, bias, residual=True, dtype=dtype) for by in (by_kernel, by_reference)
    )
    assert found.shape == (2, 3, 9, 8)
    if dtype == torch.uint8:
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference == 0).float().mean() > 0.9
        assert expected.float().std() > 40
    else:
        assert error(found, expected) <= BOUND
        without = by_reference(inverted_residual_head, x, block, head, bias, dtype=dtype)
        assert error(found, without) > 10 * BOUND, "it must add x"


def test_a_head_on_a_wide_block() -> None:
    """With more channels than are worth recomputing, the head is a separate kernel."""
    block, x = block_of(64, 64), noise(1, 6, 6, 64)
    check(inverted_residual_head, x, block, noise(64, 16, seed=1) / 8, noise(16, seed=2).float(), dtype=HALF)


def test_bound_fails_on_near_misses_of_a_block() -> None:
    block, x = block_of(16, 16), noise(2, 8, 9, 16)
    expected = by_reference(inverted_residual, x, block, residual=True)
    taps, bias, project, project_bias = block.projection
    wrong: dict[str, tuple[Block, bool]] = {
        "without x": (block, False),
        "without the expansion's bias": (block._replace(expand_bias=0 * block.expand_bias), True),
        "without the depthwise bias": (
            block._replace(projection=block.projection._replace(depthwise_bias=0 * bias)),
            True,
        ),
        "without the projection's bias": (
            block._replace(projection=block.projection._replace(project_bias=0 * project_bias)),
            True,
        ),
        "taps turned": (
            block._replace(
                projection=block.projection._replace(
                    depthwise=taps.reshape(3, 3, -1).transpose(0, 1).reshape(9, -1).contiguous()
                )
            ),
            True,
        ),
        "projection turned": (
            block._replace(projection=block.projection._replace(project=project.flip(0).contiguous())),
            True,
        ),
    }
    for name, (other, residual) in wrong.items():
        assert error(by_kernel(inverted_residual, x, other, residual=residual), expected) > 10 * BOUND, name


def test_beyond_the_edge_the_expanded_map_is_zero_not_the_input() -> None:
    """Zeros around x, expanded, would become ReLU(bias)."""
    block, x = block_of(16, 16), noise(1, 6, 7, 16)
    found = by_kernel(inverted_residual, x, block)
    around = nn.functional.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
    wrong = by_reference(inverted_residual, around, block)[:, 1:-1, 1:-1]
    assert error(found[:, 1:-1, 1:-1], wrong[:, 1:-1, 1:-1].contiguous()) <= BOUND
    assert error(found, wrong.contiguous()) > 10 * BOUND


# ── bfloat16 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def coarse(value: Any) -> Any:
    """Convert float16 tensors, also those of a block, to bfloat16."""
    if isinstance(value, tuple):
        return type(value)(*map(coarse, value))
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == HALF else value


@pytest.mark.skipif(block_kernels.INTERPRETED, reason="Triton's interpreter computes other values in bfloat16")
def test_kernels_in_bfloat16() -> None:
    """Their errors are up to eight times those of float16."""
    projection = block_of(16, 16).projection
    calls: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = [
        (pointwise, (noise(2, 9, 16, 16), noise(16, 32, seed=1) / 4, noise(32, seed=2).float()), {"relu": True}),
        (pointwise, (noise(3, 10, 10, 128), noise(128, 256, seed=1) / 11, noise(256, seed=2).float()), {}),
        (upsample_expand, entry((2, 5, 5, 16), (3, 10, 10, 16), 32), {}),
        (depthwise_project, (noise(1, 9, 70, 32).relu(), projection), {}),
        (inverted_residual, (noise(1, 9, 70, 16), block_of(16, 16)), {"residual": True}),
        (inverted_residual, (noise(1, 9, 11, 64), block_of(64, 128)), {"stride": 2}),
    ]
    for function, given, options in calls:
        found, expected = (by(function, *map(coarse, given), **options) for by in (by_kernel, by_reference))
        assert found.dtype == torch.bfloat16
        assert error(found, expected) <= 8 * BOUND, function.__name__
        # The control: the same in float16 is nearer to float16 than bfloat16 is.
        assert error(found.to(HALF), by_reference(function, *given, **options)) > BOUND / 2, function.__name__


# ── at the sizes they are made for ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "channels", "outputs", "stride"),
    [(320, 16, 32, 2), (160, 32, 64, 2), (80, 64, 128, 2), (160, 32, 32, 1), (40, 128, 256, 2), (10, 512, 512, 1)],
)
def test_blocks_on_the_gpu(size: int, channels: int, outputs: int, stride: int, dtype: torch.dtype) -> None:
    block, x = block_of(channels, outputs), noise(8, size, size, channels)
    block = Block(*(v.to(dtype) if v.dtype == HALF else v for v in block[:2]), block.projection)  # type: ignore[arg-type]
    projection = (v.to(dtype) if v.dtype == HALF else v for v in block.projection)
    block = block._replace(projection=blocks.Projection(*projection))
    found, expected = (
        by(inverted_residual, x.to(dtype), block, stride=stride, residual=channels == outputs and stride == 1)
        for by in (by_kernel, by_reference)
    )
    assert error(found, expected) <= (BOUND if dtype == HALF else 8 * BOUND)


@pytest.mark.cuda
@pytest.mark.hardware
@pytest.mark.parametrize(("size", "low", "skip", "n"), [(320, 32, 16, 128), (80, 64, 64, 256), (20, 256, 256, 1024)])
def test_the_decoder_s_entry_on_the_gpu(size: int, low: int, skip: int, n: int) -> None:
    check(upsample_expand, *entry((2, size // 2, size // 2, low), (3, size, size, skip), n))
