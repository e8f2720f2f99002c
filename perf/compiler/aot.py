"""Compiles kernels for GPUs that are not here ("ahead of time"), and says what came of it.

No list of the kernels' arguments is kept here. A workload is called as a user would call it, on
empty CPU tensors, while `kernels._launch.record` lists what would be launched. Triton's own JIT
then compiles these launches, and is made to believe that it has a GPU of the wanted target. So the
compiled code is what a real GPU would run, and a sweep on one finds it in Triton's cache.

A process is either interpreter or compiler (kernels/_launch.py), so the compiler runs in worker
processes. `python -m tilelab.perf.compiler.aot` reads one job a line and answers with one line.
Workers run side by side, and a worker that crashes loses only its own job. A worker ends, in the
middle of a job too, as soon as its stdin is closed: so none outlives the process that asked, even
if that is killed.
"""

import ast
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from tilelab import kernels  # before triton: it decides between interpreter and compiler
from tilelab.kernels import _launch, _tile_facts, _tiles

# isort: split
import triton
from triton.backends.compiler import GPUTarget

from tilelab.perf import machine
from tilelab.perf.compiler import machine_code
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results
from tilelab.perf.work import gpus, workloads
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.search_space import TileOp
from tilelab.perf.work.workloads import Workload

TIMEOUT_S = 300  # for one kernel: the compiler hangs
MOST_WORKERS = 32  # unless asked for: each is a process that has imported torch
ENVIRONMENT = {  # of the processes that compile; they see no GPU, and so take none of its memory
    "TRITON_INTERPRET": "0",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
}


# --- what a call would launch --------------------------------------------------------------------


def device(target: str) -> _launch.Device:
    """What the kernels would find on a GPU of this target; "" is none in particular."""
    if target not in gpus.TARGETS:
        return _launch.ANY_GPU
    capability = int(target.removeprefix("sm_")) if target.startswith("sm_") else 0
    return _launch.Device(capability, gpus.GPUS[gpus.TARGETS[target]].sms)


def unchecked() -> contextlib.AbstractContextManager:
    """Within this context nobody looks whether class indices are in range, as on a GPU."""
    loss = importlib.import_module("tilelab.kernels.cross_entropy")
    return mock.patch.object(loss, "_check_classes", lambda *_: None)


class Trace(NamedTuple):
    """The launches of one call; `main` is the one whose tile is swept, if there is one.

    `choice` is what was asked for its tile, and `tile_op` whose tile that is.
    """

    launches: list[_launch.Launch]
    main: _launch.Launch | None = None
    choice: _launch.Choice | None = None
    tile_op: TileOp | None = None

    @property
    def about(self) -> dict[str, Any]:
        """The fields of a results row."""
        return {
            "tile_op": self.choice and self.choice.op,
            "sizes": self.choice.sizes if self.choice else {},
            "launches": len(self.launches),
            "moved": sum(_bytes(launch.args) for launch in self.launches),
        }


def trace(
    w: Workload, tile: dict | None, target: str = "", seed: int | None = None, layout: str = ""
) -> Trace:
    """What `w` launches with this tile (None: the default). Nothing is launched or compiled.

    The inputs are empty, or have the values of a seed. With a layout `w` is a product, and its
    operands are empty and lie so (see perf/rows/lists.py).
    """
    events = _recorded(w, tile, device(target), seed, layout)
    launches = [event for event in events if isinstance(event, _launch.Launch)]
    by_name = {tile_op.name: tile_op for tile_op in w.about.tile_ops}
    for i, event in enumerate(events):
        if isinstance(event, _launch.Choice) and event.op in by_name:
            return Trace(launches, _launch_of(events[i:]), event, by_name[event.op])
    return Trace(launches)


def _recorded(
    w: Workload, tile: dict | None, on: _launch.Device, seed: int | None = None, layout: str = ""
) -> list[_launch.Choice | _launch.Launch]:
    """The choices and launches of one call of `w`."""
    with _launch.record(on):
        call = _product(w, layout) if layout else workloads.prepare(w, "tilelab", "cpu", seed)
    with contextlib.ExitStack() as stack:
        if tile is not None:
            for tile_op in w.about.tile_ops:
                stack.enter_context(_tiles.use_tile(tile_op.name, tile))
        events = stack.enter_context(_launch.record(on))
        call()
    return events


def _product(w: Workload, layout: str) -> Callable[[], torch.Tensor]:
    """A @ B of empty operands, each in rows ("n") or in columns ("t").

    The modes of matmul have "nn", "nt" and "tn", but not "tt".
    """
    M, N, K = (w.shape[name] for name in "MNK")

    def operand(rows: int, columns: int, order: str) -> torch.Tensor:
        shape = (rows, columns) if order == "n" else (columns, rows)
        x = torch.empty(shape, dtype=w.torch_dtype)
        return x if order == "n" else x.t()

    return functools.partial(kernels.matmul, operand(M, K, layout[0]), operand(K, N, layout[1]))


def _launch_of(events: list) -> _launch.Launch | None:
    """The launch that the first of the events, a choice, was made for; others may come between.

    Packing, say: each choice is followed by its launch, and whatever has both between them.
    """
    waiting = 0
    for event in events:
        waiting += 1 if isinstance(event, _launch.Choice) else -1
        if waiting == 0:
            return event
    return None


def _bytes(args: tuple) -> int:
    """Bytes that a launch reads and writes, if it touches its tensors once."""
    storages = {}
    for t in _launch.tensors_of(args):
        size = t.numel() * t.element_size()
        storages[t.data_ptr()] = max(size, storages.get(t.data_ptr(), 0))
    return sum(storages.values())


def describe(w: Workload, target: str = "") -> dict:
    """What there is to choose: the kernel's name, what it divides, its default, its lesson's tiles.

    {"tile_op": None} for work that has no tile of its own. "kernels" are those that can do it.
    """
    workloads.set_precision(w.precision)
    t = trace(w, None, target)
    if t.main is None:
        return {"tile_op": None}
    default, kinds = t.choice.tile, t.choice.kernels
    itemsize = w.torch_dtype.itemsize
    fast, alike, rungs = lesson_tiles(t.choice.op, t.main.kernel.fn.__module__, itemsize)
    if len(kinds) == 1:
        alike = [tile for tile in alike if tile.keys() == default.keys()]
    lesson = [t for t in (*fast, *alike, *rungs) if t.get("kernel", "pointer") in kinds]
    return {
        "tile_op": t.choice.op,
        "sizes": t.choice.sizes,
        "tile": default,
        "lesson": lesson,
        "kernels": kinds,
        "itemsize": itemsize,
    }


def choose(w: Workload, target: str, gpu: str) -> dict:
    """The tiles that a call of `w` takes on a GPU of this target and name in torch, and why.

    "tile" is that of the work itself (None where it has none of its own). "choices" are all in
    their order: packing and the sums of parts choose, too. Each is {"op", "dtype", "sizes", "tile",
    "why"}. The tuned table of the GPU is read; "untuned" is its name if there is none.
    """
    table = _tiles.tuned_path(gpu) if gpu else None
    workloads.set_precision(w.precision)
    events = _recorded(w, None, device(target)._replace(name=gpu))
    own, found, choices = {tile_op.name for tile_op in w.about.tile_ops}, None, []
    for i, event in enumerate(events):
        if not isinstance(event, _launch.Choice):
            continue
        if found is None and event.op in own:
            found = event.tile
        choice = dict(
            op=event.op, dtype=str(event.dtype).removeprefix("torch."), sizes=event.sizes,
            tile=event.tile, why=_why(event, _launch_of(events[i:]), table, target),
        )  # fmt: skip
        if choice not in choices:
            choices.append(choice)
    untuned = None if table is None or table.exists() else table.name
    return {"tile": found, "choices": choices, "untuned": untuned}


def _why(
    choice: _launch.Choice, launch: _launch.Launch | None, table: pathlib.Path | None, target: str
) -> list[str]:
    """By which rule of kernels/_tiles.py a tile was chosen, in words."""
    base = choice.default
    if choice.entry is not None:
        base, sizes = choice.entry["tile"], choice.entry["sizes"]
        far = _tiles.octaves(choice.sizes, sizes)
        nearest = " ".join(f"{k}={size}" for k, size in sizes.items())
        words = "these sizes" if far == 0 else f"{nearest}, the nearest ({far:.1f} octaves away)"
        lines = [f"tuned: the fastest tile of a sweep for {words}, in kernels/tuned/{table.name}"]
    else:
        constant = _constant(base, launch)
        if constant is None and _tile_facts.has(target, base):
            rule = "predicted to be the fastest of the lesson's tiles that can do this call"
            lines = [f"modelled: {rule} (kernels/_tile_facts.py)"]
        else:
            lines = [f"default: {constant or 'a tile that the lesson makes for these sizes'}"]
        if table is not None and table.exists():
            where = f"kernels/tuned/{table.name}"
            lines.append(f"{where} has no tile of {choice.op} that can do this call")
    fitted = [f"{k} {base[k]} -> {v}" for k, v in choice.tile.items() if base.get(k, v) != v]
    if fitted:
        lines.append(f"fitted to the sizes: {', '.join(fitted)}")
    if len(choice.kernels) > 1:
        lines.append(f"of the kernels {', '.join(choice.kernels)}")
    return lines


def _constant(tile: dict, launch: _launch.Launch | None) -> str | None:
    """Under which names a lesson has this tile: "DEFAULT[2] = TILES[2] of kernels/matmul.py"."""
    lessons = sorted(name for name in sys.modules if name.startswith(("tilelab.k", "tilelab.n")))
    if launch is not None:  # where its kernel is, before others
        lessons.insert(0, launch.kernel.fn.__module__)
    for lesson in lessons:
        names = []
        for name, value in vars(sys.modules[lesson]).items():
            if not name.isupper():
                continue
            if isinstance(value, list | tuple):
                value = dict(enumerate(value))
            if value is tile:
                names.append(name)
            elif isinstance(value, dict):
                names += [f"{name}[{key!r}]" for key, item in value.items() if item is tile]
        if names:
            file = lesson.removeprefix("tilelab.").replace(".", "/")
            return f"{' = '.join(names)} of {file}.py"
    return None


def lesson_tiles(tile_op: str, module: str, itemsize: int) -> tuple[list, list, list]:
    """FAST_TILES (of this itemsize), TILES and RUNGS of a lesson, each where it has them.

    A lesson may be three files: that of the kernel; the one named as `choose_tile` is asked, up to
    what it adds for a special case ("conv2d_grouped"); and this one's for TMA.
    """
    names = (f"tilelab.kernels.{tile_op}", f"tilelab.kernels.{tile_op.rpartition('_')[0]}")
    second = next((n for n in names if n[-1] != "." and importlib.util.find_spec(n)), module)
    third = [f"{second}_tma"] if importlib.util.find_spec(f"{second}_tma") else []
    files = [importlib.import_module(name) for name in (module, second, *third)]

    def first(name: str, missing: Any) -> Any:
        return next((getattr(file, name) for file in files if hasattr(file, name)), missing)

    return first("FAST_TILES", {}).get(itemsize, []), first("TILES", []), first("RUNGS", [])


# --- compile and read ----------------------------------------------------------------------------


def compile_for(target: str) -> None:
    """From now on Triton's JIT compiles for `target`, in this process, which must be a compiler."""
    if _launch.INTERPRET:
        raise RuntimeError("this process interprets: set TRITON_INTERPRET=0 before it starts")
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    driver = types.SimpleNamespace(  # what the JIT asks the GPU's driver
        get_current_target=lambda: gpu,
        get_current_device=lambda: str(gpu),  # a kernel keeps what it has compiled by device
        get_current_stream=lambda device: 0,
        set_current_device=lambda device: None,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(driver)


def compile_launch(launch: _launch.Launch) -> Any:
    """Triton's CompiledKernel of a recorded launch, for the target of `compile_for`."""
    args = [
        torch.empty(len(arg), dtype=torch.int64) if isinstance(arg, list) else arg
        for arg in launch.args
    ]
    return launch.kernel.warmup(*args, grid=launch.grid, **launch.meta)


def analyse(compiled: Any) -> dict:
    """What machine_code.py reads off the code, and the shared memory of a program in bytes.

    Disassembling takes as long as compiling, so what came of it is kept beside Triton's cache.
    """
    path = pathlib.Path(triton.knobs.cache.dir) / f"tilelab-{_reader()}" / f"{compiled.hash}.json"
    try:
        analysis = json.loads(path.read_text())
    except (OSError, ValueError):  # not there
        if "cubin" in compiled.asm:
            analysis = machine_code.analyse_cubin(compiled.asm["cubin"])
        else:
            analysis = machine_code.analyse_amdgcn(compiled.asm["amdgcn"])
        results.write_whole(path, json.dumps(analysis).encode())
    return analysis | {"shared": compiled.metadata.shared}


@functools.cache
def _reader() -> str:
    """Which version of machine_code.py has read the code."""
    return hashlib.sha256(pathlib.Path(machine_code.__file__).read_bytes()).hexdigest()[:12]


def compile_job(w: Workload, tile: dict | None, target: str, layout: str = "") -> dict:
    """Trace and compile one call; return the row fields that follow, with "failed" if it fails.

    `layout` is that of `trace`.
    """
    started = time.perf_counter()
    workloads.set_precision(w.precision)
    t = trace(w, tile, target, layout=layout)
    row = t.about
    compile_for(target)
    for launch in t.launches:
        if launch is not t.main:
            compile_launch(launch)
    if t.main is not None:
        try:
            compiled = compile_launch(t.main)
        except Exception as e:
            first = next((s for s in str(e).splitlines() if s.strip()), "")
            return row | {"failed": f"does not compile: {type(e).__name__}: {first}"[:500]}
        row |= analyse(compiled)
        row |= {
            "kernel": t.main.kernel.__name__,
            "programs": math.prod(t.main.grid),
            "threads": compiled.metadata.num_warps * compiled.metadata.target.warp_size,
            **work_of_boxes(t.tile_op, t.main),
            **operand_runs(t, w.torch_dtype.itemsize),
        }
    return row | {"compile_s": time.perf_counter() - started}


def work_of_boxes(tile_op: TileOp, launch: _launch.Launch) -> dict[str, int]:
    """What a convolution by TMA computes: "units", tiles or parts of them, and "computed_flops".

    Other launches have neither.
    """
    if tile_op.boxes is None or not launch.kernel.__name__.endswith("_tma_kernel"):
        return {}
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    tiles, steps, parts, rows = tile_op.boxes(given)
    step = 2 * rows * given["BLOCK_N"] * given["BLOCK_K"]
    return {"units": tiles * parts, "computed_flops": steps * step}


def operand_runs(t: Trace, itemsize: int) -> dict[str, int]:
    """How many bytes of a row of each operand's tile are contiguous: "run_a" and "run_b".

    Of products through pointers alone: TMA fetches 128 bytes and more.
    """
    names = dict(zip(("run_a", "run_b"), t.tile_op.strides, strict=False))
    if t.main.kernel.__name__.endswith("_tma_kernel"):
        return {}
    given = dict(zip(t.main.kernel.arg_names, t.main.args, strict=False)) | t.main.meta
    runs = {}
    for name, along in names.items():
        elements = 1
        for stride, block in along.items():
            if given.get(stride) == 1:
                elements = min(given[block], t.choice.sizes[block.removeprefix("BLOCK_")])
        runs[name] = elements * itemsize
    return runs


def annotated_loop(w: Workload, tile: dict | None, target: str) -> list[tuple[str, int, str]]:
    """The main loop as (source file, line, instruction), for NVIDIA targets."""
    workloads.set_precision(w.precision)
    compile_for(target)
    main = trace(w, tile, target).main
    if main is None:
        return []
    compiled = compile_launch(main)
    loop = machine_code.annotate(compiled.asm["cubin"]) if "cubin" in compiled.asm else []
    # Triton's cache goes by the text of a kernel: it may have the path of another checkout.
    own = main.kernel.fn.__code__.co_filename
    name = pathlib.Path(own).name
    return [(own if pathlib.Path(f).name == name else f, n, text) for f, n, text in loop]


MOST_BYTES = 1 << 29  # of tensors, that are copied into the machine


def executed(w: Workload, tile: dict | None, target: str) -> dict:
    """What one program of the main launch does when the machine executes it: see `Report`.

    {"failed": why} where it cannot be executed.
    """
    if target not in machine.TARGETS:
        return {"failed": f"the machine executes {' and '.join(machine.TARGETS)} only"}
    workloads.set_precision(w.precision)
    return executed_launch(trace(w, tile, target, seed=0).main, target)


def executed_launch(launch: _launch.Launch, target: str) -> dict:
    """What one program of a recorded launch does, as `executed`."""
    size = sum(t.untyped_storage().nbytes() for t in _launch.tensors_of(launch.args))
    if size > MOST_BYTES:
        return {"failed": f"its tensors have {size / 1e9:.1f} GB, too many to execute it here"}
    with machine.executing(target, programs=1) as reports:
        launch.kernel[launch.grid](*launch.args, **launch.meta)
    return reports[0].as_dict()


# --- worker processes ----------------------------------------------------------------------------


class Compilers:
    """Worker processes that compile, one a core if no number is given.

    Use it as a context manager; `submit` returns a Future of a dict.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        self._threads = concurrent.futures.ThreadPoolExecutor(self.workers)
        self._local = threading.local()
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: Any) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            _kill(process)
            process.wait()
        self._threads.shutdown(wait=True)

    def submit(self, what: str, w: Workload, *more: Any) -> concurrent.futures.Future:
        """Ask for one of the jobs of `_serve`, which are functions of this file."""
        return self._threads.submit(self._work, [what, list(w), *more])

    def _work(self, job: list) -> Any:
        process = getattr(self._local, "process", None)
        if process is None or process.poll() is not None:
            process = self._local.process = self._start()
        watchdog = threading.Timer(TIMEOUT_S, _kill, [process])
        watchdog.start()
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            watchdog.cancel()
        if answer:
            return json.loads(answer)
        code = process.wait()
        process.log.seek(0)
        tail = (process.log.read().strip() or "it said nothing").splitlines()[-1]
        return {"failed": f"the compiler process ended with {code}: {tail}"[:500]}

    def _start(self) -> subprocess.Popen:
        log = tempfile.TemporaryFile("w+", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-m", "tilelab.perf.compiler.aot"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=pathlib.Path(__file__).parents[2],
            env=os.environ | ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        process.log = log
        self._processes.append(process)
        return process


def _kill(process: subprocess.Popen) -> None:
    """Kill a worker and what it has started, ptxas for example: all that is in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def source_hash(op: str) -> str:
    """A hash of the sources that an operator runs: rows of different ones must not be mixed.

    Its lesson and every file of kernels/ that it imports, as they are on disk; of what is composed
    of everything, all of kernels/ and nets/.
    """
    folder = pathlib.Path(kernels.__file__).parent
    paths = {path.stem: path for path in folder.glob("*.py")}
    lesson = OPERATORS[op].lesson
    todo, sources = [lesson] if lesson else sorted(paths), {}
    while todo:
        name = todo.pop()
        if name in paths and name not in sources:
            sources[name] = paths[name].read_text()
            for node in ast.walk(ast.parse(sources[name])):
                if isinstance(node, ast.ImportFrom) and node.module == "tilelab.kernels":
                    todo += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    todo.append((node.module or "").removeprefix("tilelab.kernels."))
    if not lesson:
        for path in sorted((folder.parent / "nets").glob("*.py")):
            sources[f"nets.{path.stem}"] = path.read_text()
    text = "\0".join(f"{name}\0{sources[name]}" for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _serve() -> None:
    """Answer jobs until stdin is closed. What the compiler prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[asked], daemon=True).start()
    jobs = {
        "describe": describe, "choose": choose, "compile": compile_job, "annotate": annotated_loop,
        "execute": executed,
    }  # fmt: skip
    while True:
        what, w, *more = json.loads(asked.get())
        try:
            answer = jobs[what](Workload(*w), *more)
        except PerfError as e:
            answer = {"failed": str(e)}
        except Exception as e:
            answer = {"failed": f"{type(e).__name__}: {e}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(asked: queue.SimpleQueue) -> None:
    """Hand on the jobs. The end of stdin ends this process and all that it has started.

    The operating system closes a pipe however its other end dies. This thread notices it while the
    main thread compiles, because Triton's passes release the interpreter's lock.
    """
    for line in sys.stdin:
        asked.put(line)
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    _serve()
