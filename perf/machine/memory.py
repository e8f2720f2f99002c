"""Global and shared memory, and the instructions that load from them and store to them.

Every thread of an instruction brings an address of its own. A GPU serves the 32 of a warp together:
global memory by sectors of 32 bytes, shared memory by its 32 banks of 4 bytes each (counts.py).

    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1 + 16]     16 bytes, address a multiple of 16
    st.shared.b16    [%r5], %rs1                           two bytes
    atom.global.add.f32 %r1, [%rd1], %r2                   adds, and returns what was there
    red.global.add.f32  [%rd1], %r2                        adds

Addresses are checked before anything is touched: multiples of the access's size, inside a tensor
(global) or inside what the kernel asked for (shared). Shared memory begins as NaN patterns, and
what nobody has written may not be read.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tilelab.perf.machine import types
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.ptx import Instruction, Operand, Symbol, Vector

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core, Unit

GAP = 512  # bytes between tensors, which belong to nobody
GLOBAL_BASE = 1 << 32
POISON = 0xFF  # the bytes of NaN, as float16, bfloat16 and float32


class Memory:
    """Bytes at addresses from `base` on.

    Attributes:
        bytes: all of them.
        valid: which exist; between tensors there are gaps.
        initialised: which have been written.
    """

    def __init__(self, name: str, size: int, base: int = 0) -> None:
        size = -(-size // 16) * 16
        self.name, self.base = name, base
        self.bytes = np.full(size, POISON, np.uint8)
        self.valid = np.zeros(size, bool)
        self.initialised = np.zeros(size, bool)
        self._views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}

    def load(self, offsets: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Elements at these offsets, which are multiples of their size."""
        size = dtype.itemsize
        index = offsets if size == 1 else offsets >> (size.bit_length() - 1)
        return self._views[size][index].view(dtype)

    def store(self, offsets: np.ndarray, values: np.ndarray) -> None:
        """Write elements at these offsets, which are multiples of their size."""
        size = values.dtype.itemsize
        index = offsets if size == 1 else offsets >> (size.bit_length() - 1)
        self._views[size][index] = values.view(f"u{size}")


class GlobalMemory(Memory):
    """The tensors of a launch, each with a gap on both sides."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__("global", sum(size + 2 * GAP + 256 for size in sizes) + GAP, GLOBAL_BASE)
        self.top = GAP
        self.names: list[tuple[int, int, str]] = []  # begin, end, name

    def place(self, raw: np.ndarray, name: str, modulo: int = 0) -> int:
        """Copy bytes in, and return their address. It equals `modulo` modulo 256."""
        at = -(-self.top // 256) * 256 + modulo % 256
        self.bytes[at : at + raw.size] = raw
        self.valid[at : at + raw.size] = self.initialised[at : at + raw.size] = True
        self.top = at + raw.size + GAP
        self.names.append((at, at + raw.size, name))
        return self.base + at

    def offsets(
        self, core: "Core", inst: Instruction, unit: "Unit", lanes: np.ndarray,
        addresses: np.ndarray, size: int,
    ) -> np.ndarray:  # fmt: skip
        """Offsets into `bytes` of accesses of `size` bytes by these lanes, checked."""
        offsets = addresses - self.base
        if offsets.size == 0:
            return offsets
        if (offsets & (size - 1)).any():
            bad = int(np.flatnonzero(offsets & (size - 1))[0])
            core.fail(inst, unit, lanes[bad], f"global address {addresses[bad]:#x} of "
                      f"{size} bytes is not aligned{self._near(int(offsets[bad]))}")  # fmt: skip
        inside = (offsets >= 0) & (offsets + size <= self.bytes.size)
        at = offsets if inside.all() else np.where(inside, offsets, 0)
        inside &= self.valid[at] & self.valid[at + size - 1]
        if not inside.all():
            bad = int(np.flatnonzero(~inside)[0])
            core.fail(inst, unit, lanes[bad], f"out of bounds: global access of {size} bytes at "
                      f"{addresses[bad]:#x}{self._near(int(offsets[bad]))}")  # fmt: skip
        return offsets

    def _near(self, offset: int) -> str:
        """Where an address lies, in words."""
        if not self.names:
            return ""
        begin, end, name = min(self.names, key=lambda n: max(n[0] - offset, offset - n[1] + 1, 0))
        if offset < begin:
            return f", {begin - offset} bytes before {name}"
        if offset >= end:
            return f", {offset - end} bytes behind the end of {name} ({end - begin} bytes)"
        return f", byte {offset - begin} of {name}"


class SharedMemory(Memory):
    """The shared memory of every CTA of a batch, one after the other."""

    def __init__(self, size: int, ctas: int) -> None:
        self.size, self.stride = size, -(-max(size, 16) // 1024) * 1024
        super().__init__("shared", self.stride * ctas)

    def clear(self) -> None:
        """The next CTAs begin."""
        self.bytes[:] = POISON
        self.initialised[:] = False

    def offsets(
        self, core: "Core", inst: Instruction, unit: "Unit", lanes: np.ndarray,
        addresses: np.ndarray, size: int,
    ) -> np.ndarray:  # fmt: skip
        """Offsets into `bytes` of accesses of `size` bytes by these lanes, checked."""
        wrong = (addresses & (size - 1)) != 0
        if wrong.any():
            bad = int(np.flatnonzero(wrong)[0])
            core.fail(inst, unit, lanes[bad], f"shared address {int(addresses[bad]):#x} of {size} "
                      "bytes is not aligned")  # fmt: skip
        outside = (addresses < 0) | (addresses > self.size - size)
        if outside.any():
            bad = int(np.flatnonzero(outside)[0])
            core.fail(inst, unit, lanes[bad], f"out of bounds: shared access of {size} bytes at "
                      f"{int(addresses[bad]):#x}, of {self.size} bytes")  # fmt: skip
        return addresses + unit.cta[lanes] * self.stride


def written(core: "Core", inst: Instruction, offsets: np.ndarray, size: int) -> None:
    """Report a load from shared memory that nobody has written."""
    memory = core.shared
    known = memory.initialised[offsets]
    if size > 1:
        known &= memory.initialised[offsets + size - 1]
    if not known.all():
        core.report("uninitialised", inst, "reads shared memory that nobody has written, byte "
                    f"{int(offsets[~known][0]) % memory.stride}")  # fmt: skip


def mark(memory: Memory, offsets: np.ndarray, size: int) -> None:
    """Bytes at these offsets, `size` each, have been written."""
    if size == 1:
        memory.initialised[offsets] = True
    else:
        view = memory.initialised.view(f"u{min(size, 8)}")
        ones = int.from_bytes(b"\1" * min(size, 8), "little")
        index = offsets // min(size, 8)
        view[index] = ones
        if size == 16:
            view[index + 1] = ones


# --- the instructions -----------------------------------------------------------------------------


def _shape(inst: Instruction) -> tuple[str, np.dtype, int]:
    """The state space, the type of an element, and how many there are."""
    parts = inst.parts
    space = next((p.split("::")[0] for p in parts if p.split("::")[0] in ("global", "shared")), "")
    if not space:
        raise UnknownInstruction(f"{inst.where}: only global and shared memory are executed")
    count = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
    return space, types.of(parts[-1]), count


def _items(operand: object) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _reach(
    inst: Instruction, core: "Core", memory: Memory, operand: Operand, size: int
) -> Callable:
    """A function (unit, mask) that gives the lanes, and the checked offset that each accesses."""
    address = core.address(operand)

    def reach(unit: "Unit", mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        lanes, at = unit.lanes, address(unit)
        if mask is not None:
            lanes = np.flatnonzero(mask)
            at = at[lanes]
        return lanes, memory.offsets(core, inst, unit, lanes, at, size)

    return reach


def build_ld(inst: Instruction, core: "Core") -> Callable:
    """ld: each thread loads one element, or a vector of two or four."""
    if inst.parts[1].startswith("param"):
        return _build_ld_param(inst, core)
    space, dtype, count = _shape(inst)
    memory, size = core.memories[space], dtype.itemsize * count
    puts = [core.write(item, dtype) for item in _items(inst.operands[0])]
    reach, index = _reach(inst, core, memory, inst.operands[1], size), core.index(inst)

    def load(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes, offsets = reach(unit, mask)
        core.races.read(space, index, unit.gid[lanes], offsets, size)
        if space == "shared":
            written(core, inst, offsets, size)
        if core.counting:
            core.counts.access(inst, space, unit, lanes, offsets, size)
        for i, put in enumerate(puts):
            values = memory.load(offsets + i * dtype.itemsize, dtype)
            if mask is not None:
                values, part = np.zeros(unit.n, dtype), values
                values[lanes] = part
            put(unit, values, mask)

    return load


def _build_ld_param(inst: Instruction, core: "Core") -> Callable:
    dtype = types.of(inst.parts[-1])
    address = inst.operands[1]
    if not isinstance(address.base, Symbol):
        raise UnknownInstruction(f"{inst.where}: a parameter is loaded by its name")
    items = _items(inst.operands[0])
    values = [
        core.parameter(address.base.name, address.offset + i * dtype.itemsize, dtype)
        for i in range(len(items))
    ]
    puts = [core.write(item, dtype) for item in items]

    def load(unit: "Unit", mask: np.ndarray | None) -> None:
        for put, value in zip(puts, values, strict=True):
            put(unit, value, mask)

    return load


def build_st(inst: Instruction, core: "Core") -> Callable:
    """st: each thread stores one element, or a vector of two or four."""
    space, dtype, count = _shape(inst)
    memory, size = core.memories[space], dtype.itemsize * count
    sources = [core.read(item, dtype) for item in _items(inst.operands[1])]
    reach, index = _reach(inst, core, memory, inst.operands[0], size), core.index(inst)

    def store(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes, offsets = reach(unit, mask)
        values = []
        for source in sources:
            value = np.broadcast_to(source(unit), unit.n)
            values.append(value if mask is None else value[lanes])
        # Layouts that hold an element in several threads store it from each: the same bytes.
        same = np.ones(lanes.size, bool)
        for i, value in enumerate(values):
            there = memory.load(offsets + i * dtype.itemsize, _bits(dtype))
            same &= _alike(there, value.view(_bits(dtype)))
        core.races.write(space, index, unit.gid[lanes], offsets, size, same)
        if core.counting:
            core.counts.access(inst, space, unit, lanes, offsets, size)
        for i, value in enumerate(values):
            bits = np.ascontiguousarray(value).view(_bits(dtype))
            memory.store(offsets + i * dtype.itemsize, bits)
            if not _alike(memory.load(offsets + i * dtype.itemsize, _bits(dtype)), bits).all():
                core.report("race", inst, "threads of one instruction write different values to "
                            "one place")  # fmt: skip
        mark(memory, offsets, size)

    return store


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where a GPU would have the same bits.

    Its arithmetic has one NaN, 0x7fffffff (PTX ISA, "Floating-point instructions"). That of the CPU
    has several, by their sign and by which operand they came from.
    """
    equal = a == b
    if equal.all() or a.itemsize not in (2, 4):
        return equal
    if a.itemsize == 4:
        one = ((a & 0x7FFFFFFF) > 0x7F800000) & ((b & 0x7FFFFFFF) > 0x7F800000)
        halves = [_alike((x >> shift).astype("u2"), (y >> shift).astype("u2"))
                  for x, y, shift in ((a, b, 0), (a, b, 16))]  # fmt: skip
        return equal | one | (halves[0] & halves[1])
    a, b = a & 0x7FFF, b & 0x7FFF  # NaN as float16, but not an infinity as bfloat16
    return equal | ((a > 0x7C00) & (a != 0x7F80) & (b > 0x7C00) & (b != 0x7F80))


OPERATIONS = {
    "add": lambda old, x: old + x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, 0, old + 1).astype(old.dtype),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1).astype(old.dtype),
}


def build_atom(inst: Instruction, core: "Core") -> Callable:
    """An atom returns what was there before, red does not. Threads take turns in a random order."""
    returns, parts = inst.parts[0] == "atom", inst.parts
    space, dtype, _ = _shape(inst)
    name = next((p for p in parts if p in OPERATIONS or p == "cas"), "")
    if not name or parts[-1] in ("f16x2", "bf16x2", "bf16"):
        raise UnknownInstruction(f"{inst.where}: this atomic operation is not known")
    memory, size, index = core.memories[space], dtype.itemsize, core.index(inst)
    operands = inst.operands[1:] if returns else inst.operands
    address = core.address(operands[0])
    sources = [core.read(operand, dtype) for operand in operands[1:]]
    put = core.write(inst.operands[0], dtype) if returns else None

    def update(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = core.rng.permutation(unit.lanes if mask is None else np.flatnonzero(mask))
        offsets = memory.offsets(core, inst, unit, lanes, address(unit)[lanes], size)
        core.races.update(space, index, unit.gid[lanes], offsets, size)
        given = [np.broadcast_to(source(unit), unit.n)[lanes] for source in sources]
        before = np.zeros(unit.n, dtype)
        for i in range(lanes.size):
            at = offsets[i : i + 1]
            old = memory.load(at, dtype)
            new = [x[i : i + 1] for x in given]
            if name == "cas":
                value = np.where(old == new[0], new[1], old)
            else:
                value = OPERATIONS[name](old, new[0])
            memory.store(at, value.astype(dtype))
            before[lanes[i]] = old[0]
        mark(memory, offsets, size)
        if core.counting:
            core.counts.access(inst, space, unit, lanes, offsets, size)
        if put is not None:
            put(unit, before, mask)

    return update


def grain_of(program: object) -> dict[str, int]:
    """The smallest access of a kernel to each memory, in bytes: the granule of its shadow.

    Rows of TMA's boxes begin at multiples of 16 bytes, so what they touch needs nothing smaller.
    """
    grains = {"shared": 16, "global": 16}
    for block in program.blocks:
        for inst in block:
            mnemonic = inst.parts[0]
            if mnemonic in ("ld", "st", "atom", "red") and not inst.parts[1].startswith("param"):
                space, dtype, count = _shape(inst)
                grains[space] = min(grains[space], dtype.itemsize * count)
            elif mnemonic == "mbarrier":
                grains["shared"] = min(grains["shared"], 8)
            elif inst.op.startswith("cp.async") and len(inst.operands) > 2:
                size = getattr(inst.operands[2], "value", 16)
                for space in grains:
                    grains[space] = min(grains[space], size if size in (4, 8) else 16)
            if inst.op.startswith(("cp.async.bulk.tensor", "wgmma", "tensormap")):
                grains["shared"] = min(grains["shared"], 8)
    return grains


HANDLERS = {"ld": build_ld, "st": build_st, "atom": build_atom, "red": build_atom}
