"""The boxes of tensors that TMA copies: where their elements lie, and which exist."""

import itertools

import numpy as np
import pytest

from tilelab.perf.machine.copies.tensor_maps import CHUNK, FIELDS, TensorMap, decode, tensor_map

# PTX ISA 8.8, section 5.5.7: cell [line][place] is the 16-byte chunk of a 128-byte line of shared
# memory that lies at this place, from an address that is a multiple of 1,024 bytes on.
SWIZZLED = {
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: [
        "01234567",
        "10325476",
        "23016745",
        "32107654",
        "45670123",
        "54761032",
        "67452301",
        "76543210",
    ],
}
BF16, F32, U8 = 10, 7, 0  # element types of tensormap.replace


def places_of(found, coordinates):
    """The address of each element of a box, one by one; None for those that do not exist."""
    pitches = (found.item, *found.strides)
    for place in itertools.product(*(range(n) for n in found.box[::-1])):
        at = [c + p for c, p in zip(coordinates, place[::-1], strict=True)]
        if all(0 <= x < n for x, n in zip(at, found.shape, strict=True)):
            yield found.address + sum(x * pitch for x, pitch in zip(at, pitches, strict=True))
        else:
            yield None


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("line", range(8))
def test_swizzle_is_the_table_of_the_ptx_isa(width, line):
    rows, item = 3 * 1024 // width, 2
    found = TensorMap(0, (width // item, 512), (width,), (width // item, rows), item, width)
    order = found.order(128 * line)
    table = [[int(x) for x in row] for row in SWIZZLED[width]]
    for chunk, place in enumerate(order):
        absolute = chunk + 8 * line
        row = table[absolute // 8 % len(table)]
        assert row[(int(place) + 8 * line) % 8] == absolute % 8
        assert (int(place) + 8 * line) // 8 == absolute // 8
    assert sorted(order) == list(range(rows * width // 16))


def test_without_swizzle_rows_follow_each_other():
    found = TensorMap(0, (64, 64), (256,), (64, 8), 4, 0)
    assert np.array_equal(np.arange(128)[found.order(128)], np.arange(128))


BOXES = [  # element type, shape, box, coordinates of interest (all innermost first)
    (BF16, (24,), (16,), [(0,), (-5,), (12,), (-16,), (24,)]),
    (BF16, (40, 9), (32, 4), [(0, 0), (8, 5), (-3, 2), (9, -1), (20, 7), (0, 9), (40, 0)]),
    (F32, (8, 5, 4), (4, 2, 3), [(0, 0, 0), (6, 4, 2), (-1, -1, -1), (2, 1, -3)]),
    (U8, (32, 3, 4, 5), (16, 2, 3, 2), [(16, 1, 1, 3), (20, 2, 3, 4), (-4, -1, -2, -1)]),
    (BF16, (8, 3, 2, 3, 2), (8, 3, 2, 2, 2), [(0, 0, 0, 1, 0), (1, 1, 1, 2, 1), (0, -2, 0, 0, -1)]),
]


@pytest.mark.parametrize("kind, shape, box, places", BOXES)
def test_a_box_has_its_elements_and_zeros(kind, shape, box, places):
    item = {BF16: 2, F32: 4, U8: 1}[kind]
    strides, pitch = [], item
    for n in shape[:-1]:  # rows are padded to multiples of 16 bytes, and one more
        pitch = -(-pitch * n // 16) * 16 + 16
        strides.append(pitch)
    rng = np.random.default_rng(0)
    memory = rng.integers(1, 255, 64 + pitch * shape[-1]).astype(np.uint8)
    elements = [s // item for s in strides[::-1]] + [1]
    found = tensor_map(16, shape[::-1], elements, box[::-1], kind, 0)
    assert found == TensorMap(16, shape, tuple(strides), box, item, 0)
    for coordinates in places:
        part, at = found.part(coordinates), list(places_of(found, coordinates))
        begin = part.address if part else 0  # addresses are offsets into `memory` here
        chunks = found.gather(part, memory, begin)
        wanted = [bytes(item) if x is None else memory[x : x + item].tobytes() for x in at]
        assert chunks.tobytes() == b"".join(wanted)
        exist = [x for x in at if x is not None]
        assert (part is None) == (not exist)
        if part is None:
            continue
        touched = np.concatenate([row + np.arange(part.shape[-1]) for row in part.rows()])
        assert sorted(touched) == sorted(x + i for x in exist for i in range(item))
        # A store changes the same elements, and nothing else.
        given = rng.integers(0, 255, chunks.nbytes).astype(np.uint8)
        stored, wanted = memory.copy(), memory.copy()
        found.scatter(given.view(CHUNK), part, stored, begin)
        for x, element in zip(at, given.reshape(-1, item), strict=True):
            if x is not None:
                wanted[x : x + item] = element
        assert (stored == wanted).all()


def map_in_memory():
    """A map as a kernel makes it, as fields."""
    fields = np.zeros(1, FIELDS)
    for name, value in {
        "global_address": 1 << 33, "rank": 2, "elemtype": BF16, "swizzle_mode": 3,
        "box_dim": [64, 8, 1, 0, 0], "element_stride": [1, 1, 1, 0, 0],
        "global_dim": [100, 60, 7, 0, 0], "global_stride": [208, 16384, 0, 0],
    }.items():  # fmt: skip
        fields[name] = value
    return fields


def test_a_map_is_128_bytes():
    raw = map_in_memory().tobytes()
    assert len(raw) == 128
    assert decode(raw) == TensorMap(1 << 33, (100, 60, 7), (208, 16384), (64, 8, 1), 2, 128)


GOOD = dict(address=4096, shape=[60, 100], strides=[104, 1], box=[8, 64], elemtype=BF16, swizzle=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"address": 4104}, "no multiple of 16"),
        ({"shape": [60, 0]}, "1 to 2\\^32"),
        ({"strides": [100, 1]}, "stride of 200 bytes"),
        ({"strides": [1 << 39, 1]}, "below 2\\^40"),
        ({"strides": [104, 2]}, "contiguous rows"),
        ({"box": [8, 257]}, "1 to 256"),
        ({"box": [0, 64]}, "1 to 256"),
        ({"box": [8, 60]}, "multiples of 16"),
        ({"box": [8, 128]}, "longer than the swizzle"),
        ({"box": [8, 32]}, "shorter than the swizzle"),
        ({"elemtype": 11}, "element type 11"),
        ({"swizzle": 4}, "swizzle_mode 4"),
        ({"shape": [2] * 6, "strides": [104] * 5 + [1], "box": [2] * 5 + [64]}, "6 dimensions"),
    ],
)
def test_what_the_driver_refuses_is_refused(change, message):
    good = tensor_map(*GOOD.values())
    assert good.shape == (100, 60) and good.strides == (208,)
    with pytest.raises(ValueError, match=message):
        tensor_map(*(GOOD | change).values())


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("interleave_layout", 1, "interleave_layout 1"),
        ("fill_mode", 1, "fill_mode 1"),
        ("element_stride", 2, "element_stride"),
        ("rank", 2**32 - 1, "dimensions"),
    ],
)
def test_what_only_a_kernel_can_ask_for_is_refused(field, value, message):
    raw = map_in_memory()
    raw[field] = value
    with pytest.raises(ValueError, match=message):
        decode(raw.tobytes())
