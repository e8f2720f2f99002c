"""The model of a tile's time, against numbers worked out by hand."""

import math

import pytest

from tilelab.perf.compiler.prediction import LAUNCH_S, padding, predict, refused
from tilelab.perf.work.gpus import GPUS

H200 = GPUS["h200"]


def product(**changes):
    """A 4096 cubed matmul in bf16 with 128x256x64 tiles: 512 programs."""
    row = dict(
        op="matmul", mode="fwd", dtype="bfloat16", precision="ieee",
        shape=dict(M=4096, N=4096, K=4096), sizes=dict(M=4096, N=4096, K=4096),
        tile=dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
        flops=2 * 4096**3, bytes=3 * 4096**2 * 2, moved=3 * 4096**2 * 2, launches=1,
        programs=32 * 16, threads=256, registers=200, shared=147456, spills=0,
        tensor_core="HGMMA.64x256x16.F32.BF16", loop_instructions=92,
    )  # fmt: skip
    return row | changes


def test_a_large_product_waits_for_the_tensor_cores():
    row = predict(product(), H200)
    # 512 programs, one an SM (200 registers x 256 threads): so the busiest SM has four
    assert row["blocks_per_sm"] == 1 and row["limit"] == "registers"
    assert row["waves"] == pytest.approx(512 / 132)
    assert row["wave_efficiency"] == pytest.approx(512 / 528)
    assert row["bound"] == "compute"
    seconds = 2 * 4096**3 / (989.4e12 * 512 / 528) + LAUNCH_S
    assert row["predicted_s"] == pytest.approx(seconds, rel=1e-3)
    assert row["predicted_tflops"] == pytest.approx(2 * 4096**3 / seconds / 1e12, rel=1e-3)


def test_small_tiles_wait_for_l2():
    tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)
    row = predict(product(tile=tile, programs=4096, threads=128, registers=90, shared=49152), H200)
    assert row["bound"] == "l2"
    read = 4096 * 64 * (64 + 64) * 64 * 2 / row["wave_efficiency"]  # programs x steps x bytes
    assert row["predicted_s"] == pytest.approx(read / (48 * 132 * 1.83e9) + LAUNCH_S, rel=1e-3)


def test_a_long_loop_waits_for_its_instructions():
    row = predict(product(loop_instructions=800), H200)
    steps = 512 * 64 / row["wave_efficiency"]
    assert row["bound"] == "issue"
    assert row["predicted_s"] == pytest.approx(
        steps * 800 * 8 / (4 * 132 * 1.83e9) + LAUNCH_S, rel=1e-3
    )


def test_without_tensor_cores_the_peak_is_that_of_fma():
    with_them, without = predict(product(), H200), predict(product(tensor_core=None), H200)
    assert without["predicted_s"] / with_them["predicted_s"] == pytest.approx(
        989.4 / 66.9, rel=0.03
    )


def test_memory_bound():
    n = 2**28
    row = dict(
        op="bias_relu", mode="fwd", dtype="bfloat16", precision="ieee", shape={}, launches=1,
        sizes=dict(M=n // 64, N=64), tile=dict(BLOCK_M=32, BLOCK_N=64, num_warps=4),
        flops=2 * n, bytes=4 * n, moved=4 * n, programs=n // 2048, threads=128, registers=32,
        shared=0, spills=0,
    )  # fmt: skip
    row = predict(row, H200)
    assert row["bound"] == "memory"
    assert row["predicted_s"] == pytest.approx(4 * n / 4.8e12 + LAUNCH_S)
    assert row["predicted_gbps"] == pytest.approx(4800, rel=0.02)


def test_a_depthwise_convolution_may_wait_for_its_instructions():
    """A step of a program is 64 pixels x 64 channels; what comes before the steps counts, too."""
    n = 4096 * 64 * 64
    row = dict(
        op="conv2d", mode="fwd", dtype="bfloat16", precision="ieee", shape={}, launches=1,
        sizes=dict(M=n // 64, N=64), flops=18 * n, bytes=4 * n, moved=4 * n, programs=528,
        tile=dict(BLOCK_M=64, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
        threads=128, registers=180, shared=0, spills=0, instructions=1200, loop_instructions=700,
    )  # fmt: skip
    assert predict(row, H200)["bound"] == "memory"
    many = predict(row | dict(instructions=4500, loop_instructions=4000), H200)
    assert many["bound"] == "issue"
    issued = 4 * (4096 * 4000 + 528 * 500)
    assert many["predicted_s"] == pytest.approx(issued / (4 * 132 * 1.83e9) + LAUNCH_S, rel=1e-3)


def test_what_is_updated_in_place_is_moved_twice():
    """`moved` counts a tensor once; an AdamW step reads p, grad, m, v and writes p, m, v."""
    n = 2**28
    row = dict(
        op="adamw", mode="step", dtype="float32", precision="ieee", launches=1, shape={},
        sizes=dict(M=n), tile=dict(BLOCK_M=1024, num_warps=4), flops=14 * n, bytes=28 * n,
        moved=16 * n, programs=n // 1024, threads=128, registers=32, shared=0, spills=0,
    )  # fmt: skip
    assert predict(row, H200)["predicted_s"] == pytest.approx(28 * n / 4.8e12 + LAUNCH_S)


FAST = dict(
    kernel="tma", BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, SUBTILES=1, SPLIT_K=1,
    PROGRAMS_PER_SM=1, num_warps=8, num_stages=3,
)  # fmt: skip


def test_the_tiles_that_persistent_programs_go_through():
    """512 tiles for 132 programs: the busiest has four of them, as with 512 programs of one each.

    Split in two, the 1,024 parts are eight for the busiest: no more idle time, half as much work.
    """
    sizes = dict(M=4096, N=4096, K=4096)
    for tile, programs in ((FAST, 132), (FAST | dict(PROGRAMS_PER_SM=0), 512)):
        row = predict(product(tile=tile, sizes=sizes, programs=programs), H200)
        assert row["wave_efficiency"] == 512 / (132 * 4)
    split = predict(product(tile=FAST | dict(SPLIT_K=2), sizes=sizes, programs=132), H200)
    assert split["wave_efficiency"] == 1024 / (132 * 8)


def test_two_groups_of_warps_run_the_loop_of_a_warp_specialised_kernel():
    loop = 2000  # so long that it is what the time goes by
    tile = FAST | dict(num_warps=4)
    plain = predict(product(tile=tile, loop_instructions=loop), H200)
    special = predict(product(tile=tile | dict(kernel="tma_ws"), loop_instructions=loop), H200)
    assert plain["bound"] == special["bound"] == "issue"
    rest = LAUNCH_S * 1
    assert special["predicted_s"] - rest == pytest.approx(2 * (plain["predicted_s"] - rest))


BOXES = dict(kernel="tma", BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


def test_what_a_launch_computes_is_its_padding():
    """Packed stems and block-diagonal groups compute more than sizes and blocks would say."""
    plain = product(op="conv2d", tile=BOXES, programs=16 * 32)
    assert predict(plain, H200)["padding"] == 1
    more = predict(plain | dict(computed_flops=3 * plain["flops"], units=512), H200)
    assert more["padding"] == 3
    times = [row["predicted_s"] - LAUNCH_S for row in (predict(plain, H200), more)]
    assert times[1] == pytest.approx(3 * times[0])


def test_persistent_boxes_are_counted_by_the_launch():
    row = product(op="conv2d", tile=BOXES | dict(PROGRAMS_PER_SM=1), programs=132)
    row |= dict(computed_flops=row["flops"], units=264 + 66)
    assert predict(row, H200)["wave_efficiency"] == pytest.approx(330 / 396)


def test_a_fused_block_through_tma_has_one_accumulator():
    row = product(op="conv2d_relu_pool", shape=dict(R=3, S=3), tile=BOXES)
    row |= dict(computed_flops=row["flops"], programs=512, loop_instructions=2000)
    steps = row["flops"] / (2 * 256 * 128 * 64) / predict(row, H200)["wave_efficiency"]
    seconds = steps * 2000 * 8 / (4 * 132 * 1.83e9) + LAUNCH_S
    assert predict(row, H200)["predicted_s"] == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize("depth", [{}, {"BLOCK_K": 16}])
def test_a_direct_convolution_is_as_fast_as_its_fmas(depth):
    """Issued as often as the loop says, however far it is unrolled; and it is worth running."""
    tile = dict(kernel="direct", BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2) | depth
    row = product(op="conv2d", tile=tile, tensor_core=None, programs=64 * 64, sizes=dict(M=4096))
    found = []
    for unrolled in (1, 4):
        mix = dict(float=16 * unrolled, load=5 * unrolled)
        loop = row | dict(loop_mix=mix, loop_instructions=64 * unrolled)
        found.append(predict(loop, H200))
        assert refused(loop | found[-1]) is None
    assert found[0] == found[1] and found[0]["bound"] == "issue"
    # A warp's FMA is 64 FLOPs; one in four instructions is one.
    issued = 4 * row["flops"] / 64 / (4 * 132 * 1.83e9)
    efficiency = 4096 / (132 * 32)
    assert found[0]["predicted_s"] == pytest.approx(issued / efficiency + LAUNCH_S, rel=1e-3)
    fed = predict(row | dict(loop_mix=dict(float=32), loop_instructions=32), H200)
    assert fed["predicted_tflops"] == pytest.approx(61.8 * efficiency, rel=0.03)  # at 1.83 GHz


def test_a_step_without_a_tile():
    row = dict(op="train_step", mode="step", dtype="bfloat16", precision="ieee", shape=dict(N=64),
               tile=None, flops=10**9, bytes=10**6, moved=10**7, launches=17)  # fmt: skip
    row = predict(row, H200)
    assert row["bound"] == "launch"
    assert row["predicted_s"] == pytest.approx(10**7 / 4.8e12 + 17 * LAUNCH_S)
    assert "waves" not in row


@pytest.mark.parametrize(
    "programs, efficiency",
    [(16, 16 / 132), (132, 1.0), (133, 133 / 264), (264, 1.0), (265, 265 / 396)],
)
def test_the_busiest_sm_decides(programs, efficiency):
    """Whether its programs run one by one or side by side: two on an SM take twice as long."""
    tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)
    row = product(tile=tile, programs=programs, threads=128, registers=90, shared=49152)
    found = predict(row, H200)
    assert found["blocks_per_sm"] == 4
    assert found["wave_efficiency"] == pytest.approx(efficiency)


def test_padding():
    assert padding(dict(M=128, N=256), dict(BLOCK_M=128, BLOCK_N=256)) == 1.0
    assert padding(dict(M=100, N=65), dict(BLOCK_M=64, BLOCK_N=64)) == pytest.approx(
        128 / 100 * 128 / 65
    )
    assert padding(dict(M=100, N=1000), dict(BLOCK_M=50)) == 1.0
    fused = product(op="conv2d_relu_pool", shape=dict(R=3, S=3))
    assert predict(fused, H200)["padding"] == pytest.approx(16 / 9)


def test_what_does_not_fit_has_no_time():
    row = predict(product(shared=240_000), H200)
    assert row["blocks_per_sm"] == 0 and "predicted_s" not in row
    assert refused(product() | row) == "does not fit: shared memory"


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(), None),
        (dict(spills=64), "spills 64 bytes a thread"),
        (dict(tensor_core=None), "no tensor cores"),
        (dict(tensor_core=None, dtype="float32"), None),
        (dict(tensor_core=None, dtype="float32", precision="tf32"), "no tensor cores"),
        (dict(failed="does not compile: it is odd"), "does not compile: it is odd"),
    ],
)
def test_what_is_not_worth_running(changes, reason):
    assert refused(product(**changes)) == reason


def test_the_model_is_a_lower_bound_for_the_roofline():
    row = product() | predict(product(), H200)
    floor = max(row["flops"] / H200.peak("bf16"), row["bytes"] / H200.bandwidth)
    assert floor <= row["predicted_s"] < math.inf
