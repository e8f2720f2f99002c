"""Floating-point formats as integers of bits: `decode` and `encode` are exact and know no NumPy."""

import math
import struct
from fractions import Fraction

FORMATS = {  # bits of exponent, of mantissa
    "f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52), "tf32": (8, 23),
    "e4m3": (4, 3), "e5m2": (5, 2),
}  # fmt: skip
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "u16x2": "u16", "s16x2": "s16"}


def width(kind):
    """Bits of a type."""
    if kind in ("e4m3x2", "e5m2x2"):
        return 16
    if kind in PAIRS or kind == "tf32":
        return 32
    return 1 if kind == "pred" else int(kind.lstrip("bfsu"))


# --- floats and their bits ------------------------------------------------------------------------


def decode(bits, kind):
    """The number that bits stand for, as a Python float, which holds any of them."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    negative, rest = divmod(bits, 1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = divmod(rest, 1 << mantissa_bits)
    sign = -1.0 if negative else 1.0
    bias = (1 << (exponent_bits - 1)) - 1
    if kind == "e4m3":
        if bits & 0x7F == 0x7F:
            return math.nan
    elif exponent == (1 << exponent_bits) - 1:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)


def encode(x, kind, mode="rn"):
    """The bits of a fraction, or of a float that is NaN, infinite or zero."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    drop = 13 if kind == "tf32" else 0  # of the bits of float32, tf32 lacks the last
    sign_bit = 1 << (exponent_bits + mantissa_bits)
    infinity = sign_bit - (1 << mantissa_bits)
    if isinstance(x, float) and math.isnan(x):
        return sign_bit - 1
    if isinstance(x, float) and math.isinf(x):
        return infinity | (sign_bit if x < 0 else 0)
    if x == 0:
        return sign_bit if math.copysign(1, x) < 0 else 0
    negative, size = x < 0, abs(Fraction(x))
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = max(exponent, 1 - bias)
    whole, rest = divmod(size / Fraction(2) ** (exponent - mantissa_bits + drop), 1)
    outwards = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    whole = (whole + bool(outwards)) << drop
    bits = whole + ((exponent + bias - 1) << mantissa_bits)  # a carry goes to the exponent
    if kind != "e4m3" and bits >= infinity:
        finite = {"rz": True, "rm": not negative, "rp": negative}.get(mode, False)
        bits = infinity - (1 << drop) if finite else infinity
    return bits | (sign_bit if negative else 0)


def is_nan(bits, kind):
    return math.isnan(decode(bits, kind))


def flush(bits, kind):
    """Subnormal numbers become zero."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    if bits >> mantissa_bits & ((1 << exponent_bits) - 1):
        return bits
    return bits & 1 << (exponent_bits + mantissa_bits)


def same(found, wanted, kind, tolerance=0):
    """Whether bits agree: NaN with any NaN."""
    if kind in PAIRS and PAIRS[kind] in FORMATS:
        return all(
            same(found >> s & 0xFFFF, wanted >> s & 0xFFFF, PAIRS[kind], tolerance) for s in (0, 16)
        )
    if kind in FORMATS and is_nan(wanted, kind):
        return is_nan(found, kind)
    return abs(found - wanted) <= tolerance


def f32(x):
    """The bits of a float32."""
    return struct.unpack("I", struct.pack("f", x))[0]
