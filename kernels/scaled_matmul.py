"""Matrix multiplication of 8-bit operands with scales, for inference; it has no gradient.

    C = act((A @ B) * scale_a * scale_b + bias)        A [M, K], B [K, N] in 8 bits; C in 16 or 32

To fit into 8 bits, each tensor, row or column is divided by a scale. The scale makes its largest
value 448 (float8_e4m3fn) or 127 (int8). One element of C is a sum of products of one row of A and
one column of B. All these products have the same two scales, so the sum is multiplied by them once:

          K            N                          N
       +-----+      +--+--+                    +--+--+
     M |==>  |  x   |  v  |   * scale_a [M]  = |  #  |     one program: BLOCK_M x BLOCK_N of C
       +-----+      +--+--+   * scale_b [N]    +--+--+

What limits it. The product is 2MNK FLOPs over MK + KN + 2MN bytes, if C has 16 bits. For squares of
side n, that is n/2 FLOPs per byte (in 16-bit it is n/3). The tensor cores are twice as fast as in
16-bit: an H200 does 412 FLOPs in the time of one byte. So from n = 800 on, they are the limit. A
language model that writes token by token has few rows. Then reading the weights from memory is the
limit, and 8 bits halve their bytes.

The formats. float8_e4m3fn has 4 bits of exponent and 3 of mantissa; its largest value is 448, and
it has no infinity. NVIDIA's GPUs have it since sm_89 (Ada); AMD's gfx942 has another 8-bit format.
int8 runs on NVIDIA's GPUs since sm_80 (Ampere) and on gfx942.

How exact it is. int8 sums are exact up to K = 131,071. float8 products are exact, but Hopper's
tensor cores add them with about 14 bits: a comment above the kernels says what that costs.

Read first: matmul.py and matmul_tma.py, of which these two kernels are variants. Sources:
torch._scaled_mm and torch.nn.functional.scaled_mm; cuBLASLt's scales for a tensor, or for each row
and column (CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F); Micikevicius et al., FP8 Formats for Deep
Learning (2022); Dettmers et al., LLM.int8() (2022).
"""

import functools

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import DTYPES, check_device, check_shape, check_tensors
from tilelab.kernels._launch import Device, descriptor, device_of, launch, tma_rows
from tilelab.kernels._tile_facts import Work, fastest_tile, kind_of
from tilelab.kernels._tiles import cdiv, choose_tile, persistent, tma_tile
from tilelab.kernels.activation import activate, activated, check_activation

EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)


def reference(a, b, scale_a, scale_b, bias=None, activation=None):
    """Compute the same in plain torch. Convert a and b first to a dtype that torch can multiply."""
    c = (a @ b) * scale_a.reshape(-1, 1) * scale_b
    return activated(c if bias is None else c + bias, activation)


TILES = [
    # The default: three stages of both operands take 48 KiB, which every GPU since 2020 has.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # Large squares on Hopper: this is the most reuse that the registers allow.
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, GROUP_M=8, num_warps=8, num_stages=3),
    # Deep K: fewer, longer steps hide the latency of loads behind more tensor-core work.
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, num_warps=8, num_stages=3),
    # Small C: there are four times as many programs, so fewer SMs are idle than with 128x128.
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=4),
    # Few rows, as with one token at a time: the weights' columns stream through.
    dict(BLOCK_M=16, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=4),
    # The default on Hopper for int8 that is not contiguous along K. Four warps would use wgmma, and
    # have it turned on its way into shared memory: byte by byte, and eight threads meet in each
    # bank. Two warps use the older mma. Its operands are turned in registers. (In float8 the older
    # mma computes in float16, at half the rate.)
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=2, num_stages=3),
]
DEFAULT = {1: TILES[0]}  # by bytes per element
TURNED_DEFAULT = {1: TILES[5]}

_fast = functools.partial(tma_tile, GROUP_M=8)

# The tiles, by bytes per element. They were compiled for sm_90 in both dtypes with triton 3.6.0 and
# 3.9.0 (not run). No tile spills with ReLU. With GELU or SiLU, a 128x256 tile with SUBTILES=1 may
# spill up to 24 bytes per thread, outside of the loop. Both operands come from shared memory. A
# wgmma (Hopper's tensor-core instruction) is as wide as the tile in float8, and 64x128 in int8. A
# step has at most 94 instructions, except with int8 at 128x256: there it has twice as many wgmma,
# and 101 to 105 instructions.
FAST_TILES = {
    1: [
        # This is the most reuse that the registers allow. In halves, the epilogue leaves room in
        # shared memory for a fourth stage.
        _fast(m=128, n=256, k=128, warps=8, stages=4, SUBTILES=2, per_sm=1),
        # The same with the whole tile in the epilogue at once.
        _fast(m=128, n=256, k=128, warps=8, stages=3, SUBTILES=1, per_sm=1),
        # There are twice as many tiles.
        _fast(m=128, n=128, k=128, warps=8, stages=4, SUBTILES=1, per_sm=1),
        # Two programs share an SM: one multiplies while the other stores.
        _fast(m=128, n=128, k=128, warps=8, stages=3, SUBTILES=2, per_sm=2),
        # Small C: there are four times as many tiles as with 128x256.
        _fast(m=64, n=128, k=128, warps=4, stages=4, SUBTILES=1, per_sm=2),
    ],
}

# How exact the sums are. The tensor cores add int8 products in int32. This is exact up to
# K = 131,071: 128 * 128 * 131,072 is 2^31, too large for int32. The sum is rounded to float32 once.
#
# A product of two float8_e4m3fn is exact in float32, but Hopper's tensor cores do not add in full
# float32. They align 32 products, and the sum so far, to the largest of these values, and keep
# about 14 bits. (DeepSeek-V3 reports this, 2024, with errors up to 2% at K = 4096. It was not
# measured here.) So each product can lose up to 2^-13 of the partial sum. If the signs are random,
# the error is about 2^-13 sqrt(K) of the largest result; tests/tools/tolerance.py allows twice
# that. If all signs are the same, errors add up to at most 2^-13 K. cuBLAS adds in this way if
# torch._scaled_mm gets use_fast_accum=True. Triton's interpreter adds in float32.
#
# `tl.dot` has a remedy, max_num_imprecise_acc=128: it moves the sum to a second accumulator after
# every 128 products. It needs more registers. Compiled for sm_90, it spills at 128x256, and at
# 128x128 a step has 150 instructions instead of 90. So it is not used here.


@triton.jit
def _finished(
    acc, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, stride_sa, stride_sb,
    stride_bias, EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return act(acc * scale_a * scale_b + bias) in float32: the epilogue of both kernels."""
    out = acc.to(tl.float32)  # rounds int32 sums, once
    mask_n = offs_n < N
    if EACH_ROW:
        row_ptrs = scale_a_ptr + offs_m.to(tl.int64) * stride_sa
        out *= tl.load(row_ptrs, mask=offs_m < M, other=0.0)[:, None]
    else:  # one scale for the whole tensor
        out *= tl.load(scale_a_ptr)
    if EACH_COLUMN:
        column_ptrs = scale_b_ptr + offs_n.to(tl.int64) * stride_sb
        out *= tl.load(column_ptrs, mask=mask_n, other=0.0)[None, :]
    else:
        out *= tl.load(scale_b_ptr)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + offs_n.to(tl.int64) * stride_bias
        out += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return activate(out, ACTIVATION)


@triton.jit
def scaled_matmul_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, c_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_sa, stride_sb, stride_bias, stride_cm,
    EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of C = act((A @ B) * scale_a * scale_b + bias).

    It differs from the kernel of matmul.py in the dtype of the sum and in the scales.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * blocks_n) % rows
    pid_n = pid % (GROUP_M * blocks_n) // rows

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # Rows and columns past the border wrap around. Their results are never stored.
    a_ptrs = a_ptr + (offs_m % M * stride_am)[:, None] + (offs_k * stride_ak)[None, :]
    b_ptrs = b_ptr + (offs_k * stride_bk)[:, None] + (offs_n % N * stride_bn)[None, :]
    step_a = BLOCK_K * tl.cast(stride_ak, tl.int64)
    step_b = BLOCK_K * tl.cast(stride_bk, tl.int64)

    sum_dtype: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.full((BLOCK_M, BLOCK_N), 0, sum_dtype)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptrs)  # [BLOCK_K, BLOCK_N]
        else:  # past the end of K, zeros add nothing to the sum
            a = tl.load(a_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=sum_dtype)
        a_ptrs += step_a
        b_ptrs += step_b

    c = _finished(
        acc, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, stride_sa, stride_sb,
        stride_bias, EACH_ROW, EACH_COLUMN, HAS_BIAS, ACTIVATION,
    )  # fmt: skip
    c_ptrs = c_ptr + (offs_m * stride_cm)[:, None] + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(c_ptrs, c.to(c_ptr.dtype.element_ty), mask=mask)


# --- The fast kernel ------------------------------------------------------------------------------
#
# This kernel has the changes of matmul_tma.py: TMA, persistent programs, and an epilogue in halves.
# Two things differ:
#
# 1. Tensor cores read 16-bit operands from shared memory in both orders. They read 8-bit operands
#    only if these are contiguous along K. So A must be row-major, and the columns of B contiguous.
#    A weight [N, K], seen as [K, N], is such a B. (torch._scaled_mm takes no other layout.)
# 2. A step of the same bytes has twice as many products, and takes as many clocks as in 16-bit. So
#    a tile needs half the steps, and its epilogue is a larger share of its time.


@triton.jit
def scaled_matmul_tma_kernel(
    a, b, scale_a_ptr, scale_b_ptr, bias_ptr, c, M, N, K, stride_sa, stride_sb, stride_bias,
    EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """One program computes the tiles p, p + P, p + 2P ... of C. It is program p of P programs.

    a, b and c are descriptors of A [M, K], of B^T [N, K] and of C.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    sum_dtype: tl.constexpr = tl.int32 if a.dtype == tl.int8 else tl.float32

    for pid in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        first_m = pid // (GROUP_M * blocks_n) * GROUP_M
        rows = tl.minimum(blocks_m - first_m, GROUP_M)
        m = (first_m + pid % (GROUP_M * blocks_n) % rows) * BLOCK_M
        n = pid % (GROUP_M * blocks_n) // rows * BLOCK_N

        acc = tl.full((BLOCK_M, BLOCK_N), 0, sum_dtype)
        for k in range(0, K, BLOCK_K):  # past the end of K, TMA gives zeros
            a_tile = a.load([m, k])  # [BLOCK_M, BLOCK_K]
            b_tile = b.load([n, k]).T  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee", out_dtype=sum_dtype)

        offs_m = m + tl.arange(0, BLOCK_M)
        offs_n = n + tl.arange(0, BLOCK_N // SUBTILES)
        if SUBTILES == 1:
            out = _finished(
                acc, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, stride_sa, stride_sb,
                stride_bias, EACH_ROW, EACH_COLUMN, HAS_BIAS, ACTIVATION,
            )  # fmt: skip
            c.store([m, n], out.to(c.dtype))  # TMA writes nothing past the border
        else:  # store the left half, then the right half
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
            half: tl.constexpr = BLOCK_N // 2
            out = _finished(
                left, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, stride_sa,
                stride_sb, stride_bias, EACH_ROW, EACH_COLUMN, HAS_BIAS, ACTIVATION,
            )  # fmt: skip
            c.store([m, n], out.to(c.dtype))
            out = _finished(
                right, offs_m, offs_n + half, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, stride_sa,
                stride_sb, stride_bias, EACH_ROW, EACH_COLUMN, HAS_BIAS, ACTIVATION,
            )  # fmt: skip
            c.store([m, n + half], out.to(c.dtype))


# --- Which kernel, which tile ---------------------------------------------------------------------


def _operands(a, b, dtype):
    """Return `tma_rows` of A and of B, or None if this kernel cannot take both."""
    # TMA stores C, so rows of C, too, must begin at multiples of 16 bytes.
    if not (a.numel() and b.numel()) or b.shape[1] * dtype.itemsize % 16:
        return None
    rows_a, rows_b = tma_rows(a, 1), tma_rows(b, 1)
    if rows_a is None or rows_b is None or rows_a[1] or not rows_b[1]:
        return None
    return rows_a, rows_b


@functools.lru_cache(maxsize=4096)
def fast_tile(M: int, N: int, K: int, kind: str, kernel: str, device: Device) -> dict | None:
    """Return the tile of a kernel that the model finds fastest; None if it knows no such device."""
    moved = M * K + K * N + 2 * M * N

    def work(tile):
        if tile.get("kernel", "pointer") == kernel:
            tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
            yield tile, Work(tiles, cdiv(K, tile["BLOCK_K"]), M * N, moved), 1

    return fastest_tile(device, "scaled_matmul", kind, work, "nt")


def _scaled_matmul_tma(operands, scales, strides, bias, c, ends, tile):
    """Launch the kernel that loads by TMA."""
    (a, _, a_shape, stride_a), (b, _, b_shape, stride_b) = operands
    (M, N), K = c.shape, a_shape[1]
    tile = tile.copy()
    del tile["kernel"]
    if c.dtype == torch.float32:  # the result needs twice the shared memory: use one stage less
        tile |= dict(SUBTILES=2, num_stages=min(tile["num_stages"], 3))
    m, n, k = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    programs = persistent(tile, cdiv(M, m) * cdiv(N, n), device_of(c).sms)
    del tile["PROGRAMS_PER_SM"]
    launch(
        scaled_matmul_tma_kernel, (programs,),
        descriptor(a, a_shape, (stride_a, 1), [m, k]),
        descriptor(b, b_shape, (stride_b, 1), [n, k]),
        *scales, bias, descriptor(c, c.shape, (N, 1), [m, n // tile["SUBTILES"]]), M, N, K,
        *strides, **ends, **tile,
    )  # fmt: skip


@torch.library.custom_op("tilelab::scaled_matmul", mutates_args=())
def _scaled_matmul(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    bias: torch.Tensor | None, activation: str | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    (M, K), N = a.shape, b.shape[1]
    device, default, kernels = device_of(a), DEFAULT, ("pointer",)
    if a.dtype == torch.float8_e4m3fn and device.capability < 89:
        raise TypeError(
            "a must be int8 on this GPU: float8_e4m3fn is what NVIDIA's have since sm_89 (Ada)"
        )
    c = torch.empty(M, N, dtype=dtype, device=a.device)
    operands = _operands(a, b, dtype) if len(device.kernels) > 1 else None
    if operands is not None:
        kernels = ("pointer", "tma")
    if (a.stride(1), b.stride(0)) == (1, 1):  # along K; others are turned on their way
        kind = kind_of(a.dtype, "")
        if M and N and K and (tile := fast_tile(M, N, K, kind, kernels[-1], device)):
            default = {1: tile}
    elif device.capability == 90 and a.dtype == torch.int8:
        default = TURNED_DEFAULT
    # A tensor-core instruction takes at least 32 bytes along K, so BLOCK_K is at least 32.
    tile = choose_tile("scaled_matmul", a, default, kernels, M=M, N=N, K=max(K, 32))
    scales = scale_a, scale_b
    strides = (
        scale_a.stride(0) if scale_a.dim() else 0,
        scale_b.stride(-1) if scale_b.dim() else 0,
        0 if bias is None else bias.stride(0),
    )
    ends = dict(
        EACH_ROW=scale_a.dim() > 0, EACH_COLUMN=scale_b.dim() > 0, HAS_BIAS=bias is not None,
        ACTIVATION=activation,
    )  # fmt: skip
    if "kernel" in tile:
        _scaled_matmul_tma(operands, scales, strides, bias, c, ends, tile)
        return c
    launch(
        scaled_matmul_kernel, (cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]),),
        a, b, *scales, bias, c, M, N, K, *a.stride(), *b.stride(), *strides, c.stride(0), **ends,
        EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
    )  # fmt: skip
    return c


@_scaled_matmul.register_fake
def _(a, b, scale_a, scale_b, bias, activation, dtype):
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def scaled_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Compute `act((a @ b) * scale_a * scale_b + bias)` for 8-bit a and b. It has no gradient.

    Args:
        a: [M, K]; float8_e4m3fn or int8; any strides.
        b: [K, N], of a's dtype; any strides. The fast kernel takes an a with contiguous rows, and
            a b with contiguous columns (the transpose of a row-major [N, K]).
        scale_a: float32; [] is one scale for a, [M] or [M, 1] is one for each of its rows.
        scale_b: float32; [] is one scale for b, [N] or [1, N] is one for each of its columns.
        bias: [N], of the result's dtype, or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        dtype: the result's: bfloat16, float16 or float32.

    Returns:
        [M, N] of `dtype`, row-major. int8 products are added exactly, float8_e4m3fn products with
        the error that this file derives ("How exact the sums are").

    Raises:
        TypeError: a dtype or a device is not supported, or does not fit those of the others.
        ValueError: the shapes do not fit, the activation is unknown, or a tensor requires grad
            (unless under `torch.no_grad()`).

    Source: torch._scaled_mm and torch.nn.functional.scaled_mm.

    Example:
        >>> a, b = (torch.tensor(x, dtype=torch.int8) for x in ([[100, -50]], [[3], [4]]))
        >>> scaled_matmul(a, b, torch.tensor(0.5), torch.tensor([0.25]))
        tensor([[12.5000]], dtype=torch.bfloat16)
    """
    check_tensors(a=a, b=b, dtypes=EIGHT_BIT)
    check_shape("a", a, "[M, K]", M=None, K=None)
    check_shape("b", b, "[K, N]", K=a.shape[1], N=None)
    check_tensors(scale_a=scale_a, scale_b=scale_b, dtypes=(torch.float32,))
    check_device("scale_a", scale_a, "a", a)
    if scale_a.dim():
        column = dict(one=1) if scale_a.dim() == 2 else {}
        check_shape("scale_a", scale_a, "[], [M] or [M, 1]", M=a.shape[0], **column)
    if scale_b.dim():
        row = dict(one=1) if scale_b.dim() == 2 else {}
        check_shape("scale_b", scale_b, "[], [N] or [1, N]", **row, N=b.shape[1])
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if bias is not None:
        check_tensors(bias=bias, dtypes=(dtype,))
        check_device("bias", bias, "a", a)
        check_shape("bias", bias, "[N]", N=b.shape[1])
    check_activation(activation)
    if torch.is_grad_enabled():
        for name, x in dict(a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias).items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name} requires grad, and scaled_matmul has no gradient: detach it, or call "
                    "within torch.no_grad()"
                )
    return _scaled_matmul(a, b, scale_a, scale_b, bias, activation, dtype)
