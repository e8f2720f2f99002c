"""The gradients of conv2d_relu_pool, in two ways: scattered, or fused.

    forward     y[n,k,i,j] = max(0, the largest of z[n, k, 2i + a, 2j + b], a and b in {0, 1})
                with z = conv2d(x, weight) + bias. It keeps the place of the maximum: 2a + b, or 4
                where the ReLU let none through
    backward    dz = dy at its place, zero everywhere else
                dx, dweight: those of the convolution for this dz; dbias = sum of dz

**Scattered.** A kernel writes dz, and the convolution's own gradients read it. A window owns the
2x2 pixels of dz that it covers, so each pixel is written once, and by one program.

    dy       place        dz
    5 7      0 3          5 . | . .        One program owns BLOCK_N channels of a part of the
    2 9      4 1          . . | . 7        windows. It also sums the columns of what it scatters,
                          ----+----        which is the bias gradient. Where P or Q is odd, the
                          . . | . 9        last row or column of dz belongs to half windows. They
                          . . | . .        have no dy, so it gets zeros.

**Fused.** dz is never written. As in the forward, the four places make this a convolution of stride
2, with an (R+1) x (S+1) filter and 4K channels. Masks give each dy to its place as it is loaded:

    dx         One program owns BLOCK_M quads x BLOCK_N channels. A quad is 2x2 pixels of x. It
               gathers from the (R//2 + 1) x (S//2 + 1) windows that read it.
    dweight    One program owns BLOCK_M channels k x BLOCK_N of the patch, for a part of the
               windows. It keeps four sums of products: dy at place (a, b) times the patch. It
               stores each of them shifted by (a, b).

What limits it: bytes or FLOPs, by the number of channels. For one window and one channel k of a 3x3
layer with C input channels, in 16-bit, dx and dweight together take:

                   bytes of dy, place and dz                FLOPs
    scattered      3 read, 8 written, 8 read twice: 27      2 * 72 C
    fused          3 read twice: 6                          2 * 128 C

So it pays to fuse few channels and to scatter many. `WIDE`, below, is the limit between them. In
the demo, 1 and 16 channels are fused; in VGG16, 64 to 512 channels are scattered.

Read first: conv2d_relu_pool.py, conv2d_input_grad.py, conv2d_weight_grad.py.
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import dot_precision
from tilelab.kernels._geometry import empty_channels_last
from tilelab.kernels._launch import device_of, launch
from tilelab.kernels._partial_sums import sum_partials
from tilelab.kernels._tiles import cdiv, choose_tile, into_parts, part_count
from tilelab.kernels.bias_relu import PROGRAMS, bias_activation_backward
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad, conv2d_input_grad_relu
from tilelab.kernels.conv2d_weight_grad import conv2d_weight_grad

TILES = [
    # These two are for dx, in 16-bit and in float32. The accumulator has 4 * BLOCK_N columns, and
    # with four warps it may spill. In float32 a step is half as deep.
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, num_warps=8, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=16, num_warps=8, num_stages=2),
    # These two are for dweight, in 16-bit and in float32. Four accumulators of 64x32 take 64
    # registers of each thread.
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=3),
    dict(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=8, num_stages=2),
    # These two are for dx on tensor cores, in 16-bit and in TF32. Each warp reads all columns of
    # the weights from shared memory, so four warps read half as much as eight. It needs channels
    # that a load can take four at a time, or masks and addresses fill the registers.
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, num_warps=4, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2),
    # This one is for dweight in TF32. A warp has four times as much to multiply for what it loads.
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2),
]
INPUT_DEFAULT = {2: TILES[0], 4: TILES[1]}
WEIGHT_DEFAULT = {2: TILES[2], 4: TILES[3]}
INPUT_FOURS_DEFAULT = {2: TILES[4], 4: TILES[5]}
WEIGHT_TF32_DEFAULT = {4: TILES[6]}

UNPOOL_TILES = [
    # This is the default in 16-bit. A thread has 16 channels, so their places are 16 bytes too.
    dict(kernel="unpool", BLOCK_M=32, BLOCK_N=64, num_warps=4),
    dict(kernel="unpool", BLOCK_M=16, BLOCK_N=64, num_warps=4),  # the default in float32
    dict(kernel="unpool", BLOCK_M=8, BLOCK_N=256, num_warps=4),  # whole cache lines of a pixel
]
UNPOOL_DEFAULT = {2: UNPOOL_TILES[0], 4: UNPOOL_TILES[1]}
FUSED = dict(kernel="pointer")  # A tile of "unpool" that says: scatter nothing.

# From which number of channels on is it faster to scatter? By the table above, fusing saves 21
# bytes for each window and channel k. Times on an H200, predicted and not measured:
#
#                                                               ps
#     21 bytes at 4.8 TB/s                                      4.4
#     2 * 72 C FLOPs by the fused kernels, at 100 TFLOP/s       1.4 C
#     2 * 72 C FLOPs by TMA, at 500 TFLOP/s                     0.3 C, and 0.3 * 64 at least
#
# (Both rates count the FLOPs of the convolution alone, for a layer of VGG16. The fused kernels do
# more, as above. Tiles by TMA have at least 64 channels.) Both ways take the same time where
# 1.4 C = 4.4 + 0.3 * 64, at C = 17, and WIDE is the next power of two. Without tensor cores or TMA
# this C is smaller.
WIDE = 32
MOST_INT32 = 2**31


@triton.jit
def unpool_kernel(
    dy_ptr, place_ptr, dz_ptr, db_ptr, M, K, P, Q, ROWS, COLUMNS, part_windows,
    stride_dyn, stride_dyk, stride_dyp, stride_dyq,
    INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dz of `part_windows` windows x BLOCK_N channels, and its column sums.

    dz [N, K, P, Q] and place are channels_last. An image has ROWS x COLUMNS windows: P / 2 and
    Q / 2 rounded up. INDEX is the dtype that numbers windows. db_ptr is [parts, K].
    """
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < K)[None, :]
    first = tl.program_id(0).to(INDEX) * part_windows
    last = tl.minimum(first + part_windows, M)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        row = offs_m // COLUMNS
        q = offs_m - row * COLUMNS
        n = row // ROWS
        p = row - n * ROWS
        n, p, q = n.to(tl.int64), p.to(tl.int64), q.to(tl.int64)
        exists = offs_m < last
        # Half a window at the border has no second row or column, and no dy.
        below, right = exists & (2 * p + 1 < P), exists & (2 * q + 1 < Q)
        mask = (below & right)[:, None] & mask_n  # [BLOCK_M, BLOCK_N]
        rows = n * stride_dyn + p * stride_dyp + q * stride_dyq
        dy_ptrs = dy_ptr + rows[:, None] + (offs_n * stride_dyk)[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)
        rows = (n * (P // 2) + p) * (Q // 2) + q
        place_ptrs = place_ptr + (rows * K)[:, None] + offs_n[None, :]
        place = tl.load(place_ptrs, mask=mask, other=4).to(tl.int32)

        zero = tl.full((BLOCK_M, BLOCK_N), 0.0, dy.dtype)
        rows = (n * P + 2 * p) * Q + 2 * q
        dz_ptrs = dz_ptr + (rows * K)[:, None] + offs_n[None, :]
        dz_below = dz_ptrs + tl.cast(Q, tl.int64) * K
        tl.store(dz_ptrs, tl.where(place == 0, dy, zero), mask=exists[:, None] & mask_n)
        tl.store(dz_ptrs + K, tl.where(place == 1, dy, zero), mask=right[:, None] & mask_n)
        tl.store(dz_below, tl.where(place == 2, dy, zero), mask=below[:, None] & mask_n)
        tl.store(dz_below + K, tl.where(place == 3, dy, zero), mask=mask)
        if HAS_BIAS:
            acc += tl.where(place < 4, dy.to(tl.float32), 0.0)

    if HAS_BIAS:
        db_ptrs = db_ptr + tl.program_id(0).to(tl.int64) * K + offs_n
        tl.store(db_ptrs, tl.sum(acc, axis=0), mask=offs_n < K)


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

    A padded image has ROWS_H x ROWS_W quads. In the accumulator, a quad is a row and its pixels
    are four blocks of columns, so dy and the places are loaded once for all four.
    """
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    M = tl.cast(N, tl.int64) * ROWS_H * ROWS_W
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    quad = offs_m % M
    n = quad // ROWS_W // ROWS_H
    i = quad // ROWS_W % ROWS_H  # The patch of window (i, j) begins at this quad.
    j = quad % ROWS_W
    cols = tl.arange(0, 4 * BLOCK_N).to(tl.int64)  # columns are (e, f, c): pixel (e, f)
    c = pid_n.to(tl.int64) * BLOCK_N + cols % BLOCK_N
    e = cols // BLOCK_N // 2
    f = cols // BLOCK_N % 2
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)

    # Patch pixel (u, v) meets the weight (u - a, v - b), so each place (a, b) has its own base.
    w0_ptr, w1_ptr = w_ptr, w_ptr - stride_ws
    w2_ptr, w3_ptr = w0_ptr - stride_wr, w1_ptr - stride_wr

    acc = tl.full((BLOCK_M, 4 * BLOCK_N), 0.0, tl.float32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    for step in range(0, (R // 2 + 1) * (S // 2 + 1) * blocks_k):
        i_up = step // blocks_k // (S // 2 + 1)  # The window lies this many rows further up
        j_up = step // blocks_k % (S // 2 + 1)  # and this many columns further left.
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
    mask &= (h >= 0) & (h < H) & (w >= 0) & (w < W)  # dx has no padding.
    dx_rows = n * stride_dxn + (2 * i - PAD_H) * stride_dxh + (2 * j - PAD_W) * stride_dxw
    dx_cols = e * stride_dxh + f * stride_dxw + c * stride_dxc
    dx_ptrs = dx_ptr + dx_rows[:, None] + dx_cols[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv2d_relu_pool_weight_grad_kernel(
    x_ptr, dy_ptr, place_ptr, dw_ptr, db_ptr, N, C, H, W, K, P, Q, part_windows, SIZE,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_dyn, stride_dyk, stride_dyp, stride_dyq,
    stride_pn, stride_pk, stride_pp, stride_pq, stride_wk, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a part of dweight: BLOCK_M channels k x BLOCK_N of the patch (u, v, c).

    It sums over `part_windows` windows. dw_ptr is [parts, 4, SIZE], with a partial dweight for each
    place. Programs of the first block of the patch also write db_ptr [parts, K].
    """
    blocks_n = tl.cdiv((R + 1) * (S + 1) * C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    part = tl.program_id(1).to(tl.int64)
    k = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = cols % C
    v = cols // C % (S + 1)
    u = cols // C // (S + 1)
    mask_n = cols < (R + 1) * (S + 1) * C
    x_cols = u * stride_xh + v * stride_xw + c * stride_xc
    first = part * part_windows
    last = tl.minimum(first + part_windows, tl.cast(N, tl.int64) * P * Q)

    live = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)  # dy where the ReLU let it through
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

    # Patch pixel (u, v) met the weight (u - a, v - b), if there is one. It is stored there.
    size = tl.cast(SIZE, tl.int64)
    dw_ptr += part * 4 * size
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
        tl.store(db_ptr + part * K + k, tl.sum(live, axis=1), mask=k < K)


def _unpool_tile(dy, channels):
    """Return the tile to scatter dy with, or FUSED."""
    N, K, P, Q = dy.shape
    # The interpreter is not modelled. Its time is that of its operations, and FUSED has the fewest.
    wide = min(channels, K) >= WIDE and device_of(dy).modelled
    default = UNPOOL_DEFAULT if wide else dict.fromkeys(UNPOOL_DEFAULT, FUSED)
    return choose_tile("unpool", dy, default, ("pointer", "unpool"), M=N * P * Q, N=K)


def _unpool(dy, place, size, bias, tile):
    """Return dz [N, K, P, Q], where (P, Q) is `size`, and dbias if `bias`, else None."""
    (N, K), (P, Q) = dy.shape[:2], size
    dz = empty_channels_last((N, K, P, Q), dy)
    rows, columns = cdiv(P, 2), cdiv(Q, 2)
    M = N * rows * columns
    blocks = cdiv(K, tile["BLOCK_N"])
    part_windows, parts = into_parts(M, tile["BLOCK_M"], max(1, PROGRAMS // max(blocks, 1)))
    db = partials = None
    if bias:
        db = partials = dy.new_empty(K)
        if parts > 1:
            partials = torch.empty(parts, K, dtype=torch.float32, device=dy.device)
    launch(
        unpool_kernel, (parts, blocks),
        dy, place, dz, partials, M, K, P, Q, rows, columns, part_windows, *dy.stride(),
        INDEX=tl.int32 if M + part_windows <= MOST_INT32 else tl.int64, HAS_BIAS=bias,
        **{k: v for k, v in tile.items() if k != "kernel"},
    )  # fmt: skip
    if partials is not db:
        sum_partials(partials, db)
    return dz, db


def _input_grad(dy, place, weight, input_size, padding):
    """Return dx [N, C, H, W], by the fused kernel."""
    dx = empty_channels_last(input_size, dy)
    (N, C, H, W), (_, _, R, S), (_, K, P, Q) = input_size, weight.shape, dy.shape
    quads = [(extent + 2 * pad + 1) // 2 for extent, pad in zip((H, W), padding, strict=True)]
    M = N * quads[0] * quads[1]
    precision = dot_precision(dy.dtype, torch.backends.cudnn.conv)
    tensor_cores = dy.itemsize == 2 or precision == "tf32"
    fours = tensor_cores and C % 4 == 0 and weight.stride(1) == 1
    default = INPUT_FOURS_DEFAULT if fours else INPUT_DEFAULT
    tile = choose_tile("conv2d_relu_pool_input_grad", dy, default, M=M, N=C, K=K)
    launch(
        conv2d_relu_pool_input_grad_kernel,
        (cdiv(M, tile["BLOCK_M"]) * cdiv(C, tile["BLOCK_N"]),),
        dy, place, weight, dx, N, C, H, W, K, P, Q, *quads,
        *dy.stride(), *place.stride(), *weight.stride(), *dx.stride(), R, S, *padding,
        PRECISION=precision, **tile,
    )  # fmt: skip
    return dx


def _weight_grad(x, dy, place, weight, padding):
    """Return dweight and dbias, by the fused kernel. One more launch adds up the parts of both."""
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.shape[0])
    (N, C, H, W), (_, _, R, S), (_, K, P, Q) = x.shape, weight.shape, dy.shape
    M = N * P * Q
    patch = (R + 1) * (S + 1) * C
    precision = dot_precision(x.dtype, torch.backends.cudnn.conv)
    default = WEIGHT_TF32_DEFAULT if precision == "tf32" else WEIGHT_DEFAULT
    tile = choose_tile("conv2d_relu_pool_weight_grad", x, default, K=M, M=K, N=patch)
    blocks = cdiv(K, tile["BLOCK_M"]) * cdiv(patch, tile["BLOCK_N"])
    steps = cdiv(M, tile["BLOCK_K"])
    part_windows, parts = into_parts(M, tile["BLOCK_K"], part_count(blocks, steps))
    size = dweight.numel()
    partials = torch.empty(parts * 4, size, dtype=torch.float32, device=x.device)
    bias_partials = torch.empty(parts, K, dtype=torch.float32, device=x.device)
    launch(
        conv2d_relu_pool_weight_grad_kernel, (blocks, parts),
        x, dy, place, partials, bias_partials, N, C, H, W, K, P, Q, part_windows, size,
        *x.stride(), *dy.stride(), *place.stride(), *dweight.stride(), R, S, *padding,
        PRECISION=precision, **tile,
    )  # fmt: skip
    sum_partials(partials, dweight, bias_partials, dbias)
    return dweight, dbias


@torch.library.custom_op("tilelab::conv2d_relu_pool_backward", mutates_args=())
def conv2d_relu_pool_backward(
    dy: torch.Tensor,
    place: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    input_size: list[int],
    padding: list[int],
    wanted: list[bool],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx, dweight and dbias of conv2d_relu_pool, and the bias gradient of the layer before.

    `wanted` says which of the first three are wanted; the others are empty. With `relu`, x is
    relu(z + bias), the output of the layer before. Then the first result is the gradient of that z
    and the fourth that of that bias, as in conv2d_input_grad_relu. x is read for these two and for
    dweight. If dx is not wanted, only the shape and strides of weight are used.
    """
    dx = dweight = dbias = dbefore = None
    tile = _unpool_tile(dy, weight.shape[1])
    scatter = tile.get("kernel") == "unpool"
    both = wanted[1] and weight.numel()  # One fused kernel has dweight and dbias.
    if not scatter and wanted[2] and not both:  # Without dweight, the scatter has dbias.
        scatter, tile = True, UNPOOL_DEFAULT[dy.itemsize]
    if scatter:
        pairs = zip(input_size[2:], weight.shape[2:], padding, strict=True)
        size = [extent + 2 * pad - taps + 1 for extent, taps, pad in pairs]
        geometry = [1, 1], padding, [1, 1], 1
        dz, dbias = _unpool(dy, place, size, wanted[2], tile)
        if wanted[0] and relu:
            dx, dbefore = conv2d_input_grad_relu(dz, weight, x, *geometry)
        elif wanted[0]:
            dx = conv2d_input_grad(dz, weight, input_size, *geometry)
        if wanted[1]:
            dweight = conv2d_weight_grad(x, dz, weight, *geometry)
    else:
        if wanted[0]:
            dx = _input_grad(dy, place, weight, input_size, padding)
            if relu:
                dx, dbefore = bias_activation_backward(dx, x, None, "relu")
        if wanted[1]:
            dweight, dbias = _weight_grad(x, dy, place, weight, padding)
    dbias = dbias if wanted[2] else None
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, dweight, dbias, dbefore))


@conv2d_relu_pool_backward.register_fake
def _(dy, place, x, weight, input_size, padding, wanted, relu):
    return (
        empty_channels_last(input_size, dy) if wanted[0] else dy.new_empty(0),
        torch.empty_like(weight) if wanted[1] else dy.new_empty(0),
        dy.new_empty(weight.shape[0] if wanted[2] else 0),
        dy.new_empty(input_size[1] if wanted[0] and relu else 0),
    )
