"""Matrix multiplication C = A @ B, tiled, with bias and ReLU fused behind it; forward and backward.

    forward     C  = act(A @ B + bias)     A [M, K], B [K, N], C [M, N]
    backward    dZ = dC where C > 0        (act = relu; else dZ = dC)
                dA = dZ @ B^T              the same kernel: a transpose is a swap of two strides
                dB = A^T @ dZ              the same kernel
                dbias = sum over rows of dZ

          K            N            N
       +-----+      +--+--+      +--+--+
     M |==>  |  x   |  v  |  =   |  #  |    one program: BLOCK_M x BLOCK_N of C,
       +-----+      +--+--+      +--+--+    walking along K in steps of BLOCK_K

    for each tile (m, n) of C, in parallel:
        acc = 0                                  # float32, in registers
        for k in 0, BLOCK_K, 2*BLOCK_K ... below K:
            acc += A[m, k] @ B[k, n]             # tensor cores
        C[m, n] = act(acc + bias[n])

What limits it: 2MNK FLOPs over e(MK + KN + MN) bytes, e for each element. A square of side n does
n/3 FLOPs a byte in 16-bit, so from n ~ 600 on (an H200 does 206 FLOPs in the time of one byte) it
is the tensor cores, if what is loaded is used often enough: a program reads BLOCK_M rows of A and
BLOCK_N columns of B for BLOCK_M * BLOCK_N results. So large tiles save bandwidth, and they end
where the accumulator fills the registers (128x256 float32 are half of an SM's 65,536). A small C
with a long K, as dB of a classifier, is few programs with a long sum each: not what this is for.

Program order. Programs start in the order of their index, a wave of them at a time. Row by row, a
wave would touch one block row of A and all of B. In groups of GROUP_M block rows it touches a
squarish patch of C, so that the L2 cache serves most of the loads:

    row by row          grouped by 2
    0  1  2  3          0  2  4  6          a wave of 4 reads 1 + 4 blocks in the first order
    4  5  6  7          1  3  5  7          and 2 + 2 in the second

Read first: bias_relu.py. Source: the grouped order is that of Triton's tutorial 03; the blocking
goes back to Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008).
"""

import torch
import triton
import triton.language as tl

from kernels._launch import (
    autocast,
    cdiv,
    check_choice,
    check_shape,
    check_tensors,
    choose_tile,
    dot_precision,
    launch,
)
from kernels.bias_relu import bias_backward, bias_relu_backward


def reference(a, b, bias=None, activation=None):
    """The same in plain torch, for any dtype."""
    c = a @ b if bias is None else a @ b + bias
    return torch.relu(c) if activation == "relu" else c


TILES = [
    # the default: both operands of three stages in 48 KiB, so it runs on every GPU since 2020
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=3),
    # float32: without TF32 each thread holds its rows and columns of a step in registers
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=3),
    # large squares on Hopper: the most reuse that fits the registers
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # deep K: fewer, longer steps hide the latency of loads behind more tensor-core work
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3),
    # small grids: four times the programs, for when 128x128 tiles leave SMs idle
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=4),
    # skinny: a classifier's ten columns fit one tensor-core instruction
    dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=4),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_bias, stride_cm, stride_cn,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of C = act(A @ B + bias)."""
    # Which tile: down GROUP_M block rows, then on to the next block column.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)  # the last group may be shorter
    pid_m = first_m + pid % (GROUP_M * blocks_n) % rows
    pid_n = pid % (GROUP_M * blocks_n) // rows

    # int64 before any product with a stride: an offset may pass 2^31 elements.
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # Rows and columns past the border wrap around: they read something valid that is never stored,
    # and the loads of the loop need no mask.
    a_ptrs = a_ptr + (offs_m % M * stride_am)[:, None] + (offs_k * stride_ak)[None, :]
    b_ptrs = b_ptr + (offs_k * stride_bk)[:, None] + (offs_n % N * stride_bn)[None, :]

    step_a = BLOCK_K * tl.cast(stride_ak, tl.int64)
    step_b = BLOCK_K * tl.cast(stride_bk, tl.int64)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptrs)  # [BLOCK_K, BLOCK_N]
        else:  # zeros past the end of K add nothing
            a = tl.load(a_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += step_a
        b_ptrs += step_b

    # The epilogue costs no memory traffic but the bias: the tile is still in registers.
    mask_n = offs_n < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    c_ptrs = c_ptr + (offs_m * stride_cm)[:, None] + (offs_n * stride_cn)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])


@torch.library.custom_op("tilelab::matmul", mutates_args=())
def _matmul(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N, dtype=a.dtype, device=a.device)
    tile = choose_tile("matmul", a.dtype, DEFAULT, M=M, N=N, K=K)
    launch(
        matmul_kernel, (cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]),),
        a, b, bias, c, M, N, K,
        *a.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *c.stride(),
        HAS_BIAS=bias is not None, RELU=activation == "relu", EVEN_K=K % tile["BLOCK_K"] == 0,
        PRECISION=dot_precision(a.dtype, torch.backends.cuda.matmul), **tile,
    )  # fmt: skip
    return c


@_matmul.register_fake
def _(a, b, bias, activation):
    return a.new_empty(a.shape[0], b.shape[1])


def _setup_context(ctx, inputs, output):
    a, b, bias, activation = inputs
    ctx.save_for_backward(a, b, output if activation == "relu" else None)


def _backward(ctx, dc):
    a, b, c = ctx.saved_tensors
    da = db = dbias = None
    if c is not None:  # through the ReLU, and the bias gradient in the same pass
        dc, dbias = bias_relu_backward(dc, c)
    elif ctx.needs_input_grad[2]:
        dbias = bias_backward(dc)
    if ctx.needs_input_grad[0]:
        da = _matmul(dc, b.t(), None, None)
    if ctx.needs_input_grad[1]:
        db = _matmul(a.t(), dc, None, None)
    return da, db, dbias if ctx.needs_input_grad[2] else None, None


_matmul.register_autograd(_backward, setup_context=_setup_context)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Compute `act(a @ b + bias)`, accumulated in float32, differentiable in a, b and bias.

    Args:
        a: [M, K]; float32, float16 or bfloat16; any strides, so transposed views cost no copy.
        b: [K, N], of a's dtype; any strides.
        bias: [N], of a's dtype, or None.
        activation: None or "relu".

    Returns:
        [M, N] of a's dtype, row-major. float32 products are rounded to TF32 on the GPU where
        `torch.backends.cuda.matmul.allow_tf32` (or its newer `fp32_precision`) says so.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the tensors.
        ValueError: shapes that do not fit, or an unknown activation.

    Source: torch.addmm and torch.relu.

    Example:
        >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-4.0]]), activation="relu")
        tensor([[0.]])
    """
    a, b, bias = autocast(a, b, bias)
    check_tensors(a=a, b=b, bias=bias, optional=("bias",))
    check_shape("a", a, "[M, K]", M=None, K=None)
    check_shape("b", b, "[K, N]", K=a.shape[1], N=None)
    if bias is not None:
        check_shape("bias", bias, "[N]", N=b.shape[1])
    check_choice("activation", activation, (None, "relu"))
    return _matmul(a, b, bias, activation)
