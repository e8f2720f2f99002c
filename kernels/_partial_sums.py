"""The second pass of a sum in parts: it adds the parts up, always in the same order.

If a sum is long and has few results, many programs share it. Each program adds up one part, and
writes a partial sum in float32. Then a kernel of this file reads all partial sums and writes the
result. The order is fixed, so the same input gives the same bits. With atomics, programs would add
to one result in any order.

    partial sums [parts, SIZE]              result [SIZE]

        part 0    | . . # # . . |
        part 1    | . . # # . . |    -->    | . . # # . . |    # is what one program adds up
        part 2    | . . # # . . |

    sum_partials    out = sum of partials              for gradients of weights and biases
    reduce_parts    C = act(sum of partials + bias)    for matrix products and convolutions

What limits both: memory. They do one addition for each partial sum that they read.
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.activation import activate

# Partial sums for the gradient of a bias have many rows (parts) and few columns. Those for the
# gradient of a weight have few rows and many columns.
FEW_ROWS = dict(BLOCK_N=512, num_warps=4)
FEW_COLUMNS = dict(BLOCK_N=16, num_warps=4)  # narrow blocks give more programs, for more SMs
MANY_OF_BOTH = dict(BLOCK_N=128, num_warps=4)
# A program loads at most this many elements at a time. They are 16 KiB, so each of its 128 threads
# has eight loads of 16 bytes in flight.
SUM_ELEMENTS = 4096
# A tile of one part is 2 KiB, so each of 64 threads has 32 bytes of it.
REDUCE_TILE = dict(BLOCK_M=4, BLOCK_N=128, num_warps=2)


@triton.jit
def _sum_columns(
    block, partials_ptr, out_ptr, SIZE, parts, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store block number `block` of out: BLOCK_N column sums of partials [parts, SIZE].

    BLOCK_S rows are loaded at a time. One by one, each of many rows would cost the latency of a
    load.
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
    """One program computes BLOCK_N column sums of partials.

    With MORE, the programs after those of partials do the same for `more`.
    """
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
    """Compute `out[...] = partials.sum(0)`. The order is fixed: the same input gives the same bits.

    Args:
        partials: float32 [parts, ...], contiguous.
        out: the result, of any floating dtype. It has as many elements as one part, and is dense in
            the same order.
        more: further partial sums, for the same launch. The tile is chosen for `partials`, so these
            should have no more rows and elements.
        more_out: the sums of `more`.
    """
    size, parts = out.numel(), partials.shape[0]
    few = parts <= 8  # the compiler keeps several of so few loads in flight
    default = FEW_ROWS if few else FEW_COLUMNS if size <= 4096 else MANY_OF_BOTH
    tile = choose_tile("sum_partials", partials, {4: default}, N=size)
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

    partials [SPLIT_K, rows, N] and C [M, N] are row-major; rows >= M. With SUMS it also adds up
    row_partials [SPLIT_K, M], into sums [M].
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
    offs = (offs_m * N)[:, None] + offs_n[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for part in tl.range(SPLIT_K, loop_unroll_factor=8):  # eight loads are in flight
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


def first_pass(bias, activation, parts):
    """Return what a kernel does with its sum: nothing if `reduce_parts` adds up its parts later."""
    whole = parts == 1
    return dict(HAS_BIAS=whole and bias is not None, ACTIVATION=activation if whole else None)


def reduce_parts(partials, bias, activation, c, M, N, rows, parts, row_partials=None, sums=None):
    """Launch c = act(sum of partials + bias), for partials [parts, rows, N].

    The memory of c is a row-major [M, N]; c itself can have more dimensions. If `sums` [M] is
    given, the launch also adds up row_partials [parts, M] into it.
    """
    tile = choose_tile("matmul_reduce", c, {c.itemsize: REDUCE_TILE}, M=M, N=N)
    launch(
        matmul_reduce_kernel, (cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"])),
        partials, bias, c, row_partials, sums, M, N, rows, 0 if bias is None else bias.stride(0),
        SPLIT_K=parts, HAS_BIAS=bias is not None, ACTIVATION=activation,
        SUMS=sums is not None, **tile,
    )  # fmt: skip
