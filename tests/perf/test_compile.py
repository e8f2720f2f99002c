"""`tilelab compile`, from the command line to the file: tables, resuming, words."""

import concurrent.futures
import contextlib
import importlib
import json
import re
import time

import pytest

from tests.perf.test_prediction import product
from tests.perf.test_sweep import FakeCompilers
from tilelab.__main__ import main
from tilelab.kernels import _launch, _tiles
from tilelab.perf.commands import compile as compiling
from tilelab.perf.commands import provenance, sweep
from tilelab.perf.compiler import aot
from tilelab.perf.report import diagnosis
from tilelab.perf.rows import ranking, results
from tilelab.perf.work import gpus, shapes
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.workloads import Workload

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
        "Predicted, not measured (held to measurements): 221 µs, 622 TFLOP/s",
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
    assert "622" in text and "predicted" in text.splitlines()[0]


def test_what_is_stored_fits_the_schema(tmp_path):
    row = compiling.finish(compiled(), H200) | {"status": "predicted"}
    header = dict(gpu="sm_90 (compiled)", created=provenance.now(), measured=False, versions={})
    with results.Writer(tmp_path / "r.jsonl", header) as writer:
        writer.write(compiling.stored(row))
    (back,) = results.read(tmp_path / "r.jsonl").rows
    assert back["predicted_tflops"] == pytest.approx(622.3, rel=1e-3)
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


@pytest.mark.slow
def test_which_tile_a_call_takes_and_why(tilelab, tmp_path):
    """One command, for a GPU that is not here."""
    words = ["compile", "softmax", "--shapes", "m=64,n=1000", "--tiles", "default", "-t", "a100"]
    status, out, error = tilelab(*words)
    assert status == 0, error
    (row,) = results.read(tmp_path / "runs" / "compile" / "sm_80.jsonl").rows
    assert row["default"] and row["tile"] == dict(BLOCK_M=4, BLOCK_N=1024, num_warps=2)
    assert "4x1024 w2 (default)" in out and "GB/s" in out and "TFLOP/s" not in out
    for line in (
        "the tile that a call takes on the NVIDIA A100 80GB SXM, and why (nothing is tuned: there "
        "is no kernels/tuned/nvidia-a100-sxm4-80gb.json):",
        "softmax bfloat16, M=64 N=1000: 4x1024 w2",
        "default: TILES[3] = IN_REGISTERS[3] of kernels/softmax.py",
    ):
        assert line in out


def reasons(op, target, gpu, shape=None, **more):
    """What `aot.choose` says of the first shape (of a small set), as a GPU would."""
    sizes = shape or shapes.shapes(op, "tiny")[0].sizes
    about = dict(mode="fwd", dtype="bfloat16", precision="ieee") | more
    w = Workload(op, about["mode"], about["dtype"], about["precision"], sizes, "x")
    return aot.choose(w, target, gpu)


@pytest.mark.parametrize("target", gpus.TARGETS)
def test_every_operator_says_why_it_gets_its_tiles(monkeypatch, target):
    monkeypatch.setattr(_launch, "INTERPRET", False)
    for op, operator in OPERATORS.items():
        for mode, about in operator.modes.items():
            dtype = "float16" if "fp16" in operator.dtypes else "int8"
            found = reasons(op, target, "NVIDIA H200", mode=mode, dtype=dtype)
            assert found["choices"] and (found["tile"] is None) == (not about.tile_ops), (op, mode)
            for choice in found["choices"]:
                first = choice["why"][0]
                assert first.startswith("modelled: ") or re.match(
                    r"default: .*[A-Z_]+.* of (kernels|nets)/\w+\.py$", first
                ), (op, mode, choice)


def test_a_tile_is_tuned_modelled_or_a_default(monkeypatch, tmp_path):
    real = _tiles.tuned_path
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_tiles, "tuned_path", lambda name, folder=None: real(name, tmp_path))
    tile = dict(BLOCK_M=64, BLOCK_N=256, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=3)
    entry = dict(op="matmul", dtype="bfloat16", sizes=dict(M=1024, N=1024, K=1024), tile=tile)
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"tiles": [entry]}))
    _tiles.forget_tuned()

    def why(gpu, M, target="sm_90", N=1024):
        found = reasons("matmul", target, gpu, dict(M=M, N=N, K=1024))
        assert (found["untuned"] is None) == (gpu == "NVIDIA H200")
        (choice,) = found["choices"]
        return choice["tile"], " | ".join(choice["why"])

    found, words = why("NVIDIA H200", 1024)
    assert found == tile and "a sweep for these sizes, in kernels/tuned/nvidia-h200.json" in words
    found, words = why("NVIDIA H200", 4096, N=100)
    assert found == tile | dict(BLOCK_N=128) and "fitted to the sizes: BLOCK_N 256 -> 128" in words
    assert "M=1024 N=1024 K=1024, the nearest (5.4 octaves away)" in words
    found, words = why("NVIDIA H100 80GB HBM3", 4096)
    assert found["kernel"] == "tma" and words.startswith("modelled: ")
    assert "of the kernels pointer, tma, tma_ws" in words
    assert why("NVIDIA A100-SXM4-80GB", 4096, "sm_80")[1].startswith("modelled: ")
    (choice,) = reasons("softmax", "sm_90", "NVIDIA H200")["choices"]
    assert choice["why"][0].startswith("default: ")
    assert "kernels/tuned/nvidia-h200.json has no tile of softmax that can do" in choice["why"][1]
    _tiles.forget_tuned()


def test_tf32_products_are_listed_with_the_kernels_that_tf32_has(monkeypatch):
    """Whatever precision the last job of this worker had."""
    monkeypatch.setattr(_launch, "INTERPRET", False)
    shape = shapes.shapes("conv2d", "n=32,c=64,h=28,k=64,r=3")[0].sizes
    for precision in ("tf32", "ieee", "tf32"):
        w = Workload("conv2d", "fwd", "float32", precision, shape, "x")
        assert ("tma" in aot.describe(w, "sm_90")["kernels"]) == (precision == "tf32")


class Slow(FakeCompilers):
    """Compilers that never come to an end with what they compile."""

    def submit(self, what, w, *more):
        return super().submit(what, w, *more) if what == "describe" else concurrent.futures.Future()


@pytest.mark.parametrize("command", ["sweep", "compile"])
def test_a_budget_holds_without_a_gpu(tilelab, tmp_path, monkeypatch, command):
    words = [command, "matmul", "--shapes", "m=48,n=40,k=64", "-a", "BLOCK_M=16,32"]
    words += ["-a", "BLOCK_N=16", "-a", "num_warps=4", "-a", "num_stages=3", "-a", "BLOCK_K=32"]
    words += ["--no-plots"] if command == "sweep" else []
    monkeypatch.setattr(compiling.aot, "Compilers", lambda workers: contextlib.nullcontext(Slow()))
    began = time.monotonic()
    status, out, error = tilelab(*words, "--budget", "0.5")
    assert status == 0, error
    assert time.monotonic() - began < 10
    rows = results.read(tmp_path / "runs" / command / "sm_90.jsonl").rows
    assert len(rows) >= 2 and {row["status"] for row in rows} == {"skipped"}
    assert {row["reason"] for row in rows} == {"not compiled: the time budget ran out"}
    said = f"skipped: {len(rows)} tiles, because the time budget of 0.5 s ran out; --resume goes on"
    assert said in out
    fake = contextlib.nullcontext(FakeCompilers())
    monkeypatch.setattr(compiling.aot, "Compilers", lambda workers: fake)
    status, out, error = tilelab(*words, "--resume")
    assert status == 0 and "skipped" not in out, error
    rows = results.read(tmp_path / "runs" / command / "sm_90.jsonl").rows
    assert {row["status"] for row in rows} == {"predicted"}


def test_a_table_has_the_speed_that_counts_and_the_default():
    def text(op, top=1, **more):
        tiles = [dict(BLOCK_M=m, BLOCK_N=64, num_warps=4) for m in (64, 32, 16)]
        rows = [
            compiling.finish(compiled(), H200)
            | dict(op=op, tile=tile, default=i == 2, predicted_s=1e-6 * (i + 1)) | more
            for i, tile in enumerate(tiles)
        ]  # fmt: skip
        return compiling.table(rows, top)

    assert "GB/s" in text("softmax") and "TFLOP/s" not in text("softmax")
    assert "TFLOP/s" in text("matmul") and "GB/s" not in text("matmul")
    both = text("conv2d", bound="memory")  # a depthwise layer, say
    assert "TFLOP/s" in both and "GB/s" in both
    assert [line.split("  ")[0] for line in text("softmax").splitlines()[2:]] == [
        "64x64 w4", "16x64 w4 (default)",
    ]  # fmt: skip
