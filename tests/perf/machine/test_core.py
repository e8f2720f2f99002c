"""Branches, barriers, bounds and schedules, by small programs."""

import re

import numpy as np
import pytest

from tests.tools.ptx_programs import by_thread, findings, run
from tilelab.perf.machine import core
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction

# Each thread adds up 1 to its own number: 32 different trip counts.
TRIANGLE = """
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
$again:
    add.u32 %r2, %r2, %r3;
    add.u32 %r3, %r3, 1;
    setp.le.u32 %p1, %r3, %r0;
    @%p1 bra $again;
"""


@pytest.mark.parametrize("schedule", core.SCHEDULES)
def test_threads_that_part_at_a_branch_meet_again(schedule):
    shuffle = "shfl.sync.idx.b32 %r2, %r2, 31, 31, -1;"  # fails unless all 32 lanes are there
    y, machine = by_thread(TRIANGLE + shuffle, 96, schedule=schedule)
    last = np.arange(96) // 32 * 32 + 31
    assert (y == last * (last + 1) // 2).all() and not machine.findings
    assert machine.executed.min() == 3  # every instruction, by three warps


def test_programs_and_their_positions():
    y = np.zeros((4, 3, 2), np.uint32)
    body = """
        mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.x;
        mov.u32 %r6, %nctaid.y; mad.lo.s32 %r7, %r4, %r6, %r3; mad.lo.s32 %r7, %r7, %r5, %r1;
        mul.wide.u32 %rd2, %r7, 4; add.s64 %rd2, %rd2, %rd0; add.u32 %r7, %r7, 1;
        st.global.b32 [%rd2], %r7;
    """
    run(body, y, grid=(2, 3, 4), threads=1024)  # two at a time
    assert (y.ravel() == np.arange(24) + 1).all()


def test_a_guard_keeps_what_was_there():
    y, _ = by_thread("mov.b32 %r2, 7; setp.lt.u32 %p1, %r0, 5; @!%p1 mov.b32 %r2, 9;")
    assert (y == np.where(np.arange(32) < 5, 7, 9)).all()


def test_registers_are_seen_by_their_parts():
    body = "cvt.u16.u32 %rs1, %r0; mov.b16 %rs3, 513; mov.b32 %r3, {%rs1, %rs3};"
    y, _ = by_thread(body + "mov.b32 {_, %rs4}, %r3; cvt.u32.u16 %r4, %rs4; add.u32 %r2, %r3, %r4;")
    assert (y == np.arange(32) + (513 << 16) + 513).all()


@pytest.mark.parametrize("schedule", core.SCHEDULES)
def test_a_barrier_makes_warps_wait(schedule):
    body = """
        shl.b32 %r3, %r0, 2; st.shared.b32 [%r3], %r0; bar.sync 0;
        sub.u32 %r4, 255, %r0; shl.b32 %r4, %r4, 2; ld.shared.b32 %r2, [%r4];
    """
    y, machine = by_thread(body, 256, schedule=schedule)
    assert (y == 255 - np.arange(256)).all() and not machine.findings


@pytest.mark.parametrize("schedule", core.SCHEDULES)
def test_named_barriers_of_a_part_of_the_warps(schedule):
    body = """
        shl.b32 %r3, %r0, 2; st.shared.b32 [%r3], %r0; mov.b32 %r2, 1000;
        setp.lt.u32 %p1, %r0, 64; setp.lt.u32 %p2, %r0, 96; setp.ge.u32 %p3, %r0, 64;
        and.pred %p4, %p2, %p3;
        @%p4 barrier.arrive 1, 96;
        @!%p1 bra $end;
        barrier.sync 1, 96;
        ld.shared.b32 %r2, [%r3 + 128];
    $end:
    """
    y, machine = by_thread(body, 128, schedule=schedule)
    assert (y == np.where(np.arange(128) < 64, np.arange(128) + 32, 1000)).all()
    assert not machine.findings


def fault(words, body, *arrays, **options):
    with pytest.raises(MachineFault, match=words) as caught:
        run(body, *arrays, **options)
    return str(caught.value)


@pytest.mark.parametrize("schedule", core.SCHEDULES)
def test_a_deadlock_says_who_waits_where(schedule):
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0; @!%p1 bar.sync 1, 64;"
    text = fault("deadlock", body, threads=64, schedule=schedule)
    assert "warps 0 waits at" in text and "warps 1 waits at" in text and "bar.sync 1, 64" in text


def test_half_a_warp_at_a_barrier_is_a_fault():
    fault("bar needs all 32 lanes", "setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;")


def test_a_barrier_that_expects_another_number_is_a_fault():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 96;"
    fault("expects 96 threads here and 64", body, threads=64)


def test_a_cta_has_16_barriers_for_whole_warps():
    run("bar.sync 15, 64;", threads=64)
    fault("barrier 16: a CTA has 0 to 15", "bar.sync 16, 64;", threads=64)
    fault("a barrier of 40 threads", "bar.sync 1, 40;", threads=64)
    fault("a barrier of 0 threads", "bar.sync 1, 0;", threads=64)


def test_out_of_bounds_is_named_with_tensor_thread_and_line():
    x = np.zeros(32, np.uint32)
    body = "mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd0; ld.global.b32 %r2, [%rd2 + 8];"
    text = fault("0 bytes behind the end of array 0", body, x)
    assert "thread 30" in text and "PTX line" in text and "ld.global.b32" in text
    fault("4 bytes before array 0", "ld.global.b32 %r2, [%rd0 + -4];", x)
    fault("not aligned", "ld.global.b32 %r2, [%rd0 + 2];", x)
    fault("out of bounds: shared", "mov.b32 %r3, 1024; ld.shared.b32 %r2, [%r3];")
    fault("not aligned", "mov.b32 %r3, 8; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r3];")


def test_shared_memory_that_nobody_wrote_is_reported():
    machine = run("mov.b32 %r3, 8; ld.shared.b32 %r2, [%r3];")
    assert findings(machine) == ["uninitialised"]


def test_what_one_batch_wrote_the_next_has_not():
    body = "shl.b32 %r3, %r0, 2; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.b32 [%r3], 1;"
    body += "setp.eq.u32 %p2, %r1, 2; @%p2 ld.shared.b32 %r2, [%r3];"
    assert findings(run(body, threads=1024, shared=4096, grid=(3,))) == ["uninitialised"]


def test_registers_begin_as_nothing_in_particular():
    y, _ = by_thread("")
    assert (y == 0xFFFFFFFF).all()


def test_setmaxnreg_hands_registers_over():
    body = """
        setp.lt.u32 %p1, %r0, 128; @%p1 bra $few;
        setmaxnreg.inc.sync.aligned.u32 232;
        bra $end;
    $few:
        setmaxnreg.dec.sync.aligned.u32 104;
    $end:
    """
    for schedule in core.SCHEDULES:
        run(body, threads=256, more=".maxnreg 168", schedule=schedule)
        fault("deadlock", body.replace("dec.sync.aligned.u32 104", "dec.sync.aligned.u32 128"),
              threads=256, more=".maxnreg 168", schedule=schedule)  # fmt: skip
    with pytest.raises(UnknownInstruction, match="maxnreg"):
        run(body, threads=256)


def test_one_instruction_may_not_name_more_registers_than_its_warp_holds():
    many = ", ".join(f"%r{i}" for i in range(2, 38))  # 36 sums of a thread, and two descriptors
    body = f"""
        setmaxnreg.dec.sync.aligned.u32 24;
        setmaxnreg.inc.sync.aligned.u32 48;
        mov.b64 %rd1, 0; mov.b64 %rd2, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {{{many}}}, %rd1, %rd2, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
    """
    run(body, threads=128, shared=8192, more=".maxnreg 168")
    fault("needs 40 registers of a thread at once, and its warp holds 24",
          body.replace("setmaxnreg.inc.sync.aligned.u32 48;", ""),
          threads=128, shared=8192, more=".maxnreg 168")  # fmt: skip


def test_shfl_up_and_down_stop_at_the_ends_of_a_warp():
    y, _ = by_thread("shfl.sync.down.b32 %r2, %r0, 3, 31, -1;", 64)
    lane = np.arange(64) % 32
    assert (y == np.where(lane < 29, np.arange(64) + 3, np.arange(64))).all()
    y, _ = by_thread("shfl.sync.up.b32 %r2, %r0, 3, 0, -1;", 64)
    assert (y == np.where(lane >= 3, np.arange(64) - 3, np.arange(64))).all()
    y, _ = by_thread("shfl.sync.bfly.b32 %r2, %r0, 5, 31, -1;", 64)
    assert (y == (np.arange(64) ^ 5)).all()
    y, _ = by_thread("shfl.sync.idx.b32 %r2, %r0, 9, 31, -1;", 64)
    assert (y == np.arange(64) // 32 * 32 + 9).all()


def test_atomic_operations_return_what_was_there():
    x = np.array([100], np.uint32)
    y = np.zeros(64, np.uint32)
    body = """
        atom.global.add.u32 %r2, [%rd0], 2; mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %rd3, %rd1;
        st.global.b32 [%rd3], %r2;
    """
    run(body, x, y, threads=64)
    assert x[0] == 228 and sorted(y) == list(range(100, 228, 2)) and list(y) != sorted(y)


def test_counts_of_sectors_and_wavefronts():
    x = np.zeros(64 * 32, np.uint32)
    stride = "mul.wide.u32 %rd2, %r0, {0}; add.s64 %rd2, %rd2, %rd0; ld.global.b32 %r2, [%rd2];"
    for size, sectors in ((4, 4), (8, 8), (32, 32), (128, 32)):
        total = run(stride.format(size), x, counting=True).counts.total
        assert (total["sectors"], total["sectors, ideal"]) == (sectors, 4)
    banks = "mul.lo.u32 %r3, %r0, {0}; {1} [%r3], {2};"
    for size, op, value, wavefronts, ideal in (
        (4, "st.shared.b32", "%r0", 1, 1),
        (8, "st.shared.b32", "%r0", 2, 1),
        (128, "st.shared.b32", "%r0", 32, 1),
        (132, "st.shared.b32", "%r0", 1, 1),
        (0, "st.shared.b32", "7", 1, 1),  # all lanes one word
        (8, "st.shared.v2.b32", "{%r0, %r0}", 2, 2),
        (16, "st.shared.v4.b32", "{%r0, %r0, %r0, %r0}", 4, 4),
        (32, "st.shared.v4.b32", "{%r0, %r0, %r0, %r0}", 8, 4),
    ):
        body = banks.format(size, op, value) if "{" not in value else None
        body = body or f"mul.lo.u32 %r3, %r0, {size}; {op} [%r3], {value};"
        total = run(body, shared=8192, counting=True).counts.total
        assert (total["wavefronts"], total["wavefronts, ideal"]) == (wavefronts, ideal), op


def first_program(schedule, seed=0):
    """The program of a grid of 2x3 that comes first, of programs that fill the machine."""
    with pytest.raises(MachineFault) as fault:
        run("trap;", threads=1024, grid=(2, 3), schedule=schedule, seed=seed)
    return tuple(map(int, re.search(r"program \((\d+), (\d+), 0\)", str(fault.value)).groups()))


def test_programs_of_a_grid_come_in_any_order():
    assert first_program("lockstep") == first_program("late") == (0, 0)
    found = {first_program("random", seed) for seed in range(20)}
    assert len(found) >= 4 and found <= {(x, y) for x in range(2) for y in range(3)}
