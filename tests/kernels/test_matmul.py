"""matmul: special values, its groups of tiles, sums in parts, and its speed when interpreted."""

import importlib
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.inputs import (
    DEVICE,
    DTYPES,
    INTERPRET,
    double,
    gradients,
    laid_out,
    need_memory,
    randn,
)
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, matmul
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.matmul import reference


def integers(*shape, dtype, seed=0, low=-3, high=3):
    """Small integers: every product and sum of them is exact, so ReLU's sign is never in doubt."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high + 1, shape, generator=generator)
    return x.to(device=DEVICE, dtype=dtype)


def check(
    M, N, K, dtype, *, a="contiguous", b="contiguous", dc="contiguous", bias=None, activation=None,
    tf32=False,
):  # fmt: skip
    """Forward and all gradients against float64; `a`, `b`, `dc` and `bias` name layouts."""
    inputs = [randn(M, K, dtype=dtype, layout=a), randn(K, N, dtype=dtype, layout=b, seed=1)]
    if bias is not None:
        inputs.append(randn(N, dtype=dtype, layout=bias, seed=2))
    rest = [None] * (3 - len(inputs)) + [activation]
    dy = randn(M, N, dtype=dtype, layout=dc, seed=3)

    c, grads = gradients(lambda *xs: matmul(*xs, *rest), inputs, dy)
    c64, grads64 = gradients(lambda *xs: reference(*xs, *rest), double(*inputs), double(dy))

    close = dict(dtype=dtype, tf32=tf32)
    assert_close(c, c64, terms=K + 1, name="c", teeth=a != "expanded", **close)  # equal rows
    assert c.is_contiguous()
    # Equal rows of dC make equal rows of dA, and equal columns of B make dA the same along K.
    teeth = dc != "expanded" and b != "expanded"
    assert_close(grads[0], grads64[0], terms=N, name="da", teeth=teeth, **close)
    assert_close(grads[1], grads64[1], terms=M, name="db", teeth=a != "expanded", **close)
    for got, want in zip(grads[2:], grads64[2:], strict=True):
        assert_close(got, want, terms=M, name="dbias", **close)


# --- layouts ------------------------------------------------------------------------------------


def test_a_matrix_times_its_own_transpose():
    """Both operands are views of one tensor, which gets both gradients."""
    x = randn(21, 30).requires_grad_()
    x64 = double(x).requires_grad_()
    dc = randn(21, 21, seed=1)
    c, c64 = matmul(x, x.t()), x64 @ x64.t()
    assert_close(c, c64, dtype=torch.float32, terms=30, teeth=False)  # it is symmetric
    c.backward(dc)
    c64.backward(double(dc))
    assert_close(x.grad, x64.grad, dtype=torch.float32, terms=42, roundings=2)


# --- nothing to multiply ------------------------------------------------------------------------


def test_bias_gradient_where_nothing_is_multiplied():
    """With the weight in columns, as a classifier has it: its two gradients are one pass."""
    a, bias = randn(6, 0), randn(5, seed=2).requires_grad_()
    weight = randn(5, 3, seed=1)[:, :0].requires_grad_()
    with poison():
        c = matmul(a, weight.t(), bias)
        dweight, dbias = torch.autograd.grad(c, [weight, bias], torch.ones_like(c))
    assert dweight.shape == (5, 0) and torch.equal(dbias, torch.full_like(bias, 6))


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_accumulation(dtype):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    a = torch.ones(4, 4096, dtype=dtype, device=DEVICE)
    b = torch.ones(4096, 4, dtype=dtype, device=DEVICE)
    assert torch.equal(matmul(a, b), torch.full((4, 4), 4096.0, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_nearest_even(dtype):
    """One, plus half of its last place exactly (to even: down), or a little more (up)."""
    ulp = torch.finfo(dtype).eps
    a = torch.tensor([[1.0, ulp / 2, 0.0], [1.0, ulp / 2, ulp / 64], [1 + ulp, ulp / 2, 0]])
    c = matmul(a.to(dtype).to(DEVICE), torch.ones(3, 1, dtype=dtype, device=DEVICE))
    assert c.flatten().tolist() == [1.0, 1.0 + ulp, 1.0 + 2 * ulp]


def test_float16_overflow_is_infinity():
    a = torch.full((2, 2), 300.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(matmul(a, a), torch.full_like(a, torch.inf))
    assert torch.equal(matmul(a, -a), torch.full_like(a, -torch.inf))


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_at_exactly_zero(dtype):
    """relu(0) = 0 and its gradient there is 0, as torch has it; just above it is 1."""
    x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=dtype, device=DEVICE).T
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    bias = torch.zeros(1, dtype=dtype, device=DEVICE)
    c, (dx, done, dbias) = gradients(
        lambda *xs: matmul(*xs, "relu"), [x, one, bias], torch.ones_like(x)
    )
    assert c.flatten().tolist() == [0, 0, 1]
    assert dx.flatten().tolist() == [0, 0, 1]
    assert (done.item(), dbias.item()) == (1, 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_infinity_reach_what_torch_has_them_reach(activation, value):
    """One row, one column, and no other: rows that wrap around a border are never stored."""
    dtype = torch.float16 if value < 0 else torch.float32
    a, b = randn(19, 18, dtype=dtype), randn(18, 21, dtype=dtype, seed=1)
    a[0, 3], b[5, -1] = value, value
    bias = torch.zeros(21, dtype=dtype, device=DEVICE)
    bias[7] = torch.nan
    inputs, dc = [a, b, bias], randn(19, 21, dtype=dtype, seed=2)
    c, grads = gradients(lambda *xs: matmul(*xs, activation), inputs, dc)
    c64, grads64 = gradients(lambda *xs: reference(*xs, activation), double(*inputs), double(dc))
    assert_close(c, c64, dtype=dtype, terms=18)
    for got, want, terms in zip(grads, grads64, [21, 19, 19], strict=True):
        assert_close(got, want, dtype=dtype, terms=terms)


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("GROUP_M", [1, 2, 8])
@pytest.mark.parametrize(
    "blocks", [(1, 1), (9, 1), (1, 5), (9, 3), (8, 2)], ids=lambda b: f"{b[0]}x{b[1]} tiles"
)
def test_every_grouping_visits_every_tile(blocks, GROUP_M):
    tile = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP_M=GROUP_M, num_warps=4, num_stages=2)
    a, b = randn(16 * blocks[0] - 3, 20), randn(20, 16 * blocks[1] - 5, seed=1)
    with use_tile("matmul", tile), poison() as p:
        c = matmul(p(a), p(b))
    assert_close(c, reference(*double(a, b)), dtype=torch.float32, terms=20)


# --- a small result of a long sum ---------------------------------------------------------------

module = importlib.import_module("tilelab.kernels.matmul")


@pytest.fixture(params=[2, 5])
def shared_out(request, monkeypatch):
    """The portable kernel's sums are in so many parts, where they have 32 steps or more."""
    monkeypatch.setattr(module, "part_count", lambda tiles, steps: request.param)
    with use_tile("matmul", dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, num_warps=4,
                                 num_stages=2)):  # fmt: skip
        yield request.param


@pytest.mark.parametrize("K", [512, 530])
@pytest.mark.parametrize("bias, activation", [(None, None), ("contiguous", "relu")])
def test_a_sum_in_parts(K, bias, activation, shared_out):
    """Over K in the forward, over M in the gradient of B: each is long here."""
    dtype = DTYPES[(K + shared_out) % 3]
    check(11, 35, K, dtype, bias=bias, activation=activation)
    check(K, 35, 11, dtype, bias=bias, activation=activation)


@pytest.mark.parametrize("M, dtype", list(zip([9, 512, 530], DTYPES, strict=True)))
def test_a_classifier_s_weight_and_bias_gradients_in_one_pass(M, dtype, shared_out):
    """Of a linear layer's weight, [N, K] in memory: dB and dbias of one launch, or of two."""
    a, weight = randn(M, 70, dtype=dtype), randn(10, 70, dtype=dtype, seed=1)
    bias, dy = randn(10, dtype=dtype, seed=2), randn(M, 10, dtype=dtype, seed=3)
    c = matmul(a, weight.requires_grad_().t(), bias.requires_grad_())
    with poison() as p:
        dy = p(dy)
        dweight, dbias = torch.autograd.grad(c, [weight, bias], dy, retain_graph=True)
    with _launch.record() as events:
        torch.autograd.grad(c, [weight, bias], dy)
    names = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    assert names == ["matmul_kernel", "matmul_reduce_kernel"][: 1 + (M > 500)]
    want = double(dy).t() @ double(a)
    assert_close(dweight, want, dtype=dtype, terms=M, name="dweight")
    assert_close(dbias, double(dy).sum(0), dtype=dtype, terms=M, name="dbias")
    assert dweight.stride() == weight.stride()


# --- anything else ------------------------------------------------------------------------------

sizes = st.integers(1, 70)
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])


@hypothesis.given(
    M=sizes, N=sizes, K=st.integers(0, 70), dtype=st.sampled_from(DTYPES), a=layouts, b=layouts,
    dc=layouts, with_bias=st.booleans(), activation=st.sampled_from([None, "relu"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_layout_and_dtype(M, N, K, dtype, a, b, dc, with_bias, activation, seed):
    """In small integers, so that everything is exact but the rounding of the results."""
    inputs = [integers(M, K, dtype=dtype, seed=seed), integers(K, N, dtype=dtype, seed=seed + 1)]
    inputs = [laid_out(x, layout) for x, layout in zip(inputs, (a, b), strict=True)]
    rest = [activation] if with_bias else [None, activation]
    if with_bias:
        inputs.append(integers(N, dtype=dtype, seed=seed + 2))
    dy = laid_out(integers(M, N, dtype=dtype, seed=seed + 3), dc)
    with poison() as p:
        c, grads = gradients(lambda *xs: matmul(*xs, *rest), [p(x) for x in inputs], p(dy))
    c64, grads64 = gradients(lambda *xs: reference(*xs, *rest), double(*inputs), double(dy))
    for got, want in zip([c, *grads], [c64, *grads64], strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


# --- speed --------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRET, reason="the interpreter's speed")
def test_speed_on_the_interpreter():
    """1024 cubed: 20 GFLOP/s and more on two quiet cores; 0.75 with a GPU's 64-wide tiles.

    The floor leaves room for a busy machine, and none for the wrong tile.
    """
    a, b = randn(1024, 1024), randn(1024, 1024, seed=1)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        matmul(a, b)
        best = min(best, time.perf_counter() - start)
    gflops = 2 * 1024**3 / best / 1e9
    assert gflops > 5, f"{gflops:.1f} GFLOP/s"


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["a", "a transposed", "b", "c"])
def test_offsets_past_2_to_the_31(where):
    """The last rows or columns lie beyond 2^31 elements: an int32 offset would be negative."""
    need_memory(16)
    big, small, dtype = 46_400, 48, torch.bfloat16
    M, N, K = dict(a=(big, small, big), b=(small, big, big), c=(big, big, small))[where[0]]
    assert big * big > 2**31
    a = torch.randn(M, K, device="cuda", dtype=dtype)
    if where == "a transposed":
        a = laid_out(a, "transposed")
    b = torch.randn(K, N, device="cuda", dtype=dtype)
    c = matmul(a, b)
    last = slice(-40, None)
    for rows, cols in [(last, slice(0, 48)), (slice(0, 48), last), (last, last)]:
        want = a[rows].double() @ b[:, cols].double()
        assert_close(c[rows, cols], want, dtype=dtype, terms=K)


@pytest.mark.gpu
def test_tf32_follows_torchs_switch():
    a, b = randn(512, 1024), randn(1024, 512, seed=1)
    want = reference(*double(a, b))
    assert_close(matmul(a, b), want, dtype=torch.float32, terms=1024)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    rounded = matmul(a, b)
    assert_close(rounded, want, dtype=torch.float32, terms=1024, tf32=True)
    with pytest.raises(AssertionError, match="error"):  # so TF32 was really used
        assert_close(rounded, want, dtype=torch.float32, terms=1024)
