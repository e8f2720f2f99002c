"""`tilelab gpu`: does everything that needs a GPU, in order of value, in the time there is.

gpu_tasks.py lists the tasks; perf/README.md says what they are for. Each is a process of its own,
so a GPU context that breaks takes one task along. A task's files hold what it has finished, and
programme.json says which tasks are done. It is written whole before and after each: Ctrl-C, kill -9
and the end of the budget cost what was under way, and the next call goes on there. A task whose
sources have changed since (kernels, the tuned table) is done again.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from tilelab.kernels import _launch, _tiles
from tilelab.perf.commands import provenance
from tilelab.perf.commands.gpu_tasks import GROUPS, ROOT, Outcome, Task, tasks
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results

BUDGET = 1500.0  # s
OVERTIME = 60.0  # s beyond its share that a task may take: to finish the race it is in
PATIENCE = 10.0  # s that a process has to stop by itself
ATTEMPTS = 3  # at a sweep that a broken GPU ended: it goes on behind the tile that broke it
GOES_ON = "--resume goes on behind it"  # how such a sweep ends its last line
LATE = "ran out of time"
PROBE = (
    "import json; from tilelab.perf.clock import devices; "
    "from tilelab.perf.commands import provenance; "
    "print(json.dumps(devices.current_device().header() | {'versions': provenance.versions()}))"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tilelab gpu`."""
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="for the whole call, shared by weight among what is left (default: %(default)g)",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder, to go on in as well (default: perf/results/<gpu>)"
    )
    parser.add_argument("--only", metavar="TASK,...", help=f"tasks, or of {', '.join(GROUPS)}")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the whole path on the CPU, kernels interpreted, a little of each (default --out: a "
        "new temporary folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what is left, as long as there is time. Returns the exit status: 1 if something failed."""
    began = time.monotonic()
    if not args.list and not (ROOT / "tests").is_dir():
        raise PerfError("tilelab gpu runs the tests, which a wheel lacks: call it in a checkout")
    if not args.budget > 0:
        raise PerfError(f"--budget must be positive, got {args.budget:g}")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise PerfError(f"--out {args.out} is a file: it takes a folder")
    nowhere = pathlib.Path()
    groups = {task.name: task.group for task in tasks(nowhere, "none", args.dry_run, nowhere)}
    names = chosen_tasks(args.only, groups)
    about = machine(args, {groups[name] for name in names})
    out = folder(args, about["gpu"])
    to = (out.parent if out.parent == ROOT / "perf" / "results" else out) / "log.jsonl"
    every = tasks(out, about["gpu"], args.dry_run, to)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"}
    if args.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    programme = Programme(out, every, names, args.budget, about, environment, began)
    if args.list:
        print(programme.table())
        return 0
    return programme.run()


def chosen_tasks(text: str | None, groups: dict[str, str]) -> set[str]:
    """The names of the tasks that --only leaves; `groups` has the group of each task."""
    words = list(GROUPS) if text is None else text.split(",")
    for word in words:
        if word not in {*groups, *GROUPS}:
            known = f"{', '.join(GROUPS)}, or one of {', '.join(groups)}"
            raise PerfError(f"unknown task {word!r}: there are {known}")
    return {name for name, group in groups.items() if name in words or group in words}


# --- where this is -------------------------------------------------------------------------------


def machine(args: argparse.Namespace, groups: set[str]) -> dict[str, Any]:
    """The GPU, its driver and the versions: what may not change between two calls."""
    if args.dry_run:
        return {"gpu": "interpreter", "driver": None, "versions": provenance.versions()}
    known = load(args.out) if args.out else None
    if args.list or groups == {"report"}:  # reads and draws, on any machine
        if known:
            return {name: known.get(name) for name in ("gpu", "driver", "versions")}
        if groups == {"report"} and not torch.cuda.is_available():
            raise PerfError("no GPU here: --only report needs the --out of what was measured")
    if not torch.cuda.is_available():
        if args.list:
            return {"gpu": "<gpu>", "driver": None, "versions": provenance.versions()}
        raise PerfError(
            "torch sees no GPU here: `make test` runs the tests and `make sweep` compiles and "
            "predicts without one; `make gpu ARGS=--dry-run` tries this command"
        )
    if _launch.INTERPRET:
        raise PerfError("TRITON_INTERPRET=1 asks for the CPU: unset it, or give --dry-run")
    return probe()


def probe() -> dict[str, Any]:
    """Ask a process of its own, since a context in this one would disturb what is measured."""
    command = [sys.executable, "-c", PROBE]
    try:
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        found = json.loads(asked.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        raise PerfError("the GPU does not start: `tilelab doctor` says more") from error
    return {name: found[name] for name in ("gpu", "driver", "versions")}


def folder(args: argparse.Namespace, gpu: str) -> pathlib.Path:
    """Where everything goes, as an absolute path."""
    if args.out:
        return args.out.resolve()
    if args.dry_run and not args.list:  # never into the checkout
        return pathlib.Path(tempfile.mkdtemp(prefix="tilelab-dry-run-"))
    return ROOT / "perf" / "results" / _tiles.tuned_path(gpu).stem


# --- what is done --------------------------------------------------------------------------------


def load(out: pathlib.Path) -> dict[str, Any] | None:
    """What programme.json says; None where there is none."""
    path = out / "programme.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PerfError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        what = "remove it, and what was measured is kept and found"
        raise PerfError(f"{path} is damaged: {what}") from error


class Programme:
    """The tasks on one GPU, and what is known of them.

    `every` has the most valuable first; those named are done, in `budget` s since `began`. It is a
    PerfError if the folder `out` is about another GPU, driver, torch or triton.
    """

    def __init__(
        self, out: pathlib.Path, every: list[Task], names: set[str], budget: float,
        about: dict[str, Any], environment: dict[str, str], began: float | None = None,
    ) -> None:  # fmt: skip
        self.out, self.every, self.environment = out, every, environment
        self.tasks = [task for task in every if task.name in names]
        self.budget, self.began = budget, time.monotonic() if began is None else began
        known = load(out) or about | {"tasks": {}}
        for name in ("gpu", "driver", "torch", "triton"):
            was, now = (a.get(name, a["versions"].get(name)) for a in (known, about))
            if was != now:
                raise PerfError(
                    f"{out} is about {name} {was!r}, this is {now!r}: they do not belong "
                    "together, choose another --out"
                )
        self.records: dict[str, dict] = known["tasks"]
        self.state = about | {"tasks": self.records}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.began + self.budget - time.monotonic()

    def done(self, task: Task) -> bool:
        """Whether it was finished, with the sources as they are now."""
        record = self.records.get(task.name, {})
        return record.get("status") == "done" and record.get("source") == task.source()

    def run(self) -> int:
        """Do what is left; print the summary however it ends. Returns the exit status."""
        # SIGTERM, which `timeout` and batch systems send, is as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        interrupted = False
        with _one_at_a_time(self.out):
            try:
                for i, task in enumerate(self.tasks):
                    if not self.done(task):
                        self._do(task, self.tasks[i + 1 :])
            except KeyboardInterrupt:
                interrupted = True
            self._save()
            print(f"\n{self.summary()}")
            unfinished = any(
                self.records.get(task.name, {}).get("status") != "done" for task in self.every
            )
            what = "the next call with this --out goes on" if unfinished else "everything is done"
            print(f"{self.out}: {what}")
        mine = [self.records.get(task.name, {}) for task in self.tasks]
        failed = any(r.get("status") == "failed" or r.get("failures") for r in mine)
        return 130 if interrupted else int(failed)

    def _do(self, task: Task, later: list[Task]) -> None:
        """Do one task, in its share of what is left; record what came of it."""
        seconds, most = share(task, [t for t in later if not self.done(t)], self.left())
        old, source = self.records.get(task.name, {}), task.source()
        if old.get("source") != source:
            old = {}
        command = task.command(seconds) if seconds >= task.least else None
        if command is None:  # with no source: what is fresh is still to be removed
            self._record(task, old | {"status": LATE, "came": old.get("came", "not begun")})
            return
        for path in task.fresh if not old else ():
            path.unlink(missing_ok=True)
        print(f"{task.name}: {seconds:.0f} s of {self.left():.0f}", flush=True)
        record = {"status": "interrupted", "source": source, "seconds": None, "came": ""}
        record |= provenance.commit()
        record |= {"versions": self.state["versions"], "when": provenance.now()}
        self._record(task, record)  # all that a kill -9 leaves
        start, log = time.monotonic(), self.out / "logs" / f"{task.name}.log"
        limit = min(seconds + OVERTIME, max(most - PATIENCE, 0.5 * most))
        try:
            record["status"] = self._attempts(command, log, limit)
        finally:  # interrupted, too
            record["seconds"] = round(time.monotonic() - start, 1)
            self._finish(task, record, log)

    def _finish(self, task: Task, record: dict, log: pathlib.Path) -> None:
        """Read what a task has left, keep it, and say how it went."""
        with _note_errors(task):
            if task.keep:
                task.keep()
        outcome = Outcome("its results cannot be read")
        with _note_errors(task):
            outcome = task.outcome()
        if record["status"] == "done" and not outcome.complete:
            record["status"] = LATE
        self._record(task, record | {"came": outcome.text, "failures": list(outcome.failures)})
        print(f"  {record['status']} in {record['seconds']:.0f} s: {outcome.text}", flush=True)
        if record["status"] == "failed":
            end = "\n".join(f"    {line[:200]}" for line in last_lines(log))
            print(f"  the end of {log}:\n{end}", flush=True)

    def _attempts(self, command: list[str], log: pathlib.Path, seconds: float) -> str:
        """Run a command, and again if it says that it would go on. Returns the status."""
        end = time.monotonic() + seconds
        for _ in range(ATTEMPTS):
            status = execute(command, log, end - time.monotonic(), self.environment)
            if status != "failed" or not any(line.endswith(GOES_ON) for line in last_lines(log)):
                break
        return status

    def _record(self, task: Task, record: dict) -> None:
        self.records[task.name] = record
        self._save()

    def _save(self) -> None:
        results.write_whole(self.out / "summary.md", f"{self.summary()}\n".encode())
        text = json.dumps(self.state, indent=1)
        results.write_whole(self.out / "programme.json", f"{text}\n".encode())

    def summary(self) -> str:
        """Markdown: the tests that failed, then what came of each task."""
        versions = self.state["versions"]
        about = [f"driver {self.state['driver']}"] if self.state["driver"] else []
        about += [f"{name} {versions[name]}" for name in ("torch", "triton")]
        commits = {r["commit"][:7] for r in self.records.values() if r.get("commit")}
        about += [f"commit {', '.join(sorted(commits))}"] if commits else []
        lines = [f"# The GPU programme on {self.state['gpu']}", "", "; ".join(about), ""]
        failures = [f for record in self.records.values() for f in record.get("failures") or ()]
        if failures:
            lines += [f"**{len(failures)} tests failed:**", ""]
            lines += [*(f"- `{name}`" for name in failures), ""]
        lines += ["| task | status | s | what came of it |", "|---|---|---|---|"]
        for task in self.every:
            record = self.records.get(task.name, {})
            seconds = record.get("seconds")
            words = [task.name, record.get("status", "not begun")]
            words += ["" if seconds is None else f"{seconds:.0f}", record.get("came", "")]
            lines.append(f"| {' | '.join(words)} |")
        return "\n".join(lines)

    def table(self) -> str:
        """What `--list` prints: each task with its share, if each takes all of its own."""
        lines, left = [f"{'task':24} {'group':9} {'share':>7}  status"], self.budget
        todo = [task for task in self.tasks if not self.done(task)]
        for task in self.tasks:
            record = self.records.get(task.name, {})
            status = record.get("status", "to do")
            if task in todo:
                status = "to do again" if status == "done" else status
                seconds, _ = share(task, todo[todo.index(task) + 1 :], left)
                words = f"{seconds:.0f} s" if seconds >= task.least else "-"
                left -= seconds if seconds >= task.least else 0.0
            else:
                words = "done"
            came = f": {record['came']}" if record.get("came") else ""
            lines.append(f"{task.name:24} {task.group:9} {words:>7}  {status}{came}")
        return "\n".join(lines)


def share(task: Task, later: list[Task], left: float) -> tuple[float, float]:
    """How long a task may take of what is left, s: its share, and the most.

    Its even share, by weight; or what it needs at least, though others of its group, which are
    worth less, then get nothing. Other groups are left theirs, and the pictures and the log of what
    was measured what they need.
    """
    total = sum(other.weight for other in (task, *later))
    others = [other for other in later if other.group != task.group]
    report = sum(other.least for other in others if other.group == "report")
    rest = sum(other.weight for other in others if other.group != "report")
    most = left - report - left * rest / total
    return min(max(task.least, left * task.weight / total), most), most


# --- processes -----------------------------------------------------------------------------------


def execute(
    command: list[str], log: pathlib.Path, seconds: float, environment: dict[str, str]
) -> str:
    """Run a command with its output in a file, and stop it when its time is over.

    Returns the status: done, failed, or ran out of time. Ctrl-C stops the process, too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_in_the_child,
        )  # fmt: skip
        try:
            return "failed" if process.wait(max(0.0, seconds)) else "done"
        except subprocess.TimeoutExpired:
            return LATE
        finally:
            _stop(process)


_prctl = ctypes.CDLL(None).prctl


def _in_the_child() -> None:
    """End with the programme, kill -9 included (Linux); and hear its SIGINT.

    What a shell runs in the background ignores that signal, and so would what it begins.
    """
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """Ask it to stop, as Ctrl-C would; then make it, and what it has begun."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _one_at_a_time(out: pathlib.Path) -> Iterator[None]:
    """Make the folder, and hold it against another programme."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise PerfError(f"cannot write {out}: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PerfError(f"another programme is at work in {out}") from error
    finally:
        os.close(held)


@contextlib.contextmanager
def _note_errors(task: Task) -> Iterator[None]:
    """What cannot be read or saved of one task must not end the others."""
    try:
        yield
    except PerfError as error:
        print(f"  {task.name}: {error}", flush=True)


def last_lines(log: pathlib.Path) -> list[str]:
    """The last eight lines of a log."""
    return log.read_text(errors="replace").strip().splitlines()[-8:]
