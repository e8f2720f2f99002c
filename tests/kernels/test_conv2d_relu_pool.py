"""conv2d_relu_pool: which of four values wins, sums in parts, and the way that scatters."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.convolutions import every_dtype, integers
from tests.tools.inputs import (
    DEVICE,
    DTYPES,
    INTERPRET,
    LAYOUTS,
    double,
    gradients,
    laid_out,
    need_memory,
    randn,
)
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, bias_relu, conv2d, conv2d_relu_pool
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d_relu_pool import reference

gradient = importlib.import_module("tilelab.kernels.conv2d_relu_pool_grad")
WEIGHT_LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]  # [1] is KRSC
OPS = ["conv2d_relu_pool", "conv2d_relu_pool_input_grad", "conv2d_relu_pool_weight_grad"]
SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=2)


def make(shape, filters, taps, padding=0, dtype=torch.float32, *, x="contiguous",
         weight="contiguous", dy="contiguous", values=randn):  # fmt: skip
    """x, weight, bias and dy in these layouts."""
    w = (filters, shape[1], *taps)
    y = reference(torch.empty(shape, device="meta"), torch.empty(w, device="meta"), None, padding)
    return (
        laid_out(values(*shape, dtype=dtype), x),
        laid_out(values(*w, dtype=dtype, seed=1), weight),
        values(filters, dtype=dtype, seed=2).abs(),  # so that most windows live
        laid_out(values(*y.shape, dtype=dtype, seed=3), dy),
    )


def call(padding=0, fn=conv2d_relu_pool, bias=True):
    return lambda x, w, b=None: fn(x, w, b if bias else None, padding)


def check(shape, filters, taps, padding=0, dtype=torch.float32, *, bias=True, **layouts):
    """y, dx, dweight and dbias, in poison, against float64.

    The places of the maxima are those of float64, unless two values of a window are equal but for
    their rounding: with the seeds of these tests none are.
    """
    *inputs, dy = make(shape, filters, taps, padding, dtype, **layouts)
    inputs = inputs[: 3 if bias else 2]
    with poison() as p:
        y, grads = gradients(call(padding), [p(t) for t in inputs], p(dy))
    y64, grads64 = gradients(call(padding, reference), double(*inputs), double(dy))
    N, K, P, Q = y.shape
    R, S = taps
    teeth = "expanded" not in layouts.values()
    terms = dict(y=R * S * shape[1] + 1, dx=K * R * S, dw=N * P * Q, db=N * P * Q)
    for (name, n), got, want in zip(terms.items(), [y, *grads], [y64, *grads64], strict=False):
        assert_close(got, want, dtype=dtype, terms=n, name=name, teeth=teeth)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert grads[1].stride() == torch.empty_like(inputs[1]).stride()
    return y, grads


# --- shapes, each for a reason ------------------------------------------------------------------


@pytest.mark.parametrize("taps", [(1, 1), (2, 5), (5, 2), (3, 3)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 2), (1, 0)], ids="padding {}".format)
def test_every_pixel_meets_every_tap(padding, taps):
    """In integers, exactly: the patch of a window, the quads of dx and the shifts of dweight."""
    height = 6 + taps[0] % 2
    *inputs, dy = make((2, 2, height, 7), 3, taps, padding, values=integers)
    y, grads = gradients(call(padding), inputs, dy)
    y64, grads64 = gradients(call(padding, reference), double(*inputs), double(dy))
    for got, want in zip([y, *grads], [y64, *grads64], strict=True):
        assert torch.equal(got.double(), want) and want.any()


def test_an_int_means_the_same_as_a_pair():
    x, weight, bias, _ = make((2, 3, 7, 8), 5, (3, 3), 1)
    want = conv2d_relu_pool(x, weight, bias, 1)
    for padding in [(1, 1), [1, 1]]:
        assert torch.equal(conv2d_relu_pool(x, weight, bias, padding), want)
    assert torch.equal(conv2d_relu_pool(x=x, weight=weight, bias=bias, padding=1), want)


@pytest.mark.core
def test_it_is_the_three_kernels_it_is_made_of():
    """Exactly, in integers: convolution, bias and ReLU by our own kernels, then a maximum."""
    x, weight, bias, _ = make((2, 3, 9, 8), 5, (3, 3), 1, values=integers)
    z = bias_relu(conv2d(x, weight, padding=1), bias)
    want = z[:, :, :8, :8].reshape(2, 5, 4, 2, 4, 2).amax((3, 5))
    assert torch.equal(conv2d_relu_pool(x, weight, bias, 1), want)


# --- nothing to do ------------------------------------------------------------------------------


def test_no_channels_are_a_sum_of_nothing():
    bias, dy = integers(3, seed=1), integers(2, 3, 1, 2)
    with poison():
        y, (dx, dweight, dbias) = gradients(
            conv2d_relu_pool, [randn(2, 0, 4, 5), randn(3, 0, 2, 2), bias], dy
        )
    assert torch.equal(y, bias.relu().view(1, 3, 1, 1).expand(2, 3, 1, 2))
    assert dx.shape == (2, 0, 4, 5) and dweight.shape == (3, 0, 2, 2)
    assert torch.equal(dbias, torch.where(bias > 0, dy.sum((0, 2, 3)), 0))


# --- which of the four --------------------------------------------------------------------------


def window(*values, dtype=torch.float32):
    """One window of four values, a filter of one tap, a bias of 0."""
    x = torch.tensor(values, dtype=dtype, device=DEVICE).view(1, 1, 2, 2)
    return [x, torch.ones(1, 1, 1, 1, dtype=dtype, device=DEVICE), x.new_zeros(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "values, place",
    [
        ((4, 3, 2, 1), 0),
        ((3, 4, 2, 1), 1),
        ((3, 2, 4, 1), 2),
        ((3, 2, 1, 4), 3),
        ((1, 1, 1, 1), 0),
        ((0, 1, 1, 1), 1),
        ((0, 0, 1, 1), 2),
        ((2, 1, 2, 2), 0),
        ((1, 2, 1, 2), 1),
        ((1, 2, 2, 1), 1),
        ((-1, -2, -3, 1), 3),
        ((0, 0, 0, 0), None),
        ((-1, -2, -3, -4), None),
        ((-1, 0, -1, 0), None),
        ((-0.0, -1, -0.0, 0.0), None),
    ],
    ids=str,
)
def test_the_gradient_goes_to_the_first_of_the_largest_if_it_is_positive(values, place, dtype):
    """As in torch: of several that are equal, the first; at exactly 0, ReLU passes nothing on."""
    inputs = window(*values, dtype=dtype)
    dy = torch.full((1, 1, 1, 1), 5.0, dtype=dtype, device=DEVICE)
    y, (dx, dweight, dbias) = gradients(conv2d_relu_pool, inputs, dy)
    y64, grads64 = gradients(reference, double(*inputs), double(dy))
    want = [5.0 * (i == place) for i in range(4)]
    assert dx.flatten().tolist() == grads64[0].flatten().tolist() == want
    assert y.item() == y64.item() == max(0, *values)
    assert dweight.item() == grads64[1].item() == (0 if place is None else 5 * values[place])
    assert dbias.item() == grads64[2].item() == (0 if place is None else 5)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_of_whole_windows(dtype):
    """Few different integers: most windows have a tie, and many have their maximum at 0."""
    *inputs, dy = make((3, 2, 9, 8), 5, (3, 2), 1, dtype)
    inputs = [integers(*t.shape, dtype=dtype, seed=i, low=-1, high=1) for i, t in enumerate(inputs)]
    dy = integers(*dy.shape, dtype=dtype, seed=5)
    z = torch.nn.functional.conv2d(*double(*inputs), padding=1)[..., :8, :8]
    z = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    ties = (z == z.amax(4, keepdim=True)).sum(4) > 1
    assert ties.double().mean() > 0.2 and (z.amax(4) == 0).any() and (z.amax(4) < 0).any()
    y, grads = gradients(call(1), inputs, dy)
    y64, grads64 = gradients(call(1, reference), double(*inputs), double(dy))
    for got, want in zip([y, *grads], [y64, *grads64], strict=True):
        assert torch.equal(got.double(), want)


@every_dtype
def test_dead_windows_have_exactly_no_gradient(dtype):
    """All of them negative: y, and every gradient, is 0, whatever dy is."""
    *inputs, dy = make((2, 3, 7, 8), 5, (3, 3), 1, dtype)
    inputs[2].fill_(-1000)
    dy.flatten()[::3] = torch.inf  # a dead output passes no infinity on, as in torch
    with poison() as p:
        y, grads = gradients(call(1), [p(t) for t in inputs], p(dy))
    for t in (y, *grads):
        assert not t.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_zero_exactly_where_it_is_in_float64(dtype):
    *inputs, dy = make((3, 2, 9, 10), 3, (2, 2), 0, dtype)
    inputs[2] -= 3  # half of the windows are dead
    y, (dx, _, _) = gradients(conv2d_relu_pool, inputs, dy)
    y64, (dx64, _, _) = gradients(reference, double(*inputs), double(dy))
    assert torch.equal(y == 0, y64 == 0) and 0.2 < (y == 0).double().mean() < 0.8
    assert torch.equal(dx == 0, dx64 == 0) and 0.2 < (dx == 0).double().mean() < 0.8


def test_the_place_is_found_before_rounding():
    """Outputs that are equal once rounded to 16 bits are not tied: the larger gets the gradient."""
    x, _, bias = window(1.0, 1.0, 1.0, 1.0, dtype=torch.bfloat16)
    x = torch.cat([x, x.new_tensor([0.0, 0.0, 2**-7, 0.0]).view(1, 1, 2, 2)], dim=1)
    weight = x.new_tensor([1.0, 0.25]).view(1, 2, 1, 1)  # 1 + 2^-9 is 1 in bfloat16
    y, (dx, _, _) = gradients(
        conv2d_relu_pool, [x, weight, bias], torch.ones_like(x[:, :1, :1, :1])
    )
    assert y.item() == 1
    assert dx[0, 0].flatten().tolist() == [0, 0, 1, 0]


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_accumulation(dtype):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    x = torch.ones(1, 1024, 3, 3, dtype=dtype, device=DEVICE)
    y, (_, dweight) = gradients(
        conv2d_relu_pool, [x, torch.ones_like(x[:, :, :2, :2])], torch.ones_like(x[:, :1, :1, :1])
    )
    assert y.item() == 4096 and dweight.eq(1).all()
    x = torch.ones(1, 1, 128, 128, dtype=dtype, device=DEVICE)
    one = torch.ones_like(x[:, :, :1, :1])
    _, (_, dweight, dbias) = gradients(
        conv2d_relu_pool, [x, one, one.flatten()], torch.ones_like(x[:, :, :64, :64])
    )
    assert dweight.item() == dbias.item() == 4096


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_within_the_windows_whose_patch_has_them(value):
    """As the docstring says: all four outputs of a window see all pixels of its patch.

    So a NaN is where torch has it. An infinity is what torch has there, or NaN.
    """
    dtype = torch.float16 if value < 0 else torch.float32
    x, weight, bias, _ = make((3, 17, 9, 8), 18, (3, 2), 1, dtype)
    x[0, 0, 0, 0], x[-1, -1, 4, 5] = value, value
    y = conv2d_relu_pool(x, weight, bias, 1)
    touched = reference(*double(torch.where(x.isfinite(), x, torch.nan), weight, bias), 1).isnan()
    y64 = reference(*double(x, weight, bias), 1)
    assert 0 < touched.sum() < y64.numel() / 4
    assert_close(y, torch.where(touched & y.isnan(), torch.nan, y64), dtype=dtype, terms=103)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["bias", "dy"])
def test_nan_and_infinity_of_the_bias_and_of_dy(where, value):
    dtype = torch.float16 if value < 0 else torch.float32
    *inputs, dy = make((2, 17, 9, 8), 18, (3, 2), 1, dtype)
    if where == "bias":
        inputs[2][3] = value
    else:
        dy[0, 0, 0, 0], dy[-1, -1, 2, 3] = value, value
    y, (dx, dweight, dbias) = gradients(call(1), inputs, dy)
    y64, (dx64, dweight64, dbias64) = gradients(call(1, reference), double(*inputs), double(dy))
    assert_close(y, y64, dtype=dtype, terms=103, name="y")
    terms = 2 * 4 * 4
    if where == "dy":
        assert_close(dweight, dweight64, dtype=dtype, terms=terms, name="dweight")
        touched = torch.zeros(2, 1, 9, 8, dtype=torch.bool, device=DEVICE)
        touched[0, :, :3, :3] = touched[-1, :, 3:7, 5:] = True  # the quads of their patches
        assert not dx64[~touched.expand_as(dx64)].isnan().any()
        dx64 = torch.where(touched & dx.isnan(), torch.nan, dx64)
        assert_close(dx, dx64, dtype=dtype, terms=108, name="dx")
    assert_close(dbias, dbias64, dtype=dtype, terms=terms, name="dbias")


# --- gradients asked for one by one -------------------------------------------------------------


def test_two_blocks_in_a_row():
    """As in the demo network: the second block's dx is the first one's dy."""
    x, w1, b1, _ = make((2, 1, 14, 14), 4, (3, 3))
    _, w2, b2, dy = make((2, 4, 6, 6), 5, (3, 3))

    def two(fn):
        return lambda x, w1, b1, w2, b2: fn(fn(x, w1, b1), w2, b2)

    inputs = [x, w1, b1, w2, b2]
    y, grads = gradients(two(conv2d_relu_pool), inputs, dy)
    y64, grads64 = gradients(two(reference), double(*inputs), double(dy))
    assert_close(y, y64, dtype=torch.float32, terms=37, roundings=2)
    for name, got, want in zip(["dx", "dw1", "db1", "dw2", "db2"], grads, grads64, strict=True):
        teeth = name != "dw2"  # few windows live
        assert_close(got, want, dtype=torch.float32, terms=72, roundings=4, name=name, teeth=teeth)


# --- tiles and split sums -----------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 5, 6], ids="{} parts".format)
def test_split_sum(parts, monkeypatch):
    """96 windows in 6 steps of 16: equal parts, a shorter last one, one step each."""
    dtype = DTYPES[parts % 3]
    monkeypatch.setattr(gradient, "part_count", lambda programs, steps: parts)
    with use_tile(OPS[2], {**SMALL, "BLOCK_N": 64}):
        check((2, 3, 14, 18), 5, (3, 3), 0, dtype)


@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("taps", [(1, 1), (2, 5), (3, 3)], ids="{0[0]}x{0[1]}".format)
def test_partial_results_lie_as_the_weight_does(taps, weight, monkeypatch):
    """Each part holds four sums, shifted against each other: in any layout of the weight."""
    monkeypatch.setattr(gradient, "part_count", lambda programs, steps: 2)
    with use_tile(OPS[2], {**SMALL, "BLOCK_N": 64}):
        check((2, 3, 9, 10), 5, taps, 0, weight=weight)


@every_dtype
def test_the_same_bits_twice(dtype, monkeypatch):
    """In parts, which the interpreter has none of by itself."""
    monkeypatch.setattr(gradient, "part_count", lambda programs, steps: 3)
    *inputs, dy = make((2, 3, 14, 18), 5, (3, 3), 1, dtype)
    with use_tile(OPS[2], {**SMALL, "BLOCK_N": 64}):
        first, second = (gradients(call(1), inputs, dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(g, h) for g, h in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("taps", [(1, 1), (2, 5), (3, 3)], ids="{0[0]}x{0[1]}".format)
def test_many_small_tiles(taps):
    with use_tile(OPS[0], SMALL), use_tile(OPS[1], SMALL), use_tile(OPS[2], SMALL):
        check((2, 3, 8, 11), 18, taps, 1)


# --- the other way back: dy scattered, and the convolution's own gradients ----------------------

UNPOOL = dict(kernel="unpool", BLOCK_M=16, BLOCK_N=16, num_warps=4)
H100 = _launch.Device(90, sms=132)


SCATTERED = {  # x, filters, taps, padding
    "one window": ((1, 1, 4, 4), 1, (3, 3), 0),
    "one window a batch": ((19, 2, 4, 4), 3, (3, 3), 0),
    "17 filters, 17 channels": ((1, 17, 6, 8), 17, (3, 3), 1),
    "130 filters": ((1, 3, 6, 4), 130, (2, 2), 0),
    "1x1": ((2, 5, 6, 8), 7, (1, 1), 0),
    "5x2": ((2, 3, 9, 7), 4, (5, 2), 0),
    "both are dropped, padding 1": ((2, 3, 7, 9), 5, (3, 3), 1),
    "padding 3 of 2x2: windows of padding alone": ((1, 3, 4, 5), 5, (2, 2), 3),
}


@pytest.mark.core
@pytest.mark.parametrize("shape, filters, taps, padding", SCATTERED.values(), ids=SCATTERED)
def test_scattered(shape, filters, taps, padding):
    with use_tile("unpool", UNPOOL):
        check(shape, filters, taps, padding, torch.bfloat16 if padding else torch.float32)


@pytest.mark.parametrize(
    "size, dtype",
    list(zip([(6, 8), (7, 8), (6, 9), (7, 9)], [*DTYPES, torch.float32], strict=True)),
)
def test_each_element_is_scattered_to_its_place_once(size, dtype):
    """Exactly; in poison, where what is not written is NaN. Of an odd size the last is zero."""
    (P, Q), (N, K) = size, (3, 19)
    dy = randn(N, K, P // 2, Q // 2, dtype=dtype)
    place = torch.randint(5, dy.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    window = torch.nn.functional.one_hot(place, 5)[..., :4] * double(dy)[..., None]
    want = torch.zeros(N, K, P, Q, dtype=torch.float64, device=DEVICE)
    for i in range(4):
        want[:, :, i // 2 : P // 2 * 2 : 2, i % 2 : Q // 2 * 2 : 2] = window[..., i]
    place = laid_out(place.to(torch.uint8), "channels_last")
    with poison() as p:
        dz, db = gradient._unpool(p(dy), p(place), size, True, UNPOOL)
    assert torch.equal(dz.double(), want)
    assert dz.is_contiguous(memory_format=torch.channels_last)
    assert_close(db, want.sum((0, 2, 3)), dtype=dtype, terms=N * P * Q // 4)


@pytest.mark.parametrize("programs", [1, 2, 3, 1024])
def test_the_scatter_in_chunks(programs, monkeypatch):
    """80 windows, in 5 tiles of 16: in chunks of 5, 3, 2 and 1."""
    monkeypatch.setattr(gradient, "PROGRAMS", programs)
    with use_tile("unpool", UNPOOL):
        check((2, 3, 12, 17), 5, (3, 3), 0)


@pytest.mark.parametrize("dy", LAYOUTS)
def test_layouts_of_what_is_scattered(dy, monkeypatch):
    """And with windows counted in 64 bits."""
    monkeypatch.setattr(gradient, "MOST_INT32", 0)
    with use_tile("unpool", UNPOOL):
        check((2, 3, 7, 8), 5, (2, 3), 1, dy=dy)


@every_dtype
def test_dead_windows_scatter_nothing(dtype):
    """Not even an infinity, and both ways give the same bits twice."""
    *inputs, dy = make((2, 3, 7, 8), 5, (3, 3), 1, dtype)
    inputs[2].fill_(-1000)
    dy.flatten()[::3] = torch.inf
    with use_tile("unpool", UNPOOL):
        results = [gradients(call(1), inputs, dy)[1] for _ in range(2)]
        for first, second in zip(*results, strict=True):
            assert not first.any() and torch.equal(first, second)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "x bias", "weight bias"])
def test_only_the_gradients_that_are_wanted_of_a_scatter(wanted):
    *inputs, dy = make((2, 3, 7, 8), 5, (3, 3), 1, values=integers)
    _, want = gradients(call(1, reference), double(*inputs), double(dy))
    names = ["x", "weight", "bias"]
    leaves = [t.requires_grad_(n in wanted.split()) for n, t in zip(names, inputs, strict=True)]
    with use_tile("unpool", UNPOOL):
        conv2d_relu_pool(*leaves, padding=1).backward(dy)
    for name, leaf, gradient64 in zip(names, leaves, want, strict=True):
        assert (leaf.grad is not None) == (name in wanted.split())
        assert leaf.grad is None or torch.equal(leaf.grad.double(), gradient64)


def launched(C, K, wanted, device=H100, dtype=torch.bfloat16):
    """The kernels of the backward of a layer, in order."""
    x, weight, bias = (
        torch.empty(size, dtype=dtype).requires_grad_(name in wanted.split())
        for name, size in dict(x=(8, C, 32, 32), weight=(K, C, 3, 3), bias=(K,)).items()
    )
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    with _launch.record(device):
        y = conv2d_relu_pool(x, weight, bias, 1)
    with _launch.record(device) as events:
        y.backward(torch.empty_like(y))
    kernels = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    return [name.removeprefix("conv2d_").removesuffix("_kernel") for name in kernels]


@pytest.mark.skipif(not INTERPRET, reason="records on CPU tensors")
def test_wide_layers_scatter_and_the_demo_does_not():
    """And a tile forces either way."""
    fused = ["relu_pool_input_grad", "relu_pool_weight_grad", "sum_partials"]
    for C, K in [(1, 16), (16, 32), (16, 512), (512, 16)]:
        assert launched(C, K, "x weight bias") == fused
    for C, K in [(32, 32), (64, 64), (512, 512)]:
        for device in (H100, _launch.Device(80, sms=108)):
            names = launched(C, K, "x weight bias", device)
            assert names[:2] == ["unpool", "sum_partials"] and not set(names) & set(fused[:2])
    assert "sum_partials" not in launched(64, 64, "x")
    assert launched(1, 16, "bias") == ["unpool", "sum_partials"]
    with use_tile("unpool", gradient.FUSED):
        assert launched(64, 64, "x weight bias") == fused
    with use_tile("unpool", UNPOOL):
        assert launched(1, 16, "x weight")[0] == "unpool"


@pytest.mark.parametrize("scatter", [True, False], ids=["scattered", "fused"])
def test_the_gradient_before_a_relu(scatter):
    """With `relu`, x is a ReLU's output: its zeros let nothing through, and columns are summed."""
    x, weight, bias, dy = make((2, 18, 8, 6), 5, (3, 3), 1, values=integers)
    x = laid_out(x.relu(), "channels_last")
    place = torch.ops.tilelab.conv2d_relu_pool(x, weight, bias, [1, 1])[1]
    args = dy, place, x, weight, list(x.shape), [1, 1], [True, True, True]
    with use_tile("unpool", UNPOOL if scatter else gradient.FUSED):
        dx, *_, none = gradient.conv2d_relu_pool_backward(*args, False)
        dz, *_, dbefore = gradient.conv2d_relu_pool_backward(*args, True)
    assert none.numel() == 0 and (x == 0).any() and dx[x == 0].any()
    assert torch.equal(dz, torch.where(x > 0, dx, 0.0))
    assert torch.equal(dbefore, dz.sum((0, 2, 3)))


# --- anything else ------------------------------------------------------------------------------


@st.composite
def blocks(draw):
    """Any x, filters, taps and padding that give one window at least."""
    taps = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    padding = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    size = [
        draw(st.integers(least, least + 9))
        for least in (max(1, r + 1 - 2 * pad) for r, pad in zip(taps, padding, strict=True))
    ]
    C, K = (draw(st.sampled_from([1, 2, 3, 16, 17, 20])) for _ in "ck")
    return (draw(st.integers(1, 3)), C, *size), K, taps, padding


@hypothesis.given(
    block=blocks(), dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS),
    weight=st.sampled_from(WEIGHT_LAYOUTS), dy=st.sampled_from(LAYOUTS), bias=st.booleans(),
)  # fmt: skip
def test_any_block(block, dtype, x, weight, dy, bias):
    """In small integers: exact but for the rounding of the results, ties included."""
    *inputs, grad = make(*block, dtype, x=x, weight=weight, dy=dy, values=integers)
    inputs = inputs[: 3 if bias else 2]
    padding = block[3]
    with poison() as p:
        y, grads = gradients(call(padding), [p(t) for t in inputs], p(grad))
    y64, grads64 = gradients(call(padding, reference), double(*inputs), double(grad))
    for got, want in zip([y, *grads], [y64, *grads64], strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
def test_tf32_follows_torchs_switch():
    *inputs, dy = make((8, 16, 28, 28), 32, (3, 3), 1)
    y64 = reference(*double(*inputs), 1)
    close = dict(dtype=torch.float32, terms=145)
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # and matmul's is off
    y = conv2d_relu_pool(*inputs, 1)
    assert_close(y, y64, tf32=True, **close)
    with pytest.raises(AssertionError, match="error"):
        assert_close(y, y64, **close)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, filters, padding",
    [((9, 1, 8192, 8192), 64, 1), ((9, 64, 2048, 2048), 4, 0)],
    ids=["y", "x"],
)
def test_offsets_past_2_to_the_31(shape, filters, padding):
    """Only the last rows of dy are not zero: y, dx and dweight of the last image, at its end."""
    need_memory(60)
    dtype = torch.float16
    x = torch.empty(shape, device="cuda", dtype=dtype, memory_format=torch.channels_last)
    x.random_(-2, 3)
    weight = integers(filters, shape[1], 3, 3, dtype=dtype, seed=1)
    rows = 64  # of windows at the end, and the pixels that they read
    y = call(padding)(x, weight)
    assert max(x.numel(), y.numel()) > 2**31
    dy = torch.zeros_like(y)
    del y
    dy[-1, :, -rows:] = integers(*dy[-1, :, -rows:].shape, dtype=dtype, seed=2)
    y, (dx, dweight) = gradients(call(padding), [x, weight], dy)

    first = 2 * (dy.shape[2] - rows) - padding
    pixels = torch.nn.functional.pad(x[-1:, :, first:], (padding, padding, 0, padding))
    y64, (dx64, dweight64) = gradients(
        reference, double(pixels, weight), double(dy[-1:, :, -rows:])
    )
    assert torch.equal(y[-1:, :, -rows:], y64.to(dtype))
    assert torch.equal(dweight, dweight64.to(dtype))
    dx64 = dx64[:, :, : shape[2] - first, padding : padding + shape[3]]
    assert torch.equal(dx[-1:, :, first:], dx64.to(dtype))
    assert not dx[:-1].any() and not dx[-1, :, :first].any()
