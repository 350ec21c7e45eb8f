"""What the Gluon kernels of whole blocks are put together from: the halo in shared memory, expand, and layouts.

Padding and bias. The depthwise convolution pads the *hidden* tensor with zeros, and ReLU(bias) is not 0: expand's bias
must be added to pixels of the map only. It comes by one extra step of 16 inputs, whose left operand is 1 in two columns
where the pixel is on the map, and whose right operand is the bias in two float16 parts.

Who holds what. Lane (g, d) is the d-th of the g-th group of four:

    accumulator of a tensor-core step (16×8)      rows g and g + 8, columns 2d and 2d + 1
    left operand, 8 values together (16×32)       rows g and g + 8, depths 8d … 8d + 7
    depthwise, 8 pixels of a row × 32 channels    pixel g, channels 8d … 8d + 7

The last two agree, row g + 8 being the next output row: no value changes lanes between depthwise and project. The first
is made to agree by dealing out the columns of the weights (:func:`dealt`): what a lane holds of a product N columns
wide are then N/4 channels in a row, written 16 bytes at a time (8 for 16 channels).

Banks. The 8 lanes that go together write or read two neighbouring pixels of the hidden tensor, 64 bytes each and 64
bytes apart: all 32 banks once, at every shift of the 3×3 window, with neither padding nor swizzling. With stride 2 the
columns of a halo row are stored even ones first, so that neighbouring outputs read neighbouring pixels there too.

The compiler puts the barriers between threads' reads and writes of shared memory; the one in :func:`expand_chunk` is
for the tensor cores' own reads, which it does not see.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from gpupipe.kernels.packed_triton import MULTIPLY_ADD, MULTIPLY_ADD_RELU, RELU_TO_HALF
from gpupipe.kernels.whole_block import HIDDEN_CHUNK

HALO = gl.constexpr(256)  # pixels: 8 rows of 32
CHUNK = gl.constexpr(HIDDEN_CHUNK)
_STEP = gl.constexpr(16)  # depth of a tensor-core step
TILE_PIXELS = gl.constexpr(64)  # rows of a product that belong to one projection

MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]))
_WARPGROUP = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]))
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
    """A left operand (a right one, transposed) in shared memory, as tensor cores and matrix loads like to read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * depth, element_bitwidth=16, transposed=transposed, rank=2)


@gluon.constexpr_function
def in_order_layout(channels):
    """An accumulator's, once its columns are channels in order: a lane has ``channels / 4`` of them in a row."""
    bits = [1 << i for i in range(channels.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, bit] for bit in bits[:-2]] + [[8, 0]],
        lane_bases=[[0, bits[-2]], [0, bits[-1]], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, channels],
    )


# ── arithmetic in assembly ────────────────────────────────────────────────────────────────────────────────────────────
# Left to itself the compiler takes float16 multiply-adds one by one, and ReLU as an instruction of its own. It is pure,
# where packed_triton's ReLU is said not to be: Gluon computes in the layouts that the source says, and chooses none.


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
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [a * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], dtype=gl.float32, is_pure=True, pack=1
    )


# ── columns dealt out ─────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def dealt(column, N: gl.constexpr):
    """The channel that stands in a column of a product: pair d of every 8 columns is dealt to channels dN/4 … on."""
    return column % 8 // 2 * (N // 4) + column // 8 * 2 + column % 2


@gluon.jit
def in_order(product, M: gl.constexpr, N: gl.constexpr):
    """A product's columns from dealt to channel order. Every value stays in its register."""
    return gl.reshape(gl.permute(gl.reshape(product, [M, N // 8, 4, 2]), [0, 2, 1, 3]), [M, N])


@gluon.jit
def as_dealt(values, M: gl.constexpr, N: gl.constexpr):
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
    skip,
    y0,
    x0,
    FIRST: gl.constexpr,
    H: gl.constexpr,
    W: gl.constexpr,
    C: gl.constexpr,
    STORED: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """Channels from FIRST on of the halo; 0 outside the map, and beyond the channels that are stored."""
    layout: gl.constexpr = _vectors(_depth(C))
    y, x, inside = _halo(gl.arange(0, HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W, STRIDE)
    channel = FIRST + gl.arange(0, _depth(C), layout=gl.SliceLayout(0, layout))
    mask = inside[:, None]
    if STORED != C:
        mask = mask & (channel < STORED)[None, :]
    return gl.load(skip + ((y * W + x) * STORED)[:, None] + channel[None, :], mask=mask, other=0.0)


@gluon.jit
def _load_upsampled(low, y0, x0, FIRST: gl.constexpr, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The same of the map that is upsampled: bilinear ×2, align_corners=True, in float16."""
    layout: gl.constexpr = _vectors(_depth(C))
    LOW_H: gl.constexpr = H // 2
    LOW_W: gl.constexpr = W // 2
    y, x, inside = _halo(gl.arange(0, HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W, 1)
    channel = FIRST + gl.arange(0, _depth(C), layout=gl.SliceLayout(0, layout))[None, :]
    v = gl.minimum(gl.maximum(y, 0), H - 1).to(gl.float32) * ((LOW_H - 1) / (H - 1))
    u = gl.minimum(gl.maximum(x, 0), W - 1).to(gl.float32) * ((LOW_W - 1) / (W - 1))
    # The last row and column are the lower and the right ones of two, so that four neighbours have one address.
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
    # Weights of the lower and of the upper row, of nothing outside the map.
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
def stage_skip(
    skip, y0, x0, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr, STORED: gl.constexpr, STRIDE: gl.constexpr
):
    """Shared memory [part][halo][≤ 32 channels]."""
    tile = gl.allocate_shared_memory(gl.float16, [C // _depth(C), HALO, _depth(C)], _swizzled(_depth(C)))
    for part in gl.static_range(C // _depth(C)):
        tile.index(part).store(_load_skip(skip, y0, x0, part * _depth(C), H, W, C, STORED, STRIDE))
    return tile


@gluon.jit
def stage_upsampled(low, y0, x0, H: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """The same of the map that is upsampled."""
    tile = gl.allocate_shared_memory(gl.float16, [C // _depth(C), HALO, _depth(C)], _swizzled(_depth(C)))
    for part in gl.static_range(C // _depth(C)):
        tile.index(part).store(_load_upsampled(low, y0, x0, part * _depth(C), H, W, C))
    return tile


@gluon.jit
def _load_mask(y0, x0, H: gl.constexpr, W: gl.constexpr, STRIDE: gl.constexpr, layout: gl.constexpr):
    """1 in the first two of 16 columns where a pixel is on the map: by the two parts of the bias, the bias there."""
    _, _, inside = _halo(gl.arange(0, HALO, layout=gl.SliceLayout(1, layout)), y0, x0, H, W, STRIDE)
    column = gl.arange(0, _STEP, layout=gl.SliceLayout(0, layout))
    return gl.where(inside[:, None] & (column < 2)[None, :], 1.0, 0.0).to(gl.float16)


@gluon.jit
def mask_operand(y0, x0, H: gl.constexpr, W: gl.constexpr, STRIDE: gl.constexpr, WGMMA: gl.constexpr):
    """The mask as :func:`expand_chunk` wants it: in shared memory for warpgroup instructions, else in registers."""
    if WGMMA:
        values = _load_mask(y0, x0, H, W, STRIDE, _vectors(_STEP))
        return gl.allocate_shared_memory(gl.float16, [HALO, _STEP], _swizzled(_STEP), values)
    else:
        return _load_mask(y0, x0, H, W, STRIDE, LEFT)


# ── expand ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _load_weights(weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, DEPTH: gl.constexpr, layout: gl.constexpr):
    """Inputs FIRST … FIRST + DEPTH − 1 × a chunk of hidden channels, dealt out."""
    k = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, layout))
    n = dealt(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout)), CHUNK)
    return gl.load(weights + (start + n)[None, :] * INPUTS + (FIRST + k)[:, None])


@gluon.jit
def _load_bias(bias, start, layout: gl.constexpr):
    """The two parts of the bias as the first two of 16 inputs."""
    k = gl.arange(0, _STEP, layout=gl.SliceLayout(1, layout))
    n = dealt(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout)), CHUNK)
    return gl.load(bias + (start + n)[None, :] * 2 + k[:, None], mask=(k < 2)[:, None], other=0.0)


@gluon.jit
def _stage_weights(weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr):
    """Shared memory [part][≤ 32 inputs][chunk]."""
    depth: gl.constexpr = _depth(CHANNELS)
    staged = gl.allocate_shared_memory(gl.float16, [CHANNELS // depth, depth, CHUNK], _swizzled(depth, True))
    for part in gl.static_range(CHANNELS // depth):
        values = _load_weights(weights, start, INPUTS, FIRST + part * depth, depth, _weight_vectors(depth))
        staged.index(part).store(values)
    return staged


@gluon.jit
def _multiply(acc, tile, weights, start, INPUTS: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr):
    """acc + tile × weights, the tile from shared memory, the weights from global memory straight into place."""
    depth: gl.constexpr = _depth(CHANNELS)
    for part in gl.static_range(CHANNELS // depth):
        right = _load_weights(weights, start, INPUTS, FIRST + part * depth, depth, RIGHT)
        acc = mma_v2(tile.index(part).load(LEFT), right, acc)
    return acc


@gluon.jit
def _multiply_by_warpgroup(acc, tile, staged, CHANNELS: gl.constexpr):
    """The same with weights that are staged too."""
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
        fence_async_shared()  # what ordinary stores wrote is read by the tensor cores' own path
        gl.barrier()
        acc = gl.zeros([HALO, CHUNK], gl.float32, layout=_WARPGROUP)
        acc = warpgroup_mma(mask, staged_bias, acc, use_acc=False)
        acc = _multiply_by_warpgroup(acc, skip_tile, skip_weights, SKIP)
        if LOW:
            acc = _multiply_by_warpgroup(acc, low_tile, low_weights, LOW)
    else:
        acc = gl.zeros([HALO, CHUNK], gl.float32, layout=MMA)
        acc = mma_v2(mask, _load_bias(bias, start, RIGHT), acc)
        acc = _multiply(acc, skip_tile, weights, start, LOW + SKIP, LOW, SKIP)
        if LOW:
            acc = _multiply(acc, low_tile, weights, start, LOW + SKIP, 0, LOW)
    return in_order(_relu_to_half(acc), HALO, CHUNK)
