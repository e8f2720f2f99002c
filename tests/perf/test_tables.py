"""README.md and three pages of docs/ say what the committed results say."""

import importlib
import json

import pytest

from tests.tools import perf_rows, tables
from tilelab.perf.clock.host_overhead import ROOT
from tilelab.perf.report import history


def test_the_tables_are_those_of_the_committed_results():
    for page, named in tables.tables().items():
        text = (ROOT / page).read_text()
        for name, table in named.items():
            assert table in text, f"{page}: {name}"


FAST = importlib.import_module("tilelab.kernels.conv2d_tma").FAST_TILES[2]


def row(problem, tile, **more):
    """A row of the results file, of a tile that was compiled."""
    row = perf_rows.base(problem, "tilelab", tile, perf_rows.COMPILED, False)
    return row | dict(
        stage="compile", status="predicted", registers=168, spills=0, shared=215040, tma=True,
        tensor_core="HGMMA.64x256x16.F32.BF16", operands="shared", load_bytes=16,
        loop_instructions=77, predicted_s=1e-3, predicted_tflops=701.6,
    ) | more  # fmt: skip


@pytest.fixture
def rows():
    """Three tiles of the layer of the table, and one of another."""
    lesson = importlib.import_module("tilelab.kernels.conv2d")
    layer = perf_rows.conv("resnet50.layer3.1.conv2", 256, 256, 14, 256, 3)
    other = perf_rows.conv("resnet50.layer2.1.conv2", 256, 128, 28, 128, 3)
    return [
        row(layer, FAST[0]),
        row(layer, lesson.RUNGS[0], tma=False, tensor_core=None, operands=None, load_bytes=2),
        row(layer, lesson.TILES[3], tma=False, registers=222),
        row(layer, lesson.TILES[0], tma=False),  # not the largest
        row(other, FAST[1]),
    ]


def test_the_table_of_tiles_of_convolutions(rows):
    """A line for each rung of the ladder; what was not compiled is left out."""
    lines = tables.conv_tiles(rows, "fwd").splitlines()
    assert "predicted for layer3.1.conv2 n256" in lines[0] and len(lines) == 5
    assert lines[2].startswith("| `direct 32x32 w4 s2` | 168 | 0 | 210 KiB | none | registers | 2")
    assert lines[3].startswith("| `128x256x64 w8 s3` | 222 | 0 | 210 KiB | 64x256x16 | shared |")
    assert lines[4].startswith("| `tma 256x128x64 w8 s3` | 168 | 0 | 210 KiB | 64x256x16 | shared")
    assert lines[4].endswith("| TMA | 77 | 702 TFLOP/s |")
    assert lines[2].count("|") == lines[0].count("|") == lines[1].count("|")


@pytest.mark.parametrize(
    "mode, lesson", [("dgrad", "conv2d_tma"), ("wgrad", "conv2d_weight_grad_tma")]
)
def test_the_tables_of_tiles_of_gradients(mode, lesson):
    """Of the mode alone: a tile of the forward is one of its input gradient, too."""
    tiles = importlib.import_module(f"tilelab.kernels.{lesson}").FAST_TILES[2]
    layer = perf_rows.conv("resnet50.layer3.1.conv2", 256, 256, 14, 256, 3)
    rows = [row(layer, tiles[1], mode=mode), row(layer, tiles[0], mode=mode, registers=99)]
    rows.append(row(layer, tiles[0] | dict(SPLIT_K=4), mode=mode, default=True, registers=77))
    rows.append(row(layer, tiles[0]))
    lines = tables.conv_tiles(rows, mode).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["77", "99", "168"]
    assert "| 99 |" not in tables.conv_tiles(rows, "fwd")


def test_the_table_of_a_training_step(tmp_path):
    path = tmp_path / "step.json"
    part = dict(launches=[["a_kernel", 2_000_000], ["b_kernel", 500_000]], kept=1_250_000)
    step = dict(batch=64, minimum=dict(launches=8, bytes=1_000_000), tilelab=part, torch=part)
    path.write_text(json.dumps({"steps": [step]}))
    lines = tables.training_step(path).splitlines()
    assert lines[2:4] == [
        "| 64 | the least | 8 | 1.0 MB | – |",
        "| 64 | tilelab | 2 | 2.5 MB | 1.2 MB |",
    ]
    assert len(lines) == 5


def test_the_table_of_calls():
    costs = {"matmul fwd": 21.78, "matmul dgrad": 35.7, "matmul wgrad": 33.0, "sgd step": 103.2,
             "import tilelab.kernels": 1.0, "matmul: first call, full cache": 0.1}  # fmt: skip
    findings = [dict(title=f"host {name}", value=cost) for name, cost in costs.items()]
    assert tables.call_costs(findings).splitlines()[2:] == [
        "| `matmul` | 21.8 | dgrad 35.7, wgrad 33 |",
        "| `sgd` | 103 | – |",
    ]


def test_no_table_needs_rows_of_everything(rows):
    rows = [r | {"commit": "0123456"} for r in rows]
    entries = history.entries([perf_rows.header(False)], rows)
    lines = tables.speeds(entries, tables.CONVOLUTIONS).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == ["resnet50 n256 (2)"]
    assert len(tables.speeds(entries, tables.OPS).splitlines()) == 2
    assert len(tables.matmul_tiles(rows).splitlines()) == 2
