"""The tensor cores as a warp uses them: fragments, ldmatrix, stmatrix and mma.sync.

A tensor core multiplies small matrices, but a register belongs to one thread. So a matrix is cut
into *fragments*: each of the 32 lanes of a warp holds a few elements, and the instruction fixes
which. All layouts are made from one piece, a tile of 8 rows and 16 bytes a row. Lane 4g + t holds
the t-th word (4 bytes) of row g; g is its group, t its thread in the group:

                    word 0   word 1   word 2   word 3
            row 0   lane 0   lane 1   lane 2   lane 3      a word is one f32 or tf32,
            row 1   lane 4   lane 5   lane 6   lane 7      two f16 or bf16,
            ...                                            or four s8, u8, e4m3 or e5m2
            row 7   lane 28  lane 29  lane 30  lane 31

mma.sync computes D = A B + C with A 16 x K, B K x 8 and C, D 16 x 8. K is one or two tiles wide.
The numbers below are those of the registers:

                 B, each column a row of its tile          A       +-----+-----+
                 +-----+                                           |  0  |  2  |   rows 0-7
       K         |  0  |                                           +-----+-----+
                 |  1  |                                           |  1  |  3  |   rows 8-15
       A  x  B   +-----+    (K runs along the row of a tile)       +-----+-----+

C and D have two neighbouring columns in a lane: columns 2t and 2t + 1 of row g in registers 0 and 1
(f16: both in register 0), of row g + 8 in registers 2 and 3.

Why ldmatrix exists. A row of a tile lies in shared memory as 16 bytes that belong together, but the
four lanes that need them would load 4 bytes each, at addresses that each computes for itself.
ldmatrix turns it round: a lane names one row (lane 8i + r row r of tile i), the hardware reads the
eight rows of a tile in one pass, 8 x 16 bytes = 128 bytes = all 32 banks once, and deals the words
to the lanes. With .trans the lanes get columns instead of rows, which no wider load could do.
stmatrix is the same the other way.

How numbers behave here. Products of f16, bf16, tf32 and 8-bit floats are exact in f32. How a tensor
core adds them is unspecified (PTX ISA, mma, "Precision"): here they are added by a float32 matrix
product. Integer products are exact: 32 of them stay below 2^24, which float32 holds, and are then
added in s32. A tf32 operand is a 32-bit register whose low 13 bits are ignored: the PTX ISA calls
the layout of .tf32 implementation-defined, CUTLASS's tfloat32_t calls those bits don't-care and
clears them. So they are cut off, not rounded: compilers round before, with cvt.rna.tf32.f32.

Sources: PTX ISA 9.0, sections 9.7.14.5.7 to 9.7.14.5.10 (fragments), 9.7.14.5.14 (mma), 9.7.14.5.15
(ldmatrix) and 9.7.14.5.16 (stmatrix); CUTLASS, include/cutlass/tfloat32.h.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tilelab.perf.machine.collectives import whole_warps
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.memory import mark, written

WORD = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4")}


# --- Numbers: bits in a register or in memory -> float32 ------------------------------------------


def _e4m3_values() -> np.ndarray:
    """All 256 e4m3 numbers: 4 bits of exponent with bias 7, 3 of fraction, no infinity, one NaN."""
    code = np.arange(128)
    exponent, fraction = code >> 3, code & 7
    value = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    value[127] = np.nan
    return np.concatenate([value, -value]).astype(np.float32)


_E4M3 = _e4m3_values()

# The bytes of an element, and the float32 values of an array of its bits.
FORMATS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "f16": (2, lambda x: x.view(np.float16).astype(np.float32)),
    "bf16": (2, lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)),
    "tf32": (4, lambda x: (x & np.uint32(0xFFFFE000)).view(np.float32)),
    "e4m3": (1, lambda x: _E4M3[x]),
    "e5m2": (1, lambda x: (x.astype(np.uint16) << np.uint16(8)).view(np.float16).astype("f4")),
    "s8": (1, lambda x: x.view(np.int8).astype(np.float32)),
    "u8": (1, lambda x: x.astype(np.float32)),
}
ACCUMULATORS = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "s32": np.dtype("i4")}


def add_product(c: np.ndarray, product: np.ndarray, saturate: bool = False) -> np.ndarray:
    """C + A B in C's type: f32, f16 (rounded once), or s32 (wraps; `saturate` clamps)."""
    if c.dtype == np.float32:
        return c + product
    if c.dtype == np.float16:
        return (c.astype(np.float32) + product).astype(np.float16)
    total = c.astype(np.int64) + product.astype(np.int64)
    if saturate:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return total.astype(np.int32)


# --- Fragments: registers of a warp <-> matrices --------------------------------------------------
# An array of registers is [R, N]: R registers of N lanes. W = N / 32 warps are done at once.


def words(registers: np.ndarray, size: int) -> np.ndarray:
    """Registers [R, N] as their elements of `size` bytes: [R, W, g, t, element of the word]."""
    r, n = registers.shape
    return registers.view(WORD[size]).reshape(r, n // 32, 8, 4, registers.itemsize // size)


def a_matrix(x: np.ndarray) -> np.ndarray:
    """A fragments [R, W, g, t, e] -> A [W, 16, K]. Registers: rows 0-7, rows 8-15, next tile."""
    r, w, g, t, e = x.shape
    x = x.reshape(r // 2, 2, w, g, t, e)  # [tile of K, half of the rows, ...]
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(w, 16, -1)


def b_matrix(x: np.ndarray) -> np.ndarray:
    """B fragments [R, W, g, t, e] -> B [W, K, 8]: g is the column."""
    r, w, g, t, e = x.shape
    return x.transpose(1, 0, 3, 4, 2).reshape(w, r * t * e, g)


def accumulator_matrix(registers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Registers of C or D [R, N] -> matrix [W, 16, n] of `dtype`; n = 8 for mma.sync.

    R = n/2 registers of 32 bits, or n/4 with two f16 each.
    """
    r, n = registers.shape
    if dtype.itemsize == 4:  # two registers side by side
        x = registers.view(dtype).reshape(r // 2, 2, n).swapaxes(1, 2)
    else:
        x = registers.view(dtype)
    x = x.reshape(-1, 2, n // 32, 8, 4, 2)  # [8 columns, half of the rows, W, g, t, e]
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(n // 32, 16, -1)


def accumulator_registers(matrix: np.ndarray) -> np.ndarray:
    """The inverse of accumulator_matrix: [W, 16, n] -> [R, N] of uint32."""
    w, _, n = matrix.shape
    x = matrix.reshape(w, 2, 8, n // 8, 4, 2).transpose(3, 1, 0, 2, 4, 5)  # [j, h, W, g, t, e]
    if matrix.itemsize == 4:
        x = x.reshape(-1, 32 * w, 2).swapaxes(1, 2)
    return np.ascontiguousarray(x).view(np.uint32).reshape(-1, 32 * w)


def tiles_to_registers(tiles: np.ndarray) -> np.ndarray:
    """8 x 8 tiles of 16-bit elements [W, tiles, 8, 8] -> registers [tiles, N]: ldmatrix."""
    w, count = tiles.shape[:2]
    x = np.ascontiguousarray(tiles).view(np.uint32)  # [W, tiles, 8, 4]
    return x.swapaxes(0, 1).reshape(count, 32 * w)


def registers_to_tiles(registers: np.ndarray) -> np.ndarray:
    """Registers [tiles, N] -> tiles [W, tiles, 8, 8]: stmatrix."""
    count, n = registers.shape
    x = registers.reshape(count, n // 32, 8, 4).swapaxes(0, 1)
    return np.ascontiguousarray(x).view(np.uint16)


# --- Handlers -------------------------------------------------------------------------------------

SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")


def stack(reads: list[Callable], unit: Any) -> np.ndarray:
    """The values of several 32-bit registers: [R, N]."""
    out = np.empty((len(reads), unit.n), np.uint32)
    for row, read in zip(out, reads, strict=True):
        row[:] = read(unit)
    return out


def _matrix_shape(inst: Any) -> tuple[int, bool]:
    """How many tiles ldmatrix or stmatrix moves, and whether transposed."""
    known = "m8n8" in inst.parts and inst.parts[-1] == "b16"
    if not known or not any(part.startswith("shared") for part in inst.parts):
        raise UnknownInstruction(
            f"{inst.where}: of {inst.parts[0]} only .m8n8 .b16 in shared memory is executed; "
            "the .b8 forms are of sm_100"
        )
    count = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in inst.parts if re.match(r"x\d$", p))]
    return count, "trans" in inst.parts


def _touched(warps: np.ndarray, rows: np.ndarray, trans: bool) -> tuple[np.ndarray, np.ndarray]:
    """Who touches what: (lanes, offsets) of the words, or with `trans` of the single elements.

    rows [W, tiles, 8]: the offset of each row. The lane that names a row is not the one that gets
    it, and a race is a matter of the one that gets it.
    """
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    if trans:  # lane 4g + t has column g of rows 2t and 2t + 1
        offsets = np.stack([rows[:, :, 2 * t], rows[:, :, 2 * t + 1]], -1) + 2 * g[:, None]
        lanes = lane[:, None]
    else:
        offsets, lanes = rows[:, :, g] + 4 * t, lane
    who = warps.reshape(-1, *[1] * (offsets.ndim - 1)) * 32 + lanes
    return np.broadcast_to(who, offsets.shape).ravel(), offsets.ravel()


def build_ldmatrix(inst: Any, core: Any) -> Callable:
    """ldmatrix: tiles of shared memory -> registers. Lane 8i + r names row r of tile i."""
    count, trans = _matrix_shape(inst)
    destination, address = inst.operands
    puts = [core.write(item, np.dtype("u4")) for item in destination.items]
    address, index, memory = core.address(address), core.index(inst), core.shared

    def load(unit: Any, mask: np.ndarray | None) -> None:
        warps = whole_warps(core, inst, unit, mask)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
        at = np.broadcast_to(address(unit), unit.n)[lanes]
        rows = memory.offsets(core, inst, unit, lanes, at, 16)
        who, offsets = _touched(warps, rows.reshape(-1, count, 8), trans)
        core.races.read("shared", index, unit.gid[who], offsets, 2 if trans else 4)
        written(core, inst, rows, 16)
        if core.counting:
            core.counts.access(inst, "shared", unit, lanes, rows, 16)
        tiles = memory.bytes.reshape(-1, 16)[rows >> 4].view(np.uint16).reshape(-1, count, 8, 8)
        values = tiles_to_registers(tiles.swapaxes(2, 3) if trans else tiles)
        for put, value in zip(puts, values, strict=True):
            if mask is not None:
                value, part = np.zeros(unit.n, np.uint32), value
                value[mask] = part
            put(unit, value, mask)

    return load


def build_stmatrix(inst: Any, core: Any) -> Callable:
    """stmatrix: registers -> tiles of shared memory."""
    count, trans = _matrix_shape(inst)
    reads = [core.read(item, np.dtype("u4")) for item in inst.operands[1].items]
    address, index, memory = core.address(inst.operands[0]), core.index(inst), core.shared

    def store(unit: Any, mask: np.ndarray | None) -> None:
        warps = whole_warps(core, inst, unit, mask)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
        at = np.broadcast_to(address(unit), unit.n)[lanes]
        rows = memory.offsets(core, inst, unit, lanes, at, 16)
        registers = stack(reads, unit)
        tiles = registers_to_tiles(registers if mask is None else registers[:, mask])
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if trans else tiles)
        new, shared = tiles.view(np.uint8).reshape(-1, 16), memory.bytes.reshape(-1, 16)
        # Layouts that hold a row in several warps store it from each: the same bytes.
        same = (shared[rows >> 4] == new).reshape(-1, count, 8, 16)
        size = 2 if trans else 4
        same = same.reshape(*same.shape[:3], 16 // size, size).all(-1)  # [W, tiles, row, piece]
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        if trans:
            same = np.stack([same[:, :, 2 * t, g], same[:, :, 2 * t + 1, g]], -1)
        else:
            same = same[:, :, g, t]
        who, offsets = _touched(warps, rows.reshape(-1, count, 8), trans)
        core.races.write("shared", index, unit.gid[who], offsets, size, same.ravel())
        if core.counting:
            core.counts.access(inst, "shared", unit, lanes, rows, 16)
        shared[rows >> 4] = new
        if (shared[rows >> 4] != new).any():
            core.report("race", inst, "threads of one instruction write different values to one "
                        "place")  # fmt: skip
        mark(memory, rows, 16)

    return store


def build_mma(inst: Any, core: Any) -> Callable:
    """mma.sync: D = A B + C, each matrix in the registers of one warp."""
    parts = inst.parts
    shape = next((found for part in parts if (found := SHAPE.match(part))), None)
    d_type, a_type, b_type, c_type = parts[-4:]
    m, n, k = map(int, shape.groups()) if shape else (0, 0, 0)
    known = a_type in FORMATS and b_type in FORMATS and d_type in ACCUMULATORS
    size = FORMATS[a_type][0] if known else 0
    if (
        not known or (m, n) != (16, 8) or k * size not in (16, 32) or c_type != d_type
        or FORMATS[b_type][0] != size or (d_type == "s32") != (a_type in ("s8", "u8"))
        or any(part.startswith(("sp", "kind", "block")) for part in parts)
    ):  # fmt: skip
        raise UnknownInstruction(f"{inst.where}: this shape or type of mma is not executed")
    dtype, saturate = ACCUMULATORS[d_type], "satfinite" in parts
    (_, a_number), (_, b_number) = FORMATS[a_type], FORMATS[b_type]
    puts = [core.write(item, np.dtype("u4")) for item in inst.operands[0].items]
    a, b, c = ([core.read(i, np.dtype("u4")) for i in op.items] for op in inst.operands[1:4])
    if (len(a), len(b), len(c)) != (k * size // 8, k * size // 16, dtype.itemsize):
        raise UnknownInstruction(f"{inst.where}: the number of registers does not fit the shape")

    def multiply(unit: Any, mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        product = np.matmul(
            a_matrix(a_number(words(stack(a, unit), size))),
            b_matrix(b_number(words(stack(b, unit), size))),
        )
        result = add_product(accumulator_matrix(stack(c, unit), dtype), product, saturate)
        for put, value in zip(puts, accumulator_registers(result), strict=True):
            put(unit, value, mask)

    return multiply


HANDLERS = {"ldmatrix": build_ldmatrix, "stmatrix": build_stmatrix, "mma": build_mma}
