"""The weight gradient's kernel for TMA: it agrees with float64, and is chosen where it can be.

Here it runs in the interpreter, or on this machine's GPU. What it compiles to is held to its bars
at the end. And what both kernels can do besides: the bias gradient, atomics.
"""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import _launch, conv2d
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d_tma import LARGEST
from tilelab.kernels.conv2d_weight_grad import TILES, conv2d_weight_bias_grad, conv2d_weight_grad
from tilelab.kernels.conv2d_weight_grad_tma import (
    FAST_TILES,
    _layout,
    as_neighbours,
    conv2d_weight_grad_tma_kernel,
    fast_tile,
    make_plan,
    pixels_inside,
)

from tests.tools.convolutions import Conv, integers
from tests.tools.inputs import DEVICE, laid_out, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.conv2d_weight_grad")
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


def gradient(conv, x, dy, weight):
    """dweight in float64, by autograd of torch's own convolution."""
    w = weight.detach().double().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), w, None, *conv.args)
    return torch.autograd.grad(y, [w], dy.double())[0]


@functools.cache
def wanted(conv, dtype, values=integers):
    """(dweight, dbias) in float64."""
    x, dy, weight = operands(conv, dtype, values)
    return gradient(conv, x, dy, weight), dy.double().sum((0, 2, 3))


# --- the same results -----------------------------------------------------------------------------

LAYERS = {
    # geometry; of no tile's size the batch, the channels or the filters are a multiple
    "3x3": Conv((33, 72, 2, 3), 40, (3, 3), 1, 1),
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
    "padding larger than the image, stride 2": Conv((16, 24, 3, 2), 24, (3, 3), 2, 3),
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
    # pixels side by side are columns: few channels, and padding
    "16 channels, padding 1": Conv((17, 16, 4, 5), 24, (3, 3), 1, 1),
    "16 channels, stride (2, 1), dilation (3, 1)": Conv(
        (16, 16, 8, 3), 24, (2, 3), (2, 1), (1, 2), (3, 1)
    ),
    # few channels: packed
    "7x7, stride 2": Conv((16, 3, 9, 8), 72, (7, 7), 2, 3),
    "3x3 of 3 channels": Conv((17, 3, 4, 5), 24, (3, 3), padding=1),
    "3x2 of 5 channels, stride (1, 3)": Conv((16, 5, 4, 7), 24, (3, 2), (1, 3), (0, 1)),
    "4x4, stride 4: patches, each a pixel": Conv((5, 3, 8, 9), 24, (4, 4), 4),
    "5x5 of one channel": Conv((16, 1, 6, 7), 24, (5, 5)),
}  # fmt: skip


NEIGHBOURS = {  # layers, tiles whose columns are a row of taps, and pixels of dy of their rows
    "64 channels": (Conv((32, 64, 3, 4), 64, (3, 3), 1, 1), "128x256x32", 2),
    "33 images": (Conv((33, 64, 2, 4), 64, (3, 3), 1, 1), "128x256x64", 2),
    "an odd row": (Conv((17, 64, 2, 5), 64, (3, 3), 1, 1), "128x256x32", 1),
    "two taps": (Conv((16, 64, 2, 3), 64, (2, 2)), "128x256x32", 2),
    "four taps": (Conv((16, 64, 2, 5), 64, (1, 4), 1, (0, 1)), "128x256x32", 1),
    "images of one pixel": (Conv((16, 64, 1, 1), 64, (3, 2), 1, 1), "128x256x32", 2),
    "padding larger than the filter": (Conv((16, 64, 2, 1), 64, (3, 3), 1, 4), "128x256x32", 1),
    "and two pixels of dy": (Conv((16, 64, 2, 2), 64, (3, 3), 1, 4), "128x256x32", 2),
    "stride (2, 1)": (Conv((16, 64, 5, 4), 64, (3, 3), (2, 1), 1), "128x256x32", 2),
    "128 filters": (Conv((16, 64, 2, 4), 128, (3, 3), 1, 1), "128x256x32", 1),
    "136 filters": (Conv((16, 64, 2, 3), 136, (3, 3), 1, 1), "64x256x32", 1),
    "40 filters": (Conv((16, 64, 2, 4), 40, (3, 3), 1, 1), "128x256x32", 1),
    "72 channels": (Conv((16, 72, 2, 3), 64, (3, 3), 1, 1), "128x256x32", 1),
    "32 channels": (Conv((16, 32, 2, 4), 64, (3, 3), 1, 1), "128x128x32", 2),
    "32 filters": (Conv((16, 64, 2, 4), 32, (2, 3), 1, 1), "64x256x32", 2),
    "five taps": (Conv((16, 24, 2, 5), 24, (2, 5), 1, (0, 2)), "64x128x32", 1),
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
    """One part and three, which divide nothing; either layout of the weight; and the bias."""
    check(conv, SMALL, torch.bfloat16)
    check(conv, SMALL | dict(SPLIT_K=3), torch.float16, weight="contiguous", bias=True)


@pytest.mark.core
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("layer", ["stride 2, an odd image", "16 channels"])
def test_every_tile(layer, tile):
    check(LAYERS[layer], tile | dict(SPLIT_K=2), torch.float16, bias=True)


@pytest.mark.core
@pytest.mark.parametrize("conv, tile, pixels", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_columns(conv, tile, pixels):
    seen = as_neighbours(plan_of(conv), TILE[tile])
    assert seen.neighbours == (pixels, pixels * conv.x[1], -conv.lists[1][1] * conv.x[1])
    check(conv, TILE[tile], torch.bfloat16, weight="contiguous", bias=True)
    check(conv, TILE[tile] | dict(SPLIT_K=3), torch.float16, bias=True)


@pytest.mark.parametrize("where", ["x", "dy"])
def test_neighbours_in_slices_of_tensors(where):
    """Pixels with other channels between them are no columns of x; of dy they are no pairs."""
    conv, _, _ = NEIGHBOURS["64 channels"]
    x, dy, weight = operands(conv, torch.bfloat16)
    wide = torch.cat([x, x] if where == "x" else [dy, dy], 1)
    wide = wide.contiguous(memory_format=torch.channels_last)[:, :64]
    inputs = (wide, dy, weight) if where == "x" else (x, wide, weight)
    tile = TILE["128x256x32"]
    with _launch.record(HOPPER) as events:
        run(conv, tile, inputs, bias=True)
    launch = next(e for e in events if getattr(e, "kernel", None) is conv2d_weight_grad_tma_kernel)
    assert (launch.meta["DY_PIXELS"], launch.meta["X_STEP"]) == (1, 0 if where == "x" else 64)
    for got, want in zip(run(conv, tile, inputs, True), wanted(conv, torch.bfloat16), strict=True):
        assert torch.equal(got, want.to(torch.bfloat16))


@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
def test_more_than_a_tile(tile):
    """Of filters, channels and images each a tile and a remainder."""
    m, n, k = (tile[f"BLOCK_{d}"] for d in "MNK")
    check(Conv((k + 1, n + 8, 2, 1), m + 8, (2, 1), padding=(1, 0)), tile, torch.float16, bias=True)


@pytest.mark.parametrize("parts", [1, 2, 5, 16])
@pytest.mark.parametrize("layer", ["2x3, no padding", "3x3 of one pixel"])
def test_parts_of_the_sum(layer, parts):
    """More than there are steps, too: those have nothing to add, and write zeros."""
    check(LAYERS[layer], SMALL | dict(SPLIT_K=parts), torch.bfloat16, bias=True)


@pytest.mark.parametrize("per_sm", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_program_does_its_share(per_sm, bias):
    """One program a tile, or a few that take turns: each tile is computed, and once."""
    conv, tile = LAYERS["2x3, no padding"], SMALL | dict(PROGRAMS_PER_SM=per_sm, SPLIT_K=3)
    check(conv, tile, torch.float16, bias=bias)
    with _launch.record(Device(90, sms=2)) as events:
        run(conv, tile, operands(conv, torch.float16), bias)
    launches = [e for e in events if getattr(e, "kernel", None) is conv2d_weight_grad_tma_kernel]
    work = (6 + bias) * 3
    assert [e.grid for e in launches] == [(min(work, 2 * per_sm) if per_sm else work,)]


@pytest.mark.core
@pytest.mark.parametrize(
    "layer, dtype",
    [
        ("3x3", torch.float16),
        ("stride 2", torch.bfloat16),
        ("16 channels", torch.float16),
        ("7x7, stride 2", torch.bfloat16),
        ("1x1", torch.bfloat16),
        ("16 channels, padding 1", torch.bfloat16),
    ],
)
def test_against_float64(layer, dtype):
    conv = LAYERS[layer]
    got = run(conv, SMALL | dict(SPLIT_K=2), operands(conv, dtype, randn), bias=True)
    for g, want, what in zip(got, wanted(conv, dtype, randn), ("dw", "db"), strict=True):
        assert_close(g, want, dtype=dtype, terms=conv.terms[what], name=what)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_same_bits_twice(parts):
    conv = LAYERS["stride 2"]
    inputs = operands(conv, torch.bfloat16, randn)
    tile = SMALL | dict(SPLIT_K=parts)
    first, second = (run(conv, tile, inputs, bias=True) for _ in range(2))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


def test_partial_results_are_float32():
    """16-bit ones would each be rounded: parts of half an ulp are lost, or they are not."""
    conv = Conv((128, 8, 1, 1), 8, (1, 1))
    x = torch.ones(conv.x, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros_like(x)
    dy[0], dy[1], dy[64], dy[65] = 1, 2**-8, 2**-9, 2**-9  # ulp of 1: 2^-7
    got = run(conv, SMALL | dict(SPLIT_K=2), (x, dy, x[:8]), bias=True)
    assert all((t == 1 + 2**-7).all() for t in got)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize(
    "layer",
    ["stride 2, an odd image", "16 channels", "16 channels, padding 1", "7x7, stride 2"],
)
def test_nan_and_infinity_go_where_torch_has_them(layer, where, value):
    """In a corner of the last image; and of dy not to taps that are in the padding there.

    torch multiplies those with zeros, and so makes NaN of them; here they are left out, but for an
    image that is packed with its padding, and to the left and right where pixels are columns.
    """
    conv = LAYERS[layer]
    inputs = operands(conv, torch.float16, randn)
    want = gradient(conv, *inputs)
    bad = inputs[0 if where == "x" else 1]
    bad[-1, -1, 0, 0] = value
    wrong = gradient(conv, *inputs)
    reads = torch.ones_like(wrong, dtype=torch.bool)
    if where == "dy" and conv.x[1] >= 8:
        pad, dil = conv.lists[1], conv.lists[2]
        columns = as_neighbours(plan_of(conv), SMALL).neighbours[1] > 0
        for dim in (0,) if columns else (0, 1):
            taps = torch.arange(conv.taps[dim]) * dil[dim] - pad[dim]
            reads &= (taps >= 0).view((-1, 1) if dim == 0 else (1, -1)).to(reads.device)
    want = torch.where(reads, wrong, want)
    assert 0 < want.isfinite().sum() < want.numel()
    got = run(conv, SMALL, inputs)
    assert_close(got, want, dtype=torch.float16, terms=conv.terms["dw"])


@st.composite
def any_fast_conv(draw):
    """A convolution that the kernel can do: few pixels, for the interpreter."""
    sides = []
    for _ in range(2):
        taps, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        pad, dilation = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        least = max(1, dilation * (taps - 1) + 1 - 2 * pad)
        sides.append((draw(st.integers(least, least + 3)), taps, stride, pad, dilation))
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    C, K = draw(st.sampled_from([1, 3, 8, 24, 64, 72])), draw(st.sampled_from([8, 24, 64, 72]))
    if C < 8:
        dilation = (1, 1)
        size = [max(n, taps[i] - 2 * padding[i]) for i, n in enumerate(size)]
    return Conv((draw(st.integers(16, 40)), C, *size), K, taps, stride, padding, dilation)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    conv=any_fast_conv(), dtype=st.sampled_from(HALF), tile=st.sampled_from(FAST_TILES[2]),
    parts=st.integers(1, 4), weight=st.sampled_from(["channels_last", "contiguous", "sliced"]),
    bias=st.booleans(),
)  # fmt: skip
def test_any_convolution(conv, dtype, tile, parts, weight, bias):
    inputs = operands(conv, dtype, weight=weight)
    with poison() as p:
        got = run(conv, tile | dict(SPLIT_K=parts), [p(t) for t in inputs], bias)
    want = wanted.__wrapped__(conv, dtype)
    for g, w in zip(got if bias else [got], want, strict=False):
        assert torch.equal(g, w.to(dtype))


# --- which kernel ---------------------------------------------------------------------------------


def images(*shape, dtype=torch.bfloat16, seed=0):
    return laid_out(integers(*shape, dtype=dtype, seed=seed), "channels_last")


def unaligned(x):
    """A copy that lies as `x` does, but one element further on."""
    buffer = x.new_empty(x.numel() + 8)
    return buffer.as_strided(x.shape, x.stride(), 1).copy_(x)


X, DY = (16, 24, 5, 6), (16, 32, 5, 6)  # of a 3x3 layer with padding 1
BORDERS = {  # x, dy and options, and the kernels that a Hopper GPU takes for them
    "3x3": (lambda: (images(*X), images(*DY)), {}, "tma"),
    "fp16": (lambda: (images(*X).half(), images(*DY).half()), {}, "tma"),
    "float32": (lambda: (images(*X).float(), images(*DY).float()), {}, "portable"),
    "filters of [K, C, R, S]": (
        lambda: (images(*X), images(*DY)), dict(weight="contiguous"), "tma"
    ),
    # the batch, channels and filters
    "15 images": (lambda: (images(15, *X[1:]), images(15, *DY[1:])), {}, "portable"),
    "20 channels": (lambda: (images(16, 20, 5, 6), images(*DY)), {}, "portable"),
    "8 channels": (lambda: (images(16, 8, 5, 6), images(*DY)), {}, "tma"),
    "3 channels": (lambda: (images(16, 3, 5, 6), images(*DY)), {}, "pack tma"),
    "3 channels, off by one element": (
        lambda: (unaligned(images(16, 3, 5, 6)), images(*DY)), {}, "pack tma"
    ),
    "3 channels, dilation": (
        lambda: (images(16, 3, 5, 6), images(16, 32, 3, 4)), dict(dilation=2), "portable"
    ),
    "12 filters": (lambda: (images(*X), images(16, 12, 5, 6)), {}, "portable"),
    "2 groups": (lambda: (images(16, 48, 5, 6), images(*DY)), dict(groups=2), "portable"),
    # strides and addresses
    "x as [N, C, H, W]": (lambda: (images(*X).contiguous(), images(*DY)), {}, "portable"),
    "dy as [N, K, P, Q]": (lambda: (images(*X), images(*DY).contiguous()), {}, "portable"),
    "x off by one element": (lambda: (unaligned(images(*X)), images(*DY)), {}, "portable"),
    "dy off by one element": (lambda: (images(*X), unaligned(images(*DY))), {}, "portable"),
    "slices of channels": (
        lambda: (images(16, 48, 5, 6)[:, 16:40], images(16, 48, 5, 6)[:, 8:40]), {}, "tma"
    ),
    "a slice from the fourth channel on": (
        lambda: (images(16, 32, 5, 6)[:, 4:28], images(*DY)), {}, "portable"
    ),
    "a cropped image": (
        lambda: (images(16, 24, 8, 8)[:, :, 1:6, 1:7], images(*DY)), {}, "tma"
    ),
    "a cropped dy": (lambda: (images(*X), images(16, 32, 8, 8)[:, :, 1:6, 1:7]), {}, "tma"),
    "every second image": (lambda: (images(32, *X[1:])[::2], images(32, *DY[1:])[1::2]), {}, "tma"),
    "one image for all": (
        lambda: (images(1, *X[1:]).expand(16, -1, -1, -1), images(*DY)), {}, "portable"
    ),
    "one number for all of dy": (
        lambda: (images(*X), integers(1, dtype=torch.bfloat16).add(3).expand(DY)), {}, "portable"
    ),
    # a filter of one pixel
    "1x1: pixels are the batch": (
        lambda: (images(2, 24, 5, 6), images(2, 32, 5, 6)), dict(taps=(1, 1), padding=0), "tma"
    ),
    "1x1, one row each": (
        lambda: (images(2, 24, 1, 8), images(2, 32, 1, 8)), dict(taps=(1, 1), padding=0), "tma"
    ),
    "1x1, 15 pixels": (
        lambda: (images(1, 24, 3, 5), images(1, 32, 3, 5)), dict(taps=(1, 1), padding=0), "portable"
    ),
    "1x1 of a cropped image": (
        lambda: (images(16, 24, 8, 8)[:, :, 1:6, 1:7], images(*DY)),
        dict(taps=(1, 1), padding=0), "tma",
    ),
    "1x1 of few cropped images": (
        lambda: (images(2, 24, 8, 8)[:, :, 1:6, 1:7], images(2, 32, 5, 6)),
        dict(taps=(1, 1), padding=0), "portable",
    ),
    # nothing
    "no images": (lambda: (images(0, *X[1:]), images(0, *DY[1:])), {}, "portable"),
    "no filters": (lambda: (images(*X), images(16, 0, 5, 6)), {}, ""),
}  # fmt: skip


def call(x, dy, taps=(3, 3), padding=1, dilation=1, groups=1, weight="channels_last"):
    """(dweight, dbias), and what they should be."""
    w = torch.zeros(dy.shape[1], x.shape[1] // groups, *taps, dtype=x.dtype, device=x.device)
    w = laid_out(w, weight)
    got = conv2d_weight_bias_grad(x, dy, w, [1, 1], [padding] * 2, [dilation] * 2, groups)
    if 0 in dy.shape:
        return got, [torch.zeros_like(t, dtype=torch.float64) for t in got]
    w = w.double().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), w, None, 1, padding, dilation, groups)
    return got, [*torch.autograd.grad(y, [w], dy.double()), dy.double().sum((0, 2, 3))]


def chosen(device, *args, **options):
    """The names of the kernels that a call would launch, but for sums of parts."""
    with _launch.record(device) as events:
        call(*args, **options)
    names = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    short = {"conv2d_weight_grad_kernel": "portable", "conv2d_weight_grad_tma_kernel": "tma"}
    short["conv2d_pack_kernel"] = "pack"
    return " ".join(short[n] for n in names if n != "sum_partials_kernel")


@pytest.mark.parametrize("inputs, options, kernels", BORDERS.values(), ids=BORDERS)
def test_what_tma_cannot_read_goes_through_pointers(inputs, options, kernels):
    x, dy = inputs()
    assert chosen(HOPPER, x, dy, **options) == kernels
    assert chosen(AMPERE, x, dy, **options) == ("portable" if kernels else "")
    if "tma" in kernels:
        with use_tile(OP, SMALL), poison() as p:
            got, want = call(p(x), p(dy), **options)
    else:
        got, want = call(x, dy, **options)
        with use_tile(OP, SMALL), pytest.raises(ValueError, match="cannot take these"):
            call(x, dy, **options)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w.to(g.dtype)) and (w.any() or 0 in dy.shape)


def test_a_tile_of_three_subtiles_is_refused():
    with pytest.raises(ValueError, match="1, 2 or 4 of its SUBTILES"):
        run(LAYERS["3x3"], SMALL | dict(SUBTILES=3), operands(LAYERS["3x3"], torch.float16))


def launched(fn):
    with _launch.record(HOPPER) as events:
        fn()
    return [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("needs", ["weight and bias", "weight", "bias"])
def test_the_bias_gradient_comes_with_the_weight_gradient(needs, activation):
    """dy is read once for both; but through a ReLU it comes with that."""
    x, dy = images(*X), images(*DY)
    weight, bias = images(32, 24, 3, 3, seed=1), integers(32, dtype=torch.bfloat16, seed=2)
    weight.requires_grad_("weight" in needs)
    bias.requires_grad_("bias" in needs)

    def backward():
        conv2d(x, weight, bias, padding=1, activation=activation).backward(dy)

    names = launched(backward)
    assert ("bias_activation_backward_kernel" in names) == (activation == "relu" or needs == "bias")
    assert ("conv2d_weight_grad_tma_kernel" in names) == ("weight" in needs)
    weight.grad = bias.grad = None
    backward()
    w, b = (t.detach().double().requires_grad_() for t in (weight, bias))
    y = torch.nn.functional.conv2d(x.double(), w, b, padding=1)
    (y if activation is None else y.relu()).backward(dy.double())
    for got, want in ((weight, w), (bias, b)):
        assert (got.grad is None) == (not got.requires_grad)
        assert got.grad is None or torch.equal(got.grad, want.grad.to(got.dtype))


# --- the portable kernel: the bias gradient, and atomics ------------------------------------------

PORTABLE = dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
OTHERS = {
    "few channels": Conv((3, 5, 6, 7), 37, (3, 2), (2, 1), 1),
    "several blocks": Conv((2, 18, 5, 6), 40, (2, 3), (1, 2), 1),
    "groups": Conv((3, 36, 9, 8), 6, (2, 3), (2, 1), (0, 1), (1, 2), groups=2),
}


@pytest.mark.core
@pytest.mark.parametrize("atomic", [False, True], ids=["", "atomic"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("conv", OTHERS.values(), ids=OTHERS)
def test_portable_kernel(conv, dtype, parts, atomic, monkeypatch):
    """Its parts in rows or by atomics, and the bias gradient with it: in integers all are exact."""
    monkeypatch.setattr(module, "part_count", lambda programs, steps: parts)
    tile = PORTABLE | (dict(ATOMIC=True) if atomic else {})
    given = tile.copy()
    check(conv, tile, dtype, bias=True)
    check(conv, tile, dtype, weight="contiguous")
    with _launch.record(AMPERE) as events:
        run(conv, tile, operands(conv, dtype))
    first, *sums = (e for e in events if isinstance(e, _launch.Launch))
    assert first.meta["ATOMIC"] == atomic and first.grid[2] == parts
    assert len(sums) == (atomic or parts > 1) and tile == given


def test_no_atomics_where_torch_is_to_be_deterministic():
    conv = OTHERS["several blocks"]
    torch.use_deterministic_algorithms(True)
    try:
        with _launch.record(AMPERE) as events:
            run(conv, PORTABLE | dict(ATOMIC=True), operands(conv, torch.float16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not next(e for e in events if isinstance(e, _launch.Launch)).meta["ATOMIC"]


def test_no_default_is_atomic():
    assert not any(tile.get("ATOMIC") for tile in TILES + FAST_TILES[2])


# --- plans ----------------------------------------------------------------------------------------


def plan_of(conv):
    x, dy = (laid_out(torch.empty(s, device="meta"), "channels_last") for s in (conv.x, conv.y))
    *geometry, groups = conv.lists
    geometry = (tuple(pair) for pair in geometry)
    return make_plan(x.shape, x.stride(), dy.shape, dy.stride(), conv.taps, *geometry, groups)


def test_plans_are_those_of_the_lesson():
    plain = plan_of(Conv((64, 256, 14, 14), 512, (3, 3), 2, 1))
    assert plain.size == (64, 7, 7, 512) and plain.x[0] == (64, 14, 1, 14, 256)
    assert plain.dy == ((7, 7, 64, 512), (7 * 512, 512, 49 * 512, 1)) and plain.dw == (9, 256)
    pixels = plan_of(Conv((64, 256, 14, 14), 512, (1, 1)))
    assert pixels.size == (64 * 196, 1, 1, 512) and pixels.x[0] == (64 * 196, 1, 1, 1, 256)
    small = plan_of(Conv((64, 16, 26, 26), 32, (3, 3)))
    assert small.windows and small.dw == (3, 48) and small.folded is None
    assert small.x == ((64, 24, 3, 24, 48), (26 * 26 * 16, 26 * 16, 26 * 16, 16, 1))
    stem = plan_of(Conv((32, 3, 224, 224), 64, (7, 7), 2, 3))
    assert stem.windows and stem.dw == (4, 64) and stem.folded.fold == (2, 2)
    assert stem.x[0] == (32, 112, 4, 112, 64) and stem.x[1][1:] == (115 * 16, 115 * 16, 16, 1)
    patches = plan_of(Conv((8, 3, 224, 224), 192, (16, 16), 16))
    assert patches.size == (8 * 196, 1, 1, 192) and patches.dw == (1, 768)


def test_as_many_pixels_as_the_unit_can_count():
    width = LARGEST // 16
    assert plan_of(Conv((16, 8, 1, width), 8, (1, 3), padding=(0, 1))) is not None
    assert plan_of(Conv((16, 8, 1, width + 1), 8, (1, 3), padding=(0, 1))) is None


@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_plans_are_what_tma_takes(conv):
    """No size is 0, every step is of 16 bytes, and the last is of one element; likewise a box."""
    for tile in FAST_TILES[2]:
        plan = as_neighbours(plan_of(conv), tile)
        for sizes, steps in (plan.dy, plan.x):
            assert len(sizes) == len(steps) <= 5 and min(sizes) > 0
            assert steps[-1] == 1 and not any(step % 8 for step in steps[:-1])
        how = _layout(plan, tuple(tile.items()), 132, False)
        for box in (how.dy[2], how.x[2], how.dw[2]):
            assert max(box) <= 256 and box[-1] * 2 >= 16
        (_, box_r, _, box_c) = how.x[2][1:]
        assert box_r * box_c == tile["BLOCK_N"]


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    first=st.integers(-9, 9), size=st.integers(1, 9), windows=st.integers(1, 9),
    stride=st.integers(1, 4),
)  # fmt: skip
def test_pixels_inside(first, size, windows, stride):
    want = sum(0 <= first + p * stride < size for p in range(windows))
    assert pixels_inside(first, size, windows, stride) == want


@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_the_default_is_one_of_the_tiles(conv):
    tile = fast_tile(plan_of(conv), 132)
    assert tile | dict(SPLIT_K=1) in FAST_TILES[2] and tile["SPLIT_K"] >= 1


def test_defaults_follow_the_shape():
    def default(*conv):
        return fast_tile(plan_of(Conv(*conv)), 132)

    large = default((256, 512, 14, 14), 512, (3, 3), 1, 1)
    assert name(large) == "128x256x64" and 1 < large["SPLIT_K"] < 16
    assert default((32, 512, 14, 14), 512, (3, 3), 1, 1)["BLOCK_K"] == 32
    assert name(default((256, 64, 56, 56), 64, (3, 3), 1, 1)) == "128x256x64"  # two pixels by four
    assert name(default((32, 64, 56, 56), 64, (3, 3), 1, 1)) == "128x256x32"
    assert default((256, 64, 56, 56), 64, (3, 3), 2, 1)["BLOCK_N"] == 64
    # All 4 x 64 of a window, and two programs an SM; of few images a row of taps, whose loads are
    # ahead.
    stem = default((256, 3, 224, 224), 64, (7, 7), 2, 3)
    assert (stem["BLOCK_M"], stem["BLOCK_N"], stem["SPLIT_K"]) == (64, 256, 264)
    stem = default((32, 3, 224, 224), 64, (7, 7), 2, 3)
    assert (stem["BLOCK_M"], stem["BLOCK_N"], stem["SPLIT_K"]) == (64, 64, 33)
    one = fast_tile(plan_of(Conv((256, 512, 14, 14), 512, (3, 3), 1, 1)), 1)
    assert one["SPLIT_K"] == 1


def test_the_sum_of_dy_is_work_that_the_parts_make_room_for():
    """It is one more job for each block of filters: of 44 parts of three jobs, 33 of four."""
    plan = plan_of(Conv((256, 64, 56, 56), 64, (3, 3), 1, 1))
    plain, more = fast_tile(plan, 132), fast_tile(plan, 132, has_bias=True)
    assert name(plain) == name(more) == "128x256x64"
    assert (plain["SPLIT_K"], more["SPLIT_K"]) == (44, 33)


# --- on a GPU -------------------------------------------------------------------------------------

REAL = {
    "3x3": Conv((64, 128, 56, 56), 136, (3, 3), 1, 1),
    "3x3, stride 2": Conv((33, 136, 56, 56), 256, (3, 3), 2, 1),
    "1x1": Conv((32, 256, 28, 28), 512, (1, 1)),
    "1x1, stride 2": Conv((64, 256, 56, 56), 512, (1, 1), 2),
    "7x7 pixels": Conv((256, 512, 7, 7), 512, (3, 3), 1, 1),
    "7x7, stride 2": Conv((32, 3, 224, 224), 64, (7, 7), 2, 3),
    "3x3 of 3 channels": Conv((32, 3, 224, 224), 64, (3, 3), 1, 1),
    "16 channels": Conv((64, 16, 26, 26), 32, (3, 3)),
    "dilation 6": Conv((16, 256, 33, 33), 256, (3, 3), 1, 6, 6),
    "64 channels": Conv((32, 64, 56, 56), 64, (3, 3), 1, 1),
    "64 channels, 128 filters": Conv((64, 64, 57, 57), 128, (3, 3), 1, 1),
}


def needs_tma():
    if "tma" not in _launch.device_of(torch.empty(1, device=DEVICE)).kernels:
        pytest.skip("this GPU has no tensor memory accelerator")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
def test_every_fast_tile_at_real_size(tile, conv, device):
    """Whole and in parts, twice, against the portable kernel's, whose sums are in another order."""
    needs_tma()
    inputs = operands(conv, torch.bfloat16, randn)
    want = run(conv, TILES[5], [t.float() for t in inputs], bias=True)
    for parts in (1, 7):
        first, second = (run(conv, tile | dict(SPLIT_K=parts), inputs, bias=True) for _ in "12")
        for a, b, w, what in zip(first, second, want, ("dw", "db"), strict=True):
            assert torch.equal(a, b)
            assert_close(a, w.double(), dtype=torch.bfloat16, terms=conv.terms[what], name=what)


@pytest.mark.gpu
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
def test_defaults_at_real_size(conv, device):
    inputs = operands(conv, torch.float16, randn)
    want = run(conv, TILES[5], [t.float() for t in inputs])
    got = conv2d_weight_grad(*inputs, *conv.lists)
    assert_close(got, want.double(), dtype=torch.float16, terms=conv.terms["dw"])
