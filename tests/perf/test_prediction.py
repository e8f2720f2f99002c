"""The model of a tile's time: each limit where it binds, by hand, and what others have measured."""

import math

import pytest

from tilelab.kernels import _cost_model as model
from tilelab.perf.compiler.prediction import CONSTRUCTED, HELD, predict, refused
from tilelab.perf.work.gpus import GPUS
from tilelab.perf.work.tile_work import LAUNCH_S, padding

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


def within_sms(row, gpu):
    """The clocks that a prediction gives the busiest SM, of the products of `product`."""
    return (row["predicted_s"] - LAUNCH_S) * gpu.fma_clock_mhz * 1e6


# A GPU whose SMs have one limit at a time: all others are far away.
UNBOUND = H200._replace(bandwidth=1e18, ceiling=1e6)
AROUND = model.AROUND + model.LATENCY + 128 * 256 * 2 / model.STORE_BYTES


def test_the_fields_of_a_prediction():
    row = product() | predict(product(), H200)
    # 512 programs, one an SM (200 registers x 256 threads): so the busiest SM has four
    assert row["blocks_per_sm"] == 1 and row["limit"] == "registers"
    assert row["waves"] == pytest.approx(512 / 132)
    assert row["wave_efficiency"] == pytest.approx(512 / 528)
    assert row["predicted_tflops"] == pytest.approx(2 * 4096**3 / row["predicted_s"] / 1e12)
    assert row["predicted_gbps"] == pytest.approx(row["bytes"] / row["predicted_s"] / 1e9)


def test_what_waits_for_the_tensor_cores():
    """A slow tensor core: 8 FLOPs a clock make 2 x 128 x 256 x 64 of them take 524,288 clocks."""
    slow = UNBOUND._replace(rate=UNBOUND.rate | dict(bf16=8))
    row = predict(product(), slow)
    assert row["bound"] == "compute"
    clocks = 4 * (64 * 524_288 + AROUND + (128 + 256) * 128 / model.L2_BYTES)
    assert within_sms(row, slow) == pytest.approx(clocks, rel=1e-4)


def test_what_waits_for_its_instructions():
    row = predict(product(loop_instructions=100_000), UNBOUND)
    assert row["bound"] == "issue"
    step = 100_000 * 8 / 4 + 18 * 8
    assert within_sms(row, UNBOUND) == pytest.approx(4 * 64 * step, rel=1e-3)


def test_what_waits_for_l2():
    """Runs of two bytes cost eight times as much as whole lines."""
    row = predict(product(run_a=2, run_b=2), UNBOUND)
    assert row["bound"] == "l2"
    step = 8 * (128 + 256) * 64 * 2 / model.L2_BYTES
    assert within_sms(row, UNBOUND) == pytest.approx(4 * 64 * step, rel=0.05)


def test_what_waits_for_latency():
    """Each stage more halves, thirds, quarters the wait; with one stage nothing overlaps."""
    tile = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, num_warps=2)
    small = dict(programs=132, threads=64, registers=40, shared=4096, loop_instructions=40)
    small |= dict(tensor_core="HMMA.16816.F32", flops=2 * 132 * 16 * 32 * 4096)
    found = []
    for stages in (1, 2, 3, 5):
        row = predict(product(tile=tile | dict(num_stages=stages), sizes={}, **small), UNBOUND)
        assert row["bound"] == "latency"
        found.append(within_sms(row, UNBOUND))
    one, two, three, five = found
    assert one > two and two / three == pytest.approx(2, rel=0.1)
    assert two / five == pytest.approx(4, rel=0.2)


def test_what_waits_for_shared_memory():
    """With mma each of eight warps reads its rows and columns: 2 x 4 warps of 64 x 64."""
    mma = product(tensor_core="HMMA.16816.F32", loop_instructions=1)
    fast = UNBOUND._replace(rate=UNBOUND.rate | dict(bf16=10**6))
    row = predict(mma, fast)
    assert row["bound"] == "shared memory"
    step = (8 * (64 + 64) + 128 + 256) * 64 * 2 / model.SHARED_BYTES
    assert within_sms(row, fast) == pytest.approx(4 * 64 * step, rel=0.15)


def test_two_programs_share_the_units_of_an_sm_and_wait_side_by_side():
    loop = model.Loop(64, 64, 64, 2, 4, 3, 60, "wgmma", 2)
    step = model.step_of(loop, model.GPU(1, 1e9, 4096, 1e12, 1e15))
    alone, beside = step.beside(1), step.beside(2)
    for name in ("issue", "l2", "shared", "tensor"):
        assert beside[name] == 2 * alone[name]
    assert alone["latency"] < beside["latency"] < 1.2 * alone["latency"]
    assert step.clocks(1) < step.clocks(2) < 2 * step.clocks(1)


def test_together():
    assert model.together(3.0, 0.0) == 3.0
    assert model.together(1.0, 1.0) == pytest.approx(2**0.25)
    assert model.together(10.0, 1.0) == pytest.approx(10, rel=1e-4)
    assert model.together(0.0, 0.0) == 0.0


def test_no_product_passes_what_the_best_library_reaches():
    """797 TFLOP/s of an H200 in bfloat16, whatever the tile (see gpus.py)."""
    n = 8192
    sizes = dict(sizes=dict(M=n, N=n, K=n), flops=2 * n**3, bytes=6 * n * n, moved=6 * n * n)
    row = product(**sizes, programs=64 * 32)
    row |= predict(row, H200)
    assert 550 < row["predicted_tflops"] < 797
    free = H200._replace(ceiling=1e6)
    unlimited = predict(product(programs=64 * 32, **{k: row[k] for k in sizes}), free)
    assert unlimited["predicted_s"] < row["predicted_s"]


@pytest.mark.parametrize(
    "gpu, registers, instructions, core, slower",
    [
        ("a100", (172, 250), (98, 177), "HMMA.16816.F32", 2.0),
        ("h100", (108, 176), (64, 88), "HGMMA.64x128x16.F32", 1.6),
    ],
)
def test_eight_warps_and_two_stages_against_four_of_each(
    gpu, registers, instructions, core, slower
):
    """128x128x32, as measured: the median over the lists of others (perf/results/public)."""
    gpu, times = GPUS[gpu], []
    for i, (warps, stages) in enumerate([(8, 2), (4, 4)]):
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=warps, num_stages=stages)
        row = product(
            tile=tile, programs=1024, threads=32 * warps, registers=registers[i],
            shared=16384 * max(stages - 1, 2), loop_instructions=instructions[i],
            tensor_core=core, run_a=64,
        )  # fmt: skip
        times.append(predict(row, gpu)["predicted_s"])
    assert times[0] / times[1] == pytest.approx(slower, rel=0.25)


def stream(**changes):
    """A bias_relu of 2^28 elements in bfloat16."""
    n = 2**28
    return dict(
        op="bias_relu", mode="fwd", dtype="bfloat16", precision="ieee", shape={}, launches=1,
        sizes=dict(M=n // 64, N=64), tile=dict(BLOCK_M=32, BLOCK_N=64, num_warps=4),
        flops=2 * n, bytes=4 * n, moved=4 * n, programs=n // 2048, threads=128, registers=32,
        shared=0, spills=0, instructions=120,
    ) | changes  # fmt: skip


def test_memory_bound():
    row = predict(stream(), H200)
    assert row["bound"] == "memory"
    least = 4 * 2**28 / (0.75 * 4.8e12)
    assert least < row["predicted_s"] < 1.1 * least


def test_idle_sms_do_not_fill_the_memory():
    """Little's law: 64 programs on 132 SMs have no more under way than they load at once."""
    n = 64 * 2048
    few = stream(sizes=dict(M=n // 64, N=64), bytes=4 * n, moved=4 * n, programs=64)
    row = predict(few, H200)
    assert row["bound"] in ("launch", "latency") and row["predicted_gbps"] < 200
    # A large tensor in programs of one warp and 128 elements cannot either.
    thin = stream(tile=dict(BLOCK_M=2, BLOCK_N=64, num_warps=1), programs=2**21, threads=32)
    assert predict(thin, H200)["predicted_s"] > 1.3 * predict(stream(), H200)["predicted_s"]


def test_a_depthwise_convolution_may_wait_for_its_instructions():
    """A step of a program is 64 pixels x 64 channels; what comes before the steps counts, too."""
    n = 4096 * 64 * 64
    row = dict(
        op="conv2d", mode="fwd", dtype="bfloat16", precision="ieee", shape={}, launches=1,
        sizes=dict(M=n // 64, N=64), flops=18 * n, bytes=4 * n, moved=4 * n, programs=528,
        tile=dict(BLOCK_M=64, BLOCK_N=64, PATCH_P=1, PATCH_Q=4, ROWS=16, num_warps=4),
        threads=128, registers=180, shared=0, spills=0, instructions=1200, loop_instructions=700,
    )  # fmt: skip
    assert predict(row, H200)["bound"] in ("memory", "latency")
    many = predict(row | dict(instructions=40_500, loop_instructions=40_000), H200)
    assert many["bound"] == "issue"
    issued = 4 * (4096 * 40_000 + 528 * 500)
    expected = issued / (4 * 132 * 1.98e9)
    assert many["predicted_s"] == pytest.approx(expected, rel=0.6)


def test_what_is_updated_in_place_is_moved_twice():
    """`moved` counts a tensor once; an AdamW step reads p, grad, m, v and writes p, m, v."""
    n = 2**28
    row = stream(
        op="adamw", mode="step", dtype="float32", sizes=dict(M=n), flops=14 * n, bytes=28 * n,
        moved=16 * n, programs=n // 1024, tile=dict(BLOCK_M=1024, num_warps=4),
    )  # fmt: skip
    assert predict(row, H200)["predicted_s"] > 28 * n / 4.8e12 / 0.75


@pytest.mark.parametrize(
    "known, gpu, changes",
    [
        (HELD, "a100", {}),
        (HELD, "h200", {}),
        (HELD, "a100", dict(dtype="float32", precision="tf32")),
        (CONSTRUCTED, "h200", dict(dtype="float32", precision="tf32")),
        (CONSTRUCTED, "b200", {}),
        (CONSTRUCTED, "mi300x", {}),
        (CONSTRUCTED, "h200", dict(op="conv2d")),
        (CONSTRUCTED, "h200", dict(tile=dict(product()["tile"], kernel="tma"))),
    ],
)
def test_how_a_prediction_is_known(known, gpu, changes):
    row = product(**changes) | dict(registers=128, shared=49152)
    assert predict(row, GPUS[gpu])["known"] == known


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
    times = [row["predicted_s"] - LAUNCH_S for row in (plain, special)]
    assert times[1] / times[0] == pytest.approx(2, rel=0.1)


BOXES = dict(kernel="tma", BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


def test_what_a_launch_computes_is_its_padding():
    """Packed stems and block-diagonal groups compute more than sizes and blocks would say."""
    plain = product(op="conv2d", tile=BOXES, programs=16 * 32)
    assert predict(plain, H200)["padding"] == 1
    more = predict(plain | dict(computed_flops=3 * plain["flops"], units=512), H200)
    assert more["padding"] == 3
    times = [row["predicted_s"] - LAUNCH_S for row in (predict(plain, H200), more)]
    assert times[1] == pytest.approx(3 * times[0], rel=0.05)


def test_persistent_boxes_are_counted_by_the_launch():
    row = product(op="conv2d", tile=BOXES | dict(PROGRAMS_PER_SM=1), programs=132)
    row |= dict(computed_flops=row["flops"], units=264 + 66)
    assert predict(row, H200)["wave_efficiency"] == pytest.approx(330 / 396)


def test_a_fused_block_through_tma_has_one_accumulator():
    row = product(op="conv2d_relu_pool", shape=dict(R=3, S=3), tile=BOXES)
    row |= dict(computed_flops=row["flops"], programs=512, loop_instructions=20_000)
    steps = row["flops"] / (2 * 256 * 128 * 64) / predict(row, H200)["wave_efficiency"]
    seconds = steps * 20_000 * 8 / (4 * 132 * 1.98e9) + LAUNCH_S
    assert predict(row, H200)["predicted_s"] == pytest.approx(seconds, rel=0.01)


def test_a_direct_convolution_is_as_fast_as_its_fmas():
    """A loop that is unrolled issues as much a product, and waits less often; both may run."""
    tile = dict(kernel="direct", BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2)
    row = product(op="conv2d", tile=tile, tensor_core=None, programs=64 * 64, sizes=dict(M=4096))
    row |= dict(registers=32, shared=0)
    found = []
    for unrolled in (1, 4):
        mix = dict(float=16 * unrolled, load=5 * unrolled)
        loop = row | dict(loop_mix=mix, loop_instructions=64 * unrolled)
        found.append(predict(loop, H200))
        assert refused(loop | found[-1]) is None
    assert found[1]["bound"] == "issue" and found[1]["predicted_s"] < found[0]["predicted_s"]
    # A warp's FMA is 64 FLOPs; one in four instructions is one.
    issued = 4 * row["flops"] / 64 / (4 * 132 * 1.98e9)
    efficiency = 4096 / (132 * 32)
    assert found[1]["predicted_s"] > issued / efficiency + LAUNCH_S
    fed = predict(row | dict(loop_mix=dict(float=128), loop_instructions=128), H200)
    assert found[1]["predicted_tflops"] < fed["predicted_tflops"] < 66.9 * efficiency


def test_a_step_without_a_tile():
    row = dict(op="train_step", mode="step", dtype="bfloat16", precision="ieee", shape=dict(N=64),
               tile=None, flops=10**9, bytes=10**6, moved=10**7, launches=17)  # fmt: skip
    row = predict(row, H200)
    assert row["bound"] == "launch"
    assert row["predicted_s"] == pytest.approx(10**7 / (0.75 * 4.8e12) + 17 * LAUNCH_S, rel=1e-3)
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
