"""The Gluon kernels of :mod:`gpupipe.kernels.whole_block`: an inverted residual that keeps its expanded tensor on chip.

A program of four warps makes 6×30 pixels of one sample, all channels (3×15 with stride 2), from a halo of 8×32 pixels:

    halo in shared memory (256 pixels × channels; low upsampled and concatenated on the way in)
      │ for 32 hidden channels at a time:
      ├─ expand: tensor cores, 256×K by K×32 (+ mask × bias) ── ReLU ──> hidden[256][32], float16, shared memory
      ├─ depthwise: a thread owns a column and 8 channels, goes down the 8 rows, and uses each value that it reads
      │             for up to three output rows; float16 multiply-adds, two at a time ── ReLU, in registers
      └─ project: those registers *are* the left operand of tensor-core steps that add to out[180][C], float32
    then skip, head, and one store.

Padding and bias. The depthwise convolution pads the *hidden* tensor with zeros, and ReLU(bias) is not 0: expand's bias
must be added to pixels of the map only. It comes by one extra step of 16 inputs, whose left operand is 1 in two columns
where the pixel is on the map, and whose right operand is the bias in two float16 parts.

Who holds what. Lane (g, d) is the d-th of the g-th group of four:

    accumulator of a tensor-core step (16×8)      rows g and g + 8, columns 2d and 2d + 1
    left operand, 8 values together (16×32)       rows g and g + 8, depths 8d … 8d + 7
    depthwise, 8 pixels of a row × 32 channels    pixel g, channels 8d … 8d + 7

The last two agree, row g + 8 being the next output row: no value changes lanes between depthwise and project. The first
is made to agree by dealing out the columns of the weights (:func:`_dealt`): what a lane holds of a product N columns
wide are then N/4 channels in a row, written 16 bytes at a time (8 for 16 channels).

Banks. The 8 lanes that go together write or read two neighbouring pixels of the hidden tensor, 64 bytes each and 64
bytes apart: all 32 banks once, at every shift of the 3×3 window, with neither padding nor swizzling. With stride 2 the
columns of a halo row are stored even ones first, so that neighbouring outputs read neighbouring pixels there too.

What bounds it is no longer device memory (see :func:`gpupipe.kernels.whole_block.bytes_moved`), but, by instruction
counts, the issue of instructions, the tensor cores and shared memory, about equally.

``WGMMA`` (compute capability 9.0 only) lets an instruction of the whole warpgroup read both operands of expand from
shared memory, which takes fewer instructions and registers.

The compiler puts the barriers between threads' reads and writes of shared memory; the one in :func:`_expand` is for the
tensor cores' own reads, which it does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from gpupipe.kernels.whole_block import HIDDEN_CHUNK, MouthLayout, PackedBlock, PackedHead, check_maps

NUM_WARPS = 4
TILE = {1: (6, 30), 2: (3, 15)}
"""Rows and columns of output pixels a program, by stride."""

_HALO = gl.constexpr(256)  # pixels: 8 rows of 32
_CHUNK = gl.constexpr(HIDDEN_CHUNK)
_STEP = gl.constexpr(16)  # depth of a tensor-core step
_TILE_PIXELS = gl.constexpr(64)  # rows of a product that belong to one projection
_MOUTH = gl.constexpr(8)  # columns of the head's product: three channels and padding

_MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]))
_WARPGROUP = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA, 2))
_LEFT_DEEP = gl.constexpr(gl.DotOperandLayout(0, _MMA, 8))
_RIGHT_DEEP = gl.constexpr(gl.DotOperandLayout(1, _MMA, 8))
_COLUMNS = gl.constexpr(  # 32 pixels of a row × 32 channels: a lane has a pixel and 8 channels, a warp 8 pixels
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 32],
    )
)
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))  # row after row


# ── layouts that depend on the number of channels ─────────────────────────────────────────────────────────────────────


@gluon.constexpr_function
def _depth(channels):
    """Channels are staged and multiplied this many at a time."""
    return min(channels, 32)


@gluon.constexpr_function
def _vectors(depth):
    """Pixels × channels as they lie in memory: 8 channels, 16 bytes, a lane."""
    return gl.BlockedLayout([1, 8], [256 // depth, depth // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _weight_vectors(depth):
    """The same of a right operand, depth × hidden channels, whose columns lie in a row in memory."""
    return gl.BlockedLayout([8, 1], [depth // 8, 256 // depth], [1, 4], [0, 1])


@gluon.constexpr_function
def _swizzled(depth, transposed=False):
    """A left operand (a right one, transposed) in shared memory, as tensor cores and matrix loads like to read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * depth, element_bitwidth=16, transposed=transposed, rank=2)


@gluon.constexpr_function
def _in_order_layout(channels):
    """An accumulator's, once its columns are channels in order: a lane has ``channels / 4`` of them in a row."""
    bits = [1 << i for i in range(channels.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, bit] for bit in bits[:-2]] + [[8, 0]],
        lane_bases=[[0, bits[-2]], [0, bits[-1]], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, channels],
    )


# ── arithmetic on pairs ───────────────────────────────────────────────────────────────────────────────────────────────
# Left to itself the compiler takes float16 multiply-adds one by one, and ReLU as an instruction of its own.


@gluon.jit
def _multiply_add(a, b, c):
    """a · b + c, float16."""
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _multiply_add_relu(a, b, c):
    """ReLU(a · b + c), float16."""
    return gl.inline_asm_elementwise(
        "fma.rn.relu.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _relu_to_half(a):
    """ReLU of float32, as float16."""
    return gl.inline_asm_elementwise(
        "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [a], dtype=gl.float16, is_pure=True, pack=2
    )


# ── columns dealt out ─────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _dealt(column, N: gl.constexpr):
    """The channel that stands in a column of a product: pair d of every 8 columns is dealt to channels dN/4 … on."""
    return column % 8 // 2 * (N // 4) + column // 8 * 2 + column % 2


@gluon.jit
def _in_order(product, M: gl.constexpr, N: gl.constexpr):
    """A product's columns from dealt to channel order. Every value stays in its register."""
    return gl.reshape(gl.permute(gl.reshape(product, [M, N // 8, 4, 2]), [0, 2, 1, 3]), [M, N])


@gluon.jit
def _as_dealt(values, M: gl.constexpr, N: gl.constexpr):
    """The way back."""
    return gl.reshape(gl.permute(gl.reshape(values, [M, 4, N // 8, 2]), [0, 2, 1, 3]), [M, N])


# ── the halo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _halo(pixel, y0, x0, H: gl.constexpr, W: gl.constexpr, STRIDE: gl.constexpr):
    """Row and column of the map for a pixel of the halo, and whether it is on the map; (y0, x0) is the first output."""
    column = pixel % 32
    if STRIDE == 2:
        column = column % 16 * 2 + column // 16
    y = y0 * STRIDE - 1 + pixel // 32
    x = x0 * STRIDE - 1 + column
    return y, x, (y >= 0) & (y < H) & (x >= 0) & (x < W)


@gluon.jit
def _load_skip(
    skip, y0, x0, FIRST: gl.constexpr, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr, STRIDE: gl.constexpr
):
    """Channels from FIRST on of the halo; 0 outside the map."""
    layout: gl.constexpr = _vectors(_depth(C))
    y, x, inside = _halo(gl.arange(0, _HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W, STRIDE)
    channel = FIRST + gl.arange(0, _depth(C), layout=gl.SliceLayout(0, layout))
    return gl.load(skip + ((y * W + x) * C)[:, None] + channel[None, :], mask=inside[:, None], other=0.0)


@gluon.jit
def _load_upsampled(low, y0, x0, FIRST: gl.constexpr, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The same of the map that is upsampled: bilinear ×2, align_corners=True, in float16."""
    layout: gl.constexpr = _vectors(_depth(C))
    LOW_H: gl.constexpr = H // 2
    LOW_W: gl.constexpr = W // 2
    y, x, inside = _halo(gl.arange(0, _HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W, 1)
    channel = FIRST + gl.arange(0, _depth(C), layout=gl.SliceLayout(0, layout))[None, :]
    v = gl.minimum(gl.maximum(y, 0), H - 1).to(gl.float32) * ((LOW_H - 1) / (H - 1))
    u = gl.minimum(gl.maximum(x, 0), W - 1).to(gl.float32) * ((LOW_W - 1) / (W - 1))
    top = v.to(gl.int32)
    left = u.to(gl.int32)
    bottom = gl.minimum(top + 1, LOW_H - 1)
    right = gl.minimum(left + 1, LOW_W - 1)
    top_left = gl.load(low + ((top * LOW_W + left) * C)[:, None] + channel)
    top_right = gl.load(low + ((top * LOW_W + right) * C)[:, None] + channel)
    bottom_left = gl.load(low + ((bottom * LOW_W + left) * C)[:, None] + channel)
    bottom_right = gl.load(low + ((bottom * LOW_W + right) * C)[:, None] + channel)
    zero = gl.zeros([_HALO, _depth(C)], gl.float16, layout=layout)
    down = (v - top.to(gl.float32)).to(gl.float16)[:, None] + zero
    across = (u - left.to(gl.float32)).to(gl.float16)[:, None] + zero
    above = _multiply_add(top_right - top_left, across, top_left)
    below = _multiply_add(bottom_right - bottom_left, across, bottom_left)
    return gl.where(inside[:, None], _multiply_add(below - above, down, above), zero)


@gluon.jit
def _stage_skip(skip, y0, x0, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr, STRIDE: gl.constexpr):
    """Shared memory [part][halo][≤ 32 channels]."""
    tile = gl.allocate_shared_memory(gl.float16, [C // _depth(C), _HALO, _depth(C)], _swizzled(_depth(C)))
    for part in gl.static_range(C // _depth(C)):
        tile.index(part).store(_load_skip(skip, y0, x0, part * _depth(C), H, W, C, STRIDE))
    return tile


@gluon.jit
def _stage_upsampled(low, y0, x0, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The same of the map that is upsampled."""
    tile = gl.allocate_shared_memory(gl.float16, [C // _depth(C), _HALO, _depth(C)], _swizzled(_depth(C)))
    for part in gl.static_range(C // _depth(C)):
        tile.index(part).store(_load_upsampled(low, y0, x0, part * _depth(C), H, W, C))
    return tile


@gluon.jit
def _load_mask(y0, x0, H: gl.constexpr, W: gl.constexpr, STRIDE: gl.constexpr, layout: gl.constexpr):
    """1 in the first two of 16 columns where a pixel is on the map: by the two parts of the bias, the bias there."""
    _, _, inside = _halo(gl.arange(0, _HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W, STRIDE)
    column = gl.arange(0, _STEP, layout=gl.SliceLayout(0, layout))
    return gl.where(inside[:, None] & (column < 2)[None, :], 1.0, 0.0).to(gl.float16)


# ── expand ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _load_weights(weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, DEPTH: gl.constexpr, layout: gl.constexpr):
    """Inputs FIRST … FIRST + DEPTH − 1 × a chunk of hidden channels, dealt out."""
    k = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, layout))
    n = _dealt(gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, layout)), _CHUNK)
    return gl.load(weights + (start + n)[None, :] * INPUTS + (FIRST + k)[:, None])


@gluon.jit
def _load_bias(bias, start, layout: gl.constexpr):
    """The two parts of the bias as the first two of 16 inputs."""
    k = gl.arange(0, _STEP, layout=gl.SliceLayout(1, layout))
    n = _dealt(gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, layout)), _CHUNK)
    return gl.load(bias + (start + n)[None, :] * 2 + k[:, None], mask=(k < 2)[:, None], other=0.0)


@gluon.jit
def _stage_weights(weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr):
    """Shared memory [part][≤ 32 inputs][chunk]."""
    depth: gl.constexpr = _depth(CHANNELS)
    staged = gl.allocate_shared_memory(gl.float16, [CHANNELS // depth, depth, _CHUNK], _swizzled(depth, True))
    for part in gl.static_range(CHANNELS // depth):
        values = _load_weights(weights, start, INPUTS, FIRST + part * depth, depth, _weight_vectors(depth))
        staged.index(part).store(values)
    return staged


@gluon.jit
def _multiply(acc, tile, weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr):
    """acc + tile × weights, the tile from shared memory, the weights from global memory straight into place."""
    depth: gl.constexpr = _depth(CHANNELS)
    for part in gl.static_range(CHANNELS // depth):
        right = _load_weights(weights, start, INPUTS, FIRST + part * depth, depth, _RIGHT)
        acc = mma_v2(tile.index(part).load(_LEFT), right, acc)
    return acc


@gluon.jit
def _multiply_by_warpgroup(acc, tile, staged, CHANNELS: gl.constexpr):
    """The same with weights that are staged too."""
    for part in gl.static_range(CHANNELS // _depth(CHANNELS)):
        acc = warpgroup_mma(tile.index(part), staged.index(part), acc)
    return acc


@gluon.jit
def _expand(
    mask, skip_tile, low_tile, weights, bias, start, LOW: gl.constexpr, SKIP: gl.constexpr, WGMMA: gl.constexpr
):
    """A chunk of the hidden tensor, float16 [halo, chunk], channels in order."""
    if WGMMA:
        values = _load_bias(bias, start, _weight_vectors(_STEP))
        staged_bias = gl.allocate_shared_memory(gl.float16, [_STEP, _CHUNK], _swizzled(_STEP, True), values)
        skip_weights = _stage_weights(weights, start, LOW + SKIP, LOW, SKIP)
        if LOW:
            low_weights = _stage_weights(weights, start, LOW + SKIP, 0, LOW)
        fence_async_shared()  # what ordinary stores wrote is read by the tensor cores' own path
        gl.barrier()
        acc = gl.zeros([_HALO, _CHUNK], gl.float32, layout=_WARPGROUP)
        acc = warpgroup_mma(mask, staged_bias, acc, use_acc=False)
        acc = _multiply_by_warpgroup(acc, skip_tile, skip_weights, SKIP)
        if LOW:
            acc = _multiply_by_warpgroup(acc, low_tile, low_weights, LOW)
    else:
        acc = gl.zeros([_HALO, _CHUNK], gl.float32, layout=_MMA)
        acc = mma_v2(mask, _load_bias(bias, start, _RIGHT), acc)
        acc = _multiply(acc, skip_tile, weights, start, LOW + SKIP, LOW, SKIP)
        if LOW:
            acc = _multiply(acc, low_tile, weights, start, LOW + SKIP, 0, LOW)
    return _in_order(_relu_to_half(acc), _HALO, _CHUNK)


# ── project and after ─────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _load_projection(project, start, HIDDEN: gl.constexpr, OUT: gl.constexpr):
    """A chunk of hidden channels × output channels, dealt out."""
    k = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, _RIGHT_DEEP))
    n = _dealt(gl.arange(0, OUT, layout=gl.SliceLayout(0, _RIGHT_DEEP)), OUT)
    return gl.load(project + n[None, :] * HIDDEN + (start + k)[:, None])


@gluon.jit
def _biased(project_bias, OUT: gl.constexpr):
    """Where a projection's sums begin."""
    n = _dealt(gl.arange(0, OUT, layout=gl.SliceLayout(0, _MMA)), OUT)
    return gl.zeros([_TILE_PIXELS, OUT], gl.float32, layout=_MMA) + gl.load(project_bias + n)[None, :]


@gluon.jit
def _pixel_of(row, y0, x0, pair, H: gl.constexpr, W: gl.constexpr, STRIDE: gl.constexpr):
    """The output pixel that a product's row belongs to, and whether it is to be written; H, W are the output's.

    Stride 1: 8 columns of one output row, then the same of the next, for each warp; ``pair`` counts pairs of rows.
    Stride 2: four rows of 16, of which 3×15 count.
    """
    if STRIDE == 1:
        column = row // 16 * 8 + row % 8
        y = y0 + 2 * pair + row // 8 % 2
        counts = column < 30
    else:
        column = row % 16
        y = y0 + row // 16
        counts = (column < 15) & (row < 48)
    x = x0 + column
    return y * W + x, counts & (y < H) & (x < W)


@gluon.jit
def _finish(
    product,
    y0,
    x0,
    pair,
    skip,
    head,
    head_bias,
    out,
    H: gl.constexpr,
    W: gl.constexpr,
    OUT: gl.constexpr,
    STRIDE: gl.constexpr,
    RESIDUAL: gl.constexpr,
    HEAD: gl.constexpr,
    PLANAR: gl.constexpr,
):
    """Skip, head and store of 64 pixels; H, W are the output's."""
    layout: gl.constexpr = _in_order_layout(OUT)
    pixel, inside = _pixel_of(gl.arange(0, _TILE_PIXELS, layout=gl.SliceLayout(1, layout)), y0, x0, pair, H, W, STRIDE)
    places = (pixel * OUT)[:, None] + gl.arange(0, OUT, layout=gl.SliceLayout(0, layout))[None, :]
    if RESIDUAL:
        residual = _as_dealt(gl.load(skip + places, mask=inside[:, None], other=0.0), _TILE_PIXELS, OUT)
        product += gl.convert_layout(residual, _MMA, assert_trivial=True).to(gl.float32)
    half = product.to(gl.float16)
    if HEAD:
        k = _dealt(gl.arange(0, OUT, layout=gl.SliceLayout(1, _RIGHT)), OUT)
        n = gl.arange(0, _MOUTH, layout=gl.SliceLayout(0, _RIGHT))
        weights = gl.load(head + n[None, :] * OUT + k[:, None])
        channel = gl.arange(0, _MOUTH, layout=gl.SliceLayout(0, _MMA))
        sums = gl.zeros([_TILE_PIXELS, _MOUTH], gl.float32, layout=_MMA) + gl.load(head_bias + channel)[None, :]
        sums = mma_v2(gl.convert_layout(half, _LEFT, assert_trivial=True), weights, sums)
        mouth = 255.0 / (1.0 + gl.exp(-sums))
        pixel, inside = _pixel_of(
            gl.arange(0, _TILE_PIXELS, layout=gl.SliceLayout(1, _MMA)), y0, x0, pair, H, W, STRIDE
        )
        if PLANAR:
            places = pixel[:, None] + channel[None, :] * (H * W)
        else:
            places = (pixel * 3)[:, None] + channel[None, :]
        gl.store(out + places, mouth.to(gl.uint8), mask=inside[:, None] & (channel < 3)[None, :])
    else:
        ordered = gl.convert_layout(_in_order(half, _TILE_PIXELS, OUT), layout, assert_trivial=True)
        gl.store(out + places, ordered, mask=inside[:, None])


# ── the kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _two_rows(first, second):
    """Two output rows of a chunk, each [32 pixels, chunk], as a left operand: 8 pixels of one, then of the other."""
    rows = gl.join(gl.reshape(first, [4, 8, _CHUNK]), gl.reshape(second, [4, 8, _CHUNK]))
    rows = gl.reshape(gl.permute(rows, [0, 3, 1, 2]), [_TILE_PIXELS, _CHUNK])
    return gl.convert_layout(rows, _LEFT_DEEP, assert_trivial=True)


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
    PLANAR: gl.constexpr,
    INDEXED: gl.constexpr,
    WGMMA: gl.constexpr,
):
    """Stride 1. Program (tile, sample)."""
    TILES: gl.constexpr = (W + 29) // 30
    y0 = gl.program_id(0) // TILES * 6
    x0 = gl.program_id(0) % TILES * 30
    sample = gl.program_id(1).to(gl.int64)
    source = sample
    if INDEXED:
        source = gl.load(index + sample).to(gl.int64)
    skip += source * (H * W * SKIP)
    if HEAD:
        out += sample * (H * W * 3)
    else:
        out += sample * (H * W * OUT)

    skip_tile = _stage_skip(skip, y0, x0, H, W, SKIP, 1)
    low_tile = None
    if LOW:
        low += sample * ((H // 2) * (W // 2) * LOW)
        low_tile = _stage_upsampled(low, y0, x0, H, W, LOW)
    if WGMMA:
        values = _load_mask(y0, x0, H, W, 1, _vectors(_STEP))
        mask = gl.allocate_shared_memory(gl.float16, [_HALO, _STEP], _swizzled(_STEP), values)
    else:
        mask = _load_mask(y0, x0, H, W, 1, _LEFT)
    hidden = gl.allocate_shared_memory(gl.float16, [_HALO, _CHUNK], _PLAIN)

    # Columns 30 and 31 have no right neighbour in the halo, and belong to the next tile: they repeat column 29.
    column = gl.minimum(gl.arange(0, 32, layout=gl.SliceLayout(1, _COLUMNS)), 29)[:, None]
    channel = gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, _COLUMNS))
    place = column + (channel * 0)[None, :]
    zero = gl.zeros([32, _CHUNK], gl.float16, layout=_COLUMNS)
    first = _biased(project_bias, OUT)
    second = first
    third = first
    for start in range(0, HIDDEN, _CHUNK):
        chunk = _expand(mask, skip_tile, low_tile, expand, expand_bias, start, LOW, SKIP, WGMMA)
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
        # Sums of the output rows that a hidden row is the bottom, the middle and the top of.
        ending = bias
        going_on = bias
        previous = zero
        for row in gl.static_range(8):
            left = hidden.gather(place + row * 32, 0)
            middle = hidden.gather(place + (row * 32 + 1), 0)
            right = hidden.gather(place + (row * 32 + 2), 0)
            if row >= 2:
                done = _multiply_add(middle, t21, _multiply_add(left, t20, ending))
                done = _multiply_add_relu(right, t22, done)
                if row == 3:
                    first = mma_v2(_two_rows(previous, done), projection, first)
                elif row == 5:
                    second = mma_v2(_two_rows(previous, done), projection, second)
                elif row == 7:
                    third = mma_v2(_two_rows(previous, done), projection, third)
                previous = done
            if (row >= 1) & (row < 7):
                ending = _multiply_add(middle, t11, _multiply_add(left, t10, going_on))
                ending = _multiply_add(right, t12, ending)
            if row < 6:
                going_on = _multiply_add(middle, t01, _multiply_add(left, t00, bias))
                going_on = _multiply_add(right, t02, going_on)

    _finish(first, y0, x0, 0, skip, head, head_bias, out, H, W, OUT, 1, RESIDUAL, HEAD, PLANAR)
    _finish(second, y0, x0, 1, skip, head, head_bias, out, H, W, OUT, 1, RESIDUAL, HEAD, PLANAR)
    _finish(third, y0, x0, 2, skip, head, head_bias, out, H, W, OUT, 1, RESIDUAL, HEAD, PLANAR)


@gluon.jit
def _halving_block_kernel(
    skip,
    index,
    expand,
    expand_bias,
    depthwise,
    project,
    project_bias,
    out,
    H: gl.constexpr,
    W: gl.constexpr,
    SKIP: gl.constexpr,
    HIDDEN: gl.constexpr,
    OUT: gl.constexpr,
    INDEXED: gl.constexpr,
    WGMMA: gl.constexpr,
):
    """Stride 2. Program (tile, sample); H, W are the input's. Nine reads straight into project's left operand."""
    OUT_H: gl.constexpr = (H + 1) // 2
    OUT_W: gl.constexpr = (W + 1) // 2
    TILES: gl.constexpr = (OUT_W + 14) // 15
    y0 = gl.program_id(0) // TILES * 3
    x0 = gl.program_id(0) % TILES * 15
    sample = gl.program_id(1).to(gl.int64)
    source = sample
    if INDEXED:
        source = gl.load(index + sample).to(gl.int64)
    skip += source * (H * W * SKIP)
    out += sample * (OUT_H * OUT_W * OUT)

    skip_tile = _stage_skip(skip, y0, x0, H, W, SKIP, 2)
    if WGMMA:
        values = _load_mask(y0, x0, H, W, 2, _vectors(_STEP))
        mask = gl.allocate_shared_memory(gl.float16, [_HALO, _STEP], _swizzled(_STEP), values)
    else:
        mask = _load_mask(y0, x0, H, W, 2, _LEFT)
    hidden = gl.allocate_shared_memory(gl.float16, [_HALO, _CHUNK], _PLAIN)

    row = gl.arange(0, _TILE_PIXELS, layout=gl.SliceLayout(1, _LEFT_DEEP))
    channel = gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, _LEFT_DEEP))
    corner = gl.minimum(row // 16, 2) * 64 + gl.minimum(row % 16, 14)
    place = corner[:, None] + (channel * 0)[None, :]
    zero = gl.zeros([_TILE_PIXELS, _CHUNK], gl.float16, layout=_LEFT_DEEP)
    sums = _biased(project_bias, OUT)
    for start in range(0, HIDDEN, _CHUNK):
        chunk = _expand(mask, skip_tile, None, expand, expand_bias, start, 0, SKIP, WGMMA)
        hidden.store(chunk)
        taps = depthwise + start + channel
        value = gl.load(taps + 9 * HIDDEN)[None, :] + zero
        for tap in gl.static_range(9):
            # Columns 2c, 2c + 1 and 2c + 2 of a halo row stand at c, 16 + c and c + 1 of its even-first order.
            read = hidden.gather(place + (tap // 3 * 32 + tap % 3 % 2 * 16 + tap % 3 // 2), 0)
            weight = gl.load(taps + tap * HIDDEN)[None, :]
            if tap < 8:
                value = _multiply_add(read, weight, value)
            else:
                value = _multiply_add_relu(read, weight, value)
        sums = mma_v2(value, _load_projection(project, start, HIDDEN, OUT), sums)
    _finish(sums, y0, x0, 0, skip, None, None, out, OUT_H, OUT_W, OUT, 2, False, False, False)


# ── launcher ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def whole_block_gluon(
    skip: Tensor,
    block: PackedBlock,
    *,
    low: Tensor | None = None,
    index: Tensor | None = None,
    head: PackedHead | None = None,
    mouth_layout: MouthLayout = "channels_last",
    wgmma: bool | None = None,
) -> Tensor:
    """:func:`gpupipe.kernels.whole_block.whole_block` in one launch; nothing is read back and nothing waits.

    Depthwise sums are float16 (pairs at a time), products float32; the hidden tensor is float16.

    Args:
        skip, block, low, index, head, mouth_layout: as for the reference.
        wgmma: expand by warpgroup instructions; None does so where the device has them (compute capability 9.0).

    Returns:
        As the reference.

    Raises:
        ValueError: types, shapes or strides that do not fit.
    """
    check_maps(skip, block, low, index, head)
    samples = len(skip) if index is None else len(index)
    _, height, width, _ = skip.shape
    out_height, out_width = -(-height // block.stride), -(-width // block.stride)
    if head is None:
        out = skip.new_empty(samples, out_height, out_width, block.out_channels)
    elif mouth_layout == "planar":
        out = skip.new_empty(samples, 3, height, width, dtype=torch.uint8)
    else:
        out = skip.new_empty(samples, height, width, 3, dtype=torch.uint8)
    if not out.numel():
        return out
    if wgmma is None:
        wgmma = skip.is_cuda and torch.cuda.get_device_capability(skip.device) == (9, 0)
    rows, columns = TILE[block.stride]
    grid = (-(-out_height // rows) * -(-out_width // columns), samples)
    if index is not None:
        index = index.contiguous()
    weights = (block.expand, block.expand_bias, block.depthwise, block.project, block.project_bias)
    facts = {"H": height, "W": width, "SKIP": block.skip_channels, "HIDDEN": block.hidden_channels}
    facts |= {"OUT": block.out_channels, "INDEXED": index is not None, "WGMMA": wgmma, "num_warps": NUM_WARPS}
    if block.stride == 2:
        _halving_block_kernel[grid](skip, index, *weights, out, **facts)
    else:
        facts |= {"LOW": block.low_channels, "RESIDUAL": block.residual, "HEAD": head is not None}
        ends = (None, None) if head is None else (head.weight, head.bias)
        _whole_block_kernel[grid](skip, index, low, *weights, *ends, out, PLANAR=mouth_layout == "planar", **facts)
    return out
