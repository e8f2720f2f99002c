"""`tilelab compile`, from the command line to the file: tables, resuming, words."""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys

import pytest
from tilelab.perf.commands import arguments
from tilelab.perf.commands import compile as compiling
from tilelab.perf.errors import PerfError
from tilelab.perf.report import explanation
from tilelab.perf.rows import ranking, results
from tilelab.perf.work import gpus
from tilelab.perf.work.workloads import Workload

from tests.perf.test_prediction import product

ROOT = pathlib.Path(__file__).parents[2]
H200 = gpus.GPUS["h200"]


def compiled(**changes):
    """A row as `finish` gets it from the compiler."""
    row = product(
        shape_name="m=4096", impl="tilelab", operands="shared", tensor_cores_in_loop=4, tma=False,
        load_bytes=16, store_bytes=16, serialised=False, instructions=800, tile_op="matmul",
        loop_mix={"tensor core": 4, "load": 12, "integer": 76}, source="abc",
        kernel="matmul_kernel", compile_s=0.5, default=True,
    )  # fmt: skip
    return row | changes


def test_words_say_what_is_good():
    text = explanation.words(compiling.finish(compiled(), H200), H200)
    for piece in (
        "BLOCK_M=128, BLOCK_N=256, BLOCK_K=64",
        "137.4 GFLOP over at least 100.7 MB, 1365 FLOPs a byte",
        "206 in the time of a byte, so the arithmetic is the ceiling",
        "accumulator takes 128",
        "occupancy 12%, limited by registers",
        "HGMMA.64x256x16.F32.BF16, 4 in the main loop, its first operand from shared",
        "92 instructions (4 tensor core, 12 load, 76 integer)",
        "512 programs on 132 SMs, 1 at a time on each: 3.88 waves.",
        "Predicted, not measured: 145.7 us, 943 TFLOP/s",
    ):
        assert piece in " ".join(text.split()), piece
    assert "BAD" not in text


@pytest.mark.parametrize(
    "changes, piece",
    [
        (dict(spills=160), "BAD: 160 bytes a thread are spilled"),
        (dict(shared=240_000), "BAD: it cannot be launched: does not fit: shared memory"),
        (dict(tensor_core=None), "BAD: no tensor cores"),
        (dict(serialised=True), "BAD: the wgmma instructions are serialised"),
        (dict(load_bytes=2), "2 bytes a thread at the narrowest. NARROW"),
        (dict(programs=140), "1.06 waves BAD: the busiest SM has 2, and 47% of the SMs'"),
        (dict(sizes=dict(M=4096, N=130, K=4096)), "Tiles cover 1.97 times the work"),
        (dict(moved=10**9, launches=2), "Its 2 launches move 9.93 times that minimum"),
        (dict(failed="does not compile: odd"), "BAD: does not compile: odd"),
    ],
)
def test_words_say_what_is_bad(changes, piece):
    row = compiling.finish(compiled(**changes), H200)
    assert piece in " ".join(explanation.words(row, H200).split())


def test_the_annotated_loop_shows_a_line_once(tmp_path):
    source = tmp_path / "k.py"
    source.write_text("a = 1\nacc = tl.dot(a, b)\n")
    text = explanation.annotated(
        [(str(source), 2, "HGMMA R1"), (str(source), 2, "BRA"), ("", 0, "X")]
    )
    assert text.count("k.py:2  acc = tl.dot(a, b)") == 1 and "BRA" in text


def test_the_table_counts_what_is_not_worth_running():
    kinds = {}, dict(spills=8), dict(spills=16), dict(failed="does not compile: x")
    rows = [compiling.finish(compiled(**kind), H200) for kind in kinds]
    text = compiling.table(rows, top=5)
    assert "2 x spills registers" in text and "1 x does not compile" in text
    assert "943" in text and "predicted" in text.splitlines()[0]


def test_what_is_stored_fits_the_schema(tmp_path):
    row = compiling.finish(compiled(), H200) | {"status": "predicted"}
    header = dict(gpu="sm_90 (compiled)", created=arguments.now(), measured=False, versions={})
    with results.Writer(tmp_path / "r.jsonl", header) as writer:
        writer.write(compiling.stored(row))
    (back,) = results.read(tmp_path / "r.jsonl").rows
    assert back["predicted_tflops"] == pytest.approx(943, rel=1e-3)
    assert not back["measured"] and back["limit"] == "registers" and back["waves"]


def perf(*argv, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tilelab", *argv],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


def test_a_gpu_that_does_not_stand_for_its_target_has_its_own_name():
    """Predictions for an H100 are not to be taken for those of an H200: both are sm_90."""
    assert [compiling.label(gpu) for gpu in (H200, gpus.GPUS["h100"])] == ["sm_90", "h100"]
    assert ranking.known_gpu("sm_90 (compiled)") is H200
    assert ranking.known_gpu("h100 (compiled)") is gpus.GPUS["h100"]


def test_a_table_of_work_without_a_tile_that_failed():
    row = compiling.finish(compiled(tile=None, failed="it is odd"), H200)
    assert compiling.table([row], top=5).endswith("predicted: it is odd")


@pytest.mark.slow
def test_a_sweep_with_no_gpu_compiles_and_says_so(tmp_path):
    """What a newcomer does: one command, then the heat-map and why the others lost."""
    axes = [
        "-a",
        "BLOCK_M=64,128",
        "-a",
        "BLOCK_N=64,128",
        "-a",
        "BLOCK_K=64",
        "-a",
        "num_stages=3",
    ]
    done = perf("sweep", "matmul", "--shapes", "m=2048", *axes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No GPU here: tiles are compiled and predicted, not timed" in done.stdout
    assert "best of" in done.stdout and "predicted" in done.stdout
    path = tmp_path / "runs" / "sweep" / "sm_90.jsonl"
    rows = results.read(path).rows
    assert len(rows) == 19 and {row["status"] for row in rows} <= {"predicted", "pruned"}
    kinds = [row["tile"].get("kernel", "pointer") for row in rows]
    assert kinds.count("pointer") == 8 and {"tma", "tma_ws"} < set(kinds)
    assert (path.parent / "report.html").stat().st_size > 10_000

    resumed = perf("sweep", "matmul", "--shapes", "m=2048", *axes, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert len(results.read(path).rows) == 19  # nothing was done again
    again = perf("sweep", "matmul", "--out", str(path.parent), cwd=tmp_path)
    assert again.returncode == 2 and "go on with --resume" in again.stderr


@pytest.mark.slow
def test_explain_from_the_command_line(tmp_path):
    done = perf("compile", "bias_relu", "--explain", "-t", "a100,sm_90", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Predicted, not measured") == 2
    assert "bias_relu.py:" in done.stdout and "memory is the ceiling" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_step_has_no_tile_to_explain():
    work = [Workload("train_step", "step", "float32", "ieee", {"N": 8}, "")]
    with pytest.raises(PerfError, match="train_step has no tile"):
        compiling._explain(work, argparse.Namespace(axis=[], workers=1), [H200])


def test_the_lessons_tiles_alone(tmp_path):
    done = perf("compile", "sgd", "--shapes", "tiny", "--tiles", "lesson", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = results.read(tmp_path / "runs" / "compile" / "sm_90.jsonl").rows
    lesson = importlib.import_module("tilelab.kernels.optim").TILES
    assert {row["tile"]["BLOCK_M"] for row in rows} <= {16} | {t["BLOCK_M"] for t in lesson}
    assert 1 < len(rows) <= 1 + len(lesson)
    refused = perf("compile", "sgd", "--tiles", "default", cwd=tmp_path)
    assert refused.returncode == 2 and "needs the GPU whose tuned table" in refused.stderr
