"""PTX arithmetic for one thread, in Python's integers and fractions.

`expected("add.rn.f32", a, b)` takes the bits of the registers as integers and returns the bits of
the result. Nothing here is computed by NumPy, and every float is a fraction until it is rounded. So
this is slow, and what the machine computes must agree with it.

Source: PTX ISA 9.1, section 9.7.
"""

import math
import operator
from fractions import Fraction

from tests.tools.ptx_formats import FORMATS, PAIRS, decode, encode, flush, is_nan, width

APPROXIMATE = {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt"}  # by math, so right but for a last bit
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}

# --- floats ---------------------------------------------------------------------------------------


def _exactly(operation, *numbers):
    """A fraction, if the operands are finite and the result is not 0; else as floats have it."""
    if all(map(math.isfinite, numbers)):
        exact = operation(*map(Fraction, numbers))
        if exact != 0:
            return exact
    return operation(*numbers)


def _fma(a, b, c):
    if math.isfinite(a) and math.isfinite(b) and math.isinf(c):
        return c
    return _exactly(lambda a, b, c: a * b + c, a, b, c)


def _div(a, b):
    if b == 0:
        sign = math.copysign(1, a) * math.copysign(1, b)
        return math.nan if a == 0 or math.isnan(a) else sign * math.inf
    return _exactly(operator.truediv, a, b)


def _sqrt(x):
    if x == 0 or math.isnan(x) or x == math.inf:
        return x
    if x < 0:
        return math.nan
    numerator, denominator = x.as_integer_ratio()  # the latter is a power of 2
    scaled = numerator * denominator << 400
    root = math.isqrt(scaled)
    return (root + Fraction(root * root != scaled, 2)) / (denominator << 200)


def _largest(a, b, nan, sign):
    """max; min for a sign of -1."""
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan or (math.isnan(a) and math.isnan(b)) else b if math.isnan(a) else a
    return max((a, b), key=lambda x: (sign * x, sign * math.copysign(1, x)))


def _transcendental(name, x):
    if math.isnan(x):
        return math.nan
    if name == "ex2":
        return (
            0.0 if x < -2000 else math.inf if x > 2000 else math.exp2(x) if x < 1024 else math.inf
        )
    if name in ("lg2", "rsqrt"):
        if x == 0:
            return -math.inf if name == "lg2" else math.copysign(math.inf, x)
        if x < 0:
            return math.nan
        if x == math.inf:
            return x if name == "lg2" else 0.0
        return math.log2(x) if name == "lg2" else 1 / math.sqrt(x)
    if name in ("sin", "cos") and math.isinf(x):
        return math.nan
    return getattr(math, name)(x)


def _float(name, modifiers, a, b=None, c=None):
    if name in ("add", "sub", "mul"):
        operation = getattr(operator, name)
        return _exactly(operation, a, b)
    if name == "fma":
        return _fma(a, b, c)
    if name == "rcp":
        return _div(1.0, a)
    if name == "div":
        if "approx" in modifiers and 2.0**126 < abs(b) < math.inf:
            return a * math.copysign(0.0, b)
        return _div(a, b)
    if name in ("min", "max"):
        return _largest(a, b, "NaN" in modifiers, 1 if name == "max" else -1)
    if name == "sqrt":
        return _sqrt(a)
    return _transcendental(name, a)


def _float_bits(name, modifiers, kind, *bits):
    if "ftz" in modifiers:
        bits = [flush(x, kind) for x in bits]
    sign = 1 << (width(kind) - 1)
    if name == "neg":
        result = bits[0] ^ sign
    elif name == "abs":
        result = bits[0] & ~sign
    elif name == "copysign":
        result = (bits[1] & ~sign) | (bits[0] & sign)
    else:
        x = _float(name, modifiers, *(decode(x, kind) for x in bits))
        result = encode(0.0 if "relu" in modifiers and x <= 0 else x, kind)
    if "ftz" in modifiers:
        result = flush(result, kind)
    return saturate(result, kind) if "sat" in modifiers else result


def saturate(bits, kind):
    x = decode(bits, kind)
    return encode(0.0 if not x > 0 else min(x, 1.0), kind)


# --- integers -------------------------------------------------------------------------------------


def signed(x, bits):
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def number(bits, kind):
    """The number in a register of an integer type."""
    return signed(bits, width(kind)) if kind[0] == "s" else bits


def clamp(x, kind):
    bits = width(kind)
    low, high = (
        (-1 << (bits - 1), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    )
    return max(low, min(x, high))


def _product(modifiers, bits, a, b, c=0):
    product = a * b >> (bits if "hi" in modifiers else 0)
    return product + c


def _quotient(a, b):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _integer(name, modifiers, kind, *registers):
    bits = width(kind)
    a, *rest = (number(x, kind) for x in registers)
    b = rest[0] if rest else None
    if name in ("add", "sub"):
        result = a + b if name == "add" else a - b
        return clamp(result, kind) if "sat" in modifiers else result
    if name == "mul":
        return _product(modifiers, bits, a, b)
    if name == "mad":
        c = registers[2]
        return _product(modifiers, bits, a, b, c)
    if name == "div":
        return _quotient(a, b)
    if name == "rem":
        return a - _quotient(a, b) * b if b else -1
    if name in ("min", "max"):
        return min(a, b) if name == "min" else max(a, b)
    return {"abs": abs, "neg": operator.neg}[name](a)


def _bit(x, i):
    return x >> i & 1


def _of_bits(name, modifiers, kind, a, b=0, c=0, d=0):
    """Opcodes of single bits, most after the ISA's own pseudo-code."""
    bits = width(kind)
    if name in ("and", "or", "xor"):
        return {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[name](a, b)
    if name == "not":
        return ~a
    if name == "shl":
        return a << min(b, bits)
    if name == "shr":
        return number(a, kind) >> min(b, bits)
    if name == "brev":
        return int(f"{a:0{bits}b}"[::-1], 2)
    if name == "popc":
        return f"{a:b}".count("1")
    if name == "clz":
        return bits - a.bit_length()
    if name == "bfind":
        return (~number(a, kind) if number(a, kind) < 0 else a).bit_length() - 1
    if name == "bfe":
        start, length, msb = b & 0xFF, c & 0xFF, bits - 1
        sign = 0 if kind[0] == "u" or length == 0 else _bit(a, min(start + length - 1, msb))
        inside = [
            _bit(a, start + i) if i < length and start + i <= msb else sign for i in range(bits)
        ]
        return sum(bit << i for i, bit in enumerate(inside))
    if name == "bfi":
        start, length = c & 0xFF, d & 0xFF
        for i in range(length):
            if start + i < bits:
                b = b & ~(1 << (start + i)) | _bit(a, i) << (start + i)
        return b
    if name == "shf":
        n, both = c & 31 if "wrap" in modifiers else min(c, 32), b << 32 | a
        return both << n >> 32 if "l" in modifiers else both >> n
    if name == "lop3":
        return sum(_bit(d, 4 * _bit(a, i) + 2 * _bit(b, i) + _bit(c, i)) << i for i in range(bits))
    assert name == "prmt"
    source, result = (b << 32 | a).to_bytes(8, "little"), []
    for i in range(4):
        digit = c >> 4 * i & 0xF
        byte = source[digit & 7]
        result.append(byte if digit < 8 else 255 * (byte >> 7))
    return int.from_bytes(bytes(result), "little")


def _compare(modifiers, kind, a, b, c=0):
    name = modifiers[0]
    if kind in FORMATS:
        if "ftz" in modifiers:
            a, b = flush(a, kind), flush(b, kind)
        a, b = decode(a, kind), decode(b, kind)
        nan = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            result = nan == (name == "nan")
        elif nan:
            result = name not in COMPARISONS  # equ, neu, ...
        else:
            result = getattr(operator, name if name in COMPARISONS else name.removesuffix("u"))(
                a, b
            )
    else:
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
        result = getattr(operator, name)(number(a, kind), number(b, kind))
    combination = next((x for x in modifiers if x in ("and", "or", "xor")), None)
    if combination:
        result = _of_bits(combination, [], "pred", result, c)
    return int(result)


# --- conversions ----------------------------------------------------------------------------------


WHOLE = {  # Python rounds ties to even, too
    "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip


def _to_integer(modifiers, to, of, x):
    if "ftz" in modifiers:
        x = flush(x, of)
    x = decode(x, of)
    if math.isnan(x):
        return 1 << (width(to) - 1) if of == "f64" or width(to) == 64 else 0
    if math.isinf(x):
        return clamp((1 << 70) * (1 if x > 0 else -1), to)
    (mode,) = (m for m in modifiers if m in WHOLE)
    return clamp(WHOLE[mode](Fraction(x)), to)


def _to_float(modifiers, to, of, x):
    if of in FORMATS:
        x = decode(flush(x, of) if "ftz" in modifiers and of == "f32" else x, of)
        if math.isfinite(x) and x != 0:
            x = Fraction(x)
    else:
        x = Fraction(number(x, of))
    for modifier in modifiers:
        if modifier in WHOLE and isinstance(x, Fraction):
            x = WHOLE[modifier](x) or math.copysign(0.0, x)
    if "relu" in modifiers and x <= 0:
        x = 0.0
    mode = next((m for m in modifiers if m in ("rn", "rna", "rz", "rm", "rp")), "rn")
    result = encode(x, to, mode)
    if "ftz" in modifiers and to == "f32":
        result = flush(result, to)
    if "satfinite" in modifiers and not is_nan(result, to) and math.isinf(decode(result, to)):
        result -= 1 << (13 if to == "tf32" else 0)
    return saturate(result, to) if "sat" in modifiers else result


def _to_eight(modifiers, kind, of, x):
    x = decode(x, of)
    if math.isnan(x):
        return 0x7F
    if "relu" in modifiers and x <= 0:
        return 0
    largest = 448.0 if kind == "e4m3" else 57344.0
    if abs(x) > largest:
        return encode(math.copysign(largest, x), kind)
    return encode(Fraction(x) if x else x, kind)


def _convert(modifiers, *registers):
    *modifiers, to, of = modifiers
    if of in ("e4m3x2", "e5m2x2"):
        codes = registers[0] & 0xFF, registers[0] >> 8
        low, high = (encode(decode(x, of[:4]), "f16") for x in codes)
        if "relu" in modifiers:
            low, high = (0 if decode(x, "f16") <= 0 else x for x in (low, high))
        return high << 16 | low
    if to in ("e4m3x2", "e5m2x2"):
        pair = registers if of == "f32" else (registers[0] >> 16, registers[0] & 0xFFFF)
        high, low = (_to_eight(modifiers, to[:4], of.removesuffix("x2"), x) for x in pair)
        return high << 8 | low
    if to in PAIRS:
        high, low = (_to_float(modifiers, PAIRS[to], of, x) for x in registers)
        return high << 16 | low
    if to in FORMATS:
        return _to_float(modifiers, to, of, *registers)
    if of in FORMATS:
        return _to_integer(modifiers, to, of, *registers)
    x = number(registers[0], of)
    return clamp(x, to) if "sat" in modifiers else x


# --- all ------------------------------------------------------------------------------------------

_BITS = {
    "and", "or", "xor", "not", "shl", "shr", "brev", "popc", "clz", "bfind", "bfe", "bfi", "shf",
    "lop3", "prmt",
}  # fmt: skip


def expected(op, *registers):
    """The bits of the result of an opcode; a tuple if it has two."""
    name, *modifiers = op.split(".")
    kind = modifiers[-1]
    if name == "cvt":
        return _convert(modifiers, *registers) & ((1 << width(modifiers[-2])) - 1)
    if kind in PAIRS:
        return _halves(op, kind, *registers)
    if name == "setp":
        return _compare(modifiers, kind, *registers)
    if name in ("mov", "cvta"):
        return registers[0]
    if name in ("selp", "slct"):
        a, b, which = registers
        if name == "slct":
            which = decode(which, "f32") >= 0 if kind == "f32" else signed(which, 32) >= 0
        return a if which else b
    if name in _BITS:
        result = _of_bits(name, modifiers, kind, *registers)
    elif kind in FORMATS:
        result = _float_bits(name, modifiers, kind, *registers)
    else:
        result = _integer(name, modifiers, kind, *registers)
    bits = 32 if name in ("popc", "clz", "bfind") else width(kind) * (1 + ("wide" in modifiers))
    return result & ((1 << bits) - 1)


def _halves(op, kind, *registers):
    one = op.removesuffix(kind) + PAIRS[kind]
    if op.startswith("setp"):
        a, b, *c = registers
        return tuple(expected(one, a >> s & 0xFFFF, b >> s & 0xFFFF, *c) for s in (0, 16))
    low, high = (expected(one, *(x >> s & 0xFFFF for x in registers)) for s in (0, 16))
    return high << 16 | low
