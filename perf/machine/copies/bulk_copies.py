"""Copies of the TMA: boxes of tensors between global and shared memory (tensor_maps.py).

One thread starts a copy, and no thread takes part in it:

    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [s], [map, {x, y}], [b]
                                                a load. When it has landed, mbarrier b counts its
                                                bytes (mbarriers.py)
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [map, {x, y}], [s]
                                                a store
    cp.async.bulk.commit_group                  its group, as with cp.async (async_copies.py)
    cp.async.bulk.wait_group.read 0             shared memory has been read: it may be reused
    cp.async.bulk.wait_group 0                  ... and global memory is written

Here all of this happens as late as it may. A load lands at a moment that the schedule chooses, when
no thread can go on at the latest. Its place in shared memory holds the bytes of NaNs until then. A
store reads at wait_group.read, and writes at wait_group or when the CTA has ended. Whatever changes
shared memory in between would change what is stored, and is reported as a race. So is a store of
what st.shared wrote without a fence.proxy.async.

The TMA is several agents (races.py): one for the loads of each mbarrier, and for the stores of each
warp one that reads and one that writes.

A kernel can make its own map: it fills in the fields in shared memory, publishes them in global
memory, and tells the TMA's cache of maps about it:

    tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [s], 0, 64      one field
    tensormap.cp_fenceproxy...release.gpu.sync.aligned [g], [s], 128     a copy by a whole warp
    fence.proxy.tensormap::generic.acquire.gpu [g], 128                  before its first use

The fence is for the map at its address alone. So each instruction that publishes maps is an agent,
too, and a thread knows until when it has seen what this one published.

Source: PTX ISA 8.8, sections 9.7.9.25.4 and .5, 9.7.9.28 and 9.7.13.16.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tilelab.perf.machine.collectives import whole_warps
from tilelab.perf.machine.copies import tensor_maps
from tilelab.perf.machine.copies.async_copies import (
    Handler,
    build_commit,
    constant,
    groups_of,
    must_be_waited_for,
)
from tilelab.perf.machine.copies.mbarriers import checked
from tilelab.perf.machine.copies.tensor_maps import CHUNK, FIELDS, Part, TensorMap
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.memory import GAP, POISON
from tilelab.perf.machine.ptx import Instruction, TensorAddress

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core, Unit

S32 = np.dtype(np.int32)
READS, WRITES = "bulk reads", "bulk writes"  # a store is in a group of each


class Box(NamedTuple):
    """One box of one lane, on its way.

    Attributes:
        lane: that started the copy.
        tensor_map: says where its elements are.
        shared: its offset in shared memory.
        order: where its chunks lie there.
        part: what of it exists in the tensor.
        begin: the offset of `part` in global memory.
    """

    lane: int
    tensor_map: TensorMap
    shared: int
    order: np.ndarray | slice
    part: Part | None
    begin: int


class Copies:
    """What loads and stores have in common: the operands of a tensor copy."""

    def __init__(
        self, inst: Instruction, core: "Core", tensor: TensorAddress, shared: object
    ) -> None:
        self.inst, self.core, self.index = inst, core, core.index(inst)
        dimensions = int(inst.parts[4].removesuffix("d"))
        if len(tensor.coordinates) != dimensions:
            raise UnknownInstruction(f"{inst.where}: {dimensions} coordinates expected")
        self.map = core.read(tensor.base, np.dtype(np.uint64))
        self.coordinates = [core.read(x, S32) for x in tensor.coordinates]
        self.shared = core.address(shared)

    def boxes(self, unit: "Unit", mask: np.ndarray | None) -> list[Box]:
        """The boxes that these lanes ask for, one each."""
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        columns = [self.map, self.shared, *self.coordinates]
        rows = zip(
            lanes.tolist(),
            *(np.broadcast_to(column(unit), unit.n)[lanes].tolist() for column in columns),
            strict=True,
        )
        return [self._box(unit, *row) for row in rows]

    def _box(self, unit: "Unit", lane: int, at: int, shared: int, *coordinates: int) -> Box:
        inst, core = self.inst, self.core
        found = map_at(core, inst, unit, lane, at)
        if len(found.box) != len(coordinates):
            core.fail(inst, unit, lane, f"a tensor map of {len(found.box)} dimensions")
        if shared % tensor_maps.BOX_ALIGNMENT:
            core.fail(inst, unit, lane, f"a box at shared address {shared:#x}: no multiple of 128")
        last = shared + found.box_bytes - CHUNK.itemsize
        lanes = np.array([lane, lane])
        ends = core.shared.offsets(core, inst, unit, lanes, np.array([shared, last]), 16)
        part = found.part(coordinates)
        begin = -1 if part is None else part.address - core.global_.base
        if part is not None:
            # Rows begin at any byte. A gap between two tensors is longer than a step here.
            row = part.shape[-1]
            steps = np.append(np.arange(0, row, GAP), row - 1)
            touched = (part.rows()[:, None] + steps).ravel()
            lanes = np.broadcast_to(lane, touched.size)
            core.global_.offsets(core, inst, unit, lanes, touched, 1)
        if core.counting:
            core.counts.add(inst, "TMA bytes", 0 if part is None else np.prod(part.shape))
        return Box(lane, found, int(ends[0]), found.order(shared), part, begin)

    def chunks(self, box: Box) -> np.ndarray:
        """The shared memory of a box."""
        size = box.tensor_map.box_bytes
        return self.core.shared.bytes[box.shared : box.shared + size].view(CHUNK)

    def mark(self, box: Box, written: bool) -> None:
        """Its shared memory is written now, or no longer."""
        end = box.shared + box.tensor_map.box_bytes
        self.core.shared.initialised[box.shared : end] = written

    def note(self, unit: "Unit", box: Box, space: str, agent: int, time: int, writes: bool) -> None:
        """Tell the race check what an agent touches of a memory from now on."""
        access = self.core.races.write_as if writes else self.core.races.read_as
        offsets, size = np.array([box.shared]), box.tensor_map.box_bytes
        if space == "global":
            offsets, size = self.pieces(box), 16
        access(space, self.index, agent, time, int(unit.gid[box.lane]), offsets, size)

    def pieces(self, box: Box) -> np.ndarray:
        """Offsets in global memory of the pieces of 16 bytes that a box touches."""
        if box.part is None:
            return np.empty(0, np.int64)
        rows = box.part.rows() - self.core.global_.base
        return (rows[:, None] + np.arange(0, box.part.shape[-1], 16)).ravel()

    def scatter(self, box: Box, values: np.ndarray, agent: int, time: int, gid: int) -> None:
        """Write a box to global memory. Programs may store the same bytes, as in `st`."""
        if box.part is None:
            return
        pieces, raw = self.pieces(box), self.core.global_.bytes
        touched = np.minimum(pieces[:, None] + np.arange(16), raw.size - 1)
        before = raw[touched]
        box.tensor_map.scatter(values, box.part, raw, box.begin)
        same = (raw[touched] == before).all(1)
        self.core.races.write_as("global", self.index, agent, time, gid, pieces, 16, same)


def map_at(core: "Core", inst: Instruction, unit: "Unit", lane: int, address: int) -> TensorMap:
    """The tensor map at an address: a parameter of the kernel, or made by the kernel itself."""
    if address in core.maps:
        return core.maps[address]
    lanes = np.array([lane])
    begin = int(core.global_.offsets(core, inst, unit, lanes, np.array([address]), 64)[0])
    published = core.state.get("published", {}).get(address)
    if published is None:
        core.fail(inst, unit, lane, f"no tensor map at {address:#x}")
    time, by = published
    if core.races.known[unit.gid[lane], core.races.agent("tensormap", by)] < time:
        core.report("missing fence", inst, "uses a tensor map that the kernel made "
                    "with no fence.proxy.tensormap::generic.acquire between")  # fmt: skip
    try:
        raw = core.global_.bytes[begin : begin + tensor_maps.BYTES].tobytes()
        return tensor_maps.decode(raw)
    except ValueError as error:
        core.fail(inst, unit, lane, str(error))


# --- loads ----------------------------------------------------------------------------------------


def build_tensor(inst: Instruction, core: "Core") -> Handler:
    """cp.async.bulk.tensor: a load or a store of a box."""
    parts = inst.parts
    for word, what in (
        ("im2col", "im2col mode"), ("gather", "gather4"), ("scatter", "scatter4"),
        ("multicast", "multicast to a cluster"), ("cta_group", "a pair of CTAs"),
    ):  # fmt: skip
        if any(word in part for part in parts):
            raise UnknownInstruction(f"{inst.where}: TMA copies with {what} are not supported")
    ends = [part for part in parts[5:] if part != "tile"]
    if ends[:2] in (["shared::cta", "global"], ["shared::cluster", "global"]):
        if ends[2:] == ["mbarrier::complete_tx::bytes"] and len(inst.operands) == 3:
            return _build_load(inst, core)
    elif ends == ["global", "shared::cta", "bulk_group"] and len(inst.operands) == 2:
        return _build_store(inst, core)
    raise UnknownInstruction(f"{inst.where}: this form of a tensor copy is not supported")


def _build_load(inst: Instruction, core: "Core") -> Handler:
    copies = Copies(inst, core, inst.operands[1], inst.operands[0])
    barrier = core.address(inst.operands[2])
    races, under_way = core.races, []

    def load(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        offsets = core.shared.offsets(core, inst, unit, lanes, barrier(unit)[lanes], 8).tolist()
        boxes, time = copies.boxes(unit, mask), races.tick()
        for box, offset in zip(boxes, offsets, strict=True):
            agent = races.agent("tma", offset % core.shared.stride)
            copies.note(unit, box, "shared", agent, time, writes=True)
            copies.note(unit, box, "global", agent, time, writes=False)
            # The mbarrier is reached through the generic proxy: no fence after mbarrier.init.
            gid = int(unit.gid[box.lane])
            races.read_as(
                "shared", copies.index, agent, time, gid, np.array([offset]), 8, proxy="generic"
            )
            with checked(core, inst, unit, box.lane, offset) as bars:
                bar = bars.at(offset)
            bar.flying.append(time)
            bar.begun = time
            copies.chunks(box).view(np.uint8)[:] = POISON
            copies.mark(box, False)

        def land() -> None:
            under_way.remove(land)
            for box, offset in zip(boxes, offsets, strict=True):
                found = box.tensor_map
                chunks = found.gather(box.part, core.global_.bytes, box.begin)
                copies.chunks(box)[box.order] = chunks
                copies.mark(box, True)
                with checked(core, inst, unit, box.lane, offset) as bars:
                    bar = bars.at(offset)
                    bar.flying.remove(time)
                    bar.land(found.box_bytes)
                    bars.store(offset)

        under_way.append(land)
        core.pending.append(land)

    def ending(unit: "Unit") -> None:
        del unit
        if under_way:
            core.report("unfinished", inst, "a CTA ends without waiting for this copy")
            under_way.clear()

    core.endings.append(ending)
    return load


# --- stores ---------------------------------------------------------------------------------------


def _build_store(inst: Instruction, core: "Core") -> Handler:
    copies, races = Copies(inst, core, inst.operands[0], inst.operands[1]), core.races

    def store(unit: "Unit", mask: np.ndarray | None) -> None:
        for box in copies.boxes(unit, mask):
            _start_store(copies, unit, box, races.tick())

    def ending(unit: "Unit") -> None:
        for kind in (READS, WRITES):
            for operation in groups_of(unit, kind).operations:
                if operation.inst is inst:
                    operation.land(operation.waiting)

    must_be_waited_for(inst, core, READS)
    core.endings.append(ending)
    return store


def _start_store(copies: Copies, unit: "Unit", box: Box, time: int) -> None:
    """Put a store in a group of reads and in one of writes."""
    races, taken, lanes = copies.core.races, [], np.array([box.lane])
    gid, warp = int(unit.gid[box.lane]), int(unit.thread[box.lane]) // 32
    reader, writer = races.agent(READS, warp), races.agent(WRITES, warp)
    copies.note(unit, box, "shared", reader, time, writes=False)

    def read(_: np.ndarray) -> None:
        taken.append(copies.chunks(box)[box.order].copy())
        races.learn(unit.gid[lanes], reader, time)

    def write(_: np.ndarray) -> None:
        copies.scatter(box, taken[0], writer, time, gid)
        races.learn(unit.gid[lanes], writer, time)

    groups_of(unit, READS).start(copies.inst, lanes, read)
    groups_of(unit, WRITES).start(copies.inst, lanes, write)


def build_wait_group(inst: Instruction, core: "Core") -> Handler:
    """cp.async.bulk.wait_group N: all but N groups have written; with .read, they have read."""
    del core
    keep = constant(inst, 0)
    kinds = (READS,) if "read" in inst.parts else (READS, WRITES)

    def wait(unit: "Unit", mask: np.ndarray | None) -> None:
        for kind in kinds:
            groups_of(unit, kind).wait(mask, keep)

    return wait


# --- maps that a kernel makes ---------------------------------------------------------------------


def build_replace(inst: Instruction, core: "Core") -> Handler:
    """tensormap.replace: one field of a map in shared memory gets a value."""
    field = inst.parts[3]
    if inst.parts[2] != "tile" or field not in FIELDS.names or inst.parts[4] != "shared::cta":
        raise UnknownInstruction(f"{inst.where}: this form of tensormap.replace is not supported")
    ordinal = constant(inst, 1) if len(inst.operands) == 3 else None
    value = core.read(inst.operands[-1], np.dtype(f"u{int(inst.parts[-1][1:]) // 8}"))
    address, index, size = core.address(inst.operands[0]), core.index(inst), tensor_maps.BYTES

    def replace(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        offsets = core.shared.offsets(core, inst, unit, lanes, address(unit)[lanes], size)
        core.races.write("shared", index, unit.gid[lanes], offsets, size)
        values = np.broadcast_to(value(unit), unit.n)[lanes]
        for offset, new in zip(offsets.tolist(), values, strict=True):
            fields = core.shared.bytes[offset : offset + size].view(FIELDS)
            if ordinal is None:
                fields[field] = new
            else:
                fields[field][0, ordinal] = new

    return replace


def build_publish(inst: Instruction, core: "Core") -> Handler:
    """tensormap.cp_fenceproxy: a warp copies a map from shared to global memory."""
    if constant(inst, 2) != tensor_maps.BYTES:
        raise UnknownInstruction(f"{inst.where}: a tensor map has 128 bytes")
    target, source = core.address(inst.operands[0]), core.address(inst.operands[1])
    index, size, races = core.index(inst), tensor_maps.BYTES, core.races

    def publish(unit: "Unit", mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask)
        # The first lane stands for the warp. PTX does not say whether the copy of all lanes comes
        # after what it has filled in. Kernels of triton 3.6.0 have no bar.warp.sync in between.
        lanes = (unit.lanes if mask is None else np.flatnonzero(mask))[::32]
        begins = core.shared.offsets(core, inst, unit, lanes, source(unit)[lanes], size)
        races.read("shared", index, unit.gid[lanes], begins, size)
        ends = core.global_.offsets(core, inst, unit, lanes, target(unit)[lanes], size)
        races.write("global", index, unit.gid[lanes], ends, size)
        time, published = races.tick(), core.state.setdefault("published", {})
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            raw = core.shared.bytes[begin : begin + size]
            core.global_.bytes[end : end + size] = raw
            published[end + core.global_.base] = time, index

    return publish


def build_acquire(inst: Instruction, core: "Core") -> Handler:
    """fence.proxy.tensormap::generic.acquire: these threads may use the map now."""
    if inst.parts[3] != "acquire" or constant(inst, 1) != tensor_maps.BYTES:
        raise UnknownInstruction(f"{inst.where}: this fence is not supported")
    address, races = core.address(inst.operands[0]), core.races

    def acquire(unit: "Unit", mask: np.ndarray | None) -> None:
        lanes = unit.lanes if mask is None else np.flatnonzero(mask)
        published = core.state.get("published", {})
        for at, gid in zip(address(unit)[lanes].tolist(), unit.gid[lanes], strict=True):
            if at in published:
                time, by = published[at]
                races.learn(np.array([gid]), races.agent("tensormap", by), time)

    return acquire


def build_unsupported(inst: Instruction, core: "Core") -> Callable:
    """Bulk copies without a tensor map, and reductions."""
    del core
    raise UnknownInstruction(f"{inst.where}: only bulk copies of tensors are supported")


def build_prefetch(inst: Instruction, core: "Core") -> Handler:
    """A prefetch changes only time."""
    del inst, core
    return lambda unit, mask: None


HANDLERS = {
    "cp.async.bulk": build_unsupported,
    "cp.reduce": build_unsupported,
    "cp.async.bulk.prefetch": build_prefetch,
    "cp.async.bulk.tensor": build_tensor,
    "cp.async.bulk.commit_group": build_commit((READS, WRITES)),
    "cp.async.bulk.wait_group": build_wait_group,
    "tensormap.replace": build_replace,
    "tensormap.cp_fenceproxy": build_publish,
    "fence.proxy.tensormap::generic": build_acquire,
}
