"""Max-pooling over windows that may overlap, and its gradient by gathering, without atomics.

    forward     y[n,c,p,q]  = max over r < R, s < S of x[n, c, h, w]
                              with h = p*stride_h - pad_h + r,  w = q*stride_w - pad_w + s
    backward    dx[n,c,h,w] = sum of dy[n,c,p,q] over the windows whose maximum is at (h, w)

A tap (r, s) is one of the R*S positions of a window. A window passes its whole gradient to one
pixel: the first maximum in reading order, as in torch. So the forward saves the number of that tap,
r*S + s. It takes one byte per element of y if a window has at most 256 taps. The backward reads
these taps and dy, and neither x nor y.

The backward could scatter dy to those pixels. Where windows overlap this needs atomics, and atomics
add floats in an order that is left to chance. Gathering turns the question round: each pixel of dx
asks the windows that cover it "was I your maximum?", and adds up their dy in a fixed order.

    3x3 windows at stride 2:      forward     y    of window k = the largest of its nine x
                                              taps of window k = which of the nine, 0 to 8
        0 0 * 1 1
        0 0 * 1 1   windows 0-3   backward    dx of this pixel # = (2, 2), which is in all four:
        * * # * *   * is in two                   dy of window 0, if its tap is 8 (r = 2, s = 2)
        2 2 * 3 3   # is in four                + dy of window 1, if its tap is 6 (r = 2, s = 0)
        2 2 * 3 3                               + ... 2, if 2, and 3, if 0

One program owns BLOCK_M pixels of y, numbered through [N, P, Q], and BLOCK_N channels. In
channels_last memory the channels of a pixel are neighbours. In the backward it owns BLOCK_M cells
of dx, which are explained there.

Memory traffic limits the speed. In bytes for one plane of H x W pixels, of e bytes an element:

    forward     reads HWe, writes PQ(e + 1): y and the taps. Without a gradient it writes no taps.
    backward    reads PQ(e + 1), writes HWe

For 2x2 windows in 16-bit the forward moves 2.75 bytes per pixel of x, for 3/4 of a comparison.
Where windows overlap, a pixel is read several times, but only the first time from memory.

Read first: bias_relu.py. Source: torch.nn.functional.max_pool2d, whose rules for equal maxima and
for NaN are kept.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import check_shape, check_tensors, pair
from tilelab.kernels._geometry import empty_channels_last, output_size
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile


def reference(x, kernel_size, stride=None, padding=0):
    """The same in plain torch, for any dtype. Its gradient is shared among equal maxima."""
    (R, S), pad = pair("kernel_size", kernel_size, 1), pair("padding", padding, 0)
    step = pair("stride", kernel_size if stride is None else stride, 1)
    x = torch.nn.functional.pad(x, (pad[1], pad[1], pad[0], pad[0]), value=float("-inf"))
    return x.unfold(-2, R, step[0]).unfold(-2, S, step[1]).amax((-2, -1))


# A thread loads and stores 16 bytes at a time if x is channels_last and has 16, 32, ... channels.
# Taps are the exception: the taps of eight channels are only 8 bytes. A contiguous NCHW x is read
# one element at a time, since its channels are not neighbours and y is always channels_last.
TILES = [
    # This is the default in 16-bit. A thread has 16 channels, so their taps are 16 bytes too.
    dict(BLOCK_M=32, BLOCK_N=64, num_warps=4),
    # This is the default in float32. A thread has 8 channels, because 16 would spill registers.
    dict(BLOCK_M=16, BLOCK_N=64, num_warps=4),
    dict(BLOCK_M=8, BLOCK_N=64, num_warps=2),  # more programs, for small images
    dict(BLOCK_M=4, BLOCK_N=256, num_warps=4),  # wide layers: whole cache lines of a pixel
    dict(BLOCK_M=64, BLOCK_N=16, num_warps=4),  # few channels
    dict(BLOCK_M=128, BLOCK_N=16, num_warps=8),  # few channels, in larger programs
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
MOST_INT32 = 2**31


# In 16-bit, instructions are almost as much of a limit as memory. A tap costs a conversion, a
# comparison and two selections per element. For 3x3 windows instructions are the limit; this is an
# estimate from the compiled code, not a measurement.


@triton.jit
def max_pool2d_kernel(
    x_ptr, y_ptr, tap_ptr, M, C, H, W, P, Q, stride_xn, stride_xc, stride_xh, stride_xw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, INDEX: tl.constexpr, SAVE_TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels x BLOCK_N channels of y, and the taps of the maxima.

    M = N*P*Q. y and taps are channels_last. R and S are constexpr, so the compiler can unroll the
    loops, wholly or in part, and have several loads in flight.
    """
    offs_m = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, (offs_n < C)[None, :]

    row = offs_m // Q
    n = row // P
    h0 = (row - n * P) * STRIDE_H - PAD_H  # upper left corner of the window
    w0 = (offs_m - row * Q) * STRIDE_W - PAD_W
    x_ptrs = x_ptr + (n.to(tl.int64) * stride_xn)[:, None] + (offs_n * stride_xc)[None, :]

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    # If a window has only -inf, no x below is larger than best. Its first pixel in the image then
    # counts as the maximum.
    if SAVE_TAPS:
        first = (tl.maximum(-h0, 0) * S + tl.maximum(-w0, 0)).to(tl.int32)
        taps = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32) + first[:, None]
    for r in range(R):
        h = h0 + r
        for s in range(S):
            w = w0 + s
            inside = mask_m  # The padding of -inf is not in memory: skip its taps.
            if PAD_H > 0:
                inside &= (h >= 0) & (h < H)
            if PAD_W > 0:
                inside &= (w >= 0) & (w < W)
            offs = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            mask = inside[:, None] & mask_n  # [BLOCK_M, BLOCK_N]
            x = tl.load(x_ptrs + offs[:, None], mask=mask, other=float("-inf")).to(tl.float32)
            # The first of equal maxima stays. x != x is true for NaN, which beats everything, so
            # the last of several NaN stays.
            better = (x > best) | (x != x)
            best = tl.where(better, x, best)
            if SAVE_TAPS:
                taps = tl.where(better, r * S + s, taps)

    mask = mask_m[:, None] & mask_n
    offs = (offs_m.to(tl.int64) * C)[:, None] + offs_n[None, :]
    tl.store(y_ptr + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    if SAVE_TAPS:
        tl.store(tap_ptr + offs, taps.to(tap_ptr.dtype.element_ty), mask=mask)


# Which windows cover a pixel depends on where it lies between two of them. Pixels that are STRIDE_H
# rows or STRIDE_W columns apart lie alike. So dx is divided into cells of STRIDE_H x STRIDE_W
# pixels. A program goes through the pixels (i, j) of its cells. Each pixel asks only the windows
# that can cover it, so each tap of a window is asked for once.
#
# In the picture above this is 9/4 questions per pixel on average. If each pixel asked as many
# windows as the worst one, it would be 4, and almost half of them would be in vain.


@triton.jit
def max_pool2d_backward_kernel(
    dy_ptr, tap_ptr, dx_ptr, M, A, B, C, H, W, P, Q,
    stride_dyn, stride_dyc, stride_dyp, stride_dyq, stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, INDEX: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M cells x BLOCK_N channels of dx. An image has A x B cells.

    M = N*A*B. Pixel (i, j) of cell (a, b) is pixel (a*STRIDE_H + i - PAD_H, ...) of the image.
    """
    offs_m = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < C)[None, :]

    row = offs_m // B
    n = row // A
    a, b, n = row - n * A, offs_m - row * B, n.to(tl.int64)
    tap_ptrs = tap_ptr + (n * P * Q * C)[:, None] + offs_n[None, :]
    dy_ptrs = dy_ptr + (n * stride_dyn)[:, None] + (offs_n * stride_dyc)[None, :]
    dx_ptrs = dx_ptr + (n * stride_dxn)[:, None] + (offs_n * stride_dxc)[None, :]

    for i in range(CELL_H):
        for j in range(CELL_W):
            acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            for r in range(i, R, STRIDE_H):
                p = a - r // STRIDE_H
                for s in range(j, S, STRIDE_W):
                    q = b - s // STRIDE_W
                    exists = (offs_m < M) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
                    mask = exists[:, None] & mask_n  # [BLOCK_M, BLOCK_N]
                    offs = (p.to(tl.int64) * Q + q) * C
                    taps = tl.load(tap_ptrs + offs[:, None], mask=mask, other=0).to(tl.int32)
                    offs = p.to(tl.int64) * stride_dyp + q.to(tl.int64) * stride_dyq
                    dy = tl.load(dy_ptrs + offs[:, None], mask=mask, other=0.0).to(tl.float32)
                    acc = tl.where(taps == r * S + s, acc + dy, acc)  # one predicated add
            h = a * STRIDE_H + (i - PAD_H)
            w = b * STRIDE_W + (j - PAD_W)
            mask = (offs_m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offs = h.to(tl.int64) * stride_dxh + w.to(tl.int64) * stride_dxw
            dx = acc.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptrs + offs[:, None], dx, mask=mask[:, None] & mask_n)


def _constants(window, stride, padding, M, tile) -> dict:
    """Return what the kernels know when they are compiled.

    INDEX is the type that numbers the pixels: 32 bits if they suffice. A division of 64 bits costs
    several times as much, and a program has to divide before its first load.
    """
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")
    index = tl.int32 if M + tile["BLOCK_M"] <= MOST_INT32 else tl.int64
    return dict(zip(names, (*window, *stride, *padding), strict=True)) | dict(INDEX=index)


def _empty_outputs(x, window, stride, padding, save_taps):
    """Return y and the taps of the maxima, both channels_last."""
    size = (*x.shape[:2], *output_size(x.shape[2:], window, stride, padding))
    tap_size = size if save_taps else (0, 0, 0, 0)
    taps = window[0] * window[1]
    dtype = torch.uint8 if taps <= 256 else torch.int16 if taps <= 2**15 else torch.int32
    return empty_channels_last(size, x), empty_channels_last(tap_size, x, dtype)


@torch.library.custom_op("tilelab::max_pool2d", mutates_args=())
def _max_pool2d(
    x: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    save_taps: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, taps = _empty_outputs(x, window, stride, padding, save_taps)
    (N, C, H, W), (P, Q) = x.shape, y.shape[2:]
    M = N * P * Q
    tile = choose_tile("max_pool2d", x, DEFAULT, M=M, N=C)
    grid = (cdiv(M, tile["BLOCK_M"]), cdiv(C, tile["BLOCK_N"]))
    launch(
        max_pool2d_kernel, grid, x, y, taps, M, C, H, W, P, Q, *x.stride(),
        **_constants(window, stride, padding, M, tile), SAVE_TAPS=save_taps, **tile,
    )  # fmt: skip
    return y, taps


@_max_pool2d.register_fake
def _(x, window, stride, padding, save_taps):
    return _empty_outputs(x, window, stride, padding, save_taps)


@torch.library.custom_op("tilelab::max_pool2d_backward", mutates_args=())
def _max_pool2d_backward(
    dy: torch.Tensor,
    taps: torch.Tensor,
    H: int,
    W: int,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    channels_last: bool,
) -> torch.Tensor:
    N, C, P, Q = dy.shape
    memory = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty(N, C, H, W, dtype=dy.dtype, device=dy.device, memory_format=memory)
    (step_h, step_w), (pad_h, pad_w) = stride, padding
    A, B = cdiv(H + pad_h, step_h), cdiv(W + pad_w, step_w)
    M = N * A * B
    tile = choose_tile("max_pool2d_backward", dy, DEFAULT, M=M, N=C)
    grid = (cdiv(M, tile["BLOCK_M"]), cdiv(C, tile["BLOCK_N"]))
    launch(
        max_pool2d_backward_kernel, grid, dy, taps, dx, M, A, B, C, H, W, P, Q, *dy.stride(),
        *dx.stride(), **_constants(window, stride, padding, M, tile),
        CELL_H=min(step_h, H + pad_h), CELL_W=min(step_w, W + pad_w), **tile,
    )  # fmt: skip
    return dx


@_max_pool2d_backward.register_fake
def _(dy, taps, H, W, window, stride, padding, channels_last):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    size = (*dy.shape[:2], H, W)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=memory)


def _setup_context(ctx, inputs, output):
    x, *window, _ = inputs
    ctx.geometry = (*x.shape[2:], *window, not x.is_contiguous())
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # Otherwise torch makes zeros as a gradient of taps.


def _autograd(ctx, dy, _):
    dx = _max_pool2d_backward(dy, ctx.saved_tensors[0], *ctx.geometry)
    return dx, None, None, None, None


_max_pool2d.register_autograd(_autograd, setup_context=_setup_context)


def max_pool2d(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
) -> torch.Tensor:
    """Take the maximum of each window of an image, differentiable.

    Args:
        x: [N, C, H, W] or [C, H, W]; float32, float16 or bfloat16; any strides.
        kernel_size: the size of a window in pixels, an int or (height, width).
        stride: the distance between windows in pixels. None means kernel_size.
        padding: the rows and columns of -inf on each side of the image, at most half a window.

    Returns:
        [N, C, P, Q] or [C, P, Q] of x's dtype, in channels_last memory, with
        P = floor((H + 2 * padding - height) / stride) + 1, and Q likewise.

    Raises:
        TypeError: the dtype or device is not supported, or kernel_size, stride or padding is not an
            int or a pair of ints.
        ValueError: the shape does not fit, or kernel_size, stride or padding is out of range.

    Source: torch.nn.functional.max_pool2d.

    Example:
        >>> max_pool2d(torch.arange(16.0).view(1, 4, 4), 2)
        tensor([[[ 5.,  7.],
                 [13., 15.]]])
    """
    check_tensors(x=x)
    if x.dim() == 3:
        return max_pool2d(x[None], kernel_size, stride, padding)[0]
    window = pair("kernel_size", kernel_size, 1)
    step = window if stride is None else pair("stride", stride, 1)
    pad = pair("padding", padding, 0)
    check_shape("x", x, "[N, C, H, W] or [C, H, W]", N=None, C=None, H=None, W=None)
    for size, k, p in zip(x.shape[2:], window, pad, strict=True):
        if 2 * p > k:
            raise ValueError(f"padding must be at most half of kernel_size {window}, got {pad}")
        if size == 0 or size + 2 * p < k:
            raise ValueError(
                f"x must have room for a window of kernel_size {window} with padding {pad}, "
                f"got {list(x.shape)}"
            )
    if x.shape[2] * x.shape[3] >= 2**31:
        raise ValueError(f"x must have fewer than 2^31 pixels a plane, got {list(x.shape)}")
    save_taps = torch.is_grad_enabled() and x.requires_grad
    return _max_pool2d(x, window, step, pad, save_taps)[0]
