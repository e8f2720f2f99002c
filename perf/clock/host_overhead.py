"""What a call costs on the host: from Python to the launch, the import, the first compilation.

A GPU works on its own while Python prepares the next launch. If a kernel takes less time than that,
the program waits for the host. No GPU is needed to measure this: the calls are those that a sweep
would time, on small CPU tensors, and each ends where its kernel would be launched on an H200.

Microseconds are CPU time of one thread, the least of several rounds in which every call takes part.
So other processes on the machine cost little accuracy, but the numbers still depend on the machine.
Seconds are wall time, because Triton starts other programs to compile. Triton chooses between
compiler and interpreter when it is imported, so each part runs in a process of its own.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import benchmark

import tilelab
from tilelab.perf.errors import PerfError

ROOT = pathlib.Path(tilelab.__file__).parents[1]  # where tilelab is imported from
TARGET = "sm_90"
FIRST_CALLS = ("matmul", "conv2d", "softmax")  # a kernel of each is compiled


def measure(rounds: int = 20) -> dict[str, tuple[float, str]]:
    """Measure the host's costs, in about a minute: a number and its unit by name.

    "matmul fwd" is a call of matmul up to its launch, and "conv2d dgrad" a gradient of conv2d
    through autograd, in µs; "import tilelab.kernels" and "matmul: first call, empty cache" are
    seconds.

    Raises:
        PerfError: a process failed.
    """
    found = {name: (cost, "µs") for name, cost in child(f"call_costs({rounds})").items()}
    found["import tilelab.kernels"] = _import_time("tilelab.kernels"), "s"
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "full"):
            for op, seconds in child("first_calls()", TRITON_CACHE_DIR=folder).items():
                found[f"{op}: first call, {cache} cache"] = seconds, "s"
    return found


# -- processes -----------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> Any:
    """What `code` prints as JSON, in a process of its own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = dict(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONPATH=":".join(paths))
    variables = os.environ | variables | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise PerfError(f"measuring the host failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def child(call: str, **environment: str) -> dict[str, float]:
    """What a function of this file returns in a process that compiles."""
    code = "import json\nfrom tilelab.perf.clock import host_overhead as host\n"
    code += f"print(json.dumps(host.{call}))"
    return run_python(code, TRITON_INTERPRET="0", **environment)


def _import_time(package: str) -> float:
    """Seconds beyond `import torch, triton`, of files that are in the disk's cache."""
    code = "import json, time, torch, triton\nstart = time.perf_counter()\n"
    code += f"import {package}\nprint(json.dumps(time.perf_counter() - start))"
    return min(run_python(code, TRITON_INTERPRET="1") for _ in range(2))


# -- calls, until the launch ---------------------------------------------------------------------


def least_microseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU time of each call: the least of the rounds, in each of which everybody has some 5 ms."""
    timers, counts = {}, {}
    for name, call in calls.items():
        timer = benchmark.Timer("call()", globals={"call": call}, timer=time.process_time)
        timers[name] = timer
        counts[name] = max(1, int(5e-3 / timer.timeit(20).mean))
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name] = min(found[name], 1e6 * timer.timeit(counts[name]).mean)
    return found


@contextlib.contextmanager
def without_gpu() -> Iterator[Callable[[Any], Callable[[], Any]]]:
    """Within this context calls end at the launch on an H200, and work on CPU tensors.

    It yields a function that makes a workload's call, one that can be repeated: what it would have
    launched is forgotten at once.
    """
    from tilelab.kernels import _launch
    from tilelab.perf.compiler import aot
    from tilelab.perf.work import workloads

    def make_call(w: workloads.Workload) -> Callable[[], Any]:
        call = workloads.prepare(w, "tilelab", "cpu", None)

        def repeatable() -> Any:
            call()
            launches.clear()

        return repeatable

    with _launch.record(aot.device(TARGET)) as launches, aot.unchecked():
        yield make_call


def small_workloads(*ops: str) -> list[Any]:
    """A workload of each operator (or of these) and mode, in its first dtype, of sizes for TMA.

    The host's cost does not depend on the sizes. Whole steps of a network are no operator's call.
    """
    from tilelab.perf.work.operators import OPERATORS
    from tilelab.perf.work.workloads import DTYPES, Workload

    found = []
    for op in ops or [op for op, row in OPERATORS.items() if row.lesson]:
        row = OPERATORS[op]
        sizes = {k: n if n <= 3 else 16 for k, n in zip(row.sizes, row.tiny[0], strict=True)}
        dtype, precision = DTYPES[row.dtypes[0]]
        found += [Workload(op, mode, dtype, precision, sizes, "small") for mode in row.modes]
    return found


def call_costs(rounds: int) -> dict[str, float]:
    """µs of each operator's call and of its gradients, by name."""
    with without_gpu() as make_call:
        calls = {f"{w.op} {w.mode}": make_call(w) for w in small_workloads()}
        return least_microseconds(calls, rounds)


def first_calls() -> dict[str, float]:
    """Seconds to compile all that a call launches for sm_90, at its default bfloat16 tile."""
    from tilelab.perf.compiler import aot

    aot.compile_for(TARGET)
    warm_up = aot.trace(small_workloads("bias_relu")[0], None, TARGET)
    for launch in warm_up.launches:  # what Triton does once in a process
        aot.compile_launch(launch)
    found = {}
    for op in FIRST_CALLS:
        (w,) = (w for w in small_workloads(op) if w.mode == "fwd")
        sizes = {key: size if size <= 3 else 128 for key, size in w.shape.items()}
        start = time.perf_counter()
        for launch in aot.trace(w._replace(shape=sizes), None, TARGET).launches:
            aot.compile_launch(launch)
        found[op] = time.perf_counter() - start
    return found
