"""Finds accesses to memory that nothing orders: races, by vector clocks.

Two accesses to one byte race if at least one writes, and neither is known to be over when the other
begins. What a GPU makes of a race depends on its timing. So it is not enough to look at values: the
machine keeps for every thread what it *knows* to be over, and compares.

    time        one counter; it moves on at every synchronisation
    agent       whoever touches memory: the warps, and beside them everything that works while the
                warps go on: a copy (cp.async), the TMA unit, the tensor cores (wgmma)
    known       known[thread, agent] = t: the thread knows that all that this agent did until t is
                over. A thread always knows what it did itself.
    shadow      beside each byte: who wrote it last and when, and when each agent last read it

    warp 0:  st.shared [16]  ----.                       written by warp 0 at time 4
    warp 1:                  bar.sync  ld.shared [16]    known[warp 1, warp 0] = 4: ordered
    warp 2:  ld.shared [16]                              known[warp 2, warp 0] = 0 < 4: a race

A barrier makes all of its threads know what each of them knew. An mbarrier does the same from those
that arrive to those that wait. The lanes of one warp are told apart, too: since Volta a warp does
not run in lockstep, and only a barrier orders the accesses of its lanes.

Memory is seen through two *proxies*: ordinary loads and stores are the generic proxy; TMA and wgmma
are the async proxy. What was written through the generic one may be read through the async one only
after a fence.proxy.async. `fenced` is `known` with this fence in between.

Sources: PTX ISA, "Memory Consistency Model" and "Async proxy"; the method is FastTrack's (Flanagan
and Freund, PLDI 2009), with one clock instead of one for each thread.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

MANY = -2  # several threads
NOBODY = -1


class Shadow:
    """What is remembered beside the bytes of one memory, by granules of `grain` bytes."""

    def __init__(self, size: int, grain: int, readers: int) -> None:
        count = -(-size // grain)
        self.grain = grain
        self.writer = np.full(count, NOBODY, np.int16)  # an agent
        self.write_thread = np.zeros(count, np.int64)
        self.write_time = np.zeros(count, np.int32)
        self.write_by = np.full(count, -1, np.int32)  # the instruction, by its index
        self.read_time = np.zeros((count, readers), np.int32)
        self.read_thread = np.full((count, readers), NOBODY, np.int64)
        self.read_by = np.full(count, -1, np.int32)

    def clear(self) -> None:
        """Forget everything."""
        self.writer[:], self.write_time[:], self.read_time[:] = NOBODY, 0, 0
        self.read_thread[:] = NOBODY

    def granules(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The granules of accesses of `size` bytes each, and how many each has."""
        each = max(1, size // self.grain)
        first = offsets // self.grain
        if each == 1:
            return first, 1
        return (first[:, None] + np.arange(each)).ravel(), each


class Races:
    """The knowledge of all threads of a batch of CTAs, and the shadow of their memories.

    Args:
        ctas: in the batch.
        threads: of a CTA.
        instructions: the kernel's, by index, to name them in a report.
        report: is called as report(kind, instruction, message, other instruction).
    """

    AGENTS = 96  # beside warps, in each CTA: mbarriers, warpgroups, copies and stores of warps

    def __init__(self, ctas: int, threads: int, instructions: Sequence[Any], report: Any) -> None:
        self.threads, self.warps = threads, threads // 32
        self.count = ctas * threads
        agents = self.warps + self.AGENTS
        self.known = np.zeros((self.count, agents), np.int32)
        self.fenced = np.zeros((self.count, agents), np.int32)
        self.own = np.zeros((self.count, agents), np.int32)  # of what it started by itself
        self.atomic = (
            agents - 1
        )  # whoever did an atomic operation; they do not race with each other
        self.own[:, : self.warps] = self.own[:, self.atomic] = np.iinfo(np.int32).max
        self.warp_of = np.arange(self.count) % threads // 32
        self.now = 1
        self.shadows: dict[str, Shadow] = {}
        self.instructions, self.report = instructions, report
        self.first_cta = 0  # of the batch
        self._agents: dict[tuple, int] = {}
        self._copies: list[int] = []  # agents whose work a thread starts and waits for by itself

    def shadow(self, space: str, size: int, grain: int) -> None:
        """Watch a memory of `size` bytes."""
        readers = self.known.shape[1] if space == "shared" else 1
        self.shadows[space] = Shadow(size, grain, readers)

    def next_batch(self, first_cta: int) -> None:
        """Forget what threads know, and shared memory: the next CTAs begin. Global memory stays."""
        self.known[:], self.fenced[:], self.own[:, self.warps : self.atomic] = 0, 0, 0
        self.first_cta = first_cta
        self.now += 1
        self._agents.clear()
        self._copies.clear()
        self.shadows["shared"].clear()

    def agent(self, kind: str, index: int) -> int:
        """The number of an agent beside warps: ("wgmma", warpgroup), ("tma", mbarrier address)."""
        key = (kind, index)
        if key not in self._agents:
            self._agents[key] = self.warps + len(self._agents)
            if len(self._agents) >= self.AGENTS:
                raise RuntimeError("more asynchronous agents than the machine keeps track of")
            if kind == "cp.async":
                self._copies.append(self._agents[key])
        return self._agents[key]

    def tick(self) -> int:
        """A moment that no access shares: the time before it moves on."""
        self.now += 1
        return self.now - 1

    # --- what threads know ------------------------------------------------------------------------

    def barrier(self, gids: np.ndarray) -> None:
        """Threads of one CTA meet: afterwards all know what each of them knew.

        `gids` has a row for each meeting. bar.warp.sync is one of the lanes of a warp.
        """
        time = self.tick()
        known = self._together(gids)  # [meetings, agents]
        rows = np.arange(len(gids))[:, None]
        known[rows, self.warp_of[gids]] = time
        known[:, self.atomic] = time
        self.known[gids] = known[:, None]
        self.fenced[gids] = self.fenced[gids].max(1)[:, None]

    def _together(self, gids: np.ndarray) -> np.ndarray:
        known = self.known[gids].max(1)
        for agent in self._copies:  # known to all, once every lane has waited for its own
            own = self.own[gids, agent]
            least = np.where(own > 0, own, np.iinfo(np.int32).max).min(1)
            least[least == np.iinfo(np.int32).max] = 0
            known[:, agent] = np.maximum(known[:, agent], least)
        return known

    def release(self, gids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these threads of one CTA know together, to be handed on: mbarrier.arrive."""
        time = self.tick()
        known = self._together(gids[None])[0]
        for warp in np.unique(self.warp_of[gids]):
            if np.count_nonzero(self.warp_of[gids] == warp) == 32:
                known[warp] = time
        return known, self.fenced[gids].max(0)

    @staticmethod
    def merge(a: tuple | None, b: tuple) -> tuple:
        """What two releases hand on together; None is nothing."""
        return b if a is None else (np.maximum(a[0], b[0]), np.maximum(a[1], b[1]))

    def acquire(self, gids: np.ndarray, released: tuple | None) -> None:
        """These threads now know what was released: a wait at an mbarrier has ended."""
        if released is not None:
            self.known[gids] = np.maximum(self.known[gids], released[0])
            self.fenced[gids] = np.maximum(self.fenced[gids], released[1])

    def learn(self, gids: np.ndarray, agent: int, time: int, own: bool = False) -> None:
        """These threads know that all that an agent did until `time` is over.

        With `own`, each of them knows it of what it started itself (cp.async.wait_group).
        """
        table = self.own if own else self.known
        table[gids, agent] = np.maximum(table[gids, agent], time)

    def fence_proxy(self, gids: np.ndarray) -> None:
        """fence.proxy.async: what these threads know, the async proxy sees from now on."""
        time = self.tick()
        known = self.known[gids]
        for agent in self._copies:
            known[:, agent] = np.maximum(known[:, agent], self.own[gids, agent])
        known[np.arange(gids.size), self.warp_of[gids]] = time
        self.fenced[gids] = np.maximum(self.fenced[gids], known)

    # --- accesses ---------------------------------------------------------------------------------

    def read(self, space: str, inst: int, gids: np.ndarray, offsets: np.ndarray, size: int) -> None:
        """An ordinary load: thread gids[i] reads `size` bytes at offsets[i]."""
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        if each > 1:
            gids = np.repeat(gids, each)
        self._after_writes(space, shadow, inst, gids, where, "read")
        self._note_reads(shadow, inst, gids, where)

    def write(
        self, space: str, inst: int, gids: np.ndarray, offsets: np.ndarray, size: int,
        same: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """An ordinary store. same[i]: the bytes are there already, so the order does not matter."""
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        if each > 1:
            gids = np.repeat(gids, each)
            same = None if same is None else np.repeat(same, each)
        self._after_writes(space, shadow, inst, gids, where, "write", same)
        self._after_reads(space, shadow, inst, gids, where)
        self._note_writes(shadow, inst, self.warp_of[gids], gids, where, self.now)

    def update(
        self, space: str, inst: int, gids: np.ndarray, offsets: np.ndarray, size: int
    ) -> None:
        """An atomic operation: it races with ordinary accesses, and not with atomic ones."""
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        if each > 1:
            gids = np.repeat(gids, each)
        atomic = shadow.writer[where] == self.atomic
        self._after_writes(space, shadow, inst, gids, where, "atomic operation", atomic)
        self._after_reads(space, shadow, inst, gids, where)
        self._note_writes(shadow, inst, self.atomic, gids, where, self.now)

    def read_as(
        self, space: str, inst: int, agent: Any, time: int, knower: Any, offsets: np.ndarray,
        size: int, proxy: str = "async",
    ) -> None:  # fmt: skip
        """An agent reads from `time` on, ordered after all that thread `knower` knows.

        Agent and knower are one for all offsets, or one for each.
        """
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        gids = np.repeat(np.broadcast_to(knower, offsets.size), each)
        self._after_writes(space, shadow, inst, gids, where, "asynchronous read")
        if proxy == "async":
            writer = shadow.writer[where]
            generic = (writer >= 0) & (writer < self.warps)
            for copies in self._copies:
                generic |= writer == copies
            late = generic & (self.fenced[gids, writer] < shadow.write_time[where])
            if space == "global":
                late &= shadow.write_thread[where] // self.threads == self._absolute(gids)
            if late.any():
                other = int(shadow.write_by[where[late][0]])
                self._report("missing fence.proxy.async", inst, "reads through the async proxy what "
                             "was written through the generic one, with no fence.proxy.async "
                             "between", other)  # fmt: skip
        if space == "shared":
            column = np.repeat(np.broadcast_to(agent, offsets.size), each)
            shadow.read_time[where, column] = time
            shadow.read_thread[where, column] = MANY
            shadow.read_by[where] = inst
        else:
            self._note_reads(shadow, inst, gids, where)

    def write_as(
        self, space: str, inst: int, agent: int, time: int, knower: int, offsets: np.ndarray,
        size: int,
    ) -> None:  # fmt: skip
        """An agent writes from `time` on, ordered after all that thread `knower` knows."""
        shadow = self.shadows[space]
        where, _ = shadow.granules(offsets, size)
        gids = np.full(where.size, knower)
        self._after_writes(space, shadow, inst, gids, where, "asynchronous write")
        self._after_reads(space, shadow, inst, gids, where)
        self._note_writes(shadow, inst, agent, gids, where, time)

    def copy_as(
        self, inst: int, agents: np.ndarray, time: int, gids: np.ndarray, offsets: np.ndarray,
        size: int,
    ) -> None:  # fmt: skip
        """cp.async: thread gids[i] starts a copy to offsets[i] in shared memory by agents[i]."""
        shadow = self.shadows["shared"]
        where, each = shadow.granules(offsets, size)
        if each > 1:
            gids, agents = np.repeat(gids, each), np.repeat(agents, each)
        self._after_writes("shared", shadow, inst, gids, where, "asynchronous write")
        self._after_reads("shared", shadow, inst, gids, where)
        self._note_writes(shadow, inst, agents, gids, where, time)

    def _absolute(self, gids: Any) -> Any:
        """The CTA of a thread in the whole grid."""
        return gids // self.threads + self.first_cta

    def _ordered(self, shadow: Shadow, gids: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Whether the last write of each granule is known to be over."""
        writer, time = shadow.writer[where], shadow.write_time[where]
        over = self.known[gids, writer] >= time
        mine = shadow.write_thread[where] == gids + self.first_cta * self.threads
        return over | (mine & (self.own[gids, writer] >= time)) | (writer < 0)

    def _after_writes(
        self, space: str, shadow: Shadow, inst: int, gids: np.ndarray, where: np.ndarray, kind: str,
        same: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        ordered = self._ordered(shadow, gids, where)
        if space == "global":  # CTAs of one launch are never ordered
            cta = shadow.write_thread[where] // self.threads
            ordered = (cta == self._absolute(gids)) & ordered | (shadow.writer[where] < 0)
        if same is not None:
            ordered = ordered | same
        if not ordered.all():
            at = int(np.flatnonzero(~ordered)[0])
            self._report("race", inst, f"{kind} of {space} memory not ordered after an earlier "
                         f"write, byte {int(where[at]) * shadow.grain}",
                         int(shadow.write_by[where[at]]))  # fmt: skip

    def _after_reads(
        self, space: str, shadow: Shadow, inst: int, gids: np.ndarray, where: np.ndarray
    ) -> None:
        times, readers = shadow.read_time[where], shadow.read_thread[where]
        if space == "shared":
            unknown = times > self.known[gids]
            if unknown.any():
                unknown &= readers != gids[:, None]
        else:  # one column: the last reader, or several
            read = readers[:, 0]
            mine = read == gids + self.first_cta * self.threads
            cta = np.where(read >= 0, read // self.threads, np.where(read == NOBODY, -1, MANY))
            here = cta == self._absolute(gids)
            over = np.zeros(where.size, bool)
            if here.any():
                reader = np.where(here, read - self.first_cta * self.threads, 0)
                over = here & (self.known[gids, self.warp_of[reader]] >= times[:, 0])
            inside = (read <= -10) & (-10 - read == self._absolute(gids))  # several of this CTA
            over |= inside & (self.known[gids, : self.warps].min(1) >= times[:, 0])
            unknown = ~(mine | over | (read == NOBODY))
        if unknown.any():
            at = int(np.flatnonzero(unknown.reshape(where.size, -1).any(1))[0])
            self._report("race", inst, f"write of {space} memory not ordered after an earlier read, "
                         f"byte {int(where[at]) * shadow.grain}",
                         int(shadow.read_by[where[at]]))  # fmt: skip

    def _note_reads(self, shadow: Shadow, inst: int, gids: np.ndarray, where: np.ndarray) -> None:
        shadow.read_by[where] = inst
        if shadow.read_time.shape[1] > 1:
            warp = self.warp_of[gids]
            before, at = shadow.read_thread[where, warp], shadow.read_time[where, warp]
            alone = (before == NOBODY) | (before == gids) | (self.known[gids, warp] >= at)
            shadow.read_thread[where, warp] = gids
            alone &= shadow.read_thread[where, warp] == gids
            if not alone.all():
                shadow.read_thread[where[~alone], warp[~alone]] = MANY
            shadow.read_time[where, warp] = self.now
            return
        me = gids + self.first_cta * self.threads
        before = shadow.read_thread[where, 0]
        shadow.read_thread[where, 0] = me
        alone = ((before == NOBODY) | (before == me)) & (shadow.read_thread[where, 0] == me)
        if not alone.all():  # several threads: of one CTA (-10 - CTA), or of several
            where, before, mine = where[~alone], before[~alone], self._absolute(gids[~alone])
            old = np.where(before >= 0, before // self.threads, -10 - before)
            fits = (before == NOBODY) | (old == mine)
            shadow.read_thread[where, 0] = np.where(fits, -10 - mine, MANY)
            shadow.read_time[where, 0] = self.now
            after = shadow.read_thread[where, 0]
            shadow.read_thread[where[after != np.where(fits, -10 - mine, MANY)], 0] = MANY
        else:
            shadow.read_time[where, 0] = self.now

    def _note_writes(
        self, shadow: Shadow, inst: int, agent: Any, gids: np.ndarray, where: np.ndarray, time: int
    ) -> None:
        shadow.writer[where] = agent
        shadow.write_thread[where] = gids + self.first_cta * self.threads
        shadow.write_time[where] = time
        shadow.write_by[where] = inst
        if shadow.read_time.shape[1] == 1:
            shadow.read_thread[where, 0] = NOBODY

    def _report(self, kind: str, inst: int, message: str, other: int) -> None:
        named = self.instructions[other] if other >= 0 else None
        self.report(kind, self.instructions[inst], message, named)
