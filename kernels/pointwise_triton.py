"""Triton kernels of :mod:`gpupipe.kernels.pointwise`: matrix products over the pixels of channels-last maps.

Both compute a tile of pixels by a tile of output channels, on tensor cores, accumulating in float32. Programs that
share pixels are neighbours, so a tile of the input comes from device memory once, and from L2 after that.

The upsampling expansion makes its left operand while loading: it gathers four neighbours (mostly from L1 and L2, since
four output pixels share a source pixel) and weighs float16 in float16 (:mod:`gpupipe.kernels.packed_triton`). That
saves writing and reading the upsampled map and the concatenation. Upsampling the product instead would take less
arithmetic, but there are two to four times as many hidden channels as low ones, which would all be gathered, and a map
of them would be written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpupipe.kernels.common_triton import INTERPRETED, can_pipeline
from gpupipe.kernels.launch_triton import launch
from gpupipe.kernels.packed_triton import accumulator_dtype, multiply_add, relu_to


# The last batch may be shorter. It must not be compiled for.
@triton.jit(do_not_specialize=["pixels"])
def _pointwise_kernel(
    x,
    weight,
    bias,
    residual,
    index,
    out,
    pixels,
    SAMPLE_PIXELS: tl.constexpr,
    STORED: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) // (N // BLOCK_N) * BLOCK_M
    channel = tl.program_id(0) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = tl.arange(0, BLOCK_M)
    inside = (first + pixel < pixels)[:, None]
    k = tl.arange(0, BLOCK_K)
    base = x + first.to(tl.int64) * STORED
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias + channel)[None, :]
    for start in range(0, K, BLOCK_K):
        mask = inside
        if STORED != K:
            mask = inside & (start + k < STORED)[None, :]
        values = tl.load(base + (pixel * STORED)[:, None] + (start + k)[None, :], mask=mask, other=0.0)
        total = tl.dot(values, tl.load(weight + (start + k)[:, None] * N + channel[None, :]), total)
    if residual is not None:
        if index is None:
            source = residual + first.to(tl.int64) * N + (pixel * N)[:, None]
        else:
            row = first + pixel
            sample = tl.load(index + row // SAMPLE_PIXELS, mask=row < pixels, other=0).to(tl.int64)
            source = residual + ((sample * SAMPLE_PIXELS + row % SAMPLE_PIXELS) * N)[:, None]
        total += tl.load(source + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    target = out + first.to(tl.int64) * N + (pixel * N)[:, None] + channel[None, :]
    values = relu_to(total, out.dtype.element_ty) if RELU else total.to(out.dtype.element_ty)
    tl.store(target, values, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def _upsample_expand_kernel(
    low,
    skip,
    index,
    low_weight,
    skip_weight,
    bias,
    out,
    samples,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    SKIP: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    BLOCK_SKIP: tl.constexpr,
):
    """Tiles are runs of pixels. Beyond the last pixel, the last tile reads that pixel again, and stores nothing."""
    area: tl.constexpr = HEIGHT * WIDTH
    low_height: tl.constexpr = HEIGHT // 2
    low_width: tl.constexpr = WIDTH // 2
    channel = tl.program_id(0) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) // (N // BLOCK_N) * BLOCK_M
    first = start // area
    position = start - first * area + tl.arange(0, BLOCK_M)
    inside = position < (samples - first) * area
    position = tl.minimum(position, (samples - first) * area - 1)
    sample = position // area
    pixel = position % area
    y, down = _neighbours(pixel // WIDTH, low_height, HEIGHT)
    x, right = _neighbours(pixel % WIDTH, low_width, WIDTH)
    BESIDE: tl.constexpr = LOW * min(low_width - 1, 1)
    BELOW: tl.constexpr = LOW * low_width * min(low_height - 1, 1)
    corner = (((sample * low_height + y) * low_width + x) * LOW)[:, None]
    down, right = down[:, None], right[:, None]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias + channel)[None, :]
    k = tl.arange(0, BLOCK_LOW)
    low += first.to(tl.int64) * (low_height * low_width * LOW)
    for begin in range(0, LOW, BLOCK_LOW):
        source = low + corner + (begin + k)[None, :]
        upper = _between(_load(source), _load(source + BESIDE), right)
        lower = _between(_load(source + BELOW), _load(source + BELOW + BESIDE), right)
        values = _between(upper, lower, down).to(low.dtype.element_ty)
        total = tl.dot(values, tl.load(low_weight + (begin + k)[:, None] * N + channel[None, :]), total)
    k = tl.arange(0, BLOCK_SKIP)
    source = skip + ((tl.load(index + first + sample).to(tl.int64) * area + pixel) * SKIP)[:, None]
    for begin in range(0, SKIP, BLOCK_SKIP):
        values = tl.load(source + (begin + k)[None, :])
        total = tl.dot(values, tl.load(skip_weight + (begin + k)[:, None] * N + channel[None, :]), total)
    to = out + start.to(tl.int64) * N + (tl.arange(0, BLOCK_M) * N)[:, None] + channel[None, :]
    tl.store(to, relu_to(total, out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _neighbours(position, LOW: tl.constexpr, HIGH: tl.constexpr):
    """For an upsampled position: the first of its two neighbours in the source, and the weight of the second."""
    scale: tl.constexpr = (LOW - 1) / (HIGH - 1)
    at = position.to(tl.float32) * scale
    first = tl.minimum(at.to(tl.int32), max(LOW - 2, 0))
    return first, at - first.to(tl.float32)


@triton.jit
def _load(pointers):
    """Loaded values, in the type that sums are computed in."""
    values = tl.load(pointers)
    return values.to(accumulator_dtype(values.dtype))


@triton.jit
def _between(a, b, weight):
    """``a`` and ``b`` mixed: ``b`` by ``weight`` (pixels, 1), ``a`` by the rest."""
    return multiply_add(b - a, weight.to(a.dtype), a)


def pointwise_tiles(k: int, n: int, *, narrow: bool = False, pipelined: bool = True) -> dict[str, int]:
    """The tile of a product of ``k`` by ``n`` channels, and how it is launched.

    Args:
        narrow: half as many channels per program: with a residual that is not indexed, the wider tile spills on sm_100.
        pipelined: copy to shared memory while tensor cores multiply; see ``common_triton.can_pipeline``.
    """
    if INTERPRETED:  # its cost is per program
        return {"BLOCK_M": min(4096, tl.TRITON_MAX_TENSOR_NUMEL // max(n, k)), "BLOCK_N": n, "BLOCK_K": k}
    return {
        "BLOCK_M": 128,
        "BLOCK_N": min(n, 64 if narrow else 128),
        "BLOCK_K": min(k, 64),
        "num_warps": 4 if n <= 64 else 8,
        "num_stages": 3 if pipelined else 1,
    }


def upsample_tiles(low: int, skip: int, n: int) -> dict[str, int]:
    """The tile of an upsampling expansion, and how it is launched."""
    if INTERPRETED:
        return {"BLOCK_M": 4096, "BLOCK_N": n, "BLOCK_LOW": low, "BLOCK_SKIP": skip}
    blocks = {"BLOCK_M": 128, "BLOCK_N": min(n, 128), "BLOCK_LOW": min(low, 32), "BLOCK_SKIP": min(skip, 64)}
    return {**blocks, "num_warps": 8, "num_stages": 1}


def pointwise_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """As :func:`~gpupipe.kernels.pointwise.pointwise`, on the GPU, in half precision."""
    samples, height, width, stored = x.shape
    k, n = weight.shape
    out = x.new_empty(samples, height, width, n)
    pixels = samples * height * width
    narrow = residual is not None and index is None
    tiles = pointwise_tiles(k, n, narrow=narrow, pipelined=can_pipeline(x.device))
    grid = (triton.cdiv(pixels, tiles["BLOCK_M"]) * (n // tiles["BLOCK_N"]),)
    if pixels:
        launch(
            _pointwise_kernel,
            grid,
            x,
            weight,
            bias,
            residual,
            index,
            out,
            pixels,
            SAMPLE_PIXELS=1 if index is None else height * width,
            STORED=stored,
            K=k,
            N=n,
            RELU=relu,
            **tiles,
        )
    return out


def upsample_expand_triton(
    low: Tensor, skip: Tensor, index: Tensor, low_weight: Tensor, skip_weight: Tensor, bias: Tensor
) -> Tensor:
    """As :func:`~gpupipe.kernels.pointwise.upsample_expand`, on the GPU, in half precision."""
    samples = len(low)
    _, height, width, skip_channels = skip.shape
    low_channels, n = low_weight.shape
    out = low.new_empty(samples, height, width, n)
    tiles = upsample_tiles(low_channels, skip_channels, n)
    grid = (triton.cdiv(samples * height * width, tiles["BLOCK_M"]) * (n // tiles["BLOCK_N"]),)
    if samples:
        launch(
            _upsample_expand_kernel,
            grid,
            low,
            skip,
            index,
            low_weight,
            skip_weight,
            bias,
            out,
            samples,
            HEIGHT=height,
            WIDTH=width,
            LOW=low_channels,
            SKIP=skip_channels,
            N=n,
            **tiles,
        )
    return out
