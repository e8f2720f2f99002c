"""What the tiles of lists compile to: looked up in a file, or compiled.

A list (perf/rows/lists.py) has products of many sizes. What they compile to depends on little of
that: on the target, the tile, how the operands lie, which sizes are multiples of 16 (Triton loads
16 bytes at a time then) and whether BLOCK_K divides K (there are no masks then). That is the key of
a fact. It is compiled once, at one typical size. bfloat16 is looked up as float16, since both have
the same instructions but for the names of the types.

A facts file is gzipped lines of JSON: a header with triton's version and the hash of the kernel,
then one fact a line.
"""

import concurrent.futures
import gzip
import importlib.metadata
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tilelab.kernels._tile_facts import along
from tilelab.kernels.matmul import matmul_kernel
from tilelab.perf.compiler import aot
from tilelab.perf.compiler.kernel_source import source_hash
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results
from tilelab.perf.rows.lists import BLOCKS, TileList
from tilelab.perf.rows.ranking import Row
from tilelab.perf.work.tile_work import itemsize
from tilelab.perf.work.workloads import Workload

# What `aot.compile_job` says of the typical size and of this machine, and no fact of the code.
OF_THE_SIZE = (
    "tile_op", "sizes", "launches", "moved", "programs", "run_a", "run_b", "kernel", "compile_s",
)  # fmt: skip
GROUP = {"GROUP_M": 8}  # lists do not name it; Inductor's template has 8, too


class Key(NamedTuple):
    """What the code of a product depends on."""

    target: str
    dtype: str
    precision: str
    layout: str
    divisible: str  # which of M, N and K are multiples of 16: "MNK"
    even_k: bool  # BLOCK_K divides K
    tile: tuple[int, ...]  # BLOCKS


def key_of(each: TileList, tile: dict[str, int]) -> Key:
    """Return under which key a list's tile is found."""
    dtype = "float16" if each.dtype == "bfloat16" else each.dtype
    divisible = "".join(name for name in "MNK" if each.shape[name] % 16 == 0)
    even = each.shape["K"] % tile["BLOCK_K"] == 0
    blocks = tuple(tile[name] for name in BLOCKS)
    return Key(each.gpu.target, dtype, each.precision, each.layout, divisible, even, blocks)


def typical(key: Key) -> Workload:
    """Return a product with this key. It is large, so that no sum of it is divided into parts."""
    shape = {name: 4096 if name in key.divisible else 4097 for name in "MN"}
    shape["K"] = 4096 if key.even_k else 4112 if "K" in key.divisible else 4097
    return Workload("matmul", "fwd", key.dtype, key.precision, shape, "")


def today() -> dict[str, str]:
    """Return the header of a facts file that is made now."""
    return {"triton": importlib.metadata.version("triton"), "kernel": source_hash(matmul_kernel)}


class Facts(dict[Key, Row]):
    """Facts by key."""

    def complete(self, lists: Iterable[TileList], workers: int | None = None) -> None:
        """Compile what the lists need and is not there."""
        keys = dict.fromkeys(key_of(each, tile) for each in lists for tile in each.tiles)
        jobs = {
            key: (typical(key), tile_of(key), key.target, key.layout)
            for key in keys
            if key not in self
        }
        for key, fact in compiled(jobs, workers):
            self[key] = {name: v for name, v in fact.items() if name not in OF_THE_SIZE}

    def row(self, each: TileList, tile: dict[str, int]) -> Row:
        """Return a list's tile as a row that can be predicted; with "failed" if it cannot."""
        shape, item = each.shape, itemsize(each.dtype)
        w = Workload(each.op, each.mode, each.dtype, each.precision, shape, each.name)
        blocks = [math.ceil(shape[name] / tile[f"BLOCK_{name}"]) for name in "MN"]
        # How many bytes of a tile of A, and of B, lie together in memory.
        blocks_along = along(each.layout)
        runs = (item * min(tile[b], shape[b.removeprefix("BLOCK_")]) for b in blocks_along)
        return self[key_of(each, tile)] | {
            "op": w.op, "mode": w.mode, "dtype": w.dtype, "precision": w.precision,
            "shape": shape, "sizes": shape, "tile_op": "matmul",
            "tile": tile | GROUP, "flops": w.flops, "bytes": w.bytes,
            "moved": w.bytes, "launches": 1, "programs": math.prod(blocks),
            **dict(zip(("run_a", "run_b"), runs, strict=True)),
        }  # fmt: skip


def compiled(jobs: dict[Any, tuple], workers: int | None) -> Iterator[tuple[Any, Row]]:
    """Compile jobs, each the arguments of `aot.compile_job`; yield key and answer when ready."""
    if not jobs:
        return
    with aot.Compilers(workers) as compilers:
        waiting = {compilers.submit("compile", *job): key for key, job in jobs.items()}
        ready = concurrent.futures.as_completed(waiting)
        for future in tqdm(ready, total=len(jobs), unit="tile", desc="compile", disable=None):
            yield waiting[future], future.result()


def tile_of(key: Key) -> dict[str, int]:
    """Return the tile of a key, as it is forced on a call."""
    return dict(zip(BLOCKS, key.tile, strict=True)) | GROUP


def read(path: Path) -> tuple[dict[str, str], Facts]:
    """Return the header of a file and its facts. They count if the header is that of `today`."""
    try:
        header, *lines = map(json.loads, results.content_of(path).splitlines())
        facts = Facts()
        for line in lines:
            key = line.pop("key")
            facts[Key(*key[:-1], tuple(key[-1]))] = line
        if header.keys() != today().keys():
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PerfError(f"{path} is not a file of compiled facts") from error
    return header, facts


def write(path: Path, facts: Facts) -> None:
    """Write a file of facts, whole, in the order of the keys: the same facts are the same bytes."""
    lines: list[dict[str, Any]] = [today()]
    lines += [{"key": key, **fact} for key, fact in sorted(facts.items())]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    results.write_whole(path, gzip.compress(text.encode(), mtime=0))
