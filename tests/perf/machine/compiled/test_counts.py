"""What the machine counts, beside what is known by hand and what the prediction assumes."""

import random

import pytest
import torch
import triton

from tests.tools import memory_counts
from tilelab.kernels import _tiles, matmul
from tilelab.perf import machine
from tilelab.perf.compiler import aot
from tilelab.perf.report import diagnosis
from tilelab.perf.work.workloads import Workload

M, N, K = 256, 128, 96
TILES = {
    "pointer": ("sm_80", dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4,
                              num_stages=3)),
    "wgmma": ("sm_90", dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4,
                            num_stages=3)),
    "tma": ("sm_90", dict(kernel="tma", BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, SUBTILES=1,
                          SPLIT_K=1, PROGRAMS_PER_SM=1, num_warps=4, num_stages=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", TILES)
def test_traffic_of_a_product_is_what_the_prediction_says(name):
    target, tile = TILES[name]
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    with _tiles.use_tile("matmul", tile), machine.executing(target) as reports:
        matmul(a, b)
    (report,) = reports
    counts = report.counts
    tiles = (M // 64) * (N // 64)
    read = tiles * (64 + 64) * K * 2  # perf/compiler/prediction.py: L2
    written = M * N * 2
    moved = counts.get("TMA bytes", 0) + 32 * counts.get("sectors", 0)
    assert moved == read + written, counts
    assert (
        sum(n for k, n in counts.items() if k.startswith("instructions: "))
        == (counts["instructions"])
    )
    # By line it is the same, and the line of the product has the tensor cores' instructions.
    assert sum(x.get("wavefronts", 0) for x in report.lines.values()) == counts.get("wavefronts", 0)
    assert counts["wavefronts"] == counts["wavefronts, ideal"]


def test_compile_explain_executes_one_program():
    w = Workload("matmul", "fwd", "bfloat16", "ieee", dict(M=M, N=N, K=K), "small")
    report = aot.executed(w, TILES["pointer"][1], "sm_80")
    text = diagnosis.counted(report)
    assert "one program of 8, of 4 warps" in text
    assert "tl.dot(" in text and "tensor cores" in text
    assert "the machine executes sm_80 and sm_90 only" in diagnosis.counted(
        aot.executed(w, TILES["pointer"][1], "gfx942")
    )


def test_a_launch_is_counted_again():
    """Any quick one. No count depends on what was in memory before."""
    file = memory_counts.read()
    if file["triton"] == triton.__version__:  # others compile other code
        row = random.choice([row for row in file["launches"] if row["instructions"] < 2000])
        assert memory_counts.count(row) == row, memory_counts.describe(row)
