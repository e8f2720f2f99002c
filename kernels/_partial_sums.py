"""The second pass of a sum in parts: it adds the parts up, always in the same order.

A long sum with few results is shared out among many programs, each of which writes a partial sum in
float32. A kernel of this file reads them all and writes the result: the same input gives the same
bits, which atomics would not.

    sum_partials    out = sum of partials           of the gradients of weights and biases
    reduce_parts    C = act(sum of partials + bias) of products: rows may be padded to whole tiles
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.activation import activate

# Of partial results there are few columns and many rows where they make the gradient of a bias, and
# the other way round where they make that of a weight.
FEW_ROWS = dict(BLOCK_N=512, num_warps=4)
FEW_COLUMNS = dict(BLOCK_N=16, num_warps=4)  # programs for as many SMs as there can be
MANY_OF_BOTH = dict(BLOCK_N=128, num_warps=4)
SUM_ELEMENTS = 4096  # at a time: eight 16-byte loads of each thread in flight
REDUCE_TILE = dict(BLOCK_M=4, BLOCK_N=128, num_warps=2)  # 32 bytes of each part a thread


@triton.jit
def _sum_columns(
    block, partials_ptr, out_ptr, SIZE, parts, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Block `block` of out, BLOCK_N column sums of partials [parts, SIZE].

    It takes BLOCK_S rows at a time: of many, one by one, each would cost it the latency of a load.
    """
    offs = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < SIZE
    if BLOCK_S == 1:
        out = tl.full((BLOCK_N,), 0.0, tl.float32)
        for _ in range(0, parts):
            out += tl.load(partials_ptr + offs, mask=mask, other=0.0)
            partials_ptr += SIZE
    else:
        rows = tl.arange(0, BLOCK_S).to(tl.int64)
        acc = tl.full((BLOCK_S, BLOCK_N), 0.0, tl.float32)
        for s in range(0, parts, BLOCK_S):
            ptrs = partials_ptr + ((s + rows) * SIZE)[:, None] + offs[None, :]
            both = (s + rows < parts)[:, None] & mask[None, :]
            acc += tl.load(ptrs, mask=both, other=0.0)
        out = tl.sum(acc, axis=0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(
    partials_ptr, out_ptr, SIZE, parts, more_ptr, more_out_ptr, MORE_SIZE, more_parts,
    MORE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N column sums of partials, or where there are MORE, of those."""
    block = tl.program_id(0)
    blocks = tl.cdiv(SIZE, BLOCK_N)
    if MORE:
        if block >= blocks:
            more = block - blocks
            _sum_columns(more, more_ptr, more_out_ptr, MORE_SIZE, more_parts, BLOCK_S, BLOCK_N)
        else:
            _sum_columns(block, partials_ptr, out_ptr, SIZE, parts, BLOCK_S, BLOCK_N)
    else:
        _sum_columns(block, partials_ptr, out_ptr, SIZE, parts, BLOCK_S, BLOCK_N)


def sum_partials(
    partials: torch.Tensor,
    out: torch.Tensor,
    more: torch.Tensor | None = None,
    more_out: torch.Tensor | None = None,
) -> None:
    """`out[...] = partials.sum(0)`, in the same order always: the same input gives the same bits.

    Args:
        partials: float32 [parts, ...], contiguous.
        out: any floating dtype, of as many elements as one partial, dense in the same order.
        more: further partials, in the same launch: of no more rows and elements, since the tile is
            for the first.
        more_out: their sums.
    """
    size, parts = out.numel(), partials.shape[0]
    few = parts <= 8  # the compiler has several of them in flight at a time
    default = FEW_ROWS if few else FEW_COLUMNS if size <= 4096 else MANY_OF_BOTH
    tile = choose_tile("sum_partials", partials.dtype, {4: default}, N=size)
    block_s = 1 if few else max(1, SUM_ELEMENTS // tile["BLOCK_N"])
    block_s = min(block_s, triton.next_power_of_2(parts))
    more_size, more_parts = (0, 0) if more is None else (more_out.numel(), more.shape[0])
    blocks = cdiv(size, tile["BLOCK_N"]) + cdiv(more_size, tile["BLOCK_N"])
    launch(
        sum_partials_kernel, (blocks,),
        partials, out, size, parts, more, more_out, more_size, more_parts,
        MORE=more is not None, BLOCK_S=block_s, **tile,
    )  # fmt: skip


@triton.jit
def matmul_reduce_kernel(
    partials_ptr, bias_ptr, c_ptr, row_partials_ptr, sums_ptr, M, N, rows, stride_bias,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SUMS: tl.constexpr,
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
    acc = activate(acc, ACTIVATION)
    tl.store(c_ptr + offs, acc.to(c_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        if tl.program_id(1) == 0:
            sums = tl.full((BLOCK_M,), 0.0, tl.float32)
            for part in tl.range(SPLIT_K, loop_unroll_factor=8):
                part_ptr = row_partials_ptr + part * tl.cast(M, tl.int64)
                sums += tl.load(part_ptr + offs_m, mask=offs_m < M, other=0.0)
            tl.store(sums_ptr + offs_m, sums.to(sums_ptr.dtype.element_ty), mask=offs_m < M)


def reduce_parts(partials, bias, activation, c, M, N, rows, parts, row_partials=None, sums=None):
    """Launch c = act(sum of partials + bias): partials [parts, rows, N], c [M, N] in its memory.

    And, if given, sums [M] of row_partials [parts, M].
    """
    tile = choose_tile("matmul_reduce", c.dtype, {c.itemsize: REDUCE_TILE}, M=M, N=N)
    launch(
        matmul_reduce_kernel, (cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"])),
        partials, bias, c, row_partials, sums, M, N, rows, 0 if bias is None else bias.stride(0),
        SPLIT_K=parts, HAS_BIAS=bias is not None, ACTIVATION=activation,
        SUMS=sums is not None, **tile,
    )  # fmt: skip
