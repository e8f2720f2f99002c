"""`tilelab compile`: compiles every tile for GPUs that need not be here, and predicts its time.

Each target gets one results file. A row has registers, spills, shared memory, occupancy and its
limit, tensor-core instructions, widths of loads, the length of the main loop, waves, padding, and
the predicted time. Nothing is run on a GPU. `--explain` says in words what one tile does; for sm_80
and sm_90 it also executes one program (perf/machine) and counts what compiling cannot tell.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tilelab.kernels import _tiles
from tilelab.nets.files import numbered
from tilelab.perf.commands import arguments, provenance
from tilelab.perf.commands.progress import Progress
from tilelab.perf.compiler import aot
from tilelab.perf.compiler.prediction import predict, refused
from tilelab.perf.errors import PerfError
from tilelab.perf.report import diagnosis
from tilelab.perf.rows import ranking, results
from tilelab.perf.work import gpus
from tilelab.perf.work.operators import is_product
from tilelab.perf.work.tile_work import ALIKE
from tilelab.perf.work.workloads import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tilelab compile`."""
    arguments.add_arguments(parser, "compile", top=10)
    parser.add_argument(
        "-t",
        "--target",
        default="sm_90",
        help=f"of {', '.join(gpus.TARGETS)}, or GPUs: {', '.join(gpus.GPUS)} (default: sm_90)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="say in words what one tile does, and show its loop"
    )


def run(args: argparse.Namespace) -> int:
    """Compile what the arguments say, for each target. Returns the exit status."""
    chosen = [gpus.find(text) for text in args.target.split(",")]
    chosen = list({gpu.name: gpu for gpu in chosen}.values())  # sm_90 and h200 are one
    work = arguments.workloads(args)
    if args.explain:
        return _explain(work, args, chosen)
    folder = out_folder(args, "compile")
    began = time.monotonic()
    with aot.Compilers(args.workers) as compilers:
        for i, gpu in enumerate(chosen):
            share = None
            if args.budget:
                share = (began + args.budget - time.monotonic()) / (len(chosen) - i)
            compile_all(work, gpu, compilers, folder / f"{label(gpu)}.jsonl", args, share)
    return 0


def out_folder(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where the results go: --out, or a new runs/<name>[-n]; with --resume the newest of these."""
    default = pathlib.Path("runs") / name
    free, last = numbered(default, pathlib.Path.exists)
    if not args.resume:
        if args.out is None:
            return free
        if any(args.out.glob("*.jsonl")):
            raise PerfError(f"{args.out} has results: go on with --resume, or choose another")
        return args.out
    found = args.out or last
    if found is None or not found.is_dir():
        raise PerfError(f"nothing to resume: there is no {found or default}")
    return found


def label(gpu: gpus.GPU) -> str:
    """What a GPU is called in results: its target, if it is the one that stands for that."""
    return gpu.target if gpus.find(gpu.target) is gpu else gpu.name


def compile_all(
    work: list[Workload], gpu: gpus.GPU, compilers: aot.Compilers, path: pathlib.Path,
    args: argparse.Namespace, seconds: float | None = None,
) -> None:  # fmt: skip
    """Compile every tile of all work for one GPU into a results file; print what came of it.

    What `seconds` do not suffice for is skipped.
    """
    until = None if seconds is None else time.monotonic() + seconds
    fields = {"gpu": f"{label(gpu)} (compiled)", "target": gpu.target}
    print(f"{gpu.target}: compiled, not run; times are predictions for the {gpu.title}")
    with results.Writer(path, provenance.header(fields, False, args)) as writer:
        taken = chosen(work, args, compilers, gpu.target, table_name(gpu))
        jobs, rows = missing(work, args, compilers, writer, gpu.target, taken=taken)
        left = None if until is None else until - time.monotonic()
        print(f"to compile: {len(jobs)}, in {compilers.workers} processes at once")
        for row in compile_rows(jobs, gpu.target, gpu, compilers, left):
            row["status"] = "predicted" if row["status"] == "ok" else row["status"]
            rows.append(row)
            if row["status"] != "skipped":
                writer.write(stored(row))
        skipped = [row for row in rows if row["status"] == "skipped"]
        writer.write_all(map(stored, skipped))
    found = by_work(rows)
    for i, w in enumerate(work):
        print("\n" + table(found[results.workload(w._asdict())], args.top))
        if taken:
            print(chosen_text(taken[i], gpu))
    print(f"\n{len(rows)} {'tile' if len(rows) == 1 else 'tiles'} in {path}")
    if skipped:
        print(skipped_text(len(skipped), args.budget))


def skipped_text(count: int, budget: float) -> str:
    """What is said of tiles that got no time."""
    return (
        f"skipped: {count} {'tile' if count == 1 else 'tiles'}, because the time budget of "
        f"{budget:g} s ran out; --resume goes on with them"
    )


def table_name(gpu: gpus.GPU) -> str:
    """What torch calls this GPU: of several names the one that has a tuned table."""
    names = gpu.device_names
    return next((name for name in names if _tiles.tuned_path(name).exists()), names[0])


def chosen(
    work: list[Workload], args: argparse.Namespace, compilers: aot.Compilers, target: str, gpu: str
) -> list[dict] | None:
    """For `--tiles default`, the tiles that each call takes on the GPU of this name, and why.

    Otherwise None. The target is "" where kernels are interpreted: then it is this process that
    chooses.
    """
    if args.tiles != "default":
        return None
    if not target:
        return [aot.choose(w, "", "") for w in work]
    asked = [compilers.submit("choose", w, target, gpu) for w in work]
    answers = [future.result() for future in asked]
    for w, answer in zip(work, answers, strict=True):
        if answer.get("failed"):
            raise PerfError(f"{w.op} {w.mode} {w.name}: {answer['failed']}")
    return answers


def chosen_text(taken: dict, gpu: gpus.GPU) -> str:
    """What `aot.choose` has found, for a terminal: each tile, and why it is that."""
    lines = []
    for choice in taken["choices"]:
        about = f"{choice['op']} {choice['dtype']}, {ranking.shape_text(choice['sizes'])}"
        lines.append(f"  {about}: {ranking.tile_text(choice['tile'])}")
        lines += [f"    {line}" for line in choice["why"]]
    many = "tile" if len(taken["choices"]) == 1 else "tiles"
    head = f"the {many} that a call takes on the {gpu.title}, and why"
    if taken["untuned"]:
        head += f" (nothing is tuned: there is no kernels/tuned/{taken['untuned']})"
    return "\n".join([f"{head}:", *lines])


Job = tuple[Workload, dict]  # a tile to do, as the fields of its row


def missing(
    work: list[Workload], args: argparse.Namespace, compilers: aot.Compilers,
    writer: results.Writer, target: str, attempts: Sequence[dict] = ({"stage": "compile"},),
    taken: list[dict] | None = None,
) -> tuple[list[Job], list[dict]]:  # fmt: skip
    """The tiles still to do, one of each workload in turn; and the rows that the file has already.

    So a sweep that is cut short has tried as many tiles of each workload. A tile is done if it has
    a row of one of these attempts: a stage, or a stage and a cache. The target is "" where kernels
    are interpreted. `taken` are the only tiles to do, of each workload one (see `chosen`).
    """
    asked = [compilers.submit("describe", w, target) for w in work]
    lists, done = [], []
    progress = Progress("listing tiles", len(work), "problem", leave=False)
    for i, (w, future) in enumerate(progress.over(list(zip(work, asked, strict=True)))):
        described = future.result()
        if described.get("failed"):
            raise PerfError(f"{w.op} {w.mode} {w.name}: {described['failed']}")
        base, jobs = arguments.identity(w, aot.source_hash(w.op)), []
        which = arguments.tiles(described, w, args.axis, args.tiles)
        for tile in which if taken is None else [taken[i]["tile"]]:
            fields = base | {"impl": "tilelab", "tile": tile}
            fields["default"] = tile == described.get("tile")
            fields["lesson"] = tile in described.get("lesson", ())  # to sort by; not stored
            known = [writer.find(fields | attempt, base["source"]) for attempt in attempts]
            known = [row for row in known if row and row["status"] != "skipped"]
            done += known
            jobs += [] if known else [(w, fields)]
        lists.append(jobs)
    return [job for turn in itertools.zip_longest(*lists) for job in turn if job], done


def compile_rows(
    jobs: Sequence[Job], target: str, gpu: gpus.GPU | None, compilers: aot.Compilers,
    seconds: float | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Compile, and yield rows as they are ready: status ok, pruned (with the reason) or error.

    What is not ready after so many seconds comes last, with the status skipped.
    """
    waiting = {compilers.submit("compile", w, row["tile"], target): row for w, row in jobs}
    try:
        with Progress(target, len(jobs)) as progress, contextlib.suppress(TimeoutError):
            for future in concurrent.futures.as_completed(list(waiting), seconds):
                progress.update()
                yield finish(waiting.pop(future) | future.result(), gpu)
        late = {"stage": "compile", "status": "skipped"}
        for row in list(waiting.values()):
            yield row | late | {"reason": "not compiled: the time budget ran out"}
    finally:
        for future in waiting:
            future.cancel()


def finish(row: dict, gpu: gpus.GPU | None) -> dict:
    """A compiled tile's row: with its prediction (of a known GPU), and whether to run it."""
    row = row | {"stage": "compile", "status": "ok"}
    if gpu is not None and not row.get("failed"):
        row |= predict(row, gpu)
    reason = refused(row)
    if reason:
        row |= {"status": "error" if row.get("failed") else "pruned", "reason": reason}
    return row


def stored(row: dict) -> dict:
    """The part of a row that the results file keeps, with the time; the rest was for predicting."""
    return {k: v for k, v in row.items() if k in results.ROW} | {"time": provenance.now()}


def by_work(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """The rows of each workload, by what `results.workload` says of them, or of `w._asdict()`."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        found[results.workload(row)].append(row)
    return found


COLUMNS = {  # of the table: heading, and how a row fills it
    "tile": ranking.tile_label,
    "registers": lambda r: r.get("registers"),
    "spills": lambda r: r.get("spills"),
    "shared": lambda r: r.get("shared"),
    "occupancy": lambda r: f"{r['occupancy']:.0%} {r['limit']}",
    "tensor cores": lambda r: r.get("tensor_core") or "-",
    "load": lambda r: r.get("load_bytes"),
    "loop": lambda r: r.get("loop_instructions"),
    "waves": lambda r: f"{r['waves']:.2f}",
    "padding": lambda r: f"{r['padding']:.2f}",
    "µs": lambda r: f"{r['predicted_s'] * 1e6:.1f}",
    "TFLOP/s": lambda r: ranking.number_text(r["predicted_tflops"]),
    "GB/s": lambda r: ranking.number_text(r["predicted_gbps"]),
    "bound": lambda r: r.get("bound", ""),
}


def table(rows: list[dict], top: int) -> str:
    """The fastest tiles of one workload as predicted, the default, and what was not worth running.

    A product has its speed in TFLOP/s, and in GB/s if memory is what it waits for; others in GB/s.
    """
    first = rows[0]
    good = [row for row in rows if row["status"] in ("ok", "predicted")]
    good.sort(key=lambda row: row["predicted_s"])
    words = (first[key] for key in ("op", "mode", "dtype", "precision"))
    title = f"{' '.join(words)}, {first['shape_name']}, predicted"
    if good and good[0].get("known"):
        title += f" ({good[0]['known']})"
    if first["tile"] is None:
        if not good:
            return f"{title}: {first['reason']}"
        row = good[0]
        return f"{title}: {ranking.time_text(row['predicted_s'])}, {row['launches']} launches"
    columns = dict(COLUMNS)
    if not is_product(first["op"]):
        del columns["TFLOP/s"]
    elif not good or good[0].get("bound") != "memory":
        del columns["GB/s"]
    cells = [list(columns)]
    for row in good[:top] + [row for row in good[top:] if row.get("default")]:
        found = (fill(row) for fill in columns.values())
        cells.append(["" if value is None else str(value) for value in found])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [title]
    for line in cells:
        lines.append("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    lines += filter(None, [undecided(good)])
    refusals = Counter()
    for row in rows:
        if row["status"] == "error":
            refusals[row["reason"].split(":")[0]] += 1
        elif row["status"] == "pruned":
            spills = row["reason"].startswith("spills")
            refusals["spills registers" if spills else row["reason"]] += 1
    lines += [f"not worth running: {n} x {what}" for what, n in refusals.items()]
    skipped = sum(row["status"] == "skipped" for row in rows)
    lines += [f"skipped, the time budget ran out: {skipped}"] if skipped else []
    return "\n".join(lines)


def undecided(good: list[dict]) -> str:
    """What to say if the model cannot tell several tiles from the first."""
    most = (1 + ALIKE) * good[0]["predicted_s"] if good else 0
    alike = [row for row in good if row["predicted_s"] <= most]
    if len(alike) < 2:
        return ""
    words = f"the model can't choose among the first {len(alike)}, which are within {ALIKE:.0%}"
    default = next((row for row in good if row.get("default")), None)
    if default is not None:
        words += f"; a call takes the default, {ranking.tile_text(default['tile'])}"
    return words


def _explain(work: list[Workload], args: argparse.Namespace, asked: list[gpus.GPU]) -> int:
    w = work[0]
    if not args.axis:
        args.tiles = "default"
    with aot.Compilers(1) as compilers:
        for gpu in asked:
            taken = chosen([w], args, compilers, gpu.target, table_name(gpu))
            described = compilers.submit("describe", w, gpu.target).result()
            if described.get("failed"):
                raise PerfError(described["failed"])
            tile = taken[0]["tile"] if taken else arguments.tiles(described, w, args.axis)[0]
            if tile is None:
                raise PerfError(f"{w.op} has no tile of its own to explain")
            row = arguments.identity(w, aot.source_hash(w.op)) | {"impl": "tilelab", "tile": tile}
            row = finish(row | compilers.submit("compile", w, tile, gpu.target).result(), gpu)
            print(diagnosis.describe_tile(row, gpu))
            if taken:
                print(f"\n{chosen_text(taken[0], gpu)}")
            if not row.get("failed"):
                loop = compilers.submit("annotate", w, tile, gpu.target).result()
                print(diagnosis.annotate(loop))
                print(diagnosis.counted(compilers.submit("execute", w, tile, gpu.target).result()))
    return 0
