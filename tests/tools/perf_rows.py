"""Synthetic rows of results files, which nobody measured: only for tests of tables and figures.

They are made from perf/compiler/prediction.py, with a penalty and noise of a fixed seed on top.
They say so: the GPU is called "NVIDIA H200 (synthetic)" and every header carries a note. Nothing
that comes from here belongs in perf/results/.
"""

import json
import math
from typing import NamedTuple

import numpy as np

from tilelab.perf.compiler.prediction import predict, refused
from tilelab.perf.rows import results, stats
from tilelab.perf.work import gpus
from tilelab.perf.work.operators import OPERATORS

GPU = "NVIDIA H200 (synthetic)"
COMPILED = "sm_90 (compiled)"
NOTE = "synthetic: made by tests/tools/perf_rows.py, measured by nobody"
PEERS = {"torch": 0.93, "compile": 0.97}  # their time over tilelab's best, about


class Problem(NamedTuple):
    op: str
    mode: str
    shape: dict
    name: str
    sizes: dict
    dtype: str = "bfloat16"
    precision: str = "ieee"


def matmul(size, **more):
    shape = dict(M=size, N=size, K=size) | more
    return Problem("matmul", "fwd", shape, f"square {size}", shape)


def conv(name, n, c, h, k, r, mode="fwd"):
    shape = dict(
        N=n, C=c, H=h, W=h, K=k, R=r, S=r, stride=1, padding=r // 2, dilation=1, groups=1
    )  # fmt: skip
    sizes = {
        "fwd": dict(M=n * h * h, N=k, K=c),
        "dgrad": dict(M=n * h * h, N=c, K=k),
        "wgrad": dict(M=k, N=r * r * c, K=n * h * h),
    }[mode]
    return Problem("conv2d", mode, shape, f"{name} n{n}", sizes)


def softmax(rows, columns):
    shape = dict(M=rows, N=columns)
    return Problem("softmax", "fwd", shape, f"classes {columns} m{rows}", shape)


def adamw(elements):
    shape = dict(tensors=20, elements=elements)
    return Problem("adamw", "step", shape, "demo parameters", dict(M=elements), "float32")


LAYERS = [
    ("resnet50.layer1.0.conv2", 64, 56, 64, 3),
    ("resnet50.layer2.0.conv3", 128, 28, 512, 1),
    ("resnet50.layer2.1.conv2", 128, 28, 128, 3),
    ("resnet50.layer3.1.conv2", 256, 14, 256, 3),
    ("resnet50.layer3.1.conv3", 256, 14, 1024, 1),
    ("resnet50.layer4.1.conv2", 512, 7, 512, 3),
]


def problems():
    """A few of everything: products by size, layers of a network, and two that memory limits."""
    return [
        *(matmul(size) for size in (512, 1024, 2048, 4096, 8192)),
        *(
            conv(name, 32, c, h, k, r, mode)
            for mode in ("fwd", "wgrad")
            for name, c, h, k, r in LAYERS
        ),
        *(softmax(4096, columns) for columns in (1000, 4096, 16384)),
        adamw(2**20),
    ]


def tiles(problem, count=60, seed=0):
    """Tiles to try, the default first."""
    axes = dict(
        BLOCK_M=(64, 128, 256), BLOCK_N=(64, 128, 256), BLOCK_K=(32, 64), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip
    default = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3)
    if problem.op == "softmax":
        axes = dict(BLOCK_M=(1, 2, 4, 8, 16), BLOCK_N=(1024, 4096, 16384), num_warps=(4, 8))
        default = dict(BLOCK_M=4, BLOCK_N=1024, num_warps=8)
    if problem.op == "adamw":
        axes = dict(BLOCK_M=(256, 512, 1024, 2048, 4096, 8192), num_warps=(2, 4, 8))
        default = dict(BLOCK_M=1024, num_warps=4)
    grid = np.stack(np.meshgrid(*axes.values(), indexing="ij"), -1).reshape(-1, len(axes))
    every = [dict(zip(axes, map(int, values), strict=True)) for values in grid]
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    chosen = [default] + [every[i] for i in sorted(order) if every[i] != default]
    return [tile | {"GROUP_M": 8} if problem.op == "matmul" else tile for tile in chosen]


def compiled(problem, tile, random):
    """What a compiler might make of a tile."""
    threads = 32 * tile["num_warps"]
    elements = tile["BLOCK_M"] * tile.get("BLOCK_N", 1)
    programs = math.prod(
        math.ceil(size / tile[f"BLOCK_{name}"])
        for name, size in problem.sizes.items()
        if name != "K" and f"BLOCK_{name}" in tile
    )
    if problem.mode == "wgrad":  # a long sum for a small result is split among programs
        programs *= max(1, 264 // programs)
    product = "BLOCK_K" in tile
    needed = elements / threads * (1.0 if product else 2.5) + random.integers(36, 60)
    spills = int(max(0, needed - 250)) // 4 * 16
    row = dict(
        registers=int(min(255, needed)), spills=spills, threads=threads, programs=programs,
        launches=1, load_bytes=16, store_bytes=16, tma=False, compile_s=0.4 + random.random(),
        shared=1024 + 16 * threads,
    )  # fmt: skip
    if product:
        n = min(256, tile["BLOCK_N"])
        copies = (tile["BLOCK_M"] + n) * tile["BLOCK_K"] // 8 // threads
        hgmma = tile["BLOCK_M"] * tile["BLOCK_K"] // 16 // 16 // tile["num_warps"]
        row |= dict(
            shared=(tile["BLOCK_M"] + n) * tile["BLOCK_K"] * 2 * tile["num_stages"],
            tensor_core=f"HGMMA.64x{n}x16.F32.BF16", tensor_cores_in_loop=hgmma, tma=False,
            serialised=n == 256 and tile["BLOCK_K"] == 32, operands="shared",
            loop_instructions=34 + 5 * copies + 3 * hgmma + (90 if problem.mode == "wgrad" else 0),
        )  # fmt: skip
        if problem.op == "conv2d" and tile["BLOCK_K"] == 32 and tile["BLOCK_N"] == 64:
            row |= dict(load_bytes=4)
    return row


def base(problem, impl, tile, gpu, measured):
    itemsize = 4 if problem.dtype == "float32" else 2
    about = OPERATORS[problem.op].modes[problem.mode]
    return dict(
        kind="row", gpu=gpu, measured=measured, op=problem.op, mode=problem.mode,
        dtype=problem.dtype, precision=problem.precision, shape=problem.shape,
        shape_name=problem.name, impl=impl, tile=tile, tile_op=problem.op, sizes=problem.sizes,
        source="0123456789ab", flops=about.flops(problem.shape),
        bytes=about.bytes(problem.shape, itemsize),
        time="2000-01-01T00:00:00+00:00",
    )  # fmt: skip


def workload(problem, seed=0, count=60, measured=True):
    """The rows of one problem: every tile compiled; if measured, screened, and the best in a race.

    With more than 20 tiles there are one of a wrong result, one that fails, and two not tried.
    """
    random = np.random.default_rng(seed)
    h200 = gpus.GPUS["h200"]
    gpu = GPU if measured else COMPILED
    rows, chosen = [], tiles(problem, count, seed)
    for tile in chosen:
        row = base(problem, "tilelab", tile, gpu, measured) | {"stage": "compile"}
        row["moved"] = row["bytes"]
        row |= compiled(problem, tile, random)
        row |= predict(row, h200)
        reason = refused(row)
        row |= dict(status="pruned", reason=reason) if reason else dict(status="predicted")
        row["default"] = tile is chosen[0]
        rows.append(row)
    if measured:
        screened = [row for row in rows if row["status"] == "predicted"]
        for i, row in enumerate(screened):
            odd = {3: "wrong", 7: "error", 11: "skipped", 12: "skipped"}.get(i, "ok")
            screen(row, odd if len(rows) > 20 else "ok", h200, random)
        rows += race(problem, rows, h200, random)
    return rows


RUNGS = [
    dict(kernel="direct", BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
    dict(kernel="flat", BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3),
    dict(kernel="tma", BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    dict(kernel="tma", BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
]


def ladder(measured=True):
    """A row for each kernel of conv2d, and two of the last, in each 3x3 layer."""
    random, rows = np.random.default_rng(0), []
    for name, c, h, k, r in (layer for layer in LAYERS if layer[4] == 3):
        problem = conv(name, 32, c, h, k, r)
        for tile in RUNGS:
            gpu = GPU if measured else COMPILED
            row = base(problem, "tilelab", tile, gpu, measured) | {"stage": "compile"}
            row |= {"moved": row["bytes"], "default": False, "status": "predicted"}
            row |= compiled(problem, tile, random)
            if tile.get("kernel") == "direct":
                row |= dict(loop_instructions=80, loop_mix={"float": 32}, tensor_core=None)
            if tile.get("kernel") == "tma":
                row |= dict(tma=True, loop_instructions=90)
            row |= predict(row, gpus.GPUS["h200"])
            if measured:
                screen(row, "ok", gpus.GPUS["h200"], random)
            rows.append(row)
    return rows


def screen(row, status, gpu, random):
    """Turn a predicted row into a screened one."""
    row |= dict(status=status, stage="screen", timer="graph", cache="cold")
    if status == "wrong":
        row |= dict(reason="the result is wrong", error=0.41, tolerance=0.0043)
    elif status == "error":
        row |= dict(reason="RuntimeError: Triton Error [CUDA]: misaligned address")
    elif status == "skipped":
        row |= dict(reason="the time budget was spent")
    else:
        slow = 1.12 + 0.35 * (row["load_bytes"] < 16) + 0.5 * bool(row.get("serialised"))
        slow += 0.15 * (row.get("occupancy", 1) < 0.2) + abs(random.normal(0, 0.08))
        time(row, row["predicted_s"] * slow * np.exp(random.normal(0, 0.01, 5)), gpu)
        row |= dict(error=0.0011, tolerance=0.0043)


def race(problem, rows, gpu, random, rounds=24):
    """The finals: the eight best tiles and the peers, timed in the same rounds."""
    tried = sorted((row for row in rows if row["status"] == "ok"), key=lambda r: r["median_s"])
    best = tried[0]["median_s"]
    entrants = [(row, row["median_s"]) for row in tried[:8]]
    for impl, factor in PEERS.items():
        peer = base(problem, impl, None, GPU, True) | dict(status="ok", tile_op=None, sizes=None)
        if problem.op == "softmax":
            factor += 0.2
        entrants.append((peer, best * factor * np.exp(random.normal(0, 0.08))))
    shared = np.exp(random.normal(0, 0.006, rounds))  # what slows a whole round
    found = []
    for row, middle in entrants:
        final = row | dict(stage="final", race="0", timer="graph", cache="cold", reason=None)
        time(final, middle * shared * np.exp(random.normal(0, 0.008, rounds)), gpu)
        watts = 420 + 250 * min(1, final["peak_share"]) + random.normal(0, 8)
        final |= dict(joules=watts * final["median_s"], clock_mhz=1755.0, throttled=0, noisy=False)
        found.append(final)
    return found


def time(row, samples, gpu):
    row["samples_s"] = [float(f"{s:.5g}") for s in samples]
    row |= {f"{name}_s": value for name, value in stats.summary(row["samples_s"]).items()}
    row["rounds"] = len(samples)
    row["tflops"] = row["flops"] / row["median_s"] / 1e12
    row["gbps"] = row["bytes"] / row["median_s"] / 1e9
    compute = row["flops"] / gpu.peak(gpus.kind(row["dtype"], row["precision"]))
    row["peak_share"] = max(compute, row["bytes"] / gpu.bandwidth) / row["median_s"]


def rows(seed=0, count=60, measured=True, only=None):
    """Rows of all `problems`, or of those whose operator is `only`."""
    found = []
    for i, problem in enumerate(problems()):
        if only in (None, problem.op):
            found += workload(problem, seed + i, count, measured)
    return found


def write(path, *parts):
    """A results file of headers and rows, in this order, as a sweep would have left it."""
    lines = [
        {k: v for k, v in part.items() if part["kind"] == "header" or k not in ("gpu", "measured")}
        for part in parts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def header(measured=True):
    return dict(
        kind="header", schema=results.SCHEMA, created="2000-01-01T00:00:00+00:00",
        command=["tilelab", "sweep"], gpu=GPU if measured else COMPILED,
        target="sm_90", measured=measured, driver="570.00" if measured else None,
        clocks_mhz=dict(sm=1755, memory=3201, sm_max=1980) if measured else None,
        power_limit_w=700.0 if measured else None,
        versions=dict(python="3.11.7", torch="2.13.0", triton="3.9.0", numpy="2.4.6", cuda="13.0",
                      cudnn="9.1", tilelab="0.1.0"),
        commit="0123456789abcdef0123456789abcdef01234567", dirty=True,
        host=dict(cpu="a CPU (synthetic)", cores=16), seed=0, note=NOTE,
    )  # fmt: skip


# -- one row, to be changed ------------------------------------------------------------------------

HEADER = {
    "created": "2026-01-01T00:00:00Z",
    "gpu": "NVIDIA H200",
    "measured": True,
    "driver": "570.1",
    "versions": {"torch": "2.13.0", "triton": "3.7.1", "cudnn": None},
}


def one_row(**changes):
    """A finalist of a small matmul, that took a millisecond, with these changes."""
    about = dict(
        op="matmul", mode="fwd", dtype="bfloat16", precision="ieee", shape=dict(M=64, N=32, K=16),
        impl="tilelab", tile=dict(BLOCK_M=64, num_warps=4), stage="final", status="ok",
        source="aaaa", median_s=1e-3,
    )  # fmt: skip
    return about | changes
