"""Barriers of a CTA's threads, and the registers that warps hand to each other.

    bar.sync 0              all threads of the CTA wait for each other
    barrier.sync 1, 128     128 threads meet at barrier 1 (there are 16): a part of the warps
    barrier.arrive 1, 128   is counted there and goes on

What threads did before a barrier is ordered before what any of them does behind it. With warp
specialisation the warps that only start copies need few registers: setmaxnreg.dec gives some back
to the CTA's pool, and setmaxnreg.inc of the others waits until the pool has enough for them. PTX
has as many registers as it likes, and ptxas moves values to memory (it spills) where a warp holds
fewer. But what one instruction names has to be there at once, and the machine looks at that.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tilelab.perf.machine import types
from tilelab.perf.machine.collectives import whole_warps
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.ptx import Instruction, Program, names_of
from tilelab.perf.machine.units import FREE, WAITS, Unit

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core

U32 = np.dtype(np.uint32)
MOST = 16  # barriers of a CTA


class Barrier:
    """One barrier of one CTA: how many threads it expects, and who has come."""

    def __init__(self, inst: Instruction, expected: int | None) -> None:
        self.inst, self.expected = inst, expected  # None: all threads that have not ended
        self.came: list[tuple[Unit, np.ndarray, bool]] = []  # the last: it waits

    @property
    def count(self) -> int:
        """How many threads have come."""
        return sum(lanes.size for _, lanes, _ in self.came)


def build(inst: Instruction, core: "Core") -> Callable:
    """bar.sync, barrier.sync, and their .arrive forms."""
    parts = [part for part in inst.parts if part not in ("cta", "aligned")]
    if parts[-1] not in ("sync", "arrive"):
        raise UnknownInstruction(f"{inst.where}: this form of barrier is not known")
    waits = parts[-1] == "sync"
    number = core.read(inst.operands[0], U32)
    expects = core.read(inst.operands[1], U32) if len(inst.operands) > 1 else None

    def meet(unit: Unit, mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        numbers = np.broadcast_to(number(unit), unit.n)[lanes]
        counts = None if expects is None else np.broadcast_to(expects(unit), unit.n)[lanes]
        ctas = unit.cta[lanes]
        if waits:
            core.set(unit, mask, WAITS)
        for key in np.unique(numbers.astype(np.int64) << 32 | ctas):
            cta, at = int(key & 0xFFFFFFFF), int(key >> 32)
            mine = (ctas == cta) & (numbers == at)
            if at >= MOST:
                core.fail(inst, unit, lanes[mine], f"barrier {at}: a CTA has 0 to {MOST - 1}")
            expected = None if counts is None else int(counts[mine][0])
            if expected is not None and (expected % 32 or not expected):
                core.fail(inst, unit, lanes[mine], f"a barrier of {expected} threads: it has to "
                          "be a multiple of 32")  # fmt: skip
            barrier = core.barriers.setdefault((cta, at), Barrier(inst, expected))
            if barrier.expected != expected:
                core.fail(inst, unit, lanes[mine], f"barrier {at} expects {expected} threads here "
                          f"and {barrier.expected} at {barrier.inst.where}")  # fmt: skip
            barrier.came.append((unit, lanes[mine], waits))
        open_all(core)

    return meet


def open_all(core: "Core") -> None:
    """Open every barrier at which all expected threads have come."""
    met = []
    for key, barrier in list(core.barriers.items()):
        expected = barrier.expected
        if expected is None:
            expected = core.threads - int(core.exited[key[0]])
        if barrier.count < expected:
            continue
        if barrier.count > expected:
            unit, lanes, _ = barrier.came[-1]
            core.fail(barrier.inst, unit, lanes, f"{barrier.count} threads came to barrier "
                      f"{key[1]}, which expects {expected}")  # fmt: skip
        del core.barriers[key]
        met.append(np.concatenate([unit.gid[lanes] for unit, lanes, _ in barrier.came]))
        for unit, lanes, waits in barrier.came:
            if waits:
                unit.doing[lanes] = FREE
                unit.able = True
    for size in {gids.size for gids in met}:
        core.races.barrier(np.stack([gids for gids in met if gids.size == size]))


class Registers(NamedTuple):
    """How many registers a thread of each warp may use, and what is free, by CTA."""

    held: np.ndarray
    pool: np.ndarray
    short: list

    @classmethod
    def begin(cls, ctas: int, warps: int, limit: int) -> "Registers":
        """As a CTA begins: `limit` for every thread."""
        return cls(np.full((ctas, warps), limit), np.zeros(ctas, np.int64), [])


def build_setmaxnreg(inst: Instruction, core: "Core") -> Callable:
    """setmaxnreg.inc and .dec: each warp of a warpgroup changes how many registers it may use."""
    if not core.program.max_registers:
        raise UnknownInstruction(f"{inst.where}: setmaxnreg needs a kernel with .maxnreg")
    grows, wanted = inst.parts[1] == "inc", inst.operands[0].value

    def change(unit: Unit, mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        for lane in lanes[::32]:
            cta, warp = int(unit.cta[lane]), int(unit.thread[lane]) // 32
            held = int(core.registers.held[cta, warp])
            if (wanted < held) if grows else (wanted > held):
                core.fail(inst, unit, lane, f"a thread of warp {warp} has {held} registers already")
            if grows:
                core.set(unit, np.isin(unit.lanes, lane + np.arange(32)), WAITS)
                core.registers.short.append((unit, lane, cta, warp, wanted))
            else:
                core.registers.held[cta, warp] = wanted
                core.registers.pool[cta] += 32 * (held - wanted)
        _grant(core)

    return change


def _grant(core: "Core") -> None:
    """Give free registers to the warps that wait for them."""
    held, pool, short = core.registers
    for request in list(short):
        unit, lane, cta, warp, wanted = request
        more = 32 * (wanted - int(held[cta, warp]))
        if more <= pool[cta]:
            short.remove(request)
            pool[cta] -= more
            held[cta, warp] = wanted
            unit.doing[lane : lane + 32] = FREE
            unit.able = True


def crowded(program: Program) -> dict[int, tuple[Instruction, int]]:
    """The blocks in which one instruction names more registers than some warp may hold.

    Returns:
        By block: the instruction that names most, and how many of 32 bits these are.
    """
    limits = [i.operands[0].value for b in program.blocks for i in b if i.op.startswith("setmaxnr")]
    found = {}
    for number, block in enumerate(program.blocks if limits else ()):
        counts = [_named(inst, program.registers) for inst in block]
        if counts and max(counts) > min(limits):
            most = counts.index(max(counts))
            found[number] = block[most], counts[most]
    return found


def _named(inst: Instruction, registers: dict[str, str]) -> int:
    """How many registers of 32 bits an instruction names; predicates are kept elsewhere."""
    names = {name for operand in inst.operands for name in names_of(operand)} & registers.keys()
    kinds = [registers[name] for name in names if registers[name] != "pred"]
    return -(-sum(types.of(kind).itemsize for kind in kinds) // 4)


def check_registers(
    core: "Core", most: tuple[Instruction, int], unit: Unit, mask: np.ndarray | None
) -> None:
    """Fail if a warp holds fewer registers than an instruction ahead of it names."""
    inst, needed = most
    lanes = (unit.lanes if mask is None else np.flatnonzero(mask))[::32]
    held = core.registers.held[unit.cta[lanes], unit.thread[lanes] // 32]
    if (held < needed).any():
        short = int(np.flatnonzero(held < needed)[0])
        core.fail(inst, unit, lanes[short], f"needs {needed} registers of a thread at once, and "
                  f"its warp holds {held[short]}")  # fmt: skip
