"""conv2d where every channel has a filter of its own: the kernel that does it, and who calls it."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.convolutions import Conv, every_dtype, integers
from tests.tools.inputs import DEVICE, DTYPES, LAYOUTS, double, gradients, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, conv2d
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d_depthwise import TILES, reference

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


PLAIN = depthwise(2, 5, 8, 9, (3, 3), 1, 1)
STEPS = depthwise(3, 18, 23, 9, (3, 2), (2, 1), 1)  # several chunks of several steps


@pytest.mark.core
@every_dtype
def test_epilogue(dtype):
    """None of it; the contract suite has the other combinations."""
    check(PLAIN, dtype, bias=None, activation=None)
    check(PLAIN, dtype, bias=None, activation="relu")


@pytest.mark.core
@pytest.mark.parametrize("conv, dtype", [(PLAIN, torch.bfloat16), (STEPS, torch.float32)],
                         ids=["same size", "stride (2, 1)"])  # fmt: skip
def test_gradients_are_those_of_any_convolution(conv, dtype):
    inputs = [*conv.inputs(dtype), randn(conv.filters, dtype=dtype, seed=2)]
    dy = conv.dy(dtype)
    _, grads = gradients(call(conv, "relu"), inputs, dy)
    _, grads64 = gradients(
        lambda x, w, b: reference(x, w, b, *conv.args[:3], "relu"), double(*inputs), double(dy)
    )
    for name, got, want in zip(["dx", "dw", "db"], grads, grads64, strict=True):
        assert_close(got, want, dtype=dtype, terms=conv.terms[name], name=name)


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
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_reach_what_torch_has_them_reach(value):
    """Nothing leaks through padding, from one strip into the next, or between channels."""
    dtype = torch.float16 if value < 0 else torch.float32
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
