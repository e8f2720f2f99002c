"""What was executed, over many launches: the shares, and the list of what was not."""

import dataclasses

import numpy as np
import pytest

from tests.tools import ptx_programs
from tilelab.perf.machine import Coverage, Report, ptx

PLACES = '.file 1 "/somewhere/lesson.py"\n'
BODY = """
    .loc 1 10 0
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra $low;
    .loc 1 11 0
    add.u32 %r3, %r0, 1;
    add.u32 %r4, %r0, 2;
$low:
    .loc 1 12 0
    mul.lo.u32 %r5, %r0, 3;
"""


def report(executed, code="a", kernel="a_kernel"):
    """Of a launch that executed the instructions with these opcodes."""
    program = ptx.parse(PLACES + ptx_programs.text(BODY))
    instructions = [inst for block in program.blocks for inst in block]
    done = np.array([inst.op in executed for inst in instructions]).astype(int)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Report))
    fields |= dict(kernel=kernel, code=code, executed=done, seconds=0.5, findings=[])
    return Report(**fields | dict(instructions=instructions))


ALL = {"mov.u32", "setp.lt.u32", "bra", "add.u32", "mul.lo.u32", "ret"}
SIZE = 8  # instructions: two of mov.u32 and two of add.u32


def test_what_one_launch_or_another_executed():
    coverage = Coverage()
    coverage.add(report(ALL - {"add.u32"}))
    assert coverage.each("a_kernel") == (SIZE - 2) / SIZE
    assert coverage.missed("a_kernel") == [
        "lesson.py:11: 2 instructions of 1 variants (add.u32), such as PTX line "
        + str(next(i.line for i in report(ALL).instructions if i.op == "add.u32"))
        + ": add.u32 %r3, %r0, 1"
    ]
    coverage.add(report({"add.u32"}))
    assert coverage.each("a_kernel") == 1 and coverage.missed("a_kernel") == []
    assert coverage.totals["a_kernel"] == dict(launches=2, findings=0, seconds=1.0)


def test_each_variant_and_all_together():
    """A variant's launch is none of another, but a statement of the kernel is one of both."""
    coverage = Coverage()
    coverage.add(report(ALL - {"add.u32"}, "a"))
    coverage.add(report({"add.u32", "mul.lo.u32"}, "b"))
    assert coverage.each("a_kernel") == pytest.approx((SIZE - 2 + 3) / 2 / SIZE)
    assert coverage.together("a_kernel") == 1
    assert len(coverage.missed("a_kernel")) == 4  # lines 10 to 12, and what has no line
    heading, row = str(coverage).splitlines()
    assert row.split() == ["2", "2", "56.2%", "100.0%", "0", "1.0", "a_kernel"]
    assert heading.split()[2:4] == ["each", "together"]


def test_processes_are_merged():
    one, other = Coverage(), Coverage()
    one.add(report(ALL - {"add.u32", "ret"}))
    other.add(report(ALL - {"add.u32"}))
    other.add(report(ALL, kernel="b_kernel"))
    one.merge(other)
    assert one.each("a_kernel") == (SIZE - 2) / SIZE and one.totals["a_kernel"]["launches"] == 2
    assert one.each("b_kernel") == one.together("b_kernel") == 1
