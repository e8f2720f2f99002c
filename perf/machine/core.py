"""Runs a kernel's threads: registers, branches, barriers, and in which order warps take turns.

The threads of a CTA are scheduled in *units*, and of several CTAs side by side, because a NumPy
operation on 1024 numbers takes hardly longer than one on 32. A register of a unit is one array.

    warp 0     CTA 0: 32 lanes | CTA 1: 32 lanes | CTA 2: ...       %r7 = array of all of these
    warp 1     CTA 0: 32 lanes | CTA 1: 32 lanes | CTA 2: ...

A straight run of instructions (a block) is one Python function (blocks.py). Threads that are
elsewhere, because a branch divided them, are masked. They meet again by themselves: of a unit's
threads, those furthest behind go first.

How units take turns is the schedule's choice:

    lockstep   one unit, of all warps: the quickest
    random     a unit is a warp (or four, a warpgroup, where the kernel has wgmma); who is next is
               drawn by lot, the programs of the grid come in any order, and asynchronous copies
               land at any moment
    late       one unit goes on for as long as it can; what is asynchronous lands when nobody else
               can go on, the last one first

A GPU may do each of these. So a kernel is right only if it is right under all.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tilelab.perf.machine import barriers, blocks, handlers, memory, types
from tilelab.perf.machine.counts import Counts
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.ptx import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Program,
    Register,
    Symbol,
)
from tilelab.perf.machine.races import Races
from tilelab.perf.machine.tensor import wgmma, wgmma_fences
from tilelab.perf.machine.units import DONE, FREE, SPECIAL, SPINS, WAITS, Unit

SCHEDULES = ("lockstep", "random", "late")
PARAMETERS = 0x7000_0000  # where the parameter space begins
WIDEST = 2048  # lanes of all CTAs of a batch together


class Core:
    """Executes one launch.

    Args:
        program: the kernel.
        grid: programs (CTAs) in x, y and z.
        parameters: the value of each parameter, by name: a NumPy scalar, or bytes.
        shared: bytes of shared memory of a CTA.
        global_memory: with the launch's tensors in it.
        maps: tensor maps by their address (of a parameter: PARAMETERS + its offset).
        schedule: one of SCHEDULES.
        seed: of whatever is drawn by lot.
        counting: count what compiling cannot tell (counts.py): takes longer.
        programs: which of the grid are executed; all by default.
    """

    def __init__(
        self, program: Program, grid: tuple[int, ...], parameters: dict[str, Any], shared: int,
        global_memory: memory.GlobalMemory, maps: dict[int, Any] | None = None,
        schedule: str = "lockstep", seed: int = 0, counting: bool = False,
        programs: range | None = None,
    ) -> None:  # fmt: skip
        self.program, self.grid = program, tuple(grid) + (1,) * (3 - len(grid))
        self.parameters, self.maps = parameters, dict(maps or {})
        self.schedule, self.rng = schedule, np.random.default_rng(seed)
        self.threads, self.warps = program.threads, program.threads // 32
        self.instructions = [inst for block in program.blocks for inst in block]
        self.positions = {id(inst): i for i, inst in enumerate(self.instructions)}
        self.total = self.grid[0] * self.grid[1] * self.grid[2]
        self.programs = range(self.total) if programs is None else programs
        self.order = np.arange(self.total)
        if schedule == "random":
            self.rng.shuffle(self.order[self.programs.start : self.programs.stop])
        self.ctas = min(len(self.programs), max(1, WIDEST // self.threads))
        self.shared = memory.SharedMemory(shared, self.ctas)
        self.global_ = global_memory
        self.memories = {"shared": self.shared, "global": self.global_}
        grains = memory.grain_of(program)
        agents = self._agents()
        self.races = Races(self.ctas, self.threads, agents, self.instructions, self.report)
        self.races.shadow("shared", self.shared.bytes.size, grains["shared"])
        self.races.shadow("global", self.global_.bytes.size, grains["global"])
        self.counting, self.counts = counting, Counts(self)
        self.findings: Counter = Counter()
        self.executed = np.zeros(len(self.instructions), np.int64)  # by warps
        self.pending: list[Callable[[], None]] = []  # what will land
        self.state: dict[Any, Any] = {}  # for what handlers keep for a batch
        self.endings: list[Callable[[Unit], None]] = []  # called when a batch has ended
        self.slots: dict[tuple, int] = {}
        self.types: dict[str, np.dtype] = {}  # of registers, in bits
        self.units: list[Unit] = []
        self.first_cta = 0
        self.seconds = 0.0
        self.grouped = any(inst.op.startswith("wgmma") for inst in self.instructions)
        if self.grouped:
            self.endings.append(lambda unit: wgmma.ending(self, unit))
            for inst, why in wgmma_fences.unfenced(program):
                self.report("missing wgmma.fence", inst, why)
        self.explanations: list[Callable[[], list[str]]] = []  # called at a deadlock
        self.crowded = barriers.crowded(program)
        self._leavers = [self._leaver(i) for i in range(len(program.blocks))]
        self._functions = [blocks.compile_block(block, self) for block in program.blocks]

    def _agents(self) -> int:
        """How many there may be beside a CTA's warps: those that copy, multiply, and barriers."""

        def count(*prefixes: str) -> int:
            return sum(inst.op.startswith(prefixes) for inst in self.instructions)

        copying = (count("cp.async") > 0) + (count("cp.async.bulk") > 0)  # each for every warp
        made = count("mbarrier.init") + count("tensormap.cp_fenceproxy")
        return copying * self.warps + self.warps // 4 + made

    # --- what handlers use ------------------------------------------------------------------------

    def index(self, inst: Instruction) -> int:
        """The place of an instruction in `instructions`."""
        return self.positions[id(inst)]

    def type_of(self, name: str) -> np.dtype:
        """The bits of a register, by its declaration."""
        if name not in self.types:
            self.types[name] = self._type_of(name)
        return self.types[name]

    def _type_of(self, name: str) -> np.dtype:
        if name in SPECIAL:
            return np.dtype(np.uint64 if name == "%globaltimer" else np.uint32)
        if name not in self.program.registers:
            raise UnknownInstruction(f"register {name} is not declared")
        dtype = types.of(self.program.registers[name])
        return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")

    def slot(self, name: str, dtype: np.dtype, part: tuple[int, int] = (0, 1)) -> int:
        """The index in `Unit.views` of a register seen as a dtype; part i of n of its bits."""
        return self.slots.setdefault((name, dtype, part), len(self.slots))

    def constant(self, operand: Immediate | Symbol, dtype: np.dtype) -> Any:
        """The value of an operand that is no register."""
        if isinstance(operand, Symbol):
            if operand.name == "global_smem":
                return dtype.type(0)
            for parameter in self.program.parameters:
                if parameter.name == operand.name:
                    return dtype.type(PARAMETERS + parameter.offset)
            raise UnknownInstruction(f"{operand.name} is neither a parameter nor global_smem")
        if dtype.kind == "b":
            return np.bool_(operand.value != 0)
        size = operand.float_bytes
        if size and size != dtype.itemsize and dtype.kind == "f":
            wide = np.array(operand.value, f"u{size}").view(f"f{size}")
            return dtype.type(wide)
        bits = operand.value & ((1 << (8 * dtype.itemsize)) - 1)
        return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]

    def parameter(self, name: str, offset: int, dtype: np.dtype) -> Any:
        """The value at an offset of a parameter."""
        raw = self.parameters[name]
        raw = raw if isinstance(raw, bytes) else np.asarray(raw).tobytes()
        raw = raw[offset : offset + dtype.itemsize]
        if len(raw) != dtype.itemsize:
            raise UnknownInstruction(f"{name} has no {dtype.itemsize} bytes at {offset}")
        return np.frombuffer(raw, dtype)[0]

    def read(self, operand: Operand, dtype: np.dtype) -> Callable[[Unit], Any]:
        """A function of a unit that gives an operand: an array of its lanes, or a scalar."""
        if not isinstance(operand, Register):
            value = self.constant(operand, dtype)
            return lambda unit: value
        bits = self.type_of(operand.name)
        if bits.kind == "b" or bits.itemsize == dtype.itemsize:
            slot = self.slot(operand.name, dtype)
            return lambda unit: unit.views[slot]
        slot = self.slot(operand.name, np.dtype(f"{dtype.kind}{bits.itemsize}"))
        return lambda unit: unit.views[slot].astype(dtype)

    def write(self, operand: Operand, dtype: np.dtype) -> Callable[[Unit, Any, Any], None]:
        """A function (unit, values, mask) that writes a register."""
        if operand == Register("_"):
            return lambda unit, values, mask: None
        slot = self.slot(operand.name, self.destination(operand.name, dtype))

        def put(unit: Unit, values: Any, mask: np.ndarray | None) -> None:
            if mask is None:
                unit.views[slot][...] = values
            else:
                np.copyto(unit.views[slot], values, where=mask)

        return put

    def destination(self, name: str, dtype: np.dtype) -> np.dtype:
        """How a register is seen when values of `dtype` are written to it: wider, by their sign."""
        bits = self.type_of(name)
        if bits.kind == "b" or dtype.kind == "b":
            return np.dtype(bool)
        if bits.itemsize == dtype.itemsize:
            return dtype
        if bits.itemsize < dtype.itemsize:
            raise UnknownInstruction(f"{name} is too narrow for {dtype}")
        return np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{bits.itemsize}")

    def address(self, operand: Address) -> Callable[[Unit], np.ndarray]:
        """A function of a unit that gives the byte address of each lane."""
        base, offset = operand.base, operand.offset
        if not isinstance(base, Register):
            at = int(self.constant(base, np.dtype(np.int64))) + offset
            return lambda unit: np.full(unit.n, at)
        bits = self.type_of(base.name)
        slot, more = self.slot(base.name, bits), np.array(offset).astype(bits)  # may wrap around
        return lambda unit: (unit.views[slot] + more).astype(np.int64)

    def fail(
        self, inst: Instruction, unit: Unit, lane: Any, message: str, kind: type = MachineFault
    ) -> None:
        """Raise a fault, with where and by whom."""
        lane = int(np.atleast_1d(lane)[0])
        cta = self.first_cta + int(unit.cta[lane])
        raise kind(f"{self.program.name}, program {self.position(cta)}, thread "
                   f"{int(unit.thread[lane])}: {message}\n  at {inst.where}")  # fmt: skip

    def report(
        self, kind: str, inst: Instruction, message: str, other: Instruction | None = None
    ) -> None:
        """Note a finding that does not end the run; the same one is counted."""
        words = message.rsplit(", byte ", 1)[0]
        self.findings[kind, words, inst.where, other.where if other else ""] += 1

    def position(self, cta: int) -> tuple[int, int, int]:
        """The program that the CTA of this number is; they are executed by their numbers."""
        return tuple(int(axis) for axis in self._program(np.array(cta)))

    def _program(self, cta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y, _ = self.grid
        cta = self.order[cta]
        return cta % x, cta // x % y, cta // x // y

    # --- the schedule -----------------------------------------------------------------------------

    def run(self) -> "Core":
        """Execute the CTAs."""
        started = time.perf_counter()
        size = 1 if self.schedule != "lockstep" else self.warps
        if self.grouped and self.schedule != "lockstep" and self.warps % 4 == 0:
            size = 4
        with np.errstate(all="ignore"):
            for first in self.programs[:: self.ctas]:
                self.first_cta = first
                self._begin(size, min(self.ctas, self.programs.stop - first))
                self._batch()
                for unit in self.units:
                    for ending in self.endings:
                        ending(unit)
        self.seconds = time.perf_counter() - started
        return self

    def _begin(self, size: int, count: int) -> None:
        if not self.units or self.units[0].n != count * 32 * size:
            groups = [range(i, i + size) for i in range(0, self.warps, size)]
            self.units = [Unit(self, group, count) for group in groups]
        for unit in self.units:
            unit.begin()
            for name in SPECIAL:
                if name in unit.registers:
                    unit.registers[name][:] = self._special(name, unit)
        self.shared.clear()
        self.races.next_batch(self.first_cta)
        self.pending.clear()
        self.state.clear()
        self.barriers: dict[tuple[int, int], barriers.Barrier] = {}  # by CTA and number
        self.exited = np.zeros(count, np.int64)  # threads of each CTA
        self.registers = barriers.Registers.begin(count, self.warps, self.program.max_registers)

    def _special(self, name: str, unit: Unit) -> Any:
        axis = "xyz".find(name[-1])
        if name.startswith("%ctaid"):
            return self._program(self.first_cta + unit.cta)[axis]
        if name.startswith("%nctaid"):
            return self.grid[axis]
        return {
            "%tid.x": unit.thread, "%laneid": unit.thread % 32, "%warpid": unit.thread // 32,
            "%ntid.x": self.threads, "%smid": self.first_cta + unit.cta, "%nsmid": self.total,
        }.get(name, 0)  # fmt: skip

    def _batch(self) -> None:
        """Let units take turns until all threads have ended."""
        order = self.rng.permutation(len(self.units))
        current = None
        while True:
            able = [u for u in self.units if u.able]
            if not able:
                if all((u.doing == DONE).all() for u in self.units):
                    return
                if not self.pending:
                    self._deadlock()
                self._land()
                continue
            if self.schedule == "random":
                if self.pending and self.rng.random() < 0.1:
                    self._land()
                unit = able[self.rng.integers(len(able))] if len(able) > 1 else able[0]
            elif current in able:
                unit = current
            else:
                unit = min(able, key=lambda u: order[self.units.index(u)])
            current = unit
            self._step(unit)

    def _land(self) -> None:
        """Let something asynchronous arrive."""
        late = self.schedule == "late"
        index = len(self.pending) - 1 if late else int(self.rng.integers(len(self.pending)))
        self.pending.pop(index)()

    def _step(self, unit: Unit) -> None:
        """Execute one block for the lanes of a unit that are furthest behind."""
        if unit.together:
            number, mask = int(unit.at[0]), None
        else:
            free = unit.doing == FREE
            number = int(unit.at[free].min())
            mask = free & (unit.at == number)
            if mask.all():
                mask, unit.together = None, True
        if number >= len(self.program.blocks):  # behind the end
            raise UnknownInstruction(f"{self.program.name} runs past its last instruction")
        block = self.program.blocks[number]
        if number in self.crowded:
            barriers.check_registers(self, self.crowded[number], unit, mask)
        self._functions[number](unit, mask)
        self._count(block, unit, mask)
        if self._leavers[number] is not None:
            self._leave(block[-1], number, unit, mask)
        else:
            unit.at[... if mask is None else mask] = number + 1

    def _count(self, block: list, unit: Unit, mask: np.ndarray | None) -> None:
        if not block:
            return
        first = self.positions[id(block[0])]
        warps = unit.n // 32
        if mask is not None:
            warps = int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
        self.executed[first : first + len(block)] += warps

    def _leave(self, inst: Instruction, number: int, unit: Unit, mask: np.ndarray | None) -> None:
        """The instruction at the end of a block: where do its threads go?"""
        taken = mask
        if inst.guard:
            name, negated = inst.guard
            guard = unit.registers[name]
            guard = ~guard if negated else guard
            taken = guard if mask is None else guard & mask
            if taken.all():
                taken = None
        unit.at[... if mask is None else mask] = number + 1
        if taken is None or taken.any():
            self._leavers[number](unit, taken)

    def _leaver(self, number: int) -> Callable | None:
        """What the last instruction of a block does, if it decides where threads go."""
        block = self.program.blocks[number]
        if not block or not handlers.ends_block(block[-1]):
            return None
        inst = block[-1]
        if inst.guard:
            self.slot(inst.guard[0], np.dtype(bool))
        base = inst.parts[0]
        if base == "bra":
            target = self.program.labels[inst.operands[0].name]

            def branch(unit: Unit, mask: np.ndarray | None) -> None:
                if mask is None:
                    unit.at[:] = target
                else:
                    unit.at[mask] = target
                    unit.together = False

            return branch
        if base in ("ret", "exit"):
            return self._end
        if base in ("bar", "barrier"):
            return barriers.build(inst, self)
        if base == "setmaxnreg":
            return barriers.build_setmaxnreg(inst, self)
        if base == "mbarrier":
            return self._spinner(inst, number)
        return lambda unit, mask: self.fail(
            inst, unit, 0 if mask is None else np.flatnonzero(mask), "the kernel traps"
        )

    def _spinner(self, inst: Instruction, number: int) -> Callable:
        """try_wait: a thread that asks again and again sleeps until an mbarrier changes."""
        ask = handlers.find(inst.op)(inst, self)
        after = next(iter(self.program.blocks[number + 1]), None)
        loops = after is not None and after.op.startswith("bra") and after.guard is not None
        loops = loops and self.program.labels.get(after.operands[0].name) == number

        def wait(unit: Unit, mask: np.ndarray | None) -> None:
            done = ask(unit, mask)
            if loops and not done.all():
                self.set(unit, ~done, SPINS)

        return wait

    def _end(self, unit: Unit, mask: np.ndarray | None) -> None:
        self.set(unit, mask, DONE)
        np.add.at(self.exited, unit.cta if mask is None else unit.cta[mask], 1)
        barriers.open_all(self)

    @staticmethod
    def set(unit: Unit, mask: np.ndarray | None, doing: int) -> None:
        """These lanes of a unit now do that: FREE, SPINS, WAITS or DONE."""
        unit.together = False
        unit.doing[... if mask is None else mask] = doing
        unit.able = doing == FREE or bool((unit.doing == FREE).any())

    def wake(self) -> None:
        """An mbarrier has changed: who spins looks again."""
        for unit in self.units:
            if not unit.together:
                self.set(unit, unit.doing == SPINS, FREE)
                unit.able = bool((unit.doing == FREE).any())

    def _deadlock(self) -> None:
        """Nobody can go on: say who waits where, and for what."""
        lines = []
        for unit in self.units:
            for doing, word in ((WAITS, "waits"), (SPINS, "spins")):
                lanes = unit.doing == doing
                for at in np.unique(unit.at[lanes]):
                    some = np.flatnonzero(lanes & (unit.at == at))
                    inst = self.program.blocks[at - 1][-1]
                    warps = ", ".join(str(w) for w in np.unique(unit.thread[some] // 32))
                    where = self.position(self.first_cta + int(unit.cta[some[0]]))
                    lines.append(f"  program {where}: warps {warps} {word} at {inst.where}")
        lines += [text for explain in self.explanations for text in explain()]
        raise MachineFault(f"{self.program.name}: deadlock, nobody can go on\n" + "\n".join(lines))
