"""The faults that ptx_faults.py plants: each changes one instruction of a kernel, or a tensor map.

They are what a compiler, or who writes PTX by hand, gets wrong: a wait, barrier or fence that is
not there, a buffer or an element beside the right one, a mask forgotten, a layout read otherwise.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tilelab.perf.machine import types
from tilelab.perf.machine.ptx import (
    Address,
    Immediate,
    Instruction,
    Program,
    Register,
    TensorAddress,
    Vector,
)

NEW = Register("%fault")  # holds a changed operand


class Fault(NamedTuple):
    """One fault.

    Attributes:
        kind: for the table.
        block: where the instruction is.
        position: in its block.
        change: what stands in its place.
        words: what was changed.
        type: of the register NEW, if `change` has it.
        maps: tensor maps, by address, in place of the launch's.
    """

    kind: str
    block: int
    position: int
    change: tuple[Instruction, ...]
    words: str
    type: str = ""
    maps: dict[int, Any] = {}

    def plant(self, program: Program) -> Program:
        """The program with the fault."""
        blocks = list(program.blocks)
        block = list(blocks[self.block])
        block[self.position : self.position + 1] = self.change
        blocks[self.block] = block
        registers = program.registers | ({NEW.name: self.type} if self.type else {})
        return program._replace(blocks=blocks, registers=registers)


def faults(program: Program, maps: dict[int, Any]) -> list[Fault]:
    """All faults of a kernel, in the order of its text."""
    found = list(_of_maps(maps))
    for number, block in enumerate(program.blocks):
        for position, inst in enumerate(block):
            for kind, change, words, *more in _of(program, number, position, inst):
                found.append(Fault(kind, number, position, tuple(change), words, *more))
    return found


def _of_maps(maps: dict[int, Any]) -> Iterator[Fault]:
    for at, one in maps.items():
        for swizzle in (0, 32, 64, 128):
            if swizzle != one.swizzle:
                words = f"a tensor map with swizzle {swizzle} in place of {one.swizzle}"
                changed = {at: one._replace(swizzle=swizzle)}
                yield Fault("swizzle of a tensor map", 0, 0, (), words, "", changed)


def _of(program: Program, number: int, position: int, inst: Instruction) -> Iterator[tuple]:
    op, where = inst.op, (program, number, position)
    yield from _waits(inst)
    if op.startswith(("bar.", "barrier.")):
        yield from _barriers(inst)
    elif op.startswith(("fence", "wgmma.fence")):
        yield "fence removed", (), f"without {op}"
    elif "commit_group" in op:
        yield "commit removed", (), f"without {op}"
    elif op.startswith("setmaxnreg"):
        yield "setmaxnreg removed", (), f"without {inst.text}"
    elif op.startswith("mbarrier"):
        yield from _mbarriers(inst)
    elif op.startswith("bra") and _waits_above(*where):
        yield "mbarrier wait removed", (), "goes on whatever mbarrier.try_wait says"
    elif op.startswith("wgmma.mma_async"):
        yield from _descriptors(inst)
    elif op.startswith("setp"):
        yield from (_ring if _wraps(*where) else _comparisons)(inst)
    if op.startswith(("ldmatrix", "stmatrix")):
        other = op.replace(".trans", "") if ".trans" in op else op.replace(".x", ".trans.x", 1)
        if ".trans" not in op:
            other = ".".join(_with_trans(inst.parts))
        yield "transposition", (inst._replace(op=other),), f"{other} in place of {op}"
    yield from _addresses(inst)
    yield from _masks(inst)


def with_operand(inst: Instruction, place: int, operand: Any) -> Instruction:
    """The instruction with another operand."""
    return inst._replace(operands=(*inst.operands[:place], operand, *inst.operands[place + 1 :]))


def _with_trans(parts: list[str]) -> list[str]:
    at = next(i for i, part in enumerate(parts) if part.startswith("shared"))
    return [*parts[:at], "trans", *parts[at:]]


def _waits(inst: Instruction) -> Iterator[tuple]:
    if "wait_group" not in inst.op and "wait_all" not in inst.op:
        return
    yield "wait removed", (), f"without {inst.text}"
    if inst.operands:
        n = inst.operands[0].value
        later = inst._replace(operands=(Immediate(n + 1), *inst.operands[1:]))
        yield "wait weakened", (later,), f"{inst.op} {n + 1} in place of {n}"


def _barriers(inst: Instruction) -> Iterator[tuple]:
    yield "barrier removed", (), f"without {inst.text}"
    if len(inst.operands) == 2:
        number, count = inst.operands
        other = Immediate(15)
        yield "barrier of another number", (inst._replace(operands=(other, count)),), "number 15"
        if isinstance(count, Immediate):
            for n in (count.value + 32, count.value - 32):
                change = inst._replace(operands=(number, Immediate(n)))
                yield "barrier of another count", (change,), f"for {n} threads, not {count.value}"


def _mbarriers(inst: Instruction) -> Iterator[tuple]:
    name = inst.parts[1]
    if name in ("init", "inval", "arrive", "expect_tx"):
        yield f"mbarrier.{name} removed", (), f"without {inst.text}"
    if name == "init":
        count = Immediate(inst.operands[1].value + 1)
        yield "mbarrier.init of one more", (inst._replace(operands=(inst.operands[0], count)),), ""
    if "expect_tx" in inst.parts and isinstance(inst.operands[-1], Immediate):
        size = inst.operands[-1].value
        for other in (size // 2, size * 2):
            change = inst._replace(operands=(*inst.operands[:-1], Immediate(other)))
            yield "bytes expected", (change,), f"{other} in place of {size}"
    if "try_wait" in name:
        flip = _made("xor.b32", NEW, inst.operands[2], Immediate(1), like=inst)
        wait = with_operand(inst, 2, NEW)
        yield "parity flipped", (flip, wait), f"the other parity in {inst.text}", "b32"


def _made(op: str, *operands: Any, like: Instruction) -> Instruction:
    """A new instruction at the place of another."""
    return Instruction(op, operands, None, like.line, like.source, f"{op} (planted)")


def _waits_above(program: Program, number: int, position: int) -> bool:
    """Whether a branch goes back to the mbarrier.try_wait before it."""
    above = program.blocks[number - 1][-1:] if number and position == 0 else []
    return bool(above) and above[0].op.startswith("mbarrier.try_wait")


def _descriptors(inst: Instruction) -> Iterator[tuple]:
    for place in (1, 2):
        if isinstance(inst.operands[place], Vector):
            continue
        for field, bit in (
            ("start", 0), ("leading offset", 16), ("stride offset", 32), ("swizzle", 62),
            ("swizzle", 63),
        ):  # fmt: skip
            old = inst.operands[place]
            change = _made("xor.b64", NEW, old, Immediate(1 << bit), like=inst)
            if field == "start":  # the next 16 bytes
                change = _made("add.s64", NEW, old, Immediate(1), like=inst)
            words = f"bit {bit} of the descriptor of {'?AB'[place]}"
            multiply = with_operand(inst, place, NEW)
            yield f"descriptor: {field}", (change, multiply), words, "b64"
    scales = len(inst.operands)
    if inst.parts[-1] in ("f16", "bf16") and scales > 6:
        for place in range(6, scales):
            old = inst.operands[place].value
            change = with_operand(inst, place, Immediate(1 - old))
            yield "transposition", (change,), f"wgmma operand {place}"


def _wraps(program: Program, number: int, position: int) -> bool:
    """Whether a comparison decides that an index begins again: a selp between it and 0."""
    block = program.blocks[number]
    if len(block[position].operands) != 3 or not isinstance(block[position].operands[0], Register):
        return False
    predicate, index = block[position].operands[:2]
    if not isinstance(block[position].operands[2], Immediate):
        return False
    return any(
        inst.op.startswith("selp")
        and inst.operands[3] == predicate
        and Immediate(0) in inst.operands[1:3]
        and index in inst.operands[1:3]
        for inst in block[position + 1 : position + 6]
    )


def _ring(inst: Instruction) -> Iterator[tuple]:
    *rest, bound = inst.operands
    for n in (bound.value - 1, bound.value + 1):
        change = inst._replace(operands=(*rest, Immediate(n)))
        yield "ring index", (change,), f"begins again at {n} in place of {bound.value}"


def _comparisons(inst: Instruction) -> Iterator[tuple]:
    """A comparison of integers with one more or one less: a mask, or the end of a loop."""
    kind = inst.parts[-1]
    if kind[0] not in "sub" or len(inst.operands) != 3:
        return
    bound = inst.operands[2]
    for more in (1, -1):
        words = f"with {'one more' if more > 0 else 'one less'} in {inst.op}"
        if isinstance(bound, Immediate):
            change = with_operand(inst, 2, Immediate(bound.value + more))
            yield "comparison off by one", (change,), words
        else:
            one = _made(f"add.s{kind[1:]}", NEW, bound, Immediate(more), like=inst)
            change = one, with_operand(inst, 2, NEW)
            yield "comparison off by one", change, words, f"b{kind[1:]}"


def _accessed(inst: Instruction) -> int:
    """How many bytes an ordinary load or store moves."""
    count = next((int(p[1:]) for p in inst.parts if p in ("v2", "v4", "v8")), 1)
    return count * types.of(inst.parts[-1]).itemsize


def _addresses(inst: Instruction) -> Iterator[tuple]:
    """Each address of shared or global memory, one access further."""
    name, param = inst.parts[0], "param" in inst.op
    step = 0
    if name in ("ld", "st", "atom", "red") and not param:
        step = _accessed(inst)
    elif name in ("ldmatrix", "stmatrix"):
        step = 16
    elif name == "mbarrier" and inst.parts[1] != "try_wait":
        step = 8
    elif inst.op.startswith(("cp.async.ca", "cp.async.cg")):
        step = inst.operands[2].value
    elif inst.op.startswith("cp.async.bulk.tensor"):
        step = 128
    for place, operand in enumerate(inst.operands if step else ()):
        if isinstance(operand, TensorAddress):
            yield from _coordinates(inst, place, operand)
            continue
        if not isinstance(operand, Address):
            continue
        copies = inst.op.startswith(("cp.async.ca", "cp.async.cg"))
        is_global = place == 1 if copies else "global" in inst.op and name[:2] != "cp"
        size = 8 if inst.op.startswith("cp.async.bulk.tensor") and place == 2 else step
        change = with_operand(inst, place, operand._replace(offset=operand.offset + size))
        kind = "global address" if is_global else "shared address"
        yield kind, (change,), f"{size} bytes further, operand {place} of {inst.op}"


def _coordinates(inst: Instruction, place: int, operand: TensorAddress) -> Iterator[tuple]:
    for i, coordinate in enumerate(operand.coordinates):
        one = _made("add.s32", NEW, coordinate, Immediate(1), like=inst)._replace(guard=inst.guard)
        items = (*operand.coordinates[:i], NEW, *operand.coordinates[i + 1 :])
        moved = operand._replace(coordinates=items)
        yield (
            "TMA coordinate",
            (one, with_operand(inst, place, moved)),
            f"coordinate {i} is one more",
            "b32",
        )


MASKED = ("ld", "st", "atom", "red", "mbarrier", "cp.async.ca", "cp.async.cg",
          "cp.async.bulk.tensor")  # fmt: skip


def _masks(inst: Instruction) -> Iterator[tuple]:
    if inst.guard and inst.op.startswith(tuple(f"{name}." for name in MASKED)):
        yield "guard removed", (inst._replace(guard=None),), f"{inst.op} by all threads"
    if inst.op.startswith(("cp.async.ca", "cp.async.cg")) and len(inst.operands) > 3:
        full = (*inst.operands[:3], inst.operands[2])
        if inst.operands[3] != inst.operands[2]:
            yield "zero fill removed", (inst._replace(operands=full),), "all bytes are copied"
