"""Floating-point arithmetic: add to fma, min and max, division, roots, and the transcendentals.

The PTX ISA calls some results approximate (.approx, .full). Here they are the nearest number, and a
GPU gives one near it. The ISA allows these errors, and so must a test that compares results:

    2 units in the last place    ex2, div.approx, div.full; 1 for rcp
    relative                     2^-23 sqrt, 2^-22.9 rsqrt, 2^-22 lg2 (absolute in (0.5, 2)),
                                 2^-11 tanh
    absolute                     2^-20.5 sin and cos in [-2 pi, 2 pi]

Numbers of 16 bits are computed in float32, and then rounded. That is as good as a single rounding,
because float32 has 2 p + 2 digits or more where they have p = 11 or 8 (Figueroa, When is double
rounding innocuous?, 1995). A product of bfloat16 may be too small for that many digits, but then it
is below 2^-134, and 0 in bfloat16. Only fma needs more: float64, rounded to odd (rounding.py).

Source: PTX ISA 9.1, sections 9.7.3 and 9.7.4.
"""

import functools
from collections.abc import Callable

import numpy as np

from tilelab.perf.machine import types
from tilelab.perf.machine.registers import functions, rounding
from tilelab.perf.machine.registers.rounding import F32

# --- one operation on arrays ----------------------------------------------------------------------


def _picked(pick: Callable, join: Callable) -> Callable:
    """Min or max: of -0 and +0, which compare as equal, -0 is the smaller one."""

    def call(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        zero = join(rounding.bits(a), rounding.bits(b)).view(a.dtype)  # or two equal numbers
        return rounding.canonical(np.where(a == b, zero, pick(a, b)))

    return call


def _div_approx(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of a and 1/b, and 1/b is zero for a b above 2^126."""
    return np.where(np.abs(b) > F32(2.0**126), a * np.copysign(F32(0), b), a / b)


def _in_f32(call: Callable, name: str) -> Callable:
    """Compute numbers of 16 bits in float32."""
    widen, nearest = rounding.TO_F32[name], rounding.FROM_F32[name]
    return lambda *operands: nearest(call(*map(widen, operands)))


def _in_f64(call: Callable, name: str, relu: bool) -> Callable:
    """Compute in float64, and round once to the format `name`."""
    widen, nearest = rounding.TO_F64[name], rounding.NEAREST[name]

    def run(*operands: np.ndarray) -> np.ndarray:
        result = call(*map(widen, operands))
        return nearest(relued(result) if relu else result)

    return run


def relued(x: np.ndarray) -> np.ndarray:
    """`.relu`: negative numbers become +0, NaN stays."""
    return np.where(x <= 0, x.dtype.type(0), x)


def saturated(x: np.ndarray) -> np.ndarray:
    """`.sat`: into [0, 1]; NaN becomes +0."""
    return np.fmin(np.where(x > 0, x, x.dtype.type(0)), x.dtype.type(1))


def _with_sat(call: Callable, *operands: np.ndarray) -> np.ndarray:
    return saturated(call(*operands))


def _with_ftz(call: Callable, *operands: np.ndarray) -> np.ndarray:
    return rounding.flush(call(*map(rounding.flush, operands)))


# --- the table ------------------------------------------------------------------------------------

_MAX, _MIN = _picked(np.fmax, np.bitwise_and), _picked(np.fmin, np.bitwise_or)
_MAX_NAN, _MIN_NAN = _picked(np.maximum, np.bitwise_and), _picked(np.minimum, np.bitwise_or)


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return x.dtype.type(1) / x


def _rsqrt(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(x)


TABLE = (  # opcode without its type, types, how many operands, what it does
    ("add{.rn}{.ftz}{.sat}", "f32 f16", 2, np.add),
    ("add{.rn}", "f64 bf16", 2, np.add),
    ("sub{.rn}{.ftz}{.sat}", "f32 f16", 2, np.subtract),
    ("sub{.rn}", "f64 bf16", 2, np.subtract),
    ("mul{.rn}{.ftz}{.sat}", "f32 f16", 2, np.multiply),
    ("mul{.rn}", "f64 bf16", 2, np.multiply),
    ("fma.rn{.ftz}{.sat}", "f32", 3, rounding.fma_f32),
    ("fma.rn", "f64", 3, rounding.fma_f64),
    ("max{.ftz}", "f32 f16", 2, _MAX),
    ("max", "f64 bf16", 2, _MAX),
    ("max{.ftz}.NaN", "f32 f16", 2, _MAX_NAN),
    ("max.NaN", "bf16", 2, _MAX_NAN),
    ("min{.ftz}", "f32 f16", 2, _MIN),
    ("min", "f64 bf16", 2, _MIN),
    ("min{.ftz}.NaN", "f32 f16", 2, _MIN_NAN),
    ("min.NaN", "bf16", 2, _MIN_NAN),
    ("abs{.ftz}", "f32 f16", 1, np.abs),
    ("abs", "f64 bf16", 1, np.abs),
    ("neg{.ftz}", "f32 f16", 1, np.negative),
    ("neg", "f64 bf16", 1, np.negative),
    ("copysign", "f32 f64", 2, lambda a, b: np.copysign(b, a)),
    ("div(.rn|.full){.ftz}", "f32", 2, np.divide),
    ("div.approx{.ftz}", "f32", 2, _div_approx),
    ("div.rn", "f64", 2, np.divide),
    ("rcp(.rn|.approx){.ftz}", "f32", 1, _reciprocal),
    ("rcp.rn", "f64", 1, _reciprocal),
    ("sqrt(.rn|.approx){.ftz}", "f32", 1, np.sqrt),
    ("sqrt.rn", "f64", 1, np.sqrt),
)
IN_F64 = (  # likewise, but computed in float64 for every type
    ("fma.rn{.ftz}{.sat|.relu}", "f16", 3, rounding.fma_to_odd),
    ("fma.rn{.relu}", "bf16", 3, rounding.fma_to_odd),
    ("rsqrt.approx{.ftz}", "f32", 1, _rsqrt),
    ("ex2.approx{.ftz}", "f32", 1, np.exp2),
    ("ex2.approx", "f16", 1, np.exp2),
    ("ex2.approx.ftz", "bf16", 1, np.exp2),
    ("lg2.approx{.ftz}", "f32", 1, np.log2),
    ("sin.approx{.ftz}", "f32", 1, np.sin),
    ("cos.approx{.ftz}", "f32", 1, np.cos),
    ("tanh.approx", "f32 f16 bf16", 1, np.tanh),
)


def _build(call: Callable, name: str, modifiers: list[str], wide: bool) -> Callable:
    if wide:
        call = _in_f64(call, name, "relu" in modifiers)
    elif name in rounding.TO_F32:
        call = _in_f32(call, name)
    if "sat" in modifiers:
        call = functools.partial(_with_sat, call)
    return functools.partial(_with_ftz, call) if "ftz" in modifiers else call


def _all() -> dict[str, functions.Function]:
    found = {}
    for table, wide in (TABLE, False), (IN_F64, True):
        for pattern, names, count, operation in table:
            for name in names.split():
                for form in functions.forms(pattern):
                    call = _build(operation, name, form.split("."), wide)
                    operands = " ".join([name] * count)
                    found[f"{form}.{name}"] = functions.of(name, operands, call)
                    if name in ("f16", "bf16"):
                        pair = functions.packed(call, types.of(name))
                        operands = " ".join([f"{name}x2"] * count)
                        found[f"{form}.{name}x2"] = functions.of(f"{name}x2", operands, pair)
    return found


FUNCTIONS = _all()
