"""Every kernel compiles for GPUs that are not here: it fits, spills nothing, uses tensor cores."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

KIB = 1024
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}


def compiled(*args, module="aot"):
    """The report of tests/tools/aot.py (or another), run where triton compiles and does not interpret."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.tools.{module}", *args],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def describe(row):
    tile = {k: v for k, v in row["constants"].items() if k.startswith(("BLOCK", "PRECISION"))}
    return f"{row['kernel']} ({row['case']}, {row['dtype']}) with {tile | row['options']}"


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_every_kernel_at_its_default_tiles(target):
    report = compiled(target)
    assert not report["missing"], f"no case in tests/tools/aot.py launches {report['missing']}"
    problems = []
    for row in report["launches"]:
        if "error" in row:
            problems.append(f"{describe(row)} does not compile: {row['error']}")
            continue
        if row["shared"] > SHARED[target]:
            problems.append(f"{describe(row)} needs {row['shared']} bytes of shared memory")
        if row["spills"]:
            problems.append(f"{describe(row)} spills {row['spills']} ({row['registers']} in use)")
        ieee = row["dtype"] == "float32" and row["constants"].get("PRECISION") == "ieee"
        if row["dots"] and not row["tensor_cores"] and not ieee:
            problems.append(f"{describe(row)} does not use tensor cores")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_every_tile_fits_hopper():
    """The tiles that a sweep may choose: they compile, and the hardware can launch them."""
    problems = []
    for row in compiled("sm_90", "--tiles")["launches"]:
        if "error" in row:
            problems.append(f"{describe(row)} does not compile: {row['error']}")
        elif row["shared"] > SHARED["sm_90"]:
            problems.append(f"{describe(row)} needs {row['shared']} bytes of shared memory")
    assert not problems, "\n".join(problems)
