"""Bias and ReLU in one pass: y = max(x + b, 0), and both gradients in one pass back.

The first lesson: a tile, a mask, and why fusing pays. Channels are columns, everything else is
rows:

    forward     y[m, c]  = max(x[m, c] + b[c], 0)
    backward    dx[m, c] = dy[m, c] where y[m, c] > 0, else 0
                db[c]    = sum over m of dx[m, c]

               C
         +-----+-----+        forward: one program owns a tile (@) of BLOCK_M rows and BLOCK_N
     M   |  @  |     |        channels.
         +-----#-----+        backward: one program owns BLOCK_N channels of a part of the rows: it
         |     #     |        walks down the part tile by tile, keeps the sum of its columns and
         |     #     |        writes it as one row of [parts, C]. A second, small kernel adds the
         +-----#-----+        parts up. No atomics, so the same input gives the same bits.

What limits it: memory. n = M*C elements of e bytes cost 2n FLOPs forward and 2ne bytes (read x,
write y): 0.5 FLOP a byte in 16-bit, where a GPU could do hundreds. So count bytes, not FLOPs. As
two torch calls (add, then relu) it moves 4ne: fused, it should take half the time. Backward moves
3ne (read dy and y, write dx); with the bias gradient in a pass of its own it would be 4ne.

The backward reads y and not x: y > 0 says the same as x + b > 0, and y is kept alive by the next
layer anyway, so nothing more is saved. At exactly 0 the gradient is 0, as in torch. NaN stays NaN:
`x < 0` is false for it, so it is written so that NaN passes (`tl.maximum` would turn it into 0 on
a GPU).

Bytes are what is left once nothing else costs more. While it moves 16 bytes for each thread of a
warp, an H200 can issue 99 instructions. Compiled for sm_90 the forward issues 42 of them, or 76 for
contiguous NCHW, and 143 when each row was found by three divisions of 64 bits: _rows.py has what
became of those. And between a load and its data lie some 0.8 us, so that 29 KB have to be on their
way to an SM at a time: of the default tile 16 programs share one, with 64 KB of loads.

Source: the fused bias epilogues of cuBLASLt (CUBLASLT_EPILOGUE_RELU_BIAS, and _BGRADB for the
gradient).
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
    """The same in plain torch, for any dtype."""
    z = x if bias is None else x + bias.view(1, -1, *[1] * (x.dim() - 2))
    return activated(z, activation)


TILES = [
    # the default: 32 bytes a thread, two loads in flight; and the same in float32
    dict(BLOCK_M=32, BLOCK_N=64, num_warps=4),
    dict(BLOCK_M=16, BLOCK_N=64, num_warps=4),
    dict(BLOCK_M=64, BLOCK_N=64, num_warps=4),  # four loads in flight
    dict(BLOCK_M=8, BLOCK_N=256, num_warps=4),  # wide layers, channels_last: whole cache lines
    dict(BLOCK_M=128, BLOCK_N=16, num_warps=4),  # few channels
    dict(BLOCK_M=256, BLOCK_N=16, num_warps=8),  # few channels, contiguous NCHW: runs of pixels
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
PROGRAMS = 1024  # of the backward, about: 8 an SM of an H200, which have 64 KB of loads in flight


@triton.jit
def bias_activation_kernel(
    x_ptr, b_ptr, y_ptr, M, N, D1, D2, stride_b,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_y0, stride_y1, stride_y2, stride_yn,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of y. Rows are numbered through [D0, D1, D2], see _rows.py."""
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
    """One program computes BLOCK_N channels of `part_rows` of dx, and their column sums.

    Kept is y or x: activation.py says which, and b is for x alone. dx lies in memory as it does.
    Without ACTIVATION only the sums are computed: they are the bias gradient.
    """
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    first = tl.program_id(0).to(tl.int64) * part_rows
    last = tl.minimum(first + part_rows, M)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # column sums, one row of them a tile row
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
        acc += dx

    db_ptrs = db_ptr + tl.program_id(0).to(tl.int64) * N + offs_n
    tl.store(db_ptrs, tl.sum(acc, axis=0), mask=mask_n)


@torch.library.custom_op("tilelab::bias_activation", mutates_args=())
def _bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    y = torch.empty_like(x)
    D0, D1, D2, N, *strides = as_rows(1, x, y)
    M = D0 * D1 * D2
    tile = choose_tile("bias_relu", x.dtype, DEFAULT, M=M, N=N)
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
    """Return dx (dy itself where there is no activation) and db, for channels in dim 1."""
    dx = dy
    if activation is not None:
        dx = torch.empty_like(kept)
        if dx.stride() != kept.stride():  # kept has gaps: its copy lies where dx will
            kept = dx.copy_(kept)
    D0, D1, D2, N, *strides = as_rows(1, dy, dx)
    M = D0 * D1 * D2
    db = torch.empty(N, dtype=dy.dtype, device=dy.device)
    tile = choose_tile("bias_relu_backward", dy.dtype, DEFAULT, M=M, N=N)
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
    """(dx, db) of `y = act(x + bias)`, b along dim 1; dx lies in memory as `kept` does.

    Kept is y, and `bias` None, where the activation's gradient is of the output; else it is x.
    """
    return _backward(dy, kept, bias, activation)


@bias_activation_backward.register_fake
def _(dy, kept, bias, activation):
    return torch.empty_like(kept), kept.new_empty(kept.shape[1])


@torch.library.custom_op("tilelab::bias_backward", mutates_args=())
def bias_backward(dy: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias along dim 1: the sum of dy over all other dimensions."""
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
        A tensor of x's shape, dtype and memory format; both are cast to the dtype of
        `torch.autocast` within one.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the two.
        ValueError: a shape that does not fit, or an unknown activation.

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
    """Compute `relu(x + bias)`: `bias_activation` with a ReLU, and a bias that is not None.

    Example:
        >>> bias_relu(torch.tensor([[-2.0, 0.5]]), torch.tensor([1.0, 1.0]))
        tensor([[0.0000, 1.5000]])
    """
    check_tensors(bias=bias)
    return bias_activation(x, bias, "relu")
