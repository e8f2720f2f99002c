"""What is measured is what was asked for, on the same inputs for everybody."""

import pytest
import torch

from kernels import _launch
from perf import shapes, workloads
from perf.errors import PerfError
from perf.gate import Gate
from perf.workloads import OPS, PEERS, Workload, modes, prepare

EVERY = [(op, mode) for op, o in OPS.items() for mode in o.modes]


def tiny(op, mode, dtype="float32", which=0):
    shape = shapes.shapes(op, "tiny")[which]
    return Workload(op, mode, dtype, "ieee", shape.sizes, shape.name)


@pytest.mark.parametrize("op, mode", EVERY)
@pytest.mark.parametrize("impl", ["tilelab", "torch"])
def test_ours_and_torch_agree_with_the_reference(op, mode, impl):
    w = tiny(op, mode)
    gate = Gate(w, "cpu", seed=3)
    verdict = gate.check(prepare(w, impl, "cpu", 3))
    assert verdict.problem is None
    assert 0 <= verdict.error <= verdict.tolerance


@pytest.mark.parametrize("op, mode", EVERY)
def test_another_seed_gives_another_result(op, mode):
    """So that a gate with fresh inputs is worth something."""
    w = tiny(op, mode)
    verdict = Gate(w, "cpu", seed=3).check(prepare(w, "tilelab", "cpu", 4))
    assert "wrong" in verdict.problem


@pytest.mark.parametrize("op, mode", [("matmul", "fwd"), ("conv2d", "wgrad"), ("softmax", "bwd")])
def test_inputs_are_random_within_one(op, mode):
    call = prepare(tiny(op, mode), "tilelab", "cpu", 0)
    for x in call.inputs:
        assert x.abs().max() <= 1
        assert x.numel() < 8 or (x.std() > 0.3 and (x != 0).any())


def kernels_of(op, mode):
    with _launch.record():
        call = prepare(tiny(op, mode), "tilelab", "cpu", None)
    with _launch.record() as events:
        call()
    return {e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)}


def test_a_gradient_is_only_the_gradient():
    """The forward pass is over before the clock starts, and the other gradient is not asked for."""
    assert kernels_of("conv2d", "dgrad") == {"conv2d_input_grad_kernel"}
    assert "conv2d_input_grad_kernel" not in kernels_of("conv2d", "wgrad")
    assert kernels_of("softmax", "bwd") <= {
        "softmax_backward_kernel",
        "softmax_backward_online_kernel",
    }
    assert kernels_of("matmul", "dgrad") == {"matmul_kernel"}


def test_forward_saves_nothing_for_a_gradient():
    call = prepare(tiny("max_pool2d", "fwd"), "tilelab", "cpu", 0)
    assert not call()[0].requires_grad


def test_modes():
    assert modes("conv2d", "fwd,dgrad") == ["fwd", "dgrad"]
    assert modes("conv2d", "bwd") == ["dgrad", "wgrad"]
    assert modes("softmax", "bwd") == ["bwd"]
    assert modes("cross_entropy", "all") == ["fwd", "fwdbwd"]
    assert modes("sgd", "fwd") == ["step"]  # there is no other
    assert modes("softmax", "dgrad") == []
    with pytest.raises(PerfError, match="unknown mode 'backward'"):
        modes("conv2d", "backward")
    with pytest.raises(PerfError, match="unknown operator 'conv3d': there are matmul"):
        modes("conv3d", "fwd")


@pytest.mark.parametrize("op, mode", [("softmax", "fwd"), ("conv2d", "dgrad"), ("sgd", "step")])
def test_a_peer_that_does_not_exist(op, mode):
    with pytest.raises(PerfError, match="Inductor has no Triton template"):
        prepare(tiny(op, mode), "inductor", "cpu", 0)
    with pytest.raises(PerfError, match="unknown peer 'cudnn'"):
        prepare(tiny(op, mode), "cudnn", "cpu", 0)


def test_every_peer_is_documented():
    assert set(PEERS) == {"torch", "compile", "inductor"}


@pytest.mark.slow
def test_torch_compile_is_a_peer():
    w = tiny("bias_relu", "fwd")
    assert Gate(w, "cpu", 0).check(prepare(w, "compile", "cpu", 0)).problem is None


def test_precision_is_torchs_own_switch():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        workloads.set_precision("tf32")
        assert _launch.dot_precision(torch.float32, torch.backends.cuda.matmul) == "tf32"
        workloads.set_precision("ieee")
        assert _launch.dot_precision(torch.float32, torch.backends.cudnn.conv) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
        torch.backends.cudnn.conv.fp32_precision = before[1]


def test_tolerance_grows_with_what_rounds():
    half = tiny("matmul", "fwd", "bfloat16")
    single = tiny("matmul", "fwd")
    tf32 = single._replace(precision="tf32")
    bounds = [workloads.tolerance(w, 100) for w in (single, tf32, half)]
    assert bounds == sorted(bounds) and bounds[0] < 1e-4 < bounds[1] < 1e-2
