"""Tensor maps: what the tensor memory accelerator (TMA) knows of a tensor, and the boxes it copies.

A kernel of Hopper (sm_90) copies a tile of a tensor between global and shared memory with one
instruction of one thread. A unit of the SM does the work, the TMA. It needs to know where each
element lies, so the instruction names a *tensor map* of 128 bytes (CUtensorMap): the tensor's
address, its shape and strides, and the shape of the *box*, the tile that one instruction copies.
The instruction itself only adds where the box begins. PTX lists dimensions innermost first:

    cp.async.bulk.tensor.2d... [shared], [map, {column, row}], [mbarrier]

             column                           the tensor, row by row in global memory
       +-------|-----------------+
       |       v                 |            the box: box[1] rows of box[0] elements
    row|-----> +----------+      |
       |       |   box    |      |
       |       +----------+      |            A box may hang over any border, by negative
       |                   +-----+-----+      coordinates too. A load then gives zeros for what
       +-------------------+-----+ 0 0 |      does not exist, and a store leaves it out. This is
                           | 0 0   0 0 |      how kernels get the padding of a convolution, and
                           +-----------+      ragged edges, without a single mask.

In shared memory the box is dense, one row after the other. But 8 threads that read 8 rows of one
column would then all hit the same banks. So the TMA can permute the 16-byte *chunks* of each
128-byte line of shared memory, by an exclusive or with the line's number: a *swizzle*. With 128
bytes it is over all eight chunks. Rows of 64 or 32 bytes keep to themselves:

    line   swizzle 128 B        swizzle 64 B         swizzle 32 B
     0     0 1 2 3 4 5 6 7      0 1 2 3 4 5 6 7      0 1 2 3 4 5 6 7
     1     1 0 3 2 5 4 7 6      1 0 3 2 5 4 7 6      1 0 3 2 5 4 7 6
     2     2 3 0 1 6 7 4 5      2 3 0 1 6 7 4 5      (repeats)
     3     3 2 1 0 7 6 5 4      3 2 1 0 7 6 5 4
     4     4 5 6 7 0 1 2 3      (repeats)
     5     5 4 7 6 1 0 3 2                           Cell: which chunk of the line lies there.
     6     6 7 4 5 2 3 0 1
     7     7 6 5 4 3 2 1 0

The lines are counted from address 0 of shared memory and not from the box.

The bytes of a real map are secret. Here they are `FIELDS`, so a kernel that makes a map with
`tensormap.replace` writes bytes like any others, and every check of memory holds for them.

Sources: PTX ISA 8.8, sections 5.5 (tensors) and 9.7.9.28 (tensormap.replace); CUDA driver API,
cuTensorMapEncodeTiled.
"""

import functools
from typing import NamedTuple

import numpy as np

BYTES = 128  # of a map
MAP_ALIGNMENT = 64
BOX_ALIGNMENT = 128  # of a box in shared memory
CHUNK = np.dtype(np.complex128)  # 16 bytes that NumPy moves at once; their value is never looked at

# The element types of tensormap.replace that are copied as they are, and their bytes. The others
# round (tf32), flush small numbers to zero (.ftz) or are packed (4 and 6 bits).
ELEMENTS = {
    0: ("u8", 1),
    1: ("u16", 2),
    2: ("u32", 4),
    3: ("s32", 4),
    4: ("u64", 8),
    5: ("s64", 8),
    6: ("f16", 2),
    7: ("f32", 4),
    9: ("f64", 8),
    10: ("bf16", 2),
}
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # the bytes of each swizzle mode

# The names are those of tensormap.replace, and so is what they hold: `rank` is one less.
FIELDS = np.dtype(
    [
        ("global_address", np.uint64),
        ("rank", np.uint32),
        ("elemtype", np.uint32),
        ("interleave_layout", np.uint32),
        ("swizzle_mode", np.uint32),
        ("fill_mode", np.uint32),
        ("box_dim", np.uint32, 5),
        ("element_stride", np.uint32, 5),
        ("global_dim", np.uint32, 5),
        ("unused", np.uint64),
        ("global_stride", np.uint64, 4),
    ]
)


class Part(NamedTuple):
    """The part of a box that exists in the tensor; all of it, most of the time.

    Attributes:
        address: of its first element in global memory.
        slices: the part within the box, outermost first; the last is in bytes.
        shape: of the part, likewise.
        strides: in global memory, in bytes, likewise.
    """

    address: int
    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def rows(self) -> np.ndarray:
        """The address of each of its rows; a row is `shape[-1]` bytes side by side."""
        return self.address + _row_offsets(self.shape[:-1], self.strides[:-1])

    def view(self, memory: np.ndarray, offset: int) -> np.ndarray:
        """The part as an array of bytes of `memory`, where it begins at `offset`; not a copy."""
        return np.ndarray(self.shape, np.uint8, memory, offset, self.strides)


class TensorMap(NamedTuple):
    """A tensor and the box to copy of it. All tuples are innermost first, as in PTX.

    Attributes:
        address: of the tensor's first element.
        shape: in elements.
        strides: of the dimensions from the second on, in bytes.
        box: in elements.
        item: the bytes of an element.
        swizzle: 0, 32, 64 or 128 bytes.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    item: int
    swizzle: int

    @property
    def box_bytes(self) -> int:
        """What one copy moves, zeros for what does not exist included."""
        return int(np.prod(self.box)) * self.item

    def part(self, coordinates: tuple[int, ...]) -> Part | None:
        """What exists of the box that begins at these coordinates; None if nothing does."""
        address, slices, shape, strides = self.address, [], [], []
        pitches = (self.item, *self.strides)
        for at, size, length, pitch in zip(coordinates, self.box, self.shape, pitches, strict=True):
            low, high = max(0, -at), min(size, length - at)
            if low >= high:
                return None
            address += (at + low) * pitch
            slices.append(slice(low, high))
            shape.append(high - low)
            strides.append(pitch)
        item, row = self.item, slices[0]
        slices[0] = slice(row.start * item, row.stop * item)
        shape[0], strides[0] = shape[0] * item, 1
        return Part(address, tuple(slices[::-1]), tuple(shape[::-1]), tuple(strides[::-1]))

    def gather(self, part: Part | None, memory: np.ndarray, offset: int) -> np.ndarray:
        """The box's chunks in the tensor's order; `part` lies at `offset` of `memory`."""
        shape = (*self.box[:0:-1], self.box[0] * self.item)
        if part is not None and part.shape == shape:
            box = np.ascontiguousarray(part.view(memory, offset))
        else:
            box = np.zeros(shape, np.uint8)
            if part is not None:
                box[part.slices] = part.view(memory, offset)
        return box.reshape(-1).view(CHUNK)

    def scatter(self, chunks: np.ndarray, part: Part, memory: np.ndarray, offset: int) -> None:
        """Write what exists of a box, given as `gather` gives it."""
        box = chunks.view(np.uint8).reshape(*self.box[:0:-1], self.box[0] * self.item)
        part.view(memory, offset)[...] = box[part.slices]

    def order(self, address: int) -> np.ndarray | slice:
        """Where the chunks of a box at this shared address lie, counted from its beginning."""
        if not self.swizzle:
            return slice(None)
        return _swizzled(self.box_bytes // CHUNK.itemsize, self.swizzle, address // 128 % 8)


def tensor_map(
    address: int, shape: list, strides: list, box: list, elemtype: int, swizzle_mode: int
) -> TensorMap:
    """The map of a tensor as PyTorch and Triton describe it: outermost first, strides in elements.

    Raises:
        ValueError: cuTensorMapEncodeTiled would not take it, or the machine does not.
    """
    item, swizzle = _item(elemtype), _swizzle(swizzle_mode)
    if len(strides) and strides[-1] != 1:
        raise ValueError(f"a tensor map needs contiguous rows: the last stride is {strides[-1]}")
    pitches = tuple(int(stride) * item for stride in strides[-2::-1])
    shape, box = tuple(map(int, shape[::-1])), tuple(map(int, box[::-1]))
    return _checked(TensorMap(int(address), shape, pitches, box, item, swizzle))


@functools.lru_cache(maxsize=256)
def decode(raw: bytes) -> TensorMap:
    """The map that these 128 bytes are.

    Raises:
        ValueError: it breaks a rule of cuTensorMapEncodeTiled, or the machine does not know it.
    """
    fields = np.frombuffer(raw, FIELDS)[0]
    rank = int(fields["rank"]) + 1
    if not 1 <= rank <= 5:
        raise ValueError(f"a tensor map of {rank} dimensions: 1 to 5 are possible")
    for name in ("interleave_layout", "fill_mode"):
        if fields[name]:
            raise ValueError(f"a tensor map with {name} {fields[name]}: only 0 is supported")
    if (fields["element_stride"][:rank] != 1).any():
        raise ValueError("a tensor map with an element_stride that is not 1: not supported")
    found = TensorMap(
        int(fields["global_address"]),
        tuple(fields["global_dim"][:rank].tolist()),
        tuple(fields["global_stride"][: rank - 1].tolist()),
        tuple(fields["box_dim"][:rank].tolist()),
        _item(int(fields["elemtype"])),
        _swizzle(int(fields["swizzle_mode"])),
    )
    return _checked(found)


def _item(elemtype: int) -> int:
    if elemtype not in ELEMENTS:
        raise ValueError(f"a tensor map of element type {elemtype}: not supported")
    return ELEMENTS[elemtype][1]


def _swizzle(mode: int) -> int:
    if mode not in SWIZZLES:
        raise ValueError(f"a tensor map with swizzle_mode {mode}: not supported")
    return SWIZZLES[mode]


def _checked(found: TensorMap) -> TensorMap:
    """The map, if it keeps the rules of cuTensorMapEncodeTiled."""
    if not 1 <= len(found.shape) <= 5:
        raise ValueError(f"a tensor map of {len(found.shape)} dimensions: 1 to 5 are possible")
    row = found.box[0] * found.item
    if found.address % 16:
        raise ValueError(f"a tensor map's address {found.address:#x} is no multiple of 16")
    if min(found.shape) < 1 or max(found.shape) > 2**32:
        raise ValueError(f"a tensor map's shape {found.shape}: 1 to 2^32 in each dimension")
    for stride in found.strides:
        if stride % 16 or not 0 <= stride < 2**40:
            raise ValueError(
                f"a tensor map's stride of {stride} bytes: it has to be a multiple of 16 below 2^40"
            )
    if not (1 <= min(found.box) and max(found.box) <= 256):
        raise ValueError(f"a tensor map's box {found.box}: 1 to 256 in each dimension are possible")
    if row % 16:
        raise ValueError(f"a box's rows of {row} bytes: they have to be multiples of 16")
    if found.swizzle and row > found.swizzle:
        raise ValueError(f"a box's rows of {row} bytes are longer than the swizzle {found.swizzle}")
    if found.swizzle and row < found.swizzle:  # undocumented: rows would lie further apart
        raise ValueError(
            f"a box's rows of {row} bytes are shorter than the swizzle {found.swizzle}: "
            "not supported"
        )
    return found


@functools.lru_cache(maxsize=256)
def _row_offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return offsets


@functools.lru_cache(maxsize=256)
def _swizzled(chunks: int, swizzle: int, line: int) -> np.ndarray:
    at = np.arange(chunks) + 8 * line  # counted from a multiple of 1,024 bytes
    return (at ^ (at >> 3) & (swizzle // CHUNK.itemsize - 1)) - 8 * line
