"""The weight gradient by TMA, the tensor memory accelerator: the batch is what is summed.

A step of conv2d_weight_grad.py loads BLOCK_K pixels that lie side by side, of which each tap wants
others: all threads make addresses and masks, 1,095 instructions a step of 128x256x64, in which
the tensor cores are busy for 1,024 clocks. Since Hopper (sm_90) a GPU has a unit to make them
(conv2d_tma.py introduces it), if what a step needs is a box of a tensor. So what a step sums up are
not the pixels of an image but the images of the batch, at one pixel:

    dy, one row an image                      x, one image a row, at the pixel that the tap reads

      pixel 0   1   2   3   4                       h, w ->
    n  |  |   |   |###|   |   |                n  | . . . # . . . |
    |  |  |   |   |###|   |   |                |  | . . . # . . . |     # 64 channels, or 256
    v  |  |   |   |###|   |   |                v  | . . . # . . . |
              BLOCK_K x BLOCK_M                      BLOCK_K x BLOCK_N

    dweight[k, (r,s), c] += sum over n of dy[n, (p,q), k] * x[n, (h,w), c]
                                          one step: a product [BLOCK_M, BLOCK_K] x [.., BLOCK_N]

What follows from it:

1. A tap is a coordinate. One tile of dweight is of one tap (r, s), and the pixel (h, w) is
   p*stride - pad + r*dil, and w alike: any stride, padding or dilation is one addition.
2. Padding is not multiplied. All images have their borders at the same place, so the pixels p
   whose tap is inside the image are an interval, and the loop runs over it alone. Of 7x7 images
   and 3x3 taps with padding 1 that saves 18% of the products: a corner tap has 36 pixels of 49.
3. Nothing sticks out but of the batch: it should be a multiple of BLOCK_K. A box of pixels would
   cover 64 for the 49 of such an image.
4. Both operands lie with the summed index outermost, and tensor cores take 16-bit operands so,
   transposed, out of shared memory. The first one only if its box is a plain matrix, which 1s in
   front do not change: dy is seen as [P, Q, N, K], and of x the box may be of any rank.
5. 32-bit operands they do not take transposed: float32 stays with the kernel there.

A filter of one pixel needs no images: all N*P*Q pixels are a batch of images of one pixel.

Few channels. 16 channels are no 256 columns. But without padding the window of an output pixel is
R pieces of memory, each of S*C numbers, and a descriptor's strides are free to overlap: seen as
[N, P, R, Q, S*C], with strides (H*W*C, stride*W*C, dil*W*C, stride*C, 1), x is the im2col matrix,
which nobody writes. A tile then has several rows of taps:

      x  | a b c d e f g ... |       window 0   a b c d        R = 1, S*C = 4, a step of C = 1:
                                     window 1     b c d e      what is a matrix for TMA overlaps
                                     window 2       c d e f    in memory

Images of fewer than 8 channels are packed first, padding and all, as in conv2d_tma.py.

With padding, and up to 80 channels of three taps, pixels side by side are columns. Of 64 filters
and 64 channels a tile of one tap is 64x64, for which the L2 cache has to hand out a byte for each
32 FLOPs, and it can for a third of what tensor cores do, by estimate. But in memory the pixels
of a row of x are one row of W*C numbers, of which 256 are four pixels, and the taps of a row are
next to each other. If x is seen as [N, H, 1, 1, W*C] a box of it, and one of two pixels of dy if
that is seen as [P, Q/2, N, 2*K], have six products of 64x64 that are wanted, of eight:

                  pixels of x, 64 channels each
                 q-1    q     q+1   q+2
              +-----+-----+-----+-----+           dweight[a] is the sum of two blocks that are
    dy   q    |  a  |  b  |  c  |     |  64       diagonal neighbours: `_diagonal`. The one below
         q+1  |     |  a  |  b  |  c  |  64       on the left and the one above on the right are
              +-----+-----+-----+-----+           wasted. 85 FLOPs a byte, and x and dy are read
                 64    64    64    64             R times, not R*S. Padding is columns of zeros

With 128 filters, or where Q is odd, a tile has one pixel of dy, and three blocks of four. Whether
pixels are columns follows from the tile's size: `as_neighbours`.

The sum is long and the result small: `parts` programs share a tile's sum, each with a float32
result of its own, and sum_partials adds those up in order. `fast_tile` weighs how many. Parts are
numbered outermost, so that programs which run at one time read the same pixels, and the L2 cache
has them for all taps. The bias gradient is one more tile for each block of filters, whose
products are left out: dy is in the cache for it, too.

What triton 3.6.0 and 3.9.0 make of it for sm_90, bfloat16, a 3x3 layer; not run. Where a tile has
several rows of taps, x goes through registers on its way to the tensor cores: up to 152, and the
next box of x is asked for when the product is done. An SM's other program has to fill the time.

                    registers   shared memory   instructions a step
    128x256x64      154, 154      208 KiB          107, 105
    in parts        161, 163      224 KiB          110, 107
    two pixels      209, 178      208 KiB          107, 105     in parts

What it does not do: batches under 16 (most of a step would be zeros), float32, groups, filters
that are no multiple of 8, and what TMA cannot read as it is. Those take the kernel there.

Non-finite numbers: where a tap is in the padding torch multiplies by zero, and makes NaN of an
infinity in dy; here it is left out, but not to the left and right where pixels are columns.

Read first: conv2d_weight_grad.py, conv2d_tma.py.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilelab.kernels import conv2d_tma
from tilelab.kernels._cost_model import busiest_sm
from tilelab.kernels._geometry import even_stride
from tilelab.kernels._launch import descriptor, device_of, launch
from tilelab.kernels._partial_sums import sum_partials
from tilelab.kernels._tiles import cdiv, persistent, tma_tile

_fast = functools.partial(tma_tile, SPLIT_K=1)  # filters x columns x images

# By bytes an element. Compiled for sm_90 with triton 3.6.0 and 3.9.0: no spills, wgmma as wide as
# the tile, both operands from shared memory, loads begun a step ahead or more.
FAST_TILES = {
    2: [
        # the most reuse that the registers hold. The float32 result of a part leaves in quarters,
        # through 32 KiB, which leaves room for a fourth stage
        _fast(m=128, n=256, k=64, warps=8, stages=4, SUBTILES=4, per_sm=1),
        # two programs an SM: one multiplies while the other stores
        _fast(m=128, n=128, k=64, warps=8, stages=3, SUBTILES=4, per_sm=2),
        # 64 filters or 64 channels (the first stage of a ResNet): nothing of the tile is padding
        _fast(m=64, n=256, k=64, warps=4, stages=2, SUBTILES=4, per_sm=2),
        _fast(m=64, n=128, k=64, warps=4, stages=4, SUBTILES=2, per_sm=2),
        _fast(m=128, n=64, k=64, warps=8, stages=4, SUBTILES=2, per_sm=2),
        _fast(m=64, n=64, k=64, warps=4, stages=4, SUBTILES=1, per_sm=2),
        # batches of 32: half the images a step, and about twice the stages
        _fast(m=128, n=256, k=32, warps=8, stages=7, SUBTILES=4, per_sm=1),
        _fast(m=128, n=128, k=32, warps=8, stages=6, SUBTILES=4, per_sm=2),
        _fast(m=64, n=256, k=32, warps=4, stages=4, SUBTILES=4, per_sm=2),
        _fast(m=64, n=128, k=32, warps=4, stages=7, SUBTILES=2, per_sm=2),
        _fast(m=64, n=64, k=32, warps=4, stages=8, SUBTILES=1, per_sm=2),
    ],
}


@triton.jit
def _inside(first, size, windows, STRIDE: tl.constexpr):
    """Which of `windows` windows have a tap inside [0, size), if window 0 has it at `first`."""
    begin = tl.minimum(tl.cdiv(tl.maximum(-first, 0), STRIDE), windows)
    end = tl.minimum(tl.cdiv(tl.maximum(size - first, 0), STRIDE), windows)
    return begin, tl.maximum(begin, end)


@triton.jit
def _share(steps, part, parts):
    """The steps of one part, from and to: as many as of the others, or one more."""
    each = steps // parts
    more = steps % parts
    return each * part + tl.minimum(more, part), each * (part + 1) + tl.minimum(more, part + 1)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns: a thread has its own of both."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _store_columns(dw, tile, part, k, row, c, AT: tl.constexpr, BOX_C: tl.constexpr):
    """Store a tile that begins at column AT of the whole one, of which BOX_C are a row of dw."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    ROWS: tl.constexpr = (N + BOX_C - 1) // BOX_C
    box = tl.reshape(tile.to(dw.dtype), (1, M, ROWS, N // ROWS))
    dw.store([part, k, row + AT // BOX_C, c + AT % BOX_C], box)


@triton.jit
def _diagonal(tile, right):
    """The upper rows of a tile, and added to them the lower ones of the tile to its right."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    both = tl.where((tl.arange(0, M) < M // 2)[:, None], tile, right)
    return tl.sum(tl.reshape(both, (2, M // 2, N)), axis=0)


@triton.jit
def conv2d_weight_grad_tma_kernel(
    dy, x, dw, db_ptr, N, P, Q, K, H, W, ROWS, SPAN, parts,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    DY_PIXELS: tl.constexpr, X_STEP: tl.constexpr, X_FIRST: tl.constexpr,
    WINDOWS: tl.constexpr, HAS_BIAS: tl.constexpr, BOX_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """One program computes every tile of dweight, or part of its sum, whose number is its own.

    dy [P, Q, N, K], x and dw [parts, K, ROWS, SPAN] are descriptors. A row of dw is one tap, its
    columns are channels; where WINDOWS, it is a row of taps, and its columns are (s, c). So it is
    where X_STEP is not 0: then pixels are columns, of x from X_FIRST + q * X_STEP on, and there are
    DY_PIXELS of dy.
    """
    BOX_R: tl.constexpr = BLOCK_N // BOX_C  # a tile's columns are so many rows of dw
    blocks_c = tl.cdiv(SPAN, BOX_C)
    blocks_k = tl.cdiv(K, BLOCK_M)
    tiles = tl.cdiv(ROWS, BOX_R) * blocks_k * blocks_c
    jobs = tiles
    if HAS_BIAS:
        jobs += blocks_k

    for work in tl.range(tl.program_id(0), jobs * parts, tl.num_programs(0)):
        part = work // jobs
        job = work % jobs
        if job < tiles:
            c = job % blocks_c * BOX_C
            k = job // blocks_c % blocks_k * BLOCK_M
            row = job // blocks_c // blocks_k * BOX_R
            tap = row
            if WINDOWS:  # of which each is all taps
                tap = 0
            h = tap // S * DIL_H - PAD_H
            w = tap % S * DIL_W - PAD_W
            p0, p1 = _inside(h, H, P, STRIDE_H)
            q0, q1 = _inside(w, W, Q, STRIDE_W)

            # The first step's pixel and images. The next ones are counted, and without an `if`,
            # behind which Triton would not fetch a step ahead.
            columns = tl.maximum(q1 - q0, 1)
            pixels = tl.maximum(p1 - p0, 1) * columns
            steps = (p1 - p0) * (q1 - q0) * tl.cdiv(N, BLOCK_K)
            first, last = _share(steps, part, parts)
            n = first // pixels * BLOCK_K
            p = p0 + first % pixels // columns
            q = q0 + first % columns
            acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            for _ in range(first, last):
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
                    if DY_PIXELS == 2:  # each quarter is of one pixel of x
                        first_quarter = _diagonal(first_quarter, second_quarter)
                        second_quarter = _diagonal(second_quarter, third_quarter)
                        third_quarter = _diagonal(third_quarter, last_quarter)
                    _store_columns(dw, first_quarter, part, k, row, c, 0, BOX_C)
                    _store_columns(dw, second_quarter, part, k, row, c, WIDTH, BOX_C)
                    _store_columns(dw, third_quarter, part, k, row, c, 2 * WIDTH, BOX_C)
                    if DY_PIXELS == 1:
                        _store_columns(dw, last_quarter, part, k, row, c, 3 * WIDTH, BOX_C)
        elif HAS_BIAS:  # the sum of dy, of one block of filters
            k = (job - tiles) * BLOCK_M
            first, last = _share(P * Q * tl.cdiv(N, BLOCK_K), part, parts)
            total = tl.full((BLOCK_K, BLOCK_M), 0.0, tl.float32)
            # A loop without a product is pipelined only where it is told to be.
            for step in tl.range(first, last, num_stages=4):
                p, q, n = step // Q % P, step % Q, step // (P * Q) * BLOCK_K
                dy_tile = tl.reshape(dy.load([p, q, n, k]), (BLOCK_K, BLOCK_M))
                total += dy_tile.to(tl.float32)
            offs_k = k + tl.arange(0, BLOCK_M // DY_PIXELS)
            db = tl.sum(total, axis=0)
            if DY_PIXELS == 2:
                db = tl.sum(tl.reshape(db, (2, BLOCK_M // 2)), axis=0)
            db = db.to(db_ptr.dtype.element_ty)
            tl.store(db_ptr + part * K + offs_k, db, mask=offs_k < K)


# --- Which tensors, which tile --------------------------------------------------------------------


class Plan(NamedTuple):
    """How the fast kernel does a weight gradient: all that does not depend on the data.

    Attributes:
        size: (N, P, Q, K), N the images that are summed in steps.
        image: H and W.
        dy: sizes and strides of dy as [P, Q, N, K].
        x: sizes and strides of x, [N, H, 1, W, C] or of its windows, [N, P, R, Q, S*C].
        dw: ROWS and SPAN of dweight [K, ROWS, SPAN]: [R*S, C], or of windows [R, S*C].
        taps_w: S, and 1 of windows.
        geometry: stride, padding and dilation, as the kernel has them.
        windows: whether x is seen as windows.
        folded: the plan by which x is packed first, None if it is read as it is.
        neighbours: of a tile that has pixels as columns (`as_neighbours`) the kernel's DY_PIXELS,
            X_STEP and X_FIRST.
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


UNIT = 8  # elements in 16 bytes, of which TMA's strides are multiples
FEW_IMAGES = 16  # below this more than half of a step of 32 images would be zeros
FEW_CHANNELS = 64  # below this a tile has the taps of whole windows, if it can
# Estimates, in clocks: of a step, to wait for its barrier, by which equal tiles differ; and of a
# load, where nothing else is done meanwhile but by the SM's other program.
STEP_CLOCKS, LOAD_CLOCKS = 20, 1000
PLAIN = (1, 1, 0, 0, 1, 1)  # stride, padding and dilation of a tap that is at every pixel


@functools.lru_cache(maxsize=4096)
def make_plan(
    x_size: tuple, x_strides: tuple, dy_size: tuple, dy_strides: tuple, taps: tuple,
    stride: tuple, padding: tuple, dilation: tuple, groups: int,
) -> Plan | None:  # fmt: skip
    """The plan for tensors of these sizes and strides; None if the kernel cannot do them.

    They are those of x [N, C, H, W] and of dy [N, K, P, Q], of 16-bit elements.
    """
    (N, C, H, W), (_, K, P, Q), (R, S) = x_size, dy_size, taps
    if 0 in (*x_size, *dy_size) or K % UNIT or groups > 1:
        return None
    geometry, folded = (*stride, *padding, *dilation), None
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

    if (R, S) == (1, 1) and geometry[:4] == PLAIN[:4]:  # as many images of one pixel
        stride_x, stride_dy = even_stride((N, H, W), strides), even_stride((N, P, Q), dy_strides)
        if stride_x and stride_dy:
            N, H, W, P, Q = N * P * Q, 1, 1, 1, 1
            sn, dn, dp, dq = stride_x, stride_dy, K, K
    most, far = max(C, H, W, K, N * P * Q), max(sn, sh, sw, dn, dp, dq)
    if N < FEW_IMAGES or most > conv2d_tma.LARGEST or far >= 2**39:
        return None
    dy = (P, Q, N, K), (dp, dq, dn, 1)
    a, b, pad_h, pad_w, dil_h, dil_w = geometry
    if C < FEW_CHANNELS and R * S > 1 and (sw, pad_h, pad_w, dil_w) == (C, 0, 0, 1):
        x = (N, P, R, Q, S * C), (sn, a * sh, dil_h * sh, b * sw, 1)
        return Plan((N, P, Q, K), (P, Q), dy, x, (R, S * C), 1, PLAIN, True, folded)
    x = (N, H, 1, W, C), (sn, sh, sh, sw, 1)
    return Plan((N, P, Q, K), (H, W), dy, x, (R * S, C), S, geometry, False, folded)


def as_neighbours(plan: Plan, tile: dict) -> Plan:
    """The plan for a tile whose columns hold a row of taps; the same plan if they do not.

    Of one pixel of dy, or of two: if both fill the rows, and the quarters, in which a tile is
    stored, are a pixel of x each.
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
    """The plan for this call, if the device and the tensors have one."""
    if len(device_of(x).kernels) == 1 or x.element_size() != 2 or dy.data_ptr() % 16:
        return None
    plan = make_plan(
        x.shape, x.stride(), dy.shape, dy.stride(), taps,
        tuple(stride), tuple(padding), tuple(dilation), groups,
    )  # fmt: skip
    return None if plan is None or (plan.folded is None and x.data_ptr() % 16) else plan


def pixels_inside(first: int, size: int, windows: int, stride: int) -> int:
    """How many of `windows` windows have a tap inside the image: `_inside`, for the cost."""
    begin, end = (min(cdiv(max(x, 0), stride), windows) for x in (-first, size - first))
    return max(end - begin, 0)


@functools.lru_cache(maxsize=4096)
def fast_tile(plan: Plan, sms: int, has_bias: bool = False) -> dict:
    """Of FAST_TILES the one, and the parts, with which the busiest SM should be done first."""
    best = None
    for tile in FAST_TILES[2]:
        seen = as_neighbours(plan, tile)
        N, _, _, K = seen.size
        rows, span = seen.dw
        box_r, box_c = _box(seen, tile)
        blocks = cdiv(rows, box_r) * cdiv(span, box_c) + has_bias  # the sum of dy is one more
        tiles = blocks * cdiv(K, tile["BLOCK_M"])
        steps = _pixels(seen) * cdiv(N, tile["BLOCK_K"])
        # Whole turns of the GPU, and powers of two; a part has eight steps at least.
        counts = {turns * sms // tiles for turns in range(1, 9)} | {1 << i for i in range(11)}
        for parts in sorted(counts - {0}):
            if parts == 1 or parts * 8 <= steps:
                tried = tile | dict(SPLIT_K=parts)
                clocks = busiest_sm(tried, tiles, steps, K * rows * span, 2, sms)
                turns = cdiv(tiles * parts, sms)
                beside = max(1, min(turns, tile["PROGRAMS_PER_SM"]))  # programs of an SM
                # Several rows of taps pass through registers, and then no load is ahead.
                waits = LOAD_CLOCKS // beside if box_r > 1 else STEP_CLOCKS
                clocks += waits * turns * cdiv(steps, parts)
                if best is None or clocks < best[0]:
                    best = clocks, tried
    return best[1]


def _pixels(plan: Plan) -> int:
    """Pixels that a tile is summed up over: of one tap, on average."""
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
    """How many rows and columns of dweight [K, ROWS, SPAN] a tile's columns are."""
    n = tile["BLOCK_N"]
    columns = min(n, max(16, triton.next_power_of_2(plan.dw[1]))) if plan.windows else n
    return n // columns, columns


class _Layout(NamedTuple):
    """What of a launch follows from its plan and tile: as the launch has it."""

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
    """Launch the fast kernel, with what has to be packed before and added up after it.

    Raises:
        ValueError: a tile that the kernel cannot have.
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
    """Return dweight [K, C, R, S], of this size, from how the kernel has it: [K, ROWS, SPAN]."""
    K, C, R, S = size
    if plan.folded is None:
        return out.view(K, R, S, C).permute(0, 3, 1, 2)
    (a, b), (rows, columns) = plan.folded.fold, plan.folded.taps
    taps = out.view(K, rows, columns, -1)[..., : a * b * C].unflatten(3, (a, b, C))
    return taps.permute(0, 5, 1, 3, 2, 4).reshape(K, C, rows * a, columns * b)[:, :, :R, :S]
