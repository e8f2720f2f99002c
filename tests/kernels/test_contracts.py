"""What every operator promises, held for every row of tests/tools/operators.py.

Nearly all of it is in small integers, where sums are exact whatever their order: the result is then
what float64 has, rounded once, to the last bit. And nearly all of it is in poison, see
tests/tools/poison.py: a read or a write out of bounds fails whatever it is that is being tested.
"""

import warnings

import pytest
import torch

from tests.tools.convolutions import far_apart
from tests.tools.inputs import DEVICE, INTERPRET, LAYOUTS, double, gradients, laid_out, randn
from tests.tools.operators import OPERATORS, arrange, tensors_of, upstream
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch
from tilelab.kernels._tiles import use_tile

HOPPER = _launch.Device(90, sms=132)


each_operator = pytest.mark.parametrize("name", OPERATORS)
each_core_operator = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.core)
                                                      for n in OPERATORS])  # fmt: skip


def typical(name):
    """The first sample of an operator."""
    return next(iter(OPERATORS[name].samples.values()))


def function(name, sample, fn=None):
    """The operator, or its reference, of the tensors of a sample."""
    fn = fn or OPERATORS[name].function
    return lambda *tensors: fn(*tensors, **sample.options)


def results(name, sample, inputs, dy, fn=None):
    """The result and its gradients, in one list."""
    if not OPERATORS[name].differentiable:
        return [function(name, sample, fn)(*inputs)]
    y, grads = gradients(function(name, sample, fn), inputs, dy)
    return [y, *grads]


def wanted(name, sample, inputs, dy):
    """What the results should be, in float64."""
    wide = [x.double() if isinstance(x, torch.Tensor) and x.itemsize == 1 else x
            for x in double(*inputs, None)[:-1]]  # fmt: skip
    return results(name, sample, wide, double(dy), OPERATORS[name].reference)


def on_meta(inputs):
    return [t if t is None else t.to("meta") for t in inputs]


def make(name, sample, dtype, seed=0):
    """Inputs and an output gradient."""
    operator = OPERATORS[name]
    inputs = tensors_of(operator, sample, dtype, seed)
    with torch.no_grad():
        y = torch.empty(function(name, sample)(*on_meta(inputs)).shape)
    return inputs, upstream(operator, y, sample, dtype)


def poisoned(name, sample, inputs, dy):
    """The results, in poison."""
    with poison() as p:
        inputs = [p(t) if isinstance(t, torch.Tensor) and t.dim() else t for t in inputs]
        return results(name, sample, inputs, p(dy))


def assert_right(name, got, want, dtype):
    """To the last bit where all is exact, else by the rules of tolerance.py."""
    operator = OPERATORS[name]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        what = f"gradient {i}" if i else "the result"
        assert g.shape == w.shape and g.dtype == dtype, what
        if operator.exact:
            assert torch.equal(g, w.to(dtype)), f"{what} is wrong at {(g != w.to(dtype)).sum()}"
        elif w.numel() and w.abs().max() > 0:
            # An intermediate result was rounded, and differences of such may cancel.
            roundings = 24 if dtype == torch.float32 else 8
            assert_close(
                g, w, dtype=dtype, terms=operator.terms, roundings=roundings, smallest=1e-6,
                teeth=False, name=what,
            )  # fmt: skip
    alive = any(w.count_nonzero() > w.numel() / 8 for w in want) or max(map(torch.numel, want)) < 64
    assert alive, "nearly all results are zero: that proves nothing"


# --- right results --------------------------------------------------------------------------------


def every_sample():
    """Each sample in one of the dtypes, in turns; the typical one in all."""
    for name, operator in OPERATORS.items():
        for i, (reason, sample) in enumerate(operator.samples.items()):
            dtypes = operator.dtypes
            for dtype in dtypes if i == 0 else [dtypes[i % len(dtypes)]]:
                marks = [pytest.mark.core] if sample.core else []
                yield pytest.param(
                    name, reason, dtype, id=f"{name}: {reason}, {str(dtype)[6:]}", marks=marks
                )


@pytest.mark.parametrize("name, reason, dtype", list(every_sample()))
def test_results_and_gradients(name, reason, dtype):
    sample = OPERATORS[name].samples[reason]
    dtype = sample.options.get("dtype", dtype)
    inputs, dy = make(name, sample, dtype)
    assert_right(name, poisoned(name, sample, inputs, dy), wanted(name, sample, inputs, dy), dtype)


def every_tile():
    """Each tile in one of the dtypes, in turns, and the first in all."""
    for name, operator in OPERATORS.items():
        for op, (tiles, _) in operator.tiles.items():
            for i, tile in enumerate(tiles):
                dtypes = operator.dtypes
                for dtype in dtypes if i == 0 else [dtypes[i % len(dtypes)]]:
                    blocks = "x".join(str(v) for k, v in tile.items() if k.startswith("BLOCK"))
                    yield pytest.param(
                        name, op, i, dtype, marks=pytest.mark.core,
                        id=f"{name}: {op} {i} of {blocks}, {str(dtype)[6:]}",
                    )  # fmt: skip


@pytest.mark.parametrize("name, op, number, dtype", list(every_tile()))
def test_every_tile_alone(name, op, number, dtype):
    """A tile and a remainder along each dimension that it blocks."""
    tiles, larger = OPERATORS[name].tiles[op]
    sample = larger(tiles[number])
    inputs, dy = make(name, sample, dtype)
    with use_tile(op, tiles[number]):
        got = poisoned(name, sample, inputs, dy)
    assert_right(name, got, wanted(name, sample, inputs, dy), dtype)


def every_layout():
    """Each argument, the output gradient, and all of them, in each layout."""
    for name, operator in OPERATORS.items():
        for reason, sample in list(operator.samples.items())[: operator.layouts]:
            arguments = [str(i) for i, t in enumerate(sample.tensors) if t is not None]
            if operator.differentiable:
                arguments.append("gradient")
            for which in [*arguments, "all"]:
                yield pytest.param(name, reason, which, id=f"{name}: {reason}, {which}")


@pytest.mark.parametrize("name, reason, which", list(every_layout()))
def test_layouts(name, reason, which):
    """The other arguments are contiguous. float32 and one of 16 bits, in turns."""
    operator = OPERATORS[name]
    sample = operator.samples[reason]
    for i, layout in enumerate(LAYOUTS[1:]):
        dtype = operator.dtypes[i % len(operator.dtypes)]
        inputs, dy = make(name, sample, dtype)
        if which in ("all", "gradient"):
            dy = arrange(dy, layout)
        inputs = [arrange(t, layout) if which in ("all", str(j)) else t
                  for j, t in enumerate(inputs)]  # fmt: skip
        if not operator.exact and layout == "expanded" and which != "gradient":
            continue  # equal rows may be all that there is
        got = poisoned(name, sample, inputs, dy)
        assert_right(name, got, wanted(name, sample, inputs, dy), dtype)


@each_operator
def test_one_number_for_all_of_the_output_gradient(name):
    """`.sum().backward()` hands down one number with strides 0."""
    operator, sample = OPERATORS[name], typical(name)
    if not operator.differentiable:
        pytest.skip("it has no gradient")
    inputs, dy = make(name, sample, torch.float32)
    dy = torch.full((), 2.0, device=DEVICE).expand(dy.shape)
    got, want = results(name, sample, inputs, dy), wanted(name, sample, inputs, dy)
    if name == "softmax":  # whose rows sum up to 1, whatever x is
        assert all(g.abs().max() < 1e-6 for g in got[1:])
    else:
        assert_right(name, got, want, torch.float32)


@each_core_operator
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_how_results_lie_in_memory(name, layout):
    operator, sample = OPERATORS[name], typical(name)
    inputs, dy = make(name, sample, operator.dtypes[0])
    inputs = [arrange(t, layout) for t in inputs]
    if name == "max_pool2d" and layout == "transposed":
        pytest.skip("what is not contiguous gives a channels_last gradient")
    got = results(name, sample, inputs, dy)
    for t, lies in zip(got, operator.lies, strict=False):
        if lies == "row-major":
            assert t.is_contiguous()
        elif lies == "channels_last":
            assert t.is_contiguous(memory_format=torch.channels_last)
        elif lies != "anyhow":
            assert t.stride() == inputs[int(lies.split()[1])].stride()


# --- nothing to do --------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "name, reason", [(n, r) for n, operator in OPERATORS.items() for r in operator.empty]
)
def test_empty_as_the_reference(name, reason):
    """Empty results, sums of nothing, and NaN where there is a mean of nothing."""
    operator = OPERATORS[name]
    sample, dtype = operator.empty[reason], operator.dtypes[0]
    inputs = tensors_of(operator, sample, dtype)
    wide = [t.double() if t.itemsize == 1 else t for t in double(*inputs, None)[:-1]]
    y = function(name, sample, operator.reference)(*wide)
    dy = torch.ones(y.shape, dtype=dtype, device=DEVICE)
    got = results(name, sample, inputs, dy)
    want = results(name, sample, wide, dy.double(), operator.reference)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.to(dtype), rtol=0, atol=0, equal_nan=True)


@each_operator
def test_meta_tensors_give_the_shape(name):
    for reason, sample in list(OPERATORS[name].samples.items())[:8]:
        inputs = tensors_of(OPERATORS[name], sample, OPERATORS[name].dtypes[0])
        y = function(name, sample)(*on_meta(inputs))
        want = function(name, sample)(*inputs)
        assert y.device.type == "meta" and (y.shape, y.dtype) == (want.shape, want.dtype), reason
        assert y.stride() == want.stride(), reason


# --- gradients ------------------------------------------------------------------------------------


@each_core_operator
def test_only_the_gradients_that_are_wanted(name):
    """Each alone, and each pair: the same as all of them at once, and no others."""
    operator, sample = OPERATORS[name], typical(name)
    inputs, dy = make(name, sample, operator.dtypes[0])
    if operator.inference:
        for i, t in enumerate(inputs):
            if t.is_floating_point():
                one = [x.clone().requires_grad_() if i == j else x for j, x in enumerate(inputs)]
                with pytest.raises(ValueError, match="requires grad, and .* has no"):
                    function(name, sample)(*one)
                with torch.no_grad():
                    function(name, sample)(*one)
    if not operator.differentiable:
        return
    floats = [i for i, t in enumerate(inputs) if t.is_floating_point()]
    want = dict(zip(floats, results(name, sample, inputs, dy)[1:], strict=True))
    pairs = {frozenset((i, j)) for i in floats for j in floats}
    for chosen in pairs:
        leaves = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(inputs)]
        function(name, sample)(*leaves).backward(dy)
        for i, leaf in enumerate(leaves):
            if i in chosen:
                assert torch.equal(leaf.grad, want[i]), f"{i} of {set(chosen)}"
            else:
                assert leaf.grad is None


@each_core_operator
def test_no_gradients_no_graph(name):
    operator, sample = OPERATORS[name], typical(name)
    inputs, _ = make(name, sample, operator.dtypes[0])
    assert not function(name, sample)(*inputs).requires_grad
    if operator.differentiable:
        with torch.no_grad():
            inputs[0].requires_grad_()
            assert not function(name, sample)(*inputs).requires_grad
        assert function(name, sample)(*inputs).requires_grad


@each_operator
def test_backward_twice_through_one_graph(name):
    """The first leaves nothing behind; and gradients of two calls add up."""
    if not OPERATORS[name].differentiable:
        pytest.skip("it has no gradient")
    sample = typical(name)
    inputs, dy = make(name, sample, torch.float32)
    x = inputs[0].requires_grad_()
    y = function(name, sample)(*inputs)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(y, x, 2 * dy)
    assert torch.equal(first, kept) and torch.equal(2 * first, second)
    for _ in range(2):
        function(name, sample)(*inputs).backward(dy)
    assert torch.equal(x.grad, 2 * first)


# --- the same, whatever is around -----------------------------------------------------------------


@each_operator
def test_the_same_bits_twice(name):
    """Of numbers whose sum depends on its order; also where torch is to be deterministic."""
    operator, sample = OPERATORS[name], typical(name)
    for dtype in operator.dtypes:
        inputs, dy = make(name, sample, dtype)
        inputs = [
            randn(*t.shape, seed=i).to(t.dtype) if t.is_floating_point() and t.itemsize > 1 else t
            for i, t in enumerate(inputs)
        ]
        dy = randn(*dy.shape, seed=9).to(dtype)
        first, second = (results(name, sample, inputs, dy) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert first[0].count_nonzero() > first[0].numel() / 4


@each_operator
def test_members_of_a_batch_do_not_see_each_other(name):
    """A NaN in the first one leaves the results and the gradients of the others as they were."""
    operator, sample = OPERATORS[name], typical(name)
    if not operator.rows:
        pytest.skip("it has no batch")
    inputs, dy = make(name, sample, operator.dtypes[0])
    want = results(name, sample, inputs, dy)
    x = inputs[0].clone()
    if x.dtype == torch.int8:
        x[0] = 100
    else:
        x[0] = torch.nan
    got = results(name, sample, [x, *inputs[1:]], dy)
    others = got[0].shape[0] // x.shape[0] if got[0].dim() else 0  # of im2col: an image's rows
    if got[0].dim():
        assert torch.equal(got[0][others:], want[0][others:])
        assert not torch.equal(got[0][:others], want[0][:others])
        if operator.differentiable:
            assert torch.equal(got[1][1:], want[1][1:])
    else:
        assert got[0].isnan() and not got[1][1:].isnan().any()


@pytest.mark.skipif(not INTERPRET, reason="a GPU computes it in silence")
@each_operator
def test_no_warnings(name):
    """NumPy warns of -inf - (-inf) and of 0 * inf."""
    operator, sample = OPERATORS[name], typical(name)
    inputs, dy = make(name, sample, operator.dtypes[0])
    if inputs[0].is_floating_point():
        inputs[0][0] = -torch.inf
        inputs[0][-1] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        results(name, sample, inputs, dy)


# --- offsets past 2^31 elements, on any machine ---------------------------------------------------


def every_extent():
    """Each dimension of each argument that may be large, if it has two elements or more.

    The interpreter's loops count in 32 bits; on a GPU they count in the bits of their bounds. The
    ReLU's backward relies on that: its gradients are too far away for the interpreter.
    """
    for name, operator in OPERATORS.items():
        for reason, sample in list(operator.samples.items())[: operator.layouts]:
            inputs = tensors_of(operator, sample, DTYPE)
            for which in operator.far:
                if which == "gradient" and sample.options.get("activation") == "relu":
                    continue
                if which == "gradient" and "layers" in sample.options:
                    continue
                if which.isdigit() and int(which) >= len(inputs):  # a bias that is not given
                    continue
                shape = (make(name, sample, DTYPE)[1] if which == "gradient"
                         else inputs[int(which)]).shape  # fmt: skip
                for dim, size in enumerate(shape):
                    if size > 1:
                        yield pytest.param(
                            name, reason, which, dim,
                            id=f"{name}: {reason}, {which} along {dim}",
                        )  # fmt: skip


DTYPE = torch.float16


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the tensors are as large as that")
@pytest.mark.parametrize("name, reason, which, dim", list(every_extent()) if INTERPRET else [])
def test_offsets_past_2_to_the_31(name, reason, which, dim, tmp_path):
    """Where an offset overflows it ends up among zeros, see far_apart."""
    operator = OPERATORS[name]
    sample = operator.samples[reason]
    inputs, dy = make(name, sample, DTYPE)
    want = results(name, sample, inputs, dy)
    if which == "gradient":
        dy = far_apart(dy, dim, tmp_path / "far")
    else:
        inputs[int(which)] = far_apart(inputs[int(which)], dim, tmp_path / "far")
    got = results(name, sample, inputs, dy)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# --- what torch says ------------------------------------------------------------------------------


@each_operator
def test_tf32_follows_torchs_switch(name):
    """That of the convolutions or that of matmul, and no other."""
    operator, sample = OPERATORS[name], typical(name)
    if operator.switch is None:
        pytest.skip("it has no products of float32")
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    inputs, dy = make(name, sample, torch.float32)
    for on in (True, False):
        for switch in switches:
            switch.fp32_precision = "tf32" if (switch is operator.switch) == on else "ieee"
        with _launch.record(HOPPER) as events:
            results(name, sample, inputs, dy)
        found = {e.meta["PRECISION"] for e in events
                 if isinstance(e, _launch.Launch) and "PRECISION" in e.meta}  # fmt: skip
        assert found == {"tf32" if on else "ieee"}


WRONG = [(n, reason) for n, operator in OPERATORS.items() for reason in operator.wrong]


@pytest.mark.core
@pytest.mark.parametrize("name, reason", WRONG, ids=lambda v: v)
def test_wrong_input_is_refused_before_any_launch(name, reason):
    args, *options, error, message = OPERATORS[name].wrong[reason]
    args = [t.to(DEVICE) if isinstance(t, torch.Tensor) and t.device.type != "meta" else t
            for t in args]  # fmt: skip
    with _launch.record() as events, pytest.raises(error, match=message):
        OPERATORS[name].function(*args, **(options[0] if options else {}))
    assert not events


# --- on a GPU, at real sizes ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "name, reason", [(n, r) for n, operator in OPERATORS.items() for r in operator.real]
)
def test_real_sizes(name, reason, layout):
    operator = OPERATORS[name]
    sample = operator.real[reason]
    for dtype in operator.dtypes:
        inputs, dy = make(name, sample, dtype)
        inputs = [arrange(t, layout) for t in inputs]
        got, want = results(name, sample, inputs, dy), wanted(name, sample, inputs, dy)
        assert_right(name, got, want, dtype)
        again = results(name, sample, inputs, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name, op, number, dtype", list(every_tile()))
def test_every_tile_at_real_size(name, op, number, dtype):
    """Many programs of each tile: in the first real size whose call asks for such a tile."""
    operator = OPERATORS[name]
    for sample in operator.real.values():
        inputs, dy = make(name, sample, dtype)
        with _launch.record(_launch.device_of(inputs[0])) as events:
            results(name, sample, inputs, dy)
        if op in [getattr(event, "op", None) for event in events]:
            break
    else:
        pytest.skip(f"no real size takes a tile of {op}")
    want = results(name, sample, inputs, dy)
    with use_tile(op, operator.tiles[op][0][number]):
        got = results(name, sample, inputs, dy)
    for g, w in zip(got, want, strict=True):
        if operator.exact:
            assert torch.equal(g, w)
        else:
            torch.testing.assert_close(g, w, rtol=0.02, atol=1e-4)


def test_every_public_operator_is_a_row():
    from tilelab import kernels

    functions = {operator.function for operator in OPERATORS.values()}
    ours = {getattr(kernels, name) for name in kernels.__all__} - {kernels.SGD, kernels.AdamW}
    assert functions == ours


def test_layouts_are_all_tried():
    """Of a typical sample every one is another arrangement in memory."""
    x = randn(4, 6, 5, 7)
    assert (
        len({(t.stride(), t.storage_offset() % 4) for t in (laid_out(x, n) for n in LAYOUTS)}) == 6
    )
