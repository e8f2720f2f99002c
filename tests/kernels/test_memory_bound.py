"""What a memory-bound kernel needs to be one, held for every tile: wide accesses and no spills."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from tilelab.kernels.conv2d_depthwise import DEFAULT

from tests.kernels import test_compile
from tests.tools.memory_bound import CASES

# What an H200 can issue while it moves 16 bytes for each thread of a warp: 4 instructions a clock
# and SM, at 132 SMs of 1.755 GHz, against 512 bytes at 4.8 TB/s.
SLOTS = 4 * 512 / (4.8e12 / 132 / 1.755e9)
FEW = {  # what may be narrower than 16 bytes, and why
    # A bias of 16 channels: there are fewer partial sums than four for each thread.
    "sum_partials_kernel": "load of 2 x 4 bytes",
    # Of a maximum's place there is one byte for each pixel of y, which is two or four.
    "max_pool2d_kernel": "store of 8 x 1 bytes",
    "max_pool2d_backward_kernel": "load of 8 x 1 bytes",
    "unpool_kernel": "load of 8 x 1 bytes",
    # float32's tile has four channels a thread, which are 8 bytes in 16-bit.
    "conv2d_depthwise_kernel": ("load of 4 x 2 bytes", "store of 4 x 2 bytes"),
}
SIXTEEN_CHANNELS = dict(BLOCK_M=32, BLOCK_N=64, num_warps=4)  # of pool.py: not for float32


def compiled(*args):
    """The report of tests/tools/memory_bound.py: of a target, a dtype, and names or all."""
    return test_compile.compiled(*args, module="memory_bound")


def problems(row, dtype):
    """What is wrong with a kernel of the report, in words."""
    what = f"{row['kernel']} ({row['case']}) with {row['tile']}"
    other = row["tile"] == SIXTEEN_CHANNELS and "pool" in row["kernel"] and dtype == "float32"
    if "depthwise" in row["kernel"] and dtype == "float32":  # eight channels a thread are too many
        other = row["tile"] != DEFAULT[4]
    if row["spills"] and not other:
        yield f"{what} spills {row['spills']} bytes"
    for access, widths in row["accesses"].items():
        least = 8 if access.startswith(FEW.get(row["kernel"], "nothing")) else 16
        if not widths or min(widths) < least:
            yield f"{what}: {access} takes {widths} bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=pytest.mark.core), "float16", "float32"]
)
def test_every_tile_moves_16_bytes_at_a_time(dtype):
    rows = compiled("sm_90", dtype)
    assert {row["case"] for row in rows} == set(CASES)
    found = [p for row in rows for p in problems(row, dtype)]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_instructions_leave_time_for_the_memory():
    """At most as many as an H200 can issue meanwhile. Of kernels without a loop, each runs once.

    A thread that loads and stores once (of the tiles, one in 16-bit) has nothing to spread over
    what it does first. The forward of the cross-entropy and im2col are over, as their lessons say.
    """
    cases = ("bias_relu", "softmax", "SGD", "AdamW", "SGD of copies", "AdamW of copies")
    found = []
    for row in compiled("sm_90", "bfloat16", *cases):
        slots = row["instructions"] * 16 / row["moved"]
        if not row["loop"] and row["moved"] >= 64 and slots > SLOTS:
            found.append(f"{row['kernel']} with {row['tile']}: {slots:.0f} of {SLOTS:.0f} slots")
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.core
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_leaves_time_for_the_memory(stride):
    """A step of the loop and its share of what comes before, at the default of 16-bit.

    Of each 256 outputs, 8 a thread of a warp. They are 512 bytes, and stride^2 as many are read.
    """
    name = "conv2d, depthwise" + (" at stride 2" if stride == 2 else "")
    tile = DEFAULT[2]
    (row,) = (r for r in compiled("sm_90", "bfloat16", name) if r["tile"] == tile)
    steps = tile["ROWS"] // tile["PATCH_P"]
    before = row["instructions"] - row["loop_instructions"]
    outputs = tile["BLOCK_M"] * tile["BLOCK_N"] / tile["num_warps"] / 256
    slots = (row["loop_instructions"] + before / steps) / outputs
    assert slots < SLOTS * (1 + stride**2)


NARROW = """
import torch, triton, triton.language as tl
from tilelab.kernels import _launch
from tilelab.perf.compiler import aot
from tests.tools import memory_bound

@triton.jit
def copy_kernel(x_ptr, y_ptr, N, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < N)

aot.compile_for("sm_90")
x = torch.empty(4096, dtype=torch.bfloat16)
for N, stride, BLOCK in [(4096, 1, 1024), (4096, 2, 1024), (4095, 1, 1024), (4096, 1, 512)]:
    meta = dict(BLOCK=BLOCK, num_warps=4)
    launch = _launch.Launch(copy_kernel, (4,), (x, x, N, stride), meta)
    print([w for w in memory_bound.describe(launch)["accesses"].values()])
"""


@pytest.mark.slow
@pytest.mark.core
def test_the_test_sees_narrow_accesses(tmp_path):
    """A copy: as it should be; strided; of a length that no vector divides; 4 elements a thread."""
    path = tmp_path / "narrow.py"
    path.write_text(NARROW)
    result = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(pathlib.Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        [[16], [16]], [[2], [16]], [[2], [2]], [[8], [8]]
    ]  # fmt: skip
