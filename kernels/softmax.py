"""Softmax along any dimension: y = exp(x) / sum(exp(x)), and its gradient.

    forward     y[n]  = exp(x[n] - m) / s        m = maximum of the row, s = sum of exp(x - m)
    backward    dx[n] = y[n] * (dy[n] - sum of y * dy over the row)

Subtracting the maximum does not change y: it divides the numerator and the denominator by exp(m).
It keeps every exponent at or below 0, so exp cannot overflow.

               N                                       N
         +-----------+                      +---+---+---+---+
         |           |                      | 1>| 2>| 3>| 4>|   first walk: m and s
     M   |###########|  BLOCK_M rows        +---+---+---+---+
         |           |                      |<8 |<7 |<6 |<5 |   second walk: y
         +-----------+                      +---+---+---+---+
    short rows: one program holds           long rows: one program walks along BLOCK_M rows twice,
    BLOCK_M whole rows in registers         forwards and backwards, BLOCK_N columns at a time

The long rows need the online form of softmax. Its first walk finds m and s together, although s
depends on m. It corrects a sum that was taken with a smaller maximum by one factor:

    for each block x of the row:
        m_new = max(m, max(x))
        s = s * exp(m - m_new) + sum of exp(x - m_new)
        m = m_new

Memory traffic limits the speed. n = M*N elements of e bytes move these bytes:

    bytes moved          forward                        backward
    rows in registers    2ne   read x, write y          3ne   read y and dy, write dx
    online               3ne   read x twice, write y    5ne   read y and dy twice, write dx
    torch, op by op      8ne   max, -, exp, sum, /      9ne   *, sum, -, *

In registers the forward should therefore take a quarter of torch's time, the backward a third. The
second read of an online kernel comes from the L2 cache if the rows in flight fit there. The forward
needs about 5n FLOPs: 1.25 FLOPs per byte in 16-bit. An H200 could do 206 per byte.

Read first: bias_relu.py. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax
(2018); Triton's tutorial 02 for the rows in registers.
"""

import math

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import check_tensors, reduction_dtype
from tilelab.kernels._launch import launch
from tilelab.kernels._rows import UNFUSED, as_rows, row_offsets
from tilelab.kernels._tiles import cdiv, choose_tile


def reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The same in plain torch, for any dtype."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


# If BLOCK_N covers the row, the row stays in registers; otherwise the online kernel runs.
#
# Compiled for sm_80, sm_90, sm_100 and gfx942, no tile spills. Threads load and store 16 bytes at a
# time where rows are contiguous and their length and stride are multiples of 16 elements.
#
# In 16-bit, instructions come close to being the limit too. A warp moves 512 bytes when each of its
# 32 threads moves 16 bytes. In the time this takes, an H200 can issue 99 instructions for a warp:
#
#     4 instructions a clock * 1.755 GHz * 132 SMs (its processors) * 512 bytes / 4.8 TB/s = 99
#
#     compiled for sm_90 (H100, H200)                       forward      backward
#     contiguous rows, instructions per 16 bytes moved      48 to 64     27 to 37
#     strided rows, instructions per 16 bytes moved         88           49
TILES = [
    dict(BLOCK_M=64, BLOCK_N=32, num_warps=4),  # short rows, such as the scores of ten classes
    # One warp (32 threads) holds a whole row, so no reduction crosses warps.
    dict(BLOCK_M=16, BLOCK_N=128, num_warps=4),
    # In 16-bit this is the longest such row: 32 threads load 8 elements each.
    dict(BLOCK_M=8, BLOCK_N=256, num_warps=4),
    dict(BLOCK_M=4, BLOCK_N=1024, num_warps=2),  # Each thread holds 64 values, 16 of each row.
    dict(BLOCK_M=1, BLOCK_N=4096, num_warps=4),
    # Each thread holds 32 values; in the backward it holds 64, since y and dy are two inputs.
    dict(BLOCK_M=1, BLOCK_N=16384, num_warps=16),
    # The online kernels use this tile. In 16-bit, each thread has two 16-byte loads in flight.
    dict(BLOCK_M=1, BLOCK_N=8192, num_warps=16),
    # A strided dimension uses this tile: there, neighbours in memory belong to different rows.
    dict(BLOCK_M=64, BLOCK_N=64, num_warps=4),
]
IN_REGISTERS, ONLINE, STRIDED = TILES[:6], TILES[6], TILES[7]

# GPUs have an instruction for 2^x, and exp(x) = 2^(x * log2(e)). `tl.exp` adds three instructions
# to it, which preserve results below 2^-126. Here such results become 0.
LOG2_E = tl.constexpr(math.log2(math.e))
# An online maximum starts at LOWEST, not at -inf. If it started at -inf and a row began with -inf,
# -inf - (-inf) would be NaN, and s would stay NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def row_tile(op: str, x: torch.Tensor, M: int, N: int, stride_n: int) -> dict:
    """Return the tile for M rows of N elements of x. Neighbours in a row are `stride_n` apart."""
    default = STRIDED
    if stride_n == 1:  # Take the first tile that holds a whole row.
        default = next((tile for tile in IN_REGISTERS if N <= tile["BLOCK_N"]), ONLINE)
    return choose_tile(op, x, {x.itemsize: default}, M=M, N=N)


def group(x: torch.Tensor, tile: dict, stride_n: int) -> dict:
    """Return GROUP for an online kernel: the elements in a 16-byte load, or 1 for strided rows."""
    return dict(GROUP=min(16 // x.element_size(), tile["BLOCK_N"]) if stride_n == 1 else 1)


@triton.jit
def softmax_kernel(
    x_ptr, y_ptr, M, N, D1, D2,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M whole rows of y in registers: N <= BLOCK_N.

    Rows are numbered through [D0, D1, D2]; _rows.py explains D1, D2 and the strides.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # [BLOCK_M, BLOCK_N]

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_ptrs = x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :]
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)  # exp(-inf) adds 0.
    # tl.max ignores a NaN, but tl.sum does not. A row of only -inf is NaN: -inf - (-inf).
    e = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2_E)
    y = e * (1.0 / tl.sum(e, axis=1))[:, None]  # one division per row

    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_ptrs = y_ptr + rows[:, None] + (offs_n * stride_yn)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_online_kernel(
    x_ptr, y_ptr, M, N, D1, D2,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of y, of any length. It walks along them twice."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_rows = x_ptr + rows[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_rows = y_ptr + rows[:, None]

    # A maximum over the whole block would make threads wait for each other in every iteration. So
    # each group of GROUP columns has its own m and s. One thread loads a group in one load, and the
    # loop needs no other thread. After the loop, the same rule combines the groups of a row.
    m = tl.full((BLOCK_M, BLOCK_N // GROUP), LOWEST, tl.float32)
    s = tl.full((BLOCK_M, BLOCK_N // GROUP), 0.0, tl.float32)
    for n in range(0, N, BLOCK_N):
        offs = n + offs_n
        mask = mask_m & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_rows + (offs * stride_xn)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        x = tl.reshape(x, (BLOCK_M, BLOCK_N // GROUP, GROUP))
        m_new = tl.maximum(m, tl.max(x, axis=2))
        e = tl.exp2((x - m_new[:, :, None]) * LOG2_E)
        s = s * tl.exp2((m - m_new) * LOG2_E) + tl.sum(e, axis=2)
        m = m_new
    top = tl.max(m, axis=1)[:, None]  # [BLOCK_M, 1]
    s = tl.sum(s * tl.exp2((m - top) * LOG2_E), axis=1)
    scale = (1.0 / s)[:, None]  # A row of only -inf has s = 0, and below 0 * (1 / 0) = NaN.

    last = (N - 1) // BLOCK_N * BLOCK_N
    for n in range(0, N, BLOCK_N):  # Walk backwards: the cache still holds the end of the row.
        offs = last - n + offs_n
        mask = mask_m & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_rows + (offs * stride_xn)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        y = tl.exp2((x - top) * LOG2_E) * scale
        y_ptrs = y_rows + (offs * stride_yn)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_backward_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, D1, D2,
    stride_dy0, stride_dy1, stride_dy2, stride_dyn, stride_y0, stride_y1, stride_y2, stride_yn,
    stride_dx0, stride_dx1, stride_dx2, stride_dxn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M whole rows of dx in registers: N <= BLOCK_N."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # [BLOCK_M, BLOCK_N]

    rows = row_offsets(offs_m, D1, D2, stride_dy0, stride_dy1, stride_dy2)
    dy_ptrs = dy_ptr + rows[:, None] + (offs_n * stride_dyn)[None, :]
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_ptrs = y_ptr + rows[:, None] + (offs_n * stride_yn)[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(y * dy, axis=1)[:, None])

    rows = row_offsets(offs_m, D1, D2, stride_dx0, stride_dx1, stride_dx2)
    dx_ptrs = dx_ptr + rows[:, None] + (offs_n * stride_dxn)[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_backward_online_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, D1, D2,
    stride_dy0, stride_dy1, stride_dy2, stride_dyn, stride_y0, stride_y1, stride_y2, stride_yn,
    stride_dx0, stride_dx1, stride_dx2, stride_dxn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of dx, of any length.

    Its first walk sums y * dy over each row; its second walk, backwards, computes dx.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_dy0, stride_dy1, stride_dy2)
    dy_rows = dy_ptr + rows[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_rows = y_ptr + rows[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_dx0, stride_dx1, stride_dx2)
    dx_rows = dx_ptr + rows[:, None]

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for n in range(0, N, BLOCK_N):
        offs = n + offs_n
        mask = mask_m & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        dy = tl.load(dy_rows + (offs * stride_dyn)[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + (offs * stride_yn)[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += y * dy
    total = tl.sum(acc, axis=1)[:, None]

    last = (N - 1) // BLOCK_N * BLOCK_N
    for n in range(0, N, BLOCK_N):
        offs = last - n + offs_n
        mask = mask_m & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        dy = tl.load(dy_rows + (offs * stride_dyn)[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + (offs * stride_yn)[None, :], mask=mask, other=0.0).to(tl.float32)
        dx = y * (dy - total)
        dx_ptrs = dx_rows + (offs * stride_dxn)[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("tilelab::softmax", mutates_args=())
def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    D0, D1, D2, N, *strides = as_rows(dim, x, y)
    M = D0 * D1 * D2
    tile = row_tile("softmax", x, M, N, strides[3])
    online = N > tile["BLOCK_N"]
    more = group(x, tile, strides[3]) | UNFUSED if online else {}
    launch(
        softmax_online_kernel if online else softmax_kernel, (cdiv(M, tile["BLOCK_M"]),),
        x, y, M, N, D1, D2, *strides, **more, **tile,
    )  # fmt: skip
    return y


@_softmax.register_fake
def _(x, dim, dtype):
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("tilelab::softmax_backward", mutates_args=())
def _softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    dx = torch.empty_like(y, dtype=dtype)
    D0, D1, D2, N, *strides = as_rows(dim, dy, y, dx)
    M = D0 * D1 * D2
    tile = row_tile("softmax_backward", y, M, N, strides[7])
    online = N > tile["BLOCK_N"]
    kernel = softmax_backward_online_kernel if online else softmax_backward_kernel
    launch(
        kernel, (cdiv(M, tile["BLOCK_M"]),), dy, y, dx, M, N, D1, D2, *strides, **tile, **UNFUSED
    )
    return dx


@_softmax_backward.register_fake
def _(dy, y, dim, dtype):
    return torch.empty_like(y, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, ctx.dim, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output)


def _autograd(ctx, dy):
    return _softmax_backward(dy, *ctx.saved_tensors, ctx.dim, ctx.dtype), None, None


_softmax.register_autograd(_autograd, setup_context=_setup_context)


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Compute `exp(x) / sum(exp(x))` along one dimension, in float32, differentiable.

    Args:
        x: any shape; float32, float16 or bfloat16; any strides. A tensor of more than four
            dimensions may be copied.
        dim: the dimension along which the results sum to 1.

    Returns:
        A tensor of x's shape, dtype and memory format. Under `torch.autocast` it is float32, as
        in torch on the GPU. A row that contains NaN or +inf, or only -inf, becomes NaN.

    Raises:
        TypeError: the dtype or device is not supported, or dim is not an int.
        ValueError: x has no dimension dim.

    Source: torch.nn.functional.softmax.

    Example:
        >>> softmax(torch.tensor([0.0, 0.0, float("-inf")]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    check_tensors(x=x)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {dim!r}")
    rank = max(x.dim(), 1)  # As in torch, x may have no dimension: then y is 1.
    if not -rank <= dim < rank:
        raise ValueError(
            f"dim must be between {-rank} and {rank - 1} for x {list(x.shape)}, got {dim}"
        )
    if x.dim() > 4:
        rows = x.movedim(dim, -1)
        return softmax(rows.flatten(0, -2)).view(rows.shape).movedim(-1, dim)
    return _softmax(x, dim, reduction_dtype(x))
