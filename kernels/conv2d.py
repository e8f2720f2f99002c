"""Direct convolution by implicit GEMM: a matmul whose left matrix is never written to memory.

In cuDNN's letters: x [N, C, H, W], weight [K, C, R, S], y [N, K, P, Q]. A tap (r, s) is one of the
R*S positions of a filter.

    forward     y[n,k,p,q]  = act(bias[k] + sum over c,r,s of x[n, c, h, w] * weight[k,c,r,s])
                              with h = p*stride - padding + r*dilation, and w likewise
    backward    dx and dweight are lessons: conv2d_input_grad.py, conv2d_weight_grad.py
                dbias = sum over n,p,q of dy

Seen as a matmul, a row is an output pixel and a column is an output channel. The sum runs over the
taps and the input channels. One program owns a tile of y: BLOCK_M pixels x BLOCK_N channels.

    GEMM M = N*P*Q      x as [N*P*Q, R*S*C]        pixels # of a tile, and their input + for one tap
    GEMM N = K          weight as [R*S*C, K]           q ->               w ->
    GEMM K = R*S*C      y as [N*P*Q, K]              p # # # #          h . . . . . .
                                                     | # # # #          | . . + + + +
    for each tile (m, k) of y, in parallel:          v                  v . . + + + +
        acc = 0
        for each tap (r, s):                       The tap shifts all pixels alike. In the padding
            for each block of channels c:          the load is masked and gives 0.
                acc += x[pixels of m shifted by (r, s), c] @ weight[k, c, r, s]
        y[m, k] = act(acc + bias[k])

The matrix [N*P*Q, R*S*C] would hold an input pixel up to R*S times. im2col.py writes that matrix to
memory and reads it back. Here a program computes the addresses, and caches serve the repeats.

What limits it: 2*N*P*Q*K*C*R*S FLOPs for e(|x| + |weight| + |y|) bytes, with e bytes an element. An
H200 can do 206 FLOPs per byte. For large images in 16-bit a layer does, in FLOPs per byte:

    3x3, 128 channels in and out                         576    tensor cores are the limit
    1x1, 128 channels in and out                          64    memory is the limit
    7x7 at stride 2, 3 to 64 channels (ResNet's first)   124    memory is the limit

Three kernels follow, from naive to fast; conv2d_tma.py has a fourth. They are compared below.

Read first: matmul.py, im2col.py. Source: Chetlur et al., cuDNN: Efficient Primitives for Deep
Learning (2014).
"""

import functools

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import autocast, dot_precision
from tilelab.kernels._geometry import as_pixels, check_conv2d, empty_channels_last, output_size
from tilelab.kernels._launch import launch
from tilelab.kernels._tile_facts import kind_of, moved_by, pointer_tile, whole_channels
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.activation import activate, activated, kept_for, needs_z
from tilelab.kernels.bias_relu import bias_activation, bias_activation_backward, bias_backward
from tilelab.kernels.conv2d_depthwise import conv2d_depthwise, is_depthwise
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad
from tilelab.kernels.conv2d_tma import choices, conv2d_tma, fast_tile, plan_for
from tilelab.kernels.conv2d_weight_grad import conv2d_weight_bias_grad, conv2d_weight_grad
from tilelab.kernels.matmul import lay_by_rows, matmul_into, wants_rows


def reference(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation=None):
    """The same in plain torch, for any dtype."""
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return activated(y, activation)


# The four kernels are rungs of a ladder, to be read in this order. Each needs fewer instructions
# than the one before for the same FLOPs:
#
#     direct     conv2d_direct_kernel    the seven loops as on paper, without tensor cores
#     flat       conv2d_flat_kernel      a matmul by tensor cores; a step divides vectors of indices
#     pointer    conv2d_kernel           a step stays within one tap, so it divides only scalars
#     tma        conv2d_tma.py           a unit of the GPU, the TMA, fetches boxes of pixels
#
# How many instructions are too many? An SM is one of a GPU's processors; an H200 has 132. Its
# threads run in warps of 32, and one instruction is issued for a whole warp. In a clock, an SM of
# sm_90 (H100, H200) can issue four instructions, and its tensor cores can do 4,096 FLOPs in 16-bit.
# So a kernel with more than one instruction per 1,024 FLOPs cannot keep them busy:
#
#               largest tile           instructions       FLOPs        instructions
#                                      a warp and step    a step       per 1,024 FLOPs
#     direct    32x32, 4 warps         62                     2,048    124
#     flat      128x128x32, 8 warps    194                1,048,576      1.5
#     pointer   128x256x64, 8 warps    156                4,194,304      0.30
#     tma       256x128x64, 8 warps    101                4,194,304      0.20
#
# (bfloat16, compiled by triton 3.9.0; not run. For example, 4 warps * 62 / (2,048 / 1,024) = 124.)
# The last two are below 1, so this limit holds back neither of them. Between the two, tma also
# saves registers: as compiled, a thread takes 154 instead of 240.
TILES = [
    # This is the default in 16-bit. In three stages both operands take 48 KiB of shared memory,
    # which every GPU since 2020 has.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    # This is the default in float32. Without TF32, each thread holds its rows and columns of a step
    # in registers, so the blocks are smaller.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
    # A step has 64 channels. That makes half as many steps, each of which looks up its tap.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    # This is for wide layers: a larger accumulator does not fit the registers. With triton 3.6.0
    # for sm_90, each wgmma (its tensor-core instruction) waits here for the one before.
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    # 64 output channels, as in the first stage of a ResNet, fill all columns of this tile.
    dict(BLOCK_M=256, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),
    # Small images and small batches get four times as many programs.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
    # This is for few input channels: conv2d_flat_kernel needs registers for addresses and masks.
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2),
    # Four warps beat eight where their registers suffice (see matmul.py): each one reads less from
    # shared memory for as many products.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
]
DEFAULT = {2: TILES[0], 4: TILES[1]}
FLAT_DEFAULT = {2: TILES[6], 4: TILES[6]}
# A call takes these two only where `use_tile("conv2d", tile)` or a sweep forces it to.
RUNGS = [
    # A thread does 32 * 32 / 128 = 8 products a step. For more of them, its addresses would spill.
    dict(kernel="direct", BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),
    dict(kernel="flat", BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
]
# A block of one tap's channels has at least 16. With fewer channels it would hold padding.
FEW_CHANNELS = 16


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

    Naive: the tile stands for the loops over n, p, q and k. Those over r, s and c run in turn, and
    a step multiplies BLOCK_M numbers by BLOCK_N, each by each. C and K are per group.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n  # Neighbouring programs share their pixels.
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

    Tensor cores: taps and channels are one sum over j in [0, R*S*C), and each step finds out which
    (r, s, c) its j are. So even few channels fill a step. C and K are per group.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n  # Neighbouring programs share their pixels.
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    x_ptr += group * C * stride_xc
    w_ptr += group * K * stride_wk

    M = tl.cast(N, tl.int64) * P * Q
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the last pixel wrap around: they read something valid that is never stored.
    pixel = offs_m % M
    n, p, q = pixel // Q // P, pixel // Q % P, pixel % Q
    h, w = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W  # where tap (0, 0) lies
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
    NEAR: tl.constexpr, BY_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of y: BLOCK_M pixels x BLOCK_N channels of one group.

    Faster: a step is a block of channels of one tap. A tap shifts all pixels by the same distance,
    so the addresses are computed once, and a step adds one number to all. C and K are per group.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    group = tl.program_id(1).to(tl.int64)
    # A register has 32 bits. An offset of 64 bits takes two, and two instructions to add. NEAR says
    # that 32 bits are enough.
    INDEX: tl.constexpr = tl.int32 if NEAR else tl.int64
    x_ptr += group * C * stride_xc
    w_ptr += group * K * stride_wk

    M = tl.cast(N, INDEX) * P * Q
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_K).to(INDEX)
    pixel = offs_m % M  # Rows past the last pixel wrap around, as above.
    n, p, q = pixel // Q // P, pixel // Q % P, pixel % Q
    h, w = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W  # where tap (0, 0) lies
    # In channels_last memory stride_xc is 1: the channels of a pixel are neighbours, and a row of
    # the tile is one contiguous load. Other strides work as well.
    x_rows = n * stride_xn + h * stride_xh + w * stride_xw
    x_offs = x_rows[:, None] + (offs_c * stride_xc)[None, :]  # [BLOCK_M, BLOCK_K]
    w_offs = (offs_c * stride_wc)[:, None] + (offs_n % K * stride_wk)[None, :]
    # These are the distances in memory from one tap, or one channel, to the next.
    step_h = tl.cast(stride_xh, tl.int64) * DIL_H
    step_w = tl.cast(stride_xw, tl.int64) * DIL_W
    step_c = tl.cast(stride_xc, tl.int64)
    step_wr, step_ws = tl.cast(stride_wr, tl.int64), tl.cast(stride_ws, tl.int64)
    step_wc = tl.cast(stride_wc, tl.int64)

    # For each pixel, one bit per tap says whether that tap lies inside the image. An int32 holds
    # the bits of up to 32 taps.
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
        else:  # There are more than 32 taps; or there is no padding, and every tap is inside.
            inside = (h + r * DIL_H >= 0) & (h + r * DIL_H < H)
            inside &= (w + s * DIL_W >= 0) & (w + s * DIL_W < W)
        if EVEN_C:  # C is a multiple of BLOCK_K: no channel needs a mask.
            if PAD_H + PAD_W > 0:
                x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs)
            wt = tl.load(w_ptrs)
        else:
            mask_c = offs_c < C - c
            x = tl.load(x_ptrs, mask=inside[:, None] & mask_c[None, :], other=0.0)
            wt = tl.load(w_ptrs, mask=mask_c[:, None], other=0.0)
        if BY_ROWS:  # against bank conflicts, see matmul.py
            wt = lay_by_rows(wt)
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
    """Return an empty y [N, K, P, Q], channels_last."""
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
    # A call takes the first of these for which the condition holds:
    #
    #     conv2d_depthwise.py    every channel has a filter of its own (`is_depthwise`)
    #     matmul.py              1x1 filters, stride 1, no padding, no groups (`as_pixels`)
    #     conv2d_tma.py          the GPU has TMA, and TMA can read the tensors (`plan_for`)
    #     conv2d_flat_kernel     a group has fewer than FEW_CHANNELS input channels
    #     conv2d_kernel          all other calls
    #
    # A tile that is forced or tuned can choose otherwise: pointers instead of TMA, or one of RUNGS
    # instead of conv2d_kernel.
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
    if pixels is not None:  # x is [M, C] in memory, and a filter is a column of C numbers
        rows = y.permute(0, 2, 3, 1).view(M, K)
        matmul_into(rows, pixels, weight.view(K, C).t(), bias, activation, precision)
        return y

    # `can` names the kernels among which a tile may choose. With groups or few channels, RUNGS are
    # not among them.
    can = ("pointer", *(tile["kernel"] for tile in RUNGS)) if op == "conv2d" else ("pointer",)
    plan = plan_for(x, weight, stride, padding, dilation, groups, precision)
    default, can = choices(
        plan, x, FLAT_DEFAULT if flat else DEFAULT, can,
        lambda device: fast_tile(plan, x.itemsize, device),
        lambda device: pointer_tile(
            device, "conv2d", kind_of(x.dtype, precision), M, K, C, R * S, groups,
            moved_by(x, weight, y), whole_channels(x, C, K),
        ),
    )  # fmt: skip
    tile = choose_tile(op, x, default, can, M=M, N=K, K=R * S * C if flat else C)
    # `choose_tile` takes a tile without a name for one of "pointer". With few channels that means
    # conv2d_flat_kernel, which takes the place of conv2d_kernel there.
    rung = tile.get("kernel", "flat" if flat else "pointer")
    if rung == "tma":
        conv2d_tma(plan, x, weight, bias, activation, y, tile, precision, padding)
        return y
    options = {k: v for k, v in tile.items() if k != "kernel"}
    if rung != "direct":
        options["PRECISION"] = precision
    if rung == "pointer":
        options["EVEN_C"] = C % tile["BLOCK_K"] == 0
        options["BY_ROWS"] = wants_rows(weight[:, :, 0, 0].t(), precision)
        # Tap (0, 0) of a pixel may lie in the padding, and so may its offset.
        padded = (N, C, H + 2 * padding[0], W + 2 * padding[1])
        others = (t for t in (weight, y, bias) if t is not None)
        options["NEAR"] = _are_near((padded, x.stride()), *((t.shape, t.stride()) for t in others))
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
    """Return whether 32 bits hold every offset in these tensors, given as (sizes, strides) each."""
    far = [sum((n - 1) * s for n, s in zip(*t, strict=True)) for t in tensors]
    return max(far) < 2**30  # 2**31 would be too many: a tile may end beyond the last pixel.


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
    if weight is None:  # No gradient reads its values, but dweight gets its shape and strides.
        weight = dy.new_empty_strided(*ctx.weight_layout)
    geometry = ctx.stride, ctx.padding, ctx.dilation, ctx.groups
    dx = dweight = dbias = None
    if y is not None:  # One pass goes through the activation and gives the bias gradient too.
        dy, dbias = bias_activation_backward(dy, y, None, ctx.activation)
    if ctx.needs_input_grad[0]:
        dx = conv2d_input_grad(dy, weight, ctx.input_size, *geometry)
    sum_dy = dbias is None and ctx.needs_input_grad[2]
    if ctx.needs_input_grad[1] and sum_dy and weight.numel():  # One pass over dy gives both.
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
            GPUs with TMA (Hopper and later) first pack an x of fewer than 8 channels (4 in float32)
            into a copy. No other x is copied.
        weight: [K, C/groups, R, S], of x's dtype; any strides, fastest in channels_last memory.
            GPUs with TMA first pack other weights into a copy, and those of groups of fewer than 64
            filters.
        bias: [K], of x's dtype, or None.
        stride: the distance between neighbouring windows in pixels, an int or (height, width).
        padding: the rows and columns of zeros on each side of the image, an int or (height, width).
        dilation: the distance between neighbouring taps in pixels, an int or (height, width).
        groups: into how many groups the channels of x and the filters are divided; C for a
            depthwise convolution.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu". If an input requires a
            gradient, all but ReLU round the sum to x's dtype before bias and activation.

    Returns:
        [N, K, P, Q] of x's dtype in channels_last memory, accumulated in float32, with
        P = floor((H + 2 * padding - dilation * (R - 1) - 1) / stride) + 1, and Q likewise.
        A GPU rounds float32 operands to TF32 if `torch.backends.cudnn.allow_tf32` (or its newer
        `conv.fp32_precision`) says so, as is torch's default. Where x or groups are packed, an
        infinity or NaN in x may make a few neighbouring outputs NaN.

    Raises:
        TypeError: a dtype or device is not supported, or differs between the tensors.
        ValueError: shapes or geometry do not fit, or the activation is unknown.

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
