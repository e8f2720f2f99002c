"""What a tile does, and why it lost: its numbers beside those of the tile that won, in words.

    tilelab sweep ...                          ends with the leaderboard, and why the others lost
    tilelab report ...                         has both in full
    tilelab compile OP --explain -a ...        what one tile does

A losing tile goes through a list of possible causes, the worst first. Some disqualify it: a wrong
result, an error, a block that does not fit. Some ruin it: spilled registers, no tensor cores,
serialised wgmma, narrow loads. Others cost a share of its speed: occupancy, the last wave, padding,
a longer main loop, more memory traffic. A cause counts only if the winner has less of it.

The model of compiler/prediction.py contains some causes: waves and padding, and instructions and
traffic where they are the limit. Such a cause is given as a factor: the tile's predicted time over
its predicted time with the winner's value. Factors multiply, so the shares of a gap are computed in
logarithms: 1.1x is 35% of 1.31x. Other causes are named with their numbers, and no share is
claimed.
"""

import math
import pathlib
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tilelab.perf.rows.ranking import (
    NAMES,
    Row,
    Workload,
    cut,
    has_result,
    known_gpu,
    leaderboard,
    number_text,
    seconds,
    speed,
    tile_label,
    tile_text,
    time_text,
    unit,
    workloads,
)
from tilelab.perf.work import gpus
from tilelab.perf.work.gpus import GPU
from tilelab.perf.work.operators import is_product, tile_op
from tilelab.perf.work.tile_work import ALIKE, LAUNCH_S, itemsize, loop_warps, step_flops

TIE = 0.01  # a tile within 1% of the winner lost nothing that needs an explanation
LESS = 0.9  # below nine tenths of the winner's value a share counts as less
TITLES = {  # code: the cause, as a heading of the tiles that it is true of
    "best": "the winner",
    "tie": "as fast as the winner",
    "wrong": "wrong result",
    "error": "failed",
    "does not fit": "too large for an SM",
    "spills": "registers spilled to memory",
    "no tensor cores": "no tensor cores",
    "older tensor cores": "older tensor-core instructions",
    "serialised": "serialised wgmma",
    "narrow loads": "narrow loads",
    "occupancy": "fewer warps on an SM",
    "waves": "idle SMs",
    "padding": "more padding",
    "loop": "more instructions",
    "traffic": "more memory traffic",
    "pruned": "pruned before timing",
    "skipped": "not tried",
    "unexplained": "slower for no reason that these numbers show",
}

INSIDE = ("compute", "power", "issue", "l2", "shared memory", "latency")  # limits of the SMs
LINES = 24  # source lines that are shown
MEMORY = {
    "sectors": "sectors of global memory (32 bytes)",
    "wavefronts": "wavefronts of shared memory (128 bytes)",
}
COUNTED = {"TMA bytes": "bytes moved by TMA", "waits": "lanes that waited at an mbarrier"}


# -- why a tile lost: the cascade ----------------------------------------------------------------


def explain_loss(row: Row, best: Row | None, gpu: GPU | None = None) -> tuple[str, str]:
    """Say why a tile lost against its workload's best one, None where no tile has a time.

    It returns a code, one of `TITLES`, and a sentence with the numbers.
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
            many = f" x {row['threads']} threads" if row.get("threads") else " a thread"
            return "does not fit", f"a block needs {row['registers']}{many} registers"
        return "does not fit", reason or limit
    if row["status"] == "error":
        kind = "does not compile" if row["stage"] == "compile" else "fails when it runs"
        return "error", f"{kind}: {reason}" if reason else kind
    return None


def _cause(row: Row, best: Row, gpu: GPU | None) -> tuple[str, str]:
    """The cascade for a tile that runs."""
    gap = _gap(row, best)
    timed = row.get("median_s") and best.get("median_s")
    if gap is not None and gap < 1 + (TIE if timed else ALIKE) and row["status"] != "pruned":
        return "tie", f"{time_text(seconds(row))}, the winner {time_text(seconds(best))}"
    if ruined := _ruined(row, best):
        return ruined
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


def _ruined(row: Row, best: Row) -> tuple[str, str] | None:
    """What ruins this tile and not the winner: a code and a sentence, the worst first."""
    spilled, least = row.get("spills") or 0, best.get("spills") or 0
    core, winners = row.get("tensor_core") or "", best.get("tensor_core") or ""
    load, widest = row.get("load_bytes"), best.get("load_bytes")
    if spilled > least:
        return "spills", _spill_words(row, spilled, least)
    if winners and not core:
        words = f"no tensor-core instruction in its main loop; the winner has {winners}"
        return "no tensor cores", words
    if core.startswith("HMMA") and winners.startswith(("HGMMA", "UTC")):
        words = f"{core}, which reads operands from registers; the winner has {winners}"
        return "older tensor cores", words
    if row.get("serialised") and not best.get("serialised"):
        words = "the compiler put a wait after every wgmma: the tensor cores idle while it loads"
        return "serialised", words
    if load and widest and load < widest:
        return "narrow loads", f"its narrowest loads are {load} bytes wide, the winner's {widest}"
    return None


def _spill_words(row: Row, spilled: int, least: int) -> str:
    words = f"spills {spilled} bytes a thread to memory"
    words += f", the winner {least}" if least else ""
    tile = row.get("tile") or {}
    if {"BLOCK_M", "BLOCK_N", "num_warps"} <= set(tile) and is_product(row["op"]):
        held = tile["BLOCK_M"] * tile["BLOCK_N"] // (32 * loop_warps(tile))
        words += f": its accumulators alone take {held} of 255 registers" if held >= 96 else ""
    return words


class Cause(NamedTuple):
    """A cause that costs a share: `factor` of the time, or 1 where no model says how much."""

    code: str
    words: str
    factor: float


def _modelled(row: Row, gpu: GPU | None, ratio: float, bounds: tuple[str, ...]) -> float:
    """Predicted time over that if what binds the tile, one of `bounds`, were `ratio` times faster.

    It is at least what the tensor cores and the memory take, which that does not make faster.
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
    words, limit = f"occupancy {mine:.0%}", row.get("limit")
    words += f", limited by {limit}" if limit else ""
    if limit == "registers" and row.get("registers"):
        words += f" ({row['registers']} a thread)"
    elif limit == "shared memory" and row.get("shared"):
        words += f" ({row['shared'] / 1024:.0f} KiB a block)"
    return Cause("occupancy", f"{words}; the winner {other:.0%}", 1.0)


def _waves(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = row.get("wave_efficiency"), best.get("wave_efficiency")
    if not mine or not other or mine >= 0.97 * other:
        return None
    waves, idle = row.get("waves"), 1 - mine
    words = f"{idle:.0%} of the SMs' time is idle, {1 - other:.0%} with the winner"
    if waves is not None:
        words = f"{waves:.2f} waves: {words}"
    return _if_it_binds("waves", words, row, gpu, other / mine)


def _padding(row: Row, best: Row, gpu: GPU | None) -> Cause | None:
    mine, other = row.get("padding"), best.get("padding")
    if not mine or not other or mine <= 1.03 * other:
        return None
    words = f"{1 - 1 / mine:.0%} of its work is padding, {1 - 1 / other:.0%} of the winner's"
    return _if_it_binds("padding", words, row, gpu, mine / other)


def _if_it_binds(code: str, words: str, row: Row, gpu: GPU | None, ratio: float) -> Cause | None:
    """A cause that makes computing slower, unless the tile is predicted to wait for memory."""
    factor = _modelled(row, gpu, ratio, INSIDE)
    return Cause(code, words, factor) if factor > 1.01 or not row.get("predicted_s") else None


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
    return Cause("loop", words, _modelled(row, gpu, mine / other, ("issue",)))


def _operand_bytes(row: Row) -> float | None:
    """Bytes that programs read for 1,000 FLOPs of a product: those of one row and column a step."""
    tile = row.get("tile") or {}
    if not {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(tile):
        return None
    bytes_a_step = itemsize(row["dtype"]) * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"]
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
    words = []
    if row.get("median_s") and row.get("predicted_s") and best.get("predicted_s"):
        words.append(
            f"predicted: {row['predicted_s'] / best['predicted_s']:.2f}x the winner's time"
        )
    mine, other = row.get("tile") or {}, best.get("tile") or {}
    differ = [
        f"{name} {mine[name]} instead of {other[name]}"
        for name in mine
        if name in other and mine[name] != other[name]
    ]
    for field in ("tensor_core", "operands", "tma", "registers"):
        if None not in (a := row.get(field), b := best.get(field)) and a != b:
            differ.append(f"{field.replace('_', ' ')} {a} instead of {b}")
    words += ["it has " + ", ".join(differ)] if differ else []
    return "; ".join(words) or "these numbers do not say why"


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
            Verdict(row, *explain_loss(row, best, gpu), _shown_gap(row, best) if best else None)
            for row in workload.tiles
        ]
        verdicts.sort(key=lambda v: (v.code != "best", v.gap is None, v.gap or 0))
        tables.append(Table(workload, verdicts))
    return tables


def _shown_gap(row: Row, best: Row) -> float | None:
    """Time over the winner's, unless the one is measured and the other only predicted."""
    if not has_result(row) or (row.get("median_s") is None) != (best.get("median_s") is None):
        return None
    return _gap(row, best)


def format_table(tables: Sequence[Table], tiles: int = 3) -> str:
    """The verdicts as text for a terminal, grouped by cause; of each the fastest tiles, so many.

    Of tiles as fast as the winner there is nothing to explain: they are only named.
    """
    return "\n\n".join(_table_text(t, tiles) for t in tables if t.workload.tiles)


def _table_text(table: Table, tiles: int) -> str:
    workload, best = table.workload, table.workload.best
    lines = [f"{workload.title}, {workload.name}, on {workload.gpu}"]
    if best:
        origin = "" if best.get("median_s") else " (predicted, not measured)"
        lines.append(f"  best of {_tiles(len(workload.tiles))}: {_result(best)}{origin}")
    else:
        lines.append(f"  none of {_tiles(len(workload.tiles))} has a time")
    lines += _default_text(table)
    for code, verdicts in table.groups:
        if code == "tie":
            names = ", ".join(tile_label(v.row) for v in verdicts[:tiles])
            more = f" and {len(verdicts) - tiles} more" if len(verdicts) > tiles else ""
            lines.append(f"  {_tiles(len(verdicts))}: {TITLES[code]}: {names}{more}")
            continue
        lines.append(f"  {_tiles(len(verdicts))}: {TITLES[code]}{_range(verdicts)}")
        for verdict in verdicts[:tiles]:
            gap = "     –" if verdict.gap is None else f"{verdict.gap:.2f}x".rjust(6)
            tile = tile_label(verdict.row)
            lines.append(f"    {gap}  {tile:<22} {cut(verdict.words, 150)}")
        if len(verdicts) > tiles:
            lines.append(f"      and {len(verdicts) - tiles} more")
    return "\n".join(lines)


def _default_text(table: Table) -> list[str]:
    """A line on the tile that a call takes where nothing is tuned, unless it is the best."""
    for v in table.verdicts:
        if v.row.get("default") and v.code != "best":
            times = "" if v.gap is None else f"{v.gap:.2f}x the winner's time: "
            return [f"  the default tile: {tile_text(v.row['tile'])}, {times}{TITLES[v.code]}"]
    return []


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"


def _range(verdicts: Sequence[Verdict]) -> str:
    gaps = [f"{v.gap:.2f}x" for v in verdicts if v.gap is not None]
    if not gaps or len(verdicts) == 1:
        return ""
    to = f" to {gaps[-1]}" if gaps[-1] != gaps[0] else ""
    return f" ({gaps[0]}{to} the winner's time)"


def _result(row: Row) -> str:
    return f"{tile_label(row)}, {number_text(speed(row))} {unit(row['op'])}"


def leaderboard_text(rows: Iterable[Row], most: int = 5) -> str:
    """Of each workload the fastest tiles, so many, and every peer, as text for a terminal."""
    return "\n\n".join(_leaderboard_text(workload, most) for workload in workloads(rows))


def _leaderboard_text(workload: Workload, most: int) -> str:
    lines = [f"{workload.title}, {workload.name}, on {workload.gpu}"]
    lines[0] += "" if workload.measured else " (predicted, not measured)"
    entrants = leaderboard(workload, most)
    if not entrants:
        return f"{lines[0]}\n  nothing has a time ({_tiles(len(workload.tiles))} tried)"
    cells = [
        (f"{e.name} {e.tile}".rstrip(), e.time, e.speed, e.interval,
         e.share and f"{e.share} of peak", e.ratio)
        for e in entrants
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for (name, *numbers, ratio), entrant in zip(cells, entrants, strict=True):
        numbers = map(str.rjust, numbers, widths[1:])
        flags = "noisy" if entrant.row.get("noisy") else ""
        lines.append("  ".join(["", name.ljust(widths[0]), *numbers, ratio, flags]).rstrip())
    left = sum(map(has_result, workload.tiles)) - most
    lines += [f"  and {_tiles(left)} more"] if left > 0 else []
    for peer in workload.peers:
        if not has_result(peer):
            lines.append(f"  {NAMES[peer['impl']]}: {peer.get('reason') or peer['status']}")
    return "\n".join(lines)


# -- what a tile does ----------------------------------------------------------------------------


def describe_tile(row: Row, gpu: GPU) -> str:
    """A compiled row (see perf/commands/compile.py) in some ten sentences, for a terminal."""
    tile = ", ".join(f"{name}={value}" for name, value in row["tile"].items())
    what = f"{row['op']} {row['mode']} {row['dtype']}, {row['shape_name']}"
    sentences = [f"BAD: {row['failed']}"] if row.get("failed") else _sentences(row, gpu)
    paragraphs = [
        textwrap.fill(s, 96, initial_indent="  - ", subsequent_indent="    ") for s in sentences
    ]
    return f"{what}, for the {gpu.title}\n{tile}\n\n" + "\n".join(paragraphs)


def _sentences(row: Row, gpu: GPU) -> Iterator[str]:
    yield from _work(row, gpu)
    yield from _resources(row)
    yield from _main_loop(row)
    if row.get("waves") is not None and row["blocks_per_sm"]:
        yield from _grid(row, gpu)
    if row.get("predicted_s"):
        waits_for = {
            "compute": "the tensor cores' rate (or the FMA units')",
            "power": "the clock that its power leaves it, at the tensor cores' best known speed",
            "memory": "device memory",
            "l2": "L2: larger tiles read less",
            "issue": "issuing the loop's instructions",
            "shared memory": "shared memory: larger tiles read and write less of it",
            "latency": "loads under way, of which more stages or more programs an SM hide more",
            "launch": "launching",
        }[row["bound"]]
        time = f"{time_text(row['predicted_s'])}, {number_text(speed(row))} {unit(row['op'])}"
        known = f" ({row['known']})" if row.get("known") else ""
        yield f"Predicted, not measured{known}: {time}; what it waits for is {waits_for}."


def _work(row: Row, gpu: GPU) -> Iterator[str]:
    """How much there is to do, and which ceiling that means."""
    intensity = row["flops"] / row["bytes"]
    ridge = gpu.peak(gpus.kind(row["dtype"], row["precision"])) / gpu.bandwidth
    ceiling = "the arithmetic" if intensity > ridge else "memory"
    yield (
        f"The work: {row['flops'] / 1e9:.4g} GFLOP over at least {row['bytes'] / 1e6:.4g} MB, "
        f"{intensity:.4g} FLOPs a byte. The GPU does {ridge:.0f} in the time of a byte, so "
        f"{ceiling} is the ceiling."
    )
    if row["moved"] > 1.05 * row["bytes"]:
        yield (
            f"Its {row['launches']} launches move {row['moved'] / row['bytes']:.2f} times that "
            "minimum: intermediate results are written and read again."
        )


def _resources(row: Row) -> Iterator[str]:
    """What a program takes of an SM, and so how many fit."""
    if row["spills"]:
        yield (
            f"BAD: {row['spills']} bytes a thread are spilled to memory for want of registers. "
            "Use more warps, or a smaller BLOCK_M x BLOCK_N."
        )
    if row["blocks_per_sm"] == 0:
        yield f"BAD: it cannot be launched: {row['limit']}."
        return
    tile, accumulator, low = row["tile"], "", ""
    if "BLOCK_K" in tile:
        per_thread = tile["BLOCK_M"] * tile["BLOCK_N"] / row["threads"]
        accumulator = f", of which the accumulator takes {per_thread:.0f}"
    elif row["occupancy"] < 0.25:
        low = " LOW: too few loads are in flight to hide the memory's latency."
    yield (
        f"{row['registers']} registers a thread{accumulator}; {row['shared'] / 1024:.1f} KiB of "
        "shared memory a program."
    )
    yield (
        f"{row['blocks_per_sm']} x {tile.get('num_warps', 4)} warps fit an SM: "
        f"occupancy {row['occupancy']:.0%}, limited by {row['limit']}.{low}"
    )


def _main_loop(row: Row) -> Iterator[str]:
    """Which instructions it has."""
    core, width = row.get("tensor_core"), row.get("load_bytes")
    if core:
        operand = f", its first operand from {row['operands']}" if row.get("operands") else ""
        yield f"Tensor cores: {core}, {row['tensor_cores_in_loop']} in the main loop{operand}."
    elif "BLOCK_K" in row["tile"]:
        yield "BAD: no tensor cores: products are done one by one."
    if row.get("serialised"):
        yield "BAD: the wgmma instructions are serialised, each waits for the one before."
    if width:
        loads = "TMA" if row.get("tma") else f"{width} bytes a thread at the narrowest"
        bad = " NARROW: 16 are possible where the addresses allow it." if width < 16 else ""
        yield f"Loads: {loads}.{bad}"
    if row.get("loop_instructions"):
        mix = ", ".join(f"{n} {name}" for name, n in (row.get("loop_mix") or {}).items() if n)
        yield f"The main loop has {row['loop_instructions']} instructions ({mix})."


def _grid(row: Row, gpu: GPU) -> Iterator[str]:
    """How its programs fill the GPU, and its tiles the work."""
    idle, bad = 1 - row["wave_efficiency"], ""
    if idle > 0.15:
        bad = " BAD" if idle > 0.3 else ""
        bad += f": the busiest SM has {math.ceil(row['programs'] / gpu.sms)}, and {idle:.0%} of the"
        bad += " SMs' time is idle. Smaller tiles or a split sum would fill it"
    yield (
        f"{row['programs']} programs on {gpu.sms} SMs, {row['blocks_per_sm']} at a time on each: "
        f"{row['waves']:.2f} waves{bad}."
    )
    if row["padding"] > 1.02:
        sizes = ", ".join(f"{k}={v}" for k, v in row["sizes"].items())
        yield f"Tiles cover {row['padding']:.2f} times the work: blocks do not divide {sizes}."


def annotate(loop: list[tuple[str, int, str]]) -> str:
    """The main loop's instructions, and beside them the source lines that they come from."""
    if not loop:
        return "\nThere is no loop to show, or no line information for this target."
    sources: dict[str, list[str]] = {}
    lines, before = ["", "The main loop, and where it comes from:"], None
    for file, number, instruction in loop:
        path = pathlib.Path(file)
        if file not in sources:
            sources[file] = path.read_text().splitlines() if path.is_file() else []
        source = ""
        if (file, number) != before:
            text = sources[file][number - 1].strip() if 0 < number <= len(sources[file]) else ""
            source = f"{path.name}:{number}  {text}"
        before = file, number
        lines.append(f"  {instruction:48.48}  {source}".rstrip())
    return "\n".join(lines)


def counted(report: dict) -> str:
    """What one program did on the machine, in all and by source line: see perf/machine."""
    if report.get("failed"):
        return f"\nNot executed: {report['failed']}."
    counts, grid = report["counts"], math.prod(report["grid"])
    lines = [
        "",
        f"Executed by the machine, one program of {grid}, of {report['threads'] // 32} warps:",
        f"  instructions of the PTX, by all warps: {counts['instructions']:,}",
    ]
    kinds = {k.partition(": ")[2]: n for k, n in counts.items() if k.startswith("instructions: ")}
    for kind, n in sorted(kinds.items(), key=lambda x: -x[1]):
        lines.append(f"    {kind:24} {n:10,}")
    for name, words in MEMORY.items():
        if counts.get(name):
            ideal = counts[f"{name}, ideal"]
            note = "" if counts[name] <= ideal else f", {counts[name] / ideal:.2f} x as many"
            lines.append(f"  {words}: {counts[name]:,}, ideal {ideal:,}{note}")
    for name in ("TMA bytes", "waits"):
        if counts.get(name):
            lines.append(f"  {COUNTED[name]}: {counts[name]:,}")
    lines += ["", "Of each source line: instructions, sectors and wavefronts (x their ideal)"]
    places = sorted(report["lines"], key=lambda x: -x[2]["instructions"])[:LINES]
    for file, number, found in sorted(places, key=lambda x: x[:2]):
        cells = [f"{found['instructions']:10,}"]
        for name in MEMORY:
            share = found[name] / found[f"{name}, ideal"] if found.get(name) else None
            cells.append(f"{found[name]:8,} {share:5.2f}x" if share else " " * 15)
        path = pathlib.Path(file)
        source = path.read_text().splitlines() if path.is_file() else []
        text = source[number - 1].strip() if 0 < number <= len(source) else ""
        lines.append(f"  {' '.join(cells)}  {path.name}:{number}  {text}"[:132].rstrip())
    return "\n".join(lines)
