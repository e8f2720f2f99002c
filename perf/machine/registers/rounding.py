"""Floating-point formats, and how an exact number gets into one with a single rounding.

A GPU rounds a*b + c once. NumPy has no such operation, and to compute in a wider format rounds
twice. Here that is wrong, with float64 as the wider format of float32:

    exact                     1 + 2^-24 + 2^-60
    nearest float64           1 + 2^-24            which lies halfway between two float32
    then nearest float32      1                    the even one of the two; right is 1 + 2^-23

The way out is *round to odd*: of the two float64 around an inexact result take the one whose last
bit is 1. It never lies halfway between two numbers of a narrower format, and it lies on the same
side of such a point as the exact result. So the second rounding is right, if the wider format has
two bits more (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).

bfloat16 is kept as its bits: the upper half of a float32.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

F16, F32, F64, U16, U32 = np.float16, np.float32, np.float64, np.uint16, np.uint32
_UNSIGNED = {2: U16, 4: U32, 8: np.uint64}
_SIGNED = {4: np.int32, 8: np.int64}
SMALLEST_NORMAL = {np.dtype(t): np.finfo(t).smallest_normal for t in (F16, F32, F64)}
# The NaN that PTX calls canonical. With float32 and float64 only min and max must give it. The NaN
# of add and the others is NumPy's, since the ISA does not say which it is (section 9.7.3).
CANONICAL = {np.dtype(t): (~np.zeros((), _UNSIGNED[t().itemsize]) >> 1).view(t)[()]
             for t in (F16, F32, F64)}  # fmt: skip
BF16_NAN = U32(0x7FFF0000)  # in the upper half


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of floats as unsigned integers."""
    return x.view(_UNSIGNED[x.itemsize])


def canonical(x: np.ndarray) -> np.ndarray:
    """All NaN become PTX's canonical one."""
    nan = np.isnan(x)
    return np.where(nan, CANONICAL[x.dtype], x) if np.count_nonzero(nan) else x


def flush(x: np.ndarray) -> np.ndarray:
    """`.ftz`: subnormal numbers become a zero of their sign."""
    if x.dtype == U16:  # bfloat16: its exponent is 0
        return np.where(x & U16(0x7F80), x, x & U16(0x8000))
    return x * (np.abs(x) >= SMALLEST_NORMAL[x.dtype])


def to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """From round to nearest to round to odd.

    Args:
        rounded: nearest to the exact results.
        error: the exact results minus `rounded`, or anything of its sign.
    """
    number = rounded.view(_SIGNED[rounded.itemsize])  # as an integer: +-1 is the next float
    outwards = (error > 0) != np.signbit(rounded)
    inexact = (error > 0) | (error < 0)  # False for NaN
    odd = np.where(outwards, number + 1, number - 1)
    return np.where(inexact & (number & 1 == 0), odd, number).view(rounded.dtype)


# --- bfloat16 -------------------------------------------------------------------------------------


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 as float32."""
    return np.left_shift(x, U32(16)).view(F32)


def round_to_upper_half(x: np.ndarray) -> np.ndarray:
    """Float32 to the nearest bfloat16: in the upper 16 bits, below them is rubbish."""
    number = x.view(U32)
    # Add just less than half of the last place, or half if the last bit is 1: ties go to even.
    result = number >> U32(16)
    result &= U32(1)
    result += U32(0x7FFF)
    result += number
    nan = np.isnan(x)
    return np.where(nan, BF16_NAN, result) if np.count_nonzero(nan) else result


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 to bits of the nearest bfloat16."""
    return (round_to_upper_half(x) >> U32(16)).astype(U16)


# --- all formats ----------------------------------------------------------------------------------

TO_F32: dict[str, Callable] = {"f16": lambda x: x.astype(F32), "bf16": bf16_to_f32}
FROM_F32: dict[str, Callable] = {"f16": lambda x: canonical(x.astype(F16)), "bf16": f32_to_bf16}
TO_F64: dict[str, Callable] = {
    "f16": lambda x: x.astype(F64),
    "bf16": lambda x: bf16_to_f32(x).astype(F64),
    "f32": lambda x: x.astype(F64),
    "f64": lambda x: x,
}


def _f64_to_bf16(x: np.ndarray) -> np.ndarray:
    single = x.astype(F32)
    return f32_to_bf16(to_odd(single, x - single))


NEAREST: dict[str, Callable] = {  # from float64
    "f16": lambda x: canonical(x.astype(F16)),
    "bf16": _f64_to_bf16,
    "f32": lambda x: x.astype(F32),
    "f64": lambda x: x,
}


def directed(x: np.ndarray, name: str, mode: str) -> np.ndarray:
    """Float64 rounded towards zero ("rz"), minus ("rm") or plus infinity ("rp")."""
    nearest = NEAREST[name](x)
    number = bits(nearest)  # +1 is the next outwards, also from the largest to infinity
    value = TO_F64[name](nearest)
    number = np.where(np.abs(value) > np.abs(x), number - 1, number)  # towards zero
    if mode != "rz":
        value = TO_F64[name](number.view(nearest.dtype))
        number = np.where(value > x if mode == "rm" else value < x, number + 1, number)
    return number.view(nearest.dtype)


# --- fused multiply-add ---------------------------------------------------------------------------


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of float64, rounded to odd. Knuth's TwoSum gives the error of a sum."""
    total = a + b
    part = total - a
    return to_odd(total, (a - (total - part)) + (b - part))


def fma_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c in float64, rounded to odd. The product of two float32 or shorter is exact there."""
    return _sum_to_odd(np.multiply(a, b, dtype=F64), c)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c of float32, rounded once.

    Only a float64 sum that lies halfway between two float32 may be rounded wrongly. Its last 28
    bits are zero (29 of a normal float32, and more of a subnormal one), and it is no float32
    itself. That is rare, and tested first.
    """
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    result = total.astype(F32)
    rest = total.view(np.uint64) & np.uint64(0x0FFF_FFFF)
    if np.count_nonzero(rest) == rest.size:
        return result
    if not np.count_nonzero((rest == 0) & (result != total)):
        return result
    return _sum_to_odd(product, c).astype(F32)


def _fma_of_one(a: float, b: float, c: float) -> float:
    if not (np.isfinite(a) and np.isfinite(b)):
        return a * b + c
    if not np.isfinite(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:  # its sign is that of IEEE 754's rules, and here no rounding can come between
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


# float64 has no wider format here, so each element is computed with fractions: slow, and rare.
_fma_of_each = np.frompyfunc(_fma_of_one, 3, 1)


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c of float64, rounded once."""
    return np.asarray(_fma_of_each(a, b, c), F64)
