"""Convolution + bias + ReLU + 2x2 max-pool in one kernel, and back: the demo network's block.

    forward     z = conv2d(x, weight) + bias        x [N, C, H, W], weight [K, C, R, S], stride 1
                y[n,k,i,j] = max(0, the largest of z[n, k, 2i + a, 2j + b], a and b in {0, 1})
    backward    dz = dy at the place of the maximum if y > 0, zero everywhere else
                dx, dweight, dbias: those of the convolution for this dz

As three kernels, z is written, read and written by the ReLU, and read by the pool: four passes over
an array four times the size of y, and as many back. Here z never leaves the registers. What is kept
for the backward is one byte an output: which of the four was the largest (0..3 = 2a + b), or 4
where the ReLU let none through.

The four outputs of a window need one patch of (R+1) x (S+1) inputs, most of it more than once:

    patch (u, v) of a 3x3 filter      One program owns BLOCK_M windows x BLOCK_N channels, with four
        v ->                          accumulators, one for each place (a, b). It walks along the
      u 0  01 01 1                    patch: one load of x, four products. For place (a, b) patch
      | 02 *  *  13                   pixel (u, v) meets the weight (u - a, v - b), which is 0
      v 02 *  *  13                   outside of the filter. Left: which places use which pixel
        2  23 23 3                    (* all four).

16 loads where four separate outputs would make 36. The price is 64 products for 36: fine where
loads are what is slow, which is true of few channels on a GPU, and of the interpreter always.

Seen so, the block is a convolution of stride 2 with an (R+1) x (S+1) filter and 4K channels, and a
maximum over each four. Its gradients are those of that convolution, with dy spread to the places
as it is loaded:

    dx       each 2x2 quad of inputs gathers from the (R//2 + 1) x (S//2 + 1) windows that read it
    dweight  four sums, dy at place (a, b) times the patch, each shifted by (a, b) as it is stored

Memory-bound for small C and K: e(|x| + |y|) + |y| bytes forward, against e(|x| + 4|z| + |y|) of
three kernels, with |z| = 4|y|.

Read first: conv2d.py, conv2d_weight_grad.py. Source: the fusion is the one every inference engine
does; keeping the place as a byte instead of z is what makes it pay in training.
"""

import torch
import triton
import triton.language as tl

from kernels._geometry import check_conv2d, empty_channels_last, output_size
from kernels._launch import autocast, cdiv, choose_tile, dot_precision, into_chunks, launch, splits
from kernels._rows import sum_partials
from kernels.conv2d_tma import choices, conv2d_tma, first_of_largest, plan_for


def reference(x, weight, bias=None, padding=0):
    """The same in plain torch, for any dtype."""
    z = torch.nn.functional.conv2d(x, weight, bias, padding=padding)
    return torch.nn.functional.max_pool2d(torch.relu(z), 2)


TILES = [
    # forward and weight gradient: four accumulators of 64x32 are 64 registers of each thread
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=3),
    # forward in float32: half the columns
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, num_warps=4, num_stages=3),
    # input gradient: the accumulator has 4 * BLOCK_N columns, and four warps would spill; in
    # float32 half the depth
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, num_warps=8, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=16, num_warps=8, num_stages=2),
    # weight gradient in float32
    dict(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=8, num_stages=2),
    # one input channel, 3x3: the whole patch is one step of 16
    dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
INPUT_DEFAULT = {2: TILES[2], 4: TILES[3]}
WEIGHT_DEFAULT = {2: TILES[0], 4: TILES[4]}


@triton.jit
def conv2d_relu_pool_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, place_ptr, N, C, H, W, K, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_bias, stride_yn, stride_yk, stride_yp, stride_yq,
    R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
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
    window = offs_m % M  # past the border it wraps around: valid to read, never stored
    n, p, q = window // Q // P, window // Q % P, window % Q
    h, w = p * 2 - PAD_H, q * 2 - PAD_W  # of patch pixel (0, 0)
    x_rows = n * stride_xn + h * stride_xh + w * stride_xw
    w_cols = offs_n % K * stride_wk

    # Patch pixel (u, v) meets the weight (u - a, v - b): one base for each place (a, b).
    w0_ptr, w1_ptr = w_ptr, w_ptr - stride_ws
    w2_ptr, w3_ptr = w0_ptr - stride_wr, w1_ptr - stride_wr

    acc0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (0, 0)
    acc1 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (0, 1)
    acc2 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (1, 0)
    acc3 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # place (1, 1)
    for j0 in range(0, (R + 1) * (S + 1) * C, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K).to(tl.int64)  # of the patch: (u, v, c), c fastest
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


@triton.jit
def conv2d_relu_pool_input_grad_kernel(
    dy_ptr, place_ptr, w_ptr, dx_ptr, N, C, H, W, K, P, Q, ROWS_H, ROWS_W,
    stride_dyn, stride_dyk, stride_dyp, stride_dyq,
    stride_pn, stride_pk, stride_pp, stride_pq, stride_wk, stride_wc, stride_wr, stride_ws,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M quads (2x2 pixels) x BLOCK_N channels of dx.

    An image has ROWS_H x ROWS_W quads, in padded coordinates. Each is a row; its four pixels are
    four blocks of columns, so that dy and the places are loaded once for all of them.
    """
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    M = tl.cast(N, tl.int64) * ROWS_H * ROWS_W
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    quad = offs_m % M
    n = quad // ROWS_W // ROWS_H
    i = quad // ROWS_W % ROWS_H  # the window whose patch begins at this quad
    j = quad % ROWS_W
    cols = tl.arange(0, 4 * BLOCK_N).to(tl.int64)  # (e, f, c): pixel (e, f) of the quad, channel c
    c = pid_n.to(tl.int64) * BLOCK_N + cols % BLOCK_N
    e = cols // BLOCK_N // 2
    f = cols // BLOCK_N % 2
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)

    # Patch pixel (u, v) meets the weight (u - a, v - b): one base for each place (a, b).
    w0_ptr, w1_ptr = w_ptr, w_ptr - stride_ws
    w2_ptr, w3_ptr = w0_ptr - stride_wr, w1_ptr - stride_wr

    acc = tl.full((BLOCK_M, 4 * BLOCK_N), 0.0, tl.float32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    for step in range(0, (R // 2 + 1) * (S // 2 + 1) * blocks_k):
        i_up = step // blocks_k // (S // 2 + 1)  # the window this many rows further up
        j_up = step // blocks_k % (S // 2 + 1)  # and columns further left
        k = step % blocks_k * BLOCK_K + offs_k
        p, q = i - i_up, j - j_up
        inside = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        mask = inside[:, None] & (k < K)[None, :]
        dy_rows = n * stride_dyn + p * stride_dyp + q * stride_dyq
        dy_ptrs = dy_ptr + dy_rows[:, None] + (k * stride_dyk)[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        place_rows = n * stride_pn + p * stride_pp + q * stride_pq
        place_ptrs = place_ptr + place_rows[:, None] + (k * stride_pk)[None, :]
        place = tl.load(place_ptrs, mask=mask, other=4).to(tl.int32)

        u = e + 2 * i_up  # where the pixel lies in that window's patch
        v = f + 2 * j_up
        w_cols = u * stride_wr + v * stride_ws + c * stride_wc
        w_offs = (k * stride_wk)[:, None] + w_cols[None, :]  # [BLOCK_K, 4 * BLOCK_N]
        mask = (k < K)[:, None] & (c < C)[None, :]
        top, bottom = (u < R)[None, :] & mask, ((u > 0) & (u <= R))[None, :] & mask
        left, right = (v < S)[None, :], ((v > 0) & (v <= S))[None, :]
        w0 = tl.load(w0_ptr + w_offs, mask=top & left, other=0.0)
        w1 = tl.load(w1_ptr + w_offs, mask=top & right, other=0.0)
        w2 = tl.load(w2_ptr + w_offs, mask=bottom & left, other=0.0)
        w3 = tl.load(w3_ptr + w_offs, mask=bottom & right, other=0.0)
        zero = tl.full((BLOCK_M, BLOCK_K), 0.0, dy.dtype)
        acc = tl.dot(tl.where(place == 0, dy, zero), w0, acc, input_precision=PRECISION)
        acc = tl.dot(tl.where(place == 1, dy, zero), w1, acc, input_precision=PRECISION)
        acc = tl.dot(tl.where(place == 2, dy, zero), w2, acc, input_precision=PRECISION)
        acc = tl.dot(tl.where(place == 3, dy, zero), w3, acc, input_precision=PRECISION)

    h = (2 * i - PAD_H)[:, None] + e[None, :]
    w = (2 * j - PAD_W)[:, None] + f[None, :]
    mask = (offs_m < M)[:, None] & (c < C)[None, :]
    mask &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
    dx_rows = n * stride_dxn + (2 * i - PAD_H) * stride_dxh + (2 * j - PAD_W) * stride_dxw
    dx_cols = e * stride_dxh + f * stride_dxw + c * stride_dxc
    dx_ptrs = dx_ptr + dx_rows[:, None] + dx_cols[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv2d_relu_pool_weight_grad_kernel(
    x_ptr, dy_ptr, place_ptr, dw_ptr, db_ptr, N, C, H, W, K, P, Q, CHUNK, SIZE,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_dyn, stride_dyk, stride_dyp, stride_dyq,
    stride_pn, stride_pk, stride_pp, stride_pq, stride_wk, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program sums CHUNK windows into BLOCK_M channels k x BLOCK_N of the patch (u, v, c).

    dw_ptr is [splits, 4, SIZE]: for each place a partial dweight, shifted into place. Programs of
    the first patch block also write db_ptr [splits, K].
    """
    blocks_n = tl.cdiv((R + 1) * (S + 1) * C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    split = tl.program_id(1).to(tl.int64)
    k = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = cols % C
    v = cols // C % (S + 1)
    u = cols // C // (S + 1)
    mask_n = cols < (R + 1) * (S + 1) * C
    x_cols = u * stride_xh + v * stride_xw + c * stride_xc
    first = split * CHUNK
    last = tl.minimum(first + CHUNK, tl.cast(N, tl.int64) * P * Q)

    live = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)  # dy where it came through the ReLU
    acc0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc1 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc2 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc3 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for window in range(first, last, BLOCK_K):
        m = window + tl.arange(0, BLOCK_K).to(tl.int64)
        q = m % Q
        p = m // Q % P
        n = m // Q // P
        mask = (k < K)[:, None] & (m < last)[None, :]
        dy_cols = n * stride_dyn + p * stride_dyp + q * stride_dyq
        dy_ptrs = dy_ptr + (k * stride_dyk)[:, None] + dy_cols[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        place_cols = n * stride_pn + p * stride_pp + q * stride_pq
        place_ptrs = place_ptr + (k * stride_pk)[:, None] + place_cols[None, :]
        place = tl.load(place_ptrs, mask=mask, other=4).to(tl.int32)
        live += tl.where(place < 4, dy.to(tl.float32), 0.0)

        h = p * 2 - PAD_H
        w = q * 2 - PAD_W
        x_rows = n * stride_xn + h * stride_xh + w * stride_xw
        x_mask = (m < last)[:, None] & mask_n[None, :]  # [BLOCK_K, BLOCK_N]
        if PAD_H > 0:
            x_mask &= (h[:, None] + u[None, :] >= 0) & (h[:, None] + u[None, :] < H)
        if PAD_W > 0:
            x_mask &= (w[:, None] + v[None, :] >= 0) & (w[:, None] + v[None, :] < W)
        x = tl.load(x_ptr + x_rows[:, None] + x_cols[None, :], mask=x_mask, other=0.0)
        zero = tl.full((BLOCK_M, BLOCK_K), 0.0, dy.dtype)
        acc0 = tl.dot(tl.where(place == 0, dy, zero), x, acc0, input_precision=PRECISION)
        acc1 = tl.dot(tl.where(place == 1, dy, zero), x, acc1, input_precision=PRECISION)
        acc2 = tl.dot(tl.where(place == 2, dy, zero), x, acc2, input_precision=PRECISION)
        acc3 = tl.dot(tl.where(place == 3, dy, zero), x, acc3, input_precision=PRECISION)

    # Patch pixel (u, v) met the weight (u - a, v - b), if there is one.
    size = tl.cast(SIZE, tl.int64)
    dw_ptr += split * 4 * size
    dw_cols = u * stride_wr + v * stride_ws + c * stride_wc
    dw_ptrs = dw_ptr + (k * stride_wk)[:, None] + dw_cols[None, :]
    mask = (k < K)[:, None] & mask_n[None, :]
    top, bottom = (u < R)[None, :] & mask, (u > 0)[None, :] & mask
    left, right = (v < S)[None, :], (v > 0)[None, :]
    tl.store(dw_ptrs, acc0, mask=top & left)
    tl.store(dw_ptrs + (size - stride_ws), acc1, mask=top & right)
    tl.store(dw_ptrs + (2 * size - stride_wr), acc2, mask=bottom & left)
    tl.store(dw_ptrs + (3 * size - stride_wr - stride_ws), acc3, mask=bottom & right)
    if pid_n == 0:
        tl.store(db_ptr + split * K + k, tl.sum(live, axis=1), mask=k < K)


def _empty_outputs(x, weight, padding):
    """Return y and the place of each maximum, both channels_last [N, K, P//2, Q//2]."""
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
    default, can = choices(plan, x, DEFAULT, ("pointer",), pool=True)
    tile = choose_tile("conv2d_relu_pool", x.dtype, default, can, M=M, N=K, K=patch)
    if "kernel" in tile:  # the convolution's kernel, with this epilogue
        conv2d_tma(plan, x, weight, bias, "relu", y, tile, precision, padding, place)
        return y, place
    launch(
        conv2d_relu_pool_kernel,
        (cdiv(M, tile["BLOCK_M"]) * cdiv(K, tile["BLOCK_N"]),),
        x, weight, bias, y, place, N, C, H, W, K, P, Q, *x.stride(), *weight.stride(),
        0 if bias is None else bias.stride(0), *y.stride(), R, S, *padding,
        HAS_BIAS=bias is not None, PRECISION=precision, **tile,
    )  # fmt: skip
    return y, place


@_conv2d_relu_pool.register_fake
def _(x, weight, bias, padding):
    return _empty_outputs(x, weight, padding)


@torch.library.custom_op("tilelab::conv2d_relu_pool_input_grad", mutates_args=())
def _input_grad(
    dy: torch.Tensor,
    place: torch.Tensor,
    weight: torch.Tensor,
    input_size: list[int],
    padding: list[int],
) -> torch.Tensor:
    dx = empty_channels_last(input_size, dy)
    (N, C, H, W), (_, _, R, S), (_, K, P, Q) = input_size, weight.shape, dy.shape
    quads = [(extent + 2 * pad + 1) // 2 for extent, pad in zip((H, W), padding, strict=True)]
    M = N * quads[0] * quads[1]
    tile = choose_tile("conv2d_relu_pool_input_grad", dy.dtype, INPUT_DEFAULT, M=M, N=C, K=K)
    launch(
        conv2d_relu_pool_input_grad_kernel,
        (cdiv(M, tile["BLOCK_M"]) * cdiv(C, tile["BLOCK_N"]),),
        dy, place, weight, dx, N, C, H, W, K, P, Q, *quads,
        *dy.stride(), *place.stride(), *weight.stride(), *dx.stride(), R, S, *padding,
        PRECISION=dot_precision(dy.dtype, torch.backends.cudnn.conv), **tile,
    )  # fmt: skip
    return dx


@_input_grad.register_fake
def _(dy, place, weight, input_size, padding):
    return empty_channels_last(input_size, dy)


@torch.library.custom_op("tilelab::conv2d_relu_pool_weight_grad", mutates_args=())
def _weight_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    place: torch.Tensor,
    weight: torch.Tensor,
    padding: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.shape[0])
    (N, C, H, W), (_, _, R, S), (_, K, P, Q) = x.shape, weight.shape, dy.shape
    M = N * P * Q
    patch = (R + 1) * (S + 1) * C
    tile = choose_tile("conv2d_relu_pool_weight_grad", x.dtype, WEIGHT_DEFAULT, K=M, M=K, N=patch)
    blocks = cdiv(K, tile["BLOCK_M"]) * cdiv(patch, tile["BLOCK_N"])
    steps = cdiv(M, tile["BLOCK_K"])
    chunk, parts = into_chunks(M, tile["BLOCK_K"], splits(blocks, steps))
    size = dweight.numel()
    partials = torch.empty(parts, 4, size, dtype=torch.float32, device=x.device)
    bias_partials = torch.empty(parts, K, dtype=torch.float32, device=x.device)
    launch(
        conv2d_relu_pool_weight_grad_kernel, (blocks, parts),
        x, dy, place, partials, bias_partials, N, C, H, W, K, P, Q, chunk, size,
        *x.stride(), *dy.stride(), *place.stride(), *dweight.stride(), R, S, *padding,
        PRECISION=dot_precision(x.dtype, torch.backends.cudnn.conv), **tile,
    )  # fmt: skip
    sum_partials(partials.view(parts * 4, size), dweight)
    sum_partials(bias_partials, dbias)
    return dweight, dbias


@_weight_grad.register_fake
def _(x, dy, place, weight, padding):
    return torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.padding = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # or zeros would come for the places


def _backward(ctx, dy, _):
    x, weight, place = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _input_grad(dy, place, weight, list(x.shape), ctx.padding)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dweight, dbias = _weight_grad(x, dy, place, weight, ctx.padding)
    return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None


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
        padding: zeros on each side, an int or (height, width).

    Returns:
        [N, K, P // 2, Q // 2] of x's dtype in channels_last memory, for a convolution of [P, Q]; an
        odd last row or column is dropped, as `max_pool2d` does. Differentiable in x, weight, bias.
        What is not finite in x may make NaN of every window whose patch holds it, and in dy of
        every 2x2 quad that its patch touches: the four places of a window share one load.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the tensors.
        ValueError: shapes that do not fit, or a convolution smaller than one window.

    Source: torch.nn.functional.conv2d, relu and max_pool2d.

    Example:
        >>> conv2d_relu_pool(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)).item()
        9.0
    """
    x, weight, bias = autocast(x, weight, bias)
    _, padding, _ = check_conv2d(x, weight, bias, 1, padding, 1, 1, None)
    (_, _, H, W), (_, _, R, S) = x.shape, weight.shape
    if H + 2 * padding[0] - R < 1 or W + 2 * padding[1] - S < 1:  # P or Q below 2
        raise ValueError(
            f"x must give a convolution of at least 2x2 to pool, got {list(x.shape)} with "
            f"weight {list(weight.shape)} and padding {padding}"
        )
    return _conv2d_relu_pool(x, weight, bias, padding)[0]
