"""Bias and ReLU in one pass: y = max(x + b, 0), and both gradients in one pass back.

This is the first lesson. Channels are columns. All other dimensions together are rows:

    forward     y[m, c]  = max(x[m, c] + b[c], 0)
    backward    dx[m, c] = dy[m, c] where y[m, c] > 0, else 0
                db[c]    = sum over m of dx[m, c]

               C
         +-----+-----+        forward: one program owns a tile (@) of BLOCK_M rows and
     M   |  @  |     |        BLOCK_N channels.
         +-----#-----+        backward: one program owns BLOCK_N channels of one part of the
         |     #     |        rows (#). It walks down its part tile by tile, adds up each
         |     #     |        column, and writes the sums as one row of [parts, C].
         +-----#-----+        A second, small kernel adds the parts up.

What the words mean. A kernel is a function for the GPU, which runs many copies of it at once. Each
copy is a program, and has a number. A tile is the rectangle of data that a program handles at once;
its sides are powers of two. A tile at the border can be larger than what is left of the data. So it
has a mask, which says for each of its elements whether it exists. A GPU consists of SMs (streaming
multiprocessors): an H200 has 132. An SM runs several programs at once. A warp is 32 threads of a
program, which execute the same instruction together. sm_90 is the compiler's name for the Hopper
GPUs (H100 and H200).

What limits it: memory. Let n = M*C, and let an element have e bytes. The forward does 2n FLOPs and
moves 2ne bytes (it reads x and writes y). Its arithmetic intensity is their ratio: 0.5 FLOPs per
byte in 16-bit. A GPU could do hundreds of FLOPs in the time of one byte, so we count bytes. Two
torch calls (add, then relu) move 4ne bytes: the fused kernel should take half of their time. The
backward moves 3ne (it reads dy and y, and writes dx). It would be 4ne if the bias gradient had a
pass of its own.

The backward reads y, not x, because y > 0 says the same as x + b > 0. The next layer keeps y
anyway, so nothing more is saved. At exactly 0 the gradient is 0, as in torch. NaN stays NaN.

Read next: activation.py. Sources: the fused bias epilogues of cuBLASLt
(CUBLASLT_EPILOGUE_RELU_BIAS, and CUBLASLT_EPILOGUE_BGRADB for the gradient).
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import autocast, check_choice, check_shape, check_tensors
from tilelab.kernels._launch import launch
from tilelab.kernels._partial_sums import sum_partials
from tilelab.kernels._rows import as_rows, row_offsets
from tilelab.kernels._tiles import cdiv, choose_tile, into_parts
from tilelab.kernels.activation import ACTIVATIONS, activate, activated


def reference(x, bias, activation="relu"):
    """Compute the same in plain torch, for any dtype."""
    z = x if bias is None else x + bias.view(1, -1, *[1] * (x.dim() - 2))
    return activated(z, activation)


# Memory is the limit only while two other costs are smaller. For an H200 they are these:
#
# 1. Instructions. The memory delivers 4.8 TB/s, which is 20.7 bytes per clock to each of 132 SMs
#    (at 1.755 GHz). While a warp moves 16 bytes for each of its 32 threads, 512 / 20.7 = 25 clocks
#    pass. An SM issues 4 instructions per clock, so it can issue 99 of them meanwhile. Compiled for
#    sm_90 (triton 3.6.0 and 3.9.0), the forward has 34 instructions for each 16 bytes that a thread
#    moves, and 68 for contiguous NCHW. An earlier version found each row by three divisions of 64
#    bits, and had 143: see _rows.py.
# 2. Latency. Data arrive about 0.8 us after a program asks for them. In that time an SM could
#    receive 4.8 TB/s / 132 * 0.8 us = 29 KB, so it must have asked for that much in advance. An SM
#    holds 2,048 threads, which are 16 programs of 4 warps. With the default tile each of them asks
#    for 32 * 64 * 2 bytes = 4 KB: together they ask for 64 KB.
TILES = [
    # The default in 16-bit: each thread has 32 bytes, so two loads of 16 bytes are in flight.
    dict(BLOCK_M=32, BLOCK_N=64, num_warps=4),
    # The default in float32 has as many bytes.
    dict(BLOCK_M=16, BLOCK_N=64, num_warps=4),
    # Each thread has four loads in flight (in 16-bit).
    dict(BLOCK_M=64, BLOCK_N=64, num_warps=4),
    # For wide layers in channels_last: a row of the tile is whole cache lines.
    dict(BLOCK_M=8, BLOCK_N=256, num_warps=4),
    # For few channels.
    dict(BLOCK_M=128, BLOCK_N=16, num_warps=4),
    # For few channels in contiguous NCHW: a column of the tile is a long run of pixels.
    dict(BLOCK_M=256, BLOCK_N=16, num_warps=8),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}  # by bytes per element
# The backward has about this many programs: 8 for each SM of an H200. Each asks for two tiles of
# 4 KB at a time (dy and y), so an SM has 64 KB of loads in flight.
PROGRAMS = 1024


@triton.jit
def bias_activation_kernel(
    x_ptr, b_ptr, y_ptr, M, N, D1, D2, stride_b,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of y.

    Rows are numbered through the dimensions [D0, D1, D2]: see _rows.py.
    """
    # int64 before a product with a stride: an offset may pass 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x = tl.load(x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :], mask=mask, other=0.0)
    z = x.to(tl.float32)
    if HAS_BIAS:
        b = tl.load(b_ptr + offs_n * stride_b, mask=mask_n, other=0.0)
        z += b.to(tl.float32)[None, :]
    y = activate(z, ACTIVATION)

    rows = row_offsets(offs_m, D1, D2, stride_y0, stride_y1, stride_y2)
    y_ptrs = y_ptr + rows[:, None] + (offs_n * stride_yn)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_activation_backward_kernel(
    dy_ptr, kept_ptr, b_ptr, dx_ptr, db_ptr, M, N, D1, D2, part_rows, stride_b,
    stride_dy0, stride_dy1, stride_dy2, stride_dyn, stride_x0, stride_x1, stride_x2, stride_xn,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N channels of `part_rows` rows of dx, and their column sums.

    `kept` is y, or x with b beside it (activation.py says when). dx has the strides of `kept`.
    Without ACTIVATION the program computes only the sums, which are the bias gradient.
    """
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    first = tl.program_id(0).to(tl.int64) * part_rows
    last = tl.minimum(first + part_rows, M)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # BLOCK_M rows of column sums
    if HAS_BIAS:
        b = tl.load(b_ptr + offs_n * stride_b, mask=mask_n, other=0.0).to(tl.float32)

    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < last)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
        rows = row_offsets(offs_m, D1, D2, stride_dy0, stride_dy1, stride_dy2)
        dy_ptrs = dy_ptr + rows[:, None] + (offs_n * stride_dyn)[None, :]
        dx = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
            offs = rows[:, None] + (offs_n * stride_xn)[None, :]  # [BLOCK_M, BLOCK_N]
            z = tl.load(kept_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                z += b[None, :]
            dx = activate(z, ACTIVATION, dx)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        acc += dx  # is 0 where the mask is false

    db_ptrs = db_ptr + tl.program_id(0).to(tl.int64) * N + offs_n
    tl.store(db_ptrs, tl.sum(acc, axis=0), mask=mask_n)


@torch.library.custom_op("tilelab::bias_activation", mutates_args=())
def _bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    y = torch.empty_like(x)
    D0, D1, D2, N, *strides = as_rows(1, x, y)
    M = D0 * D1 * D2
    tile = choose_tile("bias_relu", x, DEFAULT, M=M, N=N)
    grid = (cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"]))
    launch(
        bias_activation_kernel, grid,
        x, bias, y, M, N, D1, D2, 0 if bias is None else bias.stride(0), *strides,
        HAS_BIAS=bias is not None, ACTIVATION=activation, **tile,
    )  # fmt: skip
    return y


@_bias_activation.register_fake
def _(x, bias, activation):
    return torch.empty_like(x)


def _backward(dy, kept, bias, activation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx (dy itself without an activation) and db. Channels are dim 1."""
    dx = dy
    if activation is not None:
        dx = torch.empty_like(kept)
        if dx.stride() != kept.stride():  # kept has gaps: copy it to the strides of dx
            kept = dx.copy_(kept)
    D0, D1, D2, N, *strides = as_rows(1, dy, dx)
    M = D0 * D1 * D2
    db = torch.empty(N, dtype=dy.dtype, device=dy.device)
    tile = choose_tile("bias_relu_backward", dy, DEFAULT, M=M, N=N)
    columns = cdiv(N, tile["BLOCK_N"])
    part_rows, parts = into_parts(M, tile["BLOCK_M"], max(1, PROGRAMS // max(columns, 1)))
    partials = db
    if parts > 1:
        partials = torch.empty(parts, N, dtype=torch.float32, device=dy.device)
    launch(
        bias_activation_backward_kernel, (parts, columns),
        dy, kept, bias, dx, partials, M, N, D1, D2, part_rows,
        0 if bias is None else bias.stride(0), *strides,
        HAS_BIAS=bias is not None, ACTIVATION=activation, **tile,
    )  # fmt: skip
    if parts > 1:
        sum_partials(partials, db)
    return dx, db


@torch.library.custom_op("tilelab::bias_activation_backward", mutates_args=())
def bias_activation_backward(
    dy: torch.Tensor, kept: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx, db) of `y = act(x + bias)`, with the bias along dim 1.

    If the activation computes its gradient from its output, `kept` is y and `bias` is None.
    Otherwise `kept` is x. dx gets the memory format of `kept`.
    """
    return _backward(dy, kept, bias, activation)


@bias_activation_backward.register_fake
def _(dy, kept, bias, activation):
    return torch.empty_like(kept), kept.new_empty(kept.shape[1])


@torch.library.custom_op("tilelab::bias_backward", mutates_args=())
def bias_backward(dy: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a bias along dim 1: the sum of dy over all other dimensions."""
    return _backward(dy, None, None, None)[1]


@bias_backward.register_fake
def _(dy):
    return dy.new_empty(dy.shape[1])


def _setup_context(ctx, inputs, output):
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(*((output, None) if ACTIVATIONS[ctx.activation].of_output else (x, bias)))


def _autograd(ctx, dy):
    dx, db = bias_activation_backward(dy, *ctx.saved_tensors, ctx.activation)
    return dx, db if ctx.needs_input_grad[1] else None, None


_bias_activation.register_autograd(_autograd, setup_context=_setup_context)


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Compute `act(x + bias)` with the bias along dim 1, differentiable in both.

    Args:
        x: [M, C], [N, C, L] or [N, C, H, W]; float32, float16 or bfloat16; any strides.
        bias: [C], of x's dtype, or None.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".

    Returns:
        A tensor of x's shape, dtype and memory format. Within `torch.autocast`, x and bias are
        first cast to its dtype.

    Raises:
        TypeError: a dtype or a device is not supported, or differs between x and bias.
        ValueError: a shape does not fit, or the activation is unknown.

    Source: torch.relu(x + bias.view(1, -1, 1, 1)), or torch.nn.functional's gelu and silu.

    Example:
        >>> bias_activation(torch.tensor([[-2.0, 0.5]]), torch.tensor([1.0, 1.0]), "silu")
        tensor([[-0.2689,  1.2264]])
    """
    x, bias = autocast(x, bias)
    check_tensors(x=x, bias=bias, optional=("bias",))
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"x must have 2, 3 or 4 dimensions, got {list(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, "[C]", C=x.shape[1])
    check_choice("activation", activation, tuple(ACTIVATIONS))
    return _bias_activation(x, bias, activation)


def bias_relu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute `relu(x + bias)`: `bias_activation` with a ReLU and a bias that is not None.

    Arguments, result and errors are those of `bias_activation`.

    Example:
        >>> bias_relu(torch.tensor([[-2.0, 0.5]]), torch.tensor([1.0, 1.0]))
        tensor([[0.0000, 1.5000]])
    """
    if bias is None:
        check_tensors(bias=bias)
    return bias_activation(x, bias, "relu")
