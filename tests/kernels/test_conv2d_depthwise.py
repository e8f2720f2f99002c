"""conv2d where every channel has a filter of its own: the kernel that does it, and who calls it."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import _launch, conv2d
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d_depthwise import MORE_TAPS, TILES, reference

from tests.tools.convolutions import Conv, every_dtype, far_apart, integers
from tests.tools.inputs import DEVICE, DTYPES, INTERPRET, LAYOUTS, double, gradients, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.conv2d_depthwise")


def depthwise(N, C, H, W, *rest):
    """A convolution of C channels and filters; `rest` is taps, stride, padding, dilation."""
    taps, stride, padding, dilation = (*rest, *(1, 0, 1)[len(rest) - 1 :])
    return Conv((N, C, H, W), C, taps, stride, padding, dilation, C)


def call(conv, activation=None):
    """The function of x, weight and, if there is one, bias, that this convolution is."""

    def called(x, weight, bias=None):
        return conv2d(x, weight, bias, *conv.args, activation)

    return called


def check(conv, dtype, *, x="channels_last", weight="contiguous", bias="contiguous",
          activation="relu"):  # fmt: skip
    """y in poison against float64; `x`, `weight` and `bias` name layouts."""
    inputs = conv.inputs(dtype, x, weight)
    if bias:
        inputs.append(randn(conv.filters, dtype=dtype, layout=bias, seed=2))
    with poison() as p:
        y = call(conv, activation)(*[p(t) for t in inputs])
    y64 = reference(*double(*inputs), *[None][len(inputs) - 2 :], *conv.args[:3], activation)
    teeth = "expanded" not in (x, weight)
    assert_close(y, y64, dtype=dtype, terms=conv.terms["y"], name="y", teeth=teeth)
    assert y.is_contiguous(memory_format=torch.channels_last)


# --- geometry, each for a reason ----------------------------------------------------------------

CONVS = {
    "one pixel, one channel, one tap": depthwise(1, 1, 1, 1, (1, 1)),
    "1x1: a scale a channel": depthwise(2, 5, 4, 6, (1, 1)),
    "3x3 of the same size": depthwise(2, 5, 8, 9, (3, 3), 1, 1),
    "3x3 without padding": depthwise(2, 16, 8, 9, (3, 3)),
    "a last patch that is not full": depthwise(2, 8, 5, 7, (3, 3), 1, 1),
    "an image smaller than a patch": depthwise(3, 8, 1, 3, (1, 3), 1, (0, 1)),
    "one column": depthwise(2, 6, 9, 1, (3, 1), 1, (1, 0)),
    "filter as large as x": depthwise(3, 4, 5, 6, (5, 6)),
    "filter larger than x": depthwise(2, 3, 2, 3, (5, 4), 1, 2),
    "C=17, one more than the least tile": depthwise(1, 17, 6, 7, (3, 3), 1, 1),
    "C=33, not few": depthwise(1, 33, 6, 7, (3, 3), 1, 1),
    "C=144, more than two blocks of 64": depthwise(1, 144, 6, 5, (3, 3), 1, 1),
    "2x5": depthwise(2, 4, 7, 9, (2, 5)),
    "5x2": depthwise(2, 4, 9, 7, (5, 2), 1, (2, 1)),
    "4x4, of even size": depthwise(2, 3, 7, 8, (4, 4), 1, 2),
    "9 taps in a row": depthwise(2, 3, 3, 12, (1, 9), 1, (0, 4)),
    "5x5": depthwise(2, 6, 9, 8, (5, 5), 1, 2),
    "7x7, the most taps": depthwise(1, 6, 9, 10, (7, 7), 1, 3),
    "stride 2, an odd image": depthwise(2, 4, 9, 11, (3, 3), 2, 1),
    "stride 2, an even image": depthwise(2, 4, 8, 10, (3, 3), 2, 1),
    "stride 2 that leaves a row and a column unread": depthwise(2, 4, 8, 10, (3, 3), 2),
    "stride as long as the filter: nothing is shared": depthwise(2, 4, 9, 12, (3, 3), 3),
    "stride longer than the filter": depthwise(2, 4, 11, 12, (2, 2), 4, 1),
    "stride longer than x": depthwise(2, 3, 4, 5, (2, 2), (9, 8)),
    "stride (1, 3)": depthwise(2, 4, 6, 11, (3, 3), (1, 3), 1),
    "stride (3, 1)": depthwise(2, 4, 11, 6, (3, 3), (3, 1), 1),
    "padding larger than needed": depthwise(1, 3, 4, 5, (3, 3), 1, 4),
    "padding (2, 0)": depthwise(2, 3, 6, 7, (3, 3), 1, (2, 0)),
    "padding (0, 2), stride 2": depthwise(2, 3, 6, 7, (3, 3), 2, (0, 2)),
    "dilation 2": depthwise(1, 4, 9, 10, (3, 3), 1, 2, 2),
    "dilation (1, 3): dense along one side": depthwise(1, 4, 9, 10, (3, 3), 1, 1, (1, 3)),
    "dilation (3, 1), stride 2": depthwise(1, 4, 9, 10, (3, 3), 2, (3, 1), (3, 1)),
    "dilation far apart": depthwise(1, 4, 60, 4, (2, 2), 1, 1, (50, 1)),
    "everything at once": depthwise(2, 18, 12, 11, (4, 3), (3, 2), (3, 1), (2, 4)),
}
# What also runs with the oldest versions: each kind of patch, and each border.
CORE = [
    "3x3 of the same size",
    "a last patch that is not full",
    "C=144, more than two blocks of 64",
    "7x7, the most taps",
    "stride 2, an odd image",
    "stride longer than the filter",
    "dilation (1, 3): dense along one side",
    "everything at once",
]
assert set(CORE) <= set(CONVS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "conv",
    [
        pytest.param(conv, id=name, marks=[pytest.mark.core] if name in CORE else [])
        for name, conv in CONVS.items()
    ],
)
def test_geometry(conv, dtype):
    check(conv, dtype, activation=None)


PLAIN = CONVS["3x3 of the same size"]
STEPS = depthwise(3, 18, 23, 9, (3, 2), (2, 1), 1)  # several chunks of several steps


@pytest.mark.core
@every_dtype
@pytest.mark.parametrize("bias", [None, "contiguous"], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_epilogue(activation, bias, dtype):
    check(PLAIN, dtype, bias=bias, activation=activation)


@pytest.mark.core
@every_dtype
@pytest.mark.parametrize("conv", [PLAIN, STEPS], ids=["same size", "stride (2, 1)"])
def test_gradients_are_those_of_any_convolution(conv, dtype):
    inputs = [*conv.inputs(dtype), randn(conv.filters, dtype=dtype, seed=2)]
    dy = conv.dy(dtype)
    _, grads = gradients(call(conv, "relu"), inputs, dy)
    _, grads64 = gradients(
        lambda x, w, b: reference(x, w, b, *conv.args[:3], "relu"), double(*inputs), double(dy)
    )
    for name, got, want in zip(["dx", "dw", "db"], grads, grads64, strict=True):
        assert_close(got, want, dtype=dtype, terms=conv.terms[name], name=name)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("x", LAYOUTS)
def test_layouts(x, weight):
    check(STEPS, torch.float32, x=x, weight=weight)


@pytest.mark.parametrize("bias", ["sliced", "offset", "expanded"])
def test_layouts_of_the_bias(bias):
    check(STEPS, torch.bfloat16, bias=bias)


@pytest.mark.core
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty_batch(activation):
    conv = depthwise(0, 5, 6, 7, (3, 2), 2, 1)
    y = call(conv, activation)(*conv.inputs(torch.float32))
    assert y.shape == conv.y and y.numel() == 0


# --- values -------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_accumulation(dtype):
    """2048 + 1 is 2048 in fp16 and in bf16: such a sum would stand still there."""
    x = torch.ones(1, 2, 7, 7, dtype=dtype, device=DEVICE)
    weight = torch.ones(2, 1, 7, 7, dtype=dtype, device=DEVICE)
    weight[:, :, 0, 0] = 2048
    assert conv2d(x, weight, groups=2).flatten().tolist() == [2096, 2096]


@pytest.mark.core
@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_reach_what_torch_has_them_reach(value, dtype):
    """Nothing leaks through padding, from one strip into the next, or between channels."""
    inputs = [*STEPS.inputs(dtype), randn(STEPS.filters, dtype=dtype, seed=2)]
    inputs[0][0, 0, 0, 0] = value  # in a corner of the first image, and within the last
    inputs[0][-1, -1, 12, 5] = value
    inputs[2][3] = value
    for activation in [None, "relu"]:
        y = call(STEPS, activation)(*inputs)
        y64 = reference(*double(*inputs), *STEPS.args[:3], activation)
        assert 0 < y64.isfinite().sum()
        assert_close(y, y64, dtype=dtype, terms=STEPS.terms["y"])


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_at_exactly_zero(dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([-1.0, -tiny, -0.0, 0.0, tiny, 1.0], dtype=dtype, device=DEVICE)
    y = conv2d(x.view(1, 1, 1, 6), torch.ones(1, 1, 1, 1, dtype=dtype, device=DEVICE), None,
               activation="relu")  # fmt: skip
    assert y.flatten().tolist() == [0, 0, 0, 0, tiny, 1]


# --- tiles --------------------------------------------------------------------------------------


def tile_id(tile):
    return "-".join(map(str, tile.values()))


@pytest.mark.core
@every_dtype
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tile", [*TILES, *MORE_TAPS.values()], ids=tile_id)
def test_every_tile_alone(tile, stride, dtype, monkeypatch):
    """A tile and a remainder along pixels and channels, several steps and several chunks."""
    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", 1)  # so that programs are as high as they may be
    height = stride * (2 * tile["ROWS"] + 1)
    conv = depthwise(1, tile["BLOCK_N"] + 3, height, 9 * stride, (3, 3), stride, 1)
    with use_tile("conv2d_depthwise", tile):
        check(conv, dtype)


@every_dtype
def test_the_same_bits_twice(dtype):
    inputs = [*STEPS.inputs(dtype), randn(STEPS.filters, dtype=dtype, seed=2)]
    assert torch.equal(call(STEPS)(*inputs), call(STEPS)(*inputs))


@pytest.mark.parametrize("enough", [1, 4, 10**6])
def test_how_far_programs_go_down_does_not_matter(enough, monkeypatch):
    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", enough)
    check(STEPS, torch.float32)


# --- who calls it -------------------------------------------------------------------------------


def launched(conv):
    with _launch.record() as events:
        call(conv)(*conv.inputs(torch.float32))
    (launch,) = (e for e in events if isinstance(e, _launch.Launch))
    return launch


@pytest.mark.core
@pytest.mark.parametrize(
    "conv, name",
    [
        (depthwise(2, 64, 8, 8, (3, 3), 1, 1), "conv2d_depthwise_kernel"),
        (depthwise(2, 1, 8, 8, (3, 3), 1, 1), "conv2d_depthwise_kernel"),
        (depthwise(2, 6, 9, 9, (7, 7)), "conv2d_depthwise_kernel"),
        (depthwise(2, 6, 9, 9, (5, 10), 1, 5), "conv2d_flat_kernel"),
        (Conv((2, 3, 8, 6), 6, (3, 3), groups=3), "conv2d_flat_kernel"),
        (Conv((2, 6, 8, 6), 6, (3, 3), groups=3), "conv2d_flat_kernel"),
        (Conv((2, 1, 8, 6), 6, (3, 3)), "conv2d_flat_kernel"),
    ],
    ids=["depthwise", "one channel, one filter", "49 taps", "50 taps: too many for registers",
         "two filters a channel", "two channels a group", "many filters of one channel"],
)  # fmt: skip
def test_which_convolutions_are_given_to_it(conv, name):
    assert launched(conv).kernel.__name__ == name


def test_patches_are_as_large_as_inputs_are_shared():
    def patch(*geometry):
        meta = launched(depthwise(8, 64, 32, 32, *geometry)).meta
        return meta["PATCH_P"], meta["PATCH_Q"]

    with use_tile("conv2d_depthwise", TILES[3]):
        assert patch((3, 3), 1, 1) == patch((3, 3), 2, 1) == (2, 2)
        assert patch((3, 3), 1, 1, (2, 1)) == (1, 2)  # its rows are not neighbours
        assert patch((2, 2), (1, 3)) == (2, 1)  # windows do not overlap


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the tensors are as large as that")
@pytest.mark.parametrize("dim", range(4), ids=["n", "c", "h", "w"])
def test_offsets_past_2_to_the_31_along(dim, tmp_path):
    conv = depthwise(2, 5, 3, 4, (2, 2), 1, (1, 0))
    x, weight = conv.inputs(torch.float16)
    far = far_apart(x, dim, tmp_path / "x")
    with use_tile("conv2d_depthwise", dict(TILES[0], BLOCK_N=16)):
        assert torch.equal(call(conv)(far, weight), call(conv)(x, weight))


# --- anything else ------------------------------------------------------------------------------


@st.composite
def any_depthwise(draw):
    sides = []
    for _ in range(2):
        taps, stride, pad = (draw(st.integers(*ends)) for ends in ((1, 5), (1, 4), (0, 4)))
        dilation = draw(st.sampled_from([1, 1, 2, 3]))
        least = max(1, dilation * (taps - 1) + 1 - 2 * pad)
        sides.append((draw(st.integers(least, least + 12)), taps, stride, pad, dilation))
    (H, W), *geometry = zip(*sides, strict=True)
    N, C = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 33]))
    return depthwise(N, C, H, W, *geometry)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    conv=any_depthwise(), dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS),
    tile=st.sampled_from([None, *TILES]),
)  # fmt: skip
def test_any_depthwise_convolution(conv, dtype, x, tile):
    """In small integers, so that everything is exact."""
    inputs = conv.inputs(dtype, x, "contiguous", integers)
    with poison() as p, use_tile("conv2d_depthwise", tile or TILES[0]):
        y = call(conv)(*[p(t) for t in inputs])
    assert torch.equal(y.double(), reference(*double(*inputs), None, *conv.args[:3]))


# --- on a GPU, at real sizes --------------------------------------------------------------------

REAL = {
    "MobileNet v1, first": depthwise(32, 32, 112, 112, (3, 3), 1, 1),
    "MobileNet v2, stride 2": depthwise(32, 144, 56, 56, (3, 3), 2, 1),
    "MobileNet v2, last": depthwise(32, 960, 7, 7, (3, 3), 1, 1),
    "5x5": depthwise(32, 240, 28, 28, (5, 5), 1, 2),
    "7x7": depthwise(16, 192, 28, 28, (7, 7), 1, 3),
    "dilation 2": depthwise(8, 256, 33, 33, (3, 3), 1, 2, 2),
    "channels that 16 bytes do not divide": depthwise(8, 150, 33, 33, (3, 3), 1, 1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
def test_real_sizes(conv, dtype, layout):
    check(conv, dtype, x=layout)
