"""What an opcode that only computes registers does; here those of integers and bits.

`function("add.s32")` says which types the operands have, and gives a function of NumPy arrays that
does it for all threads at once. The others are in comparisons.py (with what selects and moves),
floats.py and conversions.py.

NumPy's own ufunc is the function wherever it agrees with PTX: both wrap integers around, and both
shift everything out if the distance is the width or more.

Source: PTX ISA 9.1, sections 9.7.1, 9.7.8 and 9.7.9.7.
"""

import functools
from collections.abc import Callable

import numpy as np

from tilelab.perf.machine import types
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.registers import comparisons, conversions, floats, functions
from tilelab.perf.machine.registers.functions import BITS, SIGNED, UNSIGNED, Function

U32, U64 = np.uint32, np.uint64
DIGITS = np.arange(0, 16, 4, U32)  # where each begins in a number of four hexadecimal ones


def function(op: str) -> Function:
    """What an opcode computes.

    Args:
        op: with all of its modifiers and types, "mul.wide.s32".

    Raises:
        UnknownInstruction: the machine has no such opcode, or not with these modifiers.
    """
    if op not in FUNCTIONS:
        raise UnknownInstruction(f"{op} is not an instruction that the machine knows")
    return FUNCTIONS[op]


def _all() -> dict[str, Function]:
    return (
        _integers() | _multiplications() | _bits() | comparisons.FUNCTIONS | floats.FUNCTIONS
        | conversions.FUNCTIONS
    )  # fmt: skip


# --- integers -------------------------------------------------------------------------------------


def _integers() -> dict[str, Function]:
    both = f"{SIGNED} {UNSIGNED}"
    found = functions.uniform((
        ("add", both, 2, np.add),
        ("sub", both, 2, np.subtract),
        ("add.sat", "s32", 2, functools.partial(_saturated, np.add)),
        ("sub.sat", "s32", 2, functools.partial(_saturated, np.subtract)),
        ("min", both, 2, np.minimum),
        ("max", both, 2, np.maximum),
        ("abs", SIGNED, 1, np.abs),
        ("neg", SIGNED, 1, np.negative),
        ("div", SIGNED, 2, _quotient),
        ("rem", SIGNED, 2, _remainder),
        ("div", UNSIGNED, 2, _unsigned_quotient),
        ("rem", UNSIGNED, 2, _remainder),
    ))  # fmt: skip
    for name, call in ("add", np.add), ("min", np.minimum), ("max", np.maximum):
        for kind in "s16", "u16":
            pair = functions.packed(call, types.of(kind))
            found[f"{name}.{kind}x2"] = functions.of(f"{kind}x2", f"{kind}x2 {kind}x2", pair)
    return found


def _saturated(call: Callable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    info = np.iinfo(a.dtype)
    return np.clip(call(a, b, dtype=np.int64), info.min, info.max).astype(a.dtype)


# The ISA leaves a division by zero open. On sm_90 ptxas makes all bits of the result 1 (of 32 bits,
# for the quotient and for the remainder); so does this.


def _unsigned_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, ~a.dtype.type(0), a // b)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero; NumPy's // rounds down, so the remainder goes first."""
    return np.where(b == 0, ~a.dtype.type(0), (a - np.fmod(a, b)) // b)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the sign of the dividend."""
    return np.where(b == 0, ~a.dtype.type(0), np.fmod(a, b))


def _multiplications() -> dict[str, Function]:
    """The lower or the upper half of a product, or (.wide) all of it; mad adds a third operand."""
    found = {}
    for kind in f"{SIGNED} {UNSIGNED}".split():
        bits = int(kind[1:])
        wide = f"{kind[0]}{2 * bits}"
        products = {"lo": (kind, np.multiply)}
        if bits < 64:
            dtype = types.of(wide)
            products["wide"] = wide, functools.partial(np.multiply, dtype=dtype)
            products["hi"] = kind, functools.partial(_upper, dtype, types.of(kind))
        else:
            products["hi"] = kind, _upper_64
        for mode, (result, call) in products.items():
            found[f"mul.{mode}.{kind}"] = functions.of(result, f"{kind} {kind}", call)
            found[f"mad.{mode}.{kind}"] = functions.of(
                result, f"{kind} {kind} {result}", functools.partial(_added, call)
            )
    return found


def _added(product: Callable, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return product(a, b) + c


def _upper(wide: np.dtype, narrow: np.dtype, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.multiply(a, b, dtype=wide) >> wide.type(8 * narrow.itemsize)).astype(narrow)


def _upper_64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By halves of 32 bits, as on paper: no sum below exceeds 64 bits."""
    half, low = a.dtype.type(32), a.dtype.type(0xFFFF_FFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half  # upper halves have the sign
    carry = (a0.view(U64) * b0.view(U64) >> U64(32)).view(a.dtype)
    middle = a1 * b0 + carry
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half)


# --- bits -----------------------------------------------------------------------------------------


def _bits() -> dict[str, Function]:
    found = functions.uniform((
        ("and", f"{BITS} pred", 2, np.bitwise_and),
        ("or", f"{BITS} pred", 2, np.bitwise_or),
        ("xor", f"{BITS} pred", 2, np.bitwise_xor),
        ("not", f"{BITS} pred", 1, np.invert),
        ("brev", "b32 b64", 1, _reverse),
    ))  # fmt: skip
    for name, kinds, call in (
        ("shl", BITS, np.left_shift),
        ("shr", f"{SIGNED} {UNSIGNED} {BITS}", np.right_shift),
    ):
        for kind in kinds.split():
            narrow = kind.endswith("16")
            # For NumPy a distance of another sign would make the result int64. A distance of 2^31
            # or more is then negative: NumPy shifts everything out, too.
            distance = "s32" if kind == "s32" else "u32"
            shift = functools.partial(_shift_16, call) if narrow else call
            found[f"{name}.{kind}"] = functions.of(kind, f"{kind} {distance}", shift)
    for kind in "u32", "u64", "s32", "s64":
        found[f"bfe.{kind}"] = functions.of(kind, f"{kind} u32 u32", _extract)
        found[f"bfind.{kind}"] = functions.of("u32", kind, _last_bit)
    for kind in "b32", "b64":
        found[f"bfi.{kind}"] = functions.of(kind, f"{kind} {kind} u32 u32", _insert)
        found[f"popc.{kind}"] = functions.of("u32", kind, _population)
        found[f"clz.{kind}"] = functions.of("u32", kind, _leading_zeros)
    for side in "l", "r":
        for mode in "wrap", "clamp":
            call = functools.partial(_funnel, side, mode)
            found[f"shf.{side}.{mode}.b32"] = functions.of("b32", "b32 b32 u32", call)
    found["lop3.b32"] = functions.of("b32", "b32 b32 b32 u32", _look_up)
    found["prmt.b32"] = functions.of("b32", "b32 b32 b32", _permute)
    return found


def _shift_16(shift: Callable, a: np.ndarray, distance: np.ndarray) -> np.ndarray:
    return shift(a, np.minimum(distance, U32(16)).astype(a.dtype))


def _extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: bits start to start + length - 1; signed ones are extended by the last of them."""
    start, length = start & U32(0xFF), length & U32(0xFF)
    one, width = a.dtype.type(1), U32(8 * a.itemsize)
    if a.dtype.kind == "u":
        return (a >> start.astype(a.dtype)) & ((one << length.astype(a.dtype)) - one)
    end = np.minimum(start + length, width)
    field = (a << (width - end).astype(a.dtype)) >> (width - end + start).astype(a.dtype)
    return np.where(length == 0, a.dtype.type(0), field)


def _insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the lowest bits of a go into b."""
    start, length = ((x & U32(0xFF)).astype(a.dtype) for x in (start, length))
    one = a.dtype.type(1)
    mask = ((one << length) - one) << start
    return (b & ~mask) | (a << start & mask)


def _bit_length(x: np.ndarray) -> np.ndarray:
    """How many bits an unsigned number needs, 0 to 64. The exponent of a float64 says it."""
    if x.itemsize == 8:
        upper = _bit_length((x >> U64(32)).astype(U32))
        return np.where(upper, upper + U32(32), _bit_length(x.astype(U32)))
    return np.frexp(x.astype(np.float64))[1].astype(U32)


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    return U32(8 * x.itemsize) - _bit_length(x)


def _last_bit(x: np.ndarray) -> np.ndarray:
    """bfind: the place of the highest bit that is not the sign, 2^32 - 1 if there is none."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x).view(U64 if x.itemsize == 8 else U32)
    return _bit_length(x) - U32(1)


def _population(x: np.ndarray) -> np.ndarray:
    return np.bitwise_count(x).astype(U32)


def _reverse(x: np.ndarray) -> np.ndarray:
    """brev: swap halves, then the halves of these, down to single bits."""
    width = 8 * x.itemsize
    step, ones = width // 2, (1 << width) - 1
    while step:
        distance = x.dtype.type(step)
        low = x.dtype.type(ones // ((1 << step) + 1))  # 0x0000FFFF, 0x00FF00FF, ...
        x, step = (x >> distance & low) | ((x & low) << distance), step // 2
    return x


def _funnel(
    side: str, mode: str, low: np.ndarray, high: np.ndarray, distance: np.ndarray
) -> np.ndarray:
    """shf: shift a number of 64 bits; its upper half for a shift left, the lower for one right."""
    n = distance & U32(31) if mode == "wrap" else np.minimum(distance, U32(32))
    if side == "l":
        return high << n | low >> U32(32) - n
    return high << U32(32) - n | low >> n


def _look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: bit 4 a + 2 b + c of the table is the result for each combination of three bits."""
    result = (a ^ a) & b & c
    for i in range(8):
        if int(table) >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = result | term
    return result


def _permute(a: np.ndarray, b: np.ndarray, selection: np.ndarray) -> np.ndarray:
    """prmt: each digit of 4 bits selects a byte of {b, a}; its highest bit asks for the sign."""
    pair = (np.left_shift(b, U64(32)) | a)[..., None].view(np.uint8)  # [n, 8]
    digits = np.asarray(selection)[..., None] >> DIGITS  # [4], or [n, 4]
    places = digits & U32(7)
    if digits.ndim == 1:
        chosen = np.take(pair, places, axis=-1)
    else:
        pair = np.broadcast_to(pair, (len(digits), 8))
        chosen = np.take_along_axis(pair, places.astype(np.int64), axis=-1)
    signs = digits & U32(8) != 0
    if np.count_nonzero(signs):
        chosen = np.where(signs, (chosen.view(np.int8) >> 7).view(np.uint8), chosen)
    return chosen.view(U32)[..., 0]


FUNCTIONS = _all()
