"""Convolution as one matmul: copy the input window by window (im2col), then multiply.

    columns[(n,p,q), (g,r,s,c)] = x[n, g*C/G + c, p*stride - pad + r*dil, q*stride - pad + s*dil]
    y = act(columns @ weight + bias)                            for each group g of channels
    backward: dcolumns = dy @ weight^T, dweight = columns^T @ dy, dx = col2im(dcolumns)

A row of columns is a window: everything that one output pixel (n, p, q) reads. im2col copies a
pixel into several windows, so its gradient sums: each pixel of dx is the sum of all columns it was
copied to. That sum is col2im. Both are linear, and each is the transpose of the other. So each is
the gradient of the other.

    x, one channel    columns, 2x2 filter         col2im: pixel 4 was copied four times, so dx sums
    0 1 2             0 1 3 4   <- window (0,0)   four numbers there. col2im gathers: one program
    3 4 5             1 2 4 5   <- window (0,1)   owns pixels and fetches what was copied from them.
    6 7 8             3 4 6 7                     So no two programs write to one address.
                      4 5 7 8

What limits it: memory. The columns are written and read again, N*P*Q*C*R*S elements of e bytes:

    x itself      N*H*W*C*e bytes
    columns       2*N*P*Q*C*R*S*e bytes: for a 3x3 filter at stride 1, 18 times x
    products      2*N*P*Q*C*R*S*K/G FLOPs: K/(G*e) for each byte of columns

An H200 can do 206 FLOPs per byte in 16-bit, so memory is the limit up to K/G = 412 filters. (The
copy alone issues too many instructions to run at the speed of memory; see TILES.) Still, this is
how Caffe computed convolutions: the matmul runs at full speed, and only the copy has to know
strides, padding and dilation. conv2d.py replaced it: it computes the same addresses, but it never
stores the copies. A 1x1 filter with stride 1 needs no copy, and is copied here all the same: this
file is a lesson and not the fast path.

Read first: matmul.py. Then conv2d.py, to see the copy disappear. Source: Chellapilla, Puri &
Simard, High Performance Convolutional Neural Networks for Document Processing (2006).
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import autocast, check_shape, check_tensors, pair
from tilelab.kernels._geometry import (
    check_conv2d,
    check_geometry,
    check_groups,
    empty_channels_last,
    output_size,
)
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.matmul import matmul


def reference(x, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    """The columns in plain torch, for any dtype."""
    N, C = x.shape[:2]
    (R, S), G = pair("kernel_size", kernel_size, 1), groups
    columns = torch.nn.functional.unfold(x, (R, S), dilation, padding, stride)  # [N, C*R*S, P*Q]
    columns = columns.view(N, G, C // G, R, S, -1)
    return columns.permute(0, 5, 1, 3, 4, 2).reshape(-1, C * R * S)


# In 16-bit, the copy is limited by instructions rather than by memory: each thread divides several
# times to find its addresses. An H200 has time for 99 instructions per 16 bytes that a thread moves
# (softmax.py derives this number). Compiled for sm_90 (H100, H200), im2col issues 134 at the
# default tile, and 200 at the tiles with 8 elements per thread.
TILES = [
    # This is the default in 16-bit: each thread moves 32 bytes and has two loads in flight.
    dict(BLOCK_M=32, BLOCK_N=64, num_warps=4),
    # This is the default in float32: the same 32 bytes and two loads.
    dict(BLOCK_M=16, BLOCK_N=64, num_warps=4),
    dict(BLOCK_M=16, BLOCK_N=128, num_warps=4),  # wide layers: longer runs of a pixel's channels
    dict(BLOCK_M=64, BLOCK_N=16, num_warps=4),  # few channels
    dict(BLOCK_M=64, BLOCK_N=64, num_warps=8),  # the default with twice the windows and threads
    dict(BLOCK_M=8, BLOCK_N=256, num_warps=4),  # one tap of 256 channels per row
]
DEFAULT = {2: TILES[0], 4: TILES[1]}


@triton.jit
def im2col_kernel(
    x_ptr, col_ptr, N, C, H, W, P, Q, COLUMNS,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_cm, stride_cn,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M windows x BLOCK_N columns, by copying.

    C is the number of channels per group, COLUMNS = G*R*S*C.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = m // Q // P
    h = m // Q % P * STRIDE_H - PAD_H  # (h, w) is the pixel under tap (0, 0).
    w = m % Q * STRIDE_W - PAD_W
    group = j // C // (R * S)  # j = ((group * R + r) * S + s) * C + c
    r = j // C % (R * S) // S * DIL_H
    s = j // C % S * DIL_W
    c = group * C + j % C

    mask = (n < N)[:, None] & (j < COLUMNS)[None, :]  # [BLOCK_M, BLOCK_N]
    inside = mask  # The padding is not in memory: other=0.0 makes its zeros.
    if PAD_H > 0:
        inside &= (h[:, None] + r[None, :] >= 0) & (h[:, None] + r[None, :] < H)
    if PAD_W > 0:
        inside &= (w[:, None] + s[None, :] >= 0) & (w[:, None] + s[None, :] < W)
    x_rows = n * stride_xn + h * stride_xh + w * stride_xw
    x_cols = r * stride_xh + s * stride_xw + c * stride_xc
    x = tl.load(x_ptr + x_rows[:, None] + x_cols[None, :], mask=inside, other=0.0)
    col_ptrs = col_ptr + (m * stride_cm)[:, None] + (j * stride_cn)[None, :]
    tl.store(col_ptrs, x, mask=mask)


@triton.jit
def col2im_kernel(
    col_ptr, x_ptr, N, C, H, W, P, Q, CHANNELS,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_cm, stride_cn,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels x BLOCK_N channels of x.

    C is the number of channels per group, CHANNELS = G*C.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = m // W // H
    h = m // W % H + PAD_H
    w = m % W + PAD_W
    cols = (channel // C * (R * S * C) + channel % C) * stride_cn  # for tap (0, 0)
    mask = (n < N)[:, None] & (channel < CHANNELS)[None, :]  # [BLOCK_M, BLOCK_N]

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for tap in range(0, R * S):
        # This pixel was copied to tap (r, s) of window (p, q) if p * stride = h - r * dil, with p a
        # whole number. The same holds for q.
        up = h - tap // S * DIL_H
        left = w - tap % S * DIL_W
        p = up // STRIDE_H
        q = left // STRIDE_W
        copied = (up >= 0) & (up % STRIDE_H == 0) & (p < P)
        copied &= (left >= 0) & (left % STRIDE_W == 0) & (q < Q)
        rows = ((n * P + p) * Q + q) * stride_cm + tap * C * tl.cast(stride_cn, tl.int64)
        col_ptrs = col_ptr + rows[:, None] + cols[None, :]
        acc += tl.load(col_ptrs, mask=mask & copied[:, None], other=0.0).to(tl.float32)

    x_rows = n * stride_xn + (h - PAD_H) * stride_xh + (w - PAD_W) * stride_xw
    x_ptrs = x_ptr + x_rows[:, None] + (channel * stride_xc)[None, :]
    tl.store(x_ptrs, acc.to(x_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("tilelab::im2col", mutates_args=())
def _im2col(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    columns = _empty_columns(x, kernel_size, stride, padding, dilation)
    N, C, H, W = x.shape
    P, Q = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    M, J = columns.shape
    tile = choose_tile("im2col", x, DEFAULT, M=M, N=J)
    launch(
        im2col_kernel, (cdiv(M, tile["BLOCK_M"]), cdiv(J, tile["BLOCK_N"])),
        x, columns, N, C // groups, H, W, P, Q, J, *x.stride(), *columns.stride(),
        *kernel_size, *stride, *padding, *dilation, **tile,
    )  # fmt: skip
    return columns


def _empty_columns(x, kernel_size, stride, padding, dilation):
    P, Q = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return x.new_empty(x.shape[0] * P * Q, x.shape[1] * kernel_size[0] * kernel_size[1])


@_im2col.register_fake
def _(x, kernel_size, stride, padding, dilation, groups):
    return _empty_columns(x, kernel_size, stride, padding, dilation)


@torch.library.custom_op("tilelab::col2im", mutates_args=())
def _col2im(
    columns: torch.Tensor,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    x = empty_channels_last(size, columns)
    N, C, H, W = size
    P, Q = output_size(size[2:], kernel_size, stride, padding, dilation)
    M = N * H * W
    tile = choose_tile("col2im", columns, DEFAULT, M=M, N=C)
    launch(
        col2im_kernel, (cdiv(M, tile["BLOCK_M"]), cdiv(C, tile["BLOCK_N"])),
        columns, x, N, C // groups, H, W, P, Q, C, *x.stride(), *columns.stride(),
        *kernel_size, *stride, *padding, *dilation, **tile,
    )  # fmt: skip
    return x


@_col2im.register_fake
def _(columns, size, kernel_size, stride, padding, dilation, groups):
    return empty_channels_last(size, columns)


def _setup_im2col(ctx, inputs, output):
    x, *ctx.geometry = inputs
    ctx.size = list(x.shape)


def _setup_col2im(ctx, inputs, output):
    _, _, *ctx.geometry = inputs


_im2col.register_autograd(
    lambda ctx, dy: (_col2im(dy, ctx.size, *ctx.geometry), *[None] * 5),
    setup_context=_setup_im2col,
)
_col2im.register_autograd(
    lambda ctx, dy: (_im2col(dy, *ctx.geometry), *[None] * 6),
    setup_context=_setup_col2im,
)


def im2col(
    x: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Copy each window of x into a row of a matrix, differentiable.

    Args:
        x: [N, C, H, W]; float32, float16 or bfloat16; any strides.
        kernel_size: the size of a window, R x S taps.
        stride: the distance between windows in pixels.
        padding: the rows and columns of zeros on each side of the image.
        dilation: the distance between taps in pixels.
        groups: the number of groups of channels. The columns of a group are side by side.

    Returns:
        [N*P*Q, C*R*S] of x's dtype, row-major. The order of its columns is (group, r, s, channel).

    Raises:
        TypeError: the dtype or device is not supported, or an argument is not an int or a pair.
        ValueError: the shape or the geometry does not fit.

    Source: torch.nn.functional.unfold, which returns [N, C*R*S, P*Q] ordered (channel, r, s).

    Example:
        >>> im2col(torch.arange(9.0).view(1, 1, 3, 3), 2)[0]
        tensor([0., 1., 3., 4.])
    """
    check_tensors(x=x)
    check_shape("x", x, "[N, C, H, W]", N=None, C=None, H=None, W=None)
    check_groups(groups, x.shape[1])
    taps = pair("kernel_size", kernel_size, 1)
    geometry = check_geometry("kernel_size", taps, x.shape[2:], stride, padding, dilation)
    return _im2col(x, taps, *geometry, groups)


def col2im(
    columns: torch.Tensor,
    size: tuple[int, int, int, int],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Sum columns into the pixels that they were copied from, differentiable.

    This is the transpose of `im2col`, not its inverse.

    Args:
        columns: [N*P*Q, C*R*S] in the order of `im2col`; float32, float16 or bfloat16; any strides.
        size: (N, C, H, W) of the result.
        kernel_size: the size of a window, R x S taps. This and what follows is as for `im2col`.
        stride: the distance between windows in pixels.
        padding: the rows and columns of zeros on each side of the image.
        dilation: the distance between taps in pixels.
        groups: the number of groups of channels.

    Returns:
        [N, C, H, W] of the columns' dtype in channels_last memory, summed in float32.

    Raises:
        TypeError: the dtype or device is not supported, or an argument is not an int or a pair.
        ValueError: the shape or the geometry does not fit.

    Source: torch.nn.functional.fold, which takes the columns in another order.

    Example:
        >>> col2im(torch.ones(4, 4), (1, 1, 3, 3), 2).squeeze()
        tensor([[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]])
    """
    check_tensors(columns=columns)
    ints = isinstance(size, tuple | list) and all(isinstance(n, int | torch.SymInt) for n in size)
    if not ints:
        raise TypeError(f"size must be four ints (N, C, H, W), got {size!r}")
    if len(size) != 4 or any(extent < 0 for extent in size):
        raise ValueError(f"size must be (N, C, H, W), got {size!r}")
    check_groups(groups, size[1])
    R, S = taps = pair("kernel_size", kernel_size, 1)
    geometry = check_geometry("kernel_size", taps, size[2:], stride, padding, dilation)
    P, Q = output_size(size[2:], taps, *geometry)
    check_shape("columns", columns, "[N*P*Q, C*R*S]", NPQ=size[0] * P * Q, CRS=size[1] * R * S)
    return _col2im(columns, list(size), taps, *geometry, groups)


def conv2d_im2col(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """Compute the same as `conv2d` through explicit columns: to compare with, and to learn from.

    Arguments, result and errors are those of `conv2d`. The columns need N*P*Q*C*R*S elements of
    memory, and they are kept for the backward. A weight that is not channels_last is copied. Each
    group is a matmul of its own, so many groups are slow. Whether float32 is rounded to TF32 is up
    to torch's switch for matmuls, not to its switch for convolutions.

    Source: torch.nn.functional.conv2d.

    Example:
        >>> conv2d_im2col(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)).squeeze()
        tensor([[4., 4.],
                [4., 4.]])
    """
    x, weight, bias = autocast(x, weight, bias)
    stride, padding, dilation = check_conv2d(
        x, weight, bias, stride, padding, dilation, groups, activation
    )
    K, C, R, S = weight.shape
    P, Q = output_size(x.shape[2:], (R, S), stride, padding, dilation)
    columns = _im2col(x, (R, S), stride, padding, dilation, groups)
    rows = weight.permute(0, 2, 3, 1).reshape(K, R * S * C)  # a view if weight is channels_last
    parts = [
        matmul(c, w.t(), b, activation)
        for c, w, b in zip(
            columns.split(R * S * C, dim=1),
            rows.split(K // groups),
            [None] * groups if bias is None else bias.split(K // groups),
            strict=True,
        )
    ]
    y = parts[0] if groups == 1 else torch.cat(parts, dim=1)  # [N*P*Q, K]
    return y.view(x.shape[0], P, Q, K).permute(0, 3, 1, 2)
