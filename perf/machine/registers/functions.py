"""An instruction that computes registers from registers: a function of NumPy arrays.

The tables of arithmetic.py, floats.py and conversions.py are written as the PTX ISA writes an
instruction: `add{.rn}{.ftz}` stands for four opcodes, with and without each modifier.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tilelab.perf.machine import types

SIGNED, UNSIGNED, BITS = "s16 s32 s64", "u16 u32 u64", "b16 b32 b64"
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "u16x2": "u16", "s16x2": "s16"}  # and what is in them


class Function(NamedTuple):
    """What an opcode computes.

    Attributes:
        results: the dtypes of the destinations, in order.
        operands: the dtypes of the sources, in order.
        call: takes arrays or NumPy scalars of these dtypes, returns an array, or one for each
            result. It has no effect but its result, which may be its operand itself (mov). It
            computes every lane, so NaN or a division by zero in a lane must not matter: the caller
            silences NumPy's warnings.
    """

    results: tuple[np.dtype, ...]
    operands: tuple[np.dtype, ...]
    call: Callable


def of(results: str, operands: str, call: Callable) -> Function:
    """Build a Function from PTX types: `of("pred", "s32 s32", np.less)`."""
    results, operands = (tuple(map(types.of, names.split())) for names in (results, operands))
    return Function(results, operands, call)


def uniform(table: tuple[tuple[str, str, int, Callable], ...]) -> dict[str, Function]:
    """From rows (opcode without its type, types, how many operands, what it does)."""
    return {
        f"{name}.{kind}": of(kind, " ".join([kind] * count), call)
        for name, kinds, count, call in table
        for kind in kinds.split()
    }


def forms(pattern: str) -> Iterator[str]:
    """Every opcode of a pattern: {.x|.y} may be left out, (.x|.y) may not.

    >>> list(forms("min{.NaN}(.f32|.f64)"))
    ['min.f32', 'min.f64', 'min.NaN.f32', 'min.NaN.f64']
    """
    choices = []
    for text in re.findall(r"\{[^}]*\}|\([^)]*\)|[^{(]+", pattern):
        optional = [""] if text[0] == "{" else []
        choices.append(optional + text.strip("{}()").split("|"))
    return map("".join, itertools.product(*choices))


def packed(call: Callable, half: np.dtype) -> Callable:
    """Do to each half of 32-bit registers what `call` does to one number."""

    def both(*operands: np.ndarray) -> np.ndarray:
        halves = call(*(halves_of(x, half) for x in operands))  # [n, 2]
        return halves.view(np.uint32)[..., 0]

    return both


def halves_of(x: np.ndarray, half: np.dtype) -> np.ndarray:
    """The lower and the upper half of each register, [n, 2]; [2] of a scalar."""
    return np.asarray(x)[..., None].view(half)
