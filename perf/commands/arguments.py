"""What a sweep or a compilation is about: from the command line to workloads, tiles and a header.

`perf sweep` and `perf compile` take the same arguments for the same things.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from tilelab.kernels import _tiles
from tilelab.perf.errors import Help, PerfError
from tilelab.perf.work import search_space, shapes
from tilelab.perf.work.workloads import DTYPES, OPS, Workload, modes

_LAYER = "n=32,c=128,h=28,w=28,k=128,r=3,s=3,padding=1"  # the middle of a ResNet
SOURCES = ("--", ":/", ":(top,exclude)perf/results")  # as git names them: all but the results
DEFAULT_SHAPES = {
    "matmul": "m=4096",
    "matmul_bias_relu": "m=4096",
    "scaled_matmul": "m=4096",
    "conv2d": _LAYER,
    "conv2d_bias_relu": _LAYER,
    "conv2d_im2col": _LAYER,
    "conv2d_relu_pool": _LAYER,
    "im2col": _LAYER,
    "col2im": _LAYER,
    "bias_relu": "resnet50@32",
    "max_pool2d": "resnet50@32",
    "softmax": "classes",
    "cross_entropy": "classes",
    "sgd": "resnet50",
    "adamw": "resnet50",
    "train_step": "demo",
    "conv_stack": "vgg16@32",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to measure: operators, modes, dtypes, shapes, axes."""
    parser.add_argument("ops", nargs="+", metavar="OP", help=f"all, or of: {', '.join(OPS)}")
    parser.add_argument(
        "--mode",
        default="fwd",
        help="of fwd, dgrad, wgrad, step; bwd for every gradient; all (default: fwd)",
    )
    parser.add_argument(
        "--dtype", default="bf16", help=f"of {', '.join(DTYPES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--shapes",
        help="set names, or sizes such as m=1024:8192:1024,n=4096; `help` lists them "
        "(default: one typical problem, or a few)",
    )
    parser.add_argument(
        "-a",
        "--axis",
        action="append",
        default=[],
        metavar="BLOCK_M=64,128",
        help="the only values to try for an axis of the tiles; again for another axis",
    )
    parser.add_argument(
        "--tiles",
        choices=("all", "lesson", "default"),
        default="all",
        help="lesson: only those that the kernel's file lists; "
        "default: only the one that a call takes here, tuned or not (default: all)",
    )
    parser.add_argument(
        "--workers", type=positive, help="processes that compile (default: one for each core)"
    )
    parser.add_argument("--note", default="", help="kept in the results file")


def positive(text: str) -> int:
    """A number of things, from the command line: 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def workloads(args: argparse.Namespace) -> list[Workload]:
    """What the arguments name.

    Raises:
        PerfError: an unknown name, or nothing to do.
        Help: for `--shapes help`.
    """
    if args.shapes == "help":
        raise Help(shapes.describe())
    ops = list(OPS) if args.ops == ["all"] else args.ops
    search_space.parse_axes(args.axis)  # an error in them comes first
    dtypes = args.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise PerfError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    chosen, default = [], args.shapes is None
    for op in ops:
        for mode in modes(op, args.mode):
            for shape in shapes.shapes(op, DEFAULT_SHAPES[op] if default else args.shapes):
                for dtype in (d for d in dtypes if d in OPS[op].dtypes):
                    chosen.append(Workload(op, mode, *DTYPES[dtype], shape.sizes, shape.name))
    if not chosen:
        have = ", ".join(sorted({d for op in ops for d in OPS[op].dtypes}))
        raise PerfError(
            f"{', '.join(ops)} has no mode {args.mode} in {args.dtype} ({have}): nothing to do"
        )
    return chosen


def identity(w: Workload, source: str) -> dict[str, Any]:
    """The row fields that say what was to be done."""
    return {
        "op": w.op,
        "mode": w.mode,
        "dtype": w.dtype,
        "precision": w.precision,
        "shape": dict(w.shape),
        "shape_name": w.name,
        "flops": w.flops,
        "bytes": w.bytes,
        "source": source,
    }


def tiles(described: dict, axes: list[str], lesson: bool = False) -> list[dict | None]:
    """The tiles to try for what `aot.describe` has described: the default first.

    With `lesson`, only those that the kernel's file lists. [None] where the work has no tile of its
    own, as a whole training step.
    """
    if described["tile_op"] is None:
        return [None]
    given = [described["tile"], *described["lesson"]]
    narrowed, kernels = search_space.parse_axes(axes), described["kernels"]
    chosen = search_space.tiles(
        described["tile_op"], described["sizes"], given, narrowed,
        () if lesson else kernels, described["itemsize"],
    )  # fmt: skip
    if not chosen:
        sizes = " ".join(f"{k}={v}" for k, v in described["sizes"].items())
        raise PerfError(
            f"no tile of {described['tile_op']} has {' and '.join(axes)}, of those for {sizes}"
        )
    return chosen


def default_tile(described: dict, w: Workload) -> list[dict | None]:
    """The one tile that a call of `w` takes here: of the tuned table, or the lesson's default.

    Args:
        described: by `aot.describe`, which knows no tuned table.
        w: the work.
    """
    if described["tile_op"] is None:
        return [None]
    lesson, kernels = {w.torch_dtype.itemsize: described["tile"]}, tuple(described["kernels"])
    op, sizes = described["tile_op"], described["sizes"]
    return [_tiles.choose_tile(op, w.torch_dtype, lesson, kernels, **sizes)]


def header(fields: dict[str, Any], measured: bool, args: argparse.Namespace) -> dict[str, Any]:
    """The header of a results file; `fields` are those about the GPU."""
    return {
        "created": now(),
        "command": ["tilelab", *sys.argv[1:]],
        "measured": measured,
        "versions": versions(),
        **commit(),
        "host": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))},
        "seed": getattr(args, "seed", 0),
        "note": args.note,
        **fields,
    }


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def versions() -> dict[str, str | None]:
    """Of what the numbers depend on."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    try:
        tilelab = importlib.metadata.version("tilelab")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        tilelab = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": None if cudnn is None else str(cudnn),
        "tilelab": tilelab,
    }


def commit() -> dict[str, Any]:
    """The commit, and whether the working tree differs from it: new results are no difference."""

    def git(*command: str) -> str | None:
        try:
            folder = pathlib.Path(__file__).parent
            result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", *SOURCES)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
