"""What is measured is what was asked for, on the same inputs for everybody."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from tests.tools.inputs import DEVICE
from tilelab.kernels import _launch
from tilelab.nets import step
from tilelab.perf.clock.correctness import Gate
from tilelab.perf.errors import PerfError
from tilelab.perf.work import formulas, peers, shapes, workloads
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.peers import PEERS
from tilelab.perf.work.workloads import Workload, modes, prepare

EVERY = [(op, mode) for op, o in OPERATORS.items() for mode in o.modes]


def tiny(op, mode, dtype="float32", which=0):
    shape = shapes.shapes(op, "tiny")[which]
    if op == "scaled_matmul":  # of sizes that torch takes, too
        shape, dtype = shape._replace(sizes=dict(M=33, N=48, K=80)), "float8_e4m3fn"
    return Workload(op, mode, dtype, "ieee", shape.sizes, shape.name)


@pytest.mark.parametrize("op, mode", EVERY)
@pytest.mark.parametrize("impl", ["tilelab", "torch"])
def test_ours_and_torch_agree_with_the_reference(op, mode, impl):
    w = tiny(op, mode)
    gate = Gate(w, DEVICE, seed=3)
    verdict = gate.check(prepare(w, impl, DEVICE, 3))
    assert verdict.problem is None
    assert 0 <= verdict.error <= verdict.tolerance


@pytest.mark.parametrize("dtype", OPERATORS["scaled_matmul"].dtypes)
@pytest.mark.parametrize("impl", ["tilelab", "torch"])
def test_eight_bits(impl, dtype):
    """Both dtypes, where torch has it and at sizes where a GPU's has not."""
    for shape, offered in ((dict(M=33, N=48, K=80), True), (dict(M=3, N=29, K=53), False)):
        w = Workload("scaled_matmul", "fwd", *workloads.DTYPES[dtype], shape, "")
        assert w.bytes == 80 * (33 + 48) + 2 * 33 * 48 or not offered
        assert workloads.offers("torch", w) == offered and not workloads.offers("compile", w)
        if offered or impl == "tilelab":
            assert Gate(w, DEVICE, 3).check(prepare(w, impl, DEVICE, 3), impl).problem is None
    wrong = Gate(w, DEVICE, 3).check(prepare(w, "tilelab", DEVICE, 4)).problem
    assert "relative error" in wrong


@pytest.mark.parametrize("op, mode", EVERY)
def test_another_seed_gives_another_result(op, mode):
    """So that a gate with fresh inputs is worth something."""
    w = tiny(op, mode)
    verdict = Gate(w, DEVICE, seed=3).check(prepare(w, "tilelab", DEVICE, 4))
    assert "wrong" in verdict.problem


@pytest.mark.parametrize("op, mode", [("matmul", "fwd"), ("conv2d", "wgrad"), ("softmax", "bwd")])
def test_inputs_are_random_within_one(op, mode):
    call = prepare(tiny(op, mode), "tilelab", DEVICE, 0)
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
    call = prepare(tiny("max_pool2d", "fwd"), "tilelab", DEVICE, 0)
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
    with pytest.raises(PerfError, match="inductor has nothing for"):
        prepare(tiny(op, mode), "inductor", DEVICE, 0)


@pytest.mark.parametrize("op", ["conv2d_bias_relu", "conv2d_relu_pool"])
def test_cudnn_does_all_in_one_pass_where_nobody_follows(op, monkeypatch):
    """In 16 bits on a GPU, forward; with gradients, or where it cannot, step by step."""
    seen = []

    class OnGPU(torch.Tensor):
        is_cuda = True

    def fused(x, weight, bias, stride, padding, dilation, groups):
        seen.append((x.dtype, stride, padding, dilation, groups))
        if len(seen) > 1:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    shape = shapes.shapes(op, "tiny")[0].sizes | dict(C=6, K=8, groups=2, padding=1)
    for dtype, expected in ((torch.float32, 0), (torch.bfloat16, 1), (torch.bfloat16, 2)):
        make = formulas.Maker(dtype, DEVICE, 0)
        inputs = list(OPERATORS[op].inputs(shape, make).values())
        on_gpu = [x.as_subclass(OnGPU) for x in inputs]
        with torch.no_grad():
            want, got = (OPERATORS[op].theirs(shape, *xs) for xs in (inputs, on_gpu))
        assert len(seen) == expected and torch.equal(want, got.as_subclass(torch.Tensor))
        OPERATORS[op].theirs(shape, *on_gpu)  # autograd follows
        assert len(seen) == expected
    stride = (shape["stride"],) * 2
    assert set(seen) == {(torch.bfloat16, stride, (1, 1), (1, 1), 2)}


def test_inductors_template_of_convolutions():
    w = tiny("conv2d_bias_relu", "fwd")
    assert workloads.offers("inductor", w)
    assert not workloads.offers("inductor", w._replace(shape=w.shape | dict(dilation=2)))
    assert not workloads.offers("inductor", tiny("conv2d_relu_pool", "fwd"))


def test_inductor_is_asked_for_its_own_templates(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    prepare(tiny("conv2d", "fwd"), "inductor", DEVICE, 0)
    assert asked[0]["options"] == {
        "max_autotune": True, "max_autotune_gemm_backends": "TRITON",
        "max_autotune_conv_backends": "TRITON",
    }  # fmt: skip


def test_every_peer_is_documented():
    assert set(PEERS) == {"torch", "graph", "compile", "inductor"}


def test_a_whole_step_in_a_graph_is_a_peer_of_whole_steps():
    w = tiny("train_step", "step")
    verdict = Gate(w, DEVICE, seed=3).check(prepare(w, "graph", DEVICE, 3), "graph")
    assert verdict.problem is None
    with pytest.raises(PerfError, match="graph has nothing for conv2d fwd"):
        prepare(tiny("conv2d", "fwd"), "graph", DEVICE, 0)


def test_our_training_step_computes_with_copies():
    """In bfloat16: nothing is cast, and the gradients are bfloat16."""
    w = tiny("train_step", "step", "bfloat16")
    verdict = Gate(w, DEVICE, seed=3).check(prepare(w, "tilelab", DEVICE, 3))
    assert verdict.problem is None
    loss, *grads = prepare(w, "tilelab", DEVICE, 3)()
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["tilelab", "graph"])
def test_of_a_step_in_a_graph_a_replay_is_judged(impl, dtype, monkeypatch):
    """The first call of a graph runs a step and captures; the second replays, of later weights."""
    made = []

    class Graph:
        def __init__(self, work, stream):
            self.work, self.stream, self.results = work, "a stream", []
            made.append(self)

        def __call__(self):
            self.results.append(self.work())
            return self.results[-1]

    monkeypatch.setattr(step, "Graph", Graph)
    w = tiny("train_step", "step", dtype)
    call = prepare(w, impl, DEVICE, 3)
    loss, *grads = call()
    (graph,) = made
    (first, *_), replay = graph.results
    assert loss is replay[0] and torch.equal(loss, first)
    for grad, judged in zip(grads, replay[1:], strict=True):
        assert grad.data_ptr() == judged.data_ptr()
    assert not torch.equal(call()[0], call()[0]) and len(graph.results) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("impl", ["tilelab", "graph", "compile"])
def test_a_replay_is_right(impl, dtype):
    w = tiny("train_step", "step", dtype)
    gate = Gate(w, DEVICE, seed=3)
    assert gate.check(prepare(w, impl, DEVICE, 3), impl).problem is None


def test_torch_compile_is_a_peer(monkeypatch):
    """Followed, but not compiled: that takes a minute, and is not ours."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend="aot_eager"))
    w = tiny("bias_relu", "fwd")
    assert Gate(w, DEVICE, 0).check(prepare(w, "compile", DEVICE, 0)).problem is None
    peers.forget_compiled()


SWITCHES = """
import torch
from tilelab.kernels import _checks, _launch
from tilelab.perf.work import workloads

for precision in ("tf32", "ieee", "tf32"):
    workloads.set_precision(precision)
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        assert _checks.dot_precision(torch.float32, switch) == precision
    # Inductor reads these, and they raise where the older and the newer flags contradict.
    tf32 = precision == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert (torch.get_float32_matmul_precision() == "highest") != tf32
"""


def test_precision_is_torchs_own_switch():
    """In a process of its own: other tests set the newer flags, and torch remembers which."""
    done = subprocess.run(
        [sys.executable, "-c", SWITCHES],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op, mode", EVERY)
def test_torch_passes_the_gate_in_bfloat16(op, mode):
    """What a peer rounds on its way, before a maximum say, must not make it wrong."""
    w = tiny(op, mode, "bfloat16")
    if op == "conv2d_relu_pool":  # windows enough, so that some go another way
        w = w._replace(shape=w.shape | dict(N=2, C=16, K=16, H=24, W=24))
    assert Gate(w, DEVICE, 3).check(prepare(w, "torch", DEVICE, 3), "torch").problem is None


def test_torch_compile_has_no_silent_limit(monkeypatch):
    """It compiles a function for eight sets of shapes; all workloads are one function to it."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    real = torch.compile
    peers.forget_compiled()
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend=backend, dynamic=False))
    calls = []
    for rows in range(1, 11):
        w = Workload("softmax", "fwd", "float32", "ieee", dict(M=rows, N=16), "")
        calls.append([prepare(w, "compile", DEVICE, seed) for seed in range(3)])
    with pytest.raises(Exception, match="recompile_limit"):
        for call in sum(calls, []):
            call()
    assert len(compiled) == 8
    compiled.clear()
    for sets in calls:
        peers.forget_compiled()
        for call in sets:
            call()
    assert len(compiled) == len(calls)  # the sets of a workload share it
    peers.forget_compiled()


def test_tolerance_grows_with_what_rounds():
    half = tiny("matmul", "fwd", "bfloat16")
    single = tiny("matmul", "fwd")
    tf32 = single._replace(precision="tf32")
    bounds = [workloads.tolerance(w, 100) for w in (single, tf32, half)]
    assert bounds == sorted(bounds) and bounds[0] < 1e-4 < bounds[1] < 1e-2


def test_tolerance_of_gradients_that_a_rounded_maximum_sends():
    """TF32 products, 3% off: a CPU does not have them, so they are rounded by hand."""

    def tf32(t):
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def gradient(x, weight):
        x = x.clone().requires_grad_()
        y = torch.nn.functional.max_pool2d(torch.conv2d(x, weight).relu(), 2)
        return torch.autograd.grad(y.sum(), x)[0].double()

    w = Workload("conv2d_relu_pool", "dgrad", "float32", "tf32", dict(
        N=4, C=32, H=34, W=34, K=32, R=3, S=3, stride=1, padding=0, dilation=1, groups=1
    ), "")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(4, 32, 34, 34, generator=generator) * 2 - 1,
                 torch.rand(32, 32, 3, 3, generator=generator) * 2 - 1)  # fmt: skip
    right = gradient(x.double(), weight.double())
    error = ((gradient(tf32(x), tf32(weight)) - right).norm() / right.norm()).item()
    assert 0.01 < error < workloads.tolerance(w, right.numel()) / 2
    assert workloads.tolerance(w._replace(precision="ieee"), right.numel()) < 0.01
