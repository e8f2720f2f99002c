"""Instructions by which the 32 threads (lanes) of a warp exchange registers, without memory.

    shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1     each lane gets %r1 of the lane 16 away (lane ^ 16)

           lane    0  1  2 ... 15  16 17 ... 31
           gets   16 17 18 ... 31   0  1 ... 15

Five such steps (16, 8, 4, 2, 1) add up a warp's values in every lane: Triton's reductions.
All lanes that the member mask names have to take part: -1 names all 32.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.ptx import Instruction, Pair

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core, Unit

U32 = np.dtype(np.uint32)
BOOL = np.dtype(bool)


def whole_warps(
    core: "Core", inst: Instruction, unit: "Unit", mask: np.ndarray | None, size: int = 32
) -> np.ndarray:
    """The warps of a unit that take part, by index. With 128 as `size`, its warpgroups.

    Fails if only a part of one is here, which is undefined on a GPU.
    """
    if size == 128 and (unit.warps[0] % 4 or len(unit.warps) % 4):
        core.fail(inst, unit, 0, "a warpgroup is four warps, the first of them a multiple of four")
    if mask is None:
        return np.arange(unit.n // size)
    here = np.count_nonzero(mask.reshape(-1, size), axis=1)
    partial = np.flatnonzero((here > 0) & (here < size))
    if partial.size:
        bad, whom = int(partial[0]), "warp" if size == 32 else "warpgroup"
        core.fail(inst, unit, size * bad, f"{inst.parts[0]} needs all {size} lanes of a {whom}, "
                  f"{here[bad]} are here")  # fmt: skip
    return np.flatnonzero(here)


def build_shfl(inst: Instruction, core: "Core") -> Callable:
    """shfl.sync: every lane reads a register of another lane of its warp."""
    mode, destination = inst.parts[2], inst.operands[0]
    pair = isinstance(destination, Pair)
    put = core.write(destination.first if pair else destination, U32)
    put_valid = core.write(destination.second, BOOL) if pair else None
    value, distance, clamp = (core.read(x, U32) for x in inst.operands[1:4])
    if mode not in ("bfly", "idx", "up", "down"):
        raise UnknownInstruction(f"{inst.where}: no such mode of shfl")

    def shuffle(unit: "Unit", mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        lane = unit.lanes % 32
        b, c = np.asarray(distance(unit), np.int64), np.asarray(clamp(unit), np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        low, high = lane & segment, (lane & segment) | (limit & ~segment)
        if mode == "bfly":
            source = lane ^ (b & 31)
        elif mode == "idx":
            source = low | (b & 31 & ~segment)
        else:
            source = lane + (b & 31) if mode == "down" else lane - (b & 31)
        ok = source >= high if mode == "up" else source <= high
        source = np.where(ok, source, lane)
        values = np.broadcast_to(value(unit), unit.n)
        put(unit, values[unit.lanes - lane + source], mask)
        if put_valid is not None:
            put_valid(unit, ok, mask)

    return shuffle


def build_vote(inst: Instruction, core: "Core") -> Callable:
    """vote.sync: what the predicates of a warp's lanes are together."""
    mode = inst.parts[2]
    negate = inst.text.split(",")[1].strip().startswith("!")
    if mode not in ("all", "any", "uni", "ballot") or negate:
        raise UnknownInstruction(f"{inst.where}: this form of vote is not known")
    source = core.read(inst.operands[1], BOOL)
    put = core.write(inst.operands[0], U32 if mode == "ballot" else BOOL)

    def vote(unit: "Unit", mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        votes = np.broadcast_to(source(unit), unit.n).reshape(-1, 32)
        if mode == "ballot":
            result = (votes << np.arange(32, dtype=np.uint32)).sum(1).astype(np.uint32)
        elif mode == "uni":
            result = votes.all(1) | ~votes.any(1)
        else:
            result = votes.all(1) if mode == "all" else votes.any(1)
        put(unit, np.repeat(result, 32), mask)

    return vote


def build_redux(inst: Instruction, core: "Core") -> Callable:
    """redux.sync: one integer of each lane, added or compared in one instruction."""
    kinds = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
             "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    if inst.parts[2] not in kinds or inst.parts[-1] not in ("s32", "u32", "b32"):
        raise UnknownInstruction(f"{inst.where}: this form of redux is not known")
    fold, dtype = kinds[inst.parts[2]], np.dtype("i4" if inst.parts[-1] == "s32" else "u4")
    source, put = core.read(inst.operands[1], dtype), core.write(inst.operands[0], dtype)

    def reduce(unit: "Unit", mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        values = np.broadcast_to(source(unit), unit.n).reshape(-1, 32)
        put(unit, np.repeat(fold.reduce(values, 1), 32), mask)

    return reduce


def build_warp_barrier(inst: Instruction, core: "Core") -> Callable:
    """bar.warp.sync: what a warp's lanes did to memory is ordered before what they do next."""

    def meet(unit: "Unit", mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        gids = unit.gid.reshape(-1, 32)
        core.races.barrier(gids if mask is None else gids[mask.reshape(-1, 32).any(1)])

    return meet


HANDLERS = {"shfl": build_shfl, "vote": build_vote, "redux": build_redux,
            "bar.warp.sync": build_warp_barrier}  # fmt: skip
