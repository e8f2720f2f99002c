"""Copies that go on while the threads do: cp.async, TMA, mbarriers, and what can go wrong.

Each kernel here is written by hand. The right one gives the right values and no finding. Then a
line of it is left out or changed, and the machine has to say so.
"""

import numpy as np
import pytest

from tests.tools import ptx_programs
from tilelab.perf.machine.core import SCHEDULES
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.mbarriers import MBarrier, Misuse
from tilelab.perf.machine.races import Races
from tilelab.perf.machine.tensor_maps import TensorMap

MAP_X, MAP_Y = 1 << 20, 2 << 20  # addresses of tensor maps
# %r1 is the thread, %r2 where shared memory begins and %r3 the thread's 16 bytes of it; %rd1 and
# %rd2 are x and y, %rd6 and %rd7 the thread's 16 bytes of them; %rd3 and %rd4 are their maps.
BEGIN = f"""
    mov.b64 %rd2, %rd1;
    mov.b64 %rd1, %rd0;
    mov.b64 %rd3, {MAP_X};
    mov.b64 %rd4, {MAP_Y};
    mov.u32 %r1, %r0;
    mov.b32 %r2, global_smem;
    setp.eq.u32 %p1, %r1, 0;
    mul.wide.u32 %rd5, %r1, 16;
    add.s64 %rd6, %rd1, %rd5;
    add.s64 %rd7, %rd2, %rd5;
    shl.b32 %r3, %r1, 4;
    add.s32 %r3, %r3, %r2;
"""


class Run:
    """A kernel that was run: x and y as it leaves them, and what the machine found."""

    def __init__(self, body, x, y, box_x=None, box_y=None, threads=64, ctas=1, **options):
        self.x, self.y = x.copy(), y.copy()

        def maps(addresses):
            given = zip((MAP_X, MAP_Y), (box_x, box_y), addresses, (x, y), strict=True)
            return {place: map_of(at, tensor, *box) for place, box, at, tensor in given if box}

        self.core = ptx_programs.run(
            BEGIN + body, self.x, self.y, threads=threads, grid=(ctas,), shared=4096, maps=maps,
            **options,
        )  # fmt: skip

    @property
    def kinds(self):
        """What kinds of findings there are."""
        return set(ptx_programs.findings(self.core))


def map_of(address, tensor, box, swizzle=0, shape=None):
    """The map of a tensor; box and shape are outermost first, like the tensor's own."""
    shape = (shape or tensor.shape)[::-1]
    return TensorMap(address, shape, tensor.strides[-2::-1], box[::-1], tensor.itemsize, swizzle)


def numbers(*shape, dtype=np.int32):
    return np.arange(1, np.prod(shape) + 1, dtype=dtype).reshape(shape)


def without(body, text):
    """The kernel without the only line that has this text."""
    lines = body.splitlines()
    assert sum(text in line for line in lines) == 1, text
    return "\n".join(line for line in lines if text not in line)


schedules = pytest.mark.parametrize("schedule", SCHEDULES)


# --- cp.async -------------------------------------------------------------------------------------

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
    """The first 16 lanes of a warp wait and may read; the others may not."""
    body = """
    and.b32 %r4, %r1, 16;
    setp.eq.u32 %p2, %r4, 0;
    cp.async.cg.shared.global [%r3], [%rd6], 16;
    cp.async.commit_group;
    @%p2 cp.async.wait_group 0;
    {} ld.shared.b32 %r4, [%r3];
    @%p2 st.global.b32 [%rd7], %r4;
    cp.async.wait_all;
    """
    x = numbers(64, 4)
    run = Run(body.format("@%p2"), x, 0 * x, schedule=schedule)
    assert np.array_equal(run.y[:, 0], np.where(np.arange(64) & 16, 0, x[:, 0]))
    assert not run.core.findings
    assert Run(body.format(""), x, 0 * x, schedule=schedule).kinds == {"race", "uninitialised"}


def test_cp_async_counts_what_it_reads():
    counts = Run(LENGTH + COPY, numbers(64, 4), numbers(64, 4), counting=True).core.counts
    first = next(i for i, inst in counts.of.items() if inst_of(counts, i).endswith("0x10, 16"))
    assert counts.of[first] == {"requests": 2, "bytes": 1024, "sectors": 32, "sectors, ideal": 32}


def inst_of(counts, index):
    return counts.core.instructions[index].text


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


# --- mbarriers ------------------------------------------------------------------------------------


def test_an_mbarrier_counts_arrivals_and_bytes():
    """By hand: (what happens, pending arrivals, bytes announced - landed, phase)."""
    bar, merge = MBarrier(2), Races.merge
    at = np.zeros(1), np.zeros(1)
    for act, pending, tx, phase in [
        (lambda: bar.expect(100), 2, 100, 0),
        (lambda: bar.arrive(1, at, merge), 1, 100, 0),
        (lambda: bar.land(60, merge), 1, 40, 0),
        (lambda: bar.land(40, merge), 1, 0, 0),  # all bytes, but not all arrivals
        (lambda: bar.arrive(1, at, merge), 2, 0, 1),
        (lambda: setattr(bar, "observed", True), 2, 0, 1),  # somebody waits
        (lambda: bar.land(30, merge), 2, -30, 1),  # bytes may come before they are announced
        (lambda: bar.arrive(2, at, merge), 0, -30, 1),
        (lambda: bar.expect(50), 0, 20, 1),
        (lambda: bar.land(20, merge), 2, 0, 2),
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


WAIT = """
    {{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2 + {at}], {parity};
    @!complete bra.uni waitLoop;
    }}
"""
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
    leaders = set()
    for seed in range(8):
        y = Run(body, numbers(64, 4), numbers(64, 4), seed=seed).y
        leaders.add(int(y[0, 0]))
        assert (y[:, 0] == y[0, 0]).all() and (y[:, 1] == y[:, 0]).all()
        assert np.array_equal(y[:, 2], np.where(np.arange(64) % 32 == y[0, 0], 3, 0))
    assert len(leaders) > 1  # by seed, since PTX does not say which lane it is
    with pytest.raises(MachineFault, match="without all of the lanes"):
        Run("@%p1 elect.sync %r4|%p2, -1;", numbers(64, 4), numbers(64, 4))


# --- TMA ------------------------------------------------------------------------------------------

LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
# Two boxes of 8 rows of 16 numbers are loaded, one above the other; each thread adds its number to
# four of theirs, and all 16 rows are stored. Shared memory: 1024 bytes loaded, 1024 to store, and
# an mbarrier. The kernel's last act is to use the second part again.
TMA = f"""
    elect.sync %r4|%p2, -1;
    setp.lt.u32 %p3, %r1, 32;
    and.pred %p2, %p2, %p3;
    @%p1 mbarrier.init.shared::cta.b64 [%r2 + 2048], 1;
    bar.sync 0; // after init
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2 + 2048], 1024;
    mov.b32 %r8, 0;
    mov.b32 %r9, 0;
    mov.b32 %r10, 8;
    add.s32 %r11, %r2, 512;
    @%p2 {LOAD} [%r2], [%rd3, {{%r8, %r9}}], [%r2 + 2048];
    @%p2 {LOAD} [%r11], [%rd3, {{%r8, %r10}}], [%r2 + 2048];
    {WAIT.format(at=2048, parity=0)} // wait
    ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r3];
    add.s32 %r14, %r14, %r1;
    add.s32 %r15, %r15, %r1;
    add.s32 %r16, %r16, %r1;
    add.s32 %r17, %r17, %r1;
    st.shared.v4.b32 [%r3 + 1024], {{%r14, %r15, %r16, %r17}};
    fence.proxy.async.shared::cta;
    bar.sync 0; // before store
    add.s32 %r12, %r2, 1024;
    @%p2 {STORE} [%rd4, {{%r8, %r9}}], [%r12];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.sync 0; // before reuse
    st.shared.b32 [%r3 + 1024], %r1;
    @%p1 mbarrier.inval.shared::cta.b64 [%r2 + 2048];
"""
BOXES = {"box_x": ((8, 16),), "box_y": ((16, 16),)}


def run_tma(body=TMA, shape=(16, 16), **options):
    return Run(body, numbers(*shape), np.full(shape, -1, np.int32), **BOXES | options)


@schedules
@pytest.mark.parametrize("shape", [(16, 16), (13, 20), (24, 12), (3, 4)])
def test_tma_loads_and_stores_what_exists(schedule, shape):
    run = run_tma(schedule=schedule, shape=shape)
    box = np.zeros((16, 16), np.int32)
    rows, columns = min(16, shape[0]), min(16, shape[1])
    box[:rows, :columns] = run.x[:rows, :columns]
    box += np.arange(64).repeat(4).reshape(16, 16)
    wanted = np.full(shape, -1)
    wanted[:rows, :columns] = box[:rows, :columns]
    assert np.array_equal(run.y, wanted)
    assert not run.core.findings


def test_tma_counts_the_bytes_that_exist():
    run = run_tma(shape=(13, 8), counting=True)
    counted = {inst_of(run.core.counts, i): c for i, c in run.core.counts.of.items()}
    moved = [c["TMA bytes"] for text, c in counted.items() if "bulk.tensor" in text]
    assert moved == [8 * 8 * 4, 5 * 8 * 4, 13 * 8 * 4]
    waits = next(c["waits"] for text, c in counted.items() if "try_wait" in text)
    assert waits == 64  # all threads, once


@schedules
def test_a_box_may_begin_before_the_tensor(schedule):
    """A box at row -3, column 5: three rows of zeros, and columns that are not aligned."""
    body = TMA.replace("%r8, 0", "%r8, 5").replace("%r9, 0", "%r9, -3").replace("r10, 8", "r10, 5")
    run = run_tma(body, (16, 24), schedule=schedule)
    wanted = run.x[:13, 5:21] + np.arange(12, 64).repeat(4).reshape(13, 16)
    assert np.array_equal(run.y[:13, 5:21], wanted)
    assert (np.delete(run.y[:13], range(5, 21), 1) == -1).all() and (run.y[13:] == -1).all()
    assert not run.core.findings


@pytest.mark.parametrize("swizzle, line", [(32, 2), (64, 4), (128, 8)])
def test_tma_swizzles_by_absolute_addresses(swizzle, line):
    """Loaded with a swizzle and stored without: the chunks are where the address' bits say."""
    rows, row = 512 // swizzle, swizzle // 4
    x = numbers(2 * rows, row)
    run = Run(TMA, x, 0 * x, box_x=((rows, row), swizzle), box_y=((2 * rows, row),))
    # With 64 or 128 bytes, the second box begins within a pattern of 8 lines: at line 4.
    given = TMA.replace("%r10, 8", f"%r10, {rows}")
    run = Run(given, x, 0 * x, box_x=((rows, row), swizzle), box_y=((2 * rows, row),))
    chunks = (run.y - np.arange(64).repeat(4).reshape(run.y.shape)).reshape(-1, 4)
    for place, chunk in enumerate(chunks):
        source = place ^ place // 8 % line % (swizzle // 16)
        assert np.array_equal(chunk, x.reshape(-1, 4)[source])


@pytest.mark.parametrize("schedule", ["random", "late"])
def test_what_is_swizzled_is_stored_unswizzled(schedule):
    """A store with the swizzle of the load puts everything back."""
    body = TMA.replace("[%r3 + 1024]", "[%r3 + 1024]", 1).replace("add.s32 %r14, %r14, %r1;", "")
    for register in (15, 16, 17):
        body = body.replace(f"add.s32 %r{register}, %r{register}, %r1;", "")
    run = run_tma(body, box_x=((8, 16), 64), box_y=((16, 16), 64), schedule=schedule)
    assert np.array_equal(run.y, run.x) and not run.core.findings


FAULTS = [
    ("after init", {"race"}),
    (f"{LOAD} [%r11]", "512 of 1024 bytes are missing"),
    ("arrive.expect_tx", "1 of 1 arrivals are missing and 1024 bytes more landed"),
    ("fence.proxy.async", {"missing fence"}),
    ("before store", {"race"}),
    ("wait_group.read", {"race", "unfinished"}),
    ("before reuse", {"race"}),
    ("commit_group", {"race", "unfinished"}),
]


@pytest.mark.parametrize("line, found", FAULTS, ids=[line for line, _ in FAULTS])
@schedules
def test_a_missing_line_is_found(line, found, schedule):
    body = without(TMA, line)
    if isinstance(found, str):
        with pytest.raises(MachineFault, match=found):
            run_tma(body, schedule=schedule)
        return
    try:
        assert found <= run_tma(body, schedule=schedule).kinds
    except MachineFault as fault:
        assert line == "after init" and "never initialised" in str(fault)


CHANGES = [
    (WAIT.format(at=2048, parity=0), "", {"race", "uninitialised", "unfinished"}),
    ("2048], 1024;", "2048], 2048;", "1024 of 2048 bytes are missing"),
    ("2048], 1024;", "2048], 768;", "256 bytes more landed than were announced"),
    ("2048], 1024;", "2048], 512;", {"race"}),
    ("2048], 1;", "2048], 2;", "1 of 2 arrivals"),
    ("add.s32 %r11, %r2, 512;", "add.s32 %r11, %r2, 576;", "no multiple of 128"),
    ("add.s32 %r11, %r2, 512;", "add.s32 %r11, %r2, 256;", {"race"}),
    ("add.s32 %r11, %r2, 512;", "add.s32 %r11, %r2, 4096;", "out of bounds: shared"),
]


@pytest.mark.parametrize("old, new, found", CHANGES)
@schedules
def test_a_changed_line_is_found(old, new, found, schedule):
    assert TMA.count(old) == 1
    if isinstance(found, str):
        with pytest.raises(MachineFault, match=found):
            run_tma(TMA.replace(old, new), schedule=schedule)
    else:
        kinds = set()
        try:
            kinds = run_tma(TMA.replace(old, new), schedule=schedule).kinds
        except MachineFault as fault:  # inval, with the copies still under way
            assert "on its way" in str(fault)
            return
        assert found <= kinds


def test_a_map_of_more_than_the_tensor_is_out_of_bounds():
    body = TMA.replace("%r10, 8", "%r10, 16")
    assert not run_tma(body).core.findings  # rows 16 to 23 do not exist
    with pytest.raises(MachineFault, match="0 bytes behind the end of array 0"):
        run_tma(body, box_x=((8, 16), 0, (17, 16)))


# --- maps that a kernel makes ---------------------------------------------------------------------

FIELD = "tensormap.replace.tile.{}.shared::cta.b1024.{} [%rd10], {};"
SHARED_MAP = 3072
MAKE = f"""
    setp.lt.u32 %p4, %r1, 32;
    shl.b32 %r18, %r1, 2;
    add.s32 %r18, %r18, %r2;
    mov.b32 %r19, 0;
    @%p4 st.shared.b32 [%r18 + {SHARED_MAP}], %r19;
    bar.warp.sync -1; // zeros
    add.s32 %r19, %r2, {SHARED_MAP};
    cvt.u64.u32 %rd10, %r19;
    mov.b64 %rd11, 64;
    mov.b32 %r20, 16;
    mov.b32 %r21, 1;
    @%p1 {FIELD.format("global_address", "b64", "%rd1")}
    @%p1 {FIELD.format("rank", "b32", "0x1")}
    @%p1 {FIELD.format("box_dim", "b32", "0x0, %r20")}
    @%p1 {FIELD.format("box_dim", "b32", "0x1, 8")}
    @%p1 {FIELD.format("global_dim", "b32", "0x0, %r20")}
    @%p1 {FIELD.format("global_dim", "b32", "0x1, 16")}
    @%p1 {FIELD.format("global_stride", "b64", "0x0, %rd11")}
    @%p1 {FIELD.format("element_stride", "b32", "0x0, %r21")}
    @%p1 {FIELD.format("element_stride", "b32", "0x1, %r21")}
    @%p1 {FIELD.format("elemtype", "b32", "0x3")}
    @%p1 {FIELD.format("swizzle_mode", "b32", "0x0")}
    bar.warp.sync -1; // made
    add.s64 %rd3, %rd2, 1024;
    @%p4 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd3], [%rd10], 0x80;
    @%p4 fence.proxy.tensormap::generic.acquire.gpu [%rd3], 0x80;
    bar.sync 0; // published
"""  # noqa: E501


def run_made(body, **options):
    """y has 8 rows more, for the map."""
    x, y = numbers(16, 16), np.full((24, 16), -1, np.int32)
    return Run(body + TMA, x, y, box_y=((16, 16), 0, (16, 16)), **options)


@schedules
def test_a_kernel_makes_its_own_map(schedule):
    run = run_made(MAKE, schedule=schedule)
    assert np.array_equal(run.y[:16], run.x + np.arange(64).repeat(4).reshape(16, 16))
    assert not run.core.findings


@pytest.mark.parametrize(
    "line, found",
    [
        ("zeros", {"race"}),
        ("fence.proxy.tensormap", {"missing fence"}),
        ("cp_fenceproxy", "no tensor map at 0x"),
        ("element_stride.shared::cta.b1024.b32 [%rd10], 0x1", "element_stride"),
        ("global_stride", None),
        ("elemtype", "rows of 16 bytes"),
        ("global_dim.shared::cta.b1024.b32 [%rd10], 0x1", "1 to 2"),
    ],
)
def test_a_map_that_is_not_finished_is_found(line, found):
    if found is None:  # all rows are the first: allowed, and wrong
        run = run_made(without(MAKE, line))
        assert np.array_equal(run.y[:16] - run.y[0], np.arange(16)[:, None] * 4 + 0 * run.x)
    elif isinstance(found, set):
        assert found <= run_made(without(MAKE, line), schedule="random").kinds
    elif line == "elemtype":  # then it is u8, and the box has a quarter of its bytes
        with pytest.raises(MachineFault, match="bytes are missing"):
            run_made(without(MAKE, line))
    else:
        with pytest.raises(MachineFault, match=found):
            run_made(without(MAKE, line))


@pytest.mark.parametrize(
    "line, message",
    [
        (LOAD.replace("global", "global.im2col") + " [%r2], [%rd3, {%r8, %r9}], [%r2]", "im2col"),
        (LOAD + ".multicast::cluster [%r2], [%rd3, {%r8, %r9}], [%r2], %r1", "multicast"),
        (LOAD + ".cta_group::2 [%r2], [%rd3, {%r8, %r9}], [%r2]", "pair of CTAs"),
        (LOAD + " [%r2], [%rd3, {%r8}], [%r2]", "2 coordinates"),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group "
         "[%rd3, {%r8, %r9}], [%r2]", "only bulk copies of tensors"),
        ("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 16, [%r2]",
         "only bulk copies of tensors"),
        ("cp.async.mbarrier.arrive.shared.b64 [%r2]", "this copy"),
        ("mapa.shared::cluster.u32 %r4, %r2, 1", "clusters"),
        ("griddepcontrol.wait", "dependent launch"),
        ("mbarrier.arrive.shared::cluster.b64 _, [%r2]", "form of mbarrier"),
        ("mbarrier.arrive.shared::cta.b64 %rd8, [%r2]", "state"),
        ("mbarrier.try_wait.shared::cta.b64 %p2, [%r2], %rd8", "by parity"),
        ("fence.proxy.alias", "this fence"),
        ("cp.async.ca.shared.global [%r3], [%rd6], 4, %p1", "ignore-src"),
    ],
)  # fmt: skip
def test_what_the_machine_does_not_know_is_refused(line, message):
    with pytest.raises(UnknownInstruction, match=message):
        run_tma(f"{line};")
