"""bias_relu: special values, and the parts of its backward."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.inputs import DEVICE, DTYPES, double, gradients, laid_out, need_memory, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import bias_relu
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.bias_relu import bias_activation_backward, bias_backward, reference

module = importlib.import_module("tilelab.kernels.bias_relu")  # `kernels.bias_relu` is the function


# --- layouts ------------------------------------------------------------------------------------

LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset", "expanded"]


# --- values -------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_exactly_zero(dtype):
    """relu(0) = 0 and its gradient there is 0, as torch has it; the smallest number above has 1."""
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[-tiny], [0.0], [tiny], [1.0]], dtype=dtype, device=DEVICE)
    zero = torch.zeros(1, dtype=dtype, device=DEVICE)
    y, (dx, db) = gradients(bias_relu, [x, zero], torch.ones_like(x))
    assert torch.equal(y, torch.relu(x))
    assert dx.flatten().tolist() == [0, 0, 1, 1]
    assert db.item() == 2
    y, (dx, db) = gradients(bias_relu, [x, zero - 1], torch.ones_like(x))
    assert y[-1].item() == 0 and not dx.any() and db.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_as_in_torch(dtype):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0])
    x, bias = special[:, None].expand(5, 5), special  # every pair of them
    dy = special[[3, 4, 3, 4, 0]][:, None].expand(5, 5) * 2
    inputs = [x.to(DEVICE, dtype), bias.to(DEVICE, dtype)]
    got = gradients(bias_relu, inputs, dy.to(DEVICE, dtype))
    want = gradients(reference, double(*inputs), dy.to(DEVICE).double())
    for g, w in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_where_it_is():
    """Sums of columns do not mix: a NaN in one channel leaves the gradients of the others."""
    x, dy = randn(20, 6), randn(20, 6, seed=2)
    dy[3, 4] = torch.nan
    x[3, 4] = 1.0
    _, (dx, db) = gradients(bias_relu, [x, torch.zeros(6, device=DEVICE)], dy)
    assert dx.isnan().sum() == 1 and dx[3, 4].isnan()
    assert db.isnan().tolist() == [i == 4 for i in range(6)]


def test_float16_overflow_is_infinity():
    x = torch.full((2, 2), 60_000.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(bias_relu(x, x[0]), torch.full_like(x, torch.inf))
    assert torch.equal(bias_relu(-x, -x[0]), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gradient_is_summed_in_float32(dtype):
    """256 + 1 is 256 in bf16 and 2048 + 1 is 2048 in fp16: such a sum would stand still there."""
    x = torch.ones(4096, 3, dtype=dtype, device=DEVICE)
    _, (_, db) = gradients(bias_relu, [x, x[0]], torch.ones_like(x))
    assert db.tolist() == [4096.0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_nearest_even(dtype):
    ulp = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, 1.0 + ulp, 1.0 + 2 * ulp]], dtype=dtype, device=DEVICE)
    y = bias_relu(x, torch.full((3,), ulp / 2, dtype=dtype, device=DEVICE))
    assert y[0].tolist() == [1.0, 1.0 + 2 * ulp, 1.0 + 2 * ulp]


# --- the two backward ops, which matmul and the convolutions use as well ------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_backward(layout, dtype):
    dy = randn(4, 6, 5, 7, dtype=dtype, layout=layout)
    assert_close(bias_backward(dy), double(dy).sum((0, 2, 3)), dtype=dtype, terms=140)


@pytest.mark.core
@pytest.mark.parametrize("PROGRAMS", [1, 2, 3, 5, 7, 1024])
def test_chunks_of_rows(PROGRAMS, monkeypatch):
    """Seven tiles of rows, the last with one row, in chunks of 7, 4, 3, 2 and 1 tiles."""
    dtype = DTYPES[PROGRAMS % 3]
    monkeypatch.setattr(module, "PROGRAMS", PROGRAMS)
    dy, y = randn(97, 20, dtype=dtype), torch.relu(randn(97, 20, dtype=dtype, seed=1))
    tile = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4)
    with use_tile("bias_relu_backward", tile), poison() as p:
        dx, db = bias_activation_backward(p(dy), p(y), None, "relu")
    dx64 = torch.where(y > 0, double(dy), 0.0)
    assert torch.equal(dx.double(), dx64)
    assert_close(db, dx64.sum(0), dtype=dtype, terms=97)


# --- anything else ------------------------------------------------------------------------------


@hypothesis.given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4), dtype=st.sampled_from(DTYPES),
    x=st.sampled_from(LAYOUTS), bias=st.sampled_from(["contiguous", "sliced", "expanded"]),
    dy=st.sampled_from(LAYOUTS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_layout_and_dtype(shape, dtype, x, bias, dy, seed):
    """In multiples of 1/4, so that sums of them are exact."""
    shapes = [shape, shape[1:2], shape]
    tensors = [(4 * randn(*s, seed=seed + i)).round() / 4 for i, s in enumerate(shapes)]
    tensors = [
        laid_out(t.to(dtype), layout) for t, layout in zip(tensors, (x, bias, dy), strict=True)
    ]
    with poison() as p:
        y, (dx, db) = gradients(bias_relu, [p(t) for t in tensors[:2]], p(tensors[2]))
    y64, (dx64, db64) = gradients(reference, double(*tensors[:2]), double(tensors[2]))
    for got, want in [(y, y64), (dx, dx64), (db, db64)]:
        assert torch.equal(got, want.to(dtype))


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
def test_offsets_past_2_to_the_31():
    """The last rows lie beyond 2^31 elements: an int32 offset would be negative."""
    rows, channels = 1_100_000, 2000
    assert rows * channels > 2**31
    need_memory(20)
    x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    y, (dx, db) = gradients(bias_relu, [x, bias], x)
    last = slice(-1000, None)
    y64 = reference(*double(x[last], bias))
    assert_close(y[last], y64, dtype=torch.bfloat16, terms=2)
    assert torch.equal(dx[last], torch.where(y64 > 0, x[last], 0.0))
    db64 = sum(dx[i : i + 100_000].double().sum(0) for i in range(0, rows, 100_000))
    assert_close(db, db64, dtype=torch.bfloat16, terms=rows)
