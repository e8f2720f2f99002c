"""The matmul for Hopper (sm_90) and later GPUs: C = act(A @ B + bias), with tiles loaded by TMA.

Equations, gradients and FLOPs are those of matmul.py, which calls this kernel. TMA (the tensor
memory accelerator) is a unit of each SM that copies a whole tile between global memory and shared
memory, when one thread asks for it. A descriptor tells it where the matrix lies in memory.

    A [M, K]      shared memory         registers
    +-----+       +--+ +--+ +--+                       +--+--+
    |==>  |  TMA  |A0| |A1| |A2|  ...   tensor    acc  |  |  |  TMA   C [M, N]
    +-----+  -->  |B0| |B1| |B2|   -->  cores     -->  |  #  |  -->   tile # of this program,
    B [K, N]      +--+ +--+ +--+                       +--+--+        then its next tile
                  one stage per step

What limits it: the tensor cores, for large matrices. In a step of 64 along K, a 128x256 tile is
2 * 128 * 256 * 64 FLOPs. An SM does 4,096 per clock, so a step takes 1,024 clocks. Any other work
of the SM must fit into these clocks, or it costs time.

The kernel has five changes against `matmul_kernel`. `tilelab sweep matmul` times all of them:

    TMA                  No thread computes addresses or copies data. The unit fills in zeros past
    PROGRAMS_PER_SM=0    the border, so loads need no masks. It also stores the result.
    persistent           There are only as many programs as run at once. Each goes through several
    PROGRAMS_PER_SM=1    tiles in turn, so a new tile needs no new program. With two programs on an
                         SM and smaller tiles, one can multiply while the other stores.
    subtiles             The result goes to memory in two halves through shared memory. It then
    SUBTILES=2           needs 32 KiB there instead of 64, so a fourth stage fits.
    warp specialisation  Four warps only load, and two groups of four warps only multiply. Loads
    kernel="tma_ws"      of the next tile run while this one is stored.
    split-K              If C has fewer tiles than the GPU has SMs, the sum along K is divided into
    SPLIT_K > 1          parts for more programs. A second kernel adds the parts up, in order.

Read first: matmul.py. Sources: Triton's tutorial 09 for persistent programs and subtiles; Osama et
al., Stream-K (2023), for split-K, and for why a grid should be whole waves.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from tilelab.kernels._launch import descriptor, device_of, launch, tma_rows
from tilelab.kernels._partial_sums import first_pass, reduce_parts
from tilelab.kernels._tiles import cdiv, persistent, tma_tile
from tilelab.kernels.activation import activate

# This table was compiled for sm_90, not run. Its tiles are 128x256x64 in bfloat16, with bias and
# ReLU; A and B are row-major. Two numbers in a cell are for triton 3.6.0 and 3.9.0:
#
#                            registers     shared memory    instructions    warps
#                            per thread    per program      per step
#    matmul_kernel           175, 179      144 KiB          98, 103         8
#    TMA, persistent or not  160, 166      208 KiB          91, 91          8
#    + subtiles, 4 stages    183, 169      224 KiB          90, 89          8
#    + warp specialisation   168, 168      208, 209 KiB     64, 65          8, and 4 that load
#
# perf/compiler/prediction.py predicts the same time for all of them at M = N = K = 8192: the time
# of the tensor cores. The prediction has no latency in it, and latency is what each change hides.
#
# cuBLAS also uses clusters, which this kernel does not have. A cluster is two or more SMs that work
# together. Two SMs with the same block column could load B once for both (multicast). For a step
# of 4.2 million FLOPs, a 128x256 tile reads (128 + 256) * 64 * 2 bytes: at 700 TFLOP/s the L2 cache
# must deliver 8 TB/s. With multicast an SM reads half of B: 128 + 128 rows and columns instead of
# 384, a third less. Triton 3.6.0 and 3.9.0 do not multicast: with num_ctas=2, each SM loads all
# that it needs.

_fast = functools.partial(tma_tile, per_sm=1, GROUP_M=8, SUBTILES=1, SPLIT_K=1)

# The tiles, by bytes per element. They were compiled for sm_90 with triton 3.6.0 and 3.9.0, in
# 16-bit with all four layouts of A and B. No tile spills with ReLU: every value fits into the
# registers. With GELU or SiLU, a 128x256 tile with SUBTILES=1 may spill up to 24 bytes per thread,
# outside of the loop. Each wgmma (Hopper's tensor-core instruction) reads both operands from shared
# memory and is as wide as the tile. A step has at most 100 instructions.
# tests/tools/compile_bars.py tests all this.
FAST_TILES = {
    2: [
        # This is the most reuse that the registers allow. In halves, the epilogue leaves room in
        # shared memory for a fourth stage.
        _fast(m=128, n=256, k=64, warps=8, stages=4, SUBTILES=2),
        # The same with the whole tile in the epilogue at once.
        _fast(m=128, n=256, k=64, warps=8, stages=3),
        # Four warps load, and two groups of four warps multiply.
        _fast(m=128, n=256, k=64, warps=4, stages=3, kernel="tma_ws"),
        # Two programs share an SM: one multiplies while the other stores.
        _fast(m=128, n=128, k=64, warps=8, stages=3, SUBTILES=2, per_sm=2),
        # Warp specialisation with fewer, longer steps.
        _fast(m=128, n=128, k=128, warps=4, stages=3, kernel="tma_ws"),
        # Small C: there are four times as many tiles as with 128x256, and two programs per SM.
        # Split-K gives even more.
        _fast(m=64, n=128, k=64, warps=4, stages=4, SUBTILES=2, per_sm=2),
        # Few rows: the columns stream through.
        _fast(m=64, n=256, k=64, warps=4, stages=3, SUBTILES=2),
    ],
    # TF32. Both operands must be contiguous along K. A step of 32 is as many bytes as 64 in 16-bit.
    4: [
        _fast(m=128, n=256, k=32, warps=8, stages=3, SUBTILES=2),
        _fast(m=128, n=128, k=32, warps=8, stages=3),
        _fast(m=64, n=128, k=32, warps=4, stages=4, SUBTILES=2, per_sm=2),
    ],
}


@triton.jit
def _store_tile(
    c, acc, row, col, bias_ptr, stride_bias, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Store act(acc + bias) at (row, col) of c. TMA writes nothing past the border."""
    if HAS_BIAS:
        offs_n = col.to(tl.int64) + tl.arange(0, acc.shape[1])
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    c.store([row, col], acc.to(c.dtype))


@triton.jit
def matmul_tma_kernel(
    a, b, bias_ptr, c, M, N, K, stride_a, stride_b, stride_bias, stride_c,
    A_T: tl.constexpr, B_T: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, SPLIT_K: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program computes the tiles p, p + P, p + 2P ... of C. It is program p of P programs.

    a, b and c are descriptors. With A_T, a describes A^T; with B_T, b describes B^T. With
    SPLIT_K > 1, c is [SPLIT_K * M, N] of partial sums, with M rounded up to whole tiles.
    """
    if WARP_SPECIALIZE:
        # a, b and c are pointers here. The compiler divides the tiles among groups of four warps,
        # and it can do so only with descriptors that the program makes itself. This costs each
        # program a few microseconds.
        if A_T:
            a_desc = tl.make_tensor_descriptor(a, [K, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
        else:
            a_desc = tl.make_tensor_descriptor(a, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        if B_T:
            b_desc = tl.make_tensor_descriptor(b, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
        else:
            b_desc = tl.make_tensor_descriptor(b, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
        c_desc = tl.make_tensor_descriptor(c, [M, N], [stride_c, 1], [BLOCK_M, BLOCK_N // SUBTILES])
    else:
        a_desc, b_desc, c_desc = a, b, c
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, SPLIT_K * BLOCK_K)  # in one part of K

    for work in tl.range(
        tl.program_id(0), blocks_m * blocks_n * SPLIT_K, tl.num_programs(0),
        warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        # Find the tile, in the order of matmul.py, and the part of its sum.
        pid, part = work, 0
        if SPLIT_K > 1:
            pid = work % (blocks_m * blocks_n)
            part = work // (blocks_m * blocks_n)
        first_m = pid // (GROUP_M * blocks_n) * GROUP_M
        rows = tl.minimum(blocks_m - first_m, GROUP_M)
        m = (first_m + pid % (GROUP_M * blocks_n) % rows) * BLOCK_M
        n = pid % (GROUP_M * blocks_n) // rows * BLOCK_N

        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for step in range(part * steps, part * steps + steps):
            k = step * BLOCK_K  # past the end of K, TMA gives zeros
            # .T moves no data: tensor cores read 16-bit tiles in shared memory in both orders.
            if A_T:
                a_tile = a_desc.load([k, m]).T  # [BLOCK_M, BLOCK_K]
            else:
                a_tile = a_desc.load([m, k])
            if B_T:
                b_tile = b_desc.load([n, k]).T  # [BLOCK_K, BLOCK_N]
            else:
                b_tile = b_desc.load([k, n])
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)

        row = part * blocks_m * BLOCK_M + m
        if SUBTILES == 1:
            _store_tile(c_desc, acc, row, n, bias_ptr, stride_bias, N, HAS_BIAS, ACTIVATION)
        else:  # store the left half, then the right half
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
            half: tl.constexpr = BLOCK_N // 2
            _store_tile(c_desc, left, row, n, bias_ptr, stride_bias, N, HAS_BIAS, ACTIVATION)
            _store_tile(
                c_desc, right, row, n + half, bias_ptr, stride_bias, N, HAS_BIAS, ACTIVATION
            )


# --- Which operands, which tile -------------------------------------------------------------------


def tma_operands(a, b, precision):
    """Return `tma_rows` of A and of B, or None if this kernel cannot take both."""
    item, (M, K), N = a.element_size(), a.shape, b.shape[1]
    if not (M and N and K) or N * item % 16:  # rows of C, too, must begin at multiples of 16 bytes
        return None
    if max(M, N, K) > 2**30:  # TMA's coordinates have 32 bits
        return None
    rows_a, rows_b = tma_rows(a, item), tma_rows(b, item)
    if rows_a is None or rows_b is None:
        return None
    if item == 4 and (precision != "tf32" or rows_a[1] or not rows_b[1]):
        return None  # tensor cores read 32-bit tiles only if they are contiguous along K
    return rows_a, rows_b


def split_tiles(tile: dict, M: int, N: int, K: int) -> Iterator[tuple[dict, int, int]]:
    """Yield a tile of FAST_TILES with each number of parts that K can have.

    Yields (tile, parts, tiles of the result).
    """
    m, n, k = (tile[f"BLOCK_{x}"] for x in "MNK")
    for parts in (1, 2, 4, 8, 16, 32, 64, 128):
        # Each part has at least four steps, and its tile in float32 fits into shared memory.
        if parts == 1 or (parts * 4 * k <= K and m * n <= 128 * 128):
            yield tile | dict(SPLIT_K=parts), parts, cdiv(M, m) * cdiv(N, n)


def matmul_tma(operands, bias, activation, c, tile, precision):
    """Launch this kernel and, if K is in parts, the second kernel that adds the parts up."""
    (a, a_t, a_shape, stride_a), (b, b_t, b_shape, stride_b) = operands
    (M, N), K = c.shape, a_shape[0 if a_t else 1]
    tile = tile.copy()
    specialize = tile.pop("kernel") == "tma_ws"
    m, n, k, parts = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    programs = persistent(tile, cdiv(M, m) * cdiv(N, n) * parts, device_of(c).sms)
    del tile["PROGRAMS_PER_SM"]
    rows = cdiv(M, m) * m
    out = c
    if parts > 1:
        out = torch.empty(parts * rows, N, dtype=torch.float32, device=c.device)
    matrices = a, b, out
    if not specialize:
        matrices = (
            descriptor(a, a_shape, (stride_a, 1), [k, m] if a_t else [m, k]),
            descriptor(b, b_shape, (stride_b, 1), [n, k] if b_t else [k, n]),
            descriptor(out, out.shape, (N, 1), [m, n // tile["SUBTILES"]]),
        )
    a_arg, b_arg, out_arg = matrices
    stride_bias = 0 if bias is None else bias.stride(0)
    launch(
        matmul_tma_kernel, (programs,), a_arg, b_arg, bias, out_arg, M, N, K,
        stride_a, stride_b, stride_bias, N, A_T=a_t, B_T=b_t,
        **first_pass(bias, activation, parts), PRECISION=precision,
        WARP_SPECIALIZE=specialize, **tile,
    )  # fmt: skip
    if parts > 1:
        reduce_parts(out, bias, activation, c, M, N, rows, parts)
