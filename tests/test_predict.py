"""The model of a tile's time, against numbers worked out by hand."""

import math

import pytest

from perf.gpus import GPUS
from perf.predict import LAUNCH_S, padding, predict, refused

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
