"""The convolution for Hopper (sm_90) and later: the tensor memory accelerator (TMA) fetches boxes.

    forward     y[n,k,p,q] = act(bias[k] + sum over c,r,s of x[n, c, h, w] * weight[k,c,r,s])
                             with h = p*stride - padding + r*dilation, and w likewise
    backward    conv2d_input_grad_tma.py and conv2d_weight_grad_tma.py, by the same means

This is the last rung of conv2d.py. In the rung before, a step of the largest tile has 156
instructions (compiled for sm_90 by triton 3.9.0), and 122 of them are integer arithmetic: taps and
addresses. But the pixels of a tile lie side by side, and GPUs since Hopper have a unit for that. A
descriptor tells the TMA once where a tensor lies, and how large a box is. Then one thread asks for
the box at some coordinates, and the TMA copies it to shared memory.

    x as [N, H, W, C]     A box is TILE_N images x TILE_P rows x TILE_Q columns x BLOCK_K channels.
                          It is the input of one tap (r, s) for a box of output pixels: for the
                          pixels at (n, p, q) it lies at (n, p + r - padding, q + s - padding).

        x  . . . . . . . .            # lies where the output box does; + is the box of a tap one
           . # # # # . . .            row down and one column right. So a tap is two additions to
           . # # # # + . .            coordinates. A step of the loop asks for this box and for
           . # # # # + . .            one of the filters. Where a box sticks out of the image, the
           . . + + + + . .            TMA fills in zeros: the padding needs no masks and no copy.

One program owns tiles of BLOCK_M = TILE_N * TILE_P * TILE_Q pixels x BLOCK_N filters, in turn:

    for each of its tiles:
        acc = 0                                             # [BLOCK_N, BLOCK_M], float32
        for each tap, and each block of channels c:
            acc += w[tap, filters, c] @ transpose(x[box at the tap, c])
        y[box, filters] = act(transpose(acc) + bias)

What limits it: FLOPs and bytes are those of conv2d.py, so tensor cores limit wide 3x3 layers. A 1x1
filter at stride 1 does not come here: conv2d.py makes it a matmul.

Read first: conv2d.py, matmul_tma.py. Sources: CUTLASS's implicit GEMM has the same loop over taps;
space to depth for a first layer is Google's, of ResNet-50 in MLPerf Training 0.6.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilelab.kernels._geometry import output_size
from tilelab.kernels._launch import Device, descriptor, device_of, launch
from tilelab.kernels._partial_sums import first_pass, reduce_parts
from tilelab.kernels._tile_facts import Work, fastest_tile
from tilelab.kernels._tiles import cdiv, choose_tile, persistent, tma_tile
from tilelab.kernels.activation import activate

_fast = functools.partial(tma_tile, SPLIT_K=1)  # m pixels x n filters x k channels

# The key is the bytes of an element. What holds for each tile, compiled for sm_90 by triton 3.6.0
# and 3.9.0: No register spills. Both operands of wgmma, the tensor-core instruction of sm_90, come
# from shared memory, and it is 128 or 256 pixels wide. Loads begin at least a step ahead. A step
# has at most 115 instructions.
FAST_TILES = {
    2: [
        # No larger accumulator fits the registers, so this tile loads the least for a product.
        _fast(m=256, n=128, k=64, warps=8, stages=3, per_sm=1),
        # Two programs share an SM: one multiplies while the other stores.
        _fast(m=128, n=128, k=64, warps=8, stages=2, per_sm=2),
        # 64 filters, as in the first stage of a ResNet, fill this tile.
        _fast(m=256, n=64, k=64, warps=4, stages=2, per_sm=2),
        # Layers of few pixels have more of these tiles, and more still if the sum is in parts.
        _fast(m=128, n=64, k=64, warps=4, stages=4, per_sm=2),
        # These are for 32 and 16 channels: in small networks, and in packed images and groups.
        _fast(m=256, n=64, k=32, warps=4, stages=4, per_sm=2),
        _fast(m=256, n=64, k=16, warps=4, stages=6, per_sm=2),
    ],
    4: [  # TF32: 32 channels are as many bytes as 64 in 16-bit.
        _fast(m=256, n=128, k=32, warps=8, stages=2, per_sm=1),
        _fast(m=128, n=64, k=32, warps=4, stages=3, per_sm=2),
        _fast(m=128, n=64, k=16, warps=4, stages=4, per_sm=2),
    ],
}


@triton.jit
def corner_of(
    box, N, P, Q, TILE_N: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Return which part of the sum box number `box` has, and its first image, row and column."""
    blocks_p = tl.cdiv(P, TILE_P)
    blocks_q = tl.cdiv(Q, TILE_Q)
    part = 0
    if SPLIT_K > 1:
        boxes = tl.cdiv(N, TILE_N) * blocks_p * blocks_q
        part = box // boxes
        box = box % boxes
    q = box % blocks_q * TILE_Q
    p = box // blocks_q % blocks_p * TILE_P
    n = box // blocks_q // blocks_p * TILE_N
    return part, n, p, q


# The kernel computes y^T = W x^T: the filters are rows, the pixels are columns. wgmma reads its
# second operand from shared memory as TMA puts it there, and a box may have any rank. As the first
# operand, Triton would carry the box through registers. So acc is transposed as it is stored.
#
# A box holds neighbours, so a stride needs another view of x. At stride 2, the same memory is
# [N, H/2, 2, W/2, 2*C]: row 2i + a is row a of pair i, and channel c of column 2j + b is channel
# b*C + c of pair j. A box with one a and one b has every second row and column. Without padding,
# tap r reads row r % 2 of the pair that is r // 2 further down.


@triton.jit
def conv2d_tma_kernel(
    x, w, bias_ptr, y, place, N, P, Q, K, C, SPAN, K_GROUP, C_GROUP, stride_bias,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One program computes several tiles of y: its own number, and every num_programs-th after it.

    x, w [R*S, K, SPAN] and y [N, P, Q, K] are descriptors. With POOL, y gets the largest of each
    2x2, and descriptor `place` gets which it was. With SPLIT_K > 1, y has the partial sums of all
    parts, [SPLIT_K * N, P, Q, K], with N rounded up to whole boxes.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_P * TILE_Q
    # Each STRIDE_H rows of x make a group. UP groups lie above the image and hold its padding. In
    # the loop, h counts rows from the first of these groups on, so it is never negative. The
    # padding begins at h = FIRST_H. Columns are counted likewise.
    UP: tl.constexpr = (PAD_H + STRIDE_H - 1) // STRIDE_H
    LEFT: tl.constexpr = (PAD_W + STRIDE_W - 1) // STRIDE_W
    FIRST_H: tl.constexpr = UP * STRIDE_H - PAD_H
    FIRST_W: tl.constexpr = LEFT * STRIDE_W - PAD_W
    blocks_k = tl.cdiv(K, BLOCK_N)
    blocks_c = tl.cdiv(SPAN, BLOCK_K)
    boxes = tl.cdiv(N, TILE_N) * tl.cdiv(P, TILE_P) * tl.cdiv(Q, TILE_Q)
    steps = R * S * blocks_c
    part_steps = tl.cdiv(steps, SPLIT_K)

    for work in tl.range(tl.program_id(0), boxes * blocks_k * SPLIT_K, tl.num_programs(0)):
        # Neighbouring programs share their pixels and have other filters.
        k = work % blocks_k * BLOCK_N
        part, n, p, q = corner_of(work // blocks_k, N, P, Q, TILE_N, TILE_P, TILE_Q, SPLIT_K)
        first_c = 0
        if GROUPED:  # K_GROUP filters share C_GROUP channels of x.
            first_c = k // K_GROUP * C_GROUP

        # These are the tap and the channels of the first step. Later steps count them up, since a
        # division costs more. An `if` there would keep Triton from loading a step ahead.
        first = part * part_steps
        tap = first // blocks_c
        c = first % blocks_c * BLOCK_K
        acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
        for _ in range(first, tl.minimum(first + part_steps, steps)):
            # The compiler turns an unsigned division by a constant into a multiplication.
            r = (tap.to(tl.uint32) // S).to(tl.int32)
            h = FIRST_H + r * DIL_H
            v = FIRST_W + (tap - r * S) * DIL_W
            if STRIDE_H * STRIDE_W == 1:
                x_box = x.load([n, p + (h - UP), q + (v - LEFT), first_c + c])
            else:
                column = v % STRIDE_W * C + first_c + c
                row, col = p + (h // STRIDE_H - UP), q + (v // STRIDE_W - LEFT)
                x_box = x.load([n, row, h % STRIDE_H, col, column])
            x_tile = tl.reshape(x_box, (BLOCK_M, BLOCK_K))
            w_tile = tl.reshape(w.load([tap, k, c]), (BLOCK_N, BLOCK_K))
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision=PRECISION)
            c += BLOCK_K
            done = c >= SPAN
            c = tl.where(done, 0, c)
            tap = tl.where(done, tap + 1, tap)

        if POOL:
            acc, which = _largest_of_four(acc, TILE_N * TILE_P, TILE_Q)  # [BLOCK_N, BLOCK_M / 4]
        if HAS_BIAS:
            offs_k = k.to(tl.int64) + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_k * stride_bias, mask=offs_k < K, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        if POOL:
            which = tl.where(acc <= 0, 4, which)  # The ReLU lets none through.
            SHAPE: tl.constexpr = (TILE_N, TILE_P // 2, TILE_Q // 2, BLOCK_N)
            place.store([n, p // 2, q // 2, k], tl.reshape(which.to(tl.uint8).T, SHAPE))
        acc = activate(acc, ACTIVATION)
        if POOL:
            y.store([n, p // 2, q // 2, k], tl.reshape(acc.to(y.dtype).T, SHAPE))
        else:
            n += part * (tl.cdiv(N, TILE_N) * TILE_N)
            y.store([n, p, q, k], tl.reshape(acc.to(y.dtype).T, (TILE_N, TILE_P, TILE_Q, BLOCK_N)))


@triton.jit
def first_of_largest(acc0, acc1, acc2, acc3):
    """Return the largest of four tiles, and the first that has it, as in torch; a NaN wins."""
    best = acc0
    place = tl.full(best.shape, 0, tl.int32)
    place = tl.where((acc1 > best) | (acc1 != acc1), 1, place)
    best = tl.where(place == 1, acc1, best)
    place = tl.where((acc2 > best) | (acc2 != acc2), 2, place)
    best = tl.where(place == 2, acc2, best)
    place = tl.where((acc3 > best) | (acc3 != acc3), 3, place)
    best = tl.where(place == 3, acc3, best)
    return best, place


@triton.jit
def _largest_of_four(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the largest of each 2x2 pixels of acc [channels, ROWS * COLUMNS], and which: 0..3."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    pairs = tl.reshape(acc, (BLOCK_N, ROWS // 2, 2, COLUMNS // 2, 2))
    left, right = tl.split(pairs)  # [BLOCK_N, ROWS / 2, 2, COLUMNS / 2]
    acc0, acc2 = tl.split(tl.permute(left, (0, 1, 3, 2)))
    acc1, acc3 = tl.split(tl.permute(right, (0, 1, 3, 2)))
    best, which = first_of_largest(acc0, acc1, acc2, acc3)
    pixels: tl.constexpr = ROWS * COLUMNS // 4
    return tl.reshape(best, (BLOCK_N, pixels)), tl.reshape(which, (BLOCK_N, pixels))


# --- Packing: what TMA cannot read as it is -------------------------------------------------------
#
# Few channels. Strides for TMA are multiples of 16 bytes, but a pixel of 3 channels has 6 bytes in
# 16-bit. So stride_h x stride_w pixels become one pixel with that many times the channels, rounded
# up to a multiple of 16 bytes: space to depth. The convolution then has stride 1. The filter is
# packed in the same way, with zeros where it has no tap. One row of it:
#
#     7 taps, stride 2, C = 3             4 taps, stride 1, C = 12, rounded up to 16
#     | a b | c d | e f | g 0 |     ->    |  A  |  B  |  C  |  D  |
#
# Many groups. 32 groups of 4 channels would be 32 products of 4 filters each, but a wgmma always
# has 64 rows. So 64 filters and the 64 channels of their groups become one product. In it, a filter
# has zeros for the channels of other groups (the matrix is block-diagonal). This does 16 times the
# multiplications, but 4 filters alone would have filled only 4 of the 64 rows.
#
# Filters. They must lie in memory as [K, R, S, C]. Those of a channels_last weight do.
#
# A packed zero times an infinity or NaN is NaN. So one of these in x can make NaN of a few outputs
# that do not depend on it: those of other groups, and those whose window ends just before it.


@triton.jit
def conv2d_pack_kernel(
    x_ptr, out_ptr, N, C, H, W, rows, columns, depth,
    stride_xn, stride_xc, stride_xh, stride_xw,
    FOLD_H: tl.constexpr, FOLD_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels of out [N, rows, columns, depth]: space to depth.

    Channel (a * FOLD_W + b) * C + c of pixel (i, j) is channel c of the padded image's pixel
    (i * FOLD_H + a, j * FOLD_W + b). Channels after the last of these are zero.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    j = offs_m % columns
    i = offs_m // columns % rows
    n = offs_m // columns // rows
    c = offs_n % C
    b = offs_n // C % FOLD_W
    a = offs_n // C // FOLD_W
    h = (i * FOLD_H - PAD_H)[:, None] + a[None, :]
    w = (j * FOLD_W - PAD_W)[:, None] + b[None, :]
    inside = (n < N)[:, None] & (a < FOLD_H)[None, :]
    inside &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offs = (n * stride_xn)[:, None] + h * stride_xh + w * stride_xw
    x = tl.load(x_ptr + offs + (c.to(tl.int64) * stride_xc)[None, :], mask=inside, other=0.0)
    mask = (n < N)[:, None] & (offs_n < depth)[None, :]
    tl.store(out_ptr + (offs_m * depth)[:, None] + offs_n[None, :], x, mask=mask)


@triton.jit
def conv2d_pack_filter_kernel(
    w_ptr, out_ptr, K, C, R, S, taps_w, rows, depth,
    stride_wk, stride_wc, stride_wr, stride_ws, K_GROUP, parts,
    FOLD_H: tl.constexpr, FOLD_W: tl.constexpr, DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M of the K * taps rows of out [K, taps, depth], BLOCK_N channels.

    Channel part * C + c of out is channel c of part `part`. A part is one of the FOLD_H x FOLD_W
    taps that become one. If DIAGONAL, it is a group, and a filter is zero in groups not its own.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    taps = rows // K
    k = offs_m // taps
    tap = offs_m % taps
    c = offs_n % C
    part = offs_n // C
    if DIAGONAL:
        r = (tap // taps_w)[:, None]
        s = (tap % taps_w)[:, None]
        inside = (k // K_GROUP % parts)[:, None] == part[None, :]
    else:
        r = (tap // taps_w * FOLD_H)[:, None] + (part // FOLD_W)[None, :]
        s = (tap % taps_w * FOLD_W)[:, None] + (part % FOLD_W)[None, :]
        inside = (part < FOLD_H * FOLD_W)[None, :] & (r < R) & (s < S)
    inside &= (k < K)[:, None]
    offs = (k * stride_wk)[:, None] + r * stride_wr + s * stride_ws
    w = tl.load(w_ptr + offs + (c.to(tl.int64) * stride_wc)[None, :], mask=inside, other=0.0)
    mask = (offs_m < rows)[:, None] & (offs_n < depth)[None, :]
    tl.store(out_ptr + (offs_m * depth)[:, None] + offs_n[None, :], w, mask=mask)


# --- Which tensors, which tile --------------------------------------------------------------------


class Plan(NamedTuple):
    """How the kernel does a convolution, as far as sizes and strides (in elements) decide it.

    Attributes:
        size: (N, P, Q, K).
        x: sizes and strides of the tensor that boxes are fetched from; its channels are last.
        fold: height and width of the pixels that become one (space to depth); None if x is read as
            it is.
        w: sizes and strides of the filters as [taps, K, channels].
        packed_w: whether the filters are packed first.
        taps: R and S for the kernel, after packing.
        geometry: stride, padding and dilation (height, width each) for the kernel.
        grouped: (filters, channels): so many filters share so many channels of x, and the next
            filters have the next channels; None without groups.
    """

    size: tuple[int, int, int, int]
    x: tuple[tuple, tuple]
    fold: tuple[int, int] | None
    w: tuple[tuple, tuple]
    packed_w: bool
    taps: tuple[int, int]
    geometry: tuple[int, ...]
    grouped: tuple[int, int] | None


GROUP_BLOCK = 64  # With groups, a tile has so many filters. Smaller groups share it.
LARGEST = 2**30  # No size may be larger, since coordinates for TMA have 32 bits.
MOST_FOLDED = 4096  # A folded pixel has at most so many channels, since one program packs it.


@functools.lru_cache(maxsize=4096)
def make_plan(
    x_size: tuple, x_strides: tuple, w_size: tuple, w_strides: tuple,
    stride: tuple, padding: tuple, dilation: tuple, groups: int, item: int,
) -> Plan | None:  # fmt: skip
    """Return the plan for x [N, C, H, W] and weight [K, C / groups, R, S], None if there is none.

    Strides are in elements, of `item` bytes each.
    """
    (N, C, H, W), (K, channels, R, S) = x_size, w_size
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    unit = 16 // item  # Strides for TMA are multiples of 16 bytes, that is, of so many elements.
    if 0 in (*x_size, *w_size, P, Q) or K % unit or max(*x_size, K, N * P * Q) > LARGEST:
        return None
    if C < unit and groups == 1 and dilation == (1, 1):
        return folded_plan(x_size, w_size, stride, P, Q, unit)

    strides = pixel_strides(x_size, x_strides, unit)
    if C % unit or strides is None:
        return None
    sn, sh, sw = strides
    if (R, S, *padding) == (1, 1, 0, 0):  # Only every stride-th pixel is read.
        x = (N, P, Q, C), (sn, sh * stride[0], sw * stride[1], 1)
        stride = (1, 1)
    elif stride == (1, 1):
        x = (N, H, W, C), (sn, sh, sw, 1)
    else:
        a, b = stride
        rows, columns = H // a, W // b
        last_h = (P - 1) * a - padding[0] + (R - 1) * dilation[0]
        last_w = (Q - 1) * b - padding[1] + (S - 1) * dilation[1]
        # The last rows may be too few for a group, and TMA cannot read them. So no tap may need
        # them. Columns are alike.
        odd = (H % a and last_h >= rows * a) or (W % b and last_w >= columns * b)
        if odd or 0 in (rows, columns) or (b > 1 and sw != C):
            return None
        x = (N, rows, a, columns, b * C), (sn, a * sh, sh, b * sw, 1)

    if max(x[1]) * item >= 2**40:  # A descriptor's strides are below 2**40 bytes.
        return None
    grouped, span, diagonal = None, channels, False
    if groups > 1:
        filters = K // groups
        diagonal = filters < GROUP_BLOCK
        if GROUP_BLOCK % filters if diagonal else filters % GROUP_BLOCK:
            return None
        if diagonal:
            span = GROUP_BLOCK // filters * channels
        if span % unit:  # The second block's channels would not begin at a multiple of 16 bytes.
            return None
        grouped = (GROUP_BLOCK if diagonal else filters), span
    w = None if diagonal else filters_as_they_lie(w_size, w_strides, unit)
    packed_w = w is None
    if packed_w:
        w = packed_filters(K, R * S, span, unit)
    geometry = (*stride, *padding, *dilation)
    return Plan((N, P, Q, K), x, None, w, packed_w, (R, S), geometry, grouped)


def pixel_strides(size: tuple, strides: tuple, unit: int) -> tuple[int, int, int] | None:
    """Return the strides of images, rows and pixels of x [N, C, H, W], or None.

    None means that TMA cannot read x as it is: channels must be neighbours, these strides must be
    multiples of `unit` elements, and no two elements may be in one place.
    """
    C = size[1]
    sn, sc, sh, sw = (s if n > 1 else C for n, s in zip(size, strides, strict=True))
    if (C > 1 and sc != 1) or any(s % unit or s < C for s in (sn, sh, sw)):
        return None
    return sn, sh, sw


def filters_as_they_lie(size: tuple, strides: tuple, unit: int) -> tuple[tuple, tuple] | None:
    """Return sizes and strides of filters [K, C, R, S] as [taps, K, C]; None: TMA can't read it."""
    K, C, R, S = size
    tap = strides[2] if S == 1 else strides[3]
    in_rows = C == 1 or strides[1] == 1
    in_rows &= R * S == 1 or not (
        tap % unit or tap < C or (S > 1 and R > 1 and strides[2] != S * tap)
    )
    in_rows &= K == 1 or not (strides[0] % unit or strides[0] < C)
    if not in_rows:
        return None
    return (R * S, K, C), (tap if R * S > 1 else unit, strides[0] if K > 1 else unit, 1)


def packed_filters(K: int, taps: int, span: int, unit: int) -> tuple[tuple, tuple]:
    """Return sizes and strides as [taps, K, channels] of filters that `packed_filter` packed."""
    depth = cdiv(span, unit) * unit
    return (taps, K, depth), (depth, taps * depth, 1)


def folded_plan(x_size, w_size, fold, P, Q, unit):
    """Return the plan for an image of few channels: `fold`, stride x stride, pixels become one."""
    (N, C, _, _), (K, _, R, S) = x_size, w_size
    R, S = cdiv(R, fold[0]), cdiv(S, fold[1])
    depth = cdiv(fold[0] * fold[1] * C, unit) * unit
    if depth > MOST_FOLDED:
        return None
    rows, columns = P + R - 1, Q + S - 1
    x = (N, rows, columns, depth), (rows * columns * depth, columns * depth, depth, 1)
    w = packed_filters(K, R * S, depth, unit)
    return Plan((N, P, Q, K), x, fold, w, True, (R, S), (1, 1, 0, 0, 1, 1), None)


def plan_for(x, weight, stride, padding, dilation, groups, precision, pool=False) -> Plan | None:
    """Return the plan for this call, or None if the device or the tensors admit none."""
    if len(device_of(x).kernels) == 1 or (x.dtype == torch.float32 and precision != "tf32"):
        return None
    plan = make_plan(
        x.shape, x.stride(), weight.shape, weight.stride(),
        tuple(stride), tuple(padding), tuple(dilation), groups, x.element_size(),
    )  # fmt: skip
    if plan is None or (plan.fold is None and x.data_ptr() % 16):
        return None
    # A place has one byte, so with a pool 16 bytes are 16 filters. Images of few channels take the
    # portable kernel with a pool.
    return None if pool and (plan.fold or plan.size[3] % 16) else plan


@functools.lru_cache(maxsize=4096)
def pixel_box(N: int, P: int, Q: int, pixels: int, pool: bool = False) -> tuple[int, int, int]:
    """Return images, rows and columns of a box of `pixels`: the one that sticks out the least.

    Among equals it is the one with the widest rows, then the one with most rows. For 256 images of
    14 x 14, a box of 256 pixels is 64 x 2 x 2, and nothing sticks out. For a pool, a box has whole
    2x2 windows, and at least eight columns, so that a thread holds all four pixels of a window.
    """
    boxes = []
    for log_p, log_q in itertools.product(range(9), repeat=2):
        p, q = 1 << log_p, 1 << log_q
        if p * q <= pixels and not (pool and (p < 2 or q < 8)):
            n = pixels // (p * q)
            covered = cdiv(N, n) * n * cdiv(P, p) * p * cdiv(Q, q) * q
            boxes.append((covered, -q, -p, n))
    _, q, p, n = min(boxes)
    return n, -p, -q


@functools.lru_cache(maxsize=4096)
def fast_tile(plan: Plan, item: int, device: Device, pool: bool = False) -> dict | None:
    """Return the tile of FAST_TILES, with its parts, that is fastest by the model."""
    N, P, Q, K = plan.size
    (taps, _, span), _ = plan.w
    possible = _possible(plan, item, pool)
    moved = item * (math.prod(plan.x[0]) + math.prod(plan.w[0]) + math.prod(plan.size))

    def work(tile: dict) -> Iterable[tuple[dict, Work, int]]:
        box = pixel_box(N, P, Q, tile["BLOCK_M"], pool)
        boxes = cdiv(N, box[0]) * cdiv(P, box[1]) * cdiv(Q, box[2])
        steps = taps * cdiv(span, tile["BLOCK_K"])
        its_work = Work(boxes * cdiv(K, tile["BLOCK_N"]), steps, N * P * Q * K, moved)
        for variant in possible:
            if variant | dict(SPLIT_K=1) == tile:
                yield variant, its_work, variant["SPLIT_K"]

    return fastest_tile(device, "conv2d", "fp16" if item == 2 else "tf32", work)


def choices(
    plan, x, default: dict, kernels: tuple, fast: Callable[[Device], dict | None],
    pointers: Callable[[Device], dict | None] = lambda device: None,
):  # fmt: skip
    """Return what `choose_tile` has to choose from: default tiles and the names of kernels.

    Without a plan these are for `kernels`. A plan, which may be a gradient's, adds "tma". `fast`
    and `pointers` return the tile that the model finds fastest with TMA, and without.
    """
    device = device_of(x)
    if plan is None:
        tile = pointers(device)
    else:
        tile, kernels = fast(device), (*kernels, "tma")
    return {x.itemsize: tile} if tile else default, kernels


def _possible(plan: Plan, item: int, pool: bool = False) -> list[dict]:
    """Return the FAST_TILES that can do the plan, each with every number of parts it admits."""
    (taps, _, span), _ = plan.w
    found = []
    for tile, parts in itertools.product(FAST_TILES[item], (1, 2, 4, 8, 16)):
        steps = taps * cdiv(span, tile["BLOCK_K"])
        large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128
        if parts > 1 and (pool or plan.grouped or large or parts * 4 > steps):
            continue
        if plan.grouped and tile["BLOCK_N"] != GROUP_BLOCK:
            continue
        found.append(tile | dict(SPLIT_K=parts))
    return found


PACK_TILE = dict(BLOCK_M=64, BLOCK_N=16, num_warps=4)
PACK_FILTER_TILE = dict(BLOCK_M=16, BLOCK_N=64, num_warps=4)


def packed_image(plan, x, padding):
    """Return x [N, C, H, W] as the plan wants it: folded, padded, channels last."""
    size, _ = plan.x
    out = torch.empty(size, dtype=x.dtype, device=x.device)
    _, rows, columns, depth = size
    pixels = size[0] * rows * columns
    tile = dict(choose_tile("conv2d_pack", x, {x.itemsize: PACK_TILE}, M=pixels, N=depth))
    # One program packs all channels of a pixel, whatever the tile says. If there are many, it packs
    # fewer pixels.
    elements = 4 * tile["BLOCK_M"] * tile["BLOCK_N"]
    tile["BLOCK_N"] = max(16, triton.next_power_of_2(depth))
    tile["BLOCK_M"] = max(1, min(tile["BLOCK_M"], elements // tile["BLOCK_N"]))
    launch(
        conv2d_pack_kernel, (cdiv(pixels, tile["BLOCK_M"]),),
        x, out, *x.shape, rows, columns, depth, *x.stride(), *plan.fold, *padding, **tile,
    )  # fmt: skip
    return out


def packed_filter(plan: Plan, size: tuple, weight: torch.Tensor) -> torch.Tensor:
    """Return weight [K, C, R, S] as the plan wants it, in memory [K, taps, channels].

    `size` is (taps, K, channels).
    """
    taps, _, depth = size
    (K, C, R, S), (_, taps_w) = weight.shape, plan.taps
    out = torch.empty(K, taps, depth, dtype=weight.dtype, device=weight.device)
    rows = K * taps
    tile = choose_tile(
        "conv2d_pack_filter", weight, {weight.itemsize: PACK_FILTER_TILE}, M=rows, N=depth
    )
    block, span = plan.grouped or (1, C)
    launch(
        conv2d_pack_filter_kernel, (cdiv(rows, tile["BLOCK_M"]), cdiv(depth, tile["BLOCK_N"])),
        weight, out, K, C, R, S, taps_w, rows, depth, *weight.stride(),
        max(1, block * C // span), span // C, *(plan.fold or (1, 1)),
        DIAGONAL=plan.grouped is not None, **tile,
    )  # fmt: skip
    return out


def conv2d_tma(plan, x, weight, bias, activation, y, tile, precision, padding, place=None):
    """Launch the kernel. Pack x and weight before it if needed, and add up parts after it.

    y [N, K, P, Q] is channels_last. With `place`, a 2x2 max-pool is fused. Then `place`, in uint8,
    gets which pixel was the largest, and both are [N, K, P / 2, Q / 2].

    Raises:
        ValueError: the tile does not suit groups or a pool.
    """
    pool = place is not None
    packed_w = plan.packed_w or weight.data_ptr() % 16 != 0
    sms, parts = device_of(x).sms, tile["SPLIT_K"]
    how = _layout(plan, tuple(tile.items()), sms, x.element_size(), pool, packed_w)
    if plan.fold is not None:
        x = packed_image(plan, x, padding)
    if packed_w:
        weight = packed_filter(plan, how.w[0], weight)
    out = y
    if parts > 1:
        out = torch.empty(how.out[0], dtype=torch.float32, device=x.device)
    launch(
        conv2d_tma_kernel, (how.programs,),
        descriptor(x, *plan.x, how.box), descriptor(weight, *how.w, how.w_box), bias,
        descriptor(out, *how.out, how.out_box),
        descriptor(place, *how.out, how.out_box) if pool else None,
        *how.sizes, 0 if bias is None else bias.stride(0), *plan.taps, *plan.geometry,
        **first_pass(bias, activation, parts), PRECISION=precision, **how.meta,
    )  # fmt: skip
    if parts > 1:
        N, P, Q, K = plan.size
        reduce_parts(out, bias, activation, y, N * P * Q, K, how.out[0][0] // parts * P * Q, parts)


class Layout(NamedTuple):
    """The arguments of a launch that follow from its plan and tile."""

    programs: int
    boxes: int
    sizes: tuple[int, ...]
    box: list[int]
    w: tuple[tuple, tuple]
    w_box: list[int]
    out: tuple[tuple, tuple]
    out_box: list[int]
    meta: dict


@functools.lru_cache(maxsize=4096)
def _layout(plan: Plan, items: tuple, sms: int, item: int, pool: bool, packed_w: bool) -> Layout:
    tile = dict(items)
    N, P, Q, K = plan.size
    m, n, k, parts = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    if (plan.grouped and n != GROUP_BLOCK) or (parts > 1 and (plan.grouped or pool)):
        raise ValueError(
            f"groups want tiles of BLOCK_N={GROUP_BLOCK}, groups and pools of SPLIT_K=1; got {tile}"
        )
    w, scale = plan.w, 1
    if packed_w:
        w = packed_filters(K, w[0][0], w[0][2], 16 // item)
    if pool:
        scale, P, Q = 2, P // 2 * 2, Q // 2 * 2  # An odd last row or column is dropped.
    tn, tp, tq = pixel_box(N, P, Q, m, pool)
    boxes_n = cdiv(N, tn)
    boxes = boxes_n * cdiv(P, tp) * cdiv(Q, tq)
    x_size = plan.x[0]
    rows, columns = P // scale, Q // scale
    images = N if parts == 1 else parts * boxes_n * tn
    return Layout(
        persistent(tile, boxes * cdiv(K, n) * parts, sms),
        boxes,
        (N, P, Q, K, x_size[-1] // plan.geometry[1], w[0][2], *(plan.grouped or (1, 0))),
        [tn, tp, tq, k] if len(x_size) == 4 else [tn, tp, 1, tq, k],
        w, [1, n, k],
        ((images, rows, columns, K), (rows * columns * K, columns * K, K, 1)),
        [tn, tp // scale, tq // scale, n],
        dict(
            POOL=pool, GROUPED=plan.grouped is not None, TILE_N=tn, TILE_P=tp, TILE_Q=tq,
            BLOCK_N=n, BLOCK_K=k, SPLIT_K=parts,
            num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        ),
    )  # fmt: skip
