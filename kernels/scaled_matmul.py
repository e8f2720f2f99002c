"""Matrix multiplication of 8-bit operands with scales, as networks run it at inference; forward.

    C = act((A @ B) * scale_a * scale_b + bias)        A [M, K], B [K, N] of 8 bits; C of 16 or 32

A network's weights and activations fit 8 bits if each tensor, row or column is first divided by a
scale that makes its largest value 448 (float8_e4m3fn) or 127 (int8). A row of A and a column of B
meet in every product of one element of C, so their scales leave the sum and are multiplied once:

          K            N                          N
       +-----+      +--+--+                    +--+--+
     M |==>  |  x   |  v  |   * scale_a [M]  = |  #  |     one program: tiles of BLOCK_M x BLOCK_N
       +-----+      +--+--+   * scale_b [N]    +--+--+

What it brings: half the bytes of 16-bit operands, MK + KN and 2MN for the result, and tensor cores
twice as fast. A square of side n in 16-bit does n/3 FLOPs a byte, here n/2; and an H200 does 412
FLOPs in the time of one byte, so from n ~ 800 on the tensor cores are the limit. With few rows, as
when a language model writes token by token, it is the weights' way through the memory, and 8 bits
halve that.

How exact it is. int8 products are summed in int32, exactly, up to K = 131,071 (then 128 * 128 * K
reaches 2^31), and the sum is rounded to float32 once. A product of two float8_e4m3fn is exact in
float32, but Hopper's tensor cores do not add in full float32: they align 32 products and the sum so
far to the largest of these, and keep about 14 bits (as DeepSeek-V3 reports, 2024, with errors up to
2% at K = 4096; not measured here). So a product loses up to 2^-13 of the partial sum. Of random
signs that makes some 2^-13 sqrt(K) of the largest result (tests/tools/tolerance.py allows twice
that); of one sign it adds up, to 2^-13 K at worst. cuBLAS sums like this where torch._scaled_mm is
asked for use_fast_accum=True. The cure, to move the sum to a second accumulator every 128 products
(`max_num_imprecise_acc=128`), costs registers: compiled for sm_90 it spills at 128x256, and at
128x128 takes 150 instructions a step instead of 90. So it is not used. In Triton's interpreter the
sum is float32.

What has them: int8 every GPU since sm_80, gfx942 among them; float8_e4m3fn NVIDIA's since sm_89
(gfx942 has another format of 8 bits). There is no gradient: 8 bits are for inference.

Read first: matmul.py, of whose two kernels these are copies. Sources: torch._scaled_mm and
torch.nn.functional.scaled_mm, cuBLASLt's scales for a tensor and for each row and column
(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F); the formats: Micikevicius et al., FP8 Formats for Deep
Learning (2022); LLM.int8(): Dettmers et al. (2022).
"""

import functools

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import DTYPES, check_device, check_shape, check_tensors
from tilelab.kernels._cost_model import FLOPS_16, L2_BYTES, TILE_CLOCKS
from tilelab.kernels._launch import descriptor, device_of, launch, tma_rows
from tilelab.kernels._tiles import cdiv, choose_tile, persistent, tma_tile
from tilelab.kernels.activation import activate, activated, check_activation

EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)


def reference(a, b, scale_a, scale_b, bias=None, activation=None):
    """The same in plain torch, for any dtype that a and b have been converted to."""
    c = (a @ b) * scale_a.reshape(-1, 1) * scale_b
    return activated(c if bias is None else c + bias, activation)


TILES = [
    # the default: both operands of three stages in 48 KiB, so it runs on every GPU since 2020
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
    # large squares on Hopper: the most reuse that fits the registers
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, GROUP_M=8, num_warps=8, num_stages=3),
    # deep K: fewer, longer steps hide the latency of loads behind more tensor-core work
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, num_warps=8, num_stages=3),
    # small grids: four times the programs, for when 128x128 tiles leave SMs idle
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=4),
    # a token at a time: few rows, and the weights' columns stream through
    dict(BLOCK_M=16, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, num_warps=4, num_stages=4),
]
DEFAULT = {1: TILES[0]}

_fast = functools.partial(tma_tile, GROUP_M=8)

# By bytes an element. Compiled for sm_90, both dtypes, with triton 3.6.0 and 3.9.0 (not run): no
# spills, both operands from shared memory, wgmma as wide as the tile in float8 and 64x128 in int8,
# at most 94 instructions a step (int8 at 128x256, with twice as many wgmma, 101 to 105).
FAST_TILES = {
    1: [
        # the most reuse that the registers hold; in halves through the epilogue, for a fourth stage
        _fast(m=128, n=256, k=128, warps=8, stages=4, SUBTILES=2, per_sm=1),
        _fast(
            m=128, n=256, k=128, warps=8, stages=3, SUBTILES=1, per_sm=1
        ),  # the same with the whole tile at once
        _fast(m=128, n=128, k=128, warps=8, stages=4, SUBTILES=1, per_sm=1),  # more tiles
        # two programs an SM: one multiplies while the other stores
        _fast(m=128, n=128, k=128, warps=8, stages=3, SUBTILES=2, per_sm=2),
        _fast(
            m=64, n=128, k=128, warps=4, stages=4, SUBTILES=1, per_sm=2
        ),  # small grids: four times the tiles
    ],
}


@triton.jit
def _finished(
    acc, offs_m, offs_n, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, stride_sa, stride_sb,
    stride_bias, EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue of both kernels: act(acc * scale_a * scale_b + bias) in float32."""
    out = acc.to(tl.float32)  # int32 sums are rounded here, once
    mask_n = offs_n < N
    if EACH_ROW:
        row_ptrs = scale_a_ptr + offs_m.to(tl.int64) * stride_sa
        out *= tl.load(row_ptrs, mask=offs_m < M, other=0.0)[:, None]
    else:  # one for the whole tensor
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

    As in matmul.py, but for the dtype of the sum and for the scales.
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
    # Past the border rows and columns wrap around: what they read is never stored.
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
        else:
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
# What matmul.py's fast kernel gains, this one gains: TMA, persistent programs, a halved epilogue.
# Two things differ. wgmma reads 16-bit operands from shared memory in either order, but 8-bit ones
# only as they lie along K: so this kernel takes a row-major A and a B whose columns are contiguous,
# which a weight [N, K] is, seen as [K, N]. (torch._scaled_mm takes nothing else.) And a step of the
# same bytes is twice the products in the same clocks: a tile is through K in half the time, and its
# epilogue weighs twice.


@triton.jit
def scaled_matmul_tma_kernel(
    a, b, scale_a_ptr, scale_b_ptr, bias_ptr, c, M, N, K, stride_sa, stride_sb, stride_bias,
    EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """One program computes every tile of C whose number is its own, modulo.

    a, b and c are descriptors: of A [M, K], of B^T [N, K], and of C.
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
        for k in range(0, K, BLOCK_K):  # past the end of K there are zeros
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
            c.store([m, n], out.to(c.dtype))  # the border clips it
        else:  # the left half, then the right one
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
    """The rows of A and of B^T, as `tma_rows` has them, where TMA can read both."""
    if not (a.numel() and b.numel()) or b.shape[1] * dtype.itemsize % 16:  # C has rows, too
        return None
    rows_a, rows_b = tma_rows(a, 1), tma_rows(b, 1)
    if rows_a is None or rows_b is None or rows_a[1] or not rows_b[1]:
        return None
    return rows_a, rows_b


@functools.lru_cache(maxsize=4096)
def fast_tile(M: int, N: int, K: int, sms: int) -> dict:
    """Of FAST_TILES the one whose busiest SM should be done first.

    By the clocks of matmul's `fast_tile`: in 8 bits a step takes half of those in 16.
    """

    def clocks(tile: dict) -> float:
        m, n, k = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        step = max(m * n * k / FLOPS_16, (m + n) * k / L2_BYTES)
        turns = cdiv(cdiv(M, m) * cdiv(N, n), sms)
        return turns * (cdiv(K, k) * step + TILE_CLOCKS / tile["PROGRAMS_PER_SM"])

    return min(FAST_TILES[1], key=clocks)


def _scaled_matmul_tma(operands, scales, strides, bias, c, ends, tile):
    """Launch the fast kernel."""
    (a, _, a_shape, stride_a), (b, _, b_shape, stride_b) = operands
    (M, N), K = c.shape, a_shape[1]
    tile = tile.copy()
    del tile["kernel"]
    if c.dtype == torch.float32:  # twice the shared memory for the result: a stage makes room
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
        if device.modelled:
            default = {1: fast_tile(M, N, K, device.sms)}
    # Tensor cores take 32 bytes along K at least.
    tile = choose_tile("scaled_matmul", a.dtype, default, kernels, M=M, N=N, K=max(K, 32))
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
    """Compute `act((a @ b) * scale_a * scale_b + bias)` of 8-bit a and b; it has no gradient.

    Args:
        a: [M, K]; float8_e4m3fn or int8; any strides.
        b: [K, N], of a's dtype; any strides. Fast are a with contiguous rows and b with contiguous
            columns: the transpose of a row-major [N, K].
        scale_a: float32; [] for all of a, or [M] or [M, 1] for each of its rows.
        scale_b: float32; [] for all of b, or [N] or [1, N] for each of its columns.
        bias: [N], of the result's dtype, or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [M, N] of `dtype`, row-major. int8 is summed exactly; how float8_e4m3fn is, the head of this
        file says.

    Raises:
        TypeError: a dtype or device that is not supported, or that does not fit the others'.
        ValueError: shapes that do not fit, an unknown activation, or a tensor that requires grad
            (other than under `torch.no_grad()`).

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
