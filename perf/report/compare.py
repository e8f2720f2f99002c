"""Two results files of the same workloads: what became faster or slower, and is it certain?

    tilelab compare before.jsonl after.jsonl

For every workload that both files have, the ratio of the times B / A: above 1, B takes longer. Its
95% interval comes from the samples of both (stats.unpaired_ratio). perf/README.md says what the
verdicts mean.

A power cap does not count as throttling here. Large products run into it in every round of every
run, and the clock that it leaves is part of how fast they are.

The interval knows how the samples of each run spread. It does not know what else changed between
the runs: the room was warmer, or the memory lay elsewhere. The peers show that, because their code
did not change. If they drifted by 3%, the machine did, and 3% in our times mean nothing.
"""

import argparse
import math
from collections import Counter, defaultdict
from typing import NamedTuple

from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results, stats
from tilelab.perf.rows.ranking import (
    NAMES,
    Row,
    best_tile,
    dtype_text,
    has_result,
    seconds,
    shape_text,
    tile_text,
    time_text,
)

VERDICTS = ("SLOWER", "FASTER", "SAME", "UNSURE")
MARGIN = 0.02


class Comparison(NamedTuple):
    """One line of a comparison: rows `a` and `b`, and the ratio of their times with its interval.

    `ratio` is None if b has no right result. `source`, of the kernels, is "same" or "changed"; ""
    for peers, and where it is not known.
    """

    a: dict
    b: dict
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str
    source: str
    note: str

    @property
    def ours(self) -> bool:
        """Whether this is about our kernels, and not about a peer."""
        return self.a["impl"] == "tilelab"


def compare(
    a_rows: list[dict], b_rows: list[dict], margin: float = MARGIN, every_tile: bool = False
) -> list[Comparison]:
    """Compare rows as results.read gives them: the best tiles, or every tile; the worst first.

    Finalists are compared, or what was only screened where there is none; predictions with
    predictions. What only one of both has is left out, with one exception: where a has a right
    result and b tried and has none, that is the worst of all.
    """
    a_best, b_best = _best(a_rows, every_tile), _best(b_rows, every_tile)
    b_failed = {
        _subject(row, every_tile): row for row in b_rows if row["status"] in ("wrong", "error")
    }
    found = []
    for subject, a in a_best.items():
        if subject in b_best:
            found.append(_compared(a, b_best[subject], margin))
        elif subject in b_failed:
            b = b_failed[subject]
            reason = f"{b['status']} in B: {b.get('reason') or 'no reason given'}"
            found.append(Comparison(a, b, None, None, None, "UNSURE", _source(a, b), reason))
    return sorted(found, key=lambda c: -math.inf if c.ratio is None else -c.ratio)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two files, and what to make of their differences."""
    parser.add_argument("a", help="results before")
    parser.add_argument("b", help="results after")
    text = "differences up to this are none (default: %(default)g)"
    parser.add_argument("--margin", type=float, default=100 * MARGIN, metavar="PERCENT", help=text)
    text = "compare tile by tile, not the best tile of each workload"
    parser.add_argument("--every-tile", action="store_true", help=text)
    text = "exit with 1 if a kernel of ours is slower or has no right result any more; "
    text += "unsure: or if that is not certain"
    parser.add_argument("--fail-on", choices=("slower", "unsure"), help=text)
    text = "compare two GPUs, or predictions with measurements"
    parser.add_argument("--anyway", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Compare two files and print what came of it; 1 if --fail-on found something, otherwise 0."""
    if not 0 <= args.margin < 100:
        raise PerfError(f"--margin must be from 0 to 100 percent, got {args.margin:g}")
    a, b = (results.read(path) for path in (args.a, args.b))
    runs = _headings(args.a, a, args.b, b, args.anyway)
    found = compare(a.rows, b.rows, args.margin / 100, args.every_tile)
    if not found:
        raise PerfError(f"{args.a} and {args.b} have no right result of one workload in common")
    print(*runs, "", format_table(found), "", summary(found), sep="\n")
    return int(failed(found, args.fail_on))


def failed(found: list[Comparison], fail_on: str | None) -> bool:
    """Return whether --fail-on is to fail; peers do not count."""
    bad = {None: (), "slower": ("SLOWER",), "unsure": ("SLOWER", "UNSURE")}[fail_on]
    return bool(bad) and any(c.verdict in bad or c.ratio is None for c in found if c.ours)


def format_table(found: list[Comparison]) -> str:
    """Return an aligned table, our kernels first and then the peers."""
    head = ("verdict", "B / A", "95% interval", "A", "B", "source", "what", "tile", "note")
    lines = [head, *(_cells(c) for c in found if c.ours)]
    peers = [_cells(c) for c in found if not c.ours]
    if peers:
        lines += [("",) * len(head), ("peers",) + ("",) * (len(head) - 1), *peers]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = ("B / A", "95% interval", "A", "B")
    sides = [str.rjust if name in right else str.ljust for name in head]
    texts = (
        "  ".join(s(*of) for s, *of in zip(sides, line, widths, strict=True)) for line in lines
    )
    return "\n".join(text.rstrip() for text in texts)


def summary(found: list[Comparison]) -> str:
    """Return three lines: verdicts and the mean ratio, the sources, and the drift of the peers."""
    ours = [c for c in found if c.ours]
    ratios = [c.ratio for c in ours if c.ratio is not None]
    peers = [c.ratio for c in found if not c.ours and c.ratio is not None]
    verdicts, sources = Counter(c.verdict for c in ours), Counter(c.source for c in ours)
    first = "tilelab: " + ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)
    first += f"; geometric mean of B / A {stats.geomean(ratios):.3f}" if ratios else ""
    lost = len(ours) - len(ratios)
    lines = [first + (f"; {lost} with no right result in B" if lost else "")]
    if sources["changed"] or sources["same"]:
        text = f"changed in {sources['changed']}, same in {sources['same']} of {len(ours)}"
        slower = sum(c.verdict == "SLOWER" and c.source == "same" for c in ours)
        if slower:
            text += f"; {slower} SLOWER with the same source: the machine or the compiler"
        lines.append(f"kernel source: {text}")
    if peers:
        mean, least, most = (
            f"{100 * (r - 1):+.1f}%" for r in (stats.geomean(peers), min(peers), max(peers))
        )
        text = f"drifted by {mean} (geometric mean of {len(peers)}, from {least} to {most})"
    else:
        text = "none in both files, so a drift of the machine would not be seen"
    return "\n".join([*lines, f"peers: {text}"])


# -- which rows, and what they say -----------------------------------------------------------------


def _subject(row: dict, every_tile: bool) -> tuple:
    """Return what is compared: a workload and an implementation, perhaps with its tile."""
    tile = row.get("tile")
    tile = tuple(sorted(tile.items())) if every_tile and tile else None
    return *results.workload(row), row["impl"], row.get("cache") or "cold", tile


def _best(rows: list[Row], every_tile: bool) -> dict[tuple, Row]:
    """Return the row to compare of each subject: the fastest finalist, or else the fastest."""
    groups = defaultdict(list)
    for row in rows:
        groups[_subject(row, every_tile)].append(row)
    return {subject: best for subject, group in groups.items() if (best := best_tile(group))}


def _compared(a: dict, b: dict, margin: float) -> Comparison:
    ratio, low, high = _ratio(a, b)
    verdict = _verdict(ratio, low, high, margin)
    notes = []
    for name, row in (("A", a), ("B", b)):
        if row["status"] == "predicted":
            notes.append(f"{name} predicted")
            continue
        if row.get("noisy"):
            notes.append(f"{name} noisy")
        if row.get("throttled"):
            why = ", ".join(row.get("throttle_reasons") or ["no reason given"])
            notes.append(f"{name} throttled in {row['throttled']} rounds: {why}")
        if row["stage"] == "screen":
            notes.append(f"{name} only screened")
        only_power = row.get("throttle_reasons") == ["power cap"]
        if row.get("noisy") or (row.get("throttled") and not only_power):
            verdict = "UNSURE"
    if low is None:
        notes.append("no samples: no interval")
    if a.get("tile") != b.get("tile"):
        notes.append(f"tile in A: {tile_text(a.get('tile'))}")
    return Comparison(a, b, ratio, low, high, verdict, _source(a, b), ", ".join(notes))


def _ratio(a: dict, b: dict) -> tuple[float, float | None, float | None]:
    """Return b / a and its interval, which is exact for predictions and None without samples."""
    if a.get("samples_s") and b.get("samples_s") and "predicted" not in (a["status"], b["status"]):
        return stats.unpaired_ratio(b["samples_s"], a["samples_s"])
    ratio = seconds(b) / seconds(a)
    exact = a["status"] == b["status"] == "predicted"
    return (ratio, ratio, ratio) if exact else (ratio, None, None)


def _verdict(ratio: float, low: float | None, high: float | None, margin: float) -> str:
    if low is None:
        return "UNSURE"
    if 1 - margin <= low and high <= 1 + margin:
        return "SAME"
    if low > 1 and ratio > 1 + margin:
        return "SLOWER"
    if high < 1 and ratio < 1 - margin:
        return "FASTER"
    return "UNSURE"


def _source(a: dict, b: dict) -> str:
    if a["impl"] != "tilelab" or not (a.get("source") and b.get("source")):
        return ""
    return "same" if a["source"] == b["source"] else "changed"


# -- text ------------------------------------------------------------------------------------------


def _headings(a_path, a, b_path, b, anyway: bool) -> list[str]:
    """Return a line on A, one on B, and lines on what differs; refuse what must not be compared."""
    (a_gpu, a_measured), (b_gpu, b_measured) = _one_gpu(a_path, a), _one_gpu(b_path, b)
    warnings = []
    if a_gpu != b_gpu:
        warnings.append(f"these are two GPUs, {a_gpu} and {b_gpu}")
    if a_measured != b_measured:
        warnings.append(f"{a_path if a_measured else b_path} is measured, the other is predicted")
    if warnings and not anyway:
        raise PerfError(f"{'; '.join(warnings)}: compare them with --anyway, if you must")
    if not a_measured and not b_measured:
        warnings.append("predicted, not measured: nothing was timed")
    old, new = a.headers[-1], b.headers[-1]
    pairs = {"driver": (old.get("driver"), new.get("driver"))}
    for name in ("torch", "triton", "cuda", "cudnn"):
        pairs[name] = old["versions"].get(name), new["versions"].get(name)
    changed = [f"{name} {x} -> {y}" for name, (x, y) in pairs.items() if x != y]
    if changed:
        warnings.append(f"besides the kernels, these differ: {', '.join(changed)}")
    runs = f"A: {a_path}, {_run(old)}", f"B: {b_path}, {_run(new)}"
    return [*runs, *(f"note: {text}" for text in warnings)]


def _one_gpu(path, found: results.Results) -> tuple[str, bool]:
    """Return the GPU of a file and whether it was measured, which must be one."""
    kinds = {(header["gpu"], header["measured"]) for header in found.headers}
    if not kinds:
        raise PerfError(f"no results in {path}: it is empty")
    if len(kinds) != 1:
        gpus = ", ".join(sorted({gpu for gpu, _ in kinds}))
        raise PerfError(f"{path} has results of several kinds ({gpus}): compare one at a time")
    return kinds.pop()


def _run(header: dict) -> str:
    commit = header.get("commit")
    commit = f"commit {commit[:12]}" if commit else "no commit"
    dirty = " and changes" if header.get("dirty") else ""
    return f"{header['gpu']}, {commit}{dirty}, {header['created']}"


def _cells(c: Comparison) -> tuple[str, ...]:
    ratio = "–" if c.ratio is None else f"{c.ratio:.3f}"
    interval = "–" if c.low is None else f"{c.low:.3f} ... {c.high:.3f}"
    a, b = c.a, c.b
    what = f"{a['op']} {a['mode']} {dtype_text(a['dtype'], a['precision'])}, "
    what += a.get("shape_name") or shape_text(a["shape"])
    what += ", hot cache" if a.get("cache") == "hot" else ""
    tile = tile_text(b.get("tile")) if c.ours else NAMES[a["impl"]]
    times = (time_text(seconds(row) if has_result(row) else None) for row in (a, b))
    return (c.verdict, ratio, interval, *times, c.source, what, tile, c.note)
