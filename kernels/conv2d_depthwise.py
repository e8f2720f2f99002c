"""Depthwise convolution: every channel has a filter of its own. Bound by memory, not by arithmetic.

    forward     y[n,c,p,q]  = act(bias[c] + sum over r,s of x[n, c, h, w] * weight[c,0,r,s])
                              with h = p*stride - padding + r*dilation, and w alike
    backward    as of any convolution: conv2d_input_grad.py, conv2d_weight_grad.py

It is `conv2d` with groups = C = K, and conv2d.py calls this file for it. No sum runs over channels,
so there is no matrix to multiply by: a GEMM would have one column a group, and a tensor core
sixteen at least. What is left is pool.py's loop over windows, with a multiply-add for the maximum.

    3x3 at stride 1, a patch of 1 x 4 outputs #      a program goes down its strips, a patch a step

       . . . . . .     its 18 inputs are loaded            q ->
       . # # # # .     and converted once, and             A A A A  B B B B  C C C C   step 0
       . . . . . .     multiplied by up to three           a a a a  b b b b  c c c c   step 1
                       taps each: 36 multiply-adds         A A A A  B B B B  C C C C   step 2
                       for 18 loads, and not for 36        ...

    for each strip and block of channels, in parallel:
        taps = weight[c, all r and s]                   in registers, for all of the steps
        for each patch on the way down:
            acc = 0, of each of its outputs
            for each input (i, j) that the patch reads:
                for each output (p, q) and tap (r, s) that meet there:
                    acc[p, q] += x[c, i, j] * taps[r, s]
            y[c, patch] = act(acc + bias[c])

A thread has the same few channels of a whole patch, so what outputs share is shared in registers,
where it saves an instruction and not only a byte. A program has BLOCK_M pixels x BLOCK_N channels a
step. Two of three rows that a step reads were those of the step before, and may still be in L1.

What limits it: memory, e(|x| + |weight| + |y|) bytes for 2*R*S FLOPs an output. At stride 1 in
16-bit a 3x3 layer does 4.5 FLOPs a byte (no tensor core is to be had; without, an H200 does 14).
But an output is instructions: 9 multiply-adds, and its part of loads, conversions, masks. Of 256
outputs, which are 8 for each thread of a warp and 1,024 bytes, an H200 has time for 198 of a warp's
instructions, 72 of which are multiply-adds. Compiled for sm_90, a step takes 163 to 168, and what
comes before the loop (taps, which lie R*S apart in memory, are fetched 2 bytes at a time) 91 to 124
more. Hence a loop: 16 steps have at most 8 each of that, 4 of a small layer at most 31, which is
where the time is up. At stride 2 there is time for 495, and a step takes 204 to 210. Of a 5x5
filter the multiply-adds alone are 200: from there on instructions are the limit.

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


# A thread loads and stores 16 bytes a pixel. BLOCK_M counts the pixels of a step, so a program has
# BLOCK_M / (PATCH_P * PATCH_Q) strips. ROWS: how far down it goes at most.
TILES = [
    # the default in 16-bit: 8 channels a thread. Their taps, sums and inputs fill registers, so
    # that an SM has room for 8 warps: in programs of two, which end more evenly than of four
    dict(BLOCK_M=32, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=2),
    # and in float32: 4 channels, which are 16 bytes there, and half of the registers
    dict(BLOCK_M=32, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
    # 32, 96, 144 channels, as a MobileNet has: of 64 at a time more would be padding
    dict(BLOCK_M=64, BLOCK_N=32, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=2),
    # two rows at once share more of x, but half as many steps share the taps
    dict(BLOCK_M=64, BLOCK_N=64, PATCH_P=2, PATCH_Q=2, ROWS=16, num_warps=4),
    # wide layers: 512 bytes of a pixel
    dict(BLOCK_M=16, BLOCK_N=256, PATCH_P=2, PATCH_Q=2, ROWS=16, num_warps=4),
    # twice as large programs, whose neighbouring strips share more in L1
    dict(BLOCK_M=64, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
NARROW = {2: TILES[2], 4: TILES[1]}
# More taps leave registers for fewer channels: 4 of up to 25 taps, 2 of up to 49.
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

    M = N * chunks * strips. y is channels_last. A patch is higher (wider) than one output only
    where the filter is not dilated, so that its rows (columns) of x are neighbours.
    """
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n  # programs that share their pixels run side by side
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
    start = tl.full((STRIPS, BLOCK_N), 0.0, tl.float32)  # of each sum
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_c, other=0.0)
        start += bias.to(tl.float32)[None, :]

    chunk = offs_m // strips
    n = chunk // chunks
    p = (chunk - n * chunks) * (steps * PATCH_P)  # of the patch's upper left output
    q = (offs_m - chunk * strips) * PATCH_Q
    h, w = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W  # what its tap (0, 0) reads
    n = n.to(tl.int64)
    x_rows = n * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    y_rows = ((n * P + p) * Q + q) * C
    x_ptrs = x_ptr + x_rows[:, None] + (offs_n * stride_xc)[None, :]  # [STRIPS, BLOCK_N]
    y_ptrs = y_ptr + y_rows[:, None] + offs_n[None, :]
    step_h = tl.cast(stride_xh, tl.int64) * DIL_H
    step_w = tl.cast(stride_xw, tl.int64) * DIL_W
    step_p = tl.cast(Q, tl.int64) * C
    p = tl.where(offs_m < M, p, P)  # strips that do not exist are below the image
    h = tl.where(offs_m < M, h, H)

    for _ in range(steps):
        acc = ()  # of the patch's outputs row by row, each [STRIPS, BLOCK_N]
        for _a in tl.static_range(PATCH_P * PATCH_Q):
            acc = acc + (start,)
        for i in tl.static_range((PATCH_P - 1) * STRIDE_H + R):
            row = (h + i * DIL_H).to(tl.uint32) < H  # as an unsigned number -1 is very large
            for j in tl.static_range((PATCH_Q - 1) * STRIDE_W + S):
                mask = (row & ((w + j * DIL_W).to(tl.uint32) < W))[:, None] & mask_n
                x = tl.load(x_ptrs + (i * step_h + j * step_w), mask=mask, other=0.0)
                x = x.to(tl.float32)
                # Output k (row k // PATCH_Q) has tap (r, s) on x where both lines below say so.
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
    """Whether a convolution is one for this file: a filter a channel, of taps that registers hold.

    weight is [K, C/groups, R, S]. Larger filters stay with conv2d.py.
    """
    K, C, R, S = weight.shape
    return C == 1 and K == groups and R * S <= MOST_TAPS


def _default(C, taps) -> dict[int, dict]:
    for most, tile in MORE_TAPS.items():
        if 9 < taps <= most:
            return {2: tile, 4: tile}
    return NARROW if 0 < C % 64 <= 32 else DEFAULT


def conv2d_depthwise(x, weight, bias, y, stride, padding, dilation, activation) -> None:
    """Write the convolution to y, [N, C, P, Q] in channels_last memory; conv2d.py has checked."""
    (N, C, H, W), (_, _, R, S), (_, _, P, Q) = x.shape, weight.shape, y.shape
    default = _default(C, R * S)
    tile = choose_tile("conv2d_depthwise", x.dtype, default, M=N * P * Q, N=C).copy()
    patch_p, patch_q, rows = (tile.pop(key) for key in ("PATCH_P", "PATCH_Q", "ROWS"))
    block = max(1, tile.pop("BLOCK_M") // (patch_p * patch_q))
    # Outputs share inputs if the filter is dense and windows overlap.
    patch_p = patch_p if dilation[0] == 1 and stride[0] <= R else 1
    patch_q = patch_q if dilation[1] == 1 and stride[1] <= S else 1
    strips, blocks_n = cdiv(Q, patch_q), cdiv(C, tile["BLOCK_N"])
    while True:  # down all of `rows`, or less if there were not enough programs
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
