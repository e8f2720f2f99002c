"""The README's tables of what was compiled, predicted and measured, out of committed results.

`python -m tilelab.perf.report.tables` prints them; tests/perf/test_tables.py holds the README to them.
"""

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tilelab.perf.commands.training_step import totals
from tilelab.perf.report import history
from tilelab.perf.rows import ranking

PREDICTED = Path(__file__).parents[1] / "results" / "predicted" / "sm_90.jsonl.gz"
STEP = PREDICTED.with_name("step.json")  # of `tilelab step --json`
OPS = (
    *("matmul", "matmul_bias_relu", "scaled_matmul", "bias_relu", "softmax", "cross_entropy"),
    *("max_pool2d", "sgd", "adamw"),
)
CONVOLUTIONS = ("conv2d", "conv2d_bias_relu", "conv2d_relu_pool")
CONV_LAYER = "resnet50.layer3.1.conv2 n256"  # 3x3, 256 channels of 14 x 14 pixels


def speeds(path: Path = PREDICTED, ops: Sequence[str] = OPS) -> str:
    """What each operator's best tile is predicted to reach, and did, for each set of shapes."""
    lines = [
        "| operator | dtype | shapes | predicted | measured | against the best peer | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    entries = [e for e in history.entries(path) if e["op"] in ops]

    def place(e: dict) -> tuple:
        return ops.index(e["op"]), e["mode"] != "fwd", e["dtype"], e["shapes"]

    for e in sorted(entries, key=place):
        cells = [f"`{e['op']}` {e['mode']}"]
        names = ("dtype", "shapes", "predicted", "measured", "against the best peer", "worst")
        cells += [history.COLUMNS[name](e) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fast_tiles(path: Path = PREDICTED) -> str:
    """What the tiles of matmul's kernel for Hopper compile to, and the portable one's largest."""
    lesson, fast = (
        importlib.import_module(f"tilelab.kernels.{m}") for m in ("matmul", "matmul_tma")
    )
    rows = [row for row in _rows(path, "matmul") if set(row["shape"].values()) == {8192}]
    tiles = [_largest(lesson.TILES), *fast.FAST_TILES[2]]
    return _tiles(rows, tiles, "A, B from", "predicted at 8192")


def conv_tiles(path: Path = PREDICTED) -> str:
    """The same of conv2d, for one layer of ResNet-50: every rung of its ladder."""
    lesson, fast = (
        importlib.import_module(f"tilelab.kernels.{m}") for m in ("conv2d", "conv2d_tma")
    )
    rows = [row for row in _rows(path, "conv2d") if row["shape_name"] == CONV_LAYER]
    tiles = [*lesson.RUNGS, _largest(lesson.TILES), *fast.FAST_TILES[2]]
    return _tiles(rows, tiles, "operands from", f"predicted for {CONV_LAYER.split('.', 1)[1]}")


def gradient_tiles(mode: str, path: Path = PREDICTED) -> str:
    """The same of a gradient, "dgrad" or "wgrad", for the same layer: its kernel for Hopper.

    First the tile that a call takes, where that has its sum in parts.
    """
    lesson = {"dgrad": "conv2d_tma", "wgrad": "conv2d_weight_grad_tma"}[mode]
    tiles = importlib.import_module(f"tilelab.kernels.{lesson}").FAST_TILES[2]
    rows = [row for row in _rows(path, "conv2d", mode) if row["shape_name"] == CONV_LAYER]
    chosen = [row["tile"] for row in rows if row.get("default") and row["tile"] not in tiles]
    layer = CONV_LAYER.split(".", 1)[1]
    return _tiles(rows, [*chosen, *tiles], "operands from", f"predicted for {layer}")


def training_step(path: Path = STEP) -> str:
    """What a training step launches, moves and keeps, beside the least and PyTorch's."""
    lines = [
        "| images | | launches | bytes moved | kept for the backward |",
        "|---|---|---|---|---|",
    ]
    names = {"minimum": "the least", "tilelab": "tilelab", "torch": "PyTorch, autocast"}
    for step in json.loads(path.read_text())["steps"]:
        for name, shown in names.items():
            launches, moved, kept = totals(step, name)
            sizes = ["–" if size is None else f"{size / 1e6:,.1f} MB" for size in (moved, kept)]
            lines.append(f"| {step['batch']} | {shown} | {launches} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def _tiles(rows: Iterable[ranking.Row], tiles: list[dict], operands: str, predicted: str) -> str:
    """A table of these tiles, in their order, as far as there are rows of them."""
    found = {json.dumps(row["tile"], sort_keys=True): row for row in rows}
    keys = [json.dumps(tile, sort_keys=True) for tile in tiles]
    lines = [
        f"| tile | registers | spills | shared memory | tensor cores | {operands} | loads | "
        f"instructions a step | {predicted} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (found[key] for key in keys if key in found):
        loads = "TMA" if row["tma"] else f"{row['load_bytes']} bytes"
        product = row["tensor_core"].split(".")[1] if row["tensor_core"] else "none"
        cells = [
            f"`{ranking.tile_text(row['tile'])}`", row["registers"], row["spills"],
            f"{row['shared'] / 1024:.0f} KiB", product, row["operands"] or "registers",
            loads, row["loop_instructions"], f"{row['predicted_tflops']:.0f} TFLOP/s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _largest(tiles: list[dict]) -> dict:
    return max((t for t in tiles if "kernel" not in t), key=_elements_of_a_step)


def _rows(path: Path, op: str, mode: str = "fwd") -> list[ranking.Row]:
    """The rows of an operator in 16 bits that were compiled to the end."""
    _, rows = ranking.read([path], note=lambda text: None)
    about = op, mode, "bfloat16"
    mine = [row for row in rows if (row["op"], row["mode"], row["dtype"]) == about]
    return [row for row in mine if row.get("predicted_tflops")]


def _elements_of_a_step(tile: dict) -> int:
    return tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]


if __name__ == "__main__":
    tables = [fast_tiles(), speeds(), conv_tiles(), gradient_tiles("dgrad")]
    tables += [gradient_tiles("wgrad"), speeds(ops=CONVOLUTIONS), training_step()]
    for table in tables:
        print(f"{table}\n")
