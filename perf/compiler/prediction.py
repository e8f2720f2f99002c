"""How long a tile should take, predicted from its compiled code.

A product is predicted by kernels/_cost_model.py, which explains its terms: products, instructions,
L2, shared memory and latency on the busiest SM; memory and power of the whole GPU. This file takes
the numbers that it asks for from a results row.

Other kernels read, compute a little and write. Their model is the same with one step or few: what
an SM issues and moves, one latency a step, and what a program costs besides. Little's law is in it:
a program has no more under way than it loads at once, so few or small programs leave the memory
idle. Before them all comes what the memory takes for all bytes; after them the launches.

Every prediction says how it is known. "held to measurements" means that others have measured the
same kind of kernel on the same family of GPUs, and that `tilelab validate` holds the model to it.
"by construction only" means that the same terms were put together for another kernel, and that
nobody has measured whether they agree.
"""

import math

from tilelab.kernels import _cost_model as model
from tilelab.perf.compiler.occupancy import Occupancy, occupancy
from tilelab.perf.rows import results
from tilelab.perf.work.gpus import GPU, kind
from tilelab.perf.work.operators import tile_op
from tilelab.perf.work.tile_work import (
    LAUNCH_S,
    itemsize,
    loop_warps,
    padding,
    padding_of,
    pieces_of,
    step_flops,
)

HELD, CONSTRUCTED = results.KNOWN
# What a term of the model is called as the limit of a kernel.
BOUNDS = {
    "tensor": "compute", "power": "power", "issue": "issue", "l2": "l2", "shared": "shared memory",
    "latency": "latency", "memory": "memory",
}  # fmt: skip


def predict(row: dict, gpu: GPU, launch_s: float = LAUNCH_S) -> dict:
    """The row fields that follow from a compiled tile's own (aot.py): occupancy, waves, time.

    A whole training step has no tile, and only its bytes, FLOPs and launches count.

    Args:
        row: what is known of one call; bytes and FLOPs are totals.
        gpu: on which it runs.
        launch_s: seconds that one launch costs.
    """
    if row.get("tile") is None:
        peak = gpu.ceiling * gpu.peak(kind(row["dtype"], row["precision"]))
        terms = {"memory": _memory(row, gpu), "power": row["flops"] / peak}
        return _summed(row, terms, terms, launch_s) | {"known": CONSTRUCTED}

    fits = occupancy(gpu.target, row["threads"], row["registers"], row["shared"])
    pieces = pieces_of(row)
    found = {
        "occupancy": fits.fraction,
        "blocks_per_sm": fits.blocks,
        "limit": fits.limit,
        "waves": row["programs"] / (gpu.sms * max(fits.blocks, 1)),
        "wave_efficiency": pieces / (gpu.sms * math.ceil(pieces / gpu.sms)),
        "padding": padding_of(row),
    }
    if fits.blocks == 0:
        return found
    if "BLOCK_K" in row["tile"] or row["tile"].get("kernel") == "direct":
        terms, inside = _product(row, gpu, fits, pieces)
    else:
        terms, inside = _stream(row, gpu, fits)
    return found | _summed(row, terms, inside, launch_s) | {"known": known(row, gpu)}


def known(row: dict, gpu: GPU) -> str:
    """How a prediction is known: HELD or CONSTRUCTED.

    The measurements are of matmul through pointers, in 16-bit, and in TF32 on sm_80.
    """
    held = {"sm_80": ("fp16", "bf16", "tf32")}.get(gpu.target, ("fp16", "bf16"))
    pointers = row.get("tile_op", row["op"]) == "matmul" and "kernel" not in row["tile"]
    measured = gpu.target in ("sm_80", "sm_89", "sm_90")
    fits = pointers and measured and kind(row["dtype"], row["precision"]) in held
    return HELD if fits else CONSTRUCTED


def unit(tensor_core: str | None) -> str:
    """Which of the model's units a tensor-core instruction is; "fma" without one."""
    if not tensor_core:
        return "fma"
    if tensor_core.startswith("UTC"):
        return "tcgen05"
    return "wgmma" if "GMMA" in tensor_core else "mma"


def processor(gpu: GPU, arithmetic: str) -> model.GPU:
    """A GPU as the model knows it, for one kind of arithmetic."""
    rate = gpu.rate.get(arithmetic) or gpu.rate["fp32"]
    # What FMAs (fused multiply-adds) reach has no published ceiling below their peak.
    share = 1 if arithmetic == "fp32" else gpu.ceiling
    peak = gpu.peak(arithmetic) or gpu.peak("fp32")
    return model.GPU(gpu.sms, gpu.fma_clock_mhz * 1e6, rate, gpu.bandwidth, share * peak)


def _product(row: dict, gpu: GPU, fits: Occupancy, pieces: int) -> tuple[dict, dict]:
    """Seconds of each limit of the whole GPU, and clocks of each term of a step."""
    tile = {"BLOCK_K": 1} | row["tile"]
    item, by = itemsize(row["dtype"]), tile.get("kernel", "pointer")
    if by == "direct":  # a step multiplies one number by one; the compiler unrolls some of them
        unrolled = 2 * row["threads"] * (row.get("loop_mix") or {}).get("float", 0)
        tile["BLOCK_K"] = max(unrolled / (2 * tile["BLOCK_M"] * tile["BLOCK_N"]), 1)
    step = step_flops(tile_op(row), tile)
    steps = row["flops"] * padding_of(row) / (pieces * step)
    loop = model.Loop(
        tile["BLOCK_M"], step / (2 * tile["BLOCK_M"] * tile["BLOCK_K"]), tile["BLOCK_K"], item,
        loop_warps(tile), tile["num_stages"], row.get("loop_instructions") or 0,
        unit(row.get("tensor_core")), fits.blocks, row.get("run_a", 128), row.get("run_b", 128), by,
        bool(tile.get("PROGRAMS_PER_SM")),
    )  # fmt: skip
    arithmetic = kind(row["dtype"], row["precision"]) if row.get("tensor_core") else "fp32"
    target = processor(gpu, arithmetic)
    terms = model.product_terms(loop, target, pieces, steps, max(row["moved"], row["bytes"]))
    beside = min(fits.blocks, math.ceil(pieces / gpu.sms))
    inside = model.step_of(loop, target).beside(beside)
    inside["latency"] = max(inside["latency"], (model.AROUND + model.LATENCY) / max(steps, 1))
    return terms, inside


def _stream(row: dict, gpu: GPU, fits: Occupancy) -> tuple[dict, dict]:
    """The same of a kernel that is no product: each program loads, computes and stores."""
    tile, programs = row["tile"], row["programs"]
    blocks = math.prod(size for name, size in tile.items() if name.startswith("BLOCK_"))
    elements = padding(row["sizes"], tile) * math.prod(row["sizes"].values())
    trips = max(elements / (blocks * programs), 1)
    loop = row.get("loop_instructions") or 0
    issued = (row.get("instructions") or 0) - loop + loop * trips
    busy = {
        "issue": issued * tile["num_warps"] / model.SCHEDULERS,
        "l2": max(row["moved"], row["bytes"]) / programs / model.L2_BYTES,
    }

    def clocks(beside: int) -> float:
        waiting = trips * model.LATENCY + busy["l2"]
        return model.together(*(beside * t for t in busy.values()), waiting) + model.AROUND

    full, rest = divmod(programs, gpu.sms * fits.blocks)
    taken = full * clocks(fits.blocks) + (clocks(math.ceil(rest / gpu.sms)) if rest else 0)
    beside = min(fits.blocks, math.ceil(programs / gpu.sms))
    inside = {name: beside * value for name, value in busy.items()}
    inside["latency"] = trips * model.LATENCY + model.AROUND
    return {"sms": taken / (gpu.fma_clock_mhz * 1e6), "memory": _memory(row, gpu)}, inside


def _memory(row: dict, gpu: GPU) -> float:
    # Tensors that are updated in place are moved twice: an optimizer's minimum knows, `moved` not.
    return max(row["moved"], row["bytes"]) / (model.MEMORY_SHARE * gpu.bandwidth)


def _summed(row: dict, terms: dict, inside: dict, launch_s: float) -> dict:
    """The fields of a prediction. Within the SMs, the longest term of a step is the bound."""
    busy, launching = model.together(*terms.values()), launch_s * row["launches"]
    limit = max(terms, key=terms.get)
    limit = max(inside, key=inside.get) if limit == "sms" else limit
    seconds = busy + launching
    return {
        "predicted_s": seconds,
        "predicted_tflops": row["flops"] / seconds / 1e12,
        "predicted_gbps": row["bytes"] / seconds / 1e9,
        "bound": "launch" if launching > busy else BOUNDS[limit],
    }


def refused(row: dict) -> str | None:
    """Why a tile is not worth a GPU's time, from what compiling it has shown; None if it is."""
    if row.get("failed"):
        return row["failed"]
    if row.get("tile") is None:
        return None
    if row.get("blocks_per_sm") == 0:
        return row["limit"]
    if row.get("spills"):
        return f"spills {row['spills']} bytes a thread"
    product = "BLOCK_K" in row["tile"] and row["tile"].get("kernel") != "direct"
    ieee = row["dtype"] == "float32" and row["precision"] == "ieee"
    if product and not ieee and not row.get("tensor_core"):
        return "no tensor cores"
    return None
