"""Which tile a call gets. A tile is a dict of a kernel's block sizes and launch options.

An ordinary call never tunes: it looks its tile up, so results are deterministic and the first call
is fast. The order is: a tile that `use_tile` forces, the winner of a sweep on this GPU
(tuned/<gpu>.json), the default of the kernel's file. The interpreter gets larger blocks.
"""

import contextlib
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from tilelab.kernels import _launch
from tilelab.kernels._checks import DTYPES, either, is_int, short_name

TUNED_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.int8)

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
        if _launch.on_gpu():
            tile = _nearest(op, dtype, sizes, kernels) or tile
        if "kernel" not in tile:
            tile = _fitted(_launch.INTERPRET, tuple(tile.items()), tuple(sizes.items())).copy()
    _launch.note_choice(op, dtype, sizes, tile, kernels)
    return tile


@functools.lru_cache(maxsize=4096)
def _fitted(interpret: bool, base: tuple, sizes: tuple) -> dict:
    """The tile `base` with its blocks fitted to the sizes; both are the items of a dict."""
    tile = dict(base)
    blocks = {f"BLOCK_{k}": max(16, triton.next_power_of_2(size)) for k, size in sizes}
    if interpret:
        return tile | _large_blocks(blocks)
    return tile | {name: min(tile[name], block) for name, block in blocks.items()}


def part_count(programs: int, steps: int) -> int:
    """Into how many parts to divide a sum of `steps` steps, for `programs` results.

    A GPU wants some 512 programs; they are a constant and not its number of SMs, so that the order
    of the sum is the same on every GPU. Each keeps at least 8 steps, to be worth its partial
    result. The interpreter runs one program after the other: it divides nothing.
    """
    return 1 if _launch.INTERPRET else max(1, min(512 // max(programs, 1), steps // 8))


def tma_tile(
    *, m: int, n: int, k: int, warps: int, stages: int, per_sm: int, kernel: str = "tma", **own: int
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


def into_parts(extent: int, block: int, parts: int) -> tuple[int, int]:
    """Divide `extent` into at most `parts` parts of whole blocks: one part's size, their number.

    Of nothing there is one part, so that somebody writes the zeros.
    """
    part_size = cdiv(cdiv(extent, block), parts) * block
    return part_size, max(1, cdiv(extent, max(part_size, 1)))


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
    return _nearest_tile(_tuned, device, op, short_name(dtype), tuple(sizes.items()), kernels)


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
    if entry.get("dtype") not in [short_name(dtype) for dtype in TUNED_DTYPES]:
        return f"must have dtype {either(TUNED_DTYPES)}, got {entry.get('dtype')!r}"
    sizes, tile = entry.get("sizes"), entry.get("tile")
    if not isinstance(sizes, dict) or not all(is_int(size) for size in sizes.values()):
        return f"must have sizes, each an int, got {sizes!r}"
    if not isinstance(tile, dict) or not all(isinstance(v, (int, str)) for v in tile.values()):
        return f"must have a tile, of ints, got {tile!r}"
    for k in sizes:
        if not is_int(tile.get(f"BLOCK_{k}")):
            return f"must have BLOCK_{k} in its tile, which its sizes name, got {tile!r}"
    return None
