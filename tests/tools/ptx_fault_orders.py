"""Why a wait or a commit that is missing changes nothing: more of ptx_fault_reasons.py.

`Flights` follows one run: which bytes of shared memory an asynchronous operation touches while it
is on its way, who else touches them meanwhile, and at which wait it lands. It is a plain list: no
clock, and nothing of races.py but the calls that it gets.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from tests.tools.ptx_fault_cases import Launch
from tests.tools.ptx_fault_kinds import Fault
from tests.tools.ptx_fault_reasons import changed, outside, planted, run, wrapped
from tilelab.perf.machine import barriers, core
from tilelab.perf.machine.copies import bulk_copies
from tilelab.perf.machine.copies.async_copies import groups_of
from tilelab.perf.machine.copies.bulk_copies import READS
from tilelab.perf.machine.ptx import Instruction
from tilelab.perf.machine.tensor import wgmma

# Moments of an access. An asynchronous operation begins and ends; a cp.async goes through the
# generic proxy (COPY), the others through the async proxy. A wgmma ends for its whole warpgroup.
NOW, BEGIN, BEGIN_COPY, END, END_OF_GROUP = range(5)
ORDERS = (("lockstep", 0), ("late", 0), ("random", 1))


def heard(machine: core.Core, tell: Callable) -> None:
    """Call tell(space, inst, gids, offsets, size, writes, moment) at each access.

    The moment is NOW, or an asynchronous operation's beginning or end.
    """
    races = machine.races

    def hear(name: str, writes: bool) -> None:
        original = getattr(races, name)

        def ordinary(space, inst, gids, offsets, size, *more):
            tell(space, inst, gids, offsets, size, writes, NOW)
            return original(space, inst, gids, offsets, size, *more)

        def started(space, inst, agent, time, knower, offsets, size, *more, **named):
            gids = np.broadcast_to(knower, offsets.size)
            moment = NOW if named.get("proxy") == "generic" else BEGIN  # of an mbarrier
            tell(space, inst, gids, offsets, size, writes, moment)
            return original(space, inst, agent, time, knower, offsets, size, *more, **named)

        def copied(inst, agents, time, gids, offsets, size):
            tell("shared", inst, gids, offsets, size, writes, BEGIN_COPY)
            return original(inst, agents, time, gids, offsets, size)

        new = copied if name == "copy_as" else started if name.endswith("_as") else ordinary
        setattr(races, name, new)

    for name, writes in (
        ("read", False), ("write", True), ("update", True), ("read_as", False),
        ("write_as", True), ("copy_as", True),
    ):  # fmt: skip
        hear(name, writes)


def bytes_of(offsets: np.ndarray, size: int) -> np.ndarray:
    return (np.asarray(offsets).reshape(-1, 1) + np.arange(size)).ravel()


# --- waits and commits ----------------------------------------------------------------------------


class Flights:
    """What is on its way in one run.

    Attributes:
        touched: accesses to bytes that an operation on its way reads or writes, but two reads.
        landed: operations by the wait at which they landed; "" is the end of the CTA.
    """

    def __init__(self, launch: Launch, schedule: str, seed: int) -> None:
        self.touched, self.landed, self.at = 0, Counter(), ""
        with (
            wrapped(self.wrap),
            mock.patch.object(wgmma, "land", self.land_wgmma),
            mock.patch.object(barriers, "build", self.barrier),
        ):
            self.machine = launch.core(schedule=schedule, seed=seed)
            size = self.machine.shared.bytes.size
            self.written, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)
            heard(self.machine, self.tell)
            self.prepare()
            self.machine.run()

    def prepare(self) -> None:
        """Before the run."""

    def barrier(self, inst: Instruction, machine: core.Core) -> Callable:
        """What a barrier of the CTA does."""
        return BUILD_BARRIER(inst, machine)

    def tell(self, space, inst, gids, offsets, size, writes, moment) -> None:
        if space == "shared":
            at = bytes_of(offsets, size)
            self.touched += int(self.written[at].any() or (writes and self.read[at].any()))

    def wrap(self, inst: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if "wait_group" in inst.op or "wait_all" in inst.op:
            return functools.partial(self.wait, inst, handler)
        if inst.op.startswith(("cp.async.ca", "cp.async.cg")):
            target = machine.address(inst.operands[0])
            return functools.partial(self.copy, inst, machine, handler, target)
        if inst.op.startswith("cp.async.bulk.tensor") and "bulk_group" in inst.op:
            return functools.partial(self.store, inst, machine, handler)
        if inst.op.startswith("wgmma.mma_async"):
            return functools.partial(self.multiply, handler)
        return handler

    def wait(self, inst: Instruction, handler: Callable, unit: Any, mask: Any) -> None:
        self.at = str(inst.line)
        handler(unit, mask)
        self.at = ""

    def copy(self, inst, machine, handler, target, unit, mask) -> None:
        handler(unit, mask)
        operation = groups_of(unit, "cp.async").operations[-1]
        to = target(unit)[operation.lanes] + unit.cta[operation.lanes] * machine.shared.stride
        size = inst.operands[2].value
        self.follow(unit, operation, lambda over: to[over], size, self.written)

    def store(self, inst, machine, handler, unit, mask) -> None:
        before = len(groups_of(unit, READS).operations)
        boxes = []
        read_as = machine.races.read_as

        def noted(space, *given, **named):
            if space == "shared":
                boxes.append((given[4], given[5]))
            return read_as(space, *given, **named)

        machine.races.read_as = noted
        try:
            handler(unit, mask)
        finally:
            machine.races.read_as = read_as
        operations = groups_of(unit, READS).operations[before:]
        for operation, (offsets, size) in zip(operations, boxes, strict=True):
            self.follow(unit, operation, lambda over, offsets=offsets: offsets, size, self.read)

    def follow(
        self, unit: Any, operation: Any, where: Callable, size: int, marks: np.ndarray
    ) -> None:
        """Mark the bytes of an operation until it lands."""
        index, writes = self.machine.index(operation.inst), marks is self.written
        everything = np.ones(operation.lanes.size, bool)
        np.add.at(marks, bytes_of(where(everything), size), 1)
        land = operation.land

        def landed(over: np.ndarray) -> None:
            land(over)
            np.add.at(marks, bytes_of(where(over), size), -1)
            self.landed[self.at] += np.count_nonzero(over)
            gids = unit.gid[operation.lanes[over]]
            self.tell("shared", index, gids, where(over), size, writes, END)

        operation.land = landed

    def multiply(self, handler: Callable, unit: Any, mask: Any) -> None:
        handler(unit, mask)
        self.mark_wgmma(wgmma.queue(unit).issues[-1], 1)

    def mark_wgmma(self, issue: Any, by: int) -> None:
        for offsets in (issue.b, *([issue.a] if issue.form.a_reads is None else [])):
            np.add.at(self.read, bytes_of(offsets, 16), by)

    def land_wgmma(self, machine: core.Core, unit: Any, due: list) -> None:
        for issue in due:
            self.mark_wgmma(issue, -1)
            self.landed[self.at] += issue.groups.size
            index = machine.index(issue.form.inst)
            for group, *parts in zip(issue.groups, issue.a, issue.b, strict=True):
                for offsets in parts[issue.form.a_reads is not None :]:
                    who = np.full(offsets.size, unit.gid[group * 128])
                    self.tell("shared", index, who, offsets.ravel(), 16, False, END_OF_GROUP)
        LAND_WGMMA(machine, unit, due)


LAND_WGMMA, BUILD_BARRIER = wgmma.land, barriers.build
START_STORE = bulk_copies._start_store


def lands_elsewhere(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Without the wait or commit: does all land somewhere before anybody touches it?"""
    if fault.kind not in ("wait removed", "wait weakened", "commit removed"):
        return ""
    gone = Counter()
    for schedule, seed in ORDERS:
        before = Flights(launch, schedule, seed)
        after = Flights(planted(launch, fault), schedule, seed)
        lost = after.landed.total() < before.landed.total()
        if before.touched or after.touched or lost or after.landed[""] > before.landed[""]:
            return ""
        gone += before.landed - after.landed
        came = after.landed - before.landed
    if not gone:
        return "every asynchronous operation lands where it lands with it"
    lines = " and ".join(sorted(came, key=int))
    return f"another wait (PTX line {lines}) comes before anybody touches what lands there"


def same_boxes(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """TMA stores without their guard: do the other threads store the same boxes once more?

    And is their shared memory left alone until all of them have read it?
    """
    if fault.kind != "guard removed" or "bulk_group" not in fault.change[0].op:
        return ""
    inst, new, others = changed(launch, fault), fault.change[0], 0
    boxes: list[Any] = []

    def start(copies: Any, unit: Any, box: Any, time: int) -> None:
        boxes.append(box)
        START_STORE(copies, unit, box, time)

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not new:
            return handler
        machine.slot(inst.guard[0], np.dtype(bool))

        def watched(unit: Any, mask: Any) -> None:
            nonlocal others
            boxes.clear()
            handler(unit, mask)
            kept_out = outside(inst, unit)
            asked = {(box.shared, box.begin) for box in boxes if not kept_out[box.lane]}
            others += sum((box.shared, box.begin) not in asked for box in boxes)

        return watched

    with mock.patch.object(bulk_copies, "_start_store", start):
        run(planted(launch, fault), wrap)
    if others or any(Flights(planted(launch, fault), *order).touched for order in ORDERS):
        return ""
    return "the other threads store the same boxes once more, before anybody changes them"
