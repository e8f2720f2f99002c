"""Does an opcode of the machine on lists of registers' bits."""

import numpy as np

from tilelab.perf.machine.registers import arithmetic

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def registers(op, lists):
    """Registers with these bits, seen as an opcode sees them."""
    dtypes = arithmetic.function(op).operands
    found = [
        np.array(x, t if t.kind == "b" else UNSIGNED[t.itemsize]).view(t)
        for x, t in zip(lists, dtypes, strict=True)
    ]
    if op.startswith("lop3"):
        found[3] = found[3][0]  # the table is a number in the text
    return found


def call(op, *lists):
    """The bits of the results, in a list; of two results in pairs."""
    function = arithmetic.function(op)
    with np.errstate(all="ignore"):
        results = function.call(*registers(op, lists))
    results = results if isinstance(results, tuple) else (results,)
    for result, dtype in zip(results, function.results, strict=True):
        assert result.dtype == dtype, (op, result.dtype)
    found = [(x if x.dtype.kind == "b" else x.view(UNSIGNED[x.itemsize])).tolist() for x in results]
    return found[0] if len(found) == 1 else list(zip(*found, strict=True))


def one(op, *bits):
    """The same for one thread."""
    return call(op, *([x] for x in bits))[0]
