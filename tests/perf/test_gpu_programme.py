"""tilelab gpu: the order, the shares, what an interruption costs; then the whole of it on the CPU.

Most tasks here are stand-ins of a line each: what is tested is what becomes of them.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.tools import perf_rows
from tilelab import __main__ as main
from tilelab.kernels import _launch, _tiles
from tilelab.perf.clock import devices
from tilelab.perf.commands import (
    arguments,
    doctor,
    gpu_programme,
    gpu_tasks,
    provenance,
    sweep,
)
from tilelab.perf.commands.gpu_programme import LATE, Programme, share
from tilelab.perf.commands.gpu_tasks import ROOT, Outcome, Task
from tilelab.perf.errors import PerfError
from tilelab.perf.report import history, html_page, plot
from tilelab.perf.report import tuned_table as tuning
from tilelab.perf.rows import ranking, results
from tilelab.perf.work.operators import OPERATORS

ABOUT = dict(gpu="NVIDIA H200", driver="580.0", versions=provenance.versions())


def task(folder, name, code="", group="sweep", weight=1.0, least=0.0, source="a", **more):
    """A task that notes in folder/done that it was run, and then does `code`."""
    note = f"open({str(folder / 'done')!r}, 'a').write({name + ' '!r})"
    command = [sys.executable, "-c", f"import sys, time\n{note}\n{code or 'pass'}"]
    more = dict(outcome=lambda: Outcome(f"{name} came")) | more
    return Task(name, group, weight, least, lambda seconds: command, lambda: source, **more)


def run(folder, every, names=None, budget=60.0, about=ABOUT):
    """One call of the programme, in this process: its exit status."""
    names = {s.name for s in every} if names is None else names
    return Programme(folder / "out", every, names, budget, about, dict(os.environ)).run()


def done(folder):
    path = folder / "done"
    return path.read_text().split() if path.exists() else []


def record(folder, name):
    return json.loads((folder / "out" / "programme.json").read_text())["tasks"][name]


# --- order, and what is done ---------------------------------------------------------------------


def test_tasks_are_done_in_order_and_once(tmp_path, capsys):
    every = [task(tmp_path, name) for name in ("tests", "sweep", "after")]
    assert run(tmp_path, every) == 0 and done(tmp_path) == ["tests", "sweep", "after"]
    found = record(tmp_path, "sweep")
    assert found["status"] == "done" and found["came"] == "sweep came" and found["seconds"] < 30
    assert found["versions"] == ABOUT["versions"] and found["when"] and "commit" in found
    assert "everything is done" in capsys.readouterr().out
    assert run(tmp_path, every) == 0 and len(done(tmp_path)) == 3


def test_what_depends_on_other_sources_is_done_again(tmp_path):
    old = tmp_path / "out" / "old.jsonl"
    run(tmp_path, [task(tmp_path, "tests"), task(tmp_path, "after")])
    old.write_text("of the old table")
    every = [task(tmp_path, "tests"), task(tmp_path, "after", source="b", fresh=(old,))]
    assert run(tmp_path, every) == 0 and done(tmp_path) == ["tests", "after", "after"]
    assert not old.exists() and record(tmp_path, "after")["source"] == "b"


def test_what_is_superseded_goes_even_if_the_time_is_short_at_first(tmp_path):
    old = tmp_path / "out" / "old.jsonl"
    run(tmp_path, [task(tmp_path, "after")])
    old.write_text("of the old table")
    again = task(tmp_path, "after", source="b", fresh=(old,), least=99)
    assert run(tmp_path, [again]) == 0 and record(tmp_path, "after")["status"] == LATE
    assert old.exists()  # until there is something better
    assert run(tmp_path, [again._replace(least=0)]) == 0 and not old.exists()


def test_only_some_are_done_and_the_summary_has_them_all(tmp_path, capsys):
    every = [task(tmp_path, name) for name in ("tests", "sweep", "after")]
    run(tmp_path, every, {"after"})
    assert done(tmp_path) == ["after"]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| tests | not begun |" in summary and "| after | done |" in summary
    assert summary.strip() in capsys.readouterr().out


def test_a_failing_task_does_not_stop_the_others(tmp_path, capsys):
    bad = task(tmp_path, "sweep", "print('first'); sys.exit('it broke')")
    every = [task(tmp_path, "tests"), bad, task(tmp_path, "after")]
    assert run(tmp_path, every) == 1 and done(tmp_path) == ["tests", "sweep", "after"]
    assert record(tmp_path, "sweep")["status"] == "failed"
    out = capsys.readouterr().out
    assert "first\n    it broke" in out and "logs/sweep.log" in out
    every[1] = task(tmp_path, "sweep")  # mended: it alone is done again
    assert run(tmp_path, every) == 0 and done(tmp_path)[3:] == ["sweep"]


def test_failed_tests_are_the_first_thing_in_the_summary(tmp_path):
    page = tmp_path / "report.xml"
    page.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_x[1]"/>'
        '<testcase classname="tests.test_a" name="test_y"><failure>no</failure></testcase>'
        '<testcase classname="tests.test_a" name="test_z"><error>no</error></testcase>'
        '<testcase classname="tests.test_a" name="test_w"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    tests = task(tmp_path, "tests", outcome=lambda: gpu_tasks.read_junit(page))
    assert run(tmp_path, [tests, task(tmp_path, "sweep")]) == 1  # even if its process said 0
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "1 passed, 2 failed, 1 skipped" in summary
    assert summary.index("tests.test_a::test_y") < summary.index("| task |")
    assert record(tmp_path, "tests")["failures"][1] == "tests.test_a::test_z"
    page.write_text("<testsuites><test")  # pytest was killed
    assert gpu_tasks.read_junit(page) == Outcome("no result")


def test_a_sweep_behind_a_broken_gpu_goes_on_and_nothing_else_is_tried_twice(tmp_path):
    line = f"error: the GPU failed (x): it is in the file, {gpu_programme.GOES_ON}"
    code = f"n = open({str(tmp_path / 'done')!r}).read().count('a'); sys.exit(n < 3 and {line!r})"
    every = [task(tmp_path, "a", code), task(tmp_path, "b", "sys.exit('error: another')")]
    assert run(tmp_path, every) == 1 and done(tmp_path) == ["a", "a", "a", "b"]
    assert record(tmp_path, "a")["status"] == "done"


def test_what_is_left_within_a_task_is_done_by_the_next_call(tmp_path):
    """A sweep that ends within its own budget has skipped tiles."""
    left = [Outcome("3 tiles not tried", complete=False), Outcome("all")]
    every = [task(tmp_path, "sweep", outcome=lambda: left.pop(0))]
    assert run(tmp_path, every) == 0 and record(tmp_path, "sweep")["status"] == LATE
    assert run(tmp_path, every) == 0 and record(tmp_path, "sweep")["status"] == "done"


def test_results_that_cannot_be_read_or_kept_are_that_tasks_trouble(tmp_path, capsys):
    def broken():
        raise PerfError("line 3: damaged")

    every = [task(tmp_path, "a", outcome=broken, keep=broken), task(tmp_path, "b")]
    assert run(tmp_path, every) == 0 and done(tmp_path) == ["a", "b"]
    assert capsys.readouterr().out.count("a: line 3: damaged") == 2


# --- the budget ----------------------------------------------------------------------------------


def test_shares(tmp_path):
    def made(name, group, weight, least):
        return task(tmp_path, name, group=group, weight=weight, least=least)

    tests, first, second = (made("t", "tests", 1, 5), made("f", "sweep", 2, 30),
                            made("s", "sweep", 1, 30))  # fmt: skip
    page = made("r", "report", 1, 10)
    assert share(tests, [first, second, page], 500) == pytest.approx((100, 500 - 10 - 300))
    assert share(first, [second, page], 400) == pytest.approx((200, 390))
    assert share(first, [second, page], 80) == pytest.approx((40, 70))
    assert share(first, [second, page], 50)[0] == 30  # as much as it needs, and
    assert share(second, [page], 20)[0] < second.least  # what is worth less gets nothing
    assert share(page, [], 10) == (10, 10)
    left, every = 500.0, [tests, first, second, page]  # each taking all that it may: all have some
    for i, s in enumerate(every):
        assert share(s, every[i + 1 :], left)[0] >= s.least
        left -= share(s, every[i + 1 :], left)[1] if s.group == "tests" else 0
    assert left >= 300


def test_the_budget_is_kept_and_what_it_did_not_reach_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_programme, "OVERTIME", 0.2)
    long = "open('/dev/null').read(); time.sleep(60)"
    every = [
        task(tmp_path, "a", long),
        task(tmp_path, "b", long, least=1),
        task(tmp_path, "c", least=30),
        task(tmp_path, "d", group="report", least=0.8),
    ]
    began = time.monotonic()
    assert run(tmp_path, every, budget=4) == 0
    assert 1.5 < time.monotonic() - began < 5
    assert done(tmp_path) == ["a", "b", "d"]
    statuses = [record(tmp_path, name)["status"] for name in "abcd"]
    assert statuses == [LATE, LATE, LATE, "done"]
    summary = capsys.readouterr().out
    assert (
        f"| c | {LATE} |  | not begun |" in summary
        and "the next call with this --out goes on" in summary
    )
    every = [task(tmp_path, name) for name in "abcd"]
    assert run(tmp_path, every) == 0 and done(tmp_path)[3:] == ["a", "b", "c"]


def test_a_task_that_does_not_stop_is_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_programme, "PATIENCE", 0.3)
    monkeypatch.setattr(gpu_programme, "OVERTIME", 0.0)
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '60']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(60)"
    )
    assert run(tmp_path, [task(tmp_path, "a", code)], budget=3) == 0
    assert len(pids.read_text().split()) == 2
    assert not [pid for pid in pids.read_text().split() if alive(int(pid))]


def alive(pid):
    """It runs: what is dead and not yet waited for by its parent does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- interruption --------------------------------------------------------------------------------

MIDDLE = "import os; open({pid!r}, 'w').write(str(os.getpid())); time.sleep(60)"


class Forked:
    """A programme of the tasks a, b and c in a process of its own, which imports nothing."""

    def __init__(self, folder):
        sys.stdout.flush()
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            status = 99
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # not as in the background
                middle = MIDDLE.format(pid=str(folder / "pid"))
                every = [task(folder, "a"), task(folder, "b", middle), task(folder, "c")]
                with open(folder / "printed", "w") as out, contextlib.redirect_stdout(out):
                    status = run(folder, every)
            finally:
                os._exit(status)

    def poll(self):
        if self.status is None:
            self.status = os.waitpid(self.pid, os.WNOHANG)[0] or None
        return self.status


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_in_the_background_too_a_task_can_finish_what_it_is_at(tmp_path, monkeypatch):
    """Shells have background processes ignore SIGINT, and Python then leaves it so."""
    monkeypatch.setattr(gpu_programme, "OVERTIME", 0.0)
    code = f"""
try: time.sleep(60)
except KeyboardInterrupt: open({str(tmp_path / "kept")!r}, "w").write("all")"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(tmp_path, [task(tmp_path, "a", code)], budget=4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "kept").read_text() == "all"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_keeps_what_it_has_and_goes_on(tmp_path, how):
    pid, process = tmp_path / "pid", Forked(tmp_path)
    wait_for(lambda: pid.exists() and pid.read_text(), process)
    os.kill(process.pid, how)
    status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    out = (tmp_path / "printed").read_text()
    for _ in range(250):
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.02)
    assert not alive(int(pid.read_text())), "the task goes on alone"
    assert record(tmp_path, "a")["status"] == "done"
    assert record(tmp_path, "b")["status"] == "interrupted"
    if how != signal.SIGKILL:
        assert status == 130 and "| b | interrupted |" in out and "| c | not" in out
    assert run(tmp_path, [task(tmp_path, name) for name in "abc"]) == 0
    assert done(tmp_path) == ["a", "b", "b", "c"]


def test_one_programme_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(PerfError, match="another programme is at work in .*out"):
        run(tmp_path, [task(tmp_path, "a")])
    os.close(held)
    assert run(tmp_path, [task(tmp_path, "a")]) == 0 and done(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(gpu="NVIDIA B200"), "about gpu 'NVIDIA H200', this is 'NVIDIA B200'"),
        (dict(driver="999"), "about driver '580.0', this is '999'"),
        (dict(versions=ABOUT["versions"] | {"triton": "9"}), "about triton '.*', this is '9'"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, other, message):
    run(tmp_path, [task(tmp_path, "a")])
    with pytest.raises(PerfError, match=message):
        run(tmp_path, [task(tmp_path, "a")], about=ABOUT | other)


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_an_installed_wheel_has_no_tests_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_programme, "ROOT", tmp_path)
    assert main.main(["gpu", "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert "which a wheel lacks: call it in a checkout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "torch sees no GPU here: `make test` runs the tests"),
        (["--budget", "0"], "--budget must be positive, got 0"),
        (["--budget", "nan"], "--budget must be positive, got nan"),
        (["--budget", "soon"], "invalid float value: 'soon'"),
        (["--only", "sweeps"], "unknown task 'sweeps': there are tests, ceilings, sweep, after"),
        (["--only", ""], "unknown task ''"),
        (["--dry-run", "--out", "file"], "--out file is a file"),
        (["--dry-run", "--out", "damaged"], "programme.json is damaged: remove it"),
        (["--dry-run", "--out", "other"], "about gpu 'NVIDIA H200', this is 'interpreter'"),
        (["--only", "report", "--out", "new"], "--only report needs the --out of what was"),
    ],
)
def test_wrong_input_gets_one_clear_line(argv, message, no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("")
    for name, text in [("damaged", "{"), ("other", json.dumps(ABOUT | {"tasks": {}}))]:
        pathlib.Path(name).mkdir()
        pathlib.Path(name, "programme.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    assert main.main(["gpu", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_interpreter_is_not_the_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_launch, "INTERPRET", True)
    assert main.main(["gpu"]) == 2
    assert "TRITON_INTERPRET=1 asks for the CPU" in capsys.readouterr().err


def test_the_gpu_is_asked_by_another_process(monkeypatch):
    assert gpu_programme.probe()["gpu"] == devices.current_device().name
    monkeypatch.setattr(gpu_programme, "PROBE", "raise SystemExit('no')")
    with pytest.raises(PerfError, match="the GPU does not start: `tilelab doctor`"):
        gpu_programme.probe()


def test_the_list_runs_nothing(no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_programme, "execute", None)
    assert main.main(["gpu", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["tests-core", "tests"] and lines[-1].split()[0] == "log"
    shares = [float(line.split()[2]) for line in lines[1:] if line.split()[2] != "-"]
    # Each share is printed as whole seconds.
    assert 1300 < sum(shares) <= 1500 + len(shares) / 2
    assert all("to do" in line for line in lines[1:])
    assert main.main(["gpu", "--list", "--only", "ceilings", "--out", str(tmp_path / "x")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 and not list(tmp_path.iterdir())


def test_with_no_time_at_all_nothing_is_begun(tmp_path, capsys):
    argv = ["gpu", "--dry-run", "--budget", "0.01", "--out", str(tmp_path / "o")]
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count(f"| {LATE} |") == len(gpu_tasks.tasks(tmp_path, "x", True, tmp_path))
    assert not (tmp_path / "o" / "logs").exists()
    assert main.main([*argv, "--list"]) == 0
    assert LATE in capsys.readouterr().out


def test_folders(monkeypatch):
    args = argparse.Namespace(out=None, dry_run=False, list=False)
    name = "NVIDIA H100 80GB HBM3"
    assert gpu_programme.folder(args, name) == ROOT / "perf/results/nvidia-h100-80gb-hbm3"
    args.dry_run = True
    temporary = gpu_programme.folder(args, "interpreter")
    assert not temporary.is_relative_to(ROOT) and not list(temporary.iterdir())
    temporary.rmdir()


# --- the tasks -----------------------------------------------------------------------------------


def parsed(module, words):
    parser = main.Parser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def test_every_task_is_a_command_that_exists(tmp_path):
    every = gpu_tasks.tasks(tmp_path, "NVIDIA H200", False, tmp_path / "log.jsonl")
    assert len({s.name for s in every}) == len(every)
    assert [s.group for s in every] == sorted((s.group for s in every), key=gpu_tasks.GROUPS.index)
    modules = dict(sweep=sweep, doctor=doctor, plot=plot, report=html_page, log=history)
    for s in every:
        if s.group == "report":
            assert s.command(60) is None  # there is nothing yet
            name = "after" if s.name.endswith("-after") else "sweep"
            path = tmp_path / f"{name}-matmul-square" / "results.jsonl"
            perf_rows.write(path, perf_rows.header(), *perf_rows.rows(only="softmax", count=4))
        _, _, module, *words = s.command(60)
        if module == "tilelab" and words[0] != "train":
            args = parsed(modules[words[0]], words[1:])
        path.unlink() if s.group == "report" else None
        if s.group in ("sweep", "after"):
            assert (
                set(args.peers.split(",")) <= {"torch", "graph", "compile", "inductor"}
                and args.resume
                and args.budget == 50
                and arguments.workloads(args)
            )
            assert args.tiles == ("default" if s.group == "after" else "all")
            assert not args.save_tuned and not args.dry_run and args.out.parent == tmp_path
        assert s.source() == s.source() and (s.source() or s.group == "ceilings")
    assert {module for s in every if s.group == "training" for module in s.command(1)[2:4]} == {
        "tilelab",
        "train",
    }
    assert "core and not gpu" in every[0].command(60) and "gpu" in every[1].command(60)


def test_in_a_dry_run_every_sweep_is_one(tmp_path):
    for s in gpu_tasks.tasks(tmp_path, "interpreter", True, tmp_path / "log.jsonl"):
        assert s.keep is None
        if s.group in ("sweep", "after"):
            assert "--dry-run" in s.command(60) and "tiny" in s.command(60)


def test_every_operator_is_swept_and_what_is_worth_most_comes_first():
    sweeps = gpu_tasks.sweeps()
    assert {op for sweep in sweeps for op in sweep.ops} == set(OPERATORS)
    assert sweeps[0].name == "matmul-square" and sweeps[-1].name == "conv2d-peers"
    (optimizers,) = [sweep for sweep in sweeps if "sgd" in sweep.ops]
    assert optimizers.ops == ("sgd", "adamw") and optimizers.seconds == 25
    words = gpu_tasks.words_of(optimizers)
    assert words[:6] == ["sgd", "adamw", "--mode", "all", "--dtype", "bf16"]


def test_paths_of_the_checkout_are_relative(tmp_path):
    out = ROOT / "perf" / "results" / "nvidia-h200"
    words = gpu_tasks._python("-m", "tilelab", out, tmp_path)
    assert words[3:] == ["perf/results/nvidia-h200", str(tmp_path)]


def swept(path):
    """A results file of one sweep: its path, and its rows."""
    rows = perf_rows.workload(perf_rows.matmul(512), 3, 12)
    path.parent.mkdir(exist_ok=True)
    return perf_rows.write(path, perf_rows.header(), *rows), rows


def test_what_came_of_a_sweep(tmp_path):
    path, rows = swept(tmp_path / "a" / "r.jsonl")
    found = gpu_tasks.read_sweep(path)
    ratio = ranking.speedups(history.distinct_work(results.read(path).rows))[0].ratio
    assert found.complete
    assert found.text == (
        f"{ratio:.3g}x the best peer in 1 of 1 shapes, worst {ratio:.3g}x fwd square 512"
    )
    tile = rows[0]["tile"] | {"num_stages": 9}
    late = rows[0] | dict(tile=tile, status="skipped", stage="compile", reason="late")
    wrong = rows[0] | dict(tile=tile | {"num_warps": 1}, status="wrong", stage="screen")
    perf_rows.write(path, perf_rows.header(), *rows, late, wrong)
    found = gpu_tasks.read_sweep(path)
    assert not found.complete and found.text.endswith("; 1 wrong; 1 tiles not tried")
    perf_rows.write(path, perf_rows.header(), *rows, late, late | dict(status="ok", stage="screen"))
    assert gpu_tasks.read_sweep(path).complete  # the next call has tried it
    assert gpu_tasks.read_sweep(tmp_path / "none").text == "nothing measured"


def test_winners_are_tuned_even_of_an_interrupted_sweep(tmp_path, monkeypatch):
    real = _tiles.tuned_path
    monkeypatch.setattr(_tiles, "tuned_path", lambda gpu, folder=None: real(gpu, tmp_path))
    every = gpu_tasks.tasks(tmp_path, perf_rows.GPU, False, tmp_path / "log.jsonl")
    by_name = {s.name: s for s in every}
    names = ["after-matmul-square", "after-matmul-fp16", "after-softmax"]
    before = [by_name[name].source() for name in names]
    by_name["sweep-matmul-square"].keep()  # nothing was measured: nothing to save
    path, rows = swept(tmp_path / "sweep-matmul-square" / "results.jsonl")
    screened = [row for row in rows if row["stage"] != "final"]
    perf_rows.write(path, perf_rows.header(), *screened)
    by_name["sweep-matmul-square"].keep()
    (entry,) = _tiles.read_tuned(real(perf_rows.GPU, tmp_path))["matmul", "bfloat16"]
    best = min((r for r in screened if r["status"] == "ok"), key=lambda r: r["median_s"])
    assert entry["tile"] == best["tile"]
    after = [by_name[name].source() for name in names]
    assert [a != b for a, b in zip(after, before, strict=True)] == [True, False, False]
    assert by_name["sweep-train-step"].keep is None  # it has no tile
    real(perf_rows.GPU, tmp_path).write_text("{")
    with pytest.raises(PerfError, match="synthetic"):
        by_name["after-softmax"].source()
    with pytest.raises(PerfError, match="the tuned table was not saved"):
        by_name["sweep-matmul-square"].keep()


def test_a_table_is_never_made_of_a_dry_run(tmp_path):
    row = perf_rows.workload(perf_rows.matmul(512), 3, 4)[0] | {"gpu": "interpreter"}
    row |= dict(status="ok", stage="final", median_s=1.0)
    with pytest.raises(PerfError, match="no row has a tile to save"):
        tuning.save([row], tmp_path)


# --- the whole of it -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_programme_killed_in_the_middle_and_gone_on_with(tmp_path):
    out = tmp_path / "out"
    groups = "tests-core,ceilings,sweep,after,training,plots,log"
    command = [sys.executable, "-m", "tilelab", "gpu", "--dry-run", "--only", groups]
    command += ["--out", str(out)]
    rows = out / "sweep-matmul-square" / "results.jsonl"
    kept = [ROOT / "kernels" / "tuned", ROOT / "perf" / "results"]
    before = [sorted(folder.rglob("*")) for folder in kept]
    first = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                             stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    wait_for(lambda: rows.exists() and b'"screen"' in rows.read_bytes(), first)
    first.kill()  # it alone: what it had begun must end with it
    first.wait()
    state = json.loads((out / "programme.json").read_text())["tasks"]
    assert {name: r["status"] for name, r in state.items()} == {
        "tests-core": "done", "ceilings": "done",
        "sweep-matmul-square": "interrupted",
    }  # fmt: skip
    again = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    begun = [line.partition(":")[0] for line in again.stdout.splitlines() if " s of " in line]
    every = ["tests-core", "ceilings", "sweep-matmul-square", "after-matmul-square", "training"]
    every += ["plots", "log"]
    assert begun == every[2:]
    after = json.loads((out / "programme.json").read_text())["tasks"]
    assert list(after) == every and {r["status"] for r in after.values()} == {"done"}
    assert [after[name]["when"] for name in every[:2]] == [r["when"] for r in state.values()][:2]
    assert after["tests-core"]["came"].startswith("3 passed, 0 failed")
    found = results.read(rows).rows
    assert len({results.key(row) for row in found}) == len(found)
    finals = [row for row in found if row["stage"] == "final"]
    assert {row["impl"] for row in finals} == {"tilelab", "torch"}
    (again,) = history.read(out / "log.jsonl")[1:]
    assert again["note"] == gpu_tasks.NOTE_AFTER and again["op"] == "matmul" and again["ratio"]
    for name in ("doctor.json", "summary.md", "training/metrics.jsonl"):
        assert (out / name).stat().st_size, name
    assert list((out / "figures").glob("forest-*.png"))
    assert before == [sorted(folder.rglob("*")) for folder in kept]
