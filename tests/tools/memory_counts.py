"""Count what memory does for one program of every kernel, with every default tile.

    python -m tests.tools.memory_counts                    the launches that have no counts yet
    python -m tests.tools.memory_counts --again pool       those whose name contains "pool", anew
    python -m tests.tools.memory_counts --list 1.5         those that take 1.5 times the ideal
    python -m tests.tools.tables                           the tables of docs/memory.md and others

The calls are CALLS of compile_cases.py. perf/machine executes one program of each launch, for sm_80
and sm_90, and counts the sectors of global memory and the wavefronts of shared memory: see
perf/machine/counts.py. The values in the tensors are zeros: no count depends on them.

The counts are in tests/memory_counts.json, by the keys of compile_facts.py: after a change of a
kernel or of a tile the tool counts its launches again, and drops the old ones. It writes after each
launch, so a run that was ended goes on. A launch of MUCH times the ideal needs a reason in CAUSES.

The exit status is 1 if the machine finds something wrong, or cannot execute a launch.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from tests.tools import compile_cases, compile_facts
from tilelab.kernels import _launch
from tilelab.perf.compiler import aot
from tilelab.perf.rows.ranking import markdown_table
from tilelab.perf.rows.results import write_whole

# isort: split
import torch
import triton

RESULTS = pathlib.Path(__file__).parents[1] / "memory_counts.json"
TARGETS = ("sm_80", "sm_90")
COUNTED = {  # the fields of a row, by the names of perf/machine/counts.py
    "instructions": "instructions", "global requests": "requests", "sectors": "sectors",
    "sectors, ideal": "sectors, ideal", "wavefronts": "wavefronts",
    "wavefronts, ideal": "wavefronts, ideal", "TMA bytes": "TMA bytes", "waits": "waits",
}  # fmt: skip
IDEALS = ("sectors", "wavefronts")
MUCH = 1.5  # times the ideal
# Why a launch takes MUCH more: paragraphs of docs/memory.md, by what is counted, by the line of the
# source that takes the most, and by words of the launch's title. The first that fits is taken.
CAUSES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "wavefronts": (
        ("store in float32 by TMA", ".store([", ""),
        ("summed and multiplied", "+ 0.0", ""),
        ("read across its rows", "x = tl.load", "tf32"),
        ("summed and multiplied", "conv2d_relu_pool_grad.py", "weight_grad"),
        ("laid by rows", "tl.sum(b[:, :, None]", ""),
        ("scalar loads", "", "sm_90 conv2d, few channels, float32"),
        ("scalar loads", "", "sm_90 conv2d, few channels, by pointers, float32"),
        ("scalar loads", "", "sm_90 matmul, one column, float32"),
        ("read across its rows", "w3 = tl.load", "sm_80"),
        ("turned for wgmma", "w3 = tl.load", "sm_90"),
        ("turned for wgmma", "wt = tl.load", "sm_90"),
    ),
    "sectors": (
        ("masked", "optim.py", ""),
        ("masked", "step.py", ""),
        ("two loads a thread", "part_ptr", ""),
        ("two loads a thread", "", " max_pool2d"),
        ("weights apart", "conv2d_depthwise.py: tap", ""),
        ("weights apart", "wt = tl.load", ""),
        ("weights apart", "conv2d_tma.py: w = tl.load", ""),
        ("one element", "cross_entropy.py: x_t", ""),
        ("turned for wgmma", "", "sm_90 conv2d_relu_pool, few channels, tf32"),
        ("few neighbours", "tl.load", ""),
    ),
}
Row = dict[str, Any]


# --- the file -------------------------------------------------------------------------------------


def read(path: pathlib.Path = RESULTS) -> dict[str, Any]:
    """The version of triton, and a row for each launch."""
    return json.loads(path.read_text()) if path.exists() else {"triton": "", "launches": []}


def write(path: pathlib.Path, rows: list[Row]) -> None:
    """Write the file whole, a launch a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"triton": {json.dumps(triton.__version__)}, "launches": [\n{lines}\n]}}\n'
    write_whole(path, text.encode())


def ratio(row: Row, name: str) -> float | None:
    """How many times the ideal; None if the kernel has no such accesses."""
    return row[name] / row[f"{name}, ideal"] if row.get(name) else None


def worst(row: Row) -> float:
    """The larger of its ratios."""
    return max(ratio(row, name) or 1.0 for name in IDEALS)


def cause(row: Row, name: str) -> str:
    """Why a launch takes more than the ideal; "" if CAUSES has no reason."""
    for words, line, launch in CAUSES[name]:
        if line in row["at"][name] and launch in title(row):
            return words
    return ""


def title(row: Row) -> str:
    return f"{row['target']} {row['call']}, {row['type']}: {row['kernel']}"


# --- the tables -----------------------------------------------------------------------------------


def tables(rows: list[Row] | None = None) -> dict[str, str]:
    """What stands out, and everything; in Markdown, by name."""
    rows = read()["launches"] if rows is None else rows
    found = {f"much {name}": much(rows, name) for name in IDEALS}
    return found | {f"all of {t}": everything(r for r in rows if r["target"] == t) for t in TARGETS}


def much(rows: list[Row], name: str) -> str:
    """The launches that take MUCH more, both targets in one line."""
    lines: dict[tuple, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: -(ratio(row, name) or 0)):
        if (ratio(row, name) or 0) >= MUCH:
            what = (row["call"], row["type"], row["kernel"], row["tile"], cause(row, name))
            lines.setdefault(what, {}).setdefault(row["target"], row)
    cells = [
        (
            *(f"`{word}`" for word in what[:4]),
            *(f"{ratio(by[t], name):.2f}" if t in by else "–" for t in TARGETS),
            what[4],
        )
        for what, by in lines.items()
    ]
    return markdown_table(("call", "type", "kernel", "tile", *TARGETS, "why"), cells)


def everything(rows: Iterable[Row]) -> str:
    """Every launch, in the order of the calls."""
    head = (
        "call", "type", "kernel", "tile", "instructions", "requests", "sectors a request",
        "sectors", "x ideal", "wavefronts", "x ideal", "TMA bytes", "waits",
    )  # fmt: skip
    lines = []
    for row in rows:
        times = {name: f"{x:.2f}" if (x := ratio(row, name)) else "" for name in IDEALS}
        each = f"{row['sectors'] / row['requests']:.1f}" if row["requests"] else ""
        lines.append((
            *(row["call"], row["type"], f"`{row['kernel']}`", f"`{row['tile']}`"),
            *(_number(row["instructions"]), _number(row["requests"]), each),
            *(_number(row["sectors"]), times["sectors"]),
            *(_number(row["wavefronts"]), times["wavefronts"]),
            *(_number(row["TMA bytes"]), _number(row["waits"])),
        ))  # fmt: skip
    return markdown_table(head, lines)


def _number(n: int) -> str:
    return f"{n:,}" if n else ""


# --- in a process that compiles -------------------------------------------------------------------


def launches(target: str) -> list[tuple[Row, compile_cases.Case]]:
    """What the calls launch on a target, each compiled kernel once: its row, and its call."""
    aot.compile_for(target)
    device = aot.device(target)
    found: dict[str, tuple[Row, compile_cases.Case]] = {}
    for case in compile_cases.default_cases(device):
        if case.name not in compile_cases.CALLS:
            continue
        tf32 = (case.dtype, case.precision) == (torch.float32, "tf32")
        for i, launch in enumerate(case.launches(device)):
            row = dict(
                target=target, call=case.name, type="tf32" if tf32 else str(case.dtype)[6:],
                launch=i, kernel=launch.kernel.__name__, tile=_tile(launch.meta),
                key=compile_facts.key_of(launch, target),
            )  # fmt: skip
            found.setdefault(row["key"], (row, case))
    return list(found.values())


def _tile(meta: dict[str, Any]) -> str:
    """The blocks of a launch, its warps and its stages, as in "64x64x16 w2 s3"."""
    blocks = "x".join(str(x) for name, x in meta.items() if name.startswith("BLOCK"))
    words = [blocks, f"w{meta.get('num_warps', 4)}", f"s{meta.get('num_stages', 3)}"]
    return " ".join(word for word in words if word)


def count(row: Row) -> Row:
    """Execute one program of a launch: its row with the counts, or with "failed".

    "at" has for sectors and for wavefronts the line of the source that takes the most beyond its
    ideal. Its text is kept, because numbers of lines change with every comment.
    """
    target = row["target"]
    case = next(case for found, case in launches(target) if found["key"] == row["key"])
    launch = case.launches(aot.device(target))[row["launch"]]
    for tensor in _launch.tensors_of(launch.args):
        if tensor.is_floating_point() or tensor.dtype == torch.uint8:  # others are indices
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).zero_()
    try:
        report = aot.executed_launch(launch, target)
    except Exception as e:
        report = {"failed": f"{type(e).__name__}: {e}"[:500]}
    if "failed" in report:
        return row | {"failed": report["failed"]}
    counts = {name: report["counts"].get(key, 0) for key, name in COUNTED.items()}
    at = {}
    for name in IDEALS:
        excess, place = max(
            (found.get(name, 0) - found.get(f"{name}, ideal", 0), place)
            for *place, found in report["lines"]
        )
        if excess:
            at[name] = _text(*place)
    findings = [finding["kind"] for finding in report["findings"]]
    return row | counts | {"at": at} | ({"findings": findings} if findings else {})


def _text(file: str, line: int) -> str:
    """A line of a source, and in which file it is."""
    path = pathlib.Path(file)
    text = path.read_text().splitlines()[line - 1].partition("  #")[0].strip()
    return f"{path.name}: {text}"


# --- the command ----------------------------------------------------------------------------------


def describe(row: Row) -> str:
    """A launch, and what it takes beyond the ideal, in a line."""
    if "failed" in row:
        return f"{title(row)}: FAILED: {row['failed']}"
    words = [f"{x:.2f} x {name}" for name in IDEALS if (x := ratio(row, name)) and x > 1]
    places = [f"[{text}]" for text in row["at"].values()]
    wrong = [f"FOUND: {kind}" for kind in row.get("findings", ())]
    return "  ".join([title(row), row["tile"], *words, *places, *wrong])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    parser.add_argument("--again", metavar="WORDS", help="count launches of this name once more")
    parser.add_argument("--list", type=float, metavar="X", help="show those of X times the ideal")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    file = read(args.results)
    if args.list is not None:
        for row in sorted(file["launches"], key=worst, reverse=True):
            if "failed" in row or worst(row) >= args.list:
                print(describe(row))
        return 0
    os.environ |= aot.ENVIRONMENT  # this process may interpret, those that it starts compile
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        wanted = [row for found in pool.map(_rows, TARGETS) for row in found]
        known = {row["key"]: row for row in file["launches"] if "failed" not in row}
        if args.again:
            known = {k: row for k, row in known.items() if args.again not in title(row)}
        rows = {row["key"]: known[row["key"]] | row for row in wanted if row["key"] in known}
        todo = [row for row in wanted if row["key"] not in rows]
        for row in tqdm(pool.imap_unordered(count, todo), total=len(todo), smoothing=0):
            rows[row["key"]] = row
            if "failed" in row or "findings" in row:
                tqdm.write(describe(row))
            write(args.results, [rows[x["key"]] for x in wanted if x["key"] in rows])
    write(args.results, list(rows[x["key"]] for x in wanted))
    return 1 if any("failed" in row or "findings" in row for row in rows.values()) else 0


def _rows(target: str) -> list[Row]:
    return [row for row, _ in launches(target)]


if __name__ == "__main__":
    sys.exit(main())
