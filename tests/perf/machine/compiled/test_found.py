"""What the machine found in kernels, each in its smallest form: docs/verification.md tells of it.

Where a test says that Triton still has a fault, and one day it has not, the way round it can go.
"""

import pytest
import torch
import triton
import triton.language as tl

from tilelab.perf import machine

TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])


@triton.jit
def product_and_sums(
    a_ptr, b_ptr, c_ptr, s_ptr, K, THROUGH_REGISTERS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes c = a b and the sums of the rows of a: each load of a feeds both."""
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK + offs[None, :])
        if THROUGH_REGISTERS:
            a = a + 0.0
        sums += a.to(tl.float32)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)
    tl.store(s_ptr + offs, tl.sum(sums, axis=1))


def products(target, through_registers, schedule):
    torch.manual_seed(0)
    a, b = torch.randint(-3, 4, (64, 320)).bfloat16(), torch.randint(-3, 4, (320, 64)).bfloat16()
    c, s = torch.empty(64, 64), torch.empty(64)
    meta = dict(THROUGH_REGISTERS=through_registers, BLOCK=64, BLOCK_K=64, num_stages=3)
    report = machine.run(
        product_and_sums, (1,), (a, b, c, s, 320), meta, target=target, schedule=schedule
    )
    right = torch.equal(c, a.float() @ b.float()) and torch.equal(s, a.float().sum(1))
    return {finding.kind for finding in report.findings}, right


@pytest.mark.parametrize("schedule", ["lockstep", "late"])
def test_a_load_that_feeds_wgmma_and_a_sum_is_refilled_too_early(schedule):
    kinds, right = products("sm_90", False, schedule)
    if TRITON <= (3, 9):  # of newer ones it is not known
        assert "race" in kinds and not right
    if TRITON > (3, 6):
        assert products("sm_90", True, schedule) == (set(), True)
    assert products("sm_80", False, schedule) == (set(), True)  # there a product is over at once


def test_old_tritons_let_wgmma_read_what_cp_async_wrote_without_a_fence():
    kinds, _ = products("sm_90", True, "lockstep")
    assert ("missing fence" in kinds) == (TRITON <= (3, 6))


@triton.jit
def sum_of_products(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    """One program computes the sum of x y, and stores it to every place of a column."""
    offs = tl.arange(0, N)
    total = tl.sum(tl.load(x_ptr + offs) * tl.load(y_ptr + offs), axis=0)
    tl.store(out_ptr + offs, total + tl.zeros((N,), tl.float32))


@pytest.mark.parametrize("target", machine.TARGETS)
def test_fused_products_make_the_threads_of_a_row_round_differently(target):
    torch.manual_seed(0)
    x, y = torch.randn(32), torch.randn(32)
    found = {}
    for fused in (True, False):
        out = torch.empty(32)
        machine.run(sum_of_products, (1,), (x, y, out), dict(N=32, num_warps=1,
                    enable_fp_fusion=fused), target=target)  # fmt: skip
        found[fused] = out.unique().numel()
    assert found[True] > 1 and found[False] == 1, found
