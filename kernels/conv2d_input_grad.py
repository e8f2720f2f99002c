"""The convolution's gradient with respect to its input: every pixel of dx gathers from dy.

    forward     y[n,k,p,q]  = sum over c,r,s of x[n,c,h,w] * weight[k,c,r,s]
                              with h = p*stride - pad + r*dil, and w likewise
    backward    dx[n,c,h,w] = sum over k,r,s of dy[n,k,p,q] * weight[k,c,r,s]
                              where p = (h + pad - r*dil) / stride is a row of dy, and q likewise

To see why, take a row of four pixels and a filter of three taps a, b, c, with padding 1:

    y[0] =          b*x[0] + c*x[1]
    y[1] = a*x[0] + b*x[1] + c*x[2]             tap r reads pixel h = p - pad + r
    y[2] = a*x[1] + b*x[2] + c*x[3]
    y[3] = a*x[2] + b*x[3]

x[1] is in three lines, so dx[1] = c*dy[0] + b*dy[1] + a*dy[2]. Every pixel has the same formula:

    dx[h] = a*dy[h+1] + b*dy[h] + c*dy[h-1]     tap r reads output p = h + pad - r

The loss sum(dy * y) is linear in x. If one pixel is 1 and the rest are 0, it is that pixel's dx:

    >>> import torch
    >>> from tilelab.kernels import conv2d
    >>> weight = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)       # a, b, c
    >>> dy = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    >>> conv2d_input_grad(dy, weight, [1, 1, 1, 4], [1, 1], [0, 1], [1, 1], 1).flatten()
    tensor([ 12., 123., 234., 340.])
    >>> (dy * conv2d(torch.eye(4).view(4, 1, 1, 4), weight, padding=(0, 1))).sum((1, 2, 3))
    tensor([ 12., 123., 234., 340.])

At stride 2 a pixel takes only some taps. Pixels of one class (A, B, C, D) take the same ones. One
program owns BLOCK_M pixels # of one class x BLOCK_N channels, so it needs no atomics:

    dx           a 3x3 filter with padding 1, where it reads dy; tap (r, s) has the number 3*r + s
    A B A B      stride 1:  8 7 6      stride 2, class A:  4    B:  5 3    C:  7    D:  8 6
    C # C #                 5 4 3                                              1        2 0
    A B A B                 2 1 0      the middle is dy[h, w]; the corner is dy[h // 2, w // 2]

What limits it: tensor cores, as in conv2d.py. It has the same 2*N*P*Q*K*C*R*S FLOPs and as many
bytes: 576 FLOPs per byte for 3x3 filters at stride 1 and 128 channels in 16-bit.
Read first: conv2d.py. Source: Dumoulin & Visin, A guide to convolution arithmetic (2016).
"""

import math

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import dot_precision
from tilelab.kernels._geometry import as_pixels, empty_channels_last
from tilelab.kernels._launch import launch
from tilelab.kernels._tile_facts import kind_of, moved_by, pointer_tile, whole_channels
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.bias_relu import bias_activation_backward
from tilelab.kernels.conv2d_input_grad_tma import conv2d_input_grad_tma, fast_tile, plan_for
from tilelab.kernels.conv2d_tma import choices
from tilelab.kernels.matmul import matmul_into

TILES = [
    # This is the default, as in conv2d.py.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    # This is the default in float32, as in conv2d.py.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
    # A step sums 64 output channels: there are fewer and longer steps.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    # This one is for wide layers on Hopper.
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    # This one makes more programs, for small layers.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
    # These have four warps, as in conv2d.py.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}


# As a matmul, this is [N*H*W, R*S*K] x [R*S*K, C]: the sum runs over taps and output channels.
# Textbooks often flip the filter and convolve dy with it. Here the filter stays as it is, and its
# taps move backwards through dy: `up` and `left` are subtracted.
#
# At stride 2, half of the lines of the header are missing, since y[p] stands over x[2p]:
#
#     y[0] =          b*x[0] + c*x[1]             even pixels   dx[2i]   = b*dy[i]
#     y[1] = a*x[1] + b*x[2] + c*x[3]             odd pixels    dx[2i+1] = a*dy[i+1] + c*dy[i]
#
# Even and odd pixels are two classes. Each class is a convolution of stride 1 with its own taps. In
# two dimensions and with a 3x3 filter, a pixel takes 1, 2, 2 or 4 of the nine taps. (It would also
# be right to put zeros between the rows and columns of dy and convolve that at stride 1. But three
# of four products would then be with zeros.)
#
# The class of pixel h is a = (h + pad) mod stride. Tap r reaches it if r*dil mod stride = a. Let g
# be gcd(dil, stride). If g does not divide a, no tap reaches the class. Otherwise the first one is
#
#     r0 = (a/g) * (dil/g)^-1  mod stride/g
#
# and then every (stride/g)-th tap does. Classes are the usual way to compute a transposed
# convolution with a stride.


@triton.jit
def conv2d_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr, N, C, H, W, K, P, Q,
    stride_dyn, stride_dyk, stride_dyp, stride_dyq, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GCD_H: tl.constexpr, GCD_W: tl.constexpr, INV_H: tl.constexpr, INV_W: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels of one class x BLOCK_N channels of one group of dx.

    GCD = gcd(dilation, stride), INV = (dilation/GCD)^-1 mod stride/GCD. C and K are per group.
    """
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    class_h = tl.program_id(2) // STRIDE_W  # (h + pad) mod stride
    class_w = tl.program_id(2) % STRIDE_W
    dy_ptr += group * K * stride_dyk
    w_ptr += group * K * stride_wk

    # The class has the rows h0, h0 + stride, ... of dx.
    h0 = (class_h + STRIDE_H - PAD_H % STRIDE_H) % STRIDE_H
    w0 = (class_w + STRIDE_W - PAD_W % STRIDE_W) % STRIDE_W
    rows_h = (H - h0 + STRIDE_H - 1) // STRIDE_H
    rows_w = (W - w0 + STRIDE_W - 1) // STRIDE_W
    M = tl.cast(N, tl.int64) * rows_h * rows_w
    if pid_m.to(tl.int64) * BLOCK_M >= M:  # The grid fits the largest class.
        return
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = offs_m % M  # It wraps around: valid to read, and never stored.
    n = pixel // rows_w // rows_h
    h = h0 + pixel // rows_w % rows_h * STRIDE_H
    w = w0 + pixel % rows_w * STRIDE_W

    # The class has the taps r0, r0 + r_step, ... Tap r reads row p0 - r*dil/stride of dy. Both
    # divisions round down: (h + pad) and r*dil have the same remainder, so it cancels.
    r_step: tl.constexpr = STRIDE_H // GCD_H
    s_step: tl.constexpr = STRIDE_W // GCD_W
    r0 = class_h // GCD_H * INV_H % r_step
    s0 = class_w // GCD_W * INV_W % s_step
    taps_r = tl.where(class_h % GCD_H == 0, (R - r0 + r_step - 1) // r_step, 0)
    taps_s = tl.where(class_w % GCD_W == 0, (S - s0 + s_step - 1) // s_step, 0)
    p0 = (h + PAD_H) // STRIDE_H
    q0 = (w + PAD_W) // STRIDE_W

    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    dy_rows = n * stride_dyn + p0 * stride_dyp + q0 * stride_dyq
    dy_ptrs = dy_ptr + dy_rows[:, None] + (offs_k * stride_dyk)[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + (offs_k * stride_wk)[:, None] + (offs_n % C * stride_wc)[None, :]
    step_p = tl.cast(stride_dyp, tl.int64)
    step_q = tl.cast(stride_dyq, tl.int64)
    step_k = tl.cast(stride_dyk, tl.int64)
    step_wr, step_ws = tl.cast(stride_wr, tl.int64), tl.cast(stride_ws, tl.int64)
    step_wk = tl.cast(stride_wk, tl.int64)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    for i in range(0, taps_r * taps_s * blocks_k):
        r = r0 + i // blocks_k // taps_s * r_step
        s = s0 + i // blocks_k % taps_s * s_step
        k = i % blocks_k * BLOCK_K
        up = r * DIL_H // STRIDE_H  # p = p0 - up
        left = s * DIL_W // STRIDE_W
        dy_tap = dy_ptrs + (k * step_k - up * step_p - left * step_q)
        w_tap = w_ptrs + (k * step_wk + r * step_wr + s * step_ws)
        # dy counts as 0 where p or q is not in it.
        inside = (p0 >= up) & (p0 < P + up) & (q0 >= left) & (q0 < Q + left)
        if EVEN_K:
            dy = tl.load(dy_tap, mask=inside[:, None], other=0.0)
            wt = tl.load(w_tap)  # [BLOCK_K, BLOCK_N]
        else:
            mask_k = offs_k < K - k
            dy = tl.load(dy_tap, mask=inside[:, None] & mask_k[None, :], other=0.0)
            wt = tl.load(w_tap, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(dy, wt, acc, input_precision=PRECISION)

    dx_rows = n * stride_dxn + h * stride_dxh + w * stride_dxw
    dx_ptrs = dx_ptr + dx_rows[:, None] + ((group * C + offs_n) * stride_dxc)[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < C)[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def _inverse(dilation: int, stride: int) -> tuple[int, int]:
    """Return g = gcd(dilation, stride) and the inverse of dilation/g modulo stride/g.

    The inverse is 0 if stride/g is 1.
    """
    g = math.gcd(dilation, stride)
    return g, pow(dilation // g, -1, stride // g) if stride > g else 0


@torch.library.custom_op("tilelab::conv2d_input_grad", mutates_args=())
def conv2d_input_grad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Return the gradient of conv2d's x [N, C, H, W] = input_size, from dy [N, K, P, Q].

    It is channels_last and has the dtype of dy.
    """
    dx = empty_channels_last(input_size, dy)
    (N, _, H, W), (_, C, R, S), (_, K, P, Q) = input_size, weight.shape, dy.shape
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    pixels = as_pixels(dy, stride, padding, groups) if R * S == 1 else None
    plan = None
    if pixels is None or precision == "tf32":
        plan = plan_for(dy, weight, input_size, stride, padding, dilation, groups, precision)
    # A 1x1 filter at stride 1 without padding is a matmul. But matmul's TMA kernel cannot take this
    # weight in TF32. The convolution's TMA kernel packs it, so it comes first where it can.
    if pixels is not None and plan is None:
        rows = dx.permute(0, 2, 3, 1).view(N * H * W, C)
        matmul_into(rows, pixels, weight.view(K, C), None, None, precision)
        return dx

    K //= groups
    M = N * cdiv(H, stride[0]) * cdiv(W, stride[1])  # the number of pixels of the largest class
    default, kernels = choices(
        plan, dy, DEFAULT, ("pointer",), lambda device: fast_tile(plan, dy.itemsize, device),
        lambda device: pointer_tile(
            device, "conv2d_input_grad", kind_of(dy.dtype, precision), M, C, K,
            R * S / math.prod(stride), groups * math.prod(stride), moved_by(dy, weight, dx),
            whole_channels(dy, C, K),
        ),
    )  # fmt: skip
    tile = choose_tile("conv2d_input_grad", dy, default, kernels, M=M, N=C, K=K)
    # The tile says which kernel computes the call. This file's takes every GPU, dtype and stride.
    if "kernel" in tile:
        conv2d_input_grad_tma(plan, dy, weight, None, dx, None, tile, precision, padding)
        return dx
    blocks = cdiv(M, tile["BLOCK_M"]) * cdiv(C, tile["BLOCK_N"])
    (gcd_h, inv_h), (gcd_w, inv_w) = (_inverse(d, s) for d, s in zip(dilation, stride, strict=True))
    launch(
        conv2d_input_grad_kernel, (blocks, groups, stride[0] * stride[1]),
        dy, weight, dx, N, C, H, W, K, P, Q, *dy.stride(), *weight.stride(), *dx.stride(),
        R, S, *stride, *padding, *dilation, gcd_h, gcd_w, inv_h, inv_w,
        PRECISION=precision, EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
    )  # fmt: skip
    return dx


@conv2d_input_grad.register_fake
def _(dy, weight, input_size, stride, padding, dilation, groups):
    return empty_channels_last(input_size, dy)


@torch.library.custom_op("tilelab::conv2d_input_grad_relu", mutates_args=())
def conv2d_input_grad_relu(
    dy: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dz [N, C, H, W] and dbias [C], where conv2d's x is itself relu(z + bias).

    The TMA kernel applies the ReLU to its tile of dx. Elsewhere a second kernel does.
    """
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    # The TMA kernel takes a 1x1 filter too. matmul could not apply the ReLU as it ends.
    plan = None
    if x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0:
        plan = plan_for(dy, weight, x.shape, stride, padding, dilation, groups, precision)
    if plan is not None and plan.fold is None:
        (N, C, H, W), K = x.shape, dy.shape[1]
        M = N * cdiv(H, stride[0]) * cdiv(W, stride[1])
        default, kernels = choices(
            plan,
            dy,
            DEFAULT,
            ("pointer",),
            lambda device: fast_tile(plan, dy.itemsize, device, True),
        )
        tile = choose_tile("conv2d_input_grad_relu", dy, default, kernels, M=M, N=C, K=K)
        if "kernel" in tile:
            dz, dbias = torch.empty_like(x), dy.new_empty(C)
            conv2d_input_grad_tma(plan, dy, weight, x, dz, dbias, tile, precision, padding)
            return dz, dbias
    dx = conv2d_input_grad(dy, weight, list(x.shape), stride, padding, dilation, groups)
    return bias_activation_backward(dx, x, None, "relu")


@conv2d_input_grad_relu.register_fake
def _(dy, weight, x, stride, padding, dilation, groups):
    return torch.empty_like(x), dy.new_empty(x.shape[1])
