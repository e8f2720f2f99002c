"""The convolution's gradient with respect to its input: the forward with its steps turned round.

**One row of pixels.** Three taps a, b, c, padding 1, four pixels:

    y[0] =          b*x[0] + c*x[1]
    y[1] = a*x[0] + b*x[1] + c*x[2]             tap r reads pixel h = p - pad + r
    y[2] = a*x[1] + b*x[2] + c*x[3]
    y[3] = a*x[2] + b*x[3]

If the loss changes by dy[p] for a unit of y[p], it changes for a unit of x[h] by the sum, over all
p, of dy[p] times what y[p] has of x[h]. For x[1], down its column: c*dy[0] + b*dy[1] + a*dy[2].

    dx[h] = a*dy[h+1] + b*dy[h] + c*dy[h-1]     tap r reads output p = h + pad - r

That is the same convolution, of dy, except that a tap steps back where it stepped forward. It is
often told as one with the filter reversed; but nothing has to be moved in memory for a minus sign.

**Stride 2.** Now y[p] stands over x[2p], and half of the lines above are missing:

    y[0] =          b*x[0] + c*x[1]             even pixels   dx[2i]   = b*dy[i]
    y[1] = a*x[1] + b*x[2] + c*x[3]             odd pixels    dx[2i+1] = a*dy[i+1] + c*dy[i]

Two sorts of pixels (phases), and each is a convolution of stride 1, with taps of its own. The other
way to see it is a dy with zeros between its numbers, and the convolution of stride 1 over that: in
two dimensions it would multiply by zero three times out of four.

**An image**, in cuDNN's letters:

    forward          y[n,k,p,q]  = sum over c,r,s of x[n,c,h,w] * weight[k,c,r,s]
                     with h = p*stride - pad + r*dil, and w alike
    input gradient   dx[n,c,h,w] = sum over k,r,s of dy[n,k,p,q] * weight[k,c,r,s]
                     where p*stride = h + pad - r*dil has a solution p in 0 .. P-1, and q alike
    as a matmul      [NHW, RSK] x [RSK, C]      the sum runs over taps and output channels

Each program owns pixels of dx and gathers from the outputs that they went into: no atomics, nothing
to clear first, one rounding. Of a 3x3 filter with padding 1 and taps numbered 3r + s, which tap
reads which pixels of dy, for the pixel (h, w) of dx:

    stride 1: around dy[h, w]      stride 2: from dy[h // 2, w // 2] on, right and down

       8 7 6                          h, w even      h odd      w odd      both odd
       5 4 3                             4             7         5 3          8 6
       2 1 0                                           1                      2 0

So at stride 2 a pixel takes 1, 2, 2 or 4 of the nine taps, and no product is spent on the others.
In general, with g = gcd(dil, stride): pixels sort into stride_h x stride_w classes by
a = (h + pad) mod stride (and b, of w); class a has no tap unless g divides it, and else

    r = (a/g) * (dil/g)^-1  mod stride/g, and every stride/g-th after it

**Check it.** The loss is linear in x, so a step of 1 in a pixel must change it by that pixel's dx:

    >>> import torch
    >>> from tilelab.kernels import conv2d
    >>> weight = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)       # a, b, c
    >>> dy = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    >>> conv2d_input_grad(dy, weight, [1, 1, 1, 4], [1, 1], [0, 1], [1, 1], 1).flatten()
    tensor([ 12., 123., 234., 340.])
    >>> def loss(x):
    ...     return (dy * conv2d(x, weight, padding=(0, 1))).sum()
    >>> x = torch.randn(1, 1, 1, 4)
    >>> steps = torch.eye(4).view(4, 1, 1, 1, 4)                         # one pixel each
    >>> [round((loss(x + step) - loss(x)).item()) for step in steps]
    [12, 123, 234, 340]

(On a CPU: `python -m pytest --doctest-modules kernels/conv2d_input_grad.py`.)

FLOPs: 2*N*P*Q*K*C*R*S, as for the forward. What limits it: as there, tensor cores. On GPUs since
Hopper channels_last tensors take the kernel in conv2d_input_grad_tma.py, by their tile.

Read first: conv2d.py. Source: Dumoulin & Visin, A guide to convolution arithmetic (2016), for the
transposed form; the classes are the usual decomposition of a strided transposed convolution.
"""

import math

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import dot_precision
from tilelab.kernels._geometry import as_pixels, empty_channels_last
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.bias_relu import bias_activation_backward
from tilelab.kernels.conv2d_input_grad_tma import conv2d_input_grad_tma, fast_tile, plan_for
from tilelab.kernels.conv2d_tma import choices
from tilelab.kernels.matmul import matmul_into

TILES = [
    # the default, as in conv2d.py
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    # float32, as in conv2d.py
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
    # 64 deep: fewer, longer steps
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    # wide layers on Hopper
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    # small layers: more programs
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}


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

    # The pixels of this class: h0, h0 + stride, ...
    h0 = (class_h + STRIDE_H - PAD_H % STRIDE_H) % STRIDE_H
    w0 = (class_w + STRIDE_W - PAD_W % STRIDE_W) % STRIDE_W
    rows_h = (H - h0 + STRIDE_H - 1) // STRIDE_H
    rows_w = (W - w0 + STRIDE_W - 1) // STRIDE_W
    M = tl.cast(N, tl.int64) * rows_h * rows_w
    if pid_m.to(tl.int64) * BLOCK_M >= M:  # this class has fewer pixels than the largest
        return
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = offs_m % M
    n = pixel // rows_w // rows_h
    h = h0 + pixel // rows_w % rows_h * STRIDE_H
    w = w0 + pixel % rows_w * STRIDE_W

    # The taps of this class: r0, r0 + r_step, ... And the output that tap 0 would have come from.
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
        up = r * DIL_H // STRIDE_H  # p = p0 - up: (h + pad) and r*dil leave the same remainder
        left = s * DIL_W // STRIDE_W
        dy_tap = dy_ptrs + (k * step_k - up * step_p - left * step_q)
        w_tap = w_ptrs + (k * step_wk + r * step_wr + s * step_ws)
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
    """Return g = gcd and the inverse of dilation/g modulo stride/g (0 where that is 1)."""
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
    """The gradient of conv2d's x [N, C, H, W] = input_size, channels_last, from dy [N, K, P, Q]."""
    dx = empty_channels_last(input_size, dy)
    (N, _, H, W), (_, C, R, S), (_, K, P, Q) = input_size, weight.shape, dy.shape
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    pixels = as_pixels(dy, stride, padding, groups) if R * S == 1 else None
    plan = None
    if pixels is None or precision == "tf32":
        plan = plan_for(dy, weight, input_size, stride, padding, dilation, groups, precision)
    # A filter of one pixel: a matmul. For TF32, which wants its columns packed, only if it must.
    if pixels is not None and plan is None:
        rows = dx.permute(0, 2, 3, 1).view(N * H * W, C)
        matmul_into(rows, pixels, weight.view(K, C), None, None, precision)
        return dx

    K //= groups
    M = N * cdiv(H, stride[0]) * cdiv(W, stride[1])  # pixels of the largest class
    default, kernels = choices(
        plan, dy, DEFAULT, ("pointer",), lambda sms: fast_tile(plan, dy.itemsize, sms)
    )
    tile = choose_tile("conv2d_input_grad", dy.dtype, default, kernels, M=M, N=C, K=K)
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
    """Where x is itself act(z + bias) with a ReLU: the gradients of z, as x, and of that bias."""
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    plan = None
    if x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0:
        plan = plan_for(dy, weight, x.shape, stride, padding, dilation, groups, precision)
    if plan is not None and plan.fold is None:
        (N, C, H, W), K = x.shape, dy.shape[1]
        M = N * cdiv(H, stride[0]) * cdiv(W, stride[1])
        default, kernels = choices(
            plan, dy, DEFAULT, ("pointer",), lambda sms: fast_tile(plan, dy.itemsize, sms, True)
        )
        tile = choose_tile("conv2d_input_grad_relu", dy.dtype, default, kernels, M=M, N=C, K=K)
        if "kernel" in tile:
            dz, dbias = torch.empty_like(x), dy.new_empty(C)
            conv2d_input_grad_tma(plan, dy, weight, x, dz, dbias, tile, precision, padding)
            return dz, dbias
    dx = conv2d_input_grad(dy, weight, list(x.shape), stride, padding, dilation, groups)
    return bias_activation_backward(dx, x, None, "relu")


@conv2d_input_grad_relu.register_fake
def _(dy, weight, x, stride, padding, dilation, groups):
    return torch.empty_like(x), dy.new_empty(x.shape[1])
