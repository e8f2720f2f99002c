"""How long the busiest SM would take with a tile: what picks one where no GPU has been measured.

A kernel that loads by TMA has a fast loop: the time of a tile is that of its products or of its
loads, whichever is longer. Tiles are shared out among the SMs (a GPU's processors, 132 on an H100),
and the SM with the most of them is done last. `tilelab sweep` measures instead, and
its table of winners takes the place of this estimate.
"""

from tilelab.kernels._tiles import cdiv

# Of an SM, in a clock: FLOPs in 16-bit (H100: 989 TFLOP/s / 132 SMs / 1.83 GHz), and bytes out of
# the L2 cache and of the memory. Then clocks: from a tile's first load to its first product and
# from its last to its store; of another launch; and of a part that is added up there, since a load
# takes 1,000 and eight are on their way. Estimates: a tuned table takes their place.
FLOPS_16, L2_BYTES, MEMORY_BYTES = 4096, 48, 20
TILE_CLOCKS, LAUNCH_CLOCKS, PART_CLOCKS = 2000, 4000, 125


def busiest_sm(tile: dict, tiles: int, steps: int, results: int, item: int, sms: int) -> float:
    """Clocks after which the SM with the most work is done.

    Args:
        tile: of a kernel that loads by TMA.
        tiles: of the result.
        steps: of BLOCK_K along the whole sum.
        results: elements of the result.
        item: bytes of an element.
        sms: how many SMs there are.
    """
    m, n, k, parts = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    turns = cdiv(tiles * parts, sms)
    # Two 128x128 tiles of float32 partial sums do not fit into an SM.
    per_sm = 1 if parts > 1 and m > 64 else tile["PROGRAMS_PER_SM"]
    step = max(m * n * k * item / FLOPS_16, (m + n) * k * item / L2_BYTES)
    clocks = turns * (cdiv(steps, parts) * step + TILE_CLOCKS / per_sm)
    if parts == 1:
        return clocks
    traffic = results * (8 * parts + item) / (MEMORY_BYTES * sms)
    return clocks + LAUNCH_CLOCKS + max(traffic, parts * PART_CLOCKS)
