"""How the arguments of a launch reach a kernel: tensors get addresses, and parameters get values.

On a GPU, tensors lie in global memory and a kernel is told where. Here each storage (what a tensor
is a view of) is copied into the machine's global memory, and back when the kernel is done. Storages
lie in the order of the arguments with gaps between them, so an access behind the end of one hits no
other, and a launch has the same addresses whenever it is repeated.

A parameter in PTX is a number, or 128 opaque bytes: a *tensor map*, which is what the TMA unit has
to know of a tensor (address, sizes, strides, the box that one copy moves, and how it is swizzled).
One argument of a kernel may be several parameters, or none:

    tensor              its address
    list of tensors     the address of a table of their addresses (kernels/_launch.py)
    TensorDescriptor    a tensor map, then the sizes (32 bits each) and the strides (64 bits each)
    int, float, bool    the number, in the width of Triton's type for it ("i32")
    tuple               the parameters of its items
    tl.constexpr        none, nor what Triton made a constant by itself: None, and the integer 1

Triton adds two addresses at the end: memory that the kernel asks for, to make tensor maps in, and
that of a profiler, which is null here.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tilelab.perf.errors import PerfError
from tilelab.perf.machine.copies.tensor_maps import TensorMap, tensor_map
from tilelab.perf.machine.memory import GlobalMemory

FLOATS = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "f32": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip


class Storage(NamedTuple):
    """Bytes of this process that a kernel may access.

    Attributes:
        begin: the address of the first of them here.
        end: the address behind the last.
        name: of the arguments whose they are.
    """

    begin: int
    end: int
    name: str

    @property
    def bytes(self) -> np.ndarray:
        """A view of them."""
        raw = (ctypes.c_uint8 * (self.end - self.begin)).from_address(self.begin)
        return np.frombuffer(raw, np.uint8)


class Arguments:
    """The arguments of one launch in the machine's global memory.

    Attributes:
        memory: the storages, tables of addresses, and what the kernel asks for.
        parameters: a value for each parameter of the PTX: bytes, or a TensorMap.
    """

    def __init__(self, signature: dict, given: dict, metadata: Any, programs: int) -> None:
        """Copy the tensors in.

        Args:
            signature: the arguments' types, as Triton's compiler has chosen them.
            given: the arguments by name.
            metadata: of the compiled kernel.
            programs: CTAs of the launch.

        Raises:
            PerfError: an argument is none that a kernel can take here.
        """
        flat = [
            item for name, kind in signature.items() for item in _flat(name, kind, given.get(name))
        ]
        storages = _storages([(name, t) for name, _, x in flat for t in _tensors(name, x)])
        tables = [8 * len(x) for _, _, x in flat if isinstance(x, list)]
        scratch = metadata.global_scratch_size * programs
        self.memory = GlobalMemory([s.end - s.begin for s in storages] + [*tables, scratch])
        # Triton has seen whether an address is a multiple of 16, and made use of it.
        self._homes = [
            (s, self.memory.place(s.bytes, s.name, modulo=s.begin % 16)) for s in storages
        ]
        maps = iter(getattr(metadata, "tensordesc_meta", None) or [])
        self.parameters: list[bytes | TensorMap] = []
        for name, kind, x in flat:
            self.parameters += self._parameters(name, kind, x, maps)
        made = np.zeros(scratch, np.uint8)
        address = self.memory.place(made, "memory for tensor maps") if scratch else 0
        self.parameters += [_bits(address, "i64"), _bits(0, "i64")]

    def copy_back(self) -> None:
        """Change the tensors to what the kernel has made of them."""
        for storage, address in self._homes:
            at = address - self.memory.base
            storage.bytes[:] = self.memory.bytes[at : at + storage.end - storage.begin]

    def _address(self, t: torch.Tensor) -> int:
        """Where a tensor begins; null for an empty one, as on a GPU."""
        host = t.data_ptr()
        for storage, address in self._homes:
            if storage.begin <= host <= storage.end:
                return address + host - storage.begin
        return 0

    def _parameters(
        self, name: str, kind: str, x: Any, maps: Iterator[dict]
    ) -> list[bytes | TensorMap]:
        if isinstance(x, TensorDescriptor):
            sizes = [_bits(n, "i32") for n in x.shape]
            strides = [_bits(n, "i64") for n in x.strides]
            box = next(maps, None)
            if box is not None:
                return [self._map(name, x, box), *sizes, *strides]
            # Without TMA the kernel computes addresses by itself, and gets its numbers twice.
            flags = [_bits(x.padding == "nan", "i1")]
            if hasattr(x, "round_f32_to_tf32"):  # triton 3.9
                flags += [_bits(x.round_f32_to_tf32, "i1")]
            own = [_bits(n, "i64") for n in x.shape]
            return [_bits(self._address(x.base), "i64"), *own, *strides, *flags, *sizes, *strides]
        if isinstance(x, list):
            table = np.array([self._address(t) for t in x], np.int64)
            return [_bits(self.memory.place(table.view(np.uint8), f"the table {name}"), "i64")]
        if isinstance(x, torch.Tensor):
            return [_bits(self._address(x), "i64")]
        return [_bits(x, kind)]

    def _map(self, name: str, x: TensorDescriptor, box: dict) -> TensorMap:
        other = x.padding == "nan" or getattr(x, "round_f32_to_tf32", False)
        if other or box.get("is_im2col") or box["fp4_padded"]:
            raise PerfError(
                f"{name}: a tensor map that pads with NaN, rounds to TF32, or is of fp4 or im2col "
                "is not supported"
            )
        try:
            return tensor_map(
                self._address(x.base), x.shape, x.strides, box["block_size"], box["elem_type"],
                box["swizzle"],
            )  # fmt: skip
        except ValueError as e:
            raise PerfError(f"{name}: {e}") from None


def _flat(name: str, kind: Any, x: Any) -> Iterator[tuple[str, str, Any]]:
    """The arguments with tuples taken apart, each with its name and type; constants left out."""
    if isinstance(kind, tuple):
        for i, (k, item) in enumerate(zip(kind, x, strict=True)):
            yield from _flat(f"{name}[{i}]", k, item)
    elif kind != "constexpr":
        if not isinstance(x, (torch.Tensor, TensorDescriptor)) and hasattr(x, "data_ptr"):
            x = x.base  # triton.reinterpret: a tensor as one of another type
        yield name, kind, x


def _tensors(name: str, x: Any) -> list[torch.Tensor]:
    """The tensors of one argument, checked."""
    found = x if isinstance(x, list) else [x.base if isinstance(x, TensorDescriptor) else x]
    found = [t for t in found if isinstance(t, torch.Tensor)]
    for t in found:
        if t.device.type != "cpu" or t.layout != torch.strided:
            what = f"on {t.device}" if t.device.type != "cpu" else f"of layout {t.layout}"
            raise PerfError(f"{name} is {what}: the machine takes dense tensors on the CPU")
    return found


def _storages(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Storage]:
    """What the tensors are views of, each once."""
    found: list[Storage] = []
    for name, t in tensors:
        begin = t.untyped_storage().data_ptr()
        new = Storage(begin, begin + t.untyped_storage().nbytes(), name)
        if new.begin == new.end:
            continue
        # Not only the same one may come again: two that are made of one NumPy array overlap.
        same = [s for s in found if s.begin < new.end and new.begin < s.end]
        found = [s for s in found if s not in same]
        names = " and ".join(dict.fromkeys([*(s.name for s in same), name]))
        begins, ends = [s.begin for s in [*same, new]], [s.end for s in [*same, new]]
        found.append(Storage(min(begins), max(ends), names))
    return found


def _bits(x: Any, kind: str) -> bytes:
    """A number as a parameter of a Triton type has it."""
    if kind in FLOATS:
        return torch.tensor([float(x)], dtype=FLOATS[kind]).view(torch.uint8).numpy().tobytes()
    size = 8 if kind.startswith("*") else max(8, int(kind.lstrip("iu"))) // 8
    return (int(x) % (1 << 8 * size)).to_bytes(size, "little")
