"""What a call costs on the host: from Python to the launch, the import, the first compilation.

A GPU works on its own while Python prepares the next launch. Where a kernel takes less time than
that, the host is what a program waits for. All of it is measured without a GPU: the calls are
those that a sweep would time, on small CPU tensors, and each ends where its kernel would be
launched on an H200.

Microseconds are CPU time of one thread, the least of several rounds in which everybody takes part:
so other processes on the machine cost little accuracy. They depend on the machine all the same.
Seconds are wall time, since Triton compiles with programs of its own. Triton chooses between
compiler and interpreter when it is imported, so each part runs in a process of its own.
"""

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from tilelab.perf.errors import PerfError
from torch.utils import benchmark

ROOT = pathlib.Path(__file__).parents[2]
TARGET = "sm_90"
TUNED = 200  # shapes in the tuned table that a tile is looked up in
FIRST_CALLS = ("matmul", "conv2d", "softmax")  # a kernel of each is compiled


def measure(
    rounds: int = 20, note: Callable[[str], None] = lambda text: None
) -> dict[str, tuple[float, str]]:
    """Measure the host's costs, in about a minute.

    Args:
        rounds: of the calls.
        note: is told what is being measured.

    Returns:
        By name, (number, unit): "matmul fwd" is a call of matmul up to its launch, and "conv2d
        dgrad" a gradient of conv2d through autograd, in µs; "import tilelab.kernels" and "matmul:
        first call, empty cache" are seconds.

    Raises:
        PerfError: a process failed.
    """
    note("calls, until the launch")
    found = {name: (cost, "µs") for name, cost in child(f"call_costs({rounds})").items()}
    note("the import")
    found["import tilelab.kernels"] = _import_time("tilelab.kernels"), "s"
    note("first calls, with an empty and a full compile cache")
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "full"):
            for op, seconds in child("first_calls()", TRITON_CACHE_DIR=folder).items():
                found[f"{op}: first call, {cache} cache"] = seconds, "s"
    return found


def markdown(costs: dict[str, float]) -> str:
    """The table of what a call of each operator costs, from the µs of `measure` by name."""
    gradients: dict[str, list[str]] = {}
    forward: dict[str, float] = {}
    for name, cost in costs.items():
        op, _, mode = name.partition(" ")
        if mode in ("fwd", "step"):
            forward[op] = cost
        elif mode in ("dgrad", "wgrad", "bwd", "fwdbwd"):
            gradients.setdefault(op, []).append(f"{mode} {cost:.3g}")
    lines = ["| operator | call (µs) | its gradients by mode (µs) |", "|---|---|---|"]
    for op, cost in forward.items():
        lines.append(f"| `{op}` | {cost:.3g} | {', '.join(gradients.get(op, [])) or '–'} |")
    return "\n".join(lines)


# -- processes -----------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> Any:
    """What `code` prints as JSON, in a process of its own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = dict(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONPATH=":".join(paths))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise PerfError(f"measuring the host failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


<<<<<<< HEAD
def child(call: str, **environment: str) -> dict[str, float]:
    """What a function of this file returns in a process that compiles."""
    code = "import json\nfrom tilelab.perf.clock import host_overhead as host\n"
    code += f"print(json.dumps(host.{call}))"
    return run_python(code, TRITON_INTERPRET="0", **environment)
=======
def _child(call: str, **env: str) -> dict[str, dict[str, Any]]:
    return _run(
        f"import json\nfrom tilelab.perf.clock import host_overhead\nprint(json.dumps(host_overhead._{call}))",
        **env,
    )
>>>>>>> kernels


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
def without_gpu() -> Iterator[Callable[[Callable], Callable[[], Any]]]:
    """Within this context calls end at the launch on an H200, and work on CPU tensors.

    Yields:
        A function that makes a call forget what it would have launched, for one that is repeated.
    """
    from tilelab.kernels import _launch
<<<<<<< HEAD
    from tilelab.perf.compiler import aot

    def forgetting(call: Callable) -> Callable[[], Any]:
        def forgetful() -> Any:
            result = call()
            events.clear()
            return result

        return forgetful

    # On a GPU nobody looks whether the classes are in range: it would have to wait for them.
    loss = importlib.import_module("tilelab.kernels.cross_entropy")
    with (
        _launch.record(aot.device(TARGET)) as events,
        mock.patch.object(loss, "_check_classes", lambda *_: None),
    ):
        yield forgetting


def small_workloads(*ops: str) -> list[Any]:
    """A workload of each operator (or of these) and mode, in bfloat16, with sizes that TMA takes.

    The host's cost does not depend on the sizes. Whole steps of a network are no operator's call.
    """
    from tilelab.perf.work import shapes, workloads

    found = []
    for op in ops or [op for op in workloads.OPS if op not in workloads.WHOLE]:
        dtype = "bf16" if "bf16" in workloads.OPS[op].dtypes else workloads.OPS[op].dtypes[0]
        tiny = shapes.shapes(op, "tiny")[0].sizes
        sizes = {key: size if size <= 3 else 16 for key, size in tiny.items()}
        for mode in workloads.OPS[op].modes:
            found.append(workloads.Workload(op, mode, *workloads.DTYPES[dtype], sizes, "small"))
    return found


def call_costs(rounds: int, *ops: str) -> dict[str, float]:
    """µs of each operator's call (or of these operators') and of its gradients, by name."""
    from tilelab.perf.work import workloads

    with without_gpu() as forgetting:
        calls = {
            f"{w.op} {w.mode}": forgetting(workloads.prepare(w, "tilelab", "cpu", None))
            for w in small_workloads(*ops)
        }
        return least_microseconds(calls, rounds)


def check_costs(rounds: int, *ops: str) -> dict[str, float]:
    """µs of all that a forward call does besides torch's dispatch and its op, by operator.

    That is the checks of the arguments, and the look-up of the tile among `TUNED` shapes: what the
    kernels' own host code decides. The op itself is replaced by its result.
    """
    from tilelab.kernels import _launch as tiles
    from tilelab.perf.work import workloads

    custom_op, results, table = torch.library.CustomOpDef, {}, {}
    real, checks, look_ups = custom_op.__call__, {}, {}

    def remembered(op: Any, *args: Any) -> Any:
        results[op] = real(op, *args)
        return results[op]

    with without_gpu() as forgetting, mock.patch.object(custom_op, "__call__", remembered):
        for w in (w for w in small_workloads(*ops) if w.mode == "fwd"):
            checks[w.op] = forgetting(workloads.prepare(w, "tilelab", "cpu", None))
            with tiles.record() as events:
                checks[w.op]()
            (choice, *_) = (e for e in events if isinstance(e, tiles.Choice))
            table[choice.op, w.dtype] = [
                dict(sizes={k: 2 ** ((i + 5 * j) % 15) + i for j, k in enumerate(choice.sizes)},
                     tile=choice.tile)
                for i in range(TUNED)
            ]  # fmt: skip
            look_ups[w.op] = lambda w=w, c=choice: tiles.choose_tile(
                c.op, w.torch_dtype, {w.torch_dtype.itemsize: c.tile}, c.kernels, **c.sizes
            )
    with without_gpu(), mock.patch.object(custom_op, "__call__", lambda op, *_: results[op]):
        found = least_microseconds(checks, rounds)
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(tiles, "_tuned", lambda device: table),
    ):
        cost = least_microseconds(look_ups, rounds)
    return {op: found[op] + cost[op] for op in checks}


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
=======

    latest: list[tuple] = []
    hopper = _launch.Device(90, sms=132)

    def launch(kernel: Any, grid: tuple, *args: Any, **meta: Any) -> None:
        latest[:] = [(kernel, grid, args, meta)]

    def check_device(name: str, x: Any, first_name: str, first: Any) -> None:
        if x.device != first.device or x.device.type not in ("cuda", "meta", "cpu"):
            raise TypeError(name)

    with (
        _patched("launch", launch),
        _patched("check_device", check_device),
        _patched("_check_classes", lambda *_: None),  # which cross_entropy does on the CPU alone
        _patched("_tuned", functools.cache(lambda device: table)),
        _patched("device_of", lambda x: hopper),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        yield latest


def _cases(dtype: Any) -> dict[str, tuple[Callable, tuple]]:
    """Each op as (function, inputs), small: the host's cost does not depend on the sizes."""
    import torch

    from tilelab import kernels

    def make(*shape: int) -> torch.Tensor:
        x = torch.zeros(shape, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x

    image, weight, bias = make(2, 16, 6, 6), make(16, 16, 3, 3), make(16)
    target = torch.zeros(8, dtype=torch.int64)
    return {
        "matmul": (kernels.matmul, (make(16, 16), make(16, 16), bias)),
        "conv2d": (lambda *xs: kernels.conv2d(*xs, padding=1), (image, weight, bias)),
        "conv2d_relu_pool": (
            lambda *xs: kernels.conv2d_relu_pool(*xs, padding=1),
            (image, weight, bias),
        ),
        "bias_relu": (kernels.bias_relu, (image, bias)),
        "softmax": (kernels.softmax, (make(8, 10),)),
        "cross_entropy": (kernels.cross_entropy, (make(8, 10), target)),
        "max_pool2d": (lambda x: kernels.max_pool2d(x, 2), (image,)),
    }


def _optimizers(dtype: Any) -> dict[str, Callable]:
    """A step of each optimizer over ten parameters."""
    import torch

    from tilelab import kernels

    def step(optimizer: Any, **options: float) -> Callable:
        params = [torch.nn.Parameter(torch.zeros(64, dtype=dtype)) for _ in range(10)]
        for p in params:
            p.grad = torch.zeros_like(p)
        return optimizer(params, **options).step

    return {"SGD.step": step(kernels.SGD, lr=0.1, momentum=0.9), "AdamW.step": step(kernels.AdamW)}


def _calls(repeats: int, *only: str) -> dict[str, dict[str, Any]]:
    """Every op (or those named) up to its launch; for a process with TRITON_INTERPRET=0."""
    import torch
    from tilelab.kernels import _launch

    torch.set_num_threads(1)
    real_launch = _launch.launch
    table: dict[tuple[str, str], list[dict]] = {}
    results: dict[str, dict[str, Any]] = {}
    cases = _cases(torch.bfloat16)
    with without_gpu(table) as latest:
        for name, (fn, inputs) in cases.items():
            if name in (only or cases):
                for part, entry in _call_parts(fn, inputs, table, repeats).items():
                    results[f"{name}: {part}"] = entry
        for name, step in _optimizers(torch.float32).items():
            if not only or name in only:
                _fill(table, _inside(step)[0])
                samples = _microseconds(step, repeats)
                results[f"{name}: call"] = _entry(samples, "us", "of ten parameters, to the launch")
        for name, make in _descriptors(cases).items():
            results[f"{name}: descriptors"] = _entry(
                _microseconds(make, repeats), "us",
                "of the rest, for TMA: looking at the operands' memory, and the descriptors",
            )  # fmt: skip
        fn, inputs = cases["matmul"]
        fn(*inputs)
        launched = latest[0]
    results["launch: before Triton"] = _entry(
        _launch_cost(real_launch, launched, repeats), "us",
        "kernels._launch.launch of a matmul, without torch.cuda.device and Triton",
    )  # fmt: skip
    results["launch: by the driver"] = dict(
        value=None, unit="us", what="Triton's call of the driver, and the driver: needs a GPU"
    )
    return results


def _descriptors(cases: dict[str, tuple[Callable, tuple]]) -> dict[str, Callable]:
    """What a call by TMA does before its launch that one through pointers does not."""
    from tilelab.kernels import _launch, conv2d_tma
    from tilelab.kernels.matmul_tma import tma_operands

    a, b, _ = cases["matmul"][1]
    x, weight, _ = cases["conv2d"][1]
    ones = [1, 1]

    def matmul() -> list:
        rows = tma_operands(a, b, "ieee")
        made = [_launch.descriptor(x, shape, (step, 1), [64, 64]) for x, _, shape, step in rows]
        return [*made, _launch.descriptor(a, a.shape, (16, 1), [64, 64])]

    def convolution(pool: bool) -> list:
        plan = conv2d_tma.plan_for(x, weight, ones, ones, ones, 1, "ieee", pool)
        tile = conv2d_tma.fast_tile(plan, 2, 132, pool)
        how = conv2d_tma._layout(plan, tuple(tile.items()), 132, 2, pool, False)
        made = [
            _launch.descriptor(x, *plan.x, how.box),
            _launch.descriptor(weight, *how.w, how.w_box),
        ]
        return made + [_launch.descriptor(x, *how.out, how.out_box) for _ in range(1 + pool)]

    return {
        "matmul": matmul,
        "conv2d": lambda: convolution(False),
        "conv2d_relu_pool": lambda: convolution(True),
    }


def _call_parts(fn: Callable, inputs: tuple, table: dict, repeats: int) -> dict[str, dict]:
    import torch

    choices, op, args = _inside(fn, *inputs)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    dy = torch.zeros_like(fn(*inputs))

    def train() -> None:
        torch.autograd.grad(fn(*leaves), wanted, dy)

    _fill(table, choices + _inside(train)[0])
    result, plain = op(*args), contextlib.nullcontext
    without_op = functools.partial(
        mock.patch.object, torch.library.CustomOpDef, "__call__", lambda self, *args: result
    )
    call, checks, op_call, body, look_up, forward, whole = _in_turn(
        repeats,
        (lambda: fn(*inputs), plain),
        (lambda: fn(*inputs), without_op),
        (lambda: op(*args), plain),
        (lambda: op._init_fn(*args), plain),
        (_look_ups(choices), plain),
        (lambda: fn(*leaves), plain),
        (train, plain),
    )
    return {
        part: _entry(samples, "us", what, *without)
        for part, samples, what, *without in [
            ("call", call, "from the Python call to the launch, with no gradient asked for"),
            ("checks", checks, "of it, all but the custom op: checks and autocast"),
            ("tile look-up", look_up, f"of it, in a tuned table of {ENTRIES} shapes"),
            ("dispatch", op_call, "of it, torch.library.custom_op", body),
            ("rest", body, "of it, the result's memory, strides and grid", look_up),
            ("call with gradients", forward, "the same call, of tensors that require gradients"),
            ("backward", whole, "autograd and all ops of it, each to its launch", forward),
        ]
    }


def _inside(fn: Callable, *inputs: Any) -> tuple[list[tuple], Any, tuple]:
    """What one call asks `choose_tile`, and its first custom op with the arguments it gets."""
    import torch
    from tilelab.kernels import _tiles

    choices, ops = [], []
    choose, call = _tiles.choose_tile, torch.library.CustomOpDef.__call__

    def choose_tile(op: str, dtype: Any, default: dict, *kernels: tuple, **sizes: int) -> dict:
        choices.append((op, dtype, default, kernels, sizes))
        return choose(op, dtype, default, *kernels, **sizes)

    def custom_op(self: Any, *args: Any) -> Any:
        ops.append((self, args))
        return call(self, *args)

    with (
        _patched("choose_tile", choose_tile),
        mock.patch.object(torch.library.CustomOpDef, "__call__", custom_op),
    ):
        fn(*inputs)
    return choices, *(ops[0] if ops else (None, ()))


def _look_ups(choices: list[tuple]) -> Callable:
    from tilelab.kernels import _tiles

    calls = [
        functools.partial(_tiles.choose_tile, op, dtype, default, *kernels, **sizes)
        for op, dtype, default, kernels, sizes in choices
    ]
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def _fill(table: dict, choices: list[tuple]) -> None:
    """Give `table` its entries for what is looked up: shapes from 1 to 2^15, the default tile."""
    from tilelab.kernels import _tiles

    for op, dtype, default, _, sizes in choices:
        table[op, str(dtype).removeprefix("torch.")] = [
            dict(
                sizes={k: 2 ** ((i + 5 * j) % 15) + i for j, k in enumerate(sizes)},
                tile=default[dtype.itemsize],
            )
            for i in range(ENTRIES)
        ]
    _tiles.forget_tuned()


class _NoKernel:
    """Takes the place of a kernel: its launch does nothing."""

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *args, **meta: None


def _launch_cost(launch: Callable, launched: tuple, repeats: int) -> list[float]:
    import torch

    _, grid, args, meta = launched
    kernel, nothing = _NoKernel(), contextlib.nullcontext()
    with (
        mock.patch.object(torch.cuda, "device", lambda device: nothing),
        mock.patch.object(torch.cuda, "mem_get_info", lambda device: None),  # once in a thread
    ):
        return _microseconds(lambda: launch(kernel, grid, *args, **meta), repeats)


# --- the interpreter, imports -------------------------------------------------------------------


def _interpreted(repeats: int) -> dict[str, dict[str, Any]]:
    """Whole calls of tiny ops; for a process with TRITON_INTERPRET=1."""
    import torch

    torch.set_num_threads(1)
    calls = {
        name: (lambda fn=fn, inputs=inputs: fn(*inputs))
        for name, (fn, inputs) in _cases(torch.float32).items()
    }
    return {
        f"{name}: interpreted": _entry(
            [us / 1000 for us in _microseconds(call, repeats)],
            "ms",
            "a whole call of a tiny op in Triton's interpreter",
        )
        for name, call in (calls | _optimizers(torch.float32)).items()
    }


IMPORT = """
import json, time
import torch, triton{before}
start = time.perf_counter()
import {package}
print(json.dumps(time.perf_counter() - start))
"""


def _imports(repeats: int) -> dict[str, dict[str, Any]]:
    results = {}
    for package, before in [
        ("tilelab.kernels", ""),
        ("tilelab.kernels", ", torch._dynamo"),  # which torch loads for the first custom op anyway
        ("tilelab.nets.train", ""),
        ("tilelab.perf", ""),
    ]:
        code = IMPORT.format(package=package, before=before)
        samples = [_run(code, TRITON_INTERPRET="1") for _ in range(repeats)]
        results[f"import {package}{before.replace(',', ', after')}"] = _entry(
            samples, "s", f"beyond `import torch, triton{before}`, of files that are cached"
        )
    return results


# --- the first call -----------------------------------------------------------------------------


def _large_cases() -> dict[str, tuple[Callable, tuple]]:
    """Calls that do not shrink the default tile; empty memory, which nobody touches."""
    import torch

    from tilelab import kernels

    def make(*shape: int) -> torch.Tensor:
        memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=torch.bfloat16, memory_format=memory)

    return {
        "matmul": (kernels.matmul, (make(512, 512), make(512, 512))),
        "conv2d": (
            lambda *xs: kernels.conv2d(*xs, padding=1),
            (make(32, 128, 14, 14), make(128, 128, 3, 3)),
        ),
        "softmax": (kernels.softmax, (make(512, 1000),)),
    }


def _compile(repeats: int) -> dict[str, list[float]]:
    """For each kernel the seconds of its first call, and the us of later ones up to the driver.

    The first is a tiny one, for what Triton does once in a process.
    """
    import torch
    from tilelab.kernels import _partial_sums
    from tilelab.perf.compiler import aot

    aot.compile_for("sm_90")
    launches = {}
    with without_gpu({}) as latest:
        _partial_sums.sum_partials(torch.empty(4, 512), torch.empty(512))
        launches["process"] = latest[0]
        for name, (fn, inputs) in _large_cases().items():
            fn(*inputs)
            launches[name] = latest[0]
    results = {}
    for name, (kernel, _, args, meta) in launches.items():
>>>>>>> kernels
        start = time.perf_counter()
        for launch in aot.trace(w._replace(shape=sizes), None, TARGET).launches:
            aot.compile_launch(launch)
        found[op] = time.perf_counter() - start
    return found
