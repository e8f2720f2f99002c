"""The weight gradient by TMA (tensor memory accelerator): each step sums over images of the batch.

    dweight[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w]
                       with h = p*stride - pad + r*dil, and w likewise
    dbias[k]         = sum over n,p,q of dy[n,k,p,q]

TMA fetches boxes of tensors; conv2d_tma.py introduces it. A step of conv2d_weight_grad.py needs
BLOCK_K pixels that follow each other, across rows and images. These are no box. So a step of this
kernel takes BLOCK_K images at one pixel instead:

    dy, one row per image                    x, one row per image, at the pixel that the tap reads

      pixel 0   1   2   3   4                       h, w ->
    n  |  |   |   |###|   |   |                n  | . . . # . . . |
    |  |  |   |   |###|   |   |                |  | . . . # . . . |     # is a pixel's channels
    v  |  |   |   |###|   |   |                v  | . . . # . . . |
              BLOCK_K x BLOCK_M                      BLOCK_K x BLOCK_N

One program owns a tile [BLOCK_M, BLOCK_N] of dweight for one tap (r, s), or a part of its sum. This
has four consequences:

1. A tap is a coordinate. All images have the pixel (h, w) at the same place. So stride, padding and
   dilation only change two numbers in each step.
2. Padding is not multiplied. The rows p for which h is in the image are an interval, the same one
   for all images, and so are the columns q. The loop runs over these pixels alone. For 7x7 images
   and 3x3 filters with padding 1 it skips 18% of the products: 1 - ((6 + 7 + 6) / (3 * 7))^2.
3. A box can stick out of the batch, and of nothing else that is summed. The batch should be a
   multiple of BLOCK_K. A box of pixels would cover 64 pixels for the 49 of a 7x7 image.
4. Both operands have the summed index first. Tensor cores read 16-bit operands transposed from
   shared memory, but not 32-bit ones. So float32 stays with conv2d_weight_grad.py.

What limits it: tensor cores. The FLOPs and bytes are those of conv2d_weight_grad.py, less the
padding. With few channels a tile of one tap is too small to keep tensor cores busy. Then it has
several taps as columns: `make_plan` explains windows, and `as_neighbours` pixels as columns.

Read first: conv2d_weight_grad.py, conv2d_tma.py.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilelab.kernels import conv2d_tma
from tilelab.kernels._geometry import even_stride
from tilelab.kernels._launch import Device, descriptor, device_of, launch
from tilelab.kernels._partial_sums import sum_partials
from tilelab.kernels._tile_facts import Work, fastest_tile
from tilelab.kernels._tiles import cdiv, persistent, tma_tile

_fast = functools.partial(tma_tile, SPLIT_K=1)  # filters x columns x images

# The keys are bytes per element. Compiled for sm_90 (Hopper) with triton 3.6.0 and 3.9.0, no tile
# spills. wgmma, the instruction of Hopper's tensor cores, is as wide as the tile, and reads both
# operands from shared memory. Loads begin at least one step ahead.
FAST_TILES = {
    2: [
        # This is the largest tile that fits the registers. It is stored in quarters: a quarter of a
        # float32 result needs 32 KiB of shared memory, which leaves room for a fourth stage.
        _fast(m=128, n=256, k=64, warps=8, stages=4, SUBTILES=4, per_sm=1),
        # Two of these programs share an SM: one multiplies while the other stores.
        _fast(m=128, n=128, k=64, warps=8, stages=3, SUBTILES=4, per_sm=2),
        # These fit 64 filters or 64 channels, as in the first stage of a ResNet, without padding.
        _fast(m=64, n=256, k=64, warps=4, stages=2, SUBTILES=4, per_sm=2),
        _fast(m=64, n=128, k=64, warps=4, stages=4, SUBTILES=2, per_sm=2),
        _fast(m=128, n=64, k=64, warps=8, stages=4, SUBTILES=2, per_sm=2),
        _fast(m=64, n=64, k=64, warps=4, stages=4, SUBTILES=1, per_sm=2),
        # These are for batches of 32: half the images per step, and about twice the stages.
        _fast(m=128, n=256, k=32, warps=8, stages=7, SUBTILES=4, per_sm=1),
        _fast(m=128, n=128, k=32, warps=8, stages=6, SUBTILES=4, per_sm=2),
        _fast(m=64, n=256, k=32, warps=4, stages=4, SUBTILES=4, per_sm=2),
        _fast(m=64, n=128, k=32, warps=4, stages=7, SUBTILES=2, per_sm=2),
        _fast(m=64, n=64, k=32, warps=4, stages=8, SUBTILES=1, per_sm=2),
    ],
}


@triton.jit
def _inside(first, size, windows, STRIDE: tl.constexpr):
    """Return begin and end of the windows that have their tap inside [0, size).

    Window number i of `windows` has it at first + i * STRIDE.
    """
    begin = tl.minimum(tl.cdiv(tl.maximum(-first, 0), STRIDE), windows)
    end = tl.minimum(tl.cdiv(tl.maximum(size - first, 0), STRIDE), windows)
    return begin, tl.maximum(begin, end)


@triton.jit
def _share(steps, part, parts):
    """Return the first step of a part, and the one after its last.

    Parts differ by at most one step.
    """
    each = steps // parts
    more = steps % parts
    return each * part + tl.minimum(more, part), each * (part + 1) + tl.minimum(more, part + 1)


@triton.jit
def _halves(tile):
    """Return the left and the right half of the columns of a tile.

    A thread holds elements of both halves, so none has to move to another thread (sm_90).
    """
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _store_columns(dw, tile, part, k, row, c, AT: tl.constexpr, BOX_C: tl.constexpr):
    """Store `tile`: the columns from AT on of the tile of dw that begins at (k, row, c).

    BOX_C of those columns are one row of dw.
    """
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    ROWS: tl.constexpr = (N + BOX_C - 1) // BOX_C
    box = tl.reshape(tile.to(dw.dtype), (1, M, ROWS, N // ROWS))
    dw.store([part, k, row + AT // BOX_C, c + AT % BOX_C], box)


@triton.jit
def _diagonal(tile, right):
    """Return the upper half of the rows of `tile`, plus the lower half of those of `right`."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    both = tl.where((tl.arange(0, M) < M // 2)[:, None], tile, right)
    return tl.sum(tl.reshape(both, (2, M // 2, N)), axis=0)


# Why not pixels that follow each other? conv2d_weight_grad.py then makes addresses and masks in all
# threads. Compiled for sm_90 with triton 3.9.0, a step of 128x256x64 has 1,095 instructions in each
# of 8 warps (32 threads each). An SM issues 4 instructions per clock and does 4,096 FLOPs:
#
#     instructions    8 * 1,095 / 4 = 2,190 clocks
#     products        2 * 128 * 256 * 64 / 4,096 = 1,024 clocks
#
# This is what triton 3.6.0 and 3.9.0 compile the kernel below to, for sm_90 and a 3x3 layer in
# bfloat16. It was not run.
#
#     tile of 128x256x64            registers     shared memory    instructions
#                                   per thread    per program      per step
#     whole sum                     154, 154      208 KiB          107, 105
#     sum in parts                  161, 163      224 KiB          110, 107
#     in parts, DY_PIXELS = 2       209, 178      208 KiB          107, 105
#
# WINDOWS costs more: several rows of taps pass through registers on their way to the tensor cores.
# A step has up to 152 instructions, and asks for the next box of x after its product. Only another
# program of the SM can use the time until the box arrives.


@triton.jit
def conv2d_weight_grad_tma_kernel(
    dy, x, dw, db_ptr, N, P, Q, K, H, W, ROWS, SPAN, parts,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    DY_PIXELS: tl.constexpr, X_STEP: tl.constexpr, X_FIRST: tl.constexpr,
    WINDOWS: tl.constexpr, HAS_BIAS: tl.constexpr, BOX_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of dweight, or a part of its sum, in each of its turns.

    dy [P, Q, N, K], x and dw [parts, K, ROWS, SPAN] are descriptors of what `Plan` says. With
    HAS_BIAS some tiles are of the sum of dy instead, db_ptr [parts, K].
    """
    # What a tile covers in dw [.., K, ROWS, SPAN]:
    #     usually       one row, which is one tap (r, s). Its columns are channels
    #     WINDOWS       BOX_R rows, each of which is a row of taps r. Its BOX_C columns are (s, c)
    #     X_STEP > 0    one row, which is a row of taps r. Its columns are (s, c). They are also
    #                   pixels of x: a box begins at X_FIRST + q * X_STEP in a row of W * C numbers.
    #                   A box of dy has DY_PIXELS pixels
    BOX_R: tl.constexpr = BLOCK_N // BOX_C
    blocks_c = tl.cdiv(SPAN, BOX_C)
    blocks_k = tl.cdiv(K, BLOCK_M)
    tiles = tl.cdiv(ROWS, BOX_R) * blocks_k * blocks_c
    jobs = tiles
    if HAS_BIAS:
        jobs += blocks_k

    # Parts are numbered outermost. So programs that run at the same time read the same pixels, for
    # other taps and filters, and the L2 cache has them.
    for work in tl.range(tl.program_id(0), jobs * parts, tl.num_programs(0)):
        part = work // jobs
        job = work % jobs
        if job < tiles:
            c = job % blocks_c * BOX_C
            k = job // blocks_c % blocks_k * BLOCK_M
            row = job // blocks_c // blocks_k * BOX_R
            tap = row
            if WINDOWS:  # Windows have no padding: every pixel (p, q) has all of its taps.
                tap = 0
            h = tap // S * DIL_H - PAD_H
            w = tap % S * DIL_W - PAD_W
            # torch multiplies dy by the padding, and 0 times an infinity is NaN. This kernel leaves
            # those products out. With X_STEP > 0 it does multiply zeros to the left and right.
            p0, p1 = _inside(h, H, P, STRIDE_H)
            q0, q1 = _inside(w, W, Q, STRIDE_W)

            # These are the pixel and the images of the first step. The next steps count up from
            # them without an `if`: behind one, Triton would not begin loads a step ahead.
            columns = tl.maximum(q1 - q0, 1)
            pixels = tl.maximum(p1 - p0, 1) * columns
            steps = (p1 - p0) * (q1 - q0) * tl.cdiv(N, BLOCK_K)
            first, last = _share(steps, part, parts)
            n = first // pixels * BLOCK_K
            p = p0 + first % pixels // columns
            q = q0 + first % columns
            acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            for _ in range(first, last):
                # Triton leaves the first operand in shared memory only if its box is a matrix. 1s
                # in front do not matter, so dy is [P, Q, N, K]. The box of x may have any shape.
                dy_tile = tl.reshape(dy.load([p, q, n, k]), (BLOCK_K, BLOCK_M))
                if X_STEP > 0:
                    x_box = x.load([n, p * STRIDE_H + h, 0, 0, q * X_STEP + X_FIRST])
                else:
                    x_box = x.load([n, p * STRIDE_H + h, row - tap, q * STRIDE_W + w, c])
                x_tile = tl.reshape(x_box, (BLOCK_K, BLOCK_N))
                acc = tl.dot(dy_tile.T, x_tile, acc)  # [BLOCK_M, BLOCK_N]
                q += 1
                p += (q == q1).to(tl.int32)
                q = tl.where(q == q1, q0, q)
                n += tl.where(p == p1, BLOCK_K, 0)
                p = tl.where(p == p1, p0, p)

            WIDTH: tl.constexpr = BLOCK_N // SUBTILES
            if SUBTILES == 1:
                _store_columns(dw, acc, part, k, row, c, 0, BOX_C)
            else:
                left, right = _halves(acc)
                if SUBTILES == 2:
                    _store_columns(dw, left, part, k, row, c, 0, BOX_C)
                    _store_columns(dw, right, part, k, row, c, WIDTH, BOX_C)
                else:
                    first_quarter, second_quarter = _halves(left)
                    third_quarter, last_quarter = _halves(right)
                    if DY_PIXELS == 2:  # Each quarter belongs to one pixel of x.
                        first_quarter = _diagonal(first_quarter, second_quarter)
                        second_quarter = _diagonal(second_quarter, third_quarter)
                        third_quarter = _diagonal(third_quarter, last_quarter)
                    _store_columns(dw, first_quarter, part, k, row, c, 0, BOX_C)
                    _store_columns(dw, second_quarter, part, k, row, c, WIDTH, BOX_C)
                    _store_columns(dw, third_quarter, part, k, row, c, 2 * WIDTH, BOX_C)
                    if DY_PIXELS == 1:
                        _store_columns(dw, last_quarter, part, k, row, c, 3 * WIDTH, BOX_C)
        # A tile of the bias gradient is the sum of dy for one block of filters. dy is in the cache.
        elif HAS_BIAS:
            k = (job - tiles) * BLOCK_M
            first, last = _share(P * Q * tl.cdiv(N, BLOCK_K), part, parts)
            total = tl.full((BLOCK_K, BLOCK_M), 0.0, tl.float32)
            # Triton starts loads ahead of a loop without a product only if num_stages says so.
            for step in tl.range(first, last, num_stages=4):
                p, q, n = step // Q % P, step % Q, step // (P * Q) * BLOCK_K
                dy_tile = tl.reshape(dy.load([p, q, n, k]), (BLOCK_K, BLOCK_M))
                total += dy_tile.to(tl.float32)
            offs_k = k + tl.arange(0, BLOCK_M // DY_PIXELS)
            db = tl.sum(total, axis=0)
            if DY_PIXELS == 2:  # Both pixels have the same filters.
                db = tl.sum(tl.reshape(db, (2, BLOCK_M // 2)), axis=0)
            db = db.to(db_ptr.dtype.element_ty)
            tl.store(db_ptr + part * K + offs_k, db, mask=offs_k < K)


# --- Which tensors, which tile --------------------------------------------------------------------


class Plan(NamedTuple):
    """How the kernel computes a weight gradient: all that does not depend on the data.

    All strides are in elements.

    Attributes:
        size: (N, P, Q, K). A step sums over BLOCK_K of the N images.
        image: H and W, as the kernel counts pixels of x.
        dy: sizes and strides of dy as [P, Q, N, K].
        x: sizes and strides of x as [N, H, 1, W, C], or of its windows as [N, P, R, Q, S*C].
        dw: ROWS and SPAN of dweight as [K, ROWS, SPAN]: R*S and C, or R and S*C if a row of dw is
            a row of taps.
        taps_w: S, or 1 if a row of dw is a row of taps.
        geometry: stride, padding and dilation, as the kernel counts them.
        windows: whether x is seen as windows.
        folded: the plan by which x is packed first; None if x is read as it is.
        neighbours: DY_PIXELS, X_STEP and X_FIRST of the kernel. X_STEP is 0 unless pixels are
            columns (`as_neighbours`).
    """

    size: tuple[int, int, int, int]
    image: tuple[int, int]
    dy: tuple[tuple, tuple]
    x: tuple[tuple, tuple]
    dw: tuple[int, int]
    taps_w: int
    geometry: tuple[int, ...]
    windows: bool
    folded: conv2d_tma.Plan | None
    neighbours: tuple[int, int, int] = (1, 0, 0)


UNIT = 8  # TMA's strides are multiples of 16 bytes, which are 8 elements.
FEW_IMAGES = 16  # With fewer, more than half of a step of 32 images would be zeros.
FEW_CHANNELS = 64  # With fewer, x is seen as windows if that is possible.
PLAIN = (1, 1, 0, 0, 1, 1)  # With this stride, padding and dilation, tap (0, 0) reads pixel (p, q).


@functools.lru_cache(maxsize=4096)
def make_plan(
    x_size: tuple, x_strides: tuple, dy_size: tuple, dy_strides: tuple, taps: tuple,
    stride: tuple, padding: tuple, dilation: tuple, groups: int,
) -> Plan | None:  # fmt: skip
    """Return the plan for tensors of these sizes and strides, or None if the kernel cannot do them.

    They are those of x [N, C, H, W] and of dy [N, K, P, Q], of 16-bit elements. The kernel has no
    groups and needs filters in multiples of 8. It needs at least 16 images, or 16 pixels if filters
    are 1x1. TMA must be able to read the tensors.
    """
    (N, C, H, W), (_, K, P, Q), (R, S) = x_size, dy_size, taps
    if 0 in (*x_size, *dy_size) or K % UNIT or groups > 1:
        return None
    geometry, folded = (*stride, *padding, *dilation), None
    # Images of fewer than 8 channels are packed first, with their padding, as in conv2d_tma.py.
    if C < UNIT:
        if dilation == (1, 1):
            folded = conv2d_tma.folded_plan(x_size, (K, C, R, S), stride, P, Q, UNIT)
        if folded is None:
            return None
        (_, H, W, C), strides = folded.x[0], folded.x[1][:3]
        (R, S), geometry = folded.taps, folded.geometry
    else:
        strides = conv2d_tma.pixel_strides(x_size, x_strides, UNIT)
    dy_strides = conv2d_tma.pixel_strides(dy_size, dy_strides, UNIT)
    if C % UNIT or strides is None or dy_strides is None:
        return None
    (sn, sh, sw), (dn, dp, dq) = strides, dy_strides

    # A 1x1 filter needs no images: all N*P*Q pixels are a batch of images of one pixel.
    if (R, S) == (1, 1) and geometry[:4] == PLAIN[:4]:
        stride_x, stride_dy = even_stride((N, H, W), strides), even_stride((N, P, Q), dy_strides)
        if stride_x and stride_dy:
            N, H, W, P, Q = N * P * Q, 1, 1, 1, 1
            sn, dn, dp, dq = stride_x, stride_dy, K, K
    # TMA's coordinates have 32 bits. Its strides are below 2**40 bytes, which are 2**39 elements.
    most, far = max(C, H, W, K, N * P * Q), max(sn, sh, sw, dn, dp, dq)
    if N < FEW_IMAGES or most > conv2d_tma.LARGEST or far >= 2**39:
        return None
    dy = (P, Q, N, K), (dp, dq, dn, 1)
    a, b, pad_h, pad_w, dil_h, dil_w = geometry
    # With few channels, say 16, a tile of one tap would have 16 columns of 256. But without padding
    # and with dilation 1 in a row, a window of x is R pieces of memory with S*C numbers each. The
    # strides of a descriptor may overlap. So x can be seen as [N, P, R, Q, S*C]. This is the matrix
    # of im2col.py, which nobody writes. A tile then has several rows of taps. For R = 1, S*C = 4
    # and windows that are C = 1 apart:
    #
    #     x  | a b c d e f g ... |       window 0   a b c d
    #                                    window 1     b c d e
    #                                    window 2       c d e f
    if C < FEW_CHANNELS and R * S > 1 and (sw, pad_h, pad_w, dil_w) == (C, 0, 0, 1):
        x = (N, P, R, Q, S * C), (sn, a * sh, dil_h * sh, b * sw, 1)
        return Plan((N, P, Q, K), (P, Q), dy, x, (R, S * C), 1, PLAIN, True, folded)
    x = (N, H, 1, W, C), (sn, sh, sh, sw, 1)
    return Plan((N, P, Q, K), (H, W), dy, x, (R * S, C), S, geometry, False, folded)


# Where there are no windows, as with padding, pixels side by side can be columns. This needs stride
# and dilation 1 in a row, and a row of taps that fits the columns, S*C <= BLOCK_N. For three taps
# and 256 columns these are up to 80 channels.
#
# Take 64 filters and 64 channels. A tile of one tap is 64x64. For each byte from the L2 cache it
# does 32 FLOPs: 2*64*64 for (64 + 64) * 2 bytes. _cost_model.py estimates 48 bytes per clock from
# the cache for each SM. These are enough for 1,536 FLOPs, and tensor cores can do 4,096.
#
# In memory a row of x is W*C numbers: 256 of them are four pixels side by side. So see x as
# [N, H, 1, 1, W*C], and dy as [P, Q/2, N, 2*K], two pixels at a time. Then a step of 128x256 has
# eight products of 64x64. These are for two pixels q, q + 1 of dy and taps a, b, c with padding 1:
#
#                   pixels of x, 64 channels each
#                  q-1    q     q+1   q+2
#               +-----+-----+-----+-----+
#     dy   q    |  a  |  b  |  c  |     |  64
#          q+1  |     |  a  |  b  |  c  |  64
#               +-----+-----+-----+-----+
#                  64    64    64    64
#
# Six of the products are wanted. The gradient of tap a is the sum of both blocks a: `_diagonal`
# adds them when the tile is stored. The two blocks without a letter are wasted. The tile does 85
# FLOPs per byte, 64 of them wanted. x and dy are read once for each row of taps: R times, not R*S.
# The padding to the left and right is columns of zeros, since TMA reads zeros past the border.
#
# With 128 filters, or if Q is odd, a tile has one pixel of dy, and three of its four blocks are
# wanted. The size of the tile decides whether pixels are columns.


def as_neighbours(plan: Plan, tile: dict) -> Plan:
    """Return the plan for a tile whose columns hold a row of taps; the same plan if they do not.

    Such a tile has two pixels of dy if 2*K fills its rows and 4*C its columns. Then each of the
    quarters that are stored is one pixel of x. Otherwise it has one pixel of dy.
    """
    N, P, Q, K = plan.size
    (rows, C), S = plan.dw, plan.taps_w
    a, b, pad_h, pad_w, dil_h, dil_w = plan.geometry
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    (_, H, _, W, _), (sn, sh, _, sw, _) = plan.x
    dp, dq, dn, _ = plan.dy[1]
    if S == 1 or S * C > n or (b, dil_w, sw) != (1, 1, C) or W * C > conv2d_tma.LARGEST:
        return plan
    two = (2 * K, 4 * C, 4) == (m, n, tile["SUBTILES"]) and S < 4 and Q % 2 == 0 and dq == K
    pixels = 1 + two
    return plan._replace(
        size=(N, P, Q // pixels, K),
        image=(H, Q // pixels),
        dy=((P, Q // pixels, N, pixels * K), (dp, pixels * dq, dn, 1)),
        x=((N, H, 1, 1, W * C), (sn, sh, sh, sh, 1)),
        dw=(rows // S, S * C),
        taps_w=1,
        geometry=(a, 1, pad_h, 0, dil_h, 1),
        neighbours=(pixels, pixels * C, -pad_w * C),
    )


def plan_for(x, dy, taps, stride, padding, dilation, groups) -> Plan | None:
    """Return the plan for this call, or None if the device or the tensors do not allow one."""
    if len(device_of(x).kernels) == 1 or x.element_size() != 2 or dy.data_ptr() % 16:
        return None
    plan = make_plan(
        x.shape, x.stride(), dy.shape, dy.stride(), taps,
        tuple(stride), tuple(padding), tuple(dilation), groups,
    )  # fmt: skip
    return None if plan is None or (plan.folded is None and x.data_ptr() % 16) else plan


def pixels_inside(first: int, size: int, windows: int, stride: int) -> int:
    """Return how many windows have their tap inside the image: `_inside` on the host."""
    begin, end = (min(cdiv(max(x, 0), stride), windows) for x in (-first, size - first))
    return max(end - begin, 0)


@functools.lru_cache(maxsize=4096)
def fast_tile(plan: Plan, device: Device, has_bias: bool = False) -> dict | None:
    """Return the tile of FAST_TILES, with its parts, that is fastest by the model."""
    moved = 2 * (math.prod(plan.image) + math.prod(plan.size))

    def work(tile: dict) -> Iterable[tuple[dict, Work, int]]:
        if "kernel" not in tile:  # It is for the kernel that loads through pointers.
            return
        seen = as_neighbours(plan, tile)
        N, _, _, K = seen.size
        rows, span = seen.dw
        box_r, box_c = _box(seen, tile)
        blocks = cdiv(rows, box_r) * cdiv(span, box_c) + has_bias  # The sum of dy is one more.
        tiles = blocks * cdiv(K, tile["BLOCK_M"])
        steps = _pixels(seen) * cdiv(N, tile["BLOCK_K"])
        # Several rows of taps pass through registers, and no load begins a step ahead.
        its_work = Work(tiles, steps, K * rows * span, moved, ahead=box_r == 1)
        # Try numbers of parts that fill the GPU 1 to 8 times, and powers of two. A part has at
        # least eight steps.
        counts = {turns * device.sms // tiles for turns in range(1, 9)}
        counts |= {1 << i for i in range(11)}
        for parts in sorted(counts - {0}):
            if parts == 1 or parts * 8 <= steps:
                yield tile | dict(SPLIT_K=parts), its_work, parts

    return fastest_tile(device, "conv2d_weight_grad", "fp16", work)


def _pixels(plan: Plan) -> int:
    """Return how many pixels (p, q) a tile sums over, on average over the taps."""
    _, P, Q, _ = plan.size
    if plan.windows:
        return P * Q
    a, b, pad_h, pad_w, dil_h, dil_w = plan.geometry
    rows = plan.dw[0]
    high, wide = (
        sum(pixels_inside(tap * dil - pad, size, windows, step) for tap in range(taps))
        for taps, dil, pad, size, windows, step in (
            (rows // plan.taps_w, dil_h, pad_h, plan.image[0], P, a),
            (plan.taps_w, dil_w, pad_w, plan.image[1], Q, b),
        )
    )
    return cdiv(high * wide, rows)


def _box(plan: Plan, tile: dict) -> tuple[int, int]:
    """Return how many rows and columns of dweight [K, ROWS, SPAN] the columns of a tile are."""
    n = tile["BLOCK_N"]
    columns = min(n, max(16, triton.next_power_of_2(plan.dw[1]))) if plan.windows else n
    return n // columns, columns


class _Layout(NamedTuple):
    """What a launch takes that depends only on its plan and tile."""

    programs: int
    dy: tuple[tuple, tuple, list]  # sizes, strides and a box
    x: tuple[tuple, tuple, list]
    dw: tuple[tuple, tuple, list]
    sizes: tuple[int, ...]
    meta: dict


@functools.lru_cache(maxsize=4096)
def _layout(plan: Plan, items: tuple, sms: int, has_bias: bool) -> _Layout:
    tile = dict(items)
    m, n, k, parts, subtiles = (
        tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "SUBTILES")
    )
    if subtiles not in (1, 2, 4):
        raise ValueError(f"a tile is stored as 1, 2 or 4 of its SUBTILES, got {tile}")
    plan = as_neighbours(plan, tile)
    N, P, Q, K = plan.size
    rows, span = plan.dw
    box_r, box_c = _box(plan, tile)
    blocks_k = cdiv(K, m)
    work = (cdiv(rows, box_r) * cdiv(span, box_c) + has_bias) * blocks_k * parts
    stored_rows = max(1, box_r // subtiles)
    pixels, x_step, x_first = plan.neighbours
    dw_box = [1, m // pixels, stored_rows, n // subtiles // stored_rows]
    return _Layout(
        persistent(tile, work, sms),
        (*plan.dy, [1, 1, k, m]),
        (*plan.x, [k, 1, box_r, 1, box_c]),
        ((parts, K, rows, span), (K * rows * span, rows * span, span, 1), dw_box),
        (N, P, Q, K, *plan.image, rows, span, parts, plan.taps_w, *plan.geometry),
        dict(
            DY_PIXELS=pixels, X_STEP=x_step, X_FIRST=x_first,
            WINDOWS=plan.windows, HAS_BIAS=has_bias, BOX_C=box_c, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k,
            SUBTILES=subtiles, num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        ),
    )  # fmt: skip


def conv2d_weight_grad_tma(plan, x, dy, dweight, dbias, tile, padding):
    """Launch the fast kernel, after what packs its input, and before what adds up its results.

    With parts, each has a float32 result of its own, and `sum_partials` adds these up in order.

    Raises:
        ValueError: the tile has other SUBTILES than 1, 2 or 4.
    """
    parts = tile["SPLIT_K"]
    how = _layout(plan, tuple(tile.items()), device_of(x).sms, dbias is not None)
    if plan.folded is not None:
        x = conv2d_tma.packed_image(plan.folded, x, padding)
    out = dweight
    if plan.folded is not None or not dweight.is_contiguous(memory_format=torch.channels_last):
        out = torch.empty(plan.size[3], *plan.dw, dtype=x.dtype, device=x.device)
    partials, sums = out, dbias
    if parts > 1:
        partials = torch.empty(parts, out.numel(), dtype=torch.float32, device=x.device)
        if dbias is not None:
            sums = torch.empty(parts, dbias.numel(), dtype=torch.float32, device=x.device)
    launch(
        conv2d_weight_grad_tma_kernel, (how.programs,),
        descriptor(dy, *how.dy), descriptor(x, *how.x), descriptor(partials, *how.dw), sums,
        *how.sizes, **how.meta,
    )  # fmt: skip
    if parts > 1:
        sum_partials(partials, out, *((sums, dbias) if dbias is not None else ()))
    if out is not dweight:
        dweight.copy_(_as_filters(plan, out, dweight.shape))


def _as_filters(plan, out, size):
    """Return dweight as [K, C, R, S], which is `size`, from the kernel's [K, ROWS, SPAN]."""
    K, C, R, S = size
    if plan.folded is None:
        return out.view(K, R, S, C).permute(0, 3, 1, 2)
    (a, b), (rows, columns) = plan.folded.fold, plan.folded.taps
    taps = out.view(K, rows, columns, -1)[..., : a * b * C].unflatten(3, (a, b, C))
    return taps.permute(0, 5, 1, 3, 2, 4).reshape(K, C, rows * a, columns * b)[:, :, :R, :S]
