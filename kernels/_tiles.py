"""Which tile a call gets. A tile is a dict of a kernel's block sizes and launch options.

An ordinary call never tunes: it does not try several tiles. It looks its tile up, so the first call
is fast, and the same call always has the same tile. It takes the first of these that there is:

    1. the tile that `use_tile` forces
    2. the tile that a sweep on this GPU has found to be fastest (tuned/<gpu>.json)
    3. of a product's tiles, the one that a model predicts to be fastest (_tile_facts.py)
    4. the default tile of the kernel's file

In the interpreter there are no tuned tiles, and blocks are larger.
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

# The interpreter spends 10 to 50 us on each operation of each program, for any size of the tile. A
# load takes another 15 ns per element. So few, large tiles are fastest, as long as a load fits into
# the CPU's cache. The product of two loads may be larger, up to Triton's limit for a tensor.
INTERPRETER_LOAD = 2**18  # elements
INTERPRETER_TENSOR = 2**20  # elements


@contextlib.contextmanager
def use_tile(op: str, tile: dict) -> Iterator[None]:
    """Make `op` run with exactly this tile within this context, as tests and sweeps do."""
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
    x: torch.Tensor,
    default: dict[int, dict],
    kernels: tuple[str, ...] = ("pointer",),
    **sizes: int,
) -> dict:
    """Return the tile for one call, in the order that the top of this file gives.

    An operator can have several kernels. The "kernel" of a tile names the one that it is for, so
    the choice of a tile is also the choice of a kernel.

    Args:
        op: the operator's name in the tuned tables.
        x: an operand: the tile is for its dtype, and for the GPU that it is on.
        default: the file's default tiles, by bytes per element.
        kernels: the kernels that can do this call. A tile without "kernel" is for "pointer".
        sizes: the size of each dimension that has a block, for example `M=` for BLOCK_M; the
            longest one comes first. A "pointer" tile is fitted to them: no block is larger than the
            power of two that covers its dimension, unless that is below 16, the least that a tensor
            core takes. Tiles of other kernels are not changed.

    Raises:
        ValueError: the kernel of the forced tile cannot do this call.
    """
    base, entry = default[x.dtype.itemsize], None
    if op in _forced:
        tile = _forced[op]
        if tile.get("kernel", "pointer") not in kernels:
            raise ValueError(f"the {tile['kernel']} kernel of {op} cannot take these operands")
    else:
        if gpu := _launch.gpu_name(x):
            entry = _nearest(_tuned, gpu, op, short_name(x.dtype), tuple(sizes.items()), kernels)
        tile = entry["tile"] if entry else base
        if "kernel" not in tile:
            tile = _fitted(_launch.INTERPRET, tuple(tile.items()), tuple(sizes.items())).copy()
    _launch.note_choice(op, x.dtype, sizes, tile, kernels, base, entry)
    return tile


@functools.lru_cache(maxsize=4096)
def _fitted(interpret: bool, base: tuple, sizes: tuple) -> dict:
    """Return the tile `base` with its blocks fitted to `sizes`. Both are the items of a dict."""
    tile = dict(base)
    blocks = {f"BLOCK_{k}": max(16, triton.next_power_of_2(size)) for k, size in sizes}
    if interpret:
        return tile | _large_blocks(blocks)
    return tile | {name: min(tile[name], block) for name, block in blocks.items()}


def part_count(programs: int, steps: int) -> int:
    """Return into how many parts to divide a sum of `steps` steps.

    `programs` is the number of programs without parts. The aim is 512 programs. This is a constant,
    not the number of SMs, so the order of the sum is the same on every GPU. Each part has at least
    8 steps, or it is not worth its partial result. The interpreter runs one program after the
    other, so it has one part.
    """
    return 1 if _launch.INTERPRET else max(1, min(512 // max(programs, 1), steps // 8))


def tma_tile(
    *, m: int, n: int, k: int, warps: int, stages: int, per_sm: int, kernel: str = "tma", **own: int
) -> dict[str, Any]:
    """Return a tile of a TMA kernel: m, n and k are BLOCK_M, BLOCK_N and BLOCK_K.

    `per_sm` is the number of programs on each SM (see `persistent`). `own` are entries that only
    some kernels have.
    """
    return dict(
        kernel=kernel, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **own,
        PROGRAMS_PER_SM=per_sm, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def persistent(tile: dict, work: int, sms: int) -> int:
    """Return how many programs share `work` tiles. If PROGRAMS_PER_SM is 0, each tile has one."""
    per_sm = tile["PROGRAMS_PER_SM"]
    return min(work, per_sm * sms) if per_sm else work


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv` takes 2 us, because kernels can call it, too."""
    return -(-a // b)


def into_parts(extent: int, block: int, parts: int) -> tuple[int, int]:
    """Divide `extent` into at most `parts` parts of whole blocks. Return their size and number.

    If `extent` is 0, there is one part, because a program must write the zeros.
    """
    part_size = cdiv(cdiv(extent, block), parts) * block
    return part_size, max(1, cdiv(extent, max(part_size, 1)))


def _large_blocks(blocks: dict[str, int]) -> dict[str, int]:
    """Return the interpreter's blocks: the first one is as large as the others leave room for."""
    first, *others = blocks
    for name in others:
        blocks[name] = min(blocks[name], 1024)
    if "BLOCK_K" not in others:  # loads are [first, one of the others]
        loads, product = max((blocks[name] for name in others), default=1), 1
    else:  # loads are [first, BLOCK_K] and [BLOCK_K, BLOCK_N], and the product [first, BLOCK_N]
        product = blocks["BLOCK_N"]
        widest = max(min(blocks[first], 1024), product)
        loads = blocks["BLOCK_K"] = min(blocks["BLOCK_K"], INTERPRETER_LOAD // widest)
    most = min(INTERPRETER_LOAD // loads, INTERPRETER_TENSOR // product)
    blocks[first] = min(blocks[first], max(16, most))
    return blocks


@functools.lru_cache(maxsize=4096)  # a comparison with 200 shapes takes 0.2 ms
def _nearest(
    tuned: Callable[[str], dict],
    gpu: str,
    op: str,
    dtype: str,
    sizes: tuple,
    kernels: tuple[str, ...],
) -> dict | None:
    """Return the entry of the nearest shape, or None if this GPU is not tuned for `op`.

    If several are equally near, the first one is taken.
    """
    names = dict(sizes).keys()  # the table may be older, and name other sizes
    entries = [
        e
        for e in tuned(gpu).get((op, dtype), [])
        if e["sizes"].keys() == names and e["tile"].get("kernel", "pointer") in kernels
    ]
    return min(entries, key=lambda e: octaves(dict(sizes), e["sizes"]), default=None)


def octaves(sizes: dict[str, int], others: dict[str, int]) -> float:
    """Return the distance of two shapes: an octave is a factor of two in one dimension."""
    return sum(abs(math.log2(max(size, 1) / max(others[k], 1))) for k, size in sizes.items())


@functools.cache
def _tuned(gpu: str) -> dict[tuple[str, str], list[dict]]:
    """Return the tuned table of this GPU, by op and dtype. It is empty if the GPU is not tuned."""
    return read_tuned(tuned_path(gpu))


def forget_tuned() -> None:
    """Forget the tuned tables. The next call reads their files again."""
    _tuned.cache_clear()
    _nearest.cache_clear()


def tuned_path(gpu: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Return the path of a GPU's table, for its name in torch: `NVIDIA H200` -> nvidia-h200.json.

    The default of `folder` is kernels/tuned. Characters that a file name should not have become
    dashes.
    """
    name = re.sub(r"[^a-z0-9._-]", "-", gpu.strip().lower()).strip(".-")
    if not name:
        raise ValueError(f"gpu must be the name of a device, got {gpu!r}")
    return (folder or pathlib.Path(__file__).parent / "tuned") / f"{name}.json"


def read_tuned(path: pathlib.Path) -> dict[tuple[str, str], list[dict]]:
    """Read `{"tiles": [{"op", "dtype", "sizes": {...}, "tile": {...}}, ...]}`, by op and dtype.

    A file that does not exist has no entries.

    Raises:
        ValueError: the file is not such a table. The message says in one line what is wrong.
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
    """Return what is wrong with an entry of a tuned table, or None."""
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
