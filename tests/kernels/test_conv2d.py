"""conv2d: forward and what autograd returns; test_conv2d_grad.py has each gradient alone."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import conv2d
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d import TILES, reference

from tests.tools.convolutions import (
    FEW,
    MANY,
    Conv,
    any_conv,
    every_conv,
    every_dtype,
    far_apart,
    few_and_many,
    integers,
)
from tests.tools.inputs import DEVICE, DTYPES, INTERPRET, LAYOUTS, double, gradients, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.conv2d")
WEIGHT_LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]  # [1] is KRSC


def call(conv, fn=conv2d, bias=False, activation=None):
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


@every_conv
@pytest.mark.parametrize("dtype", DTYPES)
def test_geometry(conv, dtype):
    check_forward(conv, dtype)


@few_and_many
@every_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_epilogue_and_what_autograd_returns(activation, bias, dtype, conv):
    check(conv, dtype, bias=bias, activation=activation)


@pytest.mark.parametrize("taps", [1, 2, 3])
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


@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("x", LAYOUTS)
@pytest.mark.parametrize("conv", [FEW, MANY], ids=["few channels", "many channels"])
def test_layouts(conv, x, weight):
    check_forward(conv, torch.float32, x=x, weight=weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_16_bits(layout, dtype):
    check_forward(MANY, dtype, x=layout, weight=layout)


@pytest.mark.parametrize("bias", ["sliced", "offset", "expanded"])
def test_layouts_of_the_bias(bias):
    check_forward(FEW, torch.float32, bias=bias)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dy", LAYOUTS)
def test_layouts_of_the_output_gradient(dy, activation):
    check(MANY, torch.float32, dy=dy, activation=activation)


@few_and_many
def test_layouts_of_the_results(conv):
    """y and dx are channels_last whatever x is; dweight lies as weight does."""
    for layout in ["contiguous", "channels_last", "transposed"]:
        inputs = conv.inputs(torch.float32, layout, layout)
        y, (dx, dweight) = gradients(call(conv), inputs, conv.dy(torch.float32))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert dweight.stride() == inputs[1].stride()


def test_gradient_of_a_sum_is_expanded():
    """`.sum().backward()` hands down one number with strides 0."""
    leaves = {}
    for dtype, fn in [(torch.float32, conv2d), (torch.float64, reference)]:
        leaves[dtype] = [t.to(dtype).requires_grad_() for t in MANY.inputs(torch.float32)]
        call(MANY, fn)(*leaves[dtype]).sum().backward()
    for name, got, want in zip(["dx", "dw"], *leaves.values(), strict=True):
        # equal filters: dweight looks the same when it is shifted along K
        assert_close(
            got.grad, want.grad, dtype=torch.float32, terms=MANY.terms[name], teeth=False, name=name
        )


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


@pytest.mark.core
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("C", [5, 18], ids=["few channels", "many channels"])
def test_empty_batch_as_in_torch(C, activation):
    conv = Conv((0, C, 6, 7), 4, (3, 2), 2, 1)
    inputs = [*conv.inputs(torch.float32), randn(4, seed=2)]
    dy = conv.dy(torch.float32)
    y, grads = gradients(call(conv, activation=activation), inputs, dy)
    want, want_grads = gradients(call(conv, reference, activation=activation), inputs, dy)
    for got, expected in zip([y, *grads], [want, *want_grads], strict=True):
        assert torch.equal(got, expected)  # empty, or zeros


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


@pytest.mark.core
@few_and_many
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype, conv):
    inputs, dy = conv.inputs(dtype, values=integers), conv.dy(dtype, values=integers)
    inputs.append(integers(conv.filters, dtype=dtype, seed=2))
    y, grads = gradients(call(conv, activation="relu"), inputs, dy)
    y64, grads64 = gradients(call(conv, reference, activation="relu"), double(*inputs), double(dy))
    for got, want in zip([y, *grads], [y64, *grads64], strict=True):
        assert want.abs().max() < 256 and (want != 0).any()
        assert torch.equal(got.double(), want)


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
@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "bias"])
def test_nan_and_infinity_reach_what_torch_has_them_reach(where, value, dtype, conv):
    """Nothing leaks through padding, masked channels or rows that wrap around the last one."""
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


# --- gradients asked for one by one -------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "x bias", "weight bias"])
def test_only_the_gradients_that_are_wanted(wanted, activation):
    conv = MANY
    x, weight = conv.inputs(torch.float32)
    inputs = dict(x=x, weight=weight, bias=randn(conv.filters, seed=2))
    grads = {}
    for dtype, fn in [(torch.float32, conv2d), (torch.float64, reference)]:
        leaves = {k: v.detach().to(dtype) for k, v in inputs.items()}
        for k in wanted.split():
            leaves[k].requires_grad_()
        y = call(conv, fn, activation=activation)(*leaves.values())
        y.backward(conv.dy(torch.float32).to(dtype))
        grads[dtype] = {k: v.grad for k, v in leaves.items()}
    for k, name in dict(x="dx", weight="dw", bias="db").items():
        got, want = grads[torch.float32][k], grads[torch.float64][k]
        if k in wanted.split():
            assert_close(got, want, dtype=torch.float32, terms=conv.terms[name], name=name)
        else:
            assert got is None


def test_no_gradients_no_graph():
    assert not conv2d(randn(1, 3, 4, 4), randn(2, 3, 2, 2)).requires_grad
    with torch.no_grad():
        assert not conv2d(randn(1, 3, 4, 4).requires_grad_(), randn(2, 3, 2, 2)).requires_grad


def test_gradients_add_up_over_two_calls():
    x, weight = MANY.inputs(torch.float32)
    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    x.requires_grad_(), weight.requires_grad_()
    for w, w64 in [(weight, weight64), (2 * weight, 2 * weight64)]:
        call(MANY)(x, w).backward(MANY.dy(torch.float32))
        call(MANY, reference)(x64, w64).backward(double(MANY.dy(torch.float32)))
    for name, got, want in [("dx", x.grad, x64.grad), ("dw", weight.grad, weight64.grad)]:
        terms = 2 * MANY.terms[name]
        assert_close(got, want, dtype=torch.float32, terms=terms, roundings=3, name=name)


# --- tiles --------------------------------------------------------------------------------------


def tile_id(tile):
    return "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")


def larger_than(tile, few):
    """A convolution with a tile and a remainder along each blocked dimension."""
    if few:  # the sum is over taps and channels
        C, taps = tile["BLOCK_K"] // 6 + 1, (3, 2)
        assert tile["BLOCK_K"] < C * taps[0] * taps[1] and C < module.FEW_CHANNELS
    else:
        C, taps = tile["BLOCK_K"] + 5, (1, 2)
    width = -(-tile["BLOCK_M"] // 9) + 1
    x = (3, C, 2 + taps[0], width + 1)
    return Conv(x, tile["BLOCK_N"] + 3, taps, padding=(0, 1))


@every_dtype
@pytest.mark.parametrize("tile", TILES, ids=tile_id)
@pytest.mark.parametrize("few", [True, False], ids=["few channels", "many channels"])
def test_every_tile_alone(few, tile, dtype):
    conv = larger_than(tile, few)
    with use_tile("conv2d_flat" if few else "conv2d", tile):
        check_forward(conv, dtype, x="channels_last", bias="contiguous", activation="relu")


@pytest.mark.parametrize("few", [True, False], ids=["few channels", "many channels"])
@pytest.mark.parametrize("C", [16, 32, 48, 40], ids="{} channels".format)
def test_steps_with_and_without_a_remainder(C, few, monkeypatch):
    """Both kernels on the same channels: only the second has a form without masks."""
    monkeypatch.setattr(module, "FEW_CHANNELS", 1000 if few else 1)
    tile = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2)
    with use_tile("conv2d", tile), use_tile("conv2d_flat", tile):
        for padding in (0, 1):
            check_forward(Conv((1, C, 4, 5), 6, (3, 2), padding=padding), torch.float32)


@few_and_many
@every_dtype
def test_the_same_bits_twice(dtype, conv):
    inputs = [*conv.inputs(dtype), randn(conv.filters, dtype=dtype, seed=2)]
    fn = call(conv, activation="relu")
    first, second = (gradients(fn, inputs, conv.dy(dtype)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(g, h) for g, h in zip(first[1], second[1], strict=True))


# --- out of bounds: the checks of the forward above are made in poison, and this is the rest -----


@few_and_many
@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
def test_nothing_is_read_or_written_out_of_bounds(layout, dtype, conv):
    with poison() as p:
        inputs = [p(t) for t in conv.inputs(dtype, layout, layout)]
        bias, dy = p(randn(conv.filters, dtype=dtype, seed=2)), p(conv.dy(dtype, layout))
        gradients(call(conv, activation="relu"), [*inputs, bias], dy)


# --- offsets past 2^31 elements, on any machine -------------------------------------------------


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the tensors are as large as that, see below")
@pytest.mark.parametrize("dim", range(4), ids=["n", "c", "h", "w"])
@pytest.mark.parametrize("C", [5, 33], ids=["few channels", "many channels"])
def test_offsets_past_2_to_the_31_along(dim, C, tmp_path):
    tile = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2)
    conv = Conv((2, C, 3, 4), 3, (2, 2), padding=(1, 0))
    x, weight = conv.inputs(torch.float16)
    far = far_apart(x, dim, tmp_path / "x")
    with use_tile("conv2d", tile), use_tile("conv2d_flat", tile):
        assert torch.equal(call(conv)(far, weight), call(conv)(x, weight))


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


# --- wrong input --------------------------------------------------------------------------------

X, W, B = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 2), torch.ones(6)
WRONG = {
    "x is a list": (([[1.0]], W), TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ((None, W), TypeError, "x must be a torch.Tensor, got NoneType"),
    "weight is a number": ((X, 2.0), TypeError, "weight must be a torch.Tensor, got float"),
    "weight is None": ((X, None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    "bias is a list": ((X, W, [0.0] * 6), TypeError, "bias must be a torch.Tensor, got list"),
    "integers": (
        (X.int(), W.int()),
        TypeError,
        "x must be float32, float16 or bfloat16, got int32",
    ),
    "float64": ((X.double(), W.double()), TypeError, "x must be .*, got float64"),
    "complex": ((X, W.to(torch.complex64)), TypeError, "weight must be .*, got complex64"),
    "dtypes differ": ((X, W.half()), TypeError, r"weight .* x \(float32\), got float16"),
    "bias dtype": ((X, W, B.bfloat16()), TypeError, r"bias .* x \(float32\), got bfloat16"),
    "sparse": ((X.to_sparse(), W), TypeError, "x must be .*strided.*, got torch.sparse_coo"),
    "devices differ": ((X, W.to("meta")), TypeError, "weight must be on .* like x, got meta"),
    "bias elsewhere": ((X, W, B.to("meta")), TypeError, "bias must be on .* like x, got meta"),
    "x without batch": ((X[0], W), ValueError, r"x must .*\[N, C, H, W\], got \[4, 5, 6\]"),
    "x of 5 dimensions": ((X[None], W), ValueError, r"x must .*, got \[1, 2, 4, 5, 6\]"),
    "weight of 3": ((X, W[0]), ValueError, r"weight .*\[K, C/groups, R, S\], got \[4, 3, 2\]"),
    "channels differ": ((X, W[:, 1:]), ValueError, r"weight .* x \[2, 4, .*, got \[6, 3, 3, 2\]"),
    "groups=0": ((X, W, B, 1, 0, 1, 0), ValueError, "groups .* 4 channels .*, got 0"),
    "groups=-1": ((X, W, B, 1, 0, 1, -1), ValueError, "groups .* 4 channels .*, got -1"),
    "groups not of C": ((X, W, B, 1, 0, 1, 3), ValueError, "groups .* 4 channels .*, got 3"),
    "groups not of K": ((X, W[1:, :1], None, 1, 0, 1, 4), ValueError, r"weight .* got \[5, 1, 3"),
    "groups, whole weight": ((X, W, B, 1, 0, 1, 2), ValueError, r"weight .*groups=2.*\[6, 4, 3, 2"),
    "groups=2.0": ((X, W, B, 1, 0, 1, 2.0), TypeError, "groups must be an int, got 2.0"),
    "groups=True": ((X, W, B, 1, 0, 1, True), TypeError, "groups must be an int, got True"),
    "bias too short": ((X, W, B[1:]), ValueError, r"bias .*\[K\] with K=6, got \[5\]"),
    "bias a column": ((X, W, B[:, None]), ValueError, r"bias .* with K=6, got \[6, 1\]"),
    "stride=0": ((X, W, B, 0), ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "stride=(1, 0)": ((X, W, B, (1, 0)), ValueError, r"stride must be .* 1, got \(1, 0\)"),
    "stride=1.5": ((X, W, B, 1.5), TypeError, "stride must be an int or a pair .*, got 1.5"),
    "stride=None": ((X, W, B, None), TypeError, "stride must be an int or .*, got None"),
    "stride=True": ((X, W, B, True), TypeError, "stride must be an int or .*, got True"),
    "stride of 3": ((X, W, B, (1, 1, 1)), TypeError, r"stride must .*, got \(1, 1, 1\)"),
    "stride (1, 1.0)": ((X, W, B, (1, 1.0)), TypeError, r"stride must .*, got \(1, 1.0\)"),
    "padding=-1": ((X, W, B, 1, -1), ValueError, r"padding must be at least 0, got \(-1, -1\)"),
    "padding='same'": ((X, W, B, 1, "same"), TypeError, "padding must be an int .*, got 'same'"),
    "padding of 4": ((X, W, B, 1, (1, 1, 1, 1)), TypeError, r"padding .*, got \(1, 1, 1, 1\)"),
    "dilation=0": ((X, W, B, 1, 0, 0), ValueError, r"dilation must be at least 1, got \(0, 0\)"),
    "dilation='2'": ((X, W, B, 1, 0, "2"), TypeError, "dilation must be an int .*, got '2'"),
    "filter too high": ((X[:, :, :2], W), ValueError, "weight .*height is 3 taps .* 2 pixels"),
    "filter too wide": ((X, W, B, 1, 0, (1, 6)), ValueError, "weight .*width .* dilation 6"),
    "an empty filter": ((X, W[:, :, :0]), ValueError, "weight must have .*one tap.* 0 taps"),
    "an empty image": ((X[..., :0], W), ValueError, "weight .* fit .* 0 pixels"),
    "activation": (
        (X, W, B, 1, 0, 1, 1, "tanh"),
        ValueError,
        "activation must be .*'silu', got 'tanh'",
    ),
    "activation=True": ((X, W, B, 1, 0, 1, 1, True), ValueError, "activation .* got True"),
}


@pytest.mark.parametrize("args, error, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_any_launch(args, error, message, monkeypatch):
    def launched(*args, **kwargs):
        raise RuntimeError("launched")

    monkeypatch.setattr(module, "launch", launched)
    args = [
        t.to(DEVICE) if isinstance(t, torch.Tensor) and t.device.type != "meta" else t for t in args
    ]
    with pytest.raises(error, match=message):
        conv2d(*args)


def test_meta_tensors_give_the_shape():
    y = conv2d(X.to("meta"), W.to("meta"), B.to("meta"), 2, 1, activation="relu")
    assert y.device.type == "meta" and y.shape == (2, 6, 3, 4)


# --- on a GPU, at real sizes --------------------------------------------------------------------

REAL = {
    "ResNet-50, first": Conv((32, 3, 224, 224), 64, (7, 7), 2, 3),
    "ResNet-50, 1x1 out of a bottleneck": Conv((32, 64, 56, 56), 256, (1, 1)),
    "ResNet-50, 3x3": Conv((32, 64, 56, 56), 64, (3, 3), 1, 1),
    "ResNet-50, 3x3 of stride 2": Conv((32, 128, 56, 56), 128, (3, 3), 2, 1),
    "ResNet-50, shortcut of stride 2": Conv((32, 256, 56, 56), 512, (1, 1), 2),
    "ResNet-50, last 3x3": Conv((32, 512, 7, 7), 512, (3, 3), 1, 1),
    "VGG16, first": Conv((16, 3, 224, 224), 64, (3, 3), 1, 1),
    "VGG16, widest": Conv((16, 512, 28, 28), 512, (3, 3), 1, 1),
    "ResNeXt, 32 groups": Conv((32, 128, 56, 56), 128, (3, 3), 1, 1, 1, 32),
    "MobileNet, depthwise": Conv((32, 144, 56, 56), 144, (3, 3), 2, 1, 1, 144),
    "DeepLab, dilation 6": Conv((8, 256, 33, 33), 256, (3, 3), 1, 6, 6),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
def test_real_sizes(conv, dtype, layout):
    check_forward(conv, dtype, x=layout, weight=layout, bias="contiguous", activation="relu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=tile_id)
@pytest.mark.parametrize("few", [True, False], ids=["few channels", "many channels"])
def test_every_tile_at_real_size(few, tile, dtype):
    conv = Conv((4, 3 if few else 200, 57, 55), 300, (3, 3), 2, 1)
    with use_tile("conv2d_flat" if few else "conv2d", tile):
        check_forward(conv, dtype, x="channels_last")


@pytest.mark.gpu
@pytest.mark.parametrize("conv", [FEW, MANY, REAL["ResNet-50, 3x3"]], ids=["few", "many", "3x3"])
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


def need_memory(gib):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


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
