"""FLOPs and bytes: against numbers worked out by hand, published totals, and torch's own counts."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tilelab.nets.imagenet import torch_vgg16_features
from tilelab.nets.models import TorchCNN
from tilelab.perf.work import cost, networks
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.shapes import shapes

CONVOLUTIONS = ("conv2d", "conv2d_im2col")


def flops(op, mode, sizes):
    return OPERATORS[op].modes[mode].flops(sizes)


def minimum_bytes(op, mode, sizes, itemsize):
    return OPERATORS[op].modes[mode].bytes(sizes, itemsize)


def conv(N, C, H, W, K, R, S, stride=1, padding=0, dilation=1, groups=1):
    sizes = (N, C, H, W, K, R, S, stride, padding, dilation, groups)
    return dict(zip(networks.CONV, sizes, strict=True))


# Sizes, FLOPs of each mode, elements of x (those read), w, y and of all of x.
BY_HAND = {
    "resnet50.conv1": (  # 32 * 112 * 112 outputs * 64 * 3 * 49 = 3,776,446,464 MACs
        conv(32, 3, 224, 224, 64, 7, 7, stride=2, padding=3),
        7_552_892_928,
        (4_816_896, 9_408, 25_690_112, 4_816_896),
    ),
    "resnet50.layer2.0.conv2": (  # 32 * 28 * 28 outputs * 128 * 128 * 9 = 3,699,376,128 MACs
        conv(32, 128, 56, 56, 128, 3, 3, stride=2, padding=1),
        7_398_752_256,
        (12_845_056, 147_456, 3_211_264, 12_845_056),
    ),
    "groups": (  # 16 pixels * 16 filters * 2 channels * 9 = 4,608 MACs
        conv(1, 8, 4, 4, 16, 3, 3, padding=1, groups=4),
        9_216,
        (128, 288, 256, 128),
    ),
    "dilation": (  # 5 of 7 pixels a window: 3 x 3 windows of 9 taps
        conv(1, 1, 7, 7, 1, 3, 3, dilation=2),
        162,
        (49, 9, 9, 49),
    ),
    "1x1, stride 2": (  # of 6 x 6 pixels only 3 x 3 are read
        conv(1, 4, 6, 6, 2, 1, 1, stride=2),
        144,
        (36, 8, 18, 144),
    ),
    "R is not S": (conv(2, 3, 5, 4, 7, 3, 2), 2 * 2 * 3 * 3 * 7 * 18, (120, 126, 126, 120)),
}


@pytest.mark.parametrize("op", CONVOLUTIONS)
@pytest.mark.parametrize("name", BY_HAND)
def test_convolutions_by_hand(op, name):
    sizes, count, (x, w, y, dx) = BY_HAND[name]
    assert {flops(op, mode, sizes) for mode in ("fwd", "dgrad", "wgrad")} == {count}
    for itemsize in (2, 4):
        assert minimum_bytes(op, "fwd", sizes, itemsize) == itemsize * (x + w + y)
        assert minimum_bytes(op, "dgrad", sizes, itemsize) == itemsize * (y + w + dx)
        assert minimum_bytes(op, "wgrad", sizes, itemsize) == itemsize * (x + w + y)


OTHERS = [  # op, mode, sizes, FLOPs, bytes of 2-byte elements
    ("matmul", "fwd", (3, 5, 7), 210, 142),  # N is 5, K is 7: 21 + 35 + 15 elements
    ("matmul", "dgrad", (3, 5, 7), 210, 142),
    ("matmul_bias_relu", "fwd", (3, 5, 7), 210, 152),  # and 5 elements of bias
    ("matmul", "wgrad", (3, 5, 7), 210, 142),
    ("scaled_matmul", "fwd", (3, 5, 7), 210, 142),  # 56 elements of operands, 15 results of 2 bytes
    ("bias_relu", "fwd", (2, 3, 5, 7), 420, 840),
    ("bias_relu", "bwd", (2, 3, 5, 7), 420, 1260),
    ("matmul_bias_gelu", "fwd", (3, 5, 7), 210, 152),
    ("bias_gelu", "fwd", (2, 3, 5, 7), 1260, 840),
    ("bias_gelu", "bwd", (2, 3, 5, 7), 2730, 1260),
    ("softmax", "fwd", (3, 5), 75, 60),
    ("softmax", "bwd", (3, 5), 60, 90),
    ("cross_entropy", "fwd", (3, 5), 75, 30),
    ("cross_entropy", "fwdbwd", (3, 5), 105, 60),
    # ResNet-50's pool: 802,816 pixels to 200,704, eight comparisons each
    ("max_pool2d", "fwd", (1, 64, 112, 112, 3, 2, 1), 1_605_632, 2_007_040),
    ("max_pool2d", "bwd", (1, 64, 112, 112, 3, 2, 1), 200_704, 2_207_744),
    # 5 x 5 pixels in windows of 2 x 2: the last row and column are not read, but have a gradient
    ("max_pool2d", "fwd", (1, 1, 5, 5, 2, 2, 0), 12, 40),
    ("max_pool2d", "bwd", (1, 1, 5, 5, 2, 2, 0), 4, 62),
    ("sgd", "step", (3, 100), 1200, 3000),
    ("adamw", "step", (3, 100), 4200, 4200),
]


@pytest.mark.parametrize("op, mode, sizes, count, bytes_", OTHERS)
def test_the_others_by_hand(op, mode, sizes, count, bytes_):
    shape = dict(zip(OPERATORS[op].sizes, sizes, strict=True))
    assert flops(op, mode, shape) == count
    assert minimum_bytes(op, mode, shape, 2) == bytes_
    if op == "scaled_matmul":
        assert minimum_bytes(op, mode, shape, 1) == 56 + 30
    elif "max_pool2d" not in op:
        assert minimum_bytes(op, mode, shape, 4) == 2 * bytes_


def test_the_fused_block_by_hand():
    """The demo's second: 11 x 11 outputs, of which 10 x 10 are pooled and 12 x 12 pixels read."""
    (_, second) = shapes("conv2d_relu_pool", "demo@64")
    for mode in ("fwd", "dgrad", "wgrad"):
        assert flops("conv2d_relu_pool", mode, second.sizes) == 58_982_400
    x, w, bias, y, dx = 147_456, 4_608, 32, 51_200, 173_056
    found = {m: minimum_bytes("conv2d_relu_pool", m, second.sizes, 4)
             for m in OPERATORS["conv2d_relu_pool"].modes}  # fmt: skip
    assert found == {
        "fwd": 4 * (x + w + bias + y),
        "dgrad": 4 * (y + w + dx) + y,
        "wgrad": 4 * (x + w + bias + y) + y,
    }


def test_im2col_by_hand():
    """A picture of 3 x 3 in windows of 2 x 2: 4 rows of 4."""
    sizes = conv(1, 1, 3, 3, 1, 2, 2)
    assert flops("im2col", "fwd", sizes) == 0
    assert flops("col2im", "fwd", sizes) == 16
    assert minimum_bytes("im2col", "fwd", sizes, 4) == 4 * (9 + 16)
    assert minimum_bytes("col2im", "fwd", sizes, 4) == 4 * (16 + 9)
    thin = conv(1, 1, 5, 5, 1, 1, 1, stride=2)  # 9 of 25 pixels
    assert minimum_bytes("im2col", "fwd", thin, 1) == 9 + 9
    assert minimum_bytes("col2im", "fwd", thin, 1) == 9 + 25


@pytest.mark.parametrize(
    "name, total", [("resnet50", 4.089e9), ("vgg16", 15.470e9), ("alexnet", 0.714e9)]
)
def test_networks_have_the_published_number_of_multiply_adds(name, total):
    """Convolutions and linear layers for one image, as torchvision's documentation counts them."""
    macs = sum(
        shape.count * flops(op, "fwd", shape.sizes) / 2
        for op in ("conv2d", "matmul")
        for shape in shapes(op, f"{name}@1")
    )
    assert macs == pytest.approx(total, rel=5e-4)


def test_a_training_step_by_hand():
    # 12,460,032 twice, 58,982,400 and 1,024,000 three times
    assert flops("train_step", "step", {"N": 64}) == 204_939_264
    image, y1, read1, y2, logits = 64 * 784, 64 * 16 * 169, 64 * 16 * 144, 64 * 32 * 25, 640
    forward = (image + 160 + y1) + (read1 + 4_640 + y2) + (y2 + 8_010 + logits)
    linear = logits + y2 + 8_000 + y2 + 8_010
    backward = linear + (y2 + read1 + 4_608 + y1 + 4_640) + (y1 + image + 160)
    elements, places = forward + 2 * logits + backward, 2 * (y1 + y2)
    for itemsize in (4, 2):
        assert minimum_bytes("train_step", "step", {"N": 64}, itemsize) == (
            itemsize * elements + places + 28 * 12_810
        )
    assert cost.train_step_launches() == 3 + 1 + 3 + 1


def test_a_training_step_as_torch_counts_it():
    """torch computes the 21 outputs a plane of conv2 that no window pools; we do not count them."""
    model, images = TorchCNN((1, 28, 28), 10), torch.randn(64, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    unpooled = 3 * 2 * 64 * 21 * 32 * 16 * 9
    assert counter.get_total_flops() == flops("train_step", "step", {"N": 64}) + unpooled


def test_a_stack_of_convolutions_as_torch_counts_it():
    """Forward, and both gradients, but for the input gradient of the first."""
    sizes = dict(N=2, H=64, width=8)
    model = torch_vgg16_features(width=8)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert counter.get_total_flops() == flops("conv_stack", "step", sizes)


def test_the_bytes_of_a_stack_by_hand():
    """Of 32 x 32 images and 1 channel in the first stage; weights and activations, by layer."""
    w = [27, 9, 18, 36, 72, 144, 144, 288, 576, 576, 576, 576, 576]
    k = [1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8]
    x = [3072, 1024, 256, 512, 128, 256, 256, 64, 128, 128, 32, 32, 32]
    y = [1024, 256, 512, 128, 256, 256, 64, 128, 128, 32, 32, 32, 8]
    pooled = [256, 128, 64, 32, 8]
    forward = sum(x) + sum(w) + sum(k) + sum(y)
    wgrad = forward - sum(k) + sum(k[i] for i in (1, 3, 6, 9, 12))  # a pool's has the bias's too
    dgrad = forward - sum(k) - (x[0] + w[0] + y[0])
    elements, places = forward + wgrad + dgrad, 3 * sum(pooled)
    sizes = dict(N=1, H=32, width=1)
    assert minimum_bytes("conv_stack", "step", sizes, 2) == 2 * elements + places


GEOMETRIES = [(7, 3, 1, 0, 1), (8, 3, 2, 1, 1), (9, 1, 2, 0, 1), (11, 2, 3, 1, 2), (9, 2, 4, 0, 3)]


@pytest.mark.parametrize("H, R, stride, padding, dilation", [*GEOMETRIES, (5, 3, 3, 3, 1)])
def test_pixels_read_are_those_that_have_a_gradient(H, R, stride, padding, dilation):
    """A pixel is read if the output depends on it, which autograd knows."""
    W, S = H + 3, R + 1
    x = torch.ones(1, 1, H, W, requires_grad=True)
    y = F.conv2d(x, torch.ones(1, 1, R, S), None, stride, padding, dilation)
    y.sum().backward()
    sizes = conv(1, 1, H, W, 1, R, S, stride, padding, dilation)
    assert cost.output_size(sizes) == tuple(y.shape[2:])
    read = int((x.grad > 0).sum())
    assert minimum_bytes("conv2d", "fwd", sizes, 1) == read + R * S + y.numel()


def test_every_workload_has_a_cost():
    for op, row in OPERATORS.items():
        for mode in row.modes:
            for shape in shapes(op, "tiny"):
                assert flops(op, mode, shape.sizes) > 0 or op == "im2col"
                few, many = (minimum_bytes(op, mode, shape.sizes, size) for size in (2, 4))
                assert 0 < few < many <= 2 * few
                assert type(few) is type(flops(op, mode, shape.sizes)) is int
