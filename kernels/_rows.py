"""Rows of a tensor of any layout, and sums of partial results, for the lessons that need them.

Bias-ReLU, softmax and cross-entropy all work along one dimension and treat the others alike. They
see a tensor of up to four dimensions as [D0, D1, D2, L]: L is the dimension they work along, the
other three number the rows. Any strides will do, so nothing is copied:

    x [N, C, H, W], dim=1, channels_last   ->  [N, H, W, C], strides (H*W*C, W*C, C, 1)
    x [N, C, H, W], dim=1, contiguous      ->  [N, H, W, C], strides (C*H*W, W, 1, H*W)
    x [M, N],       dim=0                  ->  [1, 1, N, M], strides (0, 0, 1, N)
"""

import torch
import triton
import triton.language as tl

from kernels._launch import cdiv, choose_tile, launch

SUM_DEFAULT = {4: dict(BLOCK_N=128, num_warps=4)}  # partial results are float32 and few


def as_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The view [D0, D1, D2, L] of `x`, at most four-dimensional, with `dim` last."""
    x = x.movedim(dim, -1)
    return x[(None,) * (4 - x.dim())]


@triton.jit
def row_offsets(rows, D1, D2, stride_0, stride_1, stride_2):
    """Where each of `rows` (int64) begins, in elements."""
    i2 = rows % D2
    i1 = (rows // D2) % D1
    i0 = rows // (D2 * D1)
    return i0 * stride_0 + i1 * stride_1 + i2 * stride_2


@triton.jit
def sum_partials_kernel(partials_ptr, out_ptr, SIZE, SPLITS, BLOCK_N: tl.constexpr):
    """One program computes BLOCK_N elements of out, the column sums of partials [SPLITS, SIZE]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.full((BLOCK_N,), 0.0, tl.float32)
    for _ in range(0, SPLITS):
        acc += tl.load(partials_ptr + offs, mask=offs < SIZE, other=0.0)
        partials_ptr += SIZE
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < SIZE)


def sum_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """`out[...] = partials.sum(0)`, in the same order always: the same input gives the same bits.

    Args:
        partials: float32 [SPLITS, ...], contiguous.
        out: any floating dtype, of as many elements as one partial, dense in the same order.
    """
    size = out.numel()
    tile = choose_tile("sum_partials", partials.dtype, SUM_DEFAULT, N=size)
    grid = (cdiv(size, tile["BLOCK_N"]),)
    launch(sum_partials_kernel, grid, partials, out, size, partials.shape[0], **tile)
