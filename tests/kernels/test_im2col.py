"""im2col, its transpose col2im, and the convolution that is made of them and a matmul."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import col2im, conv2d, conv2d_im2col, im2col
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d import reference as conv2d_reference
from tilelab.kernels.im2col import TILES, reference

from tests.tools.convolutions import (
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
from tests.tools.inputs import (
    DEVICE,
    DTYPES,
    INTERPRET,
    LAYOUTS,
    double,
    gradients,
    laid_out,
    randn,
)
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.im2col")
SMALL = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4)


def columns_of(conv):
    """The shape [N*P*Q, C*R*S]."""
    N, _, P, Q = conv.y
    return N * P * Q, conv.x[1] * conv.taps[0] * conv.taps[1]


def unfolded(conv, x):
    """What im2col should return, for any dtype."""
    return reference(x, conv.taps, *conv.args)


def folded(conv, columns):
    """What col2im should return, in float64: the gradient of `unfolded`."""
    x = torch.zeros(conv.x, dtype=torch.float64, device=columns.device).requires_grad_()
    return torch.autograd.grad(unfolded(conv, x), x, double(columns))[0]


def check_im2col(conv, dtype, layout="contiguous"):
    """A copy: exact."""
    x = laid_out(randn(*conv.x, dtype=dtype), layout)
    with poison() as p:
        got = im2col(p(x), conv.taps, *conv.args)
    want = unfolded(conv, x)
    assert got.dtype == dtype and got.shape == columns_of(conv) and got.is_contiguous()
    assert torch.equal(got, want)
    assert want.any()


def check_col2im(conv, dtype, layout="contiguous"):
    """A sum, rounded once."""
    columns = randn(*columns_of(conv), dtype=dtype, layout=layout)
    with poison() as p:
        got = col2im(p(columns), conv.x, conv.taps, *conv.args)
    want = folded(conv, columns)
    terms = conv.taps[0] * conv.taps[1]
    teeth = layout != "expanded"  # equal windows
    assert_close(got, want, dtype=dtype, terms=terms, name="col2im", teeth=teeth)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert not got[want == 0].any()  # pixels that were never copied


# --- geometry, each for a reason ----------------------------------------------------------------


@every_conv
@pytest.mark.parametrize("dtype", DTYPES)
def test_im2col_of_geometry(conv, dtype):
    check_im2col(conv, dtype)


@every_conv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_col2im_of_geometry(conv, dtype):
    check_col2im(conv, dtype)


@every_conv
def test_col2im_is_the_transpose_of_im2col(conv):
    """<im2col(x), c> = <x, col2im(c)> for all x and c: exactly, in integers."""
    x, c = integers(*conv.x), integers(*columns_of(conv), seed=1)
    copied = im2col(x, conv.taps, *conv.args)
    summed = col2im(c, conv.x, conv.taps, *conv.args)
    assert (double(copied) * double(c)).sum() == (double(x) * double(summed)).sum()


@pytest.mark.core
def test_the_picture_in_the_docstring():
    x = torch.arange(9.0, device=DEVICE).view(1, 1, 3, 3)
    columns = im2col(x, 2)
    assert columns.tolist() == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    times = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], device=DEVICE)
    assert torch.equal(col2im(columns, (1, 1, 3, 3), 2)[0, 0], x[0, 0] * times)


@pytest.mark.core
def test_the_columns_are_ordered_group_row_column_channel():
    """Against torch's unfold, whose order is (channel, row, column), element by element."""
    N, C, H, W, R, S, G = 2, 6, 5, 4, 3, 2, 2
    x = randn(N, C, H, W)
    columns = im2col(x, (R, S), groups=G)
    want = torch.nn.functional.unfold(x, (R, S))  # [N, C*R*S, P*Q]
    P, Q = H - R + 1, W - S + 1
    for n, pq, c, r, s in [(0, 0, 0, 0, 0), (1, 4, 1, 2, 1), (0, 8, 3, 0, 1), (1, 8, 5, 2, 0)]:
        column = ((c // 3 * R + r) * S + s) * 3 + c % 3
        assert columns[n * P * Q + pq, column] == want[n, (c * R + r) * S + s, pq]


def test_one_group_and_many_hold_the_same_columns():
    x = randn(2, 6, 5, 4)
    together = im2col(x, (3, 2)).view(18, 6, 6)  # [NPQ, RS, C]
    for G in (2, 3, 6):
        apart = im2col(x, (3, 2), groups=G).view(18, G, 6, 6 // G)
        assert torch.equal(apart.transpose(1, 2).reshape(18, 6, 6), together)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_an_int_means_the_same_as_a_pair(taps):
    x = randn(2, 3, 9, 8)
    for args in [(2, 1, 1), (1, 2, 2), (3, 0, 2)]:
        pairs = [(taps, taps), *((v, v) for v in args)]
        columns = im2col(x, taps, *args)
        assert torch.equal(columns, im2col(x, *pairs))
        want = col2im(columns, x.shape, taps, *args)
        assert torch.equal(want, col2im(columns, list(x.shape), *pairs))


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    check_im2col(GROUPED, dtype, layout)
    check_col2im(GROUPED, dtype, layout)


# --- gradients ----------------------------------------------------------------------------------


@few_and_many
@every_dtype
def test_each_is_the_gradient_of_the_other(dtype, conv):
    x, dc = randn(*conv.x, dtype=dtype), randn(*columns_of(conv), dtype=dtype, seed=1)
    _, (dx,) = gradients(lambda t: im2col(t, conv.taps, *conv.args), [x], dc)
    terms = conv.taps[0] * conv.taps[1]
    assert_close(dx, folded(conv, dc), dtype=dtype, terms=terms, name="dx")
    _, (dcolumns,) = gradients(lambda t: col2im(t, conv.x, conv.taps, *conv.args), [dc], x)
    assert torch.equal(dcolumns, unfolded(conv, x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_output_gradients(layout):
    x, dc = randn(*MANY.x, layout=layout), randn(*columns_of(MANY), layout=layout, seed=1)
    _, (dx,) = gradients(lambda t: im2col(t, MANY.taps, *MANY.args), [x], dc)
    teeth = layout != "expanded"
    assert_close(dx, folded(MANY, dc), dtype=torch.float32, terms=6, teeth=teeth)
    _, (dcolumns,) = gradients(lambda t: col2im(t, MANY.x, MANY.taps, *MANY.args), [dc], x)
    assert torch.equal(dcolumns, unfolded(MANY, x))


def test_gradients_of_gradients():
    """Both are linear, so they can be differentiated as often as one likes."""
    x = integers(*FEW.x).requires_grad_()
    dc = integers(*columns_of(FEW), seed=1).requires_grad_()
    (dx,) = torch.autograd.grad(im2col(x, FEW.taps, *FEW.args), x, dc, create_graph=True)
    v = integers(*FEW.x, seed=2)
    (ddc,) = torch.autograd.grad(dx, dc, v)
    assert torch.equal(ddc, unfolded(FEW, v))


# --- nothing to do ------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4)], ids=["batch", "channels"])
def test_empty(shape):
    conv = Conv(shape, 1, (3, 2))
    columns = im2col(randn(*shape), conv.taps)
    assert columns.shape == (columns_of(conv) if shape[0] == 0 else (2 * 3 * 3, 0))
    assert torch.equal(col2im(columns, shape, conv.taps), randn(*shape))


@pytest.mark.core
def test_convolution_of_an_empty_batch_as_in_torch():
    conv = Conv((0, 5, 6, 7), 4, (3, 2), 2, 1)
    inputs, dy = [*conv.inputs(torch.float32), randn(4, seed=2)], conv.dy(torch.float32)
    y, grads = gradients(lambda *t: conv2d_im2col(*t, *conv.args), inputs, dy)
    want, want_grads = gradients(lambda *t: conv2d_reference(*t, *conv.args), inputs, dy)
    for got, expected in zip([y, *grads], [want, *want_grads], strict=True):
        assert torch.equal(got, expected)


# --- the convolution ----------------------------------------------------------------------------


def check_conv(conv, dtype, *, x="contiguous", weight="contiguous", dy="contiguous", bias=True,
               activation=None):  # fmt: skip
    """y and all gradients, against float64 and against conv2d."""
    inputs = conv.inputs(dtype, x, weight)
    if bias:
        inputs.append(randn(conv.filters, dtype=dtype, seed=2))
    grad = conv.dy(dtype, dy)

    def call(fn):
        return lambda x, w, b=None: fn(x, w, b, *conv.args, activation)

    with poison() as p:
        y, grads = gradients(call(conv2d_im2col), [p(t) for t in inputs], p(grad))
    y64, grads64 = gradients(call(conv2d_reference), double(*inputs), double(grad))
    teeth = "expanded" not in (x, weight, dy)
    close = dict(dtype=dtype, teeth=teeth)
    assert_close(y, y64, terms=conv.terms["y"], name="y", **close)
    assert_close(y, double(call(conv2d)(*inputs)), terms=conv.terms["y"], roundings=2, **close)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name, got, want in zip(["dx", "dw", "db"], grads, grads64, strict=False):
        # the columns of dx are rounded before they are summed
        roundings = 2 if name == "dx" else 1
        assert_close(got, want, terms=conv.terms[name], name=name, roundings=roundings, **close)


@every_conv
def test_convolution_of_geometry(conv):
    check_conv(conv, torch.float32, bias=False)


@few_and_many
@every_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_convolution_epilogue(activation, bias, dtype, conv):
    check_conv(conv, dtype, bias=bias, activation=activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "dy"])
def test_convolution_of_layouts(which, layout):
    check_conv(MANY, torch.float32, **{which: layout}, activation="relu")


@every_conv
def test_the_two_convolutions_are_equal(conv):
    """In integers, bit for bit."""
    x, weight = conv.inputs(torch.float32, values=integers)
    bias = integers(conv.filters, seed=2)
    y = conv2d_im2col(x, weight, bias, *conv.args, "relu")
    assert torch.equal(y, conv2d(x, weight, bias, *conv.args, "relu")) and y.any()


@pytest.mark.core
@few_and_many
def test_the_gradients_of_the_two_convolutions_are_equal(conv):
    """In integers, bit for bit."""
    inputs = [*conv.inputs(torch.float32, values=integers), integers(conv.filters, seed=2)]
    dy = conv.dy(torch.float32, values=integers)
    results = []
    for fn in (conv2d, conv2d_im2col):
        results.append(gradients(lambda *t, fn=fn: fn(*t, *conv.args, "relu"), inputs, dy))
    (_, grads), (_, other_grads) = results
    for got, want in zip(grads, other_grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "weight bias"])
def test_only_the_gradients_that_are_wanted(wanted):
    x, weight = MANY.inputs(torch.float32)
    inputs = dict(x=x, weight=weight, bias=randn(MANY.filters, seed=2))
    leaves = {k: v.requires_grad_(k in wanted.split()) for k, v in inputs.items()}
    conv2d_im2col(*leaves.values(), *MANY.args).sum().backward()
    assert {k for k, v in leaves.items() if v.grad is not None} == set(wanted.split())


# --- values -------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_where_they_are_copied_to(value, dtype):
    conv = GROUPED
    x, columns = randn(*conv.x, dtype=dtype), randn(*columns_of(conv), dtype=dtype, seed=1)
    x[0, 0, 0, 0], x[-1, -1, 3, 4] = value, value
    columns[0, 0], columns[-1, -1], columns[7, 100] = value, value, value
    got = im2col(x, conv.taps, *conv.args)
    want = unfolded(conv, torch.where(x.isfinite(), 0.0, 1.0))  # torch copies by 0 * NaN
    assert torch.equal(got.isfinite(), want == 0)
    summed, want = col2im(columns, conv.x, conv.taps, *conv.args), folded(conv, columns)
    assert 0 < want.isfinite().sum() < want.numel()
    assert_close(summed, want, dtype=dtype, terms=6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_im2col_copies_every_bit(dtype):
    """The largest and smallest values, -0 and subnormals."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 4, 1 + info.eps, 1.0]
    x = torch.tensor(values, dtype=dtype, device=DEVICE).view(1, 1, 2, 4)
    columns = im2col(x, 1).view(1, 1, 2, 4)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(columns.view(bits), x.view(bits))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_col2im_sums_in_float32(dtype):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    large = 2 / torch.finfo(dtype).eps
    columns = torch.ones(21, 21, dtype=dtype, device=DEVICE)
    columns[20, 0] = large  # the first of the 21 that pixel 20 was copied to
    assert col2im(columns, (1, 1, 1, 41), (1, 21))[0, 0, 0, 20] == large + 20


# --- tiles --------------------------------------------------------------------------------------


def tile_id(tile):
    return f"{tile['BLOCK_M']}x{tile['BLOCK_N']}"


@every_dtype
@pytest.mark.parametrize("tile", TILES, ids=tile_id)
def test_every_tile_alone(tile, dtype):
    """A tile and a remainder along each dimension of either."""
    width = tile["BLOCK_M"] // 3 + 2
    copied = Conv((1, tile["BLOCK_N"] // 4 + 3, 4, width), 1, (2, 2), padding=(0, 1))
    summed = Conv((1, tile["BLOCK_N"] + 3, 3, width), 1, (2, 1), padding=(1, 0))
    with use_tile("im2col", tile):
        check_im2col(copied, dtype)
    with use_tile("col2im", tile):
        check_col2im(summed, dtype)


@few_and_many
def test_many_small_tiles(conv):
    with use_tile("im2col", {**SMALL, "BLOCK_N": 64}), use_tile("col2im", SMALL):
        check_im2col(conv, torch.float32)
        check_col2im(conv, torch.float32)


@every_dtype
def test_the_same_bits_twice(dtype):
    columns = randn(*columns_of(GROUPED), dtype=dtype)
    first, second = (col2im(columns, GROUPED.x, GROUPED.taps, *GROUPED.args) for _ in range(2))
    assert torch.equal(first, second)


# --- offsets past 2^31 elements, on any machine -------------------------------------------------


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the tensors are as large as that, see below")
@pytest.mark.parametrize("dim", range(4), ids=["n", "c", "h", "w"])
def test_offsets_of_im2col_past_2_to_the_31_along(dim, tmp_path):
    x = randn(2, 5, 3, 4, dtype=torch.float16)
    far = far_apart(x, dim, tmp_path / "x")
    assert torch.equal(im2col(far, 2, padding=1), im2col(x, 2, padding=1))


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the tensors are as large as that, see below")
@pytest.mark.parametrize("dim", range(2), ids=["rows", "columns"])
def test_offsets_of_col2im_past_2_to_the_31_along(dim, tmp_path):
    columns = randn(12, 16, dtype=torch.float16)
    far = far_apart(columns, dim, tmp_path / "columns")
    for groups in (1, 2):
        args = (2, 4, 3, 4), 2, 1, 0, 1, groups
        assert torch.equal(col2im(far, *args), col2im(columns, *args))


# --- anything else ------------------------------------------------------------------------------


@hypothesis.given(
    conv=any_conv(), dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS),
    columns=st.sampled_from(LAYOUTS), with_bias=st.booleans(),
)  # fmt: skip
def test_any_geometry(conv, dtype, x, columns, with_bias):
    """In small integers, so that everything is exact but the rounding of the results."""
    image, weight = conv.inputs(dtype, x, values=integers)
    matrix = laid_out(integers(*columns_of(conv), dtype=dtype, seed=4), columns)
    bias = [integers(conv.filters, dtype=dtype, seed=2)] if with_bias else [None]
    with poison() as p:
        copied = im2col(p(image), conv.taps, *conv.args)
        summed = col2im(p(matrix), conv.x, conv.taps, *conv.args)
        y = conv2d_im2col(p(image), p(weight), *bias, *conv.args)
    assert torch.equal(copied, unfolded(conv, image))
    assert torch.equal(summed, folded(conv, matrix).to(dtype))
    assert torch.equal(y, conv2d_reference(*double(image, weight, *bias), *conv.args).to(dtype))


# --- wrong input --------------------------------------------------------------------------------

X, W, B, COLUMNS = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 2), torch.ones(6), torch.ones(30, 24)
SIZE = (2, 4, 5, 6)
WRONG = {
    "x is a list": (im2col, ([[1.0]], 2), TypeError, "x must be a torch.Tensor, got list"),
    "integers": (im2col, (X.int(), 2), TypeError, "x must be float32.*, got int32"),
    "float64": (im2col, (X.double(), 2), TypeError, "x must be float32.*, got float64"),
    "sparse": (im2col, (X.to_sparse(), 2), TypeError, "x must be .*strided.*got torch.sparse"),
    "x without batch": (im2col, (X[0], 2), ValueError, r"x must .*H, W\], got \[4, 5, 6\]"),
    "kernel_size=0": (im2col, (X, 0), ValueError, r"kernel_size must be .* 1, got \(0, 0\)"),
    "kernel_size=2.0": (im2col, (X, 2.0), TypeError, "kernel_size must be an int .*, got 2.0"),
    "kernel_size=None": (im2col, (X, None), TypeError, "kernel_size must be .*, got None"),
    "kernel of 3": (im2col, (X, (1, 2, 3)), TypeError, r"kernel_size .*, got \(1, 2, 3\)"),
    "too high": (im2col, (X, (6, 1)), ValueError, "kernel_size .* height is 6 taps .* 5 pixels"),
    "too wide": (im2col, (X, 2, 1, 0, (1, 6)), ValueError, "kernel_size .* width .* dilation 6"),
    "stride=0": (im2col, (X, 2, 0), ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "padding=-1": (im2col, (X, 2, 1, -1), ValueError, r"padding must be .* 0, got \(-1, -1\)"),
    "dilation='1'": (im2col, (X, 2, 1, 0, "1"), TypeError, "dilation must be .*, got '1'"),
    "groups=3": (im2col, (X, 2, 1, 0, 1, 3), ValueError, "groups must .* 4 channels .*, got 3"),
    "groups=0": (im2col, (X, 2, 1, 0, 1, 0), ValueError, "groups must .* 4 channels .*, got 0"),
    "groups=2.0": (im2col, (X, 2, 1, 0, 1, 2.0), TypeError, "groups must be an int, got 2.0"),
    "columns is None": (col2im, (None, SIZE, (3, 2)), TypeError, "columns must be .*got NoneType"),
    "columns of int": (col2im, (COLUMNS.int(), SIZE, (3, 2)), TypeError, "columns .* got int32"),
    "columns of 3": (col2im, (COLUMNS[None], SIZE, (3, 2)), ValueError, r"columns .*\[1, 30, 24\]"),
    "a row less": (col2im, (COLUMNS[1:], SIZE, (3, 2)), ValueError, r"columns .*30.*\[29, 24\]"),
    "a column less": (col2im, (COLUMNS[:, 1:], SIZE, (3, 2)), ValueError, r"columns .*\[30, 23\]"),
    "size of 3": (col2im, (COLUMNS, (4, 5, 6), (3, 2)), ValueError, r"size .*, got \(4, 5, 6\)"),
    "size is negative": (col2im, (COLUMNS, (-2, 4, 5, 6), (3, 2)), ValueError, "size .*, got .-2"),
    "size is an int": (col2im, (COLUMNS, 5, (3, 2)), TypeError, "size must be .*, got 5"),
    "size of floats": (col2im, (COLUMNS, (2, 4, 5.0, 6), (3, 2)), TypeError, "size .*, got .*5.0"),
    "size is None": (col2im, (COLUMNS, None, (3, 2)), TypeError, "size must be .*, got None"),
    "size too small": (col2im, (COLUMNS, SIZE, (6, 2)), ValueError, "kernel_size .* 6 taps"),
    "col2im groups": (col2im, (COLUMNS, SIZE, (3, 2), 1, 0, 1, 3), ValueError, "groups .* got 3"),
    "conv: weight": (conv2d_im2col, (X, None), TypeError, "weight must be .*, got NoneType"),
    "conv: channels": (conv2d_im2col, (X, W[:, 1:]), ValueError, r"weight .*\[6, 3, 3, 2\]"),
    "conv: bias": (conv2d_im2col, (X, W, B[1:]), ValueError, r"bias .* K=6, got \[5\]"),
    "conv: dtypes": (conv2d_im2col, (X, W.half()), TypeError, "weight .* got float16"),
    "conv: activation": (conv2d_im2col, (X, W, B, 1, 0, 1, 1, "x"), ValueError, "activation .*'x'"),
}


@pytest.mark.parametrize("fn, args, error, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_any_launch(fn, args, error, message, monkeypatch):
    def launched(*args, **kwargs):
        raise RuntimeError("launched")

    monkeypatch.setattr(module, "launch", launched)
    args = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in args]
    with pytest.raises(error, match=message):
        fn(*args)


def test_meta_tensors_give_the_shape():
    assert im2col(X.to("meta"), (3, 2)).shape == (30, 24)
    assert col2im(COLUMNS.to("meta"), SIZE, (3, 2)).shape == SIZE
    assert conv2d_im2col(X.to("meta"), W.to("meta"), None, 2, 1).shape == (2, 6, 3, 4)


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "conv",
    [
        Conv((8, 3, 224, 224), 64, (7, 7), 2, 3),
        Conv((8, 64, 56, 56), 64, (3, 3), 1, 1),
        Conv((8, 128, 56, 56), 128, (3, 3), 2, 1),
        Conv((8, 512, 28, 28), 512, (3, 3), 1, 1),
        Conv((8, 144, 56, 56), 24, (3, 3), 2, 1, 1, 8),
    ],
    ids=["ResNet-50, first", "ResNet-50, 3x3", "of stride 2", "VGG16, widest", "8 groups"],
)
def test_real_sizes(conv, dtype):
    check_im2col(conv, dtype, "channels_last")
    check_col2im(conv, dtype)
    check_conv(conv, dtype, x="channels_last", weight="channels_last")


@pytest.mark.gpu
def test_tf32_follows_the_switch_of_matmul():
    """It is made of `matmul`: cuDNN's switch has no say."""
    inputs = MANY.inputs(torch.float32)
    want = conv2d_reference(*double(*inputs), None, *MANY.args)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # and the convolutions' is off
    y = conv2d_im2col(*inputs, None, *MANY.args)
    close = dict(dtype=torch.float32, terms=MANY.terms["y"])
    assert_close(y, want, tf32=True, **close)
    with pytest.raises(AssertionError, match="error"):
        assert_close(y, want, **close)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31():
    """Columns of more than 2^31 elements: the last image, both ways."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 40:
        pytest.skip(f"needs 40 GiB of GPU memory, {free:.1f} are free")
    conv = Conv((16, 32, 1024, 512), 1, (3, 3), 1, 1)
    x = torch.empty(conv.x, device="cuda", dtype=torch.bfloat16).normal_()
    columns = im2col(x, 3, 1, 1)
    assert columns.numel() > 2**31
    last = unfolded(Conv((1, *conv.x[1:]), 1, (3, 3), 1, 1), x[-1:])
    assert torch.equal(columns[-len(last) :], last)
    summed = col2im(columns, conv.x, 3, 1, 1)
    times = torch.full((1024, 512), 9.0, device="cuda", dtype=torch.float64)  # copied so often
    times[0], times[-1] = 6, 6
    times[:, 0] *= 2 / 3
    times[:, -1] *= 2 / 3
    assert_close(summed[-1], double(x[-1]) * times, dtype=torch.bfloat16, terms=9)
