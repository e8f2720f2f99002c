"""The input gradient's kernel for TMA: it agrees with float64, and is chosen where it can be.

As test_conv2d_fast.py of the forward's: here it runs in the interpreter, or on this machine's GPU,
and what it compiles to is held to its bars at the end.
"""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import _launch
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.bias_relu import bias_activation_backward
from tilelab.kernels.conv2d_input_grad import TILES, conv2d_input_grad, conv2d_input_grad_relu
from tilelab.kernels.conv2d_input_grad_tma import (
    _taps_of_classes,
    conv2d_input_grad_tma_kernel,
    fast_tile,
    make_plan,
)
from tilelab.kernels.conv2d_tma import FAST_TILES, LARGEST, pixel_box

from tests.tools.convolutions import Conv, integers
from tests.tools.inputs import DEVICE, double, laid_out, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.conv2d_input_grad")
HOPPER, AMPERE = Device(90, sms=132), Device(80, sms=108)
HALF = [torch.float16, torch.bfloat16]
SMALL = FAST_TILES[2][3]  # 128 pixels, 64 channels: for tests of everything else


def name(tile):
    return "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")


def operands(conv, dtype, weight="channels_last", values=integers):
    """dy, weight, and an x of which about as much is positive, negative and zero."""
    x, w = conv.inputs(dtype, "channels_last", weight, values)
    return conv.dy(dtype, "channels_last", values), w, x


SHORT = {"conv2d_input_grad": "pointer", "conv2d_input_grad_tma": "tma"}


def launched(device, fn, *args):
    """The names of the kernels that a call would launch."""
    with _launch.record(device) as events:
        fn(*args)
    names = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    names = [n.removesuffix("_kernel") for n in names]
    return " ".join(SHORT.get(n, n.removeprefix("conv2d_")) for n in names)


def run(conv, tile, dy, weight):
    """dx by the fast kernel, in poison."""
    with use_tile("conv2d_input_grad", tile):
        args = list(conv.x), *conv.lists
        assert "tma" in launched(HOPPER, conv2d_input_grad, dy, weight, *args).split()
        with poison() as p:
            return conv2d_input_grad(p(dy), p(weight), *args)


def run_relu(conv, tile, dy, weight, x):
    """dz and dbias by the fast kernel, in poison."""
    with use_tile("conv2d_input_grad_relu", tile):
        names = launched(HOPPER, conv2d_input_grad_relu, dy, weight, x, *conv.lists)
        assert names.removeprefix("pack_filter ") == "tma sum_partials"
        with poison() as p:
            return conv2d_input_grad_relu(p(dy), p(weight), p(x), *conv.lists)


def reference(conv, dy, weight):
    """dx by autograd of torch's own convolution, in float64."""
    x = torch.zeros(conv.x, dtype=torch.float64, device=dy.device, requires_grad=True)
    y = torch.nn.functional.conv2d(x, double(weight), None, *conv.args)
    return torch.autograd.grad(y, x, double(dy))[0]


def through_relu(dx, x):
    """(dz, dbias) of dx in float64."""
    dz = torch.where(double(x) <= 0, 0.0, dx)
    return dz, dz.sum((0, 2, 3))


@functools.cache
def exact(conv):
    """What the integers give, which is not mostly zeros."""
    want = reference(conv, *operands(conv, torch.float32)[:2])
    assert want.count_nonzero() > want.numel() / 8
    return want


@pytest.fixture
def tf32(monkeypatch):
    """float32 products that may be TF32, without which they are not for this kernel."""
    monkeypatch.setattr(module, "dot_precision", lambda dtype, switch: "tf32")


# --- the same results -----------------------------------------------------------------------------

LAYERS = {
    # neither channels nor filters are a multiple of a tile's
    "3x3": Conv((2, 72, 7, 10), 72, (3, 3), 1, 1),
    "3x3, 8 channels": Conv((2, 8, 9, 10), 24, (3, 3), 1, 1),
    "136 channels": Conv((2, 136, 7, 10), 24, (2, 2), 1, 1),
    "2x3, no padding": Conv((2, 24, 7, 9), 40, (2, 3)),
    "1x7": Conv((2, 24, 5, 9), 24, (1, 7), padding=(0, 3)),
    "5x2, padding (2, 1)": Conv((2, 24, 9, 7), 24, (5, 2), padding=(2, 1)),
    "padding as large as the image": Conv((2, 24, 3, 4), 24, (3, 3), padding=4),
    "dilation 2": Conv((1, 24, 9, 10), 24, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((1, 24, 7, 9), 24, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "1x1, padding": Conv((2, 24, 5, 7), 40, (1, 1), padding=1),
    # strides: the last two blocks of channels have some in common
    "stride 2": Conv((3, 72, 6, 10), 24, (3, 3), 2, 1),
    "stride 2, 136 channels": Conv((1, 136, 6, 4), 40, (3, 3), 2, 1),
    "stride 2, a row and a column unread": Conv((2, 64, 6, 8), 24, (3, 3), 2),
    "stride 2 of 1x1: three classes without a tap": Conv((2, 72, 6, 8), 40, (1, 1), 2),
    "stride 2 of 1x1, padding": Conv((2, 64, 6, 8), 40, (1, 1), 2, 1),
    "stride 2 of 2x2: a tap each": Conv((2, 64, 6, 8), 24, (2, 2), 2),
    "stride 2 of 7x7": Conv((1, 64, 6, 8), 8, (7, 7), 2, 3),
    "stride 2 of 4x4": Conv((2, 64, 8, 6), 24, (4, 4), 2, 1),
    "stride (2, 1), few channels": Conv((2, 24, 8, 7), 24, (3, 3), (2, 1), 1),
    "stride (1, 2)": Conv((2, 72, 7, 8), 24, (3, 3), (1, 2), 1),
    "stride (3, 2), padding (1, 2)": Conv((2, 64, 9, 8), 24, (4, 3), (3, 2), (1, 2)),
    "stride larger than the filter": Conv((2, 64, 9, 12), 24, (2, 2), 3),
    "padding larger than the stride": Conv((2, 64, 4, 6), 24, (3, 3), 2, 5),
    "dilation 2, stride 2: classes without a tap": Conv((1, 64, 8, 10), 24, (3, 3), 2, 2, 2),
    "dilation 3, stride 2": Conv((1, 64, 12, 14), 24, (3, 3), 2, 2, 3),
    "dilation (2, 3), stride (4, 3)": Conv((1, 64, 12, 15), 24, (2, 3), (4, 3), (0, 2), (2, 3)),
    "dilation (6, 1), stride (4, 2): gcd 2": Conv((1, 64, 12, 4), 24, (3, 2), (4, 2), 2, (6, 1)),
    # images
    "3x3 of one pixel": Conv((5, 24, 1, 1), 24, (3, 3), padding=1),
    "many images of 2x2": Conv((140, 16, 2, 2), 16, (2, 2), padding=1),
    "a row of 300 pixels": Conv((1, 16, 1, 300), 16, (1, 3), padding=(0, 1)),
    "many images, stride 2": Conv((70, 64, 2, 4), 8, (3, 3), 2, 1),
}  # fmt: skip
# Each with a tile and a dtype; and every second time the filters have to be packed.
ORDER = {layer: i for i, layer in enumerate(LAYERS)}
every_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.mark.core
@every_layer
def test_any_layer_to_the_last_bit(layer):
    """In small integers every sum is exact."""
    conv, i = LAYERS[layer], ORDER[layer]
    dtype = HALF[i // 2 % 2]
    dy, w, _ = operands(conv, dtype, ("channels_last", "contiguous")[i % 2])
    dx = run(conv, FAST_TILES[2][i % 6], dy, w)
    assert torch.equal(dx, exact(conv).to(dtype))
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.core
@every_layer
def test_any_layer_through_a_relu(layer):
    conv, i = LAYERS[layer], ORDER[layer]
    dtype = HALF[(i // 2 + 1) % 2]
    dy, w, x = operands(conv, dtype, ("contiguous", "channels_last")[i % 2])
    dz, dbias = run_relu(conv, FAST_TILES[2][(i + 1) % 6], dy, w, x)
    want = through_relu(exact(conv), x)
    assert torch.equal(dz, want[0].to(dtype)) and torch.equal(dbias, want[1].to(dtype))
    assert dz.stride() == x.stride()


STEMS = {  # few channels: by the folded image, which may be smaller than the padded one, or larger
    "stem of 7x7": Conv((2, 3, 14, 18), 24, (7, 7), 2, 3),
    "stem of 3x3, 1 channel": Conv((2, 1, 7, 9), 16, (3, 3), 1, 1),
    "stem of 11x11, rows unread": Conv((1, 3, 30, 27), 24, (11, 11), 4, 2),
    "patches": Conv((2, 3, 17, 16), 24, (8, 8), 8),
    "stride (3, 2) larger than the filter": Conv((2, 5, 11, 9), 8, (2, 1), (3, 2), (0, 1)),
}


@pytest.mark.core
@pytest.mark.parametrize("weight", ["channels_last", "contiguous"])
@pytest.mark.parametrize("layer", STEMS)
def test_first_layers(layer, weight):
    conv = STEMS[layer]
    dy, w, x = operands(conv, torch.bfloat16, weight)
    want = reference(conv, dy, w)
    for tile in (FAST_TILES[2][5], SMALL | dict(SPLIT_K=2)):
        dx = run(conv, tile, dy, w)
        assert torch.equal(dx, want.bfloat16())
        assert dx.is_contiguous(memory_format=torch.channels_last)
    with use_tile("conv2d_input_grad", SMALL):
        names = launched(HOPPER, conv2d_input_grad_relu, dy, w, x, *conv.lists).split()
        assert names[:3] == ["pack_filter", "tma", "unfold"] and "bias_activation_backward" in names


@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("layer", ["stride 2", "136 channels"])
def test_every_tile(layer, tile):
    conv = LAYERS[layer]
    dy, w, x = operands(conv, torch.float16)
    assert torch.equal(run(conv, tile, dy, w), exact(conv).half())
    dz, dbias = run_relu(conv, tile, dy, w, x)
    want = through_relu(exact(conv), x)
    assert torch.equal(dz, want[0].half()) and torch.equal(dbias, want[1].half())


@pytest.mark.parametrize("tile", FAST_TILES[4], ids=name)
@pytest.mark.parametrize("layer", ["2x3, no padding", "stride 2", "1x1, padding"])
def test_tf32_tiles(layer, tile, tf32):
    """Whose filters are packed, however they lie."""
    conv = LAYERS[layer]
    dy, w, x = operands(conv, torch.float32)
    assert torch.equal(run(conv, tile, dy, w), exact(conv).float())
    dz, dbias = run_relu(conv, tile, dy, w, x)
    want = through_relu(exact(conv), x)
    assert torch.equal(dz, want[0].float()) and torch.equal(dbias, want[1].float())


@pytest.mark.parametrize("split", [2, 3, 16])
@pytest.mark.parametrize(
    "layer",
    ["2x3, no padding", "3x3 of one pixel", "stride 2", "stride 2 of 7x7"]
    + ["stride 2 of 1x1: three classes without a tap"],
)
def test_parts_of_the_sum(layer, split):
    """Parts that divide nothing, begin within a tap, and some that are left with nothing to add."""
    conv, dtype = LAYERS[layer], HALF[split % 2]
    dy, w, _ = operands(conv, dtype)
    dx = run(conv, SMALL | dict(BLOCK_K=16, SPLIT_K=split), dy, w)
    assert torch.equal(dx, exact(conv).to(dtype))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("per_sm", [0, 1, 2])
@pytest.mark.parametrize("layer", ["136 channels", "stride 2, 136 channels", "1x1, padding"])
def test_every_program_does_its_share(layer, per_sm, split):
    """One program a tile, or a few that take turns, there and back: each tile is computed."""
    conv, tile = LAYERS[layer], SMALL | dict(PROGRAMS_PER_SM=per_sm, SPLIT_K=split)
    dy, w, x = operands(conv, torch.float16)
    assert torch.equal(run(conv, tile, dy, w), exact(conv).half())
    if split == 1:
        assert torch.equal(run_relu(conv, tile, dy, w, x)[0],
                           through_relu(exact(conv), x)[0].half())  # fmt: skip
    with use_tile("conv2d_input_grad", tile), _launch.record(Device(90, sms=2)) as events:
        conv2d_input_grad(dy, w, list(conv.x), *conv.lists)
    (N, C, H, W), (a, b) = conv.x, conv.lists[0]
    n, p, q = pixel_box(N, H // a, W // b, tile["BLOCK_M"])
    tiles = -(-N // n) * -(-H // a // p) * -(-W // b // q) * -(-C // tile["BLOCK_N"]) * split
    (grid,) = [e.grid for e in events if getattr(e, "kernel", None) is conv2d_input_grad_tma_kernel]
    assert grid == (min(tiles * a * b, 2 * per_sm) if per_sm else tiles * a * b,)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layer", ["3x3", "stride 2"])
def test_against_float64(layer, dtype):
    """And the sums through the ReLU are of what is not yet rounded."""
    conv = LAYERS[layer]
    dy, w, x = operands(conv, dtype, values=randn)
    want, terms = reference(conv, dy, w), conv.terms["dx"]
    dx = run(conv, SMALL, dy, w)
    assert_close(dx, want, dtype=dtype, terms=terms, name="dx")
    dz, dbias = run_relu(conv, SMALL, dy, w, x)
    want = through_relu(want, x)
    assert_close(dz, want[0], dtype=dtype, terms=terms, name="dz")
    assert_close(dbias, want[1], dtype=dtype, terms=terms, name="dbias")
    again = run(conv, SMALL, dy, w), *run_relu(conv, SMALL, dy, w, x)  # the same bits twice
    assert all(map(torch.equal, again, (dx, dz, dbias)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("layer", ["3x3, 8 channels", "stride 2", "1x1, padding", "dilation 2"])
def test_nan_and_infinity_go_where_torch_has_them(layer, value):
    conv = LAYERS[layer]
    dy, w, x = operands(conv, torch.float16, values=randn)
    dy[0, 1, 1, 2] = value
    want = reference(conv, dy, w)
    assert 0 < want.isfinite().sum() < want.numel()
    with use_tile("conv2d_input_grad", SMALL):
        dx = conv2d_input_grad(dy, w, list(conv.x), *conv.lists)
    torch.testing.assert_close(dx.double(), want, equal_nan=True, atol=0.1, rtol=0.01)
    x[0, 2, -1, -1] = torch.nan  # of which one cannot say that it was cut off
    with use_tile("conv2d_input_grad_relu", SMALL):
        dz, dbias = conv2d_input_grad_relu(dy, w, x, *conv.lists)
    want = bias_activation_backward(dx, x, None, "relu")
    assert torch.equal(dz.nan_to_num(), want[0].nan_to_num())
    assert torch.equal(dbias.isfinite(), want[1].isfinite()) and not dbias.isfinite().all()
    assert torch.equal(dz[0, 2, -1, -1].nan_to_num(), dx[0, 2, -1, -1].nan_to_num())


@st.composite
def any_fast_conv(draw):
    """A convolution that the kernel can do: few pixels, for the interpreter."""
    sides = []
    for _ in range(2):
        taps, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        pad, dilation = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        least = max(1, dilation * (taps - 1) + 1 - 2 * pad)
        size = -(-draw(st.integers(least, least + 6)) // stride) * stride  # whole groups of rows
        sides.append((size, taps, stride, pad, dilation))
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    C = draw(st.sampled_from([64, 72] if stride[1] > 1 else [8, 24, 64, 72]))
    K = draw(st.sampled_from([8, 24, 64, 72]))
    conv = Conv((draw(st.integers(1, 3)), C, *size), K, taps, stride, padding, dilation)
    # without a stride and padding that is a matmul
    hypothesis.assume(taps != (1, 1) or stride != (1, 1) or padding != (0, 0))
    return conv


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    conv=any_fast_conv(), dtype=st.sampled_from(HALF), tile=st.sampled_from(FAST_TILES[2]),
    split=st.integers(1, 4), weight=st.sampled_from(["channels_last", "contiguous", "sliced"]),
)  # fmt: skip
def test_any_convolution(conv, dtype, tile, split, weight):
    dy, w, x = operands(conv, dtype, weight)
    want = reference(conv, dy, w)
    assert torch.equal(run(conv, tile | dict(SPLIT_K=split), dy, w), want.to(dtype))
    dz, dbias = run_relu(conv, tile, dy, w, x)
    want = through_relu(want, x)
    assert torch.equal(dz, want[0].to(dtype)) and torch.equal(dbias, want[1].to(dtype))


# --- which kernel ---------------------------------------------------------------------------------


def unaligned(x):
    """A copy that lies as `x` does, but one element further on."""
    buffer = x.new_empty(x.numel() + 8)
    return buffer.as_strided(x.shape, x.stride(), 1).copy_(x)


C33, S2 = Conv((2, 24, 8, 8), 32, (3, 3), 1, 1), Conv((2, 64, 8, 8), 32, (3, 3), 2, 1)
same = tuple
BORDERS = {
    # the convolution, what becomes of dy, weight and x, the kernels that a Hopper GPU takes, and
    # those through a ReLU; "" for the first ones and bias_activation_backward
    "3x3": (C33, same, "tma", "tma"),
    "fp16": (C33, lambda ts: [t.half() for t in ts], "tma", "tma"),
    "stride 2": (S2, same, "tma", "tma"),
    "filters of [K, C, R, S]": (
        C33, lambda ts: (ts[0], ts[1].contiguous(), ts[2]), "pack_filter tma", "pack_filter tma"
    ),
    "filters off by one element": (
        C33, lambda ts: (ts[0], unaligned(ts[1]), ts[2]), "pack_filter tma", "pack_filter tma"
    ),
    "dy off by one element": (C33, lambda ts: (unaligned(ts[0]), *ts[1:]), "pointer", ""),
    "dy of [N, K, P, Q]": (C33, lambda ts: (ts[0].contiguous(), *ts[1:]), "pointer", ""),
    "one dy for all": (
        C33, lambda ts: (ts[0][:1].expand(2, -1, -1, -1), *ts[1:]), "pointer", ""
    ),
    "x off by one element": (C33, lambda ts: (*ts[:2], unaligned(ts[2])), "tma", ""),
    "x of [N, C, H, W]": (C33, lambda ts: (*ts[:2], ts[2].contiguous()), "tma", ""),
    "float32 as IEEE has it": (C33, lambda ts: [t.float() for t in ts], "pointer", ""),
    "20 channels": (Conv((2, 20, 8, 8), 32, (3, 3)), same, "pointer", ""),
    "20 filters": (Conv((2, 24, 8, 8), 20, (3, 3)), same, "pointer", ""),
    "3 channels": (Conv((2, 3, 8, 8), 32, (3, 3)), same, "pack_filter tma unfold", ""),
    "3 channels, dilation 2": (Conv((2, 3, 8, 8), 32, (3, 3), 1, 0, 2), same, "pointer", ""),
    "2 groups": (Conv((2, 64, 8, 8), 64, (3, 3), groups=2), same, "pointer", ""),
    "an odd height at stride 2": (Conv((2, 64, 9, 8), 32, (3, 3), 2, 1), same, "pointer", ""),
    "an odd width at stride 2": (Conv((2, 64, 8, 9), 32, (3, 3), 2, 1), same, "pointer", ""),
    "56 channels at stride 2": (Conv((2, 56, 8, 8), 32, (3, 3), 2, 1), same, "pointer", ""),
    "56 channels at stride (2, 1)": (
        Conv((2, 56, 8, 8), 32, (3, 3), (2, 1), 1), same, "tma", "tma"
    ),
    "1x1": (Conv((2, 24, 8, 8), 32, (1, 1)), same, "matmul_tma", "tma"),
    "1x1, 20 filters": (Conv((2, 24, 8, 8), 20, (1, 1)), same, "matmul", ""),
    "1x1, padding": (Conv((2, 24, 8, 8), 32, (1, 1), padding=1), same, "tma", "tma"),
    "1x1, stride 2": (Conv((2, 64, 8, 8), 32, (1, 1), 2), same, "tma", "tma"),
    "1x1, dy of [N, K, P, Q]": (
        Conv((2, 24, 8, 8), 32, (1, 1)), lambda ts: (ts[0].contiguous(), *ts[1:]), "pointer", ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("conv, change, kernels, relu", BORDERS.values(), ids=BORDERS)
def test_what_tma_cannot_read_goes_through_pointers(conv, change, kernels, relu):
    dy, w, x = change(operands(conv, torch.bfloat16))
    plain = dy, w, list(conv.x), *conv.lists
    masked = dy, w, x, *conv.lists
    relu = f"{relu} sum_partials" if relu else f"{kernels} bias_activation_backward"
    assert launched(HOPPER, conv2d_input_grad, *plain) == kernels
    assert launched(HOPPER, conv2d_input_grad_relu, *masked) == relu
    assert "tma" not in launched(AMPERE, conv2d_input_grad, *plain)
    assert "tma" not in launched(AMPERE, conv2d_input_grad_relu, *masked)

    want = reference(conv, dy, w)
    dz, dbias = through_relu(want, x)
    assert min(t.count_nonzero() / t.numel() for t in (want, dz, dbias)) > 1 / 16
    can = ["tma"] * ("tma" in kernels.split()) + ["pointer"] * ("matmul" not in kernels)
    for kind, tile in [("tma", SMALL), ("pointer", TILES[0])]:
        with use_tile("conv2d_input_grad", tile):
            if kind in can:
                assert torch.equal(conv2d_input_grad(*plain), want.to(dy.dtype))
            elif can:
                with pytest.raises(ValueError, match="cannot take these operands"):
                    conv2d_input_grad(*plain)
    if not can:
        assert torch.equal(conv2d_input_grad(*plain), want.to(dy.dtype))
    for tile in (SMALL, TILES[0]):  # of which the second, or no choice, is the composition
        with use_tile("conv2d_input_grad_relu", tile):
            got = conv2d_input_grad_relu(*masked)
        assert torch.equal(got[0], dz.to(dy.dtype)) and got[0].stride() == x.stride()
        assert_close(got[1], dbias, dtype=dy.dtype, terms=1, name="dbias")


def test_no_images():
    conv = Conv((0, 24, 8, 8), 32, (3, 3))
    dy, w, x = operands(conv, torch.bfloat16)
    assert launched(HOPPER, conv2d_input_grad, dy, w, list(conv.x), *conv.lists) == ""
    dz, dbias = conv2d_input_grad_relu(dy, w, x, *conv.lists)
    assert dz.shape == conv.x and torch.equal(dbias, torch.zeros(24, dtype=torch.bfloat16))


def test_tf32_takes_it_for_multiples_of_four_channels(tf32):
    for C, K, kernels in [(20, 36, "pack_filter tma"), (18, 36, "pointer"), (20, 34, "pointer")]:
        conv = Conv((2, C, 8, 8), K, (3, 3))
        dy, w, _ = operands(conv, torch.float32)
        assert launched(HOPPER, conv2d_input_grad, dy, w, list(conv.x), *conv.lists) == kernels
    conv = Conv((2, 20, 8, 8), 36, (1, 1))  # a matmul would want its columns packed, too
    dy, w, _ = operands(conv, torch.float32)
    assert torch.equal(run(conv, FAST_TILES[4][1], dy, w), exact(conv).float())


@pytest.mark.parametrize("capability", [0, 80, 89])
def test_older_devices_have_the_portable_kernel_alone(capability):
    dy, w, x = operands(C33, torch.bfloat16)
    with _launch.record(Device(capability, sms=100)):
        with use_tile("conv2d_input_grad", SMALL), pytest.raises(ValueError, match="cannot take"):
            conv2d_input_grad(dy, w, list(C33.x), *C33.lists)


def test_a_relu_wants_whole_sums():
    dy, w, x = operands(C33, torch.bfloat16)
    with use_tile("conv2d_input_grad_relu", SMALL | dict(SPLIT_K=2)):
        with pytest.raises(ValueError, match="SPLIT_K=1, got"):
            conv2d_input_grad_relu(dy, w, x, *C33.lists)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_fake_of_the_relu_is_like_it(layout):
    dy, w, x = operands(C33, torch.float32)
    torch.library.opcheck(
        conv2d_input_grad_relu, (dy, w, laid_out(x, layout), *C33.lists),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# --- plans ----------------------------------------------------------------------------------------


def plan_of(conv, item=2, weight="channels_last"):
    dy, w = (torch.empty(s, device="meta") for s in (conv.y, conv.weight))
    dy, w = laid_out(dy, "channels_last"), laid_out(w, weight)
    *geometry, groups = conv.lists
    geometry = (tuple(pair) for pair in geometry)
    return make_plan(dy.shape, dy.stride(), w.shape, w.stride(), conv.x, *geometry, groups, item)


def test_plans():
    plan = plan_of(LAYERS["stride 2"])
    assert plan.size == (3, 6, 10, 72) and plan.taps == (3, 3)
    assert plan.x == ((3, 3, 5, 24), (360, 120, 24, 1))
    assert plan.w == ((9, 24, 72), (72, 648, 1)) and not plan.packed_w
    packed = plan_of(LAYERS["stride 2"], weight="contiguous")
    assert packed.w == ((9, 72, 24), (24, 216, 1)) and packed.packed_w
    assert plan_of(LAYERS["stride 2"], item=4).packed_w
    assert plan_of(Conv((LARGEST // 8, 64, 8, 8), 64, (3, 3))) is None


@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_classes_with_most_taps_come_first(stride, dilation):
    for taps in range(1, 8):
        reached = [sum((h - r * dilation) % stride == 0 for r in range(taps))
                   for h in range(stride)]  # fmt: skip
        assert _taps_of_classes(taps, stride, dilation) == sorted(reached, reverse=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("item", FAST_TILES)
@every_layer
def test_the_default_is_a_tile_that_can_do_it(layer, item, relu):
    tile = fast_tile(plan_of(LAYERS[layer], item), item, 132, relu)
    assert tile | dict(SPLIT_K=1) in FAST_TILES[item]
    large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128
    assert tile["SPLIT_K"] == 1 or not (relu or large)
    assert not (large and relu and item == 4)


def test_defaults_follow_the_shape():
    def default(*conv, sms=132, relu=False):
        return fast_tile(plan_of(Conv(*conv)), 2, sms, relu)

    large = default((64, 256, 56, 56), 256, (3, 3), 1, 1)
    assert (large["BLOCK_M"], large["BLOCK_N"], large["SPLIT_K"]) == (256, 128, 1)
    assert default((64, 64, 56, 56), 64, (3, 3), 1, 1)["BLOCK_N"] == 64
    assert default((64, 64, 56, 56), 32, (3, 3), 1, 1)["BLOCK_K"] == 32
    strided = default((256, 256, 28, 28), 256, (3, 3), 2, 1)
    assert (strided["BLOCK_M"], strided["BLOCK_N"]) == (256, 128)
    few = (1, 512, 7, 7), 512, (3, 3), 1, 1
    assert default(*few)["SPLIT_K"] > 1 and default(*few, relu=True)["SPLIT_K"] == 1
    assert default(*few, sms=1)["SPLIT_K"] == 1


# --- on a GPU -------------------------------------------------------------------------------------

REAL = {
    "3x3": Conv((64, 136, 56, 56), 128, (3, 3), 1, 1),
    "3x3, stride 2": Conv((64, 136, 56, 56), 256, (3, 3), 2, 1),
    "1x1, stride 2": Conv((64, 256, 56, 56), 512, (1, 1), 2),
    "14x14 pixels": Conv((65, 256, 14, 14), 264, (3, 3), 1, 1),
    "dilation 2": Conv((16, 128, 56, 56), 128, (3, 3), 1, 2, 2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
@pytest.mark.parametrize("dtype", HALF)
def test_every_fast_tile_at_real_size(tile, dtype, conv, device):
    """Every program takes several turns; the first and the last image against float64."""
    if "tma" not in _launch.device_of(torch.empty(1, device=DEVICE)).kernels:
        pytest.skip("this GPU has no tensor memory accelerator")
    dy, w, x = operands(conv, dtype, values=randn)
    small = tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128
    ends = Conv((2, *conv.x[1:]), conv.filters, conv.taps, *conv.args)
    want = reference(ends, torch.stack([dy[0], dy[-1]]), w)
    for split in (1, 3) if small else (1,):
        with use_tile("conv2d_input_grad", tile | dict(SPLIT_K=split)):
            first, second = (conv2d_input_grad(dy, w, list(conv.x), *conv.lists) for _ in range(2))
        assert torch.equal(first, second)
        got = torch.stack([first[0], first[-1]])
        assert_close(got, want, dtype=dtype, terms=conv.terms["dx"], name="dx")
    with use_tile("conv2d_input_grad_relu", tile):
        dz, dbias = conv2d_input_grad_relu(dy, w, x, *conv.lists)
    with use_tile("conv2d_input_grad", tile):
        dx = conv2d_input_grad(dy, w, list(conv.x), *conv.lists)
    assert torch.equal(dz, torch.where(x <= 0, 0.0, dx))
    assert_close(dbias, dz.double().sum((0, 2, 3)), dtype=dtype, terms=x.numel() // x.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("conv", REAL.values(), ids=REAL)
def test_defaults_at_real_size(conv, device):
    """What a call takes of itself, against the portable kernel: in integers, to the last bit."""
    dy, w, x = operands(conv, torch.bfloat16)
    with use_tile("conv2d_input_grad", TILES[4]):
        want = conv2d_input_grad(dy, w, list(conv.x), *conv.lists)
    assert torch.equal(conv2d_input_grad(dy, w, list(conv.x), *conv.lists), want) and want.any()
    dz, _ = conv2d_input_grad_relu(dy, w, x, *conv.lists)
    assert torch.equal(dz, torch.where(x <= 0, 0.0, want))
