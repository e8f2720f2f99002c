"""Why a planted fault changes nothing: reasons that are checked by running, never supposed.

Each function here takes a launch and a fault that no run has shown. It runs the kernel again while
it watches the instruction in question, and returns why the fault is none in this problem, or "".
What is watched does not come from the machine's own checks: where these say that no access is
unordered, a barrier is also held to plain lists of who touched which byte between two barriers.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from tests.tools.ptx_fault_cases import Launch
from tests.tools.ptx_fault_kinds import NEW, Fault
from tilelab.perf.machine import core, handlers, types
from tilelab.perf.machine.copies.async_copies import groups_of
from tilelab.perf.machine.ptx import Instruction, Register, Vector
from tilelab.perf.machine.tensor import matrix_descriptors, wgmma

Wrapper = Callable[[Callable], Callable]  # of what a handler's builder returns
BEFORE = Register("%before")  # holds the outcome of a comparison as it was


def planted(launch: Launch, fault: Fault) -> Launch:
    """The launch with the fault."""
    if fault.maps:
        return launch._replace(maps=launch.maps | fault.maps)
    return launch._replace(program=fault.plant(launch.program))


def changed(launch: Launch, fault: Fault) -> Instruction:
    """The instruction as it was."""
    return launch.program.blocks[fault.block][fault.position]


@contextlib.contextmanager
def wrapped(wrap: Callable[[Instruction, core.Core, Callable], Callable]) -> Iterator[None]:
    """Within this context the handlers that a Core builds are what `wrap` makes of them."""
    find = handlers.find

    def found(op: str) -> Callable | None:
        build = find(op)
        if build is None:
            return None
        return lambda inst, machine: wrap(inst, machine, build(inst, machine))

    with mock.patch.object(handlers, "find", found):
        yield


def lanes_of(unit: Any, mask: np.ndarray | None) -> np.ndarray:
    return unit.lanes if mask is None else np.flatnonzero(mask)


def run(launch: Launch, wrap: Callable, schedule: str = "lockstep", seed: int = 0) -> core.Core:
    """Run a launch with wrapped handlers."""
    with wrapped(wrap):
        machine = launch.core(schedule=schedule, seed=seed)
    return machine.run()


def same(machine: core.Core, right: np.ndarray) -> bool:
    """Whether a run went as the untouched one."""
    return not machine.findings and np.array_equal(machine.global_.bytes, right)


# --- nobody is concerned --------------------------------------------------------------------------


def nobody_comes(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Is the instruction executed at all? With its guard, if it has one."""
    if fault.maps:
        return ""
    inst, machine = changed(launch, fault), launch.core().run()
    if not machine.executed[machine.index(inst)]:
        return "no thread comes there in this run"
    if handlers.find(inst.op) is None or fault.kind == "guard removed":
        return ""
    lanes = _executions(launch, inst)
    return "" if lanes else "no thread comes there in this run"


def _executions(launch: Launch, inst: Instruction) -> int:
    count = 0

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not inst:
            return handler

        def counted(unit: Any, mask: Any) -> Any:
            nonlocal count
            count += lanes_of(unit, mask).size
            return handler(unit, mask)

        return counted

    run(launch, wrap)
    return count


def guard_is_true(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Is the guard that was removed true for all who come?"""
    if fault.kind != "guard removed":
        return ""
    inst, out = changed(launch, fault), 0

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not fault.change[0]:
            return handler

        def watched(unit: Any, mask: Any) -> Any:
            nonlocal out
            out += np.count_nonzero(outside(inst, unit)[lanes_of(unit, mask)])
            return handler(unit, mask)

        return watched

    with wrapped(wrap):
        machine = planted(launch, fault).core()
    machine.slot(inst.guard[0], np.dtype(bool))
    machine.run()
    return "" if out else "the guard is true for all threads in this run"


def outside(inst: Instruction, unit: Any) -> np.ndarray:
    """The lanes whose guard is false."""
    name, negated = inst.guard
    return unit.registers[name] if negated else ~unit.registers[name]


def whole_copies(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does every copy have all of its bytes, so that nothing is filled with zeros?"""
    if fault.kind != "zero fill removed":
        return ""
    inst, part = changed(launch, fault), 0

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not inst:
            return handler
        length, size = machine.read(inst.operands[3], np.dtype("u4")), inst.operands[2].value

        def watched(unit: Any, mask: Any) -> Any:
            nonlocal part
            part += np.count_nonzero(length(unit)[lanes_of(unit, mask)] != size)
            return handler(unit, mask)

        return watched

    run(launch, wrap)
    return "" if part else "every copy has all of its bytes in this run"


# --- values ---------------------------------------------------------------------------------------


def stored_already(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Do the threads that the guard kept out store what the others have just stored?"""
    inst = None if fault.maps else changed(launch, fault)
    if fault.kind != "guard removed" or not inst.op.startswith("st."):
        return ""
    new, differs = fault.change[0], 0

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not new:
            return handler
        machine.slot(inst.guard[0], np.dtype(bool))
        memory = machine.memories["shared" if "shared" in inst.op else "global"]

        def watched(unit: Any, mask: Any) -> None:
            nonlocal differs
            all_of_them = np.ones(unit.n, bool) if mask is None else mask
            kept_out = outside(inst, unit) & all_of_them
            if (all_of_them & ~kept_out).any():
                handler(unit, all_of_them & ~kept_out)
            before = memory.bytes.copy()
            if kept_out.any():
                handler(unit, kept_out)
            differs += int((memory.bytes != before).any())

        return watched

    run(planted(launch, fault), wrap)
    return "" if differs else "the other threads store the same bytes to the same place"


GARBAGE = (
    ("any bits", lambda rng, n: rng.choice(np.array([0xFF, 0x7F, 0x80, 0x01], np.uint8), n)),
    ("any bits", lambda rng, n: rng.integers(0, 256, n, np.uint8)),
    ("small numbers", lambda rng, n: rng.integers(0x30, 0x42, n, np.uint8)),
)


def never_used(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does the result stay the same whatever is loaded there?

    Garbage takes the place of what the fault loads: by the threads that the guard or the zero fill
    kept out, or by all, where the address is another one. First any bits, and then, because zeros
    of the other operand hide no NaN, small numbers.
    """
    if fault.kind not in ("guard removed", "zero fill removed", "global address", "shared address"):
        return ""
    if not fault.change[-1].op.startswith(("ld", "cp.async.c")) or "param" in fault.change[-1].op:
        return ""
    kept = [_with_garbage(launch, fault, right, make) for _, make in GARBAGE]
    if kept[0] and kept[1]:
        return "what is loaded there reaches no result, whatever its bits"
    return "what is loaded there is multiplied by zeros: no finite number counts" * kept[2]


def _with_garbage(launch: Launch, fault: Fault, right: np.ndarray, make: Callable) -> bool:
    inst, new, rng = changed(launch, fault), fault.change[-1], np.random.default_rng(1)

    def chosen(unit: Any, mask: np.ndarray | None, length: Any) -> np.ndarray:
        here = np.ones(unit.n, bool) if mask is None else mask.copy()
        if fault.kind == "guard removed":
            here &= outside(inst, unit)
        elif length is not None:
            here &= length(unit) != inst.operands[2].value
        return np.flatnonzero(here)

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not new:
            return handler
        if inst.guard:
            machine.slot(inst.guard[0], np.dtype(bool))
        length = None
        if fault.kind == "zero fill removed":
            length = machine.read(inst.operands[3], np.dtype("u4"))
        if new.op.startswith("cp.async"):
            return _garbage_copied(
                machine, new, handler, lambda u, m: chosen(u, m, length), make, rng
            )
        target = new.operands[0]
        items = target.items if isinstance(target, Vector) else (target,)
        for item in items:
            machine.slot(item.name, machine.type_of(item.name))

        def load(unit: Any, mask: Any) -> None:
            lanes = chosen(unit, mask, None)  # the load may write its own guard
            handler(unit, mask)
            for item in items:
                bits = unit.registers[item.name]
                raw = make(rng, lanes.size * bits.itemsize)
                bits[lanes] = raw.view(bits.dtype)

        return load

    try:
        return same(run(planted(launch, fault), wrap), right)
    except Exception:
        return False


def _garbage_copied(
    machine: core.Core, inst: Instruction, handler: Callable, chosen: Callable, make: Callable,
    rng: Any,
) -> Callable:  # fmt: skip
    size, target = inst.operands[2].value, machine.address(inst.operands[0])

    def copy(unit: Any, mask: Any) -> None:
        handler(unit, mask)
        operation = groups_of(unit, "cp.async").operations[-1]
        inside = np.isin(operation.lanes, chosen(unit, mask))
        to = target(unit)[operation.lanes] + unit.cta[operation.lanes] * machine.shared.stride
        land = operation.land

        def landed(over: np.ndarray) -> None:
            land(over)
            for at in to[over & inside]:
                machine.shared.bytes[at : at + size] = make(rng, size)

        operation.land = landed

    return copy


def stores_nothing_used(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does the result stay the same whatever the stmatrix stores there?"""
    if fault.kind != "transposition" or not fault.change[-1].op.startswith("stmatrix"):
        return ""
    inst, rng = changed(launch, fault), np.random.default_rng(1)

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not inst:
            return handler
        write, places = machine.races.write, []

        def noted(space: str, index: int, gids: Any, offsets: Any, size: int, *more: Any) -> None:
            places.append((np.array(offsets), size))
            write(space, index, gids, offsets, size, *more)

        def store(unit: Any, mask: Any) -> None:
            places.clear()
            with mock.patch.object(machine.races, "write", noted):
                handler(unit, mask)
            for offsets, size in places:
                at = (offsets.reshape(-1, 1) + np.arange(size)).ravel()
                machine.shared.bytes[at] = GARBAGE[1][1](rng, at.size)

        return store

    unused = same(run(launch, wrap), right)
    return "what is stored there reaches no result, whatever its bits" * unused


def same_bytes_loaded(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does the load get the same bits from the other place?"""
    if fault.kind not in ("global address", "shared address") or not fault.change[-1].op.startswith(
        ("ld.", "ldmatrix")
    ):
        return ""
    inst, new, other = changed(launch, fault), fault.change[-1], 0

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not new:
            return handler
        machine.positions[id(inst)] = machine.positions[id(new)]
        old = handlers.HANDLERS[inst.parts[0]](inst, machine)
        target = new.operands[0]
        items = target.items if isinstance(target, Vector) else (target,)

        def load(unit: Any, mask: Any) -> None:
            nonlocal other
            old(unit, mask)
            lanes = lanes_of(unit, mask)
            before = [unit.registers[item.name][lanes].copy() for item in items]
            handler(unit, mask)
            after = [unit.registers[item.name][lanes] for item in items]
            other += sum(int((a != b).any()) for a, b in zip(before, after, strict=True))

        return load

    run(planted(launch, fault), wrap)
    return "" if other else "both places hold the same bytes"


def same_outcome(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Has the changed comparison the outcome that it had, for all who come?"""
    if fault.kind not in ("comparison off by one", "ring index"):
        return ""
    inst, differs = changed(launch, fault), 0
    before = inst._replace(operands=(BEFORE, *inst.operands[1:]))

    def look(this: Instruction, machine: core.Core) -> Callable:
        outcomes = [machine.read(x, np.dtype(bool)) for x in (BEFORE, inst.operands[0])]

        def watched(unit: Any, mask: Any) -> None:
            nonlocal differs
            old, now = (outcome(unit)[lanes_of(unit, mask)] for outcome in outcomes)
            differs += np.count_nonzero(old != now)

        return watched

    _looked_at(launch, fault, (*fault.change[:-1], before, fault.change[-1]), look)
    return "" if differs else "the comparison has the same outcome for all who come"


def any_outcome(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does the result stay the same whatever the outcome: true, false, or drawn by lot?

    So it is where a division has a short way for small numbers beside the long one for all.
    """
    if fault.kind != "comparison off by one":
        return ""
    inst, rng = changed(launch, fault), np.random.default_rng(1)

    def outcomes(make: Callable) -> Callable:
        def force(this: Instruction, machine: core.Core) -> Callable:
            put = machine.write(inst.operands[0], np.dtype(bool))
            return lambda unit, mask: put(unit, make(unit.n), mask)

        return force

    for make in (
        lambda n: np.ones(n, bool),
        lambda n: np.zeros(n, bool),
        lambda n: rng.random(n) < 0.5,
    ):
        if not same(_looked_at(launch, fault, (inst,), outcomes(make)), right):
            return ""
    return "the result is the same whatever the outcome of the comparison"


def any_value(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Where the outcome is another one, may the number that is compared be any other near by?

    So it is with what a mask puts in place of a number that does not exist.
    """
    if fault.kind != "comparison off by one":
        return ""
    inst, rng = changed(launch, fault), np.random.default_rng(1)
    dtype = types.of(inst.parts[-1])
    before = inst._replace(operands=(BEFORE, *inst.operands[1:]))

    def draw(this: Instruction, machine: core.Core) -> Callable:
        outcomes = [machine.read(x, np.dtype(bool)) for x in (BEFORE, inst.operands[0])]
        bound, put = machine.read(inst.operands[2], dtype), machine.write(inst.operands[1], dtype)

        def drawn(unit: Any, mask: Any) -> None:
            here = np.ones(unit.n, bool) if mask is None else mask
            near = bound(unit) + rng.integers(-8, 9, unit.n).astype(dtype)
            put(unit, near, here & (outcomes[0](unit) != outcomes[1](unit)))

        return drawn

    change = (*fault.change[:-1], before, fault.change[-1])
    for _ in range(3):
        if not same(_looked_at(launch, fault, change, draw, (inst,)), right):
            return ""
    return "where the outcome is another one, the number compared reaches no result"


def any_lane(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does the comparison choose one lane of a warp, and may it be any lane of this warp?

    So it is where one thread starts a copy for all: thread 1 does it as well as thread 0.
    """
    if fault.kind != "comparison off by one":
        return ""
    inst, rng, several = changed(launch, fault), np.random.default_rng(1), 0

    def draw(this: Instruction, machine: core.Core) -> Callable:
        outcome = machine.read(inst.operands[0], np.dtype(bool))
        put = machine.write(inst.operands[0], np.dtype(bool))

        def drawn(unit: Any, mask: Any) -> None:
            nonlocal several
            one = np.zeros(unit.n, bool)
            here = np.isin(unit.lanes, lanes_of(unit, mask))
            chosen = np.flatnonzero(outcome(unit) & here)
            several += np.unique(unit.cta[chosen]).size != chosen.size
            for lane in chosen:
                warp = lane // 32 * 32 + np.arange(32)
                one[rng.choice(warp[here[warp]])] = True
            put(unit, one, mask)

        return drawn

    for _ in range(3):
        if not same(_looked_at(launch, fault, (inst,), draw), right) or several:
            return ""
    return "it chooses one lane of a warp, and any lane does"


def _looked_at(
    launch: Launch, fault: Fault, change: tuple, look: Callable, after: tuple = ()
) -> core.Core:
    """Run with `change` in place of the fault's, then what `look` builds, then `after`."""
    inst, find = changed(launch, fault), handlers.find
    more = fault._replace(change=(*change, inst._replace(op="look", operands=()), *after))
    program = more.plant(launch.program)
    program = program._replace(registers=program.registers | {BEFORE.name: "pred"})
    with mock.patch.object(handlers, "find", lambda op: look if op == "look" else find(op)):
        machine = launch._replace(program=program).core()
    return machine.run()


def no_byte_copied(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """cp.async from another address: does it copy any byte, or fill with zeros alone?"""
    if fault.kind != "global address" or not fault.change[-1].op.startswith("cp.async.c"):
        return ""
    new, sizes = fault.change[-1], 0
    if len(new.operands) < 4:
        return ""

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not new:
            return handler
        length = machine.read(new.operands[3], np.dtype("u4"))

        def watched(unit: Any, mask: Any) -> None:
            nonlocal sizes
            sizes += np.count_nonzero(np.broadcast_to(length(unit), unit.n)[lanes_of(unit, mask)])
            handler(unit, mask)

        return watched

    run(planted(launch, fault), wrap)
    return "" if sizes else "no byte is copied: all are filled with zeros"


def same_pieces(launch: Launch, fault: Fault, right: np.ndarray) -> str:
    """Does the changed descriptor name the same bytes, because its layout has no such field?"""
    if not fault.kind.startswith("descriptor"):
        return ""
    inst, new, differs = changed(launch, fault), fault.change[-1], 0
    place = 1 if new.operands[1] == NEW else 2

    def wrap(this: Instruction, machine: core.Core, handler: Callable) -> Callable:
        if this is not new:
            return handler
        form = wgmma.parse_form(new, machine)
        extent, along = (64, form.n)[place - 1], form.mn_major[place - 1]
        reads = [machine.read(x, np.dtype("u8")) for x in (inst.operands[place], NEW)]

        def watched(unit: Any, mask: Any) -> None:
            nonlocal differs
            columns = [np.broadcast_to(f(unit), unit.n)[lanes_of(unit, mask)] for f in reads]
            for old, changed_to in {*zip(*(c.tolist() for c in columns), strict=True)}:
                a, b = (matrix_descriptors.pieces(x, extent, along) for x in (old, changed_to))
                differs += int((a != b).any())
            handler(unit, mask)

        return watched

    run(planted(launch, fault), wrap)
    if differs:
        return ""
    return "the layout has no use for this field: the descriptor names the same bytes"
