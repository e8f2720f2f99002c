"""Matrix multiplication in tiles, with bias and activation fused: C = act(A @ B + bias); gradients.

    forward     C  = act(A @ B + bias)     A [M, K], B [K, N], C [M, N]
    backward    dZ = dC where C > 0        for act = relu (the others: activation.py)
                dA = dZ @ B^T              by the same kernel: a transpose swaps two strides
                dB = A^T @ dZ              by the same kernel
                dbias = sum over rows of dZ

          K            N            N
       +-----+      +--+--+      +--+--+
     M |==>  |  x   |  v  |  =   |  #  |    one program: BLOCK_M x BLOCK_N of C,
       +-----+      +--+--+      +--+--+    walking along K in steps of BLOCK_K

    for each tile (m, n) of C, in parallel:
        acc = 0                                  # float32, in registers
        for k in 0, BLOCK_K, 2*BLOCK_K ... below K:
            acc += A[m, k] @ B[k, n]             # tensor cores
        C[m, n] = act(acc + bias[n])             # the epilogue

What limits it. The product is 2MNK FLOPs over e(MK + KN + MN) bytes, for e bytes per element. For
squares of side n in 16-bit the arithmetic intensity is n/3 FLOPs per byte. An H200 does 206 FLOPs
in the time of one byte. So from n = 600 on, its tensor cores (the units that multiply small
matrices) are the limit, if what is loaded is used often enough.

Tile size. A program loads BLOCK_M rows of A and BLOCK_N columns of B for BLOCK_M * BLOCK_N results.
So larger tiles load less for each result. The accumulator must fit into the registers: in float32,
a 128x256 tile fills half of the 65,536 registers of an SM.

Two kernels compute it. The one in this file loads through pointers, and takes every GPU, dtype and
stride. The one in matmul_tma.py is for GPUs since Hopper (sm_90), and for rows that are aligned to
16 bytes. Each tile belongs to one kernel, so the choice of a tile is the choice of a kernel.

Read first: bias_relu.py. Sources: Triton's tutorial 03 for the grouped order of programs; Goto and
van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008), for the blocking.
"""

import functools

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import (
    autocast,
    check_shape,
    check_tensors,
    dot_precision,
)
from tilelab.kernels._launch import device_of, launch
from tilelab.kernels._partial_sums import first_pass, reduce_parts
from tilelab.kernels._tile_facts import Work, fastest_tile, kind_of, layout_of
from tilelab.kernels._tiles import cdiv, choose_tile, into_parts, part_count
from tilelab.kernels.activation import activate, activated, check_activation, kept_for, needs_z
from tilelab.kernels.bias_relu import bias_activation, bias_activation_backward, bias_backward
from tilelab.kernels.matmul_tma import matmul_tma, split_tiles, tma_operands


def reference(a, b, bias=None, activation=None):
    """Compute the same in plain torch, for any dtype."""
    return activated(a @ b if bias is None else a @ b + bias, activation)


# A step is one iteration of the loop along K: it multiplies BLOCK_K columns of A by as many rows of
# B. While one step multiplies, the next ones are loaded. `num_stages` is how many steps are under
# way at once. Each needs room in shared memory, which is memory that a program's threads share.
#
# The comments say where a tile wins. They come from others' measurements of Triton's matmul on an
# A100 and an H100 (docs/prediction.md): 27 to 29 tiles each, for 3,000 shapes. Four warps beat
# eight at 128x128, a long step beats a short one, and 3 to 5 stages beat 2.
TILES = [
    # The default in 16-bit: four stages of both operands take 64 KiB.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=4),
    # The default in float32. Without TF32 there are no tensor cores for it, and each thread holds
    # its rows and columns of a step in registers.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=3),
    # Large products in float32: on an A100 it is 4% behind the best of 45 tiles. Where B lies along
    # K it spills.
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=3),
    # The most reuse that the registers allow. For Hopper, matmul_tma.py has the same tile. In this
    # kernel triton 3.6.0 makes each wgmma (Hopper's tensor-core instruction) wait for the one
    # before, if B is transposed.
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # The best single tile of an A100: longer steps than the default's, and two programs an SM.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3),
    # The best single tile of an H100, for large squares and deep K: one program an SM, and four
    # steps of loads under way.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=5),
    # Medium C: with twice as many programs, the last wave idles less.
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=4),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # Small C: four to eight times as many programs. With so few, nothing hides a load but the
    # stages of their own.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=5),
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=5),
    # Few columns: the ten classes of a classifier fit into one tensor-core instruction.
    dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=4),
    # Tiny products, and float32 of few rows.
    dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, num_warps=2, num_stages=5),
    # The default in TF32. A wgmma takes four warps, and reads 32-bit operands only if they are
    # contiguous along K. Others are turned on their way into shared memory, 4 bytes at a time, and
    # eight threads of a warp meet in each bank (see `lay_by_rows`). With two warps Triton takes the
    # older mma instead, which has its operands in registers, where any order will do.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=2, num_stages=3),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}  # by bytes per element, where the model knows no GPU
TF32_DEFAULT = {4: TILES[-1]}

# The order of programs. Programs start in the order of their number. A wave is as many of them as
# the GPU runs at once. If they went row by row, a wave would read one block row of A and all of B.
# In groups of GROUP_M block rows, a wave covers a nearly square region of C. It then reads fewer
# blocks of A and B, and the L2 cache (the one that all SMs share) serves most of the loads.
#
#     row by row          in groups of 2 block rows
#     0  1  2  3          0  2  4  6          A wave of 4 programs reads 1 + 4 blocks of rows
#     4  5  6  7          1  3  5  7          and columns on the left, and 2 + 2 on the right.


# Shared memory has 32 banks, and one word of 4 bytes lies in each. A bank gives one word at a time,
# so threads that read different words of one bank wait for each other. Without tensor cores, eight
# threads at once read 16 bytes of every fourth column of B. If B is contiguous along K, a column
# takes 16 words (BLOCK_K) in shared memory. So the eight words are 64 words apart: in one bank.


@triton.jit
def lay_by_rows(b):
    """Return b, and have it laid into shared memory once more, in rows of N. No bit changes.

    A sum of one number is that number, but Triton sums in threads that go along the rows.
    """
    return tl.sum(b[:, :, None], axis=2)


def wants_rows(b: torch.Tensor, precision: str) -> bool:
    """Return whether `lay_by_rows` makes a product with `b` [K, N] faster."""
    return b.dtype == torch.float32 and precision == "ieee" and b.stride(0) == 1 != b.stride(1)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr, sums_ptr, M, N, K, part_size,
    stride_am, stride_ak, stride_bk, stride_bn, stride_bias, stride_cm, stride_cn,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    IN_PARTS: tl.constexpr, SUMS: tl.constexpr, BY_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of C = act(A @ B + bias).

    With IN_PARTS it sums only `part_size` elements along K, and c is [parts, M, N] of partial sums.
    With SUMS it also adds up each row of A, into sums [parts, M].
    """
    # Find the tile: go down GROUP_M block rows, then on to the next block column.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)  # the last group may be shorter
    pid_m = first_m + pid % (GROUP_M * blocks_n) % rows
    pid_n = pid % (GROUP_M * blocks_n) // rows

    if IN_PARTS:
        part = tl.program_id(1).to(tl.int64)
        a_ptr += part * part_size * stride_ak
        b_ptr += part * part_size * stride_bk
        c_ptr += part * M * N
        if SUMS:
            sums_ptr += part * M
        K = tl.minimum(K - part * part_size, part_size)

    # Indices become int64 before they are multiplied by a stride: offsets may pass 2^31 elements.
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # Rows and columns past the border wrap around. What they read is valid memory, and its results
    # are never stored. So the loads in the loop need no mask for M and N.
    a_ptrs = a_ptr + (offs_m % M * stride_am)[:, None] + (offs_k * stride_ak)[None, :]
    b_ptrs = b_ptr + (offs_k * stride_bk)[:, None] + (offs_n % N * stride_bn)[None, :]

    step_a = BLOCK_K * tl.cast(stride_ak, tl.int64)
    step_b = BLOCK_K * tl.cast(stride_bk, tl.int64)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    sums = tl.full((BLOCK_M,), 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptrs)  # [BLOCK_K, BLOCK_N]
        else:  # past the end of K, zeros add nothing to the sum
            a = tl.load(a_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None], other=0.0)
        if SUMS:  # A passes through registers, or Triton makes a race: see docs/verification.md
            a = a + 0.0
        if BY_ROWS:
            b = lay_by_rows(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(a.to(tl.float32), axis=1)
        a_ptrs += step_a
        b_ptrs += step_b

    # The epilogue: the tile is still in registers, so only the bias has to be loaded.
    mask_n = offs_n < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    c_ptrs = c_ptr + (offs_m * stride_cm)[:, None] + (offs_n * stride_cn)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])
    if SUMS:
        if pid_n == 0:  # every block column has the same sums: the first one stores them
            tl.store(sums_ptr + offs_m, sums.to(sums_ptr.dtype.element_ty), mask=offs_m < M)


# A small C has few tiles, so it has few programs. If K is long as well (dB of a classifier, for
# example), the pointer kernel divides K into parts, and several programs compute one tile of C. A
# second kernel adds up their partial sums, always in the same order. This is done where C has at
# most SMALL elements and K at least LONG steps.
SMALL, LONG = 2**15, 32


def _parts(M, N, K, tile):
    """Return into how many parts the pointer kernel divides K, and the size of a part."""
    tiles, steps = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]), cdiv(K, tile["BLOCK_K"])
    if M * N > SMALL or steps < LONG:
        return K, 1
    return into_parts(K, tile["BLOCK_K"], part_count(tiles, steps))


@functools.lru_cache(maxsize=4096)
def fast_tile(M, N, K, kind, item, layout, kernels, device):
    """Return the tile that the model finds fastest, or None if it knows nothing of the device."""
    moved = item * (M * K + K * N + M * N)

    def work(tile):
        kernel = tile.get("kernel", "pointer")
        # No measurement has shown yet that "tma_ws" is faster: only a forced or tuned tile has it.
        if kernel not in kernels or kernel == "tma_ws":
            return
        steps = cdiv(K, tile["BLOCK_K"])
        if kernel == "pointer":
            tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
            yield tile, Work(tiles, steps, M * N, moved), _parts(M, N, K, tile)[1]
        else:
            for split, parts, tiles in split_tiles(tile, M, N, K):
                yield split, Work(tiles, steps, M * N, moved), parts

    return fastest_tile(device, "matmul", kind, work, layout)


def matmul_into(c, a, b, bias, activation, precision, sums=None):
    """Launch c = act(a @ b + bias) for a row-major c [M, N], by the kernel of the chosen tile.

    Convolutions whose filter is one pixel call this too, with a precision of their own. If `sums`
    [M] is given, the pointer kernel also adds up each row of `a` in the same pass.
    """
    (M, K), N = a.shape, b.shape[1]
    device, kernels = device_of(a), ("pointer",)
    default = TF32_DEFAULT if precision == "tf32" else DEFAULT
    operands = tma_operands(a, b, precision) if len(device.kernels) > 1 and sums is None else None
    if operands is not None:
        # With K = 1 the compiled kernel has no loop along K. The compiler fails on "tma_ws" then,
        # because there is no loop to specialise (matmul_tma.py explains the kinds of kernels).
        kernels = device.kernels if K > 1 else device.kernels[:2]
    # Tiles were compiled for rows that are aligned to 16 elements. In float32 narrower loads take
    # more registers; in 16-bit they do not spill.
    whole = a.itemsize == 2 or not (M % 16 or N % 16 or K % 16)
    if M and N and K and whole:
        kind, layout = kind_of(a.dtype, precision), layout_of(a.stride(), b.stride())
        if tile := fast_tile(M, N, K, kind, a.itemsize, layout, kernels, device):
            default = {a.itemsize: tile}
    tile = choose_tile("matmul", a, default, kernels, M=M, N=N, K=K)
    if "kernel" in tile:
        matmul_tma(operands, bias, activation, c, tile, precision)
        return
    tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
    part_size, parts = _parts(M, N, K, tile)
    out, out_sums = c, sums
    if parts > 1:
        out = torch.empty(parts * M, N, dtype=torch.float32, device=c.device)
        if sums is not None:
            out_sums = torch.empty(parts, M, dtype=torch.float32, device=c.device)
    launch(
        matmul_kernel, (tiles, parts) if parts > 1 else (tiles,),
        a, b, bias, out, out_sums, M, N, K, part_size,
        *a.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *out.stride(),
        **first_pass(bias, activation, parts), EVEN_K=K % tile["BLOCK_K"] == 0,
        PRECISION=precision, IN_PARTS=parts > 1, SUMS=sums is not None,
        BY_ROWS=wants_rows(b, precision), **tile,
    )  # fmt: skip
    if parts > 1:
        reduce_parts(out, bias, activation, c, M, N, M, parts, out_sums, sums)


@torch.library.custom_op("tilelab::matmul", mutates_args=())
def _matmul(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    c = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    matmul_into(c, a, b, bias, activation, dot_precision(a.dtype, torch.backends.cuda.matmul))
    return c


@_matmul.register_fake
def _(a, b, bias, activation):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("tilelab::matmul_weight_bias_grad", mutates_args=())
def _weight_bias_grad(a: torch.Tensor, dc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dB^T [N, K], dbias [N]) of C = A @ B + bias, from one pass over dC."""
    db = torch.empty(dc.shape[1], a.shape[1], dtype=a.dtype, device=a.device)
    dbias = torch.empty(dc.shape[1], dtype=a.dtype, device=a.device)
    precision = dot_precision(a.dtype, torch.backends.cuda.matmul)
    matmul_into(db, dc.t(), a, None, None, precision, sums=dbias)
    return db, dbias


@_weight_bias_grad.register_fake
def _(a, dc):
    return a.new_empty(dc.shape[1], a.shape[1]), a.new_empty(dc.shape[1])


def _setup_context(ctx, inputs, output):
    a, b, _, activation = inputs
    ctx.activation = activation
    ctx.in_columns = [x.stride(0) == 1 != x.stride(1) for x in (a, b)]
    needs_da, needs_db, *_ = ctx.needs_input_grad
    saved = a if needs_db else None, b if needs_da else None
    ctx.save_for_backward(*saved, kept_for(activation, output))


def _product(a, b, in_columns):
    """Return a @ b, column-major if `in_columns`.

    A gradient has the memory order of its operand: otherwise autograd would copy it.
    """
    if in_columns:
        return _matmul(b.t(), a.t(), None, None).t()
    return _matmul(a, b, None, None)


def _backward(ctx, dc):
    a, b, c = ctx.saved_tensors
    da = db = dbias = None
    if c is not None:  # one pass computes dZ and the bias gradient
        dc, dbias = bias_activation_backward(dc, c, None, ctx.activation)
    elif ctx.needs_input_grad[2]:
        small = ctx.needs_input_grad[1] and 0 < a.shape[1] * dc.shape[1] <= SMALL
        if small and ctx.in_columns[1]:  # one pass computes dB and dbias, as for a classifier
            db, dbias = _weight_bias_grad(a, dc)
            db = db.t()
        else:
            dbias = bias_backward(dc)
    if ctx.needs_input_grad[0]:
        da = _product(dc, b.t(), ctx.in_columns[0])
    if ctx.needs_input_grad[1] and db is None:
        db = _product(a.t(), dc, ctx.in_columns[1])
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
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu". If a gradient is required,
            all but None and ReLU are a pass of their own. It also adds the bias, and reads the
            product as rounded to a's dtype.

    Returns:
        [M, N] of a's dtype, row-major. A GPU rounds float32 operands to TF32 if
        `torch.backends.cuda.matmul.allow_tf32` (or its newer `fp32_precision`) says so.

    Raises:
        TypeError: a dtype or a device is not supported, or differs between the tensors.
        ValueError: the shapes do not fit, or the activation is unknown.

    Source: torch.addmm, and torch.relu or torch.nn.functional's gelu and silu.

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
    check_activation(activation)
    if needs_z(activation, a, b, bias):
        return bias_activation(_matmul(a, b, None, None), bias, activation)
    return _matmul(a, b, bias, activation)
