"""Every opcode that computes registers, alone: against Python's integers and fractions.

tests/tools/ptx_scalar.py says for one thread what each opcode gives. Here all opcodes that the
machine has are held to it, on numbers at the edges and on random bits. How floats are rounded is
looked at more closely in test_rounding.py.
"""

import functools
import itertools
import math
import random

import numpy as np
import pytest

from tests.tools import ptx_scalar
from tests.tools.ptx_call import call, one, registers
from tests.tools.ptx_formats import FORMATS, PAIRS, encode, same, width
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.registers import arithmetic, functions

MNEMONICS = sorted({op.partition(".")[0] for op in arithmetic.FUNCTIONS})
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


# --- every opcode ---------------------------------------------------------------------------------


def kinds(op):
    """The PTX types of an opcode's operands: its own, except where the ISA names another."""
    name, *modifiers = op.split(".")
    kind, count = modifiers[-1], len(arithmetic.function(op).operands)
    given = [kind] * count
    if name == "cvt" and kind not in FORMATS:
        return given
    if name == "mad" and "wide" in modifiers:
        given[2] = f"{kind[0]}{2 * width(kind)}"
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


def kind_of_result(op):
    name, *modifiers = op.split(".")
    places = {"cvt": -2, "slct": 0}
    return "pred" if name == "setp" else modifiers[places.get(name, -1)]


@functools.cache
def values(kind):
    """Bits of a type: all of its edges, and as many at random."""
    rng = random.Random(kind)
    if kind == "pred":
        return [0, 1]
    if kind == "distance":
        return [0, 1, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 255, 256, 2**31 + 3, 2**32 - 1]
    bits = width(kind)
    drawn = [rng.getrandbits(bits) for _ in range(12)]
    if kind in PAIRS:
        half = values(PAIRS[kind])
        return [rng.choice(half) << 16 | x for x in half]
    if kind in FORMATS and kind != "tf32":
        special = [0.0, -0.0, math.inf, -math.inf, math.nan]
        edges = [x * sign for x in EDGES[kind] for sign in (1, -1)]
        near = [rng.uniform(-4, 4) for _ in range(12)]
        return [encode(x, kind) for x in special + edges + near] + drawn
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
        for found, row in zip(call(op, *lists), zip(*lists, strict=True), strict=True):
            wanted = ptx_scalar.expected(op, *row)
            if found != wanted and not same(found, wanted, kind_of_result(op), tolerance):
                wrong.append((op, [hex(x) for x in row], found, wanted))
    assert not wrong, (len(wrong), wrong[:10])


def test_two_operands_at_every_pair_of_edges():
    """The corners that a random choice may miss: zeros of both signs, infinities, -2^31 / -1."""
    for op in (
        "add.f32", "mul.rn.f16", "add.bf16", "max.f32", "max.NaN.f32", "min.f16", "min.NaN.bf16",
        "div.rn.f32", "div.approx.f32", "div.s32", "rem.s32", "div.u64", "rem.s64", "mul.hi.s64",
        "mul.hi.u64", "setp.leu.f32", "setp.ne.bf16", "setp.lt.s64", "sub.sat.s32",
    ):  # fmt: skip
        kind = op.rpartition(".")[2]
        first, second = zip(*itertools.product(values(kind), repeat=2), strict=True)
        for found, a, b in zip(call(op, first, second), first, second, strict=True):
            wanted = ptx_scalar.expected(op, a, b)
            assert same(found, wanted, kind_of_result(op)), (op, hex(a), hex(b), found, wanted)


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


def test_the_isa_s_examples_of_lop3():
    a, b, c = 0x0F0F1234, 0x33CC5678, 0xDEADBEEF
    examples = {
        0x80: a & b & c, 0xFE: a | b | c, 0x40: a & b & ~c, 0x1A: (a & b | c) ^ a, 0: 0, 0xFF: -1,
    }  # fmt: skip
    for table, wanted in examples.items():
        assert one("lop3.b32", a, b, c, table) == wanted & 0xFFFFFFFF, hex(table)


def test_bytes_in_order():
    assert one("prmt.b32", 0x33221100, 0x77665544, 0x3210) == 0x33221100
    assert one("prmt.b32", 0x33221100, 0x77665544, 0x7654) == 0x77665544
    assert one("prmt.b32", 0x33221100, 0x77665544, 0x5140) == 0x55114400
    assert one("prmt.b32", 0x00008F7F, 0, 0x9810) == 0xFF008F7F  # signs of bytes 1 and 0


def test_the_lower_halves_are_compared_for_the_first_predicate():
    assert one("setp.gt.f16x2", 0x3C004000, 0x40003C00) == (True, False)


def test_what_a_division_by_zero_gives():
    for kind in "u16", "s16", "u32", "s32", "u64", "s64":
        ones = (1 << width(kind)) - 1
        assert one(f"div.{kind}", 5, 0) == one(f"rem.{kind}", 5, 0) == ones


def test_patterns_stand_for_opcodes():
    found = functions.forms("a{.x|.y}(.p|.q)")
    assert list(found) == ["a.p", "a.q", "a.x.p", "a.x.q", "a.y.p", "a.y.q"]
    assert list(functions.forms("a")) == ["a"]
