"""How long a tile should take, predicted from its compiled code. Measurements must confirm it.

    time = max(compute, issue, L2, memory) + launches * 2.5 us

    compute  FLOPs * padding / (peak * wave efficiency)
    issue    instructions of the main loop, over all warps; an SM has four schedulers, and each
             issues one instruction a clock. A depthwise convolution also counts the instructions
             before its loop, which are as many as those of some steps of it.
    L2       what the programs of a product read: (BLOCK_M + BLOCK_N) * BLOCK_K elements a step
    memory   bytes that the launches read and write, each tensor once, over the bandwidth; at least
             the bytes that the mathematics asks for

padding is the work that the tiles compute over the work that was asked for. A convolution by boxes
of pixels counts all that its launch computes, packed channels and zeros between groups too. Without
tensor cores the peak is that of FMAs (fused multiply-adds), which the instructions of the loop then
have to feed.

wave efficiency is programs / (SMs * ceil(programs / SMs)): the GPU is done when its busiest SM is,
and that one has ceil(programs / SMs) programs. A persistent kernel has only as many programs as fit
at once, so its tiles are counted instead. How many programs an SM has at a time does not change its
rate, only how well it hides the latency of loads.

The model knows nothing of latency: neither of loads that nothing hides in a short loop, nor of the
first loads and the last stores of a program. So its time is usually a lower bound.
"""

import math

from tilelab.perf.compiler.occupancy import occupancy
from tilelab.perf.work.gpus import GPU, kind
from tilelab.perf.work.operators import tile_op
from tilelab.perf.work.search_space import TileOp

LAUNCH_S = 2.5e-6  # assumed: from the end of one kernel to the start of the next, in a CUDA graph
# Assumed: bytes that L2 hands to an SM in a clock. NVIDIA's A100 whitepaper states 5,120 bytes a
# clock in all, for 108 SMs; AMD's CDNA3 comes to about as many for each of its compute units.
L2_BYTES_PER_CLOCK = 48
SCHEDULERS = 4  # of an SM, each of which issues one warp's instruction a clock


def padding(sizes: dict[str, int], tile: dict[str, int]) -> float:
    """What the tiles cover over what there is: at least 1."""
    covered = 1.0
    for name, size in sizes.items():
        block = tile.get(f"BLOCK_{name}")
        if block and size:
            covered *= math.ceil(size / block) * block / size
    return covered


def loop_warps(tile: dict) -> int:
    """How many warps run the main loop: with warp specialisation two groups of `num_warps`."""
    return tile["num_warps"] * (2 if tile.get("kernel") == "tma_ws" else 1)


def _pieces(row: dict) -> int:
    """Pieces of equal work that programs are given: one each, unless they are persistent."""
    tile = row["tile"]
    if not tile.get("PROGRAMS_PER_SM"):
        return row["programs"]
    if "units" in row:
        return row["units"]
    blocks = [math.ceil(row["sizes"][k] / tile[f"BLOCK_{k}"]) for k in ("M", "N")]
    return math.prod(blocks) * tile.get("SPLIT_K", 1)


def _padding(row: dict) -> float:
    """FLOPs that the launch computes over those of the mathematics."""
    if "computed_flops" in row:
        return row["computed_flops"] / row["flops"]
    if not tile_op(row).pooled:
        return padding(row["sizes"], row["tile"])
    # The fused block's filter is padded: four places of one patch, seen as one filter.
    R, S = row["shape"]["R"], row["shape"]["S"]
    return padding(row["sizes"], row["tile"]) * ((R + 1) * (S + 1) / (R * S))


def step_flops(tile_op: TileOp, tile: dict[str, int]) -> int:
    """FLOPs of one step of a product's main loop.

    The fused block has four accumulators, but for the kernel whose BLOCK_M counts what is pooled.
    """
    accumulators = 4 if tile_op.pooled and "kernel" not in tile else 1
    return 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"] * accumulators


def itemsize(dtype: str) -> int:
    """Bytes of an element. A row has its dtype by name, and is read without torch."""
    return {"float32": 4, "float8_e4m3fn": 1, "int8": 1}.get(dtype, 2)


def predict(row: dict, gpu: GPU, launch_s: float = LAUNCH_S) -> dict:
    """The row fields that follow from a compiled tile's own (aot.py): occupancy, waves, time.

    A whole training step has no tile, and only its bytes and launches count.
    """
    if row.get("tile") is None:
        peak = gpu.peak(kind(row["dtype"], row["precision"]))
        return _times(row, {"memory": _memory(row, gpu), "compute": row["flops"] / peak}, launch_s)

    fits = occupancy(gpu.target, row["threads"], row["registers"], row["shared"])
    pieces = _pieces(row)
    found = {
        "occupancy": fits.fraction,
        "blocks_per_sm": fits.blocks,
        "limit": fits.limit,
        "waves": row["programs"] / (gpu.sms * max(fits.blocks, 1)),
        "wave_efficiency": pieces / (gpu.sms * math.ceil(pieces / gpu.sms)),
        "padding": _padding(row),
    }
    if fits.blocks == 0:
        return found
    times = {"memory": _memory(row, gpu)}
    work = row["flops"] * found["padding"]
    unit = kind(row["dtype"], row["precision"]) if row.get("tensor_core") else "fp32"
    peak = gpu.peak(unit) or gpu.peak("fp32")
    times["compute"] = work / (peak * found["wave_efficiency"])
    clocks = gpu.sms * gpu.clock_mhz * 1e6
    tile = row["tile"]
    if "BLOCK_K" in tile or tile.get("kernel") == "direct":  # a product, added up step by step
        tile = {"BLOCK_M": 1, "BLOCK_N": 1, "BLOCK_K": 1} | tile
        work /= found["wave_efficiency"]
        step = step_flops(tile_op(row), tile)
        loaded = (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * itemsize(row["dtype"])
        times["l2"] = work / step * loaded / (L2_BYTES_PER_CLOCK * clocks)
        if tile.get("kernel") == "direct":  # its loop may be unrolled: what an iteration multiplies
            step = 2 * row["threads"] * (row.get("loop_mix") or {}).get("float", 0)
        if row.get("loop_instructions") and step:
            instructions = row["loop_instructions"] * loop_warps(tile)
            times["issue"] = work / step * instructions / (SCHEDULERS * clocks)
    elif "PATCH_P" in tile:
        loop = row.get("loop_instructions") or 0
        steps = padding(row["sizes"], tile) * math.prod(row["sizes"].values())
        steps /= tile["BLOCK_M"] * tile["BLOCK_N"]
        issued = (row["instructions"] - loop) * row["programs"] + loop * steps
        issued *= tile["num_warps"] / found["wave_efficiency"]
        times["issue"] = issued / (SCHEDULERS * clocks)
    return found | _times(row, times, launch_s)


def _memory(row: dict, gpu: GPU) -> float:
    # Tensors that are updated in place are moved twice: an optimizer's minimum knows, `moved` not.
    return max(row["moved"], row["bytes"]) / gpu.bandwidth


def _times(row: dict, times: dict[str, float], launch_s: float) -> dict:
    bound = max(times, key=times.get)
    launching = launch_s * row["launches"]
    seconds = times[bound] + launching
    return {
        "predicted_s": seconds,
        "predicted_tflops": row["flops"] / seconds / 1e12,
        "predicted_gbps": row["bytes"] / seconds / 1e9,
        "bound": "launch" if launching > times[bound] else bound,
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
