"""Runs a kernel on the machine: any function under `@triton.jit`, on tensors of the CPU.

    from tilelab.perf import machine

    report = machine.run(add_kernel, (grid,), (x, y, out, n), dict(BLOCK=128), target="sm_90")
    print(report)                                   # `out` is changed, as on a GPU

    with machine.executing("sm_80", schedule="random", seed=1) as reports:
        add(x, y)                                   # whatever it launches

In such a context Triton compiles the kernel of each launch, `kernel[grid](...)`, as for a GPU of
that target, but only as far as PTX, and the machine executes the PTX. The process must be one that
compiles: without TRITON_INTERPRET=1. The functions of tilelab.kernels work there, too: on tensors
of the CPU, with the tiles that they have on such a GPU.
"""

import contextlib
import functools
import inspect
import math
import operator
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction, KernelInterface

from tilelab.perf.errors import PerfError
from tilelab.perf.machine import compiler, core, ptx
from tilelab.perf.machine.arguments import Arguments
from tilelab.perf.machine.report import Finding, Report

SMS = 3  # that a persistent kernel finds: its programs have several tiles each, in small problems
LIMITS = (2**31 - 1, 65535, 65535)  # of a grid's three sizes


def run(
    kernel: Any, grid: Any, args: Sequence[Any] = (), meta: dict[str, Any] | None = None,
    *, target: str = "sm_90", **options: Any,
) -> Report:  # fmt: skip
    """Launch `kernel[grid](*args, **meta)` on the machine.

    Args:
        kernel: a function under `@triton.jit`, or `@triton.heuristics` of one. Under
            `@triton.autotune` the first configuration is taken: the machine has no time.
        grid: as for Triton: one to three sizes, or a function of the arguments that returns them.
        args: tensors on the CPU, TensorDescriptors of such, lists of them (the kernel gets a table
            of their addresses), and numbers. Tensors are changed in place.
        meta: arguments by name: constants such as BLOCK_M, and num_warps, num_stages, ...
        target: the GPU: sm_80 or sm_90.
        options: see `executing`.

    Returns:
        What was found and counted. `print` it.

    Raises:
        PerfError: an argument is wrong, or what a kernel needs is not supported.
        MachineFault: the kernel did what no GPU allows.
    """
    if not isinstance(kernel, KernelInterface):
        raise PerfError(f"kernel must be a function under @triton.jit, got {kernel!r}")
    with executing(target, **options) as reports:
        kernel[grid](*args, **(meta or {}))
    return reports[-1]


@contextlib.contextmanager
def executing(
    target: str = "sm_90", *, schedule: str = "lockstep", seed: int = 0, counting: bool = True,
    repeat: int = 0, programs: int | None = None, seen: Callable[[Report], None] | None = None,
    build: Callable[..., core.Core] = core.Core,
) -> Iterator[list[Report]]:  # fmt: skip
    """Within this context every launch of a kernel is executed by the machine.

    Args:
        target: the GPU: sm_80 or sm_90.
        schedule: in which order warps run: "lockstep", "random" or "late" (core.py).
        seed: of what is drawn by lot, for the first launch; each later one has the next.
        counting: also count what memory had to do, which takes longer.
        repeat: run each launch this many times more, on copies of the same memory, each time in
            another random order. Memory has to end with the same bits, unless the kernel adds
            floats by atomics. The first run is the one that changes the tensors.
        programs: execute only so many of each grid, from its middle on: their results alone are
            right, and only their part of the tensors is.
        seen: is called with each report as soon as there is one.
        build: is called in place of `Core` with its arguments, and returns one: a tool can change
            the program there, or keep a launch to run it again.

    Yields:
        The reports of the launches so far, in their order.
    """
    if schedule not in core.SCHEDULES:
        raise PerfError(f"schedule must be one of {', '.join(core.SCHEDULES)}, got {schedule!r}")
    if seed < 0:
        raise PerfError(f"seed must be 0 or more, got {seed}")
    reports: list[Report] = []
    compile_only = JITFunction.run

    def launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        if warmup:
            return compile_only(kernel, *args, grid=grid, warmup=True, **meta)
        given = _bind(kernel, args, meta)
        sizes = _grid(grid, given)
        begin = time.process_time()
        compiled = _compile(compile_only, kernel, args, sizes, meta, target)
        compiling = time.process_time() - begin
        first = seed + len(reports)
        orders = [dict(schedule=schedule, seed=first, counting=counting)]
        orders += [dict(schedule="random", seed=first + 1000 * (i + 1)) for i in range(repeat)]
        if programs is not None and programs < (total := math.prod(sizes)):
            for order in orders:
                order["programs"] = range(total // 2, min(total, total // 2 + programs))
        report = _execute(kernel, compiled, given, sizes, target, orders, build)
        report.compiling = compiling
        reports.append(report)
        if seen is not None:
            seen(report)
        return compiled

    with contextlib.ExitStack() as stack:
        stack.enter_context(compiler.compiling(target))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        if own := sys.modules.get("tilelab.kernels._launch"):  # our kernels launch there
            device = own.Device(int(target.removeprefix("sm_")), SMS)
            stack.enter_context(own.instead(lambda e: e.kernel[e.grid](*e.args, **e.meta), device))
        yield reports


def _bind(kernel: JITFunction, args: Sequence[Any], meta: dict[str, Any]) -> dict[str, Any]:
    """The kernel's arguments by name."""
    own = {name: x for name, x in meta.items() if name in kernel.arg_names}
    try:
        bound = kernel.signature.bind(*args, **own)
    except TypeError as e:
        raise PerfError(f"{kernel.__name__}{inspect.signature(kernel.fn)}: {e}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _grid(grid: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    """A grid of three sizes."""
    sizes = grid(given) if callable(grid) else grid
    try:
        sizes = tuple(map(operator.index, sizes))
    except TypeError:
        raise PerfError(f"a grid is one to three integers, as (4, 1), got {sizes!r}") from None
    if not 1 <= len(sizes) <= 3:
        raise PerfError(f"a grid has one to three sizes, got {sizes}")
    if any(not 0 <= n <= most for n, most in zip(sizes, LIMITS, strict=False)):
        raise PerfError(f"the sizes of a grid are from 0 to {LIMITS}, got {sizes}")
    return (*sizes, 1, 1)[:3]


def _compile(
    jit: Callable, kernel: JITFunction, args: Sequence[Any], grid: tuple, meta: dict, target: str
) -> Any:
    """Triton's CompiledKernel; a list of tensors is compiled as a tensor of their addresses."""
    args = [torch.empty(len(x), dtype=torch.int64) if isinstance(x, list) else x for x in args]
    meta = {
        k: torch.empty(len(x), dtype=torch.int64) if isinstance(x, list) else x
        for k, x in meta.items()
    }
    try:
        compiled = jit(kernel, *args, grid=grid, warmup=True, **meta)
    except KeyError as e:
        if "unrecognised" in str(e):  # what neither the kernel nor the compiler knows
            raise PerfError(f"{kernel.__name__}: {e.args[0]}") from None
        raise
    except TypeError as e:
        if "specialize" in str(e):  # an argument of a type that Triton does not know
            raise PerfError(f"{kernel.__name__}: {e}") from None
        raise
    compiler.check_resources(kernel.__name__, compiled.metadata, target)
    return compiled


@functools.lru_cache(maxsize=64)
def _parse(text: str, path: str) -> ptx.Program:
    """Parse the PTX of a kernel that is in the file `path`."""
    # Triton's cache goes by the text of a kernel: it may have the path of another checkout.
    name = re.escape(pathlib.Path(path).name)
    return ptx.parse(re.sub(rf'(\.file\s+\d+\s+)"[^"]*/{name}"', rf'\1"{path}"', text))


def _execute(
    kernel: JITFunction, compiled: Any, given: dict[str, Any], grid: tuple[int, int, int],
    target: str, orders: list[dict[str, Any]], build: Callable[..., core.Core],
) -> Report:  # fmt: skip
    """Run a compiled kernel in each of these orders. The first run changes the tensors."""
    program = _parse(compiled.asm["ptx"], kernel.fn.__code__.co_filename)
    findings: Counter = Counter()
    runs: list[core.Core] = []
    changed: Arguments | None = None
    try:
        for order in orders:
            source = compiled.src.signature, given, compiled.metadata, math.prod(grid)
            arguments = Arguments(*source)  # with copies of the tensors
            changed = changed or arguments
            values, maps = {}, {}
            for parameter, value in zip(program.parameters, arguments.parameters, strict=True):
                if isinstance(value, bytes):
                    values[parameter.name] = value
                else:
                    maps[core.PARAMETERS + parameter.offset] = value
            machine = build(
                program, grid, values, compiled.metadata.shared, arguments.memory, maps, **order
            )
            runs.append(machine)
            if machine.total:
                machine.run()
            findings.update(machine.findings)
            if len(runs) > 1 and not any(map(_adds_floats, machine.instructions)):
                findings.update(_differences(runs[0], machine, order["seed"]))
    finally:  # a fault, too, leaves what was written until then
        if changed is not None:
            changed.copy_back()
    constants = {kernel.arg_names[at[0]]: x for at, x in compiled.src.constants.items()}
    options = {name: getattr(compiled.metadata, name) for name in ("num_warps", "num_stages")}
    return Report(
        kernel.__name__, compiled.hash, target, grid, program.threads, orders[0]["schedule"],
        orders[0]["seed"], [Finding(*what, times) for what, times in findings.items()],
        dict(runs[0].counts.total), runs[0].counts.by_line,
        sum(machine.executed for machine in runs), sum(machine.seconds for machine in runs),
        dict(compiled.src.signature), constants | options, runs[0].instructions,
    )  # fmt: skip


def _adds_floats(inst: ptx.Instruction) -> bool:
    """Whether the sum that it leaves in memory depends on the order of threads."""
    return inst.parts[0] in ("atom", "red") and "add" in inst.parts and inst.parts[-1][0] in "bf"


def _differences(one: core.Core, other: core.Core, seed: int) -> Iterator[tuple]:
    """Findings: where two runs have left different bits in memory."""
    for begin, end, name in one.global_.names:
        differ = np.flatnonzero(one.global_.bytes[begin:end] != other.global_.bytes[begin:end])
        if differ.size:
            what = f"{differ.size} bytes of {name} have other bits, the first is byte {differ[0]}"
            yield "depends on the order of warps", what, f"the end of the run with seed {seed}", ""
