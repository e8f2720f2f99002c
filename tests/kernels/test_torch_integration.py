"""Every public op inside torch: opcheck, torch.compile, autocast, CUDA graphs, streams.

SAMPLES holds a call or two of each op; an op of `kernels.__all__` without one fails. What is
compared here is the op with itself under another part of torch, bit for bit: other files show that
it is right.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tools.inputs import DEVICE, gradients, randn
from tilelab import kernels
from tilelab.kernels.conv2d_stack import Layer


def images(*shape, seed=0):
    return randn(*shape, layout="channels_last", seed=seed)


def eight_bit(*shape, dtype, seed=0):
    return (20 * randn(*shape, seed=seed)).to(dtype)


def classes(*shape, high):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


# name: [(inputs, options)]; floating tensors among the inputs get gradients, if the op has any
SAMPLES = {
    "bias_activation": lambda: [
        ([randn(9, 6), randn(6, seed=1), "gelu"], {}),
        ([images(2, 5, 4, 3), randn(5, seed=1), "silu"], {}),
        ([randn(9, 6, layout="transposed"), None, "gelu_tanh"], {}),
    ],
    "bias_relu": lambda: [
        ([randn(9, 6), randn(6, seed=1)], {}),
        ([images(2, 5, 4, 3), randn(5, seed=1)], {}),
    ],
    "matmul": lambda: [
        ([randn(9, 7), randn(7, 5, seed=1), randn(5, seed=2)], dict(activation="relu")),
        ([randn(9, 7, layout="transposed"), randn(7, 5, seed=1), randn(5, seed=2)], {}),
        ([randn(9, 7), randn(7, 5, layout="transposed", seed=1), randn(5, seed=2)], {}),
        ([randn(9, 7), randn(7, 5, seed=1), randn(5, seed=2)], dict(activation="gelu")),
    ],
    "conv2d": lambda: [
        (
            [images(2, 18, 6, 5), randn(4, 18, 3, 2, seed=1), randn(4, seed=2)],
            dict(stride=(2, 1), padding=1, activation="relu"),
        ),
        ([randn(2, 4, 6, 5), randn(6, 2, 3, 3, seed=1)], dict(dilation=2, padding=2, groups=2)),
        ([images(2, 3, 6, 5), randn(4, 3, 2, 2, seed=1), randn(4, seed=2)], {}),
        ([images(2, 3, 6, 5), randn(4, 3, 2, 2, seed=1)], dict(activation="silu")),
    ],
    "conv2d_im2col": lambda: [
        (
            [images(2, 3, 6, 5), randn(4, 3, 3, 2, seed=1), randn(4, seed=2)],
            dict(stride=2, padding=1, activation="relu"),
        ),
    ],
    "im2col": lambda: [([images(2, 3, 6, 5), (3, 2)], dict(stride=2, padding=1))],
    "col2im": lambda: [
        ([randn(2 * 3 * 3, 3 * 2 * 3), (2, 3, 6, 5), (3, 2)], dict(stride=2, padding=1))
    ],
    "conv2d_relu_pool": lambda: [
        ([images(2, 3, 8, 7), randn(4, 3, 3, 3, seed=1), randn(4, seed=2)], {}),
        ([randn(2, 1, 8, 7), randn(4, 1, 3, 2, seed=1)], dict(padding=1)),
    ],
    "conv2d_stack": lambda: [
        (
            [
                images(2, 3, 8, 7),
                *(randn(4, 3, 3, 3, seed=1) / 5, randn(4, seed=2)),
                *(randn(6, 2, 3, 2, seed=3) / 5, None),
                *(randn(5, 6, 2, 2, seed=4) / 5, randn(5, seed=5)),
            ],
            dict(layers=(Layer(padding=1), Layer(stride=(1, 2), groups=2), Layer(pool=True))),
        ),
    ],
    "scaled_matmul": lambda: [
        (
            [
                eight_bit(9, 32, dtype=torch.float8_e4m3fn),
                eight_bit(16, 32, dtype=torch.float8_e4m3fn, seed=1).t(),
                randn(9, seed=2),
                randn(1, 16, seed=3),
                randn(16, dtype=torch.bfloat16, seed=4),
            ],
            dict(activation="relu"),
        ),
        (
            [
                eight_bit(9, 7, dtype=torch.int8),
                eight_bit(7, 5, dtype=torch.int8, seed=1),
                randn(1, seed=2)[0],
                randn(1, seed=3)[0],
            ],
            {},
        ),
    ],
    "softmax": lambda: [([randn(9, 7)], {}), ([images(2, 5, 4, 3)], dict(dim=1))],
    "cross_entropy": lambda: [
        ([randn(9, 7), classes(9, high=7)], {}),
        (
            [randn(9, 7), classes(9, high=7)],
            dict(ignore_index=3, label_smoothing=0.1, reduction="none"),
        ),
    ],
    "max_pool2d": lambda: [
        ([images(2, 5, 8, 7), 2], {}),
        ([randn(2, 5, 8, 7), (3, 2)], dict(stride=(2, 1), padding=1)),
    ],
}
OPTIMIZERS = {"SGD", "AdamW"}  # no functions of tensors: test_optim.py has them
NO_GRADIENT = {"scaled_matmul"}
AUTOCAST_FLOAT32 = {"softmax", "cross_entropy"}  # as in torch; max_pool2d keeps what it gets
AUTOCAST_KEEPS = {"max_pool2d", "im2col", "col2im"}

each_sample = pytest.mark.parametrize(
    "name, sample",
    [(name, i) for name in SAMPLES for i in range(len(SAMPLES[name]()))],
    ids=lambda v: f"sample {v}" if isinstance(v, int) else v,
)


def call(name, sample):
    """(function of its tensors, its inputs, an output gradient) of one sample."""
    inputs, options = SAMPLES[name]()[sample]
    op = getattr(kernels, name)

    def fn(*xs):
        return op(*xs, **options)

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


def test_every_public_op_has_a_sample():
    assert set(SAMPLES) == set(kernels.__all__) - OPTIMIZERS


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
    seen = {str(op) for name in SAMPLES for i in range(len(SAMPLES[name]()))
            for op, _, _ in recorded(name, i)}  # fmt: skip
    ours = {f"{op.replace('::', '.')}.default" for op in torch._C._dispatch_get_all_op_names()
            if op.startswith("tilelab::")}  # fmt: skip
    assert seen == ours


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "name, sample, dynamic",
    [(name, i, i == 0) for name in SAMPLES for i in range(len(SAMPLES[name]()))]
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
        torch.testing.assert_close(
            got.float(), expected.float(), rtol=0.05, atol=0.05 * dy.abs().max().item()
        )


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
