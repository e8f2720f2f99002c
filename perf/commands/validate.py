"""`tilelab validate`: holds the prediction to measured times.

    tilelab validate                             the public benchmark: matmul, A100 and H100
    tilelab validate mine.jsonl --out figures    your own lists or results; draws two figures
    tilelab validate --update                    after a change of the model or of the kernel

Every tile is compiled offline and predicted. Tables say how the times agree, and what it costs to
run the tile that the model picks. perf/results/public/README.md describes the format of a list, so
that you can add a card.

What the public benchmark compiles to is committed beside it, for one version of triton and one
kernel. With another one, and for other files, the tiles are compiled first, which takes a few
seconds for each tile of each layout.
"""

import argparse
import contextlib
import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tilelab.kernels import _cost_model, _tile_facts
from tilelab.perf.commands import arguments
from tilelab.perf.compiler import aot, facts
from tilelab.perf.compiler.prediction import LAUNCH_S, predict
from tilelab.perf.errors import PerfError
from tilelab.perf.report import agreement as report
from tilelab.perf.rows import agreement, lists, ranking, results
from tilelab.perf.rows.agreement import Held
from tilelab.perf.rows.lists import TileList
from tilelab.perf.rows.ranking import Row
from tilelab.perf.work.workloads import Workload

_matmul = importlib.import_module("tilelab.kernels.matmul")  # a function of that name hides it
PUBLIC = Path(__file__).parents[1] / "results" / "public"
BENCHMARK, FACTS, SUMMARY = (
    PUBLIC / name for name in ("matmul.jsonl", "facts.jsonl.gz", "summary.json")
)
TERMS = PUBLIC / "terms.json"
# What makes each term of kernels/_cost_model.py vanish.
WITHOUT = {
    "latency of loads": {"LATENCY": 0},
    "4-norm (the longest term alone)": {"SHARPNESS": 200},
    "around the loop": {"AROUND": 0, "STORE_BYTES": math.inf},
    "short runs cost more": {"thin": lambda run: 1.0},
    "a barrier a step": {"BARRIER": 0},
    "shared memory": {"SHARED_BYTES": math.inf},
    "L2": {"L2_BYTES": math.inf},
    "instructions issued": {"SCHEDULERS": math.inf},
    "loads queue for each other": {"QUEUE": 0},
    "mma in order": {"IN_ORDER": 0},
    "memory": {"MEMORY_SHARE": math.inf},
}
LAUNCHES = {"events": 5e-6, "graph": LAUNCH_S}  # s: what a timer sees of an empty kernel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tilelab validate`."""
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE",
        help="lists of measured tiles, or results files (default: the public benchmark)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw two figures into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary here")
    parser.add_argument(
        "--workers", type=arguments.positive,
        help="processes that compile (default: one for each core)",
    )  # fmt: skip
    parser.add_argument(
        "--update", action="store_true",
        help="write the facts, the summary and the figures of the public benchmark anew",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compile, predict and report. Returns the exit status."""
    if args.update and (args.files or args.out or args.json):
        raise PerfError("--update is about the public benchmark: it takes no FILE, --out or --json")
    if args.json and not args.json.parent.is_dir():  # said before the work, not after it
        raise PerfError(f"--json: there is no folder {args.json.parent}")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise PerfError(f"--out: {args.out} is not a folder")
    if not args.files and not BENCHMARK.exists():
        raise PerfError("the public benchmark is in a checkout only: name a FILE")
    found = lists.read(args.files or [BENCHMARK])
    known = _known()
    rows = rows_of(found, known, args.workers)
    held = hold(found, rows)
    summary = agreement.rounded(agreement.summary(held))
    print("Predicted from compiled code, beside measured times. Nothing was timed here.\n")
    print(report.text(summary))
    text = (json.dumps(summary, indent=1) + "\n").encode()
    written = []
    if args.update:
        facts.write(FACTS, known)
        results.write_whole(SUMMARY, text)
        worth = agreement.rounded(terms(found, rows))
        results.write_whole(TERMS, (json.dumps(worth, indent=1) + "\n").encode())
        written += [FACTS, SUMMARY, TERMS]
    elif args.json:
        results.write_whole(args.json, text)
        written.append(args.json)
    if folder := PUBLIC if args.update else args.out:
        written += report.save(held, note(held), folder)
    print(*written, sep="\n")
    return 0


def _known() -> facts.Facts:
    """The committed facts, if they are of this triton and this kernel."""
    if not FACTS.exists():
        return facts.Facts()
    header, known = facts.read(FACTS)
    if header == facts.today():
        return known
    print("The committed facts are of another triton or kernel, so every tile is compiled.")
    return facts.Facts()


def rows_of(
    found: Sequence[TileList], known: facts.Facts, workers: int | None = None
) -> list[list[Row]]:
    """Return a row for each tile of each list, to predict; compile what is not `known`."""
    public = [each for each in found if each.layout]
    known.complete(public, workers)
    jobs = {}
    for at, each in enumerate(found):
        if not each.layout:
            w = workload(each)
            for i, tile in enumerate(each.tiles):
                jobs[at, i] = w, tile, each.gpu.target
    rows: list[list[Row]] = []
    for each in found:
        if each.layout:
            rows.append([known.row(each, tile) for tile in each.tiles])
        else:
            identity = arguments.identity(workload(each), each.source or "")
            rows.append([identity | {"tile": tile} for tile in each.tiles])
    for (at, i), fact in facts.compiled(jobs, workers):
        rows[at][i] |= fact
    return rows


def workload(each: TileList) -> Workload:
    """What a list is about, as the compiler is asked for it."""
    return Workload(each.op, each.mode, each.dtype, each.precision, each.shape, each.name)


def hold(
    found: Sequence[TileList], rows: Sequence[Sequence[Row]],
    note: Callable[[str], Any] = print,
) -> list[Held]:  # fmt: skip
    """Predict the rows of each list. What cannot be predicted is left out, and noted."""
    held, lost, older = [], [], 0
    for each, mine in zip(found, rows, strict=True):
        times = [_predicted(row, each) for row in mine]
        lost += [time for time in times if isinstance(time, str)]
        kept = [i for i, time in enumerate(times) if not isinstance(time, str)]
        older += bool(each.source and each.source != aot.source_hash(each.op))
        if len(kept) > 1:
            some = each._replace(
                tiles=[each.tiles[i] for i in kept], seconds=[each.seconds[i] for i in kept]
            )
            per_sm = [mine[i]["programs"] / each.gpu.sms for i in kept]
            arrays = (some.seconds, [times[i] for i in kept], per_sm)
            held.append(Held(some, *map(np.array, arrays), taken(some)))
    if lost:
        note(f"left out {len(lost)} tiles, the first because it {lost[0]}")
    if older:
        note(f"{older} lists were measured with older kernels than those that are predicted")
    if not held:
        raise PerfError("no list has two tiles that can be predicted")
    return held


def terms(found: Sequence[TileList], rows: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """What each term of the model is worth: how well it agrees without it, by GPU."""
    worth = {}
    for name, constants in {"all terms": {}, **WITHOUT}.items():
        with contextlib.ExitStack() as stack:
            for constant, value in constants.items():
                stack.enter_context(mock.patch.object(_cost_model, constant, value))
            labels = agreement.by_label(hold(found, rows)).items()
            about = {label: agreement.about(mine, None) for label, mine in labels}
        worth[name] = {
            label: {
                "regret": each["regret_model"]["mean"], "median": each["median"],
                "within_20": each["within_20"], "rank_correlation": each["rank_correlation"],
            }
            for label, each in about.items()
        }  # fmt: skip
    return worth


def taken(each: TileList) -> np.ndarray:
    """Which tile a call through pointers takes on an untuned GPU of this kind, in bools."""
    tile = None
    if each.op == "matmul" and each.layout:
        M, N, K = (each.shape[name] for name in "MNK")
        dtype = getattr(torch, each.dtype)
        device = aot.device(each.gpu.target)._replace(sms=each.gpu.sms)
        kind = _tile_facts.kind_of(dtype, each.precision)
        of_shape = M, N, K, kind, dtype.itemsize, each.layout, ("pointer",), device
        tile = _matmul.fast_tile(*of_shape)
    same = (tile is not None and its.items() <= tile.items() for its in each.tiles)
    return np.array(list(same))


def _predicted(row: Row, each: TileList) -> float | str:
    """The seconds of a tile, or why they cannot be predicted."""
    if row.get("failed"):
        return row["failed"]
    found = predict(row, each.gpu, launch_s=LAUNCHES[each.timer])
    return found["predicted_s"] if "predicted_s" in found else found["limit"]


def note(held: Sequence[Held]) -> str:
    """What stands below a figure: what was measured, and by whom."""
    dtypes = {ranking.dtype_text(h.list.dtype, h.list.precision) for h in held}
    origins = {h.list.origin.partition(" ")[0] for h in held}
    tiles = sum(len(h.measured) for h in held)
    words = f"{len(held)} lists, {tiles:,} tiles", ", ".join(sorted(dtypes))
    return "\n" + " · ".join((*words, "measured: " + ", ".join(sorted(origins))))
