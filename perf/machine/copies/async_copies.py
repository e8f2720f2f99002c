"""cp.async: copies from global to shared memory that pass no register.

An ordinary load keeps a register busy until its value has come. cp.async (since sm_80) names where
the value goes in shared memory, and the thread goes on. It says in groups what it waits for:

    cp.async.cg.shared.global [s0], [g0], 16, n     copy n bytes of 16; zeros for the rest
    cp.async.commit_group                           group 0 is all that came before
    cp.async.cg.shared.global [s1], [g1], 16, n
    cp.async.commit_group                           group 1
    cp.async.wait_group 1                           until at most 1 group is under way: group 0 is
                                                    there
    bar.sync 0                                      ... for the other threads, too

So a loop keeps the copies of the next tiles under way while it works on this one. Groups are each
thread's own, and wait_group says nothing about what other threads have copied: that is what the
bar.sync is for, and leaving it out is a race (races.py).

Here a copy lands as late as it may, when its thread waits for its group. Until then its place holds
the bytes of NaNs and counts as not written.

`n` is 0 where a load is masked: the address may be anything then, and is not looked at.

Source: PTX ISA 8.8, section 9.7.9.25.3.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tilelab.perf.machine import memory
from tilelab.perf.machine.errors import UnknownInstruction, refuse
from tilelab.perf.machine.ptx import Immediate, Instruction, Register

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core, Unit

Handler = Callable[["Unit", np.ndarray | None], None]
# NumPy dtypes that move so many bytes at once; their values are never looked at.
WORDS = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64), 16: np.dtype(np.complex128)}


@dataclasses.dataclass
class Operation:
    """What one instruction has started for some lanes of a unit.

    Attributes:
        inst: the instruction.
        lanes: of the unit.
        groups: for each of them, the group that it belongs to.
        land: is called with a mask of `lanes`, for those that have waited for it.
        waiting: those that have not.
    """

    inst: Instruction
    lanes: np.ndarray
    groups: np.ndarray
    land: Callable[[np.ndarray], None]
    waiting: np.ndarray


class Groups:
    """What the threads of a unit have started, in groups, and not yet waited for.

    Each thread counts its own groups. Most of the time all lanes have the same number.
    """

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)
        self.operations: list[Operation] = []

    def start(self, inst: Instruction, lanes: np.ndarray, land: Callable) -> None:
        """An operation begins; it is in the group that comes next."""
        waiting = np.ones(lanes.size, bool)
        self.operations.append(Operation(inst, lanes, self.committed[lanes], land, waiting))

    def commit(self, mask: np.ndarray | None) -> None:
        """These lanes close a group."""
        self.committed[... if mask is None else mask] += 1

    def wait(self, mask: np.ndarray | None, keep: int) -> None:
        """These lanes wait until at most `keep` of their groups are under way."""
        for operation in self.operations:
            over = operation.groups < self.committed[operation.lanes] - keep
            over &= operation.waiting
            if mask is not None:
                over &= mask[operation.lanes]
            if over.any():
                operation.land(over)
                operation.waiting &= ~over
        self.operations = [o for o in self.operations if o.waiting.any()]


POISON = {
    size: np.full(size, memory.POISON, np.uint8).view(word)[0] for size, word in WORDS.items()
}
NOTHING = {size: np.zeros(size, np.uint8).view(word)[0] for size, word in WORDS.items()}


def groups_of(unit: "Unit", kind: str) -> Groups:
    """The groups of this kind that belong to a unit."""
    if kind not in unit.state:
        unit.state[kind] = Groups(unit.n)
    return unit.state[kind]


def build_commit(kinds: tuple[str, ...]) -> Callable:
    """commit_group closes a group of each of these kinds."""

    def build(inst: Instruction, core: "Core") -> Handler:
        del inst, core

        def commit(unit: "Unit", mask: np.ndarray | None) -> None:
            for kind in kinds:
                groups_of(unit, kind).commit(mask)

        return commit

    return build


def build_wait_group(inst: Instruction, core: "Core") -> Handler:
    """cp.async.wait_group N; wait_all is a commit_group and a wait_group 0."""
    del core
    everything = "wait_all" in inst.parts
    keep = 0 if everything else constant(inst, 0)

    def wait(unit: "Unit", mask: np.ndarray | None) -> None:
        groups = groups_of(unit, "cp.async")
        if everything:
            groups.commit(mask)
        groups.wait(mask, keep)

    return wait


def constant(inst: Instruction, index: int) -> int:
    """An operand that has to be a number in the text."""
    operand = inst.operands[index]
    if not isinstance(operand, Immediate):
        raise UnknownInstruction(f"{inst.where}: operand {index} has to be a number")
    return operand.value


def build_copy(inst: Instruction, core: "Core") -> Handler:
    """cp.async: each thread copies 4, 8 or 16 bytes."""
    size = constant(inst, 2)
    dtype, index = WORDS[size], core.index(inst)
    given = inst.operands[3] if len(inst.operands) > 3 else Immediate(size)
    hints = {"cp", "async", "ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B",
             "L2::256B"}  # fmt: skip
    if len(inst.operands) > 4 or set(inst.parts) - hints:
        raise UnknownInstruction(f"{inst.where}: this form of cp.async is not supported")
    if isinstance(given, Register) and core.type_of(given.name).kind == "b":
        raise UnknownInstruction(f"{inst.where}: a predicate ignore-src is not supported")
    target, source = core.address(inst.operands[0]), core.address(inst.operands[1])
    length = core.read(given, np.dtype(np.uint32))
    shared, global_ = core.shared, core.global_
    places, known = shared.bytes.view(dtype), shared.initialised.view(dtype)

    def copy(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        gids, warps = unit.gid[lanes], unit.thread[lanes] // 32
        lengths = np.broadcast_to(length(unit), unit.n)[lanes].astype(np.int64)
        if (lengths > size).any():
            core.fail(inst, unit, lanes[lengths > size], "cp.async of more bytes than there are")
        to = shared.offsets(core, inst, unit, lanes, target(unit)[lanes], size)
        asked = np.flatnonzero(lengths)
        begins = global_.offsets(core, inst, unit, lanes[asked], source(unit)[lanes[asked]], size)
        time = core.races.tick()
        agents = np.array([core.races.agent("cp.async", w) for w in unit.warps])
        agents = agents[warps - unit.warps[0]]
        core.races.read("global", index, gids[asked], begins, size)
        core.races.copy_as(index, agents, time, gids, to, size)
        if core.counting:
            core.counts.access(inst, "global", unit, lanes[asked], begins, size)
            core.counts.wavefronts(inst, lanes, to, size)  # zeros are written, too
        places[to // size] = POISON[size]
        known[to // size] = NOTHING[size]

        def land(over: np.ndarray) -> None:
            rows = np.zeros((lanes.size, size), np.uint8)
            rows[asked] = global_.bytes.view(dtype)[begins // size].view(np.uint8).reshape(-1, size)
            if (lengths[asked] < size).any():
                rows[np.arange(size) >= lengths[:, None]] = 0
            places[to[over] // size] = rows.view(dtype)[over, 0]
            memory.mark(shared, to[over], size)
            core.races.learn(gids[over], agents[over], time, own=True)

        groups_of(unit, "cp.async").start(inst, lanes, land)

    must_be_waited_for(inst, core, "cp.async")
    return copy


def must_be_waited_for(inst: Instruction, core: "Core", kind: str) -> None:
    """Report if a CTA ends, and its shared memory with it, before a copy that uses it."""

    def ending(unit: "Unit") -> None:
        if any(operation.inst is inst for operation in groups_of(unit, kind).operations):
            core.report("unfinished", inst, "a CTA ends without waiting for this copy")

    core.endings.append(ending)


HANDLERS = {
    "cp": refuse("this copy is"),
    "cp.async.ca": build_copy,
    "cp.async.cg": build_copy,
    "cp.async.commit_group": build_commit(("cp.async",)),
    "cp.async.wait_group": build_wait_group,
    "cp.async.wait_all": build_wait_group,
}
