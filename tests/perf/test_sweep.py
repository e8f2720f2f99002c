"""The whole path of a sweep with no GPU: on the interpreter, and on a simulated H200.

Only the clock is simulated: workloads, tiles, the gate and the results file are the real ones, and
kernels run in the interpreter at tiny sizes.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.tools.fake_device import BrokenGPU, FakeDevice
from tilelab import __main__ as main
from tilelab import kernels
from tilelab.kernels import _launch, _tiles
from tilelab.perf.clock.correctness import Gate
from tilelab.perf.commands import arguments, provenance, sweep
from tilelab.perf.commands.compile import chosen
from tilelab.perf.compiler import aot
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results
from tilelab.perf.work import gpus, workloads
from tilelab.perf.work.operators import OPERATORS

SHAPE = "m=48,n=40,k=64"


class FakeCompilers:
    """What the compiler processes answer, made up here: a sweep of tiny sizes takes no seconds."""

    workers = 1

    def __init__(self, spilling=(), failing=()):
        self.spilling, self.failing, self.jobs = spilling, failing, []

    def submit(self, what, w, *more):
        future = concurrent.futures.Future()
        if what == "describe":
            described = aot.describe(w)
            if described["tile_op"]:
                described["tile"] = described["lesson"][0]  # not the interpreter's own
            future.set_result(described)
            return future
        if what == "choose":
            future.set_result(aot.choose(w, *more))
            return future
        tile, _ = more
        self.jobs.append(tile)
        t = aot.trace(w, tile)
        answer = t.about
        if tile is not None:
            answer |= dict(
                programs=100, threads=32 * tile["num_warps"], registers=64, shared=1024, spills=0,
                tensor_core="HGMMA.64x64x16.F32.BF16", loop_instructions=90, load_bytes=16,
            )  # fmt: skip
            if tile.get("BLOCK_N") in self.spilling:
                answer["spills"] = 128
            if tile.get("BLOCK_N") in self.failing:
                answer["failed"] = "does not compile: it is odd"
        future.set_result(answer | {"compile_s": 0.5})
        return future


def parsed(*argv):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args(argv)


def speed(call):
    """Larger tiles are faster; torch is half as fast as the best of them."""
    if call.tile is None:
        return 2e-3
    return 1e-3 * (1 + 16 / call.tile["BLOCK_M"] + 16 / call.tile["BLOCK_N"])


def swept(path, *argv, device=None, compilers=None):
    """The rows of one sweep of matmul with four tiles, on a simulated GPU."""
    argv = argv or ("matmul",)
    args = parsed(*argv, "--shapes", SHAPE, "-a", "BLOCK_M=16,32", "-a", "BLOCK_N=16,32",
                     "-a", "BLOCK_K=32", "-a", "num_warps=4", "-a", "num_stages=3")  # fmt: skip
    device = device or FakeDevice(speed, noise=0.002)
    with results.Writer(path, provenance.header(device.header(), True, args), note=print) as writer:
        work = arguments.workloads(args)
        sweep.Sweep(device, work, args, compilers or FakeCompilers(), writer).run()
    return results.read(path).rows


def of(rows, **fields):
    return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]


def test_every_tile_is_screened_and_the_best_race_with_the_peer(tmp_path):
    rows = swept(tmp_path / "r.jsonl")
    screened = of(rows, stage="screen")
    assert len(screened) == 4 and {row["status"] for row in screened} == {"ok"}
    finals = of(rows, stage="final")
    assert {row["impl"] for row in finals} == {"tilelab", "torch"}
    assert len({row["race"] for row in finals}) == 1
    assert len({len(row["samples_s"]) for row in finals}) == 1  # samples pair by round
    best = min(of(finals, impl="tilelab"), key=lambda row: row["median_s"])
    assert (best["tile"]["BLOCK_M"], best["tile"]["BLOCK_N"]) == (32, 32)
    assert best["median_s"] == pytest.approx(2e-3, rel=0.01)
    assert best["tflops"] == pytest.approx(2 * 48 * 40 * 64 / best["median_s"] / 1e12)
    assert best["error"] <= best["tolerance"] and best["timer"] == "graph"
    assert best["registers"] == 64 and best["occupancy"] and best["predicted_s"]
    assert best["peak_share"] == pytest.approx(
        max(best["flops"] / gpus.GPUS["h200"].peak("bf16"), best["bytes"] / 4.8e12)
        / best["median_s"]
    )


def test_what_the_compiler_disqualifies_is_reported_and_never_run(tmp_path):
    device = FakeDevice(speed)
    rows = swept(tmp_path / "r.jsonl", device=device, compilers=FakeCompilers((32,), (16,)))
    assert {row["status"] for row in of(rows, impl="tilelab")} == {"pruned", "error"}
    pruned = of(rows, status="pruned")
    assert len(pruned) == 2 and pruned[0]["reason"] == "spills 128 bytes a thread"
    assert of(rows, status="error")[0]["reason"] == "does not compile: it is odd"
    assert not [call for call in device.record if call.tile]


def test_a_wrong_kernel_is_caught_and_never_ranked(tmp_path, monkeypatch):
    """Planted: with one tile the result is a little off, and that tile is by far the fastest."""
    right = kernels.matmul
    wrong_tile = dict(BLOCK_M=16, BLOCK_N=16)

    def planted(s, a, b):
        tile = _tiles._forced.get("matmul", {})
        wrong = wrong_tile.items() <= tile.items()
        return right(a, b) * (1.05 if wrong else 1.0)

    op = OPERATORS["matmul"]._replace(ours=planted)
    monkeypatch.setitem(OPERATORS, "matmul", op)
    device = FakeDevice(lambda call: 1e-6 if call.tile and wrong_tile.items() <= call.tile.items()
                        else speed(call))  # fmt: skip
    rows = swept(tmp_path / "r.jsonl", device=device)
    wrong = of(rows, status="wrong")
    assert len(wrong) == 1 and wrong_tile.items() <= wrong[0]["tile"].items()
    assert "relative error 0.05" in wrong[0]["reason"] and "median_s" not in wrong[0]
    assert not [row for row in of(rows, stage="final") if row["tile"] == wrong[0]["tile"]]


def test_what_turns_wrong_after_timing_is_not_a_winner(tmp_path, monkeypatch):
    right, calls = kernels.matmul, []

    def planted(s, a, b):
        if _launch._recorded is None:
            calls.append(1)
        return right(a, b) * (1.05 if len(calls) > 4 else 1.0)  # four tiles pass the first gate

    op = OPERATORS["matmul"]._replace(ours=planted)
    monkeypatch.setitem(OPERATORS, "matmul", op)
    rows = swept(tmp_path / "r.jsonl", "matmul", "--peers", "none")
    assert {row["status"] for row in of(rows, stage="final")} == {"wrong"}
    assert of(rows, stage="final")[0]["reason"].startswith("after timing: result 0 is wrong")


def test_a_tile_that_fails_is_a_row(tmp_path):
    def times(call):
        if call.tile and call.tile["BLOCK_M"] == 16:
            raise RuntimeError("out of resources: shared memory\nsecond line")
        return speed(call)

    rows = swept(tmp_path / "r.jsonl", device=FakeDevice(times))
    failed = of(rows, stage="screen", status="error")
    assert len(failed) == 2 and failed[0]["reason"].endswith("out of resources: shared memory")
    assert of(rows, stage="final", status="ok")


def test_a_broken_gpu_ends_the_sweep_and_resume_goes_on_behind_it(tmp_path):
    def times(call):
        if call.tile and call.tile["BLOCK_M"] == 16 and call.tile["BLOCK_N"] == 32:
            raise BrokenGPU("CUDA error: an illegal memory access was encountered")
        return speed(call)

    path = tmp_path / "r.jsonl"
    with pytest.raises(PerfError, match="the GPU failed .*illegal memory access.* --resume"):
        swept(path, device=FakeDevice(times))
    assert len(of(results.read(path).rows, status="error")) == 1
    rows = swept(path, device=FakeDevice(times))  # a new process, a GPU that works again
    assert len(of(rows, status="error")) == 1 and of(rows, stage="final", status="ok")


@pytest.mark.parametrize("when", ["race", "recheck"])
def test_a_tile_that_breaks_the_gpu_late_is_left_out_when_resumed(tmp_path, monkeypatch, when):
    """Its screening went well, and without it the others have a race."""
    path, bad, armed = tmp_path / "r.jsonl", dict(BLOCK_M=16, BLOCK_N=32), []
    race, check = sweep.timing.race, Gate.check

    def times(call):
        if armed and call.tile and bad.items() <= call.tile.items():
            raise BrokenGPU("CUDA error: an illegal memory access was encountered")
        return speed(call)

    def armed_race(*args):
        armed.extend([when] if when == "race" else [])
        found = race(*args)
        armed.append(when)
        return found

    def broken_check(gate, call, impl="tilelab"):
        if armed:
            device.spend(call)
        return check(gate, call, impl)

    device = FakeDevice(times)
    monkeypatch.setattr(sweep.timing, "race", armed_race)
    monkeypatch.setattr(Gate, "check", broken_check)
    with pytest.raises(PerfError, match="the GPU failed .*illegal memory access.* --resume"):
        swept(path, device=device)
    monkeypatch.undo()
    rows = swept(path, device=FakeDevice(speed))  # a new process, a GPU that works again
    (failed,) = of(rows, status="error")
    assert failed["stage"] == "screen" and bad.items() <= failed["tile"].items()
    finals = of(rows, stage="final", status="ok")
    assert len(of(finals, impl="tilelab")) == 3 and of(finals, impl="torch")


def test_every_tile_of_an_optimizer_is_checked_on_its_first_step(tmp_path):
    device = FakeDevice(1e-3, noise=0.002)
    args = parsed("sgd", "adamw", "--shapes", "tiny", "-a", "BLOCK_M=256,512,1024", "-a",
                     "num_warps=4")  # fmt: skip
    path = tmp_path / "r.jsonl"
    with results.Writer(path, provenance.header(device.header(), True, args)) as writer:
        sweep.Sweep(device, arguments.workloads(args), args, FakeCompilers(), writer).run()
    rows = results.read(path).rows
    for op in ("sgd", "adamw"):
        assert len(of(rows, op=op, stage="screen")) >= 3
    assert {row["status"] for row in rows} == {"ok"}


def test_cudnn_searches_for_peers_and_not_for_the_reference(tmp_path, monkeypatch):
    found = set()

    def theirs(s, a, b):
        found.add((a.dtype, torch.backends.cudnn.benchmark))
        return a @ b

    op = OPERATORS["matmul"]._replace(theirs=theirs)
    monkeypatch.setitem(OPERATORS, "matmul", op)
    swept(tmp_path / "r.jsonl")
    assert found == {(torch.float64, False), (torch.bfloat16, True)}
    assert not torch.backends.cudnn.benchmark


def test_a_finalist_that_does_not_fit_beside_the_others_is_a_row(tmp_path):
    class Full(FakeDevice):
        def prepare(self, calls, cache=None):
            if self.open_runners == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().prepare(calls, cache)

    rows = swept(tmp_path / "r.jsonl", "matmul", "--peers", "none", device=Full(speed))
    finals = of(rows, stage="final")
    assert sorted(row["status"] for row in finals) == ["error", "error", "ok", "ok"]


def test_a_race_is_in_the_file_before_its_energy_is_measured(tmp_path, monkeypatch):
    def interrupted(device, runner):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.timing, "energy", interrupted)
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        swept(path, "matmul", "--energy")
    finals = of(results.read(path).rows, stage="final", status="ok")
    assert {row["impl"] for row in finals} == {"tilelab", "torch"} and len(finals) == 5


def test_a_dry_run_is_not_a_measurement(monkeypatch, capsys):
    monkeypatch.setattr(sweep.devices, "current_device", lambda: FakeDevice(speed))
    assert main.main(["sweep", "matmul", "--dry-run"]) == 2
    assert "--dry-run where there is a GPU needs TRITON_INTERPRET=1" in capsys.readouterr().err


def test_resuming_does_only_what_is_missing(tmp_path):
    path = tmp_path / "r.jsonl"
    first = swept(path)
    compilers, device = FakeCompilers(), FakeDevice(speed)
    again = swept(path, device=device, compilers=compilers)
    assert again == first and not compilers.jobs and not device.record

    lines = path.read_text().splitlines()
    kept = [line for line in lines if '"stage": "final"' not in line][:-1]  # and one tile less
    path.write_text("\n".join(kept[: kept.index(lines[0]) + 4]) + '\n{"kind": "row", "op": "mat')
    rows = swept(path, device=device, compilers=compilers)
    assert len(compilers.jobs) == 1  # the torn one
    assert len(of(rows, stage="screen")) == 4 and of(rows, stage="final", impl="torch")


def test_resuming_with_another_peer_races_again(tmp_path):
    path = tmp_path / "r.jsonl"
    swept(path, "matmul", "--peers", "none")
    rows = swept(path, "matmul", "--peers", "torch")
    finals = of(rows, stage="final")
    assert {row["impl"] for row in finals} == {"tilelab", "torch"}
    assert len({row["race"] for row in finals}) == 1


def test_rows_of_another_kernel_are_done_again_and_not_mixed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.jsonl"
    monkeypatch.setattr(aot, "source_hash", lambda op: "0ld")
    swept(path)
    monkeypatch.setattr(aot, "source_hash", lambda op: "new")
    time.sleep(0.002)
    rows = swept(path)
    assert {row["source"] for row in of(rows, impl="tilelab")} == {"new"}
    assert len(of(rows, stage="screen")) == 4
    assert "rows of older kernel sources" in capsys.readouterr().out


def test_the_file_of_another_gpu_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    swept(path)
    with pytest.raises(PerfError, match="NVIDIA H200.*NVIDIA B200"):
        swept(path, device=FakeDevice(speed, name="NVIDIA B200", target="sm_100"))


def test_an_unknown_gpu_is_measured_without_its_peaks(tmp_path):
    device = FakeDevice(speed, name="NVIDIA GeForce GTX 9999", target="sm_75")
    rows = swept(tmp_path / "r.jsonl", device=device)
    best = of(rows, stage="final", impl="tilelab")[0]
    assert best["tflops"] > 0 and best["peak_share"] is None and "predicted_s" not in best


@pytest.mark.parametrize("budget", [2.0, 20.0])
def test_the_budget_is_kept(tmp_path, budget):
    device = FakeDevice(speed, noise=0.05)  # so noisy that every race would take its 15 s
    rows = swept(tmp_path / "r.jsonl", "matmul", "--mode", "fwd,dgrad,wgrad", "--budget",
                 str(budget), device=device)  # fmt: skip
    assert device.now() <= 1.1 * budget
    assert device.now() >= 0.5 * budget  # and it is used
    assert {row["mode"] for row in of(rows, stage="final")} == {"fwd", "dgrad", "wgrad"}


def test_what_the_budget_leaves_out_is_said_and_done_when_resumed(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = swept(path, "matmul", "--budget", "0.05", device=FakeDevice(lambda call: 0.05))
    skipped = of(rows, status="skipped")
    assert skipped and skipped[0]["reason"] == "not timed: the time budget ran out"
    rows = swept(path, "matmul")
    assert len(of(rows, stage="screen", status="ok")) == 4


def test_energy(tmp_path):
    rows = swept(tmp_path / "r.jsonl", "matmul", "--energy", device=FakeDevice(speed, watts=500))
    best = min(of(rows, stage="final"), key=lambda row: row["median_s"])
    assert best["joules"] == pytest.approx(500 * best["median_s"], rel=0.05)


def test_only_the_tile_that_a_call_takes(tmp_path, monkeypatch):
    args = parsed("matmul", "sgd", "--shapes", "tiny", "--tiles", "default")
    work, device = arguments.workloads(args), FakeDevice(1e-3, noise=0.002)
    path = tmp_path / "r.jsonl"
    with results.Writer(path, provenance.header(device.header(), True, args)) as writer:
        sweep.Sweep(device, work, args, FakeCompilers(), writer).run()
    rows = results.read(path).rows
    for w in work:
        with _launch.record() as events:
            workloads.prepare(w, "tilelab", "cpu", None)()
        choice = next(e for e in events if isinstance(e, _launch.Choice))
        taken = next(e for e in events if isinstance(e, _launch.Launch)).meta
        (final,) = of(rows, op=w.op, impl="tilelab", stage="final", status="ok")
        assert final["tile_op"] == choice.op and final["tile"].items() <= taken.items()
        assert len(of(rows, op=w.op, impl="tilelab", stage="screen")) == 1
        assert of(rows, op=w.op, impl="torch", stage="final", status="ok")


def test_the_tile_that_a_call_takes_is_the_tuned_one(monkeypatch):
    """Of the GPU that the sweep is on, as a call there would be fitted."""
    monkeypatch.setattr(_launch, "INTERPRET", False)
    args = parsed("matmul", "--shapes", SHAPE, "--tiles", "default")
    work = arguments.workloads(args)

    def tile():
        (taken,) = chosen(work, args, FakeCompilers(), "sm_80", "NVIDIA H200")
        return taken["tile"]

    tuned = dict(BLOCK_M=16, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=4)
    entry = dict(op="matmul", dtype="bfloat16", sizes=dict(work[0].shape), tile=tuned)
    table = {}
    monkeypatch.setattr(_tiles, "_tuned", lambda gpu: table if gpu == "NVIDIA H200" else {})
    assert tile() == aot.describe(work[0], "sm_80")["tile"]
    table["matmul", "bfloat16"] = [entry]
    _tiles._nearest.cache_clear()
    assert tile() == tuned | dict(BLOCK_N=64)  # of 40 columns
    args.tiles = "all"
    assert chosen(work, args, FakeCompilers(), "sm_80", "NVIDIA H200") is None
    _tiles._nearest.cache_clear()


def test_hot_and_cold(tmp_path):
    """The inputs are tiny, so they cannot be rotated past an L2 of 50 MiB: honest rows say hot."""
    rows = swept(tmp_path / "a.jsonl")
    assert {row["cache"] for row in of(rows, stage="final")} == {"hot"}
    small_cache = FakeDevice(speed, l2=100_000)
    rows = swept(tmp_path / "b.jsonl", device=small_cache)
    assert {row["cache"] for row in of(rows, stage="final")} == {"cold"}
    assert len({id(call.inputs[0]) for call in small_cache.record if call.tile}) > 10
    rows = swept(tmp_path / "c.jsonl", "matmul", "--hot", device=FakeDevice(speed, l2=100_000))
    assert {row["cache"] for row in of(rows, stage="final")} == {"hot"}


def test_the_loop_is_closed(tmp_path, monkeypatch):
    """Sweep, save the winner, and the kernels take it."""
    from tilelab.perf.report import tuned_table

    rows = swept(tmp_path / "r.jsonl")
    path = tuned_table.save(rows, tmp_path)
    best = min(of(rows, stage="final", impl="tilelab"), key=lambda row: row["median_s"])
    table = _tiles.read_tuned(path)
    assert table["matmul", "bfloat16"][0]["tile"] == best["tile"]
    assert table["matmul", "bfloat16"][0]["sizes"] == best["sizes"]


SWEEP = [
    sys.executable,
    "-m",
    "tilelab",
    "sweep",
    "matmul",
    "softmax",
    "--mode",
    "all",
    "--dry-run",
]
SWEEP += ["--shapes", "tiny", "--no-plots", "-a", "BLOCK_M=16,32", "-a", "num_warps=4"]


def environment():
    return os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_in_the_middle_a_sweep_loses_at_most_one_row(tmp_path):
    command = [*SWEEP, "--out", str(tmp_path / "run")]
    root = pathlib.Path(__file__).parents[2]
    path = tmp_path / "run" / "results.jsonl"
    process = subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 8:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(pid) for file in children for pid in file.read_text().split()]
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers that outlive their sweep"
        time.sleep(0.05)
    before = path.read_bytes()
    whole = [json.loads(line) for line in before.splitlines() if line.endswith(b"}")]
    assert len(before.splitlines()) - len(whole) <= 1
    again = subprocess.run([*command, "--resume"], cwd=root, env=environment(),
                           capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert path.read_bytes().startswith(before[: before.rindex(b"\n")])
    rows = results.read(path).rows
    tried = [results.key(row) for row in rows]
    assert len(tried) == len(set(tried))
    for op, mode in [("matmul", "wgrad"), ("softmax", "bwd")]:
        assert of(rows, op=op, mode=mode, stage="final", impl="torch", status="ok")
    assert "best of" in again.stdout  # the table of why the others lost


@pytest.mark.parametrize(
    "argv, message",
    [
        (["sweep", "matmull"], "unknown operator 'matmull': there are matmul"),
        (["sweep", "matmul", "--mode", "forward"], "unknown mode 'forward'"),
        (["sweep", "matmul", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["sweep", "matmul", "--shapes", "resnet51"], "resnet51"),
        (["sweep", "matmul", "-a", "BLOCK_M=100"], "powers of two"),
        (["sweep", "matmul", "--peers", "cudnn", "--dry-run"], "unknown peer 'cudnn'"),
        (["sweep", "matmul", "--budget", "-3"], "must be a positive number of seconds, got '-3'"),
        (["compile", "matmul", "--budget", "1m"], "must be a positive number of seconds, got '1m'"),
        (["sweep", "softmax", "--mode", "dgrad"], "softmax has no mode dgrad"),
        (["sweep", "scaled_matmul"], "scaled_matmul has no mode fwd in bf16 (fp8, int8)"),
        (["sweep", "matmul", "--resume", "--out", "nowhere"], "nothing to resume"),
        (["sweep", "matmul", "--tiles", "default", "-a", "BLOCK_M=64"], "is one tile"),
        (["compile", "matmul", "--tiles", "default", "-a", "BLOCK_M=64"], "is one tile"),
        (["sweep", "matmul", "--save-tuned"], "saves what a GPU has measured"),
        (["sweep", "matmul", "--budget", "nan"], "must be a positive number of seconds"),
        (["sweep", "matmul", "--shapes", ""], "unknown set of shapes ''"),
        (["sweep", "matmul", "--top", "0"], "must be a positive number, got '0'"),
        (["compile", "matmul", "--workers", "-1"], "must be a positive number, got '-1'"),
        (["compile", "matmul", "-t", "sm_42"], "sm_42"),
        (["compare", "a", "b", "--fail-on", "odd"], "invalid choice: 'odd'"),
        (["report", "missing.jsonl"], "cannot read missing.jsonl"),
    ],
)
def test_wrong_input_gets_one_clear_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.devices, "current_device", sweep.devices.HostDevice)
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_shapes_help(capsys):
    assert main.main(["sweep", "matmul", "--shapes", "help"]) == 0
    assert "resnet50" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_real_gpu(tmp_path):
    """Everything that a simulated GPU stands for above: compile, gate, screen, race, save, plot."""
    out = tmp_path / "run"
    argv = ["sweep", "matmul", "conv2d", "softmax", "cross_entropy", "sgd", "train_step"]
    argv += ["--mode", "all", "--shapes", "tiny", "--peers", "torch", "--out", str(out)]
    argv += ["-a", "BLOCK_M=64,128", "-a", "BLOCK_N=64", "-a", "num_warps=4", "-a", "num_stages=2"]
    assert main.main(argv) == 0
    rows = results.read(out / "results.jsonl").rows
    assert not of(rows, status="wrong") and (out / "report.html").exists()
    for op in ("matmul", "conv2d", "softmax", "cross_entropy", "sgd", "train_step"):
        assert of(rows, op=op, stage="final", impl="tilelab", status="ok"), op
        assert of(rows, op=op, stage="final", impl="torch", status="ok"), op
