"""The README's tables of what was compiled, predicted and measured, out of committed results.

`python -m perf.readme` prints them; tests/test_readme.py holds the README to them.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path

from perf import log, tried

PREDICTED = Path(__file__).parent / "results" / "predicted" / "sm_90.jsonl.gz"
OPS = (
    *("matmul", "matmul_bias_relu", "scaled_matmul", "bias_relu", "softmax", "cross_entropy"),
    *("max_pool2d", "sgd", "adamw"),
)


def speeds(path: Path = PREDICTED) -> str:
    """What each operator's best tile is predicted to reach, and did, for each set of shapes."""
    lines = [
        "| operator | dtype | shapes | predicted | measured | against the best peer | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    entries = [e for e in log.entries(path) if e["op"] in OPS]

    def place(e: dict) -> tuple:
        return OPS.index(e["op"]), e["mode"] != "fwd", e["dtype"], e["shapes"]

    for e in sorted(entries, key=place):
        cells = [f"`{e['op']}` {e['mode']}"]
        names = ("dtype", "shapes", "predicted", "measured", "against the best peer", "worst")
        cells += [log.COLUMNS[name](e) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fast_tiles(path: Path = PREDICTED) -> str:
    """What the tiles of matmul's kernel for Hopper compile to, and the portable one's largest."""
    lesson = importlib.import_module("kernels.matmul")
    rows = _compiled(path, lesson.TILES[2:3] + lesson.FAST_TILES[2])
    lines = [
        "| tile | registers | spills | shared memory | tensor cores | A, B from | loads | "
        "instructions a step | predicted at 8192 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loads = "TMA" if row["tma"] else f"{row['load_bytes']} bytes"
        cells = [
            f"`{tried.tile_text(row['tile'])}`", row["registers"], row["spills"],
            f"{row['shared'] / 1024:.0f} KiB", row["tensor_core"].split(".")[1], row["operands"],
            loads, row["loop_instructions"], f"{row['predicted_tflops']:.0f} TFLOP/s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _compiled(path: Path, tiles: Iterable[dict]) -> list[tried.Row]:
    """The rows of these tiles in the square product of 8192, in their order."""
    _, rows = tried.read([path], note=lambda text: None)
    found = {}
    for row in rows:
        if row["op"] == "matmul" and set(row["shape"].values()) == {8192}:
            found[json.dumps(row["tile"], sort_keys=True)] = row
    return [found[json.dumps(tile, sort_keys=True)] for tile in tiles]


if __name__ == "__main__":
    print(f"{fast_tiles()}\n\n{speeds()}")
