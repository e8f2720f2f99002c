"""im2col and col2im: their order, each other's transpose, and what is not finite."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.convolutions import (
    FEW,
    GROUPED,
    MANY,
    Conv,
    any_conv,
    every_dtype,
    few_and_many,
    integers,
)
from tests.tools.inputs import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    double,
    gradients,
    laid_out,
    need_memory,
    randn,
)
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import col2im, conv2d, conv2d_im2col, im2col
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.conv2d import reference as conv2d_reference
from tilelab.kernels.im2col import reference

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


@few_and_many
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


@pytest.mark.parametrize("taps", [1, 3])
def test_an_int_means_the_same_as_a_pair(taps):
    x = randn(2, 3, 9, 8)
    for args in [(2, 1, 1), (1, 2, 2), (3, 0, 2)]:
        pairs = [(taps, taps), *((v, v) for v in args)]
        columns = im2col(x, taps, *args)
        assert torch.equal(columns, im2col(x, *pairs))
        want = col2im(columns, x.shape, taps, *args)
        assert torch.equal(want, col2im(columns, list(x.shape), *pairs))


# --- gradients ----------------------------------------------------------------------------------


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


@few_and_many
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(dtype, conv):
    """In 16 bits the columns of dx are rounded before they are summed: integers hide it."""
    check_conv(conv, dtype, activation=None if conv is GROUPED else "relu")


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


@few_and_many
def test_many_small_tiles(conv):
    with use_tile("im2col", {**SMALL, "BLOCK_N": 64}), use_tile("col2im", SMALL):
        check_im2col(conv, torch.float32)
        check_col2im(conv, torch.float32)


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


# --- on a GPU, at real sizes --------------------------------------------------------------------


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
    need_memory(40)
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
