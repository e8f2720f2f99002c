"""A view of a tensor of any layout as rows, for the lessons that work along one dimension.

Bias-ReLU, softmax and cross-entropy work along one dimension, and treat all others alike. They see
a tensor of up to four dimensions as [D0, D1, D2, L]. L is the dimension that they work along; the
other three number the rows. Any strides are allowed, so nothing is copied:

    x [N, C, H, W], dim=1, channels_last   ->  [N*H*W, 1, 1, C], strides (C, 0, 0, 1)
    x [N, C, H, W], dim=1, contiguous      ->  [N, H*W, 1, C],   strides (C*H*W, 1, 0, H*W)
    x [M, N],       dim=0                  ->  [N, 1, 1, M],     strides (1, 0, 0, N)

Neighbouring dimensions become one if they lie in memory like one, as in the first two lines. This
is worth the trouble for two reasons:

1. `row_offsets` finds a row by a division and a remainder of 64 bits for D1, and the same for D2.
   If a size is 1, they cost nothing, because Triton compiles a kernel of its own for arguments
   that are 1.
2. A load can take 16 bytes along a dimension only if its size is a multiple of 16. H*W is one more
   often than W is.
"""

import itertools

import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter needs this name in the module

# An option of the compiler, for sums of products along a row. Several threads hold such a sum. With
# fused operations each of two threads that add up their products rounds only that of the other:
# a * b + round(c * d). Their sums would differ in the last bit, and which of them is stored would
# be chance. But the bits have to be the same on every run.
UNFUSED = dict(enable_fp_fusion=False)


def as_rows(dim: int, *tensors: torch.Tensor) -> tuple[int, ...]:
    """Return (D0, D1, D2, L) and then, for each tensor, its four strides in this order.

    All tensors have the same shape, of at most four dimensions, and their rows get the same
    numbers. For a tensor without the dimension `dim`, pass `t.unsqueeze(dim)` and ignore its last
    stride.
    """
    shape = list(tensors[0].shape or (1,))  # a tensor without dimensions is one element
    strides = [list(t.stride() or (1,)) for t in tensors]
    length, along = shape.pop(dim), [s.pop(dim) for s in strides]
    sizes: list[int] = []
    merged: list[tuple[int, ...]] = []  # for each size, the strides of all tensors
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
    """Return the offset, in elements, at which each of `rows` (int64) begins."""
    outer = rows // D2
    return outer // D1 * stride_0 + outer % D1 * stride_1 + rows % D2 * stride_2
