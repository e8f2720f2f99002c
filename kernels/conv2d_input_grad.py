"""The convolution's gradient with respect to its input: the forward with its steps turned round.

**One row of pixels.** Three taps a, b, c, padding 1, four pixels:

    y[0] =          b*x[0] + c*x[1]
    y[1] = a*x[0] + b*x[1] + c*x[2]             tap r reads pixel h = p - pad + r
    y[2] = a*x[1] + b*x[2] + c*x[3]
    y[3] = a*x[2] + b*x[3]

If the loss changes by dy[p] for a unit of y[p], it changes for a unit of x[h] by the sum, over all
p, of dy[p] times what y[p] has of x[h]. For x[1], down its column: c*dy[0] + b*dy[1] + a*dy[2].

    dx[h] = a*dy[h+1] + b*dy[h] + c*dy[h-1]     tap r reads output p = h + pad - r

That is the same convolution, of dy, except that a tap steps back where it stepped forward. It is
often told as one with the filter reversed; but nothing has to be moved in memory for a minus sign.

**Stride 2.** Now y[p] stands over x[2p], and half of the lines above are missing:

    y[0] =          b*x[0] + c*x[1]             even pixels   dx[2i]   = b*dy[i]
    y[1] = a*x[1] + b*x[2] + c*x[3]             odd pixels    dx[2i+1] = a*dy[i+1] + c*dy[i]

Two sorts of pixels (phases), and each is a convolution of stride 1, with taps of its own. The other
way to see it is a dy with zeros between its numbers, and the convolution of stride 1 over that: in
two dimensions it would multiply by zero three times out of four.

**An image**, in cuDNN's letters:

    forward          y[n,k,p,q]  = sum over c,r,s of x[n,c,h,w] * weight[k,c,r,s]
                     with h = p*stride - pad + r*dil, and w alike
    input gradient   dx[n,c,h,w] = sum over k,r,s of dy[n,k,p,q] * weight[k,c,r,s]
                     where p*stride = h + pad - r*dil has a solution p in 0 .. P-1, and q alike
    as a matmul      [NHW, RSK] x [RSK, C]      the sum runs over taps and output channels

Each program owns pixels of dx and gathers from the outputs that they went into: no atomics, nothing
to clear first, one rounding. Of a 3x3 filter with padding 1 and taps numbered 3r + s, which tap
reads which pixels of dy, for the pixel (h, w) of dx:

    stride 1: around dy[h, w]      stride 2: from dy[h // 2, w // 2] on, right and down

       8 7 6                          h, w even      h odd      w odd      both odd
       5 4 3                             4             7         5 3          8 6
       2 1 0                                           1                      2 0

So at stride 2 a pixel takes 1, 2, 2 or 4 of the nine taps, and no product is spent on the others.
In general, with g = gcd(dil, stride): pixels sort into stride_h x stride_w classes by
a = (h + pad) mod stride (and b, of w); class a has no tap unless g divides it, and else

    r = (a/g) * (dil/g)^-1  mod stride/g, and every stride/g-th after it

**Check it.** The loss is linear in x, so a step of 1 in a pixel must change it by that pixel's dx:

    >>> import torch
    >>> from kernels import conv2d
    >>> weight = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)       # a, b, c
    >>> dy = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    >>> conv2d_input_grad(dy, weight, [1, 1, 1, 4], [1, 1], [0, 1], [1, 1], 1).flatten()
    tensor([ 12., 123., 234., 340.])
    >>> def loss(x):
    ...     return (dy * conv2d(x, weight, padding=(0, 1))).sum()
    >>> x = torch.randn(1, 1, 1, 4)
    >>> steps = torch.eye(4).view(4, 1, 1, 1, 4)                         # one pixel each
    >>> [round((loss(x + step) - loss(x)).item()) for step in steps]
    [12, 123, 234, 340]

(On a CPU: `python -m pytest --doctest-modules kernels/conv2d_input_grad.py`.)

FLOPs: 2*N*P*Q*K*C*R*S, as for the forward. What limits it: as there, tensor cores.

Read first: conv2d.py. Source: Dumoulin & Visin, A guide to convolution arithmetic (2016), for the
transposed form; the classes are the usual decomposition of a strided transposed convolution.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels._geometry import as_pixels, empty_channels_last
from kernels._launch import (
    cdiv,
    choose_tile,
    descriptor,
    device_of,
    dot_precision,
    launch,
)
from kernels._rows import sum_partials
from kernels.bias_relu import bias_relu_backward
from kernels.conv2d_tma import (
    FAST_TILES,
    LARGEST,
    Plan,
    choices,
    filters_as_they_lie,
    folded_plan,
    packed_filter,
    packed_filters,
    pixel_box,
    pixel_steps,
)
from kernels.matmul import busiest_sm, matmul_into, reduce_parts

TILES = [
    # the default, as in conv2d.py
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    # float32, as in conv2d.py
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
    # 64 deep: fewer, longer steps
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    # wide layers on Hopper
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    # small layers: more programs
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}


@triton.jit
def conv2d_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr, N, C, H, W, K, P, Q,
    stride_dyn, stride_dyk, stride_dyp, stride_dyq, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GCD_H: tl.constexpr, GCD_W: tl.constexpr, INV_H: tl.constexpr, INV_W: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels of one class x BLOCK_N channels of one group of dx.

    GCD = gcd(dilation, stride), INV = (dilation/GCD)^-1 mod stride/GCD. C and K are per group.
    """
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    class_h = tl.program_id(2) // STRIDE_W  # (h + pad) mod stride
    class_w = tl.program_id(2) % STRIDE_W
    dy_ptr += group * K * stride_dyk
    w_ptr += group * K * stride_wk

    # The pixels of this class: h0, h0 + stride, ...
    h0 = (class_h + STRIDE_H - PAD_H % STRIDE_H) % STRIDE_H
    w0 = (class_w + STRIDE_W - PAD_W % STRIDE_W) % STRIDE_W
    rows_h = (H - h0 + STRIDE_H - 1) // STRIDE_H
    rows_w = (W - w0 + STRIDE_W - 1) // STRIDE_W
    M = tl.cast(N, tl.int64) * rows_h * rows_w
    if pid_m.to(tl.int64) * BLOCK_M >= M:  # this class has fewer pixels than the largest
        return
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = offs_m % M
    n = pixel // rows_w // rows_h
    h = h0 + pixel // rows_w % rows_h * STRIDE_H
    w = w0 + pixel % rows_w * STRIDE_W

    # The taps of this class: r0, r0 + r_step, ... And the output that tap 0 would have come from.
    r_step: tl.constexpr = STRIDE_H // GCD_H
    s_step: tl.constexpr = STRIDE_W // GCD_W
    r0 = class_h // GCD_H * INV_H % r_step
    s0 = class_w // GCD_W * INV_W % s_step
    taps_r = tl.where(class_h % GCD_H == 0, (R - r0 + r_step - 1) // r_step, 0)
    taps_s = tl.where(class_w % GCD_W == 0, (S - s0 + s_step - 1) // s_step, 0)
    p0 = (h + PAD_H) // STRIDE_H
    q0 = (w + PAD_W) // STRIDE_W

    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    dy_rows = n * stride_dyn + p0 * stride_dyp + q0 * stride_dyq
    dy_ptrs = dy_ptr + dy_rows[:, None] + (offs_k * stride_dyk)[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + (offs_k * stride_wk)[:, None] + (offs_n % C * stride_wc)[None, :]
    step_p = tl.cast(stride_dyp, tl.int64)
    step_q = tl.cast(stride_dyq, tl.int64)
    step_k = tl.cast(stride_dyk, tl.int64)
    step_wr, step_ws = tl.cast(stride_wr, tl.int64), tl.cast(stride_ws, tl.int64)
    step_wk = tl.cast(stride_wk, tl.int64)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    for i in range(0, taps_r * taps_s * blocks_k):
        r = r0 + i // blocks_k // taps_s * r_step
        s = s0 + i // blocks_k % taps_s * s_step
        k = i % blocks_k * BLOCK_K
        up = r * DIL_H // STRIDE_H  # p = p0 - up: (h + pad) and r*dil leave the same remainder
        left = s * DIL_W // STRIDE_W
        dy_tap = dy_ptrs + (k * step_k - up * step_p - left * step_q)
        w_tap = w_ptrs + (k * step_wk + r * step_wr + s * step_ws)
        inside = (p0 >= up) & (p0 < P + up) & (q0 >= left) & (q0 < Q + left)
        if EVEN_K:
            dy = tl.load(dy_tap, mask=inside[:, None], other=0.0)
            wt = tl.load(w_tap)  # [BLOCK_K, BLOCK_N]
        else:
            mask_k = offs_k < K - k
            dy = tl.load(dy_tap, mask=inside[:, None] & mask_k[None, :], other=0.0)
            wt = tl.load(w_tap, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(dy, wt, acc, input_precision=PRECISION)

    dx_rows = n * stride_dxn + h * stride_dxh + w * stride_dxw
    dx_ptrs = dx_ptr + dx_rows[:, None] + ((group * C + offs_n) * stride_dxc)[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < C)[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def _inverse(dilation: int, stride: int) -> tuple[int, int]:
    """Return g = gcd and the inverse of dilation/g modulo stride/g (0 where that is 1)."""
    g = math.gcd(dilation, stride)
    return g, pow(dilation // g, -1, stride // g) if stride > g else 0


# --- The fast kernel ------------------------------------------------------------------------------
#
# The same gathering, with the tiles of conv2d_tma.py, which is to be read first: a unit fetches
# boxes of dy and fills in zeros where they stick out, and acc = W^T dy^T is [channels, pixels].
# What is different here:
#
#   the filter   is read as it lies in channels_last memory: of [taps, K, C] a tile of BLOCK_K
#                filters and BLOCK_N channels. It is the first operand transposed, which costs
#                nothing, since 16-bit tensor cores read both orders out of shared memory. Nor is it
#                flipped: a step to the next tap of the filter is a step back in dy
#   stride 1     is then the forward with dy for x, and with padding and dilation negated
#   a stride     makes a convolution of stride 1 of each class of pixels, by the taps of its own.
#                Pixel h = i*stride + a of class a takes its j-th tap from p = i + up - j*dil/g,
#                where up depends on a alone: there are no zeros between the rows of dy. A box of
#                one class of dx is a box of [N, H/2, 2, W/2, 2*C], which is the same memory
#   order        the first tap r0 names a class, r0*dil mod stride, and so those with most taps come
#                first. As many tiles as there are programs go through all classes before the next
#                ones do, so that their boxes of dy come out of the L2 cache; and every second turn
#                runs backwards through the programs: who had the longest sum has the shortest next
#   ReLU         where x = relu(z + bias), the gradient of z is dx where x > 0, and that of the bias
#                its sum over the pixels. The tile is still in registers: it takes its box of x, and
#                a pass that reads dx and x and writes dz is saved
#
# One launch stores every pixel, those that no tap reaches too. A filter of one pixel at stride 1 is
# a matmul; but not with a ReLU, which a matmul does not end with.
#
# Images of fewer than 8 channels, which only the first layer of a network has: conv2d_tma.py makes
# stride x stride pixels one, with so many times the channels, and the convolution one of stride 1.
# Its input gradient is that of the folded image, by the same kernel, and then unfolded.
#
# The tiles are the forward's. What triton 3.6.0 and 3.9.0 make of the largest, 256 pixels of 128
# channels, in bfloat16 for sm_90; not run:
#
#                      registers   shared memory   instructions a step
#   stride 1           154, 154      208 KiB            101, 101
#   + ReLU             165, 163      208 KiB            101, 101
#   stride 2           154, 154      208 KiB            103, 103
#   + ReLU             162, 163      208 KiB            103, 103


@triton.jit
def _class_of(
    t, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    GCD: tl.constexpr,
):  # fmt: skip
    """Of the t-th class: its first pixel, its first tap, how many, and the output of the two."""
    STEP: tl.constexpr = STRIDE // GCD
    r0 = t % STEP
    rest = r0 * DIL % STRIDE + t // STEP  # (h + pad) mod stride; from STEP on, no tap has it
    a = (rest + (STRIDE - PAD % STRIDE)) % STRIDE
    taps = tl.where(t < STEP, (R - r0 + STEP - 1) // STEP, 0)
    return a, r0, taps, (a + PAD - r0 * DIL) // STRIDE


@triton.jit
def conv2d_input_grad_tma_kernel(
    dy, w, x, dx, sums_ptr, N, ROWS, COLUMNS, C, K,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GCD_H: tl.constexpr, GCD_W: tl.constexpr, PACKED: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of dx in each of its turns: BLOCK_N channels of a box of pixels.

    dy, w, x and dx are descriptors: w is of [R*S, K, C] or, PACKED, of [R*S, C, K]. A class has
    N * ROWS * COLUMNS pixels. RELU masks dx where x is not positive, and stores the sums of each
    tile. With SPLIT_K > 1, dx is of partial sums: [SPLIT_K * N, ...], N rounded up to boxes.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_H * TILE_W
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    STEP_R: tl.constexpr = STRIDE_H // GCD_H  # from one tap of a class to its next
    STEP_S: tl.constexpr = STRIDE_W // GCD_W
    UP: tl.constexpr = DIL_H // GCD_H  # and from its output to the next one's
    LEFT: tl.constexpr = DIL_W // GCD_W
    blocks_c = tl.cdiv(C, BLOCK_N)
    blocks_i = tl.cdiv(ROWS, TILE_H)
    blocks_j = tl.cdiv(COLUMNS, TILE_W)
    blocks_k = tl.cdiv(K, BLOCK_K)
    boxes = tl.cdiv(N, TILE_N) * blocks_i * blocks_j
    tiles = boxes * blocks_c * SPLIT_K  # of a class

    # Every second turn runs backwards through the programs; the last one has fewer tiles.
    pid, programs = tl.program_id(0), tl.num_programs(0)
    turns = tiles * CLASSES // programs
    place = tl.where(turns % 2 == 0, pid, programs - 1 - pid)
    turns += (place < tiles * CLASSES % programs).to(tl.int32)
    for turn in tl.range(0, turns):
        tile = turn * programs + tl.where(turn % 2 == 0, pid, programs - 1 - pid)
        t = 0
        if CLASSES > 1:  # a wave of as many tiles as programs, of one class after the other
            wave = tile // (programs * CLASSES) * programs
            width = tl.minimum(tiles - wave, programs)
            within = tile % (programs * CLASSES)
            tile = wave + within % width
            t = within // width
        c = tile % blocks_c * BLOCK_N
        box = tile // blocks_c
        part = 0
        if SPLIT_K > 1:
            part = box // boxes
            box = box % boxes
        j = box % blocks_j * TILE_W
        i = box // blocks_j % blocks_i * TILE_H
        n = box // blocks_j // blocks_i * TILE_N
        if STRIDE_W > 1:  # not into the next pixel's: the last two blocks may share channels
            c = tl.minimum(c, C - BLOCK_N)
        a, r0, taps_r, up = _class_of(t // STRIDE_W, R, STRIDE_H, PAD_H, DIL_H, GCD_H)
        b, s0, taps_s, left = _class_of(t % STRIDE_W, S, STRIDE_W, PAD_W, DIL_W, GCD_W)
        p, q = i + up, j + left  # of the first tap
        steps = taps_r * taps_s * blocks_k

        # The first step: which tap of the class, and which filters. The next ones are counted.
        first, last, tap_r, tap_s, k = 0, steps, 0, 0, 0
        if SPLIT_K > 1:
            part_steps = tl.cdiv(steps, SPLIT_K)
            first = part * part_steps
            last = tl.minimum(first + part_steps, steps)
            tap_r = first // blocks_k // tl.maximum(taps_s, 1)
            tap_s = first // blocks_k % tl.maximum(taps_s, 1)
            k = first % blocks_k * BLOCK_K
        acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
        for _ in range(first, last):
            dy_box = dy.load([n, p - tap_r * UP, q - tap_s * LEFT, k])
            tap = (r0 + tap_r * STEP_R) * S + s0 + tap_s * STEP_S
            if PACKED:
                w_tile = tl.reshape(w.load([tap, c, k]), (BLOCK_N, BLOCK_K))
            else:  # the transpose stays as it lies in shared memory
                w_tile = tl.reshape(w.load([tap, k, c]), (BLOCK_K, BLOCK_N)).T
            dy_tile = tl.reshape(dy_box, (BLOCK_M, BLOCK_K))
            acc = tl.dot(w_tile, dy_tile.T, acc, input_precision=PRECISION)
            k += BLOCK_K
            done = k >= K
            k = tl.where(done, 0, k)
            tap_s = tl.where(done, tap_s + 1, tap_s)
            done = tap_s >= taps_s
            tap_s = tl.where(done, 0, tap_s)
            tap_r = tl.where(done, tap_r + 1, tap_r)

        if RELU:
            if CLASSES == 1:
                x_box = x.load([n, i, j, c])
            else:
                x_box = x.load([n, i, a, j, b * C + c])
            acc = tl.where(tl.reshape(x_box, (BLOCK_M, BLOCK_N)).T <= 0, 0.0, acc)
            offs_c = c + tl.arange(0, BLOCK_N)
            sums = sums_ptr + (t * boxes + box).to(tl.int64) * C
            tl.store(sums + offs_c, tl.sum(acc, axis=1), mask=offs_c < C)
        n += part * (tl.cdiv(N, TILE_N) * TILE_N)
        out = acc.to(dx.dtype).T
        if CLASSES == 1:
            dx.store([n, i, j, c], tl.reshape(out, (TILE_N, TILE_H, TILE_W, BLOCK_N)))
        else:
            out = tl.reshape(out, (TILE_N, TILE_H, 1, TILE_W, BLOCK_N))
            dx.store([n, i, a, j, b * C + c], out)


@triton.jit
def conv2d_unfold_kernel(
    folded_ptr, dx_ptr, N, C, H, W, rows, columns, depth,
    stride_n, stride_c, stride_h, stride_w,
    FOLD_H: tl.constexpr, FOLD_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program stores BLOCK_M pixels of dx: what conv2d_pack_kernel does, undone.

    They come out of folded [N, rows, columns, depth]. Pixels beyond it are those that no window
    reads.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    w = offs_m % W
    h = offs_m // W % H
    n = offs_m // W // H
    row, a = (h + PAD_H) // FOLD_H, (h + PAD_H) % FOLD_H
    column, b = (w + PAD_W) // FOLD_W, (w + PAD_W) % FOLD_W
    offs = ((n * rows + row) * columns + column) * depth + (a * FOLD_W + b) * C
    mask = (n < N)[:, None] & (c < C)[None, :]
    inside = ((row < rows) & (column < columns))[:, None] & mask
    dx = tl.load(folded_ptr + offs[:, None] + c[None, :], mask=inside, other=0.0)
    out = (n * stride_n + h * stride_h + w * stride_w)[:, None] + (c * stride_c)[None, :]
    tl.store(dx_ptr + out, dx, mask=mask)


# --- Which tensors, which tile --------------------------------------------------------------------


NARROWEST = min(tile["BLOCK_N"] for tiles in FAST_TILES.values() for tile in tiles)


@functools.lru_cache(maxsize=4096)
def make_plan(
    dy_size: tuple, dy_steps: tuple, w_size: tuple, w_steps: tuple, size: tuple,
    stride: tuple, padding: tuple, dilation: tuple, groups: int, item: int,
) -> Plan | None:  # fmt: skip
    """The plan for tensors of these sizes and strides; None if the kernel cannot do them.

    It is that of conv2d_tma.py with dy [N, K, P, Q] in the place of x, and dx, of `size`, in that
    of y. Filters that are packed become [taps, C, K], others are read as [taps, K, C]. With `fold`
    all sizes are those of the folded image, but for dy's.
    """
    (N, C, H, W), (K, _, R, S) = size, w_size
    unit = 16 // item
    if groups > 1 or 0 in (*dy_size, *size, R, S) or K % unit:
        return None
    geometry, fold = (*stride, *padding, *dilation), None
    if C < unit and item == 2 and dilation == (1, 1):
        folded = folded_plan(size, w_size, stride, *dy_size[2:], unit)
        if folded is None:
            return None
        (N, H, W, C), (R, S), geometry, fold = folded.x[0], folded.taps, folded.geometry, stride
        size, w_size, stride = (N, C, H, W), (K, C, R, S), (1, 1)
        w_steps = (R * S * C, 1, S * C, C)
    if C % unit or H % stride[0] or W % stride[1] or max(*dy_size, *size, N * H * W) > LARGEST:
        return None
    if stride[1] > 1 and C < NARROWEST:  # a tile would reach into the channels of the next pixel
        return None
    steps = pixel_steps(dy_size, dy_steps, unit)
    if steps is None or max(*steps, C * H * W) * item >= 2**40:  # what a descriptor's can be
        return None
    w = filters_as_they_lie(w_size, w_steps, unit) if item == 2 else None
    packed = w is None  # and for TF32, whose operands both have to be contiguous along the sum
    if packed:
        w = packed_filters(C, R * S, K, unit)
    dy = tuple(dy_size[x] for x in (0, 2, 3, 1)), (*steps, 1)
    return Plan((N, H, W, C), dy, fold, w, packed, (R, S), geometry, None)


def plan_for(dy, weight, size, stride, padding, dilation, groups, precision) -> Plan | None:
    """The plan for this call, if the device and the tensors have one."""
    if len(device_of(dy).kernels) == 1 or (dy.dtype == torch.float32 and precision != "tf32"):
        return None
    if dy.data_ptr() % 16:
        return None
    return make_plan(
        dy.shape, dy.stride(), weight.shape, weight.stride(), tuple(size),
        tuple(stride), tuple(padding), tuple(dilation), groups, dy.element_size(),
    )  # fmt: skip


def _taps_of_classes(taps: int, stride: int, dilation: int) -> list[int]:
    """How many taps reach each class of rows, in the kernel's order."""
    step = stride // math.gcd(dilation, stride)
    return [cdiv(taps - t, step) if t < min(step, taps) else 0 for t in range(stride)]


@functools.lru_cache(maxsize=4096)
def fast_tile(plan: Plan, item: int, sms: int, relu: bool = False) -> dict:
    """Of FAST_TILES the one, and the split, with which the busiest SM should be done first."""
    N, H, W, C = plan.size
    K, stride, dilation = plan.x[0][3], plan.geometry[:2], plan.geometry[4:]
    rows, columns = map(_taps_of_classes, plan.taps, stride, dilation)
    classes = [r * s for r in rows for s in columns]

    def clocks(tile: dict) -> float:
        tn, th, tw = pixel_box(N, H // stride[0], W // stride[1], tile["BLOCK_M"])
        boxes = cdiv(N, tn) * cdiv(H // stride[0], th) * cdiv(W // stride[1], tw)
        tiles, blocks_k = boxes * cdiv(C, tile["BLOCK_N"]), cdiv(K, tile["BLOCK_K"])
        if len(classes) == 1:
            return busiest_sm(tile, tiles, classes[0] * blocks_k, N * H * W * C, item, sms)
        total, (waves, rest) = 0.0, divmod(tiles, sms)
        for t, taps in enumerate(classes):  # the last wave's classes follow without a gap
            turns = waves + cdiv((t + 1) * rest, sms) - cdiv(t * rest, sms)
            total += busiest_sm(tile, turns * sms, taps * blocks_k, 0, item, sms)
        return total

    def fits(tile: dict) -> bool:
        """In float32 two of the largest do not fit: a tile of parts, or one and the box of x."""
        split, large = tile["SPLIT_K"], tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128
        if split == 1:
            return not (large and relu and item == 4)
        steps = classes[0] * cdiv(K, tile["BLOCK_K"])  # parts have four at least
        return len(classes) == 1 and not (relu or large) and split * 4 <= steps

    tiles = itertools.product(FAST_TILES[item], (1, 2, 4, 8, 16))
    tiles = [tile | dict(SPLIT_K=split) for tile, split in tiles]
    return min(filter(fits, tiles), key=clocks)


UNFOLD_TILE = dict(BLOCK_M=256, num_warps=4)


def _unfold(plan, folded, dx, padding):
    """Store dx [N, C, H, W] out of its folded form."""
    (N, C, H, W), (_, rows, columns, depth) = dx.shape, plan.size
    tile = choose_tile("conv2d_unfold", dx.dtype, {dx.itemsize: UNFOLD_TILE}, M=N * H * W)
    launch(
        conv2d_unfold_kernel, (cdiv(N * H * W, tile["BLOCK_M"]),),
        folded, dx, N, C, H, W, rows, columns, depth, *dx.stride(), *plan.fold, *padding,
        BLOCK_N=triton.next_power_of_2(C), **tile,
    )  # fmt: skip


def conv2d_input_grad_tma(plan, dy, weight, x, dx, dbias, tile, precision, padding):
    """Launch the fast kernel, with what has to be packed before and added up after it.

    dx [N, C, H, W] is channels_last, and so is x. With x, it is the gradient through the ReLU that
    x came out of, and dbias that of its bias.

    Raises:
        ValueError: with x, a tile that splits the sum.
    """
    relu, split = x is not None, tile["SPLIT_K"]
    if relu and split > 1:
        raise ValueError(f"through a ReLU the tile must have SPLIT_K=1, got {tile}")
    result = dx
    if plan.fold is not None:
        weight = packed_filter(plan, plan.w[0], weight)
        N, H, W, C = plan.size
        dx = torch.empty(N, H, W, C, dtype=dy.dtype, device=dy.device)
    packed = plan.packed_w or weight.data_ptr() % 16 != 0
    how = _layout(plan, tuple(tile.items()), device_of(dy).sms, dy.element_size(), packed)
    if packed:
        weight = packed_filter(plan, how.w[0], weight.transpose(0, 1))
    out, sums = dx, None
    if split > 1:
        out = torch.empty(how.out[0], dtype=torch.float32, device=dy.device)
    if relu:
        sums = torch.empty(how.boxes, plan.size[3], dtype=torch.float32, device=dy.device)
    launch(
        conv2d_input_grad_tma_kernel, (how.programs,),
        descriptor(dy, *plan.x, how.box), descriptor(weight, *how.w, how.w_box),
        descriptor(x, *how.out, how.out_box) if relu else None,
        descriptor(out, *how.out, how.out_box), sums, *how.sizes, *plan.taps, *plan.geometry,
        RELU=relu, PRECISION=precision, **how.meta,
    )  # fmt: skip
    if relu:
        sum_partials(sums, dbias)
    if split > 1:
        N, H, W, C = plan.size
        reduce_parts(out, None, None, dx, N * H * W, C, how.images // split * H * W, split)
    if plan.fold is not None:
        _unfold(plan, dx, result, padding)


class _Layout(NamedTuple):
    """What of a launch follows from its plan and tile: as the launch has it."""

    programs: int
    boxes: int
    images: int
    sizes: tuple[int, ...]
    box: list[int]
    w: tuple[tuple, tuple]
    w_box: list[int]
    out: tuple[tuple, tuple]
    out_box: list[int]
    meta: dict


@functools.lru_cache(maxsize=4096)
def _layout(plan: Plan, items: tuple, sms: int, item: int, packed: bool) -> _Layout:
    tile = dict(items)
    (N, H, W, C), K = plan.size, plan.x[0][3]
    m, n, k, split = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    a, b, _, _, dil_h, dil_w = plan.geometry
    if b > 1:  # as in choose_tile: no block is larger than what it covers
        n = min(n, 1 << (C.bit_length() - 1))
    rows, columns = H // a, W // b
    tn, th, tw = pixel_box(N, rows, columns, m)
    boxes_n = cdiv(N, tn)
    boxes = boxes_n * cdiv(rows, th) * cdiv(columns, tw) * a * b
    work = boxes * cdiv(C, n) * split
    programs = min(work, tile["PROGRAMS_PER_SM"] * sms) if tile["PROGRAMS_PER_SM"] else work
    images = N if split == 1 else split * boxes_n * tn
    out, out_box = ((images, H, W, C), (H * W * C, W * C, C, 1)), [tn, th, tw, n]
    if a * b > 1:
        out = (images, rows, a, columns, b * C), (H * W * C, a * W * C, W * C, b * C, 1)
        out_box = [tn, th, 1, tw, n]
    return _Layout(
        programs, boxes, images, (N, rows, columns, C, K), [tn, th, tw, k],
        packed_filters(C, plan.w[0][0], K, 16 // item) if packed else plan.w,
        [1, n, k] if packed else [1, k, n], out, out_box,
        dict(
            GCD_H=math.gcd(dil_h, a), GCD_W=math.gcd(dil_w, b), PACKED=packed,
            TILE_N=tn, TILE_H=th, TILE_W=tw, BLOCK_N=n, BLOCK_K=k, SPLIT_K=split,
            num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        ),
    )  # fmt: skip


@torch.library.custom_op("tilelab::conv2d_input_grad", mutates_args=())
def conv2d_input_grad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """The gradient of conv2d's x [N, C, H, W] = input_size, channels_last, from dy [N, K, P, Q]."""
    dx = empty_channels_last(input_size, dy)
    (N, _, H, W), (_, C, R, S), (_, K, P, Q) = input_size, weight.shape, dy.shape
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    pixels = as_pixels(dy, stride, padding, groups) if R * S == 1 else None
    plan = None
    if pixels is None or precision == "tf32":
        plan = plan_for(dy, weight, input_size, stride, padding, dilation, groups, precision)
    # A filter of one pixel: a matmul. For TF32, which wants its columns packed, only if it must.
    if pixels is not None and plan is None:
        rows = dx.permute(0, 2, 3, 1).view(N * H * W, C)
        matmul_into(rows, pixels, weight.view(K, C), None, None, precision)
        return dx

    K //= groups
    M = N * cdiv(H, stride[0]) * cdiv(W, stride[1])  # pixels of the largest class
    default, kernels = choices(
        plan, dy, DEFAULT, ("pointer",), lambda sms: fast_tile(plan, dy.itemsize, sms)
    )
    tile = choose_tile("conv2d_input_grad", dy.dtype, default, kernels, M=M, N=C, K=K)
    if "kernel" in tile:
        conv2d_input_grad_tma(plan, dy, weight, None, dx, None, tile, precision, padding)
        return dx
    blocks = cdiv(M, tile["BLOCK_M"]) * cdiv(C, tile["BLOCK_N"])
    (gcd_h, inv_h), (gcd_w, inv_w) = (_inverse(d, s) for d, s in zip(dilation, stride, strict=True))
    launch(
        conv2d_input_grad_kernel, (blocks, groups, stride[0] * stride[1]),
        dy, weight, dx, N, C, H, W, K, P, Q, *dy.stride(), *weight.stride(), *dx.stride(),
        R, S, *stride, *padding, *dilation, gcd_h, gcd_w, inv_h, inv_w,
        PRECISION=precision, EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
    )  # fmt: skip
    return dx


@conv2d_input_grad.register_fake
def _(dy, weight, input_size, stride, padding, dilation, groups):
    return empty_channels_last(input_size, dy)


@torch.library.custom_op("tilelab::conv2d_input_grad_relu", mutates_args=())
def conv2d_input_grad_relu(
    dy: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where x is itself act(z + bias) with a ReLU: the gradients of z, as x, and of that bias."""
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    plan = None
    if x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0:
        plan = plan_for(dy, weight, x.shape, stride, padding, dilation, groups, precision)
    if plan is not None and plan.fold is None:
        (N, C, H, W), K = x.shape, dy.shape[1]
        M = N * cdiv(H, stride[0]) * cdiv(W, stride[1])
        default, kernels = choices(
            plan, dy, DEFAULT, ("pointer",), lambda sms: fast_tile(plan, dy.itemsize, sms, True)
        )
        tile = choose_tile("conv2d_input_grad_relu", dy.dtype, default, kernels, M=M, N=C, K=K)
        if "kernel" in tile:
            dz, dbias = torch.empty_like(x), dy.new_empty(C)
            conv2d_input_grad_tma(plan, dy, weight, x, dz, dbias, tile, precision, padding)
            return dz, dbias
    dx = conv2d_input_grad(dy, weight, list(x.shape), stride, padding, dilation, groups)
    return bias_relu_backward(dx, x)


@conv2d_input_grad_relu.register_fake
def _(dy, weight, x, stride, padding, dilation, groups):
    return torch.empty_like(x), dy.new_empty(x.shape[1])
