"""Direct convolution by implicit GEMM: a matmul whose left matrix is never written to memory.

In cuDNN's letters: x [N, C, H, W], weight [K, C, R, S], y [N, K, P, Q].

    forward     y[n,k,p,q]  = act(bias[k] + sum over c,r,s of x[n, c, h, w] * weight[k,c,r,s])
                              with h = p*stride - padding + r*dilation, and w alike
    backward    dx, dweight: the two other products of the same three tensors, each a lesson of its
                own: conv2d_input_grad.py, conv2d_weight_grad.py
                dbias = sum over n,p,q of dy, in the pass through the ReLU (bias_relu.py) or, if
                there is none, in that of dweight

Seen as a matmul, a row is an output pixel, a column is an output channel, and the sum runs over the
filter taps and the input channels:

    GEMM M = N*P*Q      x as [N*P*Q, R*S*C]        a tile of rows, and its input for one tap:
    GEMM N = K          weight as [R*S*C, K]           q ->               w ->
    GEMM K = R*S*C      y as [N*P*Q, K]              p # # # #          h . . . . . .
                                                     | # # # #          | . . + + + +
    for each tile (m, k) of y, in parallel:          v                  v . . + + + +
        acc = 0
        for each tap (r, s):                       the same pixels, shifted by the tap; where they
            for each block of channels c:          fall into the padding, the load is masked to 0
                acc += x[pixels of m shifted by (r, s), c] @ weight[k, c, r, s]
        y[m, k] = act(acc + bias[k])

The matrix [N*P*Q, R*S*C] holds every input pixel up to R*S times. im2col.py writes it out and pays
for that in bandwidth; here a program computes the addresses instead, and the copies come out of
the cache.

Four kernels compute it, each to be read after the one before, and each a rung of a ladder. What a
rung costs is counted in instructions: an SM issues four a clock, in which its tensor cores do 4,096
FLOPs in 16-bit. So a kernel with more than one instruction for 1,024 FLOPs cannot keep them busy.

    rung      kernel                  what changes                        instructions
    direct    conv2d_direct_kernel    the seven loops as on paper         124
    flat      conv2d_flat_kernel      a matmul: tensor cores              1.5
    pointer   conv2d_kernel           a step is one tap: no divisions     0.31
    tma       conv2d_tma.py           a unit fetches boxes of pixels      0.20

(Compiled for sm_90 by triton 3.9.0, each with the largest tile of its list; not run.)

Which one a call takes: TMA where GPU and tensors have it, else the pointers of conv2d_kernel, for
few channels those of conv2d_flat_kernel. A filter of one pixel is a matmul, a filter for each
channel a kernel of its own (conv2d_depthwise.py). `use_tile("conv2d", tile)` forces any rung, since
a tile says which kernel it is for.

What limits it: 2*N*P*Q*K*C*R*S FLOPs over e(|x| + |weight| + |y|) bytes. For large images and 128
channels in and out, in 16-bit, a 3x3 layer does 576 FLOPs a byte: tensor cores (an H200 does 206 in
the time of one byte). A 1x1 layer does 64, the first layer of a ResNet (7x7, 3 channels to 64) 124:
those wait for memory.

Memory is channels_last: then the C numbers of a pixel lie side by side, a row of the tile is one
contiguous load, and a tap is one number added to all addresses. Any other strides are accepted.

Read first: matmul.py. Source: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning (2014).
"""

import functools

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import autocast, dot_precision
from tilelab.kernels._geometry import as_pixels, check_conv2d, empty_channels_last, output_size
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.activation import activate, activated, kept_for, needs_z
from tilelab.kernels.bias_relu import bias_activation, bias_activation_backward, bias_backward
from tilelab.kernels.conv2d_depthwise import conv2d_depthwise, is_depthwise
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad
from tilelab.kernels.conv2d_tma import choices, conv2d_tma, fast_tile, plan_for
from tilelab.kernels.conv2d_weight_grad import conv2d_weight_bias_grad, conv2d_weight_grad
from tilelab.kernels.matmul import matmul_into


def reference(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation=None):
    """The same in plain torch, for any dtype."""
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return activated(y, activation)


TILES = [
    # the default: both operands of three stages in 48 KiB, so it runs on every GPU since 2020
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    # float32: without TF32 each thread holds its rows and columns of a step in registers
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
    # 64 channels deep: half as many taps to look up
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    # wide layers: the most reuse that fits the registers. Of Hopper's, conv2d_tma.py has a better
    # one; in this kernel triton 3.6.0 makes each wgmma of it wait for the last
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    # 64 output channels (the first stage of a ResNet): nothing of the tile is padding
    dict(BLOCK_M=256, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),
    # small images and small batches: four times the programs
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
    # few input channels: conv2d_flat_kernel needs the registers for addresses and masks
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
FLAT_DEFAULT = {2: TILES[6], 4: TILES[6]}
# The rungs that a call takes only if it is forced to: `use_tile("conv2d", tile)`, or a sweep.
RUNGS = [
    # eight products a thread and step: more of them, and their addresses spill
    dict(kernel="direct", BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),
    dict(kernel="flat", BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
]
FEW_CHANNELS = 16  # below this a block of one tap's channels would be mostly padding


@triton.jit
def conv2d_direct_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, C, H, W, K, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_bias, stride_yn, stride_yk, stride_yp, stride_yq,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of y: BLOCK_M pixels x BLOCK_N channels of one group.

    Naive: the seven loops as they are written on paper, four of them side by side in the tile and
    the other three one after the other. Each step is BLOCK_M + BLOCK_N numbers and their products,
    and no tensor core multiplies single numbers.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n  # programs that share their pixels run side by side
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    M = tl.cast(N, tl.int64) * P * Q
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < K
    n, p, q = offs_m // Q // P, offs_m // Q % P, offs_m % Q
    offs_k = group * K + offs_n

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for r in range(R):
        for s in range(S):
            h = p * STRIDE_H - PAD_H + r * DIL_H
            w = q * STRIDE_W - PAD_W + s * DIL_W
            inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_ptrs = x_ptr + n * stride_xn + h * stride_xh + w * stride_xw
            w_ptrs = w_ptr + offs_k * stride_wk + r * stride_wr + s * stride_ws
            for c in range(C):
                x_c = (group * C + c) * stride_xc
                x = tl.load(x_ptrs + x_c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M]
                w_c = tl.cast(c, tl.int64) * stride_wc
                wt = tl.load(w_ptrs + w_c, mask=mask_n, other=0.0).to(tl.float32)  # [BLOCK_N]
                acc += x[:, None] * wt[None, :]

    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_k * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    y_rows = n * stride_yn + p * stride_yp + q * stride_yq
    y_ptrs = y_ptr + y_rows[:, None] + (offs_k * stride_yk)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def conv2d_flat_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, C, H, W, K, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_bias, stride_yn, stride_yk, stride_yp, stride_yq,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of y: BLOCK_M pixels x BLOCK_N channels of one group.

    Implicit GEMM, and the one for few channels: taps and channels are one long sum over j in
    [0, R*S*C), a step of it is a product for the tensor cores, and every step finds out which
    (r, s, c) its columns are. C and K are per group.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n  # programs that share their pixels run side by side
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    x_ptr += group * C * stride_xc
    w_ptr += group * K * stride_wk

    M = tl.cast(N, tl.int64) * P * Q
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = offs_m % M  # past the border it wraps around: valid to read, never stored
    n, p, q = pixel // Q // P, pixel // Q % P, pixel % Q
    h, w = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W  # of tap (0, 0)
    x_rows = n * stride_xn + h * stride_xh + w * stride_xw
    w_cols = offs_n % K * stride_wk

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for j0 in range(0, R * S * C, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K).to(tl.int64)
        c = j % C
        r = j // C // S * DIL_H
        s = j // C % S * DIL_W
        x_mask = (j < R * S * C)[None, :]
        if PAD_H > 0:
            x_mask &= (h[:, None] + r[None, :] >= 0) & (h[:, None] + r[None, :] < H)
        if PAD_W > 0:
            x_mask &= (w[:, None] + s[None, :] >= 0) & (w[:, None] + s[None, :] < W)
        x_cols = r * stride_xh + s * stride_xw + c * stride_xc
        x = tl.load(x_ptr + x_rows[:, None] + x_cols[None, :], mask=x_mask, other=0.0)
        w_rows = j // C // S * stride_wr + j // C % S * stride_ws + c * stride_wc
        w_mask = (j < R * S * C)[:, None]
        wt = tl.load(w_ptr + w_rows[:, None] + w_cols[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, wt, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

    mask_n = offs_n < K
    offs_k = group * K + offs_n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_k * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    y_rows = n * stride_yn + p * stride_yp + q * stride_yq
    y_ptrs = y_ptr + y_rows[:, None] + (offs_k * stride_yk)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])


@triton.jit
def conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, C, H, W, K, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_bias, stride_yn, stride_yk, stride_yp, stride_yq,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN_C: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of y: BLOCK_M pixels x BLOCK_N channels of one group.

    Faster: a step is a block of channels of one tap. A tap moves all pixels by the same distance:
    the tile of addresses is made once, a step adds one number to it, and divides only scalars.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    INDEX: tl.constexpr = tl.int32 if NEAR else tl.int64  # half the registers, half the additions
    x_ptr += group * C * stride_xc
    w_ptr += group * K * stride_wk

    M = tl.cast(N, INDEX) * P * Q
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_K).to(INDEX)
    pixel = offs_m % M
    n, p, q = pixel // Q // P, pixel // Q % P, pixel % Q
    h, w = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W
    x_rows = n * stride_xn + h * stride_xh + w * stride_xw
    x_offs = x_rows[:, None] + (offs_c * stride_xc)[None, :]  # [BLOCK_M, BLOCK_K]
    w_offs = (offs_c * stride_wc)[:, None] + (offs_n % K * stride_wk)[None, :]
    step_h = tl.cast(stride_xh, tl.int64) * DIL_H  # from one tap to the next
    step_w = tl.cast(stride_xw, tl.int64) * DIL_W
    step_c = tl.cast(stride_xc, tl.int64)
    step_wr, step_ws = tl.cast(stride_wr, tl.int64), tl.cast(stride_ws, tl.int64)
    step_wc = tl.cast(stride_wc, tl.int64)

    # Which taps fall into the padding, a bit each, where a word has as many.
    BITS: tl.constexpr = R * S <= 32 and PAD_H + PAD_W > 0
    bits = tl.full((BLOCK_M,), 0, tl.int32)
    if BITS:
        for bit in tl.static_range(R * S):
            row, col = h + bit // S * DIL_H, w + bit % S * DIL_W
            valid = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            bits |= valid.to(tl.int32) << bit

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    blocks_c = tl.cdiv(C, BLOCK_K)
    for i in range(0, R * S * blocks_c):
        tap = i // blocks_c
        r, s = tap // S, tap % S
        c = i % blocks_c * BLOCK_K
        x_ptrs = x_ptr + (r * step_h + s * step_w + c * step_c) + x_offs
        w_ptrs = w_ptr + (r * step_wr + s * step_ws + c * step_wc) + w_offs
        if BITS:
            inside = ((bits >> tap) & 1) != 0
        else:
            inside = (h + r * DIL_H >= 0) & (h + r * DIL_H < H)
            inside &= (w + s * DIL_W >= 0) & (w + s * DIL_W < W)
        if EVEN_C:
            if PAD_H + PAD_W > 0:
                x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs)
            wt = tl.load(w_ptrs)
        else:
            mask_c = offs_c < C - c
            x = tl.load(x_ptrs, mask=inside[:, None] & mask_c[None, :], other=0.0)
            wt = tl.load(w_ptrs, mask=mask_c[:, None], other=0.0)
        acc = tl.dot(x, wt, acc, input_precision=PRECISION)

    mask_n = offs_n < K
    if HAS_BIAS:
        bias_ptr += group * K * stride_bias
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    y_rows = n * stride_yn + p * stride_yp + q * stride_yq
    y_ptrs = y_ptr + group * K * stride_yk + (y_rows[:, None] + (offs_n * stride_yk)[None, :])
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])


def _empty_output(x, weight, stride, padding, dilation):
    """y, channels_last."""
    P, Q = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_channels_last((x.shape[0], weight.shape[0], P, Q), x)


@torch.library.custom_op("tilelab::conv2d", mutates_args=())
def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str | None,
) -> torch.Tensor:
    y = _empty_output(x, weight, stride, padding, dilation)
    if is_depthwise(weight, groups):
        conv2d_depthwise(x, weight, bias, y, stride, padding, dilation, activation)
        return y
    precision = dot_precision(x.dtype, torch.backends.cudnn.conv)
    (N, _, H, W), (_, C, R, S), (_, K, P, Q) = x.shape, weight.shape, y.shape
    K //= groups
    M = N * P * Q
    flat = C < FEW_CHANNELS
    op = "conv2d_grouped" if groups > 1 else "conv2d_flat" if flat else "conv2d"
    pixels = None
    if R * S == 1:
        pixels = as_pixels(x, stride, padding, groups)
    if pixels is not None:  # a filter of one pixel: a matmul
        rows = y.permute(0, 2, 3, 1).view(M, K)
        matmul_into(rows, pixels, weight.view(K, C).t(), bias, activation, precision)
        return y

    can = ("pointer", *(tile["kernel"] for tile in RUNGS)) if op == "conv2d" else ("pointer",)
    plan = plan_for(x, weight, stride, padding, dilation, groups, precision)
    default, can = choices(
        plan, x, FLAT_DEFAULT if flat else DEFAULT, can,
        lambda sms: fast_tile(plan, x.itemsize, sms),
    )  # fmt: skip
    tile = choose_tile(op, x.dtype, default, can, M=M, N=K, K=R * S * C if flat else C)
    rung = tile.get("kernel", "flat" if flat else "pointer")
    if rung == "tma":
        conv2d_tma(plan, x, weight, bias, activation, y, tile, precision, padding)
        return y
    options = {k: v for k, v in tile.items() if k != "kernel"}
    if rung != "direct":
        options["PRECISION"] = precision
    if rung == "pointer":
        options["EVEN_C"] = C % tile["BLOCK_K"] == 0
        padded = (N, C, H + 2 * padding[0], W + 2 * padding[1])  # where a tile's tap (0, 0) may be
        sizes = padded, weight.shape, y.shape
        options["NEAR"] = _are_near(*zip(sizes, (t.stride() for t in (x, weight, y)), strict=True))
    launch(
        {"direct": conv2d_direct_kernel, "flat": conv2d_flat_kernel}.get(rung, conv2d_kernel),
        (cdiv(M, tile["BLOCK_M"]) * cdiv(K, tile["BLOCK_N"]), groups),
        x, weight, bias, y, N, C, H, W, K, P, Q, *x.stride(), *weight.stride(),
        0 if bias is None else bias.stride(0), *y.stride(), R, S, *stride, *padding, *dilation,
        HAS_BIAS=bias is not None, ACTIVATION=activation, **options,
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def _are_near(*tensors):
    """Whether 32 bits hold every offset in these tensors, each given by its sizes and strides."""
    far = [sum((n - 1) * s for n, s in zip(*t, strict=True)) for t in tensors]
    return max(far) < 2**30  # and a tile may end beyond the last pixel


@_conv2d.register_fake
def _(x, weight, bias, stride, padding, dilation, groups, activation):
    return _empty_output(x, weight, stride, padding, dilation)


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, activation = inputs
    ctx.activation = activation
    ctx.input_size, ctx.weight_layout = list(x.shape), (weight.shape, weight.stride())
    needs_dx, needs_dweight, *_ = ctx.needs_input_grad
    saved = x if needs_dweight else None, weight if needs_dx else None
    ctx.save_for_backward(*saved, kept_for(activation, output))


def _backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    if weight is None:  # only how it lies in memory is asked for
        weight = dy.new_empty_strided(*ctx.weight_layout)
    geometry = ctx.stride, ctx.padding, ctx.dilation, ctx.groups
    dx = dweight = dbias = None
    if y is not None:  # through the activation, and the bias gradient in the same pass
        dy, dbias = bias_activation_backward(dy, y, None, ctx.activation)
    if ctx.needs_input_grad[0]:
        dx = conv2d_input_grad(dy, weight, ctx.input_size, *geometry)
    sum_dy = dbias is None and ctx.needs_input_grad[2]
    if ctx.needs_input_grad[1] and sum_dy and weight.numel():  # both read dy
        dweight, dbias = conv2d_weight_bias_grad(x, dy, weight, *geometry)
    else:
        if ctx.needs_input_grad[1]:
            dweight = conv2d_weight_grad(x, dy, weight, *geometry)
        if sum_dy:
            dbias = bias_backward(dy)
    return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None, None, None, None, None


_conv2d.register_autograd(_backward, setup_context=_setup_context)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """Compute `act(conv2d(x, weight) + bias)`, differentiable in x, weight and bias.

    Args:
        x: [N, C, H, W]; float32, float16 or bfloat16; any strides, fastest in channels_last memory.
            On GPUs with TMA one of fewer than 8 channels (4 in float32) is packed first; no other
            is copied.
        weight: [K, C/groups, R, S], of x's dtype; any strides, fastest in channels_last memory: on
            GPUs with TMA others are packed, and so are those of groups of fewer than 64 filters.
        bias: [K], of x's dtype, or None.
        stride: in pixels, an int or (height, width).
        padding: zeros on each side, an int or (height, width).
        dilation: distance of the filter's taps in pixels, an int or (height, width).
        groups: of channels; C for a depthwise convolution.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu". With gradients, the sum is
            rounded to x's dtype before the bias and one other than ReLU.

    Returns:
        [N, K, P, Q] of x's dtype in channels_last memory, accumulated in float32. float32 products
        are rounded to TF32 on the GPU where `torch.backends.cudnn.allow_tf32` (or its newer
        `conv.fp32_precision`) says so, which is torch's default. Where x or groups are packed, what
        is not finite in x may make NaN of a few neighbouring outputs.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the tensors.
        ValueError: shapes or geometry that do not fit, or an unknown activation.

    Source: torch.nn.functional.conv2d, and torch.relu or its gelu and silu.

    Example:
        >>> conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)).squeeze()
        tensor([[4., 4.],
                [4., 4.]])
    """
    x, weight, bias = autocast(x, weight, bias)
    geometry = check_conv2d(x, weight, bias, stride, padding, dilation, groups, activation)
    if needs_z(activation, x, weight, bias):
        z = _conv2d(x, weight, None, *geometry, groups, None)
        return bias_activation(z, bias, activation)
    return _conv2d(x, weight, bias, *geometry, groups, activation)
