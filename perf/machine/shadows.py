"""What is remembered beside the bytes of a memory: who wrote each last, and who read it since.

Memory is divided into granules, as large as the kernel's smallest access. A write forgets nothing
of the reads before it: whoever writes next must be ordered after all of them, or after this write.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tilelab.perf.machine.races import Races

NOBODY, MANY = -1, -2  # instead of a thread: none, several


class Shadow:
    """The last write of each granule of `grain` bytes: agent, thread, time and instruction."""

    def __init__(self, size: int, grain: int) -> None:
        self.grain, self.count = grain, -(-size // grain)
        self.writer = np.full(self.count, NOBODY, np.int16)
        self.write_thread = np.zeros(self.count, np.int64)  # of the grid
        self.write_time = np.zeros(self.count, np.int32)
        self.write_by = np.full(self.count, -1, np.int32)
        self.read_by = np.full(self.count, -1, np.int32)

    def granules(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The granules of accesses of `size` bytes each, and how many each has."""
        first, each = offsets // self.grain, max(1, size // self.grain)
        return (first, 1) if each == 1 else ((first[:, None] + np.arange(each)).ravel(), each)

    def note_writes(self, inst: int, agent: Any, thread: Any, where: np.ndarray, time: int) -> None:
        """An agent writes, started by a thread of the grid."""
        self.writer[where] = agent
        self.write_thread[where] = thread
        self.write_time[where] = time
        self.write_by[where] = inst


class SharedShadow(Shadow):
    """Of shared memory: the last read by every agent; of a warp the thread that did it, or MANY."""

    def __init__(self, size: int, grain: int, agents: int, warps: int) -> None:
        super().__init__(size, grain)
        self.forget(agents, warps)

    def forget(self, agents: int, warps: int) -> None:
        """Nothing has been read; np.zeros takes no time until it is written to."""
        self.read_time = np.zeros((agents, self.count), np.int32)
        self.read_thread = np.zeros((warps, self.count), np.int32)  # of the batch

    def clear(self) -> None:
        """The next CTAs begin."""
        self.writer[:] = NOBODY
        self.forget(len(self.read_time), len(self.read_thread))

    def note_reads(self, races: "Races", inst: int, gids: np.ndarray, where: np.ndarray) -> None:
        """Threads read."""
        # One index into all of an array is half the work of two.
        at = races.warp_of[gids] * self.count + where
        thread, time = self.read_thread.reshape(-1), self.read_time.reshape(-1)
        alone = (thread[at] == gids) | (races.of_its_warp(gids) >= time[at])  # 0 if nobody has
        thread[at] = gids
        alone &= thread[at] == gids
        if not alone.all():
            thread[at[~alone]] = MANY
        time[at] = races.now
        self.read_by[where] = inst

    def note_reads_of(
        self, races: "Races", inst: int, agent: Any, time: int, gids: np.ndarray, where: np.ndarray
    ) -> None:
        """An agent reads, from `time` on."""
        self.read_time[agent, where] = time
        self.read_by[where] = inst

    def unordered_reads(self, races: "Races", gids: np.ndarray, where: np.ndarray) -> np.ndarray:
        """For each granule: some read of it is not known to be over to the thread that writes."""
        agents, warps = races.agents, len(self.read_thread)
        unknown = self.read_time[:agents, where] > races.known[gids, :agents].T
        if unknown.any():
            unknown[:warps] &= self.read_thread[:, where] != gids
        return unknown.any(0)

    def reads_after(self, times: np.ndarray, where: np.ndarray) -> np.ndarray:
        """For each granule: some warp has read it after its time, of times[granule, warp]."""
        return (self.read_time[: times.shape[1], where] > times.T).any(0)


class GlobalShadow(Shadow):
    """Of global memory: the last reads by one thread, several of one CTA, or of several CTAs."""

    def __init__(self, size: int, grain: int) -> None:
        super().__init__(size, grain)
        self.read_time = np.zeros(self.count, np.int32)
        self.read_thread = np.full(self.count, NOBODY, np.int64)  # of the grid
        self.read_cta = np.full(self.count, NOBODY, np.int32)

    def note_reads(self, races: "Races", inst: int, gids: np.ndarray, where: np.ndarray) -> None:
        """Threads read."""
        for row, me in (
            (self.read_thread, races.absolute(gids)),
            (self.read_cta, races.cta_of(gids)),
        ):
            before = row[where]
            row[where] = me
            alone = ((before == NOBODY) | (before == me)) & (row[where] == me)
            if not alone.all():
                row[where[~alone]] = MANY
        self.read_time[where] = races.now
        self.read_by[where] = inst

    def note_reads_of(
        self, races: "Races", inst: int, agent: int, time: int, gids: np.ndarray, where: np.ndarray
    ) -> None:
        """An agent reads; its reads of global memory are those of the thread that started it."""
        self.note_reads(races, inst, gids, where)

    def unordered_reads(self, races: "Races", gids: np.ndarray, where: np.ndarray) -> np.ndarray:
        """For each granule: some read of it is not known to be over to the thread that writes."""
        thread, cta, at = self.read_thread[where], self.read_cta[where], self.read_time[where]
        over = (thread == NOBODY) | (thread == races.absolute(gids))
        if over.all():
            return ~over
        here = cta == races.cta_of(gids)
        reader = np.where(here & (thread >= 0), thread - races.first_cta * races.threads, 0)
        one = races.known[gids, races.warp_of[reader]] >= at
        several = races.known[gids, : races.warps].min(1) >= at
        return ~(over | (here & np.where(thread >= 0, one, several)))

    def note_writes(self, inst: int, agent: Any, thread: Any, where: np.ndarray, time: int) -> None:
        """An agent writes, started by a thread of the grid; reads before it count no longer."""
        super().note_writes(inst, agent, thread, where, time)
        self.read_thread[where] = self.read_cta[where] = NOBODY
