"""cp.async: what it copies, when it has come, and what is found when a line is missing."""

import numpy as np
import pytest

from tests.tools.ptx_copies import Run, inst_of, numbers, schedules, without
from tilelab.perf.machine.errors import MachineFault

# Each thread copies 16 bytes in two groups, and then stores the 16 bytes that its neighbour, 32
# threads away, has copied.
COPY = """
    add.s32 %r4, %r3, 1024;
    cp.async.cg.shared.global [%r3 + 0], [%rd6 + 0], 0x10, 16;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r4 + 0], [%rd6 + 0], 0x8, %r5;
    cp.async.ca.shared.global [%r4 + 8], [%rd6 + 8], 0x4, 4;
    cp.async.ca.shared.global [%r4 + 12], [%rd6 + 12], 0x4, 0;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0; // first
    xor.b32 %r6, %r3, 512;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r6];
    cp.async.wait_group 0;
    bar.sync 0; // second
    add.s32 %r6, %r6, 1024;
    ld.shared.v4.b32 {%r14, %r15, %r16, %r17}, [%r6];
    add.s32 %r13, %r13, %r17;
    st.global.v4.b32 [%rd7], {%r14, %r15, %r16, %r13};
"""
LENGTH = "setp.lt.u32 %p2, %r1, 32;\n mov.b32 %r5, 3;\n @%p2 mov.b32 %r5, 8;\n"


@schedules
def test_cp_async_copies_and_fills_with_zeros(schedule):
    x = numbers(64, 4)
    x[:, 0] += 0x01020304 << 3
    run = Run(LENGTH + COPY, x, 0 * x, schedule=schedule)
    wanted = x[np.arange(64) ^ 32].copy()
    wanted.view(np.uint8).reshape(64, 16)[:32, 3:8] = 0  # copied by the threads from 32 on
    assert np.array_equal(run.y, wanted)
    assert not run.core.findings


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: without(body, "wait_group 0"),
        lambda body: without(body, "wait_group 1"),
        lambda body: body.replace("wait_group 1", "wait_group 2"),
        lambda body: body.replace("wait_group 0", "wait_group 1"),
    ],
)
@schedules
def test_a_missing_wait_group_is_seen(edit, schedule):
    found = Run(LENGTH + edit(COPY), numbers(64, 4), numbers(64, 4), schedule=schedule).kinds
    assert {"race", "uninitialised"} <= found


@pytest.mark.parametrize("barrier", ["first", "second"])
@schedules
def test_waiting_is_not_enough_to_see_what_others_copied(barrier, schedule):
    run = Run(LENGTH + without(COPY, barrier), numbers(64, 4), numbers(64, 4), schedule=schedule)
    assert "race" in run.kinds


def test_wait_all_closes_the_last_group():
    body = "cp.async.cg.shared.global [%r3], [%rd6], 16;\n{}\n" + (
        "ld.shared.b32 %r4, [%r3];\n st.global.b32 [%rd7], %r4;"
    )
    run = Run(body.format("cp.async.wait_all;"), numbers(64, 4), numbers(64, 4))
    assert np.array_equal(run.y[:, 0], numbers(64, 4)[:, 0]) and not run.core.findings
    # wait_group waits for committed groups only; and the CTA ends with copies under way
    assert Run(body.format("cp.async.wait_group 0;"), numbers(64, 4), numbers(64, 4)).kinds == {
        "race",
        "uninitialised",
        "unfinished",
    }


@schedules
def test_each_thread_waits_for_itself(schedule):
    """The first 16 lanes of a warp wait, read, and then write; the others may not yet."""
    body = """
    and.b32 %r4, %r1, 16;
    setp.eq.u32 %p2, %r4, 0;
    cp.async.cg.shared.global [%r3], [%rd6], 16;
    cp.async.commit_group;
    @%p2 cp.async.wait_group 0;
    {} ld.shared.b32 %r4, [%r3];
    @%p2 st.shared.b32 [%r3 + 4], 7;
    cp.async.wait_all;
    ld.shared.b32 %r5, [%r3 + 4];
    st.global.v2.b32 [%rd7], {{%r4, %r5}};
    """
    x = numbers(64, 4)
    waited = np.arange(64) & 16 == 0
    run = Run(body.format("@%p2"), x, 0 * x, schedule=schedule)
    assert np.array_equal(run.y[:, 0], np.where(waited, x[:, 0], 16))
    assert np.array_equal(run.y[:, 1], np.where(waited, 7, x[:, 1]))
    assert not run.core.findings
    assert Run(body.format(""), x, 0 * x, schedule=schedule).kinds == {"race", "uninitialised"}


@schedules
def test_the_lanes_of_a_warp_do_not_see_each_others_copies(schedule):
    body = """
    cp.async.cg.shared.global [%r3], [%rd6], 16;
    cp.async.wait_all;
    {}
    xor.b32 %r4, %r3, 16;
    ld.shared.b32 %r4, [%r4];
    """
    x = numbers(64, 4)
    assert not Run(body.format("bar.warp.sync -1;"), x, x, schedule=schedule).core.findings
    assert Run(body.format(""), x, x, schedule=schedule).kinds == {"race"}


@schedules
def test_until_it_has_landed_a_copy_leaves_nans(schedule):
    """What was in shared memory before is not seen, although it has not been overwritten yet."""
    body = """
    st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};
    cp.async.cg.shared.global [%r3], [%rd6], 16;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd7], %r4;
    cp.async.wait_all;
    """
    run = Run(body, numbers(64, 4), numbers(64, 4), schedule=schedule)
    assert (run.y[:, 0] == -1).all() and run.kinds == {"race", "uninitialised"}


def test_cp_async_counts_what_it_reads_and_writes():
    counts = Run(LENGTH + COPY, numbers(64, 4), numbers(64, 4), counting=True).core.counts
    by_end = {inst_of(counts, i).rpartition("0x")[2]: found for i, found in counts.of.items()}
    read = {"requests": 2, "bytes": 1024, "sectors": 32, "sectors, ideal": 32}
    # A wavefront is what a quarter of a warp writes.
    assert by_end["10, 16"] == read | {"wavefronts": 8, "wavefronts, ideal": 8}
    # 4 bytes of every 16: four lanes meet in each bank. They do where nothing is read, too.
    assert by_end["4, 4"]["wavefronts"] == 8 and by_end["4, 4"]["wavefronts, ideal"] == 2
    assert by_end["4, 0"] == {"wavefronts": 8, "wavefronts, ideal": 2}
    # What it reads counts as global, what it writes as wavefronts alone.
    assert counts.total["global requests"] >= 6 and counts.total["shared requests"] == 4


def test_a_copy_over_what_others_still_read_is_a_race():
    body = """
    st.shared.b32 [%r3], %r1;
    bar.sync 0;
    xor.b32 %r4, %r3, 512;
    ld.shared.b32 %r5, [%r4];
    {}
    cp.async.cg.shared.global [%r3], [%rd6], 16, 16;
    cp.async.wait_all;
    """
    assert not Run(body.format("bar.sync 0;"), numbers(64, 4), numbers(64, 4)).core.findings
    assert Run(body.format(""), numbers(64, 4), numbers(64, 4)).kinds == {"race"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("cp.async.cg.shared.global [%r3 + 8], [%rd6], 16, 16;", "not aligned"),
        ("cp.async.cg.shared.global [%r3], [%rd6 + 4], 16, 16;", "not aligned"),
        ("cp.async.cg.shared.global [%r3], [%rd6 + 512], 16, 16;", "behind the end of array 0"),
        ("cp.async.cg.shared.global [%r3 + 4096], [%rd6], 16, 16;", "out of bounds"),
        ("cp.async.ca.shared.global [%r3], [%rd6], 4, 5;", "more bytes"),
    ],
)
def test_addresses_of_cp_async_are_checked(line, message):
    with pytest.raises(MachineFault, match=message):
        Run(line, numbers(64, 4), numbers(64, 4))


def test_a_masked_copy_reads_no_address():
    body = "cp.async.cg.shared.global [%r3], [%rd6 + 99999], 16, 0;\n cp.async.wait_all;"
    assert not Run(body, numbers(64, 4), numbers(64, 4)).core.findings
