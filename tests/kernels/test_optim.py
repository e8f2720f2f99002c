"""SGD and AdamW: each step against torch.optim's in float64, their state, and what they refuse."""

import contextlib
import copy
import importlib
import io
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl

from tests.tools.inputs import DEVICE, DTYPES, double, laid_out, need_memory, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.optim import (
    SGD,
    TILES,
    AdamW,
    _plan,
    adamw_reference,
    capture,
    rest_of_power,
    sgd_reference,
)

module = importlib.import_module("tilelab.kernels.optim")
TORCH = {SGD: torch.optim.SGD, AdamW: torch.optim.AdamW}

# Sizes that divide nothing, one of several chunks, a scalar, an empty one, and two filters.
SHAPES = [(17, 5), (3,), (), (0, 4), (1,), (2003,), (4, 3, 3, 3), (6, 1, 5, 5)]

FLAGS = {
    "SGD": (SGD, dict(lr=0.1)),
    "SGD, weight decay": (SGD, dict(lr=0.1, weight_decay=0.2)),
    "SGD, maximize": (SGD, dict(lr=0.1, weight_decay=0.2, maximize=True)),
    "momentum": (SGD, dict(lr=0.1, momentum=0.9)),
    "momentum, dampening": (SGD, dict(lr=0.1, momentum=0.9, dampening=0.3)),
    "momentum, weight decay": (SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.2)),
    "momentum, all but Nesterov": (
        SGD, dict(lr=0.1, momentum=0.8, dampening=0.5, weight_decay=0.2, maximize=True),
    ),
    "Nesterov": (SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "Nesterov, weight decay, maximize": (
        SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.2, maximize=True),
    ),
    "AdamW": (AdamW, dict()),
    "AdamW, no weight decay": (AdamW, dict(lr=0.1, weight_decay=0)),
    "AdamW, much weight decay": (AdamW, dict(lr=0.1, weight_decay=2.0)),
    "AdamW, betas and eps": (AdamW, dict(lr=0.1, betas=(0.5, 0.7), eps=0.1)),
    "AdamW, betas of 0": (AdamW, dict(lr=0.1, betas=(0.0, 0.0))),
    "AdamW, maximize": (AdamW, dict(lr=0.1, maximize=True)),
}  # fmt: skip


CAPTURABLE = {
    "SGD": (SGD, dict(lr=0.1)),
    "Nesterov": (SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "AdamW": (AdamW, dict(lr=0.1, capturable=True)),
}


def parameters(dtype, shapes=SHAPES, layout="contiguous"):
    tensors = [randn(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    return [torch.nn.Parameter(laid_out(t, layout) if t.dim() else t) for t in tensors]


def set_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p).copy_(randn(*p.shape, dtype=p.dtype, seed=100 * seed + i))


def twin(optimizer):
    """torch's optimizer in float64, at the same point: its state has come by state_dict."""
    groups = optimizer.param_groups
    leaves = [[torch.nn.Parameter(double(p)) for p in group["params"]] for group in groups]
    other = TORCH[type(optimizer)]([dict(params=group) for group in leaves], lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, ours in zip(leaves, groups, strict=True):
        for q, p in zip(group, ours["params"], strict=True):
            q.grad = None if p.grad is None else double(p.grad)
    return other


def step_and_check(optimizer, teeth=True):
    """One step, of which p and every state must be the float64 step, rounded once.

    Those of a group and dtype are compared as one vector: what a step adds is rounded too, so an
    error is to be measured by the size of typical values, and not by a sum that is small by chance.
    """
    other = twin(optimizer)
    other.step()
    optimizer.step()
    for group, group64 in zip(optimizer.param_groups, other.param_groups, strict=True):
        values: dict[tuple, list] = {}
        for p, p64 in zip(group["params"], group64["params"], strict=True):
            values.setdefault(("p", p.dtype), []).append((p, p64))
            state, state64 = optimizer.state[p], other.state[p64]
            assert state.keys() == state64.keys()
            for name in state.keys() - {"step"}:
                assert state[name].shape == p.shape
                values.setdefault((name, p.dtype), []).append((state[name], state64[name]))
            if "step" in state:
                assert state["step"] == state64["step"] and state["step"].dtype == torch.float32
                assert not state["step"].is_cuda
        for (name, dtype), pairs in values.items():
            got, want = (
                torch.cat([t.detach().flatten() for t in ts]) for ts in zip(*pairs, strict=True)
            )
            close = dict(dtype=dtype, terms=4, smallest=1e-5, teeth=teeth)
            assert_close(got, want, **close, name=name)


def assert_alike(params, others, roundings):
    """Parameters after several steps in float32, each of which has rounded; as one vector."""
    got, want = (torch.cat([p.detach().flatten() for p in ps]) for ps in (params, others))
    assert_close(got, want.double(), dtype=torch.float32, terms=4, roundings=roundings)


# --- the steps ----------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls, flags", FLAGS.values(), ids=FLAGS)
def test_steps_each_as_in_float64(cls, flags, dtype):
    params = parameters(dtype)
    optimizer = cls(params, **flags)
    for step in range(3):
        set_gradients(params, step)
        step_and_check(optimizer)


@pytest.mark.parametrize("cls, flags", FLAGS.values(), ids=FLAGS)
def test_ten_steps_in_a_row_as_torchs(cls, flags):
    """Not brought together after each step: in float32 the roundings of ten steps add up."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = cls(ours, **flags), TORCH[cls](theirs, **flags)
    for step in range(10):
        for params in (ours, theirs):
            set_gradients(params, step)
        optimizer.step()
        other.step()
    assert_alike(ours, theirs, roundings=20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls, flags", FLAGS.values(), ids=FLAGS)
def test_defaults_are_torchs(cls, flags, dtype):
    ours, theirs = cls(parameters(dtype), **flags), TORCH[cls](parameters(dtype), **flags)
    for name, value in ours.defaults.items():
        assert theirs.defaults[name] == value
    assert cls(parameters(dtype)).defaults.items() <= TORCH[cls](parameters(dtype)).defaults.items()


def test_references_are_torchs():
    """The equations of the lesson, in float64."""
    p, grads = torch.nn.Parameter(double(randn(50))), [double(randn(50, seed=i)) for i in range(3)]
    flags = dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.3)
    optimizer, q, m = torch.optim.SGD([p], **flags), p.detach().clone(), None
    for grad in grads:
        p.grad = grad
        optimizer.step()
        q, m = sgd_reference(q, grad, m, **flags)
    torch.testing.assert_close(q, p.detach())
    optimizer, m, v = torch.optim.AdamW([p], lr=0.1), torch.zeros_like(q), torch.zeros_like(q)
    for t, grad in enumerate(grads, 1):
        p.grad = grad
        optimizer.step()
        q, m, v = adamw_reference(q, grad, m, v, t, lr=0.1)
    torch.testing.assert_close(q, p.detach())


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_network_learns(cls):
    """Ten losses of a small network, as with torch's optimizer."""

    def losses(cls):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        net.to(DEVICE)
        x = randn(64, 8)
        optimizer = cls(net.parameters(), lr=0.05)
        for _ in range(10):
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    got, want = list(losses(cls)), list(losses(TORCH[cls]))
    assert want[-1] < 0.9 * want[0]
    assert got == pytest.approx(want, rel=1e-5)


# --- one launch ---------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The number of programs of each launch."""
    seen, launch = [], module.launch

    def spy(kernel, grid, *args, **meta):
        seen.append(grid[0])
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(module, "launch", spy)
    return seen


@pytest.mark.core
@pytest.mark.parametrize("cls, flags", [(SGD, {}), (SGD, dict(momentum=0.9)), (AdamW, {})])
def test_one_launch_for_all_parameters(cls, flags, launches):
    params = parameters(torch.float32, [(n % 7 + 1, n // 3 + 1) for n in range(100)])
    optimizer = cls(params, lr=0.1, **flags)
    for step in range(2):
        set_gradients(params, step)
        step_and_check(optimizer)
    assert len(launches) == 2


@pytest.mark.core
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_one_launch_a_group_and_dtype(cls, launches):
    params = [p for dtype in DTYPES for p in parameters(dtype, [(5, 3), (40,)])]
    optimizer = cls([dict(params=params[::2]), dict(params=params[1::2], lr=0.5)], lr=0.1)
    set_gradients(params, 0)
    step_and_check(optimizer)
    assert len(launches) == 6


@pytest.mark.core
def test_parameters_of_different_age(launches):
    """One that had no gradient for two steps has made fewer: AdamW's bias correction differs."""
    params = parameters(torch.float32, [(5, 3), (40,), (7,)])
    optimizer = AdamW(params, lr=0.1)
    for step in range(4):
        set_gradients(params, step)
        if step in (0, 2):
            params[1].grad = None
        step_and_check(optimizer)
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 2, 4]
    assert len(launches) == 1 + 2 + 1 + 2


@pytest.mark.parametrize("dampening, count", [(0.0, 3), (0.5, 4)])
def test_the_first_step_is_not_dampened(dampening, count, launches):
    params = parameters(torch.float32, [(5, 3), (40,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=dampening)
    for step in range(3):
        set_gradients(params, step)
        if step == 0:
            params[1].grad = None
        step_and_check(optimizer)
    assert len(launches) == count


@pytest.mark.core
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_nothing_to_do(cls, launches):
    """No gradients at all; no elements at all."""
    params = parameters(torch.float32, [(5, 3), (0, 4)])
    optimizer = cls(params, lr=0.1)
    before = params[0].detach().clone()
    optimizer.step()
    params[1].grad = torch.empty(0, 4, device=DEVICE)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert launches == [0] and not optimizer.state[params[0]]


def test_the_plan():
    """Each program's parameter, its chunk of it, the elements from there on, and all its chunks."""
    plan = _plan((20, 0, 8, 1), 8, torch.device("cpu"), 0)
    want = [[0, 0, 20, 3], [0, 1, 12, 3], [0, 2, 4, 3], [2, 0, 8, 1], [3, 0, 1, 1]]
    assert plan.tolist() == want
    large = _plan((2**33 + 1,), 2**30, torch.device("cpu"), 0)
    assert large[-1].tolist() == [0, 8, 1, 9]


@pytest.mark.core
def test_a_long_parameter_takes_several_of_the_interpreters_large_chunks(launches):
    params = parameters(torch.float32, [(600_001,), (500_000,)])
    optimizer = AdamW(params, lr=0.1)
    set_gradients(params, 0)
    step_and_check(optimizer)
    assert launches[0] >= 5


# --- state --------------------------------------------------------------------------------------

STATEFUL = {k: v for k, v in FLAGS.items() if "momentum" in v[1] or v[0] is AdamW}


@pytest.mark.core
@pytest.mark.parametrize("first", ["ours", "torch's"])
@pytest.mark.parametrize("cls, flags", STATEFUL.values(), ids=STATEFUL)
def test_state_dict_goes_both_ways_in_mid_training(cls, flags, first):
    """Three steps with one, three more with the other; the lr travels along."""
    params, reference = parameters(torch.float32), parameters(torch.float32)
    classes = [cls, TORCH[cls]] if first == "ours" else [TORCH[cls], cls]
    optimizer, other = classes[0](params, **flags), TORCH[cls](reference, **flags)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = classes[1](params, lr=99.0)
            optimizer.load_state_dict(state)
        for leaves in (params, reference):
            set_gradients(leaves, step)
        optimizer.step()
        other.step()
    assert_alike(params, reference, roundings=12)
    got, want = optimizer.state_dict(), other.state_dict()
    assert got["state"].keys() == want["state"].keys()
    for key, state in got["state"].items():
        assert state.keys() == want["state"][key].keys()
        assert all(s.dtype == want["state"][key][name].dtype for name, s in state.items())


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls, flags", [FLAGS["Nesterov"], FLAGS["AdamW"]])
def test_resuming_from_a_file_gives_the_same_bits(cls, flags, dtype):
    unbroken, broken = parameters(dtype), parameters(dtype)
    optimizer, other = cls(unbroken, **flags), cls(broken, **flags)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save([other.state_dict(), [p.detach() for p in broken]], file)
            file.seek(0)
            state, values = torch.load(file, weights_only=True)
            broken = [torch.nn.Parameter(v) for v in values]
            other = cls(broken)
            other.load_state_dict(state)
        for params in (unbroken, broken):
            set_gradients(params, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(unbroken, broken, strict=True))


def test_a_copy_of_an_optimizer_steps_alike():
    for cls in (SGD, AdamW):
        net = torch.nn.Linear(5, 3).to(DEVICE)
        optimizer = cls(net.parameters(), lr=0.1)
        set_gradients(list(net.parameters()), 0)
        optimizer.step()
        other_net, other = copy.deepcopy((net, optimizer))
        for leaves, o in [(net.parameters(), optimizer), (other_net.parameters(), other)]:
            set_gradients(list(leaves), 1)
            o.step()
        assert torch.equal(net.weight, other_net.weight)
        assert not torch.equal(net.weight, torch.zeros_like(net.weight))


def test_a_step_count_of_torchs_fused_form():
    """There it lies on the parameter's device; old checkpoints have a plain number."""
    params = parameters(torch.float32, [(5, 3)])
    state = AdamW(params).state_dict()
    moments = dict(exp_avg=torch.ones(5, 3), exp_avg_sq=torch.ones(5, 3))
    for count in (7, 7.0, torch.tensor(7.0, device=DEVICE)):
        optimizer = AdamW(params)
        state["state"] = {0: dict(step=count, **moments)}
        optimizer.load_state_dict(copy.deepcopy(state))
        set_gradients(params, 0)
        optimizer.step()
        assert optimizer.state[params[0]]["step"].item() == 8


# --- memory layouts -----------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("p", ["contiguous", "channels_last", "transposed", "offset"])
def test_a_gradient_may_lie_differently_from_its_parameter(p, grad, dtype):
    params = parameters(dtype, [(6, 5, 3, 4), (7, 5, 2)], layout=p)
    strides = [q.stride() for q in params]
    optimizer = AdamW(params, lr=0.1)
    for step in range(2):
        for i, q in enumerate(params):
            q.grad = randn(*q.shape, dtype=dtype, layout=grad, seed=10 * step + i)
        step_and_check(optimizer, teeth=grad != "expanded")  # equal rows
    assert [q.stride() for q in params] == strides


@pytest.mark.core
@pytest.mark.parametrize("cls, flags", [FLAGS["Nesterov"], FLAGS["AdamW"]])
def test_a_network_becomes_channels_last_in_mid_training(cls, flags):
    """Its state was contiguous: from a checkpoint, or from before `.to(memory_format=...)`."""
    params = parameters(torch.float32, [(6, 5, 3, 4), (6,)])
    optimizer = cls(params, **flags)
    for step in range(3):
        set_gradients(params, step)
        step_and_check(optimizer)
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
    buffers = [s for s in optimizer.state[params[0]].values() if s.dim()]
    assert buffers and all(s.stride() == params[0].stride() for s in buffers)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_that_are_views_of_one_buffer(dtype):
    """Slices of one flat tensor, none of which begins at a multiple of 16 bytes."""
    flat = randn(100, dtype=dtype)
    before = flat.clone()
    params = [torch.nn.Parameter(flat[a:b]) for a, b in [(1, 12), (13, 50), (51, 97)]]
    params[0].data, params[2].data = flat[1:12], flat[51:97]
    optimizer = AdamW(params, lr=0.1)
    for step in range(2):
        set_gradients(params, step)
        step_and_check(optimizer)
    untouched = [0, 12, 50, 97, 98, 99]
    assert torch.equal(flat[untouched], before[untouched])
    assert (flat != before).sum() > 80


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls, flags", [FLAGS["SGD"], FLAGS["Nesterov"], FLAGS["AdamW"]])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
def test_nothing_is_read_or_written_out_of_bounds(layout, cls, flags, dtype):
    with poison() as p:
        params = []
        for i, shape in enumerate([(17, 5), (3,), (1,), (203,), (4, 3, 3, 3)]):
            x = randn(*shape, dtype=dtype, seed=i)
            x = x if x.dim() < 2 else laid_out(x, layout)
            params.append(torch.nn.Parameter(p(x, written=True)))
            params[-1].grad = p(torch.empty_like(x).copy_(randn(*shape, dtype=dtype, seed=9)))
        optimizer = cls(params, **flags)
        with use_tile(f"{cls.__name__.lower()}", dict(BLOCK_M=64, num_warps=2)):
            for _ in range(2):
                step_and_check(optimizer)
        if cls is SGD and "momentum" not in flags:  # allocates nothing, and poison wants something
            p.embed(torch.ones(1, device=DEVICE), "output", copy=True)


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls, flags", [FLAGS["Nesterov"], FLAGS["AdamW"]])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, t.values())))
def test_every_tile_alone(tile, cls, flags, dtype):
    """Less than a chunk, exactly one, one element more, and two and some."""
    block = tile["BLOCK_M"]
    params = parameters(dtype, [(block - 1,), (block,), (block + 1,), (2 * block + 77,)])
    optimizer = cls(params, **flags)
    with use_tile(cls.__name__.lower(), tile):
        for step in range(2):
            set_gradients(params, step)
            step_and_check(optimizer)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, t.values())))
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_small_parameter_has_no_more_threads_than_elements_of_its_chunk(cls, tile, monkeypatch):
    """Two threads with one element would race: p is read, and then written in place."""
    seen, launch = [], module.launch

    def spy(kernel, grid, *args, **meta):
        seen.append(meta)
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(module, "launch", spy)
    monkeypatch.setattr(module, "DEFAULT", {4: tile})
    params = parameters(torch.float32, [(5, 3), (40,)])
    optimizer = cls(params, lr=0.1)
    set_gradients(params, 0)
    step_and_check(optimizer)
    (meta,) = seen
    assert meta["BLOCK_M"] >= 64 * tile["num_warps"]  # an AMD warp has 64 threads


@pytest.mark.parametrize("cls, flags", [FLAGS["Nesterov"], FLAGS["AdamW"]])
def test_the_chunks_make_no_difference(cls, flags):
    """The same bits in chunks of any size, and twice."""
    results = []
    for block, warps in [(32, 1), (64, 2), (64, 2), (4096, 4)]:
        params = parameters(torch.float32)
        optimizer = cls(params, **flags)
        with use_tile(cls.__name__.lower(), dict(BLOCK_M=block, num_warps=warps)):
            set_gradients(params, 0)
            optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_of_zero_gradients(dtype):
    """0 / (sqrt(0) + eps) is 0: only the decay is left. (torch's own gives NaN in float16.)"""
    params = parameters(dtype, [(40,)])
    before = double(params[0])
    optimizer = AdamW(params, lr=0.1, weight_decay=0.5)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert_close(params[0].detach(), before * 0.95, dtype=dtype, terms=1)


@pytest.mark.parametrize("cls, flags", [FLAGS["Nesterov"], FLAGS["AdamW"]])
def test_nan_stays_where_it_is(cls, flags):
    params = parameters(torch.float32, [(40,), (5,)])
    optimizer = cls(params, **flags)
    set_gradients(params, 0)
    params[0].grad[3] = torch.nan
    optimizer.step()
    assert params[0].isnan().nonzero().tolist() == [[3]] and not params[1].isnan().any()


def test_beta2_close_to_1():
    """1 - 0.99999 in float32 would be off by 0.1%: the host computes it."""
    params = parameters(torch.float32, [(1000,)])
    optimizer = AdamW(params, lr=0.1, betas=(0.99999, 0.999999))
    for step in range(2):
        set_gradients(params, step)
        other = twin(optimizer)
        other.step()
        optimizer.step()
        (state,), (state64,) = optimizer.state.values(), other.state.values()
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(
                state[name], state64[name], dtype=torch.float32, terms=4, smallest=1e-7, name=name
            )


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES), flags=st.sampled_from(list(FLAGS.values())),
    block=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_parameters(shapes, dtype, flags, block, seed):
    cls, flags = flags
    params = parameters(dtype, shapes)
    optimizer = cls(params, **flags)
    with use_tile(cls.__name__.lower(), dict(BLOCK_M=block, num_warps=1)):
        for step in range(2):
            set_gradients(params, seed + step)
            other, before = twin(optimizer), [p.detach().clone() for p in params]
            other.step()
            optimizer.step()
            for p, q, b in zip(params, other.param_groups[0]["params"], before, strict=True):
                # with the values of before: a sum that is small by chance has their error
                got, want = (torch.stack([x.detach(), b.to(x.dtype)]) for x in (p, q))
                assert_close(got, want, dtype=dtype, terms=4, smallest=1e-30, teeth=False)


# --- torch's machinery --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_closure(cls):
    params = parameters(torch.float32, [(5, 3)])
    optimizer = cls(params, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()  # needs gradients, though step needs none
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert optimizer.step() is None


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_learning_rate_schedulers(cls):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizers = [cls(ours, lr=0.1), TORCH[cls](theirs, lr=0.1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler that believes step was not called
        schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 10) for o in optimizers]
        for step in range(5):
            for params, optimizer, scheduler in zip(
                (ours, theirs), optimizers, schedulers, strict=True
            ):
                set_gradients(params, step)
                optimizer.step()
                scheduler.step()
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] != 0.1
    assert_alike(ours, theirs, roundings=10)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_gradient_scaler(cls):
    """Scaled gradients are unscaled before the step, and a step with infinite ones is left out."""
    params, twins = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = cls(params, lr=0.1), TORCH[cls](twins, lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        scaler.scale(torch.ones(1, device=DEVICE))
        for p in params:
            p.grad *= scaler.get_scale()
        if step == 1:
            params[0].grad[0] = torch.inf
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert_alike(params, twins, roundings=6)


def test_a_learning_rate_in_a_tensor():
    params, twins = parameters(torch.float32), parameters(torch.float32)
    for cls, leaves in [(AdamW, params), (torch.optim.AdamW, twins)]:
        set_gradients(leaves, 0)
        cls(leaves, lr=torch.tensor(0.1)).step()
    assert_alike(params, twins, roundings=4)


@pytest.mark.core
def test_autograd_knows_that_parameters_have_changed():
    """A backward through values that a step has overwritten is an error, as with torch's."""
    for cls in (SGD, AdamW):
        p = torch.nn.Parameter(randn(5))
        loss = p.square().sum()
        p.grad = torch.ones_like(p)
        cls([p], lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_compiled_training_step():
    """`torch.compile` leaves the optimizer's step to python."""
    net, x = torch.nn.Linear(5, 3).to(DEVICE), randn(7, 5)
    optimizer = AdamW(net.parameters(), lr=0.1)

    def train():
        loss = net(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    torch.compiler.reset()
    compiled = torch.compile(train, backend="aot_eager")
    losses = [compiled().item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_hooks_run():
    called = []
    params = parameters(torch.float32, [(5,)])
    optimizer = SGD(params)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step()
    assert called == ["before", "after"]


# --- steps that a CUDA graph can hold -----------------------------------------------------------


@triton.jit
def rests_kernel(log_ptr, t_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    log_beta, t = tl.load(log_ptr), tl.load(t_ptr + offs, mask=offs < N, other=1.0)
    tl.store(out_ptr + offs, rest_of_power(log_beta, t), mask=offs < N)


@pytest.mark.core
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999])
def test_bias_corrections_are_those_of_double(beta):
    """1 - beta^t for each t up to 100,000; in float32 as written it is off by 1e-4 at first."""
    t = torch.arange(1, 100_001, dtype=torch.float32, device=DEVICE)
    log_beta = torch.tensor(math.log(beta or 1e-300), dtype=torch.float32, device=DEVICE)
    got = torch.empty_like(t)
    launch(rests_kernel, (1,), log_beta, t, got, len(t), BLOCK=2**17)
    want = 1 - torch.tensor(beta, dtype=torch.float64) ** t.double().cpu()
    error = (got.double().cpu() / want - 1).abs()
    assert error.max() < 1e-6
    if beta == 0.999:
        naive = 1 - torch.tensor(beta) ** t.cpu()
        assert (naive.double() / want - 1).abs().max() > 1e-5


def on_device(optimizer):
    """Whether every parameter's steps are counted where it lies, and how many there are."""
    steps = [
        optimizer.state[p]["step"] for group in optimizer.param_groups for p in group["params"]
    ]
    assert all(s.device.type == torch.device(DEVICE).type and s.dim() == 0 for s in steps)
    return [s.item() for s in steps]


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_counted_on_the_device_are_the_same_steps(dtype, launches):
    """Those that the host counts, to rounding, in one launch for parameters of any age."""
    shapes = [(5, 3), (2003,), (600_001,)]  # of one chunk and, in the interpreter too, of several
    params, twins = parameters(dtype, shapes), parameters(dtype, shapes)
    optimizer, other = AdamW(params, lr=0.1, capturable=True), AdamW(twins, lr=0.1)
    for step in range(4):
        for leaves in (params, twins):
            set_gradients(leaves, step)
            if step == 1:
                leaves[1].grad = None
        optimizer.step()
        other.step()
    for p, q in zip(params, twins, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps  # steps are of 0.1
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert on_device(optimizer) == [4, 3, 4]
    assert len(launches) == 4 + 1 + 1 + 2 + 2 and not optimizer._tickets[params[0].device].any()


@pytest.mark.core
@pytest.mark.parametrize("cls, flags", [FLAGS["Nesterov, weight decay, maximize"], FLAGS["AdamW"]])
def test_a_learning_rate_on_the_device_is_not_read_by_the_host(cls, flags, monkeypatch):
    params, twins = parameters(torch.float32), parameters(torch.float32)
    rate = torch.tensor(0.25, device=DEVICE)
    optimizer, other = cls(params, **flags | dict(lr=rate)), cls(twins, **flags | dict(lr=0.25))
    for step in range(3):
        if step == 2:
            rate.fill_(0.125)
            other.param_groups[0]["lr"] = 0.125
        for leaves in (params, twins):
            set_gradients(leaves, step)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__float__", lambda _: pytest.fail("the host waits"))
            optimizer.step()
        other.step()
    assert_alike(params, twins, roundings=3)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_capturable_state_dict_goes_both_ways(ours_first):
    params, reference = parameters(torch.float32), parameters(torch.float32)
    classes = [AdamW, torch.optim.AdamW][:: 1 if ours_first else -1]
    gpu = dict(capturable=True) if DEVICE == "cuda" else dict(capturable=False)  # torch's needs one
    optimizer = classes[0](params, **(dict(capturable=True) if ours_first else gpu))
    other = torch.optim.AdamW(reference)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            if not ours_first:
                state["param_groups"][0]["capturable"] = True
            elif DEVICE == "cpu":
                state["param_groups"][0]["capturable"] = False
            optimizer = classes[1](params)
            optimizer.load_state_dict(state)
        for leaves in (params, reference):
            set_gradients(leaves, step)
        optimizer.step()
        other.step()
    assert_alike(params, reference, roundings=12)
    steps = [optimizer.state[p]["step"].item() for p in params if p.numel()]
    assert steps == [6.0] * 7


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls, flags", FLAGS.values(), ids=FLAGS)
def test_copies_are_the_rounded_parameters(cls, flags, dtype):
    """The same steps, bit for bit, as with the gradients cast to float32: and in one launch."""
    params, twins = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = cls(params, **flags), cls(twins, **flags)
    copies = optimizer.make_copies(dtype)
    assert [c.stride() for c in copies.values()] == [p.stride() for p in params]
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            copies[p].grad = torch.empty_like(copies[p]).copy_(randn(*p.shape, seed=10 * step + i))
            q.grad = copies[p].grad.float()
            p.grad = torch.full_like(p, 99.0)  # which is not asked
        optimizer.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
        assert all(torch.equal(copy, p.to(dtype)) for p, copy in copies.items())
    optimizer.zero_grad()
    assert all(p.grad is None and copy.grad is None for p, copy in copies.items())


def test_a_channels_last_parameter_has_a_channels_last_copy():
    (p,) = parameters(torch.float32, [(4, 3, 5, 5)], layout="channels_last")
    optimizer = SGD([p], lr=1.0)
    copy = optimizer.make_copies(torch.bfloat16)[p]
    before, grad = p.detach().clone(), randn(4, 3, 5, 5, dtype=torch.bfloat16)
    copy.grad = grad.contiguous()  # lies differently
    loss = copy.square().sum()
    optimizer.step()
    assert torch.equal(p, before - grad.float()) and torch.equal(copy, p.bfloat16())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(TypeError, match="copy must be float32, .* got int32"):
        optimizer.make_copies(torch.int32)


@pytest.fixture
def graphs(monkeypatch):
    """Captures as a GPU has them: launches are kept and not done, and replayed as they were.

    What is allocated on the stream of the capture lies in the graph's memory, which a replay may
    overwrite before any launch.
    """
    streams = ["outer"]

    class Graph:
        def __init__(self):
            self.launches, self.memory = [], []

        def replay(self):
            for kernel, grid, args, meta in self.launches:
                assert not any(arg is mine for arg in args for mine in self.memory)
                real(kernel, grid, *args, **meta)

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    def empty_like(x, **options):
        made = empty(x, **options)
        if isinstance(streams[-1], Graph):
            streams[-1].memory.append(made)
        return made

    @contextlib.contextmanager
    def captured(graph):
        with on(graph):
            yield from capturing(graph)

    def capturing(graph):
        monkeypatch.setattr(module, "_capturing", lambda device: True)
        monkeypatch.setattr(
            module,
            "launch",
            lambda k, grid, *args, **meta: graph.launches.append((k, grid, args, meta)),
        )
        yield
        monkeypatch.setattr(module, "_capturing", lambda device: False)
        monkeypatch.setattr(module, "launch", real)

    real, empty = module.launch, torch.empty_like
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "graph", captured)
    return Graph


@pytest.mark.core
@pytest.mark.skipif(DEVICE == "cuda", reason="there the real thing is tested")
@pytest.mark.interpreter("a kernel gets addresses that were written into a tensor by hand")
@pytest.mark.parametrize("cls, flags", CAPTURABLE.values(), ids=CAPTURABLE)
def test_replays_are_steps(cls, flags, graphs):
    """With gradients that are new in the capture, and float16 copies (which NumPy has)."""
    both = []
    for replayed in (False, True):
        params = parameters(torch.float32)
        lr = torch.tensor(0.5)
        optimizer = cls(params, **flags | dict(lr=lr))
        copies, graph = optimizer.make_copies(torch.float16), graphs()
        for step in range(5):
            if step == 1 and replayed:
                optimizer.zero_grad()
                for copy in copies.values():
                    copy.grad = torch.zeros_like(copy)
                with capture(graph):
                    optimizer.step()
                assert len(graph.launches) == 1
            for i, copy in enumerate(copies.values()):
                if copy.grad is None:
                    copy.grad = torch.zeros_like(copy)
                copy.grad.copy_(randn(*copy.shape, seed=10 * step + i))
            lr.fill_(0.5 / (step + 1))
            graph.replay() if replayed and step else optimizer.step()
        both.append([*params, *copies.values()])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_tickets_are_made_before_a_capture_needs_them():
    """Of steps that had few gradients: what a capture makes, only a replay would set to zero."""
    params = parameters(torch.float32, [(4,), (5,), (6,)])
    optimizer = AdamW(params, capturable=True)
    made = []
    for p in params:
        set_gradients([p], 0)
        optimizer.step()
        optimizer.zero_grad()
        made.append(optimizer._tickets[p.device])
    set_gradients(params, 1)
    optimizer.step()
    assert all(t is made[0] for t in [*made, optimizer._tickets[params[0].device]])


@pytest.mark.skipif(DEVICE == "cuda", reason="there the real thing is tested")
def test_what_cannot_be_captured(graphs, monkeypatch):
    params = parameters(torch.float32)
    set_gradients(params, 0)
    counted, young = AdamW(params), AdamW(params, capturable=True)
    counted.step()
    for optimizer in (counted, young, SGD(params, momentum=0.9)):
        with pytest.raises(RuntimeError, match="once a step has been taken outside"):
            with capture(graphs()):
                optimizer.step()
        monkeypatch.setattr(module, "_capturing", lambda device: False)
    with pytest.raises(RuntimeError, match="within tilelab.kernels.optim.capture"):
        with torch.cuda.graph(graphs()):
            SGD(params).step()


# --- wrong input --------------------------------------------------------------------------------

P = torch.ones(4, 6, device=DEVICE)
WRONG = {
    "no parameters": (([],), {}, ValueError, "empty parameter list"),
    "a tensor": ((P,), {}, TypeError, "params argument"),
    "integers": (([P.int()],), {}, TypeError, "params must be float32, .* got int32"),
    "float64": (([P.double()],), {}, TypeError, "params must be float32, .* got float64"),
    "complex": (([P.cfloat()],), {}, TypeError, "params must be float32, .* got complex64"),
    "sparse": (([P.to_sparse()],), {}, TypeError, "params must be .*strided.* got torch.sparse"),
    "gaps": (([P[:, ::2]],), {}, ValueError, r"params .* gaps .* \[4, 3\] with strides \[6, 2\]"),
    "overlaps": (([P[:1].expand(4, 6)],), {}, ValueError, r"params .* with strides \[0, 1\]"),
    "lr negative": (([P],), dict(lr=-1.0), ValueError, "lr must be finite .* got -1.0"),
    "lr NaN": (([P],), dict(lr=math.nan), ValueError, "lr must be finite .* got nan"),
    "lr text": (([P],), dict(lr="fast"), TypeError, "lr must be a number, got 'fast'"),
    "decay negative": (([P],), dict(weight_decay=-0.1), ValueError, "weight_decay must be"),
    "a group's lr": (([dict(params=[P], lr=-2)],), {}, ValueError, "lr must be .* got -2"),
}
WRONG_SGD = {
    "momentum": (([P],), dict(momentum=-0.9), ValueError, "momentum must be .* got -0.9"),
    "dampening": (([P],), dict(dampening=None), TypeError, "dampening must be .* got None"),
    "Nesterov alone": (([P],), dict(nesterov=True), ValueError, "nesterov .* momentum=0 and"),
    "Nesterov dampened": (
        ([P],), dict(nesterov=True, momentum=0.9, dampening=0.1), ValueError, "dampening=0.1",
    ),
    "fused": (([P],), dict(fused=True), TypeError, "unexpected keyword argument 'fused'"),
}  # fmt: skip
WRONG_ADAMW = {
    "beta of 1": (([P],), dict(betas=(0.9, 1.0)), ValueError, r"betas .* got \(0.9, 1.0\)"),
    "beta negative": (([P],), dict(betas=(-0.1, 0.9)), ValueError, r"betas .* got \(-0.1"),
    "three betas": (([P],), dict(betas=(0.1, 0.2, 0.3)), ValueError, "betas must be two"),
    "eps negative": (([P],), dict(eps=-1e-8), ValueError, "eps must be .* got -1e-08"),
    "amsgrad": (([P],), dict(amsgrad=True), TypeError, "unexpected keyword argument 'amsgrad'"),
}


@pytest.mark.core
@pytest.mark.parametrize(
    "cls, args, flags, error, message",
    [(cls, *case) for cls in (SGD, AdamW) for case in WRONG.values()]
    + [(SGD, *case) for case in WRONG_SGD.values()]
    + [(AdamW, *case) for case in WRONG_ADAMW.values()],
    ids=[*(f"{c} {k}" for c in ("SGD", "AdamW") for k in WRONG), *WRONG_SGD, *WRONG_ADAMW],
)
def test_wrong_input(cls, args, flags, error, message):
    with pytest.raises(error, match=message):
        cls(*args, **flags)


def test_a_refused_group_is_not_added():
    optimizer = SGD([P.clone()])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group(dict(params=[P.clone()], lr=-1.0))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(dict(params=[P.clone()], lr=1.0))
    assert len(optimizer.param_groups) == 2


@pytest.mark.core
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_sparse_gradient_is_refused_before_any_launch(cls, launches):
    embedding = torch.nn.Embedding(10, 3, sparse=True).to(DEVICE)
    embedding(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    first = torch.nn.Parameter(randn(5))
    first.grad = torch.ones_like(first)
    optimizer = cls([first, *embedding.parameters()])
    with pytest.raises(TypeError, match="grad must be a dense .* got torch.sparse_coo"):
        optimizer.step()
    assert not launches and not optimizer.state


def test_a_state_that_does_not_fit_is_refused(launches):
    params = parameters(torch.float32, [(4, 3)])
    optimizer = AdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"exp_avg must have .* \[4, 3\], got \[2, 3\]"):
        optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(4, 3, device=DEVICE).half()
    with pytest.raises(TypeError, match=r"exp_avg must have the dtype of params .* got float16"):
        optimizer.step()
    assert len(launches) == 1


def test_amsgrad_is_refused_and_the_state_kept():
    params = parameters(torch.float32, [(4, 3)])
    set_gradients(params, 0)
    optimizer, other = AdamW(params, lr=0.5), torch.optim.AdamW(params, amsgrad=True)
    optimizer.step()
    other.step()
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls, flags", [FLAGS["SGD"], FLAGS["Nesterov"], FLAGS["AdamW"]])
def test_parameters_of_a_resnet(cls, flags, dtype):
    filters = [(64, 3, 7, 7)] + [(c, c, 3, 3) for c in (64, 128, 256, 512) for _ in range(4)]
    params = parameters(dtype, filters, layout="channels_last")
    params += parameters(dtype, [(512,)] * 40 + [(1000, 512), (1000,)])
    optimizer = cls(params, **flags)
    for step in range(3):
        set_gradients(params, step)
        step_and_check(optimizer)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31():
    """The last elements lie beyond 2^31: an int32 offset would be negative."""
    need_memory(24)
    p = torch.nn.Parameter(torch.zeros(2**31 + 1000, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[-2000:] = randn(2000, dtype=torch.bfloat16)
    SGD([p], lr=0.5).step()
    assert torch.equal(p.detach()[-2000:], -0.5 * p.grad[-2000:])
    assert not p.detach()[:2000].any()


@pytest.mark.gpu
@pytest.mark.parametrize("cls, flags", CAPTURABLE.values(), ids=CAPTURABLE)
def test_a_cuda_graph_is_bit_for_bit_the_same(cls, flags):
    """Gradients made in the capture, and a learning rate that changes from replay to replay.

    What a step has freed, the graph's memory has room for: a table there would be overwritten.
    """
    try:
        weights = {}
        for captured in (False, True):
            params = parameters(torch.float32)
            lr = torch.full((), 0.1, device="cuda")
            optimizer = cls(params, **flags | dict(lr=lr))
            copies = optimizer.make_copies(torch.bfloat16)
            source = [torch.empty_like(c) for c in copies.values()]

            def work(copies=copies, source=source, optimizer=optimizer):
                for copy, grad in zip(copies.values(), source, strict=True):
                    copy.grad = 2 * grad
                freed = [torch.full((2**n,), -1, device="cuda") for n in range(5, 12)]
                del freed
                optimizer.step()

            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            for step in range(5):
                for i, grad in enumerate(source):
                    grad.fill_(0.1 * i + step)
                lr.fill_(0.1 / (1 + step))
                if captured and step == 1:
                    with capture(graph, stream=stream):
                        work()
                if step == 1:  # plans, tickets and state have been made
                    torch.cuda.set_sync_debug_mode("error")
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    graph.replay() if captured and step else work()
                torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.set_sync_debug_mode("default")
            weights[captured] = [*params, *copies.values()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("cls, flags", [(AdamW, dict(lr=0.1)), *CAPTURABLE.values()])
def test_a_capture_that_cannot_work_is_refused(cls, flags):
    """Steps that the host counts; state that is not there yet; a table that nobody fills in."""
    params = parameters(torch.float32)
    set_gradients(params, 0)
    optimizer = cls(params, **flags)
    if not optimizer.defaults.get("capturable", True) or "momentum" in flags:
        with pytest.raises(RuntimeError, match="once a step has been taken outside"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
    optimizer.step()
    if optimizer.defaults.get("capturable", True):
        with pytest.raises(RuntimeError, match="within tilelab.kernels.optim.capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
