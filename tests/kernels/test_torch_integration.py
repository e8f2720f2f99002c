"""Every operator inside torch: opcheck, torch.compile, autocast, CUDA graphs, streams.

The samples are those of tests/tools/operators.py. What is compared here is an operator with itself
under another part of torch, bit for bit: the contract suite shows that it is right.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tools.inputs import DEVICE, gradients, randn
from tests.tools.operators import OPERATORS, arrange, tensors_of

# Beside the typical samples: another one, other layouts of its arguments, other options.
FURTHER = {
    "matmul": [
        ("primes", {0: "transposed"}, {}),
        ("primes", {1: "transposed"}, {}),  # whose gradient is that of a weight, in one pass
        ("smaller than the smallest tile", {}, dict(activation="gelu")),
    ],
    "bias_activation": [("no bias", {0: "transposed"}, {}), ("SiLU", {}, {})],
    "bias_relu": [("images", {0: "channels_last"}, {})],
    "conv2d": [
        ("many channels", {0: "channels_last"}, {}),
        ("few channels", {0: "channels_last"}, dict(activation="silu")),
    ],
    "conv2d_relu_pool": [("one window a batch", {0: "channels_last"}, {})],
    "conv2d_stack": [("groups behind a pool", {0: "channels_last"}, {})],
    "scaled_matmul": [("float8", {}, {}), ("one scale for all", {}, {})],
    "cross_entropy": [("primes", {}, {})],
    "max_pool2d": [("a tall window", {0: "channels_last"}, {})],
}
SAMPLES = {
    name: [(reason, {}, {}) for reason in list(operator.samples)[: operator.layouts]]
    + FURTHER.get(name, [])
    for name, operator in OPERATORS.items()
}
NO_GRADIENT = {name for name, operator in OPERATORS.items() if not operator.differentiable}
AUTOCAST_FLOAT32 = {"softmax", "cross_entropy"}  # as in torch; max_pool2d keeps what it gets
AUTOCAST_KEEPS = {"max_pool2d", "im2col", "col2im"}

each_sample = pytest.mark.parametrize(
    "name, sample",
    [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))],
    ids=lambda v: f"sample {v}" if isinstance(v, int) else v,
)


def call(name, sample):
    """(function of its tensors, its inputs, an output gradient) of one sample."""
    operator = OPERATORS[name]
    reason, layouts, more = SAMPLES[name][sample]
    options = operator.samples[reason].options | more
    dtype = torch.bfloat16 if operator.inference else torch.float32
    inputs = tensors_of(operator, operator.samples[reason], dtype)
    for i, layout in layouts.items():
        inputs[i] = arrange(inputs[i], layout)

    def fn(*xs):
        return operator.function(*xs, **options)

    with torch.no_grad():
        y = fn(*inputs)
    return fn, inputs, randn(*y.shape, seed=9)


def results(name, fn, inputs, dy):
    """`gradients`, of the ops that have some."""
    return (fn(*inputs), []) if name in NO_GRADIENT else gradients(fn, inputs, dy)


def assert_same(got, want):
    assert torch.equal(got[0], want[0])
    assert got[0].stride() == want[0].stride()
    for g, w in zip(got[1], want[1], strict=True):
        assert torch.equal(g, w)


# --- opcheck ------------------------------------------------------------------------------------


OPCHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """Record the calls of tilelab's custom ops, those of the backward included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tilelab":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded(name, sample):
    fn, inputs, dy = call(name, sample)
    with Recorder() as recorder:
        results(name, fn, inputs, dy)
    return recorder.calls


@pytest.mark.core
@each_sample
def test_opcheck(name, sample):
    """Schema, fake tensors, autograd and ahead-of-time dispatch of each custom op that it calls."""
    calls = recorded(name, sample)
    assert calls, f"{name} calls no custom op"
    for op, args, kwargs in calls:
        args = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
        differentiable = name not in NO_GRADIENT
        if differentiable and "grad" not in op.__name__ and "backward" not in op.__name__:
            for x in args:
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.requires_grad_()
        # test_schema looks for changed inputs by comparing them, which torch cannot do in float8.
        float8 = any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in args)
        tests = [test for test in OPCHECKS if test != "test_schema" or not float8]
        torch.library.opcheck(op, args, kwargs, test_utils=tests)


def test_opcheck_has_seen_every_custom_op():
    seen = {str(op) for name in SAMPLES for i in range(len(SAMPLES[name]))
            for op, _, _ in recorded(name, i)}  # fmt: skip
    ours = {f"{op.replace('::', '.')}.default" for op in torch._C._dispatch_get_all_op_names()
            if op.startswith("tilelab::")}  # fmt: skip
    assert seen == ours


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "name, sample, dynamic",
    [(name, i, i == 0) for name in SAMPLES for i in range(len(SAMPLES[name]))]
    + [(name, 0, False) for name in SAMPLES],
)
def test_compile_forward_and_backward(name, sample, dynamic):
    """The first sample of each with sizes that are known, and of which nothing is known."""
    fn, inputs, dy = call(name, sample)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(results(name, compiled, inputs, dy), results(name, fn, inputs, dy))


@pytest.mark.gpu
@each_sample
def test_compile_with_inductor(name, sample):
    fn, inputs, dy = call(name, sample)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True)
    assert_same(results(name, compiled, inputs, dy), results(name, fn, inputs, dy))


# --- autocast -----------------------------------------------------------------------------------


@each_sample
def test_autocast(name, sample):
    fn, inputs, dy = call(name, sample)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        y = fn(*inputs)
    keeps = name in AUTOCAST_FLOAT32 | AUTOCAST_KEEPS
    assert y.dtype == (torch.float32 if keeps else torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, grads = results(name, fn, inputs, dy.to(y.dtype))
    floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x, g in zip([] if name in NO_GRADIENT else floats, grads, strict=True):
        assert g.dtype == torch.float32 and g.shape == x.shape
    want, want_grads = results(name, fn, inputs, dy)
    for got, expected in zip([y, *grads], [want, *want_grads], strict=True):
        largest = max(dy.abs().max().item(), expected.abs().max().item())
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.05 * largest)


@pytest.mark.parametrize("name", sorted(AUTOCAST_FLOAT32))
def test_autocast_of_16_bit_inputs(name):
    """What comes out of a matmul under autocast: the result is float32, the gradient is not."""
    fn, inputs, dy = call(name, 0)
    inputs[0] = inputs[0].bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, (dx,) = results(name, fn, inputs, dy)
    assert (y.dtype, dx.dtype) == (torch.float32, torch.bfloat16)


# --- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_sample
def test_cuda_graph(name, sample):
    """Captured once, replayed on other values in the same memory."""
    fn, inputs, dy = call(name, sample)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        results(name, fn, inputs, dy)  # compiles the kernels
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(name, fn, inputs, dy)
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.itemsize > 1:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, results(name, fn, inputs, dy))


@pytest.mark.gpu
@each_sample
def test_side_stream(name, sample):
    fn, inputs, dy = call(name, sample)
    want = results(name, fn, inputs, dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = results(name, fn, inputs, dy)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, want)
