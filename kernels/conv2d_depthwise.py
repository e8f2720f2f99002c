"""Depthwise convolution: every channel has a filter of its own.

    forward     y[n,c,p,q]  = act(bias[c] + sum over r,s of x[n, c, h, w] * weight[c,0,r,s])
                              with h = p*stride - padding + r*dilation, and w likewise
    backward    as for any convolution: conv2d_input_grad.py, conv2d_weight_grad.py

This is `conv2d` with groups = C = K, and conv2d.py calls this file for it. No sum runs over
channels, so a GEMM would have one column per group, and a tensor core takes at least sixteen. The
loop of pool.py over the taps of a window remains. A multiply-add takes the place of the maximum.

    3x3 at stride 1, a patch of 1 x 4 outputs #      a program goes down its strips A, B, C ...

       . . . . . .     The patch reads 18 inputs.          q ->
       . # # # # .     Each is loaded and converted        A A A A  B B B B  C C C C   step 0
       . . . . . .     once and multiplied by up to        a a a a  b b b b  c c c c   step 1
                       three taps: 36 multiply-adds        A A A A  B B B B  C C C C   step 2
                       for 18 loads, not for 36.           ...

    for each strip and block of channels, in parallel:
        taps = weight[c, all r and s]                   in registers, for all steps
        for each patch on the way down:                 one step
            acc = bias[c], for each of its outputs
            for each input (i, j) that the patch reads:
                for each output (p, q) and tap (r, s) that meet there:
                    acc[p, q] += x[c, i, j] * taps[r, s]
            y[c, patch] = act(acc)

A thread has the same few channels of a whole patch. So its outputs share inputs in registers, which
saves instructions and not only bytes. A program computes BLOCK_M pixels x BLOCK_N channels in each
step. Two of the three rows of x that a step reads were read in the step before. They may still be
in L1, the cache of an SM (one of the 132 processors of an H200).

What limits it: memory. It moves e bytes for each element of x, weight and y, and does 2*R*S FLOPs
for each element of y. A 3x3 layer at stride 1 in 16-bit does 4.5 FLOPs per byte. An H200 can do 14
without tensor cores. Instructions are close behind; they are counted at the tiles.

Read first: pool.py, conv2d.py. Source: Howard et al., MobileNets (2017).
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.activation import activate, activated


def reference(x, weight, bias=None, stride=1, padding=0, dilation=1, activation=None):
    """The same in plain torch, for any dtype."""
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])
    return activated(y, activation)


# A thread loads and stores 16 bytes of a pixel at a time. BLOCK_M is the number of pixels per step,
# so a program has BLOCK_M / (PATCH_P * PATCH_Q) strips. It goes down at most ROWS rows of y.
#
# Count the instructions of a warp (32 threads) for 256 outputs, 8 per thread: a 3x3 filter, 16-bit,
# the default tile, compiled for sm_90 (H100, H200). While an H200 moves 512 bytes, it has time for
# 99 (softmax.py derives this number). 256 outputs are 512 bytes. They have as many inputs at stride
# 1, and four times as many at stride 2:
#
#     instructions per 256 outputs        stride 1    stride 2
#     time for                            198         495
#     multiply-adds                       72          72
#     a step, with these multiply-adds    < 190       < 230
#     before the loop, once               91          95
#
# Before the loop, a thread finds its strips by divisions and loads its taps. Those are R*S elements
# apart in memory, so a load fetches only 2 bytes. Hence the loop: 16 steps share these
# instructions, 6 for each step. A small layer has fewer steps. With 4 steps it is 23 for each, and
# at stride 1 the instructions then need about as much time as the memory. A 5x5 filter has 200
# multiply-adds: from there on, instructions are the limit.
TILES = [
    # This is the default in 16-bit: 8 channels per thread. Their taps, sums and inputs take almost
    # 190 registers of a thread at stride 1. An SM has 65,536 registers. They are enough for five
    # programs of two warps, but only for two programs of four warps.
    dict(BLOCK_M=32, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=2),
    # This is the default in float32: 4 channels per thread are 16 bytes there, and they take fewer
    # registers.
    dict(BLOCK_M=32, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
    # 32, 96 or 144 channels, as in MobileNet: blocks of 64 channels would leave more columns empty.
    dict(BLOCK_M=64, BLOCK_N=32, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=2),
    # Patches of two rows share more of x, but only half as many steps share the taps.
    dict(BLOCK_M=64, BLOCK_N=64, PATCH_P=2, PATCH_Q=2, ROWS=16, num_warps=4),
    # wide layers: 512 bytes of a pixel
    dict(BLOCK_M=16, BLOCK_N=256, PATCH_P=2, PATCH_Q=2, ROWS=16, num_warps=4),
    # A program is twice as large, and its neighbouring strips share more in L1.
    dict(BLOCK_M=64, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
NARROW = {2: TILES[2], 4: TILES[1]}
# More taps leave fewer registers for channels: a thread has 4 channels for up to 25 taps and 2
# channels for up to 49.
MORE_TAPS = {
    25: dict(BLOCK_M=32, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
    49: dict(BLOCK_M=16, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
}
MOST_TAPS = max(MORE_TAPS)
ENOUGH_PROGRAMS = 512
MOST_INT32 = 2**31


@triton.jit
def conv2d_depthwise_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, M, C, H, W, P, Q, chunks, strips, steps,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wc, stride_wr, stride_ws, stride_bias,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_N: tl.constexpr, PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr,
):  # fmt: skip
    """One program computes STRIPS strips of y, `steps` patches long, for BLOCK_N channels.

    An image has `strips` strips side by side and `chunks` below each other: M = N*chunks*strips.
    y is channels_last. A patch has several rows (columns) only where the dilation is 1.
    """
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n  # Programs that share pixels are neighbours.
    pid_n = tl.program_id(0) % blocks_n
    offs_m = pid_m.to(INDEX) * STRIPS + tl.arange(0, STRIPS)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = offs_n < C
    mask_n = mask_c[None, :]

    taps = ()  # each [1, BLOCK_N]
    w_ptrs = w_ptr + offs_n * stride_wc
    for t in tl.static_range(R * S):
        tap = tl.load(w_ptrs + (t // S * stride_wr + t % S * stride_ws), mask=mask_c, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    start = tl.full((STRIPS, BLOCK_N), 0.0, tl.float32)  # Each sum starts here.
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_c, other=0.0)
        start += bias.to(tl.float32)[None, :]

    chunk = offs_m // strips
    n = chunk // chunks
    p = (chunk - n * chunks) * (steps * PATCH_P)  # (p, q) is the patch's upper left output.
    q = (offs_m - chunk * strips) * PATCH_Q
    h, w = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W  # the pixel under its tap (0, 0)
    n = n.to(tl.int64)
    x_rows = n * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    y_rows = ((n * P + p) * Q + q) * C
    x_ptrs = x_ptr + x_rows[:, None] + (offs_n * stride_xc)[None, :]  # [STRIPS, BLOCK_N]
    y_ptrs = y_ptr + y_rows[:, None] + offs_n[None, :]
    step_h = tl.cast(stride_xh, tl.int64) * DIL_H
    step_w = tl.cast(stride_xw, tl.int64) * DIL_W
    step_p = tl.cast(Q, tl.int64) * C
    p = tl.where(offs_m < M, p, P)  # Put strips that do not exist below the image.
    h = tl.where(offs_m < M, h, H)

    for _ in range(steps):
        acc = ()  # one sum per output of the patch, row by row, each [STRIPS, BLOCK_N]
        for _a in tl.static_range(PATCH_P * PATCH_Q):
            acc = acc + (start,)
        for i in tl.static_range((PATCH_P - 1) * STRIDE_H + R):
            row = (h + i * DIL_H).to(tl.uint32) < H  # Unsigned, -1 is very large.
            for j in tl.static_range((PATCH_Q - 1) * STRIDE_W + S):
                mask = (row & ((w + j * DIL_W).to(tl.uint32) < W))[:, None] & mask_n
                x = tl.load(x_ptrs + (i * step_h + j * step_w), mask=mask, other=0.0)
                x = x.to(tl.float32)
                # Output k is in row k // PATCH_Q and column k % PATCH_Q of the patch. Its tap
                # (r, s) lies on x if both conditions below are true.
                for k in tl.static_range(PATCH_P * PATCH_Q):
                    for r in tl.static_range(R):
                        if k // PATCH_Q * STRIDE_H + r == i:
                            for s in tl.static_range(S):
                                if k % PATCH_Q * STRIDE_W + s == j:
                                    more = tl.fma(x, taps[r * S + s], acc[k])
                                    acc = acc[:k] + (more,) + acc[k + 1 :]
        for a in tl.static_range(PATCH_P * PATCH_Q):
            y = activate(acc[a], ACTIVATION)
            mask = ((p + a // PATCH_Q < P) & (q + a % PATCH_Q < Q))[:, None] & mask_n
            offs = a // PATCH_Q * step_p + a % PATCH_Q * C
            tl.store(y_ptrs + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        p += PATCH_P
        h += PATCH_P * STRIDE_H
        x_ptrs += PATCH_P * STRIDE_H * step_h
        y_ptrs += PATCH_P * step_p


def is_depthwise(weight, groups) -> bool:
    """Return whether this file does a convolution with `weight`, [K, C/groups, R, S].

    It must have one filter per channel, whose taps fit into registers. Larger filters stay with
    conv2d.py.
    """
    K, C, R, S = weight.shape
    return C == 1 and K == groups and R * S <= MOST_TAPS


def _default(C, taps) -> dict[int, dict]:
    for most, tile in MORE_TAPS.items():
        if 9 < taps <= most:
            return {2: tile, 4: tile}
    return NARROW if 0 < C % 64 <= 32 else DEFAULT


def conv2d_depthwise(x, weight, bias, y, stride, padding, dilation, activation) -> None:
    """Write the convolution to y, [N, C, P, Q] in channels_last memory.

    conv2d.py has checked the arguments.
    """
    (N, C, H, W), (_, _, R, S), (_, _, P, Q) = x.shape, weight.shape, y.shape
    default = _default(C, R * S)
    tile = choose_tile("conv2d_depthwise", x, default, M=N * P * Q, N=C).copy()
    patch_p, patch_q, rows = (tile.pop(key) for key in ("PATCH_P", "PATCH_Q", "ROWS"))
    block = max(1, tile.pop("BLOCK_M") // (patch_p * patch_q))
    # Outputs share inputs only if the filter is not dilated and the windows overlap.
    patch_p = patch_p if dilation[0] == 1 and stride[0] <= R else 1
    patch_q = patch_q if dilation[1] == 1 and stride[1] <= S else 1
    strips, blocks_n = cdiv(Q, patch_q), cdiv(C, tile["BLOCK_N"])
    while True:  # Halve the strips until there are enough programs.
        chunks = cdiv(P, rows)
        steps = cdiv(cdiv(P, chunks), patch_p)
        M = N * chunks * strips
        programs = cdiv(M, block) * blocks_n
        if programs >= ENOUGH_PROGRAMS or rows <= patch_p:
            break
        rows //= 2
    launch(
        conv2d_depthwise_kernel, (programs,),
        x, weight, bias, y, M, C, H, W, P, Q, chunks, strips, steps,
        *x.stride(), weight.stride(0), *weight.stride()[2:],
        0 if bias is None else bias.stride(0), R, S, *stride, *padding, *dilation,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
        INDEX=tl.int32 if M + block <= MOST_INT32 else tl.int64,
        STRIPS=block, PATCH_P=patch_p, PATCH_Q=patch_q, **tile,
    )  # fmt: skip
