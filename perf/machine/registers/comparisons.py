"""Comparisons (setp), and what selects or moves a value without changing it.

    setp.lt.s32         p, a, b        p = a < b
    setp.lt.and.s32     p, a, b, c     p = (a < b) and c
    setp.le.f16x2       p|q, a, b      p for the lower halves, q for the upper ones
    selp.b32            d, a, b, p     d = a if p else b

Source: PTX ISA 9.1, sections 9.7.6, 9.7.7 and 9.7.9.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from tilelab.perf.machine import types
from tilelab.perf.machine.registers import functions, rounding
from tilelab.perf.machine.registers.functions import BITS, SIGNED, UNSIGNED, Function

ALL = f"{SIGNED} {UNSIGNED} {BITS} f32 f64"
INTEGER_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
SAME = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # for unsigned numbers
FLOAT_COMPARISONS = INTEGER_COMPARISONS | {  # those with a u are true for NaN, the others false
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
COMBINATIONS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _comparisons() -> dict[str, Function]:
    found = {}
    for name, ftz, kind, call in _single():
        results = "pred"
        if kind.endswith("x2"):
            results, half = "pred pred", types.of(functions.PAIRS[kind])
            call = functools.partial(_compare_halves, half, call)
        found[f"setp.{name}{ftz}.{kind}"] = functions.of(results, f"{kind} {kind}", call)
        for combination, join in COMBINATIONS.items():
            both = functools.partial(_combined, join, call)
            function = functions.of(results, f"{kind} {kind} pred", both)
            found[f"setp.{name}.{combination}{ftz}.{kind}"] = function
    return found


def _single() -> Iterator[tuple[str, str, str, Callable]]:
    """Comparison, ".ftz" or "", type, and what it does to single numbers."""
    for name, call in INTEGER_COMPARISONS.items():
        for kind in f"{SIGNED} {UNSIGNED} {BITS if name in ('eq', 'ne') else ''}".split():
            yield name, "", kind, call
    for name, other in SAME.items():
        for kind in UNSIGNED.split():
            yield name, "", kind, INTEGER_COMPARISONS[other]
    for name, call in FLOAT_COMPARISONS.items():
        for kind in "f32", "f64", "f16", "f16x2":
            yield name, "", kind, call
            if kind != "f64":
                yield name, ".ftz", kind, functools.partial(_of, rounding.flush, call)
        for kind in "bf16", "bf16x2":
            yield name, "", kind, functools.partial(_of, rounding.bf16_to_f32, call)


def _of(change: Callable, call: Callable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return call(change(a), change(b))


def _compare_halves(half: np.dtype, call: Callable, a: np.ndarray, b: np.ndarray) -> tuple:
    """The lower halves' result first."""
    result = call(functions.halves_of(a, half), functions.halves_of(b, half))
    return result[..., 0], result[..., 1]


def _combined(
    join: Callable, compare: Callable, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> np.ndarray | tuple:
    result = compare(a, b)
    return tuple(join(x, c) for x in result) if isinstance(result, tuple) else join(result, c)


def _moves() -> dict[str, Function]:
    found = functions.uniform((
        ("mov", ALL, 1, np.positive),
        ("mov", "pred", 1, _unchanged),
        ("cvta.global", "u64", 1, _unchanged),  # a global address is its own generic address
        ("cvta.to.global", "u64", 1, _unchanged),
        ("cvta.param", "u64", 1, _unchanged),
    ))  # fmt: skip
    for kind in ALL.split():
        found[f"selp.{kind}"] = functions.of(kind, f"{kind} {kind} pred", _select)
        for by in "s32", "f32":
            found[f"slct.{kind}.{by}"] = functions.of(kind, f"{kind} {kind} {by}", _by_sign)
    return found


def _unchanged(x: np.ndarray) -> np.ndarray:
    return x


def _select(a: np.ndarray, b: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.where(which, a, b)


def _by_sign(a: np.ndarray, b: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.where(sign >= 0, a, b)


FUNCTIONS = _comparisons() | _moves()
