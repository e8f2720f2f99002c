"""Convolution, bias, ReLU and 2x2 max-pool in one kernel: a block of the demo network.

    forward     z = conv2d(x, weight) + bias        x [N, C, H, W], weight [K, C, R, S], stride 1
                y[n,k,i,j] = max(0, the largest of z[n, k, 2i + a, 2j + b], a and b in {0, 1})
    backward    dz = dy at the place of the maximum if y > 0, zero everywhere else
                dx, dweight, dbias: those of the convolution for this dz
                (a lesson of its own: conv2d_relu_pool_grad.py)

The place of a pixel in its 2x2 window is 2a + b, 0 to 3. For the backward, the forward keeps one
byte per output: the place of the maximum, or 4 where the ReLU let none through. z is never written
to memory.

A window needs a patch of (R+1) x (S+1) input pixels, and its four places share most of them:

    patch (u, v) of a 3x3 filter      One program owns BLOCK_M windows x BLOCK_N channels. It has
        v ->                          an accumulator for each place. It walks along the patch: one
      u 0  01 01 1                    load of x, then a product for each place. For place (a, b),
      | 02 *  *  13                   patch pixel (u, v) meets the weight (u - a, v - b), which is
      v 02 *  *  13                   0 outside of the filter. On the left: which places use a
        2  23 23 3                    pixel (* is all four).

    for each tile of windows and channels, in parallel:
        acc[place] = 0, for the four places
        for each patch pixel (u, v), and each block of channels c:
            acc[a, b] += x[windows shifted by (u, v), c] @ weight[u - a, v - b, c], for all a, b
        y, place = max(0, largest of the four + bias), where it was

For a 3x3 filter these are 16 loads of x instead of 36, but 64 products instead of 36. This pays
where loads are slow: on a GPU with few channels, and always in the interpreter. From 8 channels on
(4 in float32), a GPU with TMA uses the kernel of conv2d_tma.py instead, which can end with a pool.

What limits it, for few channels: memory. In bytes, with e bytes an element and |z| = 4|y|:

    fused             e(|x| + |y|) + |y|          the last term is the places
    three kernels     e(|x| + 4|z| + |y|)         z out, z in and out (ReLU), z in (pool)

Read first: conv2d.py. Source: every inference engine fuses these. Keeping a byte and not z makes it
pay in training too.
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import autocast, dot_precision
from tilelab.kernels._geometry import check_conv2d, empty_channels_last, output_size
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.conv2d_relu_pool_grad import conv2d_relu_pool_backward
from tilelab.kernels.conv2d_tma import choices, conv2d_tma, fast_tile, first_of_largest, plan_for
from tilelab.kernels.matmul import lay_by_rows, wants_rows


def reference(x, weight, bias=None, padding=0):
    """The same in plain torch, for any dtype."""
    z = torch.nn.functional.conv2d(x, weight, bias, padding=padding)
    return torch.nn.functional.max_pool2d(torch.relu(z), 2)


TILES = [
    # This is the default in 16-bit. Four accumulators of 64x32 take 64 registers of each thread.
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=3),
    # This is the default in float32, with half as many columns.
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, num_warps=4, num_stages=3),
    # With one input channel and a 3x3 filter, the whole patch is one step of 16.
    dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}


@triton.jit
def conv2d_relu_pool_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, place_ptr, N, C, H, W, K, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_bias, stride_yn, stride_yk, stride_yp, stride_yq,
    R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BY_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M windows x BLOCK_N channels of y [N, K, P, Q], and the places."""
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    M = tl.cast(N, tl.int64) * P * Q
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    # Rows past the last window wrap around: they read something valid that is never stored.
    window = offs_m % M
    n, p, q = window // Q // P, window // Q % P, window % Q
    h, w = p * 2 - PAD_H, q * 2 - PAD_W  # where patch pixel (0, 0) lies
    x_rows = n * stride_xn + h * stride_xh + w * stride_xw
    w_cols = offs_n % K * stride_wk

    # Patch pixel (u, v) meets the weight (u - a, v - b), so each place (a, b) has its own base.
    w0_ptr, w1_ptr = w_ptr, w_ptr - stride_ws
    w2_ptr, w3_ptr = w0_ptr - stride_wr, w1_ptr - stride_wr

    acc0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (0, 0)
    acc1 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (0, 1)
    acc2 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (1, 0)
    acc3 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (1, 1)
    for j0 in range(0, (R + 1) * (S + 1) * C, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K).to(tl.int64)  # j numbers (u, v, c); c is fastest
        c = j % C
        v = j // C % (S + 1)
        u = j // C // (S + 1)
        inside = j < (R + 1) * (S + 1) * C
        x_mask = inside[None, :]
        if PAD_H > 0:
            x_mask &= (h[:, None] + u[None, :] >= 0) & (h[:, None] + u[None, :] < H)
        if PAD_W > 0:
            x_mask &= (w[:, None] + v[None, :] >= 0) & (w[:, None] + v[None, :] < W)
        x_cols = u * stride_xh + v * stride_xw + c * stride_xc
        x = tl.load(x_ptr + x_rows[:, None] + x_cols[None, :], mask=x_mask, other=0.0)

        w_rows = u * stride_wr + v * stride_ws + c * stride_wc
        w_offs = w_rows[:, None] + w_cols[None, :]  # [BLOCK_K, BLOCK_N]
        top, bottom = (u < R) & inside, (u > 0) & inside  # a = 0, a = 1
        left, right = v < S, v > 0  # b = 0, b = 1
        w0 = tl.load(w0_ptr + w_offs, mask=(top & left)[:, None], other=0.0)
        w1 = tl.load(w1_ptr + w_offs, mask=(top & right)[:, None], other=0.0)
        w2 = tl.load(w2_ptr + w_offs, mask=(bottom & left)[:, None], other=0.0)
        w3 = tl.load(w3_ptr + w_offs, mask=(bottom & right)[:, None], other=0.0)
        if BY_ROWS:  # against bank conflicts, see matmul.py
            w0, w1, w2, w3 = lay_by_rows(w0), lay_by_rows(w1), lay_by_rows(w2), lay_by_rows(w3)
        acc0 = tl.dot(x, w0, acc0, input_precision=PRECISION)
        acc1 = tl.dot(x, w1, acc1, input_precision=PRECISION)
        acc2 = tl.dot(x, w2, acc2, input_precision=PRECISION)
        acc3 = tl.dot(x, w3, acc3, input_precision=PRECISION)

    best, place = first_of_largest(acc0, acc1, acc2, acc3)  # before any rounding to 16 bits
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        best += bias.to(tl.float32)[None, :]
    place = tl.where(best <= 0, 4, place)
    best = tl.where(best < 0, 0.0, best)

    y_rows = n * stride_yn + p * stride_yp + q * stride_yq
    y_offs = y_rows[:, None] + (offs_n * stride_yk)[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(y_ptr + y_offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(place_ptr + y_offs, place.to(tl.uint8), mask=mask)


def _empty_outputs(x, weight, padding):
    """Return empty y and places, both channels_last [N, K, P//2, Q//2]."""
    P, Q = output_size(x.shape[2:], weight.shape[2:], (1, 1), padding)
    y = empty_channels_last((x.shape[0], weight.shape[0], P // 2, Q // 2), x)
    return y, empty_channels_last(y.shape, x, torch.uint8)


@torch.library.custom_op("tilelab::conv2d_relu_pool", mutates_args=())
def _conv2d_relu_pool(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    y, place = _empty_outputs(x, weight, padding)
    (N, C, H, W), (_, _, R, S), (_, K, P, Q) = x.shape, weight.shape, y.shape
    M = N * P * Q
    patch = (R + 1) * (S + 1) * C
    precision = dot_precision(x.dtype, torch.backends.cudnn.conv)
    plan = plan_for(x, weight, (1, 1), padding, (1, 1), 1, precision, pool=True)
    default, can = choices(
        plan,
        x,
        DEFAULT,
        ("pointer",),
        lambda device: fast_tile(plan, x.itemsize, device, pool=True),
    )
    tile = choose_tile("conv2d_relu_pool", x, default, can, M=M, N=K, K=patch)
    if "kernel" in tile:  # It names "tma": the kernel of conv2d_tma.py, with a pool at its end.
        conv2d_tma(plan, x, weight, bias, "relu", y, tile, precision, padding, place)
        return y, place
    launch(
        conv2d_relu_pool_kernel,
        (cdiv(M, tile["BLOCK_M"]) * cdiv(K, tile["BLOCK_N"]),),
        x, weight, bias, y, place, N, C, H, W, K, P, Q, *x.stride(), *weight.stride(),
        0 if bias is None else bias.stride(0), *y.stride(), R, S, *padding,
        HAS_BIAS=bias is not None, PRECISION=precision,
        BY_ROWS=wants_rows(weight[:, :, 0, 0].t(), precision), **tile,
    )  # fmt: skip
    return y, place


@_conv2d_relu_pool.register_fake
def _(x, weight, bias, padding):
    return _empty_outputs(x, weight, padding)


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.padding = inputs
    ctx.set_materialize_grads(False)  # Otherwise torch makes zeros as a gradient of the places.
    ctx.input_size, ctx.weight_layout = list(x.shape), (weight.shape, weight.stride())
    needs_dx, needs_dweight, *_ = ctx.needs_input_grad
    saved = x if needs_dweight else None, weight if needs_dx else None, output[1]
    ctx.save_for_backward(*saved)


def _backward(ctx, dy, _):
    x, weight, place = ctx.saved_tensors
    if weight is None:  # No gradient reads its values, but dweight gets its shape and strides.
        weight = dy.new_empty_strided(*ctx.weight_layout)
    wanted = list(ctx.needs_input_grad[:3])
    grads = conv2d_relu_pool_backward(
        dy, place, x, weight, ctx.input_size, ctx.padding, wanted, False
    )
    return *(g if w else None for g, w in zip(grads, wanted, strict=False)), None


_conv2d_relu_pool.register_autograd(_backward, setup_context=_setup_context)


def conv2d_relu_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int | tuple[int, int] = 0,
) -> torch.Tensor:
    """Compute `max_pool2d(relu(conv2d(x, weight, bias, padding=padding)), 2)` in one pass.

    Args:
        x: [N, C, H, W]; float32, float16 or bfloat16; any strides, fastest in channels_last memory.
        weight: [K, C, R, S], of x's dtype; any strides.
        bias: [K], of x's dtype, or None.
        padding: the rows and columns of zeros on each side of the image, an int or (height, width).

    Returns:
        [N, K, P // 2, Q // 2] of x's dtype in channels_last memory, where the convolution is
        [N, K, P, Q]. An odd last row or column is dropped, as `max_pool2d` does. The result is
        differentiable in x, weight and bias. The four places of a window share their loads, so an
        infinity or NaN in x may make NaN of every window whose patch holds it. One in dy may make
        NaN of every 2x2 quad of dx that its patch touches.

    Raises:
        TypeError: a dtype or device is not supported, or differs between the tensors.
        ValueError: shapes do not fit, or the convolution is smaller than one window.

    Source: torch.nn.functional.conv2d, relu and max_pool2d.

    Example:
        >>> conv2d_relu_pool(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)).item()
        9.0
    """
    x, weight, bias = autocast(x, weight, bias)
    padding = check_pooled(x, weight, bias, padding)
    return _conv2d_relu_pool(x, weight, bias, padding)[0]


def check_pooled(x, weight, bias, padding):
    """Raise if the arguments make no convolution with a pool. Return the padding as a pair."""
    _, padding, _ = check_conv2d(x, weight, bias, 1, padding, 1, 1, None)
    (_, _, H, W), (_, _, R, S) = x.shape, weight.shape
    if H + 2 * padding[0] - R < 1 or W + 2 * padding[1] - S < 1:  # P or Q below 2
        raise ValueError(
            f"x must give a convolution of at least 2x2 to pool, got {list(x.shape)} with "
            f"weight {list(weight.shape)} and padding {padding}"
        )
    return padding
