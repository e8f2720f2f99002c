"""`tilelab run-ptx FILE.py`: runs a file's Triton kernels with no GPU, and says what they do wrong.

Every launch in it, `kernel[grid](...)`, is compiled for the target as far as PTX, and executed by
perf/machine. The file may be any that launches kernels: a script, or a module with a function that
needs no arguments. Tensors that it makes on "cuda" are on the CPU.

    tilelab run-ptx add.py                     runs the file
    tilelab run-ptx add.py:test_sizes          imports it, and calls the function
    tilelab run-ptx add.py --schedule random --seed 7

After each launch stands what was executed, counted and found. The exit status is 1 if something was
found, or a kernel did what no GPU allows; 2 for wrong input.
"""

import argparse
import importlib.util
import inspect
import json
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tilelab.perf.errors import PerfError
from tilelab.perf.rows.results import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="FILE.py[:FUNCTION]", help="what launches kernels")
    parser.add_argument(
        "-t", "--target", default="sm_90", help="of sm_80, sm_90 (default: %(default)s)"
    )
    parser.add_argument(
        "--schedule",
        default="lockstep",
        help="the order in which warps run: lockstep, random, late (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random order (default: 0)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the reports here")


def run(args: argparse.Namespace) -> int:
    """Run the file. Returns the exit status."""
    name, _, function = args.file.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise PerfError(f"there is no file {path}")
    if args.json and not args.json.parent.is_dir():  # said before the work, not after it
        raise PerfError(f"--json: there is no folder {args.json.parent}")
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: this process compiles
    from tilelab import kernels  # noqa: F401  (a file that calls them finds them on the machine)
    from tilelab.perf import machine

    def show(report: machine.Report) -> None:
        print(report, end="\n\n")

    fault, order = None, dict(schedule=args.schedule, seed=args.seed)
    with machine.executing(args.target, **order, seen=show) as reports, CpuForCuda():
        try:
            _call(path, function)
        except machine.MachineFault as e:
            fault = str(e)
            print(f"fault: {fault}\n")
    findings = sum(len(report.findings) for report in reports)
    print(f"{len(reports)} launches, {findings} findings" + ", 1 fault" * (fault is not None))
    if args.json:
        data = {"launches": [report.as_dict() for report in reports], "fault": fault}
        write_whole(args.json, (json.dumps(data, default=int) + "\n").encode())
    return int(bool(findings or fault))


class CpuForCuda(TorchFunctionMode):
    """Within this context what is asked for on "cuda" is on the CPU, and says that it is not."""

    def __enter__(self) -> "CpuForCuda":
        self._wait, torch.cuda.synchronize = torch.cuda.synchronize, lambda device=None: None
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize = self._wait
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        """Call `func` with the CPU in the place of every GPU among its arguments."""
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _off_gpu(x) for name, x in (kwargs or {}).items()}
        return func(*map(_off_gpu, args), **kwargs)


def _off_gpu(x: Any) -> Any:
    """The CPU, if an argument is the name of a GPU."""
    name = str(x) if isinstance(x, (str, torch.device)) else ""
    return torch.device("cpu") if name.partition(":")[0] == "cuda" else x


def _call(path: pathlib.Path, function: str) -> None:
    """Run a file as a script, or import it and call one function of it."""
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(path)], [str(path.resolve().parent)]
    try:
        if not function:
            runpy.run_path(str(path), run_name="__main__")
            return
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise PerfError(f"{path} has no function {function}")
        try:
            inspect.signature(getattr(module, function)).bind()
        except TypeError as e:
            raise PerfError(f"{path}:{function} is called without arguments: {e}") from None
        getattr(module, function)()
    finally:
        sys.argv, sys.path[:] = before
