"""conv2d: what the contract suite does not have; test_conv2d_grad.py has each gradient alone."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.convolutions import (
    CONVS,
    FEW,
    MANY,
    Conv,
    any_conv,
    few_and_many,
    integers,
)
from tests.tools.inputs import DEVICE, DTYPES, LAYOUTS, double, gradients, need_memory, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, conv2d
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d import RUNGS, reference

module = importlib.import_module("tilelab.kernels.conv2d")
WEIGHT_LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]  # [1] is KRSC


def call(conv, fn=conv2d, activation=None):
    """The function of x, weight and, if there is one, bias, that this convolution is."""

    def called(x, weight, b=None):
        return fn(x, weight, b, *conv.args, activation)

    return called


def check_forward(conv, dtype, *, x="contiguous", weight="contiguous", bias=None, activation=None):
    """y alone, in poison, against float64; `x`, `weight` and `bias` name layouts."""
    inputs = conv.inputs(dtype, x, weight)
    if bias is not None:
        inputs.append(randn(conv.filters, dtype=dtype, layout=bias, seed=2))
    with poison() as p:
        y = call(conv, activation=activation)(*[p(t) for t in inputs])
    y64 = call(conv, reference, activation=activation)(*double(*inputs))
    alike = "expanded" in (x, weight)  # equal images, or equal channels
    assert_close(y, y64, dtype=dtype, terms=conv.terms["y"], name="y", teeth=not alike)
    assert y.is_contiguous(memory_format=torch.channels_last)


def check(conv, dtype, *, x="contiguous", weight="contiguous", dy="contiguous", bias=True,
          activation=None):  # fmt: skip
    """y and all gradients through autograd, against float64."""
    inputs = conv.inputs(dtype, x, weight)
    if bias:
        inputs.append(randn(conv.filters, dtype=dtype, seed=2))
    grad = conv.dy(dtype, dy)
    y, grads = gradients(call(conv, activation=activation), inputs, grad)
    y64, grads64 = gradients(
        call(conv, reference, activation=activation), double(*inputs), double(grad)
    )
    teeth = "expanded" not in (x, weight, dy)
    assert_close(y, y64, dtype=dtype, terms=conv.terms["y"], name="y", teeth=teeth)
    for name, got, want in zip(["dx", "dw", "db"], grads, grads64, strict=False):
        assert_close(got, want, dtype=dtype, terms=conv.terms[name], name=name, teeth=teeth)


# --- geometry, each for a reason ----------------------------------------------------------------


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("C", [3, 18], ids=["few channels", "many channels"])
def test_an_int_means_the_same_as_a_pair(C, taps):
    x, weight = randn(2, C, 9, 8), randn(5, C, taps, taps, seed=1)
    for args in [(2, 1, 1), (1, 2, 2), (3, 0, 2)]:
        pairs = [(v, v) for v in args]
        want = conv2d(x, weight, None, *args)
        assert torch.equal(conv2d(x, weight, None, *pairs), want)
        assert torch.equal(conv2d(x, weight, None, *[list(p) for p in pairs]), want)


def test_defaults_and_names_are_those_of_torch():
    x, weight, bias = randn(1, 3, 5, 6), randn(4, 3, 2, 2, seed=1), randn(4, seed=2)
    named = dict(stride=2, padding=1, dilation=2, groups=1)
    F = torch.nn.functional
    for args, more in [((), {}), ((bias,), {}), ((), dict(bias=bias)), ((bias,), named)]:
        want = F.conv2d(*double(x, weight, *args), **{k: double(v) for k, v in more.items()})
        assert_close(conv2d(x, weight, *args, **more), want, dtype=torch.float32, terms=13)


# --- layouts ------------------------------------------------------------------------------------


def test_an_image_that_is_its_own_filter():
    """Both operands are one tensor, which gets both gradients."""
    x = randn(3, 17, 4, 5).requires_grad_()
    x64 = double(x).requires_grad_()
    y, y64 = conv2d(x, x, padding=2), reference(x64, x64, padding=2)
    assert_close(y, y64, dtype=torch.float32, terms=17 * 20)
    dy = randn(*y.shape, seed=1)
    y.backward(dy)
    y64.backward(double(dy))
    assert_close(x.grad, x64.grad, dtype=torch.float32, terms=200, roundings=2)


# --- nothing to do ------------------------------------------------------------------------------


def test_no_channels_are_a_sum_of_nothing():
    """torch returns a tensor without channels here, which no bias could be added to."""
    bias = randn(3)
    inputs, dy = [randn(2, 0, 4, 5), randn(3, 0, 2, 2), bias], randn(2, 3, 3, 4)
    with poison():
        y, (dx, dweight, dbias) = gradients(conv2d, inputs, dy)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand(2, 3, 3, 4))
    assert dx.shape == (2, 0, 4, 5) and dweight.shape == (3, 0, 2, 2)
    assert_close(dbias, double(dy).sum((0, 2, 3)), dtype=torch.float32, terms=24)


def test_no_filters():
    y, (dx, dweight) = gradients(conv2d, [randn(2, 3, 4, 5), randn(0, 3, 2, 2)], randn(2, 0, 3, 4))
    assert y.shape == (2, 0, 3, 4) and dweight.shape == (0, 3, 2, 2)
    assert torch.equal(dx, torch.zeros(2, 3, 4, 5, device=DEVICE))


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [4, 256], ids=["few channels", "many channels"])
def test_float32_accumulation(C, dtype):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    side = 32 if C == 4 else 4
    x = torch.ones(1, C, side, side, dtype=dtype, device=DEVICE)
    y = conv2d(x, torch.ones_like(x))
    assert y.item() == 4096


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 16], ids=["few channels", "many channels"])
def test_relu_at_exactly_zero(C, dtype):
    """relu(0) = 0 and its gradient there is 0, as torch has it; just above it is 1."""
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([-1.0, -tiny, -0.0, 0.0, tiny, 1.0], dtype=dtype, device=DEVICE)
    x = torch.nn.functional.pad(x.view(1, 1, 1, 6), (0, 0, 0, 0, 0, C - 1))
    one = torch.zeros(1, C, 1, 1, dtype=dtype, device=DEVICE)
    one[0, 0] = 1
    bias = torch.zeros(1, dtype=dtype, device=DEVICE)
    y, (dx, _, dbias) = gradients(
        lambda *t: conv2d(*t, activation="relu"), [x, one, bias], torch.ones_like(x[:, :1])
    )
    assert y.flatten().tolist() == [0, 0, 0, 0, tiny, 1]
    assert dx[0, 0].flatten().tolist() == [0, 0, 0, 0, 1, 1]
    assert dbias.item() == 2


@few_and_many
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "bias"])
def test_nan_and_infinity_reach_what_torch_has_them_reach(where, value, conv):
    """Nothing leaks through padding, masked channels or rows that wrap around the last one."""
    dtype = torch.float16 if value < 0 else torch.float32
    inputs = [*conv.inputs(dtype), randn(conv.filters, dtype=dtype, seed=2)]
    if where == "x":
        inputs[0][0, 0, 0, 0] = value  # in a corner of the first image, and within the last
        inputs[0][-1, -1, 2, 3] = value
    else:
        inputs[2][1] = value
    for activation in [None, "relu"]:
        y = call(conv, activation=activation)(*inputs)
        y64 = call(conv, reference, activation=activation)(*double(*inputs))
        assert 0 < y64.isfinite().sum() < y64.numel() or (value < 0 and activation == "relu")
        assert_close(y, y64, dtype=dtype, terms=conv.terms["y"])


def test_float16_overflow_is_infinity():
    x = torch.full((1, 2, 1, 1), 300.0, dtype=torch.float16, device=DEVICE)
    assert conv2d(x, x).item() == torch.inf
    assert conv2d(x, -x).item() == -torch.inf
    assert conv2d(x, -x, activation="relu").item() == 0


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [True, False], ids=["few channels", "many channels"])
@pytest.mark.parametrize("C", [16, 32, 48, 40], ids="{} channels".format)
def test_steps_with_and_without_a_remainder(C, few, monkeypatch):
    """Both kernels on the same channels: only the second has a form without masks."""
    monkeypatch.setattr(module, "FEW_CHANNELS", 1000 if few else 1)
    tile = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2)
    with use_tile("conv2d", tile), use_tile("conv2d_flat", tile):
        for padding in (0, 1):
            check_forward(Conv((1, C, 4, 5), 6, (3, 2), padding=padding), torch.float32)


# --- anything else ------------------------------------------------------------------------------


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    conv=any_conv(), dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS),
    weight=st.sampled_from(WEIGHT_LAYOUTS), dy=st.sampled_from(LAYOUTS), with_bias=st.booleans(),
    activation=st.sampled_from([None, "relu"]),
)  # fmt: skip
def test_any_convolution(conv, dtype, x, weight, dy, with_bias, activation):
    """In small integers, so that everything is exact but the rounding of the results."""
    inputs, grad = conv.inputs(dtype, x, weight, integers), conv.dy(dtype, dy, integers)
    if with_bias:
        inputs.append(integers(conv.filters, dtype=dtype, seed=2))
    with poison() as p:
        y, grads = gradients(call(conv, activation=activation), [p(t) for t in inputs], p(grad))
    y64, grads64 = gradients(
        call(conv, reference, activation=activation), double(*inputs), double(grad)
    )
    for got, want in zip([y, *grads], [y64, *grads64], strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


# --- the first rungs ------------------------------------------------------------------------------

RUNG_LAYERS = [
    "all of size 1", "C=17, one more than a block", "C=130, a second step of channels", "5x2",
    "K=130, the same for the input gradient", "stride 5 of 3x1, 20 channels",
    "padding larger than needed", "dilation 6, stride 4: gcd 2", "filter larger than x",
    "stride (3, 2), 17 channels",
]  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("tile", RUNGS, ids=lambda tile: tile["kernel"])
@pytest.mark.parametrize("layer", RUNG_LAYERS)
def test_rungs_agree_with_the_reference(layer, tile, monkeypatch):
    """Each kind of geometry, and few channels too, as if they were many."""
    monkeypatch.setattr(module, "FEW_CHANNELS", 1)
    conv = CONVS[layer]
    for dtype, layout in [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")]:
        inputs = conv.inputs(dtype, layout, layout, integers)
        inputs.append(integers(conv.filters, dtype=dtype, seed=2))
        with use_tile("conv2d", tile), poison() as p:
            y = call(conv, activation="relu")(*[p(t) for t in inputs])
        want = call(conv, reference, activation="relu")(*double(*inputs))
        assert torch.equal(y, want.to(dtype)) and (want.any() or want.numel() < 8)


@pytest.mark.core
@pytest.mark.parametrize("tile", RUNGS, ids=lambda tile: tile["kernel"])
def test_rungs_larger_than_a_tile(tile):
    """No call takes them of itself, on any device."""
    conv = Conv((2, 18, 7, 9), tile["BLOCK_N"] + 3, (2, 3), 1, 1)
    with use_tile("conv2d", tile):
        check(conv, torch.float16, x="channels_last", weight="channels_last", bias=False)
        for capability in (80, 90):
            with _launch.record(_launch.Device(capability, sms=132)) as events:
                call(conv)(*conv.inputs(torch.float16, "channels_last"))
            kernel = events[-1].kernel.__name__
            assert (kernel == "conv2d_direct_kernel") == (tile["kernel"] == "direct")


@pytest.mark.parametrize("tile", RUNGS, ids=lambda tile: tile["kernel"])
def test_rungs_are_of_many_channels_and_one_group(tile):
    for conv in (Conv((1, 3, 4, 4), 8, (3, 3)), Conv((1, 64, 4, 4), 64, (3, 3), groups=4)):
        op = "conv2d_grouped" if conv.groups > 1 else "conv2d_flat"
        with use_tile(op, tile), pytest.raises(ValueError, match="cannot take these"):
            call(conv)(*conv.inputs(torch.float16))


def test_offsets_in_the_padding_count():
    """Rows 2^30 elements apart, and two of them before the image: 32 bits do not hold that."""
    steps = (2**30, 1, 2**30, 16)
    assert module._are_near(((1, 16, 1, 8), steps))
    assert not module._are_near(((1, 16, 5, 12), steps))
    rows = torch.empty(1, 16, 1, 8, dtype=torch.float16).as_strided((1, 16, 1, 8), steps)
    with _launch.record(_launch.Device(80, sms=108)) as events:
        conv2d(rows, torch.empty(8, 16, 5, 5, dtype=torch.float16), padding=2)
    assert events[-1].kernel.__name__ == "conv2d_kernel" and not events[-1].meta["NEAR"]


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "conv", [FEW, MANY, Conv((32, 64, 56, 56), 64, (3, 3), 1, 1)], ids=["few", "many", "3x3"]
)
def test_tf32_follows_torchs_switch(conv):
    """The switch of cuDNN and no other; every call under TF32 differs from one in full."""
    inputs, dy = conv.inputs(torch.float32), conv.dy(torch.float32)
    names = ["y", "dx", "dw"]
    y64, grads64 = gradients(call(conv, reference), double(*inputs), double(dy))
    for tf32 in (True, False):
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee" if tf32 else "tf32"
        y, grads = gradients(call(conv), inputs, dy)
        for name, got, want in zip(names, [y, *grads], [y64, *grads64], strict=True):
            close = dict(dtype=torch.float32, terms=conv.terms[name], name=name)
            assert_close(got, want, tf32=tf32, **close)
            if tf32 and name != "dw":  # a long sum's own bound may be as wide as TF32's error
                with pytest.raises(AssertionError, match="error"):
                    assert_close(got, want, **close)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "conv, layout",
    [
        (Conv((33, 64, 1024, 1024), 16, (3, 3), 4, 1), "channels_last"),
        (Conv((1, 160, 4096, 4096), 16, (3, 3), 4, 1), "contiguous"),
        (Conv((170, 3, 2048, 2048), 4, (3, 3), 4, 1), "channels_last"),
        (Conv((9, 16, 2048, 2048), 64, (1, 1)), "channels_last"),
        (Conv((9, 3, 2048, 2048), 64, (1, 1)), "contiguous"),
    ],
    ids=["x", "channels of x", "x of few channels", "y", "y of few channels"],
)
def test_offsets_past_2_to_the_31_at_real_size(conv, layout):
    """The last image, or its last channels: an int32 offset would be negative."""
    need_memory(24)
    N, C, H, W = conv.x
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(conv.x, device="cuda", dtype=torch.bfloat16, memory_format=memory).normal_()
    weight = randn(*conv.weight, dtype=torch.bfloat16, seed=1)
    y = call(conv)(x, weight)
    assert max(x.numel(), y.numel()) > 2**31
    rows = min(H, 1024)  # the last of them; the windows there begin at a multiple of the stride
    step = conv.lists[0][0]
    want = call(conv, reference)(*double(x[-1:, :, -rows:], weight))[:, :, 1:]
    got = y[-1:, :, -(rows // step - 1) :]
    assert_close(got, want, dtype=torch.bfloat16, terms=conv.terms["y"])
