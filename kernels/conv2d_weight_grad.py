"""The convolution's gradient with respect to its weight: a small result of a very long sum.

    forward     y[n,k,p,q] = sum over c,r,s of x[n,c,h,w] * weight[k,c,r,s]
                             with h = p*stride - pad + r*dil, and w likewise
    backward    dweight[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w]
                dbias[k]         = sum over n,p,q of dy[n,k,p,q], which is read here anyway

To see why, take a row of four pixels and a filter of three taps a, b, c, with padding 1:

    y[0] =          b*x[0] + c*x[1]             da =              dy[1]*x[0] + dy[2]*x[1] + ...
    y[1] = a*x[0] + b*x[1] + c*x[2]             db = dy[0]*x[0] + dy[1]*x[1] + dy[2]*x[2] + ...
    y[2] = a*x[1] + b*x[2] + c*x[3]             dc = dy[0]*x[1] + dy[1]*x[2] + dy[2]*x[3]
    y[3] = a*x[2] + b*x[3]                      dweight[r] = sum over p of dy[p] * x[p - pad + r]

The loss sum(dy * y) is linear in the taps too. If one tap is 1 and the rest are 0, the loss is the
gradient of that tap:

    >>> import torch
    >>> from tilelab.kernels import conv2d
    >>> x = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 1, 4)
    >>> dy = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    >>> weight = torch.eye(3).view(3, 1, 1, 3)                       # three filters with one 1 each
    >>> (dy * conv2d(x, weight, padding=(0, 1))).sum((0, 2, 3))
    tensor([ 432., 4321., 3210.])
    >>> conv2d_weight_grad(x, dy, weight[:1], [1, 1], [0, 1], [1, 1], 1).flatten()
    tensor([ 432., 4321., 3210.])

           N*P*Q               R*S*C               R*S*C
       +-----+------+        +--+---+--+         +--+---+--+
     K |====>|      |   x    |  | v |  |   =   K |  | # |  |     # one program: BLOCK_M filters x
       +-----+------+        |..|...|..|         +--+---+--+       BLOCK_N of (r, s, c), and one
        one part             |  |   |  |                           part of the sum over the pixels

The sum over all pixels of the batch is long, and its result has only K*R*S*C numbers. To fill
the GPU, many programs share one sum. Each writes its part, and a second kernel adds the parts up in
order.

What limits it: tensor cores, as in conv2d.py, with as many FLOPs (2*N*P*Q*K*C*R*S) and bytes. x
comes out of the cache R*S times, once for each tap. With few channels that cache is the limit.
Read first: conv2d.py, conv2d_input_grad.py. Then: conv2d_weight_grad_tma.py, where taps share x.
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import dot_precision
from tilelab.kernels._launch import launch
from tilelab.kernels._partial_sums import sum_partials
from tilelab.kernels._tile_facts import kind_of, moved_by, pointer_tile, whole_channels
from tilelab.kernels._tiles import cdiv, choose_tile, into_parts, part_count
from tilelab.kernels.conv2d_tma import choices
from tilelab.kernels.conv2d_weight_grad_tma import conv2d_weight_grad_tma, fast_tile, plan_for

TILES = [
    # This is the default. It is small: with few channels, addresses and masks take the registers.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),
    # This is the default in float32, as in conv2d.py.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
    # This one uses what it loads more often.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    # A step sums 64 pixels: there are fewer and longer steps.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    # This one is for wide layers on Hopper.
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    # This one makes more programs, for small layers.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
    # This is the default in TF32 for channels_last memory, as in matmul.py. Neither operand is
    # contiguous along the pixels there, and Hopper's wgmma would have both turned on their way into
    # shared memory, where eight threads meet in each bank. With two warps there is no wgmma.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=2, num_stages=3),
    # The same where a load cannot take four channels, as in a first layer. Masks and addresses take
    # more registers there, so there are half as many columns.
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=2, num_stages=3),
    # These have four warps, as in conv2d.py.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
TF32_DEFAULT, TF32_FEW_DEFAULT = {4: TILES[6]}, {4: TILES[7]}


# In one dimension, the kernel lays one row over the other, shifted by the tap. It multiplies where
# they overlap, and adds up:
#
#     tap a, r = 0          tap b, r = 1          tap c, r = 2
#     dy    0 1 2 3         dy  0 1 2 3           dy  0 1 2 3
#     x   . 0 1 2 3         x   0 1 2 3           x   1 2 3 .
#
# In two dimensions, take an image of 4x4 pixels and a 3x3 filter with padding 1. A tap multiplies
# the pixels # of dy, above, by the pixels # of x, below. A dot has no partner in the other one:
#
#     tap (0, 0)    tap (0, 1)    tap (0, 2)    tap (1, 0)    tap (1, 1)    tap (2, 2)
#      . . . .       . . . .       . . . .       . # # #       # # # #       # # # .
#      . # # #       # # # #       # # # .       . # # #       # # # #       # # # .
#      . # # #       # # # #       # # # .       . # # #       # # # #       # # # .
#      . # # #       # # # #       # # # .       . # # #       # # # #       . . . .
#
#      # # # .       # # # #       . # # #       # # # .       # # # #       . . . .
#      # # # .       # # # #       . # # #       # # # .       # # # #       . # # #
#      # # # .       # # # #       . # # #       # # # .       # # # #       . # # #
#      . . . .       . . . .       . . . .       # # # .       # # # #       . # # #


@triton.jit
def conv2d_weight_grad_kernel(
    x_ptr, dy_ptr, dw_ptr, db_ptr, N, C, H, W, K, P, Q, part_pixels, SIZE,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_dyn, stride_dyk, stride_dyp, stride_dyq,
    stride_wk, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, ATOMIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M filters x BLOCK_N of (r, s, c) of dweight, over `part_pixels`.

    dw_ptr is [parts, SIZE]; each row is laid out as dweight. With ATOMIC all programs add to one
    row. The programs of the first columns also write db_ptr [parts, groups * K].
    """
    blocks_n = tl.cdiv(R * S * C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    x_ptr += group * C * stride_xc
    dy_ptr += group * K * stride_dyk

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # k
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (r, s, c), c fastest
    c = offs_n % C
    s = offs_n // C % S
    r = offs_n // C // S
    mask_m = offs_m < K
    mask_n = offs_n < R * S * C
    x_cols = r * DIL_H * stride_xh + s * DIL_W * stride_xw + c * stride_xc
    first = tl.program_id(2).to(tl.int64) * part_pixels
    pixels = tl.minimum(N * tl.cast(P, tl.int64) * Q - first, part_pixels).to(tl.int32)
    first_q = (first % Q).to(tl.int32)  # 32 bits divide much faster than 64.
    first_p = (first // Q % P).to(tl.int32)
    first_n = first // Q // P

    total = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)  # the sum of dy, for the bias
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for pixel in range(0, pixels, BLOCK_K):
        offs_k = pixel + tl.arange(0, BLOCK_K)
        mask_k = offs_k < pixels
        rows = first_p + (first_q + offs_k) // Q
        q = ((first_q + offs_k) % Q).to(tl.int64)
        p = (rows % P).to(tl.int64)
        n = first_n + rows // P
        dy_cols = n * stride_dyn + p * stride_dyp + q * stride_dyq
        dy_ptrs = dy_ptr + (offs_m * stride_dyk)[:, None] + dy_cols[None, :]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if HAS_BIAS:
            dy = dy + 0.0  # through registers, or Triton makes a race: see docs/verification.md
            total += dy.to(tl.float32)
        h = p * STRIDE_H - PAD_H
        w = q * STRIDE_W - PAD_W
        x_rows = n * stride_xn + h * stride_xh + w * stride_xw
        x_mask = mask_k[:, None] & mask_n[None, :]  # [BLOCK_K, BLOCK_N]
        # Without padding, every tap is inside the image.
        if PAD_H > 0:
            tap_h = h[:, None] + (r * DIL_H)[None, :]
            x_mask &= (tap_h >= 0) & (tap_h < H)
        if PAD_W > 0:
            tap_w = w[:, None] + (s * DIL_W)[None, :]
            x_mask &= (tap_w >= 0) & (tap_w < W)
        x = tl.load(x_ptr + x_rows[:, None] + x_cols[None, :], mask=x_mask, other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    part = tl.program_id(2).to(tl.int64)
    if not ATOMIC:
        dw_ptr += part * SIZE
    dw_cols = r * stride_wr + s * stride_ws + c * stride_wc
    dw_ptrs = dw_ptr + ((group * K + offs_m) * stride_wk)[:, None] + dw_cols[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ATOMIC:  # The programs add in whatever order they come.
        tl.atomic_add(dw_ptrs, acc, mask=mask, sem="relaxed")
    else:
        tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        if pid_n == 0:
            filters = tl.num_programs(1).to(tl.int64) * K
            db_ptrs = db_ptr + part * filters + group * K + offs_m
            tl.store(db_ptrs, tl.sum(total, axis=1).to(db_ptr.dtype.element_ty), mask=mask_m)


def _weight_grad(x, dy, weight, stride, padding, dilation, groups, with_bias):
    """Return dweight, which lies in memory as weight does, and dbias, or None without bias."""
    dweight, dbias = torch.empty_like(weight), None
    if with_bias:
        dbias = torch.empty(weight.shape[0], dtype=dy.dtype, device=dy.device)
    (N, _, H, W), (_, C, R, S), (_, K, P, Q) = x.shape, weight.shape, dy.shape
    K //= groups
    M = N * P * Q
    plan = plan_for(x, dy, (R, S), stride, padding, dilation, groups)
    precision = dot_precision(x.dtype, torch.backends.cudnn.conv)
    default = DEFAULT
    if precision == "tf32" and x.stride(1) == 1:
        default = TF32_FEW_DEFAULT if C % 4 else TF32_DEFAULT
    default, kernels = choices(
        plan, x, default, ("pointer",),
        lambda device: fast_tile(plan, device, with_bias),
        lambda device: pointer_tile(
            device, "conv2d_weight_grad", kind_of(x.dtype, precision), K, R * S * C, M, 1, groups,
            moved_by(x, dy, dweight), whole_channels(x, C, K), part_count,
        ),
    )  # fmt: skip
    tile = choose_tile("conv2d_weight_grad", x, default, kernels, K=M, M=K, N=R * S * C)
    # The tile says which kernel computes the call. This file's takes every GPU, dtype and stride.
    if "kernel" in tile:
        conv2d_weight_grad_tma(plan, x, dy, dweight, dbias, tile, padding)
        return dweight, dbias

    # Atomics would save the second kernel. But then chance decides on the order of additions, and
    # with it on the last bits. No tile has atomics by default. To see what they do, use_tile
    # ("conv2d_weight_grad", tile | dict(ATOMIC=True)), unless torch is told to be deterministic.
    options = dict(tile)
    atomic = options.pop("ATOMIC", False) and not torch.are_deterministic_algorithms_enabled()
    blocks = cdiv(K, tile["BLOCK_M"]) * cdiv(R * S * C, tile["BLOCK_N"])
    steps = cdiv(M, tile["BLOCK_K"])
    part_pixels, parts = into_parts(M, tile["BLOCK_K"], part_count(blocks * groups, steps))
    size = dweight.numel()
    partials, sums = dweight, dbias
    if atomic:
        partials = torch.zeros(1, size, dtype=torch.float32, device=x.device)
    elif parts > 1:
        partials = torch.empty(parts, size, dtype=torch.float32, device=x.device)
    if with_bias and parts > 1:
        sums = torch.empty(parts, dbias.numel(), dtype=torch.float32, device=x.device)
    launch(
        conv2d_weight_grad_kernel, (blocks, groups, parts),
        x, dy, partials, sums, N, C, H, W, K, P, Q, part_pixels, size,
        *x.stride(), *dy.stride(), *dweight.stride(), R, S, *stride, *padding, *dilation,
        PRECISION=precision, HAS_BIAS=with_bias, ATOMIC=atomic, **options,
    )  # fmt: skip
    if partials is not dweight:
        sum_partials(partials, dweight, *((sums, dbias) if sums is not dbias else ()))
    return dweight, dbias


@torch.library.custom_op("tilelab::conv2d_weight_grad", mutates_args=())
def conv2d_weight_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Return the gradient of conv2d's weight [K, C/groups, R, S], from x and dy [N, K, P, Q].

    It has the dtype of weight, and lies in memory as weight does.
    """
    return _weight_grad(x, dy, weight, stride, padding, dilation, groups, False)[0]


@conv2d_weight_grad.register_fake
def _(x, dy, weight, stride, padding, dilation, groups):
    return torch.empty_like(weight)


@torch.library.custom_op("tilelab::conv2d_weight_bias_grad", mutates_args=())
def conv2d_weight_bias_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same, and the gradient of the bias [K]. dy is read only once for both."""
    return _weight_grad(x, dy, weight, stride, padding, dilation, groups, True)


@conv2d_weight_bias_grad.register_fake
def _(x, dy, weight, stride, padding, dilation, groups):
    return torch.empty_like(weight), dy.new_empty(weight.shape[0])
