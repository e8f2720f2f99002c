"""Which function builds which instruction, of those that do more than compute a register."""

import functools
from collections.abc import Callable

from tilelab.perf.machine import collectives, memory
from tilelab.perf.machine.copies import async_copies, bulk_copies, mbarriers
from tilelab.perf.machine.ptx import ENDS_BLOCK, Instruction
from tilelab.perf.machine.tensor import tensor_cores, wgmma

HANDLERS: dict[str, Callable] = {
    **memory.HANDLERS,
    **collectives.HANDLERS,
    **async_copies.HANDLERS,
    **bulk_copies.HANDLERS,
    **mbarriers.HANDLERS,
    **tensor_cores.HANDLERS,
    **wgmma.HANDLERS,
}
IGNORED = ("prefetch", "discard", "applypriority", "createpolicy", "nanosleep", "pragma")


@functools.cache
def find(op: str) -> Callable | None:
    """The builder with the longest prefix of an opcode, or None: then it is arithmetic."""
    parts = op.split(".")
    for n in range(len(parts), 0, -1):
        if (found := HANDLERS.get(".".join(parts[:n]))) is not None:
            return found
    return None


def ends_block(inst: Instruction) -> bool:
    """Whether the instruction decides where its threads go, or makes them wait."""
    return inst.op.startswith(ENDS_BLOCK) and not inst.op.startswith("bar.warp")
