"""Why a fault of a barrier, an mbarrier or setmaxnreg changes nothing.

More of ptx_fault_reasons.py. Each reason looks at runs in every order. Who meets whom, who knows of
which arrivals and which values are alive are plain lists and sets here: no clock, and nothing of
the machine's own checks.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from tests.tools.ptx_fault_cases import Launch
from tests.tools.ptx_fault_kinds import Fault
from tests.tools.ptx_fault_orders import BUILD_BARRIER, ORDERS
from tests.tools.ptx_fault_reasons import changed, lanes_of, planted, run, wrapped
from tilelab.perf.machine import barriers, core, types
from tilelab.perf.machine.copies import mbarriers
from tilelab.perf.machine.copies.mbarriers import MBarrier
from tilelab.perf.machine.ptx import Instruction, Program, names_of

_KEPT: list[Any] = []  # the last launch, and what its runs have shown


def untouched(launch: Launch, follow: Callable) -> list[Any]:
    """follow(launch, schedule, seed) in every order; kept until another launch comes."""
    if not _KEPT or _KEPT[0] is not launch:
        _KEPT[:] = launch, {}
    if follow not in _KEPT[1]:
        _KEPT[1][follow] = [follow(launch, *order) for order in ORDERS]
    return _KEPT[1][follow]


def only_they_meet(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """A barrier of another number: do the same threads meet, all at this instruction?"""
    if fault.kind != "barrier of another number":
        return ""
    index = launch.core().index(changed(launch, fault))
    for order, before in zip(ORDERS, untouched(launch, meetings), strict=True):
        after = meetings(planted(launch, fault), *order)
        if before != after or any(index in who and who != (index,) for _, who, _ in before):
            return ""
    return "the same threads meet there, and nobody else comes to a barrier of this number"


def meetings(launch: Launch, schedule: str, seed: int) -> Counter:
    """How often threads met: (the first CTA of the batch, the barriers they came to, threads)."""
    found: Counter = Counter()

    def build(inst: Instruction, machine: core.Core) -> Callable:
        handler, index = BUILD_BARRIER(inst, machine), machine.index(inst)

        def come(unit: Any, mask: Any) -> None:
            comes[unit.gid[lanes_of(unit, mask)]] = index
            handler(unit, mask)

        return come

    def met(gids: np.ndarray) -> None:
        for row in np.sort(gids, axis=1):
            if (comes[row] >= 0).any():  # a bar.warp.sync comes here, too
                found[machine.first_cta, tuple(np.unique(comes[row])), row.tobytes()] += 1
                comes[row] = -1
        meet(gids)

    with mock.patch.object(barriers, "build", build):
        machine = launch.core(schedule=schedule, seed=seed)
    comes, meet = np.full(machine.ctas * machine.threads, -1), machine.races.barrier
    machine.races.barrier = met
    machine.run()
    return found


def never_asked(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """mbarrier.init of one more: does anybody arrive at this mbarrier, or wait for it?"""
    if fault.kind != "mbarrier.init of one more":
        return ""
    inst, here = changed(launch, fault), False
    made: list[MBarrier] = []  # by this instruction
    asked: list[MBarrier] = []

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not inst:
            return handler

        def init(unit: Any, mask: Any) -> None:
            nonlocal here
            here = True
            handler(unit, mask)
            here = False

        return init

    with contextlib.ExitStack() as stack:
        for name in ("arrive", "expect", "land", "passes"):
            stack.enter_context(_listening(name, lambda bar, *_: asked.append(bar)))
        stack.enter_context(_listening("__init__", lambda bar, *_: here and made.append(bar)))
        run(launch, wrap)
    unused = not {id(bar) for bar in made} & {id(bar) for bar in asked}
    return "nobody arrives at this mbarrier or waits for it" * unused


@contextlib.contextmanager
def _listening(name: str, listen: Callable) -> Iterator[None]:
    """Within this context, each call of a method of an MBarrier is told first."""
    method = getattr(MBarrier, name)

    def called(bar: MBarrier, *given: Any) -> Any:
        listen(bar, *given)
        return method(bar, *given)

    with mock.patch.object(MBarrier, name, called):
        yield


# --- what is known of arrivals --------------------------------------------------------------------


class Arrivals:
    """Who knows of which arrivals at mbarriers, in one run without a certain wait.

    An arrival is a bit. A thread knows of its own, of those that its partners at a barrier know
    of, and, when it has waited for a phase, of what those knew that arrived in it or before.

    Attributes:
        surprised: threads came to the wait in question whose phase was not complete, or who did not
            know of all of its arrivals.
    """

    def __init__(self, launch: Launch, wait: Instruction, schedule: str, seed: int) -> None:
        self.wait, self.count, self.surprised, self.inside = wait, 0, 0, False
        self.handed: dict[int, int] = {}  # by mbarrier: what those knew that have arrived
        self.phase: dict[int, int] = {}  # ... the arrivals of the phase that goes on
        self.last: dict[int, tuple[int, int, bool]] = {}  # ... both of the last phase, and no bytes
        self.kept: list[MBarrier] = []  # so that no other one gets its id
        with wrapped(self.wrap), mock.patch.object(mbarriers, "_learn", self.learn):
            machine = launch.core(schedule=schedule, seed=seed)
            races, self.machine = machine.races, machine
            self.knows = [0] * (machine.ctas * machine.threads)
            meet, release, begin = races.barrier, races.release, races.next_batch

            def met(gids: np.ndarray) -> None:
                for row in gids.tolist():
                    self.share(row, self.all_of(row))
                meet(gids)

            def released(gids: np.ndarray) -> Any:
                self.who = gids.tolist()
                return release(gids)

            def next_batch(first_cta: int) -> None:
                self.knows = [0] * len(self.knows)
                begin(first_cta)

            races.barrier, races.release, races.next_batch = met, released, next_batch
            with self.followed("arrive", self.arrived), self.followed("land", lambda bar: None):
                machine.run()

    def all_of(self, gids: list[int]) -> int:
        """What these threads know together."""
        found = 0
        for gid in gids:
            found |= self.knows[gid]
        return found

    def share(self, gids: list[int], known: int) -> None:
        for gid in gids:
            self.knows[gid] |= known

    @contextlib.contextmanager
    def followed(self, name: str, before: Callable) -> Iterator[None]:
        """Within this context, a method of an MBarrier that may complete a phase is followed."""
        method = getattr(MBarrier, name)

        def called(bar: MBarrier, *given: Any) -> None:
            before(bar)
            phase, dry = bar.phase, not bar.expected and not bar.landed and name == "arrive"
            method(bar, *given)
            if bar.phase > phase:
                arrivals = self.phase.pop(id(bar), 0)
                self.last[id(bar)] = arrivals, self.handed.get(id(bar), 0), dry

        with mock.patch.object(MBarrier, name, called):
            yield

    def arrived(self, bar: MBarrier) -> None:
        """The threads `who` arrive."""
        self.kept.append(bar)
        self.share(self.who, 1 << self.count)
        self.phase[id(bar)] = self.phase.get(id(bar), 0) | 1 << self.count
        self.handed[id(bar)] = self.handed.get(id(bar), 0) | self.all_of(self.who)
        self.count += 1

    def learn(self, machine: core.Core, gids: np.ndarray, bar: MBarrier, offset: int) -> None:
        """These threads find a phase complete."""
        arrivals, handed, dry = self.last.get(id(bar), (0, 0, True))
        if self.inside:  # of the wait that is missing
            for gid in gids.tolist():
                self.surprised += not dry or bool(arrivals & ~self.knows[gid])
        else:
            self.share(gids.tolist(), handed)
        LEARN(machine, gids, bar, offset)

    def wrap(self, inst: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if inst is not self.wait:
            return handler

        def ask(unit: Any, mask: Any) -> np.ndarray:
            self.inside = True
            done = handler(unit, mask)
            self.inside = False
            self.surprised += not done.all()
            return done

        return ask


LEARN = mbarriers._learn


def known_already(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """A wait at an mbarrier: does everybody who comes know that its phase is complete?

    Then they have waited elsewhere for something behind these arrivals, whatever the order.
    """
    if fault.kind != "mbarrier wait removed":
        return ""
    wait, without = launch.program.blocks[fault.block - 1][-1], planted(launch, fault)
    if any(Arrivals(without, wait, *order).surprised for order in ORDERS):
        return ""
    return "whoever comes there has waited for something behind these arrivals already"


# --- registers ------------------------------------------------------------------------------------


class Holding(core.Core):
    """A Core that notes how many registers the warps hold at least that come to a block."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.least: dict[int, int] = {}  # by the id of the block's first instruction

    def _count(self, block: list, unit: Any, mask: np.ndarray | None) -> None:
        super()._count(block, unit, mask)
        lanes = lanes_of(unit, mask)
        if block:
            held = int(self.registers.held[unit.cta[lanes], unit.thread[lanes] // 32].min())
            self.least[id(block[0])] = min(held, self.least.get(id(block[0]), held))


def least_held(launch: Launch, schedule: str, seed: int) -> dict[int, int]:
    """`Holding.least` of a run."""
    return launch.core(Holding, schedule=schedule, seed=seed).run().least


def enough_registers(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """setmaxnreg: where warps hold fewer registers without it, do all values find room?"""
    if fault.kind != "setmaxnreg removed":
        return ""
    for order, before in zip(ORDERS, untouched(launch, least_held), strict=True):
        after = least_held(planted(launch, fault), *order)
        for block, alive in zip(launch.program.blocks, most_alive(launch.program), strict=True):
            held = after.get(id(block[0]), 0) if block else 0
            if 0 < held < before.get(id(block[0]), held) and held < alive:
                return ""
    return "the values that are alive find room in the registers that warps hold without it"


WITHOUT_RESULT = (
    "st.", "stmatrix", "red.", "cp.", "bar.", "barrier", "fence", "membar", "wgmma.fence",
    "wgmma.commit", "wgmma.wait", "tensormap", "setmaxnreg", "mbarrier.init", "mbarrier.inval",
    "mbarrier.arrive", "mbarrier.expect", "bra", "ret", "exit", "trap", "prefetch",
)  # fmt: skip


def most_alive(program: Program) -> list[int]:
    """How many registers of 32 bits hold values that are needed later, at most, by block.

    A value is alive from where it is written to where it is last read, on any path: the data flow
    goes backwards, with the union where paths meet. Predicates are kept elsewhere.
    """
    after: list[set[str]] = [set() for _ in program.blocks]  # what is alive where a block begins
    most = [0] * len(program.blocks)
    changes = True
    while changes:
        changes = False
        for number in reversed(range(len(program.blocks))):
            alive = set().union(*(after[x] for x in program.successors(number)))
            most[number] = _room(alive, program.registers)
            for inst in reversed(program.blocks[number]):
                written, read = _written_and_read(inst)
                most[number] = max(most[number], _room(alive | written | read, program.registers))
                alive = (alive if inst.guard else alive - written) | read
            changes |= alive != after[number]
            after[number] = alive
    return most


def _written_and_read(inst: Instruction) -> tuple[set[str], set[str]]:
    results = 0 if inst.op.startswith(WITHOUT_RESULT) else 1
    written, read = (
        {name for operand in part for name in names_of(operand)}
        for part in (inst.operands[:results], inst.operands[results:])
    )
    if inst.op.startswith("wgmma.mma_async"):  # adds to what is there
        read |= written
    return written, read | ({inst.guard[0]} if inst.guard else set())


def _room(names: set[str], registers: dict[str, str]) -> int:
    kinds = (registers[name] for name in names & registers.keys() if registers[name] != "pred")
    return sum(max(1, types.of(kind).itemsize // 4) for kind in kinds)
