"""A model of the busiest SM's time. It chooses a tile where no GPU has been measured.

It is for kernels that load by TMA (matmul_tma.py explains TMA). One step of their loop takes the
time of its products or of its loads, whichever is longer. Tiles are shared out among the SMs (a
GPU's processors; an H200 has 132). In one turn, each SM computes one tile. The SM with the most
tiles is done last: after the number of turns, times the time of a tile.

All constants are estimates, not measurements. `tilelab sweep` measures instead, and its tuned table
takes the place of this model.
"""

from tilelab.kernels._tiles import cdiv

# What one SM does in one clock:
#   FLOPS_16      FLOPs in 16-bit. H100: 989 TFLOP/s / 132 SMs / 1.83 GHz is about 4,096
#   L2_BYTES      bytes that it reads from the L2 cache
#   MEMORY_BYTES  bytes that it reads from memory or writes to it
FLOPS_16, L2_BYTES, MEMORY_BYTES = 4096, 48, 20
# How many clocks these take:
#   TILE_CLOCKS    what a tile costs besides its steps: from its first load to its first product,
#                  and from its last product to its store
#   LAUNCH_CLOCKS  the launch of a second kernel
#   PART_CLOCKS    one part in that kernel. A load takes 1,000 clocks, and eight are in flight
TILE_CLOCKS, LAUNCH_CLOCKS, PART_CLOCKS = 2000, 4000, 125


def busiest_sm(tile: dict, tiles: int, steps: int, results: int, item: int, sms: int) -> float:
    """Return the number of clocks after which the SM with the most work is done.

    Args:
        tile: a tile of a kernel that loads by TMA.
        tiles: the number of tiles of the result.
        steps: the number of steps of BLOCK_K along the whole sum.
        results: the number of elements of the result.
        item: the number of bytes of an element.
        sms: the number of SMs.
    """
    m, n, k, parts = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    turns = cdiv(tiles * parts, sms)
    # The shared memory of an SM does not hold two 128x128 tiles of partial sums in float32.
    per_sm = 1 if parts > 1 and m > 64 else tile["PROGRAMS_PER_SM"]
    # A step is 2 * m * n * k FLOPs, at FLOPS_16 if an element has 2 bytes. With 4 bytes the rate is
    # half of that, with 1 byte it is twice that: so `item` takes the place of 2.
    step = max(m * n * k * item / FLOPS_16, (m + n) * k * item / L2_BYTES)
    clocks = turns * (cdiv(steps, parts) * step + TILE_CLOCKS / per_sm)
    if parts == 1:
        return clocks
    # Each part is written and read once, in float32, and the result is written once.
    traffic = results * (8 * parts + item) / (MEMORY_BYTES * sms)
    return clocks + LAUNCH_CLOCKS + max(traffic, parts * PART_CLOCKS)
