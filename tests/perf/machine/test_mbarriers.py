"""mbarriers by hand and in small programs, their misuse, and elect.sync."""

import itertools

import numpy as np
import pytest

from tests.tools.ptx_copies import WAIT, Run, numbers, schedules, without
from tilelab.perf.machine.copies.mbarriers import MBarrier, Misuse
from tilelab.perf.machine.errors import MachineFault
from tilelab.perf.machine.races import Races


def test_an_mbarrier_counts_arrivals_and_bytes():
    """By hand: (what happens, pending arrivals, bytes announced - landed, phase)."""
    bar, merge = MBarrier(2), Races.merge
    at = np.zeros(1), np.zeros(1)
    for act, pending, tx, phase in [
        (lambda: bar.expect(100), 2, 100, 0),
        (lambda: bar.arrive(1, at, merge), 1, 100, 0),
        (lambda: bar.land(60), 1, 40, 0),
        (lambda: bar.land(40), 1, 0, 0),  # all bytes, but not all arrivals
        (lambda: bar.arrive(1, at, merge), 2, 0, 1),
        (lambda: setattr(bar, "observed", True), 2, 0, 1),  # somebody waits
        (lambda: bar.land(30), 2, -30, 1),  # bytes may come before they are announced
        (lambda: bar.arrive(2, at, merge), 0, -30, 1),
        (lambda: bar.expect(50), 0, 20, 1),
        (lambda: bar.land(20), 2, 0, 2),
    ]:
        act()
        assert (bar.pending, bar.expected - bar.landed, bar.phase) == (pending, tx, phase)
        # parity of the phase before the current one: passes; of the current one: waits
        assert bool(bar.passes(1 - phase % 2)) and not bool(bar.passes(phase % 2))
    with pytest.raises(Misuse, match="nobody has waited"):
        bar.arrive(1, at, merge)
    bar.observed = True
    with pytest.raises(Misuse, match="3 arrivals at an mbarrier that waits for 2"):
        bar.arrive(3, at, merge)
    with pytest.raises(Misuse, match="may differ by 1048575"):
        bar.expect(2**20)
    for count in (0, 2**20):
        with pytest.raises(Misuse, match="1 to 1048575"):
            MBarrier(count)


# The first warp writes, arrives at one mbarrier and waits at another; the second warp the other
# way round; twice, so that parities are used. At the end each thread has the other warp's number.
PING_PONG = f"""
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
    @%p1 mbarrier.init.shared::cta.b64 [%r2 + 8], 32;
    bar.sync 0; // after init
    setp.lt.u32 %p2, %r1, 32;
    add.s32 %r3, %r3, 64;
    xor.b32 %r4, %r1, 32;
    shl.b32 %r4, %r4, 4;
    add.s32 %r4, %r4, 64;
    @!%p2 bra second;
    st.shared.b32 [%r3], %r1; // of the first
    mbarrier.arrive.shared::cta.b64 _, [%r2];
    {WAIT.format(at=8, parity=0)}
    ld.shared.b32 %r5, [%r4]; // by the first
    mbarrier.arrive.shared::cta.b64 _, [%r2];
    {WAIT.format(at=8, parity=-1)}
    bra end;
    second:
    {WAIT.format(at=0, parity=0)}
    ld.shared.b32 %r5, [%r4]; // by the second
    st.shared.b32 [%r3], %r1; // of the second
    mbarrier.arrive.shared::cta.b64 _, [%r2 + 8];
    {WAIT.format(at=0, parity=1)}
    mbarrier.arrive.shared::cta.b64 _, [%r2 + 8];
    end:
    st.global.b32 [%rd7], %r5;
    bar.sync 0; // before inval
    @%p1 mbarrier.inval.shared::cta.b64 [%r2];
    @%p1 mbarrier.inval.shared::cta.b64 [%r2 + 8];
"""


@schedules
@pytest.mark.parametrize("ctas", [1, 3])
def test_threads_wait_for_each_other_at_mbarriers(schedule, ctas):
    run = Run(PING_PONG, numbers(64, 4), numbers(64, 4), schedule=schedule, ctas=ctas)
    assert np.array_equal(run.y[:, 0], np.arange(64) ^ 32)
    assert {kind for kind, *_ in run.core.findings} <= ({"race"} if ctas > 1 else set())


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: without(body, "after init"),
        lambda body: without(body, "before inval"),
        lambda body: body.replace(WAIT.format(at=8, parity=0), ""),
    ],
)
@schedules
def test_what_an_mbarrier_does_not_order_is_found(edit, schedule):
    """An init before the waits, an inval behind them, and data that was not waited for."""
    try:
        found = Run(edit(PING_PONG), numbers(64, 4), numbers(64, 4), schedule=schedule).kinds
        assert found & {"race", "uninitialised"}
    except MachineFault as fault:
        assert "mbarrier" in str(fault)


@pytest.mark.parametrize(
    "body, message",
    [
        ("mbarrier.arrive.shared::cta.b64 _, [%r2];", "never initialised"),
        (WAIT.format(at=0, parity=0), "never initialised"),
        ("@%p1 mbarrier.inval.shared::cta.b64 [%r2];", "never initialised"),
        ("mbarrier.init.shared::cta.b64 [%r2], 1;", "init by 64 threads"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r2], 0;", "0 arrivals"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r2 + 4], 1;", "not aligned"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r2 + 4096], 1;", "out of bounds"),
    ],
)
def test_an_mbarrier_has_to_be_there(body, message):
    with pytest.raises(MachineFault, match=message):
        Run(body, numbers(64, 4), numbers(64, 4))


INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;\n bar.sync 0;\n"
ARRIVE = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];\n"


@pytest.mark.parametrize(
    "body, message",
    [
        (INIT + ARRIVE + INIT, "in use"),
        (INIT + "mbarrier.arrive.shared::cta.b64 _, [%r2];", "64 arrivals .* waits for 1 more"),
        (INIT + ARRIVE + ARRIVE, "nobody has waited"),
        (INIT + "@%p1 mbarrier.expect_tx.shared::cta.b64 [%r2], 1048576;", "may differ"),
        (INIT + "@%p1 st.shared.b32 [%r2 + 4], 7;\n" + ARRIVE, "overwritten"),
        (INIT + ARRIVE + WAIT.format(at=0, parity=0) + "bar.sync 0;\n"
         "@%p1 mbarrier.inval.shared::cta.b64 [%r2];\n" + ARRIVE, "invalidated"),
    ],
)  # fmt: skip
def test_an_mbarrier_is_not_misused(body, message):
    with pytest.raises(MachineFault, match=message):
        Run(body, numbers(64, 4), numbers(64, 4))


@pytest.mark.parametrize("parity, passes", [(0, True), (-2, True), (1, False), (-1, False)])
def test_only_the_lowest_bit_of_a_parity_counts(parity, passes):
    body = INIT + ARRIVE + WAIT.format(at=0, parity=parity)
    if passes:
        assert not Run(body, numbers(64, 4), numbers(64, 4)).core.findings
    else:
        with pytest.raises(MachineFault, match="deadlock"):
            Run(body, numbers(64, 4), numbers(64, 4))


def test_an_mbarrier_that_nobody_used_may_be_made_again():
    body = INIT + INIT.replace("], 1", "], 2") + ARRIVE
    assert not Run(body, numbers(64, 4), numbers(64, 4)).core.findings


def test_a_deadlock_says_what_is_missing():
    with pytest.raises(MachineFault) as caught:
        Run(INIT.replace("], 1", "], 3") + ARRIVE + WAIT.format(at=0, parity=0), numbers(64, 4),
            numbers(64, 4))  # fmt: skip
    assert "warps 0, 1 spin" in str(caught.value)
    assert "address 0x0 is in phase 0, 2 of 3 arrivals are missing" in str(caught.value)


# --- elect.sync -----------------------------------------------------------------------------------


def test_elect_chooses_one_lane_of_each_warp_and_always_the_same():
    body = """
    elect.sync %r4|%p2, -1;
    elect.sync %r5|%p3, 0xffffffff;
    mov.b32 %r6, 0;
    @%p2 add.s32 %r6, %r6, 1;
    @%p3 add.s32 %r6, %r6, 2;
    st.global.v4.b32 [%rd7], {%r4, %r5, %r6, %r1};
    """
    leaders = {"lockstep": set(), "late": set(), "random": set()}
    for schedule, seed in itertools.product(leaders, range(4)):
        y = Run(body, numbers(64, 4), numbers(64, 4), schedule=schedule, seed=seed).y
        leaders[schedule].add(int(y[0, 0]))
        assert (y[:, 0] == y[0, 0]).all() and (y[:, 1] == y[:, 0]).all()
        assert np.array_equal(y[:, 2], np.where(np.arange(64) % 32 == y[0, 0], 3, 0))
    # PTX does not say which lane it is: it may be the first, the last, or any other
    assert leaders["lockstep"] == {0} and leaders["late"] == {31} and len(leaders["random"]) > 1
    with pytest.raises(MachineFault, match="without all of the lanes"):
        Run("@%p1 elect.sync %r4|%p2, -1;", numbers(64, 4), numbers(64, 4))
