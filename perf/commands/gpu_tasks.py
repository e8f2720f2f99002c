"""The tasks of `tilelab gpu`, in order of value.

A task is a command line and a function that reads its outcome from the files that it left.
perf/commands/gpu_programme.py runs each one in a process of its own. The operators' rows say what
is swept.
"""

import hashlib
import importlib.util
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tilelab.kernels import _tiles
from tilelab.perf.compiler import aot
from tilelab.perf.errors import PerfError
from tilelab.perf.report import history
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.work.operators import OPERATORS, Sweep
from tilelab.perf.work.workloads import DTYPES

ROOT = pathlib.Path(__file__).parents[2]
AFTER = 0.35  # of a sweep's weight has the second look at its default tile
STARTUP = 10.0  # s that a sweep needs before its own clock starts
GROUPS = ("tests", "ceilings", "sweep", "after", "training", "report")
NOTE_AFTER = "only the tile that a call takes, tuned or not"


_FEW = ("-a", "BLOCK_M=16,32", "-a", "num_warps=4", "-a", "num_stages=2")
DRY_SWEEP = Sweep("matmul-square", 90, "tiny", "fwd", "fp32", "torch", ops=("matmul",), more=_FEW)
FEW_TESTS = "tests/kernels/test_bias_relu.py"  # of a dry run
TESTS = {  # of pytest, by task: the weight, its -m, and further words of a dry run
    "tests-core": (180, "core and not gpu", (FEW_TESTS, "-k", "zero")),
    "tests-gpu": (60, "gpu", (FEW_TESTS,)),
}
TRAINING = {  # of `tilelab train`: ours, and the same network of torch's kernels beside it
    "training": (),
    "training-torch": ("--model", "cnn-torch"),
}
DRY_TRAINING = ("--limit", "64", "--epochs", "1", "--batch-size", "32")


class Outcome(NamedTuple):
    """What came of a task: in words; whether nothing is left to do; which tests failed."""

    text: str
    complete: bool = True
    failures: tuple[str, ...] = ()


class Task(NamedTuple):
    """One task.

    Attributes:
        name: of the task.
        group: one of GROUPS, for --only.
        weight: its share of the budget, among the weights of what is left.
        least: s; with less it is not begun.
        command: of the seconds that it has, the command line; None if there is nothing to work on.
        source: a hash of what it depends on. It is done again if that has changed.
        outcome: reads what came of it.
        fresh: files that are removed when it begins with another source.
        keep: what is done with its files when it ends, however that was.
    """

    name: str
    group: str
    weight: float
    least: float
    command: Callable[[float], list[str] | None]
    source: Callable[[], str]
    outcome: Callable[[], Outcome]
    fresh: tuple[pathlib.Path, ...] = ()
    keep: Callable[[], Any] | None = None


def tasks(out: pathlib.Path, gpu: str, dry: bool, to: pathlib.Path) -> list[Task]:
    """Every task, in order.

    Args:
        out: folder of all that is written, but for the tuned table and the log.
        gpu: the device's name, as torch has it.
        dry: on the CPU, kernels interpreted, as little as possible of each.
        to: the log.
    """
    first = [DRY_SWEEP] if dry else sweeps()
    second = [
        sweep._replace(name=f"after-{sweep.name}", seconds=AFTER * sweep.seconds, more=())
        for sweep in first
    ]
    training = {"training": ()} if dry else TRAINING
    swept = [out / f"sweep-{sweep.name}" / "results.jsonl" for sweep in first]
    again = [out / sweep.name / "results.jsonl" for sweep in second]
    return [
        *(_tests(name, out, dry) for name in TESTS),
        _ceilings(out),
        *(_sweep(s, path, dry) for s, path in zip(first, swept, strict=True)),
        *(_after(s, *paths, gpu, dry) for s, *paths in zip(second, again, swept, strict=True)),
        *(_training(name, flags, out, dry) for name, flags in training.items()),
        _plots("plots", swept, out / "figures", 15),
        _report("report", swept, out / "report.html", 40),
        _plots("plots-after", again, out / "figures-after", 10),
        _report("report-after", again, out / "report-after.html", 15),
        _log([*swept, *again], to),
    ]


def sweeps() -> list[Sweep]:
    """The sweeps of all rows, what is worth most first; those of one name are one."""
    found: dict[str, Sweep] = {}
    every = [(sweep, op) for op, row in OPERATORS.items() for sweep in row.sweeps]
    for sweep, op in sorted(every, key=lambda pair: pair[0].turn):
        name, dtype = sweep.name or op.replace("_", "-"), sweep.dtype or OPERATORS[op].dtypes[0]
        before = found.get(name, sweep._replace(name=name, dtype=dtype, seconds=0))
        found[name] = before._replace(seconds=before.seconds + sweep.seconds, ops=(*before.ops, op))
    return list(found.values())


def _python(*words: object) -> list[str]:
    """A command line for a process in ROOT. It ends up in results files: paths are from there."""
    return [sys.executable, *(str(_short(w) if isinstance(w, pathlib.Path) else w) for w in words)]


def _short(path: pathlib.Path) -> pathlib.Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def digest(*parts: object) -> str:
    """A short hash of anything that has a repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


# -- correctness and ceilings --------------------------------------------------------------------


def _tests(name: str, out: pathlib.Path, dry: bool) -> Task:
    weight, marks, few = TESTS[name]
    report = out / f"{name}.xml"

    def command(seconds: float) -> list[str]:
        report.unlink(missing_ok=True)  # what is there afterwards is of this run
        spread = marks != "gpu" and not dry and importlib.util.find_spec("xdist")
        words = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"] if spread else []
        words += ["-p", "no:cacheprovider", "-m", marks, "--junitxml", report]
        return _python("-m", "pytest", *words, *(few if dry else ()))

    def source() -> str:
        folders = ("kernels", "nets", "perf", "tests")
        files = sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))
        return digest([(path.name, path.read_bytes()) for path in files])

    return Task(name, "tests", weight, 45, command, source, lambda: read_junit(report))


def read_junit(path: pathlib.Path) -> Outcome:
    """How many tests passed, and which did not, of pytest's XML file."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome("no result")
    failed = [case for case in cases if not {"failure", "error"}.isdisjoint(e.tag for e in case)]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    passed = len(cases) - skipped - len(failed)
    return Outcome(f"{passed} passed, {len(failed)} failed, {skipped} skipped", True, names)


def _ceilings(out: pathlib.Path) -> Task:
    path = out / "doctor.json"

    def outcome() -> Outcome:
        try:
            found = json.loads(path.read_text())["findings"]
        except OSError:
            return Outcome("no result")
        rates = [f for f in found if f["unit"] in ("TB/s", "TFLOP/s") and f["title"] != "rotation"]
        words = [f"{f['title']} {f['value']:.3g} {f['unit']}" for f in rates]
        count = {level: sum(f["level"] == level for f in found) for level in ("error", "warning")}
        words += [f"{n} {level}{'s' * (n > 1)}" for level, n in count.items() if n]
        return Outcome(", ".join(words) or "nothing measured")

    command = _python("-m", "tilelab", "doctor", "--json", path)
    return Task("ceilings", "ceilings", 40, 30, lambda seconds: command, lambda: "", outcome)


# -- sweeps, and the tuned table -----------------------------------------------------------------


def words_of(sweep: Sweep) -> list[str]:
    """What to sweep, as the command line says it."""
    words = [*sweep.ops, "--mode", sweep.mode, "--dtype", sweep.dtype]
    words += ["--shapes", sweep.shapes] if sweep.shapes else []
    return [*words, "--peers", sweep.peers, *sweep.more]


def _tile_ops(sweep: Sweep) -> list[str]:
    """The names by which `choose_tile` knows what is swept; none of a whole training step."""
    modes = (mode for op in sweep.ops for mode in OPERATORS[op].modes.values())
    return sorted({tile_op.name for mode in modes for tile_op in mode.tile_ops})


def _source(sweep: Sweep) -> str:
    """A hash of the kernels' sources, and of what is asked of them."""
    return digest([aot.source_hash(op) for op in sweep.ops], sweep._replace(seconds=0))


def _command(sweep: Sweep, path: pathlib.Path, dry: bool, *more: str):
    def command(seconds: float) -> list[str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        budget = f"{max(1.0, seconds - STARTUP):.0f}"
        words = [*words_of(sweep), "--no-plots", "--resume", "--budget", budget, *more]
        words += ["--dry-run"] if dry else []
        return _python("-m", "tilelab", "sweep", *words, "--out", path.parent)

    return command


def _sweep(sweep: Sweep, path: pathlib.Path, dry: bool) -> Task:
    def keep() -> None:
        from tilelab.perf.report import tuned_table

        if path.exists():
            tuned_table.save(_rows(path))

    return Task(
        f"sweep-{sweep.name}", "sweep", sweep.seconds, 45, _command(sweep, path, dry),
        lambda: _source(sweep), lambda: read_sweep(path),
        keep=None if dry or not _tile_ops(sweep) else keep,
    )  # fmt: skip


def _after(sweep: Sweep, path: pathlib.Path, before: pathlib.Path, gpu: str, dry: bool) -> Task:
    def source() -> str:
        dtype, _ = DTYPES[sweep.dtype]
        try:
            table = _tiles.read_tuned(_tiles.tuned_path(gpu))
        except ValueError as error:  # says which file, and what is wrong with it
            raise PerfError(str(error)) from error
        return digest(_source(sweep), [table.get((name, dtype)) for name in _tile_ops(sweep)])

    more = ("--tiles", "default", "--note", NOTE_AFTER)
    return Task(
        sweep.name, "after", sweep.seconds, 30, _command(sweep, path, dry, *more),
        source, lambda: read_after(path, before), fresh=(path,),
    )  # fmt: skip


def _rows(path: pathlib.Path) -> list[ranking.Row]:
    """The rows of a results file; none where there is no file, or none in it."""
    return results.read(path, note=lambda text: None).rows if path.exists() else []


def read_sweep(path: pathlib.Path) -> Outcome:
    """How our best tiles did against the best peer, what failed, and what is left."""
    rows = _rows(path)
    statuses: dict[tuple, set[str]] = {}
    for row in rows:
        attempt = results.workload(row), row["impl"], json.dumps(row.get("tile"))
        statuses.setdefault(attempt, set()).add(row["status"])
    left = sum(found == {"skipped"} for found in statuses.values())
    wrong = sum("wrong" in found for found in statuses.values())
    work = history.distinct_work(rows)
    words = [ratios_text(ranking.speedups(work), len(work))] if work else ["nothing measured"]
    failed = [w.name for w in work if w.best is None]
    words += [f"no right result for {', '.join(failed)}"] if failed else []
    words += [f"{wrong} wrong"] if wrong else []
    words += [f"{left} tiles not tried"] if left else []
    return Outcome("; ".join(words), complete=not left)


def ratios_text(speedups: list[ranking.Speedup], count: int) -> str:
    """The mean and the worst of the speed-ups over the best peer, of `count` workloads."""
    if not speedups:
        return f"{count} shapes, none beside a peer"
    worst = min(speedups, key=lambda speedup: speedup.ratio)
    mean = stats.geomean([speedup.ratio for speedup in speedups])
    text = f"{mean:.3g}x the best peer in {len(speedups)} of {count} shapes"
    return f"{text}, worst {worst.ratio:.3g}x {worst.workload.mode} {worst.workload.name}"


def read_after(path: pathlib.Path, before: pathlib.Path) -> Outcome:
    """As `read_sweep`, with what the default tiles did before there was a tuned table."""
    found = read_sweep(path)
    mine = {results.workload(w._asdict()) for w in history.distinct_work(_rows(path))}
    old = []
    for w in history.distinct_work(_rows(before)):
        default = [row for row in w.tiles if row.get("default") and row.get("median_s")]
        if default and w.best_peer and results.workload(w._asdict()) in mine:
            old.append(ranking.paired(default[0], w.best_peer)[0])
    if not old:
        return found
    return found._replace(text=f"{found.text}; before tuning {stats.geomean(old):.3g}x")


# -- training ------------------------------------------------------------------------------------


def _training(name: str, flags: Iterable[str], out: pathlib.Path, dry: bool) -> Task:
    folder = out / name
    few = DRY_TRAINING if dry else ()
    command = _python("-m", "tilelab", "train", "--overwrite", "--out", folder, *flags, *few)

    def source() -> str:
        return digest(aot.source_hash("train_step"), flags)

    def outcome() -> Outcome:
        try:
            lines = (folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return Outcome("no result")
        last = json.loads(lines[-1]) if lines else None
        return Outcome("no epoch" if not last else (
            f"{last['accuracy']:.1%} after epoch {last['epoch']}, "
            f"{last['images_per_second']:,.0f} images/s"
        ))  # fmt: skip

    return Task(name, "training", 20, 15, lambda seconds: command, source, outcome)


# -- pictures, pages and the log -----------------------------------------------------------------


def _of_files(
    name: str, files: list[pathlib.Path], least: float, words: tuple, text: Callable[[], str]
) -> Task:
    """A task about results files: those that have rows by then."""

    def has_rows(path: pathlib.Path) -> bool:
        try:
            return bool(_rows(path))
        except PerfError:  # its own task has said so
            return False

    def command(seconds: float) -> list[str] | None:
        have = [path for path in files if has_rows(path)]
        verb, *options = words
        return _python("-m", "tilelab", verb, *have, *options) if have else None

    def source() -> str:
        return digest([path.stat().st_size for path in files if path.exists()])

    return Task(name, "report", least, least, command, source, lambda: Outcome(text()))


def _plots(name: str, files: list[pathlib.Path], folder: pathlib.Path, least: float) -> Task:
    words = ("plot", "--out", folder, "--kind", "forest,curves,roofline,predicted")
    return _of_files(name, files, least, words, lambda: f"{len(list(folder.glob('*')))} figures")


def _report(name: str, files: list[pathlib.Path], page: pathlib.Path, least: float) -> Task:
    return _of_files(name, files, least, ("report", "--out", page), lambda: page.name)


def _log(files: list[pathlib.Path], to: pathlib.Path) -> Task:
    words = ("log", "--to", to)
    return _of_files("log", files, 10, words, lambda: f"{len(history.read(to))} entries in {to}")
