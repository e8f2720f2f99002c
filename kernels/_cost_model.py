"""A model of a product's time, from what the compiler made of its tile. It also chooses tiles.

A product is a matmul or a convolution: programs that each add up a tile of the result, step by
step. These things happen in a step, on one SM (a GPU's processor; an H200 has 132). All are in
clocks:

    tensor     2 BLOCK_M BLOCK_N BLOCK_K / FLOPs a clock    the products
    issue      instructions * warps / 4 + 18 * warps        four schedulers issue an instruction a
                                                            clock each; 18 a warp are its barrier
    l2         bytes of both operands / 50                  what the L2 cache hands to an SM; short
                                                            runs of bytes cost more (`thin`)
    shared     bytes written and read / 120                 shared memory has 32 banks of 4 bytes
    latency    (900 + l2) / (stages - 1)                    Little's law: a load takes 900 clocks,
                                                            and stages - 1 of them are under way

Around its loop, a program takes 900 clocks until the first data come, 900 for indices and epilogue,
and the time to fetch one step and to store the tile. The whole GPU has two more limits:

    memory     bytes / (0.75 * bandwidth)                   0.75 is what loads reach of it
    power      FLOPs / ceiling                              what the best libraries reach: a GPU
                                                            that works hard lowers its clock

Programs that share an SM share its units, but wait side by side. So with b programs a step takes b
times the first four terms, and one latency. Nothing overlaps perfectly: two terms that take equally
long take 1.19 times as long together, as the 4-norm says (`together`).

The constants were fitted to measurements of Triton's matmul on an A100 and an H100, are round, and
are the same for both: docs/prediction.md has the sources, and what each term is worth. For loads by
TMA, persistent programs, tcgen05, AMD's GPUs and convolutions, the same terms follow from how these
work; no measurement has confirmed them yet.

Read first: matmul.py. Sources: Little, A Proof for the Queuing Formula L = lambda W (1961); Volkov,
Understanding Latency Hiding on GPUs (2016).
"""

import math
from typing import NamedTuple

from tilelab.kernels._tiles import cdiv

LATENCY = 900  # clocks from a load's issue until its data can be used, beside its transfer
AROUND = 900  # clocks of a program around its loop, beside its first load and its stores
BARRIER = 18  # clocks a warp and step: the wait for the copies, the barrier, the first fragments
SCHEDULERS = 4  # of an SM; each issues one instruction of one warp a clock
L2_BYTES = 50  # a clock and SM, in runs of 128 bytes and more
STORE_BYTES = 150  # a clock and SM: nobody waits for a store
SHARED_BYTES = 120  # a clock and SM, of 128
MEMORY_SHARE = 0.75  # of the nominal bandwidth
QUEUE = 0.3  # of the loads of the other programs on the SM, that a load waits for
IN_ORDER = 0.9  # of its mma instructions' time, that a warp waits for their results
SHARPNESS = 4  # how sharply the longest of several terms wins


class GPU(NamedTuple):
    """What the model knows of a GPU.

    Attributes:
        sms: the number of its SMs.
        clock: its highest clock, in Hz.
        rate: FLOPs of one SM in a clock, of the kind of arithmetic at hand.
        bandwidth: of its memory, in bytes/s.
        ceiling: FLOP/s that the best libraries reach.
    """

    sms: int
    clock: float
    rate: float
    bandwidth: float
    ceiling: float


class Loop(NamedTuple):
    """The main loop of one compiled tile.

    Attributes:
        m, n, k: what a step multiplies: m x k by k x n.
        item: bytes of an element.
        warps: that run the loop.
        stages: how many steps are under way at once.
        instructions: of one warp in a step.
        unit: what multiplies. "wgmma" and "tcgen05" read shared memory, and run while their warp
            goes on. "mma" (AMD's MFMA too) and "fma" read registers, which each warp loads from
            shared memory, and their warp waits for them.
        resident: how many programs fit on an SM at once.
        run_a, run_b: contiguous bytes in memory of a row of each operand's tile.
        by: what loads: "pointer", "tma" or "tma_ws".
        persistent: each program computes several tiles in turn.
    """

    m: int
    n: int
    k: int
    item: int
    warps: int
    stages: int
    instructions: float
    unit: str
    resident: int
    run_a: int = 128
    run_b: int = 128
    by: str = "pointer"
    persistent: bool = False


def together(*terms: float) -> float:
    """Return how long things take that overlap, as the 4-norm: at least as long as the longest."""
    longest = max(terms)
    if not longest:
        return 0.0
    return longest * sum((t / longest) ** SHARPNESS for t in terms) ** (1 / SHARPNESS)


def thin(run: int) -> float:
    """Return by how much a run of so many contiguous bytes costs more than its bytes.

    L2 keeps lines of 128 bytes. A run of 64 bytes costs 1.4 times as much a byte.
    """
    return math.sqrt(max(128 / run, 1))


def warp_grid(m: int, n: int, warps: int) -> tuple[int, int]:
    """Return how Triton lays warps over an m x n tile of mma instructions: rows and columns."""
    rows = columns = 1
    while rows * columns < warps:
        if m / rows >= n / columns and rows < m / 16:
            rows *= 2
        else:
            columns *= 2
    return rows, columns


def shared_reads(loop: Loop) -> float:
    """Return the bytes that a step's products read from shared memory.

    A wgmma of four warps reads 64 rows of A and all of B; a tcgen05.mma has 128 rows. With mma,
    each warp reads its rows of A and its columns of B.
    """
    if loop.unit in ("wgmma", "tcgen05"):
        rows = 64 if loop.unit == "wgmma" else 128
        return cdiv(loop.m, rows) * (rows + loop.n) * loop.k * loop.item
    rows, columns = warp_grid(loop.m, loop.n, loop.warps)
    return loop.warps * (max(loop.m / rows, 16) + max(loop.n / columns, 8)) * loop.k * loop.item


class Step(NamedTuple):
    """The clocks of a step of a program that has an SM to itself, by what takes them.

    `alone` are those of its products: a program of two warps uses half of the four tensor cores.
    """

    tensor: float
    issue: float
    l2: float
    shared: float
    alone: float
    in_order: float  # of `alone`, those in which nothing else of the program can run
    stages: int

    def beside(self, programs: int) -> dict[str, float]:
        """Return the terms of a step where so many programs share the SM."""
        wait = LATENCY + self.l2 * (1 + QUEUE * (programs - 1))
        if self.stages > 1:
            latency = max(wait / (self.stages - 1), self.in_order)
        else:  # load, multiply, load, multiply
            latency = wait + max(self.alone, self.shared)
        return {
            "tensor": max(programs * self.tensor, self.alone),
            "issue": programs * self.issue,
            "l2": programs * self.l2,
            "shared": programs * self.shared,
            "latency": latency,
        }

    def clocks(self, programs: int) -> float:
        """Return how long one step of each of these programs takes."""
        return together(*self.beside(programs).values())


def step_of(loop: Loop, gpu: GPU) -> Step:
    """Return what a step of this loop takes on an SM."""
    tensor = 2 * loop.m * loop.n * loop.k / gpu.rate
    loaded = (loop.m * thin(loop.run_a) + loop.n * thin(loop.run_b)) * loop.k * loop.item
    written = (loop.m + loop.n) * loop.k * loop.item
    alone = tensor * 4 / min(loop.warps, 4)
    return Step(
        tensor,
        loop.instructions * loop.warps / SCHEDULERS + BARRIER * loop.warps,
        loaded / L2_BYTES,
        (written + shared_reads(loop)) / SHARED_BYTES,
        alone,
        0 if loop.unit in ("wgmma", "tcgen05") else IN_ORDER * alone,
        loop.stages,
    )


def busy_clocks(loop: Loop, step: Step, gpu: GPU, tiles: int, steps: float) -> float:
    """Return after how many clocks the busiest SM has done its share of `tiles` tiles.

    An SM has `resident` programs at a time. Those that are left over for the last turn are spread
    over all SMs. A persistent program goes from tile to tile: where two share an SM, one multiplies
    while the other stores. Warps that only load ("tma_ws") fetch the next tile meanwhile.
    """

    def turn(beside: int, last: bool) -> float:
        stored = loop.m * loop.n * loop.item / STORE_BYTES
        around = AROUND + beside * stored
        if loop.by != "tma_ws" or last:
            around += LATENCY + beside * step.l2
        if loop.persistent and not last:
            around /= beside
        return steps * step.clocks(beside) + around

    full, rest = divmod(tiles, gpu.sms * loop.resident)
    if not rest:
        return (full - 1) * turn(loop.resident, False) + turn(loop.resident, True)
    return full * turn(loop.resident, False) + turn(cdiv(rest, gpu.sms), True)


def product_terms(loop: Loop, gpu: GPU, tiles: int, steps: float, moved: float) -> dict[str, float]:
    """Return the seconds that the SMs, the memory and the power limit each take for a product.

    Args:
        loop: one program's loop.
        gpu: on which it runs.
        tiles: of the whole product; each part of a divided sum counts as a tile.
        steps: of each.
        moved: bytes that are read from memory and written to it.
    """
    clocks = busy_clocks(loop, step_of(loop, gpu), gpu, tiles, steps)
    return {
        "sms": clocks / gpu.clock,
        "memory": moved / (MEMORY_SHARE * gpu.bandwidth),
        "power": 2 * loop.m * loop.n * loop.k * steps * tiles / gpu.ceiling,
    }
