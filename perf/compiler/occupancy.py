"""How many programs share an SM: what registers and shared memory leave room for.

An SM is one of the GPU's cores, and a warp is 32 threads that run together. While one warp waits
for memory another can run, so more resident warps hide more latency. The blocks that fit at a time
also decide how many waves a grid takes. Both follow from what the compiler used, without a GPU.

The arithmetic is that of NVIDIA's cuda_occupancy.h; tests/perf/test_occupancy.py holds it to that
file. AMD's compute units follow the same rules with other numbers.
"""

from typing import NamedTuple

from tilelab.perf.errors import PerfError
from tilelab.perf.work import gpus


class Occupancy(NamedTuple):
    """What is resident on one SM at a time.

    Attributes:
        blocks: programs (AMD: workgroups); 0 if not even one fits.
        warps: their warps together.
        fraction: of the warps that the SM could hold, 0 to 1.
        limit: what stands in the way of another block: "warps" (all slots are taken), "registers",
            "shared memory" or "blocks". With blocks == 0: "does not fit: shared memory",
            "does not fit: registers" or "does not fit: threads".
    """

    blocks: int
    warps: int
    fraction: float
    limit: str


def occupancy(target: str, threads: int, registers: int, shared: int) -> Occupancy:
    """The occupancy of a kernel.

    Args:
        target: "sm_90" or "gfx942"; gpus.LIMITS lists them.
        threads: of one program: num_warps times the size of a warp.
        registers: of a thread; on AMD vector registers, ordinary and accumulation ones together.
        shared: bytes of shared memory of one program.

    Raises:
        PerfError: an unknown target, no threads, or a negative size.

    Source: cuda_occupancy.h of the CUDA toolkit, cudaOccMaxActiveBlocksPerMultiprocessor. For AMD,
    LLVM's AMDGPUBaseInfo.cpp, getNumWavesPerEUWithNumVGPRs and getMaxWorkGroupsPerCU.

    Example:
        >>> occupancy("sm_90", threads=256, registers=168, shared=147 * 1024)
        Occupancy(blocks=1, warps=8, fraction=0.125, limit='registers')
    """
    limits = gpus.limits(target)
    if threads < 1 or registers < 0 or shared < 0:
        raise PerfError(
            "occupancy needs threads >= 1, registers >= 0 and shared >= 0: "
            f"got {threads}, {registers} and {shared}"
        )
    if threads > limits.threads_per_block:
        return Occupancy(0, 0, 0.0, "does not fit: threads")

    # "warps" comes first: where it binds together with another, all slots are taken.
    warps = -(-threads // limits.warp)
    room = {
        "warps": limits.warps // warps,
        "registers": _by_registers(limits, warps, registers),
        "shared memory": _by_shared(limits, shared),
        "blocks": limits.blocks,
    }
    limit = min(room, key=room.get)
    blocks = room[limit]
    if blocks == 0:
        return Occupancy(0, 0, 0.0, f"does not fit: {limit}")
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limit)


def _by_registers(limits: gpus.Limits, warps: int, registers: int) -> int:
    if registers > limits.registers_per_thread:
        return 0
    # Each partition has registers of its own, so what is left over in two does not make a warp.
    one_warp = _round_up(max(registers, 1) * limits.warp, limits.register_granule)
    resident = limits.partitions * (limits.registers // limits.partitions // one_warp)
    return resident // warps


def _by_shared(limits: gpus.Limits, shared: int) -> int:
    taken = _round_up(shared + limits.shared_reserved, limits.shared_granule)
    return limits.shared // taken if taken else limits.blocks


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
