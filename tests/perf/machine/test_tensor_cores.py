"""ldmatrix, stmatrix and mma.sync against the formulas of the PTX ISA, written down as it has them.

The ISA says for each shape where thread `%laneid` holds element a_i, b_i or c_i: with groupID =
%laneid >> 2 (here g) and threadID_in_group = %laneid % 4 (here t), a row and a column. Nothing in
these tables is taken from the code.
"""

import itertools

import numpy as np
import pytest
import torch

from tests.tools.ptx_warps import Warps, registers
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.tensor import tensor_cores

LANE = np.arange(32)
G, T = LANE >> 2, LANE % 4

# PTX ISA 9.0, (shape, bytes of an element): {operand: (how many elements, row(i), column(i))}.
FRAGMENTS = {
    # 9.7.14.5.7, .f16 and .bf16
    ("m16n8k8", 2): {
        "a": (4, lambda i: G if i in (0, 1) else G + 8, lambda i: T * 2 + (i & 1)),
        "b": (2, lambda i: T * 2 + i, lambda i: G),
    },
    # 9.7.14.5.7, .tf32
    ("m16n8k8", 4): {
        "a": (4, lambda i: G if i in (0, 2) else G + 8, lambda i: T if i in (0, 1) else T + 4),
        "b": (2, lambda i: T if i == 0 else T + 4, lambda i: G),
    },
    # 9.7.14.5.8, .f16 and .bf16
    ("m16n8k16", 2): {
        "a": (
            8,
            lambda i: G if 0 <= i < 2 or 4 <= i < 6 else G + 8,
            lambda i: T * 2 + (i & 1) if i < 4 else T * 2 + (i & 1) + 8,
        ),
        "b": (4, lambda i: T * 2 + (i & 1) if i < 2 else T * 2 + (i & 1) + 8, lambda i: G),
    },
    # 9.7.14.5.9
    ("m16n8k16", 1): {
        "a": (8, lambda i: G if i < 4 else G + 8, lambda i: T * 4 + (i & 3)),
        "b": (4, lambda i: T * 4 + i, lambda i: G),
    },
    # 9.7.14.5.10
    ("m16n8k32", 1): {
        "a": (
            16,
            lambda i: G if 0 <= i < 4 or 8 <= i < 12 else G + 8,
            lambda i: T * 4 + (i & 3) if i < 8 else T * 4 + (i & 3) + 16,
        ),
        "b": (8, lambda i: T * 4 + (i & 3) if i < 4 else T * 4 + (i & 3) + 16, lambda i: G),
    },
}
# The same in all of these sections.
ACCUMULATOR = (4, lambda i: G if i < 2 else G + 8, lambda i: T * 2 + (i & 1))

MMA = [
    ("m16n8k16", "f32", "f16", "f16"),
    ("m16n8k16", "f32", "bf16", "bf16"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f32", "f16", "f16"),
    ("m16n8k8", "f32", "bf16", "bf16"),
    ("m16n8k8", "f16", "f16", "f16"),
    ("m16n8k8", "f32", "tf32", "tf32"),
    ("m16n8k16", "s32", "s8", "s8"),
    ("m16n8k32", "s32", "s8", "s8"),
    ("m16n8k32", "s32", "u8", "s8"),
    ("m16n8k32", "s32", "u8", "u8"),
    ("m16n8k32", "f32", "e4m3", "e4m3"),
    ("m16n8k32", "f32", "e5m2", "e4m3"),
    ("m16n8k32", "f16", "e5m2", "e5m2"),
    ("m16n8k16", "f32", "e4m3", "e5m2"),
]
SIZE = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1, "f32": 4, "s32": 4}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16,
         "f16": torch.float16, "s8": torch.int8, "u8": torch.uint8, "s32": torch.int32,
         "f32": torch.float32, "tf32": torch.float32}  # fmt: skip
RNG = np.random.default_rng(7)


def encode(numbers, kind):
    """Small integers as the bits of a type, by torch. tf32 gets rubbish in its low 13 bits."""
    size = SIZE[kind]
    bits = torch.tensor(numbers).to(TORCH[kind]).contiguous().view(torch.uint8).numpy()
    bits = bits.view(f"u{size}").reshape(numbers.shape).copy()
    if kind == "tf32":
        bits |= RNG.integers(0, 1 << 13, bits.shape, "u4")
    return bits


def decode(bits, kind):
    return torch.from_numpy(bits.view("u1").copy()).view(TORCH[kind]).double().numpy()


def small(shape, kind):
    return RNG.integers(0 if kind == "u8" else -3, 4, shape)


def fragment(matrices, bits_of, table):
    """Matrices [warps, rows, columns] as registers [registers, lanes], where the ISA has them."""
    count, row, column = table
    elements = [bits_of[:, row(i), column(i)].ravel() for i in range(count)]  # [i][lanes]
    size = bits_of.itemsize
    packed = np.stack(elements).reshape(-1, 4 // size, matrices.shape[0] * 32)
    shifts = 8 * size * np.arange(4 // size, dtype=np.uint32)[:, None]
    return (packed.astype("u4") << shifts).sum(1, dtype="u4")


@pytest.mark.parametrize("shape,d,a,b", MMA, ids=lambda x: str(x))
def test_mma_is_the_matrix_product_in_the_isas_fragments(shape, d, a, b):
    warps, k = 6, int(shape.split("k")[1])
    tables = FRAGMENTS[shape, SIZE[a]]
    na, nb, nd = (tables["a"][0] * SIZE[a] // 4, tables["b"][0] * SIZE[b] // 4, SIZE[d])
    op = f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d}"
    operands = [registers(0, nd), registers(10, na), registers(20, nb), registers(30, nd)]
    w = Warps(f"{op} {', '.join(operands)};", threads=96)
    x, y, z = small((warps, 16, k), a), small((warps, k, 8), b), RNG.integers(-9, 9, (warps, 16, 8))
    w.fill(10, fragment(x, encode(x, a), tables["a"]))
    w.fill(20, fragment(y, encode(y, b), tables["b"]))
    w.fill(30, fragment(z, encode(z, d), ACCUMULATOR))
    w.run()
    expected = torch.matmul(torch.tensor(x), torch.tensor(y)).numpy() + z
    assert abs(expected).max() > 20
    found = w.show(0, nd)
    count, row, column = ACCUMULATOR
    for i in range(count):
        if SIZE[d] == 4:
            values = decode(found[i], d)
        else:
            values = decode((found[i // 2] >> (16 * (i % 2)) & 0xFFFF).astype("u2"), d)
        assert (values == expected[:, row(i), column(i)].ravel()).all()


def test_mma_with_integers_wraps_or_saturates():
    for satfinite, expected in (("", -(2**31) + 99), (".satfinite", 2**31 - 1)):
        w = Warps(f"mma.sync.aligned.m16n8k16.row.col{satfinite}.s32.s8.s8.s32 {registers(0, 4)}, "
                  f"{registers(10, 2)}, {registers(20, 1)}, {registers(30, 4)};")  # fmt: skip
        w.fill(10, np.full((2, 256), 0x00000005, "u4"))  # 4 threads of a row: 4 x 5 x 5
        w.fill(20, np.full((1, 256), 0x00000005, "u4"))
        w.fill(30, np.full((4, 256), 2**31 - 1, "u4"))
        w.run()
        assert (w.show(0, 4).view("i4") == expected).all()


def test_eight_bit_floats_are_torchs():
    for kind in ("e4m3", "e5m2"):
        bits = np.arange(256, dtype=np.uint8)
        ours, theirs = tensor_cores.FORMATS[kind][1](bits), decode(bits, kind)
        assert np.array_equal(ours, theirs, equal_nan=True)


def test_tf32_operands_are_cut_and_not_rounded():
    """1 + 2^-10 is the first tf32 number above 1; what lies below it falls back to 1."""
    first = 1 + 2**-10
    given = np.array([first - 2**-23, -(first - 2**-23), first, first + 2**-11], np.float32)
    kept = tensor_cores.FORMATS["tf32"][1](given.view("u4"))
    assert kept.tolist() == [1.0, -1.0, first, first]


# --- ldmatrix, stmatrix ---------------------------------------------------------------------------


def scattered_rows(warps, count):
    """An address for each row of `count` matrices of each warp: multiples of 16, none twice."""
    rows = np.stack([RNG.permutation(np.arange(1, 256))[: 8 * count] * 16 for _ in range(warps)])
    lanes = np.full((warps, 32), 8)  # of the others: no address that could be used
    lanes[:, : 8 * count] = rows
    return rows.reshape(warps, count, 8), lanes.ravel()


@pytest.mark.parametrize("count,trans", list(itertools.product((1, 2, 4), ("", ".trans"))))
def test_ldmatrix_deals_rows_as_the_isa_says(count, trans):
    """9.7.14.5.15: thread n gets columns (n % 4) * 2 and the next of row n / 4."""
    w = Warps(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(0, count)}, "
              "[%r9+16];", threads=64, shared=5000)  # fmt: skip
    rows, addresses = scattered_rows(4, count)
    w["%r9"] = addresses - 16
    matrices = RNG.integers(0, 1 << 16, (4, count, 8, 8), "u2")
    for warp, m, r in np.ndindex(4, count, 8):
        w.write_shared(rows[warp, m, r] + np.arange(16), matrices[warp, m, r].view("u1"), warp // 2)
    # Two warps of a CTA may share rows; what was written last holds.
    for warp, m, r in np.ndindex(4, count, 8):
        at = rows[warp, m, r] + np.arange(16) + warp // 2 * w.stride
        matrices[warp, m, r] = w.core.shared.bytes[at].view("u2")
    w.run()
    for warp, m, lane in itertools.product(range(4), range(count), range(32)):
        row, columns = lane // 4, slice(lane % 4 * 2, lane % 4 * 2 + 2)
        matrix = matrices[warp, m].T if trans else matrices[warp, m]
        found = w[f"%r{m}"][warp * 32 + lane]
        assert found == matrix[row, columns].copy().view("u4")[0]
    assert not w.found


@pytest.mark.parametrize("count,trans", list(itertools.product((1, 2, 4), ("", ".trans"))))
def test_what_stmatrix_stores_ldmatrix_loads(count, trans):
    w = Warps(f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r9], "
              f"{registers(10, count)}; ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 "
              f"{registers(20, count)}, [%r9];", threads=32, shared=4096)  # fmt: skip
    rows, w["%r9"] = scattered_rows(2, count)
    values = RNG.integers(0, 1 << 32, (count, 64), "u4")
    w.fill(10, values)
    w.step()
    # By the ISA: a row of a tile (a column with .trans) lies in four lanes, two elements each.
    tile = w.core.shared.bytes[rows[1, 0][:, None] + np.arange(16) + w.stride].view("u2")
    tile = tile.T if trans else tile
    assert (tile[3, 4:6].copy().view("u4") == values[0, 32 + 3 * 4 + 2]).all()
    w.barrier()
    w.step()
    assert (w.show(20, count) == values).all() and not w.found


def test_matrices_in_half_a_warp_not_aligned_or_outside_are_faults():
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r9];"
    half = np.arange(128) % 64 < 40
    for addresses, mask, message in (
        (LANE * 16, half, "all 32 lanes of a warp, 8 are here"),
        (LANE * 16 + 4, None, "not aligned"),
        (LANE * 1024, None, "out of bounds"),
    ):
        w = Warps(load, threads=64)
        w["%r9"] = np.tile(addresses, 4)
        with pytest.raises(MachineFault, match=message):
            w.run(mask)


def test_only_whole_warps_of_a_mask_are_loaded():
    w = Warps("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r9];", threads=64)
    w["%r9"], w["%r0"] = np.tile(LANE * 16, 4), 77
    w.write_shared(np.arange(128), np.arange(128))
    w.run(np.arange(128) // 32 == 2)
    assert (w["%r0"][:64] == 77).all() and (w["%r0"][96:] == 77).all()
    assert (w["%r0"][64:96].view("u1") == np.arange(128)).all()


@pytest.mark.parametrize("op", [
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r9];",
    "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b4x16_p64 {%r0}, [%r9];",
    "ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%r9];",
    "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r9], {%r0};",
    "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%r0}, {%r1}, {%r2}, {%r3};",
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r0}, {%r1}, {%r2}, {%r3};",
    "mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32 {%r0}, {%r1}, {%r2}, {%r3};",
    "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0}, {%r1}, {%r2}, {%r3}, %r4, 0;",
])  # fmt: skip
def test_what_is_not_executed_is_refused(op):
    with pytest.raises(UnknownInstruction, match="executed"):
        Warps(op)


def test_a_missing_barrier_before_ldmatrix_is_a_race():
    """Even if each lane reads the row that it has stored: it gets words of its neighbours' rows."""
    body = ("st.shared.v4.b32 [%r9], {%r1, %r2, %r3, %r4};"
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r9];")  # fmt: skip
    for barrier, expected in ((False, {"race"}), (True, set())):
        w = Warps(body, threads=32)
        w["%r9"] = np.tile(LANE * 16, 2)
        w.fill(1, np.ones((4, 64)))
        w.step()
        if barrier:
            w.barrier()
        assert w.run().found == expected


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_two_warps_may_store_one_tile_if_it_is_the_same(trans):
    """In one instruction, or one warp after the other with no barrier between."""
    body = f"stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r9], {{%r1}};"
    same = np.tile(RNG.integers(0, 99, 32), 4)
    for values, expected in ((same, set()), (np.arange(128), {"race"})):
        for masks in ([None], [np.arange(128) % 64 < 32, np.arange(128) % 64 >= 32]):
            w = Warps(body * len(masks), threads=64)
            w["%r9"], w["%r1"] = np.tile(LANE * 16, 4), values
            for mask in masks:
                w.step(mask)
            assert w.found == expected


def test_nobody_has_written_what_ldmatrix_reads():
    w = Warps("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r9];")
    w["%r9"] = np.tile(LANE * 16, 8)
    assert w.run().found == {"uninitialised"}
