"""Where a kernel runs, and its launch there: on the GPU, or in Triton's interpreter on the CPU.

The other files of this folder say what is computed. This file decides where kernels run, and
launches them. It computes no result itself, except that it rounds bfloat16 and float8 for the
interpreter. _tiles.py chooses the tile of a call, and _checks.py checks its arguments.

Where kernels run. `@triton.jit` reads the variable TRITON_INTERPRET when triton is first imported.
So this file sets it before that import:

    torch sees a GPU                 kernels are compiled for it
    torch sees none                  kernels are interpreted on the CPU; NumPy does the arithmetic
    TRITON_INTERPRET=1               kernels are interpreted on any machine (print works in them)
    TRITON_INTERPRET=0 and no GPU    kernels can only be compiled (`triton.compile`), not launched

Within `record` and `instead` nothing is launched there: somebody else gets the launches.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    """Return the numbers of a version: '3.7.1+git' -> (3, 7, 1)."""
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def refuse_broken_versions(triton_version: str, numpy_version: str, interpret: bool) -> None:
    """Raise ImportError if these versions are known not to work. It says what to install."""
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
    """What the choice of a kernel depends on. An SM is a processor of a GPU (see bias_relu.py).

    Attributes:
        capability: the kind of GPU: 90 for sm_90 (Hopper), 0 for AMD's.
        sms: the number of its SMs.
        modelled: True if FLOPs and bytes predict its time, as for a GPU. A lesson may then choose a
            kernel by them. They do not predict the time of the interpreter.
        name: its name in torch, whose tuned tiles a recorded call takes; "" if it takes none.
    """

    capability: int
    sms: int
    modelled: bool = True
    name: str = ""

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kinds of kernels that it can run.

        Every device runs "pointer" kernels. "tma" kernels load and store by the tensor memory
        accelerator, which NVIDIA's GPUs have since Hopper. In "tma_ws" kernels some warps only load
        (matmul_tma.py). They run on Hopper alone: compiled for sm_100, the same tiles spill.
        """
        if self.capability < 90:
            return ("pointer",)
        return ("pointer", "tma", "tma_ws") if self.capability == 90 else ("pointer", "tma")

    @property
    def target(self) -> str:
        """The target whose compiled tiles stand for it (_tile_facts.py); "" if none do."""
        return COMPILED.get(self.capability, "") if self.modelled else ""


# What was compiled for a kind of GPU, or for one with the same tensor cores and as much shared
# memory: sm_86 is like sm_89, and sm_103 like sm_100. MI300 stands for all of AMD's.
COMPILED = {
    80: "sm_80", 86: "sm_89", 87: "sm_80", 89: "sm_89", 90: "sm_90", 100: "sm_100", 103: "sm_100",
    0: "gfx942",
}  # fmt: skip


# The interpreter plays a Hopper GPU. It has two SMs, so a persistent kernel has several programs
# with several tiles each.
INTERPRETER = Device(90, sms=2, modelled=False)
# This device stands for a GPU when a call is recorded for none in particular. It has every dtype,
# and no TMA.
ANY_GPU = Device(89, sms=132)


def device_of(x: torch.Tensor) -> Device:
    """Return the device that a kernel with argument `x` runs on, or is chosen for."""
    if _pretended is not None:
        return _pretended
    return INTERPRETER if INTERPRET else _properties(x.get_device())


def gpu_name(x: torch.Tensor) -> str:
    """Return the name of the GPU whose tuned tiles a call with argument `x` takes; "" is none."""
    if _pretended is not None:
        return _pretended.name
    return "" if INTERPRET else _name(x.get_device())


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _properties(index: int) -> Device:
    gpu = torch.cuda.get_device_properties(index)
    capability = 0 if torch.version.hip else 10 * gpu.major + gpu.minor
    warn_of_missing_fences(triton.__version__, capability)
    return Device(capability, sms=gpu.multi_processor_count)


def warn_of_missing_fences(triton_version: str, capability: int) -> None:
    """Warn, once for each GPU, if this triton compiles products for Hopper without a fence.

    A product through pointers may then read shared memory before the copy into it can be seen
    (triton-lang/triton 9610). docs/verification.md tells how it was found.
    """
    if capability == 90 and _version(triton_version) < (3, 7):
        warnings.warn(
            f"triton {triton_version} leaves out a fence on Hopper, so products of operands that "
            "TMA cannot read may be wrong: pip install 'triton>=3.9'",
            RuntimeWarning,
            stacklevel=2,
        )


def tma_rows(x: torch.Tensor, item: int) -> tuple[torch.Tensor, bool, tuple, int] | None:
    """Return (x, transposed, shape, stride): the rows that TMA can read in x, or in x^T.

    `transposed` is True if they are the rows of x^T. `shape` and `stride` are those of the matrix
    with these rows; `stride` is the distance between rows, in elements of `item` bytes. The rows
    are contiguous, begin at multiples of 16 bytes and do not overlap. Return None if x has no such
    rows.
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
    """Return what a kernel needs to load or store blocks of a tensor by TMA.

    `shape` and `strides` (in elements) are the tensor's, with up to five dimensions. Its first
    element is that of `x`. The caller has checked that TMA can read it: the last stride is 1, and
    the other strides and the address are multiples of 16 bytes. TensorDescriptor's constructor is
    not called, because it would check this again, which takes a microsecond.
    """
    d = object.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape, d.padding = x, shape, strides, block, "zero"
    return d


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Return memory for descriptors that a kernel makes itself. Triton calls this at a launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Choice(NamedTuple):
    """A recorded call of `choose_tile`: its arguments, and the tile that it returned.

    `default` is the lesson's tile, not yet fitted to the sizes. `entry` is that of the tuned table,
    if the tile is from there.
    """

    op: str
    dtype: torch.dtype
    sizes: dict[str, int]
    tile: dict[str, Any]
    kernels: tuple[str, ...]
    default: dict[str, Any]
    entry: dict[str, Any] | None


class Launch(NamedTuple):
    """A recorded call of `launch`: its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    meta: dict[str, Any]


_recorded: list[Choice | Launch] | None = None  # the list of `record`
_execute: Callable[[Launch], None] | None = None  # who gets the launches, in place of a device
_pretended: Device | None = None  # the device that kernels are chosen for meanwhile


def on_gpu() -> bool:
    """Return whether a launch now would run on a GPU: it is not interpreted, and nobody gets it."""
    return not INTERPRET and _execute is None


def note_choice(*choice: Any) -> None:
    """Add a `Choice` with these fields to the record, if there is one."""
    if _recorded is not None:
        _recorded.append(Choice(*choice))


@contextlib.contextmanager
def instead(execute: Callable[[Launch], None], device: Device) -> Iterator[None]:
    """Within this context `execute` gets the launches, and kernels are chosen for `device`.

    Tiles are the forced ones (`use_tile`), or those that a call on `device` would take. The tensors
    are on the CPU.
    """
    global _execute, _pretended
    before = _execute, _pretended
    _execute, _pretended = execute, device
    try:
        yield
    finally:
        _execute, _pretended = before


@contextlib.contextmanager
def record(device: Device | None = None) -> Iterator[list[Choice | Launch]]:
    """Record launches instead of running them: within this context, list them in their order.

    The tensors of a recorded call may be uninitialised ones. So a call can be compiled, and its
    launches counted, without a GPU. The list also has the choices of tiles.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        with instead(_recorded.append, device or ANY_GPU):
            yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel[grid](*args, **meta)` on the device of the first argument.

    Do nothing if the grid is empty. If an argument is a list of tensors, the kernel gets a table of
    their addresses (int64): so one launch of an optimizer reaches all parameters.
    """
    if 0 in grid:
        return
    if _execute is not None:
        _execute(Launch(kernel, grid, args, meta))
        return
    if len(grid) > 1 and max(grid[1:]) > 65535:
        raise ValueError(f"too many blocks for one launch: {grid}, of 65535 in the last two places")
    if INTERPRET:
        tensors = tensors_of(args)
        if tensors[0].is_cuda and any(isinstance(arg, list) for arg in args):
            raise TypeError("tensors must be on the CPU to be interpreted by their addresses")
        # A GPU computes inf - inf or 1 / 0 without a warning, so NumPy must not warn either.
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
            triton.set_allocator(_scratch)  # for this thread: autograd's threads have none
        kernel[grid](*args, **meta)


_entered = threading.local()


def _enter_context(device: torch.device) -> None:
    """Make sure that the driver has a context in this thread. Encoding a descriptor needs one.

    A kernel's launch makes sure of it, too, but only after its descriptors are encoded. And in a
    thread of autograd, this launch may be the first call of the driver.
    """
    devices = _entered.__dict__.setdefault("devices", set())
    if device not in devices:
        torch.cuda.mem_get_info(device)  # any call of the CUDA runtime enters its context
        devices.add(device)


def tensors_of(args: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments of a launch, also those in lists and descriptors."""
    flat = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    flat = [t.base if isinstance(t, TensorDescriptor) else t for t in flat]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def _addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device
    return _address_table(tuple(t.data_ptr() for t in tensors), device, stream_of(device))


# Every training step has the same addresses, so the table is kept and copied to the GPU only once.
# Its copy and its readers must be ordered by one stream, so each stream has a table of its own.
@functools.lru_cache(maxsize=64)
def _address_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)


def stream_of(device: torch.device) -> int:
    """Return the stream that a launch on `device` would use now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


WITHOUT_NUMPY = (torch.bfloat16, torch.float8_e4m3fn)  # the interpreter computes wrongly with these


@contextlib.contextmanager
def _float32_twins(tensors: list[torch.Tensor]) -> Iterator[Any]:
    """Give the interpreter float32 copies of bfloat16 and float8 tensors, and round results back.

    NumPy has no bfloat16: the interpreter computes with the raw 16-bit integers, and its stores
    truncate. With float8_e4m3fn it is slow, and reads NaN as 480. A twin is a copy of a tensor's
    whole storage, so all views and strides in it stay valid. Elements that the kernel did not write
    keep their bits.
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
    # Copy back only what has changed: a conversion can change the bits of NaN.
    for flat, wide in storages.values():
        new = wide.view(torch.int32) != flat.float().view(torch.int32)
        flat.copy_(torch.where(new, wide.to(flat.dtype), flat))
