"""Why a tile lost: its numbers beside those of the tile that won, in words.

    tilelab sweep ...     ends with this table
    tilelab report ...    has it in full

A losing tile is put through a cascade, from what disqualifies it (a wrong result, an error, a block
that does not fit) through what ruins it (spilled registers, no tensor cores, serialised wgmma,
narrow loads) to what costs a share of its speed (occupancy, the last wave, padding, a longer main
loop, more memory traffic). A cause counts only if the winner has less of it.

What the model of predict.py contains (waves, padding, and where they bind instructions and traffic)
is given as a factor: the tile's predicted time over its predicted time with the winner's value.
Shares of a gap are in logarithms, as factors multiply: 1.1x is 35% of 1.31x. The other causes are
named with their numbers, and no share is claimed for them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tilelab.perf.compiler.prediction import LAUNCH_S, loop_warps, step_flops, tile_op
from tilelab.perf.rows.ranking import (
    PRODUCTS,
    Row,
    Workload,
    known_gpu,
    number_text,
    paired_text,
    ran,
    rank,
    seconds,
    speed,
    tile_text,
    time_text,
    unit,
    workloads,
)
from tilelab.perf.work import gpus
from tilelab.perf.work.gpus import GPU

TIE = 0.01  # a tile within 1% of the winner lost nothing that needs an explanation
LESS = 0.9  # below nine tenths of the winner's value a share counts as less
TITLES = {  # code: what its tiles do, as a heading of a group
    "best": "the winner",
    "tie": "as fast as the winner",
    "wrong": "give a wrong result",
    "error": "fail",
    "does not fit": "do not fit",
    "spills": "spill registers",
    "no tensor cores": "do not use the tensor cores",
    "older tensor cores": "use the older tensor-core instructions",
    "serialised": "have serialised wgmma",
    "narrow loads": "load in narrow pieces",
    "occupancy": "keep fewer warps on an SM",
    "waves": "leave SMs idle",
    "padding": "compute more padding",
    "loop": "need more instructions",
    "traffic": "read more memory",
    "pruned": "pruned before timing",
    "skipped": "not tried",
    "unexplained": "are slower for no reason that these numbers show",
}


# -- the cascade ---------------------------------------------------------------------------------


def why(row: Row, best: Row | None, gpu: GPU | None = None) -> tuple[str, str]:
    """Say why a tile lost against the best tile of the same workload.

    Args:
        row: of the losing tile.
        best: of the winner; None where no tile of the workload has a time.
        gpu: a `gpus.GPU`, for shares of its peak and issue slots; None if it is not known.

    Returns:
        A code, one of `TITLES`, and a sentence with the numbers.
    """
    if row is best:
        return "best", f"the winner: {time_text(seconds(row))}"
    failed = _failed(row)
    if failed:
        return failed
    if row["status"] == "skipped":
        return "skipped", row.get("reason") or "not tried"
    code, words = _cause(row, best or {}, gpu)
    if row["status"] != "pruned":
        return code, words
    if code in ("unexplained", "tie"):
        return "pruned", row.get("reason") or "pruned before timing"
    return code, f"{words} (pruned, not timed)"


def _failed(row: Row) -> tuple[str, str] | None:
    """What keeps a tile from being timed at all."""
    reason = " ".join(str(row.get("reason") or "").split())
    if row["status"] == "wrong":
        if row.get("error") is None:
            return "wrong", f"wrong result: {reason}" if reason else "wrong result"
        limit = f", allowed {row['tolerance']:.2g}" if row.get("tolerance") is not None else ""
        return "wrong", f"wrong result: relative error {row['error']:.2g}{limit}"
    limit = row.get("limit") or ""
    too_large = any(w in reason.lower() for w in ("out of resource", "does not fit"))
    if limit.startswith("does not fit") or too_large:
        what = limit.partition("does not fit: ")[2]
        if what == "shared memory" and row.get("shared"):
            return "does not fit", f"a block needs {row['shared'] / 1024:.0f} KiB of shared memory"
        if what == "registers" and row.get("registers"):
            return "does not fit", f"a block needs {_block_registers(row)} registers"
        return "does not fit", reason or limit
    if row["status"] == "error":
        kind = "does not compile" if row["stage"] == "compile" else "fails when it runs"
        return "error", f"{kind}: {reason}" if reason else kind
    return None


def _block_registers(row: Row) -> str:
    many = f" x {row['threads']} threads" if row.get("threads") else " a thread"
    return f"{row['registers']}{many}"


def _cause(row: Row, best: Row, gpu: GPU | None) -> tuple[str, str]:
    """The cascade for a tile that runs."""
    gap = _gap(row, best)
    if gap is not None and gap < 1 + TIE and row["status"] != "pruned":
        return "tie", f"{time_text(seconds(row))}, the winner {time_text(seconds(best))}"
    for code, check in RUINOUS:
        words = check(row, best, gpu)
        if words:
            return code, words
    causes = [cause for check in COSTLY if (cause := check(row, best, gpu))]
    if not causes:
        return "unexplained", _unexplained(row, best)
    # What the model contains and what explains most of the gap goes before what is only suspected.
    causes.sort(key=lambda cause: cause.factor < 1 + 0.5 * ((gap or 1.1) - 1))
    first, *others = causes
    words = first.words + _share(first.factor, gap)
    if others:
        words += "; also " + "; ".join(cause.words for cause in others[:2])
    return first.code, words


def _gap(row: Row, best: Row) -> float | None:
    """Time over the winner's, both measured or both predicted; None if that cannot be said."""
    for field in ("median_s", "predicted_s"):
        if row.get(field) and best.get(field):
            return row[field] / best[field]
    return None


def _share(factor: float, gap: float | None) -> str:
    """How much of the gap a factor explains; nothing where either is not known."""
    if gap is None or factor <= 1:
        return ""
    share = math.log(factor) / math.log(gap)
    part = f"{share:.0%} of" if share < 0.995 else "all of" if share < 1.1 else "more than"
    return f", by the model {factor:.2f}x: {part} the gap"


def _spills(row: Row, best: Row, gpu: GPU | None) -> str | None:
    spilled, least = row.get("spills") or 0, best.get("spills") or 0
    if spilled <= least:
        return None
    words = f"spills {spilled} bytes a thread to memory"
    words += f", the winner {least}" if least else ""
    tile = row.get("tile") or {}
    if {"BLOCK_M", "BLOCK_N", "num_warps"} <= set(tile) and row["op"] in PRODUCTS:
        held = tile["BLOCK_M"] * tile["BLOCK_N"] // (32 * loop_warps(tile))
        words += f": its accumulators alone take {held} of 255 registers" if held >= 96 else ""
    return words


def _no_tensor_cores(row: Row, best: Row, gpu: GPU | None) -> str | None:
    if row.get("tensor_core") or not best.get("tensor_core"):
        return None
    return f"no tensor-core instruction in its main loop; the winner has {best['tensor_core']}"


def _older_tensor_cores(row: Row, best: Row, gpu: GPU | None) -> str | None:
    mine, other = row.get("tensor_core") or "", best.get("tensor_core") or ""
    if not mine.startswith("HMMA") or not other.startswith(("HGMMA", "UTC")):
        return None
    return f"{mine}, which reads operands from registers; the winner has {other}"


def _serialised(row: Row, best: Row, gpu: GPU | None) -> str | None:
    if not row.get("serialised") or best.get("serialised"):
        return None
    return "the compiler put a wait after every wgmma: the tensor cores idle while it loads"


def _narrow_loads(row: Row, best: Row, gpu: GPU | None) -> str | None:
    mine, other = row.get("load_bytes"), best.get("load_bytes")
    if not mine or not other or mine >= other:
        return None
    return f"its narrowest loads are {mine} bytes wide, the winner's {other}"


RUINOUS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    ("spills", _spills),
    ("no tensor cores", _no_tensor_cores),
    ("older tensor cores", _older_tensor_cores),
    ("serialised", _serialised),
    ("narrow loads", _narrow_loads),
)


class Cause(NamedTuple):
    """A cause that costs a share: `factor` of the time, or 1 where no model says how much."""

    code: str
    words: str
    factor: float


def _modelled(row: Row, gpu: GPU | None, ratio: float, bounds: tuple[str, ...]) -> float:
    """Predicted time over the predicted time if what binds the tile were done `ratio` times faster.

    It is 1 where what binds is none of `bounds`. What binds then may be another: the tensor cores
    or the memory, which that does not make faster.
    """
    predicted, bound = row.get("predicted_s"), row.get("bound") or "compute"
    if not predicted or bound not in bounds:
        return 1.0
    launch = LAUNCH_S * (row.get("launches") or 0)
    busy = predicted - launch
    floors = [0.0]
    if gpu:
        floors.append((row.get("moved") or row.get("bytes") or 0) / gpu.bandwidth)
        peak = gpu.peak(gpus.kind(row["dtype"], row.get("precision") or "ieee"))
        if bound != "compute" and peak:
            floors.append(row["flops"] * (row.get("padding") or 1) / peak)
    return predicted / (launch + max(busy / ratio, min(max(floors), busy)))


def _occupancy(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = row.get("occupancy"), best.get("occupancy")
    if not mine or not other or mine >= LESS * other:
        return None
    limit = f", limited by {row['limit']}" if row.get("limit") else ""
    words = f"occupancy {mine:.0%}{limit} ({_limit_numbers(row)}); the winner {other:.0%}"
    return Cause("occupancy", words.replace(" ()", ""), 1.0)


def _limit_numbers(row: Row) -> str:
    limit = row.get("limit")
    if limit == "registers" and row.get("registers"):
        return f"{row['registers']} a thread"
    if limit == "shared memory" and row.get("shared"):
        return f"{row['shared'] / 1024:.0f} KiB a block"
    return ""


def _waves(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = row.get("wave_efficiency"), best.get("wave_efficiency")
    if not mine or not other or mine >= 0.97 * other:
        return None
    waves, idle = row.get("waves"), 1 - mine
    words = f"{idle:.0%} of the SMs' time is idle, {1 - other:.0%} with the winner"
    if waves is not None:
        words = f"{waves:.2f} waves: {words}"
    factor = _modelled(row, gpu, other / mine, ("compute", "issue", "l2"))
    return Cause("waves", words, factor) if factor > 1.01 or not row.get("predicted_s") else None


def _padding(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = row.get("padding"), best.get("padding")
    if not mine or not other or mine <= 1.03 * other:
        return None
    words = f"{1 - 1 / mine:.0%} of its work is padding, {1 - 1 / other:.0%} of the winner's"
    factor = _modelled(row, gpu, mine / other, ("compute", "issue", "l2"))
    return Cause("padding", words, factor) if factor > 1.01 or not row.get("predicted_s") else None


def _issue(row: Row) -> float | None:
    """Warp-instructions of the main loop for 1,000 FLOPs (products) or elements (others)."""
    tile, loop = row.get("tile") or {}, row.get("loop_instructions")
    blocks = [size for name, size in tile.items() if name.startswith("BLOCK_")]
    if not loop or not blocks:
        return None
    work = step_flops(tile_op(row), tile) if "BLOCK_K" in tile else math.prod(blocks)
    return 1000 * loop * loop_warps({"num_warps": 4} | tile) / work


def _loop(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = _issue(row), _issue(best) if best else None
    if not mine or not other or mine <= 1.15 * other:
        return None
    words = f"its main loop needs {mine / other:.2f}x the instructions for the same work"
    slots, theirs = issue_share(row, gpu), issue_share(best, gpu)
    if slots and theirs:
        words += f" ({slots:.0%} of the issue slots at the tensor cores' full speed, "
        words += f"the winner {theirs:.0%})"
    return Cause("loop", words, _modelled(row, gpu, mine / other, ("issue",)))


def issue_share(row: Row, gpu: GPU | None) -> float | None:
    """Issue slots that the main loop needs while the tensor cores compute its step, as a share.

    An SM of NVIDIA's issues four warp-instructions a clock. Above 1 the loop is bound by issue.
    None where the row or the GPU lacks what is needed.
    """
    tile, loop = row.get("tile") or {}, row.get("loop_instructions")
    if not gpu or not loop or not gpu.target.startswith("sm_") or not row.get("tensor_core"):
        return None
    rate = gpu.rate.get(gpus.kind(row["dtype"], row.get("precision") or "ieee"))
    if not rate or not {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"} <= set(tile):
        return None
    clocks = step_flops(tile_op(row), tile) / rate
    return loop * loop_warps(tile) / 4 / clocks


def _operand_bytes(row: Row) -> float | None:
    """Bytes that programs read for 1,000 FLOPs of a product: those of one row and column a step."""
    tile = row.get("tile") or {}
    if not {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(tile):
        return None
    size = 4 if row["dtype"] == "float32" else 2
    bytes_a_step = size * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"]
    return 1000 * bytes_a_step / step_flops(tile_op(row), tile)


def _traffic(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = _operand_bytes(row), _operand_bytes(best) if best else None
    if mine and other and mine > 1.1 * other:
        words = f"reads {mine:.1f} bytes for 1,000 FLOPs, the winner {other:.1f}"
        return Cause("traffic", words, _modelled(row, gpu, mine / other, ("l2",)))
    mine, other = row.get("moved"), best.get("moved")
    if mine and other and mine > 1.03 * other:
        words = f"moves {mine / 1e9:.3g} GB, the winner {other / 1e9:.3g} GB"
        return Cause("traffic", words, _modelled(row, None, mine / other, ("memory",)))
    return None


COSTLY = (_occupancy, _waves, _padding, _loop, _traffic)  # in the order of the cascade


def _unexplained(row: Row, best: Row) -> str:
    """What is left to say: how far the prediction goes, and in what the tiles differ."""
    words = "these numbers do not say why"
    if row.get("median_s") and row.get("predicted_s") and best.get("predicted_s"):
        words += f"; predicted: {row['predicted_s'] / best['predicted_s']:.2f}x the winner's time"
    mine, other = row.get("tile") or {}, best.get("tile") or {}
    differ = [
        f"{name} {mine[name]} instead of {other[name]}"
        for name in mine
        if name in other and mine[name] != other[name]
    ]
    for field in ("tensor_core", "operands", "tma", "registers"):
        if None not in (a := row.get(field), b := best.get(field)) and a != b:
            differ.append(f"{field.replace('_', ' ')} {a} instead of {b}")
    return words + ("; it has " + ", ".join(differ) if differ else "")


# -- tables --------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A tile, why it is where it is, and its time over the winner's (None if not comparable)."""

    row: Row
    code: str
    words: str
    gap: float | None


class Table(NamedTuple):
    """A workload and the verdicts on its tiles: the fastest first, what has no time last."""

    workload: Workload
    verdicts: list[Verdict]

    @property
    def groups(self) -> list[tuple[str, list[Verdict]]]:
        """The losing tiles by code, the largest group first."""
        groups = defaultdict(list)
        for verdict in self.verdicts:
            if verdict.code != "best":
                groups[verdict.code].append(verdict)
        return sorted(groups.items(), key=lambda group: -len(group[1]))


def table(rows: Iterable[Row]) -> list[Table]:
    """Say of every tile of every workload why it is not the best one."""
    tables = []
    for workload in workloads(rows):
        best, gpu = workload.best, known_gpu(workload.gpu)
        verdicts = [
            Verdict(row, *why(row, best, gpu), _shown_gap(row, best) if best else None)
            for row in workload.tiles
        ]
        verdicts.sort(key=lambda v: (v.code != "best", v.gap is None, v.gap or 0))
        tables.append(Table(workload, verdicts))
    return tables


def _shown_gap(row: Row, best: Row) -> float | None:
    """Time over the winner's, unless the one is measured and the other only predicted."""
    if not ran(row) or (row.get("median_s") is None) != (best.get("median_s") is None):
        return None
    return _gap(row, best)


def format_table(tables: Sequence[Table], tiles: int = 3, groups: int = 8) -> str:
    """The verdicts as text for a terminal, grouped by cause.

    Args:
        tables: as `table` gives them.
        tiles: name so many tiles of a group, the fastest; of the others their number.
        groups: show so many causes a workload, the most frequent; of the others their number.
    """
    return "\n\n".join(_table_text(t, tiles, groups) for t in tables if t.workload.tiles)


def _table_text(table: Table, tiles: int, groups: int) -> str:
    workload, best = table.workload, table.workload.best
    lines = [f"{workload.title}, {workload.name}, on {workload.gpu}"]
    if best:
        how = "" if best.get("median_s") else " (predicted, not measured)"
        lines.append(f"  best of {_tiles(len(workload.tiles))}: {_result(best)}{how}")
    else:
        lines.append(f"  none of {_tiles(len(workload.tiles))} has a time")
    for code, verdicts in table.groups[:groups]:
        one = len(verdicts) == 1
        lines.append(f"  {_tiles(len(verdicts))}: {heading(code, one)}{_range(verdicts)}")
        for verdict in verdicts[:tiles]:
            gap = "     –" if verdict.gap is None else f"{verdict.gap:.2f}x".rjust(6)
            lines.append(f"    {gap}  {tile_text(verdict.row['tile']):<22} {_cut(verdict.words)}")
        if len(verdicts) > tiles:
            lines.append(f"      and {len(verdicts) - tiles} more")
    left = table.groups[groups:]
    if left:
        many = "reason" if len(left) == 1 else "reasons"
        lines.append(f"  {_tiles(sum(len(v) for _, v in left))} for {len(left)} other {many}")
    return "\n".join(lines)


def heading(code: str, one: bool = False) -> str:
    """The title of a code, for one tile or for several: "spills registers", "spill registers"."""
    title = TITLES[code]
    verb, _, rest = title.partition(" ")
    third = {"do": "does", "have": "has", "are": "is"}
    if not one or verb in ("the", "as", "pruned", "not"):
        return title
    return f"{third.get(verb, verb + 's')} {rest}".strip()


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"


def _range(verdicts: Sequence[Verdict]) -> str:
    gaps = [f"{v.gap:.2f}x" for v in verdicts if v.gap is not None]
    if not gaps or len(verdicts) == 1:
        return ""
    to = f" to {gaps[-1]}" if gaps[-1] != gaps[0] else ""
    return f" ({gaps[0]}{to} the winner's time)"


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _result(row: Row) -> str:
    return f"{tile_text(row['tile'])}, {number_text(speed(row))} {unit(row['op'])}"


def leaderboard(rows: Iterable[Row], top: int = 5) -> str:
    """The fastest tiles and every peer of each workload, as text for a terminal.

    The last column is a row's speed over that of tilelab's best tile, in the same rounds where
    there are any, with its 95% interval: a peer above 1 is faster than tilelab.

    Args:
        rows: as `results.read` gives them.
        top: show so many tiles of tilelab a workload.
    """
    return "\n\n".join(_board(workload, top) for workload in workloads(rows))


def _board(workload: Workload, top: int) -> str:
    head = f"{workload.title}, {workload.name}, on {workload.gpu}"
    head += "" if workload.measured else " (predicted, not measured)"
    best = workload.best
    tiles = sorted((t for t in workload.tiles if ran(t)), key=lambda t: (t is not best, rank(t)))
    entrants = sorted([*tiles[:top], *filter(ran, workload.peers)], key=seconds)
    if not entrants:
        return f"{head}\n  nothing has a time ({_tiles(len(workload.tiles))} tried)"
    cells = [_entry(row, best) for row in entrants]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [head]
    for cell in cells:
        name, *numbers, ratio, flags = cell
        numbers = map(str.rjust, numbers, widths[1:])
        lines.append("  ".join(["", name.ljust(widths[0]), *numbers, ratio, flags]).rstrip())
    if len(tiles) > top:
        lines.append(f"  and {_tiles(len(tiles) - top)} more")
    for peer in workload.peers:
        if not ran(peer):
            lines.append(f"  {peer['impl']}: {peer.get('reason') or peer['status']}")
    return "\n".join(lines)


def _entry(row: Row, best: Row | None) -> tuple[str, ...]:
    """The cells of one line of a leaderboard."""
    name = row["impl"] if row["impl"] != "tilelab" else f"tilelab {tile_text(row['tile'])}"
    bounds = ""
    if row.get("low_s") and row.get("high_s"):
        slow, fast = speed(row, row["high_s"]), speed(row, row["low_s"])
        bounds = f"[{number_text(slow)}, {number_text(fast)}]"
    share = f"{row['peak_share']:.0%} of peak" if row.get("peak_share") is not None else ""
    flags = "noisy" if row.get("noisy") else ""
    value = f"{number_text(speed(row))} {unit(row['op'])}"
    return name, time_text(seconds(row)), value, bounds, share, paired_text(row, best), flags
