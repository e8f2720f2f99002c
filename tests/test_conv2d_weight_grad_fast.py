"""The weight gradient's kernel for TMA: it agrees with float64, and is chosen where it can be.

Here it runs in the interpreter, or on this machine's GPU. What it compiles to is held to its bars
at the end. And what both kernels of the lesson can do besides: the bias gradient, atomics.
"""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from kernels import _launch, conv2d
from kernels._launch import Device, use_tile
from kernels.conv2d_weight_grad import (
    FAST_TILES,
    TILES,
    conv2d_weight_bias_grad,
    conv2d_weight_grad,
    conv2d_weight_grad_tma_kernel,
    fast_tile,
    make_plan,
    pixels_inside,
)
from tests.convolutions import Conv, integers
from tests.inputs import DEVICE, double, laid_out, randn
from tests.poison import poison
from tests.test_compile import SHARED, compiled, describe
from tests.tolerance import assert_close

module = importlib.import_module("kernels.conv2d_weight_grad")
HOPPER, AMPERE = Device(90, sms=132), Device(80, sms=108)
HALF = [torch.float16, torch.bfloat16]
OP = "conv2d_weight_grad"


def name(tile):
    return "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")


TILE = {name(tile): tile for tile in FAST_TILES[2]}
SMALL = TILE["64x64x32"]  # for tests of everything else


def operands(conv, dtype, values=integers, weight="channels_last"):
    """x, dy and the weight; images of few channels are [N, C, H, W] in memory, as datasets are."""
    x, w = conv.inputs(dtype, "contiguous" if conv.x[1] < 8 else "channels_last", weight, values)
    return x, conv.dy(dtype, "channels_last", values), w


def run(conv, tile, inputs, bias=False):
    """dweight, or with `bias` dweight and dbias, by this tile; it is that of the kernel for TMA."""
    fn = conv2d_weight_bias_grad if bias else conv2d_weight_grad
    with use_tile(OP, tile):
        return fn(*inputs, *conv.lists)


@functools.cache
def wanted(conv, dtype, values=integers):
    """(dweight, dbias) in float64, by autograd of torch's own convolution; not mostly zeros."""
    x, dy, weight = double(*operands(conv, dtype, values))
    weight = weight.detach().requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, None, *conv.args)
    (dweight,) = torch.autograd.grad(y, [weight], dy)
    return dweight, dy.sum((0, 2, 3))


# --- the same results -----------------------------------------------------------------------------

LAYERS = {
    # geometry; of no tile's size the batch, the channels or the filters are a multiple
    "3x3": Conv((33, 72, 4, 5), 72, (3, 3), 1, 1),
    "3x3 of a whole tile": Conv((32, 64, 3, 3), 64, (3, 3), 1, 1),
    "two blocks of filters and of channels": Conv((17, 264, 2, 2), 136, (1, 2)),
    "2x3, no padding": Conv((17, 64, 4, 5), 24, (2, 3)),
    "1x7": Conv((16, 16, 2, 9), 24, (1, 7), padding=(0, 3)),
    "7x1": Conv((16, 16, 9, 2), 24, (7, 1), padding=(3, 0)),
    "5x2, padding (2, 1)": Conv((16, 24, 5, 4), 24, (5, 2), padding=(2, 1)),
    "stride 2": Conv((20, 40, 6, 4), 40, (3, 3), 2, 1),
    "stride 2, an odd image": Conv((20, 24, 5, 7), 24, (3, 3), 2, 1),
    "stride (1, 2)": Conv((16, 24, 4, 6), 24, (3, 3), (1, 2), 1),
    "stride (3, 2), padding (1, 2)": Conv((16, 24, 7, 6), 24, (3, 3), (3, 2), (1, 2)),
    "stride larger than the filter": Conv((16, 64, 7, 9), 24, (2, 2), 3),
    "padding larger than the filter": Conv((16, 24, 2, 3), 24, (2, 2), padding=3),
    "padding larger than the image, stride 2": Conv((16, 24, 3, 2), 24, (3, 3), 2, 4),
    "taps that are never inside": Conv((16, 24, 1, 2), 24, (3, 5), padding=(1, 2)),
    "dilation 2": Conv((16, 24, 5, 4), 24, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((16, 24, 4, 7), 24, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "dilation (2, 3), stride (4, 3)": Conv((16, 24, 9, 9), 24, (2, 3), (4, 3), (0, 2), (2, 3)),
    "1x1": Conv((3, 72, 5, 7), 40, (1, 1)),
    "1x1, stride 2": Conv((17, 24, 4, 5), 40, (1, 1), 2),
    "1x1, stride 2, padding": Conv((17, 24, 3, 4), 40, (1, 1), 2, 1),
    "3x3 of one pixel": Conv((40, 24, 1, 1), 24, (3, 3), padding=1),
    # windows: few channels and no padding
    "16 channels": Conv((20, 16, 5, 6), 32, (3, 3)),
    "16 channels, stride 2, dilation (2, 1)": Conv((16, 16, 8, 7), 32, (3, 3), 2, 0, (2, 1)),
    "56 channels: three windows of 168": Conv((16, 56, 4, 4), 32, (3, 3)),
    "8 channels of one column": Conv((16, 8, 5, 3), 24, (3, 1)),
    "24 channels, dilation (1, 2): no windows": Conv((16, 24, 4, 6), 24, (2, 2), 1, 0, (1, 2)),
    # few channels: packed
    "7x7, stride 2": Conv((16, 3, 9, 8), 72, (7, 7), 2, 3),
    "3x3 of 3 channels": Conv((17, 3, 4, 5), 24, (3, 3), padding=1),
    "3x2 of 5 channels, stride (1, 3)": Conv((16, 5, 4, 7), 24, (3, 2), (1, 3), (0, 1)),
    "4x4, stride 4: patches, each a pixel": Conv((5, 3, 8, 9), 24, (4, 4), 4),
    "5x5 of one channel": Conv((16, 1, 6, 7), 24, (5, 5)),
}  # fmt: skip


def check(conv, tile, dtype, weight="channels_last", bias=False):
    """In small integers every sum is exact, so the result is what float64 rounds to; in poison."""
    inputs = operands(conv, dtype, weight=weight)
    with poison() as p:
        got = run(conv, tile, [p(t) for t in inputs], bias)
    dweight, dbias = wanted(conv, dtype)
    if bias:
        got, db = got
        assert torch.equal(db, dbias.to(dtype)) and db.any()
    assert torch.equal(got, dweight.to(dtype)) and got.any()
    assert got.stride() == torch.empty_like(inputs[2]).stride()


@pytest.mark.core
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_geometry(conv):
    """One part and three, that divide nothing, some with nothing to add; either layout; the bias."""
    check(conv, SMALL, torch.bfloat16)
    check(conv, SMALL | dict(SPLIT_K=3), torch.float16, weight="contiguous", bias=True)
