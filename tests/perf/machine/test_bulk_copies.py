"""Copies of the TMA: what they move, which faults are found, and maps that kernels make."""

import numpy as np
import pytest

from tests.tools.ptx_copies import WAIT, Run, inst_of, numbers, schedules, without
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction

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
    return Run(body, numbers(*shape), np.full(shape, -2, np.int32), **BOXES | options)


@schedules
@pytest.mark.parametrize("shape", [(16, 16), (13, 20), (24, 12), (3, 4)])
def test_tma_loads_and_stores_what_exists(schedule, shape):
    run = run_tma(schedule=schedule, shape=shape)
    box = np.zeros((16, 16), np.int32)
    rows, columns = min(16, shape[0]), min(16, shape[1])
    box[:rows, :columns] = run.x[:rows, :columns]
    box += np.arange(64).repeat(4).reshape(16, 16)
    wanted = np.full(shape, -2)
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
    assert (np.delete(run.y[:13], range(5, 21), 1) == -2).all() and (run.y[13:] == -2).all()
    assert not run.core.findings


@pytest.mark.parametrize("swizzle, line", [(32, 2), (64, 4), (128, 8)])
def test_tma_swizzles_by_absolute_addresses(swizzle, line):
    """Loaded with a swizzle and stored without: the chunks are where the address' bits say."""
    rows, row = 512 // swizzle, swizzle // 4
    x = numbers(2 * rows, row)
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
    body = TMA
    for register in (14, 15, 16, 17):
        body = without(body, f"add.s32 %r{register}, %r{register}, %r1;")
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


OLD = "st.shared.b32 [%r3], %r1;"
FENCE = "fence.proxy.async.shared::cta;"
TOUCHED = {"written": OLD, "read": f"{OLD} {FENCE} bar.sync 0; ld.shared.b32 %r14, [%r3];"}


@schedules
@pytest.mark.parametrize("how", TOUCHED)
def test_a_load_over_what_threads_touched_needs_a_fence(how, schedule):
    """PTX orders nothing between the two proxies, reads before a write included."""
    for fence, found in (("", {"missing fence"}), (FENCE, set())):
        barrier = "bar.sync 0; // after init"
        run = run_tma(TMA.replace(barrier, f"{TOUCHED[how]} {fence} {barrier}"), schedule=schedule)
        assert run.kinds == found
        words = " ".join(message for _, message, *_ in run.core.findings)
        assert not found or f"writes through the async proxy what was {how}" in words


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
        try:
            assert found <= run_tma(TMA.replace(old, new), schedule=schedule).kinds
        except MachineFault as fault:  # inval, with the copies still under way
            assert "on its way" in str(fault)


def test_until_it_has_landed_a_load_leaves_nans():
    """What was in shared memory before is not seen, although it has not been overwritten yet."""
    body, _, _ = TMA.partition(WAIT.format(at=2048, parity=0))
    body = body.replace("bar.sync 0; // after init", "st.shared.b32 [%r3], %r1;\n bar.sync 0;")
    body += "ld.shared.b32 %r20, [%r3];\n st.global.b32 [%rd7], %r20;\n"
    run = run_tma(body + WAIT.format(at=2048, parity=0))
    assert (run.y[:, ::4] == -1).all() and {"race", "uninitialised"} <= run.kinds


@schedules
@pytest.mark.parametrize("reader", ["%p2", "%p5"])
def test_global_memory_is_written_at_the_second_wait(schedule, reader):
    """The thread that stores, or another one, looks: after wait_group.read and after wait_group."""
    look = f"""
    bar.sync 0; // before reuse
    setp.eq.u32 %p5, %r1, 40;
    @{reader} ld.global.b32 %r20, [%rd2];
    @{reader} st.global.b32 [%rd1], %r20;
    """
    body = TMA.replace("bar.sync 0; // before reuse", look)
    run = run_tma(body, schedule=schedule)
    assert run.x[0, 0] == -2 and (reader == "%p2" or run.kinds == {"race"})
    run = run_tma(body.replace("wait_group.read", "wait_group"), schedule=schedule)
    assert run.x[0, 0] == run.y[0, 0] == 1 and not run.core.findings


def test_inval_must_be_ordered_behind_the_copies():
    """A thread that has not waited does not know that the copies at an mbarrier have landed."""
    body = f"""
    @%p1 mbarrier.init.shared::cta.b64 [%r2 + 2048], 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2 + 2048], 512;
    mov.b32 %r8, 0;
    @%p1 {LOAD} [%r2], [%rd3, {{%r8, %r8}}], [%r2 + 2048];
    $again:
    add.s32 %r8, %r8, 1;
    setp.lt.s32 %p4, %r8, 40;
    @%p4 bra $again;
    @%p1 mbarrier.inval.shared::cta.b64 [%r2 + 2048];
    """
    found = set()
    for seed in range(4):
        try:
            kinds = run_tma(body, threads=32, schedule="random", seed=seed).kinds
            assert kinds == {"race"}  # it had landed
            found |= kinds
        except MachineFault as fault:
            assert "on its way" in str(fault)
            found.add("fault")
    assert "race" in found


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
        ("elemtype", "bytes are missing"),  # then it is u8: a quarter of the bytes
        ("global_dim.shared::cta.b1024.b32 [%rd10], 0x1", "1 to 2"),
    ],
)
def test_a_map_that_is_not_finished_is_found(line, found):
    body = without(MAKE, line)
    if isinstance(found, set):
        assert found <= run_made(body, schedule="random").kinds
    else:
        with pytest.raises(MachineFault, match=found):
            run_made(body)


def test_a_fence_is_for_the_map_at_its_address_alone():
    publish, fence = (x for x in MAKE.splitlines() if "cp_fenceproxy" in x or ".acquire" in x)
    other = "\n".join(["add.s64 %rd11, %rd3, 128;", *(x.replace("%rd3", "%rd11")
                      for x in (publish, fence))])  # fmt: skip
    assert not run_made(MAKE.replace(fence, f"{other}\n{fence}")).core.findings
    assert run_made(MAKE.replace(fence, other)).kinds == {"missing fence"}


def test_a_warp_publishes_what_one_of_its_lanes_has_made():
    assert not run_made(without(MAKE, "made"), schedule="random").core.findings


def test_the_next_map_must_not_be_begun_before_this_one_is_published():
    line = "bar.sync 0; // published"
    again = f"@%p4 st.shared.b32 [%r18 + {SHARED_MAP}], %r1;\n"
    assert run_made(MAKE.replace(line, again + line)).kinds == {"race"}
    assert not run_made(MAKE.replace(line, "bar.warp.sync -1;\n" + again + line)).core.findings


def test_a_map_whose_stride_is_0_has_one_row_many_times():
    y = run_made(without(MAKE, "global_stride")).y[:16]
    assert np.array_equal(y - y[0], np.arange(16)[:, None] * 4 + np.zeros((1, 16)))


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
