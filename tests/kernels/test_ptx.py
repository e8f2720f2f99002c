"""Every kernel as compiled, with no GPU: the tests of tests/ptx_sample, executed by perf/machine.

By hand: pytest --on sm_90 @tests/ptx_sample/sm_90.txt. All others: make test-ptx.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.tools import ptx_sample
from tests.tools.inputs import INTERPRET
from tilelab.perf.compiler import aot

PARTS = 2  # of a list, so that several processes share it; the first is worth the most
CASES = [
    pytest.param(target, part, marks=[pytest.mark.core] if part == 0 else [])
    for part in range(PARTS)
    for target in ("sm_90", "sm_80")
]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="this process runs them itself")
@pytest.mark.parametrize("target, part", CASES)
def test_the_sample_as_ptx(target, part):
    """If a test of it is not found, it has another name now: put that into the list."""
    tests = (ptx_sample.FOLDER / f"{target}.txt").read_text().splitlines()
    tests = tests[part * len(tests) // PARTS : (part + 1) * len(tests) // PARTS]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--on", target, *tests]
    run = subprocess.run(command, env=os.environ | aot.ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    (passed,) = re.findall(r"^(\d+) passed", run.stdout, re.M)
    assert int(passed) == len(tests), "some were skipped:\n" + run.stdout[-4000:]


def record(name, seconds, kinds, statements, **compiled):
    return dict(id=name, seconds=seconds, kinds=kinds, statements=statements, compiled=compiled)


def test_what_reaches_the_most_for_its_time_comes_first():
    tests = [
        record("slow", 10.0, ["a", "b", "c"], [1, 2, 3]),
        record("quick", 1.0, ["a"], [1]),
        record("the same", 1.1, ["a"], [1]),
        record("alone has it", 2.0, [], [4]),
    ]
    found, total = ptx_sample.chosen(tests, seconds=60)
    assert found == ["quick", "slow", "alone has it"]
    assert total == dict(tests=3, seconds=13, kinds=3, statements=4)
    assert ptx_sample.chosen(tests, seconds=4)[0] == ["quick", "alone has it"]


def test_a_kernel_is_compiled_once():
    """The second to use it was recorded with hardly any time: alone it would have to compile."""
    tests = [
        record("first", 1.0, ["a", "b"], [], ptx=9.0),
        record("second", 1.0, ["a"], [], ptx=0.1),
        record("another", 1.0, ["c"], [], other=5.0),
        record("with it", 1.0, ["d"], [], ptx=0.1),
    ]
    found, total = ptx_sample.chosen(tests, seconds=60)
    assert found == ["first", "with it", "another"] and total["seconds"] == 17
    assert ptx_sample.chosen(tests, seconds=8)[0] == ["another"]
