"""Why a barrier, a fence or an mbarrier.inval that is missing changes nothing.

`Intervals` lists which bytes each thread touches in one run, between its barriers and fences. Then
a barrier is needless if no byte is touched on both sides of it by two threads, one of which writes.
Again there is no clock, and nothing of races.py but the calls that it gets.

What a barrier has to order of an asynchronous operation is its beginning, after what other threads
did before, and its end, where its thread has waited for it, before what they do next. All threads
of a warpgroup wait for a wgmma that is theirs together: to its end the warpgroup is one thread. The
end of a TMA load is left out: no barrier, but an mbarrier orders what comes behind it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.tools.ptx_fault_cases import Launch
from tests.tools.ptx_fault_kinds import Fault
from tests.tools.ptx_fault_orders import (
    BEGIN,
    BEGIN_COPY,
    BUILD_BARRIER,
    END,
    END_OF_GROUP,
    NOW,
    Flights,
    bytes_of,
)
from tests.tools.ptx_fault_reasons import changed, lanes_of
from tilelab.perf.machine import core
from tilelab.perf.machine.ptx import Instruction


class Intervals(Flights):
    """The accesses of one run and its barriers, in their order.

    Attributes:
        accesses: (space, inst, gids, offsets, size, writes, moment), in the order of the run.
        meetings: (how many accesses came before, the barrier's instruction, gids); None in place of
            an instruction is the beginning of a batch of CTAs.
        fences: fence.proxy.async, likewise.
        mixed: barriers, by their index, at which threads meet that come to different ones.
    """

    def prepare(self) -> None:
        self.accesses: list[tuple] = []
        self.meetings: list[tuple[int, Instruction | None, np.ndarray]] = []
        self.fences: list[tuple[int, Instruction | None, np.ndarray]] = []
        self.now: Instruction | None = None
        self.comes = np.full(self.machine.ctas * self.machine.threads, -1)  # to which barrier
        self.mixed: set[int] = set()
        races, machine = self.machine.races, self.machine
        meet, begin = races.barrier, races.next_batch

        def met(gids: np.ndarray) -> None:
            self.meetings += [(len(self.accesses), self.now, np.sort(group)) for group in gids]
            for group in gids:
                kinds = set(self.comes[group].tolist())
                self.mixed |= kinds if len(kinds) > 1 else set()
            meet(gids)

        def next_batch(first_cta: int) -> None:  # other CTAs take the same numbers
            everybody = np.arange(machine.ctas * machine.threads).reshape(machine.ctas, -1)
            begun = [(len(self.accesses), None, group) for group in everybody]
            self.meetings += begun
            self.fences += begun
            begin(first_cta)

        races.barrier, races.next_batch = met, next_batch

    def tell(self, space, inst, gids, offsets, size, writes, moment) -> None:
        access = space, inst, np.array(gids), np.array(offsets), size, writes, moment
        self.accesses.append(access)

    def barrier(self, inst: Instruction, machine: core.Core) -> Callable:
        return functools.partial(self.meet, inst, BUILD_BARRIER(inst, machine))

    def wrap(self, inst: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if inst.op.startswith("bar.warp"):
            return functools.partial(self.meet, inst, handler)
        if inst.op.startswith("fence.proxy.async") and "::generic" not in inst.op:
            return functools.partial(self.fence, inst, handler)
        return super().wrap(inst, machine, handler)

    def fence(self, inst: Instruction, handler: Callable, unit: Any, mask: Any) -> None:
        gids = unit.gid[lanes_of(unit, mask)]
        for cta in np.unique(gids // self.machine.threads):
            here = gids[gids // self.machine.threads == cta]
            self.fences.append((len(self.accesses), inst, here))
        handler(unit, mask)

    def meet(self, inst: Instruction, handler: Callable, unit: Any, mask: Any) -> None:
        self.now = inst
        self.comes[unit.gid[lanes_of(unit, mask)]] = self.machine.index(inst)
        handler(unit, mask)

    def conflict(self, barrier: Instruction) -> bool:
        """Do two of its threads touch one byte on both sides of this barrier, one of them writing?

        A side reaches to the next barrier at which all of its threads meet.
        """
        for i, (at, inst, gids) in enumerate(self.meetings):
            if inst is not barrier:
                continue
            first, last = self._sides(self.meetings, i)
            before = self._touched(self.accesses[first:at], gids, (NOW, END, END_OF_GROUP))
            after = self._touched(self.accesses[at:last], gids, (NOW, BEGIN, BEGIN_COPY))
            if any(
                _conflict(before[space], after[space]) for space in before.keys() & after.keys()
            ):
                return True
        return False

    def between_proxies(self, fence: Instruction) -> bool:
        """Does a CTA touch a byte through the generic proxy before a fence, and the other behind?

        One of them has to write. A side reaches to the next fence by all of its threads.
        """
        threads = np.arange(self.machine.threads)
        for i, (at, inst, gids) in enumerate(self.fences):
            if inst is not fence:
                continue
            first, last = self._sides(self.fences, i)
            cta = gids[0] // threads.size * threads.size + threads
            before = self._touched(self.accesses[first:at], cta, (NOW, END), through_async=False)
            after = self._touched(self.accesses[at:last], cta, (BEGIN,))
            before, after = (x.get("shared", np.empty((0, 3), np.int64)) for x in (before, after))
            for x, y in ((before[before[:, 2] == 1], after), (before, after[after[:, 2] == 1])):
                if np.intersect1d(x[:, 0], y[:, 0]).size:
                    return True
        return False

    def _sides(self, events: list[tuple], i: int) -> tuple[int, int]:
        """The accesses from the event before to the one behind that have all of its threads."""
        gids, ends = events[i][2], [0, len(self.accesses)]
        for side, numbers in enumerate((range(i - 1, -1, -1), range(i + 1, len(events)))):
            for number in numbers:
                at, _, group = events[number]
                if group.size >= gids.size and np.isin(gids, group).all():
                    ends[side] = at
                    break
        return ends[0], ends[1]

    def _touched(
        self, accesses: list[tuple], gids: np.ndarray, moments: tuple[int, ...],
        through_async: bool = True,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """By space, rows of (granule, thread, writes) of these threads.

        A granule is the smallest access of the kernel. A warpgroup is the thread -1 - its number.
        """
        rows: dict[str, list[np.ndarray]] = {}
        for space, _, who, offsets, size, writes, moment in accesses:
            if moment not in moments:
                continue
            if moment == END and not writes and not through_async:  # of a TMA store
                continue
            mine = np.isin(who, gids)
            if moment == END_OF_GROUP:
                who = -1 - who // 128
            if not mine.any():
                continue
            grain = self.machine.races.shadows[space].grain
            each = max(1, size // grain)
            table = np.empty((np.count_nonzero(mine) * each, 3), np.int64)
            table[:, 0] = bytes_of(offsets[mine] // grain, each)
            table[:, 1], table[:, 2] = np.repeat(who[mine], each), writes
            rows.setdefault(space, []).append(table)
        return {space: np.concatenate(tables) for space, tables in rows.items()}


def _conflict(before: np.ndarray, after: np.ndarray) -> bool:
    """Is a granule touched in both by different threads, and written in one of them?"""
    return _by_two(before[before[:, 2] == 1], after) or _by_two(before, after[after[:, 2] == 1])


def _by_two(x: np.ndarray, y: np.ndarray) -> bool:
    """Is some granule of both touched by two different threads?"""
    both = np.intersect1d(x[:, 0], y[:, 0])
    if not both.size:
        return False
    for part in (x[x[:, 1] >= 0], x[x[:, 1] < 0]):
        if part.size and _differ(part, y, both):
            return True
    return False


def _differ(x: np.ndarray, y: np.ndarray, both: np.ndarray) -> bool:
    x, y = (table[np.isin(table[:, 0], both)] for table in (x, y))
    threads = y[:, 1] if x[:, 1].min(initial=0) >= 0 else -1 - y[:, 1] // 128
    lowest, highest = {}, {}
    size = both.size
    for name, place, who in (("x", x[:, 0], x[:, 1]), ("y", y[:, 0], threads)):
        at = np.searchsorted(both, place)
        lowest[name], highest[name] = np.full(size, 2**40), np.full(size, -(2**40))
        np.minimum.at(lowest[name], at, who)
        np.maximum.at(highest[name], at, who)
    touched = (highest["x"] > -(2**40)) & (highest["y"] > -(2**40))
    one = (lowest["x"] == highest["x"]) & (lowest["y"] == highest["y"])
    one &= lowest["x"] == lowest["y"]
    return bool((touched & ~one).any())


def intervals_of(launch: Launch, schedule: str = "lockstep") -> Intervals:
    """Those of a launch; kept until another launch comes."""
    if not _KEPT or _KEPT[0] is not launch:
        _KEPT[:] = launch, {}
    if schedule not in _KEPT[1]:
        _KEPT[1][schedule] = Intervals(launch, schedule, 0)
    return _KEPT[1][schedule]


_KEPT: list[Any] = []


def nothing_to_order(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Do any two threads touch one byte on both sides of the barrier, one of them writing?

    A barrier to which threads come from several instructions is needed: without one of these, who
    waits at the others waits for ever, or meets those that come to the next. Where elect.sync
    chooses a thread, it is the first lane of a warp in lockstep, and the last when late: two runs.
    """
    if fault.kind != "barrier removed":
        return ""
    barrier, elects = changed(launch, fault), False
    for block in launch.program.blocks:
        elects |= any(inst.op.startswith("elect") for inst in block)
    for schedule in ("lockstep", "late")[: 1 + elects]:
        seen = intervals_of(launch, schedule)
        if seen.machine.index(barrier) in seen.mixed or seen.conflict(barrier):
            return ""
    return "no byte is touched on both sides of it by two threads, one of which writes"


def never_touched_again(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """mbarrier.inval: does its CTA use the bytes of the mbarrier once more?"""
    if fault.kind != "mbarrier.inval removed":
        return ""
    seen = intervals_of(launch)
    index = seen.machine.index(changed(launch, fault))
    batches = [at for at, inst, _ in seen.meetings if inst is None]
    for i, (space, inst, _, offsets, size, *_) in enumerate(seen.accesses):
        if inst != index:
            continue
        own = bytes_of(offsets, size)
        end = next((at for at in batches if at > i), None)
        for other_space, _, _, others, other_size, *_ in seen.accesses[i + 1 : end]:
            if other_space == space and np.isin(bytes_of(others, other_size), own).any():
                return ""
    return "nobody touches its bytes again before the CTA ends"


def nothing_passes(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """fence.proxy.async: is a byte touched through one proxy before it and the other behind it?"""
    if fault.kind != "fence removed" or not changed(launch, fault).op.startswith(
        "fence.proxy.async"
    ):
        return ""
    if intervals_of(launch).between_proxies(changed(launch, fault)):
        return ""
    return "no byte is touched through the generic proxy before it and the async proxy behind it"
