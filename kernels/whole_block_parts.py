"""The parts of the Gluon kernels of whole blocks: the halo in shared memory, expand, and layouts.

Padding and bias. The depthwise convolution pads the *hidden* tensor with zeros, and ReLU(bias) is not 0: expand's bias
must be added only where a pixel is on the map. An extra step of 16 inputs adds it: its left operand is 1 in two columns
where the pixel is on the map, its right operand is the bias as the sum of two float16.

Layouts. Lane 4g + d holds

    of an accumulator (16×8)                              rows g and g + 8, columns 2d and 2d + 1
    of a left operand with 8 values in a row (16×32)      rows g and g + 8, depths 8d … 8d + 7
    in the depthwise step (8 pixels of a row × 32)        pixel g, channels 8d … 8d + 7

The last two agree, row g + 8 being the next output row: no value changes lanes between depthwise and project. The first
is made to agree by permuting the weights' columns (:func:`interleaved`), so that the N/4 accumulator columns a lane
holds are consecutive channels, stored 16 bytes at a time (8 if N is 16).

Banks. A quarter-warp, 8 lanes, accesses two neighbouring pixels of the hidden tensor, 64 bytes each and 64 bytes apart:
each of the 32 banks once, at every shift of the 3×3 window, with neither padding nor swizzling.

The compiler places the barriers between threads' accesses to shared memory, but does not see that wgmma reads it: the
barrier in :func:`expand_chunk` is for that.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from gpupipe.kernels.packed_triton import (
    LOG2_E,
    MULTIPLY_ADD,
    MULTIPLY_ADD_RELU,
    POWER_OF_TWO,
    RECIPROCAL,
    RELU_TO_HALF,
)
from gpupipe.kernels.whole_block import HIDDEN_CHUNK

HALO = gl.constexpr(256)  # pixels: 8 rows of 32
CHUNK = gl.constexpr(HIDDEN_CHUNK)
_STEP = gl.constexpr(16)  # depth of a tensor-core step
TILE_PIXELS = gl.constexpr(64)  # rows of a product that belong to one projection

MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]))
_WGMMA = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA, 2))
LEFT_DEEP = gl.constexpr(gl.DotOperandLayout(0, MMA, 8))
RIGHT_DEEP = gl.constexpr(gl.DotOperandLayout(1, MMA, 8))


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
    """A left operand (a right one, transposed) in shared memory, swizzled for wgmma and ldmatrix."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * depth, element_bitwidth=16, transposed=transposed, rank=2)


@gluon.constexpr_function
def deinterleaved_layout(channels):
    """The layout of an accumulator that is deinterleaved: a lane has ``channels / 4`` consecutive ones."""
    bits = [1 << i for i in range(channels.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, bit] for bit in bits[:-2]] + [[8, 0]],
        lane_bases=[[0, bits[-2]], [0, bits[-1]], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, channels],
    )


# ── arithmetic in assembly ────────────────────────────────────────────────────────────────────────────────────────────
# Left to itself the compiler multiplies and adds float16 one by one, and ReLU is an instruction of its own. All of this
# is marked pure, unlike packed_triton's ReLU: in Gluon the source chooses the layouts, not the compiler.


@gluon.jit
def multiply_add(a, b, c):
    """a · b + c, float16."""
    return gl.inline_asm_elementwise(MULTIPLY_ADD, "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def multiply_add_relu(a, b, c):
    """ReLU(a · b + c), float16."""
    return gl.inline_asm_elementwise(MULTIPLY_ADD_RELU, "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _relu_to_half(a):
    """ReLU of float32, as float16."""
    return gl.inline_asm_elementwise(RELU_TO_HALF, "=r,r,r", [a], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def sigmoid(a):
    """1 / (1 + e⁻ᵃ) of float32, by the GPU's approximations of a power of two and of a reciprocal."""
    power = gl.inline_asm_elementwise(POWER_OF_TWO, "=r,r", [a * -LOG2_E], dtype=gl.float32, is_pure=True, pack=1)
    return gl.inline_asm_elementwise(RECIPROCAL, "=r,r", [1.0 + power], dtype=gl.float32, is_pure=True, pack=1)


# ── interleaved columns ───────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def interleaved(column, N: gl.constexpr):
    """The channel that a product's column holds: pair d of every 8 columns takes the next two from dN/4 on."""
    return column % 8 // 2 * (N // 4) + column // 8 * 2 + column % 2


@gluon.jit
def deinterleave(product, M: gl.constexpr, N: gl.constexpr):
    """A product with its columns in the order of channels. Every value stays in its register."""
    return gl.reshape(gl.permute(gl.reshape(product, [M, N // 8, 4, 2]), [0, 2, 1, 3]), [M, N])


@gluon.jit
def interleave(values, M: gl.constexpr, N: gl.constexpr):
    """The inverse of :func:`deinterleave`."""
    return gl.reshape(gl.permute(gl.reshape(values, [M, 4, N // 8, 2]), [0, 2, 1, 3]), [M, N])


# ── the halo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _halo(pixel, y0, x0, H: gl.constexpr, W: gl.constexpr):
    """Row and column in the map of a pixel of the halo, and whether it is on the map; (y0, x0) is the first output."""
    y = y0 - 1 + pixel // 32
    x = x0 - 1 + pixel % 32
    return y, x, (y >= 0) & (y < H) & (x >= 0) & (x < W)


@gluon.jit
def _load_skip(skip, y0, x0, FIRST: gl.constexpr, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """Channels of the halo from FIRST on; 0 outside the map."""
    layout: gl.constexpr = _vectors(_depth(C))
    y, x, inside = _halo(gl.arange(0, HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W)
    channel = FIRST + gl.arange(0, _depth(C), layout=gl.SliceLayout(0, layout))
    return gl.load(skip + ((y * W + x) * C)[:, None] + channel[None, :], mask=inside[:, None], other=0.0)


@gluon.jit
def _load_upsampled(low, y0, x0, FIRST: gl.constexpr, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The same from the map that is upsampled: bilinear ×2, align_corners=True, in float16."""
    layout: gl.constexpr = _vectors(_depth(C))
    LOW_H: gl.constexpr = H // 2
    LOW_W: gl.constexpr = W // 2
    y, x, inside = _halo(gl.arange(0, HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W)
    channel = FIRST + gl.arange(0, _depth(C), layout=gl.SliceLayout(0, layout))[None, :]
    v = gl.minimum(gl.maximum(y, 0), H - 1).to(gl.float32) * ((LOW_H - 1) / (H - 1))
    u = gl.minimum(gl.maximum(x, 0), W - 1).to(gl.float32) * ((LOW_W - 1) / (W - 1))
    # At the last row and column the pair is clamped inward, so that the four neighbours lie at fixed offsets.
    top = gl.minimum(v.to(gl.int32), max(LOW_H - 2, 0))
    left = gl.minimum(u.to(gl.int32), max(LOW_W - 2, 0))
    at = low + ((top * LOW_W + left) * C)[:, None] + channel
    RIGHT: gl.constexpr = C * min(LOW_W - 1, 1)
    BELOW: gl.constexpr = LOW_W * C * min(LOW_H - 1, 1)
    top_left = gl.load(at)
    top_right = gl.load(at + RIGHT)
    bottom_left = gl.load(at + BELOW)
    bottom_right = gl.load(at + BELOW + RIGHT)
    down = v - top.to(gl.float32)
    across = u - left.to(gl.float32)
    # Weights of the lower and of the upper row; 0 outside the map.
    lower = gl.where(inside, down, 0.0)
    upper = gl.where(inside, 1.0 - down, 0.0)
    zero = gl.zeros([HALO, _depth(C)], gl.float16, layout=layout)
    values = top_left * _spread(upper * (1.0 - across), zero)
    values = multiply_add(top_right, _spread(upper * across, zero), values)
    values = multiply_add(bottom_left, _spread(lower * (1.0 - across), zero), values)
    return multiply_add(bottom_right, _spread(lower * across, zero), values)


@gluon.jit
def _spread(weight, zero):
    """A pixel's weight, float16, for each of its channels."""
    return weight.to(gl.float16)[:, None] + zero


@gluon.jit
def stage_skip(skip, y0, x0, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The skip's halo in shared memory: [part][pixel][≤ 32 channels]."""
    tile = gl.allocate_shared_memory(gl.float16, [C // _depth(C), HALO, _depth(C)], _swizzled(_depth(C)))
    for part in gl.static_range(C // _depth(C)):
        tile.index(part).store(_load_skip(skip, y0, x0, part * _depth(C), H, W, C))
    return tile


@gluon.jit
def stage_upsampled(low, y0, x0, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The same from the map that is upsampled."""
    tile = gl.allocate_shared_memory(gl.float16, [C // _depth(C), HALO, _depth(C)], _swizzled(_depth(C)))
    for part in gl.static_range(C // _depth(C)):
        tile.index(part).store(_load_upsampled(low, y0, x0, part * _depth(C), H, W, C))
    return tile


@gluon.jit
def _load_mask(y0, x0, H: gl.constexpr, W: gl.constexpr, layout: gl.constexpr):
    """(halo, 16): 1 in the first two columns where a pixel is on the map; times the bias' two parts, the bias there."""
    _, _, inside = _halo(gl.arange(0, HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W)
    column = gl.arange(0, _STEP, layout=gl.SliceLayout(0, layout))
    return gl.where(inside[:, None] & (column < 2)[None, :], 1.0, 0.0).to(gl.float16)


@gluon.jit
def mask_operand(y0, x0, H: gl.constexpr, W: gl.constexpr, WGMMA: gl.constexpr):
    """The mask as :func:`expand_chunk` wants it: in shared memory for wgmma, else in registers."""
    if WGMMA:
        values = _load_mask(y0, x0, H, W, _vectors(_STEP))
        return gl.allocate_shared_memory(gl.float16, [HALO, _STEP], _swizzled(_STEP), values)
    else:
        return _load_mask(y0, x0, H, W, LEFT)


# ── expand ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _load_weights(weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, DEPTH: gl.constexpr, layout: gl.constexpr):
    """Inputs FIRST … FIRST + DEPTH − 1 × a chunk of hidden channels, interleaved."""
    k = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, layout))
    n = interleaved(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout)), CHUNK)
    return gl.load(weights + (start + n)[None, :] * INPUTS + (FIRST + k)[:, None])


@gluon.jit
def _load_bias(bias, start, layout: gl.constexpr):
    """The two parts of the bias as the first two of 16 inputs, interleaved."""
    k = gl.arange(0, _STEP, layout=gl.SliceLayout(1, layout))
    n = interleaved(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout)), CHUNK)
    return gl.load(bias + (start + n)[None, :] * 2 + k[:, None], mask=(k < 2)[:, None], other=0.0)


@gluon.jit
def _stage_weights(weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr):
    """Weights in shared memory: [part][≤ 32 inputs][chunk]."""
    depth: gl.constexpr = _depth(CHANNELS)
    staged = gl.allocate_shared_memory(gl.float16, [CHANNELS // depth, depth, CHUNK], _swizzled(depth, True))
    for part in gl.static_range(CHANNELS // depth):
        values = _load_weights(weights, start, INPUTS, FIRST + part * depth, depth, _weight_vectors(depth))
        staged.index(part).store(values)
    return staged


@gluon.jit
def _multiply(acc, tile, weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr):
    """acc + tile × weights, the tile from shared memory, the weights from global memory to registers."""
    depth: gl.constexpr = _depth(CHANNELS)
    for part in gl.static_range(CHANNELS // depth):
        right = _load_weights(weights, start, INPUTS, FIRST + part * depth, depth, RIGHT)
        acc = mma_v2(tile.index(part).load(LEFT), right, acc)
    return acc


@gluon.jit
def _multiply_wgmma(acc, tile, staged, CHANNELS: gl.constexpr):
    """The same by wgmma, with the weights in shared memory too."""
    for part in gl.static_range(CHANNELS // _depth(CHANNELS)):
        acc = warpgroup_mma(tile.index(part), staged.index(part), acc)
    return acc


@gluon.jit
def expand_chunk(
    mask, skip_tile, low_tile, weights, bias, start, LOW: gl.constexpr, SKIP: gl.constexpr, WGMMA: gl.constexpr
):
    """A chunk of the hidden tensor, float16 [halo, chunk], channels in order."""
    if WGMMA:
        values = _load_bias(bias, start, _weight_vectors(_STEP))
        staged_bias = gl.allocate_shared_memory(gl.float16, [_STEP, CHUNK], _swizzled(_STEP, True), values)
        skip_weights = _stage_weights(weights, start, LOW + SKIP, LOW, SKIP)
        if LOW:
            low_weights = _stage_weights(weights, start, LOW + SKIP, 0, LOW)
        fence_async_shared()  # wgmma reads through the async proxy what ordinary stores wrote
        gl.barrier()
        acc = gl.zeros([HALO, CHUNK], gl.float32, layout=_WGMMA)
        acc = warpgroup_mma(mask, staged_bias, acc, use_acc=False)
        acc = _multiply_wgmma(acc, skip_tile, skip_weights, SKIP)
        if LOW:
            acc = _multiply_wgmma(acc, low_tile, low_weights, LOW)
    else:
        acc = gl.zeros([HALO, CHUNK], gl.float32, layout=MMA)
        acc = mma_v2(mask, _load_bias(bias, start, RIGHT), acc)
        acc = _multiply(acc, skip_tile, weights, start, LOW + SKIP, LOW, SKIP)
        if LOW:
            acc = _multiply(acc, low_tile, weights, start, LOW + SKIP, 0, LOW)
    return deinterleave(_relu_to_half(acc), HALO, CHUNK)
