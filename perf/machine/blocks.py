"""Turns a block of PTX, a straight run of instructions, into one Python function.

    add.f32  %f3, %f1, %f2;              def run(u, m):
    @%p1 mov.b32 %r5, 0;                     v = u.views
    st.shared.b32 [%r5], %f3;                s0, s1, s2, s3, s4 = v[0], v[1], v[2], v[3], v[4]
                                             add(s0, s1, out=s2)
                                             copyto(s4, 0, where=s3)
                                             h2(u, None)

and another one for when only the lanes of a mask m are here. Each is compiled when it is needed.

A register is an array of the unit's lanes. It is seen as the type that an instruction wants, as
int32 or as float32, by a NumPy view of the same bytes: `Core.slot` numbers these views. Whatever
has an effect beside its result is a call (`h2`) of what a handler has built.
"""

import functools
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np

from tilelab.perf.machine import handlers, types
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.ptx import Instruction, Operand, Register, Vector
from tilelab.perf.machine.registers import arithmetic
from tilelab.perf.machine.units import Unit

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core

Lines = list[tuple[str, str]]  # Python for all lanes, and for those of the mask
WHOLE = (0, 1)  # part 0 of 1 of a register


def compile_block(block: list[Instruction], core: "Core") -> Callable[[Unit, Any], None]:
    """Compile a block, except the instruction at its end that decides where threads go."""
    return _Block(block, core).function()


class _Block:
    def __init__(self, block: list[Instruction], core: "Core") -> None:
        self.block, self.core = block, core
        self.names: dict[str, Any] = {"copyto": np.copyto, "guarded": _guarded}
        self.views: dict[int, str] = {}

    def function(self) -> Callable:
        body: Lines = []
        for inst in self.block:
            if not handlers.ends_block(inst) and not inst.op.startswith(handlers.IGNORED):
                body += self.lines(inst)
        compiled: dict[bool, Callable] = {}

        def run(unit: Unit, mask: np.ndarray | None) -> None:
            masked = mask is not None
            if masked not in compiled:
                compiled[masked] = self.python([line[masked] for line in body])
            compiled[masked](unit, mask)

        return run

    def python(self, body: list[str]) -> Callable:
        """A function of a unit and a mask, with these lines as its body."""
        text = ["def run(u, m):", "    v = u.views"]
        text += [f"    {name} = v[{slot}]" for slot, name in self.views.items()]
        exec(_code("\n".join(text + [f"    {line}" for line in body])), self.names)
        return self.names["run"]

    def lines(self, inst: Instruction) -> Lines:
        """An instruction as Python."""
        k = self.core.index(inst)
        guard = ""
        if inst.guard:
            name, negated = inst.guard
            guard = ("~" if negated else "") + self.view(name, np.dtype(bool))
        build = handlers.find(inst.op)
        if build is not None:
            self.names[f"h{k}"] = build(inst, self.core)
            if not guard:
                return [(f"h{k}(u, None)", f"h{k}(u, m)")]
            return [(f"guarded(h{k}, u, {guard})", f"guarded(h{k}, u, {guard} & m)")]
        if inst.parts[0] == "mov" and any(isinstance(x, Vector) for x in inst.operands):
            return self.moved(inst, guard)
        return self.arithmetic(inst, guard)

    def arithmetic(self, inst: Instruction, guard: str) -> Lines:
        """A function of registers whose results go to registers."""
        k = self.core.index(inst)
        try:
            function = arithmetic.function(inst.op)
        except UnknownInstruction as e:
            raise UnknownInstruction(f"{e}: at {inst.where}") from None
        target, *sources = inst.operands
        targets = [target] if isinstance(target, Register) else list(target)
        if len(sources) != len(function.operands) or len(targets) != len(function.results):
            raise UnknownInstruction(f"{inst.where}: another number of operands was expected")
        given = [
            self.value(operand, dtype, f"{k}_{i}")
            for i, (operand, dtype) in enumerate(zip(sources, function.operands, strict=True))
        ]
        self.names[f"f{k}"] = function.call
        call = f"f{k}({', '.join(given)}"
        if len(targets) == 1:
            dtype = function.results[0]
            place = self.place(target, dtype)
            exact = target != Register("_") and self.core.destination(target.name, dtype) == dtype
            if isinstance(function.call, np.ufunc) and exact and not guard:
                return [(f"{call}, out={place})", f"copyto({place}, {call}), where=m)")]
            return self.assign([(place, call + ")")], guard)
        results = [
            (self.place(x, dtype), f"t{k}[{i}]")
            for i, (x, dtype) in enumerate(zip(targets, function.results, strict=True))
        ]
        return [(f"t{k} = {call})", f"t{k} = {call})"), *self.assign(results, guard)]

    def moved(self, inst: Instruction, guard: str) -> Lines:
        """A mov of several registers into one, or back: the parts of it are views of its bits."""
        target, source = inst.operands
        k, count = self.core.index(inst), len((target if isinstance(target, Vector) else source)[0])
        dtype = np.dtype(f"u{types.of(inst.parts[-1]).itemsize // count}")
        if isinstance(target, Vector):
            pairs = [
                (self.place(x, dtype), self.view(source.name, dtype, (i, count)))
                for i, x in enumerate(target.items)
            ]
        else:
            pairs = [
                (self.view(target.name, dtype, (i, count)), self.value(x, dtype, f"{k}_{i}"))
                for i, x in enumerate(source.items)
            ]
        return self.assign(pairs, guard)

    @staticmethod
    def assign(pairs: list[tuple[str, str]], guard: str) -> Lines:
        """Values to places; nothing goes to the register `_`."""
        lines = []
        for place, value in pairs:
            if place and guard:
                lines.append((f"copyto({place}, {value}, where={guard})",
                              f"copyto({place}, {value}, where={guard} & m)"))  # fmt: skip
            elif place:
                lines.append((f"{place}[...] = {value}", f"copyto({place}, {value}, where=m)"))
        return lines

    def place(self, target: Register, dtype: np.dtype) -> str:
        """Where a result of this dtype goes."""
        if target == Register("_"):
            return ""
        return self.view(target.name, self.core.destination(target.name, dtype))

    def view(self, name: str, dtype: np.dtype, part: tuple[int, int] = WHOLE) -> str:
        """A register seen as a dtype."""
        slot = self.core.slot(name, dtype, part)
        return self.views.setdefault(slot, f"s{slot}")

    def value(self, operand: Operand, dtype: np.dtype, key: str) -> str:
        """An operand as a Python expression."""
        if isinstance(operand, Vector) and len(operand.items) == 1:
            operand = operand.items[0]
        if isinstance(operand, Register):
            bits = self.core.type_of(operand.name)
            if bits.kind == "b" or bits.itemsize == dtype.itemsize:
                return self.view(operand.name, dtype)
            wide = np.dtype(f"{dtype.kind if dtype.kind in 'iu' else 'u'}{bits.itemsize}")
            self.names[f"d{key}"] = dtype
            return f"{self.view(operand.name, wide)}.astype(d{key})"
        self.names[f"c{key}"] = self.core.constant(operand, dtype)
        return f"c{key}"


@functools.lru_cache(maxsize=4096)
def _code(text: str) -> CodeType:
    """A block that is launched again has the same text; to read it takes half of the time."""
    return compile(text, "<a block of PTX>", "exec")


def _guarded(handler: Callable, unit: Unit, mask: np.ndarray) -> None:
    """Call a handler for the lanes of a mask, if there are any."""
    count = np.count_nonzero(mask)
    if count:
        handler(unit, None if count == unit.n else mask)
