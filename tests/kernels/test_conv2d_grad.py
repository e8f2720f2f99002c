"""The gradients of conv2d by its input and by its weight, each alone, as the custom ops."""

import importlib
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d_input_grad import TILES as INPUT_TILES
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad
from tilelab.kernels.conv2d_weight_grad import TILES as WEIGHT_TILES
from tilelab.kernels.conv2d_weight_grad import conv2d_weight_grad

from tests.tools.convolutions import (
    CONVS,
    FEW,
    GROUPED,
    MANY,
    Conv,
    any_conv,
    every_conv,
    every_dtype,
    far_apart,
    few_and_many,
    integers,
)
from tests.tools.inputs import DEVICE, DTYPES, INTERPRET, LAYOUTS, double, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

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


@every_conv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_grad_of_geometry(conv, dtype):
    dx, want = check_input(conv, dtype)
    assert not dx[want == 0].any()  # a pixel that no window reads is exactly 0


@every_conv
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_grad_of_geometry(conv, dtype):
    check_weight(conv, dtype)


def unread(conv):
    """Which pixels of an image no window reads."""
    reads = reference(conv, torch.ones(conv.x), torch.ones(conv.y), torch.ones(conv.weight))[0]
    return reads[0, 0] == 0


@every_dtype
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
def test_pixels_that_no_window_reads_get_zero(name, pixels, dtype):
    """Exactly 0, and not what lay in memory: the gradient is stored for every pixel."""
    conv = CONVS[name]
    assert unread(conv).sum() == pixels
    dx, _ = check_input(conv, dtype)
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


@pytest.mark.parametrize("dilation", range(1, 13))
def test_inverse(dilation):
    for stride in range(1, 13):
        g, inverse = input_module._inverse(dilation, stride)
        assert g == math.gcd(dilation, stride)
        assert dilation // g * inverse % (stride // g) == 1 % (stride // g)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("dy", LAYOUTS)
def test_layouts_of_the_input_grad(dy, weight):
    check_input(MANY, torch.float32, dy=dy, weight=weight)


@pytest.mark.parametrize("dy", LAYOUTS)
@pytest.mark.parametrize("x", LAYOUTS)
def test_layouts_of_the_weight_grad(x, dy):
    check_weight(MANY, torch.float32, x=x, dy=dy)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS)
@few_and_many
def test_weight_grad_lies_as_the_weight_does(conv, weight, parts, monkeypatch):
    """Partial results too are laid out as the weight: their sum runs through memory in order."""
    monkeypatch.setattr(module, "splits", lambda programs, steps: parts)
    tile = {**SMALL, "BLOCK_M": 32, "BLOCK_N": 128}
    with use_tile("conv2d_weight_grad", tile):
        dw, _ = check_weight(conv, torch.float32, weight=weight)
    w = conv.inputs(torch.float32, weight=weight)[1]
    if weight in ("contiguous", "channels_last", "transposed"):
        assert dw.stride() == w.stride()
    else:  # torch.empty_like of what is not dense
        assert dw.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_16_bits(layout, dtype):
    check_input(FEW, dtype, dy=layout, weight=layout)
    check_weight(FEW, dtype, x=layout, dy=layout, weight=layout)


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


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype):
    x, weight = GROUPED.inputs(dtype, values=integers)
    dy = GROUPED.dy(dtype, values=integers)
    dx, dweight = reference(GROUPED, x, dy, weight)
    assert max(dx.abs().max(), dweight.abs().max()) < 256
    assert torch.equal(input_grad(GROUPED, dy, weight).double(), dx)
    assert torch.equal(weight_grad(GROUPED, x, dy, weight).double(), dweight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_float32_accumulation(parts, dtype, monkeypatch):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    monkeypatch.setattr(module, "splits", lambda programs, steps: parts)
    conv = Conv((1, 1, 64, 64), 1, (1, 1))
    x = torch.ones(conv.x, dtype=dtype, device=DEVICE)
    with use_tile("conv2d_weight_grad", {**SMALL, "BLOCK_K": 512}):
        assert weight_grad(conv, x, x, x[:, :, :1, :1]).item() == 4096
    conv = Conv((1, 1, 1, 1), 4096, (1, 1))
    ones = torch.ones(conv.y, dtype=dtype, device=DEVICE)
    assert input_grad(conv, ones, ones.view(conv.weight)).item() == 4096


@few_and_many
@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_nan_and_infinity_reach_what_torch_has_them_reach(where, value, dtype, conv):
    """Nothing leaks through the border, masked channels or rows that wrap around the last one.

    An infinity in the weight is another matter: outputs beyond the border count as 0 times it, so
    the pixels there become NaN where torch has fewer terms.
    """
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


@every_dtype
@pytest.mark.parametrize("conv", [LONG, GROUPED], ids=["9 steps", "groups, 5 steps"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 9], ids="{} parts".format)
def test_split_sum(parts, conv, dtype, monkeypatch):
    """Parts of equal length, a shorter last one, one step each; fewer than were asked for."""
    monkeypatch.setattr(module, "splits", lambda programs, steps: min(parts, steps))
    tile = {**SMALL, "BLOCK_N": 128}
    with use_tile("conv2d_weight_grad", tile):
        check_weight(conv, dtype)


def test_split_sum_is_exact_and_the_same_for_any_number_of_parts(monkeypatch):
    x, weight = LONG.inputs(torch.float32, values=integers)
    dy = LONG.dy(torch.float32, values=integers)
    want = reference(LONG, x, dy, weight)[1]
    for parts in range(1, 10):
        monkeypatch.setattr(module, "splits", lambda programs, steps, parts=parts: parts)
        with use_tile("conv2d_weight_grad", SMALL):
            assert torch.equal(weight_grad(LONG, x, dy, weight).double(), want)


def test_split_sum_is_asked_for_the_programs_and_steps_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "splits", lambda *args: asked.append(args) or 1)
    for conv in (LONG, GROUPED):
        with use_tile("conv2d_weight_grad", SMALL):
            check_weight(conv, torch.float32)
    # LONG: 5 filters, 24 columns, 144 pixels; GROUPED, in each of 2 groups: 3, 108 and 72
    assert asked == [(1 * 2, 9), (2 * 1 * 7, 5)]


def test_partial_results_are_float32(monkeypatch):
    """16-bit ones would each be rounded: eight parts of one half ulp are lost, or they are not."""
    monkeypatch.setattr(module, "splits", lambda programs, steps: steps)
    conv = Conv((1, 1, 1, 32), 1, (1, 1))
    x = torch.ones(conv.x, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros_like(x)
    dy[..., 0], dy[..., 1], dy[..., 16], dy[..., 17] = 1, 2**-8, 2**-9, 2**-9  # ulp of 1: 2^-7
    with use_tile("conv2d_weight_grad", SMALL):
        dw = weight_grad(conv, x, dy, x[..., :1])
    assert dw.item() == 1 + 2**-7


# --- tiles --------------------------------------------------------------------------------------


def tile_id(tile):
    return "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")


def larger_input(tile):
    """For the input gradient: a tile and a remainder of pixels, channels and filters."""
    width = -(-tile["BLOCK_M"] // 9) + 1
    return Conv((3, tile["BLOCK_N"] + 3, 3, width), tile["BLOCK_K"] + 5, (1, 2), padding=(0, 1))


def larger_weight(tile):
    """For the weight gradient: a tile and a remainder of filters, (r, s, c) and pixels."""
    width = -(-tile["BLOCK_K"] // 3) + 2
    return Conv((1, tile["BLOCK_N"] // 2 + 3, 3, width), tile["BLOCK_M"] + 3, (1, 2))


@every_dtype
@pytest.mark.parametrize("tile", INPUT_TILES, ids=tile_id)
def test_every_input_tile_alone(tile, dtype):
    with use_tile("conv2d_input_grad", tile):
        check_input(larger_input(tile), dtype)


@every_dtype
@pytest.mark.parametrize("tile", WEIGHT_TILES, ids=tile_id)
def test_every_weight_tile_alone(tile, dtype):
    with use_tile("conv2d_weight_grad", tile):
        check_weight(larger_weight(tile), dtype)


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


@pytest.mark.parametrize("parts", [1, 3])
@every_dtype
def test_the_same_bits_twice(dtype, parts, monkeypatch):
    monkeypatch.setattr(module, "splits", lambda programs, steps: parts)
    (x, weight), dy = GROUPED.inputs(dtype), GROUPED.dy(dtype)
    with use_tile("conv2d_weight_grad", {**SMALL, "BLOCK_N": 128}):
        first, second = (weight_grad(GROUPED, x, dy, weight) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (input_grad(GROUPED, dy, weight) for _ in range(2))
    assert torch.equal(first, second)


# --- out of bounds: every check above is made in poison, and this is the rest -------------------


@every_dtype
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("parts", [1, 3])
def test_nothing_is_read_or_written_out_of_bounds(parts, layout, dtype, monkeypatch):
    monkeypatch.setattr(module, "splits", lambda programs, steps: parts)
    (x, weight), dy = GROUPED.inputs(dtype, layout, layout), GROUPED.dy(dtype, layout)
    with use_tile("conv2d_weight_grad", {**SMALL, "BLOCK_N": 128}), poison() as p:
        weight_grad(GROUPED, p(x), p(dy), p(weight))
    with use_tile("conv2d_input_grad", {**SMALL, "BLOCK_M": 64}), poison() as p:
        input_grad(GROUPED, p(dy), p(weight))


# --- offsets past 2^31 elements, on any machine -------------------------------------------------


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the tensors are as large as that, see below")
@pytest.mark.parametrize("dim", range(4), ids=["n", "channels", "height", "width"])
@pytest.mark.parametrize("which", ["input grad, dy", "weight grad, dy", "weight grad, x"])
def test_offsets_past_2_to_the_31_along(which, dim, tmp_path):
    conv = Conv((2, 33 if which[-1] == "x" else 3, 3, 4), 33 if which[-1] == "y" else 3, (2, 2))
    (x, weight), dy = conv.inputs(torch.float16), conv.dy(torch.float16)
    if which == "input grad, dy":
        with use_tile("conv2d_input_grad", SMALL):
            want = input_grad(conv, dy, weight)
            assert torch.equal(input_grad(conv, far_apart(dy, dim, tmp_path / "dy"), weight), want)
        return
    tile = {**SMALL, "BLOCK_N": 64}
    with use_tile("conv2d_weight_grad", tile):
        want = weight_grad(conv, x, dy, weight)
        if which == "weight grad, dy":
            dy = far_apart(dy, dim, tmp_path / "dy")
        else:
            x = far_apart(x, dim, tmp_path / "x")
        assert torch.equal(weight_grad(conv, x, dy, weight), want)


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
        patch.setattr(module, "splits", lambda programs, steps: parts)
        tile = dict(BLOCK_M=64, BLOCK_N=1024, BLOCK_K=32, num_warps=4, num_stages=2)
        with use_tile("conv2d_weight_grad", tile):
            dw = weight_grad(conv, p(image), p(grad), p(w))
    assert torch.equal(dw, dw64.to(dtype))


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
    (x, weight), dy = conv.inputs(dtype, layout, layout), conv.dy(dtype, layout)
    want = reference(conv, x, dy, weight)
    got = input_grad(conv, dy, weight), weight_grad(conv, x, dy, weight)
    for name, result, expected in zip(["dx", "dw"], got, want, strict=True):
        assert_close(result, expected, dtype=dtype, terms=conv.terms[name], name=name)
    assert torch.equal(weight_grad(conv, x, dy, weight), got[1])  # split, and deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", INPUT_TILES, ids=tile_id)
def test_every_input_tile_at_real_size(tile, dtype):
    with use_tile("conv2d_input_grad", tile):
        check_input(Conv((4, 200, 57, 55), 300, (3, 3), 2, 1), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", WEIGHT_TILES, ids=tile_id)
def test_every_weight_tile_at_real_size(tile, dtype):
    with use_tile("conv2d_weight_grad", tile):
        check_weight(Conv((4, 200, 57, 55), 300, (3, 3), 2, 1), dtype)


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
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 40:
        pytest.skip(f"needs 40 GiB of GPU memory, {free:.1f} are free")
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
