"""mbarriers: how threads wait for copies and for each other; and the fences between proxies.

bar.sync is a barrier for threads. Copies by the TMA are done by no thread, so they end at an
*mbarrier*: 8 bytes of shared memory with two counters that both have to reach zero.

    mbarrier.init [b], 1                       pending arrivals 1   bytes 0       phase 0
    mbarrier.arrive.expect_tx _, [b], 24576                     0   bytes 24576       0
    (a copy of 16384 bytes lands)                               0   bytes 8192        0
    (a copy of 8192 bytes lands)                                0   bytes 0     ->    1
                                               and again        1   bytes 0       phase 1

When both are zero the *phase* is complete: the mbarrier moves on to the next phase, and counts the
same number of arrivals again. Bytes (PTX: transactions, tx) may also come before they are
announced; the count is negative then. An mbarrier is never more than one phase ahead of those that
wait. So a waiter names only the lowest bit of the phase that it waits for, its *parity*:

    phase            0         1         2         3
    try_wait 0    ...waits|passes    |waits...          passes while the phase is odd
    try_wait 1     passes |waits...  |passes            a fresh mbarrier lets parity 1 pass

The last line is no accident. A ring of buffers has two mbarriers for each buffer, "full" and
"empty". The producer waits for "empty" with parity 1 at first, and finds all buffers empty.

mbarriers are memory, too. init and inval write them; all other operations are atomic, and may meet
each other but not these two. So a missing bar.sync behind init is found as a race. Their bytes
carry their state here as they do on a GPU, so a store over them is found at their next use.

Whoever waits knows afterwards what those knew that arrived (release and acquire), and that the
copies have landed. But there are two ways to memory, two *proxies*. ld and st go through the
generic proxy. TMA and wgmma go through the async proxy, past the caches and queues of the warps. A
value that st wrote may not have come far enough for the TMA to find it, and `fence.proxy.async`
waits until it has. The way back needs no fence: the wait includes it.

Sources: PTX ISA 8.8, sections 9.7.13.15 (mbarrier), 9.7.13.4 (fence) and 8.6 (proxies).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tilelab.perf.machine.errors import UnknownInstruction, refuse
from tilelab.perf.machine.ptx import Instruction, Pair, Register

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core, Unit

MOST = 2**20 - 1  # of each count of an mbarrier
Handler = Callable[["Unit", np.ndarray | None], Any]


class Misuse(Exception):
    """What PTX calls undefined behaviour, in words."""


class MBarrier:
    """One mbarrier.

    Attributes:
        count: the arrivals of each phase.
        pending: those that this phase still waits for.
        expected, landed: bytes announced to this phase, and come in it.
        phase: how many phases are complete.
    """

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MOST:
            raise Misuse(f"an mbarrier of {count} arrivals: 1 to {MOST} are possible")
        self.count = self.pending = count
        self.expected = self.landed = self.phase = 0
        self.observed = True  # somebody has seen that the last phase is complete
        self.used = False  # something has been done with it
        self.flying: list[int] = []  # the times when copies began that have not landed
        self.released: Any = None  # what those knew that have arrived, in all phases
        self.completed: Any = None  # the same, when the last phase was completed
        self.begun = self.known = 0  # when the last copy began; until when all have landed

    def arrive(self, count: int, released: Any, merge: Callable) -> None:
        """Threads arrive, `count` times together."""
        if not self.observed:
            raise Misuse("arrives at an mbarrier whose last phase nobody has waited for")
        if count > self.pending:
            raise Misuse(f"{count} arrivals at an mbarrier that waits for {self.pending} more")
        self.pending -= count
        self.released = merge(self.released, released)
        self._move_on()

    def expect(self, size: int) -> None:
        """So many bytes more will land in this phase."""
        self.expected += size
        self._check_bytes()

    def land(self, size: int) -> None:
        """A copy has come."""
        self.landed += size
        self._check_bytes()
        self._move_on()

    def passes(self, parity: np.ndarray) -> np.ndarray:
        """Whether the phase that was completed last has this parity."""
        return parity != (self.phase & 1)

    def _check_bytes(self) -> None:
        if abs(self.expected - self.landed) > MOST:
            raise Misuse(
                f"an mbarrier with {self.expected} bytes announced and {self.landed} landed: they "
                f"may differ by {MOST}"
            )

    def _move_on(self) -> None:
        if self.pending or self.expected != self.landed:
            return
        self.phase += 1
        self.pending, self.expected, self.landed, self.observed = self.count, 0, 0, False
        self.completed = self.released
        self.known = min(self.flying) - 1 if self.flying else self.begun

    def word(self) -> int:
        """Its 64 bits; never zero."""
        tx = (self.expected - self.landed) & (2 * MOST + 1)
        return self.count | self.pending << 20 | tx << 40 | (self.phase & 1) << 62

    def __str__(self) -> str:
        """What it waits for, in words."""
        missing = []
        if self.pending:
            missing.append(f"{self.pending} of {self.count} arrivals are missing")
        if self.expected > self.landed:
            missing.append(f"{self.expected - self.landed} of {self.expected} bytes are missing")
        if self.expected < self.landed:
            missing.append(f"{self.landed - self.expected} bytes more landed than were announced")
        return f"in phase {self.phase}, " + " and ".join(missing)


class MBarriers:
    """All mbarriers of a batch, by their offset in the shared memory of its CTAs."""

    def __init__(self, core: "Core") -> None:
        self.core, self.objects = core, {}
        self.words = core.shared.bytes.view(np.uint64)

    def init(self, offset: int, count: int) -> None:
        """An mbarrier comes into being.

        PTX wants mbarrier.inval first where there is one. In warp-specialised kernels of triton
        3.6.0 some places are initialised again and again, for mbarriers that nobody uses.
        """
        if offset in self.objects and self.objects[offset].used:
            raise Misuse("mbarrier.init of an mbarrier that is in use: no mbarrier.inval before")
        self.objects[offset] = MBarrier(count)
        self.store(offset)
        self.core.shared.initialised[offset : offset + 8] = True

    def inval(self, offset: int) -> None:
        """An mbarrier ends; its bytes hold nothing."""
        if self.at(offset).flying:
            raise Misuse("mbarrier.inval while a copy is on its way to it")
        del self.objects[offset]
        self.words[offset // 8] = 2**64 - 1
        self.core.shared.initialised[offset : offset + 8] = False

    def at(self, offset: int) -> MBarrier:
        """The mbarrier there."""
        found = self.objects.get(offset)
        if found is None:
            raise Misuse("no mbarrier there: never initialised, or invalidated")
        if self.words[offset // 8] != found.word():
            raise Misuse("an mbarrier whose bytes were overwritten by something else")
        found.used = True
        return found

    def store(self, offset: int) -> None:
        """Its bytes follow its state, and those that wait look again."""
        self.words[offset // 8] = self.objects[offset].word()
        self.core.wake()


def mbarriers(core: "Core") -> MBarriers:
    """The mbarriers of the batch that is running."""
    if "mbarriers" not in core.state:
        core.state["mbarriers"] = MBarriers(core)
    return core.state["mbarriers"]


@contextlib.contextmanager
def checked(
    core: "Core", inst: Instruction, unit: "Unit", lane: Any, offset: int
) -> Iterator[MBarriers]:
    """Whatever is misused in here, at the mbarrier at this offset, is a fault of this lane."""
    try:
        yield mbarriers(core)
    except Misuse as misuse:
        core.fail(inst, unit, lane, f"{misuse} (mbarrier at shared address {place(core, offset)})")


def place(core: "Core", offset: int) -> str:
    """The address of an mbarrier within its CTA."""
    return f"{offset % core.shared.stride:#x}"


# --- the instructions -----------------------------------------------------------------------------

_PLAIN = {"mbarrier", "shared", "shared::cta", "b64"}  # modifiers that change nothing
_KNOWN = {
    "init": set(),
    "inval": set(),
    "expect_tx": {"relaxed", "cta"},
    "arrive": {"expect_tx", "release", "cta"},
    "try_wait": {"parity", "acquire", "cta"},
    "test_wait": {"parity", "acquire", "cta"},
}


def build_mbarrier(inst: Instruction, core: "Core") -> Handler:
    """The operations of an mbarrier."""
    name, parts = inst.parts[1], set(inst.parts)
    if name not in _KNOWN or parts - _PLAIN - _KNOWN[name] - {name}:
        raise UnknownInstruction(f"{inst.where}: this form of mbarrier is not supported")
    if name in ("try_wait", "test_wait"):
        return _build_wait(inst, core)
    operands = list(inst.operands)
    if name == "arrive" and operands.pop(0) != Register("_"):
        raise UnknownInstruction(f"{inst.where}: the state that arrive returns is not supported")
    address, index = core.address(operands[0]), core.index(inst)
    value = core.read(operands[1], np.dtype(np.uint32)) if len(operands) > 1 else None
    merge = core.races.merge

    def act(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        offsets = core.shared.offsets(core, inst, unit, lanes, address(unit)[lanes], 8)
        access = core.races.write if name in ("init", "inval") else core.races.read
        access("shared", index, unit.gid[lanes], offsets, 8)
        given = np.broadcast_to(1 if value is None else value(unit), unit.n)[lanes]
        for offset in np.unique(offsets).tolist():
            here = lanes[offsets == offset]
            number = int(given[offsets == offset].sum(dtype=np.int64))
            with checked(core, inst, unit, here, offset) as bars:
                if name in ("init", "inval") and here.size > 1:
                    raise Misuse(f"mbarrier.{name} by {here.size} threads")
                if name == "init":
                    bars.init(offset, number)
                elif name == "inval":
                    bars.inval(offset)
                else:
                    bar = bars.at(offset)
                    if "expect_tx" in parts:
                        bar.expect(number)
                        number = here.size
                    if name == "arrive":
                        bar.arrive(number, core.races.release(unit.gid[here]), merge)
                    bars.store(offset)

    return act


def _build_wait(inst: Instruction, core: "Core") -> Handler:
    """try_wait and test_wait: has the phase of this parity been completed?

    The handler returns which lanes need not wait, those that did not ask included.
    """
    if "parity" not in inst.parts:
        raise UnknownInstruction(f"{inst.where}: only waits by parity are supported")
    put = core.write(inst.operands[0], np.dtype(bool))
    address, index = core.address(inst.operands[1]), core.index(inst)
    parity = core.read(inst.operands[2], np.dtype(np.uint32))

    def wait(unit: "Unit", mask: np.ndarray | None) -> np.ndarray:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        offsets = core.shared.offsets(core, inst, unit, lanes, address(unit)[lanes], 8)
        # PTX allows 0 and 1. The warp-specialised kernels of triton 3.9.0 give -1 for 1, and ptxas
        # takes the lowest bit: it shifts the operand left by 31 (SHF.L.U32 R, R, 0x1f).
        wanted = np.broadcast_to(parity(unit), unit.n)[lanes] & 1
        done = np.zeros(lanes.size, bool)
        for offset in np.unique(offsets).tolist():
            here = offsets == offset
            with checked(core, inst, unit, lanes[here], offset) as bars:
                bar = bars.at(offset)
            passing = here & bar.passes(wanted)
            if passing.any():
                done |= passing
                _learn(core, unit.gid[lanes[passing]], bar, offset)
        core.races.read("shared", index, unit.gid[lanes[done]], offsets[done], 8)
        whole = np.ones(unit.n, bool)
        whole[lanes] = done
        put(unit, whole, mask)
        waits = unit.state.setdefault(("waits", index), np.full(unit.n, -1))
        if core.counting:  # those that look again were counted before
            core.counts.add(inst, "waits", np.count_nonzero(~done & (waits[lanes] < 0)))
        waits[lanes] = np.where(done, -1, offsets)
        return whole

    def explain() -> list[str]:
        found = {}
        for unit in core.units:
            waits = unit.state.get(("waits", index), np.empty(0))
            for offset in np.unique(waits[waits >= 0]).tolist():
                bar = mbarriers(core).objects[offset]
                program = core.position(core.first_cta + offset // stride)
                where = f"  program {program}: the mbarrier at shared address {place(core, offset)}"
                found[offset] = f"{where} is {bar}"
        return list(found.values())

    stride = core.shared.stride
    core.explanations.append(explain)
    return wait


def _learn(core: "Core", gids: np.ndarray, bar: MBarrier, offset: int) -> None:
    """These threads have seen that a phase is complete."""
    core.races.acquire(gids, bar.completed)
    if bar.known:
        core.races.learn(gids, core.races.agent("tma", offset % core.shared.stride), bar.known)
    bar.observed = True


def build_elect(inst: Instruction, core: "Core") -> Handler:
    """elect.sync: one lane of each warp is chosen, the same one every time.

    PTX does not say which lane. In lockstep it is the first of the lanes to choose from, when late
    the last, and in a random order one is drawn for each set of lanes.
    """
    target, operand = inst.operands
    if not isinstance(target, Pair):
        raise UnknownInstruction(f"{inst.where}: elect.sync gives a lane and a predicate")
    lane_of, chosen = (
        core.write(target.first, np.dtype(np.uint32)),
        core.write(target.second, np.dtype(bool)),
    )
    members = core.read(operand, np.dtype(np.uint32))

    def elect(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        sets = np.broadcast_to(members(unit), unit.n)[lanes]
        leaders = core.state.setdefault("leaders", {})
        leader = np.zeros(unit.n, np.uint32)
        for members_of in np.unique(sets).tolist():
            here = lanes[sets == members_of]
            asked = np.flatnonzero([members_of >> i & 1 for i in range(32)])
            if _lanes_of_warps(unit, here) != set(asked.tolist()):
                core.fail(inst, unit, here, "elect.sync without all of the lanes that it names")
            if members_of not in leaders:
                ends = {"lockstep": asked[0], "late": asked[-1]}
                leaders[members_of] = int(ends.get(core.schedule, core.rng.choice(asked)))
            leader[here] = leaders[members_of]
        lane_of(unit, leader, mask)
        chosen(unit, unit.thread % 32 == leader, mask)

    return elect


def _lanes_of_warps(unit: "Unit", lanes: np.ndarray) -> set[int] | None:
    """The lanes of a warp that take part; None if not the same ones in each warp."""
    inside = np.zeros(unit.n, bool)
    inside[lanes] = True
    rows = inside.reshape(-1, 32)
    rows = rows[rows.any(1)]
    return set(np.flatnonzero(rows[0]).tolist()) if (rows == rows[0]).all() else None


def build_fence(inst: Instruction, core: "Core") -> Handler:
    """fence.proxy.async makes what these threads know visible to TMA and wgmma.

    The other fences order what a thread does for threads of other CTAs, or of its own that are not
    at a barrier with it. The machine counts no such order: races.py.
    """
    kind = inst.op.removeprefix("fence.")
    if kind.startswith("proxy.async") and "::generic" not in kind:

        def fence(unit: "Unit", mask: np.ndarray | None) -> None:
            core.races.fence_proxy(unit.gid if mask is None else unit.gid[mask])

        return fence
    if inst.parts[0] == "fence" and inst.parts[1] not in ("sc", "acq_rel", "acquire", "release",
                                                          "mbarrier_init"):  # fmt: skip
        raise UnknownInstruction(f"{inst.where}: this fence is not supported")
    return lambda unit, mask: None


CLUSTERS = refuse("clusters of CTAs are")  # whatever several CTAs do together
HANDLERS = {
    "mbarrier": build_mbarrier,
    "elect": build_elect,
    "fence": build_fence,
    "membar": build_fence,
    "mapa": CLUSTERS,
    "getctarank": CLUSTERS,
    "clusterlaunchcontrol": CLUSTERS,
    "griddepcontrol": refuse("programmatic dependent launch is"),
}
