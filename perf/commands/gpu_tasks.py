"""What there is to do on a GPU: the steps of `perf gpu`, in order of value.

The two tables come first: what is tested, and what is swept. A step is a command line, run in a
process of its own by perf/commands/gpu_programme.py, and what can be read of the files that it left.
"""

import argparse
import hashlib
import importlib.util
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tilelab.kernels import _tiles
from tilelab.perf.commands import arguments
from tilelab.perf.compiler import aot
from tilelab.perf.errors import PerfError
from tilelab.perf.report import history
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.work import shapes
from tilelab.perf.work.workloads import DTYPES, OPS

ROOT = pathlib.Path(__file__).parents[2]
AFTER = 0.35  # of a sweep's weight has the second look at its default tile
STARTUP = 10.0  # s that a sweep needs before its own clock starts
GROUPS = ("tests", "ceilings", "sweep", "after", "training", "report")
NOTE_AFTER = "only the tile that a call takes, tuned or not"


class Entry(NamedTuple):
    """A sweep.

    Attributes:
        name: of the step and its folder.
        weight: seconds of a budget of 1500, about.
        op: one operator, or a few with spaces between.
        shapes: as --shapes takes them; where the operator has no such set, its default.
        mode, dtype, peers: as the options of `perf sweep`.
        more: options of the sweep, but not of the second look at the default tile.
    """

    name: str
    weight: float
    op: str
    shapes: str
    mode: str = "all"
    dtype: str = "bf16"
    peers: str = "torch"
    more: tuple[str, ...] = ()


TRAIN_STEP = Entry(
    "train-step", 30, "train_step", "demo@256,demo@1024,demo@4096", peers="torch,graph,compile"
)
SWEEPS = (
    Entry("matmul-square", 90, "matmul", "square", "fwd"),
    Entry("matmul-transformer", 90, "matmul", "transformer", "fwd"),
    Entry("matmul-skinny", 50, "matmul", "skinny", "fwd"),
    Entry("matmul-bias-relu", 60, "matmul_bias_relu", "square,transformer", peers="torch,compile"),
    Entry("bias-relu", 25, "bias_relu", "resnet50@32", peers="torch,compile"),
    Entry("softmax", 35, "softmax", "classes,transformer", peers="torch,compile"),
    Entry("cross-entropy", 35, "cross_entropy", "classes,transformer", peers="torch,compile"),
    Entry("max-pool2d", 20, "max_pool2d", "resnet50@32,vgg16@32", peers="torch,compile"),
    Entry("optimizers", 25, "sgd adamw", "resnet50,vgg16", peers="torch,compile"),
    Entry("conv2d-resnet50", 80, "conv2d", "resnet50@32", "fwd"),
    Entry("conv2d-vgg16", 50, "conv2d", "vgg16@32", "fwd"),
    Entry("conv2d-bias-relu", 60, "conv2d_bias_relu", "resnet50@32,vgg16@32",
          peers="torch,compile"),
    Entry("conv2d-large", 80, "conv2d", "resnet50@256,vgg16@256", "fwd"),
    Entry("conv2d-stems", 25, "conv2d", "stems", "fwd"),
    Entry("conv2d-resnext50", 30, "conv2d", "resnext50", "fwd"),
    Entry("conv2d-mobilenet", 40, "conv2d", "mobilenet", "fwd"),
    Entry("conv2d-dgrad", 80, "conv2d", "resnet50@32,vgg16@32", "dgrad"),
    Entry("conv2d-wgrad", 80, "conv2d", "resnet50@32,vgg16@32", "wgrad"),
    Entry("conv2d-dgrad-large", 90, "conv2d", "resnet50@256,vgg16@256", "dgrad"),
    Entry("conv2d-wgrad-large", 90, "conv2d", "resnet50@256,vgg16@256", "wgrad"),
    Entry("conv2d-relu-pool", 35, "conv2d_relu_pool", "vgg16@32", peers="torch,compile"),
    Entry("conv-stack", 60, "conv_stack", "vgg16@32,vgg16@256", peers="torch,compile"),
    TRAIN_STEP,
    Entry("matmul-fp16", 30, "matmul", "square,transformer", "fwd", "fp16"),
    Entry("conv2d-fp16", 30, "conv2d", "resnet50@32", "fwd", "fp16"),
    Entry("matmul-tf32", 20, "matmul", "square", "fwd", "tf32"),
    Entry("conv2d-tf32", 20, "conv2d", "resnet50@32", "fwd", "tf32"),
    Entry("scaled-matmul-fp8", 20, "scaled_matmul", "square,transformer", "fwd", "fp8"),
    Entry("scaled-matmul-int8", 15, "scaled_matmul", "square,transformer", "fwd", "int8"),
    Entry("matmul-gradients", 20, "matmul", "transformer", "dgrad,wgrad"),
    Entry("conv2d-im2col", 15, "conv2d_im2col im2col col2im", "resnet50@32", "fwd"),
    # What torch.compile makes of products: its tuning takes long, and cannot be cut off.
    Entry("matmul-peers", 60, "matmul", "square,transformer", "fwd", peers="compile,inductor"),
    Entry("conv2d-peers", 60, "conv2d", "resnet50@32", "fwd", peers="compile,inductor"),
)  # fmt: skip
_FEW = ("-a", "BLOCK_M=16,32", "-a", "num_warps=4", "-a", "num_stages=2")
DRY_SWEEPS = (Entry("matmul-square", 90, "matmul", "tiny", "fwd", "fp32", "torch", _FEW),)


class Tests(NamedTuple):
    """A run of pytest: `marks` are its -m, `only` further arguments in a dry run."""

    name: str
    weight: float
    marks: str
    parallel: bool
    only: tuple[str, ...]


TESTS = (
    Tests(
        "tests-core",
        180,
        "core and not gpu",
        True,
        ("tests/kernels/test_bias_relu.py", "-k", "zero"),
    ),
    Tests("tests-gpu", 60, "gpu", False, ("tests/kernels/test_bias_relu.py",)),
)
TRAINING = {  # of nets.train: ours, and the same network of torch's kernels beside it
    "training": (),
    "training-torch": ("--model", "cnn-torch"),
}
DRY_TRAINING = ("--limit", "64", "--epochs", "1", "--batch-size", "32")


class Outcome(NamedTuple):
    """What came of a step: in words; whether nothing is left to do; which tests failed."""

    text: str
    complete: bool = True
    failures: tuple[str, ...] = ()


class Step(NamedTuple):
    """One step.

    Attributes:
        name: of the step.
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


def steps(out: pathlib.Path, gpu: str, dry: bool, to: pathlib.Path) -> list[Step]:
    """Every step, in order.

    Args:
        out: folder of all that is written, but for the tuned table and the log.
        gpu: the device's name, as torch has it.
        dry: on the CPU, kernels interpreted, as little as possible of each.
        to: the log.
    """
    entries = [entry for e in (DRY_SWEEPS if dry else SWEEPS) if (entry := known(e))]
    after = [
        entry._replace(name=f"after-{entry.name}", weight=AFTER * entry.weight, more=())
        for entry in entries
    ]
    training = {"training": ()} if dry else TRAINING
    swept = [out / f"sweep-{entry.name}" / "results.jsonl" for entry in entries]
    again = [out / entry.name / "results.jsonl" for entry in after]
    return [
        *(_tests(t, out, dry) for t in TESTS),
        _ceilings(out),
        *(_sweep(e, path, dry) for e, path in zip(entries, swept, strict=True)),
        *(_after(e, *paths, gpu, dry) for e, *paths in zip(after, again, swept, strict=True)),
        *(_training(name, flags, out, dry) for name, flags in training.items()),
        _plots("plots", swept, out / "figures", 15),
        _report("report", swept, out / "report.html", 40),
        _plots("plots-after", again, out / "figures-after", 10),
        _report("report-after", again, out / "report-after.html", 15),
        _log([*swept, *again], to),
    ]


def known(entry: Entry) -> Entry | None:
    """The entry as this checkout can do it: None if it has not all of the operators and sets."""
    ops, sets = entry.op.split(), entry.shapes.split(",")
    if any(op not in OPS for op in ops) or any(s.split("@")[0] not in shapes.SETS for s in sets):
        return None
    try:
        for op in ops:
            shapes.shapes(op, entry.shapes)
    except PerfError:  # the operator is newer than the table
        return entry._replace(shapes="")
    return entry


def _python(*words: object) -> list[str]:
    """A command line for a process in ROOT. It ends up in results files: paths are from there."""
    return [sys.executable, *(str(_short(w) if isinstance(w, pathlib.Path) else w) for w in words)]


def _short(path: pathlib.Path) -> pathlib.Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def digest(*parts: object) -> str:
    """A short hash of anything that has a repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


# -- correctness and ceilings --------------------------------------------------------------------


def _tests(tests: Tests, out: pathlib.Path, dry: bool) -> Step:
    report = out / f"{tests.name}.xml"

    def command(seconds: float) -> list[str]:
        report.unlink(missing_ok=True)  # what is there afterwards is of this run
        spread = tests.parallel and not dry and importlib.util.find_spec("xdist")
        words = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"] if spread else []
        words += ["-p", "no:cacheprovider", "-m", tests.marks, "--junitxml", report]
        return _python("-m", "pytest", *words, *(tests.only if dry else ()))

    def source() -> str:
        folders = ("kernels", "nets", "perf", "tests")
        files = sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))
        return digest([(path.name, path.read_bytes()) for path in files])

    def outcome() -> Outcome:
        return read_junit(report)

    return Step(tests.name, "tests", tests.weight, 45, command, source, outcome)


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


def _ceilings(out: pathlib.Path) -> Step:
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
    return Step("ceilings", "ceilings", 40, 30, lambda seconds: command, lambda: "", outcome)


# -- sweeps, and the tuned table -----------------------------------------------------------------


def words_of(entry: Entry) -> list[str]:
    """What to sweep, as the command line says it."""
    words = [*entry.op.split(), "--mode", entry.mode, "--dtype", entry.dtype]
    words += ["--shapes", entry.shapes] if entry.shapes else []
    return [*words, "--peers", entry.peers, *entry.more]


def _command(entry: Entry, path: pathlib.Path, dry: bool, *more: str):
    def command(seconds: float) -> list[str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        budget = f"{max(1.0, seconds - STARTUP):.0f}"
        words = [*words_of(entry), "--no-plots", "--resume", "--budget", budget, *more]
        words += ["--dry-run"] if dry else []
        return _python("-m", "tilelab", "sweep", *words, "--out", path.parent)

    return command


def _tile_ops(entry: Entry) -> list[str]:
    """The names by which `choose_tile` knows what is swept; none of a whole training step."""
    return sorted({n for op in entry.op.split() for ns in OPS[op].modes.values() for n in ns})


def sources(entry: Entry) -> str:
    """A hash of the kernels' sources, and of what is asked of them."""
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    parser.add_argument("--peers")
    work = arguments.workloads(parser.parse_args(words_of(entry)))
    hashes = sorted({aot.source_hash(w) for w in work})
    return digest(hashes, entry._replace(weight=0))


def _sweep(entry: Entry, path: pathlib.Path, dry: bool) -> Step:
    def keep() -> None:
        from tilelab.perf.report import tuned_table

        if path.exists():
            tuned_table.save(results.read(path, note=_quiet).rows)

    return Step(
        f"sweep-{entry.name}", "sweep", entry.weight, 45, _command(entry, path, dry),
        lambda: sources(entry), lambda: read_sweep(path),
        keep=None if dry or not _tile_ops(entry) else keep,
    )  # fmt: skip


def _after(entry: Entry, path: pathlib.Path, before: pathlib.Path, gpu: str, dry: bool) -> Step:
    def source() -> str:
        dtype, _ = DTYPES[entry.dtype]
        try:
            table = _tiles.read_tuned(_tiles.tuned_path(gpu))
        except ValueError as error:  # says which file, and what is wrong with it
            raise PerfError(str(error)) from error
        return digest(sources(entry), [table.get((name, dtype)) for name in _tile_ops(entry)])

    more = ("--tiles", "default", "--note", NOTE_AFTER)
    return Step(
        entry.name, "after", entry.weight, 30, _command(entry, path, dry, *more),
        source, lambda: read_after(path, before), fresh=(path,),
    )  # fmt: skip


def _quiet(text: str) -> None:
    """Readers' notes of what they leave out are for those who asked for a file."""


def _read(path: pathlib.Path) -> list[ranking.Row]:
    """The rows of a results file; none where there is no file, or none in it."""
    return results.read(path, note=_quiet).rows if path.exists() else []


def _has_rows(path: pathlib.Path) -> bool:
    try:
        return bool(_read(path))
    except PerfError:  # its own step has said so
        return False


def read_sweep(path: pathlib.Path) -> Outcome:
    """How our best tiles did against the best peer, what failed, and what is left."""
    rows = _read(path)
    statuses: dict[tuple, set[str]] = {}
    for row in rows:
        attempt = results.workload(row), row["impl"], json.dumps(row.get("tile"))
        statuses.setdefault(attempt, set()).add(row["status"])
    left = sum(found == {"skipped"} for found in statuses.values())
    wrong = sum("wrong" in found for found in statuses.values())
    work = history.chosen(rows)
    words = [against(history.ratios(work), len(work))] if work else ["nothing measured"]
    failed = [w.name for w in work if w.best is None]
    words += [f"no right result for {', '.join(failed)}"] if failed else []
    words += [f"{wrong} wrong"] if wrong else []
    words += [f"{left} tiles not tried"] if left else []
    return Outcome("; ".join(words), complete=not left)


def against(ratios: list[tuple[float, ranking.Workload]], count: int) -> str:
    """The mean and the worst of ratios to the best peer, of `count` workloads."""
    if not ratios:
        return f"{count} shapes, none beside a peer"
    worst, whose = min(ratios, key=lambda pair: pair[0])
    mean = stats.geomean([ratio for ratio, _ in ratios])
    text = f"{mean:.3g}x the best peer in {len(ratios)} of {count} shapes"
    return f"{text}, worst {worst:.3g}x {whose.mode} {whose.name}"


def read_after(path: pathlib.Path, before: pathlib.Path) -> Outcome:
    """As `read_sweep`, with what the default tiles did before there was a tuned table."""
    found = read_sweep(path)
    mine = {results.workload(w._asdict()) for w in history.chosen(_read(path))}
    old = []
    for w in history.chosen(_read(before)):
        default = [row for row in w.tiles if row.get("default") and row.get("median_s")]
        if default and w.best_peer and results.workload(w._asdict()) in mine:
            old.append(ranking.paired(default[0], w.best_peer)[0])
    if not old:
        return found
    return found._replace(text=f"{found.text}; before tuning {stats.geomean(old):.3g}x")


# -- training ------------------------------------------------------------------------------------


def _training(name: str, flags: Iterable[str], out: pathlib.Path, dry: bool) -> Step:
    folder = out / name
    few = DRY_TRAINING if dry else ()
    command = _python("-m", "tilelab", "train", "--overwrite", "--out", folder, *flags, *few)

    def source() -> str:
        return digest(sources(TRAIN_STEP), flags)

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

    return Step(name, "training", 20, 15, lambda seconds: command, source, outcome)


# -- pictures, pages and the log -----------------------------------------------------------------


def _of_files(
    name: str, files: list[pathlib.Path], least: float, words: tuple, text: Callable[[], str]
) -> Step:
    """A step about results files: those that have rows by then."""

    def command(seconds: float) -> list[str] | None:
        have = [path for path in files if _has_rows(path)]
        verb, *options = words
        return _python("-m", "tilelab", verb, *have, *options) if have else None

    def source() -> str:
        return digest([path.stat().st_size for path in files if path.exists()])

    return Step(name, "report", least, least, command, source, lambda: Outcome(text()))


def _plots(name: str, files: list[pathlib.Path], folder: pathlib.Path, least: float) -> Step:
    words = ("plot", "--out", folder, "--kind", "forest,curves,roofline,predicted")
    return _of_files(name, files, least, words, lambda: f"{len(list(folder.glob('*')))} figures")


def _report(name: str, files: list[pathlib.Path], page: pathlib.Path, least: float) -> Step:
    return _of_files(name, files, least, ("report", "--out", page), lambda: page.name)


def _log(files: list[pathlib.Path], to: pathlib.Path) -> Step:
    words = ("log", "--to", to)
    return _of_files("log", files, 10, words, lambda: f"{len(history.read(to))} entries in {to}")
