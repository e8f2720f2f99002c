"""Where results come from: the header of a results file, with versions, commit and machine."""

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

import tilelab

SOURCES = ("--", ":/", ":(top,exclude)perf/results")  # as git names them: all but the results


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
    """The versions of what the numbers depend on."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": None if cudnn is None else str(cudnn),
        "tilelab": tilelab.__version__,
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

    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", *SOURCES)
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
