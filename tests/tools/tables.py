"""Makes the tables of README.md and of three pages of docs/ from committed results.

`python -m tests.tools.tables` prints them; tests/perf/test_tables.py holds the pages to them.
"""

import importlib
import json
import statistics
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.tools import memory_counts, opinions
from tilelab.perf.clock.host_overhead import ROOT
from tilelab.perf.commands.training_step import totals
from tilelab.perf.report import history
from tilelab.perf.rows import ranking
from tilelab.perf.rows.ranking import Row, markdown_table
from tilelab.perf.rows.results import MODES
from tilelab.perf.work import networks
from tilelab.perf.work.operators import OPERATORS

PREDICTED = ROOT / "perf" / "results" / "predicted" / "sm_90.jsonl.gz"
STEP = PREDICTED.with_name("step.json")  # of `tilelab step --json`
DEMO = ROOT / "perf" / "results" / "cpu" / "demo.jsonl"  # `make train`, for five seeds
DOCTOR = DEMO.with_name("doctor.json")  # of `tilelab doctor --host --json`
PUBLIC = ROOT / "perf" / "results" / "public"  # of `tilelab validate --update`
WORTH = ("mean regret", "within 20%")
CONVOLUTIONS = [op for op, row in OPERATORS.items() if row.sizes == networks.CONV]
OPS = [op for op, row in OPERATORS.items() if row.lesson and op not in CONVOLUTIONS]
CONV_LAYER = "resnet50.layer3.1.conv2 n256"  # 3x3, 256 channels of 14 x 14 pixels


def tables() -> dict[str, dict[str, str]]:
    """Every table, in Markdown, by its page and name.

    Raises:
        PerfError: for a file that cannot be read.
    """
    headers, rows = ranking.read([PREDICTED], note=lambda text: None)
    entries = history.entries(headers, rows)
    runs = [json.loads(line) for line in DEMO.read_text().splitlines()]
    numbers = {
        "demo": demo_runs(runs),
        "matmul's tiles": matmul_tiles(rows),
        "operators": speeds(entries, OPS),
        "conv2d's tiles": conv_tiles(rows, "fwd"),
        "input gradient's tiles": conv_tiles(rows, "dgrad"),
        "weight gradient's tiles": conv_tiles(rows, "wgrad"),
        "convolutions": speeds(entries, CONVOLUTIONS),
        "training step": training_step(STEP),
        "calls": call_costs(json.loads(DOCTOR.read_text())["findings"]),
    }
    return {
        "README.md": {"summary": summary(rows, entries, STEP, runs)},
        "docs/numbers.md": numbers,
        "docs/verification.md": opinions.tables(),
        "docs/memory.md": memory_counts.tables(),
        "docs/prediction.md": prediction(PUBLIC),
    }


def prediction(folder: Path) -> dict[str, str]:
    """How well the prediction agrees with others' measurements, and what each term is worth."""
    found = json.loads((folder / "summary.json").read_text())
    halves = json.loads((folder / "halves.json").read_text())
    head, lines = ("terms", *(f"{gpu}: {what}" for gpu in found for what in WORTH)), []
    for name, by_gpu in json.loads((folder / "terms.json").read_text()).items():
        cells = [f"{gpu[key]:.1%}" for gpu in by_gpu.values() for key in ("regret", "within_20")]
        lines.append((name if name == "all terms" else f"without: {name}", *cells))
    return {
        "agreement": _agreement({gpu: about["all"] for gpu, about in found.items()}),
        "speed": _over_library({"the benchmark": found, **halves}),
        "halves": _agreement({
            f"{gpu}, {half}": about["all"]
            for half, by_gpu in halves.items() for gpu, about in by_gpu.items()
        }),
        "terms": markdown_table(head, lines),
    }  # fmt: skip


def _agreement(found: dict[str, dict]) -> str:
    head, lines = (
        "", "lists", "tiles", "predicted / measured, median", "within 20%", "rank correlation",
        "regret of the model's pick, mean", "of the tile of a call, where it was measured",
        "its largest", "of the one best tile for all", "of a random tile",
    ), []  # fmt: skip
    for name, about in found.items():
        call = about["regret_call"]
        lines.append((
            name, str(about["lists"]), f"{about['tiles']:,}", f"{about['median']:.2f}",
            f"{about['within_20']:.0%}", f"{about['rank_correlation']:.2f}",
            f"{about['regret_model']['mean']:.1%}", f"{call['mean']:.1%} ({call['lists']} lists)",
            f"{call['most']:.0%}", f"{about['regret_fixed']['mean']:.1%}",
            f"{about['regret_random']['mean']:.1%}",
        ))  # fmt: skip
    return markdown_table(head, lines)


def _over_library(found: dict[str, dict]) -> str:
    head, lines = ("", "lists", "the model's pick", "a call's tile", "one tile for all", "best"), []
    for name, summary in found.items():
        for gpu, about in summary.items():
            speeds = about["over_library"]
            cells = (f"{speeds[way]:.2f}x" for way in ("model", "call", "fixed", "best"))
            lines.append((f"{gpu}, {name}", str(speeds["lists"]), *cells))
    return markdown_table(head, lines)


def summary(rows: Iterable[Row], entries: Iterable[history.Entry], step: Path, runs: list) -> str:
    """What is fast, in five lines, and how each is known."""
    best = max(r["predicted_tflops"] for r in _squares(rows) if r["status"] == "predicted")
    convolutions = [
        next(
            e["predicted"]
            for e in entries
            if (e["op"], e["mode"], e["shapes"]) == ("conv2d", mode, "resnet50 n256")
        )
        for mode in ("fwd", "dgrad", "wgrad")
    ]
    largest = json.loads(step.read_text())["steps"][-1]
    (launches, ours, _), (operators, theirs, _) = (
        totals(largest, name) for name in ("tilelab", "torch")
    )
    right = statistics.mean(run["epochs"][-1]["accuracy"] for run in runs)
    seconds = statistics.mean(sum(e["seconds"] for e in run["epochs"]) for run in runs)
    lines = [
        ("`matmul` of 8192 x 8192 x 8192 in bfloat16, on an H200", f"{best:.0f} TFLOP/s",
         "predicted"),
        ("`conv2d` of ResNet-50 at batch 256 in bfloat16, on an H200: forward, input gradient, "
         "weight gradient", f"{' / '.join(f'{x:.0f}' for x in convolutions)} TFLOP/s",
         "predicted; geometric mean of 23 layers"),
        (f"memory moved by a training step of the demo, {largest['batch']:,} images",
         f"{ours / 1e6:,.0f} MB; PyTorch {theirs / 1e6:,.0f} MB", "counted"),
        ("launches of that step", f"{launches}; PyTorch {operators} operators", "counted"),
        ("the demo with no GPU: 3 epochs on 2 CPU cores",
         f"{seconds:.0f} s, {right:.1%} of unseen digits right",
         f"measured; mean of {len(runs)} seeds"),
    ]  # fmt: skip
    return markdown_table(("what", "how fast", "how that is known"), lines)


def demo_runs(runs: list) -> str:
    """What the demo reached in the interpreter, a line for each seed, and the means."""
    lines, means = [], []
    for run in runs:
        epochs = run["epochs"]
        *first, last = (f"{e['accuracy']:.1%}" for e in epochs)
        seconds = sum(e["seconds"] for e in epochs)
        end = epochs[-1]
        means.append((end["accuracy"], end["precision"], end["recall"], seconds))
        lines.append(
            (run["seed"], f"{', '.join(first)}, **{last}**", f"{end['precision']:.1%}",
             f"{end['recall']:.1%}", f"{seconds:.1f}")
        )  # fmt: skip
    accuracy, precision, recall, seconds = (statistics.mean(x) for x in zip(*means, strict=True))
    lines.append(
        ("mean", f"**{accuracy:.2%}**", f"{precision:.1%}", f"{recall:.1%}", f"{seconds:.1f}")
    )
    heads = ("seed", "accuracy after epoch 1, 2, 3", "precision", "recall", "seconds of training")
    return markdown_table(heads, lines)


def speeds(entries: Iterable[history.Entry], ops: Sequence[str]) -> str:
    """What each operator's best tile is predicted to reach, and did, for each set of shapes."""
    columns = ("dtype", "shapes", "predicted", "measured", "against the best peer", "worst")
    shown = sorted(
        (e for e in entries if e["op"] in ops),
        key=lambda e: (ops.index(e["op"]), e["mode"] != "fwd", e["dtype"], e["shapes"]),
    )
    lines = [
        [f"`{e['op']}` {e['mode']}", *(history.COLUMNS[name](e) for name in columns)] for e in shown
    ]
    return markdown_table(("operator", *columns), lines)


def matmul_tiles(rows: Iterable[Row]) -> str:
    """What the tiles of matmul's kernel for Hopper compile to, and the portable one's largest."""
    tiles = [_largest(_lesson("matmul").TILES), *_lesson("matmul_tma").FAST_TILES[2]]
    return _tiles(_squares(rows), tiles, "A, B from", "predicted at 8192")


def _squares(rows: Iterable[Row]) -> list[Row]:
    return [r for r in _compiled(rows, "matmul", "fwd") if set(r["shape"].values()) == {8192}]


def conv_tiles(rows: Iterable[Row], mode: str) -> str:
    """The same of conv2d or of a gradient of it, "dgrad" or "wgrad", for one layer of ResNet-50.

    The forward pass has every rung of its ladder. A gradient has its kernel for Hopper, and first
    the tile that a call takes, where that has its sum in parts.
    """
    fast = {"fwd": "conv2d_tma", "dgrad": "conv2d_tma", "wgrad": "conv2d_weight_grad_tma"}[mode]
    tiles = _lesson(fast).FAST_TILES[2]
    mine = [r for r in _compiled(rows, "conv2d", mode) if r["shape_name"] == CONV_LAYER]
    if mode == "fwd":
        lesson = _lesson("conv2d")
        first = [*lesson.RUNGS, _largest(lesson.TILES)]
    else:
        first = [r["tile"] for r in mine if r.get("default") and r["tile"] not in tiles]
    layer = CONV_LAYER.partition(".")[2]
    return _tiles(mine, [*first, *tiles], "operands from", f"predicted for {layer}")


def training_step(path: Path) -> str:
    """What a training step launches, moves and keeps, beside the least and PyTorch's."""
    lines = []
    names = {"minimum": "the least", "tilelab": "tilelab", "torch": "PyTorch, autocast"}
    for step in json.loads(path.read_text())["steps"]:
        for name, shown in names.items():
            launches, moved, kept = totals(step, name)
            sizes = ["–" if size is None else f"{size / 1e6:,.1f} MB" for size in (moved, kept)]
            lines.append([step["batch"], shown, launches, *sizes])
    return markdown_table(("images", "", "launches", "bytes moved", "kept for the backward"), lines)


def call_costs(findings: list[dict]) -> str:
    """What a call of each operator costs on the host, and its gradients."""
    found: dict[str, dict[str, str]] = {}
    for finding in findings:
        op, _, mode = finding["title"].removeprefix("host ").partition(" ")
        if mode in MODES:
            found.setdefault(op, {})[mode] = f"{finding['value']:.3g}"
    lines = []
    for op, modes in found.items():
        call = modes.pop("fwd" if "fwd" in modes else "step")
        gradients = ", ".join(f"{mode} {cost}" for mode, cost in modes.items())
        lines.append((f"`{op}`", call, gradients or "–"))
    return markdown_table(("operator", "call (µs)", "its gradients by mode (µs)"), lines)


def _tiles(rows: Iterable[Row], tiles: list[dict], operands: str, predicted: str) -> str:
    """A table of these tiles, in their order, as far as there are rows of them."""
    head = (
        *("tile", "registers a thread", "spilled bytes a thread", "shared memory"),
        *("tensor cores", operands, "loads"),
        *("instructions a step", predicted),
    )
    found = {json.dumps(row["tile"], sort_keys=True): row for row in rows}
    keys = [json.dumps(tile, sort_keys=True) for tile in tiles]
    lines = [
        [
            f"`{ranking.tile_text(row['tile'])}`", row["registers"], row["spills"],
            f"{row['shared'] / 1024:.0f} KiB",
            row["tensor_core"].split(".")[1] if row["tensor_core"] else "none",
            row["operands"] or "registers",
            "TMA" if row["tma"] else f"{row['load_bytes']} bytes",
            row["loop_instructions"], f"{row['predicted_tflops']:.0f} TFLOP/s",
        ]
        for row in (found[key] for key in keys if key in found)
    ]  # fmt: skip
    return markdown_table(head, lines)


def _lesson(name: str) -> types.ModuleType:
    return importlib.import_module(f"tilelab.kernels.{name}")


def _largest(tiles: list[dict]) -> dict:
    portable = (tile for tile in tiles if "kernel" not in tile)
    return max(portable, key=lambda tile: tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"])


def _compiled(rows: Iterable[Row], op: str, mode: str) -> list[Row]:
    """The rows of an operator in 16 bits that were compiled to the end."""
    about = op, mode, "bfloat16"
    mine = (row for row in rows if (row["op"], row["mode"], row["dtype"]) == about)
    return [row for row in mine if row.get("predicted_tflops")]


if __name__ == "__main__":
    for page, named in tables().items():
        for name, table in named.items():
            print(f"{page}: {name}\n\n{table}\n")
