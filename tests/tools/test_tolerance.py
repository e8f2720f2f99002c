"""The test of the tests: right results pass, and planted bugs of the usual kinds are found."""

import pytest
import torch
import triton
import triton.language as tl

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
from tests.tools.tolerance import assert_close, bound, compare
from tilelab.kernels._launch import launch

# --- assert_close -------------------------------------------------------------------------------


def product(dtype, M=24, K=40, N=24):
    """A reference with everything a test has: [M, N] in float64, from rounded inputs."""
    a, b = double(randn(M, K, dtype=dtype), randn(K, N, dtype=dtype, seed=1))
    return a @ b


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_the_correctly_rounded_result(dtype):
    ref = product(dtype)
    assert_close(ref.to(dtype), ref, dtype=dtype, terms=40)


@pytest.mark.parametrize("K", [1, 16, 1000, 20_000])
@pytest.mark.parametrize("sign", ["mixed", "positive"])
def test_accepts_float32_accumulation_one_by_one(K, sign):
    """The worst order that a kernel may sum in: the derivation in tolerance.py holds for it."""
    a, b = randn(K, 8), randn(K, 6, seed=1)
    if sign == "positive":
        a, b = a.abs(), b.abs()
    acc = torch.zeros(8, 6, device=DEVICE)
    for k in range(K):
        acc += a[k][:, None] * b[k]
    assert_close(acc, double(a).T @ double(b), dtype=torch.float32, terms=K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_is_no_looser_than_needed(dtype):
    """A result rounded once more than it should be, to the next coarser format, is rejected."""
    coarser = {torch.float32: torch.float16, torch.float16: torch.bfloat16}.get(dtype)
    ref = product(dtype)
    wrong = ref.to(dtype) * 0.96 if coarser is None else ref.to(coarser).to(dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_close(wrong, ref, dtype=dtype, terms=40)


def test_bound_knows_tf32():
    assert bound(torch.float32, 100) < 3e-6 < 1e-3 < bound(torch.float32, 100, tf32=True) < 3e-3


def swapped_rows(ref):
    """The last two rows exchanged: what a wrong pointer at a border brings."""
    wrong = ref.clone()
    wrong[[-1, -2]] = ref[[-2, -1]]
    return wrong


def one_element(ref):
    """One element off by a tenth of the largest."""
    wrong = ref.clone()
    wrong[3, 5] += 0.1 * ref.abs().max()
    return wrong


def unwritten_row(ref):
    wrong = ref.clone()
    wrong[-1] = 0
    return wrong


WRONG = {
    "zeros": torch.zeros_like,
    "transposed": lambda ref: ref.T.contiguous(),
    "one row further": lambda ref: ref.roll(1, 0),
    "one column further": lambda ref: ref.roll(1, 1),
    "last rows swapped": swapped_rows,
    "last row unwritten": unwritten_row,
    "one element": one_element,
    "sign": torch.neg,
    "nan": lambda ref: torch.where(ref == ref.max(), torch.nan, ref),
    "inf": lambda ref: torch.where(ref == ref.max(), torch.inf, ref),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", WRONG)
def test_rejects(dtype, wrong):
    ref = product(dtype)
    with pytest.raises(AssertionError, match="NaN" if wrong in ("nan", "inf") else "error"):
        assert_close(WRONG[wrong](ref).to(dtype), ref, dtype=dtype, terms=40)


def test_nan_and_infinities_must_be_at_the_same_places():
    ref = product(torch.float32)
    ref[0, 0], ref[1, 1], ref[2, 2] = torch.nan, torch.inf, -torch.inf
    assert_close(ref.float(), ref, dtype=torch.float32, terms=40)
    for i, value in enumerate([0.0, -torch.inf, torch.nan, torch.nan]):
        wrong = ref.clone()
        wrong[i, i] = value
        with pytest.raises(AssertionError, match=rf"NaN or infinity at 1 of 576 .*\[{i}, {i}\]"):
            assert_close(wrong.float(), ref, dtype=torch.float32, terms=40)


def test_dtype_shape_and_reference_are_checked():
    ref = product(torch.float32)
    for got, ref64, message in [
        (ref.half(), ref, "has dtype torch.float16, expected torch.float32"),
        (ref.float()[:-1], ref, r"has shape \[23, 24\], expected \[24, 24\]"),
        (ref.float()[None], ref, r"has shape \[1, 24, 24\]"),  # which would broadcast
        (ref.float(), ref.float(), "must be float64"),
        (None, ref, "no tensor but NoneType"),
    ]:
        with pytest.raises(AssertionError, match=message):
            assert_close(got, ref64, dtype=torch.float32, terms=40)


def test_a_tiny_reference_proves_nothing():
    ref = product(torch.float32)
    for tiny in (torch.zeros_like(ref), ref * 1e-6):
        with pytest.raises(AssertionError, match="tiny"):
            assert_close(tiny.float(), tiny, dtype=torch.float32, terms=40)
    assert_close((ref * 1e-6).float(), ref * 1e-6, dtype=torch.float32, terms=40, smallest=1e-9)


@pytest.mark.parametrize(
    "same", [lambda r: r * 0 + 1, lambda r: r + r.T, lambda r: r[:1].expand(24, -1)]
)
def test_a_reference_without_teeth_is_refused(same):
    """A constant, a symmetric matrix, equal rows: a shift or a transpose would go unseen."""
    ref = same(product(torch.float32))
    with pytest.raises(AssertionError, match="no teeth"):
        assert_close(ref.float(), ref, dtype=torch.float32, terms=40)
    assert_close(ref.float(), ref, dtype=torch.float32, terms=40, teeth=False)


def test_empty_results_are_equal():
    empty = torch.empty(0, 3, dtype=torch.float64, device=DEVICE)
    assert_close(empty.float(), empty, dtype=torch.float32, terms=0)


# --- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout):
    x = randn(4, 5, 6, 7)
    y = laid_out(x, layout)
    assert torch.equal(y, x[:1].expand_as(x) if layout == "expanded" else x)
    strides = {
        "contiguous": (210, 42, 7, 1),
        "transposed": (1, 4, 20, 120),
        "channels_last": (210, 1, 35, 5),
        "sliced": (3360, 336, 28, 2),
        "offset": (210, 42, 7, 1),
        "expanded": (0, 42, 7, 1),
    }
    assert y.stride() == strides[layout]
    assert (y.data_ptr() % 16 != 0) == (layout in ("offset", "sliced"))


def test_seeds_differ_and_repeat():
    assert torch.equal(randn(8), randn(8))
    assert not torch.equal(randn(8), randn(8, seed=1))


def test_gradients_leave_the_inputs_alone():
    x = randn(3)
    y, (dx, db) = gradients(lambda x, b, n: n * x * b, [x, randn(3, seed=1), 2], randn(3, seed=2))
    assert torch.equal(dx, 2 * randn(3, seed=1) * randn(3, seed=2))
    assert not x.requires_grad and not y.requires_grad and db.shape == (3,)


# --- poison: a kernel with one bug at a time ----------------------------------------------------


@triton.jit
def planted_kernel(
    x_ptr, y_ptr, ROWS, COLS, LAST_READ, LAST_ROW, LAST_COL, BLOCK: tl.constexpr
):  # fmt: skip
    """One program computes all of y = x + (x one element further, or 0 at the end)."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    offs = rows * COLS + cols  # [BLOCK, BLOCK]
    inside = (rows < ROWS) & (cols < COLS)
    x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(x_ptr + offs + 1, mask=inside & (offs < LAST_READ), other=0.0).to(tl.float32)
    mask = (rows < LAST_ROW) & (cols < COLS) & ((rows * COLS + cols) < LAST_COL)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=mask)


def planted(x, read=0, discarded=0, rows=0, elements=0, in_place=False):
    """What the kernel should do, plus `read` elements too many, `rows` too many and so on.

    What is read of `discarded` rows is not stored.
    """
    y = x if in_place else torch.empty_like(x)
    M, N = x.shape
    last = M * N - 1 + read, M + rows, (M + rows) * N + elements
    launch(planted_kernel, (1,), x, y, M + discarded, N, *last, BLOCK=16)
    return y


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_accepts_a_kernel_without_bugs(dtype):
    x = randn(5, 7, dtype=dtype)
    with poison(watch=__name__) as p:
        y = planted(p(x))
    flat = double(x).flatten()
    ref = flat + torch.cat([flat[1:], flat.new_zeros(1)])
    assert_close(y, ref.view(5, 7), dtype=dtype, terms=2)


UNWRITTEN = r"poison in an output of shape \[5, 7\]: "
PLANTED = {
    "row too many written": (
        dict(rows=1),
        r"out of bounds: 7 .* output of shape \[5, 7\] were .* 35 from its first",
    ),
    "element too many read": (
        dict(read=1),
        r"out of bounds.*: a load of \[16, 16\] read 1 elements"
        if INTERPRET
        else UNWRITTEN + r"1 elements .* at \[4, 6\]",
    ),
    "row too many read, not used": (dict(discarded=1), r"a load of \[16, 16\] read 7 elements"),
    "element unwritten": (dict(elements=-1), UNWRITTEN + r"1 elements .* at \[4, 6\]"),
    "row unwritten": (dict(rows=-1), UNWRITTEN + r"7 elements .* at \[4, 0\]"),
    "input written": (dict(in_place=True), r"out of bounds: 34 elements of an input of shape"),
}


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug, message", PLANTED.values(), ids=PLANTED)
def test_poison_finds_the_planted_bug(dtype, bug, message):
    if "discarded" in bug and not INTERPRET:
        pytest.skip("a GPU tells nobody what it read")
    with pytest.raises(AssertionError, match=message):
        with poison(watch=__name__) as p:
            planted(p(randn(5, 7, dtype=dtype)), **bug)


def test_poison_of_a_tensor_written_in_place():
    with poison(watch=__name__) as p:
        planted(p(randn(5, 7), written=True), in_place=True)
    with pytest.raises(AssertionError, match="outside of a tensor to be written"):
        with poison(watch=__name__) as p:
            planted(p(randn(5, 7), written=True), in_place=True, rows=1)


def test_poison_of_integers():
    with pytest.raises(AssertionError, match=r"poison .* 1 elements .* at \[2\]"):
        with poison(watch=__name__):
            torch.empty(3, dtype=torch.int64, device=DEVICE)[:2] = 0


def test_poison_must_see_an_output():
    with pytest.raises(AssertionError, match="proves nothing"):
        with poison() as p:
            planted(p(randn(5, 7)))  # this file's allocations are not watched here


@pytest.mark.parametrize("layout", LAYOUTS)
def test_poison_keeps_values_and_layout(layout):
    x = laid_out(randn(4, 5, 6, 7), layout)
    with poison(watch=__name__) as p:
        y = p(x)
        torch.zeros(1)
    assert torch.equal(x, y) and x.stride() == y.stride()
    assert x.data_ptr() % 16 == y.data_ptr() % 16


def test_compare_says_where():
    ref = product(torch.float32)
    wrong = ref.clone()
    wrong[7, 9] += 100
    assert "at 1 of 576 elements, the first at [7, 9]: got" in compare(wrong, ref, 1e-3)


def test_sums_of_float8_as_hopper_has_them():
    """32 products and the sum so far, aligned to the largest and cut to 14 bits, at a time."""
    K = 4096
    a, b = (randn(n, K, seed=n, device="cpu").double() for n in (40, 48))
    total = torch.zeros(40, 48, dtype=torch.float64)
    for k in range(0, K, 32):
        terms = torch.cat([total[..., None], a[:, None, k : k + 32] * b[None, :, k : k + 32]], -1)
        unit = 2.0 ** (terms.abs().amax(-1, keepdim=True).log2().floor() - 13)
        total = ((terms / unit).trunc() * unit).sum(-1)
    close = dict(dtype=torch.float32, terms=K)
    assert_close(total.float(), a @ b.T, **close, fp8=True)
    with pytest.raises(AssertionError, match="error"):
        assert_close(total.float(), a @ b.T, **close)
    error = (total - a @ b.T).abs().max() / (a @ b.T).abs().max()
    assert bound(**close, fp8=True) / 10 < error  # the bound is no wider than it has to be
