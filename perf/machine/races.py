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
after a fence.proxy.async. What was written or read through it may be written through the async one
only then: PTX orders accesses through two proxies by nothing else. `fenced` is `known` with this
fence in between.

Sources: PTX ISA, "Memory Consistency Model" and "Async proxy"; the method is FastTrack's (Flanagan
and Freund, PLDI 2009), with one clock instead of one for each thread.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilelab.perf.machine import releases
from tilelab.perf.machine.shadows import GlobalShadow, Shadow, SharedShadow


class Races:
    """The knowledge of all threads of a batch of CTAs, and the shadow of their memories.

    Args:
        ctas: in the batch.
        threads: of a CTA.
        agents: how many there may be in a CTA beside its warps.
        instructions: the kernel's, by index, to name them in a report.
        report: is called as report(kind, instruction, message, other instruction).
    """

    def __init__(
        self, ctas: int, threads: int, agents: int, instructions: Sequence[Any], report: Any
    ) -> None:
        self.threads, self.warps = threads, threads // 32
        self.count = ctas * threads
        self.atomic = (
            self.warps
        )  # whoever did an atomic operation; they do not race with each other
        self.first_agent = self.warps + 1
        columns = self.first_agent + agents
        self.known = np.zeros((self.count, columns), np.int32)
        self.fenced = np.zeros((self.count, columns), np.int32)
        self.own = np.zeros((self.count, columns), np.int32)  # of what it started by itself
        self.own[:, : self.first_agent] = np.iinfo(np.int32).max
        self.warp_of = np.arange(self.count) % threads // 32
        self.now = 1
        self.shadows: dict[str, Shadow] = {}
        self.instructions, self.report = instructions, report
        self.first_cta = 0  # of the batch
        self.releases = releases.Releases(self) if releases.needed(instructions) else None
        self._agents: dict[tuple, int] = {}
        self._copies: list[int] = []  # agents whose work a thread starts and waits for by itself

    def shadow(self, space: str, size: int, grain: int) -> None:
        """Watch a memory of `size` bytes."""
        if space == "shared":
            self.shadows[space] = SharedShadow(size, grain, self.known.shape[1], self.first_agent)
        else:
            self.shadows[space] = GlobalShadow(size, grain)

    def next_batch(self, first_cta: int) -> None:
        """Forget what threads know, and shared memory: the next CTAs begin. Global memory stays."""
        self.known[:], self.fenced[:], self.own[:, self.first_agent :] = 0, 0, 0
        self.first_cta = first_cta
        self.now += 1
        self._agents.clear()
        self._copies.clear()
        self.shadows["shared"].clear()

    def agent(self, kind: str, index: int) -> int:
        """The number of an agent beside warps: ("wgmma", warpgroup), ("tma", mbarrier address)."""
        key = (kind, index)
        if key not in self._agents:
            number = self._agents[key] = self.first_agent + len(self._agents)
            if number == self.known.shape[1]:
                raise RuntimeError(f"{kind} {index} is one agent more than the program has")
            if kind == "cp.async":
                self._copies.append(number)
        return self._agents[key]

    @property
    def agents(self) -> int:
        """How many there are so far, warps among them."""
        return self.first_agent + len(self._agents)

    def tick(self) -> int:
        """A moment that no access shares: the time before it moves on."""
        self.now += 1
        return self.now - 1

    def of_its_warp(self, gids: np.ndarray) -> np.ndarray:
        """Until when each of these threads knows what its own warp did."""
        return self.known.reshape(-1)[gids * self.known.shape[1] + self.warp_of[gids]]

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
        if self.releases:
            self.releases.barrier(gids)

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
        shadow.note_reads(self, inst, gids, where)
        if self.releases and space == "global":
            self.releases.note_reads(gids, where)

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
        shadow.note_writes(inst, self.warp_of[gids], self.absolute(gids), where, self.now)

    def update(
        self, space: str, inst: int, gids: np.ndarray, offsets: np.ndarray, size: int
    ) -> None:
        """An atomic operation: it races with ordinary accesses, and not with atomic ones.

        Threads take their turns in the order of `gids`.
        """
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        if each > 1:
            gids = np.repeat(gids, each)
        atomic = shadow.writer[where] == self.atomic
        self._after_writes(space, shadow, inst, gids, where, "atomic operation", atomic)
        self._after_reads(space, shadow, inst, gids, where)
        shadow.note_writes(inst, self.atomic, self.absolute(gids), where, self.now)
        if self.releases and space == "global":
            self.releases.update(self.instructions[inst], gids[::each], offsets)

    def read_as(
        self, space: str, inst: int, agent: Any, time: int, knower: Any, offsets: np.ndarray,
        size: int, proxy: str = "async",
    ) -> None:  # fmt: skip
        """An agent reads from `time` on, ordered after all that thread `knower` knows.

        There is one agent and one knower, or one of each for every offset.
        """
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        gids = np.repeat(np.broadcast_to(knower, offsets.size), each)
        agent = np.repeat(np.broadcast_to(agent, offsets.size), each)
        self._after_writes(space, shadow, inst, gids, where, "asynchronous read")
        if proxy == "async":
            late = self._unfenced_writes(space, shadow, gids, where)
            self._report_fence(shadow, inst, where, late, "reads", "written", shadow.write_by)
        shadow.note_reads_of(self, inst, agent, time, gids, where)
        if self.releases and space == "global":
            self.releases.note_reads(gids, where)

    def write_as(
        self, space: str, inst: int, agent: int, time: int, knower: int, offsets: np.ndarray,
        size: int, same: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """An agent writes from `time` on, ordered after all that thread `knower` knows.

        It writes through the async proxy. same[i]: as in `write`.
        """
        shadow = self.shadows[space]
        where, each = shadow.granules(offsets, size)
        gids = np.full(where.size, knower)
        same = None if same is None else np.repeat(same, each)
        self._after_writes(space, shadow, inst, gids, where, "asynchronous write", same)
        self._after_reads(space, shadow, inst, gids, where)
        if space == "shared":
            late = self._unfenced_writes(space, shadow, gids, where)
            self._report_fence(shadow, inst, where, late, "writes", "written", shadow.write_by)
            late = shadow.reads_after(self.fenced[gids, : self.warps], where)
            self._report_fence(shadow, inst, where, late, "writes", "read", shadow.read_by)
        shadow.note_writes(inst, agent, self.absolute(gids), where, time)

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
        shadow.note_writes(inst, agents, self.absolute(gids), where, time)

    def absolute(self, gids: Any) -> Any:
        """A thread of the batch as a thread of the whole grid."""
        return gids + self.first_cta * self.threads

    def cta_of(self, gids: Any) -> Any:
        """The CTA of a thread in the whole grid."""
        return gids // self.threads + self.first_cta

    def _after_writes(
        self, space: str, shadow: Shadow, inst: int, gids: np.ndarray, where: np.ndarray, kind: str,
        same: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Report if the last write of a granule is not known to be over."""
        writer, at = shadow.writer[where], shadow.write_time[where]
        ordered = self.known.reshape(-1)[gids * self.known.shape[1] + writer] >= at
        if not ordered.all():
            mine = shadow.write_thread[where] == self.absolute(gids)
            ordered |= mine & (self.own[gids, writer] >= at)
        if space == "global":  # CTAs of one launch are ordered by atomic operations alone
            ordered &= shadow.write_thread[where] // self.threads == self.cta_of(gids)
        ordered |= writer < 0
        if same is not None:
            ordered |= same
        if self.releases and space == "global":
            for i in np.flatnonzero(~ordered):
                thread = int(shadow.write_thread[where[i]])
                ordered[i] = self.releases.after_write(int(gids[i]), thread, writer[i], at[i])
        if not ordered.all():
            at = int(where[np.flatnonzero(~ordered)[0]])
            words = f"{kind} of {space} memory not ordered after an earlier write"
            self._report("race", inst, words, at * shadow.grain, shadow.write_by[at])

    def _after_reads(
        self, space: str, shadow: Shadow, inst: int, gids: np.ndarray, where: np.ndarray
    ) -> None:
        """Report if a read of a granule is not known to be over."""
        unordered = shadow.unordered_reads(self, gids, where)
        if self.releases and space == "global":
            for i in np.flatnonzero(unordered):
                last = shadow.write_time[where[i]] if shadow.writer[where[i]] >= 0 else 0
                unordered[i] = not self.releases.after_reads(int(gids[i]), where[i], last)
        if unordered.any():
            at = int(where[np.flatnonzero(unordered)[0]])
            words = f"write of {space} memory not ordered after an earlier read"
            self._report("race", inst, words, at * shadow.grain, shadow.read_by[at])

    def _unfenced_writes(
        self, space: str, shadow: Shadow, gids: np.ndarray, where: np.ndarray
    ) -> np.ndarray:
        """Granules that were last written through the generic proxy, with no fence since."""
        writer = shadow.writer[where]
        generic = (writer >= 0) & (writer < self.warps)
        for copies in self._copies:
            generic |= writer == copies
        late = generic & (self.fenced[gids, writer] < shadow.write_time[where])
        if space == "global":
            late &= shadow.write_thread[where] // self.threads == self.cta_of(gids)
        return late

    def _report_fence(
        self, shadow: Shadow, inst: int, where: np.ndarray, late: np.ndarray, does: str, was: str,
        by: np.ndarray,
    ) -> None:  # fmt: skip
        if late.any():
            at = int(where[np.flatnonzero(late)[0]])
            words = (f"{does} through the async proxy what was {was} through the generic one, "
                     "with no fence.proxy.async between")  # fmt: skip
            self._report("missing fence", inst, words, at * shadow.grain, by[at])

    def _report(self, kind: str, inst: int, words: str, byte: int, other: int) -> None:
        named = self.instructions[other] if other >= 0 else None
        self.report(kind, self.instructions[inst], f"{words}, byte {byte}", named)
