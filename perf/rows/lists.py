"""Lists of measured tiles: what `tilelab validate` holds the prediction to.

A list has the times of several tiles of one product on one GPU, as an autotuner prints them. The
format has few fields, so that measurements of other people fit, too. One line of JSON is a list:

    {"gpu": "A100", "dtype": "float16", "M": 4096, "N": 480, "K": 240, "layout": "nn",
     "columns": ["BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "ms"],
     "tiles": [[128, 64, 32, 4, 3, 0.01712], ...], "cublas_ms": 0.018368, "card": "..."}

or what is special about a card, for the lists below that name it:

    {"card": "H100 with HBM at about 2.4 TB/s", "gpu": "H100", "bandwidth": 2.4e12, "why": "..."}

perf/results/public/README.md explains the fields. Results files are lists, too: the tiles of each
workload that was measured.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tilelab.perf.errors import PerfError
from tilelab.perf.rows import ranking, results
from tilelab.perf.work import gpus

DTYPES = {  # of a list: dtype and precision
    "float16": ("float16", "ieee"),
    "bfloat16": ("bfloat16", "ieee"),
    "float32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
}
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
# A is contiguous along K ("n") or along M ("t"); B is contiguous along N ("n") or along K ("t").
LAYOUTS = ("nn", "nt", "tn", "tt")
OVERRIDES = ("bandwidth", "ceiling")  # fields of gpus.GPU that a card may have of its own
TIMERS = ("events", "graph")


class TileList(NamedTuple):
    """Measured tiles of one workload on one GPU.

    Attributes:
        label: what tables and figures call the GPU.
        gpu: what is known of it.
        op, mode, dtype, precision, shape, name: the workload.
        layout: of a product's operands, see LAYOUTS; "" if the workload says how they lie.
        tiles: the tiles.
        seconds: of each.
        library_s: seconds of the vendor's library, if it was timed.
        timer: "events" around a call, or calls in a CUDA "graph".
        source: hash of the kernel that was measured, if it is one of ours.
        origin: where the times are from.
    """

    label: str
    gpu: gpus.GPU
    op: str
    mode: str
    dtype: str
    precision: str
    shape: dict[str, int]
    name: str
    layout: str
    tiles: list[dict[str, Any]]
    seconds: list[float]
    library_s: float | None
    timer: str
    source: str | None
    origin: str


def read(paths: Iterable[str | Path], note: Callable[[str], Any] = print) -> list[TileList]:
    """Read lists and results files. A list of one tile compares nothing, and is left out.

    Raises:
        PerfError: for a file that is missing or is neither, a line that lacks a field, a GPU that
            is not known; if no list has two tiles.
    """
    found, paths = [], list(paths)
    for path in paths:
        content = results.content_of(path)
        found += of_results(path, note) if _has_header(content) else parse(path, content)
    kept = [each for each in found if len(each.tiles) > 1]
    if not kept:
        raise PerfError(f"no list of two measured tiles in {', '.join(map(str, paths))}")
    if len(kept) < len(found):
        note(f"left out {len(found) - len(kept)} of {len(found)} lists: they have one tile")
    return kept


def _has_header(content: bytes) -> bool:
    try:
        return json.loads(content.partition(b"\n")[0])["kind"] == "header"
    except (ValueError, KeyError, TypeError):
        return False


# -- lists -----------------------------------------------------------------------------------------


def parse(path: str | Path, content: bytes) -> list[TileList]:
    """Return the lists of a file's content."""
    cards: dict[str, gpus.GPU] = {}
    lines, found = [], []
    for number, text in enumerate(content.splitlines(), start=1):
        place = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except ValueError:
            raise PerfError(f"{place}: not a line of JSON") from None
        if not isinstance(line, dict):
            raise PerfError(f"{place}: neither a list nor a card (see perf/results/public)")
        _need(place, line, "gpu", str)
        if "tiles" in line:
            lines.append((place, line))
        elif "card" in line:
            name = _need(place, line, "card", str)
            cards[name] = _card(place, line)
        else:
            raise PerfError(f"{place}: tiles is missing")
    used = {(line["gpu"], line.get("card")) for _, line in lines}
    several = Counter(gpu for gpu, _ in used)
    for place, line in lines:
        card = line.get("card")
        if card is not None and card not in cards:
            raise PerfError(f"{place}: no line says what is special about the card {card!r}")
        label = f"{line['gpu']}, {card}" if card and several[line["gpu"]] > 1 else line["gpu"]
        gpu = cards[card] if card else _gpu(place, line)
        found.append(_list(path, place, line, label, gpu))
    return found


def _card(place: str, line: dict) -> gpus.GPU:
    unknown = sorted(line.keys() - {"card", "gpu", "why", *OVERRIDES})
    if unknown:
        raise PerfError(f"{place}: a card has no field {', '.join(unknown)}")
    own = {name: _positive(place, name, line[name]) for name in OVERRIDES if name in line}
    return _gpu(place, line)._replace(**own)


def _gpu(place: str, line: dict) -> gpus.GPU:
    try:
        return gpus.find(line["gpu"])
    except PerfError as error:
        raise PerfError(f"{place}: {error}") from None


def _list(path: str | Path, place: str, line: dict, label: str, gpu: gpus.GPU) -> TileList:
    dtype = _one_of(place, "dtype", line.get("dtype"), DTYPES)
    layout = _one_of(place, "layout", line.get("layout"), LAYOUTS)
    timer = _one_of(place, "timer", line.get("timer", "events"), TIMERS)
    shape = {name: _whole(place, name, _need(place, line, name, int)) for name in "MNK"}
    library = line.get("cublas_ms")
    tiles, seconds = _tiles(place, line)
    return TileList(
        label, gpu, "matmul", "fwd", *DTYPES[dtype], shape, ranking.shape_text(shape), layout,
        tiles, seconds, library and 1e-3 * _positive(place, "cublas_ms", library), timer,
        None, _need(place, line, "source", str) if "source" in line else Path(path).name,
    )  # fmt: skip


def _tiles(place: str, line: dict) -> tuple[list[dict], list[float]]:
    columns = _need(place, line, "columns", list)
    missing = [name for name in (*BLOCKS, "ms") if name not in columns]
    if missing:
        raise PerfError(f"{place}: columns lacks {', '.join(missing)}")
    tiles, seconds = [], []
    for values in _need(place, line, "tiles", list):
        if not isinstance(values, list) or len(values) != len(columns):
            raise PerfError(f"{place}: a tile has not the {len(columns)} numbers of columns")
        tile = dict(zip(columns, values, strict=True))
        seconds.append(1e-3 * _positive(place, "ms", tile["ms"]))
        tiles.append({name: _whole(place, name, tile[name]) for name in BLOCKS})
    texts = Counter(ranking.tile_text(tile) for tile in tiles)
    twice = [text for text, count in texts.items() if count > 1]
    if twice:
        raise PerfError(f"{place}: the tile {twice[0]} is there twice")
    return tiles, seconds


def _need(place: str, line: dict, name: str, kind: type) -> Any:
    if name not in line:
        raise PerfError(f"{place}: {name} is missing")
    if not isinstance(line[name], kind) or isinstance(line[name], bool):
        raise PerfError(f"{place}: {name} must be {kind.__name__}, got {line[name]!r}")
    return line[name]


def _one_of(place: str, name: str, value: Any, known: Iterable[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise PerfError(f"{place}: {name} must be one of {', '.join(known)}; got {value!r}")
    return value


def _positive(place: str, name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise PerfError(f"{place}: {name} must be a positive number, got {value!r}")
    return value


def _whole(place: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PerfError(f"{place}: {name} must be a positive whole number, got {value!r}")
    return value


# -- results files ---------------------------------------------------------------------------------


def of_results(path: str | Path, note: Callable[[str], Any] = print) -> list[TileList]:
    """Return the workloads of a results file that were measured, as lists."""
    found = []
    for w in ranking.workloads(ranking.read([path], note=note)[1]):
        rows = [row for row in w.tiles if row.get("tile") and _timed(row)]
        if not rows:
            continue
        gpu = ranking.known_gpu(w.gpu)
        if gpu is None:
            raise PerfError(f"{path}: nothing is known of the GPU {w.gpu!r}")
        library = ranking.best_tile(p for p in w.peers if p["impl"] == "torch" and _timed(p))
        found.append(TileList(
            w.gpu, gpu, w.op, w.mode, w.dtype, w.precision, w.shape, w.name, "",
            [row["tile"] for row in rows], [row["median_s"] for row in rows],
            library and library["median_s"], _timer(rows), rows[0].get("source"), Path(path).name,
        ))  # fmt: skip
    return found


def _timed(row: ranking.Row) -> bool:
    return row["status"] == "ok" and bool(row.get("median_s"))


def _timer(rows: Sequence[ranking.Row]) -> str:
    """The timer of most rows; what has only the host's clock sees a launch, as events do."""
    graphs = sum(row.get("timer") == "graph" for row in rows)
    return "graph" if 2 * graphs > len(rows) else "events"
