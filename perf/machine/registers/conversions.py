"""Conversions between types: cvt.

    cvt.s64.s32           integers: sign- or zero-extended, or chopped
    cvt.rn.f32.s32        integer to float, rounded
    cvt.rzi.s32.f32       float to integer, rounded to a whole number, clamped to the type's range
    cvt.rn.bf16.f32       float to float
    cvt.rn.bf16x2.f32     two floats into the halves of one register; the first is the upper half
    cvt.rna.tf32.f32      a float32 whose last 13 bits are 0
    cvt.rn.satfinite.e4m3x2.f32, cvt.rn.f16x2.e4m3x2    to and from 8 bits, two at a time

Source: PTX ISA 9.1, section 9.7.9.21.
"""

import functools
from collections.abc import Callable

import numpy as np

from tilelab.perf.machine import types
from tilelab.perf.machine.registers import functions, rounding
from tilelab.perf.machine.registers.floats import relued, saturated
from tilelab.perf.machine.registers.rounding import F16, F64, U16, U32

INTEGERS = [f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)]
FLOATS = ("f16", "bf16", "f32", "f64")
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
WHOLES, MODES = ".rni|.rzi|.rmi|.rpi", ".rn|.rz|.rm|.rp"


def _all() -> dict[str, functions.Function]:
    found = _integers() | _to_floats() | _to_integers() | _between_floats() | _of_f32() | _eight()
    return {f"cvt{op}": function for op, function in found.items()}


# --- integers -------------------------------------------------------------------------------------


def _integers() -> dict[str, functions.Function]:
    found = {}
    for to in INTEGERS:
        for of in INTEGERS:
            if to == of:
                continue
            dtype, a, b = types.of(to), np.iinfo(types.of(to)), np.iinfo(types.of(of))
            found[f".{to}.{of}"] = functions.of(to, of, functools.partial(_cast, dtype))
            if a.min > b.min or a.max < b.max:
                clamped = functools.partial(_clamp, dtype, max(a.min, b.min), min(a.max, b.max))
                found[f".sat.{to}.{of}"] = functions.of(to, of, clamped)
    return found


def _cast(dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    return x.astype(dtype)


def _clamp(dtype: np.dtype, low: int, high: int, x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, low), high).astype(dtype)


def _to_floats() -> dict[str, functions.Function]:
    """From integers. float64 holds up to 32 bits exactly; of 64 only "rn" is here, and not bf16."""
    found = {}
    for to in FLOATS:
        for of in INTEGERS:
            if of.endswith("64") and to != "bf16":  # float16 overflows long before float64 rounds
                call = functools.partial(_cast, types.of(to))
                found[f".rn.{to}.{of}"] = functions.of(to, of, call)
            elif not of.endswith("64"):
                for form in functions.forms(f"({MODES})"):
                    call = functools.partial(_number, to, form[1:])
                    if form == ".rn" and to in ("f32", "f64"):
                        call = functools.partial(_cast, types.of(to))
                    found[f"{form}.{to}.{of}"] = functions.of(to, of, call)
    return found


def _number(to: str, mode: str, x: np.ndarray) -> np.ndarray:
    return _rounded(x.astype(F64), to, mode)


def _rounded(x: np.ndarray, to: str, mode: str) -> np.ndarray:
    return rounding.NEAREST[to](x) if mode == "rn" else rounding.directed(x, to, mode)


def _to_integers() -> dict[str, functions.Function]:
    """From floats. The result is clamped to the range with `.sat` and without."""
    found = {}
    for to in INTEGERS:
        for of in FLOATS:
            ftz = "{.ftz}" if of == "f32" else ""
            for form in functions.forms(f"({WHOLES}){ftz}{{.sat}}"):
                call = functools.partial(_whole, types.of(to), of, form)
                found[f"{form}.{to}.{of}"] = functions.of(to, of, call)
    return found


def _whole(dtype: np.dtype, of: str, form: str, x: np.ndarray) -> np.ndarray:
    info = np.iinfo(dtype)
    if "ftz" in form:
        x = rounding.flush(x)
    y = WHOLE[form[1:4]](rounding.TO_F64[of](x))
    above, below = y >= float(info.max + 1), y < float(info.min)  # both bounds are exact
    result = np.where(above | below | np.isnan(y), F64(0), y).astype(dtype)
    result = np.where(above, dtype.type(info.max), result)
    result = np.where(below, dtype.type(info.min), result)
    if of == "f64" or dtype.itemsize == 8:  # else NaN is 0
        result = np.where(np.isnan(y), dtype.type(info.min or info.max // 2 + 1), result)
    return result


# --- floats ---------------------------------------------------------------------------------------


def _between_floats() -> dict[str, functions.Function]:
    found = {}
    for to in FLOATS:
        for of in FLOATS:
            exact = to == of or to == "f64" or (to == "f32" and of != "f64")
            pattern = "cvt" + (f"{{{WHOLES}}}" if to == of else "" if exact else f"({MODES})")
            pattern += "{.ftz}" if "f32" in (to, of) else ""
            pattern += "{.sat}" if to != "bf16" else ""
            for form in functions.forms(pattern):
                modifiers = form.removeprefix("cvt")
                if modifiers or to != of:
                    call = _DIRECT.get((modifiers, to, of)) or functools.partial(
                        _float, of, to, modifiers.split(".")
                    )
                    found[f"{modifiers}.{to}.{of}"] = functions.of(to, of, call)
    return found


def _float(of: str, to: str, modifiers: list[str], x: np.ndarray) -> np.ndarray:
    """By way of float64."""
    if "ftz" in modifiers and of == "f32":
        x = rounding.flush(x)
    y, mode = rounding.TO_F64[of](x), "rn"
    for modifier in modifiers:
        if modifier in WHOLE:
            y = WHOLE[modifier](y)
        elif f".{modifier}" in MODES.split("|"):
            mode = modifier
    result = _rounded(y, to, mode)
    if "ftz" in modifiers and to == "f32":
        result = rounding.flush(result)
    return saturated(result) if "sat" in modifiers else result


_DIRECT: dict[tuple[str, str, str], Callable] = {  # not by way of float64: they are frequent
    **{("", "f32", of): call for of, call in rounding.TO_F32.items()},
    **{(".rn", to, "f32"): call for to, call in rounding.FROM_F32.items()},
}


def _of_f32() -> dict[str, functions.Function]:
    """With .relu and .satfinite, one number or a pair; and tf32."""
    found = {}
    for to in "f16", "bf16":
        for form in functions.forms("(.rn|.rz){.relu}{.satfinite}"):
            one = _DIRECT.get((form, to, "f32")) or functools.partial(_finite, to, form)
            pair = _two_bf16 if form == ".rn" and to == "bf16" else functools.partial(_two, one)
            found[f"{form}.{to}.f32"] = functions.of(to, "f32", one)
            found[f"{form}.{to}x2.f32"] = functions.of(f"{to}x2", "f32 f32", pair)
    for form in [*functions.forms("(.rn|.rz){.satfinite}{.relu}"), ".rna", ".rna.satfinite"]:
        found[f"{form}.tf32.f32"] = functions.of(
            "tf32", "f32", functools.partial(_tf32, form.split("."))
        )
    return found


def _finite(to: str, form: str, x: np.ndarray) -> np.ndarray:
    y = x.astype(F64)
    result = _rounded(relued(y) if "relu" in form else y, to, form[1:3])
    if "satfinite" not in form:
        return result
    number = rounding.bits(result)
    infinity = U16(0x7C00 if to == "f16" else 0x7F80)  # less 1 is the largest finite number
    number = np.where(number & U16(0x7FFF) == infinity, number - U16(1), number)
    return number.view(result.dtype)


def _two(one: Callable, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    upper, lower = (rounding.bits(one(x)).astype(U32) for x in (upper, lower))
    return upper << U32(16) | lower


def _two_bf16(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    upper, lower = map(rounding.round_to_upper_half, (upper, lower))
    return upper & U32(0xFFFF0000) | lower >> U32(16)


def _tf32(form: list[str], x: np.ndarray) -> np.ndarray:
    number = rounding.bits(relued(x) if "relu" in form else x)
    if "rna" in form:  # half of the last place: ties go outwards
        number = number + U32(0x1000)
    elif "rn" in form:  # ties go to even
        number = number + U32(0x0FFF) + (number >> U32(13) & U32(1))
    number = np.where(np.isnan(x), U32(0x7FFFFFFF), number & U32(0xFFFFE000))
    if "satfinite" in form:
        infinite = number & U32(0x7FFFFFFF) == U32(0x7F800000)
        number = np.where(infinite, number - U32(0x2000), number)
    return number


# --- 8 bits ---------------------------------------------------------------------------------------

# e5m2 is the upper half of a float16. e4m3 has one bit less of exponent, with a bias of 7, not 15.
LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}  # codes of the largest finite number


def _decode(kind: str, x: np.ndarray) -> np.ndarray:
    """Codes in uint16 to float16."""
    if kind == "e5m2":
        return rounding.canonical((x << U16(8)).view(F16))
    magnitude = ((x & U16(0x7F)) << U16(7)).view(F16) * F16(256)
    magnitude = np.where(magnitude > 448, rounding.CANONICAL[np.dtype(F16)], magnitude)
    return rounding.canonical(np.copysign(magnitude, np.where(x & U16(0x80), F16(-1), F16(1))))


MAGNITUDES = {
    kind: _decode(kind, np.arange(last + 1, dtype=U16)).astype(F64)
    for kind, last in LARGEST.items()
}


def _encode(kind: str, relu: bool, x: np.ndarray) -> np.ndarray:
    """Float64 to the nearest code; what is too large becomes the largest, NaN 0x7F."""
    x = relued(x) if relu else x
    magnitudes = MAGNITUDES[kind]
    halfway, size = (magnitudes[:-1] + magnitudes[1:]) / 2, np.abs(x)
    code = np.searchsorted(halfway, size, "left")
    code = np.where(code & 1, np.searchsorted(halfway, size, "right"), code)  # ties go to even
    code = np.where(np.signbit(x), code | 0x80, code)
    return np.where(np.isnan(x), 0x7F, code).astype(U16)


def _eight() -> dict[str, functions.Function]:
    found = {}
    for kind in LARGEST:
        to = f"{kind}x2"
        for relu in "", ".relu":
            widen, two, halves = (
                functools.partial(call, kind, bool(relu))
                for call in (_unpack, _encode_two, _encode_halves)
            )
            found[f".rn{relu}.f16x2.{to}"] = functions.of("f16x2", to, widen)
            found[f".rn.satfinite{relu}.{to}.f32"] = functions.of(to, "f32 f32", two)
            found[f".rn.satfinite{relu}.{to}.f16x2"] = functions.of(to, "f16x2", halves)
    return found


@functools.cache
def _table(kind: str, relu: bool) -> np.ndarray:
    """The bits of float16 of each code."""
    numbers = _decode(kind, np.arange(256, dtype=U16))
    return rounding.bits(relued(numbers) if relu else numbers).astype(U32)


def _unpack(kind: str, relu: bool, x: np.ndarray) -> np.ndarray:
    table = _table(kind, relu)
    return table[x >> U16(8)] << U32(16) | table[x & U16(0xFF)]


def _encode_two(kind: str, relu: bool, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    upper, lower = (_encode(kind, relu, x.astype(F64)) for x in (upper, lower))
    return upper << U16(8) | lower


def _encode_halves(kind: str, relu: bool, x: np.ndarray) -> np.ndarray:
    halves = functions.halves_of(x, np.dtype(F16))
    return _encode_two(kind, relu, halves[..., 1], halves[..., 0])


FUNCTIONS = _all()
