"""Rows of a tensor of any layout, for the lessons that work along one dimension.

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
import triton.language as tl  # noqa: F401  the interpreter looks for it beside a function


def as_rows(dim: int, *tensors: torch.Tensor) -> tuple[int, ...]:
    """Return (D0, D1, D2, L) and, for each tensor, its four strides in this order.

    The tensors have one shape, of four dimensions at most, and their rows get the same numbers. Of
    a tensor without `dim` give `t.unsqueeze(dim)`: its last stride means nothing.
    """
    shape = list(tensors[0].shape or (1,))  # a tensor without dimensions is one element
    strides = [list(t.stride() or (1,)) for t in tensors]
    length, along = shape.pop(dim), [s.pop(dim) for s in strides]
    sizes: list[int] = []
    merged: list[tuple[int, ...]] = []  # of each size, the strides of all tensors
    for size, each in zip(shape, zip(*strides, strict=True), strict=True):
        if size == 1:
            continue
        if sizes and all(a == size * b for a, b in zip(merged[-1], each, strict=True)):
            sizes[-1] *= size
            merged[-1] = each
        else:
            sizes.append(size)
            merged.append(each)
    missing = 3 - len(sizes)
    merged += [(0,) * len(tensors)] * missing
    return *sizes, *[1] * missing, length, *itertools.chain(*zip(*merged, along, strict=True))


@triton.jit
def row_offsets(rows, D1, D2, stride_0, stride_1, stride_2):
    """Where each of `rows` (int64) begins, in elements."""
    outer = rows // D2
    return outer // D1 * stride_0 + outer % D1 * stride_1 + rows % D2 * stride_2
