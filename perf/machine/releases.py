"""What programs tell each other by atomic operations, which alone can order them within a launch.

    CTA 0:  st.global [y]   bar.sync   atom.global.acq_rel.gpu.add.u32 %r1, [ticket], 1   %r1 = 0
    CTA 1:                             atom.global.acq_rel.gpu.add.u32 %r1, [ticket], 1   %r1 = 1
            ld.global [y]              it came after the one of CTA 0: ordered

An operation that *releases* leaves what its thread knows at the address. One that *acquires* takes
what is there (.acq_rel does both, .relaxed neither). So the last program to take a ticket knows
what all before it did, and may read their results. A barrier hands on what a thread has taken to
the other threads of its CTA.

Source: PTX ISA, "Memory Consistency Model": release and acquire patterns, causality order.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tilelab.perf.machine.ptx import Instruction

if TYPE_CHECKING:
    from tilelab.perf.machine.races import Races

RELEASES, ACQUIRES = {"acq_rel", "release"}, {"acq_rel", "acquire"}


class Told(NamedTuple):
    """What is known to be over. It is not changed, but replaced.

    Attributes:
        rows: for some CTAs, until when by agent (as a row of `Races.known`).
        times: for some threads of the grid, until when.
    """

    rows: dict[int, np.ndarray]
    times: dict[int, int]

    def __or__(self, other: "Told") -> "Told":
        """Both together."""
        rows = self.rows | {
            cta: np.maximum(row, self.rows.get(cta, row)) for cta, row in other.rows.items()
        }
        times = {
            thread: max(time, self.times.get(thread, time)) for thread, time in other.times.items()
        }
        return Told(rows, self.times | times)

    def has(self, cta: int, thread: int, agent: int, time: int) -> bool:
        """Whether what an agent did for a thread of a CTA at this time is over."""
        row = self.rows.get(cta)
        return self.times.get(thread, -1) >= time or (row is not None and row[agent] >= time)


NOTHING = Told({}, {})


class Releases:
    """Who has told whom, for the threads of the whole grid."""

    def __init__(self, races: "Races") -> None:
        self.races = races
        self.at: dict[int, Told] = {}  # by offset in global memory: what was released there
        self.known: dict[int, Told] = {}  # by thread of the grid: what it has acquired
        self.reads: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []

    def update(self, inst: Instruction, gids: np.ndarray, offsets: np.ndarray) -> None:
        """Threads do an atomic operation, one after the other in this order."""
        parts = set(inst.parts)
        if not parts & {"gpu", "sys"}:
            return
        races, time = self.races, self.races.tick()
        for gid, offset in zip(gids.tolist(), offsets.tolist(), strict=True):
            thread, cta = races.absolute(gid), races.cta_of(gid)
            if parts & ACQUIRES and offset in self.at:
                told = self.known[thread] = self.known.get(thread, NOTHING) | self.at[offset]
                if cta in told.rows:
                    races.known[gid] = np.maximum(races.known[gid], told.rows[cta])
            if parts & RELEASES:
                mine = Told({cta: races.known[gid].copy()}, {thread: time})
                mine |= self.known.get(thread, NOTHING)
                self.at[offset] = self.at.get(offset, NOTHING) | mine

    def barrier(self, gids: np.ndarray) -> None:
        """Threads meet, a row of `gids` for each meeting."""
        for row in self.races.absolute(gids).tolist() if self.known else ():
            told = NOTHING
            for thread in row:
                told |= self.known.get(thread, NOTHING)
            if told is not NOTHING and (told.rows or told.times):
                self.known |= dict.fromkeys(row, told)

    def note_reads(self, gids: np.ndarray, where: np.ndarray) -> None:
        """Threads read granules of global memory."""
        races = self.races
        self.reads.append((where, races.absolute(gids), races.warp_of[gids], races.now))

    def after_write(self, gid: int, thread: int, agent: int, time: int) -> bool:
        """Whether a thread knows that a write for another thread is over."""
        told = self.known.get(self.races.absolute(gid), NOTHING)
        return told.has(thread // self.races.threads, thread, agent, time)

    def after_reads(self, gid: int, granule: int, since: int) -> bool:
        """Whether a thread knows that all reads of a granule since that time are over."""
        races = self.races
        me, cta = races.absolute(gid), races.cta_of(gid)
        told = self.known.get(me, NOTHING)
        for where, threads, warps, time in self.reads:
            for i in np.flatnonzero(where == granule) if time >= since else ():
                thread, warp = int(threads[i]), int(warps[i])
                if thread == me or told.has(thread // races.threads, thread, warp, time):
                    continue
                if thread // races.threads != cta or races.known[gid, warp] < time:
                    return False
        return True


def needed(instructions: list[Instruction]) -> bool:
    """Whether a kernel has an atomic operation by which programs can be ordered."""
    return any(
        inst.parts[0] in ("atom", "red") and "global" in inst.parts
        and set(inst.parts) & (RELEASES | ACQUIRES)
        for inst in instructions
    )  # fmt: skip
