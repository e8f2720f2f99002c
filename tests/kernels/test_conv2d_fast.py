"""conv2d's kernel for TMA: it agrees with the portable one, and is chosen where it can be.

Here it runs in the interpreter, or on this machine's GPU. What it compiles to is held to its bars
at the end, as every kernel's is in test_compile.py. And the first rungs of the ladder, which no
call takes of itself.
"""

import contextlib
import functools
import importlib
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import _launch, conv2d, conv2d_relu_pool
from tilelab.kernels._geometry import output_size
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d import RUNGS, TILES, reference
from tilelab.kernels.conv2d_tma import (
    FAST_TILES,
    GROUP_BLOCK,
    LARGEST,
    conv2d_tma_kernel,
    fast_tile,
    make_plan,
    pixel_box,
)

from tests.kernels.test_conv2d import call, check
from tests.tools.convolutions import CONVS, CORE, Conv, integers
from tests.tools.inputs import DEVICE, INTERPRET, double, gradients, laid_out, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.conv2d")  # `kernels.conv2d` is the function
pool = importlib.import_module("tilelab.kernels.conv2d_relu_pool")
HOPPER, AMPERE = Device(90, sms=132), Device(80, sms=108)
HALF = [torch.float16, torch.bfloat16]
NARROW = [tile for item in (2, 4) for tile in FAST_TILES[item] if tile["BLOCK_N"] == GROUP_BLOCK]
SMALL = FAST_TILES[2][3]  # 128 pixels, 64 filters: for tests of everything else


def name(tile):
    return "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")


def op(conv):
    """The name of its tile."""
    few = conv.weight[1] < module.FEW_CHANNELS
    return "conv2d_grouped" if conv.groups > 1 else "conv2d_flat" if few else "conv2d"


def run(conv, tile, inputs, activation=None):
    with use_tile(op(conv), tile):
        return call(conv, activation=activation)(*inputs)


def operands(conv, dtype, x="channels_last", weight="channels_last", values=integers):
    """x, weight and bias; images of few channels are [N, C, H, W] in memory, as datasets are."""
    x = "contiguous" if conv.x[1] < 8 else x
    return [*conv.inputs(dtype, x, weight, values), values(conv.filters, dtype=dtype, seed=2)]


def portably(name, tile):
    """The kernel of pointers; the interpreter takes it anyway, with larger tiles."""
    return contextlib.nullcontext() if INTERPRET else use_tile(name, tile)


@functools.cache
def portable(conv, dtype):
    """What the portable kernel makes of the integers, which is exact, and not mostly zeros."""
    with portably(op(conv), TILES[0]):
        y = call(conv, activation="relu")(*operands(conv, dtype))
    want = call(conv, reference, activation="relu")(*double(*operands(conv, dtype)))
    assert torch.equal(y, want.to(dtype)) and y.count_nonzero() > y.numel() / 4
    return y


@pytest.fixture
def tf32(monkeypatch):
    """float32 products that may be TF32, without which they are not for this kernel."""
    for lesson in (module, pool):
        monkeypatch.setattr(lesson, "dot_precision", lambda dtype, switch: "tf32")


# --- the same results -----------------------------------------------------------------------------

LAYERS = {
    # geometry; the number of channels is no multiple of a step's, nor that of filters of a tile's
    "3x3": Conv((2, 72, 9, 10), 136, (3, 3), 1, 1),
    "2x3, no padding": Conv((2, 24, 7, 9), 40, (2, 3)),
    "1x7": Conv((2, 16, 5, 9), 24, (1, 7), padding=(0, 3)),
    "7x1": Conv((2, 16, 9, 5), 24, (7, 1), padding=(3, 0)),
    "5x2, padding (2, 1)": Conv((2, 24, 9, 7), 24, (5, 2), padding=(2, 1)),
    "stride 2": Conv((2, 40, 8, 10), 40, (3, 3), 2, 1),
    "stride 2, its odd rows and columns unread": Conv((2, 24, 9, 11), 24, (2, 2), 2),
    "stride 2, an odd padding of an even filter": Conv((2, 24, 8, 6), 24, (4, 4), 2, 1),
    "stride (2, 1)": Conv((2, 24, 8, 7), 24, (3, 3), (2, 1), 1),
    "stride (1, 2)": Conv((2, 24, 7, 8), 24, (3, 3), (1, 2), 1),
    "stride (3, 2), padding (1, 2)": Conv((2, 24, 9, 8), 24, (3, 3), (3, 2), (1, 2)),
    "stride larger than the filter": Conv((2, 24, 9, 12), 24, (2, 2), 3),
    "padding as large as the image": Conv((2, 24, 3, 4), 24, (3, 3), padding=4),
    "padding larger than the stride": Conv((2, 24, 4, 6), 24, (3, 3), 2, 5),
    "dilation 2": Conv((1, 24, 9, 10), 24, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((1, 24, 7, 9), 24, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "dilation 3, stride 2": Conv((1, 24, 12, 14), 24, (3, 3), 2, 2, 3),
    "dilation (2, 3), stride (4, 3)": Conv((1, 24, 12, 15), 24, (2, 3), (4, 3), (0, 2), (2, 3)),
    "1x1": Conv((2, 24, 5, 7), 40, (1, 1)),
    "1x1, stride 2": Conv((2, 24, 7, 9), 40, (1, 1), 2),
    "1x1, stride 2, padding": Conv((2, 24, 6, 8), 40, (1, 1), 2, 1),
    # images
    "one pixel": Conv((5, 24, 1, 1), 24, (1, 1), padding=1),
    "3x3 of one pixel": Conv((5, 24, 1, 1), 24, (3, 3), padding=1),
    "many images of 2x2": Conv((140, 16, 2, 2), 16, (2, 2), padding=1),
    "a row of 300 pixels": Conv((1, 16, 1, 300), 16, (1, 3), padding=(0, 1)),
    "a column of 300 pixels": Conv((1, 16, 300, 1), 16, (3, 1), padding=(1, 0)),
    # few channels: the first layers of networks
    "7x7, stride 2": Conv((2, 3, 19, 18), 72, (7, 7), 2, 3),
    "11x11, stride 4": Conv((2, 3, 23, 25), 24, (11, 11), 4, 2),
    "3x3 of 3 channels": Conv((2, 3, 8, 9), 24, (3, 3), padding=1),
    "3x3 of 3 channels, stride 2": Conv((2, 3, 9, 9), 24, (3, 3), 2, 1),
    "4x4, stride 4: patches": Conv((2, 3, 12, 17), 24, (4, 4), 4),
    "16x16, stride 16: a transformer's": Conv((1, 3, 32, 48), 24, (16, 16), 16),
    "2x2, stride 3: of every fold a part": Conv((2, 3, 9, 10), 24, (2, 2), 3),
    "3x2 of 5 channels, stride (1, 3)": Conv((2, 5, 9, 11), 24, (3, 2), (1, 3), (0, 1)),
    "5x5 of one channel": Conv((3, 1, 9, 8), 24, (5, 5)),
    "3x3 of 8 channels: not packed": Conv((2, 8, 8, 9), 24, (3, 3), padding=1),
    # groups
    "32 groups of 4": Conv((1, 128, 6, 7), 128, (3, 3), 1, 1, 1, 32),
    "4 groups of 16, stride 2": Conv((2, 64, 8, 6), 64, (3, 3), 2, 1, 1, 4),
    "2 groups of 64": Conv((1, 128, 6, 5), 128, (3, 3), 1, 1, 1, 2),
    "6 groups of 16: not a whole block": Conv((1, 96, 6, 5), 96, (2, 3), 1, 1, 1, 6),
    "2 groups of 8 channels and 128 filters": Conv((1, 16, 6, 5), 256, (3, 3), 1, 1, 1, 2),
    "4 groups of 2 channels and 16 filters": Conv((1, 8, 6, 5), 64, (3, 3), 1, 1, 1, 4),
    "16 channels, two filters each": Conv((2, 16, 6, 7), 32, (3, 3), 1, 1, 1, 16),
    "8 groups of 8 channels, 1x1": Conv((2, 64, 6, 7), 64, (1, 1), 1, 0, 1, 8),
}  # fmt: skip
UNGROUPED = {k: conv for k, conv in LAYERS.items() if conv.groups == 1}


@pytest.mark.core
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_both_kernels_agree_to_the_last_bit(conv, tile):
    """In small integers every sum is exact. Every second time the filters have to be packed."""
    if conv.groups > 1:
        tile = tile | dict(BLOCK_N=GROUP_BLOCK)
    for dtype, weight in zip(HALF, ("channels_last", "contiguous"), strict=True):
        inputs = operands(conv, dtype, weight=weight)
        y = run(conv, tile, inputs, "relu")
        assert torch.equal(y, portable(conv, dtype))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.core
@pytest.mark.parametrize("tile", FAST_TILES[4], ids=name)
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_tf32_tiles_agree_too(conv, tile, tf32):
    if plan_of(conv, item=4) is None:
        pytest.skip("its channels are no multiple of 16 bytes")
    if conv.groups > 1:
        tile = tile | dict(BLOCK_N=GROUP_BLOCK)
    y = run(conv, tile, operands(conv, torch.float32), "relu")
    assert torch.equal(y, portable(conv, torch.float32))


@pytest.mark.core
@pytest.mark.parametrize("split", [2, 3, 16])
@pytest.mark.parametrize("conv", UNGROUPED.values(), ids=UNGROUPED)
def test_parts_of_the_sum(conv, split):
    """Parts that divide nothing, begin within a tap, and some that are left with nothing to add."""
    tile = FAST_TILES[2][4 if conv.x[0] < 3 else 3] | dict(SPLIT_K=split)
    dtype = HALF[split % 2]
    y = run(conv, tile, operands(conv, dtype), "relu")
    assert torch.equal(y, portable(conv, dtype))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("per_sm", [0, 1, 2])
@pytest.mark.parametrize("conv", [LAYERS["3x3"], LAYERS["one pixel"]], ids=["6 tiles", "one"])
def test_every_program_does_its_share(conv, per_sm, split):
    """One program a tile, or a few that take turns: each tile is computed, and once."""
    tile = SMALL | dict(PROGRAMS_PER_SM=per_sm, SPLIT_K=split)
    inputs = operands(conv, torch.float16)
    with poison() as p:
        y = run(conv, tile, [p(t) for t in inputs], "relu")
    assert torch.equal(y, portable(conv, torch.float16))
    with _launch.record(Device(90, sms=2)) as events:
        run(conv, tile, inputs)
    N, K, P, Q = conv.y
    n, p, q = pixel_box(N, P, Q, tile["BLOCK_M"])
    tiles = -(-N // n) * -(-P // p) * -(-Q // q) * -(-K // tile["BLOCK_N"]) * split
    launches = [e for e in events if getattr(e, "kernel", None) is conv2d_tma_kernel]
    assert [e.grid for e in launches] == [(min(tiles, 2 * per_sm) if per_sm else tiles,)]


@pytest.mark.core
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "conv",
    [
        Conv((2, 24, 8, 10), 40, (3, 3), 2, 1),
        Conv((2, 3, 9, 10), 24, (5, 3), 2, 1),
        Conv((1, 64, 6, 5), 64, (2, 3), 1, 1, 1, 4),
    ],
    ids=["stride 2", "few channels", "groups"],
)
def test_forward_and_gradients_against_float64(conv, dtype, bias):
    with use_tile(op(conv), SMALL):
        check(conv, dtype, x="channels_last", bias=bias, activation="relu" if bias else None)


def test_tf32_against_float64(tf32):
    conv = Conv((2, 24, 8, 10), 40, (3, 3), 2, 1)
    inputs = operands(conv, torch.float32, values=randn)
    y = run(conv, FAST_TILES[4][1], inputs)
    want = call(conv, reference)(*double(*inputs))
    assert_close(y, want, dtype=torch.float32, terms=conv.terms["y"], tf32=DEVICE == "cuda")


@pytest.mark.core
@pytest.mark.parametrize("weight", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "layer, split",
    [
        ("3x3", 1),
        ("3x3", 3),
        ("stride 2", 1),
        ("stride 2, its odd rows and columns unread", 1),
        ("1x1, stride 2", 1),
        ("7x7, stride 2", 1),
        ("4x4, stride 4: patches", 2),
        ("32 groups of 4", 1),
        ("6 groups of 16: not a whole block", 1),
        ("4 groups of 2 channels and 16 filters", 1),
    ],
)
def test_nothing_is_read_or_written_out_of_bounds(layer, split, weight):
    conv = LAYERS[layer]
    inputs = operands(conv, torch.bfloat16, weight=weight)
    with poison() as p:
        y = run(conv, SMALL | dict(SPLIT_K=split), [p(t) for t in inputs], "relu")
    assert torch.equal(y, portable(conv, torch.bfloat16))


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("layer", ["3x3", "7x7, stride 2"])
def test_the_same_bits_twice(layer, split):
    conv = LAYERS[layer]
    inputs = operands(conv, torch.bfloat16, values=randn)
    first, second = (run(conv, SMALL | dict(SPLIT_K=split), inputs) for _ in range(2))
    assert torch.equal(first, second) and first.count_nonzero() > first.numel() / 2


# Where a packed zero meets what is not finite: 0 * inf is NaN.
LEAKS = ["stride 2", "7x7, stride 2", "3x3 of 3 channels, stride 2", "32 groups of 4"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "layer",
    ["3x3", "2x3, no padding", "1x1", "padding as large as the image", "dilation 2", "one pixel"]
    + ["3x3 of 8 channels: not packed", "2 groups of 64", *LEAKS],
)
def test_nan_and_infinity_go_where_torch_has_them(layer, value):
    """To the last output; and where there are packed zeros, to those beside it at most."""
    conv = LAYERS[layer]
    inputs = operands(conv, torch.float16, values=randn)
    inputs[0][0, 1, -1, -1] = value
    y = run(conv, SMALL, inputs).double()
    want = call(conv, reference)(*double(*inputs))
    bad = ~want.isfinite()
    if layer in LEAKS:
        near = bad.any(dim=1, keepdim=True).double()
        near = torch.nn.functional.max_pool2d(near, 3, 1, 1).bool().expand_as(want)
        leaked = y.isnan() & ~bad
        assert not (leaked & ~near).any()
        y = torch.where(leaked, want, y)
        # an infinity that a packed zero has met as well
        y = torch.where(y.isnan() & bad, want, y)
    assert bad.any()
    torch.testing.assert_close(y, want, equal_nan=True, atol=0.1, rtol=0.01)


@st.composite
def any_fast_conv(draw):
    """A convolution that the kernel can do: few pixels, for the interpreter."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    sides = []
    for _ in range(2):
        taps, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        pad, dilation = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        least = max(1, dilation * (taps - 1) + 1 - 2 * pad)
        # whole groups of rows, so that none is odd
        size = -(-draw(st.integers(least, least + 8)) // stride) * stride
        sides.append((size, taps, stride, pad, dilation))
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    C, K = draw(st.sampled_from([8, 16, 24, 64, 72])), draw(st.sampled_from([8, 24, 64, 72]))
    if groups > 1:
        C, K = draw(st.sampled_from([8, 24])) * groups, draw(st.sampled_from([8, 16, 64])) * groups
    elif draw(st.booleans()):
        C, dilation = draw(st.integers(1, 7)), (1, 1)
        size = [max(n, taps[i] - 2 * padding[i]) for i, n in enumerate(size)]
    return Conv((draw(st.integers(1, 3)), C, *size), K, taps, stride, padding, dilation, groups)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    conv=any_fast_conv(), dtype=st.sampled_from(HALF), tile=st.sampled_from(FAST_TILES[2]),
    split=st.integers(1, 4), weight=st.sampled_from(["channels_last", "contiguous", "sliced"]),
    with_bias=st.booleans(), activation=st.sampled_from([None, "relu"]),
)  # fmt: skip
def test_any_convolution(conv, dtype, tile, split, weight, with_bias, activation):
    if conv.groups > 1:
        tile, split = tile | dict(BLOCK_N=GROUP_BLOCK), 1
    elif tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128:
        split = 1
    inputs = operands(conv, dtype, weight=weight)[: 2 + with_bias]
    with poison() as p:
        y = run(conv, tile | dict(SPLIT_K=split), [p(t) for t in inputs], activation)
    want = call(conv, reference, activation=activation)(*double(*inputs))
    assert torch.equal(y, want.to(dtype))


# --- with a max-pool ------------------------------------------------------------------------------

POOLED = {  # x, filters, taps, padding
    "whole windows": ((2, 24, 8, 10), 48, (3, 3), 1),
    "an odd row and column are dropped": ((2, 24, 9, 7), 48, (3, 3), 1),
    "an odd column, no padding": ((3, 40, 8, 9), 80, (3, 3), 0),
    "14x14": ((1, 72, 14, 14), 80, (3, 3), 1),
    "one window": ((19, 16, 2, 2), 16, (3, 3), 1),
    "2x5, padding (0, 2)": ((2, 16, 7, 20), 32, (2, 5), (0, 2)),
    "1x1": ((2, 24, 6, 8), 32, (1, 1), 0),
}


def pooled(tile, inputs, padding):
    """y and the place of each maximum; by the portable kernel if the tile is None."""
    pair = list(padding) if isinstance(padding, tuple) else [padding] * 2
    forced = use_tile("conv2d_relu_pool", tile) if tile else portably("conv2d_relu_pool", POINTERS)
    with forced:
        return torch.ops.tilelab.conv2d_relu_pool(*inputs, pair)


POINTERS = pool.TILES[1]  # fits float32 too


@functools.cache
def portable_pool(layer, dtype):
    inputs = to_pool(*layer, dtype)
    y, place = pooled(None, inputs, layer[3])
    assert torch.equal(y, pool.reference(*double(*inputs), layer[3]).to(dtype))
    assert set(place.unique().tolist()) == {0, 1, 2, 3, 4}
    assert y.count_nonzero() > y.numel() / 4
    return y, place


def to_pool(x, filters, taps, padding, dtype, weight="channels_last", values=integers):
    return operands(Conv(x, filters, taps, 1, padding), dtype, weight=weight, values=values)


@pytest.mark.core
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("layer", POOLED.values(), ids=POOLED)
def test_both_kernels_pool_alike(layer, tile):
    """The maxima and their places, of integers: many are equal, and the first of them counts."""
    for dtype, weight in zip(HALF, ("channels_last", "contiguous"), strict=True):
        inputs = to_pool(*layer, dtype, weight)
        with poison() as p:
            y, place = pooled(tile, [p(t) for t in inputs], layer[3])
        want = portable_pool(layer, dtype)
        assert torch.equal(y, want[0]) and torch.equal(place, want[1])


@pytest.mark.core
@pytest.mark.parametrize("tile", FAST_TILES[4], ids=name)
@pytest.mark.parametrize("layer", POOLED.values(), ids=POOLED)
def test_tf32_tiles_pool_alike(layer, tile, tf32):
    inputs = to_pool(*layer, torch.float32)
    y, place = pooled(tile, inputs, layer[3])
    want = portable_pool(layer, torch.float32)
    assert torch.equal(y, want[0]) and torch.equal(place, want[1])


@pytest.mark.core
@pytest.mark.parametrize("dtype", HALF)
def test_pooled_forward_and_gradients_against_float64(dtype):
    """No values of a window are equal, but for their rounding, with these seeds."""
    x, filters, taps, padding = POOLED["an odd row and column are dropped"]
    inputs = to_pool(x, filters, taps, padding, dtype, values=randn)
    dy = randn(2, filters, 4, 3, dtype=dtype, seed=3)
    with use_tile("conv2d_relu_pool", SMALL):
        y, grads = gradients(lambda *xs: conv2d_relu_pool(*xs, padding), inputs, dy)
    y64, grads64 = gradients(lambda *xs: pool.reference(*xs, padding), double(*inputs), double(dy))
    terms = dict(y=24 * 9 + 1, dx=48 * 9, dw=2 * 12, db=2 * 12)
    for (what, n), got, want in zip(terms.items(), [y, *grads], [y64, *grads64], strict=True):
        assert_close(got, want, dtype=dtype, terms=n, name=what)


@pytest.mark.parametrize("at", range(4))
def test_a_pooled_nan_wins_wherever_it_is(at):
    x, filters, taps, padding = POOLED["1x1"]
    inputs = to_pool(x, filters, taps, padding, torch.float16)
    inputs[0][1, 3, 2 + at // 2, 4 + at % 2] = torch.nan
    y, place = pooled(SMALL, inputs, padding)
    want = pool.reference(*double(*inputs), padding)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=0, equal_nan=True)
    assert y[1, :, 1, 2].isnan().all() and (place[1, :, 1, 2] == at).all()
    assert y.isnan().sum() == filters


# --- which kernel ---------------------------------------------------------------------------------


def images(*shape, dtype=torch.bfloat16):
    return integers(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def filters(*shape, dtype=torch.bfloat16):
    return integers(*shape, dtype=dtype, seed=1).contiguous(memory_format=torch.channels_last)


def unaligned(x):
    """A copy that lies as `x` does, but one element further on."""
    buffer = x.new_empty(x.numel() + 8)
    return buffer.as_strided(x.shape, x.stride(), 1).copy_(x)


W33 = (32, 24, 3, 3)
BORDERS = {  # operands and options, and the kernels that a Hopper GPU takes for them
    "3x3": (lambda: (images(2, 24, 8, 8), filters(*W33)), dict(padding=1), "tma"),
    "no padding": (lambda: (images(2, 24, 8, 8), filters(*W33)), {}, "tma"),
    "fp16": (lambda: (images(2, 24, 8, 8).half(), filters(*W33).half()), {}, "tma"),
    "filters of [K, C, R, S]": (
        lambda: (images(2, 24, 8, 8), filters(*W33).contiguous()), {}, "pack_filter tma"
    ),
    "filters off by one element": (
        lambda: (images(2, 24, 8, 8), unaligned(filters(*W33))), {}, "pack_filter tma"
    ),
    "filters that are every second": (
        lambda: (images(2, 24, 8, 8), filters(64, 24, 3, 3)[::2]), {}, "tma"
    ),
    "filters flipped in memory": (
        lambda: (images(2, 24, 8, 8), filters(*W33).transpose(2, 3)), {}, "pack_filter tma"
    ),
    "one filter for all": (
        lambda: (images(2, 24, 8, 8), filters(1, 24, 3, 3).expand(32, -1, -1, -1)), {},
        "pack_filter tma",
    ),
    # channels
    "12 channels": (lambda: (images(2, 12, 8, 8), filters(32, 12, 3, 3)), {}, "flat"),
    "20 channels": (lambda: (images(2, 20, 8, 8), filters(32, 20, 3, 3)), {}, "pointer"),
    "8 channels": (lambda: (images(2, 8, 8, 8), filters(32, 8, 3, 3)), {}, "tma"),
    "3 channels": (
        lambda: (images(2, 3, 8, 8), filters(32, 3, 3, 3)), {}, "pack pack_filter tma"
    ),
    "3 channels of [N, C, H, W]": (
        lambda: (integers(2, 3, 8, 8, dtype=torch.bfloat16), filters(32, 3, 3, 3)),
        dict(stride=2), "pack pack_filter tma",
    ),
    "3 channels, off by one element": (
        lambda: (unaligned(images(2, 3, 8, 8)), filters(32, 3, 3, 3)), {}, "pack pack_filter tma"
    ),
    "3 channels, patches of 36x36": (
        lambda: (images(1, 3, 72, 72), filters(8, 3, 36, 36)), dict(stride=36),
        "pack pack_filter tma matmul_reduce",
    ),
    "3 channels, patches of 37x37: more than a program packs": (
        lambda: (images(1, 3, 74, 74), filters(8, 3, 37, 37)), dict(stride=37), "flat"
    ),
    "3 channels, dilation": (
        lambda: (images(2, 3, 8, 8), filters(32, 3, 3, 3)), dict(dilation=2), "flat"
    ),
    "20 filters": (lambda: (images(2, 24, 8, 8), filters(20, 24, 3, 3)), {}, "pointer"),
    "20 filters, few channels": (
        lambda: (images(2, 3, 8, 8), filters(20, 3, 3, 3)), {}, "flat"
    ),
    # images
    "an image of one pixel": (
        lambda: (images(2, 24, 1, 1), filters(*W33)), dict(padding=1), "tma"
    ),
    "an image of one pixel, stride 2": (
        lambda: (images(2, 24, 1, 1), filters(*W33)), dict(padding=1, stride=2), "pointer"
    ),
    "taps in the padding alone": (
        lambda: (images(2, 24, 1, 1), filters(*W33)), dict(padding=4, stride=8), "pointer"
    ),
    "an odd height at stride 2": (
        lambda: (images(2, 24, 9, 8), filters(*W33)), dict(padding=1, stride=2), "pointer"
    ),
    "an odd width at stride 2": (
        lambda: (images(2, 24, 8, 9), filters(*W33)), dict(padding=1, stride=2), "pointer"
    ),
    "an odd width at stride (2, 1)": (
        lambda: (images(2, 24, 8, 9), filters(*W33)), dict(padding=1, stride=(2, 1)), "tma"
    ),
    "odd sides at stride 2, the last row and column unread": (
        lambda: (images(2, 24, 9, 9), filters(32, 24, 2, 2)), dict(stride=2), "tma"
    ),
    "dilation": (
        lambda: (images(2, 24, 9, 9), filters(*W33)), dict(padding=2, dilation=2), "tma"
    ),
    # strides and addresses
    "[N, C, H, W] in memory": (
        lambda: (images(2, 24, 8, 8).contiguous(), filters(*W33)), {}, "pointer"
    ),
    "a channel slice at a multiple of 8": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(*W33)), dict(padding=1), "tma"
    ),
    "the same at stride 2: pixels do not lie side by side": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(*W33)), dict(stride=2), "pointer"
    ),
    "the same at stride (2, 1)": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(*W33)), dict(stride=(2, 1)), "tma"
    ),
    "a channel slice from the first on": (
        lambda: (images(2, 25, 8, 8)[:, 1:], filters(*W33)), {}, "pointer"
    ),
    "a channel slice from the fourth on": (
        lambda: (images(2, 32, 8, 8)[:, 4:28], filters(*W33)), {}, "pointer"
    ),
    "off by one element": (
        lambda: (unaligned(images(2, 24, 8, 8)), filters(*W33)), {}, "pointer"
    ),
    "a cropped image": (
        lambda: (images(2, 24, 12, 12)[:, :, 1:9, 3:11], filters(*W33)), dict(padding=1), "tma"
    ),
    "a cropped image at stride 2": (
        lambda: (images(2, 24, 12, 12)[:, :, 1:9, 3:11], filters(*W33)),
        dict(padding=1, stride=2), "tma",
    ),
    "every second image": (lambda: (images(4, 24, 8, 8)[::2], filters(*W33)), {}, "tma"),
    "height and width exchanged": (
        lambda: (images(2, 24, 8, 9).transpose(2, 3), filters(*W33)), dict(padding=1), "tma"
    ),
    "one image for all": (
        lambda: (images(1, 24, 8, 8).expand(3, -1, -1, -1), filters(*W33)), {}, "pointer"
    ),
    "one row for all": (
        lambda: (images(2, 24, 1, 8).expand(-1, -1, 8, -1), filters(*W33)), {}, "pointer"
    ),
    "float32 as IEEE has it": (
        lambda: (images(2, 24, 8, 8).float(), filters(*W33).float()), {}, "pointer"
    ),
    # groups
    "8 groups of 4": (
        lambda: (images(2, 32, 8, 8), filters(32, 4, 3, 3)), dict(groups=8), "pack_filter tma"
    ),
    "2 groups of 64": (
        lambda: (images(2, 64, 8, 8), filters(128, 32, 3, 3)), dict(groups=2), "tma"
    ),
    "2 groups of 12 filters": (
        lambda: (images(2, 32, 8, 8), filters(24, 16, 3, 3)), dict(groups=2), "pointer"
    ),
    "2 groups of 96 filters": (
        lambda: (images(2, 32, 8, 8), filters(192, 16, 3, 3)), dict(groups=2), "pointer"
    ),
    "3 groups of 4 channels": (
        lambda: (images(2, 12, 8, 8), filters(24, 4, 3, 3)), dict(groups=3), "flat"
    ),
    "2 groups of 4 channels: 64 filters begin at the fourth": (
        lambda: (images(2, 8, 8, 8), filters(128, 4, 3, 3)), dict(groups=2), "flat"
    ),
    "4 groups of 2 channels and 32 filters": (
        lambda: (images(2, 8, 8, 8), filters(128, 2, 3, 3)), dict(groups=4), "flat"
    ),
    # a filter of one pixel
    "1x1": (
        lambda: (images(2, 24, 8, 8), filters(32, 24, 1, 1)), {}, "matmul_tma"
    ),
    "1x1 of an odd image": (
        lambda: (images(2, 24, 7, 5), filters(32, 24, 1, 1).contiguous()), {}, "matmul_tma"
    ),
    "1x1, 20 channels": (
        lambda: (images(2, 20, 8, 8), filters(32, 20, 1, 1)), {}, "matmul"
    ),
    "1x1, a cropped image": (
        lambda: (images(2, 24, 12, 12)[:, :, 1:9, 3:11], filters(32, 24, 1, 1)), {}, "tma"
    ),
    "1x1, a channel slice": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(32, 24, 1, 1)), {}, "matmul_tma"
    ),
    "1x1, [N, C, H, W] in memory, many": (
        lambda: (images(2, 24, 8, 8).contiguous(), filters(32, 24, 1, 1)), {}, "pointer"
    ),
    "1x1, stride 2": (
        lambda: (images(2, 24, 7, 9), filters(32, 24, 1, 1)), dict(stride=2), "tma"
    ),
    "1x1, padding": (
        lambda: (images(2, 24, 8, 8), filters(32, 24, 1, 1)), dict(padding=1), "tma"
    ),
    "1x1, groups": (
        lambda: (images(2, 128, 8, 8), filters(128, 64, 1, 1)), dict(groups=2), "tma"
    ),
    "1x1, 3 channels": (
        lambda: (images(2, 3, 8, 8), filters(32, 3, 1, 1)), {}, "matmul"
    ),
    # nothing
    "no images": (lambda: (images(0, 24, 8, 8), filters(*W33)), {}, ""),
    "no images, 1x1": (lambda: (images(0, 24, 8, 8), filters(32, 24, 1, 1)), {}, ""),
    "no filters": (lambda: (images(2, 24, 8, 8), filters(0, 24, 3, 3)), {}, ""),
    "no channels": (lambda: (images(2, 0, 8, 8), filters(32, 0, 3, 3)), {}, "flat"),
}  # fmt: skip
SHORT = {"conv2d_kernel": "pointer"}


def chosen(x, weight, device, fn=conv2d, **options):
    """The names of the kernels that a call would launch."""
    with _launch.record(device) as events:
        fn(x, weight, **options)
    names = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    short = (SHORT.get(n, n.removeprefix("conv2d_").removesuffix("_kernel")) for n in names)
    return " ".join(short)


@pytest.mark.parametrize("inputs, options, kernels", BORDERS.values(), ids=BORDERS)
def test_what_tma_cannot_read_goes_through_pointers(inputs, options, kernels):
    x, weight = inputs()
    assert chosen(x, weight, HOPPER, **options) == kernels
    assert "tma" not in chosen(x, weight, AMPERE, **options)
    groups, few = options.get("groups", 1), weight.shape[1] < module.FEW_CHANNELS
    where = "conv2d_grouped" if groups > 1 else "conv2d_flat" if few else "conv2d"
    with use_tile("matmul" if "matmul" in kernels else where, matmul_or(SMALL, kernels)):
        if "tma" in kernels:
            y = conv2d(x, weight, **options)
        elif kernels:
            with pytest.raises(ValueError, match="cannot take these"):
                conv2d(x, weight, **options)
    if "tma" not in kernels:
        y = conv2d(x, weight, **options)
    if 0 in weight.shape[:2]:  # which torch refuses, or returns no filters for
        want = torch.zeros_like(y, dtype=torch.float64)
    else:
        want = reference(*double(x, weight), **options)
    assert torch.equal(y, want.to(y.dtype))
    assert want.any() or 0 in (*x.shape, *weight.shape) or options.get("stride") == 8


def matmul_or(tile, kernels):
    lesson = importlib.import_module("tilelab.kernels.matmul_tma")
    return lesson.FAST_TILES[2][0] if "matmul" in kernels else tile


POOL_BORDERS = {
    "3x3": (lambda: (images(2, 24, 8, 8), filters(*W33)), "tma"),
    "filters of [K, C, R, S]": (
        lambda: (images(2, 24, 8, 8), filters(*W33).contiguous()), "pack_filter tma"
    ),
    "an odd image": (lambda: (images(2, 24, 9, 7), filters(*W33)), "tma"),
    "3 channels": (lambda: (images(2, 3, 8, 8), filters(32, 3, 3, 3)), "relu_pool"),
    "24 filters: of the places 16 bytes": (
        lambda: (images(2, 24, 8, 8), filters(24, 24, 3, 3)), "relu_pool"
    ),
    "20 channels": (lambda: (images(2, 20, 8, 8), filters(32, 20, 3, 3)), "relu_pool"),
    "off by one element": (
        lambda: (unaligned(images(2, 24, 8, 8)), filters(*W33)), "relu_pool"
    ),
    "[N, C, H, W] in memory": (
        lambda: (images(2, 24, 8, 8).contiguous(), filters(*W33)), "relu_pool"
    ),
    "float32 as IEEE has it": (
        lambda: (images(2, 24, 8, 8).float(), filters(*W33).float()), "relu_pool"
    ),
    "no images": (lambda: (images(0, 24, 8, 8), filters(*W33)), ""),
}  # fmt: skip


@pytest.mark.parametrize("inputs, kernels", POOL_BORDERS.values(), ids=POOL_BORDERS)
def test_what_is_pooled_in_which_kernel(inputs, kernels):
    x, weight = inputs()
    assert chosen(x, weight, HOPPER, conv2d_relu_pool) == kernels
    assert "tma" not in chosen(x, weight, AMPERE, conv2d_relu_pool)
    with use_tile("conv2d_relu_pool", SMALL) if "tma" in kernels else contextlib.nullcontext():
        y = conv2d_relu_pool(x, weight)
    assert torch.equal(y, pool.reference(*double(x, weight)).to(y.dtype))


def test_tf32_takes_it_for_multiples_of_four_channels(tf32):
    x, weight = images(2, 20, 8, 8).float(), filters(36, 20, 3, 3).float()
    assert chosen(x, weight, HOPPER) == "tma"
    assert chosen(x, weight[:34], HOPPER) == chosen(x[:, :18], weight[:, :18], HOPPER) == "pointer"
    assert chosen(x.contiguous(), weight, HOPPER) == "pointer"
    assert chosen(x[:, :3], weight[:, :3], HOPPER) == "pack pack_filter tma"


@pytest.mark.parametrize("capability", [0, 80, 89])
def test_older_devices_have_portable_kernels_alone(capability):
    with _launch.record(Device(capability, sms=100)):
        with use_tile("conv2d", SMALL), pytest.raises(ValueError, match="cannot take these"):
            conv2d(images(2, 24, 8, 8), filters(*W33))


def test_groups_refuse_tiles_of_more_filters():
    conv = LAYERS["32 groups of 4"]
    inputs = operands(conv, torch.float16)
    for tile in (FAST_TILES[2][0], SMALL | dict(SPLIT_K=2)):
        with pytest.raises(ValueError, match="groups want tiles"):
            run(conv, tile, inputs)


# --- plans ----------------------------------------------------------------------------------------


def plan_of(conv, item=2, weight="channels_last"):
    x, w = (torch.empty(s, device="meta") for s in (conv.x, conv.weight))
    x, w = laid_out(x, "channels_last"), laid_out(w, weight)
    *geometry, groups = conv.lists
    geometry = (tuple(pair) for pair in geometry)
    return make_plan(x.shape, x.stride(), w.shape, w.stride(), *geometry, groups, item)


def test_plans_are_those_of_the_docstring():
    stem = plan_of(Conv((8, 3, 224, 224), 64, (7, 7), 2, 3))
    assert stem.fold == (2, 2) and stem.taps == (4, 4) and stem.packed_w
    assert stem.x[0] == (8, 115, 115, 16) and stem.w[0] == (16, 64, 16)
    assert stem.geometry == (1, 1, 0, 0, 1, 1)
    assert plan_of(Conv((8, 3, 224, 224), 64, (7, 7), 2, 3), item=4).x[0][3] == 12

    strided = plan_of(Conv((8, 64, 56, 56), 128, (3, 3), 2, 1))
    assert strided.x[0] == (8, 28, 2, 28, 128) and strided.fold is None
    assert strided.geometry[:4] == (2, 2, 1, 1)
    shortcut = plan_of(Conv((8, 64, 56, 56), 128, (1, 1), 2))
    assert shortcut.x == ((8, 28, 28, 64), (56 * 56 * 64, 2 * 56 * 64, 2 * 64, 1))
    assert shortcut.geometry[:2] == (1, 1)

    groups = plan_of(Conv((8, 128, 56, 56), 128, (3, 3), 1, 1, 1, 32))
    assert groups.grouped == (64, 64) and groups.w[0] == (9, 128, 64) and groups.packed_w
    wide = plan_of(Conv((8, 128, 56, 56), 256, (3, 3), 1, 1, 1, 2))
    assert wide.grouped == (128, 64) and wide.w[0] == (9, 256, 64) and not wide.packed_w

    plain = Conv((8, 64, 56, 56), 64, (3, 3), 1, 1)
    assert not plan_of(plain).packed_w and plan_of(plain, weight="contiguous").packed_w
    assert plan_of(Conv((LARGEST // 8, 64, 8, 8), 64, (3, 3))) is None


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    N=st.integers(1, 4), C=st.integers(1, 12), K=st.integers(1, 12), sides=st.lists(
        st.tuples(
            st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 5),
            st.integers(1, 3),
        ), min_size=2, max_size=2,
    ),
    groups=st.sampled_from([1, 1, 2, 4]), item=st.sampled_from([2, 4]),
    weight=st.sampled_from(["channels_last", "contiguous", "sliced"]),
)  # fmt: skip
def test_plans_are_what_tma_takes(N, C, K, sides, groups, item, weight):
    """No size is 0, every step is of 16 bytes, and the last is of one element."""
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    unit = 16 // item
    C = C if C < 4 and groups == 1 else unit * C
    hypothesis.assume(min(output_size(size, taps, stride, padding, dilation)) > 0)
    conv = Conv((N, C * groups, *size), unit * K * groups, taps, stride, padding, dilation, groups)
    plan = plan_of(conv, item, weight)
    if plan is None:
        return
    for sizes, steps in (plan.x, plan.w):
        assert len(sizes) == len(steps) <= 5 and min(sizes) > 0
        assert steps[-1] == 1 and not any(step % unit for step in steps[:-1])
    N, P, Q, K = plan.size
    assert (N, K, P, Q) == conv.y and plan.w[0][:2] == (plan.taps[0] * plan.taps[1], K)


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("pixels", [64, 128, 256])
@hypothesis.settings(max_examples=60)
@hypothesis.given(N=st.integers(1, 300), P=st.integers(1, 300), Q=st.integers(1, 300))
def test_no_box_sticks_out_less(N, P, Q, pixels, pooling):
    def covered(box):
        return [-(-size // side) * side for size, side in zip((N, P, Q), box, strict=True)]

    def amount(box):
        n, p, q = covered(box)
        return n * p * q

    n, p, q = pixel_box(N, P, Q, pixels, pooling)
    assert n * p * q == pixels and max(n, p, q) <= 256  # TMA's largest
    assert not pooling or (p >= 2 and q >= 8)
    powers = [1 << i for i in range(9)]
    for i, j in itertools.product(powers, repeat=2):
        if i * j <= pixels and not (pooling and (i < 2 or j < 8)):
            other = pixels // (i * j), i, j
            assert (amount(other), -j) >= (amount((n, p, q)), -q)


def test_boxes_fit_the_images_of_networks():
    assert pixel_box(64, 56, 56, 256) == (4, 8, 8)
    assert pixel_box(64, 14, 14, 256) == (64, 2, 2)
    assert pixel_box(64, 7, 7, 128) == (16, 1, 8)
    assert pixel_box(1, 112, 112, 256) == (1, 16, 16)
    assert pixel_box(1, 1, 1, 256)[1:] == (1, 256)  # all stick out alike: the widest


@pytest.mark.parametrize("item", FAST_TILES)
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_the_default_is_a_tile_that_can_do_it(conv, item):
    plan = plan_of(conv, item)
    if plan is None:
        pytest.skip("its channels are no multiple of 16 bytes")
    tile = fast_tile(plan, item, 132)
    assert tile | dict(SPLIT_K=1) in FAST_TILES[item]
    if plan.grouped:
        assert tile["BLOCK_N"] == GROUP_BLOCK and tile["SPLIT_K"] == 1
    (taps, _, span), _ = plan.w
    steps = taps * -(-span // tile["BLOCK_K"])
    assert tile["SPLIT_K"] == 1 or tile["SPLIT_K"] * 4 <= steps
    assert tile["SPLIT_K"] == 1 or tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128
    assert fast_tile(plan, item, 132, True)["SPLIT_K"] == 1


def test_defaults_follow_the_shape():
    def default(*conv, sms=132):
        return fast_tile(plan_of(Conv(*conv)), 2, sms)

    large = default((64, 256, 56, 56), 256, (3, 3), 1, 1)
    assert (large["BLOCK_M"], large["BLOCK_N"], large["SPLIT_K"]) == (256, 128, 1)
    assert default((64, 64, 56, 56), 64, (3, 3), 1, 1)["BLOCK_N"] == 64
    assert default((64, 3, 224, 224), 64, (7, 7), 2, 3)["BLOCK_K"] == 16
    assert default((64, 32, 56, 56), 64, (3, 3), 1, 1)["BLOCK_K"] == 32
    few = default((1, 512, 7, 7), 512, (3, 3), 1, 1)
    assert few["SPLIT_K"] > 1 and few["BLOCK_M"] == 128
    assert default((1, 512, 7, 7), 512, (3, 3), 1, 1, sms=1)["SPLIT_K"] == 1


# --- the first rungs ------------------------------------------------------------------------------

ONE_GROUP = {k: conv for k, conv in CONVS.items() if conv.groups == 1}


@pytest.mark.parametrize("tile", RUNGS, ids=lambda tile: tile["kernel"])
@pytest.mark.parametrize(
    "conv",
    [pytest.param(c, id=k, marks=[pytest.mark.core] * (k in CORE)) for k, c in ONE_GROUP.items()],
)
def test_rungs_agree_with_the_reference(conv, tile, monkeypatch):
    """All geometry, and few channels too, as if they were many."""
    monkeypatch.setattr(module, "FEW_CHANNELS", 1)
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
    conv = Conv((2, 18, 7, 9), tile["BLOCK_N"] + 3, (2, 3), 1, 1)
    with use_tile("conv2d", tile):
        check(conv, torch.float16, x="channels_last", weight="channels_last", bias=False)
        for device in (HOPPER, AMPERE):
            inputs = operands(conv, torch.float16)
            assert chosen(*inputs[:2], device, padding=1) == tile["kernel"]


@pytest.mark.parametrize("tile", RUNGS, ids=lambda tile: tile["kernel"])
def test_rungs_are_of_many_channels_and_one_group(tile):
    for conv in (Conv((1, 3, 4, 4), 8, (3, 3)), Conv((1, 64, 4, 4), 64, (3, 3), groups=4)):
        with pytest.raises(ValueError, match="cannot take these"):
            run(conv, tile, operands(conv, torch.float16))


@pytest.mark.parametrize("tile, more", [("pool", dict(SPLIT_K=2)), ("groups", dict(SPLIT_K=2)),
                                        ("groups", dict(BLOCK_N=128))], ids=str)  # fmt: skip
def test_tiles_that_groups_and_pools_cannot_have(tile, more):
    """A pool's places would be written beyond their end, groups be another block's."""
    bad = SMALL | more
    x, weight = randn(2, 64, 8, 8, dtype=torch.float16), randn(64, 64, 3, 3, dtype=torch.float16)
    x = laid_out(x, "channels_last")
    with pytest.raises(ValueError, match="BLOCK_N=64, groups and pools of SPLIT_K=1; got"):
        if tile == "pool":
            with use_tile("conv2d_relu_pool", bad):
                conv2d_relu_pool(x, weight)
        else:
            with use_tile("conv2d_grouped", bad):
                conv2d(x, weight[:, :16], groups=4)


def test_packing_leaves_a_forced_tile_as_it_is():
    tile = dict(BLOCK_M=64, BLOCK_N=16, num_warps=4)
    given = tile.copy()
    x, weight = randn(1, 3, 16, 16, dtype=torch.float16), randn(8, 3, 8, 8, dtype=torch.float16)
    with use_tile("conv2d_flat", SMALL), use_tile("conv2d_pack", tile):
        conv2d(x, weight, stride=8)
    assert tile == given


def test_offsets_in_the_padding_count():
    """Rows 2^30 elements apart, and two of them before the image: 32 bits do not hold that."""
    from tilelab.kernels.conv2d import _are_near

    steps = (2**30, 1, 2**30, 16)
    assert _are_near(((1, 16, 1, 8), steps)) and not _are_near(((1, 16, 5, 12), steps))
    rows = torch.empty(1, 16, 1, 8, dtype=torch.float16).as_strided((1, 16, 1, 8), steps)
    with _launch.record(AMPERE) as events:
        conv2d(rows, torch.empty(8, 16, 5, 5, dtype=torch.float16), padding=2)
    assert events[-1].kernel.__name__ == "conv2d_kernel" and not events[-1].meta["NEAR"]


# --- on a GPU -------------------------------------------------------------------------------------

REAL = {
    "3x3": Conv((64, 128, 56, 56), 136, (3, 3), 1, 1),
    "3x3, stride 2": Conv((64, 136, 56, 56), 256, (3, 3), 2, 1),
    "1x1, stride 2": Conv((64, 256, 56, 56), 512, (1, 1), 2),
    "7x7, stride 2": Conv((64, 3, 224, 224), 64, (7, 7), 2, 3),
    "16x16 patches": Conv((64, 3, 224, 224), 192, (16, 16), 16),
    "14x14 pixels": Conv((65, 256, 14, 14), 264, (3, 3), 1, 1),
    "dilation 2": Conv((16, 128, 56, 56), 128, (3, 3), 1, 2, 2),
    "32 groups of 4": Conv((64, 128, 56, 56), 128, (3, 3), 1, 1, 1, 32),
    "4 groups of 64": Conv((64, 256, 28, 28), 256, (3, 3), 1, 1, 1, 4),
}


def needs_tma():
    if "tma" not in _launch.device_of(torch.empty(1, device=DEVICE)).kernels:
        pytest.skip("this GPU has no tensor memory accelerator")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
@pytest.mark.parametrize("dtype", HALF)
def test_every_fast_tile_at_real_size(tile, dtype, conv, device):
    """Every program takes several turns; the first and the last image against float64."""
    needs_tma()
    if conv.groups > 1 and tile["BLOCK_N"] != GROUP_BLOCK:
        pytest.skip("groups want tiles of 64 filters")
    small = conv.groups == 1 and tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128
    x, weight, bias = operands(conv, dtype, values=randn)
    ends = torch.stack([x[0], x[-1]]).double()
    want = call(conv, reference, activation="relu")(ends, *double(weight, bias))
    for split in (1, 3) if small else (1,):
        first, second = (run(conv, tile | dict(SPLIT_K=split), (x, weight, bias), "relu")
                         for _ in range(2))  # fmt: skip
        assert torch.equal(first, second)
        got = torch.stack([first[0], first[-1]])
        assert_close(got, want, dtype=dtype, terms=conv.terms["y"])


@pytest.mark.gpu
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
def test_defaults_at_real_size(conv, device):
    """What a call takes of itself, against the portable kernel: in integers, to the last bit."""
    inputs = operands(conv, torch.bfloat16)
    y = call(conv, activation="relu")(*inputs)
    assert torch.equal(y, run(conv, TILES[5], inputs, "relu")) and y.any()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("size", [28, 27, 14], ids="{0}x{0}".format)
def test_every_fast_tile_pools_at_real_size(tile, size, device):
    needs_tma()
    inputs = to_pool((64, 128, size, size), 256, (3, 3), 1, torch.bfloat16)
    y, place = pooled(tile, inputs, 1)
    want = pooled(None, inputs, 1)
    assert torch.equal(y, want[0]) and torch.equal(place, want[1])
