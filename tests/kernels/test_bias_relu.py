"""bias_relu: forward, both gradients, the chunks of the backward, and what it refuses."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import bias_relu
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.bias_relu import TILES, bias_activation_backward, bias_backward, reference

from tests.tools.inputs import DEVICE, DTYPES, double, gradients, laid_out, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

module = importlib.import_module("tilelab.kernels.bias_relu")  # `kernels.bias_relu` is the function


def check(shape, dtype, *, x="contiguous", bias="contiguous", dy="contiguous"):
    """Forward and both gradients against float64; `x`, `bias` and `dy` name layouts."""
    inputs = [
        randn(*shape, dtype=dtype, layout=x),
        randn(shape[1], dtype=dtype, layout=bias, seed=1),
    ]
    dout = randn(*shape, dtype=dtype, layout=dy, seed=2)
    y, (dx, db) = gradients(bias_relu, inputs, dout)
    y64, (dx64, db64) = gradients(reference, double(*inputs), double(dout))
    rows = dout.numel() // shape[1]
    assert_close(y, y64, dtype=dtype, terms=2, name="y", teeth=x != "expanded")  # equal rows
    assert_close(
        dx, dx64, dtype=dtype, terms=1, name="dx", teeth=(x, dy) != ("expanded", "expanded")
    )
    assert_close(db, db64, dtype=dtype, terms=rows, name="db")


# --- shapes, each for a reason ------------------------------------------------------------------

SHAPES = {
    "one element": (1, 1),
    "one row": (1, 50),
    "one channel": (50, 1),
    "smaller than a tile": (3, 5),
    "exactly one tile": (16, 64),
    "one more than a tile": (17, 65),
    "one less than a tile": (15, 63),
    "primes": (97, 53),
    "a classifier's output": (64, 10),
    "a sequence": (3, 7, 11),
    "a sequence of length 1": (5, 7, 1),
    "one image": (1, 6, 9, 8),
    "images of one pixel": (5, 6, 1, 1),
    "one channel of images": (2, 1, 9, 8),
    "odd images": (3, 13, 5, 7),
    "H and W differ much": (2, 3, 1, 70),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    check(shape, dtype)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_of_the_interpreters_large_tiles(dtype):
    check((3, 1030, 11, 13), dtype, x="channels_last", dy="channels_last")


# --- layouts ------------------------------------------------------------------------------------

LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset", "expanded"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout, dtype):
    check((4, 6, 5, 7), dtype, x=layout, bias="sliced")
    check((9, 6), dtype, x=layout, bias="offset")


@pytest.mark.parametrize("dy", LAYOUTS)
@pytest.mark.parametrize("x", LAYOUTS)
def test_layouts_of_the_output_gradient(x, dy):
    check((4, 6, 5, 7), torch.float32, x=x, dy=dy)


def test_bias_of_stride_0():
    check((9, 6, 5, 7), torch.float32, bias="expanded")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_outputs_lie_in_memory_as_the_input(layout):
    x = randn(4, 6, 5, 7, layout=layout)
    y, (dx, _) = gradients(bias_relu, [x, randn(6, seed=1)], randn(4, 6, 5, 7, seed=2))
    assert y.stride() == dx.stride() == x.stride()


def test_gradient_of_a_sum_is_expanded():
    """`.sum().backward()` hands down one number with strides 0."""
    x, bias = randn(9, 6).requires_grad_(), randn(6, seed=1).requires_grad_()
    bias_relu(x, bias).sum().backward()
    positive = (x + bias).detach() > 0
    assert torch.equal(x.grad, positive.float())
    assert torch.equal(bias.grad, positive.sum(0).float())


# --- nothing to do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)]
)
def test_empty_as_in_torch(shape):
    inputs, dy = [randn(*shape), randn(shape[1], seed=1)], randn(*shape, seed=2)
    got, want = gradients(bias_relu, inputs, dy), gradients(reference, inputs, dy)
    for g, w in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        assert g.shape == w.shape and torch.equal(g, w)


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


# --- gradients asked for one by one -------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_only_the_gradient_that_is_wanted(wanted):
    grads = {}
    for fn, dtype in [(bias_relu, torch.float32), (reference, torch.float64)]:
        leaves = dict(x=randn(9, 6).to(dtype), bias=randn(6, seed=1).to(dtype))
        leaves[wanted].requires_grad_()
        fn(**leaves).backward(randn(9, 6, seed=2).to(dtype))
        grads[dtype] = leaves[wanted].grad
        assert leaves["bias" if wanted == "x" else "x"].grad is None
    assert_close(grads[torch.float32], grads[torch.float64], dtype=torch.float32, terms=9)


# --- the two backward ops, which matmul and the convolutions use as well ------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_backward(layout, dtype):
    dy = randn(4, 6, 5, 7, dtype=dtype, layout=layout)
    assert_close(bias_backward(dy), double(dy).sum((0, 2, 3)), dtype=dtype, terms=140)


@pytest.mark.core
@pytest.mark.parametrize("PROGRAMS", [1, 2, 3, 5, 7, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_rows(dtype, PROGRAMS, monkeypatch):
    """Seven tiles of rows, the last with one row, in chunks of 7, 4, 3, 2 and 1 tiles."""
    monkeypatch.setattr(module, "PROGRAMS", PROGRAMS)
    dy, y = randn(97, 20, dtype=dtype), torch.relu(randn(97, 20, dtype=dtype, seed=1))
    tile = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4)
    with use_tile("bias_relu_backward", tile), poison() as p:
        dx, db = bias_activation_backward(p(dy), p(y), None, "relu")
    dx64 = torch.where(y > 0, double(dy), 0.0)
    assert torch.equal(dx.double(), dx64)
    assert_close(db, dx64.sum(0), dtype=dtype, terms=97)


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, list(t.values())[:2])))
def test_every_tile_alone(tile, dtype):
    """A tile and a remainder along each dimension."""
    shape = tile["BLOCK_M"] + 5, tile["BLOCK_N"] + 3
    with use_tile("bias_relu", tile), use_tile("bias_relu_backward", tile):
        check(shape, dtype)
        with poison() as p:
            gradients(bias_relu, [p(randn(*shape)), p(randn(shape[1]))], p(randn(*shape, seed=1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(dtype):
    inputs, dy = [randn(500, 70, dtype=dtype), randn(70, dtype=dtype)], randn(500, 70, dtype=dtype)
    first, second = (gradients(bias_relu, inputs, dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(g, h) for g, h in zip(first[1], second[1], strict=True))


# --- out of bounds ------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
@pytest.mark.parametrize("shape", [(19, 17), (3, 5, 7, 11)], ids=["matrix", "images"])
def test_nothing_is_read_or_written_out_of_bounds(shape, layout, dtype):
    x, bias = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
    dy = randn(*shape, dtype=dtype, seed=2)
    with poison() as p:
        inputs = [p(laid_out(x, layout)), p(bias)]
        gradients(bias_relu, inputs, p(laid_out(dy, layout)))


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


# --- wrong input --------------------------------------------------------------------------------

X, BIAS = torch.ones(2, 3, 4, 5), torch.ones(3)
WRONG = {
    "x is a list": (([[1.0]], BIAS), TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ((None, BIAS), TypeError, "x must be a torch.Tensor, got NoneType"),
    "bias is a number": ((X, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
    "bias is None": ((X, None), TypeError, "bias must be a torch.Tensor, got NoneType"),
    "integers": ((X.int(), BIAS), TypeError, "x must be float32, .* or bfloat16, got int32"),
    "float64": ((X.double(), BIAS.double()), TypeError, "x must be float32.*, got float64"),
    "dtypes differ": ((X, BIAS.half()), TypeError, r"bias .* x \(float32\), got float16"),
    "devices differ": ((X, BIAS.to("meta")), TypeError, "bias must be on .* like x, got meta"),
    "sparse": ((X.to_sparse(), BIAS), TypeError, "x must be .*strided.*got torch.sparse_coo"),
    "a vector": ((BIAS, BIAS), ValueError, r"x must have 2, 3 or 4 dimensions, got \[3\]"),
    "a number": ((X.sum(), BIAS), ValueError, r"x must have 2, 3 or 4 dimensions, got \[\]"),
    "5 dimensions": ((X[None], BIAS), ValueError, r"x must have .*, got \[1, 2, 3, 4, 5\]"),
    "bias too short": ((X, BIAS[1:]), ValueError, r"bias .* shape \[C\] with C=3, got \[2\]"),
    "bias too long": ((X, X[0, 0, 0]), ValueError, r"bias .* shape \[C\] with C=3, got \[5\]"),
    "bias a column": ((X, BIAS[:, None]), ValueError, r"bias .* with C=3, got \[3, 1\]"),
}


@pytest.mark.parametrize("args, error, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_any_launch(args, error, message, monkeypatch):
    def launched(*args, **kwargs):
        raise RuntimeError("launched")

    monkeypatch.setattr(module, "launch", launched)
    args = [
        t.to(DEVICE) if isinstance(t, torch.Tensor) and t.device.type != "meta" else t for t in args
    ]
    with pytest.raises(error, match=message):
        bias_relu(*args)


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(64, 64, 112, 112), (8192, 4096), (128, 513, 7, 7)], ids=["images", "matrix", "odd"]
)
def test_real_sizes(shape, layout, dtype):
    check(shape, dtype, x=layout, dy=layout)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31():
    """The last rows lie beyond 2^31 elements: an int32 offset would be negative."""
    rows, channels = 1_100_000, 2000
    assert rows * channels > 2**31
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 20:
        pytest.skip(f"needs 20 GiB of GPU memory, {free:.1f} are free")
    x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    y, (dx, db) = gradients(bias_relu, [x, bias], x)
    last = slice(-1000, None)
    y64 = reference(*double(x[last], bias))
    assert_close(y[last], y64, dtype=torch.bfloat16, terms=2)
    assert torch.equal(dx[last], torch.where(y64 > 0, x[last], 0.0))
    db64 = sum(dx[i : i + 100_000].double().sum(0) for i in range(0, rows, 100_000))
    assert_close(db, db64, dtype=torch.bfloat16, terms=rows)
