"""Saves the winners of a sweep where the kernels look their tiles up: kernels/tuned/<gpu>.json.

A table is merged, not replaced: entries of other shapes stay. It has one entry a line, in an order
that does not change, so that its history can be read:

    {"op": "conv2d", "dtype": "bfloat16", "sizes": {...}, "tile": {...}, "tflops": 512.3, ...},

kernels/_tiles.py reads op, dtype, sizes and tile. The rest says where the entry comes from.
"""

import importlib.metadata
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from tilelab.perf.errors import PerfError
from tilelab.perf.rows.ranking import has_result, rank, seconds
from tilelab.perf.rows.results import locked, write_whole
from tilelab.perf.work.operators import OPERATORS

NOTE = "written by perf/report/tuned_table.py from the rows of a sweep; read by kernels/_tiles.py"


def save(rows: Iterable[dict], folder: pathlib.Path | None = None) -> pathlib.Path:
    """Merge the best tile of each op, dtype and sizes into the table of a GPU; return its path.

    A finalist comes before a tile that was only screened, a cold cache before a hot one, and then
    the shorter time counts. Where several workloads look up one entry (filters of 3x3 and 1x1), it
    gets the tile of the one that takes longest; where float32 was measured with and without TF32,
    the tile without, which fits both.

    An entry that an operator's own sweep has made is not replaced by a guest's: a 1x1 convolution
    is a matmul, and looks its tile up as one, but with B transposed; conv2d_bias_relu looks up
    conv2d's. A guest's entry says by whom it was measured ("by"), and fills what is free.
    """
    from tilelab.kernels import _tiles

    usable = [row for row in rows if _is_usable(row)]
    if not usable:
        raise PerfError("no row has a tile to save: that takes tiles of ours, timed on a GPU")
    gpu, *others = sorted({row["gpu"] for row in usable})
    if others:
        raise PerfError(f"a tuned table is of one GPU, got {', '.join([gpu, *others])}")
    path = _tiles.tuned_path(gpu, folder)
    triton = importlib.metadata.version("triton")
    new = [_entry(row, triton) for row in _winners(usable)]
    try:
        with locked(path):  # or two sweeps that end together would lose entries of each other
            old = [entry for entries in _tiles.read_tuned(path).values() for entry in entries]
            _write(path, gpu, _merged(old, new))
    except (ValueError, OSError) as error:
        raise PerfError(f"the tuned table was not saved: {error}") from error
    _tiles.forget_tuned()
    return path


def _is_usable(row: dict) -> bool:
    """A tile of ours that was timed on a GPU."""
    if row.get("impl") != "tilelab" or not all(row.get(k) for k in ("tile", "tile_op", "sizes")):
        return False
    return has_result(row) and row["stage"] != "compile" and row["gpu"] != "interpreter"


def _identity(entry: dict) -> tuple:
    """What `choose_tile` looks up; also the order of the entries in the file."""
    return entry["op"], entry["dtype"], tuple(sorted(entry["sizes"].items()))


def _winners(rows: list[dict]) -> list[dict]:
    """The best row of each workload, and of the workloads that share an entry the longest one."""

    def place(row: dict) -> tuple:
        tile = json.dumps(row["tile"], sort_keys=True)
        return (*rank(row)[:2], row.get("cache") == "hot", seconds(row), tile)

    best: dict[tuple, dict] = {}
    for row in rows:
        shape = json.dumps(row.get("shape"), sort_keys=True)
        key = _identity(row | {"op": row["tile_op"]})
        workload = (*key, row["op"], row.get("mode"), shape, row.get("precision"))
        if workload not in best or place(row) < place(best[workload]):
            best[workload] = row

    def claim(item: tuple[tuple, dict]) -> tuple:
        workload, row = item
        other = row.get("precision") == "tf32"
        return (*place(row)[:3], _is_guest(row), other, -seconds(row), str(workload))

    winners: dict[tuple, dict] = {}
    for workload, row in sorted(best.items(), key=claim):
        winners.setdefault(workload[:3], row)
    return list(winners.values())


def _is_guest(row: dict) -> bool:
    """Whether it looks up the tiles of another operator, that may have been measured itself."""
    return row["op"] != row["tile_op"] and row["tile_op"] in OPERATORS


def _entry(row: dict, triton: str) -> dict[str, Any]:
    entry = dict(op=row["tile_op"], dtype=row["dtype"], sizes=row["sizes"], tile=row["tile"])
    if _is_guest(row):
        entry["by"] = row["op"]
    unit = "tflops" if row.get("bound") == "compute" else "gbps"
    if row.get(unit):
        entry[unit] = float(f"{row[unit]:.4g}")
    if row["stage"] == "screen":
        entry["stage"] = "screen"
    entry["measured"] = (row.get("time") or "")[:10] or None
    return entry | dict(source=row.get("source"), triton=triton)


def _merged(old: list[dict], new: list[dict]) -> list[dict]:
    entries = {_identity(entry): entry for entry in old}
    for entry in new:
        before = entries.get(_identity(entry))
        if before is None or "by" in before or "by" not in entry:  # a guest gives way
            entries[_identity(entry)] = entry
    return [entries[key] for key in sorted(entries)]


def _write(path: pathlib.Path, gpu: str, entries: list[dict]) -> None:
    """The whole file or, if that fails, what was there."""
    tiles = ",\n".join(json.dumps(entry) for entry in entries)
    head = f'"gpu": {json.dumps(gpu)},\n"note": {json.dumps(NOTE)}'
    write_whole(path, f'{{\n{head},\n"tiles": [\n{tiles}\n]\n}}\n'.encode())
