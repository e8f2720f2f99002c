"""What a call costs on the host: checks, tile look-up, dispatch, imports, the first compilation.

A GPU works on its own while Python prepares the next launch. Where a kernel takes less time than
that, the host is what a program waits for. All of it is measured without a GPU:

    call            from the Python call to where the kernel would be launched, on small tensors
      checks        dtypes, devices, shapes, geometry, autocast: all but the custom op
      dispatch      torch.library.custom_op, until the op's body runs
      tile look-up  `choose_tile`, among a tuned table of 200 shapes
      rest          the result's memory, strides, grid, arguments
    launch          what `kernels._launch.launch` does before Triton, and Triton before the driver
    interpreted     a whole call of a tiny op in Triton's interpreter
    import          beyond `import torch, triton`
    first call      compilation with an empty cache, and with a full one

Each part runs in a process of its own, since Triton chooses between compiler and interpreter when
it is imported. Microseconds are CPU time of one thread, so that another process on the machine
costs little accuracy; they depend on the machine all the same. Seconds are wall time: Triton
compiles with programs of its own.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tilelab.perf.errors import PerfError

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ("calls", "interpreted", "imports", "compile")
ENTRIES = 200  # of the tuned table, for each op


def measure(
    repeats: int = 9,
    parts: tuple[str, ...] = PARTS,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Measure the host's costs.

    Args:
        repeats: of each measurement; the value is their median. Imports and compilation, which
            take a process each, are repeated a third as often, at least once.
        parts: of `PARTS`, those that are wanted. All of them take about two minutes.
        note: is told what is being measured.

    Returns:
        By name: "value" (None where it needs a GPU), "unit" ("us", "ms" or "s"), "what" in words,
        and "least" of the repeats where there were several.

    Raises:
        PerfError: an unknown part, or a process that failed.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or repeats < 1:
        raise PerfError(f"parts must be of {', '.join(PARTS)} and repeats >= 1, got {parts}")
    few = max(1, repeats // 3)
    results: dict[str, dict[str, Any]] = {}
    if "calls" in parts:
        note("calls, until the launch")
        results |= _child(f"calls({repeats})", TRITON_INTERPRET="0")
    if "interpreted" in parts:
        note("calls in the interpreter")
        results |= _child(f"interpreted({repeats})", TRITON_INTERPRET="1")
    if "imports" in parts:
        note("imports")
        results |= _imports(few)
    if "compile" in parts:
        note("first calls, with an empty and a full compile cache")
        results |= _first_calls(few)
    return results


def markdown(values: dict[str, float]) -> str:
    """The README's table of what a call costs, from the values of `measure` by name."""
    lines = [
        "| µs | whole call | checks, tile, descriptors | dispatch | with gradients | backward |",
        "|---|---|---|---|---|---|",
    ]
    for op in [name.removesuffix(": checks") for name in values if name.endswith(": checks")]:
        parts = [
            values[f"{op}: call"],
            sum(values.get(f"{op}: {x}", 0) for x in ("checks", "tile look-up", "descriptors")),
            values[f"{op}: dispatch"],
            values[f"{op}: call with gradients"],
            values[f"{op}: backward"],
        ]
        lines.append(f"| `{op}` | " + " | ".join(f"{part:.3g}" for part in parts) + " |")
    return "\n".join(lines)


# --- processes ----------------------------------------------------------------------------------


def _run(code: str, **env: str) -> Any:
    """What `code` prints as JSON, in a process of its own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | dict(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1") | env
    env["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise PerfError(f"measuring the host failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(call: str, **env: str) -> dict[str, dict[str, Any]]:
    return _run(
        f"import json\nfrom tilelab.perf.clock import host_overhead\nprint(json.dumps(host_overhead._{call}))",
        **env,
    )


def _entry(
    samples: list[float], unit: str, what: str, without: list[float] | None = None
) -> dict[str, Any]:
    """The median and the least; or what is left of both `without` a part, measured by itself."""
    value, least = (max(0.0, of(samples) - of(without or [0.0])) for of in (statistics.median, min))
    return dict(value=value, unit=unit, what=what, least=least)


def _microseconds(fn: Callable[[], Any], repeats: int) -> list[float]:
    """CPU time of one call, `repeats` times, each over as many calls as take 10 ms."""
    return _in_turn(repeats, (fn, contextlib.nullcontext))[0]


def _in_turn(repeats: int, *fns: tuple[Callable[[], Any], Callable]) -> list[list[float]]:
    """The same of several, each within its context, in rounds: a slow while is a while of all."""
    numbers = []
    for fn, within in fns:
        with within():
            for _ in range(20):
                fn()
            number, taken = 1, 0
            while taken < 10_000_000:
                number *= 2
                taken = _cpu_time(fn, number)
        numbers.append(number)
    samples: list[list[float]] = [[] for _ in fns]
    for _ in range(repeats):
        for (fn, within), number, found in zip(fns, numbers, samples, strict=True):
            with within():
                found.append(_cpu_time(fn, number) / number / 1000)
    return samples


def _cpu_time(fn: Callable[[], Any], number: int) -> int:
    """Of `number` calls, in ns."""
    start = time.process_time_ns()
    for _ in itertools.repeat(None, number):
        fn()
    return time.process_time_ns() - start


# --- calls, until the launch --------------------------------------------------------------------


def _kernel_modules() -> list[Any]:
    from tilelab import kernels  # noqa: F401

    return [m for name, m in sys.modules.items() if name.startswith("tilelab.kernels.")]


@contextlib.contextmanager
def _patched(name: str, fake: Any) -> Iterator[None]:
    """`name` is `fake` in every module of kernels that has it."""
    with contextlib.ExitStack() as stack:
        for module in _kernel_modules():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, fake))
        yield


@contextlib.contextmanager
def without_gpu(table: dict[tuple[str, str], list[dict]]) -> Iterator[list[tuple]]:
    """Compiled kernels called on CPU tensors, up to the launch: a list of the latest one.

    All that a call on an H200 does is done, the look-up in the tuned `table` included. Yields a
    list that holds the latest (kernel, grid, args, meta), and no more: it costs nothing to keep.
    """
    import torch
    from tilelab.kernels import _launch

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
        start = time.perf_counter()
        kernel.warmup(*args, grid=(1,), **meta)
        results[name] = [time.perf_counter() - start]
        if repeats:
            again = lambda k=kernel, a=args, m=meta: k.warmup(*a, grid=(1,), **m)  # noqa: E731
            results[name] += _microseconds(again, repeats)
    return results


def _first_calls(repeats: int) -> dict[str, dict[str, Any]]:
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            env = dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=folder)
            cold.append(_child("compile(0)", **env))
            warm.append(_child("compile(5)", **env))
    results = {}
    for name in cold[0]:
        for kind, runs, what in [
            ("first call, empty cache", cold, "compilation of the default bfloat16 tile for sm_90"),
            ("first call, full cache", warm, "the same, from the compile cache on disk"),
        ]:
            if name == "process":
                what = (
                    "Triton's set-up, and a tiny kernel; once in a process, and not in the others"
                )
            results[f"{name}: {kind}"] = _entry([run[name][0] for run in runs], "s", what)
        if name != "process":
            results[f"{name}: launch by Triton"] = _entry(
                [us for run in warm for us in run[name][1:]], "us",
                "Triton's own argument binding (approximation: JITFunction.warmup, all cached)",
            )  # fmt: skip
    return results
