"""What a kernel file should not have to think about: the only place that knows GPU from CPU.

A kernel file says what its kernels compute. This file decides where they run (on the GPU, or in
Triton's interpreter where torch sees none), checks what the user passed, chooses the tile, and
launches. Nothing here computes a result, but for rounding bfloat16 in the interpreter.

Where kernels run. `@triton.jit` reads the variable TRITON_INTERPRET when triton is first imported,
so it is set here, before that import:

    torch sees a GPU                 compiled for it
    torch sees none                  interpreted on the CPU, with NumPy doing the arithmetic
    TRITON_INTERPRET=1               interpreted, whatever the machine has (print works in a kernel)
    TRITON_INTERPRET=0 and no GPU    compile only (`triton.compile`, no launches)
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import threading
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
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TUNED_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.int8)


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
        "triton was imported before tilelab.kernels, and not in interpreter mode, but torch sees no GPU: "
        "import tilelab.kernels first, or set TRITON_INTERPRET=1 in the environment"
    )


# -------------------------------------------------------------------------------------------------
# Checks. They raise before anything is launched: TypeError for a dtype or a device, ValueError
# for a shape or a value, each naming the argument and showing what was received.
# -------------------------------------------------------------------------------------------------


def check_tensors(
    optional: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **tensors: torch.Tensor | None,
) -> None:
    """All are tensors of one dtype of `dtypes`, on one device that the kernels can run on.

    Those named in `optional` may be None.
    """
    first_name, first = next(iter(tensors.items()))
    dtype = device = None  # the first's, once it has passed
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype is dtype and x.device == device and x.layout is torch.strided:
            continue  # as the first
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {_either(dtypes)}, got {_short(x.dtype)}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got {x.layout}")
        if x.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name} ({_short(first.dtype)}), "
                f"got {_short(x.dtype)}"
            )
        check_device(name, x, first_name, first)
        dtype, device = first.dtype, first.device


def check_device(name: str, x: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """`x` is where `first` is, and that is a place where kernels can run."""
    if x.device != first.device:
        raise TypeError(f"{name} must be on {first.device} like {first_name}, got {x.device}")
    if x.device.type not in ("cuda", "meta") and not INTERPRET and _recorded is None:
        raise TypeError(
            f"{name} is on {x.device}, but the kernels are compiled for the GPU: move it there, "
            "or set TRITON_INTERPRET=1 before python starts to run them on the CPU"
        )


def check_shape(name: str, x: torch.Tensor, shape: str, **expected: int | None) -> None:
    """`check_shape("bias", bias, "[N]", N=128)`: the rank, and the sizes that are not None."""
    sizes = x.shape
    if len(sizes) == len(expected):
        for want, got in zip(expected.values(), sizes, strict=False):
            if want != got and want is not None:
                break
        else:
            return
    known = ", ".join(f"{k}={v}" for k, v in expected.items() if v is not None)
    raise ValueError(
        f"{name} must have shape {shape}{' with ' + known if known else ''}, got {list(sizes)}"
    )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """An int, or a pair of ints (height, width), as a pair; each at least `minimum`."""
    if type(value) is int and value >= minimum:  # most calls
        return value, value
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    ok = isinstance(value, (tuple, list)) and len(value) == 2
    if not (ok and _is_int(value[0]) and _is_int(value[1])):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    first, second = value
    if first < minimum or second < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return first, second


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _either(dtypes: Sequence[torch.dtype]) -> str:
    """'float32, float16 or bfloat16'."""
    *names, last = map(_short, dtypes)
    return f"{', '.join(names)} or {last}" if names else last


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under `torch.autocast`, the tensors in its dtype (what it does for torch's own matmul)."""
    first = tensors[0]
    if not isinstance(first, torch.Tensor) or not _autocast_is_on(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    floats = [isinstance(x, torch.Tensor) and x.dtype in DTYPES for x in tensors]
    return tuple(x.to(dtype) if f else x for x, f in zip(tensors, floats, strict=True))


def reduction_dtype(x: torch.Tensor) -> torch.dtype:
    """The result's dtype for softmax and losses: x's, but float32 under `torch.autocast`.

    torch casts x for that. A kernel that computes in float32 anyway reads x as it is.
    """
    return torch.float32 if _autocast_is_on(x) else x.dtype


def _autocast_is_on(x: torch.Tensor) -> bool:
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else None  # where kernels run
    return device is not None and torch.is_autocast_enabled(device)


def dot_precision(dtype: torch.dtype, switch: Any) -> str:
    """How `tl.dot` treats float32: "tf32" where torch's own switch allows it, else "ieee".

    `switch` is `torch.backends.cuda.matmul` or `torch.backends.cudnn.conv`; the older `allow_tf32`
    flags set the same state.
    """
    tf32 = dtype == torch.float32 and switch.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


# -------------------------------------------------------------------------------------------------
# Tiles. A tile is a dict of a kernel's block sizes and launch options. An ordinary call never
# tunes: it looks its tile up, so results are deterministic and the first call is fast.
# -------------------------------------------------------------------------------------------------

_forced: dict[str, dict] = {}

# The interpreter spends 10-50 us on every operation of every program, whatever the tile's size, and
# 15 ns an element on a load: few, large tiles. They pay until a load of 2^18 elements falls out of
# the CPU's cache; the product of two such loads may be larger, up to Triton's limit for one tensor.
INTERPRETER_LOAD = 2**18
INTERPRETER_TENSOR = 2**20


@contextlib.contextmanager
def use_tile(op: str, tile: dict) -> Iterator[None]:
    """Within this context `op` runs with `tile` as it is: for tests of a tile, and for sweeps."""
    before = _forced.get(op)
    _forced[op] = tile
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


def choose_tile(
    op: str,
    dtype: torch.dtype,
    default: dict[int, dict],
    kernels: tuple[str, ...] = ("pointer",),
    **sizes: int,
) -> dict:
    """The tile for one call: forced, the interpreter's, tuned for this GPU, or the file's default.

    Where an operator has several kernels, a tile says by its "kernel" which one it is for, and so
    the choice of a tile is the choice of a kernel.

    Args:
        op: the operator's name, as in the tuned tables.
        dtype: of the operands.
        default: the file's default tile by bytes per element.
        kernels: those that can do this call. A tile that names none is for the "pointer" kernel.
        sizes: the extent of each blocked dimension, `M=` for BLOCK_M; the longest one first. No
            block becomes larger than the power of two that covers its dimension, nor smaller than
            16, which is the least a tensor core takes. Tiles of other kernels stay as they are.

    Raises:
        ValueError: a tile is forced whose kernel cannot do this call.
    """
    if op in _forced:
        tile = _forced[op]
        if tile.get("kernel", "pointer") not in kernels:
            raise ValueError(f"the {tile['kernel']} kernel of {op} cannot take these operands")
    else:
        tile = default[dtype.itemsize]
        if not INTERPRET and _recorded is None:
            tile = _nearest(op, dtype, sizes, kernels) or tile
        if "kernel" not in tile:
            tile = _fitted(INTERPRET, tuple(tile.items()), tuple(sizes.items())).copy()
    if _recorded is not None:
        _recorded.append(Choice(op, dtype, sizes, tile, kernels))
    return tile


@functools.lru_cache(maxsize=4096)
def _fitted(interpret: bool, base: tuple, sizes: tuple) -> dict:
    """The tile `base` with its blocks fitted to the sizes; both are the items of a dict."""
    tile = dict(base)
    blocks = {f"BLOCK_{k}": max(16, triton.next_power_of_2(size)) for k, size in sizes}
    if interpret:
        return tile | _large_blocks(blocks)
    return tile | {name: min(tile[name], block) for name, block in blocks.items()}


def splits(programs: int, steps: int) -> int:
    """Among how many programs to divide a reduction of `steps` steps, for `programs` results.

    A GPU wants some 512 programs; they are a constant and not its number of SMs, so that the order
    of the sum is the same on every GPU. Each keeps at least 8 steps, to be worth its partial
    result. The interpreter runs one program after the other: it splits nothing.
    """
    return 1 if INTERPRET else max(1, min(512 // max(programs, 1), steps // 8))


def tma_tile(
    m: int, n: int, k: int, warps: int, stages: int, *, per_sm: int, kernel: str = "tma", **own: int
) -> dict[str, Any]:
    """A tile of a kernel for TMA: BLOCK_M, BLOCK_N and BLOCK_K, `per_sm` programs on each SM.

    `own` is what only some kernels have. Of `per_sm`, see `persistent`.
    """
    return dict(
        kernel=kernel, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **own,
        PROGRAMS_PER_SM=per_sm, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def persistent(tile: dict, work: int, sms: int) -> int:
    """How many programs go through `work` tiles: PROGRAMS_PER_SM on each SM; of 0, one a tile."""
    per_sm = tile["PROGRAMS_PER_SM"]
    return min(work, per_sm * sms) if per_sm else work


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up; `triton.cdiv` spends 2 us on the same, since kernels may call it too."""
    return -(-a // b)


def into_chunks(extent: int, block: int, parts: int) -> tuple[int, int]:
    """Divide `extent` into at most `parts` chunks of whole blocks: one chunk's size, their number.

    Of nothing there is one chunk, so that somebody writes the zeros.
    """
    chunk = cdiv(cdiv(extent, block), parts) * block
    return chunk, max(1, cdiv(extent, max(chunk, 1)))


def _large_blocks(blocks: dict[str, int]) -> dict[str, int]:
    """For the interpreter: the first dimension takes the elements that the others leave."""
    first, *others = blocks
    for name in others:
        blocks[name] = min(blocks[name], 1024)
    if "BLOCK_K" not in others:  # each other block is loaded beside the first
        loads, product = max((blocks[name] for name in others), default=1), 1
    else:  # loads of [first, BLOCK_K] and [BLOCK_K, BLOCK_N], a product of [first, BLOCK_N]
        product = blocks["BLOCK_N"]
        widest = max(min(blocks[first], 1024), product)
        loads = blocks["BLOCK_K"] = min(blocks["BLOCK_K"], INTERPRETER_LOAD // widest)
    most = min(INTERPRETER_LOAD // loads, INTERPRETER_TENSOR // product)
    blocks[first] = min(blocks[first], max(16, most))
    return blocks


def _nearest(
    op: str, dtype: torch.dtype, sizes: dict[str, int], kernels: tuple[str, ...]
) -> dict | None:
    """The tuned tile of the nearest shape, if this GPU has been tuned for `op`."""
    device = torch.cuda.current_device()
    return _nearest_tile(_tuned, device, op, _short(dtype), tuple(sizes.items()), kernels)


@functools.lru_cache(maxsize=4096)  # to compare a shape with 200 others takes 0.2 ms
def _nearest_tile(
    tuned: Callable[[int], dict],
    device: int,
    op: str,
    dtype: str,
    sizes: tuple,
    kernels: tuple[str, ...],
) -> dict | None:
    """The nearest in octaves over all dimensions; of equally near ones the first."""
    names = dict(sizes).keys()  # a table of an older kernel may name others
    entries = [
        e
        for e in tuned(device).get((op, dtype), [])
        if e["sizes"].keys() == names and e["tile"].get("kernel", "pointer") in kernels
    ]

    def octaves(entry: dict) -> float:
        shape = entry["sizes"]
        return sum(abs(math.log2(max(size, 1) / max(shape[k], 1))) for k, size in sizes)

    return min(entries, key=octaves)["tile"] if entries else None


@functools.cache
def _tuned(device: int) -> dict[tuple[str, str], list[dict]]:
    """The table of winners for this GPU, by op and dtype; empty where nobody has tuned it yet."""
    return read_tuned(tuned_path(torch.cuda.get_device_name(device)))


def forget_tuned() -> None:
    """Forget the tuned tables, so that the next call reads their files again."""
    _tuned.cache_clear()
    _nearest_tile.cache_clear()


def tuned_path(gpu: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Where the table of a GPU is, from its name as torch gives it: `NVIDIA H200` -> nvidia-h200.

    `folder` is kernels/tuned unless it is given. What no file name should have becomes a dash.
    """
    name = re.sub(r"[^a-z0-9._-]", "-", gpu.strip().lower()).strip(".-")
    if not name:
        raise ValueError(f"gpu must be the name of a device, got {gpu!r}")
    return (folder or pathlib.Path(__file__).parent / "tuned") / f"{name}.json"


def read_tuned(path: pathlib.Path) -> dict[tuple[str, str], list[dict]]:
    """Read `{"tiles": [{"op", "dtype", "sizes": {...}, "tile": {...}}, ...]}`, by op and dtype.

    Raises:
        ValueError: what is wrong in the file, in one line. A file that is missing has no entries.
    """
    table: dict[tuple[str, str], list[dict]] = {}
    if not path.exists():
        return table
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    tiles = content.get("tiles") if isinstance(content, dict) else None
    if not isinstance(tiles, list):
        raise ValueError(f'{path} must hold {{"tiles": [...]}}')
    for i, entry in enumerate(tiles):
        if problem := _entry_problem(entry):
            raise ValueError(f"{path}: entry {i} of tiles {problem}")
        table.setdefault((entry["op"], entry["dtype"]), []).append(entry)
    return table


def _entry_problem(entry: Any) -> str | None:
    """What is wrong with an entry of a tuned table, if anything is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("op"), str):
        return "must have an op"
    if entry.get("dtype") not in [_short(dtype) for dtype in TUNED_DTYPES]:
        return f"must have dtype {_either(TUNED_DTYPES)}, got {entry.get('dtype')!r}"
    sizes, tile = entry.get("sizes"), entry.get("tile")
    if not isinstance(sizes, dict) or not all(_is_int(size) for size in sizes.values()):
        return f"must have sizes, each an int, got {sizes!r}"
    if not isinstance(tile, dict) or not all(isinstance(v, (int, str)) for v in tile.values()):
        return f"must have a tile, of ints, got {tile!r}"
    for k in sizes:
        if not _is_int(tile.get(f"BLOCK_{k}")):
            return f"must have BLOCK_{k} in its tile, which its sizes name, got {tile!r}"
    return None


# -------------------------------------------------------------------------------------------------
# Launch.
# -------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """What a choice of kernel depends on.

    Attributes:
        capability: which GPU it is: 90 for sm_90, 0 for AMD's.
        sms: how many SMs it has.
    """

    capability: int
    sms: int

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


INTERPRETER = Device(90, sms=2)  # so that a persistent kernel has programs and turns
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
    """`x` as rows that TMA can read: is it x^T that has them, its shape, and from row to row.

    Rows are contiguous, begin at multiples of 16 bytes, and do not overlap. None if x has none.
    """
    step, inner = x.stride()
    shape, transposed = x.shape, inner != 1
    if transposed:
        step, inner, shape = inner, step, shape[::-1]
    if inner != 1 or step < shape[1] or step * item % 16 or x.data_ptr() % 16:
        return None
    return x, transposed, shape, step


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
