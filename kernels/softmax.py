"""Softmax along any dimension: y = exp(x) / sum(exp(x)), a row in registers or online; and back.

    forward     y[n]  = exp(x[n] - m) / s        m = max over the row, s = sum of exp(x - m)
    backward    dx[n] = y[n] * (dy[n] - sum of y * dy over the row)

Taking the maximum off changes nothing, since exp(x - m) / s has exp(m) above and below, and keeps
every exponent <= 0, so that nothing overflows.

               N                                       N
         +-----------+                      +---+---+---+---+
         |           |                      | 1>| 2>| 3>| 4>|   first along the row: m and s
     M   |###########|  BLOCK_M rows        +---+---+---+---+
         |           |                      |<8 |<7 |<6 |<5 |   and back: y
         +-----------+                      +---+---+---+---+
    short rows: one program holds           long rows: one program walks along BLOCK_M of them
    BLOCK_M of them in registers            in blocks of BLOCK_N

Online (long rows). m and s cannot both be known in one walk, it seems, since s needs m. But a sum
that was taken with a smaller maximum is put right by one factor:

    for each block x of the row:
        m_new = max(m, max(x))
        s = s * exp(m - m_new) + sum of exp(x - m_new)
        m = m_new

Finding max(x) takes every thread that holds a part of the row, each block anew. So each thread has
an m and an s of its own, of what it loads, and they are put together once, by the same rule, at the
end of the row.

What limits it: memory. n = M*N elements of e bytes cost about 5n FLOPs, and 2ne bytes (read x,
write y) if the row stays in registers, 3ne online, one ne of them from the L2 cache if the rows
in flight fit there. As torch calls for max, subtract, exp, sum and divide it reads 5n elements and
writes 3n: in registers it should take a quarter of the time. Backward moves 3ne (read y and dy,
write dx) where four calls move 9n (y * dy, sum, subtract, multiply: 6n read, 3n written); online it
moves 5ne.

In 16-bit, instructions are not far behind (bias_relu.py has the count). Compiled for sm_90 the
forward issues 48 to 64 for each 16 bytes that a thread moves, backward 27 to 37, of 99; along a
strided dimension 88 and 49.

Read first: bias_relu.py. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax
(2018); Triton's tutorial 02 for the rows in registers.
"""

import math

import torch
import triton
import triton.language as tl
from tilelab.kernels._checks import check_tensors, reduction_dtype
from tilelab.kernels._launch import launch
from tilelab.kernels._rows import as_rows, row_offsets
from tilelab.kernels._tiles import cdiv, choose_tile


def reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The same in plain torch, for any dtype."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


# A tile whose BLOCK_N covers the row keeps the row in registers; with any other, it goes online.
# Compiled for sm_80, sm_90, sm_100 and gfx942, none spills, and contiguous rows whose length and
# stride are multiples of 16 load and store 16 bytes at a time.
TILES = [
    dict(BLOCK_M=64, BLOCK_N=32, num_warps=4),  # a handful of classes
    dict(BLOCK_M=16, BLOCK_N=128, num_warps=4),  # a row fits a warp, and no reduction leaves it
    dict(BLOCK_M=8, BLOCK_N=256, num_warps=4),  # the longest of which that is true in 16-bit
    dict(BLOCK_M=4, BLOCK_N=1024, num_warps=2),  # 64 values a thread, of four rows
    dict(BLOCK_M=1, BLOCK_N=4096, num_warps=4),
    dict(BLOCK_M=1, BLOCK_N=16384, num_warps=16),  # 32 values a thread; the backward holds 64
    dict(BLOCK_M=1, BLOCK_N=8192, num_warps=16),  # online: two loads of each thread in flight
    # along a strided dimension: it is the rows that lie side by side in memory
    dict(BLOCK_M=64, BLOCK_N=64, num_warps=4),
]
IN_REGISTERS, ONLINE, STRIDED = TILES[:6], TILES[6], TILES[7]

# A GPU has an instruction for 2^x. exp(x) is 2^(x log2 e), and written like that it saves the three
# instructions around it that keep results below 2^-126 (here they become 0).
LOG2_E = tl.constexpr(math.log2(math.e))
# Where an online maximum begins. Not at -inf: while a row has been nothing else, -inf - (-inf)
# would be NaN, and stay so.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def row_tile(op: str, dtype: torch.dtype, M: int, N: int, stride_n: int) -> dict:
    """The tile for one call that works along M rows of N elements, `stride_n` apart."""
    default = STRIDED
    if stride_n == 1:  # the shortest that holds a row
        default = next((tile for tile in IN_REGISTERS if N <= tile["BLOCK_N"]), ONLINE)
    return choose_tile(op, dtype, {dtype.itemsize: default}, M=M, N=N)


def group(x: torch.Tensor, tile: dict, stride_n: int) -> dict:
    """GROUP of the online kernels: the elements of a 16-byte load, if they are neighbours."""
    return dict(GROUP=min(16 // x.element_size(), tile["BLOCK_N"]) if stride_n == 1 else 1)


@triton.jit
def softmax_kernel(
    x_ptr, y_ptr, M, N, D1, D2,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M whole rows of y in registers: N <= BLOCK_N."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # [BLOCK_M, BLOCK_N]

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_ptrs = x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :]
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)  # exp(-inf) adds nothing
    # tl.max passes over NaN, but the NaN is in the sum. A row of only -inf is NaN by -inf + inf.
    e = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2_E)
    y = e * (1.0 / tl.sum(e, axis=1))[:, None]  # one division a row

    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_ptrs = y_ptr + rows[:, None] + (offs_n * stride_yn)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_online_kernel(
    x_ptr, y_ptr, M, N, D1, D2,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of y of any length: it walks along them twice."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_rows = x_ptr + rows[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_rows = y_ptr + rows[:, None]

    # Each GROUP of columns has a maximum and a sum of its own. A group is what one thread loads at
    # once, so that nothing in the loop waits for another thread.
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
    scale = (1.0 / s)[:, None]  # only -inf: 1 / 0, and 0 * inf is NaN

    last = (N - 1) // BLOCK_N * BLOCK_N
    for n in range(0, N, BLOCK_N):  # backwards: the end of the row is what the cache still holds
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
    """One program computes BLOCK_M rows of dx of any length: first their sums, then dx."""
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
    tile = row_tile("softmax", x.dtype, M, N, strides[3])
    online = N > tile["BLOCK_N"]
    launch(
        softmax_online_kernel if online else softmax_kernel, (cdiv(M, tile["BLOCK_M"]),),
        x, y, M, N, D1, D2, *strides, **(group(x, tile, strides[3]) if online else {}), **tile,
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
    tile = row_tile("softmax_backward", y.dtype, M, N, strides[7])
    online = N > tile["BLOCK_N"]
    kernel = softmax_backward_online_kernel if online else softmax_backward_kernel
    launch(kernel, (cdiv(M, tile["BLOCK_M"]),), dy, y, dx, M, N, D1, D2, *strides, **tile)
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
        x: any shape; float32, float16 or bfloat16; any strides. Beyond four dimensions it may be
            copied.
        dim: the dimension along which the results sum to 1.

    Returns:
        A tensor of x's shape, dtype and memory format; float32 under `torch.autocast`, as torch
        has it on the GPU. A row with NaN or +inf in it, or of nothing but -inf, is NaN.

    Raises:
        TypeError: a dtype or device that is not supported, or a dim that is no int.
        ValueError: a dim that x does not have.

    Source: torch.nn.functional.softmax.

    Example:
        >>> softmax(torch.tensor([0.0, 0.0, float("-inf")]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    check_tensors(x=x)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {dim!r}")
    rank = max(x.dim(), 1)  # of a tensor without dimensions torch takes the softmax too: it is 1
    if not -rank <= dim < rank:
        raise ValueError(
            f"dim must be between {-rank} and {rank - 1} for x {list(x.shape)}, got {dim}"
        )
    if x.dim() > 4:
        rows = x.movedim(dim, -1)
        return softmax(rows.flatten(0, -2)).view(rows.shape).movedim(-1, dim)
    return _softmax(x, dim, reduction_dtype(x))
