"""`tilelab sweep`: times every tile and every peer, and says which is best and why.

All tiles are compiled first. Then those of each workload go through a gate, a screening and a race:
perf/README.md explains them ("How a sweep measures"). Each row is in the file once it is known, and
`--resume` goes on from there. With no GPU the first step is all there is; then this is `tilelab
compile`, and says so.
"""

import argparse
import contextlib
import gc
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tilelab.kernels import _tiles
from tilelab.perf.clock import devices, timing
from tilelab.perf.clock.correctness import Gate
from tilelab.perf.commands import arguments, provenance
from tilelab.perf.commands import compile as compiling
from tilelab.perf.commands.compile import by_work, chosen, compile_rows, missing, stored
from tilelab.perf.commands.progress import Progress
from tilelab.perf.compiler import aot
from tilelab.perf.errors import PerfError
from tilelab.perf.report import diagnosis, tuned_table
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.work import gpus, workloads
from tilelab.perf.work.peers import PEERS, forget_compiled
from tilelab.perf.work.workloads import Workload

FINALISTS = 8
SLOW = 2.0  # a tile this much slower than the best of its screening is no finalist
COMPILE_SHARE = 0.4  # of a time budget
SCREEN_SHARE = 0.6  # of what is left for a workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tilelab sweep`."""
    arguments.add_arguments(parser, "sweep", top=5)
    parser.add_argument(
        "--peers", default="torch", help=f"all, none, or of {', '.join(PEERS)} (default: torch)"
    )
    parser.add_argument(
        "--save-tuned", action="store_true", help="let the kernels use the winners from now on"
    )
    parser.add_argument("--energy", action="store_true", help="joules of the finalists: 5 s each")
    parser.add_argument("--hot", action="store_true", help="one set of inputs: the cache is hot")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and order (default: 0)")
    parser.add_argument("--no-plots", action="store_true", help="write the results file alone")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the whole path on the CPU, kernels interpreted: for tiny shapes, times mean nothing",
    )
    parser.add_argument(
        "-t", "--target", default="sm_90", help="what to predict for without a GPU (default: sm_90)"
    )


def run(args: argparse.Namespace) -> int:
    """Sweep what the arguments say. Returns the exit status."""
    work = arguments.workloads(args)
    peers(args.peers)  # an error in them comes first
    device = devices.current_device()
    if args.dry_run and device.target is not None:
        raise PerfError("--dry-run where there is a GPU needs TRITON_INTERPRET=1 before `python`")
    if device.target is None and args.save_tuned:
        raise PerfError("--save-tuned saves what a GPU has measured: there is none here")
    folder = compiling.out_folder(args, "sweep")
    with aot.Compilers(args.workers) as compilers:
        if device.target is None and not args.dry_run:
            print("No GPU here: tiles are compiled and predicted, not timed (tilelab compile).")
            gpu = gpus.find(args.target)
            path = folder / f"{compiling.label(gpu)}.jsonl"
            compiling.compile_all(work, gpu, compilers, path, args, args.budget)
        else:
            path = folder / "results.jsonl"
            with results.Writer(path, provenance.header(device.header(), True, args)) as writer:
                Sweep(device, work, args, compilers, writer).run()
    finish_up(path, args)
    return 0


def finish_up(path: Path, args: argparse.Namespace) -> None:
    """Print who won and why the others lost, save what was asked for, draw the pictures."""
    headers, rows = ranking.read([path])
    if any(row["measured"] for row in rows):
        print("\n" + diagnosis.leaderboard_text(rows, args.top))
    print("\n" + diagnosis.format_table(diagnosis.table(rows)))
    if args.save_tuned:
        print(f"tuned table: {tuned_table.save(rows)}")
    if not args.no_plots:
        from tilelab.perf.report import html_page

        page = path.parent / "report.html"
        html_page.write(headers, rows, page)
        print(f"\nThe page with every picture: {page}")
    print(f"The results: {path}")


class Sweep:
    """One sweep on one device, of perf/clock/devices.py or a simulated one."""

    def __init__(
        self, device: Any, work: list[Workload], args: argparse.Namespace,
        compilers: aot.Compilers, writer: results.Writer,
    ) -> None:  # fmt: skip
        self.device, self.work, self.args = device, work, args
        self.compilers, self.writer = compilers, writer
        self.gpu = ranking.known_gpu(device.name)
        # The limits and rates that decide what is pruned: of this GPU, or of the target's standard.
        self.model = self.gpu or gpus.GPUS.get(gpus.TARGETS.get(device.target))
        self.peers = peers(args.peers)
        self.rng = random.Random(args.seed)
        self.budget, self.began = args.budget or math.inf, device.now()
        self.skipped = 0  # tiles that the budget has left out

    def run(self) -> None:
        """Do it all; what is finished is in the file whenever this ends."""
        compiled = by_work(self._compile())
        with (
            self.device.stream(),
            workloads.cudnn_benchmark(True),
            Progress("timing", len(self.work), "problem") as progress,
        ):
            for i, w in enumerate(self.work):
                mine = compiled.get(results.workload(w._asdict()), [])
                left = self.began + self.budget - self.device.now()
                if left <= 0:
                    self._skip(mine, "the time budget ran out")
                    continue
                workloads.set_precision(w.precision)
                self._measure(w, mine, left / (len(self.work) - i))
                progress.update()
        if self.skipped:
            print(compiling.skipped_text(self.skipped, self.args.budget))

    # --- compile ---------------------------------------------------------------------------------

    def _compile(self) -> list[dict]:
        """Compile everything; return a row for each tile that is worth running, or was run."""
        # Hot in a cold sweep: inputs too small to rotate.
        caches = ("hot",) if self.args.hot else ("cold", "hot")
        attempts = [{"stage": "screen", "cache": cache} for cache in caches]
        attempts.append({"stage": "compile"})
        target = self.device.target
        taken = chosen(self.work, self.args, self.compilers, target or "", self.device.name)
        jobs, rows = missing(
            self.work, self.args, self.compilers, self.writer, target or "", attempts, taken
        )
        if target is None:  # the interpreter: nothing to compile for
            return rows + [fields | {"stage": "compile", "status": "ok"} for _, fields in jobs]
        left = None
        if self.args.budget:
            left = self.began + COMPILE_SHARE * self.budget - self.device.now()
        for row in compile_rows(jobs, target, self.model, self.compilers, left):
            rows.append(row)
            if row["status"] not in ("ok", "skipped"):
                self.writer.write(stored(row))
        self._write_skipped([row for row in rows if row["status"] == "skipped"])
        return rows

    def _skip(self, rows: list[dict], reason: str) -> None:
        late = [r for r in rows if "median_s" not in r and r.get("status", "ok") == "ok"]
        self._write_skipped([row | {"status": "skipped", "reason": reason} for row in late])

    def _write_skipped(self, rows: list[dict]) -> None:
        self.skipped += len(rows)
        self.writer.write_all(map(stored, rows))

    # --- measure ---------------------------------------------------------------------------------

    def _measure(self, w: Workload, compiled: list[dict], share: float) -> None:
        """Screen and race one workload, in its share of the budget: s."""
        new = any(row["stage"] == "compile" and row["status"] == "ok" for row in compiled)
        if self._has_final(w) and not new:
            return
        until = self.device.now() + share
        nothing = self._row(w, "tilelab", None, "screen")
        with self._failing(nothing, "cannot be set up: ") as failure:
            gate = Gate(w, self.device.torch_device, self._seed())
            sets = self._sets(w)
            calls = [self._call(w, "tilelab", self._seed()) for _ in range(sets.count)]
        if failure:
            return
        cache = "cold" if sets.cold and not self.args.hot else "hot"
        screened = self._screen(w, compiled, gate, calls, cache, share)
        del gate  # large: float64
        self._final(w, screened, calls, cache, share, until)
        del calls
        gc.collect()

    def _sets(self, w: Workload) -> timing.Sets:
        if self.args.hot:
            return timing.Sets(1, False)
        # A launch of our optimizers finds the addresses of 64 sets on the GPU, and copies others.
        most = 64 if w.mode == "step" else 512
        sets = timing.sets_needed(w.bytes, self.device.l2, most)
        fits = max(1, int(0.4 * self.device.memory_free() // max(w.bytes, 1)))
        return sets if sets.count <= fits else timing.Sets(1, False)

    def _seed(self) -> int:
        return self.rng.randrange(2**31)

    def _call(self, w: Workload, impl: str, seed: int) -> Callable[[], tuple]:
        call = workloads.prepare(w, impl, self.device.torch_device, seed)
        call.workload, call.tile = w, None
        return call

    def _warm(self, runner: Any, share: float) -> None:
        """Up to 5 s of work before timing; of a small budget a twentieth."""
        most = min(5.0, 0.05 * share)
        timing.warm(self.device, runner, steady=min(1.0, most), most=most)

    def _screen(self, w, compiled, gate, calls, cache, share) -> list[dict]:
        """Gate and time each tile that compiling has left; return the rows that are right."""
        until = self.device.now() + SCREEN_SHARE * share
        name = f"{w.op} {w.mode} {w.name}"
        rows = [row for row in compiled if row.get("stage") == "screen" and row["status"] == "ok"]
        todo = [row for row in compiled if row.get("stage") == "compile" and row["status"] == "ok"]
        # In case the time is not enough: the default first, the lesson's tiles, what looks best.
        todo.sort(key=lambda r: (not r["default"], not r.get("lesson"), r.get("predicted_s", 0.0)))
        checked, warm = None, False
        for i, row in enumerate(Progress(name, len(todo), leave=False).over(todo)):
            if self.device.now() > until:
                self._skip(todo[i:], "not timed: the time budget ran out")
                break
            row = row | {"stage": "screen", "cache": cache}
            with self._failing(row):
                if checked is None or w.mode == "step":  # a second step would have other results
                    checked = self._call(w, "tilelab", gate.seed)
                verdict = gate.check(with_tile(checked, row["tile"]))
                row |= {"error": verdict.error, "tolerance": verdict.tolerance}
                if verdict.problem:
                    row |= {"status": "wrong", "reason": verdict.problem}
                else:
                    with self._runner([with_tile(call, row["tile"]) for call in calls], cache) as r:
                        if not warm:
                            self._warm(r, share)
                            warm = True
                        row |= self._timed(w, timing.screen(self.device, r), r)
                self.writer.write(stored(row))
                rows += [row] if row["status"] == "ok" else []
        return rows

    def _final(self, w, screened, calls, cache, share, until) -> None:
        """Race the fastest tiles and the peers."""
        screened.sort(key=lambda row: row["median_s"])
        best = screened[:FINALISTS]
        best = [row for row in best if row["median_s"] <= SLOW * best[0]["median_s"]]
        default = [row for row in screened if row["default"] and row not in best]
        entries = {
            ranking.tile_text(row["tile"]) or "tilelab": row | {"stage": "final"}
            for row in best + default
        }
        with contextlib.ExitStack() as stack:
            runners = {}
            for name, row in list(entries.items()):
                tiled = [with_tile(call, row["tile"]) for call in calls]
                # All of them at once may be too much for the memory.
                with self._failing(self._row(w, "tilelab", row["tile"], "final")) as failure:
                    runners[name] = stack.enter_context(self._runner(tiled, cache))
                if failure:
                    del entries[name]
            if set(self.peers) - {"torch"}:
                forget_compiled()
            for peer in self._peers_of(w):
                row = self._row(w, peer, None, "final")
                with self._failing(row), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what a peer's compiler finds worth saying
                    peer_calls = [self._call(w, peer, self._seed()) for _ in calls]
                    runners[peer] = stack.enter_context(self._runner(peer_calls, cache))
                    entries[peer] = row | {"status": "ok"}
            if not runners:
                return
            self._warm(next(iter(runners.values())), share)
            race = f"{provenance.now()} {self._seed():08x}"
            timed = timing.race(self.device, runners, self.rng, self._rules(), until)
            for name, result in timed.items():
                if result.error:
                    self._broken(result.error, entries[name])
            verdicts = self._recheck(w, entries)
            for name, result in timed.items():
                row = entries[name] = entries[name] | {"race": race}
                error, tolerance, problem = verdicts[name]
                row |= {"error": error, "tolerance": tolerance}
                if result.samples:
                    row |= self._timed(w, result.samples, runners[name])
                    row |= {
                        "noisy": result.noisy,
                        "throttled": len(result.throttled),
                        "throttle_reasons": result.reasons,
                        "clock_mhz": result.clock_mhz,
                    }
                    row["reason"] = result.note
                if result.error:
                    row |= {"status": "error", "reason": result.error}
                elif problem:
                    status = "wrong" if error is not None else "error"
                    row |= {"status": status, "reason": f"after timing: {problem}"}
                self.writer.write(stored(row))
            if self.args.energy:
                self._energy(entries, runners, until)

    def _energy(self, entries, runners, until) -> None:
        """Joules of what was raced: its rows, which the file has by now, are written again."""
        for name, row in entries.items():
            if row["status"] != "ok" or self.device.now() >= until:
                continue
            try:
                joules = timing.energy(self.device, runners[name])
            except Exception as e:
                self._broken(devices.first_line(e), row)
                continue
            if joules is not None:
                self.writer.write(stored(row | {"joules": joules}))

    def _rules(self) -> timing.Rules:
        if self.device.target is None:  # a dry run: a few rounds show that it works
            return timing.Rules(rounds=6, seconds=0.0, most=5.0, precision=1.0)
        return timing.Rules()

    def _recheck(self, w: Workload, entries: dict[str, dict]) -> dict[str, tuple]:
        """Every finalist once more, on inputs that nobody has seen."""
        try:
            gate = Gate(w, self.device.torch_device, self._seed())
        except Exception as e:
            self._broken(devices.first_line(e))
            return dict.fromkeys(entries, (None, None, devices.first_line(e)))
        verdicts = {}
        for name, row in entries.items():
            try:
                call = self._call(w, row["impl"], gate.seed)
                verdicts[name] = gate.check(with_tile(call, row["tile"]), row["impl"])
            except Exception as e:
                self._broken(devices.first_line(e), row)
                verdicts[name] = (None, None, devices.first_line(e))
        return verdicts

    def _runner(self, calls: list, cache: str) -> contextlib.AbstractContextManager:
        return contextlib.closing(self.device.prepare(calls, cache))

    def _timed(self, w: Workload, samples: list[float], runner: Any) -> dict[str, Any]:
        """The row fields that follow from samples."""
        s = stats.summary(samples)
        seconds = s["median"]
        share = None
        if self.gpu is not None:
            peak = self.gpu.peak(gpus.kind(w.dtype, w.precision))
            share = max(w.flops / peak, w.bytes / self.gpu.bandwidth) / seconds
        return {
            "status": "ok",
            "samples_s": list(samples),
            **{f"{name}_s": value for name, value in s.items()},
            "rounds": len(samples),
            "timer": runner.timer,
            "timer_reason": runner.reason,
            "late": runner.late,
            "cache": runner.cache,
            "tflops": w.flops / seconds / 1e12,
            "gbps": w.bytes / seconds / 1e9,
            "peak_share": share,
            "clock_mhz": self.device.clock_mhz(),
        }

    # --- what was done, and what went wrong ------------------------------------------------------

    def _has_final(self, w: Workload) -> bool:
        """Whether the file already has the race of this workload, as it would be run today."""
        source, about = aot.source_hash(w.op), results.workload(w._asdict())
        finals = (row for row in self.writer.rows if row["stage"] == "final")
        raced = {
            row["impl"] for row in finals
            if results.workload(row) == about and row.get("source") in (None, source)
            and (row.get("cache") != "cold" or not self.args.hot)
        }  # fmt: skip
        return raced >= {"tilelab", *self._peers_of(w)}

    def _peers_of(self, w: Workload) -> list[str]:
        return [peer for peer in self.peers if workloads.offers(peer, w)]

    def _row(self, w: Workload, impl: str, tile: dict | None, stage: str) -> dict[str, Any]:
        """A row of which nothing is known yet."""
        source = aot.source_hash(w.op) if impl == "tilelab" else None
        return arguments.identity(w, source) | {"impl": impl, "tile": tile, "stage": stage}

    @contextlib.contextmanager
    def _failing(self, row: dict, what: str = "") -> Iterator[list[str]]:
        """Within this context an error becomes the row's; the list that it gives has it then.

        `what` is said before the error, where it is about all tiles.
        """
        failure: list[str] = []
        try:
            yield failure
        except Exception as e:
            failure.append(devices.first_line(e))
            self._broken(failure[0], None if what else row)
            self.writer.write(stored(row | {"status": "error", "reason": what + failure[0]}))

    def _broken(self, what: str, row: dict | None = None) -> None:
        """Stop if the GPU itself no longer works; out of memory and the like are only a row.

        A tile's row becomes one of a screening that failed, even if the error was in a race: so
        `--resume` goes on without this tile.
        """
        try:
            self.device.synchronize()
        except Exception as e:
            if row is not None:
                stage = "screen" if row["impl"] == "tilelab" else "final"
                failed = {"stage": stage, "status": "error", "reason": what}
                self.writer.write(stored(row | failed))
            raise PerfError(
                f"the GPU failed ({what}) and this process cannot use it any more: what was "
                "finished is in the results file, --resume goes on behind it"
            ) from e
        gc.collect()


def with_tile(call: Callable[[], tuple], tile: dict | None) -> Callable[[], tuple]:
    """`call`, with this tile for the kernel that is swept (None: as it is)."""
    if tile is None:
        return call
    tile_ops = call.workload.about.tile_ops

    def tiled() -> tuple:
        with contextlib.ExitStack() as stack:
            for tile_op in tile_ops:
                stack.enter_context(_tiles.use_tile(tile_op.name, tile))
            return call()

    tiled.inputs, tiled.workload = call.inputs, call.workload
    tiled.tile = tile
    return tiled


def peers(text: str) -> list[str]:
    """The peers that `text` names; a PerfError for an unknown one."""
    if text == "none":
        return []
    names = list(PEERS) if text == "all" else text.split(",")
    for name in names:
        if name not in PEERS:
            raise PerfError(f"unknown peer {name!r}: there are all, none, {', '.join(PEERS)}")
    return names
