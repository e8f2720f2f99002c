"""A process either interprets kernels or compiles them, and `make test` is one that interprets."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.tools.inputs import INTERPRET
from tilelab.perf.compiler import aot

FOLDER = pathlib.Path(__file__).parent / "compiled"


@pytest.mark.core
@pytest.mark.skipif(not INTERPRET, reason="this process runs them itself")
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_in_a_process_that_compiles(name):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", FOLDER / f"{name}.py"]
    run = subprocess.run(command, env=os.environ | aot.ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout
