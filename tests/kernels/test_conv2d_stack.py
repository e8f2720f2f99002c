"""conv2d_stack and nets.layers.ConvStack: a stack of convolutions that goes back as one."""

import copy
import importlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tests.tools.convolutions import integers
from tests.tools.inputs import DEVICE, DTYPES, INTERPRET, double, gradients, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, _tiles, conv2d, conv2d_relu_pool, conv2d_stack
from tilelab.kernels.conv2d_stack import Layer, reference
from tilelab.nets.imagenet import torch_vgg16_features, vgg16_features
from tilelab.nets.layers import Conv2d, Conv2dReluPool, ConvStack

gradient = importlib.import_module("tilelab.kernels.conv2d_relu_pool_grad")
UNPOOL = dict(kernel="unpool", BLOCK_M=16, BLOCK_N=16, num_warps=4)
H100 = _launch.Device(90, sms=132)

# name: layers and their filters; every pair of neighbours with and without a pool is among them
STACKS = {
    "one": [(Layer(padding=1), 4, (3, 3))],
    "one with a pool": [(Layer(True, padding=1), 4, (3, 3))],
    "two": [(Layer(padding=1), 4, (3, 3)), (Layer(padding=1), 5, (3, 3))],
    "a pool behind": [(Layer(padding=1), 4, (3, 3)), (Layer(True), 5, (2, 3))],
    "a pool before": [(Layer(True), 4, (2, 3)), (Layer(padding=1), 5, (3, 3))],
    "two pools": [(Layer(True, padding=1), 4, (3, 3)), (Layer(True), 5, (2, 2))],
    "of all kinds": [
        (Layer(padding=(0, 1)), 4, (3, 2)),
        (Layer(stride=(1, 2), padding=1), 6, (3, 3)),
        (Layer(True, padding=1), 4, (3, 3)),
        (Layer(groups=2, dilation=(2, 1), padding=2), 6, (3, 3)),
        (Layer(padding=0), 3, (1, 1)),
    ],
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def make(stack, dtype=torch.float32, values=randn, bias=True):
    """x, the parameters and the layers."""
    inputs, channels = [values(2, 3, 11, 12, dtype=dtype)], 3
    for i, (layer, filters, taps) in enumerate(stack):
        shape = filters, channels // layer.groups, *taps
        inputs.append(values(*shape, dtype=dtype, seed=2 * i + 1))
        inputs.append(values(filters, dtype=dtype, seed=2 * i + 2).abs() if bias else None)
        channels = filters
    return inputs, tuple(layer for layer, _, _ in stack)


def stacked(layers, fn=conv2d_stack):
    return lambda *inputs: fn(*inputs, layers=layers)


def one_by_one(x, *parameters, layers):
    """The same by our operators: what a stack goes back in fewer passes than."""
    for layer, weight, bias in zip(layers, parameters[::2], parameters[1::2], strict=True):
        if layer.pool:
            x = conv2d_relu_pool(x, weight, bias, layer.padding)
        else:
            x = conv2d(x, weight, bias, *layer[1:], activation="relu")
    return x


def results(fn, inputs, seed=9):
    with torch.no_grad():
        y = fn(*inputs)
    return gradients(fn, inputs, randn(*y.shape, dtype=y.dtype, seed=seed))


def assert_same(got, want):
    assert torch.equal(got[0], want[0]) and got[0].any()
    for g, w in zip(got[1], want[1], strict=True):
        assert torch.equal(g, w) and g.stride() == w.stride() and g.any()


@pytest.mark.core
@pytest.mark.parametrize(
    "bias, dtype", [(True, torch.float32), (False, torch.bfloat16)], ids=["bias", "no bias"]
)
@every_stack
def test_the_same_bits_as_layer_by_layer(stack, bias, dtype):
    """Where the same kernels run: as these do, whose input gradient has the ReLU behind it."""
    inputs, layers = make(stack, dtype, bias=bias)
    with poison() as p:
        got = results(stacked(layers), [t if t is None else p(t) for t in inputs])
    assert_same(got, results(stacked(layers, one_by_one), inputs))


@pytest.mark.parametrize("name", [name for name in STACKS if "pool" in name or "kinds" in name])
def test_the_same_bits_where_pools_scatter(name):
    inputs, layers = make(STACKS[name], DTYPES[len(STACKS[name]) % 3])
    with _tiles.use_tile("unpool", UNPOOL):
        assert_same(*(results(stacked(layers, f), inputs) for f in (conv2d_stack, one_by_one)))


@every_stack
def test_against_float64(stack):
    """In integers, exactly: ties and zeros included."""
    inputs, layers = make(stack, values=integers)
    if len(stack) > 3:
        inputs[1::2] = [weight.clamp(-1, 1) for weight in inputs[1::2]]  # or sums are not exact
    y, grads = results(stacked(layers), inputs)
    dy = randn(*y.shape, seed=9)
    y64, grads64 = gradients(stacked(layers, reference), double(*inputs), double(dy))
    assert torch.equal(y.double(), y64)
    for i, (got, want) in enumerate(zip(grads, grads64, strict=True)):
        assert_close(got, want, dtype=torch.float32, terms=1000, roundings=8, name=str(i))


FROZEN = ["x", "w0", "b0", "w1", "b1", "w2", "b2", "w3 b3", "w4", "w0 w1 w2 w3 w4", "b4 x"]


@pytest.mark.parametrize(
    "wanted, scatter",
    [(wanted, False) for wanted in FROZEN] + [(wanted, True) for wanted in ("x", "w2", "b2")],
)
def test_only_the_gradients_that_are_wanted(wanted, scatter):
    inputs, layers = make(STACKS["of all kinds"])
    names = ["x", *(f"{kind}{i}" for i in range(len(layers)) for kind in "wb")]
    found = []
    for fn in (conv2d_stack, one_by_one):
        leaves = [t.clone().requires_grad_(n in wanted) for t, n in zip(inputs, names, strict=True)]
        with _tiles.use_tile("unpool", UNPOOL if scatter else gradient.FUSED):
            y = fn(*leaves, layers=layers)
            y.backward(randn(*y.shape, seed=9))
        found.append({n: t.grad for n, t in zip(names, leaves, strict=True) if t.grad is not None})
    got, want = found
    assert set(got) == set(want) == set(wanted.split())
    assert all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("wanted", ["w2 b2", "x w0 b0 w1 b1 w2 b2 w3 b3 w4 b4"])
def test_compiled_with_frozen_layers(wanted):
    inputs, layers = make(STACKS["of all kinds"])
    names = ["x", *(f"{kind}{i}" for i in range(len(layers)) for kind in "wb")]
    torch._dynamo.reset()
    compiled = torch.compile(stacked(layers), fullgraph=True, backend="aot_eager")
    found = []
    for fn in (compiled, stacked(layers)):
        leaves = [
            t.clone().requires_grad_(n in wanted.split())
            for t, n in zip(inputs, names, strict=True)
        ]
        y = fn(*leaves)
        grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], torch.ones_like(y))
        found.append((y.detach(), list(grads)))
    assert_same(*found)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: conv2d_stack(x, layers=()), "each of 0 layers, .* got 0"),
        (lambda x, w: conv2d_stack(x, w, layers=(Layer(),)), "each of 1 layers, .* got 1"),
        (lambda x, w: conv2d_stack(x, w, None, w, None, layers=(Layer(),) * 2), "weight must be"),
        (lambda x, w: conv2d_stack(x, w[..., :7], None, layers=(Layer(True),)), "2x2 to pool"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(randn(2, 3, 7, 7), randn(4, 3, 7, 7, seed=1))


# --- ConvStack ----------------------------------------------------------------------------------


def small_stack():
    torch.manual_seed(0)
    return ConvStack(
        OrderedDict(
            a=Conv2d(3, 4, 3, padding=1, activation="relu"),
            b=Conv2dReluPool(4, 6, 3, padding=1),
            c=Conv2d(6, 5, 3, activation="relu"),
        )
    ).to(DEVICE)


def with_gradients(model, x, dy):
    leaf = x.detach().clone().requires_grad_()
    y = model(leaf)
    return y.detach(), list(torch.autograd.grad(y, [leaf, *model.parameters()], dy))


def test_a_stack_is_a_sequential_but_for_its_backward():
    stack = small_stack()
    plain = nn.Sequential(OrderedDict(copy.deepcopy(list(stack.named_children()))))
    assert list(stack.state_dict()) == list(plain.state_dict()) and len(stack) == 3
    x, dy = randn(2, 3, 12, 10, layout="channels_last"), randn(2, 5, 4, 3, seed=1)
    want = with_gradients(plain, x, dy)
    assert_same(with_gradients(stack, x, dy), want)
    with torch.no_grad():
        assert torch.equal(stack(x), want[0])


def test_a_stack_that_is_used_twice():
    stack = small_stack()
    plain = nn.Sequential(OrderedDict(stack.named_children()))
    x, dy = randn(2, 3, 12, 10), randn(2, 5, 4, 3, seed=1)

    def twice(model):
        return lambda x: model(x) + 2 * model(x.flip(0))

    found = []
    for model in (stack, plain):
        y = twice(model)(x)
        found.append((y.detach(), list(torch.autograd.grad(y, list(stack.parameters()), dy))))
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stack_under_autocast(dtype):
    stack = small_stack()
    plain = nn.Sequential(OrderedDict(stack.named_children()))
    x, dy = randn(2, 3, 12, 10), randn(2, 5, 4, 3, seed=1).to(dtype)
    with torch.autocast(DEVICE, dtype):
        found = [with_gradients(model, x, dy) for model in (stack, plain)]
    assert_same(*found)
    assert found[0][0].dtype == dtype and {g.dtype for g in found[0][1]} == {torch.float32}


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Conv2d(3, 4, 3),
        lambda: Conv2d(3, 4, 3, activation="relu", im2col=True),
        lambda: Conv2dReluPool(3, 4, 3, how="separate"),
        lambda: nn.Conv2d(3, 4, 3),
    ],
    ids=["no ReLU", "im2col", "a pool of its own", "torch.nn's"],
)
def test_what_a_stack_cannot_have_is_refused_when_it_is_made(layer):
    with pytest.raises(TypeError, match="a stack is of Conv2d.*, got Conv2d"):
        ConvStack(layer())


# --- VGG16's ------------------------------------------------------------------------------------


def saved_bytes(call, parameters):
    """What autograd keeps from the forward to the backward, each memory once, no parameters."""
    storages, known = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(storages.values()), y


def test_vgg16_keeps_its_activations_and_a_byte_a_pooled_output():
    """Of torch.nn's layers the pools keep eight bytes, and what they read; the rest is the same."""
    x = randn(1, 3, 32, 32, layout="channels_last")
    ours, theirs = vgg16_features(width=4).to(DEVICE), torch_vgg16_features(width=4).to(DEVICE)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    found, y = saved_bytes(lambda: ours(x), ours.parameters())
    # Pixels times channels, of the outputs without and with a pool.
    plain = 1024 * 4 + 256 * 8 + 2 * 64 * 16 + 2 * 16 * 32 + 2 * 4 * 32
    pooled = 256 * 4 + 64 * 8 + 16 * 16 + 4 * 32 + 32
    assert found == 4 * (x.numel() + plain + pooled - y.numel()) + pooled
    torchs, y64 = saved_bytes(lambda: theirs(x), theirs.parameters())
    unpooled = 1024 * 4 + 256 * 8 + 64 * 16 + 16 * 32 + 4 * 32  # what the pools read
    assert torchs == 4 * (x.numel() + plain + pooled - y.numel() + unpooled) + 8 * pooled
    assert_close(y, double(y64), dtype=torch.float32, terms=13 * 288, roundings=13)


def counted(counts, name, result):
    """An operator that launches nothing, and is counted."""

    def call(*args):
        counts[name] += 1
        return result(*args)

    return call


def input_gradient(dy, weight, size, *geometry):
    return dy.new_empty(size)


def both_before(dy, weight, x, *geometry):
    return torch.empty_like(x), x.new_empty(x.shape[1])


def weight_gradient(x, dy, weight, *geometry):
    return torch.empty_like(weight)


@pytest.mark.skipif(not INTERPRET, reason="records on CPU tensors")
def test_the_launches_of_vgg16s_backward(monkeypatch):
    """At full width on an H100, in bfloat16: no pass for a ReLU or a pool that could be another's.

    The input gradient and the ReLU before it are one operator: what it launches, and what the
    weight's gradient does, is those lessons' concern.
    """
    counts = dict(dx=0, dz=0, dw=0)
    for module in (gradient, importlib.import_module("tilelab.kernels.conv2d_stack")):
        monkeypatch.setattr(module, "conv2d_input_grad", counted(counts, "dx", input_gradient))
        monkeypatch.setattr(module, "conv2d_input_grad_relu", counted(counts, "dz", both_before))
        monkeypatch.setattr(module, "conv2d_weight_grad", counted(counts, "dw", weight_gradient))
    features = vgg16_features().bfloat16()
    x = torch.empty(2, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with _launch.record(H100):
        y = features(x)
    with _launch.record(H100) as events:
        y.backward(torch.empty_like(y))
    kernels = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    # Of thirteen layers five have a pool. Eight are followed by a layer that masks for them.
    assert counts == dict(dx=4, dz=8, dw=13)
    assert kernels.count("unpool_kernel") == 5 and kernels.count("sum_partials_kernel") == 5
    assert len(kernels) == 10
