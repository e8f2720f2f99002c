"""A machine that executes the PTX of Triton kernels with no GPU, and says what they do wrong.

    from tilelab.perf import machine

    report = machine.run(kernel, (grid,), (x, y, n), dict(BLOCK=128), target="sm_90")
    print(report)           # y is changed as on a GPU; races, missing fences, counts by source line

Triton's interpreter executes the Python of a kernel. It knows no warps, no shared memory and no
barriers: the compiler adds them later. This machine executes what the compiler has made, for sm_80
(Ampere) and sm_90 (Hopper), instruction by instruction, in NumPy:

    ptx.py                the text becomes instructions
    blocks.py, core.py    runs of instructions become Python functions; whose turn it is
    registers/            what an instruction computes: integers, floats, conversions, rounding
    memory.py             loads and stores: in bounds, aligned, initialised
    collectives.py        what the 32 threads of a warp exchange; barriers.py: what they wait for
    tensor/               tensor cores: ldmatrix, mma.sync; Hopper's wgmma, from shared memory
    copies/               copies that go on meanwhile: cp.async; TMA and its mbarriers
    races.py, shadows.py  which accesses nothing orders; releases.py: how atomics order them
    counts.py             sectors, bank conflicts, instructions
    launch.py, report.py  a kernel's arguments on their way in, and what came of it

What it proves: the values, layouts, addresses, barriers and copies of the PTX are right, for the
inputs that were run, in every order of warps that was tried; and no two accesses to memory depended
on that order. What it does not: that ptxas translates it rightly, how long anything takes, and that
our reading of the PTX ISA is right. docs/verification.md has the table.
"""

from tilelab.perf.machine.compiler import SHARED
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.launch import executing, run
from tilelab.perf.machine.report import Coverage, Finding, Report, statement

TARGETS = tuple(SHARED)  # whose PTX is executed

__all__ = [
    "TARGETS", "Coverage", "Finding", "MachineFault", "Report", "UnknownInstruction", "executing",
    "run", "statement",
]  # fmt: skip
