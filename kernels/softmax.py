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

What limits it: memory. n = M*N elements of e bytes cost about 5n FLOPs, and 2ne bytes (read x,
write y) if the row stays in registers, 3ne online, one ne of them from the L2 cache if the rows
in flight fit there. As torch calls for max, subtract, exp, sum and divide it reads 5n elements and
writes 3n: in registers it should take a quarter of the time. Backward moves 3ne (read y and dy,
write dx) where four calls move 9n (y * dy, sum, subtract, multiply: 6n read, 3n written); online it
moves 5ne.

Read first: bias_relu.py. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax
(2018); Triton's tutorial 02 for the rows in registers.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import cdiv, check_tensors, choose_tile, launch, reduction_dtype
from kernels._rows import as_rows, row_offsets


def reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The same in plain torch, for any dtype."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


# A tile whose BLOCK_N covers the row keeps the row in registers; with any other, it goes online.
# Compiled for sm_80, sm_90, sm_100 and gfx942, none spills, and contiguous rows whose length and
# stride are multiples of 16 load 16 bytes at a time.
TILES = [
    dict(BLOCK_M=64, BLOCK_N=32, num_warps=4),  # a handful of classes
    dict(BLOCK_M=16, BLOCK_N=128, num_warps=4),  # a row fits a warp, and no reduction leaves it
    dict(BLOCK_M=4, BLOCK_N=1024, num_warps=4),
    dict(BLOCK_M=1, BLOCK_N=4096, num_warps=8),
    dict(BLOCK_M=1, BLOCK_N=16384, num_warps=16),  # 32 values a thread; the backward holds 64
    # online: 40 registers, so three rows an SM (compiled for sm_90). 396 rows of 50,257 in bf16 are
    # 40 MB, which an L2 cache of 50 MB should still hold when they are read again
    dict(BLOCK_M=1, BLOCK_N=4096, num_warps=16),
    # along a strided dimension: it is the rows that lie side by side in memory
    dict(BLOCK_M=64, BLOCK_N=64, num_warps=8),
]
IN_REGISTERS, ONLINE, STRIDED = TILES[:5], TILES[5], TILES[6]

# Where an online maximum begins. Not at -inf: while a row has been nothing else, -inf - (-inf)
# would be NaN, and stay so.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def row_tile(op: str, rows: torch.Tensor) -> dict:
    """The tile for one call that works along the rows [D0, D1, D2, N] of a tensor."""
    D0, D1, D2, N = rows.shape
    default = STRIDED
    if rows.stride(-1) == 1:  # the shortest that holds a row
        default = next((tile for tile in IN_REGISTERS if N <= tile["BLOCK_N"]), ONLINE)
    return choose_tile(op, rows.dtype, {rows.dtype.itemsize: default}, M=D0 * D1 * D2, N=N)


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
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    y = e * (1.0 / tl.sum(e, axis=1))[:, None]  # one division a row

    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_ptrs = y_ptr + rows[:, None] + (offs_n * stride_yn)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_online_kernel(
    x_ptr, y_ptr, M, N, D1, D2,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of y of any length: it walks along them twice."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_rows = x_ptr + rows[:, None]
    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_rows = y_ptr + rows[:, None]

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    s = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # a sum a column: added up once, at the end
    for n in range(0, N, BLOCK_N):
        offs = n + offs_n
        mask = mask_m & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_rows + (offs * stride_xn)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        s = s * tl.exp(m - m_new)[:, None] + tl.exp(x - m_new[:, None])
        m = m_new
    scale = (1.0 / tl.sum(s, axis=1))[:, None]  # only -inf: 1 / 0, and 0 * inf is NaN

    last = (N - 1) // BLOCK_N * BLOCK_N
    for n in range(0, N, BLOCK_N):  # backwards: the end of the row is what the cache still holds
        offs = last - n + offs_n
        mask = mask_m & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_rows + (offs * stride_xn)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - m[:, None]) * scale
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
    xr, yr = as_rows(x, dim), as_rows(y, dim)
    D0, D1, D2, N = xr.shape
    M = D0 * D1 * D2
    tile = row_tile("softmax", xr)
    kernel = softmax_kernel if N <= tile["BLOCK_N"] else softmax_online_kernel
    launch(
        kernel, (cdiv(M, tile["BLOCK_M"]),), x, y, M, N, D1, D2,
        *xr.stride(), *yr.stride(), **tile,
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
    dyr, yr, dxr = as_rows(dy, dim), as_rows(y, dim), as_rows(dx, dim)
    D0, D1, D2, N = yr.shape
    M = D0 * D1 * D2
    tile = row_tile("softmax_backward", yr)
    online = N > tile["BLOCK_N"]
    kernel = softmax_backward_online_kernel if online else softmax_backward_kernel
    launch(
        kernel, (cdiv(M, tile["BLOCK_M"]),), dy, y, dx, M, N, D1, D2,
        *dyr.stride(), *yr.stride(), *dxr.stride(), **tile,
    )  # fmt: skip
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
