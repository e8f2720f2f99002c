"""Shapes: sets are what the networks have, ranges include their ends, mistakes are explained."""

import pytest
import torch

from tilelab.nets.models import TorchCNN
from tilelab.perf.errors import PerfError
from tilelab.perf.work import networks
from tilelab.perf.work.networks import Shape
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.shapes import SETS, describe, shapes


def sizes(op, text):
    return [shape.sizes for shape in shapes(op, text)]


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("resnet50", 161, 25_557_032),
        ("vgg16", 32, 138_357_544),
        ("alexnet", 16, 61_100_840),
        ("demo", 6, 12_810),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, tensors, parameters):
    network = SETS[name].network()
    assert (network.tensors, network.parameters) == (tensors, parameters)
    for op in ("sgd", "adamw"):
        (shape,) = shapes(op, name)  # whatever the batch
        assert shape.sizes["tensors"] == tensors
        assert abs(tensors * shape.sizes["elements"] - parameters) <= tensors / 2
    (shape,) = shapes("adamw", "transformer")
    assert shape.sizes["tensors"] * shape.sizes["elements"] == pytest.approx(124_439_808, rel=1e-6)


def test_resnext_has_the_published_number_of_parameters():
    network = networks.resnet50(groups=32, wider=2)
    assert (network.tensors, network.parameters) == (161, 25_028_904)


@pytest.mark.parametrize(
    "name, layers, unique", [("resnet50", 53, 23), ("vgg16", 13, 9), ("alexnet", 5, 5)]
)
def test_equal_layers_are_measured_once_and_counted(name, layers, unique):
    found = shapes("conv2d", f"{name}@32")
    assert len(found) == unique and sum(shape.count for shape in found) == layers
    assert len({tuple(shape.sizes.values()) for shape in found}) == unique
    assert {shape.sizes["N"] for shape in found} == {32}
    both = shapes("conv2d", name)
    assert len(both) == 2 * unique and {shape.sizes["N"] for shape in both} == {32, 256}
    assert sizes("conv2d", f"{name}@7") == [
        {**shape.sizes, "N": 7} for shape in found
    ]  # and in the same order


def test_layers_that_are_known_by_heart():
    by_name = {shape.name: shape for shape in shapes("conv2d", "resnet50@32,vgg16@32,alexnet@32")}
    keys = networks.CONV

    def layer(name):
        return tuple(by_name[name + " n32"].sizes[key] for key in keys), by_name[
            name + " n32"
        ].count

    assert layer("resnet50.conv1") == ((32, 3, 224, 224, 64, 7, 7, 2, 3, 1, 1), 1)
    assert layer("resnet50.layer1.0.conv2") == ((32, 64, 56, 56, 64, 3, 3, 1, 1, 1, 1), 3)
    assert layer("resnet50.layer2.0.conv2") == ((32, 128, 56, 56, 128, 3, 3, 2, 1, 1, 1), 1)
    assert layer("resnet50.layer4.0.downsample.0") == (
        (32, 1024, 14, 14, 2048, 1, 1, 2, 0, 1, 1),
        1,
    )
    assert layer("vgg16.features.0") == ((32, 3, 224, 224, 64, 3, 3, 1, 1, 1, 1), 1)
    assert layer("vgg16.features.24") == ((32, 512, 14, 14, 512, 3, 3, 1, 1, 1, 1), 3)
    assert layer("alexnet.features.3") == ((32, 64, 27, 27, 192, 5, 5, 1, 2, 1, 1), 1)


def test_mobilenets_have_their_depthwise_layers():
    """13 of version 1 and 17 of version 2, the first of which is the other's; groups = C = K."""
    found = shapes("conv2d", "mobilenet")
    for version, layers in [("v1", 13), ("v2", 16)]:
        assert sum(s.count for s in found if f".{version}." in s.name) == layers
    assert len({tuple(s.sizes.values()) for s in found}) == len(found) == 18
    for s in found:
        assert s.sizes["C"] == s.sizes["K"] == s.sizes["groups"] and s.sizes["N"] == 32
        assert (s.sizes["R"], s.sizes["S"], s.sizes["padding"], s.sizes["dilation"]) == (3, 3, 1, 1)
    by_name = {s.name: s for s in shapes("conv2d", "mobilenet@256")}
    s = by_name["mobilenet.v2.features.4 n256"].sizes
    assert [s[key] for key in ("N", "C", "H", "W", "stride")] == [256, 144, 56, 56, 2]
    with pytest.raises(PerfError, match="mobilenet has no shapes for max_pool2d"):
        shapes("max_pool2d", "mobilenet")


def test_parts_of_networks():
    """They keep the counts of the network, and a part of ResNet-50 its names."""
    whole = {shape.name: shape for shape in shapes("conv2d", "resnet50@32")}
    part = shapes("conv2d", "resnet50_3x3@32")
    assert all(whole[shape.name] == shape and shape.sizes["R"] == 3 for shape in part)
    assert len(part) == 7 and sum(shape.count for shape in part) == 16
    grouped = shapes("conv2d_bias_relu", "resnext50@8")
    assert sum(shape.count for shape in grouped) == 16 and len(grouped) == 7
    assert {(s.sizes["groups"], s.sizes["R"]) for s in grouped} == {(32, 3)}
    assert grouped[-1].name == "resnext50.layer4.1.conv2 n8"
    assert [grouped[i].sizes["C"] // 32 for i in (0, -1)] == [4, 32]
    stems = shapes("conv2d", "stems")
    assert [shape.name for shape in stems] == [
        f"stems.{name} n{batch}" for batch in (32, 256) for name in ("resnet50", "alexnet", "vgg16")
    ]
    keys = ("C", "K", "R", "stride", "padding")
    assert [tuple(shape.sizes[key] for key in keys) for shape in stems[:3]] == [
        (3, 64, 7, 2, 3), (3, 64, 11, 4, 2), (3, 64, 3, 1, 1)
    ]  # fmt: skip
    with pytest.raises(PerfError, match="stems has no shapes for sgd"):
        shapes("sgd", "stems")


def test_where_a_relu_follows_at_once():
    """Not behind the last convolution of a block of ResNet, whose shortcut is added first."""
    found = shapes("conv2d_bias_relu", "resnet50@32")
    assert sum(shape.count for shape in found) == 1 + 2 * 16
    assert sizes("conv2d_bias_relu", "vgg16@32") == sizes("conv2d", "vgg16@32")


def test_what_networks_mean_for_other_operators():
    assert sizes("max_pool2d", "resnet50@8") == [
        {"N": 8, "C": 64, "H": 112, "W": 112, "R": 3, "stride": 2, "padding": 1}
    ]
    assert len(shapes("max_pool2d", "vgg16@8")) == 5
    assert [tuple(s.values()) for s in sizes("matmul", "vgg16@8")] == [
        (8, 4096, 25088),
        (8, 4096, 4096),
        (8, 1000, 4096),
    ]
    assert sizes("cross_entropy", "alexnet") == [{"M": 32, "N": 1000}, {"M": 256, "N": 1000}]
    assert [shape.name for shape in shapes("conv2d_relu_pool", "vgg16@1")] == [
        f"vgg16.features.{place} n1" for place in (2, 7, 14, 21, 28)
    ]
    relu = shapes("bias_relu", "resnet50@2")
    assert sum(shape.count for shape in relu) == 49  # 53 without the four on a shortcut
    assert relu[0].sizes == {"N": 2, "C": 64, "H": 112, "W": 112}


def test_columns_do_not_depend_on_the_filters():
    found = shapes("im2col", "resnet50@32")
    assert "K" not in found[0].sizes
    assert len(found) < 23 and sum(s.count for s in found) == 53
    assert sizes("col2im", "resnet50@32") == [s.sizes for s in found]


def test_the_demo_is_the_network_of_nets():
    """What each layer of the model receives, seen by hooks, is what the set says."""
    model, seen = TorchCNN((1, 28, 28), 10), {}
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: tuple(inputs[0].shape)})
        )
    model(torch.randn(64, 1, 28, 28))
    for shape in shapes("conv2d", "demo"):
        name = shape.name.removeprefix("demo.").removesuffix(" n64")
        layer, found = getattr(model, name), shape.sizes
        assert seen[name] == tuple(found[key] for key in "NCHW")
        assert tuple(layer.weight.shape) == tuple(found[key] for key in "KCRS")
        assert layer.padding == (found["padding"],) * 2 and layer.stride == (found["stride"],) * 2
    assert sizes("matmul", "demo") == [{"M": 64, "N": 10, "K": seen["fc"][1]}]
    assert sizes("conv2d_relu_pool", "demo") == sizes("conv2d", "demo")
    assert sizes("train_step", "demo") == [{"N": 64}]
    assert sizes("train_step", "demo@1000") == [{"N": 1000}]
    assert sizes("conv_stack", "vgg16@8") == [{"N": 8, "H": 224, "width": 64}]
    assert sizes("conv_stack", "n=8,h=64") == [{"N": 8, "H": 64, "width": 64}]
    with pytest.raises(PerfError, match="five pools leave nothing"):
        shapes("conv_stack", "n=8,h=31")


def test_sets_without_networks():
    assert [s["M"] for s in sizes("matmul", "square")] == [
        256, 512, 1024, 2048, 4096, 8192, 16384
    ]  # fmt: skip
    assert [s["N"] for s in sizes("softmax", "classes")] == [10, 100, 1000, 4096, 16384, 50257]
    assert {s["M"] for s in sizes("cross_entropy", "classes@128")} == {128}
    assert {"M": 4096, "N": 50257, "K": 768} in sizes("matmul", "transformer")
    assert {"M": 512, "N": 4096, "K": 11008} in sizes("matmul", "transformer@512")


def test_tiny_divides_nothing():
    for op in OPERATORS:
        for shape in shapes(op, "tiny"):
            assert all(size % 4 for key, size in shape.sizes.items() if key in "MHWCK")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("m=1024:4096:1024", [(1024,) * 3, (2048,) * 3, (3072,) * 3, (4096,) * 3]),
        ("m=10:20:7", [(10,) * 3, (17,) * 3]),  # the end is not hit
        ("m=256*2:1024", [(256,) * 3, (512,) * 3, (1024,) * 3]),
        ("m=1*10:99,n=4096", [(1, 4096, 1), (10, 4096, 10)]),
        ("M=7, N=5, K=3", [(7, 5, 3)]),
        ("k=3,m=1:2:1,n=4:5:1", [(1, 4, 3), (1, 5, 3), (2, 4, 3), (2, 5, 3)]),
    ],
)
def test_ranges(text, expected):
    assert [tuple(found[key] for key in "MNK") for found in sizes("matmul", text)] == expected


def test_ranges_of_other_operators_fill_in_what_is_usual():
    (found,) = shapes("conv2d", "n=32,c=64,h=56,w=58,k=64,r=3,s=3,padding=1")
    assert found.name == "N=32 C=64 H=56 W=58 K=64 R=3 S=3 stride=1 padding=1 dilation=1 groups=1"
    assert tuple(found.sizes) == networks.CONV and found.count == 1
    (found,) = sizes("conv2d", "n=1,c=4,h=9,k=8,r=3,stride=2,groups=2")
    assert (found["W"], found["S"], found["groups"]) == (9, 3, 2)
    assert sizes("max_pool2d", "n=1,c=2,h=8,r=2") == [
        {"N": 1, "C": 2, "H": 8, "W": 8, "R": 2, "stride": 2, "padding": 0}
    ]
    assert sizes("sgd", "elements=100") == [{"tensors": 1, "elements": 100}]
    assert sizes("train_step", "n=16*2:64") == [{"N": 16}, {"N": 32}, {"N": 64}]


def test_a_shape_of_two_sets_comes_once():
    assert sizes("matmul", "square,square") == sizes("matmul", "square")
    vgg = {(s["M"], s["N"], s["K"]) for s in sizes("matmul", "vgg16@1")}
    alex = {(s["M"], s["N"], s["K"]) for s in sizes("matmul", "alexnet@1")}
    assert len(shapes("matmul", "vgg16@1,alexnet@1")) == len(vgg | alex) == 4


@pytest.mark.parametrize(
    "op, text, message",
    [
        (
            "matmull",
            "square",
            "unknown operator 'matmull': there are matmul, matmul_bias_relu, scaled_matmul",
        ),
        ("matmul", "squares", "unknown set of shapes 'squares': there are square, skinny"),
        ("matmul", "", "unknown set of shapes ''"),
        ("softmax", "square", "square has no shapes for softmax; these have: .*classes, tiny"),
        ("conv2d_relu_pool", "resnet50", "these have: vgg16, demo, tiny"),
        ("matmul", "square@32", "square has no batch; transformer, .* have"),
        ("matmul", "vgg16@many", "batch after @ must be a positive number"),
        ("matmul", "vgg16@0", "batch after @ must be a positive number"),
        ("matmul", "vgg16@²", "batch after @ must be a positive number"),
        ("matmul", "m=8,square", "'square' is no size; sets and sizes do not mix"),
        ("matmul", "m=8,p=4", "matmul has no size 'p': it has M, N, K"),
        ("matmul", "m=8,m=4", "m is given twice"),
        ("matmul", "n=8", "matmul needs M too"),
        ("conv2d", "n=8,c=4", "conv2d needs H, K, R too"),
        ("matmul", "m=1:2", r"m=1:2: a size is 7, 1024:8192:1024 \(start:stop:step\)"),
        ("matmul", "m=-4", "m=-4: a size is"),
        ("matmul", "m=", "m=: a size is"),
        ("matmul", "m=8:4:1", "m=8:4:1: this range is empty"),
        ("matmul", "m=4:8:0", "this range is empty, or without an end"),
        ("matmul", "m=4*1:8", "this range is empty, or without an end"),
        ("matmul", "m=0*2:8", "this range is empty, or without an end"),
        ("matmul", "m=0", "M must be positive, got 0"),
        ("matmul", "m=1:999999999999:1", "999999999999 shapes; at most 10000"),
        ("matmul", "m=1:200:1,n=1:200:1", "40000 shapes; at most 10000"),
        ("conv2d", "n=1,c=3,h=4,k=8,r=7", "7 x 7 taps do not fit into the padded image"),
        ("conv2d", "n=1,c=3,h=9,k=8,r=3,groups=2", "groups=2 must divide C=3 and K=8"),
        ("conv2d_relu_pool", "n=1,c=3,h=9,k=8,r=3,stride=2", "dilation and groups must be 1"),
        ("conv2d_relu_pool", "n=1,c=3,h=3,k=8,r=3", "nothing is left"),
        ("max_pool2d", "n=1,c=3,h=9,r=3,padding=2", "half of the window"),
    ],
)
def test_mistakes_are_explained_in_one_line(op, text, message):
    with pytest.raises(PerfError, match=message) as caught:
        shapes(op, text)
    assert "\n" not in str(caught.value)


def test_every_set_works_for_every_operator_that_it_has():
    for op in OPERATORS:
        for name in SETS:
            try:
                found = shapes(op, name)
            except PerfError as error:
                assert "has no shapes for" in str(error)
                continue
            for shape in found:
                assert isinstance(shape, Shape) and shape.count >= 1
                assert tuple(shape.sizes) == OPERATORS[op].sizes
                assert all(type(size) is int for size in shape.sizes.values())
            assert len({shape.name for shape in found}) == len(found)


def test_describe_names_every_set_and_fits_a_terminal():
    text = describe()
    for name, (meaning, *_) in SETS.items():
        assert f"\n{name:12} {meaning}\n" in text
    assert max(map(len, text.splitlines())) <= 100
    resnet = " ".join(text.split("\nresnet50")[1].split("\nvgg16")[0].split())
    assert "conv2d 23" in resnet and "conv2d_relu_pool" not in resnet


def test_shapes_are_not_shared():
    """Whoever changes what it got changes nobody else's."""
    shapes("matmul", "square")[0].sizes["M"] = 1
    assert shapes("matmul", "square")[0].sizes["M"] == 256
