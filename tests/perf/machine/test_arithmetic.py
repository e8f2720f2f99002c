"""Every opcode that computes registers, alone: against Python's integers and fractions, and torch.

tests/tools/ptx_scalar.py says for one thread what each opcode gives. Here all opcodes that the
machine has are held to it, on numbers at the edges and on random bits.
"""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch

from tests.tools import ptx_scalar
from tilelab.perf.machine import arithmetic, functions, rounding, types
from tilelab.perf.machine.errors import UnknownInstruction

MNEMONICS = sorted({op.partition(".")[0] for op in arithmetic.FUNCTIONS})
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EDGES = {  # of floats, as numbers
    "f16": (1.0, 65504.0, 2.0**-14, 2.0**-24, 2049 / 2048, 0.5, 1.5, 2.5),
    "bf16": (1.0, 3.3895e38, 2.0**-126, 2.0**-133, 1.0078125, 0.5, 1.5, 2.5),
    "f32": (1.0, 3.4028234e38, 2.0**-126, 2.0**-149, 1.0000001, 0.5, 1.5, 2.5, 2.0**126, 2.0**127,
            2.0**31, 2.0**63, 65519.9, 464.0, 448.0),
    "f64": (1.0, 1.7e308, 2.0**-1022, 5e-324, 1.0000000000000002, 0.5, 2.5, 2.0**63, 2.0**31),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    """The machine does not mind a division by zero in a lane, nor does it want to hear of it."""
    with np.errstate(all="ignore"):
        yield


def registers(op, lists):
    """Registers with these bits, seen as an opcode sees them."""
    dtypes = arithmetic.function(op).operands
    found = [
        np.array(x, bool if t == bool else UNSIGNED[t.itemsize]).view(t)
        for x, t in zip(lists, dtypes, strict=True)
    ]
    if op.startswith("lop3"):
        found[3] = found[3][0]  # the table is a number in the text
    return found


def call(op, *lists):
    """Do an opcode on lists of the registers' bits; lists of bits come back."""
    function = arithmetic.function(op)
    results = function.call(*registers(op, lists))
    results = results if isinstance(results, tuple) else (results,)
    for result, dtype in zip(results, function.results, strict=True):
        assert result.dtype == dtype, (op, result.dtype)
    found = [x.view(bool if x.dtype == bool else UNSIGNED[x.itemsize]).tolist() for x in results]
    return found[0] if len(found) == 1 else list(zip(*found, strict=True))


def one(op, *registers):
    """The same for one thread."""
    return call(op, *([x] for x in registers))[0]


# --- every opcode ---------------------------------------------------------------------------------


def kinds(op):
    """The PTX types of an opcode's operands: its own, except where the ISA names another."""
    name, *modifiers = op.split(".")
    kind, count = modifiers[-1], len(arithmetic.function(op).operands)
    given = [kind] * count
    if name == "cvt" and kind not in ptx_scalar.FORMATS:
        return given
    if name == "mad" and "wide" in modifiers:
        given[2] = f"{kind[0]}{2 * ptx_scalar.width(kind)}"
    if name in ("shl", "shr"):
        given[1] = "distance"
    if name == "bfe":
        given[1:] = ["distance"] * 2
    if name == "bfi":
        given[2:] = ["distance"] * 2
    if name in ("shf", "lop3"):
        given[-1] = "distance"
    if name == "slct":
        given[:2] = [modifiers[0]] * 2
    if name == "selp" or (name == "setp" and count == 3):
        given[2] = "pred"
    return given


@functools.cache
def values(kind):
    """Bits of a type: all of its edges, and as many at random."""
    rng = random.Random(kind)
    if kind == "pred":
        return [0, 1]
    if kind == "distance":
        return [0, 1, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 255, 256, 2**31 + 3, 2**32 - 1]
    bits = ptx_scalar.width(kind)
    drawn = [rng.getrandbits(bits) for _ in range(12)]
    if kind in ptx_scalar.PAIRS:
        half = values(ptx_scalar.PAIRS[kind])
        return [rng.choice(half) << 16 | x for x in half]
    if kind in ptx_scalar.FORMATS and kind != "tf32":
        special = [0.0, -0.0, math.inf, -math.inf, math.nan]
        edges = [x * sign for x in EDGES[kind] for sign in (1, -1)]
        near = [rng.uniform(-4, 4) for _ in range(12)]
        return [ptx_scalar.encode(x, kind) for x in special + edges + near] + drawn
    top = 1 << (bits - 1)
    edges = [0, 1, 2, 7, 127, 128, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1]
    return [x & (2 * top - 1) for x in edges] + drawn + [rng.getrandbits(6) for _ in range(4)]


def inputs(op, rng, most=90):
    """Lists of operands: every pair of values if that is little, else some at random."""
    lists = [values(kind) for kind in kinds(op)]
    if math.prod(map(len, lists)) <= most:
        return [list(x) for x in zip(*itertools.product(*lists), strict=True)]
    first = [*lists[0], *(rng.choice(lists[0]) for _ in range(most - len(lists[0])))]
    return [first] + [[rng.choice(x) for _ in first] for x in lists[1:]]


@pytest.mark.parametrize("mnemonic", MNEMONICS)
def test_every_opcode_agrees_with_integers_and_fractions(mnemonic):
    rng, wrong = random.Random(mnemonic), []
    tolerance = 1 if mnemonic in ptx_scalar.APPROXIMATE else 0
    for op in arithmetic.FUNCTIONS:
        if op.partition(".")[0] != mnemonic:
            continue
        lists = inputs(op, rng)
        if mnemonic == "lop3":
            lists[3] = [rng.randrange(256)] * len(lists[0])
        modifiers = op.split(".")
        result = modifiers[-2] if mnemonic == "cvt" else modifiers[-1]
        result = modifiers[1] if mnemonic == "slct" else "pred" if mnemonic == "setp" else result
        for found, registers in zip(call(op, *lists), zip(*lists, strict=True), strict=True):
            wanted = ptx_scalar.expected(op, *registers)
            if found != wanted and not ptx_scalar.same(found, wanted, result, tolerance):
                wrong.append((op, [hex(x) for x in registers], found, wanted))
    assert not wrong, (len(wrong), wrong[:10])


def test_two_operands_at_every_pair_of_edges():
    """The corners that a random choice may miss: zeros of both signs, infinities, NaN, -2^31 / -1."""
    rng = random.Random(0)
    for op in (
        "add.f32", "mul.rn.f16", "add.bf16", "max.f32", "max.NaN.f32", "min.f16", "min.NaN.bf16",
        "div.rn.f32", "div.approx.f32", "div.s32", "rem.s32", "div.u64", "rem.s64", "mul.hi.s64",
        "mul.hi.u64", "setp.leu.f32", "setp.ne.bf16", "setp.lt.s64", "sub.sat.s32",
    ):  # fmt: skip
        kind = op.rpartition(".")[2]
        first, second = zip(*itertools.product(values(kind), repeat=2), strict=True)
        for found, a, b in zip(call(op, first, second), first, second, strict=True):
            wanted = ptx_scalar.expected(op, a, b)
            result = "pred" if op.startswith("setp") else kind
            assert ptx_scalar.same(found, wanted, result), (op, hex(a), hex(b), found, wanted)


# --- every function, as the machine calls it ------------------------------------------------------


@functools.cache
def operands_of(op, n=6):
    rng = random.Random(op)
    return registers(op, [rng.choices(values(kind), k=n) for kind in kinds(op)])


def results_of(op, *operands):
    results = arithmetic.function(op).call(*operands)
    return results if isinstance(results, tuple) else (results,)


def bits_of(results):
    return [np.broadcast_to(x, 6).tobytes() for x in results]


def test_functions_leave_their_operands_alone_and_give_what_they_declare():
    for op, function in arithmetic.FUNCTIONS.items():
        arrays = operands_of(op)
        before = [x.tobytes() for x in arrays]
        results = results_of(op, *arrays)
        assert [x.tobytes() for x in arrays] == before, op
        assert [x.dtype for x in results] == list(function.results), op
        assert all(x.shape == (6,) for x in results), op
        if isinstance(function.call, np.ufunc):  # the machine has it write into a register
            place = np.empty(6, function.results[0])
            function.call(*arrays, out=place)
            assert place.tobytes() == results[0].tobytes(), op


def test_any_operand_may_be_a_scalar():
    """An immediate is a NumPy scalar; it is as good as an array that repeats it."""
    for op, function in arithmetic.FUNCTIONS.items():
        arrays = operands_of(op)
        for chosen in itertools.product((False, True), repeat=len(arrays)):
            picked = [(x, s and x.ndim) for x, s in zip(arrays, chosen, strict=True)]
            found = results_of(op, *(x[2] if s else x for x, s in picked))
            wanted = results_of(op, *(np.full(6, x[2]) if s else x for x, s in picked))
            assert [x.dtype for x in found] == list(function.results), (op, chosen)
            assert bits_of(found) == bits_of(wanted), (op, chosen)


def test_operands_need_not_be_contiguous():
    for op in arithmetic.FUNCTIONS:
        arrays = operands_of(op)
        strided = [np.repeat(x, 2)[::2] if x.ndim else x for x in arrays]
        assert bits_of(results_of(op, *strided)) == bits_of(results_of(op, *arrays)), op


@pytest.mark.parametrize(
    "op",
    ["add", "add.f33", "add.rz.f32", "fma.f32", "min.xorsign.abs.f32", "setp.lo.s32", "setp.lt.b32",
     "cvt.f32.s32", "cvt.rn.f32.f16", "cvt.sat.s32.s16", "mul.wide.s64", "cvta.shared.u64",
     "prmt.b32.f4e", "ld.global.b32", "selp.pred", "add.ftz.bf16", "cvt.rn.e4m3x2.f32", ""],
)  # fmt: skip
def test_what_ptx_does_not_have_or_the_machine_does_not_know(op):
    with pytest.raises(UnknownInstruction, match="not an instruction"):
        arithmetic.function(op)


def test_patterns_stand_for_opcodes():
    assert list(functions.forms("a{.x|.y}(.p|.q)")) == [
        "a.p",
        "a.q",
        "a.x.p",
        "a.x.q",
        "a.y.p",
        "a.y.q",
    ]
    assert list(functions.forms("a")) == ["a"]


# --- rounding once --------------------------------------------------------------------------------


def test_fma_rounds_once():
    """Sums next to the middle of two float32, nearer than a float64 can tell."""
    rng, naive = random.Random(1), 0
    rows = []
    for exponent in (0, 40, -60, -125, -126, 127, 3):
        for _ in range(30):
            last = max(exponent - 23, -149)  # of the sum: 2^last
            c = math.ldexp(rng.getrandbits(23) | 1 << 23, -23)
            c = float(np.float32(math.ldexp(c, exponent)))
            half = 2.0 ** (last - 1)
            # half a place, and less by a part in 2^46
            scale = 2.0 ** ((last - 1) // 2)
            a, b = scale * (1 + 2.0**-23), half / scale * (1 - 2.0**-23)
            rows += [(x, y, z) for x in (a, -a) for y in (b, -b) for z in (c, -c)]
    registers = [[ptx_scalar.f32(x) for x in column] for column in zip(*rows, strict=True)]
    for found, row in zip(call("fma.rn.f32", *registers), rows, strict=True):
        wanted = ptx_scalar.expected("fma.rn.f32", *map(ptx_scalar.f32, row))
        assert found == wanted, (row, found, wanted)
        naive += ptx_scalar.f32(np.float32(row[0] * row[1] + row[2])) != wanted
    assert naive > len(rows) / 4  # these rows do tell: float64 alone is wrong for many


def test_fma_of_many_random_numbers():
    """As many as find what is wrong in one of a thousand; with sums that cancel."""
    rng = random.Random(2)
    for op, kind, most in (
        ("fma.rn.f32", "f32", 1500),
        ("fma.rn.f16", "f16", 2500),
        ("fma.rn.bf16", "bf16", 2500),
        ("fma.rn.f64", "f64", 500),
    ):
        size = ptx_scalar.width(kind)
        a, b = ([rng.getrandbits(size) for _ in range(most)] for _ in range(2))
        product = [ptx_scalar.expected(f"mul.rn.{kind}", x, y) for x, y in zip(a, b, strict=True)]
        sign = 1 << (size - 1)
        c = [x ^ sign ^ rng.getrandbits(rng.choice((0, 1, 4, size))) for x in product]
        for found, row in zip(call(op, a, b, c), zip(a, b, c, strict=True), strict=True):
            wanted = ptx_scalar.expected(op, *row)
            assert ptx_scalar.same(found, wanted, kind), (op, list(map(hex, row)), found, wanted)


def test_a_product_of_bfloat16_that_float32_rounds_first():
    """2^-134 + 2^-150 is above the middle of 0 and the smallest number; float32 puts it onto it."""
    # 129 * 127 = 2^14 - 1 is just below the middle, 2^-134; 129 * 129 is just above it
    small = ptx_scalar.encode(129 * 2.0**-74, "bf16")
    assert one("mul.bf16", small, ptx_scalar.encode(129 * 2.0**-74, "bf16")) == 1
    assert one("mul.bf16", small, ptx_scalar.encode(127 * 2.0**-74, "bf16")) == 0


# --- what the ISA's tables say --------------------------------------------------------------------

INF, NAN = math.inf, math.nan
TABLES = {
    "ex2.approx.ftz.f32": [(-INF, 0.0), (-0.0, 1.0), (0.0, 1.0), (INF, INF), (NAN, NAN), (2.0**-140, 1.0), (-127.0, 0.0), (-126.0, 2.0**-126), (3.0, 8.0)],
    "ex2.approx.f32": [(-127.0, 2.0**-127), (-149.0, 2.0**-149), (128.0, INF)],
    "lg2.approx.f32": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, -INF), (INF, INF), (NAN, NAN), (8.0, 3.0), (2.0**-149, -149.0)],
    "lg2.approx.ftz.f32": [(2.0**-149, -INF)],
    "sin.approx.f32": [(-INF, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, NAN), (NAN, NAN)],
    "cos.approx.f32": [(-INF, NAN), (-0.0, 1.0), (0.0, 1.0), (INF, NAN), (NAN, NAN)],
    "tanh.approx.f32": [(-INF, -1.0), (-0.0, -0.0), (0.0, 0.0), (INF, 1.0), (NAN, NAN)],
    "sqrt.approx.ftz.f32": [(-INF, NAN), (-1.0, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, INF), (NAN, NAN), (4.0, 2.0), (2.0**-130, 0.0)],
    "rsqrt.approx.f32": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN), (4.0, 0.5)],
    "rcp.approx.f32": [(-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN), (4.0, 0.25)],
}  # fmt: skip


@pytest.mark.parametrize("op", TABLES)
def test_special_inputs_of_approximate_functions(op):
    for x, wanted in TABLES[op]:
        assert ptx_scalar.same(one(op, ptx_scalar.f32(x)), ptx_scalar.f32(wanted), "f32"), x


def test_division_by_huge_numbers():
    """div.approx multiplies by the reciprocal, which above 2^126 is taken for zero; div.full not."""
    huge, three, inf = (ptx_scalar.f32(x) for x in (2.0**127, 3.0, INF))
    assert one("div.approx.f32", three, huge) == 0
    assert one("div.approx.f32", three | 1 << 31, huge) == 1 << 31
    assert ptx_scalar.is_nan(one("div.approx.f32", inf, huge), "f32")
    assert one("div.full.f32", three, huge) == ptx_scalar.f32(3 * 2.0**-127)
    assert one("div.full.f32", inf, huge) == inf
    assert one("div.approx.f32", three, ptx_scalar.f32(2.0**126)) == ptx_scalar.f32(3 * 2.0**-126)


def test_canonical_nan():
    nan32, nan16 = 0xFFC12345, 0xFE01
    assert one("max.NaN.f32", nan32, 0) == one("max.f32", nan32, nan32) == 0x7FFFFFFF
    assert one("min.NaN.f16", nan16, 0) == one("min.f16", nan16, nan16) == 0x7FFF
    assert one("max.NaN.bf16", 0xFFC1, 0) == 0x7FFF
    for op, wanted in {
        "cvt.rn.bf16.f32": 0x7FFF, "cvt.rz.bf16.f32": 0x7FFF, "cvt.rn.f16.f32": 0x7FFF,
        "cvt.rn.relu.f16.f32": 0x7FFF, "cvt.rn.satfinite.bf16.f32": 0x7FFF, "cvt.rna.tf32.f32": 0x7FFFFFFF,
    }.items():  # fmt: skip
        assert one(op, nan32) == wanted, op
    assert one("cvt.rn.bf16x2.f32", nan32, ptx_scalar.f32(1.0)) == 0x7FFF3F80
    assert one("cvt.rn.satfinite.e4m3x2.f32", nan32, nan32) == 0x7F7F
    assert one("fma.rn.relu.bf16", 0xFFC1, 0, 0) == 0x7FFF


def test_the_isa_s_examples_of_lop3():
    a, b, c = 0x0F0F1234, 0x33CC5678, 0xDEADBEEF
    for table, wanted in {
        0x80: a & b & c, 0xFE: a | b | c, 0x40: a & b & ~c, 0x1A: (a & b | c) ^ a, 0: 0, 0xFF: 2**32 - 1
    }.items():  # fmt: skip
        assert one("lop3.b32", a, b, c, table) == wanted & 0xFFFFFFFF, hex(table)


def test_bytes_in_order():
    assert one("prmt.b32", 0x33221100, 0x77665544, 0x3210) == 0x33221100
    assert one("prmt.b32", 0x33221100, 0x77665544, 0x7654) == 0x77665544
    assert one("prmt.b32", 0x33221100, 0x77665544, 0x5140) == 0x55114400
    assert one("prmt.b32", 0x00008F7F, 0, 0x9810) == 0xFF008F7F  # signs of bytes 1 and 0


def test_the_first_source_of_a_pair_is_the_upper_half():
    one_, two = ptx_scalar.f32(1.0), ptx_scalar.f32(2.0)
    assert one("cvt.rn.bf16x2.f32", one_, two) == 0x3F804000
    assert one("cvt.rn.f16x2.f32", one_, two) == 0x3C004000
    assert one("cvt.rn.satfinite.e5m2x2.f32", one_, two) == 0x3C40
    assert one("cvt.rn.f16x2.e5m2x2", 0x3C40) == 0x3C004000
    assert one("setp.gt.f16x2", 0x3C004000, 0x40003C00) == (True, False)  # p is of the lower half


def test_what_a_division_by_zero_gives():
    for kind in "u16", "s16", "u32", "s32", "u64", "s64":
        ones = (1 << ptx_scalar.width(kind)) - 1
        assert one(f"div.{kind}", 5, 0) == one(f"rem.{kind}", 5, 0) == ones


# --- torch's conversions --------------------------------------------------------------------------

SINGLES = np.concatenate([
    np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32),
    (np.arange(2**16, dtype=np.uint32) << 16) + np.uint32(0x8000),  # ties of bfloat16
    (np.arange(2**16, dtype=np.uint32) << 16) + np.uint32(0x7FFF),
    np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
    np.float32(1) .view(np.uint32) + np.arange(-2**14, 2**14, dtype=np.int64).astype(np.uint32) * np.uint32(0x1000),
]).view(np.float32)  # fmt: skip


def torch_bits(x, dtype):
    return (
        torch.from_numpy(x.copy()).to(dtype).view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    )


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_16_bits_as_torch_does(kind, dtype):
    found = arithmetic.function(f"cvt.rn.{kind}.f32").call(SINGLES).view(np.uint16)
    wanted = torch_bits(SINGLES, dtype).numpy().view(np.uint16)
    number = ~np.isnan(SINGLES)
    assert (found[number] == wanted[number]).all()
    assert (found[~number] == 0x7FFF).all() and (~number).any()
    half = np.arange(2**16, dtype=np.uint16).view(types.of(kind))
    back = arithmetic.function(f"cvt.f32.{kind}").call(half)
    assert np.array_equal(
        back,
        torch.from_numpy(np.arange(2**16).astype(np.uint16).view(np.int16))
        .view(dtype)
        .float()
        .numpy(),
        equal_nan=True,
    )
    pair = arithmetic.function(f"cvt.rn.{kind}x2.f32").call(SINGLES, SINGLES[::-1])
    assert (pair >> np.uint32(16) == found).all() and (
        (pair & np.uint32(0xFFFF)) == found[::-1]
    ).all()


@pytest.mark.parametrize(
    "kind, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_8_bits_as_torch_has_them(kind, dtype):
    codes = np.arange(2**16, dtype=np.uint16)
    wide = arithmetic.function(f"cvt.rn.f16x2.{kind}x2").call(codes)
    numbers = (
        torch.from_numpy(codes.view(np.uint8).copy()).view(dtype).float().numpy().reshape(-1, 2)
    )
    assert np.array_equal(
        wide.view(np.float16).reshape(-1, 2).astype(np.float32), numbers, equal_nan=True
    )
    largest = float(torch.finfo(dtype).max)
    inside = SINGLES[np.abs(SINGLES) <= largest]  # beyond, torch does not saturate
    found = arithmetic.function(f"cvt.rn.satfinite.{kind}x2.f32").call(inside, inside[::-1])
    wanted = torch_bits(inside, dtype).numpy()
    assert (found >> np.uint16(8) == wanted).all() and (
        (found & np.uint16(255)) == wanted[::-1]
    ).all()
    for x in largest * 1.2, 1e30, math.inf:
        code = one(f"cvt.rn.satfinite.{kind}x2.f32", ptx_scalar.f32(x), ptx_scalar.f32(-x))
        assert (
            ptx_scalar.decode(code >> 8, kind) == largest == -ptx_scalar.decode(code & 0xFF, kind)
        )


def test_tf32_keeps_10_bits_of_the_mantissa():
    x = ptx_scalar.f32(1.0)
    assert one("cvt.rna.tf32.f32", x + 0x0FFF) == x
    assert one("cvt.rna.tf32.f32", x + 0x1000) == x + 0x2000  # a tie, away from zero
    assert one("cvt.rn.tf32.f32", x + 0x1000) == x  # and to even
    assert one("cvt.rn.tf32.f32", x + 0x3000) == x + 0x4000
    assert one("cvt.rz.tf32.f32", x + 0x1FFF) == x


# --- the tests themselves -------------------------------------------------------------------------


def test_the_scalar_model_is_right_where_python_is():
    """What the others are held to is held to struct, round and float."""
    rng = random.Random(3)
    import struct

    for _ in range(3000):
        x = struct.unpack("d", rng.randbytes(8))[0]
        for kind, code, whole in ("f16", "e", "H"), ("f32", "f", "I"), ("f64", "d", "Q"):
            try:
                bits = struct.unpack(whole, struct.pack(code, x))[0]
            except OverflowError:
                bits = ptx_scalar.encode(math.copysign(INF, x), kind)
            assert ptx_scalar.same(ptx_scalar.encode(x, kind), bits, kind), (x, kind)
            assert ptx_scalar.same(
                ptx_scalar.encode(ptx_scalar.decode(bits, kind), kind), bits, kind
            )


def test_directed_rounding_brackets_the_number():
    x = np.random.default_rng(4).standard_normal(2000) * 10.0 ** np.arange(-50, 50).repeat(20)
    for kind in "f16", "bf16", "f32":
        down, up = (
            rounding.TO_F64[kind](rounding.directed(x, kind, mode)) for mode in ("rm", "rp")
        )
        zero = rounding.TO_F64[kind](rounding.directed(x, kind, "rz"))
        assert (down <= x).all() and (x <= up).all()
        assert np.array_equal(zero, np.where(x > 0, down, up))
