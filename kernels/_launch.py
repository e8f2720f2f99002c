"""Where a kernel runs, and its launch there: on the GPU, or in Triton's interpreter on the CPU.

A kernel file says what its kernels compute. This file decides where they run (on the GPU, or in
Triton's interpreter where torch sees none) and launches them. Nothing here computes a result, but
for rounding bfloat16 in the interpreter. Beside it, _checks.py checks what the user passed, and
_tiles.py chooses the tile.

Where kernels run. `@triton.jit` reads the variable TRITON_INTERPRET when triton is first imported,
so it is set here, before that import:

    torch sees a GPU                 compiled for it
    torch sees none                  interpreted on the CPU, with NumPy doing the arithmetic
    TRITON_INTERPRET=1               interpreted, whatever the machine has (print works in a kernel)
    TRITON_INTERPRET=0 and no GPU    compile only (`triton.compile`, no launches)
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402  (the variable above has to be set first)
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

INTERPRET: bool = triton.knobs.runtime.interpret


def _version(text: str) -> tuple[int, ...]:
    """'3.7.1+git' -> (3, 7, 1)."""
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def refuse_broken_versions(triton_version: str, numpy_version: str, interpret: bool) -> None:
    """Raise ImportError, with what to install, for versions that are known not to work."""
    if _version(triton_version) < (3, 6):
        raise ImportError(
            f"tilelab needs triton >= 3.6, found {triton_version}: pip install -U triton"
        )
    if interpret and _version(triton_version) < (3, 7, 1) and _version(numpy_version) >= (2, 4):
        raise ImportError(
            f"triton {triton_version}'s interpreter fails on loops with NumPy {numpy_version}: "
            "pip install 'triton>=3.7.1', or keep this triton and pip install 'numpy<2.4'"
        )


refuse_broken_versions(triton.__version__, np.__version__, INTERPRET)
if INTERPRET and isinstance(tl.cdiv, triton.JITFunction):
    raise ImportError(
        "triton was imported before tilelab.kernels, and not in interpreter mode, but torch sees "
        "no GPU: import tilelab.kernels first, or set TRITON_INTERPRET=1 in the environment"
    )


class Device(NamedTuple):
    """What a choice of kernel depends on.

    Attributes:
        capability: which GPU it is: 90 for sm_90, 0 for AMD's.
        sms: how many SMs it has.
        modelled: whether it takes the time that counting its FLOPs and bytes says, as a GPU does;
            so a lesson may choose by a count. The interpreter's time is that of its operations.
    """

    capability: int
    sms: int
    modelled: bool = True

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kinds that it can run.

        Every device runs "pointer" kernels. "tma" ones load and store through the tensor memory
        accelerator, which NVIDIA's GPUs have since Hopper; "tma_ws" ones are warp-specialised,
        which Triton does well on Hopper alone: for sm_100 the same tiles spill.
        """
        if self.capability < 90:
            return ("pointer",)
        return ("pointer", "tma", "tma_ws") if self.capability == 90 else ("pointer", "tma")


INTERPRETER = Device(
    90, sms=2, modelled=False
)  # two, so that a persistent kernel has programs and turns
ANY_GPU = Device(89, sms=132)  # recorded for none in particular: every dtype, and no TMA


def device_of(x: torch.Tensor) -> Device:
    """The device that a kernel given `x` runs on, or the one that is recorded for."""
    if _recorded is not None:
        return _pretended or ANY_GPU
    return INTERPRETER if INTERPRET else _properties(x.get_device())


@functools.cache
def _properties(index: int) -> Device:
    gpu = torch.cuda.get_device_properties(index)
    capability = 0 if torch.version.hip else 10 * gpu.major + gpu.minor
    return Device(capability, sms=gpu.multi_processor_count)


def tma_rows(x: torch.Tensor, item: int) -> tuple[torch.Tensor, bool, tuple, int] | None:
    """`x` as rows that TMA can read: is it x^T that has them, its shape, its rows' stride.

    Rows are contiguous, begin at multiples of 16 bytes, and do not overlap. None if x has none.
    """
    stride, inner = x.stride()
    shape, transposed = x.shape, inner != 1
    if transposed:
        stride, inner, shape = inner, stride, shape[::-1]
    if inner != 1 or stride < shape[1] or stride * item % 16 or x.data_ptr() % 16:
        return None
    return x, transposed, shape, stride


def descriptor(
    x: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]
) -> TensorDescriptor:
    """What a kernel needs to load or store blocks of a tensor by TMA.

    `shape` and `strides` are the tensor's, of up to five dimensions, and `x` has its first element.
    The caller has seen to it that the unit can read it: the last stride is 1, and the others and
    the first element's address are multiples of 16 bytes. TensorDescriptor's constructor would look
    again, for a microsecond each time.
    """
    d = object.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape, d.padding = x, shape, strides, block, "zero"
    return d


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for descriptors that a kernel makes itself, which Triton asks for at its launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Choice(NamedTuple):
    """That `choose_tile` was asked for a tile, the answer, and the kernels that could be chosen."""

    op: str
    dtype: torch.dtype
    sizes: dict[str, int]
    tile: dict[str, Any]
    kernels: tuple[str, ...]


class Launch(NamedTuple):
    """What `launch` was asked to launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    meta: dict[str, Any]


_recorded: list[Choice | Launch] | None = None
_pretended: Device | None = None  # the device that a recorded call would run on


def on_gpu() -> bool:
    """Whether a launch would run on a GPU now: it is neither interpreted nor recorded."""
    return not INTERPRET and _recorded is None


def note_choice(*choice: Any) -> None:
    """List a `Choice` of these, where a call is recorded."""
    if _recorded is not None:
        _recorded.append(Choice(*choice))


@contextlib.contextmanager
def record(device: Device | None = None) -> Iterator[list[Choice | Launch]]:
    """Within this context nothing is launched: what would have been is listed, in order.

    So a call can be compiled and counted with no GPU, and its tensors may be empty ones on the CPU.
    Tiles are the forced ones or the defaults for `device`: nothing is looked up.
    """
    global _recorded, _pretended
    before = _recorded, _pretended
    _recorded, _pretended = [], device
    try:
        yield _recorded
    finally:
        _recorded, _pretended = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, on the device of the tensors; nothing where the grid is empty.

    The first of `args` says which device. A list of tensors among them is passed as the table of
    their addresses (int64), which is how one launch of an optimizer reaches all parameters.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    if len(grid) > 1 and max(grid[1:]) > 65535:
        raise ValueError(f"too many blocks for one launch: {grid}, of 65535 in the last two places")
    if INTERPRET:
        tensors = tensors_of(args)
        if tensors[0].is_cuda and any(isinstance(arg, list) for arg in args):
            raise TypeError("tensors must be on the CPU to be interpreted by their addresses")
        # NumPy would warn of an inf - inf or a 1 / 0 that the GPU computes in silence.
        with _float32_twins(tensors) as twin, np.errstate(all="ignore"):
            args = tuple(
                _addresses([twin(t) for t in arg]) if isinstance(arg, list) else twin(arg)
                for arg in args
            )
            kernel[grid](*args, **meta)
        return
    first = args[0]
    first = first[0] if isinstance(first, list) else getattr(first, "base", first)
    args = [_addresses(arg) if isinstance(arg, list) else arg for arg in args]
    with torch.cuda.device(first.device):
        if any(isinstance(arg, TensorDescriptor) for arg in args):
            _enter_context(first.device)
        if meta.get("WARP_SPECIALIZE"):
            triton.set_allocator(_scratch)  # of this thread: autograd's has none otherwise
        kernel[grid](*args, **meta)


_entered = threading.local()


def _enter_context(device: torch.device) -> None:
    """See to it that the driver has a context in this thread: a descriptor is encoded in it.

    A kernel's launch sees to it itself, but its descriptors come before, and a thread of autograd
    may have done nothing else yet.
    """
    devices = _entered.__dict__.setdefault("devices", set())
    if device not in devices:
        torch.cuda.mem_get_info(device)  # a call of the runtime, which enters its context
        devices.add(device)


def tensors_of(args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of a launch, in lists and in descriptors too."""
    flat = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    flat = [t.base if isinstance(t, TensorDescriptor) else t for t in flat]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def _addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device
    return _address_table(tuple(t.data_ptr() for t in tensors), device, stream_of(device))


# Training comes back with the same addresses: no copy to the GPU. A table belongs to the stream
# that its copy and all its readers are ordered by.
@functools.lru_cache(maxsize=64)
def _address_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)


def stream_of(device: torch.device) -> int:
    """The stream that a launch on `device` would go to now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


WITHOUT_NUMPY = (torch.bfloat16, torch.float8_e4m3fn)  # dtypes that the interpreter gets wrong


@contextlib.contextmanager
def _float32_twins(tensors: list[torch.Tensor]) -> Iterator[Any]:
    """Lend the interpreter float32 twins of bfloat16 and float8 tensors, and round results back.

    NumPy has no bfloat16: the interpreter computes with the raw 16-bit integers and its stores
    truncate. Of float8_e4m3fn it takes NaN for 480, and is slow. A twin mirrors the whole storage,
    so views, strides and whatever lies around them are as they were, and what the kernel did not
    write comes back bit for bit.
    """
    storages = {}
    for t in tensors:
        key = t.untyped_storage().data_ptr(), t.dtype
        if t.dtype in WITHOUT_NUMPY and key not in storages:
            flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
            storages[key] = flat, flat.float()

    def twin(t: Any) -> Any:
        if isinstance(t, TensorDescriptor):
            return descriptor(twin(t.base), t.shape, t.strides, t.block_shape)
        if not isinstance(t, torch.Tensor) or t.dtype not in WITHOUT_NUMPY:
            return t
        storage = storages[t.untyped_storage().data_ptr(), t.dtype][1]
        return storage.as_strided(t.shape, t.stride(), t.storage_offset())

    yield twin
    for flat, wide in storages.values():  # conversion changes the bits of NaN: only what is new
        new = wide.view(torch.int32) != flat.float().view(torch.int32)
        flat.copy_(torch.where(new, wide.to(flat.dtype), flat))
