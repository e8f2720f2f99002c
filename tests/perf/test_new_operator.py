"""An operator is one row: perf/README.md's example is added to a copy of perf/, and all follows."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tilelab.perf.rows import results

ROOT = pathlib.Path(__file__).parents[2]
NEW = "matmul_relu"
FEW = ("-a", "BLOCK_M=64,128", "-a", "BLOCK_N=64", "-a", "BLOCK_K=32", "-a", "num_warps=4",
       "-a", "num_stages=2", "-a", "kernel=pointer", "--workers", "1")  # fmt: skip
SWEPT, COMPILED = "swept/results.jsonl", "compiled/sm_90.jsonl"
COMMANDS = [
    ["sweep", NEW, "--shapes", "help"],
    ["sweep", NEW, "--dry-run", "--shapes", "tiny", "--dtype", "fp32", "--no-plots",
     "--peers", "torch", *FEW, "--out", "swept"],
    ["compile", NEW, *FEW, "--out", "compiled"],
    ["plot", COMPILED, "--out", "figures"],
    ["report", SWEPT, COMPILED, "--out", "page.html"],
    ["log", SWEPT, COMPILED],
    ["gpu", "--list"],
]  # fmt: skip
DRIVER = f"""
from tilelab.__main__ import main
for command in {COMMANDS!r}:
    print("====", command[0], flush=True)
    assert main(command) == 0, command
"""


@pytest.fixture(scope="module")
def row():
    """The row of perf/README.md."""
    recipe = (ROOT / "perf" / "README.md").read_text().split("\n## A new operator\n")[1]
    return re.search(r"```python\n(.*?)```", recipe, re.S)[1]


@pytest.fixture(scope="module")
def printed(row, tmp_path_factory):
    """What each command prints in a copy of the checkout that differs in the row alone."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("kernels", "nets", "tilelab"):
        (folder / name).symlink_to(ROOT / name)
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "perf", folder / "perf", ignore=ignored)
    table = folder / "perf" / "work" / "operators.py"
    before, rest = table.read_text().split("\nOPERATORS: dict[str, Operator] = {\n")
    table.write_text(f"{before}\nOPERATORS: dict[str, Operator] = {{\n{row}{rest}")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("==== ")[1:]
    texts = [part.partition("\n")[2] for part in parts]
    return folder, dict(zip(("help", "sweep", "compile", "plot", "report", "log", "gpu"), texts,
                            strict=True))  # fmt: skip


def test_its_shapes_are_those_of_linear_layers(printed):
    text = printed[1]["help"]
    vgg = text.split("\nvgg16 ")[1].split("\nalexnet ")[0]
    assert f"{NEW} 3," in vgg and f"{NEW} 1" in text.split("\ntiny ")[1]
    assert NEW not in text.split("\nmobilenet ")[1].split("\ndemo ")[0]


def test_it_is_swept(printed):
    folder, texts = printed
    rows = results.read(folder / SWEPT).rows
    assert {row["op"] for row in rows} == {NEW} and {row["status"] for row in rows} == {"ok"}
    finals = {row["impl"] for row in rows if row["stage"] == "final"}
    assert finals == {"tilelab", "torch"}
    first = rows[0]
    assert first["shape"] == dict(M=37, N=29, K=53)
    assert first["flops"] == 2 * 37 * 29 * 53
    assert first["bytes"] == 4 * (37 * 53 + 53 * 29 + 37 * 29)
    assert "best of" in texts["sweep"] and NEW in texts["sweep"]


def test_it_is_compiled_and_predicted(printed):
    folder, texts = printed
    rows = results.read(folder / COMPILED).rows
    assert len(rows) == 2 and {row["status"] for row in rows} == {"predicted"}
    assert all(row["tensor_core"].startswith("HGMMA") for row in rows)
    assert rows[0]["shape"] == dict(M=4096, N=4096, K=4096) and rows[0]["tile_op"] == "matmul"
    assert f"{NEW} fwd bfloat16" in texts["compile"] and "TFLOP/s" in texts["compile"]


def test_it_is_drawn_and_tabulated(printed):
    folder, texts = printed
    assert len(list((folder / "figures").glob("heatmap-*.png"))) == 2  # light and dark
    page = (folder / "page.html").read_text()
    assert NEW in page and "TFLOP/s" in page
    assert texts["log"].count(NEW) >= 2


def test_it_is_among_the_tasks_on_a_gpu(printed):
    lines = printed[1]["gpu"].splitlines()
    names = [line.split()[0] for line in lines]
    assert {"sweep-matmul-relu", "after-matmul-relu"} <= set(names)
