"""No layer converts what another has written: from image to logits all is channels_last.

A conversion is a kernel of its own that moves every byte and computes nothing. It is easy to have
and hard to see, since results are right: `flatten`, `reshape`, `contiguous` and `to` copy where the
strides do not fit, and say nothing. So a whole forward pass is watched, operator by operator.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tools.inputs import DEVICE, randn
from tilelab.nets import layers
from tilelab.nets.imagenet import VGG16, ResNet50
from tilelab.nets.models import MODELS, build
from tilelab.nets.train import Images

# What may happen beside our operators and views. None of them moves a tensor for its layout.
POINTWISE = ("aten.add_.Tensor", "aten.relu_.default", "aten.mean.dim")  # of ResNet-50's sums


class Conversions(TorchDispatchMode):
    """Lists, as `found`, what would convert a layout, and as `seen` all that was called."""

    def __init__(self, allowed=()):
        super().__init__()
        self.allowed, self.found, self.seen = allowed, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, given, made = str(func), tensors_in((args, kwargs)), tensors_in(result)
        self.seen.append(name)
        cast = name == "aten._to_copy.default" and (
            made[0].dtype != given[0].dtype and made[0].stride() == given[0].stride()
        )
        if not (name.startswith("tilelab.") or name in self.allowed or is_view(func) or cast):
            self.found.append(f"{name} copies, or is unknown")
        if not is_view(func):  # a permuted view is no image
            for role, images in (("reads", given), ("writes", made)):
                for x in images:
                    if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
                        self.found.append(f"{name} {role} {list(x.shape)}, {x.stride()}")
        return result


def is_view(func):
    """Whether what it returns shares the memory of what it was given, which it leaves alone."""
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [t for part in parts for t in tensors_in(part)]


def conversions(model, x, allowed=()):
    """What the forward pass of `model` converts, with gradients and without."""
    found = []
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients), Conversions(allowed) as watch:
            model(x)
        assert any(name.startswith("tilelab.") for name in watch.seen)
        found += watch.found
    return found


def image(*shape, dtype=torch.float32):
    return randn(*shape, dtype=dtype, layout="channels_last")


OURS = [name for name in MODELS if name not in ("cnn-torch", "vgg16")]
IMAGE = (3, 14, 19)  # several channels, and 2 x 3 pixels left for the linear layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OURS)
def test_the_models_convert_nothing(name, dtype):
    model = build(name, IMAGE, 7).to(DEVICE, dtype)
    assert conversions(model, image(4, *IMAGE, dtype=dtype)) == []


def test_vgg16_converts_nothing():
    model = VGG16((3, 64, 32), 7, width=4).to(DEVICE)  # 2 x 1 pixels left
    assert conversions(model, image(2, 3, 64, 32)) == []


def test_resnet50_converts_nothing():
    model = ResNet50(7, width=4, blocks=(2, 2, 1, 1)).to(DEVICE)
    assert conversions(model, image(2, 3, 40, 33), POINTWISE) == []


@pytest.mark.parametrize("name", OURS)
def test_autocast_changes_dtypes_and_no_layout(name):
    model = build(name, IMAGE, 7).to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        assert conversions(model, image(4, *IMAGE)) == []


def test_images_of_the_data_sets_are_channels_last():
    part = Images(torch.zeros(4, 14, 19, dtype=torch.uint8), torch.zeros(4), 0.0, 1.0, DEVICE)
    x = part.input(part.images)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert conversions(build("cnn", (1, 14, 19), 7).to(DEVICE), x) == []


@pytest.mark.parametrize("name", OURS)
def test_gradients_lie_as_their_parameters_do_without_a_copy(name):
    model, x = build(name, IMAGE, 7).to(DEVICE), image(4, *IMAGE)
    y = model(x)
    with Conversions() as watch:
        y.backward(randn(4, 7, seed=1))
    assert not [call for call in watch.seen if "copy" in call or "clone" in call], watch.seen
    assert any("weight_grad" in call or "matmul" in call for call in watch.seen)
    for p in model.parameters():
        assert p.grad.stride() == p.stride()


# --- teeth ----------------------------------------------------------------------------------------


class Flatten(nn.Module):
    """The linear layer as torch.nn would have it."""

    def __init__(self, layer):
        super().__init__()
        self.linear = layers.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Contiguous(nn.Module):
    """A layer whose output somebody has made contiguous."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).contiguous()


def test_a_flatten_is_found():
    model = build("cnn", IMAGE, 7).to(DEVICE)
    model.fc = Flatten(model.fc).to(DEVICE)
    assert any("aten.clone" in line for line in conversions(model, image(4, *IMAGE)))


def test_a_layer_that_is_given_contiguous_images_is_found():
    model = build("cnn", IMAGE, 7).to(DEVICE)
    assert "tilelab.conv2d_relu_pool.default reads [4, 3, 14, 19]" in str(
        conversions(model, randn(4, *IMAGE))
    )
    model.conv1 = Contiguous(model.conv1)
    found = str(conversions(model, image(4, *IMAGE)))
    assert "aten.clone.default copies" in found
    assert "tilelab.conv2d_relu_pool.default reads [4, 16, 6, 8]" in found


@pytest.mark.parametrize("name", ["conv2", "fc"])
def test_contiguous_filters_are_found(name):
    model = build("cnn", IMAGE, 7).to(DEVICE)
    layer = getattr(model, name)
    layer.weight = nn.Parameter(layer.weight.detach().contiguous())
    assert conversions(model, image(4, *IMAGE))


def test_a_change_of_layout_within_a_residual_sum_is_found():
    model = ResNet50(7, width=4, blocks=(2,)).to(DEVICE)
    model.layer1[0].downsample.append(nn.Upsample(scale_factor=1))  # any operator that is not ours
    assert "copies, or is unknown" in str(conversions(model, image(2, 3, 40, 33), POINTWISE))
