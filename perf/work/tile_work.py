"""What a tile computes: counted from a results row, without the compiler and without torch."""

import math

from tilelab.perf.work.operators import tile_op
from tilelab.perf.work.search_space import TileOp

# Tiles whose predictions differ by less are alike to the model: its picks are that far behind the
# best on average, where others have measured it (docs/prediction.md).
ALIKE = 0.03
LAUNCH_S = 2.5e-6  # assumed: from the end of one kernel to the start of the next, in a CUDA graph


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


def pieces_of(row: dict) -> int:
    """Pieces of equal work that programs are given: one each, unless they are persistent."""
    tile = row["tile"]
    if not tile.get("PROGRAMS_PER_SM"):
        return row["programs"]
    if "units" in row:
        return row["units"]
    blocks = [math.ceil(row["sizes"][k] / tile[f"BLOCK_{k}"]) for k in ("M", "N")]
    return math.prod(blocks) * tile.get("SPLIT_K", 1)


def padding_of(row: dict) -> float:
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
