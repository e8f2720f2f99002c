"""softmax: where its two kernels meet, special values, and what is true of any row."""

import functools
import importlib
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools import row_kernels
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
from tests.tools.row_kernels import BOTH, both_kernels
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, softmax
from tilelab.kernels._rows import as_rows
from tilelab.kernels.softmax import reference

module = importlib.import_module("tilelab.kernels.softmax")  # `kernels.softmax` is the function
INF, NAN = math.inf, math.nan
with_tile = functools.partial(row_kernels.with_tile, "softmax")


def check(shape, dim, dtype, *, x="contiguous", dy="contiguous", tile=None, guard=False):
    """Forward and gradient against float64; `x` and `dy` name layouts."""
    inputs = [3 * randn(*shape, dtype=dtype)]  # 3: some elements of a row matter, and most do not
    inputs = [laid_out(inputs[0], x)]
    dout = randn(*shape, dtype=dtype, layout=dy, seed=1)
    with with_tile(tile):
        if guard:
            with poison() as p:
                gradients(lambda x: softmax(x, dim), [p(inputs[0])], p(dout))
        y, (dx,) = gradients(lambda x: softmax(x, dim), inputs, dout)
    y64, (dx64,) = gradients(lambda x: reference(x, dim), [double(*inputs)], double(dout))
    N = shape[dim] if shape else 1
    teeth = x != "expanded" and N > 1  # equal rows, or all ones
    assert_close(y, y64, dtype=dtype, terms=N, name="y", teeth=teeth)
    if N == 1:  # y is 1 whatever x is
        assert not dx.any()
        return
    assert_gradient_close(dx, dx64, y64, double(dout), dim, dtype, teeth)


def assert_gradient_close(dx, dx64, y64, dy64, dim, dtype, teeth=True):
    """The backward reads y, which was rounded, as a factor and in a sum; then dx is rounded.

    y * (dy - sum(y * dy)) may cancel, so the errors are relative to the same without a minus sign.
    """
    parts = y64 * (dy64.abs() + (y64 * dy64.abs()).sum(dim, keepdim=True))
    roundings = 3 * (parts.max() / dx64.abs().max()).item()
    assert_close(
        dx, dx64, dtype=dtype, terms=dx.shape[dim], roundings=roundings, name="dx", smallest=1e-4,
        teeth=teeth,
    )  # fmt: skip


def test_reference_is_torchs_softmax():
    x = 3 * randn(5, 6, 7).double()
    for dim in range(-3, 3):
        torch.testing.assert_close(reference(x, dim), torch.softmax(x, dim), rtol=1e-14, atol=0)


# --- shapes, each for a reason ------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_every_dimension_of_every_rank(rank):
    """Beyond rank 4 the rows are gathered first. All sizes differ, so dims cannot be confused."""
    shape = [5, 2, 3, 4, 7, 6][:rank]
    x, dy = 3 * randn(*shape), randn(*shape, seed=1)
    for dim in range(-rank, rank):
        y, (dx,) = gradients(lambda x, dim=dim: softmax(x, dim), [x], dy)
        y64, (dx64,) = gradients(lambda x, dim=dim: reference(x, dim), [double(x)], double(dy))
        assert_close(y, y64, dtype=torch.float32, terms=7)
        assert_gradient_close(dx, dx64, y64, double(dy), dim, torch.float32)


def test_the_last_dimension_is_the_default():
    x = randn(4, 5)
    assert torch.equal(softmax(x), softmax(x, 1))
    assert torch.equal(softmax(x, dim=-1), softmax(x, dim=1))


@pytest.mark.parametrize("dim", [0, -1])
def test_a_tensor_without_dimensions_is_one_as_in_torch(dim):
    y, (dx,) = gradients(lambda x: softmax(x, dim), [randn()], randn(seed=1))
    assert (y.shape, y.item(), dx.item()) == ((), 1, 0)


# --- where the two kernels meet -----------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("N", [1, 15, 16, 17, 31, 32, 33, 48, 100])
def test_where_the_kernels_meet(N):
    """Rows of up to 16 in registers; then online in 2 blocks, 2 whole ones, 3, and 7."""
    dtype = DTYPES[N % 3]
    check((7, N), 1, dtype, tile=dict(BLOCK_M=4, BLOCK_N=16, num_warps=4), guard=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_kernels_agree(dtype):
    x, dy = 3 * randn(9, 16, dtype=dtype), randn(9, 16, dtype=dtype, seed=1)
    results = []
    for tile in BOTH.values():
        with with_tile(tile):
            results.append(gradients(softmax, [x], dy))
    (y1, (dx1,)), (y2, (dx2,)) = results
    assert_close(y1, double(y2), dtype=dtype, terms=16)
    assert_gradient_close(dx1, double(dx2), double(y2), double(dy), 1, dtype)


@both_kernels
def test_which_kernel_runs(tile, monkeypatch):
    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    with with_tile(tile):
        gradients(softmax, [randn(3, 16)], randn(3, 16))
    online = tile["BLOCK_N"] == 4
    assert launched == (
        [module.softmax_online_kernel, module.softmax_backward_online_kernel]
        if online
        else [module.softmax_kernel, module.softmax_backward_kernel]
    )


GPU_TILES = {
    "ten classes": ((4096, 10), 1, dict(BLOCK_M=64, BLOCK_N=16)),
    "attention": ((4096, 128), 1, dict(BLOCK_M=16, BLOCK_N=128)),
    "one more": ((4096, 129), 1, dict(BLOCK_M=8, BLOCK_N=256)),
    "the longest rows in registers": ((4096, 16_384), 1, dict(BLOCK_M=1, BLOCK_N=16_384)),
    "the shortest online": ((4096, 16_385), 1, dict(BLOCK_M=1, num_warps=16, BLOCK_N=8192)),
    "a vocabulary": ((4096, 50_257), 1, dict(BLOCK_M=1, num_warps=16, BLOCK_N=8192)),
    "few rows": ((2, 20), 1, dict(BLOCK_M=16, BLOCK_N=32)),
    "strided": ((64, 4096), 0, dict(BLOCK_M=64, BLOCK_N=64)),
    "strided, short": ((20, 4096), 0, dict(BLOCK_M=64, BLOCK_N=32)),
}


@pytest.mark.parametrize("shape, dim, blocks", GPU_TILES.values(), ids=GPU_TILES)
def test_tiles_chosen_on_a_gpu(shape, dim, blocks, monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "_name", lambda index: "")  # nothing tuned
    x = torch.empty(shape, device="meta")
    D0, D1, D2, N, *strides = as_rows(dim, x)
    tile = module.row_tile("softmax", x, D0 * D1 * D2, N, strides[3])
    assert {k: tile[k] for k in blocks} == blocks


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dy", LAYOUTS)
@pytest.mark.parametrize("x", ["contiguous", "channels_last", "sliced"])
def test_layouts_online(x, dy):
    check((4, 6, 5, 7), 1, torch.float32, x=x, dy=dy, tile=BOTH["online"])


@both_kernels
def test_expanded_gradients(tile):
    """`.sum().backward()` hands down one number with strides 0, and rows of equal dy have dx 0."""
    x = (3 * randn(9, 16)).requires_grad_()
    with with_tile(tile):
        softmax(x).sum().backward()
        assert x.grad.abs().max() < 1e-6
        x.grad = None
        softmax(x)[:, 3].sum().backward()
    y = reference(double(x))
    want = y * (torch.nn.functional.one_hot(torch.tensor(3), 16).to(DEVICE) - y[:, 3:4])
    assert_close(x.grad, want, dtype=torch.float32, terms=16, roundings=4)


# --- values -------------------------------------------------------------------------------------

# rows of 10: online in blocks of 4, 4 and 2
SPECIAL = {
    "-inf": [-INF] * 10,
    "a first block of -inf": [-INF] * 4 + [1, 2, 3, 4, 5, 6],
    "first blocks of -inf": [-INF] * 8 + [1, 2],
    "a middle block of -inf": [1, 2, 3, 4, -INF, -INF, -INF, -INF, 5, 6],
    "a last block of -inf": [1, 2, 3, 4, 5, 6, 7, 8, -INF, -INF],
    "all -inf but the first": [2] + [-INF] * 9,
    "all -inf but the last": [-INF] * 9 + [2],
    "a causal mask": [1, 2, 3, 4, 5, -INF, -INF, -INF, -INF, -INF],
    "NaN first": [NAN, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "NaN last": [1, 2, 3, 4, 5, 6, 7, 8, 9, NAN],
    "NaN in the middle": [1, 2, 3, 4, 5, NAN, 6, 7, 8, 9],
    "a block of NaN": [1, 2, 3, 4, NAN, NAN, NAN, NAN, 5, 6],
    "only NaN": [NAN] * 10,
    "NaN among -inf": [-INF, -INF, NAN] + [-INF] * 7,
    "inf": [1, INF, 2, 3, 4, 5, 6, 7, 8, 9],
    "inf last": [1, 2, 3, 4, 5, 6, 7, 8, 9, INF],
    "inf and -inf": [-INF, INF, -INF, INF, 0, 0, 0, 0, -INF, INF],
    "only inf": [INF] * 10,
    "inf and NaN": [INF, NAN, 2, 3, 4, 5, 6, 7, 8, 9],
    "the largest numbers": [6e4, -6e4] * 5,
    "one far above": [0, 0, 0, 0, 0, 0, 6e4, 0, 0, 0],
    "one far below": [0, 0, 0, 0, 0, 0, -6e4, 0, 0, 0],
    "rising by much": [-4e4, -3e4, -2e4, -1e4, 0, 1e4, 2e4, 3e4, 4e4, 5e4],
    "falling by much": [5e4, 4e4, 3e4, 2e4, 1e4, 0, -1e4, -2e4, -3e4, -4e4],
    "ties for the maximum": [7, 7, 1, 7, 2, 7, 3, 7, 4, 7],
    "zeros": [0.0, -0.0] * 5,
    "the smallest numbers": [1e-7, -1e-7] * 5,
}


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_as_in_torch(tile, dtype):
    """All at once, among ordinary rows that they must not touch."""
    rows = []
    for values in SPECIAL.values():
        rows += [torch.tensor(values), randn(10, seed=len(rows), device="cpu")]
    x = torch.stack(rows).to(DEVICE, dtype)
    dy = randn(*x.shape, dtype=dtype, seed=1)
    with with_tile(tile):
        y, (dx,) = gradients(softmax, [x], dy)
    y64, (dx64,) = gradients(lambda x: torch.softmax(x, 1), [double(x)], double(dy))
    names = [name for name in SPECIAL for name in (name, "an ordinary row")]
    for i, name in enumerate(names):
        assert_close(y[i], y64[i], dtype=dtype, terms=10, name=name, teeth=False)  # many are equal
        error = torch.where(dx64[i].isnan(), 0.0, dx[i].double() - dx64[i]).abs().max()
        assert torch.equal(dx[i].isnan(), dx64[i].isnan()) and error <= 2 * torch.finfo(dtype).eps


SHIFTS = [(torch.float32, 2**20), (torch.float16, 1024), (torch.bfloat16, 128)]


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("dtype, shift", SHIFTS)
def test_a_shift_changes_no_bit(tile, dtype, shift):
    """Of integers, shifted to where their dtype still has them: x - max(x) is the same exactly."""
    x = randn(9, 16).mul(4).round().clamp(-20, 20).to(dtype)
    with with_tile(tile):
        y = softmax(x)
        assert torch.equal(softmax(x + shift), y)
        assert torch.equal(softmax(x - shift), y)


@both_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_share_equally(tile, dtype):
    x = torch.full((5, 16), 3.0, dtype=dtype, device=DEVICE)
    with with_tile(tile):
        assert torch.equal(softmax(x), torch.full_like(x, 1 / 16))
        x[:, 5:] = -INF
        y = softmax(x)
    assert (y[:, :5] == torch.tensor(0.2).to(dtype).item()).all() and not y[:, 5:].any()


@both_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_sum_to_one(tile, dtype):
    with with_tile(tile):
        y = softmax(5 * randn(50, 16, dtype=dtype))
    assert (y >= 0).all() and (y <= 1).all()
    # each element is off by half a last place of at most 1, and of most much less
    assert (y.double().sum(1) - 1).abs().max() <= 2 * torch.finfo(dtype).eps


@both_kernels
def test_gradients_sum_to_zero(tile):
    """A shift of the whole row changes nothing, so the gradient along it is 0."""
    with with_tile(tile):
        _, (dx,) = gradients(softmax, [3 * randn(50, 16)], randn(50, 16, seed=1))
    assert dx.abs().max() > 0.1 and dx.double().sum(1).abs().max() < 1e-6


@both_kernels
def test_order_does_not_matter(tile):
    """Permuted columns give the same, permuted; up to the order of the sum."""
    x, order = 3 * randn(9, 16), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    order = order.to(DEVICE)
    with with_tile(tile):
        assert_close(
            softmax(x[:, order]), double(softmax(x)[:, order]), dtype=torch.float32, terms=16
        )


def test_nan_stays_in_its_row():
    x, dy = randn(20, 6), randn(20, 6, seed=1)
    x[3, 4] = NAN
    y, (dx,) = gradients(softmax, [x], dy)
    for result in (y, dx):
        assert result.isnan().all(1).nonzero().flatten().tolist() == [3]
        assert result.isnan().sum() == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32(dtype):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    x = torch.zeros(2, 4096, dtype=dtype, device=DEVICE)
    assert torch.equal(softmax(x), torch.full_like(x, 1 / 4096))


@both_kernels
def test_no_warnings(tile, recwarn):
    """NumPy warns of -inf - (-inf), which a GPU computes in silence."""
    with with_tile(tile):
        softmax(torch.full((3, 10), -INF, device=DEVICE))
        softmax(torch.tensor([[INF, 1.0, 2.0, 3.0, 4.0]], device=DEVICE))
    assert not [w for w in recwarn if "encountered" in str(w.message)]


# --- gradients ----------------------------------------------------------------------------------


def test_through_a_graph_of_torch():
    """Attention of one head, whose scores and weights torch makes."""
    grads = {}
    for fn, dtype in [(softmax, torch.float32), (reference, torch.float64)]:
        q, k, v = (randn(12, 8, seed=i).to(dtype).requires_grad_() for i in range(3))
        (fn(q @ k.T / 8**0.5) @ v).backward(randn(12, 8, seed=3).to(dtype))
        grads[dtype] = [q.grad, k.grad, v.grad]
    for got, want in zip(grads[torch.float32], grads[torch.float64], strict=True):
        assert_close(got, want, dtype=torch.float32, terms=12, roundings=8)


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice_online(dtype):
    tile = BOTH["online"]
    x, dy = randn(50, 16, dtype=dtype), randn(50, 16, dtype=dtype, seed=1)
    with with_tile(tile):
        first, second = (gradients(softmax, [x], dy) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


@both_kernels
def test_rows_do_not_depend_on_their_neighbours(tile):
    """Bit for bit: which rows share a program must not matter."""
    x = 3 * randn(21, 16)
    with with_tile(tile):
        together, alone = softmax(x), torch.stack([softmax(row) for row in x])
    assert torch.equal(together, alone)


# --- anything else ------------------------------------------------------------------------------


@hypothesis.given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=5), data=st.data(),
    dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS), dy=st.sampled_from(LAYOUTS),
    block_m=st.sampled_from([64, 256]), block_n=st.sampled_from([2, 4, 8]),
    scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_dim_layout_dtype_and_tile(
    shape, data, dtype, x, dy, block_m, block_n, scale, seed
):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    inputs = laid_out((scale * randn(*shape, seed=seed)).to(dtype), x)
    dout = randn(*shape, dtype=dtype, layout=dy, seed=seed + 1)
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)
    with with_tile(tile), poison() as p:
        y, (dx,) = gradients(lambda x: softmax(x, dim), [p(inputs)], p(dout))
    y64, (dx64,) = gradients(lambda x: reference(x, dim), [double(inputs)], double(dout))
    assert_close(y, y64, dtype=dtype, terms=7, teeth=False)  # a row of one element is all ones
    u = torch.finfo(dtype).eps / 2
    # dx may be all 0, so its error is measured by the largest |dy|; the factor as in `check`
    assert (dx - dx64).abs().max() <= (4 * u + 1e-6) * dout.abs().max()


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_past_2_to_the_31(dim):
    """The last rows lie beyond 2^31 elements: an int32 offset would be negative."""
    need_memory(30)
    shape = (1_100_000, 2000) if dim == 1 else (2000, 1_100_000)
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    y, (dx,) = gradients(lambda x: softmax(x, dim), [x], x)
    last = (slice(-500, None), slice(None)) if dim == 1 else (slice(None), slice(-500, None))
    y64, (dx64,) = gradients(lambda x: reference(x, dim), [double(x[last])], double(x[last]))
    assert_close(y[last], y64, dtype=torch.bfloat16, terms=2000)
    assert_close(dx[last], dx64, dtype=torch.bfloat16, terms=2000, roundings=4)


@pytest.mark.gpu
def test_one_row_longer_than_2_to_the_31():
    need_memory(40)
    x = torch.zeros(1, 2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = 20.0
    y = softmax(x)
    want = math.exp(20) / (math.exp(20) + x.shape[1] - 1)
    assert y[0, -1].item() == pytest.approx(want, rel=0.01)
    assert (y[0, :-1] == y[0, 0]).all() and y[0, 0].item() == pytest.approx(
        want / math.exp(20), rel=0.01
    )
