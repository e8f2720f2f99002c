"""`tilelab compile`, from the command line to the file: tables, resuming, words."""

import contextlib
import importlib

import pytest

from tests.perf.test_prediction import product
from tests.perf.test_sweep import FakeCompilers
from tilelab.__main__ import main
from tilelab.perf.commands import compile as compiling
from tilelab.perf.commands import provenance, sweep
from tilelab.perf.report import diagnosis
from tilelab.perf.rows import ranking, results
from tilelab.perf.work import gpus

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
    text = diagnosis.describe_tile(compiling.finish(compiled(), H200), H200)
    for piece in (
        "BLOCK_M=128, BLOCK_N=256, BLOCK_K=64",
        "137.4 GFLOP over at least 100.7 MB, 1365 FLOPs a byte",
        "206 in the time of a byte, so the arithmetic is the ceiling",
        "accumulator takes 128",
        "occupancy 12%, limited by registers",
        "HGMMA.64x256x16.F32.BF16, 4 in the main loop, its first operand from shared",
        "92 instructions (4 tensor core, 12 load, 76 integer)",
        "512 programs on 132 SMs, 1 at a time on each: 3.88 waves.",
        "Predicted, not measured: 146 µs, 943 TFLOP/s",
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
    assert piece in " ".join(diagnosis.describe_tile(row, H200).split())


def test_the_annotated_loop_shows_a_line_once(tmp_path):
    source = tmp_path / "k.py"
    source.write_text("a = 1\nacc = tl.dot(a, b)\n")
    text = diagnosis.annotate([(str(source), 2, "HGMMA R1"), (str(source), 2, "BRA"), ("", 0, "X")])
    assert text.count("k.py:2  acc = tl.dot(a, b)") == 1 and "BRA" in text


def test_the_table_counts_what_is_not_worth_running():
    kinds = {}, dict(spills=8), dict(spills=16), dict(failed="does not compile: x")
    rows = [compiling.finish(compiled(**kind), H200) for kind in kinds]
    text = compiling.table(rows, top=5)
    assert "2 x spills registers" in text and "1 x does not compile" in text
    assert "943" in text and "predicted" in text.splitlines()[0]


def test_what_is_stored_fits_the_schema(tmp_path):
    row = compiling.finish(compiled(), H200) | {"status": "predicted"}
    header = dict(gpu="sm_90 (compiled)", created=provenance.now(), measured=False, versions={})
    with results.Writer(tmp_path / "r.jsonl", header) as writer:
        writer.write(compiling.stored(row))
    (back,) = results.read(tmp_path / "r.jsonl").rows
    assert back["predicted_tflops"] == pytest.approx(943, rel=1e-3)
    assert not back["measured"] and back["limit"] == "registers" and back["waves"]


@pytest.fixture
def tilelab(tmp_path, monkeypatch, capsys):
    """Runs a command where there is no GPU; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.devices, "current_device", sweep.devices.HostDevice)

    def run(*argv):
        status = main([*argv])
        return status, *capsys.readouterr()

    return run


def test_a_gpu_that_does_not_stand_for_its_target_has_its_own_name():
    """Predictions for an H100 are not to be taken for those of an H200: both are sm_90."""
    assert [compiling.label(gpu) for gpu in (H200, gpus.GPUS["h100"])] == ["sm_90", "h100"]
    assert ranking.known_gpu("sm_90 (compiled)") is H200
    assert ranking.known_gpu("h100 (compiled)") is gpus.GPUS["h100"]


def test_a_table_of_work_without_a_tile_that_failed():
    row = compiling.finish(compiled(tile=None, failed="it is odd"), H200)
    assert compiling.table([row], top=5).endswith("predicted: it is odd")


@pytest.mark.slow
def test_a_sweep_with_no_gpu_compiles_and_says_so(tilelab, tmp_path):
    """What a newcomer does: one command, then the heat-map and why the others lost."""
    words = ["sweep", "matmul", "--shapes", "m=2048", "-a", "BLOCK_M=128", "-a", "BLOCK_K=64"]
    words += ["-a", "BLOCK_N=64,128", "-a", "num_warps=8", "-a", "num_stages=3"]
    words += ["-a", "SPLIT_K=1", "-a", "SUBTILES=1", "-a", "PROGRAMS_PER_SM=0,1"]
    status, out, error = tilelab(*words)
    assert status == 0, error
    assert "No GPU here: tiles are compiled and predicted, not timed" in out
    assert "best of" in out and "predicted" in out
    path = tmp_path / "runs" / "sweep" / "sm_90.jsonl"
    rows = results.read(path).rows
    assert 3 < len(rows) < 8 and {row["status"] for row in rows} <= {"predicted", "pruned"}
    kinds = [row["tile"].get("kernel", "pointer") for row in rows]
    assert kinds.count("pointer") == 2 and "tma" in kinds
    assert (path.parent / "report.html").stat().st_size > 10_000

    status, _, error = tilelab(*words, "--resume", "--no-plots")
    assert status == 0, error
    assert len(results.read(path).rows) == len(rows)  # nothing was done again
    status, _, error = tilelab("sweep", "matmul", "--out", str(path.parent))
    assert status == 2 and "go on with --resume" in error


@pytest.mark.slow
def test_explain_from_the_command_line(tilelab, tmp_path):
    status, out, error = tilelab("compile", "bias_relu", "--explain", "-t", "a100,sm_90")
    assert status == 0, error
    assert out.count("Predicted, not measured") == 2
    assert "bias_relu.py:" in out and "memory is the ceiling" in out
    assert not (tmp_path / "runs").exists()


def test_a_step_has_no_tile_to_explain(tilelab, monkeypatch):
    fake = contextlib.nullcontext(FakeCompilers())
    monkeypatch.setattr(compiling.aot, "Compilers", lambda workers: fake)
    status, _, error = tilelab("compile", "train_step", "--explain")
    assert status == 2 and "train_step has no tile" in error


def test_the_lessons_tiles_alone(tilelab, tmp_path):
    status, _, error = tilelab("compile", "sgd", "--shapes", "tiny", "--tiles", "lesson")
    assert status == 0, error
    rows = results.read(tmp_path / "runs" / "compile" / "sm_90.jsonl").rows
    lesson = importlib.import_module("tilelab.kernels.optim").TILES
    assert {row["tile"]["BLOCK_M"] for row in rows} <= {16} | {t["BLOCK_M"] for t in lesson}
    assert 1 < len(rows) <= 1 + len(lesson)
    status, _, error = tilelab("compile", "sgd", "--tiles", "default")
    assert status == 2 and "needs the GPU whose tuned table" in error
