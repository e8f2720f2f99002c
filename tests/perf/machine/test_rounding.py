"""Floats of the machine: rounded once, with the special results of the PTX ISA, and as torch's."""

import math
import random
import struct

import numpy as np
import pytest
import torch

from tests.tools import ptx_scalar
from tests.tools.ptx_call import call, one
from tests.tools.ptx_formats import decode, encode, f32, is_nan, same, width
from tilelab.perf.machine import types
from tilelab.perf.machine.registers import arithmetic, rounding

INF, NAN = math.inf, math.nan


# --- rounding once --------------------------------------------------------------------------------


def ties():
    """a, b and c of float32 with a sum next to the middle of two float32.

    a*b is half of the last place of c, and less by one part in 2^46: float64 does not hold that.
    """
    rng = random.Random(1)
    for exponent in (0, 40, -60, -125, -126, 127, 3):
        last = 2.0 ** max(exponent - 23, -149)  # the last place of a number with this exponent
        for _ in range(30):
            c = float(np.float32(math.ldexp(rng.getrandbits(23) | 1 << 23, exponent - 23)))
            scale = 2.0 ** (math.frexp(last)[1] // 2)
            a, b = scale * (1 + 2.0**-23), last / 2 / scale * (1 - 2.0**-23)
            yield from ((x, y, z) for x in (a, -a) for y in (b, -b) for z in (c, -c))


def test_fma_rounds_once():
    rows, naive = list(ties()), 0
    columns = [[f32(x) for x in column] for column in zip(*rows, strict=True)]
    for found, (a, b, c) in zip(call("fma.rn.f32", *columns), rows, strict=True):
        wanted = ptx_scalar.expected("fma.rn.f32", f32(a), f32(b), f32(c))
        assert found == wanted, (a, b, c)
        naive += f32(np.float32(a * b + c)) != wanted
    assert naive > len(rows) / 4  # float64 alone is wrong for many of these


@pytest.mark.parametrize("kind, most", [("f32", 1500), ("f16", 2500), ("bf16", 2500), ("f64", 500)])
def test_fma_of_many_random_numbers(kind, most):
    """Half of them cancel."""
    rng, size = random.Random(2), width(kind)
    a, b = ([rng.getrandbits(size) for _ in range(most)] for _ in range(2))
    product = [ptx_scalar.expected(f"mul.rn.{kind}", x, y) for x, y in zip(a, b, strict=True)]
    sign = 1 << (size - 1)
    c = [x ^ sign ^ rng.getrandbits(rng.choice((0, 1, 4, size))) for x in product]
    for found, row in zip(call(f"fma.rn.{kind}", a, b, c), zip(a, b, c, strict=True), strict=True):
        wanted = ptx_scalar.expected(f"fma.rn.{kind}", *row)
        assert same(found, wanted, kind), (list(map(hex, row)), found, wanted)


def test_a_product_of_bfloat16_next_to_the_middle():
    """The middle of 0 and the smallest number is 2^-134 = 128 * 128 * 2^-148."""
    above, below = encode(129 * 2.0**-74, "bf16"), encode(127 * 2.0**-74, "bf16")
    assert one("mul.bf16", above, encode(128 * 2.0**-74, "bf16")) == 1
    assert one("mul.bf16", above, below) == 0  # less by 2^-148


def test_directed_rounding_brackets_the_number():
    rng = np.random.default_rng(4)
    x = rng.standard_normal(2000) * 10.0 ** np.arange(-50, 50).repeat(20)
    for kind in "f16", "bf16", "f32":
        with np.errstate(all="ignore"):
            zero, down, up = (
                rounding.TO_F64[kind](rounding.directed(x, kind, mode))
                for mode in ("rz", "rm", "rp")
            )
        assert (down <= x).all() and (x <= up).all()
        assert np.array_equal(zero, np.where(x > 0, down, up))


def test_tf32_keeps_10_bits_of_the_mantissa():
    x = f32(1.0)
    assert one("cvt.rna.tf32.f32", x + 0x0FFF) == x
    assert one("cvt.rna.tf32.f32", x + 0x1000) == x + 0x2000  # a tie, away from zero
    assert one("cvt.rn.tf32.f32", x + 0x1000) == x  # and to even
    assert one("cvt.rn.tf32.f32", x + 0x3000) == x + 0x4000
    assert one("cvt.rz.tf32.f32", x + 0x1FFF) == x


# --- what the ISA's tables say --------------------------------------------------------------------

TABLES = {
    "ex2.approx.f32": "-inf 0, -0. 1, 0 1, inf inf, nan nan, 3 8, 128 inf, -149 0x1p-149",
    "ex2.approx.ftz.f32": "-inf 0, inf inf, nan nan, 0x1p-140 1, -127 0, -126 0x1p-126",
    "ex2.approx.ftz.bf16": "-inf 0, inf inf, nan nan, 0x1p-130 1, -127 0, -126 0x1p-126, 3 8",
    "ex2.approx.f16": "-inf 0, inf inf, nan nan, -0. 1, -24 0x1p-24, 16 inf",
    "lg2.approx.f32": "-inf nan, -1 nan, -0. -inf, 0 -inf, inf inf, nan nan, 8 3, 0x1p-149 -149",
    "lg2.approx.ftz.f32": "0x1p-149 -inf, 0x1p-126 -126",
    "sin.approx.f32": "-inf nan, -0. -0., 0 0, inf nan, nan nan",
    "cos.approx.f32": "-inf nan, -0. 1, 0 1, inf nan, nan nan",
    "tanh.approx.f32": "-inf -1, -0. -0., 0 0, inf 1, nan nan",
    "sqrt.approx.ftz.f32": "-inf nan, -1 nan, -0. -0., 0 0, inf inf, nan nan, 4 2, 0x1p-130 0",
    "rsqrt.approx.f32": "-inf nan, -1 nan, -0. -inf, 0 inf, inf 0, nan nan, 4 0.5",
    "rcp.approx.f32": "-inf -0., -0. -inf, 0 inf, inf 0, nan nan, 4 0.25",
}


@pytest.mark.parametrize("op", TABLES)
def test_special_inputs_of_approximate_functions(op):
    kind = op.rpartition(".")[2]
    for row in TABLES[op].split(", "):
        x, wanted = (encode(float.fromhex(x) if "x" in x else float(x), kind) for x in row.split())
        assert same(one(op, x), wanted, kind), row


def test_division_by_huge_numbers():
    """div.approx multiplies by the reciprocal, and takes it for zero above 2^126; div.full not."""
    huge, three, inf = f32(2.0**127), f32(3.0), f32(INF)
    assert one("div.approx.f32", three, huge) == 0
    assert one("div.approx.f32", f32(-3.0), huge) == f32(-0.0)
    assert is_nan(one("div.approx.f32", inf, huge), "f32")
    assert one("div.approx.f32", three, f32(2.0**126)) == f32(3 * 2.0**-126)
    assert one("div.full.f32", three, huge) == f32(3 * 2.0**-127)
    assert one("div.full.f32", inf, huge) == inf


def test_canonical_nan():
    nan32, nan16 = 0xFFC12345, 0xFE01
    assert one("max.NaN.f32", nan32, 0) == one("max.f32", nan32, nan32) == 0x7FFFFFFF
    assert one("min.NaN.f16", nan16, 0) == one("min.f16", nan16, nan16) == 0x7FFF
    assert one("max.NaN.bf16", 0xFFC1, 0) == 0x7FFF
    for op in "rn.bf16", "rz.bf16", "rn.f16", "rz.f16", "rn.relu.f16", "rn.satfinite.bf16":
        assert one(f"cvt.{op}.f32", nan32) == 0x7FFF, op
    assert one("cvt.rna.tf32.f32", nan32) == 0x7FFFFFFF
    assert one("cvt.rn.bf16x2.f32", nan32, f32(1.0)) == 0x7FFF3F80
    assert one("cvt.rn.satfinite.e4m3x2.f32", nan32, nan32) == 0x7F7F
    assert one("fma.rn.relu.bf16", 0xFFC1, 0, 0) == 0x7FFF


def test_the_first_source_of_a_pair_is_the_upper_half():
    a, b = f32(1.0), f32(2.0)
    assert one("cvt.rn.bf16x2.f32", a, b) == 0x3F804000
    assert one("cvt.rn.f16x2.f32", a, b) == 0x3C004000
    assert one("cvt.rn.satfinite.e5m2x2.f32", a, b) == 0x3C40
    assert one("cvt.rn.f16x2.e5m2x2", 0x3C40) == 0x3C004000


# --- torch's conversions --------------------------------------------------------------------------

UPPER = np.arange(2**16, dtype=np.uint32) << 16
SINGLES = np.concatenate([
    np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32),
    UPPER + 0x8000,  # ties of bfloat16
    UPPER + 0x7FFF,
    np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
    f32(0.25) + np.arange(2**15, dtype=np.uint32) * 0x1000,  # ties of float16
]).view(np.float32)  # fmt: skip


def from_torch(x, dtype):
    """The bits of a tensor of this dtype, in NumPy."""
    bits = (
        torch.from_numpy(x.copy()).to(dtype).view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    )
    return bits.numpy().view(f"u{dtype.itemsize}")


def numbers_of(codes, dtype):
    """What torch takes bits for, as float32."""
    signed = codes.view({1: np.uint8, 2: np.int16}[dtype.itemsize])
    return torch.from_numpy(signed.copy()).view(dtype).float().numpy()


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bits_as_torch_has_them(kind, dtype):
    with np.errstate(all="ignore"):
        found = arithmetic.function(f"cvt.rn.{kind}.f32").call(SINGLES).view(np.uint16)
        pair = arithmetic.function(f"cvt.rn.{kind}x2.f32").call(SINGLES, SINGLES[::-1])
    number = ~np.isnan(SINGLES)
    assert (found == from_torch(SINGLES, dtype))[number].all()
    assert (found[~number] == 0x7FFF).all() and not number.all()
    assert (pair >> 16 == found).all() and (pair & 0xFFFF == found[::-1]).all()
    codes = np.arange(2**16, dtype=np.uint16)
    back = arithmetic.function(f"cvt.f32.{kind}").call(codes.view(types.of(kind)))
    assert np.array_equal(back, numbers_of(codes, dtype), equal_nan=True)


@pytest.mark.parametrize(
    "kind, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_8_bits_as_torch_has_them(kind, dtype):
    codes = np.arange(2**16, dtype=np.uint16)
    wide = arithmetic.function(f"cvt.rn.f16x2.{kind}x2").call(codes).view(np.float16)
    assert np.array_equal(wide, numbers_of(codes.view(np.uint8), dtype), equal_nan=True)
    largest = float(torch.finfo(dtype).max)
    inside = SINGLES[np.abs(SINGLES) <= largest]  # beyond, torch does not saturate
    found = arithmetic.function(f"cvt.rn.satfinite.{kind}x2.f32").call(inside, inside[::-1])
    wanted = from_torch(inside, dtype)
    assert (found >> 8 == wanted).all() and (found & 0xFF == wanted[::-1]).all()
    for x in largest * 1.2, 1e30, INF:
        code = one(f"cvt.rn.satfinite.{kind}x2.f32", f32(x), f32(-x))
        assert decode(code >> 8, kind) == largest == -decode(code & 0xFF, kind)


# --- the tests' own formats -----------------------------------------------------------------------


def test_the_formats_that_tests_use_are_those_of_struct():
    rng = random.Random(3)
    for _ in range(1000):
        x = struct.unpack("d", rng.randbytes(8))[0]
        for kind, code, whole in ("f16", "e", "H"), ("f32", "f", "I"), ("f64", "d", "Q"):
            try:
                bits = struct.unpack(whole, struct.pack(code, x))[0]
            except OverflowError:
                bits = encode(math.copysign(INF, x), kind)
            assert same(encode(x, kind), bits, kind), (x, kind)
            assert same(encode(decode(bits, kind), kind), bits, kind)
