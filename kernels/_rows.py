"""Rows of a tensor of any layout, and sums of partial results, for the lessons that need them.

Bias-ReLU, softmax and cross-entropy all work along one dimension and treat the others alike. They
see a tensor of up to four dimensions as [D0, D1, D2, L]: L is the dimension they work along, the
other three number the rows. Any strides will do, so nothing is copied:

    x [N, C, H, W], dim=1, channels_last   ->  [N*H*W, 1, 1, C], strides (C, 0, 0, 1)
    x [N, C, H, W], dim=1, contiguous      ->  [N, H*W, 1, C],   strides (C*H*W, 1, 0, H*W)
    x [M, N],       dim=0                  ->  [N, 1, 1, M],     strides (1, 0, 0, N)

Neighbours that lie in memory like one dimension become one, as in the first two. It is worth the
trouble: each dimension but the last costs a row two divisions of 64 bits, and a division by 1 is
none (Triton compiles a kernel of its own where an argument is 1). Also H*W is a multiple of 16 more
often than W is, and only what is known to be one can be read along in 16-byte loads.
"""

import itertools

import torch
import triton
import triton.language as tl
from tilelab.kernels._launch import cdiv, choose_tile, launch

# Of partial results there are few columns and many rows where they make the gradient of a bias, and
# the other way round where they make that of a weight.
FEW_ROWS = dict(BLOCK_N=512, num_warps=4)
FEW_COLUMNS = dict(BLOCK_N=16, num_warps=4)  # programs for as many SMs as there can be
MANY_OF_BOTH = dict(BLOCK_N=128, num_warps=4)
SUM_ELEMENTS = 4096  # at a time: eight 16-byte loads of each thread in flight


def as_rows(dim: int, *tensors: torch.Tensor) -> tuple[int, ...]:
    """Return (D0, D1, D2, L) and, for each tensor, its four strides in this order.

    The tensors have one shape, of four dimensions at most, and their rows get the same numbers. Of
    a tensor without `dim` give `t.unsqueeze(dim)`: its last stride means nothing.
    """
    shape = list(tensors[0].shape or (1,))  # a tensor without dimensions is one element
    strides = [list(t.stride() or (1,)) for t in tensors]
    length, along = shape.pop(dim), [s.pop(dim) for s in strides]
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []  # of each size, the strides of all tensors
    for size, step in zip(shape, zip(*strides, strict=True), strict=True):
        if size == 1:
            continue
        if sizes and all(a == size * b for a, b in zip(steps[-1], step, strict=True)):
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    missing = 3 - len(sizes)
    steps += [(0,) * len(tensors)] * missing
    return *sizes, *[1] * missing, length, *itertools.chain(*zip(*steps, along, strict=True))


@triton.jit
def row_offsets(rows, D1, D2, stride_0, stride_1, stride_2):
    """Where each of `rows` (int64) begins, in elements."""
    outer = rows // D2
    return outer // D1 * stride_0 + outer % D1 * stride_1 + rows % D2 * stride_2


@triton.jit
def _sum_columns(
    block, partials_ptr, out_ptr, SIZE, SPLITS, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Block `block` of out, BLOCK_N column sums of partials [SPLITS, SIZE].

    It takes BLOCK_S rows at a time: of many, one by one, each would cost it the latency of a load.
    """
    offs = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < SIZE
    if BLOCK_S == 1:
        out = tl.full((BLOCK_N,), 0.0, tl.float32)
        for _ in range(0, SPLITS):
            out += tl.load(partials_ptr + offs, mask=mask, other=0.0)
            partials_ptr += SIZE
    else:
        rows = tl.arange(0, BLOCK_S).to(tl.int64)
        acc = tl.full((BLOCK_S, BLOCK_N), 0.0, tl.float32)
        for s in range(0, SPLITS, BLOCK_S):
            ptrs = partials_ptr + ((s + rows) * SIZE)[:, None] + offs[None, :]
            both = (s + rows < SPLITS)[:, None] & mask[None, :]
            acc += tl.load(ptrs, mask=both, other=0.0)
        out = tl.sum(acc, axis=0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(
    partials_ptr, out_ptr, SIZE, SPLITS, more_ptr, more_out_ptr, MORE_SIZE, MORE_SPLITS,
    MORE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N column sums of partials, or where there are MORE, of those."""
    block = tl.program_id(0)
    blocks = tl.cdiv(SIZE, BLOCK_N)
    if MORE:
        if block >= blocks:
            more = block - blocks
            _sum_columns(more, more_ptr, more_out_ptr, MORE_SIZE, MORE_SPLITS, BLOCK_S, BLOCK_N)
        else:
            _sum_columns(block, partials_ptr, out_ptr, SIZE, SPLITS, BLOCK_S, BLOCK_N)
    else:
        _sum_columns(block, partials_ptr, out_ptr, SIZE, SPLITS, BLOCK_S, BLOCK_N)


def sum_partials(
    partials: torch.Tensor,
    out: torch.Tensor,
    more: torch.Tensor | None = None,
    more_out: torch.Tensor | None = None,
) -> None:
    """`out[...] = partials.sum(0)`, in the same order always: the same input gives the same bits.

    Args:
        partials: float32 [SPLITS, ...], contiguous.
        out: any floating dtype, of as many elements as one partial, dense in the same order.
        more: further partials, in the same launch: of no more rows and elements, since the tile is
            for the first.
        more_out: their sums.
    """
    size, splits = out.numel(), partials.shape[0]
    few = splits <= 8  # the compiler has several of them in flight at a time
    default = FEW_ROWS if few else FEW_COLUMNS if size <= 4096 else MANY_OF_BOTH
    tile = choose_tile("sum_partials", partials.dtype, {4: default}, N=size)
    block_s = 1 if few else max(1, SUM_ELEMENTS // tile["BLOCK_N"])
    block_s = min(block_s, triton.next_power_of_2(splits))
    more_size, more_splits = (0, 0) if more is None else (more_out.numel(), more.shape[0])
    blocks = cdiv(size, tile["BLOCK_N"]) + cdiv(more_size, tile["BLOCK_N"])
    launch(
        sum_partials_kernel, (blocks,),
        partials, out, size, splits, more, more_out, more_size, more_splits,
        MORE=more is not None, BLOCK_S=block_s, **tile,
    )  # fmt: skip
