"""Layers and models: the parameters of torch.nn, the results of torch.nn, by our kernels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tools.inputs import DEVICE, double, gradients, randn
from tests.tools.tolerance import assert_close
from tilelab.nets import layers
from tilelab.nets.models import MODELS, TorchCNN, build


class ReluAfter(nn.Module):
    """The torch.nn twin of a layer with activation="relu"."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).relu()


class PoolAfter(ReluAfter):
    def forward(self, x):
        return F.max_pool2d(super().forward(x), 2)


class Flattened(ReluAfter):
    def forward(self, x):
        return super().forward(x.flatten(1))


# name: (our layer, torch.nn's with the same parameters, what wraps it, an input's shape, terms)
LAYERS = {
    "linear": (lambda: layers.Linear(7, 5), lambda: nn.Linear(7, 5), None, (4, 7), 7),
    "linear, no bias": (
        lambda: layers.Linear(7, 5, bias=False),
        lambda: nn.Linear(7, 5, bias=False),
        None,
        (4, 7),
        7,
    ),
    "linear of a sequence": (
        lambda: layers.Linear(7, 5, activation="relu"),
        lambda: nn.Linear(7, 5),
        ReluAfter,
        (2, 3, 7),
        7,
    ),
    # Three sizes that differ: were the memory's order flattened, the results would, too.
    "linear of an image": (
        lambda: layers.FlattenLinear((3, 2, 5), 7, activation="relu"),
        lambda: nn.Linear(30, 7),
        Flattened,
        (4, 3, 2, 5),
        30,
    ),
    "conv": (
        lambda: layers.Conv2d(3, 5, (3, 2), stride=2, padding=1),
        lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1),
        None,
        (2, 3, 7, 8),
        18,
    ),
    "conv, groups and dilation": (
        lambda: layers.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False, activation="relu"),
        lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False),
        ReluAfter,
        (2, 4, 8, 9),
        18,
    ),
    "conv by im2col": (
        lambda: layers.Conv2d(3, 5, 3, activation="relu", im2col=True),
        lambda: nn.Conv2d(3, 5, 3),
        ReluAfter,
        (2, 3, 7, 8),
        27,
    ),
    # Sizes that are odd after the convolution: the pool drops a row and a column.
    "fused block": (
        lambda: layers.Conv2dReluPool(3, 5, 3),
        lambda: nn.Conv2d(3, 5, 3),
        PoolAfter,
        (2, 3, 9, 11),
        27,
    ),
    "fused block, padding": (
        lambda: layers.Conv2dReluPool(3, 5, 3, padding=1),
        lambda: nn.Conv2d(3, 5, 3, padding=1),
        PoolAfter,
        (2, 3, 6, 8),
        27,
    ),
    "separate block": (
        lambda: layers.Conv2dReluPool(3, 5, 3, how="separate"),
        lambda: nn.Conv2d(3, 5, 3),
        PoolAfter,
        (2, 3, 9, 11),
        27,
    ),
    "im2col block": (
        lambda: layers.Conv2dReluPool(3, 5, 3, how="im2col"),
        lambda: nn.Conv2d(3, 5, 3),
        PoolAfter,
        (2, 3, 9, 11),
        27,
    ),
}


@pytest.fixture(params=LAYERS)
def pair(request):
    """Our layer and torch.nn's, each made after the same seed, and the rest of the table."""
    make_ours, make_theirs, wrap, shape, terms = LAYERS[request.param]
    torch.manual_seed(3)
    ours = make_ours()
    after_ours = torch.rand(1)
    torch.manual_seed(3)
    theirs = make_theirs()
    assert torch.equal(torch.rand(1), after_ours), "uses the random generator as torch.nn does not"
    return ours, theirs, wrap or (lambda layer: layer), shape, terms


def test_same_seed_same_parameters(pair):
    ours, theirs, *_ = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert value.abs().max() > 0.01  # equal zeros would prove nothing


def test_state_dict_goes_both_ways(pair):
    ours, theirs, *_ = pair
    values = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    ours.load_state_dict(values)
    theirs.load_state_dict(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_filters_are_channels_last_and_stay_so(pair):
    ours, theirs, *_ = pair
    assert all(p.is_contiguous() for p in theirs.parameters())
    for assign in (False, True):
        if assign and not isinstance(ours, layers.FlattenLinear):
            continue  # the caller's tensors become the parameters, and lie as they lie
        ours.load_state_dict(theirs.state_dict(), assign=assign)
        for p in (*ours.parameters(), *copy.deepcopy(ours).half().parameters()):
            memory = torch.channels_last if p.dim() == 4 else torch.contiguous_format
            assert p.is_contiguous(memory_format=memory)


def test_a_linear_of_images_names_what_does_not_fit():
    layer, wrong = layers.FlattenLinear((3, 2, 4), 5), nn.Linear(25, 5).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .*\[5, 25\]"):
        layer.load_state_dict(wrong)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_and_gradients_are_those_of_torch(pair, layout):
    ours, theirs, wrap, shape, terms = pair
    ours, twin = ours.to(DEVICE), wrap(copy.deepcopy(theirs).double().to(DEVICE))
    x = randn(*shape, layout=layout)
    dy = randn(*twin(double(x)).shape, seed=1)
    y, dx, grads = with_gradients(ours, x, dy)
    y64, dx64, grads64 = with_gradients(twin, double(x), double(dy))
    assert_close(y, y64, dtype=torch.float32, terms=terms, name="y")
    # An element of dx, of a weight's or a bias's gradient: a sum over at most all of dy.
    assert_close(dx, dx64, dtype=torch.float32, terms=dy.numel(), name="dx")
    for (name, grad), (_, grad64) in zip(grads.items(), grads64.items(), strict=True):
        assert_close(grad, grad64, dtype=torch.float32, terms=dy.numel(), name=name)


def with_gradients(module, x, dy):
    y, (dx,) = gradients(module, [x], dy)
    loss = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(loss, parameters, dy), strict=True))
    for name, owner in module.named_modules():  # as a state_dict would have them
        if isinstance(owner, layers.FlattenLinear):
            key = f"{name}.weight".removeprefix(".")
            grads[key] = grads[key].flatten(1)
    return y, dx, grads


def test_softmax_is_that_of_torch():
    x = randn(4, 6, 5)
    for dim in (-1, 1):
        y = layers.Softmax(dim)(x)
        assert_close(y, double(x).softmax(dim), dtype=torch.float32, terms=6)


def test_max_pool_is_that_of_torch():
    x = randn(2, 3, 9, 8)
    for arguments in ((2,), (3, 2, 1), ((3, 2), (1, 2))):
        y = layers.MaxPool2d(*arguments)(x)
        assert_close(y, nn.MaxPool2d(*arguments)(double(x)), dtype=torch.float32, terms=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 2},
    ],
    ids=str,
)
def test_cross_entropy_loss_is_that_of_torch(options):
    logits, target = randn(12, 5), torch.arange(12, device=DEVICE) % 5
    loss = layers.CrossEntropyLoss(**options)(logits, target)
    want = nn.CrossEntropyLoss(**options)(double(logits), target)
    assert_close(loss, want, dtype=torch.float32, terms=12 * 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Linear(3, 4, activation="tanh"), "activation .* 'tanh'"),
        (lambda: layers.Conv2d(3, 4, 3, activation="tanh"), "activation .* 'tanh'"),
        (lambda: layers.Conv2dReluPool(3, 4, 3, how="winograd"), "how .* 'winograd'"),
    ],
)
def test_wrong_arguments_are_refused_when_the_layer_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Linear(3, 4), (2, 5)),
        (layers.Conv2d(3, 4, 3), (2, 5, 9, 9)),
        (layers.Conv2dReluPool(3, 4, 3), (2, 5, 9, 9)),
        (layers.Conv2dReluPool(3, 4, 3), (3, 9, 9)),
        (layers.FlattenLinear((3, 2, 4), 5), (2, 3, 4, 2)),
        (layers.FlattenLinear((3, 2, 4), 5), (2, 24)),
    ],
    ids=[
        "linear, width",
        "conv, channels",
        "block, channels",
        "block, no batch",
        "image, turned",
        "image, flat",
    ],
)
def test_wrong_shapes_are_refused(layer, shape):
    with pytest.raises(ValueError):
        layer.to(DEVICE)(randn(*shape))


# --- models -------------------------------------------------------------------------------------

CNNS = [name for name in MODELS if name.startswith("cnn")]


def test_the_demo_network_has_12810_parameters():
    model = build("cnn", (1, 28, 28), 10)
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == {
        "conv1.weight": (16, 1, 3, 3),
        "conv1.bias": (16,),
        "conv2.weight": (32, 16, 3, 3),
        "conv2.bias": (32,),
        "fc.weight": (10, 32, 5, 5),
        "fc.bias": (10,),
    }
    assert model.state_dict()["fc.weight"].shape == (10, 800)
    assert sum(value.numel() for value in model.parameters()) == 12_810


def test_all_cnns_start_alike_and_share_a_state_dict():
    states = {}
    for name in CNNS:
        torch.manual_seed(5)
        model = build(name, (1, 14, 13), 7)
        states[name] = model.state_dict()
        model.load_state_dict(states[CNNS[0]])
    for state in states.values():
        for key, value in states["cnn-torch"].items():
            assert torch.equal(state[key], value), key


# More than one channel, height unlike width, and 2 x 3 pixels left to flatten: were the memory's
# order flattened, and not the logical one, the results would differ.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in CNNS if name != "cnn-torch"])
def test_each_cnn_is_its_twin(name, layout):
    model = build(name, (3, 14, 19), 7).to(DEVICE)
    twin = TorchCNN((3, 14, 19), 7).to(DEVICE).double()
    twin.load_state_dict(model.state_dict())
    x, dy = randn(4, 3, 14, 19, layout=layout), randn(4, 7, seed=1)
    y, dx, grads = with_gradients(model, x, dy)
    y64, dx64, grads64 = with_gradients(twin, double(x), double(dy))
    # Three layers of sums, of 27, 144 and 192 terms, whose errors add.
    assert_close(y, y64, dtype=torch.float32, terms=3 * 192, roundings=3)
    assert_close(dx, dx64, dtype=torch.float32, terms=3 * 288, roundings=6, name="dx")
    for key, grad in grads.items():
        assert_close(
            grad, grads64[key], dtype=torch.float32, terms=4 * 12 * 17, roundings=6, name=key
        )


def test_the_mlp_is_its_twin():
    model = build("mlp", (1, 9, 8), 5).to(DEVICE)
    twin = nn.Sequential(nn.Flatten(), nn.Linear(72, 128), nn.ReLU(), nn.Linear(128, 5))
    twin = twin.double().to(DEVICE)
    twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values(), strict=True)))
    x, dy = randn(6, 1, 9, 8), randn(6, 5, seed=1)
    y, dx, grads = with_gradients(model, x, dy)
    y64, dx64, grads64 = with_gradients(twin, double(x), double(dy))
    assert_close(y, y64, dtype=torch.float32, terms=72 + 128, roundings=2)
    assert_close(dx, dx64, dtype=torch.float32, terms=5 + 128, roundings=3, name="dx")
    for (key, grad), grad64 in zip(grads.items(), grads64.values(), strict=True):
        assert_close(grad, grad64, dtype=torch.float32, terms=128, roundings=3, name=key)


@pytest.mark.parametrize("shape", [(1, 10, 10), (1, 11, 10)])
def test_the_smallest_images_fit(shape):
    assert build("cnn", shape, 2).to(DEVICE)(randn(1, *shape)).shape == (1, 2)


@pytest.mark.parametrize("name", ["cnn", "cnn-torch"])
def test_too_small_images_are_refused(name):
    with pytest.raises(ValueError, match="at least 10 x 10.* 28 x 9"):
        build(name, (1, 28, 9), 10)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="one of cnn, .* 'resnet'"):
        build("resnet", (1, 28, 28), 10)
