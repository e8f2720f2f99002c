"""PTX's types as NumPy's. What NumPy lacks (bfloat16, float8, packed pairs) is kept as bits."""

import functools

import numpy as np

from tilelab.perf.machine.errors import UnknownInstruction

_FLOATS = {"f16": "f2", "f32": "f4", "f64": "f8"}
_PACKED = {
    "b16x2": "u4", "f16x2": "u4", "bf16x2": "u4", "u16x2": "u4", "s16x2": "u4", "bf16": "u2",
    "tf32": "u4", "e4m3x2": "u2", "e5m2x2": "u2", "e4m3x4": "u4", "e5m2x4": "u4", "b128": "V16",
}  # fmt: skip


@functools.cache
def of(name: str) -> np.dtype:
    """The NumPy dtype that holds a PTX type: "s32" -> int32, "bf16" -> uint16.

    Raises:
        UnknownInstruction: no such type.
    """
    if name == "pred":
        return np.dtype(bool)
    if kind := _FLOATS.get(name) or _PACKED.get(name):
        return np.dtype(kind)
    if name[:1] in ("b", "u", "s") and name[1:] in ("8", "16", "32", "64"):
        return np.dtype(f"{'i' if name[0] == 's' else 'u'}{int(name[1:]) // 8}")
    raise UnknownInstruction(f"PTX type .{name} is not known")
