"""VGG16 and ResNet-50 against torch.nn, small: torchvision's names, results, folded batch-norms."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tools.inputs import DEVICE, double, randn
from tests.tools.tolerance import assert_close
from tilelab.nets.imagenet import VGG16, Bottleneck, ResNet50, fold
from tilelab.nets.models import build
from tilelab.perf.work import networks


def torch_vgg16(shape, classes, width):
    """torchvision's vgg16, but for the average pool and dropout: nn.Sequential in its order."""
    features, channels = [], shape[0]
    for factor, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            features += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
        features.append(nn.MaxPool2d(2))
    units = 64 * width
    classifier = nn.Sequential(
        nn.Linear(channels * (shape[1] // 32) * (shape[2] // 32), units),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(units, units),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(units, classes),
    )
    model = nn.Sequential()
    model.features, model.flatten, model.classifier = (
        nn.Sequential(*features),
        nn.Flatten(),
        classifier,
    )
    return model


class TorchBottleneck(nn.Module):
    """torchvision's, with its batch-norms."""

    def __init__(self, channels, width, stride):
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Identity()
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class TorchResNet(nn.Module):
    """torchvision's resnet50, of any width and depth."""

    def __init__(self, classes, width, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        channels, self.stages = width, []
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for block in range(count):
                layer.append(TorchBottleneck(channels, width << stage, 1 + (stage > 0 == block)))
                channels = 4 * (width << stage)
            self.add_module(f"layer{stage + 1}", layer)
            self.stages.append(f"layer{stage + 1}")
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


def trained(model, seed=0):
    """The model with batch-norms as training leaves them: none of their numbers is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(norm.running_var, 0.5, 1.5, generator=generator)
    return model.eval()


# --- VGG16 --------------------------------------------------------------------------------------

SMALL = (3, 96, 64)  # 3 x 2 pixels left: an order of (h, w) or of (c, h, w) that is wrong shows


@pytest.fixture(scope="module")
def vgg():
    """Ours, small, and its twin in float64."""
    torch.manual_seed(0)
    ours, twin = VGG16(SMALL, 7, width=4), torch_vgg16(SMALL, 7, 4)
    twin.load_state_dict(ours.state_dict())
    ours.load_state_dict(twin.state_dict())
    return ours.to(DEVICE), twin.double().to(DEVICE)


def test_vgg16_is_its_twin(vgg):
    ours, twin = vgg
    x, dy = randn(2, *SMALL, layout="channels_last"), randn(2, 7, seed=1)
    y, y64 = ours(x), twin(double(x))
    # 16 layers of sums, of 27 to 288 terms, whose errors add.
    assert_close(y, y64, dtype=torch.float32, terms=16 * 288, roundings=16, smallest=1e-5)
    grads = torch.autograd.grad(y, list(ours.parameters()), dy)
    grads64 = torch.autograd.grad(y64, list(twin.parameters()), double(dy))
    for (name, _), grad, grad64 in zip(twin.named_parameters(), grads, grads64, strict=True):
        assert_close(
            grad.reshape(grad64.shape), grad64, dtype=torch.float32, terms=2 * 96 * 64,
            roundings=32, smallest=1e-6, name=name,
        )  # fmt: skip


def parameters_of(network):
    """Names and shapes of the parameters, as perf/work/networks.py counts the layers."""
    found = {}
    for layer in network.layers:
        if isinstance(layer, networks.Conv):
            found[layer.name] = (layer.K, layer.C, layer.R, layer.R)
        elif isinstance(layer, networks.Linear):
            found[layer.name] = (layer.outputs, layer.inputs)
    return found


def test_vgg16_at_full_size_has_torchvisions_parameters():
    with torch.device("meta"):
        state = VGG16().state_dict()
    network = networks.vgg16()
    weights = parameters_of(network)
    assert list(state) == [f"{name}.{kind}" for name in weights for kind in ("weight", "bias")]
    assert {k: tuple(state[f"{k}.weight"].shape) for k in weights} == weights
    assert sum(x.numel() for x in state.values()) == network.parameters == 138_357_544


def test_vgg16_draws_weights_that_keep_the_size_of_gradients():
    torch.manual_seed(0)
    model = VGG16((3, 32, 32), 7, width=16)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for layer in list(model.features)[:4]:
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1))
            # With a variance of 2 / fan_out it is the sum over the channels that stays.
            assert 0.5 < x.square().mean() * layer.out_channels / 3 < 2


@pytest.mark.parametrize("size", [(31, 32), (32, 31), (28, 28)])
def test_vgg16_refuses_images_that_five_pools_leave_nothing_of(size):
    with pytest.raises(ValueError, match=f"at least 32 x 32 .* {size[0]} x {size[1]}"):
        build("vgg16", (1, *size), 10)
    assert build("vgg16", (1, 32, 33), 2).features[0].weight.shape == (64, 1, 3, 3)


# --- ResNet-50 ----------------------------------------------------------------------------------

BLOCKS = (2, 2, 1)  # with and without a shortcut's convolution, stride 1 and 2


@pytest.fixture(scope="module")
def torch_resnet():
    torch.manual_seed(1)
    return trained(TorchResNet(7, 4, BLOCKS)).double()


def test_resnet50_is_its_twin_with_batch_norms(torch_resnet):
    ours = ResNet50(7, width=4, blocks=BLOCKS)
    state = {k: v.float() for k, v in torch_resnet.state_dict().items()}
    before = copy.deepcopy(state)
    ours.load_state_dict(fold(state))
    assert all(torch.equal(state[k], v) for k, v in before.items()), (
        "fold changed what it was given"
    )
    twin = copy.deepcopy(torch_resnet)
    twin.load_state_dict(state)  # the same values, rounded to float32
    x = randn(2, 3, 37, 50, layout="channels_last")  # sizes that halve to odd ones
    y, y64 = ours.to(DEVICE)(x), twin.to(DEVICE)(double(x))
    # 17 layers, each with folded weights that are rounded once more.
    assert_close(y, y64, dtype=torch.float32, terms=17 * 144, roundings=2 * 17)


def test_a_folded_convolution_is_exactly_the_two(torch_resnet):
    state = torch_resnet.state_dict()
    folded = fold(state)
    pairs = 0
    modules = dict(torch_resnet.named_modules())
    for name, norm in modules.items():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        conv = name.replace("downsample.1", "downsample.0").replace("bn", "conv")
        layer, pairs = modules[conv], pairs + 1
        x = double(randn(2, layer.in_channels, 9, 8)).cpu()
        got = F.conv2d(
            x, folded[f"{conv}.weight"], folded[f"{conv}.bias"], layer.stride, layer.padding
        )
        torch.testing.assert_close(got, norm(layer(x)), rtol=0, atol=1e-13)
    assert pairs == 1 + 3 * sum(BLOCKS) + len(BLOCKS)
    assert set(folded) == set(ResNet50(7, width=4, blocks=BLOCKS).state_dict())


def test_fold_takes_the_bias_of_a_convolution_and_another_eps():
    conv, norm = nn.Conv2d(2, 3, 1), trained(nn.BatchNorm2d(3, eps=0.1))
    state = {f"conv1.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"bn1.{k}": v for k, v in norm.state_dict().items()}
    folded = fold(state, eps=0.1)
    x = randn(2, 2, 4, 5, device="cpu")
    got = F.conv2d(x, folded["conv1.weight"], folded["conv1.bias"])
    torch.testing.assert_close(got, norm(conv(x)))
    assert not torch.allclose(folded["conv1.bias"], fold(state)["conv1.bias"])


@pytest.mark.parametrize("lost", ["bn1.weight", "bn1.running_var", "conv1.weight"])
def test_fold_names_what_is_missing(torch_resnet, lost):
    state = torch_resnet.state_dict()
    del state[lost]
    with pytest.raises(ValueError, match=f"batch-norm bn1 of state lacks '{lost}'"):
        fold(state)


def test_resnet50_at_full_size_has_torchvisions_parameters():
    with torch.device("meta"):
        state = ResNet50().state_dict()
    weights = parameters_of(networks.resnet50())
    assert {k: tuple(state[f"{k}.weight"].shape) for k in weights} == weights
    assert len(state) == 2 * len(weights) == 2 * 54


def test_the_two_networks_run_the_layers_that_perf_measures():
    """The sizes of every convolution's input, too; on the meta device, which computes nothing."""
    for network, make in ((networks.vgg16(), VGG16), (networks.resnet50(), ResNet50)):
        with torch.device("meta"):
            model, seen = make(), {}

        def note(module, args, seen=seen):
            seen[module] = tuple(args[0].shape[1:3])

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        with torch.no_grad():  # or a stack would not call its layers one by one
            assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
        got = {name: seen[m] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        convolutions = [layer for layer in network.layers if isinstance(layer, networks.Conv)]
        assert got == {layer.name: (layer.C, layer.H) for layer in convolutions}


def test_a_bottleneck_leaves_its_input_alone():
    x = randn(1, 16, 5, 6, layout="channels_last")
    before = x.clone()
    with torch.no_grad():
        Bottleneck(16, 4, 1).to(DEVICE)(x)
    assert torch.equal(x, before)


def test_gradients_go_through_a_bottleneck():
    ours = Bottleneck(8, 4, 2).to(DEVICE)
    twin = TorchBottleneck(8, 4, 2)
    for norm in [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.eps = 0.0  # which then does nothing, in eval mode
    twin = twin.eval().double().to(DEVICE)
    with torch.no_grad():
        for p in itertools.chain(*(m.parameters() for m in ours.modules() if m is not ours)):
            if p.dim() == 1:
                p.zero_()
    twin.load_state_dict(ours.state_dict(), strict=False)
    x = randn(2, 8, 6, 7, layout="channels_last")
    dy = randn(2, 16, 3, 4, seed=1)
    x64 = double(x).requires_grad_()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ours(x), x, dy)
    (dx64,) = torch.autograd.grad(twin(x64), x64, double(dy))
    assert_close(dx, dx64, dtype=torch.float32, terms=3 * 144, roundings=6)
