"""Sorts rows into workloads and ranks them; writes numbers as text for tables and figures.

A results file has a row for every stage that a tile reached. Here they become one row for each
tile. The tiles and peers of one operator, mode, dtype and shape on one GPU become a `Workload`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results, stats
from tilelab.perf.work import gpus
from tilelab.perf.work.operators import is_product

Row = dict[str, Any]

NAMES = {  # of implementations, for people
    "tilelab": "tilelab",
    "torch": "PyTorch",
    "compile": "torch.compile",
    "inductor": "Inductor",
    "graph": "PyTorch, CUDA graph",
}
SHORT = {"num_warps": "w", "num_stages": "s", "GROUP_M": "g"}  # in the text of a tile
SHORT_UNLESS_1 = {"SUBTILES": "e", "SPLIT_K": "k", "PROGRAMS_PER_SM": "p"}
# As networks.py and shapes.py of perf/work make them.
_NAME = re.compile(r"([\w-]+)[. ]([^ =]+)(?: ([^ =]+))?")


def read(
    paths: Iterable[str | Path], note: Callable[[str], Any] = print
) -> tuple[list[dict[str, Any]], list[Row]]:
    """Read results files: their headers and rows. No row at all is an error."""
    paths = list(paths)
    headers, rows = map(_printable, results.read(*paths, note=note))
    if not rows:
        raise PerfError(f"no results in {', '.join(map(str, paths))}: not one row")
    return headers, rows


def _printable(value: Any) -> Any:
    """The same JSON with a space for every control character, which no page or SVG may have."""
    if isinstance(value, str):
        return re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]", " ", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


class Workload(NamedTuple):
    """Everything that was tried for one operator, mode, dtype and shape on one GPU.

    `tiles` has one row per tile of tilelab, of its last stage and completed by the earlier ones;
    `peers` the last row of every other implementation.
    """

    gpu: str
    measured: bool
    op: str
    mode: str
    dtype: str
    precision: str
    shape: dict[str, int]
    name: str
    cache: str
    tiles: list[Row]
    peers: list[Row]

    @property
    def best(self) -> Row | None:
        """The fastest tile: of the finals, else of the screened, else of the predicted."""
        return best_tile(self.tiles)

    @property
    def family(self) -> str:
        """The set of shapes that it belongs to: "resnet50 n32", "square"; "" of a plain range."""
        parts = _NAME.fullmatch(self.name)
        return " ".join(filter(None, parts.group(1, 3))) if parts else ""

    @property
    def label(self) -> str:
        """Its name within the family: "layer1.0.conv2", "4096"."""
        parts = _NAME.fullmatch(self.name)
        return parts[2] if parts else self.name

    @property
    def best_peer(self) -> Row | None:
        """The fastest row of the other implementations, if any has a time."""
        return best_tile(self.peers)

    @property
    def title(self) -> str:
        """Operator, mode and dtype, as "conv2d dgrad, bfloat16"."""
        return f"{self.op} {self.mode}, {dtype_text(self.dtype, self.precision)}"


def workloads(rows: Iterable[Row]) -> list[Workload]:
    """Sort rows into workloads, in the order of the first rows of their operator, GPU and family.

    Within a family of shapes, sizes and layers come in order, whichever was finished first.
    """
    groups: dict[tuple, dict[tuple, Row]] = defaultdict(dict)
    for row in rows:
        cache = row.get("cache") or "cold"
        group = groups[row["gpu"], row["measured"], results.workload(row), cache]
        attempt = (row["impl"], tuple(sorted((row.get("tile") or {}).items())))
        group[attempt] = _later(group.get(attempt), row)
    found = []
    for (gpu, measured, (*work, _), cache), group in groups.items():
        first = next(iter(group.values()))
        shape = first["shape"]
        name = first.get("shape_name") or shape_text(shape)
        mine = [row for row in group.values() if row["impl"] == "tilelab"]
        others = [row for row in group.values() if row["impl"] != "tilelab"]
        found.append(Workload(gpu, measured, *work, shape, name, cache, mine, others))
    firsts: dict[tuple, int] = {}
    for w in found:
        firsts.setdefault(_group(w), len(firsts))
    return sorted(found, key=lambda w: (firsts[_group(w)], _natural(w.label)))


def _group(w: Workload) -> tuple:
    return w.gpu, w.measured, w.op, w.mode, w.dtype, w.precision, w.cache, w.family


def _natural(text: str) -> list[tuple[int, int, str]]:
    """To sort texts with the numbers in them as numbers: "layer2" before "layer10"."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _later(old: Row | None, new: Row) -> Row:
    """The row of the later stage, with what only the earlier one knows (its registers, say)."""
    if old is None:
        return new
    if results.STAGES.index(old["stage"]) > results.STAGES.index(new["stage"]):
        old, new = new, old
    return {**old, **{field: value for field, value in new.items() if value is not None}}


def best_tile(tiles: Iterable[Row]) -> Row | None:
    """The fastest row of the latest stage that any of them reached, or None if none has a time."""
    return min(filter(has_result, tiles), key=rank, default=None)


def has_result(row: Row) -> bool:
    """It gave the right result, or nothing speaks against it offline, and it has a time."""
    return row["status"] in ("ok", "predicted") and seconds(row) is not None


def rank(row: Row) -> tuple[bool, bool, float]:
    """To sort rows that have a result: finals, then screened, then predicted ones; fast first."""
    return (row.get("median_s") is None, row["stage"] != "final", seconds(row))


def seconds(row: Row) -> float | None:
    """Seconds a call: the measured median, else what was predicted, else None."""
    return row.get("median_s") or row.get("predicted_s")


def speed(row: Row, time: float | None = None) -> float | None:
    """TFLOP/s of a product, GB/s of anything else, in `time` or in the row's own seconds."""
    time = seconds(row) if time is None else time
    if not time:
        return None
    return row["flops"] / time / 1e12 if is_product(row["op"]) else row["bytes"] / time / 1e9


def unit(op: str) -> str:
    """Of `speed`."""
    return "TFLOP/s" if is_product(op) else "GB/s"


def paired(row: Row, other: Row) -> tuple[float, float | None, float | None]:
    """How many times as fast `row` is as `other`, and the ends of the 95% interval.

    Rows of one race are compared round by round; others by their medians, without an interval.
    """
    a, b = other.get("samples_s") or [], row.get("samples_s") or []
    if row.get("race") and row.get("race") == other.get("race") and len(a) == len(b) >= 3:
        return stats.paired_ratio(a, b)
    return seconds(other) / seconds(row), None, None


class Speedup(NamedTuple):
    """tilelab's best tile over the fastest peer: above 1 tilelab is faster."""

    workload: Workload
    peer: str
    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Of the 95% interval: "faster", "slower", or "tie" if it spans 1; "unpaired" without."""
        if self.low is None:
            return "unpaired"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "tie"


def speedups(shown: Iterable[Workload]) -> list[Speedup]:
    """Of each workload that was measured with a peer."""
    return [
        Speedup(w, w.best_peer["impl"], *paired(w.best, w.best_peer))
        for w in shown
        if w.measured and w.best and w.best_peer
    ]


class Entrant(NamedTuple):
    """A line of a leaderboard: its row, and what is written of it, "" for what is not known.

    `ratio` is the speed over that of tilelab's best tile, with its 95% interval: a peer above 1 is
    faster than tilelab.
    """

    row: Row
    name: str
    tile: str
    time: str
    speed: str
    interval: str
    share: str
    ratio: str


def leaderboard(w: Workload, most: int) -> list[Entrant]:
    """The fastest tiles, `most` of them, and every peer; the fastest first."""
    tiles = sorted(filter(has_result, w.tiles), key=lambda row: (row is not w.best, rank(row)))
    rows = sorted([*tiles[:most], *filter(has_result, w.peers)], key=seconds)
    return [_entrant(row, w.best) for row in rows]


def _entrant(row: Row, best: Row | None) -> Entrant:
    interval = ratio = ""
    if row.get("low_s") and row.get("high_s"):
        slow, fast = speed(row, row["high_s"]), speed(row, row["low_s"])
        interval = f"{number_text(slow)} to {number_text(fast)}"
    if best is not None:
        times, low, high = paired(row, best) if row is not best else (1.0, None, None)
        ratio = f"{times:.2f}x" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
    share = row.get("peak_share")
    return Entrant(
        row, NAMES[row["impl"]], tile_label(row), time_text(seconds(row)),
        f"{number_text(speed(row))} {unit(row['op'])}", interval,
        "" if share is None else f"{share:.0%}", ratio,
    )  # fmt: skip


def tile_text(tile: dict[str, int] | None) -> str:
    """A tile in short: "128x256x64 w8 s3 g8" (blocks; warps, stages, GROUP_M).

    Of other kernels, "tma 128x256x64 w8 s4 g8 e2 k4 p2": halves of the tile in the epilogue, parts
    of K, programs an SM (0: one a tile). What is 1 is left out.
    """
    if not tile:
        return ""
    blocks = block_names(tile)
    words = [tile["kernel"]] if "kernel" in tile else []
    words += ["x".join(str(tile[name]) for name in blocks)] if blocks else []
    words += [f"{letter}{tile[name]}" for name, letter in SHORT.items() if name in tile]
    words += [f"{x}{tile[name]}" for name, x in SHORT_UNLESS_1.items() if tile.get(name, 1) != 1]
    known = {"kernel", *blocks, *SHORT, *SHORT_UNLESS_1}
    words += [f"{k}={v}" for k, v in tile.items() if k not in known]
    return " ".join(words)


def tile_label(row: Row) -> str:
    """A row's tile in short. It says so if a call takes this tile where nothing is tuned."""
    return tile_text(row.get("tile")) + (" (default)" if row.get("default") else "")


def block_names(tile: dict[str, int]) -> list[str]:
    """The block sizes of a tile: BLOCK_M, BLOCK_N and BLOCK_K, then others."""
    first = ["BLOCK_M", "BLOCK_N", "BLOCK_K"]
    others = sorted(name for name in tile if name.startswith("BLOCK_") and name not in first)
    return [name for name in first if name in tile] + others


def shape_text(shape: dict[str, int]) -> str:
    """A shape in short: "M=4096 N=4096 K=4096"."""
    return " ".join(f"{k}={v}" for k, v in shape.items())


def dtype_text(dtype: str, precision: str) -> str:
    """The dtype, or "tf32" where float32 products are rounded to it."""
    return "tf32" if (dtype, precision) == ("float32", "tf32") else dtype


def time_text(value: float | None) -> str:
    """Seconds with a unit that suits them: "12.3 µs"."""
    if value is None:
        return "–"
    for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {name}" if value < 1000 * scale else f"{value:.0f} s"
    return f"{value / 1e-9:.3g} ns"


def cut(text: str, most: int) -> str:
    """A text of so many characters at most."""
    return text if len(text) <= most else text[: most - 1] + "…"


def number_text(value: float) -> str:
    """Three digits at least, with no exponent: "1.23", "12.3", "123", "1,234"."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table of these columns for a README."""
    rows = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *lines)]
    text = ["|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in rows]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])


def known_gpu(name: str) -> gpus.GPU | None:
    """What is known of a row's "gpu" ("NVIDIA H200", "h100 (compiled)"), if anything."""
    name = name.partition(" (")[0]
    return gpus.GPUS.get(gpus.TARGETS.get(name, name)) or gpus.find_device(name)
