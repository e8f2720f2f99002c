"""What is ordered and what is not, one pair of accesses at a time, on every schedule."""

import numpy as np
import pytest

from tests.tools.ptx_programs import findings, run
from tilelab.perf.machine import core

SHARED = "shl.b32 %r3, %r0, 2; mov.b32 %r4, 0;"  # %r3: this thread's word
NEXT = "add.u32 %r5, %r0, 32; and.b32 %r5, %r5, 63; shl.b32 %r5, %r5, 2;"  # of the other warp
WITHIN = "xor.b32 %r5, %r3, 4;"  # of the neighbouring lane
ONE = "setp.eq.u32 %p1, %r0, 0; setp.ge.u32 %p2, %r0, 32;"

ORDERED = {
    "a barrier": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5];",
    "its own word": f"{SHARED} st.shared.b32 [%r3], %r0; ld.shared.b32 %r6, [%r3];",
    "a barrier of the warp": f"{SHARED} {WITHIN} st.shared.b32 [%r3], %r0; bar.warp.sync -1;"
    " ld.shared.b32 %r6, [%r5];",
    "a named barrier": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; barrier.sync 3, 64;"
    " ld.shared.b32 %r6, [%r5];",
    "read, barrier, write": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; bar.sync 0;"
    " ld.shared.b32 %r6, [%r5]; bar.sync 0; st.shared.b32 [%r5], %r4;",
    "all store one value": f"{SHARED} st.shared.b32 [%r4], 7;",
    "all store NaN": f"{SHARED} shl.b32 %r5, %r0, 31; or.b32 %r5, %r5, 0x7fc00000;"
    " st.shared.b32 [%r4], %r5;",
    "all store a pair, one half NaN": f"{SHARED} shl.b32 %r5, %r0, 15; and.b32 %r5, %r5, 0x8000;"
    " or.b32 %r5, %r5, 0x3c007e00; st.shared.b32 [%r4], %r5;",
    "bytes of one word": "shr.u32 %r3, %r0, 5; cvt.u16.u32 %rs1, %r3; setp.lt.u32 %p1, %r0, 64;"
    " st.shared.b8 [%r3], %rs1;",
    "atomic operations": "mov.b32 %r4, 0; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [%r4], 0;"
    " bar.sync 0; atom.shared.add.u32 %r6, [%r4], 1; bar.sync 0; ld.shared.b32 %r7, [%r4];",
}
RACES = {
    "write, read": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; ld.shared.b32 %r6, [%r5];",
    "write, read in one warp": f"{SHARED} {WITHIN} st.shared.b32 [%r3], %r0;"
    " ld.shared.b32 %r6, [%r5];",
    "write, write": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; st.shared.b32 [%r5], %r4;",
    "read, write": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; bar.sync 0;"
    " ld.shared.b32 %r6, [%r5];"
    " st.shared.b32 [%r3], %r4;",
    "read, write in one warp": f"{SHARED} {WITHIN} st.shared.b32 [%r3], %r0; bar.sync 0;"
    " ld.shared.b32 %r6, [%r5]; st.shared.b32 [%r3], %r4;",
    "two values at once": f"{SHARED} st.shared.b32 [%r4], %r0;",
    "NaN, and in pairs another half": f"{SHARED} shl.b32 %r5, %r0, 15; or.b32 %r5, %r5, 0x7e00;"
    " st.shared.b32 [%r4], %r5;",
    "infinities": f"{SHARED} shl.b32 %r5, %r0, 31; or.b32 %r5, %r5, 0x7f800000;"
    " st.shared.b32 [%r4], %r5;",
    "a barrier of another warp": f"{SHARED} {NEXT} st.shared.b32 [%r3], %r0; bar.warp.sync -1;"
    " ld.shared.b32 %r6, [%r5];",
    "an atomic operation and a load": "mov.b32 %r4, 0; setp.eq.u32 %p1, %r0, 0;"
    " @%p1 st.shared.b32 [%r4], 0; bar.sync 0; atom.shared.add.u32 %r6, [%r4], 1;"
    " ld.shared.b32 %r7, [%r4];",
}


@pytest.mark.parametrize("schedule", core.SCHEDULES)
@pytest.mark.parametrize("name", ORDERED)
def test_ordered(name, schedule):
    assert findings(run(ORDERED[name], threads=64, schedule=schedule)) == []


@pytest.mark.parametrize("schedule", core.SCHEDULES)
@pytest.mark.parametrize("name", RACES)
def test_races(name, schedule):
    assert "race" in findings(run(RACES[name], threads=64, schedule=schedule))


def test_a_race_is_reported_with_both_instructions():
    machine = run(RACES["write, read"], threads=64)
    (report,) = machine.findings
    assert "st.shared" in report[3] and "ld.shared" in report[2], report


GLOBAL = "mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %rd3, %rd0;"
CTA = "mul.wide.u32 %rd4, %r1, 128; add.s64 %rd4, %rd4, %rd3;"


@pytest.mark.parametrize(
    ("racing", "body"),
    [
        (False, f"{GLOBAL} {CTA} ld.global.b32 %r5, [%rd4]; st.global.b32 [%rd4], %r5;"),
        (False, f"{GLOBAL} st.global.b32 [%rd3], %r0;"),  # the same value from every CTA
        (False, f"{GLOBAL} ld.global.b32 %r5, [%rd3];"),
        (False, f"{GLOBAL} red.global.add.u32 [%rd3], 1;"),
        (True, f"{GLOBAL} st.global.b32 [%rd3], %r1;"),
        (True, f"{GLOBAL} ld.global.b32 %r5, [%rd3]; setp.eq.u32 %p1, %r1, 2;"
               " @%p1 st.global.b32 [%rd3], 77;"),
        (True, f"{GLOBAL} ld.global.b32 %r5, [%rd3]; red.global.add.u32 [%rd3], 1;"),
        (True, f"{GLOBAL} xor.b32 %r5, %r0, 1; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd5, %rd5, %rd0;"
               " setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd3], %r0;"
               " @%p1 ld.global.b32 %r6, [%rd5];"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threads", [32, 1024])  # CTAs side by side, and one after the other
def test_programs_of_a_launch_are_not_ordered(racing, body, threads):
    x = np.full(8 * 1024, 5, np.uint32)
    if threads == 1024:
        body = body.replace("128", "4096")
    found = findings(run(body, x, threads=threads, grid=(5,)))
    assert ("race" in found) == racing, found


# Every program reads x[0], takes a ticket, and writes its number to y; the last one adds up y.
TICKET = """
    mov.b32 %r4, 0; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd4, %rd2;
    ld.global.b32 %r5, [%rd0]; setp.eq.u32 %p1, %r0, 40; @%p1 st.global.b32 [%rd4], %r1;
    bar.sync 0;
    setp.eq.u32 %p1, %r0, 0; @%p1 atom.global.acq_rel.gpu.add.u32 %r6, [%rd1], 1;
    @%p1 st.shared.b32 [%r4], %r6; bar.sync 0; ld.shared.b32 %r6, [%r4];
    setp.ne.u32 %p2, %r6, 4; @%p2 bra $END;
    setp.lt.u32 %p3, %r0, 5; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd2;
    @%p3 ld.global.b32 %r7, [%rd5]; add.u32 %r7, %r7, 1; @%p3 st.global.b32 [%rd5], %r7;
    @%p1 st.global.b32 [%rd0], 9; @%p1 st.global.b32 [%rd1], 0;
    $END:
"""


@pytest.mark.parametrize("schedule", core.SCHEDULES)
@pytest.mark.parametrize("threads", [64, 1024])  # CTAs side by side, and one after the other
@pytest.mark.parametrize(
    ("change", "races"),
    [
        (("bar.sync 0;", "bar.sync 0;"), False),
        (("acq_rel.gpu", "relaxed.gpu"), True),
        (("acq_rel.gpu", "acquire.gpu"), True),
        (("acq_rel.gpu", "release.gpu"), True),
        (("acq_rel.gpu", "acq_rel.cta"), True),
        (("%r1;\n    bar.sync 0;", "%r1;"), True),  # thread 40 is not known to be done
        (("%r6, 4;", "%r6, 3;"), True),  # the last but one
    ],
)
def test_the_last_program_to_take_a_ticket_knows_the_others(change, races, threads, schedule):
    x, ticket, y = np.ones(1, np.uint32), np.zeros(1, np.uint32), np.full(5, 77, np.uint32)
    assert change[0] in TICKET
    body = TICKET.replace(*change)
    found = findings(run(body, x, ticket, y, threads=threads, grid=(5,), schedule=schedule))
    assert found == ["race"] * races
    if not races:
        assert x[0] == 9 and ticket[0] == 0 and list(y) == [1, 2, 3, 4, 5]
