"""`tilelab log`: version, prediction and measurement, a line for each set of shapes.

    tilelab log results.jsonl                                  prints a table
    tilelab log results.jsonl --to perf/results/log.jsonl      also keeps its lines

A results file has a row for every tile. The log has one entry for a set of shapes: how fast our
best tile was predicted to be and was, and how it did against the fastest peer. With an entry for
each commit, the log shows what a change brought, and whether the model can be trusted.

Means are geometric. What was not measured, or not predicted, is null: "–" in the table.
"""

import argparse
import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tilelab.perf.errors import PerfError
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.rows.ranking import Workload

Entry = dict[str, Any]
FIELDS = {  # in the order in which an entry has them: what they mean
    "gpu": "as in results files: a device, or `sm_90 (compiled)`",
    "commit": "of this repository, seven digits; `+` where the working tree differed from it",
    "op": "operator",
    "mode": "as in results files",
    "dtype": "`tf32` for float32 with such products",
    "shapes": "the set: `square`, `resnet50 n32`; `sizes` where they were given one by one",
    "note": "of the results file; null if it has none",
    "count": "number of shapes",
    "unit": "of the two speeds: TFLOP/s of products, GB/s of the rest",
    "predicted": "speed of our best tile by the model, mean over the shapes",
    "measured": "speed of our best tile, mean over the shapes",
    "measured_over_predicted": "mean over the shapes that have both",
    "ratio": "speed over that of the fastest peer, mean; above 1 ours is faster",
    "worst": "the least of these ratios",
    "worst_shape": "and whose it is",
    "compared": "number of shapes that have such a ratio",
    "failed": "shapes in which none of our tiles gave a right result in time",
    "time": "of the newest row: ISO 8601, UTC",
    "versions": "of torch and triton",
}


def entries(headers: Iterable[dict], rows: Iterable[ranking.Row]) -> list[Entry]:
    """The entries of one results file, as `ranking.read` gives it, in the order of its rows."""
    newest = max(headers, key=lambda header: header["created"])
    versions = {name: newest["versions"].get(name) for name in ("torch", "triton")}
    sets: dict[tuple, list[Workload]] = {}
    for w in distinct_work(rows):
        about = w.gpu, w.op, w.mode, ranking.dtype_text(w.dtype, w.precision), w.family or "sizes"
        sets.setdefault(about, []).append(w)
    common = {"note": newest.get("note") or None, "versions": versions}
    return [_entry(about, common, of) for about, of in sets.items()]


def distinct_work(rows: Iterable[ranking.Row]) -> list[Workload]:
    """The workloads of rows, each shape once: with a cold cache, or the other if that has none.

    Work that was not tried is left out; work in which every tile failed is not.
    """
    once: dict[tuple, Workload] = {}
    for w in ranking.workloads(rows):
        about = w.gpu, w.measured, w.op, w.mode, w.dtype, w.precision, tuple(w.shape.items())
        failed = any(row["status"] in ("wrong", "error") for row in w.tiles)
        if (w.best or w.best_peer or failed) and _claim(w) > _claim(once.get(about)):
            once[about] = w
    return list(once.values())


def _claim(w: Workload | None) -> tuple:
    """Which of a hot and a cold workload counts: the one that was measured, then the cold one."""
    if w is None:
        return ()
    timed = w.best is not None and w.best.get("median_s") is not None
    return timed, w.best_peer is not None, w.cache == "cold"


def _entry(about: tuple, common: Entry, work: Sequence[Workload]) -> Entry:
    """One set of shapes as an entry."""
    best = [w.best for w in work if w.best]
    predicted = [row for row in best if row.get("predicted_s")]
    measured = [row for row in best if row.get("median_s")]
    compared = ranking.speedups(work)
    worst = min(compared, key=lambda speedup: speedup.ratio, default=None)
    newest = max(
        (row for w in work for row in (*w.tiles, *w.peers)), key=lambda r: r.get("time") or ""
    )
    found = dict(
        zip(("gpu", "op", "mode", "dtype", "shapes"), about, strict=True),
        commit=newest["commit"] or None,
        count=len(work),
        unit=ranking.unit(about[1]),
        predicted=_mean(ranking.speed(row, row["predicted_s"]) for row in predicted),
        measured=_mean(ranking.speed(row) for row in measured),
        measured_over_predicted=_mean(
            row["predicted_s"] / row["median_s"] for row in predicted if row.get("median_s")
        ),
        ratio=_mean(speedup.ratio for speedup in compared),
        worst=worst and _short(worst.ratio),
        worst_shape=worst and worst.workload.name,
        compared=len(compared),
        failed=sum(w.best is None for w in work),
        time=newest.get("time"),
        **common,
    )
    return {name: found[name] for name in FIELDS}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return _short(stats.geomean(values)) if values else None


def _short(value: float) -> float:
    """Six digits: the rest is noise, and would make every line another one."""
    return float(f"{value:.6g}")


# -- the file ------------------------------------------------------------------------------------


def append(path: Path, new: Iterable[Entry]) -> int:
    """Add entries to a log, but for those that it has already; return how many were added.

    The file is written whole: it is as before or complete, whenever this is interrupted.
    """
    with results.locked(path):
        old = read(path)
        known = {_identity(entry) for entry in old}
        added = list({_identity(e): e for e in new if _identity(e) not in known}.values())
        if added:
            lines = (json.dumps(entry) + "\n" for entry in (*old, *added))
            results.write_whole(path, "".join(lines).encode())
    return len(added)


def read(path: Path) -> list[Entry]:
    """The entries of a log; none of a file that is not there."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise PerfError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # of what is no entry
            entry = json.loads(line)
            if all(isinstance(entry[name], str) for name in ("gpu", "op", "shapes")):
                found.append(entry)
        if len(found) != number:
            raise PerfError(f"{path}, line {number}: damaged: not an entry of a log")
    return found


def _identity(entry: Entry) -> str:
    """All but the time: that it was measured again is no news if the numbers are the same."""
    return json.dumps([entry.get(name) for name in FIELDS if name != "time"], sort_keys=True)


# -- the table -----------------------------------------------------------------------------------

COLUMNS = {  # heading: how an entry fills it
    "GPU": lambda e: e["gpu"],
    "commit": lambda e: e["commit"] or "–",
    "operator": lambda e: f"{e['op']} {e['mode']}",
    "dtype": lambda e: e["dtype"],
    "shapes": lambda e: f"{e['shapes']} ({e['count']})",
    "predicted": lambda e: _speed(e, "predicted"),
    "measured": lambda e: _speed(e, "measured"),
    "measured / predicted": lambda e: _times(e["measured_over_predicted"], ""),
    "against the best peer": lambda e: _times(e["ratio"]),
    "worst": lambda e: f"{_times(e['worst'])} {e['worst_shape'] or ''}".rstrip(),
    "no result": lambda e: str(e["failed"] or ""),
    "note": lambda e: e["note"] or "",
}


def _speed(entry: Entry, name: str) -> str:
    value = entry[name]
    return "–" if value is None else f"{ranking.number_text(value)} {entry['unit']}"


def _times(value: float | None, sign: str = "x") -> str:
    return "–" if value is None else f"{value:.2f}{sign}"


def markdown(shown: Iterable[Entry]) -> str:
    """The entries as a Markdown table."""
    lines = [[fill(e) for fill in COLUMNS.values()] for e in shown]
    return ranking.markdown_table(list(COLUMNS), lines)


# -- command line --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which files to log, and whereto."""
    parser.add_argument("results", nargs="+", metavar="FILE", help="results files (JSON lines)")
    parser.add_argument(
        "--to", type=Path, metavar="LOG", help="append to this log (perf/results/log.jsonl)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and append to the log if there is one."""
    found = [entry for path in args.results for entry in entries(*ranking.read([path]))]
    if not found:
        raise PerfError("nothing to log: nothing has a time, measured or predicted")
    print(markdown(found))
    if args.to:
        added = append(args.to, found)
        print(f"\n{args.to}: {added} added, {len(found) - added} of {len(found)} known")
    return 0
