"""The reasons why a planted fault changes nothing: each holds for one small program, and not for
another one, in which the fault matters.
"""

import numpy as np
import pytest

from tests.tools import ptx_fault_intervals as intervals
from tests.tools import ptx_fault_meetings as meetings
from tests.tools import ptx_fault_reasons as reasons
from tests.tools import ptx_faults, ptx_programs
from tests.tools.ptx_copies import WAIT
from tests.tools.ptx_fault_cases import Launch
from tests.tools.ptx_fault_kinds import faults
from tilelab.perf.machine import memory, ptx

BEGIN = """
    mov.b32 %r2, global_smem; setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 32;
    mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0;
"""
END = "st.global.b32 [%rd1], %r9;"  # what each thread has in %r9


def launch_of(body, threads, more=""):
    """A launch of one CTA with one tensor."""
    program = ptx.parse(ptx_programs.text(BEGIN + body, 1, threads, more))
    where = memory.GlobalMemory([4 * threads])
    at = where.place(np.zeros(4 * threads, np.uint8), "y")
    return Launch(program, (1,), {"kernel_param_0": np.uint64(at)}, 1024, where, {})


def holds(reason, kind, body, number=0, threads=64, more=""):
    """Whether a reason holds for the fault of this number of a kind."""
    launch = launch_of(body, threads, more)
    fault = [fault for fault in faults(launch.program, {}) if fault.kind == kind][number]
    return bool(ptx_faults.explained(reason, launch, fault, ptx_faults.untouched(launch)))


def test_a_barrier_may_have_any_number_where_all_come_to_one_instruction():
    kind = "barrier of another number"
    assert holds(meetings.only_they_meet, kind, "bar.sync 1, 64;")
    divided = "@%p2 bra $l; bar.sync 1, 64; bra $e; $l: bar.sync 1, 64; $e:"
    for number in (0, 1):
        assert not holds(meetings.only_they_meet, kind, divided, number)


def test_a_barrier_is_needed_where_threads_come_to_it_from_two_instructions():
    assert holds(intervals.nothing_to_order, "barrier removed", "bar.sync 0;")
    divided = "@%p2 bra $l; barrier.sync 1; bra $e; $l: barrier.sync 1; $e:"
    for number in (0, 1):
        assert not holds(intervals.nothing_to_order, "barrier removed", divided, number)


def test_the_count_of_an_mbarrier_matters_to_those_that_ask_it():
    body = f"""
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
        @%p1 mbarrier.init.shared::cta.b64 [%r2 + 8], 1;
        bar.sync 0;
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2 + 8];
        {WAIT.format(at=8, parity=0)}
    """
    kind = "mbarrier.init of one more"
    assert holds(meetings.never_asked, kind, body, 0)
    assert not holds(meetings.never_asked, kind, body, 1)


def test_a_wait_is_needless_behind_one_for_something_that_came_later():
    first, second = (WAIT.format(at=at, parity=0) for at in (0, 8))
    body = """
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
        @%p1 mbarrier.init.shared::cta.b64 [%r2 + 8], 32;
        bar.sync 0;
        @%p2 bra $wait;
        mbarrier.arrive.shared::cta.b64 _, [%r2];
        mbarrier.arrive.shared::cta.b64 _, [%r2 + 8];
        bra $end;
    $wait:
    """
    kind = "mbarrier wait removed"
    later_first = f"{body}{second}{first}$end:"
    in_order = f"{body}{first}{second}$end:"
    assert [holds(meetings.known_already, kind, later_first, n) for n in (0, 1)] == [False, True]
    assert [holds(meetings.known_already, kind, in_order, n) for n in (0, 1)] == [False, False]


@pytest.mark.parametrize("alive, enough", [(8, True), (30, False)])
def test_values_need_room_in_the_registers_of_a_warp(alive, enough):
    made = "".join(f"add.u32 %r{20 + i}, %r0, {i};" for i in range(alive))
    used = "".join(f"add.u32 %r9, %r9, %r{20 + i};" for i in range(alive))
    body = """
        setmaxnreg.dec.sync.aligned.u32 24;
        setmaxnreg.inc.sync.aligned.u32 64;
        mov.b32 %r9, 0;
    """
    launch = launch_of(body + made + used + END, 128, ".maxnreg 128")
    assert meetings.most_alive(launch.program)[-2] == alive + 1 + 2 + 1  # %r9, %rd1 and %r0
    kind, more = "setmaxnreg removed", ".maxnreg 128"
    found = holds(meetings.enough_registers, kind, body + made + used + END, 1, 128, more)
    assert found == enough


def test_a_comparison_may_change_where_its_outcome_does_not():
    kind, store = "comparison off by one", f"selp.b32 %r9, 7, 0, %p3; {END}"
    far = f"setp.lt.u32 %p3, %r0, 80; {store}"
    near = f"setp.lt.u32 %p3, %r0, 20; {store}"
    unused = f"setp.lt.u32 %p3, %r0, 20; mov.b32 %r9, 7; {END}"
    number = 4  # two of each comparison, and BEGIN has two
    for reason, kept in ((reasons.same_outcome, far), (reasons.any_outcome, unused)):
        assert [holds(reason, kind, x, number) for x in (far, near, unused)] == [
            x is kept for x in (far, near, unused)
        ]


def test_one_lane_of_a_warp_may_stand_for_another():
    kind = "comparison off by one"
    first = "setp.eq.u32 %p3, %r0, 0; @%p3 st.global.b32 [%rd0], 7;"
    own = f"setp.eq.u32 %p3, %r0, 0; mov.b32 %r9, 7; @%p3 {END}"
    half = "setp.lt.u32 %p3, %r0, 16; @%p3 st.global.b32 [%rd0], 7;"
    assert [holds(reasons.any_lane, kind, x, 4) for x in (first, own, half)] == [True, False, False]


def test_a_number_that_is_not_stored_may_be_any_other():
    kind = "comparison off by one"
    body = "mov.b32 %r5, %r0; setp.lt.u32 %p3, %r5, 20; selp.b32 %r9, 7, 0, %p3;"
    body += "setp.ne.u32 %p4, %r0, {};"
    # thread 20 alone is let in by one more; the second program stores what it has
    others, all_of_them = (body.format(n) + f"@%p4 {END}" for n in (20, 64))
    found = [holds(reasons.any_value, kind, x, 4) for x in (others, all_of_them)]
    assert found == [True, False]


@pytest.mark.parametrize("size", [0, 4])
def test_a_copy_of_no_byte_may_come_from_anywhere(size):
    body = f"""
        mov.b32 %r3, {size}; shl.b32 %r4, %r0, 2; add.s32 %r4, %r4, %r2;
        cp.async.ca.shared.global [%r4], [%rd1], 4, %r3;
        cp.async.wait_all;
    """
    assert holds(reasons.no_byte_copied, "global address", body) == (size == 0)
