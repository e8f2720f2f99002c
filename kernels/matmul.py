"""Matrix multiplication C = A @ B, tiled, with bias and ReLU fused behind it; forward and backward.

    forward     C  = act(A @ B + bias)     A [M, K], B [K, N], C [M, N]
    backward    dZ = dC where C > 0        (act = relu; else dZ = dC)
                dA = dZ @ B^T              the same kernel: a transpose is a swap of two strides
                dB = A^T @ dZ              the same kernel
                dbias = sum over rows of dZ

          K            N            N
       +-----+      +--+--+      +--+--+
     M |==>  |  x   |  v  |  =   |  #  |    one program: BLOCK_M x BLOCK_N of C,
       +-----+      +--+--+      +--+--+    walking along K in steps of BLOCK_K

    for each tile (m, n) of C, in parallel:
        acc = 0                                  # float32, in registers
        for k in 0, BLOCK_K, 2*BLOCK_K ... below K:
            acc += A[m, k] @ B[k, n]             # tensor cores
        C[m, n] = act(acc + bias[n])

What limits it: 2MNK FLOPs over e(MK + KN + MN) bytes, e for each element. A square of side n does
n/3 FLOPs a byte in 16-bit, so from n ~ 600 on (an H200 does 206 FLOPs in the time of one byte) it
is the tensor cores, if what is loaded is used often enough: a program reads BLOCK_M rows of A and
BLOCK_N columns of B for BLOCK_M * BLOCK_N results. So large tiles save bandwidth, and they end
where the accumulator fills the registers (128x256 float32 are half of an SM's 65,536). A small C
with a long K, as dB of a classifier, would be few programs with a long sum each: there the sum is
shared out among more of them, and a second kernel adds the parts up, always in the same order.

Program order. Programs start in the order of their index, a wave of them at a time. Row by row, a
wave would touch one block row of A and all of B. In groups of GROUP_M block rows it touches a
squarish patch of C, so that the L2 cache serves most of the loads:

    row by row          grouped by 2
    0  1  2  3          0  2  4  6          a wave of 4 reads 1 + 4 blocks in the first order
    4  5  6  7          1  3  5  7          and 2 + 2 in the second

Two kernels compute it. The first, through pointers, takes every GPU, dtype and stride: read it
first. The second is for GPUs since Hopper (sm_90) and 16-byte aligned rows, and is what changes
when the tensor cores are so fast that everything around them shows; it is introduced above it, step
by step. A tile says which kernel it is for, so to choose a tile is to choose a kernel: `_operands`
says whether the second can do a call, the tuned table or `fast_tile` with which tile.

Read first: bias_relu.py. Sources: the grouped order is that of Triton's tutorial 03, persistent
programs and epilogue subtiles those of tutorial 09; the blocking goes back to Goto and van de
Geijn, Anatomy of High-Performance Matrix Multiplication (2008); split-K and why a grid should be
whole waves: Osama et al., Stream-K (2023).
"""

import functools

import torch
import triton
import triton.language as tl
from tilelab.kernels._launch import (
    INTERPRETER,
    autocast,
    cdiv,
    check_choice,
    check_shape,
    check_tensors,
    choose_tile,
    descriptor,
    device_of,
    dot_precision,
    into_chunks,
    launch,
    persistent,
    splits,
    tma_rows,
    tma_tile,
)
from tilelab.kernels.bias_relu import bias_backward, bias_relu_backward


def reference(a, b, bias=None, activation=None):
    """The same in plain torch, for any dtype."""
    c = a @ b if bias is None else a @ b + bias
    return torch.relu(c) if activation == "relu" else c


TILES = [
    # the default: both operands of three stages in 48 KiB, so it runs on every GPU since 2020
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=3),
    # float32: without TF32 each thread holds its rows and columns of a step in registers
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=3),
    # large squares: the most reuse that fits the registers. On Hopper the second kernel has the
    # same tile; in this one, with B transposed, triton 3.6.0 makes each wgmma wait for the last
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # deep K: fewer, longer steps hide the latency of loads behind more tensor-core work
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # small grids: four times the programs, for when 128x128 tiles leave SMs idle
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=4),
    # skinny: a classifier's ten columns fit one tensor-core instruction
    dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=4),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}

_fast = functools.partial(tma_tile, per_sm=1, GROUP_M=8, SUBTILES=1, SPLIT_K=1)

# By bytes an element. Compiled for sm_90 with triton 3.6.0 and 3.9.0, 16-bit operands in all four
# layouts: no spills, wgmma from shared memory as wide as the tile, at most 100 instructions a step.
FAST_TILES = {
    2: [
        # the most reuse that the registers hold; half the tile at a time through the epilogue
        # leaves room for a fourth stage
        _fast(128, 256, 64, 8, 4, SUBTILES=2),
        _fast(128, 256, 64, 8, 3),  # the same with the whole tile at once
        _fast(128, 256, 64, 4, 3, kernel="tma_ws"),  # four warps load, two groups of four multiply
        # two programs an SM: one multiplies while the other stores
        _fast(128, 128, 64, 8, 3, SUBTILES=2, per_sm=2),
        _fast(128, 128, 128, 4, 3, kernel="tma_ws"),  # fewer, longer steps
        # small grids: four times the tiles, and two programs an SM; with split-K even more
        _fast(64, 128, 64, 4, 4, SUBTILES=2, per_sm=2),
        _fast(64, 256, 64, 4, 3, SUBTILES=2),  # few rows: the columns stream through
    ],
    4: [  # TF32, both operands contiguous along K; a step of 32 is as many bytes
        _fast(128, 256, 32, 8, 3, SUBTILES=2),
        _fast(128, 128, 32, 8, 3),
        _fast(64, 128, 32, 4, 4, SUBTILES=2, per_sm=2),
    ],
}


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr, sums_ptr, M, N, K, CHUNK,
    stride_am, stride_ak, stride_bk, stride_bn, stride_bias, stride_cm, stride_cn,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of C = act(A @ B + bias).

    With SPLIT, it sums CHUNK of K alone, and c is of partial sums, [parts, M, N]. With SUMS it adds
    up the rows of A besides, into sums [parts, M].
    """
    # Which tile: down GROUP_M block rows, then on to the next block column.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)  # the last group may be shorter
    pid_m = first_m + pid % (GROUP_M * blocks_n) % rows
    pid_n = pid % (GROUP_M * blocks_n) // rows

    if SPLIT:
        part = tl.program_id(1).to(tl.int64)
        a_ptr += part * CHUNK * stride_ak
        b_ptr += part * CHUNK * stride_bk
        c_ptr += part * M * N
        if SUMS:
            sums_ptr += part * M
        K = tl.minimum(K - part * CHUNK, CHUNK)

    # int64 before any product with a stride: an offset may pass 2^31 elements.
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # Rows and columns past the border wrap around: they read something valid that is never stored,
    # and the loads of the loop need no mask.
    a_ptrs = a_ptr + (offs_m % M * stride_am)[:, None] + (offs_k * stride_ak)[None, :]
    b_ptrs = b_ptr + (offs_k * stride_bk)[:, None] + (offs_n % N * stride_bn)[None, :]

    step_a = BLOCK_K * tl.cast(stride_ak, tl.int64)
    step_b = BLOCK_K * tl.cast(stride_bk, tl.int64)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    sums = tl.full((BLOCK_M,), 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptrs)  # [BLOCK_K, BLOCK_N]
        else:  # zeros past the end of K add nothing
            a = tl.load(a_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(a.to(tl.float32), axis=1)
        a_ptrs += step_a
        b_ptrs += step_b

    # The epilogue costs no memory traffic but the bias: the tile is still in registers.
    mask_n = offs_n < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    c_ptrs = c_ptr + (offs_m * stride_cm)[:, None] + (offs_n * stride_cn)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])
    if SUMS:
        if pid_n == 0:  # all block columns have the same
            tl.store(sums_ptr + offs_m, sums.to(sums_ptr.dtype.element_ty), mask=offs_m < M)


# --- The fast kernel ------------------------------------------------------------------------------
#
# On an H200 a 128x256 tile's step of 64 takes the tensor cores 1,024 clocks. Whatever else the SM
# does must fit beside that, or it is time lost. What changes, one thing at a time; each rung is a
# tile of `matmul_tma_kernel`, so `tilelab sweep matmul` times it:
#
#   the kernel above, 128x256x64    every thread computes addresses, and copies 16 bytes at a time
#   + TMA (PROGRAMS_PER_SM=0)       one thread asks for a whole tile [128, 64]: the tensor memory
#                                   accelerator makes the addresses, fills zeros past the border (so
#                                   no masks, no EVEN_K), and signals a barrier. It is told the
#                                   matrix by a descriptor, and stores the result likewise
#   + persistent (PROGRAMS_PER_SM=1)  as many programs as the GPU has SMs go through the tiles in
#                                   turns: nothing is started anew for a tile but its loads. With
#                                   two an SM, of smaller tiles, one multiplies while one stores
#   + subtiles (SUBTILES=2)         the result leaves through shared memory, 64 KiB for 128x256 in
#                                   16-bit. In two halves it needs 32, and a fourth stage takes the
#                                   rest: loads may be three steps ahead of the tensor cores
#   + warp specialisation           (kernel="tma_ws") four warps only load, and are already at the
#                                   next tile while the last one is stored; two groups of four only
#                                   multiply, 64 rows each, with the registers of those that load
#   + split-K (SPLIT_K > 1)         where C has fewer tiles than the GPU has SMs: the sum along K is
#                                   shared out, and a second kernel adds the parts up in order
#
# What triton 3.6.0 and 3.9.0 make of them, bfloat16 with bias and ReLU, for sm_90; not run:
#
#                             registers   shared memory   instructions a step    warps
#   pointers                  237, 207      144 KiB          98, 103               8
#   TMA, persistent or not    206, 162      208 KiB          91, 91                8
#   + subtiles, 4 stages      209, 176      224 KiB          90, 89                8
#   + warp specialisation     168, 168      208 KiB          64, 65                8 + 4 that load
#
# All of them are predicted to take as long at 8192 (perf/compiler/prediction.py: as long as the tensor cores
# take), since the model knows nothing of latency, and latency is what each rung hides.
#
# What is missing against cuBLAS: clusters. Two SMs at one block column could read B once between
# them, by multicast, and ask a third less of the L2 cache, which at 700 TFLOP/s hands out 8 TB/s.
# Triton does not multicast: with num_ctas=2 each SM loads all that it needs (3.6.0, 3.9.0).


@triton.jit
def _store_tile(
    c, acc, row, col, bias_ptr, stride_bias, N, HAS_BIAS: tl.constexpr, RELU: tl.constexpr
):
    """The epilogue: store act(acc + bias) at (row, col) of c, which clips it at the border."""
    if HAS_BIAS:
        offs_n = col.to(tl.int64) + tl.arange(0, acc.shape[1])
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    c.store([row, col], acc.to(c.dtype))


@triton.jit
def matmul_tma_kernel(
    a, b, bias_ptr, c, M, N, K, stride_a, stride_b, stride_bias, stride_c,
    A_T: tl.constexpr, B_T: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, SPLIT_K: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program computes every tile of C = act(A @ B + bias) whose number is its own, modulo.

    a, b and c are descriptors; A_T and B_T say that a and b are of A^T and B^T. With SPLIT_K > 1, c
    is of partial sums: [SPLIT_K * M, N] with M rounded up to whole tiles.
    """
    if WARP_SPECIALIZE:
        # The compiler splits the tiles among the warpgroups, and for that needs descriptors that
        # the program makes itself, of pointers and strides. It takes a few microseconds a program.
        if A_T:
            a_desc = tl.make_tensor_descriptor(a, [K, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
        else:
            a_desc = tl.make_tensor_descriptor(a, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        if B_T:
            b_desc = tl.make_tensor_descriptor(b, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
        else:
            b_desc = tl.make_tensor_descriptor(b, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
        c_desc = tl.make_tensor_descriptor(c, [M, N], [stride_c, 1], [BLOCK_M, BLOCK_N // SUBTILES])
    else:
        a_desc, b_desc, c_desc = a, b, c
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, SPLIT_K * BLOCK_K)  # along one part of K

    for work in tl.range(
        tl.program_id(0), blocks_m * blocks_n * SPLIT_K, tl.num_programs(0),
        warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        # Which tile, in the grouped order; and which part of its sum.
        pid, part = work, 0
        if SPLIT_K > 1:
            pid = work % (blocks_m * blocks_n)
            part = work // (blocks_m * blocks_n)
        first_m = pid // (GROUP_M * blocks_n) * GROUP_M
        rows = tl.minimum(blocks_m - first_m, GROUP_M)
        m = (first_m + pid % (GROUP_M * blocks_n) % rows) * BLOCK_M
        n = pid % (GROUP_M * blocks_n) // rows * BLOCK_N

        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for step in range(part * steps, part * steps + steps):
            k = step * BLOCK_K  # past the end of K there are zeros
            # A transposed tile stays as it lies in shared memory: tensor cores read both orders.
            if A_T:
                a_tile = a_desc.load([k, m]).T  # [BLOCK_M, BLOCK_K]
            else:
                a_tile = a_desc.load([m, k])
            if B_T:
                b_tile = b_desc.load([n, k]).T  # [BLOCK_K, BLOCK_N]
            else:
                b_tile = b_desc.load([k, n])
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)

        row = part * blocks_m * BLOCK_M + m
        if SUBTILES == 1:
            _store_tile(c_desc, acc, row, n, bias_ptr, stride_bias, N, HAS_BIAS, RELU)
        else:  # the left half, then the right one
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
            half: tl.constexpr = BLOCK_N // 2
            _store_tile(c_desc, left, row, n, bias_ptr, stride_bias, N, HAS_BIAS, RELU)
            _store_tile(c_desc, right, row, n + half, bias_ptr, stride_bias, N, HAS_BIAS, RELU)


@triton.jit
def matmul_reduce_kernel(
    partials_ptr, bias_ptr, c_ptr, row_partials_ptr, sums_ptr, M, N, rows, stride_bias,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of C = act(sum of partials + bias), always in the same order.

    partials [SPLIT_K, rows, N], rows >= M, and C [M, N] are row-major. With SUMS, sums [M] is the
    sum of row_partials [SPLIT_K, M] besides.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
    offs = (offs_m * N)[:, None] + offs_n[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for part in tl.range(SPLIT_K, loop_unroll_factor=8):  # so that eight loads are on their way
        part_ptr = partials_ptr + part * tl.cast(rows, tl.int64) * N
        acc += tl.load(part_ptr + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    tl.store(c_ptr + offs, acc.to(c_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        if tl.program_id(1) == 0:
            sums = tl.full((BLOCK_M,), 0.0, tl.float32)
            for part in tl.range(SPLIT_K, loop_unroll_factor=8):
                part_ptr = row_partials_ptr + part * tl.cast(M, tl.int64)
                sums += tl.load(part_ptr + offs_m, mask=offs_m < M, other=0.0)
            tl.store(sums_ptr + offs_m, sums.to(sums_ptr.dtype.element_ty), mask=offs_m < M)


# --- Which kernel, which tile ---------------------------------------------------------------------


def _operands(a, b, precision):
    """The rows of A and of B, as `tma_rows` has them, where the fast kernel can take both."""
    item, (M, K), N = a.element_size(), a.shape, b.shape[1]
    if not (M and N and K) or N * item % 16:  # C has rows, too
        return None
    if max(M, N, K) > 2**30:  # the unit's coordinates are of 32 bits
        return None
    rows_a, rows_b = tma_rows(a, item), tma_rows(b, item)
    if rows_a is None or rows_b is None:
        return None
    if item == 4 and (precision != "tf32" or rows_a[1] or not rows_b[1]):
        return None  # 32-bit tiles cannot be transposed on the way to the tensor cores
    return rows_a, rows_b


# Of an SM, in a clock: FLOPs in 16-bit (H100: 989 TFLOP/s / 132 SMs / 1.83 GHz), and bytes out of
# the L2 cache and of the memory. Then clocks: from a tile's first load to its first product and
# from its last to its store; of another launch; and of a part that is added up there, since a load
# takes 1,000 and eight are on their way. Estimates: a tuned table takes their place.
FLOPS_16, L2_BYTES, MEMORY_BYTES = 4096, 48, 20
TILE_CLOCKS, LAUNCH_CLOCKS, PART_CLOCKS = 2000, 4000, 125


def busiest_sm(tile: dict, tiles: int, steps: int, results: int, item: int, sms: int) -> float:
    """Clocks after which the SM with the most work is done.

    Args:
        tile: of a kernel that loads by TMA.
        tiles: of the result.
        steps: of BLOCK_K along the whole sum.
        results: elements of the result.
        item: bytes of an element.
        sms: how many SMs there are.
    """
    m, n, k, split = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    turns = cdiv(tiles * split, sms)
    # Two 128x128 tiles of float32 partial sums do not fit into an SM.
    per_sm = 1 if split > 1 and m > 64 else tile["PROGRAMS_PER_SM"]
    step = max(m * n * k * item / FLOPS_16, (m + n) * k * item / L2_BYTES)
    clocks = turns * (cdiv(steps, split) * step + TILE_CLOCKS / per_sm)
    if split == 1:
        return clocks
    traffic = results * (8 * split + item) / (MEMORY_BYTES * sms)
    return clocks + LAUNCH_CLOCKS + max(traffic, split * PART_CLOCKS)


@functools.lru_cache(maxsize=4096)
def fast_tile(M: int, N: int, K: int, item: int, sms: int) -> dict:
    """Of FAST_TILES the one, and the split of K, with which the busiest SM should be done first."""

    def clocks(tile: dict) -> float:
        tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
        return busiest_sm(tile, tiles, cdiv(K, tile["BLOCK_K"]), M * N, item, sms)

    tiles = [
        tile | dict(SPLIT_K=split)
        for tile in FAST_TILES[item]
        if tile["kernel"] == "tma"  # warp specialisation, when a GPU has shown that it pays
        for split in (1, 2, 4, 8, 16, 32, 64, 128)
        # Parts have four steps at least, and their float32 tiles fit into shared memory.
        if split == 1
        or (split * 4 * tile["BLOCK_K"] <= K and tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128)
    ]
    return min(tiles, key=clocks)


REDUCE_TILE = dict(BLOCK_M=4, BLOCK_N=128, num_warps=2)  # 32 bytes of each part a thread


def _matmul_tma(operands, bias, activation, c, tile, precision):
    """Launch the fast kernel, and where K is split the one that adds the parts up."""
    (a, a_t, a_shape, a_step), (b, b_t, b_shape, b_step) = operands
    (M, N), K = c.shape, a_shape[0 if a_t else 1]
    tile = tile.copy()
    specialize = tile.pop("kernel") == "tma_ws"
    m, n, k, split = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    programs = persistent(tile, cdiv(M, m) * cdiv(N, n) * split, device_of(c).sms)
    del tile["PROGRAMS_PER_SM"]
    rows = cdiv(M, m) * m
    out = c
    if split > 1:
        out = torch.empty(split * rows, N, dtype=torch.float32, device=c.device)
    matrices = a, b, out
    if not specialize:
        matrices = (
            descriptor(a, a_shape, (a_step, 1), [k, m] if a_t else [m, k]),
            descriptor(b, b_shape, (b_step, 1), [n, k] if b_t else [k, n]),
            descriptor(out, out.shape, (N, 1), [m, n // tile["SUBTILES"]]),
        )
    a_arg, b_arg, out_arg = matrices
    stride_bias = 0 if bias is None else bias.stride(0)
    ends = dict(HAS_BIAS=bias is not None, RELU=activation == "relu")
    launch(
        matmul_tma_kernel, (programs,), a_arg, b_arg, bias, out_arg, M, N, K,
        a_step, b_step, stride_bias, N, A_T=a_t, B_T=b_t,
        **({key: False for key in ends} if split > 1 else ends), PRECISION=precision,
        WARP_SPECIALIZE=specialize, **tile,
    )  # fmt: skip
    if split > 1:
        reduce_parts(out, bias, activation, c, M, N, rows, split)


def reduce_parts(partials, bias, activation, c, M, N, rows, parts, row_partials=None, sums=None):
    """Launch c = act(sum of partials + bias): partials [parts, rows, N], c [M, N] in its memory.

    And, if given, sums [M] of row_partials [parts, M].
    """
    tile = choose_tile("matmul_reduce", c.dtype, {c.itemsize: REDUCE_TILE}, M=M, N=N)
    launch(
        matmul_reduce_kernel, (cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"])),
        partials, bias, c, row_partials, sums, M, N, rows, 0 if bias is None else bias.stride(0),
        SPLIT_K=parts, HAS_BIAS=bias is not None, RELU=activation == "relu",
        SUMS=sums is not None, **tile,
    )  # fmt: skip


# Of as few results the portable kernel shares out a sum of as many steps.
SMALL, LONG = 2**15, 32


def matmul_into(c, a, b, bias, activation, precision, sums=None):
    """Launch c = act(a @ b + bias) for a row-major c [M, N], by the kernel that suits the operands.

    A convolution with a filter of one pixel is this too, and has a precision of its own. With
    `sums` [M], the portable kernel adds up the rows of `a` in the same pass.
    """
    (M, K), N = a.shape, b.shape[1]
    device, default, kernels = device_of(a), DEFAULT, ("pointer",)
    operands = _operands(a, b, precision) if len(device.kernels) > 1 and sums is None else None
    if operands is not None:
        # Without a loop along K there is nothing to specialise, and the compiler fails.
        kernels = device.kernels if K > 1 else device.kernels[:2]
        if device is not INTERPRETER:
            default = {a.itemsize: fast_tile(M, N, K, a.itemsize, device.sms)}
    tile = choose_tile("matmul", a.dtype, default, kernels, M=M, N=N, K=K)
    if "kernel" in tile:
        _matmul_tma(operands, bias, activation, c, tile, precision)
        return
    tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
    steps = cdiv(K, tile["BLOCK_K"])
    chunk, parts, out, out_sums = K, 1, c, sums
    if M * N <= SMALL and steps >= LONG:
        chunk, parts = into_chunks(K, tile["BLOCK_K"], splits(tiles, steps))
    if parts > 1:
        out = torch.empty(parts * M, N, dtype=torch.float32, device=c.device)
        if sums is not None:
            out_sums = torch.empty(parts, M, dtype=torch.float32, device=c.device)
    ends = dict(HAS_BIAS=bias is not None, RELU=activation == "relu")
    launch(
        matmul_kernel, (tiles, parts) if parts > 1 else (tiles,),
        a, b, bias, out, out_sums, M, N, K, chunk,
        *a.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *out.stride(),
        **(dict.fromkeys(ends, False) if parts > 1 else ends), EVEN_K=K % tile["BLOCK_K"] == 0,
        PRECISION=precision, SPLIT=parts > 1, SUMS=sums is not None, **tile,
    )  # fmt: skip
    if parts > 1:
        reduce_parts(out, bias, activation, c, M, N, M, parts, out_sums, sums)


@torch.library.custom_op("tilelab::matmul", mutates_args=())
def _matmul(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    c = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    matmul_into(c, a, b, bias, activation, dot_precision(a.dtype, torch.backends.cuda.matmul))
    return c


@_matmul.register_fake
def _(a, b, bias, activation):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("tilelab::matmul_weight_bias_grad", mutates_args=())
def _weight_bias_grad(a: torch.Tensor, dc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dB^T [N, K], dbias [N]) of C = A @ B + bias, in one pass over dC: its rows are both sums."""
    db = torch.empty(dc.shape[1], a.shape[1], dtype=a.dtype, device=a.device)
    dbias = torch.empty(dc.shape[1], dtype=a.dtype, device=a.device)
    precision = dot_precision(a.dtype, torch.backends.cuda.matmul)
    matmul_into(db, dc.t(), a, None, None, precision, sums=dbias)
    return db, dbias


@_weight_bias_grad.register_fake
def _(a, dc):
    return a.new_empty(dc.shape[1], a.shape[1]), a.new_empty(dc.shape[1])


def _setup_context(ctx, inputs, output):
    a, b, _, activation = inputs
    ctx.in_columns = [x.stride(0) == 1 != x.stride(1) for x in (a, b)]
    needs_da, needs_db, *_ = ctx.needs_input_grad
    saved = a if needs_db else None, b if needs_da else None
    ctx.save_for_backward(*saved, output if activation == "relu" else None)


def _product(a, b, in_columns):
    """Return a @ b, in columns if its operand was: else autograd would copy a weight's gradient."""
    if in_columns:
        return _matmul(b.t(), a.t(), None, None).t()
    return _matmul(a, b, None, None)


def _backward(ctx, dc):
    a, b, c = ctx.saved_tensors
    da = db = dbias = None
    if c is not None:  # through the ReLU, and the bias gradient in the same pass
        dc, dbias = bias_relu_backward(dc, c)
    elif ctx.needs_input_grad[2]:
        small = ctx.needs_input_grad[1] and 0 < a.shape[1] * dc.shape[1] <= SMALL
        if small and ctx.in_columns[1]:  # a classifier's, in one pass
            db, dbias = _weight_bias_grad(a, dc)
            db = db.t()
        else:
            dbias = bias_backward(dc)
    if ctx.needs_input_grad[0]:
        da = _product(dc, b.t(), ctx.in_columns[0])
    if ctx.needs_input_grad[1] and db is None:
        db = _product(a.t(), dc, ctx.in_columns[1])
    return da, db, dbias if ctx.needs_input_grad[2] else None, None


_matmul.register_autograd(_backward, setup_context=_setup_context)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Compute `act(a @ b + bias)`, accumulated in float32, differentiable in a, b and bias.

    Args:
        a: [M, K]; float32, float16 or bfloat16; any strides, so transposed views cost no copy.
        b: [K, N], of a's dtype; any strides.
        bias: [N], of a's dtype, or None.
        activation: None or "relu".

    Returns:
        [M, N] of a's dtype, row-major. float32 products are rounded to TF32 on the GPU where
        `torch.backends.cuda.matmul.allow_tf32` (or its newer `fp32_precision`) says so.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the tensors.
        ValueError: shapes that do not fit, or an unknown activation.

    Source: torch.addmm and torch.relu.

    Example:
        >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-4.0]]), activation="relu")
        tensor([[0.]])
    """
    a, b, bias = autocast(a, b, bias)
    check_tensors(a=a, b=b, bias=bias, optional=("bias",))
    check_shape("a", a, "[M, K]", M=None, K=None)
    check_shape("b", b, "[K, N]", K=a.shape[1], N=None)
    if bias is not None:
        check_shape("bias", bias, "[N]", N=b.shape[1])
    check_choice("activation", activation, (None, "relu"))
    return _matmul(a, b, bias, activation)
