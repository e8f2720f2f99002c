"""The last rung of the convolution: tiles that the tensor memory accelerator (TMA) fetches.

The implicit GEMM of conv2d.py spends most of its loop on addresses: of 156 instructions of a step,
122 are arithmetic on integers, done by every thread, for pixels that lie side by side anyway. Since
Hopper (sm_90) a GPU has a unit that is told the tensor once, by a descriptor, and then fetches any
box out of it, at coordinates, on the word of one thread. A convolution is made for it:

    x as [N, H, W, C]     a box of TILE_N images x TILE_P rows x TILE_Q columns x BLOCK_K channels
                          is one tap's input of a box of output pixels

    tap (r, s) of the output box at (n, p, q) reads the input box at (n, p + r - pad, q + s - pad)

        x  . . . . . . . .            so a step of the loop is two requests, and what
           . # # # # . . .            it computes of the tap is two additions. Where the
           . # # # # + . .            box sticks out of the image, the unit fills in
           . # # # # + . .            zeros: the padding costs nothing, neither masks
           . . + + + + . .            nor a padded copy.

Four things follow from how tensor cores on Hopper (wgmma) want their operands:

1. y^T = W x^T. A tile as it comes from TMA can be the second operand, whatever its rank; as the
   first, Triton would carry it through registers. So the filters are the rows, and the pixels the
   columns: acc is [BLOCK_N channels, BLOCK_M pixels], and is transposed as it is stored.
2. Stride. Of the tensor [N, H/2, 2, W/2, 2*C] (the same memory) a box with one index of the third
   dimension, and channels c or C + c of the last, is every second row and column: tap r reads
   row r % 2 of the pair r // 2 further on.
3. The box. 256 pixels can be 1 x 16 x 16 or 16 x 4 x 4 or 128 x 2 x 1: `pixel_box` takes the one
   with the least that sticks out. An image of 14 x 14 is 7 x 7 of 2 x 2, with 64 images deep.
4. A filter of one pixel needs none of this: it is a matmul of the pixels (conv2d.py calls it).

What TMA cannot read is packed first, by a small kernel:

    few channels     an image of 3 channels has 6 bytes a pixel, and TMA wants multiples of 16. Each
                     stride_h x stride_w pixels become one with so many times the channels, rounded
                     up to 8 (space to depth), and the convolution one of stride 1:

                         7 x 7, stride 2, C = 3          4 x 4, stride 1, C = 12 (of 16)
                           | a b | c d | e f | g            | A | B | C | D |
                     the filter is packed alike, with zeros where it has no tap.
    many groups      32 groups of 4 channels would be 32 products of 4 columns. 64 filters and their
                     64 channels are one product whose other blocks of the filter are zero: 16 times
                     the work, but a product of 4 columns alone fills no more of an instruction.
    filters          that are not [K, R, S, C] in memory. Keep them channels_last, and none is.

Non-finite numbers: a packed zero times an infinity is NaN, so an inf or a NaN in x can reach a few
neighbouring outputs (of other groups; just outside of its window) that should not know of it.

Read first: conv2d.py, and matmul.py's second half. Sources: CUTLASS's implicit GEMM has the same
loop over taps; space to depth for a first layer is Google's, of ResNet-50 in MLPerf Training 0.6.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilelab.kernels._cost_model import busiest_sm
from tilelab.kernels._geometry import output_size
from tilelab.kernels._launch import descriptor, device_of, launch
from tilelab.kernels._partial_sums import reduce_parts
from tilelab.kernels._tiles import cdiv, choose_tile, persistent, tma_tile
from tilelab.kernels.activation import activate

_fast = functools.partial(tma_tile, SPLIT_K=1)  # pixels x filters x channels

# By bytes an element. Compiled for sm_90 with triton 3.6.0 and 3.9.0: no spills, wgmma from shared
# memory, 128 or 256 pixels wide, loads begun a step ahead or more, at most 115 instructions a step.
FAST_TILES = {
    2: [
        # the most reuse that the registers hold
        _fast(m=256, n=128, k=64, warps=8, stages=3, per_sm=1),
        # two programs an SM: one multiplies while the other stores
        _fast(m=128, n=128, k=64, warps=8, stages=2, per_sm=2),
        # 64 filters (the first stage of a ResNet): nothing of the tile is padding
        _fast(m=256, n=64, k=64, warps=4, stages=2, per_sm=2),
        # few pixels: more tiles; with split-K even more
        _fast(m=128, n=64, k=64, warps=4, stages=4, per_sm=2),
        # 32 and 16 channels: the second stage of a small network, packed stems and groups
        _fast(m=256, n=64, k=32, warps=4, stages=4, per_sm=2),
        _fast(m=256, n=64, k=16, warps=4, stages=6, per_sm=2),
    ],
    4: [  # TF32; a step of 32 is as many bytes
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
    """Of box number `box`: which part of the sum it has, and its first image, row and column."""
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


@triton.jit
def conv2d_tma_kernel(
    x, w, bias_ptr, y, place, N, P, Q, K, C, SPAN, K_GROUP, C_GROUP, stride_bias,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One program computes every tile of y whose number is its own, modulo the programs.

    x, w [R*S, K, SPAN] and y [N, P, Q, K] are descriptors; so is place where POOL is, which stores
    the largest of each 2x2, and which it was. A filter has SPAN channels, from C_GROUP times its
    group on. With SPLIT_K > 1, y is of partial sums: [SPLIT_K * N, ...], N rounded up to boxes.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_P * TILE_Q
    # Row h of the padded image is row h % STRIDE_H of the h // STRIDE_H-th group of rows. So that
    # neither is negative, both begin at the group that holds the first row of the padding.
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
        # Which filters of which pixels: those that share their pixels run side by side.
        k = work % blocks_k * BLOCK_N
        part, n, p, q = corner_of(work // blocks_k, N, P, Q, TILE_N, TILE_P, TILE_Q, SPLIT_K)
        first_c = 0
        if GROUPED:
            first_c = k // K_GROUP * C_GROUP

        # The first step's tap and channels. The next ones are counted, since to divide costs more;
        # and without an `if`, behind which Triton would not fetch a step ahead.
        first = part * part_steps
        tap = first // blocks_c
        c = first % blocks_c * BLOCK_K
        acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
        for _ in range(first, tl.minimum(first + part_steps, steps)):
            r = (tap.to(tl.uint32) // S).to(tl.int32)  # unsigned: by a multiplication
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
            which = tl.where(acc <= 0, 4, which)  # the ReLU lets none through
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
    """The largest of four tiles, and the first that has it, as in torch; a NaN wins."""
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
    """Of each 2x2 pixels of acc [channels, ROWS * COLUMNS] the largest, and which it was: 0..3."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    pairs = tl.reshape(acc, (BLOCK_N, ROWS // 2, 2, COLUMNS // 2, 2))
    left, right = tl.split(pairs)  # [BLOCK_N, ROWS / 2, 2, COLUMNS / 2]
    acc0, acc2 = tl.split(tl.permute(left, (0, 1, 3, 2)))
    acc1, acc3 = tl.split(tl.permute(right, (0, 1, 3, 2)))
    best, which = first_of_largest(acc0, acc1, acc2, acc3)
    pixels: tl.constexpr = ROWS * COLUMNS // 4
    return tl.reshape(best, (BLOCK_N, pixels)), tl.reshape(which, (BLOCK_N, pixels))


# --- Packing: what TMA cannot read as it is -------------------------------------------------------


@triton.jit
def conv2d_pack_kernel(
    x_ptr, out_ptr, N, C, H, W, rows, columns, depth,
    stride_xn, stride_xc, stride_xh, stride_xw,
    FOLD_H: tl.constexpr, FOLD_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program packs BLOCK_M pixels of out [N, rows, columns, depth]: space to depth.

    Channel (a * FOLD_W + b) * C + c of pixel (i, j) is channel c of the padded image's pixel
    (i * FOLD_H + a, j * FOLD_W + b); further ones are zero.
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
    """One program packs BLOCK_M of the K * taps rows of out [K, taps, depth], BLOCK_N channels.

    Channel part * C + c is channel c of part `part`: of the FOLD_H x FOLD_W taps that were folded
    into one or, where DIAGONAL, of the groups in a block, of which a filter has but its own.
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
    """How the fast kernel does a convolution: all that does not depend on the data.

    Attributes:
        size: (N, P, Q, K).
        x: sizes and strides of the tensor that boxes are fetched from, its channels last.
        fold: pixels that become one (space to depth), height and width; None if x is read as it is.
        w: sizes and strides of the filters as [taps, K, channels].
        packed_w: whether the filters are packed first.
        taps: R and S, as the kernel counts them.
        geometry: stride, padding and dilation, likewise.
        grouped: of how many filters a block is that shares its channels, and from channel to
            channel of two such; None if all filters have all channels.
    """

    size: tuple[int, int, int, int]
    x: tuple[tuple, tuple]
    fold: tuple[int, int] | None
    w: tuple[tuple, tuple]
    packed_w: bool
    taps: tuple[int, int]
    geometry: tuple[int, ...]
    grouped: tuple[int, int] | None


GROUP_BLOCK = 64  # filters in a block of groups: the narrowest tile's
LARGEST = 2**30  # of a size: the unit's coordinates are of 32 bits
MOST_FOLDED = 4096  # channels of a folded pixel, which one program packs


@functools.lru_cache(maxsize=4096)
def make_plan(
    x_size: tuple, x_strides: tuple, w_size: tuple, w_strides: tuple,
    stride: tuple, padding: tuple, dilation: tuple, groups: int, item: int,
) -> Plan | None:  # fmt: skip
    """The plan for tensors of these sizes and strides; None if the kernel cannot do them.

    They are those of x [N, C, H, W] and of weight [K, C / groups, R, S], strides in elements;
    `item` is the bytes of one.
    """
    (N, C, H, W), (K, channels, R, S) = x_size, w_size
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    unit = 16 // item  # a stride of TMA is a multiple of it
    if 0 in (*x_size, *w_size, P, Q) or K % unit or max(*x_size, K, N * P * Q) > LARGEST:
        return None
    if C < unit and groups == 1 and dilation == (1, 1):
        return folded_plan(x_size, w_size, stride, P, Q, unit)

    strides = pixel_strides(x_size, x_strides, unit)
    if C % unit or strides is None:
        return None
    sn, sh, sw = strides
    if (R, S, *padding) == (1, 1, 0, 0):  # every stride-th pixel, and no others
        x = (N, P, Q, C), (sn, sh * stride[0], sw * stride[1], 1)
        stride = (1, 1)
    elif stride == (1, 1):
        x = (N, H, W, C), (sn, sh, sw, 1)
    else:
        a, b = stride
        rows, columns = H // a, W // b
        last_h = (P - 1) * a - padding[0] + (R - 1) * dilation[0]
        last_w = (Q - 1) * b - padding[1] + (S - 1) * dilation[1]
        # A row that is part of no group of rows would be read as zeros, or from beyond the border.
        odd = (H % a and last_h >= rows * a) or (W % b and last_w >= columns * b)
        if odd or 0 in (rows, columns) or (b > 1 and sw != C):
            return None
        x = (N, rows, a, columns, b * C), (sn, a * sh, sh, b * sw, 1)

    if max(x[1]) * item >= 2**40:  # what a descriptor's strides can be
        return None
    grouped, span, diagonal = None, channels, False
    if groups > 1:
        filters = K // groups
        diagonal = filters < GROUP_BLOCK
        if GROUP_BLOCK % filters if diagonal else filters % GROUP_BLOCK:
            return None
        if diagonal:
            span = GROUP_BLOCK // filters * channels
        if span % unit:  # the second block's channels would not begin at a multiple of 16 bytes
            return None
        grouped = (GROUP_BLOCK if diagonal else filters), span
    w = None if diagonal else filters_as_they_lie(w_size, w_strides, unit)
    packed_w = w is None
    if packed_w:
        w = packed_filters(K, R * S, span, unit)
    geometry = (*stride, *padding, *dilation)
    return Plan((N, P, Q, K), x, None, w, packed_w, (R, S), geometry, grouped)


def pixel_strides(size: tuple, strides: tuple, unit: int) -> tuple[int, int, int] | None:
    """From image to image, row to row and pixel to pixel, as TMA can read [N, C, H, W]; or None.

    That is channels last, at multiples of `unit` elements, and no two of them in one place.
    """
    C = size[1]
    sn, sc, sh, sw = (s if n > 1 else C for n, s in zip(size, strides, strict=True))
    if (C > 1 and sc != 1) or any(s % unit or s < C for s in (sn, sh, sw)):
        return None
    return sn, sh, sw


def filters_as_they_lie(size: tuple, strides: tuple, unit: int) -> tuple[tuple, tuple] | None:
    """Sizes and strides of filters [K, C, R, S] as [taps, K, C], if TMA can read them so."""
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
    """Sizes and strides of filters as [taps, K, channels], after `packed_filter`."""
    depth = cdiv(span, unit) * unit
    return (taps, K, depth), (depth, taps * depth, 1)


def folded_plan(x_size, w_size, fold, P, Q, unit):
    """That of an image of few channels: stride x stride pixels become one."""
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
    """The plan for this call, if the device and the tensors have one."""
    if len(device_of(x).kernels) == 1 or (x.dtype == torch.float32 and precision != "tf32"):
        return None
    plan = make_plan(
        x.shape, x.stride(), weight.shape, weight.stride(),
        tuple(stride), tuple(padding), tuple(dilation), groups, x.element_size(),
    )  # fmt: skip
    if plan is None or (plan.fold is None and x.data_ptr() % 16):
        return None
    # With a pool: places are bytes; and few channels are better off with the portable kernel.
    return None if pool and (plan.fold or plan.size[3] % 16) else plan


@functools.lru_cache(maxsize=4096)
def pixel_box(N: int, P: int, Q: int, pixels: int, pool: bool = False) -> tuple[int, int, int]:
    """Images, rows and columns of a box of so many pixels: the one that sticks out the least.

    Of equals the one with the widest rows: what it shares with its neighbours is the least. To be
    pooled, it has whole 2x2, and eight columns, so that a thread holds all four of each.
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
def fast_tile(plan: Plan, item: int, sms: int, pool: bool = False) -> dict:
    """Of FAST_TILES the one, and the parts, with which the busiest SM should be done first."""
    N, P, Q, K = plan.size
    (taps, _, span), _ = plan.w

    def clocks(tile: dict) -> float:
        box = pixel_box(N, P, Q, tile["BLOCK_M"], pool)
        boxes = cdiv(N, box[0]) * cdiv(P, box[1]) * cdiv(Q, box[2])
        steps = taps * cdiv(span, tile["BLOCK_K"])
        return busiest_sm(tile, boxes * cdiv(K, tile["BLOCK_N"]), steps, N * P * Q * K, item, sms)

    return min(_possible(plan, item, pool), key=clocks)


def choices(plan, x, default: dict, kernels: tuple, fast: Callable[[int], dict]):
    """What `choose_tile` is to choose from, `default` and `kernels`, if there may be a plan too.

    `fast` returns the plan's own choice, for so many SMs. A gradient's plan will do.
    """
    if plan is None:
        return default, kernels
    device = device_of(x)
    if device.modelled:
        default = {x.itemsize: fast(device.sms)}
    return default, (*kernels, "tma")


def _possible(plan: Plan, item: int, pool: bool = False) -> list[dict]:
    """FAST_TILES that can do the plan, each whole and with its sum in parts."""
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
    """Return x [N, C, H, W] as the plan has it: folded, padded, channels last."""
    size, _ = plan.x
    out = torch.empty(size, dtype=x.dtype, device=x.device)
    _, rows, columns, depth = size
    pixels = size[0] * rows * columns
    tile = dict(choose_tile("conv2d_pack", x.dtype, {x.itemsize: PACK_TILE}, M=pixels, N=depth))
    # All channels of a pixel are one program's, whatever the tile says; many are of fewer pixels.
    elements = 4 * tile["BLOCK_M"] * tile["BLOCK_N"]
    tile["BLOCK_N"] = max(16, triton.next_power_of_2(depth))
    tile["BLOCK_M"] = max(1, min(tile["BLOCK_M"], elements // tile["BLOCK_N"]))
    launch(
        conv2d_pack_kernel, (cdiv(pixels, tile["BLOCK_M"]),),
        x, out, *x.shape, rows, columns, depth, *x.stride(), *plan.fold, *padding, **tile,
    )  # fmt: skip
    return out


def packed_filter(plan: Plan, size: tuple, weight: torch.Tensor) -> torch.Tensor:
    """Return weight [K, C, R, S] as the plan has it, of `size` [taps, K, channels]."""
    taps, _, depth = size
    (K, C, R, S), (_, taps_w) = weight.shape, plan.taps
    out = torch.empty(K, taps, depth, dtype=weight.dtype, device=weight.device)
    rows = K * taps
    tile = choose_tile(
        "conv2d_pack_filter", weight.dtype, {weight.itemsize: PACK_FILTER_TILE}, M=rows, N=depth
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
    """Launch the fast kernel, with what has to be packed before and added up after it.

    y [N, K, P, Q] is channels_last. With `place`, where a fused 2x2 max-pool stores which was the
    largest, both are [N, K, P / 2, Q / 2], and place uint8.

    Raises:
        ValueError: a tile that groups or a pool cannot have.
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
    ends = dict(HAS_BIAS=bias is not None, ACTIVATION=activation)
    if parts > 1:  # what follows the whole sum
        ends = dict(HAS_BIAS=False, ACTIVATION=None)
    launch(
        conv2d_tma_kernel, (how.programs,),
        descriptor(x, *plan.x, how.box), descriptor(weight, *how.w, how.w_box), bias,
        descriptor(out, *how.out, how.out_box),
        descriptor(place, *how.out, how.out_box) if pool else None,
        *how.sizes, 0 if bias is None else bias.stride(0), *plan.taps, *plan.geometry,
        **ends, PRECISION=precision, **how.meta,
    )  # fmt: skip
    if parts > 1:
        N, P, Q, K = plan.size
        reduce_parts(out, bias, activation, y, N * P * Q, K, how.out[0][0] // parts * P * Q, parts)


class Layout(NamedTuple):
    """What of a launch follows from its plan and tile: as the launch has it."""

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
        scale, P, Q = 2, P // 2 * 2, Q // 2 * 2  # the last row or column may have no partner
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
