"""From the command line to workloads and tiles: what a sweep or a compilation is about.

`tilelab sweep` and `tilelab compile` share these arguments.
"""

import argparse
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from tilelab.perf.errors import Help, PerfError
from tilelab.perf.work import search_space, shapes
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.workloads import DTYPES, Workload, modes


def add_arguments(parser: argparse.ArgumentParser, command: str, top: int) -> None:
    """Add what to measure (operators, modes, dtypes, shapes, axes), and where it goes."""
    parser.add_argument("ops", nargs="+", metavar="OP", help=f"all, or of: {', '.join(OPERATORS)}")
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
        "default: only the one that a call takes on that GPU, tuned or not (default: all)",
    )
    parser.add_argument(
        "--workers", type=positive, help="processes that compile (default: one for each core)"
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="for everything together; what it leaves out is skipped, and --resume does it later",
    )
    parser.add_argument("--note", default="", help="kept in the results file")
    parser.add_argument("--out", type=pathlib.Path, help=f"folder (default: runs/{command})")
    parser.add_argument(
        "--resume", action="store_true", help="go on with --out, or the newest default folder"
    )
    parser.add_argument(
        "--top", type=positive, default=top, help="tiles to print a problem (default: %(default)s)"
    )


def positive(text: str) -> int:
    """A number of things, from the command line: 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time budget, from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def workloads(args: argparse.Namespace) -> list[Workload]:
    """What the arguments name; a PerfError if that is unknown or nothing, Help if they ask."""
    if args.shapes == "help":
        raise Help(shapes.describe())
    if args.tiles == "default" and args.axis:
        raise PerfError("--tiles default is one tile: -a has nothing to choose from")
    ops = list(OPERATORS) if args.ops == ["all"] else args.ops
    parse_axes(args.axis)  # an error in them comes first
    dtypes = args.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise PerfError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    chosen, default = [], args.shapes is None
    for op in ops:
        for mode in modes(op, args.mode):
            for shape in shapes.shapes(op, OPERATORS[op].default if default else args.shapes):
                for dtype in (d for d in dtypes if d in OPERATORS[op].dtypes):
                    chosen.append(Workload(op, mode, *DTYPES[dtype], shape.sizes, shape.name))
    if not chosen:
        have = ", ".join(sorted({d for op in ops for d in OPERATORS[op].dtypes}))
        raise PerfError(
            f"{', '.join(ops)} has no mode {args.mode} in {args.dtype} ({have}): nothing to do"
        )
    return chosen


def parse_axes(texts: Iterable[str]) -> dict[str, tuple]:
    """["BLOCK_M=64,128", "num_warps=8", "kernel=tma"] as a dict; a PerfError if no tile has it."""
    axes = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name == "kernel":
            axes[name] = tuple(values.split(","))
            if not set(axes[name]) <= set(search_space.KERNELS):
                raise PerfError(f"kernel is of {', '.join(search_space.KERNELS)}; got {text!r}")
            continue
        try:
            numbers = tuple(int(v) for v in values.split(","))
        except ValueError:
            raise PerfError(f"an axis is given as BLOCK_M=64,128; got {text!r}") from None
        block = name.startswith("BLOCK_") or name == "num_warps"
        least = 0 if name in search_space.FAST_AXES else 1
        if any(v < least or (block and v & (v - 1)) for v in numbers):
            raise PerfError(
                f"{name} takes {'powers of two' if block else 'positive numbers'}: {text!r}"
            )
        if name in axes:
            raise PerfError(f"{name} is given twice: all its values go into one -a")
        axes[name] = numbers
    modes = (mode for row in OPERATORS.values() for mode in row.modes.values())
    known = {"kernel", *search_space.FAST_AXES}
    known = sorted(known.union(*(tile_op.axes for mode in modes for tile_op in mode.tile_ops)))
    for name in axes:
        if name not in known:
            raise PerfError(f"unknown axis {name!r}: there are {', '.join(known)}")
    return axes


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


def tiles(described: dict, w: Workload, axes: list[str], which: str = "all") -> list[dict | None]:
    """The tiles to try for what `aot.describe` has described: the default first.

    [None] where the work has no tile of its own, as a whole training step. `axes` is what `-a`
    says, and `which` what `--tiles` says, "all" or "lesson".
    """
    if described["tile_op"] is None:
        return [None]
    (tile_op,) = (t for t in w.about.tile_ops if t.name == described["tile_op"])
    sizes, kernels = described["sizes"], tuple(described["kernels"])
    chosen = search_space.tiles(
        tile_op, sizes, [described["tile"], *described["lesson"]], parse_axes(axes),
        () if which == "lesson" else kernels, described["itemsize"],
    )  # fmt: skip
    if not chosen:
        text = " ".join(f"{k}={v}" for k, v in sizes.items())
        raise PerfError(f"no tile of {tile_op.name} has {' and '.join(axes)}, of those for {text}")
    return chosen
