"""The gradients of conv2d by its input and by its weight, each alone, and in parts."""

import importlib
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.convolutions import (
    CONVS,
    FEW,
    GROUPED,
    MANY,
    Conv,
    any_conv,
    every_dtype,
    few_and_many,
    integers,
)
from tests.tools.inputs import DEVICE, DTYPES, LAYOUTS, double, need_memory, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, conv2d
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad
from tilelab.kernels.conv2d_weight_grad import (
    TILES,
    conv2d_weight_bias_grad,
    conv2d_weight_grad,
)
from tilelab.kernels.conv2d_weight_grad_tma import FAST_TILES

input_module = importlib.import_module("tilelab.kernels.conv2d_input_grad")
module = importlib.import_module("tilelab.kernels.conv2d_weight_grad")
WEIGHT_LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]  # [1] is KRSC
SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2)


def input_grad(conv, dy, weight):
    return conv2d_input_grad(dy, weight, list(conv.x), *conv.lists)


def weight_grad(conv, x, dy, weight):
    """`weight` is there for its shape and layout."""
    return conv2d_weight_grad(x, dy, weight, *conv.lists)


def reference(conv, x, dy, weight):
    """(dx, dweight) by autograd of torch's own convolution, in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = torch.nn.functional.conv2d(x, weight, None, *conv.args)
    return torch.autograd.grad(y, [x, weight], double(dy))


def check_input(conv, dtype, *, dy="contiguous", weight="contiguous"):
    """dx, in poison, against float64; `dy` and `weight` name layouts."""
    x, w = conv.inputs(dtype, weight=weight)
    grad = conv.dy(dtype, dy)
    with poison() as p:
        dx = input_grad(conv, p(grad), p(w))
    want = reference(conv, x, grad, w)[0]
    alike = "expanded" in (dy, weight)  # equal images, or a sum over equal filters
    assert_close(dx, want, dtype=dtype, terms=conv.terms["dx"], name="dx", teeth=not alike)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    return dx, want


def check_weight(conv, dtype, *, x="contiguous", dy="contiguous", weight="contiguous"):
    """dweight, in poison, against float64; `x`, `dy` and `weight` name layouts."""
    image, w = conv.inputs(dtype, x, weight)
    grad = conv.dy(dtype, dy)
    with poison() as p:
        dw = weight_grad(conv, p(image), p(grad), p(w))
    want = reference(conv, image, grad, w)[1]
    assert_close(dw, want, dtype=dtype, terms=conv.terms["dw"], name="dweight")
    assert dw.stride() == torch.empty_like(w).stride()
    return dw, want


# --- geometry, each for a reason ----------------------------------------------------------------


def unread(conv):
    """Which pixels of an image no window reads."""
    reads = reference(conv, torch.ones(conv.x), torch.ones(conv.y), torch.ones(conv.weight))[0]
    return reads[0, 0] == 0


@pytest.mark.parametrize(
    "name, pixels",
    {
        "stride 2 that leaves a row and a column unread": 8 + 10 - 1,
        "stride 3 that leaves two of them unread": 2 * 11 + 2 * 8 - 4,
        "stride 2 of 1x1: a shortcut": 42 - 4 * 3,
        "stride 3 of 2x2: unread pixels between windows": 72 - 6 * 6,
        "dilation 2, stride 2: every second class has no tap": 90 - 4 * 5,
    }.items(),
)
def test_pixels_that_no_window_reads_get_zero(name, pixels):
    """Exactly 0, and not what lay in memory: the gradient is stored for every pixel."""
    conv = CONVS[name]
    assert unread(conv).sum() == pixels
    dx, _ = check_input(conv, torch.bfloat16)
    assert not dx[:, :, unread(conv).to(DEVICE)].any()


@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_every_pair_of_stride_and_dilation(stride, dilation):
    """A class of pixels finds its taps by an inverse modulo stride: every kind of it, exactly."""
    conv = Conv((1, 3, 1, 41), 4, (1, 6), (1, stride), (0, 2), (1, dilation))
    for transposed in (False, True):  # along the width, and along the height
        if transposed:
            conv = Conv((1, 3, 41, 1), 4, (6, 1), (stride, 1), (2, 0), (dilation, 1))
        x, weight = conv.inputs(torch.float32, values=integers)
        dy = conv.dy(torch.float32, values=integers)
        dx, dweight = reference(conv, x, dy, weight)
        assert torch.equal(input_grad(conv, dy, weight).double(), dx)
        assert torch.equal(weight_grad(conv, x, dy, weight).double(), dweight)


def test_inverse():
    for dilation, stride in itertools.product(range(1, 13), repeat=2):
        g, inverse = input_module._inverse(dilation, stride)
        assert g == math.gcd(dilation, stride)
        assert dilation // g * inverse % (stride // g) == 1 % (stride // g)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("conv", [FEW, GROUPED], ids=["few channels", "groups"])
def test_weight_grad_lies_as_the_weight_does(conv, weight, monkeypatch):
    """Partial results too are laid out as the weight: their sum runs through memory in order."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: 3)
    tile = {**SMALL, "BLOCK_M": 32, "BLOCK_N": 128}
    with use_tile("conv2d_weight_grad", tile):
        dw, _ = check_weight(conv, torch.float32, weight=weight)
    w = conv.inputs(torch.float32, weight=weight)[1]
    if weight in ("contiguous", "channels_last", "transposed"):
        assert dw.stride() == w.stride()
    else:  # torch.empty_like of what is not dense
        assert dw.is_contiguous()


# --- nothing to do ------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("C", [5, 18], ids=["few channels", "many channels"])
def test_empty_batch(C, dtype):
    conv = Conv((0, C, 6, 7), 4, (3, 2), 2, 1)
    (x, weight), dy = conv.inputs(dtype), conv.dy(dtype)
    assert input_grad(conv, dy, weight).shape == conv.x
    with poison() as p:  # a sum over no pixels: written, and zero
        dw = weight_grad(conv, x, dy, p(weight))
    assert torch.equal(dw, torch.zeros_like(weight))


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_float32_accumulation(parts, dtype, monkeypatch):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: parts)
    conv = Conv((1, 1, 64, 64), 1, (1, 1))
    x = torch.ones(conv.x, dtype=dtype, device=DEVICE)
    with use_tile("conv2d_weight_grad", {**SMALL, "BLOCK_K": 512}):
        assert weight_grad(conv, x, x, x[:, :, :1, :1]).item() == 4096
    conv = Conv((1, 1, 1, 1), 4096, (1, 1))
    ones = torch.ones(conv.y, dtype=dtype, device=DEVICE)
    assert input_grad(conv, ones, ones.view(conv.weight)).item() == 4096


@few_and_many
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_nan_and_infinity_reach_what_torch_has_them_reach(where, value, conv):
    """Nothing leaks through the border, masked channels or rows that wrap around the last one.

    An infinity in the weight is another matter: outputs beyond the border count as 0 times it, so
    the pixels there become NaN where torch has fewer terms.
    """
    dtype = torch.float16 if value < 0 else torch.float32
    (x, weight), dy = conv.inputs(dtype), conv.dy(dtype)
    wrong = x if where == "x" else dy
    wrong[0, 0, 0, 0] = value  # in a corner of the first image, and within the last
    wrong[-1, -1, 1, 2] = value
    want = reference(conv, x, dy, weight)
    if where == "dy":
        assert 0 < want[0].isfinite().sum() < want[0].numel()
        dx = input_grad(conv, dy, weight)
        assert_close(dx, want[0], dtype=dtype, terms=conv.terms["dx"], name="dx")
    assert 0 < want[1].isfinite().sum() < want[1].numel()
    dw = weight_grad(conv, x, dy, weight)
    assert_close(dw, want[1], dtype=dtype, terms=conv.terms["dw"], name="dweight")


# --- the split sum of the weight gradient -------------------------------------------------------

LONG = Conv((3, 4, 6, 7), 5, (3, 2), padding=1)  # a sum over 144 pixels: 9 steps of 16


@pytest.mark.parametrize("conv", [LONG, GROUPED], ids=["9 steps", "groups, 5 steps"])
@pytest.mark.parametrize("parts", [1, 2, 4, 7], ids="{} parts".format)
def test_split_sum(parts, conv, monkeypatch):
    """Parts of equal length, a shorter last one, one step each; fewer than were asked for."""
    dtype = DTYPES[parts % 3]
    monkeypatch.setattr(module, "part_count", lambda programs, steps: min(parts, steps))
    tile = {**SMALL, "BLOCK_N": 128}
    with use_tile("conv2d_weight_grad", tile):
        check_weight(conv, dtype)


def test_split_sum_is_exact_and_the_same_for_any_number_of_parts(monkeypatch):
    x, weight = LONG.inputs(torch.float32, values=integers)
    dy = LONG.dy(torch.float32, values=integers)
    want = reference(LONG, x, dy, weight)[1]
    for parts in range(1, 10):
        monkeypatch.setattr(module, "part_count", lambda programs, steps, parts=parts: parts)
        with use_tile("conv2d_weight_grad", SMALL):
            assert torch.equal(weight_grad(LONG, x, dy, weight).double(), want)


def test_split_sum_is_asked_for_the_programs_and_steps_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "part_count", lambda *args: asked.append(args) or 1)
    for conv in (LONG, GROUPED):
        with use_tile("conv2d_weight_grad", SMALL):
            check_weight(conv, torch.float32)
    # LONG: 5 filters, 24 columns, 144 pixels; GROUPED, in each of 2 groups: 3, 108 and 72
    assert asked == [(1 * 2, 9), (2 * 1 * 7, 5)]


def test_partial_results_are_float32(monkeypatch):
    """16-bit ones would each be rounded: eight parts of one half ulp are lost, or they are not."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: steps)
    conv = Conv((1, 1, 1, 32), 1, (1, 1))
    x = torch.ones(conv.x, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros_like(x)
    dy[..., 0], dy[..., 1], dy[..., 16], dy[..., 17] = 1, 2**-8, 2**-9, 2**-9  # ulp of 1: 2^-7
    with use_tile("conv2d_weight_grad", SMALL):
        dw = weight_grad(conv, x, dy, x[..., :1])
    assert dw.item() == 1 + 2**-7


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [FEW, MANY, GROUPED], ids=["few", "many", "groups"])
def test_several_tiles_of_every_class(conv):
    """Classes of pixels of different sizes: the last tile of the small ones is empty."""
    with use_tile("conv2d_input_grad", SMALL):
        check_input(conv, torch.float32)


@pytest.mark.parametrize("K", [16, 32, 48, 40], ids="{} filters".format)
def test_steps_with_and_without_a_remainder(K):
    """A number of filters that BLOCK_K divides has a form without masks."""
    with use_tile("conv2d_input_grad", SMALL):
        check_input(Conv((1, 3, 4, 4), K, (3, 2), padding=1), torch.float32)


@every_dtype
def test_the_same_bits_twice(dtype, monkeypatch):
    """In parts, which the interpreter has none of by itself."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: 3)
    (x, weight), dy = GROUPED.inputs(dtype), GROUPED.dy(dtype)
    with use_tile("conv2d_weight_grad", {**SMALL, "BLOCK_N": 128}):
        first, second = (weight_grad(GROUPED, x, dy, weight) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (input_grad(GROUPED, dy, weight) for _ in range(2))
    assert torch.equal(first, second)


# --- out of bounds: every check above is made in poison, and this is the rest -------------------


@pytest.mark.parametrize(
    "dtype, layout", list(zip(DTYPES, ["channels_last", "sliced", "offset"], strict=True))
)
def test_nothing_is_read_or_written_out_of_bounds(dtype, layout, monkeypatch):
    """In parts, which the interpreter has none of by itself."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: 3)
    (x, weight), dy = GROUPED.inputs(dtype, layout, layout), GROUPED.dy(dtype, layout)
    with use_tile("conv2d_weight_grad", {**SMALL, "BLOCK_N": 128}), poison() as p:
        weight_grad(GROUPED, p(x), p(dy), p(weight))
    with use_tile("conv2d_input_grad", {**SMALL, "BLOCK_M": 64}), poison() as p:
        input_grad(GROUPED, p(dy), p(weight))


# --- anything else ------------------------------------------------------------------------------


@hypothesis.given(
    conv=any_conv(), dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS),
    weight=st.sampled_from(WEIGHT_LAYOUTS), dy=st.sampled_from(LAYOUTS), parts=st.integers(1, 4),
)  # fmt: skip
def test_any_convolution(conv, dtype, x, weight, dy, parts):
    """In small integers, so that everything is exact but the rounding of the results."""
    image, w = conv.inputs(dtype, x, weight, integers)
    grad = conv.dy(dtype, dy, integers)
    dx64, dw64 = reference(conv, image, grad, w)
    with poison() as p:
        assert torch.equal(input_grad(conv, p(grad), p(w)), dx64.to(dtype))
    with pytest.MonkeyPatch.context() as patch, poison() as p:
        patch.setattr(module, "part_count", lambda programs, steps: parts)
        tile = dict(BLOCK_M=64, BLOCK_N=1024, BLOCK_K=32, num_warps=4, num_stages=2)
        with use_tile("conv2d_weight_grad", tile):
            dw = weight_grad(conv, p(image), p(grad), p(w))
    assert torch.equal(dw, dw64.to(dtype))


# --- the bias gradient with the weight gradient, and atomics --------------------------------------

PORTABLE = dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
OTHERS = {
    "few channels": Conv((3, 5, 6, 7), 37, (3, 2), (2, 1), 1),
    "several blocks": Conv((2, 18, 5, 6), 40, (2, 3), (1, 2), 1),
    "groups": Conv((3, 36, 9, 8), 6, (2, 3), (2, 1), (0, 1), (1, 2), groups=2),
}
ANY_GPU = _launch.Device(80, sms=108)


@pytest.mark.core
@pytest.mark.parametrize("atomic", [False, True], ids=["", "atomic"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layer", OTHERS)
def test_bias_gradient_parts_and_atomics(layer, parts, atomic, monkeypatch):
    """In integers all are exact, in whatever order they are added up."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: parts)
    conv, dtype = OTHERS[layer], DTYPES[(list(OTHERS).index(layer) + parts) % 3]
    tile = PORTABLE | (dict(ATOMIC=True) if atomic else {})
    given = tile.copy()
    (x, weight), dy = conv.inputs(dtype, values=integers), conv.dy(dtype, values=integers)
    with use_tile("conv2d_weight_grad", tile):
        with poison() as p:
            dw, db = conv2d_weight_bias_grad(p(x), p(dy), p(weight), *conv.lists)
            alone = weight_grad(conv, p(x), p(dy), p(weight))
        with _launch.record(ANY_GPU) as events:
            weight_grad(conv, x, dy, weight)
    assert torch.equal(dw, reference(conv, x, dy, weight)[1].to(dtype)) and torch.equal(dw, alone)
    assert torch.equal(db, double(dy).sum((0, 2, 3)).to(dtype)) and db.any()
    first, *sums = (e for e in events if isinstance(e, _launch.Launch))
    assert first.meta["ATOMIC"] == atomic and first.grid[2] == parts
    assert len(sums) == (atomic or parts > 1) and tile == given


def test_no_atomics_where_torch_is_to_be_deterministic():
    conv = OTHERS["several blocks"]
    (x, weight), dy = conv.inputs(torch.float16), conv.dy(torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        with use_tile("conv2d_weight_grad", PORTABLE | dict(ATOMIC=True)):
            with _launch.record(ANY_GPU) as events:
                weight_grad(conv, x, dy, weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not next(e for e in events if isinstance(e, _launch.Launch)).meta["ATOMIC"]


def test_no_default_is_atomic():
    assert not any(tile.get("ATOMIC") for tile in TILES + FAST_TILES[2])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("needs", ["weight and bias", "weight", "bias"])
def test_the_bias_gradient_comes_with_the_weight_gradient(needs, activation):
    """dy is read once for both; but through a ReLU it comes with that."""
    conv = Conv((16, 24, 5, 6), 32, (3, 3), 1, 1)
    x, weight = conv.inputs(torch.bfloat16, "channels_last", "channels_last", integers)
    dy = conv.dy(torch.bfloat16, "channels_last", integers)
    bias = integers(32, dtype=torch.bfloat16, seed=2)
    weight.requires_grad_("weight" in needs)
    bias.requires_grad_("bias" in needs)

    def backward():
        conv2d(x, weight, bias, padding=1, activation=activation).backward(dy)

    with _launch.record(_launch.Device(90, sms=132)) as events:
        backward()
    names = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    sums = "bias_activation_backward_kernel" in names
    assert sums == (activation == "relu" or needs == "bias")
    assert ("conv2d_weight_grad_tma_kernel" in names) == ("weight" in needs)
    weight.grad = bias.grad = None
    backward()
    w, b = (t.detach().double().requires_grad_() for t in (weight, bias))
    y = torch.nn.functional.conv2d(x.double(), w, b, padding=1)
    (y if activation is None else y.relu()).backward(dy.double())
    for got, want in ((weight, w), (bias, b)):
        assert (got.grad is None) == (not got.requires_grad)
        assert got.grad is None or torch.equal(got.grad, want.grad.to(got.dtype))


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "conv",
    [
        Conv((33, 64, 1024, 1024), 16, (3, 3), 4, 1),
        Conv((1, 160, 4096, 4096), 16, (3, 3), 4, 1),
        Conv((9, 16, 2048, 2048), 64, (1, 1)),
        Conv((1, 16, 4096, 4096), 160, (1, 1)),
    ],
    ids=["x", "channels of x", "dy", "channels of dy"],
)
def test_offsets_past_2_to_the_31(conv, layout):
    """Only the last rows of dy are not zero, and they lie beyond 2^31 elements with x or dx."""
    need_memory(40)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    like = dict(device="cuda", dtype=torch.bfloat16, memory_format=memory)
    x = torch.empty(conv.x, **like).normal_()
    dy = torch.empty(conv.y, **like).zero_()
    assert max(x.numel(), dy.numel()) > 2**31
    weight = randn(*conv.weight, dtype=torch.bfloat16, seed=1)
    step, (R, pad) = conv.lists[0][0], (conv.taps[0], conv.lists[1][0])
    P = 64  # these rows of dy, and the rows of x that they read; no padding at their top
    dy[-1, :, -P:] = randn(*dy[-1, :, -P:].shape, dtype=torch.bfloat16, seed=2)
    top = (dy.shape[2] - P) * step - pad
    small = Conv((1, conv.x[1], conv.x[2] - top, conv.x[3]), conv.filters, conv.taps, step)
    image = torch.nn.functional.pad(x[-1:, :, top:].double(), (pad, pad, 0, pad))
    dx64, dw64 = reference(small, image, dy[-1:, :, -P:], weight)
    dx64 = dx64[:, :, : conv.x[2] - top, pad : pad + conv.x[3]]

    dw = weight_grad(conv, x, dy, weight)
    terms = P * conv.y[3]
    assert_close(dw, dw64, dtype=torch.bfloat16, terms=terms, name="dweight")
    del x
    dx = input_grad(conv, dy, weight)
    terms = conv.terms["dx"]
    assert_close(dx[-1:, :, top:], dx64, dtype=torch.bfloat16, terms=terms, name="dx")
    assert not dx[:-1].any() and not dx[-1, :, : top - R].any()
