"""cross_entropy: every option of torch's, ignored rows, special values, wrong classes."""

import functools
import importlib
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from tests.tools import row_kernels
from tests.tools.inputs import DEVICE, DTYPES, double, gradients, laid_out, need_memory, randn
from tests.tools.poison import poison
from tests.tools.row_kernels import BOTH, both_kernels
from tests.tools.tolerance import assert_close
from tilelab.kernels import cross_entropy
from tilelab.kernels.cross_entropy import reference

module = importlib.import_module("tilelab.kernels.cross_entropy")  # the function has the same name
INF, NAN = math.inf, math.nan
REDUCTIONS = ["none", "mean", "sum"]
LAYOUTS = ["contiguous", "transposed", "channels_last", "sliced", "offset", "expanded"]
with_tile = functools.partial(row_kernels.with_tile, "cross_entropy")


def classes(logits_shape, layout="contiguous", dtype=torch.int64, seed=0):
    """Random classes of the rows of logits; the first and the last class are among them."""
    shape, dim = list(logits_shape), min(1, len(logits_shape) - 1)
    C = shape.pop(dim)
    target = torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))
    if target.numel() > 1:
        target.view(-1)[0], target.view(-1)[-1] = C - 1, 0
    target = target.to(DEVICE, dtype)
    if layout == "sliced":
        return target.repeat_interleave(2, -1)[..., ::2]
    return laid_out(target, layout)


def check(
    shape, dtype, *, x="contiguous", t="contiguous", tile=None, guard=False, dy=None, target=None,
    **options,
):  # fmt: skip
    """Loss and gradient against float64; `x` and `t` name layouts of logits and target."""
    logits = laid_out(3 * randn(*shape, dtype=dtype), x)
    target = classes(shape, t) if target is None else target
    with with_tile(tile):
        loss = cross_entropy(logits, target, **options)
        if dy is None:
            dy = randn(*loss.shape, dtype=dtype, seed=2).abs() + 0.5
            if loss.dim() == 0:  # or the gradients of a mean in fp16 would lose digits
                dy *= min(target.numel(), 1000)
        if guard:
            with poison() as p:
                inputs = [p(logits), p(target)]
                gradients(lambda *xs: cross_entropy(*xs, **options), inputs, p(dy))
        loss, (dx,) = gradients(lambda *xs: cross_entropy(*xs, **options), [logits, target], dy)
    loss64, (dx64,) = gradients(
        lambda *xs: F.cross_entropy(*xs, **options), [double(logits), target.long()], double(dy)
    )
    C = shape[min(1, len(shape) - 1)]
    if C == 1:  # the only class has probability 1
        assert loss.abs().max() < 1e-6 and dx.abs().max() <= 1e-7 * dy.abs().max()
        return
    teeth = x != "expanded" and t != "expanded"  # or rows are equal
    assert_close(loss, loss64, dtype=dtype, terms=C + target.numel(), name="loss", teeth=teeth)
    rows = (target != options.get("ignore_index", -100)).sum() if loss.dim() == 0 else 1
    largest = dy.abs().max() / (rows if options.get("reduction", "mean") == "mean" else 1)
    assert_gradient_close(dx, dx64, largest.item(), teeth)


def assert_gradient_close(dx, dx64, largest, teeth=True):
    """p - q is rounded, and again when it was scaled by up to `largest`. It may cancel: its float32
    errors are relative to p and q.
    """
    dtype = dx.dtype
    cancels = largest / dx64.abs().max().item() * torch.finfo(torch.float32).eps
    roundings = 2 + 8 * cancels / torch.finfo(dtype).eps
    assert_close(
        dx, dx64, dtype=dtype, terms=dx.shape[min(1, dx.dim() - 1)], roundings=roundings,
        name="dx", smallest=1e-5, teeth=teeth,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(7,), (9, 7), (3, 7, 4), (2, 7, 3, 4)], ids=str)
def test_reference_is_torchs_cross_entropy(shape):
    x, t = double(randn(*shape)), classes(shape)
    for reduction in REDUCTIONS:
        for ignore_index in (-100, 3):
            for label_smoothing in (0.0, 0.1, 1.0):
                args = ignore_index, label_smoothing, reduction
                want = F.cross_entropy(
                    x, t, ignore_index=ignore_index, label_smoothing=label_smoothing,
                    reduction=reduction,
                )  # fmt: skip
                torch.testing.assert_close(reference(x, t, *args), want, rtol=1e-12, atol=1e-14)


# --- shapes, each for a reason ------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("C", [1, 15, 16, 17, 31, 32, 33, 48, 100])
def test_where_the_kernels_meet(C):
    """Up to 16 classes in registers; then online in 2 blocks, 2 whole ones, 3, and 7."""
    dtype = DTYPES[C % 3]
    tile = dict(BLOCK_M=4, BLOCK_N=16, num_warps=4)
    check((7, C), dtype, tile=tile, guard=True, label_smoothing=0.1)


@both_kernels
@pytest.mark.parametrize("needs_grad", [False, True])
def test_one_launch_forward_and_one_back(needs_grad, tile, monkeypatch):
    launched = []
    monkeypatch.setattr(
        module, "launch", lambda kernel, *_, **meta: launched.append((kernel, meta))
    )
    x = randn(3, 16).requires_grad_(needs_grad)
    with with_tile(tile):
        loss = cross_entropy(x, classes((3, 16)))
        ((kernel, meta),) = launched
        online = tile["BLOCK_N"] == 4
        assert kernel is (
            module.cross_entropy_online_kernel if online else module.cross_entropy_kernel
        )
        assert meta["NEEDS_GRAD"] == needs_grad and not meta["SMOOTH"]
        if needs_grad:
            loss.backward()
            assert [k for k, _ in launched[1:]] == [module.cross_entropy_backward_kernel]


# --- options ------------------------------------------------------------------------------------


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 3, 0])
def test_options(ignore_index, label_smoothing, reduction, tile):
    """An ignore_index within the range of classes, as segmentation has it, and one outside."""
    check(
        (30, 10), torch.float32, tile=tile, reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(10,), (30, 10), (3, 10, 5, 4)], ids=str)
def test_options_of_16_bit_logits(shape, reduction):
    dtype = torch.float16 if reduction == "mean" else torch.bfloat16
    check(shape, dtype, reduction=reduction, label_smoothing=0.2, ignore_index=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_int32_classes(reduction):
    x, t = randn(9, 7), classes((9, 7))
    want, got = (
        gradients(lambda *xs: cross_entropy(*xs, reduction=reduction), [x, target], randn(
            *(t.shape if reduction == "none" else ()), seed=1)) for target in (t, t.int())
    )  # fmt: skip
    assert torch.equal(got[0], want[0]) and torch.equal(got[1][0], want[1][0])


def test_defaults_are_torchs():
    x, t = randn(9, 7), classes((9, 7))
    t[2] = -100
    want = cross_entropy(x, t, ignore_index=-100, label_smoothing=0.0, reduction="mean")
    assert torch.equal(cross_entropy(x, t), want)
    assert want.item() == pytest.approx(F.cross_entropy(x, t).item(), rel=1e-6)


def test_an_int_is_a_label_smoothing():
    x, t = randn(9, 7), classes((9, 7))
    assert torch.equal(cross_entropy(x, t, label_smoothing=1), cross_entropy(x, t, -100, 1.0))


# --- ignored rows -------------------------------------------------------------------------------


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored_as_in_torch(label_smoothing, reduction, tile):
    """The mean over nothing is NaN; its gradient is 0 all the same."""
    x, t = randn(9, 16), torch.full((9,), -100, device=DEVICE)
    options = dict(label_smoothing=label_smoothing, reduction=reduction)
    dy = torch.ones(9 if reduction == "none" else (), device=DEVICE)
    with with_tile(tile):
        loss, (dx,) = gradients(lambda *xs: cross_entropy(*xs, **options), [x, t], dy)
    want, (dx_want,) = gradients(lambda *xs: F.cross_entropy(*xs, **options), [x, t], dy)
    torch.testing.assert_close(loss, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(dx, dx_want) and not dx.any()


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("ignore_index", [-100, 5, 2**40])
def test_ignored_rows_are_not_even_read(ignore_index, tile):
    """NaN in their logits reaches nothing, nor does NaN or infinity that comes down to them."""
    x, t, dy = randn(9, 16), classes((9, 16)), randn(9, seed=1)
    t[t == ignore_index] = 0
    ignored = torch.tensor([0, 3, 4, 8], device=DEVICE)
    want, (dx_want,) = gradients(lambda *xs: cross_entropy(*xs, reduction="none"), [x, t], dy)
    want[ignored], dx_want[ignored] = 0, 0
    t[ignored], x[ignored] = ignore_index, NAN
    dy[ignored] = torch.tensor([NAN, INF, -INF, 1.0], device=DEVICE)
    with with_tile(tile):
        loss, (dx,) = gradients(
            lambda *xs: cross_entropy(*xs, ignore_index, reduction="none"), [x, t], dy
        )
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx, dx_want, rtol=1e-5, atol=1e-6)
    assert not loss[ignored].any() and not dx[ignored].any()


def test_the_mean_counts_what_is_not_ignored():
    x, t = randn(8, 5), classes((8, 5))
    t[2:7] = -100
    rest = torch.tensor([0, 1, 7], device=DEVICE)
    assert cross_entropy(x, t).item() == pytest.approx(
        cross_entropy(x[rest], t[rest]).item(), rel=1e-6
    )


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(9, 16), (4, 6, 5, 7)], ids=str)
def test_layouts_of_the_logits_online(shape, layout):
    check(shape, torch.float32, x=layout, tile=BOTH["online"], guard=True, reduction="none")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(9, 16), (4, 6, 5, 7)], ids=str)
def test_layouts_of_the_classes(shape, layout):
    check(shape, torch.float32, t=layout, reduction="none")
    check(shape, torch.float32, t=layout, x="channels_last", tile=BOTH["online"])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset", "expanded"])
def test_layouts_of_the_output_gradient(layout):
    dy = randn(4, 5, 7, layout=layout, seed=3)
    check((4, 6, 5, 7), torch.float32, dy=dy, reduction="none")
    check((4, 6, 5, 7), torch.float32, dy=dy, x="channels_last", reduction="none")


# --- nothing to do ------------------------------------------------------------------------------


@both_kernels
def test_no_classes_at_all(tile):
    """Every row is ignored: there is no class it could have."""
    t = torch.full((3,), -100, device=DEVICE)
    with with_tile(tile):
        assert cross_entropy(randn(3, 0), t, reduction="sum").item() == 0
        assert cross_entropy(randn(3, 0), t).isnan()


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
    "NaN first": [NAN, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "NaN last": [1, 2, 3, 4, 5, 6, 7, 8, 9, NAN],
    "a block of NaN": [1, 2, 3, 4, NAN, NAN, NAN, NAN, 5, 6],
    "only NaN": [NAN] * 10,
    "NaN among -inf": [-INF, -INF, NAN] + [-INF] * 7,
    "inf": [1, INF, 2, 3, 4, 5, 6, 7, 8, 9],
    "inf last": [1, 2, 3, 4, 5, 6, 7, 8, 9, INF],
    "inf and -inf": [-INF, INF, -INF, INF, 0, 0, 0, 0, -INF, INF],
    "only inf": [INF] * 10,
    "very large": [3e4, -3e4] * 5,
    "one far above": [0, 0, 0, 0, 0, 0, 6e4, 0, 0, 0],
    "one far below": [0, 0, 0, 0, 0, 0, -6e4, 0, 0, 0],
    "rising by much": [-4e4, -3e4, -2e4, -1e4, 0, 1e4, 2e4, 3e4, 4e4, 5e4],
    "falling by much": [5e4, 4e4, 3e4, 2e4, 1e4, 0, -1e4, -2e4, -3e4, -4e4],
    "ties for the maximum": [7, 7, 1, 7, 2, 7, 3, 7, 4, 7],
    "all equal": [3.0] * 10,
    "zeros": [0.0, -0.0] * 5,
}


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_special_values_as_in_torch(label_smoothing, dtype, tile):
    """Each row with each class as its target, beside one ordinary row that it must not touch."""
    rows = torch.tensor([*SPECIAL.values(), [0.1 * i for i in range(10)]])
    x = rows.repeat_interleave(10, 0).to(DEVICE, dtype)
    t = torch.arange(10, device=DEVICE).repeat(len(rows))
    options = dict(label_smoothing=label_smoothing, reduction="none")
    dy = torch.ones(len(x), dtype=dtype, device=DEVICE)
    with with_tile(tile):
        loss, (dx,) = gradients(lambda *xs: cross_entropy(*xs, **options), [x, t], dy)
    loss64, (dx64,) = gradients(
        lambda *xs: F.cross_entropy(*xs, **options), [double(x), t], double(dy)
    )
    for i, name in enumerate(name for name in [*SPECIAL, "ordinary"] for _ in range(10)):
        want = loss64[i].to(dtype).double()  # in fp16 the largest losses round to infinity
        error = 1e-6 + torch.finfo(dtype).eps * want.abs()
        assert loss[i] == want or (loss[i] - want).abs() <= error or (
            loss[i].isnan() and want.isnan()
        ), f"{name}, class {i % 10}: loss {loss[i].item()}, expected {want.item()}"  # fmt: skip
        assert torch.equal(dx[i].isnan(), dx64[i].isnan()), f"{name}, class {i % 10}"
        error = (dx[i].double() - dx64[i]).abs().nan_to_num().max()
        assert error <= torch.finfo(dtype).eps, f"{name}, class {i % 10}: {error.item()}"


@pytest.mark.parametrize("value", [3e38, -3e38])
@both_kernels
def test_the_largest_numbers(tile, value):
    """Differences of them may be infinite, but are no NaN."""
    x = torch.zeros(3, 10, device=DEVICE)
    x[0, 0], x[1, 9], x[2] = value, value, value
    t = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with with_tile(tile):
        loss = cross_entropy(x, t, reduction="none")
    want = F.cross_entropy(double(x), t, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


SHIFTS = [(torch.float32, 2**20), (torch.float16, 1024), (torch.bfloat16, 128)]


@pytest.mark.core
@both_kernels
@pytest.mark.parametrize("dtype, shift", SHIFTS)
def test_a_shift_changes_no_bit(tile, dtype, shift):
    """Of integers, shifted to where their dtype still has them: all differences are exact."""
    x, t = randn(9, 16).mul(4).round().clamp(-20, 20).to(dtype), classes((9, 16))
    dy = torch.ones((), dtype=dtype, device=DEVICE)
    results = []
    with with_tile(tile):
        for s in (0, shift, -shift):
            fn = lambda *xs: cross_entropy(*xs, label_smoothing=0.1)  # noqa: E731
            results.append(gradients(fn, [x + s, t], dy))
    for loss, (dx,) in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(dx, results[0][1][0])


@both_kernels
def test_equal_logits_have_the_loss_of_a_guess(tile):
    x, t = torch.full((5, 16), 7.0, device=DEVICE), classes((5, 16))
    with with_tile(tile):
        for label_smoothing in (0.0, 0.3, 1.0):
            loss = cross_entropy(x, t, label_smoothing=label_smoothing)
            assert loss.item() == pytest.approx(math.log(16), rel=1e-6)


@both_kernels
def test_gradients_sum_to_zero(tile):
    """A shift of the whole row changes nothing, so the gradient along it is 0."""
    with with_tile(tile):
        _, (dx,) = gradients(
            lambda *xs: cross_entropy(*xs, label_smoothing=0.2, reduction="sum"),
            [3 * randn(50, 16), classes((50, 16))],
            torch.ones((), device=DEVICE),
        )
    assert dx.abs().max() > 0.1 and dx.double().sum(1).abs().max() < 1e-6


def test_losses_are_never_negative():
    """Not even where p is so close to 1 that its logarithm rounds."""
    x = torch.tensor([[k, 0.0, 0.0, 0.0] for k in range(0, 100)], device=DEVICE)
    t = torch.zeros(100, dtype=torch.int64, device=DEVICE)
    assert (cross_entropy(x, t, reduction="none") >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32(dtype):
    """2048 + 1 is 2048 in fp16, and 256 + 1 is 256 in bf16: such a sum would stand still there."""
    x = torch.zeros(2, 4096, dtype=dtype, device=DEVICE)
    t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    want = torch.tensor(math.log(4096)).to(dtype).item()
    assert cross_entropy(x, t).item() == want
    t = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
    assert cross_entropy(x.T.contiguous(), t, reduction="sum").item() == torch.tensor(
        4096 * math.log(2)
    ).to(dtype)


def test_small_gradients_survive_in_float16():
    """p / M is below what fp16 can hold; times a loss scale it is not, as mixed precision wants."""
    x = torch.zeros(64, 10, dtype=torch.float16, device=DEVICE)
    x[:, 0] = 12.0
    t = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    scale = torch.tensor(1024.0, dtype=torch.float16, device=DEVICE)
    _, (dx,) = gradients(cross_entropy, [x, t], scale)
    _, (dx64,) = gradients(F.cross_entropy, [double(x), t], double(scale))
    assert (dx64[:, 1:] / 1024).max() < 1e-7
    torch.testing.assert_close(dx.double(), dx64, rtol=0.005, atol=0)


# --- classes that do not exist ------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("wrong", [-1, 16, 17, 2**31, -(2**40), -100])
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host would have to wait")
def test_a_wrong_class_is_refused_before_any_launch(wrong, monkeypatch):
    def launched(*args, **kwargs):
        raise RuntimeError("launched")

    monkeypatch.setattr(module, "launch", launched)
    x, t = randn(9, 16), classes((9, 16))
    t[5] = wrong
    message = rf"target must have class indices from 0 to 15 or ignore_index \(3\), got {wrong}"
    with pytest.raises(ValueError, match=message):
        cross_entropy(x, t, ignore_index=3)
    with pytest.raises(ValueError, match=message):
        torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(x, t, 3)


@both_kernels
@pytest.mark.parametrize("wrong", [-1, 16, 17, 10**9, -(2**40), 2**62])
def test_a_wrong_class_on_a_gpu_is_nan_and_read_nowhere(wrong, tile, monkeypatch):
    monkeypatch.setattr(module, "_check_classes", lambda *_: None)  # so that the kernel sees it
    x, t, dy = randn(9, 16), classes((9, 16)), randn(9, seed=1)
    fn = lambda *xs: cross_entropy(*xs, label_smoothing=0.1, reduction="none")  # noqa: E731
    with with_tile(tile):
        want, (dx_want,) = gradients(fn, [x, t], dy)
        t[5] = wrong
        with poison(nan_results=True) as p:
            loss, (dx,) = gradients(fn, [p(x), p(t)], p(dy))
    want[5], dx_want[5] = NAN, NAN
    torch.testing.assert_close(loss, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dx, dx_want, rtol=0, atol=0, equal_nan=True)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.core
def test_no_gradients_no_graph(monkeypatch):
    """And p - q is not even computed."""
    x, t = randn(3, 4), classes((3, 4))
    op, flags = module._cross_entropy, []
    monkeypatch.setattr(module, "_cross_entropy", lambda *a: flags.append(a[-1]) or op(*a))
    assert not cross_entropy(x, t).requires_grad
    with torch.no_grad():
        assert not cross_entropy(x.requires_grad_(), t).requires_grad
    with torch.inference_mode():
        cross_entropy(x, t)
    assert cross_entropy(x, t).requires_grad
    assert flags == [False, False, False, True]


def test_behind_a_layer_of_torch():
    x, t = randn(20, 8), classes((20, 10))
    grads = {}
    for fn, dtype in [(cross_entropy, torch.float32), (F.cross_entropy, torch.float64)]:
        w = randn(8, 10, seed=1).to(dtype).requires_grad_()
        (3 * fn(x.to(dtype) @ w, t)).backward()
        grads[dtype] = w.grad
    assert_close(grads[torch.float32], grads[torch.float64], dtype=torch.float32, terms=200)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_16_bit_logits_have_a_float32_loss(dtype, reduction):
    """The same bits as of logits cast to float32, which autocast has torch do."""
    x, t = randn(9, 7, dtype=dtype), classes((9, 7))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = cross_entropy(x, t, reduction=reduction)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(x.float(), t, reduction=reduction))


# --- tiles --------------------------------------------------------------------------------------


@both_kernels
@pytest.mark.parametrize("dtype, reduction", list(zip(DTYPES, REDUCTIONS, strict=True)))
def test_the_same_bits_twice(reduction, dtype, tile):
    x, t = randn(50, 16, dtype=dtype), classes((50, 16))
    dy = randn(*((50,) if reduction == "none" else ()), dtype=dtype, seed=1)
    with with_tile(tile):
        first, second = (
            gradients(lambda *xs: cross_entropy(*xs, reduction=reduction), [x, t], dy)
            for _ in range(2)
        )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


@both_kernels
def test_rows_do_not_depend_on_their_neighbours(tile):
    """Bit for bit: which rows share a program must not matter."""
    x, t = 3 * randn(21, 16), classes((21, 16))
    with with_tile(tile):
        together = cross_entropy(x, t, label_smoothing=0.1, reduction="none")
        alone = [cross_entropy(*row, label_smoothing=0.1) for row in zip(x, t, strict=True)]
    assert torch.equal(together, torch.stack(alone))


# --- anything else ------------------------------------------------------------------------------


@hypothesis.given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
    x=st.sampled_from(LAYOUTS), t=st.sampled_from(["contiguous", "transposed", "sliced"]),
    t_dtype=st.sampled_from([torch.int64, torch.int32]), ignore_index=st.integers(-2, 7),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5, 1.0]), reduction=st.sampled_from(REDUCTIONS),
    block_m=st.sampled_from([64, 256]), block_n=st.sampled_from([2, 4, 8]),
    scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_layout_dtype_and_option(
    shape, dtype, x, t, t_dtype, ignore_index, label_smoothing, reduction, block_m, block_n, scale,
    seed,
):  # fmt: skip
    if len(shape) < 2 and x == "channels_last":
        x = "contiguous"
    logits = laid_out((scale * randn(*shape, seed=seed)).to(dtype), x)
    target = classes(shape, t if len(shape) > 1 else "contiguous", t_dtype, seed)
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    live = target != ignore_index
    dy = randn(*(target.shape if reduction == "none" else ()), dtype=dtype, seed=seed + 1)
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)
    with with_tile(tile), poison(nan_results=not live.any()) as p:
        loss, (dx,) = gradients(
            lambda *xs: cross_entropy(*xs, **options), [p(logits), p(target)], p(dy)
        )
    loss64, (dx64,) = gradients(
        lambda *xs: F.cross_entropy(*xs, **options), [double(logits), target.long()], double(dy)
    )
    # By what they are made of, since they may be all 0: the loss of differences of logits, and dx
    # of numbers up to the upstream gradient of a row.
    u, ulp = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps
    spread = (logits.max() - logits.min()).double() + math.log(7)
    error = u * loss64.abs() + 8 * ulp * spread * (live.sum() if reduction == "sum" else 1)
    assert loss.dtype == dtype and torch.equal(loss.isnan(), loss64.isnan())
    assert ((loss - loss64).abs().nan_to_num() <= error.nan_to_num() * 1.001).all()
    largest = dy.abs().max().double() / (live.sum().clamp(min=1) if reduction == "mean" else 1)
    tiny = torch.finfo(dtype).smallest_normal * u  # half of the smallest number of all
    assert ((dx - dx64).abs() <= 2.01 * u * dx64.abs() + (8 * ulp + tiny) * largest + tiny).all()


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1], ids=["classes strided", "classes contiguous"])
def test_offsets_past_2_to_the_31(dim):
    """The last rows lie beyond 2^31 elements: an int32 offset would be negative."""
    need_memory(30)
    rows, C = 1_100_000, 2000
    x = torch.randn(rows, C, device="cuda", dtype=torch.bfloat16)
    if dim == 0:
        x = laid_out(x, "transposed")
    t = torch.randint(C, (rows,), device="cuda")
    dy = torch.ones(rows, device="cuda", dtype=torch.bfloat16)
    loss, (dx,) = gradients(lambda *xs: cross_entropy(*xs, reduction="none"), [x, t], dy)
    last = slice(-500, None)
    loss64, (dx64,) = gradients(
        lambda *xs: F.cross_entropy(*xs, reduction="none"), [double(x[last]), t[last]], dy[last]
    )
    assert_close(loss[last], loss64, dtype=torch.bfloat16, terms=C)
    assert_gradient_close(dx[last], dx64, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_host_never_waits_for_the_gpu(reduction):
    x, t = randn(64, 100).requires_grad_(), classes((64, 100))
    cross_entropy(x, t, reduction=reduction).sum().backward()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(x, t, reduction=reduction).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
