"""The Gluon kernels of :mod:`gpupipe.kernels.whole_block`: an inverted residual that keeps its expanded tensor on chip.

A program of four warps makes 6×30 pixels of one sample, all channels, from a halo of 8×32 pixels:

    halo in shared memory (256 pixels × channels; low upsampled and concatenated on the way in)
      │ for 32 hidden channels at a time:
      ├─ expand: tensor cores, 256×K by K×32 (+ mask × bias) ── ReLU ──> hidden[256][32], float16, shared memory
      ├─ depthwise: a thread owns a column and 8 channels, goes down the 8 rows, and uses each value that it reads
      │             for up to three output rows; float16 multiply-adds, two at a time ── ReLU, in registers
      └─ project: those registers *are* the left operand of the products that add to out[180][C], float32
    then skip, head, and one store.

:mod:`gpupipe.kernels.whole_block_parts` has the parts, with their layouts and why there are no bank conflicts.

By instruction counts a block is bound no longer by device memory (see
:func:`gpupipe.kernels.whole_block.bytes_moved`) but about equally by instruction issue, the tensor cores and shared
memory.

With ``WGMMA`` (compute capability 9.0 only) expand is by wgmma, whose instructions read both operands from shared
memory: that takes fewer instructions and registers than mma.sync.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from gpupipe.kernels.launch_triton import launch
from gpupipe.kernels.whole_block import PackedBlock, PackedHead, check_maps
from gpupipe.kernels.whole_block_parts import (
    CHUNK,
    HALO,
    LEFT,
    LEFT_DEEP,
    MMA,
    RIGHT,
    RIGHT_DEEP,
    TILE_PIXELS,
    deinterleave,
    deinterleaved_layout,
    expand_chunk,
    interleave,
    interleaved,
    mask_operand,
    multiply_add,
    multiply_add_relu,
    sigmoid,
    stage_skip,
    stage_upsampled,
)

NUM_WARPS = 4
TILE = (6, 30)
"""Rows and columns of output pixels a program: the kernel is written for these, and for no others."""

_MOUTH = gl.constexpr(8)  # columns of the head's product: three channels and padding
_COLUMNS = gl.constexpr(  # 32 pixels of a row × 32 channels: a lane has a pixel and 8 channels, a warp 8 pixels
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 32],
    )
)
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))  # row-major, not swizzled


# ── project and after ─────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _load_projection(project, start, HIDDEN: gl.constexpr, OUT: gl.constexpr):
    """A chunk of hidden channels × output channels, interleaved."""
    k = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, RIGHT_DEEP))
    n = interleaved(gl.arange(0, OUT, layout=gl.SliceLayout(0, RIGHT_DEEP)), OUT)
    return gl.load(project + n[None, :] * HIDDEN + (start + k)[:, None])


@gluon.jit
def _biased(project_bias, OUT: gl.constexpr):
    """The projection's bias as its initial accumulator."""
    n = interleaved(gl.arange(0, OUT, layout=gl.SliceLayout(0, MMA)), OUT)
    return gl.zeros([TILE_PIXELS, OUT], gl.float32, layout=MMA) + gl.load(project_bias + n)[None, :]


@gluon.jit
def _pixel_of(row, y0, x0, pair, H: gl.constexpr, W: gl.constexpr):
    """The output pixel of a product's row, and whether it is to be written.

    Each warp has 8 columns of one output row, then the same of the next; ``pair`` counts pairs of rows.
    """
    column = row // 16 * 8 + row % 8
    y = y0 + 2 * pair + row // 8 % 2
    x = x0 + column
    return y * W + x, (column < 30) & (y < H) & (x < W)


@gluon.jit
def _load_head(head, head_bias, OUT: gl.constexpr):
    """The head's weights, and its bias as the initial accumulator."""
    k = interleaved(gl.arange(0, OUT, layout=gl.SliceLayout(1, RIGHT)), OUT)
    n = gl.arange(0, _MOUTH, layout=gl.SliceLayout(0, RIGHT))
    channel = gl.arange(0, _MOUTH, layout=gl.SliceLayout(0, MMA))
    sums = gl.zeros([TILE_PIXELS, _MOUTH], gl.float32, layout=MMA) + gl.load(head_bias + channel)[None, :]
    return gl.load(head + n[None, :] * OUT + k[:, None]), sums


@gluon.jit
def _finish(
    product,
    y0,
    x0,
    pair,
    skip,
    head,
    out,
    H: gl.constexpr,
    W: gl.constexpr,
    OUT: gl.constexpr,
    RESIDUAL: gl.constexpr,
    HEAD: gl.constexpr,
):
    """Add the skip, apply the head and store 64 pixels."""
    layout: gl.constexpr = deinterleaved_layout(OUT)
    pixel, inside = _pixel_of(gl.arange(0, TILE_PIXELS, layout=gl.SliceLayout(1, layout)), y0, x0, pair, H, W)
    places = (pixel * OUT)[:, None] + gl.arange(0, OUT, layout=gl.SliceLayout(0, layout))[None, :]
    if RESIDUAL:
        residual = interleave(gl.load(skip + places, mask=inside[:, None], other=0.0), TILE_PIXELS, OUT)
        product += gl.convert_layout(residual, MMA, assert_trivial=True).to(gl.float32)
    half = product.to(gl.float16)
    if HEAD:
        weights, sums = head
        mouth = 255.0 * sigmoid(mma_v2(gl.convert_layout(half, LEFT, assert_trivial=True), weights, sums))
        channel = gl.arange(0, _MOUTH, layout=gl.SliceLayout(0, MMA))
        pixel, inside = _pixel_of(gl.arange(0, TILE_PIXELS, layout=gl.SliceLayout(1, MMA)), y0, x0, pair, H, W)
        places = pixel[:, None] + channel[None, :] * (H * W)
        gl.store(out + places, mouth.to(gl.uint8), mask=inside[:, None] & (channel < 3)[None, :])
    else:
        ordered = gl.convert_layout(deinterleave(half, TILE_PIXELS, OUT), layout, assert_trivial=True)
        gl.store(out + places, ordered, mask=inside[:, None])


# ── the kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _left_operand(first, second):
    """Two output rows of a chunk, each [32 pixels, chunk], as a left operand: 8 pixels of one, then of the other."""
    rows = gl.join(gl.reshape(first, [4, 8, CHUNK]), gl.reshape(second, [4, 8, CHUNK]))
    rows = gl.reshape(gl.permute(rows, [0, 3, 1, 2]), [TILE_PIXELS, CHUNK])
    return gl.convert_layout(rows, LEFT_DEEP, assert_trivial=True)


@gluon.jit
def _whole_block_kernel(
    skip,
    index,
    low,
    expand,
    expand_bias,
    depthwise,
    project,
    project_bias,
    head,
    head_bias,
    out,
    H: gl.constexpr,
    W: gl.constexpr,
    LOW: gl.constexpr,
    SKIP: gl.constexpr,
    HIDDEN: gl.constexpr,
    OUT: gl.constexpr,
    RESIDUAL: gl.constexpr,
    HEAD: gl.constexpr,
    WGMMA: gl.constexpr,
):
    """Program (tile, sample)."""
    TILES: gl.constexpr = (W + 29) // 30
    y0 = gl.program_id(0) // TILES * 6
    x0 = gl.program_id(0) % TILES * 30
    sample = gl.program_id(1).to(gl.int64)
    source = sample
    if LOW:
        source = gl.load(index + sample).to(gl.int64)
    skip += source * (H * W * SKIP)
    if HEAD:
        out += sample * (H * W * 3)
    else:
        out += sample * (H * W * OUT)

    skip_tile = stage_skip(skip, y0, x0, H, W, SKIP)
    low_tile = None
    if LOW:
        low += sample * ((H // 2) * (W // 2) * LOW)
        low_tile = stage_upsampled(low, y0, x0, H, W, LOW)
    mask = mask_operand(y0, x0, H, W, WGMMA)
    hidden = gl.allocate_shared_memory(gl.float16, [HALO, CHUNK], _PLAIN)

    # Columns 30 and 31 have no right neighbour in the halo, and belong to the next tile: they repeat column 29.
    column = gl.minimum(gl.arange(0, 32, layout=gl.SliceLayout(1, _COLUMNS)), 29)[:, None]
    channel = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, _COLUMNS))
    place = column + (channel * 0)[None, :]
    zero = gl.zeros([32, CHUNK], gl.float16, layout=_COLUMNS)
    first = _biased(project_bias, OUT)
    second = first
    third = first
    for start in range(0, HIDDEN, CHUNK):
        chunk = expand_chunk(mask, skip_tile, low_tile, expand, expand_bias, start, LOW, SKIP, WGMMA)
        hidden.store(chunk)
        taps = depthwise + start + channel
        t00 = gl.load(taps)[None, :]
        t01 = gl.load(taps + HIDDEN)[None, :]
        t02 = gl.load(taps + 2 * HIDDEN)[None, :]
        t10 = gl.load(taps + 3 * HIDDEN)[None, :]
        t11 = gl.load(taps + 4 * HIDDEN)[None, :]
        t12 = gl.load(taps + 5 * HIDDEN)[None, :]
        t20 = gl.load(taps + 6 * HIDDEN)[None, :]
        t21 = gl.load(taps + 7 * HIDDEN)[None, :]
        t22 = gl.load(taps + 8 * HIDDEN)[None, :]
        bias = gl.load(taps + 9 * HIDDEN)[None, :] + zero
        projection = _load_projection(project, start, HIDDEN, OUT)
        # Sums of a window's upper two rows, and of its upper one, as far as hidden has been read.
        two_rows = bias
        one_row = bias
        previous = zero
        for row in gl.static_range(8):
            left = hidden.gather(place + row * 32, 0)
            middle = hidden.gather(place + (row * 32 + 1), 0)
            right = hidden.gather(place + (row * 32 + 2), 0)
            if row >= 2:
                done = multiply_add(middle, t21, multiply_add(left, t20, two_rows))
                done = multiply_add_relu(right, t22, done)
                if row == 3:
                    first = mma_v2(_left_operand(previous, done), projection, first)
                elif row == 5:
                    second = mma_v2(_left_operand(previous, done), projection, second)
                elif row == 7:
                    third = mma_v2(_left_operand(previous, done), projection, third)
                previous = done
            if (row >= 1) & (row < 7):
                two_rows = multiply_add(middle, t11, multiply_add(left, t10, one_row))
                two_rows = multiply_add(right, t12, two_rows)
            if row < 6:
                one_row = multiply_add(middle, t01, multiply_add(left, t00, bias))
                one_row = multiply_add(right, t02, one_row)

    ends = None
    if HEAD:
        ends = _load_head(head, head_bias, OUT)
    _finish(first, y0, x0, 0, skip, ends, out, H, W, OUT, RESIDUAL, HEAD)
    _finish(second, y0, x0, 1, skip, ends, out, H, W, OUT, RESIDUAL, HEAD)
    _finish(third, y0, x0, 2, skip, ends, out, H, W, OUT, RESIDUAL, HEAD)


# ── launcher ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def whole_block_gluon(
    skip: Tensor,
    block: PackedBlock,
    *,
    low: Tensor | None = None,
    index: Tensor | None = None,
    head: PackedHead | None = None,
    wgmma: bool | None = None,
) -> Tensor:
    """:func:`gpupipe.kernels.whole_block.whole_block` in one launch; nothing is read back and nothing waits.

    Depthwise sums are float16 (pairs at a time), products float32; the hidden tensor is float16.

    Args:
        skip, block, low, index, head: as for the reference.
        wgmma: expand by wgmma; None does so where the device has it (compute capability 9.0).

    Returns:
        As the reference.

    Raises:
        ValueError: types, shapes or strides that do not fit.
    """
    check_maps(skip, block, low, index, head)
    samples = len(skip) if index is None else len(index)
    _, height, width, _ = skip.shape
    if head is None:
        out = skip.new_empty(samples, height, width, block.out_channels)
    else:
        out = skip.new_empty(samples, 3, height, width, dtype=torch.uint8)
    if not out.numel():
        return out
    if wgmma is None:
        wgmma = skip.is_cuda and torch.cuda.get_device_capability(skip.device) == (9, 0)
    rows, columns = TILE
    launch(
        _whole_block_kernel,
        (-(-height // rows) * -(-width // columns), samples),
        skip,
        None if index is None else index.contiguous(),
        low,
        block.expand,
        block.expand_bias,
        block.depthwise,
        block.project,
        block.project_bias,
        *((None, None) if head is None else (head.weight, head.bias)),
        out,
        H=height,
        W=width,
        LOW=block.low_channels,
        SKIP=block.skip_channels,
        HIDDEN=block.hidden_channels,
        OUT=block.out_channels,
        RESIDUAL=block.residual,
        HEAD=head is not None,
        WGMMA=wgmma,
        num_warps=NUM_WARPS,
    )
    return out
