"""The matmul for Hopper (sm_90) and later: tiles that the tensor memory accelerator (TMA) fetches.

On an H200 a step of 64 of a 128x256 tile takes the tensor cores 1,024 clocks. Whatever else the SM
does must fit beside that, or it is time lost. `matmul_kernel` becomes this one a change at a time.
Each rung is a tile of the kernel below: `tilelab sweep matmul` times it.

    matmul_kernel, 128x256x64   every thread computes addresses, and copies 16 bytes at a time
    + TMA                       one thread asks for a whole tile [128, 64]: the unit makes the
      PROGRAMS_PER_SM=0         addresses, fills zeros past the border (so no masks, no EVEN_K),
                                and signals a barrier. A descriptor tells it the matrix; the
                                result is stored likewise
    + persistent                as many programs as the GPU has SMs go through the tiles in turns:
      PROGRAMS_PER_SM=1         nothing is started anew for a tile but its loads. With two an SM,
                                of smaller tiles, one multiplies while one stores
    + subtiles                  the result leaves through shared memory, 64 KiB for 128x256 in
      SUBTILES=2                16-bit. In two halves it needs 32, and a fourth stage takes the
                                rest: loads may be three steps ahead of the tensor cores
    + warp specialisation       four warps only load, and are already at the next tile while the
      kernel="tma_ws"           last one is stored; two groups of four only multiply, 64 rows each,
                                with the registers of those that load
    + split-K                   where C has fewer tiles than the GPU has SMs: the sum along K is
      SPLIT_K > 1               shared out, and a second kernel adds the parts up in order

What triton 3.6.0 and 3.9.0 make of them, bfloat16 with bias and ReLU, for sm_90; not run:

                              registers    shared memory    instructions a step    warps
    matmul_kernel             237, 207     144 KiB          98, 103                8
    TMA, persistent or not    206, 162     208 KiB          91, 91                 8
    + subtiles, 4 stages      209, 176     224 KiB          90, 89                 8
    + warp specialisation     168, 168     208 KiB          64, 65                 8 + 4 that load

The operands need rows that TMA can read (`tma_operands`): contiguous, at multiples of 16 bytes.

Read first: matmul.py. Sources: persistent programs and epilogue subtiles are those of Triton's
tutorial 09; split-K and why a grid should be whole waves: Osama et al., Stream-K (2023).
"""

import functools

import torch
import triton
import triton.language as tl

from tilelab.kernels._cost_model import busiest_sm
from tilelab.kernels._launch import descriptor, device_of, launch, tma_rows
from tilelab.kernels._partial_sums import reduce_parts
from tilelab.kernels._tiles import cdiv, persistent, tma_tile
from tilelab.kernels.activation import activate

_fast = functools.partial(tma_tile, per_sm=1, GROUP_M=8, SUBTILES=1, SPLIT_K=1)

# By bytes an element. Compiled for sm_90 with triton 3.6.0 and 3.9.0, 16-bit operands in all four
# layouts: no spills, wgmma from shared memory as wide as the tile, at most 100 instructions a step.
FAST_TILES = {
    2: [
        # the most reuse that the registers hold; half the tile at a time through the epilogue
        # leaves room for a fourth stage
        _fast(m=128, n=256, k=64, warps=8, stages=4, SUBTILES=2),
        _fast(m=128, n=256, k=64, warps=8, stages=3),  # the same with the whole tile at once
        _fast(
            m=128, n=256, k=64, warps=4, stages=3, kernel="tma_ws"
        ),  # four warps load, two groups of four multiply
        # two programs an SM: one multiplies while the other stores
        _fast(m=128, n=128, k=64, warps=8, stages=3, SUBTILES=2, per_sm=2),
        _fast(m=128, n=128, k=128, warps=4, stages=3, kernel="tma_ws"),  # fewer, longer steps
        # small grids: four times the tiles, and two programs an SM; with split-K even more
        _fast(m=64, n=128, k=64, warps=4, stages=4, SUBTILES=2, per_sm=2),
        _fast(
            m=64, n=256, k=64, warps=4, stages=3, SUBTILES=2
        ),  # few rows: the columns stream through
    ],
    4: [  # TF32, both operands contiguous along K; a step of 32 is as many bytes
        _fast(m=128, n=256, k=32, warps=8, stages=3, SUBTILES=2),
        _fast(m=128, n=128, k=32, warps=8, stages=3),
        _fast(m=64, n=128, k=32, warps=4, stages=4, SUBTILES=2, per_sm=2),
    ],
}


# The model of perf/compiler/prediction.py predicts the same time for all rungs at 8192, that of the
# tensor cores: it knows nothing of latency, and latency is what each rung hides.
#
# What is missing against cuBLAS: clusters. Two SMs at one block column could read B once between
# them, by multicast, and ask a third less of the L2 cache, which at 700 TFLOP/s hands out 8 TB/s.
# Triton does not multicast: with num_ctas=2 each SM loads all that it needs (3.6.0, 3.9.0).


@triton.jit
def _store_tile(
    c, acc, row, col, bias_ptr, stride_bias, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """The epilogue: store act(acc + bias) at (row, col) of c, which clips it at the border."""
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
    """One program computes every tile of C = act(A @ B + bias) whose number is its own, modulo.

    a, b and c are descriptors; A_T and B_T say that a and b are of A^T and B^T. With SPLIT_K > 1, c
    is of partial sums: [SPLIT_K * M, N] with M rounded up to whole tiles.
    """
    if WARP_SPECIALIZE:
        # The compiler splits the tiles among the warpgroups, and for that needs descriptors that
        # the program makes itself, of pointers and strides. It takes a few microseconds a program.
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
    steps = tl.cdiv(K, SPLIT_K * BLOCK_K)  # along one part of K

    for work in tl.range(
        tl.program_id(0), blocks_m * blocks_n * SPLIT_K, tl.num_programs(0),
        warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        # Which tile, in the grouped order; and which part of its sum.
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
            k = step * BLOCK_K  # past the end of K there are zeros
            # A transposed tile stays as it lies in shared memory: tensor cores read both orders.
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
        else:  # the left half, then the right one
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
            half: tl.constexpr = BLOCK_N // 2
            _store_tile(c_desc, left, row, n, bias_ptr, stride_bias, N, HAS_BIAS, ACTIVATION)
            _store_tile(
                c_desc, right, row, n + half, bias_ptr, stride_bias, N, HAS_BIAS, ACTIVATION
            )


# --- Which operands, which tile -------------------------------------------------------------------


def tma_operands(a, b, precision):
    """The rows of A and of B, as `tma_rows` has them, where the fast kernel can take both."""
    item, (M, K), N = a.element_size(), a.shape, b.shape[1]
    if not (M and N and K) or N * item % 16:  # C has rows, too
        return None
    if max(M, N, K) > 2**30:  # the unit's coordinates are of 32 bits
        return None
    rows_a, rows_b = tma_rows(a, item), tma_rows(b, item)
    if rows_a is None or rows_b is None:
        return None
    if item == 4 and (precision != "tf32" or rows_a[1] or not rows_b[1]):
        return None  # 32-bit tiles cannot be transposed on the way to the tensor cores
    return rows_a, rows_b


@functools.lru_cache(maxsize=4096)
def fast_tile(M: int, N: int, K: int, item: int, sms: int) -> dict:
    """Of FAST_TILES the one, and the parts of K, with which the busiest SM should be done first."""

    def clocks(tile: dict) -> float:
        tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
        return busiest_sm(tile, tiles, cdiv(K, tile["BLOCK_K"]), M * N, item, sms)

    tiles = [
        tile | dict(SPLIT_K=parts)
        for tile in FAST_TILES[item]
        if tile["kernel"] == "tma"  # warp specialisation, when a GPU has shown that it pays
        for parts in (1, 2, 4, 8, 16, 32, 64, 128)
        # Parts have four steps at least, and their float32 tiles fit into shared memory.
        if parts == 1
        or (parts * 4 * tile["BLOCK_K"] <= K and tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128)
    ]
    return min(tiles, key=clocks)


def matmul_tma(operands, bias, activation, c, tile, precision):
    """Launch the fast kernel, and where K is in parts the one that adds the parts up."""
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
    ends = dict(HAS_BIAS=bias is not None, ACTIVATION=activation)
    if parts > 1:  # what follows the whole sum
        ends = dict(HAS_BIAS=False, ACTIVATION=None)
    launch(
        matmul_tma_kernel, (programs,), a_arg, b_arg, bias, out_arg, M, N, K,
        stride_a, stride_b, stride_bias, N, A_T=a_t, B_T=b_t,
        **ends, PRECISION=precision,
        WARP_SPECIALIZE=specialize, **tile,
    )  # fmt: skip
    if parts > 1:
        reduce_parts(out, bias, activation, c, M, N, rows, parts)
